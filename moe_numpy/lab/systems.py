"""The systems of the literature side by side: every preset's likeness, trained on the same text.

All are trained alike (same steps, batches, learning rate), whatever their authors used, at sizes
where the order of the losses says little about the order at scale. What the table shows is that
each routing trains, how evenly it loads its experts, and what it turns away.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

from moe_numpy import config, presets, tree
from moe_numpy.config import TrainingConfig
from moe_numpy.lab import collapse, pool, records
from moe_numpy.training import data, loop, ngram

SHOWN = ("validation_loss", "effective_experts", "max_over_mean", "decisiveness", "drop_rate")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Which systems are trained, and how."""

    names: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = TrainingConfig().steps

    def systems(self) -> list[str]:
        """List the systems that predict the next token."""
        wanted = self.names or presets.names()
        return [name for name in wanted if presets.tiny(name).causal]

    def training(self, seed: int) -> TrainingConfig:
        """Train every run alike."""
        return TrainingConfig(steps=self.steps, warmup=min(100, self.steps // 6), seed=seed)


def run_systems(
    study: Study, processes: int | None = None, show_progress: bool = True
) -> dict[str, Any]:
    """Train every system with every seed and return the record.

    Returns
    -------
    dict
        plain JSON data: settings, versions, n-gram references, and for each system its
        configuration, parameters, and runs with their loss and load. A list has one entry for each
        MoE layer.
    """
    started = time.perf_counter()
    corpus = data.default_corpus()
    jobs = [(study, name, seed) for seed in study.seeds for name in study.systems()]
    found = pool.run_all("systems", run_one, jobs, study.steps, processes, show_progress)
    systems = []
    for name in study.systems():
        runs = [found[study, name, seed] for seed in study.seeds]
        cfg = presets.tiny(name, corpus.vocab_size)
        systems.append(
            {
                "name": name,
                "year": presets.get(name).year,
                "config": config.to_dict(cfg),
                "num_experts": cfg.moe.num_experts,
                "parameters": runs[0]["parameters"],
                "runs": [{k: v for k, v in run.items() if k != "parameters"} for run in runs],
            }
        )
    return {
        "study": "systems",
        "settings": {"seeds": list(study.seeds), "steps": study.steps},
        "training": config.to_dict(study.training(study.seeds[0])),
        **records.provenance(corpus),
        "references": ngram.reference_losses(corpus.train, corpus.validation, corpus.vocab_size),
        "seconds": round(time.perf_counter() - started, 1),
        "systems": systems,
    }


def run_one(study: Study, name: str, seed: int) -> dict[str, Any]:
    """Train one system and measure it."""
    corpus = data.default_corpus()
    run = loop.new_run(corpus, presets.tiny(name, corpus.vocab_size), study.training(seed))
    started = time.perf_counter()
    loop.train(run, evaluate_every=study.steps, show_progress=False, on_step=pool.count_step)
    measured = collapse.measure(run)
    return {
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": tree.size(run.params),
        **{key: measured[key] for key in SHOWN},
    }


def table(record: dict[str, Any]) -> str:
    """Set the systems side by side: every seed's loss, and means of what routing did."""
    seeds = record["settings"]["seeds"]
    losses = " ".join(f"{f'seed {seed}':>7}" for seed in seeds)
    lines = [
        f"{'validation loss (nats per character)':>{26 + 8 * len(seeds)}}",
        f"{'':26}{losses}{'effective experts':>21}{'busiest':>9}{'drops':>8}{'decisive':>10}",
    ]
    for system in sorted(record["systems"], key=lambda s: records.mean(s["runs"], SHOWN[0])):
        runs, E = system["runs"], system["num_experts"]
        mean = functools.partial(records.mean, runs)
        losses = " ".join(f"{run['validation_loss']:7.3f}" for run in runs)
        lines.append(
            f"{system['name']:26}{losses}{mean('effective_experts'):>14.1f} of {E:<3}"
            f"{mean('max_over_mean'):>8.1f}x{mean('drop_rate'):>8.1%}{mean('decisiveness'):>10.2f}"
        )
    references = record["references"]
    lines.append(f"{'2-gram':26}{references['2-gram']:7.3f}")
    return "\n".join(lines)
