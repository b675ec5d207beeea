"""Prepares stores: reads records from a source, turns them into documents, and writes a version of a store.

    source --documents--> tokens --builders, on an engine--> version of a store

| read in this order | |
| --- | --- |
| `recipes/` | configs of `data prepare`: `Corpus`, `ImageSet` |
| `sources/` | read records from files, tables, functions, streams |
| `documents/` | turn records into tokens: formats, chat templates, filters, deduplication |
| `tokenizers/` | train, read or convert the tokenizer of a recipe |
| `builders/` | turn documents or images into parts, and parts into arrays |
| `engines/` | run the jobs on processes of this machine, Ray, Dask, Spark |
| `prepare`, `follow` | make one version of a store; make versions from a stream |
| `workspace`, `parts` | keep unfinished work, which survives a kill |

A recipe is the config that makes a store; a record is a row of source data; a part is the output of one job. A training
run never imports this package: it reads stores with `jaxinfra.data`.
"""
