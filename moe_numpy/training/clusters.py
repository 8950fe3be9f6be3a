"""A regression task whose right division of labor is known: one expert for each cluster.

Every cluster of inputs has a target function of its own, so a router that finds the clusters can
be told from one that does not. Here E counts clusters, F hidden units of a target function, and O
target values.
"""

from dataclasses import dataclass

import numpy as np

from moe_numpy.config import rules

HIDDEN = 16  # hidden units of every target function
GAIN = 2.0  # standard deviation before the tanh: well beyond its linear part


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClusterTask:
    """Where the clusters lie, and the function that gives the targets of each.

        y = tanh((x - center) / spread @ w_in + b_in) @ w_out + b_out

    Attributes
    ----------
    spread : float
        Standard deviation of each input around the center of its cluster.
    center_EC : np.ndarray
        Centers of the clusters, standard normal unless scaled or shifted.
    w_in_ECF, b_in_EF, w_out_EFO, b_out_EO : np.ndarray
        The target function of each cluster.
    """

    spread: float
    center_EC: np.ndarray
    w_in_ECF: np.ndarray
    b_in_EF: np.ndarray
    w_out_EFO: np.ndarray
    b_out_EO: np.ndarray

    def target(self, x_NC: np.ndarray, cluster: int) -> np.ndarray:
        """Return y_NO, what the function of one cluster makes of any inputs."""
        z_NC = (x_NC - self.center_EC[cluster]) / self.spread
        hidden_NF = np.tanh(z_NC @ self.w_in_ECF[cluster] + self.b_in_EF[cluster])
        return hidden_NF @ self.w_out_EFO[cluster] + self.b_out_EO[cluster]


def cluster_task(
    rng: np.random.Generator | int,
    clusters: int = 4,
    width_in: int = 16,
    width_out: int = 8,
    spread: float = 0.5,
    center_scale: float = 1.0,
    shift: float = 0.0,
) -> ClusterTask:
    """Draw a task: centers, and a random tanh network for each.

    Parameters
    ----------
    rng : np.random.Generator or int
        Source of randomness; the same seed gives the same task.
    clusters, width_in, width_out : int
        Number of clusters (E), of input values (C) and of target values (O).
    spread : float
        Size of a cluster. Centers are about sqrt(2 * width_in) apart: with few inputs or a wide
        spread the clusters overlap.
    center_scale : float
        Factor on the centers; 0 puts all clusters around the origin.
    shift : float
        Size of each value of a random vector that all centers are moved by.

    Returns
    -------
    ClusterTask
        Within each cluster every target value has mean 0 and variance 1, to about 1%.

    Raises
    ------
    ValueError
        If a count is not positive, `spread` is not positive and finite, or another number is
        negative or not finite.
    """
    for name, count in {"clusters": clusters, "width_in": width_in, "width_out": width_out}.items():
        rules.whole_number("cluster_task", name, count, 1)
    rules.positive("cluster_task", "spread", spread, "Try 0.5.")
    for name, size in {"center_scale": center_scale, "shift": shift}.items():
        rules.not_negative("cluster_task", name, size)
    rng = np.random.default_rng(rng)
    center_EC = center_scale * rng.normal(size=(clusters, width_in))
    w_in_ECF = rng.normal(0, GAIN / np.sqrt(width_in), (clusters, width_in, HIDDEN))
    b_in_EF = rng.normal(size=(clusters, HIDDEN))
    w_out_EFO = rng.normal(size=(clusters, HIDDEN, width_out))

    # Standardize on a probe. Functions of different mean would give the clusters away.
    probe_NC = rng.normal(size=(20_000, width_in))
    raw_ENO = np.tanh(probe_NC @ w_in_ECF + b_in_EF[:, None]) @ w_out_EFO
    w_out_EFO /= raw_ENO.std(1)[:, None]
    b_out_EO = -raw_ENO.mean(1) / raw_ENO.std(1)
    if shift:
        center_EC += shift * rng.normal(size=width_in)
    return ClusterTask(
        spread=spread,
        center_EC=center_EC,
        w_in_ECF=w_in_ECF,
        b_in_EF=b_in_EF,
        w_out_EFO=w_out_EFO,
        b_out_EO=b_out_EO,
    )


def sample_clusters(
    rng: np.random.Generator | int,
    task: ClusterTask,
    n: int,
    dtype: np.typing.DTypeLike = np.float32,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw inputs with their targets, every cluster equally likely.

    Parameters
    ----------
    rng : np.random.Generator or int
        Source of randomness; an int gives the same sample every time.
    task : ClusterTask
        From `cluster_task`.
    n : int
        Number of inputs (N).
    dtype : floating dtype
        Of `x_NC` and `y_NO`.

    Returns
    -------
    x_NC, y_NO : np.ndarray
        Inputs and targets.
    cluster_N : np.ndarray
        The cluster of each input: the true partition.

    Raises
    ------
    ValueError
        If `n` is not positive or `dtype` is neither float32 nor float64.
    """
    rules.whole_number("sample_clusters", "n", n, 1)
    rules.float_type("sample_clusters", dtype)
    rng = np.random.default_rng(rng)
    clusters, width_in = task.center_EC.shape
    cluster_N = rng.integers(clusters, size=n)
    x_NC = task.center_EC[cluster_N] + task.spread * rng.normal(size=(n, width_in))
    y_NO = np.empty((n, task.b_out_EO.shape[1]))
    for cluster in range(clusters):
        mine_N = cluster_N == cluster
        y_NO[mine_N] = task.target(x_NC[mine_N], cluster)
    return x_NC.astype(dtype), y_NO.astype(dtype), cluster_N
