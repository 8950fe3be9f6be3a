"""The rules that configurations are held to, and the words in which they refuse."""

from __future__ import annotations

import dataclasses
import sys
from numbers import Integral, Real
from typing import Any

LARGEST = sys.float_info.max


def require(fine: bool, who: str, rule: str, came: Any, advice: str) -> None:
    """Refuse with who, which rule, what came and what to do."""
    if not fine:
        raise ValueError(f"{who}: {rule}, got {came}. {advice}".rstrip())


def plain_numbers(config: Any) -> None:
    """Turn NumPy's numbers among the fields, and in tuples, into Python's own.

    One of float64 would make what it meets float64, and none can be written as JSON.
    """
    for field in dataclasses.fields(config):
        came = getattr(config, field.name)
        if isinstance(came, tuple):
            came = tuple(map(plain, came))
        object.__setattr__(config, field.name, plain(came))  # the fields are frozen


def one_of(who: str, name: str, came: Any, allowed: tuple) -> None:
    """Refuse what is not among the allowed values."""
    choices = ", ".join(repr(choice) for choice in allowed)
    fine = isinstance(came, str | None) and came in allowed
    require(fine, who, f"{name} must be one of {choices}", repr(came), "")


def float_type(who: str, dtype: Any) -> None:
    """Refuse what names neither float32 nor float64."""
    names = ("float32", "float64")
    fine = any(dtype == name or getattr(dtype, "__name__", None) == name for name in names)
    require(fine, who, f"dtype must be one of {names[0]!r}, {names[1]!r}", repr(dtype), "")


def array(who: str, name: str, came: Any) -> None:
    """Refuse what is not an array, such as a list."""
    fine, kind = hasattr(came, "dtype") and hasattr(came, "shape"), type(came).__name__
    require(fine, who, f"{name} must be an array", kind, "Make one of it: np.asarray.")


def whole_number(who: str, name: str, came: Any, least: int) -> None:
    """Refuse what is not a whole number of at least `least`, or more than any array could hold."""
    fine = isinstance(came, Integral) and not isinstance(came, bool) and came >= least
    require(fine, who, f"{name} must be a whole number of at least {least}", repr(came), "")
    require(came < 2**63, who, f"{name} must be below 2**63", came, "Take a smaller one.")


def configuration(who: str, came: Any, kind: type) -> None:
    """Refuse what is no configuration of that kind, without printing all that it may hold."""
    fine, rule = isinstance(came, kind), f"the configuration must be a {kind.__name__}"
    require(fine, who, rule, type(came).__name__, "Mind the order of the arguments.")


def instance(who: str, name: str, came: Any, kinds: tuple[type, ...]) -> None:
    """Refuse what is of none of the kinds."""
    names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    require(isinstance(came, kinds), who, f"{name} must be {names}", repr(came), "")


def not_negative(who: str, name: str, came: Any) -> None:
    """Refuse what is negative or not finite."""
    fine = _is_number(came) and 0 <= plain(came) <= LARGEST
    rule = f"{name} must not be negative, infinite or NaN"
    require(fine, who, rule, repr(came), "Use 0 for none.")


def positive(who: str, name: str, came: Any, advice: str) -> None:
    """Refuse what is not positive or not finite."""
    fine = _is_number(came) and 0 < plain(came) <= LARGEST
    require(fine, who, f"{name} must be positive and finite", repr(came), advice)


def normal(who: str, name: str, came: Any, advice: str) -> None:
    """Refuse what is not positive, or what float32 may take for zero or for infinity."""
    positive(who, name, came, advice)
    rule = f"{name} must be at least 2**-126: float32 may take less for zero"
    require(came >= 2.0**-126, who, rule, repr(came), advice)
    rule = f"{name} must be at most 2**127: float32 may take more for infinity"
    require(came <= 2.0**127, who, rule, repr(came), advice)


def share(who: str, name: str, came: Any, advice: str = "") -> None:
    """Refuse what is not in [0, 1)."""
    fine = _is_number(came) and 0 <= came < 1
    require(fine, who, f"{name} must satisfy 0 <= {name} < 1", repr(came), advice)


def fraction(who: str, name: str, came: Any, advice: str) -> None:
    """Refuse what is not between 0 and 1."""
    fine = _is_number(came) and 0 < came < 1
    require(fine, who, f"{name} must satisfy 0 < {name} < 1", repr(came), advice)


def positive_weight(term: Any) -> None:
    """Refuse a balance term without a weight that counts."""
    normal(type(term).__name__, "weight", term.weight, "Leave the term out instead.")


def plain(came: Any) -> Any:
    """Turn a number of NumPy's into Python's own, which decides the type of no array."""
    return came.item() if isinstance(came, Real) and hasattr(came, "item") else came


def _is_number(came: Any) -> bool:
    return isinstance(plain(came), int | float) and not isinstance(came, bool)
