"""The sizes that the cases of the gradient check share: small, and different on every axis."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from moe_numpy import tree

N, C, E, F, K, V = 7, 5, 4, 3, 2, 11
B, T = 2, 5


def generic(rng: Generator, params: tree.Tree, spread: float = 0.6) -> tree.Tree:
    """Replace every number of a tree by a random one."""
    return tree.map(lambda leaf: rng.normal(0.2, spread, leaf.shape), params)


def chosen(rng: Generator) -> np.ndarray:
    """Draw K different experts for every token."""
    return np.stack([rng.permutation(E)[:K] for _ in range(N)])
