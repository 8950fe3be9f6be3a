"""The configuration of one Mixture-of-Experts layer, composed from parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moe_numpy.config import rules
from moe_numpy.config.parts import (
    SELECTIONS,
    TERMS,
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
    SecondExpert,
    Shared,
    Sinkhorn,
    SoftSlots,
    SwitchLoss,
    ZLoss,
)

GATED = ("swiglu", "geglu", "clamped_swiglu", "swiglu3")
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", *GATED)
SCORES = ("softmax", "sigmoid", "sqrt_softplus")
WEIGHTS = ("raw", "renormalized", "renormalized_kept")
WHO = "MoEConfig"


def branches(activation: str) -> int:
    """Count the projections of x that an activation combines."""
    return 3 if activation == "swiglu3" else 2 if activation in GATED else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """One Mixture-of-Experts layer.

    score         what a logit becomes: "softmax" over the experts, "sigmoid" or "sqrt_softplus"
                  of each by itself.
    selection     who chooses whom; None: each token its top_k best-scored experts.
    gate_weights  "raw": the chosen experts' own scores;
                  "renormalized": divided by their sum over the chosen experts;
                  "renormalized_kept": divided by their sum over those of them that have a place.
                  None picks "renormalized" for top_k >= 2 and "raw" for top_k = 1, whose
                  renormalized gate is the constant 1 and teaches the router nothing, and under
                  ExpertChoice.
    gate_scale    factor on all gates.
    gate_on       the expert's "output", or its "input" (Llama 4).
    bias_rate     step of the bias rule that balances without a loss (0: no bias).
    bias_with_loss  asks for a SwitchLoss over the whole batch beside the bias rule.
    shared        an expert that every token takes.
    router_bias, expert_bias  whether their linear maps have learned biases.
    router_std    deviation of the router's first weights.
    init_scale    experts start truncated normal with deviation sqrt(init_scale / fan_in) (Switch:
                  0.1); None: as the dense feed-forward of the model starts.
    same_start    whether all experts of a layer start equal (V-MoE).
    """

    num_experts: int
    top_k: int
    hidden: int
    activation: str = "gelu_tanh"
    score: str = "softmax"
    selection: (
        SecondExpert
        | GroupLimited
        | Hierarchy
        | Sinkhorn
        | Assignment
        | ExpertChoice
        | SoftSlots
        | None
    ) = None
    gate_weights: str | None = None
    gate_scale: float = 1.0
    gate_on: str = "output"
    noise: LearnedNoise | GaussianNoise | InputJitter | None = None
    capacity: Capacity | None = None
    balance: tuple[SwitchLoss | ImportanceLoss | LoadLoss | ZLoss, ...] = ()
    bias_rate: float = 0.0
    bias_with_loss: bool = False
    shared: Shared | None = None
    router_bias: bool = False
    expert_bias: bool = False
    router_std: float = 0.02
    init_scale: float | None = None
    same_start: bool = False

    def __post_init__(self) -> None:
        rules.plain_numbers(self)
        for name in ("num_experts", "top_k", "hidden"):
            rules.whole_number(WHO, name, getattr(self, name), 1)
        rules.require(
            self.top_k <= self.num_experts,
            WHO,
            f"top_k must satisfy 1 <= top_k <= num_experts ({self.num_experts})",
            self.top_k,
            "Lower top_k or add experts.",
        )
        rules.one_of(WHO, "activation", self.activation, ACTIVATIONS)
        rules.one_of(WHO, "score", self.score, SCORES)
        rules.one_of(WHO, "gate_weights", self.gate_weights, (None, *WEIGHTS))
        rules.one_of(WHO, "gate_on", self.gate_on, ("output", "input"))
        rules.normal(WHO, "gate_scale", self.gate_scale, "Use 1.0.")
        rules.not_negative(WHO, "bias_rate", self.bias_rate)
        rules.not_negative(WHO, "router_std", self.router_std)
        if self.init_scale is not None:
            rules.normal(WHO, "init_scale", self.init_scale, "Or None.")
        rules.instance(WHO, "selection", self.selection, (*SELECTIONS, type(None)))
        kinds = (LearnedNoise, GaussianNoise, InputJitter, type(None))
        rules.instance(WHO, "noise", self.noise, kinds)
        rules.instance(WHO, "capacity", self.capacity, (Capacity, type(None)))
        rules.instance(WHO, "shared", self.shared, (Shared, type(None)))
        for name in ("bias_with_loss", "router_bias", "expert_bias", "same_start"):
            rules.instance(WHO, name, getattr(self, name), (bool,))
        self._check_balance()
        self._check_selection()
        self._check_gates()
        rule = "router_std = 0 needs LearnedNoise or GaussianNoise"
        advice = "All logits tie without it, and every token goes to the first experts."
        drawn = isinstance(self.noise, LearnedNoise | GaussianNoise)
        fine = self.router_std > 0 or drawn
        rules.require(fine, WHO, rule, self.noise, advice)

    def _check_balance(self) -> None:
        rules.instance(WHO, "balance", self.balance, (tuple,))
        for term in self.balance:
            rules.instance(WHO, "balance", term, TERMS)
        kinds = {type(term): term for term in self.balance}
        rule = "each kind of balance term may come once"
        fine = len(kinds) == len(self.balance)
        rules.require(fine, WHO, rule, self.balance, "Add up their weights.")
        if LoadLoss in kinds:
            self._check_load_loss()
        if ImportanceLoss in kinds and self.top_k == 1 and kinds[ImportanceLoss].of == "gates":
            rule = "ImportanceLoss with top_k = 1 needs raw gates: renormalized ones are all 1"
            came = self.selection or self.gate_weights
            advice = 'Use "raw", or of="probabilities".'
            rules.require(not self.renormalized, WHO, rule, came, advice)
        switch = kinds.get(SwitchLoss)
        if switch is not None and switch.counted is not None:
            rule = f"SwitchLoss counts at most num_experts ({self.num_experts})"
            fine = switch.counted <= self.num_experts
            rules.require(fine, WHO, rule, switch.counted, "Count fewer.")
        fighting = bool(self.bias_rate) and switch is not None and switch.group is None
        rule = "a SwitchLoss over the whole batch fights the bias rule"
        advice = (
            "Balance by one of them, give the loss a group (a sequence), or ask for both by "
            "bias_with_loss=True."
        )
        rules.require(not fighting or self.bias_with_loss, WHO, rule, switch, advice)
        rule = "bias_with_loss needs a bias rule and a SwitchLoss without a group"
        fine = fighting or not self.bias_with_loss
        rules.require(fine, WHO, rule, self.bias_with_loss, "Leave it out.")

    def _check_load_loss(self) -> None:
        fine = isinstance(self.noise, LearnedNoise | GaussianNoise)
        rule = "LoadLoss needs normal noise on the logits, or its gradient is zero"
        rules.require(fine, WHO, rule, self.noise, "Add LearnedNoise() or GaussianNoise().")
        rule = "LoadLoss needs top_k < num_experts: otherwise every expert gets every token"
        rules.require(self.top_k < self.num_experts, WHO, rule, self.top_k, "Lower top_k.")
        rule = "LoadLoss needs bias_rate = 0: its estimate does not know the selection bias"
        rules.require(not self.bias_rate, WHO, rule, self.bias_rate, "Balance by one of them.")
        rule = "LoadLoss needs plain top-k or a Hierarchy: its estimate knows no other selection"
        fine = self.selection is None or isinstance(self.selection, Hierarchy)
        rules.require(fine, WHO, rule, self.selection, "Use SwitchLoss().")

    def _check_selection(self) -> None:
        selection, E, k = self.selection, self.num_experts, self.top_k
        if isinstance(selection, SecondExpert):
            rules.require(k == 2, WHO, "SecondExpert needs top_k = 2", k, "Set top_k=2.")
            rule, fine = "SecondExpert needs renormalized gates", self.renormalized
            rules.require(fine, WHO, rule, self.gate_weights, "Leave gate_weights out.")
        if isinstance(selection, GroupLimited | Hierarchy):
            rule = f"{type(selection).__name__} needs groups that divide num_experts ({E})"
            fine = E % selection.groups == 0
            rules.require(fine, WHO, rule, selection.groups, "Change either.")
        if isinstance(selection, GroupLimited):
            size = E // selection.groups
            rule = f"{selection.kept} kept groups of {size} experts must hold top_k experts"
            rules.require(selection.kept * size >= k, WHO, rule, k, "Keep more groups.")
            counted = [term.counted or k for term in self.balance if isinstance(term, SwitchLoss)]
            rule = f"SwitchLoss counts at most the {selection.kept * size} experts of kept groups"
            fine = selection.kept * size >= max(counted, default=k)
            rules.require(fine, WHO, rule, counted, "Count fewer.")
            rule = 'the group score "top2" needs groups of at least 2 experts'
            fine = selection.score == "max" or size > 1
            rules.require(fine, WHO, rule, size, 'Use "max".')
        if isinstance(selection, Hierarchy):
            self._check_hierarchy(selection)
        if isinstance(selection, Assignment):
            rules.require(k == 1, WHO, "Assignment needs top_k = 1", k, "Set top_k=1.")
            self._refuse("it fills every expert equally by itself", "capacity")
        if isinstance(selection, Assignment | Sinkhorn | ExpertChoice):
            reason = "it balances by itself, and a loss on the load would fight it"
            self._refuse(reason, "bias_rate", balance=(SwitchLoss, ImportanceLoss, LoadLoss))
        if isinstance(selection, ExpertChoice):
            self._refuse("it says by itself how many tokens an expert takes", "capacity")
            rule = "ExpertChoice needs gates that know who was chosen"
            fine, advice = self.gate_weights != "renormalized", 'Use "renormalized_kept".'
            rules.require(fine, WHO, rule, self.gate_weights, advice)
        if isinstance(selection, SoftSlots):
            reason = "it mixes all tokens into every slot and chooses nothing"
            names = ("capacity", "noise", "bias_rate", "gate_weights", "router_bias")
            self._refuse(reason, *names, balance=TERMS)
            rule = "SoftSlots needs top_k = num_experts: every token reaches every expert"
            rules.require(k == E, WHO, rule, k, f"Set top_k={E}.")
            rule = "SoftSlots needs score, gate_scale, gate_on and router_std as they are"
            knobs = (self.score, self.gate_scale, self.gate_on, self.router_std)
            fine = knobs == ("softmax", 1.0, "output", 0.02)
            rules.require(fine, WHO, rule, knobs, "Leave them out.")

    def _check_hierarchy(self, selection: Hierarchy) -> None:
        each, size = self.top_k // selection.kept, self.num_experts // selection.groups
        rule = f"Hierarchy needs top_k to be a multiple of its kept groups ({selection.kept})"
        fine = self.top_k % selection.kept == 0
        rules.require(fine, WHO, rule, self.top_k, "Change either.")
        rule = f"a group of {size} experts must hold top_k / kept experts"
        rules.require(each <= size, WHO, rule, each, "Keep more groups.")
        reason = "its gates are products of two levels"
        self._refuse(reason, "bias_rate", "gate_weights", "router_bias")
        rule, advice = "Hierarchy needs score softmax", "Leave score out."
        rules.require(self.score == "softmax", WHO, rule, self.score, advice)
        if any(isinstance(term, LoadLoss) for term in self.balance):
            rule = "LoadLoss needs a choice on both levels: kept < groups and top_k / kept < size"
            fine = selection.kept < selection.groups and each < size
            rules.require(fine, WHO, rule, (selection.kept, each), "Lower top_k or kept.")

    def _check_gates(self) -> None:
        if self.gate_weights == "renormalized_kept":
            rule = 'gate_weights "renormalized_kept" needs something that turns choices away'
            turns_away = isinstance(self.selection, ExpertChoice | SecondExpert)
            fine = self.capacity is not None or turns_away
            rules.require(fine, WHO, rule, self.gate_weights, 'Use "renormalized".')

    def _refuse(self, reason: str, *names: str, balance: tuple[type, ...] = ()) -> None:
        who = type(self.selection).__name__
        for name in names:
            came = getattr(self, name)
            fine = came is None or came is False or came == 0
            rules.require(fine, WHO, f"{who} takes no {name}: {reason}", came, "Leave it out.")
        for term in self.balance:
            rule = f"{who} takes no {type(term).__name__}: {reason}"
            rules.require(not isinstance(term, balance), WHO, rule, term, "Leave it out.")

    @property
    def renormalized(self) -> bool:
        """Whether the gates of a token sum to one (or to gate_scale)."""
        if self.gate_weights is not None:
            return self.gate_weights != "raw"
        if isinstance(self.selection, Hierarchy):
            return True
        return self.top_k > 1 and not isinstance(self.selection, ExpertChoice)

    @property
    def gated(self) -> bool:
        """Whether an expert's hidden units are gated by a second projection."""
        return self.activation in GATED

    def evaluation(self) -> MoEConfig:
        """Return the layer as it is evaluated: the same experts and router without limits."""
        changes: dict = {"capacity": None}
        if isinstance(self.selection, Assignment | Sinkhorn):
            changes["selection"] = None
        turns_away = isinstance(self.selection, ExpertChoice | SecondExpert)
        if self.gate_weights == "renormalized_kept" and not turns_away:
            changes["gate_weights"] = "renormalized"
        same = all(getattr(self, name) == value for name, value in changes.items())
        return self if same else dataclasses.replace(self, **changes)
