"""Plain twins of what was made fast: the judges of the fast ones, and what they are timed against.

Each twin computes the same function in the way that one would write first.
"""

import math

import numpy as np

from moe_numpy.moe import experts


# ----------------------------------------------------------------------- rows: NumPy's reductions
def sums(x):
    """Add each row up."""
    return x.sum(-1, keepdims=True)


def mean(x):
    """Average each row."""
    return x.mean(-1, keepdims=True)


def dots(x, y):
    """Multiply each row with its partner and add up."""
    return (x * y).sum(-1, keepdims=True)


def sum_columns(x):
    """Add all rows up."""
    return x.reshape(-1, x.shape[-1]).sum(0)


def maximum(x):
    """Find the largest number of each row."""
    return x.max(-1, keepdims=True)


# ------------------------------------------------------- activations: an array for every operation
def gelu_tanh_forward(x):
    """Compute x sigmoid(2 u)."""
    u = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)
    s = sigmoid(2.0 * u)
    return x * s, (x, s)


def gelu_tanh_backward(dy, cache):
    """Compute s + x s (1 - s) d(2u)/dx."""
    x, s = cache
    slope = 2.0 * math.sqrt(2.0 / math.pi) * (1.0 + 3.0 * 0.044715 * x * x)
    return dy * (s + x * s * (1.0 - s) * slope)


def swiglu_forward(gate, up):
    """Compute gate sigmoid(gate) up."""
    s = sigmoid(gate)
    return gate * s * up, (gate, up, s)


def swiglu_backward(dy, cache):
    """Compute both branches by the product rule."""
    gate, up, s = cache
    return dy * up * s * (1.0 + gate * (1.0 - s)), dy * gate * s


def sigmoid(x):
    """Compute 1 / (1 + exp(-x)) without an overflow."""
    return 1.0 / (1.0 + np.exp(-np.maximum(x, -80.0)))


# -------------------------------------------------------------- the way back: add where it belongs
def dispatch_backward(dx_RC, cache):
    """Add the gradient of every row to that of its token."""
    (plan,) = cache
    dx_NC = np.zeros((plan.slot_NK.shape[0], dx_RC.shape[1]), dx_RC.dtype)
    np.add.at(dx_NC, plan.token_R, dx_RC)
    return dx_NC


TWINS = {
    "rows": {
        "sums": sums,
        "mean": mean,
        "dots": dots,
        "sum_columns": sum_columns,
        "maximum": maximum,
    },
    "activations": {
        "gelu_tanh_forward": gelu_tanh_forward,
        "gelu_tanh_backward": gelu_tanh_backward,
        "swiglu_forward": swiglu_forward,
        "swiglu_backward": swiglu_backward,
    },
    "gather": {"dispatch_backward": dispatch_backward},
    "slices": {
        "grouped_linear_forward": experts.padded_linear_forward,
        "grouped_linear_backward": experts.padded_linear_backward,
    },
}
