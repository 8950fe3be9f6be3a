"""Bad input: one line that says who complains, what came and what to do; and nothing is lost."""

import concurrent.futures
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import strict_cupy
import tiny
from test_commands import ROOT, complaint, elsewhere, main, run, trained  # noqa: F401

from moe_numpy import commands
from moe_numpy.training import loop

TRAIN = ["train", *tiny.FLAGS, "--text", "text", "--out", "o"]
GENERATE = ["generate", "--checkpoint", "run"]


@pytest.fixture(autouse=True)
def bad_files(elsewhere, trained):  # noqa: F811
    whole = (trained / "checkpoint.npz").read_bytes()
    for folder in ("run", "cut", "noise"):
        Path(folder).mkdir()
    Path("run", "checkpoint.npz").write_bytes(whole)
    Path("cut", "checkpoint.npz").write_bytes(whole[: len(whole) // 2])
    Path("noise", "checkpoint.npz").write_bytes(np.random.default_rng(0).bytes(999))
    Path("empty").write_bytes(b"")
    Path("short").write_text("too short")
    Path("latin").write_bytes("caf\u00e9".encode("latin-1") * 200)
    Path("array.npy").write_bytes(b"")
    np.save("array.npy", np.zeros(3))


TABLE = [
    ([*TRAIN, "--top-k", "5"], r"top_k .*<= num_experts \(4\), got 5\. Lower"),
    ([*TRAIN, "--top-k", "0"], r"top_k must be .*at least 1, got 0"),
    ([*TRAIN, "--experts", "-1"], r"num_experts must be .*at least 1, got -1"),
    ([*TRAIN, "--hidden", "0"], r"hidden must be .*at least 1, got 0"),
    ([*TRAIN, "--experts", "0", "--hidden", "0"], r"hidden must be .*at least 1, got 0"),
    ([*TRAIN, "--hidden", "-3"], r"hidden must be .*at least 1, got -3"),
    ([*TRAIN, "--capacity", "0"], r"factor must be positive.*got 0\.0\. Use"),
    ([*TRAIN, "--capacity", "nan"], r"factor must be positive.*got nan"),
    ([*TRAIN, "--capacity", "inf"], r"factor must be positive and finite, got inf"),
    (
        [*TRAIN, "--capacity", "1", "--overflow", "none", "--priority", "score"],
        r"--priority must come with a limit, got --overflow none",
    ),
    ([*TRAIN, "--priority", "score"], r"--priority must come with --capacity.*Add --capacity"),
    ([*TRAIN, "--overflow", "drop"], r"--overflow must come with --capacity"),
    ([*TRAIN, "--noise-scale", "1"], r"--noise-scale must come with --noise"),
    ([*TRAIN, "--noise", "jitter", "--noise-scale", "2"], r"0 < eps < 1, got 2\.0"),
    ([*TRAIN, "--noise", "gaussian", "--noise-scale", "-1"], r"std must be .*got -1\.0"),
    ([*TRAIN, "--noise", "gaussian", "--noise-scale", "inf"], r"std must be .*got inf"),
    ([*TRAIN, "--balance", "swich"], r"--balance must name terms of switch,.*got 'swich'.*example"),
    ([*TRAIN, "--balance", "switch=x"], r"--balance must .*got 'switch=x'.*example"),
    ([*TRAIN, "--balance", "switch=-1"], r"weight must be positive and finite, got -1\.0"),
    ([*TRAIN, "--balance", "switch=inf"], r"weight must be positive and finite, got inf"),
    ([*TRAIN, "--noise", "learned", "--noise-scale", "inf"], r"floor must be .*got inf"),
    ([*TRAIN, "--clip", "inf"], r"clip must be positive and finite, got inf"),
    ([*TRAIN, "--balance", "switch,switch=1"], r"each .*balance term may come once"),
    ([*TRAIN, "--balance", "load"], r"LoadLoss needs normal noise.*Add LearnedNoise"),
    ([*TRAIN, "--bias-rate", "-1"], r"bias_rate must not be negative.*got -1\.0"),
    ([*TRAIN, "--bias-rate", "inf"], r"bias_rate must .*got inf"),
    ([*TRAIN, "--experts", "0", "--top-k", "2"], r"--top-k must come with experts.*Leave it out"),
    ([*TRAIN, "--heads", "3"], r"width must be a multiple of heads \(3\), got 16"),
    ([*TRAIN, "--kv-heads", "3"], r"kv_heads must divide heads \(2\), got 3"),
    ([*TRAIN, "--heads", "16", "--positions", "rotary"], r"even head width, got 1"),
    ([*TRAIN, "--layers", "0"], r"layers must be .*at least 1, got 0"),
    ([*TRAIN, "--context", "0"], r"context must be .*at least 1, got 0"),
    ([*TRAIN, "--steps", "0"], r"steps must be .*at least 1, got 0"),
    ([*TRAIN, "--batch", "-2"], r"batch must be .*at least 1, got -2"),
    ([*TRAIN, "--rate", "0"], r"rate must be positive and finite, got 0\.0"),
    ([*TRAIN, "--rate", "nan"], r"rate must be positive and finite, got nan"),
    ([*TRAIN, "--final-rate", "inf"], r"final_rate must .*got inf"),
    ([*TRAIN, "--warmup", "-1"], r"warmup must .*got -1"),
    ([*TRAIN, "--warmup", "1" * 400], r"warmup must be below 2\*\*63, got 1+\. Take"),
    ([*TRAIN, "--seed", "-1"], r"seed must .*got -1"),
    ([*TRAIN, "--clip", "-1"], r"clip must be positive and finite, got -1\.0"),
    ([*TRAIN, "--smoothing", "1"], r"smoothing < 1, got 1\.0"),
    ([*TRAIN, "--weight-decay", "-1"], r"weight_decay must not be negative"),
    ([*TRAIN, "--beta2", "1"], r"beta2 < 1, got 1\.0"),
    ([*TRAIN, "--momentum", "0.5"], r"--momentum must come with --optimizer sgd, got adamw"),
    ([*TRAIN, "--optimizer", "sgd", "--beta1", "0.5"], r"--beta1 must come with .*adamw, got sgd"),
    (
        ["train", "--preset", "switch", "--momentum", "0.5"],
        r"--momentum must come with .*got adamw",
    ),
    ([*TRAIN, "--optimizer", "sgd", "--skip-idle"], r"--skip-idle must come with .*adamw, got sgd"),
    (["train", "--experts", "0", "--skip-idle"], r"--skip-idle must come with experts"),
    ([*TRAIN, "--text", "empty"], r"must hold text, got the empty 'empty'"),
    ([*TRAIN, "--text", "short"], r"must hold at least context \+ 1 \(17\) characters, got 8\."),
    ([*TRAIN, "--text", "latin"], r"must be UTF-8, got byte 0xe9 at offset 3 of 'latin'\. Save"),
    ([*TRAIN, "--text", "none"], r"readable file, got 'none' \(No such file"),
    ([*TRAIN, "--text", "."], r"readable file, got '\.' \(Is a directory"),
    ([*TRAIN, "--out", "text"], r"text must be writable, got: .*Choose another"),
    ([*TRAIN, "--out", "text/below"], r"text/below must be writable, got: .*Choose another"),
    ([*TRAIN, "--out", "run"], r"got run, which holds one\. .*--resume run"),
    (["train", "--resume", "none"], r"none/checkpoint\.npz must be a checkpoint, got no such file"),
    (
        ["train", "--resume", "cut/checkpoint.npz"],
        r"cut/checkpoint\.npz must be a whole .*truncated",
    ),
    (["train", "--resume", ""], r"checkpoint\.npz must be a checkpoint, got no such file"),
    (["train", "--resume", "cut"], r"cut/checkpoint\.npz must be a whole checkpoint.*truncated"),
    (["train", "--resume", "noise"], r"noise/checkpoint\.npz must be a whole checkpoint"),
    (["train", "--resume", "run", "--top-k", "1"], r"--top-k must be .*\(2\), got 1\. Leave it"),
    (["train", "--resume", "run", "--steps", "99"], r"--steps must be .*\(12\), got 99\. Leave it"),
    (
        ["train", "--resume", "run", "--noise", "learned"],
        r"--noise must be .*\(none\), got learned",
    ),
    (["train", "--resume", "run", "--text", "short"], r"must be the one that the run was started"),
    (["train", "--resume", "run", "--out", "o"], r"--out .*--resume.*Leave"),
    (["generate"], r"--checkpoint must name a run.*python -m moe_numpy train"),
    (["generate", "--checkpoint", "none"], r"none must be a checkpoint, got no such file"),
    (["generate", "--checkpoint", "cut"], r"must be a whole checkpoint.*truncated"),
    (["generate", "--checkpoint", "text"], r"text must be a whole checkpoint"),
    (["generate", "--checkpoint", "array.npy"], r"array\.npy must be a whole checkpoint"),
    ([*GENERATE, "--tokens", "-1"], r"--tokens must not be negative.*got -1\. Use"),
    ([*GENERATE, "--seed", "-1"], r"seed must not be negative.*got -1\."),
    ([*GENERATE, "--temperature", "-1"], r"temperature must be .*got -1\.0"),
    ([*GENERATE, "--temperature", "nan"], r"temperature must be .*got nan"),
    ([*GENERATE, "--tokens", "0", "--top-p", "2"], r"0 < top_p <= 1, got 2\.0"),
    ([*GENERATE, "--top-p", "0"], r"0 < top_p <= 1, got 0\.0"),
    ([*GENERATE, "--top-k", "0"], r"top_k must be at least 1, got 0"),
    ([*GENERATE, "--prompt", ""], r"prompt must hold at least one token, got none"),
    ([*GENERATE, "--prompt", "Z"], r"must be in the alphabet .*got 'Z' \(U\+005A\) at position 0"),
    (["check", "sofmax"], r"must be one of the package's, got 'sofmax'\. Did you mean softmax"),
    (["check", "relu", "--seed", "-1"], r"seed must not be negative.*got -1\."),
    (["figures", "none"], r"none must hold records.*python -m moe_numpy collapse"),
    (["figures", "text"], r"text must hold records"),
    (["notebooks", "--folder", "none"], r"none must hold sources \(06_top_k\.py\), got none"),
    (["collapse", "--experts", "4", "--top-k", "5"], r"num_experts \(4\), got 5"),
    (["collapse", "--experts", "0"], r"num_experts must be .*got 0"),
    (["collapse", "--out", "text", "--steps", "1", "--seeds", "1"], r"text must be writable"),
    *(
        (["collapse", "--settings", flag, "1"], rf"{flag} must not come with --settings, got 1:")
        for flag in ("--steps", "--seeds", "--experts", "--top-k", "--processes")
    ),
    (["systems", "--seeds", "2"], r"--seeds must come with --train, got it alone\. Add --train"),
    (["systems", "switch", "--out", "o"], r"--out must come with --train, got it alone"),
]


IDS = [" ".join(arguments).replace(" ".join(TRAIN), "train")[:60] for arguments, _ in TABLE]


def test_the_study_of_settings_is_refused_on_the_gpu(capsys):
    with strict_cupy.device():
        found = main(capsys, "collapse", "--settings", "--backend", "cupy", status=1)
    assert re.search(r"--backend must be numpy with --settings, got cupy.*Leave it", found.err)


@pytest.mark.parametrize(("arguments", "expected"), TABLE, ids=IDS)
def test_bad_input_is_refused_in_one_line(arguments, expected, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    found = main(capsys, *arguments, status=1)
    assert found.out.strip() == "" or arguments[0] in ("collapse",)
    line = complaint(found.err)
    assert line.startswith(f"moe_numpy {arguments[0]}: error: ")
    assert re.search(expected, line), line
    assert {p: p.stat().st_mtime_ns for p in Path().rglob("*") if p.is_file()}.items() <= (
        before.items()
    ), "a refusal wrote a file"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["collapse", "--steps", "abc"], r"argument --steps: .*whole number.*'abc'"),
        (["collapse", "--seeds", "0"], r"argument --seeds: must be at least 1, got 0"),
        (["train", "--save-every", "0"], r"argument --save-every: must be at least 1, got 0"),
        (["train", "--layers", "1.5"], r"argument --layers: invalid int value: '1\.5'"),
        (["train", "--norm", "batch"], r"argument --norm: invalid choice: 'batch'"),
        *(
            (command.split(), r"argument --(out|checkpoint): must be a name, got ''")
            for command in ("collapse --out=", "train --out=", "generate --checkpoint=")
        ),
        (["trian"], r"invalid choice: 'trian'"),
        ([], r"required: COMMAND"),
    ],
)
def test_a_flag_that_cannot_be_read_shows_the_usage_and_the_reason(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(arguments)
    assert stop.value.code == 2
    assert re.search(expected, capsys.readouterr().err.splitlines()[-1])


WILD = ["--clip", "0", "--optimizer", "sgd", "--warmup", "0", "--rate"]


@pytest.mark.parametrize("more", [["1e30"], ["1e300", "--save-every", "1"], ["1e30", "--steps=1"]])
def test_a_loss_that_is_not_a_number_is_told_in_one_line_and_the_run_can_be_read(more):
    done = run(*TRAIN, *WILD, *more, cwd=os.getcwd())
    assert done.returncode == 1
    assert re.search(r"must stay finite, got .* at step \d+ of \d+\. Lower", complaint(done.stderr))
    params, _, _ = loop.load_model("o/checkpoint.npz")
    assert np.isfinite(params.token_VC).all()
    assert os.listdir("o") == ["checkpoint.npz"]


def test_a_model_that_blew_up_is_told_in_one_line_and_without_warnings():
    flags = ["--rate", "1e10", "--warmup", "0", "--save-every", "1"]
    assert run(*TRAIN, *flags, cwd=os.getcwd()).returncode == 1
    done = run("generate", "--checkpoint", "o", cwd=os.getcwd())
    assert done.returncode == 1
    assert re.search(r"finite logits, got nan\. Its training blew up", complaint(done.stderr))


@pytest.mark.parametrize(
    ("came", "words"), [("Unable to allocate 9 TiB", ": Unable to allocate 9 TiB"), ("", "")]
)
def test_too_little_memory_is_told_in_one_line(came, words, monkeypatch, capsys):
    def greedy(*_):
        raise MemoryError(came)

    monkeypatch.setattr(loop, "new_run", greedy)
    told = complaint(main(capsys, *TRAIN, status=1).err)
    assert told == f"moe_numpy train: out of memory{words}. Take smaller sizes."


def test_more_layers_than_a_float_can_count_are_refused_in_one_line(capsys):
    told = complaint(main(capsys, *TRAIN, "--layers", str(10**400), status=1).err)
    assert told.startswith("moe_numpy train: error: ModelConfig: layers must be below 2**63")
    assert told.endswith("Take a smaller one.")


def test_a_capacity_without_end_is_that_of_all_choices(capsys):
    flags = ["--steps", "1", "--capacity"]
    main(capsys, *TRAIN[:-1], "huge", *flags, "1e300")
    main(capsys, *TRAIN[:-1], "large", *flags, "100")
    huge, large = (loop.load_model(f"{name}/checkpoint.npz")[0] for name in ("huge", "large"))
    assert tiny.same_bits(huge, large)


def test_runs_that_begin_together_each_have_a_folder():
    Path("runs", "3").mkdir(parents=True)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: commands._new_folder(Path("runs")), range(24)))
    assert sorted(found) == sorted(Path("runs", str(i)) for i in range(4, 28))


def test_a_reader_that_stops_listening_hears_no_complaint():
    with subprocess.Popen(
        [sys.executable, "-m", "moe_numpy", *GENERATE, "--tokens", "2000"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        stderr = process.stderr.read().decode()
    assert stderr == ""


def test_an_existing_run_is_refused_and_nothing_is_lost(capsys):
    path = Path("run", "checkpoint.npz")
    before = path.read_bytes()
    main(capsys, *TRAIN[:-1], "run", status=1)
    assert path.read_bytes() == before and os.listdir("run") == ["checkpoint.npz"]
