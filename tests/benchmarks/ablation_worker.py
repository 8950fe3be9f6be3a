"""Our own side with one step of speed taken back: `without` of the specification names it."""

import contextlib
import functools

import numpy as np
from plain import TWINS

from moe_numpy import machine
from moe_numpy.classroom import registry
from moe_numpy.lab import bench_process, bench_work
from moe_numpy.moe import experts
from moe_numpy.training import loop, optimizer
from moe_numpy.transformer import decode, generation, model

until_the_end = contextlib.ExitStack()


def build(spec):
    """Take the step back, which nothing undoes in this process, and build the work."""
    without = spec["without"]
    if without in TWINS:
        for name, twin in TWINS[without].items():
            until_the_end.enter_context(registry.swap(name, twin))
    if without in SETTINGS:
        SETTINGS[without](spec)
    return bench_work.build(spec)


def give_memory_back(spec):
    """Let the C library return large arrays to the system."""
    machine.keep_memory = lambda: None


def one_shard(spec):
    """Leave the batch whole; the threads meet in the matrix products alone."""
    spec["training"]["shards"] = spec["processes"] = 1


def threads(spec):
    """Let the threads of one process share out the shards."""
    spec["processes"] = 1


def one_block(spec):
    """Update every array in one go."""
    optimizer.BLOCK = 1 << 62


def products_of_two_threads(spec):
    """Let the threads meet in the products instead of sharing out experts."""
    spec["workers"] = spec["processes"] = 1


def threads_for_experts(spec):
    """Let the threads of one process share out the experts."""
    spec["workers"], spec["processes"] = spec["processes"], 1


def one_order(spec):
    """Multiply few rows as many."""
    experts.FEW = 0


def idle_experts_too(spec):
    """Update the experts without a token as all others."""
    spec["skip_idle"] = False


def products_of_all_threads(spec):
    """Without slices threads have no experts to share out: they meet in the products."""
    if spec["work"] == "layer" and spec["parts"] == spec["processes"] == 1:
        spec["workers"] = 1


def double_precision(spec):
    """Compute with numbers of twice the size."""
    loop.new_run = functools.partial(loop.new_run, dtype="float64")


def nothing_kept(spec):
    """Read the whole text again for every token."""

    def again(history, params, cfg, tokens, rng, knobs):
        for _ in range(tokens):
            logits_BTV, *_ = model.model_forward(np.array([history[-cfg.context :]]), params, cfg)
            history.append(generation._draw(logits_BTV[0, -1], rng, *knobs))
            yield history[-1]

    generation._continue = again


def as_a_batch(spec):
    """Let every token take the way of many."""
    decode.supports = lambda cfg: False


SETTINGS = {
    "memory": give_memory_back,
    "shards": one_shard,
    "processes": threads,
    "blocks": one_block,
    "float32": double_precision,
    "experts": products_of_two_threads,
    "parallel": threads_for_experts,
    "few": one_order,
    "idle": idle_experts_too,
    "slices": products_of_all_threads,
    "keys": nothing_kept,
    "alone": as_a_batch,
}

if __name__ == "__main__":
    bench_process.serve(build)
