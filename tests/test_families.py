"""Whole routing families against their judges: hierarchy, soft slots, shared expert, 1991."""

import dataclasses
import inspect

import numpy as np
import oracles
import oracles_families as judges
import pytest
from test_names import watch

from moe_numpy import tree
from moe_numpy.classroom import cases_systems, gradcheck, registry, slopes
from moe_numpy.config import (
    ACTIVATIONS,
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
from moe_numpy.moe import hierarchy, hierarchy_balance, hierarchy_gates, jacobs, layer, shared, soft
from moe_numpy.ops import softmax

N, C, E, F, O, V = 13, 5, 12, 7, 8, 11
G, P, K = 3, 4, 6  # of a hierarchy: groups, experts of a group, choices
CASES = cases_systems.CASES
NOISES = (None, LearnedNoise(), GaussianNoise(std=0.8), InputJitter(eps=0.3))
LIMITS = (
    None,
    Capacity(factor=0.6),
    Capacity(factor=0.6, priority="choice"),
    Capacity(factor=0.8, overflow="next_best"),
    Capacity(factor=0.7, overflow="next_best", priority="score"),
)
TERMS = (SwitchLoss(weight=0.7), ImportanceLoss(weight=0.4), ZLoss(weight=0.2))


def close(found, expected, tolerance=1e-12):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    size = max(1e-300, np.abs(expected).max(initial=0.0))
    assert np.abs(found - expected).max(initial=0.0) <= tolerance * size


# --------------------------------------------------------------------------------------- hierarchy
def forest(**changes):
    sizes = {"num_experts": E, "top_k": K, "hidden": F, "selection": Hierarchy(groups=G, kept=2)}
    return MoEConfig(**sizes | changes)


def draw_forest(seed, cfg, tokens=N, dtype="float64"):
    """Draw tokens, generic parameters, and noise in the columns that `draw_noise` promises."""
    rng = np.random.default_rng(seed)
    params = hierarchy.init_hierarchy(rng, cfg, C, dtype)
    params = tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), params)
    columns = C if isinstance(cfg.noise, InputJitter) else E + cfg.selection.groups
    noise = None if cfg.noise is None else rng.standard_normal((tokens, columns)).astype(dtype)
    return rng.standard_normal((tokens, C)).astype(dtype), params, noise


def agree(x_NC, params, cfg, noise):
    """Hold everything that the route returns against the judge, and return the judge."""
    gate_NK, aux, plan, report, _ = hierarchy.hierarchical_route_forward(x_NC, params, cfg, noise)
    judge = judges.Tree(x_NC, params, cfg, noise)
    close(gate_NK, np.array(judge.gates) * cfg.gate_scale)
    close(aux, judge.aux())
    assert plan.kept_NK.tolist() == judge.accepted
    row_expert = np.repeat(np.arange(E), np.diff(plan.offsets))
    for (n, k), row in np.ndenumerate(plan.slot_NK):
        if judge.accepted[n][k]:
            assert (row_expert[row], plan.token_R[row]) == (judge.using[n][k], n)
    assert report.wished_E.tolist() == judge.counts(judge.wished)
    assert report.dropped == sum(not fine for row in judge.accepted for fine in row)
    probs = [judge.prob(n) for n in range(len(x_NC))]
    close(report.decisiveness, np.mean([max(p) for p in probs]))
    close(report.gate_entropy, np.mean([-sum(v * np.log(v) for v in p) for p in probs]))
    return judge


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("noise", NOISES)
def test_a_hierarchy_agrees_with_its_judge(noise, limit):
    normal = isinstance(noise, LearnedNoise | GaussianNoise)
    terms = (*TERMS, LoadLoss(weight=0.5)) if normal else TERMS
    cfg = forest(noise=noise, capacity=limit, balance=terms, gate_scale=1.7)
    x_NC, params, drawn = draw_forest(1, cfg)
    judge = agree(x_NC, params, cfg, drawn)
    if limit is not None:
        moved = judge.using != judge.wished
        assert moved if limit.overflow == "next_best" else not all(map(all, judge.accepted))
    agree(x_NC, params, cfg, None)


