"""The judges of whole routing families: loops over tokens, groups, experts and slots.

As in `oracles`: the papers' formulas word by word, no code of the package, exact sums.
"""

import math

from oracles import (
    cv_squared,
    dot,
    log_sum_exp,
    normal_cdf,
    places_of,
    rank,
    seat,
    softmax,
    vec_mat,
)

from moe_numpy.config import (
    GaussianNoise,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    SwitchLoss,
    ZLoss,
)


# --------------------------------------------------------------------------------------- hierarchy
class Level:
    """What one router says about one token: clean and noisy logits, and the noise's scale."""

    def __init__(self, x, params, cfg, noise):
        seen = x
        if noise is not None and isinstance(cfg.noise, InputJitter):
            seen = [v * (1.0 + cfg.noise.eps * u) for v, u in zip(x, noise, strict=True)]
        self.clean = vec_mat(seen, params.w_CE.tolist())
        self.noisy, self.scale = self.clean, None
        if noise is None or isinstance(cfg.noise, InputJitter):
            return
        if isinstance(cfg.noise, GaussianNoise):
            self.scale = [cfg.noise.std] * len(self.clean)
        if isinstance(cfg.noise, LearnedNoise):
            raw = vec_mat(x, params.noise_CE.tolist())
            self.scale = [math.log(1.0 + math.exp(r)) + cfg.noise.floor for r in raw]
        self.noisy = [c + u * s for c, u, s in zip(self.clean, noise, self.scale, strict=True)]


