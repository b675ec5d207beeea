"""The order in which the positions of a sequence lie on its shards, and the way of keys and values round them.

A causal query sees what is before it: of consecutive shards the last has almost all the work. In zig-zag order a
sequence is cut into `2C` blocks for `C` shards, and shard i has blocks i and `2C - 1 - i`: an early one and a late one,
which together see as much as those of every other shard (Dubey et al. 2024, "The Llama 3 herd of models", section
3.3.2). A batch is laid in this order once a step; nothing but attention and positions can tell.

This file knows where blocks lie, not what is computed on them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class SequenceSharding:
    """Where the positions of a sequence are.

    Attributes:
        axes: the mesh axes that sequences are spread over, each of more than one device.
        num_shards: into how many shards.
        zigzag: each shard has an early and a late block; otherwise consecutive positions.
    """

    axes: tuple[str, ...] = ()
    num_shards: int = 1
    zigzag: bool = False

    @property
    def blocks_per_shard(self) -> int:
        """Blocks of consecutive positions that one shard has."""
        return 2 if self.zigzag and self.num_shards > 1 else 1

    def block_index[I: (np.ndarray, jax.Array)](self, shard: I, piece: int) -> I:
        """The number of the block that is this piece of a shard."""
        return 2 * self.num_shards - 1 - shard if piece else shard

    def to_shard_order(self, x: jax.Array, dim: int) -> jax.Array:
        """`x`, whole along `dim` and in the order of positions, in this order."""
        if self.blocks_per_shard == 1:
            return x
        early, late = jnp.split(self._blocks(x, dim, (2, self.num_shards)), 2, axis=dim)
        pairs = [jnp.squeeze(early, dim), jnp.flip(jnp.squeeze(late, dim), dim)]
        return jnp.stack(pairs, axis=dim + 1).reshape(x.shape)

    def to_natural_order(self, x: jax.Array, dim: int) -> jax.Array:
        """The inverse of `to_shard_order`."""
        if self.blocks_per_shard == 1:
            return x
        early, late = jnp.split(self._blocks(x, dim, (self.num_shards, 2)), 2, axis=dim + 1)
        return jnp.concatenate([early, jnp.flip(late, dim)], axis=dim).reshape(x.shape)

    def _blocks(self, x: jax.Array, dim: int, split: tuple[int, int]) -> jax.Array:
        length = x.shape[dim] // (2 * self.num_shards)
        return x.reshape(*x.shape[:dim], *split, length, *x.shape[dim + 1 :])

    def positions(self, length: int) -> jax.Array:
        """The position that stands at each place of a whole sequence, int32 `[length]`."""
        return self.to_shard_order(jnp.arange(length, dtype=jnp.int32), 0)

    def rotate[T](self, tree: T, by: int) -> T:
        """In a `shard_map`: what every shard has, sent to the shard `by` after it, round the ring."""
        if by % self.num_shards == 0:
            return tree
        route = [(shard, (shard + by) % self.num_shards) for shard in range(self.num_shards)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, route), tree)
