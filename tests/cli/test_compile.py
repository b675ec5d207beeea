"""`python -m launch compile`: the step of a run, compiled for chips that are not here."""

import json
import re

import pytest

from tests.tiny_run import Tiny, refused

pytestmark = pytest.mark.usefixtures("compile_cache")

SLICES = ("--on", "2xv5e:2x4", "mesh.replica=2", "mesh.fsdp=8", "train.global_batch=32", "train.accumulate=2")


@pytest.mark.slow
def test_two_slices_exchange_gradients_once_and_everything_is_told(tiny: Tiny) -> None:
    folder = tiny.runs.parent
    ended = tiny.launch(*SLICES, "--json", str(folder / "o.json"), "--dump", str(folder / "o.txt"), command="compile")
    assert ended.code == 0, ended.err
    shown = ended.out
    assert re.search(r"^tiny-\w+ on 2xv5e:2x4: replica 2 x fsdp 8, 2 rows of the batch a device and step$", shown, re.M)
    for wanted in ("temporaries", "cycles a row", "all-gather", "network"):
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


@pytest.mark.slow
def test_latent_attention_takes_the_kernels_of_tpus(tiny: Tiny) -> None:
    """Keys of 192 features and values of 128, over heads and positions."""
    latent = ("model.latent=latent", "model.latent.kv_rank=64", "data.seq_len=512", "precision.compute=bfloat16")
    mesh = ("--on", "v5e:2x4", "mesh.fsdp=2", "mesh.context=2", "mesh.tensor=2")
    ended = tiny.launch(*latent, *mesh, command="compile")
    assert ended.code == 0, ended.err
    assert re.search(r"splash_mha_dkv\w+ +tpu_custom_call", ended.out)


BIG = "train.global_batch=4194304"
ON = ("--on", "v5e:2x4")


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (
            (BIG, "--on", "v5e:2x2"),
            r"tiny-\w+ on v5e:2x2: needs \d+\.\d\d GiB of HLO temporaries a device, which has 15\.75: \d+\.\d\d GiB "
            r"too much; use model\.remat=full, train\.accumulate=\d+, or more devices",
            81,
        ),
        (
            ("model.width=65536", "model.mlp_dim=65536", *ON),
            r"tiny-\w+ on v5e:2x4: needs \d+\.\d\d GiB of train state a device, which has 16\.00: \d+\.\d\d GiB too "
            r"much; use more devices, or mesh\.fsdp in place of mesh\.replica",
            81,
        ),
        (("--on", "v9:2x2"), r"--on v9:2x2: no such chip; known are v4, .*; use --on v5p:4x4x4, .*", 81),
        (("--on", "v5p:2x2"), r"--on v5p:2x2: v5p wants 3 sizes above 0; use --on v5p:4x4x4", 81),
        (("--on", "v5e:3x4"), r"--on v5e:3x4: the compiler knows no such slice: .*; use --on v5e:2x4", 81),
        (
            (*ON, "mesh.fsdp=3"),
            r"--on v5e:2x4: has 8 devices, the mesh asks for 3; use mesh.fsdp=-1, .*",
            81,
        ),
        ((*ON, "mesh.tensor=16"), r"--on v5e:2x4: has 8 devices, the mesh asks for 16; use axes that divide 8", 81),
        (
            (*ON, "model.heads=4", "mesh.fsdp=1", "mesh.tensor=8"),
            r"model\.heads=4, mesh\.tensor=8: 8 shards do not divide 4 heads; use mesh\.tensor=4 mesh\.fsdp=2",
            81,
        ),
        ((*ON, "mesh.fsdp=0"), r"mesh\.fsdp=0: .*", 81),
        ((*ON, "mesh.tensor=-1"), r"mesh.*: only one mesh axis may be -1; .*", 81),
        ((*ON, "--json", "same", "--dump", "same"), r"--json and --dump same: are the same file; name two", 81),
        (("--on", "2xv5e:2x2"), r"mesh.replica=1: 2 slices need a multiple of 2; use mesh.replica=2", 81),
        (
            ("--on", "2xv5e:2x6", "mesh.replica=3", "mesh.fsdp=8", "train.global_batch=24"),
            r"mesh\.replica=3: 2 slices need a multiple of 2; use mesh\.replica=2",
            81,
        ),
        ((*ON, "--devices", "cpu:8"), r"--devices cpu:8: compile uses none; .*", 81),
        ((*ON, "--json", "/nowhere/o.json"), r"/nowhere/o.json: its folder does not exist; .*", 82),
        ((*ON, "--dump", "/tmp"), r"/tmp: is a folder; name a file", 82),
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
