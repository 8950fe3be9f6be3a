"""Figures: each reads one record and draws on the axes it is given."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moe_numpy import files

# Okabe and Ito's palette, told apart by most color-blind readers.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
BAD, GOOD, NEUTRAL = "#D55E00", "#0072B2", "#555555"
NGRAMS = ("unigram", "2-gram", "3-gram", "4-gram", "5-gram")


def plot_river(ax: Axes, step: list[int], share: np.ndarray, title: str) -> Axes:
    """Stack each expert's share of the load over the steps of training.

    Parameters
    ----------
    step : steps at which the stretches end.
    share : array (stretches, E), rows summing to one.
    """
    share = np.asarray(share)
    E = share.shape[1]
    tint = (1.0, 0.55, 0.8, 0.35)  # each round through the palette is lighter or darker
    shades = [to_rgba(COLORS[e % len(COLORS)], tint[e // len(COLORS) % 4]) for e in range(E)]
    ax.stackplot(step, share.T, colors=shades, edgecolor="white", linewidth=0.4)
    ax.set(ylim=(0, 1), xlabel="training step", title=title)
    if len(step) > 1:
        ax.set_xlim(step[0], step[-1])
    ax.set_ylabel("share of the load")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def plot_effective(ax: Axes, record: dict[str, Any]) -> Axes:
    """Draw effective experts of every seed and layer: load in training, and clean choice."""
    E = record["num_experts"]
    for x, condition in enumerate(record["conditions"]):
        for key, shift, style in (
            ("effective_experts", -0.17, {"color": GOOD, "marker": "o"}),
            ("effective_experts_clean", 0.17, {"facecolor": "none", "edgecolor": BAD}),
        ):
            values = [value for run in condition["runs"] for value in run[key]]
            spread = np.linspace(-0.1, 0.1, len(values))
            ax.scatter(x + shift + spread, values, s=26, linewidth=1.3, zorder=3, **style)
    ax.axhline(E, color=NEUTRAL, linewidth=0.8, linestyle=":")
    ax.axhline(E / 2, color=NEUTRAL, linewidth=0.8, linestyle="--")
    ax.text(-0.45, E / 2 + E / 80, "collapsed below this line", color=NEUTRAL, fontsize=8)
    filled = ax.scatter([], [], color=GOOD, s=26)
    hollow = ax.scatter([], [], facecolor="none", edgecolor=BAD, s=26)
    ax.legend(
        [filled, hollow],
        ["load in training", "choice of the clean router (no noise, no limits)"],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.08),
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    ax.set(ylim=(0.5, E + 0.6), ylabel=f"effective experts of {E}")
    ax.set_title("Effective experts at the end: one dot for each seed and layer")
    return _label_conditions(ax, record)


def plot_final_losses(ax: Axes, record: dict[str, Any]) -> Axes:
    """Draw the validation loss of every seed beside the n-gram reference lines."""
    finals = []
    for x, condition in enumerate(record["conditions"]):
        values = [run["validation_loss"] for run in condition["runs"]]
        finals += values
        ax.scatter(x + np.linspace(-0.1, 0.1, len(values)), values, s=26, color=GOOD, zorder=3)
        ax.hlines(np.mean(values), x - 0.25, x + 0.25, color=GOOD, linewidth=1.2)
    references = record["references"]
    ax.set_ylim(min(*finals, references["2-gram"]) - 0.08, max(finals) + 0.08)
    draw_references(ax, references)
    ax.set_ylabel("validation loss\n(nats per character)")
    ax.set_title("Loss without noise and limits: one dot for each seed, line at the mean")
    return _label_conditions(ax, record)


def draw_references(ax: Axes, references: dict[str, float]) -> None:
    """Draw the losses of the count models that lie within the axes; their names stand beside."""
    low, high = ax.get_ylim()
    beside = {"transform": ax.get_yaxis_transform(), "va": "center"}
    for name in ("uniform", *NGRAMS):
        value = references[name]
        if low < value < high:
            ax.axhline(value, color=NEUTRAL, linewidth=0.8, linestyle="--")
            ax.text(1.01, value, f"{name} {value:.2f}", color=NEUTRAL, fontsize=8, **beside)


def collapse_figure(record: dict[str, Any]) -> Figure:
    """Tell the collapse study in one figure: two rivers, effective experts, losses."""
    figure = Figure(figsize=(13, 7.6), layout="constrained", dpi=110)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.35))
    named = {condition["name"]: condition for condition in record["conditions"]}
    for row, name in enumerate(("no cure", "noise + capacity")):
        run = named[name]["runs"][0]
        effective = run["effective_experts"][0]
        title = f"{name.capitalize()}: {effective:.1f} effective experts of {record['num_experts']}"
        share = np.asarray(run["series"]["share"])[:, 0]
        ax = plot_river(figure.add_subplot(grid[row, 0]), run["series"]["step"], share, title)
        if row == 0:
            ax.set_xlabel("")
    plot_effective(figure.add_subplot(grid[0, 1]), record)
    plot_final_losses(figure.add_subplot(grid[1, 1]), record)
    settings = record["settings"]
    seeds = ", ".join(str(seed) for seed in settings["seeds"])
    figure.suptitle(
        "Expert collapse: the load of each expert in training "
        f"(left: seed {settings['seeds'][0]}, first layer, one color for each expert)",
        fontsize=13,
    )
    figure.supxlabel(
        f"{record['definition']}\nSettings: top-{settings['top_k']} gates of "
        f"{settings['num_experts']} experts in {settings['layers']} layers, width "
        f"{settings['width']}, {settings['steps']} steps of "
        f"{settings['batch'] * settings['context']} characters; seeds {seeds}.",
        fontsize=8,
    )
    return figure


def training_figure(record: dict[str, Any]) -> Figure:
    """Show a training run: its loss beside the n-gram lines and, with experts, their load."""
    shares = np.asarray(record["series"].get("share", np.zeros((1, 0, 0))))
    layers = shares.shape[1]
    rows = 1 + layers
    figure = Figure(figsize=(9, 3.4 + 2.0 * layers), layout="constrained", dpi=110)
    axes = figure.subplots(rows, 1, squeeze=False, height_ratios=[2.0] + [1.0] * layers)[:, 0]
    step = record["series"]["step"]
    ax = axes[0]
    ax.plot(step, record["series"]["training_loss"], color=GOOD, label="training (mean of steps)")
    evaluated = [(e["step"], e["loss"]) for e in record["evaluations"]]
    ax.plot(*zip(*evaluated, strict=True), "o-", color=BAD, label="validation")
    _show_next_reference(ax, record["references"])
    draw_references(ax, record["references"])
    ax.set(xlabel="training step", ylabel="loss (nats per character)")
    name = record["corpus"]["name"].encode("utf-8", "replace").decode()  # a file's, of any bytes
    ax.set_title(f"Training on {name}", parse_math=False)
    ax.legend(fontsize=8)
    for layer in range(layers):
        plot_river(
            axes[1 + layer], step, shares[:, layer], f"MoE layer {layer + 1}: load of each expert"
        )
    return figure


def _show_next_reference(ax: Axes, references: dict[str, float]) -> None:
    """Lower the axes to the next count model that the run has not reached yet."""
    low, high = ax.get_ylim()
    below = [value for value in references.values() if value < low]
    ax.set_ylim(max(below, default=low) - 0.04 * (high - low), high)


def parity_figure(record: dict[str, Any]) -> Figure:
    """Show how far two backends differ, step by step, and where the second is the faster one."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    for color, (dtype, found) in zip(COLORS, record["losses"].items(), strict=False):
        first, second = (np.asarray(series) for series in found["series"])
        difference = np.maximum(np.abs(first - second) / np.abs(first), 1e-17)
        left.semilogy(difference, color=color, label=dtype)
        left.axhline(found["limit"], color=color, linestyle="--", linewidth=0.8)
    left.set(xlabel="training step", ylabel="relative difference of the losses")
    left.set_title("Same seed on both backends (dashed: limit)")
    left.legend(fontsize=8)
    widths = [row["width"] for row in record["speed"]]
    for i, name in enumerate(record["backends"]):
        times = [row["milliseconds"][i] for row in record["speed"]]
        right.loglog(widths, times, "o-", color=COLORS[i], label=name)
    right.set(xlabel="model width (channels)", ylabel="median time of a step (ms)")
    right.set_title("Training step by width")
    right.legend(fontsize=8)
    return figure


