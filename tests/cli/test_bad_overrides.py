"""A wrong override, or two that do not go together, is one line; what it suggests works, and nothing there changes."""

import re
from collections.abc import Sequence

import pytest

from jaxinfra.config import validate
from jaxinfra.run import resolved
from tests.tiny_run import Tiny, contents, refused

DEVICES = 8


def fix_of(line: str) -> list[str]:
    """The overrides that a message suggests."""
    found = re.search(r"; use ((?:[\w.]+=\S+ ?)+)", line)
    assert found, line
    return [each.rstrip(",") for each in found[1].split()]


# Overrides, the whole message as a pattern, and the exit code where it is not 81.
WRONG_VALUES = {
    "unknown key": ("train.stepz=4", r"train\.stepz: no such field; did you mean train\.steps\?"),
    "unknown part": ("modle.width=4", r"modle: no such field; did you mean model\?|modle\.width: .*model\.width\?"),
    "wrong type": ("train.steps=many", r"train\.steps=many: expected int at least 1"),
    "group, not a value": ("optim=3", r"optim=3: optim is not one value but a group of fields; set one of optim\..*"),
    "union": (
        "optim.optimizer=adamx",
        r"optim\.optimizer=adamx: expected adam_w, adafactor, .* or muon; did you mean adam_w\?",
    ),
    "literal": (
        "precision.compute=float16",
        r"precision\.compute=float16: expected float32 or bfloat16; did you mean bfloat16\?",
    ),
    "no equals": ("train.steps", r"train\.steps: not an override; write path=value, such as train\.steps=100"),
    "twice": ("train.steps=3 train.steps=4", r"train\.steps=3 and train\.steps=4: set twice; keep one of them"),
    "two rests": (
        "mesh.tensor=-1",
        r"mesh\.fsdp=-1, mesh\.tensor=-1: only one mesh axis may be -1; give fsdp a size",
    ),
    "axis of nothing": (
        "mesh.fsdp=0",
        r"mesh\.fsdp=0: .*; use mesh\.fsdp=-1",
    ),
    "devices left over": (
        "mesh.fsdp=2 mesh.tensor=2",
        r"mesh\.fsdp=2, mesh\.tensor=2: asks for 4 devices, 8 here; use --devices cpu:4 to emulate them, .*",
    ),
    "devices do not divide": (
        "mesh.tensor=3",
        r"mesh\.fsdp=-1, mesh\.tensor=3: asks for 3 devices, 8 here; the other axes must divide 8",
    ),
    "more stages than layers": (
        "mesh.stage=4",
        r"model\.layers=2, mesh\.stage=4, pipeline\.chunks=1: 4 places for layers; use model\.layers=4 or fewer stages",
    ),
    "rounds of microbatches": (
        "mesh.stage=2 model.layers=4 pipeline.schedule=interleaved pipeline.chunks=2 mesh.fsdp=1 mesh.replica=4",
        r"train\.accumulate=1, mesh\.stage=2, pipeline\.schedule=interleaved: interleaved microbatches come in rounds, "
        r"one a stage; use train\.accumulate=2",
    ),
    "chunks of another schedule": (
        "pipeline.chunks=2",
        r"pipeline\.schedule='1f1b', pipeline\.chunks=2: has one chunk a stage; use pipeline\.schedule=interleaved, .*",
    ),
    "interleaved without chunks": (
        "pipeline.schedule=interleaved",
        r"pipeline\.schedule=interleaved, pipeline\.chunks=1: needs at least 2 chunks a stage; use pipeline\.chunks=2",
    ),
    "shards of experts": (
        "model.experts=experts model.experts.count=6 mesh.fsdp=2 mesh.expert=4",
        r"model\.experts\.count=6, mesh\.expert=4: 4 shards do not divide 6 experts; use mesh\.expert=2 mesh\.fsdp=4",
    ),
    "dense layers without experts": (
        "model.dense_layers=1",
        r"model\.dense_layers=1, model\.experts=none: without experts all layers are dense; "
        r"use model\.dense_layers=0 model\.layers=3",
    ),
    "two uses of an axis": (
        "rules.batch=(fsdp,tensor)",
        r"rules\.batch=\(fsdp, tensor\), .*: tensor shards two dimensions of one activation; keep tensor in .*",
    ),
    "name with a slash": (
        "name=a/b",
        r"name=a/b: must be a folder's name, without a slash; use name=my-run",
    ),
    "name of the parent": ("name=..", r"name=\.\.: must be a folder's name, .*"),
    "remote root": ("root=gs://b/runs", r"root=gs://b/runs: must be a local folder; use root=runs"),
    "sharded sequence": (
        "mesh.fsdp=1 mesh.context=8 data.seq_len=72",
        r"data\.seq_len=72, mesh\.context=8: 8 shards have two blocks each, and 16 do not divide 72 positions; "
        r"use data\.seq_len=80",
    ),
    "context without a use": (
        "mesh.fsdp=1 mesh.context=8 rules.sequence=()",
        r"mesh\.context=8, rules\.sequence=\(\): the context axis spreads sequences and nothing else; "
        r"use rules\.sequence=\(context,\)",
    ),
    "chunks of a loss over shards": (
        "mesh.fsdp=1 mesh.context=8 task.loss_chunks=8",
        r"task\.loss_chunks=8: chunks must divide the 4 positions that a device has of a sequence; "
        r"use task\.loss_chunks=4",
    ),
    "sharded layers": (
        "rules.layers=fsdp",
        r"rules\.layers=\(fsdp,\): layers are scanned on every device, or shared out to pipeline stages; "
        r"use rules\.layers=stage or rules\.layers=\(\)",
    ),
    "no steps": ("train.steps=0", r"train\.steps=0: .*; use train\.steps=1000"),
    "negative rate": ("optim.peak_lr=-1", r"optim\.peak_lr=-1\.0: .*; use optim\.peak_lr=0\.0003"),
    "root through a file": (
        "root=/dev/null/x",
        r"/dev/null/x/tiny: cannot be written: Not a directory; .*",
        82,
    ),
    "version that is not there": (
        "data.version=xx",
        r"data\.version=xx: is not among the 1 versions of \S+/store; use data\.version=none or one of \w+, and .*",
    ),
    "packing that is not there": (
        "data.packing=best_fit",
        r"data\.packing=best_fit: \S+ has no rows of 32 \(32\), it has none; add Pack\(seq_len=32\) to the packs .*",
    ),
    "packing without masks": (
        "data.packing=best_fit data.mask_documents=false",
        r"data\.packing=best_fit, data\.mask_documents=false: rows of whole documents keep them apart; use .*=true",
    ),
    "curriculum of windows": (
        "data.curriculum=curriculum",
        r"data\.curriculum=.+, data\.packing=windows: windows are all of one length; use \S+=best_fit_by_length",
    ),
    "shorter than a window": (
        "data.seq_len=100000",
        r"data\.seq_len=100000: a window needs 100001 tokens, the train split of \S+ has \d+; "
        r"use data\.seq_len=\d+ or less, or a larger corpus",
    ),
    "held-out split shorter than a window": (
        "data.seq_len=2000",
        r"data\.seq_len=2000: a window needs 2001 tokens, the heldout split of \S+ has \d+; "
        r"use data\.seq_len=\d+ or less, or a larger corpus",
    ),
}


