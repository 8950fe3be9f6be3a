"""Pictures of the chapter on collapse: each draws on the axes it is given and returns them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moe_numpy.lab import plots, rich_get_richer

MARKERS = "osD^vPX*h"
FAINT = "#BBBBBB"
STRETCH = 4  # steps that one point of a line averages; a rest at the end is left out


def plot_push(ax: Axes) -> Axes:
    """Draw how hard one token moves the logits of a raw top-1 gate, over the gate's probability."""
    prob = np.linspace(0, 1, 201)
    ax.plot(prob, prob * (1 - prob), color=plots.GOOD, label="the chosen expert: pushed up")
    ax.plot(
        prob, -prob * (1 - prob), "--", color=plots.BAD, label="all others together: pushed down"
    )
    ax.axhline(0, color=plots.NEUTRAL, linewidth=0.8)
    ax.set(
        xlabel="prob[n, a], the chosen expert's gate", ylabel="push on the logits,\nunits of |u|"
    )
    ax.set_title("One token that is served well (u < 0)")
    ax.legend(fontsize=8, loc="upper right", frameon=False)
    ax.set_ylim(-0.32, 0.48)
    return ax


def plot_effective_of_shares(ax: Axes, groups: int) -> Axes:
    """Draw exp(entropy) while one of `groups` equal shares grows until it has everything."""
    largest = np.linspace(1 / groups, 1, 200)
    rest = np.maximum((1 - largest) / (groups - 1), 1e-300)
    entropy = -largest * np.log(largest) - (groups - 1) * rest * np.log(rest)
    ax.plot(largest, np.exp(entropy), color=plots.GOOD)
    ax.axhline(groups / 2, color=plots.NEUTRAL, linestyle="--", linewidth=0.8)
    note = {"ha": "right", "fontsize": 8, "color": plots.NEUTRAL}
    ax.text(1, groups / 2 + 0.1, "half of the experts", **note)
    ax.set(
        xlabel="share of the largest expert (the others share the rest evenly)", ylim=(0.5, None)
    )
    ax.set_ylabel(f"effective experts of {groups}")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    return ax


