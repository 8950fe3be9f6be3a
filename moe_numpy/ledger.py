"""The ledger of a model: parameters, work and memory traffic for one token, memory of a step.

Counted from the configuration alone, in whole numbers; no array is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_numpy.config import (
    GaussianNoise,
    Hierarchy,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    ModelConfig,
    MoEConfig,
    SoftSlots,
    ZLoss,
    branches,
    rules,
)

PARTS = (
    "embedding",
    "positions",
    "attention",
    "norms",
    "dense feed-forward",
    "router",
    "experts",
    "shared",
    "head",
)
# Numbers that a hidden unit leaves for the backward, what the next product reads among them.
LEFT = {
    **{"identity": 1, "relu": 1.25, "silu": 2, "gelu_tanh": 2, "gelu": 3, "swiglu": 3, "geglu": 3},
    **{"clamped_swiglu": 4.5, "swiglu3": 5},  # a boolean is a quarter of a number in float32
}
# Numbers that it makes on top at the worst moment, and drops again; where not said, two.
MADE = {"gelu": 3, "swiglu": 3, "geglu": 3, "swiglu3": 4, "clamped_swiglu": 6}


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """Widths of latent attention, which `ModelConfig` does not have (DeepSeek-V3).

    Queries pass through `query` numbers, keys and values together through `key_value`; a head's
    queries and keys have `plain` channels without and `rotary` ones with positions, its values
    `value`. All heads share the rotary part of the keys.

    Source: DeepSeek-AI 2024, DeepSeek-V2, section 2.1.
    """

    query: int
    key_value: int
    plain: int
    rotary: int
    value: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One part of a model.

    parameters  numbers that are stored (a selection bias too, which no gradient moves)
    active      those of them that one token uses
    read        numbers that one token alone makes the machine read: of a table that is looked up
                only its row
    flops       two for each multiply-add of a matrix product, forward, per token
    """

    part: str
    parameters: int = 0
    active: int = 0
    read: int = 0
    flops: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """All parts of a model, at a sequence length of `context`."""

    context: int
    rows: tuple[Row, ...]

    def __getitem__(self, part: str) -> Row:
        """Return the row of a part."""
        return {row.part: row for row in self.rows}[part]

    @property
    def parameters(self) -> int:
        """Count all parameters; a tied embedding once."""
        return sum(row.parameters for row in self.rows)

    @property
    def active(self) -> int:
        """Count the parameters that one token uses, the whole embedding among them.

        This is how Mixtral, OLMoE and Qwen3 print it.
        """
        return sum(row.active for row in self.rows)

    @property
    def active_without_embedding(self) -> int:
        """Count as `active` does, but no embedding that serves only to be looked up (gpt-oss)."""
        tied = not self["head"].parameters
        return self.active if tied else self.active - self["embedding"].active

    @property
    def flops(self) -> int:
        """Count the work of one token, forward."""
        return sum(row.flops for row in self.rows)

    def weight_bytes(self, bytes_per_number: float) -> float:
        """Count the bytes of weights that one token alone makes the machine read."""
        return bytes_per_number * sum(row.read for row in self.rows)


def count(
    cfg: ModelConfig,
    context: int | None = None,
    *,
    latent: Latent | None = None,
    encoder: bool = False,
) -> Ledger:
    """Count a model as it is evaluated: no expert turns a token away.

    Work is per token of a sequence of `context` tokens (left out: the model's), attention to all
    of them. A token uses top_k of the experts, under expert choice on average. Soft slots are
    rows made of all tokens: one token's share of them is slots * num_experts / context rows, each
    of which uses one expert.

    Parameters
    ----------
    latent : widths of latent attention in place of the model's own.
    encoder : whether an encoder of the same layers stands before the model, and each of the
        model's layers also attends to its result. Then work is that of one token on each side.
    """
    length = cfg.context if context is None else context
    rules.whole_number("count", "context", length, 1)
    halves = 2 if encoder else 1
    dense = cfg.layers - cfg.moe_count + (cfg.moe_count if cfg.extra_ffn else 0)
    rows = [
        *_tables(cfg),
        _times(_attention(cfg, length, latent), cfg.layers * (3 if encoder else 1)),
        _norms(cfg, encoder),
        _times(_dense(cfg), dense * halves),
    ]
    if cfg.moe is not None:
        parts = (_router(cfg.moe, cfg.width), _experts(cfg.moe, cfg.width, length))
        rows += [_times(row, cfg.moe_count * halves) for row in parts]
        rows.append(_times(_shared(cfg.moe, cfg.width), cfg.moe_count * halves))
    found = {row.part: row for row in rows}
    return Ledger(context=length, rows=tuple(found.get(part, Row(part=part)) for part in PARTS))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes of the arrays of one training step: what its phases leave, and the most at once."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


