"""The zero-gradient audit: which loss teaches which parameters, for four ways to gate.

One layer with learned noise meets one batch. Each loss term is sent backward alone, with weight
one, and the norm of what arrives is noted for each group of parameters. Zeros are not errors of
the code: they are what the mathematics says, and some of them surprise.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from moe_numpy import tree
from moe_numpy.config import (
    ImportanceLoss,
    LearnedNoise,
    LoadLoss,
    MoEConfig,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe import balance, layer, router

GATES = ("renormalized top-1", "raw top-1", "renormalized top-2", "all experts")
TERMS = ("task", "Switch loss", "importance CV²", "load CV²", "z-loss")
GROUPS = ("router\nweights", "noise\nweights", "experts\nin", "experts\nout")
KINDS = dict(zip(TERMS[1:], (SwitchLoss, ImportanceLoss, LoadLoss, ZLoss), strict=True))


class Batch(NamedTuple):
    """What every cell of the audit shares: tokens, targets, parameters, and one draw of noise."""

    x_NC: np.ndarray
    target_NC: np.ndarray
    params: layer.MoEParams
    noise_NE: np.ndarray


class Audit(NamedTuple):
    """What arrived where.

    norm      array (gates, terms, groups): Euclidean norm of the gradient; NaN where the term
              is not defined
    refused   array (gates, terms) of booleans: the configuration refuses this pairing
    """

    norm: np.ndarray
    refused: np.ndarray


def audit(seed: int = 0, tokens: int = 64, width: int = 8, num_experts: int = 4) -> Audit:
    """Send every loss term backward through every kind of gate.

    The layer refuses two pairings. The importance of renormalized top-1 gates would have no effect;
    it is computed from its pairs all the same, to show the zero. The load of all experts is not
    defined: there is no expert left that could be the first one out.

    Parameters
    ----------
    seed : of tokens, targets, parameters and noise.
    tokens, width, num_experts : sizes of the batch and the layer.

    Returns
    -------
    Audit
        In the order of `GATES`, `TERMS` and `GROUPS`.
    """
    batch = draw_batch(np.random.default_rng(seed), tokens, width, num_experts)
    norm = np.full((len(GATES), len(TERMS), len(GROUPS)), np.nan)
    refused = np.zeros((len(GATES), len(TERMS)), bool)
    for g, gate in enumerate(GATES):
        moe = gate_config(gate, num_experts)
        for t, term in enumerate(TERMS):
            refused[g, t] = is_refused(moe, term)
            if not refused[g, t]:
                norm[g, t] = norms(gradients(batch, moe, term))
            elif term == "importance CV²":
                nothing = tree.map(np.zeros_like, batch.params.experts)  # not on this road
                norm[g, t] = norms(layer.MoEParams(importance_gradients(batch, moe), nothing))
    return Audit(norm, refused)


def gate_config(gate: str, num_experts: int) -> MoEConfig:
    """Build the layer that a name of `GATES` stands for, without any balance term."""
    top_k = {"renormalized top-2": 2, "all experts": num_experts}.get(gate, 1)
    weights = "raw" if gate == "raw top-1" else "renormalized"
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        hidden=6,
        gate_weights=weights,
        noise=LearnedNoise(),
    )


def draw_batch(rng: np.random.Generator, tokens: int, width: int, num_experts: int) -> Batch:
    """Draw generic numbers: nothing is zero or equal by accident of initialization."""
    moe = gate_config("raw top-1", num_experts)
    drawn = layer.init_moe(rng, moe, width, "float64")
    params = tree.map(lambda leaf: rng.normal(0.0, 0.5, leaf.shape), drawn)
    x_NC, target_NC = rng.standard_normal((2, tokens, width))
    return Batch(x_NC, target_NC, params, rng.standard_normal((tokens, num_experts)))


def is_refused(moe: MoEConfig, term: str) -> bool:
    """Ask the configuration whether it takes this balance term."""
    try:
        _with_term(moe, term)
    except ValueError:
        return True
    return False


def gradients(batch: Batch, moe: MoEConfig, term: str) -> layer.MoEParams:
    """Send one term backward through the whole layer.

    The task is the mean squared error mean((y - target)^2).
    """
    cfg = _with_term(moe, term)
    y_NC, _, _, cache = layer.moe_forward(batch.x_NC, batch.params, cfg, batch.noise_NE)
    if term == "task":
        dy_NC, daux = 2 * (y_NC - batch.target_NC) / y_NC.size, 0.0
    else:
        dy_NC, daux = np.zeros_like(y_NC), 1.0
    return layer.moe_backward(dy_NC, np.float64(daux), cache)[1]


def importance_gradients(batch: Batch, moe: MoEConfig) -> router.RouterParams:
    """Send the importance backward through renormalized gates, from the pairs themselves."""
    _, noisy_NE, _, router_cache = router.router_forward(
        batch.x_NC, batch.params.router, moe, batch.noise_NE
    )
    expert_NK = router.top_k(noisy_NE, moe.top_k)
    gate_NK, gate_cache = router.renormalized_gate_forward(noisy_NE, expert_NK)
    importance_E, sum_cache = balance.importance_forward(gate_NK, expert_NK, moe.num_experts)
    _, cv_cache = balance.cv_squared_forward(importance_E)
    dimportance_E = balance.cv_squared_backward(np.float64(1.0), cv_cache)
    dgate_NK = balance.importance_backward(dimportance_E, sum_cache)
    dnoisy_NE = router.renormalized_gate_backward(dgate_NK, gate_cache)
    return router.router_backward(None, dnoisy_NE, None, router_cache)[1]


def norms(grads: layer.MoEParams) -> list[float]:
    """Compute the Euclidean norm of each of `GROUPS`."""
    parts = (grads.router.w_CE, grads.router.noise_CE, grads.experts.in_ECF, grads.experts.out_EFC)
    return [float(np.linalg.norm(part)) for part in parts]


def _with_term(moe: MoEConfig, term: str) -> MoEConfig:
    terms = () if term == "task" else (KINDS[term](weight=1.0),)
    return dataclasses.replace(moe, balance=terms)
