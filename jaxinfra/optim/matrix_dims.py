"""Which dimensions of a parameter form one matrix, and which only count how many of them are stacked.

Optimisers that look at a whole matrix (Muon, Adafactor) must treat 32 stacked layers as 32 matrices, and a
projection of shape [layers, embed, heads, head_dim] as `layers` matrices of embed x (heads * head_dim).
Everything that depends on this reads it from here.
"""

import math
from dataclasses import dataclass

from jaxinfra.parallel.spec import ParamSpec


@dataclass(frozen=True, kw_only=True)
class MatrixDims:
    """The dimensions of a parameter by what they mean to it.

    Attributes:
        batch: count independent matrices.
        rows: dimensions that the product with an activation contracts.
        cols: dimensions that it yields.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, ...]:
        """The dimensions of one matrix."""
        return (*self.rows, *self.cols)

    @property
    def permutation(self) -> tuple[int, ...]:
        """All dimensions: batch, rows, columns."""
        return (*self.batch, *self.rows, *self.cols)

    @property
    def inverse_permutation(self) -> tuple[int, ...]:
        """The permutation that undoes `order`."""
        return tuple(self.permutation.index(dim) for dim in range(len(self.permutation)))

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of one matrix of a parameter of this `shape`."""
        return math.prod(shape[dim] for dim in self.rows), math.prod(shape[dim] for dim in self.cols)


def matrix_dims(spec: ParamSpec) -> MatrixDims:
    """The dimensions of a declared parameter.

    Without declared `in_dims` and `out_dims` the first dimension that is not stacked makes the rows and the
    rest the columns, so a norm's scale is one row vector per layer.
    """
    if spec.in_dims and spec.out_dims:
        rows, cols = spec.in_dims, spec.out_dims
    else:
        single = tuple(dim for dim, axis in enumerate(spec.axes) if axis != "layers")
        rows, cols = single[:1], single[1:]
    batch = tuple(dim for dim in range(len(spec.shape)) if dim not in (*rows, *cols))
    return MatrixDims(batch=batch, rows=rows, cols=cols)


def is_hidden_matrix(spec: ParamSpec) -> bool:
    """Whether the parameter is a hidden matrix with both sides declared: what Muon is for."""
    return spec.role == "matrix" and bool(spec.in_dims) and bool(spec.out_dims)


def is_param_spec(leaf: object) -> bool:
    """Whether `leaf` is a parameter's declaration: for walking trees of them."""
    return isinstance(leaf, ParamSpec)
