"""Soft slots: every expert works on weighted means of all tokens, and nothing is chosen.

The means run over all N tokens that are given at once, whichever sequences they come from: what a
token gets depends on everything else in its batch. Sequences that must not see each other are
given one by one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, to_device, xp
from moe_numpy.config import MoEConfig
from moe_numpy.moe.report import MoEReport
from moe_numpy.ops import norm, softmax

EPS = 1e-6  # keeps a row of zeros finite


class SoftParams(NamedTuple):
    """One vector for each of the R slots, sorted by expert, and the common scale of the logits."""

    slots_CR: Array
    scale: Array


def init_soft(rng: Generator, cfg: MoEConfig, width: int, dtype: str) -> SoftParams:
    """Draw the slots with deviation 1 / sqrt(width) (LeCun et al. 1998); the scale starts at 1.

    Their length does not matter, since it is divided out.
    """
    shape = (width, cfg.num_experts * cfg.selection.slots)
    return SoftParams(
        slots_CR=to_device(rng.normal(0.0, 1.0 / math.sqrt(width), shape), dtype),
        scale=xp.ones((), dtype),
    )


def l2_normalize_forward(x: Array) -> tuple[Array, Cache]:
    """Divide each row by its length.

        y = x / sqrt(sum(x^2) + eps)

    Shapes     x (..., C) -> y (..., C)
    Cache      (y, r): r = 1 / sqrt(sum(x^2) + eps), shape (..., 1)
    Source     Puigcerver et al. 2024, From Sparse to Soft Mixtures of Experts, section 2.3
    """
    r = norm.inverse_root((x * x).sum(-1, keepdims=True) + EPS)
    y = x * r
    return y, (y, r)


def l2_normalize_backward(dy: Array, cache: Cache) -> Array:
    """Undo `l2_normalize_forward`.

    dr/dx_j = -r^3 x_j, hence dx = r (dy - y <y, dy>): what would only lengthen x has no effect.

    Shapes     dy (..., C) -> dx (..., C)
    """
    y, r = cache
    return r * (dy - y * (y * dy).sum(-1, keepdims=True))


def soft_slots_forward(x_NC: Array, params: SoftParams) -> tuple[Array, Array, Cache]:
    """Mix all tokens into every slot, and say how the slots' results are mixed for every token.

        logit[n, r] = scale * cosine(x[n], slots[:, r])
        dispatch[:, r] = softmax over the tokens,    x[r] = sum_n dispatch[n, r] x[n]
        combine[n, :] = softmax over the slots of all experts

    One matrix of logits, two softmaxes. The experts turn x_RC into y_RC, of which token n gets
    sum_r combine[n, r] y[r].

    Shapes     x_NC (N, C) -> x_RC (R, C), rows sorted by expert; combine_NR (N, R)
    Cache      (x_NC, dispatch_RN, combine_NR, (unit_NC, unit_RC, scale, normalization caches))
    Source     Puigcerver et al. 2024, From Sparse to Soft Mixtures of Experts, eq. 1 to 3 and
               section 2.3; eps in the normalization as in the released code
    """
    unit_NC, token_cache = l2_normalize_forward(x_NC)  # 1. unit vectors
    unit_RC, slot_cache = l2_normalize_forward(params.slots_CR.T)
    logit_NR = params.scale * (unit_NC @ unit_RC.T)  # 2. logits
    dispatch_RN = logit_NR.T
    if x_NC.shape[0]:  # 3. over the tokens: each slot's weights sum to one
        dispatch_RN, _ = softmax.softmax_forward(dispatch_RN)
    combine_NR, _ = softmax.softmax_forward(logit_NR)  # 4. over the slots: each token's do
    x_RC = dispatch_RN @ x_NC  # 5. means
    units = (unit_NC, unit_RC, params.scale, token_cache, slot_cache)
    return x_RC, combine_NR, (x_NC, dispatch_RN, combine_NR, units)


def soft_slots_backward(dx_RC: Array, dcombine_NR: Array, cache: Cache) -> tuple[Array, SoftParams]:
    """Undo `soft_slots_forward`: the logits hear from both softmaxes, the tokens twice.

    With cosine = u v^T:    dscale = <dlogit, cosine>,    du = scale dlogit v,
    dv = scale dlogit^T u; and the means were linear in the tokens: dx = dispatch dx_R.

    Shapes     dx_RC (R, C), dcombine_NR (N, R) -> dx_NC (N, C), grads
    """
    x_NC, dispatch_RN, combine_NR, units = cache
    unit_NC, unit_RC, scale, token_cache, slot_cache = units
    dx_NC = dispatch_RN.T @ dx_RC  # 5.
    dlogit_NR = softmax.softmax_backward(dcombine_NR, (combine_NR,))  # 4.
    dlogit_RN = softmax.softmax_backward(dx_RC @ x_NC.T, (dispatch_RN,))  # 3.
    dlogit_NR = dlogit_NR + dlogit_RN.T
    dunit_NC = dlogit_NR @ unit_RC  # 2., without the scale
    dscale = xp.asarray((dunit_NC * unit_NC).sum())
    dunit_RC = dlogit_NR.T @ unit_NC
    dx_NC = dx_NC + l2_normalize_backward(scale * dunit_NC, token_cache)  # 1.
    dslots_RC = l2_normalize_backward(scale * dunit_RC, slot_cache)
    return dx_NC, SoftParams(xp.ascontiguousarray(dslots_RC.T), dscale)


def soft_report(combine_NR: Array, E: int) -> MoEReport:
    """Report on the mixture: an expert's load is its slots, its probability its share of a token.

    Shapes     combine_NR (N, R), slots sorted by expert
    """
    N, R = combine_NR.shape
    share_NE = combine_NR.reshape(N, E, R // E).sum(2)
    slots_E = xp.full(E, R // E)
    log_NE = xp.log(xp.where(share_NE > 0, share_NE, 1.0))
    return MoEReport(
        wished_E=slots_E,
        load_E=slots_E,
        dropped=0,
        decisiveness=share_NE.max(1).sum() / max(N, 1),
        gate_entropy=-(share_NE * log_NE).sum() / max(N, 1),
    )
