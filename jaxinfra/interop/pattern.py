"""Layouts of a tensor in a checkpoint and of our parameter, as one pattern that is read in both directions.

`(h k) d -> d h k` says that the tensor has two dimensions, the first of which merges `h` and `k`, and that the
parameter has three. A dimension merges its factors with the first one outermost, as in einops. A number is a factor of
that size.

Braces mark what a tensor holds besides other parts. In `({h k}) d -> d h k` the rows of other parameters come before or
after those of this one (a fused projection of queries, keys and values); in `(f {1}) d -> d f` rows of two parameters
alternate.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

type Ranges = tuple[tuple[int, int], ...]
"""First index and end in each dimension."""


@dataclass(frozen=True)
class Dim:
    """A dimension of a tensor in a checkpoint.

    Attributes:
        outer: factors outside of the braces, before them; all factors if there are none.
        own: factors in the braces; None without braces.
        inner: factors after the braces.
    """

    outer: tuple[str, ...]
    own: tuple[str, ...] | None = None
    inner: tuple[str, ...] = ()

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


@functools.cache
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

    Attributes:
        pattern: the pattern.
        sizes: size of each factor.
        offset: where this part begins in the braces.
        total: size of all parts in the braces.
    """

    pattern: Pattern
    sizes: Mapping[str, int]
    offset: int = 0
    total: int = 0

    def _size(self, names: Sequence[str]) -> int:
        return math.prod(self.sizes[name] for name in names)

    @property
    def own_size(self) -> int:
        """Size of this part in the braces; 0 without braces."""
        return next((self._size(dim.own) for dim in self.pattern.theirs if dim.own is not None), 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the checkpoint."""
        return tuple(
            self._size(dim.outer) * (1 if dim.own is None else self.total) * self._size(dim.inner)
            for dim in self.pattern.theirs
        )

    @property
    def is_alternating(self) -> bool:
        """Whether the bytes of this part alternate with those of others, instead of being consecutive."""
        return any(dim.own is not None and (index or dim.outer) for index, dim in enumerate(self.pattern.theirs))

    @property
    def outermost(self) -> str:
        """The outermost factor of the tensor."""
        return self.pattern.theirs[0].factors[0]

    # A box is a part of a parameter or of a tensor, given by ranges. Within a merged dimension only the outermost
    # factor is cut; what that reads too much is cut off afterwards.

    def _factor_ranges(self, ranges: Ranges) -> dict[str, tuple[int, int]]:
        """Returns the range of each factor that covers ranges of our dimensions."""
        found = {name: (0, size) for name, size in self.sizes.items()}
        for (start, stop), names in zip(ranges, self.pattern.ours, strict=True):
            inner = self._size(names[1:])
            found[names[0]] = (start // inner, -(-stop // inner))
        return found

    def box(self, ranges: Ranges) -> Ranges:
        """Returns the ranges of the tensor that hold ranges of the parameter."""
        factors = self._factor_ranges(ranges)
        return tuple(self._dim_range(dim, factors) for dim in self.pattern.theirs)

    def _dim_range(self, dim: Dim, factors: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        start, stop = factors[dim.factors[0]]
        below = self._size(dim.factors[1:])
        if dim.own is None:
            return start * below, stop * below
        if dim.outer:
            step = self._size(dim.outer[1:]) * self.total * self._size(dim.inner)
            return start * step, stop * step
        shift = self.offset * self._size(dim.inner)
        return shift + start * below, shift + stop * below

    def take(self, tensor: np.ndarray, ranges: Ranges) -> np.ndarray:
        """Returns ranges of the parameter from the box of the tensor that has them, a view if possible."""
        view, names = self._split(tensor, ranges)
        order = [names.index(name) for dim in self.pattern.ours for name in dim]
        view = view.transpose(order)
        shape = [stop - start for start, stop in self._covered(ranges)]
        starts = [start - covered for (start, _), (covered, _) in zip(ranges, self._covered(ranges), strict=True)]
        cut = tuple(slice(low, low + stop - start) for low, (start, stop) in zip(starts, ranges, strict=True))
        return view.reshape(shape)[cut]

    def put(self, tensor: np.ndarray, ranges: Ranges, values: np.ndarray) -> None:
        """Writes ranges of the parameter, whole in all but the outermost factor, into the box of the tensor."""
        assert self._covered(ranges) == ranges, (ranges, self.pattern)
        view, names = self._split(tensor, ranges)
        factors = self._factor_ranges(ranges)
        ours = [name for dim in self.pattern.ours for name in dim]
        split = values.reshape([factors[name][1] - factors[name][0] for name in ours])
        view[...] = split.transpose([ours.index(name) for name in names])

    def _covered(self, ranges: Ranges) -> Ranges:
        """Returns the ranges of our dimensions that whole inner factors cover."""
        factors = self._factor_ranges(ranges)
        inner = [self._size(names[1:]) for names in self.pattern.ours]
        firsts = [factors[names[0]] for names in self.pattern.ours]
        return tuple((start * size, stop * size) for (start, stop), size in zip(firsts, inner, strict=True))

    def _split(self, tensor: np.ndarray, ranges: Ranges) -> tuple[np.ndarray, list[str]]:
        """Splits the dimensions of a box into its factors; returns a view of this part, and the names of its axes."""
        factors = self._factor_ranges(ranges)
        shape, cuts, names = list[int](), list[slice](), list[str]()
        expand = list[tuple[int, tuple[str, ...]]]()  # axes of the braces, to be split in their factors afterwards
        for dim in self.pattern.theirs:
            first = True
            for group, is_own in ((dim.outer, False), (dim.own, True), (dim.inner, False)):
                if group is None:
                    continue
                if is_own and not first:
                    shape.append(self.total)
                    cuts.append(slice(self.offset, self.offset + self._size(group)))
                    expand.append((len(shape) - 1, group))
                    names.append("")
                    continue
                for name in group:
                    start, stop = factors[name]
                    shape.append(stop - start if first else self.sizes[name])
                    cuts.append(slice(None) if first else slice(start, stop))
                    names.append(name)
                    first = False
        view = tensor.reshape(shape)
        assert np.shares_memory(view, tensor) or not tensor.size
        view = view[tuple(cuts)]
        for axis, group in reversed(expand):
            view = view.reshape(*view.shape[:axis], *(self.sizes[name] for name in group), *view.shape[axis + 1 :])
            names[axis : axis + 1] = group
        for axis, name in enumerate(names):  # factors of the braces may be cut, too
            start, stop = factors[name]
            if view.shape[axis] != stop - start:
                view = view[(slice(None),) * axis + (slice(start, stop),)]
        return view, names
