"""Published Mixture-of-Experts systems, each a configuration to hold beside its paper.

`get` returns a system at its published size (a configuration: nothing is allocated), `tiny` its
likeness that trains on a laptop in about a minute. Two are encoders (`causal=False`) and cannot be
trained to predict the next token.
"""

from __future__ import annotations

import dataclasses
import difflib
import math

from moe_numpy.config import (
    GaussianNoise,
    GroupLimited,
    Hierarchy,
    ModelConfig,
    MoEConfig,
    SoftSlots,
)
from moe_numpy.presets import classics, fine_grained, open_weights, variants
from moe_numpy.presets.record import Paper, Preset, Published

__all__ = ["Paper", "Preset", "Published", "get", "names", "tiny"]

_ALL = (*classics.ALL, *variants.ALL, *fine_grained.ALL, *open_weights.ALL)
_SYSTEMS = {p.name: p for p in sorted(_ALL, key=lambda p: (p.year, p.paper.at))}
SYMBOLS = 96  # of the built-in corpus
LAYERS, WIDTH, HEADS, CONTEXT = 2, 64, 4, 64
ACTIVE = 4 * WIDTH  # hidden width of all experts that see a token together


def names() -> list[str]:
    """List the systems, oldest first."""
    return list(_SYSTEMS)


def get(name: str) -> Preset:
    """Return a system by its name.

    Raises     ValueError if there is none of that name; it suggests the nearest ones
    """
    if name not in _SYSTEMS:
        near = difflib.get_close_matches(name, _SYSTEMS, n=3, cutoff=0.4) or list(_SYSTEMS)
        raise ValueError(
            f"presets: name must be that of a known system, got {name!r}. "
            f"Did you mean {' or '.join(near)}?"
        )
    return _SYSTEMS[name]


def tiny(name: str, vocab_size: int | None = None) -> ModelConfig:
    """Return a system at laptop size: the published configuration with smaller numbers.

    Two layers of width 64, mostly 8 or 16 experts whose hidden widths together make four model
    widths for each token. Routing, gates, losses, norms, activation and positions are as published;
    groups of tokens are sequences of 64, and what follows a size (the noise of V-MoE, the first
    weights of a router, the scale of an embedding) follows it down.

    Parameters
    ----------
    vocab_size : left out: that of the built-in corpus.
    """
    preset = get(name)
    cfg, moe = preset.model, _tiny_layer(preset)
    grouped = cfg.kv_heads not in (None, cfg.heads)
    widened = cfg.head_size is not None and cfg.head_size * cfg.heads != cfg.width
    follows = math.isclose(cfg.embedding_scale, math.sqrt(cfg.width))
    return dataclasses.replace(
        cfg,
        vocab_size=SYMBOLS if vocab_size is None else vocab_size,
        context=CONTEXT,
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        kv_heads=2 if grouped else None,
        head_size=_tiny_head(cfg) if widened else None,
        hidden=None if cfg.hidden is None else ACTIVE,
        moe=moe,
        moe_layers=None if cfg.moe_count == cfg.layers else (LAYERS - 1,),
        embedding_scale=math.sqrt(WIDTH) if follows else cfg.embedding_scale,
    )


def _tiny_head(cfg: ModelConfig) -> int:
    """Keep the ratio of all heads to the width; an even number, for rotary positions."""
    return 2 * round(WIDTH * cfg.head_size / cfg.width * cfg.heads / HEADS / 2)


def _tiny_layer(preset: Preset) -> MoEConfig:
    moe, (experts, top_k) = preset.model.moe, preset.small
    together = 1 if isinstance(moe.selection, SoftSlots) else top_k
    together += 0 if moe.shared is None else moe.shared.hidden // moe.hidden
    hidden = ACTIVE // together // 8 * 8
    fan_in = math.sqrt((moe.init_scale or 0.0) / preset.model.width)
    changes = {
        "num_experts": experts,
        "top_k": top_k,
        "hidden": hidden,
        "selection": _tiny_selection(moe),
        "balance": tuple(_by_sequence(term) for term in moe.balance),
        "capacity": _by_sequence(moe.capacity),
    }
    if moe.shared is not None:
        wide = moe.shared.hidden // moe.hidden
        changes["shared"] = dataclasses.replace(moe.shared, hidden=wide * hidden)
    if isinstance(moe.noise, GaussianNoise):
        std = moe.noise.std * moe.num_experts / experts
        changes["noise"] = dataclasses.replace(moe.noise, std=std)
    if fan_in and math.isclose(moe.router_std, fan_in):
        changes["router_std"] = math.sqrt(moe.init_scale / WIDTH)
    return dataclasses.replace(moe, **changes)


def _tiny_selection(moe: MoEConfig):
    selection = moe.selection
    if isinstance(selection, Hierarchy):
        return dataclasses.replace(selection, groups=4)
    if isinstance(selection, GroupLimited):
        return dataclasses.replace(selection, groups=4, kept=2)
    return selection


def _by_sequence(part):
    """Let groups of tokens be the short sequences."""
    grouped = getattr(part, "group", None) is not None
    return dataclasses.replace(part, group=CONTEXT) if grouped else part
