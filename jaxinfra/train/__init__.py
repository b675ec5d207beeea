"""The `Trainer`, its step timer, and the statistics of a run."""
