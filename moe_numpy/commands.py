"""What the command line does, one function for each command.

Whatever is slow to import (matplotlib, the studies) is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from moe_numpy import __version__, backend, files, settings


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status.

    0 fine, 1 refused or failed, 2 misspelled or without the backend asked for, 130 stopped.
    """
    options = _parser().parse_args(arguments)
    if sys.stderr is None:  # closed, 2>&-: complaints must go neither to stdout nor into a file
        sys.stderr = open(os.devnull, "w")
    with contextlib.suppress(AttributeError):  # what a terminal cannot show becomes a question mark
        sys.stdout.reconfigure(errors="replace")
    try:
        with backend.use_backend(getattr(options, "backend", "numpy")):
            return options.run(options)
    except backend.BackendError as error:
        print(f"moe_numpy {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"moe_numpy {options.command}: error: {error}", file=sys.stderr)
        return 1
    except OverflowError as error:
        advice = "Take smaller numbers."
        print(f"moe_numpy {options.command}: error: {error}. {advice}", file=sys.stderr)
        return 1
    except MemoryError as error:
        words = ": ".join(filter(None, ["out of memory", str(error)]))
        print(f"moe_numpy {options.command}: {words}. Take smaller sizes.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"moe_numpy {options.command}: stopped.", file=sys.stderr)
        return 130


def collapse(options: argparse.Namespace) -> int:
    """Train the same model with and without cures against collapse, and draw what happened."""
    from moe_numpy.lab import collapse as study_module

    if options.settings:
        return _collapse_settings(options)
    named = {"num_experts": options.experts, "top_k": options.top_k, "steps": options.steps}
    named["seeds"] = options.seeds and tuple(range(options.seeds))
    sizes = {name: size for name, size in named.items() if size is not None}
    sizes = ({"steps": 80, "seeds": (0, 1)} if options.quick else {}) | sizes
    study = study_module.Study(**sizes)
    conditions = list(study.conditions())
    folder = _folder(options, bool(sizes), "collapse")
    _say(
        options,
        f"Training {len(conditions)} conditions x {len(study.seeds)} seeds, {study.steps} steps "
        f"each: {', '.join(conditions)}.",
    )
    record = study_module.run_study(study, options.processes, options.backend)
    _keep(record, Path(folder, "collapse.json"))
    if options.json:
        print(json.dumps(record))
        return 0
    print(study_module.table(record))
    print(f"\n{record['definition']}")
    print(f"Figure: {Path(folder, 'collapse.png')}   record: {Path(folder, 'collapse.json')}")
    return 0


def _collapse_settings(options: argparse.Namespace) -> int:
    from moe_numpy.lab import rich_get_richer

    for name in ("steps", "seeds", "experts", "top_k", "processes"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} must not come with --settings, got "
                f"{getattr(options, name)}: that study has sizes of its own. Leave it out."
            )
    if options.backend != "numpy":
        raise ValueError(
            f"--backend must be numpy with --settings, got {options.backend}: that study computes "
            "on the host. Leave it out."
        )
    sizes = {"steps": 100, "seeds": (0, 1)} if options.quick else {}
    folder = _folder(options, options.quick, "collapse_settings")
    record = rich_get_richer.run_settings(rich_get_richer.Study(**sizes))
    _keep(record, Path(folder, "collapse_settings.json"))
    print(json.dumps(record) if options.json else rich_get_richer.table(record))
    return 0


def train(options: argparse.Namespace) -> int:
    """Train a language model, or go on with a run that was stopped."""
    from moe_numpy.lab import plots, records  # noqa: F401  the picture must not fail at the end
    from moe_numpy.training import loop, team

    given, folder = settings.given(options), None
    if options.resume is not None:
        if options.out is not None:
            raise ValueError(
                f"--out must not come with --resume, got {options.out}: a run goes on in its own "
                "folder. Leave it out."
            )
        folder = Path(options.resume)
        folder = folder.parent if folder.name == "checkpoint.npz" else folder
        run = settings.resume(folder / "checkpoint.npz", given)
    else:
        if options.out:
            folder = Path(options.out)
            _require_no_run(folder)
        run = settings.start(given)
    if options.processes > 1:
        team.require_possible(run.training.shards, options.processes)
    files.require_folder(folder or "runs")
    for name in ("save_every", "evaluate_every"):  # a run that goes on keeps its pace
        run.settings[name] = getattr(options, name) or run.settings.get(name)
    references = _references(run.corpus)
    _say(options, settings.describe(run))
    _say(options, "Reference losses: " + _reference_line(references))
    folder = folder or _new_folder(Path("runs"))
    try:
        with files.held(folder, "checkpoint.npz"):
            if options.resume is None:  # while this one got ready, another may have been here
                _require_no_run(folder)
            loop.train(
                run,
                folder / "checkpoint.npz",
                run.settings["save_every"] or 100,
                run.settings["evaluate_every"],
                processes=options.processes,
            )
            record = records.training_record(run, references)
            _keep(record, folder / "training.json")
    except KeyboardInterrupt:
        stopped = f"Stopped after step {run.step} of {run.training.steps}."
        print(f"{stopped} {_way_on(folder)}", file=sys.stderr)
        return 130
    except OSError as error:
        raise type(error)(f"{str(error).rstrip('.')}. {_way_on(folder)}") from None
    if options.json:
        print(json.dumps(record | {"checkpoint": str(folder / "checkpoint.npz")}))
        return 0
    print(f"Validation loss {record['validation_loss']:.3f} nats per character.")
    print(f"Picture: {folder / 'training.png'}   record: {folder / 'training.json'}")
    print(f"Write with it: python -m moe_numpy generate --checkpoint {_quoted(folder)}")
    return 0


def generate(options: argparse.Namespace) -> int:
    """Let a trained model write."""
    import numpy as np

    from moe_numpy.training import data, loop
    from moe_numpy.transformer import generation

    path = Path(options.checkpoint) if options.checkpoint else _newest_run(Path("runs"))
    path = path / "checkpoint.npz" if path.is_dir() else path
    params, cfg, alphabet = loop.load_model(path)
    text = options.prompt
    if text is None:
        text = "\n" if "\n" in alphabet else alphabet[0]
    prompt = data.encode(text, alphabet)
    if options.tokens < 0:
        raise ValueError(f"--tokens must not be negative, got {options.tokens}. Use 300.")
    _require_seed(options.seed)
    new = generation.generate(
        prompt,
        params,
        cfg,
        options.tokens,
        options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    with np.errstate(over="ignore", invalid="ignore"):  # what matters, `generate` looks at
        if options.json:
            written = "".join(alphabet[token] for token in new)
            print(json.dumps({"checkpoint": str(path), "prompt": text, "text": written}))
            return 0
        print(text, end="", flush=True)
        for token in new:
            print(alphabet[token], end="", flush=True)
    print()
    return 0


def check(options: argparse.Namespace) -> int:
    """Check every hand-written gradient against central differences."""
    from moe_numpy.classroom import gradcheck, slopes

    _require_seed(options.seed)
    results = gradcheck.check_all(options.pairs or None, seed=options.seed)
    if options.json:
        print(json.dumps(gradcheck.to_json(results, options.seed)))
    else:
        for result in results:
            print(gradcheck.format_result(result))
            for failure in result.failures:
                print(f"    {failure}")
        failed = sum(not result.passed for result in results)
        print(
            f"{len(results)} pair{'s' * (len(results) != 1)} checked, {failed} failed "
            f"(limit {slopes.LIMIT:g} relative error)."
        )
    return 0 if all(result.passed for result in results) else 1


def parity(options: argparse.Namespace) -> int:
    """Run the same training on NumPy and on a GPU, compare the losses and time a step by width."""
    from moe_numpy.lab import parity as study_module

    try:
        with backend.use_backend(backend.GPU):
            pass
    except backend.BackendError as error:
        print(f"Skipped, nothing was compared: {error}")
        return 0
    files.require_folder(options.out)
    record = study_module.run_parity(options.steps)
    _keep(record, Path(options.out, "parity.json"))
    for dtype, found in record["losses"].items():
        verdict = "PASS" if found["passed"] else "FAIL"
        print(f"{dtype}  {verdict}  {found['difference']:.1e} (limit {found['limit']:.0e})")
    return 0 if all(found["passed"] for found in record["losses"].values()) else 1


def bench(options: argparse.Namespace) -> int:
    """Measure how fast this machine trains and writes, alone and against PyTorch."""
    from moe_numpy.lab import bench as study_module

    whom = {"torch": "PyTorch", "transformers": "Transformers"}
    reasons = {library: study_module.why_not(library) for library in whom}
    part = options.quick or options.only or options.threads != 2 or any(reasons.values())
    folder = _folder(options, bool(part), "speed", "speed_steps")
    where = sys.stderr if options.json else sys.stdout
    for library, reason in reasons.items():
        if reason:
            print(f"Not raced against {whom[library]}: {reason}", file=where, flush=True)
    rounds = options.rounds or (2 if options.quick else 7)
    there = [reason is None for reason in reasons.values()]
    plan = study_module.Plan(rounds, options.threads, options.quick, *there)
    record = study_module.run(
        plan, tuple(options.only or ()), lambda name: print(f"... {name}", file=where, flush=True)
    )
    if not record["rows"]:
        raise ValueError(
            "bench: the steps must have the programs of tests/benchmarks, got an installation "
            "without them. Run them in a checkout."
        )
    for name, found in study_module.records(record).items():
        path = Path(folder, f"{name}.json")
        _keep(found, path)
        if not options.json:
            print(study_module.text(found))
            print(f"\nFigure: {path.with_suffix('.png')}   record: {path}\n")
    if options.json:
        print(json.dumps(record))
    return 0


def figures(options: argparse.Namespace) -> int:
    """Draw every figure of a folder anew from the record beside it."""
    from moe_numpy.lab import plots

    records = sorted(Path(options.folder).glob("*.json"))
    if not records:
        raise ValueError(
            f"figures: {options.folder} must hold records (.json), got none. "
            "Run a study first: python -m moe_numpy collapse."
        )
    for path in records:
        record = files.read_json(path)
        plots.require_study(record, path)
        try:
            figure = plots.draw(record)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"figures: {path} must be a whole record, got one that lacks something "
                f"({error!r}). Move it away or make it anew."
            ) from None
        plots.save(figure, path.with_suffix(".png"))
        print(path.with_suffix(".png"))
    return 0


def notebooks(options: argparse.Namespace) -> int:
    """Build the notebooks from their sources and run them from top to bottom."""
    from moe_numpy.classroom import lessons

    sources = lessons.sources(options.folder, options.names)
    lessons.require_libraries()
    for source in sources:
        lessons.require_untouched(source)
    for source in sources:
        print(f"{source} ...", end="", flush=True)
        path = lessons.write(source)
        print(f" {path.name}, {path.stat().st_size // 1024} kB")
    return 0


def systems(options: argparse.Namespace) -> int:
    """List the published systems, or describe one: its routing, its sizes, where it differs."""
    from moe_numpy import presets
    from moe_numpy import systems as systems_module

    if options.train:
        return _train_systems(options)
    for name in ("seeds", "out"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} must come with --train, got it alone. Add --train or leave it out."
            )
    width = shutil.get_terminal_size((140, 24)).columns
    if options.name is not None:
        record = systems_module.record(options.name)
        print(json.dumps(record) if options.json else systems_module.page(options.name, width))
    elif options.json:
        print(json.dumps({"systems": [systems_module.record(n) for n in presets.names()]}))
    else:
        print(systems_module.table(width))
    return 0


