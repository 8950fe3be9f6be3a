"""The zero-gradient audit: zeros where theory has them, nowhere else; pictures; exercise checks."""

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_numpy.classroom import exercises_06, exercises_13
from moe_numpy.config import Capacity
from moe_numpy.lab import audit, pictures
from moe_numpy.moe import capacity, router
from moe_numpy.ops import rows, softmax

ROUTER, NOISE = slice(0, 1), slice(1, 2)
EXPERTS = slice(2, 4)


@pytest.fixture(scope="module")
def found():
    return audit.audit()


def at(found, gate, term):
    return found.norm[audit.GATES.index(gate), audit.TERMS.index(term)]


# ------------------------------------------------------------------------------------------- audit
def test_the_zeros_of_the_audit_are_those_of_the_theory_and_no_others(found):
    reaches = np.zeros(found.norm.shape, bool)
    for g, gate in enumerate(audit.GATES):
        for t, term in enumerate(audit.TERMS):
            deaf = gate == "renormalized top-1" and term in ("task", "importance CV²")
            uniform = gate == "all experts" and term == "Switch loss"
            reaches[g, t, :2] = not (deaf or uniform)
            reaches[g, t, 1] &= term != "z-loss"
            reaches[g, t, 2:] = term == "task"
    defined = ~np.isnan(found.norm)
    assert (found.norm[defined & reaches] > 1e-3).all()
    assert (found.norm[defined & ~reaches] < 1e-15).all()
    undefined = np.argwhere(~defined.all(2)).tolist()
    assert undefined == [[audit.GATES.index("all experts"), audit.TERMS.index("load CV²")]]


def test_a_road_that_does_not_exist_gives_an_exact_zero(found):
    for term in ("task", "importance CV²"):
        assert (at(found, "renormalized top-1", term)[:2] == 0).all()
    for gate in audit.GATES:
        assert at(found, gate, "z-loss")[1] == 0
        assert (at(found, gate, "Switch loss")[2:] == 0).all()


def test_the_configuration_refuses_two_pairings(found):
    refused = {(audit.GATES[g], audit.TERMS[t]) for g, t in np.argwhere(found.refused)}
    assert refused == {("renormalized top-1", "importance CV²"), ("all experts", "load CV²")}


def test_the_importance_from_its_pairs_is_that_of_the_layer():
    batch = audit.draw_batch(np.random.default_rng(3), 20, 5, 4)
    moe = audit.gate_config("renormalized top-2", 4)
    mine = audit.importance_gradients(batch, moe)
    layers = audit.gradients(batch, moe, "importance CV²").router
    assert np.allclose(mine.w_CE, layers.w_CE, rtol=1e-12)
    assert np.allclose(mine.noise_CE, layers.noise_CE, rtol=1e-12)


def test_another_seed_has_the_same_zeros(found):
    other = audit.audit(seed=5, tokens=40, width=6, num_experts=5).norm
    assert np.array_equal(other < pictures.ROUNDING, found.norm < pictures.ROUNDING)


# ---------------------------------------------------------------------------------------- pictures
def test_every_picture_returns_its_axes_and_labels_them(found):
    logit_NE = np.random.default_rng(0).normal(size=(8, 4))
    expert_NK = router.top_k(logit_NE, 2)
    plan = capacity.make_plan(expert_NK, logit_NE, logit_NE, Capacity(factor=0.7))[1]
    logit = np.linspace(0, 1, 10)
    infinite = np.where(logit_NE > 0, logit_NE, -np.inf)
    draw = {
        "grid": lambda ax: pictures.plot_grid(ax, infinite, marked=logit_NE > 0),
        "integers": lambda ax: pictures.plot_grid(ax, expert_NK),
        "dispatch": lambda ax: pictures.plot_dispatch(ax, expert_NK, plan, list("abcdefgh")),
        "kink": lambda ax: pictures.plot_kink(ax, logit, {"y": logit**2}, 0.5, "y"),
        "audit": lambda ax: pictures.plot_audit(
            ax, found.norm[3], found.refused[3], audit.TERMS, audit.GROUPS
        ),
    }
    for name, picture in draw.items():
        figure = Figure()
        ax = figure.subplots()
        assert picture(ax) is ax, name
        assert ax.get_xlabel() and ax.get_ylabel(), name
        assert pictures.small_png(figure) == pictures.small_png(figure)


def test_the_dispatch_marks_every_dropped_choice():
    logit_NE = np.random.default_rng(0).normal(size=(8, 4))
    expert_NK = router.top_k(logit_NE, 2)
    plan = capacity.make_plan(expert_NK, logit_NE, logit_NE, Capacity(factor=0.7))[1]
    ax = pictures.plot_dispatch(Figure().subplots(), expert_NK, plan, list("abcdefgh"))
    crosses = [line for line in ax.get_lines() if line.get_marker() == "X"]
    assert len(crosses) == (plan.slot_NK == plan.offsets[-1]).sum() > 0


