"""The benchmark: fair races, honest spreads, and a record that can be drawn. Without PyTorch."""

import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import itertools
import json
import mmap
import multiprocessing
import os
import re
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_numpy import commands, config, files, ledger, machine, processes, tree
from moe_numpy.backend import xp
from moe_numpy.classroom import registry
from moe_numpy.config import (
    AdamW,
    Capacity,
    Hierarchy,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    MoEConfig,
    Shared,
    SoftSlots,
    ZLoss,
)
from moe_numpy.lab import (
    bench,
    bench_process,
    bench_products,
    bench_report,
    bench_work,
    plots,
    race,
)
from moe_numpy.moe import capacity, experts
from moe_numpy.training import loop, optimizer, shards, team
from moe_numpy.transformer import decode, generation, model
from tests.benchmarks import plain

PLAN = bench.Plan(rounds=1, threads=1, quick=True, torch=False)
SPREAD = {"median", "low", "high"}
FAULTY = """
import json, sys
import numpy as np
from moe_numpy.lab import bench_process, bench_work
def build(spec):
    work = bench_work.build(spec)
    def values():
        found = work.values()
        {plant}
        return found
    return work._replace(values=values)
bench_process.serve(build)
"""


def layer(**changes):
    moe = config.to_dict(MoEConfig(num_experts=4, top_k=2, hidden=8))
    worker = bench.ours(
        "layer", PLAN, moe=moe, width=16, tokens=32, parts=1, workers=1, processes=1
    )
    return worker._replace(spec=worker.spec | changes)


def rival(plant):
    """Run the same layer in a program of its own, with something changed in its values."""
    return layer()._replace(
        name="rival", command=(sys.executable, "-c", FAULTY.format(plant=plant))
    )


def run_of(name, shards=1):
    cfg = bench.models(quick=True)[name]
    return loop.new_run(bench_work.text(cfg.vocab_size), cfg, bench_work.training(50, shards))


# ------------------------------------------------------------------------------------------ numbers
def test_a_spread_is_the_median_and_the_ends():
    assert race.spread([3.0, 1.0, 10.0]) == {"median": 3.0, "low": 1.0, "high": 10.0}


def test_the_ratio_is_that_of_blocks_of_the_same_round():
    # The machine is slow in the second round. The ratio of the medians would be 1.
    sides, rounds = race.summarize(["a", "b"], [[1.0, 2.0], [10.0, 30.0], [2.0, 2.0]], [0.0] * 3)
    assert sides[1]["ratio"] == {"median": 2.0, "low": 1.0, "high": 3.0} and rounds == 3
    assert sides[0]["ratio"] is None and sides[0]["milliseconds"]["high"] == 10_000.0


def test_busy_rounds_are_set_aside_if_enough_quiet_ones_are_left():
    times = [[1.0, 2.0]] * 3 + [[1.0, 9.0]]
    sides, rounds = race.summarize(["a", "b"], times, [0.0, 0.0, 0.0, 1.0])
    assert rounds == 3 and sides[1]["ratio"]["high"] == 2.0
    sides, rounds = race.summarize(["a", "b"], times, [0.0, 1.0, 1.0, 1.0])
    assert rounds == 4 and sides[1]["ratio"]["high"] == 9.0
    assert race.summarize(["a", "b"], times, [race.BUSY] * 3 + [1.0])[1] == 3


@pytest.mark.parametrize(("quiet", "counted", "busy"), [({1, 3, 4}, 3, 2), (set(), 12, 12)])
def test_busy_rounds_are_repeated_until_patience_ends(quiet, counted, busy, monkeypatch):
    shares = iter([0.0 if at in quiet else 0.9 for at in range(99)])
    monkeypatch.setattr(race, "_warm_up", lambda process, block: 1)
    monkeypatch.setattr(race, "_turn", lambda process, n: (0.01, next(shares)))
    found = race.race_all([layer()], rounds=3)
    assert (found["rounds"], found["busy"]) == (counted, busy)


def test_a_round_is_as_busy_as_the_busiest_of_its_blocks(monkeypatch):
    shares = itertools.cycle([0.0, 0.9])
    monkeypatch.setattr(race, "started", contextlib.nullcontext)
    monkeypatch.setattr(race, "_warm_up", lambda process, block: 1)
    monkeypatch.setattr(race, "_turn", lambda process, n: (0.01, next(shares)))
    found = race.race_all([layer(), layer()], rounds=2, same=False)
    assert found["busy"] == found["rounds"] == 2 * race.PATIENCE


