"""The check for the exercise of chapter 13; as those of `exercises_06`, it returns one line."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from moe_numpy.classroom.exercises_06 import verdict

SHAPES = ((4, 6), (7,), (2, 3, 5), (2, 1, 3), (2, 2, 3, 4), (3, 300))


def check_dots(fn: Callable) -> str:
    """Judge ``fn(x, y) -> (..., 1)``, the scalar product of each row of x with that of y."""
    rng, first = np.random.default_rng(131), ""
    for shape in SHAPES:
        x, y = rng.standard_normal((2, *shape))
        right = _dots(x, y)
        mistakes = {
            "the mean was taken; a scalar product is the sum": right / shape[-1],
            "the rows of x were multiplied with themselves": _dots(x, x),
            "the rows of y were multiplied with themselves": _dots(y, y),
            "the rows were added, not multiplied": (x + y).sum(-1, keepdims=True),
        }
        said = verdict(fn, (x, y), right, mistakes)
        first = first or said
        if not said.startswith("right"):
            return said if shape == SHAPES[0] else f"right for {SHAPES[0]}; but for {shape}: {said}"
    for dtype in ("float32", "float64"):
        x, y = rng.standard_normal((2, *SHAPES[0])).astype(dtype)
        said = verdict(fn, (x, y), _dots(x, y), {})
        if not said.startswith("right"):
            return f"right for numbers of float64; but for {dtype}: {said}"
        answer = fn(x, y)
        if not isinstance(answer, np.ndarray):
            return f"the answer must be an array, got {type(answer).__name__}"
        if answer.dtype != dtype:
            return f"of arrays of {dtype}, the answer must be one of {dtype}, got {answer.dtype}"
    return first


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Add products up one by one."""
    right = np.zeros((*x.shape[:-1], 1))
    for place in np.ndindex(x.shape[:-1]):
        right[place] = math.fsum(a * b for a, b in zip(x[place], y[place], strict=True))
    return right