@pytest.mark.parametrize(
    ("groups", "kept", "k"), [(2, 1, 1), (2, 2, 2), (3, 1, 4), (6, 3, 6), (12, 5, 5), (3, 3, E)]
)
def test_a_hierarchy_of_any_shape_agrees_with_its_judge(groups, kept, k):
    switch, importance, z = TERMS  # a lone gate is 1, so its importance has no effect: refused
    terms = TERMS if k > 1 else (switch, dataclasses.replace(importance, of="probabilities"), z)
    cfg = forest(selection=Hierarchy(groups=groups, kept=kept), top_k=k, balance=terms)
    x_NC, params, _ = draw_forest(2, cfg)
    judge = agree(x_NC, params, cfg, None)
    close([sum(gates) for gates in judge.gates], np.ones(N))


@pytest.mark.parametrize("counted", [None, 1, 6])
@pytest.mark.parametrize(("divide", "group"), [(True, None), (False, 5)])
def test_the_other_balance_terms_of_a_hierarchy_agree_with_its_judge(counted, divide, group):
    switch = SwitchLoss(weight=0.7, counted=counted, divide=divide, group=group)
    clean = ImportanceLoss(weight=0.3, of="probabilities")
    cfg = forest(noise=GaussianNoise(std=0.9), balance=(switch, clean))
    agree(*draw_forest(3, cfg)[:2], cfg, draw_forest(3, cfg)[2])


def test_ties_go_to_the_lower_group_and_the_lower_expert():
    cfg = forest(balance=TERMS)
    x_NC, params, _ = draw_forest(4, cfg)
    params = tree.map(lambda w: np.round(w), params)
    x_NC = np.round(x_NC)
    judge = agree(x_NC, params, cfg, None)
    tied = sum(len(set(level.noisy)) < G for level in judge.top)
    assert tied > 3
    zero = tree.map(np.zeros_like, params)
    assert agree(x_NC, zero, cfg, None).wished == [[0, 1, 2, P, P + 1, P + 2]] * N


def test_with_everything_chosen_the_gates_are_the_probabilities():
    cfg = forest(selection=Hierarchy(groups=G, kept=G), top_k=E)
    x_NC, params, _ = draw_forest(5, cfg)
    gate_NK, *_ = hierarchy.hierarchical_route_forward(x_NC, params, cfg)
    logits = (x_NC @ params.primary.w_CE, x_NC @ params.secondary.w_CE)
    chosen_NK = hierarchy.hierarchical_choice(*logits, G, E)
    prob_NE = np.exp(hierarchy_gates.hierarchical_log_softmax_forward(*logits)[0])
    close(gate_NK, np.take_along_axis(prob_NE, chosen_NK, 1))
    close(prob_NE.sum(1), np.ones(N))


def test_the_load_of_a_group_without_tokens_is_zero_and_the_others_agree_with_the_judge():
    cfg = forest(noise=GaussianNoise(std=0.9), balance=(LoadLoss(weight=1.0),))
    x_NC, params, noise = draw_forest(6, cfg)
    x_NC[:, 0] = 1.0
    params.primary.w_CE[0, 2] = -50.0
    judge = agree(x_NC, params, cfg, noise)
    load = np.array(judge.load())
    assert not load[2 * P : 3 * P].any()
    assert (np.delete(load, range(2 * P, 3 * P)) > 0).all()
    levels = [
        hierarchy_balance.Level(*(np.array([getattr(row, f) for row in rows]) for f in FIELDS))
        for rows in (judge.top, judge.low)
    ]
    close(hierarchy_balance.hierarchical_load_forward(*levels, 2, 3)[0], load)


FIELDS = ("clean", "noisy", "scale")


def test_the_hierarchical_load_adds_up_to_about_all_choices_and_teaches_the_primary_router():
    """With even clean logits, the expected load of an expert is N K / E."""
    tokens = 4000
    rng = np.random.default_rng(7)
    noise_NG, noise_NE = rng.standard_normal((tokens, G)), rng.standard_normal((tokens, E))
    levels = [hierarchy_balance.Level(0 * z, z, 1 + 0 * z) for z in (noise_NG, noise_NE)]
    load_E, cache = hierarchy_balance.hierarchical_load_forward(*levels, 2, 3)
    assert abs(load_E / (tokens * K / E) - 1).max() < 0.03
    dprimary, _ = hierarchy_balance.hierarchical_load_backward(np.arange(E) * 1.0, cache)
    assert dprimary.clean_NE.any()


# -------------------------------------------------------------------------------------- soft slots
def slotted(experts=4, slots=2):
    return MoEConfig(num_experts=experts, top_k=experts, hidden=F, selection=SoftSlots(slots=slots))


