"""Objectives: what a run minimizes, each a function of the model, its parameters and a batch."""
