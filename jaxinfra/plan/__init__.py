"""What a run would be on hardware that is not here: compiled ahead of time, its text read."""
