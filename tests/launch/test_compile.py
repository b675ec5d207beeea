"""`python -m launch compile`: the step of a run, compiled for chips that are not here."""

import json
import re

import pytest
from tiny_run import Tiny, refused

SLICES = ("--on", "2xv5e:2x4", "mesh.replica=2", "mesh.fsdp=8", "train.global_batch=32", "train.accumulate=2")


@pytest.mark.slow
def test_two_slices_exchange_gradients_once_and_everything_is_told(tiny: Tiny) -> None:
    folder = tiny.runs.parent
    ended = tiny.launch(*SLICES, "--json", str(folder / "o.json"), "--dump", str(folder / "o.txt"), command="compile")
    assert ended.code == 0, ended.err
    shown = ended.out
    assert re.search(r"^tiny-\w+ on 2xv5e:2x4: replica 2 x fsdp 8, 2 sequences a device and step$", shown, re.M)
    for wanted in ("temporaries", "cycles a sequence", "all-gather", "network"):
        assert wanted in shown
    found = json.loads((folder / "o.json").read_text())
    assert (folder / "o.txt").read_text().startswith("HloModule jit__train_step")
    far = [row for row in found["traffic"] if row["link"] == "network"]
    assert [(row["loops"], row["kind"], row["axes"]) for row in far] == [(0, "all-reduce", ["replica"])]
    assert max(row["loops"] for row in found["traffic"]) == 2
    memory = found["memory"]
    assert 0 < memory["aliased"] <= memory["output"] < memory["arguments"]
    assert found["cycles"] > 0
    assert found["unknown_loops"] == []


def test_what_does_not_fit_is_said_in_a_line(tiny: Tiny) -> None:
    big = ("train.global_batch=4194304", "--on", "v5e:2x2")
    refused(
        tiny.launch(*big, command="compile"),
        r"tiny-\w+ on v5e:2x2: does not fit: .*CompileTimeHbmOom.* exceeds available HBM.*"
        r"Use more chips, train.accumulate or model.remat=full",
    )


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("--on", "v5e:3x4"), r"--on v5e:3x4: the compiler refuses it: .*", 81),
        (
            ("--on", "v5e:2x4", "mesh.fsdp=3"),
            r"--on v5e:2x4: has 8 devices, the mesh asks for 3; use mesh.fsdp=-1, .*",
            81,
        ),
        (("--on", "2xv5e:2x2"), r"mesh.replica=1: 2 slices need a multiple of 2; use mesh.replica=2", 81),
        (("--on", "v5e:2x4", "--devices", "cpu:8"), r"--devices cpu:8: compile uses none; .*", 81),
        (("--on", "v5e:2x4", "--json", "/nowhere/o.json"), r"/nowhere/o.json: its folder does not exist; .*", 82),
    ],
)
def test_wrong_arguments_are_answered_before_anything_is_compiled(
    tiny: Tiny, arguments: tuple[str, ...], message: str, code: int
) -> None:
    refused(tiny.launch(*arguments, command="compile"), message, code)


def test_attention_that_needs_cudnn_says_so(tiny: Tiny) -> None:
    wide = ("model.head_dim=64", "precision.compute=bfloat16", "model.attention=cudnn", "--on", "h100:1x8")
    refused(
        tiny.launch(*wide, command="compile"), r".* on h100:1x8: its attention needs cuDNN; use model.attention=xla, .*"
    )


@pytest.mark.slow
def test_gpus_have_memory_and_collectives_but_no_cycles(tiny: Tiny) -> None:
    out = tiny.runs.parent / "o.json"
    ended = tiny.launch("model.attention=xla", "--on", "h100:2x4", "--json", str(out), command="compile")
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    assert found["cycles"] is None
    assert found["memory"]["temporaries"] > 0
    assert {tuple(row["axes"]) for row in found["traffic"]} == {("fsdp",)}
    assert {row["link"] for row in found["traffic"]} == {"network"}
