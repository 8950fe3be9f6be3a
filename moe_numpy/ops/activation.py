"""Activations, element by element, and the gated pairs that expert MLPs use."""

from __future__ import annotations

import math
from collections.abc import Callable

from moe_numpy.backend import Array, Cache, overflow_is_fine, xp
from moe_numpy.ops import normal, rows

CLAMP, SLOPE = 7.0, 1.702  # of gpt-oss: the bound of both branches, the steepness of its sigmoid


def identity_forward(x: Array) -> tuple[Array, Cache]:
    """Hand on what comes: a feed-forward with it is a product of matrices, linear.

        y = x

    Shapes     x (...) -> y (...)
    Cache      ()
    Source     the linear experts of Jacobs et al. 1991
    """
    return x.copy(), ()


def identity_backward(dy: Array, cache: Cache) -> Array:
    """Undo `identity_forward`: dy/dx = 1.

    Shapes     dy (...) -> dx (...)
    """
    return dy.copy()


def relu_forward(x: Array) -> tuple[Array, Cache]:
    """Keep what is positive.

        y = max(x, 0)

    Shapes     x (...) -> y (...)
    Cache      (positive,): one byte an element
    Source     Nair and Hinton 2010
    """
    positive = x > 0
    return xp.maximum(x, 0), (positive,)


def relu_backward(dy: Array, cache: Cache) -> Array:
    """Let the gradient through where x was positive; at zero the subgradient is zero.

    Shapes     dy (...) -> dx (...)
    """
    (positive,) = cache
    return dy * positive


def sigmoid_forward(x: Array) -> tuple[Array, Cache]:
    """Squash to the interval from 0 to 1.

        y = 1 / (1 + exp(-x))

    Shapes     x (...) -> y (...)
    Cache      (y,)
    Source     the logistic function
    """
    y = _sigmoid(x)
    return y, (y,)


def sigmoid_backward(dy: Array, cache: Cache) -> Array:
    """Undo `sigmoid_forward`: dy/dx = y (1 - y).

    Shapes     dy (...) -> dx (...)
    """
    (y,) = cache
    return dy * y * (1.0 - y)


def softplus_forward(x: Array) -> tuple[Array, Cache]:
    """Take a smooth positive part.

        y = log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|))

    Shapes     x (...) -> y (...)
    Cache      (x,)
    Source     Dugas et al. 2001; the noise scale of Shazeer et al. 2017, eq. 4
    """
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x))), (x,)


def softplus_backward(dy: Array, cache: Cache) -> Array:
    """Undo `softplus_forward`: dy/dx = exp(x) / (1 + exp(x)) = sigmoid(x).

    Shapes     dy (...) -> dx (...)
    """
    (x,) = cache
    return dy * _sigmoid(x)


def silu_forward(x: Array) -> tuple[Array, Cache]:
    """Weight x by its own sigmoid.

        y = x sigmoid(x)

    Shapes     x (...) -> y (...)
    Cache      (slope,): dy/dx, worked out while x and its sigmoid are at hand
    Source     Elfwing et al. 2018; Ramachandran et al. 2017 (Swish)
    """
    y, slope = (xp.empty_like(x, order="C") for _ in range(2))
    rows.in_blocks(_silu, x, y, slope)
    return y, (slope,)


def silu_backward(dy: Array, cache: Cache) -> Array:
    """Undo `silu_forward`: dy/dx = s + x s (1 - s) = s + y (1 - s), s = sigmoid(x).

    Shapes     dy (...) -> dx (...)
    """
    (slope,) = cache
    return dy * slope


def _silu(x: Array, y: Array | None = None, slope: Array | None = None) -> Array:
    """Return y, in its place if there is one; then work out the slope, if it has a place."""
    s = _sigmoid(x)
    y = xp.multiply(x, s, out=y)
    if slope is not None:
        xp.subtract(1.0, s, out=slope)  # s + y (1 - s), in place
        slope *= y
        slope += s
    return y


def gelu_forward(x: Array) -> tuple[Array, Cache]:
    """Weight x by the probability that a standard normal number is below it.

        y = x Phi(x)

    Shapes     x (...) -> y (...)
    Cache      (x, phi): phi = Phi(x)
    Source     Hendrycks and Gimpel 2016, Gaussian Error Linear Units, eq. 1
    """
    phi = normal.normal_cdf(x)
    return x * phi, (x, phi)


