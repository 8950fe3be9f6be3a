"""The package on a strict stand-in for CuPy: nothing is refused, and every bit is NumPy's.

Also: what a step costs in waits for the device, and that mistakes against CuPy are caught by name.
"""

import collections
import contextlib
import dataclasses
import inspect
import json
import statistics
import sys
import timeit
import types

import numpy as np
import pytest
import strict_cupy
import tiny

from moe_numpy import backend, presets, tree
from moe_numpy.backend import to_device, to_host, xp
from moe_numpy.classroom import cases, registry
from moe_numpy.config import (
    SGD,
    AdamW,
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
    SecondExpert,
    Sinkhorn,
    SoftSlots,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe import experts
from moe_numpy.training import loop
from moe_numpy.transformer import generation

ALL_TERMS = (SwitchLoss(), ImportanceLoss(), LoadLoss(), ZLoss())
MODELS = {
    "dense": tiny.model(),
    "dense, rotary, untied, RMS norm": tiny.model(
        positions="rotary", tied=False, norm="rmsnorm", activation="swiglu", kv_heads=1
    ),
    "experts without limits": tiny.model(tiny.moe(balance=(SwitchLoss(),))),
    "learned noise, next best by token, all terms": tiny.model(
        tiny.moe(noise=LearnedNoise(), capacity=Capacity(overflow="next_best"), balance=ALL_TERMS)
    ),
    "fixed noise, drop by choice, raw gates": tiny.model(
        tiny.moe(
            noise=GaussianNoise(),
            capacity=Capacity(factor=0.6, priority="choice"),
            balance=ALL_TERMS,
            gate_weights="raw",
        )
    ),
    "jitter, drop by score, rotary": tiny.model(
        tiny.moe(noise=InputJitter(), capacity=Capacity(factor=0.8, priority="score"), top_k=1),
        positions="rotary",
    ),
    "next best by choice, bias rule, untied": tiny.model(
        tiny.moe(
            capacity=Capacity(factor=0.7, overflow="next_best", priority="choice"),
            bias_rate=0.1,
        ),
        tied=False,
    ),
    "drop by token, gated experts, a dense layer": tiny.model(
        tiny.moe(activation="swiglu", capacity=Capacity(factor=0.7)), moe_layers=(1,), hidden=16
    ),
    "experts with biases and equal starts": tiny.model(
        tiny.moe(activation="clamped_swiglu", expert_bias=True, same_start=True, init_scale=0.1)
    ),
    "sandwich, sinks, cap, norms, biases, extra feed-forward": tiny.model(
        tiny.moe(balance=(SwitchLoss(),)),
        positions="rotary",
        norm="rmsnorm",
        kv_heads=1,
        sandwich=True,
        attention_bias=True,
        qk_norm="full",
        sinks=True,
        logit_cap=5.0,
        extra_ffn=True,
        hidden=16,
        balance_over_layers="mean",
    ),
    "next best by score": tiny.model(
        tiny.moe(capacity=Capacity(factor=0.6, overflow="next_best", priority="score"))
    ),
}
OPTIMIZERS = {"AdamW": AdamW(), "SGD": SGD(momentum=0.8, weight_decay=0.01)}


def drawn_cases(name):
    return cases.CASES[name](np.random.default_rng([7, *name.encode()]))


PAIR_CASES = [
    pytest.param(name, at, id=f"{name}-{case.name or at}")
    for name in sorted(registry.pairs())
    for at, case in enumerate(drawn_cases(name))
]


def each(value, fn):
    """Apply `fn` to every array in nested tuples and lists; leave all else as it is."""
    if isinstance(value, np.ndarray | np.floating | strict_cupy.ndarray):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each(part, fn) for part in value))
    return type(value)(each(p, fn) for p in value) if type(value) in (tuple, list) else value


def upstream(outputs, backward, seed):
    """Draw a gradient for every float output, lined up with what the backward takes."""
    rng = np.random.default_rng(seed)
    floats = [isinstance(y, np.ndarray | np.floating) and y.dtype.kind == "f" for y in outputs]
    drawn = [
        np.asarray(rng.standard_normal(y.shape)) if is_float else None
        for y, is_float in zip(outputs, floats, strict=True)
    ]
    counts_all = len(inspect.signature(backward).parameters) - 1 == len(outputs)
    return drawn if counts_all else [dy for dy in drawn if dy is not None]


