"""The settings study: one MoE layer on two tasks whose right division of labor is known.

Every cluster of inputs has a target function, a job, of its own (`training.clusters`). In the task
"eight jobs" there are as many clusters as experts; in "one job" there is a single cluster and
nothing to divide. The layer alone is the whole model, y = MoE(x), so a step takes a millisecond
and each expert can be followed: its share of the batch, the size of its gradient, and the loss of
the tokens it served. N counts the inputs of a batch, called tokens as everywhere, and C the values
of inputs and targets.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_numpy import config, progress
from moe_numpy.config import AdamW, Capacity, GaussianNoise, MoEConfig, SwitchLoss
from moe_numpy.lab import collapse, metrics
from moe_numpy.moe import dispatch, layer, router
from moe_numpy.moe.report import MoEReport
from moe_numpy.training import clusters, optimizer

FIGURES = Path(__file__).parents[2] / "figures"  # the committed records


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What all runs share."""

    num_experts: int = 8
    width: int = 16
    hidden: int = 16
    batch: int = 128
    steps: int = 600
    rate: float = 3e-3
    test_tokens: int = 4000
    seeds: tuple[int, ...] = tuple(range(8))

    def tasks(self) -> dict[str, dict[str, float]]:
        """Name the tasks: how many clusters, and the spread of each."""
        return {
            "one job": {"clusters": 1, "spread": 1.0},
            "eight jobs": {"clusters": 8, "spread": 0.5},
        }

    def controls(self) -> dict[str, dict[str, float]]:
        """Name tasks that are not in the record: those above without, or with, a common direction.

        In "one job" all inputs share the direction of their center; in "eight jobs" they do not.
        "Shorter" and "longer" leave the directions as they are, and have inputs of the length
        (root mean square) of the centered and of the shifted ones. The last differs from the
        first in the spread alone.
        """
        one, eight = self.tasks().values()
        centered = one | {"center_scale": 0.0}
        shorter = one["spread"] / math.hypot(1, one["spread"])  # of centers of length one
        longer = math.hypot(1, 1, eight["spread"]) / math.hypot(1, eight["spread"])
        return {
            "one job, centered": centered,
            "one job, shorter": _scaled(one, shorter),
            "eight jobs, shifted": eight | {"shift": 1.0},
            "eight jobs, longer": _scaled(eight, longer),
            "one job, centered, spread 0.5": centered | {"spread": 0.5},
        }

    def settings(self) -> dict[str, MoEConfig]:
        """Name the layers that are compared."""
        bare = MoEConfig(num_experts=self.num_experts, top_k=1, hidden=self.hidden)
        dead_router = dataclasses.replace(bare, gate_weights="renormalized")
        switch = (SwitchLoss(weight=0.1),)
        limit = Capacity(factor=1.25, overflow="next_best")
        return {
            "top-1 raw": bare,
            "raw + noise": dataclasses.replace(bare, noise=GaussianNoise(std=1.0)),
            "raw + capacity": dataclasses.replace(bare, capacity=limit),
            "raw + Switch": dataclasses.replace(bare, balance=switch),
            "top-1 renorm.": dead_router,
            "renorm. + Switch": dataclasses.replace(dead_router, balance=switch),
            "top-2": dataclasses.replace(bare, top_k=2),
            "all experts": dataclasses.replace(bare, top_k=self.num_experts),
            "one expert": dataclasses.replace(bare, num_experts=1),
        }

    @property
    def definition(self) -> str:
        """Say what collapse means here."""
        return collapse.define("run", self.num_experts)


def _scaled(task: dict[str, float], factor: float) -> dict[str, float]:
    return task | {"center_scale": factor, "spread": factor * task["spread"]}


class Trace(NamedTuple):
    """What every step left behind, expert by expert: arrays (steps, E).

    load           choices that the expert served
    gradient_norm  Euclidean norm of the gradient of all its weights
    loss           mean squared error of the tokens it served; NaN where it served none
    pull           share of those tokens for which a larger gate lowers the loss (their gate's
                   gradient is negative); NaN where it served none
    decisiveness   (steps,): mean largest probability of a token
    """

    load: np.ndarray
    gradient_norm: np.ndarray
    loss: np.ndarray
    pull: np.ndarray
    decisiveness: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """Shares of the load, rows that sum to one."""
        return metrics.share(self.load)


class Result(NamedTuple):
    """A finished run: its trace, its parameters, and what the clean router does on new tokens.

    wished        (E,): choices of the clean router, without noise and limits
    decisiveness  its mean largest probability
    firsts        (clusters, E): how many tokens of each cluster have each expert as first choice
    information   mutual information of true cluster and first choice, in nats
    loss          mean squared error; about 1 for the answer zero, since targets have variance 1
    """

    trace: Trace
    params: layer.MoEParams
    wished: np.ndarray
    decisiveness: float
    firsts: np.ndarray
    information: float
    loss: float