def test_the_share_of_others_is_what_all_cores_worked_beyond_the_side_itself(monkeypatch):
    slept, clock, worked = [], iter([10.0, 14.0]), iter([100.0, 107.0])
    own = SimpleNamespace(perf_counter=clock.__next__, sleep=slept.append)
    monkeypatch.setattr(race, "time", own)
    monkeypatch.setattr(race.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(race, "machine_seconds", worked.__next__)
    side = SimpleNamespace(ask=lambda *words: {"seconds": [1.0, 2.0, 9.0], "cpu": 3.0})
    assert race._turn(side, 3) == (2.0, (7.0 - 3.0) / (4.0 * 2))
    assert slept == [race.GAP]


def test_a_block_has_as_many_repetitions_as_the_warm_ones_fill():
    side = SimpleNamespace(ask=lambda go, repeats: {"seconds": [0.5, 0.1][:repeats]})
    assert [race._warm_up(side, block) for block in (0.01, 0.5, 1e9)] == [1, 5, 1000]


def test_cores_that_idle_or_wait_do_not_work(monkeypatch):
    line = "cpu  1 2 4 1000 10000 8 16 32 0 0\n"
    monkeypatch.setattr(race, "open", lambda *_, **__: io.StringIO(line), raising=False)
    monkeypatch.setattr(race.os, "sysconf", lambda name: 100, raising=False)
    monkeypatch.setattr(race.sys, "platform", "linux")
    assert race.machine_seconds() == 0.63


# -------------------------------------------------------------------------------------------- races
def test_a_race_checks_the_values_and_relates_the_times():
    found = race.race_all([layer(), rival("pass")], rounds=2, block=0.01)
    assert [side["name"] for side in found["sides"]] == [bench.OURS, "rival"]
    assert found["difference"] == 0.0
    for side in found["sides"]:
        assert side["milliseconds"].keys() == SPREAD and side["milliseconds"]["low"] > 0
    ratio = found["sides"][1]["ratio"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]


@pytest.mark.parametrize(
    ("plant", "complaint"),
    [
        ("found['y'] = found['y'] * 1.001", "same y to 0.0001"),
        ("found['grads.router.w_CE'] *= -1", "same grads.router.w_CE"),
        ("del found['dx']", "must answer alike, got dx"),
        ("found['dx'] = found['dx'][:5]", "same dx"),
        ("found['dx'][0, 0] = np.nan", "same dx"),
        ("raise ValueError('no such kernel')", "got its end: ValueError: no such kernel"),
    ],
)
def test_nothing_is_timed_unless_the_values_are_equal(plant, complaint, monkeypatch):
    monkeypatch.setattr(race, "_warm_up", lambda *_: pytest.fail("a clock was started"))
    with pytest.raises(ValueError, match=complaint):
        race.race_all([layer(), rival(plant)], rounds=2)


def test_small_values_are_compared_by_their_own_size(tmp_path):
    paths = [tmp_path / name for name in ("a.npz", "b.npz", "c.npz")]
    for path, factor in zip(paths, (1.0, 1.0 + 1e-6, 1.5), strict=True):
        np.savez(path, gradient=np.array([0.5e-8, -1e-8]) * factor)
    assert race.compare("a", paths[0], "b", paths[1]) == pytest.approx(1e-6)
    with pytest.raises(ValueError, match="a and c must compute the same gradient"):
        race.compare("a", paths[0], "c", paths[2])


def test_changes_are_compared_as_a_whole(tmp_path):
    change = np.ones(1000)
    few, many = change.copy(), change.copy()
    few[:2], many[:100] = -1.0, -1.0  # signs that rounding decides
    paths = [tmp_path / name for name in ("a.npz", "b.npz", "c.npz")]
    for path, values in zip(paths, (change, few, many), strict=True):
        np.savez(path, **{"change.w_CE": values})
    assert race.compare("a", paths[0], "b", paths[1]) == 0
    with pytest.raises(ValueError, match=r"the same change\.w_CE to 0\.1, got .* 6\.3e-01"):
        race.compare("a", paths[0], "c", paths[2])


def idle(do):
    """Let all processes but the first do nothing."""
    return functools.wraps(do)(lambda team, rank, *rest: [] if rank else do(team, rank, *rest))


def half(do):
    """Add up half of every gradient."""

    def halved(crew, rank):
        squares = do(crew, rank)
        for at in crew.shares[rank]:
            tree.leaves(crew.grads[0])[at][...] *= 0.5
        return squares

    return functools.wraps(do)(halved)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has teams")
@pytest.mark.parametrize(
    ("name", "plant", "words"), [("_update", idle, "change"), ("_add_up", half, "grads")]
)
def test_what_a_team_leaves_out_is_seen_before_any_clock_starts(
    name, plant, words, monkeypatch, tmp_path
):
    monkeypatch.setattr(machine, "can_limit_products", lambda: True)
    plan = PLAN._replace(threads=2)
    spec = bench._our_step(plan, bench.models(quick=True)["MoE"]).spec
    paths = [str(tmp_path / name) for name in ("right.npz", "again.npz", "wrong.npz")]
    for path in paths:
        with contextlib.ExitStack() as end, monkeypatch.context() as patch:
            patch.setattr(bench_work, "_until_the_end", end)
            if path == paths[2]:
                patch.setattr(team, name, plant(getattr(team, name)))
            np.savez(path, **bench_work.build(spec).values())
    assert race.compare("a", paths[0], "b", paths[1]) == 0
    with pytest.raises(ValueError, match=f"must compute the same {words}"):
        race.compare("a", paths[0], "c", paths[2])


def test_a_worker_has_as_many_threads_as_it_is_told():
    code = "import os; from moe_numpy.lab import bench_process as p\n"
    code += "facts = {'threads': lambda: os.environ['OPENBLAS_NUM_THREADS']}\n"
    code += "p.serve(lambda spec: p.Work(None, None, None, None, facts))"
    worker = race.Worker("threads", (sys.executable, "-c", code), {"threads": 3})
    with race.started([worker]) as [process]:
        assert process.ask("tell", "threads") == "3"


def test_the_peak_is_that_of_the_worker_and_not_of_its_parent():
    fat = np.ones(60_000_000)  # 480 MB
    [told] = race.tell([layer()])
    assert 10e6 < told["peak"] < 200e6 < fat.nbytes


def test_where_nobody_tells_the_memory_there_is_no_peak():
    code = "import sys; sys.modules['resource'] = None  # as on Windows, without /proc\n"
    code += "from moe_numpy.lab import bench_process as p; p._kilobytes = lambda *_: open('')\n"
    code += "p.serve(lambda spec: p.Work(dict, lambda given: None, None, lambda: None, {}))"
    worker = race.Worker("no peak", (sys.executable, "-c", code), {"threads": 1})
    assert race.tell([worker]) == [{"built": None, "peak": None}]


@pytest.mark.parametrize(("children", "peak"), [([], 5000), ([7], 5000), ([7, 8], 5411)])
def test_what_a_family_shares_is_added_and_its_files_count_once(children, peak, monkeypatch):
    tables = {"status": {"VmHWM": 5000, "RssFile": 1100}}
    tables["smaps_rollup"] = {"Pss_Anon": 1003, "Pss_Shmem": 434}
    family = [SimpleNamespace(pid=pid) for pid in children]
    monkeypatch.setattr(bench_process, "_kilobytes", lambda process, table: tables[table])
    monkeypatch.setattr(bench_process.multiprocessing, "active_children", lambda: family)
    assert bench_process.peak_bytes() == 1024 * peak


FAMILY = """
import multiprocessing, time
import numpy as np
from moe_numpy.lab import bench_process, bench_work
from moe_numpy import machine
def build(spec):
    machine.keep_memory()
    def idle(pipe):
        while True:
            started, _ = time.process_time(), np.ones(pipe.recv()).tolist()
            sum(range(spec["loops"]))
            pipe.send(time.process_time() - started)
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    multiprocessing.get_context("fork").Process(target=idle, args=(theirs,), daemon=True).start()
    worked = []
    def once():
        ours.send(spec["numbers"])
        worked.append(ours.recv())
    return bench_process.Work(dict, lambda given: None, None, once, {"worked": lambda: worked})
bench_process.serve(build)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has teams")
def test_the_work_and_the_memory_of_a_family_are_counted_together():
    spec = {"threads": 1, "numbers": 1, "loops": 30_000_000}
    lean = race.Worker("lean", (sys.executable, "-c", FAMILY), spec)
    fat = lean._replace(spec=spec | {"numbers": 2_000_000, "loops": 1})
    peaks = [told["peak"] for told in race.tell([lean, fat])]
    assert 16e6 < peaks[1] - peaks[0]
    with race.started([lean]) as [process]:
        counted, worked = process.ask("go", 2)["cpu"], sum(process.ask("tell", "worked"))
    assert worked > 0.2 and abs(counted - worked) < 0.3 * worked


def test_the_work_of_others_is_seen():
    if race.machine_seconds() is None:
        pytest.skip("this system does not count its work in /proc/stat")
    before = race.machine_seconds()
    sum(range(20_000_000))
    assert race.machine_seconds() - before > 0.05


# ----------------------------------------------------------------------------------------- products
def test_every_matrix_product_of_a_step_is_noted(monkeypatch):
    counts = {}
    for name in ("dense", "MoE", "Mixtral"):
        run = run_of(name)
        [products] = bench_products.products_of_step(run)
        counts[name] = len(products)
        assert type(run.params.token_VC) is np.ndarray
    # One layer: 8, 7 + 8 * 2 or 7 + 8 * 3 products, and the head; each is three with its backward.
    assert counts == {"dense": 27, "MoE": 72, "Mixtral": 96}


def test_each_shard_has_products_of_its_own():
    run = run_of("dense", shards=2)
    halves, [whole] = (bench_products.products_of_step(r) for r in (run, run_of("dense")))
    assert [len(half) for half in halves] == [len(whole)] * 2
    assert sum(map(bench_products.flops, halves)) == bench_products.flops(whole)
    found = bench_products.measure(run, 1)
    assert found["calls"] == 2 * len(whole) and found["flops"] == bench_products.flops(whole)
    assert found["probe_flops"] == 2 * 2 * bench_products.PROBE**3


def test_busy_turns_of_products_are_repeated_and_set_aside(monkeypatch):
    shares, took = iter([0.0, 0.9, 0.0, 0.9, 0.0]), itertools.count(1.0)
    monkeypatch.setattr(bench_products, "_seconds", lambda once, times: next(took))
    monkeypatch.setattr(race, "share_of_others", lambda *_: next(shares))
    found = bench_products.measure(run_of("dense"), 3)
    assert (found["rounds"], found["busy"]) == (3, 2)
    assert [found[name] for name in ("step", "products", "probe")] == [
        [1.0, 7.0, 13.0],
        [2.0, 8.0, 14.0],
        [3.0, 9.0, 15.0],
    ]
    assert "[2 busy rounds; 3 counted]" in bench_report._busy(found)


def test_the_own_work_of_a_turn_is_not_that_of_others(monkeypatch):
    told, worked = [], iter([100.0, 107.0])
    monkeypatch.setattr(race, "cpu_seconds", worked.__next__)
    monkeypatch.setattr(race, "machine_seconds", lambda: 40.0)
    monkeypatch.setattr(race, "share_of_others", lambda *words: told.append(words) or 0.0)
    before = time.perf_counter()
    bench_products.measure(run_of("dense"), 1)
    [(busy, started_at, own)] = told
    assert (busy, own) == (40.0, 7.0) and before < started_at < time.perf_counter()


def test_workers_are_of_the_package_that_started_them(tmp_path, monkeypatch):
    decoy = tmp_path / "moe_numpy"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise ImportError('decoy')", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with machine.environment(race.this_package()):
        assert race.tell([layer()])[0].keys() == {"built", "peak"}
        script = layer()._replace(command=(sys.executable, str(bench.ABLATION_WORKER)))
        assert race.tell([script._replace(spec=script.spec | {"without": "few"})])
        assert bench._import("import moe_numpy") > 0


def products(count, results):
    rng = np.random.default_rng(0)
    return [
        [(*rng.random((2, 4, 4)), result) for result in results[i::count]] for i in range(count)
    ]


def are_right(lists):
    return all((result == a @ b).all() for own in lists for a, b, result in own)


def test_the_replay_computes_the_same_products_each_list_in_its_thread(monkeypatch):
    threads, multiply = set(), bench_products._multiply
    noting = lambda own: (threads.add(threading.current_thread()), multiply(own))  # noqa: E731
    monkeypatch.setattr(bench_products, "_multiply", noting)
    lists = products(2, np.zeros((6, 4, 4)))
    with bench_products.replaying(lists) as again:
        again()
    assert are_right(lists) and len(threads) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has teams")
def test_the_products_of_a_team_are_replayed_in_processes_as_often_as_they_are_asked_for():
    results = np.frombuffer(mmap.mmap(-1, 8 * 6 * 16)).reshape(6, 4, 4)  # which processes share
    lists = products(3, results)
    with bench_products.replaying(lists, split=True) as again:
        one, _ = multiprocessing.active_children()
        for _ in range(2):
            results[:] = 0
            again()
            assert are_right(lists)
        one.kill()
        with pytest.raises(ChildProcessError, match="replay: every process must answer"):
            again()
    assert not multiprocessing.active_children()


def test_the_operations_are_those_of_the_shapes():
    a, b = np.ones((5, 3, 4)), np.ones((4, 6))
    with bench_products.noted_products() as noted:
        xp.matmul(a, b, out=np.empty((5, 3, 6)))
        xp.dot(a[0], b, out=np.empty((3, 6)))
        _ = xp.ones((2, 7)) @ xp.ones((7, 2))
        _ = bench_products.watch(a) @ np.ones(4)  # sums of rows are no product of matrices
    found = [bench_products.flops([product]) for product in noted]
    assert found == [2 * 5 * 3 * 4 * 6, 2 * 3 * 4 * 6, 2 * 2 * 7 * 2]
    assert type(xp.empty(3)) is np.ndarray and isinstance(xp.matmul, np.ufunc)


def test_gradients_are_the_same_while_they_are_watched():
    run = run_of("Mixtral")
    token, target = np.random.default_rng(0).integers(0, run.cfg.vocab_size, (2, 4, 8))
    _, plain = shards.gradients(token, target, run.params, run.cfg)
    with bench_products.noted_products():
        watched = bench_products.watch(run.params)
        _, found = shards.gradients(token, target, watched, run.cfg)
    pairs = zip(tree.leaves(plain), tree.leaves(found), strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has teams")
def test_a_team_takes_the_same_steps_and_its_exchange_is_counted(monkeypatch):
    monkeypatch.setattr(machine, "can_limit_products", lambda: True)
    plan = PLAN._replace(threads=2)
    worker = bench._our_step(plan, bench.models(quick=True)["MoE"])
    alone = worker._replace(spec=worker.spec | {"processes": 1})
    assert (worker.spec["processes"], plan.processes) == (2, 2)
    assert race.race_all([worker, alone], rounds=1, block=0.01)["difference"] == 0.0
    sizes = [race.tell([side], facts=("bytes",))[0]["bytes"] for side in (worker, alone)]
    assert sizes[0]["gradients"] == sizes[1]["gradients"] + sizes[0]["parameters"]
    assert PLAN._replace(threads=5).processes == 1
    monkeypatch.setattr(machine, "can_limit_products", lambda: False)
    assert plan.processes == 1


def test_the_bytes_are_counted_once_each():
    run = run_of("dense")
    found = bench_products.bytes_of(run)
    parameters = 4 * tree.size(run.params)
    assert found["parameters"] == found["gradients"] == parameters
    assert found["optimizer"] == 2 * parameters
    x = np.zeros(100)
    assert sum(a.nbytes for a in bench_products.buffers((x, [x[:3], {"y": x.T}])).values()) == 800
    hidden = 12 * 64 * 4 * 32 * 4  # the hidden rows of the one layer in float32
    assert 2 * hidden < found["activations"] < 40 * hidden


LOUD = {"noise": LearnedNoise(), "balance": (ImportanceLoss(), LoadLoss(), ZLoss())}
GROUPED = {"selection": Hierarchy(groups=8, kept=2)}
MEMORY = {
    "dense": ("dense", {}, {}),
    "MoE": ("MoE", {}, {}),
    "Mixtral": ("Mixtral", {}, {}),
    "recomputed": ("dense", {"recompute": True}, {}),
    "recomputed experts": ("Mixtral", {"recompute": True}, {}),
    "long": ("dense", {"context": 256}, {}),
    "one layer": ("dense", {"layers": 1}, {}),
    "many words": ("dense", {"vocab_size": 4096}, {}),
    "one layer of many words": ("dense", {"vocab_size": 8192, "layers": 1}, {}),
    "exact gelu": ("dense", {"activation": "gelu"}, {}),
    "relu": ("dense", {"activation": "relu"}, {}),
    "sandwich": ("dense", {"sandwich": True}, {}),
    "shared keys, norms": ("Mixtral", {"kv_heads": 2, "qk_norm": "head"}, {}),
    "clamped": ("Mixtral", {}, {"activation": "clamped_swiglu"}),
    "many experts": ("MoE", {}, {"num_experts": 64}),
    "top-8": ("MoE", {}, {"num_experts": 64, "top_k": 8, "hidden": 64}),
    "a shared expert": ("MoE", {}, {"shared": Shared(hidden=256)}),
    "recomputed exact gelu": ("dense", {"recompute": True, "activation": "gelu"}, {}),
    "recomputed clamped": ("Mixtral", {"recompute": True}, {"activation": "clamped_swiglu"}),
    "recomputed, narrow": ("dense", {"recompute": True, "activation": "gelu", "width": 32}, {}),
    "few places": ("MoE", {}, {"capacity": Capacity(factor=0.4)}),
    "places for one choice": (
        "MoE",
        {},
        {"top_k": 4, "activation": "geglu", "capacity": Capacity(factor=1.0, times_k=False)},
    ),
    "places at least": ("MoE", {}, {"capacity": Capacity(factor=0.05, minimum=100)}),
    "places in groups": ("MoE", {}, {"capacity": Capacity(factor=0.5, group=96, multiple=8)}),
    "routers": ("MoE", {"layers": 2}, {"num_experts": 512, "top_k": 1, "hidden": 8, **LOUD}),
    "groups": ("MoE", {"layers": 2}, {"num_experts": 256, "hidden": 16, **LOUD, **GROUPED}),
    "jitter": ("MoE", {"layers": 1}, {"hidden": 16, "noise": InputJitter(eps=0.1)}),
    "wide heads": ("dense", {"head_size": 256, "layers": 2}, {}),
    "exact gelu in experts": ("MoE", {"layers": 1}, {"activation": "gelu", "hidden": 512}),
    "a gated shared expert": ("Mixtral", {}, {"shared": Shared(hidden=256, gated=True)}),
    "scores of sigmoids": ("MoE", {}, {"score": "sigmoid", "num_experts": 64, "hidden": 16}),
    "three branches": ("MoE", {"layers": 2}, {"activation": "swiglu3"}),
    "a feed-forward beside": ("MoE", {"extra_ffn": True, "hidden": 256}, {}),
    "capped, long": ("dense", {"logit_cap": 5.0, "context": 512, "layers": 2}, {}),
}


@pytest.mark.parametrize("name", MEMORY)
def test_the_memory_of_a_step_is_that_of_the_formula(name):
    """The formula of `ledger.step_memory` against the arrays that there are at once."""
    base, changes, inside = MEMORY[name]
    cfg = bench.models()[base]
    moe = cfg.moe and dataclasses.replace(cfg.moe, **inside)
    cfg = dataclasses.replace(cfg, moe=moe, **changes)
    run = loop.new_run(bench_work.text(cfg.vocab_size), cfg, bench_work.training())
    counted, told = ledger.step_memory(cfg, 12), bench_products.bytes_of(run)
    assert told["parameters"] == counted.parameters == counted.gradients
    assert told["optimizer"] == counted.optimizer and told["formula"] == counted.peak
    assert counted.activations == pytest.approx(told["activations"], rel=0.02)
    assert counted.peak == pytest.approx(told["peak of one shard"], rel=0.15)


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_the_memory_of_soft_slots_is_that_of_the_formula(slots):
    """Such a model sees all positions: no run trains it, so the step is taken here."""
    moe = MoEConfig(num_experts=8, top_k=8, hidden=256, selection=SoftSlots(slots=slots))
    cfg = dataclasses.replace(bench.models()["MoE"], moe=moe, causal=False)
    params = model.init_model(0, cfg)
    state = optimizer.init_state(params, AdamW())
    token_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (12, cfg.context))
    peaks = []
    for step in range(2):
        tracemalloc.start()
        _, grads = shards.gradients(token_BT, token_BT, params, cfg)
        optimizer.update(params, grads, state, AdamW(), step, 1e-3)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        del grads
    held = 3 * 4 * tree.size(params)
    assert ledger.step_memory(cfg, 12).peak == pytest.approx(held + peaks[1], rel=0.15)


def test_every_shard_has_gradients_of_its_own():
    whole, halves = (bench_products.bytes_of(run_of("MoE", shards)) for shards in (1, 2))
    assert halves.pop("gradients") == 2 * whole.pop("gradients")
    peaks = [sizes.pop("peak of one shard") for sizes in (whole, halves)]
    assert peaks[0] == pytest.approx(peaks[1], abs=1000)  # Python keeps a few tuples, or not
    assert halves == whole


def test_large_gradients_are_sketched_and_a_wrong_one_is_still_seen():
    gradient = np.random.default_rng(0).standard_normal((3, 600, 700))
    short = bench_process.sketch("w", gradient)
    assert short.shape == (3, 600) and bench_process.sketch("w", gradient[0, :2]).shape == (2, 700)
    gradient[1, 5, 6] += 5.0
    assert np.abs(bench_process.sketch("w", gradient) - short).max() > 1e-3 * np.abs(short).max()


def test_a_step_is_related_to_its_products_and_to_the_rate_of_the_machine():
    told = {"calls": 9, "flops": 6e9, "probe_flops": 2e9, "busy": 0, "rounds": 1}
    found = bench._products(told | {"step": [4.0], "products": [2.0], "probe": [0.5]})
    assert {name: value["median"] for name, value in found.items() if name not in told} == {
        "step_over_products": 2.0,
        "share": 0.5,
        "machine_gflops": 4.0,
        "step_rate": 0.375,
    }


@pytest.mark.parametrize("kernels", ["SkylakeX", "Haswell", None])
def test_a_step_is_held_against_slower_products_too_where_there_are_faster_ones(
    kernels, monkeypatch
):
    [name] = bench.NARROW_KERNELS
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(bench, "_kernels", lambda: kernels)
    race_of_none = {"sides": [{}], "rounds": 1}
    monkeypatch.setattr(bench.Plan, "race", lambda *_: copy.deepcopy(race_of_none))
    spec = {"calls": 9, "flops": 6e9, "probe_flops": 2e9, "step": [4.0], "probe": [0.5]}
    spec |= {"busy": 0, "rounds": 1}

    def tell(workers, facts):
        slower = os.environ.get(name) == "Haswell"
        products = spec | {"products": [3.2 if slower else 2.0]}
        return [{"built": 1, "peak": 1, "products": products, "bytes": {}, "effective": []}]

    monkeypatch.setattr(bench.race, "tell", tell)
    rows = list(bench._steps(PLAN._replace(quick=False), lambda _: None))
    assert name not in os.environ and len(rows) == 3
    for row in rows:
        assert row["products"]["step_over_products"]["median"] == 2.0
        assert (row["narrow"] is not None) == (kernels == "SkylakeX")
        if row["narrow"]:
            assert row["narrow"]["step_over_products"]["median"] == 1.25


# -------------------------------------------------------------------------------------------- parts
@contextlib.contextmanager
def no_settling():
    """Let the works of this process share no thread pool, and no setting of its memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_work, "_settle", lambda threads: None)
        with ThreadPoolExecutor(2) as pool, machine.sharing(pool):
            yield


