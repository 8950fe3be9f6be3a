"""The first mixture of experts, whole: linear experts, a softmax gate, and the error between them.

Every expert sees every input; what makes them divide the work is the error function. There are
three of them, and one for classification. All are averaged over the tokens. They take the gate's
probabilities and the experts' outputs separately: in all but the first, each expert is compared
with the target by itself.
"""

from __future__ import annotations

from typing import NamedTuple

from numpy.random import Generator

from moe_numpy.backend import Array, Cache, to_device, xp
from moe_numpy.ops import linear, softmax


class JacobsParams(NamedTuple):
    """A linear gate and E linear experts, all with biases."""

    gate_CE: Array
    gate_bias_E: Array
    expert_ECO: Array
    expert_bias_EO: Array


def init_jacobs(
    rng: Generator, width: int, num_experts: int, outputs: int, dtype: str, std: float = 0.1
) -> JacobsParams:
    """Draw small weights; the biases start at zero, so that the gate is nearly even."""
    C, E, O = width, num_experts, outputs
    return JacobsParams(
        gate_CE=to_device(rng.normal(0.0, std, (C, E)), dtype),
        gate_bias_E=xp.zeros(E, dtype),
        expert_ECO=to_device(rng.normal(0.0, std, (E, C, O)), dtype),
        expert_bias_EO=xp.zeros((E, O), dtype),
    )


def jacobs_forward(x_NC: Array, params: JacobsParams) -> tuple[Array, Array, Cache]:
    """Ask the gate and every expert.

        prob = softmax(x gate + bias),    y[n, e] = x[n] expert[e] + bias[e]

    Shapes     x_NC (N, C) -> prob_NE (N, E), y_NEO (N, E, O)
    Cache      (x_NC, expert_ECO, logit cache, softmax cache)
    Source     Jacobs, Jordan, Nowlan and Hinton 1991, Adaptive Mixtures of Local Experts
    """
    logit_NE, logit_cache = linear.linear_forward(x_NC, params.gate_CE, params.gate_bias_E)
    prob_NE, prob_cache = softmax.softmax_forward(logit_NE)  # 1. gate
    y_NEO = xp.einsum("nc,eco->neo", x_NC, params.expert_ECO)  # 2. experts
    y_NEO += params.expert_bias_EO
    return prob_NE, y_NEO, (x_NC, params.expert_ECO, logit_cache, prob_cache)


def jacobs_backward(dprob_NE: Array, dy_NEO: Array, cache: Cache) -> tuple[Array, JacobsParams]:
    """Undo `jacobs_forward`: x was read by the gate and by every expert.

    Shapes     dprob_NE (N, E), dy_NEO (N, E, O) -> dx_NC (N, C), grads
    """
    x_NC, expert_ECO, logit_cache, prob_cache = cache
    dexpert_ECO = xp.einsum("nc,neo->eco", x_NC, dy_NEO)  # 2.
    dx_experts_NC = xp.einsum("neo,eco->nc", dy_NEO, expert_ECO)
    dlogit_NE = softmax.softmax_backward(dprob_NE, prob_cache)  # 1.
    dx_NC, dgate_CE, dgate_bias_E = linear.linear_backward(dlogit_NE, logit_cache)
    return dx_NC + dx_experts_NC, JacobsParams(dgate_CE, dgate_bias_E, dexpert_ECO, dy_NEO.sum(0))


def cooperative_error_forward(
    prob_NE: Array, y_NEO: Array, target_NO: Array
) -> tuple[Array, Cache]:
    """Compare the experts' weighted sum with the target: what the paper argues against.

        error = mean_n || target[n] - sum_e prob[n, e] y[n, e] ||^2

    Each expert is to cancel what all others leave over, so none can learn by itself.

    Shapes     prob_NE (N, E); y_NEO (N, E, O); target_NO (N, O), a constant -> error ()
    Cache      (prob_NE, y_NEO, gap_NO): gap = sum - target
    Source     Jacobs et al. 1991, the first error function
    """
    gap_NO = xp.einsum("ne,neo->no", prob_NE, y_NEO) - target_NO  # 1. of the sum
    error = (gap_NO * gap_NO).sum() / max(gap_NO.shape[0], 1)  # 2. squared, averaged
    return error, (prob_NE, y_NEO, gap_NO)


