"""What is compiled for hardware that is not here and held: small programs by their text, configs by their budgets.

Of a small program everything is exact: its golden in `compile/` has the bytes of its arguments and temporaries, and
of every kind of collective over the same mesh axes in equally many loops. Of a config, `compile/budgets.json` has
memory, cycles and bytes sent, which may move by `TOLERANCE`. `python tests/golden/write.py compile` writes both.
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
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.plan.aot import CompiledStep, compile_step
from jaxinfra.plan.topology import parse_topology
from jaxinfra.run import Run, TrainConfig

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
FOLDER = Path(__file__).resolve().parent / "compile"
BUDGETS = FOLDER / "budgets.json"
TOLERANCE = 0.01

EXAMPLE = "llama3_70b"
PAGE = CONFIGS.parent / "docs" / "compile.md"
"""A config whose figures the page shows, as the command prints them."""

BEGIN, END = "<!-- compile: begin -->", "<!-- compile: end -->"

DENSE = Run(
    name="dense",
    model=TransformerConfig(
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


MOE = replace(
    DENSE, name="moe", model=replace(DENSE.model, moe=MixtureOfExperts(num_experts=8, top_k=2, expert_dim=256))
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small program.

    Attributes:
        on: the topology.
        mesh: that it is laid over.
        run: all else of it.
    """

    on: str
    mesh: MeshConfig
    run: Run = DENSE


def _batch(global_batch: int, accumulate: int, run: Run = DENSE) -> Run:
    return replace(run, train=TrainConfig(global_batch=global_batch, accumulate=accumulate))


CASES = {
    "v5e-4x4_fsdp-tensor": Case(on="v5e:4x4", mesh=MeshConfig(fsdp=4, tensor=4)),
    "v5p-4x4x4_fsdp": Case(on="v5p:4x4x4", mesh=MeshConfig(fsdp=64), run=_batch(64, 1)),
    "v5p-4x4x4_context": Case(on="v5p:4x4x4", mesh=MeshConfig(fsdp=16, context=4), run=_batch(16, 1)),
    "2xv5e-2x4_replica-stage": Case(on="2xv5e:2x4", mesh=MeshConfig(replica=2, stage=2, fsdp=4), run=_batch(64, 4)),
    "2xv5e-2x4_replica-expert": Case(
        on="2xv5e:2x4", mesh=MeshConfig(replica=2, fsdp=4, expert=2), run=_batch(64, 2, MOE)
    ),
}
"""Named TOPOLOGY_AXES: as few as have every axis of the mesh, every collective, and links inside and between slices."""

ON = {
    "gemma2_2b": ("v6e:4x4",),
    "gpt2_124m": ("h100:1x8", "model.attention_kernel=xla"),  # cuDNN is not installed for tests
    "llama3_70b": ("2xv5p:4x4x8",),
    "llama3_8b": ("v5p:4x4x4", "train.compiler=default"),  # large_blocks compiles three times as long: `bench llama`
    "llama3_8b_128k": ("v5p:4x4x4",),
    "moe_small": ("v5e:2x4",),
    "qwen3_0_6b": ("v6e:2x4",),
}
"""What each file of configs/ is compiled for, and overrides."""

TOYS = {"bench_small", "parity_dense", "parity_moe", "quickstart", "vit_digits"}
"""Configs made for CPUs: what they take of a chip is of no use to anyone."""


def compiled(name: str, dump: Callable[[str], object] | None = None) -> CompiledStep:
    """A case, or a config, compiled for its topology; its text goes to `dump`."""
    if name in CASES:
        on, run = CASES[name].on, replace(CASES[name].run, name=name, mesh=CASES[name].mesh)
    else:
        on, *overrides = ON[name]
        run = load(CONFIGS / f"{name}.py", overrides, root=Run).run
    return compile_step(run, parse_topology(on), dump=dump, on_progress=_silent)


def _silent(line: str) -> None:
    """Tests report nothing."""


def golden(found: CompiledStep) -> str:
    """All that is held of a small program, as text."""
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
    """What is held of a config, for one device and one step."""
    sent = {link: sum(row.bytes for row in found.traffic if row.link == link) for link in ("local", "network")}
    return {
        "memory_bytes": found.memory.total,
        "cycles": found.cycles or 0,
        "local_bytes": sent["local"],
        "network_bytes": sent["network"],
    }


def with_example(page: str, found: CompiledStep) -> str:
    """The page with the figures of a config between its marks, indented as a listing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE}: the marks are gone"
    lines = "\n".join(format_report(found, parse_topology(found.topology).chip))
    return f"{before}{BEGIN}\n\n```\n{lines}\n```\n\n{END}{after}"


def budgets() -> dict[str, dict[str, int]]:
    """The recorded budgets by the name of the config."""
    return json.loads(BUDGETS.read_text(encoding="utf-8")) if BUDGETS.exists() else {}


def overstepped(name: str, found: dict[str, int], recorded: dict[str, int]) -> list[str]:
    """A line for every figure that has moved by more than `TOLERANCE`."""
    lines = []
    for what in sorted(found.keys() | recorded.keys()):
        now, before = found.get(what, 0), recorded.get(what, 0)
        if abs(now - before) > TOLERANCE * before:
            moved = f", {now / before - 1:+.1%}" if before else ""
            lines.append(f"{name}: {what} {now:,}, recorded {before:,}{moved}")
    return lines


def write(names: list[str]) -> None:
    """Compiles what is named, or everything, and records it; of all that is gone the records go, too."""
    for name in names:
        if name not in CASES and name not in ON:
            raise SystemExit(f"{name}: no such program; there are {', '.join([*CASES, *ON])}")
    recorded = {name: figures for name, figures in budgets().items() if name in ON}
    for path in FOLDER.glob("*.txt"):
        if path.stem not in CASES:
            path.unlink()
    for name in names or [*CASES, *ON]:
        found = compiled(name)
        if name in CASES:
            (FOLDER / f"{name}.txt").write_text(golden(found), encoding="utf-8")
        else:
            recorded[name] = budget(found)
            BUDGETS.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if name == EXAMPLE:
            PAGE.write_text(with_example(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        print(name, flush=True)
