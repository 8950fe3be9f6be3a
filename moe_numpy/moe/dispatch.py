"""Dispatch and combine: tokens to the experts' rows and back, each way one indexing expression."""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, xp
from moe_numpy.moe.capacity import Plan


def dispatch_forward(x_NC: Array, plan: Plan) -> tuple[Array, Cache]:
    """Copy every token to the rows of its experts.

        x[r] = x[token[r]]

    Shapes     x_NC (N, C) -> x_RC (R, C), rows sorted by expert
    Cache      (plan,)
    Source     Shazeer et al. 2017, section 3.1; differs: no padding, R rows are all there are
    """
    return xp.take(x_NC, plan.token_R, 0), (plan,)


def dispatch_backward(dx_RC: Array, cache: Cache) -> Array:
    """Add up the gradients of a token's copies: a combine whose gates are all one.

    Copying has the transpose summing: dx[n] = sum_k dx[slot[n, k]]. A dropped choice made no copy.

    Shapes     dx_RC (R, C) -> dx_NC (N, C)
    """
    (plan,) = cache
    return xp.einsum("nkc->nc", _fetch(dx_RC, plan))


def gated_dispatch_forward(x_NC: Array, gate_NK: Array, plan: Plan) -> tuple[Array, Cache]:
    """Copy every token to the rows of its experts, scaled by the gates.

        x[r] = gate[choice[r]] * x[token[r]]

    An expert is not linear: a gate on its input does something else than one on its output.

    Shapes     x_NC (N, C); gate_NK (N, K) -> x_RC (R, C), rows sorted by expert
    Cache      (x_NC, gate_NK, plan)
    Source     Meta AI 2025, Llama 4 (the scaled input of its experts)
    """
    return _send(x_NC, gate_NK, plan), (x_NC, gate_NK, plan)


def gated_dispatch_backward(dx_RC: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `gated_dispatch_forward`: a combine, and a product with what was scaled.

        dx[n] = sum_k gate[n, k] dx[slot[n, k]],    dgate[n, k] = <dx[slot[n, k]], x[n]>

    Shapes     dx_RC (R, C) -> dx_NC (N, C), dgate_NK (N, K)
    """
    x_NC, gate_NK, plan = cache
    dx_NKC = _fetch(dx_RC, plan)
    dx_NC = xp.einsum("nk,nkc->nc", gate_NK, dx_NKC)
    return dx_NC, xp.einsum("nkc,nc->nk", dx_NKC, x_NC)


def combine_forward(y_RC: Array, gate_NK: Array, plan: Plan) -> tuple[Array, Cache]:
    """Bring the experts' outputs back to their tokens, weighted by the gates.

        y[n] = sum_k gate[n, k] * y[slot[n, k]]

    Shapes     y_RC (R, C); gate_NK (N, K) -> y_NC (N, C); zero for a token without any place
    Cache      (y_NKC, gate_NK, plan): 4*N*K*C bytes in float32
    Source     Shazeer et al. 2017, eq. 1; differs: the sum runs over the K chosen experts only
    """
    y_NKC = _fetch(y_RC, plan)  # 1. each choice fetches its row
    y_NC = xp.einsum("nk,nkc->nc", gate_NK, y_NKC)  # 2. weighted sum over the choices
    return y_NC, (y_NKC, gate_NK, plan)


def combine_backward(dy_NC: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `combine_forward`, which is linear in the rows and in the gates.

        dgate[n, k] = <y[slot[n, k]], dy[n]>,    dy[r] = gate[choice[r]] * dy[token[r]]

    A dropped choice fetched zeros: no gradient for its gate.

    Shapes     dy_NC (N, C) -> dy_RC (R, C), dgate_NK (N, K)
    """
    y_NKC, gate_NK, plan = cache
    dgate_NK = xp.einsum("nkc,nc->nk", y_NKC, dy_NC)  # 2.
    return _send(dy_NC, gate_NK, plan), dgate_NK  # 1.


def _send(x_NC: Array, gate_NK: Array, plan: Plan) -> Array:
    """Copy every token to the rows of its choices, each copy times the gate of its choice."""
    x_RC = xp.take(x_NC, plan.token_R, 0)
    x_RC *= gate_NK.reshape(-1)[plan.choice_R][:, None]
    return x_RC


def _fetch(y_RC: Array, plan: Plan) -> Array:
    """Read the row of every choice (N, K, C); a dropped choice, whose slot is R, reads zeros."""
    R, C = y_RC.shape
    rows = y_RC
    if plan.slot_NK.size > R:
        rows = xp.concatenate((y_RC, xp.zeros((1, C), y_RC.dtype)))
    return xp.take(rows, plan.slot_NK, 0)
