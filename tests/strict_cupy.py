"""A stand-in for CuPy that computes with NumPy and refuses what CuPy would refuse.

Inside `device()` the name "cupy" imports a module that has the names of `cupy_interface.json`, and
no others. Its arrays hold NumPy arrays, so every number is NumPy's to the last bit; but they do not
turn into NumPy arrays by themselves, do not mix with them, lack the keywords that CuPy lacks, and
stay arrays of no axes where NumPy returns a number. In doubt it refuses more than CuPy does: a
function of NumPy given a device array works with CuPy (by dispatch), and is an error here.

Every value that crosses to the host is noted, and so is every call that waits for the device
without handing a value over. Not imitated: speed, the order of additions, indices out of range.
"""

import contextlib
import json
import operator
import sys
import types
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_numpy import backend

TABLE = json.loads(Path(__file__).with_name("cupy_interface.json").read_text(encoding="utf-8"))
SCALARS = (bool, int, float, complex, np.generic)
TAKES_HOST_DATA = {"array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray"}
TAKES_A_TUPLE_OF_ARRAYS = {"tup"}  # the parameter's name in CuPy
TAKES_HOST_NUMBERS = set(
    "shape newshape axis axes axis1 axis2 repeats reps start stop step num N k kth minlength "
    "pad_width shift source destination indices_or_sections decimals subok ddof".split()
)
CROSSES = {"item", "tolist", "tobytes", "tofile", "dump", "dumps"}  # besides get
BINARY = "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()
COMPARISONS = "eq ne lt le gt ge".split()
ATTRIBUTES = "T mT dtype imag itemsize nbytes ndim real shape size strides".split()


class Crossing(NamedTuple):
    """One wait for the device: `what` made it, in which function of the package, at which line."""

    hidden: bool  # no value was asked for
    what: str
    function: str
    line: int


crossings: list[Crossing] = []  # of the innermost device()


@contextlib.contextmanager
def device():
    """Compute on the stand-in inside the block; yield the list of the crossings in it."""
    global crossings
    before, cupy = (crossings, sys.modules.get("cupy")), module()
    crossings, sys.modules["cupy"] = [], cupy
    try:
        with backend.use_backend("cupy"):
            yield crossings
    finally:
        crossings = before[0]
        sys.modules.pop("cupy")
        if before[1] is not None:
            sys.modules["cupy"] = before[1]


