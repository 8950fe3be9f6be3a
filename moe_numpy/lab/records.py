"""Records: what a run leaves behind as plain JSON data."""

from __future__ import annotations

import itertools
import platform
from typing import Any

import numpy as np

from moe_numpy import config
from moe_numpy.lab import metrics
from moe_numpy.training import data, loop

POINTS = 50  # of a series that is drawn


def series(run: loop.Run) -> dict[str, Any]:
    """Average the series of the steps that are done over equal stretches, for drawing.

    Returns
    -------
    dict
        "step" (ends of the stretches), "training_loss" (nats per token), "share" (stretches,
        layers, E: shares of the load in training), "drop_rate", "decisiveness" and "gate_entropy"
        (stretches, layers).
    """
    edges = np.linspace(0, run.step, min(POINTS, run.step) + 1).astype(int)
    stretches = list(itertools.pairwise(edges))

    def mean(values: np.ndarray) -> list:
        return np.round([values[a:b].mean(0) for a, b in stretches], 4).tolist()

    kept = run.series
    record = {"step": edges[1:].tolist(), "training_loss": mean(kept.cross_entropy)}
    if run.cfg.moe is not None:
        load = np.stack([kept.load[a:b].sum(0) for a, b in stretches])
        wished = kept.wished.sum(-1)
        record |= {
            "share": np.round(metrics.share(load), 4).tolist(),
            "drop_rate": mean(kept.dropped / np.maximum(wished, 1)),
            "decisiveness": mean(kept.decisiveness),
            "gate_entropy": mean(kept.entropy),
        }
    return record


def mean(runs: list[dict[str, Any]], key: str) -> float:
    """Average a number, or lists of numbers, over runs."""
    return float(np.mean([run[key] for run in runs]))


def provenance(corpus: data.Corpus) -> dict[str, Any]:
    """Tell which text and which versions a record was made with."""
    return {
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "train": len(corpus.train),
            "validation": len(corpus.validation),
        },
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }


def training_record(run: loop.Run, references: dict[str, float]) -> dict[str, Any]:
    """Describe a finished run: settings, losses beside the n-gram references, and its series."""
    return {
        "study": "training",
        "config": config.to_dict(run.cfg),
        "training": config.to_dict(run.training),
        **provenance(run.corpus),
        "references": references,
        "steps": run.step,
        "seconds": round(run.seconds, 1),
        "validation_loss": run.evaluations[-1]["loss"],
        "evaluations": run.evaluations,
        "series": series(run),
    }
