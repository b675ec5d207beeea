"""Versions of models in a registry: what a run must show before one is used, who is in use, and what is known of it."""
