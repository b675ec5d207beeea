"""A damaged program of the compile cache is found before it is loaded, on disks and in buckets."""

import os
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from filelock import Timeout
from jax._src.lru_cache import LRUCache

from jaxinfra.errors import ConfigError
from jaxinfra.machine import COMPILE_ANEW
from jaxinfra.machine import compile_cache as module
from jaxinfra.machine.checked_programs import SUFFIX, CheckedCache, unseal
from jaxinfra.machine.compile_cache import compile_cache
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import names, raises
from tests.servers.fixtures import Server

PROGRAM, NAME = random.Random(0).randbytes(3000), f"key{SUFFIX}"


def flipped(entry: bytes, seed: int) -> bytes:
    bit = random.Random(seed).randrange(8 * len(entry))
    return entry[: bit // 8] + bytes([entry[bit // 8] ^ 1 << bit % 8]) + entry[bit // 8 + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "the end": lambda entry: entry[:-1],
    "half": lambda entry: entry[: len(entry) // 2],
    "all but a part of the hash": lambda entry: entry[:7],
    "all": lambda entry: b"",
    "the hash": lambda entry: PROGRAM,
    "nothing": lambda entry: entry + b"\0",
    "all bits": lambda entry: bytes(len(entry)),
    **{f"bit {seed}": partial(flipped, seed=seed) for seed in range(20)},
}


@pytest.fixture(params=["folder", "gcs"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path)
    server: Server = request.getfixturevalue(request.param)
    return server.new_url()


def test_each_damage_is_found_named_and_mended(url: str, caplog: pytest.LogCaptureFixture) -> None:
    cache, store = CheckedCache(url, max_size=10**6), ObjectStore(url)
    for lost, damage in DAMAGES.items():
        cache.put("key", PROGRAM)
        store.write(NAME, damage(store.read(NAME)))
        assert cache.get("key") is None, lost
        assert not store.exists(NAME), lost
    assert len(caplog.messages) == len(DAMAGES) == len(set(DAMAGES))
    names(caplog.messages[-1], store.url_of(NAME), "damaged")
    cache.put("key", PROGRAM)
    assert cache.get("key") == PROGRAM


def test_jax_compiles_a_damaged_program_anew(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute() -> list[float]:
        return jax.jit(lambda x: x * 2 + 1)(jnp.arange(3.0)).tolist()  # a new function, but the same program

    monkeypatch.setattr(module, "_MIN_COMPILE_S", 0.0)
    with compile_cache(url):
        assert compute() == compute() == [1, 3, 5]
        store = ObjectStore(url)
        (name,) = (name for name in store.list_names() if name.startswith("jit__lambda") and name.endswith(SUFFIX))
        store.write(name, flipped(intact := store.read(name), 0))
        assert compute() == [1, 3, 5]
    names("\n".join(caplog.messages), store.url_of(name))
    key = name.removesuffix(SUFFIX)
    assert unseal(key, store.read(name)) and unseal(key, intact)


def test_swapped_programs_are_found(url: str) -> None:
    cache, store = CheckedCache(url, max_size=-1), ObjectStore(url)
    cache.put("key", PROGRAM)
    cache.put("other", PROGRAM[::-1])
    entries = store.read(NAME), store.read(f"other{SUFFIX}")
    store.write(NAME, entries[1])
    store.write(f"other{SUFFIX}", entries[0])
    assert cache.get("key") is None and cache.get("other") is None


def test_jax_does_not_check_its_entries(tmp_path: Path) -> None:
    """If this fails, JAX does it, and `CheckedCache` may go."""
    theirs = LRUCache(str(tmp_path), max_size=-1)
    theirs.put("key", PROGRAM)
    (tmp_path / "key-cache").write_bytes(damaged := flipped(PROGRAM, 0))
    assert theirs.get("key") == damaged


def test_entries_of_jax_are_not_read_and_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, ours = LRUCache(str(tmp_path), max_size=10**6), CheckedCache(str(tmp_path), max_size=10**6)
    theirs.put("key", b"theirs")
    assert ours.get("key") is None
    ours.put("key", PROGRAM)
    assert theirs.get("key") == b"theirs" and ours.get("key") == PROGRAM and not caplog.messages


def test_nobody_sees_a_part_of_an_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Processes with one folder, without JAX's lock."""
    program, found = PROGRAM * 500, set[bytes | None]()

    def write() -> None:
        for _ in range(10):
            CheckedCache(str(tmp_path), max_size=-1).put("key", program)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for each in writers:
        each.start()
    while any(each.is_alive() for each in writers):
        found.add(CheckedCache(str(tmp_path), max_size=-1).get("key"))
    for each in writers:
        each.join()
    assert found <= {None, program} and not caplog.messages
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_no_other_process_evicts_while_an_entry_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look for the file that has just gone, and fail."""
    other, rename = LRUCache(str(tmp_path), max_size=10**6, lock_timeout_secs=0.0), os.replace

    def look(source: Path, target: Path) -> None:
        with pytest.raises(Timeout):
            other.put("theirs", PROGRAM)
        rename(source, target)

    monkeypatch.setattr(os, "replace", look)
    cache = CheckedCache(str(tmp_path), max_size=10**6)
    cache.put("key", PROGRAM)
    other.put("theirs", PROGRAM)
    assert cache.get("key") == other.get("theirs") == PROGRAM


def test_a_program_beyond_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = CheckedCache(str(tmp_path), max_size=len(PROGRAM))
    with pytest.warns(UserWarning, match="exceeds the maximum cache size"):
        cache.put("key", PROGRAM)
    assert cache.get("key") is None and not list(tmp_path.glob("*-cache"))


def test_a_url_that_is_none_of_a_bucket_is_refused() -> None:
    with raises(ConfigError, "az://container/compiled gs://"), compile_cache("az://container/compiled"):
        pass


def test_the_caches_of_xla_have_no_hash_and_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    variable, before = "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", jax.config.jax_persistent_cache_enable_xla_caches
    monkeypatch.delenv(variable, raising=False)
    with compile_cache("auto"):
        assert jax.config.jax_persistent_cache_enable_xla_caches == "none"
    monkeypatch.setenv(variable, "all")  # as JAX has read it
    with compile_cache("auto"):
        assert jax.config.jax_persistent_cache_enable_xla_caches == before


def test_a_start_may_compile_anew(url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cache = CheckedCache(url, max_size=-1)
    cache.put("key", PROGRAM)
    monkeypatch.setenv(COMPILE_ANEW, "1")
    assert cache.get("key") is None
    cache.put("key", PROGRAM[::-1])
    monkeypatch.delenv(COMPILE_ANEW)
    assert cache.get("key") == PROGRAM[::-1] and not caplog.messages
