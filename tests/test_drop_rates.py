"""How many tokens a capacity drops when experts are drawn at random: closed form and simulation."""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest

from moe_numpy.config import Capacity
from moe_numpy.moe import capacity

FACTORS = (1.0, 1.25, 1.5, 2.0)
TABLE = {  # percent of the tokens that are dropped, for these factors
    (1024, 8): ("3.30", "0.00", "0.00", "0.00"),
    (1024, 32): ("6.92", "0.68", "0.02", "0.00"),
    (1024, 128): ("13.90", "5.27", "1.59", "0.08"),
    (4096, 128): ("7.01", "0.72", "0.02", "0.00"),
}
CELLS = [
    (tokens, experts, factor, printed)
    for (tokens, experts), row in TABLE.items()
    for factor, printed in zip(FACTORS, row, strict=True)
]


@functools.cache
def ways(tokens, experts):
    """Count the routings that send exactly x tokens to one expert: C(T, x) (E - 1)^(T - x)."""
    counts = [(experts - 1) ** tokens]
    for x in range(tokens):
        counts.append(counts[-1] * (tokens - x) // ((x + 1) * (experts - 1)))
    return counts


def expected_drop_rate(tokens, experts, places):
    """E / T * sum over x > C of (x - C) Binomial(x; T, 1 / E), in whole numbers."""
    return float(experts * moment(tokens, experts, places, 1) / tokens)


def moment(tokens, experts, places, power):
    """Average (x - C)^power over the routings, where one expert's x is above C."""
    counts = ways(tokens, experts)
    total = sum((x - places) ** power * counts[x] for x in range(places + 1, tokens + 1))
    return Fraction(total, experts**tokens)


def deviation(tokens, experts, places):
    """Bound the standard deviation of a batch's drop rate.

    What one expert gets the others do not: the covariances are negative and left out.
    """
    variance = moment(tokens, experts, places, 2) - moment(tokens, experts, places, 1) ** 2
    return math.sqrt(experts * variance) / tokens


def test_the_ways_are_those_of_the_binomial_distribution():
    assert sum(ways(40, 7)) == 7**40
    assert ways(40, 7)[13] == math.comb(40, 13) * 6**27


@pytest.mark.parametrize(("tokens", "experts", "factor", "printed"), CELLS)
def test_the_closed_form_gives_the_printed_table(tokens, experts, factor, printed):
    places = Capacity(factor=factor).places(tokens, 1, experts)
    assert places == factor * tokens / experts
    assert f"{100.0 * expected_drop_rate(tokens, experts, places):.2f}" == printed


@pytest.mark.parametrize("overflow", ["drop", "next_best"])
@pytest.mark.parametrize(("tokens", "experts", "factor", "printed"), CELLS)
def test_plans_for_uniform_random_routing_drop_at_that_rate(
    tokens, experts, factor, printed, overflow
):
    batches = 200 if overflow == "drop" else 2
    cfg = Capacity(factor=factor, overflow=overflow)
    places = cfg.places(tokens, 1, experts)
    expected = expected_drop_rate(tokens, experts, places)
    rng = np.random.default_rng([tokens, experts, int(100 * factor)])
    score_NE, rates = np.zeros((tokens, experts)), []
    for _ in range(batches):
        wished_NK = rng.integers(0, experts, (tokens, 1))
        if overflow == "next_best":
            score_NE = rng.random((tokens, experts))
            wished_NK = score_NE.argmax(1)[:, None]
        _, plan = capacity.make_plan(wished_NK, score_NE, score_NE, cfg)
        rates.append(1.0 - plan.token_R.size / tokens)
    if overflow == "next_best":
        assert rates == [0.0, 0.0]
    else:
        spread = np.std(rates, ddof=1)
        if expected * tokens < 1.0:  # too rare for the sample to know how rare
            spread = deviation(tokens, experts, places)
        assert abs(np.mean(rates) - expected) < 4.0 * spread / math.sqrt(batches)
