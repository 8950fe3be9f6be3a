"""Check hand-written gradients against central differences, by rules that can fail.

The upstream gradient is drawn at random, each argument's error is relative, an argument without
effect is a failure, and a probe that changes a discrete decision (the integers and booleans that a
forward returns) is redrawn and counted. Before any number is compared, the pair must keep its
contract: pure, deterministic, gradients of the type, shape and dtype of the arguments.

Why four evaluations a probe rather than two: a faint gradient (one weight, far from the loss) has
little above the rounding, which grows with 1/h. Two points need a small h, for their truncation is
h^2; at best the worst weight of a two-layer model comes to 1e-8. Four points have h^4: with
h = 5e-4 the same weight comes to 6e-10.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import traceback
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_numpy import tree
from moe_numpy.classroom import registry

LIMIT = 1e-7  # relative error of a tensor; correct code sits at 1e-13 to 1e-9
FLOOR = 1e-9  # a gradient below FLOOR times the size of the outputs counts as zero
DENSE, DENSE_CASE = 200, 600  # every element up to so many in the tensor, and in the whole case,
DIRECTIONS = 8  # else so many random directions: a large case is made of parts that have their own
EXPLAIN = 1000  # a tensor that failed is probed again by element, up to this size, to say where
STEPS = (5e-4, 5e-5, 5e-6)  # the next one is taken when the last changed a decision
DISCRETE = "iub"  # kinds of dtype that hold decisions: integers and booleans
CLOSE = 1e-6  # relative; how well a hypothesis about a wrong gradient must fit
# Offset in steps and weight; the widest first, as the likeliest to change a decision.
STENCIL = ((2, -1 / 12), (-2, 1 / 12), (1, 8 / 12), (-1, -8 / 12))


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Arguments at which a pair is checked, in float64.

    `name` tells the cases of one pair apart. `zero` names what has a gradient that is truly zero,
    `constant` the float arrays that are not differentiated; both as in "params.router.w_CE".
    """

    name: str
    args: tuple
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    zero: frozenset[str] = frozenset()
    constant: frozenset[str] = frozenset()


class CaseResult(NamedTuple):
    """What the check of one case found; `errors` are relative, by argument or dotted leaf."""

    errors: dict[str, float]  # 0 where both gradients are zero as named, inf where none is defined
    failures: list[str]
    probes: int = 0
    redrawn: int = 0  # probes of which a decision changed
    skipped: int = 0  # those among them that no smaller step could save


class PairResult(NamedTuple):
    """What the check of a pair found: the worst error of each argument over its cases."""

    name: str
    errors: dict[str, float]
    failures: list[str]
    cases: int = 0
    probes: int = 0
    redrawn: int = 0
    skipped: int = 0

    @property
    def passed(self) -> bool:
        """True if nothing failed."""
        return not self.failures


def check_all(
    names: Iterable[str] | None = None,
    cases: dict[str, Callable[[np.random.Generator], list[Case]]] | None = None,
    seed: int = 0,
) -> list[PairResult]:
    """Check every pair of the registry, or those named, at the cases of `classroom.cases`.

    A missing partner, case or docstring fails, and so does a case without a pair. Each pair draws
    from a generator of its own: checked alone it sees the numbers that it sees among all.

    Raises     ValueError if a name is neither a pair nor a case
    """
    if cases is None:
        cases = importlib.import_module("moe_numpy.classroom.cases").CASES
    found = registry.pairs()
    known = sorted({*found, *cases})
    results = []
    for name in known if names is None else names:
        if name not in known:
            raise ValueError(registry.unknown("check_all", "pair", name, known))
        gap = _gap(found.get(name), name, cases)
        if gap:
            results.append(PairResult(name, {}, [f"{name}: {gap}"]))
            continue
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        results.append(check_pair(name, cases[name](rng), rng))
    return results


def check_pair(name: str, cases: list[Case], rng: np.random.Generator) -> PairResult:
    """Check one pair of the registry at every case and keep the worst error of each argument."""
    checks = [check_case(name, case, rng) for case in cases]
    errors: dict[str, float] = {}
    for check in checks:
        for leaf, error in check.errors.items():
            errors[leaf] = max(error, errors.get(leaf, 0.0))
    failures = [failure for check in checks for failure in check.failures]
    return PairResult(
        name,
        errors,
        failures if cases else [f"{name}: no case was given to check it at"],
        cases=len(cases),
        probes=sum(check.probes for check in checks),
        redrawn=sum(check.redrawn for check in checks),
        skipped=sum(check.skipped for check in checks),
    )


