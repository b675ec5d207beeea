"""Checkpoints: the state of a run on storage, to go on from and to sample from."""
