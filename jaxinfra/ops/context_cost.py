"""Cost model that chooses ring or all-gather attention for context parallelism.

It uses only positions, in NumPy, so that `show` can print the choice without compiling.

`choose_method` takes the method with fewer exposed bytes: the bytes that a device waits for. In a ring, the next keys
and values arrive while a device computes with the current ones: every `FLOPS_PER_BYTE` FLOPs of the device with the
least work hide one byte. Exposed are the gradients of keys and values that return to their shard at the end, and all
gathered bytes. So short shards gather, and long ones use the ring. Gathering is allowed only if the gathered keys and
values take no more memory than the queries and outputs of a shard.
"""

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxinfra.ops.attention import AttentionSpec
from jaxinfra.ops.block_attention import block_is_visible
from jaxinfra.parallel.context import SequenceSharding

type ContextMethod = Literal["ring", "gather"]

FLOPS_PER_BYTE = 10_000
"""The most FLOPs that a device computes while one link brings it a byte: peak FLOP/s over one-way bytes/s are 5,100 on
v5p, 4,400 on v5e and 10,200 on v6e (Austin et al. 2025, "How to Scale Your Model", part 2)."""

BACKWARD_FLOPS = 2.5
"""FLOPs of attention's backward pass over those of its forward pass: five matmuls against two (Dao 2023, section 3)."""


class RingPhase(NamedTuple):
    """Consecutive equal steps of the ring.

    Attributes:
        shift_in: how many shards the keys and values moved before each step.
        shift_out: how many shards they move after each step; 0 after the last.
        steps: number of steps.
        pairs: the block pairs of each step: (block of queries, block of keys, whether it is visible on all shards).
    """

    shift_in: int
    shift_out: int
    steps: int
    pairs: tuple[tuple[int, int, bool], ...]


def ring_phases(sharding: SequenceSharding, spec: AttentionSpec, block_len: int) -> list[RingPhase]:
    """Returns the steps of the ring in which at least one shard has a visible pair; the others are skipped."""
    steps: list[tuple[int, tuple[tuple[int, int, bool], ...]]] = []
    for step in range(sharding.num_shards):
        pairs = []
        for q_block, kv_block in itertools.product(range(sharding.blocks_per_shard), repeat=2):
            offsets = _offsets(sharding, block_len, step, q_block, kv_block)
            visible = np.broadcast_to(block_is_visible(spec, offsets, block_len, block_len), sharding.num_shards)
            if visible.any():
                pairs.append((q_block, kv_block, bool(visible.all())))
        if pairs:
            steps.append((step, tuple(pairs)))
    shifts = [after - before for (before, _), (after, _) in itertools.pairwise(steps)]
    keys = zip([0, *shifts], [*shifts, 0], [pairs for _, pairs in steps], strict=True)
    return [
        RingPhase(shift_in, shift_out, len(list(equal)), pairs)
        for (shift_in, shift_out, pairs), equal in itertools.groupby(keys)
    ]


def _offsets(sharding: SequenceSharding, block_len: int, step: int, q_block: int, kv_block: int) -> np.ndarray:
    """Returns the first position of a shard's queries minus the first position of its current keys, `[shards]`.

    In step s a shard holds the keys of the shard s places before it.
    """
    shards = np.arange(sharding.num_shards)
    return (
        sharding.block_index(shards, q_block) - sharding.block_index((shards - step) % sharding.num_shards, kv_block)
    ) * block_len


def visible_pairs(spec: AttentionSpec, offset: np.ndarray, q_len: int, kv_len: int) -> np.ndarray:
    """Counts the visible pairs of a query and a key; arguments as in `block_is_visible`."""

    def up_to_diagonal(offset: np.ndarray) -> np.ndarray:
        """Counts the pairs with a key at the query's position or before."""
        return _sum_of_minima(offset + q_len, kv_len) - _sum_of_minima(offset, kv_len)

    pairs = up_to_diagonal(offset) if spec.causal else np.full_like(offset, q_len * kv_len)
    return pairs if spec.window is None else np.maximum(pairs - up_to_diagonal(offset - spec.window), 0)


