"""The hierarchy: a primary router chooses groups, a secondary one the experts within them.

Letters of this file: G groups of P experts each (E = G * P, group by group), S groups kept for
each token.
"""

from __future__ import annotations

from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, to_device, xp
from moe_numpy.config import InputJitter, LearnedNoise, MoEConfig
from moe_numpy.moe import capacity, hierarchy_balance, hierarchy_gates, report, router


class HierarchyParams(NamedTuple):
    """Two routers: of the groups (their E is G), and of all experts."""

    primary: router.RouterParams
    secondary: router.RouterParams


def init_hierarchy(rng: Generator, cfg: MoEConfig, width: int, dtype: str) -> HierarchyParams:
    """Draw small logit weights for both levels; the noise scales start at zero."""

    def draw(outputs: int) -> router.RouterParams:
        w = to_device(rng.normal(0.0, cfg.router_std, (width, outputs)), dtype)
        return router.RouterParams(w, xp.zeros_like(w) if learned else None)

    learned = isinstance(cfg.noise, LearnedNoise)
    return HierarchyParams(draw(cfg.selection.groups), draw(cfg.num_experts))


def hierarchical_route_forward(
    x_NC: Array,
    params: HierarchyParams,
    cfg: MoEConfig,
    noise: Array | None = None,
    reported: bool = True,
) -> tuple[Array, Array, capacity.Plan, report.MoEReport | None, Cache]:
    """Decide in two steps which experts see which tokens, and with which weight.

        both routers' logits -> groups, then experts in them -> places -> gates;  balance terms

    All experts have a probability too, the product of both levels' softmaxes. It ranks them for
    the places, and it is what the balance losses and the report look at.

    Shapes     x_NC (N, C); noise (N, E + G), the experts' columns before the groups', or (N, C)
               for jitter -> gate_NK (N, K), best group first; aux (); plan; report,
               None if not `reported`
    Cache      (cfg, both router caches, log-softmax, gate and balance caches)
    Source     Shazeer et al. 2017, appendix B; differs: one matrix holds the secondary routers of
               all groups, and every token passes through it
    """
    noise_1, noise_2 = _split(noise, cfg)
    *logits, cache_1 = router.router_forward(x_NC, params.primary, cfg, noise_1)  # 1. logits
    primary = hierarchy_balance.Level(*logits)
    *logits, cache_2 = router.router_forward(x_NC, params.secondary, cfg, noise_2)
    secondary = hierarchy_balance.Level(*logits)
    noisy = (primary.noisy_NE, secondary.noisy_NE)
    wished_NK = hierarchical_choice(*noisy, cfg.selection.kept, cfg.top_k)  # 2. choice
    log_NE, log_cache = hierarchy_gates.hierarchical_log_softmax_forward(*noisy)  # 3. probabilities
    prob_NE = xp.exp(log_NE)
    expert_NK, plan = capacity.make_plan(wished_NK, log_NE, prob_NE, cfg.capacity)
    gate_NK, gate_cache = hierarchy_gates.hierarchical_gate_forward(*noisy, expert_NK)  # 4. gates
    aux, balance_cache = hierarchy_balance.hierarchical_balance_forward(
        primary, secondary, log_NE, gate_NK, expert_NK, wished_NK, cfg
    )  # 5. balance
    facts = report.make_report(log_NE, prob_NE, wished_NK, plan) if reported else None
    cache = (cfg, cache_1, cache_2, log_cache, gate_cache, balance_cache)
    return gate_NK * cfg.gate_scale, aux, plan, facts, cache  # 6. scale


def hierarchical_route_backward(
    dgate_NK: Array, daux: Array, cache: Cache
) -> tuple[Array, HierarchyParams]:
    """Undo `hierarchical_route_forward`; who was chosen and who got a place are constants.

    Both routers read the token, and both levels' logits stand in every gate and every probability.

    Shapes     dgate_NK (N, K), daux () -> dx_NC (N, C), grads
    """
    cfg, cache_1, cache_2, log_cache, gate_cache, balance_cache = cache
    dgate_NK = dgate_NK * cfg.gate_scale  # 6.
    dprimary, dsecondary, dlog_NE, dgate_balance_NK = (
        hierarchy_balance.hierarchical_balance_backward(daux, balance_cache)
    )  # 5.
    dgates = hierarchy_gates.hierarchical_gate_backward(
        dgate_NK + dgate_balance_NK, gate_cache
    )  # 4.
    dlogs = hierarchy_gates.hierarchical_log_softmax_backward(dlog_NE, log_cache)  # 3.
    dlogits = [
        level._replace(noisy_NE=level.noisy_NE + dgate + dlog)
        for level, dgate, dlog in zip((dprimary, dsecondary), dgates, dlogs, strict=True)
    ]
    dx_1_NC, dparams_1 = router.router_backward(*dlogits[0], cache_1)  # 1.
    dx_2_NC, dparams_2 = router.router_backward(*dlogits[1], cache_2)
    return dx_1_NC + dx_2_NC, HierarchyParams(dparams_1, dparams_2)


def hierarchical_choice(logit_NG: Array, logit_NE: Array, kept: int, k: int) -> Array:
    """Choose the best groups, and in each the k / kept best experts; ties go to the lower index.

    A discrete decision: it has no gradient.

    Shapes     logit_NG (N, G), logit_NE (N, E) -> expert_NK (N, k) integers, group by group: all
               of the best group, best first, then those of the next
    """
    (N, G), each = logit_NG.shape, k // kept
    P = logit_NE.shape[1] // G
    group_NS = router.top_k(logit_NG, kept)  # 1. groups
    best = router.top_k(logit_NE.reshape(N * G, P), each)  # 2. the best of every group
    best = xp.take_along_axis(best.reshape(N, G, each), group_NS[:, :, None], 1)
    return (group_NS[:, :, None] * P + best).reshape(N, k)  # 3. numbered among all experts


def _split(noise: Array | None, cfg: MoEConfig) -> tuple[Array | None, Array | None]:
    """Hand the groups and the experts their noise; input jitter is the same for both."""
    if noise is None or isinstance(cfg.noise, InputJitter):
        return noise, noise
    return noise[:, cfg.num_experts :], noise[:, : cfg.num_experts]
