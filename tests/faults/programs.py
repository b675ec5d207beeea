"""Row 42: damaged programs in the compile cache."""

import random
from collections.abc import Iterable, Mapping

from jax._src.compilation_cache import compress_executable, decompress_executable

from jaxinfra.machine.checked_programs import SUFFIX, seal, unseal
from jaxinfra.storage.objects import ObjectStore
from tests.faults.harness import Ended, Harness, named, require
from tests.faults.matrix import row

_FOLDER, _SHORT = "JAX_COMPILATION_CACHE_DIR", "train.steps=20"
_BEGINNINGS = {b"\x55\x48\x89\xe5": b"\x0f\x0b" * 2, b"\xfd\x03\x00\x91": bytes(4)}
"""Replaces how functions begin on x86 (push rbp; mov rbp, rsp) and Arm (mov x29, sp) by instructions that kill."""


@row(
    42,
    fault="a bit flipped in each program of the compile cache, on a disk and in a bucket; an intact one that crashes",
    must="found before it is loaded, named, deleted, compiled anew; no crash loop; same bits",
)
def damaged_programs(harness: Harness) -> str:
    """Fills a cache and damages it; goes on from there on a disk, with a train step that crashes, and in a bucket."""
    folder, draw, num_flips = harness.folder / "programs", random.Random(harness.seed), 1000 if harness.is_long else 20
    first = harness.train("programs", _SHORT, env={_FOLDER: str(folder)})
    require(first.code == 0, first)
    reference = harness.run("programs").result()
    intact = {path.name.removesuffix(SUFFIX): path.read_bytes() for path in folder.glob(f"*{SUFFIX}")}
    (step,) = (key for key in intact if key.startswith("jit__train_step-"))
    flips = [unseal(step, _flipped(intact[step], draw)) for _ in range(num_flips)]
    require(flips == [None] * num_flips, f"{step}: a flipped bit was not found")
    damaged = {key: _flipped(entry, draw) for key, entry in intact.items()}
    crashing = _crashing(unseal(step, intact[step]) or b"")

    store = _write(str(folder), {**damaged, step: seal(step, crashing)})
    ended = harness.train("programs-disk", _SHORT, "--supervise", env={_FOLDER: str(folder)})
    _require_compiled(ended, store, damaged.keys() - {step})
    (line,) = (line for line in ended.err.splitlines() if line.startswith("restart "))
    named(line, "process 0 killed by SIG", "before its first step", "compiled anew")
    require(unseal(step, store.read(step + SUFFIX)) not in (None, crashing), f"{step}: not compiled anew")
    harness.same_bits("programs-disk", reference)

    with harness.bucket() as bucket:
        store = _write(f"{bucket.url}/compiled", damaged)
        ended = harness.train("programs-bucket", _SHORT, env={_FOLDER: store.url, **bucket.environment})
        _require_compiled(ended, store, damaged)
    signal = line.partition("killed by ")[2].partition(" ")[0]
    return (
        f"{num_flips} of {num_flips} flips found; {len(damaged)} programs named and compiled anew on a disk and in a "
        f"bucket; {signal} once; {harness.same_bits('programs-bucket', reference)}"
    )


def _write(url: str, entries: Mapping[str, bytes]) -> ObjectStore:
    store = ObjectStore(url)
    for key, entry in entries.items():
        store.write(key + SUFFIX, entry)
    return store


def _flipped(content: bytes, draw: random.Random) -> bytes:
    at, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


def _crashing(program: bytes) -> bytes:
    code = decompress_executable(program)
    for beginning, invalid in _BEGINNINGS.items():
        code = code.replace(beginning, invalid)
    return compress_executable(code)


def _require_compiled(ended: Ended, store: ObjectStore, keys: Iterable[str]) -> None:
    require(ended.code == 0, ended)
    for key in keys:
        require(f"{store.url_of(key + SUFFIX)}: damaged" in ended.err, f"{key} is not named: {ended}")
        require(unseal(key, store.read(key + SUFFIX)), f"{key} is not compiled anew")
