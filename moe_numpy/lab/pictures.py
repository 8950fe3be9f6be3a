"""Pictures for the chapters: numbers in colored grids, tokens on their way to experts, audits.

Each helper draws on the axes that it is given and returns them. Colors are those of `lab.plots`.
"""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moe_numpy.lab.plots import BAD, COLORS, GOOD, NEUTRAL
from moe_numpy.moe.capacity import Plan

SIGNED = LinearSegmentedColormap.from_list("signed", (BAD, "white", GOOD))
STRENGTH = LinearSegmentedColormap.from_list("strength", ("#D9ECF7", GOOD, "#00304D"))
MINUS = "\N{MINUS SIGN}"
VOID, ZERO = "#E4E4E4", "black"
ROUNDING = 1e-12  # a gradient norm below this is zero in exact arithmetic


def plot_grid(
    ax: Axes,
    values: np.ndarray,
    title: str = "",
    rows: str = "token n",
    columns: str = "expert e",
    digits: int = 2,
    marked: np.ndarray | None = None,
    names: list[str] | None = None,
    limit: float | None = None,
) -> Axes:
    """Show a matrix as a colored grid with its numbers.

    Positive numbers are blue, negative ones orange, zero is white; minus infinity and NaN are gray.

    Parameters
    ----------
    values : array (rows, columns), numbers of any kind.
    rows, columns : what the axes count.
    digits : after the point; none for integers.
    marked : array of booleans, the cells that get a frame.
    names : of the rows, written beside their index.
    limit : size that gets the full color; the largest in the matrix if None.
    """
    values = np.asarray(values)
    finite = np.isfinite(values)
    known = np.where(finite, values, 0.0)
    limit = limit or float(np.abs(known).max()) or 1.0
    colors = SIGNED(Normalize(-1.6, 1.6)(known / limit))  # full color would hide the numbers
    colors[~finite] = 0.9, 0.9, 0.9, 1.0
    ax.imshow(colors, aspect=0.62)
    whole = values.dtype.kind in "iu"
    for (row, column), value in np.ndenumerate(values):
        text = f"{value}" if whole else _number(value, digits)
        faint = not np.isfinite(value) or (value == 0 and not whole)
        ax.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=8,
            color=NEUTRAL if faint else "black",
        )
        if marked is not None and marked[row, column]:
            corner = (column - 0.48, row - 0.48)
            ax.add_patch(Rectangle(corner, 0.96, 0.96, fill=False, linewidth=1.4))
    labels = [str(n) if names is None else f"{names[n]}  {n}" for n in range(len(values))]
    ax.set_yticks(range(len(values)), labels)
    ax.set_xticks(range(values.shape[1]))
    ax.set(xlabel=columns, ylabel=rows)
    ax.set_title(title, fontsize=10)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def plot_dispatch(ax: Axes, expert_NK: np.ndarray, plan: Plan, names: list[str]) -> Axes:
    """Draw the dispatch: an arrow from every token to the rows that hold its copies.

    Solid arrows are first choices, dashed ones later choices. A choice without a place ends at a
    cross beside its expert.

    Parameters
    ----------
    expert_NK : array (N, K), the experts that were chosen.
    plan : who got which row.
    names : of the N tokens.
    """
    N, K = expert_NK.shape
    R, E = plan.offsets[-1], len(plan.offsets) - 1
    height_R, box_E = _places(plan.offsets, N)
    height_N = np.linspace(0.5, N - 0.5, N)
    for n in range(N):
        label = f"{names[n]}  {n}"
        ax.text(-0.03, height_N[n], label, ha="right", va="center", fontsize=10)
        for k in range(K):
            e, r = int(expert_NK[n, k]), int(plan.slot_NK[n, k])
            lost = r == R
            end = (0.975, box_E[e][1] + 0.13) if lost else (1.0, height_R[r])
            arrow = {
                "arrowstyle": "-" if lost else "-|>",
                "color": COLORS[e],
                "linestyle": "-" if k == 0 else "--",
                "linewidth": 1.0 if lost else 1.5,
                "shrinkA": 2,
                "shrinkB": 0,
            }
            ax.annotate("", end, (0.0, height_N[n]), arrowprops=arrow)
            if lost:
                ax.plot(*end, "X", color=BAD, markersize=9, markeredgecolor="white", zorder=5)
    for e in range(E):
        top, bottom = box_E[e]
        style = {"facecolor": COLORS[e], "alpha": 0.22, "edgecolor": "none"}
        ax.add_patch(Rectangle((1.0, top), 0.3, bottom - top, **style))
        ax.text(1.33, (top + bottom) / 2, f"expert {e}", va="center", fontsize=10)
    for r in range(R):
        copy = f"r={r}: {names[int(plan.token_R[r])]}"
        ax.text(1.02, height_R[r], copy, va="center", fontsize=8)
    ax.set(xlim=(-0.25, 1.55), ylim=(N + 0.1, -0.1), xlabel="token n, its choices, its rows r")
    ax.set_ylabel("tokens in reading order")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return ax


