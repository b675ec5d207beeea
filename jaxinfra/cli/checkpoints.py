"""`python -m launch checkpoints RUN [ACTION]`: lists, verifies, compares, prunes and copies checkpoints.

Uses no devices. JAX is imported only for a copy between a disk and a bucket.
"""

import argparse
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from rich.table import Column

from jaxinfra.checkpoint.bucket_index import owner_token
from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.copying import copy_run
from jaxinfra.checkpoint.difference import Checkpoint, LeafDifference, compare_leaves, open_checkpoint
from jaxinfra.checkpoint.inventory import (
    PrunePlan,
    StepOverview,
    Verified,
    list_checkpoints,
    plan_prune,
    retention_of,
    stored_checkpoints,
    verify_step,
)
from jaxinfra.checkpoint.step_store import Leftover, StepStore
from jaxinfra.cli.arguments import CHECKPOINT_ACTIONS
from jaxinfra.cli.progress import ByteProgress
from jaxinfra.command import command_line
from jaxinfra.config import read_record
from jaxinfra.config.source import RECORD_FILE
from jaxinfra.errors import CheckpointError, ConfigError
from jaxinfra.storage import outputs
from jaxinfra.storage.lease import current_owner, hold
from jaxinfra.storage.location import is_remote
from jaxinfra.track.console import fitted_table, print_table, stdout_console, titled_table
from jaxinfra.track.formatting import flatten, format_age, format_bytes, format_metric
from jaxinfra.track.runs import local_files, no_run_error, parse_source

_WORST = 20  # leaves that diff shows without --all
_RECORDED = ("config", "versions", "data")  # parts of a manifest's record that diff compares
_RETENTION = ("keep_last", "keep_every", "keep_best")  # fields of CheckpointConfig, and options of prune
_OPTIONS = {"diff": ("all",), "prune": (*_RETENTION, "damaged", "dry_run"), "copy-to": ("step",)}  # of each action


class _Run(NamedTuple):
    """A run as the user names it, its checkpoints, and which of them its config keeps."""

    location: str
    stored: StepStore
    config: CheckpointConfig


def run(options: argparse.Namespace) -> None:
    """Runs the action, which returns what `--json` writes; without one, prints a row for each checkpoint."""
    _check_options(options)
    opened = _open(options.run_dir.rstrip("/") or options.run_dir)
    actions = {None: _list, "verify": _verify, "diff": _diff, "prune": _prune, "copy-to": _copy}
    result = actions[options.action](opened, options)
    outputs.write_json(options.json, result)
    if options.action == "verify":
        _require_intact(opened.stored, result)


