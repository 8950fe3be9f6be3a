"""Matrix product with a weight, and the table look-up that is a product with one-hot rows."""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, on_host, xp


def linear_forward(x: Array, w: Array, b: Array | None = None) -> tuple[Array, Cache]:
    """Map the last axis by a weight matrix.

        y = x @ w + b

    Shapes     x (..., I); w (I, O); b (O,) or None -> y (..., O)
    Cache      (x, w, b): no copies
    Source     the affine map of every network; weights stand as (in, out)
    """
    y = _rows(x) @ w  # 1. one product for all rows
    if b is not None:
        y += b  # 2. bias
    return y.reshape(*x.shape[:-1], w.shape[1]), (x, w, b)


def linear_backward(dy: Array, cache: Cache) -> tuple[Array, Array, Array | None]:
    """Undo `linear_forward`.

    y_o = sum_i x_i w_io + b_o is linear in each argument, hence
        dx = dy w^T,    dw = sum over rows x^T dy,    db = sum over rows dy.

    Shapes     dy (..., O) -> dx (..., I), dw (I, O), db (O,) or None
    """
    x, w, b = cache
    dy_rows = _rows(dy)
    db = None if b is None else dy_rows.sum(0)  # 2.
    dx = (dy_rows @ w.T).reshape(x.shape)  # 1.
    dw = _rows(x).T @ dy_rows
    return dx, dw, db


def embedding_forward(token: Array, table_VC: Array) -> tuple[Array, Cache]:
    """Look up one row of the table for every token.

        y[...] = table[token[...]]

    Shapes     token (...) integers; table_VC (V, C) -> y (..., C)
    Cache      (token, V)
    Raises     ValueError if a token is outside the vocabulary
    Source     Bengio et al. 2003, A Neural Probabilistic Language Model, section 2
    """
    check_vocabulary("embedding_forward", token, table_VC.shape[0])
    return table_VC[token], (token, table_VC.shape[0])


def embedding_backward(dy: Array, cache: Cache) -> Array:
    """Add up the gradients of all places that looked up the same row.

    dtable[v] = sum of dy over the places where token = v. The places are sorted by token, so each
    row of the table owns one contiguous run and no scatter is needed.

    Shapes     dy (..., C) -> dtable_VC (V, C)
    """
    token, vocab_size = cache
    dy_NC = _rows(dy)
    dtable_VC = xp.zeros((vocab_size, dy_NC.shape[1]), dy.dtype)
    if token.size == 0:
        return dtable_VC
    flat_N = token.reshape(-1)
    order_N = xp.argsort(flat_N, kind="stable")
    sorted_N = flat_N[order_N]
    starts = xp.flatnonzero(xp.concatenate((sorted_N[:1] >= 0, sorted_N[1:] != sorted_N[:-1])))
    dtable_VC[sorted_N[starts]] = xp.add.reduceat(dy_NC[order_N], starts, axis=0)
    return dtable_VC


def check_vocabulary(who: str, token: Array, vocab_size: int) -> None:
    """Refuse tokens that are not integers from 0 to vocab_size - 1.

    The values are looked at on the host only: on a GPU the look would wait for all work before it.
    """
    if token.dtype.kind not in "iu":
        raise ValueError(f"{who}: tokens must be integers, got {token.dtype}. Encode the text.")
    if token.size == 0 or not on_host(token):
        return
    low, high = int(token.min()), int(token.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{who}: tokens must be from 0 to {vocab_size - 1} (vocabulary of {vocab_size}), got "
            f"{low} to {high}. Encode the text with the model's alphabet."
        )


def check_targets(who: str, target_N: Array, count: int, vocab_size: int) -> None:
    """Refuse targets that are not one token for each of `count` rows."""
    if target_N.shape != (count,):
        raise ValueError(
            f"{who}: targets must have the shape ({count},), one for each row of the logits, got "
            f"{target_N.shape}. Reshape them."
        )
    check_vocabulary(who, target_N, vocab_size)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