def follow(
    moe: MoEConfig,
    task: str,
    seed: int,
    steps: int = 100,
    rate: float | None = None,
    study: Study | None = None,
) -> Result:
    """Train one layer and note every expert at every step.

    The seed spawns four generators, for the task, the parameters, the data and the noise: all
    settings of a seed meet the same task and the same tokens.

    Parameters
    ----------
    task : "one job" or "eight jobs", or a control of `Study.controls`.
    steps : of AdamW without weight decay.
    rate : the learning rate, constant; None for that of the study.
    study : sizes of layer and batch; None for the defaults of `Study`.
    """
    study = study or Study()
    rate = study.rate if rate is None else rate
    task_rng, init_rng, data_rng, noise_rng = np.random.default_rng(seed).spawn(4)
    jobs = clusters.cluster_task(
        task_rng,
        width_in=study.width,
        width_out=study.width,
        **(study.tasks() | study.controls())[task],
    )
    params = layer.init_moe(init_rng, moe, study.width, "float32")
    adam = AdamW(weight_decay=0.0)
    state = optimizer.init_state(params, adam)
    rows = []
    for step in range(steps):
        x_NC, target_NC, _ = clusters.sample_clusters(data_rng, jobs, study.batch)
        noise = router.draw_noise(noise_rng, moe, study.batch, study.width, "float32")
        y_NC, _, report, cache = layer.moe_forward(x_NC, params, moe, noise)
        error_NC = y_NC - target_NC
        dy_NC = 2 * error_NC / error_NC.size
        grads = layer.moe_backward(dy_NC, np.float32(1.0), cache)[1]
        rows.append(_row(report, cache, (error_NC**2).mean(1), dy_NC, grads.experts))
        optimizer.update(params, grads, state, adam, step, rate)
    return Result(_trace(rows), params, *_test(jobs, params, moe, data_rng, study))


def _row(
    report: MoEReport, cache: tuple, loss_N: np.ndarray, dy_NC: np.ndarray, grads: Any
) -> tuple:
    """Describe one step: who served whom is read from the plan that combine kept."""
    _, (*_, combine_cache), *_ = cache
    *_, plan = combine_cache
    _, dgate_NK = dispatch.combine_backward(dy_NC, combine_cache)
    K, E = dgate_NK.shape[1], report.load_E.size
    expert_R = np.repeat(np.arange(E), report.load_E)
    count_E = np.where(report.load_E > 0, report.load_E, np.nan)

    def mean_by_expert(values_R: np.ndarray) -> np.ndarray:
        return np.bincount(expert_R, weights=values_R, minlength=E) / count_E

    squares_E = sum((g**2).reshape(E, -1).sum(1) for g in grads if g is not None)
    return (
        report.load_E,
        np.sqrt(squares_E),
        mean_by_expert(loss_N[plan.choice_R // K]),
        mean_by_expert(dgate_NK.reshape(-1)[plan.choice_R] < 0),
        report.decisiveness,
    )


def _trace(rows: list[tuple]) -> Trace:
    return Trace(*(np.array(column) for column in zip(*rows, strict=True)))


def _test(
    jobs: clusters.ClusterTask,
    params: layer.MoEParams,
    moe: MoEConfig,
    rng: np.random.Generator,
    study: Study,
) -> tuple[np.ndarray, float, np.ndarray, float, float]:
    x_NC, target_NC, cluster_N = clusters.sample_clusters(rng, jobs, study.test_tokens)
    y_NC, _, report, _ = layer.moe_forward(x_NC, params, moe.evaluation())
    first_N = router.top_k(x_NC @ params.router.w_CE, 1)[:, 0]
    firsts = np.zeros((len(jobs.center_EC), moe.num_experts), int)
    np.add.at(firsts, (cluster_N, first_N), 1)
    loss = float(((y_NC - target_NC) ** 2).mean())
    decisiveness = float(report.decisiveness)
    return report.wished_E, decisiveness, firsts, mutual_information(firsts), loss


def mutual_information(table: np.ndarray) -> float:
    """Tell how much the column says about the row, in nats.

        sum_ij p_ij log(p_ij / (p_i p_j))

    0 if they are independent, log of the number of rows if the column gives the row away.

    Parameters
    ----------
    table : array (rows, columns)
        How often each pair was seen.
    """
    p = np.asarray(table, float) / np.sum(table)
    independent = p.sum(1, keepdims=True) * p.sum(0)
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / independent[seen])).sum())


