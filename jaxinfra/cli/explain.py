"""`python -m launch explain [FIELD]`: explains a field of a run or recipe, or lists them; uses no devices."""

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from jaxinfra.cli.arguments import COMMANDS
from jaxinfra.cli.main import command_parser
from jaxinfra.command import COMMAND
from jaxinfra.config.explain import Field, fields_below, find
from jaxinfra.config.extensible import class_name
from jaxinfra.config.schema import is_choice, open_bases
from jaxinfra.errors import ConfigError
from jaxinfra.run import Run

_MAX_WIDTH = 110  # characters of a line
_NEW_RUN = "another value starts another run, in a directory of its own"
_RESUME = {  # fields of a run that are not in its fingerprint, but say which run it is
    "name": _NEW_RUN,
    "root": _NEW_RUN,
    "init": "may not change when a run resumes: it has started from these parameters",
}


def run(options: argparse.Namespace) -> None:
    """Prints the type, default and meaning of a field, and the fields below it."""
    width = min(shutil.get_terminal_size(fallback=(_MAX_WIDTH, 24)).columns, _MAX_WIDTH)
    if options.field is None:
        print("\n".join(tree(fields_below(Run), width)), flush=True)
        corpus, image_set = ([_line(field, "", width) for field in fields_below(recipe)] for recipe in _recipes())
        print("\nCorpus: a recipe of text, for data prepare", *corpus, sep="\n")
        only = (line for line in image_set if line not in corpus)
        print("\nImageSet: a recipe of images, with these fields besides the common ones", *only, sep="\n")
        print(f"\nA field in full: {COMMAND} explain optim.peak_lr. All of them: docs/configs.md.")
        return
    try:
        found = find(_roots(), options.field)
    except ConfigError:
        option = f"--{options.field.replace('_', '-')}"
        usages = {name: command_parser(name).format_usage() for name in COMMANDS}
        owners = [name for name, usage in usages.items() if f"[{option} " in usage or f"[{option}]" in usage]
        if not owners:
            raise
        raise ConfigError(f"{options.field}: is the option {option}; see {COMMAND} {owners[0]} --help") from None
    same: dict[tuple[str, ...], list[Field]] = {}  # a field of several classes is explained once
    for field in found:
        same.setdefault((field.path, field.allowed, field.default, field.meaning), []).append(field)
    print("\n\n".join("\n".join(describe_field(fields, width)) for fields in same.values()))


def _roots() -> Iterator[type]:
    yield Run
    yield from _recipes()


def _recipes() -> tuple[type, ...]:
    from jaxinfra.prepare.recipes import Corpus, ImageSet  # imports NumPy, fsspec and tokenizers

    return Corpus, ImageSet


def tree(fields: Iterable[Field], width: int) -> list[str]:
    """Returns a line for each field, and for each field one level below it, without importing open classes."""
    lines = []
    for field in fields:
        lines.append(_line(field, "", width))
        for cls in () if open_bases(field.field.annotation) else field.options.values():
            lines += [_line(each, "  ", width) for each in fields_below(cls, field)]
    return lines


def describe_field(fields: Sequence[Field], width: int) -> list[str]:
    """Returns the lines that explain a field and those below it; `fields` are the same field of several classes."""
    field = fields[0]
    lines = [_assignment(field), f"  takes    {field.allowed}"]
    lines += textwrap.wrap(field.meaning, width, initial_indent="  meaning  ", subsequent_indent=" " * 11)
    lines.append(f"  class    {', '.join(class_name(each.owner) for each in fields)}")
    if not field.in_fingerprint:
        resume = "may change when a run resumes: its losses stay the same but for rounding"
        lines.append(f"  resume   {_RESUME.get(field.path, resume) if field.owner is Run else resume}")
    for name, cls in field.options.items():
        lines += ["", f"{field.path}={name}" if is_choice(field.field.annotation) else f"fields of {field.path}"]
        lines += [_line(each, "  ", width) for each in fields_below(cls, field)] or ["  none"]
    return lines


def _assignment(field: Field) -> str:
    return f"{field.path} = {field.default}" if field.default else field.path


def _line(field: Field, indent: str, width: int) -> str:
    """Returns "path = default  meaning", cut to the width."""
    line = f"{indent}{_assignment(field):<42}  {field.meaning}".rstrip()
    return line if len(line) <= width else f"{line[: width - 3]}..."
