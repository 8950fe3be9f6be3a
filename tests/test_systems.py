"""Every composition of the parts against its judge: outputs, losses, places, rows, gradients."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import oracles
import pytest

from moe_numpy import presets, tree
from moe_numpy.config import (
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
from moe_numpy.moe import dispatch, layer, router, routing, score

N, C, E, F = 13, 5, 6, 3
SCORES = ("softmax", "sigmoid", "sqrt_softplus")
WEIGHTS = (None, "raw", "renormalized", "renormalized_kept")
NOISES = (None, LearnedNoise(), GaussianNoise(std=0.8), InputJitter(eps=0.3))
SELECTIONS = (
    None,
    SecondExpert(policy="random"),
    SecondExpert(policy="random", threshold=0.2),
    SecondExpert(policy="threshold", threshold=0.3),
    GroupLimited(groups=3, kept=2, score="max"),
    GroupLimited(groups=3, kept=2, score="top2"),
    Sinkhorn(),
    Sinkhorn(tolerance=1e-9, most=7),
    Assignment(),
    ExpertChoice(),
)
LIMITS = (
    None,
    Capacity(factor=0.7),
    Capacity(factor=0.6, priority="choice", rounding="floor", minimum=2),
    Capacity(factor=0.7, priority="score", group=5),
    Capacity(factor=0.7, priority="bpr", group=5),
    Capacity(factor=1.2, times_k=False, rounding="round", group=4),
    Capacity(factor=0.3, multiple=2, rounding="floor", priority="choice", group=7),
    Capacity(factor=0.7, overflow="next_best"),
    Capacity(factor=0.5, overflow="next_best", priority="choice", group=6),
    Capacity(factor=0.6, overflow="next_best", priority="score", times_k=False),
)
BALANCES = (
    (),
    (SwitchLoss(weight=0.7),),
    (SwitchLoss(weight=0.7, counted=1, divide=False), ZLoss(weight=0.2)),
    (SwitchLoss(weight=0.6, counted=4, group=5), ImportanceLoss(weight=0.3, of="probabilities")),
    (SwitchLoss(weight=0.5, divide=False, group=4),),
    (ImportanceLoss(weight=0.4), LoadLoss(weight=0.3)),
    (ZLoss(weight=0.3),),
)
KNOBS = {
    "top_k": (1, 2, 3),
    "activation": ("gelu_tanh", "swiglu"),
    "score": SCORES,
    "selection": SELECTIONS,
    "gate_weights": WEIGHTS,
    "gate_scale": (1.0, 2.5),
    "gate_on": ("output", "input"),
    "noise": NOISES,
    "capacity": LIMITS,
    "balance": BALANCES,
    "bias_rate": (0.0, 0.01),
    "shared": (None, Shared(hidden=4), Shared(hidden=4, gated=True)),
    "router_bias": (False, True),
    "expert_bias": (False, True),
}


def build(**knobs):
    """Configure a layer of these parts; None if the configuration refuses them."""
    group_free = any(isinstance(t, SwitchLoss) and t.group is None for t in knobs["balance"])
    knobs["bias_with_loss"] = bool(knobs["bias_rate"]) and group_free
    try:
        return MoEConfig(num_experts=E, hidden=F, **knobs)
    except ValueError:
        return None


def random_systems(seed, wanted):
    """Draw compositions until so many are valid; half of the knobs stay at their plain value."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < wanted:
        knobs = {
            name: values[int(rng.integers(len(values)))] if rng.random() < 0.6 else values[0]
            for name, values in KNOBS.items()
        }
        knobs["selection"] = SELECTIONS[len(found) % len(SELECTIONS)]
        cfg = build(**knobs)
        if cfg is not None:
            found.append(cfg)
    return found


def draw_noise(rng, cfg, tokens, width):
    """Draw the noise of a training step; None for a layer without any."""
    columns = []
    if isinstance(cfg.noise, InputJitter):
        columns.append(rng.uniform(-1.0, 1.0, (tokens, width)))
    elif cfg.noise is not None:
        columns.append(rng.standard_normal((tokens, cfg.num_experts)))
    if isinstance(cfg.selection, SecondExpert) and cfg.selection.policy == "random":
        columns.append(rng.random((tokens, 1)))
    return np.concatenate(columns, 1) if columns else None


