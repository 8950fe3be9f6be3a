"""Shards of a batch: their mean, the same bits on any number of threads, and the machine's part."""

import ctypes
import functools
import importlib
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny

from moe_numpy import machine, tree
from moe_numpy.config import (
    Capacity,
    LearnedNoise,
    LoadLoss,
    SoftSlots,
    SwitchLoss,
    TrainingConfig,
)
from moe_numpy.ops import rows
from moe_numpy.training import loop, shards
from moe_numpy.transformer import model

ROOT = Path(__file__).parent.parent
B, SHARDS = 6, 3
T = 16
LAYERS = {
    "dense": None,
    "no limit": tiny.moe(),
    "noise, places, losses": tiny.moe(
        noise=LearnedNoise(), capacity=Capacity(factor=0.7), balance=(SwitchLoss(), LoadLoss())
    ),
}


def drawn(cfg, dtype="float64"):
    """Draw a batch, parameters and noise."""
    rng = np.random.default_rng(4)
    token_BT, target_BT = rng.integers(0, cfg.vocab_size, (2, B, T))
    params = model.init_model(rng, cfg, dtype)
    return token_BT, target_BT, params, cfg, model.draw_noise(rng, cfg, B * T, dtype)


def alone(shard, token_BT, target_BT, params, cfg, noise):
    """Compute the report and the gradients of one shard as if it were the whole batch."""
    size = B // SHARDS
    own = slice(shard * size, (shard + 1) * size)
    noise = noise and [None if n is None else n.reshape(B, T, -1)[own] for n in noise]
    noise = noise and tuple(None if n is None else n.reshape(size * T, -1) for n in noise)
    one, report, cache = model.loss_forward(token_BT[own], target_BT[own], params, cfg, noise)
    return report, model.loss_backward(np.ones_like(one), cache)


def assert_close(found, expected):
    for (name, a), b in zip(tree.named_leaves(found), tree.leaves(expected), strict=True):
        size = max(np.abs(b).max(initial=0.0), 1e-9)
        assert np.abs(a - b).max(initial=0.0) < 1e-12 * size, name


def same_bits(found, expected):
    """Compare reports and gradients; the count of drops is a plain number."""
    return tiny.same_bits(tree.map(np.asarray, found), tree.map(np.asarray, expected))


@pytest.fixture
def two_threads():
    pytest.importorskip("threadpoolctl")
    with machine.workers(2) as pool:
        assert pool is not None
        yield


# ------------------------------------------------------------------------------------------ shards
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_the_mean_of_the_shards_each_run_alone(name):
    batch = drawn(tiny.model(LAYERS[name]))
    report, grads = shards.gradients(*batch, shards=SHARDS)
    reports, each = zip(*(alone(s, *batch) for s in range(SHARDS)), strict=True)
    assert_close(grads, tree.map(lambda *parts: sum(parts) / SHARDS, *each))
    for field in ("cross_entropy", "aux"):
        mean = sum(getattr(r, field) for r in reports) / SHARDS
        np.testing.assert_allclose(getattr(report, field), mean, rtol=1e-13)
    assert len(report.layers) == (0 if name == "dense" else 2)
    for at, layer in enumerate(report.layers):
        for field in ("wished_E", "load_E", "dropped"):
            parts = [getattr(r.layers[at], field) for r in reports]
            assert np.array_equal(getattr(layer, field), np.sum(parts, axis=0))
        for field in ("decisiveness", "gate_entropy"):
            parts = [getattr(r.layers[at], field) for r in reports]
            np.testing.assert_allclose(getattr(layer, field), np.mean(parts), rtol=1e-13)
    if name == "noise, places, losses":
        assert all(layer.dropped > 0 for layer in report.layers)


def test_one_shard_is_the_plain_batch_to_the_bit():
    batch = drawn(tiny.model(LAYERS["noise, places, losses"]), "float32")
    loss, report, cache = model.loss_forward(*batch)
    found = shards.gradients(*batch)
    assert same_bits(found, (report, model.loss_backward(np.ones_like(loss), cache)))


@pytest.mark.parametrize("name", ["dense", "no limit"])
def test_without_limits_and_losses_shards_differ_by_rounding_alone(name):
    batch = drawn(tiny.model(LAYERS[name]))
    one, many = shards.gradients(*batch), shards.gradients(*batch, shards=SHARDS)
    assert_close(many[1], one[1])