# By their names: some of the modules draw with the functions of this one.
DRAWN_BY = {
    "collapse": "plots.collapse_figure",
    "collapse_settings": "collapse_pictures.settings_figure",
    "systems": "systems_pictures.systems_figure",
    "training": "plots.training_figure",
    "parity": "plots.parity_figure",
    "speed": "bench_pictures.speed_figure",
    "speed_steps": "bench_pictures.steps_figure",
}


def draw(record: dict[str, Any]) -> Figure:
    """Draw the figure of a record by the study that it names."""
    module, function = DRAWN_BY[record["study"]].split(".")
    return getattr(importlib.import_module(f"moe_numpy.lab.{module}"), function)(record)


def require_study(record: Any, source: Path) -> None:
    """Refuse what is not the record of a known study."""
    study = record.get("study") if isinstance(record, dict) else None
    if not isinstance(study, str) or study not in DRAWN_BY:
        raise ValueError(
            f"figures: {source} must be the record of a study ({', '.join(DRAWN_BY)}), got "
            f"{study!r}. Move it away or make it anew."
        )


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically and without a trace of the machine or the day."""
    FigureCanvasAgg(figure)  # which draws PNG, whatever MPLBACKEND says
    files.write_atomically(
        path, lambda file: figure.savefig(file, format="png", metadata={"Software": None})
    )


def _label_conditions(ax: Axes, record: dict[str, Any]) -> Axes:
    names = [condition["name"] for condition in record["conditions"]]
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.5, len(names) - 0.5)
    return ax
