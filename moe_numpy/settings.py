"""The settings of `train`: flags on the command line, turned into configurations."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_numpy.config import (
    ACTIVATIONS,
    PRIORITIES,
    SGD,
    AdamW,
    Capacity,
    GaussianNoise,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    ModelConfig,
    MoEConfig,
    SwitchLoss,
    TrainingConfig,
    ZLoss,
)

if TYPE_CHECKING:
    from moe_numpy.training import data, loop

NOISES = {"learned": LearnedNoise, "gaussian": GaussianNoise, "jitter": InputJitter}
NOISE_KNOB = {"learned": "floor", "gaussian": "std", "jitter": "eps"}
TERMS = {"switch": SwitchLoss, "importance": ImportanceLoss, "load": LoadLoss, "z": ZLoss}


class Option(NamedTuple):
    """One flag: its type or its choices, its default, and a line of help."""

    kind: Any
    default: Any
    help: str


OPTIONS = {
    "data": {
        "text": Option(str, None, "UTF-8 file to train on; the last tenth validates"),
    },
    "model": {
        "preset": Option(str, None, "a published system at laptop size; see `systems`"),
        "layers": Option(int, 2, "transformer layers"),
        "width": Option(int, 64, "width of the residual stream"),
        "heads": Option(int, 4, "attention heads"),
        "kv-heads": Option(int, None, "key/value heads, shared by groups of heads"),
        "context": Option(int, 64, "longest sequence, in characters"),
        "activation": Option(ACTIVATIONS, "gelu_tanh", "of the feed-forward"),
        "norm": Option(("layernorm", "rmsnorm"), "layernorm", "before each branch"),
        "positions": Option(("learned", "rotary"), "learned", "how positions are told"),
        "head": Option(("tied", "untied"), "tied", "output head: the embedding, or its own"),
        "dtype": Option(("float32", "float64"), "float32", "precision of all numbers"),
    },
    "experts": {
        "experts": Option(int, 8, "experts in every layer; 0: the dense twin"),
        "top-k": Option(int, 2, "experts per token"),
        "hidden": Option(int, None, "hidden width of one expert, or of the dense feed-forward"),
        "gate-weights": Option(("raw", "renormalized"), None, "of the chosen experts"),
        "noise": Option(("none", *NOISES), "none", "in the router, in training only"),
        "noise-scale": Option(float, None, "floor, standard deviation or half width of the noise"),
        "capacity": Option(float, None, "capacity factor; left out: no limit"),
        "overflow": Option(
            ("drop", "next_best", "none"), None, "what happens to choices beyond the capacity"
        ),
        "priority": Option(PRIORITIES, None, "who is served first"),
        "balance": Option(str, "switch=0.01", "terms as NAME=WEIGHT,..., or none"),
        "bias-rate": Option(float, 0.0, "step of the bias rule, which balances without a loss"),
    },
    "training": {
        "steps": Option(int, 1000, "training steps"),
        "batch": Option(int, 12, "sequences in a batch"),
        "shards": Option(int, 1, "parts of a batch, each routed by itself; threads share them out"),
        "rate": Option(float, 1e-3, "peak learning rate"),
        "final-rate": Option(
            float, 1e-4, "learning rate at the end of the cosine, if below --rate"
        ),
        "warmup": Option(int, 100, "steps of linear rise"),
        "optimizer": Option(("adamw", "sgd"), "adamw", "how gradients move the weights"),
        "beta1": Option(float, 0.9, "decay of AdamW's gradient average"),
        "beta2": Option(float, 0.99, "decay of AdamW's average of squares"),
        "momentum": Option(float, 0.9, "of sgd"),
        "weight-decay": Option(float, 0.1, "decoupled; none on gains and biases"),
        "skip-idle": Option(bool, False, "AdamW leaves alone experts that had no token in a step"),
        "clip": Option(float, 1.0, "largest gradient norm; 0: no clipping"),
        "smoothing": Option(float, 0.0, "label smoothing"),
        "recompute": Option(bool, False, "compute layers again on the way back, to save memory"),
        "seed": Option(int, 0, "of parameters, data order and noise"),
    },
}
DEFAULTS = {
    name.replace("-", "_"): option.default
    for group in OPTIONS.values()
    for name, option in group.items()
}
PRESET_STEPS = TrainingConfig().steps
NEEDS = {  # a flag that would have no effect is refused
    "overflow": "capacity",
    "priority": "capacity",
    "noise_scale": "noise",
}
EXPERTS_ONLY = {name.replace("-", "_") for name in (*OPTIONS["experts"], "skip-idle")}
EXPERTS_ONLY -= {"experts", "hidden"}
ONE_OPTIMIZER = {"beta1": "adamw", "beta2": "adamw", "skip_idle": "adamw", "momentum": "sgd"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every flag; one that is not given leaves no trace, so that `given` can tell."""
    shown = {"hidden": "4 widths in all", "gate-weights": "renormalized for top-k above 1"}
    steps = OPTIONS["training"]["steps"].default
    shown |= {"preset": "none", "steps": f"{steps}; {PRESET_STEPS} beside --preset"}
    shown |= {"kv-heads": "as heads", "text": "built-in corpus", "capacity": "no limit"}
    knobs = (f"{getattr(NOISES[kind](), knob):g}" for kind, knob in NOISE_KNOB.items())
    shown |= {
        "balance": "switch=0.01; none with --bias-rate",
        "overflow": "drop",
        "priority": "token",
        "noise-scale": ", ".join(knobs),
    }
    for title, group in OPTIONS.items():
        section = parser.add_argument_group(title)
        for name, option in group.items():
            default = shown.get(name, option.default)
            common = {"default": argparse.SUPPRESS, "help": f"{option.help} ({default})"}
            if option.kind is bool:
                common["help"] = option.help
                section.add_argument(f"--{name}", action="store_true", **common)
            elif isinstance(option.kind, tuple):
                section.add_argument(f"--{name}", choices=option.kind, **common)
            else:
                metavar = {int: "N", float: "X", str: "TEXT"}[option.kind]
                section.add_argument(f"--{name}", type=option.kind, metavar=metavar, **common)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Collect the flags that were really given."""
    return {name: value for name, value in vars(options).items() if name in DEFAULTS}


def start(flags: dict[str, Any]) -> loop.Run:
    """Set up a new run.

    Raises
    ------
    ValueError
        if a setting cannot work, or has no effect beside the others.
    """
    from moe_numpy.training import loop

    chosen = DEFAULTS | flags
    if chosen["preset"] is not None:
        return _start_preset(flags, chosen)
    if chosen["bias_rate"] and "balance" not in flags:
        chosen["balance"] = "none"  # the bias rule balances without a loss
    _refuse_idle(flags, chosen)
    corpus = _corpus(chosen["text"])
    cfg = _model(chosen, corpus.vocab_size)
    return _keep(chosen, loop.new_run(corpus, cfg, _training(chosen), chosen["dtype"]))


def resume(path: Path, flags: dict[str, Any]) -> loop.Run:
    """Go on with a stopped run; flags beside --resume may only repeat what the run has.

    Raises
    ------
    ValueError
        if there is no such run, or a flag asks for another configuration.
    """
    from moe_numpy.training import checkpoint, loop

    with checkpoint.whole("resume", path):
        stored = checkpoint.load_checkpoint(path)[1]["settings"]
        text = flags.get("text", stored.get("text"))
        if not isinstance(text, str | None):
            raise TypeError(f"text: {text!r}")
    for name, value in flags.items():
        if name != "text" and stored.get(name) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} must be that of the run ({stored.get(name)}), got "
                f"{value}. Leave it out, or start a new run with another --out."
            )
    run = loop.load_run(path, _corpus(text))
    return _keep(run.settings | {"text": text}, run)


def describe(run: loop.Run) -> str:
    """Say what is about to be trained."""
    from moe_numpy import ledger

    cfg, corpus = run.cfg, run.corpus
    counted = ledger.count(cfg)
    feed = "dense feed-forward"
    if cfg.moe is not None:
        feed = f"{cfg.moe.num_experts} experts, top-{cfg.moe.top_k}"
    text = (
        f"{corpus.name}: {len(corpus.train):,} characters to train on, "
        f"{len(corpus.validation):,} to validate, {corpus.vocab_size} symbols.\n"
        f"{cfg.layers} layers of width {cfg.width}, {feed}: {counted.parameters:,} parameters, "
        f"{counted.active:,} active per token."
    )
    if cfg.moe is not None and cfg.moe.top_k == 1 and cfg.moe.renormalized:
        text += "\nNote: renormalized top-1 gates are all 1, so the router gets no task gradient."
    return text


def _start_preset(flags: dict[str, Any], chosen: dict[str, Any]) -> loop.Run:
    """Set up a published system: the flags may say how it is trained, not what it is."""
    from moe_numpy import presets
    from moe_numpy.training import loop

    fixed = {name.replace("-", "_") for group in ("model", "experts") for name in OPTIONS[group]}
    for name in flags:
        if name in fixed - {"preset", "dtype"}:
            raise ValueError(
                f"--{name.replace('_', '-')} must not come with --preset, got {flags[name]}: the "
                "preset says what the model is. Leave out one of them."
            )
    _refuse_idle_optimizer(flags, chosen)
    corpus = _corpus(chosen["text"])
    cfg = presets.tiny(chosen["preset"], corpus.vocab_size)
    cfg = dataclasses.replace(cfg, recompute=chosen["recompute"])
    chosen = DEFAULTS | {"steps": PRESET_STEPS} | flags
    return _keep(chosen, loop.new_run(corpus, cfg, _training(chosen), chosen["dtype"]))


def _keep(chosen: dict[str, Any], run: loop.Run) -> loop.Run:
    if chosen["text"] is not None:
        chosen["text"] = str(Path(chosen["text"]).resolve())
    run.settings = chosen
    return run


def _corpus(text: str | None) -> data.Corpus:
    from moe_numpy.training import data

    return data.default_corpus() if text is None else data.text_corpus(text)


def _model(chosen: dict[str, Any], vocab_size: int) -> ModelConfig:
    moe = _moe(chosen) if chosen["experts"] else None
    hidden = 4 * chosen["width"] if chosen["hidden"] is None else chosen["hidden"]
    return ModelConfig(
        vocab_size=vocab_size,
        hidden=None if moe else hidden,
        moe=moe,
        tied=chosen["head"] == "tied",
        **{name: chosen[name] for name in ("layers", "width", "heads", "kv_heads", "context")},
        activation=None if moe else chosen["activation"],
        norm=chosen["norm"],
        positions=chosen["positions"],
        recompute=chosen["recompute"],
    )


def _moe(chosen: dict[str, Any]) -> MoEConfig:
    top_k, hidden = chosen["top_k"], chosen["hidden"]
    if hidden is None:  # as much active width as the dense twin has
        hidden = max(1, 4 * chosen["width"] // max(1, top_k))
    return MoEConfig(
        num_experts=chosen["experts"],
        top_k=top_k,
        hidden=hidden,
        activation=chosen["activation"],
        gate_weights=chosen["gate_weights"],
        noise=_noise(chosen["noise"], chosen["noise_scale"]),
        capacity=_capacity(chosen),
        balance=_balance(chosen["balance"]),
        bias_rate=chosen["bias_rate"],
    )


def _noise(kind: str, scale: float | None) -> Any:
    if kind == "none":
        return None
    return NOISES[kind]() if scale is None else NOISES[kind](**{NOISE_KNOB[kind]: scale})


def _capacity(chosen: dict[str, Any]) -> Capacity | None:
    if chosen["capacity"] is None or chosen["overflow"] == "none":
        return None
    knobs = {name: chosen[name] for name in ("overflow", "priority") if chosen[name]}
    return Capacity(factor=chosen["capacity"], **knobs)


def _balance(text: str) -> tuple:
    if text == "none":
        return ()
    terms = []
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            kind, knobs = TERMS[name], {"weight": float(weight)} if weight else {}
        except (KeyError, ValueError):
            known = ", ".join(TERMS)
            raise ValueError(
                f"--balance must name terms of {known} as NAME=WEIGHT, got {part!r}. "
                "For example --balance switch=0.01,z=0.001, or --balance none."
            ) from None
        terms.append(kind(**knobs))
    return tuple(terms)


def _training(chosen: dict[str, Any]) -> TrainingConfig:
    if chosen["optimizer"] == "adamw":
        knobs = {name: chosen[name] for name in ("beta1", "beta2", "weight_decay", "skip_idle")}
        optimizer = AdamW(**knobs)
    else:
        optimizer = SGD(momentum=chosen["momentum"], weight_decay=chosen["weight_decay"])
    names = ("steps", "batch", "shards", "rate", "final_rate", "warmup", "smoothing", "seed")
    return TrainingConfig(
        clip=chosen["clip"] or None,
        optimizer=optimizer,
        **{name: chosen[name] for name in names},
    )


def _refuse_idle(flags: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Refuse flags that would change nothing."""
    for name in flags:
        flag = f"--{name.replace('_', '-')}"
        if not chosen["experts"] and name in EXPERTS_ONLY:
            raise ValueError(
                f"{flag} must come with experts, got --experts 0 (the dense twin). Leave it out."
            )
        needed = NEEDS.get(name)
        if needed and chosen[needed] in (None, "none") and chosen[name] != "none":
            raise ValueError(
                f"{flag} must come with --{needed}, got it alone. Add --{needed} or leave it out."
            )
    if "priority" in flags and chosen["overflow"] == "none":
        raise ValueError(
            "--priority must come with a limit, got --overflow none, which turns nobody away. "
            "Leave one of them out."
        )
    _refuse_idle_optimizer(flags, chosen)


def _refuse_idle_optimizer(flags: dict[str, Any], chosen: dict[str, Any]) -> None:
    for name in flags:
        other = ONE_OPTIMIZER.get(name)
        if other and chosen["optimizer"] != other:
            raise ValueError(
                f"--{name.replace('_', '-')} must come with --optimizer {other}, got "
                f"{chosen['optimizer']}. Leave it out."
            )
