"""Where the metrics of a run go: the console, a JSON Lines file, TensorBoard, and a report page.

The training loop knows one object, `tracker.Trackers`, and hands it plain Python floats. Nothing here imports
jax, waits for a device or takes part in the numbers: a run computes the same with every tracker switched off.
"""
