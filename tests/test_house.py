"""The rules of the house, held by reading the source and by watching a model run."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moe_numpy
from moe_numpy.classroom import registry

ROOT = Path(__file__).parent.parent
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "moe_numpy").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
MATHEMATICS = ("ops", "moe", "transformer")

# A file imports from its own room and from those named here.
GROUND = {"backend", "config", "tree", "files", "progress", "machine", "processes"}
ROOMS = {
    **{room: set() for room in GROUND},
    "processes": {"backend", "config", "machine"},
    "ops": GROUND,
    "moe": GROUND | {"ops"},
    "transformer": GROUND | {"ops", "moe"},
    "training": GROUND | {"ops", "moe", "transformer"},
    "lab": GROUND | {"ops", "moe", "transformer", "training", "presets", "ledger"},
    "classroom": GROUND | {"ops", "moe", "transformer"},
    "ledger": {"config"},
    "presets": {"config", "ledger"},
    "systems": {"config", "ledger", "presets"},
}
ANY = set(ROOMS) | {"commands", "settings"}
ROOMS |= {"settings": ANY - {"commands"}, "commands": ANY, "__main__": {"commands"}, "": set()}


def imports(parsed):
    """List every module that a file imports, `import_module("...")` with a plain name included."""
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def room(name):
    return name.split(".")[1] if "." in name else ""


CALCULUS = {name: TREES[name] for name in SOURCES if room(name) in MATHEMATICS}


def docstring(node):
    return ast.get_docstring(node) or ""


def functions(parsed):
    return [node for node in parsed.body if isinstance(node, ast.FunctionDef)]


# ------------------------------------------------------------------------------------------- rooms
@pytest.mark.parametrize("name", SOURCES)
def test_a_file_imports_only_from_the_rooms_above_it(name):
    own = room(name)
    for found in imports(TREES[name]):
        if found.split(".")[0] == "moe_numpy":
            other = room(found)
            fine = other == own or other in ROOMS[own] or found == "moe_numpy.__version__"
            assert fine, f"{name} imports {found}"


def test_every_room_is_in_the_plan():
    assert {room(name) for name in SOURCES} <= ROOMS.keys()


@pytest.mark.parametrize("name", CALCULUS)
def test_the_mathematics_takes_its_arrays_from_the_backend(name):
    for found in imports(CALCULUS[name]):
        if found.split(".")[0] == "numpy":
            assert found.startswith("numpy.random."), f"{name} imports {found}"
        assert found.split(".")[0] not in ("scipy", "torch", "cupy", "matplotlib", "tqdm")


def test_cupy_is_named_in_the_backend_alone():
    naming = [n for n, path in SOURCES.items() if "cupy" in path.read_text("utf-8").lower()]
    assert naming == ["moe_numpy.backend"]


def test_modules_import_modules_so_that_a_swap_is_seen_everywhere():
    swappable = {f"{pair.module.__name__}.{pair.name}" for pair in registry.pairs().values()}
    for name, parsed in TREES.items():
        for found in imports(parsed):
            plain = found.removesuffix("_forward").removesuffix("_backward")
            assert plain == found or plain not in swappable, f"{name} imports {found}"


# ------------------------------------------------------------------------------------- randomness
def test_nobody_uses_the_legacy_random_numbers_or_draws_without_a_generator():
    allowed = {"Generator", "default_rng"}
    for name, parsed in TREES.items():
        for node in ast.walk(parsed):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(".random"):
                assert node.attr in allowed, f"{name}:{node.lineno} {ast.unparse(node)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("default_rng"):
                assert node.args, f"{name}:{node.lineno} draws without a seed"
        for found in imports(parsed):
            if found.startswith("numpy.random."):
                assert found.split(".")[2] in allowed
            assert found.split(".")[0] not in ("random", "secrets")


def test_only_the_commands_print():
    for name, parsed in TREES.items():
        calls = [n for n in ast.walk(parsed) if isinstance(n, ast.Call)]
        printing = [n.lineno for n in calls if getattr(n.func, "id", "") == "print"]
        assert not printing or name == "moe_numpy.commands", f"{name}:{printing}"


def test_nobody_unpickles_or_evaluates_text():
    for name, parsed in TREES.items():
        for found in imports(parsed):
            assert found.split(".")[0] not in ("pickle", "marshal", "shelve", "dill")
        for node in ast.walk(parsed):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in ("eval", "exec"), name
                loads = ast.unparse(node.func) in ("np.load", "numpy.load")
                assert not loads or "allow_pickle=False" in ast.unparse(node), name


# ------------------------------------------------------------------------------------------- pairs
PAIRS = [
    (name, f.name)
    for name, t in CALCULUS.items()
    for f in functions(t)
    if f.name.endswith("_forward")
]


def test_there_are_pairs_and_the_registry_knows_them_all():
    assert len(PAIRS) > 20
    assert {name.removesuffix("_forward") for _, name in PAIRS} == registry.pairs().keys()


@pytest.mark.parametrize(("home", "forward"), PAIRS)
def test_a_backward_stands_directly_under_its_forward(home, forward):
    names = [f.name for f in functions(CALCULUS[home])]
    at = names.index(forward)
    assert names[at + 1 : at + 2] == [forward.replace("_forward", "_backward")]


@pytest.mark.parametrize(("home", "forward"), PAIRS)
def test_a_pair_says_its_shapes_its_cache_and_its_source(home, forward):
    found = {f.name: docstring(f) for f in functions(CALCULUS[home])}
    words = {f: re.findall(r"^ *([A-Z][a-z]+) {2,}\S", doc, re.M) for f, doc in found.items()}
    assert {"Shapes", "Cache", "Source"} <= set(words[forward])
    assert "Shapes" in words[forward.replace("_forward", "_backward")]


def test_every_backward_has_a_forward():
    for name, parsed in CALCULUS.items():
        names = {f.name for f in functions(parsed)}
        for f in names:
            if f.endswith("_backward"):
                assert f.replace("_backward", "_forward") in names, f"{name}.{f}"


def test_everything_public_has_a_docstring():
    for name, parsed in TREES.items():
        if SOURCES[name].read_text("utf-8").strip():
            assert docstring(parsed), name
        for node in ast.walk(parsed):
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and node in (
                *parsed.body,
                *(inner for c in parsed.body if isinstance(c, ast.ClassDef) for inner in c.body),
            ):
                assert docstring(node), f"{name}:{node.lineno} {node.name}"


# ------------------------------------------------------------------------------------------ import
def fresh(code, env=None):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_resolves_and_an_unknown_one_does_not():
    assert len(moe_numpy.__all__) == len(set(moe_numpy.__all__)) >= 20
    for name in moe_numpy.__all__:
        assert callable(getattr(moe_numpy, name)), name
    assert set(moe_numpy.__all__) <= set(dir(moe_numpy))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = moe_numpy.nonsense
    names: dict = {}
    exec("from moe_numpy import *", names)
    assert set(moe_numpy.__all__) <= names.keys()


def test_a_swapped_function_is_the_one_you_get():
    with registry.swap("moe_forward", len):
        assert moe_numpy.moe_forward is len


def test_a_fresh_process_loads_no_optional_library():
    code = (
        "import sys, moe_numpy as m\n"
        "m.MoEConfig, m.moe_forward, m.loss_forward, m.generate, m.train, m.default_corpus\n"
        "print(*{n.split('.')[0] for n in sys.modules})"
    )
    heavy = {"matplotlib", "tqdm", "cupy", "scipy", "torch", "mpi4py", "safetensors", "jupyter"}
    assert "numpy" in fresh(code).split()
    assert not heavy & set(fresh(code).split())


def test_importing_the_package_loads_not_even_numpy():
    assert "numpy" not in fresh("import sys, moe_numpy; print(*sys.modules)").split()


def test_importing_the_package_takes_less_than_a_tenth_of_a_second_beyond_numpy(tmp_path):
    """Once Python has kept what it compiled, as it does unless an environment forbids it."""
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    code = (
        "import time, numpy; start = time.thread_time()  # BLAS threads spin beside it\n"
        "import moe_numpy; moe_numpy.moe_forward; print(time.thread_time() - start)"
    )
    _, *times = [float(fresh(code, env)) for _ in range(6)]
    assert np.median(times) < 0.1
