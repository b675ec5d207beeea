"""jaxinfra: train JAX models on any mesh from one typed config.

Importing this package imports no JAX and has no side effects; every part is imported where it is used.
"""

__version__ = "0.1.0"
