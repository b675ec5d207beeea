"""The commands that answer at once: explain, models, runs, --version, and what they say in a pipe."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfra.cli.main import main
from jaxinfra.errors import ConfigError
from jaxinfra.families.catalog import catalog
from jaxinfra.storage.lease import hold
from jaxinfra.track.runs import list_runs
from tests.refusals import names, refused
from tests.tiny_run import Tiny, launch


@pytest.mark.parametrize(
    "command",
    [
        ["explain"],
        ["explain", "optim.peak_lr"],
        ["explain", "lr"],
        ["explain", "source.pattern"],
        ["models"],
        ["runs", "."],
        ["report", "."],
        ["goodput", "."],
        ["--version"],
    ],
)
def test_it_answers_without_importing_jax(command: list[str], tmp_path: Path, repo_root: Path) -> None:
    """The import alone takes longer than such a command may."""
    code = "import sys\nfrom jaxinfra.cli.main import main\n"
    code += f"try: main({command!r})\nexcept SystemExit: pass\nassert 'jax' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_goodput_refuses_what_has_no_ledger_and_what_is_no_time(tmp_path: Path) -> None:
    refused(launch("goodput", str(tmp_path)), "goodput.jsonl")
    for time in "soon", "-3h", "inf":
        refused(launch("goodput", str(tmp_path), f"--mtbf={time}"), "--mtbf 3.1h")


def test_explain_shows_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "lr"]) == 0
    printed = capsys.readouterr().out
    assert "optim.peak_lr = 0.0003" in printed and "float above 0" in printed and "highest learning rate" in printed
    refused(launch("explain", "optim.shedule"), "optim.shedule optim.schedule")


@pytest.mark.parametrize(("field", "named"), [("root", "another"), ("init", "may not"), ("mesh.fsdp", "may change")])
def test_explain_says_what_a_resume_may_change(field: str, named: str) -> None:
    (line,) = (line for line in launch("explain", field).out.splitlines() if line.startswith("  resume"))
    names(line, named)


def test_explain_names_the_option_of_a_command() -> None:
    options = ["devices", "processes", "coordinator", "process-id", "of", "join-timeout", "heartbeat-timeout"]
    options += ["supervise", "max-restarts-per-hour", "accept-change"]
    owners = dict.fromkeys(options, "train") | {"min-p": "sample", "max-shard-size": "hub export"}
    for option, command in owners.items():
        assert f"--{option} " in launch(*command.split(), "--help").out
        refused(launch("explain", option.replace("-", "_")), f"--{option} {command} --help")


def test_explain_says_what_there_is_in_place_of_other_frameworks_methods() -> None:
    refused(launch("explain", "grpo"), "grpo objective=dpo")
    assert launch("explain", "dpo").out.startswith("objective = ")
    assert launch("explain", "LoRA").out.startswith("adapter = ")
    assert "?" not in refused(launch("explain", "lorb"), "lorb optim"), "nothing is like it"


def test_outside_of_the_environment_one_line_says_how_to_enter_it(repo_root: Path) -> None:
    command = [sys.executable, "-S", "-m", "launch", "runs"]  # without site-packages
    ended = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert ended.returncode == ConfigError.exit_code and ended.stdout == ""
    names(ended.stderr.removesuffix("\n"), "error: .venv/bin/activate quickstart 3.12")


def test_sigterm_ends_a_command_that_only_computes_as_the_page_says(repo_root: Path) -> None:
    code = "import os, signal\nimport jaxinfra.cli.runs as command\nfrom jaxinfra.cli.entry import main\n"
    code += "command.run = lambda options: os.kill(os.getpid(), signal.SIGTERM)\nmain()"
    ended = subprocess.run([sys.executable, "-c", code, "runs"], cwd=repo_root, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGTERM and not ended.stderr
    assert f"a shell shows {128 + signal.SIGTERM}." in (repo_root / "docs" / "exit-codes.md").read_text()


def test_jax_starts_quietly_in_a_script(repo_root: Path) -> None:
    """Although libtpu or a CUDA plugin is installed, as the extra compile does, and their hardware is missing."""
    code = "from jaxinfra.processes.devices import all_devices; print(len(all_devices()))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment["PYTHONPATH"] = str(repo_root)
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stderr == "" and int(ended.stdout) >= 1


def test_explain_knows_the_fields_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tokenizer.vocab_size"]) == 0
    assert "tokenizer.vocab_size = 8192" in capsys.readouterr().out
    assert main(["explain"]) == 0
    listed = capsys.readouterr().out
    assert "tokenizer = train_bpe" in listed and "classes = ()" in listed


def test_models_shows_those_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "qwen3-0.6"]) == 0
    printed = capsys.readouterr().out
    assert "596 M" in printed and "llama" not in printed
    refused(launch("models", "gpt5"), "gpt5 models")


def test_an_expert_model_has_fewer_active_parameters() -> None:
    sizes = {entry.name: entry for entry in catalog()}
    assert (
        round(sizes["qwen3-30b-a3b"].active_parameters / 1e9, 1) == 3.4
    )  # 3.3 in its card, which counts one embedding
    assert sizes["llama-3.1-8b"].active_parameters == sizes["llama-3.1-8b"].parameters


def test_runs_shows_the_state_of_each(begun: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = list_runs(begun.runs)
    rows = [json.loads(line) for line in Path(run.path, "metrics.jsonl").read_text().splitlines()]
    assert run.completed_steps == run.total_steps == rows[-1]["step"]
    assert run.loss == [row["loss"] for row in rows if "loss" in row][-1]
    assert run.best_validation == min(row["eval/loss"] for row in rows if "eval/loss" in row)
    assert run.state == "finished"
    directory = Path(run.path)
    with hold(directory):
        assert list_runs(begun.runs)[0].state == "running"
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss": 1.0}\n{"step": 100, "lo')
    assert list_runs(begun.runs)[0].state == "interrupted"
    (directory / "summary.json").write_text('{"status": "failed", "error": "step 99: loss is nan"}')
    assert list_runs(begun.runs)[0].state == "failed"
    shutil.rmtree(directory / "lease")
    (directory / "lease").touch()
    assert list_runs(begun.runs)[0].state.startswith("damaged: "), "one such run does not hide the others"
    (directory / "lease").unlink()
    (directory / "run.json").write_text("{")
    assert list_runs(begun.runs)[0].state.startswith("damaged: ")
    assert main(["runs", str(begun.runs)]) == 0
    assert "damaged" in capsys.readouterr().out


def test_runs_shows_the_goodput_over_all_starts(begun: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path(list_runs(begun.runs)[0].path)
    (directory / "goodput.jsonl").unlink()
    assert list_runs(begun.runs)[0].goodput is None
    row = {"phase": "step", "saves": 0, "resumes": 1}
    seconds = {"init": 10.0, "step": 80.0}
    rows = [
        row | {"attempt": 1, "start": 1e9, "t": 90.0, "step": 20, "from": 0, "seconds": seconds},
        row | {"attempt": 2, "start": 1e9 + 110, "t": 90.0, "step": 30, "from": 10, "seconds": seconds},
    ]
    (directory / "goodput.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert list_runs(begun.runs)[0].goodput == pytest.approx((80 / 2 + 80) / 200)  # steps 11 to 20 were lost
    assert main(["runs", str(begun.runs)]) == 0
    assert "60%" in capsys.readouterr().out


def test_runs_shows_what_differs_between_runs_of_one_config(tmp_path: Path) -> None:
    """Also inside of tuples, and one line for each run in a pipe; what is damaged has its line below."""
    for name, peak_lr, window in (("base", 0.01, None), ("fast", 0.003, None), ("long-name-of-a-run", 0.01, 64)):
        layers = [{"mixer": {"kind": "attention", "window": window}}]
        config = {"name": name, "optim": {"peak_lr": peak_lr}, "model": {"layers": layers}}
        (tmp_path / name).mkdir()
        record = {"format": 1, "root": "", "source": "configs/x.py", "config": config}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    listed = launch("runs", str(tmp_path)).out.splitlines()
    rows = {Path(line.split()[0]).name: line.split()[1:] for line in listed if line.startswith(f"  {tmp_path}")}
    assert rows["long-name-of-a-run"][2] == "window=64" and rows["fast"][2] == "peak_lr=0.003"
    assert rows["base"][0] == "interrupted" and not [word for word in rows["base"] if "=" in word]
    assert rows["broken"][0] == "damaged" and any(line.startswith(f"{tmp_path}/broken: damaged: ") for line in listed)


def test_runs_of_a_folder_without_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs yet" in capsys.readouterr().out
    refused(launch("runs", str(tmp_path / "none")), "none no such folder")
    monkeypatch.chdir(tmp_path)
    ended = launch("runs")
    assert ended.code == 0, ended
    names(ended.out.removesuffix("\n"), "runs: init new PATH")


def test_a_run_directory_stands_for_its_record(begun: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    directory = begun.runs / "tiny"
    assert main(["diff", str(directory), str(directory / "run.json")]) == 0
    assert "no difference" in capsys.readouterr().out
    assert main(["show", str(directory), "--changed"]) == 0
    printed = capsys.readouterr().out
    assert "train.steps = " in printed and "seed = " not in printed
    for command in (("diff", f"{directory}@10", str(directory)), ("show", f"{directory}@10")):
        refused(launch(*command), f"{directory}@10 use {directory}")
    refused(launch("show", str(begun.runs)), f"{begun.runs} run.json")


def test_a_closed_pipe_ends_a_command_without_a_traceback(repo_root: Path) -> None:
    command = f"{sys.executable} -m launch explain data | head -1; {sys.executable} -m launch models | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=repo_root)
    assert ended.stdout and not ended.stderr


def test_a_terminal_without_unicode_shows_question_marks(repo_root: Path, begun: Tiny) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "launch", "show", str(begun.runs / "tiny")]
    ended = subprocess.run(command, capture_output=True, cwd=repo_root, env=environment)
    assert ended.returncode == 0 and ended.stdout.isascii(), ended.stderr


@pytest.mark.parametrize("overrides", [(), ("optim.peak_lr=1e-4", "train.steps=3")])
def test_a_command_runs_the_config_file_once(tiny: Tiny, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    runs = tmp_path / "runs.txt"
    counts = f"with open({str(runs)!r}, 'a') as file:\n    file.write('run\\n')\n"
    tiny.config.write_text(counts + tiny.config.read_text())
    assert main(["show", str(tiny.config), *overrides]) == 0
    assert runs.read_text() == "run\n"


def test_a_few_steps_shorten_the_warmup_of_the_file(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny.config.read_text().replace("warmup_steps=2", "warmup_steps=8")
    tiny.config.write_text(config)
    assert main(["show", str(tiny.config), "train.steps=6", "--changed"]) == 0
    assert "warmup of 8 steps" in caplog.text and "optim.schedule.warmup_steps=0" in caplog.text
    refused(launch("show", str(tiny.config), "train.steps=6", "optim.schedule.warmup_steps=7"), "warmup_steps=7")
    assert tiny.loaded("train.steps=6").optim.schedule.warmup_steps == 0, "a script gets what a command line gets"


@pytest.mark.parametrize(
    ("kind", "code", "named"),
    [("gone", 81, "no run.json checkpoints again"), ("pipe", 82, "run.json regular"), ("cut", 81, "run.json restore")],
)
def test_a_record_that_cannot_be_read(kind: str, code: int, named: str, tiny: Tiny) -> None:
    """Every command says so in one line, none waits for a pipe, and the command of the run goes on or says so, too."""
    assert tiny.launch().code == 0
    record = tiny.directory() / "run.json"
    content = record.read_bytes()
    record.unlink()
    if kind == "pipe":
        os.mkfifo(record)
    elif kind == "cut":
        record.write_bytes(content[:99])
    (run,) = list_runs(tiny.runs)
    assert names(run.state, f"damaged {named}")
    listed = launch("runs", str(tiny.runs))
    assert listed.code == 0 and "next:" not in listed.out
    for command in ("sample", "evaluate", "report"):
        words = [str(tiny.directory()), *["w1"] * (command == "sample")]
        refused(launch(command, *words), "run.json", code=82 if command == "report" and kind == "cut" else code)
    if kind == "gone":
        assert tiny.launch().code == 0 and "config" in json.loads(record.read_bytes())
    else:
        refused(tiny.launch(), named, code=code)
