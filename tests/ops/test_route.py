"""The way round the ring, what every form costs, which is taken, and that no shard has more to compute than another."""

import numpy as np
import pytest

from jaxinfra.ops.attention import See, visible
from jaxinfra.ops.route import FLOPS_A_BYTE, Form, Heads, cheaper, costs, legs, visible_pairs, work
from jaxinfra.ops.tile import _mask, reaches
from jaxinfra.parallel.context import SequenceSharding


def sharding(shards: int, *, zigzag: bool = True) -> SequenceSharding:
    return SequenceSharding(axes=("context",), num_shards=shards, zigzag=zigzag)


# The way round the ring


def on_the_way(sharding: SequenceSharding, see: See, block: int) -> list[int]:
    """Of each step its distance from home."""
    return np.cumsum([leg.arrive for leg in legs(sharding, see, block) for _ in range(leg.steps)]).tolist()


def test_zigzag_halves_every_step() -> None:
    """Of four pairs of blocks at home three are seen; later one by all shards, and one of two others by each."""
    home, middle, last = legs(sharding(8), See(), 4)
    assert [pair[2] for pair in home.pairs] == [True, True, True]
    for leg in (middle, last):
        assert leg.pairs == ((0, 0, False), (1, 0, True), (1, 1, False))
    assert (home.steps, middle.steps, last.steps) == (1, 6, 1)
    shards = np.arange(8)
    for step in range(1, 8):
        source = (shards - step) % 8
        seen = [sharding(8).block_index(shards, p) > sharding(8).block_index(source, r) for p, r, _ in middle.pairs]
        assert np.array(seen).sum(axis=0).tolist() == [2] * 8


def test_a_window_goes_to_neighbors_alone() -> None:
    assert on_the_way(sharding(8), See(window=4), 4) == [0, 1, 7]
    assert on_the_way(sharding(8), See(window=1), 4) == [0]
    assert on_the_way(sharding(8, zigzag=False), See(window=10), 4) == [0, 1, 2, 3]


# The work


@pytest.mark.parametrize("see", [See(), See(window=3), See(window=9), See(causal=False), See(causal=False, window=2)])
def test_pairs_are_counted_as_the_mask_has_them(see: See) -> None:
    for offset in range(-14, 15):
        mask = visible(see, offset + np.arange(6)[None], np.arange(8)[None], None)
        assert visible_pairs(see, np.array(offset), 6, 8) == np.asarray(mask).sum(), offset


@pytest.mark.parametrize("shards", [2, 3, 4, 8, 16])
def test_every_shard_has_as_much_to_compute_as_any_other_in_every_step(shards: int) -> None:
    found = work(sharding(shards), See(), 16)
    assert found.shape == (shards, shards)
    assert (found == found[:, :1]).all()
    length = 2 * shards * 16
    assert found.sum() == length * (length + 1) // 2
    consecutive = work(sharding(shards, zigzag=False), See(), 32)
    assert consecutive.sum() == found.sum()
    assert consecutive.sum(axis=0).max() > 1.4 * found.sum(axis=0).max()


@pytest.mark.parametrize("form", ["ring", "gather"])
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_kernels_compute_equally_many_blocks_on_every_shard(shards: int, form: Form) -> None:
    """Read from what the kernels are told, of queries and keys in blocks of 512."""
    zigzag, block = sharding(shards), 1024
    pieces, length = range(zigzag.blocks_per_shard), 2 * shards * 1024

    def blocks(first: int, keys: int) -> int:
        return int(np.asarray(_mask(See(), first, block, keys, by_key=False).block_mask).sum())

    def of_shard(shard: int) -> int:
        starts = [int(zigzag.block_index(np.array(shard), piece)) * block for piece in pieces]
        if form == "gather":
            return sum(blocks(start, length) for start in starts)
        total, source = 0, shard
        for leg in legs(zigzag, See(), block):
            for _ in range(leg.steps):
                for piece, other, _ in leg.pairs:
                    offset = starts[piece] - int(zigzag.block_index(np.array(source), other)) * block
                    total += blocks(offset, block) if reaches(See(), offset, block, block) else 0
                source = (source - leg.depart) % shards
        return total

    of_all = [of_shard(shard) for shard in range(shards)]
    assert len(set(of_all)) == 1
    side = length // 512
    assert sum(of_all) == side * (side + 1) // 2


# The choice


def heads(**changes: int) -> Heads:
    plain = {"rows": 1, "length": 65536, "heads": 32, "groups": 8, "head_dim": 128, "value_dim": 128, "itemsize": 2}
    return Heads(**{**plain, **changes})


def test_costs_are_in_bytes() -> None:
    found = costs(sharding(4), See(), heads())
    shard = 2 * 16384 * 8 * 128 * 2
    gather, ring = found["gather"], found["ring"]
    assert (gather.receives, gather.waits, gather.holds) == (9 * shard, 9 * shard, 4 * shard)
    # What goes on is hidden on shards this long; gradients, in float32, go home when all is computed.
    assert (ring.receives, ring.waits, ring.holds) == (6 * shard + 4 * 2 * shard, 2 * shard, 2 * shard)
    assert ring.allowed == 4 * shard


def test_what_is_hidden_is_what_is_computed_meanwhile() -> None:
    short = heads(length=4096)
    found, shard = costs(sharding(4), See(), short)["ring"], 2 * 1024 * 8 * 128 * 2
    hidden = 2 * 32 * 256 * work(sharding(4), See(), 512)[:-1, 0] / FLOPS_A_BYTE
    assert (hidden > 0).all() and (hidden < shard).all()
    assert found.waits == int((shard - hidden).sum() + (3 * shard - 2.5 * hidden).sum()) + 2 * shard
    # The first shard of a sequence in consecutive order has nothing to do but at home, and all wait for it.
    consecutive = costs(sharding(4, zigzag=False), See(), heads())["ring"]
    assert consecutive.waits > 2 * costs(sharding(4), See(), heads())["ring"].waits


def test_short_shards_gather_and_long_ones_go_round() -> None:
    for length, form in ((4096, "gather"), (8192, "gather"), (32768, "ring"), (131072, "ring")):
        assert cheaper(sharding(4), See(), heads(length=length)) == form


def test_what_is_gathered_is_no_more_than_queries_and_results() -> None:
    """It holds `C * G` heads of a shard's positions: no more than the `H` of queries that are there anyhow."""
    for shards, form in ((2, "gather"), (4, "gather"), (8, "ring")):
        assert cheaper(sharding(shards), See(), heads(length=1024 * shards)) == form
    assert cheaper(sharding(16), See(), heads(heads=128, length=2048)) == "gather"
    assert cheaper(sharding(2), See(), heads(groups=32, length=2048)) == "ring"


def test_a_short_window_takes_the_ring() -> None:
    many = heads(heads=64, length=2048)
    assert cheaper(sharding(8), See(), many) == "gather"
    assert cheaper(sharding(8), See(window=64), many) == "ring"
