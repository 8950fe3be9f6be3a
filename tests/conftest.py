"""Floating-point exceptions are errors in every test."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _no_silent_nonsense():
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        yield
