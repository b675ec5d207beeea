"""`python -m launch model ...`: versions of a model in a registry."""
