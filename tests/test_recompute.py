"""Running a layer's forward again in the backward saves memory and changes no bit."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import tiny

from moe_numpy.config import Capacity, LearnedNoise, SwitchLoss
from moe_numpy.training import data, loop
from moe_numpy.transformer import model

MOE = tiny.moe(
    noise=LearnedNoise(),
    capacity=Capacity(factor=0.8),
    balance=(SwitchLoss(),),
    activation="swiglu",
)


def step(cfg, seed=0, batch=4):
    rng = np.random.default_rng(seed)
    params = model.init_model(rng, cfg)
    token_BT, target_BT = rng.integers(0, cfg.vocab_size, (2, batch, cfg.context))
    noise = model.draw_noise(rng, cfg, token_BT.size)
    tracemalloc.start()
    loss, _, cache = model.loss_forward(token_BT, target_BT, params, cfg, noise)
    kept = tracemalloc.get_traced_memory()[0]
    grads = model.loss_backward(np.ones_like(loss), cache)
    tracemalloc.stop()
    return (loss, grads), kept


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_the_gradients_are_the_same_to_the_bit(moe):
    cfg = tiny.model(moe)
    plain, kept = step(cfg)
    again, less = step(dataclasses.replace(cfg, recompute=True))
    assert tiny.same_bits(plain, again)
    assert less < kept / 2


def test_what_is_kept_for_a_layer_is_its_input():
    cfg = tiny.model(MOE, recompute=True)
    few, many = (step(dataclasses.replace(cfg, layers=layers), batch=16)[1] for layers in (2, 6))
    inputs = 4 * 16 * cfg.context * cfg.width * 4  # of four more layers, in bytes
    assert inputs <= many - few < 1.5 * inputs


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_an_evaluation_keeps_no_cache_of_a_layer(moe):
    """Else the first evaluation, not the steps, would set the memory of a run."""
    cfg = dataclasses.replace(tiny.model(moe), layers=6)
    ids = np.arange(9 * cfg.context + 1) % cfg.vocab_size
    params = model.init_model(np.random.default_rng(0), cfg)
    token_WT, target_WT = data.windows(ids, cfg.context)
    plain = peak(lambda: model.loss_forward(token_WT, target_WT, params, cfg.evaluation()))
    assert peak(lambda: loop.evaluate(params, cfg, ids)) < plain / 2


def peak(work):
    tracemalloc.start()
    work()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found
