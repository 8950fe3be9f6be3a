"""One token through the model, held against the plain path: logits, tokens, and the gain."""

import dataclasses
import time

import numpy as np
import pytest

from moe_numpy import backend, presets, tree
from moe_numpy.classroom import registry
from moe_numpy.config import Capacity, GroupLimited, ModelConfig, MoEConfig, Shared
from moe_numpy.lab import bench
from moe_numpy.ops import activation, rotary
from moe_numpy.transformer import attention, decode, generation, model

V, CONTEXT = 13, 9
BASE = {"vocab_size": V, "context": CONTEXT, "layers": 2, "width": 16, "heads": 4}
LLAMA = {"norm": "rmsnorm", "positions": "rotary", "tied": False}
EXPERTS = {"num_experts": 5, "top_k": 2, "hidden": 6}
SCALES = {"attention_scale": 0.7, "embedding_scale": 3.0, "logit_scale": 0.3, "norm_eps": 0.1}


def config(moe=None, **changes):
    return ModelConfig(**{**BASE, "moe": moe, **({} if moe else {"hidden": 11}), **changes})


COVERED = (
    {
        f"{norm}, {positions}, {kv_heads or 4} key heads": config(
            norm=norm, positions=positions, kv_heads=kv_heads
        )
        for norm in ("layernorm", "rmsnorm")
        for positions in ("learned", "rotary")
        for kv_heads in (None, 2, 1)
    }
    | {
        "wide heads, scales": config(
            **LLAMA, **SCALES, head_size=6, kv_heads=2, activation="swiglu"
        ),
        "three branches in a dense layer": config(activation="swiglu3"),
        "a dense layer before experts": config(
            MoEConfig(**EXPERTS), moe_layers=(1,), hidden=11, activation="geglu"
        ),
        "raw gates, limits in training": config(
            MoEConfig(**EXPERTS, gate_weights="raw", gate_scale=2.5, capacity=Capacity(factor=0.5))
        ),
        "kept gates": config(
            MoEConfig(**EXPERTS, gate_weights="renormalized_kept", capacity=Capacity(factor=0.5))
        ),
        "gated, biases of choice and router, shared": config(
            MoEConfig(
                **EXPERTS,
                activation="swiglu",
                bias_rate=0.1,
                router_bias=True,
                shared=Shared(hidden=7, gated=True),
            )
        ),
        "sigmoid, bias": config(
            MoEConfig(**EXPERTS, score="sigmoid", bias_rate=0.1, gate_scale=2.5)
        ),
        "softplus, raw": config(MoEConfig(**EXPERTS, score="sqrt_softplus", gate_weights="raw")),
        "all experts": config(MoEConfig(**{**EXPERTS, "top_k": 5}, activation="clamped_swiglu")),
    }
    | {
        name: dataclasses.replace(presets.tiny(name, V), context=CONTEXT)
        for name in presets.names()
        if presets.get(name).model.causal and decode.supports(presets.tiny(name).evaluation())
    }
)
LEFT = {  # to the plain path
    "sandwich": config(sandwich=True),
    "attention_bias": config(attention_bias=True),
    "sinks": config(sinks=True),
    "qk_norm": config(qk_norm="l2"),
    "logit_cap": config(logit_cap=5.0),
    "not causal": config(causal=False),
    "extra_ffn": config(MoEConfig(**EXPERTS), hidden=11, extra_ffn=True),
    "gate_on": config(MoEConfig(**EXPERTS, gate_on="input")),
    "expert_bias": config(MoEConfig(**EXPERTS, expert_bias=True)),
    "swiglu3": config(MoEConfig(**EXPERTS, activation="swiglu3")),
    "groups, gates from logits": config(
        MoEConfig(**{**EXPERTS, "num_experts": 6}, selection=GroupLimited(groups=3, kept=2))
    ),
    "limits": config(MoEConfig(**EXPERTS, capacity=Capacity())),
} | {
    name: presets.tiny(name).evaluation()
    for name in ("shazeer2017_hierarchical", "gshard", "soft_moe", "grok1")
}


