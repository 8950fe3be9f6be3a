"""The arguments at which scores, gates, routing and the whole MoE layer are checked.

E experts with noise, drops, rerouting, experts without a token, ties broken by the numbers drawn,
and every selection that goes through `routing.route_forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator

from moe_numpy.classroom.contract import Case
from moe_numpy.classroom.sizes import C, E, F, K, N, chosen, generic
from moe_numpy.config import (
    SCORES,
    WEIGHTS,
    Assignment,
    Capacity,
    ExpertChoice,
    GaussianNoise,
    GroupLimited,
    Hierarchy,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    MoEConfig,
    SecondExpert,
    Shared,
    Sinkhorn,
    SoftSlots,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe import capacity, layer, router

ALL_TERMS = (SwitchLoss(weight=0.7), ImportanceLoss(weight=0.3), LoadLoss(weight=0.5), ZLoss())
TIGHT = Capacity(factor=0.7)


def moe_config(**changes: Any) -> MoEConfig:
    """Configure a layer of the shared sizes."""
    return MoEConfig(**{"num_experts": E, "top_k": K, "hidden": F} | changes)


def plan_with_drops(rng: Generator) -> capacity.Plan:
    """Draw a plan with dropped choices and an expert without a row."""
    score_NE = rng.normal(size=(N, E)) - np.array([0, 9, 0, 0])
    expert_NK = router.top_k(score_NE, K)
    return capacity.make_plan(expert_NK, score_NE, score_NE, Capacity(factor=0.8))[1]


def _score(rng: Generator) -> list[Case]:
    return [Case(kind, (kind, rng.normal(0, 2, (N, E)))) for kind in SCORES]


def _share(rng: Generator) -> list[Case]:
    return [Case("", (rng.random((N, E)) + 0.1,))]


def _share_gate(rng: Generator) -> list[Case]:
    args = (rng.random((N, E)) + 0.1, chosen(rng))
    kept_NK = rng.random((N, K)) < 0.7
    kept_NK[0], kept_NK[1] = False, (True, False)  # nothing left, and a lone survivor
    return [Case("all", args), Case("those that have a place", (*args, kept_NK))]


def _gates(rng: Generator) -> list[Case]:
    def case(score: str, weights: str) -> Case:
        limit = TIGHT if weights == "renormalized_kept" else None
        cfg = moe_config(score=score, gate_weights=weights, gate_scale=1.7, capacity=limit)
        kept_NK = rng.random((N, K)) < 0.8
        kept_NK[0], kept_NK[1] = False, (True, False)  # nothing left, and a lone survivor
        args = (rng.random((N, E)) + 0.1, chosen(rng), kept_NK, cfg)
        return Case(f"{score}, {weights}", args)

    return [case(score, weights) for score in SCORES for weights in WEIGHTS]


def _switch_loss(rng: Generator) -> list[Case]:
    args = (rng.random((N, E)), chosen(rng))
    return [
        Case("one group", args),
        Case("groups, the last smaller", args, {"divide": False, "group": 3}),
    ]


def _balance(rng: Generator) -> list[Case]:
    def case(name: str, *balance: Any) -> Case:
        clean_NE, noise_NE = rng.normal(size=(2, N, E))
        scale_NE, prob_NE = rng.random((2, N, E)) + 0.3
        noisy_NE, gate_NK = clean_NE + noise_NE * scale_NE, rng.random((N, K))
        cfg = moe_config(noise=LearnedNoise(), balance=balance)
        args = (clean_NE, noisy_NE, scale_NE, prob_NE, gate_NK, chosen(rng), chosen(rng))
        terms = {type(term) for term in balance}
        zero = set()
        if LoadLoss not in terms:
            zero |= {"scale_NE", "noisy_NE", "gate_NK"}
        return Case(
            name,
            (*args, noisy_NE.copy(), cfg),
            zero=frozenset(zero),
            constant=frozenset({"rank_NE"}),
        )

    candidates = SwitchLoss(weight=0.6, counted=3, divide=False, group=4)
    return [
        case("all terms", *ALL_TERMS),
        case("candidates, probabilities", candidates, ImportanceLoss(of="probabilities")),
    ]


def _gated_dispatch(rng: Generator) -> list[Case]:
    plan = plan_with_drops(rng)
    return [Case("drops", (rng.normal(size=(N, C)), rng.normal(size=(N, K)), plan))]


LAYERS: dict[str, dict[str, Any]] = {
    "top-1, raw": {"top_k": 1, "balance": (SwitchLoss(weight=1.0),)},
    "renormalized top-1": {"top_k": 1, "gate_weights": "renormalized"},
    "top-2, renormalized, gated": {"activation": "swiglu", "balance": (ZLoss(weight=1.0),)},
    "all experts": {"top_k": E, "gate_weights": "raw", "balance": (ZLoss(weight=1.0),)},
    "learned noise, all terms, drops": {
        "noise": LearnedNoise(),
        "balance": ALL_TERMS,
        "capacity": TIGHT,
    },
    "fixed noise, bias, next best": {
        "gate_weights": "raw",
        "noise": GaussianNoise(std=0.8),
        "balance": (SwitchLoss(weight=0.7), ImportanceLoss(weight=0.3)),
        "bias_rate": 0.1,
        "bias_with_loss": True,
        "capacity": Capacity(overflow="next_best", priority="choice"),
    },
    "fixed noise, load": {"noise": GaussianNoise(std=0.8), "balance": (LoadLoss(),)},
    "jitter, next best by score": {
        "noise": InputJitter(eps=0.3),
        "balance": (SwitchLoss(weight=1.0),),
        "capacity": Capacity(overflow="next_best", priority="score"),
    },
    "learned biases": {"router_bias": True, "expert_bias": True, "activation": "clamped_swiglu"},
    "sigmoid, bias rule, groups, shared": {
        "score": "sigmoid",
        "selection": GroupLimited(groups=2, kept=1),
        "gate_scale": 2.5,
        "bias_rate": 0.1,
        "balance": (SwitchLoss(weight=0.5, group=3),),
        "shared": Shared(hidden=2),
    },
    "sqrt softplus, gated shared expert": {
        "score": "sqrt_softplus",
        "shared": Shared(hidden=2, gated=True),
        "balance": (SwitchLoss(weight=0.5),),
    },
    "sigmoid on the input": {"top_k": 1, "score": "sigmoid", "gate_on": "input"},
    "softmax on the input, drops": {"gate_on": "input", "capacity": TIGHT},
    "second expert drawn, places in groups": {
        "selection": SecondExpert(),
        "balance": (SwitchLoss(weight=1.0, counted=1, group=4),),
        "capacity": Capacity(factor=1.0, priority="choice", group=4),
    },
    "second expert by threshold, noise": {
        "selection": SecondExpert(policy="threshold", threshold=0.3),
        "gate_weights": "renormalized_kept",
        "noise": GaussianNoise(std=0.8),
    },
    "drop, then renormalize": {"gate_weights": "renormalized_kept", "capacity": TIGHT},
    "balanced assignment": {"top_k": 1, "selection": Assignment(), "score": "sigmoid"},
    "Sinkhorn": {"selection": Sinkhorn(), "gate_weights": "raw", "balance": (ZLoss(),)},
    "expert choice": {"selection": ExpertChoice(), "balance": (ZLoss(weight=1.0),)},
    "expert choice, renormalized": {
        "selection": ExpertChoice(),
        "gate_weights": "renormalized_kept",
    },
    "hierarchy, noise, all terms, next best, shared": {
        "num_experts": 6,
        "selection": Hierarchy(groups=3, kept=2),
        "noise": LearnedNoise(),
        "balance": (SwitchLoss(), ImportanceLoss(), ZLoss()),
        "capacity": Capacity(factor=0.8, overflow="next_best"),
        "shared": Shared(hidden=2),
        "gate_scale": 1.5,
    },
    "soft slots": {"top_k": E, "selection": SoftSlots(slots=2), "shared": Shared(hidden=2)},
    "probabilities balanced": {
        "noise": GaussianNoise(std=0.8),
        "gate_weights": "raw",
        "balance": (ImportanceLoss(of="probabilities"), LoadLoss()),
    },
}


ROUTES = {  # whose experts are nothing new: checked without them
    "all experts",
    "learned noise, all terms, drops",  # and with them
    "fixed noise, load",
    "jitter, next best by score",
    "second expert drawn, places in groups",
    "second expert by threshold, noise",
    "drop, then renormalize",
    "balanced assignment",
    "Sinkhorn",
    "expert choice, renormalized",
    "probabilities balanced",
}
LAYER_TOO = {"learned noise, all terms, drops"}


def _cases(whole: bool) -> Callable[[Generator], list[Case]]:
    """Build the cases of the whole layer, or of its routing by tokens alone."""
    prefix = "params.router" if whole else "params"
    here = (LAYERS.keys() - ROUTES) | LAYER_TOO if whole else ROUTES

    def build(rng: Generator) -> list[Case]:
        found = []
        for name, changes in LAYERS.items():
            cfg = moe_config(**changes)
            if name not in here:
                continue
            params = generic(rng, layer.init_moe(rng, cfg, C, "float64"))
            noise = router.draw_noise(rng, cfg, N, C, "float64")
            zero = {f"{prefix}.bias_E"} if cfg.bias_rate else set()
            if name == "renormalized top-1":  # its gates are all 1
                zero.add(f"{prefix}.w_CE")
            args = (rng.normal(size=(N, C)), params if whole else params.router, cfg, noise)
            constant = frozenset({"noise"} if noise is not None else ())
            found.append(Case(name, args, zero=frozenset(zero), constant=constant))
        return found

    return build


CASES: dict[str, Callable[[Generator], list[Case]]] = {
    "sqrt_softplus": lambda rng: [Case("", (rng.normal(0, 2, (N, F)),))],
    "score": _score,
    "share": _share,
    "share_gate": _share_gate,
    "gates": _gates,
    "switch_loss": _switch_loss,
    "balance": _balance,
    "gated_dispatch": _gated_dispatch,
    "route": _cases(whole=False),
    "moe": _cases(whole=True),
}
