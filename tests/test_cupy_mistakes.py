"""Mistakes against CuPy, planted in a pair: the scan and the stand-in name them.

Each is a body of `softmax_forward` that NumPy takes without a word. The text goes to the scan; the
function takes the place of the real one while an MoE layer runs on the stand-in.
"""

import re
import textwrap
import traceback

import numpy as np
import pytest
import strict_cupy
from cupy_scan import scan
from test_cupy_stand_in import drawn_cases, each

from moe_numpy.backend import to_device, xp
from moe_numpy.classroom import registry
from moe_numpy.moe import experts

RIGHT = "p = xp.exp(z - z.max(-1, keepdims=True))"
# The mistake; what the scan calls it; what the stand-in says (None: beyond its sight).
MISTAKES = {
    "an np. call": (
        "p = np.exp(z - z.max(-1, keepdims=True))",
        r"np\.exp is NumPy's",
        r"np\.exp was given a device array",
    ),
    "maximum.reduce": (
        "p = xp.exp(z - xp.maximum.reduce(z, axis=-1, keepdims=True))",
        r"xp\.maximum\.reduce is not supported",
        r"maximum\.reduce` is not supported",
    ),
    "where= on a reduction": (
        "p = xp.exp(z - xp.max(z, -1, keepdims=True, where=z > -99.0, initial=-99.0))",
        r"xp\.max takes no where=",
        r"xp\.max takes no where=",
    ),
    "where= on a reduction, as a method": (
        "p = xp.exp(z - z.max(-1, keepdims=True, where=z > -99.0, initial=-99.0))",
        r"\.max takes no where=",
        r"ndarray\.max takes no where=",
    ),
    "where= on a ufunc": (
        "p = xp.exp(z - z.max(-1, keepdims=True), where=True)",
        r"xp\.exp takes no where=",
        r"exp takes no where=",
    ),
    "float() inside the layer": (
        "p = xp.exp(z - float(z.max()))",
        r"float\(z\.max\(\)\) waits for the device",
        "float",
    ),
    ".item() inside the layer": ("p = xp.exp(z - z.max().item())", r"\.item\(\) brings", "item"),
    "np.asarray of a device array": (
        "p = xp.asarray(np.exp(np.asarray(z)))",
        r"np\.asarray is NumPy's",
        r"Implicit conversion of a device array to a NumPy array",
    ),
    "a host generator's array": (
        "rng = default_rng(0); p = xp.exp(z + rng.standard_normal(z.shape))",
        r"rng\.standard_normal\(\.\.\.\) stays on the host",
        r"got a numpy\.ndarray beside device arrays",
    ),
    "a host array to the left": (
        "rng = default_rng(0); p = xp.exp(rng.standard_normal(z.shape) + z)",
        r"rng\.standard_normal\(\.\.\.\) stays on the host",
        r"add mixes a NumPy array with a device array",
    ),
    "lexsort of a tuple": (
        "p = xp.exp(z[xp.lexsort((z[:, 0], z[:, 1]))])",
        r"xp\.lexsort takes no tuple",
        r"xp\.lexsort got a tuple",
    ),
    "errstate": (
        "with xp.errstate(over='ignore'): p = xp.exp(z)",
        r"xp\.errstate is not in CuPy",
        r"no attribute 'errstate'",
    ),
    "an index of the host": (
        "rng = default_rng(0); p = xp.exp(z[rng.permutation(len(z))])",
        r"rng\.permutation\(\.\.\.\) stays on the host",
        r"indexed by a ndarray",
    ),
    "a list as an index": ("p = xp.exp(z[[*range(len(z))]])", None, r"indexed by a list"),
    "a list beside an array": (
        "p = xp.exp(xp.subtract(z, [1.0] * z.shape[1]))",
        None,
        r"subtract got a list",
    ),
    "a count that the device knows": (
        "p = xp.exp(z); assert len(range(z.argmax())) >= 0",
        None,
        r"cannot be interpreted as an integer",
    ),
    "a size that the device knows": (
        "p = xp.exp(z); xp.zeros(z.argmax())",
        None,
        r"a device array cannot be read as shape",
    ),
    "stable= of a sort": (
        "p = xp.exp(z); xp.argsort(z, axis=1, stable=True)",
        r"xp\.argsort takes no stable=",
        r"xp\.argsort takes no stable=",
    ),
    "another kind of sort": (
        "p = xp.exp(z); z.argsort(axis=1, kind='heapsort')",
        r"\.argsort knows no kind= but 'stable'",
        r"kind can only be None or 'stable'",
    ),
    "a function that CuPy lacks": (
        "p = xp.exp(z); xp.linalg.vector_norm(z)",
        r"xp\.linalg\.vector_norm is not in CuPy",
        r"no attribute 'vector_norm'",
    ),
    "a method that CuPy lacks": (
        "p = xp.exp(z); p.setflags(write=True)",
        r"arrays have no method setflags",
        r"no attribute 'setflags'",
    ),
    "a draw on the device": (
        "p = xp.exp(z + xp.random.default_rng(0).random(z.shape))",
        r"xp\.random draws on the device",
        r"no attribute 'random'",
    ),
}


