"""Golden figures of programs compiled ahead of time: small programs exactly, configs as budgets.

The golden file of a small program in `compile/` has its memory and its collectives. `compile/budgets.json` has memory,
cycles and bytes sent of every config, which may change by `TOLERANCE`. `compile/programs.json` has the `fingerprint` of
each program: one that has not changed since it was recorded need not be compiled again. `python tests/golden/write.py
compile` writes all three.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import jax

from jaxinfra.cli.compile import format_report
from jaxinfra.config import load
from jaxinfra.data.tokens import TokenData
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.plan.aot import CompiledStep, compile_step, program_on
from jaxinfra.plan.collectives import ALL_REDUCE_SLICE, KINDS
from jaxinfra.plan.compiled_cache import key
from jaxinfra.plan.topology import Topology, parse_topology
from jaxinfra.run import Run, TrainConfig
from tests.decoders import changed, decoder

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
FOLDER = Path(__file__).resolve().parent / "compile"
BUDGETS, PROGRAMS = FOLDER / "budgets.json", FOLDER / "programs.json"
READERS = CONFIGS.parent / "jaxinfra" / "plan"
"""The code that reads figures from compiled programs."""
ESTIMATES = ("compiled_cache.py", "cost.py", "estimate.py", "exam.py", "roofline.py", "search.py", "step_time.py")
"""The files there that only estimate time and cost from these figures, or keep them."""
TOLERANCE = 0.01

LONG_CONTEXT = "llama3_8b_128k"
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


EXPERTS = MixtureOfExperts(dim=256, num_experts=8, top_k=2)
MOE = replace(DENSE, name="moe", model=changed(DENSE.model, mlp=EXPERTS))
MOE_ON_GPUS = replace(  # tests have no cuDNN
    MOE, model=replace(changed(MOE.model, mlp=replace(EXPERTS, num_experts=16)), attention_kernel="xla")
)


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
    "h100-2x8_expert": Case(topology="h100:2x8", mesh=MeshConfig(fsdp=2, expert=8), run=_batch(64, 1, MOE_ON_GPUS)),
}
"""Named TOPOLOGY_AXES; together they have every mesh axis, every collective, and links inside and between slices."""

TOPOLOGIES = {
    "dpo": ("v5e:2x4",),
    "gemma2_2b": ("v6e:4x4",),
    "gpt2_124m": ("h100:1x8", "model.attention_kernel=xla"),  # tests have no cuDNN
    "llama3_70b": ("2xv5p:4x4x8",),
    "llama3_8b": ("v5p:4x4x4", "train.compiler=default"),  # overlap takes three times as long to compile
    "llama3_8b_128k": ("v5p:4x4x4",),
    # Without cuDNN attention makes whole matrices, so the sequences are short.
    "llama3_8b_h100": ("h100", "model.attention_kernel=xla", "data.seq_len=1024", "train.compiler=default"),
    "lora": ("v5e:2x4",),
    "lora@h100": ("h100:1x1", "mesh.fsdp=1", "model.attention_kernel=xla", "data.seq_len=1024"),
    "moe_small": ("v5e:2x4",),
    "qlora_70b": ("v5e:2x4",),
    "qwen3_0_6b": ("v6e:2x4",),
    "sft": ("v5e:2x4",),
}
"""Topology of each config in configs/, and overrides; "CONFIG@NAME" is a further topology."""

CPU_CONFIGS = {"bench_small", "flax_module", "parity_dense", "parity_moe", "quickstart", "vit_digits"}
"""Configs made for CPUs, which have no budget."""


def run_on(name: str) -> tuple[Run, Topology]:
    """Returns the run of a case or a config, and its topology."""
    if name in CASES:
        case = CASES[name]
        return replace(case.run, name=name, mesh=case.mesh), parse_topology(case.topology)
    on, *overrides = TOPOLOGIES[name]
    return load(CONFIGS / f"{name.partition('@')[0]}.py", overrides, root=Run).run, parse_topology(on)


def compiled(name: str) -> CompiledStep:
    """Compiles a case or a config for its topology, and checks what must hold whatever is recorded."""
    texts: list[str] = []
    run, topology = run_on(name)
    found = compile_step(run, topology, dump=texts.append)
    assert found.memory.total <= topology.chip.hbm_bytes
    assert not found.unknown_loops
    if name in CASES and topology.slices > 1:
        assert_gradients_cross_slices_once(found)
    if name in CASES and found.mesh.keys() == {"fsdp"}:
        assert_weights_are_gathered_twice(found)
    if name == LONG_CONTEXT:
        assert_no_attention_matrix(texts[0], found)
    return found


def assert_weights_are_gathered_twice(found: CompiledStep) -> None:
    """Weights are gathered in bfloat16 for the forward and the backward pass; gradients are scattered once."""
    model = DENSE.model
    per_layer = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.layers[0].mlp.dim
    moved = {
        kind: sum(row.bytes for row in found.traffic if row.loops and row.kind == kind)
        for kind in (*KINDS, ALL_REDUCE_SLICE)
    }
    assert moved["all-gather"] == 2 * 2 * model.num_layers * per_layer
    assert moved["reduce-scatter"] + moved[ALL_REDUCE_SLICE] == 2 * model.num_layers * per_layer


def assert_gradients_cross_slices_once(found: CompiledStep) -> None:
    """Only float32 gradients and sums of the loss cross slices, once per step and outside all loops."""
    far = [row for row in found.traffic if row.link == "network"]
    assert {(row.kind, row.axes, row.loops) for row in far} == {("all-reduce", ("replica",), 0)}
    assert all(row.runs == row.arrays for row in far)
    params_bytes = found.memory.output / 3  # AdamW has two moments of the same size
    assert abs(sum(row.bytes for row in far) - params_bytes) < 0.02 * params_bytes


def assert_no_attention_matrix(text: str, found: CompiledStep) -> None:
    """Attention scores stay inside kernels; weights are all-gathered, not all-reduced from zero-padded shards."""
    run, _ = run_on(LONG_CONTEXT)
    block = run.data.units_per_sample // (2 * run.mesh.context)
    shapes = set(re.findall(r"\w+\[([\d,]+)\]", text))
    assert shapes
    assert not [shape for shape in shapes if sum(int(size) >= block for size in shape.split(",")) > 1]
    kernels = {kernel.name.partition("_segmented")[0] for kernel in found.kernels}
    assert kernels == {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"}
    assert not [row for row in found.traffic if row.kind == "all-reduce" and row.bytes > 2**20]


def fingerprint(run: Run, topology: Topology, recorded: str) -> str:
    """A hash of what was recorded and of all that it depends on: the program, the compilers, and what reads them."""
    program = program_on(run, topology)
    with no_source_lines():
        parts = [key(program.lower(), program, topology), recorded]
    parts += [path.read_text(encoding="utf-8") for path in sorted(READERS.glob("*.py")) if path.name not in ESTIMATES]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@contextmanager
def no_source_lines() -> Iterator[None]:
    """Leaves out of lowered programs from which line of which file each operation comes."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def recorded_text(name: str) -> str:
    """Everything that is recorded of a program, empty if nothing is."""
    if name in CASES:
        path = FOLDER / f"{name}.txt"
        return path.read_text(encoding="utf-8") if path.exists() else ""
    page = PAGE.read_text(encoding="utf-8") if name == EXAMPLE else ""
    return json.dumps(budgets().get(name, {}), sort_keys=True) + page.partition(BEGIN)[2].partition(END)[0]


def is_as_recorded(name: str) -> bool:
    """Returns whether the program is the recorded one, and so its figures are."""
    return fingerprint(*run_on(name), recorded_text(name)) == programs().get(name)


def programs() -> dict[str, str]:
    """Reads the recorded fingerprints by name."""
    return json.loads(PROGRAMS.read_text(encoding="utf-8")) if PROGRAMS.exists() else {}


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
    for path in FOLDER.glob("*.txt"):
        if path.stem not in CASES:
            path.unlink()
    for name in names or [*CASES, *TOPOLOGIES]:
        found = compiled(name)
        if name in CASES:
            (FOLDER / f"{name}.txt").write_text(golden_text(found), encoding="utf-8")
        else:
            write_json(BUDGETS, {n: of for n, of in budgets().items() if n in TOPOLOGIES} | {name: budget(found)})
        if name == EXAMPLE:
            PAGE.write_text(insert_example(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        of = {n: recorded for n, recorded in programs().items() if n in CASES or n in TOPOLOGIES}
        write_json(PROGRAMS, of | {name: fingerprint(*run_on(name), recorded_text(name))})
        print(name, flush=True)


def write_json(path: Path, content: object) -> None:
    """Writes a record so that a change is a short diff."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