def works(kind, parts):
    spec = {"width": 16, "tokens": 32, "parts": parts, "workers": parts, "hidden": 8, "repeats": 1}
    moe = config.to_dict(MoEConfig(num_experts=4, top_k=2, hidden=8))
    run = {name: config.to_dict(value) for name, value in run_settings(parts).items()}
    return bench_work.build(spec | {"work": kind, "moe": moe, "processes": 1} | run)


def run_settings(parts):
    training = bench_work.training(50, parts)
    return {"config": bench.models(quick=True)["Mixtral"], "training": training}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such processes")
def test_processes_of_a_layer_compute_what_the_caller_does():
    moe = config.to_dict(MoEConfig(num_experts=4, top_k=2, hidden=8))
    spec = {"work": "layer", "moe": moe, "width": 16, "tokens": 32, "parts": 1, "workers": 1}
    with no_settling(), contextlib.ExitStack() as until_the_end, pytest.MonkeyPatch.context() as m:
        m.setattr(bench_work, "_until_the_end", until_the_end)
        alone, shared = (bench_work.build(spec | {"processes": n}).values() for n in (1, 2))
        assert processes._holders.get()
    assert not processes._holders.get()
    for name, value in alone.items():
        assert value.tobytes() == shared[name].tobytes(), name


@pytest.mark.parametrize("kind", ["layer", "mlp", "step"])
def test_two_parts_compute_the_function_of_the_whole(kind):
    with no_settling():
        whole, halves = (works(kind, parts).values() for parts in (1, 2))
        assert whole.keys() == halves.keys()
        for name, value in whole.items():
            if name.startswith("change."):  # by a rate of 1e-5: the parameters' rounding shows
                error = np.linalg.norm(value - halves[name])
                assert error <= 0.01 * np.linalg.norm(value), name
                continue
            error = np.abs(value - halves[name]).max()
            assert error <= 1e-5 * max(np.abs(value).max(), 1e-3), name


