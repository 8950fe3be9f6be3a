"""The judges: slow, obvious loops over tokens, experts and channels, in plain Python.

They follow the papers' formulas word by word, share no code with the package, and read only its
configurations and the field names of its parameters. Every sum is exact (`math.fsum`).
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from moe_numpy.config import (
    GaussianNoise,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe.experts import ExpertParams
from moe_numpy.moe.layer import MoEParams
from moe_numpy.moe.router import RouterParams


# ------------------------------------------------------------------------------ small calculus
def dot(a, b):
    return math.fsum(u * v for u, v in zip(a, b, strict=True))


def vec_mat(x, w):
    """One vector times a matrix stored (in, out)."""
    return [dot(x, [row[o] for row in w]) for o in range(len(w[0]))]


def log_sum_exp(z):
    top = max(z)
    return top + math.log(math.fsum(math.exp(v - top) for v in z))


def softmax(z):
    lse = log_sum_exp(z)
    return [math.exp(v - lse) for v in z]


def normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def silu(a):
    return a / (1.0 + math.exp(-a))


def gelu_tanh(a):
    return 0.5 * a * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * a**3)))


PLAIN = {
    "relu": lambda a: max(a, 0.0),
    "gelu": lambda a: a * normal_cdf(a),
    "gelu_tanh": gelu_tanh,
    "silu": silu,
}
GATED = {"swiglu": silu, "geglu": gelu_tanh}


def mlp(x, w_in, w_up, w_out, kind):
    """One token through one feed-forward."""
    a = vec_mat(x, w_in)
    if kind in GATED:
        up = vec_mat(x, w_up)
        hidden = [GATED[kind](a[f]) * up[f] for f in range(len(a))]
    else:
        hidden = [PLAIN[kind](v) for v in a]
    return vec_mat(hidden, w_out)


def layer_norm(x, gain, bias, eps=1e-5):
    mean = math.fsum(x) / len(x)
    var = math.fsum((v - mean) ** 2 for v in x) / len(x)
    return [
        g * (v - mean) / math.sqrt(var + eps) + b for v, g, b in zip(x, gain, bias, strict=True)
    ]


def rms_norm(x, gain, eps=1e-5):
    size = math.sqrt(math.fsum(v * v for v in x) / len(x) + eps)
    return [g * v / size for v, g in zip(x, gain, strict=True)]


def cross_entropy(logits, targets, smoothing=0.0):
    total = 0.0
    for z, target in zip(logits, targets, strict=True):
        for v in range(len(z)):
            wish = smoothing / len(z) + ((1.0 - smoothing) if v == target else 0.0)
            total -= wish * (z[v] - log_sum_exp(z))
    return total / len(logits)


# -------------------------------------------------------------------------------- the MoE layer
class Token(NamedTuple):
    """What the router says about one token."""

    clean: list
    noisy: list
    scale: list | None
    prob: list
    ranking: list


class Layer(NamedTuple):
    """What the layer did."""

    y: list
    aux: float
    tokens: list
    wished: list
    using: list
    accepted: list
    gates: list

    def count(self, experts, only_accepted):
        """Count the choices of every expert."""
        chosen = self.using if only_accepted else self.wished
        counts = [0] * experts
        for names, fine in zip(chosen, self.accepted, strict=True):
            for e, got_place in zip(names, fine, strict=True):
                counts[e] += 1 if got_place or not only_accepted else 0
        return counts

    def dropped(self):
        return sum(not got_place for fine in self.accepted for got_place in fine)

    def rerouted(self):
        pairs = zip(self.wished, self.using, strict=True)
        return sum(a != b for wish, use in pairs for a, b in zip(wish, use, strict=True))


def score_token(x, router, cfg, noise):
    """Let the router look at one token: logits, probabilities, and its ranking of the experts."""
    seen, scale = x, None
    if noise is not None and isinstance(cfg.noise, InputJitter):
        seen = [v * (1.0 + cfg.noise.eps * u) for v, u in zip(x, noise, strict=True)]
    clean = vec_mat(seen, router.w_CE.tolist())
    if noise is not None and isinstance(cfg.noise, GaussianNoise):
        scale = [cfg.noise.std] * len(clean)
    if noise is not None and isinstance(cfg.noise, LearnedNoise):
        raw = vec_mat(x, router.noise_CE.tolist())
        scale = [math.log(1.0 + math.exp(r)) + cfg.noise.floor for r in raw]
    noisy = clean
    if scale is not None:
        noisy = [c + u * s for c, u, s in zip(clean, noise, scale, strict=True)]
    bias = [0.0] * len(noisy) if router.bias_E is None else router.bias_E.tolist()
    score = [z + b for z, b in zip(noisy, bias, strict=True)]
    return Token(clean, noisy, scale, softmax(noisy), rank(score))


def rank(score):
    """List the experts, the best first; of two equal ones the lower index first."""
    return sorted(range(len(score)), key=lambda e: (-score[e], e))


def places_of(capacity, tokens, top_k, experts):
    """Count the places of one expert, in exact arithmetic with the factor as it was written."""
    wanted = Fraction(repr(capacity.factor)) * top_k * tokens / experts
    rounding = {"ceil": math.ceil, "floor": math.floor, "round": round}[capacity.rounding]
    return max(rounding(wanted), capacity.minimum)


def seat(wished, rankings, prob, places, overflow, priority):
    """Let all choices wait in one queue: return the experts in use, and who got a place."""
    everyone = [(n, k) for n in range(len(wished)) for k in range(len(wished[n]))]
    if priority == "choice":
        everyone.sort(key=lambda nk: (nk[1], nk[0]))
    if priority == "score":
        everyone.sort(key=lambda nk: (-prob[nk[0]][wished[nk[0]][nk[1]]], nk))
    using = [list(names) for names in wished]
    accepted = [[False] * len(names) for names in wished]
    taken = {}
    for n, k in everyone:
        candidates = [using[n][k]]
        if overflow == "next_best":
            others = [using[n][j] for j in range(len(using[n])) if j != k]
            candidates += [e for e in rankings[n] if e not in others]
        for e in candidates:
            if taken.get(e, 0) < places:
                taken[e] = taken.get(e, 0) + 1
                using[n][k], accepted[n][k] = e, True
                break
    return using, accepted


def gate_weights(token, names, cfg):
    kind = cfg.gate_weights
    if kind is None:
        kind = "raw" if cfg.top_k == 1 else "renormalized"
    if kind == "raw":
        return [token.prob[e] for e in names]
    return softmax([token.noisy[e] for e in names])


def moe_layer(x_NC, params, cfg, noise=None):
    """Take the tokens one by one through the router, the queue and their experts."""
    rows = x_NC.tolist()
    looks = [None] * len(rows) if noise is None else noise.tolist()
    tokens = [score_token(x, params.router, cfg, u) for x, u in zip(rows, looks, strict=True)]
    wished = [token.ranking[: cfg.top_k] for token in tokens]
    using, accepted = wished, [[True] * cfg.top_k for _ in tokens]
    if cfg.capacity is not None:
        places = places_of(cfg.capacity, len(rows), cfg.top_k, cfg.num_experts)
        rankings, prob = [t.ranking for t in tokens], [t.prob for t in tokens]
        policy = cfg.capacity.overflow, cfg.capacity.priority
        using, accepted = seat(wished, rankings, prob, places, *policy)
    gates = [gate_weights(token, names, cfg) for token, names in zip(tokens, using, strict=True)]
    w_in, w_up, w_out = (None if w is None else w.tolist() for w in params.experts)
    y = []
    for n, x in enumerate(rows):
        total = [0.0] * len(x)
        for e, gate, got_place in zip(using[n], gates[n], accepted[n], strict=True):
            if got_place:
                out = mlp(x, w_in[e], w_up and w_up[e], w_out[e], cfg.activation)
                total = [t + gate * o for t, o in zip(total, out, strict=True)]
        y.append(total)
    return Layer(
        y, balance(tokens, wished, using, gates, cfg), tokens, wished, using, accepted, gates
    )


# ------------------------------------------------------------------------------------- balance
def cv_squared(amounts):
    mean = math.fsum(amounts) / len(amounts)
    var = math.fsum((a - mean) ** 2 for a in amounts) / len(amounts)
    return var / (mean * mean + 1e-10)


def switch_loss(prob, wished, experts):
    tokens, total = len(wished), 0.0
    for e in range(experts):
        choices = sum(names.count(e) for names in wished)
        f = choices / (tokens * len(wished[0]))
        total += f * math.fsum(p[e] for p in prob) / tokens
    return experts * total


def importance(gates, using, experts):
    amounts = [0.0] * experts
    for names, weights in zip(using, gates, strict=True):
        for e, gate in zip(names, weights, strict=True):
            amounts[e] += gate
    return amounts


def smooth_load(clean, noisy, scale, k):
    """Sum, over the tokens, each expert's chance to be among the k best with fresh noise."""
    amounts = [0.0] * len(clean[0])
    for c, z, s in zip(clean, noisy, scale, strict=True):
        for e in range(len(c)):
            others = sorted((z[j] for j in range(len(z)) if j != e), reverse=True)
            amounts[e] += normal_cdf((c[e] - others[k - 1]) / s[e])
    return amounts


