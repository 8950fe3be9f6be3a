"""The dense feed-forward: what an MoE layer has many of."""

from __future__ import annotations

import math
from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, to_device
from moe_numpy.config import branches
from moe_numpy.ops import activation, linear


class MLPParams(NamedTuple):
    """Two matrices, `up_CF` for gated activations, and `third_CF` for "swiglu3"."""

    in_CF: Array
    up_CF: Array | None
    out_FC: Array
    third_CF: Array | None = None


def init_mlp(
    rng: Generator, width: int, hidden: int, activation: str, dtype: str, depth: int
) -> MLPParams:
    """Draw so that hidden units start at unit size: deviation 1 / sqrt(width) (LeCun et al. 1998).

    The output starts small, 0.02 / sqrt(depth), as in GPT-2: `depth` branches are added up, two for
    each layer.
    """
    C, F = width, hidden
    in_std, out_std = 1.0 / math.sqrt(C), 0.02 / math.sqrt(depth)

    def draw(std: float, *shape: int) -> Array:
        return to_device(rng.normal(0.0, std, shape), dtype)

    return MLPParams(
        in_CF=draw(in_std, C, F),
        up_CF=draw(in_std, C, F) if branches(activation) > 1 else None,
        out_FC=draw(out_std, F, C),
        third_CF=draw(in_std, C, F) if branches(activation) == 3 else None,
    )


def mlp_forward(x: Array, params: MLPParams, kind: str) -> tuple[Array, Cache]:
    """Widen, activate, narrow.

        y = act(x in) out    or, gated,    y = act(x in, x up) out

    "swiglu3" takes a third branch, x third.

    Shapes     x (..., C) -> y (..., C)
    Cache      the caches of its parts: x once, and of each hidden unit what `ledger.LEFT` lists
    Source     Vaswani et al. 2017, section 3.3; gated: Shazeer 2020, GLU Variants
    """
    a, in_cache = linear.linear_forward(x, params.in_CF)  # 1. widen
    up = up_cache = third = third_cache = None
    if params.up_CF is not None:
        up, up_cache = linear.linear_forward(x, params.up_CF)
    if params.third_CF is not None:
        third, third_cache = linear.linear_forward(x, params.third_CF)
    h, act_cache = activation.activate_forward(kind, a, up, third)  # 2. activate
    y, out_cache = linear.linear_forward(h, params.out_FC)  # 3. narrow
    return y, (in_cache, up_cache, third_cache, act_cache, out_cache)


def mlp_backward(dy: Array, cache: Cache) -> tuple[Array, MLPParams]:
    """Undo `mlp_forward` part by part; every branch has read x, so their gradients add up.

    Shapes     dy (..., C) -> dx (..., C), grads
    """
    in_cache, up_cache, third_cache, act_cache, out_cache = cache
    dh, dout_FC, _ = linear.linear_backward(dy, out_cache)  # 3.
    da, dup, dthird = activation.activate_backward(dh, act_cache)  # 2.
    dx, din_CF, _ = linear.linear_backward(da, in_cache)  # 1.
    dup_CF = dthird_CF = None
    if up_cache is not None:
        dx_up, dup_CF, _ = linear.linear_backward(dup, up_cache)
        dx = dx + dx_up
    if third_cache is not None:
        dx_third, dthird_CF, _ = linear.linear_backward(dthird, third_cache)
        dx = dx + dx_third
    return dx, MLPParams(din_CF, dup_CF, dout_FC, dthird_CF)
