"""The Mixture-of-Experts transformer in plain NumPy, forward and hand-written backward.

The names below are the public face. Each is looked up in its module when it is used, so importing
the package is quick, and a function that was swapped is the one you get.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "moe_numpy.backend": ("use_backend", "to_device", "to_host"),
    "moe_numpy.config": (
        "ModelConfig MoEConfig Capacity LearnedNoise GaussianNoise InputJitter SwitchLoss "
        "ImportanceLoss LoadLoss ZLoss SecondExpert GroupLimited Hierarchy Sinkhorn Assignment "
        "ExpertChoice SoftSlots Shared TrainingConfig AdamW SGD"
    ).split(),
    "moe_numpy.moe.layer": ("init_moe", "moe_forward", "moe_backward"),
    "moe_numpy.transformer.model": (
        "init_model draw_noise model_forward model_backward loss_forward loss_backward"
    ).split(),
    "moe_numpy.transformer.generation": ("generate",),
    "moe_numpy.training.data": ("default_corpus", "text_corpus"),
    "moe_numpy.training.loop": ("new_run train evaluate save_run load_run load_model").split(),
    "moe_numpy.classroom.registry": ("swap",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moe_numpy' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
