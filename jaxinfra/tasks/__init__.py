"""Tasks of lm-eval, run on a `Sampler`. The package lm-eval is imported when tasks are loaded."""
