"""Optimizers: the only code that writes into parameters, but for the bias rule of the loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from moe_numpy import machine, tree
from moe_numpy.backend import Array, few_launches, to_host, xp
from moe_numpy.config import SGD, AdamW, rules

# Biases with more than one axis: of heads, and of experts.
BIASES = {"q_HD", "k_GD", "v_GD", "in_EF", "up_EF", "out_EC", "expert_bias_EO"}
BLOCK = 131_072  # numbers updated at a time: their temporaries stay in the cache


class OptimizerState(NamedTuple):
    """Trees of the parameters' form: AdamW's means of gradients and squares, or SGD's velocity."""

    first: tree.Tree
    second: tree.Tree | None


def init_state(params: tree.Tree, cfg: AdamW | SGD) -> OptimizerState:
    """Start all averages at zero.

    Raises     ValueError if a parameter is not contiguous (it could not be updated in place)
    """
    for name, leaf in tree.named_leaves(params):
        _require_contiguous("init_state", "parameters", name, leaf)
    second = tree.map(xp.zeros_like, params) if isinstance(cfg, AdamW) else None
    return OptimizerState(tree.map(xp.zeros_like, params), second)


def norm(arrays: tree.Tree) -> Array:
    """Compute the Euclidean norm of all arrays of a tree together, shape ()."""
    leaves = tree.leaves(arrays)
    squares = [None] * len(leaves)

    def square(i: int) -> None:
        squares[i] = xp.vdot(leaves[i], leaves[i])

    machine.for_each(square, len(leaves), sum(leaf.size for leaf in leaves))
    return xp.sqrt(sum(squares))


def update(
    params: tree.Tree,
    grads: tree.Tree,
    state: OptimizerState,
    cfg: AdamW | SGD,
    step: int,
    rate: float,
    scale: float = 1.0,
    share: slice = slice(None),
) -> None:
    """Take one step, in place.

    Weight decay is decoupled and spares gains and biases.

    Parameters
    ----------
    step : counted from 0; corrects the start of AdamW's averages.
    rate : learning rate of this step.
    scale : factor on every gradient (the clipping).
    share : the slice of the jobs to do; slice(i, None, n) for i = 0 to n - 1 are all of them
        together, in parts of about equal work.

    Raises     ValueError, before anything is changed, if gradients or state are not those of the
               parameters and configuration, parameters or state are not contiguous, or a number is
               out of range
    """
    jobs = _jobs(params, grads, state, cfg, step, rate, scale)
    jobs.sort(key=lambda job: -job[1][0].size)  # parts of about equal work
    jobs = jobs[share]

    def work(i: int) -> None:
        rule, arguments = jobs[i]
        rule(*arguments)

    machine.for_each(work, len(jobs), sum(arguments[0].size for _, arguments in jobs))


def _jobs(
    params: tree.Tree,
    grads: tree.Tree,
    state: OptimizerState,
    cfg: AdamW | SGD,
    step: int,
    rate: float,
    scale: float,
) -> list[tuple[Callable, tuple]]:
    """List what is to do: the rule and its arguments for each array, or each expert with tokens."""
    rules.instance("update", "the configuration", cfg, (AdamW, SGD))
    rules.whole_number("update", "step", step, 0)
    rules.not_negative("update", "rate", rate)
    rules.not_negative("update", "scale", scale)
    adam = isinstance(cfg, AdamW)
    if adam != (state.second is not None):
        raise ValueError(
            f"update: the state must be that of {type(cfg).__name__}, got that of another "
            "optimizer. Make it with `init_state` for this configuration."
        )
    named = tree.named_leaves(params)
    gradients, firsts = _alike("gradient", grads, named), _alike("average", state.first, named)
    seconds = _alike("average", state.second, named) if adam else firsts
    jobs: list[tuple[Callable, tuple]] = []
    for (name, p), g, first, second in zip(named, gradients, firsts, seconds, strict=True):
        for what, array in (("parameters", p), ("averages", first), ("averages", second)):
            _require_contiguous("update", what, name, array)
        decayed = p.ndim > 1 and name.rpartition(".")[2] not in BIASES
        decay = 1.0 - rate * cfg.weight_decay if decayed else 1.0
        if adam:
            arrays = (p, g, first, second)
            for part in _busy_experts(name, arrays) if cfg.skip_idle else [arrays]:
                jobs.append((_adamw, (*part, cfg, step, rate, scale, decay)))
        else:
            jobs.append((_sgd, (p, g, first, cfg, rate, scale, decay)))
    return jobs


def _alike(what: str, arrays: tree.Tree, named: list[tuple[str, Array]]) -> list[Array]:
    """Return the leaves, which must be those of the parameters in number, shape and type."""
    found, advice = tree.leaves(arrays), "Make them of the same parameters."
    rule = f"there must be {what}s for each of the {len(named)} arrays of parameters"
    rules.require(len(found) == len(named), "update", rule, len(found), advice)
    for (name, p), a in zip(named, found, strict=True):
        if a.shape != p.shape or a.dtype != p.dtype:
            raise ValueError(
                f"update: the {what} of {name} must be {p.dtype} of shape {p.shape}, got "
                f"{a.dtype} of {a.shape}. {advice}"
            )
    return found


def _require_contiguous(who: str, what: str, name: str, array: Array) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{who}: {what} must be contiguous arrays, got a view for {name}. Copy it."
        )


def _busy_experts(name: str, arrays: tuple[Array, ...]) -> list[tuple[Array, ...]]:
    """Cut the arrays of the experts (p, g, and so on) into those of each that has a gradient."""
    p, g, *_ = arrays
    if p.ndim == 1 or not name.rpartition("_")[2].startswith("E"):
        return [arrays]
    busy_E = to_host(g.reshape(g.shape[0], -1).any(1))
    return [tuple(array[e] for array in arrays) for e, busy in enumerate(busy_E) if busy]


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
    """Update one array, block by block and in as few passes as possible.

    With the corrections c1 = 1 - beta1^t and c2 = 1 - beta2^t,
        rate (m / c1) / (sqrt(v / c2) + eps) = (rate sqrt(c2) / c1) m / (sqrt(v) + eps sqrt(c2)):
    only two numbers need correcting (Kingma and Ba 2015, the end of section 2).
    """
    root2 = math.sqrt(1.0 - cfg.beta2 ** (step + 1))
    rate *= root2 / (1.0 - cfg.beta1 ** (step + 1))
    p, g, first, second = (a.reshape(-1) for a in (p, g, first, second))
    size = max(1, p.size) if few_launches() else BLOCK
    for start in range(0, p.size, size):
        block = slice(start, start + size)
        w, m, v = p[block], first[block], second[block]
        x = g[block] * (scale * (1.0 - cfg.beta1))  # the one temporary of a block
        m *= cfg.beta1
        m += x
        x *= x
        x *= (1.0 - cfg.beta2) / (1.0 - cfg.beta1) ** 2  # of (1 - beta1) g, now (1 - beta2) g^2
        v *= cfg.beta2
        v += x
        xp.sqrt(v, out=x)
        x += cfg.eps * root2
        xp.divide(m, x, out=x)
        x *= rate
        w *= decay
        w -= x


def _sgd(
    p: Array, g: Array, first: Array, cfg: SGD, rate: float, scale: float, decay: float
) -> None:
    first *= cfg.momentum
    first += scale * g
    p *= decay
    p -= rate * first