def z_loss(logits):
    return math.fsum(log_sum_exp(z) ** 2 for z in logits) / len(logits)


def balance(tokens, wished, using, gates, cfg):
    if not tokens:
        return 0.0
    E, total = cfg.num_experts, 0.0
    for term in cfg.balance:
        if isinstance(term, SwitchLoss):
            value = switch_loss([t.prob for t in tokens], wished, E)
        elif isinstance(term, ImportanceLoss):
            value = cv_squared(importance(gates, using, E))
        elif isinstance(term, ZLoss):
            value = z_loss([t.clean for t in tokens])
        elif isinstance(term, LoadLoss) and tokens[0].scale is not None:
            columns = (
                [t.clean for t in tokens],
                [t.noisy for t in tokens],
                [t.scale for t in tokens],
            )
            value = cv_squared(smooth_load(*columns, cfg.top_k))
        else:
            value = cv_squared([sum(names.count(e) for names in wished) for e in range(E)])
        total += term.weight * value
    return total


# -------------------------------------------------------------------------------- transformer
def turn(vector, position, theta=10_000.0):
    """Rotary positions: channels (d, d + D/2) are one complex number, turned by its angle."""
    half = len(vector) // 2
    turned = [0.0] * len(vector)
    for d in range(half):
        angle = position * theta ** (-2.0 * d / len(vector))
        z = complex(vector[d], vector[d + half]) * complex(math.cos(angle), math.sin(angle))
        turned[d], turned[d + half] = z.real, z.imag
    return turned


