"""Write down what CuPy offers, in `cupy_interface.json`: run by hand with each release of CuPy.

    python -m venv cupy-env && cupy-env/bin/pip install cupy-cuda12x
    cupy-env/bin/python tests/make_cupy_interface.py

CuPy imports without a GPU and without a driver, so this needs neither. Names and parameters come
from `inspect`, or from the first line of a docstring where CuPy is compiled. What cannot be looked
up is tried: a ufunc method that is not supported refuses before it touches a device, and one that
is supported asks the array to do the work, here a mock that notes the call.

The table
    functions    name -> its parameters in order; "*" and "**" where it takes any; null: unknown
    linalg       the same for the submodule of that name
    synchronize  functions that wait for the device, by the notes in CuPy's own source
    ufuncs       names of the element-wise functions, and what their calls and methods accept
    values       constants, types, and submodules: names only
    ndarray      methods with their parameters, attributes, and operators
"""

from __future__ import annotations

import inspect
import json
import re
import types
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("cupy_interface.json")
UFUNC_METHODS = ("reduce", "accumulate", "reduceat", "at", "outer")
UFUNC_KEYWORDS = ("out", "dtype", "casting", "where", "order", "subok", "signature", "axis")
COMPILED = ("argwhere",)  # waits in code whose source is not installed
CONVERSIONS = ("__float__", "__int__", "__bool__", "__complex__", "__format__", "__str__")


class Mock:
    """Stands for an array: whatever is asked of it, it notes that it was asked."""

    def __init__(self) -> None:
        self.asked = False

    def __getattr__(self, name: str) -> Any:
        self.asked = True
        return lambda *_: None


def parameters(function: Any) -> list[str] | None:
    """List the names that a function takes, "*" and "**" for any number of them."""
    try:
        found = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return written(function)
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [marks.get(p.kind, p.name) for p in found if p.name != "self"]


def written(function: Any) -> list[str] | None:
    """Read the names out of a docstring's first line, `sum(self, axis=None) -> ndarray`."""
    line = (function.__doc__ or "").strip().split("\n")[0]
    match = re.fullmatch(r"[\w.]+\((.*)\)(?: -> .*)?", line)
    if match is None:
        return None
    names = []
    for part in match[1].split(","):
        name = part.split("=")[0].strip().split(" ")[-1]
        if name not in ("self", "", "*"):  # a lone star takes nothing
            names.append("*" * (len(name) - len(name.lstrip("*"))) or name)
    return names


def waits(function: Any) -> bool:
    """Tell whether the source says that the function synchronizes (not: that it avoids it)."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return False
    return bool(re.search(r"synchronizes?(!| the device\.| if|$)|device synchronization\.", source))


def supports(ufunc: Any, method: str) -> bool:
    """Try a method of a ufunc on a mock."""
    if method == "outer":
        return hasattr(ufunc, "outer")  # of any ufunc, by broadcasting
    mock = Mock()
    try:
        getattr(ufunc, method)(*((mock,) if method in ("reduce", "accumulate") else (mock, None)))
    except NotImplementedError:
        return False
    return mock.asked


def accepts(ufunc: Any, keyword: str) -> bool:
    """Try a keyword of a ufunc's call; a foreign one is refused before any device is needed."""
    try:
        ufunc(1.0, **{keyword: None})
    except TypeError as error:
        return "Wrong arguments" not in str(error)
    except Exception:  # no driver
        return True
    return True


def interface(cupy: types.ModuleType) -> dict[str, Any]:
    """Build the table."""
    public = {n: getattr(cupy, n) for n in sorted(dir(cupy)) if not n.startswith("_")}
    ufuncs = {n: f for n, f in public.items() if isinstance(f, cupy.ufunc)}
    values = {
        n for n, v in public.items() if not callable(v) or isinstance(v, type | types.ModuleType)
    }
    functions = {n: f for n, f in public.items() if n not in ufuncs and n not in values}
    linalg = {n: f for n, f in vars(cupy.linalg).items() if inspect.isfunction(f) and n[0] != "_"}
    methods = {
        m: [n for n, f in ufuncs.items() if supports(f, m)] for m in UFUNC_METHODS if m != "outer"
    }
    array = {n: getattr(cupy.ndarray, n) for n in sorted(dir(cupy.ndarray))}
    members = {n: o for n, o in array.items() if n[0] != "_"}
    slots = set(vars(object)) - {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
    operators = [n for n in array if n.startswith("__") and callable(array[n]) and n not in slots]
    return {
        "cupy": cupy.__version__,
        "functions": {n: parameters(f) for n, f in functions.items()},
        "linalg": {n: parameters(f) for n, f in sorted(linalg.items())},
        "synchronize": sorted({n for n, f in functions.items() if waits(f)} | {*COMPILED}),
        "ufuncs": {
            "names": list(ufuncs),
            "keywords": [k for k in UFUNC_KEYWORDS if accepts(cupy.exp, k)],
            "methods": {**methods, "outer": ["*"]},
            # Not to be had from the outside: cupy/_core/_routines_indexing.pyx.
            "at subtract takes": ["int32", "uint32"],
        },
        "values": sorted(values),
        "ndarray": {
            "methods": {n: parameters(m) for n, m in members.items() if callable(m)},
            "attributes": [n for n, m in members.items() if not callable(m)],
            "operators": operators + [n for n in CONVERSIONS if n in array and n not in operators],
        },
    }


def text(table: dict[str, Any]) -> str:
    """Write JSON with one name a line where names have parameters, and else many names a line."""

    def write(value: Any, indent: str) -> str:
        if isinstance(value, dict):
            deeper = indent + " "
            rows = [f'\n{deeper}"{name}": {write(part, deeper)}' for name, part in value.items()]
            return "{" + ",".join(rows) + f"\n{indent}" + "}"
        return json.dumps(value)

    return write(table, "") + "\n"


if __name__ == "__main__":
    import cupy

    TABLE.write_text(text(interface(cupy)), encoding="utf-8")
    print(f"{TABLE}: CuPy {cupy.__version__}, {TABLE.stat().st_size} bytes")
