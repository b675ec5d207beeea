"""The commands besides training, and what the command line costs before it does anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfra.cli.arguments import COMMANDS
from jaxinfra.machine.emulation import emulation_env
from tests.refusals import refused
from tests.tiny_run import Tiny, contents, ended, launch, start

LLAMA_LIKE = """\
from jaxinfra.data.tokens import TokenData
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.run import Run


def config() -> Run:
    return Run(
        name="llama",
        model=TransformerConfig(
            vocab_size=128256,
            num_layers=32,
            hidden_size=4096,
            layers=(Layer(mixer=Attention(num_heads=32, num_kv_heads=8), mlp=MLP(dim=14336)),),
        ),
        data=TokenData(store="nowhere", seq_len=8192),
    )
"""

# Runs a command, then says whether any backend of JAX came up.
WITHOUT_DEVICES = """\
import sys
from jaxinfra.cli.main import main

code = main(sys.argv[1:])
from jax._src import xla_bridge

assert not xla_bridge.backends_are_initialized(), "a device was touched"
sys.exit(code)
"""


def python(code: str, *arguments: str, repo_root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=repo_root)


def test_show_touches_no_device(tmp_path: Path, repo_root: Path) -> None:
    """The numbers of an 8-billion-parameter model on 64 devices, on a machine that has none of them."""
    config = tmp_path / "llama.py"
    config.write_text(LLAMA_LIKE)
    shown = python(
        WITHOUT_DEVICES, "show", str(config), "mesh.fsdp=16", "mesh.tensor=4", "train.steps=1000", repo_root=repo_root
    )
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert any(line.startswith("mesh.fsdp = 16") and line.endswith("# command line") for line in lines)
    assert any(line.startswith("model.hidden_size = 4096") and line.endswith(f"# file:{config}") for line in lines)
    numbers = " ".join(shown.stdout.split())
    assert "devices 64 fsdp 16 x tensor 4" in numbers
    assert "parameters 8,030,261,248" in numbers
    assert "blocks.mlp" in numbers and "tensor" in numbers
    assert "Learning rate over 1,000 steps" in shown.stdout
    assert not (repo_root / "runs" / "llama").exists()


def test_show_sizes_the_mesh_and_keeps_values_as_they_are(tiny: Tiny) -> None:
    """Options stand anywhere; brackets are data, not markup."""
    shown = launch("show", "--devices", "cpu:4", str(tiny.config), "--debug", "mesh.tensor=2", "data.store=[a-z]*")
    assert shown.code == 0, shown.err
    for line in ("data.store = '[a-z]*'", "mesh.fsdp = 2", "mesh.tensor = 2"):
        assert line in shown.out


def test_show_draws_the_pipeline(tiny: Tiny) -> None:
    shown = tiny.launch("mesh.stage=2", "mesh.fsdp=1", "train.accumulate=4", command="show")
    assert shown.code == 0, shown.err
    assert "stage 0  F0  F1     F2 B0  F3 B1  B2     B3" in shown.out
    assert "stage 1  .   F0 B0  F1 B1  F2 B2  F3 B3  ." in shown.out
    numbers = " ".join(shown.out.split())
    assert "pipeline bubble 20.0% 1f1b" in numbers
    assert "microbatches in flight 3 saved inputs by stage: 3, 1" in numbers


def test_prepare_twice(tiny: Tiny, tmp_path: Path) -> None:
    """The second time changes nothing and says the same."""
    store = f"data.store={tmp_path / 'store'}"
    first = tiny.launch(store, command="data prepare")
    before = contents(tmp_path / "store")
    second = tiny.launch(store, command="data prepare")
    assert first.code == second.code == 0
    assert contents(tmp_path / "store") == before
    said = [
        line for line in second.out.splitlines() if line.startswith(("fingerprint", "tokenizer", "train", "validation"))
    ]
    assert len(said) == 4 and all(line in first.out for line in said)
    assert "made: " in first.out and "was there: " in second.out


def test_diff(tiny: Tiny) -> None:
    edited = tiny.edited("peak_lr=3e-3", "peak_lr=1e-2")
    found = launch("diff", str(tiny.config), str(edited))
    assert (found.code, found.out) == (0, "optim.peak_lr  0.003 -> 0.01\n")
    assert launch("diff", str(tiny.config), str(tiny.config)).out == "no difference\n"
    assert launch("diff", str(tiny.config), str(tiny.runs / "none.py")).code == 81


def test_diff_of_records(begun: Tiny) -> None:
    record = begun.directory() / "run.json"
    other = record.with_name("other.json")
    other.write_text(record.read_text().replace('"peak_lr": 0.003', '"peak_lr": 0.002'))
    assert launch("diff", str(record), str(other)).out.split() == ["optim.peak_lr", "0.003", "->", "0.002"]


def test_help_imports_no_jax(repo_root: Path) -> None:
    """It answers before anything heavy is loaded."""
    code = """\
import sys
from contextlib import suppress
from jaxinfra.cli.main import main

for words in ([], ["train"], ["show"], ["data", "prepare"]):
    with suppress(SystemExit):
        main([*words, "--help"])
heavy = {"jax", "numpy", "flax", "optax", "orbax", "rich", "tensorstore"} & sys.modules.keys()
assert not heavy, heavy
"""
    shown = python(code, repo_root=repo_root)
    assert (shown.returncode, shown.stderr) == (0, "") and shown.stdout.count("usage: python -m launch") == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    shown = launch(command, "--help")
    assert shown.code == 0 and f"usage: python -m launch {command}" in shown.out
    assert "--devices" in shown.out and "--debug" in shown.out
    assert f"  {command} " in launch("--help").out


@pytest.mark.slow
def test_devices_of_a_process(tiny: Tiny) -> None:
    """`--devices` says how many there are; the exit code and the one line arrive outside."""
    trained = ended(start(str(tiny.config), "--devices", "cpu:2", "train.steps=3", "name=two"))
    assert trained.code == 0, trained.err
    assert trained.out.startswith(f"new run {tiny.directory('two')}: ")
    assert "devices 2 fsdp 2" in " ".join(trained.out.split())
    wrong = ended(start(str(tiny.config), "--devices", "cpu:2", "train.global_batch=3"))
    refused(wrong, "train.global_batch=3 mesh.fsdp=2 train.global_batch=4")
    absent = ended(start(str(tiny.config), "--devices", "gpu"))
    if absent.code:
        refused(absent, "JAX_PLATFORMS=cuda")


def test_a_start_without_a_platform_prints_nothing_of_plugins(tiny: Tiny) -> None:
    """Both plugins are installed with the extra `test`; their hardware is not everywhere that tests run."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TPU_"))}
    words = [sys.executable, "-m", "launch", str(tiny.config), "train.steps=3", "mesh.fsdp=1", "name=quiet"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith("new run ")


def test_emulated_devices_have_threads_to_wait_in() -> None:
    """Devices that wait in collectives hold threads of a pool, whose size XLA reads when it starts."""
    found = emulation_env(8)
    assert found["JAX_NUM_CPU_DEVICES"] == "8" and int(found["NPROC"]) > 2 * 8
    code = (
        "import os; from jaxinfra.cli.main import choose_devices; choose_devices('cpu:8'); print(os.environ['NPROC'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found["NPROC"]]
    assert emulation_env(1) == {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}  # a single one waits for no other
