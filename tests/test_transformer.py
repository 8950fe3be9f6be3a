"""Attention, the whole model, and generation with kept keys and values."""

import dataclasses
import itertools
import math

import numpy as np
import oracles
import pytest
import tiny

from moe_numpy import tree
from moe_numpy.config import (
    SGD,
    AdamW,
    Assignment,
    Capacity,
    GaussianNoise,
    ImportanceLoss,
    LearnedNoise,
    LoadLoss,
    ModelConfig,
    MoEConfig,
    Shared,
    Sinkhorn,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe import jacobs
from moe_numpy.moe import layer as moe_layer
from moe_numpy.ops import loss, rotary
from moe_numpy.training import data, optimizer, shards
from moe_numpy.transformer import attention, block, generation, model

V, T = 13, 7
EXPERTS = MoEConfig(num_experts=3, top_k=2, hidden=5)


def config(**changes):
    knobs = {"vocab_size": V, "context": T, "layers": 2, "width": 16, "heads": 4, **changes}
    if knobs.get("moe") is None or knobs.get("moe_layers") is not None:
        knobs.setdefault("hidden", 6)
    return ModelConfig(**knobs)


def draw(seed, cfg, dtype="float64", spread=0.5):
    """Draw parameters without any special value: no gain of one, no bias of zero."""
    rng = np.random.default_rng(seed)
    params = model.init_model(rng, cfg, dtype)
    return tree.map(lambda leaf: rng.normal(0.1, spread, leaf.shape).astype(dtype), params)


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


SHAPES = [
    {"positions": positions, **heads, **feed}
    for positions, heads, feed in itertools.product(
        ("learned", "rotary"),
        ({}, {"kv_heads": 2}, {"kv_heads": 1}),
        ({}, {"moe": EXPERTS}, {"moe": EXPERTS, "moe_layers": (1,), "activation": "swiglu"}),
    )
]
LLAMA = {"norm": "rmsnorm", "positions": "rotary", "tied": False, "kv_heads": 2}
FLAVORS = {
    "Grok": {
        **LLAMA,
        "tied": True,
        "head_size": 6,
        "sandwich": True,
        "logit_cap": 0.8,
        "embedding_scale": 2.5,
        "logit_scale": 0.6,
        "moe": EXPERTS,
    },
    "OLMoE": {**LLAMA, "qk_norm": "full", "norm_eps": 0.1, "moe": EXPERTS},
    "Qwen3": {**LLAMA, "qk_norm": "head", "head_size": 10, "theta": 30.0, "moe": EXPERTS},
    "Llama 4": {**LLAMA, "qk_norm": "l2", "norm_eps": 0.1, "moe": EXPERTS},
    "gpt-oss": {**LLAMA, "attention_bias": True, "sinks": True, "head_size": 6, "moe": EXPERTS},
    "OpenMoE": {
        **LLAMA,
        "attention_scale": 1.0,
        "extra_ffn": True,
        "balance_over_layers": "mean",
        "hidden": 6,
        "moe": EXPERTS,
        "moe_layers": (1,),
    },
    "everything": {
        **LLAMA,
        "norm": "layernorm",
        "sandwich": True,
        "attention_bias": True,
        "qk_norm": "full",
        "sinks": True,
        "logit_cap": 1.5,
        "attention_scale": 0.7,
        "norm_eps": 0.2,
        "extra_ffn": True,
        "hidden": 6,
        "moe": EXPERTS,
    },
}
ENCODERS = {
    "encoder": {"causal": False},
    "encoder with sinks": {**FLAVORS["everything"], "causal": False},
}


def parametrize(flavors):
    return pytest.mark.parametrize("flavor", flavors.values(), ids=flavors)


# ------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("groups", [None, 2, 1])
def test_attention_agrees_with_the_judge_at_every_position_and_head(positions, groups):
    cfg = config(positions=positions, kv_heads=groups)
    rng = np.random.default_rng(0)
    params = draw(1, cfg).blocks[0].attention
    x_BTC = rng.standard_normal((2, T, 16))
    y_BTC, cache = attention.attention_forward(x_BTC, params, cfg)
    assert_attention_is_that_of_the_judge(x_BTC, y_BTC, cache, params, cfg)


@parametrize(FLAVORS | ENCODERS)
def test_every_flavor_of_attention_agrees_with_the_judge(flavor):
    cfg = config(**flavor)
    params = draw(1, cfg).blocks[0].attention
    x_BTC = np.random.default_rng(0).standard_normal((2, T, 16))
    y_BTC, cache = attention.attention_forward(x_BTC, params, cfg)
    assert_attention_is_that_of_the_judge(x_BTC, y_BTC, cache, params, cfg)


def assert_attention_is_that_of_the_judge(x_BTC, y_BTC, cache, params, cfg):
    *_, a_BHTS, _, _ = cache
    assert a_BHTS.shape == (2, 4, T, T)
    for b, t in itertools.product(range(2), range(T)):
        answer, weights = oracles.attend(x_BTC[b], t, params, cfg)
        close(y_BTC[b, t], answer)
        close(a_BHTS[b, :, t, : len(weights[0])], weights)


def test_nobody_attends_to_the_future_and_the_weights_sum_to_one():
    rng = np.random.default_rng(0)
    for queries in (1, 3, 6):
        q_BHTD = 3.0 * rng.standard_normal((2, 3, queries, 4))
        a_BHTS, cache = attention.scores_forward(q_BHTD, rng.standard_normal((2, 3, 6, 4)))
        close(a_BHTS.sum(-1), 1.0)
        for t in range(queries):  # the queries are the last of the six positions
            now = 6 - queries + t
            assert (a_BHTS[:, :, t, now + 1 :] == 0.0).all()
            assert (a_BHTS[:, :, t, : now + 1] > 0.0).all()
        _, dk_BHSD, dsink_H = attention.scores_backward(rng.standard_normal(a_BHTS.shape), cache)
        assert dk_BHSD.any()
        assert dsink_H is None


def test_a_sink_takes_attention_away_and_a_small_one_none():
    rng = np.random.default_rng(0)
    q_BHTD, k_BHSD = rng.standard_normal((2, 2, 3, 5, 4))
    plain, _ = attention.scores_forward(q_BHTD, k_BHSD)
    for sink in (-1e4, -2.0, 0.0, 3.0, 1e4):
        weights, _ = attention.scores_forward(q_BHTD, k_BHSD, np.array([sink, -1e4, sink]))
        close(weights[:, 1], plain[:, 1])
        left = weights.sum(-1, keepdims=True)
        assert (left <= 1.0 + 1e-12).all()
        if abs(sink) < 1e4:
            assert (left[:, 0] < 1.0).all()
            close(weights[:, 0], (left * plain)[:, 0])  # taken from all positions alike
    assert not weights[:, 0].any()


def test_the_cap_bounds_large_logits_and_leaves_small_ones():
    rng = np.random.default_rng(0)
    q_BHTD, k_BHSD = rng.standard_normal((2, 2, 3, 5, 4))
    plain, _ = attention.scores_forward(q_BHTD, k_BHSD)
    close(attention.scores_forward(q_BHTD, k_BHSD, cap=1e8)[0], plain)
    capped, cache = attention.scores_forward(1e6 * q_BHTD, k_BHSD, cap=0.5)
    past = capped[..., np.tri(5, dtype=bool)]
    assert past.min() > math.exp(-1.0) / 6  # of at most five logits from -0.5 to 0.5
    gradients = attention.scores_backward(np.ones_like(capped), cache)
    assert all(np.isfinite(grad).all() for grad in gradients[:2])


@pytest.mark.parametrize("kind", ["head", "full", "l2"])
def test_normalized_queries_do_not_feel_how_large_they_were(kind):
    x_BHTD = np.random.default_rng(0).standard_normal((2, 3, 5, 4))
    gain = {"head": np.linspace(0.5, 2.0, 4), "full": np.linspace(0.5, 2.0, 12), "l2": None}[kind]
    small, _ = attention.qk_norm_forward(x_BHTD, gain, kind, 1e-16)
    large, _ = attention.qk_norm_forward(1e3 * x_BHTD, gain, kind, 1e-16)
    close(small, large)
    one_head = x_BHTD * np.array([1.0, 5.0, 1.0])[:, None, None]
    changed, _ = attention.qk_norm_forward(one_head, gain, kind, 1e-16)
    alone = np.abs(changed - small).max((0, 2, 3)) < 1e-12
    assert alone.all() == (kind != "full")


def test_a_norm_without_gain_may_stand_before_the_rotation_or_after_it():
    x_BHTD, turns = (
        np.random.default_rng(0).standard_normal((2, 3, 5, 4)),
        rotary.turns(np.arange(5), 4),
    )
    turned, _ = rotary.rotary_forward(x_BHTD, *turns)
    after, _ = attention.qk_norm_forward(turned, None, "l2", 0.1)
    normed, _ = attention.qk_norm_forward(x_BHTD, None, "l2", 0.1)
    close(rotary.rotary_forward(normed, *turns)[0], after)


def test_optional_parameters_start_without_effect_and_have_the_sizes_of_the_heads():
    cfg = config(**FLAVORS["everything"], head_size=10)
    params = model.init_model(np.random.default_rng(0), cfg).blocks[0].attention
    assert params.q_CHD.shape == (16, 4, 10)
    assert params.out_HDC.shape == (4, 10, 16)
    biases = (params.q_HD, params.k_GD, params.v_GD, params.out_C, params.sink_H)
    assert [b.shape for b in biases] == [(4, 10), (2, 10), (2, 10), (16,), (4,)]
    assert not any(b.any() for b in biases)
    assert [g.shape for g in (params.q_gain, params.k_gain)] == [(40,), (20,)]
    assert (params.q_gain == 1.0).all()
    assert (params.k_gain == 1.0).all()
    plain = model.init_model(np.random.default_rng(0), config()).blocks[0].attention
    assert plain[4:] == (None,) * 7


def test_rotary_turns_keep_lengths_and_depend_on_the_distance_only():
    def turn(x, position):
        return rotary.rotary_forward(x, *rotary.turns(np.array([position]), 6))[0]

    q, k = np.random.default_rng(0).standard_normal((2, 1, 6))
    scores = []
    for shift in (0, 1, 17):
        q_turned, k_turned = turn(q, 5 + shift), turn(k, 2 + shift)
        scores.append(q_turned[0] @ k_turned[0])
        close(np.linalg.norm(q_turned), np.linalg.norm(q))
        close(q_turned[0], oracles.turn(q[0].tolist(), 5 + shift))
    close(scores, scores[0])
    assert abs(turn(q, 5)[0] @ turn(k, 3)[0] - scores[0]) > 1e-3
    close(turn(q, 0), q)


# ------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("shape", SHAPES[::2])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_agree_with_the_judge(shape, norm, tied):
    cfg = config(norm=norm, tied=tied, **shape)
    params = draw(2, cfg)
    token_BT = np.random.default_rng(0).integers(0, V, (2, 5))
    logits_BTV, aux, reports, _ = model.model_forward(token_BT, params, cfg)
    for b in range(2):
        close(logits_BTV[b], oracles.model_logits(token_BT[b].tolist(), params, cfg), 1e-11)
    assert aux == 0.0
    assert len(reports) == (0 if cfg.moe is None else len(cfg.moe_layers or (0, 1)))


@parametrize(FLAVORS | ENCODERS)
def test_the_logits_of_every_flavor_agree_with_the_judge(flavor):
    cfg = config(**flavor)
    params = draw(2, cfg)
    token_BT = np.random.default_rng(0).integers(0, V, (2, 5))
    logits_BTV, _, _, _ = model.model_forward(token_BT, params, cfg)
    for b in range(2):
        close(logits_BTV[b], oracles.model_logits(token_BT[b].tolist(), params, cfg))


def test_an_encoder_sees_later_tokens():
    token_BT = np.random.default_rng(1).integers(0, V, (1, T))
    changed_BT = token_BT.copy()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % V
    for causal in (True, False):
        cfg = config(causal=causal)
        params = draw(3, cfg)
        before, after = (model.model_forward(u, params, cfg)[0] for u in (token_BT, changed_BT))
        assert (np.abs(before - after)[:, :-1].max(-1) > 1e-6).all() == (not causal)


@pytest.mark.parametrize("limit", [None, Capacity(factor=0.7), Capacity(overflow="next_best")])
def test_logits_do_not_depend_on_later_tokens(limit):
    experts = MoEConfig(num_experts=3, top_k=2, hidden=5, capacity=limit)
    cfg = config(moe=experts)
    params = draw(3, cfg)
    token_BT = np.random.default_rng(1).integers(0, V, (1, T))
    for t in range(1, T):
        changed_BT = token_BT.copy()
        changed_BT[:, t:] = (changed_BT[:, t:] + 1 + np.arange(T - t)) % V
        before, after = (model.model_forward(u, params, cfg)[0] for u in (token_BT, changed_BT))
        close(before[:, :t], after[:, :t])
        assert np.abs(before[:, t:] - after[:, t:]).max() > 1e-3


def test_the_model_adds_up_the_balance_terms_of_its_layers():
    terms = (SwitchLoss(weight=0.5), ZLoss(weight=0.1))
    cfg = config(moe=MoEConfig(num_experts=3, top_k=2, hidden=5, balance=terms))
    params = draw(4, cfg)
    token_BT = np.random.default_rng(0).integers(0, V, (2, T))
    loss, report, _ = model.loss_forward(token_BT, token_BT, params, cfg)
    close(loss, report.cross_entropy + report.aux)
    stream, total = params.token_VC[token_BT] + params.position_TC, 0.0
    for own in params.blocks:
        for x_TC in stream:  # one sequence after the other
            seen = np.array([oracles.normalize(x, own.norm_1) for x in x_TC.tolist()])
            x_TC += [oracles.attend(seen, t, own.attention, cfg)[0] for t in range(T)]
        rows = stream.reshape(-1, cfg.width)  # the experts see the tokens of both
        seen = np.array([oracles.normalize(x, own.norm_2) for x in rows.tolist()])
        found = oracles.moe_layer(seen, own.feed, cfg.moe)
        rows += found.y
        total += found.aux
    close(report.aux, total, 1e-11)


def test_the_balance_terms_may_be_averaged_over_the_layers_with_experts():
    terms = (SwitchLoss(weight=0.5), ZLoss(weight=0.1))
    experts = MoEConfig(num_experts=3, top_k=2, hidden=5, balance=terms)
    token_BT = np.random.default_rng(0).integers(0, V, (2, T))
    aux = {}
    for over in ("sum", "mean"):
        shape = {"layers": 4, "moe": experts, "moe_layers": (0, 1, 3), "hidden": 6}
        cfg = config(**shape, balance_over_layers=over)
        aux[over] = model.loss_forward(token_BT, token_BT, draw(4, cfg), cfg)[1].aux
    close(aux["sum"], 3.0 * aux["mean"])
    assert aux["mean"] > 0.1


def test_the_dense_twin_has_no_experts_no_aux_and_no_noise():
    cfg = config()
    token_BT = np.zeros((1, 3), int)
    _, report, cache = model.loss_forward(token_BT, token_BT, draw(0, cfg), cfg)
    assert report.aux == 0.0
    assert report.layers == ()
    assert model.draw_noise(np.random.default_rng(0), cfg, 3) is None
    assert not any(
        "router" in name for name, _ in tree.named_leaves(model.loss_backward(1.0, cache))
    )
    assert cfg.evaluation() == cfg


def test_noise_is_drawn_for_the_layers_with_experts_only():
    experts = MoEConfig(num_experts=3, top_k=2, hidden=5, noise=LearnedNoise())
    cfg = config(moe=experts, moe_layers=(1,))
    noise = model.draw_noise(np.random.default_rng(0), cfg, 10, "float64")
    assert noise[0] is None
    assert noise[1].shape == (10, 3)
    token_BT = np.random.default_rng(0).integers(0, V, (2, 5))
    params = draw(0, cfg)
    noisy, clean = (model.model_forward(token_BT, params, cfg, u)[0] for u in (noise, None))
    assert np.abs(noisy - clean).max() > 1e-6


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("moe", [None, EXPERTS])
def test_an_untrained_model_guesses_and_loses_about_the_logarithm_of_the_vocabulary(tied, moe):
    cfg = config(vocab_size=50, width=32, context=20, tied=tied, moe=moe)
    params = model.init_model(np.random.default_rng(0), cfg, "float64")
    token_BT, target_BT = np.random.default_rng(1).integers(0, 50, (2, 30, 20))
    _, report, _ = model.loss_forward(token_BT, target_BT, params, cfg)
    assert abs(report.cross_entropy - math.log(50)) < 0.05


def test_a_tied_table_gets_the_sum_of_the_gradients_of_both_its_uses():
    tied, untied = config(tied=True), config(tied=False)
    params = draw(5, tied)
    twin = params._replace(head_CV=params.token_VC.T.copy())
    token_BT, target_BT = np.random.default_rng(0).integers(0, V, (2, 3, T))
    loss, _, cache = model.loss_forward(token_BT, target_BT, params, tied)
    twin_loss, _, twin_cache = model.loss_forward(token_BT, target_BT, twin, untied)
    close(loss, twin_loss)
    grads, twins = model.loss_backward(1.0, cache), model.loss_backward(1.0, twin_cache)
    close(grads.token_VC, twins.token_VC + twins.head_CV.T)
    assert grads.head_CV is None
    assert np.abs(twins.head_CV).max() > 1e-3
    close(grads.position_TC, twins.position_TC)


def test_label_smoothing_mixes_the_target_with_the_uniform_distribution():
    cfg = config()
    params = draw(6, cfg)
    token_BT, target_BT = np.random.default_rng(0).integers(0, V, (2, 1, T))
    for smoothing in (0.0, 0.1, 0.6):
        loss, _, cache = model.loss_forward(token_BT, target_BT, params, cfg, smoothing=smoothing)
        logits = oracles.model_logits(token_BT[0].tolist(), params, cfg)
        close(loss, oracles.cross_entropy(logits, target_BT[0].tolist(), smoothing), 1e-11)
        assert np.isfinite(tree.leaves(model.loss_backward(1.0, cache))[0]).all()


def test_a_sequence_longer_than_the_context_or_an_unknown_token_is_refused():
    cfg = config()
    params = draw(0, cfg)
    with pytest.raises(ValueError, match=f"at most {T} tokens"):
        model.model_forward(np.zeros((1, T + 1), int), params, cfg)
    for bad in (-1, V):
        with pytest.raises(ValueError, match=f"from 0 to {V - 1}"):
            model.model_forward(np.array([[0, bad]]), params, cfg)
    with pytest.raises(ValueError, match="integers"):
        model.model_forward(np.array([[0.0, 1.0]]), params, cfg)
    for shape in ((T,), (1, 0), (1, T, 1)):
        with pytest.raises(ValueError, match=r"must be a table \(B, T\) of at least one column"):
            model.model_forward(np.zeros(shape, int), params, cfg)
    with pytest.raises(ValueError, match=r"got tokens of shape \(2, 3\) and targets of \(3, 2\)"):
        model.loss_forward(np.zeros((2, 3), int), np.zeros((3, 2), int), params, cfg)


def test_a_cache_serves_one_backward():
    cfg = config()
    token_BT = np.zeros((1, T), int)
    _, _, cache = model.loss_forward(token_BT, token_BT, draw(0, cfg), cfg)
    model.loss_backward(1.0, cache)
    with pytest.raises(ValueError, match=r"got one that a backward has consumed, or"):
        model.loss_backward(1.0, cache)


def test_the_backward_lets_go_of_a_layer_before_it_turns_to_the_one_below(monkeypatch):
    cfg, left, backward = config(layers=3), [], block.block_backward
    logits_BTV, aux, _, cache = model.model_forward(np.zeros((1, T), int), draw(0, cfg), cfg)
    caches = cache[3]
    note = lambda *a: left.append(len(caches)) or backward(*a)  # noqa: E731
    monkeypatch.setattr(block, "block_backward", note)
    model.model_backward(logits_BTV, aux, cache)
    assert left == [2, 1, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_slopes_of_the_loss(shape):
    cfg = config(**shape)
    params, rng = draw(7, cfg), np.random.default_rng(1)
    token_BT, target_BT = rng.integers(0, V, (2, 2, T))
    _, _, cache = model.loss_forward(token_BT, target_BT, params, cfg)
    grads = model.loss_backward(1.0, cache)
    assert type(grads) is type(params)
    for i, (name, leaf) in enumerate(tree.named_leaves(params)):
        direction, around = rng.standard_normal(leaf.shape), []
        for step in (1e-5, -1e-5):
            changed = tree.leaves(params)
            changed[i] = leaf + step * direction
            shifted = tree.from_leaves(params, changed)
            around.append(model.loss_forward(token_BT, target_BT, shifted, cfg)[0])
        slope = (around[0] - around[1]) / 2e-5
        got = (tree.leaves(grads)[i] * direction).sum()
        assert abs(got - slope) < 1e-6 * max(abs(slope), 1e-2), f"{name}: {got}, not {slope}"


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("limit", [None, Capacity(factor=0.8, overflow="next_best")])
def test_float32_parameters_give_float32_everywhere(norm, positions, limit):
    terms = (SwitchLoss(), ImportanceLoss(), LoadLoss(), ZLoss())
    experts = MoEConfig(
        num_experts=3, top_k=2, hidden=5, noise=LearnedNoise(), capacity=limit, balance=terms
    )
    for moe, tied in ((None, True), (experts, False)):
        cfg = config(moe=moe, norm=norm, positions=positions, tied=tied, kv_heads=2)
        params = model.init_model(np.random.default_rng(0), cfg)
        assert all(leaf.dtype == np.float32 for leaf in tree.leaves(params))
        token_BT, target_BT = np.random.default_rng(1).integers(0, V, (2, 2, T))
        noise = model.draw_noise(np.random.default_rng(2), cfg, 2 * T)
        loss, report, cache = model.loss_forward(token_BT, target_BT, params, cfg, noise, 0.1)
        assert loss.dtype == report.cross_entropy.dtype == report.aux.dtype == np.float32
        assert model.model_forward(token_BT, params, cfg, noise)[0].dtype == np.float32
        for name, grad in tree.named_leaves(model.loss_backward(loss.dtype.type(1), cache)):
            assert grad.dtype == np.float32, name


@parametrize(FLAVORS | ENCODERS)
def test_every_flavor_keeps_float32(flavor):
    cfg = config(**flavor)
    params = model.init_model(np.random.default_rng(0), cfg)
    assert all(leaf.dtype == np.float32 for leaf in tree.leaves(params))
    token_BT, target_BT = np.random.default_rng(1).integers(0, V, (2, 2, T))
    loss, report, cache = model.loss_forward(token_BT, target_BT, params, cfg)
    assert loss.dtype == report.aux.dtype == np.float32
    assert model.model_forward(token_BT, params, cfg)[0].dtype == np.float32
    for name, grad in tree.named_leaves(model.loss_backward(loss.dtype.type(1), cache)):
        assert grad.dtype == np.float32, name


# ------------------------------------------------------------------------------------ generation
@pytest.mark.parametrize("shape", [*SHAPES, *FLAVORS.values()])
@pytest.mark.parametrize("chunks", [[1] * T, [3, 1, 1, 1, 1], [2, 3, 2], [T]])
def test_kept_keys_and_values_give_the_logits_of_the_full_forward(shape, chunks):
    cfg = config(**shape)
    params = draw(8, cfg)
    token_BT = np.random.default_rng(0).integers(0, V, (2, T))
    wanted, _, _, _ = model.model_forward(token_BT, params, cfg)
    kv = tuple(attention.KeyValues(cfg, 2, "float64") for _ in params.blocks)
    start = 0
    for length in chunks:
        piece = token_BT[:, start : start + length]
        logits, _, _, _ = model.model_forward(piece, params, cfg, kv=kv)
        close(logits, wanted[:, start : start + length])
        start += length
    with pytest.raises(ValueError, match=f"at most {T} tokens"):
        model.model_forward(token_BT[:, :1], params, cfg, kv=kv)


def greedy(prompt, params, cfg, tokens):
    """Pick the best token each time from a fresh full forward; restart in the second half."""
    history, window = list(prompt), list(prompt)[-cfg.context :]
    for _ in range(tokens):
        if len(window) > cfg.context:
            window = history[-max(1, cfg.context // 2) :]
        logits = model.model_forward(np.array([window]), params, cfg.evaluation())[0][0, -1]
        history.append(int(np.argmax(logits)))
        window.append(history[-1])
    return history[len(prompt) :]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("context", [1, 2, 7])
def test_greedy_generation_is_that_of_full_forwards_even_beyond_the_context(positions, context):
    experts = MoEConfig(num_experts=3, top_k=1, hidden=5, capacity=Capacity(factor=0.5))
    cfg = config(positions=positions, moe=experts, context=context, tied=False)
    seen = set()
    for seed, prompt in enumerate([[3], [1, 2, 3], [5] * 9]):
        params = draw(seed, cfg)
        wanted = greedy(prompt, params, cfg, 20)
        cold = list(generation.generate(prompt, params, cfg, 20, rng=1, temperature=0))
        assert cold == wanted
        assert cold == list(generation.generate(prompt, params, cfg, 20, rng=2, top_k=1))
        seen |= set(wanted)
    assert len(seen) >= 3, "the models are too monotonous to tell anything"


@parametrize(FLAVORS)
def test_greedy_generation_of_every_flavor_is_that_of_full_forwards(flavor):
    cfg = config(**flavor)
    params = draw(1, cfg)
    wanted = greedy([1, 2, 3], params, cfg, 12)
    assert list(generation.generate([1, 2, 3], params, cfg, 12, temperature=0)) == wanted


@pytest.mark.parametrize("recompute", [False, True])
def test_a_forward_that_goes_on_keeps_no_layers_cache_and_has_no_backward(recompute):
    cfg = config(recompute=recompute)
    kv = tuple(attention.KeyValues(cfg, 1, "float64") for _ in range(cfg.layers))
    logits, _, _, cache = model.model_forward(np.array([[1, 2]]), draw(0, cfg), cfg, kv=kv)
    assert cache[3] == []
    with pytest.raises(ValueError, match=r"or of a forward with kv\. Run the forward again"):
        model.model_backward(logits, np.zeros(()), cache)


def test_keys_and_values_of_another_model_or_batch_are_refused():
    def new(batch=1, dtype="float64", **changes):
        other = config(**changes)
        return tuple(attention.KeyValues(other, batch, dtype) for _ in range(other.layers))

    cfg, uneven = config(), new()
    uneven[1].length = 2
    for kv, words in (
        (new()[:1], r"an entry of its own for each layer \(2\), got 1"),
        (new()[:1] * 2, r"an entry of its own for each layer \(2\), got 1"),
        (new() + new()[:1] * 2, "an entry of its own for each layer .* got 3"),
        ((*(twice := new()), twice[0]), r"as many entries as there are layers \(2\), got 3"),
        (uneven, r"the lengths of kv must be equal \(\{0\}\), got \{0, 2\}"),
        (new(batch=2), r"the shapes of kv must be .* got \{\(2, "),
        (new(context=T + 1), "the shapes of kv must be those of tokens and model"),
        (new(dtype="float32"), "the types of kv must be .*float64.* got {'float32'}"),
        ((), r"an entry of its own for each layer \(2\), got 0"),
        ((None, new()[0]), r"the entries of kv must be \({'KeyValues'}\), got .*'NoneType'"),
    ):
        with pytest.raises(ValueError, match=f"model_forward: .*{words}"):
            model.model_forward(np.array([[1]]), draw(0, cfg), cfg, kv=kv)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"causal": False}, "kv needs a causal model, got causal=False"),
        *(
            ({"moe": dataclasses.replace(EXPERTS, **limit)}, "kv needs experts without limits")
            for limit in (
                {"capacity": Capacity(factor=0.5)},
                {"selection": Sinkhorn()},
                {"selection": Assignment(), "top_k": 1},
            )
        ),
    ],
)
def test_keys_and_values_are_refused_where_tokens_depend_on_later_ones(changes, words):
    cfg = config(**changes)
    kv = tuple(attention.KeyValues(cfg, 1, "float64") for _ in range(cfg.layers))
    with pytest.raises(ValueError, match=f"model_forward: {words}"):
        model.model_forward(np.array([[1]]), draw(0, cfg), cfg, kv=kv)


