"""Every kind of source that a recipe may name."""

from jaxinfra.data.records.jsonl import Jsonl
from jaxinfra.data.records.text_files import TextFiles
from jaxinfra.data.records.text_lines import TextLines

AnySource = TextFiles | TextLines | Jsonl
