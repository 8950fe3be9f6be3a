"""Parity: the same run on two backends, and the model width from which the second is faster."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from moe_numpy import backend, progress
from moe_numpy.config import LearnedNoise, ModelConfig, MoEConfig, SwitchLoss, TrainingConfig
from moe_numpy.lab import records
from moe_numpy.training import data, loop

LIMITS = {"float32": 1e-4, "float64": 1e-10}  # relative difference of the losses
WIDTH = 64  # of the model whose losses are compared
WIDTHS = (32, 64, 128, 256, 512)
TIMED = 5  # steps timed at each width, after one that warms up


def run_parity(
    steps: int = 200, widths: tuple[int, ...] = WIDTHS, names: tuple[str, str] = backend.NAMES
) -> dict[str, Any]:
    """Train with the same seed on both backends, compare the losses, and time a step by width.

    Returns
    -------
    dict
        plain JSON data: for each precision the losses of both backends and their largest relative
        difference beside its limit; for each width the median milliseconds of a step.
    """
    corpus = data.default_corpus()
    losses = {}
    for dtype, limit in LIMITS.items():
        first, second = (_losses(name, corpus, steps, dtype) for name in names)
        difference = float(np.max(np.abs(first - second) / np.abs(first)))
        losses[dtype] = {
            "difference": difference,
            "limit": limit,
            "passed": difference <= limit,
            "series": [first.tolist(), second.tolist()],
        }
    speed = [
        {"width": width, "milliseconds": [_milliseconds(name, corpus, width) for name in names]}
        for width in widths
    ]
    return {
        "study": "parity",
        "backends": list(names),
        "steps": steps,
        **records.provenance(corpus),
        "losses": losses,
        "speed": speed,
    }


def _new_run(corpus: data.Corpus, width: int, steps: int, dtype: str) -> loop.Run:
    moe = MoEConfig(
        num_experts=8, top_k=2, hidden=2 * width, noise=LearnedNoise(), balance=(SwitchLoss(),)
    )
    cfg = ModelConfig(
        vocab_size=corpus.vocab_size, context=64, layers=2, width=width, heads=4, moe=moe
    )
    return loop.new_run(corpus, cfg, TrainingConfig(steps=steps, warmup=0), dtype)


def _losses(name: str, corpus: data.Corpus, steps: int, dtype: str) -> np.ndarray:
    with backend.use_backend(name):
        run = _new_run(corpus, WIDTH, steps, dtype)
        with progress.bar(steps, f"{name} {dtype}", "step") as bar:
            for _ in range(steps):
                loop.take_step(run)
                bar.update()
    return run.series.cross_entropy


def _milliseconds(name: str, corpus: data.Corpus, width: int) -> float:
    """Time a training step, up to the last parameter that it moves."""
    took = []
    with backend.use_backend(name):
        run = _new_run(corpus, width, TIMED + 1, "float32")
        for _ in range(TIMED + 1):
            started = time.perf_counter()
            loop.take_step(run)
            backend.to_host(run.params.norm.gain_C)
            took.append(1e3 * (time.perf_counter() - started))
    return statistics.median(took[1:])
