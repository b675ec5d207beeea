"""`plan`: time, parts and cost of a step on hardware that is absent, and published step times as an exam."""

import csv
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxinfra.cli import plan_search
from jaxinfra.cli.plan_exam import constant_tflops, order
from jaxinfra.errors import ConfigError
from jaxinfra.models.attention import Attention
from jaxinfra.models.remat import Named
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.plan.exam import Row, Unexpressed, express, read_rows
from jaxinfra.plan.search import Layout
from jaxinfra.plan.topology import parse_topology
from jaxinfra.track.formatting import format_step
from tests.refusals import raises, refused
from tests.tiny_run import Tiny, launch

pytestmark = pytest.mark.usefixtures("compile_cache", "own_cache")


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps what plans compile out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


ON = ("--on", "v5e:2x4", "mesh.fsdp=-1")
ROW = Row(
    id="one", model="tiny", topology="v5e:2x4", slices=1, seq_len=128, sequences_per_chip=1, precision="bf16",
    mesh="fsdp=8", remat="full", step_s=0.001, tflops_per_s_per_chip=1.0, split="fit",
    compiler_flags="--xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
)  # fmt: skip


@pytest.mark.slow(10)
def test_a_plan_of_two_slices_with_its_cost(tiny: Tiny, tmp_path: Path) -> None:
    chips, out = tmp_path / "chips.toml", tmp_path / "plan.json"
    chips.write_text("[v5e]\nwatts = 200\ndollars = { on_demand = 1.2, spot = 0.5 }\n", encoding="utf-8")
    words = (*ON, "--on", "v5e:2x2", "--chips", str(chips), "--json", str(out), "--tokens", "1e9", "--budget", "0.01")
    ended = tiny.launch(*words, "--deadline", "0.001d", "--chip-hours-per-loss", "1000", command="plan")
    assert ended.code == 0, ended
    first, second = json.loads(out.read_text())
    for plan in (first, second):
        assert plan["lower_s"] <= 1.000001 * plan["estimate_s"] <= 1.000002 * plan["upper_s"]
        assert sum(plan["parts"].values()) == pytest.approx(plan["estimate_s"])
        assert plan["mfu"] == pytest.approx(plan["flops"] / (plan["estimate_s"] * 197e12 * plan["devices"]))
        assert plan["cost"]["dollars"]["on_demand"] == pytest.approx(1.2 * plan["cost"]["chip_hours"])
        assert plan["cost"]["kwh"] == pytest.approx(0.2 * 1.1 * plan["cost"]["chip_hours"])
        assert plan["joules"] * plan["cost"]["steps"] * 1.1 == pytest.approx(3.6e6 * plan["cost"]["kwh"])
        assert format_step(plan["estimate_s"]) in ended.out and plan["binds"] in ended.out
    assert first["devices"] == 2 * second["devices"] == 8
    assert all(word in ended.out for word in ("too late", "too much", "goodput", "least dollars"))