def draw(cfg, dtype="float64"):
    """Draw parameters without any special value: no gain of one, no bias of zero."""
    rng = np.random.default_rng(7)
    params = model.init_model(rng, cfg, dtype)
    return tree.map(lambda leaf: rng.normal(0.1, 0.4, leaf.shape).astype(dtype), params)


def logits_of_both(cfg, seed=0):
    """Read a whole context: one token after the other, and by the plain path in one piece."""
    cfg, params = cfg.evaluation(), draw(cfg)
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, CONTEXT)
    kv = tuple(attention.KeyValues(cfg, 1, "float64") for _ in params.blocks)
    ready = decode.prepare(params, cfg)
    found = [decode.next_logits(int(token), params, ready, cfg, kv) for token in tokens]
    return np.array(found), model.model_forward(tokens[None], params, cfg)[0][0]


def off(found_TV, wanted_TV):
    """Give the largest difference of each position, relative to its logits."""
    return np.abs(found_TV - wanted_TV).max(1) / np.abs(wanted_TV).max(1)


@pytest.mark.parametrize("name", COVERED)
def test_the_logits_are_those_of_the_whole_sequence(name):
    assert decode.supports(COVERED[name].evaluation())
    found_TV, wanted_TV = logits_of_both(COVERED[name])
    assert found_TV.shape == (CONTEXT, COVERED[name].vocab_size)
    assert off(found_TV, wanted_TV).max() < 1e-10


def test_huge_logits_of_attention_do_not_overflow():
    found_TV, wanted_TV = logits_of_both(config(attention_scale=1e3))
    assert np.isfinite(wanted_TV).all() and off(found_TV, wanted_TV).max() < 1e-10


def test_many_published_systems_are_covered():
    assert len(COVERED.keys() & set(presets.names())) >= 9
    assert {"shazeer2017", "switch", "mixtral_8x7b", "deepseek_v3"} <= COVERED.keys()


@pytest.mark.parametrize("name", LEFT)
def test_rare_parts_are_left_to_the_plain_path(name):
    assert not decode.supports(LEFT[name])


def test_on_a_gpu_nothing_is_covered(monkeypatch):
    assert decode.supports(config())
    monkeypatch.setattr(backend.xp, "__name__", "a library of a GPU")
    assert not decode.supports(config())


def plain(monkeypatch):
    monkeypatch.setattr(decode, "supports", lambda cfg: False)


