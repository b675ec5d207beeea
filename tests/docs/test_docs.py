"""The commands that the documentation shows are run in a fresh copy, on less text and for fewer steps.

What a newcomer does for the first time, or what another command needs, is run as it stands. What only reads runs in one
process together. A command that trains, samples or evaluates in another variation is parsed, and its config loaded.
The copy has the packages of the tests and nothing installed of itself; `.ci/run` proves what is installed from nothing.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import threading
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxinfra.cli.main import parse_command_line
from jaxinfra.config import load
from jaxinfra.run import Run

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
COMMAND = re.compile(r"^ {4}((?:make|python|pip|jaxinfra)\b.*?)(?:\s{2,}#.*)?$", re.MULTILINE)
STEP = re.compile(r"step +\d+/\d+ ")
"""How a line of a training step begins."""
RUN_ELSEWHERE = {
    "make test": "the command that runs this test",
    "make test-all": "the command that runs this test",
    "make wheelhouse EXTRAS=mlflow,sign": "tests/registry/test_air_gap.py",
    "make install EXTRAS=mlflow,sign WHEELHOUSE=wheelhouse": "tests/registry/test_air_gap.py",
    "make docs": "tests/docs/test_site.py",
    "make release VERSION=0.2.0": "tests/test_release.py",
    "python -m launch bench step": "tests/bench",
    "python -m launch bench parallel": "tests/bench",
    "python -m launch bench slices": "tests/bench",
    "python -m launch bench llama train.compiler=large_blocks": "tests/bench",
    "python -m launch bench data": "tests/bench",
    "python -m launch bench processes": "tests/bench",
    "python -m launch bench prepare": "tests/bench",
    "python -m launch bench checkpoint": "tests/bench",
    "python -m launch bench hub": "tests/bench",
    "python -m launch bench memory --megabytes 2000": "tests/bench",
    "python -m launch bench mixture": "tests/bench",
    "python -m launch bench verdicts": "tests/bench",
    "python -m launch faults --only 19,20": "tests/faults",
    "python -m launch parity --write docs/parallelism.md": "tests/cli/test_parity.py",
    'python -m launch model promote runs/story --to models:/story --if "eval/loss < champion"': "tests/registry",
    "python -m launch model show models:/story": "tests/registry",
    "python -m launch model rollback models:/story --from 2": "tests/registry",
    "python -m launch model audit runs/audit": "tests/registry",
    "python -m launch model card runs/story --license apache-2.0 --output README.md": "tests/registry",
    "python -m launch model stablehlo runs/story out/function --length 256": "tests/registry",
    "python -m launch model verify out/story --key key.pub": "tests/registry",
    "python -m launch model serve runs/story --port 8000": "tests/registry",
    "python -m launch hub export runs/story out/story --sign key.pem": "tests/registry",
    "python -m launch data prepare configs/data/table.py": "tests/prepare/sources/test_snapshots.py",
    "python -m launch data prepare configs/data/table.py source.version=41": "tests/prepare/sources/test_snapshots.py",
    "python -m launch configs/features.py data.repo=feature_repo data.rows=rows.parquet": "tests/prepare",
    "python -m launch runs sync runs/quickstart": "tests/track/test_mlflow.py",
    "python -m launch compile configs/llama3_70b.py --on 2xv5p:4x4x8": "tests/plan/test_aot.py",
    "python -m launch compile configs/llama3_8b_128k.py --on v5p:4x4x4": "tests/plan/test_aot.py",
    "python -m launch plan configs/llama3_8b.py --on v5p:4x4x4": "tests/cli/test_plan.py",
    "python -m launch configs/quickstart.py name=narrow optim.optimizer=adamw optim.parametrization=mup "
    "optim.base_width=64 model.hidden_size=64 model.layers.mlp.dim=176 --sweep optim.peak_lr=6e-3,9e-3,1.35e-2,2e-2": (
        "tests/cli/test_sweep.py"
    ),
    "python -m launch runs runs/narrow-sweep": "tests/cli/test_sweep.py",
    "python -m launch coordinate-check configs/quickstart.py optim.parametrization=mup optim.base_width=64": (
        "tests/cli/test_sweep.py"
    ),
}
VARIATIONS = (
    "python -m launch configs/quickstart.py train.steps=800 optim.peak_lr=3e-3",
    "python -m launch configs/quickstart.py name=mesh train.steps=50 mesh.fsdp=4 mesh.tensor=2 --devices cpu:8",
    "python -m launch configs/quickstart.py mesh.replica=2 mesh.fsdp=2 mesh.tensor=2 --devices cpu:8",
    "python -m launch configs/quickstart.py name=laptop train.steps=30",
    "python -m launch configs/quickstart.py name=auto checkpoint.save_every=auto",
    "python -m launch configs/story.py train.steps=60 optim.peak_lr=5e-3",
    "python -m launch configs/story.py name=story-mesh train.steps=20 mesh.fsdp=2 mesh.tensor=2 --devices cpu:4",
    'python -m launch sample runs/story "Once upon a time"',
    'python -m launch sample runs/story "Once upon a time" --temperature 0 --stop "." --max-tokens 50',
    'python -m launch sample runs/story "Once upon a time" "The end" mesh.tensor=2 mesh.fsdp=2 --devices cpu:4',
    "python -m launch evaluate runs/story",
    "python -m launch evaluate runs/story mesh.fsdp=2 mesh.tensor=2 --devices cpu:4 --json result.json",
    "python -m launch evaluate runs/story --tasks tasks/kings.yaml",
    'python -m launch evaluate runs/mychat --tasks gsm8k --chat --system "Think step by step."',
    "python -m launch evaluate hf:Qwen/Qwen3-0.6B --tasks gsm8k --chat",
    "python -m launch configs/story.py name=story-tasks train.eval_tasks=tasks/kings.yaml train.eval_every=50",
    "python -m launch configs/quickstart.py name=emulated train.steps=30 --devices cpu:8",
    "python -m launch configs/story.py name=story-on init=runs/story data.seed=1 train.steps=60",
    "python -m launch configs/quickstart.py optim.optimizer=adamw optim.parametrization=mup optim.base_width=64 "
    "optim.peak_lr=1.35e-2",
    "python -m launch configs/quickstart.py optim.optimizer=adamw optim.parametrization=mup optim.base_width=64 "
    "model.layers.mixer.num_heads=4 data.seq_len=64 train.global_batch=8 train.steps=100 train.eval_every=none "
    'train.eval_samples=64 --sweep "model.hidden_size=64,128,256,512 model.layers.mlp.dim=128,256,512,1024" '
    "--sweep optim.peak_lr=6e-3,9e-3,1.35e-2,2e-2",
    "python -m launch configs/quickstart.py name=tracked track.wandb.project=words track.wandb.mode=offline",
)
"""Commands that are only parsed: each does again what another command does, with other options."""
READERS = ("show ", "models", "explain", "diff ", "checkpoints ", "report ", "goodput ", "data show ")
READERS += ("data verify ", "data peek ", "data forget ", "hub check ", "doctor")
LAUNCH = "python -m launch "
READ = """
import contextlib, io, json, sys
from jaxinfra.cli.main import main

