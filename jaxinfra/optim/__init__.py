"""How parameters move: learning-rate schedules, optimisers, gradient clipping, averaged weights.

Everything here is a pure function of pytrees and runs under explicit sharding: the state of an optimiser is
sharded like the parameters that it belongs to. What a parameter is for is read from its `ParamSpec`, never
guessed from its name or its shape.
"""
