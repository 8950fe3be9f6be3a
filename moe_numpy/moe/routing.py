"""Routing by tokens: from a token's vector to its experts, their gates and their places."""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, xp
from moe_numpy.config import (
    Assignment,
    ExpertChoice,
    GroupLimited,
    MoEConfig,
    SecondExpert,
    Sinkhorn,
)
from moe_numpy.moe import assignment, balance, capacity, report, router, score, selection


def route_forward(
    x_NC: Array,
    params: router.RouterParams,
    cfg: MoEConfig,
    noise: Array | None = None,
    reported: bool = True,
) -> tuple[Array, Array, capacity.Plan, report.MoEReport | None, Cache]:
    """Decide which experts see which tokens, and with which weight.

        logits -> scores -> choice -> places -> gates;    beside them the balance terms

    Without a report, a softmax over all experts that nothing else reads is left out.

    Shapes     x_NC (N, C); noise as `router.draw_noise` draws it
               -> gate_NK (N, K); aux (); plan; report, None if not `reported`
    Cache      (cfg, router, score, share, gate and balance caches)
    Source     Shazeer et al. 2017, section 2.1; the parts name theirs
    """
    noise, coin_N = router.split_noise(noise, cfg)
    router_found = router.router_forward(x_NC, params, cfg, noise)  # 1. logits
    clean_NE, noisy_NE, scale_NE, router_cache = router_found
    score_NE = score_cache = share_cache = None
    if reported or score.scores_are_read(cfg):
        score_NE, score_cache = score.score_forward(cfg.score, noisy_NE)  # 2. scores
    prob_NE = score_NE
    if cfg.score != "softmax":
        prob_NE, share_cache = score.share_forward(score_NE)
    rank_NE = ranking(noisy_NE, score_NE, params.bias_E, cfg)
    wished_NK, asked_NK = choose_experts(rank_NE, prob_NE, cfg, coin_N)  # 3. choice
    expert_NK, plan = capacity.make_plan(wished_NK, rank_NE, prob_NE, cfg.capacity, asked_NK)
    read_NE = noisy_NE if score.gates_from_logits(cfg) else score_NE
    gate_NK, gate_cache = score.gates_forward(read_NE, expert_NK, plan.kept_NK, cfg)  # 4. gates
    aux, balance_cache = balance.balance_forward(
        clean_NE, noisy_NE, scale_NE, prob_NE, gate_NK, expert_NK, wished_NK, rank_NE, cfg
    )  # 5. balance
    facts = None
    if reported:
        facts = report.make_report(noisy_NE, prob_NE, wished_NK, plan, cfg.score)
        if isinstance(cfg.selection, ExpertChoice):  # the experts chose: no wish goes unheard
            facts = facts._replace(wished_E=facts.load_E, dropped=0)
    cache = (cfg, router_cache, score_cache, share_cache, gate_cache, balance_cache)
    return gate_NK, aux, plan, facts, cache


def route_backward(dgate_NK: Array, daux: Array, cache: Cache) -> tuple[Array, router.RouterParams]:
    """Undo `route_forward`; who was chosen and who got a place are constants.

    The scores hear of the loss through the gates and the balance terms, the logits through the
    scores and, for the smooth load and the z-loss, directly. A path that is not there (None) costs
    nothing: renormalized softmax gates without a balance term leave out the whole softmax.

    Shapes     dgate_NK (N, K), daux () -> dx_NC (N, C), grads
    """
    cfg, router_cache, score_cache, share_cache, gate_cache, balance_cache = cache
    dclean_NE, dnoisy_NE, dscale_NE, dscore_NE, dgate_balance_NK = balance.balance_backward(
        daux, balance_cache
    )  # 5.
    if share_cache is not None and dscore_NE is not None:
        dscore_NE = score.share_backward(dscore_NE, share_cache)
    dgate_NK = router.plus(dgate_balance_NK, dgate_NK)
    dread_NE = score.gates_backward(dgate_NK, gate_cache)  # 4.
    if score.gates_from_logits(cfg):
        dnoisy_NE = router.plus(dnoisy_NE, dread_NE)
    else:
        dscore_NE = router.plus(dscore_NE, dread_NE)
    if dscore_NE is not None:
        dnoisy_NE = router.plus(dnoisy_NE, score.score_backward(dscore_NE, score_cache))  # 2.
    return router.router_backward(dclean_NE, dnoisy_NE, dscale_NE, router_cache)  # 1.


def ranking(noisy_NE: Array, score_NE: Array | None, bias_E: Array | None, cfg: MoEConfig) -> Array:
    """Return what the choice compares; the gates are computed without the bias.

    The logits rank as their scores do, without the ties of scores that are rounded to 0 or 1.
    Scores take their place where their size matters: in sums over a group, and where a bias in
    their units is added to them (for the softmax, without groups, it is added to the logits). What
    a Sinkhorn scaling or a limit to groups makes of them is what overflow follows too: an expert
    with minus infinity is out of the question.

    Shapes     noisy_NE, score_NE (N, E), the scores None where `score.scores_are_read` says no;
               bias_E (E,) or None -> rank_NE (N, E)
    """
    part = cfg.selection
    rank_NE = noisy_NE
    if isinstance(part, GroupLimited) or (bias_E is not None and cfg.score != "softmax"):
        rank_NE = score_NE
    if bias_E is not None:
        rank_NE = rank_NE + bias_E
    if isinstance(part, GroupLimited):
        return selection.limited_to_groups(rank_NE, part.groups, part.kept, part.score)
    if isinstance(part, Sinkhorn):
        return selection.sinkhorn(rank_NE, part.tolerance, part.most)
    return rank_NE


def choose_experts(
    rank_NE: Array, prob_NE: Array | None, cfg: MoEConfig, coin_N: Array | None = None
) -> tuple[Array, Array | None]:
    """Choose the experts of every token; a discrete decision without a gradient.

    Shapes     rank_NE, prob_NE (N, E), unread by plain top-k; coin_N (N,) from 0 to 1, or None at
               evaluation
               -> wished_NK (N, K) integers, best first (expert choice: by index); asked_NK (N, K)
               booleans, which of them ask for a place at all, or None for all
    """
    part, k = cfg.selection, cfg.top_k
    if isinstance(part, ExpertChoice):
        N, E = prob_NE.shape
        return selection.expert_choice(prob_NE, -(-k * N // E))
    if isinstance(part, Assignment):
        return assignment.balanced_assignment(rank_NE)[:, None], None
    wished_NK = router.top_k(rank_NE, k)
    if not isinstance(part, SecondExpert):
        return wished_NK, None
    pair_N2, _ = router.raw_gate_forward(prob_NE, wished_NK)
    share_N2, _ = score.share_forward(pair_N2)
    kept_N = selection.second_expert_kept(share_N2[:, 1], part.threshold, part.policy, coin_N)
    return wished_NK, xp.stack((xp.ones_like(kept_N), kept_N), 1)
