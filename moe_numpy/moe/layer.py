"""The Mixture-of-Experts layer: all of it on one page.

A token's vector is scored by the router, its best k experts are chosen and given places, their MLPs
run on the rows that hold copies of the token, and the results come back weighted by the gates.
"""

from __future__ import annotations

from typing import NamedTuple

from numpy.random import Generator, default_rng

from moe_numpy.backend import Array, Cache, xp
from moe_numpy.config import Hierarchy, MoEConfig, SoftSlots, rules
from moe_numpy.moe import dispatch, experts, fit, hierarchy, report, router, routing, shared, soft


class MoEParams(NamedTuple):
    """The parameters of one MoE layer; a shared expert only where the configuration has one."""

    router: router.RouterParams | hierarchy.HierarchyParams | soft.SoftParams
    experts: experts.ExpertParams
    shared: shared.SharedParams | None = None


def init_moe(
    rng: Generator | int, cfg: MoEConfig, width: int, dtype: str, depth: int = 1
) -> MoEParams:
    """Draw a router and its experts; `depth` is explained in `init_experts`.

    `rng` is anything that `numpy.random.default_rng` takes: a generator, or a seed.

    Raises     ValueError if `dtype` is not "float32" or "float64", or `width` or `depth` is not
               positive
    """
    rules.configuration("init_moe", cfg, MoEConfig)
    rules.float_type("init_moe", dtype)
    rules.whole_number("init_moe", "width", width, 1)
    rules.whole_number("init_moe", "depth", depth, 1)
    rng = default_rng(rng)
    init_routing = router.init_router
    if isinstance(cfg.selection, Hierarchy):
        init_routing = hierarchy.init_hierarchy
    elif isinstance(cfg.selection, SoftSlots):
        init_routing = soft.init_soft
    return MoEParams(
        router=init_routing(rng, cfg, width, dtype),
        experts=experts.init_experts(rng, cfg, width, dtype, depth),
        shared=shared.init_shared(rng, cfg, width, dtype, depth) if cfg.shared else None,
    )


def moe_forward(
    x_NC: Array,
    params: MoEParams,
    cfg: MoEConfig,
    noise: Array | None = None,
    reported: bool = True,
) -> tuple[Array, Array, report.MoEReport | None, Cache]:
    """Send every token through its k experts.

        y[n] = sum_k gate[n, k] * MLP_{expert[n, k]}(x[n])  +  shared(x[n])

    or, where the gate is on the input, sum_k MLP_{expert[n, k]}(gate[n, k] * x[n]). Which experts,
    gates and places is decided by `routing.route_forward`, or by the two levels of `hierarchy`;
    soft slots replace steps 1, 2 and 4 by weighted means (`soft`).

    ``noise=None`` draws nothing; limits and balanced selections stay, and only `cfg.evaluation()`
    lifts them. A token whose choices were all dropped gets zero: in the transformer its residual
    goes on alone. No tokens at all are fine.

    ``reported=False`` spares the report, and the softmax over all experts if only the report needs
    it: the gates of a plain router are a softmax over the chosen logits alone.

    Shapes     x_NC (N, C); noise as `router.draw_noise` draws it
               -> y_NC (N, C); aux (), the weighted balance terms; report, None if not `reported`
    Cache      the caches of the parts, and what dy has to be like; the experts' hidden rows are the
               largest
    Raises     ValueError if parameters, configuration, tokens and noise do not fit together
    Source     Shazeer et al. 2017, section 2; Fedus et al. 2022, section 2
    """
    fit.check(x_NC, params, cfg, noise)
    if isinstance(cfg.selection, SoftSlots):
        y_NC, aux, facts, cache = _mix_all(x_NC, params, cfg, reported)
    else:
        route_forward, _ = _route(cfg)
        gate_NK, aux, plan, facts, route_cache = route_forward(
            x_NC, params.router, cfg, noise, reported
        )  # 1. logits, choice, places, gates
        if cfg.gate_on == "input":  # 2. to the experts
            x_RC, dispatch_cache = dispatch.gated_dispatch_forward(x_NC, gate_NK, plan)
            gate_NK = xp.ones_like(gate_NK)
        else:
            x_RC, dispatch_cache = dispatch.dispatch_forward(x_NC, plan)
        y_RC, experts_cache = experts.experts_forward(x_RC, params.experts, cfg, plan.offsets)  # 3.
        y_NC, combine_cache = dispatch.combine_forward(y_RC, gate_NK, plan)  # 4. and back
        cache = (route_cache, dispatch_cache, experts_cache, combine_cache)
    shared_cache = None
    if params.shared is not None:  # 5. what every token takes
        shared_NC, shared_cache = shared.shared_forward(x_NC, params.shared, cfg)
        y_NC = y_NC + shared_NC
    return y_NC, aux, facts, (cfg, cache, shared_cache, (y_NC.shape, y_NC.dtype))


