"""A wrong override, or two that do not go together, is one line; what it suggests works, and nothing there changes."""

import pytest

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.run import with_mesh_size
from tests.refusals import mend, raises, refused
from tests.tiny_run import Tiny, contents, launch

# Overrides, and words that their refusal has where those are not the first override itself.
WITHOUT_A_FIX = (
    ("train.stepz=4", "train.stepz train.steps?"),
    ("modle.width=4", "modle model"),
    ("train.steps=many", "int"),
    ("optim=3", "optim.peak_lr"),
    ("optim.optimizer=adamx", "adam_w? muon"),
    ("precision.compute=float16", "float32 bfloat16?"),
    ("train.steps", "train.steps=100"),
    ("train.steps=3 train.steps=4", "train.steps=4"),
    ("mesh.tensor=-1", "mesh.fsdp=-1"),
    ("mesh.fsdp=0", "mesh.fsdp=-1"),
    ("mesh.fsdp=2 mesh.tensor=2", "mesh.tensor=2 cpu:4 8"),
    ("mesh.tensor=3", "mesh.fsdp=-1 3 8"),
    ("mesh.fsdp=3", "mesh.fsdp=3 mesh.fsdp=-1 8"),
    ("rules.batch=(fsdp,tensor)", "rules.batch=(fsdp, tensor)"),
    ("name=..", ""),
    ("train.steps=0", "train.steps=1"),
    ("data.packing=best_fit", "32 PackSpec(seq_len=32)"),
)


@pytest.mark.parametrize(("overrides", "named"), WITHOUT_A_FIX)
def test_the_line_names_what_is_wrong(begun: Tiny, overrides: str, named: str) -> None:
    before = contents(begun.runs)
    refused(begun.launch(*overrides.split()), named or overrides)
    assert contents(begun.runs) == before


@pytest.mark.parametrize(("fsdp", "devices", "batch"), [(16, 4, 16), (4, 16, 16), (4, 2, 8)])
def test_a_mesh_of_other_devices_whose_batch_does_not_fit_either(
    tiny: Tiny, fsdp: int, devices: int, batch: int
) -> None:
    """Both stand in one line, so that each of the two ways on works at once."""
    with raises(ConfigError, f"mesh.fsdp={fsdp}: {devices} mesh.fsdp=-1 cpu:{fsdp}") as caught:
        with_mesh_size(tiny.loaded(f"mesh.fsdp={fsdp}"), devices)
    assert (f"train.global_batch={batch}" in str(caught.value)) == (batch != 8)
    for size, count in ((-1, devices), (fsdp, fsdp)):
        validate(with_mesh_size(tiny.loaded(f"mesh.fsdp={size}", f"train.global_batch={batch}"), count))


@pytest.mark.parametrize(
    ("words", "override"),
    [
        ("--learning_rate=3e-3", "optim.peak_lr=3e-3"),
        ("--lr 3e-3", "optim.peak_lr=3e-3"),
        ("--num-train-epochs=3", "train.steps=VALUE"),
        ("--train.steps=4", "train.steps=4"),
        ("train.steps=4 --optim.peak_lr", "optim.peak_lr=VALUE"),
        ("--seed=4", "seed=4"),
    ],
)
def test_an_override_with_dashes(tiny: Tiny, words: str, override: str) -> None:
    line = refused(tiny.launch(*words.split()))
    assert line.endswith(f" no dashes: {override}")


def test_an_option_that_is_neither(tiny: Tiny) -> None:
    for ended in (tiny.launch("--nothing"), launch("sample", "runs/x", "Once", "--train.steps=4")):
        assert ended.code == 2 and "unrecognized arguments: --" in ended.err


def test_a_root_that_cannot_be_written(begun: Tiny) -> None:
    refused(begun.launch("root=/dev/null/x"), "/dev/null/x/tiny", code=82)