def draw_slots(seed, experts=4, slots=2, dtype="float64"):
    rng = np.random.default_rng(seed)
    params = soft.init_soft(rng, slotted(experts, slots), C, dtype)
    assert params.slots_CR.shape == (C, experts * slots)
    assert params.scale == 1
    params = params._replace(scale=np.asarray(3.0, dtype))
    return rng.standard_normal((N, C)).astype(dtype), params


@pytest.mark.parametrize(("experts", "slots"), [(4, 2), (5, 1), (1, 3)])
def test_soft_slots_agree_with_their_judge(experts, slots):
    x_NC, params = draw_slots(0, experts, slots)
    x_NC[2] = 0.0  # a token without a direction
    x_RC, combine_NR, _ = soft.soft_slots_forward(x_NC, params)
    inputs, weights = judges.soft_slots(x_NC, params.slots_CR, 3.0)
    close(x_RC, inputs)
    close(combine_NR, weights)


def test_a_slot_is_a_mean_of_tokens_and_a_token_a_mean_of_slots():
    x_NC, params = draw_slots(1)
    x_RC, combine_NR, _ = soft.soft_slots_forward(np.ones_like(x_NC), params)
    close(x_RC, np.ones_like(x_RC))
    close(combine_NR.sum(1), np.ones(N))


def test_soft_slots_mix_every_token_into_every_other_and_do_not_know_their_order():
    x_NC, params = draw_slots(2)
    x_RC, combine_NR, _ = soft.soft_slots_forward(x_NC, params)
    new = np.random.default_rng(0).permutation(N)
    x_again_RC, combine_again_NR, _ = soft.soft_slots_forward(x_NC[new], params)
    close(x_RC, x_again_RC)
    close(combine_NR[new], combine_again_NR)
    x_NC[-1] += 1.0
    assert (soft.soft_slots_forward(x_NC, params)[0] != x_RC).all(), "the last token is in all"


def test_the_length_of_a_token_and_of_a_slot_does_not_matter_to_the_mixing():
    x_NC, params = draw_slots(3)
    longer = params._replace(slots_CR=1e6 * params.slots_CR)
    exact = params._replace(slots_CR=1e9 * params.slots_CR)
    weights = [soft.soft_slots_forward(1e6 * x_NC, p)[1] for p in (longer, exact)]
    close(*weights)


def test_the_report_of_soft_slots_counts_slots_and_knows_both_extremes():
    even_NR = np.full((N, 6), 1 / 6)
    report = soft.soft_report(even_NR, 3)
    assert report.wished_E.tolist() == report.load_E.tolist() == [2, 2, 2]
    assert report.dropped == 0
    close([report.decisiveness, report.gate_entropy], [1 / 3, np.log(3)])
    sure_NR = np.zeros((N, 6))
    sure_NR[:, 2:4] = 0.5
    report = soft.soft_report(sure_NR, 3)
    assert (report.decisiveness, report.gate_entropy) == (1.0, 0.0)


# ----------------------------------------------------------------------------------- shared expert
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_shared_expert_agrees_with_its_judge(kind, gated):
    cfg = forest(activation=kind, shared=Shared(hidden=F + 2, gated=gated))
    rng = np.random.default_rng(0)
    params = shared.init_shared(rng, cfg, C, "float64")
    assert (params.gate_C1 is not None) == gated
    params = tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
    x_NC = rng.standard_normal((N, C))
    y_NC, _ = shared.shared_forward(x_NC, params, cfg)
    close(y_NC, [oracles.shared_output(x, params, cfg) for x in x_NC.tolist()])


def test_a_gate_without_weights_halves_the_shared_expert():
    cfg = forest(shared=Shared(hidden=F, gated=True))
    rng = np.random.default_rng(1)
    params = shared.init_shared(rng, cfg, C, "float64")._replace(gate_C1=np.zeros((C, 1)))
    x_NC = rng.standard_normal((N, C))
    whole_NC, _ = shared.shared_forward(x_NC, params._replace(gate_C1=None), cfg)
    close(shared.shared_forward(x_NC, params, cfg)[0], 0.5 * whole_NC)


# -------------------------------------------------------------------------------------------- 1991
ERRORS = {
    "cooperative_error": judges.cooperative,
    "competitive_error": judges.competitive,
    "mixture_error": judges.mixture,
}


