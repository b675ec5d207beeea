"""Layouts of a tensor in a checkpoint and of our parameter, as one pattern that is read in both directions.

`(h k) d -> d h k` says that the tensor has two dimensions, the first of which merges `h` and `k`, and that the
parameter has three. A dimension merges its factors with the first one outermost, as in einops. A number is a factor of
that size.

Braces mark what a tensor holds besides other parts. In `({h k}) d -> d h k` the rows of other parameters come before or
after those of this one (a fused projection of queries, keys and values); in `(f {1}) d -> d f` rows of two parameters
alternate.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial

import jax
import numpy as np


@dataclass(frozen=True)
class Dim:
    """A dimension of a tensor in a checkpoint."""

    outer: tuple[str, ...]  # factors outside of the braces, before them; all factors if there are none
    own: tuple[str, ...] | None = None  # factors in the braces; None without braces
    inner: tuple[str, ...] = ()  # factors after the braces

    @property
    def factors(self) -> tuple[str, ...]:
        """All factors, outermost first."""
        return (*self.outer, *(self.own or ()), *self.inner)


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: dimensions of the tensor in the checkpoint, and of our parameter."""

    theirs: tuple[Dim, ...]
    ours: tuple[tuple[str, ...], ...]

    def sizes(self, shape: Sequence[int], given: Mapping[str, int]) -> dict[str, int]:
        """Returns the size of each factor of a parameter; one factor of each of its dimensions may be unknown."""
        sizes = dict(given) | {name: int(name) for dim in self.ours for name in dim if name.isdigit()}
        assert len(shape) == len(self.ours), (shape, self.ours)
        for size, names in zip(shape, self.ours, strict=True):
            unknown = [name for name in names if name not in sizes]
            known = math.prod(sizes[name] for name in names if name not in unknown)
            assert len(unknown) <= 1 and size % known == 0, (shape, self.ours, given)
            sizes |= {name: size // known for name in unknown}
        return sizes


@cache
def parse(text: str) -> Pattern:
    """Parses a pattern."""
    theirs, arrow, ours = text.partition("->")
    assert arrow, text
    return Pattern(
        theirs=tuple(_dim(dim) for dim in _dims(theirs)), ours=tuple(tuple(dim.split()) for dim in _dims(ours))
    )


def _dims(side: str) -> list[str]:
    """Splits `(h k) d` into `h k` and `d`."""
    return [merged or single for merged, single in re.findall(r"\(([^)]*)\)|(\S+)", side)]


def _dim(text: str) -> Dim:
    if "{" not in text:
        return Dim(outer=tuple(text.split()))
    outer, _, rest = text.partition("{")
    own, _, inner = rest.partition("}")
    return Dim(outer=tuple(outer.split()), own=tuple(own.split()), inner=tuple(inner.split()))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A pattern with the sizes of its factors, and the place of this part among others in the same tensor.

    Tensors and parameters may be cut along the outermost factor of the tensor, and nowhere else: such a piece is a run
    of consecutive bytes in the file. Arrays may have other dimensions in front, such as layers and experts.
    """

    pattern: Pattern
    factors: tuple[tuple[str, int], ...]  # names and sizes of the factors
    offset: int = 0  # where this part begins in the braces
    total: int = 0  # size of all parts in the braces
    # The index in the tensor of each index in the parameter, for factors in another order.
    order: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size of each factor."""
        return dict(self.factors)

    @property
    def own_size(self) -> int:
        """Size of this part in the braces; 0 without braces."""
        return next((self._size(dim.own) for dim in self.pattern.theirs if dim.own is not None), 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the checkpoint."""
        return tuple(math.prod(self._axes(dim)) for dim in self.pattern.theirs)

    @property
    def alternates(self) -> bool:
        """Whether the bytes of this part alternate with those of others, instead of being consecutive."""
        return any(dim.own is not None and (dim.outer or index) for index, dim in enumerate(self.pattern.theirs))

    @property
    def cut_dim(self) -> int | None:
        """The dimension of the parameter that the outermost factor cuts; None if it is within a merged one."""
        outermost = self.pattern.theirs[0].factors[0]
        return next((dim for dim, names in enumerate(self.pattern.ours) if names[0] == outermost), None)

    @property
    def cut_size(self) -> int:
        """Size of the outermost factor."""
        return self.sizes[self.pattern.theirs[0].factors[0]]

    def rows(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the rows of the tensor that hold a range of the outermost factor."""
        dim = self.pattern.theirs[0]
        consecutive = dim.own is not None and not dim.outer
        shift = self.offset * self._size(dim.inner) if consecutive else 0
        rows_each = self._size(dim.factors[1:]) if consecutive else math.prod(self._axes(dim)[1:])
        return shift + start * rows_each, shift + stop * rows_each

    def to_ours[A: (np.ndarray, jax.Array)](self, rows: A) -> A:
        """Returns the parameter, or a part of it, from rows of the tensor, `[..., *rows]`."""
        lead, num_rows = rows.shape[: -len(self.pattern.theirs)], rows.shape[-len(self.pattern.theirs)]
        start, stop = self.rows(0, 1)
        sizes = self.sizes | {self.pattern.theirs[0].factors[0]: num_rows // (stop - start)}
        names, shape, cut = list[str](), list[int](), list[slice]()
        for index, dim in enumerate(self.pattern.theirs):
            consecutive = not index and not dim.outer  # then the rows are those of this part only
            if dim.own is None or consecutive:
                parts = [(name, sizes[name]) for name in dim.factors]
                cut += [slice(None)] * len(parts)
            else:
                parts = [(name, sizes[name]) for name in dim.outer]
                parts += [("", self.total)] + [(name, sizes[name]) for name in dim.inner]
                own = slice(self.offset, self.offset + self.own_size)
                cut += [own if name == "" else slice(None) for name, _ in parts]
            names += [name for name, _ in parts]
            shape += [size for _, size in parts]
        found = rows.reshape(*lead, *shape)[(..., *cut)]
        own_names = [name for dim in self.pattern.theirs for name in dim.own or ()]
        split = [name for own in names for name in (own_names if own == "" else [own])]
        found = found.reshape(*lead, *(sizes[name] for name in split))
        for name, indices in self.order:
            found = found.take(np.asarray(indices), axis=len(lead) + split.index(name))
        order = [len(lead) + split.index(name) for dim in self.pattern.ours for name in dim]
        found = found.transpose(*range(len(lead)), *order)
        return found.reshape(*lead, *(math.prod(sizes[name] for name in dim) for dim in self.pattern.ours))

    def to_theirs[A: (np.ndarray, jax.Array)](self, values: A) -> A:
        """Returns the rows of the tensor that hold a parameter, or a part of it, `[..., *values]`.

        Where parts alternate, the factors of the braces are one dimension, to be joined with those of other parts by
        `join`.
        """
        ndim = len(self.pattern.ours)
        lead, sizes = values.shape[: values.ndim - ndim], dict(self.sizes)
        if (cut := self.cut_dim) is not None:
            names = self.pattern.ours[cut]
            sizes[names[0]] = values.shape[len(lead) + cut] // self._size(names[1:])
        ours = [name for dim in self.pattern.ours for name in dim]
        found = values.reshape(*lead, *(sizes[name] for name in ours))
        theirs = [name for dim in self.pattern.theirs for name in dim.factors]
        found = found.transpose(*range(len(lead)), *(len(lead) + ours.index(name) for name in theirs))
        for name, indices in self.order:
            found = found.take(np.argsort(indices), axis=len(lead) + theirs.index(name))
        return found.reshape(*lead, *(size for dim in self.pattern.theirs for size in self._joined(dim, sizes)))

    def joined_axis(self) -> int:
        """Returns the axis, counted from the last one, along which alternating parts of `to_theirs` are joined."""
        axis, found = 0, None
        for dim in reversed(self.pattern.theirs):
            if dim.own is not None:
                found = axis + (2 if dim.inner else 1)
            axis += len(self._joined(dim, self.sizes))
        assert found is not None
        return -found

    def _joined(self, dim: Dim, sizes: Mapping[str, int]) -> list[int]:
        size = partial(self._size, sizes=sizes)
        if dim.own is None or not self.alternates:
            return [size(dim.factors)]
        return [*([size(dim.outer)] if dim.outer else []), size(dim.own), *([size(dim.inner)] if dim.inner else [])]

    def _size(self, names: Sequence[str], sizes: Mapping[str, int] | None = None) -> int:
        return math.prod((self.sizes if sizes is None else sizes)[name] for name in names)

    def _axes(self, dim: Dim) -> list[int]:
        """Returns the sizes that a dimension of the tensor merges: factors, and the parts in braces as one."""
        own = [] if dim.own is None else [self.total]
        return [*(self.sizes[name] for name in dim.outer), *own, *(self.sizes[name] for name in dim.inner)]
