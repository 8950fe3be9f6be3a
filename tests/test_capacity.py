"""Places: who gets one, in which order, what happens to the others, and who may look ahead."""

import numpy as np
import oracles
import pytest

from moe_numpy.config import (
    PRIORITIES,
    Capacity,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    MoEConfig,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe import capacity, layer, router
from moe_numpy.tree import leaves

OVERFLOWS = ("drop", "next_best")
POLICIES = [(overflow, priority) for overflow in OVERFLOWS for priority in PRIORITIES]


def draw_routing(seed, N=23, E=5, K=2, levels=None):
    """Draw logits (of only so many `levels`, for ties) and what the router chooses."""
    rng = np.random.default_rng(seed)
    score_NE = rng.standard_normal((N, E)) + rng.standard_normal(E)
    if levels:
        score_NE = rng.integers(0, levels, (N, E)).astype(float)
    prob_NE = np.array([oracles.softmax(z) for z in score_NE.tolist()])
    wished_NK = np.array([oracles.rank(z)[:K] for z in score_NE.tolist()]).reshape(N, K)
    return wished_NK, score_NE, prob_NE


def accepted(plan):
    return plan.slot_NK < plan.token_R.size


@pytest.mark.parametrize(("overflow", "priority"), POLICIES)
@pytest.mark.parametrize("K", [1, 2, 4])
def test_places_are_given_as_in_the_queue_of_the_judge_even_with_ties(overflow, priority, K):
    lost = moved = 0
    for seed in range(12):
        levels = 3 if seed % 2 else None
        wished_NK, score_NE, prob_NE = draw_routing(seed, E=4, K=K, levels=levels)
        cfg = Capacity(factor=0.8, overflow=overflow, priority=priority, rounding="floor")
        expert_NK, plan = capacity.make_plan(wished_NK, score_NE, prob_NE, cfg)
        rankings = [oracles.rank(z) for z in score_NE.tolist()]
        places = oracles.places_of(cfg, 23, K, 4)
        using, fine = oracles.seat(
            wished_NK.tolist(), rankings, prob_NE.tolist(), places, overflow, priority
        )
        assert expert_NK.tolist() == using
        assert accepted(plan).tolist() == fine
        lost += sum(not got for row in fine for got in row)
        moved += (expert_NK != wished_NK).sum()
    assert lost > 0, "the capacity was not tight enough to test anything"
    assert (moved > 0) == (overflow == "next_best" and K < 4)


@pytest.mark.parametrize("limit", [None, Capacity(factor=1e5)])
@pytest.mark.parametrize("E", [2**16 - 1, 2**16, 2**16 + 2])
def test_more_experts_than_16_bits_can_number_are_sorted_all_the_same(E, limit):
    wished_NK = np.array([[E - 1, 0], [1, E - 2], [0, E - 1]])
    prob_NE = np.full((3, E), 1 / E)
    expert_NK, plan = capacity.make_plan(wished_NK, prob_NE, prob_NE, limit)
    assert expert_NK.reshape(-1)[plan.choice_R].tolist() == [0, 0, 1, E - 2, E - 1, E - 1]
    assert plan.choice_R.tolist() == [1, 4, 2, 3, 0, 5]
    assert plan.offsets[:3] == (0, 2, 3) and plan.offsets[-3:] == (3, 4, 6)


def test_score_order_serves_the_surest_choice_first():
    # One place with each of two experts; both tokens want 0, then 1. Token 1 is surer of expert 0.
    wished_NK = np.array([[0, 1], [0, 1]])
    prob_NE = np.array([[0.6, 0.4], [0.9, 0.1]])
    cfg = Capacity(factor=0.5, priority="score")
    _, plan = capacity.make_plan(wished_NK, np.log(prob_NE), prob_NE, cfg)
    assert accepted(plan).tolist() == [[False, True], [True, False]]


def test_batch_prioritized_routing_orders_tokens_by_their_best_and_serves_first_choices_first():
    # One place with each of four experts. Token 1 is the surest; its second choice is surer than
    # the first choice of token 2, which goes first all the same.
    wished_NK = np.array([[0, 1], [0, 2], [2, 3]])
    prob_NE = np.array([[0.5, 0.3, 0.1, 0.1], [0.55, 0.0, 0.45, 0.0], [0.1, 0.2, 0.4, 0.3]])
    plans = {}
    for priority in ("bpr", "score"):
        cfg = Capacity(factor=2 / 3, priority=priority)
        _, plan = capacity.make_plan(wished_NK, np.log(prob_NE + 1e-9), prob_NE, cfg)
        plans[priority] = accepted(plan).tolist()
    assert plans["bpr"] == [[False, True], [True, False], [True, True]]
    assert plans["score"] == [[False, True], [True, True], [False, True]]


def test_token_order_serves_second_choices_before_later_first_choices_and_choice_order_after():
    wished_NK = np.array([[0, 1], [1, 0]])
    prob_NE = np.array([[0.6, 0.4], [0.2, 0.8]])
    by_priority = {}
    for priority in ("token", "choice"):
        cfg = Capacity(factor=0.5, priority=priority)
        _, plan = capacity.make_plan(wished_NK, np.log(prob_NE), prob_NE, cfg)
        by_priority[priority] = accepted(plan).tolist()
    assert by_priority["token"] == [[True, True], [False, False]]
    assert by_priority["choice"] == [[True, False], [True, False]]


def test_equal_scores_queue_in_the_order_of_tokens_and_then_of_choices():
    wished_NK = np.array([[0, 1], [0, 1], [1, 0]])
    prob_NE = np.full((3, 2), 0.5)
    cfg = Capacity(factor=1 / 3, priority="score")  # one place each
    _, plan = capacity.make_plan(wished_NK, np.zeros((3, 2)), prob_NE, cfg)
    assert accepted(plan).tolist() == [[True, True], [False, False], [False, False]]


def test_a_full_expert_sends_its_choice_down_the_ranking_past_what_the_token_uses():
    score_NE = np.array([[9.0, 1, 0, 0], [9, 8, 3, 3], [9, 8, 3, 3], [8, 9, 3, 2]])
    wished_NK = np.array([[0, 1], [0, 1], [0, 1], [1, 0]])
    prob_NE = np.array([oracles.softmax(z) for z in score_NE.tolist()])
    cfg = Capacity(factor=1.0, overflow="next_best")  # two places each
    expert_NK, plan = capacity.make_plan(wished_NK, score_NE, prob_NE, cfg)
    assert expert_NK.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert accepted(plan).all()


def test_a_choice_that_finds_no_room_anywhere_keeps_its_expert_for_the_gate():
    wished_NK, score_NE, prob_NE = draw_routing(0, N=9, E=3, K=2)
    cfg = Capacity(factor=0.4, overflow="next_best")
    expert_NK, plan = capacity.make_plan(wished_NK, score_NE, prob_NE, cfg)
    lost_NK = ~accepted(plan)
    assert lost_NK.any()
    assert (expert_NK[lost_NK] == wished_NK[lost_NK]).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("overflow", "priority"), POLICIES)