def answers(seed=0):
    rng = np.random.default_rng(seed)
    params = jacobs.init_jacobs(rng, C, E, O, "float64", std=1.0)
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)
    x_NC, target_NO = rng.standard_normal((N, C)), rng.standard_normal((N, O))
    return x_NC, params, target_NO


def mean_of(judge, prob_NE, outputs, target):
    rows = zip(prob_NE.tolist(), outputs.tolist(), target.tolist(), strict=True)
    return np.mean([judge(p, o, d) for p, o, d in rows])


def test_the_first_mixture_is_a_softmax_gate_beside_linear_experts():
    x_NC, params, _ = answers()
    prob_NE, y_NEO, _ = jacobs.jacobs_forward(x_NC, params)
    gate, gate_bias, expert, bias = (leaf.tolist() for leaf in params)
    for n, x in enumerate(x_NC.tolist()):
        logits = [z + b for z, b in zip(oracles.vec_mat(x, gate), gate_bias, strict=True)]
        close(prob_NE[n], oracles.softmax(logits))
        for e in range(E):
            close(y_NEO[n, e], oracles.affine(x, expert[e], bias[e]))


@pytest.mark.parametrize("name", ERRORS)
def test_the_errors_of_1991_agree_with_their_judges(name):
    x_NC, params, target_NO = answers(1)
    prob_NE, y_NEO, _ = jacobs.jacobs_forward(x_NC, params)
    error, _ = registry.pair(name).forward(prob_NE, y_NEO, target_NO)
    close(error, mean_of(ERRORS[name], prob_NE, y_NEO, target_NO))


def test_the_mixture_of_classifiers_agrees_with_its_judge():
    rng = np.random.default_rng(2)
    prob_NE, logits_NEV = rng.dirichlet(np.ones(E), N), rng.normal(0, 3, (N, E, V))
    class_N = rng.integers(0, V, N)
    error, _ = jacobs.mixture_classification_forward(prob_NE, logits_NEV, class_N)
    close(error, mean_of(judges.mixture_class, prob_NE, logits_NEV, class_N))
    with pytest.raises(ValueError, match="mixture_classification_forward: tokens must be from 0"):
        jacobs.mixture_classification_forward(prob_NE, logits_NEV, class_N + V)


@pytest.mark.parametrize("far", [30.0, 1e3, 1e4])
def test_the_posterior_sums_to_one_however_far_off_the_experts_are(far):
    prob_NE = np.full((1, 2), 0.5, "float32")
    log_NE = np.full((1, 2), -far * far / 2, "float32")
    _, dlog_NE = jacobs.log_mixture_backward(1.0, jacobs.log_mixture_forward(prob_NE, log_NE)[1])
    assert dlog_NE.tolist() == [[-0.5, -0.5]]


@pytest.mark.parametrize("name", ["mixture_error", "competitive_error"])
def test_through_the_softmax_the_gate_hears_what_the_paper_says(name):
    """dlogit is p - h for the mixture, and p (e - mean error) for the competition."""
    x_NC, params, target_NO = answers(3)
    prob_NE, y_NEO, _ = jacobs.jacobs_forward(x_NC, params)
    pair = registry.pair(name)
    _, cache = pair.forward(prob_NE, y_NEO, target_NO)
    dprob_NE, dy_NEO = pair.backward(1.0, cache)
    dlogit_NE = softmax.softmax_backward(dprob_NE, (prob_NE,))
    rows = list(zip(prob_NE.tolist(), y_NEO.tolist(), target_NO.tolist(), strict=True))
    weight_NE = prob_NE
    if name == "mixture_error":
        weight_NE = np.array([judges.posterior(*row) for row in rows])
        close(dlogit_NE, (prob_NE - weight_NE) / N)
        close(dy_NEO, weight_NE[:, :, None] * (y_NEO - target_NO[:, None]) / N)
    else:
        square = np.array([[judges.squared_gap(o, d) for o in y] for _, y, d in rows])
        mean = [[judges.competitive(*row)] for row in rows]
        close(dlogit_NE, prob_NE * (square - mean) / N)


def test_experts_that_are_all_far_off_do_not_underflow():
    prob_NE = np.array([[0.25, 0.75], [0.0, 1.0]])
    y_NEO = np.array([[[1000.0], [1001.0]], [[0.0], [1000.0]]])
    error, cache = jacobs.mixture_error_forward(prob_NE, y_NEO, np.zeros((2, 1)))
    close(error, (500000.0 - np.log(0.25) + 500000.0) / 2)
    dprob_NE, dy_NEO = jacobs.mixture_error_backward(1.0, cache)
    close(dprob_NE, [[-2.0, 0.0], [0.0, -0.5]])
    close(dy_NEO, [[[500.0], [0.0]], [[0.0], [500.0]]])


