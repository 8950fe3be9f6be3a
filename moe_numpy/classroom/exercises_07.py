"""Checks for the exercises of chapter 07: each answers in one line that says what went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

NOT_YET = "not solved yet: {}. Replace the line that raises NotImplementedError."
SOLVED = "solved: {}"
CHANGED = "the function changed its arguments; work on a copy, others still need them."


def check_effective_experts(answer: Callable[[np.ndarray], float]) -> str:
    """Check exercise 1: effective experts of one layer's load, counts of shape (E,), with loops."""
    cases = [[2, 6, 1, 4], [5, 5, 5, 5], [3, 0, 3, 0, 2], [7, 0, 0], [2000, 1, 15]]
    for load in cases:
        came, problem = _call(answer, np.array(load), todo="effective experts")
        if problem:
            return problem
        came, problem = _number(came, f"for the load {load}")
        right = _effective(load)
        if problem:
            return problem
        if not _close(came, right):
            digits = 8 if _near(came, right) else 4
            numbers = f"it must be {right:.{digits}f}, got {came:.{digits}f}"
            return f"for the load {load} {numbers}. {_why(came, load)}"
    return SOLVED.format("it counts the experts that are really used.")


def _effective(load: Any) -> float:
    shares = [count / sum(load) for count in load]
    return math.exp(-sum(s * math.log(s) for s in shares if s > 0))


def _effective_above(least: float, shares: list[float]) -> float:
    """Compute effective experts without those of a smaller share, as if they were none."""
    return math.exp(-sum(s * math.log(s) for s in shares if s >= least and s > 0))


def _why(came: float, load: list[int]) -> str:
    total = sum(load)
    shares = [count / total for count in load]
    entropy = math.log(_effective(load))
    typical = {
        entropy: "This is the entropy itself: take its exponential at the end.",
        math.exp(-entropy): "This is exp(sum share log share): the entropy has a minus in front.",
        -entropy: "This is the sum of share log share: put a minus in front, then take exp.",
        math.exp(entropy / math.log(2)): (
            "The logarithm was to the base 2 and the exponential to the base e: use one base."
        ),
        float(sum(s > 0 for s in shares)): (
            "This counts the experts that got anything at all: weigh each by its share."
        ),
        1 / sum(s * s for s in shares): (
            "This is 1 / sum of share^2, another way to count; here it is exp(entropy)."
        ),
    }
    if any(_close(came, _effective_above(least, shares)) for least in sorted(shares)[1:]):
        return "Small shares count, too: leave out the experts that got nothing, and only those."
    for part, reason in (
        (shares[:1], "Only the first expert was counted: is `return` inside the loop?"),
        (shares[-1:], "Only the last expert was counted: add up with `+=`."),
        (shares[:-1], "The last expert was left out."),
        (shares[1:], "The first expert was left out: Python counts from 0."),
    ):
        if _close(came, _effective_above(0, part)):
            return reason
    if math.isnan(came):
        return "A share of 0 gave 0 * log 0: leave out the experts that got nothing."
    for wrong, reason in typical.items():
        if _close(came, wrong):
            return reason
    if _close(came, _exp(-sum(c * math.log(c) for c in load if c > 0))):
        return "The counts went into the logarithm: divide by their sum first, to get shares."
    if _near(came, _effective(load)):
        return "This is nearly right: was it rounded, or was something added inside the log?"
    return "Make shares of the counts, add up -share log share, take exp."


