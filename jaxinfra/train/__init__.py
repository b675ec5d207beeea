"""How a run is trained: the `Trainer`, the loop over the steps, and what is done and recorded around it."""