def plot_kink(
    ax: Axes, logit: np.ndarray, curves: dict[str, np.ndarray], tie: float, ylabel: str
) -> Axes:
    """Draw values or slopes against one logit, broken where the set of chosen experts changes.

    Parameters
    ----------
    logit : array (M,), rising; none of them is the tie itself.
    curves : arrays (M,) by name.
    tie : the logit at which the set changes; empty and filled dots mark the two sides.
    ylabel : what the curves are.
    """
    before = logit < tie
    for color, (name, curve) in zip(COLORS, curves.items(), strict=False):
        ax.plot(logit[before], curve[before], color=color, label=name)
        ax.plot(logit[~before], curve[~before], color=color)
        ends = curve[before][-1], curve[~before][0]
        if abs(ends[1] - ends[0]) > 0.01 * np.ptp(curve):
            ax.plot(tie, ends[0], "o", color=color, markersize=5)
            ax.plot(tie, ends[1], "o", color=color, markersize=5, markerfacecolor="white")
    ax.axvline(tie, color=NEUTRAL, linewidth=0.8, linestyle=":")
    ax.set(xlabel="the logit that moves", ylabel=ylabel)
    return ax


def plot_audit(
    ax: Axes,
    norm: np.ndarray,
    refused: np.ndarray,
    terms: tuple[str, ...],
    groups: tuple[str, ...],
    title: str = "",
) -> Axes:
    """Draw how much gradient each loss term (row) sends to each group of parameters (column).

    Zero is black, what is not defined gray; the blue of the others grows with the logarithm. A
    star marks a pairing that the configuration refuses.

    Parameters
    ----------
    norm : array (terms, groups) of gradient norms, NaN where the term is not defined.
    refused : array (terms,) of booleans.
    """
    scale = LogNorm(1e-3, 10.0)
    for (row, column), value in np.ndenumerate(norm):
        zero = value < ROUNDING
        color = VOID if np.isnan(value) else ZERO if zero else STRENGTH(scale(value))
        text = "not\ndefined" if np.isnan(value) else "0" if zero else f"{value:.2g}"
        ink = "black" if np.isnan(value) else "white" if zero or scale(value) > 0.35 else "black"
        style = {"facecolor": color, "edgecolor": "white", "linewidth": 1.5}
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **style))
        size = 7 if np.isnan(value) else 9
        ax.text(column, row, text, ha="center", va="center", color=ink, fontsize=size)
    names = [f"{t} *" if r else t for t, r in zip(terms, refused, strict=True)]
    ax.set_yticks(range(len(terms)), names, fontsize=9)
    ax.set_xticks(range(len(groups)), groups, fontsize=8)
    ax.set(xlim=(-0.5, len(groups) - 0.5), ylim=(len(terms) - 0.5, -0.5))
    ax.set(xlabel="parameters that are reached", ylabel="loss term, alone")
    ax.set_title(title, fontsize=11)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def use_small_png() -> None:
    """Let a notebook keep its figures with 256 colors: a third of the size, alike to the eye."""
    from IPython import get_ipython

    get_ipython().display_formatter.formatters["image/png"].for_type(Figure, small_png)


def small_png(figure: Figure) -> bytes:
    """Draw a figure as PNG with a palette of 256 colors, the same bytes each time."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight")
    image = Image.open(drawn).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def _number(value: float, digits: int) -> str:
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return f"{MINUS}∞" if value < 0 else "∞"
    if value == 0:
        return "0"
    return f"{value:.{digits}f}".replace("-", MINUS)


def _places(offsets: tuple[int, ...], N: int) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Stack the rows of the experts from the top; an expert without rows keeps half a line."""
    counts = np.diff(offsets)
    lines = np.maximum(counts, 0.5) + 0.6
    unit = N / lines.sum()
    start_E = (np.cumsum(lines) - lines) * unit
    box_E = [(float(s), float(s + (n - 0.6) * unit)) for s, n in zip(start_E, lines, strict=True)]
    heights = [s + (i + 0.5) * unit for s, n in zip(start_E, counts, strict=True) for i in range(n)]
    return np.array(heights), box_E
