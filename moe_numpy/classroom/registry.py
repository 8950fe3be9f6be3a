"""The registry of pairs: every `NAME_forward` finds its `NAME_backward` by itself.

Nothing is registered by hand. `pairs` walks the packages of the mathematics and lists what is
there, a half without a partner included, so that the gradient check can complain about it.

Modules import modules and look functions up when they call them. One assignment to a module
attribute therefore replaces a function everywhere; `swap` makes that assignment and takes it back.
Exercises, planted bugs and measured fast variants all use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

from moe_numpy import processes
from moe_numpy.config import rules
from moe_numpy.transformer import decode

PACKAGES = ("moe_numpy.ops", "moe_numpy.moe", "moe_numpy.transformer")
FORWARD, BACKWARD = "_forward", "_backward"


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A forward and its backward, looked up in their module at each use so that a swap is seen."""

    name: str
    module: ModuleType

    @property
    def forward(self) -> Callable | None:
        """The function `NAME_forward`, or None if the module has none."""
        return getattr(self.module, self.name + FORWARD, None)

    @property
    def backward(self) -> Callable | None:
        """The function `NAME_backward`, or None if the module has none."""
        return getattr(self.module, self.name + BACKWARD, None)


def pairs() -> dict[str, Pair]:
    """Find every pair of the package, by name; a half without its partner counts as a pair too.

    Raises     ValueError if two modules define the same name
    """
    homes: dict[str, set[ModuleType]] = {}
    for function, modules in _homes(PACKAGES).items():
        for ending in (FORWARD, BACKWARD):
            if function.endswith(ending):
                homes.setdefault(function.removesuffix(ending), set()).update(modules)
    for name, modules in homes.items():
        if len(modules) > 1:
            places = " and ".join(sorted(module.__name__ for module in modules))
            raise ValueError(
                f"pairs: a pair must have one home, {name!r} is defined in {places}. "
                "Rename one, or keep its two halves together."
            )
    return {name: Pair(name, *homes[name]) for name in sorted(homes)}


def pair(name: str) -> Pair:
    """Look one pair up.

    Raises     ValueError if there is none of that name; the nearest names are suggested
    """
    found = pairs()
    if name not in found:
        raise ValueError(unknown("pair", "pair", name, found))
    return found[name]


@contextlib.contextmanager
def swap(name: str, fn: Callable) -> Iterator[Callable]:
    """Replace a public function of the mathematics inside the block; then restore what stood there.

    `name` is the function's own, as in "softmax_backward" or "top_k". Swaps nest.

    Raises     ValueError if no module, or more than one, defines that function, `fn` is none, or
               processes are at work, which would go on with what stood there
    """
    rule, came = f"what stands for {name!r} must be a function", type(fn).__name__
    rules.require(callable(fn), "swap", rule, came, "Pass the function itself.")
    rule, advice = "no processes may be at work", "Swap before they start: around their block."
    rules.require(not processes.are_at_work(), "swap", rule, "some", advice)
    homes = _homes(PACKAGES)
    if name not in homes:
        raise ValueError(unknown("swap", "function", name, homes))
    module, *more = homes[name]
    if more:
        places = ", ".join(home.__name__ for home in homes[name])
        raise ValueError(
            f"swap: a function must have one home, {name!r} is defined in {places}. Rename one."
        )
    before, supports = getattr(module, name), decode.supports
    decode.supports = lambda cfg: False  # generation takes the plain path, which looks all up
    setattr(module, name, fn)
    try:
        yield fn
    finally:
        setattr(module, name, before)
        decode.supports = supports


def unknown(who: str, kind: str, name: str, known: Iterable[str]) -> str:
    """Word the complaint about an unknown name, with the nearest names that exist."""
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    advice = f"Did you mean {' or '.join(nearest)}?" if nearest else "registry.pairs() lists them."
    return f"{who}: {kind} must be one of the package's, got {name!r}. {advice}"


@functools.cache  # the names are noted before the first swap: a stand-in was defined elsewhere
def _homes(packages: tuple[str, ...]) -> dict[str, list[ModuleType]]:
    homes: dict[str, list[ModuleType]] = {}
    for module in _modules(packages):
        for name, fn in inspect.getmembers(module, inspect.isfunction):
            if fn.__module__ == module.__name__ and not name.startswith("_"):
                homes.setdefault(name, []).append(module)
    return homes


def _modules(packages: tuple[str, ...]) -> Iterator[ModuleType]:
    for package_name in packages:
        package = importlib.import_module(package_name)
        yield package
        for entry in pkgutil.walk_packages(package.__path__, prefix=f"{package_name}."):
            yield importlib.import_module(entry.name)