def test_what_is_no_configuration_or_no_parameters_is_told():
    cfg = config(moe=EXPERTS)
    params, token_BT = draw(0, cfg), np.array([[1]])
    for do, words in (
        (lambda: model.init_model(0, EXPERTS), "init_model: .* a ModelConfig, got MoEConfig"),
        (lambda: model.draw_noise(0, None, 4), "draw_noise: .* a ModelConfig, got NoneType"),
        (lambda: model.model_forward(token_BT, cfg, params), "a ModelConfig, got ModelParams"),
        (lambda: model.model_forward(token_BT, [1], cfg), "be ModelParams, got list"),
        (lambda: generation.generate([1], None, cfg, 1), "generate: .* ModelParams, got NoneType"),
        (lambda: generation.generate([1], cfg, params, 1), "generate: .* got ModelParams"),
    ):
        with pytest.raises(ValueError, match=words):
            do()


@parametrize(ENCODERS)
def test_generation_refuses_an_encoder(flavor):
    cfg = config(**flavor)
    with pytest.raises(ValueError, match="must be causal, got causal=False"):
        generation.generate([1], draw(0, cfg), cfg, 2)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_generation_refuses_a_model_that_blew_up(temperature):
    cfg = config()
    params = draw(0, cfg)
    params.token_VC[:] = np.nan
    with pytest.raises(ValueError, match="must predict finite logits, got nan"):
        list(generation.generate([0], params, cfg, 2, rng=0, temperature=temperature))


