"""Probabilities and gates of a hierarchy: products over its two levels.

Letters of this file: G groups of P experts each (E = G * P, group by group).
"""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, xp
from moe_numpy.moe import router
from moe_numpy.ops import softmax


def hierarchical_log_softmax_forward(logit_NG: Array, logit_NE: Array) -> tuple[Array, Cache]:
    """Compute the logarithm of the experts' probabilities, products over the two levels.

        log p(e) = log softmax(logit_NG)[group of e] + log softmax(logits of e's group)[e]

    Shapes     logit_NG (N, G), logit_NE (N, E) -> log_NE (N, E): exp of a row sums to one
    Cache      the caches of both levels
    Source     Shazeer et al. 2017, eq. 12, over all experts instead of the chosen ones; Morin and
               Bengio 2005, Hierarchical Probabilistic Neural Network Language Model
    """
    N, G = logit_NG.shape
    log_NG, cache_1 = softmax.log_softmax_forward(logit_NG)  # 1. the group
    within_NGP = logit_NE.reshape(N, G, logit_NE.shape[1] // G)
    log_NGP, cache_2 = softmax.log_softmax_forward(within_NGP)  # 2. the expert in it
    log_NGP = log_NG[:, :, None] + log_NGP  # 3. product
    return log_NGP.reshape(logit_NE.shape), (cache_1, cache_2)


def hierarchical_log_softmax_backward(dlog_NE: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `hierarchical_log_softmax_forward`: a group's logarithm was added to P experts'.

    Shapes     dlog_NE (N, E) -> dlogit_NG (N, G), dlogit_NE (N, E)
    """
    cache_1, cache_2 = cache
    (log_NGP,) = cache_2
    dlog_NGP = dlog_NE.reshape(log_NGP.shape)  # 3.
    dwithin_NGP = softmax.log_softmax_backward(dlog_NGP, cache_2)  # 2.
    dlogit_NG = softmax.log_softmax_backward(dlog_NGP.sum(2), cache_1)  # 1.
    return dlogit_NG, dwithin_NGP.reshape(dlog_NE.shape)


def hierarchical_gate_forward(
    logit_NG: Array, logit_NE: Array, expert_NK: Array
) -> tuple[Array, Cache]:
    """Weigh the experts in use by a softmax over their groups times one within each group.

        gate[n, k] = softmax(logits of the groups in use)[group of k]
                     * softmax(logits of the experts in use of that group)[k]

    What is not in use is set to minus infinity. That also weighs a choice that was moved to
    another group for lack of room: its group is in use then, too.

    Shapes     logit_NG (N, G), logit_NE (N, E); expert_NK (N, K) integers, all different in a row
               -> gate_NK (N, K), each row summing to one
    Cache      (gate_NK, gather cache, probability cache)
    Source     Shazeer et al. 2017, eq. 12
    """
    (N, G), E = logit_NG.shape, logit_NE.shape[1]
    used_NE = xp.zeros((N, E), bool)
    xp.put_along_axis(used_NE, expert_NK, True, 1)
    used_NG = used_NE.reshape(N, G, E // G).any(2)
    open_NE = used_NE | xp.repeat(~used_NG, E // G, axis=1)  # a group out of use stays finite
    log_NE, log_cache = hierarchical_log_softmax_forward(
        xp.where(used_NG, logit_NG, -xp.inf), xp.where(open_NE, logit_NE, -xp.inf)
    )  # 1. products, over what is in use
    log_NK, gather_cache = router.raw_gate_forward(log_NE, expert_NK)  # 2. those of the choices
    gate_NK = xp.exp(log_NK)  # 3. out of the logarithm
    return gate_NK, (gate_NK, gather_cache, log_cache)


def hierarchical_gate_backward(dgate_NK: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `hierarchical_gate_forward`; what is not in use has probability and gradient zero.

    With one group in use the primary logits get no gradient, with one expert in each group the
    secondary ones: their gates are the constant 1.

    Shapes     dgate_NK (N, K) -> dlogit_NG (N, G), dlogit_NE (N, E)
    """
    gate_NK, gather_cache, log_cache = cache
    dlog_NK = dgate_NK * gate_NK  # 3.
    dlog_NE = router.raw_gate_backward(dlog_NK, gather_cache)  # 2.
    return hierarchical_log_softmax_backward(dlog_NE, log_cache)  # 1.
