"""What TPUs run of attention and loss, in the text and the memory of a compiled step."""

import re
from dataclasses import replace

import pytest

from jaxinfra.data.tokens import TokenData
from jaxinfra.models.remat import Remat
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.attention import splash_block
from jaxinfra.parallel.mesh import MeshConfig
from jaxinfra.plan.compiled import Compiled, compile_step
from jaxinfra.plan.topology import parse
from jaxinfra.run import Run
from jaxinfra.train.loop import TrainConfig

LAYERS, VOCAB, ROWS = 2, 32768, 8
MODEL = TransformerConfig(
    vocab_size=VOCAB, layers=LAYERS, width=256, heads=2, kv_heads=1, head_dim=128, mlp_dim=512, remat="full"
)


def compiled(length: int, remat: Remat) -> tuple[Compiled, str]:
    """A step on four chips with its text."""
    run = Run(
        name="kernels",
        model=replace(MODEL, remat=remat),
        data=TokenData(store="none", seq_len=length),
        mesh=MeshConfig(fsdp=4),
        train=TrainConfig(global_batch=4 * ROWS),
    )
    texts: list[str] = []
    return compile_step(run, parse("v5p:2x2x1"), dump=texts.append, report=lambda line: None), texts[0]


def blocks(text: str) -> set[int]:
    """Sizes of the blocks of the attention kernels."""
    return {int(size) for size in re.findall(r"\bblock_(?:q|kv)\w*\W+(\d+)", text)}


@pytest.mark.slow
@pytest.mark.parametrize(("length", "remat", "forward"), [(640, "full", 2), (1024, "dots_and_attention", 1)], ids=str)
def test_splash_attention_runs_in_blocks_that_fit_the_length(length: int, remat: Remat, forward: int) -> None:
    """Once a layer and direction, and again only where the policy keeps nothing; logits are never whole."""
    found, text = compiled(length, remat)
    runs = {kernel.name: kernel.runs for kernel in found.kernels}
    assert {re.sub(r"_(no_)?(segmented|residuals)", "", name): n for name, n in runs.items()} == {
        "splash_mqa_fwd": forward * LAYERS,
        "splash_mqa_dq": LAYERS,
        "splash_mqa_dkv": LAYERS,
    }, runs
    assert blocks(text) == {splash_block(length)}
    assert found.memory.temporaries < 2 * ROWS * length * VOCAB