class Tree:
    """A hierarchical router and what it does with a batch, one token after the other."""

    def __init__(self, x_NC, params, cfg, noise=None):
        self.cfg, self.groups = cfg, cfg.selection.groups
        self.size = cfg.num_experts // self.groups
        self.top, self.low = [], []
        for n, x in enumerate(x_NC.tolist()):
            first = last = None if noise is None else noise[n].tolist()
            if noise is not None and not isinstance(cfg.noise, InputJitter):
                first, last = first[cfg.num_experts :], last[: cfg.num_experts]
            self.top.append(Level(x, params.primary, cfg, first))
            self.low.append(Level(x, params.secondary, cfg, last))
        self.wished = [self.choose(n) for n in range(len(self.top))]
        self.using, self.accepted = self.seat()
        self.gates = [self.weigh(n) for n in range(len(self.top))]

    def members(self, g):
        return range(g * self.size, (g + 1) * self.size)

    def kept(self, n):
        return rank(self.top[n].noisy)[: self.cfg.selection.kept]

    def best_in(self, n, g):
        worth = [self.low[n].noisy[e] for e in self.members(g)]
        each = self.cfg.top_k // self.cfg.selection.kept
        return [self.members(g)[i] for i in rank(worth)[:each]]

    def choose(self, n):
        return [e for g in self.kept(n) for e in self.best_in(n, g)]

    def prob(self, n, noisy=True):
        """Every expert's probability, the product of two softmaxes."""
        top, low = self.top[n].clean, self.low[n].clean
        if noisy:
            top, low = self.top[n].noisy, self.low[n].noisy
        groups = softmax(top)
        return [
            groups[g] * p
            for g in range(self.groups)
            for p in softmax([low[e] for e in self.members(g)])
        ]

    def seat(self):
        tokens = range(len(self.top))
        if self.cfg.capacity is None:
            return self.wished, [[True] * self.cfg.top_k for _ in tokens]
        limit, prob = self.cfg.capacity, [self.prob(n) for n in tokens]
        places = places_of(limit, len(prob), self.cfg.top_k, self.cfg.num_experts)
        rankings = [rank(p) for p in prob]
        return seat(self.wished, rankings, prob, places, limit.overflow, limit.priority)

    def weigh(self, n):
        """Weigh the experts in use: their group among the groups in use, times them within it."""
        using, top, low = self.using[n], self.top[n].noisy, self.low[n].noisy
        in_use = sorted({e // self.size for e in using})
        gates = []
        for e in using:
            g = e // self.size
            group_gate = math.exp(top[g] - log_sum_exp([top[i] for i in in_use]))
            rivals = [low[i] for i in using if i // self.size == g]
            gates.append(group_gate * math.exp(low[e] - log_sum_exp(rivals)))
        return gates

    def load(self):
        """Load_H of every expert, eq. 14, from the smooth loads of both levels."""
        each = self.cfg.top_k // self.cfg.selection.kept
        amounts = []
        for g in range(self.groups):
            group_load = math.fsum(
                chance(level, range(self.groups), g, self.cfg.selection.kept) for level in self.top
            )
            here = [n for n in range(len(self.top)) if g in self.kept(n)]  # X_g
            for e in self.members(g):
                within = [chance(self.low[n], self.members(g), e, each) for n in here]
                amounts.append(group_load * math.fsum(within) / len(here) if here else 0.0)
        return amounts

    def counts(self, names):
        return [sum(row.count(e) for row in names) for e in range(self.cfg.num_experts)]

    def aux(self):
        return math.fsum(term.weight * self.value(term) for term in self.cfg.balance)

    def value(self, term):
        E, tokens = self.cfg.num_experts, range(len(self.top))
        if isinstance(term, SwitchLoss):
            return self.switch(term)
        if isinstance(term, ZLoss):
            total = 0.0
            for n in tokens:
                total += log_sum_exp(self.top[n].clean) ** 2
                for g in range(self.groups):
                    within = [self.low[n].clean[e] for e in self.members(g)]
                    total += log_sum_exp(within) ** 2 / self.groups
            return total / len(self.top)
        if isinstance(term, ImportanceLoss) and term.of == "probabilities":
            probs = [self.prob(n, noisy=False) for n in tokens]
            return cv_squared([math.fsum(p[e] for p in probs) for e in range(E)])
        if isinstance(term, ImportanceLoss):
            amounts = [0.0] * E
            for names, gates in zip(self.using, self.gates, strict=True):
                for e, gate in zip(names, gates, strict=True):
                    amounts[e] += gate
            return cv_squared(amounts)
        return cv_squared(self.counts(self.wished) if self.top[0].scale is None else self.load())

    def switch(self, term):
        total, tokens = 0.0, len(self.top)
        size = term.group or tokens
        for start in range(0, tokens, size):
            here = range(start, min(start + size, tokens))
            names = [
                self.wished[n]
                if term.counted in (None, self.cfg.top_k)
                else rank(self.prob(n))[: term.counted]
                for n in here
            ]
            for e in range(self.cfg.num_experts):
                f = sum(row.count(e) for row in names) / len(here)
                f /= len(names[0]) if term.divide else 1
                mean = math.fsum(self.prob(n)[e] for n in here) / len(here)
                total += self.cfg.num_experts * f * mean * len(here) / tokens
        return total


def chance(level, rivals, e, k):
    """Compute e's chance to be among the k best of its rivals if its noise were drawn anew."""
    others = sorted((level.noisy[i] for i in rivals if i != e), reverse=True)
    return normal_cdf((level.clean[e] - others[k - 1]) / level.scale[e])


# -------------------------------------------------------------------------------------- soft slots
def soft_slots(x_NC, slots_CR, scale):
    """Return the slots' inputs, and every token's weights of the slots."""
    tokens, slots = x_NC.tolist(), slots_CR.T.tolist()
    logits = [[scale * cosine(x, s) for s in slots] for x in tokens]
    inputs = []
    for r in range(len(slots)):
        weights = softmax([row[r] for row in logits])
        inputs.append([dot(weights, [x[c] for x in tokens]) for c in range(len(tokens[0]))])
    return inputs, [softmax(row) for row in logits]


def cosine(a, b):
    return dot(a, b) / math.sqrt((dot(a, a) + 1e-6) * (dot(b, b) + 1e-6))


# -------------------------------------------------------------------------------------------- 1991
def squared_gap(a, b):
    return math.fsum((u - v) ** 2 for u, v in zip(a, b, strict=True))


def cooperative(p, outputs, target):
    blend = [dot(p, [o[i] for o in outputs]) for i in range(len(target))]
    return squared_gap(blend, target)


def competitive(p, outputs, target):
    return dot(p, [squared_gap(o, target) for o in outputs])


def mixture(p, outputs, target):
    """-log sum p exp(-1/2 gap^2), as the paper writes it."""
    return -math.log(dot(p, [math.exp(-0.5 * squared_gap(o, target)) for o in outputs]))


def mixture_class(p, logits, target):
    return -math.log(dot(p, [softmax(z)[target] for z in logits]))


def posterior(p, outputs, target):
    joint = [w * math.exp(-0.5 * squared_gap(o, target)) for w, o in zip(p, outputs, strict=True)]
    return [j / math.fsum(joint) for j in joint]
