"""What a run reads: made once into a store, then read in an order that is a pure function of the seed and the step.

    records --documents--> tokens --making--> store                                           once
    store --samples--> ids(seed, step) --batches--> host arrays --feed--> device arrays       every step

| read in this order | |
| --- | --- |
| `records/` | sources: files, tables, functions, streams |
| `documents/`, `tokenizer/` | from a record to token ids |
| `corpus`, `image_set` | recipes: what a config file of `data prepare` returns |
| `making/` | jobs, parts, arrays; engines; streams |
| `store/` | places, arrays, manifest, versions |
| `one_store`, `tokens`, `mixture`, `pairs`, `image_data` | what a run's config names, and samples of it |
| `order`, `mixing`, `packing`, `windows` | pure functions |
| `contract`, `batches`, `buffers`, `feed`, `stopwatch` | from samples to the devices |

There is no iterator state: a run starts at any step, on any number of processes, by asking for that step. Only `feed`
and iterating `batches` (by Grain) import JAX.
"""