def cooperative_error_backward(derror: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `cooperative_error_forward`: all experts hear of the one common gap.

    Per token: dprob_e = 2 <gap, y_e>,    dy_e = 2 prob_e gap.

    Shapes     derror () -> dprob_NE (N, E), dy_NEO (N, E, O)
    """
    prob_NE, y_NEO, gap_NO = cache
    dgap_NO = (2.0 * derror / max(gap_NO.shape[0], 1)) * gap_NO  # 2.
    dprob_NE = xp.einsum("no,neo->ne", dgap_NO, y_NEO)  # 1.
    return dprob_NE, prob_NE[:, :, None] * dgap_NO[:, None, :]


def competitive_error_forward(
    prob_NE: Array, y_NEO: Array, target_NO: Array
) -> tuple[Array, Cache]:
    """Compare every expert with the target, and average the errors by the gate.

        error = mean_n sum_e prob[n, e] || target[n] - y[n, e] ||^2

    Shapes     prob_NE (N, E); y_NEO (N, E, O); target_NO (N, O), a constant -> error ()
    Cache      (prob_NE, gap_NEO, square_NE): gap = y - target
    Source     Jacobs et al. 1991, the second error function
    """
    gap_NEO, square_NE = _gaps(y_NEO, target_NO)  # 1. each expert's own
    error = (prob_NE * square_NE).sum() / max(prob_NE.shape[0], 1)  # 2. averaged
    return error, (prob_NE, gap_NEO, square_NE)


def competitive_error_backward(derror: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `competitive_error_forward`: an expert learns as fast as the gate already trusts it.

    Per token: dprob_e = ||gap_e||^2,    dy_e = 2 prob_e gap_e. Through the softmax an expert that
    is better than the weighted average gains: dlogit_e = prob_e (||gap_e||^2 - average).

    Shapes     derror () -> dprob_NE (N, E), dy_NEO (N, E, O)
    """
    prob_NE, gap_NEO, square_NE = cache
    share = derror / max(prob_NE.shape[0], 1)
    return share * square_NE, (2.0 * share) * prob_NE[:, :, None] * gap_NEO  # 2. and 1.


def mixture_error_forward(prob_NE: Array, y_NEO: Array, target_NO: Array) -> tuple[Array, Cache]:
    """Ask how likely the target is, if the gate picks one expert and it answers with noise.

        error = mean_n -log sum_e prob[n, e] exp(-1/2 || target[n] - y[n, e] ||^2)

    The noise is normal with variance 1, whose constant is left out. As a log-sum-exp: the
    exponentials of experts that are all far off do not underflow.

    Shapes     prob_NE (N, E); y_NEO (N, E, O); target_NO (N, O), a constant -> error ()
    Units      nats
    Cache      (gap_NEO, posterior cache): gap = y - target
    Source     Jacobs et al. 1991, the third error function, which the paper recommends
    """
    gap_NEO, square_NE = _gaps(y_NEO, target_NO)  # 1. each expert's own
    error, cache = log_mixture_forward(prob_NE, -0.5 * square_NE)  # 2. of the mixture
    return error, (gap_NEO, cache)


def mixture_error_backward(derror: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `mixture_error_forward`; h is the posterior of `log_mixture`.

    Per token: dy_e = h_e gap_e. The competitive error has prob_e in place of h_e: here the expert
    that answers best learns fastest, whatever the gate thinks of it yet.

    Shapes     derror () -> dprob_NE (N, E), dy_NEO (N, E, O)
    """
    gap_NEO, mixture_cache = cache
    dprob_NE, dlog_NE = log_mixture_backward(derror, mixture_cache)  # 2.
    return dprob_NE, -dlog_NE[:, :, None] * gap_NEO  # 1.


def mixture_classification_forward(
    prob_NE: Array, logits_NEV: Array, class_N: Array
) -> tuple[Array, Cache]:
    """Ask how likely the class is, if the gate picks one expert and that predicts.

        error = mean_n -log sum_e prob[n, e] q[n, e, class[n]],    q = softmax(logits)

    Shapes     prob_NE (N, E); logits_NEV (N, E, V); class_N (N,) integers below V -> error ()
    Units      nats
    Cache      (class_N, log-softmax cache, posterior cache)
    Source     Jacobs et al. 1991, the third error function, for classes instead of normal noise
    """
    N, _, V = logits_NEV.shape
    linear.check_targets("mixture_classification_forward", class_N, N, V)
    log_NEV, log_cache = softmax.log_softmax_forward(logits_NEV)  # 1. each expert's prediction
    log_NE = log_NEV[xp.arange(N), :, class_N]  # 2. of the class
    error, cache = log_mixture_forward(prob_NE, log_NE)  # 3. of the mixture
    return error, (class_N, log_cache, cache)


def mixture_classification_backward(derror: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `mixture_classification_forward`: dlogits_e = h_e (q_e - onehot(class)) per token.

    Shapes     derror () -> dprob_NE (N, E), dlogits_NEV (N, E, V)
    """
    class_N, log_cache, mixture_cache = cache
    dprob_NE, dlog_NE = log_mixture_backward(derror, mixture_cache)  # 3.
    dlog_NEV = xp.zeros_like(log_cache[0])
    dlog_NEV[xp.arange(class_N.size), :, class_N] = dlog_NE  # 2.
    return dprob_NE, softmax.log_softmax_backward(dlog_NEV, log_cache)  # 1.


def log_mixture_forward(prob_NE: Array, log_NE: Array) -> tuple[Array, Cache]:
    """Average the surprise of a mixture, from the logarithms of its parts' likelihoods.

        error = mean_n -log sum_e prob[n, e] exp(log[n, e])

    Shapes     prob_NE (N, E), rows summing to one; log_NE (N, E) -> error ()
    Units      nats
    Cache      (prob_NE, h_NE): the posterior, which expert it was as far as the target tells,
               h_e = prob_e exp(log_e) / sum_j prob_j exp(log_j)
    Source     Jacobs et al. 1991; the largest term is taken out before exp
    """
    log_prob_NE = xp.log(xp.where(prob_NE > 0, prob_NE, 1.0))
    joint_NE = xp.where(prob_NE > 0, log_prob_NE + log_NE, -xp.inf)  # 1. log of each product
    top_N1 = joint_NE.max(1, keepdims=True)
    h_NE = xp.exp(joint_NE - top_N1)
    total_N1 = h_NE.sum(1, keepdims=True)
    lse_N1 = top_N1 + xp.log(total_N1)  # 2. of their sum
    h_NE /= total_N1  # beside a large top, exp(joint - lse) would not sum to one
    return -lse_N1.sum() / max(prob_NE.shape[0], 1), (prob_NE, h_NE)  # 3. averaged


def log_mixture_backward(derror: Array, cache: Cache) -> tuple[Array, Array]:
    """Undo `log_mixture_forward`: per token dlog_e = -h_e,    dprob_e = -h_e / prob_e.

    Through the softmax of the gate, the latter becomes dlogit_e = prob_e - h_e: the prior is drawn
    to the posterior. A probability that was rounded to zero gets the gradient zero.

    Shapes     derror () -> dprob_NE, dlog_NE (N, E)
    """
    prob_NE, h_NE = cache
    dlog_NE = (-derror / max(prob_NE.shape[0], 1)) * h_NE  # 3. and 2.
    tiny = xp.finfo(prob_NE.dtype).tiny
    return dlog_NE / xp.maximum(prob_NE, tiny), dlog_NE  # 1.


def _gaps(y_NEO: Array, target_NO: Array) -> tuple[Array, Array]:
    """Subtract the target from every expert's output; also return the squared lengths (N, E)."""
    gap_NEO = y_NEO - target_NO[:, None, :]
    return gap_NEO, (gap_NEO * gap_NEO).sum(2)
