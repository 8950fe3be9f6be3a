"""Every backward of the package against central differences of its forward."""

import pytest

from moe_numpy.classroom import gradcheck, registry


@pytest.mark.parametrize("name", registry.pairs())
def test_a_pair_has_the_gradient_of_its_forward(name):
    [result] = gradcheck.check_all([name])
    assert result.passed, result.failures
    assert result.errors
