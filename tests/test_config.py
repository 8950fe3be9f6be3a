"""Configurations say what is wrong with them, and survive the way through JSON."""

import dataclasses
import fractions
import itertools
import json
import math
import re

import numpy as np
import pytest

from moe_numpy import config as c
from moe_numpy import settings, tree
from moe_numpy.transformer import model


def moe(**changes):
    return c.MoEConfig(**{"num_experts": 4, "top_k": 2, "hidden": 8, **changes})


def lm(**changes):
    base = {"vocab_size": 11, "context": 6, "layers": 3, "width": 12, "heads": 4, "hidden": 7}
    return c.ModelConfig(**{**base, **changes})


BAD = [
    (c.LearnedNoise, {"floor": 0.0}, "floor must be positive"),
    (c.LearnedNoise, {"floor": -1.0}, "floor must be positive"),
    (c.GaussianNoise, {"std": 0.0}, "std must be positive"),
    (c.GaussianNoise, {"std": math.nan}, "std must be positive"),
    (c.InputJitter, {"eps": 0.0}, "0 < eps < 1"),
    (c.InputJitter, {"eps": 1.0}, "0 < eps < 1"),
    (c.InputJitter, {"eps": "0.1"}, "0 < eps < 1, got '0.1'"),
    (c.SecondExpert, {"threshold": "a"}, "0 < threshold < 1, got 'a'"),
    (c.SecondExpert, {"threshold": 1.0}, "0 < threshold < 1"),
    (c.Capacity, {"factor": 0}, "factor must be positive and finite"),
    (c.Capacity, {"factor": -1.0}, "factor must be positive and finite"),
    (c.Capacity, {"factor": math.inf}, "factor must be positive and finite"),
    (c.Capacity, {"factor": math.nan}, "factor must be positive and finite"),
    (c.Capacity, {"overflow": "queue"}, "overflow must be one of"),
    (c.Capacity, {"priority": "random"}, "priority must be one of"),
    (c.Capacity, {"rounding": "up"}, "rounding must be one of"),
    (c.Capacity, {"minimum": -1}, "minimum must"),
    (c.Capacity, {"minimum": 2.5}, "minimum must"),
    (c.SwitchLoss, {"weight": 0.0}, "weight must be positive"),
    (c.ImportanceLoss, {"weight": -0.1}, "weight must be positive"),
    (c.LoadLoss, {"weight": 0.0}, "weight must be positive"),
    (c.ZLoss, {"weight": math.nan}, "weight must be positive"),
    (moe, {"noise": "learned"}, "noise must"),
    (moe, {"capacity": 1.25}, "capacity must"),
    (moe, {"balance": c.SwitchLoss()}, "balance must"),
    (moe, {"balance": ("switch",)}, "balance must be SwitchLoss or"),
    (moe, {"num_experts": 0}, "num_experts must be a whole number"),
    (moe, {"num_experts": 2.0}, "num_experts must be a whole number"),
    (moe, {"num_experts": True}, "num_experts must be a whole number"),
    (moe, {"top_k": 0}, "top_k must be a whole number"),
    (moe, {"top_k": 5}, "1 <= top_k <= num_experts (4)"),
    (moe, {"hidden": 0}, "hidden must be a whole number"),
    (moe, {"activation": "tanh"}, "activation must be one of"),
    (moe, {"gate_weights": "softmax"}, "gate_weights must be one of"),
    (moe, {"bias_rate": -0.001}, "bias_rate must not be negative"),
    (moe, {"router_std": 0.0, "noise": c.InputJitter()}, "router_std = 0 needs"),
    (moe, {"selection": c.SoftSlots(), "top_k": 4, "router_bias": True}, "router_bias"),
    (
        moe,
        {
            **{"num_experts": 6, "top_k": 4, "noise": c.LearnedNoise()},
            **{"selection": c.Hierarchy(groups=3, kept=2), "balance": (c.LoadLoss(),)},
        },
        "LoadLoss needs a choice on both levels",
    ),
    (
        moe,
        {"selection": c.SoftSlots(), "top_k": 4, "router_std": 5.0},
        "SoftSlots needs score, gate_scale, gate_on and router_std as they are",
    ),
    (
        moe,
        {"selection": c.SoftSlots(), "top_k": 4, "gate_on": "input"},
        "SoftSlots needs score, gate_scale, gate_on and router_std as they are",
    ),
    (
        moe,
        {"top_k": 1, "selection": c.GroupLimited(groups=4, kept=2, score="top2")},
        'the group score "top2" needs groups of at least 2 experts',
    ),
    (moe, {"bias_rate": 0.1, "bias_with_loss": True}, "bias_with_loss needs a bias rule and a"),
    (moe, {"balance": (c.ZLoss(), c.ZLoss())}, "each kind of balance term may come once"),
    (moe, {"balance": (c.LoadLoss(),), "noise": None}, "LoadLoss needs normal noise"),
    (moe, {"balance": (c.LoadLoss(),), "noise": c.InputJitter()}, "LoadLoss needs normal noise"),
    (
        moe,
        {"balance": (c.LoadLoss(),), "noise": c.LearnedNoise(), "top_k": 4},
        "LoadLoss needs top_k < num_experts",
    ),
    (
        moe,
        {"balance": (c.LoadLoss(),), "noise": c.GaussianNoise(), "bias_rate": 0.1},
        "LoadLoss needs bias_rate = 0",
    ),
    (
        moe,
        {"top_k": 1, "balance": (c.ImportanceLoss(),), "gate_weights": "renormalized"},
        "ImportanceLoss with top_k = 1 needs raw gates",
    ),
    *(
        (lm, {name: value}, f"{name} must be a whole number")
        for name in ("vocab_size", "context", "layers", "width", "heads", "kv_heads", "hidden")
        for value in (0, -3, 1.5)
    ),
    (lm, {"hidden": None}, "hidden must be a whole number"),
    (lm, {"width": 10}, "width must be a multiple of heads (4)"),
    (lm, {"kv_heads": 3}, "kv_heads must divide heads (4)"),
    (lm, {"kv_heads": 8}, "kv_heads must divide heads (4)"),
    (lm, {"activation": "elu"}, "activation must be one of"),
    (lm, {"recompute": 1}, "recompute must be bool"),
    (lm, {"norm": "batchnorm"}, "norm must be one of"),
    (lm, {"positions": "sinus"}, "positions must be one of"),
    (lm, {"positions": "rotary"}, "even head width"),  # 12 / 4 = 3
    *(
        (lm, {"theta": value}, "theta must be positive and finite")
        for value in (0.0, -1.0, math.inf)
    ),
    (lm, {"theta": 500.0}, "theta is for rotary positions"),
    *(
        (lm, {name: value}, f"{name} must be at {bound}: float32")
        for name in ("embedding_scale", "logit_scale", "attention_scale", "logit_cap")
        for value, bound in ((1e-60, "least 2**-126"), (1e300, "most 2**127"))
    ),
    (moe, {"gate_scale": 1e-60}, "gate_scale must be at least 2**-126"),
    (moe, {"gate_scale": 1e300}, "gate_scale must be at most 2**127"),
    (moe, {"init_scale": 1e-100}, "init_scale must be at least 2**-126"),
    (
        moe,
        {"balance": (c.ImportanceLoss(),), "selection": c.Hierarchy(groups=2, kept=1), "top_k": 1},
        "renormalized ones are all 1",
    ),
    (c.SwitchLoss, {"weight": 1e-60}, "weight must be at least 2**-126"),
    (c.SecondExpert, {"threshold": 1e-60}, "threshold must be at least 2**-126"),
    (lm, {"moe_layers": (0,)}, "moe_layers needs moe"),
    (lm, {"moe": moe(), "moe_layers": [0]}, "moe_layers must be tuple or None"),
    (lm, {"moe": moe(), "moe_layers": (3,)}, "from 0 to 2"),
    (lm, {"moe": moe(), "moe_layers": (-1,)}, "from 0 to 2"),
    (lm, {"moe": moe(), "moe_layers": (1, 1)}, "from 0 to 2"),
    (lm, {"moe": moe(), "moe_layers": ()}, "from 0 to 2"),
    (lm, {"moe": moe(), "hidden": 7}, "hidden is for dense layers"),
    (lm, {"moe": moe(), "hidden": None, "activation": "relu"}, "activation is for dense layers"),
    (lm, {"moe": moe(), "moe_layers": (0, 1, 2), "hidden": 7}, "hidden is for dense layers"),
    (c.AdamW, {"beta1": 1.0}, "0 <= beta1 < 1"),
    (c.AdamW, {"beta2": -0.1}, "0 <= beta2 < 1"),
    (c.AdamW, {"eps": 0.0}, "eps must be positive"),
    (c.AdamW, {"eps": 1e-60}, "eps must be at least 2**-126"),
    (c.AdamW, {"eps": math.inf}, "eps must be positive and finite"),
    (c.AdamW, {"beta1": "0.9"}, "0 <= beta1 < 1"),
    (c.AdamW, {"weight_decay": -1.0}, "weight_decay must not be negative"),
    (c.SGD, {"momentum": 1.0}, "0 <= momentum < 1"),
    (c.SGD, {"weight_decay": -1.0}, "weight_decay must not be negative"),
    (c.TrainingConfig, {"steps": 0}, "steps must be a whole number"),
    (c.TrainingConfig, {"batch": 0}, "batch must be a whole number"),
    (c.TrainingConfig, {"rate": 0.0}, "rate must be positive"),
    (c.TrainingConfig, {"rate": math.inf}, "rate must be positive"),
    (c.TrainingConfig, {"final_rate": -1.0}, "final_rate must not be negative"),
    (c.TrainingConfig, {"warmup": -1}, "warmup must"),
    (c.TrainingConfig, {"warmup": 2.5}, "warmup must"),
    (c.TrainingConfig, {"seed": -1}, "seed must"),
    (c.TrainingConfig, {"seed": 0.5}, "seed must"),
    (c.TrainingConfig, {"clip": 0.0}, "clip must be positive"),
    (c.TrainingConfig, {"smoothing": 1.0}, "0 <= smoothing < 1"),
]


