"""The benchmark: how fast the package trains and writes, alone and against PyTorch.

Every row is a race (`race`) of our side against any number of others. PyTorch's sides live in
`tests/benchmarks` of a checkout and need the extra `bench`; without them our side runs alone. Our
own sides with one optimization removed, which tell what each one gained, live there too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_numpy import config, machine
from moe_numpy.config import ModelConfig, MoEConfig
from moe_numpy.lab import bench_products, bench_report, bench_work, race
from moe_numpy.lab.race import Worker

OURS = "moe_numpy"
TORCH_WORKER = Path(__file__).parents[2] / "tests/benchmarks/torch_worker.py"
ABLATION_WORKER = TORCH_WORKER.with_name("ablation_worker.py")


class Plan(NamedTuple):
    """What a benchmark takes: the full sizes, or small ones that only show that it works."""

    rounds: int
    threads: int
    quick: bool
    torch: bool
    transformers: bool = False

    @property
    def block(self) -> float:
        """Seconds of a block."""
        return 0.02 if self.quick else 0.3

    @property
    def shards(self) -> int:
        """Parts that our side splits a batch into: one for each thread, if they are equal parts."""
        return math.gcd(bench_work.training().batch, self.threads)

    @property
    def family(self) -> int:
        """Processes that share out a layer: one for each thread, where they can be.

        Without threadpoolctl each would multiply on as many threads as all are to have.
        """
        possible = sys.platform == "linux" and machine.can_limit_products()
        return self.threads if possible else 1

    @property
    def processes(self) -> int:
        """Processes that share out the shards of a step: one for each, where they can be."""
        return min(self.shards, self.family)

    def rivals(self, name: str) -> list[tuple[str, str, bool]]:
        """List those of `RIVALS` that are installed."""
        there = {"PyTorch": self.torch, "Transformers": self.torch and self.transformers}
        return [rival for rival in RIVALS[name] if there[re.split(r"\W", rival[0])[0]]]

    def race(self, workers: list[Worker], same: bool = True) -> dict[str, Any]:
        """Race the workers; a quick race does not wait for quiet rounds."""
        patience = 1 if self.quick else race.PATIENCE
        return race.race_all(workers, self.rounds, self.block, same, patience)


WIDTH = 128  # of the layers
ROWS_TO_SPLIT = 256  # rows of an expert from which on the tokens are split over the threads
FEW_ROWS = 16  # the same for small experts
FINE = (64, 4096, (8, 64, 1024))  # fine-grained layers: hidden units, tokens, numbers of experts
PROMPT, WRITTEN = 4, 60  # tokens of a text

# OpenBLAS's kernels for registers of 512 bits (AVX-512), and how those for 256 (AVX2) are ordered.
WIDE_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")
NARROW_KERNELS = {"OPENBLAS_CORETYPE": "Haswell"}

# What PyTorch does in each race: the name of a side, how its experts run, whether AdamW is fused.
RIVALS = {
    "dense": (("PyTorch eager", "", False), ("PyTorch, fused AdamW", "", True)),
    "MoE": (
        ("PyTorch, textbook loop", "textbook", False),
        ("PyTorch, sorted rows", "sorted", False),
        ("PyTorch, batched", "batched", False),
        ("PyTorch, grouped products", "grouped", False),
        ("PyTorch, sorted rows, fused AdamW", "sorted", True),
        ("PyTorch, batched, fused AdamW", "batched", True),
        ("PyTorch, grouped products, fused AdamW", "grouped", True),
    ),
    "Mixtral": (
        ("Transformers eager", "eager", False),
        ("Transformers, grouped products, fused AdamW", "grouped_mm", True),
    ),
    "text": (
        ("Transformers generate", "eager", False),
        ("Transformers generate, grouped products", "grouped_mm", False),
    ),
}

# What made it fast, and what stands in for it where it is taken back.
STEPS = {
    "memory": "memory kept, not given back after every step",
    "shards": "a shard a core (and its process), not threads in products",
    "processes": "a process for each shard, not a thread",
    "float32": "float32, not float64",
    "rows": "rows reduced by faster ways, not NumPy's reductions",
    "activations": "activations in blocks and in place, not in whole arrays",
    "blocks": "optimizer in blocks, not whole arrays",
    "gather": "gather on the way back, not np.add.at",
    "slices": "slices of sorted rows, not padded batches",
    "experts": "experts shared out, not each product",
    "parallel": "processes share experts out, not threads",
    "few": "few rows: products of narrow parts",
    "idle": "idle experts skipped by AdamW (skip_idle)",
    "keys": "keys and values kept (and few calls), not computed anew",
    "alone": "a token alone in few calls, not as a batch of one",
}
EXPERTS_ONLY = ("gather", "slices")
OF_A_LAYER = ("memory", "activations", *EXPERTS_ONLY, "experts", "parallel", "few")  # a large one
OF_GENERATION = ("keys", "alone")
OF_OTHERS = ("experts", "parallel", "few", "idle", *OF_GENERATION)  # of no training step


def models(quick: bool = False) -> dict[str, ModelConfig]:
    """Configure the models whose training step is measured: nanoGPT's recipe for a CPU."""
    width, layers = (32, 1) if quick else (128, 4)
    base = {"vocab_size": 65, "context": 64, "layers": layers, "width": width, "heads": 4}
    experts = {"num_experts": 8, "top_k": 2, "hidden": 2 * width}
    gated = MoEConfig(**experts, activation="swiglu")
    rotary = {"norm": "rmsnorm", "positions": "rotary", "tied": False}
    return {
        "dense": ModelConfig(**base, hidden=4 * width),
        "MoE": ModelConfig(**base, moe=MoEConfig(**experts)),
        "Mixtral": ModelConfig(**base, **rotary, moe=gated),
    }


