"""Reads and writes local files and object stores, checks free space and access, and reports failures in one line.

There are two clients because neither covers the other's work. TensorStore (`objects`) writes conditionally and reads
zarr arrays, but lists only names, not over HTTP, and has no driver for Azure or Hugging Face. fsspec (`files`) opens
seekable files in all of these, but has no conditional writes to publish a version safely.
"""
