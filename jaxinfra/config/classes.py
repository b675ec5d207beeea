"""Finds user classes, which are defined outside jaxinfra, by name.

A run record is data: reading one imports only jaxinfra, and what the user names with `--import`. The modules in the
folder of a config file can be imported only inside `with folder.importable()` (see `ModuleFolder`). An *open base* is a
base class whose subclasses may be user classes (see `Extensible`).
"""

import functools
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Self

from jaxinfra.config import schema
from jaxinfra.config.extensible import PACKAGE, class_name, is_user_class, require_complete
from jaxinfra.config.folder import ModuleFolder, import_module, module_spec
from jaxinfra.config.text import error_prefix, shorten
from jaxinfra.errors import ConfigError

_DOTTED = r"(?:[^\W\d]\w*\.)*[^\W\d]\w*"  # identifiers with dots between them
_CLASS = re.compile(rf"({_DOTTED}|[^/\\:]+\.py):({_DOTTED})")  # `package.module:Class` or `FILE.py:Class`
# The fix in messages about the file of a class that a record names.
RESTORE = "restore the file, or name a config file instead of the record"


@functools.cache
def source_of(cls: type) -> dict[str, str | None]:
    """Returns the file that defines a class, and the first 16 hex digits of the file's SHA-256.

    Cached, since the module of a class from the folder of a config file is known only while the folder is `importable`.
    """
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or not os.path.isfile(file):
        return {"file": file, "sha256": None}
    return {"file": os.path.abspath(file), "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}


def user_classes(root: object) -> list[type]:
    """Returns the user classes among the classes of all objects in a config and the bases of these classes."""
    parts = (type(value) for _, _, value in schema.walk(type(root), root))
    return list(dict.fromkeys(base for cls in parts if schema.is_config(cls) for base in _user_bases(cls)))


def _user_bases(cls: type) -> list[type]:
    """Returns the class and its bases, as far as they are user classes and have a part in configs."""
    return [base for base in cls.__mro__ if is_user_class(base) and (schema.is_config(base) or schema.is_open(base))]


def cache_class(cls: type, seen: set[type] | None = None) -> None:
    """Caches the annotations and the source hash of a class, and of the classes in its annotations.

    Both can be read only while the folder of a config file is `importable`, but are needed later. `seen` holds the
    classes that are done, because annotations may refer to each other.
    """
    seen = set() if seen is None else seen
    if cls in seen:
        return
    seen.add(cls)
    for base in _user_bases(cls):
        source_of(base)  # functools caches the result, here and in `fields_of`
    for field in schema.fields_of(cls) if schema.is_config(cls) else ():
        for part in schema.config_classes(field.annotation):
            cache_class(part, seen)


@dataclass(frozen=True, kw_only=True)
class ClassFinder:
    """Finds classes by name, in what may be imported."""

    folders: tuple[ModuleFolder, ...] = ()  # their config files and modules; the first folder that has a module is used
    modules: tuple[str, ...] = (PACKAGE,)  # other modules, with their submodules
    known: Mapping[str, type] | None = None  # user classes of a config, by name; if given, no others are found

    @classmethod
    def from_imports(cls, imports: Iterable[str | os.PathLike[str]]) -> Self:
        """Returns the finder for the values of `--import`: modules, files, and folders that end with a slash."""
        folders, modules = [], [PACKAGE]
        for name in (os.fspath(each) for each in imports):
            path = Path(name)
            if name.endswith((".py", os.sep)) and path.exists():
                folders.append(ModuleFolder(path if path.is_dir() else path.parent))
            elif re.fullmatch(_DOTTED, name) and not name.endswith(".py"):
                with error_prefix(f"--import {name}: "):
                    import_module(name)
                modules.append(name)
            else:
                raise ConfigError(f"--import {name}: no such file; name a config file, a folder/ or a module")
        return cls(folders=tuple(folders), modules=tuple(modules))

    @classmethod
    def from_config(cls, root: object) -> Self:
        """Returns the finder for the user classes of a config."""
        return cls(known={class_name(each): each for each in user_classes(root)})

    def find(self, name: str, *, anywhere: bool = False, file: str | None = None) -> type:
        """Returns the class `package.module:Class` or `FILE.py:Class`; ConfigError if it is missing or not importable.

        `anywhere` allows every module, because the user has named the class on the command line. `file` is the file of
        the class according to a record, for the message.
        """
        if self.known and name in self.known:
            return self.known[name]
        with error_prefix(f"{shorten(name)}{f' of {file}' if file else ''}: "):
            return self._find(name, anywhere, file)

    def _find(self, name: str, anywhere: bool, file: str | None) -> type:
        match = _CLASS.fullmatch(name)
        if match is None:
            raise ConfigError("not the path of a class at the top of its module; write package.module:Class")
        module, qualname = match.groups()
        if module == "__main__":
            raise ConfigError("the class was defined in a notebook or at a prompt; define it in a module")
        folder = next((each for each in self.folders if each.has(module)), None)
        in_modules = any(f"{module}.".startswith(f"{each}.") for each in self.modules)  # as a module or a submodule
        if not (folder or anywhere or in_modules):
            raise ConfigError(self._not_importable(module, file))
        if folder is None and module.endswith(".py"):
            raise ConfigError(f"no {module} in the folder of the config file; write package.module:Class")
        with folder.importable() if folder else nullcontext():
            cls: object = folder.load(module) if folder else import_module(module)
            for part in qualname.split("."):
                # Not getattr: a name in a record must not run a module's `__getattr__`.
                cls = vars(cls).get(part) if isinstance(cls, ModuleType | type) else None
            if not isinstance(cls, type):
                raise ConfigError(f"no class {qualname}; {RESTORE if file else 'name one that the module defines'}")
            cache_class(cls)
        return cls

    def _not_importable(self, module: str, file: str | None) -> str:
        """Returns the message for a module that may not be imported; `file` is as in `find`."""
        if self.known is not None:  # overrides of a run that goes on; another class needs another run
            return "the config of this run does not use the class; use name=ANOTHER"
        if file is not None and not os.path.exists(file):
            return f"the file is gone; {RESTORE}"
        to_import = module
        if file and module.endswith(".py"):
            to_import = file
        elif file and not module_spec(module.partition(".")[0]):
            # The module is not installed: names the folder that it was imported from, `/a/` for module `b.c` of the
            # file `/a/b/c.py` or `/a/b/c/__init__.py`.
            parts = [*module.split("."), *(["__init__"] if file.endswith("__init__.py") else [])]
            to_import = file.removesuffix(f"{os.sep.join(parts)}.py")
        return f"a record imports only what you name; add --import {shlex.quote(to_import)}"


def find_choice(annotation: object, name: str, finder: ClassFinder, *, anywhere: bool = False) -> type | None:
    """Returns the class with the import path `name`; None if `name` is no path, or the annotation no open base."""
    bases = schema.open_bases(annotation)
    if ":" not in name or not bases:
        return None
    cls = finder.find(name, anywhere=anywhere)
    if issubclass(cls, bases):
        require_complete(cls)  # its message says what the class lacks; the one below only that it does not fit
    if not schema.accepts(annotation, cls):
        raise ConfigError(f"{name}: {schema.describe_mismatch(annotation, cls)}")
    return cls