def assert_same(host, device, where):
    """Compare a result on the host with one on the device: form, type, shape and every bit."""
    if isinstance(device, strict_cupy.ndarray):
        ours, theirs = np.asarray(host), device._a
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        assert ours.tobytes() == theirs.tobytes(), f"{where}: other bits"
    elif isinstance(host, tuple | list):
        assert type(host) is type(device) and len(host) == len(device), where
        for place, (ours, theirs) in enumerate(zip(host, device, strict=True)):
            assert_same(ours, theirs, f"{where}[{place}]")
    else:
        assert not isinstance(host, np.ndarray), f"{where} lies on the host"
        assert host == device, where


@pytest.fixture
def same_products(monkeypatch):
    """Let the experts multiply slice by slice on the device too: padding adds in another order."""
    monkeypatch.setattr(experts, "few_launches", lambda: False)


# ------------------------------------------------------------------------------------------- pairs
@pytest.mark.usefixtures("same_products")
@pytest.mark.parametrize(("name", "at"), PAIR_CASES)
def test_a_pair_gives_the_bits_of_numpy(name, at):
    case, pair = drawn_cases(name)[at], registry.pair(name)
    outputs = pair.forward(*case.args, **case.kwargs)
    given = upstream(outputs[:-1], pair.backward, at)
    with strict_cupy.device():
        found = pair.forward(*each(case.args, to_device), **case.kwargs)
        assert_same(outputs, found, f"{name}_forward")
        gradients = pair.backward(*each(given, to_device), found[-1])
    assert_same(pair.backward(*given, outputs[-1]), gradients, f"{name}_backward")


@pytest.mark.parametrize("at", range(len(drawn_cases("moe"))))
def test_the_padded_experts_equal_the_grouped_ones_to_rounding(at):
    case, pair = drawn_cases("moe")[at], registry.pair("moe")
    outputs = pair.forward(*case.args)
    given = upstream(outputs[:-1], pair.backward, at)
    expected = tree.leaves((outputs[0], pair.backward(*given, outputs[-1])))
    with strict_cupy.device():
        assert backend.few_launches()
        y_NC, *_, cache = pair.forward(*each(case.args, to_device))
        found = tree.leaves((y_NC, pair.backward(*each(given, to_device), cache)))
    for ours, theirs in zip(expected, found, strict=True):
        error = np.abs(ours - theirs.get()).max()
        assert error <= 1e-13 * max(1.0, np.abs(ours).max())


# ---------------------------------------------------------------------------------------- training
def run_of(cfg, dtype="float32", **changes):
    fields = {"steps": 3, "warmup": 1, "batch": 2} | changes
    return loop.new_run(tiny.corpus(), cfg, tiny.training(**fields), dtype)


def train(cfg, dtype="float32", **changes):
    run = run_of(cfg, dtype, **changes)
    loop.train(run, evaluate_every=100, show_progress=False)
    return run


def brought_home(run):
    params, state = tree.map(to_host, run.params), tree.map(to_host, run.state)
    return dataclasses.replace(run, params=params, state=state)


@pytest.mark.usefixtures("same_products")
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_training_gives_the_bits_of_numpy(cfg, optimizer):
    dtype = "float32" if isinstance(optimizer, AdamW) else "float64"
    with strict_cupy.device():
        run = train(cfg, dtype, optimizer=optimizer, smoothing=0.1)
        leaves = tree.leaves((run.params, run.state))
        assert {type(leaf) for leaf in leaves} == {strict_cupy.ndarray}
        assert {type(values) for values in run.series} == {np.ndarray}
    assert tiny.same_run(brought_home(run), train(cfg, dtype, optimizer=optimizer, smoothing=0.1))


def preset(name):
    """Take a named system at laptop size, on short sequences."""
    cfg = presets.tiny(name, tiny.corpus().vocab_size)
    return dataclasses.replace(cfg, context=40)  # two of them: more than a routing group of 64


@pytest.mark.usefixtures("same_products")
@pytest.mark.parametrize("name", [name for name in presets.names() if presets.tiny(name).causal])
def test_a_step_of_a_named_system_gives_the_bits_of_numpy(name):
    runs = []
    for context in (contextlib.nullcontext(), strict_cupy.device()):
        with context:
            runs.append(run_of(preset(name)))
            loop.take_step(runs[-1])
    assert tiny.same_run(brought_home(runs[1]), runs[0])