def test_generation_keeps_yielding_known_tokens_and_the_seed_decides():
    cfg = config(moe=EXPERTS)
    params = draw(0, cfg, dtype="float32", spread=0.2)
    runs = [list(generation.generate(np.array([1, 2]), params, cfg, 40, rng=r)) for r in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) == 40
    assert all(isinstance(token, int) and 0 <= token < V for token in runs[0])
    assert len(set(runs[0])) > 3
    assert list(generation.generate([1], params, cfg, 0, rng=0)) == []


def test_tokens_are_drawn_as_often_as_the_model_says():
    cfg = config(layers=1)
    params = draw(1, cfg, spread=0.3)
    logits = model.model_forward(np.array([[4]]), params, cfg)[0][0, 0]
    wanted = np.array(oracles.softmax((logits / 0.7).tolist()))
    rng = np.random.default_rng(0)
    drawn = [
        next(generation.generate([4], params, cfg, 1, rng, temperature=0.7)) for _ in range(2000)
    ]
    share = np.bincount(drawn, minlength=V) / 2000
    assert np.abs(share - wanted).max() < 4.5 * np.sqrt(wanted * (1 - wanted) / 2000).max()


def test_sampling_keeps_exactly_what_temperature_top_k_and_top_p_say():
    logits_V = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2]))
    sample = generation.sampling_probabilities
    close(sample(logits_V), [0.1, 0.4, 0.05, 0.25, 0.2])
    close(sample(logits_V, temperature=0), [0, 1, 0, 0, 0])
    close(sample(logits_V, temperature=0, top_k=3, top_p=0.9), [0, 1, 0, 0, 0])
    close(sample(logits_V, top_k=1), [0, 1, 0, 0, 0])
    close(sample(logits_V, top_k=3), np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85)
    close(sample(logits_V, top_k=99), [0.1, 0.4, 0.05, 0.25, 0.2])
    close(sample(logits_V, top_p=0.3), [0, 1, 0, 0, 0])
    close(sample(logits_V, top_p=0.41), np.array([0, 0.4, 0, 0.25, 0]) / 0.65)
    close(sample(logits_V, top_p=0.64), np.array([0, 0.4, 0, 0.25, 0]) / 0.65)
    close(sample(logits_V, top_p=0.66), np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85)
    close(sample(logits_V, top_k=3, top_p=0.75), np.array([0, 0.4, 0, 0.25, 0]) / 0.65)
    close(sample(logits_V, temperature=0.5), oracles.softmax((2.0 * logits_V).tolist()))
    close(sample(np.zeros(4), top_k=2), [0.5, 0.5, 0, 0])


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("logits", [[1.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_sampling_refuses_logits_that_are_not_finite(logits, temperature):
    with pytest.raises(ValueError, match="sampling_probabilities: the model must predict finite"):
        generation.sampling_probabilities(np.array(logits), temperature)


def test_sampling_never_takes_a_token_of_minus_infinity():
    close(generation.sampling_probabilities(np.array([-np.inf, 2.0, 2.0])), [0, 0.5, 0.5])


@pytest.mark.parametrize("knob", ["temperature", "top_k", "top_p"])
def test_a_truth_value_is_no_knob_of_sampling(knob):
    with pytest.raises(ValueError, match=f"{knob} must"):
        generation.sampling_probabilities(np.zeros(3), **{knob: True})


def test_top_p_keeps_no_token_more_than_it_takes_to_reach_p_exactly():
    sample = generation.sampling_probabilities
    close(sample(np.zeros(4), top_p=0.5), [0.5, 0.5, 0, 0])
    close(sample(np.zeros(4), top_p=0.25), [1, 0, 0, 0])
    for V in (3, 10, 100):
        assert [(sample(np.zeros(V), top_p=n / V) > 0).sum() for n in range(1, V)] == [*range(1, V)]


def test_top_p_is_not_misled_by_rounding():
    # Fifty tokens of 0.02 each: two of them reach 0.04, although 0.06 - 0.02 < 0.04 in binary.
    kept = generation.sampling_probabilities(np.zeros(50), top_p=0.04)
    assert np.count_nonzero(kept) == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-40, 1e-60, 1e-310])
def test_tiny_temperatures_approach_the_greedy_choice_without_overflow(dtype, temperature):
    logits_V = np.array([1.0, 3.0, -2.0, 2.5], dtype)
    close(generation.sampling_probabilities(logits_V, temperature=temperature), [0, 1, 0, 0])


@pytest.mark.parametrize(
    ("prompt", "knobs", "words"),
    [
        ([], {}, "at least one token"),
        (np.zeros(0, int), {}, "at least one token"),
        ([0, V], {}, f"from 0 to {V - 1}"),
        ([-1], {}, f"from 0 to {V - 1}"),
        ([0], {"temperature": -0.1}, "temperature"),
        ([0], {"temperature": math.inf}, "temperature"),
        ([0], {"temperature": math.nan}, "temperature"),
        ([0], {"top_k": 0}, "top_k"),
        ([0], {"top_p": 0.0}, "top_p"),
        ([0], {"top_p": 1.5}, "top_p"),
    ],
)
def test_generation_refuses_what_cannot_work(prompt, knobs, words):
    cfg = config()
    with pytest.raises(ValueError, match=words):
        list(generation.generate(prompt, draw(0, cfg), cfg, 2, rng=0, **knobs))


def test_what_writes_into_the_stream_starts_smaller_the_deeper_the_model():
    experts = MoEConfig(num_experts=4, top_k=2, hidden=64)
    sizes = {"vocab_size": 5, "context": 4, "layers": 8, "width": 64, "heads": 4, "hidden": 64}
    cfg = ModelConfig(**sizes, moe=experts, moe_layers=(0,), extra_ffn=True)
    own, dense, *_ = model.init_model(np.random.default_rng(0), cfg, "float64").blocks
    branches = (own.attention.out_HDC, own.feed.experts.out_EFC, own.extra.out_FC)
    for w in (*branches, dense.feed.out_FC):
        assert w.std() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05)


