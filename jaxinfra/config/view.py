"""A config seen as a flat list of leaves: for reading, comparing and fingerprints.

A choice yields its own path too, with the snake_case name of the chosen class. Applying all leaves of one
tree as overrides to another of the same class therefore makes the two equal (except where tuples of config
objects differ in length).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfra.config.schema import choice_name, conform, is_choice, is_config, is_node, walk
from jaxinfra.config.text import format_value, same

ABSENT = "absent"  # what a difference shows for a path that one side does not have


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A path whose leaf values differ between two trees; a side without the path holds `ABSENT`."""

    path: str
    left: Any
    right: Any


def leaves(root: Any, *, fingerprinted_only: bool = False) -> dict[str, Any]:
    """Returns the leaf values by dotted path, in field order; ConfigError where one does not fit its annotation.

    `fingerprinted_only` leaves out what is marked `NOT_FINGERPRINTED`, each field with all that lies below it.
    """
    found = {}
    for path, annotation, value in walk(type(root), conform(type(root), root), fingerprinted_only=fingerprinted_only):
        if is_config(type(value)) and is_choice(annotation):
            found[path] = choice_name(annotation, type(value))
        elif not is_node(annotation, value):
            found[path] = value
    return found


def dump(root: Any) -> str:
    """Returns one `path = value` line a leaf; a line without the spaces can be given as an override."""
    return "".join(f"{path} = {format_value(value)}\n" for path, value in leaves(root).items())


def diff(left: Any, right: Any, *, fingerprinted_only: bool = False) -> list[Difference]:
    """Returns the leaves that differ, in field order; what only `right` has follows its neighbor there.

    `fingerprinted_only` is as of `leaves`.
    """
    lefts, rights = (leaves(each, fingerprinted_only=fingerprinted_only) for each in (left, right))
    order, position = list(lefts), 0
    for path in rights:
        if path not in lefts:
            order.insert(position, path)
        position = order.index(path) + 1
    pairs = ((path, lefts.get(path, ABSENT), rights.get(path, ABSENT)) for path in order)
    return [
        Difference(path=path, left=one, right=other)
        for path, one, other in pairs
        if path not in lefts or path not in rights or not same(one, other)
    ]


def format_diff(differences: Sequence[Difference]) -> str:
    """Returns one line a difference, `path  left -> right`, in aligned columns; "" when there is none."""
    rows = [(each.path, format_value(each.left), format_value(each.right)) for each in differences]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"{path:<{widths[0]}}  {left:<{widths[1]}} -> {right}" for path, left, right in rows)


def fingerprint(root: Any) -> str:
    """Returns 16 hex digits that name the values of a config, those of fields marked `NOT_FINGERPRINTED` left out.

    They are the start of the SHA-256 of the canonical JSON of path and written value, sorted by path.
    """
    kept = {path: format_value(value) for path, value in leaves(root, fingerprinted_only=True).items()}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
