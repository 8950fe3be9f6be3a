"""The experts: one two-layer MLP each, run over contiguous slices of the sorted rows.

Letters of this file: a matrix is cut into Q parts of J columns, or M parts of W rows; P places of
an expert whose rows are padded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from numpy.random import Generator

from moe_numpy import machine, processes
from moe_numpy.backend import Array, Cache, few_launches, to_device, xp
from moe_numpy.config import MoEConfig, branches
from moe_numpy.ops import activation

# The kernels that OpenBLAS has for AVX-512 multiply small matrices as they lie. Larger ones they
# first copy into an order of their own, which costs more than a product of few rows does. So where
# an expert has few rows, its matrix is multiplied in parts, which are small again. With FEW = 0
# there are no parts; what they gain is the step "few" of figures/speed_steps.json. (The kernels for
# AVX2 copy all matrices: what the parts cost there is in the record, too.)
FEW = 32  # rows of an expert
SMALL = 1_000_000  # multiplications of a small product,
SMALL_RESULT = 1024  # or if its matrix is transposed: numbers of the result
WIDE, NARROW = 64, 32  # columns (rows, of a gradient) in a part, and in one of a transposed matrix


class ExpertParams(NamedTuple):
    """The matrices of all experts, and their biases where the configuration wants some.

    `up_ECF` is there for gated activations, `third_ECF` for "swiglu3" alone. The third branch has
    no bias: no system has both.
    """

    in_ECF: Array
    up_ECF: Array | None
    out_EFC: Array
    third_ECF: Array | None = None
    in_EF: Array | None = None
    up_EF: Array | None = None
    out_EC: Array | None = None


def init_experts(
    rng: Generator, cfg: MoEConfig, width: int, dtype: str, depth: int = 1
) -> ExpertParams:
    """Draw each expert as `init_mlp` draws the dense feed-forward; biases start at zero.

    What reads the stream gets deviation 1 / sqrt(width), so that hidden units start at unit size;
    what writes into it 0.02 / sqrt(depth), where `depth` counts the residual branches (2 * layers).

    With ``cfg.init_scale`` all are truncated normal instead: of a normal with the deviation
    sqrt(init_scale / fan_in), what lies beyond two deviations is drawn again (Fedus et al. 2022,
    section 2.4). With ``cfg.same_start`` all experts are copies of one (V-MoE).
    """
    E, C, F = cfg.num_experts, width, cfg.hidden
    drawn = 1 if cfg.same_start else E

    def draw(std: float, I: int, O: int) -> Array:
        if cfg.init_scale is None:
            w = to_device(rng.normal(0.0, std, (drawn, I, O)), dtype)
        else:
            std = math.sqrt(cfg.init_scale / I)
            w = to_device(truncated_normal(rng, std, (drawn, I, O)), dtype)
        return xp.repeat(w, E, 0) if cfg.same_start else w

    def zeros(O: int) -> Array | None:
        return xp.zeros((E, O), dtype) if cfg.expert_bias else None

    return ExpertParams(
        in_ECF=draw(1.0 / math.sqrt(C), C, F),
        up_ECF=draw(1.0 / math.sqrt(C), C, F) if cfg.gated else None,
        out_EFC=draw(0.02 / math.sqrt(depth), F, C),
        third_ECF=draw(1.0 / math.sqrt(C), C, F) if branches(cfg.activation) == 3 else None,
        in_EF=zeros(F),
        up_EF=zeros(F) if cfg.gated else None,
        out_EC=zeros(C),
    )


def truncated_normal(rng: Generator, std: float, shape: tuple[int, ...]) -> Array:
    """Draw from a normal, on the host; redraw what lies beyond two deviations until none does.

    `std` is the deviation before the cut; that of the numbers returned is 0.88 of it.
    """
    x = rng.normal(0.0, std, shape)
    while (beyond := abs(x) > 2.0 * std).any():
        x[beyond] = rng.normal(0.0, std, x[beyond].shape)
    return x


def grouped_linear_forward(
    x_RI: Array, w_EIO: Array, offsets: tuple[int, ...]
) -> tuple[Array, Cache]:
    """Multiply the rows of each expert by that expert's matrix.

        y[r] = x[r] @ w[e]    for offsets[e] <= r < offsets[e + 1]

    Shapes     x_RI (R, I), rows sorted by expert; w_EIO (E, I, O); offsets E + 1 integers
               -> y_RO (R, O)
    Cache      (x_RI, w_EIO, offsets): no copies
    Source     Gale et al. 2022, MegaBlocks, section 4; differs: a loop over dense slices, few rows
               in several products with parts of a large matrix
    """
    R, (E, I, O) = x_RI.shape[0], w_EIO.shape
    y_RO = xp.empty((R, O), x_RI.dtype)
    J = _part(WIDE, O)
    w_EQIJ = w_EIO.reshape(E, I, O // J, J).swapaxes(1, 2)
    y_QRJ = y_RO.reshape(R, O // J, J).swapaxes(0, 1)

    def multiply(e: int) -> None:
        start, end = offsets[e], offsets[e + 1]
        x, count = x_RI[start:end], end - start
        if count > FEW:
            xp.matmul(x, w_EIO[e], out=y_RO[start:end])
        elif count * I * O > SMALL:
            xp.matmul(x, w_EQIJ[e], out=y_QRJ[:, start:end])
        elif count:
            xp.dot(x, w_EIO[e], out=y_RO[start:end])

    machine.for_each(multiply, len(w_EIO), w_EIO.size)
    return y_RO, (x_RI, w_EIO, offsets)


def grouped_linear_backward(
    dy_RO: Array, cache: Cache, dw_EIO: Array | None = None
) -> tuple[Array, Array]:
    """Undo `grouped_linear_forward`: `linear_backward` for each slice.

    dx[rows of e] = dy[rows of e] w[e]^T,    dw[e] = x[rows of e]^T dy[rows of e];
    an expert without rows gets the gradient zero.

    Shapes     dy_RO (R, O) -> dx_RI (R, I), dw_EIO (E, I, O), in a new array or the given one
    """
    x_RI, w_EIO, offsets = cache
    R, (E, I, O) = x_RI.shape[0], w_EIO.shape
    dx_RI = xp.empty((R, I), x_RI.dtype)
    if dw_EIO is None:
        dw_EIO = xp.empty((E, I, O), x_RI.dtype)
    J, W = _part(NARROW, I), _part(WIDE, I)
    w_EQOJ = w_EIO.reshape(E, I // J, J, O).swapaxes(2, 3)
    dx_QRJ = dx_RI.reshape(R, I // J, J).swapaxes(0, 1)
    dw_EMWO = dw_EIO.reshape(E, I // W, W, O)

    def undo(e: int) -> None:
        start, end = offsets[e], offsets[e + 1]
        x, dy, count = x_RI[start:end], dy_RO[start:end], end - start
        if count > FEW:
            xp.matmul(dy, w_EIO[e].T, out=dx_RI[start:end])
        elif count * I > SMALL_RESULT:
            xp.matmul(dy, w_EQOJ[e], out=dx_QRJ[:, start:end])
        elif count:
            xp.dot(dy, w_EIO[e].T, out=dx_RI[start:end])
        if count == 1:  # a product over a lone row is slow
            x, dy = _with_company(x), _with_company(dy)
        if count > FEW:
            xp.matmul(x.T, dy, out=dw_EIO[e])
        elif count * I * O > SMALL:
            xp.matmul(x.T.reshape(I // W, W, len(x)), dy, out=dw_EMWO[e])
        elif count:
            xp.dot(x.T, dy, out=dw_EIO[e])
        else:
            dw_EIO[e] = 0.0

    machine.for_each(undo, len(w_EIO), w_EIO.size)
    return dx_RI, dw_EIO


def _with_company(row: Array) -> Array:
    """Give a lone row (1, C) one of zeros for company."""
    pair = xp.zeros((2, row.shape[1]), row.dtype)
    pair[0] = row
    return pair


def _part(wanted: int, size: int) -> int:
    """Choose the size of the parts that an axis is cut into; one that cannot be cut stays whole."""
    return size if size % wanted else wanted


def padded_linear_forward(
    x_RI: Array, w_EIO: Array, offsets: tuple[int, ...]
) -> tuple[Array, Cache]:
    """Do what `grouped_linear_forward` does in one batched product over padded rows.

        X[e, p] = x[offsets[e] + p],    Y = X @ w,    y[offsets[e] + p] = Y[e, p]

    Every expert gets as many places P as the busiest one needs, filled up with zeros. That is more
    work in one launch instead of E: the better trade on a GPU, the worse one on a CPU.

    Shapes     x_RI (R, I), rows sorted by expert; w_EIO (E, I, O); offsets E + 1 integers
               -> y_RO (R, O)
    Cache      (x_RI, w_EIO, place_R, P): no copy of x, which is padded again on the way back
    Source     Lepikhin et al. 2020, GShard, section 3.1; differs: P is what is needed, none drop
    """
    E, I, O = w_EIO.shape
    P = max(end - start for start, end in itertools.pairwise(offsets))
    expert_R, start_E = _experts_of_rows(offsets), to_device(offsets[:-1])
    place_R = expert_R * P + xp.arange(x_RI.shape[0]) - start_E[expert_R]
    x_EPI = _pad(x_RI, place_R, (E, P, I))  # 1. pad
    y_EPO = x_EPI @ w_EIO  # 2. one product
    return y_EPO.reshape(E * P, O)[place_R], (x_RI, w_EIO, place_R, P)  # 3. unpad


def padded_linear_backward(
    dy_RO: Array, cache: Cache, dw_EIO: Array | None = None
) -> tuple[Array, Array]:
    """Undo `padded_linear_forward`: `linear_backward` for each expert; padding adds only zeros.

    Shapes     dy_RO (R, O) -> dx_RI (R, I), dw_EIO (E, I, O), in a new array or the given one
    """
    x_RI, w_EIO, place_R, P = cache
    E, I, O = w_EIO.shape
    dy_EPO = _pad(dy_RO, place_R, (E, P, O))  # 3.
    dx_EPI = dy_EPO @ w_EIO.swapaxes(1, 2)  # 2.
    dw_EIO = xp.matmul(_pad(x_RI, place_R, (E, P, I)).swapaxes(1, 2), dy_EPO, out=dw_EIO)
    return dx_EPI.reshape(E * P, I)[place_R], dw_EIO  # 1.


def grouped_bias_forward(x_RO: Array, b_EO: Array, offsets: tuple[int, ...]) -> tuple[Array, Cache]:
    """Add to the rows of each expert that expert's bias.

        y[r] = x[r] + b[e]    for offsets[e] <= r < offsets[e + 1]

    Shapes     x_RO (R, O), rows sorted by expert; b_EO (E, O); offsets E + 1 integers
               -> y_RO (R, O)
    Cache      (offsets,)
    Source     OpenAI 2025, gpt-oss: experts with biases
    """
    return x_RO + b_EO[_experts_of_rows(offsets)], (offsets,)


def grouped_bias_backward(dy_RO: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `grouped_bias_forward`: dx = dy, db[e] = sum of dy over the rows of e.

    An expert without rows gets the gradient zero. It must not be among the runs that `reduceat`
    adds up: for an empty run, `reduceat` returns the row where the run would begin, not zero.

    Shapes     dy_RO (R, O) -> dx_RO (R, O), db_EO (E, O)
    """
    (offsets,) = cache
    db_EO = xp.zeros((len(offsets) - 1, dy_RO.shape[1]), dy_RO.dtype)
    filled = _slices(offsets)
    if filled:
        starts = to_device([rows.start for _, rows in filled])
        db_EO[to_device([e for e, _ in filled])] = xp.add.reduceat(dy_RO, starts, axis=0)
    return dy_RO.copy(), db_EO


