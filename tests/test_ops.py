"""The calculus: exact values, extremes without warnings, and the dtype that goes in comes out."""

import math

import numpy as np
import oracles
import pytest
import tiny

from moe_numpy.classroom import registry
from moe_numpy.config import ACTIVATIONS, GATED, MoEConfig
from moe_numpy.lab.bench_products import buffers
from moe_numpy.moe import balance, capacity, dispatch, experts, mlp, router, score
from moe_numpy.ops import activation, linear, loss, norm, normal, rotary, rows, softmax
from moe_numpy.transformer import attention
from moe_numpy.tree import leaves


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------- normal distribution
def test_normal_cdf_is_that_of_the_error_function_to_the_last_bits():
    x = np.concatenate((np.linspace(-40.0, 40.0, 20_001), [0.0, -0.0, 1e-300, -1e-300]))
    wanted = np.array([0.5 * math.erfc(-v / math.sqrt(2.0)) for v in x])
    got = normal.normal_cdf(x)
    assert np.abs(got - wanted).max() < 1e-15
    assert got.min() >= 0.0
    assert got.max() <= 1.0
    close(got + normal.normal_cdf(-x), 1.0, 1e-15)


def test_normal_pdf_is_the_slope_of_the_cdf():
    x = np.linspace(-6.0, 6.0, 401)
    slope = (normal.normal_cdf(x + 1e-5) - normal.normal_cdf(x - 1e-5)) / 2e-5
    assert np.abs(slope - normal.normal_pdf(x)).max() < 1e-9
    close(normal.normal_pdf(np.zeros(1)), 1.0 / math.sqrt(2.0 * math.pi))


# ------------------------------------------------------------------------------------ activations
@pytest.mark.parametrize("kind", [kind for kind in ACTIVATIONS if kind not in GATED])
def test_activations_agree_with_the_judge(kind):
    x = np.random.default_rng(0).normal(0.0, 3.0, 300)
    y, _ = activation.activate_forward(kind, x)
    close(y, [oracles.PLAIN[kind](v) for v in x.tolist()])


@pytest.mark.parametrize("kind", GATED)
def test_gated_activations_agree_with_the_judge(kind):
    branches = np.random.default_rng(0).normal(0.0, 5.0, (3 if kind == "swiglu3" else 2, 300))
    y, _ = activation.activate_forward(kind, *branches)
    units = zip(*branches.tolist(), strict=True)
    close(y, [oracles.GATED[kind](*unit) for unit in units])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clamped_swiglu_is_constant_beyond_its_bounds_and_learns_at_them(dtype):
    gate = np.array([-1e4, -7.5, -7.0, 7.0, 7.5, 1e4], dtype)
    up = np.array([-1e4, -7.5, -7.0, 7.0, 7.5, 1e4], dtype)
    one = np.ones_like(gate)
    y, cache = activation.clamped_swiglu_forward(gate, one)
    dgate, _ = activation.clamped_swiglu_backward(one, cache)
    assert abs(y[0]) < 1e-12
    assert y[3] == y[4] == y[5]
    assert abs(y[3] - 14.0) < 1e-3
    assert (abs(dgate) > 1e-12).tolist() == [False, True, True, True, False, False]
    y, cache = activation.clamped_swiglu_forward(one, up)
    _, dup = activation.clamped_swiglu_backward(one, cache)
    assert y[0] == y[1] == y[2] < 0.0 < y[3] == y[4] == y[5]
    assert (dup != 0.0).tolist() == [False, False, True, True, False, False]
    assert y.dtype == dgate.dtype == dup.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clamped_swiglu_lets_nothing_through_of_a_huge_negative_gate(dtype):
    gate, up = np.full(2, np.finfo(dtype).min), np.array([7.0, -3.0], dtype)
    with np.errstate(over="ignore"):
        y, cache = activation.clamped_swiglu_forward(gate, up)
        dgate, dup = activation.clamped_swiglu_backward(np.ones_like(y), cache)
    assert y.tolist() == dgate.tolist() == dup.tolist() == [0.0, 0.0]


