"""The time of a step from its scheduled text: what overlaps, what waits, and how long transfers take."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from jaxinfra.data.tokens import TokenData
from jaxinfra.families.zoo import shape
from jaxinfra.machine.chips import CHIPS
from jaxinfra.plan.collectives import Collective, CollectiveFinder
from jaxinfra.plan.estimate import attention_work
from jaxinfra.plan.hlo import HloModule
from jaxinfra.plan.step_time import Attention, Cause, Rates, Spent, StepTimer
from jaxinfra.program import Program
from jaxinfra.run import Run, TrainConfig

V5P = CHIPS["v5p"]
RATES = Rates(compute=1.0, attention=0.5, links=1.0, host_bytes_per_s=1e9)
CLOCK = V5P.clock_hz or 0.0
MS = round(CLOCK / 1000)  # cycles
GB = 250_000_000  # elements of float32
GROUPS = "replica_groups=[1,64]<=[64], dimensions={0}"
LINKS_GB_S = 600  # six links of 100 GB/s
GATHER_MS = 1000 * 63 / 64 / LINKS_GB_S  # of one GB


def compute(name: str, ms: int, calls: str = "") -> str:
    cost = f'backend_config={{"window_config":{{"estimated_cycles":"{ms * MS}"}}}}'
    return f"%{name} = f32[8] fusion(%p), kind=kLoop{calls}, {cost}"


def timer(*lines: str, before: str = "", attention: Attention | None = None, slices: int = 1) -> StepTimer:
    body = "".join(f"  {line}\n" for line in ("%p = f32[8] parameter(0)", *lines))
    module = HloModule(
        f"HloModule jit_step, num_partitions=64\n{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}}}\n"
    )
    finder = CollectiveFinder(module, {"fsdp": 64}, None)
    coords = np.array(list(itertools.product(range(4), repeat=3)))
    return StepTimer(module, finder, V5P, coords, (True, True, True), RATES, attention, slices)


def spent(*lines: str, before: str = "", attention: Attention | None = None) -> Spent:
    return timer(*lines, before=before, attention=attention).run()


def milliseconds(parts: Mapping[Cause, float]) -> dict[str, Any]:
    return {cause: pytest.approx(1000 * seconds, abs=2e-3) for cause, seconds in parts.items()}


def test_cycles_are_time_and_matmuls_are_told_apart() -> None:
    before = "%product (a: f32[8]) -> f32[8] {\n  ROOT %dot = f32[8] convolution(%a, %a)\n}\n"
    found = spent(compute("one", 3), compute("two", 5, ", calls=%product"), before=before)
    assert milliseconds(found.work) == {"HBM": 3, "matmuls": 5} and not found.waits
    assert found.estimate_s == found.lower_s == found.upper_s == pytest.approx(0.008)


def test_a_collective_that_is_not_asynchronous_is_waited_for() -> None:
    found = spent(compute("one", 3), f"%all = f32[{GB}] all-gather(%p), {GROUPS}", compute("two", 5))
    assert milliseconds(found.waits) == {"ICI": GATHER_MS}
    assert found.estimate_s == found.upper_s == pytest.approx(0.008 + GATHER_MS / 1000, rel=1e-3)
    assert found.lower_s == pytest.approx(0.008)


@pytest.mark.parametrize(("beside_ms", "waited_ms"), [(1, GATHER_MS - 1), (5, 0)])
def test_an_asynchronous_one_hides_behind_what_is_computed_until_it_is_asked_for(
    beside_ms: int, waited_ms: float
) -> None:
    start = f"%start = (f32[8], f32[{GB}]) all-gather-start(%p), {GROUPS}"
    found = spent(start, compute("beside", beside_ms), f"%done = f32[{GB}] all-gather-done(%start)", compute("two", 2))
    assert 1000 * sum(found.waits.values()) == pytest.approx(waited_ms, abs=2e-3)
    assert milliseconds(found.work) == {"ICI": GATHER_MS, "HBM": beside_ms + 2}


@pytest.mark.parametrize(("beside_ms", "waited_ms"), [(1, 2 * GATHER_MS - 1), (9, 0)])
def test_a_collective_that_is_fused_moves_while_its_fusion_computes(beside_ms: int, waited_ms: float) -> None:
    """A sum that all devices get whole is sent twice as often as a gather."""
    reduce = f"%sum = f32[{GB}] all-reduce(%a), {GROUPS}, to_apply=%add"
    before = f"%reduced (a: f32[8]) -> f32[8] {{\n  {reduce}\n  ROOT %cast = f32[{GB}] convert(%sum)\n}}\n"
    found = spent(compute("one", beside_ms, ", calls=%reduced"), before=before)
    assert milliseconds(found.work) == {"ICI": 2 * GATHER_MS, "HBM": beside_ms}
    assert 1000 * sum(found.waits.values()) == pytest.approx(waited_ms, abs=2e-3)


def test_transfers_of_one_unit_queue() -> None:
    starts = [f"%s{n} = (f32[8], f32[{GB}]) all-gather-start(%p), {GROUPS}" for n in (1, 2)]
    dones = [f"%d{n} = f32[{GB}] all-gather-done(%s{n})" for n in (1, 2)]
    assert milliseconds(spent(*starts, compute("beside", 1), *dones).waits) == {"ICI": 2 * GATHER_MS - 1}


def test_the_body_of_a_loop_counts_as_often_as_it_runs() -> None:
    before = (
        f"%body (q: f32[8]) -> f32[8] {{\n  {compute('one', 2)}\n  %all = f32[{GB}] all-gather(%one), {GROUPS}\n}}\n"
        "%condition (q: f32[8]) -> pred[] {\n  ROOT %less = pred[] compare(%q, %q), direction=LT\n}\n"
    )
    loop = '%loop = f32[8] while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    found = spent(loop, before=before)
    assert milliseconds(found.work) == {"HBM": 14, "ICI": 7 * GATHER_MS}


def test_copies_to_and_from_the_host_have_a_link_in_each_direction() -> None:
    """Half a GB in each direction, at one GB a second."""
    half = GB // 2
    out = f"%out = ((f32[9,{half}]{{1,0:S(5)}}, f32[1,{half}]), f32[9,{half}]{{1,0:S(5)}}, u32[]) "
    lines = [
        f"%update = f32[1,{half}] bitcast(%p)",
        f"{out}dynamic-update-slice-start(%p, %update)",
        f"%back = (f32[1,{half}], f32[1,{half}]{{1,0:S(5)}}, u32[]) copy-start(%p)",
        compute("beside", 100),
        f"%got = f32[1,{half}] copy-done(%back)",
        f"%sent = f32[9,{half}]{{1,0:S(5)}} dynamic-update-slice-done(%out)",
    ]
    found = spent(*lines)
    assert milliseconds(found.work) == {"host": 1000, "HBM": 100}
    assert milliseconds(found.waits) == {"host": 400}


def test_heads_that_do_not_fill_a_matrix_unit_take_as_long_as_those_that_do() -> None:
    """Heads of 128 fill the units of v5p, and half of the rows and columns of those of v6e."""
    model = replace(shape("llama-3.1-8b"), num_layers=1)
    run = Run(name="one", model=model, data=TokenData(store="none", seq_len=8192), train=TrainConfig(global_batch=1))
    program = cast(Program, SimpleNamespace(run=run, mesh=SimpleNamespace(size=1)))
    v5p, v6e = (attention_work(program, CHIPS[name]) for name in ("v5p", "v6e"))
    assert v5p is not None and v6e is not None
    assert v5p.matmul_flops == pytest.approx(2 * 8192 * (8192 / 2 + 256) * 32 * 128, rel=1e-3)
    assert v6e.matmul_flops == 2 * v5p.matmul_flops


def test_kernels_of_attention_take_their_flops() -> None:
    """A forward kernel has two matmuls, runs twice with rematerialization; the backward kernels have four and three."""
    attention = Attention(matmul_flops=5e12, peak_flops=1e14)  # 100 ms a matmul at half of the peak
    call = 'custom-call(%p), custom_call_target="tpu_custom_call"'
    kernels = [f"%splash_mqa_{name} = f32[8] {call}" for name in ("fwd_a.1", "fwd_a.2", "dkv_b.1", "dq_b.1")]
    found = spent(*kernels, attention=attention)
    assert milliseconds(found.work) == {"attention": 2 * 200 + 400 + 300}


@pytest.mark.parametrize(
    ("kind", "size", "group", "seconds"),
    [
        ("all-gather", 6e9, range(64), 63 / 64 * 6 / 600),
        ("all-reduce", 6e9, range(64), 2 * 63 / 64 * 6 / 600),
        ("all-gather", 6e9, range(4), 3 / 4 * 6 / 200),  # a ring along z
        ("all-gather", 6e9, range(2), 1 / 2 * 6 / 100),  # two neighbors
        ("collective-permute", 6e9, range(2), 6 / 100),
        ("all-to-all", 6e9, range(4), 6 * 4 / 800),
        ("all-gather", 6e9, range(1), 0.0),
    ],
)
def test_collectives_use_the_links_of_the_dimensions_that_they_span(
    kind: str, size: float, group: range, seconds: float
) -> None:
    one = Collective(kind=kind, axes=(), link="local", loops=0, runs=1, array_bytes=(int(size),), group=tuple(group))
    assert timer().collective_s(one) == pytest.approx(seconds)


def test_between_slices_the_network_is_the_link() -> None:
    """Four slices, so that three quarters of each array are sent."""
    one = Collective(kind="all-gather", axes=(), link="network", loops=0, runs=1, array_bytes=(10**9,))
    assert timer(slices=4).collective_s(one) == pytest.approx(0.75 / 6.25)