def plot_experts(ax: Axes, values: np.ndarray, winner: int, ylabel: str) -> Axes:
    """Draw one line for each expert over the steps, the winner thick and black.

    Parameters
    ----------
    values : array (steps, E)
        NaN where an expert has no value; its line has a gap where a whole stretch has none.
    """
    values = np.asarray(values, float)
    S, E = values.shape[0] // STRETCH, values.shape[1]
    parts_SPE = values[: S * STRETCH].reshape(S, STRETCH, E)
    there_SE = (~np.isnan(parts_SPE)).sum(1)
    mean_SE = np.nansum(parts_SPE, 1) / np.where(there_SE > 0, there_SE, np.nan)
    middle_S = np.arange(S) * STRETCH + (STRETCH - 1) / 2
    marker = "." if np.isnan(mean_SE).any() else None
    for e in range(E):
        if e != winner:
            color = plots.COLORS[e % len(plots.COLORS)]
            ax.plot(middle_S, mean_SE[:, e], color=color, linewidth=1, marker=marker, markersize=3)
    label = f"expert {winner}:\nlargest at the end"
    ax.plot(middle_S, mean_SE[:, winner], color="black", linewidth=2.2, label=label)
    ax.set(xlabel="training step", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def plot_rich_get_richer(axes: np.ndarray, trace: rich_get_richer.Trace, title: str) -> np.ndarray:
    """Draw share, gradient norm and loss of each expert side by side, as far as there are axes.

    The winner is the expert with the largest share at the end.
    """
    winner = int(trace.share[-10:].mean(0).argmax())
    panels = (
        (trace.share, "share of the batch"),
        (trace.gradient_norm, "norm of the expert's gradient"),
        (trace.loss, "loss of the tokens it served"),
    )
    for ax, (values, name) in zip(axes, panels, strict=False):
        plot_experts(ax, values, winner, name)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(fontsize=9, frameon=False)
    axes[0].set_title(title)
    return axes


def plot_effective_seeds(ax: Axes, record: dict[str, Any], title: str) -> Axes:
    """Draw effective experts of every seed: filled the load in training, hollow the clean choice.

    Seeds that agree lie side by side. A layer with one expert cannot collapse and is left out.
    """
    record = record | {"conditions": _with_choice(record)}
    plots.plot_effective(ax, record)
    names = [condition["name"] for condition in record["conditions"]]
    ax.set_xticks(range(len(names)), [_wrapped(name) for name in names], fontsize=8)
    ax.get_legend().remove()
    E = record["num_experts"]
    ax.texts[0].set(y=E / 2 - E / 80, va="top")  # below the line there are fewer dots in its way
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("filled: load in training; hollow: choice of the clean router", fontsize=9)
    return ax


def plot_losses(ax: Axes, record: dict[str, Any], title: str, ylabel: str) -> Axes:
    """Draw the validation loss of every seed, and a line at the mean of each condition."""
    for x, condition in enumerate(record["conditions"]):
        values = [run["validation_loss"] for run in condition["runs"]]
        shift = np.linspace(-0.15, 0.15, len(values))
        ax.scatter(x + shift, values, s=20, color=plots.GOOD, zorder=3)
        ax.hlines(np.mean(values), x - 0.3, x + 0.3, color=plots.GOOD, linewidth=1.2)
    names = [_wrapped(condition["name"]) for condition in record["conditions"]]
    ax.set_xticks(range(len(names)), names, fontsize=8)
    ax.set(ylabel=ylabel, xlabel="setting: one dot for each seed, line at the mean")
    ax.set_title(title, fontsize=10)
    return ax


def plot_plane(ax: Axes, record: dict[str, Any], title: str, legend: bool = True) -> Axes:
    """Place every run by balance in training and decisiveness of the clean router.

    Left is collapsed, right is balanced; below, the router hardly prefers any expert, above it is
    sure. A layer with one expert has no place in the plane and is left out. The first condition has
    the smallest markers and lies on top, so that none hides another.
    """
    E = record["num_experts"]
    for i, condition in enumerate(_with_choice(record)):
        x = [v / E for run in condition["runs"] for v in run["effective_experts"]]
        y = [v for run in condition["runs"] for v in run["decisiveness_clean"]]
        ax.scatter(
            x,
            y,
            s=16 + 12 * i,
            marker=MARKERS[i % len(MARKERS)],
            color=plots.COLORS[i % len(plots.COLORS)],
            edgecolor="black",
            linewidth=0.4,
            label=condition["name"],
            zorder=4 - i / 10,
        )
    ax.axvline(0.5, color=FAINT, linestyle="--", linewidth=0.8)
    ax.axhline(1 / E, color=FAINT, linestyle=":", linewidth=0.8)
    ax.text(0.02, 1 / E - 0.015, "no preference at all", fontsize=7, color=plots.NEUTRAL, va="top")
    ax.text(0.48, 1.035, "collapsed", fontsize=7, color=plots.NEUTRAL, ha="right")
    ax.set(xlim=(0, 1.05), ylim=(0, 1.09))
    ax.set(xlabel="balance: effective experts / experts", ylabel="decisiveness of the clean router")
    ax.set_title(title, fontsize=10)
    if legend:
        ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def plot_load_beside_choice(ax: Axes, run: dict[str, Any], title: str) -> Axes:
    """Set each expert's share of the load in training beside its share of the clean choice.

    Shown is the first layer.

    Experts are sorted by the clean choice, the most wanted first.
    """
    load_E, clean_E = (np.array(run[key][0]) for key in ("share", "share_clean"))
    order_E = np.argsort(-clean_E, kind="stable")
    place_E = np.arange(load_E.size)
    ax.bar(place_E - 0.2, load_E[order_E], 0.4, color=plots.GOOD, label="load in training")
    ax.bar(
        place_E + 0.2,
        clean_E[order_E],
        0.4,
        facecolor="none",
        edgecolor=plots.BAD,
        label="choice of the clean router",
    )
    ax.axhline(1 / load_E.size, color=plots.NEUTRAL, linestyle=":", linewidth=0.8)
    ax.set(xlabel="experts, most wanted first", ylabel="share")
    ax.set_title(title, fontsize=10)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xticks(range(0, load_E.size, max(1, load_E.size // 4)))
    return ax


def animate_shares(share: np.ndarray, steps: list[int], title: str) -> bytes:
    """Show the shares of the experts as bars, one picture for each of the steps.

    The pictures make one animated PNG: it needs no network and no script, and plays wherever a PNG
    is shown. A viewer that cannot play it shows the last step, which the file names as its still.

    Parameters
    ----------
    share : array (steps, E), rows that sum to one.
    steps : the rows that are shown, in this order.

    Returns
    -------
    bytes
        the file.
    """
    from PIL import Image  # here, as matplotlib does: only who animates needs it

    frames = []
    for step in [steps[-1], *steps]:
        figure = Figure(figsize=(5, 2.3), layout="constrained", dpi=72)
        _draw_bars(figure.subplots(), share[step], f"{title}: step {step}")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        frames.append(Image.open(buffer).convert("RGB"))
    out = io.BytesIO()
    frames[0].save(
        out,
        format="PNG",
        save_all=True,
        default_image=True,
        append_images=frames[1:],
        duration=[300] * (len(steps) - 1) + [2400],  # milliseconds
        loop=0,
    )
    return out.getvalue()


def _draw_bars(ax: Axes, share_E: np.ndarray, title: str) -> Axes:
    E = len(share_E)
    colors = [plots.COLORS[e % len(plots.COLORS)] for e in range(E)]
    ax.bar(range(E), share_E, color=colors)
    ax.axhline(1 / E, color=plots.NEUTRAL, linestyle=":", linewidth=0.8)
    ax.set(ylim=(0, 1), xlabel="expert", ylabel="share of the batch")
    ax.set_title(title, fontsize=10)
    ax.set_xticks(range(E))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    return ax


def settings_figure(record: dict[str, Any]) -> Figure:
    """Tell the settings study in one figure: a row for each task."""
    figure = Figure(figsize=(15, 8.4), layout="constrained", dpi=100)
    axes = figure.subplots(len(record["tasks"]), 3, width_ratios=(1.25, 1.0, 1.25))
    for row, task in zip(axes, record["tasks"], strict=True):
        part = rich_get_richer.of_task(record, task)
        name = task.capitalize()
        plot_effective_seeds(row[0], part, f"{name}: effective experts")
        plot_plane(row[1], part, f"{name}: balance and decisiveness", legend=False)
        plot_losses(row[2], part, f"{name}: loss on new tokens", "mean squared error")
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9)
    settings = record["settings"]
    figure.supxlabel(
        f"{record['definition']}\nSettings: {settings['num_experts']} experts, {settings['steps']} "
        f"steps of {settings['batch']} tokens, {len(settings['seeds'])} seeds.",
        fontsize=8,
    )
    return figure


def _with_choice(record: dict[str, Any]) -> list[dict[str, Any]]:
    """List the conditions whose layers have more than one expert."""
    return [c for c in record["conditions"] if c["config"]["num_experts"] > 1]


def _wrapped(name: str) -> str:
    """Break a name into lines that fit under a tick."""
    return name.replace(" + ", " +\n") if " + " in name else name.replace(" ", "\n", 1)