def test_gelu_and_its_tanh_form_differ_by_less_than_a_thousandth():
    x = np.linspace(-5.0, 5.0, 1001)
    difference = activation.gelu_forward(x)[0] - activation.gelu_tanh_forward(x)[0]
    assert 1e-5 < np.abs(difference).max() < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["relu", "sigmoid", "softplus", "silu", "gelu", "gelu_tanh"])
def test_activations_survive_extremes_with_their_limits(kind, dtype):
    sizes = [1e4, 1e3, 300.0, 89.0, 50.0]
    x = np.array([-v for v in sizes] + [0.0] + sizes[::-1], dtype)
    y, cache = getattr(activation, f"{kind}_forward")(x)
    dx = getattr(activation, f"{kind}_backward")(np.ones_like(x), cache)
    assert y.dtype == dx.dtype == x.dtype
    small, large = x <= -50.0, x >= 50.0
    limit = {"sigmoid": np.ones_like(x)}.get(kind, x)
    close(y[small], 0.0, 1e-12)
    close(y[large], limit[large], 1e-6 if dtype == "float32" else 1e-12)
    slope = 0.0 if kind == "sigmoid" else 1.0
    close(dx[small], 0.0, 1e-12)
    close(dx[large], slope, 1e-6 if dtype == "float32" else 1e-12)
    at_zero = {"sigmoid": 0.5, "softplus": math.log(2.0)}.get(kind, 0.0)
    close(y[x == 0.0], at_zero, 1e-7 if dtype == "float32" else 1e-15)


@pytest.mark.parametrize(("dtype", "least"), [("float32", -87.0), ("float64", -708.0)])
def test_a_sigmoid_is_right_down_to_the_smallest_number_of_its_type(dtype, least):
    x = np.array([-np.inf, 2 * least, least, 0.9 * least, -30.0], dtype)
    with np.errstate(all="raise"):
        y, cache = activation.sigmoid_forward(x)
        slope = activation.sigmoid_backward(np.ones_like(x), cache)
    np.testing.assert_allclose(y[2:], np.exp(x[2:].astype("float64")), rtol=1e-5)
    np.testing.assert_allclose(slope[2:], y[2:], rtol=1e-5)
    assert y[:2].tolist() == slope[:2].tolist() == [0.0, 0.0]
    assert activation.sigmoid_forward(-x[:2])[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_silu_lets_through_of_a_huge_negative_number_is_nothing(dtype):
    x = np.array([-np.finfo(dtype).max, -1e30], dtype)
    y, cache = activation.silu_forward(x)
    assert y.tolist() == activation.silu_backward(np.ones_like(x), cache).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["relu", "sigmoid", "softplus", "silu", "gelu", "gelu_tanh"])
def test_activations_take_arrays_of_no_axes(kind):
    row, one = np.array([0.7]), np.array(0.7)
    forward, backward = (getattr(activation, f"{kind}_{way}") for way in ("forward", "backward"))
    (y, cache), (expected, row_cache) = forward(one), forward(row)
    assert y.shape == () and y == expected[0]
    assert backward(one, cache) == backward(row, row_cache)[0]


def test_relu_of_minus_infinity_is_zero():
    y, cache = activation.relu_forward(np.array([-np.inf, np.inf]))
    assert y.tolist() == [0.0, np.inf]
    assert activation.relu_backward(np.ones(2), cache).tolist() == [0.0, 1.0]


def test_relu_has_the_subgradient_zero_at_zero():
    y, cache = activation.relu_forward(np.array([-1.0, 0.0, 2.0]))
    assert y.tolist() == [0.0, 0.0, 2.0]
    assert activation.relu_backward(np.full(3, 5.0), cache).tolist() == [0.0, 0.0, 5.0]