def draw(cfg, seed, tokens=N):
    rng = np.random.default_rng(seed)
    params = oracles.draw_layer(rng, cfg, C)
    return rng.standard_normal((tokens, C)), params, draw_noise(rng, cfg, tokens, C)


@pytest.fixture
def plans(monkeypatch):
    """Collect the plan of every dispatch."""
    seen = []

    def spied(original):
        def spy(*arguments):
            seen.append(arguments[-1])
            return original(*arguments)

        return spy

    for name in ("dispatch_forward", "gated_dispatch_forward"):
        monkeypatch.setattr(dispatch, name, spied(getattr(dispatch, name)))
    return seen


def rows_of(plan):
    """List the (expert, token) of every row."""
    bounds = list(itertools.pairwise(plan.offsets))
    owner = [e for e, (start, end) in enumerate(bounds) for _ in range(end - start)]
    return sorted(zip(owner, plan.token_R.tolist(), strict=True))


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def agree(cfg, x_NC, params, noise, plans):
    """Compare everything that the layer returns with the judge; return the judge's findings."""
    plans.clear()
    y_NC, aux, report, _ = layer.moe_forward(x_NC, params, cfg, noise)
    judge = oracles.moe_layer(x_NC, params, cfg, noise)
    placed = [
        (e, n)
        for n, (names, fine) in enumerate(zip(judge.using, judge.accepted, strict=True))
        for e, got_place in zip(names, fine, strict=True)
        if got_place
    ]
    (plan,) = plans
    assert rows_of(plan) == sorted(placed), "other experts were chosen"
    close(y_NC, judge.y)
    close(aux, judge.aux)
    experts = cfg.num_experts
    assert report.load_E.tolist() == judge.count(experts, only_accepted=True)
    assert report.wished_E.tolist() == judge.count(experts, only_accepted=False)
    assert report.dropped == judge.dropped()
    close(report.decisiveness, np.mean([max(t.prob) for t in judge.tokens]))
    entropy = [-sum(p * np.log(p) for p in t.prob) for t in judge.tokens]
    close(report.gate_entropy, np.mean(entropy))
    return judge


