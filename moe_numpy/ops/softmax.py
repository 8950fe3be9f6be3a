"""Softmax and its logarithm over the last axis."""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, xp


def softmax_forward(z: Array) -> tuple[Array, Cache]:
    """Turn logits into probabilities.

        p_i = exp(z_i - max z) / sum_j exp(z_j - max z)

    Shapes     z (..., E) -> p (..., E); logits of minus infinity get probability zero
    Units      z in nats
    Cache      (p,)
    Source     Bridle 1990; the maximum is subtracted so that exp cannot overflow
    """
    p = xp.exp(z - z.max(-1, keepdims=True))  # 1. exponentials
    p /= p.sum(-1, keepdims=True)  # 2. normalized
    return p, (p,)


def softmax_backward(dp: Array, cache: Cache) -> Array:
    """Undo `softmax_forward`.

    dp_i / dz_j = p_i (delta_ij - p_j), hence dz_j = p_j (dp_j - sum_i p_i dp_i): what raises all
    probabilities alike has no effect.

    Shapes     dp (..., E) -> dz (..., E)
    """
    (p,) = cache
    return p * (dp - (p * dp).sum(-1, keepdims=True))


def log_softmax_forward(z: Array) -> tuple[Array, Cache]:
    """Compute the logarithm of the softmax without taking the logarithm of a small number.

        y_i = z_i - log sum_j exp z_j

    Shapes     z (..., V) -> y (..., V)
    Units      nats
    Cache      (y,)
    Source     Bridle 1990
    """
    shifted = z - z.max(-1, keepdims=True)  # 1. largest is zero
    y = shifted - xp.log(xp.exp(shifted).sum(-1, keepdims=True))  # 2. minus log-sum-exp
    return y, (y,)


def log_softmax_backward(dy: Array, cache: Cache) -> Array:
    """Undo `log_softmax_forward`.

    The derivative of log-sum-exp is the softmax p = exp(y), hence dz = dy - p sum_i dy_i.

    Shapes     dy (..., V) -> dz (..., V)
    """
    (y,) = cache
    return dy - xp.exp(y) * dy.sum(-1, keepdims=True)
