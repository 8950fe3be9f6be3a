"""Optimizers: the only code that writes into parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

from moe_numpy import tree
from moe_numpy.backend import Array, xp
from moe_numpy.config import SGD, AdamW

# Biases with more than one axis: of heads, and of experts.
BIASES = {"q_HD", "k_GD", "v_GD", "in_EF", "up_EF", "out_EC"}
BLOCK = 32_768  # numbers updated at a time: their temporaries stay in the cache


class OptimizerState(NamedTuple):
    """Running averages, trees of the parameters' form: momentum, and for AdamW the squares."""

    first: tree.Tree
    second: tree.Tree | None


def init_state(params: tree.Tree, cfg: AdamW | SGD) -> OptimizerState:
    """Start all averages at zero.

    Raises     ValueError if a parameter is not contiguous (it could not be updated in place)
    """
    for name, leaf in tree.named_leaves(params):
        if not leaf.flags.c_contiguous:
            raise ValueError(
                f"init_state: parameters must be contiguous arrays, got a view for {name}. Copy it."
            )
    second = tree.map(xp.zeros_like, params) if isinstance(cfg, AdamW) else None
    return OptimizerState(tree.map(xp.zeros_like, params), second)


def norm(arrays: tree.Tree) -> Array:
    """Compute the Euclidean norm of all arrays of a tree together, shape ()."""
    return xp.sqrt(sum(xp.vdot(leaf, leaf) for leaf in tree.leaves(arrays)))


def update(
    params: tree.Tree,
    grads: tree.Tree,
    state: OptimizerState,
    cfg: AdamW | SGD,
    step: int,
    rate: float,
    scale: float = 1.0,
) -> None:
    """Take one step, in place.

    Weight decay is decoupled and spares gains and biases.

    Parameters
    ----------
    step : counted from 0; corrects the start of AdamW's averages.
    rate : learning rate of this step.
    scale : factor on every gradient (the clipping).
    """
    seconds = [None] if state.second is None else tree.leaves(state.second)
    leaves = zip(
        tree.named_leaves(params), tree.leaves(grads), tree.leaves(state.first), strict=True
    )
    for i, ((name, p), g, first) in enumerate(leaves):
        decayed = p.ndim > 1 and name.rpartition(".")[2] not in BIASES
        decay = 1.0 - rate * cfg.weight_decay if decayed else 1.0
        if isinstance(cfg, AdamW):
            _adamw(p, g, first, seconds[i], cfg, step, rate, scale, decay)
        else:
            _sgd(p, g, first, cfg, rate, scale, decay)


def _adamw(
    p: Array,
    g: Array,
    first: Array,
    second: Array,
    cfg: AdamW,
    step: int,
    rate: float,
    scale: float,
    decay: float,
) -> None:
    correction1 = 1.0 - cfg.beta1 ** (step + 1)
    correction2 = 1.0 - cfg.beta2 ** (step + 1)
    p, g, first, second = (a.reshape(-1) for a in (p, g, first, second))
    for start in range(0, p.size, BLOCK):
        block = slice(start, start + BLOCK)
        m, v, gradient = first[block], second[block], g[block] * scale
        m *= cfg.beta1
        m += (1.0 - cfg.beta1) * gradient
        v *= cfg.beta2
        gradient *= gradient
        gradient *= 1.0 - cfg.beta2
        v += gradient
        size = xp.sqrt(v)
        size *= 1.0 / math.sqrt(correction2)
        size += cfg.eps
        p[block] *= decay
        p[block] -= (rate / correction1) * m / size


def _sgd(
    p: Array, g: Array, first: Array, cfg: SGD, rate: float, scale: float, decay: float
) -> None:
    first *= cfg.momentum
    first += scale * g
    p *= decay
    p -= rate * first
