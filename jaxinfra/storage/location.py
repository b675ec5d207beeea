"""Tells folders and URLs apart. Imports nothing heavy."""

import os


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Returns whether a location is a URL, such as that of a bucket."""
    return "://" in os.fspath(location)
