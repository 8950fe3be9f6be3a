"""Check hand-written gradients against central differences, by rules that can fail.

The upstream gradient is drawn at random, each argument's error is relative, an argument without
effect is a failure, and a probe that changes a discrete decision (the integers and booleans that a
forward returns) is redrawn and counted. Before any number is compared, the pair must keep its
contract: pure, deterministic, gradients of the type, shape and dtype of the arguments.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from moe_numpy import backend
from moe_numpy.classroom import contract, registry, slopes
from moe_numpy.classroom.cases import CASES
from moe_numpy.classroom.contract import Case, CaseResult


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
    cases = CASES if cases is None else cases
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
        result = check_pair(name, cases[name](rng), rng)
        mute = [f"{name}: {words}" for words in _undocumented(found[name])]
        results.append(result._replace(failures=[*result.failures, *mute]))
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
    forward, backward = _through_the_doors(pair.forward), _through_the_doors(pair.backward)
    return check_functions(pair_name, forward, backward, case, rng)


def check_functions(
    name: str, forward: Callable, backward: Callable, case: Case, rng: np.random.Generator
) -> CaseResult:
    """Check any forward and backward that keep the contract, in the registry or not."""
    who = f'{name} (case "{case.name}")' if case.name else name
    try:
        point, analytic = contract.differentiate(forward, backward, case, rng)
        result = slopes.compare(point, analytic, case, rng)
    except contract.ContractError as broken:
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
    return {"passed": passed, "limit": slopes.LIMIT, "seed": seed, "pairs": pairs}


def _through_the_doors(fn: Callable) -> Callable:
    """Move arrays to the backend in use for the call, and what it returns back to the host.

    The checker computes on the host, whatever computes the pair.
    """
    if backend.xp.__name__ == "numpy":
        return fn

    @functools.wraps(fn)
    def moved(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _each_array(backend.to_device, (args, kwargs))
        return _each_array(backend.to_host, fn(*args, **kwargs))

    return moved


def _each_array(move: Callable, value: Any) -> Any:
    """Apply `move` to every array and scalar with a dtype in nested containers."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each_array(move, part) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_each_array(move, part) for part in value)
    if isinstance(value, dict):
        return {name: _each_array(move, part) for name, part in value.items()}
    return move(value) if hasattr(value, "dtype") else value


def _gap(pair: registry.Pair | None, name: str, cases: Iterable[str]) -> str | None:
    if pair is None:
        return "there is a case but no such pair. Remove the case or write the pair."
    for half, other in (("forward", "backward"), ("backward", "forward")):
        if getattr(pair, half) is None:
            return f"{name}_{other} has no partner. Write {name}_{half} beside it."
    if name not in cases:
        return f"the pair has no case. Add CASES[{name!r}] in classroom/cases*.py."
    return None


def _undocumented(pair: registry.Pair) -> list[str]:
    """Complain about missing docstrings, unless Python was told to leave them all out (-OO)."""
    names = [fn.__name__ for fn in (pair.forward, pair.backward) if not inspect.getdoc(fn)]
    advice = "Write one, with shapes and source."
    return [f"{name} has no docstring. {advice}" for name in names if sys.flags.optimize < 2]