# ---------------------------------------------------------------------------------------- softmax
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax_takes_huge_and_minus_infinite_logits(dtype):
    z = np.array([[1.0, -np.inf, 2.0], [-np.inf, -np.inf, 3.0], [1e4, -1e4, 1e4]], dtype)
    p, cache = softmax.softmax_forward(z)
    tolerance = 1e-6 if dtype == "float32" else 1e-12
    e = math.exp(1.0)
    close(p, [[1 / (1 + e), 0, e / (1 + e)], [0, 0, 1], [0.5, 0, 0.5]], tolerance)
    assert (p[np.isneginf(z)] == 0.0).all()
    dz = softmax.softmax_backward(
        np.random.default_rng(0).standard_normal(z.shape).astype(dtype), cache
    )
    assert np.isfinite(dz).all()
    assert (dz[np.isneginf(z)] == 0.0).all()
    close(dz.sum(-1), 0.0, tolerance)


def test_log_softmax_is_the_logarithm_of_the_softmax_and_keeps_small_numbers():
    z = np.random.default_rng(0).normal(0.0, 4.0, (5, 7))
    y, _ = softmax.log_softmax_forward(z)
    close(y, [[v - oracles.log_sum_exp(row) for v in row] for row in z.tolist()])
    close(np.exp(y), softmax.softmax_forward(z)[0])
    assert softmax.log_softmax_forward(np.array([0.0, -5000.0]))[0].tolist() == [0.0, -5000.0]


# ------------------------------------------------------------------------------- norms and losses
def test_norms_agree_with_the_judge():
    rng = np.random.default_rng(0)
    x, gain, bias = rng.normal(1.0, 2.0, (2, 3, 5)), rng.standard_normal(5), rng.standard_normal(5)
    layered, _ = norm.layer_norm_forward(x, gain, bias)
    rooted, _ = norm.rms_norm_forward(x, gain)
    for at in np.ndindex(2, 3):
        close(layered[at], oracles.layer_norm(x[at].tolist(), gain.tolist(), bias.tolist()))
        close(rooted[at], oracles.rms_norm(x[at].tolist(), gain.tolist()))


def test_norms_of_a_constant_row_are_finite():
    x = np.full((2, 4), 3.0)
    y, cache = norm.layer_norm_forward(x, np.ones(4), np.full(4, 0.5))
    close(y, 0.5)
    assert np.isfinite(norm.layer_norm_backward(np.ones((2, 4)), cache)[0]).all()
    y, _ = norm.rms_norm_forward(np.zeros((2, 4)), np.ones(4))
    assert not y.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_and_its_gradient_agree_with_the_judge(smoothing):
    rng = np.random.default_rng(0)
    logits_NV, target_N = rng.normal(0.0, 3.0, (7, 5)), rng.integers(0, 5, 7)
    value, cache = loss.cross_entropy_forward(logits_NV, target_N, smoothing)
    close(value, oracles.cross_entropy(logits_NV.tolist(), target_N.tolist(), smoothing))
    wish_NV = np.full((7, 5), smoothing / 5)
    wish_NV[np.arange(7), target_N] += 1.0 - smoothing
    p_NV = np.array([oracles.softmax(z) for z in logits_NV.tolist()])
    close(loss.cross_entropy_backward(1.3, cache), 1.3 * (p_NV - wish_NV) / 7)


def test_cross_entropy_of_no_tokens_is_zero_and_of_a_sure_mistake_is_large():
    value, cache = loss.cross_entropy_forward(np.zeros((0, 5)), np.zeros(0, int))
    assert value == 0.0
    assert loss.cross_entropy_backward(1.0, cache).shape == (0, 5)
    value, _ = loss.cross_entropy_forward(np.array([[0.0, 5000.0]]), np.array([0]))
    close(value, 5000.0)
    with pytest.raises(ValueError, match="from 0 to 4"):
        loss.cross_entropy_forward(np.zeros((1, 5)), np.array([5]))


