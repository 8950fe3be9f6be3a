"""Whether the tokens, the parameters and the noise of a model fit its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_numpy.backend import Array
from moe_numpy.config import ModelConfig, branches, rules
from moe_numpy.moe import fit as moe_fit
from moe_numpy.moe import layer as moe_layer
from moe_numpy.transformer import attention

if TYPE_CHECKING:
    from moe_numpy.moe.mlp import MLPParams
    from moe_numpy.transformer.block import BlockParams, NormParams
    from moe_numpy.transformer.model import ModelParams

Shape = tuple[int, ...] | None  # None for an array that must not be there
Leaf = tuple[str, Array | None, Shape]


def check_tokens(token_BT: Array, start: int, cfg: ModelConfig) -> None:
    """Refuse tokens that are not a table, or end beyond the context.

    Raises     ValueError
    """
    rules.array("model_forward", "tokens", token_BT)
    if token_BT.ndim != 2 or token_BT.shape[1] == 0:
        raise ValueError(
            f"model_forward: tokens must be a table (B, T) of at least one column, got the shape "
            f"{token_BT.shape}. One sequence is token_BT[None]."
        )
    length = start + token_BT.shape[1]
    if length > cfg.context:
        raise ValueError(
            f"model_forward: a sequence may have at most {cfg.context} tokens (the context), got "
            f"{length}. Shorten it or build the model with a larger context."
        )


def check_targets(who: str, token_BT: Array, target_BT: Array) -> None:
    """Refuse tokens and targets that are not arrays of the same shape.

    Raises     ValueError
    """
    rules.array(who, "tokens", token_BT)
    rules.array(who, "targets", target_BT)
    if token_BT.shape != target_BT.shape:
        raise ValueError(
            f"{who}: every token needs a target, got tokens of shape {token_BT.shape} and "
            f"targets of {target_BT.shape}. Pass tables (B, T) of the same shape."
        )


def check_kv(
    kv: tuple[attention.KeyValues, ...] | None, token_BT: Array, dtype: Any, cfg: ModelConfig
) -> None:
    """Refuse keys and values of another configuration or batch, or that do not go on together.

    They are those of earlier tokens, computed without the later ones. So a model in which a token
    has a say in what becomes of earlier ones, or of others of its call, cannot use them.

    Raises     ValueError
    """
    if kv is None:
        return
    rule, advice = "kv needs a causal model", "Pass all tokens at once."
    rules.require(cfg.causal, "model_forward", rule, "causal=False", advice)
    rule, advice = "kv needs experts without limits", "Take cfg.evaluation()."
    fine = cfg.moe is None or cfg.moe.evaluation() == cfg.moe
    rules.require(fine, "model_forward", rule, f"{cfg.moe}", advice)
    wanted = token_BT.shape[0], cfg.key_value_heads, cfg.context, cfg.head_width
    advice = "Make one `KeyValues` for each layer, of this batch, and let all read every token."
    kinds = {type(entry).__name__ for entry in kv}
    for rule, came, right in (
        ("kv must have an entry of its own for each layer", len({*map(id, kv)}), cfg.layers),
        ("kv must have as many entries as there are layers", len(kv), cfg.layers),
        ("the entries of kv must be", kinds, {attention.KeyValues.__name__}),
    ):
        rules.require(came == right, "model_forward", f"{rule} ({right})", came, advice)
    for rule, came, right in (
        ("the lengths of kv must be equal", {entry.length for entry in kv}, {kv[0].length}),
        ("the shapes of kv must be those of tokens and model", {e.shape for e in kv}, {wanted}),
        ("the types of kv must be that of the model", {str(e.dtype) for e in kv}, {str(dtype)}),
    ):
        rules.require(came == right, "model_forward", f"{rule} ({right})", came, advice)


def check_parameters(who: str, params: ModelParams, cfg: ModelConfig) -> None:
    """Refuse parameters of another configuration; `moe_forward` looks at those of the experts.

    Raises     ValueError
    """
    rules.configuration(who, cfg, ModelConfig)
    rule, advice = "the parameters must be ModelParams", "Draw them with `init_model`."
    rules.require(hasattr(params, "blocks"), who, rule, type(params).__name__, advice)
    V, C, dtype = cfg.vocab_size, cfg.width, params.token_VC.dtype
    moe_fit.check_type(who, dtype)
    _same(who, "blocks", len(params.blocks), cfg.layers)
    learned = cfg.positions == "learned"
    leaves = [
        ("token_VC", params.token_VC, (V, C)),
        ("position_TC", params.position_TC, (cfg.context, C) if learned else None),
        ("head_CV", params.head_CV, None if cfg.tied else (C, V)),
        *_of_norm("norm", params.norm, cfg),
    ]
    for layer, part in enumerate(params.blocks):
        of_moe = isinstance(part.feed, moe_layer.MoEParams)
        _same(who, f"experts in layer {layer}", of_moe, cfg.is_moe(layer))
        leaves += _of_block(f"blocks.{layer}.", part, cfg, of_moe)
    for name, leaf, shape in leaves:
        _same(who, name, None if leaf is None else leaf.shape, shape)
        if leaf is not None and leaf.dtype != dtype:
            _same(who, f"the type of {name}", str(leaf.dtype), str(dtype))


def check_experts(who: str, params: ModelParams, cfg: ModelConfig) -> None:
    """Refuse experts and routers of another configuration, where no `moe_forward` looks at them.

    Raises     ValueError
    """
    for layer, part in enumerate(params.blocks):
        if cfg.is_moe(layer):
            moe_fit.check_parameters(who, part.feed, cfg.moe)
            in_ECF = part.feed.experts.in_ECF
            _same(who, f"the width of the experts in layer {layer}", in_ECF.shape[1], cfg.width)
            dtype = str(params.token_VC.dtype)
            _same(who, f"the type of the experts in layer {layer}", str(in_ECF.dtype), dtype)


def check_noise(noise: tuple[Array | None, ...] | None, cfg: ModelConfig) -> None:
    """Refuse noise of another number of layers, or for one without experts.

    Raises     ValueError
    """
    if noise is not None:
        _same("model_forward", "arrays of noise", len(noise), cfg.layers)
        idle = [drawn is not None and not cfg.is_moe(layer) for layer, drawn in enumerate(noise)]
        _same("model_forward", "noise for layers without experts", any(idle), False)


def _same(who: str, name: str, came: Any, wanted: Any) -> None:
    if came != wanted:
        raise ValueError(
            f"{who}: {name} must be {wanted}, as the configuration says, got {came}. "
            "Draw parameters and noise for this configuration."
        )


def _of_block(name: str, own: BlockParams, cfg: ModelConfig, of_moe: bool) -> list[Leaf]:
    """List every array of a layer but the experts': name, what is there, the shape it must have."""
    after, extra = cfg.sandwich, cfg.extra_ffn and of_moe
    return [
        *_of_norm(f"{name}norm_1", own.norm_1, cfg),
        *_of_attention(f"{name}attention", own.attention, cfg),
        *_of_norm(f"{name}norm_2", own.norm_2, cfg),
        *_of_mlp(f"{name}feed", None if of_moe else own.feed, cfg, not of_moe),
        *_of_norm(f"{name}norm_1_post", own.norm_1_post, cfg, after),
        *_of_norm(f"{name}norm_2_post", own.norm_2_post, cfg, after),
        *_of_norm(f"{name}norm_3", own.norm_3, cfg, extra),
        *_of_mlp(f"{name}extra", own.extra, cfg, extra),
        *_of_norm(f"{name}norm_3_post", own.norm_3_post, cfg, extra and after),
    ]


