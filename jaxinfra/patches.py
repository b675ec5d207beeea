"""Replaces functions of other libraries for the whole process; nothing else here does so.

Each patch says what the library does, in which version; no option of it helps. pyproject.toml bounds these versions
above. `tests/test_patches.py` shows each defect in the library as it came: a test that fails after a bound was raised
says that its patch can go.

To add a patch: a function that calls `replace`, called where the library is used first, and a test of `UNPATCHED`. What
is replaced only for a while, as JAX's key of a program is (`runtime/compile_cache.py`), stays where it is put back.
"""

import ast
import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

UNPATCHED: dict[str, Callable[..., Any]] = {}  # by the name of the function


def replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Replaces an attribute of a module or class, once or again; AttributeError if there is none."""
    UNPATCHED.setdefault(name, getattr(owner, name))
    setattr(owner, name, function)


def mend_orbax() -> None:
    """Applies the patches for checkpoints on a disk."""
    for patch in (ask_for_no_metrics, read_json_from_repr, let_threads_share_a_folder, finish_the_event_loop):
        patch()


def ask_for_no_metrics() -> None:
    """Drops a line of Orbax's log: 0.12.8 asks TensorStore for metrics in each save, which 0.1.86 leaks: 40 kB."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    replace(tensorstore_utils, "get_tensorstore_raw_bytes", lambda direction=None: 0)


def read_json_from_repr() -> None:
    """Avoids a leak of TensorStore 0.1.86: the JSON of a store, which Orbax takes for each array; 5 kB a save."""
    from tensorstore import KvStore

    def to_json(self: KvStore.Spec, include_defaults: bool = False) -> Any:
        if include_defaults:  # its repr has none
            return UNPATCHED["to_json"](self, include_defaults)
        # KvStore.Spec({...}), with each byte of UTF-8 as a character
        value = ast.literal_eval(repr(self).removeprefix("KvStore.Spec(").removesuffix(")"))
        return json.loads(json.dumps(value, ensure_ascii=False).encode("latin-1").decode())

    replace(KvStore.Spec, "to_json", to_json)


def let_threads_share_a_folder() -> None:
    """Lets two threads of Orbax 0.12.8 wait for one folder: the first replaces it while the other looks at it."""
    from orbax.checkpoint.experimental.v1.path import PathAwaitingCreation
    from orbax.checkpoint.type_handlers import ParamInfo

    async def await_path_creation(self: ParamInfo) -> None:
        folder = self._parent_dir
        if isinstance(folder, PathAwaitingCreation):
            created = await folder.await_creation()
            self.path, self.parent_dir = created / self.name, created

    replace(ParamInfo, "await_path_creation", await_path_creation)


def finish_the_event_loop() -> None:
    """Finishes other writes if one fails: Orbax 0.12.8 closes their event loop at once.

    TensorStore finds it closed at the end of each, and prints a traceback: a thousand lines on a full disk.
    """
    from orbax.checkpoint._src import asyncio_utils

    def run_to_the_end[T](coroutine: Coroutine[Any, Any, T]) -> T:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda loop, context: None)  # it tells of errors after the first, which is raised
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(coroutine)
        finally:
            if left := asyncio.all_tasks(loop):
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            asyncio.set_event_loop(None)
            loop.close()

    replace(asyncio_utils, "_run_sync_via_new_loop", run_to_the_end)
