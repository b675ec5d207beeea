"""The safetensors format: a header with names, dtypes, shapes and byte ranges, then the bytes of the tensors.

Headers are read and checked without any weights. The format: https://huggingface.co/docs/safetensors.
"""

import json
import math
import re
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfra.errors import DataError, quoted
from jaxinfra.interop.config_json import parse_json
from jaxinfra.interop.folder import FIX, ModelFolder

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The dtypes of the format that are read, by their names there."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES, MAX_NAME = 100_000_000, 500
"""The longest header that readers of the format accept, and the longest name of a tensor that is accepted here."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of a model in one file, and the index of one in several."""

_FILE_NAME = re.compile(r"[\w-][\w.-]{,200}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_COMPARED_ROWS = 1 << 10  # some 64 MB in float64


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor is."""

    file: str  # name of the file
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # offset of its first byte in the file

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The tensors of a model folder, read in ranges.

    Attributes:
        folder: the folder.
        tensors: where each tensor is, by name.
        bytes_read: number of bytes of tensors that were read.
    """

    def __init__(self, folder: ModelFolder, only: str | None = None):
        """Reads the headers of all files, or of one.

        Raises DataError if a file is missing, truncated, or its header is wrong, or if there are no safetensors.
        """
        self.folder, self.tensors, self.bytes_read = folder, dict[str, StoredTensor](), 0
        self._lock = threading.Lock()
        listed = _indexed_files(folder) if only is None else {}
        for file in sorted(set(listed.values()) or [only or WEIGHTS]):
            for name, tensor in _read_header(folder, file).items():
                if name in self.tensors:
                    raise DataError(f"{folder.url_of(file)}: {name} is in {self.tensors[name].file}, too; {FIX}")
                self.tensors[name] = tensor
        for name, file in listed.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise DataError(f"{folder.url_of(INDEX)}: {quoted(name)} is not in {file}, as it says; {FIX}")

    def equal(self, name: str, other: str, part: int = 0, of: int = 1) -> bool:
        """Compares two matrices, of which it reads one of `of` parts, a block of rows at a time."""
        left, right = self.tensors[name], self.tensors[other]
        if left.shape != right.shape:
            return False
        for start in range(part * _COMPARED_ROWS, left.shape[0], of * _COMPARED_ROWS):
            shape = (min(_COMPARED_ROWS, left.shape[0] - start), *left.shape[1:])
            rows, others = np.empty(shape, left.dtype), np.empty(shape, right.dtype)
            self.read_into(name, start, rows)
            self.read_into(other, start, others)
            if not np.array_equal(rows.astype(np.float64), others.astype(np.float64)):
                return False
        return True

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out`, `[N, ...]`, with the rows of a tensor from `start` on; safe to call in several threads."""
        self.read_stored(self.tensors[name], start, out)

    def read_stored(self, tensor: StoredTensor, start: int, out: np.ndarray) -> None:
        """Fills `out` like `read_into`, with rows as they are in a file."""
        assert out.dtype == tensor.dtype and out.shape[1:] == tensor.shape[1:], (out.dtype, out.shape, tensor)
        row_bytes = tensor.nbytes // max(tensor.shape[0], 1) if tensor.shape else 0
        self.folder.read_into(tensor.file, tensor.start + start * row_bytes, out.reshape(-1).view(np.uint8))
        with self._lock:
            self.bytes_read += out.nbytes


def tensor_names(folder: ModelFolder) -> Collection[str]:
    """Returns the names of the tensors of a folder; () if it has no weights."""
    if not folder.exists(INDEX) and not folder.exists(WEIGHTS):
        return ()
    return _indexed_files(folder).keys() or _read_header(folder, WEIGHTS).keys()


def _indexed_files(folder: ModelFolder) -> dict[str, str]:
    """Returns the file of each tensor by the index; {} if the model is one file without index."""
    content = folder.read_or_none(INDEX)
    if content is not None:
        index = parse_json(content, folder.url_of(INDEX))
        try:
            files = index["weight_map"]
            if not all(isinstance(file, str) and _FILE_NAME.fullmatch(file) for file in files.values()):
                raise ValueError("a file name is none")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{folder.url_of(INDEX)}: is no index of safetensors; {FIX}") from None
        return files
    if not folder.exists(WEIGHTS):
        names = [quoted(name) for name in folder.list_names() if "/" not in name]
        if pickles := [name for name in names if name.endswith(_PICKLES)]:
            raise DataError(
                f"{folder.url_of(pickles[0])}: is a pickle, which runs code when it is read, and is refused; "
                "convert the model to safetensors (model.save_pretrained in transformers does)"
            )
        fix = f"{FIX}, or name the folder of a model with safetensors"
        raise DataError(f"{folder.url}: neither {WEIGHTS} nor {INDEX}; {fix}")
    return {}


def _read_header(folder: ModelFolder, file: str) -> dict[str, StoredTensor]:
    """Reads the header of a file and checks that its tensors fill the file without gaps."""
    url = folder.url_of(file)
    if not folder.exists(file):
        raise DataError(f"{url}: missing; {FIX}")
    length = int.from_bytes(_read_bytes(folder, file, 0, 8), "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise DataError(f"{url}: a header of {length} bytes: damaged, or no safetensors; {FIX}")
    header = parse_json(_read_bytes(folder, file, 8, length), f"{url}: header")
    try:
        found = {name: _entry(file, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{url}: its header is damaged ({quoted(str(error), 200)}); {FIX}") from None
    if odd := [name for name in found if quoted(name, MAX_NAME) != name]:
        raise DataError(f"{url}: {quoted(odd[0])} cannot be the name of a tensor; {FIX}")
    position = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != position:
            raise DataError(f"{url}: {name} begins at byte {tensor.start}, expected {position}; {FIX}")
        position += tensor.nbytes
    folder.check_sizes({file: position})
    return found


def _read_bytes(folder: ModelFolder, file: str, start: int, count: int) -> bytes:
    out = np.empty(count, np.uint8)
    folder.read_into(file, start, out)
    return out.tobytes()


def _entry(file: str, first: int, entry: Mapping[str, Any]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {quoted(entry['dtype'])} is unknown")
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(size) is int and 0 <= size < 2**62 for size in (*shape, start, stop)):
        raise ValueError("sizes must be numbers from 0 on")
    tensor = StoredTensor(file=file, dtype=DTYPES[entry["dtype"]], shape=shape, start=first + start)
    if tensor.nbytes != stop - start:
        raise ValueError(f"{stop - start} bytes for a tensor of {tensor.nbytes}")
    return tensor


def header_of(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Returns the first bytes of a file with these tensors, and the offset of each tensor in the file."""
    entries, position = dict[str, Any](), 0
    entries["__metadata__"] = {"format": "pt"}
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"}
    return len(text).to_bytes(8, "little") + text, offsets