def _sum_of_minima(n: np.ndarray, limit: int) -> np.ndarray:
    """Returns the sum of `min(j, limit)` for j from 1 to `n`; 0 if `n` is not positive."""
    n = np.maximum(n, 0)
    growing = np.minimum(n, limit)
    return growing * (growing + 1) // 2 + (n - growing) * limit


def visible_pairs_by_step(sharding: SequenceSharding, spec: AttentionSpec, block_len: int) -> np.ndarray:
    """Counts the visible pairs of queries and keys: `[steps of the ring, shards]`."""
    blocks, step, by_step = range(sharding.blocks_per_shard), 0, []
    for phase in ring_phases(sharding, spec, block_len):
        for _ in range(phase.steps):
            step += phase.shift_in
            offsets = [_offsets(sharding, block_len, step, q, kv) for q, kv in itertools.product(blocks, blocks)]
            by_step.append(sum(visible_pairs(spec, offset, block_len, block_len) for offset in offsets))
    return np.stack(by_step)


@dataclass(frozen=True, kw_only=True)
class ContextCost:
    """Bytes of one device and one layer, forward and backward pass together.

    Attributes:
        received_bytes: bytes of keys, values and their gradients that arrive.
        exposed_bytes: received bytes that no computation hides.
        held_bytes: bytes of keys and values in memory at once.
    """

    received_bytes: int
    exposed_bytes: int
    held_bytes: int


class ContextChoice(NamedTuple):
    """The method in use, and the costs of all methods for one sequence."""

    method: ContextMethod
    costs: dict[ContextMethod, ContextCost]


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """One attention layer on one device; `seq_len` counts the whole sequence, `itemsize` is in bytes."""

    batch: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int

    def head_elements(self, shards: int) -> int:
        """Returns the number of elements of one key and one value head of a shard; query and output have the same."""
        return self.batch * (self.seq_len // shards) * (self.head_dim + self.value_dim)


def context_costs(
    sharding: SequenceSharding, spec: AttentionSpec, sizes: AttentionSizes
) -> dict[ContextMethod, ContextCost]:
    """Returns the cost of each method.

    With C shards, and `kv` bytes of keys and values per shard, gathering receives `(C - 1) kv` forward, and twice as
    much backward, for keys, values and their gradients. A ring with s transfers receives `s kv` forward, and backward
    `s kv` and `s + 1` times the float32 gradients.
    """
    elements = sizes.head_elements(sharding.num_shards) * sizes.num_kv_heads
    kv, gradients = elements * sizes.itemsize, elements * 4
    least_pairs = visible_pairs_by_step(
        sharding, spec, sizes.seq_len // (sharding.num_shards * sharding.blocks_per_shard)
    ).min(axis=1)
    flops_per_pair = 2 * sizes.batch * sizes.num_heads * (sizes.head_dim + sizes.value_dim)
    hidden = flops_per_pair * least_pairs[:-1] / FLOPS_PER_BYTE
    steps = len(hidden)
    forward = np.maximum(kv - hidden, 0).sum()
    backward = np.maximum(kv + gradients - BACKWARD_FLOPS * hidden, 0).sum()
    last_gradients = gradients if steps else 0
    gathered = 3 * (sharding.num_shards - 1) * kv
    return {
        "ring": ContextCost(
            received_bytes=2 * steps * kv + steps * gradients + last_gradients,
            exposed_bytes=int(forward + backward) + last_gradients,
            held_bytes=2 * kv,
        ),
        "gather": ContextCost(received_bytes=gathered, exposed_bytes=gathered, held_bytes=sharding.num_shards * kv),
    }


def choose_method(sharding: SequenceSharding, spec: AttentionSpec, sizes: AttentionSizes) -> ContextMethod:
    """Returns the method with fewer exposed bytes; "gather" only if its keys and values fit (see the module)."""
    costs = context_costs(sharding, spec, sizes)
    gather, ring = costs["gather"], costs["ring"]
    allowed_bytes = sizes.head_elements(sharding.num_shards) * sizes.num_heads * sizes.itemsize
    fits = gather.held_bytes <= allowed_bytes
    return "gather" if fits and gather.exposed_bytes < ring.exposed_bytes else "ring"
