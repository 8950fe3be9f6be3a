"""Reductions of rows (the last axis), as matrix products where that is the faster way.

NumPy's own reductions of short rows spend most of their time between the rows.
"""

from __future__ import annotations

from moe_numpy.backend import Array, xp

FEW = 16  # rows: for so few NumPy's own way is the faster one


def sums(x: Array) -> Array:
    """Add each row up: a product with a column of ones.

    Shapes     x (..., C) -> (..., 1)
    """
    C = x.shape[-1]
    if x.size <= FEW * C:
        return x.sum(-1, keepdims=True)
    return (x.reshape(-1, C) @ xp.ones(C, x.dtype)).reshape(*x.shape[:-1], 1)


def mean(x: Array) -> Array:
    """Average each row.

    Shapes     x (..., C) -> (..., 1)
    """
    return sums(x) / x.shape[-1]


def dots(x: Array, y: Array) -> Array:
    """Multiply each row with its partner and add up, in one pass without a temporary.

    Shapes     x, y (..., C) -> (..., 1)
    """
    return xp.einsum("...c,...c->...", x, y)[..., None]


def sum_columns(x: Array) -> Array:
    """Add all rows up: a product with a row of ones.

    Shapes     x (..., C) -> (C,)
    """
    rows = x.reshape(-1, x.shape[-1])
    return xp.ones(rows.shape[0], x.dtype) @ rows


def maximum(x: Array) -> Array:
    """Find the largest number of each row; looking for its place is faster than for its size.

    Shapes     x (..., C) -> (..., 1)
    """
    if x.size <= FEW * x.shape[-1]:
        return x.max(-1, keepdims=True)
    rows = x.reshape(-1, x.shape[-1])
    largest = rows[xp.arange(rows.shape[0]), rows.argmax(1)]
    return largest.reshape(*x.shape[:-1], 1)
