"""Multi-head attention, causal or not; groups of query heads may share one key/value head.

Norms of queries and keys, biases, sinks and a cap of the logits are there if the configuration asks
for them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, to_device, xp
from moe_numpy.config import ModelConfig
from moe_numpy.ops import linear, norm, rotary, softmax


class AttentionParams(NamedTuple):
    """Projections to queries, keys and values, and back from the heads; then what is optional.

    The biases of the four projections; the gains of the norms of queries and keys, (D,) each for
    "head", (H*D,) and (G*D,) for "full"; the logit of each head's sink.
    """

    q_CHD: Array
    k_CGD: Array
    v_CGD: Array
    out_HDC: Array
    q_HD: Array | None = None
    k_GD: Array | None = None
    v_GD: Array | None = None
    out_C: Array | None = None
    q_gain: Array | None = None
    k_gain: Array | None = None
    sink_H: Array | None = None


class KeyValues:
    """The keys and values of the S positions seen so far, kept for generation.

    The arrays are allocated once for the whole context; `append` and `append_one` write into them.
    """

    def __init__(self, cfg: ModelConfig, batch: int, dtype: str) -> None:
        G, D = cfg.key_value_heads, cfg.head_width
        self.length, self.shape, self.dtype = 0, (batch, G, cfg.context, D), dtype
        self._k_BGSD, self._v_BGSD = (xp.empty(self.shape, dtype) for _ in range(2))

    def append(self, k_BGTD: Array, v_BGTD: Array) -> tuple[Array, Array]:
        """Add T positions; return views of all keys and values, (B, G, S, D) each."""
        start, self.length = self.length, self.length + k_BGTD.shape[2]
        self._k_BGSD[:, :, start : self.length] = k_BGTD
        self._v_BGSD[:, :, start : self.length] = v_BGTD
        return self._k_BGSD[:, :, : self.length], self._v_BGSD[:, :, : self.length]

    def append_one(self, k_GD: Array, v_GD: Array) -> tuple[Array, Array]:
        """Add one position of the only sequence; return views of all, (G, S, D) each."""
        start, self.length = self.length, self.length + 1
        k_GSD, v_GSD = self._k_BGSD[0, :, : self.length], self._v_BGSD[0, :, : self.length]
        k_GSD[:, start], v_GSD[:, start] = k_GD, v_GD
        return k_GSD, v_GSD


def init_attention(rng: Generator, cfg: ModelConfig, dtype: str) -> AttentionParams:
    """Draw with deviation 0.02, the output with 0.02 / sqrt(2 * layers): so many branches add up.

    Gains start at one, biases and the sinks' logits at zero.
    """
    C, H, G, D = cfg.width, cfg.heads, cfg.key_value_heads, cfg.head_width
    out_std = 0.02 / math.sqrt(2 * cfg.layers)
    biased, gained = cfg.attention_bias, cfg.qk_norm in ("head", "full")
    q_size, k_size = (H * D, G * D) if cfg.qk_norm == "full" else (D, D)
    return AttentionParams(
        q_CHD=to_device(rng.normal(0.0, 0.02, (C, H, D)), dtype),
        k_CGD=to_device(rng.normal(0.0, 0.02, (C, G, D)), dtype),
        v_CGD=to_device(rng.normal(0.0, 0.02, (C, G, D)), dtype),
        out_HDC=to_device(rng.normal(0.0, out_std, (H, D, C)), dtype),
        q_HD=xp.zeros((H, D), dtype) if biased else None,
        k_GD=xp.zeros((G, D), dtype) if biased else None,
        v_GD=xp.zeros((G, D), dtype) if biased else None,
        out_C=xp.zeros(C, dtype) if biased else None,
        q_gain=xp.ones(q_size, dtype) if gained else None,
        k_gain=xp.ones(k_size, dtype) if gained else None,
        sink_H=xp.zeros(H, dtype) if cfg.sinks else None,
    )


def qk_norm_forward(
    x_BHTD: Array, gain: Array | None, kind: str, eps: float = 1e-5
) -> tuple[Array, Cache]:
    """Give queries or keys a root mean square of one, so that their size cannot make products grow.

        y = rms_norm(x, gain) over the D channels of each head            ("head" and "l2")
                              over the H*D channels of all heads together ("full")

    Shapes     x_BHTD (B, H, T, D); gain (D,) for "head", (H*D,) for "full", None for "l2"
               -> y_BHTD (B, H, T, D)
    Cache      (across, RMS norm cache)
    Source     Qwen3 ("head"); Muennighoff et al. 2024, OLMoE ("full"); Llama 4 ("l2"); differs:
               "l2" comes before the rotary positions, not after: the same, as turns keep the size
    """
    across = kind == "full"
    if across:
        y_BTA, cache = norm.rms_norm_forward(_merge(x_BHTD), gain, eps)
        return _split(y_BTA, x_BHTD.shape[1]), (across, cache)
    y_BHTD, cache = norm.rms_norm_forward(x_BHTD, gain, eps)
    return y_BHTD, (across, cache)


def qk_norm_backward(dy_BHTD: Array, cache: Cache) -> tuple[Array, Array | None]:
    """Hand the gradient to the norm, over the channels that were normalized together.

    Shapes     dy_BHTD (B, H, T, D) -> dx_BHTD (B, H, T, D), dgain or None
    """
    across, norm_cache = cache
    if across:
        dx_BTA, dgain = norm.rms_norm_backward(_merge(dy_BHTD), norm_cache)
        return _split(dx_BTA, dy_BHTD.shape[1]), dgain
    return norm.rms_norm_backward(dy_BHTD, norm_cache)


def scores_forward(
    q_BHTD: Array,
    k_BGSD: Array,
    sink_H: Array | None = None,
    scale: float | None = None,
    cap: float | None = None,
    causal: bool = True,
) -> tuple[Array, Cache]:
    """Attend to the positions that are not in the future, or if not causal to all.

        a = softmax over s <= t of cap(scale <q[t], k[s]>),    cap(z) = cap * tanh(z / cap)

    The T queries are the last T of the S positions. Each of G key heads serves H / G query heads.
    With a sink the weights sum to less than one.

    Shapes     q_BHTD (B, H, T, D); k_BGSD (B, G, S, D), S at least T; sink_H (H,) or None;
               scale None for 1 / sqrt(D); cap None for none -> a_BHTS (B, H, T, S)
    Cache      (has_sink, softmax cache, cap cache, q_BHTD, k_BGSD, scale): 4*B*H*T*S bytes in
               float32 beside the inputs, twice that with a cap
    Source     Vaswani et al. 2017, eq. 1; the cap: Grok-1; the sink: gpt-oss
    """
    (B, H, T, D), (_, G, S, _) = q_BHTD.shape, k_BGSD.shape
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    z_BHTS = (_by_group(q_BHTD, G) @ k_BGSD.swapaxes(2, 3)).reshape(B, H, T, S)  # 1. scores
    z_BHTS *= scale  # 2. scale
    cap_cache = None
    if cap is not None:
        z_BHTS, cap_cache = softmax.soft_cap_forward(z_BHTS, cap)  # 3. cap
    if causal and T > 1:
        future_TS = xp.triu(xp.full((T, S), -xp.inf, z_BHTS.dtype), S - T + 1)
        z_BHTS += future_TS  # 4. no look ahead
    has_sink = sink_H is not None
    if has_sink:  # 5. weights
        a_BHTS, a_cache = softmax.sink_softmax_forward(z_BHTS, sink_H)
    else:
        a_BHTS, a_cache = softmax.softmax_forward(z_BHTS)
    return a_BHTS, (has_sink, a_cache, cap_cache, q_BHTD, k_BGSD, scale)


def scores_backward(da_BHTS: Array, cache: Cache) -> tuple[Array, Array, Array | None]:
    """Undo `scores_forward`.

    The softmax gives no gradient where a = 0, so the future needs no mask here; then
        dq = scale dz k,    dk = scale dz^T q, summed over the query heads that k served.

    Shapes     da_BHTS (B, H, T, S) -> dq_BHTD (B, H, T, D), dk_BGSD (B, G, S, D), dsink_H (H,) or
               None
    """
    has_sink, a_cache, cap_cache, q_BHTD, k_BGSD, scale = cache
    dsink_H = None
    if has_sink:  # 5. and 4.
        dz_BHTS, dsink_H = softmax.sink_softmax_backward(da_BHTS, a_cache)
    else:
        dz_BHTS = softmax.softmax_backward(da_BHTS, a_cache)
    if cap_cache is not None:
        dz_BHTS = softmax.soft_cap_backward(dz_BHTS, cap_cache)  # 3.
    dz_BHTS *= scale  # 2.
    G = k_BGSD.shape[1]
    dz = _by_group(dz_BHTS, G)
    dk_BGSD = dz.swapaxes(2, 3) @ _by_group(q_BHTD, G)  # 1.
    return (dz @ k_BGSD).reshape(q_BHTD.shape), dk_BGSD, dsink_H


def attention_forward(
    x_BTC: Array, params: AttentionParams, cfg: ModelConfig, kv: KeyValues | None = None
) -> tuple[Array, Cache]:
    """Let every position gather values from itself and those before it, or else from all.

        q, k, v = x W_q, x W_k, x W_v in heads,    y = concatenate(softmax(q k^T / sqrt(D)) v) W_out

    All positions are seen if ``cfg.causal`` is False.
    With `kv` the keys and values of earlier calls are seen too (generation; no backward then).
    Biases, norms of q and k, and the variants of `scores_forward` come with the configuration.

    Shapes     x_BTC (B, T, C) -> y_BTC (B, T, C); each of G key/value heads serves H / G heads
    Cache      the inputs of every product, and the weights a_BHTS
    Source     Vaswani et al. 2017, section 3.2; grouped heads: Ainslie et al. 2023, GQA
    """
    T, D = x_BTC.shape[1], cfg.head_width
    q_BHTD, q_cache = _to_heads(x_BTC, params.q_CHD, params.q_HD)  # 1. project
    k_BGTD, k_cache = _to_heads(x_BTC, params.k_CGD, params.k_GD)
    v_BGTD, v_cache = _to_heads(x_BTC, params.v_CGD, params.v_GD)
    norms = turns = None
    if cfg.qk_norm is not None:  # 2. norms
        q_BHTD, q_norm = qk_norm_forward(q_BHTD, params.q_gain, cfg.qk_norm, cfg.norm_eps)
        k_BGTD, k_norm = qk_norm_forward(k_BGTD, params.k_gain, cfg.qk_norm, cfg.norm_eps)
        norms = (q_norm, k_norm)
    if cfg.positions == "rotary":  # 3. positions
        start = 0 if kv is None else kv.length
        turns = rotary.turns(xp.arange(start, start + T), D, cfg.theta, x_BTC.dtype)
        q_BHTD, _ = rotary.rotary_forward(q_BHTD, *turns)
        k_BGTD, _ = rotary.rotary_forward(k_BGTD, *turns)
    k_BGSD, v_BGSD = (k_BGTD, v_BGTD) if kv is None else kv.append(k_BGTD, v_BGTD)
    knobs = (cfg.attention_scale, cfg.logit_cap, cfg.causal)
    a_BHTS, scores_cache = scores_forward(q_BHTD, k_BGSD, params.sink_H, *knobs)  # 4. weights
    G = v_BGSD.shape[1]
    o_BHTD = (_by_group(a_BHTS, G) @ v_BGSD).reshape(q_BHTD.shape)  # 5. weighted values
    o_BTA = _merge(o_BHTD)
    out_AC = params.out_HDC.reshape(o_BTA.shape[2], -1)
    y_BTC, out_cache = linear.linear_forward(o_BTA, out_AC, params.out_C)  # 6. merge
    caches = ((q_cache, k_cache, v_cache), norms, turns, scores_cache, out_cache)
    return y_BTC, (*caches, a_BHTS, v_BGSD, params)


def attention_backward(dy_BTC: Array, cache: Cache) -> tuple[Array, AttentionParams]:
    """Undo `attention_forward`.

    o = a v is a product: da = do v^T and dv = a^T do, summed over all query heads that a shared
    key/value head served; x was read three times.

    Shapes     dy_BTC (B, T, C) -> dx_BTC (B, T, C), grads
    """
    projections, norms, turns, scores_cache, out_cache, a_BHTS, v_BGSD, params = cache
    q_cache, k_cache, v_cache = projections
    H, D, C = params.out_HDC.shape
    do_BTA, dout_AC, dout_C = linear.linear_backward(dy_BTC, out_cache)  # 6.
    G = v_BGSD.shape[1]
    do = _by_group(_split(do_BTA, H), G)
    da_BHTS = (do @ v_BGSD.swapaxes(2, 3)).reshape(a_BHTS.shape)  # 5.
    dv_BGSD = _by_group(a_BHTS, G).swapaxes(2, 3) @ do
    dq_BHTD, dk_BGSD, dsink_H = scores_backward(da_BHTS, scores_cache)  # 4.
    if turns is not None:  # 3.
        dq_BHTD = rotary.rotary_backward(dq_BHTD, turns)
        dk_BGSD = rotary.rotary_backward(dk_BGSD, turns)
    dq_gain = dk_gain = None
    if norms is not None:  # 2.
        dq_BHTD, dq_gain = qk_norm_backward(dq_BHTD, norms[0])
        dk_BGSD, dk_gain = qk_norm_backward(dk_BGSD, norms[1])
    dx_q, dq_CHD, dq_HD = _from_heads(dq_BHTD, q_cache)  # 1.
    dx_k, dk_CGD, dk_GD = _from_heads(dk_BGSD, k_cache)
    dx_v, dv_CGD, dv_GD = _from_heads(dv_BGSD, v_cache)
    weights = (dq_CHD, dk_CGD, dv_CGD, dout_AC.reshape(H, D, C))
    biases = (dq_HD, dk_GD, dv_GD, dout_C)
    return dx_q + dx_k + dx_v, AttentionParams(*weights, *biases, dq_gain, dk_gain, dsink_H)


def _to_heads(x_BTC: Array, w_CHD: Array, b_HD: Array | None) -> tuple[Array, Cache]:
    """Project and split into heads: one matrix product, then a view."""
    C, H, D = w_CHD.shape
    b_A = None if b_HD is None else b_HD.reshape(H * D)
    y_BTA, cache = linear.linear_forward(x_BTC, w_CHD.reshape(C, H * D), b_A)
    return _split(y_BTA, H), cache


def _from_heads(dy_BHTD: Array, cache: Cache) -> tuple[Array, Array, Array | None]:
    _, H, _, D = dy_BHTD.shape
    dx_BTC, dw_CA, db_A = linear.linear_backward(_merge(dy_BHTD), cache)
    return dx_BTC, dw_CA.reshape(-1, H, D), None if db_A is None else db_A.reshape(H, D)


def _split(x_BTA: Array, H: int) -> Array:
    B, T, A = x_BTA.shape
    return x_BTA.reshape(B, T, H, A // H).swapaxes(1, 2)


def _merge(x_BHTD: Array) -> Array:
    B, H, T, D = x_BHTD.shape
    return x_BHTD.swapaxes(1, 2).reshape(B, T, H * D)


def _by_group(x: Array, G: int) -> Array:
    """Put the rows of all query heads that share a key/value head below each other.

    One product per key/value head serves them all, and a product over these rows sums over them.

    Shapes     x (B, H, T, ...) -> (B, G, H / G * T, ...)
    """
    B, H, T, last = x.shape
    return x.reshape(B, G, H // G * T, last)
