"""The command line in a clone: `python -m launch`."""
