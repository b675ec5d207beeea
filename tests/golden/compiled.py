"""Golden figures of programs compiled ahead of time: small programs exactly, configs as budgets.

The golden file of a small program in `compile/` has its memory and its collectives. `compile/budgets.json` has memory,
cycles and bytes sent of every config, which may change by `TOLERANCE`. `python tests/golden/write.py compile` writes
both.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from jaxinfra.cli.compile import format_report
from jaxinfra.config import load
from jaxinfra.data.tokens import TokenData
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.plan.aot import CompiledStep, compile_step
from jaxinfra.plan.topology import parse_topology
from jaxinfra.run import Run, TrainConfig
from tests.decoders import changed, decoder

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
FOLDER = Path(__file__).resolve().parent / "compile"
BUDGETS = FOLDER / "budgets.json"
TOLERANCE = 0.01

EXAMPLE = "llama3_70b"
PAGE = CONFIGS.parent / "docs" / "compile.md"
"""The page shows the command's output for this config."""

BEGIN, END = "<!-- compile: begin -->", "<!-- compile: end -->"

DENSE = Run(
    name="dense",
    model=decoder(
        vocab_size=1024,
        num_layers=4,
        hidden_size=256,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        mlp_dim=512,
        remat="full",
    ),
    data=TokenData(store="none", seq_len=256),
    train=TrainConfig(global_batch=64, accumulate=2),
)


MOE = replace(DENSE, name="moe", model=changed(DENSE.model, mlp=MixtureOfExperts(dim=256, num_experts=8, top_k=2)))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small program."""

    topology: str
    mesh: MeshConfig
    run: Run = DENSE


def _batch(global_batch: int, accumulate: int, run: Run = DENSE) -> Run:
    return replace(run, train=TrainConfig(global_batch=global_batch, accumulate=accumulate))


CASES = {
    "v5e-4x4_fsdp-tensor": Case(topology="v5e:4x4", mesh=MeshConfig(fsdp=4, tensor=4)),
    "v5p-4x4x4_fsdp": Case(topology="v5p:4x4x4", mesh=MeshConfig(fsdp=64), run=_batch(64, 1)),
    "v5p-4x4x4_context": Case(topology="v5p:4x4x4", mesh=MeshConfig(fsdp=16, context=4), run=_batch(16, 1)),
    "2xv5e-2x4_replica-stage": Case(
        topology="2xv5e:2x4", mesh=MeshConfig(replica=2, stage=2, fsdp=4), run=_batch(64, 4)
    ),
    "2xv5e-2x4_replica-expert": Case(
        topology="2xv5e:2x4", mesh=MeshConfig(replica=2, fsdp=4, expert=2), run=_batch(64, 2, MOE)
    ),
}
"""Named TOPOLOGY_AXES; together they have every mesh axis, every collective, and links inside and between slices."""

TOPOLOGIES = {
    "gemma2_2b": ("v6e:4x4",),
    "gpt2_124m": ("h100:1x8", "model.attention_kernel=xla"),  # tests have no cuDNN
    "llama3_70b": ("2xv5p:4x4x8",),
    "llama3_8b": ("v5p:4x4x4", "train.compiler=default"),  # large_blocks takes three times as long to compile
    "llama3_8b_128k": ("v5p:4x4x4",),
    "moe_small": ("v5e:2x4",),
    "qwen3_0_6b": ("v6e:2x4",),
}
"""Topology of each config in configs/, and overrides."""

CPU_CONFIGS = {"bench_small", "flax_module", "parity_dense", "parity_moe", "quickstart", "vit_digits"}
"""Configs made for CPUs, which have no budget."""


def compiled(name: str, dump: Callable[[str], object] | None = None) -> CompiledStep:
    """Compiles a case or a config for its topology; `dump` receives the HLO."""
    if name in CASES:
        on, run = CASES[name].topology, replace(CASES[name].run, name=name, mesh=CASES[name].mesh)
    else:
        on, *overrides = TOPOLOGIES[name]
        run = load(CONFIGS / f"{name}.py", overrides, root=Run).run
    return compile_step(run, parse_topology(on), dump=dump)


def golden_text(found: CompiledStep) -> str:
    """Formats the golden file of a small program."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    compiler = "jax-cuda13-plugin" if found.cycles is None else "libtpu"
    lines = [
        f"{found.name}: {mesh}",
        f"jax {version('jax')}, {compiler} {version(compiler)}",
        "",
        f"arguments    {found.memory.arguments:12,} bytes",
        f"temporaries  {found.memory.temporaries:12,} bytes",
        "",
        f"{'loops':5}  {'kind':18}  {'over':18}  {'links':7}  {'arrays':>6}  {'moved':>6}  {'bytes':>12}",
    ]
    for row in found.traffic:
        lines.append(
            f"{row.loops:5}  {row.kind:18}  {', '.join(row.axes) or '-':18}  {row.link:7}  {row.arrays:6}  "
            f"{row.runs:6,}  {row.bytes:12,}"
        )
    return "\n".join(lines) + "\n"


def budget(found: CompiledStep) -> dict[str, int]:
    """Returns the budgeted figures of a config, for one device and one step."""
    sent = {link: sum(row.bytes for row in found.traffic if row.link == link) for link in ("local", "network")}
    return {
        "memory_bytes": found.memory.total,
        "cycles": found.cycles or 0,
        "local_bytes": sent["local"],
        "network_bytes": sent["network"],
    }


def insert_example(page: str, found: CompiledStep) -> str:
    """Replaces the listing between the marks of a page."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE}: the marks are missing"
    lines = "\n".join(format_report(found, parse_topology(found.topology).chip))
    return f"{before}{BEGIN}\n\n```\n{lines}\n```\n\n{END}{after}"


def budgets() -> dict[str, dict[str, int]]:
    """Reads the recorded budgets by config."""
    return json.loads(BUDGETS.read_text(encoding="utf-8")) if BUDGETS.exists() else {}


def over_budget(name: str, found: dict[str, int], recorded: dict[str, int]) -> list[str]:
    """Returns a line for every figure that changed by more than `TOLERANCE`."""
    lines = []
    for what in sorted(found.keys() | recorded.keys()):
        now, before = found.get(what, 0), recorded.get(what, 0)
        if abs(now - before) > TOLERANCE * before:
            moved = f", {now / before - 1:+.1%}" if before else ""
            lines.append(f"{name}: {what} {now:,}, recorded {before:,}{moved}")
    return lines


def write(names: list[str]) -> None:
    """Compiles and records the named programs, or all; deletes records of programs that no longer exist."""
    for name in names:
        if name not in CASES and name not in TOPOLOGIES:
            raise SystemExit(f"{name}: no such program; must be one of {', '.join([*CASES, *TOPOLOGIES])}")
    recorded = {name: figures for name, figures in budgets().items() if name in TOPOLOGIES}
    for path in FOLDER.glob("*.txt"):
        if path.stem not in CASES:
            path.unlink()
    for name in names or [*CASES, *TOPOLOGIES]:
        found = compiled(name)
        if name in CASES:
            (FOLDER / f"{name}.txt").write_text(golden_text(found), encoding="utf-8")
        else:
            recorded[name] = budget(found)
            BUDGETS.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if name == EXAMPLE:
            PAGE.write_text(insert_example(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        print(name, flush=True)
