"""Balance: losses that spread the load over the experts, and a rule that needs no loss.

Each pair returns the bare term; the layer multiplies it by the weight in its configuration. The
choice of experts is discrete, so how many tokens an expert got has no gradient: the Switch loss
takes the counts as constants and moves the probabilities; the load loss replaces the counts by the
probability, over the noise, that an expert is chosen.
"""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, xp
from moe_numpy.config import ImportanceLoss, LoadLoss, MoEConfig, SwitchLoss, ZLoss
from moe_numpy.moe import router
from moe_numpy.ops import normal, softmax

EPS = 1e-10  # keeps CV^2 finite without any load


def switch_loss_forward(
    prob_NE: Array, expert_NK: Array, divide: bool = True, group: int | None = None
) -> tuple[Array, Cache]:
    """Multiply every expert's mean probability (P) by its share of the choices (f).

        loss = E sum_e f_e P_e,    f_e = choices of e / (N K),    P_e = mean_n prob[n, e]

    ``divide=False`` leaves the K out. With `group`, every group of so many consecutive tokens has
    its own f and P, and the loss is the mean over tokens of their groups' losses.

    Shapes     prob_NE (N, E); expert_NK (N, K) integers, the router's choice before any limit
               -> loss (): 1 at balance (K undivided), E / K (E undivided) if K experts get all; 1
               is no minimum: choices and probabilities may disagree
    Cache      (share_GE with the G groups in rows, tokens of a group, N)
    Source     Fedus et al. 2022, eq. 4 to 6; differs: for K choices f is divided by K, so that the
               balanced value is 1 for every K; groups: Lepikhin et al. 2020, algorithm 1
    """
    N, E = prob_NE.shape
    K = expert_NK.shape[1] if divide else 1
    size = group or max(N, 1)
    shares, loss = [], xp.zeros((), prob_NE.dtype)
    for start in range(0, max(N, 1), size):
        here = slice(start, min(start + size, N))
        counts_E = xp.bincount(expert_NK[here].reshape(-1), minlength=E).astype(prob_NE.dtype)
        shares.append(counts_E / max(K * (here.stop - start), 1))
        loss = loss + E * (shares[-1] * prob_NE[here].sum(0)).sum() / max(N, 1)
    return loss, (xp.stack(shares), size, N)


