"""The collapse study: the same tiny language model with and without cures against collapse.

Every run of a seed starts from the same parameters and sees the same batches; only the cure
differs. Two loads are told apart. The load in training is what the experts were given, after noise
and limits. The clean load is what the router chooses on the validation split when it is asked
without either: it shows what the router has learned.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import numpy as np

from moe_numpy import backend, config
from moe_numpy.config import (
    Capacity,
    LearnedNoise,
    ModelConfig,
    MoEConfig,
    SwitchLoss,
    TrainingConfig,
)
from moe_numpy.lab import metrics, pool, records
from moe_numpy.training import data, loop, ngram

WINDOW = 0.1  # the end of training: the last tenth of the steps
DEAD = 0.01  # an expert below this share of the load is dead


def define(what: str, num_experts: int) -> str:
    """Say what collapse means for `what`: a layer, or a run that has no more than one."""
    return (
        f"A {what} has collapsed if its effective experts, exp(entropy of the load over the last "
        f"{WINDOW:.0%} of the steps), are fewer than half of its {num_experts} experts. "
        f"An expert is dead if its share of that load is below {DEAD:.0%}."
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """The setting that all runs share."""

    num_experts: int = 16
    top_k: int = 1
    hidden: int = 64
    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 64
    batch: int = 12
    steps: int = 250
    rate: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2, 3)

    def conditions(self) -> dict[str, MoEConfig]:
        """Name the MoE layers that are compared."""
        bare = MoEConfig(num_experts=self.num_experts, top_k=self.top_k, hidden=self.hidden)
        noise, limit = LearnedNoise(), Capacity(factor=1.25, overflow="next_best")
        return {
            "no cure": bare,
            "noise": dataclasses.replace(bare, noise=noise),
            "capacity": dataclasses.replace(bare, capacity=limit),
            "noise + capacity": dataclasses.replace(bare, noise=noise, capacity=limit),
            "Switch loss": dataclasses.replace(bare, balance=(SwitchLoss(weight=0.01),)),
        }

    def model(self, moe: MoEConfig, vocab_size: int) -> ModelConfig:
        """Put an MoE layer into every layer of the tiny model."""
        return ModelConfig(
            vocab_size=vocab_size,
            context=self.context,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            moe=moe,
        )

    def training(self, seed: int) -> TrainingConfig:
        """Train every run alike."""
        return TrainingConfig(
            steps=self.steps,
            batch=self.batch,
            rate=self.rate,
            final_rate=self.rate / 10,
            warmup=min(20, self.steps // 10),
            seed=seed,
        )

    @property
    def definition(self) -> str:
        """Say what collapse means here."""
        return define("layer", self.num_experts)


def run_study(
    study: Study,
    processes: int | None = None,
    backend_name: str = "numpy",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train every condition with every seed, in parallel processes, and return the record.

    Parameters
    ----------
    processes : how many runs go on at once; None for one per processor core. Each uses one thread.

    Returns
    -------
    dict
        plain JSON data: definition, settings, versions, n-gram references, and for each condition
        its runs with their metrics and series.
    """
    started = time.perf_counter()
    corpus = data.default_corpus()
    jobs = [
        (study, name, seed, backend_name) for seed in study.seeds for name in study.conditions()
    ]
    runs = pool.run_all("collapse", run_one, jobs, study.steps, processes, show_progress)
    conditions = [
        {
            "name": name,
            "config": config.to_dict(moe),
            "runs": [runs[study, name, seed, backend_name] for seed in study.seeds],
        }
        for name, moe in study.conditions().items()
    ]
    return {
        "study": "collapse",
        "definition": study.definition,
        "num_experts": study.num_experts,
        "settings": dataclasses.asdict(study) | {"seeds": list(study.seeds)},
        **records.provenance(corpus),
        "references": ngram.reference_losses(corpus.train, corpus.validation, corpus.vocab_size),
        "processes": pool.workers_for(processes, len(jobs)),
        "seconds": round(time.perf_counter() - started, 1),
        "conditions": conditions,
    }


def run_one(study: Study, condition: str, seed: int, backend_name: str = "numpy") -> dict[str, Any]:
    """Train one model and measure it."""
    corpus = data.default_corpus()
    cfg = study.model(study.conditions()[condition], corpus.vocab_size)
    with backend.use_backend(backend_name):
        run = loop.new_run(corpus, cfg, study.training(seed))
        loop.train(run, evaluate_every=study.steps, show_progress=False, on_step=pool.count_step)
        return measure(run)


def measure(run: loop.Run) -> dict[str, Any]:
    """Compute the metrics of a finished run: one entry per MoE layer where they are lists."""
    steps = run.training.steps
    window = max(1, round(WINDOW * steps))
    load_LE = run.series.load[-window:].sum(0)
    clean_LE = np.array(run.evaluations[-1]["wished"])
    choices = load_LE.sum() + run.series.dropped[-window:].sum()
    effective = metrics.effective_experts(load_LE)
    return {
        "seed": run.training.seed,
        "collapsed": (effective < run.cfg.moe.num_experts / 2).tolist(),
        "effective_experts": effective.tolist(),
        "effective_experts_clean": metrics.effective_experts(clean_LE).tolist(),
        "dead_experts": metrics.dead_experts(load_LE, DEAD).tolist(),
        "dead_experts_clean": metrics.dead_experts(clean_LE, DEAD).tolist(),
        "share": metrics.share(load_LE).tolist(),
        "share_clean": metrics.share(clean_LE).tolist(),
        "max_over_mean": metrics.max_over_mean(load_LE).tolist(),
        "coefficient_of_variation": metrics.coefficient_of_variation(load_LE).tolist(),
        "decisiveness": run.series.decisiveness[-window:].mean(0).tolist(),
        "decisiveness_clean": run.evaluations[-1]["decisiveness"],
        "drop_rate": float(run.series.dropped[-window:].sum() / choices),
        "validation_loss": run.evaluations[-1]["loss"],
        "series": records.series(run),
    }


def table(record: dict[str, Any]) -> str:
    """Set the conditions side by side: means over seeds and layers, and how many collapsed."""
    lines = [
        f"{'':18}{'effective experts':>19}{'clean router':>14}{'dead':>6}{'drops':>8}"
        f"{'validation':>12}{'collapsed':>11}"
    ]
    for condition in record["conditions"]:
        runs = condition["runs"]
        mean = functools.partial(records.mean, runs)
        collapsed = [layer for run in runs for layer in run["collapsed"]]
        lines.append(
            f"{condition['name']:18}{mean('effective_experts'):>12.1f} of "
            f"{record['num_experts']:<3}{mean('effective_experts_clean'):>14.1f}"
            f"{mean('dead_experts'):>6.1f}{mean('drop_rate'):>8.1%}"
            f"{mean('validation_loss'):>12.3f}{sum(collapsed):>5} of {len(collapsed)}"
        )
    return "\n".join(lines)