@pytest.mark.usefixtures("same_products")
@pytest.mark.parametrize("name", ["expert_choice", "soft_moe"])
def test_the_gradients_of_an_encoder_have_the_bits_of_numpy(name):
    found = []
    for context in (contextlib.nullcontext(), strict_cupy.device()):
        with context:
            found.append(gradients(preset(name)))
    assert not preset(name).causal
    assert_same(found[0], found[1], name)


def gradients(cfg):
    rng = np.random.default_rng(6)
    token_BT, target_BT = rng.integers(0, cfg.vocab_size, (2, 2, cfg.context))
    params = loop.model.init_model(rng, cfg)
    batch = (to_device(token_BT), to_device(target_BT))
    loss, _, cache = loop.model.loss_forward(*batch, params, cfg)
    return loss, loop.model.loss_backward(xp.ones_like(loss), cache)


def test_training_with_padded_experts_equals_numpys_to_rounding():
    cfg = MODELS["drop by token, gated experts, a dense layer"]
    with strict_cupy.device():
        padded = train(cfg, "float64")
    expected = train(cfg, "float64").series.cross_entropy
    np.testing.assert_allclose(padded.series.cross_entropy, expected, rtol=1e-12)


@pytest.mark.usefixtures("same_products")
@pytest.mark.parametrize("there", [True, False], ids=["saved on the device", "saved on the host"])
def test_a_checkpoint_goes_on_bit_for_bit_on_the_other_backend(there, tmp_path):
    cfg = MODELS["learned noise, next best by token, all terms"]
    path, steps = tmp_path / "run.npz", {"steps": 5}

    def begin():
        run = run_of(cfg, **steps)
        for _ in range(2):
            loop.take_step(run)
        loop.save_run(path, run)

    def go_on():
        run = loop.load_run(path, tiny.corpus())
        assert run.step == 2
        loop.train(run, evaluate_every=100, show_progress=False)
        return brought_home(run), each(loop.load_model(path)[0], to_host)

    if there:
        with strict_cupy.device():
            begin()
        resumed, stored = go_on()
    else:
        begin()
        with strict_cupy.device():
            resumed, stored = go_on()
    assert tiny.same_run(resumed, train(cfg, **steps))
    assert tiny.same_bits(stored, loop.load_model(path)[0])