def source(body):
    lines = f"{body}\np /= p.sum(-1, keepdims=True)\nreturn p, (p,)"
    return "def softmax_forward(z):\n" + textwrap.indent(lines, "    ")


def planted(body):
    names = {"xp": xp, "np": np, "default_rng": np.random.default_rng}
    exec(source(body), names)
    return registry.swap("softmax_forward", names["softmax_forward"])


def run_layer(move):
    case = drawn_cases("moe")[2]
    return registry.pair("moe").forward(*each(case.args, move))


@pytest.mark.parametrize(
    ("body", "expected"),
    [pytest.param(body, text, id=n) for n, (body, text, _) in MISTAKES.items() if text],
)
def test_the_scan_names_the_mistake(body, expected):
    messages = [found.message for found in scan(source(body))]
    assert any(message.startswith("softmax_forward: ") for message in messages)
    assert any(re.search(expected, message) for message in messages)


@pytest.mark.parametrize(
    ("body", "expected"),
    [pytest.param(body, said, id=n) for n, (body, _, said) in MISTAKES.items()],
)
def test_the_stand_in_names_the_mistake_that_numpy_takes(body, expected):
    with planted(body):
        run_layer(lambda x: x)
    with planted(body), strict_cupy.device() as crossings:
        if expected in ("float", "item"):  # CuPy does it, and waits
            run_layer(to_device)
            assert (expected, "softmax_forward") in [(c.what, c.function) for c in crossings]
            return
        with pytest.raises((TypeError, AttributeError, NotImplementedError, ValueError)) as error:
            run_layer(to_device)
    error.match(expected)
    assert "softmax_forward" in [f.name for f in traceback.extract_tb(error.tb)]


def test_what_is_right_is_not_called_a_mistake(monkeypatch):
    monkeypatch.setattr(experts, "few_launches", lambda: False)  # padding rounds differently
    assert scan(source(RIGHT)) == []
    with planted(RIGHT):
        expected = run_layer(lambda x: x)[0]
    with planted(RIGHT), strict_cupy.device() as crossings:
        found = run_layer(to_device)[0]
    assert found.get().tobytes() == expected.tobytes()
    assert {c.function for c in crossings if not c.hidden} == {"_plan"}


def test_the_array_refuses_every_way_out_but_get():
    with strict_cupy.device() as crossings:
        x = xp.arange(3.0)
        ways = (np.asarray, np.array, np.sum, lambda x: np.stack([x, x]), hash)
        for way in ways:
            with pytest.raises(TypeError):
                way(x)
        assert not isinstance(x, np.ndarray)
        assert crossings == []
        assert (x.get().tolist(), x[1].ndim, float(x[1])) == ([0.0, 1.0, 2.0], 0, 1.0)
    assert [c.what for c in crossings] == ["get", "float"]


def test_arrays_on_the_device_are_copies_and_their_parts_are_views():
    host = np.zeros(3)
    with strict_cupy.device():
        x = to_device(host)
        x[0] += 1.0
        part = x[2]
        part += 5.0
    assert (host.tolist(), x.get().tolist()) == ([0.0] * 3, [1.0, 0.0, 5.0])
