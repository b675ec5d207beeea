"""A damaged program of the compile cache is found before it is loaded, and one that crashes is compiled anew once."""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.lru_cache import LRUCache

from jaxinfra.faults.gcs_emulator import TOKEN, emulated
from jaxinfra.runtime import compile_cache as module
from jaxinfra.runtime import loaded_programs
from jaxinfra.runtime.checked_programs import SUFFIX, CheckedCache, unseal
from jaxinfra.runtime.compile_cache import compile_cache
from jaxinfra.runtime.launcher import Launcher
from jaxinfra.runtime.rank_output import Output
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import names

PROGRAM = random.Random(0).randbytes(3000)


def flipped(entry: bytes, seed: int = 0) -> bytes:
    bit = random.Random(seed).randrange(8 * len(entry))
    return entry[: bit // 8] + bytes([entry[bit // 8] ^ 1 << bit % 8]) + entry[bit // 8 + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "end cut off": lambda entry: entry[:-1],
    "half": lambda entry: entry[: len(entry) // 2],
    "less than a hash": lambda entry: entry[:7],
    "empty": lambda entry: b"",
    "longer": lambda entry: entry + b"\0",
    "zeros": lambda entry: bytes(len(entry)),
    "without its hash": lambda entry: PROGRAM,
}


@pytest.fixture(params=["folder", "bucket"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckedCache:
    if request.param == "folder":
        return CheckedCache(str(tmp_path), max_size=10**6)
    port, _ = request.getfixturevalue("gcs")
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", TOKEN)
    return CheckedCache("gs://bucket/compiled", max_size=10**6)
