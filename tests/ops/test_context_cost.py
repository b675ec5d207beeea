"""The steps of ring attention, the costs of both methods, the choice between them, and equal work for all shards."""

import numpy as np
import pytest

from jaxinfra.ops.attention import AttentionSpec, attention_mask
from jaxinfra.ops.block_attention import block_is_visible
from jaxinfra.ops.context_cost import (
    FLOPS_PER_BYTE,
    AttentionSizes,
    ContextCost,
    ContextMethod,
    choose_method,
    context_costs,
    ring_steps,
    visible_pairs,
    visible_pairs_by_step,
)
from jaxinfra.ops.splash_blocks import mask_info
from jaxinfra.parallel.context import SequenceSharding

CAUSAL = AttentionSpec()


def shards_of(shards: int, *, zigzag: bool = True) -> SequenceSharding:
    return SequenceSharding(axes=("context",), num_shards=shards, zigzag=zigzag)


def shifts(sharding: SequenceSharding, spec: AttentionSpec, block_len: int) -> list[int]:
    """For each step, how many shards the keys have moved from their own."""
    return np.cumsum([step.shift_in for step in ring_steps(sharding, spec, block_len)]).tolist()


def test_zigzag_order_halves_the_work_of_every_step() -> None:
    """Three of four pairs of blocks are visible in the first step, and two in each later one."""
    first, *later = ring_steps(shards_of(8), CAUSAL, 4)
    assert [on_all_shards for _, _, on_all_shards in first.pairs] == [True, True, True]
    assert len(later) == 7
    shards = np.arange(8)
    for distance, step in enumerate(later, start=1):
        assert step.pairs == ((0, 0, False), (1, 0, True), (1, 1, False))
        source = (shards - distance) % 8
        visible = [
            shards_of(8).block_index(shards, q) > shards_of(8).block_index(source, kv) for q, kv, _ in step.pairs
        ]
        assert np.array(visible).sum(axis=0).tolist() == [2] * 8


def test_a_window_reaches_near_shards_only() -> None:
    assert shifts(shards_of(8), AttentionSpec(window=4), 4) == [0, 1, 7]
    assert shifts(shards_of(8), AttentionSpec(window=1), 4) == [0]
    assert shifts(shards_of(8, zigzag=False), AttentionSpec(window=10), 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2, 3, 9])
def test_visible_pairs_are_those_of_the_mask(causal: bool, window: int | None) -> None:
    spec = AttentionSpec(causal=causal, window=window)
    for offset in range(-14, 15):
        mask = attention_mask(spec, (offset + np.arange(6)[None], np.arange(8)[None]), None)
        assert visible_pairs(spec, np.array(offset), 6, 8) == np.asarray(mask).sum(), offset


@pytest.mark.parametrize("shards", [2, 3, 4, 8, 16])
def test_every_shard_has_equal_work_in_every_step(shards: int) -> None:
    zigzag = visible_pairs_by_step(shards_of(shards), CAUSAL, 16)
    assert zigzag.shape == (shards, shards)
    assert (zigzag == zigzag[:, :1]).all()
    length = 2 * shards * 16
    assert zigzag.sum() == length * (length + 1) // 2
    consecutive = visible_pairs_by_step(shards_of(shards, zigzag=False), CAUSAL, 32)
    assert consecutive.sum() == zigzag.sum()
    assert consecutive.sum(axis=0).max() > 1.4 * zigzag.sum(axis=0).max()