@pytest.mark.slow(15)
def test_the_bubbles_of_a_pipeline_are_those_of_its_schedule(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    words = ("mesh.stage=2", "mesh.fsdp=4", "train.accumulate=2", "train.global_batch=16", "--host-mb-s", "1")
    ended = tiny.launch("--on", "v5e:2x4", *words, "--json", str(out), command="plan")
    assert ended.code == 0, ended
    (plan,) = json.loads(out.read_text())
    assert plan["bubble"] == pytest.approx(1 / 3) and sum(plan["parts"].values()) == pytest.approx(plan["estimate_s"])
    cores_s = sum(plan["work"][cause] for cause in ("matmuls", "HBM", "attention") if cause in plan["work"])
    assert plan["parts"]["pipeline bubbles"] == pytest.approx(cores_s / 3)
    assert f"{plan['checkpoint_bytes'] / plan['hosts'] / 1e6:.1f} s beside the steps" in ended.out


@pytest.mark.slow(15)
def test_a_plan_for_gpus_is_a_roofline(tiny: Tiny, tmp_path: Path) -> None:
    """Its bounds are wide."""
    out = tmp_path / "plan.json"
    words = ("--on", "h100:1x2", "mesh.fsdp=-1", "model.attention_kernel=xla", "--json", str(out))
    ended = tiny.launch(*words, command="plan")
    assert ended.code == 0, ended
    (plan,) = json.loads(out.read_text())
    assert plan["is_roofline"] and "a roofline" in ended.out
    assert plan["lower_s"] < 0.75 * plan["estimate_s"] and plan["upper_s"] > 1.4 * plan["estimate_s"]
    assert plan["work"]["matmuls"] > 0 and plan["work"]["HBM"] > 0


@pytest.mark.slow(20)
def test_a_step_that_does_not_fit_names_what_does(tmp_path: Path) -> None:
    """It is compiled, so that its memory and its time are known."""
    config, chips = tmp_path / "dense.py", tmp_path / "chips.toml"
    config.write_text("from tests.golden.compiled import DENSE\n\ndef config():\n    return DENSE\n", encoding="utf-8")
    chips.write_text("[v5e]\nhbm_gib = 0.05\n", encoding="utf-8")
    words = ("plan", str(config), "--on", "v5e:2x2", "--chips", str(chips), "mesh.fsdp=4", "train.accumulate=1")
    error = refused(
        launch(*words, "model.remat=none"), "dense v5e:2x2 needs 0.21 GiB more than its 0.05 GiB; use which takes"
    )
    fix = error.partition("; use ")[2].partition(", which")[0].split()
    ended = launch(*words[:-1], *fix)
    assert ended.code == 0, ended
    refused(launch(*words, "model.remat=none", "--as-is"), "needs 0.21 GiB use model.remat=full")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "needs hardware plan {config} --on v5p:4x4x4"),
        (("--on", "v5e:3x3"), "--on v5e:3x3 v5e:2x4"),
        (("--on", "v5e:2x4", "--tokens", "many"), "--tokens many"),
        (("--on", "v5e:2x4", "--chips", "missing.toml"), "--chips missing.toml"),
        (("--exam", "missing.csv"), "--exam missing.csv"),
        ((*ON, "--write", "best.py"), "--write best.py --search"),
        ((*ON, "--search", "--write", "{config}"), "--write {config} there"),
        ((*ON, "--search", "--on", "v5e:2x2", "--write", "best.py"), "--write best.py name one --on"),
        ((*ON, "--search", "mesh.tensor=3"), "--search v5e:2x4 mesh.tensor=3 leave"),
        ((*ON, "--deadline", "5h"), "--deadline 5h days 30d"),
        ((*ON, "--pue", "1.2"), "--pue --tokens 15e12"),
        ((*ON, "--save-s", "3"), "--save-s --chip-hours-per-loss 50000"),
        ((*ON, "--limit", "3"), "--limit --search"),
        ((*ON, "--search", "--limit", "31"), "--limit 31 30"),
        ((*ON, "--tokens", "5", "--pue", "0.5"), "--pue 0.5 at least 1"),
        ((*ON, "--budget", "5"), "--budget --tokens"),
        (("--exam", "rows.csv", "--tokens", "5"), "--exam {config}"),
        ((*ON, "--only", "a"), "--only --exam"),
        ((*ON, "--why", "mesh.tensr=2"), "--why mesh.tensr mesh.tensor"),
        ((*ON, "--search", "model.vocab_size=1073741824"), "--search v5e:2x4 state more chips"),
        (("--on", "v5e:2x4", "--devices", "cpu:8"), "--devices cpu:8 --on"),
    ],
)
def test_bad_input(tiny: Tiny, words: tuple[str, ...], named: str) -> None:
    words = tuple(word.format(config=tiny.config) for word in words)
    refused(tiny.launch(*words, command="plan"), named.format(config=tiny.config))


