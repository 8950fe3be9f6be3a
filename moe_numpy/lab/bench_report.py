"""The record of the benchmark as a table and as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moe_numpy.lab.plots import BAD, COLORS, GOOD, NEUTRAL


def table(record: dict[str, Any]) -> str:
    """Write the record as lines of text: a side each, and below a row what was asked beside."""
    lines = [_machine_line(record), f"{'':<46} {'ms':>9} {'ratio to the first (spread)':>30}"]
    for row in record["rows"]:
        lines.append(_title(row) + _busy(row))
        for side in row["sides"]:
            time, ratio = f"{side['milliseconds']['median']:9.4g}", side["ratio"]
            text = f"  {side['name']:<44} {time} {'' if ratio is None else _spread(ratio):>30}"
            lines.append(text.rstrip())
        lines += [f"    {line}" for line in _facts(row)]
    return "\n".join(lines)


def _machine_line(record: dict[str, Any]) -> str:
    found = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = f"threads: {record['threads']}, cores: {found['cores']}"
    return f"{found['cpu']}; {threads}; {found['blas']}; {versions}"


def _title(row: dict[str, Any]) -> str:
    if row["row"] == "layer":
        sizes = f"{row['experts']} experts of {row['hidden']}, top-{row['top_k']}"
        return f"layer, {row['name']}: {sizes}, {row['tokens']} tokens"
    return row["row"] if row["row"] == row["name"] else f"{row['row']}, {row['name']}"


def _busy(row: dict[str, Any]) -> str:
    busy = row.get("busy", 0)
    return f"   [{busy} busy rounds; {row['rounds']} counted]" if busy else ""


def _facts(row: dict[str, Any]) -> Iterator[str]:
    if "tokens" in row and row["row"] in ("step", "generation"):
        speeds = [1e3 * row["tokens"] / side["milliseconds"]["median"] for side in row["sides"]]
        yield "tokens a second: " + ", ".join(f"{speed:,.0f}" for speed in speeds)
    if "by_length" in row:
        first, last = (np.median(part) for part in np.split(np.array(row["by_length"][4:]), 2))
        yield f"a token takes {first:.3g} ms in the first half, {last:.3g} ms in the second"
    if "products" in row:
        found = row["products"]
        yield f"matrix products alone: {found['calls']} calls, {_percent(found['share'])} of a step"
        yield f"a step takes {_spread(found['step_over_products'])} times its products"
        rate = f"{_percent(found['step_rate'])} of {found['machine_gflops']['median']:.0f} GFLOP/s"
        yield f"rate of the products' operations in a step: {rate}, the machine's own"
        sizes = [f"{name} {count / 2**20:.1f}" for name, count in row["bytes"].items()]
        yield "MiB: " + ", ".join(sizes)
        peaks = [f"{side['peak'] / 2**20:.0f}" for side in row["sides"]]
        yield "MiB at most, whole process: " + ", ".join(peaks)


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _percent(found: dict[str, float]) -> str:
    return f"{found['median']:.0%} ({found['low']:.0%} to {found['high']:.0%})"


def plot_ratios(ax: Axes, record: dict[str, Any]) -> Axes:
    """Draw the time of every rival over ours, with the spread of the rounds; the line is at one."""
    names, found = [], []
    for row in record["rows"]:
        if row["row"] in ("step", "generation"):
            threads = row.get("threads", record["threads"])
            for side in row["sides"][1:]:
                names.append(f"{row['row']}, {row['name']}: {side['name']} ({threads} thr.)")
                found.append(side["ratio"])
    for y, ratio in enumerate(found):
        color = GOOD if ratio["median"] >= 1 else BAD
        ax.hlines(y, ratio["low"], ratio["high"], color=color, linewidth=2, alpha=0.5)
        ax.plot(ratio["median"], y, "o", color=color)
        ax.text(ratio["median"], y - 0.18, f"{ratio['median']:.2f}", ha="center", fontsize=8)
    ax.axvline(1.0, color=NEUTRAL, linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set(xscale="log", xlabel="its time / our time (dot: median of rounds, bar: all rounds)")
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16) if _inside(t, ax.get_xlim())]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(len(names) - 0.5, -0.7)
    ax.set_title("Against PyTorch on the same processor")
    return ax


def plot_experts(ax: Axes, record: dict[str, Any], name: str) -> Axes:
    """Draw what a layer costs over its number of experts: ours in full lines, others in dots."""
    rows = [row for row in record["rows"] if row["row"] == "layer" and row["name"] == name]
    if not rows:
        ax.set_axis_off()
        return ax
    for style, k in zip(("o-", "s--"), sorted({row["top_k"] for row in rows}), strict=False):
        own = [row for row in rows if row["top_k"] == k]
        experts = [row["experts"] for row in own]
        for i, side in enumerate(own[0]["sides"]):
            times = [row["sides"][i]["milliseconds"]["median"] for row in own]
            label = f"{side['name']}, top-{k}"
            width = 2.0 if i == 0 else 1.0
            ax.loglog(experts, times, style, color=COLORS[i], linewidth=width, label=label)
    ax.set_title(f"Layer alone, {name}: hidden {rows[0]['hidden']}, {rows[0]['tokens']} tokens")
    ax.set_xticks(experts, [str(E) for E in experts])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(fontsize=7)
    ax.set(xlabel="experts", ylabel="forward and backward (ms)")
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
        ax.text(whole, y, f" {1 / share:.2f} times", va="center", fontsize=8)
    ax.barh(0, 0, color=COLORS[1], label="everything else")
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.margins(x=0.2)
    ax.invert_yaxis()
    ax.set_xlabel("a training step (ms)")
    ax.set_title("Where the time goes")
    ax.legend(fontsize=8)
    return ax


def speed_figure(record: dict[str, Any]) -> Figure:
    """Tell the benchmark in one figure: ratios, where the time goes, cost over the experts."""
    figure = Figure(figsize=(13, 8), layout="constrained", dpi=110)
    axes = figure.subplots(2, 2)
    plot_ratios(axes[0, 0], record)
    plot_shares(axes[0, 1], record)
    plot_experts(axes[1, 0], record, "wide")
    plot_experts(axes[1, 1], record, "fine-grained")
    figure.suptitle("Speed of a training step, a layer and generation", fontsize=13)
    figure.supxlabel(_machine_line(record), fontsize=8)
    return figure


def _inside(x: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= x <= limits[1]
