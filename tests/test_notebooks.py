"""Every notebook agrees with its source, reads well as committed, and runs from top to bottom."""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import pytest

from moe_numpy import commands
from moe_numpy.classroom import lessons

ROOT = Path(__file__).parent.parent
SOURCES = lessons.sources(ROOT / "notebooks")
ITEM = re.compile(r"([-+*]|\d+[.)]) ")
each = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def committed(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    """List what every cell left behind."""
    return [[dict(output) for output in cell.outputs] for cell in code(notebook)]


def test_every_notebook_has_a_source():
    built = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert built == {path.stem for path in SOURCES}


@each
def test_a_notebook_agrees_with_its_source(source):
    fresh, there = lessons.build(source), committed(source)
    assert [dict(cell.metadata) for cell in there.cells] == [dict(c.metadata) for c in fresh.cells]
    for name in ("id", "cell_type", "source"):
        assert [cell[name] for cell in there.cells] == [cell[name] for cell in fresh.cells]


@each
def test_a_notebook_is_committed_executed_and_light(source):
    there = committed(source)
    cells = code(there)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "display_data" in kinds and "error" not in kinds
    streams = [o for cell in cells for o in cell.outputs if o.output_type == "stream"]
    assert all(output.name == "stdout" for output in streams)
    assert source.with_suffix(".ipynb").stat().st_size < 600_000


@each
def test_no_line_of_prose_is_taken_for_an_item_of_a_list(source):
    for cell in committed(source).cells:
        lines = cell.source.splitlines() if cell.cell_type == "markdown" else []
        for before, line in itertools.pairwise(lines):
            if ITEM.match(line):
                assert not before or before.startswith(" ") or ITEM.match(before), line


@each
def test_a_notebook_has_no_wall_of_code(source):
    for cell in code(committed(source)):
        assert len(cell.source.splitlines()) <= 15, cell.source


def words(found):
    """Take what was printed, but for numbers and gaps: their digits and widths are a machine's."""
    printed = [output.get("text", "") for cell in found for output in cell]
    return [re.sub(r"\d[\d.]*(e[-+]?\d+)?|[-+\s]", "", text) for text in printed]


def run(source):
    return outputs(lessons.execute(lessons.build(source), source.parent))


@each
def test_a_notebook_runs_in_a_fresh_kernel_twice_with_the_same_outputs(source):
    started = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn) as pool:  # the two runs share no process, only the machine
        first, second = pool.map(run, [source, source])
    assert first == second
    assert words(first) == words(outputs(committed(source)))  # those are not of another program
    assert time.perf_counter() - started < 90


def browser_tools():
    """Find Chromium and playwright-core, or say what is missing."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium, and there is none")
    probe = ["node", "-e", "require('playwright-core')"]
    if shutil.which("node") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs Node.js with playwright-core (NODE_PATH), and there is none")
    return chromium


@contextlib.contextmanager
def jupyter_lab(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.root_dir": folder,
        "ServerApp.allow_root": True,
        "ServerApp.open_browser": False,
        "ServerApp.disable_check_xsrf": True,
        "IdentityProvider.token": "",
        "ServerApp.password": "",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    command = [sys.executable, "-m", "jupyter", "lab", *(f"--{k}={v}" for k, v in options.items())]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=1).close()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def test_notebooks_run_in_jupyterlab_in_a_real_browser(tmp_path):
    chromium = browser_tools()
    for source in SOURCES:
        shutil.copy(source.with_suffix(".ipynb"), tmp_path)
    script = Path(__file__).with_name("run_in_browser.js")
    with jupyter_lab(tmp_path) as server:
        for source in SOURCES:
            shot = str(tmp_path / f"{source.stem}.png")
            done = subprocess.run(
                ["node", script, server, f"{source.stem}.ipynb", chromium, shot],
                capture_output=True,
                text=True,
                timeout=300,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == {"failed": [], "errors": []}


@pytest.fixture
def lesson(tmp_path):
    """Write the source of a notebook, and give what builds it."""

    def write(*cells):
        source = tmp_path / "01_short.py"
        source.write_text("".join(f"# %%\n{cell}\n\n" for cell in cells), "utf-8")
        return source

    return write


def test_solutions_in_a_notebook_are_not_built_over(lesson, capsys):
    source = lesson("x = 1", "raise NotImplementedError")
    path = source.with_suffix(".ipynb")
    nbformat.write(lessons.build(source), path)
    lesson("x = 2", "raise NotImplementedError")
    lessons.require_untouched(source)  # the source alone has changed: that is what building is for
    solved = nbformat.read(path, as_version=4)
    solved.cells[1].source = "the solution"
    nbformat.write(solved, path)
    before = path.read_bytes()
    assert commands.main(["notebooks", "--folder", str(source.parent)]) == 1
    said = capsys.readouterr().err
    assert "01_short.ipynb must be as it was built, got a cell changed by hand" in said
    assert "begins with 'the solution'" in said
    assert path.read_bytes() == before
    path.write_text("{")
    with pytest.raises(ValueError, match="must be as it was built"):
        lessons.require_untouched(source)


def test_the_committed_notebooks_are_taken_for_untouched():
    for source in SOURCES:
        lessons.require_untouched(source)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("1 / 0", "cell 2: ZeroDivisionError: division by zero. It begins with '1 / 0'"),
        ("import os; os._exit(1)", "cell 2: DeadKernelError: "),
    ],
)
def test_a_cell_that_fails_is_told_in_a_line(cell, words, lesson):
    with pytest.raises(ValueError, match="notebooks: every cell must run") as told:
        lessons.write(lesson("x = 1", cell))
    assert words in str(told.value) and "\n" not in str(told.value)


def test_a_source_that_is_no_text_is_told_by_name(lesson):
    source = lesson()
    source.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"01_short\.py must be UTF-8"):
        lessons.build(source)
