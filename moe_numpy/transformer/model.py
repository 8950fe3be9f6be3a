"""The language model: from tokens to logits, to the loss, and back."""

from __future__ import annotations

from typing import NamedTuple

from numpy.random import Generator, default_rng

from moe_numpy.backend import Array, Cache, to_device, xp
from moe_numpy.config import ModelConfig, rules
from moe_numpy.moe import fit as moe_fit
from moe_numpy.moe import router
from moe_numpy.moe.report import MoEReport
from moe_numpy.ops import linear, loss
from moe_numpy.transformer import attention, block, fit


class ModelParams(NamedTuple):
    """All parameters. Rotary models have no position table, tied ones no head."""

    token_VC: Array
    position_TC: Array | None
    blocks: tuple[block.BlockParams, ...]
    norm: block.NormParams
    head_CV: Array | None


class LossReport(NamedTuple):
    """What a loss is made of: nats per token, the balance terms, and one report per MoE layer."""

    cross_entropy: Array
    aux: Array
    layers: tuple[MoEReport, ...]


def init_model(rng: Generator | int, cfg: ModelConfig, dtype: str = "float32") -> ModelParams:
    """Draw all parameters: normal, deviation 0.02; see the parts.

    `rng` is anything that `numpy.random.default_rng` takes: a generator, or a seed.

    Raises     ValueError if `dtype` is not "float32" or "float64"
    """
    rules.configuration("init_model", cfg, ModelConfig)
    rules.float_type("init_model", dtype)
    rng = default_rng(rng)
    V, C = cfg.vocab_size, cfg.width
    learned = cfg.positions == "learned"
    return ModelParams(
        token_VC=to_device(rng.normal(0.0, 0.02, (V, C)), dtype),
        position_TC=to_device(rng.normal(0.0, 0.02, (cfg.context, C)), dtype) if learned else None,
        blocks=tuple(block.init_block(rng, cfg, layer, dtype) for layer in range(cfg.layers)),
        norm=block.init_norm(cfg, dtype),
        head_CV=None if cfg.tied else to_device(rng.normal(0.0, 0.02, (C, V)), dtype),
    )


def draw_noise(
    rng: Generator | int, cfg: ModelConfig, tokens: int, dtype: str = "float32"
) -> tuple[Array | None, ...] | None:
    """Draw the routing noise of one training step, one entry per layer; None if there is none.

    `rng` is anything that `numpy.random.default_rng` takes. A layer alone: `router.draw_noise`.

    Raises     ValueError if `dtype` is not "float32" or "float64", or `tokens` is negative
    """
    rules.configuration("draw_noise", cfg, ModelConfig)
    rules.float_type("draw_noise", dtype)
    rules.whole_number("draw_noise", "tokens", tokens, 0)
    rng = default_rng(rng)
    drawn = tuple(
        router.draw_noise(rng, cfg.moe, tokens, cfg.width, dtype) if cfg.is_moe(layer) else None
        for layer in range(cfg.layers)
    )
    return None if all(noise is None for noise in drawn) else drawn


def model_forward(
    token_BT: Array,
    params: ModelParams,
    cfg: ModelConfig,
    noise: tuple[Array | None, ...] | None = None,
    kv: tuple[attention.KeyValues, ...] | None = None,
) -> tuple[Array, Array, tuple[MoEReport, ...], Cache]:
    """Predict the next token at every position.

        x = embedding_scale token[t] + position[t],    x = block(x) for every layer
        logits = logit_scale norm(x) head

    ``noise=None`` draws nothing; only `cfg.evaluation()` lifts limits as well. With `kv`, one entry
    per layer, the tokens continue those of earlier calls (generation).

    Shapes     token_BT (B, T) integers -> logits_BTV (B, T, V); aux (), the balance terms of the
               layers summed or averaged; reports
    Units      logits in nats
    Cache      the caches of the parts; `model_backward` pops the layers' one by one. For a token,
               a layer holds about 8*C + H*T numbers of attention and norms (as many key as query
               heads) and 2*F of a GELU MLP, or 2*K*(C + F) of experts; gated ones 3*F for 2*F;
               all that a configuration adds, and the peak of a step, are in `ledger.step_memory`.
               With `cfg.recompute` a layer leaves only its input there, C numbers; with `kv`
               nothing, as there is no backward then
    Raises     ValueError if the tokens are not a table, a sequence is empty or longer than the
               context, a token is unknown, parameters, noise or kv are not those of the
               configuration, or there is kv although the model is not causal or limits its experts
    Source     Radford et al. 2019, GPT-2; the scales: Grok-1; the average: T5X
    """
    rules.configuration("model_forward", cfg, ModelConfig)
    start = getattr(kv[0], "length", 0) if kv else 0
    fit.check_tokens(token_BT, start, cfg)
    fit.check_parameters("model_forward", params, cfg)
    fit.check_kv(kv, token_BT, params.token_VC.dtype, cfg)
    fit.check_noise(noise, cfg)
    x_BTC, token_cache = linear.embedding_forward(token_BT, params.token_VC)  # 1. embed
    x_BTC *= cfg.embedding_scale
    if params.position_TC is not None:
        x_BTC = x_BTC + params.position_TC[start : start + token_BT.shape[1]]
    aux, reports, caches = xp.zeros((), x_BTC.dtype), [], []
    for layer, block_params in enumerate(params.blocks):  # 2. layers
        given = (x_BTC, block_params, cfg, None if noise is None else noise[layer])
        x_BTC, layer_aux, report, cache = block.block_forward(
            *given, None if kv is None else kv[layer]
        )
        aux = aux + layer_aux * _layer_share(cfg)
        reports += [] if report is None else [report]
        if kv is None:
            caches.append(given if cfg.recompute else cache)
        del cache  # if it was not kept, it is free before the next layer runs
    x_BTC, norm_cache = block.normalize_forward(x_BTC, params.norm, cfg.norm_eps)  # 3. last norm
    x_BTC *= cfg.logit_scale
    head_CV = params.token_VC.T if params.head_CV is None else params.head_CV
    logits_BTV, head_cache = linear.linear_forward(x_BTC, head_CV)  # 4. logits
    parts = (token_cache, caches, norm_cache, head_cache)
    return logits_BTV, aux, tuple(reports), (params, cfg, *parts)


