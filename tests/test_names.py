"""Names tell shapes: every array of the mathematics is watched while a model runs."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_numpy import tree
from moe_numpy.backend import xp
from moe_numpy.classroom import registry
from moe_numpy.config import (
    Assignment,
    Capacity,
    ExpertChoice,
    GaussianNoise,
    GroupLimited,
    Hierarchy,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    ModelConfig,
    MoEConfig,
    SecondExpert,
    Shared,
    Sinkhorn,
    SoftSlots,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.transformer import generation, model

ROOT = Path(__file__).parent.parent
SUFFIX = re.compile(r"_([A-Z]+)$")
RUNS = {
    "learned noise, next best, bias, gated": MoEConfig(
        num_experts=9,
        top_k=3,
        hidden=11,
        activation="swiglu",
        noise=LearnedNoise(),
        capacity=Capacity(factor=0.7, overflow="next_best"),
        balance=(SwitchLoss(), ImportanceLoss(), ZLoss()),
        bias_rate=0.1,
        bias_with_loss=True,
    ),
    "fixed noise, drop, raw gates": MoEConfig(
        num_experts=9,
        top_k=3,
        hidden=11,
        gate_weights="raw",
        noise=GaussianNoise(),
        capacity=Capacity(factor=0.7, priority="score"),
        balance=(LoadLoss(),),
    ),
    "jitter": MoEConfig(num_experts=9, top_k=3, hidden=11, noise=InputJitter(eps=0.1)),
    "sigmoid, groups, bias rule, shared": MoEConfig(
        num_experts=9,
        top_k=3,
        hidden=11,
        activation="clamped_swiglu",
        score="sigmoid",
        selection=GroupLimited(groups=3, kept=2),
        bias_rate=0.1,
        balance=(SwitchLoss(group=5),),
        shared=Shared(hidden=14, gated=True),
        router_bias=True,
        expert_bias=True,
    ),
    "second expert, places in groups, kept gates, on the input": MoEConfig(
        num_experts=9,
        top_k=2,
        hidden=11,
        activation="swiglu3",
        selection=SecondExpert(),
        gate_weights="renormalized_kept",
        gate_on="input",
        capacity=Capacity(factor=0.7, priority="choice", group=5),
    ),
    "hierarchy": MoEConfig(
        num_experts=9,
        top_k=4,
        hidden=11,
        selection=Hierarchy(groups=3, kept=2),
        noise=LearnedNoise(),
        balance=(SwitchLoss(), ImportanceLoss(), LoadLoss(), ZLoss()),
    ),
    "assignment": MoEConfig(
        num_experts=9, top_k=1, hidden=11, score="sqrt_softplus", selection=Assignment()
    ),
    "Sinkhorn": MoEConfig(num_experts=9, top_k=3, hidden=11, selection=Sinkhorn()),
    "expert choice": MoEConfig(num_experts=9, top_k=3, hidden=11, selection=ExpertChoice()),
    "soft slots": MoEConfig(num_experts=9, top_k=9, hidden=11, selection=SoftSlots(slots=2)),
    "dense": None,
}


def complaints(frame):
    """Compare the arrays of a frame, and of the tuples in it, with the letters of their names."""
    names = {n: v for n, v in frame.f_locals.items() if not n.startswith("@")}
    arrays = {n: v for n, v in names.items() if hasattr(v, "ndim") and hasattr(v, "shape")}
    groups = [arrays]
    for value in names.values():
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            groups.append({n: a for n, a in value._asdict().items() if hasattr(a, "shape")})
    for group in groups:
        sizes = {
            n: {v}
            for n, v in names.items()
            if group is groups[0] and re.fullmatch("[A-Z]", n) and type(v) is int
        }
        for name, array in group.items():
            letters = SUFFIX.search(name)
            if not letters:
                continue
            if array.ndim != len(letters[1]):
                yield f"{name} has the shape {array.shape}"
                continue
            for letter, size in zip(letters[1], array.shape, strict=True):
                sizes.setdefault(letter, set()).add(size)
        yield from (f"{a} is {sorted(s)} at once" for a, s in sizes.items() if len(s) > 1)


def watch(work):
    """Run `work`; return what is wrong with names in the mathematics, and the functions seen."""
    wrong, seen = set(), set()
    folders = tuple(str(ROOT / package.replace(".", "/")) for package in registry.PACKAGES)

    def profile(frame, event, _):
        if event == "return" and frame.f_code.co_filename.startswith(folders):
            where = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
            seen.add(frame.f_code.co_name)
            wrong.update(f"{where}: {text}" for text in complaints(frame))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return wrong, seen


LLAMA = {"norm": "rmsnorm", "positions": "rotary", "tied": False, "kv_heads": 2}
EXOTIC = {
    **LLAMA,
    "head_size": 10,
    "sandwich": True,
    "attention_bias": True,
    "sinks": True,
    "logit_cap": 5.0,
    "hidden": 13,
}
STYLES = {
    "gpt": {},
    "llama": LLAMA,
    "exotic": {**EXOTIC, "qk_norm": "full"},
    "exotic, norms by head": {**EXOTIC, "qk_norm": "head"},
}


@pytest.mark.parametrize("moe", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("style", STYLES)
def test_names_tell_the_truth_about_shapes(moe, style):
    """All sizes differ: B 6, T 5, N 30, H 4, G 2, D 8 or 10, C 32, K 3, E 9, F 11 or 13, V 17, L 1.

    The exotic styles have an extra feed-forward beside the experts.
    """
    extra = moe is not None and "hidden" in STYLES[style]
    knobs = {
        "vocab_size": 17,
        "context": 7,
        "layers": 1,
        "width": 32,
        "heads": 4,
        "hidden": None if moe else 13,
        "moe": moe,
        "causal": moe is None or not isinstance(moe.selection, ExpertChoice | SoftSlots),
        "extra_ffn": extra,
    }
    cfg = ModelConfig(**knobs | STYLES[style])
    rng = np.random.default_rng(0)
    token_BT, target_BT = rng.integers(0, 17, (2, 6, 5))

    def work():
        params = model.init_model(rng, cfg)
        noise = model.draw_noise(rng, cfg, 30)
        loss, _, cache = model.loss_forward(token_BT, target_BT, params, cfg, noise)
        grads = model.loss_backward(xp.ones_like(loss), cache)
        assert [a.shape for a in tree.leaves(grads)] == [a.shape for a in tree.leaves(params)]
        if cfg.causal:
            assert len(list(generation.generate(token_BT[0], params, cfg, 4, 0))) == 4

    wrong, seen = watch(work)
    assert {"model_forward", "model_backward", "scores_backward"} <= seen
    assert not moe or {"moe_forward", "moe_backward", "experts_backward"} <= seen
    assert not wrong


def test_the_watch_over_names_sees_a_lie(monkeypatch):
    module = importlib.import_module("moe_numpy.ops.softmax")
    lie = compile(
        "def lie(x):\n    x_NC, y_C, N = x, x[0, :2], 4\n    return x_NC\n"
        "def rank(x):\n    x_N = x\n    return x_N\n",
        module.__file__,
        "exec",
    )
    scope: dict = {}
    exec(lie, scope)
    wrong, _ = watch(lambda: (scope["lie"](np.zeros((3, 5))), scope["rank"](np.zeros((3, 5)))))
    assert wrong == {
        "softmax.py:lie: C is [2, 5] at once",
        "softmax.py:lie: N is [3, 4] at once",
        "softmax.py:rank: x_N has the shape (3, 5)",
    }
