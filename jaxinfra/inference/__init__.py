"""Restores the parameters of a run or a published model; samples from them, and scores texts."""
