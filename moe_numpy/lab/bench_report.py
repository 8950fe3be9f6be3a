"""The records of the benchmark in words: tables, and which of its aims are met."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

FLAT = 1.25  # a token in the second half of a text may take so many times one in the first


class Verdict(NamedTuple):
    """An aim of the benchmark: its number, `measured` in words, and whether it is `met`.

    None: that was not measured.
    """

    line: int
    wanted: str
    measured: str
    met: bool | None


def table(record: dict[str, Any]) -> str:
    """Write the record as lines of text: one for each side, below each row its further facts."""
    lines = [machine_line(record), f"{'':<46} {'ms':>9} {'ratio to the first (spread)':>30}"]
    for row in record["rows"]:
        lines.append(_title(row) + _busy(row))
        for side in row["sides"]:
            time, ratio = f"{side['milliseconds']['median']:9.4g}", side["ratio"]
            text = f"  {side['name']:<44} {time} {'' if ratio is None else _spread(ratio):>30}"
            lines.append(text.rstrip())
        lines += [f"    {line}" for line in _facts(row)]
    found = [verdict_line(verdict) for verdict in verdicts(record)]
    return "\n".join([*lines, "", *found] if found else lines)


def steps_table(record: dict[str, Any]) -> str:
    """Write what every step of speed gains: time without it over time with it, per row."""
    rows, names = record["rows"], labels(record["rows"])
    wide = 1 + max(map(len, names.values()))
    lines = [machine_line(record), " " * wide + "".join(f"{n:>22}" for n in row_names(record))]
    lines += [f"{'all steps (ms)':<{wide}}" + "".join(f"{_first(row):>22.4g}" for row in rows)]
    for step, label in names.items():
        cells = [gain(row, step) for row in rows]
        texts = ["" if found is None else _spread(found) for found in cells]
        lines.append((f"{label:<{wide}}" + "".join(f"{text:>22}" for text in texts)).rstrip())
    return "\n".join(lines)


def row_names(record: dict[str, Any]) -> list[str]:
    """Name the rows of steps, and their threads where those are not the record's."""
    found = []
    for row in record["rows"]:
        threads = f", {row['threads']} thread{'s' * (row['threads'] > 1)}"
        found.append(row["name"] + threads * (row["threads"] != record["threads"]))
    return found


