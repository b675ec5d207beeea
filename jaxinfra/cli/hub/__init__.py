"""`python -m launch hub ...`: checks published weights, and writes a run as a folder that transformers loads."""
