"""The training loop: a run that can be stopped at any step and goes on bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import reprlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_numpy import config, machine, progress, tree
from moe_numpy.backend import to_device, to_host, to_host_together
from moe_numpy.config import ModelConfig, TrainingConfig, rules
from moe_numpy.moe import balance
from moe_numpy.training import checkpoint, data, optimizer, shards, team
from moe_numpy.transformer import model

MANY_EXPERTS = 64  # so many that threads had better share out the experts of a layer


class Series(NamedTuple):
    """What every step left behind: one row a step; layers are the MoE layers only.

    cross_entropy, aux, rate, norm     (steps,): nats per token, weighted balance terms, learning
                                       rate, gradient norm before clipping
    wished, load                       (steps, layers, E): choices before and after the limits
    dropped, decisiveness, entropy     (steps, layers): choices without a place, mean largest
                                       probability, mean entropy of a token's probabilities in nats
    """

    cross_entropy: np.ndarray
    aux: np.ndarray
    rate: np.ndarray
    norm: np.ndarray
    wished: np.ndarray
    load: np.ndarray
    dropped: np.ndarray
    decisiveness: np.ndarray
    entropy: np.ndarray


class Evaluation(NamedTuple):
    """A pass over the validation split: no noise, no limits.

    loss is in nats per token; wished (layers, E) counts the choices of the clean router and
    decisiveness (layers,) is its mean largest probability.
    """

    loss: float
    wished: np.ndarray
    decisiveness: np.ndarray


@dataclasses.dataclass
class Run:
    """A training run in progress: `step` counts the steps that are done, `seconds` their time."""

    cfg: ModelConfig
    training: TrainingConfig
    corpus: data.Corpus
    params: model.ModelParams
    state: optimizer.OptimizerState
    data_rng: np.random.Generator
    noise_rng: np.random.Generator
    series: Series
    step: int = 0
    evaluations: list[dict] = dataclasses.field(default_factory=list)
    settings: dict = dataclasses.field(default_factory=dict)  # of the caller, kept with the run
    seconds: float = 0.0


def new_run(
    corpus: data.Corpus, cfg: ModelConfig, training: TrainingConfig, dtype: str = "float32"
) -> Run:
    """Draw the parameters and set everything to its start.

    The seed spawns three generators, for the parameters, the data order and the noise: switching
    the noise off changes neither of the others.

    Raises
    ------
    ValueError
        if the corpus is too short for one window, its alphabet is not the model's vocabulary, or
        the model is not causal.
    """
    data.require_length(corpus, cfg.context)
    if not cfg.causal:
        kind = type(cfg.moe.selection).__name__ if cfg.moe and cfg.moe.selection else "attention"
        raise ValueError(
            f"new_run: a model that predicts the next token must be causal, got causal=False: its "
            f"{kind} looks at the whole sequence and has seen that token. Train it as an encoder."
        )
    if corpus.vocab_size != cfg.vocab_size:
        raise ValueError(
            f"new_run: vocab_size must be that of the corpus ({corpus.vocab_size}), "
            f"got {cfg.vocab_size}. Build the model for this corpus."
        )
    init_rng, data_rng, noise_rng = np.random.default_rng(training.seed).spawn(3)
    params = model.init_model(init_rng, cfg, dtype)
    state = optimizer.init_state(params, training.optimizer)
    series = _empty_series(cfg, training.steps)
    return Run(cfg, training, corpus, params, state, data_rng, noise_rng, series)


def train(
    run: Run,
    path: str | Path | None = None,
    save_every: int = 100,
    evaluate_every: int | None = None,
    show_progress: bool = True,
    on_step: Callable[[Run], None] | None = None,
    threads: int | None = None,
    processes: int = 1,
) -> None:
    """Take all steps that are left, with a progress bar.

    Parameters
    ----------
    path : where to write checkpoints: at the start, every `save_every` steps, and at the end;
        None for none.
    evaluate_every : steps between evaluations; None for a quarter of the run. The end is always
        evaluated.
    on_step : called with the run after every step.
    threads : how many share out the shards of a step or, if there is just one shard, its many
        experts, if threadpoolctl is there to keep them apart; None for one per core. It changes no
        bit. Where there is nothing to share out, the matrix products have threads of their own,
        whose number the library chooses and which shows in last digits.
    processes : how many share out the shards instead, if more than one (`team`): faster, as they
        share no Python, on Linux alone. The arrays of the run move to memory that they share:
        look for them in `run` again. It changes no bit either.

    Raises
    ------
    ValueError
        if the loss or the gradient is no longer finite; the last checkpoint stays as it is. Or if
        a number is not positive, there are more processes than shards, or processes cannot share
        memory here.
    ChildProcessError
        if another process ended before its answer.
    KeyboardInterrupt
        after Ctrl-C, once the step in progress is complete and the checkpoint is written.
    """
    counts = {"save_every": save_every, "processes": processes}
    optional = {"evaluate_every": evaluate_every, "threads": threads}
    counts |= {name: count for name, count in optional.items() if count is not None}
    for name, count in counts.items():
        rules.whole_number("train", name, count, 1)
    if processes > 1:
        team.require_possible(run.training.shards, processes)
    every = evaluate_every or max(1, run.training.steps // 4)
    started = time.perf_counter() - run.seconds
    if path is not None and run.step == 0:
        save_run(path, run)
    steps_bar = progress.bar(run.training.steps, "train", "step", run.step, show_progress)
    what_matters_is_checked = np.errstate(over="ignore", invalid="ignore")
    machine.keep_memory()
    threads = _threads(run, threads or machine.cores()) if processes == 1 else 0
    with (
        what_matters_is_checked,
        steps_bar as bar,
        _deferred_interrupt() as interrupted,  # before the forks, in which Python would lose it
        members(run, processes) as crew,
        machine.workers(threads),
    ):
        while run.step < run.training.steps:
            take_step(run, crew)
            done = run.step == run.training.steps
            if done or run.step % every == 0:
                _evaluate_now(run)
            run.seconds = time.perf_counter() - started
            if path is not None and (done or run.step % save_every == 0):
                _save_finite(path, run)
            bar.set_postfix_str(_postfix(run), refresh=False)
            bar.update()
            if on_step is not None:
                on_step(run)
            if interrupted:
                if path is not None:
                    _save_finite(path, run)
                raise KeyboardInterrupt


@contextlib.contextmanager
def members(run: Run, processes: int) -> Iterator[team.Team | None]:
    """Let as many processes take the steps of `run` within the block; None for one alone."""
    if processes == 1:
        yield None
        return
    crew = team.Team(run.params, run.state, run.cfg, run.training, processes)
    run.params, run.state = crew.params, crew.state  # before the members inherit the former arrays
    with crew:
        yield crew


def evaluate(
    params: model.ModelParams, cfg: ModelConfig, ids: np.ndarray, batch: int = 32
) -> Evaluation:
    """Measure the loss over consecutive windows of `ids`, without noise and without limits.

    Raises     ValueError if `batch`, the windows that are computed together, is not positive, or
               there is not one whole window
    """
    rules.whole_number("evaluate", "batch", batch, 1)
    cfg = dataclasses.replace(cfg.evaluation(), recompute=True)  # no layer's cache is kept
    token_WT, target_WT = data.windows(ids, cfg.context)  # W windows of T tokens
    experts = cfg.moe.num_experts if cfg.moe else 0
    total, wished = 0.0, np.zeros((cfg.moe_count, experts))
    decisive = np.zeros(cfg.moe_count)
    for start in range(0, len(token_WT), batch):
        token_BT = to_device(token_WT[start : start + batch])
        target_BT = to_device(target_WT[start : start + batch])
        _, report, _ = model.loss_forward(token_BT, target_BT, params, cfg)
        report = tree.from_leaves(report, to_host_together(tree.leaves(report)))
        total += float(report.cross_entropy) * len(token_BT)
        if report.layers:
            wished = wished + _stack(report, "wished_E")
            decisive = decisive + _stack(report, "decisiveness") * len(token_BT)
    return Evaluation(total / len(token_WT), wished.astype(int), decisive / len(token_WT))


def save_run(path: str | Path, run: Run) -> None:
    """Write the whole run into one checkpoint, atomically."""
    meta = {
        "config": config.to_dict(run.cfg),
        "training": config.to_dict(run.training),
        "corpus": {
            "name": run.corpus.name,
            "sha256": run.corpus.sha256,
            "train": len(run.corpus.train),
        },
        "alphabet": run.corpus.alphabet,
        "dtype": str(run.params.token_VC.dtype),
        "step": run.step,
        "seconds": run.seconds,
        "evaluations": run.evaluations,
        "settings": run.settings,
        "data_rng": run.data_rng.bit_generator.state,
        "noise_rng": run.noise_rng.bit_generator.state,
    }
    trees = {"params": run.params, "state": run.state, "series": run.series}
    checkpoint.save_checkpoint(path, trees, meta)


def load_run(path: str | Path, corpus: data.Corpus) -> Run:
    """Read a run back; it goes on exactly as it would have without the stop.

    Raises
    ------
    ValueError
        if the file is no checkpoint, or `corpus` is not the text that the run was trained on.
    """
    arrays, meta = checkpoint.load_checkpoint(path)
    with checkpoint.whole("load_run", path):
        sha256 = meta["corpus"]["sha256"]
        if sha256 != corpus.sha256:
            advice = "Give the same file, or start a new run."
            if corpus.name == meta["corpus"]["name"] == data.BUILT_IN:
                advice = "It is made of Python's own files: go on with the Python that began it."
            raise ValueError(
                f"load_run: the text must be the one that the run was started on (sha256 "
                f"{sha256[:12]}...), got {corpus.sha256[:12]}.... {advice}"
            )
        here = len(corpus.train)
        cut = meta["corpus"].get("train", here)  # which older checkpoints do not know
        rule = f"the text must be cut as it was: {cut} characters to train on"
        rules.require(cut == here, "load_run", rule, here, "Give the same share for validation.")
        cfg, training = config.from_dict(meta["config"]), config.from_dict(meta["training"])
        run = new_run(corpus, cfg, training, meta["dtype"])
        for name in ("params", "state"):
            like = getattr(run, name)
            tree.fill(like, checkpoint.restore(like, arrays, name))
        series = checkpoint.restore(run.series, arrays, "series")
        run.series = tree.map(to_host, series)
        for name in ("data_rng", "noise_rng"):
            try:
                getattr(run, name).bit_generator.state = meta[name]
            except ValueError as error:  # of another generator: as good as none
                raise KeyError(f"{name}: {error}") from None
        run.step, run.evaluations, run.settings = (
            meta[name] for name in ("step", "evaluations", "settings")
        )
        run.seconds = meta.get("seconds", 0.0)  # of which older checkpoints do not know
        rules.not_negative("load_run", "seconds", run.seconds)
        rules.whole_number("load_run", "step", run.step, 0)
        rule, most = "step must be at most that of the last", training.steps
        advice = "Use an older copy."
        rules.require(run.step <= most, "load_run", f"{rule} ({most})", run.step, advice)
        fine = isinstance(run.evaluations, list) and all(map(_is_evaluation, run.evaluations))
        fine = fine and (run.step < most or run.evaluations != [])
        rule, came = "evaluations must be a list, with that of the end", run.evaluations
        rules.require(fine, "load_run", rule, reprlib.repr(came), "Use an older copy.")
    return run


def load_model(path: str | Path) -> tuple[model.ModelParams, ModelConfig, str]:
    """Read the parameters, the configuration and the alphabet of a checkpoint.

    Raises     ValueError if the file is no checkpoint, or its parts do not fit together
    """
    arrays, meta = checkpoint.load_checkpoint(path, only="params.")
    with checkpoint.whole("load_model", path):
        cfg, alphabet = config.from_dict(meta["config"]), str(meta["alphabet"])
        rule = f"the alphabet must have {cfg.vocab_size} characters"
        fine = len(alphabet) == cfg.vocab_size
        rules.require(fine, "load_model", rule, len(alphabet), "Use an older copy.")
        params = model.init_model(np.random.default_rng(0), cfg, meta["dtype"])
        tree.fill(params, checkpoint.restore(params, arrays, "params"))
    return params, cfg, alphabet


def take_step(run: Run, crew: team.Team | None = None) -> None:
    """Take one training step and note what it did.

    The processes of `crew` share it out, or else the threads of `machine.workers`.
    """
    cfg, training, step = run.cfg, run.training, run.step
    if crew is not None and (run.params is not crew.params or run.state is not crew.state):
        raise ValueError(
            "take_step: with processes the run must keep the arrays that they share, got others. "
            "Change them in place (tree.fill)."
        )
    dtype = run.params.token_VC.dtype
    token_BT, target_BT = data.sample_batch(
        run.data_rng, run.corpus.train, training.batch, cfg.context
    )
    noise = model.draw_noise(run.noise_rng, cfg, token_BT.size, dtype)
    token_BT, target_BT = to_device(token_BT), to_device(target_BT)
    if crew is None:
        setting = (cfg, noise, training.smoothing, training.shards)
        report, grads = shards.gradients(token_BT, target_BT, run.params, *setting)
        norm = optimizer.norm(grads)
    else:
        report, norm = crew.gradients(token_BT, target_BT, noise)
    *facts, norm = to_host_together([*tree.leaves(report), norm])
    report, norm = tree.from_leaves(report, facts), float(norm)
    _require_finite("loss", float(report.cross_entropy + report.aux), run, step + 1)
    _require_finite("gradient norm", norm, run, step + 1)
    scale = 1.0 if training.clip is None else min(1.0, training.clip / max(norm, 1e-12))
    rate = training.rate_at(step)
    if crew is None:
        optimizer.update(run.params, grads, run.state, training.optimizer, step, rate, scale)
    else:
        crew.update(step, rate, scale)
    if cfg.moe is not None and cfg.moe.bias_rate:
        _move_biases(run, report)
    _note(run.series, step, report, rate, norm)
    run.step += 1


def _threads(run: Run, most: int) -> int:
    """One for each shard. Of a single shard all, if most of its work is that of many experts.

    None (0) where there is nothing to share out.
    """
    moe, shards = run.cfg.moe, run.training.shards
    if shards > 1:
        return min(most, shards)
    large = moe is not None and run.cfg.width * moe.hidden >= machine.WORTH_A_THREAD
    return most if large and moe.num_experts >= MANY_EXPERTS else 0


def _move_biases(run: Run, report: model.LossReport) -> None:
    feeds = [block.feed for layer, block in enumerate(run.params.blocks) if run.cfg.is_moe(layer)]
    for feed, layer in zip(feeds, report.layers, strict=True):
        bias_E, load_E = feed.router.bias_E, to_device(layer.wished_E)
        bias_E[:] = balance.updated_bias(bias_E, load_E, run.cfg.moe.bias_rate)


def _note(series: Series, step: int, report: model.LossReport, rate: float, norm: float) -> None:
    series.cross_entropy[step] = report.cross_entropy
    series.aux[step] = report.aux
    series.rate[step] = rate
    series.norm[step] = norm
    if report.layers:
        series.wished[step] = _stack(report, "wished_E")
        series.load[step] = _stack(report, "load_E")
        series.dropped[step] = _stack(report, "dropped")
        series.decisiveness[step] = _stack(report, "decisiveness")
        series.entropy[step] = _stack(report, "gate_entropy")


def _stack(report: model.LossReport, field: str) -> np.ndarray:
    return np.stack([getattr(layer, field) for layer in report.layers])


def _empty_series(cfg: ModelConfig, steps: int) -> Series:
    layers, experts = cfg.moe_count, cfg.moe.num_experts if cfg.moe else 0
    one, per_layer = np.full(steps, np.nan), np.full((steps, layers), np.nan)
    counts = np.zeros((steps, layers, experts), np.int64)
    return Series(
        cross_entropy=one.copy(),
        aux=one.copy(),
        rate=one.copy(),
        norm=one.copy(),
        wished=counts.copy(),
        load=counts.copy(),
        dropped=np.zeros((steps, layers), np.int64),
        decisiveness=per_layer.copy(),
        entropy=per_layer.copy(),
    )


def _evaluate_now(run: Run) -> None:
    found = evaluate(run.params, run.cfg, run.corpus.validation)
    _require_finite("validation loss", found.loss, run, run.step)
    run.evaluations.append(
        {
            "step": run.step,
            "loss": found.loss,
            "wished": found.wished.tolist(),
            "decisiveness": found.decisiveness.tolist(),
        }
    )


def _is_evaluation(found: Any) -> bool:
    whole = isinstance(found, dict) and {"step", *Evaluation._fields} <= found.keys()
    return whole and isinstance(found["step"], int) and isinstance(found["loss"], float)


def _save_finite(path: str | Path, run: Run) -> None:
    """Save the run unless its weights blew up: the last good checkpoint is worth more."""
    norm = float(to_host_together([optimizer.norm(run.params)])[0])
    _require_finite("norm of the weights", norm, run, run.step)
    save_run(path, run)


def _require_finite(what: str, value: float, run: Run, step: int) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"train: the {what} must stay finite, got {value} at step {step} of "
            f"{run.training.steps}. Lower the learning rate, or clip the gradients."
        )


def _postfix(run: Run) -> str:
    text = f"loss {run.series.cross_entropy[run.step - 1]:.3f}"
    if run.evaluations:
        text += f", validation {run.evaluations[-1]['loss']:.3f}"
    return text


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Note Ctrl-C in a list instead of raising in the middle of a step; a second one raises."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(number: int, _frame: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
