"""Every kind of source that a recipe may name."""

from jaxinfra.data.records.array_records import ArrayRecords
from jaxinfra.data.records.hugging_face import HuggingFace
from jaxinfra.data.records.image_folders import ImageFolders
from jaxinfra.data.records.jsonl import Jsonl
from jaxinfra.data.records.kafka import Kafka
from jaxinfra.data.records.parquet import Parquet
from jaxinfra.data.records.python_source import PythonSource
from jaxinfra.data.records.stdin import Stdin
from jaxinfra.data.records.synthetic import Synthetic
from jaxinfra.data.records.text_files import TextFiles
from jaxinfra.data.records.text_lines import TextLines

AnySource = (
    TextFiles
    | TextLines
    | Jsonl
    | Parquet
    | ArrayRecords
    | HuggingFace
    | PythonSource
    | Synthetic
    | ImageFolders
    | Stdin
    | Kafka
)
