"""The command line, `python -m launch` or `jaxinfra`: one module per command."""
