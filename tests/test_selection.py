"""The selections against loops and exhaustive search, with ties made on purpose."""

import itertools
import math

import numpy as np
import pytest
import strict_cupy

from moe_numpy.backend import to_device, to_host
from moe_numpy.moe import assignment, router, selection
from moe_numpy.ops import softmax


# ------------------------------------------------------------------------------------------ judges
def best_first(values):
    """List the indices, the largest value first; of two equal ones the lower index first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def limited_choice(rank, k, groups, kept, score):
    """Choose for one token: rank the groups, then the experts of the best groups."""
    size = len(rank) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    worth = []
    for group in members:
        values = sorted((rank[e] for e in group), reverse=True)
        worth.append(values[0] if score == "max" else values[0] + values[1])
    allowed = [e for g in best_first(worth)[:kept] for e in members[g]]
    return sorted(allowed, key=lambda e: (-rank[e], e))[:k]


def choosers(score, places):
    """List for every token the experts that count it among their best tokens."""
    chosen = [[] for _ in score]
    for e in range(len(score[0]) if score else 0):
        for n in best_first([row[e] for row in score])[:places]:
            chosen[n].append(e)
    return chosen


def scaled(logits, tolerance, most):
    """Scale rows and columns in turn, as Megatron does, one sum after the other."""
    N, E = len(logits), len(logits[0])
    mass = [[math.exp(z - max(row)) for z in row] for row in logits]
    column = [1.0] * E
    for _ in range(most):
        row = [1 / N / (math.fsum(column[e] * p[e] for e in range(E)) + 1e-8) for p in mass]
        new = [1 / E / (math.fsum(row[n] * mass[n][e] for n in range(N)) + 1e-8) for e in range(E)]
        change = math.fsum(abs(a - b) for a, b in zip(new, column, strict=True)) / E
        column = new
        if change < tolerance:
            break
    return [[math.exp(z) * c for z, c in zip(row, column, strict=True)] for row in logits]


def total(score, experts):
    return math.fsum(row[e] for row, e in zip(score, experts, strict=True))


def best_total(score, E):
    """Try all assignments in which the loads are floor(N / E) or ceil(N / E)."""
    N = len(score)
    fine = (
        experts
        for experts in itertools.product(range(E), repeat=N)
        if all(N // E <= experts.count(e) <= -(-N // E) for e in range(E))
    )
    return max(total(score, experts) for experts in fine)


def drawn(rng, N, E, kind):
    """Draw scores: generic, or whole numbers full of ties, or all tokens of one mind."""
    if kind == "ties":
        return rng.integers(-2, 3, (N, E)).astype(float)
    generic_NE = rng.standard_normal((N, E))
    return 4 * rng.standard_normal(E) + 0.1 * generic_NE if kind == "one mind" else generic_NE


KINDS = ("generic", "ties", "one mind")


# ---------------------------------------------------------------------------------- limited groups
def group_limited_top_k(rank_NE, k, *limits):
    return router.top_k(selection.limited_to_groups(rank_NE, *limits), k)


@pytest.mark.parametrize("score", ["max", "top2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_groups_limit_the_choice(score, kind):
    rng = np.random.default_rng(1)
    for _ in range(30):
        groups, size = int(rng.integers(2, 5)), int(rng.integers(2, 5))
        kept = int(rng.integers(1, groups))
        k, N = int(rng.integers(1, kept * size + 1)), int(rng.integers(0, 6))
        rank_NE = drawn(rng, N, groups * size, kind)
        found = group_limited_top_k(rank_NE, k, groups, kept, score)
        assert (found.shape, found.dtype) == ((N, k), np.intp)
        expected = [limited_choice(row, k, groups, kept, score) for row in rank_NE.tolist()]
        assert found.tolist() == expected


def test_the_score_of_a_group_decides_between_one_great_and_two_good_experts():
    rank_NE = np.array([[9.0, 0.0, 6.0, 5.0]])
    assert group_limited_top_k(rank_NE, 2, 2, 1, "max").tolist() == [[0, 1]]
    assert group_limited_top_k(rank_NE, 2, 2, 1, "top2").tolist() == [[2, 3]]


def test_a_kept_expert_with_a_negative_score_beats_every_expert_that_is_not_kept():
    rank_NE = np.array([[-1.0, 3.0, 1.0, 1.5]])  # with zeros for the others, expert 2 would win
    assert group_limited_top_k(rank_NE, 2, 2, 1, "max").tolist() == [[1, 0]]
    limited_NE = selection.limited_to_groups(rank_NE, 2, 1, "max")
    assert limited_NE.tolist() == [[-1.0, 3.0, -math.inf, -math.inf]]


def test_all_kept_experts_can_be_chosen_and_ties_go_to_the_lower_group_and_expert():
    rank_NE = np.zeros((3, 12))
    for score in ("max", "top2"):
        found = group_limited_top_k(rank_NE, 8, 3, 2, score)
        assert found.tolist() == [list(range(8))] * 3


def test_limits_that_keep_every_group_are_plain_top_k():
    rank_NE = np.random.default_rng(2).standard_normal((20, 12))
    found = group_limited_top_k(rank_NE, 5, 4, 4, "top2")
    assert found.tolist() == router.top_k(rank_NE, 5).tolist()


# ----------------------------------------------------------------------------------- expert choice
@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_takes_its_best_tokens(kind):
    rng = np.random.default_rng(3)
    for _ in range(40):
        N, E = int(rng.integers(0, 9)), int(rng.integers(1, 7))
        places = int(rng.integers(0, N + 3))
        score_NE = drawn(rng, N, E, kind)
        expert_NK, accepted_NK = selection.expert_choice(score_NE, places)
        chosen = choosers(score_NE.tolist(), places)
        K = max([1, *map(len, chosen)])
        assert expert_NK.shape == accepted_NK.shape == (N, K)
        assert (expert_NK.dtype, accepted_NK.dtype) == (np.intp, bool)
        for names, fine, mine in zip(expert_NK, accepted_NK, chosen, strict=True):
            assert names[: len(mine)].tolist() == mine
            assert fine.tolist() == [True] * len(mine) + [False] * (K - len(mine))
            assert len(set(names.tolist())) == K
        assert accepted_NK.sum() == E * min(places, N)


def test_an_expert_prefers_the_lower_of_two_equal_tokens():
    expert_NK, accepted_NK = selection.expert_choice(np.ones((4, 3)), 2)
    assert expert_NK.tolist() == [[0, 1, 2]] * 4
    assert accepted_NK.tolist() == [[True] * 3] * 2 + [[False] * 3] * 2


# ---------------------------------------------------------------------------------------- sinkhorn
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 2, 100])
def test_sinkhorn_is_the_loop_over_rows_and_columns(kind, most):
    rng = np.random.default_rng(4)
    for N, E in ((1, 3), (7, 4), (5, 1), (12, 6)):
        logit_NE = 0.5 * drawn(rng, N, E, kind)
        found = selection.sinkhorn(logit_NE, 1e-4, most)
        expected = np.array(scaled(logit_NE.tolist(), 1e-4, most))
        np.testing.assert_allclose(np.exp(found), expected, rtol=1e-11)


def test_sinkhorn_balances_the_experts_where_plain_top_1_does_not():
    N, E = 512, 8
    logit_NE = drawn(np.random.default_rng(5), N, E, "generic") + np.linspace(0, 3, E)
    balanced_NE, _ = softmax.softmax_forward(selection.sinkhorn(logit_NE, 1e-9, 200))
    balanced_NE /= N
    np.testing.assert_allclose(balanced_NE.sum(0), 1 / E, rtol=1e-6)
    np.testing.assert_allclose(balanced_NE.sum(1), 1 / N, rtol=1e-4)
    plain, better = (np.bincount(x.argmax(1), minlength=E) for x in (logit_NE, balanced_NE))
    assert plain.max() > 3 * N / E
    assert 0.7 * N / E < better.min() <= better.max() < 1.3 * N / E


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sinkhorn_survives_huge_logits_columns_of_zeros_and_no_tokens(dtype):
    logit_NE = drawn(np.random.default_rng(6), 6, 4, "generic").astype(dtype)
    offset_N1 = np.arange(0, 6000, 1024, dtype)[:, None]
    usual_NE = selection.sinkhorn(logit_NE, 1e-4, 50)
    assert usual_NE.dtype == dtype
    shifted_NE = selection.sinkhorn(logit_NE + offset_N1, 1e-4, 50) - offset_N1
    np.testing.assert_allclose(np.exp(shifted_NE), np.exp(usual_NE), rtol=1e-2)
    logit_NE[:, 1] = -3000
    found_NE = selection.sinkhorn(logit_NE, 1e-4, 50)
    assert np.isfinite(found_NE).all() and not np.exp(found_NE[:, 1]).any()
    none_NE = selection.sinkhorn(logit_NE[:0], 1e-4, 50)
    assert (none_NE.shape, none_NE.dtype) == ((0, 4), dtype)


def test_sinkhorn_keeps_the_order_of_experts_whose_share_underflows():
    logit_NE = np.array([[120, 0, 0, 10], [0, 1, 2, 3]], "float32")
    assert router.top_k(selection.sinkhorn(logit_NE, 1e-4, 100), 2)[0].tolist() == [0, 3]


def test_sinkhorn_stops_when_the_columns_stand_still_and_looks_once_a_round():
    logit_NE = drawn(np.random.default_rng(7), 30, 5, "generic")

    def rounds(tolerance, most):
        with strict_cupy.device() as crossings:
            selection.sinkhorn(to_device(logit_NE), tolerance, most)
        assert {crossing.what for crossing in crossings} == {"get"}
        return len(crossings)

    assert rounds(1e-30, 4) == 4
    assert 1 < rounds(1e-2, 100) < rounds(1e-5, 100) < 100


# -------------------------------------------------------------------------------------- assignment
def assert_balanced(expert_N, E):
    loads = np.bincount(expert_N, minlength=E)
    assert len(loads) == E
    assert len(expert_N) // E <= loads.min() <= loads.max() <= -(-len(expert_N) // E)


@pytest.mark.parametrize("kind", KINDS)
def test_no_assignment_is_better(kind):
    rng = np.random.default_rng(8)
    for N, E in itertools.product(range(8), range(1, 4)):
        score_NE = drawn(rng, N, E, kind)
        expert_N = assignment.balanced_assignment(score_NE)
        assert (expert_N.shape, expert_N.dtype) == ((N,), np.intp)
        assert_balanced(expert_N, E)
        score = score_NE.tolist()
        best = best_total(score, E)
        assert total(score, expert_N.tolist()) == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_tokens_than_experts_get_an_expert_each(kind):
    score_NE = drawn(np.random.default_rng(9), 4, 6, kind)
    expert_N = assignment.balanced_assignment(score_NE)
    assert_balanced(expert_N, 6)
    score = score_NE.tolist()
    best = max(total(score, experts) for experts in itertools.permutations(range(6), 4))
    assert total(score, expert_N.tolist()) == pytest.approx(best, rel=1e-12, abs=1e-12)


def gain_of_a_circle(score_NE, expert_N):
    """Return the most that moving tokens around a circle of experts can gain (Floyd, Warshall).

    One more node stands for the extra places where E does not divide N: whoever has one can hand
    it to whoever has none. An assignment is the best if and only if no circle gains.
    """
    N, E = score_NE.shape
    gain = np.full((E + 1, E + 1), -np.inf)
    for e in range(E):
        mine_NE = score_NE[expert_N == e]
        gain[e, :E] = (mine_NE - mine_NE[:, [e]]).max(0)
        has_extra = len(mine_NE) > N // E
        gain[(E, e) if has_extra else (e, E)] = 0
    for middle in range(E + 1):
        gain = np.maximum(gain, gain[:, [middle]] + gain[[middle]])
    return gain.diagonal().max()


@pytest.mark.parametrize("kind", KINDS)
def test_no_circle_of_moves_gains_in_larger_assignments(kind):
    rng = np.random.default_rng(10)
    for N, E in ((60, 5), (64, 5), (96, 8), (100, 8), (61, 7), (70, 16), (768, 8)):
        score_NE = drawn(rng, N, E, kind)
        expert_N = assignment.balanced_assignment(score_NE)
        assert_balanced(expert_N, E)
        assert gain_of_a_circle(score_NE, expert_N) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_assignment_is_as_good_as_scipys(kind):
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is not installed")
    rng = np.random.default_rng(11)
    for N, E in ((96, 8), (100, 8), (61, 7), (768, 8)):
        score_NE = drawn(rng, N, E, kind)
        each_gets, extra = divmod(N, E)
        columns = [*np.repeat(np.arange(E), each_gets), *(range(E) if extra else ())]
        fillers = np.full((len(columns) - N, len(columns)), -1e6)  # take the spare extra places
        fillers[:, E * each_gets :] = 0
        worth = np.concatenate((score_NE[:, columns], fillers))
        rows, seats = optimize.linear_sum_assignment(worth, maximize=True)
        expert_N = assignment.balanced_assignment(score_NE)
        assert_balanced(expert_N, E)
        ours = total(score_NE.tolist(), expert_N.tolist())
        assert ours == pytest.approx(worth[rows, seats].sum(), rel=1e-12, abs=1e-10)


def test_where_the_best_experts_balance_they_are_the_assignment():
    score_NE = np.eye(5)[[3, 1, 4, 0, 2, 2, 0, 4, 1, 3]]
    expert_N = assignment.balanced_assignment(score_NE)
    assert expert_N.tolist() == [3, 1, 4, 0, 2, 2, 0, 4, 1, 3]


def test_the_assignment_is_exact_in_float32_at_any_scale_and_repeats_itself():
    score_NE = drawn(np.random.default_rng(12), 40, 4, "one mind").astype("float32")
    expected = assignment.balanced_assignment(score_NE).tolist()
    for scale in (2.0**-100, 1.0, 2.0**100):
        found = assignment.balanced_assignment(score_NE * np.float32(scale))
        assert found.tolist() == expected
    assert_balanced(assignment.balanced_assignment(np.zeros((41, 4), "float32")), 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    score_NE = np.zeros((3, 2))
    score_NE[1, 1] = bad
    with pytest.raises(ValueError, match=rf"scores must be finite, got {bad}\. Lower"):
        assignment.balanced_assignment(score_NE)


def test_skewed_scores_need_no_more_than_one_path_a_token(monkeypatch):
    N, E = 768, 8
    score_NE = drawn(np.random.default_rng(13), N, E, "generic") + 10 * np.eye(E)[0]
    paths = []
    plain = assignment._cheapest_path
    monkeypatch.setattr(
        assignment, "_cheapest_path", lambda *args: paths.append(plain(*args)) or paths[-1]
    )
    assert_balanced(assignment.balanced_assignment(score_NE), E)
    assert len(paths) == N - N // E


# --------------------------------------------------------------------------------- second expert
def test_a_second_expert_is_kept_by_its_threshold_or_by_a_coin():
    second_N = np.array([0.0, 0.1, 0.2, 0.25, 0.5])
    kept = selection.second_expert_kept(second_N, 0.2, "threshold")
    assert kept.tolist() == [False, False, False, True, True]
    coin_N = np.array([0.0, 0.49, 0.99, 0.999, 0.999])
    kept = selection.second_expert_kept(second_N, 0.2, "random", coin_N)
    assert kept.tolist() == [False, True, True, True, True]
    assert selection.second_expert_kept(second_N, 0.2, "random").tolist() == [True] * 5
    kept = selection.second_expert_kept(second_N, 0.2, "threshold", coin_N)
    assert kept.tolist() == [False, False, False, True, True]


def test_the_coin_keeps_the_share_that_the_paper_says():
    rng = np.random.default_rng(14)
    for threshold in (0.2, 0.5):
        second_N, coin_N = rng.uniform(0, 0.5, 20_000), rng.uniform(0, 1, 20_000)
        kept_N = selection.second_expert_kept(second_N, threshold, "random", coin_N)
        chance = [min(1.0, w / threshold) for w in second_N.tolist()]
        variance = math.fsum(p * (1 - p) for p in chance)
        assert abs(kept_N.sum() - math.fsum(chance)) < 4 * math.sqrt(variance)


# ---------------------------------------------------------------------------------------- together
SCORE_NE = np.random.default_rng(15).standard_normal((24, 6))
CALLS = {
    "limited_to_groups": (selection.limited_to_groups, SCORE_NE, 3, 2, "top2"),
    "limited_to_groups, max": (selection.limited_to_groups, SCORE_NE, 3, 2, "max"),
    "expert_choice": (selection.expert_choice, SCORE_NE, 8),
    "sinkhorn": (selection.sinkhorn, SCORE_NE, 1e-6, 50),
    "balanced_assignment": (assignment.balanced_assignment, SCORE_NE),
    "second, random": (selection.second_expert_kept, SCORE_NE[:, 0], 0.5, "random", SCORE_NE[:, 1]),
    "second, evaluation": (selection.second_expert_kept, SCORE_NE[:, 0], 0.5, "random"),
    "second, threshold": (selection.second_expert_kept, SCORE_NE[:, 0], 0.5, "threshold"),
}
CROSSINGS = {"expert_choice": 1, "balanced_assignment": 1}  # sinkhorn: one a round, see there


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CALLS)
def test_the_device_gives_the_bits_of_numpy_and_is_asked_once(name, dtype):
    function, *args = CALLS[name]
    args = [x.astype(dtype) if isinstance(x, np.ndarray) else x for x in args]
    expected = function(*args)
    with strict_cupy.device() as crossings:
        found = function(*(to_device(x) if isinstance(x, np.ndarray) else x for x in args))
        asked = len(crossings)
    assert type(found) is (tuple if type(expected) is tuple else strict_cupy.ndarray)
    pair = (found, expected) if type(expected) is tuple else ((found,), (expected,))
    for theirs, ours in zip(*pair, strict=True):
        assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
        assert to_host(theirs).tobytes() == ours.tobytes()
    assert name == "sinkhorn" or asked == CROSSINGS.get(name, 0)


@pytest.mark.parametrize("name", ["expert_choice", "sinkhorn", "balanced_assignment"])
def test_other_names_for_the_experts_change_nothing_but_the_names(name):
    function, score_NE, *rest = CALLS[name]
    new_E = np.random.default_rng(16).permutation(6)  # expert e is now called new_E[e]
    renamed_NE = np.empty_like(score_NE)
    renamed_NE[:, new_E] = score_NE
    found, renamed = function(score_NE, *rest), function(renamed_NE, *rest)
    if name == "sinkhorn":
        np.testing.assert_allclose(renamed[:, new_E], found, rtol=1e-12)
    elif name == "balanced_assignment":
        assert renamed.tolist() == new_E[found].tolist()
    else:
        users = [
            [{names[e] for e in row[fine].tolist()} for row, fine in zip(*pair, strict=True)]
            for pair, names in ((found, new_E.tolist()), (renamed, range(6)))
        ]
        assert users[0] == users[1]


def test_other_names_for_whole_groups_change_nothing_but_the_names():
    new_E = np.array([4, 5, 0, 1, 2, 3])
    renamed_NE = np.empty_like(SCORE_NE)
    renamed_NE[:, new_E] = SCORE_NE
    for score in ("max", "top2"):
        found = group_limited_top_k(SCORE_NE, 3, 3, 2, score)
        renamed = group_limited_top_k(renamed_NE, 3, 3, 2, score)
        assert renamed.tolist() == new_E[found].tolist()


def test_no_selection_writes_into_its_scores():
    for function, *args in CALLS.values():
        before = args[0].copy()
        function(*args)
        assert (args[0] == before).all()


def test_every_function_is_called_above():
    homes = {m: vars(m) for m in (selection, assignment)}
    public = {
        value
        for home, names in homes.items()
        for name, value in names.items()
        if name[0] != "_" and getattr(value, "__module__", "") == home.__name__
    }
    assert public == {call[0] for call in CALLS.values()}


def test_the_assignment_is_exact_where_sums_differ_in_their_last_digits():
    e = 2.0**-40
    score_NE = np.array([[1.0, 1.0 - e], [1.0, 1.0 - 2 * e]])
    assert assignment.balanced_assignment(score_NE).tolist() == [1, 0]
    assert assignment.balanced_assignment(score_NE[::-1]).tolist() == [0, 1]


def test_of_many_experts_those_that_chose_a_token_come_first_in_their_order():
    prob_NE = np.random.default_rng(0).random((12, 40))  # more than a short sort keeps in order
    expert_NK, accepted_NK = selection.expert_choice(prob_NE, 5)
    for experts, accepted in zip(expert_NK.tolist(), accepted_NK.tolist(), strict=True):
        chose = [e for e, fine in zip(experts, accepted, strict=True) if fine]
        assert chose == sorted(chose) == experts[: len(chose)]
