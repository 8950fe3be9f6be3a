"""Expert parallelism: processes share the experts of a layer out, each runs the rows of its own.

The caller routes and dispatches as ever. Then every process runs the MLPs of a run of neighboring
experts, whose matrices, rows and gradients lie in memory that all share; the caller combines. Each
expert does what it would do alone, so who runs it changes no bit.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moe_numpy import processes, tree
from moe_numpy.backend import Array, Cache
from moe_numpy.config import MoEConfig, rules
from moe_numpy.moe import experts

WHO = "expert_parallel"
MATRICES = 8  # rows that an expert can multiply in the time that its matrices take to arrive
ROOMS = 2  # gradients of a layer that may be there at once: the last ones, while new ones are made


@contextlib.contextmanager
def expert_parallel(params: tree.Tree, rows: int, size: int) -> Iterator[tree.Tree]:
    """Let `size` processes share out the experts within the block: yield the parameters for it.

    Within the block the layers that are given these parameters, to their forward and backward,
    share their experts out by themselves.

    Parameters
    ----------
    params : parameters of one layer, or of anything that has such layers, as a model
    rows : the most that the experts of a layer are sent at once: tokens * top_k, or all soft slots
    size : number of processes, the caller's among them, each with matrix products on one thread

    Yields
    ------
    params
        the same numbers in memory that the processes share. What writes to them is seen by all;
        a layer with other arrays in their place is computed by the caller alone.

    Raises
    ------
    ValueError
        If there are fewer than two processes, no rows or no experts, or the system cannot share
        memory; within the block, if a layer sends more rows, or if the gradients of one layer from
        more than two backwards are held: they lie in memory that is used in turns.
    """
    processes.require_possible(WHO, size)
    rules.whole_number(WHO, "rows", rows, 1)
    params = tree.in_one_block(params, processes.shared)
    with _Crew(params, rows, size) as crew, processes.holding(crew):
        yield params


class _Crew(processes.Processes):
    """Processes that hold the experts of some layers.

    held       the caches that this process holds, by number, each with its experts and their rows
    freed      numbers of the caches that nobody needs any more
    paces      shares of the work that the members do in the same time; it adds up to one
    """

    who = WHO
    advice = "Begin the block anew, with fewer processes."

    def __init__(self, params: tree.Tree, rows: int, size: int) -> None:
        super().__init__(size)
        self.layers = list(_layers(params))
        rule, advice = "the parameters must have experts", "Pass those of an MoE layer or a model."
        rules.require(bool(self.layers), WHO, rule, "none", advice)
        self.rows, width = rows, max(layer.in_ECF.shape[1] for layer in self.layers)
        like = self.layers[0].in_ECF
        self._tables = [
            processes.shared(rows * width * like.itemsize).view(like.dtype) for _ in range(2)
        ]
        self.rooms = [[_Room(layer) for _ in range(ROOMS)] for layer in self.layers]
        self.held: dict[int, tuple[Cache, slice, slice]] = {}
        self.freed: list[int] = []
        self.paces = [1.0 / size] * size
        self._numbers, self._lock = itertools.count(), threading.Lock()

    def holds(self, params: experts.ExpertParams) -> bool:
        """Tell whether these arrays are those of one of the layers."""
        return self._find(params) is not None

    def forward(
        self, x_RC: Array, params: experts.ExpertParams, cfg: MoEConfig, offsets: tuple[int, ...]
    ) -> tuple[Array, _Held]:
        """Do what `experts_forward` does; the cache stands for those of the members."""
        rule, advice = f"a layer must send at most {self.rows} rows", "Begin the block with more."
        rules.require(len(x_RC) <= self.rows, WHO, rule, f"{len(x_RC)}", advice)
        bounds, shares = _cut(offsets, self.paces)
        held = _Held(self, next(self._numbers), self._find(params), x_RC.shape, shares)
        return self._exchange(_run, held, x_RC, cfg, offsets, bounds), held

    def backward(self, dy_RC: Array, held: _Held) -> tuple[Array, experts.ExpertParams]:
        """Do what `experts_backward` does."""
        rule, advice = "a backward must come before the block ends", "Move it there."
        rules.require(self.at_work, WHO, rule, "one after it", advice)
        rooms = self.rooms[held.layer]
        with self._lock:
            free = [at for at, room in enumerate(rooms) if not room.is_lent()]
            rule, advice = f"at most {ROOMS} gradients of a layer may be held", "Copy them before."
            rules.require(bool(free), WHO, rule, "one more", advice)
            grads = rooms[free[0]].lend()
        return self._exchange(_undo, held, dy_RC, free[0]), grads

    def tables(self, shape: tuple[int, int]) -> list[Array]:
        """Show the two tables of rows: that of the caller, and that of the members."""
        R, C = shape
        return [table[: R * C].reshape(R, C) for table in self._tables]

    def _exchange(self, do: Callable[..., list], held: _Held, sent_RC: Array, *more: Any) -> Array:
        """Put rows down for the members, let them work, and copy what they have put down."""
        with self._lock:
            there_RC, back_RC = self.tables(held.shape)
            there_RC[...] = sent_RC
            freed = [self.freed.pop() for _ in range(len(self.freed))]
            begun = time.perf_counter()
            ends = self._each(do, freed, held.number, held.layer, held.shape, *more)
            self._learn([end - begun for end in ends], held.shares)
            return back_RC.copy()

    def _learn(self, seconds: list[float], shares: list[float]) -> None:
        """Give less work the next time to a member that the others had to wait for."""
        speeds = [share / took for share, took in zip(shares, seconds, strict=True)]
        if min(speeds) == 0.0:  # a member without experts must get some again to show its pace
            speeds = [1.0] * self.size
        found = [speed / sum(speeds) for speed in speeds]
        self.paces = [(old + new) / 2 for old, new in zip(self.paces, found, strict=True)]

    def _find(self, params: experts.ExpertParams) -> int | None:
        own = tree.leaves(params)
        for at, layer in enumerate(self.layers):
            if all(a is b for a, b in itertools.zip_longest(own, tree.leaves(layer))):
                return at
        return None


class _Held:
    """Stands for a cache whose parts the members hold as long as this lives."""

    def __init__(
        self,
        crew: _Crew,
        number: int,
        layer: int,
        shape: tuple[int, int],
        shares: list[float],
    ) -> None:
        self.crew, self.number, self.layer = crew, number, layer
        self.shape, self.shares = shape, shares

    def __del__(self) -> None:
        self.crew.freed.append(self.number)

    def backward(self, dy_RC: Array) -> tuple[Array, experts.ExpertParams]:
        """Do what `experts_backward` does."""
        return self.crew.backward(dy_RC, self)


class _Room:
    """Gradients of a layer in memory that all share, lent until nobody holds them any more."""

    def __init__(self, like: experts.ExpertParams) -> None:
        self.grads = tree.room(like, processes.shared)
        self._lent: list[weakref.ref] = []

    def is_lent(self) -> bool:
        """Tell whether somebody holds an array of them, or a view of one."""
        return any(lent() is not None for lent in self._lent)

    def lend(self) -> experts.ExpertParams:
        """Show the gradients by arrays of their own, whose end can be seen."""
        grads = tree.map(lambda array: np.asarray(memoryview(array)), self.grads)
        self._lent = [weakref.ref(array) for array in tree.leaves(grads)]
        return grads


def _run(
    crew: _Crew,
    rank: int,
    freed: list[int],
    number: int,
    layer: int,
    shape: tuple[int, int],
    cfg: MoEConfig,
    offsets: tuple[int, ...],
    bounds: list[int],
) -> list:
    """Run the experts of this member; keep their cache."""
    for old in freed:
        crew.held.pop(old, None)
    start, end = bounds[rank : rank + 2]
    own, rows = slice(start, end), slice(offsets[start], offsets[end])
    if end > start:
        there_RC, back_RC = crew.tables(shape)
        params = tree.map(lambda array: array[own], crew.layers[layer])
        shifted = tuple(at - rows.start for at in offsets[start : end + 1])
        back_RC[rows], cache = experts.experts_forward(there_RC[rows].copy(), params, cfg, shifted)
        crew.held[number] = (cache, own, rows)
    return [time.perf_counter()]


def _undo(
    crew: _Crew,
    rank: int,
    freed: list[int],
    number: int,
    layer: int,
    shape: tuple[int, int],
    room: int,
) -> list:
    """Undo `_run` for the experts of this member."""
    for old in freed:
        crew.held.pop(old, None)
    if number in crew.held:
        cache, own, rows = crew.held[number]
        there_RC, back_RC = crew.tables(shape)
        grads = tree.map(lambda array: array[own], crew.rooms[layer][room].grads)
        back_RC[rows], found = experts.experts_backward(there_RC[rows], cache, grads)
        for place, array in zip(tree.leaves(grads), tree.leaves(found), strict=True):
            if array is not place:  # one of biases
                place[...] = array
    return [time.perf_counter()]


def _cut(offsets: tuple[int, ...], paces: list[float]) -> tuple[list[int], list[float]]:
    """Cut the experts into a run for each member, of work by its pace.

    Returns    bounds      where the runs begin, and the end
               shares      of the work that they are
    """
    E = len(offsets) - 1
    work = np.asarray(offsets) + MATRICES * np.arange(E + 1)  # of all experts before
    wanted = work[-1] * np.cumsum(np.asarray([0.0, *paces]))
    bounds = abs(work[:, None] - wanted).argmin(0)
    return bounds.tolist(), (np.diff(work[bounds]) / work[-1]).tolist()


def _layers(params: tree.Tree) -> Iterator[experts.ExpertParams]:
    if isinstance(params, experts.ExpertParams):
        yield params
    elif isinstance(params, tuple):
        for branch in params:
            yield from _layers(branch)