def expert_linear_forward(
    x_RI: Array, w_EIO: Array, b_EO: Array | None, offsets: tuple[int, ...]
) -> tuple[Array, Cache]:
    """Map the rows of each expert by that expert's matrix and, if there are any, its bias.

        y[r] = x[r] @ w[e] + b[e]    for offsets[e] <= r < offsets[e + 1]

    Shapes     x_RI (R, I), rows sorted by expert; w_EIO (E, I, O); b_EO (E, O) or None;
               offsets E + 1 integers -> y_RO (R, O)
    Cache      those of the product and of the bias
    Source     `linear_forward`, one for each expert
    """
    product_forward, _ = _products()
    y_RO, product_cache = product_forward(x_RI, w_EIO, offsets)  # 1. product
    if b_EO is None:
        return y_RO, (product_cache, None)
    y_RO, bias_cache = grouped_bias_forward(y_RO, b_EO, offsets)  # 2. bias
    return y_RO, (product_cache, bias_cache)


def expert_linear_backward(
    dy_RO: Array, cache: Cache, dw_EIO: Array | None = None
) -> tuple[Array, Array, Array | None]:
    """Undo `expert_linear_forward` part by part.

    Shapes     dy_RO (R, O) -> dx_RI (R, I), dw_EIO (E, I, O), in a new array or the given one,
               db_EO (E, O) or None
    """
    product_cache, bias_cache = cache
    _, product_backward = _products()
    db_EO = None
    if bias_cache is not None:
        dy_RO, db_EO = grouped_bias_backward(dy_RO, bias_cache)  # 2.
    dx_RI, dw_EIO = product_backward(dy_RO, product_cache, dw_EIO)  # 1.
    return dx_RI, dw_EIO, db_EO


