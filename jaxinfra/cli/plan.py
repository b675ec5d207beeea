"""`python -m launch plan CONFIG --on TOPOLOGY`: how long a step takes on absent hardware, what binds, what it costs.

`plan --exam ROWS.csv` does it for published step times, and says how far off it is.
"""

import argparse
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from jaxinfra.cli import plan_search
from jaxinfra.cli.arguments import PLAN_DEFAULTS
from jaxinfra.cli.compile import check_fits
from jaxinfra.command import command_line
from jaxinfra.config import load_file, read_record
from jaxinfra.config.source import RECORD_FILE
from jaxinfra.errors import ConfigError
from jaxinfra.machine.chips import load_chips
from jaxinfra.plan.aot import compile_for
from jaxinfra.plan.compile_errors import TOO_LARGE
from jaxinfra.plan.compiled_cache import users_compiler
from jaxinfra.plan.cost import Cost, Losses, cost_of
from jaxinfra.plan.estimate import StepPlan, plan_step
from jaxinfra.plan.topology import Topology, parse_topology
from jaxinfra.run import Run, with_fingerprint_name
from jaxinfra.storage import outputs
from jaxinfra.track import planned
from jaxinfra.track.console import fitted_table, print_table, stdout_console
from jaxinfra.track.formatting import format_bytes, format_percent, format_step
from jaxinfra.track.runs import local_files, no_run_error

_COUNTS_BESIDE = {
    "tokens": (("deadline", "budget", "chip_hours_per_loss", "pue"), "15e12"),
    "chip_hours_per_loss": (("save_s", "restart_minutes"), "50000"),
    "search": (("limit", "jobs"), ""),
    "check": (("plan",), "runs/quickstart"),
}
"""An option, those that only count beside it, and an example of its value."""
_MODES = {"exam": ("only", "json"), "check": ("plan",), "fit": ("json",)}
"""The options that replace a config, each with the other options that it reads."""
_LAYOUT = ("config", "on", "chips", "json", "search", "limit", "jobs", "write", "why", "as_is")
_COST = ("tokens", "deadline", "budget", "pue", "chip_hours_per_loss", "host_mb_s", "save_s", "restart_minutes")
_OPTIONS = (*_MODES, "only", "plan", *_LAYOUT, *_COST)
_NOTHING = 0.0005  # parts of a step below this are not shown


def run(options: argparse.Namespace) -> None:
    """Compiles the step for each topology, and prints its time, parts and cost; ConfigError if it does not fit."""
    if options.devices is not None:
        raise ConfigError(f"--devices {options.devices}: plan uses no devices; name the hardware with --on")
    if options.json is not None:
        outputs.check_writable(options.json)
    _check_options(options)
    if options.exam is not None:
        from jaxinfra.cli import plan_exam

        return plan_exam.run(options)
    if options.fit is not None or options.check is not None:
        return _compare_run(options)
    if options.config is None or not options.on:
        given = [word for topology in options.on for word in ("--on", topology)]
        example = command_line("plan", options.config or "configs/llama3_8b.py", *(given or ("--on", "v5p:4x4x4")))
        missing = [what for what, value in (("a config", options.config), ("hardware", options.on)) if not value]
        raise ConfigError(f"plan: needs {' and '.join(missing)}; use {example}")
    chips = load_chips(options.chips)
    topologies = [parse_topology(text, chips) for text in options.on]
    plan_search.check_options(options)
    losses, file = _losses(options), load_file(options.config, Run, options.imports)
    base = with_fingerprint_name(file.with_overrides(options.overrides), file.run).run
    others = {override: plan_search.changed(base, override) for override in options.why}  # refuses what is wrong now
    rows: list[dict[str, Any]] = []
    for topology in topologies:
        try:
            results = plan_search.find(options, base, topology) if options.search else []
            run = results[0].layout.run if results else base
            plan = _plan_or_advice(run, topology, options)
        except ConfigError as error:
            if len(topologies) == 1:
                raise
            print(f"{topology}: {error}\n")  # the others may fit
            continue
        cost = cost_of(plan, topology.chip, options.tokens, losses=losses, pue=options.pue) if options.tokens else None
        cost_lines = _cost_lines(options, topology, cost) if cost else ()
        print("\n".join([*format_plan(plan, options.host_mb_s), *cost_lines]), end="\n\n")
        for override in others:
            try:
                other = _plan(plan_search.changed(run, override), topology)
            except ConfigError as error:
                print(f"{override}: {error}\n")
            else:
                print("\n".join(plan_search.format_difference(plan, other, override)), end="\n\n")
        values = _values(plan, topology.chip.watts) | {"cost": cost and asdict(cost)}
        rows.append(values | plan_search.layout_rows(results))
    if not rows:
        raise ConfigError(f"--on {' --on '.join(options.on)}: the step fits none of them; see the lines above")
    if len(rows) > 1:
        _print_comparison(rows)
    outputs.write_json(options.json, rows)


