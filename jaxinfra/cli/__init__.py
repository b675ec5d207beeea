"""`python -m launch`: the command line, one small file a command."""