def test_shards_are_the_routing_groups_of_their_size():
    """Places and losses of a shard are those of a group of as many tokens."""
    group = B // SHARDS * T

    def grouped(size):
        capacity = Capacity(factor=0.7, group=size)
        return drawn(tiny.model(tiny.moe(capacity=capacity, balance=(SwitchLoss(group=size),))))

    in_groups = shards.gradients(*grouped(group))
    in_shards = shards.gradients(*grouped(None), shards=SHARDS)
    together = shards.gradients(*grouped(None))
    assert_close(in_shards[1], in_groups[1])
    np.testing.assert_allclose(in_shards[0].aux, in_groups[0].aux, rtol=1e-13)
    assert [r.dropped for r in in_shards[0].layers] == [r.dropped for r in in_groups[0].layers]
    assert abs(together[0].aux - in_shards[0].aux) > 1e-6
    assert [r.dropped for r in together[0].layers] != [r.dropped for r in in_shards[0].layers]


# ----------------------------------------------------------------------------------------- threads
@pytest.mark.parametrize("name", LAYERS)
def test_threads_change_no_bit_of_the_gradients(name, two_threads):
    batch = drawn(tiny.model(LAYERS[name]), "float32")
    with machine.sharing(None):
        one = shards.gradients(*batch, shards=SHARDS)
    assert same_bits(shards.gradients(*batch, shards=SHARDS), one)


def test_threads_change_no_bit_of_a_training_run(monkeypatch):
    pytest.importorskip("threadpoolctl")
    runs, shared, submit = [], [], ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *a: shared.append(1) or submit(*a))
    for threads in (1, 2):
        runs.append(tiny.run(LAYERS["noise, places, losses"], shards=2))
        assert not shared
        loop.train(runs[-1], show_progress=False, threads=threads)
    assert len(shared) >= runs[0].step  # each step had a thread beside the caller's
    assert tiny.same_run(*runs)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_a_loop_has_work_for_every_thread_and_leaves_nothing_out(threads):
    together, seen = threading.Barrier(threads, timeout=30), []

    def work(i):
        if i < threads:  # the first calls wait until all threads have one, the caller's among them
            together.wait()
        seen.append(i)

    with ThreadPoolExecutor(threads) as pool, machine.sharing(pool, threads):
        machine.for_each(work, 40, 40 * machine.WORTH_A_THREAD)
    assert sorted(seen) == list(range(40))


def test_threads_work_under_the_settings_of_the_one_that_called_them(two_threads):
    batch = drawn(tiny.model(), "float32")
    batch[2].token_VC[:] = 3e38
    with pytest.raises(FloatingPointError):
        shards.gradients(*batch, shards=2)
    with np.errstate(all="ignore"):
        shards.gradients(*batch, shards=2)


def test_threads_share_out_experts_and_blocks_and_change_no_bit(two_threads, monkeypatch):
    """What one shard is made of: experts, blocks of an activation, arrays of the optimizer."""
    shared, submit = [], ThreadPoolExecutor.submit
    monkeypatch.setattr(machine, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(rows, "BLOCK", 50)
    with machine.sharing(None):
        one = tiny.run(tiny.moe(activation="swiglu"))
        loop.take_step(one)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *a: shared.append(1) or submit(*a))
    two = tiny.run(tiny.moe(activation="swiglu"))
    loop.take_step(two)
    assert tiny.same_bits((one.params, one.state), (two.params, two.state))
    assert len(shared) > 12


def test_a_job_shares_nothing_out_in_turn(two_threads, monkeypatch):
    together, shared, submit = threading.Barrier(2, timeout=30), [], ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *a: shared.append(1) or submit(*a))

    def outer():
        together.wait()  # one in each thread
        return threading.get_ident(), *machine.share_out([threading.get_ident] * 3)

    threads = [set(found) for found in machine.share_out([outer] * 2)]
    assert [len(found) for found in threads] == [1, 1] and threads[0] != threads[1]
    assert {threading.get_ident()} in threads and len(shared) == 1