CHANGES = {
    "blocks": {"layers": 3},
    "token_VC": {"vocab_size": V + 1},
    "position_TC": {"positions": "rotary"},
    "head_CV": {"tied": False},
    "norm.bias_C": {"norm": "rmsnorm"},
    "blocks.0.attention.q_CHD": {"heads": 1},
    "blocks.0.attention.k_CGD": {"kv_heads": 1},
    "blocks.0.attention.q_HD": {"attention_bias": True},
    "blocks.0.attention.q_gain": {"qk_norm": "head"},
    "blocks.0.attention.sink_H": {"sinks": True},
    "blocks.0.norm_1_post.gain_C": {"sandwich": True},
    "blocks.0.feed.in_CF": {"hidden": 5},
    "blocks.0.feed.up_CF": {"activation": "swiglu"},
    "experts in layer 0": {"moe": EXPERTS, "hidden": None},
}


@pytest.mark.parametrize("name", CHANGES)
def test_parameters_of_another_configuration_are_refused_by_name(name):
    cfg = config()
    other = dataclasses.replace(cfg, **CHANGES[name])
    with pytest.raises(ValueError, match=f"model_forward: {name} must be .* Draw"):
        model.model_forward(np.zeros((1, 2), int), draw(0, cfg), other)


def test_parameters_with_more_than_the_configuration_says_are_refused():
    cfg = config()
    for extra in ({"attention_bias": True}, {"qk_norm": "full"}, {"activation": "geglu"}):
        more = draw(0, dataclasses.replace(cfg, **extra))
        with pytest.raises(ValueError, match="must be None, as the configuration says"):
            model.model_forward(np.zeros((1, 2), int), more, cfg)
    half = draw(0, cfg)
    half = half._replace(blocks=tuple(tree.map(lambda leaf: leaf.astype("float32"), half.blocks)))
    with pytest.raises(ValueError, match=r"the type of blocks\.0\.norm_1\.gain_C must be float64"):
        model.model_forward(np.zeros((1, 2), int), half, cfg)
    whole = tree.map(lambda leaf: leaf.astype("float16"), half)
    with pytest.raises(ValueError, match="parameters must be of the type float32 or float64"):
        next(generation.generate(np.zeros(1, int), whole, cfg, 1))


