"""The normal distribution: NumPy has no erf, so its integral is computed here.

With u = |x| / sqrt(2), the upper tail is 1 - Phi(|x|) = erfc(u) / 2, and

    erfc(u) = exp(-u^2) / (1 + 2 u) * q(t),    t = (u - 3) / (u + 3)

where q is smooth on [-1, 1] and a polynomial of degree 23 meets it to the last bits of float64: the
largest error of Phi is below 5e-16. The coefficients are the Chebyshev expansion of q, computed
with 50 digits and written in powers of t. Its derivative is the exact density.

Source     Shepherd and Laframboise 1981, Chebyshev approximation of (1 + 2x) exp(x^2) erfc x;
           differs: centered at 3, degree chosen for float64
"""

from __future__ import annotations

import math

from moe_numpy.backend import Array, xp

# fmt: off
_Q = (
    1.2530080582697296, -0.13562110612458117, -0.04756229435342038, 0.1296451587027594,
    -0.11927366341676002, 0.0683080273440099, -0.023770514891530075, 0.0025293918156939696,
    0.0018886900977441495, -0.0007798322696543306, -0.00010515831297813128, 0.0001250993424583729,
    4.94412434222366e-06, -2.0100542268525612e-05, -7.187883834404266e-07, 3.472370944977168e-06,
    3.3669790806407595e-07, -6.166011460398726e-07, -1.205414228648938e-07, 1.0183620603842736e-07,
    2.7843881265502222e-08, -1.3312919661038687e-08, -3.1813541434969274e-09, 9.862533510345587e-10,
)
# fmt: on


def normal_cdf(x: Array) -> Array:
    """Compute Phi(x), the chance that a standard normal number is below x, for every element."""
    u = xp.abs(x) * math.sqrt(0.5)
    t = (u - 3.0) / (u + 3.0)
    tail = xp.full_like(t, _Q[-1])
    for coefficient in reversed(_Q[:-1]):
        tail *= t
        tail += coefficient
    tail *= 0.5 * xp.exp(-u * u) / (1.0 + 2.0 * u)
    return 0.5 + xp.copysign(0.5 - tail, x)


def normal_pdf(x: Array) -> Array:
    """Compute phi(x), the density of the standard normal distribution: the derivative of Phi."""
    return xp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
