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

from moe_numpy.classroom import cases_routing, cases_systems, cases_transformer
from moe_numpy.classroom.cases_routing import moe_config, plan_with_drops
from moe_numpy.classroom.contract import Case
from moe_numpy.classroom.sizes import B, C, E, F, K, N, V, chosen, generic
from moe_numpy.config import (
    ACTIVATIONS,
    GaussianNoise,
    InputJitter,
    LearnedNoise,
    branches,
)
from moe_numpy.moe import experts, mlp, router

OFFSETS = (0, 3, 3, 8, 9)  # nine rows for four experts; the second has none


def _x(*shape: int) -> Callable[[Generator], list[Case]]:
    return lambda rng: [Case("", (rng.normal(0.3, 1.5, shape),))]


def _linear(rng: Generator) -> list[Case]:
    x, w, b = rng.normal(size=(2, N, C)), rng.normal(size=(C, F)), rng.normal(size=F)
    return [Case("bias", (x, w, b)), Case("no bias", (x, w))]


def _embedding(rng: Generator) -> list[Case]:
    token_BT = np.array([[3, 1, 3, 0, 9], [9, 9, 2, 3, 1]])  # repeated, and some rows never read
    return [Case("", (token_BT, rng.normal(size=(V, C))))]


def _branches(count: int, spread: float = 1.0) -> Callable[[Generator], list[Case]]:
    return lambda rng: [Case("", tuple(rng.normal(0.0, spread, (count, N, F))))]


def _activate(rng: Generator) -> list[Case]:
    def case(kind: str) -> Case:
        return Case(kind, (kind, *rng.normal(size=(branches(kind), N, F))))

    return [case(kind) for kind in ACTIVATIONS]


def _cross_entropy(rng: Generator) -> list[Case]:
    logits_NV, target_N = rng.normal(0, 2, (N, V)), rng.integers(0, V, N)
    return [
        Case("", (logits_NV, target_N)),
        Case("smoothing", (logits_NV, target_N), {"smoothing": 0.2}),
    ]


def _router(rng: Generator) -> list[Case]:
    x_NC = rng.normal(size=(N, C))

    def case(name: str, noise_shape: tuple | None, **changes: Any) -> Case:
        cfg = moe_config(**changes)
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
    return [Case("", (rng.normal(size=(N, E)), chosen(rng)))]


def _renormalized_gate(rng: Generator) -> list[Case]:
    (args,) = (case.args for case in _gate(rng))
    kept_NK = rng.random((N, K)) < 0.7
    kept_NK[0], kept_NK[1] = False, (True, False)  # nothing left, and a lone survivor
    return [Case("all", args), Case("those that have a place", (*args, kept_NK))]


def _dispatch(rng: Generator) -> list[Case]:
    return [Case("drops", (rng.normal(size=(N, C)), plan_with_drops(rng)))]


def _combine(rng: Generator) -> list[Case]:
    plan = plan_with_drops(rng)
    rows = plan.offsets[-1]
    return [Case("drops", (rng.normal(size=(rows, C)), rng.normal(size=(N, K)), plan))]


def _grouped_linear(rng: Generator) -> list[Case]:
    return [Case("", (rng.normal(size=(9, C)), rng.normal(size=(E, C, F)), OFFSETS))]


def _grouped_bias(rng: Generator) -> list[Case]:
    return [Case("", (rng.normal(size=(9, F)), rng.normal(size=(E, F)), OFFSETS))]


def _expert_linear(rng: Generator) -> list[Case]:
    x_RC, w_ECF, b_EF = rng.normal(size=(9, C)), rng.normal(size=(E, C, F)), rng.normal(size=(E, F))
    return [
        Case("bias", (x_RC, w_ECF, b_EF, OFFSETS)),
        Case("no bias", (x_RC, w_ECF, None, OFFSETS)),
    ]


def _experts(rng: Generator) -> list[Case]:
    def case(name: str, kind: str, **changes: Any) -> Case:
        cfg = moe_config(activation=kind, **changes)
        params = generic(rng, experts.init_experts(rng, cfg, C, "float64"))
        return Case(name, (rng.normal(size=(9, C)), params, cfg, OFFSETS))

    kinds = ("gelu_tanh", "swiglu", "swiglu3")  # one, two and three maps; `activate` has them all
    biased = ("relu", "clamped_swiglu")
    return [
        *(case(kind, kind) for kind in kinds),
        *(case(f"{kind}, biases", kind, expert_bias=True) for kind in biased),
    ]


def _importance(rng: Generator) -> list[Case]:
    return [Case("", (rng.random((N, K)), chosen(rng), E))]


def _load(rng: Generator) -> list[Case]:
    clean_NE, noise_NE = rng.normal(size=(2, N, E))
    scale_NE = 0.3 + rng.random((N, E))
    return [Case("", (clean_NE, clean_NE + noise_NE * scale_NE, scale_NE, K))]


def _mlp(rng: Generator) -> list[Case]:
    def case(kind: str) -> Case:
        params = generic(rng, mlp.init_mlp(rng, C, F, kind, "float64", 2))
        return Case(kind, (rng.normal(size=(N, C)), params, kind))

    return [case(kind) for kind in ("gelu_tanh", "swiglu", "swiglu3")]


CASES: dict[str, Callable[[Generator], list[Case]]] = {
    "linear": _linear,
    "embedding": _embedding,
    "identity": _x(N, F),
    "relu": _x(N, F),
    "sigmoid": _x(N, F),
    "softplus": _x(N, F),
    "silu": _x(N, F),
    "gelu": _x(N, F),
    "gelu_tanh": _x(N, F),
    "swiglu": _branches(2),
    "geglu": _branches(2),
    "clamped_swiglu": _branches(2, spread=7.0),  # some of both lies beyond the bounds
    "swiglu3": _branches(3),
    "activate": _activate,
    "softmax": _x(B, N, E),
    "log_softmax": _x(N, V),
    "cross_entropy": _cross_entropy,
    "router": _router,
    "raw_gate": _gate,
    "renormalized_gate": _renormalized_gate,
    "dispatch": _dispatch,
    "combine": _combine,
    "grouped_linear": _grouped_linear,
    "padded_linear": _grouped_linear,
    "grouped_bias": _grouped_bias,
    "expert_linear": _expert_linear,
    "experts": _experts,
    "importance": _importance,
    "load": _load,
    "cv_squared": lambda rng: [Case("", (rng.random(E) + 0.1,))],
    "z_loss": _x(N, E),
    "mlp": _mlp,
}
CASES |= cases_routing.CASES | cases_systems.CASES | cases_transformer.CASES
