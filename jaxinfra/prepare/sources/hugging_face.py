"""Every row of a folder that `datasets.save_to_disk` wrote is a record.

Its Arrow files are read by pyarrow, as streams: `datasets` would first copy those of a store to the local disk. What
`datasets` decodes (images, audio) is given as it is stored.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare.sources.arrow import damage_named, records_of
from jaxinfra.prepare.sources.files import cut, parts_of, whole
from jaxinfra.prepare.sources.record import Bad, Found, Piece
from jaxinfra.storage.files import File, is_local, list_files, local_path, opened, shown

_DICT, _STATE = "dataset_dict.json", "state.json"
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow stream; without it pyarrow reads a cut file as a shorter one


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
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

    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        """Ranges of rows of the Arrow files. Raises as `Source.pieces` does.

        Raises:
            DataError: a file that the folder should have is missing.
        """
        return [piece for file in self._files() for piece in self._cut(file, split_bytes)]

    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        """Yields the rows `piece.start` to `piece.end` of a file. Raises as `Source.read` does."""
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
        here = shown(self.path)
        names = {file.name for file in list_files(self.path, "*.json")}
        folder = ""
        if _DICT in names:
            folder = f"{self._split(self._json(_DICT)['splits'])}/"
        elif self.split is not None:
            raise ConfigError(f"split={self.split}: {here} has no splits; use split=none")
        elif _STATE not in names:
            raise ConfigError(f"path={here}: has no {_STATE}; give a folder that datasets.save_to_disk wrote")
        state = self._json(folder + _STATE)
        if state.get("_indices_data_files"):
            raise ConfigError(f"path={here}: its rows are chosen by an index; save dataset.flatten_indices() instead")
        files = {file.name: file for file in list_files(self.path, f"{folder}*")}
        wanted = sorted(folder + item["filename"] for item in state["_data_files"])
        missing = [name for name in wanted if name not in files]
        if missing:
            raise DataError(f"{here}/{missing[0]}: is missing, {folder}{_STATE} names it; restore the file")
        return [files[name] for name in wanted]

    def _split(self, splits: Sequence[str]) -> str:
        split = splits[0] if self.split is None and len(splits) == 1 else self.split
        if split is None or split not in splits:
            raise ConfigError(
                f"split={'none' if split is None else split}: {shown(self.path)} has {', '.join(splits)}; "
                f"use split={splits[0] if splits else 'none'}"
            )
        return split

    def _json(self, name: str) -> dict[str, Any]:
        with opened(self.path, name) as file:
            try:
                return json.load(file)
            except ValueError as error:
                raise DataError(f"{shown(self.path)}/{name}: is damaged ({error}); restore the file") from None

    def _cut(self, file: File, split_bytes: int) -> list[Piece]:
        if parts_of(file.size_bytes, split_bytes) == 1 or not is_local(self.path):
            return [whole(file)]
        with self._batches(file.name) as batches:
            return cut(file, sum(batch.num_rows for batch in batches), split_bytes)

    @contextmanager
    def _batches(self, name: str) -> Iterator[Iterable[Any]]:
        """The record batches of a file; of a local one they are mapped, so passing over them reads little."""
        where = f"{shown(self.path)}/{name}"
        with opened(self.path, name) as file, damage_named(where, "huggingface") as pa:
            file.seek(-min(len(_END), file.seek(0, 2)), 2)
            if file.read() != _END:
                raise DataError(f"{where}: is cut short; restore the file or save the dataset again")
            file.seek(0)
            source = pa.memory_map(local_path(self.path, name)) if is_local(self.path) else file
            with pa.ipc.open_stream(source) as batches:
                yield batches
