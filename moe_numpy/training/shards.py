"""The loss and gradients of a batch, shard by shard: what one step of training computes.

A shard is a run of sequences that is routed by itself, with its own places and balance, as the
groups of GShard are. Shards need nothing of each other, so threads may share them out, or the
processes of a `team`; they are added up in their own order, so who computed them changes no bit.
"""

from __future__ import annotations

import functools

from moe_numpy import machine, tree
from moe_numpy.backend import Array, xp
from moe_numpy.config import ModelConfig, rules
from moe_numpy.moe.report import MoEReport
from moe_numpy.transformer import fit, model


def gradients(
    token_BT: Array,
    target_BT: Array,
    params: model.ModelParams,
    cfg: ModelConfig,
    noise: tuple[Array | None, ...] | None = None,
    smoothing: float = 0.0,
    shards: int = 1,
) -> tuple[model.LossReport, model.ModelParams]:
    """Average the losses of the shards and their gradients.

    Parameters
    ----------
    token_BT, target_BT : integers (B, T); B a multiple of `shards`.
    noise : as `model.draw_noise` draws it, for the whole batch.

    Returns
    -------
    report, gradients
        counts are sums over the shards, everything else is a mean.
    """
    parts = cut(token_BT, target_BT, noise, shards)
    weight = 1.0 / shards
    jobs = [functools.partial(of_one, part, params, cfg, smoothing, weight) for part in parts]
    reports, grads = zip(*machine.share_out(jobs), strict=True)
    return merge(reports), functools.reduce(add, grads)


def cut(
    token_BT: Array, target_BT: Array, noise: tuple[Array | None, ...] | None, shards: int
) -> list[tuple]:
    """Cut a batch into shards: a list of (tokens, targets, noise).

    Raises     ValueError if there is none, they cannot be of the same size, the tokens are no
               table, or there is not one target for each token and one row of noise
    """
    rules.whole_number("shards", "their number", shards, 1)
    fit.check_targets("shards", token_BT, target_BT)
    rule, shape = "tokens must be a table (B, T)", f"the shape {token_BT.shape}"
    rules.require(token_BT.ndim == 2, "shards", rule, shape, "One sequence is token_BT[None].")
    B, T = token_BT.shape
    fine, rule = noise is None or isinstance(noise, tuple), "noise must be a tuple, or None"
    rules.require(fine, "shards", rule, type(noise).__name__, "Draw it with draw_noise.")
    drawn = {getattr(layer, "shape", ())[:1] for layer in noise or () if layer is not None}
    rule, advice = f"noise must have a row for each of {B * T} tokens", "Draw it for this batch."
    rules.require(drawn <= {(B * T,)}, "shards", rule, f"the lengths {sorted(drawn)}", advice)
    fine, rule = B > 0 and B % shards == 0, f"a batch must be a multiple of the shards ({shards})"
    rules.require(fine, "shards", rule, f"{B} sequences", "Choose another number of shards.")
    step = B // shards
    parts = []
    for first in range(0, B, step):
        rows = slice(first * T, (first + step) * T)
        own = noise and tuple(None if layer is None else layer[rows] for layer in noise)
        parts.append((token_BT[first : first + step], target_BT[first : first + step], own))
    return parts


def of_one(
    part: tuple, params: model.ModelParams, cfg: ModelConfig, smoothing: float, weight: float
) -> tuple[model.LossReport, model.ModelParams]:
    """Compute the report of one shard, and `weight` times the gradients of its loss."""
    token_BT, target_BT, noise = part
    loss, report, cache = model.loss_forward(token_BT, target_BT, params, cfg, noise, smoothing)
    return report, model.loss_backward(xp.full_like(loss, weight), cache)


def add(total: tree.Tree, grads: tree.Tree) -> tree.Tree:
    """Add to `total` in place, for gradients that are fresh and nobody else's; return it."""
    pairs = list(zip(tree.leaves(total), tree.leaves(grads), strict=True))

    def add_one(i: int) -> None:
        a, b = pairs[i]
        xp.add(a, b, out=a)

    machine.for_each(add_one, len(pairs), sum(a.size for a, _ in pairs))
    return total


def merge(reports: tuple[model.LossReport, ...]) -> model.LossReport:
    """Add up the counts of the shards' reports, and average the rest."""
    if len(reports) == 1:
        return reports[0]
    mean = 1.0 / len(reports)
    layers = tuple(
        MoEReport(
            wished_E=sum(layer.wished_E for layer in same),
            load_E=sum(layer.load_E for layer in same),
            dropped=sum(layer.dropped for layer in same),
            decisiveness=sum(layer.decisiveness for layer in same) * mean,
            gate_entropy=sum(layer.gate_entropy for layer in same) * mean,
        )
        for same in zip(*(report.layers for report in reports), strict=True)
    )
    return model.LossReport(
        cross_entropy=sum(report.cross_entropy for report in reports) * mean,
        aux=sum(report.aux for report in reports) * mean,
        layers=layers,
    )