# --------------------------------------------------------------------------------------- exercises
def scatter(chosen_NK, expert_NK, E):
    out_NE = np.zeros((len(expert_NK), E))
    np.put_along_axis(out_NE, expert_NK, chosen_NK, 1)
    return out_NE


def add_at(dx_RC, token_R, N):
    dx_NC = np.zeros((N, dx_RC.shape[1]))
    np.add.at(dx_NC, token_R, dx_RC)
    return dx_NC


def lost_duplicates(dx_RC, token_R, N):
    dx_NC = np.zeros((N, dx_RC.shape[1]))
    dx_NC[token_R] += dx_RC
    return dx_NC


def divided(dgate_NK, prob_NE, expert_NK):
    """The solution of exercise 2."""
    p_NK = np.take_along_axis(prob_NE, expert_NK, 1)
    s_N1 = p_NK.sum(1, keepdims=True)
    dp_NK = (dgate_NK - (p_NK / s_N1 * dgate_NK).sum(1, keepdims=True)) / s_N1
    dprob_NE = scatter(dp_NK, expert_NK, prob_NE.shape[1])
    return softmax.softmax_backward(dprob_NE, (prob_NE,))


def constant_sum(dgate_NK, prob_NE, expert_NK):
    s_N1 = np.take_along_axis(prob_NE, expert_NK, 1).sum(1, keepdims=True)
    dprob_NE = scatter(dgate_NK / s_N1, expert_NK, prob_NE.shape[1])
    return softmax.softmax_backward(dprob_NE, (prob_NE,))


def raw(dgate_NK, prob_NE, expert_NK):
    dprob_NE = scatter(dgate_NK, expert_NK, prob_NE.shape[1])
    return softmax.softmax_backward(dprob_NE, (prob_NE,))


def leaking(dgate_NK, prob_NE, expert_NK):
    return divided(dgate_NK, prob_NE, expert_NK) + 0.01 * prob_NE


def sigmoid_gate(dgate_NK, logit_NE, expert_NK, slope=True, constant=False):
    """The solution of exercise 3, and two ways to miss it."""
    s_NK = 1 / (1 + np.exp(-np.take_along_axis(logit_NE, expert_NK, 1)))
    sum_N1 = s_NK.sum(1, keepdims=True)
    inner_NK = dgate_NK - (not constant) * (s_NK / sum_N1 * dgate_NK).sum(1, keepdims=True)
    ds_NK = inner_NK / sum_N1 * (s_NK * (1 - s_NK) if slope else 1)
    return scatter(ds_NK, expert_NK, logit_NE.shape[1])


def softmax_gate(dgate_NK, logit_NE, expert_NK):
    cache = router.renormalized_gate_forward(logit_NE, expert_NK)[1]
    return router.renormalized_gate_backward(dgate_NK, cache)


def by_sorting(dx_RC, token_R, N):
    """Right only where every token has as many rows."""
    return dx_RC[np.argsort(token_R, kind="stable")].reshape(N, -1, dx_RC.shape[1]).sum(1)


def bracket(dgate_NK, score_NK, weights="gate", own=False, over=True, outer=1, inner=1):
    s_N1 = score_NK.sum(outer, keepdims=True)
    weight_NK = score_NK / s_N1 if weights == "gate" else score_NK
    kept = weight_NK * dgate_NK
    return (dgate_NK - (kept if own else kept.sum(inner, keepdims=True))) / (s_N1 if over else 1)


def divided_wrongly(dgate_NK, prob_NE, expert_NK, **slips):
    dp_NK = bracket(dgate_NK, np.take_along_axis(prob_NE, expert_NK, 1), **slips)
    return softmax.softmax_backward(scatter(dp_NK, expert_NK, prob_NE.shape[1]), (prob_NE,))


def sigmoid_wrongly(dgate_NK, logit_NE, expert_NK, of_gate=False, **slips):
    s_NK = 1 / (1 + np.exp(-np.take_along_axis(logit_NE, expert_NK, 1)))
    x_NK = s_NK / s_NK.sum(1, keepdims=True) if of_gate else s_NK
    ds_NK = bracket(dgate_NK, s_NK, **slips) * x_NK * (1 - x_NK)
    return scatter(ds_NK, expert_NK, logit_NE.shape[1])


def deaf_to_n(dx_RC, token_R, N):
    return add_at(dx_RC, token_R, token_R.max() + 1)


def hard_coded(dx_RC, token_R, N):
    dx_NC = np.zeros((7, 4))
    dx_NC[:N, : dx_RC.shape[1]] = add_at(dx_RC, token_R, N)
    return dx_NC


