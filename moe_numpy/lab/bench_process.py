"""The process of one side of a race: it builds its work, then answers one line with another.

    ["give", path]             write down the inputs and the parameters, for the other sides
    ["take", path]             take such inputs and parameters
    ["values", path]           compute the values that are compared, write them down
    ["go", repeats]            repeat the work; answer the seconds of each repetition
    ["tell", what]             answer one of the further facts that the work can tell
    ["peak"]                   answer the largest memory of the work so far, in bytes, or None

Both NumPy's side (this file as a program) and that of PyTorch (`tests/benchmarks`) serve by it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe_numpy.lab import race

COMPARED_STEPS = 2  # whose losses are compared, one update between; later, a near tie in the
# router of one token may fall differently on each side, and the losses part
SKETCHED = 1 << 20  # a gradient with more numbers is compared by one product with a fixed vector


class Work(NamedTuple):
    """What a side can do. `take` and `values` are for the comparison, `once` is what is timed.

    give      returns the arrays that the other sides are given; None for a side that is given them
    take      receives those arrays
    values    returns the arrays that must be equal
    once      does the work one time
    facts     further questions, each answered by JSON data
    """

    give: Callable[[], dict[str, np.ndarray]] | None
    take: Callable[[Any], None]
    values: Callable[[], dict[str, np.ndarray]]
    once: Callable[[], Any]
    facts: dict[str, Callable[[], Any]]


def serve(build: Callable[[dict[str, Any]], Work]) -> None:
    """Build the work of the first argument, then answer until there are no more questions."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not stand between the answers
    work = build(json.loads(sys.argv[1]))
    for line in sys.stdin:
        question, *words = json.loads(line)
        replies.write(json.dumps(_answer(work, question, words)) + "\n")
        replies.flush()


def _answer(work: Work, question: str, words: list[Any]) -> Any:
    if question == "give":
        np.savez(words[0], **work.give())
    elif question == "take":
        with np.load(words[0], allow_pickle=False) as given:
            work.take(given)
    elif question == "values":
        np.savez(words[0], **work.values())
    elif question == "go":
        return _timed(work.once, words[0])
    elif question == "tell":
        return work.facts[words[0]]()
    elif question == "peak":
        return peak_bytes()
    return None


def _timed(once: Callable[[], Any], repeats: int) -> dict[str, Any]:
    seconds, cpu = [], race.cpu_seconds()
    for _ in range(repeats):
        started = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "cpu": race.cpu_seconds() - cpu}


def sketch(name: str, gradient: np.ndarray) -> np.ndarray:
    """Shorten a large gradient for the comparison: its product with a fixed random vector."""
    if gradient.size <= SKETCHED or gradient.ndim < 2:
        return gradient
    fixed = np.random.default_rng(len(name)).standard_normal(gradient.shape[-1])
    return gradient @ fixed.astype(gradient.dtype)


def peak_bytes() -> int | None:
    """Tell the largest memory that this process has held at once; with its children, all together.

    None where nobody can tell, as on Windows.

    Linux counts a process's peak anew when it starts a program, but hands the one in
    `getrusage` on from whoever started it; so that is asked elsewhere only.

    For a family nobody keeps a peak. But `machine.keep_memory` gives nothing back, so what it holds
    after the work is the most that it has held: what is shared counts once, and so do the files of
    the programs.
    """
    children = [str(child.pid) for child in multiprocessing.active_children()]
    try:
        own = _kilobytes("self", "status")
        family = [_kilobytes(process, "smaps_rollup") for process in ("self", *children)]
        held = own["RssFile"] + sum(part["Pss_Anon"] + part["Pss_Shmem"] for part in family)
        return 1024 * max(own["VmHWM"], held if children else 0)
    except (OSError, KeyError):
        try:
            import resource  # here, since only Unix has it
        except ImportError:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _kilobytes(process: str, table: str) -> dict[str, int]:
    with open(f"/proc/{process}/{table}", encoding="ascii") as file:
        rows = [line.split() for line in file]
    return {row[0].rstrip(":"): int(row[1]) for row in rows if row[-1] == "kB"}


if __name__ == "__main__":
    from moe_numpy.lab import bench_process, bench_work

    bench_process.serve(bench_work.build)
