"""Normalization of the last axis."""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, xp
from moe_numpy.ops import rows


def inverse_root(square: Array) -> Array:
    """Compute 1 / sqrt(square), and NaN where the squares were too large for their type.

    There 1 / infinity is zero: the norm would silently make zeros of its largest rows.

    Shapes     square (...) -> (...)
    """
    return xp.where(square < xp.inf, 1.0 / xp.sqrt(square), xp.nan)


def rms_norm_forward(x: Array, gain_C: Array | None, eps: float = 1e-5) -> tuple[Array, Cache]:
    """Divide each row by its root mean square, then scale every channel.

        r = 1 / sqrt(mean(x^2) + eps),    y = gain * x * r

    Shapes     x (..., C); gain_C (C,), or None for a gain of one -> y (..., C)
    Cache      (unit, r, gain_C): unit = x * r, as large as x
    Source     Zhang and Sennrich 2019, Root Mean Square Layer Normalization, eq. 4
    """
    r = inverse_root(rows.dots(x, x) / x.shape[-1] + eps)  # 1. inverse size
    unit = x * r  # 2. unit size
    return unit if gain_C is None else gain_C * unit, (unit, r, gain_C)  # 3. gain


def rms_norm_backward(dy: Array, cache: Cache) -> tuple[Array, Array | None]:
    """Undo `rms_norm_forward`.

    With q = gain * dy and dr/dx_j = -r^3 x_j / C,
        dx_j = r q_j + sum_i q_i x_i dr/dx_j = r (q_j - unit_j mean(q * unit)).

    Shapes     dy (..., C) -> dx (..., C), dgain_C (C,) or None
    """
    unit, r, gain_C = cache
    if gain_C is None:
        return r * (dy - unit * (rows.dots(dy, unit) / unit.shape[-1])), None
    p = dy * unit
    dgain_C = rows.sum_columns(p)  # 3.
    mean_qu = p @ (gain_C / gain_C.size)
    dx = gain_C * dy  # 2. and 1.
    dx -= xp.multiply(unit, mean_qu[..., None], out=p)
    dx *= r
    return dx, dgain_C


def layer_norm_forward(
    x: Array, gain_C: Array, bias_C: Array, eps: float = 1e-5
) -> tuple[Array, Cache]:
    """Shift each row to mean zero and variance one, then scale and shift every channel.

        unit = (x - mean(x)) / sqrt(var(x) + eps),    y = gain * unit + bias

    Shapes     x (..., C); gain_C (C,); bias_C (C,) -> y (..., C)
    Cache      (unit, r, gain_C): unit is as large as x
    Source     Ba et al. 2016, Layer Normalization, eq. 4; the variance is the population's
    """
    unit = x - rows.mean(x)  # 1. mean zero
    r = inverse_root(rows.dots(unit, unit) / x.shape[-1] + eps)  # 2. inverse deviation
    unit *= r  # 3. variance one
    y = gain_C * unit  # 4. gain and bias
    y += bias_C
    return y, (unit, r, gain_C)


def layer_norm_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """Undo `layer_norm_forward`.

    With q = gain * dy and d = x - mean(x), so that unit = d r and dr/dd_j = -r^3 d_j / C:
        dd = r (q - unit mean(q * unit)).
    Centering takes the mean out, and that of unit is zero:
        dx = dd - mean(dd) = r (q - mean(q) - unit mean(q * unit)).

    Shapes     dy (..., C) -> dx (..., C), dgain_C (C,), dbias_C (C,)
    """
    unit, r, gain_C = cache
    p = dy * unit
    dbias_C, dgain_C = rows.sum_columns(dy), rows.sum_columns(p)  # 4.
    mean_q, mean_qu = (x @ (gain_C / gain_C.size) for x in (dy, p))
    dx = gain_C * dy  # 3. to 1.
    dx -= xp.multiply(unit, mean_qu[..., None], out=p)
    dx -= mean_q[..., None]
    dx *= r
    return dx, dgain_C, dbias_C
