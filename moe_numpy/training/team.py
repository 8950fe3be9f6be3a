"""A team: processes that take the steps of one run together, each with a Python of its own.

Threads of one Python wait for each other between the calls of NumPy, the longer the smaller their
arrays; processes do not. What all members need lies in memory that they share: the parameters, the
averages of the optimizer, and the gradients that they exchange. The rest goes through pipes.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_numpy import machine, tree
from moe_numpy.backend import Array, few_launches
from moe_numpy.config import ModelConfig, TrainingConfig, rules
from moe_numpy.training import optimizer, shards
from moe_numpy.transformer import model

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PATIENCE = 10.0  # seconds that a member has for its last answer
AWAKE = 0.001  # seconds that a process waits before it goes to sleep


class Team:
    """Processes at work between `with` and its end; the caller's own is the member of rank 0.

    A member has the program and the configurations as they were when the block began. What else a
    step needs of the caller is sent to it. Every sum is taken in the order of one process, so the
    bits are the same.

    Each array of the gradients is added up by one member, its owner. The others copy their shares
    of it into `grads`: one tree for each shard that the owner did not compute, in the order of the
    shards, as `given` tells for every owner. The first of them belongs to shard 0 or 1, which is
    read before the sum takes its place.

    params, state    the arrays that were given, now in shared memory: train these
    grads            trees of gradients; after `gradients`, the first holds those of the step
    """

    def __init__(
        self,
        params: model.ModelParams,
        state: optimizer.OptimizerState,
        cfg: ModelConfig,
        training: TrainingConfig,
        size: int,
    ) -> None:
        """Copy the arrays to shared memory, for a team of `size` members.

        Raises     ValueError of `require_possible`
        """
        parts = training.shards
        require_possible(parts, size)
        self.cfg, self.training, self.parts, self.size = cfg, training, parts, size
        self.params, self.state = (tree.in_one_block(a, _shared) for a in (params, state))
        self.grads = [tree.room(params, _shared) for _ in range(parts - parts // size)]
        sizes = [leaf.size for leaf in tree.leaves(params)]
        self._by_size = sorted(range(len(sizes)), key=lambda at: -sizes[at])
        self.shares = [self._by_size[rank::size] for rank in range(size)]  # of arrays to add up
        self.own: dict[int, list[Array]] = {}  # gradients of this process's shards
        places = [tree.leaves(grads) for grads in self.grads]
        self.given: list[dict[int, list[Array]]] = []  # to each owner, of shards not its own
        for owner in range(size):
            others = [i for i in range(parts) if i % size != owner]
            self.given.append(dict(zip(others, places, strict=False)))
        self._lines: list[Connection] = []

    def __enter__(self) -> Team:
        import multiprocessing  # not with the package: few need it, and it is slow to import

        fork = multiprocessing.get_context("fork")
        machine.give_memory_back()
        with contextlib.ExitStack() as end:
            end.enter_context(machine.one_product_a_thread() or contextlib.nullcontext())
            end.enter_context(machine.sharing(None))  # a process does not inherit threads
            for rank in range(1, self.size):
                ours, theirs = fork.Pipe()
                self._lines.append(ours)
                member = fork.Process(target=_serve, args=(self, rank, theirs), daemon=True)
                with warnings.catch_warnings():  # a fork beside threads; OpenBLAS provides for that
                    warnings.simplefilter("ignore", DeprecationWarning)
                    member.start()
                theirs.close()
                end.callback(_dismiss, member, ours)
            self._end = end.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    def gradients(
        self,
        token_BT: Array,
        target_BT: Array,
        noise: tuple[Array | None, ...] | None = None,
    ) -> tuple[model.LossReport, Array]:
        """Do what `shards.gradients` and `optimizer.norm` do: return the report and the norm.

        The gradients are left in `grads[0]`.
        """
        parts = shards.cut(token_BT, target_BT, noise, self.parts)
        reports = self._each(_compute, parts)
        squares = zip(self._by_size, self._each(_add_up), strict=True)
        return shards.merge(tuple(reports)), np.sqrt(sum(square for _, square in sorted(squares)))

    def update(self, step: int, rate: float, scale: float = 1.0) -> None:
        """Do what `optimizer.update` does."""
        self._each(_update, step, rate, scale)

    def _each(self, do: Callable[..., list], *arguments: Any) -> list:
        """Let every member do its share: list the results, which are dealt to them in turns.

        Raises     what a member raised; ChildProcessError if one ended
        """
        try:
            for line in self._lines:
                line.send((do, arguments))
            found = [_attempt(do, self, 0, arguments), *map(_receive, self._lines)]
        except BaseException as problem:
            for line in self._lines:  # a late answer must not be taken for that of the next call
                line.close()
            if not isinstance(problem, EOFError | OSError):
                raise
            raise ChildProcessError(
                "team: every process must answer, got the end of one; the system may have been "
                "short of memory. Go on from the last checkpoint, with fewer processes."
            ) from None
        for problem in found:
            if isinstance(problem, Exception):
                raise problem
        in_turns = itertools.zip_longest(*found)
        return [result for turn in in_turns for result in turn][: sum(map(len, found))]


def _compute(team: Team, rank: int, parts: list[tuple]) -> list:
    """Compute the shards of this member, and put down what others add up; return the reports."""
    reports, setting = [], (team.params, team.cfg, team.training.smoothing, 1.0 / team.parts)
    for i in range(rank, team.parts, team.size):
        report, grads = shards.of_one(parts[i], *setting)
        reports.append(report)
        team.own[i] = tree.leaves(grads)
        for owner, share in enumerate(team.shares):
            if owner != rank:
                for at in share:
                    np.copyto(team.given[owner][i][at], team.own[i][at])
    return reports


def _add_up(team: Team, rank: int) -> list:
    """Add up the arrays of this member, shard by shard; return the sums of their squares."""
    squares, sums, of_shard = [], tree.leaves(team.grads[0]), team.own | team.given[rank]
    for at in team.shares[rank]:
        first, second, *others = (of_shard[i][at] for i in range(team.parts))
        total = np.add(first, second, out=sums[at])
        for part in others:
            total += part
        squares.append(np.vdot(total, total))
    team.own.clear()
    return squares


def _update(team: Team, rank: int, step: int, rate: float, scale: float) -> list:
    share = slice(rank, None, team.size)
    setting = (team.training.optimizer, step, rate, scale, share)
    optimizer.update(team.params, team.grads[0], team.state, *setting)
    return []


def _serve(team: Team, rank: int, line: Connection) -> None:
    """Answer rank 0 until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; rank 0 answers it
    for other in team._lines:  # which this process inherited, and whose end it would hide
        other.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            do, arguments = _receive(line)
            line.send(_attempt(do, team, rank, arguments))