CAME = {
    "balance must be SwitchLoss or": "switch",
    "each kind of balance term may come once": "ZLoss",
    "even head width": 3,
    "LoadLoss needs a choice on both levels": (2, 2),
    'the group score "top2" needs groups of at least 2 experts': 1,
}


@pytest.mark.parametrize(("build", "knobs", "rule"), BAD)
def test_a_bad_value_is_refused_with_who_which_rule_and_what_came(build, knobs, rule):
    who = {moe: "MoEConfig", lm: "ModelConfig"}.get(build, getattr(build, "__name__", ""))
    with pytest.raises(ValueError, match=re.escape(rule)) as caught:
        build(**knobs)
    message = str(caught.value)
    assert message.startswith(f"{who}: ")
    came = CAME.get(rule, list(knobs.values())[-1])  # the culprit stands last
    assert str(came) in message.split(", got ", 1)[1], message


GOOD = [
    c.LearnedNoise(floor=0.1),
    c.GaussianNoise(std=0.3),
    c.InputJitter(),
    c.Capacity(factor=2.0, overflow="next_best", priority="score", rounding="round", minimum=4),
    c.SwitchLoss(),
    c.ImportanceLoss(),
    c.LoadLoss(),
    c.ZLoss(weight=0.5),
    moe(),
    moe(top_k=1, gate_weights="renormalized", activation="swiglu", bias_rate=0.1),
    moe(noise=c.LearnedNoise(), capacity=c.Capacity(), balance=(c.LoadLoss(), c.ZLoss())),
    moe(top_k=1, gate_weights="renormalized", balance=(c.ImportanceLoss(of="probabilities"),)),
    lm(),
    lm(moe=moe(capacity=c.Capacity()), hidden=None, kv_heads=2, tied=False, norm="rmsnorm"),
    lm(moe=moe(balance=(c.SwitchLoss(),)), moe_layers=(0, 2), width=16, positions="rotary"),
    c.AdamW(weight_decay=0.0),
    c.SGD(momentum=0.0),
    c.TrainingConfig(),
    c.TrainingConfig(optimizer=c.SGD(), clip=None, smoothing=0.1, seed=3),
]


