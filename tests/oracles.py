"""The judges: slow, obvious loops over tokens, experts and channels, in plain Python.

They follow the papers' formulas word by word, share no code with the package, and read only its
configurations and the field names of its parameters. Every sum is exact (`math.fsum`).
"""

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from moe_numpy.config import (
    Assignment,
    ExpertChoice,
    GaussianNoise,
    GroupLimited,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    SecondExpert,
    Sinkhorn,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe.experts import ExpertParams
from moe_numpy.moe.layer import MoEParams
from moe_numpy.moe.mlp import MLPParams
from moe_numpy.moe.router import RouterParams
from moe_numpy.moe.shared import SharedParams


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


def clamped_swiglu(gate, up):
    gate, up = min(gate, 7.0), max(-7.0, min(up, 7.0))
    return (up + 1.0) * gate / (1.0 + math.exp(-1.702 * gate))


PLAIN = {
    "identity": lambda a: a,
    "relu": lambda a: max(a, 0.0),
    "gelu": lambda a: a * normal_cdf(a),
    "gelu_tanh": gelu_tanh,
    "silu": silu,
}
GATED = {
    "swiglu": lambda gate, up: silu(gate) * up,
    "geglu": lambda gate, up: gelu_tanh(gate) * up,
    "clamped_swiglu": clamped_swiglu,
    "swiglu3": lambda gate, up, third: silu(gate) * up * third,
}


def affine(x, w, b):
    y = vec_mat(x, w)
    return y if b is None else [v + c for v, c in zip(y, b, strict=True)]


def mlp(x, weights, kind):
    """One token through one feed-forward; the weights in the order of `ExpertParams`."""
    w_in, w_up, w_out, w_third, b_in, b_up, b_out = [*weights, None, None, None, None][:7]
    pairs = ((w_in, b_in), (w_up, b_up), (w_third, None))
    branches = [affine(x, w, b) for w, b in pairs if w is not None]
    hidden = [(PLAIN | GATED)[kind](*units) for units in zip(*branches, strict=True)]
    return affine(hidden, w_out, b_out)


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
    """What the router says about one token; `prob` are its scores' shares of their sum."""

    clean: list
    noisy: list
    scale: list | None
    score: list
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


def sigmoid(z):
    return 1.0 / (1.0 + math.exp(-z))


def scores_of(logits, kind):
    """Turn logits into scores: a softmax over them, or a function of each by itself."""
    if kind == "softmax":
        return softmax(logits)
    each = {"sigmoid": sigmoid, "sqrt_softplus": lambda z: math.sqrt(math.log1p(math.exp(z)))}
    return [each[kind](z) for z in logits]


def shares(amounts):
    return [amount / math.fsum(amounts) for amount in amounts]


def score_token(x, router, cfg, noise):
    """Let the router look at one token: logits, scores, and its ranking of the experts."""
    seen, scale = x, None
    if noise is not None and isinstance(cfg.noise, InputJitter):
        seen = [v * (1.0 + cfg.noise.eps * u) for v, u in zip(x, noise, strict=True)]
    clean = vec_mat(seen, router.w_CE.tolist())
    if router.offset_E is not None:
        clean = [c + b for c, b in zip(clean, router.offset_E.tolist(), strict=True)]
    if noise is not None and isinstance(cfg.noise, GaussianNoise):
        scale = [cfg.noise.std] * len(clean)
    if noise is not None and isinstance(cfg.noise, LearnedNoise):
        raw = vec_mat(x, router.noise_CE.tolist())
        scale = [math.log(1.0 + math.exp(r)) + cfg.noise.floor for r in raw]
    noisy = clean
    if scale is not None:
        noisy = [c + u * s for c, u, s in zip(clean, noise, scale, strict=True)]
    score = scores_of(noisy, cfg.score)
    in_logits = cfg.score == "softmax" and not isinstance(cfg.selection, GroupLimited)
    worth = noisy if in_logits else score
    if router.bias_E is not None:
        worth = [w + b for w, b in zip(worth, router.bias_E.tolist(), strict=True)]
    ranking = rank(worth)
    if isinstance(cfg.selection, GroupLimited):
        allowed = experts_of_kept_groups(worth, cfg.selection)
        ranking = [e for e in ranking if e in allowed]
    return Token(clean, noisy, scale, score, shares(score), ranking)


def experts_of_kept_groups(worth, selection):
    """Value a group by its best one or two experts; list the experts of the best groups."""
    size, counted = len(worth) // selection.groups, 1 if selection.score == "max" else 2
    members = [range(g * size, (g + 1) * size) for g in range(selection.groups)]
    best = [sorted((worth[e] for e in group), reverse=True)[:counted] for group in members]
    value = [math.fsum(worths) for worths in best]
    return [e for g in rank(value)[: selection.kept] for e in members[g]]


def rank(score):
    """List the experts, the best first; of two equal ones the lower index first."""
    return sorted(range(len(score)), key=lambda e: (-score[e], e))


def places_of(capacity, tokens, top_k, experts):
    """Count the places of one expert, in exact arithmetic with the factor as it was written."""
    choices = tokens * (top_k if capacity.times_k else 1)
    wanted = Fraction(repr(capacity.factor)) * choices / experts
    rounding = {"ceil": math.ceil, "floor": math.floor, "round": round}[capacity.rounding]
    places = max(rounding(wanted), capacity.minimum)
    while places % capacity.multiple:
        places += 1
    return places


def seat(wished, rankings, prob, places, overflow, priority, rejected=()):
    """Let all choices wait in one queue: return the experts in use, and who got a place.

    The `rejected` choices (n, k) do not queue.
    """
    everyone = [(n, k) for n in range(len(wished)) for k in range(len(wished[n]))]
    everyone = [nk for nk in everyone if nk not in rejected]
    if priority == "choice":
        everyone.sort(key=lambda nk: (nk[1], nk[0]))
    if priority == "bpr":
        surest = [max(prob[n][e] for e in wished[n]) for n in range(len(wished))]
        everyone.sort(key=lambda nk: (nk[1], -surest[nk[0]], nk[0]))
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


def seat_in_groups(wished, tokens, rejected, cfg):
    """Seat every group of consecutive tokens by itself, with places counted from its own size."""
    limit, using, accepted = cfg.capacity, [], []
    if limit is None:
        fine = [[(n, k) not in rejected for k in range(len(wished[n]))] for n in range(len(wished))]
        return wished, fine
    for start, stop in groups_of(len(wished), limit.group):
        places = places_of(limit, stop - start, cfg.top_k, cfg.num_experts)
        rankings = [token.ranking for token in tokens[start:stop]]
        prob = [token.prob for token in tokens[start:stop]]
        here = [(n - start, k) for n, k in rejected]
        policy = limit.overflow, limit.priority, here
        names, fine = seat(wished[start:stop], rankings, prob, places, *policy)
        using, accepted = using + names, accepted + fine
    return using, accepted


def groups_of(tokens, size):
    """Cut the tokens into groups of consecutive ones; the last may be smaller."""
    size = size or max(tokens, 1)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def rejected_seconds(tokens, wished, coins, policy):
    """List the second choices that their weight, or the coin, speaks against."""
    rejected = []
    for n, (first, second) in enumerate(wished):
        w2 = tokens[n].score[second] / (tokens[n].score[first] + tokens[n].score[second])
        kept = w2 > policy.threshold
        if policy.policy == "random":
            kept = coins is None or coins[n] < w2 / policy.threshold
        if not kept:
            rejected.append((n, 1))
    return rejected


def sinkhorn_rankings(tokens, selection):
    """Scale rows and columns of exp(logit) in turn until the columns' factors stay."""
    N, E = len(tokens), len(tokens[0].noisy)
    kernel = [[math.exp(z) for z in token.noisy] for token in tokens]
    columns = [1.0] * E
    for _ in range(selection.most):
        rows = [1.0 / (N * dot(kernel[n], columns)) for n in range(N)]
        old = columns
        columns = [1.0 / (E * dot([kernel[n][e] for n in range(N)], rows)) for e in range(E)]
        change = [abs(a - b) for a, b in zip(old, columns, strict=True)]
        if math.fsum(change) / E < selection.tolerance:
            break
    return [rank([k * c for k, c in zip(row, columns, strict=True)]) for row in kernel]


def best_assignment(value, experts):
    """Try all ways to give every expert equally many tokens: list each token's expert.

    If the tokens do not divide, some experts get one more.
    """
    least, extra = divmod(len(value), experts)

    @functools.cache
    def best(n, room, spare):
        if n == len(value):
            return 0.0, ()
        found = []
        for e in range(experts):
            if room[e] > 0 or (room[e] == 0 and spare):
                left = (*room[:e], room[e] - 1, *room[e + 1 :])
                rest, names = best(n + 1, left, spare - (room[e] == 0))
                found.append((value[n][e] + rest, (e, *names)))
        return max(found)

    return list(best(0, (least,) * experts, extra)[1])


def expert_choice(prob, top_k, experts):
    """Let every expert take its best tokens: list each token's experts."""
    places = math.ceil(Fraction(top_k * len(prob), experts))
    names = [[] for _ in prob]
    for e in range(experts):
        for n in sorted(range(len(prob)), key=lambda n: (-prob[n][e], n))[:places]:
            names[n].append(e)
    return names


def gate_weights(token, names, accepted, cfg):
    """Weigh the chosen experts of one token; `accepted` tells which of them have a place."""
    alone = cfg.top_k == 1 or isinstance(cfg.selection, ExpertChoice)
    kind = cfg.gate_weights or ("raw" if alone else "renormalized")
    score = [token.score[e] for e in names]
    if kind == "renormalized_kept":
        score = [s if fine else 0.0 for s, fine in zip(score, accepted, strict=True)]
    whole = 1.0 if kind == "raw" or not any(score) else math.fsum(score)
    return [cfg.gate_scale * s / whole for s in score]


def choose(tokens, cfg):
    """Say who chooses whom: the wishes of every token, and its ranking of the experts."""
    if not tokens or not isinstance(cfg.selection, Sinkhorn | Assignment | ExpertChoice):
        return tokens, [token.ranking[: cfg.top_k] for token in tokens]
    if isinstance(cfg.selection, ExpertChoice):
        return tokens, expert_choice([t.prob for t in tokens], cfg.top_k, cfg.num_experts)
    if isinstance(cfg.selection, Assignment):
        names = best_assignment([t.noisy for t in tokens], cfg.num_experts)
        return tokens, [[e] for e in names]
    rankings = sinkhorn_rankings(tokens, cfg.selection)
    tokens = [t._replace(ranking=r) for t, r in zip(tokens, rankings, strict=True)]
    return tokens, [token.ranking[: cfg.top_k] for token in tokens]


def split_noise(noise, cfg, tokens):
    """Part what the router's noise takes from the coins in the last column."""
    if noise is None:
        return [None] * tokens, None
    rows, coins = noise.tolist(), None
    if isinstance(cfg.selection, SecondExpert) and cfg.selection.policy == "random":
        rows, coins = [row[:-1] for row in rows], [row[-1] for row in rows]
    return rows if cfg.noise is not None else [None] * tokens, coins


def moe_layer(x_NC, params, cfg, noise=None):
    """Take the tokens one by one through the router, the queue and their experts."""
    rows = x_NC.tolist()
    looks, coins = split_noise(noise, cfg, len(rows))
    tokens = [score_token(x, params.router, cfg, u) for x, u in zip(rows, looks, strict=True)]
    tokens, wished = choose(tokens, cfg)
    rejected = []
    if isinstance(cfg.selection, SecondExpert):
        rejected = rejected_seconds(tokens, wished, coins, cfg.selection)
    using, accepted = seat_in_groups(wished, tokens, rejected, cfg)
    everyone = zip(tokens, using, accepted, strict=True)
    gates = [gate_weights(*one, cfg) for one in everyone]
    y = []
    for n, x in enumerate(rows):
        total = [0.0] * len(x)
        for e, gate, got_place in zip(using[n], gates[n], accepted[n], strict=True):
            if got_place:
                out = run_expert(x, gate, e, params.experts, cfg)
                total = [t + o for t, o in zip(total, out, strict=True)]
        if cfg.shared is not None:
            out = shared_output(x, params.shared, cfg)
            total = [t + o for t, o in zip(total, out, strict=True)]
        y.append(total)
    aux = balance(tokens, wished, using, gates, cfg)
    return Layer(y, aux, tokens, wished, using, accepted, gates)


def run_expert(x, gate, e, experts, cfg):
    """Weigh the output of expert e, or (gate_on) what it sees."""
    seen = [gate * v for v in x] if cfg.gate_on == "input" else x
    weight = 1.0 if cfg.gate_on == "input" else gate
    w = [None if leaf is None else leaf[e].tolist() for leaf in experts]
    return [weight * o for o in mlp(seen, w, cfg.activation)]


def shared_output(x, shared, cfg):
    w = [None if leaf is None else leaf.tolist() for leaf in shared.mlp]
    out = mlp(x, w, cfg.activation)
    if not cfg.shared.gated:
        return out
    gate = sigmoid(dot(x, shared.gate_C1[:, 0].tolist()))
    return [gate * o for o in out]


# ------------------------------------------------------------------------------------- balance
def cv_squared(amounts):
    mean = math.fsum(amounts) / len(amounts)
    var = math.fsum((a - mean) ** 2 for a in amounts) / len(amounts)
    return var / (mean * mean + 1e-10)


def switch_loss(prob, counted, experts, divide=True):
    """E sum_e f_e P_e; `counted` lists the experts of every token that f counts."""
    tokens, total = len(counted), 0.0
    for e in range(experts):
        f = sum(names.count(e) for names in counted) / tokens
        total += f * math.fsum(p[e] for p in prob) / tokens
    return experts * total / (len(counted[0]) if divide else 1)


def switch_loss_in_groups(tokens, wished, term, experts):
    """Average the loss of every group of consecutive tokens, each token weighing the same."""
    counted = wished
    if term.counted is not None:
        counted = [token.ranking[: term.counted] for token in tokens]
    total = 0.0
    for start, stop in groups_of(len(tokens), term.group):
        prob = [token.prob for token in tokens[start:stop]]
        value = switch_loss(prob, counted[start:stop], experts, term.divide)
        total += value * (stop - start) / len(tokens)
    return total


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
            value = switch_loss_in_groups(tokens, wished, term, E)
        elif isinstance(term, ImportanceLoss) and term.of == "probabilities":
            prob = [softmax(t.clean) for t in tokens]
            value = cv_squared([math.fsum(p[e] for p in prob) for e in range(E)])
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


def heads_of(x, w, bias, gain, cfg):
    """Project one position into its heads: a vector each, normalized if there is a gain for it."""
    heads = [vec_mat(x, w[:, h].tolist()) for h in range(w.shape[1])]
    if bias is not None:
        pairs = zip(heads, bias.tolist(), strict=True)
        heads = [[v + b for v, b in zip(head, row, strict=True)] for head, row in pairs]
    if gain is not None and cfg.qk_norm == "head":
        heads = [rms_norm(head, gain.tolist(), cfg.norm_eps) for head in heads]
    if gain is not None and cfg.qk_norm == "full":
        whole = rms_norm([v for head in heads for v in head], gain.tolist(), cfg.norm_eps)
        width = w.shape[2]
        heads = [whole[h * width : (h + 1) * width] for h in range(len(heads))]
    return heads


def place(head, position, cfg):
    """Turn a query or key by its position; then, as in Llama 4, to unit size if it is asked for."""
    if cfg.positions == "rotary":
        head = turn(head, position, cfg.theta)
    if cfg.qk_norm == "l2":
        size = math.sqrt(math.fsum(v * v for v in head) / len(head) + cfg.norm_eps)
        head = [v / size for v in head]
    return head


def attend(x_TC, t, params, cfg):
    """Attention's answer at one position, and each head's weights on the positions it sees."""
    rows = x_TC.tolist()
    seen = range(t + 1) if cfg.causal else range(len(rows))
    H, G, D = params.q_CHD.shape[1], params.k_CGD.shape[1], params.q_CHD.shape[2]
    q = heads_of(rows[t], params.q_CHD, params.q_HD, params.q_gain, cfg)
    k = [heads_of(rows[s], params.k_CGD, params.k_GD, params.k_gain, cfg) for s in seen]
    v = [heads_of(rows[s], params.v_CGD, params.v_GD, None, cfg) for s in seen]
    scale = 1.0 / math.sqrt(D) if cfg.attention_scale is None else cfg.attention_scale
    answer, weights = [0.0] * len(rows[0]), []
    for h in range(H):
        g, query = h * G // H, place(q[h], t, cfg)
        logits = [scale * dot(query, place(k[s][g], s, cfg)) for s in seen]
        if cfg.logit_cap is not None:
            logits = [cfg.logit_cap * math.tanh(z / cfg.logit_cap) for z in logits]
        if params.sink_H is not None:
            logits.append(float(params.sink_H[h]))
        a = softmax(logits)[: len(seen)]
        head = [math.fsum(a[s] * v[s][g][d] for s in seen) for d in range(D)]
        answer = add(answer, vec_mat(head, params.out_HDC[h].tolist()))
        weights.append(a)
    return answer if params.out_C is None else add(answer, params.out_C.tolist()), weights


def add(x, y):
    return [u + v for u, v in zip(x, y, strict=True)]


def normalize(x, params, eps=1e-5):
    if params is None:
        return x
    if params.bias_C is None:
        return rms_norm(x, params.gain_C.tolist(), eps)
    return layer_norm(x, params.gain_C.tolist(), params.bias_C.tolist(), eps)


def branch(stream, before, after, cfg, work):
    """Add to the stream what `work` makes of all its normalized positions."""
    found = work(np.array([normalize(x, before, cfg.norm_eps) for x in stream]))
    found = [normalize(list(y), after, cfg.norm_eps) for y in found]
    return [add(x, y) for x, y in zip(stream, found, strict=True)]


def dense(rows, params, cfg):
    w = [None if m is None else m.tolist() for m in params]
    return [mlp(x, w, cfg.dense_activation) for x in rows.tolist()]


def model_logits(tokens, params, cfg):
    """Predict at every position of one sequence, without noise."""
    stream = [[cfg.embedding_scale * v for v in params.token_VC[u].tolist()] for u in tokens]
    if params.position_TC is not None:
        stream = [add(x, params.position_TC[t].tolist()) for t, x in enumerate(stream)]
    for block in params.blocks:

        def look(seen, block=block):
            return [attend(seen, t, block.attention, cfg)[0] for t in range(len(seen))]

        def feed(seen, block=block):
            if isinstance(block.feed, MoEParams):
                return moe_layer(seen, block.feed, cfg.moe).y
            return dense(seen, block.feed, cfg)

        stream = branch(stream, block.norm_1, block.norm_1_post, cfg, look)
        stream = branch(stream, block.norm_2, block.norm_2_post, cfg, feed)
        if block.extra is not None:
            extra = functools.partial(dense, params=block.extra, cfg=cfg)
            stream = branch(stream, block.norm_3, block.norm_3_post, cfg, extra)
    head = (params.token_VC.T if params.head_CV is None else params.head_CV).tolist()
    last = [normalize(x, params.norm, cfg.norm_eps) for x in stream]
    return [[cfg.logit_scale * z for z in vec_mat(x, head)] for x in last]


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
            draw(E) if cfg.router_bias else None,
        ),
        ExpertParams(
            in_ECF=draw(E, width, F),
            up_ECF=draw(E, width, F) if gated else None,
            out_EFC=draw(E, F, width),
            third_ECF=draw(E, width, F) if cfg.activation == "swiglu3" else None,
            in_EF=draw(E, F) if cfg.expert_bias else None,
            up_EF=draw(E, F) if gated and cfg.expert_bias else None,
            out_EC=draw(E, width) if cfg.expert_bias else None,
        ),
        None if cfg.shared is None else draw_shared(draw, cfg, width),
    )


def draw_shared(draw, cfg, width):
    hidden, gated = cfg.shared.hidden, cfg.activation in GATED
    matrices = MLPParams(
        in_CF=draw(width, hidden),
        up_CF=draw(width, hidden) if gated else None,
        out_FC=draw(hidden, width),
        third_CF=draw(width, hidden) if cfg.activation == "swiglu3" else None,
    )
    return SharedParams(matrices, draw(width, 1) if cfg.shared.gated else None)
