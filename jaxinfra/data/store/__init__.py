"""Stores on disk or in buckets: arrays, manifests, versions. Written once, checked whenever they are read."""