def test_a_worker_keeps_its_memory_and_starts_a_thread_for_each_part(monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "keep_memory", lambda: asked.append("memory"))
    monkeypatch.setattr(machine, "workers", lambda n: asked.append(n) or contextlib.nullcontext())
    for kind in ("step", "layer", "mlp"):
        works(kind, 2)
    assert asked == ["memory", 2] * 3


def test_tokens_are_split_where_an_expert_has_many_and_else_large_experts_are_shared_out(
    monkeypatch,
):
    plan = PLAN._replace(threads=2)

    def split(E, hidden):
        found = bench._split(plan, MoEConfig(num_experts=E, top_k=2, hidden=hidden), 1024)
        return found["parts"], found["workers"], found["processes"]

    tokens, small = (2, 2, 1), (1, 1, 1)
    for possible, shared_out in ((True, (1, 1, 2)), (False, (1, 2, 1))):
        monkeypatch.setattr(machine, "can_limit_products", lambda possible=possible: possible)
        monkeypatch.setattr(sys, "platform", "linux")
        assert [split(8, 512), split(32, 512), split(1024, 512)] == [tokens, *2 * [shared_out]]
        assert [split(8, 64), split(128, 64), split(1024, 64)] == [tokens, tokens, small]
    assert PLAN._replace(threads=5).shards == 1 and PLAN._replace(threads=4).shards == 4