def moe_backward(dy_NC: Array, daux: Array, cache: Cache) -> tuple[Array, MoEParams]:
    """Undo `moe_forward`.

    The token's vector was read by the experts, by the router and by the shared expert, so their
    gradients meet in dx. The gates hear of the loss through the experts' outputs (or inputs);
    which experts were chosen and who got a place are constants.

    Shapes     dy_NC (N, C), daux () -> dx_NC (N, C), grads
    Raises     ValueError if dy is not of the shape and type of y, or daux is not one number
    """
    cfg, parts, shared_cache, result = cache
    fit.check_upstream("moe_backward", "dy", dy_NC, *result)
    daux = fit.upstream_number("moe_backward", "daux", daux, dy_NC.dtype)
    dx_shared_NC, dshared = None, None
    if shared_cache is not None:  # 5.
        dx_shared_NC, dshared = shared.shared_backward(dy_NC, shared_cache)
    if isinstance(cfg.selection, SoftSlots):
        dx_NC, drouter, dexperts = _unmix_all(dy_NC, parts)
    else:
        route_cache, dispatch_cache, experts_cache, combine_cache = parts
        _, route_backward = _route(cfg)
        dy_RC, dgate_NK = dispatch.combine_backward(dy_NC, combine_cache)  # 4.
        dx_RC, dexperts = experts.experts_backward(dy_RC, experts_cache)  # 3.
        if cfg.gate_on == "input":  # 2.
            dx_NC, dgate_NK = dispatch.gated_dispatch_backward(dx_RC, dispatch_cache)
        else:
            dx_NC = dispatch.dispatch_backward(dx_RC, dispatch_cache)
        dx_router_NC, drouter = route_backward(dgate_NK, daux, route_cache)  # 1.
        dx_NC = dx_NC + dx_router_NC
    return router.plus(dx_shared_NC, dx_NC), MoEParams(drouter, dexperts, dshared)


def _route(cfg: MoEConfig) -> tuple:
    if isinstance(cfg.selection, Hierarchy):
        return hierarchy.hierarchical_route_forward, hierarchy.hierarchical_route_backward
    return routing.route_forward, routing.route_backward


def _mix_all(x_NC: Array, params: MoEParams, cfg: MoEConfig, reported: bool) -> tuple:
    """Run the experts on their soft slots: means of all tokens in, means of all slots out."""
    x_RC, combine_NR, slots_cache = soft.soft_slots_forward(x_NC, params.router)
    offsets = tuple(range(0, x_RC.shape[0] + 1, cfg.selection.slots))
    y_RC, experts_cache = experts.experts_forward(x_RC, params.experts, cfg, offsets)
    facts = soft.soft_report(combine_NR, cfg.num_experts) if reported else None
    cache = (slots_cache, experts_cache, combine_NR, y_RC)
    return combine_NR @ y_RC, xp.zeros((), x_NC.dtype), facts, cache


def _unmix_all(dy_NC: Array, cache: Cache) -> tuple:
    slots_cache, experts_cache, combine_NR, y_RC = cache
    dx_RC, dexperts = experts.experts_backward(combine_NR.T @ dy_NC, experts_cache)
    dx_NC, drouter = soft.soft_slots_backward(dx_RC, dy_NC @ y_RC.T, slots_cache)
    return dx_NC, drouter, dexperts
