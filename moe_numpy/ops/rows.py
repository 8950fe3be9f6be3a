"""Reductions of rows (the last axis) by faster ways, and work done a block of rows at a time.

NumPy's own reductions of short rows lose most of their time between the rows. Its operations on
large arrays wait for memory; on blocks that fit into a core's cache they do not.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_numpy import machine
from moe_numpy.backend import Array, few_launches, xp

FEW = 16  # rows: for so few NumPy's own way is the faster one
BLOCK = 65_536  # numbers of a block: a handful of such blocks fits into the cache


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
    """Find each row's largest number: argmax and a look-up are faster than max.

    Shapes     x (..., C) -> (..., 1)
    """
    if x.size <= FEW * x.shape[-1]:
        return x.max(-1, keepdims=True)
    rows = x.reshape(-1, x.shape[-1])
    largest = rows[xp.arange(rows.shape[0]), rows.argmax(1)]
    return largest.reshape(*x.shape[:-1], 1)


def finite_below(x: Array) -> Array:
    """Put the lowest finite number in the place of minus infinity, in a copy.

    The bound is a row: NumPy compares rows faster than it compares with one number.

    Shapes     x (..., C) -> (..., C)
    """
    return xp.maximum(x, xp.full(x.shape[-1], xp.finfo(x.dtype).min, x.dtype))


def in_blocks(fill: Callable[..., None], *arrays: Array) -> None:
    """Call `fill` with one block of rows of all arrays after the other.

    It reads some and writes into others. For functions that take many passes over rows, or over
    single numbers, none of which needs another row.

    Shapes     arrays (..., C), each with a C of its own, the first with the largest, and the same
               number of rows; those that are written into are contiguous
    """
    if arrays[0].size <= 2 * BLOCK or few_launches():
        fill(*arrays)
        return
    tables = [array.reshape(-1, array.shape[-1]) for array in arrays]
    count, widest = tables[0].shape
    step = max(1, BLOCK // widest)

    def work(i: int) -> None:
        block = slice(i * step, (i + 1) * step)
        fill(*(table[block] for table in tables))

    blocks = -(-count // step)
    machine.for_each(work, blocks, blocks * BLOCK)
