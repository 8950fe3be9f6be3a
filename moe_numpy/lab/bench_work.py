"""What the benchmark runs on our side: a training step, a layer, generation, one product.

With two threads a batch is split into two shards, each in a process of its own where processes can
share memory, as `loop.train` does it. The tokens of a layer are split for two threads with matrix
products of their own; or processes share out the experts of a layer that has many; or, if those are
small, threads meet in each product. Nothing here has a capacity or a balance term, of which each
shard would have its own; so the shards compute the function of the whole batch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moe_numpy import config, machine, tree
from moe_numpy.config import AdamW, ModelConfig, MoEConfig, TrainingConfig
from moe_numpy.lab import bench_products, metrics
from moe_numpy.lab.bench_process import COMPARED_STEPS, Work, sketch
from moe_numpy.moe import layer, mlp
from moe_numpy.training import data, expert_parallel, loop, optimizer, shards
from moe_numpy.transformer import generation, model

BATCHES = 64  # that the other sides are given, to take in turns
_until_the_end = contextlib.ExitStack()  # keeps the threads of this process's work


def build(spec: dict[str, Any]) -> Work:
    """Build the work that a specification names."""
    works = {"product": _product, "step": _step, "layer": _layer, "mlp": _mlp}
    return (works | {"update": _update, "generate": _generate})[spec["work"]](spec)


def text(vocab_size: int, length: int = 100_000) -> data.Corpus:
    """Invent a text of equally likely characters: what it says does not change the time."""
    ids = np.random.default_rng(0).integers(0, vocab_size, length).astype(np.uint16)
    alphabet = "".join(chr(48 + i) for i in range(vocab_size))
    return data.Corpus(name="dice", alphabet=alphabet, train=ids, validation=ids, sha256="dice")


def training(steps: int = 20_000, shards: int = 1) -> TrainingConfig:
    """Configure the run of the benchmark: every step shall do the same.

    So the rate is constant, and small: without a balance term larger steps soon send all tokens to
    two of eight experts, and a race of so few would say little about eight.
    """
    constant = {"warmup": 0, "rate": 1e-5, "final_rate": 1e-5}
    return TrainingConfig(steps=steps, batch=12, shards=shards, **constant)


def _settle(threads: int) -> None:
    """Do once what `loop.train` does at its start: keep memory, and start threads."""
    machine.keep_memory()
    _until_the_end.enter_context(machine.workers(threads if threads > 1 else 0))


def _product(spec: dict[str, Any]) -> Work:
    """Multiply two matrices, on as many threads as the library has."""
    a, b = np.random.default_rng(0).random((2, spec["size"], spec["size"]), np.float32)
    return Work(
        give=lambda: {"a": a, "b": b},
        take=lambda given: None,
        values=lambda: {"product": a @ b},
        once=lambda: a @ b,
        facts={},
    )


def _step(spec: dict[str, Any]) -> Work:
    cfg = config.from_dict(spec["config"])
    run = loop.new_run(text(cfg.vocab_size), cfg, config.from_dict(spec["training"]))
    parts, processes = run.training.shards, spec["processes"]
    _settle(parts if processes == 1 else 1)
    crew = _until_the_end.enter_context(loop.members(run, processes))
    token, target = _next_batches(run)

    def give() -> dict[str, np.ndarray]:
        return {"token": token, "target": target, **_named("params", run.params)}

    def values() -> dict[str, np.ndarray]:
        if crew is None:
            _, grads = shards.gradients(token[0], target[0], run.params, cfg, shards=parts)
        else:
            crew.gradients(token[0], target[0])
            grads = tree.map(np.copy, crew.grads[0])  # the next step overwrites them
        first, before = run.step, tree.map(np.copy, run.params)
        for _ in range(COMPARED_STEPS):
            loop.take_step(run, crew)
        losses = run.series.cross_entropy[first : run.step]
        change = tree.map(np.subtract, run.params, before)
        return {"loss": losses, **_named("grads", grads), **_named("change", change)}

    return Work(
        give=give,
        take=lambda given: None,
        values=values,
        once=lambda: loop.take_step(run, crew),
        facts={
            "products": lambda: bench_products.measure(run, spec["repeats"], crew),
            "bytes": lambda: bench_products.bytes_of(run, crew),
            "effective": lambda: _effective_experts(run),
        },
    )


def _effective_experts(run: loop.Run) -> list[float]:
    """Count the effective experts of each layer in the last step; a dense model has no such."""
    last = run.series.load[run.step - 1]
    return metrics.effective_experts(last).round(2).tolist() if last.size else []


def _next_batches(run: loop.Run) -> tuple[np.ndarray, np.ndarray]:
    """Draw the batches that the run is about to draw, without moving its generator."""
    rng = copy.deepcopy(run.data_rng)
    sizes = run.training.batch, run.cfg.context
    batches = [data.sample_batch(rng, run.corpus.train, *sizes) for _ in range(BATCHES)]
    token, target = (np.stack(part) for part in zip(*batches, strict=True))
    return token, target


def _layer(spec: dict[str, Any]) -> Work:
    cfg: MoEConfig = config.from_dict(spec["moe"])
    _settle(spec["workers"])
    x, dy, rng = _rows(spec)
    params = layer.init_moe(rng, cfg, spec["width"], "float32")
    if spec["processes"] > 1:
        rows = spec["tokens"] * cfg.top_k
        crew = expert_parallel.expert_parallel(params, rows, spec["processes"])
        params = _until_the_end.enter_context(crew)
    aux = np.zeros((), "float32")

    def part(x: np.ndarray, dy: np.ndarray) -> tuple:
        y, _, _, cache = layer.moe_forward(x, params, cfg, reported=False)  # as PyTorch's sides
        return y, *layer.moe_backward(dy, aux, cache)

    return _forward_and_backward(part, x, dy, params, spec)


def _update(spec: dict[str, Any]) -> Work:
    """Update a layer by gradients of few tokens: most of its experts have received none.

    Nothing decays, so that who skips the idle ones computes what who does not does.
    """
    cfg: MoEConfig = config.from_dict(spec["moe"])
    _settle(spec["workers"])
    x, dy, rng = _rows(spec)
    params = layer.init_moe(rng, cfg, spec["width"], "float32")
    *_, cache = layer.moe_forward(x, params, cfg, reported=False)
    _, grads = layer.moe_backward(dy, np.zeros((), "float32"), cache)
    rule = AdamW(weight_decay=0.0, skip_idle=spec["skip_idle"])
    state, steps = optimizer.init_state(params, rule), itertools.count()

    def once() -> None:
        optimizer.update(params, grads, state, rule, next(steps), rate=1e-5)

    def values() -> dict[str, np.ndarray]:
        once()
        return _named("params", params)

    return Work(lambda: _named("params", params), lambda given: None, values, once, {})


def _mlp(spec: dict[str, Any]) -> Work:
    _settle(spec["workers"])
    x, dy, rng = _rows(spec)
    params = mlp.init_mlp(rng, spec["width"], spec["hidden"], "gelu_tanh", "float32", 1)

    def part(x: np.ndarray, dy: np.ndarray) -> tuple:
        y, cache = mlp.mlp_forward(x, params, "gelu_tanh")
        return y, *mlp.mlp_backward(dy, cache)

    return _forward_and_backward(part, x, dy, params, spec)


def _forward_and_backward(
    part: Callable, x: np.ndarray, dy: np.ndarray, params: tree.Tree, spec: dict[str, Any]
) -> Work:
    parts = spec["parts"]
    xs, dys = np.array_split(x, parts), np.array_split(dy, parts)

    def once() -> tuple:
        jobs = [functools.partial(part, *rows) for rows in zip(xs, dys, strict=True)]
        found = machine.share_out(jobs)
        if parts == 1:
            return found[0]
        y, dx, grads = zip(*found, strict=True)
        return np.concatenate(y), np.concatenate(dx), functools.reduce(shards.add, grads)

    def values() -> dict[str, np.ndarray]:
        y, dx, grads = once()
        return {"y": y, "dx": dx, **_named("grads", grads)}

    given = {"x": x, "dy": dy, **_named("params", params)}
    return Work(lambda: given, lambda given: None, values, once, {})


def _rows(spec: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, spec["tokens"], spec["width"])).astype(np.float32)
    return x, dy, rng


def _generate(spec: dict[str, Any]) -> Work:
    cfg: ModelConfig = config.from_dict(spec["config"])
    rng = np.random.default_rng(0)
    params = model.init_model(rng, cfg)
    prompt = rng.integers(0, cfg.vocab_size, spec["prompt"])

    def tokens() -> Iterator[int]:
        return generation.generate(prompt, params, cfg, spec["tokens"], 0, temperature=0)

    def values() -> dict[str, np.ndarray]:
        written = np.array(list(tokens()))
        whole = np.concatenate((prompt, written))[None]
        logits_BTV, _, _, _ = model.model_forward(whole, params, cfg)
        return {"written": written, "logits": logits_BTV}

    return Work(
        give=lambda: {"prompt": prompt, **_named("params", params)},
        take=lambda given: None,
        values=values,
        once=lambda: list(tokens()),
        facts={"lengths": lambda: _by_length(tokens, spec["repeats"])},
    )


def _by_length(tokens: Any, repeats: int) -> list[float]:
    """Time every token by its place, in milliseconds: the median over repetitions."""
    found = []
    for _ in range(repeats):
        marks = [time.perf_counter()]
        marks += [time.perf_counter() for _ in tokens()]
        found.append(np.diff(marks))
    return np.round(1e3 * np.median(found, 0), 4).tolist()


def _named(prefix: str, arrays: tree.Tree) -> dict[str, np.ndarray]:
    """Name the arrays of a tree; of gradients, large ones are sketched."""
    leaves = {f"{prefix}.{name}": leaf for name, leaf in tree.named_leaves(arrays)}
    if prefix != "grads":
        return leaves
    return {name: sketch(name, leaf) for name, leaf in leaves.items()}
