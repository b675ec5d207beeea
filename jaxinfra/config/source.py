"""From a config file, or the record of an earlier run, to a resolved config.

A config file is Python with `def config()`, and is run by path: its directory is not put on `sys.path`, and
its module is gone from `sys.modules` afterwards. What it imports must be importable anyway.
"""

import inspect
import itertools
import os
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxinfra.config.overrides import apply, read_overrides
from jaxinfra.config.record import Loaded, decode_record, read_record
from jaxinfra.config.schema import MISSING, children, choices, fields_of, is_config, is_node, resolve
from jaxinfra.config.text import join, nearest, same, shorten
from jaxinfra.config.view import leaves
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.storage.errors import storage_errors

COMMAND_LINE = "command line"  # the origin of a leaf that an override has set

_counter = itertools.count()


def load[C](source: str | os.PathLike[str], overrides: Sequence[str] = (), root: type[C] | None = None) -> Loaded[C]:
    """Returns the config that a file describes, with overrides applied; it is not validated.

    ConfigError where the file is missing, is no config, or fails, or an override does not fit; StorageError where the
    file cannot be read.

    Args:
        source: a Python file with `def config()`, or the `run.json` of an earlier run.
        overrides: `path=value` texts, applied from left to right.
        root: the class that the config must be an instance of.
    """
    path = Path(source)
    _require_config_file(path)
    run = decode_record(path, read_record(path), root) if path.suffix == ".json" else _run_config_file(path)
    if root is not None and not isinstance(run, root):
        raise ConfigError(f"{path}: expected a config of class {root.__name__}, found {type(run).__name__}")
    before, named = leaves(run), os.fspath(source)
    run = apply(run, overrides)
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


def _run_config_file(path: Path) -> Any:
    """Runs `config()` of a file; bytecode is not cached, so an edit within the same second is seen."""
    module = ModuleType(f"_jaxinfra_config_{next(_counter)}_{path.stem}")
    module.__file__ = str(path)
    code = _compiled(path)
    # A dataclass in the file needs its module in sys.modules, to resolve string annotations.
    sys.modules[module.__name__] = module
    try:
        try:
            exec(code, module.__dict__)
            run = _config_function(path, module)()
        except Exception as error:
            raise ConfigError(_failure(path, error)) from error
        if not is_config(type(run)):
            raise ConfigError(f"{path}: config() must return a config dataclass, found {type(run).__name__}")
        resolve(type(run))
        return run
    finally:
        sys.modules.pop(module.__name__, None)


def _compiled(path: Path) -> Any:
    with storage_errors(path, action="read"):
        content = path.read_bytes()
    try:
        return compile(content, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f"{path}:{error.lineno}" if error.lineno else str(path)
        raise ConfigError(f"{where}: {type(error).__name__}: {shorten(error.msg)}; mend the file") from error


def _config_function(path: Path, module: ModuleType) -> Any:
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


def _failure(path: Path, error: Exception) -> str:
    """Says where in the config file an exception came up, and what it was."""
    frames = traceback.walk_tb(error.__traceback__)
    line = next((line for frame, line in reversed([*frames]) if frame.f_code.co_filename == str(path)), None)
    text = " ".join(str(error).split())
    if line is None and isinstance(error, ConfigError):
        return text
    where = str(path) if line is None else f"{path}:{line}"
    named = "" if isinstance(error, JaxinfraError) else f"{type(error).__name__}: "
    return f"{where}: {named}{text}".rstrip(": ")


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
        if choices(annotation) and not alike:
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
