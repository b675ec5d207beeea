"""Writes the parameters of a model into a folder of safetensors, each process its own part.

All names, shapes and offsets are known before the first byte. The devices bring a layer's part of a parameter into the
order of the file, so that each of them has a run of consecutive bytes, which its process writes there: no tensor is
whole on a device or a host. Into a bucket, each process writes whole files, which it puts together on its disk first.

What is not finished is in a folder `.unfinished`, and `config.json` comes last: nothing loads half a model. An export
that was killed goes on with the files that are not there yet.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from io import FileIO
from itertools import batched
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.failpoints import failpoint
from jaxinfra.interop.config_json import EXPORT_PLAN
from jaxinfra.interop.pattern import Layout
from jaxinfra.interop.reading import FileOrder, file_order, parameter_spec, reshard
from jaxinfra.interop.rules import Binding
from jaxinfra.interop.safetensors import INDEX, header_of
from jaxinfra.parallel.sharding import axis_names
from jaxinfra.storage.checks import check_space
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.files import upload_file
from jaxinfra.storage.objects import ObjectStore

RECEIPT = "export.json"
"""The file that names the source of an export, with the SHA-256 of each file of weights."""

MAX_FILE_BYTES = 5_000_000_000
_UNFINISHED = EXPORT_PLAN.partition("/")[0]
_HASHED_BYTES = 1 << 20  # read at once
_LAST = ("config.json", "adapter_config.json")

type Gather = Callable[[Any], list[Any]]
"""Returns the JSON values of all processes; all must call it."""


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """A file of weights."""

    name: str
    header: bytes  # its first bytes
    offsets: Mapping[str, int]  # the offset of each tensor in it
    nbytes: int  # its length


def check_destination(destination: str) -> None:
    """Raises ConfigError unless a folder is new, empty or that of an unfinished export; StorageError if none can be."""
    objects = ObjectStore(destination)
    if (folder := objects.folder) is not None:
        with storage_errors(folder, fix="name a folder on a disk, which you may write to"):
            there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
            if not there.is_dir():
                raise ConfigError(f"{there}: is a file; name a new folder")
            tempfile.TemporaryDirectory(prefix=".jaxinfra-", dir=there).cleanup()  # permissions do not show all
    # A file in `.unfinished` without a plan is of an export that was killed as it began.
    names = [name for name in objects.list_names() if not name.startswith(f"{_UNFINISHED}/")]
    if names and not objects.exists(EXPORT_PLAN):
        raise ConfigError(f"{objects.url}: has {names[0]} already; name a new folder")


def plan_files(
    bindings: Iterable[Binding],
    dtypes: Mapping[str, np.dtype],
    max_bytes: int = MAX_FILE_BYTES,
    stem: str = "model",
) -> list[PlannedFile]:
    """Divides the tensors of a model over files `stem...`, layer by layer; `dtypes` are of the parameters by path."""
    files, size = [list[tuple[str, np.dtype, tuple[int, ...]]]()], 0
    for _, name, dtype, shape in sorted(_tensors(bindings, dtypes), key=lambda tensor: tensor[0]):
        nbytes = prod(shape) * dtype.itemsize
        if files[-1] and size + nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append((name, dtype, shape))
        size += nbytes
    planned = []
    for number, tensors in enumerate(files, 1):
        header, offsets = header_of(tensors)
        name = f"{stem}.safetensors" if len(files) == 1 else f"{stem}-{number:05}-of-{len(files):05}.safetensors"
        nbytes = len(header) + sum(prod(shape) * dtype.itemsize for _, dtype, shape in tensors)
        planned.append(PlannedFile(name=name, header=header, offsets=offsets, nbytes=nbytes))
    return planned


def _tensors(
    bindings: Iterable[Binding], dtypes: Mapping[str, np.dtype]
) -> Iterator[tuple[int, str, np.dtype, tuple[int, ...]]]:
    """Yields the layer, name, dtype and shape of each tensor."""
    for binding in bindings:
        for number, name in enumerate(binding.names):
            layer = -1 if binding.layers is None else binding.layers[number // (binding.experts or 1)]
            yield layer, name, dtypes[binding.parts[0].path], binding.shape


def write_model(
    destination: str,
    params: Mapping[str, jax.Array],
    bindings: Sequence[Binding],
    others: Mapping[str, bytes],
    *,
    source: Mapping[str, Any],
    dtypes: Mapping[str, np.dtype] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    stem: str = "model",
    gather: Gather = lambda value: [value],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes a model into a folder or bucket, and returns the receipt; all processes must call it.

    Raises ConfigError if the folder has other files, and StorageError before the first byte if there is no space.

    Args:
        destination: a path on a disk that all processes share, or a URL.
        params: the parameters, by path.
        bindings: the tensors that hold them.
        others: other files, such as `config.json`.
        source: what is exported, for the receipt.
        dtypes: of the tensors, by the path of the parameter; None keeps theirs.
        max_file_bytes: a file is longer only if a tensor is.
        stem: begins the names of files of weights.
        gather: see `Gather`.
        progress: called with the bytes that are written, and with all of them.
    """
    dtypes = {path: np.dtype(array.dtype) for path, array in params.items()} | dict(dtypes or {})
    files = plan_files(bindings, dtypes, max_file_bytes, stem)
    writer = _Writer(ObjectStore(destination), files, [*others], source, gather)
    with writer.lock:
        writer.begin()
        total, done = sum(file.nbytes for file in files), 0
        # A thread hashes what is written while the rest is.
        with writer.work_folder() as folder, ThreadPoolExecutor(1) as pool:
            finished = []
            for number, file in enumerate(files):
                if not writer.is_done(file):
                    hashed = _Hashed(folder / file.name)
                    on_written = partial(pool.submit, hashed.add_until) if writer.is_alone(number) else None
                    _write_file(writer, hashed.path, number, params, bindings, dtypes, on_written)
                    if writer.is_owner(number):
                        finished.append(pool.submit(writer.finish, hashed, file))
                done += file.nbytes
                progress(done, total)
            for each in finished:
                each.result()
            gather(None)
        return writer.end(others)


