"""All sources that a recipe may name."""

from jaxinfra.prepare.sources.generated import PythonSource, Synthetic
from jaxinfra.prepare.sources.image_folders import ImageFolders
from jaxinfra.prepare.sources.kafka import Kafka
from jaxinfra.prepare.sources.record import Source
from jaxinfra.prepare.sources.snapshots import Delta, Iceberg
from jaxinfra.prepare.sources.stdin import Stdin
from jaxinfra.prepare.sources.tables import ArrayRecords, HuggingFace, Parquet
from jaxinfra.prepare.sources.text import Jsonl, TextFiles, TextLines

_Files = TextFiles | TextLines | Jsonl | Parquet | ArrayRecords | HuggingFace | Iceberg | Delta | ImageFolders
BoundedSource = _Files | PythonSource | Synthetic | Source
"""Sources with an end, whose records can be listed, read in parallel and read again."""
AnySource = BoundedSource | Stdin | Kafka
