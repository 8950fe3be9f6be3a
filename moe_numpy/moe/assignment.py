"""The balanced assignment: every expert gets equally many tokens, at the largest possible sum.

The experts are the nodes of a graph. An arc from e to f is the move of one token, and costs what
the token loses: score[n, e] - score[n, f], the least among the tokens of e. Every token starts with
its best expert; then one unit after the other goes along the cheapest path from an expert that has
too many tokens to one that has too few. (Successive shortest paths: after each, no other assignment
with the same numbers of tokens has a larger sum.)

Where E does not divide N, N // E places of every expert are its own, and one more comes from a pool
of N % E: the pool is a node too, and an expert takes or returns its extra place at no cost.
"""

from __future__ import annotations

import heapq
import math

from moe_numpy.backend import Array, to_device, to_host, xp

BITS = 52  # of the largest score: what a float64 holds


def balanced_assignment(score_NE: Array) -> Array:
    """Assign every token to one expert so that the sum of the scores is the largest possible.

        maximize sum_n score[n, expert[n]]    with floor(N / E) to ceil(N / E) tokens per expert

    Exact: no other assignment has a larger sum. Of equal sums it always takes the same.
    Plain Python on host numbers, which cross in one piece each way; N may be less than E, or 0.

    Shapes     score_NE (N, E) -> expert_N (N,) integers
    Raises     ValueError if a score is not finite
    Source     Lewis et al. 2021, BASE Layers, section 3.2 (the problem; differs: they solve it by
               an auction); Ahuja, Magnanti and Orlin 1993, Network Flows, section 9.7
    """
    N, E = score_NE.shape
    worth = _whole_numbers(to_host(score_NE).tolist())
    expert = [row.index(max(row)) for row in worth]  # 1. each token's best
    room = [N // E - expert.count(e) for e in range(E)] + [N % E]  # the pool is node E
    heaps = [[[] for _ in range(E)] for _ in range(E)]
    for n, e in enumerate(expert):  # 2. what every move would cost
        _offer(heaps[e], worth[n], n, e)
    cost = [[_cheapest(heap, expert, e) for heap in heaps[e]] + [0] for e in range(E)]
    cost.append([math.inf] * (E + 1))
    while min(room) < 0:  # 3. one unit from too many to too few
        path = _cheapest_path(cost, room)
        for u, v in zip(path[1:], path, strict=False):
            if E in (u, v):
                cost[u][v], cost[v][u] = math.inf, 0
            else:
                _, n = heaps[u][v][0]
                expert[n] = v
                _offer(heaps[v], worth[n], n, v)
        for e in path:
            if e < E:
                cost[e][:E] = [_cheapest(heap, expert, e) for heap in heaps[e]]
        room[path[0]] -= 1
        room[path[-1]] += 1
    return to_device(expert, xp.intp)


def _whole_numbers(rows: list[list[float]]) -> list[list[int]]:
    """Count the scores in units of about 2^-52 of the largest: sums of whole numbers do not round.

    Where sums round, a circle of moves could seem to gain forever. A float32 score down to 2^-28 of
    the largest loses nothing; other digits below a unit are rounded away.
    """
    largest = 0.0
    for score in (score for row in rows for score in row):
        if not math.isfinite(score):
            raise ValueError(
                f"balanced_assignment: scores must be finite, got {score}. "
                "Lower the learning rate, or clip the gradients."
            )
        largest = max(largest, abs(score))
    shift = BITS - math.frexp(largest)[1]
    return [[round(math.ldexp(score, shift)) for score in row] for row in rows]


def _offer(heaps: list[list[tuple[int, int]]], worth: list[int], n: int, e: int) -> None:
    """Put the moves of token n, now with expert e, to all others on the heaps of e."""
    for f, heap in enumerate(heaps):
        if f != e:
            heapq.heappush(heap, (worth[e] - worth[f], n))


def _cheapest(heap: list[tuple[int, int]], expert: list[int], e: int) -> float:
    """Return the cost of the cheapest move; forget the moves of tokens that have left e."""
    while heap and expert[heap[0][1]] != e:
        heapq.heappop(heap)
    return heap[0][0] if heap else math.inf


def _cheapest_path(cost: list[list[float]], room: list[int]) -> list[int]:
    """Find the cheapest path from a node without room to one with room (Bellman and Ford).

    The nodes of the path come from its end to its start.
    """
    far = [0 if places < 0 else math.inf for places in room]
    before: list[int | None] = [None] * len(room)
    changed = [node for node, places in enumerate(room) if places < 0]
    while changed:
        nearer = set()
        for u in changed:
            for v, step in enumerate(cost[u]):
                if far[u] + step < far[v]:
                    far[v], before[v] = far[u] + step, u
                    nearer.add(v)
        changed = sorted(nearer)
    node = min((v for v, places in enumerate(room) if places > 0), key=far.__getitem__)
    path = []
    while node is not None:
        path.append(node)
        node = before[node]
    return path