# ------------------------------------------------------------------------------ linear, embedding
def test_linear_is_a_matrix_product_for_any_number_of_leading_axes():
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((4, 3)), rng.standard_normal(3)
    for lead in ((), (5,), (2, 5), (2, 0, 5)):
        x = rng.standard_normal((*lead, 4))
        y, cache = linear.linear_forward(x, w, b)
        assert y.shape == (*lead, 3)
        for at in np.ndindex(*lead):
            close(y[at], np.array(oracles.vec_mat(x[at].tolist(), w.tolist())) + b)
        dy = rng.standard_normal(y.shape)
        dx, dw, db = linear.linear_backward(dy, cache)
        close(dx, dy @ w.T)
        close(dw, x.reshape(-1, 4).T @ dy.reshape(-1, 3))
        close(db, dy.reshape(-1, 3).sum(0))


@pytest.mark.parametrize("shape", [(40,), (3, 13), (1,), (0,), (2, 0)])
def test_embedding_backward_is_the_scatter_addition(shape):
    rng = np.random.default_rng(0)
    token, table_VC = rng.integers(0, 9, shape), rng.standard_normal((9, 4))
    y, cache = linear.embedding_forward(token, table_VC)
    assert (y == table_VC[token]).all()
    dy = rng.standard_normal(y.shape)
    wanted = np.zeros_like(table_VC)
    np.add.at(wanted, token, dy)
    close(linear.embedding_backward(dy, cache), wanted)


@pytest.mark.parametrize("bad", [[-1, 0], [0, 9], [0.5, 1.0], [True, False]])
def test_tokens_outside_the_vocabulary_are_refused(bad):
    with pytest.raises(ValueError, match="embedding_forward: tokens must be"):
        linear.embedding_forward(np.array(bad), np.zeros((9, 2)))


def test_no_op_writes_into_what_it_was_given():
    for name, arguments, upstream in list_pairs("float64"):
        kept = [np.copy(a) for a in leaves(tuple(arguments)) if isinstance(a, np.ndarray)]
        forward, backward = named(name)
        _, cache = split(forward(*arguments))
        dy = tuple(np.copy(u) if isinstance(u, np.ndarray) else u for u in upstream)
        backward(*dy, cache)
        now = [a for a in leaves(tuple(arguments)) if isinstance(a, np.ndarray)]
        assert all((a == b).all() for a, b in zip(kept, now, strict=True)), name
        for a, b in zip(dy, upstream, strict=True):
            assert np.array_equal(a, b), f"{name} changed the upstream gradient"


# ------------------------------------------------------------------------------------------ dtype
MODULES = (activation, linear, loss, norm, rotary, softmax, balance, router, dispatch, experts)


def named(name):
    """Find a pair by its name, wherever it lives."""
    for module in (*MODULES, attention, mlp):
        if hasattr(module, f"{name}_forward"):
            return getattr(module, f"{name}_forward"), getattr(module, f"{name}_backward")
    raise AssertionError(name)


def split(returned):
    return returned[:-1], returned[-1]


