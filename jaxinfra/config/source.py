"""Loads a config from a config file or a run record, with overrides.

A config file is Python with `def config()`. It may import modules from its folder.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxinfra.config.classes import ClassFinder, cache_class, user_classes
from jaxinfra.config.folder import ModuleFolder, config_file_errors
from jaxinfra.config.overrides import apply, read_overrides
from jaxinfra.config.record import Loaded, check_classes, decode_record, read_record
from jaxinfra.config.schema import MISSING, children, fields_of, is_choice, is_config, is_node
from jaxinfra.config.text import join, nearest, same, without_indices
from jaxinfra.config.view import leaves
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.storage.location import is_remote

RECORD_FILE = "run.json"  # in the directory of a run
COMMAND_LINE = "command line"  # the origin of a leaf that an override has set


@dataclass(frozen=True, kw_only=True)
class ConfigFile[C]:
    """The config of a file or record, without overrides."""

    run: C
    source: str  # the file, as the user named it
    finder: ClassFinder  # finds the classes that overrides may name

    def with_overrides(self, overrides: Sequence[str]) -> Loaded[C]:
        """Returns the config with overrides applied, `path=value` texts; raises ConfigError if one does not fit.

        A config class may define `further_overrides(overrides)`, which returns those that the given ones need.
        """
        overrides = [*overrides, *getattr(self.run, "further_overrides", lambda given: ())(overrides)]
        run = apply(self.run, overrides, self.finder)
        overridden = {override.path for override in read_overrides(overrides)}
        origins = _origins(run, leaves(self.run), overridden, self.source)
        return Loaded(run=run, source=self.source, origins=origins)


def load[C](
    source: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    root: type[C] | None = None,
    imports: Sequence[str | os.PathLike[str]] | ClassFinder = (),
) -> Loaded[C]:
    """Returns the config of a file, with overrides applied; arguments and errors as in `load_file`."""
    return load_file(source, root, imports).with_overrides(overrides)


def load_file[C](
    source: str | os.PathLike[str],
    root: type[C] | None = None,
    imports: Sequence[str | os.PathLike[str]] | ClassFinder = (),
) -> ConfigFile[C]:
    """Runs a config file or reads a record; the config is not validated.

    Args:
        source: a config file, the `run.json` of a run, or the directory of a run, which may be a URL.
        root: the class that the config must be an instance of.
        imports: modules that a record may import classes from, or a finder of these classes; a file or a `folder/`
            allows all modules of its folder.

    Raises ConfigError if the file is missing, raises or is not a config, and StorageError if it cannot be read.
    """
    run: Any  # of class C, as `root` is checked below
    finder = imports if isinstance(imports, ClassFinder) else ClassFinder.from_imports(imports)
    path = _find_file(source)
    if isinstance(path, str) or path.suffix == ".json":
        content = read_record(path)
        check_classes(path, content, finder)
        run = _with_stores(decode_record(path, content, finder), Path(str(content.get("folder", ""))))
    else:
        folder = ModuleFolder(path.parent)
        finder = replace(finder, folders=(folder, *finder.folders))
        run = _run_config_file(folder, path)
    if root is not None and not isinstance(run, root):
        raise ConfigError(f"{path}: expected a config of class {root.__name__}, found {type(run).__name__}")
    return ConfigFile(run=run, source=os.fspath(source), finder=finder)


def _with_stores(run: object, folder: Path) -> object:
    """Returns a config with the stores and recipes that its relative paths name in the folder where it was started.

    What exists in the current folder is taken from there: a copy of a project has data of its own.
    """
    named = {path: value for path, value in leaves(run).items() if path.rpartition(".")[2] in ("store", "recipe")}
    missing = {path: value for path, value in named.items() if isinstance(value, str) and not os.path.exists(value)}
    # `os.path.exists` is also False where the user may not look, as in the home of somebody else.
    found = {path: str(folder / value) for path, value in missing.items() if os.path.exists(folder / value)}
    return apply(run, [f"{path}={value!r}" for path, value in found.items()]) if found else run


def find_record(source: str | os.PathLike[str]) -> str | Path | None:
    """Returns the path or URL of the record that `source` names; None for a config file."""
    path = _find_file(source)
    return path if os.fspath(path).endswith(".json") else None


def _find_file(source: str | os.PathLike[str]) -> str | Path:
    """Returns the path of the config file or record that `source` names, or the URL of a record."""
    location = os.fspath(source)
    run, at, step = location.rpartition("@")
    if at and re.fullmatch("[0-9]+", step) and (is_remote(location) or not os.path.exists(location)):
        raise ConfigError(f"{location}: names a checkpoint, and all checkpoints of a run have one config; use {run}")
    if is_remote(location):
        url = location.rstrip("/")
        return url if url.endswith(".json") else f"{url}/{RECORD_FILE}"
    path = Path(source)
    if (path / RECORD_FILE).exists():
        path = path / RECORD_FILE
    _require_config_file(path)
    return path


def runs_of_config(path: Path) -> list[Path]:
    """Returns the directories of runs whose names `run.with_fingerprint_name` makes of that of `path`, newest first.

    Their names end with the first digits of their fingerprints; a run that is named `exp-240501` is none of `exp`.
    Runs without a checkpoint, such as one whose start was refused, count only where no run has one.
    """
    found = dict[Path, float]()
    for record in path.parent.glob(f"{escape(path.name)}-{'[0-9a-f]' * 6}/{RECORD_FILE}") if path.name else ():
        with suppress(ConfigError, StorageError, FileNotFoundError):  # damaged, or deleted meanwhile: no candidate
            if str(read_record(record).get("fingerprint")).startswith(record.parent.name[-6:]):
                found[record.parent] = record.stat().st_mtime
    saved = [run for run in found if any(run.glob("checkpoints/[0-9]*"))]
    return sorted(saved or found, key=lambda run: -found[run])


def _require_config_file(path: Path) -> None:
    """Raises ConfigError, with what may have been meant, if there is no config file or record at `path`."""
    suffixes = (".py", ".json")
    if not path.suffix and (runs := runs_of_config(path)):
        raise ConfigError(f"{path}: no {RECORD_FILE} there; did you mean {runs[0]}?")
    if path.is_dir():
        raise ConfigError(
            f"{path}: is a directory without {RECORD_FILE}; name a config file, or the directory of a run"
        )
    if not path.exists():
        pattern = f"*{path.suffix}" if path.suffix in suffixes else "*.py"
        names = sorted(each.name for each in path.parent.glob(pattern))
        near = nearest(path.name, names)
        listing = f"{path.parent} has {', '.join(names) or f'no {pattern}'}"
        hint = f"did you mean {path.parent / near}?" if near else listing
        raise ConfigError(f"{path}: no such config file; {hint}")
    if path.suffix not in suffixes:
        raise ConfigError(f"{path}: not a config file; name a .py file with def config(), or a run.json")


def _run_config_file(folder: ModuleFolder, path: Path) -> object:
    with folder.importable():
        function = _config_function(path, folder.load(path.name))
        with config_file_errors(path):
            run = function()
        if not is_config(type(run)):
            raise ConfigError(f"{path}: config() must return a config dataclass, found {type(run).__name__}")
        for cls in [type(run), *user_classes(run)]:
            cache_class(cls)
    return run


def _config_function(path: Path, module: ModuleType) -> Callable[[], object]:
    """Returns `config` of the module of a config file; ConfigError if it cannot be called without arguments."""
    function = getattr(module, "config", None)
    if not inspect.isroutine(function):
        raise ConfigError(f"{path}: no function config; define def config() that returns the config")
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise ConfigError(f"{path}: config() needs {', '.join(needed)}; give each argument a default")
    return function


def _origins(run: object, before: Mapping[str, object], overridden: set[str], file: str) -> dict[str, str]:
    """Returns the origin of each leaf that differs from its default; `before` are the leaves without the overrides."""
    after = leaves(run)
    # Values are compared, too, because an override that switches a class also changes leaves below its path.
    kept = {
        path
        for path in before.keys() & after.keys()
        if not {path, without_indices(path)} & overridden and same(before[path], after[path])
    }
    changed = _not_default(type(run), run, MISSING, "")
    return {path: f"file:{file}" if path in kept else COMMAND_LINE for path in changed}


def _not_default(annotation: object, value: object, default: object, path: str) -> Iterator[str]:
    """Yields the paths of leaves that differ from `default`, the default of the node at `path`.

    An object of another class than `default` is compared with the defaults of its own class.
    """
    if not is_node(annotation, value):
        if not same(value, default):
            yield path
        return
    if type(default) is type(value):
        defaults = {name: part for name, _, part in children(annotation, default)}
    elif isinstance(value, tuple):
        defaults = {}  # without a default, every item differs
    else:
        defaults = {field.name: field.make_default() for field in fields_of(type(value))}
        if is_choice(annotation):
            yield path  # the name of the chosen class is a leaf, too (see `view`)
    for name, part_annotation, part in children(annotation, value):
        yield from _not_default(part_annotation, part, defaults.get(name, MISSING), join(path, name))
