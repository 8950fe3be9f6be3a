"""Central differences along every element or random directions, and the verdict on a gradient.

Why four evaluations a probe rather than two: a faint gradient (one weight, far from the loss) has
little above the rounding, which grows with 1/h. Two points need a small h, for their truncation is
h^2; at best the worst weight of a two-layer model comes to 1e-8. Four points have h^4: with
h = 5e-4 the same weight comes to 6e-10.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moe_numpy.classroom.contract import DISCRETE, Case, CaseResult, Point, bits, covers

LIMIT = 1e-7  # relative error of a tensor; correct code sits at 1e-13 to 1e-9
DENSE, DENSE_CASE = 200, 600  # every element up to so many in the tensor, and in the whole case,
DIRECTIONS = 8  # else so many random directions: a large case is made of parts that have their own
EXPLAIN = 1000  # a tensor that failed is probed again by element, up to this size, to say where
STEPS = (5e-4, 5e-5, 5e-6)  # the next one is taken when the last changed a decision
CLOSE = 1e-6  # relative; how well a hypothesis about a wrong gradient must fit
# Offset in steps and weight; the widest first, as the likeliest to change a decision.
STENCIL = ((2, -1 / 12), (-2, 1 / 12), (1, 8 / 12), (-1, -8 / 12))


class _Slopes(NamedTuple):
    directions: np.ndarray  # one row a probe
    values: np.ndarray  # derivative along each; NaN where decisions changed at every step
    redrawn: int
    dense: bool  # the directions are the elements, one by one


def _probe(point: Point, leaf: np.ndarray, rng: np.random.Generator, dense: bool) -> _Slopes:
    """Estimate the derivative along every element, or along a few random directions.

    A probe that changes a decision is repeated: an element with a smaller step, a random direction
    with another direction first.
    """
    directions = np.eye(leaf.size) if dense else np.empty((DIRECTIONS, leaf.size))
    values, redrawn = np.full(len(directions), np.nan), 0
    scale = min(1.0, max(1e-2, float(np.sqrt(np.mean(leaf * leaf)))))
    for probe in range(len(directions)):
        for attempt, step in enumerate(STEPS if dense else np.repeat(STEPS, 4)):
            if not dense:
                drawn = rng.standard_normal(leaf.size)
                directions[probe] = drawn / np.linalg.norm(drawn)
            slope = _slope(point, leaf, directions[probe].reshape(leaf.shape), step * scale)
            redrawn += attempt == 0 and slope is None
            if slope is not None:
                values[probe] = slope
                break
    return _Slopes(directions, values, redrawn, dense)


def _slope(point: Point, leaf: np.ndarray, direction: np.ndarray, step: float) -> float | None:
    """Differentiate along `direction`; None if a decision changes on the way.

        f'(0) = (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h + O(h^4)

    The upstream gradient meets the difference of the outputs; a difference of sums rounds more.
    """
    start, slope = leaf.copy(), 0.0
    try:
        for offset, weight in STENCIL:
            leaf[...] = start + (offset * step) * direction
            result = point.call()
            if bits(result, DISCRETE) != point.decisions:
                return None
            change = sum(np.vdot(dy, result[place] - y) for place, y, dy in point.outputs)
            slope += weight * float(change) / step
    finally:
        leaf[...] = start
    return slope


def compare(
    point: Point, analytic: dict[str, np.ndarray], case: Case, rng: np.random.Generator
) -> CaseResult:
    """Probe every leaf and judge it; probe a wrong one again by element, to explain it."""
    small = sum(array.size for array in point.leaves.values()) <= DENSE_CASE
    slopes = {
        leaf: _probe(point, array, rng, dense=small and array.size <= DENSE)
        for leaf, array in point.leaves.items()
    }
    errors, failures = {}, []
    for leaf, found in slopes.items():
        zero = covers(case.zero, leaf)
        errors[leaf], complaint = _judge(analytic[leaf], found, point.floor, zero)
        if complaint and math.isfinite(errors[leaf]):
            array, looked = point.leaves[leaf], slopes
            if not found.dense and array.size <= EXPLAIN:
                looked = slopes | {leaf: _probe(point, array, rng, dense=True)}
            complaint += f"; {_explain(leaf, analytic[leaf], looked)}"
        failures += [f"argument {leaf}: {complaint}"] if complaint else []
    return CaseResult(
        errors,
        failures,
        probes=sum(found.values.size for found in slopes.values()),
        redrawn=sum(found.redrawn for found in slopes.values()),
        skipped=sum(int(np.isnan(found.values).sum()) for found in slopes.values()),
    )


def _judge(
    analytic: np.ndarray, found: _Slopes, floor: float, zero: bool
) -> tuple[float, str | None]:
    """Return the relative error of one leaf, and the complaint unless it is right."""
    known = np.isfinite(found.values)
    if 2 * known.sum() < known.size or not known.any():
        return math.inf, (
            f"decisions changed for {known.size - known.sum()} of {known.size} probes at every "
            "step. Move the case away from ties."
        )
    a, n = (found.directions @ analytic.ravel())[known], found.values[known]
    size_a, size_n = np.linalg.norm(analytic), np.linalg.norm(n)
    sizes = f"the analytic gradient has norm {size_a:.1e}, the numeric one {size_n:.1e}"
    if zero:
        right = max(size_a, size_n) <= floor
        return (0.0, None) if right else (math.inf, f"named truly zero, but {sizes}.")
    if size_n <= floor:
        return math.inf, (
            f"vacuous: it has no effect on the outputs; {sizes}. "
            "Let the case exercise it, or name it in zero."
        )
    error = float(np.linalg.norm(a - n) / max(np.linalg.norm(a), size_n))
    if error <= LIMIT:
        return error, None
    return error, f"relative error {error:.1e} is over the limit {LIMIT:.0e}"


def _explain(leaf: str, analytic: np.ndarray, slopes: dict[str, _Slopes]) -> str:
    """Say where a gradient is most wrong, what stands there, and what may have happened."""
    found = slopes[leaf]
    a, n = found.directions @ analytic.ravel(), found.values
    worst = int(np.nanargmax(np.abs(a - n)))
    where, theirs = f"random direction {worst}", {}
    if found.dense:
        where = str([int(i) for i in np.unravel_index(worst, analytic.shape)])
        a, n = analytic, n.reshape(analytic.shape)
        theirs = {other: slope.values for other, slope in slopes.items() if other != leaf}
    values = f"analytic {a.flat[worst]:.9g}, numeric {n.flat[worst]:.9g}"
    return f"worst at {where}: {values}. Likeliest cause: {_cause(a, n, theirs)}"


def _cause(analytic: np.ndarray, numeric: np.ndarray, theirs: dict[str, np.ndarray]) -> str:
    """Try simple hypotheses on the numbers; `theirs` are the numeric gradients of other leaves."""
    known = np.isfinite(numeric)
    a, n = analytic[known], numeric[known]
    gap = analytic - numeric
    wrong = int((np.abs(gap[known]) > CLOSE * np.abs(n).max()).sum())
    if not a.any():
        return "analytic is zero: the term is missing"
    if not wrong:
        return "nearly right: rounding in an extreme case, or a tiny constant such as eps left out"
    factor = np.vdot(a, n) / np.vdot(n, n)
    if _close(a, factor * n):
        kind = "a sign" if _close(a, -n) else "a constant factor"
        return f"analytic = {factor:#.4g} x numeric: {kind}"
    for other, slope in theirs.items():
        if slope.size == a.size and _close(a, slope):
            return f"analytic equals the numeric gradient of {other}: the order of the results"
    if analytic.ndim > 1 and analytic.shape[-1] == analytic.shape[-2]:
        if _close(analytic, np.swapaxes(numeric, -1, -2)):
            return "analytic equals numeric transposed"
    if analytic.ndim and analytic.shape[-1] > 1 and _close(gap, gap.mean(-1, keepdims=True)):
        return (
            "one constant offset per row: the mean over the last axis was forgotten, "
            "or another projection"
        )
    if 2 * wrong <= n.size:
        return f"only {wrong} of {n.size} values differ: a mask, an index or a branch"
    return "no simple pattern; compare the backward with the derivation line by line"


def _close(left: np.ndarray, right: np.ndarray) -> bool:
    """Compare like `_judge`, less strictly; a value that is not known (NaN) is never close."""
    return bool(np.linalg.norm(left - right) <= CLOSE * np.linalg.norm(right))