@pytest.mark.parametrize("case", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_value(begun: Tiny, case: tuple) -> None:
    overrides, pattern, *code = case
    before = contents(begun.runs)
    refused(begun.launch(*overrides.split()), pattern, *code)
    assert contents(begun.runs) == before


def test_quantised_products_need_qwix(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfra.run.find_spec", lambda name: None)
    refused(
        tiny.launch("precision.quantise=int8"),
        r"precision\.quantise=int8: .* qwix, which is not installed; run pip install qwix, or .* extra quantised",
    )


# Overrides that do not go together, and the message.
CROSS_FIELD = {
    "heads over tensor": (
        "model.heads=6 model.head_dim=4 mesh.tensor=4",
        r"model\.heads=6, mesh\.tensor=4: 4 shards do not divide 6 heads; use mesh\.tensor=2 mesh\.fsdp=4",
    ),
    "kv_heads over tensor": (
        "model.kv_heads=2 mesh.tensor=4",
        r"model\.kv_heads=2, mesh\.tensor=4: 4 shards do not divide 2 kv_heads; use mesh\.tensor=2 mesh\.fsdp=4",
    ),
    "kv_heads over heads": (
        "model.kv_heads=3",
        r"model\.heads=8, model\.kv_heads=3: kv_heads must divide heads; use model\.kv_heads=2",
    ),
    "norms by nothing": ("model.norm_eps=0.0", r"model\.norm_eps=0\.0: .*; use model\.norm_eps=1e-05"),
    "scores without a cap": ("model.softcap=0.0", r"model\.softcap=0\.0: .*; use model\.softcap=none"),
    "no positions to learn": (
        "model.learned_positions=0",
        r"model\.learned_positions=0: .*; use model\.learned_positions=none",
    ),
    "biases of experts": (
        "model.experts=experts model.mlp_bias=true",
        r"model\.mlp_bias=true, .*: experts have no biases; use model\.mlp_bias=false",
    ),
    "a capacity that is no number": (
        "model.experts=experts model.experts.capacity_factor=nan",
        r"model\.experts\.capacity_factor=nan: .*; use model\.experts\.capacity_factor=none",
    ),
    "replicas of one batch": (
        "mesh.replica=2 mesh.fsdp=4 rules.batch=(fsdp,expert)",
        r"mesh\.replica=2, rules\.batch=\(fsdp, expert\): replicas would all do the same work; "
        r"use rules\.batch=\(replica,fsdp,expert\)",
    ),
    "latents beside heads of keys": (
        "model.latent=latent model.kv_heads=4",
        r"model\.kv_heads=4, model\.latent=latent: latent attention has none; use model\.kv_heads=none",
    ),
    "latents beside biases": (
        "model.latent=latent model.qkv_bias=true",
        r"model\.qkv_bias=true, model\.latent=latent: latent attention has none; use model\.qkv_bias=false",
    ),
    "latents without positions": (
        "model.latent=latent model.rope=none",
        r"model\.rope=none, model\.latent=latent: latent attention rotates keys; use model\.rope=rope",
    ),
    "latents of no width": (
        "model.latent=latent model.latent.kv_rank=0",
        r"model\.latent\.kv_rank=0: .*; use model\.latent\.kv_rank=512",
    ),
    "odd rotated keys": (
        "model.latent=latent model.latent.rope_dim=5",
        r"model\.rope\.fraction=1\.0, model\.latent\.rope_dim=5: the rotated part .*; use model\.latent\.rope_dim=6",
    ),
    "latents over fsdp": (
        "model.latent=latent model.latent.q_rank=12",
        r"model\.latent\.q_rank=12, mesh\.fsdp=8: 8 shards do not divide 12 q_rank; use mesh\.fsdp=4 mesh\.replica=2",
    ),
    "width over heads": (
        "model.heads=10",
        r"model\.width=32, model\.heads=10: heads must divide the width; use model\.width=40 or set head_dim",
    ),
    "vocabulary over tensor": (
        "model.vocab_size=306 mesh.tensor=4",
        r"model\.vocab_size=306, mesh\.tensor=4: 4 shards do not divide 306 vocab_size; use mesh\.tensor=2 .*",
    ),
    "mlp over tensor": (
        "model.mlp_dim=66 mesh.tensor=4",
        r"model\.mlp_dim=66, mesh\.tensor=4: 4 shards do not divide 66 mlp_dim; use mesh\.tensor=2 mesh\.fsdp=4",
    ),
    "odd mlp over tensor": (
        "model.mlp_dim=65 mesh.tensor=4 train.global_batch=2",
        r"model\.mlp_dim=65, .*; use mesh\.tensor=1 mesh\.fsdp=8 train\.global_batch=8",
    ),
    "sequence over tensor": (
        "data.seq_len=30 mesh.tensor=4",
        r"data\.seq_len=30, mesh\.tensor=4: 4 shards do not divide 30 seq_len; use mesh\.tensor=2 mesh\.fsdp=4",
    ),
    "width over fsdp": (
        "model.width=36 model.heads=6",
        r"model\.width=36, mesh\.fsdp=8: 8 shards do not divide 36 width; use mesh\.fsdp=4 mesh\.replica=2",
    ),
    "batch over devices": (
        "train.global_batch=12",
        r"train\.global_batch=12, mesh\.fsdp=8: the batch does not divide into 8 equal parts; "
        r"use train\.global_batch=16",
    ),
    "batch over microbatches": (
        "train.accumulate=3",
        r"train\.global_batch=8, train\.accumulate=3, mesh\.fsdp=8: .* 24 equal parts; use train\.global_batch=24",
    ),
    "loss chunks": (
        "task.loss_chunks=5",
        r"task\.loss_chunks=5, data\.seq_len=32: chunks must divide the sequence; use task\.loss_chunks=4",
    ),
    "learned positions": (
        "model.learned_positions=16",
        r"data\.seq_len=32, model\.learned_positions=16: sequences are longer than .*; use data\.seq_len=16",
    ),
    "warm-up beyond the end": (
        "optim.schedule.warmup_steps=40",
        r"optim\.schedule\.warmup_steps=40: step 40 has the peak rate, but the last step is 11; "
        r"use optim\.schedule\.warmup_steps=1, or more steps",
    ),
    "decay longer than the run": (
        "optim.schedule=wsd optim.schedule.decay_fraction=1.0",
        r"optim\.schedule\.warmup_steps=2, optim\.schedule\.decay_fraction=1\.0: .* do not fit into 12 steps; "
        r"use optim\.schedule\.warmup_steps=0 or less",
    ),
    "kept checkpoints that are never saved": (
        "checkpoint.keep_every=7",
        r"checkpoint\.keep_every=7, checkpoint\.every=5: .*; use checkpoint\.keep_every=10",
    ),
    "local layers": (
        "model.sights=(local,)",
        r"model\.sights=\(local,\), model\.window=none: local layers need a window; use model\.window=4096",
    ),
    "tokenizer larger than the model": (
        "model.vocab_size=256",
        r"model\.vocab_size=256: the store \S+/store/\w+ has 300 words; use model\.vocab_size=300 or more",
    ),
}


@pytest.mark.parametrize("case", CROSS_FIELD.values(), ids=CROSS_FIELD)
def test_cross_field(begun: Tiny, case: tuple[str, str]) -> None:
    """The message names both fields, and what it suggests works."""
    overrides, pattern = case
    before = contents(begun.runs)
    line = refused(begun.launch(*overrides.split()), pattern)
    assert contents(begun.runs) == before
    check(begun, merged(overrides.split(), fix_of(line)))


def merged(overrides: Sequence[str], fix: Sequence[str]) -> list[str]:
    """The overrides, changed by those of a suggestion."""
    return [f"{path}={value}" for path, value in dict(each.split("=", 1) for each in (*overrides, *fix)).items()]


def check(tiny: Tiny, overrides: Sequence[str]) -> None:
    """Validates as a start on eight devices does."""
    run = tiny.loaded(*overrides)
    validate(run)
    validate(resolved(run, DEVICES))


def test_suggested_batch_trains(tiny: Tiny) -> None:
    line = refused(tiny.launch("train.global_batch=12", "train.steps=3"), r"train\.global_batch=12, .*")
    assert tiny.launch(*fix_of(line), "train.steps=3", "name=fixed").code == 0
    assert set(tiny.losses("fixed")) == {0, 1, 2}
