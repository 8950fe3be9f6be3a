"""Floating-point exceptions are errors in every test, and small matrices need one thread."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy starts its threads

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _no_silent_nonsense():
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        yield
