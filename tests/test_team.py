"""Processes that take steps together: the bits of one process, and an end that leaves nobody."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_commands import ROOT, complaint, elsewhere, main, run  # noqa: F401
from test_shards import LAYERS
from test_stopping import same_end

from moe_numpy import machine, processes, tree
from moe_numpy.config import SGD, AdamW
from moe_numpy.training import loop, optimizer, shards, team

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has teams")


@contextlib.contextmanager
def a_team(parts=2, size=2, moe=None, **changes):
    here = tiny.run(moe, shards=parts, **changes)
    with loop.members(here, size) as crew:
        yield here, crew


def pairs_of(*trees):
    return zip(*map(tree.leaves, trees), strict=True)


# ------------------------------------------------------------------------------------------- bits
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("parts", "size"), [(2, 2), (4, 2), (4, 3), (4, 4)])
def test_processes_change_no_bit_of_a_training_run(name, parts, size, monkeypatch):
    asked, each = [], team.Team._each
    monkeypatch.setattr(team.Team, "_each", lambda *a: asked.append(a[0].size) or each(*a))
    runs = [tiny.run(LAYERS[name], shards=parts) for _ in range(2)]
    loop.train(runs[0], show_progress=False, threads=1)
    assert not asked
    loop.train(runs[1], show_progress=False, processes=size)
    assert asked == [size] * 3 * runs[1].step  # gradients, their sum and the update of each step
    assert tiny.same_run(*runs)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": SGD()},
        {"optimizer": AdamW(skip_idle=True)},
        {"dtype": "float64", "smoothing": 0.1},
        {"clip": 0.01},
        {"clip": None},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_nor_under_other_settings(changes):
    layer = tiny.moe(num_experts=8, top_k=1, bias_rate=0.01)
    runs = [tiny.run(layer, shards=2, **changes) for _ in range(2)]
    loop.train(runs[0], show_progress=False, threads=1)
    loop.train(runs[1], show_progress=False, processes=2)
    assert tiny.same_run(*runs)


@pytest.mark.parametrize("name", ["params", "state"])
def test_other_arrays_in_the_place_of_the_shared_ones_are_refused(name):
    here = tiny.run(shards=2)
    replace = lambda run: setattr(run, name, tree.map(np.copy, getattr(run, name)))  # noqa: E731
    with pytest.raises(ValueError, match="take_step: with processes the run must keep"):
        loop.train(here, show_progress=False, processes=2, on_step=replace)
    assert here.step == 1


def test_the_team_leaves_the_gradients_and_tells_their_norm():
    with a_team(4, 3, tiny.moe()) as (here, crew):
        token_BT, target_BT = np.random.default_rng(0).integers(0, here.cfg.vocab_size, (2, 4, 16))
        _, grads = shards.gradients(token_BT, target_BT, here.params, here.cfg, shards=4)
        for _ in range(2):
            _, norm = crew.gradients(token_BT, target_BT)
            assert tiny.same_bits(crew.grads[0], grads)
            assert norm.tobytes() == optimizer.norm(grads).tobytes()
            assert crew.own == {}  # nobody keeps what is added up


def test_a_run_goes_on_after_its_team_and_with_another():
    whole, parted = (tiny.run(tiny.moe(), shards=2) for _ in range(2))
    loop.train(whole, show_progress=False, threads=1)
    for size in (2, 1, 2):
        with loop.members(parted, size) as crew:
            for _ in range(3):
                loop.take_step(parted, crew)
    loop._evaluate_now(parted)
    whole.evaluations[:-1] = []
    assert tiny.same_run(whole, parted)


# ----------------------------------------------------------------------------------------- sharing
def _who(crew, rank):
    return [(rank, os.getpid())]


def _threads_of_a_product(crew, rank):
    import threadpoolctl

    _ = np.ones((4, 4)) @ np.ones((4, 4))
    return [lib["num_threads"] for lib in threadpoolctl.threadpool_info()]


def test_every_member_is_a_process_and_the_caller_is_one_of_them():
    with a_team(4, 3) as (_, crew):
        found = crew._each(_who)
        assert [rank for rank, _ in found] == [0, 1, 2]
        children = {child.pid for child in multiprocessing.active_children()}
        assert found[0][1] == os.getpid() and children >= {pid for _, pid in found[1:]}


def test_members_do_not_inherit_what_is_free(monkeypatch):
    before, forked = set(multiprocessing.active_children()), []
    note = lambda: forked.append(set(multiprocessing.active_children()) - before)  # noqa: E731
    monkeypatch.setattr(machine, "give_memory_back", note)
    with a_team(4, 3):
        assert forked == [set()]


def test_every_member_multiplies_on_one_thread():
    control = pytest.importorskip("threadpoolctl")
    with control.threadpool_limits(2, user_api="blas"), a_team() as (_, crew):
        assert set(crew._each(_threads_of_a_product)) == {1}


def test_no_member_waits_for_threads_that_stayed_behind(monkeypatch):
    monkeypatch.setattr(machine, "WORTH_A_THREAD", 1)
    with ThreadPoolExecutor(2) as pool, machine.sharing(pool):
        list(pool.map(time.sleep, [0.01] * 2))  # both threads are there
        with a_team() as (here, crew):
            loop.take_step(here, crew)
        assert machine._pool.get()[0] is pool


def test_gradients_have_one_tree_fewer_than_shards_if_every_member_has_one():
    for parts, size, trees in ((2, 2, 1), (4, 4, 3), (4, 2, 2), (4, 3, 3)):
        with a_team(parts, size) as (here, crew):
            arrays = len(tree.leaves(here.params))
            assert len(crew.grads) == trees
            assert sorted(at for share in crew.shares for at in share) == list(range(arrays))
            work = [sum(tree.leaves(here.params)[at].size for at in share) for share in crew.shares]
            assert max(work) < 1.5 * min(work)


def test_the_arrays_lie_apart_on_lines_of_the_cache_and_keep_their_values():
    before = tiny.run(tiny.moe())
    room = tree.in_one_block(before.params, processes.shared)
    assert tiny.same_bits(room, before.params)
    ends = 0
    for moved, old in pairs_of(room, before.params):
        assert not np.shares_memory(moved, old) and moved.flags.c_contiguous
        assert moved.ctypes.data % tree.LINE == 0 and moved.ctypes.data >= ends
        ends = moved.ctypes.data + moved.nbytes


# --------------------------------------------------------------------------------------------- end
def _fail_in_a_way_of_its_own(crew, rank):
    class OwnError(Exception):
        """One that no other process could know."""

    if rank:
        raise OwnError("of member 1")
    return []


def test_an_exception_that_cannot_be_sent_is_told_all_the_same():
    with a_team(parts=2, size=2) as (_, crew):
        with pytest.raises(
            RuntimeError, match=r"OwnError\('of member 1'\) could not be sent: Can't"
        ):
            crew._each(_fail_in_a_way_of_its_own)
        assert [rank for rank, _ in crew._each(_who)] == [0, 1]


def test_members_can_be_started_again():
    crew = processes.Processes(2)
    for _ in range(2):
        with crew:
            assert [rank for rank, _ in crew._each(_who)] == [0, 1]


def _fail(crew, rank):
    if rank == 1:
        raise FloatingPointError("overflow in member 1")
    return []


def _die(crew, rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return []


def _answer_late(crew, rank):
    if rank == 1:
        time.sleep(0.2)
    return [rank]


def test_a_late_answer_is_waited_for_asleep():
    with a_team() as (_, crew):
        before = time.process_time()
        assert crew._each(_answer_late) == [0, 1]
        assert time.process_time() - before < 0.1


def test_what_a_member_raises_is_raised_here_and_the_team_goes_on():
    with a_team() as (_, crew):
        with pytest.raises(FloatingPointError, match="overflow in member 1"):
            crew._each(_fail)
        assert len(crew._each(_who)) == 2


def test_the_end_of_a_member_is_told_and_the_block_is_left():
    started = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"every process must answer.*last checkpoint"):
        with a_team(4, 3) as (_, crew):
            crew._each(_die)
    assert not multiprocessing.active_children() and time.monotonic() - started < processes.PATIENCE


class OddError(Exception):
    """Can be sent, but not received: it wants two arguments, and pickle brings one."""

    def __init__(self, a, b):
        super().__init__(a)


def _fail_oddly(crew, rank):
    if rank == 1:
        raise OddError("a", "b")
    return [rank]


def _interrupt(crew, rank):
    if rank == 0:
        raise KeyboardInterrupt
    return ["late"]


@pytest.mark.parametrize(("do", "problem"), [(_fail_oddly, TypeError), (_interrupt, BaseException)])
def test_no_answer_is_taken_for_that_of_a_later_call(do, problem):
    with pytest.raises(ChildProcessError):
        with a_team(4, 3) as (_, crew):
            with pytest.raises(problem):
                crew._each(do)
            crew._each(_who)
    assert not multiprocessing.active_children()


def test_memory_that_cannot_be_shared_is_told_as_memory():
    with pytest.raises(MemoryError, match=r"allocate \d+\.0 MiB that processes share"):
        processes.shared(1 << 62)


def test_an_interrupt_while_the_team_starts_stops_the_run_after_a_step(monkeypatch):
    monkeypatch.setattr(machine, "give_memory_back", lambda: os.kill(os.getpid(), signal.SIGINT))
    here = tiny.run(tiny.moe(), shards=2)
    with pytest.raises(KeyboardInterrupt):
        loop.train(here, show_progress=False, processes=2)
    assert here.step == 1 and not multiprocessing.active_children()


def test_a_loss_that_blows_up_is_told_as_without_a_team():
    bad = tiny.run(tiny.moe(), shards=2)
    bad.params.token_VC[:] = np.inf
    with pytest.raises(ValueError, match="the loss must stay finite, got nan at step 1"):
        loop.train(bad, show_progress=False, processes=2)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_run_that_is_stopped_and_it_goes_on_to_the_same_bits(number):
    Path("text").write_text(tiny.text(), encoding="utf-8")
    flags = [*tiny.FLAGS, "--steps", "120", "--shards", "2", "--text", "text", "--save-every", "3"]
    assert run("train", *flags, "--out", "whole", cwd=os.getcwd()).returncode == 0
    with subprocess.Popen(
        [sys.executable, "-m", "moe_numpy", "train", *flags, "--processes", "2", "--out", "o"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while len(_processes(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.002)
        assert len(_processes(process.pid)) == 2
        time.sleep(0.2)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in (0, 130, -number)
    while _processes(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _processes(process.pid)
    done = run("train", "--resume", "o", cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    assert same_end("o", "whole")


def _processes(group):
    """List the processes of a group that are at work."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                found.append(path.parent.name)
    return found


