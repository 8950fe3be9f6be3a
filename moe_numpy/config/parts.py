"""The parts that an MoE layer is composed from: noise, selection, capacity, balance, shared expert.

Each is a small frozen record with its own knobs; what is not wanted is None or left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_numpy.config import rules

PRIORITIES = ("token", "choice", "bpr", "score")


# ------------------------------------------------------------------------------------------- noise
@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedNoise:
    """Normal noise on the logits whose scale, softplus(x W_noise) + floor, is learned.

    Source: Shazeer et al. 2017, eq. 4; tensor2tensor's floor of 0.01 keeps the scale positive.
    """

    floor: float = 0.01

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        rules.normal("LearnedNoise", "floor", self.floor, "Use 0.01.")


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianNoise:
    """Normal noise of a fixed standard deviation on the logits (V-MoE: 1 / num_experts)."""

    std: float = 1.0

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        rules.normal("GaussianNoise", "std", self.std, "Or noise=None.")


@dataclass(frozen=True, kw_only=True, slots=True)
class InputJitter:
    """Multiply what the router sees, and only that, by U(1 - eps, 1 + eps), element by element.

    Source: Fedus et al. 2022, Switch Transformers, appendix C (eps = 0.01: Mesh TensorFlow).
    """

    eps: float = 0.01

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        rules.fraction("InputJitter", "eps", self.eps, "Or noise=None.")


# --------------------------------------------------------------------------------------- selection
@dataclass(frozen=True, kw_only=True, slots=True)
class SecondExpert:
    """Top-2, of which the second expert is used only where its weight w2 says so.

    policy  "random": with probability min(1, w2 / threshold), drawn in training; at evaluation
            always;
            "threshold": where w2 > threshold, in training and at evaluation.
    The weights are those of the renormalized pair, and a survivor keeps its own.

    Source: Lepikhin et al. 2020, GShard, algorithm 1 (random, threshold 1/2).
    """

    policy: str = "random"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        who, advice = "SecondExpert", "Or selection=None: plain top-2."
        rules.one_of(who, "policy", self.policy, ("random", "threshold"))
        rules.fraction(who, "threshold", self.threshold, advice)
        rules.normal(who, "threshold", self.threshold, advice)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupLimited:
    """Top-k among the experts of the `kept` best groups only.

    score  of a group: its best expert ("max"), or the sum of its two best ("top2").

    Source: DeepSeek-AI 2024, DeepSeek-V2 (max) and DeepSeek-V3 (top2), node-limited routing.
    """

    groups: int
    kept: int
    score: str = "top2"

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        who = "GroupLimited"
        rules.whole_number(who, "groups", self.groups, 2)
        rules.whole_number(who, "kept", self.kept, 1)
        rule = f"kept must be less than groups ({self.groups})"
        advice = "Keep fewer, or selection=None."
        rules.require(self.kept < self.groups, who, rule, self.kept, advice)
        rules.one_of(who, "score", self.score, ("max", "top2"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Hierarchy:
    """Two levels: a primary router keeps `kept` groups, a router in each chooses its experts.

    Every kept group gives top_k / kept experts; a gate is the product of both levels' gates.

    Source: Shazeer et al. 2017, appendix B.
    """

    groups: int
    kept: int = 2

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        who = "Hierarchy"
        rules.whole_number(who, "groups", self.groups, 2)
        rules.whole_number(who, "kept", self.kept, 1)
        rule = f"kept must be at most groups ({self.groups})"
        rules.require(self.kept <= self.groups, who, rule, self.kept, "Keep fewer.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sinkhorn:
    """Top-k of scores that were scaled until tokens and experts are about evenly used.

    Only in training; evaluation takes the plain top-k. The scaling has no gradient.

    Source: Clark et al. 2022, Unified Scaling Laws for Routed Language Models, appendix B;
    Megatron-LM's router.
    """

    tolerance: float = 1e-4
    most: int = 100

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        rules.positive("Sinkhorn", "tolerance", self.tolerance, "Use 1e-4.")
        rules.whole_number("Sinkhorn", "most", self.most, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """Top-1 in training by the best assignment that gives every expert equally many tokens.

    Evaluation takes each token's best expert. The assignment has no gradient.

    Source: Lewis et al. 2021, BASE Layers, section 3.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertChoice:
    """Every expert chooses its best tokens: ceil(top_k * tokens / num_experts) of them.

    A token gets top_k experts on average, and any number from none to all. An expert compares
    all tokens, later ones too: not for predicting the next token. Best are those that give it the
    largest share of their scores: its probability, if the score is a softmax. Where shares are
    rounded to the same number, as to 1 in float32 by a lead of more than 17 nats, and to 0 by one
    of more than 104, earlier tokens are taken first.

    Source: Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing, section 3.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftSlots:
    """Every expert processes `slots` weighted means of all tokens; nothing is chosen or dropped.

    Not for predicting the next token: a mean over all tokens contains the later ones.

    Source: Puigcerver et al. 2024, From Sparse to Soft Mixtures of Experts, section 2.
    """

    slots: int = 1

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        rules.whole_number("SoftSlots", "slots", self.slots, 1)


SELECTIONS = (
    SecondExpert,
    GroupLimited,
    Hierarchy,
    Sinkhorn,
    Assignment,
    ExpertChoice,
    SoftSlots,
)


# ---------------------------------------------------------------------------------------- capacity
@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """How many places an expert has, who gets them, and what happens to those who do not.

    places = rounding(factor * top_k * tokens / num_experts), at least `minimum`, then up to a
    multiple of `multiple`.

    overflow   "drop": a choice without a place adds nothing, the token keeps its residual;
               "next_best": it asks the token's next best expert, and so on down the ranking.
               No limit at all is ``capacity=None``.
    priority   "token": tokens are served one by one, each with all its choices (causal);
               "choice": all first choices before any second choice (GShard);
               "bpr": the same, but among first (second, ...) choices the token with the largest
               probability goes first (V-MoE's batch prioritized routing);
               "score": the choice with the largest probability first (Megatron's "probs").
               Rounded probabilities may be equal, and then earlier tokens come first: in float32
               every lead of more than 17 nats makes a 1.
    times_k    whether top_k counts in the formula: it does in GShard's paper, V-MoE, MegaBlocks
               and Megatron, and does not in Mesh TensorFlow, Flaxformer and Lingvo.
    group      tokens per routing group: each group of consecutive tokens has places of its own,
               counted from its own size (the last may be smaller). None: one group.
    """

    factor: float = 1.25
    overflow: str = "drop"
    priority: str = "token"
    rounding: str = "ceil"
    minimum: int = 0
    multiple: int = 1
    times_k: bool = True
    group: int | None = None

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        who, advice = "Capacity", "Use 1.25, or capacity=None for no limit."
        rules.positive(who, "factor", self.factor, advice)
        rules.one_of(who, "overflow", self.overflow, ("drop", "next_best"))
        rules.one_of(who, "priority", self.priority, PRIORITIES)
        rules.one_of(who, "rounding", self.rounding, ("ceil", "floor", "round"))
        rules.whole_number(who, "minimum", self.minimum, 0)
        rules.whole_number(who, "multiple", self.multiple, 1)
        rules.instance(who, "times_k", self.times_k, (bool,))
        if self.group is not None:
            rules.whole_number(who, "group", self.group, 1)

    def places(self, tokens: int, top_k: int, num_experts: int) -> int:
        """Count the places of one expert for a group of `tokens` (unit: choices)."""
        exact = self.factor * (top_k if self.times_k else 1) * tokens / num_experts
        if exact == math.inf:  # of a huge factor: as many places as there are choices
            exact = top_k * tokens
        wanted = float(f"{exact:.12g}")  # 1.1 * 10 is 11, not a little more
        rounded = {"ceil": math.ceil, "floor": math.floor, "round": round}[self.rounding](wanted)
        return -(-max(rounded, self.minimum) // self.multiple) * self.multiple


# ----------------------------------------------------------------------------------------- balance
@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchLoss:
    """weight * E * sum_e f_e P_e: 1 at balance before the weight (Fedus et al. 2022, eq. 4).

    f_e is the share of the choices that expert e got, P_e its mean probability (for scores that
    do not sum to one: its mean share of the token's scores).

    counted    how many of a token's best experts f counts: None for the top_k choices, 1 for the
               first alone (GShard), more than top_k for candidates (the rerouting of Mesh).
    divide     whether f is divided by `counted`, so that the balanced value is 1; if not, it is
               `counted` (Flaxformer, Hugging Face).
    group      tokens per group: the mean over groups of consecutive tokens, each balanced by
               itself (GShard; DeepSeek-V3: a sequence). None: one group.
    """

    weight: float = 0.01
    counted: int | None = None
    divide: bool = True
    group: int | None = None

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        rules.positive_weight(self)
        rules.instance("SwitchLoss", "divide", self.divide, (bool,))
        for name in ("counted", "group"):
            if getattr(self, name) is not None:
                rules.whole_number("SwitchLoss", name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceLoss:
    """weight * CV^2 of the experts' importance (Shazeer et al. 2017, eq. 7).

    of  "gates": importance sums the gates (Shazeer);
        "probabilities": it sums the softmax of the clean logits over all experts (Riquelme et al.
        2021).
    """

    weight: float = 0.1
    of: str = "gates"

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        rules.positive_weight(self)
        rules.one_of("ImportanceLoss", "of", self.of, ("gates", "probabilities"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadLoss:
    """weight * CV^2 of the smooth load estimate (Shazeer et al. 2017, appendix A)."""

    weight: float = 0.1

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        rules.positive_weight(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ZLoss:
    """weight * mean (log sum exp of the router's logits)^2 (Zoph et al. 2022, ST-MoE, eq. 5)."""

    weight: float = 0.001

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        rules.positive_weight(self)


TERMS = (SwitchLoss, ImportanceLoss, LoadLoss, ZLoss)


# ------------------------------------------------------------------------------------------ shared
@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """An MLP beside the experts that every token takes; its output is added to theirs.

    hidden  its width; several shared experts are one with the sum of their widths.
    gated   whether a learned sigmoid of the token scales its output (Qwen2-MoE).

    Source: Dai et al. 2024, DeepSeekMoE, section 3.2.
    """

    hidden: int
    gated: bool = False

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        rules.whole_number("Shared", "hidden", self.hidden, 1)
        rules.instance("Shared", "gated", self.gated, (bool,))
