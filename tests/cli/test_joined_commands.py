"""Commands besides `train` in several processes give the numbers of one; the other commands refuse the options."""

import json
import re
from pathlib import Path

import pytest

from jaxinfra.cli import processes
from jaxinfra.cli.arguments import COMMANDS
from jaxinfra.parity import PARITY_CONFIGS
from jaxinfra.track.jsonl import read_metrics
from tests.refusals import names, refused
from tests.servers.fixtures import Server
from tests.several import all_ended, several
from tests.tiny_run import Tiny, contents, ended, launch, start, summary

JOINING = {"train", "doctor", "sample", "evaluate", "hub export", "model promote", "parity", "bench"}
MESH = ("mesh.fsdp=2", "mesh.tensor=2")


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run that keeps averaged parameters, trained with fsdp=8."""
    folder = tmp_path_factory.mktemp("trained")
    words = (f"root={folder}", "name=run", "optim.ema_decay=0.5", "track.console=off", "checkpoint.save_every=6")
    assert launch(str(tiny_data / "tiny.py"), *words).code == 0
    return folder / "run"


GLOO = {"[Gloo]", "Rank", "is", "connected", "to", "peer", "ranks", "ranks.", "Expected", "number", "of", ":"}


def without_gloo(printed: str) -> str:
    """Returns what a process printed, without the lines in which gloo says whom it is connected to.

    Its threads write them in parts, at the same time.
    """
    lines = printed.splitlines(keepends=True)
    return "".join(line for line in lines if any(word not in GLOO and not word.isdigit() for word in line.split()))


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - JOINING))
def test_commands_of_one_process_refuse_the_options(command: str) -> None:
    shown = launch(*command.split(), "--help").out
    assert not any(option in shown for option in ("--processes", "--coordinator", "--process-id"))


def test_evaluate_gives_what_training_logged(trained: Path, tmp_path: Path) -> None:
    """It evaluates the newest checkpoint on another mesh, and only reads the run."""
    before, file = contents(trained), tmp_path / "found.json"
    done = launch("evaluate", str(trained), *MESH, "mesh.replica=2", "--json", str(file))
    assert (done.code, done.err) == (0, ""), done
    found = json.loads(file.read_text())
    assert found["validation"] == pytest.approx(summary(trained)["validation"], rel=1e-6)
    assert (found["step"], found["devices"], found["mesh"]["tensor"], found["baselines"]) == (12, 8, 2, {})
    assert f"step 12: {found['samples']} validation samples" in done.out
    assert f"{found['validation']['bits_per_byte']:.4f}" in done.out
    assert contents(trained) == before


def test_evaluate_another_step_on_fewer_samples(trained: Path, tmp_path: Path) -> None:
    logged = {row["step"]: row["eval/loss"] for row in read_metrics(trained / "metrics.jsonl") if "eval/loss" in row}
    assert set(logged) == {5, 10, 12}
    losses = []
    for words in (("@6",), ("@12",), ("@6", "train.eval_samples=3")):
        file = tmp_path / "found.json"
        done = launch("evaluate", f"{trained}{words[0]}", *words[1:], "--json", str(file))
        assert done.code == 0, done
        losses.append(json.loads(file.read_text())["validation"]["loss"])
    assert losses[1] == pytest.approx(logged[12], rel=1e-6) and logged[10] < losses[0] < logged[5]
    assert losses[2] not in losses[:2] and "3 validation samples" in done.out


def test_evaluate_writes_into_a_bucket(trained: Path, s3: Server) -> None:
    url = f"{s3.new_url()}/found.json"
    done = launch("evaluate", f"{trained}@6", "train.eval_samples=3", "--json", url)
    assert done.code == 0, done
    assert json.loads(s3.get(url))["step"] == 6


@pytest.mark.parametrize(
    ("words", "named", "code"),
    [
        (("{tmp}/none",), "{tmp}/none run.json", 81),
        (("{tmp}/none", "--processes", "2"), "{tmp}/none run.json", 81),
        (("{run}@7",), "{run}/checkpoints 7 6, 12", 79),
        (("{run}", "model.hidden_size=64"), "float32[2,64,8,8] float32[2,32,8,4]", 81),
        (("{run}", "mesh.tensor=3"), "mesh.tensor=3 8", 81),
        (("{run}", "train.global_batch=12"), "train.global_batch=12 mesh.fsdp=8 train.global_batch=16", 81),
        (("{run}", "--json", "{tmp}/none/x.json"), "{tmp}/none/x.json", 82),
    ],
    ids=str,
)
def test_evaluate_refuses(words: tuple[str, ...], named: str, code: int, trained: Path, tmp_path: Path) -> None:
    paths = {"tmp": tmp_path, "run": trained}
    refused(launch("evaluate", *(word.format(**paths) for word in words)), named.format(**paths), code=code)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow(20)
def test_evaluate_in_processes(trained: Path, tmp_path: Path) -> None:
    """Two processes with two devices each, started by hand, give what training logged; only the first one prints."""
    file = tmp_path / "found.json"
    with several("evaluate", str(trained), *MESH, "--json", str(file)) as children:
        first, second = all_ended(children)
    assert (first.code, second.code, without_gloo(second.out)) == (0, 0, ""), (first, second)
    found = json.loads(file.read_text())
    assert found["processes"] == 2 and f"{found['samples']} validation samples" in first.out
    assert found["validation"] == pytest.approx(summary(trained)["validation"], rel=1e-6)


@pytest.mark.slow(15)
def test_sample_in_processes(trained: Path) -> None:
    words = ("sample", str(trained), "w1 w7 w50", "--max-tokens", "8", "--seed", "3")
    done = ended(start(*words, "--processes", "2", "--devices", "cpu:2"))
    assert (done.code, done.err, done.out) == (0, "", launch(*words).out), done
    assert done.out.strip() in (trained / "logs/rank-0.log").read_text()


@pytest.mark.slow(20)
def test_evaluate_in_processes_that_differ(trained: Path) -> None:
    with several("evaluate", str(trained), "train.eval_samples=3", indices=[0]) as (first,):
        where = first.args[first.args.index("--coordinator") :]
        second = start("evaluate", str(trained), *where[:-1], "1")
        for each in ended(first), ended(second):
            assert each.code == 81
            names(each.err.splitlines()[-1], "process 1 train.eval_samples 3")


@pytest.mark.slow(40)
def test_parity_in_processes(repo_root: Path) -> None:
    """Joined processes compare the meshes of all their devices with one device."""
    words = ("parity", PARITY_CONFIGS[0], "model.num_layers=1", "train.global_batch=8", "mesh.tensor=2")
    done = ended(start(*words, "--processes", "2", "--devices", "cpu:2"), timeout_s=600)
    assert done.code == 0 and "1 rows, 1 meshes, 0 beyond 2e-05" in done.err, done
    assert "tensor=2" in done.out and len(done.out.splitlines()) == 1


TINY = (
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.layers.mixer.num_heads=2",
    "model.layers.mlp.dim=64",
    "data.seq_len=16",
)


@pytest.mark.slow(20)
def test_bench_step_in_processes(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    words = ("bench", "step", *TINY, "--only", "float32", "--pairs", "2", "--json", str(file))
    done = ended(start(*words, "--processes", "2", "--devices", "cpu:2"))
    assert done.code == 0, done
    (row,) = json.loads(file.read_text())["rows"]
    assert row["case"] == "step, float32, fsdp=2, 2 processes" and done.out.count(row["case"]) == 1


@pytest.mark.parametrize("name", ["data", "slices"])
def test_bench_refuses_processes_before_it_starts_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "launch", None)
    refused(launch("bench", name, "--processes", "2"), f"bench {name} 2 --processes")


@pytest.mark.slow(15)
def test_bench_step_refuses_a_part_in_processes() -> None:
    done = ended(start("bench", "step", "--only", "start", "--processes", "2"))
    assert done.code == 81
    (line,) = (line for line in done.err.splitlines() if re.match(r"(\[\d\] )?error: ", line))
    names(line, "--only start float32")


@pytest.mark.slow(15)
def test_more_processes_than_rows(tiny: Tiny) -> None:
    words = (str(tiny.config), "train.global_batch=1", "--devices", "cpu:2", "--processes", "2")
    done = ended(start(*words))
    assert done.code == 81
    (line,) = (line for line in done.err.splitlines() if "error: " in line)
    names(line, "train.global_batch=1 mesh.fsdp=2 train.global_batch=2")
    assert not (tiny.runs / "tiny/run.json").exists()
    # Rows may have fewer shards than processes: two processes share the rows of a tensor axis.
    shared = ended(start(*words, "mesh.tensor=2", "train.steps=3", "name=shared"))
    assert shared.code == 0, shared


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--of", "0"), "--of 0: 1"),
        (("--of", "2"), "--of 2 --coordinator --process-id"),
        (("--of", "2", "--process-id", "2", "--coordinator", "127.0.0.1"), "--process-id 2 of 2"),
        (("--process-id", "-1"), "--process-id -1: 0"),
    ],
    ids=str,
)
def test_a_wrong_number_of_processes(words: tuple[str, ...], named: str, trained: Path) -> None:
    for command in (("evaluate", str(trained)), ("sample", str(trained), "w1"), ("parity",), ("bench", "step")):
        refused(launch(*command, *words), named)