# ---------------------------------------------------------------------------------- equality
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("selection", SELECTIONS, ids=repr)
def test_every_selection_agrees_with_the_judge_under_every_score_weight_and_limit(
    score, selection, plans
):
    seen = Counter()
    cycle = itertools.count()
    places = [range(len(values)) for values in (WEIGHTS, LIMITS, (1, 2, 3))]
    for at in itertools.product(*places):
        shared_out = (sum(at) + SCORES.index(score)) % 2  # some score has it
        if shared_out and not isinstance(selection, Assignment):
            continue
        turn = next(cycle)
        weights, limit, top_k = WEIGHTS[at[0]], LIMITS[at[1]], 1 + at[2]
        parts = {
            "top_k": top_k,
            "score": score,
            "selection": selection,
            "gate_weights": weights,
            "capacity": limit,
            "noise": NOISES[turn % len(NOISES)],
            "gate_on": ("output", "input")[turn % 2],
            "gate_scale": (1.0, 2.5)[turn // 2 % 2],
            "router_bias": bool(turn // 4 % 2),
        }
        cfg = build(
            **parts,
            balance=BALANCES[turn % len(BALANCES)],
            bias_rate=(0.0, 0.01)[turn // 3 % 2],
        ) or build(**parts, balance=BALANCES[-1], bias_rate=0.0)
        if cfg is None:
            continue
        x_NC, params, noise = draw(cfg, turn)
        agree(cfg, x_NC, params, None, plans)
        judge = agree(cfg, x_NC, params, noise, plans)
        seen["compared"] += 1
        seen["dropped"] += judge.dropped() > 0
        seen["moved"] += judge.rerouted() > 0
    assert seen["compared"] >= 3
    if not isinstance(selection, Assignment | ExpertChoice):
        assert seen["dropped"] >= 3
        assert seen["moved"] >= 3


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("terms", BALANCES, ids=repr)
def test_every_balance_term_agrees_with_the_judge_under_every_score(score, terms, plans):
    compared = 0
    for top_k, noise, rate, selection in itertools.product(
        (1, 2, 3), NOISES, (0.0, 0.01), (None, SELECTIONS[1], SELECTIONS[4])
    ):
        cfg = build(
            top_k=top_k,
            score=score,
            selection=selection,
            noise=noise,
            balance=terms,
            bias_rate=rate,
            gate_weights="raw" if top_k == 1 else None,
            capacity=LIMITS[compared % len(LIMITS)],
        )
        if cfg is not None:
            judge = agree(cfg, *draw(cfg, compared), plans)
            assert bool(terms) == (judge.aux > 0.0)
            compared += 1
    assert compared >= 4


RANDOM = random_systems(seed=3, wanted=150)


@pytest.mark.parametrize("number", range(0, len(RANDOM), 10))
def test_random_compositions_agree_with_the_judge(number, plans):
    for each in range(number, number + 10):
        alone = isinstance(RANDOM[each].selection, Sinkhorn)  # one token makes all experts equal
        for tokens in (N, 2 * E, 2 if alone else 1):
            x_NC, params, noise = draw(RANDOM[each], 1000 + each, tokens)
            agree(RANDOM[each], x_NC, params, noise, plans)
        agree(RANDOM[each].evaluation(), x_NC, params, None, plans)


def test_the_random_compositions_use_every_value_of_every_knob():
    for name, values in KNOBS.items():
        assert {repr(getattr(cfg, name)) for cfg in RANDOM} == {repr(v) for v in values}, name


def slope(value, leaves, i, direction, h=1e-4):
    """Differentiate along one direction of leaf i by four-point central differences."""

    def moved(step):
        return value([x + step * direction if j == i else x for j, x in enumerate(leaves)])

    return (8.0 * (moved(h) - moved(-h)) - (moved(2.0 * h) - moved(-2.0 * h))) / (12.0 * h)


def gradients_and_value(cfg, x_NC, params, noise, rng):
    """Weigh y and aux at random: return the gradients, and the function that they belong to."""
    dy_NC, daux = rng.standard_normal(x_NC.shape), 1.7
    *_, cache = layer.moe_forward(x_NC, params, cfg, noise)

    def value(leaves):
        moved = tree.from_leaves((x_NC, params), leaves)
        y_NC, aux, *_ = layer.moe_forward(*moved, cfg, noise)
        return (dy_NC * y_NC).sum() + daux * aux

    return layer.moe_backward(dy_NC, daux, cache), value


@pytest.mark.parametrize("number", range(0, 50, 10))
def test_gradients_of_random_compositions_are_the_slopes_of_what_the_judge_confirmed(number, plans):
    compared = skipped = 0
    for each in range(number, number + 10):
        cfg, rng = RANDOM[each], np.random.default_rng(each)
        x_NC, params, noise = draw(cfg, 1000 + each)
        gradients, value = gradients_and_value(cfg, x_NC, params, noise, rng)
        arguments = (x_NC, params)
        for i, (name, leaf) in enumerate(tree.named_leaves(arguments)):
            direction = rng.standard_normal(leaf.shape)
            got = (tree.leaves(gradients)[i] * direction).sum()
            if name.endswith("bias_E") and "router" in name:
                assert got == 0.0
                continue
            plans.clear()
            wanted = slope(value, tree.leaves(arguments), i, direction)
            if len({str(rows_of(plan)) for plan in plans}) > 1:
                skipped += 1
                continue
            assert abs(got - wanted) < 1e-8 * (1.0 + abs(wanted)), f"{cfg}: {name}: {got}, {wanted}"
            compared += 1
    assert compared > 10 * skipped


@pytest.mark.parametrize("number", range(0, 60, 10))
def test_noise_is_drawn_in_the_shape_that_the_judge_reads(number):
    for each in range(number, number + 10):
        cfg = RANDOM[each]
        wanted = draw_noise(np.random.default_rng(0), cfg, N, C)
        got = router.draw_noise(np.random.default_rng(0), cfg, N, C, "float64")
        assert np.shape(got) == np.shape(wanted)


# ------------------------------------------------------------------------------- the named systems
@pytest.mark.parametrize("name", presets.names())
def test_the_layer_of_every_preset_agrees_with_the_judge(name, plans):
    cfg = presets.tiny(name).moe
    if cfg is None or isinstance(cfg.selection, Hierarchy | SoftSlots):
        pytest.skip("judged with its own selection")
    tokens = 80  # more than a routing group of 64
    if isinstance(cfg.selection, Assignment):
        tokens = 2 * cfg.num_experts  # the judge tries them all
    narrow = cfg.shared and dataclasses.replace(cfg.shared, hidden=F + 1)
    cfg = dataclasses.replace(cfg, hidden=F, shared=narrow)
    x_NC, params, noise = draw(cfg, 0, tokens)
    agree(cfg, x_NC, params, noise, plans)
    agree(cfg.evaluation(), x_NC, params, None, plans)


def test_a_switch_loss_that_counts_more_than_the_kept_groups_hold_is_refused():
    parts = {"num_experts": E, "top_k": 2, "hidden": F, "selection": GroupLimited(groups=3, kept=2)}
    MoEConfig(**parts, balance=(SwitchLoss(counted=4),))
    with pytest.raises(ValueError, match=r"at most the 4 experts of kept groups, got \[5\]"):
        MoEConfig(**parts, balance=(SwitchLoss(counted=5),))


# ---------------------------------------------------------------- the judge against brute force
def test_the_judges_assignment_is_the_best_of_all_balanced_ones():
    for seed, tokens in itertools.product(range(3), (3, 4, 6, 7)):
        value = np.random.default_rng(seed).standard_normal((tokens, 3)).tolist()
        least, extra = divmod(tokens, 3)
        found = []
        for names in itertools.product(range(3), repeat=tokens):
            loads = sorted(names.count(e) for e in range(3))
            if loads == sorted([least + 1] * extra + [least] * (3 - extra)):
                found.append((sum(value[n][e] for n, e in enumerate(names)), list(names)))
        assert oracles.best_assignment(value, 3) == max(found)[1]


def test_the_judges_sinkhorn_scaling_ends_with_equal_columns():
    rng = np.random.default_rng(0)
    logits = (2.0 * rng.standard_normal((40, 5)) + [3.0, 0, 0, 0, -3]).tolist()
    tokens = [oracles.Token(z, z, None, z, z, oracles.rank(z)) for z in logits]
    first = Counter(r[0] for r in oracles.sinkhorn_rankings(tokens, Sinkhorn(tolerance=1e-12)))
    plain = Counter(token.ranking[0] for token in tokens)
    assert max(plain.values()) > 2 * max(first.values())


# -------------------------------------------------------------------------------- small scores
LOW = [("sqrt_softplus", z) for z in (-46.0, -79.0, -85.0, -91.0, -120.0, -137.0, -200.0)]
LOW += [("sigmoid", z) for z in (-46.0, -48.0, -69.0, -75.0, -79.0, -85.0, -110.0)]


@pytest.mark.parametrize(("kind", "z"), LOW)
def test_shares_of_tiny_scores_have_the_gradient_of_their_differences(kind, z):
    logit_NE = np.array([[z, z - 0.5, z - 2.0]])
    dshare_NE = np.array([[1.0, -0.3, 0.2]])

    def value(logit_NE):
        score_NE, _ = score.score_forward(kind, logit_NE)
        return (score.share_forward(score_NE)[0] * dshare_NE).sum()

    score_NE, score_cache = score.score_forward(kind, logit_NE)
    _, share_cache = score.share_forward(score_NE)
    found_NE = score.score_backward(score.share_backward(dshare_NE, share_cache), score_cache)
    step = 1e-4
    wanted = [(value(logit_NE + step * e) - value(logit_NE - step * e)) / (2 * step) for e in I3]
    assert found_NE[0] == pytest.approx(wanted, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("z", [-60.0, -85.0, -95.0, -103.0, -200.0])
def test_the_slope_of_a_tiny_score_is_half_of_it_in_float32_too(z):
    y, cache = score.sqrt_softplus_forward(np.full(1, z, "float32"))
    assert score.sqrt_softplus_backward(np.ones(1, "float32"), cache) == pytest.approx(y / 2)


def test_second_experts_of_scores_that_are_zero_are_decided_without_a_warning():
    cfg = MoEConfig(
        num_experts=3, top_k=2, hidden=2, score="sqrt_softplus", selection=SecondExpert()
    )
    zero_NE = np.zeros((5, 3), "float32")
    with np.errstate(all="raise"):
        _, asked_NK = routing.choose_experts(zero_NE, zero_NE, cfg)
    assert asked_NK[:, 0].all()


I3 = np.eye(3)
