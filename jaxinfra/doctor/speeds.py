"""Measures disk, bucket, links between processes and collectives, and says which of them is slow.

The best of several tries counts, and the limits are far from what sound hardware does while it is busy.
"""

import math
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfra.doctor.findings import Finding, listed
from jaxinfra.machine.chips import CHIPS, chip_name
from jaxinfra.parallel.mesh import Device
from jaxinfra.processes.connected_peers import ConnectedPeers
from jaxinfra.processes.exchange import Exchange
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.objects import ObjectStore

_FILE_BYTES, _OBJECT_BYTES, _LINK_BYTES = 2**25, 2**23, 2**22
_CPU_BYTES, _CHIP_BYTES = 2**22, 2**28  # of an all-gather: on chips so many that latency does not count
_TRIES, _ENOUGH_S, _LINK_S, _SLOW_LINK_S = 3, 10.0, 0.5, 4.0  # no further try once they have taken so long together
_SLOW_DISK, _SLOW_BUCKET, _SLOW_LINK = 20e6, 2e6, 12.5e6  # bytes/s: a link of 100 Mbit/s
_FAST = 125e6  # bytes/s, a link of 1 Gbit/s: not slow, however fast the others are
_TIMES_SLOWER = 4.0  # than the median of the others
_PUBLISHED_SHARE = 0.2  # of a published bandwidth


def rate(bytes_per_s: float) -> str:
    """Formats a bandwidth."""
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.3g} MB/s"


def _best_s(run: Callable[[], object]) -> float:
    """Returns the shortest time of a few tries."""
    taken = list[float]()
    while len(taken) < _TRIES and sum(taken) < _ENOUGH_S:
        begin_s = time.monotonic()
        run()
        taken.append(time.monotonic() - begin_s)
    return min(taken)


def disk_speeds(folder: Path) -> tuple[float, float]:
    """Returns the bytes/s that a disk writes and reads a file with, which has no name and goes; StorageError."""
    content = os.urandom(_FILE_BYTES)
    with storage_errors(folder), tempfile.TemporaryFile(dir=folder) as file:

        def write() -> None:
            file.seek(0)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

        def read() -> None:
            if hasattr(os, "posix_fadvise"):  # not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            file.read()

        return _FILE_BYTES / _best_s(write), _FILE_BYTES / _best_s(read)


def object_speeds(url: str) -> tuple[float, float]:
    """Returns the bytes/s that an object is written and read with, in a bucket; it is deleted. Raises StorageError."""
    store, name, content = ObjectStore(url), f".doctor-{uuid.uuid4().hex}", os.urandom(_OBJECT_BYTES)
    try:
        write_s = _best_s(lambda: store.write(name, content))
        return _OBJECT_BYTES / write_s, _OBJECT_BYTES / _best_s(lambda: store.read(name))
    finally:
        store.delete(name)


def judge_storage(check: str, speeds: Sequence[Sequence[float]], names: Sequence[str]) -> Finding:
    """Compares what all processes write and read, in bytes/s; NaN of a process that has measured nothing."""
    floor = _SLOW_BUCKET if check == "bucket" else _SLOW_DISK
    by_direction = [slow_ones(direction, floor) for direction in zip(*speeds, strict=True)]
    slow = [any(directions) for directions in zip(*by_direction, strict=True)]
    texts = [f"{rate(written)} written, {rate(read)} read" for written, read in speeds]
    if not any(slow):
        return Finding(check, "ok", listed(each for each in texts if "nan" not in each))
    found = listed(f"{name}: {text}" for name, text, is_slow in zip(names, texts, slow, strict=True) if is_slow)
    fix = "see what else writes there, or use root=ELSEWHERE; checkpoint.save_every=auto saves as often as loses least"
    return Finding(check, "warn", found, fix)


def slow_ones(values: Sequence[float], floor: float) -> list[bool]:
    """Says which values are below a floor, or far below the median of the others and below what is fast."""

    def limit(index: int) -> float:
        others = [value for at, value in enumerate(values) if at != index and math.isfinite(value)]
        return max(floor, min(_FAST, median(others) / _TIMES_SLOWER)) if others else floor

    return [value < limit(index) for index, value in enumerate(values)]


