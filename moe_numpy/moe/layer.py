"""The Mixture-of-Experts layer: all of it on one page.

A token's vector is scored by the router, its best k experts are chosen and given places, their MLPs
run on the rows that hold copies of the token, and the results come back weighted by the gates.
"""

from __future__ import annotations

from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache
from moe_numpy.config import MoEConfig
from moe_numpy.moe import balance, capacity, dispatch, experts, report, router
from moe_numpy.ops import softmax


class MoEParams(NamedTuple):
    """The parameters of one MoE layer."""

    router: router.RouterParams
    experts: experts.ExpertParams


def init_moe(rng: Generator, cfg: MoEConfig, width: int, dtype: str, depth: int = 1) -> MoEParams:
    """Draw a router and its experts; `depth` is explained in `init_experts`."""
    return MoEParams(
        router=router.init_router(rng, cfg, width, dtype),
        experts=experts.init_experts(rng, cfg, width, dtype, depth),
    )


def moe_forward(
    x_NC: Array, params: MoEParams, cfg: MoEConfig, noise: Array | None = None
) -> tuple[Array, Array, report.MoEReport, Cache]:
    """Send every token through its k experts.

        y[n] = sum_k gate[n, k] * MLP_{expert[n, k]}(x[n])

    ``noise=None`` is evaluation. A token whose choices were all dropped gets zero: in the
    transformer its residual goes on alone. No tokens at all are fine.

    Shapes     x_NC (N, C); noise as `draw_noise` draws it
               -> y_NC (N, C); aux (), the weighted balance terms; report
    Cache      the caches of the parts; the experts' hidden rows are the largest
    Source     Shazeer et al. 2017, section 2; Fedus et al. 2022, section 2
    """
    clean_NE, noisy_NE, scale_NE, router_cache = router.router_forward(
        x_NC, params.router, cfg, noise
    )  # 1. score
    bias_E = params.router.bias_E
    score_NE = noisy_NE if bias_E is None else noisy_NE + bias_E
    wished_NK = router.top_k(score_NE, cfg.top_k)  # 2. choose
    prob_NE, prob_cache = softmax.softmax_forward(noisy_NE)  # 3. probabilities
    expert_NK, plan = capacity.make_plan(wished_NK, score_NE, prob_NE, cfg.capacity)  # 4. places
    if cfg.renormalized:  # 5. gates
        gate_NK, gate_cache = router.renormalized_gate_forward(noisy_NE, expert_NK)
    else:
        gate_NK, gate_cache = router.raw_gate_forward(prob_NE, expert_NK)
    x_RC, dispatch_cache = dispatch.dispatch_forward(x_NC, plan)  # 6. to the experts
    y_RC, experts_cache = experts.experts_forward(x_RC, params.experts, cfg, plan.offsets)  # 7.
    y_NC, combine_cache = dispatch.combine_forward(y_RC, gate_NK, plan)  # 8. and back
    aux, balance_cache = balance.balance_forward(
        clean_NE, noisy_NE, scale_NE, prob_NE, gate_NK, expert_NK, wished_NK, cfg
    )  # 9. balance
    entropy_N = report.entropy_of(noisy_NE, prob_NE)
    facts = report.make_report(prob_NE, entropy_N, wished_NK, plan)
    return (
        y_NC,
        aux,
        facts,
        (
            cfg.renormalized,
            (router_cache, prob_cache, gate_cache),
            (dispatch_cache, experts_cache, combine_cache),
            balance_cache,
        ),
    )


def moe_backward(dy_NC: Array, daux: Array, cache: Cache) -> tuple[Array, MoEParams]:
    """Undo `moe_forward`.

    The token's vector was read twice, by the experts and by the router, so two gradients meet in
    dx. The gates hear of the loss through the experts' outputs, and the logits through the gates
    and the balance terms; which experts were chosen and who got a place are constants.

    Shapes     dy_NC (N, C), daux () -> dx_NC (N, C), grads
    """
    renormalized, router_caches, expert_caches, balance_cache = cache
    router_cache, prob_cache, gate_cache = router_caches
    dispatch_cache, experts_cache, combine_cache = expert_caches
    dclean_NE, dnoisy_NE, dscale_NE, dprob_NE, dgate_NK = balance.balance_backward(
        daux, balance_cache
    )  # 9.
    dy_RC, dgate_combine_NK = dispatch.combine_backward(dy_NC, combine_cache)  # 8.
    dx_RC, dexperts = experts.experts_backward(dy_RC, experts_cache)  # 7.
    dx_NC = dispatch.dispatch_backward(dx_RC, dispatch_cache)  # 6.
    dgate_NK = dgate_NK + dgate_combine_NK
    if renormalized:  # 5.
        dnoisy_NE = dnoisy_NE + router.renormalized_gate_backward(dgate_NK, gate_cache)
    else:
        dprob_NE = dprob_NE + router.raw_gate_backward(dgate_NK, gate_cache)
    dnoisy_NE = dnoisy_NE + softmax.softmax_backward(dprob_NE, prob_cache)  # 3.
    dx_router_NC, drouter = router.router_backward(
        dclean_NE, dnoisy_NE, dscale_NE, router_cache
    )  # 1.
    return dx_NC + dx_router_NC, MoEParams(drouter, dexperts)
