"""Facts about Mixtures of Experts that are easily got wrong: one test each, named by the trap."""

import dataclasses

import numpy as np
import oracles
import pytest
from test_systems import C, E, F, close, draw, plans, rows_of  # noqa: F401

from moe_numpy import tree
from moe_numpy.config import (
    SCORES,
    Capacity,
    GroupLimited,
    InputJitter,
    MoEConfig,
    SecondExpert,
    SwitchLoss,
)
from moe_numpy.moe import balance, capacity, dispatch, layer, router, routing
from moe_numpy.moe import score as scoring
from moe_numpy.ops import softmax


def config(**changes):
    return MoEConfig(**{"num_experts": E, "top_k": 2, "hidden": F, "router_bias": True, **changes})


def logit_gradient_of_one_token(cfg, x_NC, params, n):
    """Send a gradient into token n's output alone: what its logits get is the offset's gradient.

    Return it with u, the effect of each expert's output on the loss.
    """
    dy_NC = np.zeros_like(x_NC)
    dy_NC[n] = np.random.default_rng(5).standard_normal(C)
    *_, cache = layer.moe_forward(x_NC, params, cfg)
    _, grads = layer.moe_backward(dy_NC, 0.0, cache)
    outputs = [oracles.run_expert(x_NC[n].tolist(), 1.0, e, params.experts, cfg) for e in range(E)]
    return grads.router.offset_E, np.array(outputs) @ dy_NC[n]


# ------------------------------------------------------------------------------------------- gates
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_a_renormalized_top_1_gate_is_the_constant_1_and_its_router_never_learns(score):
    for weights, learns in [("renormalized", False), ("raw", True), (None, True)]:
        cfg = config(top_k=1, score=score, gate_weights=weights)
        x_NC, params, _ = draw(cfg, 0)
        doffset_E, _ = logit_gradient_of_one_token(cfg, x_NC, params, 3)
        assert (np.abs(doffset_E).max() > 1e-3) == learns
        if not learns:
            assert np.abs(doffset_E).max() < 1e-14


def test_logits_that_were_not_chosen_learn_from_raw_softmax_gates_and_from_no_others():
    for score, weights, all_learn in [
        ("softmax", "raw", True),
        ("softmax", "renormalized", False),
        ("sigmoid", "raw", False),
        ("sigmoid", "renormalized", False),
    ]:
        cfg = config(score=score, gate_weights=weights)
        x_NC, params, _ = draw(cfg, 1)
        chosen = oracles.moe_layer(x_NC, params, cfg).wished[3]
        doffset_E, u_E = logit_gradient_of_one_token(cfg, x_NC, params, 3)
        others = [e for e in range(E) if e not in chosen]
        assert (doffset_E[others] != 0.0).all() == all_learn
        assert (doffset_E[others] != 0.0).any() == all_learn
        assert (doffset_E[chosen] != 0.0).all()
        if all_learn:
            prob = oracles.moe_layer(x_NC, params, cfg).tokens[3].prob
            used = sum(prob[e] * u_E[e] for e in chosen)
            close(doffset_E[others], [-prob[e] * used for e in others])


def gate_sums(cfg, seed=2):
    x_NC, params, _ = draw(cfg, seed)
    return routing.route_forward(x_NC, params.router, cfg)[0].sum(1)


def test_two_experts_do_not_imply_gates_that_sum_to_one():
    grok = gate_sums(config(gate_weights="raw"))
    assert grok.max() < 1.0
    assert grok.min() < 0.9
    close(gate_sums(config()), np.ones(13))  # GShard, Mixtral
    close(gate_sums(config(score="sigmoid", gate_scale=2.5)), np.full(13, 2.5))  # DeepSeek-V3
    loose = gate_sums(config(score="sigmoid", gate_weights="raw"))
    assert loose.max() > 1.0


def test_a_gate_on_the_input_is_a_gate_on_the_output_only_where_the_expert_is_homogeneous():
    for activation, biased, equal in [
        ("identity", False, True),
        ("relu", False, True),
        ("gelu", False, False),
        ("swiglu", False, False),
        ("relu", True, False),
    ]:
        cfg = config(score="sigmoid", activation=activation, expert_bias=biased)
        x_NC, params, _ = draw(cfg, 3)
        both = [
            layer.moe_forward(x_NC, params, dataclasses.replace(cfg, gate_on=where))[0]
            for where in ("output", "input")
        ]
        assert (np.abs(both[0] - both[1]).max() < 1e-12) == equal


# -------------------------------------------------------------------------------- drops and gates
def token_with_a_dropped_second_choice(weights):
    """Find a token whose first choice got a place and whose second did not."""
    limit = Capacity(factor=0.7, priority="choice")
    cfg = config(gate_weights=weights, capacity=limit)
    x_NC, params, _ = draw(cfg, 4)
    judge = oracles.moe_layer(x_NC, params, cfg)
    n = judge.accepted.index([True, False])
    doffset_E, u_E = logit_gradient_of_one_token(cfg, x_NC, params, n)
    return doffset_E, u_E, judge.tokens[n], *judge.using[n]