def _check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for an option that would be ignored."""
    for mode in [name for name in _MODES if getattr(options, name) is not None]:
        for name in _OPTIONS:
            if name not in (mode, *_MODES[mode]) and getattr(options, name) not in (None, False, []):
                other = options.config if name == "config" else f"--{name.replace('_', '-')}"
                raise ConfigError(f"--{mode} {getattr(options, mode)}: goes without {other}; leave it out")
    if options.only and options.exam is None:
        raise ConfigError("--only: goes with --exam; add --exam ROWS.csv, or leave --only out")
    for needs, (names, example) in _COUNTS_BESIDE.items():
        for name in names:
            if getattr(options, name) is not None and not getattr(options, needs):
                option, needed = (f"--{each.replace('_', '-')}" for each in (name, needs))
                fix = f"add {' '.join(filter(None, (needed, example)))}, or leave {option} out"
                raise ConfigError(f"{option}: goes with {needed}; {fix}")
    for name, default in PLAN_DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)


def _compare_run(options: argparse.Namespace) -> None:
    """Compares a run with its plan, or writes a plan with what the steps of a run take."""
    location = (options.fit or options.check).rstrip("/")
    with local_files(location) as folder:
        found = planned.measure(folder)
        if not (folder / RECORD_FILE).exists():
            raise no_run_error(location)
        own = read_record(folder / RECORD_FILE)["config"].get("track", {}).get("plan")
    if found is None:
        fix = f"name a run that has logged two steps or more after the first {planned.WARM_STEPS} of its last start"
        raise ConfigError(f"{location}: too few steps are logged; {fix}")
    if options.fit is not None:
        if options.json is None:
            raise ConfigError(f"--fit {location}: needs a file for the plan; add --json plan.json")
        outputs.write_json(options.json, planned.plan_rows(found, location))
        print(f"{location}: {format_step(found.estimate_s)} a step; wrote {options.json}")
        return
    path = options.plan or own
    if path is None:
        raise ConfigError(f"--check {location}: its config names no plan (track.plan); name one with --plan plan.json")
    print(f"{location}: {planned.verdict(found, planned.read_plan(path))}")


def _plan_or_advice(run: Run, topology: Topology, options: argparse.Namespace) -> StepPlan:
    """Plans a run; the ConfigError of one that does not fit says what does, compiled."""
    try:
        return _plan(run, topology)
    except ConfigError as error:
        if options.as_is or TOO_LARGE not in str(error):
            raise
        raise plan_search.with_what_fits(error, run, topology, lambda run: _plan(run, topology)) from None


def _plan(run: Run, topology: Topology) -> StepPlan:
    """Compiles a run, or takes its program from the user's cache, and estimates its step."""
    progress = functools.partial(print, flush=True)
    compiled = compile_for(run, topology, on_progress=progress, compiler=users_compiler())
    check_fits(run, compiled.summary(), topology.chip)
    return plan_step(compiled)


def _losses(options: argparse.Namespace) -> Losses | None:
    if options.chip_hours_per_loss is None:
        return None
    return Losses(
        per_chip_hour=1 / options.chip_hours_per_loss, save_s=options.save_s, restart_s=options.restart_minutes * 60
    )


def _values(plan: StepPlan, watts: float | None) -> dict[str, Any]:
    derived = {"mfu": plan.mfu, "units_per_s": plan.units_per_s, "binds": plan.binds, "parts": plan.parts}
    return asdict(plan) | derived | {"joules": watts and watts * plan.devices * plan.estimate_s}


