"""Checkpoints: everything a run needs to go on as if it had never stopped.

The file is a plain `.npz` of arrays plus one JSON text; nothing in it is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_numpy import files, tree
from moe_numpy.backend import to_device, to_host

FORMAT = "moe_numpy checkpoint 1"


def save_checkpoint(path: str | Path, trees: dict[str, tree.Tree], meta: dict[str, Any]) -> None:
    """Write trees of arrays and plain JSON data into one file, atomically."""
    arrays = {
        name: to_host(leaf)
        for prefix, branch in trees.items()
        for name, leaf in tree.named_leaves(branch, prefix)
    }
    text = json.dumps({"format": FORMAT, **meta})
    arrays["meta"] = np.frombuffer(text.encode(), np.uint8)
    files.write_atomically(path, lambda file: np.savez(file, **arrays))


def load_checkpoint(
    path: str | Path, only: str = ""
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a checkpoint: its arrays by dotted name, if it begins with `only`, and its JSON data.

    Raises
    ------
    ValueError
        if the file is missing, truncated, damaged, or not a checkpoint of moe_numpy.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name.startswith(only)}
            meta = json.loads(archive["meta"].tobytes())
        arrays.pop("meta", None)
    except FileNotFoundError:
        raise ValueError(
            f"load_checkpoint: {path} must be a checkpoint, got no such file. Check the path."
        ) from None
    except PermissionError as error:
        raise ValueError(
            f"load_checkpoint: {path} must be a file that can be read, got: {error.strerror}. "
            "See who may read it."
        ) from None
    except Exception as error:  # zipfile, zlib and NumPy each have their own for damaged bytes
        # NumPy's advice for what it does not know is to unpickle it.
        reason = "no archive of arrays" if "allow_pickle" in str(error) else error
        raise ValueError(
            f"load_checkpoint: {path} must be a whole checkpoint of moe_numpy, got a truncated or "
            f"foreign file ({reason}). Use the file that `train` wrote."
        ) from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(
            f'load_checkpoint: {path} must say "{FORMAT}", got another kind of file. '
            "Use the file that `train` of this version wrote."
        )
    return arrays, meta


@contextlib.contextmanager
def whole(who: str, path: str | Path) -> Iterator[None]:
    """Refuse a checkpoint in which the block misses something, or finds something else."""
    strange = (KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RecursionError)
    try:
        yield
    except strange as error:
        raise ValueError(
            f"{who}: {path} must hold all that `train` wrote, got one that lacks something "
            f"({error!r}). Use an older copy, or train anew."
        ) from None


def restore(like: tree.Tree, arrays: dict[str, np.ndarray], prefix: str) -> tree.Tree:
    """Pick the arrays of one tree out of a checkpoint; `like` says what must be there.

    Raises
    ------
    ValueError
        if an array is missing or has another shape: the checkpoint is of another configuration.
    """
    picked = []
    for name, leaf in tree.named_leaves(like, prefix):
        came = arrays.get(name)
        if came is None or came.shape != leaf.shape or came.dtype != leaf.dtype:
            found = "none" if came is None else f"{came.dtype} {came.shape}"
            raise ValueError(
                f"restore: {name} must be {leaf.dtype} {leaf.shape}, got {found}. "
                "The checkpoint is of another configuration: build the model it was written with."
            )
        picked.append(to_device(came))
    return tree.from_leaves(like, picked)
