"""Imports config files, and the modules in their folder."""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from jaxinfra.config.aliases import path_of_alias
from jaxinfra.config.extensible import PACKAGE
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.storage.errors import storage_errors
from jaxinfra.user_code import INSTALLED, innermost_place

# A folder with `random.py` in it must not replace the `random` that other packages import.
_NEVER_HIDDEN = sys.stdlib_module_names | {PACKAGE, "__main__"}
LOADED_FILES: dict[str, str] = {}
"""By module, the files that config files have imported from their folders, not their own; run records name them."""


class _UncachedLoader(SourceFileLoader):
    """Loads a module without a bytecode cache, which would miss an edit within the same second."""

    def path_stats(self, path: str) -> NoReturn:
        raise OSError  # makes Python's loader compile the source


class ModuleFolder:
    """The modules of a folder. A config file is a module, too; its module name is the file name, with ".py".

    They are in `sys.modules` only within `importable()`, so that folders with modules of the same name do not mix. They
    hide modules of the same name elsewhere, except in the standard library and in installed packages. The object is
    itself the entry of `sys.meta_path` that finds them, through its method `find_spec`.
    """

    def __init__(self, path: Path):
        """Lists the modules of the folder at `path`."""
        self.path = path
        self._finder = FileFinder(os.path.abspath(path), (_UncachedLoader, SOURCE_SUFFIXES))
        self._loaded: dict[str, ModuleType] = {}  # while the folder is not importable
        stems = {each.stem for each in path.iterdir()} if os.access(path, os.R_OK) else set()
        self._names = {stem for stem in stems if stem.isidentifier() and self._hides(stem)}

    def _hides(self, name: str) -> bool:
        """Tells whether the folder has a module of this name that is imported in place of any other."""
        spec = None if name in _NEVER_HIDDEN else self._finder.find_spec(name)
        if spec is None or spec.origin is None:
            return False
        other = module_spec(name)
        if other is None or other.origin is None:
            return True
        same_file = os.path.realpath(other.origin) == os.path.realpath(spec.origin)
        return not same_file and INSTALLED.isdisjoint(Path(other.origin).parts)

    def has(self, module: str) -> bool:
        """Tells whether the folder has a module or a config file of this name."""
        return (self.path / module).is_file() if module.endswith(".py") else self._is_own(module)

    def _is_own(self, module: str) -> bool:
        """Tells whether a name in `sys.modules` is of this folder: a config file, a module, or a submodule."""
        return module.endswith(".py") or module.partition(".")[0] in self._names

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Finds a module for an import; Python itself finds the submodules of packages."""
        return self._finder.find_spec(name) if name in self._names else None

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Adds the modules of the folder to `sys.modules` and to what can be imported; must not be nested."""
        hidden = self._exchange(self._loaded)
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            self._loaded = self._exchange(hidden)
            files = {name: getattr(module, "__file__", None) for name, module in self._loaded.items()}
            LOADED_FILES.update({name: file for name, file in files.items() if file and not name.endswith(".py")})

    def _exchange(self, modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
        """Replaces the modules in `sys.modules` that have names of this folder; returns those that were there."""
        replaced = {name: sys.modules.pop(name) for name in [*sys.modules] if self._is_own(name)}
        sys.modules.update(modules)
        return replaced

    def load(self, module: str) -> ModuleType:
        """Imports a module or a config file, within `importable()`; raises ConfigError if it fails."""
        if not module.endswith(".py"):
            return import_module(module)
        if module not in sys.modules:
            path = self.path / module
            with storage_errors(path, action="read"):
                source = path.read_bytes()
            new = ModuleType(module)
            new.__file__, new.__package__ = str(path), ""
            # A dataclass in the file needs its module in sys.modules, to resolve string annotations.
            sys.modules[module] = new
            try:
                with config_file_errors(path):
                    exec(compile(source, str(path), "exec", dont_inherit=True), new.__dict__)
            except ConfigError:
                del sys.modules[module]
                raise
        return sys.modules[module]


@contextmanager
def config_file_errors(path: Path) -> Iterator[None]:
    """Turns an exception from the code of a config file into a ConfigError with its line."""
    try:
        yield
    except Exception as error:
        raise ConfigError(_failure(str(path), error)) from error


def module_spec(name: str) -> ModuleSpec | None:
    """Finds a module at the top level without importing it."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # raised for a module that was imported without a spec, such as `__main__`
        return None


def import_module(module: str) -> ModuleType:
    """Imports a module; raises ConfigError if it does not exist or fails."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        # Only if the module itself is missing, or a package that it is in; not for a module that it imports.
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"no module {module}; install it, or put its folder on PYTHONPATH") from error
        raise ConfigError(_failure(module, error)) from error


def _failure(default_place: str, error: Exception) -> str:
    """Returns the message of an exception: its innermost line in the user's files, or `default_place`, and its text."""
    place, text = innermost_place(error), " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("jaxinfra."):
        text += "; docs/changelog.md says which modules have moved, and where"
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if isinstance(error, TypeError) and unknown and (path := path_of_alias(unknown[1])):
        text += f"; did you mean {path}?"
    if place is None and isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}:{error.lineno}"
    if place is None and isinstance(error, ConfigError):
        return text  # it names its own place
    kind = "" if isinstance(error, JaxinfraError) else f"{type(error).__name__}: "
    return f"{place or default_place}: {kind}{text}".rstrip(": ")  # the text may be empty
