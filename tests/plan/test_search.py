"""The search for the fastest layout: what is tried, in which order, and what is left out."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from jaxinfra.config import apply
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.plan.search import Layout, Result, Sketcher, layouts, meshes, search
from jaxinfra.plan.topology import parse_topology
from jaxinfra.run import Run
from tests.golden.compiled import DENSE, MOE
from tests.golden.layouts import CASES, LAYOUTS

V5E = parse_topology("v5e:2x4")


def planned(layout: Layout, step_s: float) -> Result:
    return Result(layout=layout, plan={"estimate_s": step_s})


def out_of_memory(layout: Layout) -> Result:
    return Result(layout=layout, plan=None, error="needs 20 GiB on each device, 4 GiB more than its 16 GiB")


@pytest.mark.parametrize("run", [DENSE, MOE], ids=["dense", "moe"])
def test_every_mesh_has_all_devices(run: Run) -> None:
    found = list(meshes(run, V5E))
    assert len(set(found)) == len(found) and {mesh.resolve(8) for mesh in found} == {*found}
    assert any(mesh.expert > 1 for mesh in found) is (run is MOE)


def test_slices_are_replicas() -> None:
    found = list(meshes(DENSE, parse_topology("2xv5e:2x4")))
    assert found and all(mesh.replica % 2 == 0 for mesh in found)


def test_the_order_is_always_the_same() -> None:
    first, second = layouts(DENSE, V5E), layouts(DENSE, V5E)
    assert [each.layout for each in first] == [each.layout for each in second]
    assert len({each.layout.overrides for each in first}) == len(first) > 100
    for each in first[::25]:
        assert apply(DENSE, each.layout.overrides) == each.layout.run


def test_what_is_fixed_stays() -> None:
    run = replace(DENSE, mesh=MeshConfig(tensor=2))
    found = layouts(run, V5E, {"mesh.tensor", "mesh.fsdp", "model.remat", "train.accumulate"})
    assert {each.layout.run.mesh.tensor for each in found} == {2} and len({each.layout.run.mesh for each in found}) > 1
    assert {(each.layout.run.model, each.layout.run.train) for each in found} == {(run.model, run.train)}


def test_a_run_that_no_layout_holds() -> None:
    wide = apply(DENSE, ["model.vocab_size=134217728"])
    assert layouts(wide, V5E) == []


def test_no_layout_that_fits_is_left_out() -> None:
    """The lower bound of the memory of a layout is at most the memory that the compiler lays out for it."""
    recorded = json.loads(LAYOUTS.read_text(encoding="utf-8"))
    assert len(recorded) >= 40 and {each["case"] for each in recorded} == {*CASES}
    for each in recorded:
        run, topology = CASES[each["case"]]
        run = apply(run, each["overrides"])
        assert Sketcher(run, topology).sketch(run).least_bytes <= each["bytes"], each


def test_what_needs_more_memory_than_one_that_failed_is_not_tried() -> None:
    sketches = layouts(DENSE, V5E)
    tried: list[Layout] = []

    def compile_all(wave: Sequence[Layout]) -> list[Result]:
        tried.extend(wave)
        return [out_of_memory(layout) for layout in wave]

    results = search(sketches, compile_all, limit=12)
    by_layout = {id(each.layout): each for each in sketches}
    assert len(results) == len(tried) <= 12 and all(result.step_s == float("inf") for result in results)
    for number, layout in enumerate(tried):
        for earlier in tried[: number - number % 4]:
            if earlier.run.mesh == layout.run.mesh:
                assert by_layout[id(layout)].likely_bytes < by_layout[id(earlier)].likely_bytes


def test_the_fastest_is_first_and_a_compiler_that_aborts_is_one_of_many() -> None:
    sketches = layouts(DENSE, V5E)
    times = iter([3.0, None, 1.0, 2.0, 4.0])
    waves: list[int] = []

    def compile_all(wave: Sequence[Layout]) -> list[Result]:
        waves.append(len(wave))
        found: list[Result] = []
        for layout in wave:
            step_s = next(times)
            aborted = Result(layout=layout, plan=None, error="the compiler ended with SIGABRT")
            found.append(aborted if step_s is None else planned(layout, step_s))
        return found

    results = search(sketches, compile_all, limit=5)
    assert [result.step_s for result in results] == [1.0, 2.0, 3.0, 4.0, float("inf")]
    assert waves == [4, 1] and not results[-1].is_too_large