def measure(result: Result, seed: int) -> dict[str, Any]:
    """Compute the metrics of a finished run: lists with one entry, for the one layer there is."""
    load = result.trace.load
    window = max(1, round(collapse.WINDOW * len(load)))
    load_E = load[-window:].sum(0)
    effective = float(metrics.effective_experts(load_E))
    return {
        "seed": seed,
        "collapsed": [bool(effective < load_E.size / 2)],
        "effective_experts": [effective],
        "effective_experts_clean": [float(metrics.effective_experts(result.wished))],
        "dead_experts": [int(metrics.dead_experts(load_E, collapse.DEAD))],
        "dead_experts_clean": [int(metrics.dead_experts(result.wished, collapse.DEAD))],
        "share": [np.round(metrics.share(load_E), 4).tolist()],
        "share_clean": [np.round(metrics.share(result.wished), 4).tolist()],
        "decisiveness_clean": [result.decisiveness],
        "information_clean": [result.information],
        "validation_loss": result.loss,
    }


def run_settings(study: Study | None = None, show_progress: bool = True) -> dict[str, Any]:
    """Train every setting on every task with every seed, and return the record, plain JSON data."""
    study = study or Study()
    started = time.perf_counter()
    pairs = [(task, name) for task in study.tasks() for name in study.settings()]
    conditions = []
    with progress.bar(len(pairs) * len(study.seeds), "settings", "run", show=show_progress) as bar:
        for task, name in pairs:
            moe, runs = study.settings()[name], []
            for seed in study.seeds:
                runs.append(measure(follow(moe, task, seed, study.steps, study=study), seed))
                bar.update()
            conditions.append(
                {"name": name, "task": task, "config": config.to_dict(moe), "runs": runs}
            )
    return {
        "study": "collapse_settings",
        "definition": study.definition,
        "num_experts": study.num_experts,
        "settings": dataclasses.asdict(study) | {"seeds": list(study.seeds)},
        "tasks": study.tasks(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "seconds": round(time.perf_counter() - started, 1),
        "conditions": conditions,
    }


def of_task(record: dict[str, Any], task: str) -> dict[str, Any]:
    """Return the part of the settings record that belongs to one task, as a record of its own."""
    return record | {"conditions": [c for c in record["conditions"] if c["task"] == task]}


def first_steps(
    record: dict[str, Any], setting: str, steps: int = 20
) -> tuple[list[np.ndarray], list[bool]]:
    """Repeat the start of every recorded run of a setting, on all tasks.

    Returns
    -------
    early : list of arrays (steps, E)
        the shares of the first steps.
    collapsed : list of bool
        how the record says that each of these runs ended.
    """
    sizes = record["settings"] | {"seeds": tuple(record["settings"]["seeds"])}
    study = Study(**sizes)
    early, collapsed = [], []
    for condition in record["conditions"]:
        if condition["name"] == setting:
            moe = config.from_dict(condition["config"])
            for run in condition["runs"]:
                result = follow(moe, condition["task"], run["seed"], steps, study=study)
                early.append(result.trace.share)
                collapsed.append(run["collapsed"][0])
    return early, collapsed


def table(record: dict[str, Any]) -> str:
    """Set the settings side by side: means over the seeds, and the spread of the loss."""
    lines = []
    for task in record["tasks"]:
        lines.append(
            f"{task:18}{'collapsed':>10}{'effective':>11}{'dead':>6}{'decisive':>10}{'loss':>18}"
        )
        for condition in of_task(record, task)["conditions"]:
            runs = condition["runs"]
            names = ("effective_experts", "dead_experts", "decisiveness_clean", "validation_loss")
            effective, dead, decisive, loss = (np.ravel([r[n] for r in runs]) for n in names)
            collapsed = sum(run["collapsed"][0] for run in runs)
            if condition["config"]["num_experts"] == 1:
                counts = f"{'-':>10}{'-':>11}{'-':>6}{'-':>10}"  # nothing to choose
            else:
                counts = (
                    f"{collapsed:>5} of {len(runs)}{effective.mean():>11.1f}{dead.mean():>6.1f}"
                )
                counts += f"{decisive.mean():>10.2f}"
            spread = f"{loss.mean():.3f} +- {loss.std():.3f}"
            lines.append(f"  {condition['name']:16}{counts}{spread:>18}")
        lines.append("")
    return "\n".join(lines[:-1])


def compare(record: dict[str, Any], name: str, reference: str) -> str:
    """Say how the loss of one condition differs from that of another, seed by seed."""
    loss = {c["name"]: [r["validation_loss"] for r in c["runs"]] for c in record["conditions"]}
    difference = np.subtract(loss[name], loss[reference])
    worse = int((difference > 0).sum())
    return (
        f"{name:17} against {reference!r}: loss {difference.mean():+.3f} on average, "
        f"higher in {worse} of {difference.size} seeds"
    )