def test_quantized_products_need_qwix(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfra.run.precision.find_spec", lambda name: None)
    refused(tiny.launch("precision.quantize=int8"), "precision.quantize=int8 qwix quantized")


LATENT = "model.layers.mixer=latent_attention"
DELTA = "model.layers.mixer=gated_delta_net"
EXPERTS = "model.layers.mlp=mixture_of_experts"
MIXER, MLP = "model.layers.0.mixer", "model.layers.0.mlp"
# Overrides of which the last does not go with others or with what is there, and the fields that must be named.
WITH_A_FIX = (
    ("mesh.stage=4", "model.num_layers=2 mesh.stage=4"),
    (
        "mesh.stage=2 model.num_layers=4 pipeline.schedule=interleaved pipeline.chunks=2 mesh.fsdp=1 mesh.replica=4",
        "train.accumulate=1 mesh.stage=2 pipeline.schedule=interleaved",
    ),
    ("pipeline.chunks=2", "pipeline.schedule='1f1b' pipeline.chunks=2"),
    ("pipeline.schedule=interleaved", "pipeline.schedule=interleaved pipeline.chunks=1"),
    (f"{EXPERTS} model.layers.mlp.num_experts=6 mesh.fsdp=2 mesh.expert=4", f"{MLP}.num_experts=6 mesh.expert=4"),
    ("name=a/b", "name=a/b"),
    ("root=ftp://b/runs", "root=ftp://b/runs"),
    ("mesh.fsdp=1 mesh.context=8 data.seq_len=72", "data.seq_len=72 mesh.context=8"),
    ("mesh.fsdp=1 mesh.context=8 rules.sequence=()", "mesh.context=8 rules.sequence=()"),
    ("mesh.fsdp=1 mesh.context=8 objective.loss_chunks=8", "objective.loss_chunks=8"),
    ("rules.layers=fsdp", "rules.layers=(fsdp,)"),
    ("optim.peak_lr=-1", "optim.peak_lr=-1.0"),
    ("data.version=xx", "data.version=xx"),
    ("data.packing=best_fit data.mask_documents=false", "data.packing=best_fit data.mask_documents=false"),
    ("data.curriculum=curriculum", "data.curriculum= data.packing=concat"),
    ("data.seq_len=100000", "data.seq_len=100000 train"),
    ("data.seq_len=2000", "data.seq_len=2000"),
    (
        "model.layers.mixer.num_heads=6 model.layers.mixer.head_dim=4 mesh.tensor=4",
        f"{MIXER}.num_heads=6 mesh.tensor=4",
    ),
    ("model.layers.mixer.num_kv_heads=2 mesh.tensor=4", f"{MIXER}.num_kv_heads=2 mesh.tensor=4"),
    ("model.layers.mixer.num_kv_heads=3", f"{MIXER}.num_heads=8 {MIXER}.num_kv_heads=3"),
    ("model.norm.eps=0.0", "model.norm.eps=0.0"),
    ("model.layers.mixer.softcap=0.0", f"{MIXER}.softcap=0.0"),
    ("model.learned_positions=0", "model.learned_positions=0"),
    (f"{EXPERTS} model.layers.mlp.capacity_factor=nan", f"{MLP}.capacity_factor=nan"),
    ("mesh.replica=2 mesh.fsdp=4 rules.batch=(fsdp,expert)", "mesh.replica=2 rules.batch=(fsdp, expert)"),
    (f"{LATENT} model.layers.mixer.kv_lora_rank=0", f"{MIXER}.kv_lora_rank=0"),
    (f"{LATENT} {MIXER}.qk_rope_head_dim=5", f"{MIXER}.rope.fraction=1.0 {MIXER}.qk_rope_head_dim=5"),
    (f"{LATENT} model.layers.mixer.q_lora_rank=12", f"{MIXER}.q_lora_rank=12 mesh.fsdp=8"),
    (f"{DELTA} {MIXER}.num_value_heads=24", f"{MIXER}.num_value_heads=24 {MIXER}.num_key_heads=16"),
    (f"{DELTA} {MIXER}.num_key_heads=2 mesh.fsdp=2 mesh.tensor=4", f"{MIXER}.num_key_heads=2 mesh.tensor=4"),
    ("model.layers.mixer.num_heads=10", f"model.hidden_size=32 {MIXER}.num_heads=10"),
    ("model.vocab_size=306 mesh.tensor=4", "model.vocab_size=306 mesh.tensor=4"),
    ("model.layers.mlp.dim=66 mesh.tensor=4", f"{MLP}.dim=66 mesh.tensor=4"),
    ("model.layers.mlp.dim=65 mesh.tensor=4 train.global_batch=2", f"{MLP}.dim=65"),
    ("data.seq_len=30 mesh.tensor=4", "data.seq_len=30 mesh.tensor=4"),
    ("model.hidden_size=36 model.layers.mixer.num_heads=6", "model.hidden_size=36 mesh.fsdp=8"),
    ("train.global_batch=12", "train.global_batch=12 mesh.fsdp=8"),
    ("train.accumulate=3", "train.global_batch=8 train.accumulate=3 mesh.fsdp=8"),
    ("objective.loss_chunks=5", "objective.loss_chunks=5 data.seq_len=32"),
    ("model.learned_positions=16", "data.seq_len=32 model.learned_positions=16"),
    ("optim.schedule.warmup_steps=40", "optim.schedule.warmup_steps=40"),
    ("optim.schedule=wsd optim.schedule.decay_fraction=1.0", "optim.schedule.decay_fraction=1.0"),
    ("checkpoint.keep_every=7", "checkpoint.keep_every=7 checkpoint.save_every=5"),
    ("model.layers.mixer.window=0", f"{MIXER}.window=0"),
    ("model.remat=(full,dots,dots)", "model.remat=(full, dots, dots) model.num_layers=2"),
    ("model.vocab_size=256", "model.vocab_size=256 300"),
)


@pytest.mark.parametrize(("overrides", "named"), WITH_A_FIX)
def test_what_the_line_suggests_works(begun: Tiny, overrides: str, named: str) -> None:
    """The message names every field that takes part."""
    before = contents(begun.runs)
    line = refused(begun.launch(*overrides.split()), named)
    assert contents(begun.runs) == before
    mend(begun, overrides.split(), line)


def test_suggested_batch_trains(tiny: Tiny) -> None:
    overrides = ("train.global_batch=12", "train.steps=3")
    line = refused(tiny.launch(*overrides), "train.global_batch=12")
    assert tiny.launch(*mend(tiny, overrides, line), "name=fixed").code == 0
    assert set(tiny.losses("fixed")) == {1, 2, 3}