def note(what, hidden=False):
    """Write down a crossing, and who in the package caused it."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename in (__file__, backend.__file__):
        frame = frame.f_back
    crossings.append(Crossing(hidden, what, frame.f_code.co_name, frame.f_lineno))


# ------------------------------------------------------------------------------------------ arrays
class ndarray:  # noqa: N801, the name it has in CuPy
    """An array that is to be thought of as lying on the device."""

    __slots__ = ("_a",)
    __array_priority__ = 100

    def __init__(self, *_):
        raise TypeError("make device arrays with xp.asarray, xp.zeros, ...")

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion of a device array to a NumPy array: use to_host.")

    def __array_function__(self, function, *_):
        name = function.__name__
        raise TypeError(f"np.{name} was given a device array: write xp.{name}.")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        hosts = [x for x in (*inputs, *kwargs.get("out", ())) if isinstance(x, np.ndarray)]
        if hosts:
            raise TypeError(f"{ufunc.__name__} mixes a NumPy array with a device array: use xp.")
        if method == "__call__" and any(isinstance(x, np.generic) for x in inputs):
            return wrap(ufunc(*(operand(x, ufunc.__name__) for x in inputs), **kwargs))
        raise TypeError(f"np.{ufunc.__name__} was given a device array: use xp's.")

    def __getitem__(self, key):
        key = opened_key(key)
        found = self._a[key]
        if isinstance(found, np.generic):  # a view of no axes, where NumPy makes a number
            found = self._a[(*key, ...) if type(key) is tuple else (key, ...)]
        return wrap(found)

    def __setitem__(self, key, value):
        self._a[opened_key(key)] = operand(value, "x[...] =")

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __matmul__(self, other):
        return wrap(self._a @ array_only(other, "@"))

    def __rmatmul__(self, other):
        return wrap(array_only(other, "@") @ self._a)

    def get(self, stream=None, order="C", out=None, blocking=True):
        """Bring the array to the host."""
        note("get")
        return self._a.copy()

    @property
    def flags(self):
        """Tell the layout, in the three names that CuPy has."""
        found = self._a.flags
        names = ("c_contiguous", "f_contiguous", "owndata")
        return types.SimpleNamespace(**{name: getattr(found, name) for name in names})


def wrap(value):
    """Put what NumPy returned on the device: numbers as arrays of no axes."""
    if isinstance(value, np.ndarray | np.generic):
        made = object.__new__(ndarray)
        made._a = np.asarray(value)
        if made._a.dtype.kind not in "biufc":
            raise ValueError(f"Unsupported dtype {made._a.dtype}")
        return made
    return type(value)(map(wrap, value)) if type(value) in (tuple, list) else value


def operand(value, who):
    """Open an operand: a device array or a number, nothing else."""
    if type(value) is ndarray:
        return value._a
    if isinstance(value, SCALARS):
        return value
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    raise TypeError(f"Unsupported type: {who} got a {kind} beside device arrays; move it first.")


def array_only(value, who):
    """Open an operand that has to be an array."""
    if type(value) is not ndarray:
        operand(value, who)
        raise TypeError(f"{who} got a number where a device array belongs.")
    return value._a


def opened_key(key):
    """Open an index; a mask waits for the device to count what it selects."""
    if type(key) is tuple:
        return tuple(map(opened_key, key))
    if type(key) is ndarray:
        if key.dtype.kind == "b":
            note("mask", hidden=True)
        return key._a
    if isinstance(key, np.ndarray | list):
        raise TypeError(f"Unsupported type: a device array was indexed by a {type(key).__name__}.")
    return key


def arithmetic(name, function, reflected=False, in_place=False):
    """Build the method of one operator."""

    def method(self, other):
        other = operand(other, name)
        result = function(other, self._a) if reflected else function(self._a, other)
        return self if in_place else wrap(result)

    return method


def converting(name, function):
    """Build the method by which Python reads a number out of an array."""

    def method(self, *args):
        note(name)
        return function(self._a[()], *args)

    return method


def array_method(name, names):
    """Build a method that exists in both libraries."""

    def method(self, *args, **kwargs):
        args, kwargs = opened(f"ndarray.{name}", names, args, kwargs)
        if name in CROSSES:
            note(name)
            return getattr(self._a, name)(*args, **kwargs)
        if name == "nonzero":
            note(name, hidden=True)
        return wrap(getattr(self._a, name)(*args, **kwargs))

    return method


def furnish():
    """Give the class the operators, methods and attributes that the table lists."""
    special = {"int": int, "float": float, "complex": complex, "bool": bool, "str": str}
    made = {f"__{n}__": converting(n, f) for n, f in (special | {"format": format}).items()}
    made["__repr__"] = converting("repr", repr)
    for name in BINARY:
        plain = getattr(operator, f"__{name}__")
        made[f"__{name}__"] = arithmetic(name, plain)
        made[f"__r{name}__"] = arithmetic(name, plain, reflected=True)
        made[f"__i{name}__"] = arithmetic(name, getattr(operator, f"__i{name}__"), in_place=True)
    made |= {f"__{n}__": arithmetic(n, getattr(operator, n)) for n in COMPARISONS}
    for name in ("neg", "pos", "abs", "invert"):
        function = getattr(operator, name)
        made[f"__{name}__"] = lambda self, function=function: wrap(function(self._a))
    operators = {*TABLE["ndarray"]["operators"], "__repr__"}
    made = {name: method for name, method in made.items() if name in operators}
    for name, names in TABLE["ndarray"]["methods"].items():
        if hasattr(np.ndarray, name):
            made[name] = array_method(name, names)
    for name in {*ATTRIBUTES} & {*TABLE["ndarray"]["attributes"]}:
        made[name] = property(lambda self, name=name: wrap_view(getattr(self._a, name)))
    for name, member in made.items():
        setattr(ndarray, name, member)
    ndarray.__hash__ = None


def wrap_view(value):
    """Wrap the attributes that are arrays (T, real, imag)."""
    return wrap(value) if isinstance(value, np.ndarray) else value


furnish()


# --------------------------------------------------------------------------------------- functions
def opened(who, names, args, kwargs):
    """Check arguments against the table and open the arrays among them."""
    for keyword in kwargs:
        if names is not None and keyword not in names and "**" not in names:
            raise TypeError(f"{who} takes no {keyword}= in CuPy")
    if names is not None and "*" not in names and len(args) > len(names):
        raise TypeError(f"{who} takes {len(names)} arguments in CuPy, got {len(args)}")
    places = [] if names is None or "*" in names[:1] else [n for n in names if n[0] != "*"]
    rest = "shape" if who.startswith("ndarray.") else "*"  # of reshape and transpose
    places += [rest] * (len(args) - len(places))
    if kwargs.get("kind") not in (None, "stable"):
        raise ValueError(f"{who}: kind can only be None or 'stable' in CuPy")
    args = [argument(who, place, value) for place, value in zip(places, args, strict=False)]
    return args, {name: argument(who, name, value) for name, value in kwargs.items()}


def argument(who, place, value):
    """Open one argument by what belongs in its place."""
    if place in TAKES_HOST_NUMBERS:
        for part in value if isinstance(value, tuple | list) else (value,):
            if type(part) is ndarray:
                raise TypeError(f"{who}: a device array cannot be read as {place}: no __index__")
        return value
    if place in TAKES_A_TUPLE_OF_ARRAYS:
        return [array_only(part, who) for part in value]
    if isinstance(value, np.ndarray | list | tuple | set | range):
        return operand(value, who)  # refuses
    return value._a if type(value) is ndarray else value


def function(name, who, numpys, names):
    """Build a function of the module."""

    def call(*args, **kwargs):
        if name in TAKES_HOST_DATA:
            first, args = moved(args[0]), args[1:]
            args, kwargs = opened(who, names[1:], args, kwargs)
            return wrap(numpys(first, *args, **kwargs))
        if name in TABLE["synchronize"] or (name == "where" and len(args) + len(kwargs) == 1):
            note(name, hidden=True)
        out = kwargs.get("out")
        args, kwargs = opened(who, names, args, kwargs)
        result = wrap(numpys(*args, **kwargs))
        return result if out is None else out

    call.__name__ = name
    return call


def moved(value):
    """Copy host data to the device; what lies there stays where it is."""
    if type(value) is ndarray:
        return value._a
    if isinstance(value, list | tuple):
        return [moved(part) for part in value]
    return np.array(value)


class Ufunc:
    """An element-wise function: few keywords, and methods for few of them."""

    def __init__(self, name):
        self.__name__, self._numpys = name, getattr(np, name)

    def __call__(self, *args, **kwargs):
        for keyword in kwargs:
            if keyword not in TABLE["ufuncs"]["keywords"]:
                raise TypeError(f"Wrong arguments: {self.__name__} takes no {keyword}= in CuPy")
        out = kwargs.pop("out", None)
        given = {} if out is None else {"out": array_only(out, self.__name__)}
        args = [operand(x, self.__name__) for x in args]
        result = wrap(self._numpys(*args, **kwargs, **given))
        return result if out is None else out

    def _method(self, method, array, *rest, **kwargs):
        supported = TABLE["ufuncs"]["methods"][method]
        if self.__name__ not in supported and "*" not in supported:
            raise NotImplementedError(f"`{self.__name__}.{method}` is not supported by CuPy")
        array = array_only(array, f"{self.__name__}.{method}")
        if (self.__name__, method) == ("subtract", "at"):
            if array.dtype.name not in TABLE["ufuncs"]["at subtract takes"]:
                raise TypeError(f"subtract.at does not take {array.dtype} in CuPy")
        names = ["indices", "axis", "dtype", "out"] if method == "reduceat" else ["*", "**"]
        if method in ("reduce", "accumulate"):
            names = ["axis", "dtype", "out", "keepdims"]
        rest, kwargs = opened(f"{self.__name__}.{method}", names, rest, kwargs)
        return wrap(getattr(self._numpys, method)(array, *rest, **kwargs))


for _method in TABLE["ufuncs"]["methods"]:
    setattr(Ufunc, _method, lambda self, *args, _m=_method, **kw: self._method(_m, *args, **kw))


def module():
    """Build a module that has the table's names, each doing what NumPy's namesake does."""
    cupy, cupy.linalg = types.ModuleType("cupy"), types.ModuleType("cupy.linalg")
    with warnings.catch_warnings(action="ignore"):  # NumPy is letting some of the names go
        for home, numpys, group in ((cupy, np, "functions"), (cupy.linalg, np.linalg, "linalg")):
            for name, names in TABLE[group].items():
                if hasattr(numpys, name):
                    made = function(name, f"xp.{name}", getattr(numpys, name), names)
                    setattr(home, name, made)
        for name in TABLE["values"]:
            value = getattr(np, name, None)
            number = isinstance(value, type) and issubclass(value, np.generic)
            if number or value is None or isinstance(value, float) or name in ("dtype", "finfo"):
                setattr(cupy, name, value)
    for name in TABLE["ufuncs"]["names"]:
        if isinstance(getattr(np, name, None), np.ufunc):
            setattr(cupy, name, Ufunc(name))
    cupy.ndarray, cupy.is_available = ndarray, lambda: True
    cupy.asnumpy = lambda a, *_, **__: a.get() if type(a) is ndarray else np.asarray(a)
    return cupy
