"""A layer's configuration in words: its routing as formulas, and one word for each column."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from moe_numpy.config import (
    GATED,
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
    Sinkhorn,
    SoftSlots,
    SwitchLoss,
)

HIDDEN = {
    "identity": "(x in)",
    "relu": "relu(x in)",
    "gelu": "gelu(x in)",
    "gelu_tanh": "gelu_tanh(x in)",
    "silu": "silu(x in)",
    "swiglu": "(silu(x in) * (x up))",
    "geglu": "(gelu_tanh(x in) * (x up))",
    "clamped_swiglu": "((clip(x up) + 1) * silu(1.702 min(x in, 7)) / 1.702)",
    "swiglu3": "(silu(x in) * (x up) * (x third))",
}


def routing(moe: MoEConfig) -> list[str]:
    """Write down what the layer computes, a formula a line, in the names of the package."""
    if isinstance(moe.selection, SoftSlots):
        return _soft(moe) + _expert(moe)
    lines = _logits(moe)
    if isinstance(moe.selection, Hierarchy):
        lines += _hierarchy(moe)
    else:
        lines += [f"score_NE = {_score(moe)}", *_choice(moe), *_gates(moe)]
    return lines + _places(moe) + _expert(moe) + _balance(moe) + _evaluation(moe)


def knobs(cfg: ModelConfig | MoEConfig) -> list[tuple[str, str]]:
    """List the fields of a configuration that differ from their defaults, as Python writes them."""
    return [
        (f.name, _python(getattr(cfg, f.name)))
        for f in dataclasses.fields(cfg)
        if f.name != "moe" and getattr(cfg, f.name) != f.default
    ]


def columns(moe: MoEConfig) -> dict[str, str]:
    """Name the parts of a layer in a word or two each."""
    part, k = moe.selection, str(moe.top_k)
    if isinstance(part, GroupLimited | Hierarchy):
        k += f" of {part.kept}/{part.groups}"
    itself = {
        Assignment: "assignment",
        Sinkhorn: "Sinkhorn",
        ExpertChoice: "expert choice",
        SoftSlots: "soft slots",
    }.get(type(part))
    noise = {LearnedNoise: "learned", GaussianNoise: "normal", InputJitter: "jitter"}
    random = isinstance(part, SecondExpert) and part.policy == "random"
    terms = ["bias"] if moe.bias_rate else []
    terms += [type(term).__name__.removesuffix("Loss").lower() for term in moe.balance]
    soft = isinstance(part, SoftSlots)
    limit = moe.capacity
    return {
        "k": "all" if moe.top_k == moe.num_experts else k,
        "score": "cosine" if soft else moe.score,
        "weights": "softmax" if soft else "renorm." if moe.renormalized else "raw",
        "noise": noise.get(type(moe.noise), "second" if random else "-"),
        "capacity": "-" if limit is None else f"{limit.factor:g}" + "+" * _moves_on(limit),
        "balance": itself or ", ".join(terms) or "-",
    }


def _moves_on(limit: Capacity) -> bool:
    return limit.overflow == "next_best"


def _python(value: Any) -> str:
    if isinstance(value, tuple):
        if len(value) > 3 and all(isinstance(item, int) for item in value):
            steps = {b - a for a, b in itertools.pairwise(value)}
            if len(steps) == 1:
                step = "" if steps == {1} else f", {steps.pop()}"
                return f"tuple(range({value[0]}, {value[-1] + 1}{step}))"
        inner = ", ".join(_python(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if dataclasses.is_dataclass(value):
        inner = ", ".join(f"{name}={text}" for name, text in knobs(value))
        return f"{type(value).__name__}({inner})"
    return f"{value:.4g}" if len(repr(value)) > 8 and isinstance(value, float) else repr(value)


def _logits(moe: MoEConfig) -> list[str]:
    x = "x_NC"
    lines = []
    if isinstance(moe.noise, InputJitter):
        lines.append(f"x'_NC = x_NC * uniform({1 - moe.noise.eps:g}, {1 + moe.noise.eps:g})")
        x = "x'_NC"
    product = f"{x} @ w_CE" + (" + offset_E" if moe.router_bias else "")
    if isinstance(moe.noise, LearnedNoise):
        scale = f"(softplus(x_NC @ noise_CE) + {moe.noise.floor:g})"
    elif isinstance(moe.noise, GaussianNoise):
        scale = f"{moe.noise.std:g}"
    else:
        return [*lines, f"noisy_NE = clean_NE = {product}"]
    return [f"clean_NE = {product}", f"noisy_NE = clean_NE + normal_NE * {scale}"]


def _score(moe: MoEConfig) -> str:
    return {
        "softmax": "softmax(noisy_NE)",
        "sigmoid": "sigmoid(noisy_NE)",
        "sqrt_softplus": "sqrt(softplus(noisy_NE))",
    }[moe.score]


def _choice(moe: MoEConfig) -> list[str]:
    """Write down who is chosen, and by what."""
    part, k = moe.selection, moe.top_k
    rank = "score_NE + bias_E" if moe.bias_rate else "score_NE"
    if moe.bias_rate and moe.score == "softmax" and not isinstance(part, GroupLimited):
        rank = "noisy_NE + bias_E"
    if isinstance(part, ExpertChoice):
        return [f"wished: each expert takes its ceil({k} N / {moe.num_experts}) best tokens"]
    if isinstance(part, Assignment):
        return [
            "wished_N1 = the assignment of N / E tokens to each expert with the largest sum of"
            " noisy_NE"
        ]
    lines = []
    if isinstance(part, GroupLimited):
        best = f"largest {rank}" if part.score == "max" else f"sum of its two largest {rank}"
        lines.append(f"score of a group = {best}")
        rank += f" in the {part.kept} best of {part.groups} groups"
    if isinstance(part, Sinkhorn):
        rank = "sinkhorn(noisy_NE)"
    lines.append(f"wished_NK = top_k({rank}, {k})")
    if isinstance(part, SecondExpert):
        when = f"if its gate w2 > {part.threshold:g}"
        if part.policy == "random":
            when = f"with probability min(1, w2 / {part.threshold:g}), w2 its gate"
        lines.append(f"the second expert is used {when}")
    return lines


def _hierarchy(moe: MoEConfig) -> list[str]:
    part = moe.selection
    each = moe.top_k // part.kept
    lines = _logits(dataclasses.replace(moe, selection=None, balance=()))
    primary = [line.replace("_NE", "_NG").replace("_CE", "_CG") for line in lines]
    return [
        *(line for line in primary if not line.startswith("x'")),
        f"wished_NK = top_k(noisy_NG, {part.kept}) of {part.groups} groups, "
        f"top_k(noisy_NE, {each}) in each",
        f"score_NE = {_product('noisy')}",
        f"gate_NK = {_scale(moe)}softmax(noisy_NG[{_whose(moe)} groups]) * "
        f"softmax(noisy_NE[{_whose(moe)} in the group])",
    ]


def _product(logits: str) -> str:
    return f"softmax({logits}_NG)[group] * softmax({logits}_NE in the group)"


def _whose(moe: MoEConfig) -> str:
    return "used" if moe.capacity is not None and _moves_on(moe.capacity) else "wished"


def _gates(moe: MoEConfig) -> list[str]:
    """Write down the weights of the chosen experts."""
    gate, chosen = f"score_NE[{_whose(moe)}]", "them"
    if moe.gate_weights == "renormalized_kept":
        chosen = "those that have a place"
    if moe.renormalized:
        gate += f" / sum over {chosen}"
    return [f"gate_NK = {_scale(moe)}{gate}"]


def _scale(moe: MoEConfig) -> str:
    return "" if moe.gate_scale == 1.0 else f"{moe.gate_scale:g} * "


def _places(moe: MoEConfig) -> list[str]:
    limit = moe.capacity
    if limit is None:
        return []
    tokens = "N" if limit.group is None else f"{limit.group}"
    exact = f"{limit.factor:g} * {tokens} / {moe.num_experts}"
    if limit.times_k and moe.top_k > 1:
        exact = f"{limit.factor:g} * {moe.top_k} * {tokens} / {moe.num_experts}"
    text = f"places = {limit.rounding}({exact})"
    text += f", at least {limit.minimum}" if limit.minimum else ""
    text += f", up to a multiple of {limit.multiple}" if limit.multiple > 1 else ""
    text += f", in each group of {limit.group} tokens" if limit.group else ""
    first = {
        "token": "token by token",
        "choice": "first choices first",
        "bpr": "first choices first, most decided tokens first",
        "score": "most probable choices first",
    }
    full = "asks the next best one; used_NK = who takes it" if _moves_on(limit) else "is dropped"
    return [text, f"served {first[limit.priority]}; who finds an expert full {full}"]


def _expert(moe: MoEConfig) -> list[str]:
    hidden = HIDDEN[moe.activation]
    if moe.expert_bias:
        for name in ("x in", "x up") if moe.activation in GATED else ("x in",):
            hidden = hidden.replace(name, f"{name} + b")
    lines = [f"expert(x) = {hidden} out" + (" + b" if moe.expert_bias else "")]
    y = "sum over K of gate_NK * expert_K(x_NC)"
    if isinstance(moe.selection, SoftSlots):
        y = "combine_NR @ expert(x_RC)"
    elif moe.gate_on == "input":
        y = "sum over K of expert_K(gate_NK * x_NC)"
    if moe.shared is not None:
        y += " + sigmoid(x_NC @ gate_C1) * shared(x_NC)" if moe.shared.gated else " + shared(x_NC)"
    return [*lines, f"y_NC = {y}"]


def _soft(moe: MoEConfig) -> list[str]:
    return [
        f"logit_NR = scale * cosine(x_NC, slots_CR), R = {moe.num_experts} * {moe.selection.slots}",
        "x_RC = softmax(logit_NR over the tokens)^T @ x_NC",
        "combine_NR = softmax(logit_NR over the slots)",
    ]


def _balance(moe: MoEConfig) -> list[str]:
    terms, where = [], []
    prob, load = "softmax(clean_NE)", "sum over N of P(e is chosen)"
    square = "mean over N of (log sum exp clean_NE)^2"
    if isinstance(moe.selection, Hierarchy):
        prob = _product("clean")
        load = "(sum over N of P(group is chosen)) * mean over its tokens of P(e is chosen in it)"
        square = "(mean over N of (log sum exp clean_NG)^2"
        square += " + mean over N and groups of (log sum exp clean_NE in the group)^2)"
    for term in moe.balance:
        if isinstance(term, SwitchLoss):
            terms.append(f"{term.weight:g} * E sum_e f_e P_e")
            where.append(_counts(term, moe))
        elif isinstance(term, ImportanceLoss):
            of = "gate_NK" if term.of == "gates" else prob
            terms.append(f"{term.weight:g} * CV^2(sum over N of {of})")
        elif isinstance(term, LoadLoss):
            terms.append(f"{term.weight:g} * CV^2({load})")
        else:
            terms.append(f"{term.weight:g} * {square}")
    lines = [f"aux = {' + '.join(terms)}", *where] if terms else []
    if moe.bias_rate:
        rule = "sign(mean wished_E - wished_E)"
        lines.append(f"after a step: bias_E += {moe.bias_rate:g} * {rule}")
    return lines


def _counts(term: SwitchLoss, moe: MoEConfig) -> str:
    """Say what f_e and P_e of the Switch loss are."""
    counted = term.counted or moe.top_k
    share = "share of e" if term.divide or counted == 1 else f"{counted} * share of e"
    among = f"{counted} best experts"
    if counted == moe.top_k:
        among = "choice" if counted == 1 else f"{counted} choices"
    elif counted == 1:
        among = "best expert"
    mean = "score_NE" if moe.score == "softmax" else "score_NE / sum over E"
    text = f"f_e = {share} in every token's {among}, P_e = mean over N of {mean}"
    return text + (f"; for each {term.group} tokens, then the mean" if term.group else "")


def _evaluation(moe: MoEConfig) -> list[str]:
    """Say what is different at evaluation."""
    after = moe.evaluation()
    words = ["no noise"] if moe.noise is not None else []
    words += ["no limits"] if after.capacity != moe.capacity else []
    words += ["plain top_k"] if after.selection != moe.selection else []
    if isinstance(moe.selection, SecondExpert) and moe.selection.policy == "random":
        words.append("always both experts")
    return [f"at evaluation: {', '.join(words)}"] if words else []
