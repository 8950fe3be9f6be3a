"""The gradient checker is itself checked: right gradients pass and every planted bug is rejected.

A bug is one edit in the source of a correct pair, so the table below reads like a list of mistakes.
"""

import copy
import inspect
import itertools
import json
import math
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from moe_numpy.classroom import gradcheck, registry, slopes
from moe_numpy.classroom.gradcheck import Case

BUFFER_C = np.zeros(5)
LATEST = []
LATE_N = (np.arange(7) != 2)[:, None]
STREAM = np.random.default_rng(0)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def affine_softmax_forward(x_NC, w_CC, b_C):
    p_NC = softmax(x_NC @ w_CC + b_C)
    LATEST.append(p_NC)
    return p_NC, (x_NC, w_CC, p_NC)


def affine_softmax_backward(dp_NC, cache):
    x_NC, w_CC, p_NC = cache
    dz_NC = p_NC * (dp_NC - (p_NC * dp_NC).sum(-1, keepdims=True))
    dx_NC = dz_NC @ w_CC.T
    dw_CC = x_NC.T @ dz_NC
    db_C = dz_NC.sum(0)
    return dx_NC, dw_CC, db_C


def layer_norm_forward(x_NC, gain_C, bias_C):
    centered_NC = x_NC - x_NC.mean(-1, keepdims=True)
    r_N1 = 1 / np.sqrt((centered_NC**2).mean(-1, keepdims=True))
    unit_NC = centered_NC * r_N1
    return gain_C * unit_NC + bias_C, (unit_NC, r_N1, gain_C)


def layer_norm_backward(dy_NC, cache):
    unit_NC, r_N1, gain_C = cache
    q_NC = gain_C * dy_NC
    dunit_NC = q_NC - q_NC.mean(-1, keepdims=True)
    dunit_NC -= unit_NC * (q_NC * unit_NC).mean(-1, keepdims=True)
    dgain_C, dbias_C = (dy_NC * unit_NC).sum(0), dy_NC.sum(0)
    return r_N1 * dunit_NC, dgain_C, dbias_C


def top2_gate_forward(z_NE):
    p_NE = softmax(z_NE)
    expert_NK = np.argsort(-p_NE, axis=-1, kind="stable")[:, :2]
    raw_NK = np.take_along_axis(p_NE, expert_NK, -1)
    gate_NK = raw_NK / raw_NK.sum(-1, keepdims=True)
    return gate_NK, (p_NE, expert_NK, raw_NK, gate_NK)


def top2_gate_backward(dgate_NK, cache):
    p_NE, expert_NK, raw_NK, gate_NK = cache
    dshare_NK = dgate_NK - (gate_NK * dgate_NK).sum(-1, keepdims=True)
    dp_NE = np.zeros_like(p_NE)
    np.put_along_axis(dp_NE, expert_NK, dshare_NK / raw_NK.sum(-1, keepdims=True), -1)
    return p_NE * (dp_NE - (p_NE * dp_NE).sum(-1, keepdims=True))


def noisy_gate_forward(x_NC, w_CE, noise_w_CE, noise_NE):
    raw_NE = x_NC @ noise_w_CE
    p_NE = softmax(x_NC @ w_CE + noise_NE * np.log1p(np.exp(raw_NE)))
    return p_NE, (x_NC, w_CE, noise_w_CE, noise_NE, raw_NE, p_NE)


def noisy_gate_backward(dp_NE, cache):
    x_NC, w_CE, noise_w_CE, noise_NE, raw_NE, p_NE = cache
    dz_NE = p_NE * (dp_NE - (p_NE * dp_NE).sum(-1, keepdims=True))
    draw_NE = dz_NE * noise_NE / (1 + np.exp(-raw_NE))
    dx_NC = dz_NE @ w_CE.T + draw_NE @ noise_w_CE.T
    return dx_NC, x_NC.T @ dz_NE, x_NC.T @ draw_NE


