"""`python -m launch data ...`: prepares a store, shows it, verifies it, and shows what a run reads."""
