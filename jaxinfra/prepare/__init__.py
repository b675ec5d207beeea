"""Prepares stores: reads records from a source, turns them into documents, and writes a version of a store.

    source --documents--> tokens --builders, on an engine--> version of a store

| read in this order | |
| --- | --- |
| `recipes/` | configs of `data prepare`: `Corpus`, `ImageSet` |
| `sources/` | where records come from: files, tables, functions, streams |
| `documents/` | from records to tokens: formats, chat templates, filters, deduplication |
| `tokenizers/` | tokenizers of a recipe: trained, read, or converted |
| `builders/` | from documents or images to parts, and from parts to arrays |
| `engines/` | run the jobs: processes of this machine, Ray, Dask, Spark |
| `prepare`, `follow` | make one version of a store; make versions of a stream |
| `workspace`, `parts` | unfinished work, which survives a kill |

A training run never imports this package: it reads stores with `jaxinfra.data`.
"""
