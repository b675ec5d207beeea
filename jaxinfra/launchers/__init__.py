"""Starts the processes of a run, and starts them again."""
