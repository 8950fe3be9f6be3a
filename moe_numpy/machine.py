"""What a long run asks of the machine: memory that stays, threads that share jobs out, variables.

Nothing here happens on import. How many threads share jobs out changes no bit of a result; threads
that share one matrix product may.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of malloc.h
WORTH_A_THREAD = 32_768  # numbers

# Where the libraries of matrix products read how many threads they may start.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# Where a library is told to take other kernels than those it would choose for this processor.
KERNEL_VARIABLES = (
    *("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "NPY_DISABLE_CPU_FEATURES"),
    *("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"),
)

_pool: contextvars.ContextVar[tuple[concurrent.futures.Executor, int] | None]
_pool = contextvars.ContextVar("threads of share_out, and how many", default=None)


def keep_memory() -> None:
    """Let the process keep the memory that arrays free, for the arrays of the next step.

    The GNU C library gives what is free at the end of its memory back to the system, and at first
    every large block. A step may then spend a good part of its time waiting for the same pages,
    emptied, to come again. Other C libraries are left as they are.
    """
    _c_library("mallopt", M_MMAP_MAX, 0)  # no array gets pages of its own, which would go with it
    _c_library("mallopt", M_TRIM_THRESHOLD, 1 << 30)


def give_memory_back() -> None:
    """Give back what is free at this moment, before processes inherit it and each keeps its own."""
    _c_library("malloc_trim", 0)


def _c_library(function: str, *numbers: int) -> None:
    """Call a function that not every C library has."""
    with contextlib.suppress(TypeError, OSError, AttributeError):
        getattr(ctypes.CDLL(None), function)(*numbers)


@contextlib.contextmanager
def workers(count: int) -> Iterator[concurrent.futures.Executor | None]:
    """Let `share_out` use `count` threads within the block, each with matrix products of its own.

    One of them is the caller's own. A count of one starts no other, but holds the caller's products
    to one all the same: a product that several threads share is rounded in another way. Without the
    library threadpoolctl the products cannot be held to one thread each, and would fight for the
    cores: then, as for a count of zero, everything stays as it is.
    """
    limit = one_product_a_thread() if count else None
    if limit is None:
        yield None
        return
    with limit:
        if count == 1:
            yield None
            return
        with concurrent.futures.ThreadPoolExecutor(count - 1) as pool, sharing(pool, count):
            yield pool


def one_product_a_thread() -> contextlib.AbstractContextManager | None:
    """Hold every matrix product to one thread until the context is left; None if nothing can."""
    try:
        return importlib.import_module("threadpoolctl").threadpool_limits(1, user_api="blas")
    except ImportError:
        return None


def can_limit_products() -> bool:
    """Tell whether `one_product_a_thread` has the library that it needs."""
    return importlib.util.find_spec("threadpoolctl") is not None


@contextlib.contextmanager
def sharing(pool: concurrent.futures.Executor | None, threads: int = 2) -> Iterator[None]:
    """Let `threads` work for `share_out` within the block: the caller's and others of `pool`.

    None is for no pool: the caller does it all.
    """
    before = _pool.set(None if pool is None else (pool, threads))
    try:
        yield
    finally:
        _pool.reset(before)


def share_out(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Call all jobs, on the threads of `workers` if there are any; list their results in order.

    The caller works too, and who is done takes the next job. Helpers work in a copy of the caller's
    context, in which NumPy keeps its settings; what a job shares out in turn, it does itself. Who
    does a job changes no result. After an error nobody starts another one.
    """
    shared = _pool.get()
    if shared is None or len(jobs) < 2:
        return [job() for job in jobs]
    pool, threads = shared
    results: list[Any] = [None] * len(jobs)
    left = iter(range(len(jobs)))  # takes a step in one piece: no two threads get the same job

    def some() -> None:
        try:
            for i in left:
                results[i] = jobs[i]()
        finally:
            for _ in left:  # after an error: they are not to be done
                pass

    with sharing(None):
        helpers = [
            pool.submit(contextvars.copy_context().run, some)
            for _ in range(min(threads, len(jobs)) - 1)
        ]
        try:
            some()
        finally:
            running = [helper for helper in helpers if not helper.cancel()]
            concurrent.futures.wait(running)
    for helper in running:
        helper.result()
    return results


def for_each(work: Callable[[int], Any], count: int, size: int) -> None:
    """Call work(0), work(1), ... work(count - 1), on the threads of `workers` if there are any.

    All calls together touch `size` numbers. Where those of one call are few, threads would wait for
    each other's Python longer than they work: then the caller does it all.
    """
    if size < count * WORTH_A_THREAD:
        for i in range(count):
            work(i)
    else:
        share_out([functools.partial(work, i) for i in range(count)])


@contextlib.contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Change variables for the child processes that start within the block; None takes one out."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
