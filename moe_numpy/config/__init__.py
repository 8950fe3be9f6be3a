"""Configurations: frozen records that refuse settings that cannot work or that nothing reads.

A layer is composed from small parts (score, selection, gate weights, noise, capacity, balance
terms, shared expert), each with its own knobs; what is not wanted is None or left out. `to_dict`
and `from_dict` turn any of them into plain JSON data.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_numpy.config.model import ModelConfig
from moe_numpy.config.moe import ACTIVATIONS, GATED, SCORES, WEIGHTS, MoEConfig, branches
from moe_numpy.config.parts import (
    PRIORITIES,
    SELECTIONS,
    TERMS,
    Assignment,
    Capacity,
    ExpertChoice,
    GaussianNoise,
    GroupLimited,
    Hierarchy,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    SecondExpert,
    Shared,
    Sinkhorn,
    SoftSlots,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.config.training import SGD, AdamW, TrainingConfig

__all__ = [
    "ACTIVATIONS",
    "GATED",
    "PRIORITIES",
    "SCORES",
    "SGD",
    "WEIGHTS",
    "AdamW",
    "Assignment",
    "Capacity",
    "ExpertChoice",
    "GaussianNoise",
    "GroupLimited",
    "Hierarchy",
    "ImportanceLoss",
    "InputJitter",
    "LearnedNoise",
    "LoadLoss",
    "MoEConfig",
    "ModelConfig",
    "SecondExpert",
    "Shared",
    "Sinkhorn",
    "SoftSlots",
    "SwitchLoss",
    "TrainingConfig",
    "ZLoss",
    "branches",
    "from_dict",
    "to_dict",
]

_KINDS = {
    kind.__name__: kind
    for kind in (
        *(LearnedNoise, GaussianNoise, InputJitter),
        *SELECTIONS,
        *(Capacity, Shared, *TERMS),
        *(MoEConfig, ModelConfig, AdamW, SGD, TrainingConfig),
    )
}


def to_dict(value: Any) -> Any:
    """Turn a configuration into plain JSON data that names its kind."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    return [to_dict(item) for item in value] if isinstance(value, tuple) else value


def from_dict(data: Any) -> Any:
    """Rebuild the configuration that `to_dict` wrote; ValueError if it is not one."""
    if isinstance(data, list):
        return tuple(from_dict(item) for item in data)
    if not isinstance(data, dict):
        return data
    fields = {name: from_dict(item) for name, item in data.items() if name != "kind"}
    try:
        return _KINDS[data["kind"]](**fields)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"from_dict: this is no configuration of moe_numpy ({error}). "
            "Use what to_dict of the same version wrote."
        ) from None
