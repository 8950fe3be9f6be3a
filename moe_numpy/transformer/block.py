"""One layer of the transformer: attention, then a dense MLP or experts, each behind a norm.

Each is a branch that adds to the residual stream. A configuration may ask for a second norm after
each branch, and for a dense MLP as a third branch beside experts.
"""

from __future__ import annotations

from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, xp
from moe_numpy.config import ModelConfig
from moe_numpy.moe import layer as moe_layer
from moe_numpy.moe import mlp
from moe_numpy.moe.report import MoEReport
from moe_numpy.ops import norm
from moe_numpy.transformer import attention


class NormParams(NamedTuple):
    """Gain of every channel; the bias is there for layer norm only."""

    gain_C: Array
    bias_C: Array | None


class BlockParams(NamedTuple):
    """The parameters of one layer; `feed` is a dense MLP or an MoE layer.

    Optional: the norms after the branches (sandwich); the extra MLP of an MoE layer (extra_ffn).
    """

    norm_1: NormParams
    attention: attention.AttentionParams
    norm_2: NormParams
    feed: mlp.MLPParams | moe_layer.MoEParams
    norm_1_post: NormParams | None = None
    norm_2_post: NormParams | None = None
    norm_3: NormParams | None = None
    extra: mlp.MLPParams | None = None
    norm_3_post: NormParams | None = None


def init_norm(cfg: ModelConfig, dtype: str) -> NormParams:
    """Start with gain one and bias zero."""
    bias_C = xp.zeros(cfg.width, dtype) if cfg.norm == "layernorm" else None
    return NormParams(xp.ones(cfg.width, dtype), bias_C)


def init_block(rng: Generator, cfg: ModelConfig, layer: int, dtype: str) -> BlockParams:
    """Draw the layer of that index."""
    attention_params = attention.init_attention(rng, cfg, dtype)
    sizes = (cfg.width, cfg.hidden, cfg.dense_activation, dtype, 2 * cfg.layers)
    if cfg.is_moe(layer):
        feed = moe_layer.init_moe(rng, cfg.moe, cfg.width, dtype, 2 * cfg.layers)
    else:
        feed = mlp.init_mlp(rng, *sizes)
    after, extra = cfg.sandwich, cfg.extra_ffn and cfg.is_moe(layer)
    return BlockParams(
        norm_1=init_norm(cfg, dtype),
        attention=attention_params,
        norm_2=init_norm(cfg, dtype),
        feed=feed,
        norm_1_post=init_norm(cfg, dtype) if after else None,
        norm_2_post=init_norm(cfg, dtype) if after else None,
        norm_3=init_norm(cfg, dtype) if extra else None,
        extra=mlp.init_mlp(rng, *sizes) if extra else None,
        norm_3_post=init_norm(cfg, dtype) if extra and after else None,
    )


def normalize_forward(
    x: Array, params: NormParams | None, eps: float = 1e-5
) -> tuple[Array, Cache]:
    """Normalize the last axis: layer norm where there is a bias, RMS norm where there is none.

        y = layer_norm(x, gain, bias)    or    y = rms_norm(x, gain)    or without params    y = x

    Shapes     x (..., C) -> y (..., C)
    Cache      (has_bias, that of the norm)
    Source     Ba et al. 2016; Zhang and Sennrich 2019
    """
    if params is None:
        return x, (False, None)
    if params.bias_C is None:
        y, cache = norm.rms_norm_forward(x, params.gain_C, eps)
        return y, (False, cache)
    y, cache = norm.layer_norm_forward(x, params.gain_C, params.bias_C, eps)
    return y, (True, cache)


def normalize_backward(dy: Array, cache: Cache) -> tuple[Array, NormParams | None]:
    """Hand the gradient to the norm that was applied.

    Shapes     dy (..., C) -> dx (..., C), grads
    """
    has_bias, norm_cache = cache
    if norm_cache is None:
        return dy, None
    if has_bias:
        dx, dgain_C, dbias_C = norm.layer_norm_backward(dy, norm_cache)
        return dx, NormParams(dgain_C, dbias_C)
    dx, dgain_C = norm.rms_norm_backward(dy, norm_cache)
    return dx, NormParams(dgain_C, None)