def learn_two_pieces(name, seed):
    """Fit 8 |x| - 4 by gradient descent; return the gate, the experts and the right answers."""
    rng = np.random.default_rng(seed)
    x_NC = rng.uniform(-1, 1, (100, 1))
    target_NO = 8 * np.abs(x_NC) - 4
    params = jacobs.init_jacobs(rng, 1, 2, 1, "float64", std=1.0)
    pair = registry.pair(name)
    for _ in range(1000):
        prob_NE, y_NEO, cache = jacobs.jacobs_forward(x_NC, params)
        _, error_cache = pair.forward(prob_NE, y_NEO, target_NO)
        _, grads = jacobs.jacobs_backward(*pair.backward(1.0, error_cache), cache)
        params = tree.map(lambda w, dw: w - 0.3 * dw, params, grads)
    prob_NE, y_NEO, _ = jacobs.jacobs_forward(x_NC, params)
    return x_NC[:, 0] > 0, prob_NE, y_NEO[:, :, 0], target_NO


def alone(name, seed):
    """Measure the mean entropy of the gate, and the worst expert's error on its own piece."""
    right_N, prob_NE, y_NE, target_NO = learn_two_pieces(name, seed)
    owners = [int(prob_NE[piece].sum(0).argmax()) for piece in (~right_N, right_N)]
    assert sorted(owners) == [0, 1], "each piece has an expert of its own"
    square_NE = (y_NE - target_NO) ** 2
    errors = [
        square_NE[piece, owner].mean()
        for piece, owner in zip((~right_N, right_N), owners, strict=True)
    ]
    return -(prob_NE * np.log(prob_NE)).sum(1).mean(), max(errors)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_experts_compared_with_the_target_one_by_one_specialize(seed):
    """Not from every start: from some, nearly equal experts take longer to part."""
    mixture_entropy, mixture_worst = alone("mixture_error", seed)
    sum_entropy, sum_worst = alone("cooperative_error", seed)
    assert mixture_entropy < sum_entropy < np.log(2)
    assert mixture_worst < 0.01, "each expert knows its piece, as good as by itself"
    assert sum_worst > 10 * mixture_worst, "where the sum counts, they lean on each other"


# ------------------------------------------------------------------------------------ all families
def route_of(dtype, tokens=N):
    cfg = forest(noise=LearnedNoise(), balance=(*TERMS, LoadLoss()), capacity=LIMITS[3])
    x_NC, params, noise = draw_forest(8, cfg, tokens, dtype)
    gate_NK, aux, *_, cache = hierarchy.hierarchical_route_forward(x_NC, params, cfg, noise)
    grads = hierarchy.hierarchical_route_backward(np.ones_like(gate_NK), aux, cache)
    return [gate_NK, aux, *tree.leaves(grads)]


def slots_of(dtype, tokens=N):
    x_NC, params = draw_slots(0, dtype=dtype)
    *outputs, cache = soft.soft_slots_forward(x_NC[:tokens], params)
    report = soft.soft_report(outputs[1], 4)
    grads = soft.soft_slots_backward(*map(np.ones_like, outputs), cache)
    return [*outputs, report.decisiveness, report.gate_entropy, *tree.leaves(grads)]


def shared_of(dtype, tokens=N):
    cfg = forest(shared=Shared(hidden=F + 2, gated=True), activation="swiglu")
    params = shared.init_shared(np.random.default_rng(0), cfg, C, dtype)
    y_NC, cache = shared.shared_forward(np.ones((tokens, C), dtype), params, cfg)
    return [y_NC, *tree.leaves(shared.shared_backward(y_NC, cache))]