def check_switch_gradient(answer: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> str:
    """Check exercise 2: dprob_NE of the Switch loss, from prob_NE (N, E) and expert_NK (N, K)."""
    rng = np.random.default_rng(7)
    cases = ((6, 4, 1, False), (5, 3, 2, False), (4, 5, 2, True), (6, 4, 2, False))
    for case, (N, E, K, idle) in enumerate(cases):
        logit_NE = rng.normal(size=(N, E))
        logit_NE[:, -1] -= 9 * idle  # so that nobody chooses the last expert
        prob_NE = np.exp(logit_NE) / np.exp(logit_NE).sum(1, keepdims=True)
        noisy_NE = logit_NE + rng.normal(size=(N, E)) * (case == len(cases) - 1)
        expert_NK = np.argsort(-noisy_NE, 1)[:, :K]
        came, problem = _call(answer, prob_NE, expert_NK, todo="the Switch gradient")
        if problem:
            return problem
        f_E = np.bincount(expert_NK.reshape(-1), minlength=E) / (N * K)
        right_NE = np.tile(E * f_E / N, (N, 1))
        came, problem = _table(came)
        if problem:
            return problem
        if came.shape == (E,):
            return (
                f"dprob must have the shape of prob, ({N}, {E}), got ({E},): every token has its "
                "own row, and all rows are alike."
            )
        if came.shape != (N, E):
            hint = " An expert that nobody chose has a column, too." if idle else ""
            return f"dprob must have the shape of prob, ({N}, {E}), got {came.shape}.{hint}"
        if not np.allclose(came, right_NE, rtol=1e-5, atol=1e-8):
            return f"with N = {N}, E = {E}, K = {K}: " + _why_switch(came, prob_NE, expert_NK, f_E)
    return SOLVED.format("the more an expert got, the harder its probability is pushed down.")


def _why_switch(
    came_NE: np.ndarray, prob_NE: np.ndarray, expert_NK: np.ndarray, f_E: np.ndarray
) -> str:
    (N, E), K = prob_NE.shape, expert_NK.shape[1]
    right_NE = np.tile(E * f_E / N, (N, 1))
    chosen_NE = np.zeros((N, E))
    np.put_along_axis(chosen_NE, expert_NK, 1.0, 1)
    mean_E = prob_NE.mean(0)
    first_E = np.bincount(expert_NK[:, 0], minlength=E) / N
    best_E = np.bincount(np.argsort(-prob_NE, 1)[:, :K].reshape(-1), minlength=E) / (N * K)
    dlogit_NE = prob_NE * (right_NE - (prob_NE * right_NE).sum(1, keepdims=True))
    typical = (
        (
            np.zeros((N, E)),
            "all zeros. Did integers cut them off? If not: f is a constant, but prob is not.",
        ),
        (-right_NE, "the sign is turned: dprob is the gradient, the optimizer subtracts it."),
        (right_NE / E, "the factor E in front of the sum is missing."),
        (
            right_NE * N,
            "a factor 1 / N is missing: P is a mean over the tokens"
            + (", and f a share, not a count." if K == 1 else "."),
        ),
        (right_NE * N / E, "two factors are missing: E in front of the sum, and 1 / N of P."),
        (right_NE * N * K, "f is a share of the choices, not a count: divide by N K."),
        (right_NE * K, "f is divided by N alone: there are N K choices."),
        (np.tile(E * first_E / N, (N, 1)), "f counts all K choices of a token, not the first."),
        (
            np.tile(E * best_E / N, (N, 1)),
            "f counts the largest of prob: count expert_NK. Noise and limits may choose others.",
        ),
        (dlogit_NE, "this is the gradient of the logits: stop one step earlier, at prob."),
        (right_NE * chosen_NE, "only the chosen entries got something: P averages all of them."),
        (np.tile(E * mean_E / N, (N, 1)), "P stands where f belongs: the derivative by P is E f."),
        (
            np.tile(E * (f_E + mean_E) / N, (N, 1)),
            "f was differentiated too: it counts discrete choices and is a constant.",
        ),
        (
            right_NE + chosen_NE * E * mean_E / (N * K),
            "f was differentiated too: it counts discrete choices and is a constant.",
        ),
    )
    for wrong_NE, reason in typical:
        if np.allclose(came_NE, wrong_NE, rtol=1e-5, atol=1e-8):
            return reason
    n, e = np.unravel_index(np.abs(came_NE - right_NE).argmax(), (N, E))
    return f"dprob[{n}, {e}] must be {right_NE[n, e]:.7g}, got {came_NE[n, e]:.7g}."


def check_alarm(
    alarm: Callable[[np.ndarray], bool], early: list[np.ndarray], collapsed: list[bool]
) -> str:
    """Check exercise 3: an alarm that says from the first steps how a run will end.

    Parameters
    ----------
    alarm : takes share_SE, the shares of the first S steps, and returns whether to ring.
    early : share_SE of each run, (S, E).
    collapsed : whether each of these runs ended collapsed.
    """
    rings = []
    for share_SE in early:
        came, problem = _call(alarm, share_SE, todo="the alarm")
        if problem:
            return problem
        if not isinstance(came, bool | np.bool_):
            return f"the alarm must answer True or False, got {type(came).__name__}."
        rings.append(bool(came))
    missed = sum(c and not r for r, c in zip(rings, collapsed, strict=True))
    wrongly = sum(r and not c for r, c in zip(rings, collapsed, strict=True))
    score = f"{len(rings) - missed - wrongly} of {len(rings)} runs right"
    if all(rings) or not any(rings):
        always = "always" if all(rings) else "never"
        hint = (
            "" if all(rings) else " (A comparison with NaN, as 0 * log 0 gives, is always False.)"
        )
        return f"{score}: it {always} rings, whatever the run does.{hint}"
    if missed + wrongly > len(rings) // 2:
        return f"{score}: the comparison points the wrong way. Few effective experts are the alarm."
    S, E = early[0].shape
    for other in (2 * E, max(2, E // 4)):
        came, problem = _call(alarm, np.full((S, other), 1.0 / other), todo="the alarm")
        if problem:
            return f"{score}, but with {other} experts {problem}"
        if came:
            return (
                f"{score}, but it rings for {other} experts with equal shares: compare with the "
                "number of experts, share_SE.shape[1], and average steps instead of adding them up."
            )
    for other in (2 * E, 4 * E):
        busy = max(1, other // 8)
        few = np.zeros((S, other))
        few[:, :busy] = 1.0 / busy
        came, problem = _call(alarm, few, todo="the alarm")
        if problem:
            return f"{score}, but with {other} experts {problem}"
        if not came:
            return (
                f"{score}, but it is silent while {busy} of {other} experts share all tokens: "
                "compare with the number of experts, share_SE.shape[1]."
            )
    hidden = np.zeros((S, E))
    hidden[:, 0] = 1.0
    hidden[0] = 1.0 / E
    came, problem = _call(alarm, hidden, todo="the alarm")
    if problem:
        return problem
    if not came:
        return (
            f"{score}, but it misses a run that starts even and then gives one expert everything: "
            "look at the last of the steps, not only at the first."
        )
    allowed = max(1, len(rings) // 8)
    if missed + wrongly > allowed:
        return (
            f"{score}: {missed} collapses missed, {wrongly} false alarms. Up to {allowed} wrong "
            "would do: average over the last few steps, or move the threshold."
        )
    return SOLVED.format(f"{score}, {missed} missed, {wrongly} false alarms.")


def _call(answer: Callable, *arguments: np.ndarray, todo: str) -> tuple[Any, str]:
    """Call the learner's function with copies; a problem is a sentence, not a traceback."""
    given = [argument.copy() for argument in arguments]
    try:
        with np.errstate(all="ignore"):
            came = answer(*given)
    except NotImplementedError:
        return None, NOT_YET.format(todo)
    except ValueError as error:
        if "math domain" in str(error) or "expected a positive input" in str(error):
            return None, "log 0 was asked for: leave out the experts that got nothing."
        return None, f"it stopped with ValueError: {error}."
    except Exception as error:
        return None, f"it stopped with {type(error).__name__}: {error}."
    if came is None:
        return None, "it returned None: end the function with return."
    if any(not np.array_equal(a, b) for a, b in zip(arguments, given, strict=True)):
        return None, CHANGED
    return came, ""


def _number(came: Any, where: str) -> tuple[float, str]:
    try:
        if np.ndim(came) != 0:
            return 0.0, f"{where} it must be one number, got an array of shape {np.shape(came)}."
        if np.iscomplexobj(came) or isinstance(came, str | bytes):
            raise TypeError
        return float(came), ""
    except (TypeError, ValueError):
        return 0.0, f"{where} it must be one number, got {type(came).__name__}."


def _table(came: Any) -> tuple[np.ndarray, str]:
    try:
        if np.iscomplexobj(came):
            raise TypeError
        return np.asarray(came, dtype=float), ""
    except (TypeError, ValueError):
        return np.zeros(0), f"it must return one array of numbers, got {type(came).__name__}."


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=0.01)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