def block_forward(
    x_BTC: Array,
    params: BlockParams,
    cfg: ModelConfig,
    noise: Array | None = None,
    kv: attention.KeyValues | None = None,
) -> tuple[Array, Array, MoEReport | None, Cache]:
    """Add what attention, then what the feed-forward finds, to the residual stream.

        x = x + attention(norm(x)),    y = x + feed(norm(x)),    and then y = y + extra(norm(y))

    With a sandwich each branch is normalized again before it is added.

    Shapes     x_BTC (B, T, C) -> y_BTC (B, T, C); aux () and report from experts (0, None if dense)
    Cache      the caches of its parts
    Source     Xiong et al. 2020 (norms before); the feed-forward as experts: Shazeer et al. 2017;
               sandwich: Ding et al. 2021, CogView, and Grok-1; extra: Xue et al. 2024, OpenMoE
               (in sequence, as its code has it)
    """
    B, T, C = x_BTC.shape
    eps, kind = cfg.norm_eps, cfg.dense_activation
    n_BTC, pre_1 = normalize_forward(x_BTC, params.norm_1, eps)  # 1. attention
    f_BTC, attention_cache = attention.attention_forward(n_BTC, params.attention, cfg, kv)
    f_BTC, post_1 = normalize_forward(f_BTC, params.norm_1_post, eps)
    x_BTC = x_BTC + f_BTC
    n_BTC, pre_2 = normalize_forward(x_BTC, params.norm_2, eps)  # 2. feed-forward
    n_NC, aux, report = n_BTC.reshape(B * T, C), xp.zeros((), x_BTC.dtype), None
    if isinstance(params.feed, moe_layer.MoEParams):
        f_NC, aux, report, feed_cache = moe_layer.moe_forward(n_NC, params.feed, cfg.moe, noise)
    else:
        f_NC, feed_cache = mlp.mlp_forward(n_NC, params.feed, kind)
    f_BTC, post_2 = normalize_forward(f_NC.reshape(B, T, C), params.norm_2_post, eps)
    y_BTC, extra_caches = x_BTC + f_BTC, None
    if params.extra is not None:
        n_BTC, pre_3 = normalize_forward(y_BTC, params.norm_3, eps)  # 3. extra feed-forward
        f_BTC, extra_cache = mlp.mlp_forward(n_BTC, params.extra, kind)
        f_BTC, post_3 = normalize_forward(f_BTC, params.norm_3_post, eps)
        y_BTC, extra_caches = y_BTC + f_BTC, (pre_3, extra_cache, post_3)
    caches = (pre_1, attention_cache, post_1), (pre_2, feed_cache, post_2), extra_caches
    return y_BTC, aux, report, (*caches, report is not None)


def block_backward(dy_BTC: Array, daux: Array, cache: Cache) -> tuple[Array, BlockParams]:
    """Undo `block_forward`: the residual stream hands dy on unchanged, each branch adds to it.

    Shapes     dy_BTC (B, T, C), daux () -> dx_BTC (B, T, C), grads
    """
    attention_caches, feed_caches, extra_caches, is_moe = cache
    B, T, C = dy_BTC.shape
    dnorm_3 = dextra = dnorm_3_post = None
    if extra_caches is not None:
        pre_3, extra_cache, post_3 = extra_caches
        df_BTC, dnorm_3_post = normalize_backward(dy_BTC, post_3)  # 3.
        dn_BTC, dextra = mlp.mlp_backward(df_BTC, extra_cache)
        dn_BTC, dnorm_3 = normalize_backward(dn_BTC, pre_3)
        dy_BTC = dy_BTC + dn_BTC
    pre_2, feed_cache, post_2 = feed_caches
    df_BTC, dnorm_2_post = normalize_backward(dy_BTC, post_2)  # 2.
    df_NC = df_BTC.reshape(B * T, C)
    if is_moe:
        dn_NC, dfeed = moe_layer.moe_backward(df_NC, daux, feed_cache)
    else:
        dn_NC, dfeed = mlp.mlp_backward(df_NC, feed_cache)
    dn_BTC, dnorm_2 = normalize_backward(dn_NC.reshape(B, T, C), pre_2)
    dx_BTC = dy_BTC + dn_BTC
    pre_1, attention_cache, post_1 = attention_caches
    df_BTC, dnorm_1_post = normalize_backward(dx_BTC, post_1)  # 1.
    dn_BTC, dattention = attention.attention_backward(df_BTC, attention_cache)
    dn_BTC, dnorm_1 = normalize_backward(dn_BTC, pre_1)
    grads = BlockParams(
        *(dnorm_1, dattention, dnorm_2, dfeed),
        *(dnorm_1_post, dnorm_2_post, dnorm_3, dextra, dnorm_3_post),
    )
    return dx_BTC + dn_BTC, grads
