"""Arguments for the pairs of whole routing families: hierarchy, soft slots, shared expert, 1991."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator

from moe_numpy.classroom.cases_routing import ALL_TERMS
from moe_numpy.classroom.contract import Case
from moe_numpy.classroom.sizes import C, E, F, N, V, generic
from moe_numpy.config import (
    Capacity,
    GaussianNoise,
    Hierarchy,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    MoEConfig,
    Shared,
    SoftSlots,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe import hierarchy, hierarchy_balance, jacobs, shared, soft

O = 2
G, P = 3, 4  # groups of a hierarchy, experts of a group
KEPT, EACH = 2, 2  # groups kept for a token, experts chosen in each
LEAVES, CHOICES = G * P, KEPT * EACH


# --------------------------------------------------------------------------------------- hierarchy
def _tree_config(**changes: Any) -> MoEConfig:
    sizes = {"num_experts": LEAVES, "top_k": CHOICES, "hidden": F}
    return MoEConfig(**sizes | {"selection": Hierarchy(groups=G, kept=KEPT)} | changes)


def _levels(
    rng: Generator, shunned: bool = False
) -> tuple[hierarchy_balance.Level, hierarchy_balance.Level]:
    """Draw what both routers say; `shunned`: the noise keeps all from group 1 and expert 2."""
    clean_NG, clean_NE = rng.normal(size=(N, G)), rng.normal(size=(N, LEAVES))
    scale_NG, scale_NE = 0.3 + rng.random((N, G)), 0.3 + rng.random((N, LEAVES))
    noisy_NG = clean_NG + scale_NG * rng.normal(size=(N, G))
    noisy_NE = clean_NE + scale_NE * rng.normal(size=(N, LEAVES))
    if shunned:
        noisy_NG[:, 1] = noisy_NG.min(1) - 0.2
        noisy_NE[:, 2] = noisy_NE.min(1) - 0.2
    return (
        hierarchy_balance.Level(clean_NG, noisy_NG, scale_NG),
        hierarchy_balance.Level(clean_NE, noisy_NE, scale_NE),
    )


def _log_softmax(rng: Generator) -> list[Case]:
    return [Case("", (rng.normal(size=(N, G)), rng.normal(size=(N, LEAVES))))]


def _gate(rng: Generator) -> list[Case]:
    logit_NG, logit_NE = rng.normal(size=(N, G)), rng.normal(size=(N, LEAVES))
    chosen_NK = hierarchy.hierarchical_choice(logit_NG, logit_NE, KEPT, CHOICES)
    anywhere_NK = np.stack([rng.permutation(LEAVES)[:CHOICES] for _ in range(N)])
    one_group_NK = np.stack([P + rng.permutation(P)[:CHOICES] for _ in range(N)])
    return [
        Case("as chosen", (logit_NG, logit_NE, chosen_NK)),
        Case("moved anywhere", (logit_NG, logit_NE, anywhere_NK)),
        Case(
            "one group: its gate is 1",
            (logit_NG, logit_NE, one_group_NK),
            zero=frozenset({"logit_NG"}),
        ),
    ]


def _load(rng: Generator) -> list[Case]:
    return [
        Case("", (*_levels(rng), KEPT, EACH)),
        Case("a group and an expert without tokens", (*_levels(rng, shunned=True), KEPT, EACH)),
    ]


def _balance(rng: Generator) -> list[Case]:
    def case(name: str, terms: tuple, zero: set[str], noisy: bool = True) -> Case:
        levels = _levels(rng)
        if not noisy:
            levels = [level._replace(scale_NE=None) for level in levels]
        chosen = [np.stack([rng.permutation(LEAVES)[:CHOICES] for _ in range(N)]) for _ in range(2)]
        log_NE, gate_NK = -rng.random((N, LEAVES)), rng.random((N, CHOICES))
        noise = LearnedNoise() if noisy else None
        cfg = _tree_config(noise=noise, balance=terms)
        return Case(name, (*levels, log_NE, gate_NK, *chosen, cfg), zero=frozenset(zero))

    first = SwitchLoss(weight=0.7, counted=1, divide=False, group=3)
    clean = ImportanceLoss(weight=0.3, of="probabilities")
    noisy = {"primary.noisy_NE", "secondary.noisy_NE"}
    return [
        case("all terms", ALL_TERMS, set()),
        case(
            "first choices in groups, clean probabilities",
            (first, clean, ZLoss(weight=0.4)),
            {*noisy, "gate_NK"},
            noisy=False,
        ),
    ]


def _route(rng: Generator) -> list[Case]:
    def case(name: str, columns: int | None = None, **changes: Any) -> Case:
        cfg = _tree_config(**changes)
        params = generic(rng, hierarchy.init_hierarchy(rng, cfg, C, "float64"))
        noise = None if columns is None else rng.normal(size=(N, columns))
        zero = set()
        if columns is None and cfg.noise is not None:
            zero = {"params.primary.noise_CE", "params.secondary.noise_CE"}
        constant = frozenset() if columns is None else frozenset({"noise"})
        x_NC = rng.normal(size=(N, C))
        return Case(name, (x_NC, params, cfg, noise), zero=frozenset(zero), constant=constant)

    learned = {"noise": LearnedNoise(), "balance": ALL_TERMS}
    one = {"top_k": 2, "balance": (ImportanceLoss(of="probabilities"), ZLoss(weight=0.3))}
    return [
        case(
            "learned noise, all terms, scaled, drops",
            LEAVES + G,
            gate_scale=2.5,
            capacity=Capacity(factor=0.7),
            **learned,
        ),
        case("learned noise, at evaluation", **learned),
        case(
            "fixed noise, next best by score",
            LEAVES + G,
            noise=GaussianNoise(std=0.8),
            capacity=Capacity(factor=1.0, overflow="next_best", priority="score"),
            balance=(LoadLoss(weight=0.5), SwitchLoss(weight=1.0, counted=1)),
        ),
        case("jitter, one expert in each group", C, noise=InputJitter(eps=0.3), **one),
    ]


# --------------------------------------------------------------------------- soft slots and shared
def _soft_slots(rng: Generator) -> list[Case]:
    def case(name: str, slots: int) -> Case:
        cfg = MoEConfig(num_experts=E, top_k=E, hidden=F, selection=SoftSlots(slots=slots))
        params = generic(rng, soft.init_soft(rng, cfg, C, "float64"))
        return Case(name, (rng.normal(size=(N, C)), params._replace(scale=np.array(1.7))))

    return [case("one slot", 1), case("two slots", 2)]


def _shared(rng: Generator) -> list[Case]:
    def case(kind: str, gated: bool) -> Case:
        cfg = _tree_config(activation=kind, shared=Shared(hidden=F + 1, gated=gated))
        params = generic(rng, shared.init_shared(rng, cfg, C, "float64"))
        name = f"{kind}, gated" if gated else kind
        return Case(name, (rng.normal(size=(N, C)), params, cfg))

    return [case("gelu_tanh", False), *(case(kind, True) for kind in ("relu", "swiglu3"))]


# -------------------------------------------------------------------------------------------- 1991
def _answers(rng: Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    prob_NE = rng.dirichlet(np.full(E, 4.0), N)
    return prob_NE, rng.normal(size=(N, E, O)), rng.normal(size=(N, O))


def _error(rng: Generator) -> list[Case]:
    prob_NE, y_NEO, target_NO = _answers(rng)
    return [
        Case("", (prob_NE, y_NEO, target_NO), constant=frozenset({"target_NO"})),
        Case("far off", (prob_NE, y_NEO + 60.0, target_NO), constant=frozenset({"target_NO"})),
    ]


def _classification(rng: Generator) -> list[Case]:
    prob_NE, logits_NEV = rng.dirichlet(np.full(E, 4.0), N), rng.normal(0, 2, (N, E, V))
    return [Case("", (prob_NE, logits_NEV, rng.integers(0, V, N)))]


def _log_mixture(rng: Generator) -> list[Case]:
    return [Case("", (rng.dirichlet(np.full(E, 4.0), N), -3.0 * rng.random((N, E))))]


def _jacobs(rng: Generator) -> list[Case]:
    params = generic(rng, jacobs.init_jacobs(rng, C, E, O, "float64"))
    return [Case("", (rng.normal(size=(N, C)), params))]


CASES: dict[str, Callable[[Generator], list[Case]]] = {
    "hierarchical_log_softmax": _log_softmax,
    "hierarchical_gate": _gate,
    "hierarchical_load": _load,
    "hierarchical_balance": _balance,
    "hierarchical_route": _route,
    "l2_normalize": lambda rng: [Case("", (rng.normal(0.3, 1.5, (N, C)),))],
    "soft_slots": _soft_slots,
    "shared": _shared,
    "jacobs": _jacobs,
    "cooperative_error": _error,
    "competitive_error": _error,
    "mixture_error": _error,
    "mixture_classification": _classification,
    "log_mixture": _log_mixture,
}
