"""`python -m launch data ...`: make a store, look at it, check it, and see what a run is fed."""
