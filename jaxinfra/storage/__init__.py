"""Reads and writes storage: local files, objects in folders and buckets, checks before long work, errors.

There are two clients, TensorStore in `objects` and fsspec in `files`, because neither can do the other's work.
TensorStore has conditional writes and reads zarr arrays, but lists names alone, not over HTTP, and has no driver for
Azure or Hugging Face. fsspec opens all of these, with files that can be sought in, but cannot publish a version safely.
"""
