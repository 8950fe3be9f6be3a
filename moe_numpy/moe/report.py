"""What an MoE layer did in one forward pass: facts for records and plots, without gradient."""

from __future__ import annotations

from typing import NamedTuple

from moe_numpy.backend import Array, xp
from moe_numpy.moe.capacity import Plan
from moe_numpy.ops import rows


class MoEReport(NamedTuple):
    """What one forward pass did: facts for records and plots, without gradient.

    wished_E      choices per expert as the router made them, before any limit
    load_E        choices per expert that got a place
    dropped       choices that got none
    decisiveness  mean largest probability of a token, from 1 / E to 1
    gate_entropy  mean entropy of a token's probabilities, in nats, from 0 to log E
    """

    wished_E: Array
    load_E: Array
    dropped: int
    decisiveness: Array
    gate_entropy: Array


def make_report(
    logit_NE: Array, prob_NE: Array, wished_NK: Array, plan: Plan, score: str = "softmax"
) -> MoEReport:
    """Count and average what the router did.

    The entropy of a softmax needs no logarithm for every entry: log sum exp(z) is z - log p of any
    one of them, and that of the largest is safe.

    Shapes     logit_NE (N, E); prob_NE (N, E), each row summing to one; wished_NK (N, K) integers
    """
    N, E = prob_NE.shape
    bounds = xp.asarray(plan.offsets)
    best = xp.arange(N), prob_NE.argmax(1)
    top_N = prob_NE[best]
    if score == "softmax":
        finite_NE = rows.finite_below(logit_NE)  # 0 times minus infinity would be NaN
        entropy_N = logit_NE[best] - xp.log(top_N) - rows.dots(prob_NE, finite_NE)[:, 0]
    else:
        entropy_N = -rows.dots(prob_NE, xp.log(xp.maximum(prob_NE, 1e-30)))[:, 0]
    return MoEReport(
        wished_E=xp.bincount(wished_NK.reshape(-1), minlength=E),
        load_E=bounds[1:] - bounds[:-1],
        dropped=plan.slot_NK.size - plan.offsets[-1],
        decisiveness=top_N.sum() / max(N, 1),
        gate_entropy=entropy_N.sum() / max(N, 1),
    )
