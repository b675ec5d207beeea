"""Config classes by name: where users' own classes are found again, and what may be imported for that.

A record is data. It imports jaxinfra alone; all else must be named by the user: a config file, `--import`, an override.
"""

import functools
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Self

from jaxinfra.config.extensible import PACKAGE, class_name, is_users, require_complete
from jaxinfra.config.folder import ModuleFolder, import_module
from jaxinfra.config.schema import is_config, is_open, members, not_accepted, resolve, walk
from jaxinfra.config.text import shorten
from jaxinfra.errors import ConfigError

_NAME = re.compile(r"((?:[^\W\d]\w*\.)*[^\W\d]\w*|[^/\\:]+\.py):((?:[^\W\d]\w*\.)*[^\W\d]\w*)")
_RESTORE = "restore the file, or name a config file instead of the record"


@dataclass(frozen=True, kw_only=True)
class ClassSource:
    """The file that defines a class, None if there is none, and the start of the SHA-256 of its text."""

    file: str | None
    sha256: str | None


@functools.cache
def source_of(cls: type) -> ClassSource:
    """Reads the source of a class once; of a class from a folder before its module leaves `sys.modules`."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or not os.path.isfile(file):
        return ClassSource(file=None, sha256=None)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return ClassSource(file=os.path.abspath(file), sha256=digest)


def users_classes(root: object) -> list[type]:
    """Returns the classes outside jaxinfra that a config consists of, with the config classes they inherit from."""
    found: dict[type, None] = {}
    for _, _, value in walk(type(root), root):
        if is_config(type(value)):
            found |= dict.fromkeys(c for c in type(value).__mro__ if (is_config(c) or is_open(c)) and is_users(c))
    return [*found]


def keep_usable(root: object) -> None:
    """Reads what is still needed of the classes of a config after the modules of its folder are gone."""
    resolve(type(root))
    for cls in users_classes(root):
        _keep(cls)


@dataclass(frozen=True, kw_only=True)
class ClassFinder:
    """Finds classes by name.

    Attributes:
        folders: where config files and modules may be loaded from, the first one that has them.
        modules: what may be imported besides, with all that is below it.
        known: classes that need not be imported; whoever gives some cannot name more.
    """

    folders: tuple[ModuleFolder, ...] = ()
    modules: tuple[str, ...] = (PACKAGE,)
    known: Mapping[str, type] = field(default_factory=dict)

    @classmethod
    def named(cls, words: Iterable[str | os.PathLike[str]]) -> Self:
        """Makes the finder for what the user names: files, which stand for their folders, and modules."""
        folders, modules = [], [PACKAGE]
        for word in (os.fspath(each) for each in words):
            if os.sep in word or word.endswith(".py"):
                path = Path(word)
                if not path.exists():
                    raise ConfigError(f"--import {word}: no such file; name a config file, a folder/ or a module")
                folders.append(ModuleFolder(path if path.is_dir() else path.parent))
            else:
                import_module(word)
                modules.append(word)
        return cls(folders=tuple(folders), modules=tuple(modules))

    @classmethod
    def of(cls, root: object) -> Self:
        """Makes the finder of the classes that a config consists of."""
        return cls(known={class_name(each): each for each in users_classes(root)})

    def find(self, name: str, *, anywhere: bool = False, file: str | None = None) -> type:
        """Returns the class of this name; ConfigError where there is none, or it may not be imported.

        Args:
            name: `package.module:Class` or `FILE.py:Class`.
            anywhere: any module may be imported, as the user has named the class.
            file: where a record says that the class was.
        """
        if name in self.known:
            return self.known[name]
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise ConfigError(f"{shorten(name)}: not the name of a class; write package.module:Class")
        try:
            return self._find(*parts.groups(), anywhere=anywhere, file=file)
        except ConfigError as error:
            of_file = "" if file is None else f" of {' '.join(file.split())}"
            raise ConfigError(f"{name}{of_file}: {error}") from error

    def _find(self, module: str, qualname: str, *, anywhere: bool, file: str | None) -> type:
        folder = next((each for each in self.folders if each.has(module)), None)
        if not (folder or anywhere or any(f"{module}.".startswith(f"{each}.") for each in self.modules)):
            raise ConfigError(self._refusal(module, file))
        with folder.importable() if folder else nullcontext():
            found = _member(folder.load(module) if folder else import_module(module), qualname)
            if found is None:
                raise ConfigError(f"no class {qualname}; {_RESTORE if file else 'name one that the module defines'}")
            _keep(found)
        return found

    def _refusal(self, module: str, file: str | None) -> str:
        if self.known:
            return "this config does not use it; use name=ANOTHER"
        if file is not None and not os.path.exists(file):
            return f"the file is gone; {_RESTORE}"
        return f"a record imports only what you name; add --import {_import_word(module, file)}"


def find_choice(annotation: object, name: str, finder: ClassFinder, *, anywhere: bool = False) -> type | None:
    """Returns the class that an import path names in an open choice; None if it is no such path, or no open choice."""
    if ":" not in name or not any(map(is_open, members(annotation))):
        return None
    cls = finder.find(name, anywhere=anywhere)
    if not (cls in members(annotation) or any(issubclass(cls, base) for base in filter(is_open, members(annotation)))):
        raise ConfigError(f"{name}: {not_accepted(annotation, cls)}")
    require_complete(cls)
    return cls


def _keep(cls: type) -> None:
    """Reads what is needed of a class once its module has left `sys.modules`."""
    source_of(cls)
    if is_config(cls):
        resolve(cls)


def _member(module: ModuleType, qualname: str) -> type | None:
    found: object = module
    for part in qualname.split("."):
        found = vars(found).get(part) if isinstance(found, ModuleType | type) else None
    return found if isinstance(found, type) else None


def _import_word(module: str, file: str | None) -> str:
    """Returns what `--import` must name for a module that was in a file."""
    top = module.partition(".")[0]
    if file is None or (not module.endswith(".py") and importlib.util.find_spec(top)):
        return module
    if module.endswith(".py"):
        return file
    return f"{Path(file).parents[module.count('.') + (Path(file).name == '__init__.py')]}{os.sep}"
