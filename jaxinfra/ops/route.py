"""Keys and values over the shards of a sequence: the ways that they can take, what each costs, and which is taken.

Arithmetic on positions alone, in NumPy: nothing is traced here, and `show` says the same as what is compiled.

The choice (`cheaper`): the form whose bytes a device waits for are fewer. Of a ring, keys and values of the next step
are received while those of this one are computed on: a byte is hidden by `FLOPS_A_BYTE` FLOPs of the device that has
least to do. The last gradients, on their way home, are waited for, and all that is gathered is. So short shards gather,
and long ones go round. And gathering must not hold more than queries and results of the shard, which are there anyhow.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxinfra.ops.attention import See
from jaxinfra.ops.tile import reaches
from jaxinfra.parallel.context import SequenceSharding

type Form = Literal["ring", "gather"]

FLOPS_A_BYTE = 10_000
"""What a device computes while one link brings it a byte, at most: peak FLOP/s by bytes/s one way are 5,100 on v5p,
4,400 on v5e and 10,200 on v6e (Austin et al. 2025, "How to Scale Your Model", part 2)."""

BACKWARD = 2.5
"""FLOPs of the backward pass of attention by those of the forward pass: five products for two (Dao 2023, section 3)."""


class Leg(NamedTuple):
    """Consecutive steps round the ring that are alike.

    Attributes:
        arrive: by how many shards keys and values came to a step.
        depart: by how many they go on after it; 0 after the last.
        steps: how many steps.
        pairs: `(piece of queries, piece of keys, whether all shards see something of it)` of every step.
    """

    arrive: int
    depart: int
    steps: int
    pairs: tuple[tuple[int, int, bool], ...]


def legs(sharding: SequenceSharding, see: See, block: int) -> list[Leg]:
    """The way of keys and values, in blocks of so many positions, from home to the last shard that sees them."""
    every = range(sharding.blocks_per_shard)

    def seen(step: int, piece: int, other: int) -> np.ndarray:
        """By shard, whether its piece sees the other piece of the shard `step` before it."""
        return np.broadcast_to(
            reaches(see, _offsets(sharding, block, step, piece, other), block, block), sharding.num_shards
        )

    seens = [{(p, r): seen(step, p, r) for p in every for r in every} for step in range(sharding.num_shards)]
    steps = [step for step, pairs in enumerate(seens) if any(found.any() for found in pairs.values())]
    arrive = [0, *(after - before for before, after in itertools.pairwise(steps))]
    alike = [
        (come, go, tuple((*pair, bool(found.all())) for pair, found in seens[step].items() if found.any()))
        for step, come, go in zip(steps, arrive, [*arrive[1:], 0], strict=True)
    ]
    return [Leg(*key[:2], len(list(run)), key[2]) for key, run in itertools.groupby(alike)]


def _offsets(sharding: SequenceSharding, block: int, step: int, piece: int, other: int) -> np.ndarray:
    """By shard, how far its piece begins after the other piece of the shard `step` before it."""
    shards = np.arange(sharding.num_shards)
    return (
        sharding.block_index(shards, piece) - sharding.block_index((shards - step) % sharding.num_shards, other)
    ) * block


def visible_pairs(see: See, offset: Any, queries: int, keys: int) -> Any:
    """How many pairs of a query and a key are seen, documents aside; see `tile.reaches` for the arguments."""

    def up_to(first: Any) -> Any:
        """Pairs whose key stands at the place of the query or before, the first query's being `first`."""
        return _clipped(first + queries, keys) - _clipped(first, keys)

    seen = up_to(offset) if see.causal else np.full_like(offset, queries * keys)
    return seen if see.window is None else np.maximum(seen - up_to(offset - see.window), 0)


def _clipped(n: Any, most: int) -> Any:
    """The sum of `min(j, most)` for j from 1 to `n`; 0 where `n` is not positive."""
    n = np.maximum(n, 0)
    few = np.minimum(n, most)
    return few * (few + 1) // 2 + (n - few) * most


def work(sharding: SequenceSharding, see: See, block: int) -> np.ndarray:
    """Pairs of queries and keys that are seen: `[steps round the ring, shards]`."""
    pieces, distance, found = range(sharding.blocks_per_shard), 0, []
    for leg in legs(sharding, see, block):
        for _ in range(leg.steps):
            distance += leg.arrive
            offsets = [_offsets(sharding, block, distance, p, r) for p in pieces for r in pieces]
            found.append(sum(visible_pairs(see, offset, block, block) for offset in offsets))
    return np.stack(found)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes of one device and one layer, forward and backward pass together.

    Attributes:
        receives: keys, values and their gradients.
        waits: those of them that no computation hides.
        holds: keys and values that it has at once.
        allowed: what it has anyhow of queries and results.
    """

    receives: int
    waits: int
    holds: int
    allowed: int


@dataclass(frozen=True, kw_only=True)
class Heads:
    """One layer's part on one device: sequences, positions of a whole sequence, heads, and bytes of a number."""

    rows: int
    length: int
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    itemsize: int


def costs(sharding: SequenceSharding, see: See, heads: Heads) -> dict[Form, Cost]:
    """What each form receives, waits for and holds.

    With `kv` the bytes of keys and values of one shard, gathering receives `(C - 1) kv` forward, and backward as much
    again and their gradients; the ring receives `s kv` forward for s steps after the first, and backward that and
    gradients in float32 on each step, and home.
    """
    own = heads.rows * (heads.length // sharding.num_shards) * (heads.head_dim + heads.value_dim)
    kv, gradients = own * heads.groups * heads.itemsize, own * heads.groups * 4
    pairs = work(sharding, see, heads.length // (sharding.num_shards * sharding.blocks_per_shard)).min(axis=1)
    hidden = 2 * heads.rows * heads.heads * (heads.head_dim + heads.value_dim) * pairs[:-1] / FLOPS_A_BYTE
    steps = len(hidden)
    forward = np.maximum(kv - hidden, 0).sum()
    backward = np.maximum(kv + gradients - BACKWARD * hidden, 0).sum()
    home = gradients if steps else 0
    allowed, gathered = own * heads.heads * heads.itemsize, 3 * (sharding.num_shards - 1) * kv
    return {
        "ring": Cost(
            receives=2 * steps * kv + steps * gradients + home,
            waits=int(forward + backward) + home,
            holds=2 * kv,
            allowed=allowed,
        ),
        "gather": Cost(receives=gathered, waits=gathered, holds=sharding.num_shards * kv, allowed=allowed),
    }


class Across(NamedTuple):
    """What is taken, and what every form would cost for one sequence."""

    form: Form
    costs: dict[Form, Cost]


def cheaper(sharding: SequenceSharding, see: See, heads: Heads) -> Form:
    """The form to take: see the head of this file."""
    found = costs(sharding, see, heads)
    gather, ring = found["gather"], found["ring"]
    return "gather" if gather.holds <= gather.allowed and gather.waits < ring.waits else "ring"
