"""The fault matrix: what a run must survive, injected into real runs on this machine. Only `faults` imports it."""
