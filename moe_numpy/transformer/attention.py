"""Causal multi-head attention; groups of query heads may share one key/value head."""

from __future__ import annotations

import math
from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, to_device, xp
from moe_numpy.config import ModelConfig
from moe_numpy.ops import linear, rotary, softmax


class AttentionParams(NamedTuple):
    """Projections to queries, keys and values, and back from the heads."""

    q_CHD: Array
    k_CGD: Array
    v_CGD: Array
    out_HDC: Array


class KeyValues:
    """The keys and values of the positions seen so far, for generation: S of them so far.

    The arrays are allocated once for the whole context; `append` writes into them, the only state
    that anything in the transformer keeps.
    """

    def __init__(self, cfg: ModelConfig, batch: int, dtype: str) -> None:
        G, D = cfg.kv_heads or cfg.heads, cfg.head_width
        self.length = 0
        self._k_BGSD = xp.empty((batch, G, cfg.context, D), dtype)
        self._v_BGSD = xp.empty((batch, G, cfg.context, D), dtype)

    def append(self, k_BGTD: Array, v_BGTD: Array) -> tuple[Array, Array]:
        """Add T positions; return views of all keys and values, (B, G, S, D) each."""
        start, self.length = self.length, self.length + k_BGTD.shape[2]
        self._k_BGSD[:, :, start : self.length] = k_BGTD
        self._v_BGSD[:, :, start : self.length] = v_BGTD
        return self._k_BGSD[:, :, : self.length], self._v_BGSD[:, :, : self.length]


def init_attention(rng: Generator, cfg: ModelConfig, dtype: str) -> AttentionParams:
    """Draw with deviation 0.02; less for the output, which 2 * layers residual branches share."""
    C, H, G, D = cfg.width, cfg.heads, cfg.kv_heads or cfg.heads, cfg.head_width
    out_std = 0.02 / math.sqrt(2 * cfg.layers)
    return AttentionParams(
        q_CHD=to_device(rng.normal(0.0, 0.02, (C, H, D)), dtype),
        k_CGD=to_device(rng.normal(0.0, 0.02, (C, G, D)), dtype),
        v_CGD=to_device(rng.normal(0.0, 0.02, (C, G, D)), dtype),
        out_HDC=to_device(rng.normal(0.0, out_std, (H, D, C)), dtype),
    )


def scores_forward(q_BHTD: Array, k_BHSD: Array) -> tuple[Array, Cache]:
    """Attend to the positions that are not in the future.

        a = softmax over s <= t of <q[t], k[s]> / sqrt(D)

    The T queries are the last T of the S positions.

    Shapes     q_BHTD (B, H, T, D); k_BHSD (B, H, S, D), S at least T -> a_BHTS (B, H, T, S)
    Cache      (a_BHTS, q_BHTD, k_BHSD): 4*B*H*T*S bytes in float32 beside the inputs
    Source     Vaswani et al. 2017, eq. 1
    """
    T, S, D = q_BHTD.shape[2], k_BHSD.shape[2], q_BHTD.shape[3]
    z_BHTS = q_BHTD @ k_BHSD.swapaxes(2, 3)  # 1. scores
    z_BHTS *= 1.0 / math.sqrt(D)  # 2. scale
    if T > 1:
        future_TS = xp.triu(xp.full((T, S), -xp.inf, z_BHTS.dtype), S - T + 1)
        z_BHTS += future_TS  # 3. no look ahead
    a_BHTS, _ = softmax.softmax_forward(z_BHTS)  # 4. weights
    return a_BHTS, (a_BHTS, q_BHTD, k_BHSD)


