"""Capacity: which choices get a place with their expert, written down as a Plan.

A plan is two maps. `slot_NK` says in which row of the experts' input each choice sits; `token_R`
and `choice_R` say which token and which choice each row holds. Rows are sorted by expert, so the
rows of one expert are one contiguous slice.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from moe_numpy.backend import Array, to_device, to_host, xp
from moe_numpy.config import Capacity


class Plan(NamedTuple):
    """Who sits where. R rows hold the accepted choices, sorted by expert, then by choice.

    slot_NK    row of each choice; R if the choice was dropped
    token_R    token of each row
    choice_R   flat choice n * K + k of each row
    offsets    E + 1 whole numbers: the rows of expert e are offsets[e] to offsets[e + 1]
    """

    slot_NK: Array
    token_R: Array
    choice_R: Array
    offsets: tuple[int, ...]

    @property
    def kept_NK(self) -> Array:
        """Which choices have a row."""
        return self.slot_NK < self.offsets[-1]


def make_plan(
    expert_NK: Array,
    rank_NE: Array,
    prob_NE: Array | None,
    capacity: Capacity | None,
    asked_NK: Array | None = None,
) -> tuple[Array, Plan]:
    """Give the choices their places.

    Without a limit every choice gets a row. With one, the choices queue up in the order of
    `capacity.priority`, and each takes a place with its expert while there is one. A choice that
    finds its expert full is dropped, or (overflow "next_best") moves on to the token's best expert
    that has room and is not one of its other choices, served or not. Each group of `capacity.group`
    tokens has places and a queue of its own. Choices that do not ask (`asked_NK`) take no place.

    With priority "token" no place depends on a later token: within a sequence the routing is
    causal. (In a batch, all tokens of one sequence come before those of the next.) The others are
    not causal.

    Shapes     expert_NK (N, K) integers, best first; rank_NE (N, E) what they were chosen by;
               prob_NE (N, E) for the priorities "bpr" and "score", else unread; asked_NK (N, K)
               booleans, None for all -> expert_NK (N, K) the experts in use, and the plan; a
               dropped choice keeps its expert, so that its gate is still defined
    Source     Lepikhin et al. 2020, GShard, algorithm 1 (choice order, drop, groups); Riquelme et
               al. 2021, V-MoE, section 4 (bpr); Megatron-LM, its drop policy "probs" (score); Fedus
               et al. 2022, appendix B (next best expert)
    """
    N, K = expert_NK.shape
    E = rank_NE.shape[1]
    if capacity is None:
        return expert_NK, _plan(expert_NK, asked_NK, E)
    if asked_NK is None:
        asked_NK = xp.ones((N, K), bool)
    size = capacity.group or max(N, 1)
    tokens = [min(size, N - start) for start in range(0, max(N, 1), size)]  # group by group
    places = [min(capacity.places(n, K, E), n * K) for n in tokens]  # of each expert in the group
    queue = _queue(expert_NK, prob_NE, capacity.priority)
    if capacity.overflow == "next_best":
        return _serve_next_best(expert_NK, rank_NE, queue, asked_NK, places, size)
    accepted_NK = _serve_or_drop(expert_NK, queue, asked_NK, places, size, E)
    return expert_NK, _plan(expert_NK, accepted_NK, E)


def _queue(expert_NK: Array, prob_NE: Array, priority: str) -> Array:
    """Order the flat choices n * K + k; equal probabilities queue in token order."""
    N, K = expert_NK.shape
    flat = xp.arange(N * K)
    if priority == "token":
        return flat
    if priority == "choice":
        return flat.reshape(N, K).T.reshape(-1)
    prob_NK = xp.take_along_axis(prob_NE, expert_NK, 1)
    if priority == "score":
        return xp.argsort(-prob_NK.reshape(-1), kind="stable")
    token_N = xp.argsort(-prob_NK.max(1), kind="stable")  # "bpr"
    return (token_N * K + xp.arange(K)[:, None]).reshape(-1)


def _serve_or_drop(
    expert_NK: Array, queue: Array, asked_NK: Array, places: list[int], size: int, E: int
) -> Array:
    """Accept, in every group, the first choices of every expert that fit into its places.

    A counter is an expert in a group, numbered expert * groups + group; those who do not ask
    stand at a counter of their own, behind all others.
    """
    N, K = expert_NK.shape
    groups = len(places)
    group_N1 = (xp.arange(N) // size)[:, None]
    counter = xp.where(asked_NK, expert_NK * groups + group_N1, E * groups).reshape(-1)
    queued = counter[queue]
    order = _stable_order(queued, E * groups)  # by counter, then by place in the queue
    queued = queued[order]
    rank = xp.arange(order.size) - xp.searchsorted(queued, queued)
    # Only the last group may be smaller than the others.
    limit = xp.where(queued % groups == groups - 1, places[-1], places[0])
    accepted = xp.zeros(order.size, bool)
    accepted[queue[order]] = rank < limit
    return accepted.reshape(N, K) & asked_NK


def _serve_next_best(
    expert_NK: Array,
    rank_NE: Array,
    queue: Array,
    asked_NK: Array,
    places: list[int],
    size: int,
) -> tuple[Array, Plan]:
    """Serve the queue one choice after the other: where one goes depends on all before it.

    The walk is plain Python over host integers, which cross in one piece. It starts with the expert
    that was chosen, then follows the token's ranking of the experts, down to minus infinity.
    """
    (N, K), E = expert_NK.shape, rank_NE.shape[1]
    ranking_NE = xp.argsort(-rank_NE, axis=1, kind="stable")
    allowed_NE = xp.take_along_axis(rank_NE, ranking_NE, 1) > -xp.inf
    ranking_NE = xp.where(allowed_NE, ranking_NE, E)  # expert E never has room
    columns = (expert_NK, queue.reshape(N, K), asked_NK, ranking_NE)
    table = to_host(xp.concatenate(columns, axis=1))
    expert = table[:, :K].reshape(-1).tolist()
    asked = table[:, 2 * K : 3 * K].reshape(-1).tolist()
    ranking = table[:, 3 * K :].tolist()
    rooms = [[places_here] * E + [0] for places_here in places]
    counts = [0] * E
    accepted = [False] * (N * K)
    for choice in table[:, K : 2 * K].reshape(-1).tolist():
        if not asked[choice]:
            continue
        e, token = expert[choice], choice // K
        room = rooms[token // size]
        if not room[e]:
            first = choice - choice % K
            used = expert[first : first + K]
            e = next((e for e in ranking[token] if room[e] and e not in used), None)
            if e is None:
                continue
            expert[choice] = e
        room[e] -= 1
        counts[e] += 1
        accepted[choice] = True
    expert_NK = to_device(expert, expert_NK.dtype).reshape(N, K)
    accepted_NK = to_device(accepted, bool).reshape(N, K)
    return expert_NK, _plan(expert_NK, accepted_NK, E, counts)


def _plan(
    expert_NK: Array, accepted_NK: Array | None, E: int, counts: list[int] | None = None
) -> Plan:
    """Sort the accepted choices (None: all) by expert; `counts` of each, if they are known already.

    Dropped choices sort behind the last expert, as if there were an expert E. How many rows each
    expert has is the one thing that the host must know.
    """
    N, K = expert_NK.shape
    asking_NK = expert_NK if accepted_NK is None else xp.where(accepted_NK, expert_NK, E)
    key = asking_NK.reshape(-1)
    order = _stable_order(key, E)
    if counts is None:
        offsets = tuple(to_host(xp.searchsorted(key[order], xp.arange(E + 1))).tolist())
    else:
        offsets = tuple(itertools.accumulate(counts, initial=0))
    R = offsets[-1]
    choice_R = order[:R]
    slot = xp.empty(N * K, xp.intp)
    slot[order] = xp.minimum(xp.arange(N * K), R)
    return Plan(slot.reshape(N, K), choice_R // K, choice_R, offsets)


def _stable_order(key: Array, largest: int) -> Array:
    """Order whole numbers from 0 to `largest`; equal ones stay in their order.

    Numbers of 16 bits are sorted in two passes, without comparing any.
    """
    if largest < 2**16:
        key = key.astype(xp.uint16)
    return xp.argsort(key, kind="stable")
