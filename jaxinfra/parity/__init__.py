"""The comparison of meshes with one device, and of processes with one: the command `parity`."""

PARITY_CONFIGS = ("configs/parity_dense.py", "configs/parity_moe.py")
"""Configs that are compared on every mesh by default."""