def attend(x_TC, t, params, rotary):
    """Attention's answer at one position, and each head's weights on the positions up to it."""
    rows = x_TC.tolist()
    q_w, k_w, v_w = params.q_CHD, params.k_CGD, params.v_CGD
    H, G, D = q_w.shape[1], k_w.shape[1], q_w.shape[2]
    answer, weights = [0.0] * len(rows[0]), []
    for h in range(H):
        g = h * G // H
        q = vec_mat(rows[t], q_w[:, h].tolist())
        keys = [vec_mat(rows[s], k_w[:, g].tolist()) for s in range(t + 1)]
        values = [vec_mat(rows[s], v_w[:, g].tolist()) for s in range(t + 1)]
        if rotary:
            q, keys = turn(q, t), [turn(key, s) for s, key in enumerate(keys)]
        a = softmax([dot(q, key) / math.sqrt(D) for key in keys])
        head = [math.fsum(a[s] * values[s][d] for s in range(t + 1)) for d in range(D)]
        answer = [
            u + v for u, v in zip(answer, vec_mat(head, params.out_HDC[h].tolist()), strict=True)
        ]
        weights.append(a)
    return answer, weights


def normalize(x, params):
    if params.bias_C is None:
        return rms_norm(x, params.gain_C.tolist())
    return layer_norm(x, params.gain_C.tolist(), params.bias_C.tolist())


def model_logits(tokens, params, cfg):
    """Predict at every position of one sequence, without noise."""
    stream = [params.token_VC[token].tolist() for token in tokens]
    if params.position_TC is not None:
        table = params.position_TC.tolist()
        stream = [[u + v for u, v in zip(x, table[t], strict=True)] for t, x in enumerate(stream)]
    for block in params.blocks:
        seen = np.array([normalize(x, block.norm_1) for x in stream])
        found = [
            attend(seen, t, block.attention, cfg.positions == "rotary")[0]
            for t in range(len(stream))
        ]
        stream = (np.array(stream) + np.array(found)).tolist()
        seen = np.array([normalize(x, block.norm_2) for x in stream])
        if isinstance(block.feed, MoEParams):
            found = moe_layer(seen, block.feed, cfg.moe).y
        else:
            w = [None if m is None else m.tolist() for m in block.feed]
            found = [mlp(x, *w, cfg.dense_activation) for x in seen.tolist()]
        stream = (np.array(stream) + np.array(found)).tolist()
    head = params.token_VC.T if params.head_CV is None else params.head_CV
    return [vec_mat(normalize(x, params.norm), head.tolist()) for x in stream]


# -------------------------------------------------------------------------------------- inputs
def draw_layer(rng, cfg, width, dtype="float64", spread=1.0):
    """Draw a layer with generic parameters: well spread logits, a bias that is not zero."""
    E, F = cfg.num_experts, cfg.hidden

    def draw(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    gated = cfg.activation in GATED
    return MoEParams(
        RouterParams(
            draw(width, E, scale=spread),
            draw(width, E, scale=0.5) if isinstance(cfg.noise, LearnedNoise) else None,
            draw(E, scale=0.7) if cfg.bias_rate else None,
        ),
        ExpertParams(draw(E, width, F), draw(E, width, F) if gated else None, draw(E, F, width)),
    )
