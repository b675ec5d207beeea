"""Every row of a folder that `datasets.save_to_disk` wrote is a record.

Its Arrow files are read by pyarrow, as streams: `datasets` would first copy those of a store to the local disk. What
`datasets` decodes (images, audio) is given as it is stored.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, override

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare.sources.arrow import arrow_file, records_of
from jaxinfra.prepare.sources.files import cut_files
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Source
from jaxinfra.storage.files import File, is_local, list_files, local_path, opened, shown

_DICT, _STATE = "dataset_dict.json", "state.json"
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow stream; without it pyarrow reads a cut file as a shorter one


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Source):
    """Rows of a `Dataset`, or of one split of a `DatasetDict`. Files of a store are not cut.

    Attributes:
        path: folder or URL that `save_to_disk` wrote to.
        split: name of the split; None where there are no splits, or one.
    """

    path: str = ""
    split: str | None = None

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description itself."""
        if not self.path:
            yield Problem(fields=("path",), message="names no folder", fix="use path=PATH, as save_to_disk was given")
        if self.split is not None and (not self.split or set("/*?[") & set(self.split)):
            yield Problem(fields=("split",), message="is no name of a split", fix="use split=train")

    @override
    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        return cut_files(self._files(), self._rows, split_bytes)

    @override
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        first = 0
        with self._batches(piece.name) as batches:
            for batch in batches:
                count = batch.num_rows
                start = max(0, piece.start - first)
                end = count if piece.end is None else min(count, piece.end - first)
                if start < end:
                    yield from records_of(batch.slice(start, end - start), piece.name, first + start)
                first += count
                if piece.end is not None and first >= piece.end:
                    return

    def _files(self) -> list[File]:
        here, folder = shown(self.path), ""
        names = {file.name for file in list_files(self.path, "*.json")}
        if _DICT in names:
            splits = self._json(_DICT)["splits"]
            split = splits[0] if self.split is None and len(splits) == 1 else self.split
            if split not in splits:
                fix = f"use split={splits[0] if splits else 'none'}"
                raise ConfigError(f"split={split or 'none'}: {here} has {', '.join(splits)}; {fix}")
            folder = f"{split}/"
        elif self.split is not None:
            raise ConfigError(f"split={self.split}: {here} has no splits; use split=none")
        elif _STATE not in names:
            raise ConfigError(f"path={here}: has no {_STATE}; give a folder that datasets.save_to_disk wrote")
        state = self._json(folder + _STATE)
        if state.get("_indices_data_files"):
            raise ConfigError(f"path={here}: its rows are chosen by an index; save dataset.flatten_indices() instead")
        files = {file.name: file for file in list_files(self.path, f"{folder}*")}
        wanted = sorted(folder + item["filename"] for item in state["_data_files"])
        if missing := [name for name in wanted if name not in files]:
            raise DataError(f"{here}/{missing[0]}: is missing, {folder}{_STATE} names it; restore the file")
        return [files[name] for name in wanted]

    def _json(self, name: str) -> dict[str, Any]:
        with opened(self.path, name) as file:
            try:
                return json.load(file)
            except ValueError as error:
                raise DataError(f"{shown(self.path)}/{name}: is damaged ({error}); restore the file") from None

    def _rows(self, file: File) -> int:
        if not is_local(self.path):
            return 1
        with self._batches(file.name) as batches:
            return sum(batch.num_rows for batch in batches)

    @contextmanager
    def _batches(self, name: str) -> Iterator[Iterable[Any]]:
        """Opens the record batches of a file; a local one is mapped, so passing over them reads little."""
        with arrow_file(self.path, name, "huggingface") as (pa, file):
            file.seek(-min(len(_END), file.seek(0, 2)), 2)
            if file.read() != _END:
                fix = "restore the file or save the dataset again"
                raise DataError(f"{shown(self.path)}/{name}: is cut short; {fix}")
            file.seek(0)
            source = pa.memory_map(local_path(self.path, name)) if is_local(self.path) else file
            with pa.ipc.open_stream(source) as batches:
                yield batches