def format_plan(plan: StepPlan, host_mb_s: float | None = None) -> Iterator[str]:
    """Yields the lines of a plan; `host_mb_s` is what a host writes, in MB/s."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items()) or "one device"
    rows = plan.samples / plan.devices
    yield f"{plan.name} on {plan.topology}: {mesh}, {rows:g} sequences of {plan.units_per_sample:,} a device and step"
    peak = f"{plan.peak_flops / 1e12:,.0f} TFLOP/s in bfloat16 a device"
    saved, of_host = format_bytes(plan.checkpoint_bytes), format_bytes(plan.checkpoint_bytes / plan.hosts)
    bounds = f"{format_step(plan.lower_s)} if nothing waits, {format_step(plan.upper_s)} if nothing overlaps"
    lines = {
        "step": f"{format_step(plan.estimate_s)}    {bounds}",
        "MFU": f"{format_percent(plan.mfu)} of {peak}",
        "tokens": f"{plan.units_per_s / plan.chips:,.0f} a second and chip, {plan.units_per_s:,.0f} in all",
        "memory": f"{format_bytes(plan.memory_bytes)} of {format_bytes(plan.hbm_bytes)} a device",
        "data": f"{format_bytes(plan.batch_bytes / plan.estimate_s / plan.hosts)} a second on each host",
        "save": f"{saved}, {of_host} on each host",
        "binds": plan.binds,
    }
    if host_mb_s:
        lines["save"] += f": {plan.checkpoint_bytes / plan.hosts / (1e6 * host_mb_s):,.1f} s beside the steps"
    for name, text in lines.items():
        yield f"  {name:8}  {text}"
    if plan.is_roofline:
        yield "  a roofline of FLOPs and bytes, since no compiler estimates the cycles of GPUs: the bounds are wide"
    if plan.unknown_loops:
        yield f"  counted once, because their trip count is unknown: loops {', '.join(plan.unknown_loops)}"
    yield "\nWhere the time of a step goes"
    for cause, seconds in plan.parts.items():
        if seconds > _NOTHING * plan.estimate_s:
            yield f"  {cause:16}  {format_step(seconds):>10}  {format_percent(seconds / plan.estimate_s):>7}"
    for cause, seconds in plan.work.items():
        hidden_s = seconds - plan.waits.get(cause, 0.0)
        if cause not in plan.parts and hidden_s > _NOTHING * plan.estimate_s:
            yield f"  {cause:16}  {format_step(hidden_s):>10}  at the same time"


def _cost_lines(options: argparse.Namespace, topology: Topology, cost: Cost) -> Iterator[str]:
    """Yields what all tokens take, and whether that is within the limits."""
    days, hours = f"{_amount(cost.days)} days", f"{_amount(cost.chip_hours)} chip-hours"
    yield f"\n{options.tokens:,.0f} tokens: {cost.steps:,} steps, {days}, {hours}"
    if cost.goodput is not None:
        days = f"{_amount(cost.spot_days)} days" if cost.spot_days else "it never ends"
        yield f"  spot, where chips are lost: goodput {format_percent(cost.goodput)}, {days}"
    for name, dollars in cost.dollars.items():
        yield f"  {name.replace('_', ' '):10}  ${_amount(dollars)}"
    if not cost.dollars:
        judged = "" if options.budget is None else ", so the budget is not judged"
        yield f"  no price: --chips FILE with `dollars` of {topology.chip.name} adds it{judged}"
    if cost.kwh is not None:
        yield f"  energy      {_amount(cost.kwh)} kWh, at {options.pue:g} times what the chips take"
    if options.deadline is not None and cost.days > options.deadline:
        more = math.ceil(10 * cost.days / options.deadline) / 10
        yield f"  too late: {options.deadline:g} days are the limit; it needs at least {more:,.1f} times the chips"
    elif options.deadline is not None:
        yield f"  {options.deadline:g} days are the limit: enough"
    if options.budget is not None and cost.dollars:
        within = [name.replace("_", " ") for name, dollars in cost.dollars.items() if dollars <= options.budget]
        limit = f"${_amount(options.budget)} are the limit"
        if not within:
            yield f"  too much: {limit}"
        else:
            alone = " alone" if len(within) < len(cost.dollars) else ""
            yield f"  {limit}: enough for {' and '.join(within)}{alone}"


def _amount(number: float) -> str:
    """Formats days, hours, dollars or energy with two decimals below 100, and with more below 0.1."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}" if number >= 0.1 else f"{number:.5f}"


def _print_comparison(rows: Sequence[dict[str, Any]]) -> None:
    names = ("on", "step", "MFU", "tokens/s", "memory", "binds", "days", "chip-hours", "least dollars", "kWh")
    cells: list[tuple[str, ...]] = []
    for row in rows:
        cost = row["cost"] or {}
        dollars = cost.get("dollars") or {}
        cells.append(
            (
                row["topology"],
                format_step(row["estimate_s"]),
                format_percent(row["mfu"]),
                f"{row['units_per_s']:,.0f}",
                format_percent(row["memory_bytes"] / row["hbm_bytes"]),
                row["binds"],
                _amount(cost["days"]) if cost else "",
                _amount(cost["chip_hours"]) if cost else "",
                _amount(min(dollars.values())) if dollars else "",
                _amount(cost["kwh"]) if cost.get("kwh") is not None else "",
            )
        )
    console = stdout_console()
    print_table(console, fitted_table(console, names, cells, texts=("on", "binds")))