class Mlp(NamedTuple):
    in_CF: np.ndarray
    bias_F: np.ndarray
    out_FC: np.ndarray
    up_CF: np.ndarray | None = None


def mlp_forward(x_NC, params, cfg):
    a_NF = x_NC @ params.in_CF + params.bias_F
    positive_NF = a_NF > 0
    h_NF = positive_NF * a_NF
    size = cfg.weight * (h_NF * h_NF).mean()
    return h_NF @ params.out_FC, size, (positive_NF.sum(0),), (x_NC, params, cfg, h_NF, positive_NF)


def mlp_backward(dy_NC, dsize, cache):
    x_NC, params, cfg, h_NF, positive_NF = cache
    dh_NF = dy_NC @ params.out_FC.T + dsize * cfg.weight * 2 * h_NF / h_NF.size
    da_NF = dh_NF * positive_NF
    grads = Mlp(x_NC.T @ da_NF, da_NF.sum(0), h_NF.T @ dy_NC)
    return da_NF @ params.in_CF.T, grads


def optional_forward(x, w=None):
    return x * x, (None if w is None else w**3), (x, w)


def optional_backward(dy, dv, cache):
    x, w = cache
    return 2 * x * dy if w is None else (2 * x * dy, 3 * w * w * dv)


def total_forward(z):
    return softmax(z).sum(-1), (z,)


def total_backward(dy, cache):
    return 0 * cache[0] * dy[..., None]


def draw(*shape, seed=3):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


MLP = Mlp(draw(5, 3), draw(3), draw(3, 5))
CASES = {
    "affine_softmax": Case("", (draw(7, 5), draw(5, 5), draw(5))),
    "layer_norm": Case("", (draw(7, 5), 1 + draw(5) / 2, draw(5))),
    "top2_gate": Case("", (draw(7, 5),)),
    "noisy_gate": Case(
        "",
        (draw(7, 5), draw(5, 4), 0.7 * draw(5, 4, seed=4)),
        kwargs={"noise_NE": draw(7, 4)},
        constant=frozenset({"noise_NE"}),
    ),
    "mlp": Case("", (draw(7, 5), MLP, SimpleNamespace(weight=0.3))),
    "optional": Case("given", (draw(3, 5), draw(4))),
    "total": Case("", (draw(7, 5),), zero=frozenset({"z"})),
}


def functions(name, old="", new=""):
    """Fetch a demo pair, with one edit in the source of its two halves."""
    source = "".join(inspect.getsource(globals()[f"{name}_{half}"]) for half in HALVES)
    assert old in source
    namespace = dict(globals())
    exec(source.replace(old, new) if old else source, namespace)
    return [namespace[f"{name}_{half}"] for half in HALVES]


def check(name, old="", new="", case=None):
    rng = np.random.default_rng(11)
    case = copy.deepcopy(case or CASES[name])  # some bugs overwrite their arguments
    return gradcheck.check_functions(name, *functions(name, old, new), case, rng)


