"""Many training runs at once: a process and a thread for each, one progress bar for all."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from moe_numpy import progress
from moe_numpy.training import loop


def run_all(
    title: str,
    work: Callable[..., Any],
    jobs: list[tuple],
    steps: int,
    processes: int | None = None,
    show_progress: bool = True,
) -> dict[Hashable, Any]:
    """Call `work(*job)` for every job in parallel processes; return the results by job.

    Parameters
    ----------
    work : a function of a module, which trains `steps` steps and calls `count_step` after each.
    processes : how many go on at once; None for one per processor core. Each uses one thread.
    """
    results: dict[Hashable, Any] = {}
    context = multiprocessing.get_context("spawn")
    steps_done, stop = context.Value("l", 0), context.Event()
    workers = workers_for(processes, len(jobs))
    with (
        _one_thread_each(),
        concurrent.futures.ProcessPoolExecutor(
            workers, context, _share, (steps_done, stop)
        ) as pool,
    ):
        waiting = {pool.submit(work, *job): job for job in jobs}
        with progress.bar(len(jobs) * steps, title, "step", show=show_progress) as bar:
            try:
                while waiting:
                    done, _ = concurrent.futures.wait(waiting, timeout=0.2)
                    for future in done:
                        results[waiting.pop(future)] = future.result()
                    bar.update(steps_done.value - bar.n)
            except BaseException:  # Ctrl-C, or a run that failed: the others end at their next step
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    return results


def workers_for(processes: int | None, jobs: int) -> int:
    """Tell how many processes `run_all` uses."""
    return min(processes or os.cpu_count() or 1, jobs)


# Children count their steps in one shared number, which moves the parent's progress bar, and end
# when the parent sets the event.

_steps_done: Any = None
_stop: Any = None


def _share(steps_done: Any, stop: Any) -> None:
    global _steps_done, _stop
    _steps_done, _stop = steps_done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent answers it


def count_step(_run: loop.Run) -> None:
    """Count one step of the run in this process; end it if the parent was stopped."""
    if _steps_done is not None:
        with _steps_done.get_lock():
            _steps_done.value += 1
        if _stop.is_set():
            raise KeyboardInterrupt


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let child processes that start inside the block run their matrix products on one thread."""
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
