"""The published systems as a table, and each on a page: what the command `systems` shows."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from moe_numpy import config, ledger, presets
from moe_numpy.presets import formulas

# What a narrow terminal goes without, in this order.
SPARE = ("paper", "year", "noise", "capacity", "published", "score", "weights", "active")
RIGHT = ("year", "E", "total", "active", "published")


def record(name: str) -> dict[str, Any]:
    """Collect what is known of a system: the columns of the table, and what the page says."""
    preset = presets.get(name)
    moe, counted, paper = preset.model.moe, preset.ledger(), preset.paper
    return {
        "name": name,
        "year": preset.year,
        **formulas.columns(moe),
        "experts": moe.num_experts,
        "k": moe.top_k,
        "parameters_total": counted.parameters,
        "parameters_active": counted.active,
        "parameters_active_without_embedding": counted.active_without_embedding,
        "published_total": preset.published.total,
        "published_active": preset.published.active,
        "published_source": preset.published.source,
        "paper": {"authors": paper.authors, "title": paper.title, "at": paper.at},
        "idea": preset.idea,
        "routing": formulas.routing(moe),
        "model": config.to_dict(preset.model),
        "laptop_model": config.to_dict(presets.tiny(name)),
        "published_size": _rows(counted),
        "laptop_size": _rows(ledger.count(presets.tiny(name))),
        "departs": [text.removeprefix("differs: ") for text in preset.departs],
        "notes": list(preset.notes),
    }


def table(width: int) -> str:
    """Draw all systems, one a line; columns that do not fit into `width` are only named."""
    rows = [_row(name) for name in presets.names()]
    shown, left_out = list(rows[0]), []
    for column in (None, *SPARE):
        if column is not None:
            shown.remove(column)
            left_out.append(column)
        lines = _align(rows, shown)
        if len(lines[0]) <= width:
            break
    if left_out:
        text = f"A wider terminal also shows: {', '.join(left_out)}."
        lines += ["", *textwrap.wrap(text, width)]
    lines += ["", "One of them: python -m moe_numpy systems NAME"]
    return "\n".join(lines)


def page(name: str, width: int) -> str:
    """Describe one system, in lines of at most 100 columns."""
    width = min(width, 100)
    preset, tiny = presets.get(name), presets.tiny(name)
    moe, paper = preset.model.moe, preset.paper
    blocks = [
        _wrap(f"{name} ({preset.year})", width),
        _wrap(f"{paper.authors}: {paper.title.removesuffix('.')}. {paper.at}", width),
        "",
        _wrap(preset.idea, width),
        *_section("Routing", formulas.routing(moe), width),
        *_section("The layer", [_settings(moe)], width),
        *_section("The model around it", [_settings(preset.model)], width),
        *_section("Sizes", [], width),
        _sizes(preset.ledger(), ledger.count(tiny)),
        *(_wrap(text, width, "  ") for text in _printed(preset)),
        *_section("Where it departs from the paper", _items(preset.departs), width),
        *(_section("Notes", _items(preset.notes), width) if preset.notes else ()),
        "",
        *_try(preset, width),
    ]
    return "\n".join(blocks)


def amount(number: float | None) -> str:
    """Write a number in three digits: 46.7 B."""
    if number is None:
        return "-"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"


def _row(name: str) -> dict[str, str]:
    preset = presets.get(name)
    counted, printed = preset.ledger(), preset.published
    active = counted.active if printed.with_embedding else counted.active_without_embedding
    published = "-"
    if printed.total is not None:
        published = f"{printed.total / 1e9:g}"
        published += "" if printed.active is None else f" / {printed.active / 1e9:g}"
        published += " B"
    return {
        "name": name,
        "year": str(preset.year),
        "E": str(preset.model.moe.num_experts),
        **formulas.columns(preset.model.moe),
        "total": amount(counted.parameters),
        "active": amount(active),
        "published": published,
        "paper": preset.paper.at.removeprefix("arXiv "),
    }


def _align(rows: list[dict[str, str]], names: list[str]) -> list[str]:
    cells = [{name: name for name in names}, *rows]
    widths = {name: max(len(row[name]) for row in cells) for name in names}
    lines = []
    for row in cells:
        aligned = (
            row[name].rjust(widths[name]) if name in RIGHT else row[name].ljust(widths[name])
            for name in names
        )
        lines.append(" ".join(aligned).ljust(sum(widths.values()) + len(names) - 1))
    return [lines[0], *(line.rstrip() for line in lines[1:])]


def _rows(counted: ledger.Ledger) -> dict[str, dict[str, int]]:
    return {
        row.part: {name: n for name, n in dataclasses.asdict(row).items() if name != "part"}
        for row in counted.rows
    }


def _sizes(published: ledger.Ledger, tiny: ledger.Ledger) -> str:
    """Set the parts of both sizes side by side."""
    lines = [f"  {'':18} {'published':>10} {'active':>10}    {'laptop':>8} {'active':>8}"]
    for row in published.rows:
        small = tiny[row.part]
        if row.parameters:
            lines.append(
                f"  {row.part:18} {amount(row.parameters):>10} {amount(row.active):>10}    "
                f"{small.parameters:>8,} {small.active:>8,}"
            )
    lines.append(
        f"  {'all':18} {amount(published.parameters):>10} {amount(published.active):>10}    "
        f"{tiny.parameters:>8,} {tiny.active:>8,}"
    )
    lines.append(f"  {'flops per token':18} {amount(published.flops):>21}    {tiny.flops:>17,}")
    read = amount(published.weight_bytes(2)), tiny.weight_bytes(4)
    lines.append(f"  {'bytes per token':18} {read[0]:>21}    {read[1]:>17,}")
    return "\n".join(lines)


def _printed(preset: presets.Preset) -> list[str]:
    """Compare with the printed sizes, and say what the counts mean."""
    printed, counted = preset.published, preset.ledger()
    text = (
        f"Work at sequence length {counted.context:,}. Bytes are of the weights that one token "
        "alone makes the machine read, at two a number as published and four here."
    )
    if counted.active_without_embedding < counted.active:
        without = amount(counted.active_without_embedding)
        text += f" Without the embedding, which is only looked up, {without} are active."
    texts = [text]
    if printed.total is not None:
        text = f"Printed: {amount(printed.total)} parameters"
        text += "" if printed.active is None else f", {amount(printed.active)} active"
        texts.append(f"{text} ({printed.source}).")
    return texts


def _try(preset: presets.Preset, width: int) -> list[str]:
    """Say how to run its laptop size."""
    if preset.model.causal:
        return ["Train its laptop size:", f"  python -m moe_numpy train --preset {preset.name}"]
    text = (
        "An encoder: it has seen the token that it would have to predict, so `train` does not "
        f"take it. Its laptop size: moe_numpy.presets.tiny('{preset.name}')."
    )
    return [_wrap(text, width)]


def _settings(cfg: Any) -> str:
    inner = ", ".join(f"{name}={text}" for name, text in formulas.knobs(cfg))
    return f"{type(cfg).__name__}({inner})"


def _items(texts: tuple[str, ...]) -> list[str]:
    return [f"- {text.removeprefix('differs: ')}" for text in texts]


def _section(title: str, lines: list[str], width: int) -> list[str]:
    return ["", title, *(_wrap(line, width, "  ") for line in lines)]


def _wrap(text: str, width: int, indent: str = "") -> str:
    """Fill lines; what goes on after the first of an indented text stands further in."""
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=2 * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