@pytest.mark.parametrize("knobs", [{"temperature": 0}, {}, {"top_k": 5, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("name", presets.names())
def test_the_plain_path_writes_the_same_tokens_for_every_system(name, knobs, monkeypatch):
    """The context is full several times over: generation goes on from its second half."""
    cfg = dataclasses.replace(presets.tiny(name, V), context=CONTEXT)
    if not cfg.causal:
        pytest.skip("an encoder does not write")
    params = draw(cfg)
    calls = []
    step = decode.next_logits
    monkeypatch.setattr(decode, "next_logits", lambda *given: calls.append(0) or step(*given))
    found = list(generation.generate([1, 2, 3], params, cfg, 30, rng=4, **knobs))
    assert bool(calls) == decode.supports(cfg.evaluation())
    plain(monkeypatch)
    assert found == list(generation.generate([1, 2, 3], params, cfg, 30, rng=4, **knobs))
    assert knobs or len(set(found)) > 2, "the model is too monotonous to tell anything"


FULL, HALF = [4, 5, 6, 7, 8], [0, 1, 2, 3]  # lengths before a token is read alone


@pytest.mark.parametrize(
    ("short", "pieces", "alone"),
    [
        (2, [3, 4, 4, 4], [3, *FULL, *FULL, *FULL]),
        (3, [4, 4, 4], [0, 1, 2, 3, *FULL, *FULL, *FULL]),
        (4, [], [0, 1, 2, 3, *FULL, *HALF, *FULL, *HALF, *FULL, *HALF]),
    ],
)
def test_what_is_not_short_is_read_in_one_piece(short, pieces, alone, monkeypatch):
    cfg, read, steps = config(**LLAMA), [], []
    whole, step = model.model_forward, decode.next_logits
    note = lambda *a, kv: read.append(a[0].shape[1]) or whole(*a, kv=kv)  # noqa: E731
    monkeypatch.setattr(model, "model_forward", note)
    monkeypatch.setattr(decode, "next_logits", lambda *a: steps.append(a[4][0].length) or step(*a))
    monkeypatch.setattr(decode, "SHORT", short)
    list(generation.generate([1, 2, 3], draw(cfg), cfg, 20, rng=0))
    assert (read, steps) == (pieces, alone)


# ------------------------------------------------------------------------------- planted mistakes
def tilted(x_C, params, eps):
    return decode.block.normalize_forward(x_C, params, eps)[0] * (1.0 + 1e-8)


def second_first(x_C, params, cfg):
    chosen, gates = CHOOSE(x_C, params, cfg)
    return chosen, gates[::-1]


def turned_back(position_T, *given):
    cos, sin = rotary.turns(position_T, *given)
    return cos, -sin


CHOOSE = decode._choose
MISTAKES = {
    "a norm off by a hundred-millionth": ("_normalize", tilted, LLAMA),
    "the gates swapped": ("_choose", second_first, LLAMA),
    "turned the other way": ("rotary", type("back", (), {"turns": turned_back}), LLAMA),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught(name, monkeypatch):
    place, wrong, changes = MISTAKES[name]
    cfg = config(MoEConfig(**EXPERTS), **changes)
    assert off(*logits_of_both(cfg)).max() < 1e-10
    monkeypatch.setattr(decode, place, wrong)
    assert off(*logits_of_both(cfg)).max() > 1e-10


def test_a_swapped_function_is_used_here_too():
    cfg = config(MoEConfig(**EXPERTS, activation="silu"), **LLAMA)
    before, _ = logits_of_both(cfg)
    with registry.swap("silu_forward", activation.relu_forward):
        found_TV, wanted_TV = logits_of_both(cfg)
    assert off(found_TV, wanted_TV).max() < 1e-10 < off(before, wanted_TV).max()


@pytest.mark.parametrize(
    "name", ["attention_forward", "moe_forward", "softmax_forward", "rotary_forward", "top_k"]
)
def test_generation_uses_whatever_is_swapped(name):
    def refuse(*_):
        raise LookupError(name)

    cfg = config(MoEConfig(**EXPERTS), **LLAMA)
    tokens = lambda: list(generation.generate([1, 2], draw(cfg), cfg, 3, rng=0))  # noqa: E731
    before = tokens()
    with registry.swap(name, refuse), pytest.raises(LookupError, match=name):
        tokens()
    assert decode.supports(cfg) and tokens() == before


# ------------------------------------------------------------------------------------------- gain
def test_it_is_kept_because_it_gains(monkeypatch):
    """The record has a quarter of the plain path's time; a half leaves room for noise."""
    cfg = bench.models()["Mixtral"]
    params = model.init_model(np.random.default_rng(0), cfg)

    def seconds(monkey):
        with monkeypatch.context() as patch:
            monkey(patch)
            start = time.thread_time()
            list(generation.generate([1, 2, 3, 4], params, cfg, 30, temperature=0))
            return time.thread_time() - start

    rounds = [(seconds(plain), seconds(lambda patch: None)) for _ in range(9)]
    slow, fast = (min(times) for times in zip(*rounds, strict=True))
    assert fast < slow / 2


def test_scores_that_are_all_rounded_to_zero_are_divided_as_in_the_plain_path():
    moe = MoEConfig(
        num_experts=4,
        top_k=2,
        hidden=8,
        score="sigmoid",
        router_bias=True,
        gate_weights="renormalized",
    )
    cfg = ModelConfig(vocab_size=9, context=4, layers=2, width=8, heads=2, moe=moe)
    params = model.init_model(0, cfg)
    for part in params.blocks:
        part.feed.router.offset_E[:] = -800
    kv = tuple(attention.KeyValues(cfg, 1, "float32") for _ in params.blocks)
    found = decode.next_logits(3, params, decode.prepare(params, cfg), cfg, kv)
    plain = model.model_forward(np.array([[3]]), params, cfg)[0][0, 0]
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)
