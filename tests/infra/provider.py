"""Reads the arguments of a Terraform resource from the provider's own classes: those that HashiCorp made of its schema.

They stay in their wheel, and nothing of them is run.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from zipfile import ZipFile

from tests.infra.tools import TOOLS

_OF_TERRAFORM = {"count", "depends_on", "for_each", "lifecycle", "provider"}
_OF_PARSER = {"__tfmeta", "id"}


@dataclass(frozen=True, kw_only=True)
class Argument:
    """The arguments of a block, and its nested blocks."""

    required: bool
    block: str  # class of the block, "" for a value


@dataclass(frozen=True, kw_only=True)
class Schema:
    """A type of resource: its blocks by class, and what can be read of it."""

    blocks: Mapping[str, Mapping[str, Argument]]
    attributes: set[str]


@cache
def schema(provider: str, resource: str) -> Schema | None:
    """Reads the classes of a resource; None if the provider does not have it."""
    package = f"cdktf_cdktf_provider_{provider.replace('-', '_')}"
    (wheel,) = (TOOLS / "providers").glob(f"{package}-[0-9]*.whl")
    name = resource if provider == "google-beta" else resource.removeprefix("google_")
    with ZipFile(wheel) as packed:
        path = f"{package}/{name}/__init__.py"
        if path not in packed.namelist():
            return None
        tree = ast.parse(packed.read(path))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    names = {each.name for each in classes}
    (main,) = (each for each in classes if any("TerraformResource" in ast.unparse(base) for base in each.bases))
    blocks = {each.name: dict(_arguments(each, names)) for each in classes if _kind(each) == "data_type"}
    return Schema(
        blocks={**blocks, "": blocks[f"{main.name}Config"]}, attributes={each.name for each in _methods(main)}
    )


def problems(provider: str, resource: str, content: Mapping[str, Any]) -> list[str]:
    """Returns what Terraform would refuse in a resource that tfparse has read."""
    found = schema(provider, resource)
    if found is None:
        return [f"{provider} has no {resource}"]
    content = {name: value for name, value in content.items() if name not in _OF_TERRAFORM}
    return list(_problems(found, resource, "", content))


def _problems(schema: Schema, where: str, block: str, content: Mapping[str, Any]) -> Iterator[str]:
    known = schema.blocks[block]
    for name, value in content.items():
        if name in _OF_PARSER:
            continue
        if name not in known:
            yield f"{where} has no {name}"
            continue
        items = value if isinstance(value, list) else [value]
        are_blocks = all(isinstance(item, dict) and "__tfmeta" in item for item in items)
        if are_blocks != bool(known[name].block):
            yield f"{where}.{name} is {'a block' if known[name].block else 'an argument'}"
        elif are_blocks:
            for item in items:
                yield from _problems(schema, f"{where}.{name}", known[name].block, item)
    for name, argument in known.items():
        if argument.required and name not in content:
            yield f"{where} lacks {name}"


def _arguments(node: ast.ClassDef, classes: set[str]) -> Iterator[tuple[str, Argument]]:
    """Yields the arguments of a class of Terraform's names, which stand in the addresses of its documentation."""
    init = next(each for each in _methods(node) if each.name == "__init__")
    described = dict(re.findall(r"^:param (\w+): (.*)$", ast.get_docstring(init) or "", re.MULTILINE))
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        if name := re.search(r"#(\w+) ", described[argument.arg]):
            used = classes & {*re.findall(r"\w+", ast.unparse(argument.annotation or init))}
            yield name[1], Argument(required=default is None, block=min(used, default=""))


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [each for each in node.body if isinstance(each, ast.FunctionDef)]


def _kind(node: ast.ClassDef) -> str:
    return next(
        (ast.unparse(each.func).rpartition(".")[2] for each in node.decorator_list if isinstance(each, ast.Call)), ""
    )
