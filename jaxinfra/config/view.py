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

from jaxinfra.config.schema import choices, conform, is_config, is_node, walk
from jaxinfra.config.text import format_value, same, snake_case

ABSENT = "absent"
"""What a difference shows for a path that one side does not have."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A path whose leaf values differ between two trees; a side without the path holds `ABSENT`."""

    path: str
    left: Any
    right: Any


def leaves(root: Any, *, fingerprinted_only: bool = False) -> dict[str, Any]:
    """Returns the leaf values by dotted path, in field order.

    Args:
        root: a config object.
        fingerprinted_only: leaves out what is marked `NOT_FINGERPRINTED`, each field with all that lies below it.

    Raises:
        ConfigError: a value does not fit the annotation of its field.
    """
    found = {}
    everything = walk(type(root), conform(type(root), root), fingerprinted_only=fingerprinted_only)
    for path, annotation, value in everything:
        if is_config(type(value)) and choices(annotation):
            found[path] = snake_case(type(value))
        elif not is_node(annotation, value):
            found[path] = value
    return found


def dump(root: Any) -> str:
    """Returns one `path = value` line a leaf; a line without the spaces can be given as an override."""
    return "".join(f"{path} = {format_value(value)}\n" for path, value in leaves(root).items())


def diff(left: Any, right: Any, *, fingerprinted_only: bool = False) -> list[Difference]:
    """Returns the leaves that differ, in field order; what only `right` has follows its neighbour there.

    Args:
        left: a config object.
        right: another.
        fingerprinted_only: as of `leaves`.
    """
    lefts, rights = (leaves(each, fingerprinted_only=fingerprinted_only) for each in (left, right))
    order = list(lefts)
    position = 0
    for path in rights:
        if path in lefts:
            position = order.index(path) + 1
        else:
            order.insert(position, path)
            position += 1
    pairs = ((path, lefts.get(path, ABSENT), rights.get(path, ABSENT)) for path in order)
    return [
        Difference(path=path, left=one, right=other)
        for path, one, other in pairs
        if path not in lefts or path not in rights or not same(one, other)
    ]


def format_diff(differences: Sequence[Difference]) -> str:
    """Returns one line a difference, `path  left -> right`, in aligned columns; "" when there is none."""
    rows = [(each.path, format_value(each.left), format_value(each.right)) for each in differences]
    path_width = max((len(path) for path, _, _ in rows), default=0)
    left_width = max((len(left) for _, left, _ in rows), default=0)
    return "\n".join(f"{path:<{path_width}}  {left:<{left_width}} -> {right}" for path, left, right in rows)


def fingerprint(root: Any) -> str:
    """Returns 16 hex digits that name the values of a config, those of fields marked `NOT_FINGERPRINTED` left out.

    They are the start of the SHA-256 of the canonical JSON of path and written value, sorted by path.
    """
    kept = {path: format_value(value) for path, value in leaves(root, fingerprinted_only=True).items()}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