def test_renormalize_then_drop_still_teaches_the_logit_of_the_dropped_expert():
    doffset_E, u_E, token, first, second = token_with_a_dropped_second_choice("renormalized")
    w1, w2 = oracles.softmax([token.noisy[first], token.noisy[second]])
    close(doffset_E[first], w1 * (u_E[first] - w1 * u_E[first]))
    close(doffset_E[second], -w2 * w1 * u_E[first])
    assert abs(doffset_E[second]) > 1e-3


def test_drop_then_renormalize_gives_a_lone_survivor_the_gate_1_and_no_logit_a_gradient():
    doffset_E, *_ = token_with_a_dropped_second_choice("renormalized_kept")
    assert np.abs(doffset_E).max() < 1e-14


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("score_kind", SCORES)
def test_a_lone_survivor_has_the_gate_1_however_much_better_the_dropped_choice_is(
    score_kind, dtype
):
    cfg = config(score=score_kind, gate_weights="renormalized_kept", capacity=Capacity())
    logit_NE = np.array([[200, 60, 0], [60, 200, 0], [0, -60, -60]], dtype)
    expert_NK, kept_NK = np.array([[0, 1]] * 3), np.array([[False, True], [False] * 2, [True] * 2])
    read_NE = logit_NE
    if not scoring.gates_from_logits(cfg):
        read_NE, _ = scoring.score_forward(score_kind, logit_NE)
    gate_NK, cache = scoring.gates_forward(read_NE, expert_NK, kept_NK, cfg)
    assert gate_NK.dtype == dtype and gate_NK[:2].tolist() == [[0, 1], [0, 0]]
    assert gate_NK[2].sum() == pytest.approx(1.0)
    assert not scoring.gates_backward(np.ones((3, 2), dtype), cache)[:2].any()


def test_a_raw_gate_teaches_the_logit_of_the_dropped_expert_too():
    doffset_E, u_E, token, first, second = token_with_a_dropped_second_choice("raw")
    close(doffset_E[second], -token.prob[second] * token.prob[first] * u_E[first])


def test_next_best_weighs_by_the_expert_in_use_and_not_by_the_one_that_was_wished():
    cfg = config(top_k=1, capacity=Capacity(factor=0.5, overflow="next_best"))
    x_NC, params, _ = draw(cfg, 5)
    judge = oracles.moe_layer(x_NC, params, cfg)
    pairs = zip(judge.wished, judge.using, judge.accepted, strict=True)
    n = [wish != use and fine == [True] for wish, use, fine in pairs].index(True)
    (e,), (wish,) = judge.using[n], judge.wished[n]
    y_C = layer.moe_forward(x_NC, params, cfg)[0][n]
    by_used, by_wished = (
        oracles.run_expert(x_NC[n].tolist(), judge.tokens[n].prob[gate], e, params.experts, cfg)
        for gate in (e, wish)
    )
    close(y_C, by_used)
    assert np.abs(y_C - by_wished).max() > 1e-3


# ------------------------------------------------------------------------------------------ places
def test_the_two_capacity_conventions_differ_by_the_factor_k():
    for k in (1, 2, 4):
        with_k = Capacity(factor=1.25).places(4096, k, 64)
        without = Capacity(factor=1.25, times_k=False).places(4096, k, 64)
        assert with_k == k * without
    # ST-MoE: "capacity factor 1.25, top-2" has room for 62.5 % of the choices.
    places = Capacity(factor=1.25, times_k=False, rounding="round").places(4096, 2, 64)
    assert places * 64 / (2 * 4096) == 0.625


@pytest.mark.parametrize(
    ("priority", "k", "looks_ahead"),
    [
        ("token", 1, False),
        ("token", 2, False),
        ("choice", 1, False),
        ("choice", 2, True),
        ("bpr", 1, True),
        ("score", 1, True),
    ],
)
def test_first_choices_before_second_ones_let_a_later_token_take_a_place_away(
    priority, k, looks_ahead
):
    rng, changed = np.random.default_rng(0), 0
    for _ in range(200):
        before_NE = rng.standard_normal((16, 4))
        after_NE = before_NE.copy()
        after_NE[12:] = rng.standard_normal((4, 4))
        kept = []
        for logit_NE in (before_NE, after_NE):
            prob_NE, _ = softmax.softmax_forward(logit_NE)
            wished_NK = router.top_k(logit_NE, k)
            limit = Capacity(factor=1.0, priority=priority)
            kept.append(capacity.make_plan(wished_NK, logit_NE, prob_NE, limit)[1].kept_NK[:12])
        changed += (kept[0] != kept[1]).any()
    assert changed > 100 if looks_ahead else changed == 0


