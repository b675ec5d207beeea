"""From a config file, or the record of an earlier run, to a resolved config.

A config file is Python with `def config()`, run by path. It may import modules of its own folder; neither stays in
`sys.modules` afterwards.
"""

import inspect
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxinfra.config.classes import ClassFinder, keep_usable, users_classes
from jaxinfra.config.folder import ModuleFolder
from jaxinfra.config.overrides import apply, read_overrides
from jaxinfra.config.record import Loaded, decode_record, read_record, require_classes
from jaxinfra.config.schema import MISSING, children, fields_of, is_choice, is_config, is_node
from jaxinfra.config.text import join, nearest, same
from jaxinfra.config.view import leaves
from jaxinfra.errors import ConfigError

COMMAND_LINE = "command line"  # the origin of a leaf that an override has set


def load[C](
    source: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    root: type[C] | None = None,
    imports: Sequence[str | os.PathLike[str]] = (),
    same_sources: bool = True,
) -> Loaded[C]:
    """Returns the config that a file describes, with overrides applied; it is not validated.

    ConfigError where the file is missing, is no config, or fails, or an override does not fit; StorageError where the
    file cannot be read.

    Args:
        source: a Python file with `def config()`, or the `run.json` of an earlier run.
        overrides: `path=value` texts, applied from left to right.
        root: the class that the config must be an instance of.
        imports: modules, and files or folders for all modules of the folder, that a record may import classes from.
        same_sources: refuse a record if the file of one of its classes has changed since.
    """
    path = Path(source)
    _require_config_file(path)
    run: Any
    finder = ClassFinder.named(imports)
    if path.suffix == ".json":
        content = read_record(path)
        require_classes(path, content, finder, same_sources=same_sources)
        run = decode_record(path, content, root, finder)
    else:
        folder = ModuleFolder(path.parent)
        finder = replace(finder, folders=(folder, *finder.folders))
        run = _run_config_file(folder, path)
    if root is not None and not isinstance(run, root):
        raise ConfigError(f"{path}: expected a config of class {root.__name__}, found {type(run).__name__}")
    before, named = leaves(run), os.fspath(source)
    run = apply(run, overrides, finder)
    given = {override.path for override in read_overrides(overrides)}
    return Loaded(run=run, source=named, origins=_origins(run, before, given, named))


def _require_config_file(path: Path) -> None:
    known = (".py", ".json")
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; name a config file in it")
    if not path.exists():
        suffix = path.suffix if path.suffix in known else ".py"
        names = sorted(each.name for each in path.parent.glob(f"*{suffix}"))
        near = nearest(path.name, names)
        there = f"has {', '.join(names)}" if names else f"has no *{suffix}"
        hint = f"did you mean {path.parent / near}?" if near else f"{path.parent} {there}"
        raise ConfigError(f"{path}: no such config file; {hint}")
    if path.suffix not in known:
        raise ConfigError(f"{path}: not a config file; name a .py file with def config(), or a run.json")


def _run_config_file(folder: ModuleFolder, path: Path) -> object:
    """Calls `config()` of a file."""
    with folder.importable():
        run = folder.run(path, _config_function(path, folder.load(path.name)))
        if not is_config(type(run)):
            raise ConfigError(f"{path}: config() must return a config dataclass, found {type(run).__name__}")
        for cls in [type(run), *users_classes(run)]:
            keep_usable(cls)
    return run


def _config_function(path: Path, module: ModuleType) -> Callable[[], object]:
    function = getattr(module, "config", None)
    if not inspect.isroutine(function):
        raise ConfigError(f"{path}: no function config; define def config() that returns the config")
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in free
    ]
    if needed:
        raise ConfigError(f"{path}: config() needs {', '.join(needed)}; give each argument a default")
    return function


def _origins(run: Any, before: dict[str, Any], given: Collection[str], file: str) -> dict[str, str]:
    """Returns where each leaf of a config came from that differs from its default, of a file or of overrides.

    `before` are the leaves before these, `given` are their paths. Switching a choice can change leaves that none names.
    """
    after = leaves(run)
    kept = {path for path in before.keys() & after.keys() - set(given) if same(before[path], after[path])}
    return {path: f"file:{file}" if path in kept else COMMAND_LINE for path in _changed(type(run), run, MISSING, "")}


def _changed(annotation: Any, value: Any, default: Any, path: str) -> Iterator[str]:
    """Yields the leaves that differ from `default`, or from their own where that is of another class."""
    alike = type(default) is type(value)
    if is_config(type(value)):
        if is_choice(annotation) and not alike:
            yield path
        own = {field.name: field for field in fields_of(type(value))}
        for name, part_annotation, part in children(annotation, value):
            part_default = getattr(default, name) if alike else own[name].make_default()
            yield from _changed(part_annotation, part, part_default, join(path, name))
    elif is_node(annotation, value):
        for index, (name, part_annotation, part) in enumerate(children(annotation, value)):
            part_default = default[index] if alike and index < len(default) else MISSING
            yield from _changed(part_annotation, part, part_default, join(path, name))
    elif not same(value, default):
        yield path
