"""The router: logits, noise, the choice of the top k experts, and their gate weights."""

from __future__ import annotations

from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, to_device, xp
from moe_numpy.config import (
    GaussianNoise,
    Hierarchy,
    InputJitter,
    LearnedNoise,
    MoEConfig,
    SecondExpert,
    rules,
)
from moe_numpy.ops import activation, linear, rows, softmax


class RouterParams(NamedTuple):
    """What a router learns; `bias_E` is moved by the bias rule instead of a gradient.

    `offset_E` is an ordinary bias of the logits (gpt-oss), learned by gradient.
    """

    w_CE: Array
    noise_CE: Array | None = None
    bias_E: Array | None = None
    offset_E: Array | None = None


def init_router(rng: Generator, cfg: MoEConfig, width: int, dtype: str) -> RouterParams:
    """Draw small logit weights; those of the noise scale and the biases start at zero.

    So a learned scale starts at softplus(0) + floor, which is about 0.7: the noise is on.
    """
    E = cfg.num_experts
    return RouterParams(
        w_CE=to_device(rng.normal(0.0, cfg.router_std, (width, E)), dtype),
        noise_CE=xp.zeros((width, E), dtype) if isinstance(cfg.noise, LearnedNoise) else None,
        bias_E=xp.zeros(E, dtype) if cfg.bias_rate else None,
        offset_E=xp.zeros(E, dtype) if cfg.router_bias else None,
    )


def draw_noise(rng: Generator, cfg: MoEConfig, tokens: int, width: int, dtype: str) -> Array | None:
    """Draw on the host the random numbers of one layer for one batch, side by side in columns.

    Standard normal (N, E) numbers for noise on the logits, with G more columns for the G groups
    of a hierarchy; or uniform (N, C) numbers from -1 to 1 for input jitter; then one column of
    uniform numbers from 0 to 1 if the second expert is drawn. None if there is nothing to draw.
    The configuration scales them.
    """
    columns, shape = [], (tokens, _columns(cfg, width))
    if isinstance(cfg.noise, InputJitter):
        columns.append(to_device(rng.uniform(-1.0, 1.0, shape), dtype))
    elif cfg.noise is not None:
        columns.append(to_device(rng.standard_normal(shape), dtype))
    if _draws_second(cfg):
        columns.append(to_device(rng.random((tokens, 1)), dtype))
    return xp.concatenate(columns, axis=1) if columns else None


def check_noise(noise: Array, cfg: MoEConfig, tokens: int, width: int, dtype: str) -> None:
    """Refuse numbers that are not of the shape and type that `draw_noise` gives them."""
    columns = _columns(cfg, width) + (1 if _draws_second(cfg) else 0)
    if not columns:
        raise ValueError(
            "moe_forward: noise came for a layer with noise=None, "
            f"of shape {noise.shape}. Pass None."
        )
    if noise.shape != (tokens, columns) or noise.dtype != dtype:
        raise ValueError(
            f"moe_forward: the noise must have the shape ({tokens}, {columns}) and the type "
            f"{dtype}, got {noise.shape} and {noise.dtype}. Draw it with `draw_noise` for this "
            "batch."
        )


def split_noise(noise: Array | None, cfg: MoEConfig) -> tuple[Array | None, Array | None]:
    """Split what `draw_noise` drew: the noise of the router, and the second expert's coin."""
    if noise is None or not _draws_second(cfg):
        return noise, None
    return (None if cfg.noise is None else noise[:, :-1]), noise[:, -1]


