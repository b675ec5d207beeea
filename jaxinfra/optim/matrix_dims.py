"""Finds the matrix in each parameter's dimensions, for optimizers that treat matrices as a whole (Muon, Adafactor).

32 stacked layers are 32 matrices; a projection `[layers, embed, heads, head_dim]` is `layers` matrices of
embed x (heads * head_dim).
"""

import math
from dataclasses import dataclass

from jaxinfra.parallel.spec import ParamSpec


@dataclass(frozen=True, kw_only=True)
class MatrixDims:
    """The dimensions of a parameter by their role.

    `[layers, embed, heads, head_dim]` has batch (0,), rows (1,) and cols (2, 3).

    Attributes:
        batch: dimensions of independent matrices, such as stacked layers.
        rows: input dimensions of the matmul with an activation.
        cols: output dimensions of the matmul.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, ...]:
        """The dimensions of one matrix."""
        return (*self.rows, *self.cols)

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns the rows and columns of one matrix of a parameter of this shape."""
        return math.prod(shape[dim] for dim in self.rows), math.prod(shape[dim] for dim in self.cols)


def matrix_dims(spec: ParamSpec) -> MatrixDims:
    """Returns the matrix dimensions of a parameter.

    If a parameter has no matmul, like an embedding, its first unstacked dimension is the rows, the rest the columns.
    """
    if spec.in_dims and spec.out_dims:
        rows, cols = spec.in_dims, spec.out_dims
    else:
        unstacked = tuple(dim for dim, axis in enumerate(spec.axes) if axis != "layers")
        rows, cols = unstacked[:1], unstacked[1:]
    batch = tuple(dim for dim in range(len(spec.shape)) if dim not in (*rows, *cols))
    return MatrixDims(batch=batch, rows=rows, cols=cols)


def is_hidden_matrix(spec: ParamSpec) -> bool:
    """Returns whether Muon updates this parameter: a matrix of a layer that multiplies activations."""
    return spec.role == "matrix" and bool(spec.in_dims) and bool(spec.out_dims)
