"""Read Python source and name what CuPy would refuse, or what would secretly go to the host.

Two degrees. Everywhere: names, keywords and ufunc methods used through `xp`, against the table of
`cupy_interface.json`. In the mathematics also: no NumPy, no number read out of an array, no array
method or keyword that CuPy's arrays lack, no host draw that is not moved on the same line.
"""

import ast
import builtins
from typing import NamedTuple

import numpy as np
from strict_cupy import TABLE

RELEASE = f"CuPy {TABLE['cupy']}"
FUNCTIONS, UFUNCS, ARRAY = TABLE["functions"], TABLE["ufuncs"], TABLE["ndarray"]
NAMES = {*FUNCTIONS, *UFUNCS["names"], *TABLE["values"]}
UFUNC_METHODS = {n for n in dir(np.ufunc) if n[0] != "_" and callable(getattr(np.ufunc, n))}
READS = {"float", "int", "bool", "complex"}
CROSSES = {"item", "tolist", "tobytes", "get"}
DRAWS = {n for n in dir(np.random.Generator) if n[0] != "_"} - {"spawn", "bit_generator"}
OF_PYTHON = {n for kind in (list, dict, set, str, bytes, tuple) for n in dir(kind)}
SORTS = {"sort", "argsort"}


class Finding(NamedTuple):
    """Something CuPy would refuse: where (line, and the enclosing function), and in words."""

    line: int
    function: str
    what: str  # a short name, to allow it by
    message: str


def scan(source, mathematics=True):
    """List the findings in a source text."""
    scanner = Scanner(mathematics)
    scanner.visit(ast.parse(source))
    return sorted(set(scanner.findings))


def dotted(node):
    """Write `xp.linalg.norm` for the attribute that it is; None if its root is no plain name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


class Scanner(ast.NodeVisitor):
    """Walk a module and collect findings."""

    def __init__(self, mathematics):
        self.mathematics = mathematics
        self.findings, self.functions, self.modules, self.numpys = [], [], {"math"}, {"np", "numpy"}
        self.moved = set()

    def add(self, node, what, message):
        where = self.functions[-1] if self.functions else "<module>"
        self.findings.append(Finding(node.lineno, where, what, f"{where}: {message}"))

    def visit_FunctionDef(self, node):
        self.functions.append(node.name)
        self.generic_visit(node)
        self.functions.pop()

    def visit_Import(self, node):
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            self.modules.add(name)
            if alias.name.split(".")[0] == "numpy":
                self.numpys.add(name)
                if self.mathematics:
                    self.add(node, "np", "NumPy is imported into the mathematics; use xp")

    def visit_ImportFrom(self, node):
        self.modules |= {alias.asname or alias.name for alias in node.names}
        if self.mathematics and node.module == "numpy":
            self.add(node, "np", "a name of NumPy is imported into the mathematics; use xp")

    def visit_Attribute(self, node):
        name = dotted(node)
        root = name.split(".")[0] if name else ""
        if root == "xp":
            self.name_of_xp(node, name.split(".")[1:])
        elif root in self.numpys and self.mathematics:
            self.add(node, "np", f"{name} is NumPy's, whatever the backend; write xp.{node.attr}")
        if name is None:  # the chain may begin at a call, which has a name of its own
            self.generic_visit(node)

    def visit_Call(self, node):
        name = dotted(node.func) or ""
        if name == "to_device" and node.args:
            self.moved.add(node.args[0])
        if name.startswith("xp."):
            self.call_of_xp(node, name[3:])
        elif self.mathematics and name in READS:
            if not all(isinstance(argument, ast.Constant) for argument in node.args):
                text = ast.unparse(node)
                self.add(node, name, f"{text} waits for the device, to read a number out of it")
        elif self.mathematics and isinstance(node.func, ast.Attribute):
            self.method(node, node.func.attr, name.split(".")[0])
        self.generic_visit(node)

    def name_of_xp(self, node, parts):
        first, rest = parts[0], parts[1:]
        if first.startswith("__"):
            return
        if first == "random":
            self.add(node, "xp.random", "xp.random draws on the device; draw on the host and move")
        elif first not in NAMES:
            self.add(node, f"xp.{first}", f"xp.{first} is not in {RELEASE}")
        elif first == "linalg" and rest and rest[0] not in TABLE["linalg"]:
            self.add(node, f"xp.linalg.{rest[0]}", f"xp.linalg.{rest[0]} is not in {RELEASE}")
        elif first in UFUNCS["names"] and rest and rest[0] in UFUNC_METHODS:
            supported = UFUNCS["methods"].get(rest[0], [])
            if first not in supported and "*" not in supported:
                what = f"xp.{first}.{rest[0]}"
                self.add(node, what, f"{what} is not supported by {RELEASE}")

    def call_of_xp(self, node, name):
        keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
        home, _, last = name.rpartition(".")
        if name in UFUNCS["names"]:
            known = UFUNCS["keywords"]
        elif home in UFUNCS["names"]:
            known = ["axis", "dtype", "out", "keepdims", "indices", "b"]
        else:
            known = (TABLE["linalg"] if home == "linalg" else FUNCTIONS).get(last) or ["**"]
            if not {"*", "**"} & {*known} and len(node.args) > len(known):
                self.add(node, f"xp.{name}", f"xp.{name} takes {len(known)} arguments in {RELEASE}")
        for keyword in keywords:
            if keyword not in known and "**" not in known:
                self.add(node, f"{keyword}=", f"xp.{name} takes no {keyword}= in {RELEASE}")
        lists = (ast.List, ast.Tuple, ast.ListComp, ast.GeneratorExp)
        if name == "lexsort" or name in UFUNCS["names"]:
            if any(isinstance(argument, lists) for argument in node.args):
                self.add(node, f"xp.{name}", f"xp.{name} takes no tuple or list in {RELEASE}")
        self.kind(node, f"xp.{name}", last in SORTS)

    def method(self, node, name, root):
        """Judge a call `value.name(...)` as if the value were an array, unless it cannot be one."""
        if name in CROSSES:
            self.add(node, name, f".{name}() brings a value to the host")
        if root == "rng" and name in DRAWS and node not in self.moved:
            self.add(node, "rng", f"rng.{name}(...) stays on the host; wrap it in to_device")
        if root in self.modules or hasattr(builtins, root) or not hasattr(np.ndarray, name):
            return
        known = ARRAY["methods"].get(name)
        keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
        if known is None:
            self.add(node, name, f"{RELEASE}'s arrays have no method {name}")
            return
        if name in OF_PYTHON and not {*keywords} & {"axis", "kind", "stable", "order"}:
            return
        for keyword in keywords:
            if keyword not in known and "**" not in known:
                self.add(node, f"{keyword}=", f".{name} takes no {keyword}= in {RELEASE}")
        self.kind(node, f".{name}", name in SORTS)

    def kind(self, node, who, sorts):
        for keyword in node.keywords:
            if sorts and keyword.arg == "kind":
                if getattr(keyword.value, "value", None) not in (None, "stable"):
                    self.add(node, "kind=", f"{who} knows no kind= but 'stable' in {RELEASE}")
