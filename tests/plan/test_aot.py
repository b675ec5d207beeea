import difflib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.config import load
from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from jaxinfra.plan.aot import compile_step, no_compilation_cache
from jaxinfra.plan.topology import parse_topology, set_up_compiler, topology_devices
from jaxinfra.run import Run
from jaxinfra.run.compiler_options import OPTION_SETS, OptionSet, compiler_options
from tests.decoders import changed
from tests.golden import compiled as golden
from tests.golden.compiled import (
    CASES,
    CONFIGS,
    CPU_CONFIGS,
    DENSE,
    EXAMPLE,
    FOLDER,
    PAGE,
    TOPOLOGIES,
    budget,
    budgets,
    compiled,
    fingerprint,
    golden_text,
    insert_example,
    is_as_recorded,
    over_budget,
    programs,
    recorded_text,
)
from tests.golden.proofs import compiled_once
from tests.refusals import raises

HINT = "if this is intended, run `python tests/golden/write.py compile {}` and commit what it writes"


@pytest.mark.slow(5)
@pytest.mark.parametrize("name", CASES)
def test_small_program_equals_its_golden_file(name: str) -> None:
    if is_as_recorded(name):
        return
    expected, actual = recorded_text(name), golden_text(compiled(name))
    if actual != expected:
        changes = difflib.unified_diff(expected.splitlines(), actual.splitlines(), "golden", "now", "", "", 3, "")
        pytest.fail(f"{name}: {HINT.format(name)}:\n" + "\n".join(changes), pytrace=False)


@pytest.mark.slow(5)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_config_stays_within_its_budget(name: str) -> None:
    if is_as_recorded(name):
        return
    found = compiled(name)
    over = over_budget(name, budget(found), budgets().get(name, {}))
    if over:
        pytest.fail(f"configs/{name}.py on {found.topology}: {HINT.format(name)}:\n" + "\n".join(over), pytrace=False)
    if name == EXAMPLE:
        page = PAGE.read_text(encoding="utf-8")
        assert page == insert_example(page, found), HINT.format(name)


def test_what_changes_figures_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise a program would not be compiled again though its figures may be others."""
    topology = parse_topology(TPU)
    known = fingerprint(SMALL, topology, "recorded")
    assert fingerprint(SMALL, topology, "recorded") == known
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert fingerprint(SMALL, topology, "recorded") == known
    others = [
        fingerprint(replace(SMALL, train=replace(SMALL.train, compiler="large_blocks")), topology, "recorded"),
        fingerprint(replace(SMALL, model=changed(SMALL.model, mlp_activation="gelu")), topology, "recorded"),
        fingerprint(SMALL, parse_topology("v5e:2x2"), "recorded"),
        fingerprint(SMALL, topology, "edited by hand"),
    ]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=1024")
    others.append(fingerprint(SMALL, topology, "recorded"))
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    monkeypatch.setattr(golden, "READERS", tmp_path)
    others.append(fingerprint(SMALL, topology, "recorded"))
    assert len({known, *others}) == 1 + len(others)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8, context=8), MeshConfig(fsdp=32, context=2)], ids=str)
def test_two_axes_are_gathered_by_one_all_gather(mesh: MeshConfig) -> None:
    pod = parse_topology("v5p:4x4x4")
    set_up_compiler(pod)
    with jax.set_mesh(placed := make_mesh(mesh, topology_devices(pod))):
        stored = NamedSharding(placed, PartitionSpec(("fsdp", "context"), None))
        gather = jax.jit(lambda w: jax.reshard(w, PartitionSpec(None, None)))
        with no_compilation_cache():
            text = gather.lower(jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=stored)).compile().as_text()
    assert text is not None and " all-gather(" in text
    assert " all-reduce(" not in text


def test_frozen_weights_of_16_bits_do_not_fit_where_those_of_4_bits_do() -> None:
    """Which is refused before anything is compiled; the memory with 4 bits is recorded."""
    run = load(CONFIGS / "qlora_70b.py", ["precision.frozen=bfloat16"], root=Run).run
    with raises(ConfigError, "qlora-70b v5e:2x4 GiB train state 16.00 GiB"):
        compile_step(run, parse_topology("v5e:2x4"))


def test_every_config_has_a_topology() -> None:
    configs = {path.stem for path in CONFIGS.glob("*.py")}
    assert {name.partition("@")[0] for name in TOPOLOGIES} | CPU_CONFIGS == configs, (
        "give every file of configs/ a topology in tests/golden/compiled.py"
    )
    assert set(budgets()) == set(TOPOLOGIES), HINT.format("")
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES), HINT.format("")
    assert set(programs()) == {*CASES, *TOPOLOGIES}, HINT.format("")


def test_every_axis_is_in_a_golden_case() -> None:
    sizes = [case.mesh.sizes for case in CASES.values()]
    used = {name for name, of_cases in zip(AXES, zip(*sizes, strict=True), strict=True) if max(of_cases) > 1}
    assert used == set(AXES)
    for case in CASES.values():
        assert math.prod(case.mesh.sizes) == parse_topology(case.topology).num_devices


def test_figure_may_change_within_tolerance() -> None:
    recorded = {"cycles": 1000, "network_bytes": 0}
    assert over_budget("a", {"cycles": 1010, "network_bytes": 0}, recorded) == []
    assert over_budget("a", {"cycles": 985, "network_bytes": 4}, recorded) == [
        "a: cycles 985, recorded 1,000, -1.5%",
        "a: network_bytes 4, recorded 0",
    ]


TPU = "v6e:2x2"
SMALL = replace(
    DENSE,
    model=replace(DENSE.model, num_layers=2, attention_kernel="xla"),
    mesh=replace(DENSE.mesh, fsdp=4),
    train=replace(DENSE.train, global_batch=4, accumulate=1),
)


def test_option_set_type_lists_all_sets() -> None:
    assert set(OPTION_SETS) == set(get_args(OptionSet.__value__))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, of in OPTION_SETS.items() if "tpu" in of and name != "default"])
def test_tpu_compiler_accepts_option_set(name: OptionSet) -> None:
    """With `overlap` sparse cores gather the weights, which are large enough for it."""
    texts: list[str] = []
    run = replace(SMALL, train=replace(SMALL.train, compiler=name))
    assert compile_step(run, parse_topology(TPU), dump=texts.append).traffic
    gathers = re.findall(r'all-gather\S*call-start = .*async_execution_thread="sparsecore"', texts[0])
    assert bool(gathers) is (name == "overlap")


H100 = parse_topology("h100:1x4")
PLAIN, OVERLAP = (replace(SMALL, train=replace(SMALL.train, compiler=name)) for name in ("default", "overlap"))


@pytest.mark.slow(40)
@compiled_once((PLAIN, H100), (OVERLAP, H100))
def test_gpu_compiler_applies_option_set() -> None:
    """The loop is unrolled by two layers, so the HLO has more collectives."""
    plain, chosen = (compile_step(run, H100) for run in (PLAIN, OVERLAP))
    assert sum(row.arrays for row in chosen.traffic) > sum(row.arrays for row in plain.traffic)


def test_option_set_of_another_platform_is_an_error() -> None:
    with raises(ConfigError, "train.compiler=large_blocks: tpu gpu; use train.compiler=overlap"):
        compiler_options("large_blocks", "gpu")
    assert compiler_options("large_blocks", "cpu") == {}
