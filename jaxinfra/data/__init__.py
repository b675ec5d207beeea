"""What a run reads: a corpus is prepared once into a token store, and every batch is a pure function of it.

    corpus --tokenise--> store --order(seed, step)--> windows --loader--> device arrays

Nothing here holds iterator state: the batch of step t is computed from the seed and t, so a run starts at any
step, on any number of processes, by asking for that step. Only `loader` imports jax.
"""
