"""The processes of a run: how they find one another, agree on a step, and hear of signals."""
