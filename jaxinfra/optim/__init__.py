"""Optimizers, learning-rate schedules, gradient clipping and averaged weights, as pure functions of pytrees.

Optimizer state is sharded like its parameters. What a parameter is for is read from its `ParamSpec`, never guessed from
its name or shape.
"""