for words in json.loads(sys.argv[1]):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(words)
    if code or "Traceback" in printed.getvalue() or not printed.getvalue():
        sys.exit(f"{words}: {code}: {printed.getvalue()}")
"""
"""Runs commands one after another in this process; each must print something."""


def commands(page: Path) -> list[str]:
    return [match[1] for match in COMMAND.finditer(page.read_text())]


ALL = list(dict.fromkeys(command for page in PAGES if page.name != "extend.md" for command in commands(page)))
"""Those of docs/extend.md use its examples: see test_extend.py."""


def test_what_is_not_run_here_is_shown() -> None:
    assert {*RUN_ELSEWHERE, *VARIATIONS} <= {*ALL}


@pytest.mark.parametrize("command", VARIATIONS)
def test_variations_are_right(command: str) -> None:
    """Their configs are loaded by `test_configs_and_overrides_in_commands_are_right`."""
    parse_command_line(shlex.split(command.removeprefix(LAUNCH)))


def test_the_pages_show_the_commands_that_matter() -> None:
    for wanted in ("make quickstart", "make test", 'python -m launch sample runs/story "Once upon a time"'):
        assert wanted in ALL


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


# `new` writes configs/story.py: see test_start.py; the pages show the others, which their own tests run.
WRITTEN = ("configs/story.py", "configs/data/table.py", "configs/features.py")
CONFIG_COMMANDS = [
    command
    for command in ALL
    if " configs/" in command and " diff " not in command and not any(name in command for name in WRITTEN)
]


@pytest.mark.parametrize("command", CONFIG_COMMANDS)
def test_configs_and_overrides_in_commands_are_right(command: str) -> None:
    fields = itertools.pairwise(shlex.split(command))
    words = [word for before, word in fields if before != "--sweep" and (word.startswith("configs/") or "=" in word)]
    load(ROOT / words[0], words[1:], **({} if words[0].startswith("configs/data/") else {"root": Run}))


def environment() -> dict[str, str]:
    """The variables of a newcomer: no virtual environment, and nothing of JAX but a compiler that is quick."""
    others = ("JAX_", "VIRTUAL_ENV", "PYTHON", "PYTEST", "MAKE")
    return {k: v for k, v in os.environ.items() if not k.startswith(others)} | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tracked files as they stand, elsewhere."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    yield folder
    shutil.rmtree(folder)


def install(folder: Path) -> None:
    """Gives a copy the environment that `make` would install: the packages of this one, and the copy itself."""
    venv.create(folder / ".venv", symlinks=True)
    packages = next((folder / ".venv/lib").glob("python*")) / "site-packages"
    packages.joinpath("clone.pth").write_text(
        f"{folder}\nimport site; site.addsitedir({sysconfig.get_path('purelib')!r})"
    )
    command = folder / ".venv/bin/jaxinfra"
    command.write_text(f"#!{folder}/.venv/bin/python\nfrom jaxinfra.cli.entry import main\nraise SystemExit(main())\n")
    command.chmod(0o755)
    for stamp in (".installed", ".installed-test"):
        (folder / ".venv" / stamp).touch()


def shorten(folder: Path) -> None:
    """Makes the quickstart train a quarter of its width for a tenth of its steps, on a part of its text; no samples."""
    steps, fewer = "steps=400, global_batch=8, eval_every=200", "steps=40, global_batch=8, eval_every=20"
    for name, old, new in (
        ("configs/quickstart.py", steps, fewer),
        ("configs/quickstart.py", "hidden_size=256", "hidden_size=64"),
        ("configs/quickstart.py", 'sample_prompt="def main("', "sample_prompt=None"),  # compiled before each first step
        ("configs/data/python_stdlib.py", '"**/*.py"', '"**/[a-d]*.py"'),
    ):
        text = (folder / name).read_text()
        assert text.count(old) == 1, f"{name}: no {old}"
        (folder / name).write_text(text.replace(old, new))


def write_own_text(folder: Path) -> None:
    """Makes the folder that README and docs/start.md train on, a few hundred kB of prose, and what other pages read."""
    prose = (ROOT / "docs/data.md").read_text() + (ROOT / "docs/design.md").read_text()
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(prose)
    (folder.parent / "prompts.txt").write_text("Once upon a time\nThe end\n")
    task = (ROOT / "docs/evaluate.md").read_text().partition("This is `tasks/kings.yaml`:")[2]
    yaml, data = re.findall(r"```\w+\n(.*?)```", task, re.DOTALL)[:2]
    (folder.parent / "tasks").mkdir()
    (folder.parent / "tasks" / "kings.yaml").write_text(yaml)
    (folder.parent / "tasks" / "kings.jsonl").write_text(data)


def run(command: str, folder: Path, *, stop: bool = False, patience_s: float = 1500) -> tuple[int, str]:
    """Runs a shell command; with `stop`, asks it to stop after its first training step, as a scheduler would."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=folder,
        env=environment() | {"PATH": f"{folder}/.venv/bin:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watchdog = threading.Timer(patience_s, process.kill)
    watchdog.start()
    output = []
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if stop and STEP.match(line):
                process.send_signal(signal.SIGTERM)
                stop = False
    watchdog.cancel()
    return process.returncode, "".join(output)


@pytest.mark.slow(100)
def test_a_newcomer_gets_what_the_readme_says(clone: Path) -> None:
    install(clone)
    shorten(clone)
    write_own_text(clone / "mytext")
    code, output = run("make quickstart", clone)
    assert code == 0, output
    assert "Validation bits per byte" in output
    sampled = output.rpartition("def main(")[2]
    assert len(sampled.strip()) > 20, f"nothing follows the prompt: {output[-500:]}"
    readers = list[list[str]]()
    for command in ["jaxinfra --help", *ALL]:
        words = command.removeprefix(LAUNCH)
        if command in {*RUN_ELSEWHERE, *VARIATIONS} or command.startswith(("make quickstart", "pip install")):
            continue
        if words == "runs" or words.startswith(READERS):
            readers.append(shlex.split(words, comments=True))
            continue
        code, output = run(command, clone, stop=True)
        assert code == 0 or (code == 75 and "start the same command to go on" in output), (command, output)
        assert "Traceback" not in output, (command, output)
    code, output = run(f"python -c {shlex.quote(READ)} {shlex.quote(json.dumps(readers))}", clone)
    assert code == 0, output


def test_make_says_what_is_missing_without_python(clone: Path) -> None:
    code, output = run("make quickstart PYTHON= VENV=.venv-of-nobody", clone)
    assert code != 0
    assert "error: no Python >= 3.12" in output
