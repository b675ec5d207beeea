"""How the positions of a sequence are sharded for context parallelism.

A causal query attends to earlier positions only, so with consecutive shards the last one would have the most work. In
zigzag order a sequence is cut into `2C` blocks for `C` shards, and shard i holds blocks i and `2C - 1 - i`: every shard
then has equal work (Dubey et al. 2024, "The Llama 3 herd of models", section 3.3.2). Three shards hold the blocks
`0 5 | 1 4 | 2 3`. A step reorders its batch once; only attention and positions depend on the order.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class SequenceSharding:
    """The order of positions over the shards of a sequence.

    Attributes:
        axes: mesh axes that shard sequences; axes of size 1 are left out.
        num_shards: number of shards of a sequence.
        zigzag: whether each shard holds an early and a late block, instead of consecutive positions.
        unroll_loops: whether loops whose steps communicate are unrolled (see `mesh.needs_unrolled_loops`).
    """

    axes: tuple[str, ...] = ()
    num_shards: int = 1
    zigzag: bool = False
    unroll_loops: bool = False

    @property
    def blocks_per_shard(self) -> int:
        """Number of blocks of consecutive positions in one shard."""
        return 2 if self.zigzag and self.num_shards > 1 else 1

    def block_index[I: (np.ndarray, jax.Array)](self, shard: I, block: int) -> I:
        """Returns the index in the sequence of the first (0) or second (1) block of each shard in `shard`."""
        return 2 * self.num_shards - 1 - shard if block else shard

    def to_shard_order(self, x: jax.Array, dim: int) -> jax.Array:
        """Reorders positions along `dim`, which is unsharded, so that each shard's blocks are consecutive."""
        if self.blocks_per_shard == 1:
            return x
        # Blocks 0 1 2 3 4 5: early ones 0 1 2, late ones in reverse 5 4 3, in pairs 0 5 | 1 4 | 2 3.
        early, late = jnp.split(self._split(x, dim, 2 * self.num_shards), 2, axis=dim)
        return jnp.stack([early, jnp.flip(late, dim)], axis=dim + 1).reshape(x.shape)

    def to_natural_order(self, x: jax.Array, dim: int) -> jax.Array:
        """Reverses `to_shard_order`."""
        if self.blocks_per_shard == 1:
            return x
        early, late = jnp.split(self._split(x, dim, self.num_shards, 2), 2, axis=dim + 1)
        return jnp.concatenate([early, jnp.flip(late, dim)], axis=dim).reshape(x.shape)

    def _split(self, x: jax.Array, dim: int, *blocks: int) -> jax.Array:
        """Splits `dim` into blocks: `[..., T, ...]` to `[..., *blocks, T / (2 * num_shards), ...]`."""
        length = x.shape[dim] // (2 * self.num_shards)
        return x.reshape(*x.shape[:dim], *blocks, length, *x.shape[dim + 1 :])

    def gather_blocks(self, x: jax.Array) -> jax.Array:
        """Gathers a value of each of the shard's blocks, `[blocks_per_shard, ...]`, from all shards; in a `shard_map`.

        Returns:
            `[num_shards * blocks_per_shard, ...]`, in the order of the sequence.
        """
        return self.to_natural_order(jax.lax.all_gather(x, self.axes, tiled=True), 0)

    def own_blocks(self) -> jax.Array:
        """Returns the indices in the sequence of the shard's blocks, int32 `[blocks_per_shard]`; in a `shard_map`."""
        shard = jax.lax.axis_index(self.axes)
        return jnp.stack([self.block_index(shard, block) for block in range(self.blocks_per_shard)])

    def positions(self, length: int) -> jax.Array:
        """Returns the positions of a sequence in shard order, int32 `[length]`."""
        return self.to_shard_order(jnp.arange(length, dtype=jnp.int32), 0)

    def rotate[T](self, tree: T, offset: int) -> T:
        """Sends each shard's arrays to the shard `offset` after it, around the ring; inside a `shard_map`."""
        if offset % self.num_shards == 0:
            return tree
        source_target = [(shard, (shard + offset) % self.num_shards) for shard in range(self.num_shards)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, source_target), tree)