def integers(dx_RC, token_R, N):
    dx_NC = np.zeros((N, dx_RC.shape[1]), int)
    for r, c in np.ndindex(dx_RC.shape):
        dx_NC[token_R[r], c] += dx_RC[r, c]
    return dx_NC


def unchosen(score_NE, expert_NK):
    return 1 - scatter(np.ones(expert_NK.shape), expert_NK, score_NE.shape[1])


def todo(*args):
    raise NotImplementedError("your turn")


def overwriting(dx_RC, token_R, N):
    dx_RC *= 2
    return add_at(dx_RC, token_R, N)


one, two, three = (
    exercises_06.check_dispatch_backward,
    exercises_06.check_divided_gate_backward,
    exercises_06.check_sigmoid_gate_backward,
)


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (one, add_at, "right: "),
        (one, lost_duplicates, "wrong: only the last copy of each token counts"),
        (one, lambda dx, t, N: dx.reshape(N, -1, dx.shape[1]).sum(1), "wrong: the rows were read"),
        (one, lambda dx, t, N: add_at(dx, t, N) / 3, "wrong: the mean"),
        (one, lambda dx, t, N: add_at(dx, t, N + 1), "the answer must have the shape (7, 4)"),
        (one, overwriting, "the function changed its arguments"),
        (one, by_sorting, "it works where every token has all its rows; but where"),
        (one, lambda dx, t, N: (add_at(dx, t, N), t), "the answer must be one array, got a tuple"),
        (one, lambda *a: add_at(*a).tolist(), "right: 28 numbers agree with the judge"),
        (one, deaf_to_n, "it works where every token has all its rows; but where"),
        (one, hard_coded, "it works where every token has all its rows; but where"),
        (one, lambda *a: add_at(*a) + 0j, "the answer must be one array of real numbers, got nu"),
        (one, lambda *a: add_at(*a).astype(str), "the answer must be one array of real numbers"),
        (one, lambda *a: np.full((7, 4), None), "the answer must be one array of real numbers"),
        (
            one,
            lambda *a: [[1.0], [2.0, 3.0]],
            "the answer must be one array of real numbers, got l",
        ),
        (one, lambda dx, t, N: add_at(dx, t - 1, N), "wrong: each sum stands in the row before"),
        (one, lambda dx, t, N: add_at(dx, (t + 1) % N, N), "wrong: each sum stands in the row aft"),
        (one, lambda dx, t, N: add_at(dx, np.roll(t, 1), N), "wrong: each row of dx_RC went to"),
        (one, lambda dx, t, N: add_at(dx, np.roll(t, -1), N), "wrong: each row of dx_RC went to"),
        (one, integers, "wrong: the answer holds integers"),
        (two, divided, "right: 35 numbers agree with the judge. After the division the mean m"),
        (two, lambda *a: divided(*a).astype("float32"), "right: "),
        (two, lambda dg, p, e: divided(dg, p, e) + 1e-7 * unchosen(p, e), "wrong: unselected"),
        (two, lambda *a: (1 + 2e-6) * divided(*a), "wrong: nearly right"),
        (two, lambda *a: 0.995 * divided(*a), "wrong: nearly right, off by up to 2.3e-03; was"),
        (two, lambda *a: divided_wrongly(*a, outer=0), "wrong: the renormalizing sum was taken"),
        (two, lambda *a: divided_wrongly(*a, inner=0), "wrong: the sum of gate times dgate"),
        (two, lambda *a: divided_wrongly(*a, outer=0, inner=0), "wrong: each of the two sums"),
        (two, lambda dg, p, e: divided(dg[:, :2], p, e[:, :2]), "wrong: only the first two"),
        (two, constant_sum, "wrong: the renormalizing sum was treated as a constant"),
        (two, raw, "wrong: this is the gradient of the raw gates"),
        (two, lambda *a: divided_wrongly(*a, weights="p"), "wrong: the sum over the chosen gates"),
        (two, lambda *a: divided_wrongly(*a, own=True), "wrong: the division was undone for each"),
        (two, lambda *a: divided_wrongly(*a, over=False), "wrong: the division by the sum is"),
        (two, leaking, "wrong: unselected logits got a gradient"),
        (two, lambda *a: -divided(*a), "wrong: the sign"),
        (two, lambda *a: 2 * divided(*a), "wrong: everything is 2 times what it should be"),
        (two, lambda dg, p, e: p @ dg, "the function stopped with ValueError"),
        (three, sigmoid_gate, "right: "),
        (
            three,
            lambda dg, z, e: sigmoid_gate(dg, z, e) + 1e-7 * unchosen(z, e),
            "wrong: unselected logits got a gradient",
        ),
        (three, lambda *a: sigmoid_wrongly(*a, outer=0), "wrong: the renormalizing sum was taken"),
        (three, lambda *a: sigmoid_wrongly(*a, inner=0), "wrong: the sum of gate times dgate"),
        (three, lambda *a: sigmoid_wrongly(*a, outer=0, inner=0), "wrong: each of the two sums"),
        (three, lambda dg, z, e: sigmoid_gate(dg[:, :2], z, e[:, :2]), "wrong: only the first two"),
        (
            three,
            lambda dg, z, e: sigmoid_gate(dg, z, e) * (1 - unchosen(z, e[:, :2])),
            "wrong: only the first two choices got a gradient",
        ),
        (three, lambda *a: sigmoid_gate(*a, slope=False), "wrong: the slope of the sigmoid"),
        (three, lambda *a: sigmoid_gate(*a, constant=True), "wrong: the renormalizing sum"),
        (
            three,
            lambda *a: sigmoid_wrongly(*a, weights="s"),
            "wrong: the sum over the chosen gates",
        ),
        (three, lambda *a: sigmoid_wrongly(*a, own=True), "wrong: the division was undone for"),
        (three, lambda *a: sigmoid_wrongly(*a, of_gate=True), "wrong: the slope of the sigmoid is"),
        (three, softmax_gate, "wrong: this is the gradient of softmax gates"),
        (three, lambda dg, z, e: 0 * z, "wrong: every number is zero"),
        (three, lambda dg, z, e: z / 0 * 0, "the function stopped with"),
        *((check, todo, "not solved yet: your turn") for check in (one, two, three)),
        *((check, lambda *a: None, "the function returned nothing") for check in (one, two, three)),
    ],
)
def test_a_check_names_what_went_wrong_in_one_line(check, answer, says):
    line = check(answer)
    assert line.startswith(says) and "\n" not in line, line


