"""Parameters, gradients and optimizer moments are trees: NamedTuples whose leaves are arrays.

A tree is an array, ``None`` (an optional array that a configuration does without), or a tuple or
NamedTuple of trees. Gradients are trees of the same type as the parameters, so one walk serves all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

LINE = 64  # bytes of a line of the cache
Tree = Any


def map(fn: Callable, tree: Tree, *others: Tree) -> Tree:
    """Apply `fn` to the leaves that stand at the same place of every tree; keep the tree's type.

    Raises     ValueError if the trees differ in shape (a missing branch, a None against an array)
    """
    if isinstance(tree, tuple):
        for other in others:
            if type(other) is not type(tree) or len(other) != len(tree):
                raise ValueError(
                    f"tree.map: trees must have the same form, got {_form(tree)} and "
                    f"{_form(other)}. Pass gradients of the same parameters."
                )
        branches = [map(fn, *same_place) for same_place in zip(tree, *others, strict=True)]
        return type(tree)(*branches) if hasattr(tree, "_fields") else tuple(branches)
    if any((other is None) != (tree is None) for other in others):
        raise ValueError(
            "tree.map: a leaf is None in one tree and an array in another. "
            "Build both from the same configuration."
        )
    return None if tree is None else fn(tree, *others)


def named_leaves(tree: Tree, prefix: str = "") -> list[tuple[str, Any]]:
    """List every array with its dotted name, as in ``blocks.0.attention.q_CHD``.

    ``None`` leaves are left out. The order is that of the fields, the same for trees of one type.
    """
    if tree is None:
        return []
    if not isinstance(tree, tuple):
        return [(prefix, tree)]
    names = getattr(tree, "_fields", None) or [str(i) for i in range(len(tree))]
    found = []
    for name, branch in zip(names, tree, strict=True):
        found += named_leaves(branch, f"{prefix}.{name}" if prefix else name)
    return found


def leaves(tree: Tree) -> list[Any]:
    """List every array of the tree, in the order of `named_leaves`."""
    found = []
    for branch in tree if isinstance(tree, tuple) else (tree,):
        if isinstance(branch, tuple):
            found += leaves(branch)
        elif branch is not None:
            found.append(branch)
    return found


def from_leaves(tree: Tree, replacements: list[Any]) -> Tree:
    """Build a tree of the form of `tree` from arrays in the order of `leaves`.

    Raises     ValueError if there are more or fewer
    """
    wanted, remaining = len(leaves(tree)), iter(replacements)
    if len(replacements) != wanted:
        raise ValueError(
            f"tree.from_leaves: {wanted} leaves need as many replacements, got "
            f"{len(replacements)}. Pass one for each leaf."
        )
    return map(lambda _: next(remaining), tree)


def room(like: Tree, memory: Callable[[int], Any]) -> Tree:
    """Make arrays of the form of `like` in one block, whole lines of the cache apart.

    `memory` gives a block of so many bytes, as an array of them; the arrays hold what it held.
    """
    lengths = [-(-leaf.nbytes // LINE) * LINE for leaf in leaves(like)]
    *starts, total = itertools.accumulate(lengths, initial=0)
    block, start = memory(total), iter(starts)

    def place(leaf: Any) -> Any:
        first = next(start)
        return block[first : first + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)

    return map(place, like)


def in_one_block(arrays: Tree, memory: Callable[[int], Any]) -> Tree:
    """Copy all arrays into one block of `memory`."""
    copies = room(arrays, memory)
    fill(copies, arrays)
    return copies


def fill(tree: Tree, arrays: Tree) -> None:
    """Copy `arrays` into those of `tree`, in place."""
    for place, array in zip(leaves(tree), leaves(arrays), strict=True):
        place[...] = array


def size(tree: Tree) -> int:
    """Count the numbers in all arrays of the tree."""
    return sum(leaf.size for leaf in leaves(tree))


def _form(tree: Tree) -> str:
    if isinstance(tree, tuple):
        return f"{type(tree).__name__} of {len(tree)}"
    return type(tree).__name__
