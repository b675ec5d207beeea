"""`python -m launch compile`: the step of a run, compiled for chips that are not here."""

import importlib.util
import json
import re
import signal
import subprocess
import sys

import pytest

from tests.refusals import refused, suggested
from tests.tiny_run import Tiny

pytestmark = pytest.mark.usefixtures("compile_cache")

SLICES = ("--on", "2xv5e:2x4", "mesh.replica=2", "mesh.fsdp=8", "train.global_batch=32", "train.accumulate=2")


@pytest.mark.slow
def test_two_slices_exchange_gradients_once_and_everything_is_told(tiny: Tiny) -> None:
    folder = tiny.runs.parent
    ended = tiny.launch(*SLICES, "--json", str(folder / "o.json"), "--dump", str(folder / "o.txt"), command="compile")
    assert ended.code == 0, ended.err
    shown = ended.out
    assert re.search(r"^tiny-\w+ on 2xv5e:2x4: replica 2 x fsdp 8, per-device batch size 2$", shown, re.M)
    for wanted in ("temporaries", "cycles per sample", "all-gather", "network"):
        assert wanted in shown
    found = json.loads((folder / "o.json").read_text())
    assert (folder / "o.txt").read_text().startswith("HloModule jit__train_step")
    far = [row for row in found["traffic"] if row["link"] == "network"]
    assert [(row["loops"], row["kind"], row["axes"]) for row in far] == [(0, "all-reduce", ["replica"])]
    assert max(row["loops"] for row in found["traffic"]) == 2
    memory = found["memory"]
    assert memory["aliased"] <= memory["output"] < memory["arguments"]
    assert isinstance(found["cycles"], int)
    assert found["unknown_loops"] == []


@pytest.mark.slow
def test_latent_attention_takes_the_kernels_of_tpus(tiny: Tiny) -> None:
    """Keys of 192 features and values of 128, over heads and positions."""
    latent = (
        "model.layers.mixer=latent_attention",
        "model.layers.mixer.kv_lora_rank=64",
        "data.seq_len=512",
        "precision.compute=bfloat16",
    )
    mesh = ("--on", "v5e:2x4", "mesh.fsdp=2", "mesh.context=2", "mesh.tensor=2")
    ended = tiny.launch(*latent, *mesh, command="compile")
    assert ended.code == 0, ended.err
    assert re.search(r"splash_mha_dkv\w+ +tpu_custom_call", ended.out)


BIG = "train.global_batch=4194304"
ON = ("--on", "v5e:2x4")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((BIG, "--on", "v5e:2x2"), "v5e:2x2: GiB 15.75 model.remat=full, train.accumulate="),
        (("model.hidden_size=65536", "model.layers.mlp.dim=65536", *ON), "v5e:2x4: GiB 16.00 mesh.fsdp mesh.replica"),
        (("--on", "v5p:2x2"), "v5p:2x2: v5p:4x4x4"),
        (("--on", "v5e:3x4"), "v5e:3x4: v5e:2x4"),
        ((*ON, "mesh.fsdp=3"), "v5e:2x4: mesh.fsdp=-1"),
        ((*ON, "mesh.tensor=16"), "v5e:2x4: 8 16"),
        (
            (*ON, "model.layers.mixer.num_heads=4", "mesh.fsdp=1", "mesh.tensor=8"),
            "model.layers.0.mixer.num_heads=4 mesh.tensor=8 use mesh.tensor=4",
        ),
        ((*ON, "mesh.fsdp=0"), "mesh.fsdp=0"),
        ((*ON, "mesh.tensor=-1"), "mesh.tensor=-1"),
        ((*ON, "--json", "same", "--dump", "same"), "--json --dump same"),
        (("--on", "2xv5e:2x2"), "mesh.replica=1 mesh.replica=2"),
        (
            ("--on", "2xv5p:2x2x3", "mesh.replica=3", "mesh.fsdp=8", "train.global_batch=24"),
            "mesh.replica=3 mesh.replica=2",
        ),
        ((*ON, "--devices", "cpu:8"), "--devices cpu:8"),
    ],
)
def test_wrong_arguments_are_answered_before_anything_is_compiled(
    tiny: Tiny, arguments: tuple[str, ...], named: str
) -> None:
    refused(tiny.launch(*arguments, command="compile"), named)


def test_files_that_cannot_be_written_are_named(tiny: Tiny) -> None:
    for option, place in (("--json", "/nowhere/o.json"), ("--dump", "/tmp")):
        refused(tiny.launch(*ON, option, place, command="compile"), place, code=82)


def test_a_missing_compiler_is_said_with_all_else(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    wrong = ("mesh.fsdp=3", "train.global_batch=12")
    line = refused(tiny.launch(*wrong, *ON, command="compile"), "v5e:2x4: libtpu 'jaxinfra[compile]'")
    assert suggested(line.rpartition("; --on")[0]) == ["mesh.fsdp=-1", "train.global_batch=16"]


def test_attention_that_needs_cudnn_says_so(tiny: Tiny) -> None:
    wide = (
        "model.layers.mixer.head_dim=64",
        "precision.compute=bfloat16",
        "model.attention_kernel=cudnn",
        "--on",
        "h100:1x8",
    )
    fixes = "'jaxinfra[compile]' model.attention_kernel=xla"
    refused(tiny.launch(*wide, command="compile"), "h100:1x8: cuDNN", fixes)
    others = ("mesh.fsdp=64", "train.compiler=large_blocks", "train.global_batch=12")
    line = refused(tiny.launch(*wide, *others, command="compile"), "h100:1x8: 8 64 cuDNN", fixes)
    assert suggested(line.partition("; its attention")[0]) == [
        "mesh.fsdp=-1",
        "train.global_batch=16",
        "train.compiler=overlap",
    ]


@pytest.mark.slow
def test_gpus_have_memory_and_collectives_but_no_cycles(tiny: Tiny) -> None:
    out = tiny.runs.parent / "o.json"
    ended = tiny.launch("model.attention_kernel=xla", "--on", "h100:2x4", "--json", str(out), command="compile")
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    assert found["cycles"] is None
    assert {tuple(row["axes"]) for row in found["traffic"]} == {("fsdp",)}
    assert {row["link"] for row in found["traffic"]} == {"network"}


@pytest.mark.slow(10)
def test_sigterm_ends_it_without_the_crash_dump_of_libtpu(tiny: Tiny) -> None:
    code = "import os, signal, sys\nfrom jaxinfra.plan import aot\nfrom jaxinfra.cli.main import main\n"
    code += "aot._compile = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\nmain(sys.argv[1:])"
    words = [sys.executable, "-c", code, "compile", str(tiny.config), *ON]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGTERM and "SIGTERM" not in ended.stderr, ended
