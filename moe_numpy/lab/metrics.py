"""Measures of routing: how evenly the experts are used, and how sure the router is."""

from __future__ import annotations

import numpy as np


def share(load: np.ndarray) -> np.ndarray:
    """Turn counts per expert into shares of the whole.

    Parameters
    ----------
    load : array (..., E)
        Choices per expert.

    Returns
    -------
    array (..., E)
        Shares that sum to one; equal shares where there was no load at all.
    """
    load = np.asarray(load, float)
    total = load.sum(-1, keepdims=True)
    return np.where(total > 0, load / np.where(total > 0, total, 1.0), 1.0 / load.shape[-1])


def effective_experts(load: np.ndarray) -> np.ndarray:
    """Count the experts that are really used: the exponential of the load's entropy.

    E if all get the same, 1 if one gets everything, and k if k of them share evenly.

    Parameters
    ----------
    load : array (..., E)

    Returns
    -------
    array (...)
    """
    p = share(load)
    return np.exp(-(p * np.log(np.where(p > 0, p, 1.0))).sum(-1))


def dead_experts(load: np.ndarray, threshold: float = 0.01) -> np.ndarray:
    """Count the experts whose share of the load is below `threshold`."""
    return (share(load) < threshold).sum(-1)


def max_over_mean(load: np.ndarray) -> np.ndarray:
    """Divide the largest load by the mean load: 1 if all are equal, E if one gets everything."""
    p = share(load)
    return p.max(-1) * p.shape[-1]


def coefficient_of_variation(load: np.ndarray) -> np.ndarray:
    """Divide the standard deviation of the loads by their mean: 0 if all are equal."""
    p = share(load)
    return p.std(-1) * p.shape[-1]
