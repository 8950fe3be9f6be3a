"""The pictures of the records: what is drawn are the numbers of the record, each at its label."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from moe_numpy.lab import (
    bench_pictures,
    collapse_pictures,
    metrics,
    plots,
    rich_get_richer,
    systems_pictures,
)

MACHINE = {"cpu": "abacus", "cores": 2, "blas": "none", "versions": {"numpy": "2"}}
LINES = {"uniform": 4.0, **dict(zip(plots.NGRAMS, (3.0, 2.0, 1.0, 0.5, 0.4), strict=True))}


def drawn(picture, *given):
    return picture(Figure().subplots(), *given)


def dots(ax):
    """List the points of every scatter of an axes."""
    found = [np.asarray(c.get_offsets()) for c in ax.collections]
    return [points.round(9).tolist() for points in found if len(points)]


def bars(ax):
    """List where each bar of an axes lies: left, right and middle height."""
    places = [(b.get_x(), b.get_width(), b.get_y() + b.get_height() / 2) for b in ax.patches]
    return [pytest.approx((x, x + width, y)) for x, width, y in places]


def curve(line):
    return np.transpose(line.get_data()).tolist()


def segments(lines):
    return [segment.tolist() for segment in lines.get_segments()]


# --------------------------------------------------------------------------------------- the races
def side(name, median=None, ratio=None, **facts):
    ratio = ratio and dict(zip(("median", "low", "high"), ratio, strict=True))
    return {"name": name, "milliseconds": {"median": median}, "ratio": ratio, **facts}


def test_a_rival_is_drawn_at_its_ratio_with_its_spread_and_a_faster_one_in_another_color():
    sides = [side("we"), side("slow", ratio=(2.0, 1.5, 4.0)), side("fast", ratio=(0.5, 0.4, 0.8))]
    sides += [side("near", ratio=(0.9, 0.7, 1.1))]
    rows = [{"row": "step", "name": "dense", "sides": sides}]
    ax = drawn(bench_pictures.plot_ratios, {"threads": 2, "rows": rows})
    *dots, one = ax.lines
    assert [curve(dot) for dot in dots] == [[[2.0, 0]], [[0.5, 1]], [[0.9, 2]]]
    assert [dot.get_color() for dot in dots] == [plots.GOOD, plots.BAD, plots.NEUTRAL]
    spreads = [segments(c) for c in ax.collections]
    assert spreads == [[[[1.5, 0], [4.0, 0]]], [[[0.4, 1], [0.8, 1]]], [[[0.7, 2], [1.1, 2]]]]
    assert [*one.get_xdata()] == [1.0, 1.0]
    assert [tick.get_text()[-4:] for tick in ax.get_yticklabels()] == ["slow", "fast", "near"]


def test_each_side_of_a_layer_has_a_curve_of_its_own_times():
    common = {"row": "layer", "name": "wide", "hidden": 8, "tokens": 9}
    rows = [
        {"top_k": k, "experts": E, "rounds": 9 - E // 4 - k, **common}
        | {"sides": [side("we", k * E), side("they", 10 * k * E)]}
        for k in (2, 1)
        for E in (4, 16)
    ]
    for k, rounds in ((1, 4), (2, 3)):
        ax = drawn(bench_pictures.plot_experts, {"rows": rows}, "wide", k)
        ours, theirs = (curve(line) for line in ax.lines)
        assert ours == [[4, 4 * k], [16, 16 * k]] and theirs == [[4, 40 * k], [16, 160 * k]]
        assert [line.get_label() for line in ax.lines] == ["we", "they"]
        assert ax.lines[0].get_linewidth() > ax.lines[1].get_linewidth()
        assert f"top-{k}" in ax.get_title() and "hidden 8, 9 tokens" in ax.get_title()
        assert ax.get_xlabel() == f"experts (median of {rounds} rounds)"
    assert not drawn(bench_pictures.plot_experts, {"rows": rows}, "fine-grained", 2).axison


def test_a_step_is_split_into_its_products_and_the_rest():
    over = {"median": 4 / 3, "low": 1.2, "high": 1.5}
    products = {"share": {"median": 0.75}, "step_over_products": over}
    row = {"row": "step", "name": "MoE", "sides": [side("we", 8.0)], "products": products}
    narrow = row | {"narrow": {"step_over_products": {"median": 1.25}}}
    [text, *_] = drawn(bench_pictures.plot_shares, {"rows": [narrow]}).texts
    assert text.get_text().endswith("(1.20 to 1.50)\n with kernels for AVX2 1.25")
    ax = drawn(bench_pictures.plot_shares, {"rows": [row]})
    assert bars(ax)[:2] == [(0, 6, 0), (6, 8, 0)]
    [products, *_], [label, *_] = ax.get_legend_handles_labels()
    assert products[0] is ax.patches[0] and "products" in label
    assert " ".join(ax.texts[0].get_text().split()) == "1.33 times its products (1.20 to 1.50)"


def test_our_memory_is_drawn_beside_the_least_of_the_rivals():
    sides = [side("we", peak=100 << 20), side("a", peak=800 << 20), side("b", peak=400 << 20)]
    rows = [{"row": "step", "name": "MoE", "sides": sides}]
    ax = drawn(bench_pictures.plot_memory, {"rows": rows})
    assert bars(ax) == [(0, 100, -0.2), (0, 400, 0.2)]
    least, ours = (text.get_text() for text in ax.texts)
    assert least.strip() == "400" and "100" in ours and "0.25" in ours


def test_a_rivals_token_takes_its_share_of_the_text():
    sides = [side("we", 6.0), side("they", 90.0)]
    row = {"row": "generation", "sides": sides, "tokens": 3, "by_length": [1.0, 2.0, 3.0]}
    ours, theirs = drawn(bench_pictures.plot_lengths, {"rows": [row]}).lines
    assert curve(ours) == [[1, 1], [2, 2], [3, 3]] and [*theirs.get_ydata()] == [30.0, 30.0]


def test_the_bar_of_a_step_of_speed_ends_at_its_gain_and_its_line_spans_the_rounds():
    sides = [side("we"), side("one", ratio=(2.0, 1.8, 3.0)), side("two", ratio=(0.9, 0.7, 1.2))]
    row = {"name": "MoE", "threads": 2, "steps": ["a", "b"], "sides": sides}
    record = {"threads": 2, "machine": MACHINE, "rows": [row]}
    [ax] = bench_pictures.steps_figure(record).axes
    assert bars(ax) == [(1, 2.0, 0), (1, 0.9, 1)]
    [lines] = ax.collections
    found = [[x for x, _ in ends] for ends in segments(lines)]
    assert found == [pytest.approx([1.8, 3.0]), pytest.approx([0.7, 1.2])]


# --------------------------------------------------------------------------------------- trainings
def condition(name, losses, **facts):
    runs = [{"validation_loss": loss, **facts} for loss in losses]
    return {"name": name, "config": {"num_experts": 4}, "runs": runs}


@pytest.mark.parametrize("picture", [plots.plot_final_losses, collapse_pictures.plot_losses])
def test_every_seed_has_a_dot_at_its_loss_and_the_line_is_at_their_mean(picture):
    conditions = [condition("a", [2.0, 2.0, 2.6]), condition("b", [1.0, 3.0])]
    record = {"conditions": conditions, "references": LINES}
    more = ("title", "loss") if picture is collapse_pictures.plot_losses else ()
    ax = drawn(picture, record, *more)
    points = [c for c in ax.collections if len(c.get_offsets()) in (2, 3)]
    assert [c.get_offsets()[:, 1].tolist() for c in points] == [[2.0, 2.0, 2.6], [1.0, 3.0]]
    means = [segments(c)[0][0][1] for c in ax.collections if c not in points]
    assert means == pytest.approx([2.2, 2.0])
    assert [round(c.get_offsets()[:, 0].mean(), 9) for c in points] == [0, 1]


def test_the_rivers_of_the_collapse_study_are_those_of_the_first_layer():
    first, last = [[0.75, 0.25], [0.5, 0.5]], [[0.1, 0.9], [0.0, 1.0]]
    facts = {"effective_experts": [1.9, 1.0], "effective_experts_clean": [2.0, 1.0]}
    facts["series"] = {"step": [5, 9], "share": np.stack((first, last), 1).tolist()}
    sizes = ("top_k", "num_experts", "layers", "width", "steps", "batch", "context")
    record = {
        "num_experts": 2,
        "definition": "",
        "conditions": [condition(n, [2.0], **facts) for n in ("no cure", "noise + capacity")],
        "references": LINES,
        "settings": dict.fromkeys(sizes, 1) | {"seeds": [0]},
    }
    for ax in plots.collapse_figure(record).axes[:2]:
        below = ax.collections[0].get_paths()[0].vertices  # the band of the first expert
        assert {tuple(v) for v in below} == {(5, 0), (9, 0), (5, 0.75), (9, 0.5)}
        assert "1.9 effective experts of 2" in ax.get_title()


def test_the_losses_of_a_training_stand_at_their_steps_above_the_next_count_model():
    record = {
        "series": {"step": [10, 20, 30], "training_loss": [3.5, 2.5, 1.75]},
        "evaluations": [{"step": 15, "loss": 3.0}, {"step": 30, "loss": 1.5}],
        "references": LINES,
        "corpus": {"name": "plays"},
    }
    [ax] = plots.training_figure(record).axes
    training, validation, *_ = ax.lines
    assert curve(training) == [[10, 3.5], [20, 2.5], [30, 1.75]]
    assert curve(validation) == [[15, 3.0], [30, 1.5]]
    assert [text.get_text() for text in ax.texts] == ["unigram 3.00", "2-gram 2.00", "3-gram 1.00"]


@pytest.mark.parametrize("name", ["a$x^{$b.txt", "caf\udce9.txt"])
def test_a_text_of_any_name_has_a_picture(name, tmp_path):
    record = {
        "series": {"step": [1, 2], "training_loss": [3.5, 2.5]},
        "evaluations": [{"step": 2, "loss": 2.0}],
        "references": LINES,
        "corpus": {"name": name},
    }
    figure = plots.training_figure(record)
    plots.save(figure, tmp_path / "a.png")
    assert figure.axes[0].get_title() == f"Training on {name.replace(chr(0xDCE9), '?')}"


def test_two_backends_are_compared_by_the_relative_difference_and_by_their_own_times():
    losses = {"float32": {"limit": 1e-4, "series": [[4.0, 2.0], [4.0 + 4e-6, 2.0 - 4e-6]]}}
    speed = [{"width": 8, "milliseconds": [1, 5]}, {"width": 16, "milliseconds": [9, 6]}]
    record = {"losses": losses, "backends": ["numpy", "cupy"], "speed": speed}
    left, right = plots.parity_figure(record).axes
    assert left.lines[0].get_ydata() == pytest.approx([1e-6, 2e-6], rel=1e-6)
    assert [curve(line) for line in right.lines] == [[[8, 1], [16, 9]], [[8, 5], [16, 6]]]


# ----------------------------------------------------------------------------------------- systems
def test_every_system_has_its_dots_at_its_name_and_the_best_stands_on_top():
    def system(name, E, losses, effective):
        runs = [{"validation_loss": x, "effective_experts": effective} for x in losses]
        runs = [run | {"drop_rate": x / 10} for run, x in zip(runs, losses, strict=True)]
        return {"name": name, "year": 2020, "num_experts": E, "runs": runs}

    systems = [system("good", 4, [1.0, 1.5], [1.0, 3.0]), system("bad", 8, [2.0, 2.5], [2.0, 8.0])]
    settings = {"steps": 9, "seeds": [0, 1]}
    record = {"systems": systems, "references": LINES, "settings": settings}
    figure = systems_pictures.systems_figure(record | {"corpus": {"name": "plays"}})
    left, middle, right = figure.axes
    names = [tick.get_text() for tick in left.get_yticklabels()]
    assert names == ["bad (2020)", "good (2020)"] and left.get_ylim()[0] < left.get_ylim()[1]
    wanted = {
        left: [[2.0, 2.5], [1.0, 1.5]],
        middle: [[0.25, 1, 0.25, 1], [0.25, 0.75, 0.25, 0.75]],
        right: [[0.2, 0.25], [0.1, 0.15]],
    }
    for ax, values in wanted.items():
        assert [[x for x, _ in points] for points in dots(ax)] == values
        assert [np.mean(points, 0)[1].round(9) for points in dots(ax)] == [0, 1]


# -------------------------------------------------------------------------- the chapter on collapse
def test_the_load_stands_beside_the_choice_and_the_most_wanted_expert_comes_first():
    run = {"share": [[0.2, 0.5, 0.3]], "share_clean": [[0.1, 0.3, 0.6]]}
    ax = drawn(collapse_pictures.plot_load_beside_choice, run, "title")
    load, clean = ([bar.get_height() for bar in bars] for bars in ax.containers)
    assert (load, clean) == ([0.3, 0.5, 0.2], [0.6, 0.3, 0.1])


def test_a_run_lies_in_the_plane_at_its_load_in_training_and_its_clean_decisiveness():
    facts = {"effective_experts": [3.0], "effective_experts_clean": [1.0]}
    conditions = [condition("a", [0.0], **facts, decisiveness_clean=[0.9])]
    ax = drawn(
        collapse_pictures.plot_plane, {"num_experts": 4, "conditions": conditions}, "title", False
    )
    assert dots(ax) == [[[0.75, 0.9]]]


def test_the_effective_experts_of_shares_are_those_of_the_measure():
    [line, _] = drawn(collapse_pictures.plot_effective_of_shares, 5).lines
    for largest, found in curve(line)[::40]:
        assert found == pytest.approx(
            metrics.effective_experts([largest] + [(1 - largest) / 4] * 4)
        )


def test_the_winner_is_the_expert_of_the_end_and_points_stand_amid_the_steps_they_average():
    load = np.repeat([[6, 2], [1, 7]], [8, 12], 0)
    values = np.arange(40.0).reshape(20, 2)
    trace = rich_get_richer.Trace(load, values, values, values, values[:, 0])
    share, norm, _ = collapse_pictures.plot_rich_get_richer(Figure().subplots(1, 3), trace, "title")
    other, winner = share.lines
    assert "expert 1" in winner.get_label() and to_hex(winner.get_color()) == "#000000"
    assert curve(winner)[:3] == [[1.5, 0.25], [5.5, 0.25], [9.5, 0.875]]
    assert curve(other)[0] == [1.5, 0.75]
    assert curve(norm.lines[0])[:2] == [[1.5, 3.0], [5.5, 11.0]]
