"""The array library behind the mathematics: NumPy, or CuPy on request.

Every pair writes ``xp.exp(x)``. `xp` is a module whose names are those of the library in use, so a
look-up costs what a look-up in NumPy costs, and `use_backend` changes it for everybody at once.
This is the only file that names CuPy. Random numbers are drawn on the host and moved with
`to_device`; losses and records come back with `to_host`.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray, or cupy.ndarray inside use_backend("cupy")
Cache = tuple

GPU = "cupy"
NAMES = ("numpy", GPU)


class BackendError(ValueError):
    """The array library that was asked for is not available on this machine."""


# For functions in which an infinity leads to the right result. CuPy never warns of one.
overflow_is_fine = np.errstate(over="ignore")

xp = types.ModuleType("xp", "The array library in use; see use_backend.")
vars(xp).update(vars(np))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[types.ModuleType]:
    """Let every pair compute with "numpy" or "cupy" inside the block; restore the former after it.

    Raises     ValueError if the name is unknown; BackendError if CuPy is not installed or finds no
               GPU
    """
    before = dict(vars(xp))
    _fill(vars(_library(name)))
    try:
        yield xp
    finally:
        _fill(before)


def to_device(x: Any, dtype: Any = None) -> Array:
    """Move a host array to the library in use, as `dtype` if one is named."""
    return xp.asarray(x, dtype=dtype)


def to_host(x: Any) -> np.ndarray:
    """Bring an array of any backend back as a NumPy array."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def few_launches() -> bool:
    """Tell whether one large operation beats a loop of small ones, as it does on a GPU."""
    return xp.__name__ != "numpy"


def on_host(x: Any) -> bool:
    """Tell whether an array lies on the host, where looking at a value costs nothing."""
    return isinstance(x, np.ndarray)


def to_host_together(arrays: list[Any]) -> list[np.ndarray]:
    """Bring arrays and numbers to the host in one crossing, which is what costs; as float64."""
    if not few_launches():
        return [np.asarray(array, dtype="float64") for array in arrays]
    device = [xp.asarray(array, dtype="float64") for array in arrays]
    flat = to_host(xp.concatenate([array.reshape(-1) for array in device]))
    ends = np.cumsum([array.size for array in device])
    parts = np.split(flat, ends[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, device, strict=True)]


def _fill(names: dict[str, Any]) -> None:
    vars(xp).clear()
    vars(xp).update(names)


def _library(name: str) -> types.ModuleType:
    if name not in NAMES:
        raise ValueError(f"use_backend: backend must be one of {', '.join(NAMES)}, got {name!r}.")
    if name == "numpy":
        return np
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        raise BackendError(
            'use_backend: backend "cupy" needs CuPy, which is not installed. '
            'Install it with: pip install "cupy-cuda12x" (or "cupy-cuda13x", as your driver is).'
        ) from None
    if not cupy.is_available():
        raise BackendError(
            'use_backend: backend "cupy" needs a GPU, and CuPy finds none here. '
            'Install the CUDA driver, or use backend "numpy".'
        )
    return cupy