def experts_forward(
    x_RC: Array, params: ExpertParams, cfg: MoEConfig, offsets: tuple[int, ...]
) -> tuple[Array, Cache]:
    """Run every expert's MLP on its own rows.

        y = act(x in) out    or, gated,    y = act(x in, x up) out

    "swiglu3" multiplies by a third branch, x third. All other products add a bias if there is one.
    Within a block of `training.expert_parallel` its processes share the experts out and keep the
    caches.

    Shapes     x_RC (R, C), rows sorted by expert; offsets E + 1 integers -> y_RC (R, C)
    Cache      the caches of its parts: x once, and for each hidden unit of a row as many numbers as
               `ledger.LEFT` lists for its activation (2 for tanh GELU, 3 for SwiGLU)
    Source     Shazeer et al. 2017, section 3.2; gated: Jiang et al. 2024, Mixtral, section 2.1
    """
    crew = processes.holder(params)
    run = run_here if crew is None else crew.forward
    return run(x_RC, params, cfg, offsets)


def experts_backward(dy_RC: Array, cache: Cache) -> tuple[Array, ExpertParams]:
    """Undo `experts_forward`, where it was done.

    Shapes     dy_RC (R, C) -> dx_RC (R, C), grads
    """
    if isinstance(cache, tuple):
        return undo_here(dy_RC, cache)
    return cache.backward(dy_RC)  # a ticket of `expert_parallel`


