"""The arguments at which every pair is checked: one builder for each name in the registry.

Sizes are small and differ from axis to axis, parameters are generic (no gain is one, no bias zero),
and among the cases are noise, dropped choices, tokens moved to their next best expert, experts
without a token, and optional parameters left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator

from moe_numpy import tree
from moe_numpy.classroom.gradcheck import Case
from moe_numpy.config import (
    ACTIVATIONS,
    GATED,
    Capacity,
    GaussianNoise,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    ModelConfig,
    MoEConfig,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe import capacity, experts, layer, router
from moe_numpy.transformer import attention, block, mlp, model

N, C, E, F, K, V = 7, 5, 4, 3, 2, 11
B, T = 2, 5
OFFSETS = (0, 3, 3, 8, 9)  # nine rows for four experts; the second has none
ALL_TERMS = (SwitchLoss(weight=0.7), ImportanceLoss(weight=0.3), LoadLoss(weight=0.5), ZLoss())


def generic(rng: Generator, params: tree.Tree, spread: float = 0.6) -> tree.Tree:
    """Replace every number of a tree by a random one."""
    return tree.map(lambda leaf: rng.normal(0.2, spread, leaf.shape), params)


def _x(*shape: int) -> Callable[[Generator], list[Case]]:
    return lambda rng: [Case("", (rng.normal(0.3, 1.5, shape),))]


def _chosen(rng: Generator, tokens: int = N) -> np.ndarray:
    return np.stack([rng.permutation(E)[:K] for _ in range(tokens)])


def _linear(rng: Generator) -> list[Case]:
    x, w, b = rng.normal(size=(2, N, C)), rng.normal(size=(C, F)), rng.normal(size=F)
    return [Case("bias", (x, w, b)), Case("no bias", (x, w))]


def _embedding(rng: Generator) -> list[Case]:
    token_BT = np.array([[3, 1, 3, 0, 9], [9, 9, 2, 3, 1]])  # repeated, and some rows never read
    return [Case("", (token_BT, rng.normal(size=(V, C))))]


def _gated(rng: Generator) -> list[Case]:
    return [Case("", (rng.normal(size=(N, F)), rng.normal(size=(N, F))))]


def _activate(rng: Generator) -> list[Case]:
    def arguments(kind: str) -> tuple:
        up = (rng.normal(size=(N, F)),) if kind in GATED else ()
        return (kind, rng.normal(size=(N, F)), *up)

    return [Case(kind, arguments(kind)) for kind in ACTIVATIONS]


def _norm(bias: bool) -> Callable[[Generator], list[Case]]:
    def build(rng: Generator) -> list[Case]:
        extra = (rng.normal(size=C),) if bias else ()
        return [Case("", (rng.normal(1.0, 2.0, (B, N, C)), rng.normal(1, 1, C), *extra))]

    return build


def _normalize(rng: Generator) -> list[Case]:
    x = rng.normal(1.0, 2.0, (N, C))
    gain, bias = rng.normal(1, 1, C), rng.normal(size=C)
    return [
        Case("layer norm", (x, block.NormParams(gain, bias))),
        Case("RMS norm", (x, block.NormParams(gain, None))),
    ]


def _rotary(rng: Generator) -> list[Case]:
    return [Case("", (rng.normal(size=(B, 3, T, 6)), np.arange(2, 2 + T)))]


def _cross_entropy(rng: Generator) -> list[Case]:
    logits_NV, target_N = rng.normal(0, 2, (N, V)), rng.integers(0, V, N)
    return [
        Case("", (logits_NV, target_N)),
        Case("smoothing", (logits_NV, target_N), {"smoothing": 0.2}),
    ]


def _moe_config(**changes: Any) -> MoEConfig:
    return MoEConfig(**{"num_experts": E, "top_k": K, "hidden": F} | changes)


def _router(rng: Generator) -> list[Case]:
    x_NC = rng.normal(size=(N, C))

    def case(name: str, noise_shape: tuple | None, **changes: Any) -> Case:
        cfg = _moe_config(**changes)
        params = generic(rng, router.init_router(rng, cfg, C, "float64"))
        noise = None if noise_shape is None else rng.normal(size=noise_shape)
        constant = frozenset({"noise"} if noise_shape else ())
        zero = frozenset({"params.bias_E"} if cfg.bias_rate else ())
        if noise is None and params.noise_CE is not None:
            zero |= {"params.noise_CE"}
        return Case(name, (x_NC, params, cfg, noise), zero=zero, constant=constant)

    return [
        case("clean", None),
        case("learned noise", (N, E), noise=LearnedNoise()),
        case("learned noise, at evaluation", None, noise=LearnedNoise()),
        case("fixed noise and bias", (N, E), noise=GaussianNoise(std=0.7), bias_rate=0.1),
        case("jitter", (N, C), noise=InputJitter(eps=0.3)),
    ]


def _gate(rng: Generator) -> list[Case]:
    return [Case("", (rng.normal(size=(N, E)), _chosen(rng)))]


def _plan(rng: Generator) -> capacity.Plan:
    """Draw a plan with dropped choices and an expert without a row."""
    score_NE = rng.normal(size=(N, E)) - np.array([0, 9, 0, 0])
    expert_NK = router.top_k(score_NE, K)
    limits = Capacity(factor=0.8)
    return capacity.make_plan(expert_NK, score_NE, score_NE, limits)[1]


def _dispatch(rng: Generator) -> list[Case]:
    return [Case("drops", (rng.normal(size=(N, C)), _plan(rng)))]


def _combine(rng: Generator) -> list[Case]:
    plan = _plan(rng)
    rows = plan.offsets[-1]
    return [Case("drops", (rng.normal(size=(rows, C)), rng.normal(size=(N, K)), plan))]


def _grouped_linear(rng: Generator) -> list[Case]:
    return [Case("", (rng.normal(size=(9, C)), rng.normal(size=(E, C, F)), OFFSETS))]


def _experts(rng: Generator) -> list[Case]:
    def case(kind: str) -> Case:
        cfg = _moe_config(activation=kind)
        params = generic(rng, experts.init_experts(rng, cfg, C, "float64"))
        return Case(kind, (rng.normal(size=(9, C)), params, cfg, OFFSETS))

    return [case(kind) for kind in ACTIVATIONS]


def _switch_loss(rng: Generator) -> list[Case]:
    return [Case("", (rng.random((N, E)), _chosen(rng)))]


def _importance(rng: Generator) -> list[Case]:
    return [Case("", (rng.random((N, K)), _chosen(rng), E))]


def _load(rng: Generator) -> list[Case]:
    clean_NE, noise_NE = rng.normal(size=(2, N, E))
    scale_NE = 0.3 + rng.random((N, E))
    return [Case("", (clean_NE, clean_NE + noise_NE * scale_NE, scale_NE, K))]


def _balance(rng: Generator) -> list[Case]:
    clean_NE, noise_NE = rng.normal(size=(2, N, E))
    scale_NE, prob_NE, gate_NK = rng.random((N, E)) + 0.3, rng.random((N, E)), rng.random((N, K))
    args = (clean_NE, clean_NE + noise_NE * scale_NE, scale_NE, prob_NE, gate_NK)
    cfg = _moe_config(noise=LearnedNoise(), balance=ALL_TERMS)
    return [Case("all terms", (*args, _chosen(rng), _chosen(rng), cfg))]


def _moe(rng: Generator) -> list[Case]:
    def case(name: str, noise_shape: tuple | None = None, **changes: Any) -> Case:
        cfg = _moe_config(**changes)
        params = generic(rng, layer.init_moe(rng, cfg, C, "float64"))
        noise = None if noise_shape is None else rng.normal(size=noise_shape)
        zero = {"params.router.bias_E"} if cfg.bias_rate else set()
        if name == "renormalized top-1":
            zero |= {"params.router.w_CE"}
        return Case(
            name,
            (rng.normal(size=(N, C)), params, cfg, noise),
            zero=frozenset(zero),
            constant=frozenset({"noise"} if noise_shape else ()),
        )

    tight = {"factor": 0.7}
    return [
        case("top-1, raw", top_k=1, balance=(SwitchLoss(weight=1.0),)),
        case("renormalized top-1", top_k=1, gate_weights="renormalized"),
        case("top-2, renormalized, gated", activation="swiglu", balance=(ZLoss(weight=1.0),)),
        case("all experts", top_k=E, gate_weights="raw", balance=(ZLoss(weight=1.0),)),
        case(
            "learned noise, all terms, drops",
            (N, E),
            noise=LearnedNoise(),
            balance=ALL_TERMS,
            capacity=Capacity(**tight),
        ),
        case(
            "fixed noise, bias, next best",
            (N, E),
            gate_weights="raw",
            noise=GaussianNoise(std=0.8),
            balance=(SwitchLoss(weight=0.7), ImportanceLoss(weight=0.3)),
            bias_rate=0.1,
            bias_with_loss=True,
            capacity=Capacity(overflow="next_best", priority="choice"),
        ),
        case("fixed noise, load", (N, E), noise=GaussianNoise(std=0.8), balance=(LoadLoss(),)),
        case(
            "jitter, next best by score",
            (N, C),
            noise=InputJitter(eps=0.3),
            balance=(SwitchLoss(weight=1.0),),
            capacity=Capacity(overflow="next_best", priority="score"),
        ),
    ]


def _model_config(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": V, "context": T + 1, "layers": 2, "width": 8, "heads": 4}
    return ModelConfig(**sizes | {"hidden": 6} | changes)


MIXTRAL_STYLE = {
    "kv_heads": 2,
    "hidden": None,
    "norm": "rmsnorm",
    "positions": "rotary",
    "tied": False,
    "moe": _moe_config(activation="swiglu", balance=(SwitchLoss(weight=0.5),)),
}
NOISY_MIX = {  # a dense layer, then a MoE layer with noise and limits
    "moe_layers": (1,),
    "moe": _moe_config(
        noise=LearnedNoise(),
        balance=ALL_TERMS,
        capacity=Capacity(factor=0.9, overflow="next_best"),
    ),
}


def _scores(rng: Generator) -> list[Case]:
    q_BHTD, k_BHSD = rng.normal(size=(B, 3, T, 2)), rng.normal(size=(B, 3, T + 2, 2))
    square = Case("all positions", (q_BHTD, k_BHSD[:, :, :T]))
    return [square, Case("after two earlier positions", (q_BHTD, k_BHSD))]


def _attention(rng: Generator) -> list[Case]:
    def case(name: str, **changes: Any) -> Case:
        cfg = _model_config(**changes)
        params = generic(rng, attention.init_attention(rng, cfg, "float64"))
        return Case(name, (rng.normal(size=(B, T, cfg.width)), params, cfg))

    return [case("learned positions"), case("rotary, grouped", kv_heads=2, positions="rotary")]


def _mlp(rng: Generator) -> list[Case]:
    def case(kind: str) -> Case:
        cfg = _model_config(activation=kind)
        params = generic(rng, mlp.init_mlp(rng, cfg, "float64"))
        return Case(kind, (rng.normal(size=(N, cfg.width)), params, kind))

    return [case("gelu_tanh"), case("swiglu")]


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

    return [case("dense"), case("Mixtral style", **MIXTRAL_STYLE), case("noisy", **NOISY_MIX)]


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

        smoothing = {"smoothing": 0.1} if with_target else {}
        return [
            case("dense, tied", {}, **smoothing),
            case("Mixtral style", MIXTRAL_STYLE),
            case("noise, limits, a dense layer", NOISY_MIX),
        ]

    return build


CASES: dict[str, Callable[[Generator], list[Case]]] = {
    "linear": _linear,
    "embedding": _embedding,
    "relu": _x(N, F),
    "sigmoid": _x(N, F),
    "softplus": _x(N, F),
    "silu": _x(N, F),
    "gelu": _x(N, F),
    "gelu_tanh": _x(N, F),
    "swiglu": _gated,
    "geglu": _gated,
    "activate": _activate,
    "softmax": _x(B, N, E),
    "log_softmax": _x(N, V),
    "rms_norm": _norm(bias=False),
    "layer_norm": _norm(bias=True),
    "normalize": _normalize,
    "rotary": _rotary,
    "cross_entropy": _cross_entropy,
    "router": _router,
    "raw_gate": _gate,
    "renormalized_gate": _gate,
    "dispatch": _dispatch,
    "combine": _combine,
    "grouped_linear": _grouped_linear,
    "padded_linear": _grouped_linear,
    "experts": _experts,
    "switch_loss": _switch_loss,
    "importance": _importance,
    "load": _load,
    "cv_squared": lambda rng: [Case("", (rng.random(E) + 0.1,))],
    "z_loss": _x(N, E),
    "balance": _balance,
    "moe": _moe,
    "scores": _scores,
    "attention": _attention,
    "mlp": _mlp,
    "block": _block,
    "model": _whole(with_target=False),
    "loss": _whole(with_target=True),
}
