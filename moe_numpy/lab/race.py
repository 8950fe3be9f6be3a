"""Races: the same work by two or more programs, in processes of their own, taking turns.

Each side is one process with its own thread pool. All sides load what the first one wrote down, so
they compute the same function of the same numbers; their values are compared before any clock
starts. Then they run short blocks in turns, A B A B, with a gap between them in which the pool of
the side that has finished falls asleep. The ratio of a round pairs two blocks that ran side by
side, so what slows the machine down for minutes slows both down.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_numpy import machine

TOLERANCE = 1e-4  # largest difference of two tensors, relative to the largest of the first side's
CHANGES = 0.1  # the same for changes of parameters, by their norms: AdamW divides a gradient by its
# size, so what is next to zero may go either way
BUSY = 0.15  # share of the machine's time that others took: more marks the round
GAP = 0.1  # seconds between two blocks
A_LITTLE = 3  # repetitions after which a worker has needed all its memory
QUIET_ROUNDS = 3  # as many must be left for the busy ones to be set aside
PATIENCE = 4  # times the rounds that were asked for: then no further quiet ones are waited for


class Worker(NamedTuple):
    """One side of a race: a program that serves `bench_process`, and what it is to build."""

    name: str
    command: tuple[str, ...]
    spec: dict[str, Any]


class Process:
    """A worker at work: `ask` sends one line and waits for the line that answers it."""

    def __init__(self, worker: Worker) -> None:
        threads = str(worker.spec["threads"])
        self.name = worker.name
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*worker.command, json.dumps(worker.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | dict.fromkeys(machine.THREAD_VARIABLES, threads),
        )

    def ask(self, *words: Any) -> Any:
        """Send a question, return the answer.

        Raises     ValueError if the worker ended instead; the last line of its complaint is told
        """
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            complaint = (self._errors.read().strip() or "no word").splitlines()[-1]
            raise ValueError(
                f"race: {self.name} must answer, got its end: {complaint}. Run it by itself."
            )
        return json.loads(answer)

    def close(self) -> None:
        """End the worker and wait for its end."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def race_all(
    workers: list[Worker],
    rounds: int,
    block: float = 0.5,
    same: bool = True,
    patience: int = PATIENCE,
) -> dict[str, Any]:
    """Let all workers take turns and relate their times to those of the first.

    Parameters
    ----------
    rounds : quiet ones; a busy round is marked and repeated, up to `patience` times as many in all.
    block : about how many seconds a block takes: a whole number of repetitions, at most 1000.
    same : whether the values must be equal; False for sides that compute different functions.

    Returns
    -------
    dict
        "sides": for each worker its name, "milliseconds" of one repetition and "ratio" (its time
        over that of the first in the same round), each as median, low and high; "rounds" that
        these are taken from, "busy" rounds among all, and "difference", the largest found between
        the values.

    Raises
    ------
    ValueError
        if the values of two sides differ by more than `TOLERANCE`, or a side does not answer.
    """
    with tempfile.TemporaryDirectory() as folder, started(workers) as processes:
        difference = prepare(processes, Path(folder)) if same else None
        repeats = [_warm_up(process, block) for process in processes]
        times, foreign = [], []
        while wanted(foreign, rounds, patience):
            turns = [_turn(p, n) for p, n in zip(processes, repeats, strict=True)]
            times.append([seconds for seconds, _ in turns])
            foreign.append(max(share for _, share in turns))
    sides, kept = summarize([worker.name for worker in workers], times, foreign)
    busy = sum(share > BUSY for share in foreign)
    return {"sides": sides, "rounds": kept, "busy": busy, "difference": difference}


def this_package() -> dict[str, str]:
    """Tell by a variable where all workers find the package: here, not in another checkout."""
    own, given = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([own, given] if given else [own])}


def tell(workers: list[Worker], facts: tuple[str, ...] = ()) -> list[dict]:
    """Start the workers one after the other, let each work a little, and ask for its facts.

    Returns     for each, "built" and "peak" (bytes of memory before and after the work, or None)
                and the answers to `facts`, which the first alone is asked
    """
    with tempfile.TemporaryDirectory() as folder:
        given, found = str(Path(folder, "given.npz")), []
        for worker in workers:
            with started([worker]) as [process]:
                if not found:
                    process.ask("give", given)
                process.ask("take", given)
                answers = {"built": process.ask("peak")}
                process.ask("go", A_LITTLE)
                answers |= {"peak": process.ask("peak")}
                answers |= {} if found else {fact: process.ask("tell", fact) for fact in facts}
                found.append(answers)
        return found


@contextlib.contextmanager
def started(workers: list[Worker]) -> Iterator[list[Process]]:
    """Start every worker, and end them all when the block is left."""
    with contextlib.ExitStack() as stack:
        processes = []
        for worker in workers:
            processes.append(Process(worker))
            stack.callback(processes[-1].close)
        yield processes