def _receive(line: Connection) -> Any:
    """Wait for the next message: awake for a while, as many come sooner than a sleeper wakes up."""
    ready, end = select.poll(), time.perf_counter() + AWAKE
    ready.register(line, select.POLLIN)
    while not ready.poll(0) and time.perf_counter() < end:
        os.sched_yield()  # another process may have use for this core
    return line.recv()


def _attempt(do: Callable[..., list], team: Team, rank: int, arguments: tuple) -> Any:
    try:
        return do(team, rank, *arguments)
    except Exception as problem:
        return problem


def _dismiss(member: Any, line: Connection) -> None:
    line.close()
    member.join(PATIENCE)
    if member.is_alive():
        member.kill()
        member.join()


def _shared(size: int) -> np.ndarray:
    """Allocate bytes, all zero, that later processes share.

    Raises     MemoryError if there are not so many
    """
    try:
        return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
    except OSError:
        wanted = f"{size / 2**20:.1f} MiB that processes share"
        raise MemoryError(f"Unable to allocate {wanted}") from None


def require_possible(parts: int, size: int) -> None:
    """Make sure that `size` processes can share out `parts` shards here.

    Raises     ValueError if there are fewer than two, one would have no shard, or this system
               cannot have teams
    """
    rules.whole_number("team", "processes", size, 2)
    if size > parts:
        raise ValueError(
            f"team: processes must be at most the shards of a step ({parts}), got {size}. "
            "Change either."
        )
    if sys.platform != "linux" or few_launches():
        where = "on the GPU" if few_launches() else f"on {sys.platform}"
        raise ValueError(
            f"team: processes must share memory of the host on Linux, got a run {where}. "
            "Leave processes out: threads share out the shards instead."
        )
