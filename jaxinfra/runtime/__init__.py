"""The process around the training loop: devices, platforms, signals, peak FLOP/s, and the environment of a run."""
