"""What must hold for every Mixture of Experts, whatever it is composed of: forward and backward."""

import dataclasses
import math

import numpy as np
import oracles
import pytest
from test_systems import (
    NOISES,
    RANDOM,
    SCORES,
    C,
    E,
    F,
    N,
    close,
    draw,
    plans,  # noqa: F401
    rows_of,
)

from moe_numpy import tree
from moe_numpy.config import (
    Assignment,
    Capacity,
    ExpertChoice,
    GaussianNoise,
    GroupLimited,
    Hierarchy,
    MoEConfig,
    SecondExpert,
    Shared,
    Sinkhorn,
    SoftSlots,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe import layer, mlp, router, score, soft
from moe_numpy.ops import softmax


def config(**changes):
    return MoEConfig(**{"num_experts": E, "top_k": 2, "hidden": F, **changes})


def both_ways(cfg, x_NC, params, noise=None, daux=1.0, **kind):
    """Run forward and backward: y, aux, dx and the gradients."""
    y_NC, aux, _, cache = layer.moe_forward(x_NC, params, cfg, noise, **kind)
    dy_NC = np.random.default_rng(8).standard_normal(x_NC.shape)
    dx_NC, grads = layer.moe_backward(dy_NC, daux, cache)
    return y_NC, aux, dx_NC, grads


def same(a, b, tolerance=1e-12):
    """Compare two trees leaf by leaf."""
    for one, other in zip(tree.leaves(a), tree.leaves(b), strict=True):
        close(one, other, tolerance)


# ------------------------------------------------------------------------------ gates and choices
@pytest.mark.parametrize("k", [1, 2, 3, E])
def test_softmax_then_choose_then_divide_is_choose_then_softmax(k):
    rng = np.random.default_rng(k)
    logit_NE, dgate_NK = 2.0 * rng.standard_normal((N, E)), rng.standard_normal((N, k))
    expert_NK = router.top_k(logit_NE, k)
    gate_NK, cache = router.renormalized_gate_forward(logit_NE, expert_NK)
    prob_NE, prob_cache = softmax.softmax_forward(logit_NE)
    divided_NK, divided_cache = score.share_gate_forward(prob_NE, expert_NK)
    close(gate_NK, divided_NK, 1e-14)
    dprob_NE = score.share_gate_backward(dgate_NK, divided_cache)
    dlogit_NE = router.renormalized_gate_backward(dgate_NK, cache)
    close(dlogit_NE, softmax.softmax_backward(dprob_NE, prob_cache), 1e-14)


@pytest.mark.parametrize("score_kind", SCORES)
@pytest.mark.parametrize("selection", [None, GroupLimited(groups=3, kept=2)])
def test_a_selection_bias_of_zero_is_no_bias(score_kind, selection):
    cfg = config(score=score_kind, selection=selection)
    biased = dataclasses.replace(cfg, bias_rate=0.1)
    for seed in range(5):
        x_NC, params, _ = draw(cfg, seed)
        zero = params._replace(router=params.router._replace(bias_E=np.zeros(E)))
        y, aux, dx, grads = both_ways(cfg, x_NC, params)
        y2, aux2, dx2, grads2 = both_ways(biased, x_NC, zero)
        same((y, aux, dx, grads.experts), (y2, aux2, dx2, grads2.experts), 0.0)
        close(grads.router.w_CE, grads2.router.w_CE, 0.0)


@pytest.mark.parametrize("score_kind", SCORES)
@pytest.mark.parametrize("bias_rate", [0.0, 0.1])
def test_groups_of_one_expert_are_plain_top_k(score_kind, bias_rate):
    plain = config(score=score_kind, bias_rate=bias_rate)
    grouped = dataclasses.replace(plain, selection=GroupLimited(groups=E, kept=2, score="max"))
    for seed in range(5):
        x_NC, params, _ = draw(plain, seed)
        if bias_rate and score_kind == "softmax":  # added to logits there, to probabilities here
            params.router.bias_E[:] = 0.0
        same(both_ways(plain, x_NC, params), both_ways(grouped, x_NC, params))


def test_the_best_groups_hold_the_chosen_experts_also_in_overflow(plans):  # noqa: F811
    limit = Capacity(factor=0.8, overflow="next_best")
    for seed, size in [(0, "max"), (1, "top2"), (2, "max"), (3, "top2")]:
        cfg = config(selection=GroupLimited(groups=3, kept=1, score=size), capacity=limit)
        x_NC, params, _ = draw(cfg, seed)
        prob_NE = softmax.softmax_forward(x_NC @ params.router.w_CE)[0]
        groups_NGS = np.sort(prob_NE.reshape(N, 3, 2))
        best_N = (groups_NGS[..., 1] if size == "max" else groups_NGS.sum(2)).argmax(1)
        plans.clear()
        layer.moe_forward(x_NC, params, cfg)
        assert {(e // 2, n) for e, n in rows_of(plans[0])} <= {(g, n) for n, g in enumerate(best_N)}


@pytest.mark.parametrize("gate_on", ["output", "input"])
@pytest.mark.parametrize(
    ("score_kind", "weights"),
    [("softmax", "raw"), ("sigmoid", "renormalized"), ("sqrt_softplus", "renormalized")],
)
def test_one_expert_whose_gate_is_one_is_the_dense_feed_forward(score_kind, weights, gate_on):
    cfg = config(
        num_experts=1,
        top_k=1,
        score=score_kind,
        gate_weights=weights,
        gate_on=gate_on,
        activation="swiglu",
    )
    x_NC, params, _ = draw(cfg, 0)
    dense = mlp.MLPParams(*(None if w is None else w[0] for w in params.experts[:4]))
    y_NC, _, dx_NC, grads = both_ways(cfg, x_NC, params)
    dense_y, cache = mlp.mlp_forward(x_NC, dense, "swiglu")
    dense_dx, dense_grads = mlp.mlp_backward(
        np.random.default_rng(8).standard_normal((N, C)), cache
    )
    close(y_NC, dense_y)
    close(dx_NC, dense_dx)
    same(tuple(w[0] for w in tree.leaves(grads.experts)), dense_grads)
    assert np.abs(grads.router.w_CE).max() < 1e-12


# ------------------------------------------------------------------------------------- bookkeeping
def test_rows_and_drops_of_every_system_add_up_and_no_expert_is_overfull(plans):  # noqa: F811
    limited = 0
    for number, cfg in enumerate(RANDOM):
        x_NC, params, noise = draw(cfg, number)
        plans.clear()
        _, _, report, _ = layer.moe_forward(x_NC, params, cfg, noise)
        (plan,) = plans
        R = plan.token_R.size
        if not isinstance(cfg.selection, ExpertChoice):
            assert report.load_E.sum() + report.dropped == N * cfg.top_k
        assert report.load_E.sum() == R == plan.offsets[-1]
        kept_slots = plan.slot_NK[plan.slot_NK < R]
        assert sorted(kept_slots.tolist()) == list(range(R)), "a row is missing or used twice"
        assert (plan.slot_NK.reshape(-1)[plan.choice_R] == np.arange(R)).all()
        assert len(set(rows_of(plan))) == R, "a token uses an expert twice"
        if cfg.capacity is not None:
            limited += 1
            size = cfg.capacity.group or N
            for start in range(0, N, size):
                here = min(size, N - start)
                places = oracles.places_of(cfg.capacity, here, cfg.top_k, E)
                tokens = range(start, start + here)
                loads = [sum(e == x and n in tokens for x, n in rows_of(plan)) for e in range(E)]
                assert max(loads) <= places
    assert limited > 30


OTHERS = (
    config(top_k=E, selection=SoftSlots(slots=2)),
    config(selection=Hierarchy(groups=3, kept=1)),
    config(balance=(SwitchLoss(),)),
    *(config(capacity=Capacity(priority=name)) for name in ("token", "choice", "score", "bpr")),
)


@pytest.mark.parametrize("start", range(0, len(RANDOM), 30))
def test_a_layer_computes_the_same_bits_without_a_report(start):
    for seed, cfg in enumerate((*RANDOM[start : start + 30], *OTHERS)):
        x_NC, params, noise = draw(cfg, seed)
        if isinstance(cfg.selection, SoftSlots | Hierarchy):
            params = layer.init_moe(np.random.default_rng(seed), cfg, C, "float64")
        reported, spared = (both_ways(cfg, x_NC, params, noise, reported=r) for r in (True, False))
        for one, other in zip(tree.leaves(reported), tree.leaves(spared), strict=True):
            np.testing.assert_array_equal(one, other)
        assert layer.moe_forward(x_NC, params, cfg, noise, reported=False)[2] is None


@pytest.mark.parametrize(("reported", "times"), [(True, 1), (False, 0)])
def test_a_plain_router_scores_all_experts_for_its_report_alone(reported, times, monkeypatch):
    scored, forward = [], score.score_forward
    monkeypatch.setattr(score, "score_forward", lambda *to: scored.append(to) or forward(*to))
    x_NC, params, _ = draw(config(), 0)
    layer.moe_forward(x_NC, params, config(), None, reported)
    assert len(scored) == times


@pytest.mark.parametrize("overflow", ["drop", "next_best"])
@pytest.mark.parametrize("group", [None, 4])
def test_a_capacity_factor_of_the_number_of_experts_drops_nothing(overflow, group):
    for cfg in RANDOM:
        if cfg.capacity is None:
            continue
        ample = Capacity(factor=float(E), overflow=overflow, group=group)
        free = (
            dataclasses.replace(cfg, capacity=None) if cfg.gate_weights in (None, "raw") else None
        )
        cfg = dataclasses.replace(cfg, capacity=ample)
        x_NC, params, noise = draw(cfg, 3)
        _, _, report, _ = layer.moe_forward(x_NC, params, cfg, noise)
        if not isinstance(cfg.selection, SecondExpert):
            assert report.dropped == 0
        if free is not None:
            ways = (both_ways(each, x_NC, params, noise) for each in (cfg, free))
            same(*ways)


@pytest.mark.parametrize("priority", ["token", "choice", "score"])
def test_next_best_drops_nothing_while_there_are_as_many_places_as_tokens(priority):
    limit = Capacity(factor=1.0, overflow="next_best", priority=priority)
    cfg = config(top_k=1, capacity=limit)
    for seed in range(10):
        _, _, report, _ = layer.moe_forward(*draw(cfg, seed)[:2], cfg)
        assert report.dropped == 0
        assert report.load_E.max() <= math.ceil(N / E)


@pytest.mark.parametrize("tokens", [E, 13, 24])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_expert_choice_gives_every_expert_exactly_its_places(tokens, k):
    cfg = config(top_k=k, selection=ExpertChoice())
    _, _, report, _ = layer.moe_forward(*draw(cfg, k, tokens)[:2], cfg)
    assert report.load_E.tolist() == [math.ceil(k * tokens / E)] * E


@pytest.mark.parametrize("tokens", [E, 2 * E, 6 * E])
def test_the_assignment_gives_every_expert_exactly_as_many_tokens(tokens):
    cfg = config(top_k=1, selection=Assignment(), score="sigmoid")
    x_NC, params, _ = draw(cfg, tokens, tokens)
    x_NC[:, 0] += 3.0  # all tokens like the same experts
    _, _, report, _ = layer.moe_forward(x_NC, params, cfg)
    assert report.load_E.tolist() == [tokens // E] * E
    _, _, free, _ = layer.moe_forward(x_NC, params, cfg.evaluation())
    assert free.load_E.max() > tokens // E


def test_both_weights_of_soft_slots_sum_to_one():
    cfg = config(top_k=E, selection=SoftSlots(slots=2))
    params = layer.init_moe(np.random.default_rng(0), cfg, C, "float64")
    x_NC = np.random.default_rng(1).standard_normal((N, C))
    x_NC[:, 0] = 1.0  # a mean of ones is one only if its weights sum to one
    x_RC, combine_NR, _ = soft.soft_slots_forward(x_NC, params.router)
    assert x_RC.shape == (2 * E, C)
    close(x_RC[:, 0], np.ones(2 * E))
    close(combine_NR.sum(1), np.ones(N))
    assert (combine_NR > 0.0).all()


# -------------------------------------------------------------------------------------- the losses
@pytest.mark.parametrize("score_kind", SCORES)
@pytest.mark.parametrize("counted", [None, 1, 3])
@pytest.mark.parametrize("divide", [True, False])
def test_the_switch_loss_has_no_gradient_where_the_load_is_balanced(score_kind, counted, divide):
    term = SwitchLoss(weight=1.0, counted=counted, divide=divide)
    cfg = config(score=score_kind, balance=(term,))
    _, params, _ = draw(cfg, 0)
    levels = np.random.default_rng(0).permutation(E).astype(float)
    w_EE = np.stack([np.roll(levels, shift) for shift in range(E)])  # token n: ranking rolled by n
    params = params._replace(router=params.router._replace(w_CE=w_EE))
    experts = layer.init_moe(np.random.default_rng(0), cfg, E, "float64").experts
    params = params._replace(experts=experts)
    _, aux, report, cache = layer.moe_forward(np.eye(E), params, cfg)
    assert report.wished_E.tolist() == [2] * E
    close(aux, 1.0 if divide else (counted or 2))
    _, grads = layer.moe_backward(np.zeros((E, E)), 1.0, cache)
    assert np.abs(grads.router.w_CE).max() < 1e-15
    tilted = params._replace(router=params.router._replace(w_CE=w_EE + 9.0 * np.eye(E)[0]))
    *_, cache = layer.moe_forward(np.eye(E), tilted, cfg)
    _, grads = layer.moe_backward(np.zeros((E, E)), 1.0, cache)
    assert np.abs(grads.router.w_CE).max() > 1e-3


@pytest.mark.parametrize("score_kind", SCORES)
@pytest.mark.parametrize("noise_kind", NOISES)
def test_the_z_loss_moves_the_common_offset_by_twice_the_mean_log_sum_exp(score_kind, noise_kind):
    cfg = config(score=score_kind, router_bias=True, noise=noise_kind, balance=(ZLoss(weight=0.3),))
    x_NC, params, noise = draw(cfg, 1)
    _, _, _, cache = layer.moe_forward(x_NC, params, cfg, noise)
    _, grads = layer.moe_backward(np.zeros((N, C)), 1.7, cache)
    judge = oracles.moe_layer(x_NC, params, cfg, noise)
    lse = [oracles.log_sum_exp(token.clean) for token in judge.tokens]
    close(grads.router.offset_E.sum(), 1.7 * 0.3 * 2.0 * np.mean(lse))


@pytest.mark.parametrize("score_kind", SCORES)
@pytest.mark.parametrize("weights", ["raw", "renormalized"])
def test_a_constant_on_all_logits_moves_only_the_z_loss_and_only_for_softmax(score_kind, weights):
    cfg = config(
        score=score_kind, gate_weights=weights, router_bias=True, balance=(SwitchLoss(weight=1.0),)
    )
    x_NC, params, _ = draw(cfg, 2)
    lifted = params._replace(
        router=params.router._replace(offset_E=params.router.offset_E + 1.5),
    )
    y, aux, dx, grads = both_ways(cfg, x_NC, params)
    y2, aux2, dx2, grads2 = both_ways(cfg, x_NC, lifted)
    if score_kind == "softmax":
        same((y, aux, dx, grads), (y2, aux2, dx2, grads2))
        assert abs(grads.router.offset_E.sum()) < 1e-12
    else:
        assert np.abs(y - y2).max() > 1e-2
        assert abs(aux - aux2) > 1e-3
        assert abs(grads.router.offset_E.sum()) > 1e-3
    only_z = dataclasses.replace(cfg, balance=(ZLoss(weight=1.0),))
    z, lifted_z = (both_ways(only_z, x_NC, p)[1] for p in (params, lifted))
    assert abs(z - lifted_z) > 0.1


# ------------------------------------------------------------------------------------- relabeling
def relabeled(params, noise, new, cfg):
    """Give the experts new numbers, everywhere."""
    columns = {"w_CE": 1, "noise_CE": 1, "bias_E": 0, "offset_E": 0}
    renamed = {
        name: np.take(w, new, axis=columns[name])
        for name, w in params.router._asdict().items()
        if w is not None
    }
    experts = tree.map(lambda w: w[new], params.experts)
    params = params._replace(router=params.router._replace(**renamed), experts=experts)
    if noise is not None and noise.shape[1] >= E and cfg.noise in NOISES[1:3]:
        noise = np.concatenate((noise[:, new], noise[:, E:]), 1)
    return params, noise


@pytest.mark.parametrize("start", range(0, 150, 30))
def test_relabeling_the_experts_of_any_system_without_groups_changes_nothing(start):
    new, compared = np.array([3, 0, 5, 1, 2, 4]), 0
    for cfg in RANDOM[start : start + 30]:
        if isinstance(cfg.selection, GroupLimited):
            continue
        x_NC, params, noise = draw(cfg, 5)
        other, other_noise = relabeled(params, noise, new, cfg)
        y, aux, dx, grads = both_ways(cfg, x_NC, params, noise)
        y2, aux2, dx2, grads2 = both_ways(cfg, x_NC, other, other_noise)
        same((y, aux, dx, grads.shared), (y2, aux2, dx2, grads2.shared), 1e-11)
        wanted, _ = relabeled(grads, None, new, cfg)
        same((wanted.router, wanted.experts), (grads2.router, grads2.experts), 1e-11)
        compared += 1
    assert compared >= 20


# --------------------------------------------------------------------------------------- causality
def earlier_outputs_move(cfg, seeds=12, tokens=24):
    """Change the last token; tell how far, over the seeds, the outputs before it move."""
    farthest = 0.0
    for seed in range(seeds):
        if isinstance(cfg.selection, SoftSlots):
            params = layer.init_moe(np.random.default_rng(seed), cfg, C, "float64")
            params = tree.map(lambda w: 3.0 * w, params)
            x_NC, noise = np.random.default_rng(seed).standard_normal((tokens, C)), None
        else:
            x_NC, params, noise = draw(cfg, seed, tokens)
        changed_NC = x_NC.copy()
        changed_NC[-1] = np.random.default_rng(100 + seed).standard_normal(C)
        before, after = (layer.moe_forward(x, params, cfg, noise)[0] for x in (x_NC, changed_NC))
        assert np.abs(before[-1] - after[-1]).max() > 1e-6 or cfg.capacity is not None
        farthest = max(farthest, np.abs(before[:-1] - after[:-1]).max())
    return farthest


BY_TOKEN = [
    {},
    {"top_k": 1},
    {"score": "sigmoid", "gate_scale": 2.5, "bias_rate": 0.1},
    {"score": "sqrt_softplus", "gate_on": "input"},
    {"selection": GroupLimited(groups=3, kept=2)},
    {"selection": SecondExpert()},
    {"selection": SecondExpert(policy="threshold"), "gate_weights": "renormalized_kept"},
    {"noise": GaussianNoise()},
    {"shared": Shared(hidden=3, gated=True)},
]
TOKEN_ORDER = [
    None,
    Capacity(factor=0.8),
    Capacity(factor=0.8, overflow="next_best"),
    Capacity(factor=0.8, group=5),
]


@pytest.mark.parametrize("limit", TOKEN_ORDER, ids=repr)
@pytest.mark.parametrize("parts", BY_TOKEN, ids=repr)
def test_no_output_depends_on_a_later_token_without_limit_or_in_token_order(parts, limit):
    assert earlier_outputs_move(config(**parts, capacity=limit)) < 1e-12


LOOKS_AHEAD = [
    {"capacity": Capacity(factor=0.8, priority="choice")},
    {"capacity": Capacity(factor=0.8, priority="choice", overflow="next_best")},
    {"capacity": Capacity(factor=0.8, priority="score")},
    {"top_k": 1, "capacity": Capacity(factor=0.8, priority="score")},
    {"selection": ExpertChoice()},
    {"selection": ExpertChoice(), "gate_weights": "renormalized_kept", "score": "sigmoid"},
    {"top_k": E, "selection": SoftSlots()},
    {"top_k": 1, "selection": Assignment()},
    {"selection": Sinkhorn()},
]


@pytest.mark.parametrize("parts", LOOKS_AHEAD, ids=repr)
def test_an_output_does_depend_on_a_later_token_where_tokens_compete(parts):
    cfg = config(**parts)
    assert earlier_outputs_move(cfg) > 1e-4
    if cfg.capacity is not None:  # competition ends at the border of a routing group
        grouped = dataclasses.replace(cfg.capacity, group=23)
        assert earlier_outputs_move(dataclasses.replace(cfg, capacity=grouped)) < 1e-12