def step_memory(cfg: ModelConfig, batch: int, moments: int = 2) -> StepMemory:
    """Count the arrays of a step in float32, of whole sequences in one shard.

    The forward leaves for every token a_l numbers of each layer, and 2 C + V of the last norm and
    the logits. The peak comes at one of three places:
        at the loss         sum of a_l + 2 C + 3 V
        in the last layer   sum of a_l + 2 C + 2 V + t_l,    and the first gradients
        in the first layer  a_l + t_l,                       and all gradients
    where t_l is what a layer makes and drops again on its way back: gradients of the scores, of the
    hidden rows or of the router's tables, whichever are most, and some of the stream. With
    `cfg.recompute` a layer leaves C numbers, and a_l while its backward lasts. The peak is that of
    a step to 15 %, if the tokens outweigh the vocabulary (the gradient of a tied table is not
    counted at the loss), no search for places (next_best, Assignment) needs more than all that, and
    experts do not choose their tokens (ExpertChoice: how many choose the same one is not known
    before).

    Parameters
    ----------
    batch : sequences of `cfg.context` tokens.
    moments : averages of the optimizer, 2 for AdamW.
    """
    rules.whole_number("step_memory", "batch", batch, 1)
    rules.whole_number("step_memory", "moments", moments, 0)
    tokens, C, V = batch * cfg.context, cfg.width, cfg.vocab_size
    rows = _rows(cfg, tokens)
    left = [_left(cfg, layer, rows) for layer in range(cfg.layers)]
    made = [_made(cfg, layer, rows) for layer in range(cfg.layers)]
    kept = [C] * cfg.layers if cfg.recompute else left
    at_loss = sum(kept) + 2 * C + 3 * V
    live = left if cfg.recompute else [0] * cfg.layers
    in_last = sum(kept) + 2 * C + 2 * V + max(map(sum, zip(live, made, strict=True)))
    in_first = max(map(sum, zip(left, made, strict=True)))
    parameters = 4 * count(cfg).parameters
    first = parameters // cfg.layers  # gradients of one layer, about
    peak = max(4 * tokens * max(at_loss, in_last) + first, 4 * tokens * in_first + parameters)
    return StepMemory(
        parameters=parameters,
        gradients=parameters,
        optimizer=moments * parameters,
        activations=round(4 * tokens * (sum(kept) + 2 * C + V)),
        peak=round((1 + moments) * parameters + peak),
    )


def _left(cfg: ModelConfig, layer: int, rows: float) -> float:
    """Count the numbers that a layer leaves for the backward of one token."""
    C, moe = cfg.width, cfg.moe
    A, G = (heads * cfg.head_width for heads in (cfg.heads, cfg.key_value_heads))
    found = 4 * C + 2 * A + 2 * G + cfg.heads * cfg.context * (1 + (cfg.logit_cap is not None))
    found += (A + G) * (cfg.qk_norm is not None) + 2 * C * cfg.sandwich
    dense = LEFT[cfg.dense_activation] * (cfg.hidden or 0)
    if not cfg.is_moe(layer):
        return found + dense
    fetched = rows if isinstance(moe.selection, SoftSlots) else moe.top_k  # of dropped rows zeros
    found += (fetched + rows) * C + rows * LEFT[moe.activation] * moe.hidden + _router_tables(moe)
    found += C * isinstance(moe.noise, InputJitter)
    if moe.shared is not None:
        found += LEFT[moe.activation] * moe.shared.hidden + C * moe.shared.gated
    return found + (2 * C + dense) * cfg.extra_ffn


def _made(cfg: ModelConfig, layer: int, rows: float) -> float:
    """Count the numbers that a layer makes for one token on its way back, and drops again."""
    hidden = MADE.get(cfg.dense_activation, 2) * (cfg.hidden or 0)
    if cfg.is_moe(layer):
        moe = cfg.moe
        hidden = rows * (MADE.get(moe.activation, 2) * moe.hidden + 2 * cfg.width)
        hidden = max(hidden, _router_tables(moe) + moe.num_experts)
    scores = (2 + 2 * (cfg.logit_cap is not None)) * cfg.heads * cfg.context
    return max(scores, hidden) + 2 * cfg.width + 3 * cfg.heads * cfg.head_width


def _rows(cfg: ModelConfig, tokens: int) -> float:
    """Count the rows that the experts of a layer work on, for one token; at most, with places."""
    moe = cfg.moe
    if moe is None:
        return 0.0
    if isinstance(moe.selection, SoftSlots):
        return moe.num_experts * moe.selection.slots / tokens
    if moe.capacity is None:
        return moe.top_k
    size = min(moe.capacity.group or tokens, tokens)
    places = moe.num_experts * moe.capacity.places(size, moe.top_k, moe.num_experts)
    return min(moe.top_k, places / size)


def _router_tables(moe: MoEConfig) -> float:
    """Count the numbers that a router leaves for one token: so many for each expert, and group.

    One is the probability; what each further part keeps was counted in its caches.
    """
    if isinstance(moe.selection, SoftSlots):
        return 2 * moe.num_experts * moe.selection.slots
    terms = {type(term) for term in moe.balance}
    learned, grouped = isinstance(moe.noise, LearnedNoise), isinstance(moe.selection, Hierarchy)
    tables = 1 + (moe.score != "softmax") + 2 * learned + isinstance(moe.noise, GaussianNoise)
    if grouped:
        tables += 3 + 2 * learned + (LoadLoss in terms)
        return (moe.num_experts + moe.selection.groups) * tables
    tables += (ZLoss in terms) + 4.25 * (LoadLoss in terms)
    return moe.num_experts * tables