def labels(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Name the steps of all rows."""
    sides = [zip(row["steps"], row["sides"][1:], strict=True) for row in rows]
    return {step: side["name"] for pairs in sides for step, side in pairs}


def gain(row: dict[str, Any], step: str) -> dict[str, float] | None:
    """Find what a step gains in a row of steps; None where it has no place."""
    if step not in row["steps"]:
        return None
    return row["sides"][1 + row["steps"].index(step)]["ratio"]


def summary(record: dict[str, Any], *others: dict[str, Any]) -> str:
    """Write the ratios to every rival of training and writing as a table in Markdown.

    Further records, of other machines, add a column of ratios each.
    """
    lines = _head("", "ratio", record, others)
    for row in record["rows"]:
        if row["row"] in ("product", "step", "generation"):
            threads = row.get("threads", record["threads"])
            title = f"{_title(row)}, {threads} thread{'s' * (threads > 1)}"
            for side in row["sides"][1:]:
                times = [f"{side['milliseconds']['median']:.4g}", f"{_first(row):.4g}"]
                cells = [f"{title}: {side['name']}", *times, _spread(side["ratio"])]
                found = [_ratios(_same(row, other)).get(side["name"]) for other in others]
                cells += ["not measured" if ratio is None else _spread(ratio) for ratio in found]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def layer_summary(record: dict[str, Any], *others: dict[str, Any]) -> str:
    """Write what a layer costs beside the rival with the smallest ratio as a table in Markdown.

    Further records, of other machines, add a column each, with their smallest ratio.
    """
    lines = _head("top-2 layer", "smallest ratio", record, others)
    for row in _rows(record, "layer"):
        if row["top_k"] == 2:
            hidden, tokens = row["hidden"], row["tokens"]
            title = f"{row['experts']:,} experts of hidden {hidden}, {tokens:,} tokens"
            side = _closest(row)
            if side is None:
                continue
            time = f"{side['milliseconds']['median']:.4g} ({side['name']})"
            cells = [title, time, f"{_first(row):.4g}", _spread(side["ratio"])]
            found = [_closest(_same(row, other)) for other in others]
            cells += ["not measured" if side is None else _spread(side["ratio"]) for side in found]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _head(title: str, ratio: str, record: dict[str, Any], others: tuple) -> list[str]:
    ratios = [f"{ratio}, {_processor(found)}" for found in (record, *others)]
    cells = [title, "rival (ms)", "ours (ms)", *(ratios if others else [ratio])]
    return [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]


def _processor(record: dict[str, Any]) -> str:
    """Name the processor, without the marks and words that all names have."""
    return re.sub(r"\(R\)|\(TM\)|Processor|CPU|@.*", "", record["machine"]["cpu"]).strip()


def _same(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Find the row of another record that measures the same; one without sides if none does."""
    return next((found for found in other["rows"] if _title(found) == _title(row)), {"sides": []})


def _closest(row: dict[str, Any]) -> dict[str, Any] | None:
    """Choose the rival with the smallest ratio; None if nobody was raced."""
    return min(row["sides"][1:], key=lambda side: side["ratio"]["median"], default=None)


def verdict_line(verdict: Verdict) -> str:
    """Say one verdict in a line."""
    met = {True: "met", False: "NOT MET", None: "not measured"}[verdict.met]
    return f"{verdict.line}  {verdict.wanted:<66} {verdict.measured:<22} {met}".rstrip()


def verdicts(record: dict[str, Any]) -> list[Verdict]:
    """Hold the record against the aims, which are for two threads and the full sizes.

    Ratios are the other's time over ours, medians unless a spread is told. "Not slower" asks that
    the spread reaches 1: it is about what no noise explains.
    """
    if record["quick"] or record["threads"] != 2:
        return []
    return [
        *_step_verdicts(record),
        *_layer_verdicts(record),
        *_other_verdicts(record),
        *_frugal_verdicts(record),
    ]


def _step_verdicts(record: dict[str, Any]) -> Iterator[Verdict]:
    rows = {row["name"]: _ratios(row) for row in _rows(record, "step")}
    dense, moe, mixtral = (rows.get(name, {}) for name in ("dense", "MoE", "Mixtral"))
    yield _least(1, "dense step against PyTorch eager", dense, ["PyTorch eager"], 1.05)
    yield _least(2, "Mixtral step against Transformers", mixtral, ["Transformers eager"], 1.35)
    fastest = [name for name in mixtral if "fused" in name]
    yield _least(2, "Mixtral step against its fastest setting", mixtral, fastest, 1.1)
    yield _least(3, "MoE step against the textbook loop", moe, ["PyTorch, textbook loop"], 1.3)
    best = [name for name in moe if "textbook" not in name]
    yield _least(3, "MoE step against the best of sorted, batched and grouped", moe, best, 1.1)


def _layer_verdicts(record: dict[str, Any]) -> Iterator[Verdict]:
    for row in _rows(record, "layer"):
        if row["name"] == "wide" and row["top_k"] == 2:
            what, ratios = f"layer of {row['experts']} experts against the best", _ratios(row)
            wanted = f"{what}: not slower beyond noise"
            if row["experts"] >= 128:
                yield _least(4, what, ratios, list(ratios), 2.2)
            elif not ratios:
                yield Verdict(4, wanted, "", None)
            else:
                worst = min(ratios.values(), key=lambda ratio: ratio["median"])
                yield Verdict(4, wanted, _spread(worst), worst["high"] >= 1)


def _other_verdicts(record: dict[str, Any]) -> Iterator[Verdict]:
    for row in _rows(record, "growth"):
        ratio = row["sides"][-1]["ratio"]
        yield _most(4, "fine-grained layer, cost of 1,024 experts over 8", ratio, 7)
    for row in _rows(record, "overhead"):
        ratio = row["sides"][1]["ratio"]
        yield _most(5, "MoE layer over a dense MLP of the same work", ratio, 1.15)
    for row in _rows(record, "generation"):
        ratios = _ratios(row)
        yield _least(6, "generation against Transformers generate", ratios, list(ratios), 8)
        first, last = halves(row)
        yield _most(6, "a token of the second half over one of the first", last / first, FLAT)


def _frugal_verdicts(record: dict[str, Any]) -> Iterator[Verdict]:
    for row in _rows(record, "step"):
        over = row["products"]["step_over_products"]
        yield _most(7, f"{row['name']} step over its matrix products alone", over, 1.6)
    for row in _rows(record, "step"):
        if row.get("narrow"):
            over = row["narrow"]["step_over_products"]
            yield _most(7, f"{row['name']} step over its products, kernels for AVX2", over, 1.6)
    for row in _rows(record, "step"):
        ours, *others = (side["peak"] for side in row["sides"])
        share = ours / min(others) if ours and others else None
        yield _most(8, f"{row['name']} step, peak memory over the least of PyTorch's", share, 0.4)


def _least(line: int, what: str, ratios: dict, names: list[str], bound: float) -> Verdict:
    """Ask that the least of the named ratios reaches the bound."""
    wanted = f"{what}: at least {bound:g}"
    found = [ratios[name] for name in names if name in ratios]
    if not found:
        return Verdict(line, wanted, "", None)
    worst = min(found, key=lambda ratio: ratio["median"])
    return Verdict(line, wanted, _spread(worst), worst["median"] >= bound)


def _most(line: int, what: str, found: dict[str, float] | float | None, bound: float) -> Verdict:
    """Ask that a number, or the median of a spread, stays within the bound."""
    wanted = f"{what}: at most {bound:g}"
    if found is None:
        return Verdict(line, wanted, "", None)
    if isinstance(found, dict):
        return Verdict(line, wanted, _spread(found), bool(found["median"] <= bound))
    return Verdict(line, wanted, f"{found:.2f}", bool(found <= bound))


def _rows(record: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if row["row"] == kind]


def _ratios(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {side["name"]: side["ratio"] for side in row["sides"][1:]}


def _first(row: dict[str, Any]) -> float:
    """Read our own median, in milliseconds."""
    return row["sides"][0]["milliseconds"]["median"]


def halves(row: dict[str, Any]) -> list[float]:
    """Take the median time of a token in both halves of a text, without the first four."""
    return [float(np.median(part)) for part in np.array_split(row["by_length"][4:], 2)]


def machine_line(record: dict[str, Any]) -> str:
    """Name the machine, the threads and the versions that the numbers belong to."""
    found = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = f"threads: {record['threads']}, cores: {found['cores']}"
    kernels = f", kernels for {found['kernels']}" if found.get("kernels") else ""
    return f"{found['cpu']}; {threads}; {found['blas']}{kernels}; {versions}"


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
    if row["row"] == "layer" and row.get("processes", 1) > 1:
        yield f"ours: {row['processes']} processes share the experts out"
    if "by_length" in row:
        first, last = halves(row)
        yield f"a token takes {first:.3g} ms in the first half, {last:.3g} ms in the second"
    if "products" in row:
        found = row["products"]
        yield f"matrix products alone: {found['calls']} calls, {_percent(found['share'])} of a step"
        times = f"{_spread(found['step_over_products'])} times its products"
        yield f"a step takes {times}{_busy(found)}"
        if row.get("narrow"):
            over = _spread(row["narrow"]["step_over_products"])
            yield f"with kernels for AVX2 it takes {over} times its products, which are slower then"
        rate = f"{_percent(found['step_rate'])} of {found['machine_gflops']['median']:.0f} GFLOP/s"
        yield f"rate of the products' operations in a step: {rate}, the machine's own"
        sizes = {name: f"{name} {count / 2**20:.1f}" for name, count in row["bytes"].items()}
        told = [sizes.pop(name) for name in ("peak of one shard", "formula") if name in sizes]
        yield "MiB of arrays: " + ", ".join(sizes.values())
        if told:
            yield "MiB of arrays at once in a step: " + ", ".join(told)
        if row["shards"] > 1:
            who = "process" if row["processes"] > 1 else "thread"
            split = f"ours in {row['shards']} shards, a {who} each"
            yield f"{split}: without capacity and balance the function of the whole batch"
        if row.get("effective_experts"):
            layers = ", ".join(f"{effective:.1f}" for effective in row["effective_experts"])
            yield f"effective experts of each layer after the steps: {layers}"
        if row["sides"][0]["peak"]:
            peaks = [f"{side['peak'] / 2**20:.0f}" for side in row["sides"]]
            yield "MiB at most, all processes: " + ", ".join(peaks)
        if row["sides"][0].get("built"):
            built = [f"{side['built'] / 2**20:.0f}" for side in row["sides"]]
            yield "MiB of these before the first step: " + ", ".join(built)


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _percent(found: dict[str, float]) -> str:
    return f"{found['median']:.0%} ({found['low']:.0%} to {found['high']:.0%})"