LAYER = {"num_experts": 4, "top_k": 2, "hidden": 5, "activation": "silu"}
OTHER_EXPERTS = {
    "experts.up_ECF must be there": {"activation": "swiglu"},
    "the parameters must be of 3 experts of hidden width 5": {"num_experts": 3},
    "the parameters must be of 4 experts of hidden width 4": {"hidden": 4},
    "shared must be there": {"shared": Shared(hidden=3)},
    "router.offset_E must be there": {"router_bias": True},
    "router.bias_E must be there": {"bias_rate": 0.1},
    "experts.in_EF must be there": {"expert_bias": True},
}


@pytest.mark.parametrize("words", OTHER_EXPERTS)
def test_generation_refuses_experts_of_another_configuration_before_the_first_token(words):
    cfg = config(moe=MoEConfig(**LAYER), hidden=None)
    other = dataclasses.replace(cfg, moe=MoEConfig(**LAYER | OTHER_EXPERTS[words]))
    for prompt in ([1], [1] * T):
        with pytest.raises(ValueError, match=f"^generate: {words}"):
            generation.generate(np.array(prompt), draw(0, cfg), other, 1)


def test_generation_refuses_experts_of_another_width_or_type():
    cfg = config(moe=MoEConfig(**LAYER), hidden=None)
    wide = moe_layer.init_moe(0, cfg.moe, cfg.width + 1, "float64")
    half = moe_layer.init_moe(0, cfg.moe, cfg.width, "float32")
    for feed, words in ((wide, "the width of the experts"), (half, "the type of the experts")):
        params = draw(0, cfg)
        blocks = tuple(block._replace(feed=feed) for block in params.blocks)
        with pytest.raises(ValueError, match=f"^generate: {words} in layer 0 must be "):
            generation.generate(np.array([1]), params._replace(blocks=blocks), cfg, 1)


