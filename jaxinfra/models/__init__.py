"""Configs of models, and the modules that they build: decoders, the vision transformer, any plain Flax module."""
