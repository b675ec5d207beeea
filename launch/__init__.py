"""The command line of a clone: `python -m launch`."""
