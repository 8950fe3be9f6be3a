"""The contract of a pair, insisted on before any number is compared.

A pair must be pure and deterministic, return its cache last, and give gradients of the type, shape
and dtype of its arguments. `differentiate` runs it once and returns what the probes start from.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_numpy import tree

FLOOR = 1e-9  # a gradient below FLOOR times the size of the outputs counts as zero
DISCRETE = "iub"  # kinds of dtype that hold decisions: integers and booleans


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


class ContractError(Exception):
    """A rule of the contract is broken; the text completes the message."""


class Point(NamedTuple):
    """The forward at one point, and what is needed to see it change nearby."""

    call: Callable[[], tuple]  # the forward of the arrays below
    leaves: dict[str, np.ndarray]  # private copies of what is differentiated: the probes move them
    outputs: list[tuple[int, np.ndarray, np.ndarray]]  # position, value, upstream gradient
    decisions: list[tuple]
    floor: float  # a gradient below it is zero


def differentiate(
    forward: Callable, backward: Callable, case: Case, rng: np.random.Generator
) -> tuple[Point, dict[str, np.ndarray]]:
    """Run the pair once, insist on its contract, and return its gradients by leaf."""
    bound = call("the case", inspect.signature(forward).bind, *case.args, **case.kwargs)
    wanted = _differentiable(bound.arguments, case)
    before = bits(bound.arguments)
    result = call("forward", forward, *bound.args, **bound.kwargs)
    require(type(result) is tuple and len(result) > 1, "forward must return (*outputs, cache)")
    require(bits(bound.arguments) == before, "forward changed its arguments")
    remembered = bits(result)
    outputs = _differentiable_outputs(result[:-1], rng)

    nearby = _moved(bound, wanted, lambda x: x * (1 + 0.01 * rng.standard_normal(x.shape)))
    call("forward", forward, *nearby.args, **nearby.kwargs)  # must not disturb the first cache
    upstream = _upstream(result[:-1], outputs, backward)
    given = bits((upstream, result))
    gradients = call("backward", backward, *upstream, _relisted(result[-1]))
    analytic = _by_leaf(gradients, wanted, case.zero)
    require(bits((upstream, result)) == given, "backward changed its cache or upstream gradient")
    repeated = call("second backward", backward, *upstream, _relisted(result[-1]))
    again = _by_leaf(repeated, wanted, case.zero)
    require(bits(again) == bits(analytic), "a second backward of one cache gave other gradients")
    repeated = call("forward", forward, *bound.args, **bound.kwargs)
    require(bits(repeated) == remembered, "two forwards of the same arguments differ")

    return _near(forward, _moved(bound, wanted, np.copy), wanted, case, result, outputs), analytic


def _near(
    forward: Callable, private: Any, wanted: Iterable[str], case: Case, result: tuple, outputs: list
) -> Point:
    leaves = {
        leaf: array
        for name in wanted
        for leaf, array in tree.named_leaves(private.arguments[name], name)
        if not covers(case.constant, leaf)
    }
    again = functools.partial(call, "forward", forward, *private.args, **private.kwargs)
    size = math.sqrt(sum(np.vdot(dy * y, dy * y) for _, y, dy in outputs))
    return Point(again, leaves, outputs, bits(result, DISCRETE), FLOOR * size)


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
        require(kinds == {"f"} and len(arrays) == len(leaves), f"{name} mixes floats with others")
        for leaf, array in arrays:
            require(
                array.dtype == np.float64, f"{leaf} must be float64, the case has {array.dtype}"
            )
        wanted[name] = value
    for named in case.zero | case.constant:
        known = any(covers({named}, leaf) for leaf in floats)
        require(known, f"the case names {named!r}, which is none of {', '.join(floats)}")
    require(bool(wanted), "the case has no argument to differentiate")
    return wanted


def _differentiable_outputs(outs: tuple, rng: np.random.Generator) -> list[tuple]:
    """Draw an upstream gradient for every float output, each by itself."""
    outputs = []
    for place, y in enumerate(outs):
        if not isinstance(y, (np.ndarray, np.floating)) or y.dtype.kind != "f":
            continue
        require(
            y.dtype == np.float64, f"output {place} is {y.dtype} although all inputs are float64"
        )
        require(bool(np.isfinite(y).all()), f"output {place} is not finite")
        outputs.append((place, y.copy(), np.asarray(rng.standard_normal(y.shape))[()]))
    require(bool(outputs), "forward returned no float array before its cache")
    return outputs


def _upstream(outs: tuple, outputs: list[tuple], backward: Callable) -> list:
    """Line the upstream gradients up with the backward's parameters.

    Facts without a gradient are left out, unless the backward counts them (an optional output).
    """
    drawn = {place: dy for place, _, dy in outputs}
    parameters = inspect.signature(backward).parameters.values()
    slots = sum(parameter.default is parameter.empty for parameter in parameters) - 1  # but cache
    if slots == len(outs):
        return [drawn.get(place) for place in range(len(outs))]
    return list(drawn.values())


def _by_leaf(gradients: Any, wanted: dict[str, Any], zero: Iterable[str]) -> dict[str, np.ndarray]:
    """Name a copy of every returned gradient, if all have the form of their arguments.

    None among them stands for an optional argument that the case leaves out, or for the zero
    gradients that it names, for all of them.
    """
    gradients = gradients if type(gradients) is tuple else (gradients,)
    gradients = [gradient for gradient in gradients if gradient is not None]
    count, expected = len(gradients), ", ".join(f"d{name}" for name in wanted)
    found: dict[str, np.ndarray] = {}
    if count < len(wanted):
        found = {name: np.zeros_like(wanted[name]) for name in wanted if name in zero}
        wanted = {name: value for name, value in wanted.items() if name not in zero}
    require(count == len(wanted), f"backward must return ({expected}), got {count} gradients")

    def note(leaf: str, array: np.ndarray, gradient: Any) -> None:
        came = (np.shape(gradient), getattr(gradient, "dtype", type(gradient).__name__))
        require(
            came == (array.shape, array.dtype),
            f"the gradient of {leaf} must be {array.dtype} {array.shape}, got {came[1]} {came[0]}",
        )
        require(bool(np.isfinite(gradient).all()), f"the gradient of {leaf} is not finite")
        found[leaf] = np.array(gradient)

    for (name, value), gradient in zip(wanted.items(), gradients, strict=True):
        names = tree.from_leaves(value, [leaf for leaf, _ in tree.named_leaves(value, name)])
        try:
            tree.map(note, names, value, gradient)
        except ValueError as error:
            raise ContractError(
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


def covers(names: Iterable[str], leaf: str) -> bool:
    """Tell whether a leaf, or a branch that it hangs on, is among the names."""
    return any(leaf == name or leaf.startswith(f"{name}.") for name in names)


def call(who: str, fn: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a half of the pair; what it raises becomes a broken contract that says where."""
    try:
        return fn(*args, **kwargs)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(line.filename).name}, line {line.lineno}"
        raise ContractError(f"{who} raised {type(error).__name__} in {where}: {error}") from error


def require(holds: bool, complaint: str) -> None:
    """Break off with the complaint unless a rule of the contract holds."""
    if not holds:
        raise ContractError(complaint)


def bits(value: Any, kinds: str = "fiub") -> list[tuple]:
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
    return [content for part in value for content in bits(part, kinds)]
