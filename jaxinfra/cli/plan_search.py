"""`plan --search`: compiles the most promising layouts in processes of their own, and takes the fastest.

`plan --why FIELD=VALUE` says what another value costs.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxinfra.cli.processes import MAIN
from jaxinfra.config import apply
from jaxinfra.config.overrides import read_overrides
from jaxinfra.config.source_code import source_code
from jaxinfra.errors import ConfigError
from jaxinfra.machine.environment import usable_cores
from jaxinfra.parallel.mesh_config import AXES
from jaxinfra.plan.compile_errors import TOO_LARGE
from jaxinfra.plan.estimate import StepPlan
from jaxinfra.plan.search import MAX_RANKED, Layout, Result, layouts, search
from jaxinfra.plan.topology import Topology
from jaxinfra.run import Run
from jaxinfra.storage import outputs
from jaxinfra.track.console import fitted_table, print_table, stdout_console
from jaxinfra.track.formatting import format_bytes, format_percent, format_step

_NOTHING = 0.0005  # differences below this part of a step are not shown
_TRIED_FIXES = 3  # layouts that are compiled for a step that does not fit


def check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together, or a file that is there already."""
    if options.limit > MAX_RANKED:
        raise ConfigError(
            f"--limit {options.limit}: at most {MAX_RANKED} layouts are compiled; use --limit {MAX_RANKED}"
        )
    if options.write is None:
        return
    if not options.search or len(options.on) > 1:
        fix = "name one --on" if options.search else "add --search"
        raise ConfigError(f"--write {options.write}: writes what --search finds for one topology; {fix}")
    if Path(options.write).exists():
        raise ConfigError(f"--write {options.write}: is there already; name another file")
    outputs.check_writable(options.write)


def changed(run: Run, override: str) -> Run:
    """Returns a run with an override, and fsdp over what other axes leave; ConfigError if the override is wrong."""
    try:
        new = apply(run, [override])
    except ConfigError as error:
        raise ConfigError(f"--why {override}: {str(error).removeprefix(f'{override}: ')}") from None
    if new.mesh != run.mesh and new.mesh.fsdp == run.mesh.fsdp and -1 not in new.mesh.sizes:
        new = replace(new, mesh=replace(new.mesh, fsdp=-1))
    return new


def layout_rows(results: Sequence[Result]) -> dict[str, Any]:
    """Returns the plans and errors of all layouts, for `--json`; {} without a search."""
    rows = [{"overrides": each.layout.overrides, "error": each.error, "plan": each.plan} for each in results]
    return {"layouts": rows} if rows else {}


