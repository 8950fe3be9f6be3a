"""The measures of routing by hand, what collapse means, and figures that can be read."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from moe_numpy.config import Capacity, LearnedNoise
from moe_numpy.lab import collapse, metrics, plots, pool, records
from moe_numpy.training import loop, ngram

HALF = [0.5, 0.25, 0.125, 0.125]  # entropy 1.75 bits


# -------------------------------------------------------------------------------------- measures
@pytest.mark.parametrize(
    ("load", "effective", "peak", "spread"),
    [
        ([5, 5, 5, 5], 4, 1, 0),
        ([0, 9, 0, 0], 1, 4, math.sqrt(3)),
        ([0, 3, 3, 0], 2, 2, 1),
        ([8, 4, 2, 2], 2**1.75, 2, math.sqrt(6) / 4),
        ([0, 0, 0, 0], 4, 1, 0),
        ([7], 1, 1, 0),
    ],
)
def test_the_measures_of_a_load_are_those_computed_by_hand(load, effective, peak, spread):
    assert metrics.effective_experts(load) == pytest.approx(effective, rel=1e-12)
    assert metrics.max_over_mean(load) == pytest.approx(peak)
    assert metrics.coefficient_of_variation(load) == pytest.approx(spread, abs=1e-15)


def test_shares_sum_to_one_and_are_equal_where_there_was_no_load():
    np.testing.assert_array_equal(metrics.share([8, 4, 2, 2]), HALF)
    np.testing.assert_array_equal(metrics.share([[0, 0], [1, 3]]), [[0.5, 0.5], [0.25, 0.75]])
    assert metrics.share(np.array([2**62, 2**62])).tolist() == [0.5, 0.5]


def test_measures_work_on_the_last_axis_and_do_not_depend_on_scale_or_order():
    load = np.random.default_rng(0).integers(0, 9, (3, 2, 5))
    for measure in (
        metrics.effective_experts,
        metrics.dead_experts,
        metrics.max_over_mean,
        metrics.coefficient_of_variation,
    ):
        found = measure(load)
        assert found.shape == (3, 2)
        np.testing.assert_allclose(found, [[measure(row) for row in rows] for rows in load])
        np.testing.assert_allclose(found, measure(load[..., ::-1] * 10))


def test_an_expert_is_dead_strictly_below_the_threshold():
    assert metrics.dead_experts([1, 99]) == 0
    assert metrics.dead_experts([1, 100]) == 1
    assert metrics.dead_experts([0, 0, 0, 7]) == 3
    assert metrics.dead_experts([0, 0, 0, 0]) == 0
    assert metrics.dead_experts([1, 3, 4], threshold=0.2) == 1


# ---------------------------------------------------------------------------- what collapse means
def finished(load, dropped, clean, steps=20):
    """Make up a finished run of one layer with four experts, whose last tenth is two steps."""
    cfg, training = tiny.model(tiny.moe(), layers=1), tiny.training(steps=steps)
    run = loop.new_run(tiny.corpus(), cfg, training)
    series = run.series._replace(
        **{name: np.ones_like(getattr(run.series, name)) for name in ("decisiveness", "entropy")}
    )
    series.cross_entropy[:] = 1.0
    series.load[:] = [[[100, 0, 0, 0]]]
    series.load[-2:] = load
    series.wished[:] = 1
    series.dropped[-2:] = dropped
    run.series, run.step = series, steps
    series.decisiveness[-2:] = [[0.25], [0.75]]
    run.evaluations = [
        {"step": 10, "loss": 9.0, "wished": [[1, 1, 1, 1]], "decisiveness": [0.9]},
        {"step": steps, "loss": 2.5, "wished": [clean], "decisiveness": [0.3]},
    ]
    return collapse.measure(run)


def test_a_run_is_measured_over_its_last_tenth_and_its_last_evaluation():
    found = finished([[[8, 2, 0, 2]], [[8, 6, 4, 2]]], [[3], [5]], [0, 3, 3, 0])
    assert found["share"] == [[0.5, 0.25, 0.125, 0.125]]
    assert found["effective_experts"] == pytest.approx([2**1.75])
    assert found["effective_experts_clean"] == pytest.approx([2.0])
    assert found["dead_experts"] == [0] and found["dead_experts_clean"] == [2]
    assert found["max_over_mean"] == [2.0]
    assert found["drop_rate"] == pytest.approx(8 / 40)
    assert found["decisiveness"] == [0.5] and found["decisiveness_clean"] == [0.3]
    assert found["validation_loss"] == 2.5 and found["seed"] == 5
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("load", "collapsed"),
    [([1, 1, 0, 0], False), ([2, 1, 0, 0], True), ([100, 1, 0, 0], True), ([1, 1, 1, 1], False)],
)
def test_a_layer_has_collapsed_below_half_of_its_experts_by_the_load_not_the_clean_choice(
    load, collapsed
):
    for clean in ([1, 1, 1, 1], [1, 0, 0, 0]):
        assert finished([[load], [load]], 0, clean)["collapsed"] == [collapsed]


def test_the_definition_says_the_numbers_that_are_used():
    text = collapse.Study(num_experts=6).definition
    assert "last 10% of the steps" in text and "half of its 6 experts" in text
    assert "below 1%" in text
    committed = Path(__file__).parent.parent / "figures/collapse.json"
    assert json.loads(committed.read_text("utf-8"))["definition"] == collapse.Study().definition


def test_the_conditions_differ_from_no_cure_by_what_they_are_named_after():
    conditions = collapse.Study().conditions()
    bare = conditions["no cure"]
    assert (bare.noise, bare.capacity, bare.balance) == (None, None, ())
    for name, cfg in conditions.items():
        assert isinstance(cfg.noise, LearnedNoise) == ("noise" in name)
        assert (cfg.capacity is not None) == ("capacity" in name)
        assert bool(cfg.balance) == ("Switch" in name)
        assert dataclasses.replace(cfg, noise=None, capacity=None, balance=()) == bare


def test_a_study_warms_up_for_a_tenth_of_a_run_at_most_and_ends_at_a_tenth_of_its_rate():
    study = collapse.Study(steps=500, rate=2e-3, batch=5)
    training = study.training(seed=7)
    assert (training.steps, training.batch, training.seed) == (500, 5, 7)
    assert (training.rate, training.final_rate) == (2e-3, pytest.approx(2e-4))
    assert (training.warmup, collapse.Study(steps=70).training(0).warmup) == (20, 7)


SMALL = collapse.Study(
    num_experts=3, hidden=4, layers=2, width=8, heads=2, context=8, batch=2, steps=4, seeds=(0, 7)
)


def test_every_condition_has_the_runs_of_all_seeds_in_their_order(monkeypatch):
    def told(title, work, jobs, *_):
        return {job: (job[1], job[2]) for job in reversed(jobs)}

    monkeypatch.setattr(pool, "run_all", told)
    monkeypatch.setattr(ngram, "reference_losses", lambda *_: {})
    found = collapse.run_study(SMALL, show_progress=False)["conditions"]
    assert [c["runs"] for c in found] == [[(n, 0), (n, 7)] for n in SMALL.conditions()]


@pytest.fixture(scope="module")
def record():
    conditions = []
    for name, moe in SMALL.conditions().items():
        runs = []
        for seed in SMALL.seeds:
            run = loop.new_run(
                tiny.corpus(), SMALL.model(moe, tiny.corpus().vocab_size), SMALL.training(seed)
            )
            loop.train(run, show_progress=False)
            runs.append(collapse.measure(run))
        conditions.append({"name": name, "runs": runs})
    lines = {"uniform": 2.7, "unigram": 2.4, "2-gram": 1.2} | dict.fromkeys(plots.NGRAMS[2:], 0.6)
    return {
        "study": "collapse",
        "definition": SMALL.definition,
        "num_experts": 3,
        "settings": dataclasses.asdict(SMALL),
        "references": lines,
        "conditions": conditions,
    }


def test_every_condition_of_a_seed_starts_from_the_same_loss_and_seeds_differ(record):
    first = [[run["series"]["training_loss"][0] for run in c["runs"]] for c in record["conditions"]]
    clean = [losses for losses, c in zip(first, record["conditions"], strict=True)]
    bare, switch = clean[0], clean[-1]
    assert bare == switch and bare[0] != bare[1]


def test_the_table_has_a_line_for_every_condition_and_counts_the_collapsed(record):
    lines = collapse.table(record).splitlines()
    assert len(lines) == 1 + len(record["conditions"])
    for line, condition in zip(lines[1:], record["conditions"], strict=True):
        collapsed = sum(sum(run["collapsed"]) for run in condition["runs"])
        assert line.startswith(condition["name"]) and line.endswith(f"{collapsed} of 4")
        mean = np.mean([run["effective_experts"] for run in condition["runs"]])
        assert f"{mean:.1f} of 3" in line


# ----------------------------------------------------------------------------------------- series
def test_the_series_of_a_record_average_equal_stretches():
    run = tiny.trained(tiny.moe(capacity=Capacity(factor=0.5)), steps=100, rate=1e-3)
    series = records.series(run)
    assert series["step"] == list(range(2, 101, 2))
    loss = run.series.cross_entropy.reshape(50, 2).mean(1)
    np.testing.assert_allclose(series["training_loss"], loss, atol=6e-5)
    share = run.series.load.reshape(50, 2, 2, 4).sum(1)
    np.testing.assert_allclose(series["share"], share / share.sum(-1, keepdims=True), atol=6e-5)
    dropped = run.series.dropped.reshape(50, 2, 2).sum(1) / (2 * 64 * 2)
    np.testing.assert_allclose(series["drop_rate"], dropped, atol=6e-5)
    assert np.min(series["drop_rate"]) >= 0.49


def test_the_series_of_a_stopped_run_ends_where_it_was_stopped():
    run = tiny.run(tiny.moe(), steps=10)
    for _ in range(3):
        loop.take_step(run)
    series = records.series(run)
    assert series["step"] == [1, 2, 3] and np.shape(series["share"]) == (3, 2, 4)
    assert series["training_loss"] == np.round(run.series.cross_entropy[:3], 4).tolist()


def test_a_short_run_has_a_stretch_for_every_step_and_a_dense_one_no_load():
    assert records.series(tiny.trained(steps=3)).keys() == {"step", "training_loss"}
    assert records.series(tiny.trained(steps=3))["step"] == [1, 2, 3]


# ----------------------------------------------------------------------------------------- figures
def readable(figure):
    """Every axes has a title and a named y; the lowest of a column names the x of them all."""
    figure.draw_without_rendering()
    lowest = {}
    for ax in figure.axes:
        assert ax.get_title() and ax.get_ylabel()
        lowest[ax.get_subplotspec().colspan.start] = ax
    for ax in lowest.values():
        ticks = [label.get_text() for label in ax.get_xticklabels()]
        assert ax.get_xlabel() or "no cure" in ticks, ax.get_title()
    return bool(lowest)


def training_record(**changes):
    run = tiny.trained(changes.pop("moe", tiny.moe()), **changes)
    lines = {"uniform": 2.7, "unigram": 2.4, "2-gram": 1.2} | dict.fromkeys(plots.NGRAMS[2:], 0.6)
    return records.training_record(run, lines)


@pytest.mark.parametrize("changes", [{}, {"moe": None}, {"steps": 1}, {"steps": 2}], ids=str)
def test_the_figure_of_a_training_can_be_read(changes, tmp_path):
    record = training_record(**changes)
    figure = plots.draw(json.loads(json.dumps(record)))
    assert len(figure.axes) == (1 if "moe" in changes else 3)
    plots.save(figure, tmp_path / "a.png")
    plots.save(plots.draw(record), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert readable(figure)
    assert "nats" in figure.axes[0].get_ylabel()


def test_the_figure_of_the_collapse_study_can_be_read(record, tmp_path):
    figure = plots.draw(json.loads(json.dumps(record)))
    assert len(figure.axes) == 4 and readable(figure)
    assert SMALL.definition in figure.get_supxlabel() and "0, 7" in figure.get_supxlabel()
    assert "2-gram 1.20" in [text.get_text() for text in figure.axes[3].texts]
    plots.save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_every_seed_and_layer_has_a_dot_in_the_right_place(record, tmp_path):
    ax = plots.draw(record).axes[2]
    dots = np.concatenate([c.get_offsets() for c in ax.collections if len(c.get_offsets())])
    drawn = sorted(np.round(np.asarray(dots)[:, 1], 9).tolist())
    keys = ("effective_experts", "effective_experts_clean")
    runs = [run for condition in record["conditions"] for run in condition["runs"]]
    assert drawn == sorted(round(v, 9) for run in runs for key in keys for v in run[key])


def test_a_river_fills_the_axes_from_zero_to_one():
    ax = plots.Figure().subplots()
    plots.plot_river(ax, [1, 2, 3], [[0.5, 0.5], [0.2, 0.8], [1, 0]], "title")
    assert ax.get_ylim() == (0, 1) and ax.get_xlim() == (1, 3)
    top = ax.collections[-1].get_paths()[0].vertices
    assert top[:, 1].max() == 1.0 and len(ax.collections) == 2


def test_reference_lines_outside_of_the_axes_are_left_out():
    ax = plots.Figure().subplots()
    ax.set_ylim(1, 2)
    plots.draw_references(ax, {"uniform": 4.5, **dict.fromkeys(plots.NGRAMS, 1.5)})
    assert {text.get_text() for text in ax.texts} == {f"{name} 1.50" for name in plots.NGRAMS}


def test_a_record_of_no_known_study_is_refused_by_name(tmp_path):
    for record in ({"study": "mine"}, {}, [], None):
        with pytest.raises(ValueError, match=r"mine\.json must be the record of a study \(coll"):
            plots.require_study(record, tmp_path / "mine.json")


def test_the_figures_leave_no_trace_in_pyplot():
    code = (
        "import sys, moe_numpy.lab.plots as p; p.training_figure; "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    root = str(Path(__file__).parent.parent)
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