def test_a_second_expert_that_the_coin_rejects_takes_no_place():
    # GShard's paper counts it among those before a token; both released codes do not.
    cfg = config(num_experts=2, selection=SecondExpert(), capacity=Capacity(factor=0.5))
    params = oracles.draw_layer(np.random.default_rng(0), cfg, 2)
    params = params._replace(
        router=params.router._replace(w_CE=np.eye(2), offset_E=np.zeros(2)),
    )
    x_NC = np.array([[2.0, 0.0], [0.0, 2.0]])  # token 0 wants 0, then 1; token 1 wants 1, then 0
    for coin, kept in [(0.999, [[True, False], [True, False]]), (0.0, [[True, True], [False] * 2])]:
        noise = np.array([[coin], [0.999]])
        _, _, plan, _, _ = routing.route_forward(x_NC, params.router, cfg, noise)
        assert plan.kept_NK.tolist() == kept


def test_two_rows_of_one_token_add_up_where_a_plain_assignment_would_lose_one():
    wished_NK = np.array([[0, 1], [1, 2], [2, 0]])
    flat_NE = np.zeros((3, 3))
    _, plan = capacity.make_plan(wished_NK, flat_NE, flat_NE, None)
    dx_RC = np.random.default_rng(0).standard_normal((6, 4))
    _, cache = dispatch.dispatch_forward(np.zeros((3, 4)), plan)
    lossy_NC = np.zeros((3, 4))
    lossy_NC[plan.token_R] += dx_RC  # keeps only the last row of every token
    summed_NC = np.zeros((3, 4))
    np.add.at(summed_NC, plan.token_R, dx_RC)
    close(dispatch.dispatch_backward(dx_RC, cache), summed_NC)
    assert np.abs(summed_NC - lossy_NC).max() > 0.1


# ---------------------------------------------------------------------------------------- choosing
def test_a_router_of_zeros_without_noise_sends_every_token_to_the_first_experts():
    for k in (1, 2, 3):
        cfg = config(top_k=k, router_bias=False)
        x_NC, params, _ = draw(cfg, 6)
        params.router.w_CE[:] = 0.0
        report = layer.moe_forward(x_NC, params, cfg)[2]
        assert report.wished_E.tolist() == [13] * k + [0] * (E - k)