@pytest.mark.parametrize(("k", "gates"), [(1, "raw"), (2, "renormalized")])
def test_rivals_are_told_the_gates_that_ours_has_without_saying(k, gates):
    moe = MoEConfig(num_experts=4, top_k=k, hidden=8)
    told = bench._our_layer(PLAN, moe, 32).spec["moe"]
    assert (moe.gate_weights, told["gate_weights"]) == (None, gates)


def test_the_time_of_a_token_is_the_median_at_its_place(monkeypatch):
    clock = itertools.accumulate([0, 1, 5, 0, 2, 7, 0, 9, 6])
    monkeypatch.setattr(bench_work, "time", SimpleNamespace(perf_counter=clock.__next__))
    assert bench_work._by_length(lambda: range(2), 3) == [2000.0, 6000.0]


# ---------------------------------------------------------------------------------- steps of speed
def _case(name, rng, dtype):
    """Draw the arguments of a forward and the upstream of its backward, or those of a reduction."""
    draw = lambda *shape: 3.0 * rng.standard_normal(shape).astype(dtype)  # noqa: E731
    if name == "dispatch":
        expert_NK = rng.permuted(np.tile(np.arange(4), (9, 1)), axis=1)[:, :2]
        limit = config.Capacity(factor=0.7)
        scores = draw(9, 4)
        _, plan = capacity.make_plan(expert_NK, scores, scores, limit)
        assert plan.offsets[-1] < 18  # some are dropped
        return (draw(9, 5), plan), draw(plan.offsets[-1], 5)
    if name == "grouped_linear":
        return (draw(9, 5), draw(4, 5, 3), (0, 4, 4, 6, 9)), draw(9, 3)
    if name == "dots":
        return (draw(3, 7, 5), draw(3, 7, 5)), None
    if name == "swiglu":
        return (draw(3, 7, 5), draw(3, 7, 5)), draw(3, 7, 5)
    return (draw(3, 7, 5),), draw(3, 7, 5)


TWINS = [(name, twin) for twins in plain.TWINS.values() for name, twin in twins.items()]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("name", "twin"), TWINS)
def test_a_fast_function_equals_its_plain_twin(name, twin, dtype):
    kind, _, half = name.rpartition("_")
    given, upstream = _case(kind if half in ("forward", "backward") else name, RNG(), dtype)
    if half == "backward":
        pair = registry.pair(kind)
        own = dict(TWINS).get(f"{kind}_forward", pair.forward)
        found = [pair.backward(upstream, pair.forward(*given)[-1])]
        judge = [twin(upstream, own(*given)[-1])]
        found, judge = ([*x[0]] if isinstance(x[0], tuple) else x for x in (found, judge))
    else:
        [home] = registry._homes(registry.PACKAGES)[name]
        found, judge = ([f(*given)] for f in (getattr(home, name), twin))
        if half == "forward":
            found, judge = [found[0][0]], [judge[0][0]]
    for a, b in zip(found, judge, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == dtype
        limit = {"float64": 1e-12, "float32": 1e-6}[dtype]
        assert np.abs(a - b).max() <= limit * np.abs(b).max()


def RNG():  # noqa: N802
    return np.random.default_rng(3)


def test_what_a_step_takes_back_is_there_to_be_taken_back():
    assert isinstance(optimizer.BLOCK, int)
    assert isinstance(experts.FEW, int)
    settings = {"memory", "shards", "float32", "blocks", "few"}
    settings |= {"experts", "processes", "parallel", "idle"}
    settings |= set(bench.OF_GENERATION)
    assert plain.TWINS.keys() | settings == bench.STEPS.keys()
    worker = bench.ABLATION_WORKER.read_text("utf-8")
    assert all(f'"{step}"' in worker for step in bench.STEPS.keys() - plain.TWINS.keys())


@pytest.fixture
def worker(monkeypatch):
    """Load the worker of the ablations; what it takes back is put in place again after the test."""
    monkeypatch.syspath_prepend(bench.ABLATION_WORKER.parent)
    places = [(machine, "keep_memory"), (optimizer, "BLOCK"), (loop, "new_run"), (experts, "FEW")]
    places += [(generation, "_continue"), (decode, "supports")]
    for module, name in places:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(bench_work, "build", lambda spec: spec)
    module = importlib.import_module("ablation_worker")
    yield module
    module.until_the_end.close()


@pytest.mark.parametrize("step", plain.TWINS)
def test_the_twins_of_a_step_take_the_place_of_its_functions(worker, step):
    for size, threads in ((1, 2), (2, 1)):
        spec = {"without": step, "work": "layer", "parts": 1, "processes": size}
        left = 1 if step == "slices" else threads  # its threads meet in the products
        built = worker.build(spec | {"workers": threads})
        assert built == spec | {"workers": left}
    for name in plain.TWINS[step]:
        [home] = registry._homes(registry.PACKAGES)[name]
        assert getattr(home, name) is worker.TWINS[step][name]


def test_the_settings_of_a_step_are_taken_back(worker):
    mallopt = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine.ctypes, "CDLL", lambda name: mallopt.append(name))
        worker.build({"without": "memory"})
        machine.keep_memory()
    assert not mallopt
    whole = {"training": {"shards": 2}, "processes": 2}
    assert worker.build(whole | {"without": "processes"}) == whole | {
        "without": "processes",
        "processes": 1,
    }
    spec = worker.build(copy.deepcopy(whole) | {"without": "shards"})
    assert spec["training"]["shards"] == spec["processes"] == 1
    worker.build({"without": "blocks"})
    assert optimizer.BLOCK > 1 << 40
    for without, left in (("experts", (1, 1)), ("parallel", (2, 1))):
        spec = worker.build({"without": without, "workers": 1, "processes": 2})
        assert (spec["workers"], spec["processes"]) == left
    worker.build({"without": "few"})
    assert experts.FEW == 0
    assert not worker.build({"without": "idle", "skip_idle": True})["skip_idle"]
    worker.build({"without": "float32"})
    assert run_of("dense").params.token_VC.dtype == "float64"


