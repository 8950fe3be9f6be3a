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
from typing import Any, NamedTuple

import numpy as np

from moe_numpy import processes, tree
from moe_numpy.backend import Array, Cache
from moe_numpy.config import MoEConfig, rules
from moe_numpy.moe import experts

WHO = "expert_parallel"
MATRICES = 8  # rows that an expert can multiply in the time that its matrices take to arrive
ROOMS = 3  # for gradients of a layer; those in the last free one are copied


@contextlib.contextmanager
def expert_parallel(params: tree.Tree, rows: int, size: int) -> Iterator[tree.Tree]:
    """Let `size` processes share out the experts within the block: yield the parameters for it.

    Within the block the layers that are given these parameters share their experts out by
    themselves, in their forward and in its backward. Generation does not, nor do the processes of a
    team, which have parameters of their own; nor do layers that are given other arrays.

    Parameters
    ----------
    params : parameters of one layer, or of anything that has such layers, as a model
    rows : the most that the experts of a layer are sent at once, evaluation included: tokens *
        top_k, with expert choice rounded up to a multiple of the experts; or all soft slots
    size : number of processes, the caller's among them

    Yields
    ------
    params
        a copy in memory that the processes share: what writes to it is seen by all. Until the
        block ends, matrix products have one thread, the caller's others too (if threadpoolctl is
        installed), and the bits of a layer are those of such products; `machine.workers` share
        nothing out.

    Raises
    ------
    ValueError
        If there are fewer than two processes, no rows, no experts or parameters of several types,
        or the system cannot share memory; within the block, if a layer sends more rows.
    """
    processes.require_possible(WHO, size)
    rules.whole_number(WHO, "rows", rows, 1)
    types = sorted({str(leaf.dtype) for layer in _layers(params) for leaf in tree.leaves(layer)})
    rule, advice = "the parameters must have experts", "Pass those of an MoE layer or a model."
    rules.require(bool(types), WHO, rule, "none", advice)
    rule, advice = "all experts must be of one type", "Draw them anew."
    rules.require(len(types) == 1, WHO, rule, " and ".join(types), advice)
    params = tree.in_one_block(params, processes.shared)
    with _Crew(params, rows, size) as crew, processes.holding(crew):
        yield params


class _Crew(processes.Processes):
    """Processes that hold the experts of some layers.

    kept       the caches of this process by number, each with its experts and their rows
    freed      numbers of the caches that nobody needs any more
    paces      shares of the work that the members do in the same time; they add up to one
    """

    who = WHO
    advice = "Begin the block anew, with fewer processes."

    def __init__(self, params: tree.Tree, rows: int, size: int) -> None:
        super().__init__(size)
        self.layers, self.rows = list(_layers(params)), rows
        width = max(layer.in_ECF.shape[1] for layer in self.layers)
        like = self.layers[0].in_ECF
        self._table = processes.shared(rows * width * like.itemsize).view(like.dtype)
        self.rooms = [[_Room(layer) for _ in range(ROOMS)] for layer in self.layers]
        self.kept: dict[int, tuple[Cache | None, slice, slice]] = {}
        self.freed: list[int] = []
        self.paces = [1.0 / size] * size
        self._numbers, self._lock = itertools.count(), threading.RLock()

    def __exit__(self, *problem: object) -> None:
        with self._lock:  # another thread of the caller may be in the middle of a layer
            self.at_work = False
        super().__exit__(*problem)

    def holds(self, params: experts.ExpertParams) -> bool:
        """Tell whether this process may ask the others for the experts with these arrays."""
        return self.at_work and self.is_ours() and self._find(params) is not None

    def forward(
        self, x_RC: Array, params: experts.ExpertParams, cfg: MoEConfig, offsets: tuple[int, ...]
    ) -> tuple[Array, _Ticket]:
        """Do what `experts_forward` does; the cache is a ticket for those of the members."""
        rule, advice = f"a layer must send at most {self.rows} rows", "Begin the block with more."
        rules.require(len(x_RC) <= self.rows, WHO, rule, f"{len(x_RC)}", advice)
        bounds, shares = _cut(offsets, self.paces)
        ticket = _Ticket(self, next(self._numbers), self._find(params), x_RC.shape, shares)
        return self._exchange(_run, ticket, x_RC, cfg, offsets, bounds), ticket

    def backward(self, dy_RC: Array, ticket: _Ticket) -> tuple[Array, experts.ExpertParams]:
        """Do what `experts_backward` does."""
        rooms = self.rooms[ticket.layer]
        with self._lock:
            first, *others = [at for at, room in enumerate(rooms) if not room.is_lent()]
            dx_RC = self._exchange(_undo, ticket, dy_RC, first)
            if others:
                return dx_RC, rooms[first].lend()
            return dx_RC, tree.map(np.copy, rooms[first].grads)

    def table(self, order: _Order) -> Array:
        """Forget what is freed; show the rows (R, C) that the members read, and write over."""
        for number in order.freed:
            self.kept.pop(number, None)
        R, C = order.shape
        return self._table[: R * C].reshape(R, C)

    def _exchange(
        self, do: Callable[..., list], ticket: _Ticket, rows_RC: Array, *more: Any
    ) -> Any:
        """Put rows down for the members, let them work, and copy what they put in their place."""
        with self._lock:
            rule, got = "its processes must be at work", "their end, or that of the block"
            rules.require(self.at_work, WHO, rule, got, "Begin the block anew.")
            rule, got = "only the caller of the block may use its caches", "a process forked beside"
            rules.require(self.is_ours(), WHO, rule, got, "Run the forward there, too.")
            came = f"{rows_RC.shape} of {rows_RC.dtype}"
            wanted = f"{ticket.shape} of {self._table.dtype}"
            rules.require(came == wanted, WHO, f"the rows must be {wanted}", came, "Convert them.")
            freed = [self.freed.pop() for _ in range(len(self.freed))]
            order = _Order(freed, ticket.number, ticket.layer, ticket.shape)
            table_RC = self.table(order)
            table_RC[...] = rows_RC
            begun = time.perf_counter()
            ends = self._each(do, order, *more)
            self._learn([end - begun for end in ends], ticket.shares)
            return table_RC.copy()

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


