"""Presets: what the papers say, the same at laptop size, and what `systems` shows of them."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_numpy import commands, config, presets, systems, tree
from moe_numpy import config as c
from moe_numpy.backend import xp
from moe_numpy.moe import layer
from moe_numpy.presets import formulas
from moe_numpy.training import data
from moe_numpy.transformer import model

ROOT = Path(__file__).parent.parent
NAMES = (
    "jacobs1991 shazeer2017 shazeer2017_hierarchical gshard switch mixtral_8x7b grok1 openmoe_8b "
    "noise_overflow vmoe st_moe base sinkhorn expert_choice soft_moe deepseekmoe deepseek_v3 "
    "olmoe qwen3_moe gpt_oss llama4"
).split()


# ------------------------------------------------------------------------------------- the papers
# experts, top_k, score, renormalized, and the parts of the layer that the papers name
ROUTING = {
    "jacobs1991": (4, 4, "softmax", False, set()),
    "shazeer2017": (256, 4, "softmax", True, {"LearnedNoise", "ImportanceLoss", "LoadLoss"}),
    "shazeer2017_hierarchical": (
        *(256, 4, "softmax", True),
        {"Hierarchy", "LearnedNoise", "ImportanceLoss", "LoadLoss"},
    ),
    "gshard": (2048, 2, "softmax", True, {"SecondExpert", "Capacity", "SwitchLoss"}),
    "switch": (128, 1, "softmax", False, {"InputJitter", "Capacity", "SwitchLoss"}),
    "mixtral_8x7b": (8, 2, "softmax", True, {"SwitchLoss"}),
    "grok1": (8, 2, "softmax", False, {"SwitchLoss"}),
    "openmoe_8b": (32, 2, "softmax", False, {"Capacity", "SwitchLoss", "ZLoss"}),
    "noise_overflow": (8, 1, "softmax", False, {"LearnedNoise", "Capacity", "SwitchLoss"}),
    "vmoe": (
        *(8, 2, "softmax", False),
        {"GaussianNoise", "Capacity", "ImportanceLoss", "LoadLoss"},
    ),
    "st_moe": (64, 2, "softmax", False, {"Capacity", "SwitchLoss", "ZLoss"}),
    "base": (128, 1, "sigmoid", False, {"Assignment"}),
    "sinkhorn": (64, 1, "sigmoid", False, {"Sinkhorn"}),
    "expert_choice": (64, 2, "softmax", False, {"ExpertChoice"}),
    "soft_moe": (128, 128, "softmax", True, {"SoftSlots"}),
    "deepseekmoe": (63, 7, "softmax", False, {"SwitchLoss", "Shared"}),
    "deepseek_v3": (256, 8, "sigmoid", True, {"GroupLimited", "SwitchLoss", "Shared"}),
    "olmoe": (64, 8, "softmax", False, {"SwitchLoss", "ZLoss"}),
    "qwen3_moe": (128, 8, "softmax", True, {"SwitchLoss"}),
    "gpt_oss": (128, 4, "softmax", True, {"SwitchLoss"}),
    "llama4": (16, 1, "sigmoid", False, {"SwitchLoss", "Shared"}),
}


def parts(moe):
    """List the kinds of all parts of a layer."""
    values = (moe.noise, moe.selection, moe.capacity, moe.shared, *moe.balance)
    return {type(value).__name__ for value in values if value is not None}


def test_the_systems_are_those_of_the_plan():
    assert sorted(presets.names()) == sorted(NAMES) == sorted(ROUTING)


@pytest.mark.parametrize("name", NAMES)
def test_a_system_routes_as_its_paper_says(name):
    moe = presets.get(name).model.moe
    experts, top_k, score, renormalized, kinds = ROUTING[name]
    assert (moe.num_experts, moe.top_k, moe.score) == (experts, top_k, score)
    assert moe.renormalized is renormalized
    assert parts(moe) == kinds
    v3 = name == "deepseek_v3"
    assert (moe.bias_rate, moe.gate_scale) == ((0.001, 2.5) if v3 else (0, 1))


@pytest.mark.parametrize(
    ("name", "tokens", "places"),
    [
        ("gshard", 2048, 2),  # 2 T / E
        ("switch", 4096, 40),  # 1.25 T / E
        ("switch", 128, 4),  # at least 4
        ("openmoe_8b", 1000, 78),  # 78.125, even
        ("openmoe_8b", 1010, 78),  # 78.9
        ("openmoe_8b", 1012, 80),  # 79.06: floored, then up to an even number
        ("vmoe", 1000, 264),  # 262.5, up to a multiple of 4
        ("st_moe", 4096, 80),  # 1.25 T / E whatever k
        ("noise_overflow", 100, 16),
    ],
)
def test_a_system_has_its_places(name, tokens, places):
    moe = presets.get(name).model.moe
    assert moe.capacity.places(tokens, moe.top_k, moe.num_experts) == places


WEIGHTS = {
    (): "jacobs1991 base sinkhorn expert_choice soft_moe",
    (0.01,): "gshard switch grok1 noise_overflow deepseekmoe gpt_oss",
    (0.1, 0.1): "shazeer2017 shazeer2017_hierarchical",
    (0.01, 0.001): "olmoe st_moe",
    (0.001,): "qwen3_moe llama4",
    (0.02,): "mixtral_8x7b",
    (0.01, 1e-4): "openmoe_8b",
    (0.005, 0.005): "vmoe",
    (1e-4,): "deepseek_v3",
}


def test_the_weights_of_the_losses_are_those_of_the_papers():
    expected = {name: weights for weights, names in WEIGHTS.items() for name in names.split()}
    found = {n: tuple(t.weight for t in presets.get(n).model.moe.balance) for n in NAMES}
    assert found == expected


def test_what_surrounds_the_experts_is_as_published():
    grok, openmoe = presets.get("grok1").model, presets.get("openmoe_8b").model
    assert (grok.sandwich, grok.logit_cap, grok.tied) == (True, 30.0, True)
    assert round(grok.embedding_scale, 4) == 78.3837 and round(grok.logit_scale, 5) == 0.57735
    assert (openmoe.attention_scale, openmoe.extra_ffn) == (1.0, True)
    assert [i for i in range(24) if openmoe.is_moe(i)] == [5, 11, 17, 23]
    assert [i for i in range(61) if not presets.get("deepseek_v3").model.is_moe(i)] == [0, 1, 2]
    norms = {name: presets.get(name).model.qk_norm for name in ("olmoe", "qwen3_moe", "llama4")}
    assert norms == {"olmoe": "full", "qwen3_moe": "head", "llama4": "l2"}
    assert presets.get("mixtral_8x7b").model.theta == 1e6
    assert presets.get("gshard").model.moe.capacity.priority == "choice"
    assert presets.get("noise_overflow").model.moe.balance[0].counted == 4
    assert presets.get("gpt_oss").model.sinks and presets.get("llama4").model.moe.gate_on == "input"
    looking_ahead = {name for name in NAMES if not presets.get(name).model.causal}
    assert looking_ahead == {"expert_choice", "soft_moe"}


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_whole_and_says_where_it_departs(name):
    preset = presets.get(name)
    assert preset.name == name and 1991 <= preset.year <= 2026
    assert preset.departs and all(text.startswith("differs: ") for text in preset.departs)
    assert 2 <= len(re.findall(r"[.;:](?: |$)", preset.idea)) <= 5
    assert config.from_dict(config.to_dict(preset.model)) == preset.model
    number = re.search(r"arXiv (\d\d)(\d\d)\.\d{4,5}$", preset.paper.at)
    assert number is None or 2000 + int(number[1]) == preset.year


def test_an_unknown_name_is_refused_with_its_nearest():
    with pytest.raises(ValueError, match=r"got 'mixtral'. Did you mean mixtral_8x7b\?"):
        presets.get("mixtral")
    with pytest.raises(ValueError, match="Did you mean deepseek"):
        presets.tiny("deepseek-v3")
    with pytest.raises(ValueError, match="Did you mean jacobs1991 or shazeer2017 or"):
        presets.get("42")


# ----------------------------------------------------------------------------------- laptop sizes
SIZES = {"num_experts", "top_k", "hidden", "selection", "capacity", "balance", "shared", "noise"}
HOST = {"vocab_size", "context", "layers", "width", "heads", "kv_heads", "head_size", "hidden"}


def without_sizes(part):
    """Leave out of a part what counts experts, groups or tokens."""
    if part is None:
        return None
    gone = {"group", "groups", "kept", "hidden", "std"} - (
        {"kept"} if isinstance(part, c.Hierarchy) else set()
    )
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    return type(part), {k: v for k, v in fields.items() if k not in gone}


@pytest.mark.parametrize("name", NAMES)
def test_the_laptop_size_is_the_same_system(name):
    large, small = presets.get(name).model, presets.tiny(name)
    for field in dataclasses.fields(large):
        if field.name not in HOST | {"moe", "moe_layers", "embedding_scale"}:
            assert getattr(large, field.name) == getattr(small, field.name), field.name
    for field in dataclasses.fields(large.moe):
        if field.name not in SIZES | {"router_std"}:
            assert getattr(large.moe, field.name) == getattr(small.moe, field.name), field.name
    for field in ("selection", "capacity", "shared", "noise"):
        pair = [without_sizes(getattr(cfg.moe, field)) for cfg in (large, small)]
        assert pair[0] == pair[1], field
    terms = zip(large.moe.balance, small.moe.balance, strict=True)
    assert all(without_sizes(a) == without_sizes(b) for a, b in terms)
    assert (large.moe_count == large.layers) == (small.moe_count == small.layers)
    assert (large.hidden is None) == (small.hidden is None)
    grouped = large.kv_heads not in (None, large.heads)
    assert small.kv_heads == (2 if grouped else None)


@pytest.mark.parametrize("name", NAMES)
def test_the_laptop_size_is_small(name):
    cfg = presets.tiny(name)
    assert (cfg.layers, cfg.width, cfg.heads, cfg.context) == (2, 64, 4, 64)
    moe = cfg.moe
    wide = 1 if isinstance(moe.selection, c.SoftSlots) else moe.top_k
    active = wide * moe.hidden + (moe.shared.hidden if moe.shared else 0)
    assert 240 <= active <= 256
    assert moe.num_experts in (4, 8, 15, 16)
    assert tree.size(model.init_model(np.random.default_rng(0), cfg)) < 900_000


def test_what_follows_a_size_follows_it_down():
    assert presets.tiny("grok1").embedding_scale == 8.0
    assert presets.tiny("vmoe").moe.noise.std == 1 / 8
    assert presets.tiny("switch").moe.router_std == pytest.approx((0.1 / 64) ** 0.5)
    assert presets.tiny("openmoe_8b").head_size == 24  # 24 * 128 on 2048 is 4 * 24 on 64
    v3 = presets.tiny("deepseek_v3").moe
    assert (v3.selection.groups, v3.selection.kept, v3.balance[0].group) == (4, 2, 64)
    hierarchical = presets.tiny("shazeer2017_hierarchical").moe
    assert (hierarchical.num_experts, hierarchical.selection.groups) == (16, 4)


def test_fixed_noise_grows_as_the_experts_get_fewer(monkeypatch):
    vmoe = presets.get("vmoe")
    layer = dataclasses.replace(vmoe.model.moe, num_experts=32, noise=c.GaussianNoise(std=1 / 32))
    large = dataclasses.replace(vmoe, model=dataclasses.replace(vmoe.model, moe=layer))
    monkeypatch.setattr(presets, "get", lambda name: large)
    assert presets.tiny("vmoe").moe.noise.std == 1 / 8


def test_the_laptop_size_reads_the_built_in_corpus_or_any_other():
    assert presets.tiny("switch").vocab_size == len(data.ASCII_ALPHABET) == presets.SYMBOLS
    assert presets.tiny("switch", vocab_size=11).vocab_size == 11


@pytest.mark.parametrize("name", NAMES)
def test_a_laptop_model_runs_forward_and_backward(name):
    cfg, rng = presets.tiny(name), np.random.default_rng(0)
    params = model.init_model(rng, cfg)
    token_BT, target_BT = rng.integers(0, cfg.vocab_size, (2, 3, cfg.context))
    noise = model.draw_noise(rng, cfg, token_BT.size)
    loss, report, cache = model.loss_forward(token_BT, target_BT, params, cfg, noise)
    grads = model.loss_backward(xp.ones_like(loss), cache)
    assert abs(float(report.cross_entropy) - np.log(cfg.vocab_size)) < 0.5
    assert (float(report.aux) != 0) == bool(cfg.moe.balance)
    assert all(np.isfinite(g).all() for g in tree.leaves(grads))
    assert [g.shape for g in tree.leaves(grads)] == [p.shape for p in tree.leaves(params)]


# --------------------------------------------------------------------------------------- formulas
CHANGES = [
    *({"num_experts": 12}, {"top_k": 3}, {"activation": "swiglu"}, {"score": "sigmoid"}),
    *({"gate_weights": "raw"}, {"gate_scale": 2.0}, {"gate_on": "input"}, {"router_bias": True}),
    *({"noise": c.LearnedNoise()}, {"noise": c.GaussianNoise()}, {"noise": c.InputJitter()}),
    {"noise": c.LearnedNoise(floor=0.5)},
    {"noise": c.GaussianNoise(std=0.25)},
    {"noise": c.InputJitter(eps=0.125)},
    {"expert_bias": True},
    {"shared": c.Shared(hidden=7)},
    {"shared": c.Shared(hidden=7, gated=True)},
    {"bias_rate": 0.25, "balance": ()},
    {"gate_weights": "renormalized_kept"},
    *({"capacity": c.Capacity(**part)} for part in (
        *({"factor": 1.5}, {"overflow": "next_best"}, {"priority": "choice"}),
        *({"priority": "bpr"}, {"priority": "score"}, {"rounding": "floor"}),
        *({"minimum": 3}, {"multiple": 5}),
        *({"times_k": False}, {"group": 9}),
    )),
    *({"balance": terms} for terms in (
        (),
        *((c.SwitchLoss(**part),) for part in (
            *({"weight": 0.25}, {"counted": 1}, {"counted": 3}, {"divide": False}, {"group": 9}),
        )),
        (c.ZLoss(),),
        (c.ImportanceLoss(),),
        (c.ImportanceLoss(of="probabilities"),),
        (c.SwitchLoss(), c.ZLoss()),
    )),
    *({"selection": part} for part in (
        c.SecondExpert(),
        c.SecondExpert(policy="threshold"),
        c.SecondExpert(threshold=0.25),
        c.GroupLimited(groups=4, kept=2),
        c.GroupLimited(groups=4, kept=3),
        c.GroupLimited(groups=2, kept=1),
        c.GroupLimited(groups=4, kept=2, score="max"),
    )),
    *({"selection": part, "balance": (), "capacity": None} for part in (
        *(c.Sinkhorn(), c.ExpertChoice(), c.Hierarchy(groups=4), c.Hierarchy(groups=2, kept=1)),
    )),
    {"selection": c.Hierarchy(groups=4, kept=1)},
    {"selection": c.Assignment(), "balance": (), "capacity": None, "top_k": 1},
    {"selection": c.SoftSlots(), "balance": (), "capacity": None, "top_k": 8},
    {"selection": c.SoftSlots(slots=2), "balance": (), "capacity": None, "top_k": 8},
]  # fmt: skip


FLAT = c.MoEConfig(
    num_experts=8, top_k=2, hidden=6, capacity=c.Capacity(), balance=(c.SwitchLoss(),)
)
TREE = dataclasses.replace(FLAT, selection=c.Hierarchy(groups=2, kept=1))
REFUSED = {"score", "gate_weights", "router_bias", "bias_rate"}  # by a hierarchy


@pytest.mark.parametrize("plain", [FLAT, TREE], ids=["flat", "hierarchy"])
def test_every_knob_changes_the_formulas(plain):
    refused = REFUSED if plain is TREE else set()
    changes = [change for change in CHANGES if not refused & change.keys()]
    texts = {"\n".join(formulas.routing(plain))}
    for change in changes:
        texts.add("\n".join(formulas.routing(dataclasses.replace(plain, **change))))
    assert len(texts) == 1 + len(changes)
    for change in CHANGES:
        if change not in changes:
            with pytest.raises(ValueError, match="Hierarchy"):
                dataclasses.replace(plain, **change)


@pytest.mark.parametrize("plain", [FLAT, TREE], ids=["flat", "hierarchy"])
def test_to_count_all_choices_is_the_default_in_words_and_in_numbers(plain):
    plain = dataclasses.replace(plain, num_experts=12, top_k=3)
    named = dataclasses.replace(plain, balance=(c.SwitchLoss(counted=3),))
    assert formulas.routing(named) == formulas.routing(plain)
    rng = np.random.default_rng(0)
    params = tree.map(
        lambda leaf: rng.standard_normal(leaf.shape), layer.init_moe(rng, plain, 5, "float64")
    )
    x_NC = rng.standard_normal((40, 5))
    (_, aux, *_), (_, again, *_) = (layer.moe_forward(x_NC, params, cfg) for cfg in (plain, named))
    assert float(aux) == float(again)


def test_the_formulas_of_a_known_layer():
    assert formulas.routing(presets.get("switch").model.moe) == [
        "x'_NC = x_NC * uniform(0.99, 1.01)",
        "noisy_NE = clean_NE = x'_NC @ w_CE",
        "score_NE = softmax(noisy_NE)",
        "wished_NK = top_k(score_NE, 1)",
        "gate_NK = score_NE[wished]",
        "places = floor(1.25 * N / 128), at least 4",
        "served token by token; who finds an expert full is dropped",
        "expert(x) = relu(x in) out",
        "y_NC = sum over K of gate_NK * expert_K(x_NC)",
        "aux = 0.01 * E sum_e f_e P_e",
        "f_e = share of e in every token's choice, P_e = mean over N of score_NE",
        "at evaluation: no noise, no limits",
    ]


def test_the_formulas_of_a_known_hierarchy():
    terms = (c.ImportanceLoss(of="probabilities"), c.LoadLoss(), c.ZLoss())
    preset = presets.get("shazeer2017_hierarchical").model.moe
    moe = dataclasses.replace(preset, balance=terms, gate_scale=2.0)
    lines = formulas.routing(moe)
    assert lines[4:7] == [
        "wished_NK = top_k(noisy_NG, 2) of 16 groups, top_k(noisy_NE, 2) in each",
        "score_NE = softmax(noisy_NG)[group] * softmax(noisy_NE in the group)",
        "gate_NK = 2 * softmax(noisy_NG[wished groups]) * softmax(noisy_NE[wished in the group])",
    ]
    moved = dataclasses.replace(moe, capacity=c.Capacity(overflow="next_best"))
    gates = "gate_NK = 2 * softmax(noisy_NG[used groups]) * softmax(noisy_NE[used in the group])"
    assert gates in formulas.routing(moved)
    (aux,) = (line for line in lines if line.startswith("aux"))
    assert aux.removeprefix("aux = ").split(" + ", 2) == [
        "0.1 * CV^2(sum over N of softmax(clean_NG)[group] * softmax(clean_NE in the group))",
        "0.1 * CV^2((sum over N of P(group is chosen))"
        " * mean over its tokens of P(e is chosen in it))",
        "0.001 * (mean over N of (log sum exp clean_NG)^2"
        " + mean over N and groups of (log sum exp clean_NE in the group)^2)",
    ]


def test_the_bias_rule_counts_what_was_wished():
    moe = dataclasses.replace(FLAT, balance=(), bias_rate=0.25)
    rule = "after a step: bias_E += 0.25 * sign(mean wished_E - wished_E)"
    assert rule in formulas.routing(moe)


def test_knobs_are_what_differs_and_python_reads_them_back():
    for name in NAMES:
        cfg = presets.get(name).model
        for part in (cfg, cfg.moe):
            text = ", ".join(f"{key}={value}" for key, value in formulas.knobs(part))
            again = eval(f"dict({text})", vars(c) | {"dict": dict})
            found = type(part)(**again, **({"moe": cfg.moe} if part is cfg else {}))
            rounded = {"router_std", "embedding_scale", "logit_scale"} & again.keys()
            exact = {key: getattr(part, key) for key in rounded}
            assert dataclasses.replace(found, **exact) == part
            assert all(again[key] == pytest.approx(exact[key], rel=1e-3) for key in rounded)


# ---------------------------------------------------------------------------------------- systems
@pytest.mark.parametrize("width", [80, 100, 120, 140])
def test_the_table_fits_the_terminal(width):
    lines = systems.table(width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines[1 : len(NAMES) + 1]] == presets.names()
    named = " ".join(lines[len(NAMES) + 1 :])
    assert ("wider" in named) == (width < 140)
    assert ("paper" in lines[0]) != ("paper" in named)


def test_the_table_says_computed_and_published():
    text = systems.table(140)
    row = {line.split()[0]: line for line in text.splitlines() if line}
    assert "671 B 37.6 B" in row["deepseek_v3"] and "671 / 37 B" in row["deepseek_v3"]
    assert "5.13 B 116.8 / 5.13 B" in row["gpt_oss"]
    assert row["shazeer2017_hierarchical"].split()[3:6] == ["4", "of", "2/16"]
    assert "1.25+" in row["noise_overflow"] and "jitter" in row["switch"]


@pytest.mark.parametrize("width", [72, 80, 200])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_fits_the_terminal_and_has_everything(name, width):
    text, preset = systems.page(name, width), presets.get(name)
    assert max(map(len, text.splitlines())) <= min(width, 100)
    flat = " ".join(text.split())
    assert flat.startswith(f"{name} ({preset.year})") and preset.paper.title in flat
    for part in (*preset.departs, *preset.notes, *formulas.routing(preset.model.moe)):
        assert " ".join(part.removeprefix("differs: ").split()) in flat
    how = f"train --preset {name}" if preset.model.causal else f"presets.tiny('{name}')"
    assert how in text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"),
        (98, "98"),
        (47_616, "47.6 k"),
        (1e6, "1 M"),
        (999_600_000, "1 B"),
        (1e13, "10 T"),
    ],
)
def test_amounts_have_three_digits(number, text):
    assert systems.amount(number) == text


def test_the_command_prints_all_one_or_json(capsys):
    assert commands.main(["systems"]) == 0
    assert "mixtral_8x7b" in capsys.readouterr().out
    assert commands.main(["systems", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["systems"]
    assert [entry["name"] for entry in found] == presets.names()
    assert all(len(entry.keys()) == len(found[0].keys()) for entry in found)
    assert commands.main(["systems", "grok1"]) == 0
    assert "Where it departs from the paper" in capsys.readouterr().out
    assert commands.main(["systems", "grok1", "--json"]) == 0
    grok = json.loads(capsys.readouterr().out)
    assert grok == next(entry for entry in found if entry["name"] == "grok1")
    assert config.from_dict(grok["model"]) == presets.get("grok1").model
    assert config.from_dict(grok["laptop_model"]) == presets.tiny("grok1")
    counted = presets.get("grok1").ledger()
    assert grok["parameters_total"] == counted.parameters and grok["experts"] == 8
    assert sum(part["parameters"] for part in grok["published_size"].values()) == counted.parameters


def test_the_command_refuses_an_unknown_name(capsys):
    assert commands.main(["systems", "gpt_os"]) == 1
    assert "Did you mean gpt_oss" in capsys.readouterr().err


def test_presets_load_no_array_library():
    code = "import sys; from moe_numpy import systems, presets; systems.table(140); " + (
        "presets.tiny('switch'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "moe_numpy.ledger" in done.stdout.split()
    assert not {"numpy", "matplotlib", "moe_numpy.backend"} & set(done.stdout.split())


def test_the_numbers_of_the_papers_that_no_count_shows_are_as_they_were_read():
    models = {name: presets.get(name).model for name in presets.names()}

    def those(read, usual):
        found = {name: read(cfg) for name, cfg in models.items()}
        return {name: value for name, value in found.items() if value != usual}

    def switch(cfg):
        terms = [term for term in cfg.moe.balance if isinstance(term, c.SwitchLoss)]
        return [(term.counted, term.divide, term.group) for term in terms]

    undivided = [(None, False, None)]
    usual = ([], [(None, True, None)])
    assert {n: s for n, s in those(switch, None).items() if s not in usual} == {
        "gshard": [(1, True, 2048)],
        "noise_overflow": [(4, True, None)],
        "st_moe": undivided,
        "openmoe_8b": undivided,
        "mixtral_8x7b": undivided,
        "deepseek_v3": [(None, True, 4096)],
        "qwen3_moe": undivided,
    }
    rotary = those(lambda cfg: cfg.theta, 10_000.0)
    wanted = {"mixtral_8x7b": 1e6, "qwen3_moe": 1e6, "gpt_oss": 150_000.0, "llama4": 500_000.0}
    assert rotary == wanted
    assert those(lambda cfg: cfg.moe_layers, None) == {
        "gshard": tuple(range(1, 18, 2)),
        "switch": tuple(range(1, 12, 2)),
        "vmoe": tuple(range(1, 12, 2)),
        "base": (12,),
        "st_moe": tuple(range(3, 24, 4)),
        "expert_choice": tuple(range(1, 12, 2)),
        "soft_moe": tuple(range(6, 12)),
        "openmoe_8b": (5, 11, 17, 23),
        "deepseek_v3": tuple(range(3, 61)),
    }
    averaged = those(lambda cfg: cfg.balance_over_layers, "sum")
    assert averaged.keys() == {"olmoe", "openmoe_8b", "st_moe"}
    assert those(lambda cfg: cfg.moe.same_start, False).keys() == {"vmoe"}
    assert those(lambda cfg: cfg.moe.router_bias, False).keys() == {"jacobs1991", "gpt_oss"}
    assert models["deepseekmoe"].moe.router_std == 0.006
    assert models["vmoe"].moe.balance[0].of == "probabilities"
    assert models["gshard"].head_size == 128
    assert presets.tiny("switch").hidden == 256
