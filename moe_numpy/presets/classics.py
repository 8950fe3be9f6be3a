"""The systems from the first gate of 1991 to one expert per token."""

from __future__ import annotations

import math

from moe_numpy.config import (
    Capacity,
    Hierarchy,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    ModelConfig,
    MoEConfig,
    SecondExpert,
    SwitchLoss,
)
from moe_numpy.presets.record import DECODER, NO_LIMIT, ROTARY, UNSCALED, Paper, Preset, Published

JACOBS = Preset(
    name="jacobs1991",
    year=1991,
    paper=Paper(
        authors="Jacobs, Jordan, Nowlan, Hinton",
        title="Adaptive Mixtures of Local Experts",
        at="Neural Comp. 3",
    ),
    idea=(
        "Every expert sees every input, and a gating network weighs their outputs by a softmax. "
        "Nothing is sparse yet; the idea is that experts divide the inputs among themselves."
    ),
    model=ModelConfig(
        vocab_size=4,  # vowels
        context=1,
        layers=1,
        width=2,  # formants
        heads=1,
        moe=MoEConfig(
            num_experts=4,
            top_k=4,
            hidden=2,
            activation="identity",
            gate_weights="raw",
            router_bias=True,
            expert_bias=True,
        ),
    ),
    small=(4, 4),
    departs=(
        "differs: the summed output is trained on the next token, the cooperative error; the "
        "paper's point is -log sum_i p_i exp(-|d - o_i|^2 / 2), for which experts compete. The "
        "whole of it, with all its errors, is in moe_numpy/moe/jacobs.py.",
        "differs: an expert is linear as two matrices in a row, without a function between them.",
        "differs: a layer of a transformer, behind a norm and beside a residual stream.",
    ),
    notes=("The paper also tries 8 experts.",),
)

SHAZEER = Preset(
    name="shazeer2017",
    year=2017,
    paper=Paper(
        authors="Shazeer et al.",
        title="Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
        at="arXiv 1701.06538",
    ),
    idea=(
        "Only the top 4 of 256 experts run. Learned noise on the logits makes the router try "
        "others, and two losses on the variation of importance and load keep all of them in use."
    ),
    model=ModelConfig(
        vocab_size=793_471,
        context=64,
        layers=1,
        width=512,
        heads=8,
        tied=False,
        moe=MoEConfig(
            num_experts=256,
            top_k=4,
            hidden=1024,
            activation="relu",
            gate_weights="renormalized",
            noise=LearnedNoise(),
            balance=(ImportanceLoss(weight=0.1), LoadLoss(weight=0.1)),
            router_std=0.0,
        ),
    ),
    small=(16, 4),
    departs=(
        "differs: attention in place of the two LSTM layers around the experts.",
        "differs: the layer's output passes through no sigmoid.",
    ),
    notes=(
        "The experts alone have 268 million parameters, one million each.",
        "Vocabulary and context of the host model are unverified.",
    ),
)

HIERARCHICAL = Preset(
    name="shazeer2017_hierarchical",
    year=2017,
    paper=SHAZEER.paper,
    idea=(
        "A primary router chooses 2 of 16 groups, and a secondary router in each 2 of its 16 "
        "experts. A gate is the product of both levels' gates."
    ),
    model=ModelConfig(
        vocab_size=793_471,
        context=64,
        layers=1,
        width=512,
        heads=8,
        tied=False,
        moe=MoEConfig(
            num_experts=256,
            top_k=4,
            hidden=1024,
            activation="relu",
            selection=Hierarchy(groups=16, kept=2),
            noise=LearnedNoise(),
            balance=(ImportanceLoss(weight=0.1), LoadLoss(weight=0.1)),
            router_std=0.0,
        ),
    ),
    small=(16, 4),
    departs=(
        *SHAZEER.departs,
        "differs: every token passes through the secondary routers of all groups, not only of "
        "its two.",
    ),
    notes=SHAZEER.notes,
)