def run(plan: Plan, only: tuple[str, ...], report: Callable[[str], Any]) -> dict[str, Any]:
    """Run the rows of the benchmark and return their record, plain JSON data.

    `only` names the kinds of rows, () for all; `report` is told each row before it starts.

    Variables that force the kernels of one library would hold back one side alone. So the workers
    do not see them, but in a quick run, whose times do not count.
    """
    rows, ignored = [], {} if plan.quick else _orders_for_kernels()
    if ignored:
        report(f"each library chooses its own kernels: without {', '.join(ignored)}")
    if plan.threads > machine.cores():
        report(f"{plan.threads} threads on {machine.cores()} cores: these times mean little")
    with machine.environment(dict.fromkeys(ignored) | race.this_package()):
        found = this_machine(plan.torch)
        for name, measure in MEASURES.items():
            for row in measure(plan, report) if not only or name in only else ():
                rows.append({"row": name, **row})
    record = {
        "study": "speed",
        "quick": plan.quick,
        "threads": plan.threads,
        "tolerance": race.TOLERANCE,
        "machine": found | {"ignored": ignored},
        "rows": rows,
    }
    verdicts = [verdict._asdict() for verdict in bench_report.verdicts(record)]
    return record | {"verdicts": verdicts}


def records(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Split a record into those that are kept, by their names: the steps have one of their own."""
    common = {name: value for name, value in record.items() if name != "verdicts"}
    steps = [row for row in record["rows"] if row["row"] == "steps"]
    races = [row for row in record["rows"] if row["row"] != "steps"]
    found = {}
    if races:
        found["speed"] = record | {"rows": races}
    if steps:
        found["speed_steps"] = common | {"study": "speed_steps", "rows": steps}
    return found


def text(record: dict[str, Any]) -> str:
    """Write a kept record as a table."""
    tables = {"speed": bench_report.table, "speed_steps": bench_report.steps_table}
    return tables[record["study"]](record)


def _orders_for_kernels() -> dict[str, str]:
    """Find the variables that tell a library which kernels to take."""
    return {name: os.environ[name] for name in machine.KERNEL_VARIABLES if name in os.environ}


def why_not(library: str) -> str | None:
    """Tell why there is no race against a library; None if there is one."""
    if not TORCH_WORKER.exists():
        return "PyTorch's sides are in tests/benchmarks of a checkout, which is not here."
    if not _is_installed(library):
        return f'not installed: {library}. Install with: pip install -e ".[bench]"'
    return None


def _is_installed(library: str) -> bool:
    """Tell whether a library is there with its version; a mere folder of its name is not it."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return importlib.util.find_spec(library) is not None and bool(metadata.version(library))
    return False


def this_machine(torch: bool) -> dict[str, Any]:
    """Describe what the numbers were measured on."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    others = ["threadpoolctl", *(["torch", "transformers"] if torch else [])]
    found = ["numpy", *filter(_is_installed, others)]
    versions = {name: metadata.version(name) for name in found}
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "blas": f"{blas['name']} {blas['version']}",
        "kernels": _kernels(),
        "versions": {"python": platform.python_version(), **versions},
    }


def _kernels() -> str | None:
    """Ask a fresh process which kernels NumPy's products take; None where nobody can tell."""
    code = "import numpy, threadpoolctl as t; print(t.threadpool_info()[0]['architecture'])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def ours(work: str, plan: Plan, **spec: Any) -> Worker:
    """Describe a worker of the package."""
    command = (sys.executable, "-P", "-m", "moe_numpy.lab.bench_process")
    common = {"work": work, "threads": plan.threads, "repeats": 2 if plan.quick else 21}
    return Worker(OURS, command, common | spec)


def theirs(name: str, worker: Worker, **spec: Any) -> Worker:
    """Describe the worker of PyTorch that does what `worker` does."""
    return Worker(name, (sys.executable, str(TORCH_WORKER)), worker.spec | spec)


def _large_product(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    """Race the libraries of matrix products themselves: no program is faster than its own."""
    report("one large matrix product")
    size = 64 if plan.quick else bench_products.PROBE
    workers = [ours("product", plan, size=size)]
    if plan.torch:
        workers.append(theirs("PyTorch", workers[0]))
    yield {"name": f"{size} x {size} matrices", **plan.race(workers)}


def _steps(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    wide = _kernels() in WIDE_KERNELS
    for name, cfg in models(plan.quick).items():
        report(f"training step, {name}")
        workers = [_our_step(plan, cfg)]
        for label, variant, fused in plan.rivals(name):
            workers.append(theirs(label, workers[0], variant=variant, fused=fused))
        found = plan.race(workers)
        facts = race.tell(workers, facts=("products", "bytes", "effective"))
        for side, told in zip(found["sides"], facts, strict=True):
            side |= {"built": told["built"], "peak": told["peak"]}
        yield {
            "name": name,
            "tokens": bench_work.training().batch * cfg.context,
            "shards": plan.shards,
            "processes": plan.processes,
            **found,
            "bytes": facts[0]["bytes"],
            "products": _products(facts[0]["products"]),
            "narrow": _with_narrow_kernels(workers[0]) if wide else None,
            "effective_experts": facts[0]["effective"],
        }


def _our_step(plan: Plan, cfg: ModelConfig) -> Worker:
    training = bench_work.training(shards=plan.shards)
    described = {"config": config.to_dict(cfg), "training": config.to_dict(training)}
    return ours("step", plan, **described, processes=plan.processes)


def _with_narrow_kernels(worker: Worker) -> dict[str, Any]:
    """Relate a step to its products where those are slower, and all the rest is as it was."""
    with machine.environment(NARROW_KERNELS):
        [told] = race.tell([worker], facts=("products",))
    return _products(told["products"])


def _ablations(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    if not ABLATION_WORKER.exists():
        return
    for name, cfg in models(plan.quick).items():
        without = {*OF_OTHERS, *(() if cfg.moe else EXPERTS_ONLY)}
        without |= {"shards"} if plan.shards == 1 else set()
        without |= {"processes"} if plan.processes == 1 else set()
        steps = [step for step in STEPS if step not in without]
        report(f"steps of speed, {name}")
        yield {"name": name, **_taken_back(plan, _our_step(plan, cfg), steps)}
    experts = 8 if plan.quick else 128
    name = f"layer of {experts} experts"
    report(f"steps of speed, {name}")
    moe = MoEConfig(num_experts=experts, top_k=2, hidden=512)
    possible = {"experts": plan.threads, "parallel": plan.family}
    steps = [step for step in OF_A_LAYER if possible.get(step, 2) > 1]
    tokens = 8 * experts
    yield {"name": name, **_taken_back(plan, _our_layer(plan, moe, tokens), steps)}
    if _kernels() in WIDE_KERNELS:
        with machine.environment(NARROW_KERNELS):
            found = _taken_back(plan, _our_layer(plan, moe, tokens), ["few"])
        yield {"name": f"{name}, kernels for AVX2", **found}
    experts, tokens = (32, 4) if plan.quick else (1024, 64)
    report(f"steps of speed, update of {experts:,} experts")
    moe = MoEConfig(num_experts=experts, top_k=2, hidden=FINE[0])
    spec = {"moe": config.to_dict(moe), "width": WIDTH, "tokens": tokens, "skip_idle": True}
    update = ours("update", plan, **spec, workers=plan.threads)
    name = f"update of {experts:,} experts, {tokens} tokens"
    yield {"name": name, **_taken_back(plan, update, ["idle"])}
    report("steps of speed, generation")
    alone = plan._replace(threads=1)
    yield {"name": "generation", **_taken_back(alone, _our_text(alone), list(OF_GENERATION))}


def _taken_back(plan: Plan, whole: Worker, steps: list[str]) -> dict[str, Any]:
    """Race our side as it is against itself without each of the steps."""
    command = (sys.executable, str(ABLATION_WORKER))
    workers = [Worker(STEPS[step], command, whole.spec | {"without": step}) for step in steps]
    found = plan.race([whole, *workers])
    return {"steps": steps, "threads": plan.threads, **found}


def _products(told: dict[str, Any]) -> dict[str, Any]:
    """Relate a step to its matrix products alone, and those to the machine's own rate."""
    rates = [told["probe_flops"] / seconds / 1e9 for seconds in told["probe"]]
    pairs = list(zip(told["step"], told["products"], rates, strict=True))
    return {
        "calls": told["calls"],
        "flops": told["flops"],
        "busy": told["busy"],
        "rounds": told["rounds"],
        "step_over_products": race.spread([step / alone for step, alone, _ in pairs]),
        "share": race.spread([alone / step for step, alone, _ in pairs]),
        "machine_gflops": race.spread(rates),
        "step_rate": race.spread([told["flops"] / s / 1e9 / rate for s, _, rate in pairs]),
    }


def _layers(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    wide, (hidden, tokens, fine) = (2, 8, 32, 128, 1024), FINE
    sweeps = [("wide", 512, 1024, wide, 2), ("wide", 512, 1024, wide, 1)]
    sweeps += [("fine-grained", hidden, tokens, fine, 2)]
    if plan.quick:
        sweeps = [("wide", 32, 64, (2, 8), 2)]
    for name, hidden, tokens, sizes, k in sweeps:
        for E in sizes:
            report(f"MoE layer, {name}: {E} experts, top-{k}")
            rounds = plan.rounds if k > 1 else min(plan.rounds, 3)  # no aim needs top-1
            own = plan._replace(rounds=rounds)
            yield _layer(own, name, MoEConfig(num_experts=E, top_k=k, hidden=hidden), tokens)


def _layer(plan: Plan, name: str, moe: MoEConfig, tokens: int) -> dict[str, Any]:
    workers = [_our_layer(plan, moe, tokens)]
    for label, variant, fused in plan.rivals("MoE"):
        if not fused:  # a layer alone has no optimizer
            workers.append(theirs(label, workers[0], variant=variant))
    found = plan.race(workers)
    sizes = {"experts": moe.num_experts, "top_k": moe.top_k, "hidden": moe.hidden}
    split = {what: workers[0].spec[what] for what in ("parts", "workers", "processes")}
    return {"name": name, **sizes, "tokens": tokens, **split, **found}


def _growth(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    """Race our fine-grained layers of more and more experts against that of the fewest."""
    report("MoE layers of few and many experts")
    hidden, tokens, sizes = (16, 64, (8, 32)) if plan.quick else FINE
    workers = []
    for E in sizes:
        moe = MoEConfig(num_experts=E, top_k=2, hidden=hidden)
        workers.append(_our_layer(plan, moe, tokens)._replace(name=f"{E:,} experts"))
    yield {"name": "growth", **plan.race(workers, same=False)}


def _our_layer(plan: Plan, moe: MoEConfig, tokens: int) -> Worker:
    gates = "renormalized" if moe.renormalized else "raw"
    described = config.to_dict(moe) | {"gate_weights": gates}
    spec = {"width": WIDTH, "tokens": tokens, **_split(plan, moe, tokens)}
    return ours("layer", plan, moe=described, **spec)


def _split(plan: Plan, moe: MoEConfig, tokens: int) -> dict[str, int]:
    """Say how our side shares a layer out: into parts of the tokens, on threads, or on processes.

    Each part needs all the matrices, and gradients of its own for them. Where an expert has few
    tokens, processes share the experts out instead (or threads, where there can be no processes),
    or if those are small, threads the products.
    """
    rows = tokens * moe.top_k / moe.num_experts
    large = WIDTH * moe.hidden >= machine.WORTH_A_THREAD
    if rows >= (ROWS_TO_SPLIT if large else FEW_ROWS):
        return {"parts": plan.threads, "workers": plan.threads, "processes": 1}
    if large and plan.family > 1:
        return {"parts": 1, "workers": 1, "processes": plan.family}
    return {"parts": 1, "workers": plan.threads if large else 1, "processes": 1}


def _overhead(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    """Race experts with a dense MLP of the same active work.

    The threads split the tokens of the dense one, but share the experts out: each part of the
    tokens would need gradients of its own for four times as many numbers.
    """
    report("MoE layer over a dense MLP of the same active work")
    width, hidden, tokens = (32, 64, 64) if plan.quick else (256, 1024, 4096)
    moe = config.to_dict(MoEConfig(num_experts=8, top_k=2, hidden=hidden))
    spec = {"width": width, "tokens": tokens, "workers": plan.threads}
    workers = [
        ours("mlp", plan, hidden=2 * hidden, parts=plan.threads, **spec)._replace(name="dense"),
        ours("layer", plan, moe=moe, parts=1, processes=1, **spec)._replace(
            name="8 experts, top-2"
        ),
    ]
    yield {"name": "overhead", **plan.race(workers, same=False)}


def _generation(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    report("generation, one thread")
    plan = plan._replace(threads=1)
    workers = [_our_text(plan)]
    for label, variant, _ in plan.rivals("text"):
        workers.append(theirs(label, workers[0], variant=variant))
    found = plan.race(workers)
    [told, *_] = race.tell(workers[:1], facts=("lengths",))
    yield {
        "name": "Mixtral",
        "threads": 1,
        "tokens": WRITTEN,
        **found,
        "by_length": told["lengths"],
    }


def _our_text(plan: Plan) -> Worker:
    described = config.to_dict(models(plan.quick)["Mixtral"])
    return ours("generate", plan, config=described, prompt=PROMPT, tokens=WRITTEN)


def _imports(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    report("import")
    ours = "import moe_numpy; moe_numpy.train, moe_numpy.moe_forward"  # which brings NumPy along
    codes = {f"{OURS} with NumPy": ours, "numpy": "import numpy"}
    if plan.torch:
        codes["torch"] = "import torch"
    times = [[_import(code) for code in codes.values()] for _ in range(plan.rounds)]
    sides, rounds = race.summarize(list(codes), times, [0.0] * plan.rounds)
    yield {"name": "import", "sides": sides, "rounds": rounds}


def _import(code: str) -> float:
    """Time an import in a fresh process, in seconds.

    Raises     ValueError if it fails; the last line of its complaint is told
    """
    timed = f"from time import perf_counter as t; a = t(); {code}; print(t() - a)"
    done = subprocess.run([sys.executable, "-P", "-c", timed], capture_output=True, text=True)
    if done.returncode:
        complaint = (done.stderr.strip() or "no word").splitlines()[-1]
        raise ValueError(f"bench: {code!r} must work, got: {complaint}. Run it by itself.")
    return float(done.stdout)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


MEASURES = {
    "product": _large_product,
    "step": _steps,
    "steps": _ablations,
    "layer": _layers,
    "growth": _growth,
    "overhead": _overhead,
    "generation": _generation,
    "import": _imports,
}