def model_backward(dlogits_BTV: Array, daux: Array, cache: Cache) -> ModelParams:
    """Undo `model_forward`, the last layer first.

    A tied table collects the gradients of both its uses. The list of the layers' caches is
    consumed, so their memory is free as soon as it is not needed. With `cfg.recompute` a layer's
    forward runs again for its cache: the same numbers, to the bit.

    Shapes     dlogits_BTV (B, T, V), daux () -> grads
    Raises     ValueError if the cache is consumed already or of a forward with `kv`, dlogits is not
               of the shape and type of the logits, or daux is not one number
    """
    params, cfg, token_cache, caches, norm_cache, head_cache = cache
    if not caches:
        raise ValueError(
            "model_backward: the cache must be fresh, got one that a backward has consumed, or of "
            "a forward with kv. Run the forward again, without kv."
        )
    dtype = params.token_VC.dtype
    logits = (*token_cache[0].shape, cfg.vocab_size), dtype
    moe_fit.check_upstream("model_backward", "dlogits", dlogits_BTV, *logits)
    daux = moe_fit.upstream_number("model_backward", "daux", daux, dtype)
    dx_BTC, dhead_CV, _ = linear.linear_backward(dlogits_BTV, head_cache)  # 4.
    dx_BTC, dnorm = block.normalize_backward(cfg.logit_scale * dx_BTC, norm_cache)  # 3.
    dblocks, daux = [], daux * _layer_share(cfg)
    while caches:  # 2.
        cache = caches.pop()
        if cfg.recompute:
            *_, cache = block.block_forward(*cache)
        dx_BTC, dblock = block.block_backward(dx_BTC, daux, cache)
        dblocks.insert(0, dblock)
    dposition = None
    if params.position_TC is not None:  # 1.
        dposition = xp.zeros_like(params.position_TC)
        dposition[: dx_BTC.shape[1]] = dx_BTC.sum(0)
    dtoken_VC = linear.embedding_backward(cfg.embedding_scale * dx_BTC, token_cache)
    if params.head_CV is None:
        dtoken_VC = dtoken_VC + dhead_CV.T
        dhead_CV = None
    return ModelParams(dtoken_VC, dposition, tuple(dblocks), dnorm, dhead_CV)


def loss_forward(
    token_BT: Array,
    target_BT: Array,
    params: ModelParams,
    cfg: ModelConfig,
    noise: tuple[Array | None, ...] | None = None,
    smoothing: float = 0.0,
) -> tuple[Array, LossReport, Cache]:
    """Compute the training loss of a batch.

        loss = cross_entropy(logits, target) + aux

    Shapes     token_BT, target_BT (B, T) integers -> loss (); report
    Units      nats per token, plus the weighted balance terms
    Cache      (model cache, cross-entropy cache, shape of the logits)
    Raises     ValueError if tokens and targets differ in shape, or the smoothing is not below 1
    Source     Fedus et al. 2022, section 2.2 (the balance loss is added to the model's)
    """
    rules.share("loss_forward", "smoothing", smoothing)
    smoothing = rules.plain(smoothing)
    fit.check_targets("loss_forward", token_BT, target_BT)
    logits_BTV, aux, reports, model_cache = model_forward(token_BT, params, cfg, noise)  # 1.
    logits_NV = logits_BTV.reshape(-1, cfg.vocab_size)
    cross_entropy, loss_cache = loss.cross_entropy_forward(
        logits_NV, target_BT.reshape(-1), smoothing
    )  # 2.
    report = LossReport(cross_entropy, aux, reports)
    return cross_entropy + aux, report, (model_cache, loss_cache, logits_BTV.shape)


def loss_backward(dloss: Array, cache: Cache) -> ModelParams:
    """Undo `loss_forward`: the sum hands dloss to both of its terms.

    Shapes     dloss () -> grads
    Raises     ValueError if dloss is not one number, or the cache is consumed already
    """
    model_cache, loss_cache, shape = cache
    dtype = model_cache[0].token_VC.dtype
    dloss = moe_fit.upstream_number("loss_backward", "dloss", dloss, dtype)
    dlogits_NV = loss.cross_entropy_backward(dloss, loss_cache)  # 2.
    return model_backward(dlogits_NV.reshape(shape), dloss, model_cache)  # 1.


def _layer_share(cfg: ModelConfig) -> float:
    """Weigh the balance terms of one layer: all of them, or their mean."""
    return 1.0 / cfg.moe_count if cfg.balance_over_layers == "mean" else 1.0
