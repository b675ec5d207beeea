"""Rules: which tensors of a checkpoint hold which parameter, and how it is laid out there.

A family gives one list of rules. `Binding`s are these rules with the sizes of a model: reading takes them from the
tensors to the parameters, writing the other way.
"""

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxinfra.errors import ConfigError
from jaxinfra.interop.pattern import Layout, parse


@dataclass(frozen=True, kw_only=True)
class Part:
    """A parameter in a tensor."""

    ours: str  # the path of the parameter; of a layer, the path in it
    pattern: str  # layouts in the checkpoint and here (see `interop.pattern`), without the dimension of stacked layers
    # Sizes of factors that the shape does not tell, because a dimension merges them.
    sizes: Mapping[str, int] = field(default_factory=dict)
    # For factors in another order, but the outermost one: the index in the tensor of each index here.
    order: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A tensor, or one for each expert, and the parameters in it."""

    # The name in the checkpoint. `{layer}` stands for the index of the layer, `{e}` for that of an expert, the
    # first dimension `e` of the parameter.
    theirs: str
    parts: tuple[Part, ...]  # the parameters, in the order in which they are in the tensor


def rule(theirs: str, ours: str, pattern: str, **order: tuple[int, ...]) -> Rule:
    """Returns the rule of a tensor that holds one parameter; `order` is that of `Part`."""
    return Rule(theirs=theirs, parts=(Part(ours=ours, pattern=pattern, order=order),))


def fused(theirs: str, *parts: tuple[str, str], **sizes: int) -> Rule:
    """Returns the rule of a tensor that holds several parameters: `(path, pattern)` of each."""
    return Rule(theirs=theirs, parts=tuple(Part(ours=ours, pattern=pattern, sizes=sizes) for ours, pattern in parts))


@dataclass(frozen=True, kw_only=True)
class BoundPart:
    """A parameter in the tensors of a binding."""

    path: str  # the path of the parameter, as in `blocks.attention.query.weight`
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Binding:
    """A rule with the sizes of a model."""

    theirs: str  # the name of the tensors, with `{layer}` and `{e}`
    # The indices of the layers that are stacked in the parameters; None if they belong to no layer.
    layers: tuple[int, ...] | None
    parts: tuple[BoundPart, ...]
    experts: int | None  # number of tensors of a layer; None if there is one
    is_copy: bool = False  # whether another tensor holds the same parameter, which is read from there

    def name(self, index: Sequence[int]) -> str:
        """Returns the name of the tensor that holds an index of the dimensions `lead`."""
        layer = 0 if self.layers is None else self.layers[index[0]]
        expert = 0 if self.experts is None else index[-1]
        return self.theirs.replace("{layer}", str(layer)).replace("{e}", str(expert))

    @property
    def groups(self) -> list[tuple[BoundPart, ...]]:
        """The parameters of the same rows together: all if their rows alternate, else each alone."""
        return [self.parts] if self.parts[0].layout.alternates else [(part,) for part in self.parts]

    @property
    def names(self) -> Iterator[str]:
        """The names of all tensors, those of a layer together."""
        return map(self.name, itertools.product(*map(range, self.lead)))

    @property
    def lead(self) -> tuple[int, ...]:
        """The dimensions of the parameters in front of their layout: stacked layers, then experts."""
        return (*([] if self.layers is None else [len(self.layers)]), *([] if self.experts is None else [self.experts]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        return self.parts[0].layout.shape


def bind(
    each: Rule, shapes: Mapping[str, Sequence[int]], *, prefix: str = "", layers: tuple[int, ...] | None = None
) -> Binding:
    """Binds a rule to the shapes of a model's parameters.

    Args:
        each: the rule.
        shapes: shapes by path; those of layers begin with the number of stacked layers.
        prefix: comes before the paths of the rule.
        layers: see `Binding`.
    """
    laid_out, num_experts = list[tuple[str, Layout]](), None
    for part in each.parts:
        path, pattern = f"{prefix}{part.ours}", parse(part.pattern)
        if path not in shapes:
            raise ConfigError(f"{each.theirs}: the model has no parameter {path}{nearest(path, shapes)}")
        shape = tuple(shapes[path])[0 if layers is None else 1 :]
        sizes = pattern.sizes(shape, part.sizes)
        if "{e}" in each.theirs:
            assert pattern.ours[0] == ("e",), part.pattern
            num_experts, pattern = sizes.pop("e"), replace(pattern, ours=pattern.ours[1:])
        laid_out.append((path, Layout(pattern=pattern, factors=tuple(sizes.items()), order=tuple(part.order.items()))))
    starts = [0, *itertools.accumulate(layout.own_size for _, layout in laid_out)]
    parts = (
        BoundPart(path=path, layout=replace(layout, offset=start, total=starts[-1]))
        for (path, layout), start in zip(laid_out, starts, strict=False)
    )
    return Binding(theirs=each.theirs, layers=layers, parts=tuple(parts), experts=num_experts)


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns words that name the most similar one; "" if there is none."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest one is {near[0]}" if near else ""