def test_sizes_of_the_notebook_are_told_from_those_of_the_check():
    line = two(lambda dgate_NK, prob_NE, expert_NK: np.zeros(4)[expert_NK])
    assert line.startswith("the function stopped with IndexError")
    assert "the check uses other sizes than the notebook" in line


def test_the_third_check_answers_the_question_of_the_exercise():
    assert "For K = 1 the gate is s / s = 1" in three(sigmoid_gate)


def test_the_gates_of_the_audit_are_what_their_names_say():
    for gate, top_k, renormalized in zip(
        audit.GATES, (1, 1, 2, 4), (True, False, True, True), strict=True
    ):
        moe = audit.gate_config(gate, 4)
        assert (moe.top_k, moe.renormalized) == (top_k, renormalized)
        assert dataclasses.replace(moe, balance=()) == moe


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (rows.dots, "right: 4 numbers agree with the judge"),
        (lambda x, y: (x * y).sum(-1, keepdims=True), "right: "),
        (lambda x, y: (x[..., None, :] @ y[..., None])[..., 0], "right: "),
        (lambda x, y: (x * y).mean(-1, keepdims=True), "wrong: the mean was taken"),
        (lambda x, y: (x * x).sum(-1, keepdims=True), "wrong: the rows of x were multiplied with"),
        (lambda x, y: (x + y).sum(-1, keepdims=True), "wrong: the rows were added"),
        (lambda x, y: (x * y).sum(-1), "the answer must have the shape (4, 1)"),
        (lambda x, y: np.einsum("ac,ac->a", x, y)[:, None], "right for (4, 6); but for (7,): the"),
        (
            lambda x, y: np.einsum("...c,...c->...", x[..., :128], y[..., :128])[..., None],
            "right for (4, 6); but for (3, 300): wrong",
        ),
        (lambda x, y: rows.dots(x, y).tolist(), "the answer must be an array, got list"),
        (
            lambda x, y: rows.dots(x, y).astype("float32"),
            "of arrays of float64, the answer must be one of float64, got float32",
        ),
        (
            lambda x, y: rows.dots(x, y).astype("float64"),
            "of arrays of float32, the answer must be one of float32, got float64",
        ),
        (lambda x, y: rows.dots(y, y), "wrong: the rows of y were multiplied with themselves"),
        (
            lambda x, y: (x * y).squeeze().sum(-1)[..., None],
            "right for (4, 6); but for (2, 1, 3): the answer must have the shape",
        ),
        (
            lambda x, y: rows.dots(x, y) * (x.dtype != "float32"),
            "right for numbers of float64; but for float32: wrong: every number is zero",
        ),
        (
            lambda x, y: rows.dots(x, y) if x.dtype == "float64" else np.add(x, "y"),
            "right for numbers of float64; but for float32: ",
        ),
        (todo, "not solved yet: your turn"),
    ],
)
def test_the_check_of_chapter_13_says_what_is_wrong_with_scalar_products_of_rows(answer, says):
    assert exercises_13.check_dots(answer).startswith(says)
