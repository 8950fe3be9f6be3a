"""The comparison of two backends, run with NumPy on both sides."""

import itertools
from types import SimpleNamespace

import tiny

from moe_numpy import backend, commands
from moe_numpy.lab import parity, plots
from moe_numpy.moe import experts


def test_two_runs_on_one_backend_have_the_same_losses():
    record = parity.run_parity(steps=3, widths=(8,), names=("numpy", "numpy"))
    for found in record["losses"].values():
        assert found["difference"] == 0.0 and found["passed"]
        assert len(found["series"][0]) == 3
    assert [row["width"] for row in record["speed"]] == [8]
    assert min(record["speed"][0]["milliseconds"]) > 0.0


def test_a_backend_that_computes_something_else_fails(monkeypatch):
    honest = experts.experts_forward

    def off(x_RC, params, cfg, offsets):
        y_RC, cache = honest(x_RC, params, cfg, offsets)
        return y_RC * (1.0 + 1e-3 * (backend.xp.__name__ == "other")), cache

    real = backend._library
    other = type(backend.xp)("other")
    vars(other).update(vars(real("numpy")), __name__="other")
    monkeypatch.setattr(backend, "_library", lambda name: other if name == "cupy" else real(name))
    monkeypatch.setattr(experts, "few_launches", lambda: False)
    monkeypatch.setattr(experts, "experts_forward", off)
    record = parity.run_parity(steps=2, widths=(), names=("numpy", "cupy"))
    assert not record["losses"]["float64"]["passed"]


def test_the_time_of_a_step_is_the_median_after_the_one_that_warms_up(monkeypatch):
    assert parity.TIMED == 5
    clock = itertools.accumulate([0, 90, 0, 1, 0, 2, 0, 5, 0, 6, 0, 70])
    monkeypatch.setattr(parity, "time", SimpleNamespace(perf_counter=clock.__next__))
    monkeypatch.setattr(parity.loop, "take_step", lambda run: None)
    assert parity._milliseconds("numpy", tiny.corpus(), 8) == 5000.0


def test_the_figure_labels_its_axes():
    record = parity.run_parity(steps=2, widths=(8, 12), names=("numpy", "numpy"))
    for ax in plots.parity_figure(record).axes:
        assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title()


def test_without_a_gpu_the_command_says_that_it_was_skipped(capsys, monkeypatch):
    real = backend._library

    def no_gpu(name):
        if name == "cupy":
            raise backend.BackendError("no GPU here")
        return real(name)

    monkeypatch.setattr(backend, "_library", no_gpu)
    assert commands.main(["parity"]) == 0
    assert capsys.readouterr().out.startswith("Skipped")


def test_the_command_fails_if_the_losses_differ(capsys, monkeypatch, tmp_path):
    record = parity.run_parity(steps=2, widths=(8,), names=("numpy", "numpy"))
    real = backend._library
    monkeypatch.setattr(backend, "_library", lambda _: real("numpy"))
    monkeypatch.setattr(parity, "run_parity", lambda steps: record)
    monkeypatch.setattr(plots, "save", lambda *_: None)
    for passed, status in ((True, 0), (False, 1)):
        record["losses"]["float64"]["passed"] = passed
        assert commands.main(["parity", "--out", str(tmp_path)]) == status
        assert ("FAIL" in capsys.readouterr().out) == (not passed)
