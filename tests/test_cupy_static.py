"""The source, held against the table of what CuPy offers; no CuPy is needed."""

import ast
from pathlib import Path

import make_cupy_interface
import pytest
from cupy_scan import TABLE, scan

ROOT = Path(__file__).parent.parent / "moe_numpy"
SOURCES = {
    str(path.relative_to(ROOT).with_suffix("")): path.read_text(encoding="utf-8")
    for path in sorted(ROOT.rglob("*.py"))
}
MATHEMATICS = ("ops/", "moe/", "transformer/", "training/optimizer")

# What looks like a crossing and is meant: file, function, what; and why.
ALLOWED = {
    ("ops/linear", "check_vocabulary", "int"): "looks at the values of host tokens only",
    ("moe/capacity", "_serve_next_best", "tolist"): "walks over a host table that crossed in one",
    ("moe/capacity", "_plan", "tolist"): "the routing sizes: the one crossing of an MoE layer",
    ("moe/experts", "truncated_normal", "rng"): "draws on the host until all lie inside",
    ("moe/assignment", "balanced_assignment", "tolist"): "walks over a table that crossed in one",
    ("moe/selection", "expert_choice", "tolist"): "how many experts a token got: the one crossing",
    ("transformer/generation", "generate", "int"): "the prompt is the caller's, on the host",
    ("transformer/decode", "_choose", "tolist"): "runs with NumPy alone, see `supports`",
    ("transformer/generation", "_draw", "int"): "a token has to cross to be read",
    ("transformer/generation", "_draw", "rng"): "the draw is compared on the host",
}


def findings(name):
    return scan(SOURCES[name], mathematics=name.startswith(MATHEMATICS))


def described(name):
    return [
        f"{name}.py:{found.line} {found.message}"
        for found in findings(name)
        if (name, found.function, found.what) not in ALLOWED
    ]


@pytest.mark.parametrize("name", SOURCES)
def test_cupy_would_take_this_file(name):
    assert described(name) == []


def test_every_exception_is_still_needed_and_has_a_reason():
    needed = {(name, f.function, f.what) for name in SOURCES for f in findings(name)}
    assert ALLOWED.keys() <= needed
    assert all(ALLOWED.values())


def test_nobody_asks_for_cupy_but_the_backend():
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            asked = isinstance(node, ast.Name | ast.alias | ast.Attribute | ast.Compare)
            if asked and "cupy" in ast.unparse(node).lower():
                assert name == "backend", f"{name}.py: {ast.unparse(node)}"


def test_the_scan_reads_files_that_use_xp():
    using = [name for name, source in SOURCES.items() if "xp." in source]
    assert sum(name.startswith(MATHEMATICS) for name in using) >= 12


def test_the_table_is_what_an_installed_cupy_offers():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed; the frozen table stands")
    if cupy.__version__ != TABLE["cupy"]:
        pytest.skip(f"the table is of CuPy {TABLE['cupy']}, installed is {cupy.__version__}")
    assert make_cupy_interface.interface(cupy) == TABLE
    assert make_cupy_interface.text(TABLE) == make_cupy_interface.TABLE.read_text("utf-8")
