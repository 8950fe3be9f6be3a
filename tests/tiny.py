"""A text, a model and a run so small that training them takes a blink."""

import dataclasses

import numpy as np

from moe_numpy import tree
from moe_numpy.config import ModelConfig, MoEConfig, TrainingConfig
from moe_numpy.training import data, loop

WORDS = "the cat sees a dog and the dog sees a cat near our old red house\n".split(" ")
FLAGS = (
    "--steps 12 --layers 1 --width 16 --heads 2 --context 16 --batch 4 --experts 4 --hidden 8"
).split()


def text(words=700, seed=0):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def corpus(seed=0):
    whole = text(seed=seed)
    alphabet = "".join(sorted(set(whole)))
    ids = data.encode(whole, alphabet)
    cut = len(ids) * 9 // 10
    return data.Corpus(
        name="tiny", alphabet=alphabet, train=ids[:cut], validation=ids[cut:], sha256=f"seed {seed}"
    )


def moe(**changes):
    return MoEConfig(**{"num_experts": 4, "top_k": 2, "hidden": 8, **changes})


def model(moe_cfg=None, **changes):
    """Configure two layers, both with experts; `moe_cfg=None` is the dense twin."""
    fields = {"vocab_size": corpus().vocab_size, "context": 16, "layers": 2, "width": 16}
    dense = {} if moe_cfg else {"hidden": 16}
    return ModelConfig(**{**fields, "heads": 2, "moe": moe_cfg, **dense, **changes})


def training(**changes):
    fields = {"steps": 9, "batch": 4, "rate": 1e-2, "final_rate": 1e-3, "warmup": 3, "seed": 5}
    return TrainingConfig(**{**fields, **changes})


def run(moe_cfg=None, dtype="float32", **changes):
    return loop.new_run(corpus(), model(moe_cfg), training(**changes), dtype)


def trained(moe_cfg=None, dtype="float32", **changes):
    finished = run(moe_cfg, dtype, **changes)
    loop.train(finished, show_progress=False)
    return finished


def same_bits(a, b):
    """Compare two trees array by array: type, shape and every bit."""
    left, right = dict(tree.named_leaves(a)), dict(tree.named_leaves(b))
    assert left.keys() == right.keys()
    different = [
        name
        for name in left
        if left[name].dtype != right[name].dtype
        or left[name].shape != right[name].shape
        or left[name].tobytes() != right[name].tobytes()
    ]
    assert different == []
    return True


def same_run(a, b):
    """Compare everything of two runs that decides how they go on, and what they left behind."""
    assert (a.step, a.cfg, a.training, a.evaluations) == (b.step, b.cfg, b.training, b.evaluations)
    assert a.data_rng.bit_generator.state == b.data_rng.bit_generator.state
    assert a.noise_rng.bit_generator.state == b.noise_rng.bit_generator.state
    return same_bits((a.params, a.state, a.series), (b.params, b.state, b.series))


def without(cfg, **parts):
    return dataclasses.replace(cfg, **parts)