HALVES = ("forward", "backward")
BUGS = {  # pair: mistake: what stood there, what stands there now, words of the complaint
    "affine_softmax": {
        "a factor 2": (
            "= x_NC.T @",
            "= 2 * x_NC.T @",
            "w_CC | = 2.000 x numeric: a constant factor",
        ),
        "a factor 1.001": ("= dz_NC.sum", "= 1.001 * dz_NC.sum", "b_C | = 1.001 x numeric"),
        "a flipped sign": ("dw_CC, db_C\n", "dw_CC, -db_C\n", "b_C | = -1.000 x numeric: a sign"),
        "a gradient of zero": ("= dz_NC @ w_CC.T", "= 0 * x_NC", "x_NC | the term is missing"),
        "a transposed gradient": ("x_NC.T @ dz_NC", "dz_NC.T @ x_NC", "w_CC | numeric transposed"),
        "a weight not transposed": ("w_CC.T", "w_CC", "x_NC | no simple pattern"),
        "a wrong axis": (
            "p_NC).sum(-1, keepdims=True)",
            "p_NC).sum(0)",
            "x_NC | no simple pattern",
        ),
        "a row left out of the sum": ("dz_NC.sum", "dz_NC[1:].sum", "b_C | no simple pattern"),
        "a sum over channels": ("dz_NC.sum(0)", "dz_NC.sum(-1)", "b_C | (5,), got float64 (7,)"),
        "another dtype": (
            ".sum(0)",
            ".sum(0).astype('f4')",
            "b_C | float64 (5,), got float32 (5,)",
        ),
        "a row of zeros": ("dx_NC, dw", "dx_NC * LATE_N, dw", "x_NC | only 5 of 35 values differ"),
        "a stale cache": (
            "_CC, p_NC = cache",
            "_CC, p_NC = *cache[:2], LATEST[-1]",
            "x_NC | relative",
        ),
        "a shared buffer": (
            "db_C = dz",
            "db_C = BUFFER_C; db_C += dz",
            "second backward of one cache",
        ),
        "a gradient left out": ("CC, db_C\n", "CC\n", "(dx_NC, dw_CC, db_C), got 2 gradients"),
        "a changed input": (
            "p_NC = soft",
            "b_C += 1; p_NC = soft",
            "forward changed its arguments",
        ),
        "a changed cache": ("dw_CC = ", "p_NC *= 2; dw_CC = ", "backward changed its cache"),
        "a changed upstream": ("dw_CC = ", "dp_NC *= 2; dw_CC = ", "or upstream gradient"),
        "a random forward": (
            "+ b_C",
            "+ b_C * STREAM.random()",
            "two forwards of the same arguments",
        ),
        "an exception": ("= x_NC.T @", "= x_NC @", "backward raised ValueError"),
    },
    "layer_norm": {
        "no mean": (" - q_NC.mean(-1, keepdims=True)", " + 0", "x_NC | offset per row: the mean"),
        "no projection": ("dunit_NC -=", "0 *", "x_NC | no simple pattern"),
        "a wrong order": (
            "dgain_C, dbias_C\n",
            "dbias_C, dgain_C\n",
            "gain_C | gradient of bias_C",
        ),
    },
    "top2_gate": {
        "a constant renormalization": (
            " - (gate_NK * dgate_NK).sum(-1, keepdims=True)",
            "",
            "z_NE",
        ),
    },
    "noisy_gate": {
        "no noise gradient": ("x_NC.T @ draw_NE", "0 * noise_w_CE", "noise_w_CE | term is missing"),
        "no noise path": (" + draw_NE @ noise_w_CE.T", "", "x_NC | no simple pattern"),
    },
    "mlp": {
        "no mask": ("dh_NF * positive_NF", "dh_NF", "params.in_CF | no simple pattern"),
        "no second output": ("+ dsize * cfg.weight", "+ 0", "params.bias_F | no simple pattern"),
        "another tuple type": ("grads = Mlp(", "grads = (", "params | must have the same form"),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_correct_pairs_pass_far_below_the_limit(name):
    result = check(name)
    assert result.failures == []
    assert max(result.errors.values()) < slopes.LIMIT / 100


@pytest.mark.parametrize("name, bug", [(name, bug) for name in BUGS for bug in BUGS[name]])
def test_a_planted_bug_is_rejected(name, bug):
    old, new, words = BUGS[name][bug]
    assert any(
        text.startswith(name) and all(word in text for word in words.split(" | "))
        for text in check(name, old, new).failures
    )


def test_an_optional_output_that_is_none_keeps_its_place_upstream():
    assert check("optional", case=Case("left out", (draw(3, 5),))).failures == []


def test_an_argument_that_a_backward_can_do_without_takes_no_gradient():
    forward = lambda x: (x * x, 7, (x,))  # noqa: E731  one output and a fact
    backward = lambda dy, cache, room=None: 2 * cache[0] * dy  # noqa: E731
    case, rng = Case("", (draw(3, 5),)), np.random.default_rng(11)
    assert gradcheck.check_functions("square", forward, backward, case, rng).failures == []


def test_a_gain_outside_the_sums_is_seen_only_with_generic_gains():
    bug = ("layer_norm", "q_NC = gain_C * dy_NC", "q_NC, r_N1 = dy_NC, gain_C * r_N1")
    x_NC, _, bias_C = CASES["layer_norm"].args
    assert check(*bug, case=Case("gains of one", (x_NC, np.ones(5), bias_C))).failures == []
    assert check(*bug).errors["x_NC"] > 0.1


def test_a_message_names_pair_case_argument_place_values_and_cause():
    case = Case("wide", CASES["layer_norm"].args)
    [failure] = check("layer_norm", "dgain_C, dbias_C\n", "dgain_C, 2 * dbias_C\n", case).failures
    assert failure.startswith('layer_norm (case "wide"), argument bias_C: relative error 5.0e-01 ')
    _, _, values = failure.partition("; worst at [")
    numbers = [float(word.strip(".,")) for word in values.split()[2:5:2]]
    assert numbers[0] == pytest.approx(2 * numbers[1], rel=1e-7)
    assert "Likeliest cause: analytic = 2.000 x numeric" in failure


def test_a_large_tensor_is_probed_by_directions_and_explained_by_element():
    case = Case("", (draw(37, 11), 1 + draw(11) / 2, draw(11)))
    right = check("layer_norm", case=case)
    assert (right.failures, right.probes) == ([], slopes.DIRECTIONS + 2 * 11)
    [failure] = check("layer_norm", " - q_NC.mean(-1, keepdims=True)", " + 0", case).failures
    assert "worst at [" in failure and "one constant offset per row" in failure


def test_an_argument_without_effect_fails_unless_named_zero():
    [failure] = check("total", case=Case("", (draw(7, 5),))).failures
    assert "argument z: vacuous" in failure
    assert check("total").errors == {"z": 0.0}


def test_a_gradient_invented_for_an_argument_named_zero_fails():
    [failure] = check("total", "0 * cache", "1 * cache").failures
    assert "named truly zero, but the analytic gradient has norm" in failure


def test_an_argument_named_zero_that_has_an_effect_fails():
    case = Case("", CASES["layer_norm"].args, zero=frozenset({"gain_C"}))
    [failure] = check("layer_norm", case=case).failures
    assert "argument gain_C: named truly zero, but" in failure


def test_a_name_without_a_float_array_behind_it_is_refused():
    [failure] = check("top2_gate", case=Case("", (draw(7, 5),), zero=frozenset({"z"}))).failures
    assert "the case names 'z', which is none of z_NE" in failure


def test_none_is_a_gradient_of_zero_for_what_the_case_names_and_for_nothing_else():
    def forward(x, y, z):
        return 2 * y, (x, y, z)

    def check_as(*gradients, zero):
        case = Case("", (draw(7, 5), draw(7, 5), draw(3)), zero=frozenset(zero))
        known = {"2 dy": lambda dy: 2 * dy, "zeros": lambda dy: np.zeros(3), None: lambda dy: None}
        backward = lambda dy, cache: tuple(known[name](dy) for name in gradients)  # noqa: E731
        return gradcheck.check_functions("idle", forward, backward, case, STREAM)

    assert check_as(None, "2 dy", None, zero="xz").failures == []
    [failure] = check_as(None, "2 dy", None, zero="x").failures
    assert "backward must return (dx, dy, dz), got 1 gradients" in failure
    [failure] = check_as(None, None, None, zero="xz").failures
    assert "got 0 gradients" in failure
    [failure] = check_as("2 dy", None, "zeros", zero="yz").failures
    assert "got 2 gradients" in failure


def test_a_backward_may_pop_the_lists_of_its_cache_and_return_none_for_what_was_left_out():
    def forward(x, w=None):
        return 2 * x, ([x, x],)

    def backward(dy, cache):
        cache[0].pop()
        return 2 * dy, None

    result = gradcheck.check_functions("pops", forward, backward, Case("", (draw(7, 5),)), STREAM)
    assert result.failures == []


def test_arguments_that_do_not_fit_or_are_not_float64_are_refused():
    assert "missing a required argument" in check("mlp", case=Case("", (draw(7, 5),))).failures[0]
    case = Case("", (draw(7, 5).astype(np.float32),))
    assert "z_NE must be float64" in check("top2_gate", case=case).failures[0]


def near_tie(rows, gap):
    """Logits whose second and third best are `gap` apart in the first rows."""
    z_NE = np.tile([2.0, 0.5, 0.5, -1.0, -2.0], (7, 1)) + np.arange(7)[:, None] / 10
    z_NE[:rows, 2] -= gap
    z_NE[rows:, 2] -= 0.7
    return Case("", (z_NE,))


def test_a_probe_that_changes_a_decision_is_taken_again_with_a_smaller_step():
    result = check("top2_gate", case=near_tie(rows=2, gap=3e-4))
    assert (result.failures, result.redrawn, result.skipped, result.probes) == ([], 4, 0, 35)


def test_a_probe_on_a_tie_is_skipped_and_counted():
    result = check("top2_gate", case=near_tie(rows=1, gap=0.0))
    assert (result.failures, result.redrawn, result.skipped) == ([], 2, 2)


def test_a_case_that_lies_on_ties_everywhere_fails():
    [failure] = check("top2_gate", case=Case("", (np.zeros((7, 5)),))).failures
    assert "decisions changed for 35 of 35 probes at every step" in failure


def test_a_direction_that_changes_a_decision_is_redrawn():
    z_NE = np.concatenate([near_tie(rows=1, gap=1e-4).args[0], 2 * draw(60, 5)])
    result = check("top2_gate", case=Case("", (z_NE,)))
    assert (result.failures, result.probes, result.skipped) == ([], slopes.DIRECTIONS, 0)
    assert 0 < result.redrawn <= result.probes


def test_the_result_of_a_bug_beside_flips_is_still_a_failure():
    bug = ("top2_gate", " - (gate_NK * dgate_NK).sum(-1, keepdims=True)", " + 0")
    assert "relative error" in check(*bug, case=near_tie(rows=2, gap=3e-4)).failures[0]


# The registry, on a package written for the purpose


OPS = """
def double_forward(x):
    "Double."
    return 2 * x, (x,)
def double_backward(dy, cache):
    "Undo."
    return 2 * dy
def helper(x): return x
"""
COUNTER = itertools.count()
DOUBLE = {"double": lambda rng: [Case("", (rng.standard_normal((3, 5)),))]}


@pytest.fixture
def package(tmp_path, monkeypatch):
    def write(**sources):
        name = f"demo_package_{next(COUNTER)}"
        (tmp_path / name).mkdir()
        for module, source in {"__init__": "", **sources}.items():
            (tmp_path / name / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(registry, "PACKAGES", (name,))
        return name

    yield write
    for name in [name for name in sys.modules if name.startswith("demo_package_")]:
        del sys.modules[name]


def failures(cases=DOUBLE):
    return [text for result in gradcheck.check_all(cases=cases) for text in result.failures]


def test_the_registry_finds_pairs_where_they_are_defined(package):
    name = package(ops=OPS, other="from .ops import double_forward")
    assert list(registry.pairs()) == ["double"]
    assert registry.pair("double").module.__name__ == f"{name}.ops"
    assert failures() == []


def test_a_pair_with_two_homes_is_refused(package):
    package(ops=OPS, other="def double_forward(x): return x, ()")
    with pytest.raises(ValueError, match=r"'double' is defined in .*ops and .*other"):
        registry.pairs()


@pytest.mark.parametrize("half, missing", [HALVES, HALVES[::-1]])
def test_a_half_without_a_partner_fails(package, half, missing):
    package(ops=OPS.replace(f"double_{missing}", "something"))
    assert failures() == [
        f"double: double_{half} has no partner. Write double_{missing} beside it."
    ]
    [failure] = gradcheck.check_pair("double", DOUBLE["double"](STREAM), STREAM).failures
    assert "has no partner" in failure


def test_a_missing_case_a_missing_docstring_and_a_case_too_many_fail(package):
    package(ops=OPS.replace('"Undo."', ""))
    assert failures() == [
        "double: double_backward has no docstring. Write one, with shapes and source."
    ]
    assert "the pair has no case" in failures(cases={})[0]
    assert "there is a case but no such pair" in failures(DOUBLE | {"triple": None})[1]
    assert failures({"double": lambda rng: []})[0].startswith("double: ")


def test_a_swap_is_taken_back_to_what_stood_there_even_after_an_exception(package):
    package(ops=OPS)
    pair = registry.pair("double")
    before = pair.backward
    with pytest.raises(KeyError), registry.swap("double_backward", max):
        with registry.swap("double_backward", min):
            assert pair.backward is min
        assert pair.backward is max
        raise KeyError
    assert pair.backward is before


def test_a_swapped_in_bug_fails_and_is_gone_afterwards(package):
    package(ops=OPS)
    case = Case("", (draw(3, 5),))
    with registry.swap("double_backward", lambda dy, cache: -2 * dy):
        with registry.swap("helper", abs):
            assert "a sign" in gradcheck.check_case("double", case, STREAM).failures[0]
    assert gradcheck.check_case("double", case, STREAM).failures == []


def test_unknown_names_are_refused_with_a_suggestion(package):
    package(ops=OPS)
    for refuse in (registry.pair, lambda name: gradcheck.check_all([name], DOUBLE)):
        with pytest.raises(ValueError, match=r"got 'duoble'. Did you mean double\?"):
            refuse("duoble")
    with pytest.raises(ValueError, match=r"Did you mean double_backward"):
        registry.swap("double_bakward", abs).__enter__()


# Reports


def test_a_report_is_one_line_and_plain_json():
    errors = {"x": 3.1e-11, "w.a": math.inf, "w.b": 0.0}
    result = gradcheck.PairResult("gate", errors, ["gate: wrong"], 1, 40, 3, 1)
    line = gradcheck.format_result(result)
    assert line.startswith("gate ") and "FAIL  x 3.1e-11  w inf" in line and "\n" not in line
    assert "decisions changed for 3 of 40 probes, 1 skipped" in line
    record = json.loads(json.dumps(gradcheck.to_json([result], seed=5), allow_nan=False))
    assert (record["passed"], record["limit"], record["seed"]) == (False, slopes.LIMIT, 5)
    assert record["pairs"][0]["errors"] == errors | {"w.a": None}


def test_a_pair_checked_alone_sees_the_numbers_it_sees_among_all(package):
    package(ops=OPS + OPS.replace("double", "again"))
    cases = DOUBLE | {"again": DOUBLE["double"]}
    [alone] = gradcheck.check_all(["double"], cases, seed=4)
    assert alone in gradcheck.check_all(cases=cases, seed=4)
    assert alone not in gradcheck.check_all(cases=cases, seed=5)


def test_the_gradient_of_what_has_no_docstring_is_judged_too(package):
    package(ops=OPS.replace('"Undo."', "").replace("return 2 * dy", "return 3 * dy"))
    wrong, mute = failures()
    assert "double_backward has no docstring" in mute and "docstring" not in wrong


def test_only_a_function_can_be_swapped_in():
    with pytest.raises(ValueError, match="what stands for 'dots' must be a function, got int"):
        with registry.swap("dots", 3):
            pass
