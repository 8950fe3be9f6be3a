"""Rotary positions: queries and keys turned by an angle that grows with the position."""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, xp


def rotary_forward(x: Array, position_T: Array, theta: float = 10_000.0) -> tuple[Array, Cache]:
    """Rotate each pair of channels (d, d + D/2) by position * theta^(-2d / D).

        y1 = x1 cos - x2 sin,    y2 = x2 cos + x1 sin

    Shapes     x (..., T, D), D even; position_T (T,) integers -> y (..., T, D)
    Units      angles in radians
    Cache      (cos, sin): (T, D/2) each
    Source     Su et al. 2021, RoFormer, section 3.2; differs: channel d is paired with d + D/2
               (as GPT-NeoX and Llama in Transformers do), not with its neighbor
    """
    D = x.shape[-1]
    angle = position_T[:, None] * theta ** (-xp.arange(0, D, 2) / D)
    cos, sin = xp.cos(angle).astype(x.dtype), xp.sin(angle).astype(x.dtype)
    return _rotate(x, cos, sin), (cos, sin)


def rotary_backward(dy: Array, cache: Cache) -> Array:
    """Rotate the gradient by minus the angle: the transpose of a rotation is its inverse.

    Shapes     dy (..., T, D) -> dx (..., T, D)
    """
    cos, sin = cache
    return _rotate(dy, cos, -sin)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    y = xp.empty_like(x)
    y[..., :half] = x1 * cos - x2 * sin
    y[..., half:] = x2 * cos + x1 * sin
    return y