def run_here(
    x_RC: Array, params: ExpertParams, cfg: MoEConfig, offsets: tuple[int, ...]
) -> tuple[Array, Cache]:
    """Do the work of `experts_forward` in this process."""
    a_RF, in_cache = expert_linear_forward(x_RC, params.in_ECF, params.in_EF, offsets)  # 1. widen
    up_RF = up_cache = third_RF = third_cache = None
    if params.up_ECF is not None:
        up_RF, up_cache = expert_linear_forward(x_RC, params.up_ECF, params.up_EF, offsets)
    if params.third_ECF is not None:
        third_RF, third_cache = expert_linear_forward(x_RC, params.third_ECF, None, offsets)
    h_RF, act_cache = activation.activate_forward(
        cfg.activation, a_RF, up_RF, third_RF
    )  # 2. activate
    y_RC, out_cache = expert_linear_forward(
        h_RF, params.out_EFC, params.out_EC, offsets
    )  # 3. back to width C
    return y_RC, (in_cache, up_cache, third_cache, act_cache, out_cache)


def undo_here(
    dy_RC: Array, cache: Cache, room: ExpertParams | None = None
) -> tuple[Array, ExpertParams]:
    """Undo `run_here` part by part; every branch has read x, so their gradients add up.

    The gradients of matrices come in new arrays, or in `room` (that of `expert_parallel`, whose
    processes share it).
    """
    in_cache, up_cache, third_cache, act_cache, out_cache = cache
    room = room or ExpertParams(None, None, None)
    dh_RF, dout_EFC, dout_EC = expert_linear_backward(dy_RC, out_cache, room.out_EFC)  # 3.
    da_RF, dup_RF, dthird_RF = activation.activate_backward(dh_RF, act_cache)  # 2.
    dx_RC, din_ECF, din_EF = expert_linear_backward(da_RF, in_cache, room.in_ECF)  # 1.
    dup_ECF = dup_EF = dthird_ECF = None
    if up_cache is not None:
        dx_up_RC, dup_ECF, dup_EF = expert_linear_backward(dup_RF, up_cache, room.up_ECF)
        dx_RC += dx_up_RC
    if third_cache is not None:
        dx_third_RC, dthird_ECF, _ = expert_linear_backward(dthird_RF, third_cache, room.third_ECF)
        dx_RC += dx_third_RC
    grads = ExpertParams(din_ECF, dup_ECF, dout_EFC, dthird_ECF, din_EF, dup_EF, dout_EC)
    return dx_RC, grads


def _products() -> tuple[Callable, Callable]:
    """Choose how the rows meet the matrices: slice by slice, or padded where launches cost."""
    if few_launches():
        return padded_linear_forward, padded_linear_backward
    return grouped_linear_forward, grouped_linear_backward


def _experts_of_rows(offsets: tuple[int, ...]) -> Array:
    """Tell for every row which expert it belongs to (R,)."""
    return xp.searchsorted(to_device(offsets[1:]), xp.arange(offsets[-1]), side="right")


def _pad(x_RI: Array, place_R: Array, shape: tuple[int, int, int]) -> Array:
    E, P, I = shape
    padded = xp.zeros((E * P, I), x_RI.dtype)
    padded[place_R] = x_RI
    return padded.reshape(shape)


def _slices(offsets: tuple[int, ...]) -> list[tuple[int, slice]]:
    """List the experts that have rows, each with the slice of its rows."""
    bounds = itertools.pairwise(offsets)
    return [(e, slice(start, end)) for e, (start, end) in enumerate(bounds) if end > start]
