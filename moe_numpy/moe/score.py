"""Scores and gates: what a logit becomes, and how the chosen experts are weighed by it."""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, xp
from moe_numpy.config import MoEConfig
from moe_numpy.moe import router
from moe_numpy.ops import activation, softmax

TINY = 1e-30  # keeps a quotient finite where all scores are zero


def sqrt_softplus_forward(x: Array) -> tuple[Array, Cache]:
    """Score without an upper bound.

        y = sqrt(log(1 + exp(x)))

    Shapes     x (...) -> y (...)
    Cache      (y,)
    Source     DeepSeek-AI 2026, DeepSeek-V4, section 2.1
    """
    soft, _ = activation.softplus_forward(x)
    y = xp.sqrt(soft)
    return y, (y,)


def sqrt_softplus_backward(dy: Array, cache: Cache) -> Array:
    """Undo `sqrt_softplus_forward`: dy/dx = sigmoid(x) / (2 y), sigmoid(x) = 1 - exp(-y^2).

    Shapes     dy (...) -> dx (...); zero where y is
    """
    (y,) = cache
    return dy * xp.expm1(-y * y) / (-2.0 * xp.where(y > 0, y, 1.0))


def score_forward(kind: str, logit_NE: Array) -> tuple[Array, Cache]:
    """Score the experts by their logits.

        score = softmax(logit),  sigmoid(logit)  or  sqrt(softplus(logit))

    Shapes     logit_NE (N, E) -> score_NE (N, E); only those of the softmax sum to one
    Cache      (kind, cache of the function)
    Source     Shazeer et al. 2017; sigmoid: DeepSeek-AI 2024, DeepSeek-V3, eq. 15; softplus: V4
    """
    forward = {
        "softmax": softmax.softmax_forward,
        "sigmoid": activation.sigmoid_forward,
        "sqrt_softplus": sqrt_softplus_forward,
    }[kind]
    score_NE, cache = forward(logit_NE)
    return score_NE, (kind, cache)


def score_backward(dscore_NE: Array, cache: Cache) -> Array:
    """Hand the gradient to the function that scored.

    Shapes     dscore_NE (N, E) -> dlogit_NE (N, E)
    """
    kind, function_cache = cache
    backward = {
        "softmax": softmax.softmax_backward,
        "sigmoid": activation.sigmoid_backward,
        "sqrt_softplus": sqrt_softplus_backward,
    }[kind]
    return backward(dscore_NE, function_cache)


def share_forward(score: Array) -> tuple[Array, Cache]:
    """Divide scores by their sum.

        share_i = score_i / sum_j score_j    over the last axis, a sum of at least 1e-30

    Where all scores are smaller than that, their shares sum to less than one and end at zero:
    where all logits are below -69 for the sigmoid, and below -138 for sqrt(softplus) (in float32
    below -104, where the score itself is rounded to zero).

    Shapes     score (..., E), not negative -> share (..., E)
    Cache      (share, total)
    Source     DeepSeek-AI 2024, DeepSeek-V3, eq. 13 and 19
    """
    total = xp.maximum(score.sum(-1, keepdims=True), TINY)
    share = score / total
    return share, (share, total)


def share_backward(dshare: Array, cache: Cache) -> Array:
    """Undo `share_forward`: dscore_i = (dshare_i - <share, dshare>) / sum_j score_j.

    Where the sum is held at its bound it is a constant, and the inner product is left out.

    Shapes     dshare (..., E) -> dscore (..., E)
    """
    share, total = cache
    inner = (share * dshare).sum(-1, keepdims=True) * (total > TINY)
    return (dshare - inner) / total


