"""The benchmark: how fast the package trains and writes, alone and against PyTorch.

Every row is a race (`race`) of our side against none or more others. PyTorch's sides live in
`tests/benchmarks` of a checkout and need the extra `bench`; without them our side runs alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_numpy import config
from moe_numpy.config import ModelConfig, MoEConfig
from moe_numpy.lab import bench_work, race
from moe_numpy.lab.race import Worker

OURS = "moe_numpy"
TORCH_WORKER = Path(__file__).parents[2] / "tests/benchmarks/torch_worker.py"


class Plan(NamedTuple):
    """What a benchmark takes: the full sizes, or small ones that only show that it works."""

    rounds: int
    threads: int
    quick: bool
    torch: bool

    @property
    def block(self) -> float:
        """Seconds of a block."""
        return 0.02 if self.quick else 0.5


# What PyTorch does in each race: the name of a side, how its experts run, whether AdamW is fused.
RIVALS = {
    "dense": (("PyTorch eager", "", False), ("PyTorch, fused AdamW", "", True)),
    "MoE": (
        ("PyTorch, textbook loop", "textbook", False),
        ("PyTorch, sorted rows", "sorted", False),
        ("PyTorch, batched", "batched", False),
    ),
    "Mixtral": (
        ("Transformers eager", "eager", False),
        ("Transformers, grouped products, fused AdamW", "grouped_mm", True),
    ),
}


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
    """
    rows = []
    for name, measure in MEASURES.items():
        for row in measure(plan, report) if not only or name in only else ():
            rows.append({"row": name, **row})
    return {
        "study": "speed",
        "quick": plan.quick,
        "threads": plan.threads,
        "tolerance": race.TOLERANCE,
        "machine": machine(plan.torch),
        "rows": rows,
    }


def why_alone() -> str | None:
    """Tell why there is nothing to race against; None if there is."""
    if not TORCH_WORKER.exists():
        return "PyTorch's sides are in tests/benchmarks of a checkout, which is not here."
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        return f'not installed: {", ".join(missing)}. Install with: pip install -e ".[bench]"'
    return None


def machine(torch: bool) -> dict[str, Any]:
    """Describe what the numbers were measured on."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    others = ("torch", "transformers") if torch else ()
    versions = {name: metadata.version(name) for name in ("numpy", *others)}
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "blas": f"{blas['name']} {blas['version']}",
        "versions": {"python": platform.python_version(), **versions},
    }


def ours(work: str, plan: Plan, **spec: Any) -> Worker:
    """Describe a worker of the package."""
    command = (sys.executable, "-m", "moe_numpy.lab.bench_process")
    common = {"work": work, "threads": plan.threads, "repeats": 2 if plan.quick else 7}
    return Worker(OURS, command, common | spec)


def theirs(name: str, worker: Worker, **spec: Any) -> Worker:
    """Describe the worker of PyTorch that does what `worker` does."""
    return Worker(name, (sys.executable, str(TORCH_WORKER)), worker.spec | spec)


def _steps(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    for name, cfg in models(plan.quick).items():
        report(f"training step, {name}")
        settings = {"config": cfg, "training": bench_work.training()}
        spec = {name: config.to_dict(value) for name, value in settings.items()}
        workers = [ours("step", plan, **spec)]
        for label, variant, fused in RIVALS[name] if plan.torch else ():
            workers.append(theirs(label, workers[0], variant=variant, fused=fused))
        found = race.race_all(workers, plan.rounds, plan.block)
        facts = race.tell(workers, facts=("products", "bytes"))
        for side, told in zip(found["sides"], facts, strict=True):
            side["peak"] = told["peak"]
        yield {
            "name": name,
            "tokens": settings["training"].batch * cfg.context,
            **found,
            "bytes": facts[0]["bytes"],
            "products": _products(facts[0]["products"]),
        }


def _products(told: dict[str, Any]) -> dict[str, Any]:
    """Relate a step to its matrix products alone, and those to the machine's own rate."""
    rates = [told["probe_flops"] / seconds / 1e9 for seconds in told["probe"]]
    pairs = list(zip(told["step"], told["products"], rates, strict=True))
    return {
        "calls": told["calls"],
        "flops": told["flops"],
        "step_over_products": race.spread([step / alone for step, alone, _ in pairs]),
        "share": race.spread([alone / step for step, alone, _ in pairs]),
        "machine_gflops": race.spread(rates),
        "step_rate": race.spread([told["flops"] / s / 1e9 / rate for s, _, rate in pairs]),
    }


