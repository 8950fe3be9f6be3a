"""The loss of a language model."""

from __future__ import annotations

from moe_numpy.backend import Array, Cache, xp
from moe_numpy.ops import linear, softmax


def cross_entropy_forward(
    logits_NV: Array, target_N: Array, smoothing: float = 0.0
) -> tuple[Array, Cache]:
    """Average the surprise at the targets, in nats.

        loss = -1/N sum_n sum_v t[n, v] log softmax(logits)[n, v]
        t = (1 - smoothing) onehot(target) + smoothing / V

    Shapes     logits_NV (N, V); target_N (N,) integers -> loss ()
    Units      nats per token; no tokens at all give zero
    Cache      (y_NV, target_N, smoothing): 4*N*V bytes in float32
    Raises     ValueError if there is not one target for each row, or one is outside the vocabulary
    Source     Szegedy et al. 2016, Rethinking the Inception Architecture, section 7 (smoothing)
    """
    N, V = logits_NV.shape
    linear.check_targets("cross_entropy_forward", target_N, N, V)
    y_NV, _ = softmax.log_softmax_forward(logits_NV)  # 1. log-probabilities
    hit_N = y_NV[xp.arange(N), target_N]
    total = (1.0 - smoothing) * hit_N.sum()  # 2. of the targets
    if smoothing:
        total = total + smoothing * y_NV.mean(-1).sum()
    return -total / max(N, 1), (y_NV, target_N, smoothing)  # 3. averaged


def cross_entropy_backward(dloss: Array, cache: Cache) -> Array:
    """Undo `cross_entropy_forward`.

    -sum_v t_v log p_v with p = softmax(z) and sum_v t_v = 1 has the gradient dz = p - t.

    Shapes     dloss () -> dlogits_NV (N, V)
    """
    y_NV, target_N, smoothing = cache
    N, V = y_NV.shape
    dlogits_NV = xp.exp(y_NV)  # 3. to 1. in one: p
    if smoothing:
        dlogits_NV -= smoothing / V
    dlogits_NV[xp.arange(N), target_N] -= 1.0 - smoothing  # - t
    dlogits_NV *= dloss / max(N, 1)
    return dlogits_NV
