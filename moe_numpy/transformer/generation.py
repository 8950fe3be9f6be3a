"""Generation: one token after the other, with the keys and values of the past kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

from numpy.random import Generator, default_rng

from moe_numpy import processes
from moe_numpy.backend import Array, on_host, to_device, to_host, xp
from moe_numpy.config import ModelConfig, rules
from moe_numpy.ops import linear, softmax
from moe_numpy.transformer import attention, decode, fit, model

SLACK = 16 * 2.0**-52  # relative: 16 units in the last place of float64


def sampling_probabilities(
    logits_V: Array, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Array:
    """Turn logits into the distribution that is sampled from.

    Parameters
    ----------
    logits_V : array (V,)
    temperature : above 1 flatter, below 1 sharper; 0 keeps only the best token.
    top_k : keep only the k most likely tokens.
    top_p : keep the smallest set of most likely tokens whose probability reaches top_p
        (Holtzman et al. 2020); applied after top_k.

    Returns
    -------
    array (V,), summing to one

    Raises
    ------
    ValueError
        if the logits are not a row of at least one number, hold a NaN or infinity, hold nothing but
        minus infinity (the logit of a token that is not allowed), or a knob is out of range.
    """
    rules.array("sampling_probabilities", "the logits", logits_V)
    rule, shape = "the logits must be a row of at least one", f"the shape {logits_V.shape}"
    row = logits_V.ndim == 1 and logits_V.size > 0
    rules.require(row, "sampling_probabilities", rule, shape, "Pass those of one token.")
    _check_sampling("sampling_probabilities", temperature, top_k, top_p)
    _require_finite("sampling_probabilities", to_host(logits_V.max()))  # NaN if there is one
    return _probabilities(logits_V, temperature, top_k, top_p)


def _probabilities(logits_V: Array, temperature: float, top_k: int | None, top_p: float) -> Array:
    """Do what `sampling_probabilities` does, for knobs that are in range."""
    logits_V = logits_V.astype("float64")
    below_V = logits_V - logits_V.max()
    if temperature == 0:
        prob_V = xp.zeros_like(below_V)
        prob_V[logits_V.argmax()] = 1.0
        return prob_V
    # The bound keeps the quotient finite at tiny temperatures; beyond it the probability is zero.
    prob_V, _ = softmax.softmax_forward(xp.maximum(below_V, -1000.0 * temperature) / temperature)
    if top_k is None and top_p == 1:
        return prob_V
    order = xp.argsort(-logits_V, kind="stable")[:top_k]  # the tokens that are left, best first
    prob = prob_V[order] / prob_V[order].sum()
    before = xp.concatenate((xp.zeros(1), xp.cumsum(prob)[:-1]))
    # Sums round: eight times 0.1 is a little less than 0.8, and no ninth is wanted.
    prob = prob * (before < top_p * (1.0 - SLACK))
    prob_V = xp.zeros_like(prob_V)
    prob_V[order] = prob / prob.sum()
    return prob_V


def generate(
    prompt_T: Array,
    params: model.ModelParams,
    cfg: ModelConfig,
    tokens: int,
    rng: Generator | int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Iterator[int]:
    """Return an iterator over new tokens, each drawn from the prediction after all before it.

    Noise is off and no expert is limited, so what is generated does not depend on how the tokens
    are grouped. When the context is full, generation goes on from its second half.

    Parameters
    ----------
    prompt_T : integers (T,), at least one; only the last `cfg.context` are read.
    rng : anything that `numpy.random.default_rng` takes.

    Raises
    ------
    ValueError
        if the prompt is empty or holds a token outside the vocabulary, a knob is out of range,
        the parameters are not those of the configuration, the model is not causal, or its logits
        are not finite.
    """
    rules.configuration("generate", cfg, ModelConfig)
    if not cfg.causal:
        raise ValueError(
            "generate: the model must be causal, got causal=False. "
            "An encoder sees later tokens: it cannot predict the next one."
        )
    _check_sampling("generate", temperature, top_k, top_p)
    prompt_T = to_host(prompt_T)
    if prompt_T.ndim != 1:
        shape = prompt_T.shape
        raise ValueError(f"generate: the prompt must be one row, got the shape {shape}. Take one.")
    if not prompt_T.size:
        raise ValueError("generate: the prompt must hold at least one token, got none. Give one.")
    rules.whole_number("generate", "tokens", tokens, 0)
    fit.check_parameters("generate", params, cfg)
    fit.check_experts("generate", params, cfg)
    linear.check_vocabulary("generate", prompt_T, cfg.vocab_size)
    history = [int(token) for token in prompt_T]
    knobs = (temperature, top_k, top_p)
    return _continue(history, params, cfg.evaluation(), tokens, default_rng(rng), knobs)


def _continue(
    history: list[int],
    params: model.ModelParams,
    cfg: ModelConfig,
    tokens: int,
    rng: Generator,
    knobs: tuple,
) -> Iterator[int]:
    dtype = params.token_VC.dtype
    kv, unread = None, history[-cfg.context :]
    ready = decode.prepare(params, cfg) if decode.supports(cfg) else None
    for _ in range(tokens):
        if kv is None or kv[0].length + len(unread) > cfg.context:
            if kv is not None:
                unread = history[-max(1, cfg.context // 2) :]
            kv = tuple(attention.KeyValues(cfg, 1, dtype) for _ in params.blocks)
        if ready is not None and len(unread) <= decode.SHORT:
            for token in unread:
                logits_V = decode.next_logits(token, params, ready, cfg, kv)
        else:
            with processes.holding(None):  # how many rows there are changes from call to call
                logits_BTV, _, _, _ = model.model_forward(to_device([unread]), params, cfg, kv=kv)
            logits_V = logits_BTV[0, -1]
        token = _draw(logits_V, rng, *knobs)
        history.append(token)
        unread = [token]
        yield token


def _draw(
    logits_V: Array, rng: Generator, temperature: float, top_k: int | None, top_p: float
) -> int:
    if temperature == 0:  # the best token, whatever the draw
        token = int(to_host(logits_V.argmax()))
        if on_host(logits_V):  # on a GPU the look would be a second crossing
            _require_finite("generate", logits_V[token])
        return token
    prob_V = _probabilities(logits_V, temperature, top_k, top_p)
    cumulative_V = to_host(prob_V).cumsum()
    _require_finite("generate", cumulative_V[-1])
    return int(cumulative_V.searchsorted(rng.random() * cumulative_V[-1], "right"))


def _require_finite(who: str, number: float) -> None:
    if not math.isfinite(number):
        raise ValueError(
            f"{who}: the model must predict finite logits, got {number}. Its training blew up: "
            "take an earlier checkpoint, or train with a lower learning rate."
        )


def _check_sampling(who: str, temperature: float, top_k: int | None, top_p: float) -> None:
    if not _is_number(temperature, Real) or not 0 <= temperature < float("inf"):
        raise ValueError(
            f"{who}: temperature must be zero or positive, got {temperature!r}. "
            "Use 0 for the most likely token, 1 for the model's own distribution."
        )
    if top_k is not None and (not _is_number(top_k, Integral) or top_k < 1):
        raise ValueError(f"{who}: top_k must be at least 1, got {top_k!r}. Leave it out for all.")
    if not _is_number(top_p, Real) or not 0 < top_p <= 1:
        raise ValueError(f"{who}: top_p must satisfy 0 < top_p <= 1, got {top_p}. Use 1 for all.")


def _is_number(came: Any, kind: type) -> bool:
    return isinstance(came, kind) and not isinstance(came, bool)