# ---------------------------------------------------------------------------------------- refusals
def test_more_processes_than_shards_are_refused_and_no_folder_is_made(capsys):
    flags = [*tiny.FLAGS, "--processes", "3", "--shards", "2", "--out", "o"]
    told = complaint(main(capsys, "train", *flags, status=1).err)
    assert "processes must be at most the shards of a step (2), got 3. Change either." in told
    assert not Path("o").exists()


@pytest.mark.parametrize("size", [0, -2])
def test_a_team_of_nobody_is_refused(size):
    with pytest.raises(ValueError, match=f"processes must be a whole number .*least 1, got {size}"):
        loop.train(tiny.run(shards=2), show_progress=False, processes=size)


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match=r"on Linux, got a run on darwin\. Leave processes out"):
        team.require_possible(2, 2)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(processes, "few_launches", lambda: True)
    with pytest.raises(ValueError, match="on Linux, got a run on the GPU"):
        team.require_possible(2, 2)


def test_a_team_of_one_and_impossible_numbers_are_refused_before_anything_is_written(tmp_path):
    run = tiny.run(tiny.moe(), shards=2)
    with pytest.raises(ValueError, match="team: processes must be a whole number of at least 2"):
        team.Team(run.params, run.state, run.cfg, run.training, 1)
    for number, words in ((0, "train: processes must"), (3, r"at most the shards .* got 3")):
        with pytest.raises(ValueError, match=words):
            loop.train(run, tmp_path / "run.npz", show_progress=False, processes=number)
    assert not (tmp_path / "run.npz").exists()