def check_case(pair_name: str, case: Case, rng: np.random.Generator) -> CaseResult:
    """Check one pair of the registry at one case, with the functions that stand there now."""
    pair = registry.pair(pair_name)
    if pair.forward is None or pair.backward is None:
        return CaseResult({}, [f"{pair_name}: {_gap(pair, pair_name, [pair_name])}"])
    return check_functions(pair_name, pair.forward, pair.backward, case, rng)


def check_functions(
    name: str, forward: Callable, backward: Callable, case: Case, rng: np.random.Generator
) -> CaseResult:
    """Check any forward and backward that keep the contract, in the registry or not."""
    who = f'{name} (case "{case.name}")' if case.name else name
    try:
        point, analytic = _differentiate(forward, backward, case, rng)
        result = _compare(point, analytic, case, rng)
    except _ContractError as broken:
        return CaseResult({}, [f"{who}: {broken}"])
    return result._replace(failures=[f"{who}, {failure}" for failure in result.failures])


def format_result(result: PairResult) -> str:
    """Write one line: the verdict, the worst error of each argument, the probes redrawn."""
    worst: dict[str, float] = {}
    for leaf, error in result.errors.items():
        argument = leaf.partition(".")[0]
        worst[argument] = max(error, worst.get(argument, 0.0))
    errors = "  ".join(f"{argument} {error:.1e}" for argument, error in worst.items())
    flips = f"decisions changed for {result.redrawn} of {result.probes} probes"
    if result.skipped:
        flips += f", {result.skipped} skipped"
    verdict = "PASS" if result.passed else "FAIL"
    return f"{result.name:<24} {verdict}  {errors}" + (f"  ({flips})" if result.redrawn else "")


def to_json(results: list[PairResult], seed: int = 0) -> dict[str, Any]:
    """Turn results into a record of plain JSON; an error that is not defined becomes None."""
    pairs = []
    for result in results:
        record = result._asdict() | {"passed": result.passed}
        finite = {leaf: (e if math.isfinite(e) else None) for leaf, e in result.errors.items()}
        pairs.append(record | {"errors": finite})
    passed = all(result.passed for result in results)
    return {"passed": passed, "limit": LIMIT, "seed": seed, "pairs": pairs}


def _gap(pair: registry.Pair | None, name: str, cases: Iterable[str]) -> str | None:
    if pair is None:
        return "there is a case but no such pair. Remove the case or write the pair."
    for half, other in (("forward", "backward"), ("backward", "forward")):
        if getattr(pair, half) is None:
            return f"{name}_{other} has no partner. Write {name}_{half} beside it."
    if name not in cases:
        return f"the pair has no case. Add CASES[{name!r}] in classroom/cases.py."
    for fn in (pair.forward, pair.backward):
        if not inspect.getdoc(fn):
            return f"{fn.__name__} has no docstring. Write one, with shapes and source."
    return None


# The contract: what must hold before any number is compared


class _ContractError(Exception):
    """A rule of the contract is broken; the text completes the message."""


class _Point(NamedTuple):
    """The forward at one point, and what is needed to see it change nearby."""

    call: Callable[[], tuple]  # the forward of the arrays below
    leaves: dict[str, np.ndarray]  # private copies of what is differentiated: the probes move them
    outputs: list[tuple[int, np.ndarray, np.ndarray]]  # position, value, upstream gradient
    decisions: list[tuple]
    floor: float  # a gradient below it is zero


