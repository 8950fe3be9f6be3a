"""The language model: from tokens to logits, to the loss, and back."""

from __future__ import annotations

from typing import NamedTuple

from numpy.random import Generator

from moe_numpy import tree
from moe_numpy.backend import Array, Cache, memory, to_device, xp
from moe_numpy.config import ModelConfig, rules
from moe_numpy.moe import layer as moe_layer
from moe_numpy.moe import router
from moe_numpy.moe.report import MoEReport
from moe_numpy.ops import linear, loss
from moe_numpy.transformer import attention, block


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


def init_model(rng: Generator, cfg: ModelConfig, dtype: str = "float32") -> ModelParams:
    """Draw all parameters (normal, deviation 0.02; see the parts); they lie in one block of memory.

    Raises     ValueError if `dtype` is not "float32" or "float64"
    """
    rules.one_of("init_model", "dtype", dtype, ("float32", "float64"))
    V, C = cfg.vocab_size, cfg.width
    learned = cfg.positions == "learned"
    params = ModelParams(
        token_VC=to_device(rng.normal(0.0, 0.02, (V, C)), dtype),
        position_TC=to_device(rng.normal(0.0, 0.02, (cfg.context, C)), dtype) if learned else None,
        blocks=tuple(block.init_block(rng, cfg, layer, dtype) for layer in range(cfg.layers)),
        norm=block.init_norm(cfg, dtype),
        head_CV=None if cfg.tied else to_device(rng.normal(0.0, 0.02, (C, V)), dtype),
    )
    return tree.in_one_block(params, memory)


def draw_noise(
    rng: Generator, cfg: ModelConfig, tokens: int, dtype: str = "float32"
) -> tuple[Array | None, ...] | None:
    """Draw the routing noise of one training step, one entry per layer; None if there is none."""
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
               With `cfg.recompute` a layer leaves only its input there, C numbers
    Raises     ValueError if the tokens are no table, a sequence is empty or longer than the
               context, a token is unknown, or parameters and noise are not those of the
               configuration
    Source     Radford et al. 2019, GPT-2; the scales: Grok-1; the average: T5X
    """
    start = 0 if kv is None else kv[0].length
    _check_tokens(token_BT, start, cfg)
    _check_parameters(params, cfg, noise)
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
        caches.append(given if cfg.recompute else cache)
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
    Raises     ValueError if the cache is consumed already
    """
    params, cfg, token_cache, caches, norm_cache, head_cache = cache
    if not caches:
        raise ValueError(
            "model_backward: the cache must be fresh, got one that a backward has consumed. "
            "Run the forward again."
        )
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
    if token_BT.shape != target_BT.shape:
        raise ValueError(
            f"loss_forward: every token needs a target, got tokens of shape {token_BT.shape} and "
            f"targets of {target_BT.shape}. Pass tables (B, T) of the same shape."
        )
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
    """
    model_cache, loss_cache, shape = cache
    dloss = xp.asarray(dloss, model_cache[0].token_VC.dtype)
    dlogits_NV = loss.cross_entropy_backward(dloss, loss_cache)  # 2.
    return model_backward(dlogits_NV.reshape(shape), dloss, model_cache)  # 1.


def _layer_share(cfg: ModelConfig) -> float:
    """Weigh the balance terms of one layer: all of them, or their mean."""
    return 1.0 / cfg.moe_count if cfg.balance_over_layers == "mean" else 1.0


def _check_tokens(token_BT: Array, start: int, cfg: ModelConfig) -> None:
    if token_BT.ndim != 2 or token_BT.shape[1] == 0:
        raise ValueError(
            f"model_forward: tokens must be a table (B, T) of at least one column, got the shape "
            f"{token_BT.shape}. One sequence is token_BT[None]."
        )
    length = start + token_BT.shape[1]
    if length > cfg.context:
        raise ValueError(
            f"model_forward: a sequence may have at most {cfg.context} tokens (the context), got "
            f"{length}. Shorten it or build the model with a larger context."
        )


def _check_parameters(
    params: ModelParams, cfg: ModelConfig, noise: tuple[Array | None, ...] | None
) -> None:
    """Refuse parameters of another configuration; `moe_forward` looks at those of the experts."""
    C, G = cfg.width, cfg.kv_heads or cfg.heads
    learned = (cfg.context, C) if cfg.positions == "learned" else None
    expected = {
        "blocks": (len(params.blocks), cfg.layers),
        "token_VC": (params.token_VC.shape, (cfg.vocab_size, C)),
        "position_TC": (_shape(params.position_TC), learned),
        "head_CV": (_shape(params.head_CV), None if cfg.tied else (C, cfg.vocab_size)),
        "norm.bias_C": (_shape(params.norm.bias_C), (C,) if cfg.norm == "layernorm" else None),
    }
    for layer, part in enumerate(params.blocks):
        heads, of_moe = part.attention, isinstance(part.feed, moe_layer.MoEParams)
        expected |= {
            f"blocks.{layer}.q_CHD": (heads.q_CHD.shape, (C, cfg.heads, cfg.head_width)),
            f"blocks.{layer}.k_CGD": (heads.k_CGD.shape, (C, G, cfg.head_width)),
            f"blocks.{layer}.sink_H": (_shape(heads.sink_H), (cfg.heads,) if cfg.sinks else None),
            f"experts in layer {layer}": (of_moe, cfg.is_moe(layer)),
            f"norms after branches in layer {layer}": (part.norm_1_post is not None, cfg.sandwich),
        }
    if noise is not None:
        expected["arrays of noise"] = (len(noise), cfg.layers)
        idle = [drawn is not None and not cfg.is_moe(layer) for layer, drawn in enumerate(noise)]
        expected["noise for layers without experts"] = (any(idle), False)
    for name, (came, wanted) in expected.items():
        if came != wanted:
            raise ValueError(
                f"model_forward: {name} must be {wanted}, as the configuration says, got {came}. "
                "Draw parameters and noise for this configuration."
            )


def _shape(leaf: Array | None) -> tuple[int, ...] | None:
    return None if leaf is None else leaf.shape