def share_gate_forward(
    score_NE: Array, expert_NK: Array, kept_NK: Array | None = None
) -> tuple[Array, Cache]:
    """Weigh the chosen experts by their share of the chosen scores.

        gate[n, :] = score[n, expert[n, :]] / sum_k score[n, expert[n, k]]

    With `kept_NK` the scores of dropped choices count as zero. For the softmax this is
    `router.renormalized_gate_forward`; here the scores may be any.

    Shapes     score_NE (N, E); expert_NK (N, K) integers, all different in a row; kept_NK (N, K)
               booleans, None for all -> gate_NK (N, K); zero if nothing was kept
    Cache      (gather cache, kept_NK, share cache)
    Source     DeepSeek-AI 2024, DeepSeek-V3, eq. 13
    """
    chosen_NK, gather_cache = router.raw_gate_forward(score_NE, expert_NK)  # 1. chosen scores
    if kept_NK is not None:
        chosen_NK = chosen_NK * kept_NK  # 2. without those of dropped choices
    gate_NK, share_cache = share_forward(chosen_NK)  # 3. their shares
    return gate_NK, (gather_cache, kept_NK, share_cache)


def share_gate_backward(dgate_NK: Array, cache: Cache) -> Array:
    """Undo `share_gate_forward` part by part.

    Shapes     dgate_NK (N, K) -> dscore_NE (N, E)
    """
    gather_cache, kept_NK, share_cache = cache
    dchosen_NK = share_backward(dgate_NK, share_cache)  # 3.
    if kept_NK is not None:
        dchosen_NK = dchosen_NK * kept_NK  # 2.
    return router.raw_gate_backward(dchosen_NK, gather_cache)  # 1.


def gates_from_logits(cfg: MoEConfig) -> bool:
    """Tell what `gates_forward` reads: logits (a softmax over the chosen alone), or scores."""
    return cfg.renormalized and cfg.score == "softmax"


def scores_are_read(cfg: MoEConfig) -> bool:
    """Tell whether the scores of all experts may matter to more than the report.

    Where they do not, only the chosen logits have a softmax: gates read those, the choice compares
    logits, and there is no balance term, no capacity and no other selection.
    """
    plain = not (cfg.balance or cfg.capacity or cfg.selection)
    return not (plain and gates_from_logits(cfg))


def gates_forward(
    read_NE: Array, expert_NK: Array, kept_NK: Array, cfg: MoEConfig
) -> tuple[Array, Cache]:
    """Weigh the chosen experts as `cfg.gate_weights` says.

        raw                 gate = scale * score[chosen]
        renormalized        gate = scale * score[chosen] / sum over the chosen
        renormalized_kept   gate = scale * score[chosen] / sum over the chosen that have a place

    Renormalized softmax gates are computed from the logits: a softmax over the chosen alone, or
    over those that have a place. The gate of a lone survivor is the constant 1.

    Shapes     read_NE (N, E), the logits or the scores, as `gates_from_logits` says;
               expert_NK (N, K) integers; kept_NK (N, K) booleans -> gate_NK (N, K)
    Cache      (cfg, gate cache)
    Source     Fedus et al. 2022, eq. 2 (raw); Shazeer et al. 2017, eq. 3 (renormalized);
               DeepSpeed's top-k gating (kept; GShard divides before it drops); DeepSeek-AI 2024,
               DeepSeek-V3, eq. 13 (any score; its route scale)
    """
    only_NK = kept_NK if cfg.gate_weights == "renormalized_kept" else None
    if not cfg.renormalized:  # 1. weights
        gate_NK, gate_cache = router.raw_gate_forward(read_NE, expert_NK)
    elif gates_from_logits(cfg):
        gate_NK, gate_cache = router.renormalized_gate_forward(read_NE, expert_NK, only_NK)
    else:
        gate_NK, gate_cache = share_gate_forward(read_NE, expert_NK, only_NK)
    if cfg.gate_scale != 1.0:  # 2. scale
        gate_NK = gate_NK * cfg.gate_scale
    return gate_NK, (cfg, gate_cache)


def gates_backward(dgate_NK: Array, cache: Cache) -> Array:
    """Undo `gates_forward` part by part.

    Shapes     dgate_NK (N, K) -> dread_NE (N, E)
    """
    cfg, gate_cache = cache
    if cfg.gate_scale != 1.0:  # 2.
        dgate_NK = dgate_NK * cfg.gate_scale
    if not cfg.renormalized:  # 1.
        return router.raw_gate_backward(dgate_NK, gate_cache)
    if gates_from_logits(cfg):
        return router.renormalized_gate_backward(dgate_NK, gate_cache)
    return share_gate_backward(dgate_NK, gate_cache)
