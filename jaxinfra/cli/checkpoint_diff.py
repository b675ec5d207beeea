"""Prints how two checkpoints differ: leaf by leaf, in sums over groups of leaves, and in what they have recorded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Column

from jaxinfra.checkpoint.difference import Checkpoint, LeafDifference, compare_leaves
from jaxinfra.track.console import stdout_console, titled_table
from jaxinfra.track.formatting import flatten

_WORST = 20  # leaves that are shown
_RECORDED = ("config", "versions", "data")


def print_difference(left: Checkpoint, right: Checkpoint, *, show_all: bool) -> dict[str, Any]:
    """Compares two verified checkpoints, prints the difference, and returns it as JSON values."""
    found = [*compare_leaves(left, right)]
    different = [each for each in found if not each.is_equal]
    recorded = _recorded_differences(left.manifest.record, right.manifest.record)
    print(f"A {left}", f"B {right}", sep="\n")
    for name, (a, b) in recorded.items():
        print(f"{name}: {a} -> {b}")
    for each in different:
        if each.largest is None:
            print(f"{each.name}: {each.left} -> {each.right}")
    values = [each for each in different if each.largest is not None]
    if values:
        _print_groups(found)
        _print_leaves(values if show_all else _worst(values)[:_WORST], len(values))
    equal = len(found) - len(different)
    print(
        f"{len(found):,} leaves: {equal:,} equal to the last bit, {len(values):,} with other values, "
        f"{len(different) - len(values):,} on one side only or of another type"
    )
    return {
        "left": str(left),
        "right": str(right),
        "leaves": len(found),
        "equal": equal,
        "different": [asdict(each) for each in different],
        "recorded": {name: [*pair] for name, pair in recorded.items()},
    }


def _recorded_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the recorded config fields, versions and data that differ, by path; None where a side has none."""
    sides = [flatten({key: record[key] for key in _RECORDED if key in record}) for record in (left, right)]
    pairs = {name: (sides[0].get(name), sides[1].get(name)) for name in {**sides[0], **sides[1]}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _worst(values: Sequence[LeafDifference]) -> list[LeafDifference]:
    def badness(each: LeafDifference) -> float:
        return math.inf if math.isnan(each.relative) else each.relative

    return sorted(values, key=badness, reverse=True)


def _print_groups(found: Sequence[LeafDifference]) -> None:
    """Prints a row for each part of the state; of the optimizer, for each of its trees (`opt_state.0.mu`)."""
    groups: dict[str, list[LeafDifference]] = {}
    for each in found:
        groups.setdefault(_group(each.name), []).append(each)
    numbers = (Column(name, justify="right") for name in ("leaves", "equal", "largest |A - B|", "|A - B| / |A|"))
    table = titled_table("", "group", *numbers)
    for name, leaves in groups.items():
        largest = max(each.largest or 0.0 for each in leaves)
        norms = math.hypot(*(each.norm for each in leaves)), math.hypot(*(each.left_norm for each in leaves))
        relative = f"{norms[0] / norms[1]:.2e}" if norms[1] else ""
        equal = sum(each.is_equal for each in leaves)
        table.add_row(name, f"{len(leaves):,}", f"{equal:,}", f"{largest:.2e}", relative)
    stdout_console().print(table)


def _group(name: str) -> str:
    parts = name.split(".")
    if parts[0] != "opt_state":
        return parts[0]
    depth = next((index for index, part in enumerate(parts[1:], 2) if not part.isdecimal()), len(parts))
    return ".".join(parts[:depth])


def _print_leaves(values: Sequence[LeafDifference], total: int) -> None:
    title = "" if len(values) == total else f"the worst {len(values)} of {total:,} leaves; --all shows all"
    numbers = (Column(name, justify="right") for name in ("largest |A - B|", "|A - B| / |A|"))
    table = titled_table(title, Column("leaf", overflow="fold"), "type", *numbers)
    for each in values:
        table.add_row(each.name, each.left, f"{each.largest:.2e}", f"{each.relative:.2e}")
    stdout_console().print(table)
