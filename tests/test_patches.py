"""Libraries as they came still have the defects for which `jaxinfra/patches.py` replaces functions; those have not.

A test of `UNPATCHED` that fails after a bound of pyproject.toml was raised says that the patch can go.
"""

import asyncio
import gc
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorstore as ts
from etils import epath
from orbax.checkpoint._src import asyncio_utils
from orbax.checkpoint._src.serialization import tensorstore_utils
from orbax.checkpoint.type_handlers import ParamInfo

from jaxinfra.patches import UNPATCHED, mend_orbax
from tests.conftest import ROOT

mend_orbax()
SPECS: tuple[dict[str, Any], ...] = (
    {"driver": "file", "path": "/a folder/jürgen 中/"},
    {"driver": "memory", "path": 'it\'s "quoted"\\\n\t'},
    {"driver": "ocdbt", "base": {"driver": "file", "path": "/å/"}, "config": {"max_inline_value_bytes": 100}},
    {"driver": "gcs", "bucket": "bucket", "path": "runs/"},
    {"driver": "kvstack", "layers": [{"base": "memory://", "prefix": "x/"}, {"base": {"driver": "memory"}}]},
)


def leaks(function: Callable[[], object]) -> bool:
    """Whether Python holds more objects after each call. The first calls fill caches; other threads may be at work."""
    calls = 50

    def grown() -> int:
        before = sys.getallocatedblocks()
        for _ in range(calls):
            function()
        gc.collect()
        return sys.getallocatedblocks() - before

    gc.collect()
    gc.freeze()  # the collections that follow leave out what there is now
    found = min(grown() for _ in range(4)) > calls
    gc.unfreeze()
    return found


def test_tensorstore_leaks_its_json_and_what_stands_in_for_it_does_not() -> None:
    spec = ts.KvStore.Spec(SPECS[0])
    assert leaks(lambda: UNPATCHED["to_json"](spec))
    assert not leaks(spec.to_json)


def test_tensorstore_leaks_the_metrics_that_orbax_asks_for(tmp_path: Path) -> None:
    ts.KvStore.open({"driver": "file", "path": f"{tmp_path}/"}).result().write("key", b"value").result()
    assert leaks(UNPATCHED["get_tensorstore_raw_bytes"])
    assert not leaks(tensorstore_utils.get_tensorstore_raw_bytes)


@pytest.mark.parametrize("content", SPECS, ids=lambda content: content["driver"])
def test_the_json_of_a_store_is_that_of_tensorstore(content: dict[str, Any]) -> None:
    spec = ts.KvStore.Spec(content)
    assert spec.to_json() == UNPATCHED["to_json"](spec)
    assert spec.to_json(include_defaults=True) == UNPATCHED["to_json"](spec, include_defaults=True)


class Held:
    """A folder for which threads wait, as Orbax's protocol has it."""

    path = epath.Path("/held")

    def __truediv__(self, name: str) -> "Held":
        return self

    async def await_creation(self) -> epath.Path:
        return self.path


class Shared(ParamInfo):
    """An array whose folder another thread replaces once this one has looked at it."""

    looks = 0

    @property
    def _parent_dir(self) -> object:
        self.looks += 1
        return Held() if self.looks == 1 else Held.path

    @_parent_dir.setter
    def _parent_dir(self, value: object) -> None:
        pass


def test_a_thread_of_orbax_looks_twice_at_a_folder_that_another_one_replaces() -> None:
    def shared() -> Shared:
        return Shared(name="array", parent_dir=Held(), ts_context=ts.Context())

    with pytest.raises(AttributeError, match="await_creation"):
        asyncio.run(UNPATCHED["await_path_creation"](shared()))
    info = shared()
    asyncio.run(info.await_path_creation())
    assert info.path == Held.path / "array"


def test_orbax_closes_a_loop_in_which_tasks_are_left() -> None:
    tasks: list[asyncio.Task[object]] = []

    async def fail() -> None:
        go_on = asyncio.Event()
        tasks.append(asyncio.create_task(go_on.wait()))
        await asyncio.sleep(0)  # the task starts
        asyncio.get_running_loop().call_soon(go_on.set)
        raise OSError("no space left")

    for run, done in ((UNPATCHED["_run_sync_via_new_loop"], False), (asyncio_utils._run_sync_via_new_loop, True)):
        with pytest.raises(OSError, match="no space left"):
            run(fail())
        assert tasks.pop().done() == done


MODULES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "jaxinfra").rglob("*.py")}
PRIVATE = re.compile(r"""^\s*(?:from|import)\s(\w+)[\w.]*\._|import_module\("(\w+)[\w.]*\._""", re.MULTILINE)
"""The package of an imported module whose name begins with an underscore."""
REPLACED = re.compile(r"^\s*(?:[\w, ]+, )?(\w+)\.[\w.]+ = |\b(\w+)\.__dict__", re.MULTILINE)
"""The owner of an attribute that is assigned."""


def test_private_modules_are_of_packages_with_an_upper_bound() -> None:
    """Those of Orbax are named in one file alone."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounded = {re.split(r"[^\w-]", each)[0] for each in dependencies if "<" in each.partition(";")[0]}
    assert "tensorstore" in bounded
    found = {(path, match[1] or match[2]) for path, text in MODULES.items() for match in PRIVATE.finditer(text)}
    assert {path for path, package in found if package == "orbax"} == {"jaxinfra/patches.py"}
    assert {{"jaxlib": "jax", "orbax": "orbax-checkpoint"}.get(package, package) for _, package in found} <= bounded


def test_libraries_are_replaced_in_one_file() -> None:
    """An attribute of what a module imports is assigned there alone; but for JAX's compile cache."""
    owners = {path: {one or other for one, other in REPLACED.findall(text)} for path, text in MODULES.items()}
    found = [(path, name) for path, names in owners.items() for name in names - {"sys"}]
    imported = {path for path, name in found if re.search(rf"\bimport .*\b{name}\b", MODULES[path])}
    assert imported == {"jaxinfra/machine/compile_cache.py", "jaxinfra/machine/checked_programs.py"}
