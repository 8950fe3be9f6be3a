"""The figure of the systems study: loss and load of every preset, one row for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moe_numpy.lab import plots, records


def systems_figure(record: dict[str, Any]) -> Figure:
    """Show each system's loss beside the count models, and how evenly it loads its experts."""
    systems = sorted(record["systems"], key=lambda s: -records.mean(s["runs"], "validation_loss"))
    height = 2.2 + 0.32 * len(systems)
    figure = Figure(figsize=(12, height), layout="constrained", dpi=110)
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(1.5, 1, 0.8))
    plot_losses(left, systems, record["references"])
    plot_evenness(middle, systems)
    plot_drops(right, systems)
    left.set_yticks(range(len(systems)), [f"{s['name']} ({s['year']})" for s in systems])
    settings = record["settings"]
    seeds = ", ".join(str(seed) for seed in settings["seeds"])
    figure.suptitle("The systems of the literature at laptop size, trained alike")
    figure.supxlabel(
        f"{settings['steps']} steps on {record['corpus']['name']}; seeds {seeds}; one dot for each "
        "seed (and MoE layer). Two layers of width 64: the order says nothing about full size.",
        fontsize=8,
    )
    return figure


def plot_losses(ax: Axes, systems: list[dict[str, Any]], references: dict[str, float]) -> Axes:
    """Draw every seed's validation loss, and the count models within sight."""
    _dots(ax, systems, "validation_loss")
    values = [run["validation_loss"] for system in systems for run in system["runs"]]
    low, high = min(*values, references["2-gram"]), max(*values, references["2-gram"])
    ax.set_xlim(low - 0.04, high + 0.04)
    for name in plots.NGRAMS:
        if low - 0.04 < references[name] < high + 0.04:
            ax.axvline(references[name], color=plots.NEUTRAL, linewidth=0.8, linestyle="--")
            place = (references[name] - 0.008, len(systems) - 0.4)
            ax.annotate(f"{name} {references[name]:.2f}", place, fontsize=8, ha="right")
    ax.set(xlabel="validation loss (nats per character)", ylim=(-0.6, len(systems) + 0.2))
    return ax


def plot_evenness(ax: Axes, systems: list[dict[str, Any]]) -> Axes:
    """Draw the effective experts as a share of all experts."""
    _dots(ax, systems, "effective_experts", lambda system: system["num_experts"])
    ax.axvline(0.5, color=plots.NEUTRAL, linewidth=0.8, linestyle="--")
    ax.annotate("collapsed", (0.48, len(systems) - 0.4), fontsize=8, ha="right")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set(xlim=(0, 1.03), xlabel="effective experts, of all")
    return ax


def plot_drops(ax: Axes, systems: list[dict[str, Any]]) -> Axes:
    """Draw the share of the choices that got no place."""
    _dots(ax, systems, "drop_rate")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set(xlabel="choices without a place")
    ax.set_xlim(left=-0.01)
    return ax


def _dots(
    ax: Axes, systems: list[dict[str, Any]], key: str, unit: Callable = lambda _: 1.0
) -> None:
    for y, system in enumerate(systems):
        values = np.hstack([run[key] for run in system["runs"]]) / unit(system)
        ax.scatter(values, y + np.linspace(-0.15, 0.15, len(values)), s=18, color=plots.GOOD)
    ax.grid(axis="y", linewidth=0.3)
    ax.set_axisbelow(True)
