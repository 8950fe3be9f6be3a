"""Selections beyond the plain top-k: who chooses whom, under which restrictions.

All are discrete decisions: they compare scores and return integers and booleans, and nothing flows
back through them. A gate reads its probability afterwards, and that has a gradient.
"""

from __future__ import annotations

from moe_numpy.backend import Array, to_host, xp
from moe_numpy.moe import router

FLOOR = 1e-8  # below it a sum of exponentials counts as nothing, as in Megatron-LM


def limited_to_groups(rank_NE: Array, groups: int, kept: int, score: str) -> Array:
    """Let only the experts of the `kept` best groups compete: the others get minus infinity.

        group of expert e = e // (E / groups)
        group score       = its best rank value ("max"), or the sum of its two best ("top2")

    (Hugging Face's DeepSeek-V3 long masked them with 0, and so chose one of them where the biased
    score of a kept expert was negative.) Ties go to the lower group.

    Shapes     rank_NE (N, E); groups divides E -> rank_NE (N, E)
    Source     DeepSeek-AI 2024, DeepSeek-V2, section 2.2.2 (max); DeepSeek-V3, section 2.1.2 (top2)
    """
    N, E = rank_NE.shape
    size = E // groups
    best = 1 if score == "max" else 2
    sorted_groups = xp.sort(rank_NE.reshape(N, groups, size), axis=2)  # 1. score the groups
    score_NG = sorted_groups[:, :, -best:].sum(2)
    kept_groups = router.top_k(score_NG, kept)  # 2. (N, kept)
    group_E = xp.arange(E) // size
    allowed_NE = (kept_groups[:, :, None] == group_E).any(1)
    return xp.where(allowed_NE, rank_NE, -xp.inf)  # 3. mask the others


def expert_choice(prob_NE: Array, places: int) -> tuple[Array, Array]:
    """Let every expert choose its `places` best tokens; a tie goes to the lower token.

    A token gets any number of experts. K is the largest number that a token got, and at least 1;
    a row of the answer is padded with experts that did not choose the token and are not accepted.
    The host must know K: one crossing.

    Shapes     prob_NE (N, E); places may exceed N: then every expert takes all tokens
               -> expert_NK (N, K) integers, all different in a row, those that chose the token
               first, in the order of their index; accepted_NK (N, K) booleans
    Source     Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing, eq. 2
    """
    N, E = prob_NE.shape
    token_PE = xp.argsort(-prob_NE, axis=0, kind="stable")[:places]  # 1. best tokens of each
    chosen_NE = xp.zeros((N, E), bool)
    chosen_NE[token_PE, xp.arange(E)] = True
    most = max(to_host(chosen_NE.sum(1)).tolist(), default=0)  # 2. K
    order_NE = xp.argsort(~chosen_NE, axis=1, kind="stable")  # 3. those that chose come first
    expert_NK = order_NE[:, : max(most, 1)]
    return expert_NK, xp.take_along_axis(chosen_NE, expert_NK, 1)


def sinkhorn(logit_NE: Array, tolerance: float, most: int) -> Array:
    """Scale exp(logit) until every token has the sum 1 / N and every expert the sum 1 / E.

        row[n]    = 1 / (N * sum_e column[e] exp(logit[n, e]))        rows and columns in turn,
        column[e] = 1 / (E * sum_n row[n] exp(logit[n, e]))           from column = 1

    until the mean change of the columns is below `tolerance`, or for `most` rounds. Only the order
    of the experts in a row is used: an expert that many want is divided by its popularity. So the
    answer is a logarithm, which does not underflow, and leaves the row's own factor out:

        balanced[n, e] = logit[n, e] + log column[e]

    differs: the exponent is taken below the row's maximum, so that none overflows (a factor of a
    row is undone by the row's own scale); Megatron-LM has no limit of rounds.

    A round is few launches, and one look from the host at the change.

    Shapes     logit_NE (N, E) -> balanced_NE (N, E)
    Units      nats
    Source     Clark et al. 2022, Unified Scaling Laws for Routed Language Models, appendix B;
               Megatron-LM, moe_utils.sinkhorn
    """
    N, E = logit_NE.shape
    mass_NE = xp.exp(logit_NE - logit_NE.max(1, keepdims=True))
    column_E = xp.ones(E, logit_NE.dtype)
    for _ in range(most):
        before_E = column_E
        row_N = 1.0 / (N * (mass_NE @ column_E + FLOOR))  # 1. every token the same
        column_E = 1.0 / (E * (row_N @ mass_NE + FLOOR))  # 2. every expert the same
        if to_host(xp.abs(column_E - before_E).mean()) < tolerance:
            break
    return logit_NE + xp.log(column_E)


def second_expert_kept(
    second_N: Array, threshold: float, policy: str, coin_N: Array | None = None
) -> Array:
    """Decide for every token whether its second expert is used.

        "random":      coin < w2 / threshold,    a chance of min(1, w2 / threshold)
        "threshold":   w2 > threshold

    w2 is the second weight of the renormalized pair. Without a coin (no noise was drawn) "random"
    keeps all. With the threshold 1/2 the coin is GShard's: 2 w2 > U(0, 1).

    Shapes     second_N (N,) w2; coin_N (N,) uniform from 0 to 1, or None -> kept_N (N,) booleans
    Source     Lepikhin et al. 2020, GShard, algorithm 1; Mesh TensorFlow, _top_2_gating
    """
    if policy == "threshold":
        return second_N > threshold
    if coin_N is None:
        return xp.ones(second_N.shape, bool)
    return coin_N < second_N / threshold
