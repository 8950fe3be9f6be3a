"""The optimizers against loops over single numbers, and the learning rate by hand."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import tiny

from moe_numpy import tree
from moe_numpy.config import SGD, AdamW, TrainingConfig
from moe_numpy.moe import jacobs
from moe_numpy.ops import rows
from moe_numpy.training import loop, optimizer
from moe_numpy.transformer import model

ADAMS = (
    AdamW(),
    AdamW(beta1=0.0, beta2=0.5, eps=1e-2, weight_decay=0.0),
    AdamW(beta1=0.7, beta2=0.0, eps=1e-3, weight_decay=0.3),
)
SGDS = (SGD(), SGD(momentum=0.0, weight_decay=0.4), SGD(momentum=0.6, weight_decay=0.2))
RATES = (0.3, 0.1, 0.2, 0.05, 0.4)


class Inner(NamedTuple):
    matrix: np.ndarray
    absent: np.ndarray | None
    bias: np.ndarray


class Params(NamedTuple):
    gain: np.ndarray
    inner: tuple[Inner, ...]
    stack: np.ndarray


def draw(rng):
    def inner():
        return Inner(rng.standard_normal((3, 4)), None, rng.standard_normal(4))

    return Params(rng.standard_normal(5), (inner(), inner()), rng.standard_normal((2, 3, 2)))


def adamw(p, gradients, cfg, rates, decays):
    """Follow one number through AdamW as in Loshchilov and Hutter 2019, algorithm 2."""
    m = v = 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = cfg.beta1 * m + (1 - cfg.beta1) * g
        v = cfg.beta2 * v + (1 - cfg.beta2) * g * g
        unbiased_m, unbiased_v = m / (1 - cfg.beta1**t), v / (1 - cfg.beta2**t)
        decay = cfg.weight_decay if decays else 0.0
        p = p - rate * (unbiased_m / (math.sqrt(unbiased_v) + cfg.eps) + decay * p)
    return p, m, v


def sgd(p, gradients, cfg, rates, decays):
    velocity = 0.0
    for g, rate in zip(gradients, rates, strict=True):
        velocity = cfg.momentum * velocity + g
        p = p - rate * (velocity + (cfg.weight_decay if decays else 0.0) * p)
    return p, velocity, 0.0


def judge(start, gradients, cfg):
    """Follow every number of one array by itself; return where it and its averages end."""
    follow = adamw if isinstance(cfg, AdamW) else sgd
    histories = np.stack([g.reshape(-1) for g in gradients], axis=1).tolist()
    ends = [
        follow(p, history, cfg, RATES[: len(history)], start.ndim > 1)
        for p, history in zip(start.reshape(-1).tolist(), histories, strict=True)
    ]
    return np.array(ends).T.reshape(3, *start.shape)


def optimize(start, gradients, cfg, scale=1.0):
    params = tree.map(np.copy, start)
    state = optimizer.init_state(params, cfg)
    for step, grads in enumerate(gradients):
        optimizer.update(params, grads, state, cfg, step, RATES[step], scale)
    return params, state


def agree(start, gradients, cfg, factor=1.0):
    params, state = optimize(start, gradients, cfg, factor)
    scaled = [[factor * g for g in tree.leaves(grads)] for grads in gradients]
    seconds = tree.leaves(state.second) if isinstance(cfg, AdamW) else None
    for i, (name, begin) in enumerate(tree.named_leaves(start)):
        p, first, second = judge(begin, [grads[i] for grads in scaled], cfg)
        np.testing.assert_allclose(tree.leaves(params)[i], p, rtol=1e-11, atol=1e-15, err_msg=name)
        np.testing.assert_allclose(tree.leaves(state.first)[i], first, rtol=1e-11, atol=1e-15)
        if seconds:
            np.testing.assert_allclose(seconds[i], second, rtol=1e-11)


@pytest.mark.parametrize("cfg", ADAMS + SGDS, ids=str)
def test_the_optimizers_agree_with_a_loop_over_single_numbers(cfg):
    rng = np.random.default_rng(0)
    agree(draw(rng), [draw(rng) for _ in RATES], cfg)
    agree(draw(rng), [draw(rng) for _ in RATES], cfg, factor=0.37)


@pytest.mark.parametrize("cfg", [ADAMS[0], SGDS[2]], ids=str)
def test_arrays_larger_than_a_block_are_updated_to_the_last_number(cfg, monkeypatch):
    monkeypatch.setattr(optimizer, "BLOCK", 1 << 13)
    rng = np.random.default_rng(1)
    shapes = ((optimizer.BLOCK + 3,), (2, optimizer.BLOCK // 2 + 1), (2, optimizer.BLOCK // 2))

    def numbers():
        return tuple(rng.standard_normal(shape) for shape in shapes)

    agree(numbers(), [numbers(), numbers()], cfg)


@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_the_size_of_a_block_changes_no_bit(block, monkeypatch):
    rng = np.random.default_rng(2)
    start, gradients = draw(rng), [draw(rng) for _ in RATES]
    expected = optimize(start, gradients, AdamW())
    monkeypatch.setattr(optimizer, "BLOCK", block)
    assert tiny.same_bits(optimize(start, gradients, AdamW()), expected)


def test_weight_decay_shrinks_matrices_alone_and_does_not_pass_through_the_averages():
    rng = np.random.default_rng(3)
    start = draw(rng)
    zero = tree.map(np.zeros_like, start)
    for cfg in (AdamW(weight_decay=0.5), SGD(weight_decay=0.5)):
        params, state = optimize(start, [zero], cfg)
        for before, after in zip(tree.leaves(start), tree.leaves(params), strict=True):
            factor = 1.0 if before.ndim == 1 else 1 - RATES[0] * 0.5
            np.testing.assert_allclose(after, factor * before, rtol=1e-15)
        assert not any(leaf.any() for leaf in tree.leaves(state))


def test_biases_of_heads_and_experts_do_not_decay_although_they_have_two_axes():
    moe = tiny.moe(expert_bias=True, router_bias=True, activation="swiglu")
    flavors = {"attention_bias": True, "sinks": True, "qk_norm": "full", "tied": False}
    run = loop.new_run(tiny.corpus(), tiny.model(moe, **flavors), tiny.training())
    ones = tree.map(np.ones_like, run.params)
    zero = tree.map(np.zeros_like, ones)
    optimizer.update(ones, zero, optimizer.init_state(ones, SGD()), SGD(weight_decay=0.5), 0, 0.1)
    leaves = tree.named_leaves(ones)
    spared = {name.rpartition(".")[2] for name, leaf in leaves if (leaf == 1).all()}
    assert spared >= {"q_HD", "k_GD", "v_GD", "out_C", "sink_H", "in_EF", "up_EF", "out_EC"}
    assert not spared & {"q_CHD", "in_ECF", "out_EFC", "w_CE", "token_VC", "head_CV"}


def test_the_biases_of_linear_experts_do_not_decay():
    drawn = jacobs.init_jacobs(np.random.default_rng(0), 4, 3, 2, "float64")
    ones, zero = tree.map(np.ones_like, drawn), tree.map(np.zeros_like, drawn)
    optimizer.update(ones, zero, optimizer.init_state(ones, SGD()), SGD(weight_decay=0.5), 0, 0.1)
    assert (ones.gate_bias_E == 1).all() and (ones.expert_bias_EO == 1).all()
    assert (ones.gate_CE < 1).all() and (ones.expert_ECO < 1).all()


class Experts(NamedTuple):
    in_ECF: np.ndarray
    out_EC: np.ndarray
    w_CE: np.ndarray


def lazy(p, gradients, idle, cfg, decays):
    """Follow one number through AdamW that does nothing in the steps in which it is idle."""
    m = v = 0.0
    for t, (g, rate) in enumerate(zip(gradients, RATES, strict=True), start=1):
        if idle[t - 1]:
            continue
        m = cfg.beta1 * m + (1 - cfg.beta1) * g
        v = cfg.beta2 * v + (1 - cfg.beta2) * g * g
        size = math.sqrt(v / (1 - cfg.beta2**t)) + cfg.eps
        decay = cfg.weight_decay if decays else 0.0
        p = p - rate * (m / (1 - cfg.beta1**t) / size + decay * p)
    return p


def test_idle_experts_may_be_skipped_and_nobody_else():
    rng, cfg = np.random.default_rng(7), AdamW(weight_decay=0.3, skip_idle=True)
    shapes = Experts((3, 2, 4), (3, 2), (2, 3))
    start = Experts(*map(rng.standard_normal, shapes))
    gradients = [Experts(*map(rng.standard_normal, shapes)) for _ in RATES]
    for step, expert in ((0, 1), (2, 1), (2, 2), (4, 0)):
        for leaf in gradients[step][:2]:
            leaf[expert] = 0.0
    gradients[1].in_ECF[0, 0] = 0.0  # a part of an expert with work
    gradients[3].w_CE[:] = 0.0  # not an expert's
    params, _ = optimize(start, gradients, cfg)
    plain, _ = optimize(start, gradients, AdamW(weight_decay=0.3))
    for name in ("in_ECF", "out_EC"):
        for place, begin in np.ndenumerate(getattr(start, name)):
            idle = [not getattr(g, name)[place[0]].any() for g in gradients]
            history = [getattr(g, name)[place] for g in gradients]
            expected = lazy(begin, history, idle, cfg, decays=name == "in_ECF")
            assert getattr(params, name)[place] == pytest.approx(expected, rel=1e-11)
    assert not np.isclose(params.in_ECF, plain.in_ECF).any()  # each of the three was idle once
    assert tiny.same_bits(params.w_CE, plain.w_CE)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_first_step_of_adamw_is_the_rate_whatever_the_size_of_the_gradient(size):
    start = np.zeros((2, 2))
    p, _ = optimize(start, [np.array([[size, -size], [size, size]])], AdamW())
    np.testing.assert_allclose(p, RATES[0] * np.array([[-1, 1], [-1, -1]]), rtol=1e-4)


def test_an_update_leaves_the_gradients_alone_and_works_in_place_and_in_float32():
    rng = np.random.default_rng(4)
    start, grads = (tree.map(np.float32, draw(rng)) for _ in range(2))
    kept = tree.map(np.copy, grads)
    for cfg in (AdamW(), SGD()):
        params = tree.map(np.copy, start)
        arrays = tree.leaves(params)
        state = optimizer.init_state(params, cfg)
        optimizer.update(params, grads, state, cfg, 0, 0.1, 0.5)
        assert all(a is b for a, b in zip(arrays, tree.leaves(params), strict=True))
        assert {a.dtype for a in tree.leaves((params, state))} == {np.dtype("float32")}
        assert all((a != b).all() for a, b in zip(arrays, tree.leaves(start), strict=True))
    assert tiny.same_bits(grads, kept)


def test_gradients_may_be_views_but_parameters_may_not():
    rng = np.random.default_rng(5)
    start, g = rng.standard_normal((3, 4)), rng.standard_normal((4, 3))
    for cfg in (AdamW(), SGD()):
        assert tiny.same_bits(optimize(start, [g.T], cfg), optimize(start, [g.T.copy()], cfg))
    with pytest.raises(ValueError, match=r"contiguous arrays, got a view for gain"):
        optimizer.init_state(draw(rng)._replace(gain=np.zeros(10)[::2]), AdamW())


def test_the_gradient_norm_is_that_of_all_numbers_together():
    grads = draw(np.random.default_rng(6))
    every = [value for leaf in tree.leaves(grads) for value in leaf.reshape(-1).tolist()]
    expected = math.sqrt(math.fsum(value * value for value in every))
    assert optimizer.norm(grads) == pytest.approx(expected, rel=1e-14)
    assert optimizer.norm((np.array([[3.0], [0.0]]), None, np.array([4.0]))) == 5.0


def moved(clip, **flavors):
    """Take one step of plain descent; return how far all parameters moved, over the rate."""
    plain = {"optimizer": SGD(momentum=0.0), "warmup": 0, "rate": 0.25, "steps": 1}
    cfg, training = tiny.model(tiny.moe(), **flavors), tiny.training(clip=clip, **plain)
    run = loop.new_run(tiny.corpus(), cfg, training, "float64")
    before = tree.map(np.copy, run.params)
    loop.train(run, show_progress=False)
    steps = tree.map(lambda a, b: (a - b) / 0.25, before, run.params)
    return steps, optimizer.norm(steps), run.series.norm[0]


def test_clipping_limits_the_norm_of_all_gradients_together_and_keeps_their_direction():
    free, length, norm = moved(None)
    assert length == pytest.approx(norm, rel=1e-9)
    above, length, same = moved(10 * norm)
    assert same == norm
    assert tiny.same_bits(above, free)
    clipped, length, same = moved(norm / 3)
    assert same == norm, "the series keep the norm before clipping"
    assert length == pytest.approx(norm / 3, rel=1e-9)
    for a, b in zip(tree.leaves(clipped), tree.leaves(free), strict=True):
        np.testing.assert_allclose(a, b / 3, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("logit_scale", [0.1, 10.0])
def test_small_gradients_are_clipped_like_large_ones(logit_scale):
    _, _, norm = moved(None, logit_scale=logit_scale)
    assert (norm < 0.5) == (logit_scale < 1)
    _, length, _ = moved(norm / 3, logit_scale=logit_scale)
    assert length == pytest.approx(norm / 3, rel=1e-9)


def test_the_rate_rises_linearly_then_falls_along_a_cosine_to_its_end():
    cfg = TrainingConfig(steps=10, warmup=4, rate=1.0, final_rate=0.1)
    expected = [0.2, 0.4, 0.6, 0.8, 1.0]
    assert [cfg.rate_at(step) for step in range(5)] == pytest.approx(expected)
    assert cfg.rate_at(6) == pytest.approx(0.1 + 0.9 * 0.75)  # cos(pi / 3) = 1/2
    assert cfg.rate_at(7) == pytest.approx(0.55)
    assert cfg.rate_at(8) == pytest.approx(0.1 + 0.9 * 0.25)
    assert cfg.rate_at(10) == cfg.rate_at(11) == pytest.approx(0.1)
    falling = [cfg.rate_at(step) for step in range(4, 10)]
    assert falling == sorted(falling, reverse=True) and falling[-1] > 0.1


def test_the_rate_without_warm_up_starts_at_its_peak_and_a_longer_warm_up_never_reaches_it():
    assert TrainingConfig(steps=5, warmup=0, rate=0.5).rate_at(0) == 0.5
    assert TrainingConfig(steps=5, warmup=9, rate=0.5).rate_at(4) == pytest.approx(0.25)


@pytest.mark.parametrize("few", [False, True])
def test_where_launches_cost_work_is_not_cut_into_blocks(few, monkeypatch):
    for module in (optimizer, rows):
        monkeypatch.setattr(module, "few_launches", lambda: few)
    calls, sqrt = [], np.sqrt
    monkeypatch.setattr(optimizer.xp, "sqrt", lambda *a, **k: calls.append(1) or sqrt(*a, **k))
    p, g, first, second = np.ones((4, 3 * optimizer.BLOCK), "float32")
    optimizer._adamw(p, g, first, second, AdamW(), 0, 1e-3, 1.0, 1.0)
    assert len(calls) == (1 if few else 3)
    calls.clear()
    rows.in_blocks(lambda x: calls.append(1), np.ones((3, rows.BLOCK)))
    assert len(calls) == (1 if few else 3)


def test_a_final_rate_above_the_rate_makes_it_constant_and_not_rising():
    cfg = TrainingConfig(steps=20, warmup=5, rate=1e-5)
    assert {cfg.rate_at(step) for step in range(5, 21)} == {1e-5}


def test_skipping_idle_experts_spares_no_vector_of_the_router():
    params = model.init_model(0, tiny.model(tiny.moe(router_bias=True)))
    before, cfg = tree.map(np.copy, params), AdamW(skip_idle=True)
    ones = tree.map(np.ones_like, params)
    optimizer.update(params, ones, optimizer.init_state(params, cfg), cfg, 0, 0.1)
    for (name, after), old in zip(tree.named_leaves(params), tree.leaves(before), strict=True):
        assert (after != old).all(), name


def test_a_tiny_norm_is_clipped_as_any_other():
    plain = {"optimizer": SGD(momentum=0.0), "warmup": 0, "rate": 0.25, "steps": 1}
    cfg = tiny.model(tiny.moe(), logit_scale=1e-4)

    def moved(clip):
        run = loop.new_run(tiny.corpus(), cfg, tiny.training(clip=clip, **plain), "float64")
        before = tree.map(np.copy, run.params)
        loop.train(run, show_progress=False)
        way = tree.map(lambda a, b: (a - b) / 0.25, before, run.params)
        return optimizer.norm(way), run.series.norm[0]

    _, norm = moved(None)
    length, _ = moved(norm / 3)
    assert norm < 1e-3 and length == pytest.approx(norm / 3, rel=1e-6)
