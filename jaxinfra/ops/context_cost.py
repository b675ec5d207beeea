"""Cost model that chooses ring or all-gather attention for context parallelism.

It uses only positions, in NumPy, so that `show` can print the choice without compiling.

`choose_method` takes the method with fewer exposed bytes: the bytes that a device waits for. In a ring, the next keys
and values arrive while a device computes with the current ones: every `FLOPS_PER_BYTE` FLOPs of the device with the
least work hide one byte. Exposed are the gradients of keys and values that return to their shard at the end, and all
gathered bytes. So short shards gather, and long ones use the ring. Gathering is allowed only if the gathered keys and
values take no more memory than the queries and outputs of a shard.
"""

import functools
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


class RingStep(NamedTuple):
    """One step of the ring.

    Attributes:
        shift_in: by how many shards the keys and values moved before the step; 0 before the first.
        shift_out: by how many shards they move after the step; 0 after the last.
        pairs: the pairs of blocks to compute, each `(block of queries, block of keys, visible on all shards)`. If the
            last is False, the mask hides all keys from all queries on some shards.
    """

    shift_in: int
    shift_out: int
    pairs: tuple[tuple[int, int, bool], ...]


def ring_steps(sharding: SequenceSharding, spec: AttentionSpec, block_len: int) -> list[RingStep]:
    """Returns the steps of the ring in which at least one shard has a visible pair; the others are skipped.

    If a window reaches back by one shard, there are two steps: with a shard's own keys and with those before them.
    """
    # By how many shards keys have moved, from the shard that they belong to.
    pairs = {moved: _visible_block_pairs(sharding, spec, block_len, moved) for moved in range(sharding.num_shards)}
    distances = [distance for distance, visible in pairs.items() if visible]
    shifts = [after - before for before, after in itertools.pairwise(distances)]
    steps = zip([0, *shifts], [*shifts, 0], distances, strict=True)
    return [RingStep(shift_in, shift_out, pairs[distance]) for shift_in, shift_out, distance in steps]


def _visible_block_pairs(
    sharding: SequenceSharding, spec: AttentionSpec, block_len: int, distance: int
) -> tuple[tuple[int, int, bool], ...]:
    """Returns `RingStep.pairs` of the step in which every shard holds the keys of the shard `distance` before it."""
    pairs = []
    for q, kv in itertools.product(range(sharding.blocks_per_shard), repeat=2):
        offsets = _offsets(sharding, block_len, distance, q, kv)
        visible = np.broadcast_to(block_is_visible(spec, offsets, block_len, block_len), sharding.num_shards)
        if visible.any():
            pairs.append((q, kv, bool(visible.all())))
    return tuple(pairs)


def _offsets(sharding: SequenceSharding, block_len: int, distance: int, q: int, kv: int) -> np.ndarray:
    """Returns each shard's `QKVBlock.offset`, `[shards]`, if it holds the keys of the shard `distance` before it."""
    shards = np.arange(sharding.num_shards)
    source = (shards - distance) % sharding.num_shards
    return (sharding.block_index(shards, q) - sharding.block_index(source, kv)) * block_len


def visible_pairs(spec: AttentionSpec, offset: np.ndarray, q_len: int, kv_len: int) -> np.ndarray:
    """Counts the visible pairs of one query and one key; arguments as in `block_is_visible`."""
    # Keys are numbered from 0. A query at position 5 with a window of 3 sees keys 3 to 5: 6 keys up to its own position
    # minus 3 before its window, where only the keys from 0 to `kv_len - 1` exist.
    position = offset[..., None] + np.arange(q_len)
    up_to_own = np.clip(position + 1, 0, kv_len) if spec.causal else np.full_like(position, kv_len)
    before_window = 0 if spec.window is None else np.clip(position + 1 - spec.window, 0, kv_len)
    return (up_to_own - before_window).sum(axis=-1)


@functools.cache  # takes a second for 64 shards of a million tokens, and a program asks once per traced layer
def visible_pairs_by_step(sharding: SequenceSharding, spec: AttentionSpec, block_len: int) -> np.ndarray:
    """Counts the visible pairs of queries and keys: `[steps of the ring, shards]`."""
    distance, by_step = 0, []
    for step in ring_steps(sharding, spec, block_len):
        distance += step.shift_in
        offsets = [_offsets(sharding, block_len, distance, q, kv) for q, kv, _ in step.pairs]
        by_step.append(visible_pairs(spec, np.stack(offsets), block_len, block_len).sum(axis=0))
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
    kv, gradients = elements * sizes.itemsize, elements * 4  # gradients are float32
    block_len = sizes.seq_len // (sharding.num_shards * sharding.blocks_per_shard)
    least_pairs = visible_pairs_by_step(sharding, spec, block_len).min(axis=1)
    # A multiplication and an addition for each feature of a key and of a value.
    flops_per_pair = 2 * sizes.batch * sizes.num_heads * (sizes.head_dim + sizes.value_dim)
    # Transfers overlap with all steps but the last: the bytes that each of these steps hides.
    hidden = flops_per_pair * least_pairs[:-1] / FLOPS_PER_BYTE
    transfers = len(hidden)
    forward = np.maximum(kv - hidden, 0).sum()
    backward = np.maximum(kv + gradients - BACKWARD_FLOPS * hidden, 0).sum()
    last_gradients = gradients if transfers else 0
    gathered = 3 * (sharding.num_shards - 1) * kv
    return {
        "ring": ContextCost(
            received_bytes=2 * transfers * kv + transfers * gradients + last_gradients,
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
