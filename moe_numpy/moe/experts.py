"""The experts: one two-layer MLP each, run over contiguous slices of the sorted rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, few_launches, to_device, xp
from moe_numpy.config import MoEConfig
from moe_numpy.ops import activation


class ExpertParams(NamedTuple):
    """The matrices of all experts; `up_ECF` is there only for gated activations."""

    in_ECF: Array
    up_ECF: Array | None
    out_EFC: Array


def init_experts(
    rng: Generator, cfg: MoEConfig, width: int, dtype: str, depth: int = 1
) -> ExpertParams:
    """Draw each expert as `init_mlp` draws the dense feed-forward.

    What reads the stream gets deviation 1 / sqrt(width), so that hidden units start at unit size;
    what writes into it 0.02 / sqrt(depth), where `depth` counts the residual branches (2 * layers).
    """
    E, C, F = cfg.num_experts, width, cfg.hidden

    def draw(std: float, *shape: int) -> Array:
        return to_device(rng.normal(0.0, std, shape), dtype)

    return ExpertParams(
        in_ECF=draw(1.0 / math.sqrt(C), E, C, F),
        up_ECF=draw(1.0 / math.sqrt(C), E, C, F) if cfg.gated else None,
        out_EFC=draw(0.02 / math.sqrt(depth), E, F, C),
    )


def grouped_linear_forward(
    x_RI: Array, w_EIO: Array, offsets: tuple[int, ...]
) -> tuple[Array, Cache]:
    """Multiply the rows of each expert by that expert's matrix.

        y[r] = x[r] @ w[e]    for offsets[e] <= r < offsets[e + 1]

    Shapes     x_RI (R, I), rows sorted by expert; w_EIO (E, I, O); offsets E + 1 integers
               -> y_RO (R, O)
    Cache      (x_RI, w_EIO, offsets): no copies
    Source     Gale et al. 2022, MegaBlocks, section 3; differs: a loop over dense slices
    """
    y_RO = xp.empty((x_RI.shape[0], w_EIO.shape[2]), x_RI.dtype)
    for e, rows in _slices(offsets):
        xp.matmul(x_RI[rows], w_EIO[e], out=y_RO[rows])
    return y_RO, (x_RI, w_EIO, offsets)


def grouped_linear_backward(dy_RO: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `grouped_linear_forward`: `linear_backward` for each slice.

    dx[rows of e] = dy[rows of e] w[e]^T,    dw[e] = x[rows of e]^T dy[rows of e];
    an expert without rows gets the gradient zero.

    Shapes     dy_RO (R, O) -> dx_RI (R, I), dw_EIO (E, I, O)
    """
    x_RI, w_EIO, offsets = cache
    dx_RI = xp.empty_like(x_RI)
    dw_EIO = xp.zeros_like(w_EIO)
    for e, rows in _slices(offsets):
        xp.matmul(dy_RO[rows], w_EIO[e].T, out=dx_RI[rows])
        xp.matmul(x_RI[rows].T, dy_RO[rows], out=dw_EIO[e])
    return dx_RI, dw_EIO


def padded_linear_forward(
    x_RI: Array, w_EIO: Array, offsets: tuple[int, ...]
) -> tuple[Array, Cache]:
    """Do what `grouped_linear_forward` does in one batched product over padded rows.

        X[e, p] = x[offsets[e] + p],    Y = X @ w,    y[offsets[e] + p] = Y[e, p]

    Every expert gets as many places P as the busiest one needs, filled up with zeros. That is more
    work in one launch instead of E: the better trade on a GPU, the worse one on a CPU.

    Shapes     x_RI (R, I), rows sorted by expert; w_EIO (E, I, O); offsets E + 1 integers
               -> y_RO (R, O)
    Cache      (x_EPI, w_EIO, place_R): 4*E*P*I bytes in float32
    Source     Lepikhin et al. 2020, GShard, section 3.2; differs: P is what is needed, none drop
    """
    E, I, O = w_EIO.shape
    P = max(end - start for start, end in itertools.pairwise(offsets))
    row_R = xp.arange(x_RI.shape[0])
    start_E, end_E = to_device(offsets[:-1]), to_device(offsets[1:])
    expert_R = xp.searchsorted(end_E, row_R, side="right")
    place_R = expert_R * P + row_R - start_E[expert_R]
    x_EPI = _pad(x_RI, place_R, (E, P, I))  # 1. pad
    y_EPO = x_EPI @ w_EIO  # 2. one product
    return y_EPO.reshape(E * P, O)[place_R], (x_EPI, w_EIO, place_R)  # 3. unpad