def test_types_and_depths_that_there_are_not_are_refused():
    cfg = config(moe=MoEConfig(**LAYER), hidden=None)
    for dtype in ("flaot32", "float16", int, None):
        with pytest.raises(ValueError, match="draw_noise: dtype must be one of 'float32', "):
            model.draw_noise(0, cfg, 4, dtype)
        with pytest.raises(ValueError, match="init_model: dtype must be one of 'float32', "):
            model.init_model(0, cfg, dtype)
    for dtype in (np.float32, np.dtype("float32")):
        assert model.init_model(0, cfg, dtype).token_VC.dtype == "float32"
    with pytest.raises(ValueError, match="init_moe: depth must be a whole number of at least 1"):
        moe_layer.init_moe(0, cfg.moe, cfg.width, "float32", 0)


def test_a_number_of_numpys_does_not_decide_the_type_of_the_loss():
    cfg = config()
    token, params = np.zeros((2, 3), int), model.init_model(0, cfg)
    plain, _, _ = model.loss_forward(token, token, params, cfg, smoothing=0.1)
    loss, _, _ = model.loss_forward(token, token, params, cfg, smoothing=np.float64(0.1))
    assert loss.dtype == "float32" and loss == plain


@pytest.mark.parametrize("logits", [[0.1, 0.2], np.zeros((1, 2)), np.zeros(0)])
def test_probabilities_of_what_is_no_row_of_logits_are_refused(logits):
    with pytest.raises(ValueError, match="sampling_probabilities: the logits must be a"):
        generation.sampling_probabilities(logits)