def find(options: argparse.Namespace, run: Run, topology: Topology) -> list[Result]:
    """Prints the result for each layout, and returns them, the fastest first; ConfigError if none fits.

    Fields that the command line sets stay as they are.
    """
    kept = {override.path for override in read_overrides(options.overrides)}
    found = layouts(run, topology, kept)
    if not found:
        where = f"--search: {run.name} on {topology}"
        if kept and layouts(run, topology):
            raise ConfigError(f"{where}: no layout has {' '.join(options.overrides)}; leave some of them out")
        raise ConfigError(f"{where}: no layout has a state that fits its devices; use more chips, or a smaller model")
    jobs, limit = options.jobs or max(1, (usable_cores() or 1) // 2), options.limit
    print(f"{topology}: {len(found)} layouts may fit; compiling up to {limit}, {jobs} at a time, minutes for each")
    with TemporaryDirectory(prefix="jaxinfra-plans-") as folder, ThreadPoolExecutor(jobs) as pool:

        def compile_one(numbered: tuple[int, Layout]) -> Result:
            number, layout = numbered
            return plan_apart(options, layout, Path(folder, f"{number}.json"))

        numbers = iter(range(1, limit + 1))

        def compile_all(wave: Sequence[Layout]) -> list[Result]:
            results: list[Result] = []
            for result in pool.map(compile_one, [(next(numbers), layout) for layout in wave]):
                print(f"  {_line(result)}", flush=True)
                results.append(result)
            return results

        results = search(found, compile_all, limit=limit)
    best = results[0]
    if best.plan is None:
        raise ConfigError(f"--search: {run.name} on {topology}: none of {len(results)} layouts fits; {best.error}")
    _print_table(results)
    of = f" of the {len(results)} that were compiled" if len(results) < len(found) else ""
    print(f"\nThe fastest{of}: {' '.join(best.layout.overrides)}\n")
    if options.write is not None:
        text = source_code(best.layout.run, f"{run.name} with the fastest layout that plan has found for {topology}.")
        outputs.write_text(options.write, text)
        print(f"wrote {options.write}\n")
    return results


def with_what_fits(error: ConfigError, run: Run, topology: Topology, plan: Callable[[Run], StepPlan]) -> ConfigError:
    """Returns the error of a step that does not fit, with the fastest remat and microbatches of its mesh that do.

    They are compiled: `plan` raises ConfigError for what does not fit.
    """
    cause, tried = str(error).partition("; ")[0], list[str]()
    for sketch in layouts(run, topology, {f"mesh.{axis}" for axis in AXES}):
        words = _changes(sketch.layout, run)
        if not words or not sketch.likely_fits:
            continue
        if len(tried) == _TRIED_FIXES:
            break
        print(f"it does not fit; trying {words}", flush=True)
        try:
            found = plan(sketch.layout.run)
        except ConfigError as other:
            if TOO_LARGE not in str(other):
                raise
            tried.append(words)
        else:
            needs = f"needs {format_bytes(found.memory_bytes)} and takes {format_step(found.estimate_s)}"
            return ConfigError(f"{cause}; use {words}, which {needs}")
    neither = f"; nor does it fit with {', or with '.join(tried)}" if tried else ""
    return ConfigError(f"{cause}{neither}; use more devices, or --search, which tries other meshes")


def _changes(layout: Layout, run: Run) -> str:
    """Returns the overrides of microbatches and remat that make a layout of a run of the same mesh."""
    own = Layout(run=replace(run, mesh=layout.run.mesh), topology=layout.topology).overrides
    return " ".join(word for word in layout.overrides if word not in own)


def plan_apart(options: argparse.Namespace, layout: Layout, file: Path) -> Result:
    """Plans a layout in a process of its own, which a compiler that aborts ends alone."""
    searched = {override.path for override in read_overrides(layout.overrides)}
    kept = [
        f"{override.path}={override.text}"
        for override in read_overrides(options.overrides)
        if override.path not in searched
    ]
    words = ["plan", options.config, *kept, *layout.overrides, "--on", str(layout.topology), "--as-is"]
    words += ["--json", str(file), *(word for each in options.imports or () for word in ("--import", each))]
    words += ["--chips", options.chips] if options.chips else []
    command = [sys.executable, "-c", MAIN, *words]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return Result(layout=layout, plan=json.loads(file.read_text(encoding="utf-8"))[0])
    if done.returncode < 0:
        return Result(
            layout=layout, plan=None, error=f"the compiler ended with {signal.Signals(-done.returncode).name}"
        )
    lines = done.stderr.strip().splitlines() or ["no message"]
    return Result(layout=layout, plan=None, error=lines[-1].removeprefix("error: "))


def _line(result: Result) -> str:
    if result.plan is None:
        return f"{'-':>10}  {result.layout}: {result.error.partition('; ')[0]}"
    return f"{format_step(result.step_s):>10}  {result.layout}"


def _print_table(results: Sequence[Result]) -> None:
    cells = [
        (
            str(number),
            result.layout.mesh,
            str(result.layout.run.train.accumulate),
            result.layout.remat,
            format_step(result.step_s),
            format_percent(plan["mfu"]),
            format_percent(plan["memory_bytes"] / plan["hbm_bytes"]),
            plan["binds"],
        )
        for number, result in enumerate(results, start=1)
        if (plan := result.plan) is not None
    ]
    console = stdout_console()
    names = ("", "mesh", "accumulate", "remat", "step", "MFU", "memory", "binds")
    print()
    print_table(console, fitted_table(console, names, cells, texts=("mesh", "remat", "binds")))


def format_difference(plan: StepPlan, other: StepPlan, override: str) -> Iterator[str]:
    """Yields what an override costs, in milliseconds by cause."""
    difference_s = other.estimate_s - plan.estimate_s
    part = format_percent(abs(difference_s) / plan.estimate_s)
    word = "slower" if difference_s > 0 else "faster"
    yield f"{override}: {format_step(other.estimate_s)}, {1e3 * abs(difference_s):,.1f} ms or {part} {word}"
    if other.samples != plan.samples:
        more = format_percent(abs(other.units_per_s / plan.units_per_s - 1))
        yield f"  {more} {'more' if other.units_per_s > plan.units_per_s else 'fewer'} tokens a second"
    causes = dict.fromkeys([*plan.parts, *other.parts])
    changes = {cause: other.parts.get(cause, 0.0) - plan.parts.get(cause, 0.0) for cause in causes}
    for cause, seconds in sorted(changes.items(), key=lambda change: -abs(change[1])):
        if abs(seconds) > _NOTHING * plan.estimate_s:
            yield f"  {cause:16}  {1e3 * seconds:+10,.1f} ms"
    yield f"  bytes on a device {(other.memory_bytes - plan.memory_bytes) / 2**30:+10,.2f} GiB"