def jacobs_of(dtype, tokens=N):
    params = jacobs.init_jacobs(np.random.default_rng(0), C, E, O, dtype)
    prob_NE, y_NEO, cache = jacobs.jacobs_forward(np.ones((tokens, C), dtype), params)
    found = [prob_NE, y_NEO]
    for name in ERRORS:
        pair = registry.pair(name)
        error, error_cache = pair.forward(prob_NE, y_NEO, np.ones((tokens, O), dtype))
        found += [error, *pair.backward(error, error_cache)]
    logits_NEV = np.ones((tokens, E, V), dtype)
    error, error_cache = jacobs.mixture_classification_forward(
        prob_NE, logits_NEV, np.ones(tokens, int)
    )
    dprob_NE, dlogits_NEV = jacobs.mixture_classification_backward(error, error_cache)
    grads = jacobs.jacobs_backward(dprob_NE, y_NEO, cache)
    return [*found, error, dlogits_NEV, *tree.leaves(grads)]


@pytest.mark.parametrize("on", ["output", "input"])
def test_a_whole_layer_with_a_hierarchy_and_a_shared_expert_agrees_with_the_judges(on):
    shared_expert = Shared(hidden=4, gated=True)
    cfg = forest(shared=shared_expert, gate_on=on, capacity=LIMITS[3], gate_scale=1.5)
    rng = np.random.default_rng(9)
    params = layer.init_moe(rng, cfg, C, "float64")
    params = tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
    x_NC = rng.standard_normal((N, C))
    judge = judges.Tree(x_NC, params.router, cfg)
    expected = []
    for n, x in enumerate(x_NC.tolist()):
        total = np.array(oracles.shared_output(x, params.shared, cfg))
        for e, gate, fine in zip(judge.using[n], judge.gates[n], judge.accepted[n], strict=True):
            if fine:
                total += oracles.run_expert(x, 1.5 * gate, e, params.experts, cfg)
        expected.append(total)
    close(layer.moe_forward(x_NC, params, cfg)[0], expected)


