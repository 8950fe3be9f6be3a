"""Configurations of a training run and its optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_numpy.config import rules


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW:
    """Adam with decoupled weight decay, none on gains and biases (Loshchilov and Hutter 2019).

    skip_idle  whether a step leaves an expert's array alone if its gradient is zero throughout, as
               it is without tokens. Its averages then run over the steps in which the expert had
               work: meanwhile they do not fade, the old momentum does not move the weights, and
               the weights do not decay. Their start is corrected by the number of all steps: a
               first step that comes late is (1 - beta1) / sqrt(1 - beta2) times the rate. PyTorch's
               SparseAdam does the same. Gradients are whole arrays, zeros for idle experts too, so
               each is still looked at once.
    """

    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    skip_idle: bool = False

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        for name in ("beta1", "beta2"):
            rules.share("AdamW", name, getattr(self, name))
        rules.normal("AdamW", "eps", self.eps, "Use 1e-8.")
        rules.not_negative("AdamW", "weight_decay", self.weight_decay)
        rules.instance("AdamW", "skip_idle", self.skip_idle, (bool,))


@dataclass(frozen=True, kw_only=True, slots=True)
class SGD:
    """Stochastic gradient descent with momentum (Polyak 1964); no decay on gains and biases."""

    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        rules.share("SGD", "momentum", self.momentum)
        rules.not_negative("SGD", "weight_decay", self.weight_decay)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One training run.

    rate, final_rate  learning rate after `warmup` steps of linear rise, and at the cosine's end,
                      where it is `rate` if that is lower
    clip              largest norm of all gradients together; None for no clipping
    smoothing         label smoothing of the training loss
    shards            parts of equally many sequences that a batch is split into; each is routed by
                      itself, and threads may share them out
    seed              of the parameters, the data order and the noise, each with its own generator
    """

    steps: int = 600
    batch: int = 12
    rate: float = 1e-3
    final_rate: float = 1e-4
    warmup: int = 100
    clip: float | None = 1.0
    smoothing: float = 0.0
    shards: int = 1
    optimizer: AdamW | SGD = AdamW()
    seed: int = 0

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        who = "TrainingConfig"
        for name, least in (("steps", 1), ("batch", 1), ("warmup", 0), ("seed", 0)):
            rules.whole_number(who, name, getattr(self, name), least)
        rules.positive(who, "rate", self.rate, "Use 1e-3.")
        rules.whole_number(who, "shards", self.shards, 1)
        rule = f"batch must be a multiple of shards ({self.shards})"
        rules.require(self.batch % self.shards == 0, who, rule, self.batch, "Change either.")
        rules.not_negative(who, "final_rate", self.final_rate)
        rules.instance(who, "optimizer", self.optimizer, (AdamW, SGD))
        if self.clip is not None:
            rules.positive(who, "clip", self.clip, "Or clip=None.")
        rules.share(who, "smoothing", self.smoothing, "Use 0 for none.")

    def rate_at(self, step: int) -> float:
        """Compute the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        final = min(self.final_rate, self.rate)
        return final + cosine * (self.rate - final)