@pytest.mark.parametrize("cfg", GOOD)
def test_a_configuration_survives_the_way_through_json(cfg):
    data = json.loads(json.dumps(c.to_dict(cfg)))
    assert data["kind"] == type(cfg).__name__
    again = c.from_dict(data)
    assert again == cfg
    assert type(again) is type(cfg)
    assert hash(again) == hash(cfg)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"factor": 1.0},
        {"kind": "Router"},
        {"kind": "Capacity", "colour": "red"},
        {"kind": "MoEConfig", "top_k": 1},
        {"kind": "MoEConfig", "num_experts": 2, "top_k": 3, "hidden": 4},
        {"kind": ["Capacity"]},
    ],
)
def test_what_is_no_configuration_is_refused(data):
    with pytest.raises(ValueError, match=r"from_dict|MoEConfig"):
        c.from_dict(data)


@pytest.mark.parametrize("cfg", GOOD)
def test_configurations_are_frozen(cfg):
    name = dataclasses.fields(cfg)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cfg, name, 1)


def test_gates_are_renormalized_by_default_unless_there_is_only_one():
    assert not moe(top_k=1).renormalized
    assert moe(top_k=2).renormalized
    assert moe(top_k=1, gate_weights="renormalized").renormalized
    assert not moe(top_k=2, gate_weights="raw").renormalized