def test_the_settings_of_generation_are_taken_back(worker, monkeypatch):
    cfg, read = bench.models(quick=True)["Mixtral"], []
    for module, name in ((model, "model_forward"), (decode, "next_logits")):
        whole = getattr(module, name)
        note = lambda *a, f=whole, **k: read.append(np.size(a[0])) or f(*a, **k)  # noqa: E731
        monkeypatch.setattr(module, name, note)

    def write():
        read.clear()
        params = model.init_model(RNG(), cfg)
        return list(generation.generate([1, 2, 3], params, cfg, 9, temperature=0))

    tokens = write()
    assert read == [1] * 11
    worker.build({"without": "alone"})
    assert write() == tokens and read == [3] + [1] * 8
    worker.build({"without": "keys"})
    assert write() == tokens and read == [3, 4, 5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    arguments = ["bench", "--quick", "--rounds", "1", "--threads", "2", "--only", "steps"]
    sparse = {name: bench.models(quick=True)[name] for name in ("MoE", "Mixtral")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "models", lambda quick: sparse)
        patch.setattr(machine, "can_limit_products", lambda: True)
        patch.setattr(bench, "_kernels", lambda: "SkylakeX")
        assert commands.main([*arguments, "--out", str(folder)]) == 0
    assert (folder / "speed_steps.png").stat().st_size > 10_000
    assert not (folder / "speed.json").exists()
    return files.read_json(folder / "speed_steps.json")


def test_steps_without_their_programs_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ABLATION_WORKER", tmp_path / "not there")
    arguments = ["bench", "--quick", "--only", "steps", "--out", str(tmp_path / "o")]
    assert commands.main(arguments) == 1
    assert "bench: the steps must have the programs of tests/benchmarks" in capsys.readouterr().err
    assert os.listdir(tmp_path / "o") == []


def test_the_record_of_the_steps_has_each_for_the_models_that_it_concerns(steps):
    assert steps["study"] == "speed_steps" and "verdicts" not in steps
    row, mixtral, layer, narrow, update, text = steps["rows"]
    assert (row["name"], [*row["steps"], *bench.OF_OTHERS]) == ("MoE", list(bench.STEPS))
    assert (layer["name"], layer["steps"]) == ("layer of 8 experts", list(bench.OF_A_LAYER))
    name = "layer of 8 experts, kernels for AVX2"
    assert (narrow["name"], narrow["steps"]) == (name, ["few"])
    assert (update["name"], update["steps"]) == ("update of 32 experts, 4 tokens", ["idle"])
    assert (text["name"], text["steps"]) == ("generation", list(bench.OF_GENERATION))
    assert (mixtral["name"], mixtral["steps"]) == ("Mixtral", row["steps"])
    assert [part["threads"] for part in steps["rows"]] == [2, 2, 2, 2, 2, 1]
    assert all(len(part["sides"]) == 1 + len(part["steps"]) for part in steps["rows"])
    for part in (row, mixtral, layer):
        assert 0 < part["difference"] < race.TOLERANCE  # no step is without any effect
    assert text["difference"] == 0, "the same tokens"
    assert update["difference"] == 0, "what is skipped would have stayed as it was"
    assert bench_report.gain(row, "slices") == row["sides"][-1]["ratio"]
    dense = row | {"steps": [step for step in row["steps"] if step not in bench.EXPERTS_ONLY]}
    assert bench_report.gain(dense, "slices") is None


def test_the_steps_can_be_read_and_drawn(steps):
    lines = bench_report.steps_table(steps).splitlines()
    assert [line[:6] for line in lines[3:]] == [label[:6] for label in bench.STEPS.values()]
    assert len(plots.draw(steps).axes) == 1


# ----------------------------------------------------------------------------------------- verdicts
def measured(**changes):
    """Make a record of two threads that meets every aim exactly, but for `changes`."""
    at = {"eager": 1.05, "hf": 1.35, "fused": 1.1, "loop": 1.3, "sorted": 1.1, "batched": 1.2}
    at |= {"layer": 0.9, "many": 2.2, "growth": 7.0, "overhead": 1.15, "written": 8.0, "late": 1.25}
    at |= {"over": 1.6, "narrow": 1.6, "peak": 0.4} | changes

    def around(median):
        return {"median": median, "low": median - 0.2, "high": median + 0.2}

    def sides(**rivals):
        own = {"name": "moe_numpy", "milliseconds": {"median": 2.0}, "ratio": None, "peak": 100}
        peak = 100 / at["peak"]
        others = [own | {"name": n, "ratio": around(r), "peak": peak} for n, r in rivals.items()]
        return {"sides": [own, *others], "rounds": 7}

    def step(name, **rivals):
        over = {"products": at["over"], "narrow": at["narrow"]}
        over = {key: {"step_over_products": around(value)} for key, value in over.items()}
        return {"row": "step", "name": name, **sides(**rivals), **over}

    def layer(name, E, ratio):
        row = {"row": "layer", "name": name, "experts": E, "top_k": 2, **sides(a=9.0, b=ratio)}
        return copy.deepcopy(row)

    torch = "PyTorch, "
    moe = {"textbook loop": at["loop"], "sorted rows": at["sorted"], "batched": at["batched"]}
    rows = [
        step("dense", **{"PyTorch eager": at["eager"]}),
        step("MoE", **{torch + name: ratio for name, ratio in moe.items()}),
        step("Mixtral", **{"Transformers eager": at["hf"], "grouped, fused": at["fused"]}),
        *(layer("wide", E, at["layer"]) for E in (2, 8, 32)),
        *(layer("wide", E, at["many"]) for E in (128, 1024)),
        {"row": "growth", "name": "growth", **sides(some=1.5, many=at["growth"])},
        {"row": "overhead", "name": "overhead", **sides(experts=at["overhead"])},
        {"row": "generation", "name": "Mixtral", **sides(generate=at["written"])},
    ]
    rows[-1]["by_length"] = [9.0] * 4 + [1.0] * 28 + [at["late"]] * 28
    return {"quick": False, "threads": 2, "rows": rows}


def test_every_aim_that_is_just_reached_is_met():
    found = bench_report.verdicts(measured())
    assert {verdict.line for verdict in found} == set(range(1, 9))
    assert all(verdict.met is True for verdict in found)


@pytest.mark.parametrize(
    ("change", "line", "count"),
    [
        ({"eager": 1.04}, 1, 1),
        ({"hf": 1.34}, 2, 1),
        ({"fused": 1.09}, 2, 1),
        ({"loop": 1.29}, 3, 1),
        ({"batched": 1.09}, 3, 1),
        ({"layer": 0.79}, 4, 3),
        ({"many": 2.19}, 4, 2),
        ({"growth": 7.01}, 4, 1),
        ({"overhead": 1.16}, 5, 1),
        ({"written": 7.99}, 6, 1),
        ({"late": 1.26}, 6, 1),
        ({"over": 1.61}, 7, 3),
        ({"narrow": 1.61}, 7, 3),
        ({"peak": 0.41}, 8, 3),
    ],
)
def test_an_aim_that_is_just_missed_is_not_met(change, line, count):
    missed = [v for v in bench_report.verdicts(measured(**change)) if v.met is not True]
    assert [v.line for v in missed] == [line] * count
    assert all("NOT MET" in bench_report.verdict_line(v) for v in missed)


def test_an_aim_is_held_against_the_best_of_the_rivals():
    record = measured(sorted=1.09)
    moe = record["rows"][1]
    moe["sides"][2]["ratio"]["high"] = 99.0
    moe["sides"][-1]["peak"] /= 2
    missed = [v for v in bench_report.verdicts(record) if not v.met]
    assert [(v.line, v.measured[:4]) for v in missed] == [(3, "1.09"), (8, "0.80")]


def test_verdicts_tell_their_spreads_where_there_are_rounds():
    found = {v.wanted: v.measured for v in bench_report.verdicts(measured())}
    alone = [words for words, told in found.items() if not re.search(r" \(.* to .*\)$", told)]
    assert [word for words in alone for word in ("half", "peak") if word in words] == [
        "half",
        *["peak"] * 3,
    ]


def test_the_first_four_tokens_belong_to_no_half():
    assert bench_report.halves({"by_length": [9.0] * 4 + [1.0, 1.0, 5.0, 5.0]}) == [1.0, 5.0]


def test_what_was_not_measured_is_neither_met_nor_missed():
    record = measured()
    for row in record["rows"]:
        among_ours = row["row"] in ("growth", "overhead")
        row["sides"] = row["sides"] if among_ours else row["sides"][:1]
    found = {v.line: v.met for v in bench_report.verdicts(record) if v.met is None}
    assert found.keys() == {1, 2, 3, 4, 6, 8}
    assert bench_report.verdicts(record | {"quick": True}) == []
    assert bench_report.verdicts(record | {"threads": 1}) == []


# ------------------------------------------------------------------------------------------ command
@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    # What is looked at here is the record, on any machine: no rivals.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "why_not", lambda library: "not in this test")
        arguments = ["bench", "--quick", "--rounds", "2", "--threads", "1", "--out", str(folder)]
        patch.setattr(bench, "ABLATION_WORKER", folder / "not in this test either")
        assert commands.main(arguments) == 0
    assert (folder / "speed.png").stat().st_size > 10_000
    return files.read_json(folder / "speed.json")


def test_the_record_has_every_row_with_its_fields(record):
    assert record["study"] == "speed" and record["quick"] and record["threads"] == 1
    assert {row["row"] for row in record["rows"]} == set(bench.MEASURES) - {"steps"}
    for row in record["rows"]:
        assert row["sides"][0]["milliseconds"].keys() == SPREAD, row["name"]
    steps = [row for row in record["rows"] if row["row"] == "step"]
    assert [row["name"] for row in steps] == ["dense", "MoE", "Mixtral"]
    for row in steps:
        kinds = {"parameters", "gradients", "optimizer", "activations"}
        assert set(row["bytes"]) == kinds | {"peak of one shard", "formula"}
        assert row["sides"][0]["peak"] > 10e6
        products = row["products"]
        for name in ("step_over_products", "share", "machine_gflops", "step_rate"):
            assert products[name]["low"] > 0
        assert products["step_over_products"]["low"] > 0.8 and products["step_rate"]["high"] < 1.2
    [written] = [row for row in record["rows"] if row["row"] == "generation"]
    assert len(written["by_length"]) == written["tokens"] == 60 and written["threads"] == 1


def test_the_record_tells_the_machine_and_no_path_of_it(record):
    facts = {"cpu", "cores", "blas", "kernels", "ignored", "versions"}
    assert record["machine"].keys() == facts
    assert record["machine"]["versions"]["numpy"] == np.__version__
    text = json.dumps(record)
    assert "/home" not in text and "/tmp" not in text and sys.prefix not in text


def test_workers_see_no_orders_for_kernels_unless_their_times_do_not_count(monkeypatch):
    name, *others = machine.KERNEL_VARIABLES
    for other in others:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "Haswell")
    seen, told = [], []

    def measure(plan, report):
        yield {"name": "x", "sides": [], "seen": seen.append(os.environ.get(name))}

    monkeypatch.setattr(bench, "MEASURES", {"x": measure})
    full = bench.run(PLAN._replace(quick=False), (), told.append)
    quick = bench.run(PLAN, (), told.append)
    assert seen == [None, "Haswell"] and os.environ[name] == "Haswell"
    assert full["machine"]["ignored"] == {name: "Haswell"} and not quick["machine"]["ignored"]
    assert told == [f"each library chooses its own kernels: without {name}"]