class _Ticket:
    """Stands for a cache, whose parts the members keep as long as this lives."""

    def __init__(
        self,
        crew: _Crew,
        number: int,
        layer: int | None,
        shape: tuple[int, int],
        shares: list[float],
    ) -> None:
        self.crew, self.number, self.layer = crew, number, layer
        self.shape, self.shares = shape, shares

    def __del__(self) -> None:
        self.crew.kept.pop(self.number, None)
        self.crew.freed.append(self.number)  # which the others are told with the next order

    def __reduce__(self) -> Any:
        raise TypeError(f"{WHO}: a cache of the block can neither be copied nor written down.")

    def backward(self, dy_RC: Array) -> tuple[Array, experts.ExpertParams]:
        """Do what `experts_backward` does."""
        return self.crew.backward(dy_RC, self)


class _Order(NamedTuple):
    """What the members are told in any case."""

    freed: list[int]
    number: int
    layer: int
    shape: tuple[int, int]


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
    order: _Order,
    cfg: MoEConfig,
    offsets: tuple[int, ...],
    bounds: list[int],
) -> list[float]:
    """Run the experts of this member and keep their cache; tell when it was done."""
    table_RC, cache = crew.table(order), None
    start, end = bounds[rank : rank + 2]
    own, rows = slice(start, end), slice(offsets[start], offsets[end])
    if end > start:
        params = tree.map(lambda array: array[own], crew.layers[order.layer])
        shifted = tuple(at - rows.start for at in offsets[start : end + 1])
        x_RC = table_RC[rows].copy()  # which the cache keeps
        table_RC[rows], cache = experts.run_here(x_RC, params, cfg, shifted)
    crew.kept[order.number] = (cache, own, rows)
    return [time.perf_counter()]


def _undo(crew: _Crew, rank: int, order: _Order, room: int) -> list[float]:
    """Undo `_run`, with the gradients in one of the rooms of the layer."""
    table_RC = crew.table(order)
    cache, own, rows = crew.kept[order.number]
    if cache is not None:
        grads = tree.map(lambda array: array[own], crew.rooms[order.layer][room].grads)
        table_RC[rows], found = experts.undo_here(table_RC[rows], cache, grads)
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
    wanted = work[-1] * np.cumsum([0.0, *paces])
    bounds = abs(work[:, None] - wanted).argmin(0)
    return bounds.tolist(), (np.diff(work[bounds]) / work[-1]).tolist()


def _layers(params: tree.Tree) -> Iterator[experts.ExpertParams]:
    if isinstance(params, experts.ExpertParams):
        yield params
    elif isinstance(params, tuple):
        for branch in params:
            yield from _layers(branch)
