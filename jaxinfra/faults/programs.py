"""Row 42: damaged programs in the compile cache."""

import random
from collections.abc import Iterable

from jax._src.compilation_cache import compress_executable, decompress_executable

from jaxinfra.faults.harness import Ended, Harness, named, require
from jaxinfra.faults.matrix import row
from jaxinfra.runtime.checked_programs import SUFFIX, seal, unseal
from jaxinfra.storage.objects import ObjectStore

_FOLDER, _SHORT = "JAX_COMPILATION_CACHE_DIR", "train.steps=20"
_BEGINNINGS = {b"\x55\x48\x89\xe5": b"\x0f\x0b" * 2, b"\xfd\x03\x00\x91": bytes(4)}
"""What functions begin with on x86 (push rbp; mov rbp, rsp) and Arm (mov x29, sp), and instructions that kill."""


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
    intact = {path.name: path.read_bytes() for path in folder.glob(f"*{SUFFIX}")}
    (step,) = (name for name in intact if name.startswith("jit__train_step-"))
    flips = [_flipped(intact[step], draw) for _ in range(num_flips)]
    require(not any(unseal(_key(step), entry) for entry in flips), f"{step}: a flipped bit was not found")
    damaged = {name: _flipped(content, draw) for name, content in intact.items()}

    store = ObjectStore(folder)
    for name, content in damaged.items():
        store.write(name, content)
    store.write(step, crashing := _crashing(step, intact[step]))
    ended = harness.train("programs-disk", _SHORT, "--supervise", env={_FOLDER: str(folder)})
    _require_compiled(ended, store, damaged.keys() - {step})
    (line,) = (line for line in ended.err.splitlines() if line.startswith("restart "))
    named(line, "process 0 killed by SIG", "before its first step", "compiled anew")
    require(unseal(_key(step), store.read(step)) != unseal(_key(step), crashing), ended)
    harness.same_bits("programs-disk", reference)

    with harness.bucket() as bucket:
        store = ObjectStore(f"{bucket.url}/compiled")
        for name, content in damaged.items():
            store.write(name, content)
        ended = harness.train("programs-bucket", _SHORT, env={_FOLDER: store.url, **bucket.environment})
        _require_compiled(ended, store, damaged)
    signal = line.partition("killed by ")[2].partition(" ")[0]
    return (
        f"{num_flips} of {num_flips} flips found; {len(damaged)} programs named and compiled anew on a disk and in a "
        f"bucket; {signal} once; {harness.same_bits('programs-bucket', reference)}"
    )


def _key(name: str) -> str:
    return name.removesuffix(SUFFIX)


def _flipped(content: bytes, draw: random.Random) -> bytes:
    at, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


def _crashing(name: str, entry: bytes) -> bytes:
    """Returns an intact entry whose program kills its process."""
    code = decompress_executable(unseal(_key(name), entry) or b"")
    for beginning, invalid in _BEGINNINGS.items():
        code = code.replace(beginning, invalid)
    return seal(_key(name), compress_executable(code))


def _require_compiled(ended: Ended, store: ObjectStore, names: Iterable[str]) -> None:
    require(ended.code == 0, ended)
    for name in names:
        require(f"{store.url_of(name)}: damaged" in ended.err, f"{name} is not named: {ended}")
        require(unseal(_key(name), store.read(name)), f"{name} is not compiled anew")