def _train_systems(options: argparse.Namespace) -> int:
    from moe_numpy.lab import systems as study_module

    sizes = {} if options.name is None else {"names": (options.name,)}
    if sizes and not study_module.Study(**sizes).systems():
        raise ValueError(
            f"systems: a system must predict the next token to be trained, got {options.name}, "
            "which looks at the whole sequence: an encoder. Choose another one."
        )
    if options.seeds is not None:
        sizes["seeds"] = tuple(range(options.seeds))
    folder = _folder(options, bool(sizes), "systems")
    record = study_module.run_systems(study_module.Study(**sizes))
    _keep(record, Path(folder, "systems.json"))
    print(json.dumps(record) if options.json else study_module.table(record))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe_numpy",
        description="The Mixture-of-Experts transformer in plain NumPy: train one, watch its "
        "experts collapse, check every hand-written gradient.",
        epilog="Each command explains itself: python -m moe_numpy COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"moe_numpy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    record_folder = "folder of figure and record (figures; figures/quick for a part)"

    def command(run: Any, help_text: str, **extra: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(
            run.__name__, help=help_text, description=f"{run.__doc__} {extra.pop('more', '')}"
        )
        added.set_defaults(run=run)
        return added

    sub = command(
        collapse,
        "train with and without cures (noise, capacity limits, a balance loss), draw the collapse",
        more="Takes one to three minutes; --quick shows the same in a fraction of it.",
    )
    sub.add_argument("--quick", action="store_true", help="fewer steps and seeds, own folder")
    sub.add_argument(
        "--settings",
        action="store_true",
        help="study instead where collapse happens and where not, on cluster tasks (chapter 07)",
    )
    sub.add_argument("--steps", type=_positive, help="training steps of a run (250)")
    sub.add_argument("--seeds", type=_positive, help="number of seeds (4)")
    sub.add_argument("--experts", type=int, help="experts in a layer (16)")
    sub.add_argument("--top-k", type=int, help="experts per token (1)")
    sub.add_argument("--processes", type=_positive, help="runs at once (one per core)")
    sub.add_argument("--out", type=_name, help=record_folder)
    sub.add_argument("--json", action="store_true", help="print the record instead of a table")

    sub = command(
        train,
        "train a language model on the built-in corpus or on your text",
        more="Without options: a small MoE model on text that every Python carries, about two "
        "minutes. Ctrl-C stops after the step in progress; --resume goes on bit for bit.",
    )
    settings.add_options(sub)
    folder = "folder for checkpoint, record and picture (runs/1, runs/2, ..)"
    sub.add_argument("--out", type=_name, help=folder)
    sub.add_argument("--resume", metavar="FOLDER", help="go on with the run of that folder")
    sub.add_argument(
        "--processes",
        type=_positive,
        default=1,
        help="processes for the shards, in place of threads: faster, Linux only (%(default)s)",
    )
    sub.add_argument("--save-every", type=_positive, help="steps between checkpoints (100)")
    sub.add_argument(
        "--evaluate-every", type=_positive, help="steps between evaluations (a quarter of the run)"
    )
    sub.add_argument("--json", action="store_true", help="print the record of the run")

    sub = command(generate, "let a trained model write")
    newest = "a run's folder or checkpoint (the newest in runs/)"
    sub.add_argument("--checkpoint", type=_name, help=newest)
    sub.add_argument("--prompt", help="text to go on from (a new line)")
    sub.add_argument("--tokens", type=int, default=300, help="characters (%(default)s)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0: most likely (%(default)s)")
    sub.add_argument("--top-k", type=int, help="only the k most likely characters (all)")
    sub.add_argument("--top-p", type=float, default=1.0, help="nucleus of probability mass p (1)")
    sub.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    sub.add_argument("--json", action="store_true", help="print a JSON object")

    sub = command(
        check,
        "check every hand-written gradient against central differences",
        more="Prints one line a pair: the worst relative error of each argument.",
    )
    sub.add_argument("pairs", nargs="*", metavar="PAIR", help="only these, e.g. moe attention")
    sub.add_argument("--seed", type=int, default=0, help="of the test points (%(default)s)")
    sub.add_argument("--json", action="store_true", help="print a JSON object")

    for name in ("collapse", "train", "generate", "check"):
        commands.choices[name].add_argument(
            "--backend", choices=backend.NAMES, default="numpy", help="array library (%(default)s)"
        )

    sub = command(
        parity,
        "compare NumPy and a GPU: same losses, and the width where the GPU wins",
        more="Needs the GPU backend; says so and stops where there is none.",
    )
    sub.add_argument("--steps", type=_positive, default=200, help="to compare (%(default)s)")
    folder = "folder of figure and record (%(default)s)"
    sub.add_argument("--out", type=_name, default="figures", help=folder)

    sub = command(
        bench,
        "measure the speed of training and generation, also against PyTorch",
        more="Close other programs first: rounds that they disturb are repeated, and set aside "
        "where enough quiet ones are left. Takes a quarter of an hour, and keeps nothing if it is "
        "stopped; --quick only shows that it works. Other threads than two, or no PyTorch or "
        "Transformers to race, make a part of it.",
    )
    sub.add_argument("--quick", action="store_true", help="tiny sizes, own folder")
    rows = ("product", "step", "steps", "layer", "growth", "overhead", "generation", "import")
    sub.add_argument("--only", nargs="+", choices=rows, metavar="ROW", help=", ".join(rows))
    sub.add_argument("--rounds", type=_positive, help="of each race (7)")
    sub.add_argument("--threads", type=_positive, default=2, help="of each side (%(default)s)")
    sub.add_argument("--out", type=_name, help=record_folder)
    sub.add_argument("--json", action="store_true", help="print the record instead of a table")

    sub = command(notebooks, "build the notebooks from their sources and run them")
    sub.add_argument("names", nargs="*", metavar="NAME", help="only these, e.g. 06 (all)")
    sub.add_argument("--folder", default="notebooks", help="of the sources (%(default)s)")

    sub = command(
        systems,
        "list the published systems that come as presets, or describe one of them",
        more="Any of them can be trained at laptop size: train --preset NAME.",
    )
    sub.add_argument("name", nargs="?", metavar="NAME", help="describe this one (list all)")
    sub.add_argument(
        "--train",
        action="store_true",
        help="instead: train all at laptop size and compare them (three quarters of an hour)",
    )
    sub.add_argument("--seeds", type=_positive, help="with --train (3)")
    sub.add_argument("--out", type=_name, help=f"with --train: {record_folder}")
    sub.add_argument("--json", action="store_true", help="print a JSON object")

    sub = command(figures, "draw every figure anew from its record")
    sub.add_argument("folder", nargs="?", default="figures", help="(%(default)s)")
    return parser


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must be a name, got ''")
    return text


def _require_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"--seed must not be negative, got {seed}. Use 0.")