def test_the_record_can_be_drawn_and_read(record):
    assert len(plots.draw(record).axes) == 7
    lines = bench_report.table(record)
    assert "tokens a second" in lines and "times its products" in lines


def test_the_facts_below_a_row_are_in_the_units_that_they_name():
    spreads = {"share": 0.6, "step_over_products": 1.5, "machine_gflops": 80.0, "step_rate": 0.4}
    products = {name: dict.fromkeys(SPREAD, value) for name, value in spreads.items()}
    step = {"row": "step", "tokens": 768, "shards": 1, "bytes": {"gradients": 3 << 20}}
    sides = [{"milliseconds": {"median": 2.0}, "peak": 500 << 20}]
    narrow = {"step_over_products": dict.fromkeys(SPREAD, 1.25)}
    told = {"products": products | {"calls": 27}, "narrow": narrow}
    facts = bench_report._facts(step | {"sides": sides} | told)
    numbers = re.findall(r"\d[\d.,]*%?", "\n".join(facts))
    wanted = {"384,000", "27", "60%", "1.50", "1.25", "40%", "80", "3.0", "500"}
    assert wanted <= {number.rstrip(".,") for number in numbers}


def test_rivals_are_drawn_beside_ours(record):
    found = json.loads(json.dumps(record))
    ratio = {"median": 1.4, "low": 1.1, "high": 1.6}
    for row in found["rows"]:
        row["sides"].append(row["sides"][0] | {"name": "rival", "ratio": ratio})
    left = plots.draw(found).axes[0]
    assert len(left.get_yticks()) == 5 and "rival" in left.get_yticklabels()[0].get_text()
    assert "1.40 (1.10 to 1.60)" in bench_report.table(found)
    lines = bench_report.summary(found).splitlines()
    assert len(lines) == 2 + 5 and lines[-1].startswith("| generation, Mixtral, 1 thread: rival |")
    assert all("| 1.40 (1.10 to 1.60) |" in line for line in lines[2:])
    other = found | {"rows": found["rows"][2:], "machine": {"cpu": "Acme(R) One Processor"}}
    lines = bench_report.summary(found, other).splitlines()
    assert lines[0].endswith(" | ratio, Acme One |")
    assert [line.endswith("| not measured |") for line in lines[2:]] == [True] * 2 + [False] * 3
    layers = bench_report.layer_summary(found, other).splitlines()
    assert len(layers) == 4 and all(line.count("1.40 (1.10 to 1.60)") == 2 for line in layers[2:])
    layers = bench_report.layer_summary(found, other | {"rows": []}).splitlines()
    assert len(layers) == 4 and all(line.endswith("| not measured |") for line in layers[2:])
    assert len(bench_report.layer_summary(record, other).splitlines()) == 2  # nobody was raced


