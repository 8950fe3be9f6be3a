"""The command line as a user meets it: what it leaves behind, and how it says no."""

import functools
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from moe_numpy import commands, files, ledger, settings
from moe_numpy.classroom import lessons, registry
from moe_numpy.lab import bench, collapse
from moe_numpy.ops import softmax
from moe_numpy.training import checkpoint, loop

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "collapse",
    "train",
    "generate",
    "check",
    "systems",
    "figures",
    "notebooks",
    "bench",
    "parity",
)
GREEK = "\u03b1\u03b2\u03b3 \u03b4\u03b5\U0001f600\u4e2d\u6587 "


def run(*arguments, cwd=ROOT, timeout=120):
    """Run the command line in a process of its own, elsewhere than in the repository."""
    return subprocess.run(
        [sys.executable, "-m", "moe_numpy", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )


def complaint(stderr):
    """Leave out the progress bar; what is left must be one line without a traceback."""
    assert "Traceback" not in stderr
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip()]
    lines = [line for line in lines if not re.match(r"(train|collapse): +\d+%", line)]
    assert len(lines) == 1, stderr
    return lines[0]


def main(capsys, *arguments, status=0):
    """Call the command line in this process; return what it printed on either stream."""
    capsys.readouterr()
    assert commands.main([str(argument) for argument in arguments]) == status
    return capsys.readouterr()


