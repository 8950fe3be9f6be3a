"""The README shows what the committed records say, and its commands and example work."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_numpy import files, presets
from moe_numpy.lab import bench_report, collapse, plots, systems

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SHAKESPEARE = {
    "dense": "dense",
    "moe": "8 experts of half the hidden width, top-2",
    "mixtral": "the same in Mixtral's style (gated: 1.5 times the expert weights)",
}


def record(name):
    """Read a record as it was committed: the quick start writes its own over figures/collapse."""
    path = f"figures/{name}.json"
    shown = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True)
    return json.loads(shown.stdout) if shown.returncode == 0 else files.read_json(ROOT / path)


def says(text):
    """Tell whether the README says so, however its lines are broken."""
    return text in " ".join(README.split())


def names_in(before, after):
    """Find the names in the sentence between two texts."""
    _, found, sentence = " ".join(README.split()).partition(before)
    assert found, before
    return set(re.findall(r"`(\w+)`", sentence.partition(after)[0]))


def shakespeare_table():
    runs = {label: record(f"shakespeare_{name}") for name, label in SHAKESPEARE.items()}
    lines = ["| model | validation loss |", "|---|---|"]
    lines += [f"| {label} | {run['validation_loss']:.3f} |" for label, run in runs.items()]
    references = next(iter(runs.values()))["references"]
    lines += [f"| {name} count model | {references[name]:.3f} |" for name in plots.NGRAMS[1:]]
    return "\n".join(lines)


def test_the_tables_are_those_of_the_records():
    assert collapse.table(record("collapse")) in README
    assert shakespeare_table() in README


def test_what_the_text_says_of_the_collapse_study_holds_in_its_record():
    found = {condition["name"]: condition["runs"] for condition in record("collapse")["conditions"]}
    E = record("collapse")["num_experts"]

    def layers(name, key):
        return [value for run in found[name] for value in run[key]]

    def mean_loss(name):
        return sum(run["validation_loss"] for run in found[name]) / len(found[name])

    assert all(layers("no cure", "collapsed"))
    assert says("Without a cure every layer of every seed collapses.")
    assert any(layers("noise", "collapsed")) and not all(layers("noise", "collapsed"))
    assert says("noise alone is a coin toss: some layers stay alive, others collapse as before.")
    for name in ("capacity", "noise + capacity"):
        assert min(layers(name, "effective_experts")) > 0.85 * E
        assert max(layers(name, "effective_experts_clean")) < E / 2
    clean = {name: sum(layers(name, "effective_experts_clean")) for name in found}
    assert max(clean, key=clean.get) == "Switch loss"
    assert says("The Switch loss is the cure that changes the router's own choice the most.")
    assert says("every cure costs loss, and none of these models is as good as a 2-gram count")
    assert all(mean_loss(name) > mean_loss("no cure") for name in found if name != "no cure")
    assert min(mean_loss(name) for name in found) > record("collapse")["references"]["2-gram"]
    assert not any(layers("noise + capacity", "dead_experts"))
    assert any(layers("capacity", "dead_experts"))
    assert says("keeps nearly all experts busy, and with noise all of them.")
    assert says("with the limits off, the router still wants only a few.")
    runs = [run for condition in found.values() for run in condition]
    assert not any(run["drop_rate"] for run in runs)
    assert says("Drops are choices that got no place: none here")
    assert {len(run["collapsed"]) for run in runs} == {2}
    assert says("the last column counts the two layers of every seed.")


@pytest.fixture(scope="module")
def systems_record():
    if not (ROOT / "figures" / "systems.json").exists():
        pytest.skip("the systems have not been trained yet: python -m moe_numpy systems --train")
    return record("systems")


def test_the_table_of_the_systems_is_that_of_the_record(systems_record):
    section = README.split("## The systems of the literature")[1].split("\n## ")[0]
    [shown] = re.findall(r"```text\n(.*?)\n```", section, flags=re.S)
    assert shown == systems.table(systems_record)


def test_what_the_text_says_of_the_systems_holds_in_the_record(systems_record):
    found = {system["name"]: system["runs"] for system in systems_record["systems"]}
    experts = {system["name"]: system["num_experts"] for system in systems_record["systems"]}
    decoders = [name for name in presets.names() if presets.tiny(name).causal]
    assert list(found) == decoders
    assert set(presets.names()) - set(decoders) == {"expert_choice", "soft_moe"}
    assert systems_record["settings"]["seeds"] == [0, 1, 2]
    worst = max(run["validation_loss"] for runs in found.values() for run in runs)
    assert worst < systems_record["references"]["2-gram"]
    assert says("Every system ends below the 2-gram line with every seed.")
    even = {
        name
        for name, runs in found.items()
        if min(min(run["effective_experts"]) for run in runs) > (1.0 - 1e-9) * experts[name]
    }
    assert even == names_in("The load is even by construction", "Elsewhere")
    dropping = {name for name, runs in found.items() if any(r["drop_rate"] for r in runs)}
    assert dropping == names_in("Choices are dropped where", ". ")


def test_the_shakespeare_runs_were_trained_as_the_text_says():
    for name in SHAKESPEARE:
        run = record(f"shakespeare_{name}")
        cfg, training = run["config"], run["training"]
        sizes = [cfg[key] for key in ("layers", "heads", "width", "context")]
        numbers = [*sizes, training["batch"], training["steps"]]
        told = "{} layers, {} heads, width {}, context {}, batch {}, {} steps".format(*numbers)
        assert says(told)
        flags = "--layers {} --heads {} --width {} --context {} --batch {} --steps {}"
        assert says(f"`{flags.format(*numbers)}`")
        assert run["corpus"]["train"] + run["corpus"]["validation"] == 1_115_394


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "figures").glob("*.png")])
def test_every_figure_has_its_record(name):
    path = ROOT / "figures" / f"{name}.json"
    assert plots.draw(files.read_json(path)).axes


def test_quick_start_is_two_commands_of_one_line():
    quick = README.split("## Quick start")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", quick, flags=re.S)
    assert [len(block.strip().splitlines()) for block in blocks] == [1, 1]
    assert "collapse" in blocks[0] and "pytest" in blocks[1]


def test_the_example_runs():
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == example.rpartition("# ")[2].strip()


@pytest.fixture(scope="module")
def speed():
    return record("speed"), record("speed_xeon")


def ratios(found, kind):
    rows = [row for row in found["rows"] if row["row"] == kind]
    return {row["name"]: [side["ratio"] for side in row["sides"][1:]] for row in rows}


def test_the_speed_tables_are_those_of_the_records(speed):
    assert bench_report.summary(*speed) in README
    assert bench_report.layer_summary(*speed) in README
    effective = []
    for found in speed:
        assert not found["quick"]
        peaks = [[s["peak"] for s in row["sides"]] for row in found["rows"] if row["row"] == "step"]
        assert len(peaks) == 3 and all(0.25 < p[0] / min(p[1:]) < 0.4 for p in peaks)
        assert says("Training needs a quarter to two fifths of what PyTorch needs")
        rows = [row for row in found["rows"] if row["row"] in ("step", "generation")]
        assert {row["rounds"] for row in rows} == {7}
        assert {row["processes"] for row in rows[:3]} == {found["threads"]} == {2}
        effective += [row["effective_experts"] for row in rows[1:3]]
    steps = [row for row in speed[0]["rows"] if row["row"] == "step"]
    built = [[round(side["built"] / 2**20) for side in row["sides"]] for row in steps]
    theirs, ours = ([f(sizes) for sizes in built] for f in (lambda s: min(s[1:]), lambda s: s[0]))
    told = "{}, {} and {} MiB, ours {}, {} and {} MiB".format(*theirs, *ours)
    assert says(told)
    assert says(f"{np.min(effective):.1f} to {np.max(effective):.1f} effective experts of 8")


def test_the_lead_on_the_first_processor_is_that_of_its_library_as_the_text_says(speed):
    found, _ = speed
    assert "AMD" in found["machine"]["cpu"]
    [[product]] = ratios(found, "product").values()
    assert product["low"] < 2 < product["median"]
    assert says("(OpenBLAS) is, by its median, more than twice as fast there")
    assert says("On the AMD processor we are faster in every round.")
    for kind in ("product", "step", "generation"):
        assert all(r["low"] > 1 for rivals in ratios(found, kind).values() for r in rivals), kind
    eager, _ = ratios(found, "step")["dense"]
    assert 1 < eager["low"] and eager["high"] < product["median"]
    assert set(kinds_of_layers(found).values()) == {"faster"}
    missed = [v for v in found["verdicts"] if not v["met"]]
    assert [verdict["wanted"].partition(":")[0] for verdict in missed] == [
        "layer of 128 experts against the best",
        "generation against Transformers generate",
        "MoE step over its matrix products alone",
        "Mixtral step over its matrix products alone",
        "MoE step over its products, kernels for AVX2",
    ]
    assert says(
        "The AMD record misses five: that a layer of 128 experts is 2.2 times as fast as the "
        "fastest alternative (the layer of 1,024 is, by its median), that generation is eight "
        "times as fast as Transformers (it is if that runs its experts eagerly, not with grouped "
        "products), that the MoE and Mixtral steps take at most 1.6 times as long as their "
        "products, and by a hair the same of the MoE step with kernels for AVX2."
    )
    rows = [row for row in found["rows"] if row["row"] == "layer" and row["top_k"] == 2]
    [many] = [row for row in rows if (row["hidden"], row["experts"]) == (512, 1024)]
    closest = bench_report._closest(many)["ratio"]
    assert closest["low"] < 2.2 < closest["median"]
    [(eager, grouped)] = ratios(found, "generation").values()
    assert grouped["median"] < 8 < eager["low"]
    steps = [row for row in found["rows"] if row["row"] == "step"]
    for kernels in ("products", "narrow"):
        times = [bench_report._spread(row[kernels]["step_over_products"]) for row in steps]
        assert says("take {}, {} and {} times as long".format(*times))
    assert min(row["products"]["step_over_products"]["low"] for row in steps) < 1
    assert 1.6 < steps[1]["narrow"]["step_over_products"]["median"] < 1.605
    [(_, most)] = ratios(found, "growth").values()
    told = bench_report._spread(most).replace(" ", "-fold ", 1)
    assert says(
        f"From 8 to 1,024 small experts the cost of a layer grows {told} for the same 4,096 tokens"
    )
    shared_out = {
        (row["hidden"], row["experts"])
        for row in found["rows"]
        if row["row"] == "layer" and row["top_k"] == 2 and row["processes"] > 1
    }
    assert shared_out == {(512, 32), (512, 128), (512, 1024)}


def test_what_is_faster_on_the_second_processor_is_told_as_its_record_has_it(speed):
    _, found = speed
    assert "Intel" in found["machine"]["cpu"] and not ratios(found, "product")
    steps = ratios(found, "step")
    dense, fused = steps["dense"]
    assert 0.95 < dense["median"] < 1.1 and fused["high"] < 1
    loop, in_order, batched, fused_1, fused_2 = steps["MoE"]
    assert loop["low"] > 1
    assert all(r["low"] < 1 < r["high"] for r in (in_order, batched, fused_1, fused_2))
    [written] = ratios(found, "generation").values()
    assert all(ratio["low"] > 1 for ratio in steps["Mixtral"] + written)
    assert 1.05 < steps["Mixtral"][1]["median"] < 1.2
    assert says(
        "the dense step is about as fast as PyTorch's and slower than with the fused AdamW; the "
        "MoE step is faster than the textbook loop and otherwise level (spreads that include 1); "
        "the Mixtral step and generation are faster than all their rivals."
    )
    assert says(
        "The Intel record misses the leads that were wanted of the dense step, the MoE step and "
        "the layers of 8 and 128 experts, and the bound on the MoE and Mixtral steps over their"
    )
    missed = [v["wanted"].partition(":")[0] for v in found["verdicts"] if not v["met"]]
    assert missed == [
        "dense step against PyTorch eager",
        "MoE step against the textbook loop",
        "MoE step against the best of sorted and batched",
        "layer of 8 experts against the best",
        "layer of 128 experts against the best",
        "MoE step over its matrix products alone",
        "Mixtral step over its matrix products alone",
    ]


def kinds_of_layers(found):
    kinds = {}
    for row in found["rows"]:
        if row["row"] == "layer" and row["top_k"] == 2:
            worst = min((side["ratio"] for side in row["sides"][1:]), key=lambda r: r["median"])
            kind = "slower" if worst["high"] < 1 else "faster" if worst["low"] > 1 else "alike"
            kinds[row["hidden"], row["experts"]] = kind
    return kinds


def test_where_a_layer_is_faster_is_told_as_the_record_has_it(speed):
    kinds = kinds_of_layers(speed[1])

    def those(kind, hidden):
        return " and ".join(f"{E:,}" for (h, E), k in kinds.items() if (h, k) == (hidden, kind))

    assert says(
        f"ours is faster with {those('faster', 512)} wide experts (hidden 512) and with "
        f"{those('faster', 64)} small ones, slower with {those('slower', 512)} wide ones, and "
        "undecided in the other three rows."
    )
    assert not those("slower", 64) and [*kinds.values()].count("alike") == 3


def test_the_steps_that_count_are_those_that_the_text_names():
    *rows, layer, narrow, update, text = record("speed_steps")["rows"]
    sure = {
        row["name"]: {step for step in row["steps"] if bench_report.gain(row, step)["low"] > 1}
        for row in rows
    }
    everywhere = {"float32", "shards", "processes"}
    assert set.intersection(*sure.values()) == everywhere
    assert sure["MoE"] & sure["Mixtral"] == everywhere | {"slices", "gather"}
    assert says(
        "float32 and a split of the batch into shards, one for each core, in a process each, are "
        "sure gains in all three models; with experts, so are slices of rows that are sorted by "
        "expert (no padding) and a look-up on the way back."
    )
    assert (layer["name"][:5], text["name"]) == ("layer", "generation")
    lows = {step: bench_report.gain(layer, step)["low"] for step in layer["steps"]}
    named = {"experts", "parallel", "slices", "memory", "few", "gather", "activations"}
    assert lows.keys() == named and min(lows.values()) > 1
    assert says(
        "In a layer with many experts, every optimization that was measured there is one: sharing "
        "the experts out, by processes and not threads, slices, keeping memory, narrow parts for "
        "few rows, the look-up, and activations in blocks."
    )
    few = bench_report.gain(narrow, "few")
    assert narrow["name"].endswith("kernels for AVX2") and few["median"] < 1
    assert says("With kernels for AVX2 the narrow parts do not help.")
    assert bench_report.gain(update, "idle")["low"] > 1
    lows = {step: bench_report.gain(text, step)["low"] for step in text["steps"]}
    assert {step for step, low in lows.items() if low > 1.1} == {"keys", "alone"}
