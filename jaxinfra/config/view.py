"""Flat views of a config: leaves by path, dump, diff and fingerprint.

A choice adds a leaf at its own path: the name of the chosen class. If the leaves of one config are applied as overrides
to another of the same class, the two are equal, unless tuples of config objects differ in length.

Credentials are neither shown nor compared: a run record has the names of variables in place of secrets.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxinfra.config.extensible import KIND
from jaxinfra.config.schema import choice_name, conform, is_choice, is_config, is_node, walk
from jaxinfra.config.text import format_value, join, same
from jaxinfra.storage.credentials import mask_credentials, mask_tree

# Leaves that a fingerprint leaves out at these values, as it did before they existed.
_ADDED = {
    "optim.parametrization": "standard",
    "optim.base_width": "none",
    "model.mtp": "none",
    "objective.mtp_weight": "0.3",
}
ABSENT = "absent"  # in a difference, the value of the config that does not have the path


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A path with different leaves in two configs; a config without the path has `ABSENT` there."""

    path: str
    left: object
    right: object


def leaves(root: object, *, fingerprinted_only: bool = False) -> dict[str, object]:
    """Returns the leaves by dotted path, in the order of the fields; also those of an encoded config, as of a record.

    `fingerprinted_only` skips fields that are `NOT_FINGERPRINTED`, with everything below them. Raises ConfigError if a
    value does not fit its annotation.
    """
    if isinstance(root, Mapping):
        return dict(_encoded_leaves(root, ""))
    by_path = {}
    for path, annotation, value in walk(type(root), conform(type(root), root), fingerprinted_only=fingerprinted_only):
        if is_config(type(value)) and is_choice(annotation):
            by_path[path] = choice_name(annotation, type(value))
        elif not is_node(annotation, value):
            by_path[path] = value
    return by_path


def config_leaves(root: object, *, fingerprinted_only: bool = False) -> dict[str, str]:
    """Returns the `leaves` as the texts of overrides."""
    return {path: format_value(value) for path, value in leaves(root, fingerprinted_only=fingerprinted_only).items()}


def _encoded_leaves(coded: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(coded, list) and any(isinstance(part, Mapping) for part in coded):
        coded = dict(enumerate(coded))
    if isinstance(coded, Mapping):
        for name, part in coded.items():
            yield from _encoded_leaves(part, path if name == KIND else join(path, name))
    else:
        yield path, tuple(coded) if isinstance(coded, list) else coded


def dump(root: object) -> str:
    """Returns a line `path = value` for each leaf; without the spaces it is an override."""
    return "".join(f"{path} = {_masked(value)}\n" for path, value in leaves(root).items())


def diff(left: object, right: object, *, fingerprinted_only: bool = False) -> list[Difference]:
    """Returns the leaves that differ, in the order of the fields; see `leaves`."""
    lefts, rights = (leaves(each, fingerprinted_only=fingerprinted_only) for each in (left, right))
    # All paths in the order of `left`; those only in `right` follow the path that precedes them there:
    # [a, c] and [a, b] give [a, b, c].
    order, position = list(lefts), 0
    for path in rights:
        if path not in lefts:
            order.insert(position, path)
        position = order.index(path) + 1
    pairs = ((path, lefts.get(path, ABSENT), rights.get(path, ABSENT)) for path in order)
    return [
        Difference(path=path, left=one, right=other)
        for path, one, other in pairs
        if path not in lefts or path not in rights or not same(mask_tree(one), mask_tree(other))
    ]


def format_diff(differences: Sequence[Difference]) -> str:
    """Returns a line `path  left -> right` for each difference, in aligned columns, without credentials."""
    rows = [(each.path, _masked(each.left), _masked(each.right)) for each in differences]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"{path:<{widths[0]}}  {left:<{widths[1]}} -> {right}" for path, left, right in rows)


def _masked(value: object) -> str:
    return mask_credentials(format_value(value))


def fingerprint(root: object) -> str:
    """Returns 16 hex digits that identify a config, without the fields that are `NOT_FINGERPRINTED`.

    They are the start of the SHA-256 of the JSON of all leaves as text, sorted by path.
    """
    texts = config_leaves(root, fingerprinted_only=True)
    kept = {path: text for path, text in texts.items() if _ADDED.get(path) != text}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
