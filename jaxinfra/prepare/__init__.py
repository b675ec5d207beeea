"""What makes a store: records from a source, documents from records, and a version of a store from documents.

    source --documents--> tokens --builders, on an engine--> version of a store

| read in this order | |
| --- | --- |
| `recipes/` | what a config file of `data prepare` returns: `Corpus`, `ImageSet` |
| `sources/` | where records are: files, tables, functions, streams |
| `documents/` | from a record to a document: forms, chat templates, filters, deduplication |
| `builders/` | from documents or images to parts, and from parts to arrays |
| `engines/` | where the jobs run: processes of this machine, Ray, Dask, Spark |
| `prepare`, `follow` | one version of a store; versions of a stream |
| `workspace`, `parts` | what is in the making, and outlives a kill |

A run never imports this package: what it reads is in `jaxinfra.data`.
"""
