"""Rotary positions: queries and keys turned by an angle that grows with the position."""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, xp


def turns(
    position_T: Array, D: int, theta: float = 10_000.0, dtype: str = "float64"
) -> tuple[Array, Array]:
    """Compute the cosine and the sine of every turn: position * theta^(-2d / D), in radians.

    Shapes     position_T (T,) integers -> cos (T, 1, D/2); sin (T, 2, D/2): first -sin, then sin
    """
    angle = (position_T[:, None] * theta ** (-xp.arange(0, D, 2) / D))[:, None]
    cos, sin = xp.cos(angle).astype(dtype), xp.sin(angle).astype(dtype)
    return cos, xp.concatenate((-sin, sin), 1)


def rotary_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, Cache]:
    """Rotate each pair of channels (d, d + D/2) by the turn of its position.

        y1 = x1 cos - x2 sin,    y2 = x2 cos + x1 sin

    Shapes     x (..., T, D), D even; cos (T, 1, D/2), sin (T, 2, D/2), see `turns`
               -> y (..., T, D)
    Cache      (cos, sin): no copies
    Source     Su et al. 2021, RoFormer, section 3.2; differs: channel d is paired with d + D/2
               (as GPT-NeoX and Llama in Transformers do), not with its neighbor
    """
    return _rotate(x, cos, sin), (cos, sin)


def rotary_backward(dy: Array, cache: Cache) -> Array:
    """Rotate the gradient by minus the angle: the transpose of a rotation is its inverse.

    Shapes     dy (..., T, D) -> dx (..., T, D)
    """
    cos, sin = cache
    return _rotate(dy, cos, -sin)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    y = xp.empty_like(halves)
    y[...] = halves[..., ::-1, :]
    y *= sin
    y += halves * cos
    return y.reshape(x.shape)