def test_jobs_shared_out_return_in_their_order_and_an_error_is_the_callers(two_threads):
    assert machine.share_out([functools.partial(pow, i, 2) for i in range(50)]) == [
        i * i for i in range(50)
    ]
    together = threading.Barrier(2, timeout=30)

    def fail_in(here):
        together.wait()
        if (threading.get_ident() == caller) == here:
            raise ZeroDivisionError

    caller = threading.get_ident()
    for here in (True, False):  # in the caller's thread, in the other
        with pytest.raises(ZeroDivisionError):
            machine.share_out([functools.partial(fail_in, here)] * 2)


def test_a_caller_waits_for_nobody_who_has_not_begun():
    busy = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            other = pool.submit(busy.wait, 10)  # the only thread has something else to do
            with machine.sharing(pool):
                found = machine.share_out([functools.partial(int, i) for i in range(4)])
            assert found == [0, 1, 2, 3] and not other.done()
        finally:
            busy.set()


@pytest.mark.parametrize("here", [True, False], ids=["the caller's", "a helper's"])
def test_after_an_error_nothing_is_written_any_more(here, two_threads):
    together, done = threading.Barrier(2, timeout=30), []
    caller = threading.get_ident()

    def work(i):
        if i < 2:
            together.wait()
        if (threading.get_ident() == caller) == here:
            raise KeyboardInterrupt
        time.sleep(0.05)
        done.append(i)

    with pytest.raises(KeyboardInterrupt):
        machine.share_out([functools.partial(work, i) for i in range(20)])
    before = list(done)
    time.sleep(0.2)
    assert done == before and len(done) == 1  # what the other had begun


def test_little_work_stays_with_the_caller(two_threads):
    where = []
    work = lambda i: where.append((i, threading.get_ident()))  # noqa: E731
    machine.for_each(work, 5, 5 * machine.WORTH_A_THREAD - 1)
    assert where == [(i, threading.get_ident()) for i in range(5)]
    where.clear()
    together = threading.Barrier(2, timeout=30)
    machine.for_each(lambda i: (together.wait(), work(i)), 2, 2 * machine.WORTH_A_THREAD)
    assert sorted(i for i, _ in where) == [0, 1]
    assert len({thread for _, thread in where}) == 2


@pytest.mark.parametrize(
    ("layer", "parts", "threads"),
    [
        (None, 1, 0),
        (None, 4, 4),
        (tiny.moe(num_experts=64, hidden=4096), 1, 8),
        (tiny.moe(num_experts=64, hidden=4096), 2, 2),
        (tiny.moe(num_experts=8, hidden=4096), 1, 0),
        (tiny.moe(num_experts=64), 1, 0),
    ],
)
def test_threads_are_for_shards_or_for_many_large_experts(layer, parts, threads):
    assert loop._threads(tiny.run(layer, shards=parts), 8) == threads


def test_every_thread_multiplies_alone_and_afterwards_all_is_as_before():
    control = pytest.importorskip("threadpoolctl")
    a = np.ones((4, 4))

    def threads():
        _ = a @ a
        return [lib["num_threads"] for lib in control.threadpool_info()]

    with control.threadpool_limits(2, user_api="blas"):
        before = threads()
        with machine.workers(2) as pool:
            assert set(pool.submit(threads).result()) == {1}
        with machine.workers(1):
            assert set(threads()) == {1}
        with machine.workers(0):
            assert threads() == before
        assert threads() == before


def test_how_many_threads_there_are_changes_no_bit_whatever_the_products_had():
    control = pytest.importorskip("threadpoolctl")
    found = []
    for threads in (1, 2):
        run = loop.new_run(
            tiny.corpus(),
            tiny.model(tiny.moe(hidden=256), width=128),
            tiny.training(steps=2, batch=24, shards=2),
        )
        with control.threadpool_limits(2, user_api="blas"):
            loop.train(run, show_progress=False, threads=threads)
        found.append(run)
    assert tiny.same_run(*found)


def test_without_the_library_or_with_one_thread_there_is_no_pool(monkeypatch):
    with machine.workers(1) as pool:
        assert pool is None

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with machine.workers(2) as pool:
        assert pool is None
    assert machine.cores() >= 1


@pytest.mark.parametrize(("batch", "parts"), [(4, 3), (4, 8)])
def test_a_batch_that_shards_do_not_divide_is_refused(batch, parts):
    with pytest.raises(ValueError, match=rf"multiple of shards \({parts}\), got {batch}"):
        TrainingConfig(batch=batch, shards=parts)
    with pytest.raises(ValueError, match="shards must be a whole number of at least 1, got 0"):
        TrainingConfig(shards=0)


