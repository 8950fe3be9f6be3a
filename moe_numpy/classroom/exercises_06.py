"""Checks for the exercises of chapter 06: each returns one line that says what went wrong.

A check runs the learner's function on a small generic batch and compares it with a judge that
shares no formula with the package: loops, or central differences of the forward. A wrong answer is
then compared with what typical mistakes would have given.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moe_numpy.moe import capacity, router
from moe_numpy.ops import activation, softmax

N, E, K, C = 7, 5, 3, 4
STEP = 1e-4  # of the central differences
CLOSE = 1e-6  # relative to the largest number of the right answer
ROUNDING = 1e-12  # likewise; what the way back through a softmax may leave where zero is right


def check_dispatch_backward(fn: Callable) -> str:
    """Judge ``fn(dx_RC, token_R, N) -> dx_NC``, the gradient of ``x_RC = x_NC[token_R]``."""
    rng = np.random.default_rng(61)
    dx_RC, token_R = _copies(rng, N, C)
    right = _sent_back(dx_RC, token_R, N)
    last = np.zeros((N, C))
    last[token_R] += dx_RC  # on zeros the same as `=`: of equal indices the last one wins
    mistakes = {
        "only the last copy of each token counts: `dx_NC[token_R] += dx_RC` reads and writes a "
        "token once, so its duplicates are lost (and `=` overwrites); use np.add.at, or loop over "
        "the rows": last,
        "the mean over a token's copies was taken; copying sends back their sum": right / K,
        "the rows were read as if they stood in token order; they are sorted by expert": (
            dx_RC.reshape(N, K, C).sum(1)
        ),
    }
    for step, where in ((-1, "before"), (1, "after")):
        mistakes |= {
            f"each sum stands in the row {where} that of its token": np.roll(right, step, 0),
            f"each row of dx_RC went to the token of the row {where} it": (
                _sent_back(dx_RC, np.roll(token_R, -step), N)
            ),
        }
    first = verdict(fn, (dx_RC, token_R, N), right, mistakes)
    if not first.startswith("right"):
        return first
    dx_RC, token_R = _copies(rng, N - 2, C - 1)
    kept = np.flatnonzero(token_R != N - 3)[1:]  # the last token has no row, one has a row less
    few = dx_RC[kept], token_R[kept], N - 2
    second = verdict(fn, few, _sent_back(*few), {})
    if not second.startswith("right"):
        return (
            "it works where every token has all its rows; but where choices were dropped, so that "
            f"tokens have fewer rows and the last one has none: {second}"
        )
    return first


def _copies(rng: np.random.Generator, N: int, C: int) -> tuple[np.ndarray, np.ndarray]:
    logit_NE = rng.standard_normal((N, E))
    plan = capacity.make_plan(router.top_k(logit_NE, K), logit_NE, logit_NE, None)[1]
    return rng.standard_normal((N * K, C)), plan.token_R


def _sent_back(dx_RC: np.ndarray, token_R: np.ndarray, N: int) -> np.ndarray:
    right = np.zeros((N, dx_RC.shape[1]))
    for r, c in np.ndindex(dx_RC.shape):
        right[token_R[r], c] += dx_RC[r, c]
    return right


def check_divided_gate_backward(fn: Callable) -> str:
    """Judge ``fn(dgate_NK, prob_NE, expert_NK) -> dlogit_NE`` for gates divided by their sum.

    The forward is ``prob = softmax(logit)``, ``gate = prob[chosen] / sum(prob[chosen])``.
    """
    rng = np.random.default_rng(62)
    logit_NE = rng.standard_normal((N, E))
    expert_NK = router.top_k(logit_NE, K)
    dgate_NK = rng.standard_normal((N, K))
    prob_NE = softmax.softmax_forward(logit_NE)[0]

    def gate(z_NE: np.ndarray) -> np.ndarray:
        kept_NK = np.take_along_axis(np.exp(z_NE), expert_NK, 1)
        return kept_NK / kept_NK.sum(1, keepdims=True)

    def through_softmax(dkept_NK: np.ndarray) -> np.ndarray:
        return softmax.softmax_backward(_scatter(dkept_NK, expert_NK), (prob_NE,))

    kept_NK = np.take_along_axis(prob_NE, expert_NK, 1)
    sum_N1 = kept_NK.sum(1, keepdims=True)
    gate_NK = kept_NK / sum_N1
    inner_NK = dgate_NK - (gate_NK * dgate_NK).sum(1, keepdims=True)
    mistakes = {
        "this is the gradient of the raw gates: the division by the sum is missing": (
            through_softmax(dgate_NK)
        ),
        "this is the gradient of the probabilities; the way back through the softmax is missing": (
            _scatter(inner_NK / sum_N1, expert_NK)
        ),
        "the softmax was undone as if each gate depended on its own logit alone": (
            _scatter(gate_NK * (1 - gate_NK) * dgate_NK, expert_NK)
        ),
        "the gradients stand in the order of the choices, not under the experts that were "
        "chosen": np.pad(gate_NK * inner_NK, ((0, 0), (0, E - K))),
        **{why: through_softmax(d_NK) for why, d_NK in _slips(dgate_NK, kept_NK).items()},
    }
    right = _slopes(gate, logit_NE, dgate_NK)
    found = verdict(fn, (dgate_NK, prob_NE, expert_NK), right, mistakes, expert_NK)
    if found.startswith("right"):
        found += (
            ". After the division the mean m of 4.2 is zero, so these gates allow you to leave it "
            "out; with raw gates it is not, and unchosen logits get a gradient"
        )
    return found


def check_sigmoid_gate_backward(fn: Callable) -> str:
    """Judge ``fn(dgate_NK, logit_NE, expert_NK) -> dlogit_NE`` for normalized sigmoid gates.

    The forward is ``s = sigmoid(logit[chosen])``, ``gate = s / sum(s)``.
    """
    rng = np.random.default_rng(63)
    logit_NE = rng.standard_normal((N, E))
    expert_NK = router.top_k(logit_NE, K)
    dgate_NK = rng.standard_normal((N, K))

    def gate(z_NE: np.ndarray) -> np.ndarray:
        s_NK = 1 / (1 + np.exp(-np.take_along_axis(z_NE, expert_NK, 1)))
        return s_NK / s_NK.sum(1, keepdims=True)

    s_NK = activation.sigmoid_forward(np.take_along_axis(logit_NE, expert_NK, 1))[0]
    sum_N1 = s_NK.sum(1, keepdims=True)
    gate_NK = s_NK / sum_N1
    inner_NK = dgate_NK - (gate_NK * dgate_NK).sum(1, keepdims=True)
    slope_NK = s_NK * (1 - s_NK)
    soft_NK = softmax.softmax_forward(np.take_along_axis(logit_NE, expert_NK, 1))[0]
    soft_inner_NK = dgate_NK - (soft_NK * dgate_NK).sum(1, keepdims=True)
    mistakes = {
        "this is the gradient of softmax gates; here the scores are sigmoids": (
            _scatter(soft_NK * soft_inner_NK, expert_NK)
        ),
        "gate (dgate - m) is the rule of the softmax; a sigmoid has the slope s (1 - s)": (
            _scatter(gate_NK * inner_NK, expert_NK)
        ),
        "the slope of the sigmoid, s (1 - s), is missing": _scatter(inner_NK / sum_N1, expert_NK),
        "this is the gradient of sigmoid gates that nothing divides; these are divided": (
            _scatter(dgate_NK * slope_NK, expert_NK)
        ),
        "the slope of the sigmoid is s (1 - s), with the score; here it has the gate": (
            _scatter(inner_NK / sum_N1 * gate_NK * (1 - gate_NK), expert_NK)
        ),
        **{why: _scatter(d * slope_NK, expert_NK) for why, d in _slips(dgate_NK, s_NK).items()},
    }
    right = _slopes(gate, logit_NE, dgate_NK)
    found = verdict(fn, (dgate_NK, logit_NE, expert_NK), right, mistakes, expert_NK)
    if found.startswith("right"):
        found += (
            ". For K = 1 the gate is s / s = 1, and the router as dead as with a softmax; without "
            "the division, as in Llama 4, it hears s (1 - s) dgate"
        )
    return found


def _slips(dgate_NK: np.ndarray, score_NK: np.ndarray) -> dict[str, np.ndarray]:
    """Return what slips on the way back through `gate = score / sum` give for the scores."""

    def back(dgate: np.ndarray, score: np.ndarray, outer: int = 1, inner: int = 1) -> np.ndarray:
        total = score.sum(outer, keepdims=True)
        return (dgate - (score / total * dgate).sum(inner, keepdims=True)) / total

    both, sum_N1 = (dgate_NK, score_NK), score_NK.sum(1, keepdims=True)
    weighted_N1 = (score_NK * dgate_NK).sum(1, keepdims=True)
    two = np.pad(back(dgate_NK[:, :2], score_NK[:, :2]), ((0, 0), (0, K - 2)))
    axis = "was taken over the tokens (axis 0); it runs over a token's choices (axis 1)"
    return {
        "the renormalizing sum was treated as a constant; it depends on every chosen expert": (
            dgate_NK / sum_N1
        ),
        "the sum over the chosen gates has as weights what was not divided yet; it takes the "
        "gates": (dgate_NK - weighted_N1) / sum_N1,
        "the division was undone for each gate alone; the sum holds all chosen ones": (
            dgate_NK * (1 - score_NK / sum_N1) / sum_N1
        ),
        "the division by the sum is missing in front of the bracket": back(*both) * sum_N1,
        f"the renormalizing sum {axis}": back(*both, outer=0),
        f"the sum of gate times dgate {axis}": back(*both, inner=0),
        f"each of the two sums {axis}": back(*both, outer=0, inner=0),
        "only the first two choices were used; all of them count": two,
        "only the first two choices got a gradient": back(*both) * (np.arange(K) < 2),
    }


def verdict(
    fn: Callable,
    args: tuple,
    right: np.ndarray,
    mistakes: dict[str, np.ndarray],
    expert_NK: np.ndarray | None = None,
) -> str:
    """Run the learner's function and say in one line how it fared.

    Parameters
    ----------
    args : of the function; it gets copies.
    right : array, the judge's answer.
    mistakes : what typical mistakes would have given, by their explanation.
    expert_NK : if given, a gradient beside these experts is itself a mistake.
    """
    given = tuple(np.copy(a) if isinstance(a, np.ndarray) else a for a in args)
    try:
        answer = fn(*given)
    except NotImplementedError as todo:
        return f"not solved yet: {todo}"
    except Exception as error:
        sizes = "; the check uses other sizes than the notebook: take them from the arguments"
        hint = sizes if isinstance(error, IndexError | ValueError) else ""
        return f"the function stopped with {type(error).__name__}: {error}{hint}"
    complaint = _form(answer, right)
    if complaint:
        return complaint
    if any(not np.array_equal(a, b) for a, b in zip(args, given, strict=True)):
        return "the function changed its arguments; work on a copy, others still need them"
    answer = np.asarray(answer)
    if _equal(answer, right) and not _leaks(answer, right, expert_NK):
        return f"right: {right.size} numbers agree with the judge"
    return f"wrong: {_cause(answer, right, mistakes, expert_NK)}"


def _form(answer: object, right: np.ndarray) -> str | None:
    if answer is None:
        return "the function returned nothing; does it end with `return`?"
    if isinstance(answer, tuple):
        return f"the answer must be one array, got a tuple of {len(answer)}"
    try:
        table = np.asarray(answer)
    except (TypeError, ValueError):
        return f"the answer must be one array of real numbers, got {type(answer).__name__}"
    if table.shape != right.shape:
        return f"the answer must have the shape {right.shape}, got {table.shape}"
    if table.dtype.kind not in "iuf":
        got = table.dtype.type.__name__.strip("_")
        return f"the answer must be one array of real numbers, got numbers of type {got}"
    if not np.isfinite(table).all():
        return "the answer holds NaN or infinity; was something divided by zero, or 0 * inf formed?"
    return None


def _cause(
    answer: np.ndarray,
    right: np.ndarray,
    mistakes: dict[str, np.ndarray],
    expert_NK: np.ndarray | None,
) -> str:
    """Name the mistake, or else say where the answer is furthest off."""
    if answer.dtype.kind != "f":
        return "the answer holds integers, which cut what is written there; np.zeros holds floats"
    if not answer.any():
        return "every number is zero; nothing was written into the answer"
    for explanation, wrong in mistakes.items():
        if _equal(answer, wrong):
            return explanation
    off = np.abs(answer - right)
    near = off.max() <= 0.01 * np.abs(right).max()
    hint = "was a small number added to a sum, or something rounded?"
    if _leaks(answer, right, expert_NK):
        leak = "unselected logits got a gradient; these gates do not depend on them"
        return f"{leak}; {hint}" if near else leak
    if near:
        return f"nearly right, off by up to {off.max():.1e}; {hint}"
    if _equal(answer, -right):
        return "the sign is flipped"
    factor = float((answer * right).sum() / (right * right).sum())
    if _equal(answer, factor * right):
        return f"everything is {factor:.4g} times what it should be"
    place = tuple(map(int, np.unravel_index(off.argmax(), off.shape)))
    count = int((off > CLOSE * np.abs(right).max()).sum())
    return (
        f"{count} of {right.size} numbers differ, most at {list(place)}: "
        f"yours {answer[place]:.6g}, the judge's {right[place]:.6g}"
    )


def _leaks(answer: np.ndarray, right: np.ndarray, expert_NK: np.ndarray | None) -> bool:
    """Say whether logits that were not chosen got more than the rounding of their precision."""
    if expert_NK is None:
        return False
    unchosen = np.ones(right.shape, bool)
    np.put_along_axis(unchosen, expert_NK, False, 1)
    rounding = ROUNDING if answer.dtype == float else CLOSE
    return bool(np.abs(answer[unchosen]).max() > rounding * np.abs(right).max())


def _equal(answer: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.abs(answer - right).max() <= CLOSE * np.abs(right).max())


def _scatter(chosen_NK: np.ndarray, expert_NK: np.ndarray) -> np.ndarray:
    out_NE = np.zeros((len(expert_NK), E))
    np.put_along_axis(out_NE, expert_NK, chosen_NK, 1)
    return out_NE


def _slopes(gate: Callable, logit_NE: np.ndarray, dgate_NK: np.ndarray) -> np.ndarray:
    """Differentiate <dgate, gate> by central differences, one logit after the other."""
    slope_NE = np.empty_like(logit_NE)
    for place in np.ndindex(logit_NE.shape):
        up, down = logit_NE.copy(), logit_NE.copy()
        up[place] += STEP
        down[place] -= STEP
        slope_NE[place] = ((gate(up) - gate(down)) * dgate_NK).sum() / (2 * STEP)
    return slope_NE
