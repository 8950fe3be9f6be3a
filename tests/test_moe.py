"""The layer against its judge, and the equalities that hold for every Mixture of Experts."""

import dataclasses
import itertools
import re

import numpy as np
import oracles
import pytest
import tiny

from moe_numpy import tree
from moe_numpy.config import (
    ACTIVATIONS,
    PRIORITIES,
    Capacity,
    GaussianNoise,
    Hierarchy,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    MoEConfig,
    SecondExpert,
    Shared,
    SoftSlots,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe import balance, experts, layer, mlp, router, score
from moe_numpy.ops import softmax

N, C, E, F = 11, 6, 5, 3
NOISES = (None, LearnedNoise(), GaussianNoise(std=0.8), InputJitter(eps=0.3))
GATES = ("raw", "renormalized")


def config(**changes):
    return MoEConfig(**{"num_experts": E, "top_k": 2, "hidden": F, **changes})


def all_terms(noise, k, gates="raw"):
    """Name every term that such a layer may have."""
    terms = (SwitchLoss(weight=0.7), ZLoss(weight=0.2))
    if k > 1 or gates != "renormalized":
        terms += (ImportanceLoss(weight=0.4),)
    if isinstance(noise, LearnedNoise | GaussianNoise) and k < E:
        terms += (LoadLoss(weight=0.3),)
    return terms


def draw(seed, cfg, tokens=N):
    rng = np.random.default_rng(seed)
    params = oracles.draw_layer(rng, cfg, C)
    x_NC = rng.standard_normal((tokens, C))
    return x_NC, params, router.draw_noise(rng, cfg, tokens, C, "float64")


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def agree(x_NC, params, noise, cfg):
    """Compare everything that the layer returns with the judge; return the judge's findings."""
    y_NC, aux, report, _ = layer.moe_forward(x_NC, params, cfg, noise)
    judge = oracles.moe_layer(x_NC, params, cfg, noise)
    close(y_NC, judge.y)
    close(aux, judge.aux)
    assert report.wished_E.tolist() == judge.count(E, only_accepted=False)
    assert report.load_E.tolist() == judge.count(E, only_accepted=True)
    assert report.dropped == judge.dropped()
    close(report.decisiveness, np.mean([max(t.prob) for t in judge.tokens]))
    entropy = [-sum(p * np.log(p) for p in t.prob) for t in judge.tokens]
    close(report.gate_entropy, np.mean(entropy))
    return judge


# ------------------------------------------------------------------------ against the judge
@pytest.mark.parametrize("overflow", ["drop", "next_best"])
@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("gates", GATES)
def test_layer_agrees_with_the_judge_under_every_policy(overflow, priority, k, gates):
    limit = Capacity(factor=0.7, overflow=overflow, priority=priority, rounding="floor")
    lost = moved = 0
    for seed, noise_kind in enumerate(NOISES * 2):
        cfg = config(
            top_k=k,
            gate_weights=gates,
            noise=noise_kind,
            capacity=limit,
            balance=all_terms(noise_kind if seed % 2 else None, k, gates),  # load knows no bias
            bias_rate=0.0 if seed % 2 else 0.01,
            bias_with_loss=not seed % 2,
        )
        judge = agree(*draw(seed, cfg), cfg)
        lost += judge.dropped()
        moved += judge.rerouted()
    assert lost > 0
    assert (moved > 0) == (overflow == "next_best" and k < E)


@pytest.mark.parametrize("noise_kind", NOISES)
@pytest.mark.parametrize("k", [1, 2, E])
def test_layer_agrees_with_the_judge_without_limit_in_training_and_evaluation(noise_kind, k):
    for seed, gates in itertools.product(range(3), (None, *GATES)):
        terms = all_terms(noise_kind, k, gates)
        cfg = config(top_k=k, gate_weights=gates, noise=noise_kind, balance=terms)
        x_NC, params, noise = draw(seed, cfg)
        agree(x_NC, params, noise, cfg)
        agree(x_NC, params, None, cfg)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("expert_bias", [False, True])
def test_experts_agree_with_the_judge_for_every_activation(activation, expert_bias):
    cfg = config(activation=activation, expert_bias=expert_bias, capacity=Capacity(factor=0.9))
    agree(*draw(4, cfg), cfg)


def test_the_selection_bias_changes_who_is_chosen_but_no_gate():
    cfg = config(bias_rate=0.01)
    x_NC, params, _ = draw(0, cfg)
    unbiased = params._replace(router=params.router._replace(bias_E=np.zeros(E)))
    biased = oracles.moe_layer(x_NC, params, cfg)
    assert biased.wished != oracles.moe_layer(x_NC, unbiased, cfg).wished
    shifted = params._replace(router=params.router._replace(bias_E=params.router.bias_E + 5.0))
    y_NC = layer.moe_forward(x_NC, params, cfg)[0]
    close(layer.moe_forward(x_NC, shifted, cfg)[0], y_NC)
    agree(x_NC, params, None, cfg)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("noise_kind", NOISES)
@pytest.mark.parametrize("overflow", [None, "drop", "next_best"])
def test_gradients_are_the_slopes_of_the_judge(gates, noise_kind, overflow):
    limit = overflow and Capacity(factor=0.7, overflow=overflow, priority="choice")
    terms = all_terms(noise_kind, 2)
    cfg = config(gate_weights=gates, noise=noise_kind, capacity=limit, balance=terms)
    x_NC, params, noise = draw(3, cfg)
    rng = np.random.default_rng(99)
    dy_NC, daux = rng.standard_normal((N, C)), 1.7
    *_, cache = layer.moe_forward(x_NC, params, cfg, noise)
    gradients = layer.moe_backward(dy_NC, daux, cache)
    arguments = (x_NC, params)

    def judged(at):
        judge = oracles.moe_layer(*at, cfg, noise)
        return (dy_NC * np.array(judge.y)).sum() + daux * judge.aux, (judge.using, judge.accepted)

    for i, (name, leaf) in enumerate(tree.named_leaves(arguments)):
        direction = rng.standard_normal(leaf.shape)

        def moved(step, i=i, direction=direction):
            changed = list(tree.leaves(arguments))
            changed[i] = changed[i] + step * direction
            return judged(tree.from_leaves(arguments, changed))

        (above, fate), (below, other_fate) = moved(1e-5), moved(-1e-5)
        assert fate == other_fate, "the probe crossed a discrete decision: choose another seed"
        slope = (above - below) / 2e-5
        got = (tree.leaves(gradients)[i] * direction).sum()
        assert abs(slope) > 1e-3, f"{name}: nothing to compare"
        assert abs(got - slope) < 1e-6 * abs(slope), f"{name}: {got} instead of {slope}"


# ---------------------------------------------------------------------------------- equivalences
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_expert_is_the_dense_mlp_forward_and_backward(activation):
    cfg = config(num_experts=1, top_k=1, activation=activation)
    x_NC, params, _ = draw(0, cfg)
    dense = mlp.MLPParams(*(None if w is None else w[0] for w in params.experts[:4]))
    y_NC, aux, _, cache = layer.moe_forward(x_NC, params, cfg)
    dense_y, dense_cache = mlp.mlp_forward(x_NC, dense, activation)
    close(y_NC, dense_y)
    assert aux == 0.0
    dy_NC = np.random.default_rng(1).standard_normal((N, C))
    dx_NC, grads = layer.moe_backward(dy_NC, 1.0, cache)
    dense_dx, dense_grads = mlp.mlp_backward(dy_NC, dense_cache)
    close(dx_NC, dense_dx)
    pairs = zip(tree.leaves(grads.experts), tree.leaves(dense_grads), strict=True)
    for got, wanted in pairs:
        close(got[0], wanted)
    assert not grads.router.w_CE.any()


@pytest.mark.parametrize("gates", GATES)
def test_choosing_all_experts_is_the_full_softmax_mixture(gates):
    cfg = config(top_k=E, gate_weights=gates)
    x_NC, params, _ = draw(1, cfg)
    w_in, _, w_out = (w if w is None else w.tolist() for w in params.experts[:3])
    for x, y in zip(x_NC, layer.moe_forward(x_NC, params, cfg)[0], strict=True):
        prob = oracles.softmax((x @ params.router.w_CE).tolist())
        outputs = [
            oracles.mlp(x.tolist(), (w_in[e], None, w_out[e]), cfg.activation) for e in range(E)
        ]
        close(y, np.array(prob) @ np.array(outputs))


@pytest.mark.parametrize("k", [1, 2, E])
def test_ample_capacity_is_no_capacity(k):
    cfg = config(top_k=k, balance=all_terms(None, k))
    x_NC, params, _ = draw(2, cfg)
    free = both_ways(x_NC, params, cfg)
    policies = itertools.product(("drop", "next_best"), PRIORITIES)
    for overflow, priority in policies:
        limit = Capacity(factor=float(E), overflow=overflow, priority=priority)
        limited = both_ways(x_NC, params, dataclasses.replace(cfg, capacity=limit))
        for a, b in zip(free, limited, strict=True):
            close(a, b)


def both_ways(x_NC, params, cfg, noise=None, dy_NC=None, daux=1.0):
    """Run forward and backward; list y, aux, dx and every gradient."""
    y_NC, aux, _, cache = layer.moe_forward(x_NC, params, cfg, noise)
    if dy_NC is None:
        dy_NC = np.random.default_rng(8).standard_normal(x_NC.shape)
    dx_NC, grads = layer.moe_backward(dy_NC, daux, cache)
    return [y_NC, aux, dx_NC, *tree.leaves(grads)]


@pytest.mark.parametrize(
    "limit",
    [None, Capacity(factor=0.7), Capacity(factor=0.7, overflow="next_best", priority="score")],
)
def test_relabeling_the_experts_changes_nothing(limit):
    cfg = config(capacity=limit, balance=all_terms(None, 2), bias_rate=0.1, bias_with_loss=True)
    x_NC, params, _ = draw(3, cfg)
    new = np.array([3, 0, 4, 1, 2])
    shuffled = layer.MoEParams(
        router.RouterParams(params.router.w_CE[:, new], None, params.router.bias_E[new]),
        tree.map(lambda w: w[new], params.experts),
    )
    y, aux, dx, dw, _, d_in, d_out = both_ways(x_NC, params, cfg)
    y2, aux2, dx2, dw2, _, d_in2, d_out2 = both_ways(x_NC, shuffled, cfg)
    for a, b in [(y, y2), (aux, aux2), (dx, dx2)]:
        close(a, b)
    for a, b in [(dw[:, new], dw2), (d_in[new], d_in2), (d_out[new], d_out2)]:
        close(a, b)


def test_permuting_the_tokens_permutes_the_outputs_while_nothing_is_dropped():
    cfg = config(balance=all_terms(LearnedNoise(), 2), noise=LearnedNoise())
    x_NC, params, noise = draw(4, cfg)
    new = np.random.default_rng(0).permutation(N)
    dy_NC = np.random.default_rng(1).standard_normal((N, C))
    y, aux, dx, *grads = both_ways(x_NC, params, cfg, noise, dy_NC)
    y2, aux2, dx2, *grads2 = both_ways(x_NC[new], params, cfg, noise[new], dy_NC[new])
    close(y[new], y2)
    close(dx[new], dx2)
    close(aux, aux2)
    for a, b in zip(grads, grads2, strict=True):
        close(a, b)


@pytest.mark.parametrize("k", [1, 2, 3, E])
def test_renormalized_gates_are_raw_gates_over_their_sum_and_the_masked_softmax(k):
    rng = np.random.default_rng(k)
    z_NE = 2.0 * rng.standard_normal((N, E))
    expert_NK = router.top_k(z_NE, k)
    gate_NK, cache = router.renormalized_gate_forward(z_NE, expert_NK)
    prob_NE, prob_cache = softmax.softmax_forward(z_NE)
    raw_NK, raw_cache = router.raw_gate_forward(prob_NE, expert_NK)
    close(gate_NK, raw_NK / raw_NK.sum(1, keepdims=True))
    chosen_NE = np.zeros((N, E), bool)
    np.put_along_axis(chosen_NE, expert_NK, True, 1)
    masked_NE, masked_cache = softmax.softmax_forward(np.where(chosen_NE, z_NE, -np.inf))
    assert (masked_NE[~chosen_NE] == 0.0).all()
    close(np.take_along_axis(masked_NE, expert_NK, 1), gate_NK)
    dgate_NK = rng.standard_normal((N, k))
    dz_NE = router.renormalized_gate_backward(dgate_NK, cache)
    dmasked_NE = router.raw_gate_backward(dgate_NK, (expert_NK, E))
    close(dz_NE, softmax.softmax_backward(dmasked_NE, masked_cache))
    total_N1 = raw_NK.sum(1, keepdims=True)
    draw_NK = (dgate_NK - (dgate_NK * gate_NK).sum(1, keepdims=True)) / total_N1
    dprob_NE = router.raw_gate_backward(draw_NK, raw_cache)
    close(dz_NE, softmax.softmax_backward(dprob_NE, prob_cache))
    assert (dz_NE[~chosen_NE] == 0.0).all()


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("k", [1, 2])
def test_a_token_dropped_everywhere_has_zero_output_and_no_task_gradient(gates, k):
    cfg = config(
        top_k=k,
        gate_weights=gates,
        capacity=Capacity(factor=0.4),
        balance=all_terms(None, k, gates),
    )
    x_NC, params, _ = draw(5, cfg)
    judge = oracles.moe_layer(x_NC, params, cfg)
    gone_N = np.array([not any(fine) for fine in judge.accepted])
    assert 0 < gone_N.sum() < N
    y_NC, _, dx_NC, *_ = both_ways(x_NC, params, cfg, daux=0.0)
    assert not y_NC[gone_N].any()
    assert not dx_NC[gone_N].any()
    assert dx_NC[~gone_N].any(1).all()
    only_gone_NC = gone_N[:, None] * np.ones((N, C))
    _, _, dx_NC, *grads = both_ways(x_NC, params, cfg, dy_NC=only_gone_NC, daux=0.0)
    assert not any(grad.any() for grad in (dx_NC, *grads))
    _, _, dx_NC, *_ = both_ways(x_NC, params, cfg, daux=1.0)
    assert dx_NC[gone_N].any(1).all(), "the balance terms still teach the router"


def test_a_renormalized_top_1_router_learns_nothing_from_the_task_and_a_raw_one_does():
    for gates, learns in [("renormalized", False), ("raw", True), (None, True)]:
        cfg = config(top_k=1, gate_weights=gates)
        dw_CE = both_ways(*draw(6, cfg)[:2], cfg)[3]
        assert dw_CE.any() == learns


def test_an_expert_without_tokens_gets_zero_gradient():
    cfg = config(top_k=2, activation="swiglu3", expert_bias=True)
    x_NC, params, _ = draw(7, cfg)
    x_NC[:, 0] = 1.0
    params.router.w_CE[0, 3] = -50.0
    *_, report, cache = layer.moe_forward(x_NC, params, cfg)
    assert report.load_E[3] == 0
    _, grads = layer.moe_backward(np.ones((N, C)), 0.0, cache)
    leaves = tree.leaves(grads.experts)
    assert len(leaves) == 7
    for leaf in leaves:
        assert not leaf[3].any()
        assert leaf[report.load_E > 0].reshape(E - 1, -1).any(1).all()
    close(grads.experts.out_EC.sum(0), np.full(C, N))  # the gates of a token sum to one


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize(
    "offsets",
    [
        (0, 0, 4, 4, 7, 7),
        (0, 3, 3, 3, 5, 9),
        (0, 0, 0, 0, 0, 0),
        (0, 1, 1, 2, 2 + experts.FEW, 3 + 2 * experts.FEW),
        (0, 1, 11, 13, 45, 57),
    ],
)
@pytest.mark.parametrize(("C", "F"), [(6, 3), (4, 8), (3, 5)])  # narrow, wide, not to be cut
@pytest.mark.parametrize("small", [experts.SMALL, 60])  # whole matrices, parts of them
def test_expert_linear_is_a_product_and_a_bias_for_every_row(
    offsets, few, C, F, small, monkeypatch
):
    monkeypatch.setattr(experts, "few_launches", lambda: few)
    monkeypatch.setattr(experts, "SMALL", small)
    if small == 60:
        monkeypatch.setattr(experts, "WIDE", 2)
        monkeypatch.setattr(experts, "NARROW", 2)
    rng, R = np.random.default_rng(0), offsets[-1]
    owner = [e for e in range(E) for _ in range(offsets[e], offsets[e + 1])]
    x_RC, w_EFC, b_EF, dy_RF = (
        rng.standard_normal(shape) for shape in ((R, C), (E, F, C), (E, F), (R, F))
    )
    w_ECF = w_EFC.swapaxes(1, 2)  # a view: nothing may count on how the matrices lie
    y_RF, cache = experts.expert_linear_forward(x_RC, w_ECF, b_EF, offsets)
    dx_RC, dw_ECF, db_EF = experts.expert_linear_backward(dy_RF, cache)
    wanted_w, wanted_b = np.zeros((E, C, F)), np.zeros((E, F))
    for r, e in enumerate(owner):
        close(y_RF[r], oracles.affine(x_RC[r].tolist(), w_ECF[e].tolist(), b_EF[e].tolist()))
        close(dx_RC[r], oracles.vec_mat(dy_RF[r].tolist(), w_ECF[e].T.tolist()))
        wanted_w[e] += np.outer(x_RC[r], dy_RF[r])
        wanted_b[e] += dy_RF[r]
    close(dw_ECF, wanted_w)
    close(db_EF, wanted_b)
    assert y_RF.shape == dy_RF.shape


# -------------------------------------------------------------------------- the start of experts
def test_experts_start_as_the_dense_feed_forward_does_with_biases_at_zero():
    cfg = config(activation="swiglu3", expert_bias=True)
    params = experts.init_experts(np.random.default_rng(5), cfg, 40, "float64", depth=6)
    rng = np.random.default_rng(5)
    for leaf, fan_in, std in (
        (params.in_ECF, 40, 40**-0.5),
        (params.up_ECF, 40, 40**-0.5),
        (params.out_EFC, F, 0.02 / 6**0.5),
        (params.third_ECF, 40, 40**-0.5),
    ):
        wanted = rng.normal(0.0, std, (E, fan_in, leaf.shape[2]))
        assert (leaf == wanted).all()
    for leaf in (params.in_EF, params.up_EF, params.out_EC):
        assert leaf.shape[0] == E
        assert not leaf.any()
    plain = experts.init_experts(np.random.default_rng(5), config(), 40, "float32", depth=6)
    assert plain[1] is None
    assert plain[3:] == (None,) * 4
    assert (plain.in_ECF == params.in_ECF.astype("float32")).all()


def test_scaled_experts_start_truncated_at_two_deviations_of_their_fan_in():
    cfg = config(hidden=90, activation="swiglu3", init_scale=0.1)
    params = experts.init_experts(np.random.default_rng(0), cfg, 60, "float64")
    for leaf, fan_in in zip(params[:4], (60, 60, 90, 60), strict=True):
        std = (0.1 / fan_in) ** 0.5
        assert 1.99 * std < np.abs(leaf).max() <= 2.0 * std
        close(leaf.std() / std, 0.8796, 0.02)  # of a normal cut at two deviations
        close((np.abs(leaf) < std).mean(), 0.7152, 0.02)  # 0.6827 / 0.9545
        assert np.unique(leaf).size == leaf.size


@pytest.mark.parametrize("init_scale", [None, 0.1])
def test_experts_that_start_the_same_are_copies_of_one(init_scale):
    cfg = config(activation="swiglu3", same_start=True, init_scale=init_scale)
    params = experts.init_experts(np.random.default_rng(0), cfg, C, "float32")
    for leaf, shape in zip(params[:4], ((C, F), (C, F), (F, C), (C, F)), strict=True):
        assert leaf.shape == (E, *shape)
        assert leaf.dtype == np.float32
        assert (leaf == leaf[0]).all()
        assert np.unique(leaf[0]).size == leaf[0].size
        leaf[1] = 0.0  # and no views of one
        assert leaf[0].all()


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_a_router_starts_with_the_deviation_of_its_configuration(std):
    cfg = config(noise=LearnedNoise(), router_std=std)
    start = router.init_router(np.random.default_rng(0), cfg, 500, "float64")
    assert start.w_CE.std() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gates", ["raw", "renormalized"])
def test_an_expert_that_is_switched_off_is_chosen_last_and_adds_nothing(score, gates):
    knobs = {"score": score, "gate_weights": gates, "router_bias": True}
    both, alone = config(top_k=2, num_experts=2, **knobs), config(top_k=1, num_experts=2, **knobs)
    params = layer.init_moe(0, both, C, "float64")
    params.router.offset_E[1] = -np.inf
    x_NC = np.random.default_rng(1).standard_normal((6, C))
    y_NC, _, facts, cache = layer.moe_forward(x_NC, params, both)
    assert facts.load_E.tolist() == [6, 6] and np.isfinite(facts.gate_entropy)
    assert np.allclose(y_NC, layer.moe_forward(x_NC, params, alone)[0], rtol=1e-12, atol=0)
    dx_NC, _ = layer.moe_backward(y_NC, 0.0, cache)
    bumped_NC = x_NC + 1e-6 * x_NC
    moved = ((layer.moe_forward(bumped_NC, params, both)[0] - y_NC) * y_NC).sum() / 1e-6
    assert moved == pytest.approx((dx_NC * x_NC).sum(), rel=1e-4)


def test_top_k_takes_the_best_first_and_the_lower_index_of_equal_ones():
    score_NE = np.random.default_rng(0).integers(0, 3, (40, 6)).astype(float)
    given = score_NE.copy()
    for k in (1, 2, 6):
        wanted = [oracles.rank(z)[:k] for z in score_NE.tolist()]
        assert router.top_k(score_NE, k).tolist() == wanted
    assert (score_NE == given).all()


# ---------------------------------------------------------------------------------------- noise
def test_evaluation_is_deterministic_clean_and_without_limit():
    cfg = config(noise=LearnedNoise(), capacity=Capacity(factor=0.5), balance=(SwitchLoss(),))
    x_NC, params, _ = draw(0, cfg)
    first, second = (layer.moe_forward(x_NC, params, cfg.evaluation()) for _ in range(2))
    assert (first[0] == second[0]).all()
    assert first[2].dropped == 0
    assert layer.moe_forward(x_NC, params, cfg)[2].dropped > 0
    assert cfg.evaluation() == dataclasses.replace(cfg, capacity=None)


@pytest.mark.parametrize("noise_kind", NOISES[1:])
def test_the_same_noise_gives_the_same_result_and_other_noise_another(noise_kind):
    cfg = config(noise=noise_kind)
    x_NC, params, noise = draw(1, cfg)
    kept = noise.copy()
    outputs = [layer.moe_forward(x_NC, params, cfg, u)[0] for u in (noise, noise, -noise, None)]
    assert (noise == kept).all()
    assert (outputs[0] == outputs[1]).all()
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3
    assert np.abs(outputs[0] - outputs[3]).max() > 1e-3


def test_noise_is_drawn_in_the_shape_and_law_that_the_router_wants():
    rng = np.random.default_rng(0)
    assert router.draw_noise(rng, config(), 7, C, "float32") is None
    for kind in NOISES[1:3]:
        noise_NE = router.draw_noise(rng, config(noise=kind), 4000, C, "float32")
        assert noise_NE.shape == (4000, E)
        assert noise_NE.dtype == np.float32
        assert abs(noise_NE.mean()) < 0.03
        assert abs(noise_NE.std() - 1.0) < 0.03
    noise_NC = router.draw_noise(rng, config(noise=InputJitter()), 4000, C, "float64")
    assert noise_NC.shape == (4000, C)
    assert -1.0 <= noise_NC.min() < -0.99
    assert 0.99 < noise_NC.max() <= 1.0
    assert abs(noise_NC.std() - 3**-0.5) < 0.02


def test_noise_for_a_layer_that_has_none_is_refused():
    x_NC, params, _ = draw(0, config())
    with pytest.raises(ValueError, match="noise came for a layer with noise=None"):
        layer.moe_forward(x_NC, params, config(), np.zeros((N, E)))
    soft = MoEConfig(num_experts=E, top_k=E, hidden=F, selection=SoftSlots())
    params = layer.init_moe(np.random.default_rng(0), soft, C, "float64")
    with pytest.raises(ValueError, match=r"noise came .* of shape \(3, 99\)"):
        layer.moe_forward(x_NC, params, soft, np.zeros((3, 99)))


def test_the_noise_scale_learns_with_noise_and_rests_without():
    cfg = config(noise=LearnedNoise())
    x_NC, params, noise = draw(2, cfg)
    assert both_ways(x_NC, params, cfg, noise)[4].any()
    assert not both_ways(x_NC, params, cfg, None)[4].any()


def test_jitter_reaches_the_router_and_not_the_experts():
    # With one expert the router has no say: jitter must not change a single bit.
    cfg = config(num_experts=1, top_k=1, noise=InputJitter(eps=0.5))
    x_NC, params, noise = draw(3, cfg)
    clean, jittered = (both_ways(x_NC, params, cfg, u) for u in (None, noise))
    assert all((a == b).all() for a, b in zip(clean, jittered, strict=True))
    many = config(noise=InputJitter(eps=0.5))
    x_NC, params, noise = draw(3, many)
    _, _, report, _ = layer.moe_forward(x_NC, params, many, noise)
    _, _, clean_report, _ = layer.moe_forward(x_NC, params, many, None)
    assert report.decisiveness != clean_report.decisiveness


# -------------------------------------------------------------------------------------- balance
def switch(prob_NE, expert_NK):
    value, cache = balance.switch_loss_forward(prob_NE, expert_NK)
    prob_cache = softmax.softmax_forward(np.log(prob_NE))[1]
    return value, softmax.softmax_backward(balance.switch_loss_backward(1.0, cache), prob_cache)


@pytest.mark.parametrize("k", [1, 2])
def test_switch_loss_is_one_at_balance_where_its_gradient_is_zero(k):
    tokens = np.arange(4 * E)
    expert_NK = np.stack([(tokens + j) % E for j in range(k)], 1)
    value, _ = switch(np.full((4 * E, E), 1.0 / E), expert_NK)
    close(value, 1.0)
    prob_NE = np.random.default_rng(0).dirichlet(np.ones(E), 4 * E)
    value, dlogit_NE = switch(prob_NE, expert_NK)  # f is uniform, P need not be
    close(value, 1.0)
    assert np.abs(dlogit_NE).max() < 1e-15
    _, dlogit_NE = switch(prob_NE, np.zeros((4 * E, 1), int))
    assert np.abs(dlogit_NE).max() > 1e-3


def test_switch_loss_is_the_number_of_experts_when_one_gets_everything():
    prob_NE = np.zeros((7, E))
    prob_NE[:, 2] = 1.0
    value, _ = balance.switch_loss_forward(prob_NE, np.full((7, 1), 2))
    close(value, E)


def test_cv_squared_is_zero_at_equality_and_one_less_than_the_experts_for_a_monopoly():
    close(balance.cv_squared_forward(np.full(E, 3.7))[0], 0.0)
    close(balance.cv_squared_forward(np.array([0.0, 0, 90, 0, 0]))[0], E - 1)
    amounts = np.random.default_rng(0).uniform(0, 9, E)
    close(balance.cv_squared_forward(amounts)[0], oracles.cv_squared(amounts.tolist()))


def test_z_loss_gradient_rows_sum_to_twice_the_log_sum_exp_over_the_tokens():
    logit_NE = 3.0 * np.random.default_rng(0).standard_normal((N, E))
    value, cache = balance.z_loss_forward(logit_NE)
    close(value, oracles.z_loss(logit_NE.tolist()))
    lse = np.array([oracles.log_sum_exp(z) for z in logit_NE.tolist()])
    close(balance.z_loss_backward(1.0, cache).sum(1), 2.0 * lse / N)
    close(balance.z_loss_forward(np.zeros((N, E)))[0], np.log(E) ** 2)


def test_the_z_loss_hands_on_a_whole_softmax_beside_a_large_common_offset():
    logit_NE = np.array([[1e5, 1e5 + 1, 1e5 + 2]], "float32")
    _, (lse_N, _) = balance.z_loss_forward(logit_NE)
    dlogit_NE = balance.z_loss_backward(1.0, (lse_N, logit_NE))
    assert dlogit_NE.sum() / (2 * lse_N[0]) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_smooth_load_sums_to_about_the_number_of_choices(k):
    cfg = config(top_k=k, noise=LearnedNoise())
    x_NC, params, noise = draw(0, cfg, tokens=20_000)
    clean_NE, noisy_NE, scale_NE, _ = router.router_forward(x_NC, params.router, cfg, noise)
    load_E, _ = balance.load_forward(clean_NE, noisy_NE, scale_NE, k)
    assert abs(load_E.sum() / (20_000 * k) - 1.0) < 0.01
    count_E = np.bincount(router.top_k(noisy_NE, k).reshape(-1), minlength=E)
    assert np.abs(load_E / count_E - 1.0).max() < 0.03


def test_the_load_loss_counts_the_selection_bias_or_is_refused_beside_it():
    try:
        cfg = config(noise=GaussianNoise(), balance=(LoadLoss(weight=1.0),), bias_rate=0.1)
    except ValueError:
        return
    x_NC, params, noise = draw(0, cfg, tokens=500)
    params.router.bias_E[:] = [9.0, 9.0, 0.0, 0.0, 0.0]  # every token to experts 0 and 1
    _, aux, report, _ = layer.moe_forward(0.1 * x_NC, params, cfg, noise)
    close(aux, oracles.cv_squared(report.wished_E.tolist()), 0.05)


def test_the_bias_rule_lifts_experts_below_the_mean_load_and_lowers_those_above():
    bias_E = np.array([0.5, 0.0, -0.5, 0.1], np.float32)
    new_E = balance.updated_bias(bias_E, np.array([0, 10, 4, 6]), 0.01)
    close(new_E - bias_E, [0.01, -0.01, 0.01, -0.01], 1e-7)
    assert new_E.dtype == np.float32
    assert (balance.updated_bias(bias_E, np.full(4, 5), 0.01) == bias_E).all()


def test_limits_change_the_balance_terms_only_through_the_gates_in_use():
    # The Switch loss, the load and the z-loss look at wishes; the importance at the experts in use.
    terms = (SwitchLoss(), LoadLoss(), ZLoss())
    tight = Capacity(factor=0.5, overflow="next_best")
    free = config(noise=GaussianNoise(), balance=terms)
    x_NC, params, noise = draw(1, free)
    limited = dataclasses.replace(free, capacity=tight)
    aux = [layer.moe_forward(x_NC, params, each, noise)[1] for each in (free, limited)]
    close(aux[0], aux[1])
    only = {"balance": (ImportanceLoss(),)}
    free, limited = (dataclasses.replace(each, **only) for each in (free, limited))
    aux = [layer.moe_forward(x_NC, params, each, noise)[1] for each in (free, limited)]
    assert abs(aux[0] - aux[1]) > 1e-4


# ---------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("cfg", "tokens", "noise", "words"),
    [
        (
            {"num_experts": 5},
            (6, 3, "float64"),
            None,
            r"of 5 experts of hidden width 8, .*got 4 of 8",
        ),
        ({"hidden": 9}, (6, 3, "float64"), None, r"of 4 experts of hidden width 9, .*got 4 of 8"),
        (
            {},
            (6, 3, "float32"),
            None,
            r"\(tokens, 3\) and the type float64, .*\(6, 3\) and float32",
        ),
        ({}, (6, 4, "float64"), None, r"\(tokens, 3\) .*got \(6, 4\)"),
        (
            {"noise": GaussianNoise()},
            (6, 3, "float64"),
            (1, 4),
            r"shape \(6, 4\) and the type float64, got \(1, 4\)",
        ),
        (
            {"noise": InputJitter()},
            (6, 3, "float64"),
            (6, 4),
            r"shape \(6, 3\) and the type float64, got \(6, 4\)",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(cfg, tokens, noise, words):
    params = layer.init_moe(np.random.default_rng(0), tiny.moe(), 3, "float64")
    N, C, dtype = tokens
    noise = None if noise is None else np.zeros(noise)
    with pytest.raises(ValueError, match=words):
        layer.moe_forward(np.zeros((N, C), dtype), params, tiny.moe(**cfg), noise)


def test_what_is_no_configuration_or_no_parameters_of_a_layer_is_told():
    cfg, params = layer_of()
    x_NC = np.ones((5, 4))
    swapped = tree.map(lambda leaf: leaf.astype(leaf.dtype.newbyteorder()), params)
    for do, words in (
        (lambda: layer.init_moe(0, None, 4, "float64"), "a MoEConfig, got NoneType"),
        (lambda: layer.moe_forward(x_NC, cfg, params), "a MoEConfig, got MoEParams"),
        (lambda: layer.moe_forward(x_NC, tuple(params), cfg), "be MoEParams, got tuple"),
        (lambda: layer.moe_forward(x_NC, swapped, cfg), "in the machine's order of bytes"),
    ):
        with pytest.raises(ValueError, match=words):
            do()


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"k must be at most the number of experts \(3\), got 4"):
        router.top_k(np.zeros((2, 3)), 4)


PARTS = {
    "experts.up_ECF": {"activation": "swiglu"},
    "experts.third_ECF": {"activation": "swiglu3"},
    "experts.in_EF": {"expert_bias": True},
    "shared": {"shared": Shared(hidden=4)},
    "shared.gate_C1": {"shared": Shared(hidden=4, gated=True)},
    "router.noise_CE": {"noise": LearnedNoise()},
    "router.bias_E": {"bias_rate": 0.1},
    "router.offset_E": {"router_bias": True},
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_missing_is_refused_by_name(name):
    plain = {"activation": "swiglu"} if name == "experts.third_ECF" else {}
    plain = {"shared": Shared(hidden=4)} if name == "shared.gate_C1" else plain
    with_it, without = layer_of(**PARTS[name]), layer_of(**plain)
    x_NC = np.ones((5, 4))
    with pytest.raises(ValueError, match=rf"{name} must be there, .* got NoneType\. Draw"):
        layer.moe_forward(x_NC, without[1], with_it[0])
    if name.startswith("router"):  # a bias that stays as it is, or noise that is over, is fine
        layer.moe_forward(x_NC, with_it[1], without[0])
    else:
        with pytest.raises(ValueError, match=rf"{name} must be None, as the configuration"):
            layer.moe_forward(x_NC, with_it[1], without[0])


FULL = {
    "plain": {"noise": LearnedNoise(), "bias_rate": 0.1, "router_bias": True},
    "gated": {"activation": "swiglu3", "shared": Shared(hidden=5, gated=True)},
    "biased": {"activation": "swiglu", "expert_bias": True},
    "hierarchy": {"num_experts": 4, "selection": Hierarchy(groups=2), "noise": LearnedNoise()},
    "soft": {"top_k": 3, "selection": SoftSlots(slots=2)},
}


@pytest.mark.parametrize("kind", FULL)
def test_every_array_of_another_shape_or_type_is_refused_by_name(kind):
    cfg, params = layer_of(**FULL[kind])
    x_NC, leaves = np.ones((5, 4)), tree.leaves(params)
    layer.moe_forward(x_NC, params, cfg)
    for i, (name, leaf) in enumerate(tree.named_leaves(params)):
        if name == "experts.in_ECF":
            continue  # the measure of all others
        wide = np.zeros((*leaf.shape[:-1], leaf.shape[-1] + 1) if leaf.ndim else (1,))
        for other in (wide, leaf.astype("float32")):
            broken = tree.from_leaves(params, [*leaves[:i], other, *leaves[i + 1 :]])
            got = rf"{name} must have the shape .* got {re.escape(str(other.shape))} and"
            with pytest.raises(ValueError, match=rf"{got} {other.dtype}\. Draw"):
                layer.moe_forward(x_NC, broken, cfg)


def test_a_router_of_another_kind_is_refused():
    (_, params), (slots, _) = layer_of(), layer_of(selection=SoftSlots(), top_k=3)
    with pytest.raises(ValueError, match=r"of the type SoftParams, .* got RouterParams"):
        layer.moe_forward(np.ones((5, 4)), params, slots)


def layer_of(**knobs):
    cfg = MoEConfig(**{"num_experts": 3, "top_k": 2, "hidden": 6} | knobs)
    return cfg, layer.init_moe(np.random.default_rng(0), cfg, 4, "float64")


def test_numbers_of_float64_from_outside_change_no_type_and_noise_of_float64_is_refused():
    cfg = MoEConfig(
        num_experts=3, top_k=2, hidden=6, noise=GaussianNoise(), balance=(SwitchLoss(),)
    )
    params = layer.init_moe(np.random.default_rng(0), cfg, 4, "float32")
    x_NC = np.random.default_rng(1).standard_normal((5, 4), dtype="float32")
    y_NC, _, _, cache = layer.moe_forward(x_NC, params, cfg)
    dx_NC, grads = layer.moe_backward(np.ones_like(y_NC), np.float64(1), cache)
    assert {a.dtype for a in (dx_NC, *tree.leaves(grads))} == {np.dtype("float32")}
    with pytest.raises(ValueError, match=r"the type float32, got .* and float64"):
        layer.moe_forward(x_NC, params, cfg, np.zeros((5, 3)))


@pytest.mark.parametrize(
    "dy",
    [np.ones((5, 1), "f"), np.ones((1, 4), "f"), np.ones((9, 4), "f"), np.ones((5, 4))],
    ids=["one channel", "one token", "other tokens", "float64"],
)
@pytest.mark.parametrize("kind", ["top-k", "soft slots"])
def test_a_gradient_that_is_not_like_the_result_is_refused(kind, dy):
    cfg = MoEConfig(num_experts=3, top_k=2, hidden=6)
    if kind == "soft slots":
        cfg = MoEConfig(num_experts=3, top_k=3, hidden=6, selection=SoftSlots(slots=2))
    params = layer.init_moe(np.random.default_rng(0), cfg, 4, "float32")
    x_NC = np.random.default_rng(1).standard_normal((5, 4), dtype="float32")
    *_, cache = layer.moe_forward(x_NC, params, cfg)
    wanted = r"moe_backward: dy must have the shape \(5, 4\) and the type float32 of y, got .*"
    with pytest.raises(ValueError, match=f"{wanted}{re.escape(str(dy.shape))} and {dy.dtype}"):
        layer.moe_backward(dy, np.float32(0), cache)


def test_each_matrix_of_an_mlp_of_three_branches_starts_at_its_scale():
    params = mlp.init_mlp(np.random.default_rng(0), 64, 400, "swiglu3", "float64", 4)
    found = {name: array.std() for name, array in params._asdict().items()}
    wide = dict.fromkeys(("in_CF", "up_CF", "third_CF"), 1 / 8)
    assert found == pytest.approx(wide | {"out_FC": 0.01}, rel=0.05)


def test_the_coin_of_the_second_expert_is_even_between_zero_and_one():
    cfg = tiny.moe(selection=SecondExpert())
    coin = router.draw_noise(np.random.default_rng(0), cfg, 4000, 3, "float64")
    assert coin.min() >= 0 and coin.max() < 1
    assert abs(coin.mean() - 0.5) < 0.02 and abs(coin.std() - 12**-0.5) < 0.01


def test_shares_of_tiny_scores_are_shares():
    found, _ = score.share_forward(np.array([[1e-20, 3e-20]]))
    np.testing.assert_allclose(found, [[0.25, 0.75]])
