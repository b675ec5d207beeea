"""Servers that tests talk to on loopback: S3, Google Cloud Storage, and faults in front of either."""
