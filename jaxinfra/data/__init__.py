"""What a run reads: samples of stores, in an order that is a pure function of the seed and the step.

    store --samples--> ids(seed, step) --batches--> host arrays --prefetch--> device arrays       every step

| read in this order | |
| --- | --- |
| `interfaces` | what a run needs of its data |
| `store/`, `tokenizer/` | arrays, manifest, versions; token ids and text |
| `store_data`, `tokens`, `mixture`, `pairs`, `image_data` | what a run's config names, and samples of it |
| `order`, `mixing`, `packing`, `sequences` | pure functions |
| `batches`, `buffers`, `prefetch`, `stopwatch` | from samples to the devices |
| `inspect` | what a store holds and a batch says, in lines for people |

There is no iterator state: a run starts at any step, on any number of processes, by asking for that step. Only
`prefetch` and iterating `batches` (by Grain) import JAX. What makes a store is `jaxinfra.prepare`.
"""