def list_pairs(dtype):
    """List every op with arguments and upstream gradients of one dtype."""
    rng = np.random.default_rng(0)

    def r(*shape):
        return rng.standard_normal(shape).astype(dtype)

    x, p = r(7, 4), np.abs(r(7, 4)) + np.dtype(dtype).type(0.1)
    wished_NK = np.array([[0, 2], [1, 2], [3, 0], [2, 1], [0, 1], [2, 0], [2, 3]])
    tight = capacity.Capacity(factor=0.6)
    chosen_NK, plan = capacity.make_plan(wished_NK, x, p, tight)
    R, one = plan.token_R.size, np.dtype(dtype).type(0.7)
    cfg = MoEConfig(num_experts=4, top_k=2, hidden=3, activation="swiglu")
    weights = experts.ExpertParams(r(4, 5, 3), r(4, 5, 3), r(4, 3, 5))
    biased_cfg = MoEConfig(num_experts=4, top_k=2, hidden=3, activation="swiglu3", expert_bias=True)
    biased = weights._replace(third_ECF=r(4, 5, 3), in_EF=r(4, 3), up_EF=r(4, 3), out_EC=r(4, 5))
    mlp_weights = mlp.MLPParams(r(4, 3), None, r(3, 4))
    widest = mlp.MLPParams(r(4, 3), r(4, 3), r(3, 4), r(4, 3))
    target_N = np.array([0, 3, 1, 2, 2, 0, 1])
    plain = ("identity", "relu", "sigmoid", "softplus", "silu", "gelu", "gelu_tanh")
    return [
        *((kind, (x,), (r(7, 4),)) for kind in (*plain, "softmax", "log_softmax")),
        *((kind, (x, r(7, 4)), (r(7, 4),)) for kind in GATED if kind != "swiglu3"),
        ("swiglu3", (x, r(7, 4), r(7, 4)), (r(7, 4),)),
        ("activate", ("silu", x), (r(7, 4),)),
        ("activate", ("swiglu3", x, r(7, 4), r(7, 4)), (r(7, 4),)),
        ("linear", (x, r(4, 3)), (r(7, 3),)),
        ("linear", (x, r(4, 3), r(3)), (r(7, 3),)),
        ("embedding", (target_N, r(5, 4)), (r(7, 4),)),
        ("cross_entropy", (x, target_N, 0.1), (one,)),
        ("cross_entropy", (x, target_N), (one,)),
        ("layer_norm", (x, r(4), r(4)), (r(7, 4),)),
        ("rms_norm", (x, r(4)), (r(7, 4),)),
        ("rotary", (r(2, 7, 4), r(7, 1, 2), r(7, 2, 2)), (r(2, 7, 4),)),
        ("switch_loss", (p, chosen_NK), (one,)),
        ("importance", (r(7, 2), chosen_NK, 4), (r(4),)),
        ("load", (x, r(7, 4), p, 2), (r(4),)),
        ("cv_squared", (np.abs(r(4)),), (one,)),
        ("z_loss", (x,), (one,)),
        ("raw_gate", (p, chosen_NK), (r(7, 2),)),
        ("renormalized_gate", (x, chosen_NK), (r(7, 2),)),
        ("dispatch", (r(7, 5), plan), (r(R, 5),)),
        ("combine", (r(R, 5), r(7, 2), plan), (r(7, 5),)),
        ("grouped_linear", (r(R, 5), r(4, 5, 3), plan.offsets), (r(R, 3),)),
        ("grouped_bias", (r(R, 3), r(4, 3), plan.offsets), (r(R, 3),)),
        ("expert_linear", (r(R, 5), r(4, 5, 3), r(4, 3), plan.offsets), (r(R, 3),)),
        ("expert_linear", (r(R, 5), r(4, 5, 3), None, plan.offsets), (r(R, 3),)),
        ("experts", (r(R, 5), weights, cfg, plan.offsets), (r(R, 5),)),
        ("experts", (r(R, 5), biased, biased_cfg, plan.offsets), (r(R, 5),)),
        ("scores", (r(2, 3, 4, 6), r(2, 3, 5, 6)), (r(2, 3, 4, 5),)),
        ("scores", (r(2, 3, 4, 6), r(2, 3, 5, 6), r(3), 1.3, 0.7), (r(2, 3, 4, 5),)),
        ("sink_softmax", (r(2, 3, 4, 6), r(3)), (r(2, 3, 4, 6),)),
        ("soft_cap", (x, 0.7), (r(7, 4),)),
        ("qk_norm", (r(2, 3, 4, 6), r(6), "head"), (r(2, 3, 4, 6),)),
        ("qk_norm", (r(2, 3, 4, 6), r(18), "full"), (r(2, 3, 4, 6),)),
        ("qk_norm", (r(2, 3, 4, 6), None, "l2"), (r(2, 3, 4, 6),)),
        ("mlp", (x, mlp_weights, "gelu"), (r(7, 4),)),
        ("mlp", (x, widest, "swiglu3"), (r(7, 4),)),
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_op_returns_the_dtype_it_was_given_forward_and_backward(dtype):
    for name, arguments, upstream in list_pairs(dtype):
        forward, backward = named(name)
        outputs, cache = split(forward(*arguments))
        gradients = backward(*upstream, cache)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        for value in (*leaves(outputs), *leaves(tuple(gradients))):
            assert value.dtype == dtype, name
    x = np.linspace(-3, 3, 5, dtype=dtype)
    assert normal.normal_cdf(x).dtype == normal.normal_pdf(x).dtype == dtype


@pytest.mark.parametrize("name", ["gelu_tanh", "silu", "swiglu", "geglu"])
def test_blocks_change_no_bit_whatever_the_layout(name, monkeypatch):
    pair, gated = registry.pair(name), name.endswith("glu")
    rng = np.random.default_rng(5)
    dy = rng.standard_normal((6, 4, 5))
    given = [rng.standard_normal((5, 4, 6)).T for _ in range(1 + gated)]
    results = []
    for block in (1 << 20, 7, 25):  # whole; a row each; five rows each, and four are left
        monkeypatch.setattr(rows, "BLOCK", block)
        y, cache = pair.forward(*given)
        results.append((y, pair.backward(dy, cache)))
    assert tiny.same_bits(results[0], results[1]) and tiny.same_bits(results[0], results[2])
    y, cache = pair.forward(*(np.ascontiguousarray(x) for x in given))
    assert tiny.same_bits((y, pair.backward(dy, cache)), results[1])


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "swiglu3"])
def test_the_activation_alone_is_that_of_the_pair(name):
    branches = np.random.default_rng(6).standard_normal((1 + (name in GATED), 3, 5))
    wanted, _ = activation.activate_forward(name, *branches)
    assert activation.activate(name, *branches).tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("name", "share"),
    [("gelu_tanh", 2), ("silu", 2), ("swiglu", 3), ("geglu", 3), ("swiglu3", 5)],
)
def test_an_mlp_keeps_as_many_hidden_rows_as_it_says(name, share):
    params = mlp.init_mlp(np.random.default_rng(7), 2, 500, name, "float32", 1)
    x = np.ones((16, 2), "float32")
    _, cache = mlp.mlp_forward(x, params, name)
    given = {id(array) for array in (x, *leaves(params))}
    kept = sum(array.size for key, array in buffers(cache).items() if key not in given)
    assert kept == share * 16 * 500


def test_scores_and_z_loss_survive_logits_far_beyond_any_exponential():
    score_E, cache = score.sqrt_softplus_forward(np.array([-2000.0, -1.0]))
    dlogit_E = score.sqrt_softplus_backward(np.ones(2), cache)
    assert np.isfinite(score_E).all() and np.isfinite(dlogit_E).all()
    logit_NE = np.array([[1000.0, 0.0], [-1000.0, -1000.0]])
    value, cache = balance.z_loss_forward(logit_NE)
    close(value, (1000.0**2 + (math.log(2.0) - 1000.0) ** 2) / 2.0)
    assert np.isfinite(balance.z_loss_backward(1.0, cache)).all()


def test_the_gradient_of_a_grouped_bias_is_nobody_elses_array():
    x_RO, b_EO = np.ones((5, 3)), np.ones((2, 3))
    _, cache = experts.grouped_bias_forward(x_RO, b_EO, (0, 2, 5))
    dy_RO = np.ones((5, 3))
    dx_RO, _ = experts.grouped_bias_backward(dy_RO, cache)
    assert (dx_RO == dy_RO).all() and not np.shares_memory(dx_RO, dy_RO)