def _folder(options: argparse.Namespace, part: bool, *names: str) -> str:
    """Choose the folder of the named records, and see that they can be written there, and drawn.

    A part of a study must not take the place of the committed whole.
    """
    from moe_numpy.lab import plots  # noqa: F401  the picture must not fail at the end

    folder = options.out or ("figures/quick" if part else "figures")
    for name in names:
        for kind in (".json", ".png"):
            files.require_place(Path(folder, name + kind))
    return folder


def _keep(record: dict[str, Any], path: Path) -> None:
    """Write a record, and draw its picture beside it."""
    files.write_json(path, record)
    from moe_numpy.lab import plots  # only now: the record is there, whatever this finds

    plots.save(plots.draw(record), path.with_suffix(".png"))


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.json:
        print(text, flush=True)


def _way_on(folder: Path) -> str:
    """Say how to go on with a run that ended early."""
    if not (folder / "checkpoint.npz").exists():
        return "The run has no checkpoint yet: start anew."
    resume = f"python -m moe_numpy train --resume {_quoted(folder)}"
    return f"Go on from its last checkpoint: {resume}"


def _quoted(path: Path) -> str:
    """Write a path as a shell reads it."""
    return shlex.quote(str(path))


def _require_no_run(folder: Path) -> None:
    if (folder / "checkpoint.npz").exists():
        raise ValueError(
            f"--out must be a folder without a run, got {folder}, which holds one. "
            f"Go on with it by --resume {_quoted(folder)}, or choose another folder."
        )


def _new_folder(parent: Path) -> Path:
    """Make the first folder 1, 2, ... after all that are there, though others do so too."""
    while True:
        taken = [int(p.name) for p in parent.glob("*") if re.fullmatch(r"\d+", p.name)]
        folder = parent / str(max(taken, default=0) + 1)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def _newest_run(parent: Path) -> Path:
    found = sorted(parent.glob("*/checkpoint.npz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(
            "--checkpoint must name a run, got nothing and runs/ holds none. "
            "Train one first: python -m moe_numpy train."
        )
    return found[-1]


def _references(corpus: Any) -> dict[str, float]:
    from moe_numpy.training import ngram

    return ngram.reference_losses(corpus.train, corpus.validation, corpus.vocab_size)


def _reference_line(references: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.3f}" for name, loss in references.items())