def _row(part: str, parameters: int, flops: int = 0) -> Row:
    """Count a part all of whose parameters every token uses."""
    return Row(part=part, parameters=parameters, active=parameters, read=parameters, flops=flops)


def _times(row: Row, n: int) -> Row:
    names = ("parameters", "active", "read", "flops")
    return Row(part=row.part, **{name: n * getattr(row, name) for name in names})


def _tables(cfg: ModelConfig) -> list[Row]:
    """Count the tables: a row of each is looked up; the head is multiplied by whole."""
    table, learned = cfg.vocab_size * cfg.width, cfg.positions == "learned"
    head = 0 if cfg.tied else table
    positions = cfg.context * cfg.width if learned else 0
    one = cfg.width if learned else 0
    return [
        Row(part="embedding", parameters=table, active=table, read=cfg.width),
        Row(part="positions", parameters=positions, active=positions, read=one),
        Row(part="head", parameters=head, active=head, read=table, flops=2 * table),
    ]


def _attention(cfg: ModelConfig, length: int, latent: Latent | None) -> Row:
    """Count one attention: its projections, the scores and the weighted values."""
    C, H, G, D = cfg.width, cfg.heads, cfg.key_value_heads, cfg.head_width
    if latent is not None:
        channels = latent.plain + latent.rotary
        matrices = (
            C * latent.query
            + latent.query * H * channels
            + C * (latent.key_value + latent.rotary)
            + latent.key_value * H * (latent.plain + latent.value)
            + H * latent.value * C
        )
        gains = latent.query + latent.key_value
        looking = length * H * (channels + latent.value)
        return _row("attention", matrices + gains, 2 * matrices + 2 * looking)
    matrices = C * D * (H + 2 * G + H)
    vectors = D * (H + 2 * G) + C if cfg.attention_bias else 0
    vectors += {"head": 2 * D, "full": (H + G) * D}.get(cfg.qk_norm, 0)
    vectors += H if cfg.sinks else 0
    return _row("attention", matrices + vectors, 2 * matrices + 2 * length * H * 2 * D)


def _norms(cfg: ModelConfig, encoder: bool) -> Row:
    branches = 2 * cfg.layers + (cfg.moe_count if cfg.extra_ffn else 0)
    if encoder:
        branches = 2 * branches + cfg.layers  # the attention to the encoder is a branch of its own
    norms = branches * (2 if cfg.sandwich else 1) + (2 if encoder else 1)
    return _row("norms", norms * cfg.width * (2 if cfg.norm == "layernorm" else 1))


def _matrices(activation: str, width: int, hidden: int) -> int:
    """Count the numbers of one MLP: a way in, a way out, and those that gate."""
    return (branches(activation) + 1) * width * hidden


def _dense(cfg: ModelConfig) -> Row:
    matrices = _matrices(cfg.dense_activation, cfg.width, cfg.hidden or 0)
    return _row("dense feed-forward", matrices, 2 * matrices)


def _router(moe: MoEConfig, width: int) -> Row:
    """Count one router; with soft slots the matrices that mix tokens and bring results back too."""
    if isinstance(moe.selection, SoftSlots):
        matrix = width * moe.num_experts * moe.selection.slots
        return _row("router", matrix + 1, 3 * 2 * matrix)  # and the scale of the cosines
    logits = moe.num_experts
    if isinstance(moe.selection, Hierarchy):
        logits += moe.selection.groups
    matrix = width * logits
    noise = matrix if isinstance(moe.noise, LearnedNoise) else 0  # of training only
    biases = moe.num_experts * (bool(moe.bias_rate) + moe.router_bias)
    used = matrix + biases
    return Row(
        part="router", parameters=used + noise, active=used + noise, read=used, flops=2 * matrix
    )


def _experts(moe: MoEConfig, width: int, length: int) -> Row:
    """Count the experts of one layer, and the sum that the gates weigh."""
    matrices = _matrices(moe.activation, width, moe.hidden)
    hidden_biases = moe.hidden * (2 if moe.gated else 1)
    one = matrices + (hidden_biases + width if moe.expert_bias else 0)
    rows, shares, combine = moe.top_k, 1, 2 * moe.top_k * width
    if isinstance(moe.selection, SoftSlots):
        rows, shares, combine = moe.num_experts * moe.selection.slots, length, 0
    used = rows * one // shares
    flops = rows * 2 * matrices // shares + combine
    return Row(
        part="experts", parameters=moe.num_experts * one, active=used, read=used, flops=flops
    )


def _shared(moe: MoEConfig, width: int) -> Row:
    if moe.shared is None:
        return Row(part="shared")
    matrices = _matrices(moe.activation, width, moe.shared.hidden)
    matrices += width if moe.shared.gated else 0
    return _row("shared", matrices, 2 * matrices)