def test_plan_invariants_hold_on_random_routings(overflow, priority, seed):
    rng = np.random.default_rng(seed)
    N, E = int(rng.integers(1, 40)), int(rng.integers(2, 9))
    K = int(rng.integers(1, E + 1))
    wished_NK, score_NE, prob_NE = draw_routing(seed, N, E, K, levels=4 if seed % 3 == 0 else None)
    cfg = Capacity(factor=float(rng.uniform(0.2, 1.5)), overflow=overflow, priority=priority)
    P = cfg.places(N, K, E)
    given = wished_NK.copy()
    expert_NK, plan = capacity.make_plan(wished_NK, score_NE, prob_NE, cfg)
    assert (wished_NK == given).all(), "the router's wish was overwritten"
    R = plan.token_R.size
    expert_R = expert_NK.reshape(-1)[plan.choice_R]
    assert (np.diff(expert_R) >= 0).all(), "rows are not sorted by expert"
    assert (np.diff(plan.choice_R)[np.diff(expert_R) == 0] > 0).all(), "nor then by choice"
    assert len(plan.offsets) == E + 1
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == R
    load_E = np.diff(plan.offsets)
    assert load_E.tolist() == np.bincount(expert_R, minlength=E).tolist()
    assert load_E.max() <= P
    slots = plan.slot_NK[accepted(plan)]
    assert sorted(slots.tolist()) == list(range(R)), "a place was used twice or not at all"
    assert (plan.slot_NK[~accepted(plan)] == R).all()
    assert (plan.slot_NK.reshape(-1)[plan.choice_R] == np.arange(R)).all()
    assert (plan.token_R == plan.choice_R // K).all()
    assert load_E.sum() + (~accepted(plan)).sum() == N * K
    assert all(len(set(names)) == K for names in expert_NK.tolist())
    for n, k in zip(*np.nonzero(~accepted(plan)), strict=True):
        assert load_E[expert_NK[n, k]] == P, "dropped although its expert has room"
        if overflow == "next_best":
            others = set(expert_NK[n].tolist())
            assert all(load_E[e] == P or e in others for e in range(E)), "dropped too early"


def test_ample_capacity_is_the_same_as_no_limit():
    wished_NK, score_NE, prob_NE = draw_routing(3)
    free_NK, free = capacity.make_plan(wished_NK, score_NE, prob_NE, None)
    for overflow, priority in POLICIES:
        cfg = Capacity(factor=5.0, overflow=overflow, priority=priority)
        expert_NK, plan = capacity.make_plan(wished_NK, score_NE, prob_NE, cfg)
        assert (expert_NK == free_NK).all()
        assert all(np.array_equal(a, b) for a, b in zip(plan, free, strict=True))


@pytest.mark.parametrize(
    ("knobs", "tokens", "top_k", "experts", "places"),
    [
        ({"factor": 1.25}, 16, 1, 4, 5),
        ({"factor": 1.25}, 16, 2, 4, 10),
        ({"factor": 1.1}, 100, 1, 10, 11),  # not 12, although 1.1 * 10 > 11 in binary
        ({"factor": 1.0, "rounding": "ceil"}, 10, 1, 4, 3),
        ({"factor": 1.0, "rounding": "floor"}, 10, 1, 4, 2),
        ({"factor": 1.0, "rounding": "round"}, 11, 1, 4, 3),
        ({"factor": 1.0, "rounding": "round"}, 9, 1, 4, 2),
        ({"factor": 1.0, "rounding": "round"}, 10, 1, 4, 2),  # a half goes to the even number
        ({"factor": 1.0, "rounding": "round"}, 14, 1, 4, 4),
        ({"factor": 1.0, "minimum": 4}, 8, 1, 4, 4),
        ({"factor": 1e-7, "rounding": "ceil"}, 8, 1, 8, 1),
        ({"factor": 0.01, "rounding": "floor"}, 8, 1, 8, 0),
        ({"factor": 1.25}, 0, 1, 4, 0),
    ],
)
def test_places_are_the_rounded_share_of_an_expert(knobs, tokens, top_k, experts, places):
    got = Capacity(**knobs).places(tokens, top_k, experts)
    assert got == places == oracles.places_of(Capacity(**knobs), tokens, top_k, experts)
    assert isinstance(got, int)


# ------------------------------------------------------------------------------- valid extremes
TERMS = (SwitchLoss(), ImportanceLoss(), LoadLoss(), ZLoss())


def run(x_NC, params, cfg, noise, seed=1):
    """Run forward and backward; check shapes, dtypes, and that every number is finite."""
    y_NC, aux, report, cache = layer.moe_forward(x_NC, params, cfg, noise)
    dy_NC = np.random.default_rng(seed).standard_normal(x_NC.shape)
    dx_NC, grads = layer.moe_backward(dy_NC, 1.3, cache)
    assert y_NC.shape == dx_NC.shape == x_NC.shape
    assert np.ndim(aux) == 0
    assert type(grads) is type(params)
    for leaf, grad in zip(leaves(params), leaves(grads), strict=True):
        assert leaf.shape == grad.shape
        assert np.isfinite(grad).all()
    assert all(np.isfinite(part).all() for part in (y_NC, aux, dx_NC, *report))
    assert report.load_E.sum() + report.dropped == x_NC.shape[0] * cfg.top_k
    return y_NC, dx_NC, grads, report


LIMITS = [None, *(Capacity(factor=0.7, overflow=o, priority=p) for o, p in POLICIES)]


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("limit", LIMITS)
def test_no_token_and_one_token_run_forward_and_backward(tokens, limit):
    for k, kind in [(1, None), (2, None), (2, "raw"), (2, "renormalized")]:
        cfg = MoEConfig(
            num_experts=4,
            top_k=k,
            hidden=3,
            gate_weights=kind,
            noise=LearnedNoise(),
            capacity=limit,
            balance=TERMS,
        )
        rng = np.random.default_rng(k)
        params = oracles.draw_layer(rng, cfg, 5)
        noise = router.draw_noise(rng, cfg, tokens, 5, "float64")
        x_NC = rng.standard_normal((tokens, 5))
        run(x_NC, params, cfg, noise)
        run(x_NC, params, cfg, None)
        jittered = MoEConfig(num_experts=4, top_k=k, hidden=3, noise=InputJitter(), capacity=limit)
        run(x_NC, params, jittered, router.draw_noise(rng, jittered, tokens, 5, "float64"))


@pytest.mark.parametrize("limit", LIMITS)
def test_all_tokens_to_one_expert_run_forward_and_backward(limit):
    cfg = MoEConfig(num_experts=4, top_k=1, hidden=3, capacity=limit, balance=(SwitchLoss(),))
    rng = np.random.default_rng(0)
    params = oracles.draw_layer(rng, cfg, 5)
    params.router.w_CE[:] = 0.0
    params.router.w_CE[0, 2] = 40.0
    x_NC = rng.standard_normal((9, 5))
    x_NC[:, 0] = 1.0
    _, _, grads, report = run(x_NC, params, cfg, None)
    assert report.wished_E.tolist() == [0, 0, 9, 0]
    if limit is None:
        assert report.load_E.tolist() == [0, 0, 9, 0]
        for e in (0, 1, 3):
            assert not any(leaf[e].any() for leaf in leaves(grads.experts))


@pytest.mark.parametrize(("overflow", "priority"), POLICIES)
@pytest.mark.parametrize("kind", ["raw", "renormalized"])
def test_a_capacity_without_any_place_drops_every_token(overflow, priority, kind):
    limit = Capacity(factor=0.01, rounding="floor", overflow=overflow, priority=priority)
    cfg = MoEConfig(num_experts=4, top_k=2, hidden=3, gate_weights=kind, capacity=limit)
    rng = np.random.default_rng(5)
    params = oracles.draw_layer(rng, cfg, 5)
    y_NC, dx_NC, grads, report = run(rng.standard_normal((7, 5)), params, cfg, None)
    assert report.dropped == 14
    assert not y_NC.any()
    assert not dx_NC.any()
    assert not any(leaf.any() for leaf in leaves(grads))


# ------------------------------------------------------------------------------------ causality
def earlier_outputs_move(seed, k, limit, gate_weights=None):
    """Change the last 8 of 24 tokens; tell how far the first 16 outputs move."""
    cfg = MoEConfig(num_experts=4, top_k=k, hidden=3, gate_weights=gate_weights, capacity=limit)
    rng = np.random.default_rng(seed)
    params = oracles.draw_layer(rng, cfg, 5)
    x_NC = rng.standard_normal((24, 5))
    changed_NC = np.concatenate((x_NC[:16], rng.standard_normal((8, 5))))
    before, _, _, _ = layer.moe_forward(x_NC, params, cfg)
    after, _, _, _ = layer.moe_forward(changed_NC, params, cfg)
    assert np.abs(before[16:] - after[16:]).max() > 0.1
    return np.abs(before[:16] - after[:16]).max()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    "limit", [None, *(Capacity(factor=0.8, overflow=o, priority="token") for o in OVERFLOWS)]
)
def test_later_tokens_do_not_matter_without_limit_or_when_served_token_by_token(k, limit):
    for seed in range(10):
        for kind in ("raw", "renormalized"):
            assert earlier_outputs_move(seed, k, limit, kind) < 1e-12


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize(("priority", "k"), [("choice", 2), ("score", 1), ("score", 2)])
def test_later_tokens_do_take_places_away_by_choice_order_and_by_score(overflow, priority, k):
    limit = Capacity(factor=0.8, overflow=overflow, priority=priority)
    moved = [earlier_outputs_move(seed, k, limit) > 1e-3 for seed in range(10)]
    assert any(moved)


def test_a_dropped_choice_is_not_taken_for_the_first_of_65536_experts():
    E = 2**16
    prob_NE = np.full((2, E), 1.0 / E)
    _, plan = capacity.make_plan(np.array([[3], [3]]), prob_NE, prob_NE, Capacity(factor=1.0))
    assert plan.kept_NK.tolist() == [[True], [False]] and plan.choice_R.tolist() == [0]