def test_a_whole_layer_with_soft_slots_agrees_with_the_judges():
    cfg = slotted(experts=4, slots=2)
    rng = np.random.default_rng(10)
    params = layer.init_moe(rng, cfg, C, "float64")
    params = tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
    x_NC = rng.standard_normal((N, C))
    inputs, weights = judges.soft_slots(x_NC, *params.router)
    outputs = [
        oracles.run_expert(x, 1.0, r // 2, params.experts, cfg) for r, x in enumerate(inputs)
    ]
    expected = [[oracles.dot(w, column) for column in zip(*outputs, strict=True)] for w in weights]
    close(layer.moe_forward(x_NC, params, cfg)[0], expected)


def test_routers_start_small_and_slots_at_unit_length():
    cfg = forest(noise=LearnedNoise(), router_std=0.3)
    rng = np.random.default_rng(11)
    levels = hierarchy.init_hierarchy(rng, cfg, 400, "float32")
    assert [level.w_CE.shape for level in levels] == [(400, G), (400, E)]
    for level in levels:
        assert abs(level.w_CE.std() / 0.3 - 1) < 0.1
        assert not level.noise_CE.any()
        assert level.bias_E is None and level.offset_E is None
    assert hierarchy.init_hierarchy(rng, forest(), 4, "float32").primary.noise_CE is None
    slots_CR = soft.init_soft(rng, slotted(), 400, "float32").slots_CR
    assert abs((slots_CR**2).sum(0) - 1).max() < 0.3


FAMILIES = (route_of, slots_of, shared_of, jacobs_of)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_family_keeps_the_dtype(family, dtype):
    assert {array.dtype for array in family(dtype)} == {np.dtype(dtype)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_takes_no_tokens_at_all(family):
    assert all(np.isfinite(array).all() for array in family("float64", tokens=0))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_a_family_tell_the_truth_about_shapes(family):
    wrong, seen = watch(lambda: family("float64"))
    assert len(seen) > 4
    assert not wrong


# What is planted: pair, a line of its backward, what stands there instead.
BUGS = [
    ("hierarchical_log_softmax", "dlog_NGP.sum(2), cache_1", "dlog_NGP.sum(2) * 0, cache_1"),
    ("hierarchical_log_softmax", "dlog_NGP.sum(2), cache_1", "dlog_NGP.mean(2), cache_1"),
    ("hierarchical_gate", "dgate_NK * gate_NK", "dgate_NK"),
    ("hierarchical_load", "dshare_GP[i] / tokens.size", "dshare_GP[i]"),
    ("hierarchical_load", "(dload_GP * share_GP).sum(1)", "0 * dload_GP.sum(1)"),
    ("hierarchical_load", "dload_GP * load_G[:, None]", "dload_GP"),
    ("hierarchical_balance", ".reshape(log_NE.shape)", ".reshape(log_NE.shape) / 3"),
    ("hierarchical_balance", "* xp.exp(log_NE)", ""),
    ("hierarchical_route", "+ dgate + dlog", "+ dgate"),
    ("hierarchical_route", "dgate_NK * cfg.gate_scale", "dgate_NK"),
    ("hierarchical_route", "dx_1_NC + dx_2_NC", "dx_2_NC"),
    ("l2_normalize", " - y * (y * dy).sum(-1, keepdims=True)", ""),
    ("soft_slots", "dlogit_NR + dlogit_RN.T", "dlogit_NR"),
    ("soft_slots", "dx_NC + l2_normalize_backward", "l2_normalize_backward"),
    ("soft_slots", "scale * dunit_RC", "dunit_RC"),
    ("shared", "gate_N1 * dy_NC, mlp_cache", "dy_NC, mlp_cache"),
    ("shared", "dx_NC + dx_gate_NC", "dx_NC"),
    ("jacobs", "dx_NC + dx_experts_NC", "dx_NC"),
    ("cooperative_error", "prob_NE[:, :, None] * dgap", "dgap"),
    ("competitive_error", "(2.0 * share)", "share"),
    ("mixture_error", "-dlog_NE[:, :, None] * gap", "dlog_NE[:, :, None] * gap"),
    ("log_mixture", "* h_NE", "* prob_NE"),
    ("log_mixture", "dlog_NE / xp.maximum(prob_NE, tiny), dlog_NE", "dlog_NE, dlog_NE"),
    ("mixture_classification", "= dlog_NE", "= -dlog_NE"),
]


@pytest.mark.parametrize(("name", "right", "wrong"), BUGS)
def test_a_planted_bug_turns_the_check_red(name, right, wrong, monkeypatch):
    monkeypatch.setattr(slopes, "EXPLAIN", 0)  # red is enough, without the likeliest cause
    pair = registry.pair(name)
    source = inspect.getsource(pair.backward)
    assert source.count(right) == 1
    scope = vars(pair.module).copy()
    exec(source.replace(right, wrong), scope)
    rng = np.random.default_rng(0)
    cases = CASES[name](rng)
    with registry.swap(f"{name}_backward", scope[f"{name}_backward"]):
        assert any(gradcheck.check_case(name, case, rng).failures for case in cases)


def test_every_pair_of_the_families_has_a_bug_planted_and_a_case():
    homes = (hierarchy, hierarchy_balance, hierarchy_gates, jacobs, shared, soft)
    pairs = {name for name, pair in registry.pairs().items() if pair.module in homes}
    assert pairs == CASES.keys() == {name for name, *_ in BUGS}


def test_the_gate_of_a_shared_expert_starts_as_small_as_the_router():
    cfg = MoEConfig(num_experts=4, top_k=2, hidden=8, shared=Shared(hidden=8, gated=True))
    drawn = shared.init_shared(np.random.default_rng(0), cfg, 4096, "float64")
    assert drawn.gate_C1.std() == pytest.approx(cfg.router_std, rel=0.1)


def test_overflow_in_a_hierarchy_ranks_probabilities_that_are_rounded_to_zero():
    moe = MoEConfig(
        num_experts=6,
        top_k=1,
        hidden=4,
        selection=Hierarchy(groups=2, kept=1),
        capacity=Capacity(factor=1.5, overflow="next_best"),
    )
    params = layer.init_moe(0, moe, 2, "float32")
    primary_CE, secondary_CE = np.zeros((2, 2), "float32"), np.zeros((2, 6), "float32")
    primary_CE[0], secondary_CE[0] = [0, -200], [0, -400, -300, -600, -500, -550]
    primary = params.router.primary._replace(w_CE=primary_CE)
    secondary = params.router.secondary._replace(w_CE=secondary_CE)
    router = params.router._replace(primary=primary, secondary=secondary)
    _, _, report, _ = layer.moe_forward(
        np.ones((4, 2), "float32"), params._replace(router=router), moe
    )
    assert report.load_E.tolist() == [1, 0, 1, 0, 1, 1]


def test_the_shared_expert_starts_as_deep_as_the_others():
    moe = MoEConfig(num_experts=2, top_k=1, hidden=64, shared=Shared(hidden=400))
    params = layer.init_moe(0, moe, 64, "float64", depth=9)
    assert params.shared.mlp.out_FC.std() == pytest.approx(0.02 / 3, rel=0.05)
