"""What times the framework against hand-written code, and compares its meshes with one device.

The commands `bench` and `parity` are its users; nothing else imports it.
"""

CONFIG = "configs/bench_small.py"
"""The model that is timed unless another is named."""
