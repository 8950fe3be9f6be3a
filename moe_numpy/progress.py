"""One progress bar for everything that takes long."""

from __future__ import annotations

import sys
from typing import Any


def bar(total: int, name: str, unit: str, done: int = 0, show: bool = True) -> Any:
    """Open a tqdm bar with an estimate of the time left, for a terminal or a notebook.

    Where nobody watches a terminal it prints a line every ten seconds instead of drawing, and where
    the standard error is closed nothing at all.
    """
    from tqdm.auto import tqdm  # here, so that importing the package stays quick

    show = show and sys.stderr is not None
    watched = show and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit=unit,
        mininterval=0.1 if watched else 10.0,
        disable=not show,
    )
