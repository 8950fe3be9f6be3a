"""Softmax over the last axis, its logarithm, its form with a sink, and a cap for its logits."""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, xp
from moe_numpy.ops import rows


def softmax_forward(z: Array) -> tuple[Array, Cache]:
    """Turn logits into probabilities.

        p_i = exp(z_i - max z) / sum_j exp(z_j - max z)

    Shapes     z (..., E) -> p (..., E); logits of minus infinity get probability zero
    Units      z in nats
    Cache      (p,)
    Source     Bridle 1990; the maximum is subtracted so that exp cannot overflow
    """
    p = xp.empty_like(z, order="C")
    rows.in_blocks(_softmax, z, p)
    return p, (p,)


def softmax_backward(dp: Array, cache: Cache) -> Array:
    """Undo `softmax_forward`.

    dp_i / dz_j = p_i (delta_ij - p_j), hence dz_j = p_j (dp_j - sum_i p_i dp_i): a dp that is the
    same for all gives dz = 0.

    Shapes     dp (..., E) -> dz (..., E)
    """
    (p,) = cache
    dz = dp - rows.dots(p, dp)
    dz *= p
    return dz


def _softmax(z: Array, p: Array) -> None:
    xp.subtract(z, rows.maximum(z), out=p)
    xp.exp(p, out=p)  # 1. exponentials
    p /= rows.sums(p)  # 2. normalized


def log_softmax_forward(z: Array) -> tuple[Array, Cache]:
    """Compute the logarithm of the softmax without taking the logarithm of a small number.

        y_i = z_i - log sum_j exp z_j

    Shapes     z (..., V) -> y (..., V)
    Units      nats
    Cache      (y,)
    Source     Bridle 1990
    """
    y = z - rows.maximum(z)  # 1. largest is zero
    y -= xp.log(rows.sums(xp.exp(y)))  # 2. minus log-sum-exp
    return y, (y,)


def log_softmax_backward(dy: Array, cache: Cache) -> Array:
    """Undo `log_softmax_forward`.

    The derivative of log-sum-exp is the softmax p = exp(y), hence dz = dy - p sum_i dy_i.

    Shapes     dy (..., V) -> dz (..., V)
    """
    (y,) = cache
    return dy - xp.exp(y) * rows.sums(dy)  # 2. and 1.


def sink_softmax_forward(z_BHTS: Array, sink_H: Array) -> tuple[Array, Cache]:
    """Turn logits into weights that need not sum to one: the head's sink takes the rest.

        a_s = exp(z_s) / (exp(sink) + sum_j exp(z_j))

    This is the softmax of the logits and one more column, the sink, which is then discarded.

    Shapes     z_BHTS (B, H, T, S); sink_H (H,) -> a_BHTS (B, H, T, S)
    Units      z and sink in nats
    Cache      (a_BHTS, rest): rest is what the sink took, (B, H, T, 1)
    Source     OpenAI 2025, gpt-oss, `sdpa` in model.py; the maximum is subtracted as in `softmax`
    """
    sink = sink_H[:, None, None]
    top = xp.maximum(rows.maximum(z_BHTS), sink)
    a_BHTS, rest = xp.exp(z_BHTS - top), xp.exp(sink - top)  # 1. exponentials
    total = rows.sums(a_BHTS) + rest
    a_BHTS /= total  # 2. normalized
    rest /= total
    return a_BHTS, (a_BHTS, rest)


def sink_softmax_backward(da_BHTS: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `sink_softmax_forward`: the softmax's backward, with a zero upstream of the sink.

    dz_s = a_s (da_s - sum_j a_j da_j),    dsink = -sum over b, t of rest sum_j a_j da_j.

    Shapes     da_BHTS (B, H, T, S) -> dz_BHTS (B, H, T, S), dsink_H (H,)
    """
    a_BHTS, rest = cache
    inner = rows.dots(a_BHTS, da_BHTS)
    return a_BHTS * (da_BHTS - inner), -(rest * inner).sum((0, 2, 3))  # 2. and 1.


def soft_cap_forward(z: Array, cap: float) -> tuple[Array, Cache]:
    """Keep logits between -cap and cap, and small ones nearly as they are.

        y = cap * tanh(z / cap)

    Shapes     z (...) -> y (...)
    Units      as z
    Cache      (t,): t = tanh(z / cap)
    Source     xAI 2024, Grok-1, `MultiHeadAttention` in model.py (cap = 30)
    """
    t = xp.tanh(z / cap)
    return cap * t, (t,)


def soft_cap_backward(dy: Array, cache: Cache) -> Array:
    """Undo `soft_cap_forward`: dy/dz = 1 - tanh(z / cap)^2.

    Shapes     dy (...) -> dz (...)
    """
    (t,) = cache
    return dy * (1.0 - t * t)