def _layers(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    wide, fine = (2, 8, 32, 128, 1024), (8, 64, 256, 1024)
    sweeps = (("wide", 512, 1024, wide, (1, 2)), ("fine-grained", 64, 4096, fine, (2,)))
    if plan.quick:
        sweeps = (("wide", 32, 64, (2, 8), (2,)),)
    for name, hidden, tokens, sizes, choices in sweeps:
        for E in sizes:
            for k in choices:
                report(f"MoE layer, {name}: {E} experts, top-{k}")
                yield _layer(plan, name, MoEConfig(num_experts=E, top_k=k, hidden=hidden), tokens)


def _layer(plan: Plan, name: str, moe: MoEConfig, tokens: int) -> dict[str, Any]:
    gates = "renormalized" if moe.renormalized else "raw"
    described = config.to_dict(moe) | {"gate_weights": gates}
    workers = [ours("layer", plan, moe=described, width=128, tokens=tokens)]
    for label, variant, _ in RIVALS["MoE"] if plan.torch else ():
        workers.append(theirs(label, workers[0], variant=variant))
    found = race.race_all(workers, plan.rounds, plan.block)
    sizes = {"experts": moe.num_experts, "top_k": moe.top_k, "hidden": moe.hidden}
    return {"name": name, **sizes, "tokens": tokens, **found}


def _overhead(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    report("MoE layer over a dense MLP of the same active work")
    width, hidden, tokens = (32, 64, 64) if plan.quick else (256, 1024, 4096)
    moe = config.to_dict(MoEConfig(num_experts=8, top_k=2, hidden=hidden))
    workers = [
        ours("mlp", plan, width=width, hidden=2 * hidden, tokens=tokens)._replace(name="dense"),
        ours("layer", plan, width=width, moe=moe, tokens=tokens)._replace(name="8 experts, top-2"),
    ]
    yield {"name": "overhead", **race.race_all(workers, plan.rounds, plan.block, same=False)}


def _generation(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    report("generation, one thread")
    plan = plan._replace(threads=1)
    spec = {"config": config.to_dict(models(plan.quick)["Mixtral"]), "prompt": 4, "tokens": 60}
    workers = [ours("generate", plan, **spec)]
    if plan.torch:
        workers.append(theirs("Transformers generate", workers[0], variant="eager"))
    found = race.race_all(workers, plan.rounds, plan.block)
    [told, *_] = race.tell(workers[:1], facts=("lengths",))
    yield {
        "name": "Mixtral",
        "threads": 1,
        "tokens": 60,
        **found,
        "by_length": told["lengths"],
    }


def _imports(plan: Plan, report: Callable) -> Iterator[dict[str, Any]]:
    report("import")
    uses = "import numpy; b = t(); import moe_numpy; moe_numpy.train, moe_numpy.moe_forward"
    codes = {"numpy": "import numpy; b = t()", OURS: uses, "torch": "import torch; b = t()"}
    names = [name for name in codes if plan.torch or name != "torch"]
    sides = [_import(name, codes[name], plan.rounds) for name in names]
    yield {"name": "import", "sides": sides}


def _import(name: str, code: str, repeats: int) -> dict[str, Any]:
    """Time an import in fresh processes; of ours, what it takes beyond NumPy."""
    code = f"from time import perf_counter as t; b = a = t(); {code}; c = t()\n"
    code += "import json; print(json.dumps([b - a, c - b]))"
    seconds = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        first, beyond = json.loads(done.stdout)
        seconds.append(beyond if name == OURS else first)
    return {"name": name, "milliseconds": race.spread([1e3 * s for s in seconds]), "ratio": None}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


MEASURES = {
    "step": _steps,
    "layer": _layers,
    "overhead": _overhead,
    "generation": _generation,
    "import": _imports,
}
