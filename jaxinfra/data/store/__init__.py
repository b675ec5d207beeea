"""Stores on disk or in buckets: arrays, manifests and versions; written once, checked on every read."""
