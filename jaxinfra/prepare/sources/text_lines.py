"""Every line of text files is a record."""

from dataclasses import dataclass
from typing import override

from jaxinfra.prepare.sources.lines import LineFiles, text_record
from jaxinfra.prepare.sources.record import Record


@dataclass(frozen=True, kw_only=True)
class TextLines(LineFiles):
    """Lines of text files, as records `{"text": str}` without the end of the line; empty lines are none."""

    pattern: str = "**/*.txt*"

    @override
    def _record(self, line: bytes) -> Record | None:
        return text_record(line) if line else None