def router_forward(
    x_NC: Array, params: RouterParams, cfg: MoEConfig, noise: Array | None = None
) -> tuple[Array, Array, Array | None, Cache]:
    """Score every expert for every token, cleanly and with noise.

        clean = x W + offset,    noisy = clean + noise * scale
        scale = softplus(x W_noise) + floor  (learned)   or   std  (fixed)
        with input jitter instead: clean = (x * (1 + eps noise)) W,  noisy = clean

    ``noise=None``: noisy = clean.

    Shapes     x_NC (N, C); noise (N, E), or (N, C) for jitter
               -> clean_NE, noisy_NE (N, E); scale_NE (N, E), the deviation of the noise on the
               logits, None if there is none
    Units      logits in nats
    Cache      (params, jitter_NC, noise, linear cache, (linear, softplus caches) or None); with
               jitter x once more, as the router saw it
    Raises     ValueError if there is noise for a layer that has none
    Source     Shazeer et al. 2017, eq. 4; Fedus et al. 2022, appendix C (jitter)
    """
    if noise is not None and cfg.noise is None:
        raise ValueError("router_forward: noise came for a layer with noise=None. Pass None.")
    jitter_NC = None
    if noise is not None and isinstance(cfg.noise, InputJitter):
        jitter_NC = 1.0 + cfg.noise.eps * noise  # 1. the router's own view of the token
        x_NC = x_NC * jitter_NC
    clean_NE, logit_cache = linear.linear_forward(x_NC, params.w_CE, params.offset_E)  # 2.
    if noise is None or jitter_NC is not None:
        return clean_NE, clean_NE, None, (params, jitter_NC, None, logit_cache, None)
    if isinstance(cfg.noise, GaussianNoise):
        scale_NE, noise_caches = xp.full_like(clean_NE, cfg.noise.std), None  # 3. fixed noise
    else:
        raw_NE, raw_cache = linear.linear_forward(x_NC, params.noise_CE)  # 3. learned noise
        scale_NE, scale_cache = activation.softplus_forward(raw_NE)
        scale_NE += cfg.noise.floor
        noise_caches = (raw_cache, scale_cache)
    noisy_NE = clean_NE + noise * scale_NE
    return clean_NE, noisy_NE, scale_NE, (params, None, noise, logit_cache, noise_caches)


def router_backward(
    dclean_NE: Array | None, dnoisy_NE: Array, dscale_NE: Array | None, cache: Cache
) -> tuple[Array, RouterParams]:
    """Undo `router_forward`.

    noisy = clean + noise * scale sends dnoisy on to clean and, times the noise, to the scale,
    which is softplus(raw) + floor with raw = x W_noise:
        dclean += dnoisy,    dscale += noise * dnoisy,    d(raw) = dscale * sigmoid(raw).
    The selection bias has no gradient: it only chooses.

    Shapes     dclean_NE, dnoisy_NE, dscale_NE (N, E); None for what nothing but `noisy` has read
               -> dx_NC (N, C), grads
    """
    params, jitter_NC, noise, logit_cache, noise_caches = cache
    dlogit_NE = plus(dclean_NE, dnoisy_NE)
    dx_noise_NC = None
    dnoise_CE = None if params.noise_CE is None else xp.zeros_like(params.noise_CE)
    if noise_caches is not None:  # 3.
        raw_cache, scale_cache = noise_caches
        dscale_NE = plus(dscale_NE, noise * dnoisy_NE)
        draw_NE = activation.softplus_backward(dscale_NE, scale_cache)
        dx_noise_NC, dnoise_CE, _ = linear.linear_backward(draw_NE, raw_cache)
    dx_NC, dw_CE, doffset_E = linear.linear_backward(dlogit_NE, logit_cache)  # 2.
    dx_NC = plus(dx_noise_NC, dx_NC)
    if jitter_NC is not None:  # 1.
        dx_NC = dx_NC * jitter_NC
    dbias_E = None if params.bias_E is None else xp.zeros_like(params.bias_E)
    return dx_NC, RouterParams(dw_CE, dnoise_CE, dbias_E, doffset_E)


def plus(a: Array | None, b: Array) -> Array:
    """Add the gradients of two paths; None is a path that is not there."""
    return b if a is None else a + b


def top_k(score_NE: Array, k: int) -> Array:
    """Choose the k best experts of every token, best first; a tie goes to the lower index.

    A discrete decision: it has no gradient. Repeated argmax beats sorting for the small k in use.

    Minus infinity is the worst of scores, but one that can be chosen where nothing else is left.

    Shapes     score_NE (N, E) -> expert_NK (N, k) integers, all different in a row
    Raises     ValueError if k is more than E
    """
    rule, advice = f"k must be at most the number of experts ({score_NE.shape[1]})", "Lower it."
    rules.require(k <= score_NE.shape[1], "top_k", rule, k, advice)
    expert_NK = xp.empty((score_NE.shape[0], k), xp.intp)
    rows.in_blocks(_top_k, score_NE, expert_NK)
    return expert_NK