@pytest.mark.parametrize("method", ["ring", "gather"])
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_kernels_compute_equally_many_blocks_on_every_shard(shards: int, method: ContextMethod) -> None:
    """Counts the kernel blocks of 512 queries and 512 keys in the masks that the kernels get."""
    zigzag, block_len = shards_of(shards), 1024
    seq_len = 2 * shards * block_len

    def kernel_blocks(offset: np.ndarray, keys: int) -> int:
        return int(np.asarray(mask_info(CAUSAL, offset, block_len, keys, by_key=False).block_mask).sum())

    def blocks_of_shard(shard: int) -> int:
        starts = [zigzag.block_index(np.array(shard), piece) * block_len for piece in range(zigzag.blocks_per_shard)]
        if method == "gather":
            return sum(kernel_blocks(start, seq_len) for start in starts)
        total, source = 0, shard
        for step in ring_steps(zigzag, CAUSAL, block_len):
            for q, kv, _ in step.pairs:
                offset = starts[q] - zigzag.block_index(np.array(source), kv) * block_len
                if block_is_visible(CAUSAL, offset, block_len, block_len):
                    total += kernel_blocks(offset, block_len)
            source = (source - step.shift_out) % shards
        return total

    blocks = [blocks_of_shard(shard) for shard in range(shards)]
    assert len(set(blocks)) == 1
    side = seq_len // 512
    assert sum(blocks) == side * (side + 1) // 2


def sizes(**changes: int) -> AttentionSizes:
    heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "value_dim": 128}
    return AttentionSizes(**{"batch": 1, "seq_len": 65536, **heads, "itemsize": 2, **changes})


def test_costs_are_in_bytes() -> None:
    costs = context_costs(shards_of(4), CAUSAL, sizes())
    kv = 2 * 16384 * 8 * 128 * 2
    assert costs["gather"] == ContextCost(received_bytes=9 * kv, exposed_bytes=9 * kv, held_bytes=4 * kv)
    # Shards this long hide all transfers but the last: the float32 gradients return when everything is computed.
    assert costs["ring"] == ContextCost(received_bytes=6 * kv + 4 * 2 * kv, exposed_bytes=2 * kv, held_bytes=2 * kv)


def test_computation_hides_the_transfers_of_its_step() -> None:
    exposed = context_costs(shards_of(4), CAUSAL, sizes(seq_len=4096))["ring"].exposed_bytes
    kv = 2 * 1024 * 8 * 128 * 2
    hidden = 2 * 32 * 256 * visible_pairs_by_step(shards_of(4), CAUSAL, 512)[:-1, 0] / FLOPS_PER_BYTE
    assert (hidden > 0).all() and (hidden < kv).all()
    assert exposed == int((kv - hidden).sum() + (3 * kv - 2.5 * hidden).sum()) + 2 * kv
    # In consecutive order the first shard has work in the first step only, and all others wait for it.
    consecutive = context_costs(shards_of(4, zigzag=False), CAUSAL, sizes())["ring"]
    assert consecutive.exposed_bytes > 2 * context_costs(shards_of(4), CAUSAL, sizes())["ring"].exposed_bytes


def test_short_shards_gather_and_long_ones_use_the_ring() -> None:
    for seq_len, method in ((4096, "gather"), (8192, "gather"), (32768, "ring"), (131072, "ring")):
        assert choose_method(shards_of(4), CAUSAL, sizes(seq_len=seq_len)) == method


def test_gathered_keys_and_values_are_no_larger_than_queries_and_outputs() -> None:
    """C shards gather `C * G` heads of a shard's positions; that must not exceed the H heads of the queries."""
    for shards, method in ((2, "gather"), (4, "gather"), (8, "ring")):
        assert choose_method(shards_of(shards), CAUSAL, sizes(seq_len=1024 * shards)) == method
    assert choose_method(shards_of(16), CAUSAL, sizes(num_heads=128, seq_len=2048)) == "gather"
    assert choose_method(shards_of(2), CAUSAL, sizes(num_kv_heads=32, seq_len=2048)) == "ring"


def test_a_short_window_uses_the_ring() -> None:
    many_heads = sizes(num_heads=64, seq_len=2048)
    assert choose_method(shards_of(8), CAUSAL, many_heads) == "gather"
    assert choose_method(shards_of(8), AttentionSpec(window=64), many_heads) == "ring"