def test_a_record_without_peaks_can_be_drawn_read_and_judged(record):
    found = json.loads(json.dumps(record)) | {"quick": False, "threads": 2}
    for row in found["rows"]:
        row["sides"] = [side | {"peak": None} for side in row["sides"] * 2]
        row["sides"][1]["ratio"] = {"median": 1.4, "low": 1.1, "high": 1.6}
    for one, told in ((record, True), (found, False)):
        titles = [ax.get_title() for ax in plots.draw(one).axes]
        assert ("Memory of training" in titles) == told
        assert ("MiB at most" in bench_report.table(one)) == told
    assert [v.met for v in bench_report.verdicts(found) if v.line == 8] == [None] * 3


def test_one_kind_of_row_can_be_asked_for(tmp_path, capsys):
    assert commands.main(["bench", "--quick", "--only", "import", "--out", str(tmp_path)]) == 0
    assert {row["row"] for row in files.read_json(tmp_path / "speed.json")["rows"]} == {"import"}
    assert "import" in capsys.readouterr().out


def test_a_part_has_a_folder_of_its_own_and_as_many_rounds_as_asked_for(
    record, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    plans = []
    monkeypatch.setattr(plots, "save", lambda *_: None)
    monkeypatch.setattr(bench, "run", lambda plan, *_: plans.append(plan) or record)
    for flags, missing, folder in (
        ([], None, ""),
        ([], "not installed", "quick"),
        (["--threads", "1"], None, "quick"),
        (["--quick"], None, "quick"),
        (["--only", "import"], None, "quick"),
    ):
        monkeypatch.setattr(bench, "why_not", lambda library, missing=missing: missing)
        assert commands.main(["bench", "--rounds", "5", *flags]) == 0
        path = Path("figures", folder, "speed.json")
        assert files.read_json(path) == record
        assert f"Figure: {path.with_suffix('.png')}   record: {path}" in capsys.readouterr().out
        path.unlink()
    assert [plan.rounds for plan in plans] == [5] * 5


def test_who_is_not_raced_is_told_beside_json_too(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "why_not", lambda library: f"no {library} here")
    monkeypatch.setattr(bench, "run", lambda plan, *_: record)
    assert commands.main(["bench", "--json", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == record
    for words in ("PyTorch: no torch here", "Transformers: no transformers here"):
        assert f"Not raced against {words}" in printed.err


def test_a_library_that_does_not_load_is_told():
    with pytest.raises(ValueError, match=r"'import nowhere' must work, got: ModuleNotFoundError"):
        bench._import("import nowhere")


def test_a_folder_of_the_name_of_a_library_is_none(monkeypatch, tmp_path):
    (tmp_path / "torchless").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("torchless")
    assert "not installed: torchless. Install" in bench.why_not("torchless")
    monkeypatch.setattr(bench, "_is_installed", lambda name: False)
    assert bench.this_machine(torch=True)["versions"].keys() == {"python", "numpy"}


def test_it_says_what_is_missing_for_a_race(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert "not installed: transformers. Install" in bench.why_not("transformers")
    monkeypatch.setattr(bench, "TORCH_WORKER", tmp_path / "torch_worker.py")
    assert "of a checkout, which is not here" in bench.why_not("torch")


@pytest.mark.parametrize(
    ("torch", "transformers", "rivals"), [(True, True, 2), (True, False, 0), (False, True, 0)]
)
def test_each_library_is_raced_if_it_is_there(torch, transformers, rivals):
    plan = PLAN._replace(torch=torch, transformers=transformers)
    assert len(plan.rivals("Mixtral")) == rivals
    assert len(plan.rivals("MoE")) == (7 if torch else 0)


def test_the_dense_rival_of_the_overhead_does_the_same_active_work(monkeypatch):
    raced = []
    monkeypatch.setattr(bench.Plan, "race", lambda self, workers, same: raced.append(workers) or {})
    for quick in (True, False):
        list(bench._overhead(PLAN._replace(quick=quick), lambda _: None))
    for dense, moe_side in raced:
        moe = config.from_dict(moe_side.spec["moe"])
        assert dense.spec["hidden"] == moe.top_k * moe.hidden
    assert len(raced) == 2


def test_blocks_are_short_and_patience_is_none_in_a_quick_run_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(race, "race_all", lambda workers, *knobs: asked.append(knobs))
    for quick in (True, False):
        PLAN._replace(quick=quick).race([])
    assert asked == [(1, 0.02, True, 1), (1, 0.3, True, race.PATIENCE)]


def test_layers_of_top_1_take_few_rounds(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "_layer", lambda plan, name, moe, _: asked.append((plan, moe.top_k)))
    list(bench._layers(PLAN._replace(rounds=7, quick=False), lambda _: None))
    assert {(plan.rounds, k) for plan, k in asked} == {(7, 2), (3, 1)}


def test_the_seconds_of_a_turn_are_their_median(monkeypatch):
    clock = itertools.accumulate([0.0, 1.0, 0.0, 9.0, 0.0, 2.0])
    monkeypatch.setattr(bench_products, "time", SimpleNamespace(perf_counter=clock.__next__))
    assert bench_products._seconds(lambda: None, 3) == 2.0


def test_an_update_skips_idle_experts_where_it_is_told_to(monkeypatch):
    moved, moe = [], MoEConfig(num_experts=32, top_k=2, hidden=8)
    monkeypatch.setattr(optimizer, "_adamw", lambda p, *_: moved.append(p.size))
    spec = {"work": "update", "moe": config.to_dict(moe), "width": 16, "tokens": 2, "workers": 1}
    found = {}
    for skip in (False, True):
        with no_settling():
            work = bench_work.build(spec | {"skip_idle": skip})
        work.once()
        found[skip] = sum(moved)
        moved.clear()
    assert found[False] == 16 * 32 * (1 + 2 * 8) and found[True] < found[False] / 3
