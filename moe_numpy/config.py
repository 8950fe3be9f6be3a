"""Configurations: frozen records that refuse settings that cannot work or have no effect.

A layer is composed from small parts (noise, capacity, balance terms), each with its own knobs; what
is not wanted is None or left out. `to_dict` and `from_dict` turn any of them into plain JSON data.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

GATED = ("swiglu", "geglu")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", *GATED)


def _require(fine: bool, who: str, rule: str, came: Any, advice: str) -> None:
    if not fine:
        raise ValueError(f"{who}: {rule}, got {came}. {advice}".rstrip())


def _one_of(who: str, name: str, came: Any, allowed: tuple) -> None:
    choices = ", ".join(repr(choice) for choice in allowed)
    _require(came in allowed, who, f"{name} must be one of {choices}", repr(came), "")


def _whole_number(who: str, name: str, came: Any, least: int) -> None:
    fine = isinstance(came, int) and not isinstance(came, bool) and came >= least
    _require(fine, who, f"{name} must be a whole number of at least {least}", repr(came), "")


def _a(who: str, name: str, came: Any, kinds: tuple[type, ...]) -> None:
    names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    _require(isinstance(came, kinds), who, f"{name} must be {names}", repr(came), "")


def _not_negative(who: str, name: str, came: Any) -> None:
    rule = f"{name} must not be negative, and finite"
    _require(0 <= came < math.inf, who, rule, came, "Use 0 for none.")


def _positive_weight(term: Any) -> None:
    _require(
        term.weight > 0,
        type(term).__name__,
        "weight must be positive",
        term.weight,
        "Leave the term out instead.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedNoise:
    """Normal noise on the logits whose scale, softplus(x W_noise) + floor, is learned.

    Source: Shazeer et al. 2017, eq. 4; tensor2tensor's floor of 0.01 keeps the scale positive.
    """

    floor: float = 0.01

    def __post_init__(self) -> None:
        _require(self.floor > 0, "LearnedNoise", "floor must be positive", self.floor, "Use 0.01.")


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianNoise:
    """Normal noise of a fixed standard deviation on the logits (V-MoE: 1 / num_experts)."""

    std: float = 1.0

    def __post_init__(self) -> None:
        rule = "std must be positive and finite"
        _require(0 < self.std < math.inf, "GaussianNoise", rule, self.std, "Or noise=None.")


@dataclass(frozen=True, kw_only=True, slots=True)
class InputJitter:
    """Multiply what the router sees, and only that, by U(1 - eps, 1 + eps), element by element.

    Source: Fedus et al. 2022, Switch Transformers, section 2.4 (eps = 0.01).
    """

    eps: float = 0.01

    def __post_init__(self) -> None:
        rule = "eps must satisfy 0 < eps < 1"
        _require(0 < self.eps < 1, "InputJitter", rule, self.eps, "Or noise=None.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """How many places an expert has, who gets them, and what happens to those who do not.

    places = rounding(factor * top_k * tokens / num_experts), at least `minimum`.

    overflow   "drop": a choice without a place adds nothing, the token keeps its residual;
               "next_best": it asks the token's next best expert, and so on down the ranking.
               No limit at all is ``capacity=None``.
    priority   "token": tokens are served one by one, each with all its choices (causal);
               "choice": all first choices before any second choice (GShard);
               "score": the choice with the largest gate probability first.
    """

    factor: float = 1.25
    overflow: str = "drop"
    priority: str = "token"
    rounding: str = "ceil"
    minimum: int = 0

    def __post_init__(self) -> None:
        rule = "factor must be positive and finite"
        fine = 0 < self.factor < math.inf
        _require(fine, "Capacity", rule, self.factor, "Use 1.25, or capacity=None for no limit.")
        _one_of("Capacity", "overflow", self.overflow, ("drop", "next_best"))
        _one_of("Capacity", "priority", self.priority, ("token", "choice", "score"))
        _one_of("Capacity", "rounding", self.rounding, ("ceil", "floor", "round"))
        _whole_number("Capacity", "minimum", self.minimum, 0)

    def places(self, tokens: int, top_k: int, num_experts: int) -> int:
        """Count the places of one expert for a batch of `tokens` (unit: choices)."""
        exact = self.factor * top_k * tokens / num_experts
        wanted = float(f"{exact:.12g}")  # 1.1 * 10 is 11, not a little more
        rounded = {"ceil": math.ceil, "floor": math.floor, "round": round}[self.rounding](wanted)
        return max(rounded, self.minimum)


@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchLoss:
    """weight * E * sum_e f_e P_e: 1 at balance before the weight (Fedus et al. 2022, eq. 4)."""

    weight: float = 0.01

    def __post_init__(self) -> None:
        _positive_weight(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceLoss:
    """weight * CV^2 of the experts' summed gates (Shazeer et al. 2017, eq. 7)."""

    weight: float = 0.1

    def __post_init__(self) -> None:
        _positive_weight(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadLoss:
    """weight * CV^2 of the smooth load estimate (Shazeer et al. 2017, appendix A)."""

    weight: float = 0.1

    def __post_init__(self) -> None:
        _positive_weight(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ZLoss:
    """weight * mean (log sum exp of the router's logits)^2 (Zoph et al. 2022, ST-MoE, eq. 5)."""

    weight: float = 0.001

    def __post_init__(self) -> None:
        _positive_weight(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """One Mixture-of-Experts layer.

    gate_weights  "raw": the chosen experts' probabilities among all experts;
                  "renormalized": a softmax over the chosen experts alone. None picks
                  "renormalized" for top_k >= 2 and "raw" for top_k = 1, whose renormalized gate
                  is the constant 1 and teaches the router nothing.
    bias_rate     step of the bias rule that balances without a loss (0: no bias).
    """

    num_experts: int
    top_k: int
    hidden: int
    activation: str = "gelu_tanh"
    gate_weights: str | None = None
    noise: LearnedNoise | GaussianNoise | InputJitter | None = None
    capacity: Capacity | None = None
    balance: tuple[SwitchLoss | ImportanceLoss | LoadLoss | ZLoss, ...] = ()
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        who = "MoEConfig"
        for name in ("num_experts", "top_k", "hidden"):
            _whole_number(who, name, getattr(self, name), 1)
        _require(
            self.top_k <= self.num_experts,
            who,
            f"top_k must satisfy 1 <= top_k <= num_experts ({self.num_experts})",
            self.top_k,
            "Lower top_k or add experts.",
        )
        _one_of(who, "activation", self.activation, ACTIVATIONS)
        _one_of(who, "gate_weights", self.gate_weights, (None, "raw", "renormalized"))
        _not_negative(who, "bias_rate", self.bias_rate)
        _a(who, "noise", self.noise, (LearnedNoise, GaussianNoise, InputJitter, type(None)))
        _a(who, "capacity", self.capacity, (Capacity, type(None)))
        _a(who, "balance", self.balance, (tuple,))
        for term in self.balance:
            _a(who, "balance", term, (SwitchLoss, ImportanceLoss, LoadLoss, ZLoss))
        kinds = {type(term): term for term in self.balance}
        rule = "each kind of balance term may come once"
        _require(len(kinds) == len(self.balance), who, rule, self.balance, "Add up their weights.")
        if LoadLoss in kinds:
            self._check_load_loss(who)
        if ImportanceLoss in kinds and self.top_k == 1:
            rule = "ImportanceLoss with top_k = 1 needs raw gates: renormalized ones are all 1"
            _require(not self.renormalized, who, rule, self.gate_weights, 'Use "raw".')

    def _check_load_loss(self, who: str) -> None:
        fine = isinstance(self.noise, LearnedNoise | GaussianNoise)
        rule = "LoadLoss needs normal noise on the logits, or its gradient is zero"
        _require(fine, who, rule, self.noise, "Add LearnedNoise() or GaussianNoise().")
        rule = "LoadLoss needs top_k < num_experts: otherwise every expert gets every token"
        _require(self.top_k < self.num_experts, who, rule, self.top_k, "Lower top_k.")
        rule = "LoadLoss needs bias_rate = 0: its estimate does not know the selection bias"
        _require(not self.bias_rate, who, rule, self.bias_rate, "Balance by one of them.")

    @property
    def renormalized(self) -> bool:
        """Whether the gates of a token sum to one."""
        return (self.gate_weights or ("raw" if self.top_k == 1 else "renormalized")) != "raw"

    @property
    def gated(self) -> bool:
        """Whether an expert has a third matrix, the gate of its hidden units."""
        return self.activation in GATED

    def evaluation(self) -> MoEConfig:
        """Return the layer as it is evaluated: the same experts and router without limits."""
        return dataclasses.replace(self, capacity=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only transformer; ``moe=None`` is its dense twin.

    hidden      width of the dense feed-forward; None where every layer is a MoE layer.
    activation  of the dense feed-forward; None for "gelu_tanh", or where all layers have experts.
    kv_heads    key/value heads shared by groups of query heads; None: as many as query heads.
    moe_layers  indices of the layers that are MoE layers; None: all of them.
    tied        whether the embedding is used again as the output head.
    """

    vocab_size: int
    context: int
    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    hidden: int | None = None
    activation: str | None = None
    norm: str = "layernorm"
    positions: str = "learned"
    tied: bool = True
    moe: MoEConfig | None = None
    moe_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        who = "ModelConfig"
        for name in ("vocab_size", "context", "layers", "width", "heads"):
            _whole_number(who, name, getattr(self, name), 1)
        rule = f"width must be a multiple of heads ({self.heads})"
        _require(self.width % self.heads == 0, who, rule, self.width, "Change either.")
        if self.kv_heads is not None:
            _whole_number(who, "kv_heads", self.kv_heads, 1)
            rule = f"kv_heads must divide heads ({self.heads})"
            _require(self.heads % self.kv_heads == 0, who, rule, self.kv_heads, "Change either.")
        _one_of(who, "activation", self.activation, (None, *ACTIVATIONS))
        _a(who, "moe", self.moe, (MoEConfig, type(None)))
        _one_of(who, "norm", self.norm, ("layernorm", "rmsnorm"))
        _one_of(who, "positions", self.positions, ("learned", "rotary"))
        if self.positions == "rotary":
            rule = "rotary positions need an even head width"
            _require(self.head_width % 2 == 0, who, rule, self.head_width, "Change width or heads.")
        self._check_layers(who)

    def _check_layers(self, who: str) -> None:
        if self.moe_layers is not None:
            rule = "moe_layers needs moe"
            _require(self.moe is not None, who, rule, self.moe_layers, "Leave it out.")
            rule = f"moe_layers must be different indices from 0 to {self.layers - 1}"
            inside = set(self.moe_layers) <= set(range(self.layers))
            fine = inside and 0 < len(self.moe_layers) == len(set(self.moe_layers))
            _require(fine, who, rule, self.moe_layers, "Count the layers from 0.")
        if self.moe_count == self.layers:
            rule = "hidden is for dense layers, and every layer is a MoE layer"
            _require(self.hidden is None, who, rule, self.hidden, "Set moe.hidden instead.")
            rule = "activation is for dense layers, and every layer is a MoE layer"
            fine = self.activation is None
            _require(fine, who, rule, repr(self.activation), "Set moe.activation instead.")
        else:
            _whole_number(who, "hidden", self.hidden, 1)

    @property
    def dense_activation(self) -> str:
        """Activation of the dense layers."""
        return self.activation or "gelu_tanh"

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    def is_moe(self, layer: int) -> bool:
        """Tell whether the layer of that index has experts."""
        return self.moe is not None and (self.moe_layers is None or layer in self.moe_layers)

    @property
    def moe_count(self) -> int:
        """Number of layers with experts."""
        return sum(self.is_moe(layer) for layer in range(self.layers))

    def evaluation(self) -> ModelConfig:
        """Return the model as it is evaluated: no layer limits its experts."""
        return self if self.moe is None else dataclasses.replace(self, moe=self.moe.evaluation())


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW:
    """Adam with decoupled weight decay, none on gains and biases (Loshchilov and Hutter 2019)."""

    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            came = getattr(self, name)
            _require(0 <= came < 1, "AdamW", f"{name} must satisfy 0 <= {name} < 1", came, "")
        _require(self.eps > 0, "AdamW", "eps must be positive", self.eps, "Use 1e-8.")
        _not_negative("AdamW", "weight_decay", self.weight_decay)


@dataclass(frozen=True, kw_only=True, slots=True)
class SGD:
    """Stochastic gradient descent with momentum (Polyak 1964); no decay on gains and biases."""

    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        rule = "momentum must satisfy 0 <= momentum < 1"
        _require(0 <= self.momentum < 1, "SGD", rule, self.momentum, "")
        _not_negative("SGD", "weight_decay", self.weight_decay)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One training run.

    rate, final_rate  learning rate after `warmup` steps of linear rise, and at the cosine's end
    clip              largest norm of all gradients together; None for no clipping
    smoothing         label smoothing of the training loss
    seed              of the parameters, the data order and the noise, each with its own generator
    """

    steps: int = 600
    batch: int = 12
    rate: float = 1e-3
    final_rate: float = 1e-4
    warmup: int = 100
    clip: float | None = 1.0
    smoothing: float = 0.0
    optimizer: AdamW | SGD = AdamW()
    seed: int = 0

    def __post_init__(self) -> None:
        who = "TrainingConfig"
        for name, least in (("steps", 1), ("batch", 1), ("warmup", 0), ("seed", 0)):
            _whole_number(who, name, getattr(self, name), least)
        _require(0 < self.rate < math.inf, who, "rate must be positive", self.rate, "Use 1e-3.")
        _not_negative(who, "final_rate", self.final_rate)
        _a(who, "optimizer", self.optimizer, (AdamW, SGD))
        if self.clip is not None:
            _require(self.clip > 0, who, "clip must be positive", self.clip, "Or clip=None.")
        rule = "smoothing must satisfy 0 <= smoothing < 1"
        _require(0 <= self.smoothing < 1, who, rule, self.smoothing, "Use 0 for none.")

    def rate_at(self, step: int) -> float:
        """Compute the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        return self.final_rate + cosine * (self.rate - self.final_rate)


_KINDS = {
    kind.__name__: kind
    for kind in (
        LearnedNoise,
        GaussianNoise,
        InputJitter,
        Capacity,
        MoEConfig,
        ModelConfig,
        SwitchLoss,
        ImportanceLoss,
        LoadLoss,
        ZLoss,
        AdamW,
        SGD,
        TrainingConfig,
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
