"""The settings study of chapter 07, its pictures, and the checks of its exercises."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from moe_numpy import tree
from moe_numpy.classroom import exercises_07 as exercises
from moe_numpy.lab import collapse_pictures as pictures
from moe_numpy.lab import metrics, plots, rich_get_richer
from moe_numpy.moe import layer
from moe_numpy.ops import softmax
from moe_numpy.training import clusters, optimizer

FIGURES = Path(__file__).parent.parent / "figures"
STUDY = rich_get_richer.Study(batch=32, steps=12, test_tokens=50, seeds=(0, 1))


@pytest.fixture(scope="module")
def record():
    return rich_get_richer.run_settings(STUDY, show_progress=False)


def result(name, task="one job", steps=12):
    return rich_get_richer.follow(STUDY.settings()[name], task, 3, steps, study=STUDY)


# --------------------------------------------------------------------------------------- the study
@pytest.mark.parametrize("name", STUDY.settings())
def test_a_trace_counts_every_choice_and_its_shares_sum_to_one(name):
    trace = result(name).trace
    np.testing.assert_allclose(trace.share.sum(1), 1, rtol=1e-12)
    k = STUDY.settings()[name].top_k
    assert (trace.load.sum(1) == STUDY.batch * k).all()


def test_an_expert_without_tokens_has_no_gradient_and_no_loss():
    trace = result("top-1 raw").trace
    idle = trace.load == 0
    assert idle.any() and not idle.all()
    assert (trace.gradient_norm[idle] == 0).all() and (trace.gradient_norm[~idle] > 0).all()
    assert np.isnan(trace.loss[idle]).all() and np.isnan(trace.pull[idle]).all()
    assert ((trace.pull[~idle] >= 0) & (trace.pull[~idle] <= 1)).all()


def test_the_losses_of_the_experts_average_to_the_loss_of_the_batch():
    one, many = result("one expert", steps=1).trace, result("top-1 raw", steps=1).trace
    assert one.loss.shape == (1, 1)
    mean = np.nansum(many.loss * many.share)
    assert mean == pytest.approx(one.loss[0, 0], rel=0.2)  # both have hardly an output yet
    assert mean == pytest.approx(1, rel=0.3)  # so it is the variance of the targets


def test_a_trace_tells_the_gradient_of_all_weights_and_who_would_gain_by_a_larger_gate(monkeypatch):
    seen = {}

    def note(module, name):
        whole = getattr(module, name)

        def noting(*given):
            found = whole(*given)
            seen.setdefault(name, (given, found))
            return found

        monkeypatch.setattr(module, name, noting)

    note(layer, "moe_forward")
    note(clusters, "sample_clusters")
    note(optimizer, "update")
    trace = result("one expert", steps=1).trace
    y_NC, target_NC = seen["moe_forward"][1][0], seen["sample_clusters"][1][1]
    gradients = tree.leaves(seen["update"][0][1].experts)
    assert trace.gradient_norm == pytest.approx(math.sqrt(sum((g**2).sum() for g in gradients)))
    gains_N = ((y_NC - target_NC) * y_NC).sum(1) < 0  # the gate of a lone expert is 1
    assert trace.pull.item() == gains_N.mean() != 0.5
    assert trace.loss == pytest.approx(((y_NC - target_NC) ** 2).mean())


def test_new_tokens_meet_no_limit(monkeypatch):
    reports, whole = [], layer.moe_forward
    note = lambda *given: reports.append(whole(*given)) or reports[-1]  # noqa: E731
    monkeypatch.setattr(layer, "moe_forward", note)
    found = result("raw + capacity")
    report = reports[-1][2]
    assert report.load_E.tolist() == found.wished.tolist()
    assert found.wished.max() > 1.25 * STUDY.test_tokens / STUDY.num_experts


def test_a_run_is_measured_over_its_last_tenth_and_its_clean_choice():
    load = np.repeat([[8, 0, 0, 0], [3, 1, 2, 2]], [18, 2], 0)
    trace = rich_get_richer.Trace(load, *[np.zeros((20, 4))] * 3, np.zeros(20))
    done = rich_get_richer.Result(trace, None, np.array([5, 5, 0, 0]), 0.6, None, 0.3, 0.9)
    found = rich_get_richer.measure(done, 7)
    assert (found["share"], found["share_clean"]) == (
        [[0.375, 0.125, 0.25, 0.25]],
        [[0.5, 0.5, 0, 0]],
    )
    assert found["collapsed"] == [False] and found["effective_experts_clean"] == [pytest.approx(2)]
    assert (found["dead_experts"], found["dead_experts_clean"]) == ([0], [2])
    assert found["seed"] == 7 and found["validation_loss"] == 0.9
    assert (found["decisiveness_clean"], found["information_clean"]) == ([0.6], [0.3])


def test_a_run_is_the_same_twice_and_its_start_does_not_depend_on_its_length():
    long, short = result("raw + noise").trace, result("raw + noise", steps=5).trace
    for a, b in zip(long, short, strict=True):
        np.testing.assert_array_equal(a[:5], b)


def test_a_renormalized_top_1_router_learns_nothing():
    before, after = (result("top-1 renorm.", steps=n).params.router.w_CE for n in (1, 12))
    np.testing.assert_array_equal(before, after)
    assert (result("top-1 raw").params.router.w_CE != before).any()


def test_mutual_information_goes_from_zero_to_the_logarithm_of_the_rows():
    assert rich_get_richer.mutual_information(np.ones((4, 3))) == pytest.approx(0, abs=1e-12)
    assert rich_get_richer.mutual_information(np.eye(4)) == pytest.approx(math.log(4))


def test_the_record_is_plain_json_with_right_metrics(record):
    json.dumps(record, allow_nan=False)
    assert len(record["conditions"]) == len(STUDY.tasks()) * len(STUDY.settings())
    for condition in record["conditions"]:
        E = condition["config"]["num_experts"]
        assert [run["seed"] for run in condition["runs"]] == list(STUDY.seeds)
        for run in condition["runs"]:
            assert sum(run["share"][0]) == pytest.approx(1, abs=1e-3)
            (effective,) = run["effective_experts"]
            assert 1 - 1e-9 <= effective <= E + 1e-9
            assert run["collapsed"] == [effective < E / 2]
            about = metrics.effective_experts(run["share"][0])
            assert effective == pytest.approx(float(about), rel=1e-2)
            assert 1 / E <= run["decisiveness_clean"][0] <= 1 + 1e-6


def test_the_first_steps_are_those_of_the_recorded_runs(record):
    early, collapsed = rich_get_richer.first_steps(record, "top-1 raw", steps=4)
    assert len(early) == len(collapsed) == len(STUDY.tasks()) * len(STUDY.seeds)
    expected = rich_get_richer.follow(STUDY.settings()["top-1 raw"], "one job", 0, 4, study=STUDY)
    np.testing.assert_array_equal(early[0], expected.trace.share)


def test_the_committed_record_is_that_of_the_study_as_it_stands():
    committed = json.loads((FIGURES / "collapse_settings.json").read_text("utf-8"))
    study = rich_get_richer.Study()
    assert committed["definition"] == study.definition and committed["tasks"] == study.tasks()
    assert committed["settings"]["steps"] == study.steps and len(study.seeds) >= 5
    names = [c["name"] for c in committed["conditions"]]
    assert names == [*study.settings()] * len(study.tasks())


def test_the_table_and_the_comparison_name_what_they_show(record):
    text = rich_get_richer.table(record)
    assert all(name in text for name in (*STUDY.settings(), *STUDY.tasks()))
    part = rich_get_richer.of_task(record, "one job")
    assert "+0.000" in rich_get_richer.compare(part, "top-2", "top-2")


def test_losses_are_compared_seed_by_seed_and_their_spread_is_that_of_the_seeds_there_are():
    common = {key: [1] for key in ("effective_experts", "dead_experts", "decisiveness_clean")}
    common |= {"collapsed": [False]}
    conditions = [
        {"name": name, "task": "t", "config": {"num_experts": 1}, "runs": runs}
        for name, losses in (("a", (1.0, 3.0, 5.0)), ("b", (2.0, 2.0, 3.0)))
        for runs in [[common | {"validation_loss": loss} for loss in losses]]
    ]
    record = {"tasks": ["t"], "conditions": conditions}
    assert "3.000 +- 1.633" in rich_get_richer.table(record)
    found = rich_get_richer.compare(record, "a", "b")
    assert "+0.667" in found and "higher in 2 of 3" in found


# ------------------------------------------------------------------------------------- the pictures
def axes_of(figure):
    return [ax for ax in figure.axes if ax.has_data()]


def test_every_picture_labels_its_axes(record):
    figure = Figure()
    axes = figure.subplots(3, 3).reshape(-1)
    trace, part = result("top-1 raw").trace, rich_get_richer.of_task(record, "one job")
    run = part["conditions"][0]["runs"][0]
    assert pictures.plot_push(axes[0]) is axes[0]
    assert pictures.plot_effective_of_shares(axes[1], 8) is axes[1]
    pictures.plot_rich_get_richer(axes[3:6], trace, "title")
    assert pictures.plot_effective_seeds(axes[6], part, "title") is axes[6]
    assert pictures.plot_plane(axes[7], part, "title") is axes[7]
    assert pictures.plot_load_beside_choice(axes[8], run, "title") is axes[8]
    for ax in axes_of(figure):
        assert ax.get_xlabel() and ax.get_ylabel()


def test_the_figure_of_the_record_is_drawn_by_name(record):
    figure = plots.draw(record)
    assert len(axes_of(figure)) == 6
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in axes_of(figure))


def test_the_animation_is_a_png_with_a_frame_for_every_step_and_the_same_twice():
    share = result("top-1 raw").trace.share
    film = pictures.animate_shares(share, [0, 4, 11], "title")
    image = Image.open(io.BytesIO(film))
    assert image.format == "PNG" and image.is_animated and len(film) < 60_000
    assert film == pictures.animate_shares(share, [0, 4, 11], "title")


def test_the_controls_differ_from_their_tasks_in_the_common_direction_alone():
    study = rich_get_richer.Study()
    tasks, controls = study.tasks(), study.controls()
    sizes = {"width_in": 16, "width_out": 16}
    for name, control in (("one job", "one job, centered"), ("eight jobs", "eight jobs, shifted")):
        task = clusters.cluster_task(3, **sizes, **tasks[name])
        other = clusters.cluster_task(3, **sizes, **controls[control])
        assert task.spread == other.spread
        for part in ("w_in_ECF", "b_in_EF", "w_out_EFO", "b_out_EO"):
            assert (getattr(task, part) == getattr(other, part)).all()
        moved_EC = other.center_EC - task.center_EC
        assert moved_EC.any() and np.allclose(moved_EC, moved_EC[0], rtol=0, atol=1e-12)
    assert not clusters.cluster_task(3, **sizes, **controls["one job, centered"]).center_EC.any()


def test_the_controls_of_length_have_the_directions_of_their_task_and_the_length_of_the_other():
    study = rich_get_richer.Study()
    tasks, controls = study.tasks(), study.controls()
    for name, same_length, scaled in (
        ("one job", "one job, centered", "one job, shorter"),
        ("eight jobs", "eight jobs, shifted", "eight jobs, longer"),
    ):
        x_NC, y_NO = drawn(tasks[name])
        longer_NC, same_NO = drawn(controls[scaled])
        wanted_NC, _ = drawn(controls[same_length])
        factor = np.sqrt((wanted_NC**2).mean() / (x_NC**2).mean())
        assert abs(factor - 1) > 0.2
        assert np.allclose(longer_NC, factor * x_NC, rtol=0.05, atol=1e-6)
        assert np.allclose(same_NO, y_NO, rtol=0, atol=1e-9)


def drawn(task):
    """Draw tokens of 200 tasks of a kind, so that random centers differ little in size."""
    found = []
    for seed in range(200):
        jobs = clusters.cluster_task(seed, width_in=16, width_out=16, **task)
        found.append(clusters.sample_clusters(seed, jobs, 50, np.float64)[:2])
    x, y = zip(*found, strict=True)
    return np.concatenate(x), np.concatenate(y)


@pytest.mark.parametrize("knobs", [{"center_scale": -1.0}, {"shift": np.inf}, {"shift": np.nan}])
def test_a_center_that_is_nowhere_is_refused(knobs):
    with pytest.raises(ValueError, match=f"cluster_task: {next(iter(knobs))} must not be negative"):
        clusters.cluster_task(0, **knobs)


# --------------------------------------------------------------------------------------- the checks
def effective(load_E, log=math.log, sign=-1, last=math.exp, skip=True, shares=True):
    total = sum(load_E) if shares else 1
    terms = [c / total * log(c / total) for c in load_E if c > 0 or not skip]
    return last(sign * sum(terms))


def above(least, load_E):
    """Leave out the experts with a smaller share than `least`."""
    total = sum(load_E)
    return math.exp(-sum(c / total * math.log(c / total) for c in load_E if c >= least * total > 0))


def part(load_E, experts):
    total = sum(load_E)
    return math.exp(-sum(c / total * math.log(c / total) for c in load_E[experts]))


def changing(solution):
    """Solve an exercise, but with its first argument spoiled on the way."""

    def spoiled(first, *others):
        found = solution(first.copy(), *others)
        first[0] = 1 - first[0]
        return found

    return spoiled


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (effective, "solved:"),
        (changing(effective), "the function changed its arguments; work on a copy, others still"),
        (lambda load: effective(load[:4]), "for the load [3, 0, 3, 0, 2] it must be"),
        (lambda load: round(effective(load), 4), "3.33606947, got 3.33610000. This is nearly"),
        (
            lambda load: effective(load, log=lambda p: math.log(p + 1e-6), skip=False),
            "must be 3.33606947, got 3.33605613. This is nearly right: was it rounded",
        ),
        (lambda load: np.complex128(effective(load)), "one number, got complex128"),
        (lambda load: [[1], [2, 3]], "one number, got list"),
        (metrics.effective_experts, "solved:"),
        (lambda load: effective(load, last=float), "take its exponential"),
        (lambda load: effective(load, sign=1), "a minus in front"),
        (lambda load: effective(load, log=math.log2), "one base"),
        (lambda load: effective(load, skip=False), "leave out the experts that got nothing"),
        (lambda load: effective(load, log=np.log, skip=False, last=np.exp), "leave out"),
        (
            lambda load: effective(load, last=lambda x: math.exp(min(x, 700)), shares=False),
            "counts",
        ),
        (lambda load: sum(c > 0 for c in load), "got anything at all"),
        (lambda load: sum(load) ** 2 / sum(c * c for c in load), "1 / sum of share^2"),
        (lambda load: above(0.01, load), "for the load [2000, 1, 15] it must be"),
        (lambda load: above(0.01, load), "Small shares count, too"),
        (lambda load: above(0.001, load), "Small shares count, too"),
        (lambda load: above(0.1, load), "for the load [2, 6, 1, 4] it must be"),
        (lambda load: part(load, slice(1)), "is `return` inside the loop?"),
        (lambda load: part(load, slice(-1, None)), "add up with `+=`"),
        (lambda load: part(load, slice(-1)), "The last expert was left out"),
        (lambda load: part(load, slice(1, None)), "The first expert was left out"),
        (lambda load: load / sum(load), "one number"),
        (lambda load: None, "return"),
        (lambda load: 1j, "one number, got complex"),
    ],
)
def test_the_first_check_names_the_mistake(answer, words):
    assert words in exercises.check_effective_experts(answer)


def without_minlength(prob_NE, expert_NK):
    share_E = np.bincount(expert_NK.ravel()) / expert_NK.size
    return np.tile(prob_NE.shape[1] * share_E / len(prob_NE), (len(prob_NE), 1))


def switch(prob_NE, expert_NK):
    N, E = prob_NE.shape
    f_E = np.bincount(expert_NK.reshape(-1), minlength=E) / expert_NK.size
    return np.tile(E * f_E / N, (N, 1))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (switch, "solved:"),
        (changing(switch), "the function changed its arguments; work on a copy, others still"),
        (without_minlength, "An expert that nobody chose has a column, too."),
        (lambda p, e: np.zeros_like(p) + without_minlength(p, e), "it stopped with ValueError"),
        (lambda p, e: switch(p, e) + 0j, "one array of numbers, got ndarray"),
        (lambda p, e: switch(p, e).round(3), "must be 0.3333333, got 0.333."),
        (lambda p, e: switch(p, e)[0], "the shape of prob"),
        (lambda p, e: switch(p, e) / p.shape[1], "factor E"),
        (lambda p, e: switch(p, e) * p.shape[0], "factor 1 / N"),
        (lambda p, e: switch(p, e) * e.shape[1], "N K choices"),
        (lambda p, e: -switch(p, e), "sign"),
        (lambda p, e: np.zeros_like(p), "all zeros. Did integers cut them off?"),
        (lambda p, e: switch(p, e) * (np.arange(p.shape[1]) == e[:, :1]), "only the chosen"),
        (lambda p, e: np.tile(p.shape[1] * p.mean(0) / len(p), (len(p), 1)), "where f belongs"),
        (lambda p, e: 2 * p, "must be"),
        (lambda p, e: switch(p, e).astype("float32"), "solved:"),
        (lambda p, e: (p, [1]), "one array of numbers, got tuple"),
        (lambda p, e: switch(p, e) * len(p) / p.shape[1], "two factors are missing"),
        (lambda p, e: switch(p, e) * (e.size if e.shape[1] > 1 else 1), "divide by N K"),
        (lambda p, e: switch(p, e[:, :1]), "all K choices of a token"),
        (lambda p, e: switch(p, np.argsort(-p, 1)[:, : e.shape[1]]), "count expert_NK"),
        (lambda p, e: softmax.softmax_backward(switch(p, e), (p,)), "gradient of the logits"),
    ],
)
def test_the_second_check_names_the_mistake(answer, words):
    assert words in exercises.check_switch_gradient(answer)


def alarm(share_SE):
    return bool(metrics.effective_experts(share_SE[-5:].mean(0)) < share_SE.shape[1] / 2)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (alarm, "solved:"),
        (lambda s: True, "always rings"),
        (lambda s: False, "never rings, whatever the run does. (A comparison with NaN"),
        (lambda s: alarm(s.reshape(20, 8)), "but with 16 experts it stopped with ValueError"),
        (lambda s: not alarm(s), "wrong way"),
        (lambda s: bool(metrics.effective_experts(s[-5:].mean(0)) < 4), "number of experts"),
        (lambda s: bool(metrics.effective_experts(s[-5:].sum(0)) < 4), "instead of adding them up"),
        (lambda s: bool(s[-1].max() > 0.5), "silent while 2 of 16 experts share all tokens"),
        (lambda s: bool(metrics.effective_experts(s[-1]) < 1.99), "silent while 2 of 16"),
        (lambda s: metrics.effective_experts(s).mean(), "True or False"),
        (lambda s: s[99].max() > 0.5, "IndexError"),
    ],
)
def test_the_third_check_names_the_mistake(answer, words):
    committed = json.loads((FIGURES / "collapse_settings.json").read_text("utf-8"))
    early, collapsed = rich_get_richer.first_steps(committed, "top-1 raw")
    assert words in exercises.check_alarm(answer, early, collapsed)


def test_what_chapter_07_says_of_one_job_holds_in_the_record():
    committed = json.loads((FIGURES / "collapse_settings.json").read_text("utf-8"))
    layers = rich_get_richer.Study().settings()
    part = rich_get_richer.of_task(committed, "one job")
    losses = {
        c["name"]: np.mean([run["validation_loss"] for run in c["runs"]])
        for c in part["conditions"]
    }
    of_one = [losses[name] for name in losses if name not in layers or layers[name].top_k == 1]
    assert len(of_one) == 7 and min(of_one) == losses["top-1 raw"]
    assert losses["top-2"] < losses["top-1 raw"] > losses["all experts"]


@pytest.mark.parametrize(
    "check",
    [
        exercises.check_effective_experts,
        exercises.check_switch_gradient,
        lambda answer: exercises.check_alarm(answer, [np.ones((20, 8)) / 8], [False]),
    ],
)
def test_an_unsolved_exercise_says_so(check):
    def starter(*_):
        raise NotImplementedError

    assert check(starter).startswith("not solved yet: ")


def test_the_balance_loss_moves_the_router():
    study = rich_get_richer.Study()
    plain, balanced = (
        rich_get_richer.follow(study.settings()[name], "eight jobs", 0, steps=3)
        for name in ("top-1 raw", "raw + Switch")
    )
    assert (plain.params.router.w_CE != balanced.params.router.w_CE).any()