def link_speeds(peers: ConnectedPeers) -> list[float]:
    """Returns the bytes/s that each process gets from the one before it, by index; 0 if nothing arrives.

    No process sends and receives at the same time: acknowledgements would wait behind what a slow link sends.
    """
    count, content, best_s = peers.count, os.urandom(_LINK_BYTES), math.inf
    before, after = (peers.index - 1) % count, (peers.index + 1) % count
    turns = [2 if count % 2 and index == count - 1 else index % 2 for index in range(count)]
    with Exchange(peers) as exchange:
        for turn in sorted({*turns}):
            outgoing = {after: [(None, content)]} if turns[peers.index] == turn else {}
            begin_s, is_enough = time.monotonic(), False
            while not is_enough:
                peers.gather(None)
                since_s = time.monotonic()
                with suppress(OSError):  # the link does not work: nothing arrives
                    for _ in exchange.swap(outgoing, [before] if turns[before] == turn else []):
                        best_s = min(best_s, time.monotonic() - since_s)
                speeds = [speed for speed in peers.gather(_LINK_BYTES / best_s) if speed]
                limit_s = _LINK_S if min(speeds, default=0.0) >= _FAST else _SLOW_LINK_S
                is_enough = peers.broadcast(time.monotonic() - begin_s > limit_s)
    return peers.gather(_LINK_BYTES / best_s)


def judge_links(speeds: Sequence[float], names: Sequence[str]) -> Finding:
    """Names slow links; `speeds` are as of `link_speeds`."""
    slow = slow_ones(speeds, _SLOW_LINK)
    rows = [f"{names[at - 1]} to {names[at]}: {rate(speeds[at])}" for at in range(len(speeds)) if slow[at]]
    if not rows:
        return Finding("links", "ok", f"{len(speeds)} between processes, the slowest {rate(min(speeds))}")
    rest = [speed for speed, is_slow in zip(speeds, slow, strict=True) if not is_slow]
    found = listed(rows) + (f"; the others at least {rate(min(rest))}" if rest else "")
    if 0.0 in speeds:
        return Finding("links", "fail", found, "open all ports of the hosts for each other")
    fix = "look at cable, port, MTU and other traffic of that host, or leave it out"
    return Finding("links", "warn", found, fix)


def axis_findings(mesh: Mesh, hosts: Sequence[str]) -> Iterator[Finding]:
    """Measures an all-gather over each mesh axis, in all processes, whose hosts are given.

    The bandwidth is that of a device's links, whatever the size of the axis ("bus bandwidth", as in the tests of NCCL).
    """
    devices = np.asarray(mesh.devices)
    plain, first = Mesh(devices, mesh.axis_names, axis_types=(AxisType.Auto,) * devices.ndim), devices.flat[0]
    for dimension, (axis, size) in enumerate(mesh.shape.items()):
        if size > 1:
            length = (_CPU_BYTES if first.platform == "cpu" else _CHIP_BYTES) // 4 // size * size
            split, whole = (NamedSharding(plain, PartitionSpec(*parts)) for parts in ((axis,), ()))
            x = jax.jit(partial(jnp.zeros, length, jnp.float32), out_shardings=split)()
            gather = jax.jit(lambda x: x, out_shardings=whole)
            taken = list[float]()
            for _ in range(1 + _TRIES):  # as often in each process; the first one compiles
                begin_s = time.monotonic()
                jax.block_until_ready(gather(x))
                taken.append(time.monotonic() - begin_s)
            speed = (size - 1) / size * length * 4 / min(taken[1:])
            groups = np.moveaxis(devices, dimension, -1).reshape(-1, size)
            is_network = any(len({_part_of(device, hosts) for device in group}) > 1 for group in groups)
            yield judge_axis(f"mesh.{axis}={size}", speed, first.device_kind, is_network=is_network)


def _part_of(device: Device, hosts: Sequence[str]) -> str:
    """Returns the slice of a TPU, else the host: links within it are the chip's own."""
    return str(getattr(device, "slice_index", 0)) if device.platform == "tpu" else hosts[int(device.process_index)]


def judge_axis(check: str, bytes_per_s: float, device_kind: str, *, is_network: bool) -> Finding:
    """Compares the bandwidth of collectives over an axis with what is published of the chip, if that is known."""
    chip, found = CHIPS.get(chip_name(device_kind)), f"all-gather {rate(bytes_per_s)} a device"
    published = None if chip is None else chip.network_bytes_per_s if is_network else chip.link_bytes_per_s
    if published is None:
        return Finding(check, "ok", f"{found}; nothing is published of {device_kind}")
    found += f"; published {rate(published)} of its {'network' if is_network else 'link'}"
    if bytes_per_s >= _PUBLISHED_SHARE * published:
        return Finding(check, "ok", found)
    fix = "run it again on idle hosts; on GPUs NCCL_DEBUG=INFO says which links are taken"
    return Finding(check, "warn", found, fix)
