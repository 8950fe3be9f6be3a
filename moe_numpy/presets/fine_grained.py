"""Many small experts, and often one that is shared by all tokens."""

from __future__ import annotations

from moe_numpy import ledger
from moe_numpy.config import (
    GroupLimited,
    ModelConfig,
    MoEConfig,
    Shared,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.presets.record import POOLED, Paper, Preset, Published

DEEPSEEKMOE = Preset(
    name="deepseekmoe",
    year=2024,
    paper=Paper(
        authors="Dai et al.",
        title="DeepSeekMoE: Towards Ultimate Expert Specialization",
        at="arXiv 2401.06066",
    ),
    idea=(
        "Experts a quarter as wide, and four times as many of them: more combinations for the "
        "same work. One expert is shared by all tokens, so that the others need not repeat what "
        "everybody knows. This is the 2B model of the study."
    ),
    model=ModelConfig(
        vocab_size=8192,
        context=2048,
        layers=9,
        width=1280,
        heads=10,
        norm="rmsnorm",
        norm_eps=1e-6,
        positions="rotary",
        tied=False,
        moe=MoEConfig(
            num_experts=63,
            top_k=7,
            hidden=853,
            activation="swiglu",
            gate_weights="raw",
            balance=(SwitchLoss(weight=0.01),),
            shared=Shared(hidden=853),
            router_std=0.006,
        ),
    ),
    small=(15, 3),
    published=Published(total=2.0e9, active=0.3e9, source="paper, table 1"),
    departs=(
        "differs: one device, so that there is no loss for balance over devices.",
        "differs: only the router's first weights have the paper's deviation of 0.006.",
    ),
    notes=(
        "853 is a quarter of 8/3 of the width; the paper prints the quarter alone. Vocabulary and "
        "context are unverified.",
    ),
)

DEEPSEEK_V3 = Preset(
    name="deepseek_v3",
    year=2024,
    paper=Paper(authors="DeepSeek-AI", title="DeepSeek-V3 Technical Report", at="arXiv 2412.19437"),
    idea=(
        "Top-8 of 256 experts by their own sigmoids, within the 4 best of 8 groups. A bias that "
        "enters the choice alone, moved after each step, does the balancing; all that is left of "
        "the losses is a tiny one for each sequence."
    ),
    model=ModelConfig(
        vocab_size=129_280,
        context=4096,
        layers=61,
        width=7168,
        heads=128,
        kv_heads=2,
        head_size=128,
        hidden=18_432,
        activation="swiglu",
        norm="rmsnorm",
        norm_eps=1e-6,
        positions="rotary",
        tied=False,
        moe_layers=tuple(range(3, 61)),
        moe=MoEConfig(
            num_experts=256,
            top_k=8,
            hidden=2048,
            activation="swiglu",
            score="sigmoid",
            selection=GroupLimited(groups=8, kept=4, score="top2"),
            gate_weights="renormalized",
            gate_scale=2.5,
            balance=(SwitchLoss(weight=1e-4, group=4096),),
            bias_rate=0.001,
            shared=Shared(hidden=2048),
        ),
    ),
    small=(16, 4),
    published=Published(total=671e9, active=37e9, source="report"),
    departs=(
        "differs: grouped-query attention in place of latent attention; two key/value heads keep "
        "512 numbers per token, latent attention 576. The counts are those of latent attention.",
        "differs: no prediction of the token after next.",
        "differs: the sequence's loss counts the experts that the bias helped choose.",
    ),
    latent=ledger.Latent(query=1536, key_value=512, plain=128, rotary=64, value=128),
)

OLMOE = Preset(
    name="olmoe",
    year=2024,
    paper=Paper(
        authors="Muennighoff et al.",
        title="OLMoE: Open Mixture-of-Experts Language Models",
        at="arXiv 2409.02060",
    ),
    idea=(
        "Top-8 of 64 small experts with raw gates, nothing dropped and nothing shared; queries "
        "and keys are normalized over all heads together. Data, code and logs are open."
    ),
    model=ModelConfig(
        vocab_size=50_304,
        context=4096,
        layers=16,
        width=2048,
        heads=16,
        norm="rmsnorm",
        positions="rotary",
        qk_norm="full",
        tied=False,
        balance_over_layers="mean",
        moe=MoEConfig(
            num_experts=64,
            top_k=8,
            hidden=1024,
            activation="swiglu",
            gate_weights="raw",
            balance=(SwitchLoss(weight=0.01), ZLoss(weight=0.001)),
        ),
    ),
    small=(16, 4),
    published=Published(total=6.9e9, active=1.3e9, source="paper"),
    departs=(
        "differs: normal first weights of our own deviations; the paper's have 0.02, cut off at "
        "three deviations.",
    ),
)

QWEN3 = Preset(
    name="qwen3_moe",
    year=2025,
    paper=Paper(authors="Qwen Team", title="Qwen3 Technical Report", at="arXiv 2505.09388"),
    idea=(
        "Top-8 of 128 small experts with renormalized gates and no shared expert; queries and "
        "keys are normalized head by head. This is Qwen3-30B-A3B."
    ),
    model=ModelConfig(
        vocab_size=151_936,
        context=32_768,
        layers=48,
        width=2048,
        heads=32,
        kv_heads=4,
        head_size=128,
        norm="rmsnorm",
        norm_eps=1e-6,
        positions="rotary",
        theta=1e6,
        qk_norm="head",
        tied=False,
        moe=MoEConfig(
            num_experts=128,
            top_k=8,
            hidden=768,
            activation="swiglu",
            gate_weights="renormalized",
            balance=(SwitchLoss(weight=0.001, divide=False),),
        ),
    ),
    small=(16, 4),
    published=Published(total=30.5e9, active=3.3e9, source="model card"),
    departs=(
        POOLED,
        "differs: balance over the batch of one machine; Qwen's is over all machines'.",
    ),
    notes=("Base of the rotary angles and context are unverified.",),
)

ALL = (DEEPSEEKMOE, DEEPSEEK_V3, OLMOE, QWEN3)