@pytest.mark.usefixtures("same_products")
@pytest.mark.parametrize("knobs", [{}, {"temperature": 0}, {"top_k": 5, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("name", ["dense, rotary, untied, RMS norm", "experts without limits"])
def test_generation_gives_the_tokens_of_numpy_and_looks_at_each_once(name, knobs):
    cfg, count = MODELS[name], 20  # longer than the context
    params = loop.model.init_model(np.random.default_rng(3), cfg)
    expected = list(generation.generate([1, 2, 3], params, cfg, count, rng=4, **knobs))
    with strict_cupy.device() as crossings:
        params = tree.map(to_device, params)
        found = list(generation.generate([1, 2, 3], params, cfg, count, rng=4, **knobs))
    assert found == expected
    assert len([c for c in crossings if not c.hidden]) == count * (1 + cfg.moe_count)


def test_a_prompt_on_the_device_is_looked_at_once_and_refused_as_one_on_the_host():
    cfg = MODELS["experts without limits"]
    params = loop.model.init_model(np.random.default_rng(3), cfg)
    with strict_cupy.device() as crossings:
        params = tree.map(to_device, params)
        with pytest.raises(ValueError, match=r"tokens must be from 0 to .* got -1 to 2"):
            generation.generate(to_device(np.array([-1, 2])), params, cfg, 1)
    assert len(crossings) == 1


# ----------------------------------------------------------------------------- waits for the device
def waits(crossings, hidden):
    return collections.Counter((c.what, c.function) for c in crossings if c.hidden == hidden)


LIMITS = {"none": None, "drop": Capacity(), "next best": Capacity(overflow="next_best")}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_step_brings_values_to_the_host_once_a_layer_and_once_at_its_end(limit):
    moe_cfg = tiny.moe(capacity=LIMITS[limit], balance=(SwitchLoss(),))
    with strict_cupy.device() as crossings:
        run = run_of(tiny.model(moe_cfg))
        assert crossings == []
        loop.take_step(run)
    routing = "_serve_next_best" if limit == "next best" else "_plan"
    seen = waits(crossings, hidden=False)
    assert seen == {("get", routing): 2, ("get", "take_step"): 1}  # two MoE layers


SELECTIONS = {  # what every layer brings to the host
    "second expert": (SecondExpert(), {"_plan": 1}),
    "group-limited": (GroupLimited(groups=2, kept=1), {"_plan": 1}),
    "hierarchy": (Hierarchy(groups=2, kept=1), {"_plan": 1}),
    "assignment": (Assignment(), {"balanced_assignment": 1, "_plan": 1}),
    "Sinkhorn, 3 rounds": (Sinkhorn(tolerance=1e-30, most=3), {"sinkhorn": 3, "_plan": 1}),
    "expert choice": (ExpertChoice(), {"expert_choice": 1, "_plan": 1}),
    "soft slots": (SoftSlots(), {}),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_brings_to_the_host_what_it_says(name):
    selection, each_layer = SELECTIONS[name]
    top_k = {Assignment: 1, SoftSlots: 4}.get(type(selection), 2)
    causal = not isinstance(selection, ExpertChoice | SoftSlots)
    moe_cfg = tiny.moe(selection=selection, top_k=top_k)
    cfg = tiny.model(moe_cfg, causal=causal)
    with strict_cupy.device() as crossings:
        gradients(cfg)
    layers = {("get", function): 2 * times for function, times in each_layer.items()}
    assert waits(crossings, hidden=False) == layers


def test_the_waits_that_hand_no_value_over_are_known():
    with strict_cupy.device() as crossings:
        run = run_of(MODELS["experts without limits"])
        loop.take_step(run)
    assert waits(crossings, hidden=True) <= collections.Counter(
        {
            ("bincount", "switch_loss_forward"): 2,  # once an MoE layer
            ("bincount", "make_report"): 2,
            ("flatnonzero", "embedding_backward"): 1,
        }
    )


def test_a_dense_step_brings_values_to_the_host_once():
    with strict_cupy.device() as crossings:
        loop.take_step(run_of(MODELS["dense"]))
    assert waits(crossings, hidden=False) == {("get", "take_step"): 1}


def test_the_look_up_through_xp_costs_what_numpys_costs():
    def ratio():
        names, many = {"xp": xp, "np": np}, 100
        ours, theirs = (
            timeit.Timer(";".join([f"{module}.exp"] * many), globals=dict(names))
            for module in ("xp", "np")
        )
        return statistics.median(ours.timeit(300) / theirs.timeit(300) for _ in range(25))

    with strict_cupy.device():
        pass  # xp has been emptied and filled again, as it is in use
    assert min(ratio() for _ in range(3)) < 1.3


# -------------------------------------------------------------------------------- the door to CuPy
def test_the_backend_is_restored_after_the_block_nested_and_after_an_error():
    names = dict(vars(xp))
    with strict_cupy.device():
        device_names = dict(vars(xp))
        assert (xp.__name__, backend.few_launches()) == ("cupy", True)
        assert not hasattr(xp, "errstate")
        with backend.use_backend("numpy"):
            assert vars(xp) == vars(np)
            with backend.use_backend("cupy"):
                assert vars(xp) == device_names
            assert vars(xp) == vars(np)
        assert vars(xp) == device_names
        with pytest.raises(ZeroDivisionError), backend.use_backend("numpy"):
            _ = 1 / 0
        assert vars(xp) == device_names
    assert vars(xp) == names
    with pytest.raises(ZeroDivisionError), strict_cupy.device():
        _ = 1 / 0
    assert vars(xp) == names
    assert "cupy" not in sys.modules


@pytest.mark.parametrize(
    ("cupy", "advice"),
    [
        (None, r"which is not installed\. Install it with: pip install"),
        (types.SimpleNamespace(is_available=lambda: False), r"finds none here\. Install the CUDA"),
    ],
    ids=["not installed", "no GPU"],
)
def test_without_cupy_or_without_a_gpu_one_sentence_says_what_to_do(cupy, advice, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    before = dict(vars(xp))
    with pytest.raises(backend.BackendError, match=advice) as error, backend.use_backend("cupy"):
        pass
    assert "\n" not in str(error.value)
    assert vars(xp) == before


def test_the_table_is_of_a_known_release_and_small():
    assert int(strict_cupy.TABLE["cupy"].split(".")[0]) >= 14
    assert len(json.dumps(strict_cupy.TABLE)) < 40_000