def _of_norm(
    name: str, own: NormParams | None, cfg: ModelConfig, wanted: bool = True
) -> list[Leaf]:
    gain_C, bias_C = own or (None, None)
    row = (cfg.width,)
    return [
        (f"{name}.gain_C", gain_C, row if wanted else None),
        (f"{name}.bias_C", bias_C, row if wanted and cfg.norm == "layernorm" else None),
    ]


def _of_attention(name: str, own: attention.AttentionParams, cfg: ModelConfig) -> list[Leaf]:
    C, H, G, D = cfg.width, cfg.heads, cfg.key_value_heads, cfg.head_width
    q_HD, k_GD, out_C = ((H, D), (G, D), (C,)) if cfg.attention_bias else (None, None, None)
    q_gain = k_gain = (D,) if cfg.qk_norm == "head" else None
    if cfg.qk_norm == "full":
        q_gain, k_gain = (H * D,), (G * D,)
    shapes = ((C, H, D), (C, G, D), (C, G, D), (H, D, C), q_HD, k_GD, k_GD, out_C, q_gain, k_gain)
    shapes += ((H,) if cfg.sinks else None,)
    return [(f"{name}.{f}", *pair) for f, *pair in zip(own._fields, own, shapes, strict=True)]


def _of_mlp(name: str, own: MLPParams | None, cfg: ModelConfig, wanted: bool) -> list[Leaf]:
    C, F, kind = cfg.width, cfg.hidden, cfg.dense_activation
    in_CF, up_CF, out_FC, third_CF = own or (None, None, None, None)
    widen, narrow = ((C, F), (F, C)) if wanted else (None, None)
    return [
        (f"{name}.in_CF", in_CF, widen),
        (f"{name}.up_CF", up_CF, widen if branches(kind) > 1 else None),
        (f"{name}.out_FC", out_FC, narrow),
        (f"{name}.third_CF", third_CF, widen if branches(kind) == 3 else None),
    ]