def switch_loss_backward(dloss: Array, cache: Cache) -> Array:
    """Undo `switch_loss_forward`; f counts discrete choices and is a constant.

    dloss / dprob[n, e] = E f_e / N, with the f of the token's group.

    Shapes     dloss () -> dprob_NE (N, E)
    """
    share_GE, size, N = cache
    E = share_GE.shape[1]
    return ((dloss * E / max(N, 1)) * share_GE)[xp.arange(N) // size]


def importance_forward(gate_NK: Array, expert_NK: Array, E: int) -> tuple[Array, Cache]:
    """Add up the gates of every expert over the batch.

        importance_e = sum over the (n, k) with expert[n, k] = e of gate[n, k]

    Shapes     gate_NK (N, K); expert_NK (N, K) integers below E -> importance_E (E,)
    Cache      (expert_NK,)
    Source     Shazeer et al. 2017, eq. 6
    """
    flat = expert_NK.reshape(-1)
    importance_E = xp.bincount(flat, weights=gate_NK.reshape(-1), minlength=E)
    return importance_E.astype(gate_NK.dtype), (expert_NK,)


def importance_backward(dimportance_E: Array, cache: Cache) -> Array:
    """Hand every gate the gradient of its expert's sum.

    Shapes     dimportance_E (E,) -> dgate_NK (N, K)
    """
    (expert_NK,) = cache
    return dimportance_E[expert_NK]


def load_forward(clean_NE: Array, noisy_NE: Array, scale_NE: Array, k: int) -> tuple[Array, Cache]:
    """Estimate each expert's load smoothly: its chance to be chosen if its noise were drawn anew.

        load_e = sum_n Phi((clean[n, e] - threshold[n, e]) / scale[n, e])

    threshold[n, e] is the k-th largest noisy logit of the other experts of token n: the (k+1)-th
    of all if e was chosen, the k-th if it was not.

    Shapes     clean_NE, noisy_NE, scale_NE (N, E); k below E -> load_E (E,)
    Units      expected tokens per expert; the sum over experts is about N * k
    Cache      (ratio_NE, scale_NE, chosen_NE, last_in_N, first_out_N)
    Source     Shazeer et al. 2017, appendix A, eq. 8 to 10
    """
    N = clean_NE.shape[0]
    rows = xp.arange(N)
    order_NE = xp.argsort(-noisy_NE, axis=1, kind="stable")
    last_in_N, first_out_N = order_NE[:, k - 1], order_NE[:, k]  # ranks k and k + 1
    in_N1 = noisy_NE[rows, last_in_N][:, None]
    out_N1 = noisy_NE[rows, first_out_N][:, None]
    chosen_NE = xp.zeros(noisy_NE.shape, bool)
    xp.put_along_axis(chosen_NE, order_NE[:, :k], True, 1)
    threshold_NE = xp.where(chosen_NE, out_N1, in_N1)  # 1. what e has to beat
    ratio_NE = (clean_NE - threshold_NE) / scale_NE  # 2. in deviations of its noise
    load_E = normal.normal_cdf(ratio_NE).sum(0)  # 3. chance, summed over tokens
    return load_E, (ratio_NE, scale_NE, chosen_NE, last_in_N, first_out_N)


def load_backward(dload_E: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """Undo `load_forward`, the path through the threshold included.

    With s = dload * phi(ratio) / scale:
        dclean = s,    dscale = -s ratio,    dthreshold = -s.
    The thresholds of the chosen experts are the (k+1)-th noisy logit, those of the others the
    k-th: each row's dthreshold is added up and goes to these two logits.

    Shapes     dload_E (E,) -> dclean_NE, dnoisy_NE, dscale_NE (N, E)
    """
    ratio_NE, scale_NE, chosen_NE, last_in_N, first_out_N = cache
    rows = xp.arange(ratio_NE.shape[0])
    dclean_NE = dload_E * normal.normal_pdf(ratio_NE) / scale_NE  # 3. and 2.
    dscale_NE = -dclean_NE * ratio_NE
    dnoisy_NE = xp.zeros_like(dclean_NE)
    dnoisy_NE[rows, first_out_N] = -(dclean_NE * chosen_NE).sum(1)  # 1.
    dnoisy_NE[rows, last_in_N] = -(dclean_NE * ~chosen_NE).sum(1)
    return dclean_NE, dnoisy_NE, dscale_NE


def cv_squared_forward(amount_E: Array) -> tuple[Array, Cache]:
    """Measure inequality: the squared coefficient of variation.

        cv2 = var / (mean^2 + eps),    var = mean((amount - mean)^2)

    Shapes     amount_E (E,) -> cv2 (): 0 if all are equal, E - 1 if one has everything
    Cache      (amount_E,)
    Source     Shazeer et al. 2017, eq. 7 and 11; the variance is the population's, as in
               tensor2tensor, whose eps keeps an empty batch finite
    """
    mean = amount_E.mean()
    var = ((amount_E - mean) ** 2).mean()
    return var / (mean * mean + EPS), (amount_E,)


def cv_squared_backward(dcv2: Array, cache: Cache) -> Array:
    """Undo `cv_squared_forward`.

    With q = mean^2 + eps: dvar / damount_i = 2 (amount_i - mean) / E and dmean = 1 / E, hence
        damount_i = 2 (amount_i - mean) / (E q) - 2 mean var / (E q^2).

    Shapes     dcv2 () -> damount_E (E,)
    """
    (amount_E,) = cache
    E = amount_E.size
    mean = amount_E.mean()
    var = ((amount_E - mean) ** 2).mean()
    q = mean * mean + EPS
    return dcv2 * (2.0 / E) * ((amount_E - mean) / q - mean * var / (q * q))


def z_loss_forward(logit_NE: Array) -> tuple[Array, Cache]:
    """Keep the router's logits small.

        loss = 1/N sum_n (log sum_e exp logit[n, e])^2

    Shapes     logit_NE (N, E) -> loss ()
    Units      nats^2; all logits zero give (log E)^2, so the least is not at zero
    Cache      (lse_N, logit_NE)
    Source     Zoph et al. 2022, ST-MoE, eq. 5
    """
    N = logit_NE.shape[0]
    top_N = logit_NE.max(1)
    lse_N = top_N + xp.log(xp.exp(logit_NE - top_N[:, None]).sum(1))
    return (lse_N * lse_N).sum() / max(N, 1), (lse_N, logit_NE)


def z_loss_backward(dloss: Array, cache: Cache) -> Array:
    """Undo `z_loss_forward`: dlogit = 2 lse softmax(logit) / N.

    Its entries sum to 2 lse / N: unlike the terms that see a softmax, it moves the common offset of
    the logits.

    Shapes     dloss () -> dlogit_NE (N, E)
    """
    lse_N, logit_NE = cache
    prob_NE, _ = softmax.softmax_forward(logit_NE)
    return (dloss * 2.0 / max(lse_N.size, 1)) * lse_N[:, None] * prob_NE


def balance_forward(
    clean_NE: Array,
    noisy_NE: Array,
    scale_NE: Array | None,
    prob_NE: Array | None,
    gate_NK: Array,
    expert_NK: Array,
    wished_NK: Array,
    rank_NE: Array,
    cfg: MoEConfig,
) -> tuple[Array, Cache]:
    """Add up the balance terms of a layer, each times its weight.

        aux = sum over the terms of weight * term

    The Switch loss sees the choices as the router wished them, before any limit; the importance
    sums the gates of all choices, dropped ones included, or the clean probabilities. Without noise
    (scale None) the load is a count and has no gradient.

    Shapes     clean_NE, noisy_NE, scale_NE, prob_NE (N, E), unread without a term; gate_NK (N, K);
               expert_NK, wished_NK (N, K) integers; rank_NE (N, E) what they were chosen by
               -> aux ()
    Cache      (cfg, (N, E), the caches of the terms)
    Source     the terms above; clean probabilities: Riquelme et al. 2021, V-MoE, appendix A
    """
    E = cfg.num_experts
    aux = xp.zeros((), clean_NE.dtype)
    caches = []
    for term in cfg.balance:
        if isinstance(term, SwitchLoss):
            counted_NK = _counted(term.counted, wished_NK, rank_NE)
            value, cache = switch_loss_forward(prob_NE, counted_NK, term.divide, term.group)
        elif isinstance(term, ZLoss):
            value, cache = z_loss_forward(clean_NE)
        elif isinstance(term, ImportanceLoss) and term.of == "probabilities":
            clean_prob_NE, softmax_cache = softmax.softmax_forward(clean_NE)
            value, cv_cache = cv_squared_forward(clean_prob_NE.sum(0))
            cache = (softmax_cache, cv_cache)
        elif isinstance(term, ImportanceLoss):
            importance_E, sum_cache = importance_forward(gate_NK, expert_NK, E)
            value, cv_cache = cv_squared_forward(importance_E)
            cache = (sum_cache, cv_cache)
        elif scale_NE is not None:
            load_E, load_cache = load_forward(clean_NE, noisy_NE, scale_NE, cfg.top_k)
            value, cv_cache = cv_squared_forward(load_E)
            cache = (load_cache, cv_cache)
        else:
            count_E = xp.bincount(wished_NK.reshape(-1), minlength=E).astype(prob_NE.dtype)
            value, cache = cv_squared_forward(count_E)[0], None
        aux = aux + term.weight * value
        caches.append(cache)
    return aux, (cfg, clean_NE.shape, caches)


def balance_backward(daux: Array, cache: Cache) -> tuple[Array | None, ...]:
    """Undo `balance_forward`: every term adds to what it looked at.

    Shapes     daux () -> dclean_NE, dnoisy_NE, dscale_NE, dprob_NE (N, E), dgate_NK (N, K), each
               None if no term looked there
    """
    cfg, shape, caches = cache
    dclean_NE = dnoisy_NE = dscale_NE = dprob_NE = dgate_NK = None
    for term, term_cache in zip(cfg.balance, caches, strict=True):
        dvalue = daux * term.weight
        if isinstance(term, SwitchLoss):
            dprob_NE = router.plus(dprob_NE, switch_loss_backward(dvalue, term_cache))
        elif isinstance(term, ZLoss):
            dclean_NE = router.plus(dclean_NE, z_loss_backward(dvalue, term_cache))
        elif isinstance(term, ImportanceLoss) and term.of == "probabilities":
            softmax_cache, cv_cache = term_cache
            dsum_E = cv_squared_backward(dvalue, cv_cache)
            dclean = softmax.softmax_backward(xp.broadcast_to(dsum_E, shape), softmax_cache)
            dclean_NE = router.plus(dclean_NE, dclean)
        elif isinstance(term, ImportanceLoss):
            sum_cache, cv_cache = term_cache
            dimportance_E = cv_squared_backward(dvalue, cv_cache)
            dgate_NK = router.plus(dgate_NK, importance_backward(dimportance_E, sum_cache))
        elif isinstance(term, LoadLoss) and term_cache is not None:
            load_cache, cv_cache = term_cache
            dload_E = cv_squared_backward(dvalue, cv_cache)
            dclean, dnoisy, dscale = load_backward(dload_E, load_cache)
            dclean_NE, dnoisy_NE = router.plus(dclean_NE, dclean), router.plus(dnoisy_NE, dnoisy)
            dscale_NE = router.plus(dscale_NE, dscale)
    return dclean_NE, dnoisy_NE, dscale_NE, dprob_NE, dgate_NK


def _counted(counted: int | None, wished_NK: Array, rank_NE: Array) -> Array:
    """Pick the choices that the Switch loss counts."""
    K = wished_NK.shape[1]
    if counted is None or counted == K:
        return wished_NK
    return wished_NK[:, :counted] if counted < K else router.top_k(rank_NE, counted)


def updated_bias(bias_E: Array, load_E: Array, rate: float) -> Array:
    """Nudge the selection bias: up for experts below the mean load, down for those above.

        bias_e + rate * sign(mean(load) - load_e)

    The bias is added to the scores (of a softmax: to the logits, unless groups limit the choice)
    for the choice alone; gates are computed without it.

    Shapes     bias_E (E,); load_E (E,) choices per expert -> bias_E (E,)
    Source     DeepSeek-AI 2024, DeepSeek-V3, section 2.1.2; Wang et al. 2024; differs: they add it
               to the probabilities of a softmax, not to its logits
    """
    return bias_E + (rate * xp.sign(load_E.mean() - load_E)).astype(bias_E.dtype)
