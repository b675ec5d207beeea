"""Optimizers, learning-rate schedules, gradient clipping and averaged weights, as pure functions of pytrees.

Optimizer state is sharded like its parameters. A parameter's treatment follows from its `ParamSpec`, not from its name
or shape.
"""