GSHARD = Preset(
    name="gshard",
    year=2020,
    paper=Paper(
        authors="Lepikhin et al.",
        title="GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
        at="arXiv 2006.16668",
    ),
    idea=(
        "Top-2 in every second layer of a translation Transformer. Experts have a fixed number of "
        "places, first choices are served before second ones, and a second expert with a small "
        "weight is often left out by a throw of dice."
    ),
    model=ModelConfig(
        vocab_size=64_000,
        context=1024,
        layers=18,
        width=1024,
        heads=16,
        head_size=128,
        hidden=8192,
        activation="relu",
        positions="rotary",
        moe_layers=tuple(range(1, 18, 2)),
        moe=MoEConfig(
            num_experts=2048,
            top_k=2,
            hidden=8192,
            activation="relu",
            selection=SecondExpert(policy="random", threshold=0.5),
            capacity=Capacity(factor=1.0, priority="choice", group=2048),
            balance=(SwitchLoss(weight=0.01, counted=1, group=2048),),
        ),
    ),
    small=(8, 2),
    published=Published(total=600e9, source="paper, table 1: 2048 experts, 36 layers"),
    departs=(
        DECODER,
        "differs: a second choice that the dice reject takes no place (the code; in the paper's "
        "algorithm 1 it does).",
        "differs: the loss is E sum f P, 1 at balance, as in the code; the paper's is smaller by "
        "E^2, and its weight is not printed.",
        "differs: evaluation always uses both experts and limits none.",
        "differs: rotary positions, which are younger than the paper.",
        "differs: AdamW in place of Adafactor.",
    ),
    notes=(
        "The 36 layers are counted as 18 of the encoder and 18 of the decoder.",
        "Vocabulary and size of a routing group are ours: 64,000, and 2048 tokens.",
    ),
    encoder=True,
)

SWITCH = Preset(
    name="switch",
    year=2021,
    paper=Paper(
        authors="Fedus, Zoph, Shazeer",
        title="Switch Transformers: Scaling to Trillion Parameter Models",
        at="arXiv 2101.03961",
    ),
    idea=(
        "One expert per token is enough, if its raw probability stays on its output as a gate. "
        "Capacity limits, a balance loss, a little jitter and a small initialization make it "
        "train. This is Switch-Base with 128 experts."
    ),
    model=ModelConfig(
        vocab_size=32_128,
        context=512,
        layers=12,
        width=768,
        heads=12,
        hidden=3072,
        activation="relu",
        norm="rmsnorm",
        norm_eps=1e-6,
        positions="rotary",
        moe_layers=tuple(range(1, 12, 2)),
        moe=MoEConfig(
            num_experts=128,
            top_k=1,
            hidden=3072,
            activation="relu",
            gate_weights="raw",
            noise=InputJitter(eps=0.01),
            capacity=Capacity(factor=1.25, rounding="floor", minimum=4),
            balance=(SwitchLoss(weight=0.01),),
            router_std=math.sqrt(0.1 / 768),
            init_scale=0.1,
        ),
    ),
    small=(8, 1),
    published=Published(
        total=7.4e9, active=0.223e9, source="paper; active: T5-Base, which does the same work"
    ),
    departs=(
        DECODER,
        ROTARY,
        NO_LIMIT,
        "differs: jitter multiplies the router's input, as in the text and the code; the paper's "
        "listing adds it to the logits.",
        "differs: no expert dropout, which is for fine-tuning.",
        "differs: ReLU of width 3072, as in the configuration of the code; the paper's table 9 has "
        "a gated GELU of width 2048, as many parameters.",
        UNSCALED,
        "differs: the head reads the stream as it is; in T5 divided by the root of its width.",
    ),
    encoder=True,
)

OVERFLOW = Preset(
    name="noise_overflow",
    year=2021,
    paper=Paper(
        authors="Fedus, Zoph, Shazeer",
        title="Switch Transformers, appendix B (no token left behind); the noise of Shazeer et al.",
        at="arXiv 2101.03961",
    ),
    idea=(
        "Learned noise explores, capacity limits, and a token that finds its expert full asks its "
        "next best one until it gets a place. Nearly nothing is dropped."
    ),
    model=ModelConfig(
        vocab_size=32_128,
        context=512,
        layers=12,
        width=768,
        heads=12,
        norm="rmsnorm",
        positions="rotary",
        moe=MoEConfig(
            num_experts=8,
            top_k=1,
            hidden=2048,
            activation="swiglu",
            gate_weights="raw",
            noise=LearnedNoise(),
            capacity=Capacity(factor=1.25, overflow="next_best"),
            balance=(SwitchLoss(weight=0.01, counted=4),),
        ),
    ),
    small=(8, 1),
    departs=(
        "differs: a token asks all experts in turn; the code of Mesh TensorFlow stops at the "
        "fourth, and jitters in place of the learned noise.",
        "differs: evaluation limits no expert.",
    ),
    notes=("No model of this kind was published: the sizes are of Switch-Base's order.",),
)

ALL = (JACOBS, SHAZEER, HIERARCHICAL, GSHARD, SWITCH, OVERFLOW)
