"""One layer of the transformer: attention, then a dense MLP or experts, each behind a norm."""

from __future__ import annotations

from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, xp
from moe_numpy.config import ModelConfig
from moe_numpy.moe import layer as moe_layer
from moe_numpy.moe.report import MoEReport
from moe_numpy.ops import norm
from moe_numpy.transformer import attention, mlp


class NormParams(NamedTuple):
    """Gain of every channel; the bias is there for layer norm only."""

    gain_C: Array
    bias_C: Array | None


class BlockParams(NamedTuple):
    """The parameters of one layer; `feed` is a dense MLP or a MoE layer."""

    norm_1: NormParams
    attention: attention.AttentionParams
    norm_2: NormParams
    feed: mlp.MLPParams | moe_layer.MoEParams


def init_norm(cfg: ModelConfig, dtype: str) -> NormParams:
    """Start with gain one and bias zero."""
    bias_C = xp.zeros(cfg.width, dtype) if cfg.norm == "layernorm" else None
    return NormParams(xp.ones(cfg.width, dtype), bias_C)


def init_block(rng: Generator, cfg: ModelConfig, layer: int, dtype: str) -> BlockParams:
    """Draw the layer of that index."""
    attention_params = attention.init_attention(rng, cfg, dtype)
    if cfg.is_moe(layer):
        feed = moe_layer.init_moe(rng, cfg.moe, cfg.width, dtype, 2 * cfg.layers)
    else:
        feed = mlp.init_mlp(rng, cfg, dtype)
    return BlockParams(init_norm(cfg, dtype), attention_params, init_norm(cfg, dtype), feed)


def normalize_forward(x: Array, params: NormParams) -> tuple[Array, Cache]:
    """Normalize the last axis: layer norm where there is a bias, RMS norm where there is none.

        y = layer_norm(x, gain, bias)    or    y = rms_norm(x, gain)

    Shapes     x (..., C) -> y (..., C)
    Cache      that of the norm
    Source     Ba et al. 2016; Zhang and Sennrich 2019
    """
    if params.bias_C is None:
        y, cache = norm.rms_norm_forward(x, params.gain_C)
        return y, (False, cache)
    y, cache = norm.layer_norm_forward(x, params.gain_C, params.bias_C)
    return y, (True, cache)


def normalize_backward(dy: Array, cache: Cache) -> tuple[Array, NormParams]:
    """Hand the gradient to the norm that was applied.

    Shapes     dy (..., C) -> dx (..., C), grads
    """
    has_bias, norm_cache = cache
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

        x = x + attention(norm(x)),    y = x + feed(norm(x))

    Shapes     x_BTC (B, T, C) -> y_BTC (B, T, C); aux () and report from experts (0, None if dense)
    Cache      the caches of its parts
    Source     Xiong et al. 2020 (norms before); the feed-forward as experts: Shazeer et al. 2017
    """
    B, T, C = x_BTC.shape
    n_BTC, norm_1_cache = normalize_forward(x_BTC, params.norm_1)  # 1. attention
    a_BTC, attention_cache = attention.attention_forward(n_BTC, params.attention, cfg, kv)
    x_BTC = x_BTC + a_BTC
    n_BTC, norm_2_cache = normalize_forward(x_BTC, params.norm_2)  # 2. feed-forward
    if isinstance(params.feed, moe_layer.MoEParams):
        f_NC, aux, report, feed_cache = moe_layer.moe_forward(
            n_BTC.reshape(B * T, C), params.feed, cfg.moe, noise
        )
    else:
        f_NC, feed_cache = mlp.mlp_forward(
            n_BTC.reshape(B * T, C), params.feed, cfg.dense_activation
        )
        aux, report = xp.zeros((), x_BTC.dtype), None
    y_BTC = x_BTC + f_NC.reshape(B, T, C)
    is_moe = report is not None
    return y_BTC, aux, report, (norm_1_cache, attention_cache, norm_2_cache, feed_cache, is_moe)


def block_backward(dy_BTC: Array, daux: Array, cache: Cache) -> tuple[Array, BlockParams]:
    """Undo `block_forward`: the residual stream hands dy on unchanged, each branch adds to it.

    Shapes     dy_BTC (B, T, C), daux () -> dx_BTC (B, T, C), grads
    """
    norm_1_cache, attention_cache, norm_2_cache, feed_cache, is_moe = cache
    B, T, C = dy_BTC.shape
    dy_NC = dy_BTC.reshape(B * T, C)
    if is_moe:  # 2.
        dn_NC, dfeed = moe_layer.moe_backward(dy_NC, daux, feed_cache)
    else:
        dn_NC, dfeed = mlp.mlp_backward(dy_NC, feed_cache)
    dx_BTC, dnorm_2 = normalize_backward(dn_NC.reshape(B, T, C), norm_2_cache)
    dx_BTC = dy_BTC + dx_BTC
    dn_BTC, dattention = attention.attention_backward(dx_BTC, attention_cache)  # 1.
    dn_BTC, dnorm_1 = normalize_backward(dn_BTC, norm_1_cache)
    return dx_BTC + dn_BTC, BlockParams(dnorm_1, dattention, dnorm_2, dfeed)
