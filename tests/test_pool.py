"""Many runs at once: how many processes there are, and what becomes of them if one dies."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_numpy import machine
from moe_numpy.lab import pool

ROOT = Path(__file__).parent.parent


def test_there_is_a_process_for_each_core_that_may_be_used_but_none_without_a_job(monkeypatch):
    assert pool.workers_for(None, 1000) == machine.cores()
    monkeypatch.setattr(machine, "cores", lambda: 100)
    assert pool.workers_for(None, 1000) == 100 and pool.workers_for(None, 20) == 20
    assert pool.workers_for(70, 1000) == 70
    monkeypatch.setattr(sys, "platform", "win32")
    assert pool.workers_for(None, 1000) == pool.workers_for(70, 1000) == 61
    assert pool.workers_for(None, 20) == 20


def test_cores_are_those_that_the_process_may_use_or_all_where_nobody_tells(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert machine.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.cores() == 64


def test_what_is_changed_for_children_is_then_what_it_was(monkeypatch):
    first, *others = machine.THREAD_VARIABLES
    monkeypatch.setenv(first, "7")
    for name in others:
        monkeypatch.delenv(name, raising=False)
    with machine.environment(dict.fromkeys(machine.THREAD_VARIABLES, "1")):
        assert [os.environ.get(name) for name in machine.THREAD_VARIABLES] == ["1"] * 3
    assert [os.environ.get(name) for name in machine.THREAD_VARIABLES] == ["7", None, None]


def test_a_run_in_the_pool_has_one_thread_for_its_products(monkeypatch):
    for name in machine.THREAD_VARIABLES:
        monkeypatch.setenv(name, "5")
    found = pool.run_all(
        "t", os.getenv, [(name,) for name in machine.THREAD_VARIABLES], 1, 2, False
    )
    assert set(found.values()) == {"1"}


def test_results_come_by_job_and_an_error_of_a_run_is_its_own():
    jobs = [(8, 2), (9, 3)]
    assert pool.run_all("t", divmod, jobs, 1, 2, False) == {(8, 2): (4, 0), (9, 3): (3, 0)}
    with pytest.raises(ZeroDivisionError):
        pool.run_all("t", divmod, [(1, 0)], 1, 1, False)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")
def test_a_killed_process_is_told_in_a_line_that_says_what_to_do():
    problem = r"study: every process must .* got the end of one of 2; .* fewer --processes\."
    with pytest.raises(ChildProcessError, match=problem):
        pool.run_all("study", signal.raise_signal, [(signal.SIGKILL,), (0,)], 1, 2, False)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")
def test_the_processes_of_a_killed_study_end_too():
    job = "import time; print('at work', flush=True); time.sleep(60)  # "
    code = "from moe_numpy.lab import pool\n"
    code += f"pool.run_all('t', exec, [({job + '1'!r},), ({job + '2'!r},)], 1, 2, False)"
    study = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert [study.stdout.readline() for _ in range(2)] == [b"at work\n"] * 2
        study.kill()
        study.communicate(timeout=20)  # until nobody can write there any more
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows blocks no signals")
@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5])
def test_processes_that_are_still_importing_do_not_hear_ctrl_c(delay):
    code = "from moe_numpy.lab import pool; import time; print('imported', flush=True)\n"
    # Jobs that outlast the delays: Python ignores Ctrl-C in the clean-up of a pool that is done.
    code += "pool.run_all('t', time.sleep, [(1.0,), (1.1,)], 1, 2, False); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout.readline() == "imported\n"
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    # The parent's alone; it may come while the parent handles another exception, in an import.
    assert err.splitlines().count("KeyboardInterrupt") == 1, err
    assert err.endswith("KeyboardInterrupt\n") and "Process Spawn" not in err, err