def gelu_backward(dy: Array, cache: Cache) -> Array:
    """Undo `gelu_forward`: dy/dx = Phi(x) + x Phi'(x), where Phi' is the normal density.

    Shapes     dy (...) -> dx (...)
    """
    x, phi = cache
    return dy * (phi + x * normal.normal_pdf(x))


def gelu_tanh_forward(x: Array) -> tuple[Array, Cache]:
    """Approximate `gelu_forward` with a hyperbolic tangent.

        y = x h,    h = (1 + tanh(u)) / 2,    u = sqrt(2/pi) (x + 0.044715 x^3)

    Shapes     x (...) -> y (...)
    Cache      (slope,): dy/dx, worked out while x and h are at hand
    Source     Hendrycks and Gimpel 2016, section 2; the form that GPT-2 uses
    """
    y, slope = (xp.empty_like(x, order="C") for _ in range(2))
    rows.in_blocks(_gelu_tanh, x, y, slope)
    return y, (slope,)


def gelu_tanh_backward(dy: Array, cache: Cache) -> Array:
    """Undo `gelu_tanh_forward`: dy/dx = h + x dh/du du/dx = h + 2 y (1 - h) du/dx.

    tanh' = 1 - tanh^2 gives dh/du = 2 h (1 - h), and du/dx = sqrt(2/pi) (1 + 3 * 0.044715 x^2).

    Shapes     dy (...) -> dx (...)
    """
    (slope,) = cache
    return dy * slope


def _gelu_tanh(x: Array, y: Array | None = None, slope: Array | None = None) -> Array:
    """Return y, in its place if there is one; then work out the slope, if it has a place."""
    a = math.sqrt(2.0 / math.pi)
    b = 0.044715 * a
    square = xp.multiply(x, x, out=slope)
    h = xp.multiply(square, b, out=y)  # (1 + tanh(a x + b x^3)) / 2, in place
    h += a
    h *= x
    h = xp.tanh(h)
    h += 1.0
    h *= 0.5
    y = xp.multiply(x, h, out=y)
    if slope is not None:
        slope *= 6.0 * b  # h + y (1 - h) (2 a + 6 b x^2), in place
        slope += 2.0 * a
        slope *= y
        slope *= 1.0 - h
        slope += h
    return y


def swiglu_forward(gate: Array, up: Array) -> tuple[Array, Cache]:
    """Gate one projection with the SiLU of another.

        y = silu(gate) * up

    Shapes     gate (..., F); up (..., F) -> y (..., F)
    Cache      (act, slope): dy/dup = act and dy/dgate
    Source     Shazeer 2020, GLU Variants Improve Transformer, eq. 6
    """
    return _gated(_silu, gate, up)


