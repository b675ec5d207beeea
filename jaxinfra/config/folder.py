"""Config files and the modules beside them, kept apart from the modules of all other folders."""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import NoReturn

from jaxinfra.config.extensible import PACKAGE
from jaxinfra.config.text import shorten
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.storage.errors import storage_errors

_NEVER_HIDDEN = sys.stdlib_module_names | {PACKAGE, "__main__"}
_INSTALLED = {"site-packages", "dist-packages"}


class _UncachedLoader(SourceFileLoader):
    """Compiles a module at every load, so that an edit within the same second is seen; writes no bytecode."""

    def path_stats(self, path: str) -> NoReturn:
        raise OSError


class ModuleFolder:
    """The modules of one folder: config files, named `FILE.py`, and what they import from the folder.

    They are in `sys.modules` only within `importable()`, so that folders with modules of the same name do not mix.
    A module of the folder hides one of the same name elsewhere, but never one of Python or of an installed package.
    """

    def __init__(self, path: Path):
        self.path = path
        self._finder = FileFinder(os.path.abspath(path), (_UncachedLoader, SOURCE_SUFFIXES))
        self._loaded: dict[str, ModuleType] = {}
        stems = {each.stem for each in path.iterdir()} if os.access(path, os.R_OK) else set()
        self._names = frozenset(filter(self._hides, filter(str.isidentifier, stems)))

    def _hides(self, name: str) -> bool:
        spec = None if name in _NEVER_HIDDEN else self._finder.find_spec(name)
        if spec is None or spec.origin is None:
            return False
        with suppress(ValueError):  # where a module of that name has no spec
            other = importlib.util.find_spec(name)
            if other is not None and other.origin is not None:
                same_file = os.path.realpath(other.origin) == os.path.realpath(spec.origin)
                return not same_file and _INSTALLED.isdisjoint(Path(other.origin).parts)
        return True

    def has(self, module: str) -> bool:
        """Tells whether the folder has a module, or a config file, of this name."""
        return (self.path / module).is_file() if module.endswith(".py") else self._is_own(module)

    def _is_own(self, module: str) -> bool:
        return module.endswith(".py") or module.partition(".")[0] in self._names

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Finds a module for `sys.meta_path`; what is inside a package of the folder is found by Python."""
        return self._finder.find_spec(name) if name in self._names else None

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Puts the modules of the folder into `sys.modules`, and lets Python find more of them; not reentrant."""
        hidden = self._exchange(self._loaded)
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            self._loaded = self._exchange(hidden)

    def _exchange(self, modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
        taken = {name: sys.modules.pop(name) for name in [*sys.modules] if self._is_own(name)}
        sys.modules.update(modules)
        return taken

    def load(self, module: str) -> ModuleType:
        """Returns a module or a config file, within `importable()`; ConfigError where it fails."""
        if not module.endswith(".py"):
            return import_module(module)
        if module not in sys.modules:
            path = self.path / module
            code = _compiled(path)
            made = ModuleType(module)
            made.__file__, made.__package__ = str(path), ""
            # A dataclass in the file needs its module in sys.modules, to resolve string annotations.
            sys.modules[module] = made
            try:
                self.run(path, exec, code, made.__dict__)
            except ConfigError:
                del sys.modules[module]
                raise
        return sys.modules[module]

    def run[**P, T](self, path: Path, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a function of the config file at `path`; an exception becomes a ConfigError with the line."""
        try:
            return call(*args, **kwargs)
        except Exception as error:
            raise ConfigError(_failure(str(path), error, self._is_own)) from error


def import_module(module: str) -> ModuleType:
    """Imports a module; ConfigError where there is none, or it fails."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"no module {module}; install it, or put its folder on PYTHONPATH") from error
        top = module.partition(".")[0]
        raise ConfigError(_failure(module, error, lambda name: name.partition(".")[0] == top)) from error


def _compiled(path: Path) -> CodeType:
    with storage_errors(path, action="read"):
        content = path.read_bytes()
    try:
        return compile(content, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f"{path}:{error.lineno}" if error.lineno else str(path)
        raise ConfigError(f"{where}: {type(error).__name__}: {shorten(error.msg)}; mend the file") from error


def _failure(what: str, error: Exception, is_own: Callable[[str], bool]) -> str:
    """Says in which line of the user's modules an exception came up, and what it was."""
    frames = reversed([*traceback.walk_tb(error.__traceback__)])
    own = ((frame, line) for frame, line in frames if is_own(frame.f_globals.get("__name__", "")))
    where = next((f"{frame.f_code.co_filename}:{line}" for frame, line in own), None)
    text = " ".join(str(error).split())
    if where is None and isinstance(error, ConfigError):
        return text
    kind = "" if isinstance(error, JaxinfraError) else f"{type(error).__name__}: "
    return f"{where or what}: {kind}{text}".rstrip(": ")
