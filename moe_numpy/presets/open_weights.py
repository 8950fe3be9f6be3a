"""Language models whose weights are open."""

from __future__ import annotations

import math

from moe_numpy.config import Capacity, ModelConfig, MoEConfig, Shared, SwitchLoss, ZLoss
from moe_numpy.presets.record import NO_LIMIT, POOLED, Paper, Preset, Published

MIXTRAL = Preset(
    name="mixtral_8x7b",
    year=2024,
    paper=Paper(
        authors="Jiang et al.",
        title="Mixtral of Experts",
        at="arXiv 2401.04088",
    ),
    idea=(
        "Eight gated experts in every layer of a Llama-like model, two of them for each token, "
        "weighed by a softmax over the two. No noise, no capacity limit."
    ),
    model=ModelConfig(
        vocab_size=32_000,
        context=32_768,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        norm="rmsnorm",
        positions="rotary",
        theta=1e6,
        tied=False,
        moe=MoEConfig(
            num_experts=8,
            top_k=2,
            hidden=14_336,
            activation="swiglu",
            gate_weights="renormalized",
            balance=(SwitchLoss(weight=0.02, divide=False),),
        ),
    ),
    small=(8, 2),
    published=Published(total=47e9, active=13e9, source="paper"),
    departs=(POOLED,),
    notes=(
        "How Mixtral was balanced is not published; the loss is that of Hugging Face's "
        "configuration.",
    ),
)

GROK = Preset(
    name="grok1",
    year=2024,
    paper=Paper(authors="xAI", title="Grok-1 (code and weights)", at="xai-org/grok-1"),
    idea=(
        "Eight large experts, top-2 with raw gates that sum to less than one. Norms before and "
        "after each branch and a cap on the attention logits keep numbers small."
    ),
    model=ModelConfig(
        vocab_size=131_072,
        context=8192,
        layers=64,
        width=6144,
        heads=48,
        kv_heads=8,
        norm="rmsnorm",
        sandwich=True,
        positions="rotary",
        logit_cap=30.0,
        embedding_scale=math.sqrt(6144),
        logit_scale=1 / math.sqrt(3),
        moe=MoEConfig(
            num_experts=8,
            top_k=2,
            hidden=32_768,
            activation="geglu",
            gate_weights="raw",
            balance=(SwitchLoss(weight=0.01),),
        ),
    ),
    small=(8, 2),
    published=Published(total=314e9, source="release; active: a quarter of the weights"),
    departs=("differs: the Switch loss is ours; how Grok-1 was trained is not published.",),
    notes=("314.9 billion are those without the embedding, which is the head too.",),
)

OPENMOE = Preset(
    name="openmoe_8b",
    year=2024,
    paper=Paper(
        authors="Xue et al.",
        title="OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models",
        at="arXiv 2402.01739",
    ),
    idea=(
        "Top-2 of 32 experts in every sixth layer, with raw gates, limited places and a dense "
        "feed-forward after the experts. The released experts multiply three branches."
    ),
    model=ModelConfig(
        vocab_size=256_384,
        context=2048,
        layers=24,
        width=2048,
        heads=24,
        head_size=128,
        hidden=8192,
        activation="swiglu3",
        norm="rmsnorm",
        norm_eps=1e-6,
        positions="rotary",
        attention_scale=1.0,
        tied=False,
        moe_layers=(5, 11, 17, 23),
        extra_ffn=True,
        balance_over_layers="mean",
        moe=MoEConfig(
            num_experts=32,
            top_k=2,
            hidden=8192,
            activation="swiglu3",
            gate_weights="raw",
            capacity=Capacity(
                factor=1.25, rounding="floor", minimum=4, multiple=2, priority="choice"
            ),
            balance=(SwitchLoss(weight=0.01, divide=False), ZLoss(weight=1e-4)),
            router_std=math.sqrt(0.1 / 2048),
            init_scale=0.1,
        ),
    ),
    small=(8, 2),
    published=Published(total=8.7e9, active=2.6e9, source="paper, of 3 matrices and 1 embedding"),
    departs=(
        "differs: experts as in the released PyTorch code, with four matrices; the paper counts "
        "three.",
        "differs: the extra feed-forward follows the experts, as in the code; the paper writes "
        "them side by side.",
        NO_LIMIT,
        "differs: no z-loss on the output's logits, and AdamW in place of Adafactor.",
    ),
)

GPT_OSS = Preset(
    name="gpt_oss",
    year=2025,
    paper=Paper(
        authors="OpenAI",
        title="gpt-oss-120b & gpt-oss-20b Model Card",
        at="arXiv 2508.10925",
    ),
    idea=(
        "Top-4 of 128 experts by a router with a bias; the experts have biases too, and clamp "
        "what they multiply. Each head has a sink that takes attention away. This is the 120b."
    ),
    model=ModelConfig(
        vocab_size=201_088,
        context=131_072,
        layers=36,
        width=2880,
        heads=64,
        kv_heads=8,
        head_size=64,
        norm="rmsnorm",
        positions="rotary",
        theta=150_000.0,
        attention_bias=True,
        sinks=True,
        tied=False,
        moe=MoEConfig(
            num_experts=128,
            top_k=4,
            hidden=2880,
            activation="clamped_swiglu",
            gate_weights="renormalized",
            balance=(SwitchLoss(weight=0.01),),
            router_bias=True,
            expert_bias=True,
        ),
    ),
    small=(16, 4),
    published=Published(
        total=116.8e9,
        active=5.13e9,
        source="model card; active: without the input embedding",
        with_embedding=False,
    ),
    departs=(
        "differs: the Switch loss is ours; how gpt-oss was trained is not published.",
        "differs: every layer attends to the whole context; the original's every second one to "
        "128 tokens, and YaRN stretches its rotary angles.",
    ),
)

LLAMA4 = Preset(
    name="llama4",
    year=2025,
    paper=Paper(authors="Meta", title="Llama 4 Scout (code and weights)", at="model card"),
    idea=(
        "One routed expert per token beside a shared one of the same width. The sigmoid of the "
        "chosen logit multiplies the expert's input, not its output."
    ),
    model=ModelConfig(
        vocab_size=202_048,
        context=8192,
        layers=48,
        width=5120,
        heads=40,
        kv_heads=8,
        norm="rmsnorm",
        positions="rotary",
        theta=500_000.0,
        qk_norm="l2",
        tied=False,
        moe=MoEConfig(
            num_experts=16,
            top_k=1,
            hidden=8192,
            activation="swiglu",
            score="sigmoid",
            gate_weights="raw",
            gate_on="input",
            balance=(SwitchLoss(weight=0.001),),
            shared=Shared(hidden=8192),
        ),
    ),
    small=(8, 1),
    published=Published(total=109e9, active=17e9, source="model card, with the image encoder"),
    departs=(
        "differs: rotary positions in all layers, and attention to the whole context; the "
        "original leaves positions out in every fourth layer and cuts the context in the others.",
        "differs: the Switch loss is ours, with the weight that Hugging Face's configuration "
        "names; its code computes none, and how Llama 4 was balanced is not published.",
        "differs: text only.",
    ),
    notes=("The context is unverified.",),
)

ALL = (MIXTRAL, GROK, OPENMOE, GPT_OSS, LLAMA4)
