"""The records of the benchmark as figures: the races, and what each step of speed gained."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from moe_numpy.lab.bench_report import gain, labels, machine_line, row_names
from moe_numpy.lab.plots import BAD, COLORS, GOOD, NEUTRAL


def plot_ratios(ax: Axes, record: dict[str, Any]) -> Axes:
    """Draw the time of every rival over ours, with the spread of the rounds; the line is at one.

    A spread that includes one proves nothing, and is gray.
    """
    names, found = [], []
    for row in record["rows"]:
        what = {
            "product": f"product, {row['name']}",
            "step": f"step, {row['name']}",
            "generation": f"generation, {row['name']}, one thread",
        }.get(row["row"])
        if what:
            for side in row["sides"][1:]:
                names.append(textwrap.fill(f"{what}: {side['name']}", 46))
                found.append(side["ratio"])
    for y, ratio in enumerate(found):
        color = GOOD if ratio["low"] > 1 else BAD if ratio["high"] < 1 else NEUTRAL
        ax.hlines(y, ratio["low"], ratio["high"], color=color, linewidth=2, alpha=0.5)
        ax.plot(ratio["median"], y, "o", color=color, zorder=4)
        text = ax.text(ratio["median"], y - 0.18, f"{ratio['median']:.2f}", ha="center", fontsize=8)
        text.set_bbox({"color": "white", "pad": 0.5, "alpha": 0.8})
    ax.axvline(1.0, color=NEUTRAL, linewidth=0.8, linestyle="--", zorder=0)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set(xscale="log", xlabel="rival's time / our time (dot: median of rounds, bar: all rounds)")
    _mark_ratios(ax)
    ax.set_ylim(len(names) - 0.5, -0.7)
    ax.set_title(f"Against PyTorch (on {record['threads']} threads, if nothing else is said)")
    return ax


def plot_experts(ax: Axes, record: dict[str, Any], name: str, k: int) -> Axes:
    """Draw what a top-k layer costs over its number of experts: ours thick."""
    rows = [row for row in record["rows"] if row["row"] == "layer" and row["name"] == name]
    rows = [row for row in rows if row["top_k"] == k]
    if not rows:
        ax.set_axis_off()
        return ax
    experts = [row["experts"] for row in rows]
    for i, side in enumerate(rows[0]["sides"]):
        times = [row["sides"][i]["milliseconds"]["median"] for row in rows]
        width = 2.0 if i == 0 else 1.0
        ax.loglog(experts, times, "o-", color=COLORS[i], linewidth=width, label=side["name"])
    sizes = f"hidden {rows[0]['hidden']}, {rows[0]['tokens']} tokens"
    ax.set_title(f"Layer alone, {name}, top-{k}: {sizes}", fontsize=10)
    ax.set_xticks(experts, [str(E) for E in experts])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.legend(fontsize=7)
    rounds = min(row["rounds"] for row in rows)
    ax.set(xlabel=f"experts (median of {rounds} rounds)", ylabel="forward and backward (ms)")
    return ax


def plot_shares(ax: Axes, record: dict[str, Any]) -> Axes:
    """Split a step into its matrix products, as they run alone, and all the rest."""
    rows = [row for row in record["rows"] if row["row"] == "step"]
    if not rows:
        ax.set_axis_off()
        return ax
    for y, row in enumerate(rows):
        whole = row["sides"][0]["milliseconds"]["median"]
        share = row["products"]["share"]["median"]
        ax.barh(y, share * whole, color=GOOD, label="matrix products alone" if not y else None)
        ax.barh(y, (1 - share) * whole, left=share * whole, color=COLORS[1])
        over = row["products"]["step_over_products"]
        spread = (
            f"{over['median']:.2f} times its products\n ({over['low']:.2f} to {over['high']:.2f})"
        )
        if row.get("narrow"):
            median = row["narrow"]["step_over_products"]["median"]
            spread += f"\n with kernels for AVX2 {median:.2f}"
        ax.text(whole, y, f" {spread}", va="center", fontsize=8)
    ax.barh(0, 0, color=COLORS[1], label="everything else")
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.margins(x=0.5)
    ax.invert_yaxis()
    ax.set_xlabel("a training step (ms)")
    ax.set_title("Where the time goes")
    ax.legend(fontsize=8)
    return ax


def plot_memory(ax: Axes, record: dict[str, Any]) -> Axes:
    """Draw the largest memory of all processes that train: ours, and the least of PyTorch's."""
    steps = [row for row in record["rows"] if row["row"] == "step"]
    rows = [row for row in steps if row["sides"][0]["peak"]]  # not every system tells it
    if not rows:
        ax.set_axis_off()
        return ax
    for y, row in enumerate(rows):
        ours, *others = (side["peak"] / 2**20 for side in row["sides"])
        ax.barh(y - 0.2, ours, height=0.38, color=GOOD, label=None if y else "moe_numpy")
        share = f" {ours:.0f}"
        if others:
            least = min(others)
            share += f" ({ours / least:.2f} of PyTorch's)"
            label = None if y else "PyTorch, the one with least"
            ax.barh(y + 0.2, least, height=0.38, color=COLORS[1], label=label)
            ax.text(least, y + 0.2, f" {least:.0f}", va="center", fontsize=8)
        ax.text(ours, y - 0.2, share, va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.margins(x=0.15, y=0.15)
    ax.invert_yaxis()
    ax.set(xlabel="peak memory, all processes (MiB)", title="Memory of training")
    ax.legend(fontsize=8)
    return ax


def plot_lengths(ax: Axes, record: dict[str, Any]) -> Axes:
    """Draw what each token of a generated text takes, by its place."""
    rows = [row for row in record["rows"] if row["row"] == "generation"]
    if not rows:
        ax.set_axis_off()
        return ax
    times = rows[0]["by_length"]
    ax.plot(range(1, len(times) + 1), times, color=GOOD, label=rows[0]["sides"][0]["name"])
    for color, side in zip(COLORS[1:], rows[0]["sides"][1:], strict=False):
        mean = side["milliseconds"]["median"] / rows[0]["tokens"]
        ax.axhline(mean, color=color, linestyle="--", label=f"{side['name']}, mean")
        times = [*times, mean]
    ax.set_ylim(0, 1.1 * max(times))
    ax.set(xlabel="token written (the first: with the prompt)", ylabel="time (ms), one thread")
    ax.set_title("Generation with a cache", fontsize=10)
    ax.legend(fontsize=7)
    return ax


def speed_figure(record: dict[str, Any]) -> Figure:
    """Tell the races in one figure: ratios, time and memory of a step, layers, generation."""
    figure = Figure(figsize=(18, 9.5), layout="constrained", dpi=110)
    grid = figure.add_gridspec(2, 12)
    above = [figure.add_subplot(grid[0, i : i + 4]) for i in (0, 4, 8)]
    below = [figure.add_subplot(grid[1, i : i + 3]) for i in (0, 3, 6, 9)]
    plot_ratios(above[0], record)
    plot_shares(above[1], record)
    plot_memory(above[2], record)
    plot_experts(below[0], record, "wide", k=1)
    plot_experts(below[1], record, "wide", k=2)
    plot_experts(below[2], record, "fine-grained", k=2)
    plot_lengths(below[3], record)
    figure.suptitle("Speed of a training step, a layer and generation", fontsize=13)
    figure.supxlabel(machine_line(record), fontsize=8)
    return figure


def steps_figure(record: dict[str, Any]) -> Figure:
    """Draw what each step of speed gains, a bar for every row with the spread of the rounds."""
    rows = record["rows"]
    steps = labels(rows)
    figure = Figure(figsize=(10, 1.6 + 0.65 * len(steps)), layout="constrained", dpi=110)
    ax = figure.subplots()
    places, names = _places(rows, steps), row_names(record)
    for i, row in enumerate(rows):
        found = [gain(row, step) for step in places[i]]
        medians = np.array([ratio["median"] for ratio in found])
        ends = np.array([[ratio["low"], ratio["high"]] for ratio in found]).T
        reach = np.abs(ends - medians)
        style = {"height": 0.18, "color": COLORS[i], "ecolor": NEUTRAL, "label": names[i]}
        ax.barh(list(places[i].values()), medians - 1, left=1, xerr=reach, **style)
        for y, median, end in zip(places[i].values(), medians, ends[1], strict=True):
            ax.text(max(end, 1.0), y, f" {median:.2f}", va="center", fontsize=8)
    ax.axvline(1.0, color=NEUTRAL, linewidth=0.8)
    ax.set_yticks(range(len(steps)), steps.values(), fontsize=9)
    ax.invert_yaxis()
    ax.margins(y=0.02)
    found = [side["ratio"] for row in rows for side in row["sides"][1:]]
    limits = 0.9 * min(ratio["low"] for ratio in found), 1.3 * max(r["high"] for r in found)
    label = "time without it / with it (bar: median; line: all rounds)"
    ax.set(xscale="log", xlim=limits, xlabel=label)
    _mark_ratios(ax)
    ax.set_title("What each optimization gains, removed one at a time")
    ax.legend(fontsize=8)
    figure.supxlabel(machine_line(record), fontsize=7)
    return figure


def _places(rows: list[dict[str, Any]], steps: dict[str, str]) -> list[dict[str, float]]:
    """Say for every row how high the bar of each of its steps lies: around the step's number."""
    found: list[dict[str, float]] = [{} for _ in rows]
    for y, step in enumerate(steps):
        own = [places for places, row in zip(found, rows, strict=True) if step in row["steps"]]
        for i, places in enumerate(own):
            places[step] = y + 0.2 * (i - (len(own) - 1) / 2)
    return found


def _mark_ratios(ax: Axes) -> None:
    """Label the ratios that lie on a logarithmic axis; labels beside it would widen the figure."""
    low, high = ax.get_xlim()
    ticks = [t for t in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16) if low <= t <= high]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
