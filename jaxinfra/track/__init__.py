"""Trackers of metrics: the console, a JSON Lines file, TensorBoard, and a report page.

The training loop hands plain Python floats to one `tracker.MultiTracker`. Nothing here imports JAX or waits for a
device, and a run computes the same numbers with every tracker switched off.
"""
