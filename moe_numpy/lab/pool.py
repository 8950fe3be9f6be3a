"""Many training runs at once: a process and a thread for each, one progress bar for all."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Hashable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from moe_numpy import machine, progress
from moe_numpy.training import loop

WINDOWS_MOST = 61  # processes that Python's pool can wait for there


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

    Raises     ChildProcessError if a process ended before its runs
    """
    results: dict[Hashable, Any] = {}
    context = multiprocessing.get_context("spawn")
    steps_done, stop = context.Value("l", 0), context.Event()
    workers = workers_for(processes, len(jobs))
    with (
        machine.environment(dict.fromkeys(machine.THREAD_VARIABLES, "1")),
        concurrent.futures.ProcessPoolExecutor(
            workers, context, _share, (steps_done, stop)
        ) as pool,
    ):
        try:
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                waiting = thread.submit(_start, pool, work, jobs).result()
            with progress.bar(len(jobs) * steps, title, "step", show=show_progress) as bar:
                while waiting:
                    done, _ = concurrent.futures.wait(waiting, timeout=0.2)
                    for future in done:
                        results[waiting.pop(future)] = future.result()
                    bar.update(steps_done.get_obj().value - bar.n)  # who died may hold the lock
        except BrokenProcessPool:  # which has ended the others, too
            raise ChildProcessError(
                f"{title}: every process must finish its runs, got the end of one of {workers}; "
                "the system may have been short of memory. Start again with fewer --processes. "
                "(A program of yours must be a file, and call this under `if __name__ == "
                "'__main__'`.)"
            ) from None
        except BaseException:  # Ctrl-C, or a run that failed: the others end at their next step
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return results


def workers_for(processes: int | None, jobs: int) -> int:
    """Tell how many processes `run_all` uses."""
    most = WINDOWS_MOST if sys.platform == "win32" else jobs
    return min(processes or machine.cores(), jobs, most)


def _start(
    pool: concurrent.futures.Executor, work: Callable[..., Any], jobs: list[tuple]
) -> dict[concurrent.futures.Future, tuple]:
    """Start the processes and hand them the jobs; return these by their futures.

    In a thread of its own: Ctrl-C interrupts the main thread, so no start is left half done, and
    the processes inherit from this thread that Ctrl-C is blocked, before they can ignore it.
    """
    if hasattr(signal, "pthread_sigmask"):  # Windows has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    return {pool.submit(work, *job): job for job in jobs}


# Children count their steps in one shared number, which moves the parent's progress bar. They end
# when the parent sets the event, or is no more.

_steps_done: Any = None
_stop: Any = None


def _share(steps_done: Any, stop: Any) -> None:
    global _steps_done, _stop
    _steps_done, _stop = steps_done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait until the parent has ended, as one that was killed could not end its children."""
    multiprocessing.parent_process().join()
    os._exit(1)


def count_step(_run: loop.Run) -> None:
    """Count one step of the run in this process; end it if the parent was stopped."""
    if _steps_done is not None:
        with _steps_done.get_lock():
            _steps_done.value += 1
        if _stop.is_set():
            raise KeyboardInterrupt