def test_evaluation_lifts_the_limits_and_keeps_the_rest():
    limited = moe(capacity=c.Capacity(), noise=c.GaussianNoise(), balance=(c.ZLoss(),))
    assert limited.evaluation() == dataclasses.replace(limited, capacity=None)
    model = lm(moe=limited, hidden=None)
    assert model.evaluation() == dataclasses.replace(model, moe=limited.evaluation())
    assert lm().evaluation() == lm()


@pytest.mark.parametrize("selection", [c.Assignment(), c.Sinkhorn()])
def test_evaluation_takes_the_best_experts_where_training_evens_them_out(selection):
    assert moe(top_k=1, selection=selection).evaluation() == moe(top_k=1)


@pytest.mark.parametrize(
    ("part", "weights"),
    [
        ({"capacity": c.Capacity()}, "renormalized"),
        ({"selection": c.SecondExpert()}, "renormalized_kept"),
        ({"selection": c.ExpertChoice()}, "renormalized_kept"),
    ],
)
def test_gates_know_in_evaluation_who_is_kept_where_somebody_is_still_turned_away(part, weights):
    cfg = moe(gate_weights="renormalized_kept", **part)
    assert cfg.evaluation().gate_weights == weights


def test_derived_sizes():
    assert lm().head_width == 3
    assert [lm(moe=moe(), moe_layers=(1,)).is_moe(i) for i in range(3)] == [False, True, False]
    assert all(lm(moe=moe(), hidden=None).is_moe(i) for i in range(3))
    assert not lm().is_moe(0)
    assert moe(activation="geglu").gated
    assert not moe().gated


def test_the_learning_rate_rises_then_falls_along_a_cosine():
    cfg = c.TrainingConfig(steps=100, warmup=10, rate=2.0, final_rate=0.5)
    rates = [cfg.rate_at(step) for step in range(101)]
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert 0.0 < rates[0] <= 0.2 + 1e-12
    assert rates[10] == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1.25)
    assert rates[100] == pytest.approx(0.5)
    assert cfg.rate_at(500) == pytest.approx(0.5)


def test_limits_that_are_just_reached_are_fine():
    assert moe(balance=(c.SwitchLoss(counted=4),)).balance[0].counted == 4
    assert c.Capacity(factor=1.0, minimum=5, multiple=4).places(8, 1, 8) == 8
    assert c.Capacity(factor=1e308, multiple=4).places(9, 2, 8) == 20


NUMBERS = [
    (c.LearnedNoise, "floor", 0.5),
    (c.GaussianNoise, "std", 0.5),
    (c.InputJitter, "eps", 0.5),
    (c.SecondExpert, "threshold", 0.5),
    (c.Sinkhorn, "tolerance", 0.5),
    (c.Sinkhorn, "most", 5),
    (c.Capacity, "factor", 1.5),
    (c.SwitchLoss, "weight", 0.5),
    (c.ImportanceLoss, "weight", 0.5),
    (c.LoadLoss, "weight", 0.5),
    (c.ZLoss, "weight", 0.5),
    (c.SoftSlots, "slots", 2),
    (c.AdamW, "beta2", 0.5),
    (c.SGD, "momentum", 0.5),
    (c.TrainingConfig, "rate", 0.5),
    (c.TrainingConfig, "clip", 0.5),
    (moe, "bias_rate", 0.5),
    (moe, "hidden", 4),
    (lm, "logit_scale", 0.5),
    (lm, "logit_cap", 30.0),
    (lm, "layers", 2),
]


