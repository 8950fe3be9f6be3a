"""Losses of count models: the lines that a character model has to beat."""

import numpy as np

from moe_numpy.config import rules


def reference_losses(
    train: np.ndarray, validation: np.ndarray, vocab_size: int, max_order: int = 5
) -> dict[str, float]:
    """Score Witten-Bell n-gram models, fitted on one split, on the other.

        p_n(c | h) = (count(h, c) + distinct(h) * p_{n-1}(c | h')) / (count(h) + distinct(h))

    h is the n-1 characters before c, and h' is h without its oldest one. count(h) says how often
    some character followed h in `train`, distinct(h) how many different ones did: the more often
    h was followed by something new, the more weight the shorter context has. A context that never
    occurred leaves all of it to p_{n-1}. Below the unigram stands the uniform p_0 = 1/vocab_size.

    Every model predicts every character of `validation`, from context inside `validation`: where
    fewer than n-1 characters come before it, the longest order that fits.

    Parameters
    ----------
    train, validation : np.ndarray
        Ids, 1-D.
    vocab_size : int
        Number of different ids.
    max_order : int
        The longest n.

    Returns
    -------
    dict of str to float
        Nats per character on `validation`: "uniform", "unigram", "2-gram", "3-gram" and so on.

    Raises
    ------
    ValueError
        If a split is empty or holds an id outside the vocabulary, or `max_order` is below 1.

    Notes
    -----
    Source: Witten & Bell 1991, method C; Chen & Goodman 1999, section 2.5, for the recursion.
    """
    _require_ids("train", train, vocab_size)
    _require_ids("validation", validation, vocab_size)
    rules.whole_number("reference_losses", "max_order", max_order, 1)
    p = np.full(len(validation), 1 / vocab_size)
    losses = {"uniform": _nats(p)}
    # A context is known by its rank among all of its length, so that no number outgrows int64:
    # the only context of length zero has rank 0. The last one has nothing after it to predict.
    train_context = np.zeros(len(train), np.int64)
    context = np.zeros(len(validation), np.int64)
    contexts = 1
    for order in range(1, max_order + 1):
        before = order - 1
        train_gram = train_context * vocab_size + train[before:]
        gram = context * vocab_size + validation[before:]
        grams, rank = np.unique(np.concatenate([train_gram, gram]), return_inverse=True)
        train_rank, rank = rank[: len(train_gram)], rank[len(train_gram) :]

        gram_count = np.bincount(train_rank, minlength=len(grams))
        count = np.bincount(train_context, minlength=contexts)
        distinct = np.bincount(grams[gram_count > 0] // vocab_size, minlength=contexts)
        p[before:] = _back_off(gram_count[rank], count[context], distinct[context], p[before:])
        losses["unigram" if order == 1 else f"{order}-gram"] = _nats(p)

        # What was just predicted joins the context of the character after it.
        train_context, context, contexts = train_rank[:-1], rank[:-1], len(grams)
    return losses


def _back_off(
    gram_count: np.ndarray, count: np.ndarray, distinct: np.ndarray, shorter: np.ndarray
) -> np.ndarray:
    seen = count > 0
    total = np.where(seen, count + distinct, 1)
    return np.where(seen, (gram_count + distinct * shorter) / total, shorter)


def _nats(p: np.ndarray) -> float:
    return float(-np.log(p).mean())


def _require_ids(name: str, ids: np.ndarray, vocab_size: int) -> None:
    if len(ids) == 0:
        raise ValueError(
            f"reference_losses: {name} must hold at least one character, got none. Bring more text."
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"reference_losses: {name} must satisfy 0 <= id < vocab_size ({vocab_size}), got ids "
            f"from {ids.min()} to {ids.max()}. Pass the vocab_size of the corpus."
        )
