"""`bench accelerator` on emulated devices: every part, what is not measured, and the file that is sent back."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfra.parallel.mesh_config import MeshConfig
from launch.arguments import BENCHES
from tests.bench import accelerator, accelerator_collectives, accelerator_models, accelerator_parity
from tests.bench.accelerator import PARTS, Report, measure_case, measure_part
from tests.bench.accelerator_collectives import COLLECTIVES, axes, measure
from tests.bench.accelerator_timing import Case, NotMeasuredError, Part, Setting
from tests.bench.table import TableRow
from tests.refusals import refused
from tests.tiny_run import ended, launch, start

SETTING = Setting(platform="cpu", rounds=1)


def test_command_line_lists_every_part() -> None:
    assert BENCHES["accelerator"].parts == tuple(PARTS)


def rows_of(file: Path, part: str) -> list[dict]:
    return json.loads(file.read_text())["parts"][part]["rows"]


@pytest.mark.slow(60)
def test_every_part_is_measured(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)
    monkeypatch.setattr(accelerator_collectives, "SMALL_SIZES", (2**16,))
    monkeypatch.setattr(accelerator_models, "SMALL_SHAPES", ("tiny",))
    monkeypatch.setattr(accelerator_parity, "parity_meshes", lambda count: [MeshConfig(fsdp=2)])
    out = tmp_path / "out.json"
    done = launch("bench", "accelerator", "--pairs", "1", "--json", str(out), "--folder", str(tmp_path))
    assert done.code == 0 and " 0 failed" in done.out, done
    assert "tiny sizes" in done.out and f"all is in {out}" in done.out
    found = json.loads(out.read_text())
    assert list(found["parts"]) == list(PARTS) and found["failures"] == []
    assert found["environment"]["devices"] == "8" and found["environment"]["commit"] != "None"
    assert all(row["right"] == "yes" and row["gb_per_s"] > 0 for row in rows_of(out, "collectives"))
    assert {row["devices"] for row in rows_of(out, "collectives")} == {2, 4, 8}
    kernels = {row["case"]: row for row in rows_of(out, "kernels")}
    assert "it has no soft cap" in kernels["attention, xla, soft cap"]["note"]
    measured = [row for row in kernels.values() if row["note"] is None]
    assert len(measured) >= 6 and all(row["error"] < 0.1 and row["kernel_ms"] > 0 for row in measured)
    (saved,) = rows_of(out, "save")
    assert saved["equal"] == "yes" and saved["save_gb_per_s"] > 0 and saved["restore_gb_per_s"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "what was saved is deleted"
    (parity,) = rows_of(out, "parity")
    assert parity["gradient"] <= parity["goal"] and parity["loss"] <= parity["goal"]
    (model,) = rows_of(out, "models")
    assert model["case"] == "tiny" and model["batch"] == "16 x 64" and 0 < model["mfu"] < 2


@pytest.mark.slow(30)
def test_two_processes_measure_across_them(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ("bench", "accelerator", "--only", "collectives", "--only", "save", "--pairs", "1", "--json", str(out))
    done = ended(start(*words, "--processes", "2", "--devices", "cpu:4"), timeout_s=300)
    assert done.code == 0 and done.out.count("cases measured in") == 1, done
    found = {(row["case"], row["mib"]): row for row in rows_of(out, "collectives")}
    assert found["all-reduce, across 2 processes", 1]["processes"] == 2
    assert found["all-reduce, tensor=2", 1]["processes"] == 1
    assert all(row["note"] is None and row["right"] in ("yes", None) for row in found.values())
    assert rows_of(out, "save")[0]["equal"] == "yes"


def test_wrong_arguments_are_rejected(tmp_path: Path) -> None:
    refused(launch("bench", "accelerator", "--only", "step"), "--only step environment models")
    refused(launch("bench", "accelerator", "--megabytes", "5"), "--megabytes 5")
    refused(launch("bench", "data", "--folder", str(tmp_path)), f"--folder {tmp_path}")
    refused(launch("bench", "accelerator", "--json", str(tmp_path / "none/x.json")), "none/x.json", code=82)


def refuse() -> TableRow:
    raise NotMeasuredError("there is no such unit")


def fail() -> TableRow:
    raise ValueError("two\nlines")


def test_what_is_not_measured_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(None, {})
    assert measure_case(report, "kernels", Case("a", refuse))["note"] == "not measured: there is no such unit"
    assert report.failures == []
    row = measure_case(report, "kernels", Case("b", fail))
    assert row == {"case": "b", "note": "not measured: it failed: ValueError: two lines"}
    (failure,) = report.failures
    assert failure["case"] == "b" and 'raise ValueError("two' in failure["traceback"]
    assert failure["traceback"] in capsys.readouterr().err


def test_a_part_ends_with_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first case is always measured; the file has all rows so far after each."""
    file, now = tmp_path / "out.json", [0.0]
    monkeypatch.setattr(accelerator.time, "perf_counter", lambda: now[0])

    def slow() -> TableRow:
        now[0] += 6
        return {"value": "measured"}

    def cases(setting: Setting) -> Iterator[Case]:
        for name in "abc":
            yield Case(name, slow)
            written = rows_of(file, "environment")
            assert written[-1]["case"] == name

    monkeypatch.setattr(accelerator, "PARTS", {"environment": Part({"value": ("value", "")}, 15, cases)})
    measure_part(Report(str(file), {}), "environment", SETTING, shows=False)
    assert [row.get("value") for row in rows_of(file, "environment")] == ["measured", "measured", None]
    needed = "may take 6 s, and 3 s are left of the part's 15 s"
    assert rows_of(file, "environment")[-1]["note"] == f"not measured: {needed}"


def test_a_wrong_collective_is_seen() -> None:
    axis = next(axes())
    wrong = COLLECTIVES["all-reduce"]._replace(apply=jax.lax.pmax)
    assert measure(SETTING, axis, COLLECTIVES["all-reduce"], 2**16)["right"] == "yes"
    assert measure(SETTING, axis, wrong, 2**16)["right"] == "NO"


def test_expected_all_to_all() -> None:
    """Of two devices with [0, 1] and [2, 3], each sends its second half to the other."""
    assert COLLECTIVES["all-to-all"].expected(np.arange(4), 2).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("memory_gib", "largest"),
    [(8, "gpt2-medium"), (16, "qwen3-0.6b"), (32, "llama-3.2-1b"), (80, "llama-3.2-3b"), (192, "llama-3.1-8b")],
)
def test_models_fit_one_device(memory_gib: int, largest: str) -> None:
    chosen = accelerator_models.chosen_shapes(memory_gib * 2**30)
    assert chosen[0] == "gpt2" and chosen[-1] == largest
    assert len(chosen) == (2 if memory_gib == 8 else 3)


@pytest.mark.parametrize(("devices", "meshes"), [(1, 0), (4, 6), (8, 6), (32, 6)])
def test_every_axis_is_compared(devices: int, meshes: int) -> None:
    found = accelerator_parity.parity_meshes(devices)
    assert len({mesh.sizes for mesh in found}) == len(found) == meshes
    assert all(np.prod(mesh.sizes) == devices for mesh in found)