# ------------------------------------------------------------------------------------------ memory
FAULTS = """
import resource
import numpy as np
from moe_numpy import machine
from moe_numpy.training import loop
from moe_numpy.transformer import generation
def faults():  # in giving ten megabytes back and taking them again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        [np.ones(125_000) for _ in range(10)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
before = faults()
machine.keep_memory()
faults()
print(before, faults())
"""


def printed(code):
    """Run a program in a process of its own, whose memory is nobody else's; return its numbers."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only the GNU C library is told to keep memory")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


def test_memory_is_kept_on_request_and_not_on_import():
    before, after = printed(FAULTS)
    assert after < 20 < 500 < before


HELD = """
import numpy as np
from moe_numpy import machine
def held():
    with open("/proc/self/status") as file:
        [size] = [line.split()[1] for line in file if line.startswith("VmRSS")]
    return int(size) // 1024
machine.keep_memory()
freed = [np.ones(1_000_000) for _ in range(10)]
last = np.ones(1_000_000)
del freed
before = held()
machine.give_memory_back()
print(before - held())
"""


def test_what_is_free_can_be_given_back_all_the_same():
    [given_back] = printed(HELD)
    assert given_back > 60  # of 80 MB


@pytest.mark.parametrize("library", [functools.partial(object), None], ids=["other", "none"])
def test_other_c_libraries_are_left_as_they_are(library, monkeypatch):
    def load(_name):
        if library is None:
            raise OSError("no such library")
        return library()

    monkeypatch.setattr(ctypes, "CDLL", load)
    machine.keep_memory()
    machine.give_memory_back()


def test_training_keeps_memory_and_gives_the_same_bits(monkeypatch):
    asked = []
    kept = tiny.trained()
    monkeypatch.setattr(machine, "keep_memory", lambda: asked.append(True))
    assert tiny.same_run(tiny.trained(), kept)
    assert asked == [True]


@pytest.mark.parametrize("parts", [4, 7])
def test_a_batch_that_cannot_be_cut_into_equal_shards_is_refused(parts):
    token_BT, target_BT, params, cfg, noise = drawn(tiny.model(tiny.moe()))
    with pytest.raises(ValueError, match=rf"multiple of the shards \({parts}\), got {B} sequences"):
        shards.gradients(token_BT, target_BT, params, cfg, noise, shards=parts)


def test_tokens_that_are_no_table_or_lack_targets_or_noise_are_refused():
    token_BT, target_BT, params, cfg, noise = drawn(tiny.model(tiny.moe(noise=LearnedNoise())))
    twice = tuple(np.concatenate((layer, layer)) for layer in noise)
    pairs = np.concatenate((target_BT, target_BT))
    for batch, words in (
        ((token_BT, pairs, noise), rf"every token needs a target, got .* targets of \({2 * B}, "),
        ((token_BT.tolist(), target_BT, noise), "tokens must be an array, got list"),
        ((token_BT[0], target_BT[0], noise), r"tokens must be a table \(B, T\), got the shape"),
        ((token_BT, target_BT, twice), rf"a row for each of {B * T} tokens, got .*{2 * B * T},"),
        ((token_BT, target_BT, noise[0]), "noise must be a tuple, or None, got ndarray"),
        ((token_BT, target_BT, (1.0, 2.0)), rf"a row for each of {B * T} tokens, got .*\(\)"),
    ):
        for parts in (1, 2):
            with pytest.raises(ValueError, match=f"shards: .*{words}"):
                shards.gradients(*batch[:2], params, cfg, batch[2], shards=parts)


def test_soft_slots_are_added_up_over_shards_like_all_others():
    soft = tiny.moe(selection=SoftSlots(), top_k=4)
    cfg = tiny.model(soft, causal=False)
    params = model.init_model(np.random.default_rng(0), cfg, "float64")
    token_BT = np.random.default_rng(1).integers(0, cfg.vocab_size, (4, 5))
    _, halves = shards.gradients(token_BT, token_BT, params, cfg, shards=2)
    parts = [shards.gradients(part, part, params, cfg)[1] for part in np.split(token_BT, 2)]
    for found, *each in zip(*map(tree.leaves, (halves, *parts)), strict=True):
        assert isinstance(found, np.ndarray) and np.allclose(found, sum(each) / 2)
