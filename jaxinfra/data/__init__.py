"""Reads training data: the batch of a step is a pure function of the stores, the seed and the step.

A store is a dataset that `data prepare` has tokenized into TensorStore arrays, or images in such arrays.

    store --samples--> sample_ids(seed, step) --batches--> host arrays --prefetch--> device arrays

| module | what is in it |
| --- | --- |
| `interfaces` | what a run needs: `DataConfig`, `Dataset`, `Samples` |
| `store/`, `tokenizer/` | arrays, manifest and versions on disk; text to token ids and back |
| `tokens`, `pairs`, `image_data`, `mixture` | data configs, on the base classes of `store_data` |
| `order`, `mixing`, `packing`, `sequences` | pure functions: shuffling, mixing, packing, segments and positions |
| `batches`, `buffers`, `prefetch`, `stopwatch` | make batches of samples and move them to the devices |
| `inspect` | stores and batches as text |

There is no iterator state to checkpoint: any number of processes can start at any step. JAX is imported only by
`prefetch`, and by Grain when a `BatchLoader` is iterated over. `jaxinfra.prepare` writes stores.
"""
