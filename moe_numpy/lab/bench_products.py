"""Where a training step's time and memory go: its matrix products alone, and its arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moe_numpy import ledger, processes, tree
from moe_numpy.backend import xp
from moe_numpy.lab import race
from moe_numpy.training import data, loop, shards, team
from moe_numpy.transformer import model

PROBE = 1024  # size of the square product that tells the machine's own rate


class Watched(np.ndarray):
    """An array whose matrix products are noted, with the arrays that they read and wrote."""

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: tuple | None = None, **knobs: Any
    ) -> Any:
        """Compute as plain arrays do, note a product of matrices, and watch the result too."""
        if out is not None:
            knobs["out"] = tuple(_plain(array) for array in out)
        knobs = {name: _plain(value) for name, value in knobs.items()}
        inputs = tuple(_plain(array) for array in inputs)
        result = getattr(ufunc, method)(*inputs, **knobs)
        if ufunc is np.matmul and min(array.ndim for array in inputs) > 1:
            _noted.append((*inputs, result))
        if out is not None:
            return out[0] if len(out) == 1 else out
        return tuple(map(_watch, result)) if isinstance(result, tuple) else _watch(result)


_noted: list[tuple] = []


@contextlib.contextmanager
def noted_products() -> Iterator[list[tuple]]:
    """Note every matrix product of the mathematics inside the block: (a, b, result).

    What the mathematics allocates is watched by itself; parameters must be (`watch`). Unseen is
    only ``a @ b`` of two arrays that were both made before and are not watched.
    """
    before = dict(vars(xp))
    plain = (type, np.ufunc)
    functions = {n: f for n, f in before.items() if callable(f) and not isinstance(f, plain)}
    vars(xp).update({name: _watching(function) for name, function in functions.items()})
    xp.matmul = xp.dot = lambda a, b, **knobs: np.matmul(_watch(a), b, **knobs)
    _noted.clear()
    try:
        yield _noted
    finally:
        vars(xp).update(before)


def watch(arrays: tree.Tree) -> tree.Tree:
    """Look at the arrays of a tree, in place, as arrays whose products are noted."""
    return tree.map(_watch, arrays)


def products_of_step(run: loop.Run) -> list[list[tuple]]:
    """List the matrix products of a training step: one list for each of its shards."""
    training, params, found = run.training, watch(run.params), []
    batch = data.sample_batch(0, run.corpus.train, training.batch, run.cfg.context)
    noise = model.draw_noise(0, run.cfg, batch[0].size, run.params.token_VC.dtype)
    for part in shards.cut(*batch, noise, training.shards):
        with noted_products() as noted:
            shards.of_one(part, params, run.cfg, training.smoothing, 1.0 / training.shards)
            found.append(list(noted))
    return found


@contextlib.contextmanager
def replaying(lists: list[list[tuple]], split: bool = False) -> Iterator[Callable[[], Any]]:
    """Give what computes the products again, alone, on the same arrays.

    Each list is computed in a thread of its own, or with `split` in a process: threads would wait
    for each other's Python between two products.
    """
    if len(lists) == 1:
        yield lambda: _multiply(lists[0])
    elif split:
        with _Replay(lists) as crew:
            yield lambda: crew._each(_replay)
    else:
        yield functools.partial(_in_threads, lists)


class _Replay(processes.Processes):
    """Processes that each compute a list of products."""

    who = "replay"
    advice = "Measure again."

    def __init__(self, lists: list[list[tuple]]) -> None:
        super().__init__(len(lists))
        self.lists = lists


def _replay(crew: _Replay, rank: int) -> list:
    _multiply(crew.lists[rank])
    return []


def _in_threads(lists: list[list[tuple]]) -> None:
    threads = [threading.Thread(target=_multiply, args=(own,)) for own in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def flops(products: list[tuple]) -> int:
    """Count the multiplications and additions of the products."""
    return sum(2 * result.size * a.shape[-1] for a, _, result in products)


def measure(run: loop.Run, repeats: int, crew: team.Team | None = None) -> dict[str, Any]:
    """Time steps, their products alone and the machine's own products in turns.

    The products of a shard are replayed as the step has them: in a process of their own where
    `crew` takes the steps, else in a thread. The machine's own are large square ones, one in each.

    As in a race, turns that other programs disturb are repeated.

    Returns     the seconds of each, the number of products, and their operations; busy turns among
                all, and how many the seconds are of
    """
    loop.take_step(run, crew)
    products, split = products_of_step(run), crew is not None
    a, b, *outs = np.random.default_rng(0).random((2 + len(products), PROBE, PROBE), np.float32)
    squares = [[(a, b, out)] for out in outs]
    turns, foreign = [], []
    with replaying(products, split) as multiply, replaying(squares, split) as multiply_squares:
        while race.wanted(foreign, repeats):
            busy, own, started_at = race.machine_seconds(), race.cpu_seconds(), time.perf_counter()
            whole = _seconds(lambda: loop.take_step(run, crew), 5)
            turns.append((whole, _seconds(multiply, 5), _seconds(multiply_squares, 3)))
            foreign.append(race.share_of_others(busy, started_at, race.cpu_seconds() - own))
    kept = race.used(turns, foreign)
    whole, alone, probe = (list(part) for part in zip(*kept, strict=True))
    return {
        "step": whole,
        "products": alone,
        "probe": probe,
        "busy": sum(share > race.BUSY for share in foreign),
        "rounds": len(kept),
        "calls": sum(map(len, products)),
        "flops": sum(map(flops, products)),
        "probe_flops": sum(map(flops, squares)),
    }


def bytes_of(run: loop.Run, crew: team.Team | None = None) -> dict[str, int]:
    """Count the bytes of a step's arrays: parameters, gradients, optimizer, activations.

    The activations are what the forward of the whole batch leaves for the backward, each buffer
    counted once; every shard has gradients of its own, and the processes of `crew` exchange some.
    Beside them the most that a step in one shard asks for at once, counted and by the formula.
    """
    sizes = run.training.batch, run.cfg.context
    token, target = data.sample_batch(np.random.default_rng(0), run.corpus.train, *sizes)
    noise = model.draw_noise(0, run.cfg, token.size, run.params.token_VC.dtype)
    _, _, cache = model.loss_forward(token, target, run.params, run.cfg, noise)
    own = {id(_root(leaf)) for leaf in tree.leaves(run.params)}
    kept = {key: array for key, array in buffers(cache).items() if key not in own}
    activations = sum(array.nbytes for array in kept.values())
    grads = model.loss_backward(np.ones((), run.params.token_VC.dtype), cache)
    return {
        "parameters": _bytes(run.params),
        "gradients": run.training.shards * _bytes(grads) + _bytes(crew and tuple(crew.grads)),
        "optimizer": _bytes(run.state),
        "activations": activations,
        "peak of one shard": _bytes(run.params) + _bytes(run.state) + peak_of_step(run),
        "formula": ledger.step_memory(run.cfg, run.training.batch).peak,
    }


def peak_of_step(run: loop.Run) -> int:
    """Count the most bytes that a step in one shard asks for at once."""
    alone = loop.new_run(run.corpus, run.cfg, dataclasses.replace(run.training, shards=1))
    loop.take_step(alone)
    tracemalloc.start()
    try:
        loop.take_step(alone)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def buffers(cache: Any) -> dict[int, np.ndarray]:
    """Find the arrays that own the memory of everything in a cache, by identity."""
    if isinstance(cache, np.ndarray):
        root = _root(cache)
        return {id(root): root}
    inside = ()
    if isinstance(cache, tuple | list):
        inside = cache
    elif isinstance(cache, dict):
        inside = cache.values()
    elif hasattr(cache, "__dict__"):
        inside = vars(cache).values()
    found: dict[int, np.ndarray] = {}
    for part in inside:
        found |= buffers(part)
    return found


def _multiply(products: list[tuple]) -> None:
    for a, b, result in products:
        np.matmul(a, b, out=result)


def _seconds(once: Callable[[], Any], times: int) -> float:
    found = []
    for _ in range(times):
        started = time.perf_counter()
        once()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _root(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _bytes(arrays: tree.Tree) -> int:
    return sum(leaf.nbytes for leaf in tree.leaves(arrays))


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, Watched) else value


def _watch(value: Any) -> Any:
    return value.view(Watched) if isinstance(value, np.ndarray) else value


def _watching(function: Callable) -> Callable:
    @functools.wraps(function)
    def watched(*arguments: Any, **knobs: Any) -> Any:
        return _watch(function(*arguments, **knobs))

    return watched