def test_masking_a_group_with_0_instead_of_minus_infinity_lets_it_in_past_negative_scores(
    plans,  # noqa: F811
):
    cfg = config(score="sigmoid", selection=GroupLimited(groups=2, kept=1), bias_rate=0.01)
    x_NC, params, _ = draw(cfg, 7)
    params.router.bias_E[:] = -2.0  # every biased score is negative
    layer.moe_forward(x_NC, params, cfg)
    score_NE = 1.0 / (1.0 + np.exp(-(x_NC @ params.router.w_CE + params.router.offset_E))) - 2.0
    kept_N = np.sort(score_NE.reshape(13, 2, 3))[:, :, 1:].sum(2).argmax(1)  # two best each
    assert all(e // 3 == kept_N[n] for e, n in rows_of(plans[0])), "a token left its kept group"
    masked_NE = np.where(np.arange(E) // 3 == kept_N[:, None], score_NE, 0.0)
    assert (router.top_k(masked_NE, 2) // 3 != kept_N[:, None]).all(), "with 0 all of them leave it"


def test_jitter_reaches_the_router_and_never_the_experts():
    # Renormalized top-1: the gate is 1, so that jitter can change the choice and nothing else.
    cfg = config(top_k=1, gate_weights="renormalized", noise=InputJitter(eps=0.2))
    x_NC, params, noise = draw(cfg, 8)
    (y_NC, _, report, _), (clean_NC, _, clean, _) = (
        layer.moe_forward(x_NC, params, cfg, u) for u in (noise, None)
    )
    judges = [oracles.moe_layer(x_NC, params, cfg, u) for u in (noise, None)]
    stayed_N = np.array([a == b for a, b in zip(judges[0].using, judges[1].using, strict=True)])
    assert report.decisiveness != clean.decisiveness
    assert stayed_N.sum() > 6
    close(y_NC[stayed_N], clean_NC[stayed_N])


# ---------------------------------------------------------------------------------------- balance
def noisy_logits(tokens, experts, seed=0):
    """Draw logits with noise of a learned size, some experts more popular than others."""
    rng = np.random.default_rng(seed)
    clean_NE = rng.standard_normal((tokens, experts)) + 0.5 * rng.standard_normal(experts)
    scale_NE = 0.5 + rng.random((tokens, experts))
    return clean_NE, clean_NE + scale_NE * rng.standard_normal((tokens, experts)), scale_NE


def cv_squared(amounts):
    return amounts.var() / amounts.mean() ** 2


def test_a_load_estimate_with_thresholds_from_probabilities_does_not_sum_to_the_choices():
    clean_NE, noisy_NE, scale_NE = noisy_logits(8000, 8)
    right_E, _ = balance.load_forward(clean_NE, noisy_NE, scale_NE, 2)
    assert abs(right_E.sum() / 16_000 - 1.0) < 0.01
    prob_NE = softmax.softmax_forward(noisy_NE)[0]
    sorted_NE = np.sort(prob_NE)[:, ::-1]
    inside_NE = noisy_NE > sorted_NE[:, 2:3]  # logits against probabilities: the popular port's bug
    threshold_NE = np.where(inside_NE, sorted_NE[:, 2:3], sorted_NE[:, 1:2])
    ratio = (clean_NE - threshold_NE) / scale_NE
    broken_E = np.vectorize(oracles.normal_cdf)(ratio).sum(0)
    assert broken_E.sum() > 1.5 * 16_000
    assert cv_squared(broken_E) < 0.7 * cv_squared(right_E), "and the imbalance looks smaller"


def test_one_threshold_for_chosen_and_others_alike_makes_the_load_too_small():
    clean_NE, noisy_NE, scale_NE = noisy_logits(8000, 8)
    right_E, _ = balance.load_forward(clean_NE, noisy_NE, scale_NE, 2)
    kth_N1 = np.sort(noisy_NE)[:, -2][:, None]  # V-MoE: the k-th largest, the expert's own included
    single_E = np.vectorize(oracles.normal_cdf)((clean_NE - kth_N1) / scale_NE).sum(0)
    assert single_E.sum() < 0.95 * right_E.sum()
    assert abs(cv_squared(single_E) / cv_squared(right_E) - 1.0) < 0.4


def test_pooling_the_layers_in_one_balance_loss_hides_opposite_imbalances():
    first_NE, second_NE = np.full((10, 2), [0.9, 0.1]), np.full((10, 2), [0.1, 0.9])
    to_0, to_1 = np.zeros((10, 1), int), np.ones((10, 1), int)
    alone = [
        balance.switch_loss_forward(prob_NE, expert_NK)[0]
        for prob_NE, expert_NK in [(first_NE, to_0), (second_NE, to_1)]
    ]
    close(alone, [1.8, 1.8])
    layers = np.concatenate((first_NE, second_NE)), np.concatenate((to_0, to_1))
    close(balance.switch_loss_forward(*layers)[0], 1.0)  # "perfect"
    close(balance.switch_loss_forward(*layers, group=10)[0], 1.8)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_losses_disagree_on_what_balance_is_worth(k):
    tokens = np.arange(4 * E)
    expert_NK = np.stack([(tokens + j) % E for j in range(k)], 1)
    prob_NE = np.full((4 * E, E), 1.0 / E)
    close(balance.switch_loss_forward(prob_NE, expert_NK)[0], 1.0)  # Switch, MegaBlocks, Megatron
    close(balance.switch_loss_forward(prob_NE, expert_NK, divide=False)[0], k)  # Flaxformer, HF
    first = np.bincount(expert_NK[:, 0], minlength=E) / (4 * E)
    gshard = (first * prob_NE.mean(0)).sum() / E  # as the paper writes it
    close(gshard, 1.0 / E**2)


def test_the_balance_loss_counts_wishes_and_not_the_places_that_were_given():
    cfg = config(balance=(SwitchLoss(weight=1.0),))
    tight = dataclasses.replace(cfg, capacity=Capacity(factor=0.3))
    x_NC, params, _ = draw(cfg, 9)
    free, limited = (layer.moe_forward(x_NC, params, each) for each in (cfg, tight))
    assert limited[2].dropped > 13
    close(free[1], limited[1])


def test_sequences_balanced_one_by_one_are_not_the_batch_balanced_as_a_whole():
    prob_NE = np.repeat(np.array([[0.9, 0.1], [0.1, 0.9]]), 5, axis=0)
    expert_NK = prob_NE.argmax(1)[:, None]
    close(balance.switch_loss_forward(prob_NE, expert_NK)[0], 1.0)
    close(balance.switch_loss_forward(prob_NE, expert_NK, group=5)[0], 1.8)


# ----------------------------------------------------------------------------------------- experts
@pytest.mark.parametrize(
    ("activation", "matrices"), [("gelu", 2), ("swiglu", 3), ("geglu", 3), ("swiglu3", 4)]
)
def test_a_gated_expert_has_3_matrices_and_one_of_openmoe_has_4(activation, matrices):
    cfg = config(activation=activation)
    params = layer.init_moe(np.random.default_rng(0), cfg, C, "float32")
    sizes = [leaf.size for leaf in tree.leaves(params.experts)]
    assert sizes == [E * C * F] * matrices
