"""`python -m launch plan --exam ROWS.csv`: predicts published step times, and says how far off the predictions are."""

import argparse
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from jaxinfra.config.text import nearest
from jaxinfra.errors import ConfigError
from jaxinfra.models.remat import Named
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.plan.aot import Compilation, compile_for
from jaxinfra.plan.compile_errors import TOO_LARGE
from jaxinfra.plan.compiled_cache import users_compiler
from jaxinfra.plan.estimate import plan_step
from jaxinfra.plan.exam import Row, express, read_rows
from jaxinfra.storage import outputs
from jaxinfra.track.formatting import format_percent

_REPEATS = 0.06  # by which published repeats of one config differ


def run(options: argparse.Namespace) -> None:
    """Predicts each row, in minutes for each; prints a line as soon as it is known, and the errors at the end."""
    rows = read_rows(options.exam)
    if options.only:
        if unknown := [name for name in options.only if name not in {row.id for row in rows}]:
            ids = nearest(unknown[0], [row.id for row in rows]) or ", ".join(row.id for row in rows[:5])
            raise ConfigError(f"--only {unknown[0]}: {options.exam} has no such row; use an id such as {ids}")
        rows = [row for row in rows if row.id in options.only]
    constant = constant_tflops(read_rows(options.exam))
    print(f"{'row':18}  {'split':5}  {'published':>9}  {'plan':>8}  {'error':>7}  {'constant':>8}  {'error':>7}  binds")
    results: list[dict[str, Any]] = []
    for row in rows:
        results.append(_predict(row, constant.get(row.topology.partition(":")[0])))
        print(_line(results[-1]), flush=True)
    for split in ("fit", "test"):
        for key, name in (("error", "plan"), ("constant_error", "a constant TFLOP/s of each chip")):
            print(_summary([each for each in results if each["split"] == split], split, key, name))
    right, pairs = order(results)
    if pairs:
        print(f"order of rows of one model and chip, by tokens a second and chip: right in {right} of {pairs} pairs")
    expressed = sum("plan_s" in each for each in results)
    print(f"{expressed} of {len(results)} rows are expressed")
    outputs.write_json(options.json, results)


def constant_tflops(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the mean TFLOP/s of each chip over the rows to fit: what one would guess without a plan."""
    by_chip: dict[str, list[float]] = {}
    for row in rows:
        if row.split == "fit" and row.tflops_per_s_per_chip:
            by_chip.setdefault(row.topology.partition(":")[0], []).append(row.tflops_per_s_per_chip)
    return {chip: statistics.mean(found) for chip, found in by_chip.items()}


def order(results: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Returns in how many pairs of rows of one model and chip the plan has the faster one right, and all such pairs.

    Pairs whose published speeds differ by less than repeats of one config do (`_REPEATS`) have no order.
    """
    planned = [each for each in results if "plan_s" in each]
    pairs = [
        (one, other)
        for one, other in itertools.combinations(planned, 2)
        if one["kind"] == other["kind"] and abs(math.log(_ratio(one, other, "published_s"))) > math.log(1 + _REPEATS)
    ]
    right = sum((_ratio(*pair, "published_s") > 1) == (_ratio(*pair, "plan_s") > 1) for pair in pairs)
    return right, len(pairs)


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any], seconds: str) -> float:
    """Returns the ratio of the tokens a second and chip of two rows."""
    return (one["chip_tokens"] / one[seconds]) / (other["chip_tokens"] / other[seconds])


def _predict(row: Row, constant: float | None) -> dict[str, Any]:
    result: dict[str, Any] = {"id": row.id, "split": row.split, "published_s": row.step_s}
    result |= {"kind": [row.model, row.topology.partition(":")[0]], "chip_tokens": row.seq_len * row.sequences_per_chip}
    if constant and row.tflops_per_s_per_chip:
        result["constant_s"] = row.step_s * row.tflops_per_s_per_chip / constant
        result["constant_error"] = result["constant_s"] / row.step_s - 1
    try:
        compiled, note = _compile(row)
    except ConfigError as error:
        return result | {"missing": str(error)}
    plan = plan_step(compiled, fused_backward=True)
    error = plan.estimate_s / row.step_s - 1
    return result | {"plan_s": plan.estimate_s, "error": error, "binds": plan.binds, "note": note} | asdict(plan)


def _compile(row: Row) -> tuple[Compilation, str]:
    """Compiles the run of a row; one that does not fit has its layer inputs on the host, or overlaps more."""
    run, topology = express(row)
    attempts = [(run, "")]
    if isinstance(run.model, TransformerConfig) and run.model.remat == "full":
        on_host = replace(run.model, remat=Named(offload=("layer_input",)))
        attempts.append((replace(run, model=on_host), "layer inputs on the host"))
    if run.train.compiler != "overlap":
        attempts.append((replace(run, train=replace(run.train, compiler="overlap")), "by overlap"))
    for attempt, note in attempts:
        try:
            return compile_for(attempt, topology, compiler=users_compiler()), note
        except ConfigError as error:
            if TOO_LARGE not in str(error) or attempt is attempts[-1][0]:
                raise
    raise AssertionError("the last attempt returns or raises")


def _line(result: dict[str, Any]) -> str:
    constant = f"{result['constant_s']:8.3f}  {result['constant_error']:+7.1%}" if "constant_s" in result else " " * 17
    start = f"{result['id']:18}  {result['split']:5}  {result['published_s']:9.3f}"
    if "missing" in result:
        return f"{start}  {'':8}  {'':7}  {constant}  missing: {result['missing']}"
    note = f" ({result['note']})" if result["note"] else ""
    return f"{start}  {result['plan_s']:8.3f}  {result['error']:+7.1%}  {constant}  {result['binds']}{note}"


def _summary(results: Sequence[dict[str, Any]], split: str, key: str, name: str) -> str:
    errors = [abs(each[key]) for each in results if key in each]
    if not errors:
        return f"{split}: {name}: no row"
    mean, worst = format_percent(statistics.mean(errors)), format_percent(max(errors))
    return f"{split}: {name}: {len(errors)} rows, mean error {mean}, worst {worst}"
