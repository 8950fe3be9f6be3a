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
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_numpy import ledger, machine, tree
from moe_numpy.backend import xp
from moe_numpy.training import data, loop, team
from moe_numpy.transformer import model

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

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
            _noted.append((threading.get_ident(), *inputs, result))
        if out is not None:
            return out[0] if len(out) == 1 else out
        return tuple(map(_watch, result)) if isinstance(result, tuple) else _watch(result)


_noted: list[tuple] = []


@contextlib.contextmanager
def noted_products() -> Iterator[list[tuple]]:
    """Note every matrix product of the mathematics inside the block: (thread, a, b, result).

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


def products_of_step(run: loop.Run) -> list[tuple]:
    """Take a training step and list its matrix products."""
    params = run.params
    run.params = watch(params)
    try:
        with noted_products() as noted:
            loop.take_step(run)
            return list(noted)
    finally:
        run.params = params


@contextlib.contextmanager
def replaying(products: list[tuple], processes: bool = False) -> Iterator[Callable[[], None]]:
    """Give what computes the products again, alone, on the same arrays.

    The products of each thread of the step are computed in a thread of their own, or each in a
    process: threads would wait for each other's Python between two products.
    """
    by_thread: dict[int, list[tuple]] = {}
    for thread, *operands in products:
        by_thread.setdefault(thread, []).append(operands)
    own, *others = by_thread.values()
    with contextlib.ExitStack() as end:
        if not others:
            yield lambda: _multiply(own)
        elif processes:
            lines = [end.enter_context(_helper(theirs)) for theirs in others]

            def together() -> None:
                for line in lines:
                    line.send(True)
                _multiply(own)
                for line in lines:
                    line.recv()

            yield together
        else:
            yield functools.partial(_in_threads, [own, *others])


@contextlib.contextmanager
def _helper(products: list[tuple]) -> Iterator[Connection]:
    """Start a process that computes the products whenever it gets a message, and answers."""
    import multiprocessing  # as in `team`: it is slow to import

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def serve() -> None:
        while theirs.recv():
            _multiply(products)
            theirs.send(True)

    helper = fork.Process(target=serve, daemon=True)
    helper.start()
    try:
        yield ours
    finally:
        ours.send(False)
        helper.join()


def _in_threads(lists: list[list[tuple]]) -> None:
    threads = [threading.Thread(target=_multiply, args=(own,)) for own in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def flops(products: list[tuple]) -> int:
    """Count the multiplications and additions of the products."""
    return sum(2 * result.size * a.shape[-1] for _, a, _, result in products)


def measure(run: loop.Run, repeats: int, crew: team.Team | None = None) -> dict[str, Any]:
    """Time steps, their products alone and the machine's own products in turns.

    The products of a shard are replayed as the step has them: in a process of their own where
    `crew` takes the steps, else on a thread. The machine's own are large square ones, one in each.

    Returns     the seconds of each, the number of products, and their operations
    """
    loop.take_step(run, crew)
    shards = run.training.shards
    with machine.workers(shards if shards > 1 else 0):
        products = products_of_step(run)
    threads = len({thread for thread, *_ in products})
    a, b, *outs = np.random.default_rng(0).random((2 + threads, PROBE, PROBE), np.float32)
    squares = [(i, a, b, out) for i, out in enumerate(outs)]
    whole, alone, probe, split = [], [], [], crew is not None
    with replaying(products, split) as multiply, replaying(squares, split) as multiply_squares:
        for _ in range(repeats):
            whole.append(_seconds(lambda: loop.take_step(run, crew), 5))
            alone.append(_seconds(multiply, 5))
            probe.append(_seconds(multiply_squares, 3))
    return {
        "step": whole,
        "products": alone,
        "probe": probe,
        "calls": len(products),
        "flops": flops(products),
        "probe_flops": flops(squares),
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