def padded_linear_backward(dy_RO: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `padded_linear_forward`: `linear_backward` for each expert; padding adds only zeros.

    Shapes     dy_RO (R, O) -> dx_RI (R, I), dw_EIO (E, I, O)
    """
    x_EPI, w_EIO, place_R = cache
    E, I, O = w_EIO.shape
    P = x_EPI.shape[1]
    dy_EPO = _pad(dy_RO, place_R, (E, P, O))  # 3.
    dx_EPI = dy_EPO @ w_EIO.swapaxes(1, 2)  # 2.
    dw_EIO = x_EPI.swapaxes(1, 2) @ dy_EPO
    return dx_EPI.reshape(E * P, I)[place_R], dw_EIO  # 1.


def experts_forward(
    x_RC: Array, params: ExpertParams, cfg: MoEConfig, offsets: tuple[int, ...]
) -> tuple[Array, Cache]:
    """Run every expert's MLP on its own rows.

        y = act(x in) out    or, gated,    y = act(x in, x up) out

    Shapes     x_RC (R, C), rows sorted by expert; offsets E + 1 integers -> y_RC (R, C)
    Cache      the caches of its parts: x once, about 4*R*F numbers (6*R*F gated)
    Source     Shazeer et al. 2017, section 3.1; gated: Jiang et al. 2024, Mixtral, section 2.1
    """
    product_forward, _ = _products()
    a_RF, in_cache = product_forward(x_RC, params.in_ECF, offsets)  # 1. widen
    up_RF, up_cache = None, None
    if params.up_ECF is not None:
        up_RF, up_cache = product_forward(x_RC, params.up_ECF, offsets)
    h_RF, act_cache = activation.activate_forward(cfg.activation, a_RF, up_RF)  # 2. activate
    y_RC, out_cache = product_forward(h_RF, params.out_EFC, offsets)  # 3. back to width C
    return y_RC, (in_cache, up_cache, act_cache, out_cache)


def experts_backward(dy_RC: Array, cache: Cache) -> tuple[Array, ExpertParams]:
    """Undo `experts_forward` part by part; x was read once or, gated, twice.

    Shapes     dy_RC (R, C) -> dx_RC (R, C), grads
    """
    in_cache, up_cache, act_cache, out_cache = cache
    _, product_backward = _products()
    dh_RF, dout_EFC = product_backward(dy_RC, out_cache)  # 3.
    if up_cache is None:
        da_RF = activation.activate_backward(dh_RF, act_cache)  # 2.
        dx_RC, din_ECF = product_backward(da_RF, in_cache)  # 1.
        return dx_RC, ExpertParams(din_ECF, None, dout_EFC)
    da_RF, dup_RF = activation.activate_backward(dh_RF, act_cache)  # 2.
    dx_RC, din_ECF = product_backward(da_RF, in_cache)  # 1.
    dx_up_RC, dup_ECF = product_backward(dup_RF, up_cache)
    return dx_RC + dx_up_RC, ExpertParams(din_ECF, dup_ECF, dout_EFC)


def _products() -> tuple[Callable, Callable]:
    """Choose how the rows meet the matrices: slice by slice, or padded where launches cost."""
    if few_launches():
        return padded_linear_forward, padded_linear_backward
    return grouped_linear_forward, grouped_linear_backward


def _pad(x_RI: Array, place_R: Array, shape: tuple[int, int, int]) -> Array:
    E, P, I = shape
    padded = xp.zeros((E * P, I), x_RI.dtype)
    padded[place_R] = x_RI
    return padded.reshape(shape)


def _slices(offsets: tuple[int, ...]) -> list[tuple[int, slice]]:
    """List the experts that have rows, each with the slice of its rows."""
    bounds = itertools.pairwise(offsets)
    return [(e, slice(start, end)) for e, (start, end) in enumerate(bounds) if end > start]
