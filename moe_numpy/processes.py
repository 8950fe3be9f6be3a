"""Processes that work together, each with a Python of its own.

Threads of one Python wait for each other between the calls of NumPy, the longer the smaller their
arrays; processes do not. What all members need lies in memory that they share. The rest goes
through pipes.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import mmap
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_numpy import machine
from moe_numpy.backend import few_launches
from moe_numpy.config import rules

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PATIENCE = 10.0  # seconds that a member has for its last answer
AWAKE = 0.005  # seconds that a process waits before it goes to sleep

_started: list[Processes] = []  # and not ended yet
_holders: contextvars.ContextVar[tuple[Any, ...]]
_holders = contextvars.ContextVar("processes that hold parameters", default=())


class Processes:
    """Processes at work between `with` and its end; the caller's own is the member of rank 0.

    A member has the program and all data as they were when the block began. What else its work
    needs of the caller is sent to it; so are NumPy's settings of floating-point errors.
    """

    who = "processes"
    advice = "Start them anew, fewer of them."

    def __init__(self, size: int) -> None:
        self.size, self.at_work, self._caller = size, False, os.getpid()
        self._lines: list[Connection] = []

    def __enter__(self) -> Any:
        import multiprocessing  # not with the package: few need it, and it is slow to import

        fork = multiprocessing.get_context("fork")
        self._lines = []
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
        self.at_work = True
        _started.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.at_work = False
        _started.remove(self)
        if self.is_ours():  # the end of one forked beside is not that of the members
            self._end.close()

    def is_ours(self) -> bool:
        """Tell whether this process has started the members, not one forked beside them."""
        return os.getpid() == self._caller

    def _each(self, do: Callable[..., list], *arguments: Any) -> list:
        """Let every member do its share: list the results, which are dealt to them in turns.

        Raises     what a member raised; ChildProcessError if one ended; ValueError if this is
                   not the process that started them
        """
        rule = "only the process that started its members may ask them"
        advice = "Begin a block of its own."
        rules.require(self.is_ours(), self.who, rule, "one forked beside them", advice)
        try:
            order = (do, arguments, np.geterr())
            for line in self._lines:
                line.send(order)
            found = [_attempt(do, self, 0, arguments), *map(_receive, self._lines)]
        except BaseException as problem:
            self.at_work = False
            for line in self._lines:  # a late answer must not be taken for that of the next call
                line.close()
            if not isinstance(problem, EOFError | OSError):
                raise
            raise ChildProcessError(
                f"{self.who}: every process must answer, got the end of one; the system may have "
                f"been short of memory. {self.advice}"
            ) from None
        for problem in found:
            if isinstance(problem, Exception):
                raise problem
        in_turns = itertools.zip_longest(*found)
        return [result for turn in in_turns for result in turn][: sum(map(len, found))]


def _serve(team: Processes, rank: int, line: Connection) -> None:
    """Answer rank 0 until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; rank 0 answers it
    machine.keep_memory()  # whatever the caller does with its own
    for other in team._lines:  # which this process inherited, and whose end it would hide
        other.close()
    with contextlib.suppress(EOFError, OSError):
        while (order := _receive(line)) is not None:
            do, arguments, settings = order
            with np.errstate(**settings):
                answer = _attempt(do, team, rank, arguments)
            try:
                line.send(answer)
            except OSError:
                raise
            except Exception as problem:  # such as an error of a class that only it knows
                line.send(RuntimeError(f"{answer!r} could not be sent: {problem}"))


def _receive(line: Connection) -> Any:
    """Wait for the next message: awake for a while, as many come sooner than a sleeper wakes up."""
    ready, end = select.poll(), time.perf_counter() + AWAKE
    ready.register(line, select.POLLIN)
    while not ready.poll(0) and time.perf_counter() < end:
        os.sched_yield()  # another process may have use for this core
    return line.recv()


def _attempt(do: Callable[..., list], team: Processes, rank: int, arguments: tuple) -> Any:
    try:
        return do(team, rank, *arguments)
    except Exception as problem:
        return problem


def _dismiss(member: Any, line: Connection) -> None:
    with contextlib.suppress(OSError):
        line.send(None)  # a mere close is not seen where another process has the line, too
    line.close()
    member.join(PATIENCE)
    if member.is_alive():
        member.kill()
        member.join()


def are_at_work() -> bool:
    """Tell whether this process has others at work: they do not see what it changes in itself."""
    return any(crew.at_work and crew.is_ours() for crew in _started)


@contextlib.contextmanager
def holding(crew: Any) -> Iterator[None]:
    """Let `holder` find these processes within the block; of None, no processes at all."""
    before = _holders.set((crew, *_holders.get()) if crew is not None else ())
    try:
        yield
    finally:
        _holders.reset(before)


def holder(params: Any) -> Any:
    """Find the processes that hold these parameters; None if none do."""
    return next((crew for crew in _holders.get() if crew.holds(params)), None)


def shared(size: int) -> np.ndarray:
    """Allocate bytes, all zero, that later processes share.

    Raises     MemoryError if there are not so many
    """
    try:
        return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
    except (OSError, OverflowError):
        wanted = f"{size / 2**20:.1f} MiB that processes share"
        raise MemoryError(f"Unable to allocate {wanted}") from None


def require_possible(who: str, size: int) -> None:
    """Make sure that there are to be two processes at least, and that this system can have them.

    Raises     ValueError if not
    """
    rules.whole_number(who, "processes", size, 2)
    if sys.platform != "linux" or few_launches():
        where = "on the GPU" if few_launches() else f"on {sys.platform}"
        raise ValueError(
            f"{who}: processes must share memory of the host on Linux, got a run {where}. "
            "Leave processes out: threads share out the work instead."
        )