@pytest.mark.slow(30)
def test_a_search(tiny: Tiny, tmp_path: Path) -> None:
    """It compiles in processes of their own, takes the fastest, and writes a config that takes the same step."""
    out, best = tmp_path / "plan.json", tmp_path / "best.py"
    words = (*ON, "--search", "--limit", "2", "--jobs", "2", "--write", str(best), "--json", str(out))
    ended = tiny.launch(*words, "--why", "mesh.tensor=2", command="plan")
    assert ended.code == 0, ended
    (plan,) = json.loads(out.read_text())
    assert [layout["error"] for layout in plan["layouts"]] == ["", ""]
    times = [layout["plan"]["estimate_s"] for layout in plan["layouts"]]
    assert plan["estimate_s"] == times[0] <= times[1]
    assert " ".join(plan["layouts"][0]["overrides"]) in ended.out
    assert "mesh.tensor=2: " in ended.out and re.search(r"ms or [\d.]+% (slower|faster)", ended.out)
    written = tiny.launch("--on", "v5e:2x4", "--json", str(out), command="plan", config=best)
    assert written.code == 0, written
    assert json.loads(out.read_text())[0]["estimate_s"] == times[0]


def test_a_compiler_that_aborts_is_one_line(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(run=tiny.loaded(), topology=parse_topology("v5e:2x4"))
    options = SimpleNamespace(config=str(tiny.config), overrides=["train.steps=3"], imports=None, chips=None)
    for code, error in (
        ("import os; os.abort()", "the compiler ended with SIGABRT"),
        ("import sys; sys.exit('error: no memory')", "no memory"),
    ):
        monkeypatch.setattr(plan_search, "MAIN", code)
        found = plan_search.plan_apart(options, layout, tmp_path / "plan.json")
        assert (found.plan, found.error) == (None, error)


def write(path: Path, *rows: dict[str, object]) -> Path:
    names = [field.name for field in fields(Row)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({name: getattr(ROW, name) for name in names} | row for row in rows)
    return path


@pytest.mark.slow(10)
def test_an_exam(tmp_path: Path) -> None:
    """A row that a run stands for, and one that none does."""
    rows = write(tmp_path / "rows.csv", {}, {"id": "two", "model": "gemma9-2b", "split": "test"}, {"id": "three"})
    out = tmp_path / "exam.json"
    ended = launch("plan", "--exam", str(rows), "--only", "one", "two", "--json", str(out))
    assert ended.code == 0, ended
    one, two = json.loads(out.read_text())
    assert one["plan_s"] == one["estimate_s"] and one["error"] == pytest.approx(one["plan_s"] / 0.001 - 1)
    assert one["constant_error"] == 0 and "gemma9-2b" in two["missing"] and "plan_s" not in two
    assert all(word in ended.out for word in ("gemma9-2b", "1 of 2 rows are expressed", "mean error"))
    refused(launch("plan", "--exam", str(rows), "--only", "four"), "--only four")


def test_the_order_of_rows_of_one_model_and_chip() -> None:
    """Three of other speeds, one that is too alike, one of another chip, and one that is not expressed."""
    rows = [
        {"kind": ["tiny", chip], "chip_tokens": tokens, "published_s": 1.0, "plan_s": plan_s}
        for chip, tokens, plan_s in (("v5e", 100, 1.0), ("v5e", 200, 1.0), ("v5e", 300, 2.0), ("v5e", 101, 9.0))
    ]
    rows += [{**rows[0], "kind": ["tiny", "v6e"]}, {"kind": ["tiny", "v5e"], "chip_tokens": 1, "published_s": 1.0}]
    assert order(rows[:2]) == (1, 1) and order(rows[:3]) == (2, 3)
    assert order([rows[0], rows[3]]) == (0, 0) == order(rows[-2:])
    assert order(rows) == (4, 5)


def test_rows_are_read_or_refused(tmp_path: Path) -> None:
    (row,) = read_rows(str(write(tmp_path / "rows.csv", {"tflops_per_s_per_chip": ""})))
    assert row.tflops_per_s_per_chip is None
    assert (row.compiler, replace(row, compiler_flags="").compiler) == ("overlap", "large_blocks")
    with raises(ConfigError, "--exam line 2 fast a number"):
        read_rows(str(write(tmp_path / "rows.csv", {"step_s": "fast"})))
    with raises(ConfigError, "--exam line 2 tset fit or test"):
        read_rows(str(write(tmp_path / "rows.csv", {"split": "tset"})))
    for values in ({"step_s": 0}, {"sequences_per_chip": "inf"}, {"seq_len": -5}):
        with raises(ConfigError, f"--exam line 2 {next(iter(values))} above 0"):
            read_rows(str(write(tmp_path / "rows.csv", values)))
    file = write(tmp_path / "rows.csv", {})
    file.write_text(file.read_text().rpartition(",")[0] + "\n", encoding="utf-8")
    with raises(ConfigError, "--exam line 2 cells"):
        read_rows(str(file))
    (tmp_path / "rows.csv").write_text("id,model\n", encoding="utf-8")
    with raises(ConfigError, "--exam no column topology"):
        read_rows(str(tmp_path / "rows.csv"))
    assert constant_tflops([ROW, row, ROW]) == {"v5e": 1.0}


def test_the_row_of_the_page(repo_root: Path, tmp_path: Path) -> None:
    page = (repo_root / "docs/plan.md").read_text(encoding="utf-8")
    (tmp_path / "rows.csv").write_text(page[page.index("id,model,") :].partition("```")[0], encoding="utf-8")
    (row,) = read_rows(str(tmp_path / "rows.csv"))
    run, topology = express(row)
    assert str(topology) == "v6e:4x4" and run.train.global_batch == 48 and run.train.compiler == "large_blocks"


def test_rows_become_runs() -> None:
    variant = "llama3.1-8b variant (head_dim=256 q_heads=16 kv_heads=4)"
    custom = "custom: decoder_layer_input=offload context=device query_proj=remat"
    run, topology = express(replace(ROW, model=variant, topology="tpu7x:4x4x4", mesh="context=2 fsdp=64", remat=custom))
    assert isinstance(run.model, TransformerConfig) and str(topology) == "tpu7x:4x4x4"
    mixer = run.model.layers[0].mixer
    assert isinstance(mixer, Attention) and mixer.attention(4096)[1] == (16, 4, 256, 256)
    assert run.mesh == MeshConfig(context=2, fsdp=64) and run.train.global_batch == 64
    assert run.model.remat == Named(save=("attention_out",), offload=("layer_input",))
    run, topology = express(
        replace(ROW, model="gpt3-175b", topology="v6e:16x16", slices=2, precision="int8", mesh="fsdp=256")
    )
    assert run.mesh == MeshConfig(replica=2, fsdp=256) and run.precision.quantize == "int8"
    assert isinstance(run.model, TransformerConfig) and run.model.vocab_size % 128 == 0
    flags = {"": "large_blocks", "--xla_tpu_decompose_all_gather_einsum=true": "overlap"}
    assert {each: replace(ROW, compiler_flags=each).compiler for each in flags} == flags


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"precision": "fp8_full"}, "fp8_full"),
        ({"mesh": "fsdp=3"}, "fsdp=3 8 devices"),
        ({"mesh": "fsdp=0"}, "fsdp=0 8 devices"),
        ({"model": "llama3.1-8b variant (headdim=256)"}, "headdim head_dim"),
        ({"mesh": "pipeline=8"}, "pipeline axis"),
        ({"remat": "custom"}, "custom what is kept"),
        ({"remat": "custom: moe=device"}, "moe=device tensor"),
    ],
)
def test_what_cannot_be_expressed_says_what_is_missing(values: dict[str, Any], named: str) -> None:
    with raises(Unexpressed, named):
        express(replace(ROW, **values))