def test_the_doors_take_a_seed_for_a_generator():
    cfg = dataclasses.replace(config(), moe=EXPERTS, hidden=None)
    assert tiny.same_bits(model.init_model(3, cfg), model.init_model(np.random.default_rng(3), cfg))
    drawn = [
        moe_layer.init_moe(rng, EXPERTS, 4, "float64") for rng in (3, np.random.default_rng(3))
    ]
    assert tiny.same_bits(*drawn)
    noisy = dataclasses.replace(cfg, moe=dataclasses.replace(EXPERTS, noise=GaussianNoise()))
    drawn = [model.draw_noise(rng, noisy, 5) for rng in (3, np.random.default_rng(3))]
    assert all((a == b).all() for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda cfg: moe_layer.init_moe(0, EXPERTS, 0, "float32"),
            "init_moe: width must be a whol",
        ),
        (lambda cfg: model.draw_noise(0, cfg, 3, "int8"), "draw_noise: dtype must be one of"),
        (lambda cfg: model.draw_noise(0, cfg, -1), "draw_noise: tokens must be a whole number"),
        (lambda cfg: shards.cut(np.zeros((2, 3)), None, None, 0), "shards: their number must be a"),
        (lambda cfg: data.encode("a", ""), "encode: the alphabet must hold a character"),
        (
            lambda cfg: loss.cross_entropy_forward(np.zeros((2, 3)), np.zeros((2, 1), int)),
            r"cross_entropy_forward: targets must have the shape \(2,\), one for each row",
        ),
        (
            lambda cfg: jacobs.mixture_classification_forward(
                np.ones((2, 1)), np.zeros((2, 1, 3)), np.zeros(1, int)
            ),
            r"mixture_classification_forward: targets must have the shape \(2,\)",
        ),
        (
            lambda cfg: dataclasses.replace(cfg, norm_eps=1e-46),
            r"norm_eps must be at least 2\*\*-1",
        ),
        (lambda cfg: dataclasses.replace(cfg, logit_cap=1e-46), "logit_cap must be at least 2"),
        (lambda cfg: GaussianNoise(std=1e-46), "std must be at least 2"),
        (lambda cfg: LearnedNoise(floor=1e-46), "floor must be at least 2"),
        (lambda cfg: dataclasses.replace(cfg, layers=2**63), r"layers must be below 2\*\*63"),
    ],
)
def test_what_a_door_cannot_take_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(config())


