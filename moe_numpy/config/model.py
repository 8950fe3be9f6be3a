"""The configuration of a transformer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moe_numpy.config import rules
from moe_numpy.config.moe import ACTIVATIONS, MoEConfig
from moe_numpy.config.parts import ExpertChoice, SoftSlots

WHO = "ModelConfig"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only transformer; ``moe=None`` is its dense twin.

    hidden      width of the dense feed-forward; None where every layer is an MoE layer.
    activation  of the dense feed-forward; None for "gelu_tanh", or where all layers have experts.
    kv_heads    key/value heads shared by groups of query heads; None: as many as query heads.
    head_size   width of a head; None: width / heads.
    moe_layers  indices of the layers that are MoE layers; None: all of them.
    extra_ffn   whether a dense feed-forward follows the experts of each MoE layer, as a branch of
                its own (OpenMoE, ST-MoE).
    tied        whether the embedding is used again as the output head.
    sandwich    whether a second norm follows each branch (Grok-1).
    theta       base of the rotary angles.
    attention_bias   whether the four projections have biases.
    qk_norm     of queries and keys before their product: RMS norm of each "head" (Qwen3), of the
                "full" vector (OLMoE), or "l2", per head and without a gain (Llama 4); None.
    sinks       whether each head has a learned logit that takes attention away (gpt-oss).
    logit_cap   cap of the attention logits, cap * tanh(z / cap); None: none.
    attention_scale  factor on the attention logits; None: 1 / sqrt(head width).
    embedding_scale, logit_scale  factors after the embedding and before the softmax.
    causal      whether a position is kept from seeing later ones. Not causal is an encoder: it
                cannot be trained to predict the next token.
    balance_over_layers  whether the balance terms of the layers are added up ("sum") or averaged
                ("mean").
    recompute   whether the backward runs each layer's forward again instead of keeping what it
                left: the same gradients in less memory and more time (Chen et al. 2016).
    """

    vocab_size: int
    context: int
    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    hidden: int | None = None
    activation: str | None = None
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    sandwich: bool = False
    positions: str = "learned"
    theta: float = 10_000.0
    attention_bias: bool = False
    qk_norm: str | None = None
    sinks: bool = False
    logit_cap: float | None = None
    attention_scale: float | None = None
    tied: bool = True
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    causal: bool = True
    moe: MoEConfig | None = None
    moe_layers: tuple[int, ...] | None = None
    extra_ffn: bool = False
    balance_over_layers: str = "sum"
    recompute: bool = False

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        for name in ("vocab_size", "context", "layers", "width", "heads"):
            rules.whole_number(WHO, name, getattr(self, name), 1)
        if self.head_size is None:
            rule = f"width must be a multiple of heads ({self.heads})"
            fine = self.width % self.heads == 0
            rules.require(fine, WHO, rule, self.width, "Change either, or set head_size.")
        else:
            rules.whole_number(WHO, "head_size", self.head_size, 1)
        if self.kv_heads is not None:
            rules.whole_number(WHO, "kv_heads", self.kv_heads, 1)
            rule = f"kv_heads must divide heads ({self.heads})"
            fine = self.heads % self.kv_heads == 0
            rules.require(fine, WHO, rule, self.kv_heads, "Change either.")
        rules.one_of(WHO, "activation", self.activation, (None, *ACTIVATIONS))
        rules.instance(WHO, "moe", self.moe, (MoEConfig, type(None)))
        rules.one_of(WHO, "norm", self.norm, ("layernorm", "rmsnorm"))
        rules.one_of(WHO, "positions", self.positions, ("learned", "rotary"))
        rules.one_of(WHO, "qk_norm", self.qk_norm, (None, "head", "full", "l2"))
        rules.one_of(WHO, "balance_over_layers", self.balance_over_layers, ("sum", "mean"))
        rules.normal(WHO, "norm_eps", self.norm_eps, "Use 1e-5.")
        for name in ("theta", "embedding_scale", "logit_scale"):
            rules.normal(WHO, name, getattr(self, name), "")
        if self.logit_cap is not None:
            rules.normal(WHO, "logit_cap", self.logit_cap, "Or None.")
        if self.attention_scale is not None:
            rules.normal(WHO, "attention_scale", self.attention_scale, "Or None.")
        switches = ("sandwich", "attention_bias", "sinks", "tied", "causal", "extra_ffn")
        for name in (*switches, "recompute"):
            rules.instance(WHO, name, getattr(self, name), (bool,))
        if self.positions == "rotary":
            rule, fine = "rotary positions need an even head width", self.head_width % 2 == 0
            rules.require(fine, WHO, rule, self.head_width, "Change width or heads.")
        else:
            rule, idle = "theta is for rotary positions", self.theta == 10_000.0
            rules.require(idle, WHO, rule, self.theta, "Leave it out.")
        self._check_layers()
        self._check_causal()

    def _check_layers(self) -> None:
        rules.instance(WHO, "moe_layers", self.moe_layers, (tuple, type(None)))
        if self.moe_layers is not None:
            rule = "moe_layers needs moe"
            rules.require(self.moe is not None, WHO, rule, self.moe_layers, "Leave it out.")
            rule = f"moe_layers must be different indices from 0 to {self.layers - 1}"
            fine = all(type(layer) is int and 0 <= layer < self.layers for layer in self.moe_layers)
            fine = fine and 0 < len(self.moe_layers) == len(set(self.moe_layers))
            rules.require(fine, WHO, rule, self.moe_layers, "Count the layers from 0.")
        for name, idle in (("extra_ffn", False), ("balance_over_layers", "sum")):
            came = getattr(self, name)
            fine = self.moe is not None or came == idle
            rules.require(fine, WHO, f"{name} needs moe", came, "Leave it out.")
        if self.moe_count == self.layers and not self.extra_ffn:
            rule = "hidden is for dense layers, and every layer is an MoE layer"
            fine, advice = self.hidden is None, "Set moe.hidden instead."
            rules.require(fine, WHO, rule, self.hidden, advice)
            rule = "activation is for dense layers, and every layer is an MoE layer"
            fine, advice = self.activation is None, "Set moe.activation instead."
            rules.require(fine, WHO, rule, repr(self.activation), advice)
        else:
            rules.whole_number(WHO, "hidden", self.hidden, 1)

    def _check_causal(self) -> None:
        if self.moe is not None and isinstance(self.moe.selection, ExpertChoice | SoftSlots):
            kind = type(self.moe.selection).__name__
            rule = f"{kind} needs causal=False: it looks at all tokens of a sequence at once"
            advice = "It may not predict the next token, which it has seen: build an encoder."
            rules.require(not self.causal, WHO, rule, self.causal, advice)

    @property
    def dense_activation(self) -> str:
        """Activation of the dense layers."""
        return self.activation or "gelu_tanh"

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_size or self.width // self.heads

    def is_moe(self, layer: int) -> bool:
        """Tell whether the layer of that index has experts."""
        return self.moe is not None and (self.moe_layers is None or layer in self.moe_layers)

    @property
    def moe_count(self) -> int:
        """Number of layers with experts."""
        if self.moe is None:
            return 0
        return self.layers if self.moe_layers is None else len(self.moe_layers)

    def evaluation(self) -> ModelConfig:
        """Return the model as it is evaluated: no layer limits its experts."""
        moe = self.moe and self.moe.evaluation()
        return self if moe is self.moe else dataclasses.replace(self, moe=moe)
