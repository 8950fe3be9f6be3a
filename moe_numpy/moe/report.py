"""What a MoE layer did in one forward pass: facts for records and plots, without gradient."""

from __future__ import annotations

from typing import NamedTuple

from moe_numpy.backend import Array, xp
from moe_numpy.moe.capacity import Plan


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


def entropy_of(logit_NE: Array, prob_NE: Array, score: str = "softmax") -> Array:
    """Compute the entropy of each token's probabilities, in nats.

    For a softmax without a logarithm for every entry: log sum exp(z) is max z - log max p.

    Shapes     logit_NE, prob_NE (N, E) -> entropy_N (N,)
    """
    if score != "softmax":
        return -(prob_NE * xp.log(xp.maximum(prob_NE, 1e-30))).sum(1)
    return logit_NE.max(1) - xp.log(prob_NE.max(1)) - (prob_NE * logit_NE).sum(1)


def make_report(prob_NE: Array, entropy_N: Array, wished_NK: Array, plan: Plan) -> MoEReport:
    """Count and average what the router did.

    Shapes     prob_NE (N, E), each row summing to one; entropy_N (N,); wished_NK (N, K) integers
    """
    N, E = prob_NE.shape
    return MoEReport(
        wished_E=xp.bincount(wished_NK.reshape(-1), minlength=E),
        load_E=xp.diff(xp.asarray(plan.offsets)),
        dropped=plan.slot_NK.size - plan.offsets[-1],
        decisiveness=prob_NE.max(1).sum() / max(N, 1),
        gate_entropy=entropy_N.sum() / max(N, 1),
    )
