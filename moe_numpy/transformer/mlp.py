"""The dense feed-forward: what a MoE layer has many of."""

from __future__ import annotations

import math
from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, to_device
from moe_numpy.config import GATED, ModelConfig
from moe_numpy.ops import activation, linear


class MLPParams(NamedTuple):
    """Two matrices, and a third for gated activations."""

    in_CF: Array
    up_CF: Array | None
    out_FC: Array


def init_mlp(rng: Generator, cfg: ModelConfig, dtype: str) -> MLPParams:
    """Draw so that hidden units start at unit size: deviation 1 / sqrt(width) (LeCun et al. 1998).

    The output starts small, 0.02 / sqrt(2 * layers), as in GPT-2: so many branches are added up.
    """
    C, F = cfg.width, cfg.hidden
    in_std = 1.0 / math.sqrt(C)
    gated = cfg.dense_activation in GATED
    return MLPParams(
        in_CF=to_device(rng.normal(0.0, in_std, (C, F)), dtype),
        up_CF=to_device(rng.normal(0.0, in_std, (C, F)), dtype) if gated else None,
        out_FC=to_device(rng.normal(0.0, 0.02 / math.sqrt(2 * cfg.layers), (F, C)), dtype),
    )


def mlp_forward(x: Array, params: MLPParams, kind: str) -> tuple[Array, Cache]:
    """Widen, activate, narrow.

        y = act(x in) out    or, gated,    y = act(x in, x up) out

    Shapes     x (..., C) -> y (..., C)
    Cache      the caches of its parts: x once, about 4 times the hidden rows (6 gated)
    Source     Vaswani et al. 2017, section 3.3; gated: Shazeer 2020, GLU Variants
    """
    a, in_cache = linear.linear_forward(x, params.in_CF)  # 1. widen
    up, up_cache = None, None
    if params.up_CF is not None:
        up, up_cache = linear.linear_forward(x, params.up_CF)
    h, act_cache = activation.activate_forward(kind, a, up)  # 2. activate
    y, out_cache = linear.linear_forward(h, params.out_FC)  # 3. narrow
    return y, (in_cache, up_cache, act_cache, out_cache)


def mlp_backward(dy: Array, cache: Cache) -> tuple[Array, MLPParams]:
    """Undo `mlp_forward` part by part; x was read once or, gated, twice.

    Shapes     dy (..., C) -> dx (..., C), grads
    """
    in_cache, up_cache, act_cache, out_cache = cache
    dh, dout_FC = linear.linear_backward(dy, out_cache)  # 3.
    if up_cache is None:
        da = activation.activate_backward(dh, act_cache)  # 2.
        dx, din_CF = linear.linear_backward(da, in_cache)  # 1.
        return dx, MLPParams(din_CF, None, dout_FC)
    da, dup = activation.activate_backward(dh, act_cache)  # 2.
    dx, din_CF = linear.linear_backward(da, in_cache)  # 1.
    dx_up, dup_CF = linear.linear_backward(dup, up_cache)
    return dx + dx_up, MLPParams(din_CF, dup_CF, dout_FC)
