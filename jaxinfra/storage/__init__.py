"""Reads and writes storage: local files, objects in folders and buckets, checks before long work, errors.

| module | what it does |
| --- | --- |
| `atomic` | replaces a file, or moves a folder into place, whole or not at all |
| `appender` | appends records to a file and keeps them while the disk is full |
| `outputs` | writes the files that a command ends with |
| `objects`, `connection` | reads and writes objects in folders and buckets, through TensorStore |
| `files` | lists and reads files at any URL, through fsspec |
| `checks` | checks free space and permission before long work begins |
| `errors`, `mask` | turns failures into one-line errors, and keeps credentials out of them |

There are two clients because neither can do the other's work. TensorStore has conditional writes and reads zarr arrays,
but lists names alone, not over HTTP, and has no driver for Azure or Hugging Face. fsspec opens all of these, with files
that can be sought in, but cannot publish a version safely.
"""
