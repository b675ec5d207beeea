"""Compiled programs are kept for the next start, in a folder of limited size."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache
from jax._src.lru_cache import LRUCache

from jaxinfra.errors import StorageError
from jaxinfra.machine import compile_cache as module
from jaxinfra.machine.checked_programs import SUFFIX, CheckedCache, unseal
from jaxinfra.machine.compile_cache import cache_environment, compile_cache
from tests.refusals import refused
from tests.several import free_address
from tests.tiny_run import Tiny
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data


def programs(folder: Path) -> dict[str, int]:
    """The programs in a cache, with the times when they were last used, in nanoseconds."""
    entries = (path.name.removesuffix("-cache") for path in folder.glob("*-cache"))
    return {name: int.from_bytes((folder / f"{name}-atime").read_bytes(), "little") for name in entries}


def compile_program(number: int) -> None:
    jax.jit(lambda x: x @ x + number)(jnp.ones((4, 4))).block_until_ready()


@pytest.fixture
def keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MIN_COMPILE_S", 0.0)


def test_second_start_compiles_nothing_and_damaged_programs_anew(
    keeps_all: None, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compilation_cache, "LRUCache", LRUCache)
    folder = tmp_path / "programs"
    assert tiny.launch("name=first", f"train.compile_cache={folder}", "track.console=off").code == 0
    first = programs(folder)
    assert any(name.startswith("jit__train_step-") for name in first)
    assert tiny.launch("name=second", f"train.compile_cache={folder}", "track.console=off").code == 0
    second = programs(folder)
    assert first.keys() == second.keys()
    assert all(second[name] > first[name] for name in first if "train_step" in name), "not read"

    intact = {path: path.read_bytes() for path in folder.glob("*-cache")}
    for path, entry in intact.items():
        path.write_bytes(entry[:-9] + bytes([entry[-9] ^ 1]) + entry[-8:])
    assert tiny.launch("name=third", f"train.compile_cache={folder}", "track.console=off").code == 0
    assert tiny.losses("third") == tiny.losses("first")
    named = {Path(line.partition(": damaged")[0]) for line in caplog.messages}  # this process has the small ones
    assert {path for path in intact if "_step-" in path.name} <= named <= intact.keys()
    assert all(unseal(path.name.removesuffix(SUFFIX), path.read_bytes()) for path in named), "not written again"
    assert compilation_cache.LRUCache is CheckedCache, "the command has compiled something unchecked"


def test_off(keeps_all: None, tmp_path: Path) -> None:
    with compile_cache(str(tmp_path)), compile_cache(None):
        compile_program(1)
    assert programs(tmp_path) == {}
    assert jax.config.jax_enable_compilation_cache


def test_size_is_bounded(keeps_all: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that was not used for longest goes."""
    with compile_cache(str(tmp_path)):
        compile_program(0)
    size = sum(path.stat().st_size for path in tmp_path.glob("*-cache"))
    monkeypatch.setattr(module, "MAX_BYTES", 2 * size + size // 2)
    for number in range(1, 5):
        with compile_cache(str(tmp_path)):
            compile_program(number)
    left = sum(path.stat().st_size for path in tmp_path.glob("*-cache"))
    assert size < left <= module.MAX_BYTES


def test_auto_is_the_folder_of_jax(tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir  # tests have one
    with compile_cache("auto"):
        assert jax.config.jax_compilation_cache_dir == before


def test_auto_without_one_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with compile_cache("auto"):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxinfra" / "compiled")
            assert jax.config.jax_compilation_cache_max_size == module.MAX_BYTES
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_environment_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    added = cache_environment({})
    assert added["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "jaxinfra" / "compiled")
    assert int(added["JAX_COMPILATION_CACHE_MAX_SIZE"]) == module.MAX_BYTES
    # A folder of the user's own has the size that the user gives it.
    assert cache_environment({"JAX_COMPILATION_CACHE_DIR": "x"}).keys() == {
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    }
    assert not cache_environment(os.environ | added)


def test_a_folder_that_cannot_be_written(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    refused(tiny.launch(f"train.compile_cache={file}"), str(file), code=StorageError.exit_code)


SHARES = """\
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import jaxinfra
from jaxinfra.machine.compile_cache import compile_cache

hits = 0


def count(event: str) -> None:
    global hits
    hits += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(lambda event, **words: count(event))
with jaxinfra.join() as peers, compile_cache(sys.argv[1]):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sharded = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec("x"))
    total = jax.jit(lambda x: jnp.sin(x).sum()).lower(jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharded))
    if peers.index == 1:
        peers.gather(None, "compiled", 60)
    before = hits
    total.compile()
    if peers.index == 0:
        peers.gather(None, "compiled", 60)
    print("hits", hits - before)
"""


def test_all_processes_use_the_programs_of_process_0(tmp_path: Path) -> None:
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    address = free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / "programs"],
            env=os.environ
            | {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
                "JAX_NUM_CPU_DEVICES": "2",
                "XLA_FLAGS": "",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    assert [process.communicate(timeout=600)[0] for process in processes] == ["hits 0\n", "hits 1\n"]
