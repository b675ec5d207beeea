"""Checkpoints of a run, to resume training and to sample from."""
