"""Other ways to choose, to limit and to balance: images, assignments, experts that choose."""

from __future__ import annotations

from moe_numpy.config import (
    Assignment,
    Capacity,
    ExpertChoice,
    GaussianNoise,
    ImportanceLoss,
    LoadLoss,
    ModelConfig,
    MoEConfig,
    Sinkhorn,
    SoftSlots,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.presets.record import DECODER, NO_LIMIT, ROTARY, UNSCALED, Paper, Preset, Published

LANGUAGE = (
    "differs: a model of text in place of a vision transformer; a table of 1000 symbols and its "
    "transpose stand for the patches' projection and the classes."
)

VMOE = Preset(
    name="vmoe",
    year=2021,
    paper=Paper(
        authors="Riquelme et al.",
        title="Scaling Vision with Sparse Mixture of Experts",
        at="arXiv 2106.05974",
    ),
    idea=(
        "Top-2 for images: fixed normal noise of deviation 1/E on the logits, raw gates, losses "
        "on importance and load. All experts of a layer start equal, and part as they see "
        "different tokens."
    ),
    model=ModelConfig(
        vocab_size=1000,
        context=196,
        layers=12,
        width=768,
        heads=12,
        hidden=3072,
        activation="gelu",
        moe_layers=tuple(range(1, 12, 2)),
        moe=MoEConfig(
            num_experts=8,
            top_k=2,
            hidden=3072,
            activation="gelu",
            gate_weights="raw",
            noise=GaussianNoise(std=1 / 8),
            capacity=Capacity(factor=1.05, multiple=4),
            balance=(ImportanceLoss(weight=0.005, of="probabilities"), LoadLoss(weight=0.005)),
            same_start=True,
        ),
    ),
    small=(8, 2),
    departs=(
        LANGUAGE,
        "differs: the load compares each expert with the others (Shazeer et al.); the code has "
        "one threshold per token, which counts the expert itself.",
        "differs: places in token order, so that no token sees a later one; the original is "
        "Capacity(priority='choice'), or 'bpr' with batch prioritized routing.",
        "differs: evaluation has no limit; the original keeps its own.",
        "differs: places and losses over all tokens at once, the original's over eight images.",
        "differs: experts without biases.",
    ),
)

BASE = Preset(
    name="base",
    year=2021,
    paper=Paper(
        authors="Lewis, Bhosale, Dettmers, Goyal, Zettlemoyer",
        title="BASE Layers: Simplifying Training of Large, Sparse Models",
        at="arXiv 2103.16716",
    ),
    idea=(
        "In training tokens are assigned to experts so that all get equally many and the total "
        "affinity is largest: balance without a loss. One such layer is enough."
    ),
    model=ModelConfig(
        vocab_size=51_200,
        context=1024,
        layers=24,
        width=2048,
        heads=16,
        hidden=8192,
        activation="relu",
        moe_layers=(12,),
        moe=MoEConfig(
            num_experts=128,
            top_k=1,
            hidden=8192,
            activation="relu",
            score="sigmoid",
            selection=Assignment(),
            gate_weights="raw",
        ),
    ),
    small=(8, 1),
    departs=(
        "differs: the experts take the place of a feed-forward; the paper inserts them between "
        "two layers.",
        "differs: an expert is one feed-forward; the paper's is a stack of them, each with a norm "
        "and a residual of its own, and so far larger.",
        "differs: the affinity is that of the normalized token.",
        "differs: normal first weights; in the code the experts' last matrix starts at zero and "
        "the router's columns orthogonal.",
        "differs: experts without biases.",
    ),
    notes=(
        "The output of the code, a F(x) + (1 - a) x with F(x) = x + ffn(x), is the x + a ffn(x) of "
        "the paper's equation 1: the residual stream plus a gated expert.",
        "Sizes are those of the paper's section 4.1, which prints 8096 for the feed-forward, with "
        "one expert for each of 128 devices.",
    ),
)

ST_MOE = Preset(
    name="st_moe",
    year=2022,
    paper=Paper(
        authors="Zoph et al.",
        title="ST-MoE: Designing Stable and Transferable Sparse Expert Models",
        at="arXiv 2202.08906",
    ),
    idea=(
        "Top-2 made stable: a loss on the size of the router's logits (the z-loss), and a dense "
        "feed-forward after the experts of every fourth layer."
    ),
    model=ModelConfig(
        vocab_size=32_128,
        context=512,
        layers=24,
        width=5120,
        heads=64,
        head_size=128,
        hidden=20_480,
        activation="geglu",
        norm="rmsnorm",
        norm_eps=1e-6,
        positions="rotary",
        moe_layers=tuple(range(3, 24, 4)),
        extra_ffn=True,
        balance_over_layers="mean",
        moe=MoEConfig(
            num_experts=64,
            top_k=2,
            hidden=20_480,
            activation="geglu",
            gate_weights="raw",
            capacity=Capacity(
                factor=1.25,
                rounding="round",
                minimum=4,
                times_k=False,
                priority="choice",
                group=4096,
            ),
            balance=(SwitchLoss(weight=0.01, divide=False), ZLoss(weight=0.001)),
            init_scale=0.1,
        ),
    ),
    small=(8, 2),
    published=Published(total=269e9, source="paper, ST-MoE-32B"),
    departs=(
        DECODER,
        ROTARY,
        NO_LIMIT,
        "differs: raw gates, as in the configuration of the code; the paper renormalizes them and "
        "drops second experts of small weight.",
        "differs: no z-loss on the output's logits.",
        "differs: the embedding is the head, too; in the code they are two tables.",
        UNSCALED,
    ),
    notes=(
        "Sizes are those of the code's configuration: 24 layers on each side, and their count is "
        "that of the paper. The paper's 27 may count the extra feed-forwards as half layers.",
    ),
    encoder=True,
)

SINKHORN = Preset(
    name="sinkhorn",
    year=2022,
    paper=Paper(
        authors="Clark et al.",
        title="Unified Scaling Laws for Routed Language Models",
        at="arXiv 2202.01169",
    ),
    idea=(
        "Rows and columns of the scores are scaled in turn until tokens and experts are about "
        "evenly used; the best expert of the result is chosen, weighed by the sigmoid of its own "
        "logit. A softer relative of BASE, without a loss."
    ),
    model=ModelConfig(
        vocab_size=32_000,
        context=2048,
        layers=12,
        width=768,
        heads=12,
        norm="rmsnorm",
        positions="rotary",
        moe=MoEConfig(
            num_experts=64,
            top_k=1,
            hidden=3072,
            score="sigmoid",
            selection=Sinkhorn(),
            gate_weights="raw",
        ),
    ),
    small=(8, 1),
    departs=(
        "differs: the scaling and the gate are those of Megatron-LM's router, in training only.",
    ),
    notes=("The sizes are ours: those of a small GPT with experts in every layer.",),
)

EXPERT_CHOICE = Preset(
    name="expert_choice",
    year=2022,
    paper=Paper(
        authors="Zhou et al.",
        title="Mixture-of-Experts with Expert Choice Routing",
        at="arXiv 2202.09368",
    ),
    idea=(
        "The experts choose: each takes the tokens that score it highest, always equally many. "
        "Balance is perfect by construction, and a token gets as many experts as want it, two on "
        "average."
    ),
    model=ModelConfig(
        vocab_size=32_000,
        context=1024,
        layers=12,
        width=768,
        heads=12,
        hidden=3072,
        activation="gelu",
        norm="rmsnorm",
        norm_eps=1e-6,
        positions="rotary",
        causal=False,
        moe_layers=tuple(range(1, 12, 2)),
        moe=MoEConfig(
            num_experts=64,
            top_k=2,
            hidden=3072,
            activation="gelu",
            selection=ExpertChoice(),
            gate_weights="raw",
        ),
    ),
    small=(8, 2),
    published=Published(total=1.9e9, active=0.145e9, source="paper, 0.1B/64E"),
    departs=(
        ROTARY,
        "differs: an encoder, because a choice among all tokens of a sequence looks ahead.",
        "differs: no limit on the experts of one token (the paper's variant).",
        "differs: the dense feed-forwards are plain; the paper's are gated.",
    ),
    notes=(
        "Layers and widths are those of the paper's table 1. Positions, norms and vocabulary are "
        "not those of its host model, and the active parameters that it prints are not met.",
    ),
)

SOFT_MOE = Preset(
    name="soft_moe",
    year=2023,
    paper=Paper(
        authors="Puigcerver, Riquelme, Mustafa, Houlsby",
        title="From Sparse to Soft Mixtures of Experts",
        at="arXiv 2308.00951",
    ),
    idea=(
        "Nothing is chosen: each expert processes one weighted mean of all tokens, and each token "
        "gets back a weighted mean of all results. Both weights come from one matrix of cosines."
    ),
    model=ModelConfig(
        vocab_size=1000,
        context=196,
        layers=12,
        width=768,
        heads=12,
        hidden=3072,
        activation="gelu",
        causal=False,
        moe_layers=tuple(range(6, 12)),
        moe=MoEConfig(
            num_experts=128,
            top_k=128,
            hidden=3072,
            activation="gelu",
            selection=SoftSlots(slots=1),
        ),
    ),
    small=(8, 8),
    departs=(
        LANGUAGE,
        "differs: a slot mixes all tokens of a batch, the paper's those of one image.",
        "differs: no norms of queries and keys, which the released configuration has.",
    ),
)

ALL = (VMOE, BASE, ST_MOE, SINKHORN, EXPERT_CHOICE, SOFT_MOE)
