"""Named systems on the command line: what `train --preset` and `systems --train` do and refuse."""

import json

import pytest
import tiny
from test_commands import complaint, elsewhere, main  # noqa: F401

from moe_numpy import commands, config, files, presets, settings
from moe_numpy.lab import plots, systems
from moe_numpy.training import checkpoint, loop

BASE = ["train", "--steps", 4, "--batch", 2, "--text", "text", "--evaluate-every", 4]


# ------------------------------------------------------------------------------------------- train
def test_a_preset_is_trained_as_it_is(capsys):
    main(capsys, *BASE, "--preset", "vmoe", "--seed", 3, "--dtype", "float64", "--out", "o")
    run = loop.load_run("o/checkpoint.npz", settings._corpus("text"))
    assert run.cfg == presets.tiny("vmoe", run.corpus.vocab_size)
    assert (run.training.steps, run.training.seed, run.step) == (4, 3, 4)
    record = files.read_json("o/training.json")
    assert config.from_dict(record["config"]) == run.cfg
    main(capsys, "generate", "--checkpoint", "o", "--tokens", 3)


def test_a_preset_has_its_own_number_of_steps():
    steps = [settings.start({"preset": name}).training.steps for name in ("switch", None)]
    assert steps == [config.TrainingConfig().steps, 1000]


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("switch", ["--experts", 4], "--experts must not come with --preset, got 4"),
        ("switch", ["--context", 32], "--context must not come with --preset, got 32"),
        ("switch", ["--layers", 3], "--layers must not come with --preset, got 3"),
        ("switch", ["--balance", "none"], "--balance must not come with --preset, got none"),
        ("switch", ["--bias-rate", 0.1], "--bias-rate must not come with --preset"),
        ("switch", ["--batch", 3, "--shards", 2], "batch must be a multiple of shards"),
        ("switchh", [], "got 'switchh'. Did you mean switch"),
        ("expert_choice", [], "its ExpertChoice looks at the whole sequence"),
        ("soft_moe", [], "its SoftSlots looks at the whole sequence"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(name, more, words, capsys, elsewhere):  # noqa: F811
    said = complaint(main(capsys, *BASE, "--preset", name, *more, status=1).err)
    assert words in said
    assert [path.name for path in elsewhere.iterdir()] == ["text"]


def test_a_preset_run_goes_on_bit_for_bit(capsys):
    main(capsys, *BASE, "--preset", "shazeer2017", "--out", "whole")
    flags = {"preset": "shazeer2017", "steps": 4, "batch": 2, "text": "text"}
    stopped = settings.start(flags)
    stopped.settings |= {"save_every": None, "evaluate_every": 4}
    for _ in range(2):
        loop.take_step(stopped)
    loop.save_run("stopped/checkpoint.npz", stopped)
    main(capsys, "train", "--resume", "stopped")
    runs = [
        loop.load_run(f"{name}/checkpoint.npz", settings._corpus("text"))
        for name in ("whole", "stopped")
    ]
    assert runs[0].step == 4 and tiny.same_run(*runs)


def test_a_run_goes_on_as_the_system_that_it_is(capsys):
    main(capsys, *BASE, "--preset", "mixtral_8x7b", "--out", "o")
    words = "--preset must be that of the run"
    assert words in main(capsys, "train", "--resume", "o", "--preset", "grok1", status=1).err
    main(capsys, "train", "--resume", "o", "--preset", "mixtral_8x7b")
    assert checkpoint.load_checkpoint("o/checkpoint.npz")[1]["settings"]["preset"] == "mixtral_8x7b"


# ----------------------------------------------------------------------------------------- systems
NAMES = ("mixtral_8x7b", "soft_moe", "switch")


@pytest.fixture(scope="module")
def record():
    study = systems.Study(names=NAMES, steps=4, seeds=(0,))
    return systems.run_systems(study, processes=1, show_progress=False)


def test_the_record_of_the_systems_is_plain_and_has_all_that_is_shown(record):
    assert json.loads(json.dumps(record)) == record
    assert [system["name"] for system in record["systems"]] == ["mixtral_8x7b", "switch"]
    assert record["settings"] == {"seeds": [0], "steps": 4}
    for system in record["systems"]:
        cfg = config.from_dict(system["config"])
        assert cfg == presets.tiny(system["name"]) and cfg.moe.num_experts == system["num_experts"]
        assert system["parameters"] > 10_000
        [run] = system["runs"]
        assert run["seed"] == 0 and set(systems.SHOWN) <= run.keys()
        assert len(run["effective_experts"]) == cfg.moe_count
        assert 1.0 <= min(run["effective_experts"]) <= system["num_experts"]
    dropped = [system["runs"][0]["drop_rate"] for system in record["systems"]]
    assert dropped[0] == 0.0 < dropped[1]


def test_every_system_has_the_runs_of_all_seeds_and_the_record_how_they_were_trained(monkeypatch):
    def told(title, work, jobs, *_):
        return {job: {"seed": job[2], "of": job[1], "parameters": 1} for job in reversed(jobs)}

    monkeypatch.setattr(systems.pool, "run_all", told)
    monkeypatch.setattr(systems.ngram, "reference_losses", lambda *_: {})
    study = systems.Study(names=("switch", "mixtral_8x7b"), seeds=(3, 1), steps=300)
    found = systems.run_systems(study, show_progress=False)
    for system, name in zip(found["systems"], study.names, strict=True):
        assert system["runs"] == [{"seed": 3, "of": name}, {"seed": 1, "of": name}]
    assert config.from_dict(found["training"]) == study.training(3)
    assert (study.training(3).steps, study.training(3).seed) == (300, 3)
    long = systems.Study(steps=5000)
    assert (study.training(3).warmup, long.training(0).warmup) == (50, 100)


def test_the_table_of_the_systems_is_ordered_by_loss(record):
    *_, first, second, line = systems.table(record).splitlines()
    losses = {s["name"]: s["runs"][0]["validation_loss"] for s in record["systems"]}
    assert [row.split()[0] for row in (first, second)] == sorted(losses, key=losses.get)
    assert all(row.split()[1] == f"{losses[row.split()[0]]:.3f}" for row in (first, second))
    assert line.split() == ["2-gram", f"{record['references']['2-gram']:.3f}"]


def test_the_figure_of_the_systems_has_a_row_for_each(record):
    left, middle, right = plots.draw(record).axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert sorted(labels) == ["mixtral_8x7b (2024)", "switch (2021)"]
    assert all(ax.get_xlabel() for ax in (left, middle, right))
    assert len(left.collections) == len(record["systems"])


def test_the_command_trains_and_leaves_record_and_picture(record, monkeypatch, capsys, elsewhere):  # noqa: F811
    asked = []
    monkeypatch.setattr(systems, "run_systems", lambda study: asked.append(study) or record)
    out = main(capsys, "systems", "switch", "--train", "--seeds", 2, "--out", "o").out
    assert asked == [systems.Study(names=("switch",), seeds=(0, 1))]
    assert out.strip() == systems.table(record).strip()
    assert files.read_json(elsewhere / "o" / "systems.json") == record
    assert (elsewhere / "o" / "systems.png").stat().st_size > 10_000


def test_the_command_refuses_an_unknown_system_before_any_training(capsys):
    assert commands.main(["systems", "swich", "--train", "--out", "o"]) == 1
    assert "Did you mean switch" in capsys.readouterr().err