def prepare(processes: list[Process], folder: Path) -> float:
    """Let the first process write its inputs, all compute their values, and compare those.

    Returns     the largest difference
    """
    given, worst, first = str(folder / "given.npz"), 0.0, processes[0]
    first.ask("give", given)
    for i, process in enumerate(processes):
        found = folder / f"values_{i}.npz"
        process.ask("take", given)
        process.ask("values", str(found))
        if i:
            worst = max(worst, compare(first.name, folder / "values_0.npz", process.name, found))
            found.unlink()
    return worst


def compare(name_a: str, path_a: Path, name_b: str, path_b: Path) -> float:
    """Find the largest difference between two files, relative to the first one's largest value.

    Changes ("change." and the name of a parameter) are held to `CHANGES` and not counted.

    Raises     ValueError if it is above `TOLERANCE`, or the files do not hold the same names
    """
    worst = 0.0
    with np.load(path_a, allow_pickle=False) as a, np.load(path_b, allow_pickle=False) as b:
        if sorted(a.files) != sorted(b.files):
            odd = ", ".join(sorted(set(a.files) ^ set(b.files)))
            raise ValueError(f"race: {name_a} and {name_b} must answer alike, got {odd} from one.")
        for name in a.files:
            left, right = a[name].astype(np.float64), b[name].astype(np.float64)
            change, same_shape = name.startswith("change."), left.shape == right.shape
            norm = np.linalg.norm if change else lambda x: np.abs(x).max()
            size, allowed = max(float(norm(left)), 1e-30), CHANGES if change else TOLERANCE
            apart = float(norm(left - right)) / size if same_shape else np.inf
            if not apart <= allowed:
                raise ValueError(
                    f"race: {name_a} and {name_b} must compute the same {name} to {allowed:g}, "
                    f"got a relative difference of {apart:.1e}. Nothing was timed."
                )
            worst = worst if change else max(worst, apart)
    return worst


def summarize(
    names: list[str], times: list[list[float]], foreign: list[float]
) -> tuple[list[dict[str, Any]], int]:
    """Take medians and spreads over the quiet rounds, or over all if too few were quiet.

    Parameters
    ----------
    times : rounds of seconds, one for each name.
    foreign : of each round, the share of the machine's time that others took.

    Returns     the sides, and the number of rounds that were used
    """
    rows, sides = used(times, foreign), []
    for i, name in enumerate(names):
        ratio = spread([row[i] / row[0] for row in rows]) if i else None
        milliseconds = spread([1e3 * row[i] for row in rows])
        sides.append({"name": name, "milliseconds": milliseconds, "ratio": ratio})
    return sides, len(rows)


def spread(values: list[float]) -> dict[str, float]:
    """Describe values by their median and their ends."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def used(rows: list[Any], foreign: list[float]) -> list[Any]:
    """Choose the quiet rows, or all if too few were quiet.

    `foreign` is, for each, the share of the machine's time that others took.
    """
    quiet = [row for row, share in zip(rows, foreign, strict=True) if share <= BUSY]
    return quiet if len(quiet) >= min(QUIET_ROUNDS, len(rows)) else rows


def wanted(foreign: list[float], rounds: int, patience: int = PATIENCE) -> bool:
    """Tell whether there must be another round: too few were quiet, and there is patience left."""
    return sum(share <= BUSY for share in foreign) < rounds and len(foreign) < patience * rounds


def _warm_up(process: Process, block: float) -> int:
    """Run until the caches are warm; tell how many repetitions fill a block."""
    process.ask("go", 1)
    seconds = min(process.ask("go", 2)["seconds"])
    return max(1, min(1000, round(block / seconds)))


def _turn(process: Process, repeats: int) -> tuple[float, float]:
    """Run one block: the median time of a repetition, and the share of time that others took."""
    time.sleep(GAP)
    busy, started_at = machine_seconds(), time.perf_counter()
    answer = process.ask("go", repeats)
    others = share_of_others(busy, started_at, answer["cpu"])
    return statistics.median(answer["seconds"]), others


def share_of_others(busy: float | None, started_at: float, own: float) -> float:
    """Tell the share of the machine's time that others took since `started_at`.

    `busy` is what `machine_seconds` said then, `own` the seconds of work that were not the others'.
    """
    if busy is None:
        return 0.0
    took = (time.perf_counter() - started_at) * (os.cpu_count() or 1)
    return max(0.0, (machine_seconds() - busy - own) / took)


def cpu_seconds() -> float:
    """Add up the time that this process and those that it started have worked."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        with open(f"/proc/{child.pid}/stat", encoding="ascii") as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def machine_seconds() -> float | None:
    """Add up the time that all cores have worked since the start; None where nobody counts it."""
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _wait, irq, softirq, steal = map(
            int, file.readline().split()[1:9]
        )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