def _differentiate(
    forward: Callable, backward: Callable, case: Case, rng: np.random.Generator
) -> tuple[_Point, dict[str, np.ndarray]]:
    """Run the pair once, insist on its contract, and return its gradients by leaf."""
    bound = _call("the case", inspect.signature(forward).bind, *case.args, **case.kwargs)
    wanted = _differentiable(bound.arguments, case)
    before = _bits(bound.arguments)
    result = _call("forward", forward, *bound.args, **bound.kwargs)
    _require(type(result) is tuple and len(result) > 1, "forward must return (*outputs, cache)")
    _require(_bits(bound.arguments) == before, "forward changed its arguments")
    remembered = _bits(result)
    outputs = _differentiable_outputs(result[:-1], rng)

    nearby = _moved(bound, wanted, lambda x: x * (1 + 0.01 * rng.standard_normal(x.shape)))
    _call("forward", forward, *nearby.args, **nearby.kwargs)  # must not disturb the first cache
    upstream = _upstream(result[:-1], outputs, backward)
    given = _bits((upstream, result))
    gradients = _call("backward", backward, *upstream, _relisted(result[-1]))
    analytic = _by_leaf(gradients, wanted)
    _require(_bits((upstream, result)) == given, "backward changed its cache or upstream gradient")
    repeated = _call("second backward", backward, *upstream, _relisted(result[-1]))
    again = _by_leaf(repeated, wanted)
    _require(_bits(again) == _bits(analytic), "a second backward of one cache gave other gradients")
    repeated = _call("forward", forward, *bound.args, **bound.kwargs)
    _require(_bits(repeated) == remembered, "two forwards of the same arguments differ")

    return _near(forward, _moved(bound, wanted, np.copy), wanted, case, result, outputs), analytic


def _near(
    forward: Callable, private: Any, wanted: Iterable[str], case: Case, result: tuple, outputs: list
) -> _Point:
    leaves = {
        leaf: array
        for name in wanted
        for leaf, array in tree.named_leaves(private.arguments[name], name)
        if not _covers(case.constant, leaf)
    }
    call = functools.partial(_call, "forward", forward, *private.args, **private.kwargs)
    size = math.sqrt(sum(np.vdot(dy * y, dy * y) for _, y, dy in outputs))
    return _Point(call, leaves, outputs, _bits(result, DISCRETE), FLOOR * size)


def _differentiable(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """Pick the arguments with a gradient: trees of float arrays that are not named constant."""
    wanted, floats = {}, []
    for name, value in arguments.items():
        leaves = tree.named_leaves(value, name)
        arrays = [(leaf, array) for leaf, array in leaves if isinstance(array, np.ndarray)]
        kinds = {array.dtype.kind for _, array in arrays}
        if "f" not in kinds:
            continue
        floats += [leaf for leaf, _ in arrays]
        if name in case.constant:
            continue
        _require(kinds == {"f"} and len(arrays) == len(leaves), f"{name} mixes floats with others")
        for leaf, array in arrays:
            _require(
                array.dtype == np.float64, f"{leaf} must be float64, the case has {array.dtype}"
            )
        wanted[name] = value
    for named in case.zero | case.constant:
        known = any(_covers({named}, leaf) for leaf in floats)
        _require(known, f"the case names {named!r}, which is none of {', '.join(floats)}")
    _require(bool(wanted), "the case has no argument to differentiate")
    return wanted


def _differentiable_outputs(outs: tuple, rng: np.random.Generator) -> list[tuple]:
    """Draw an upstream gradient for every float output, each by itself."""
    outputs = []
    for place, y in enumerate(outs):
        if not isinstance(y, (np.ndarray, np.floating)) or y.dtype.kind != "f":
            continue
        _require(
            y.dtype == np.float64, f"output {place} is {y.dtype} although all inputs are float64"
        )
        _require(bool(np.isfinite(y).all()), f"output {place} is not finite")
        outputs.append((place, y.copy(), np.asarray(rng.standard_normal(y.shape))[()]))
    _require(bool(outputs), "forward returned no float array before its cache")
    return outputs


def _upstream(outs: tuple, outputs: list[tuple], backward: Callable) -> list:
    """Line the upstream gradients up with the backward's parameters.

    Facts without a gradient are left out, unless the backward counts them (an optional output).
    """
    drawn = {place: dy for place, _, dy in outputs}
    slots = len(inspect.signature(backward).parameters) - 1
    if slots == len(outs):
        return [drawn.get(place) for place in range(len(outs))]
    return list(drawn.values())


def _by_leaf(gradients: Any, wanted: dict[str, Any]) -> dict[str, np.ndarray]:
    """Name a copy of every returned gradient, if all have the form of their arguments.

    None among them stands for an optional argument that the case leaves out.
    """
    gradients = gradients if type(gradients) is tuple else (gradients,)
    gradients = [gradient for gradient in gradients if gradient is not None]
    count, expected = len(gradients), ", ".join(f"d{name}" for name in wanted)
    _require(count == len(wanted), f"backward must return ({expected}), got {count} gradients")
    found: dict[str, np.ndarray] = {}

    def note(leaf: str, array: np.ndarray, gradient: Any) -> None:
        came = (np.shape(gradient), getattr(gradient, "dtype", type(gradient).__name__))
        _require(
            came == (array.shape, array.dtype),
            f"the gradient of {leaf} must be {array.dtype} {array.shape}, got {came[1]} {came[0]}",
        )
        _require(bool(np.isfinite(gradient).all()), f"the gradient of {leaf} is not finite")
        found[leaf] = np.array(gradient)

    for (name, value), gradient in zip(wanted.items(), gradients, strict=True):
        names = tree.from_leaves(value, [leaf for leaf, _ in tree.named_leaves(value, name)])
        try:
            tree.map(note, names, value, gradient)
        except ValueError as error:
            raise _ContractError(
                f"the gradient of {name} has another form than {name}: {error}"
            ) from error
    return found


def _moved(bound: inspect.BoundArguments, wanted: Iterable[str], fn: Callable) -> Any:
    copy = inspect.BoundArguments(bound.signature, bound.arguments.copy())
    for name in wanted:
        copy.arguments[name] = tree.map(fn, bound.arguments[name])
    return copy


def _relisted(cache: Any) -> Any:
    """Copy the lists of a cache, not its arrays: a model's backward may pop them, and only them."""
    if isinstance(cache, list):
        return [_relisted(part) for part in cache]
    return tree.map(_relisted, cache) if isinstance(cache, tuple) else cache


def _covers(names: Iterable[str], leaf: str) -> bool:
    return any(leaf == name or leaf.startswith(f"{name}.") for name in names)


def _call(who: str, fn: Callable, *args: Any, **kwargs: Any) -> Any:
    try:
        return fn(*args, **kwargs)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(line.filename).name}, line {line.lineno}"
        raise _ContractError(f"{who} raised {type(error).__name__} in {where}: {error}") from error


