"""Processes and time: what a run lives in while it trains."""