def swiglu_backward(dy: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `swiglu_forward` by the product rule: dup = dy act, dgate = dy up act'.

    Shapes     dy (..., F) -> dgate (..., F), dup (..., F)
    """
    act, slope = cache
    return dy * slope, dy * act


def geglu_forward(gate: Array, up: Array) -> tuple[Array, Cache]:
    """Gate one projection with the (tanh) GELU of another.

        y = gelu_tanh(gate) * up

    Shapes     gate (..., F); up (..., F) -> y (..., F)
    Cache      (act, slope): dy/dup = act and dy/dgate
    Source     Shazeer 2020, GLU Variants Improve Transformer, eq. 6; differs: tanh form, as T5 and
               Grok-1 compute it
    """
    return _gated(_gelu_tanh, gate, up)


def geglu_backward(dy: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `geglu_forward` by the product rule: dup = dy act, dgate = dy up act'.

    Shapes     dy (..., F) -> dgate (..., F), dup (..., F)
    """
    act, slope = cache
    return dy * slope, dy * act


def _gated(activate: Callable[..., Array], gate: Array, up: Array) -> tuple[Array, Cache]:
    y, act, slope = (xp.empty_like(gate, order="C") for _ in range(3))

    def fill(gate: Array, up: Array, y: Array, act: Array, slope: Array) -> None:
        activate(gate, act, slope)
        slope *= up
        xp.multiply(act, up, out=y)

    rows.in_blocks(fill, gate, up, y, act, slope)
    return y, (act, slope)


def clamped_swiglu_forward(gate: Array, up: Array) -> tuple[Array, Cache]:
    """Gate a bounded projection, lifted by one, with a steep SiLU of another bounded one.

        g = min(gate, 7),    u = clip(up, -7, 7),    y = (u + 1) g sigmoid(1.702 g)

    Shapes     gate (..., F); up (..., F) -> y (..., F)
    Cache      (g, u, s, free_gate, free_up): s = sigmoid(1.702 g); what no bound holds, as booleans
    Source     OpenAI 2025, gpt-oss, its released code; differs: gate and up do not lie interleaved
    """
    free_gate, free_up = gate <= CLAMP, xp.abs(up) <= CLAMP
    g, u = xp.minimum(gate, CLAMP), xp.clip(up, -CLAMP, CLAMP)  # 1. bounds
    s = _sigmoid(SLOPE * g)
    return (u + 1.0) * (g * s), (g, u, s, free_gate, free_up)  # 2. gate


def clamped_swiglu_backward(dy: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `clamped_swiglu_forward`: du = dy g s, dg = dy (u + 1) (s + 1.702 g s (1 - s)).

    Beyond its bound a branch is constant, and its gradient zero.

    Shapes     dy (..., F) -> dgate (..., F), dup (..., F)
    """
    g, u, s, free_gate, free_up = cache
    silu = g * s  # finite however large -g is, as s is zero there
    dg = dy * (u + 1.0) * (s + SLOPE * silu * (1.0 - s))  # 2.
    du = dy * silu
    return dg * free_gate, du * free_up  # 1.


def swiglu3_forward(gate: Array, up: Array, third: Array) -> tuple[Array, Cache]:
    """Gate two projections with the SiLU of a third: a SwiGLU that is itself a gate.

        y = silu(gate) * up * third

    Shapes     gate (..., F); up (..., F); third (..., F) -> y (..., F)
    Cache      (act, up, third, silu cache)
    Source     Xue et al. 2024, OpenMoE, its released code, where the halves of one projection are
               `third` and `gate`; the paper has a SwiGLU
    """
    act, act_cache = silu_forward(gate)
    return act * up * third, (act, up, third, act_cache)


def swiglu3_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """Undo `swiglu3_forward` by the product rule: each factor gets dy times the other two.

    Shapes     dy (..., F) -> dgate (..., F), dup (..., F), dthird (..., F)
    """
    act, up, third, act_cache = cache
    return silu_backward(dy * up * third, act_cache), dy * act * third, dy * act * up


def activate_forward(
    kind: str, a: Array, up: Array | None = None, third: Array | None = None
) -> tuple[Array, Cache]:
    """Apply the activation named `kind` to as many branches as it takes.

        y = kind(a)    or    y = kind(a, up)    or    y = kind(a, up, third)

    Shapes     a (..., F); up (..., F) for the gated kinds, third (..., F) for "swiglu3", else None
               -> y (..., F)
    Cache      (kind, cache of the activation)
    Source     the functions above; looked up by name, so that a swapped one is used
    """
    branches = [branch for branch in (a, up, third) if branch is not None]
    y, cache = globals()[f"{kind}_forward"](*branches)
    return y, (kind, cache)


def activate_backward(dy: Array, cache: Cache) -> tuple[Array, Array | None, Array | None]:
    """Hand the gradient to the activation that was applied; a branch it does not take gets None.

    Shapes     dy (..., F) -> da (..., F), dup (..., F) or None, dthird (..., F) or None
    """
    kind, act_cache = cache
    found = globals()[f"{kind}_backward"](dy, act_cache)
    if not isinstance(found, tuple):
        return found, None, None
    return (*found, None) if len(found) == 2 else found


def activate(kind: str, a: Array, up: Array | None = None) -> Array:
    """Compute what `activate_forward` does, without what a backward would need.

    Shapes     a (..., F); up (..., F) for the gated kinds of two branches, else None -> y (..., F)
    """
    forward = globals()[f"{kind}_forward"]
    if forward not in _ALONE:  # no shorter way is known, or the function was swapped
        return activate_forward(kind, a, up)[0]
    y = _ALONE[forward](a)
    if up is not None:
        y *= up
    return y


_ALONE = {
    silu_forward: _silu,
    swiglu_forward: _silu,
    gelu_tanh_forward: _gelu_tanh,
    geglu_forward: _gelu_tanh,
}


@overflow_is_fine
def _sigmoid(x: Array) -> Array:
    # Where exp(-x) is too large for its type, the sum is infinite and the quotient zero. NumPy is
    # faster with a quotient than with a reciprocal. Of an array without axes `out` makes an array.
    s = xp.negative(x, out=xp.empty_like(x))
    xp.exp(s, out=s)
    s += 1.0
    return xp.divide(1.0, s, out=s)
