"""What a long run asks of the machine: memory that stays, and one thread for each shard.

Nothing here happens on import. Results do not depend on any of it, to the bit.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import ctypes
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

LARGEST_KEPT = 32 << 20  # bytes: the C library takes no larger one
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of malloc.h


def keep_memory() -> None:
    """Let the process keep the memory that arrays free, for the arrays of the next step.

    The GNU C library gives large blocks back to the system at once. A step then spends a good part
    of its time waiting for the same pages, emptied, to come again. Other C libraries are left as
    they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (TypeError, OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(M_TRIM_THRESHOLD, 1 << 30)


@contextlib.contextmanager
def workers(count: int) -> Iterator[concurrent.futures.Executor | None]:
    """Provide `count` threads, each of which runs its matrix products alone; None for just one.

    Without the library threadpoolctl the matrix products cannot be held to one thread each, and
    would fight for the cores: then there is just one, too.
    """
    try:
        limits = importlib.import_module("threadpoolctl").threadpool_limits if count > 1 else None
    except ImportError:
        limits = None
    if limits is None:
        yield None
        return
    with limits(1, user_api="blas"), concurrent.futures.ThreadPoolExecutor(count) as pool:
        yield pool


def share_out(jobs: list[Callable[[], Any]], pool: concurrent.futures.Executor | None) -> list[Any]:
    """Call all jobs, on the threads of `pool` if there are any, and list their results in order.

    Every job works in a copy of the caller's context, in which NumPy keeps its settings.
    """
    if pool is None:
        return [job() for job in jobs]
    waiting = [pool.submit(contextvars.copy_context().run, job) for job in jobs]
    return [future.result() for future in waiting]


def cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
