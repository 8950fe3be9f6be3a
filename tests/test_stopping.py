"""Training on the command line, killed or interrupted at any moment, goes on bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_commands import ROOT, complaint, elsewhere, main, run  # noqa: F401

from moe_numpy import commands, files
from moe_numpy.lab import plots
from moe_numpy.training import checkpoint

STEPS = 120
FLAGS = [*tiny.FLAGS, "--steps", str(STEPS), "--batch", "8", "--noise", "learned"]
FLAGS += ["--capacity", "1.0", "--overflow", "next_best", "--bias-rate", "0.01", "--text", "text"]

PACE = ["--save-every", "3", "--evaluate-every", "25"]  # a resumed run remembers it


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text").write_text(tiny.text(), encoding="utf-8")
    assert run("train", *FLAGS, *PACE, "--out", "o", cwd=folder).returncode == 0
    return folder / "o"


def start():
    """Start a training in a process of its own, in its own process group like a terminal's job."""
    return subprocess.Popen(
        [sys.executable, "-m", "moe_numpy", "train", *FLAGS, *PACE, "--out", "o"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def steps_saved():
    try:
        return checkpoint.load_checkpoint("o/checkpoint.npz")[1]["step"]
    except ValueError:
        return -1


def stop_in_the_middle(number, delay):
    """Send a signal some time after the first steps were saved; return what the process said."""
    for _ in range(5):
        with start() as process:
            deadline = time.monotonic() + 60
            while steps_saved() < 3 and process.poll() is None:
                assert time.monotonic() < deadline, "no checkpoint came"
                time.sleep(0.002)
            time.sleep(delay)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        if 0 < steps_saved() < STEPS:
            return process.returncode, out, err
        Path("o", "checkpoint.npz").unlink()  # it was done before the signal came: once more
        delay /= 2
    raise AssertionError("the training was always over before the signal came")


def same_end(folder, other):
    """Compare two finished runs: every array, both generators, every evaluation."""
    (arrays, meta), (others, other_meta) = (
        checkpoint.load_checkpoint(Path(f) / "checkpoint.npz") for f in (folder, other)
    )
    assert meta["step"] == STEPS
    for key in ("step", "evaluations", "data_rng", "noise_rng", "config", "training"):
        assert meta[key] == other_meta[key], key
    assert arrays.keys() == others.keys()
    return all(arrays[name].tobytes() == others[name].tobytes() for name in arrays)


def test_a_killed_training_goes_on_to_the_same_bits(uninterrupted):
    delay = np.random.default_rng(os.getpid()).uniform(0.0, 0.3)
    status, _, _ = stop_in_the_middle(signal.SIGKILL, delay)
    assert status == -signal.SIGKILL
    saved = steps_saved()
    assert saved % 3 == 0
    done = run("train", "--resume", "o", cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    assert same_end("o", uninterrupted)
    for name in ("training.json", "training.png"):
        assert Path("o", name).exists()
    record, whole = (json.loads(Path(f, "training.json").read_text()) for f in ("o", uninterrupted))
    assert record["series"] == whole["series"]
    assert record["evaluations"] == whole["evaluations"]
    assert (uninterrupted / "training.png").read_bytes() == Path("o/training.png").read_bytes()


def test_an_interrupted_training_says_how_to_go_on_and_does(uninterrupted):
    status, _, err = stop_in_the_middle(signal.SIGINT, 0.1)
    assert status == 130
    step = steps_saved()
    assert complaint(err) == (
        f"Stopped after step {step} of {STEPS}. "
        "Go on from its last checkpoint: python -m moe_numpy train --resume o"
    )
    assert sorted(os.listdir("o")) == ["checkpoint.npz"]
    assert run("train", "--resume", "o", cwd=os.getcwd()).returncode == 0
    assert same_end("o", uninterrupted)


def test_a_finished_run_can_be_resumed_and_repeated_flags_are_fine(uninterrupted, capsys):
    before = (uninterrupted / "checkpoint.npz").read_bytes()
    text = uninterrupted.parent / "text"
    flags = [flag if flag != "text" else str(text) for flag in FLAGS]
    out = main(capsys, "train", "--resume", uninterrupted, *flags, "--json").out
    assert json.loads(out)["steps"] == STEPS
    assert (uninterrupted / "checkpoint.npz").read_bytes() == before


@pytest.mark.parametrize("text", [5, ["text"], {}], ids=str)
def test_a_text_that_is_no_name_is_refused(text, uninterrupted, capsys):
    arrays, meta = checkpoint.load_checkpoint(uninterrupted / "checkpoint.npz")
    meta["settings"]["text"] = text
    checkpoint.save_checkpoint("bad/checkpoint.npz", arrays, meta)
    told = complaint(main(capsys, "train", "--resume", "bad", status=1).err)
    assert str(Path("bad/checkpoint.npz")) in told


def test_a_text_that_moved_is_asked_for_and_may_lie_elsewhere(uninterrupted, capsys, monkeypatch):
    Path("moved").mkdir()
    Path("moved", "checkpoint.npz").write_bytes((uninterrupted / "checkpoint.npz").read_bytes())
    text = uninterrupted.parent / "text"
    text.rename(text.with_name("renamed"))
    try:
        error = complaint(main(capsys, "train", "--resume", "moved", status=1).err)
        assert str(text) in error
        main(capsys, "train", "--resume", "moved", "--text", text.with_name("renamed"))
    finally:
        text.with_name("renamed").rename(text)


@pytest.mark.parametrize(
    ("place", "error", "told"),
    [
        (
            "training.loop.save_run",
            KeyboardInterrupt,
            "Stopped after step 0 of 12. The run has no checkpoint yet: start anew.",
        ),
        (
            "lab.plots.save",
            KeyboardInterrupt,
            "Stopped after step 12 of 12. "
            "Go on from its last checkpoint: python -m moe_numpy train --resume 'o o'",
        ),
        (
            "lab.plots.save",
            PermissionError("somebody has it open."),
            "moe_numpy train: error: somebody has it open. "
            "Go on from its last checkpoint: python -m moe_numpy train --resume 'o o'",
        ),
    ],
    ids=str,
)
def test_an_end_at_any_moment_says_how_to_go_on(place, error, told, capsys, monkeypatch):
    def end(*_):
        raise error

    monkeypatch.setattr(f"moe_numpy.{place}", end)
    status = 130 if error is KeyboardInterrupt else 1
    out = main(capsys, "train", *tiny.FLAGS, "--text", "text", "--out", "o o", status=status)
    assert complaint(out.err) == told


def test_what_cannot_draw_a_picture_does_not_begin_to_train(monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "easel")
    done = run("train", *tiny.FLAGS, "--text", "text", "--out", "o", cwd=tmp_path)
    assert done.returncode == 1 and "'easel' is not a valid value" in complaint(done.stderr)
    assert not Path("o").exists()


@pytest.mark.parametrize(
    "study",
    [("collapse", "--quick"), ("bench", "--quick"), ("systems", "mixtral_8x7b", "--train")],
    ids=lambda study: study[0],
)
def test_what_cannot_draw_a_picture_does_not_begin_a_study(study, monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "easel")
    done = run(*study, "--out", "o", cwd=tmp_path, timeout=30)
    assert done.returncode == 1 and "'easel' is not a valid value" in complaint(done.stderr)
    assert not Path("o").exists() or not os.listdir("o")


def test_a_record_is_there_before_its_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "draw", lambda record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        commands._keep({"study": "parity"}, tmp_path / "record.json")
    assert files.read_json(tmp_path / "record.json") == {"study": "parity"}


def test_what_a_killed_run_left_of_a_checkpoint_is_removed_by_the_next_one(tmp_path):
    left, other = (tmp_path / f".{name}.npz.0123" for name in ("checkpoint", "mine"))
    for path in (left, other, tmp_path / "checkpoint.npz"):
        path.write_bytes(b"half")
    with files.held(tmp_path, "checkpoint.npz"):
        assert not left.exists()
        left.write_bytes(b"of the run at work")
        with pytest.raises(ValueError, match="one run at a time"):
            with files.held(tmp_path, "checkpoint.npz"):
                pass
        assert left.exists()
    assert other.exists() and (tmp_path / "checkpoint.npz").exists()


def test_a_finished_run_keeps_its_time(uninterrupted, capsys):
    text, record = uninterrupted.parent / "text", uninterrupted / "training.json"
    before = record.read_bytes()
    main(capsys, "train", "--resume", uninterrupted / "checkpoint.npz", "--text", text)
    assert record.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs sh")
@pytest.mark.parametrize(("flags", "status"), [([], 0), (["--top-k", "9"], 1)], ids=str)
def test_a_closed_standard_error_changes_no_exit_status(flags, status, tmp_path):
    command = ["train", *tiny.FLAGS, *flags, "--text", "text", "--out", "o", "--json"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m moe_numpy "$@" 2>&-', sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert done.returncode == status
    assert bool(done.stdout) == (status == 0)


def test_an_interrupted_collapse_study_ends_at_once_and_says_so(tmp_path):
    """A terminal sends Ctrl-C to the whole group: the parent and the runs that it started."""
    with subprocess.Popen(
        [sys.executable, "-m", "moe_numpy", *"collapse --processes 2 --out c".split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    ) as process:
        try:
            time.sleep(3)
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=8)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert complaint(err) == "moe_numpy collapse: stopped."
    assert os.listdir(tmp_path / "c") == []
