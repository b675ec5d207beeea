"""What a run reads. Text: a corpus is prepared once into a token store. Every batch is a pure function of the data.

    corpus --tokenise--> store --windows--> samples --order(seed, step)--> batches --feed--> device arrays

Nothing here holds iterator state: the batch of step t is computed from the seed and t, so a run starts at any
step, on any number of processes, by asking for that step. Only `feed` imports jax.
"""
