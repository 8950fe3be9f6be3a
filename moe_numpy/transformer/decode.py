"""One token through the model: what generation does for all tokens but those of a long prompt.

For a single token everything but the matrices is short, and the calls cost more than the
arithmetic. This is `model_forward` with as few calls as possible, in about a quarter of its time
(figures/speed_steps.json), for the models that `supports` names. Most of what is left goes to the
matrices: one token reads them from memory and uses each number once.

Left out is what one token does not need: no mask (nothing is in its future), no plan (no other
choice waits for a place), no noise, limit, balance term or report (generation has none), and no
cache (there is no backward). `x.dot(w)` is `x @ w` with less to decide before it starts.

The plain pairs remain the reference: the tests check logits, tokens and the gain against them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moe_numpy.backend import Array, few_launches, xp
from moe_numpy.config import GroupLimited, ModelConfig, MoEConfig, branches
from moe_numpy.moe import layer, mlp, router, routing, score, shared
from moe_numpy.ops import activation, rotary
from moe_numpy.transformer import attention, block, model

SHORT = 6  # tokens, which are read faster one after the other than together


class Ready(NamedTuple):
    """What is made once for all tokens of one text; the last three for rotary positions alone.

    qkv_CO     for each layer the matrices of queries, keys and values side by side, the scale of
               the attention logits in the queries: 4 * C * (H + 2 G) * D bytes in float32
    turn_DD    x @ turn turns the heads x by the angles of one position, which every token writes
               here: a channel meets itself and its partner, all else is zero
    diagonals  a view of what is not zero (2, 2, D / 2): from which half, to which
    turns      what stands there at every position (T, 2, 2, D / 2)
    """

    qkv_CO: tuple[Array, ...]
    turn_DD: Array | None
    diagonals: Array | None
    turns: Array | None


def supports(cfg: ModelConfig) -> bool:
    """Tell whether `next_logits` covers a model; the others are left to `model_forward`.

    It covers plain top-k and, but for a softmax over the chosen, top-k in the best groups; shared
    experts, all scores and gates on the output, both norms, both kinds of positions, and shared
    keys and values. Not capacity, nor experts with biases or three branches, nor what attention
    has seldom. On a GPU it covers nothing: Python looks at the scores, and would wait for the
    device in every layer.
    """
    rare = cfg.sandwich or cfg.attention_bias or cfg.sinks or cfg.extra_ffn or not cfg.causal
    rare = rare or cfg.qk_norm is not None or cfg.logit_cap is not None
    if cfg.moe is not None:
        part = cfg.moe.selection
        groups = isinstance(part, GroupLimited) and not score.gates_from_logits(cfg.moe)
        rare = rare or cfg.moe.capacity is not None or not (part is None or groups)
        rare = rare or cfg.moe.gate_on == "input" or cfg.moe.expert_bias
        rare = rare or branches(cfg.moe.activation) == 3
    return not rare and not few_launches()


def prepare(params: model.ModelParams, cfg: ModelConfig) -> Ready:
    """Join the projections of every layer, and note the turns of every position.

    Shapes     q_CHD (C, H, D), k_CGD and v_CGD (C, G, D) -> qkv_CO (C, (H + 2 G) * D)
    """
    D, dtype = cfg.head_width, params.token_VC.dtype
    scale = cfg.attention_scale or 1.0 / math.sqrt(D)
    parts = [own.attention for own in params.blocks]
    joined = [xp.concatenate((p.q_CHD * scale, p.k_CGD, p.v_CGD), 1) for p in parts]
    qkv_CO = tuple(qkv.reshape(cfg.width, -1) for qkv in joined)
    if cfg.positions != "rotary":
        return Ready(qkv_CO, None, None, None)
    turn_DD = xp.zeros((D, D), dtype)
    diagonals = xp.einsum("adbd->abd", turn_DD.reshape(2, D // 2, 2, D // 2))  # a view
    cos, sin = rotary.turns(xp.arange(cfg.context), D, cfg.theta, dtype)
    turns = xp.stack((cos[:, 0], sin[:, 1], sin[:, 0], cos[:, 0]), 1)
    return Ready(qkv_CO, turn_DD, diagonals, turns.reshape(-1, 2, 2, D // 2))


def next_logits(
    token: int,
    params: model.ModelParams,
    ready: Ready,
    cfg: ModelConfig,
    kv: tuple[attention.KeyValues, ...],
) -> Array:
    """Predict what follows one more token; its keys and values join those of `kv`.

        x = embedding_scale token[t] + position[t]
        x = x + attention(norm(x)),    x = x + feed(norm(x))    for every layer
        logits = logit_scale norm(x) head

    Shapes     one token, one `kv` for each layer -> logits_V (V,)
    Units      logits in nats
    Source     `model_forward`, step by step
    """
    x_C = params.token_VC[token] * cfg.embedding_scale  # 1. embed
    if params.position_TC is not None:
        x_C += params.position_TC[kv[0].length]
    if ready.turns is not None:
        ready.diagonals[...] = ready.turns[kv[0].length]
    for own, qkv_CO, own_kv in zip(params.blocks, ready.qkv_CO, kv, strict=True):  # 2. layers
        n_C = _normalize(x_C, own.norm_1, cfg.norm_eps)
        x_C += _attend(n_C, qkv_CO, own.attention.out_HDC, ready.turn_DD, own_kv)
        n_C = _normalize(x_C, own.norm_2, cfg.norm_eps)
        if isinstance(own.feed, layer.MoEParams):
            x_C += _mix(n_C, own.feed, cfg.moe)
        else:
            x_C += mlp.mlp_forward(n_C, own.feed, cfg.dense_activation)[0]
    n_C = _normalize(x_C, params.norm, cfg.norm_eps)  # 3. last norm
    n_C *= cfg.logit_scale
    head_CV = params.token_VC.T if params.head_CV is None else params.head_CV
    return n_C.dot(head_CV)  # 4. logits


def _normalize(x_C: Array, params: block.NormParams, eps: float) -> Array:
    """Do what `block.normalize_forward` does; the size of one vector is one number."""
    if params.bias_C is not None:
        x_C = x_C - x_C.sum() / x_C.size
    n_C = x_C * params.gain_C
    square = x_C.dot(x_C) / x_C.size + eps
    n_C *= 1.0 / math.sqrt(square) if square < math.inf else math.nan
    return n_C if params.bias_C is None else n_C + params.bias_C


def _attend(
    x_C: Array,
    qkv_CO: Array,
    out_HDC: Array,
    turn_DD: Array | None,
    kv: attention.KeyValues,
) -> Array:
    """Do what `attention.attention_forward` does, for H queries at one position.

    The heads lie below each other: H queries, G keys, G values. H / G queries share a key head;
    in `z` they are its rows.
    """
    H, D, C = out_HDC.shape
    qkv = x_C.dot(qkv_CO).reshape(-1, D)  # 1. project
    G = (len(qkv) - H) // 2
    qk, v_GD = qkv[: H + G], qkv[H + G :]
    if turn_DD is not None:
        qk = qk.dot(turn_DD)  # 2. positions
    k_GSD, v_GSD = kv.append_one(qk[H:], v_GD)
    z = qk[:H].reshape(G, H // G, D) @ k_GSD.swapaxes(1, 2)  # 3. weights (G, H / G, S)
    z -= z.max(-1, keepdims=True)
    a = xp.exp(z, out=z)
    o = a @ v_GSD  # 4. weighted values (G, H / G, D)
    o /= a.sum(-1, keepdims=True)  # as if the weights added up to one
    return o.reshape(H * D).dot(out_HDC.reshape(H * D, C))  # 5. merge


def _mix(x_C: Array, params: layer.MoEParams, cfg: MoEConfig) -> Array:
    """Do what `layer.moe_forward` does, one chosen expert after the other."""
    chosen, gates = _choose(x_C, params.router, cfg)  # 1. route
    own, K, dtype = params.experts, cfg.top_k, x_C.dtype
    a_KF, up_KF = xp.empty((2, K, cfg.hidden), dtype)
    for k, e in enumerate(chosen):  # 2. widen
        x_C.dot(own.in_ECF[e], a_KF[k])
        if own.up_ECF is not None:
            x_C.dot(own.up_ECF[e], up_KF[k])
    up_KF = None if own.up_ECF is None else up_KF
    h_KF = activation.activate(cfg.activation, a_KF, up_KF)  # 3. activate
    y_KC = xp.empty((K, x_C.size), dtype)
    for k, e in enumerate(chosen):  # 4. narrow
        h_KF[k].dot(own.out_EFC[e], y_KC[k])
    y_C = xp.asarray(gates, dtype).dot(y_KC)  # 5. weigh
    if params.shared is not None:
        y_C += shared.shared_forward(x_C[None], params.shared, cfg)[0][0]
    return y_C


def _choose(
    x_C: Array, params: router.RouterParams, cfg: MoEConfig
) -> tuple[list[int], list[float]]:
    """Do what `routing.route_forward` does; so few numbers Python compares faster than NumPy.

    A tie goes to the lower index.

    Shapes     -> the k best experts, best first, and their gates
    """
    read_NE = logit_NE = x_C.dot(params.w_CE)[None]  # 1. logits, of N = 1 token
    if params.offset_E is not None:
        logit_NE += params.offset_E
    among_chosen = score.gates_from_logits(cfg)
    if not among_chosen:
        read_NE, _ = score.score_forward(cfg.score, logit_NE)  # 2. scores
    rank_NE = routing.ranking(logit_NE, read_NE, params.bias_E, cfg)
    (read,), (rank,), chosen = read_NE.tolist(), rank_NE.tolist(), []
    for _ in range(cfg.top_k):  # 3. choice
        best = rank.index(max(rank))
        if best in chosen:  # all that are left are minus infinity
            best = next(e for e in range(len(rank)) if e not in chosen)
        rank[best] = -math.inf
        chosen.append(best)
    gates = [read[e] for e in chosen]  # 4. gates
    if among_chosen:
        top = max(gates)
        gates = [math.exp(z - top) for z in gates]
    total = max(sum(gates), score.TINY) if cfg.renormalized else 1.0
    return chosen, [gate / total * cfg.gate_scale for gate in gates]
