"""The ledger counts what is there: published models to their digits, laptop ones to the number."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest

from moe_numpy import ledger, presets, tree
from moe_numpy.backend import xp
from moe_numpy.config import (
    Capacity,
    ExpertChoice,
    Hierarchy,
    LearnedNoise,
    ModelConfig,
    MoEConfig,
    Shared,
)
from moe_numpy.presets import Preset
from moe_numpy.transformer import model

BILLION = 1e9


def without(preset: Preset, moe=None, **changes) -> ledger.Ledger:
    """Count a system after changes to its model and its layer."""
    layer = dataclasses.replace(preset.model.moe, **(moe or {}))
    cfg = dataclasses.replace(preset.model, moe=layer, **changes)
    return ledger.count(cfg, latent=preset.latent, encoder=preset.encoder)


def digits(number: int, places: int) -> float:
    return round(number / BILLION, places)


# -------------------------------------------------------------------------------- published counts
@pytest.mark.parametrize(
    ("name", "places", "total", "active"),
    [
        ("mixtral_8x7b", 2, 46.70, 12.88),
        ("grok1", 1, 315.7, 83.8),
        ("switch", 2, 7.42, 0.22),
        ("switch", 3, 7.415, 0.224),
        ("olmoe", 2, 6.92, 1.28),
        ("deepseek_v3", 1, 671.0, 37.6),
        ("qwen3_moe", 1, 30.5, 3.4),
        ("llama4", 1, 107.8, 17.2),
        ("deepseekmoe", 1, 2.0, 0.3),
    ],
)
def test_a_published_model_is_counted_to_its_digits(name, places, total, active):
    counted = presets.get(name).ledger()
    assert (digits(counted.parameters, places), digits(counted.active, places)) == (total, active)


def test_qwen3_has_its_active_parameters_to_three_digits():
    assert digits(presets.get("qwen3_moe").ledger().active, 2) == 3.35


def test_the_embedding_decides_some_printed_numbers():
    grok, v3 = presets.get("grok1").ledger(), presets.get("deepseek_v3").ledger()
    assert digits(grok.parameters - grok["embedding"].parameters, 1) == 314.9
    assert digits(v3.active_without_embedding, 1) == 36.6


def test_gpt_oss_prints_its_active_parameters_without_the_embedding():
    preset = presets.get("gpt_oss")
    large, small = preset.ledger(), without(preset, moe={"num_experts": 32}, layers=24)
    assert digits(large.parameters, 1) == 116.8
    assert digits(large.active_without_embedding, 2) == 5.13
    assert digits(small.parameters, 1) == 20.9
    assert digits(small.active_without_embedding, 2) == 3.61


@pytest.mark.parametrize(("experts", "total"), [(64, 3.79), (128, 7.42), (256, 14.66)])
def test_switch_base_grows_with_its_experts_at_the_same_work(experts, total):
    counted = without(presets.get("switch"), moe={"num_experts": experts})
    assert digits(counted.parameters, 2) == total
    assert counted["experts"].flops == presets.get("switch").ledger()["experts"].flops


def test_openmoe_is_counted_with_four_matrices_and_with_three():
    preset = presets.get("openmoe_8b")
    assert digits(preset.ledger().parameters, 2) in (11.85, 11.86)
    three = without(preset, moe={"activation": "swiglu"}, activation="swiglu", tied=True)
    assert digits(three.parameters, 2) == 8.78
    assert digits(three.active, 1) == 2.7
    assert digits(three.active - three["embedding"].active, 1) == 2.2


def test_shazeer_and_gshard_have_their_experts():
    assert presets.get("shazeer2017").ledger()["experts"].parameters == 256 * 2**20
    assert digits(presets.get("gshard").ledger()["experts"].parameters, 0) == 618


def test_deepseekmoe_16b_is_a_matter_of_its_sizes():
    counted = without(
        presets.get("deepseekmoe"),
        moe={"num_experts": 64, "top_k": 6, "hidden": 1408, "shared": Shared(hidden=2816)},
        **{"layers": 28, "width": 2048, "heads": 16, "hidden": 10_944, "activation": "swiglu"},
        **{"moe_layers": tuple(range(1, 28)), "vocab_size": 102_400},
    )
    assert (digits(counted.parameters, 2), digits(counted.active, 2)) == (16.38, 2.83)


def test_most_printed_numbers_are_met_within_a_twentieth():
    for name in presets.names():
        preset, counted = presets.get(name), presets.get(name).ledger()
        if preset.published.total is not None and name != "openmoe_8b":
            assert math.isclose(counted.parameters, preset.published.total, rel_tol=0.05), name


# ---------------------------------------------------------------------------------------- by hand
def tiny_model(**changes):
    fields = {"vocab_size": 11, "context": 6, "layers": 3, "width": 8, "heads": 2, "hidden": 5}
    return ModelConfig(**{**fields, **changes})


def test_a_dense_model_by_hand():
    counted = ledger.count(tiny_model())
    assert [row.part for row in counted.rows] == list(ledger.PARTS)
    assert {row.part: row.parameters for row in counted.rows} == {
        "embedding": 88,
        "positions": 48,
        "attention": 3 * 4 * 64,
        "norms": 7 * 16,
        "dense feed-forward": 3 * 80,
        "router": 0,
        "experts": 0,
        "shared": 0,
        "head": 0,
    }
    assert counted.parameters == counted.active == 88 + 48 + 768 + 112 + 240
    products = 3 * (4 * 64 + 2 * 6 * 8) + 3 * 80 + 88
    assert counted.flops == 2 * products
    assert ledger.count(tiny_model(), context=1).flops == 2 * (products - 3 * 2 * 5 * 8)


def test_a_token_reads_one_row_of_a_table_and_all_of_the_head():
    cfg = tiny_model(tied=False)
    counted = ledger.count(cfg)
    read = 8 + 8 + 768 + 112 + 240 + 88
    assert counted.weight_bytes(2) == 2 * read
    assert counted.parameters == counted.active == ledger.count(tiny_model()).parameters + 88
    assert counted.active_without_embedding == counted.active - 88
    tied = ledger.count(tiny_model())
    assert tied.weight_bytes(2) == 2 * read
    assert tied.active_without_embedding == tied.active


def test_a_token_reads_the_experts_that_it_uses():
    moe = MoEConfig(num_experts=7, top_k=3, hidden=4, activation="swiglu", expert_bias=True)
    row = ledger.count(tiny_model(moe=moe, hidden=None))["experts"]
    one = 3 * 8 * 4 + 2 * 4 + 8
    assert (row.parameters, row.active, row.read) == (3 * 7 * one, 3 * 3 * one, 3 * 3 * one)
    assert row.flops == 3 * 2 * 3 * (3 * 8 * 4 + 8)


# ---------------------------------------------------------------------------------------- reality
def part_of(name: str) -> str:
    """Tell the part of a parameter by its dotted name."""
    place = name.split(".")
    tables = {"token_VC": "embedding", "position_TC": "positions", "head_CV": "head"}
    if place[0] in tables:
        return tables[place[0]]
    if place[0] == "norm" or "norm" in place[2]:
        return "norms"
    if place[2] == "attention":
        return "attention"
    return place[3] if place[3] in ("router", "experts", "shared") else "dense feed-forward"


def odd_model(**layer):
    """Configure a model with every option of attention, and one MoE layer among dense ones."""
    fields = {"num_experts": 6, "top_k": 2, "hidden": 7, **layer}
    return tiny_model(
        **{"heads": 4, "kv_heads": 2, "head_size": 6, "qk_norm": "full", "attention_bias": True},
        **{"sinks": True, "sandwich": True, "extra_ffn": True, "tied": False},
        activation="swiglu3",
        moe_layers=(1,),
        moe=MoEConfig(**fields),
    )


MODELS = {name: presets.tiny(name) for name in presets.names()} | {
    "dense": tiny_model(),
    "gated shared": odd_model(activation="geglu", shared=Shared(hidden=3, gated=True)),
    "biases": odd_model(router_bias=True, expert_bias=True, bias_rate=0.1),
    "three branches with biases": odd_model(activation="swiglu3", expert_bias=True),
    "noise": odd_model(noise=LearnedNoise(), shared=Shared(hidden=3)),
    "hierarchy": odd_model(selection=Hierarchy(groups=3, kept=1)),
}


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_a_model_has_the_parameters_that_the_ledger_counts(cfg):
    found = Counter()
    for leaf, array in tree.named_leaves(model.init_model(np.random.default_rng(0), cfg)):
        found[part_of(leaf)] += array.size
    counted = ledger.count(cfg)
    assert {row.part: row.parameters for row in counted.rows if row.parameters} == dict(found)


class Counted(np.ndarray):
    """An array that counts the multiply-adds of every matrix product that it takes part in."""

    products = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        plain = [np.asarray(x) if isinstance(x, Counted) else x for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(np.asarray(x) for x in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc is np.matmul and min(x.ndim for x in plain) > 1:  # sums of rows are none
            Counted.products += result.size * plain[0].shape[-1]
        if out is not None:
            return out[0]
        return result.view(Counted) if isinstance(result, np.ndarray) else result


@pytest.fixture
def measure(monkeypatch):
    """Run one sequence forward; return the multiply-adds of its products and of its sums."""
    sums = []

    def einsum(letters, *arrays):
        if "..." in letters:  # within a norm
            return np.einsum(letters, *arrays)
        sizes = {}
        for axes, array in zip(letters.split("->")[0].split(","), arrays, strict=True):
            sizes |= dict(zip(axes, array.shape, strict=True))
        sums.append(math.prod(sizes.values()))
        return np.einsum(letters, *arrays)

    def run(cfg):
        rng = np.random.default_rng(0)
        params = tree.map(lambda leaf: leaf.view(Counted), model.init_model(rng, cfg))
        token_BT = rng.integers(0, cfg.vocab_size, (1, cfg.context))
        monkeypatch.setattr(xp, "einsum", einsum)
        monkeypatch.setattr(xp, "dot", np.matmul)
        Counted.products = 0
        model.model_forward(token_BT, params, cfg.evaluation())
        return Counted.products, sum(sums)

    return run


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_a_forward_pass_does_the_work_that_the_ledger_counts(cfg, measure):
    products, sums = measure(cfg)
    flops = ledger.count(cfg).flops
    if cfg.moe is not None and isinstance(cfg.moe.selection, ExpertChoice):
        # A sum is as long as that of the most wanted token; on average it is top_k.
        average = cfg.context * cfg.moe_count * cfg.moe.top_k * cfg.width
        assert sums >= average
        sums = average
    assert 2 * (products + sums) == cfg.context * flops


def test_the_measure_sees_an_expert_too_many(measure):
    cfg = presets.tiny("olmoe")
    more = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, top_k=cfg.moe.top_k + 1))
    products, sums = measure(more)
    assert 2 * (products + sums) > cfg.context * ledger.count(cfg).flops


def test_an_encoder_brings_norms_of_its_own_and_those_of_cross_attention():
    sizes = {"vocab_size": 5, "context": 4, "layers": 3, "width": 8, "heads": 2, "hidden": 8}
    cfg = ModelConfig(**sizes, norm="rmsnorm")
    assert ledger.count(cfg, encoder=True)["norms"].parameters == (2 * 6 + 3 + 2) * 8


def test_the_weights_of_the_noise_are_active_but_not_read_to_generate():
    moe = MoEConfig(num_experts=4, top_k=2, hidden=8, noise=LearnedNoise())
    cfg = ModelConfig(vocab_size=5, context=4, layers=1, width=8, heads=2, moe=moe)
    row = ledger.count(cfg)["router"]
    assert (row.parameters, row.active, row.read) == (64, 64, 32)


def test_latent_attention_by_hand():
    cfg = ModelConfig(vocab_size=5, context=7, layers=1, width=6, heads=2, hidden=4)
    latent = ledger.Latent(query=3, key_value=4, plain=2, rotary=1, value=5)
    row = ledger.count(cfg, latent=latent)["attention"]
    matrices = 6 * 3 + 3 * 2 * 3 + 6 * (4 + 1) + 4 * 2 * (2 + 5) + 2 * 5 * 6
    assert row.parameters == row.active == row.read == matrices + 3 + 4
    assert row.flops == 2 * matrices + 2 * 7 * 2 * (3 + 5)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda cfg: ledger.count(cfg, 0), "count: context must be a whole number of at least 1"),
        (lambda cfg: ledger.step_memory(cfg, -3), "step_memory: batch must be a whole number"),
        (lambda cfg: ledger.step_memory(cfg, 2.5), "step_memory: batch must be a whole number"),
        (lambda cfg: ledger.step_memory(cfg, 2, -1), "step_memory: moments must be a whole number"),
    ],
)
def test_what_cannot_be_counted_is_refused(ask, words):
    with pytest.raises(ValueError, match=words):
        ask(tiny_model())


def test_rotary_positions_have_no_table_to_read():
    sizes = {"vocab_size": 5, "context": 4, "layers": 1, "width": 8, "heads": 2, "hidden": 4}
    cfg = ModelConfig(**sizes, positions="rotary")
    assert ledger.count(cfg)["positions"] == ledger.Row(part="positions")


def test_what_a_gated_shared_expert_and_a_second_feed_forward_leave_is_counted():
    sizes = {"vocab_size": 11, "context": 6, "layers": 1, "width": 8, "heads": 2}

    def left(moe, **changes):
        return ledger._left(ModelConfig(**sizes, **changes, moe=moe), 0, 2)

    plain = MoEConfig(num_experts=4, top_k=2, hidden=3)
    shared, gated = (
        dataclasses.replace(plain, shared=Shared(hidden=5, gated=gated)) for gated in (False, True)
    )
    assert left(gated) - left(shared) == 8
    assert left(plain, extra_ffn=True, hidden=5) - left(plain) == 2 * 8 + 2 * 5


def test_a_group_larger_than_the_batch_is_the_batch():
    def memory(group):
        limit = Capacity(factor=0.5, minimum=8, group=group)
        moe = MoEConfig(num_experts=4, top_k=2, hidden=4, capacity=limit)
        sizes = {"vocab_size": 5, "context": 4, "layers": 1, "width": 8, "heads": 2}
        return ledger.step_memory(ModelConfig(**sizes, moe=moe), 2)

    assert memory(4096) == memory(None)
