"""Notebooks: built from percent-format sources, executed, and the same to the byte each time.

People edit and review `notebooks/NN_name.py`; the `.ipynb` beside it is built from that file and
committed executed, so that it reads well wherever it is only displayed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from moe_numpy import files, machine

TIMEOUT = 120  # seconds for one cell
STRICT = """import warnings
warnings.simplefilter("error")
warnings.filterwarnings("default", module="ipykernel")
del warnings"""


def sources(folder: str | Path, names: list[str] | None = None) -> list[Path]:
    """List the sources of a folder, all or those whose names start as given ("06").

    Raises
    ------
    ValueError
        if a name fits no source, or there is none at all.
    """
    found = sorted(Path(folder).glob("[0-9]*.py"))
    if not found:
        raise ValueError(f"notebooks: {folder} must hold sources (06_top_k.py), got none.")
    if not names:
        return found
    for name in names:
        if not any(path.stem.startswith(name) for path in found):
            known = ", ".join(path.stem for path in found)
            raise ValueError(f"notebooks: there must be a source {name}*.py, got only {known}.")
    return [path for path in found if path.stem.startswith(tuple(names))]


def require_untouched(source: Path) -> None:
    """See that the notebook of a source can be written, and that nobody has worked in it.

    The id of a cell tells what was in it when it was built; Jupyter keeps the id.

    Raises     ValueError if there are cells of somebody's own, such as solutions
    """
    path = source.with_suffix(".ipynb")
    files.require_place(path)
    if not path.exists():
        return
    try:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells]
        own = [text for i, text in enumerate(texts) if _id(i, text) != cells[i]["id"]]
    except (OSError, ValueError, KeyError, TypeError):
        own = ["?"]  # it is no notebook that was built here
    if own:
        begins = next(iter(own[0].splitlines()), "")
        raise ValueError(
            f"notebooks: {path} must be as it was built, got a cell changed by hand, which would "
            f"be lost (it begins with {begins!r}). Move the notebook elsewhere, or put what should "
            f"stay into {source.name}."
        )


def require_libraries() -> None:
    """See that what builds and runs notebooks is installed.

    Raises     ValueError if not
    """
    for library in ("jupytext", "nbformat", "nbclient", "ipykernel"):
        if not importlib.util.find_spec(library):
            raise ValueError(
                f"notebooks: {library} must be installed, got none. "
                'Install it with: pip install -e ".[notebooks]"'
            )


def build(source: str | Path) -> Any:
    """Build the notebook of a source, without outputs; each cell's id follows from its place.

    Returns
    -------
    nbformat.NotebookNode
    """
    import jupytext
    import nbformat

    try:
        notebook = jupytext.read(source)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"notebooks: {source} must be UTF-8, got another file ({error}). Save it as UTF-8."
        ) from None
    for place, cell in enumerate(notebook.cells):
        cell["id"] = _id(place, cell.source)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    nbformat.validate(notebook)
    return notebook


def _id(place: int, source: str) -> str:
    return f"{place:03d}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def execute(notebook: Any, folder: str | Path) -> Any:
    """Run every cell from top to bottom in a fresh kernel, in place; a warning is an error.

    Matrix products run on one thread, so that two runs give the same bits.

    Raises
    ------
    ValueError
        if a cell fails, takes too long, or ends the kernel.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # where a kernel splits what is printed is a matter of timing
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    one_thread = os.environ | dict.fromkeys(machine.THREAD_VARIABLES, "1")
    with client.setup_kernel(env=one_thread):
        client.kc.execute(STRICT, silent=True, store_history=False)
        for place, cell in enumerate(notebook.cells):
            try:
                client.execute_cell(cell, place)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                name, words = getattr(error, "ename", type(error).__name__), str(error)
                reason = f"{name}: {getattr(error, 'evalue', words.splitlines()[0])}"
                raise ValueError(
                    f"notebooks: every cell must run, got in cell {place + 1}: {reason}. "
                    f"It begins with {cell.source.splitlines()[0]!r}."
                ) from None
    return notebook


def write(source: Path) -> Path:
    """Build and execute the notebook of a source and write it beside it, atomically."""
    import nbformat

    path = source.with_suffix(".ipynb")
    text = nbformat.writes(execute(build(source), source.parent)) + "\n"
    files.write_atomically(path, lambda file: file.write(text.encode()))
    return path