def _require(holds: bool, complaint: str) -> None:
    if not holds:
        raise _ContractError(complaint)


def _bits(value: Any, kinds: str = "fiub") -> list[tuple]:
    """List the exact content of every array and number in nested tuples, dicts and dataclasses."""
    if isinstance(value, (np.ndarray, np.generic, int)):
        array = np.asarray(value)
        return [(array.shape, array.dtype, array.tobytes())] if array.dtype.kind in kinds else []
    if isinstance(value, dict):
        value = value.values()
    elif dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif not isinstance(value, (tuple, list)):
        return []
    return [bits for part in value for bits in _bits(part, kinds)]


# The probes


class _Slopes(NamedTuple):
    directions: np.ndarray  # one row a probe
    values: np.ndarray  # derivative along each; NaN where decisions changed at every step
    redrawn: int
    dense: bool  # the directions are the elements, one by one


def _probe(point: _Point, leaf: np.ndarray, rng: np.random.Generator, dense: bool) -> _Slopes:
    """Estimate the derivative along every element, or along a few random directions.

    A probe that changes a decision is drawn again: another direction, later also a smaller step.
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


def _slope(point: _Point, leaf: np.ndarray, direction: np.ndarray, step: float) -> float | None:
    """Differentiate along `direction`; None if a decision changes on the way.

        f'(0) = (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h + O(h^4)

    The upstream gradient meets the difference of the outputs; a difference of sums rounds more.
    """
    start, slope = leaf.copy(), 0.0
    try:
        for offset, weight in STENCIL:
            leaf[...] = start + (offset * step) * direction
            result = point.call()
            if _bits(result, DISCRETE) != point.decisions:
                return None
            change = sum(np.vdot(dy, result[place] - y) for place, y, dy in point.outputs)
            slope += weight * float(change) / step
    finally:
        leaf[...] = start
    return slope


# The verdict


def _compare(
    point: _Point, analytic: dict[str, np.ndarray], case: Case, rng: np.random.Generator
) -> CaseResult:
    """Probe every leaf and judge it; probe a wrong one again by element, to explain it."""
    small = sum(array.size for array in point.leaves.values()) <= DENSE_CASE
    slopes = {
        leaf: _probe(point, array, rng, dense=small and array.size <= DENSE)
        for leaf, array in point.leaves.items()
    }
    errors, failures = {}, []
    for leaf, found in slopes.items():
        zero = _covers(case.zero, leaf)
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
