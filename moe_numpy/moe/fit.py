"""Whether the parameters, the tokens and the noise of a layer fit its configuration."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

from moe_numpy.backend import Array, xp
from moe_numpy.config import Hierarchy, LearnedNoise, MoEConfig, SoftSlots, branches, rules
from moe_numpy.moe import hierarchy, router, soft

if TYPE_CHECKING:
    from moe_numpy.moe.layer import MoEParams


def check(x_NC: Array, params: MoEParams, cfg: MoEConfig, noise: Array | None) -> None:
    """Refuse what `moe_forward` would stumble over, or silently take for something else.

    Raises     ValueError
    """
    rules.array("moe_forward", "x", x_NC)
    check_parameters("moe_forward", params, cfg)
    in_ECF = params.experts.in_ECF
    C = in_ECF.shape[1]
    if x_NC.ndim != 2 or x_NC.shape[1] != C or x_NC.dtype != in_ECF.dtype:
        raise ValueError(
            f"moe_forward: x must have the shape (tokens, {C}) and the type {in_ECF.dtype}, as the "
            f"parameters have, got {x_NC.shape} and {x_NC.dtype}. Reshape or convert it."
        )
    if noise is not None:
        rules.array("moe_forward", "the noise", noise)
        router.check_noise(noise, cfg, *x_NC.shape, in_ECF.dtype)


def check_parameters(who: str, params: MoEParams, cfg: MoEConfig) -> None:
    """Refuse parameters of another configuration.

    Raises     ValueError
    """
    rules.configuration(who, cfg, MoEConfig)
    rule, advice = "the parameters must be MoEParams", "Draw them with `init_moe`."
    rules.require(hasattr(params, "experts"), who, rule, type(params).__name__, advice)
    in_ECF = params.experts.in_ECF
    E, C, F = in_ECF.shape
    check_type(who, in_ECF.dtype)
    if (E, F) != (cfg.num_experts, cfg.hidden):
        raise ValueError(
            f"{who}: the parameters must be of {cfg.num_experts} experts of hidden width "
            f"{cfg.hidden}, as the configuration says, got {E} of {F}. Draw them with `init_moe`."
        )
    kind = _kind_of_router(cfg)
    if not isinstance(params.router, kind):
        raise ValueError(
            f"{who}: the router must be of the type {kind.__name__}, as the configuration "
            f"says, got {type(params.router).__name__}. Draw the parameters with `init_moe`."
        )
    for name, part, wanted, shape in _expected(params, cfg, C):
        if (part is not None) != wanted:
            raise ValueError(
                f"{who}: {name} must {'be there' if wanted else 'be None'}, as the "
                f"configuration says, got {type(part).__name__}. Draw the parameters with "
                "`init_moe`."
            )
        if shape is not None and wanted and (part.shape != shape or part.dtype != in_ECF.dtype):
            raise ValueError(
                f"{who}: {name} must have the shape {shape} and the type {in_ECF.dtype}, as "
                f"configuration and experts.in_ECF say, got {part.shape} and {part.dtype}. Draw "
                "the parameters with `init_moe`."
            )


def check_type(who: str, dtype: Any) -> None:
    """Refuse parameters of other types than the package draws.

    Raises     ValueError
    """
    if dtype.char not in "fd" or not dtype.isnative:  # as NumPy calls float32 and float64
        raise ValueError(
            f"{who}: the parameters must be of the type float32 or float64, in the machine's order "
            f"of bytes, got {dtype}. Convert them."
        )


def check_upstream(who: str, name: str, came: Array, shape: tuple[int, ...], dtype: Any) -> None:
    """Refuse a gradient that is not like the result it belongs to, before NumPy broadcasts it.

    Raises     ValueError
    """
    rules.array(who, name, came)
    if came.shape != shape or came.dtype != dtype:
        raise ValueError(
            f"{who}: {name} must have the shape {shape} and the type {dtype} of {name[1:]}, got "
            f"{came.shape} and {came.dtype}. Reshape or convert it."
        )


def upstream_number(who: str, name: str, came: Any, dtype: Any) -> Array:
    """Take the gradient of one number, and refuse anything else.

    Raises     ValueError
    """
    shape, dtype_came = getattr(came, "shape", None), getattr(came, "dtype", None)
    one = shape == () and getattr(dtype_came, "kind", "none") in "biuf"
    if not isinstance(came, Real) and not one:
        kind = f"the shape {shape}" if shape else str(dtype_came or type(came).__name__)
        raise ValueError(
            f"{who}: {name} must be one number, got {kind}. Pass 1.0, or 0.0 for none."
        )
    return xp.asarray(came, dtype)


def _kind_of_router(cfg: MoEConfig) -> type:
    if isinstance(cfg.selection, Hierarchy):
        return hierarchy.HierarchyParams
    return soft.SoftParams if isinstance(cfg.selection, SoftSlots) else router.RouterParams


def _expected(
    params: MoEParams, cfg: MoEConfig, C: int
) -> list[tuple[str, Any, bool, tuple[int, ...] | None]]:
    """List every array but the experts' first: name, what is there, whether it is wanted, shape."""
    own, E, F = params.experts, cfg.num_experts, cfg.hidden
    found = [
        ("experts.up_ECF", own.up_ECF, cfg.gated, (E, C, F)),
        ("experts.out_EFC", own.out_EFC, True, (E, F, C)),
        ("experts.third_ECF", own.third_ECF, branches(cfg.activation) == 3, (E, C, F)),
        ("experts.in_EF", own.in_EF, cfg.expert_bias, (E, F)),
        ("experts.up_EF", own.up_EF, cfg.expert_bias and cfg.gated, (E, F)),
        ("experts.out_EC", own.out_EC, cfg.expert_bias, (E, C)),
        ("shared", params.shared, cfg.shared is not None, None),
    ]
    if params.shared is not None and cfg.shared is not None:
        mlp, hidden = params.shared.mlp, cfg.shared.hidden
        found += [
            ("shared.mlp.in_CF", mlp.in_CF, True, (C, hidden)),
            ("shared.mlp.up_CF", mlp.up_CF, cfg.gated, (C, hidden)),
            ("shared.mlp.out_FC", mlp.out_FC, True, (hidden, C)),
            ("shared.mlp.third_CF", mlp.third_CF, branches(cfg.activation) == 3, (C, hidden)),
            ("shared.gate_C1", params.shared.gate_C1, cfg.shared.gated, (C, 1)),
        ]
    if isinstance(cfg.selection, SoftSlots):
        slots = E * cfg.selection.slots
        found.append(("router.slots_CR", params.router.slots_CR, True, (C, slots)))
        found.append(("router.scale", params.router.scale, True, ()))
    elif isinstance(cfg.selection, Hierarchy):
        groups = cfg.selection.groups
        found += _of_router("router.primary", params.router.primary, cfg, C, groups)
        found += _of_router("router.secondary", params.router.secondary, cfg, C, E)
    else:
        found += _of_router("router", params.router, cfg, C, E)
    return found


def _of_router(
    name: str, own: router.RouterParams, cfg: MoEConfig, C: int, E: int
) -> list[tuple[str, Any, bool, tuple[int, ...]]]:
    """List the arrays of a router of E outputs as `_expected` does.

    Only a part that is missing is wrong: a bias that no rule moves anymore counts.
    """
    noisy = isinstance(cfg.noise, LearnedNoise)
    return [
        (f"{name}.w_CE", own.w_CE, True, (C, E)),
        (f"{name}.noise_CE", own.noise_CE, noisy or own.noise_CE is not None, (C, E)),
        (f"{name}.bias_E", own.bias_E, cfg.bias_rate > 0 or own.bias_E is not None, (E,)),
        (f"{name}.offset_E", own.offset_E, cfg.router_bias or own.offset_E is not None, (E,)),
    ]