@dataclass
class _Writer:
    """The destination of an export, with what is finished there.

    A finished file has an entry `.unfinished/NAME.json` until the export ends.
    """

    objects: ObjectStore
    files: Sequence[PlannedFile]
    others: Sequence[str]
    source: Mapping[str, Any]
    gather: Gather

    def __post_init__(self) -> None:
        self.lock, self.is_shared = ExitStack(), self.objects.folder is not None
        self.index, self.count = jax.process_index(), jax.process_count()
        headers = hashlib.sha256(b"".join(file.header for file in self.files)).hexdigest()
        files = [file.name for file in self.files]
        self.plan = json.dumps({"source": dict(self.source), "headers": headers, "files": files})

    def is_owner(self, number: int) -> bool:
        """Whether this process hashes a file, and in a bucket writes it."""
        return number % self.count == self.index

    def is_alone(self, number: int) -> bool:
        """Whether this process writes all of a file, and hashes it."""
        return self.is_owner(number) and (self.count == 1 or not self.is_shared)

    def begin(self) -> None:
        """Checks that the destination is empty, or has the same export unfinished, and that there is space."""
        error = self._try_begin() if self.index == 0 else None
        if error := self.gather(error)[0]:
            kind, message = error
            raise (ConfigError if kind == "ConfigError" else StorageError)(message)

    def _try_begin(self) -> list[str] | None:
        try:
            names, plan = self.objects.list_names(), self.objects.read_or_none(EXPORT_PLAN)
            goes_on = plan == self.plan.encode()
            own = {*(file.name for file in self.files), *self.others, RECEIPT, INDEX} if goes_on else set[str]()
            left = [name for name in names if name not in own and not name.startswith(f"{_UNFINISHED}/")]
            if plan is not None and not goes_on:
                raise ConfigError(
                    f"{self.objects.url}: has another export, unfinished; delete it, or name a new folder"
                )
            if left:
                raise ConfigError(f"{self.objects.url}: has {left[0]} already; name a new folder")
            self._require_space()
            self._take_lock()
            self.objects.write(EXPORT_PLAN, self.plan.encode())
        except (ConfigError, StorageError) as error:
            return [type(error).__name__, str(error)]
        return None

    def _take_lock(self) -> None:
        """Keeps other exports out of a folder, until this process ends."""
        if (folder := self.objects.folder) is None:
            return
        with storage_errors(folder):
            (folder / _UNFINISHED).mkdir(parents=True, exist_ok=True)
            lock = self.lock.enter_context((folder / _UNFINISHED / "lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"{folder}: another export writes there now; wait for it, or name a new folder"
                raise ConfigError(message) from None

    def _require_space(self) -> None:
        missing = [file.nbytes for file in self.files if not self.is_done(file)]
        # A process has at most two files of a bucket on its disk: one is uploaded while the next one is written.
        needed = sum(missing) if self.is_shared else 2 * max(missing, default=0)
        folder = self.objects.folder or Path(tempfile.gettempdir())
        check_space(folder, needed, purpose="the export", fix="write elsewhere")

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        """Yields the folder for files that are being written: a shared one, or for a bucket that of this process."""
        if self.objects.folder is not None:
            yield self.objects.folder / _UNFINISHED
            return
        with tempfile.TemporaryDirectory(prefix="jaxinfra-export-") as folder:
            yield Path(folder)

    def is_done(self, file: PlannedFile) -> bool:
        """Whether a file was finished, by an earlier export that was killed."""
        return self.objects.exists(f"{_UNFINISHED}/{file.name}.json") and self.objects.exists(file.name)

    def finish(self, hashed: "_Hashed", file: PlannedFile) -> None:
        """Hashes the rest of a written file, and uploads it into a bucket."""
        path = hashed.path
        with storage_errors(path):
            hashed.add_until(file.nbytes)
            entry = {"bytes": file.nbytes, "sha256": hashed.sha256.hexdigest()}
            if self.objects.folder is not None:
                os.replace(path, self.objects.folder / file.name)
            else:
                upload_file(path, self.objects.url_of(file.name))
                path.unlink()
        self.objects.write(f"{_UNFINISHED}/{file.name}.json", json.dumps(entry).encode())

    def end(self, others: Mapping[str, bytes]) -> dict[str, Any]:
        """Writes the index, the other files and the receipt, `config.json` last; returns the receipt."""
        if self.index:
            return self.gather(None)[0]
        entries = {file.name: self.objects.read(f"{_UNFINISHED}/{file.name}.json") for file in self.files}
        receipt = {"source": dict(self.source), "files": {name: json.loads(entry) for name, entry in entries.items()}}
        if len(self.files) > 1:
            total = sum(file.nbytes - len(file.header) for file in self.files)
            weight_map = {name: file.name for file in self.files for name in file.offsets}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self.objects.write(INDEX, json.dumps(index, indent=2).encode())
        self.objects.write(RECEIPT, (json.dumps(receipt, indent=2) + "\n").encode())
        for name in sorted(others, key=lambda name: name in _LAST):
            self.objects.write(name, others[name])
        self.objects.delete_below(_UNFINISHED)
        if self.objects.folder is not None:
            shutil.rmtree(self.objects.folder / _UNFINISHED, ignore_errors=True)
        return self.gather(receipt)[0]


class _Hashed:
    """The SHA-256 of a file that is being written."""

    def __init__(self, path: Path):
        self.path, self.sha256, self._until = path, hashlib.sha256(), 0

    def add_until(self, end: int) -> None:
        """Adds the next bytes, which are written up to `end`."""
        block = memoryview(bytearray(_HASHED_BYTES))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._until)
            while count := file.readinto(block[: end - self._until]):
                self.sha256.update(block[:count])
                if hasattr(os, "posix_fadvise"):
                    # Linux begins with what the disk has not got yet: the last `fsync` then has little to wait for.
                    os.posix_fadvise(file.fileno(), self._until, count, os.POSIX_FADV_DONTNEED)
                self._until += count


def _write_file(
    writer: _Writer,
    path: Path,
    number: int,
    params: Mapping[str, jax.Array],
    bindings: Sequence[Binding],
    dtypes: Mapping[str, np.dtype],
    on_written: Callable[[int], object] | None,
) -> None:
    """Writes one file, in all processes; calls `on_written` with the number of its first bytes that are written."""
    file, writes = writer.files[number], writer.is_shared or writer.is_owner(number)
    with storage_errors(path):
        if writes and (writer.index == 0 or not writer.is_shared):
            with path.open("wb") as created:
                created.write(file.header)
                os.posix_fallocate(created.fileno(), 0, file.nbytes)
        writer.gather(None)
        # Without a buffer: what it holds after an error would be written again when the file is closed.
        opened = path.open("r+b", buffering=0) if writes else nullcontext()
    items = list[tuple[int, Binding, int, list[int | None]]]()
    for binding in bindings:
        for layer, names in enumerate(batched(binding.names, binding.experts or 1)):  # one tensor, or all experts
            if any(name in file.offsets for name in names):
                offsets = [file.offsets.get(name) for name in names]
                items.append((min(offset for offset in offsets if offset is not None), binding, layer, offsets))
    # A thread writes rows while the devices prepare the next ones.
    with opened as out, ThreadPoolExecutor(1) as pool:
        written = None
        for first, binding, layer, offsets in sorted(items, key=lambda item: item[0]):
            for start, rows in _rows(binding, layer, params, dtypes, whole=not writer.is_shared):
                if written is not None:
                    written.result()
                if on_written is not None:
                    on_written(first)
                if out is not None:
                    written = pool.submit(_write_rows, out, binding, offsets, start, rows)
        if written is not None:
            written.result()
        if out is not None:
            with storage_errors(path):
                failpoint("export", number)
                os.fsync(out.fileno())
    writer.gather(None)


def _write_rows(
    out: FileIO, binding: Binding, offsets: Sequence[int | None], start: Sequence[int], rows: jax.Array
) -> None:
    """Writes rows of the tensors of one layer; those of experts `[experts, *rows]`, from expert `start[0]` on."""
    values = np.asarray(rows) if binding.experts is not None else np.asarray(rows)[None]
    first = start[0] if binding.experts is not None else 0
    for expert, own in enumerate(values, first):
        if (offset := offsets[expert]) is not None:
            row_bytes = own.nbytes // max(own.shape[0], 1) if own.ndim else 0
            with storage_errors(out.name):
                out.seek(offset + start[-1] * row_bytes)
                rest = memoryview(np.ascontiguousarray(own).reshape(-1).view(np.uint8))
                while rest:  # one call may write a part, and writes at most 2 GiB
                    rest = rest[out.write(rest) :]


def _rows(
    binding: Binding, layer: int, params: Mapping[str, jax.Array], dtypes: Mapping[str, np.dtype], *, whole: bool
) -> Iterator[tuple[Sequence[int], jax.Array]]:
    """Yields rows of a layer's tensors on a device, and where they begin: this process's own ones, or all of them."""
    for parts in binding.groups:
        layouts = tuple(part.layout for part in parts)
        arrays = tuple(params[part.path] for part in parts)
        sharding, lead = arrays[0].sharding, binding.lead[0 if binding.layers is None else 1 :]
        assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
        spec = sharding.spec if binding.layers is None else P(*sharding.spec[1:])
        order = FileOrder(P(), P()) if whole else file_order(NamedSharding(sharding.mesh, spec), lead, layouts[0])
        index = None if binding.layers is None else jnp.asarray(layer)
        array = _to_theirs(arrays, index, layouts, dtypes[parts[0].path], order)
        first, _ = layouts[0].rows(0, 0)
        for shard in array.addressable_shards:
            if shard.replica_id == 0 or (whole and shard.device == array.addressable_shards[0].device):
                starts = [cut.start or 0 for cut in shard.index[: len(lead) + 1]] or [0]
                starts[-1] += first
                yield starts, shard.data


@partial(jax.jit, static_argnums=(2, 3, 4))
def _to_theirs(
    params: Sequence[jax.Array], layer: jax.Array | None, layouts: Sequence[Layout], dtype: np.dtype, order: FileOrder
) -> jax.Array:
    """Returns rows of the tensors of one layer, `[*experts, *rows]`, in the order of the files."""
    parts = []
    for param, layout in zip(params, layouts, strict=True):
        if layer is not None:
            param = _layer_of(param, layer)
        lead = param.ndim - len(layout.pattern.ours)
        # The barrier keeps XLA's fast transposition on CPUs: fused with a slice it is a slow loop.
        param = jax.lax.optimization_barrier(param.astype(dtype))
        parts.append(reshard(param, parameter_spec(order.whole, lead, layout)))
    lead = parts[0].ndim - len(layouts[0].pattern.ours)

    def join(*parts: jax.Array) -> jax.Array:
        found = [layout.to_theirs(part) for layout, part in zip(layouts, parts, strict=True)]
        joined = found[0] if len(found) == 1 else jnp.concatenate(found, axis=layouts[0].joined_axis())
        return joined.reshape(*joined.shape[:lead], -1, *layouts[0].shape[1:])

    specs = tuple(parameter_spec(order.whole, lead, layout) for layout in layouts)
    return jax.reshard(jax.shard_map(join, in_specs=specs, out_specs=order.whole)(*parts), order.read)


def _layer_of(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    """Returns one of the stacked layers, which may be sharded over stages."""
    sharding = jax.typeof(stacked).sharding
    stages, *spec = (*sharding.spec, *[None] * (stacked.ndim - len(sharding.spec)))
    count = prod(sharding.mesh.shape[axis] for axis in axis_names(stages))
    per_stage = stacked.shape[0] // count
    by_stage = stacked.reshape(count, per_stage, *stacked.shape[1:], out_sharding=P(stages, None, *spec))
    of_each = jax.lax.dynamic_index_in_dim(by_stage, layer % per_stage, axis=1, keepdims=False)
    return jax.lax.dynamic_index_in_dim(jax.reshard(of_each, P(None, *spec)), layer // per_stage, keepdims=False)
