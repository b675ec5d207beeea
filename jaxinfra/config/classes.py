"""Users' classes by name: where they are found, and what may be imported for that.

A record is data: it imports jaxinfra alone, and what the user names by `--import` or an override.
"""

import functools
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Self

from jaxinfra.config.extensible import PACKAGE, class_name, is_users, require_complete
from jaxinfra.config.folder import ModuleFolder, import_module
from jaxinfra.config.schema import accepts, is_config, is_open, members, not_accepted, reachable, walk
from jaxinfra.config.text import shorten
from jaxinfra.errors import ConfigError

_DOTTED = r"(?:[^\W\d]\w*\.)*[^\W\d]\w*"
_CLASS = re.compile(rf"({_DOTTED}|[^/\\:]+\.py):({_DOTTED})")
RESTORE = "restore the file, or name a config file instead of the record"


@functools.cache
def source_of(cls: type) -> dict[str, str | None]:
    """Returns the file that defines a class, and the start of the SHA-256 of its text; None where there is none.

    Of a class from the folder of a config file the first call must be made while its module is there.
    """
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or not os.path.isfile(file):
        return {"file": file, "sha256": None}
    return {"file": os.path.abspath(file), "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}


def users_classes(root: object) -> list[type]:
    """Returns the classes outside jaxinfra that a config consists of, and the config classes that they inherit from."""
    parts = (type(value) for _, _, value in walk(type(root), root))
    return list(dict.fromkeys(base for cls in parts if is_config(cls) for base in _users_bases(cls)))


def _users_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if is_users(base) and (is_config(base) or is_open(base))]


def keep_usable(cls: type) -> None:
    """Reads what is needed of a class, and of those that its fields name, when their modules are gone."""
    for each in reachable(cls) if is_config(cls) else [cls]:
        for base in _users_bases(each):
            source_of(base)


@dataclass(frozen=True, kw_only=True)
class ClassFinder:
    """Finds classes by name.

    Attributes:
        folders: where config files and modules may be loaded from, the first one that has them.
        modules: what may be imported besides, with all that is below it.
        known: classes of a config, by name; if given, no others are found outside jaxinfra.
    """

    folders: tuple[ModuleFolder, ...] = ()
    modules: tuple[str, ...] = (PACKAGE,)
    known: Mapping[str, type] | None = None

    @classmethod
    def named(cls, words: Iterable[str | os.PathLike[str]]) -> Self:
        """Makes the finder of what `--import` names: modules, and files or folders with a slash at the end."""
        folders, modules = [], [PACKAGE]
        for word in (os.fspath(each) for each in words):
            path = Path(word)
            if word.endswith((".py", os.sep)) and path.exists():
                folders.append(ModuleFolder(path if path.is_dir() else path.parent))
            elif re.fullmatch(_DOTTED, word) and not word.endswith(".py"):
                try:
                    import_module(word)
                except ConfigError as error:
                    raise ConfigError(f"--import {word}: {error}") from error
                modules.append(word)
            else:
                raise ConfigError(f"--import {word}: no such file; name a config file, a folder/ or a module")
        return cls(folders=tuple(folders), modules=tuple(modules))

    @classmethod
    def of(cls, root: object) -> Self:
        """Makes the finder of the classes that a config consists of."""
        return cls(known={class_name(each): each for each in users_classes(root)})

    def find(self, name: str, *, anywhere: bool = False, file: str | None = None) -> type:
        """Returns the class of this name; ConfigError where there is none, or it may not be imported.

        Args:
            name: `package.module:Class` or `FILE.py:Class`.
            anywhere: the user has named the class, so any module may be imported.
            file: where a record says that the class was.
        """
        if self.known and name in self.known:
            return self.known[name]
        try:
            return self._find(name, anywhere, file)
        except ConfigError as error:
            raise ConfigError(f"{shorten(name)}{f' of {file}' if file else ''}: {error}") from error

    def _find(self, name: str, anywhere: bool, file: str | None) -> type:
        parts = _CLASS.fullmatch(name)
        if parts is None:
            raise ConfigError("not the path of a class at the top of its module; write package.module:Class")
        module, qualname = parts.groups()
        folder = next((each for each in self.folders if each.has(module)), None)
        if not (folder or anywhere or any(f"{module}.".startswith(f"{each}.") for each in self.modules)):
            raise ConfigError(self._refusal(module, file))
        with folder.importable() if folder else nullcontext():
            found: object = folder.load(module) if folder else import_module(module)
            for part in qualname.split("."):
                found = vars(found).get(part) if isinstance(found, ModuleType | type) else None
            if not isinstance(found, type):
                raise ConfigError(f"no class {qualname}; {RESTORE if file else 'name one that the module defines'}")
            keep_usable(found)
        return found

    def _refusal(self, module: str, file: str | None) -> str:
        if self.known is not None:
            return "this config does not use the class; use name=ANOTHER"
        if file is not None and not os.path.exists(file):
            return f"the file is gone; {RESTORE}"
        word = module
        if file and module.endswith(".py"):
            word = file
        elif file and importlib.util.find_spec(module.partition(".")[0]) is None:
            word = f"{Path(file).parents[module.count('.') + (Path(file).name == '__init__.py')]}{os.sep}"
        return f"a record imports only what you name; add --import {word}"


def find_choice(annotation: object, name: str, finder: ClassFinder, *, anywhere: bool = False) -> type | None:
    """Returns the class that an import path names in an open choice; None if it is no such path, or no open choice."""
    bases = [option for option in members(annotation) if is_open(option)]
    if ":" not in name or not bases:
        return None
    cls = finder.find(name, anywhere=anywhere)
    if issubclass(cls, tuple(bases)):
        require_complete(cls)
    if not accepts(annotation, cls):
        raise ConfigError(f"{name}: {not_accepted(annotation, cls)}")
    return cls