def scores_backward(da_BHTS: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `scores_forward`.

    The softmax gives no gradient where a = 0, so the future needs no mask here; then
        dq = dz k / sqrt(D),    dk = dz^T q / sqrt(D).

    Shapes     da_BHTS (B, H, T, S) -> dq_BHTD (B, H, T, D), dk_BHSD (B, H, S, D)
    """
    a_BHTS, q_BHTD, k_BHSD = cache
    dz_BHTS = softmax.softmax_backward(da_BHTS, (a_BHTS,))  # 4. and 3.
    dz_BHTS *= 1.0 / math.sqrt(q_BHTD.shape[3])  # 2.
    return dz_BHTS @ k_BHSD, dz_BHTS.swapaxes(2, 3) @ q_BHTD  # 1.


def attention_forward(
    x_BTC: Array, params: AttentionParams, cfg: ModelConfig, kv: KeyValues | None = None
) -> tuple[Array, Cache]:
    """Let every position gather values from itself and the positions before it.

        q, k, v = x W_q, x W_k, x W_v in heads,    y = concatenate(softmax(q k^T / sqrt(D)) v) W_out

    With `kv` the keys and values of earlier calls are seen too (generation; no backward then).

    Shapes     x_BTC (B, T, C) -> y_BTC (B, T, C); each of G key/value heads serves H / G queries
    Cache      the inputs of every product, and the weights a_BHTS
    Source     Vaswani et al. 2017, section 3.2; grouped heads: Ainslie et al. 2023, GQA
    """
    start = 0 if kv is None else kv.length
    q_BHTD, q_cache = _to_heads(x_BTC, params.q_CHD)  # 1. project
    k_BGTD, k_cache = _to_heads(x_BTC, params.k_CGD)
    v_BGTD, v_cache = _to_heads(x_BTC, params.v_CGD)
    turns = None
    if cfg.positions == "rotary":  # 2. positions
        position_T = xp.arange(start, start + x_BTC.shape[1])
        q_BHTD, q_turn = rotary.rotary_forward(q_BHTD, position_T)
        k_BGTD, k_turn = rotary.rotary_forward(k_BGTD, position_T)
        turns = (q_turn, k_turn)
    k_BGSD, v_BGSD = (k_BGTD, v_BGTD) if kv is None else kv.append(k_BGTD, v_BGTD)
    k_BHSD, v_BHSD = _share(k_BGSD, cfg), _share(v_BGSD, cfg)  # 3. one copy for each query head
    a_BHTS, a_cache = scores_forward(q_BHTD, k_BHSD)  # 4. weights
    o_BHTD = a_BHTS @ v_BHSD  # 5. weighted values
    B, H, T, D = o_BHTD.shape
    o_BTA = o_BHTD.swapaxes(1, 2).reshape(B, T, H * D)
    y_BTC, out_cache = linear.linear_forward(o_BTA, params.out_HDC.reshape(H * D, -1))  # 6. merge
    return y_BTC, ((q_cache, k_cache, v_cache), turns, a_cache, v_BHSD, out_cache, params)


def attention_backward(dy_BTC: Array, cache: Cache) -> tuple[Array, AttentionParams]:
    """Undo `attention_forward`.

    o = a v is a product: da = do v^T and dv = a^T do. A shared key/value head collects the
    gradients of all query heads it served; x was read three times.

    Shapes     dy_BTC (B, T, C) -> dx_BTC (B, T, C), grads
    """
    (q_cache, k_cache, v_cache), turns, a_cache, v_BHSD, out_cache, params = cache
    H, D, _ = params.out_HDC.shape
    B, T, _ = dy_BTC.shape
    do_BTA, dout = linear.linear_backward(dy_BTC, out_cache)  # 6.
    do_BHTD = do_BTA.reshape(B, T, H, D).swapaxes(1, 2)
    a_BHTS = a_cache[0]
    da_BHTS = do_BHTD @ v_BHSD.swapaxes(2, 3)  # 5.
    dv_BHSD = a_BHTS.swapaxes(2, 3) @ do_BHTD
    dq_BHTD, dk_BHSD = scores_backward(da_BHTS, a_cache)  # 4.
    G = params.k_CGD.shape[1]
    dk_BGSD, dv_BGSD = _collect(dk_BHSD, G), _collect(dv_BHSD, G)  # 3.
    if turns is not None:  # 2.
        dq_BHTD = rotary.rotary_backward(dq_BHTD, turns[0])
        dk_BGSD = rotary.rotary_backward(dk_BGSD, turns[1])
    dx_q, dq_CHD = _from_heads(dq_BHTD, q_cache)  # 1.
    dx_k, dk_CGD = _from_heads(dk_BGSD, k_cache)
    dx_v, dv_CGD = _from_heads(dv_BGSD, v_cache)
    grads = AttentionParams(dq_CHD, dk_CGD, dv_CGD, dout.reshape(H, D, -1))
    return dx_q + dx_k + dx_v, grads


def _to_heads(x_BTC: Array, w_CHD: Array) -> tuple[Array, Cache]:
    """Project and split into heads: one matrix product, then a view."""
    B, T, C = x_BTC.shape
    _, H, D = w_CHD.shape
    y_BTA, cache = linear.linear_forward(x_BTC, w_CHD.reshape(C, H * D))
    return y_BTA.reshape(B, T, H, D).swapaxes(1, 2), cache


def _from_heads(dy_BHTD: Array, cache: Cache) -> tuple[Array, Array]:
    B, H, T, D = dy_BHTD.shape
    dx_BTC, dw_CA = linear.linear_backward(dy_BHTD.swapaxes(1, 2).reshape(B, T, H * D), cache)
    return dx_BTC, dw_CA.reshape(-1, H, D)


def _share(x_BGSD: Array, cfg: ModelConfig) -> Array:
    groups = cfg.heads // x_BGSD.shape[1]
    return x_BGSD if groups == 1 else xp.repeat(x_BGSD, groups, axis=1)


def _collect(dx_BHSD: Array, G: int) -> Array:
    B, H, S, D = dx_BHSD.shape
    return dx_BHSD if G == H else dx_BHSD.reshape(B, G, H // G, S, D).sum(2)