def _top_k(score_NE: Array, expert_NK: Array) -> None:
    token_N, remaining_NE = xp.arange(len(score_NE)), rows.finite_below(score_NE)
    for choice in range(expert_NK.shape[1]):
        best_N = remaining_NE.argmax(1)
        expert_NK[:, choice] = best_N
        remaining_NE[token_N, best_N] = -xp.inf


def raw_gate_forward(prob_NE: Array, expert_NK: Array) -> tuple[Array, Cache]:
    """Weigh the chosen experts by their probability among all experts.

        gate[n, k] = prob[n, expert[n, k]]

    Shapes     prob_NE (N, E); expert_NK (N, K) integers, all different in a row -> gate_NK (N, K)
    Cache      (expert_NK, E)
    Source     Fedus et al. 2022, Switch Transformers, eq. 2
    """
    N, E = prob_NE.shape
    return prob_NE[xp.arange(N)[:, None], expert_NK], (expert_NK, E)


def raw_gate_backward(dgate_NK: Array, cache: Cache) -> Array:
    """Put each gradient back where its gate was read; the experts of a token are all different.

    Shapes     dgate_NK (N, K) -> dprob_NE (N, E)
    """
    expert_NK, E = cache
    N = expert_NK.shape[0]
    dprob_NE = xp.zeros((N, E), dgate_NK.dtype)
    dprob_NE[xp.arange(N)[:, None], expert_NK] = dgate_NK
    return dprob_NE


def renormalized_gate_forward(
    logit_NE: Array, expert_NK: Array, kept_NK: Array | None = None
) -> tuple[Array, Cache]:
    """Weigh the chosen experts by a softmax among themselves.

        gate[n, :] = softmax(logit[n, expert[n, :]])

    This is the softmax over all experts after every logit but the chosen ones was set to minus
    infinity, and also the raw gates divided by their sum: one function, three descriptions.

    With `kept_NK` the logits of dropped choices are minus infinity, too: their gates are zero, and
    all of a row are where nothing was kept.

    Shapes     logit_NE (N, E); expert_NK (N, K) integers, all different in a row; kept_NK (N, K)
               booleans, None for all -> gate_NK (N, K)
    Cache      (gate_NK, gather cache)
    Source     Shazeer et al. 2017, eq. 3 and 5
    """
    chosen_NK, gather_cache = raw_gate_forward(logit_NE, expert_NK)  # 1. only the chosen logits
    if kept_NK is not None:
        lost_N1 = ~kept_NK.any(1, keepdims=True)
        chosen_NK = xp.where(kept_NK | lost_N1, chosen_NK, -xp.inf)
    gate_NK, _ = softmax.softmax_forward(chosen_NK)  # 2. softmax among them
    if kept_NK is not None:
        gate_NK *= kept_NK  # where all were lost
    return gate_NK, (gate_NK, gather_cache)


def renormalized_gate_backward(dgate_NK: Array, cache: Cache) -> Array:
    """Undo `renormalized_gate_forward`: dlogit[chosen] = gate (dgate - <gate, dgate>).

    A logit that was not chosen, or not kept, gets exactly nothing, and with one choice (gate = 1)
    neither does the chosen one: a renormalized top-1 router does not learn from the task.

    Shapes     dgate_NK (N, K) -> dlogit_NE (N, E)
    """
    gate_NK, gather_cache = cache
    dchosen_NK = softmax.softmax_backward(dgate_NK, (gate_NK,))  # 2.
    return raw_gate_backward(dchosen_NK, gather_cache)  # 1.


def _columns(cfg: MoEConfig, width: int) -> int:
    """Count the random numbers of the router for one token."""
    if cfg.noise is None:
        return 0
    if isinstance(cfg.noise, InputJitter):
        return width
    groups = cfg.selection.groups if isinstance(cfg.selection, Hierarchy) else 0
    return cfg.num_experts + groups


def _draws_second(cfg: MoEConfig) -> bool:
    return isinstance(cfg.selection, SecondExpert) and cfg.selection.policy == "random"