def _check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for words and options that the action does not take."""
    action, words = options.action, options.words
    wanted = {"diff": 2, "prune": 0, "copy-to": 1}.get(action, len(words))
    if len(words) != wanted:
        raise ConfigError(f"{action}: takes {wanted} words, found {len(words)}; use {CHECKPOINT_ACTIONS[action]}")
    for owner, names in _OPTIONS.items():
        for name in names:
            if getattr(options, name) is not None and action != owner:
                option, usage = name.replace("_", "-"), CHECKPOINT_ACTIONS[owner]
                raise ConfigError(f"--{option}: is for {owner}; use {usage} with it")
    outputs.check_writable(options.json)


def _open(location: str) -> _Run:
    with local_files(location) as folder:
        record = read_record(folder / RECORD_FILE) if (folder / RECORD_FILE).exists() else None
    stored = stored_checkpoints(location)
    if record is None and not (stored.steps() or stored.leftovers()):
        raise no_run_error(location)
    return _Run(location, stored, retention_of(record or {}))


def _step(stored: StepStore, word: str) -> int:
    if not (word.isascii() and word.isdecimal()):
        raise ConfigError(f"{word}: is no step; use one of {_join(stored.steps())}")
    return int(word)


def _list(opened: _Run, options: argparse.Namespace) -> Any:
    location, stored, config = opened
    steps, leftovers = list_checkpoints(stored, config), stored.leftovers()
    is_trained = current_owner(location) is not None
    if steps or leftovers:
        rows = [_cells(each) for each in steps]
        rows += [[e.name, _describe(e, is_trained), "", "", _size(e.num_bytes), ""] for e in leftovers]
        texts, console = ("health", "metrics", "config keeps it"), stdout_console()
        print_table(console, fitted_table(console, ("step", *texts, "size", "age"), rows, texts=texts))
        for step, (problem, *more) in ((each.step, each.problems) for each in steps if each.problems):
            print(f"step {step}: damaged: {problem}{f' and {len(more)} more' if more else ''}")
    else:
        print(f"{stored.location}: no checkpoints yet")
    print(f"next: {_next(opened, steps, leftovers, is_trained)}")
    return {"run": location, "steps": [asdict(e) for e in steps], "leftovers": [asdict(e) for e in leftovers]}


def _cells(each: StepOverview) -> list[str]:
    health = "damaged" if each.problems else "files are there"
    age = "" if each.age_s is None else format_age(each.age_s)
    metrics = "\n".join(f"{name} {format_metric(value)}" for name, value in each.metrics.items())
    kept = "" if each.problems else "yes" if each.is_kept else "no"
    return [str(each.step), health, metrics, kept, _size(each.num_bytes), age]


def _describe(each: Leftover, is_trained: bool) -> str:
    if each.kind == "damaged":
        return "set aside as damaged"
    return "a save in progress" if is_trained else "left by an interrupted save"


def _next(opened: _Run, steps: Sequence[StepOverview], leftovers: Sequence[Leftover], is_trained: bool) -> str:
    """Returns the command that a user wants next."""
    command = command_line("checkpoints", opened.location)
    if any(each.problems for each in steps):
        return f"{command} verify"
    if not is_trained and (leftovers or not all(each.is_kept for each in steps)):
        return f"{command} prune --dry-run{' --damaged' * any(each.kind == 'damaged' for each in leftovers)}"
    return f"{command} verify" if steps else command_line("runs", os.path.dirname(opened.location) or ".")


def _verify(opened: _Run, options: argparse.Namespace) -> Any:
    stored = opened.stored
    existing = stored.steps()
    steps = sorted({_step(stored, word) for word in options.words}) or existing
    if missing := [step for step in steps if step not in existing]:
        raise CheckpointError(f"{stored.location}/{missing[0]}: does not exist; existing steps: {_join(existing)}")
    if not steps:
        raise CheckpointError(f"{stored.location}: no checkpoint yet; train until the first one is saved")
    start_s, results = time.monotonic(), list[Verified]()
    for step in steps:
        found = verify_step(stored, step, ByteProgress(f"step {step}: "))
        results.append(found)
        print(f"step {step}: {_outcome(found)}", *(f"  {problem}" for problem in found.problems), sep="\n", flush=True)
    elapsed_s, num_bytes = time.monotonic() - start_s, sum(each.num_bytes for each in results)
    speed = f"{num_bytes / elapsed_s / 1e9:.2f} GB/s" if elapsed_s else "-"
    print(f"read {format_bytes(num_bytes)} in {elapsed_s:.1f} s, {speed}")
    return [asdict(each) for each in results]


def _require_intact(stored: StepStore, results: Sequence[Mapping[str, Any]]) -> None:
    """Raises CheckpointError if a checkpoint is damaged; the results of `_verify` are written by then."""
    if named := ", ".join(f"step {each['step']} ({each['problems'][0]})" for each in results if each["problems"]):
        fix = "restore it from a copy; a start of the run sets it aside and goes on from an older one"
        raise CheckpointError(f"{stored.location}: damaged: {named}; {fix}")


def _outcome(found: Verified) -> str:
    if found.is_gone:
        return "deleted in the meantime"
    if found.problems:
        return "damaged"
    return f"intact, {found.num_files:,} files, {format_bytes(found.num_bytes)}"


def _diff(opened: _Run, options: argparse.Namespace) -> Any:
    """Prints how two checkpoints differ: leaf by leaf, summed over groups of leaves, and in what they have recorded."""
    left, right = (_named_checkpoint(opened, word) for word in options.words)
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
        # A NaN is worst.
        worst = sorted(values, key=lambda leaf: (math.isnan(leaf.relative), leaf.relative), reverse=True)[:_WORST]
        _print_leaves(values if options.all else worst, len(values))
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


def _named_checkpoint(opened: _Run, word: str) -> Checkpoint:
    """Opens `STEP` of the run, or `RUN@STEP` of another one."""
    location, step = parse_source(word)
    if step is None:
        return open_checkpoint(opened.stored, _step(opened.stored, word))
    return open_checkpoint(_open(location).stored, step)


def _recorded_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the recorded config fields, versions and data that differ, by path; None where a side has none."""
    sides = [flatten({key: record[key] for key in _RECORDED if key in record}) for record in (left, right)]
    pairs = {name: (sides[0].get(name), sides[1].get(name)) for name in {**sides[0], **sides[1]}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


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
    print_table(stdout_console(), table)


def _group(name: str) -> str:
    parts = name.split(".")
    if parts[0] != "opt_state":
        return parts[0]
    depth = next((index for index, part in enumerate(parts[1:], 2) if not part.isdecimal()), len(parts))
    return ".".join(parts[:depth])


def _print_leaves(values: Sequence[LeafDifference], total: int) -> None:
    title = "" if len(values) == total else f"the worst {len(values)} of {total:,} leaves; --all shows all"
    numbers = (Column(name, justify="right") for name in ("largest |A - B|", "|A - B| / |A|"))
    table = titled_table(title, "leaf", "type", *numbers)
    for each in values:
        table.add_row(each.name, each.left, f"{each.largest:.2e}", f"{each.relative:.2e}")
    print_table(stdout_console(), table)


def _prune(opened: _Run, options: argparse.Namespace) -> Any:
    location, stored, config = opened
    asked = {name: getattr(options, name) for name in _RETENTION}
    config = replace(config, **{name: value for name, value in asked.items() if value is not None})

    def plan() -> PrunePlan:
        return plan_prune(stored, config, with_damaged=bool(options.damaged))

    if options.dry_run:
        planned = plan()
        _print_plan(planned, "would delete", "would free")
        return asdict(planned)
    with hold(location, after=owner_token(stored.location) if is_remote(location) else 0) as lease:
        planned = plan()
        _print_plan(planned, "deleting", "freeing")
        stored.delete([*planned.steps], planned.leftovers, lease)
    return asdict(planned)


def _print_plan(plan: PrunePlan, delete: str, free: str) -> None:
    for step, num_bytes in plan.steps.items():
        print(f"{delete} step {step}, {format_bytes(num_bytes)}")
    for each in plan.leftovers:
        print(f"{delete} {each.name}, {_size(each.num_bytes) or 'of unknown size'}: {_describe(each, False)}")
    for step, problem in plan.damaged.items():
        print(f"leaving step {step}, which is damaged: {problem}")
    freed = f"{free} {format_bytes(plan.num_bytes)}" if plan.steps or plan.leftovers else "nothing to delete"
    print(f"{freed}; kept: {_join(plan.kept)}", flush=True)


def _copy(opened: _Run, options: argparse.Namespace) -> Any:
    (target,) = options.words
    target = target.rstrip("/") or target
    os.environ["JAX_PLATFORMS"] = "cpu"  # a copy needs no accelerator, which a run may be using
    source = _newest(opened.stored) if options.step is None else open_checkpoint(opened.stored, options.step)
    start_s = time.monotonic()
    copy_run(opened.location, source, target)
    elapsed_s, num_bytes = time.monotonic() - start_s, source.manifest.num_bytes
    print(f"copied step {source.step} to {target}: {format_bytes(num_bytes)} in {elapsed_s:.1f} s, verified")
    print(f"next: {command_line('checkpoints', target)}")
    return {"run": target, "step": source.step, "num_bytes": num_bytes}


def _newest(stored: StepStore) -> Checkpoint:
    """Opens the newest intact checkpoint; CheckpointError names what is wrong with all."""
    problems = list[str]()
    for step in reversed(stored.steps()):
        try:
            return open_checkpoint(stored, step)
        except CheckpointError as error:
            problems.append(str(error))
    reasons = "; ".join(problems) or "there is none yet"
    raise CheckpointError(f"{stored.location}: no intact checkpoint: {reasons}")


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)


def _join(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