@pytest.mark.parametrize(("build", "name", "value"), NUMBERS)
def test_numbers_of_numpy_become_plain_ones(build, name, value):
    wanted = build(**{name: value})
    for kind in (np.float32, np.float64) if isinstance(value, float) else (np.int64, np.uint8):
        found = build(**{name: kind(value)})
        assert type(getattr(found, name)) is type(value) and found == wanted
        assert json.dumps(c.to_dict(found)) == json.dumps(c.to_dict(wanted))


@pytest.mark.parametrize("term", [c.SwitchLoss, c.ImportanceLoss, c.LoadLoss, c.ZLoss])
def test_a_weight_of_numpy_keeps_float32(term):
    noise = c.LearnedNoise() if term is c.LoadLoss else None
    cfg = lm(moe=moe(balance=(term(weight=np.float64(0.01)),), noise=noise), hidden=None)
    params = model.init_model(np.random.default_rng(0), cfg)
    token = np.array([[1, 2, 3]])
    drawn = model.draw_noise(np.random.default_rng(1), cfg, token.size)
    loss, _, cache = model.loss_forward(token, token, params, cfg, drawn)
    grads = model.loss_backward(np.float32(1.0), cache)
    assert {array.dtype for array in (loss, *tree.leaves(grads))} == {np.dtype("float32")}


def test_indices_of_numpy_are_plain_ones_and_nothing_but_whole_numbers_are_indices():
    cfg = lm(layers=3, moe=moe(), moe_layers=tuple(np.arange(1, 3)), hidden=4)
    assert json.loads(json.dumps(c.to_dict(cfg)))["moe_layers"] == [1, 2]
    for odd in (True, 0.0, [0]):
        with pytest.raises(ValueError, match="moe_layers must be different indices"):
            lm(layers=3, moe=moe(), moe_layers=(odd,), hidden=4)


def test_a_fraction_or_an_array_is_no_setting():
    with pytest.raises(ValueError, match="weight must be positive"):
        c.ZLoss(weight=fractions.Fraction(1, 2))
    with pytest.raises(ValueError, match="weight must be positive and finite, got 10"):
        c.ZLoss(weight=10**400)
    with pytest.raises(ValueError, match="activation must be one of"):
        moe(activation=np.array(["relu", "gelu"]))


def test_a_model_of_absurdly_many_layers_is_counted_at_once():
    assert lm(layers=10**18, moe=moe(), hidden=None).moe_count == 10**18


def test_the_defaults_are_those_that_the_documentation_names():
    sinkhorn, run, adam = c.Sinkhorn(), c.TrainingConfig(), c.AdamW()
    assert (sinkhorn.tolerance, sinkhorn.most) == (1e-4, 100)
    assert (c.GaussianNoise().std, c.LearnedNoise().floor, c.InputJitter().eps) == (1.0, 0.01, 0.01)
    assert (run.rate, run.final_rate, run.warmup, run.clip) == (1e-3, 1e-4, 100, 1.0)
    assert (adam.beta1, adam.beta2, adam.eps, adam.weight_decay) == (0.9, 0.99, 1e-8, 0.1)
    assert (lm().theta, lm().norm_eps, moe().router_std) == (10_000.0, 1e-5, 0.02)


def test_the_command_line_has_the_same_defaults():
    default = settings.start({})
    assert default.training == dataclasses.replace(c.TrainingConfig(), steps=1000)
    told = {kind: settings.NOISES[kind]() for kind in settings.NOISES if kind != "none"}
    numbers = [getattr(noise, settings.NOISE_KNOB[kind]) for kind, noise in told.items()]
    assert numbers == [0.01, 1.0, 0.01]  # as --help says
