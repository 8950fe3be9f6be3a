"""Balance of a hierarchy: the same terms as in `balance`, over products of two levels.

Letters of this file: G groups of P experts each, S groups kept for each token.
"""

from __future__ import annotations

from typing import NamedTuple

from moe_numpy import tree
from moe_numpy.backend import Array, Cache, xp
from moe_numpy.config import ImportanceLoss, MoEConfig, SwitchLoss, ZLoss
from moe_numpy.moe import balance, capacity, hierarchy_gates, router


class Level(NamedTuple):
    """What the router of one level says; E is the number of its logits: of groups or experts."""

    clean_NE: Array
    noisy_NE: Array
    scale_NE: Array | None


def hierarchical_load_forward(
    primary: Level, secondary: Level, kept: int, each: int
) -> tuple[Array, Cache]:
    """Estimate each expert's load smoothly: the load of its group times its share in there.

        load[i, j] = Load_primary[i] * Load_i(X_i)[j] / |X_i|

    X_i are the tokens that the noisy choice sent to group i. Load_i is the smooth load within the
    group over these tokens, with thresholds among the group's experts; a group without tokens
    contributes zero. Adding up Load_i(X_i) alone would leave the primary router no gradient.

    Shapes     primary with (N, G) arrays, secondary with (N, E); kept below G, each below P
               -> load_E (E,)
    Units      expected tokens per expert; the sum over experts is about N * kept * each
    Cache      (load_G, share_GP, primary cache, [(group, tokens, its cache)], secondary)
    Source     Shazeer et al. 2017, appendix B, eq. 14
    """
    N, G = primary.noisy_NE.shape
    E = secondary.noisy_NE.shape[1]
    load_G, cache_1 = balance.load_forward(*primary, kept)  # 1. of the groups
    group_NS = router.top_k(primary.noisy_NE, kept)
    _, plan = capacity.make_plan(group_NS, primary.noisy_NE, primary.noisy_NE, None)
    logits = [logit_NE.reshape(N, G, E // G) for logit_NE in secondary]
    share_GP = xp.zeros((G, E // G), load_G.dtype)
    caches = []
    for i in range(G):
        tokens = plan.token_R[plan.offsets[i] : plan.offsets[i + 1]]  # X_i
        if tokens.size:
            load_P, cache = balance.load_forward(*(z[tokens, i] for z in logits), each)
            share_GP[i] = load_P / tokens.size  # 2. within the group
            caches.append((i, tokens, cache))
    load_GP = load_G[:, None] * share_GP  # 3. product
    return load_GP.reshape(E), (load_G, share_GP, cache_1, caches, secondary)


def hierarchical_load_backward(dload_E: Array, cache: Cache) -> tuple[Level, Level]:
    """Undo `hierarchical_load_forward`; who is in X_i, and |X_i|, are constants.

    dLoad_primary[i] = sum_j dload[i, j] share[i, j],    dLoad_i[j] = dload[i, j] Load_primary[i]
    / |X_i|; both go on through the backward of the smooth load, thresholds included.

    Shapes     dload_E (E,) -> dprimary with (N, G) arrays, dsecondary with (N, E)
    """
    load_G, share_GP, cache_1, caches, secondary = cache
    dload_GP = dload_E.reshape(share_GP.shape)
    dshare_GP = dload_GP * load_G[:, None]  # 3.
    dsecondary = tree.map(xp.zeros_like, secondary)
    for i, tokens, group_cache in caches:
        dlogits = balance.load_backward(dshare_GP[i] / tokens.size, group_cache)  # 2.
        for dlogit_NE, dlogit in zip(dsecondary, dlogits, strict=True):
            dlogit_NE.reshape(-1, *share_GP.shape)[tokens, i] = dlogit
    dload_G = (dload_GP * share_GP).sum(1)
    return Level(*balance.load_backward(dload_G, cache_1)), dsecondary  # 1.


def hierarchical_balance_forward(
    primary: Level,
    secondary: Level,
    log_NE: Array,
    gate_NK: Array,
    expert_NK: Array,
    wished_NK: Array,
    cfg: MoEConfig,
) -> tuple[Array, Cache]:
    """Add up the balance terms of a layer, each times its weight.

        aux = sum over the terms of weight * term

    The probabilities are the products of both levels', exp(log_NE); the importance sums products
    of gates, or of clean probabilities. The z-loss is that of the primary logits plus that of the
    logits within each group, averaged over the groups. Without noise (scale None) the load is a
    count and has no gradient.

    Shapes     primary with (N, G) arrays, secondary with (N, E); log_NE (N, E); gate_NK (N, K);
               expert_NK, wished_NK (N, K) integers -> aux ()
    Cache      (cfg, both levels, log_NE, gate_NK, the caches of the terms)
    Source     Shazeer et al. 2017, appendix B, eq. 13 and 14; differs: it has no Switch loss and no
               z-loss
    """
    E, selection = cfg.num_experts, cfg.selection
    aux = xp.zeros((), log_NE.dtype)
    caches = []
    for term in cfg.balance:
        if isinstance(term, SwitchLoss):
            counted = wished_NK  # which need not be the best of all: every kept group chose
            if term.counted not in (None, cfg.top_k):
                counted = router.top_k(log_NE, term.counted)
            limits = (term.divide, term.group)
            value, cache = balance.switch_loss_forward(xp.exp(log_NE), counted, *limits)
        elif isinstance(term, ZLoss):
            value, cache_1 = balance.z_loss_forward(primary.clean_NE)
            within, cache_2 = balance.z_loss_forward(_by_group(secondary.clean_NE, primary))
            value, cache = value + within, (cache_1, cache_2)
        elif isinstance(term, ImportanceLoss) and term.of == "probabilities":
            clean_NE, log_cache = hierarchy_gates.hierarchical_log_softmax_forward(
                primary.clean_NE, secondary.clean_NE
            )
            prob_NE = xp.exp(clean_NE)
            value, cv_cache = balance.cv_squared_forward(prob_NE.sum(0))
            cache = (prob_NE, log_cache, cv_cache)
        elif isinstance(term, ImportanceLoss):
            importance_E, sum_cache = balance.importance_forward(gate_NK, expert_NK, E)
            value, cv_cache = balance.cv_squared_forward(importance_E)
            cache = (sum_cache, cv_cache)
        elif primary.scale_NE is not None:
            kept, each = selection.kept, cfg.top_k // selection.kept
            load_E, load_cache = hierarchical_load_forward(primary, secondary, kept, each)
            value, cv_cache = balance.cv_squared_forward(load_E)
            cache = (load_cache, cv_cache)
        else:
            count_E = xp.bincount(wished_NK.reshape(-1), minlength=E).astype(log_NE.dtype)
            value, cache = balance.cv_squared_forward(count_E)[0], None
        aux = aux + term.weight * value
        caches.append(cache)
    return aux, (cfg, primary, secondary, log_NE, gate_NK, caches)


def hierarchical_balance_backward(daux: Array, cache: Cache) -> tuple[Level, Level, Array, Array]:
    """Undo `hierarchical_balance_forward`: every term adds to what it looked at.

    Shapes     daux () -> dprimary with (N, G) arrays, dsecondary with (N, E), dlog_NE (N, E),
               dgate_NK (N, K)
    """
    cfg, primary, secondary, log_NE, gate_NK, caches = cache
    dprimary, dsecondary = tree.map(xp.zeros_like, (primary, secondary))
    dlog_NE, dgate_NK = xp.zeros_like(log_NE), xp.zeros_like(gate_NK)
    for term, term_cache in zip(cfg.balance, caches, strict=True):
        dvalue = daux * term.weight
        if isinstance(term, SwitchLoss):
            dlog_NE += balance.switch_loss_backward(dvalue, term_cache) * xp.exp(log_NE)
        elif isinstance(term, ZLoss):
            dclean_1 = balance.z_loss_backward(dvalue, term_cache[0])
            dclean_2 = balance.z_loss_backward(dvalue, term_cache[1]).reshape(log_NE.shape)
            dprimary, dsecondary = _plus(dprimary, dclean_1), _plus(dsecondary, dclean_2)
        elif isinstance(term, ImportanceLoss) and term.of == "probabilities":
            prob_NE, log_cache, cv_cache = term_cache
            dclean_NE = balance.cv_squared_backward(dvalue, cv_cache) * prob_NE
            dcleans = hierarchy_gates.hierarchical_log_softmax_backward(dclean_NE, log_cache)
            dprimary, dsecondary = _plus(dprimary, dcleans[0]), _plus(dsecondary, dcleans[1])
        elif isinstance(term, ImportanceLoss):
            sum_cache, cv_cache = term_cache
            dimportance_E = balance.cv_squared_backward(dvalue, cv_cache)
            dgate_NK += balance.importance_backward(dimportance_E, sum_cache)
        elif term_cache is not None:
            load_cache, cv_cache = term_cache
            dload_E = balance.cv_squared_backward(dvalue, cv_cache)
            dload_1, dload_2 = hierarchical_load_backward(dload_E, load_cache)
            dprimary = tree.map(xp.add, dprimary, dload_1)
            dsecondary = tree.map(xp.add, dsecondary, dload_2)
    return dprimary, dsecondary, dlog_NE, dgate_NK


def _by_group(logit_NE: Array, primary: Level) -> Array:
    """Give the logits within each group a row of their own."""
    G = primary.clean_NE.shape[1]
    return logit_NE.reshape(-1, logit_NE.shape[1] // G)


def _plus(level: Level, dclean_NE: Array) -> Level:
    return level._replace(clean_NE=level.clean_NE + dclean_NE)
