"""The arguments at which the pairs around the experts are checked: norms, attention, the model.

Among the cases are the styles of published systems, so that every optional parameter has a gradient
somewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator

from moe_numpy.classroom.cases_routing import ALL_TERMS, moe_config
from moe_numpy.classroom.contract import Case
from moe_numpy.classroom.sizes import B, C, E, N, T, V, generic
from moe_numpy.config import Capacity, LearnedNoise, ModelConfig, SwitchLoss
from moe_numpy.ops import rotary
from moe_numpy.transformer import attention, block, model

H, D = 3, 2


def _norm(bias: bool) -> Callable[[Generator], list[Case]]:
    def build(rng: Generator) -> list[Case]:
        x, gain = rng.normal(1.0, 2.0, (B, N, C)), rng.normal(1, 1, C)
        if bias:
            return [Case("", (x, gain, rng.normal(size=C)))]
        return [Case("gain", (x, gain)), Case("no gain, large eps", (x, None, 0.5))]

    return build


def _normalize(rng: Generator) -> list[Case]:
    x = rng.normal(1.0, 2.0, (N, C))
    gain, bias = rng.normal(1, 1, C), rng.normal(size=C)
    return [
        Case("layer norm", (x, block.NormParams(gain, bias))),
        Case("RMS norm", (x, block.NormParams(gain, None), 0.5)),
        Case("none", (x, None)),
    ]


def _rotary(rng: Generator) -> list[Case]:
    def case(name: str, *knobs: Any) -> Case:
        turns = rotary.turns(*knobs)
        return Case(
            name, (rng.normal(size=(B, 3, T, 6)), *turns), constant=frozenset(("cos", "sin"))
        )

    return [case("", np.arange(2, 2 + T), 6), case("other base", np.arange(T), 6, 7.0)]


def _sink_softmax(rng: Generator) -> list[Case]:
    return [Case("", (rng.normal(0.3, 1.5, (B, H, T, N)), rng.normal(0.5, 1.5, H)))]


def _soft_cap(rng: Generator) -> list[Case]:
    return [Case("", (rng.normal(0.3, 2.0, (B, H, T, N)), 1.7))]


def _qk_norm(rng: Generator) -> list[Case]:
    x_BHTD = rng.normal(0.3, 1.5, (B, H, T, D))
    return [
        Case("head", (x_BHTD, rng.normal(1, 1, D), "head")),
        Case("full", (x_BHTD, rng.normal(1, 1, H * D), "full", 0.5)),
        Case("l2", (x_BHTD, None, "l2")),
    ]


def _scores(rng: Generator) -> list[Case]:
    q_BHTD, k_BGSD = rng.normal(size=(B, H, T, D)), rng.normal(size=(B, H, T + 2, D))
    sink_H, extras = rng.normal(size=H), {"scale": 1.3, "cap": 0.9}
    return [
        Case("all positions", (q_BHTD, k_BGSD[:, :, :T])),
        Case("after two earlier positions", (q_BHTD, k_BGSD)),
        Case("shared keys", (q_BHTD, rng.normal(size=(B, 1, T + 1, D)))),
        Case("sinks", (q_BHTD, k_BGSD, sink_H)),
        Case("cap and scale", (q_BHTD, k_BGSD), extras),
        Case("sinks, cap and scale, not causal", (q_BHTD, k_BGSD, sink_H, 1.3, 0.9, False)),
    ]


def _model_config(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": V, "context": T + 1, "layers": 2, "width": 8, "heads": 4}
    return ModelConfig(**sizes | {"hidden": 6} | changes)


LLAMA = {"norm": "rmsnorm", "positions": "rotary", "tied": False}
# Attention as in published systems; the sizes are not theirs.
ATTENTION = {
    "Grok": {
        **LLAMA,
        "tied": True,
        "kv_heads": 2,
        "head_size": 6,
        "sandwich": True,
        "logit_cap": 0.8,
        "embedding_scale": 2.5,
        "logit_scale": 0.6,
    },
    "OLMoE": {**LLAMA, "qk_norm": "full", "norm_eps": 0.1},
    "Qwen3": {**LLAMA, "kv_heads": 2, "head_size": 6, "qk_norm": "head", "theta": 30.0},
    "Llama 4": {**LLAMA, "kv_heads": 2, "qk_norm": "l2", "norm_eps": 0.1},
    "gpt-oss": {**LLAMA, "kv_heads": 2, "head_size": 6, "attention_bias": True, "sinks": True},
    "OpenMoE": {**LLAMA, "attention_scale": 1.0, "head_size": 6},
}
NOISY_MIX = {  # a dense layer, then an MoE layer with noise and limits
    "moe_layers": (1,),
    "moe": moe_config(
        noise=LearnedNoise(),
        balance=ALL_TERMS,
        capacity=Capacity(factor=0.9, overflow="next_best"),
    ),
}
GROK_STYLE = {
    **ATTENTION["Grok"],
    "hidden": None,
    "moe": moe_config(activation="geglu", gate_weights="raw", balance=(SwitchLoss(weight=0.5),)),
}
OPENMOE_STYLE = {
    **ATTENTION["OpenMoE"],
    "activation": "swiglu",
    "extra_ffn": True,
    "balance_over_layers": "mean",
    "moe": moe_config(gate_weights="raw", balance=(SwitchLoss(weight=0.5),)),
}
STYLES = {
    "Grok style": GROK_STYLE,
    "OpenMoE style": OPENMOE_STYLE,
    "extra feed-forward in a sandwich": {**OPENMOE_STYLE, "sandwich": True, "norm": "layernorm"},
}


def _attention(rng: Generator) -> list[Case]:
    def case(name: str, zero: tuple[str, ...] = (), **changes: Any) -> Case:
        cfg = _model_config(**changes)
        params = generic(rng, attention.init_attention(rng, cfg, "float64"))
        args = (rng.normal(size=(B, T, cfg.width)), params, cfg)
        return Case(name, args, zero=frozenset(zero))

    shifted = ("params.k_GD",)  # all keys moved alike raise a query's logits alike
    return [
        case("learned positions"),
        case("rotary, grouped", kv_heads=2, positions="rotary"),
        *(case(f"{name} style", **style) for name, style in ATTENTION.items()),
        case("biases without positions", shifted, kv_heads=2, attention_bias=True),
        case("not causal", causal=False, qk_norm="full", sinks=True),
    ]


def _block(rng: Generator) -> list[Case]:
    def case(name: str, **changes: Any) -> Case:
        cfg = _model_config(**changes)
        params = generic(rng, block.init_block(rng, cfg, 1, "float64"))
        noisy = cfg.moe is not None and cfg.moe.noise is not None
        noise = rng.normal(size=(B * T, E)) if noisy else None
        return Case(
            name,
            (rng.normal(size=(B, T, cfg.width)), params, cfg, noise),
            constant=frozenset({"noise"} if noisy else ()),
        )

    return [
        case("dense"),
        case("dense sandwich", sandwich=True, norm_eps=0.1),
        case("noisy", **NOISY_MIX),
        *(case(name, **style) for name, style in STYLES.items()),
    ]


def _whole(with_target: bool) -> Callable[[Generator], list[Case]]:
    def build(rng: Generator) -> list[Case]:
        def case(name: str, changes: dict, **kwargs: Any) -> Case:
            cfg = _model_config(**changes)
            params = generic(rng, model.init_model(rng, cfg, "float64"), 0.4)
            noise = model.draw_noise(rng, cfg, B * T, "float64")
            target = (rng.integers(0, V, (B, T)),) if with_target else ()
            token_BT = rng.integers(0, V, (B, T))
            return Case(
                name,
                (token_BT, *target, params, cfg, noise),
                kwargs,
                constant=frozenset({"noise"} if noise else ()),
            )

        noisy = case("noise, limits, a dense layer", NOISY_MIX)
        if with_target:  # what the model makes of its parts is checked without
            return [case("dense, tied", {"layers": 1}, smoothing=0.1), noisy]
        scaled = {"layers": 1, "causal": False, "embedding_scale": 0.5, "logit_scale": 3.0}
        return [
            case("dense, tied, scaled", scaled),
            noisy,
            case("untied, rotary, mean of the layers' losses", OPENMOE_STYLE),
        ]

    return build


CASES: dict[str, Callable[[Generator], list[Case]]] = {
    "rms_norm": _norm(bias=False),
    "layer_norm": _norm(bias=True),
    "normalize": _normalize,
    "rotary": _rotary,
    "sink_softmax": _sink_softmax,
    "soft_cap": _soft_cap,
    "qk_norm": _qk_norm,
    "scores": _scores,
    "attention": _attention,
    "block": _block,
    "model": _whole(with_target=False),
    "loss": _whole(with_target=True),
}
