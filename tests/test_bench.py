"""The benchmark: fair races, honest spreads, and a record that can be drawn. Without PyTorch."""

import json
import sys
import threading

import numpy as np
import pytest

from moe_numpy import commands, config, files, tree
from moe_numpy.backend import xp
from moe_numpy.config import MoEConfig
from moe_numpy.lab import (
    bench,
    bench_process,
    bench_products,
    bench_report,
    bench_work,
    plots,
    race,
)
from moe_numpy.training import loop

PLAN = bench.Plan(rounds=2, threads=1, quick=True, torch=False)
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
    worker = bench.ours("layer", PLAN, moe=moe, width=16, tokens=32)
    return worker._replace(spec=worker.spec | changes)


def rival(plant):
    """Run the same layer in a program of its own, with something changed in its values."""
    return layer()._replace(
        name="rival", command=(sys.executable, "-c", FAULTY.format(plant=plant))
    )


def run_of(name):
    cfg = bench.models(quick=True)[name]
    return loop.new_run(bench_work.text(cfg.vocab_size), cfg, bench_work.training(50))


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


# -------------------------------------------------------------------------------------------- races
def test_a_race_checks_the_values_and_relates_the_times():
    found = race.race("one", layer(), "two", rival("pass"), rounds=2, block=0.01)
    assert [side["name"] for side in found["sides"]] == ["one", "two"]
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
        race.race("one", layer(), "two", rival(plant), rounds=2)


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
        counts[name] = len(bench_products.products_of_step(run))
        assert type(run.params.token_VC) is np.ndarray
    # One layer: 8, 7 + 8 * 2 or 7 + 8 * 3 products, and the head; each is three with its backward.
    assert counts == {"dense": 27, "MoE": 72, "Mixtral": 96}


def test_the_replay_computes_the_same_products_each_in_its_thread(monkeypatch):
    rng, threads = np.random.default_rng(0), set()
    multiply = bench_products._multiply
    noting = lambda own: (threads.add(threading.current_thread()), multiply(own))  # noqa: E731
    monkeypatch.setattr(bench_products, "_multiply", noting)
    products = [(i % 2, *rng.random((2, 4, 4)), np.zeros((4, 4))) for i in range(6)]
    bench_products.replay(products)
    assert all((result == a @ b).all() for _, a, b, result in products)
    assert len(threads) == 2


def test_the_operations_are_those_of_the_shapes():
    a, b = np.ones((5, 3, 4)), np.ones((4, 6))
    with bench_products.noted_products() as noted:
        xp.matmul(a, b, out=np.empty((5, 3, 6)))
        _ = xp.ones((2, 7)) @ xp.ones((7, 2))
        _ = bench_products.watch(a) @ np.ones(4)  # sums of rows are no product of matrices
    found = [bench_products.flops([product]) for product in noted]
    assert found == [2 * 5 * 3 * 4 * 6, 2 * 2 * 7 * 2]
    assert type(xp.empty(3)) is np.ndarray and isinstance(xp.matmul, np.ufunc)


def test_the_step_is_the_same_while_it_is_watched():
    one, two = run_of("Mixtral"), run_of("Mixtral")
    loop.take_step(one)
    bench_products.products_of_step(two)
    pairs = zip(tree.leaves(one.params), tree.leaves(two.params), strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in pairs)


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


def test_large_gradients_are_sketched_and_a_wrong_one_is_still_seen():
    gradient = np.random.default_rng(0).standard_normal((3, 600, 700))
    short = bench_process.sketch("w", gradient)
    assert short.shape == (3, 600) and bench_process.sketch("w", gradient[0, :2]).shape == (2, 700)
    gradient[1, 5, 6] += 5.0
    assert np.abs(bench_process.sketch("w", gradient) - short).max() > 1e-3 * np.abs(short).max()


# ------------------------------------------------------------------------------------------ command
@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    # What is looked at here is the record, on any machine: no rivals.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "why_alone", lambda: "not in this test")
        arguments = ["bench", "--quick", "--rounds", "2", "--threads", "1", "--out", str(folder)]
        assert commands.main(arguments) == 0
    assert (folder / "speed.png").stat().st_size > 10_000
    return files.read_json(folder / "speed.json")


def test_the_record_has_every_row_with_its_fields(record):
    assert record["study"] == "speed" and record["quick"] and record["threads"] == 1
    assert {row["row"] for row in record["rows"]} == set(bench.MEASURES)
    for row in record["rows"]:
        assert row["sides"][0]["milliseconds"].keys() == SPREAD, row["name"]
    steps = [row for row in record["rows"] if row["row"] == "step"]
    assert [row["name"] for row in steps] == ["dense", "MoE", "Mixtral"]
    for row in steps:
        assert set(row["bytes"]) == {"parameters", "gradients", "optimizer", "activations"}
        assert row["sides"][0]["peak"] > 10e6
        products = row["products"]
        for name in ("step_over_products", "share", "machine_gflops", "step_rate"):
            assert products[name]["low"] > 0
        assert products["step_over_products"]["low"] > 0.8 and products["step_rate"]["high"] < 1.2
    [written] = [row for row in record["rows"] if row["row"] == "generation"]
    assert len(written["by_length"]) == written["tokens"] == 60 and written["threads"] == 1


def test_the_record_tells_the_machine_and_no_path_of_it(record):
    assert record["machine"].keys() == {"cpu", "cores", "blas", "versions"}
    assert record["machine"]["versions"]["numpy"] == np.__version__
    text = json.dumps(record)
    assert "/home" not in text and "/tmp" not in text and sys.prefix not in text


def test_the_record_can_be_drawn_and_read(record):
    assert len(plots.draw(record, "speed.json").axes) == 4
    lines = bench_report.table(record)
    assert "tokens a second" in lines and "times its products" in lines


def test_rivals_are_drawn_beside_ours(record):
    found = json.loads(json.dumps(record))
    ratio = {"median": 1.4, "low": 1.1, "high": 1.6}
    for row in found["rows"]:
        row["sides"].append(row["sides"][0] | {"name": "rival", "ratio": ratio})
    left = plots.draw(found, "speed.json").axes[0]
    assert len(left.get_yticks()) == 4 and "rival" in left.get_yticklabels()[0].get_text()
    assert "1.40 (1.10 to 1.60)" in bench_report.table(found)


def test_one_kind_of_row_can_be_asked_for(tmp_path, capsys):
    assert commands.main(["bench", "--quick", "--only", "import", "--out", str(tmp_path)]) == 0
    assert {row["row"] for row in files.read_json(tmp_path / "speed.json")["rows"]} == {"import"}
    assert "import" in capsys.readouterr().out


def test_it_says_what_is_missing_for_a_race(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert "not installed: torch, transformers" in bench.why_alone()
    monkeypatch.setattr(bench, "TORCH_WORKER", tmp_path / "torch_worker.py")
    assert "of a checkout, which is not here" in bench.why_alone()
