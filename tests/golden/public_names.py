"""Lists the names that users rely on, as docs/stability.md says; `python tests/golden/write.py` writes the list.

One line each: Python names with their parameters, config fields with the classes that they take by name, commands with
their options, exit codes, formats on disk. `Class(a, *, b=...)` needs `a`, and takes `b` by name. docs/configs.md has
annotations and defaults.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from flax import nnx

import jaxinfra
from jaxinfra import errors
from jaxinfra.checkpoint.manifest import _FORMAT as CHECKPOINT_FORMAT
from jaxinfra.cli.arguments import COMMANDS
from jaxinfra.cli.main import command_parser
from jaxinfra.config.extensible import Extensible
from jaxinfra.config.record import FORMAT as RECORD_FORMAT
from jaxinfra.data.store.manifest import FORMAT as STORE_FORMAT
from jaxinfra.prepare.recipes import Corpus, ImageSet
from jaxinfra.run import Run
from tests.golden.pages import all_fields

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "tests/golden/public/names.txt"
PAGES = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^from (jaxinfra\.[\w.]+) import (\([^)]*\)|.+)$", re.MULTILINE)
GONE = """\
keep what has gone, or let old calls work, for a minor version: docs/stability.md says how. If it has to change, say in
docs/changelog.md, after **Changed:**, what to write in its place. Then run `python tests/golden/write.py`"""
NEW = "users may rely on what is new from now on; run `python tests/golden/write.py` and commit what it writes"


def public_names() -> str:
    """The contents of the file."""
    parts = {
        "Python": python_names(),
        "Config fields": config_fields(),
        "Commands": commands(),
        "Exit codes": exit_codes(),
        "Formats on disk": formats(),
    }
    return "\n".join(f"# {title}\n" + "".join(f"{line}\n" for line in lines) for title, lines in parts.items())


def differences(golden: str, found: str) -> str:
    """What has gone, changed or come, each with what to do about it; "" for nothing."""
    before, now = by_name(golden), by_name(found)
    gone = [f"  gone: {line}" for name, line in before.items() if name not in now]
    gone += [
        f"  changed: {line}\n       to: {now[name]}" for name, line in before.items() if now.get(name, line) != line
    ]
    new = [f"  new: {line}" for name, line in now.items() if name not in before]
    return "\n".join([*gone, *[GONE][: len(gone)], *new, *[NEW][: len(new)]])


def by_name(text: str) -> dict[str, str]:
    """The lines by what stands before parameters, arguments or a number."""
    lines = (line for line in text.splitlines() if line and not line.startswith("# "))
    return {re.split(r"\(|: | is ", line)[0].strip(): line for line in lines}


def python_names() -> list[str]:
    """Names of `from jaxinfra import ...`, then what else the pages of docs/ and the files of configs/ import."""
    top = {f"jaxinfra.{name}": getattr(jaxinfra, name) for name in jaxinfra.__all__}
    lines = [line for name, value in sorted(top.items()) for line in described(name, value)]
    for path in sorted(documented_imports()):
        module, _, name = path.rpartition(".")
        value = getattr(importlib.import_module(module), name)
        same = next((short for short, each in top.items() if each is value), None)
        lines += [f"{path} is {same}"] if same else described(path, value)
    return lines


def documented_imports() -> set[str]:
    """The import paths of names of jaxinfra in the Python of README and docs/, and in configs/."""
    files = [*PAGES, *(ROOT / "configs").rglob("*.py")]
    return {
        f"{module}.{name}"
        for file in files
        for module, names in IMPORT.findall(file.read_text(encoding="utf-8"))
        for name in re.findall(r"\w+", names)
    }


def described(name: str, value: object) -> list[str]:
    """The line of a function or class, then those of what a class has."""
    if not callable(value) or (isinstance(value, type) and issubclass(value, errors.JaxinfraError)):
        return [name]
    if not isinstance(value, type) or dataclasses.is_dataclass(value):
        return [f"{name}{parameters(value)}"]
    line = name if is_base(value) else f"{name}{parameters(value)}"
    return [line, *sorted(f"{name}.{member}" for member in members(value))]


def is_base(cls: type) -> bool:
    """Whether users write subclasses of a class, and do not call it."""
    return issubclass(cls, (Extensible, jaxinfra.Module, jaxinfra.Tracker)) or inspect.isabstract(cls)


def members(cls: type) -> Iterator[str]:
    """What a subclass may define; of classes that users call, what the Python of the docs uses."""
    owners = [base for base in cls.__mro__ if base.__module__.startswith("jaxinfra") and base is not Extensible]
    names = {name for base in owners for name in (*vars(base), *inspect.get_annotations(base))}
    for name in names - vars(Extensible).keys():
        value = inspect.getattr_static(cls, name, None)
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not name.startswith("_") and (is_base(cls) or name in used_attributes()):
            yield f"{name}{parameters(value)}" if inspect.isfunction(value) else name


@cache
def used_attributes() -> set[str]:
    """The names that stand behind a dot in the Python of the docs."""
    return {name for page in PAGES for code in CODE.findall(page.read_text()) for name in re.findall(r"\.(\w+)", code)}


def parameters(function: Callable[..., Any]) -> str:
    """The parameters by name; a module of Flax hides those of its `__init__`."""
    is_module = isinstance(function, type) and issubclass(function, nnx.Module)
    signature, none = inspect.signature(function.__init__ if is_module else function), inspect.Parameter.empty
    shown = [
        each.replace(annotation=none, default=none if each.default is none else ...)
        for each in signature.parameters.values()
        if each.name not in ("self", "cls")
    ]
    return str(signature.replace(parameters=shown, return_annotation=none)).replace("=Ellipsis", "=...")


def config_fields() -> list[str]:
    """Paths of the fields of a run and of recipes, and the classes that a field takes by name."""
    lines = []
    for root in (Run, Corpus, ImageSet):
        for field in all_fields(root):
            lines.append(f"{root.__name__} {field.path}")
            lines += [f"{root.__name__} {field.path}={name}" for name in field.options if len(field.options) > 1]
    return list(dict.fromkeys(lines))


def commands() -> list[str]:
    """Commands of the package with their arguments, then their options, and the words that some take."""
    lines = ["jaxinfra (CONFIG is train CONFIG)", "jaxinfra --version"]
    counts = {None: "{}", "?": "[{}]", "*": "[{} ...]", "+": "{} [...]"}
    for name, command in COMMANDS.items():
        if command.module:
            continue  # of a clone, or of a package that adds commands
        actions = [each for each in command_parser(name)._actions if each.dest != "help"]
        words = [counts[each.nargs].format(each.metavar or each.dest) for each in actions if not each.option_strings]
        lines.append(f"jaxinfra {name} ({' '.join(words)})")
        for each in actions:
            value = "" if each.nargs == 0 else " VALUE"
            lines += [f"jaxinfra {name} {option}{value}" for option in each.option_strings]
            which = each.option_strings[0] if each.option_strings else each.metavar
            lines += [f"jaxinfra {name} {which} {choice}" for choice in each.choices or ()]
    return lines


def exit_codes() -> list[str]:
    """The codes of errors; docs/exit-codes.md has the others, which Python or a signal gives."""
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.JaxinfraError)]
    return [f"jaxinfra.errors.{cls.__name__}: {cls.exit_code}" for cls in classes]


def formats() -> list[str]:
    """The numbers in files that say in which format they are written."""
    numbers = {
        "format of run.json": RECORD_FORMAT,
        "format of the manifest of a store": STORE_FORMAT,
        "format of the manifest of a checkpoint": CHECKPOINT_FORMAT,
    }
    return [f"{name}: {number}" for name, number in numbers.items()]
