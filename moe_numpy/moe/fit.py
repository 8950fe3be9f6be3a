"""Whether the parameters, the tokens and the noise of a layer fit its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_numpy.backend import Array
from moe_numpy.config import Hierarchy, LearnedNoise, MoEConfig, SoftSlots
from moe_numpy.moe import hierarchy, router, soft

if TYPE_CHECKING:
    from moe_numpy.moe.layer import MoEParams


def check(x_NC: Array, params: MoEParams, cfg: MoEConfig, noise: Array | None) -> None:
    """Refuse what `moe_forward` would stumble over, or silently take for something else.

    Raises     ValueError
    """
    in_ECF = params.experts.in_ECF
    E, C, F = in_ECF.shape
    if (E, F) != (cfg.num_experts, cfg.hidden):
        raise ValueError(
            f"moe_forward: the parameters must be of {cfg.num_experts} experts of hidden width "
            f"{cfg.hidden}, as the configuration says, got {E} of {F}. Draw them with `init_moe`."
        )
    kind = _kind_of_router(cfg)
    if not isinstance(params.router, kind):
        raise ValueError(
            f"moe_forward: the router must be of the type {kind.__name__}, as the configuration "
            f"says, got {type(params.router).__name__}. Draw the parameters with `init_moe`."
        )
    for name, part, wanted in _optional(params, cfg):
        if (part is not None) != wanted:
            raise ValueError(
                f"moe_forward: {name} must {'be there' if wanted else 'be None'}, as the "
                f"configuration says, got {type(part).__name__}. Draw the parameters with "
                "`init_moe`."
            )
    if x_NC.ndim != 2 or x_NC.shape[1] != C or x_NC.dtype != in_ECF.dtype:
        raise ValueError(
            f"moe_forward: x must have the shape (tokens, {C}) and the type {in_ECF.dtype}, as the "
            f"parameters have, got {x_NC.shape} and {x_NC.dtype}. Reshape or convert it."
        )
    if noise is not None:
        router.check_noise(noise, cfg, *x_NC.shape, in_ECF.dtype)


def _kind_of_router(cfg: MoEConfig) -> type:
    if isinstance(cfg.selection, Hierarchy):
        return hierarchy.HierarchyParams
    return soft.SoftParams if isinstance(cfg.selection, SoftSlots) else router.RouterParams


def _optional(params: MoEParams, cfg: MoEConfig) -> list[tuple[str, Any, bool]]:
    """List the parameters that not every layer has: name, what is there, whether it is wanted.

    Of the router only a part that is missing is wrong: a bias that no rule moves anymore counts.
    """
    own, shared = params.experts, params.shared
    found = [
        ("experts.up_ECF", own.up_ECF, cfg.gated),
        ("experts.third_ECF", own.third_ECF, cfg.activation == "swiglu3"),
        ("experts.in_EF", own.in_EF, cfg.expert_bias),
        ("shared", shared, cfg.shared is not None),
    ]
    if shared is not None and cfg.shared is not None:
        found.append(("shared.gate_C1", shared.gate_C1, cfg.shared.gated))
    if isinstance(params.router, router.RouterParams):
        wanted = {"bias_E": cfg.bias_rate > 0, "offset_E": cfg.router_bias}
        wanted["noise_CE"] = isinstance(cfg.noise, LearnedNoise)
        for name in wanted:
            part = getattr(params.router, name)
            found.append((f"router.{name}", part, wanted[name] or part is not None))
    return found
