"""Replaces functions of other libraries for the whole process.

Each patch says what the library does, in which version; no option of it helps. pyproject.toml bounds these versions
above. `tests/test_patches.py` shows each defect in the library as it came: if a test fails under a higher bound, its
patch can go. To add one: a function, a row where the library is used first, and a test of `UNPATCHED`. JAX's compile
cache is replaced in `machine/checked_programs.py`, and its key of a program in `machine/compile_cache.py`.
"""

import ast
import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

UNPATCHED: dict[str, Callable[..., Any]] = {}  # by the name of the function


def mend_orbax() -> None:
    """Applies the patches for checkpoints on a disk; AttributeError if there is nothing to replace."""
    from orbax.checkpoint._src import asyncio_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils
    from orbax.checkpoint.type_handlers import ParamInfo
    from tensorstore import KvStore

    for owner, name, function in (
        (tensorstore_utils, "get_tensorstore_raw_bytes", count_no_bytes),
        (KvStore.Spec, "to_json", read_json_from_repr),
        (ParamInfo, "await_path_creation", await_shared_folder),
        (asyncio_utils, "_run_sync_via_new_loop", run_to_the_end),
    ):
        UNPATCHED.setdefault(name, getattr(owner, name))
        setattr(owner, name, function)


def count_no_bytes(direction: object = None) -> int:
    """Stands in for metrics: Orbax 0.12.8 logs some of TensorStore's in each save, and 0.1.86 leaks all: 40 kB."""
    return 0


def read_json_from_repr(spec: Any, include_defaults: bool = False) -> Any:
    """Returns the JSON of a store, which TensorStore 0.1.86 leaks: 5 kB a save, as Orbax takes it for each array."""
    if include_defaults:  # its repr has none
        return UNPATCHED["to_json"](spec, include_defaults)
    # KvStore.Spec({...}), with each byte of UTF-8 as a character
    value = ast.literal_eval(repr(spec).removeprefix("KvStore.Spec(").removesuffix(")"))
    return json.loads(json.dumps(value, ensure_ascii=False).encode("latin-1").decode())


async def await_shared_folder(info: Any) -> None:
    """Waits for the folder of an array; in Orbax 0.12.8 one of two threads replaces it while the other looks at it."""
    folder = info._parent_dir
    if hasattr(folder, "await_creation"):
        created = await folder.await_creation()
        info.path, info.parent_dir = created / info.name, created


def run_to_the_end[T](coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in a new event loop, and then what it has left unfinished; raises the first error of all.

    If a write fails, Orbax 0.12.8 closes the loop at once. TensorStore finds it closed at the end of each other write,
    and prints a traceback: a thousand lines on a full disk.
    """
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)  # it tells of the other errors
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(coroutine)
    finally:
        if left := asyncio.all_tasks(loop):
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        asyncio.set_event_loop(None)
        loop.close()
