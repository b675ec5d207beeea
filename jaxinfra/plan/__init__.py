"""Ahead-of-time compilation of the train step for TPUs and GPUs that are not attached."""