def png_size(path):
    content = Path(path).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(tiny.text(), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").write_text(tiny.text(), encoding="utf-8")
    arguments = ["train", *tiny.FLAGS, "--text", str(folder / "text"), "--out", str(folder)]
    assert commands.main(arguments) == 0
    return folder


# ------------------------------------------------------------------------------------ help, train
def test_every_command_explains_itself():
    assert all(command in run("--help").stdout for command in COMMANDS)
    assert run("--version").stdout.startswith("moe_numpy 0.")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_says_what_it_does_and_what_is_the_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main([command, "--help"])
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert f"usage: python -m moe_numpy {command}" in words
    assert getattr(commands, command).__doc__.split(".")[0] in words


def test_the_help_tells_the_defaults_that_the_code_has(capsys):
    study, noises = collapse.Study(), (kind() for kind in settings.NOISES.values())
    knobs = zip(noises, settings.NOISE_KNOB.values(), strict=True)
    scales = [f"{getattr(noise, knob):g}" for noise, knob in knobs]
    told = {
        "collapse": (
            f"training steps of a run ({study.steps})",
            f"number of seeds ({len(study.seeds)})",
            f"experts in a layer ({study.num_experts})",
            f"experts per token ({study.top_k})",
        ),
        "bench": (f"--only ROW [ROW ...] {', '.join(bench.MEASURES)}", "of each race (7)"),
        "train": (f"of the noise ({', '.join(scales)})", f"({settings.DEFAULTS['steps']}; "),
    }
    for command, texts in told.items():
        with pytest.raises(SystemExit):
            commands.main([command, "--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert [text for text in texts if text not in words] == []


def test_train_leaves_a_checkpoint_a_record_and_a_picture(elsewhere):
    done = run("train", *tiny.FLAGS, "--text", "text", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    folder = elsewhere / "runs" / "1"
    assert sorted(os.listdir(folder)) == ["checkpoint.npz", "training.json", "training.png"]
    record = files.read_json(folder / "training.json")
    assert record["steps"] == 12 and record["study"] == "training"
    assert f"Validation loss {record['validation_loss']:.3f}" in done.stdout
    assert min(png_size(folder / "training.png")) > 300
    assert checkpoint.load_checkpoint(folder / "checkpoint.npz")[1]["step"] == 12


def test_train_on_the_built_in_corpus_prints_its_record_as_json(elsewhere):
    flags = [*tiny.FLAGS, "--steps", "2", "--evaluate-every", "2", "--out", "o"]
    done = run("train", *flags, "--json", cwd=elsewhere)
    record = json.loads(done.stdout)
    assert record["checkpoint"] == str(Path("o/checkpoint.npz"))
    assert record["corpus"]["train"] == 270_000
    assert record["config"]["moe"]["num_experts"] == 4
    assert record["training"]["steps"] == record["steps"] == 2
    assert [e["step"] for e in record["evaluations"]] == [2]
    assert {"uniform", "unigram", "2-gram"} <= record["references"].keys()
    assert {"step", "training_loss", "share", "drop_rate"} <= record["series"].keys()
    assert record["versions"]["numpy"] == np.__version__


def test_runs_are_numbered_on(elsewhere, capsys):
    for name in ("3", "old", "10"):
        (elsewhere / "runs" / name).mkdir(parents=True)
    main(capsys, "train", *tiny.FLAGS, "--steps", 2, "--text", "text")
    assert (elsewhere / "runs" / "11" / "checkpoint.npz").exists()


FLAGS = {
    "--experts 0 --hidden 20": lambda cfg, _: (cfg.moe, cfg.hidden) == (None, 20),
    "--noise learned": lambda cfg, _: cfg.moe.noise.floor == 0.01,
    "--noise gaussian --noise-scale 0.5": lambda cfg, _: cfg.moe.noise.std == 0.5,
    "--noise jitter --noise-scale 0.5": lambda cfg, _: cfg.moe.noise.eps == 0.5,
    "--capacity 1.5": lambda cfg, _: cfg.moe.capacity.overflow == "drop",
    "--capacity 2 --overflow next_best --priority choice": lambda cfg, _: (
        (cfg.moe.capacity.factor, cfg.moe.capacity.priority) == (2, "choice")
    ),
    "--capacity 2 --overflow none": lambda cfg, _: cfg.moe.capacity is None,
    "--balance none": lambda cfg, _: cfg.moe.balance == (),
    "--balance z,switch=0.5": lambda cfg, _: [t.weight for t in cfg.moe.balance] == [0.001, 0.5],
    "--bias-rate 0.1": lambda cfg, _: (cfg.moe.bias_rate, cfg.moe.balance) == (0.1, ()),
    "--bias-rate 0.1 --balance z": lambda cfg, _: [t.weight for t in cfg.moe.balance] == [0.001],
    "--top-k 1 --gate-weights renormalized": lambda cfg, _: cfg.moe.renormalized,
    "--positions rotary --norm rmsnorm --head untied": lambda cfg, _: (
        (cfg.positions, cfg.norm, cfg.tied) == ("rotary", "rmsnorm", False)
    ),
    "--kv-heads 1 --activation swiglu": lambda cfg, _: (cfg.kv_heads, cfg.moe.gated) == (1, True),
    "--optimizer sgd --momentum 0.5": lambda _, training: training.optimizer.momentum == 0.5,
    "--optimizer sgd --weight-decay 0.3": lambda _, training: (
        training.optimizer.weight_decay == 0.3
    ),
    "--beta1 0.5 --weight-decay 0": lambda _, training: training.optimizer.weight_decay == 0,
    "--clip 0 --smoothing 0.1 --seed 3": lambda _, training: (
        (training.clip, training.smoothing, training.seed) == (None, 0.1, 3)
    ),
    "--recompute": lambda cfg, training: cfg.recompute and not training.optimizer.skip_idle,
    "--skip-idle": lambda cfg, training: training.optimizer.skip_idle and not cfg.recompute,
    "--dtype float64 --warmup 0 --final-rate 0": lambda _, training: training.final_rate == 0,
}


@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_reaches_the_configuration(flags, monkeypatch, capsys):
    monkeypatch.setattr("moe_numpy.lab.plots.save", lambda *_: None)
    base = tiny.FLAGS if "--experts 0" not in flags else tiny.FLAGS[:10]
    base = [*base, "--steps", "2", "--evaluate-every", "2"]
    main(capsys, "train", *base, *flags.split(), "--text", "text", "--out", "o")
    found = loop.load_run("o/checkpoint.npz", commands.settings._corpus("text"))
    assert FLAGS[flags](found.cfg, found.training)
    assert ("float64" in flags) == (found.params.token_VC.dtype == np.float64)


def described(**flags):
    return settings.describe(settings.start({"text": "text", "experts": 4, **flags}))


def test_train_says_how_many_parameters_a_token_uses():
    counted = ledger.count(settings.start({"text": "text", "experts": 4}).cfg)
    assert counted.active < counted.parameters
    words = f"{counted.parameters:,} parameters, {counted.active:,} active per token"
    assert words in described()


@pytest.mark.parametrize(
    ("top_k", "weights", "noted"), [(1, "renormalized", True), (1, "raw", False), (2, None, False)]
)
def test_train_warns_of_gates_that_are_all_one_and_of_no_others(top_k, weights, noted):
    assert ("gates are all 1" in described(top_k=top_k, gate_weights=weights)) == noted


# ---------------------------------------------------------------------------------------- generate
def test_generate_writes_from_the_newest_run_after_the_prompt(trained, capsys, elsewhere):
    for name, age in (("1", 100), ("2", 50)):
        target = elsewhere / "runs" / name / "checkpoint.npz"
        target.parent.mkdir(parents=True)
        target.write_bytes((trained / "checkpoint.npz").read_bytes())
        os.utime(target, (age, age))
    out = main(capsys, "generate", "--prompt", "the cat", "--tokens", 30).out
    assert out.startswith("the cat") and len(out) == len("the cat") + 30 + 1
    assert json.loads(main(capsys, "generate", "--tokens", 1, "--json").out)["checkpoint"] == str(
        Path("runs/1/checkpoint.npz")
    )


def test_generate_obeys_seed_temperature_and_limits(trained, capsys):
    def text(*more, seed=0):
        common = ("--checkpoint", trained, "--tokens", 60, "--prompt", "the ", "--seed", seed)
        record = json.loads(main(capsys, "generate", *common, "--json", *more).out)
        assert record["prompt"] == "the " and len(record["text"]) == 60
        return record["text"]

    assert text() == text() != text(seed=1)
    greedy = text("--temperature", 0)
    assert greedy == text("--temperature", 0, seed=1)
    assert greedy == text("--top-k", 1, seed=2) == text("--top-p", 1e-9, seed=3)
    assert text("--top-p", 0.5) != text() != text("--temperature", 3)


def test_generate_without_options_works_for_a_text_without_new_lines(capsys, elsewhere):
    Path("text").write_text(GREEK * 60, encoding="utf-8")
    main(capsys, "train", *tiny.FLAGS, "--steps", 2, "--text", "text")
    out = main(capsys, "generate", "--tokens", 20).out
    assert len(out) >= 21 and set(out) <= set(GREEK + "\n")
    assert main(capsys, "generate", "--prompt", "\u03b1", "--tokens", 9).out[0] == "\u03b1"


def test_generate_begins_a_new_line_where_the_text_has_lines(capsys):
    Path("text").write_text("a\tb\n" * 100)
    main(capsys, "train", *tiny.FLAGS, "--steps", 1, "--text", "text")
    assert json.loads(main(capsys, "generate", "--tokens", 1, "--json").out)["prompt"] == "\n"


def test_generate_refuses_a_character_outside_the_alphabet_by_name(trained):
    done = run("generate", "--checkpoint", str(trained), "--prompt", "the \u2603")
    assert done.returncode == 1 and done.stdout == ""
    assert re.search(r"got '\u2603' \(U\+2603\) at position 4", complaint(done.stderr))


# ---------------------------------------------------------------------------------- check, figures
def test_check_prints_the_errors_of_the_pairs_that_were_asked_for(capsys):
    record = json.loads(main(capsys, "check", "relu", "softmax", "--json").out)
    assert [pair["name"] for pair in record["pairs"]] == ["relu", "softmax"]
    assert record["passed"] is True
    for pair in record["pairs"]:
        assert pair["errors"] and all(0 <= error < 1e-7 for error in pair["errors"].values())
    out = main(capsys, "check", "relu").out
    assert "relu" in out and "1 pair checked, 0 failed" in out


def test_check_draws_its_points_from_the_seed(capsys):
    def errors(seed):
        record = json.loads(main(capsys, "check", "softmax", "--seed", seed, "--json").out)
        return record["pairs"][0]["errors"]

    assert errors(0) == errors(0) != errors(1)


def test_check_fails_on_a_planted_bug_and_says_where(capsys):
    right = softmax.softmax_backward

    @functools.wraps(right)
    def wrong(dy, cache):
        return 1.01 * right(dy, cache)

    with registry.swap("softmax_backward", wrong):
        out = main(capsys, "check", "softmax", "relu", status=1).out
        assert re.search(r"softmax.*\bz\b", out) and "2 pairs checked, 1 failed" in out
        record = json.loads(main(capsys, "check", "softmax", "--json", status=1).out)
    assert record["passed"] is False and record["pairs"][0]["failures"]
    main(capsys, "check", "softmax")


def test_figures_draws_every_figure_again_to_the_same_bytes(trained, capsys):
    picture = trained / "training.png"
    before = picture.read_bytes()
    picture.unlink()
    assert main(capsys, "figures", trained).out.split() == [str(picture)]
    assert picture.read_bytes() == before


FOREIGN = ('{"study": "other"}', '{"a": 1}', "[1]", "3", "{", "", '{"study": "collapse"}')


UNEQUAL = {"step": [1, 2], "training_loss": [3.0]}
FOREIGN += (json.dumps({"study": "training", "series": UNEQUAL, "evaluations": []}),)


@pytest.mark.parametrize("content", [*FOREIGN, '{"study": "training", "series": {"step": 1}}'])
def test_figures_names_a_file_that_is_no_record(content, capsys):
    Path("mine.json").write_text(content)
    assert "mine.json" in complaint(main(capsys, "figures", ".", status=1).err)
    assert sorted(os.listdir()) == ["mine.json", "text"]


def test_notebooks_need_the_extra_that_is_named(monkeypatch, capsys):
    Path("06_top_k.py").write_text("")
    monkeypatch.setattr(lessons.importlib.util, "find_spec", lambda name: None)
    told = complaint(main(capsys, "notebooks", "--folder", ".", status=1).err)
    assert told.endswith(
        'jupytext must be installed, got none. Install it with: pip install -e ".[notebooks]"'
    )


# ---------------------------------------------------------------------------------------- collapse
@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    flags = "--steps 2 --seeds 1 --processes 2 --experts 4 --json".split()
    return run("collapse", *flags, "--out", "here", cwd=folder), folder / "here"


def test_collapse_leaves_its_record_and_a_picture(study):
    done, folder = study
    assert done.returncode == 0, done.stderr
    record = files.read_json(folder / "collapse.json")
    assert json.loads(done.stdout) == record
    assert record["study"] == "collapse" and record["num_experts"] == 4
    assert "exp(entropy" in record["definition"] and "fewer than half" in record["definition"]
    names = [condition["name"] for condition in record["conditions"]]
    assert names == list(collapse.Study().conditions())
    for condition in record["conditions"]:
        (one,) = condition["runs"]
        assert one["seed"] == 0 and one["validation_loss"] > 0 and 0 <= one["drop_rate"] < 1
        for key in ("effective_experts", "effective_experts_clean", "dead_experts"):
            assert len(one[key]) == 2
        assert np.shape(one["series"]["share"]) == (2, 2, 4)
    assert sorted(os.listdir(folder)) == ["collapse.json", "collapse.png"]
    assert min(png_size(folder / "collapse.png")) > 300


def test_collapse_can_be_drawn_and_tabulated_from_its_record(study, capsys):
    _, folder = study
    before = (folder / "collapse.png").read_bytes()
    main(capsys, "figures", folder)
    assert (folder / "collapse.png").read_bytes() == before
    lines = collapse.table(files.read_json(folder / "collapse.json")).splitlines()
    assert len(lines) == 1 + len(collapse.Study().conditions())


STUDIES = [  # module and function of a study, name of its record, whether it is whole, flags
    ("collapse.run_study", "collapse", True, ""),
    ("collapse.run_study", "collapse", True, "--processes 1"),
    *(
        ("collapse.run_study", "collapse", False, part)
        for part in ("--quick", "--steps 9", "--seeds 2", "--experts 4", "--top-k 2")
    ),
    ("rich_get_richer.run_settings", "collapse --settings", True, ""),
    ("rich_get_richer.run_settings", "collapse --settings", False, "--quick"),
    ("systems.run_systems", "systems --train", True, ""),
    ("systems.run_systems", "systems --train", False, "switch"),
    ("systems.run_systems", "systems --train", False, "--seeds 2"),
]


@pytest.mark.parametrize(("study", "command", "whole", "flags"), STUDIES)
def test_a_part_of_a_study_leaves_the_committed_record_alone(
    study, command, whole, flags, monkeypatch, capsys
):
    asked, kept = [], []
    monkeypatch.setattr(f"moe_numpy.lab.{study}", lambda sizes, *_: asked.append(sizes) or {})
    monkeypatch.setattr(commands, "_keep", lambda _, path: kept.append(path.parent))
    for more in ([], ["--out", "o"]):
        main(capsys, *command.split(), *flags.split(), "--json", *more)
    assert kept == [Path("figures" if whole else "figures/quick"), Path("o")]
    assert (asked[0] == type(asked[0])()) == whole


@pytest.mark.parametrize("command", ["bench --quick", "collapse --steps 1", "systems --train"])
def test_what_cannot_be_written_is_told_before_anything_is_measured(command, tmp_path, capsys):
    name = {"bench": "speed_steps.png"}.get(command.split()[0], f"{command.split()[0]}.json")
    (tmp_path / name).mkdir()
    assert commands.main([*command.split(), "--out", str(tmp_path)]) == 1
    assert f"{name} must be a file, got a folder" in capsys.readouterr().err


def test_two_runs_at_once_in_one_folder_are_refused(elsewhere, capsys):
    (elsewhere / "o").mkdir()
    with files.held("o", "checkpoint.npz"):
        out = main(capsys, "train", *tiny.FLAGS, "--text", "text", "--out", "o", status=1)
        assert "o must be of one run at a time, got another one at work" in out.err
    main(capsys, "train", *tiny.FLAGS, "--text", "text", "--out", "o")
    with files.held("o", "checkpoint.npz"):
        out = main(capsys, "train", "--resume", "o", status=1)
        assert "must be of one run at a time" in out.err


def test_a_run_that_came_while_this_one_got_ready_is_not_written_over(
    elsewhere, capsys, monkeypatch
):
    def slow(corpus):
        Path("o", "checkpoint.npz").write_text("of another run")
        return {}

    monkeypatch.setattr(commands, "_references", slow)
    monkeypatch.setattr(commands, "_reference_line", str)
    out = main(capsys, "train", *tiny.FLAGS, "--text", "text", "--out", "o", status=1)
    assert "--out must be a folder without a run, got o" in out.err
    assert Path("o", "checkpoint.npz").read_text() == "of another run"


def test_a_run_remembers_where_its_text_has_gone(elsewhere, capsys):
    main(capsys, "train", *tiny.FLAGS, "--text", "text", "--out", "o")
    Path("text").rename("moved")
    found = settings.resume(Path("o", "checkpoint.npz"), {"text": "moved"})
    assert found.settings["text"] == str(elsewhere / "moved")


@pytest.mark.parametrize("name", ["expert_choice", "soft_moe"])
def test_an_encoder_is_not_trained_beside_the_others(name, capsys):
    out = main(capsys, "systems", name, "--train", status=1)
    assert f"must predict the next token to be trained, got {name}" in out.err


def test_a_checkpoint_that_is_text_is_refused_without_advice_to_unpickle_it(elsewhere, capsys):
    Path("x.npz").write_text('{"format": 1}')
    out = main(capsys, "generate", "--checkpoint", "x.npz", status=1)
    assert "foreign file (no archive of arrays)" in out.err and "pickle" not in out.err


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(monkeypatch):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "open", closed, raising=False)
    with pytest.raises(ValueError, match="must be a file that can be read, got: Permission denied"):
        checkpoint.load_checkpoint("x")


@pytest.mark.parametrize("study", ['["a"]', "3", "null", '{"a": 1}'])
def test_a_record_of_no_study_is_refused(study, elsewhere, capsys):
    Path("f").mkdir()
    Path("f", "x.json").write_text('{"study": ' + study + "}")
    out = main(capsys, "figures", "f", status=1)
    assert "x.json must be the record of a study" in out.err
