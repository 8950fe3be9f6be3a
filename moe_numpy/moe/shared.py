"""The shared expert: an MLP that every token takes, beside the routed experts."""

from __future__ import annotations

from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, to_device
from moe_numpy.config import MoEConfig
from moe_numpy.moe import mlp
from moe_numpy.ops import activation, linear


class SharedParams(NamedTuple):
    """An MLP, and the weights of its sigmoid gate if it has one."""

    mlp: mlp.MLPParams
    gate_C1: Array | None


def init_shared(
    rng: Generator, cfg: MoEConfig, width: int, dtype: str, depth: int = 1
) -> SharedParams:
    """Draw the MLP as `init_mlp` does, and small gate weights: the gate starts at about 1/2."""
    gate = None
    if cfg.shared.gated:
        gate = to_device(rng.normal(0.0, cfg.router_std, (width, 1)), dtype)
    hidden = cfg.shared.hidden
    return SharedParams(mlp.init_mlp(rng, width, hidden, cfg.activation, dtype, depth), gate)


def shared_forward(x_NC: Array, params: SharedParams, cfg: MoEConfig) -> tuple[Array, Cache]:
    """Run every token through the shared expert.

        y = MLP(x)    or, gated,    y = sigmoid(x gate) * MLP(x)

    Shapes     x_NC (N, C) -> y_NC (N, C)
    Cache      (MLP cache, None) or, gated, (MLP cache, (y_NC, gate_N1, gate caches))
    Source     Dai et al. 2024, DeepSeekMoE, eq. 9; gated: Qwen Team 2024, Qwen2-MoE's
               `shared_expert_gate`
    """
    y_NC, mlp_cache = mlp.mlp_forward(x_NC, params.mlp, cfg.activation)  # 1. MLP
    if params.gate_C1 is None:
        return y_NC, (mlp_cache, None)
    logit_N1, logit_cache = linear.linear_forward(x_NC, params.gate_C1)  # 2. gate
    gate_N1, gate_cache = activation.sigmoid_forward(logit_N1)
    return gate_N1 * y_NC, (mlp_cache, (y_NC, gate_N1, logit_cache, gate_cache))  # 3. product


def shared_backward(dy_NC: Array, cache: Cache) -> tuple[Array, SharedParams]:
    """Undo `shared_forward`; a gated one has read x twice.

    The gate is one number for all channels: dgate[n] = <MLP(x)[n], dy[n]>.

    Shapes     dy_NC (N, C) -> dx_NC (N, C), grads
    """
    mlp_cache, gated = cache
    if gated is None:
        dx_NC, dmlp = mlp.mlp_backward(dy_NC, mlp_cache)  # 1.
        return dx_NC, SharedParams(dmlp, None)
    y_NC, gate_N1, logit_cache, gate_cache = gated
    dgate_N1 = (y_NC * dy_NC).sum(1, keepdims=True)  # 3.
    dlogit_N1 = activation.sigmoid_backward(dgate_N1, gate_cache)  # 2.
    dx_gate_NC, dgate_C1, _ = linear.linear_backward(dlogit_N1, logit_cache)
    dx_NC, dmlp = mlp.mlp_backward(gate_N1 * dy_NC, mlp_cache)  # 1.
    return dx_NC + dx_gate_NC, SharedParams(dmlp, dgate_C1)