def test_the_optimizer_takes_gradients_and_averages_of_its_parameters_alone():
    params, gradient = (np.ones((2, 3)),), (np.ones(1),)
    for cfg, other in ((AdamW(), SGD()), (SGD(), AdamW())):
        state = optimizer.init_state(params, cfg)
        of_one, of_two = (optimizer.init_state(p, cfg) for p in (gradient, 2 * params))
        half = (params[0].astype("float32"),)
        for wrong, words in (
            (
                (params, gradient, state),
                r"the gradient of 0 must be float64 of shape \(2, 3\), got",
            ),
            (
                (params, half, state),
                r"the gradient of 0 must be float64 .* got float32 of \(2, 3\)",
            ),
            ((params, 2 * params, state), "gradients for each of the 1 arrays .* got 2"),
            ((params, params, of_one), r"the average of 0 must be float64 of shape \(2, 3\), got"),
            ((params, params, of_two), "averages for each of the 1 arrays .* got 2"),
            ((tree.map(np.asfortranarray, params), params, state), "parameters must be contiguous"),
            ((params, params, tree.map(np.asfortranarray, state)), "averages must be contiguous"),
        ):
            with pytest.raises(ValueError, match=f"update: .*{words}"):
                optimizer.update(*wrong, cfg, 0, 0.1)
        for knobs, words in (
            ((-1, 0.1), "step must be"),
            ((0, math.nan), "rate must not be"),
            ((0, 0.1, -1.0), "scale must not be"),
        ):
            with pytest.raises(ValueError, match=f"update: {words}"):
                optimizer.update(params, params, state, cfg, *knobs)
        assert all((leaf == 0).all() for leaf in tree.leaves(state))
        with pytest.raises(ValueError, match="update: the state must be that of"):
            optimizer.update(params, params, optimizer.init_state(params, other), cfg, 0, 0.1)
    assert (params[0] == 1).all()
    optimizer.update(params, params, state, SGD(), 0, np.float32(0.1))  # and does not warn


def test_a_smoothing_of_float32_is_a_number():
    token = np.zeros((1, 2), int)
    cfg = config()
    given = (token, token, draw(0, cfg), cfg)
    found = [model.loss_forward(*given, smoothing=s)[0] for s in (0.125, np.float32(0.125))]
    assert found[0] == found[1]


def test_upstream_gradients_of_another_form_are_refused():
    cfg = config()
    token = np.zeros((2, 3), int)
    logits, _, _, cache = model.model_forward(token, draw(0, cfg), cfg)
    for wrong in (logits.swapaxes(0, 1), logits[0], logits.astype("float32"), logits.tolist()):
        with pytest.raises(ValueError, match="model_backward: dlogits must"):
            model.model_backward(wrong, 1.0, cache)
    for wrong in (None, np.ones(4), [1.0], 1j, np.array(1j), np.array("1"), "1"):
        with pytest.raises(ValueError, match="model_backward: daux must be one number"):
            model.model_backward(logits, wrong, cache)
    with pytest.raises(ValueError, match="daux must be one number, got complex128"):
        model.model_backward(logits, np.array(1j), cache)
    _, _, cache = model.loss_forward(token, token, draw(0, cfg), cfg)
    with pytest.raises(ValueError, match="loss_backward: dloss must be one number, got NoneType"):
        model.loss_backward(None, cache)
    with pytest.raises(ValueError, match=r"loss_forward: tokens must be an array, got list\. Make"):
        model.loss_forward([[1]], [[1]], draw(0, cfg), cfg)


@pytest.mark.parametrize(("norm", "positions"), [("layernorm", "learned"), ("rmsnorm", "rotary")])
def test_rows_too_large_to_square_are_not_silently_zero(norm, positions):
    cfg = dataclasses.replace(config(), norm=norm, positions=positions)
    params = model.init_model(0, cfg)
    params = params._replace(token_VC=params.token_VC * np.float32(1e21))
    token = np.array([[0, 1, 2]])
    logits, *_ = model.model_forward(token, params, cfg)
    assert np.isnan(logits).all()
    words = "generate: the model must predict finite logits"
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=words):
        list(generation.generate(token[0], params, cfg, 2, temperature=0))


def test_generation_with_an_expert_that_is_switched_off_agrees_with_the_forward():
    moe = MoEConfig(num_experts=3, top_k=3, hidden=5, router_bias=True, gate_weights="raw")
    cfg = dataclasses.replace(config(), moe=moe, hidden=None)
    params = draw(0, cfg)
    for own in params.blocks:
        own.feed.router.offset_E[1:] = -np.inf
    token = np.array([1])
    written = list(generation.generate(token, params, cfg, 3, temperature=0))
    whole = np.array([[1, *written]])
    logits, *_ = model.model_forward(whole, params, cfg)
    assert logits[0, :-1].argmax(1).tolist() == written


@pytest.mark.parametrize(("noise", "words"), [((None,), "arrays of noise"), ((1, 1), "without")])
def test_noise_for_other_layers_is_refused(noise, words):
    cfg = dataclasses.replace(config(), layers=2)
    noise = tuple(part and np.zeros((2, 3)) for part in noise)
    with pytest.raises(ValueError, match=words):
        model.model_forward(np.zeros((1, 2), int), draw(0, cfg), cfg, noise)


def test_the_loss_keeps_the_type_of_the_parameters_and_refuses_an_odd_smoothing():
    cfg = config()
    params = model.init_model(np.random.default_rng(0), cfg)
    token_BT = np.zeros((1, 2), int)
    _, _, cache = model.loss_forward(token_BT, token_BT, params, cfg)
    grads = model.loss_backward(np.float64(1), cache)
    assert {grad.dtype for grad in tree.leaves(grads)} == {np.dtype("float32")}
    for smoothing in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="0 <= smoothing < 1"):
            model.loss_forward(token_BT, token_BT, params, cfg, smoothing=smoothing)


def test_generation_counts_in_the_whole_numbers_of_numpy_too():
    cfg = config()
    new = generation.generate(np.array([0]), draw(0, cfg), cfg, np.int64(2))
    assert len(list(new)) == 2


@pytest.mark.parametrize(
    ("prompt", "tokens", "knobs", "words"),
    [
        ([[0, 1]], 2, {}, r"one row, got the shape \(1, 2\)"),
        ([0], -1, {}, "tokens must be a whole number"),
        ([0], 1.5, {}, "tokens must be a whole number"),
        ([0], 2, {"top_k": 1.5}, "top_k must be at least 1, got 1.5"),
        ([0], 2, {"temperature": "1"}, "temperature must be zero or positive, got '1'"),
    ],
)
def test_generation_refuses_what_is_of_another_kind(prompt, tokens, knobs, words):
    cfg = config()
    with pytest.raises(ValueError, match=words):
        generation.generate(np.array(prompt), draw(0, cfg), cfg, tokens, **knobs)


class Draws:
    """A generator that always draws the same number."""

    def __init__(self, number):
        self.random = lambda: number


def test_the_ends_of_what_can_be_drawn_belong_to_tokens_that_are_likely():
    draw = generation._draw
    assert draw(np.array([-2000.0, 1.0, 0.0]), Draws(0.0), 1.0, None, 1.0) == 1
    rng = np.random.default_rng(0)
    for size in range(2, 400):
        most = draw(rng.standard_normal(size), Draws(1.0 - 2.0**-53), 1.0, None, 1.0)
        assert most < size
