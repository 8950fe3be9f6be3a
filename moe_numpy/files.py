"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`; an older file stays until then.

    Raises     ValueError if the folder cannot be written to, or the place itself is one; OSError
               if writing fails, as on a full disk
    """
    path = Path(path)
    require_place(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(
            f"output: {path} must be written, got: {error.strerror or error}. "
            "Make room, or see who may write there; an older file stays as it was."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, record: Any) -> None:
    """Write a record as JSON, atomically; numbers that are not finite are refused."""
    text = json.dumps(record, allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode() + b"\n"))


def read_json(path: str | Path) -> Any:
    """Read a record.

    Raises     ValueError if the file is missing or no JSON
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"read_json: {path} must be a record in JSON, got: {error}. "
            "Write it anew with the command that makes it."
        ) from None


def require_place(path: str | Path) -> None:
    """See that a file can be written there.

    Raises     ValueError if its folder cannot be written to, or the place itself is a folder
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"output: {path} must be a file, got a folder. Name a file in it.")
    require_folder(path.parent)


def require_folder(folder: str | Path) -> None:
    """Make the folder if it is not there, and see that a file can be written into it.

    Raises     ValueError if it cannot
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output folder: {folder} must be writable, got: {error.strerror}. "
            "Choose another folder."
        ) from None


@contextlib.contextmanager
def held(folder: str | Path, name: str) -> Iterator[None]:
    """Hold a folder within the block, so that no second run writes over what the first one does.

    What a run left that was killed while it wrote the file `name` is removed. Where nobody can hold
    a folder (Windows, some file systems of a network) nobody is kept out, and nothing is removed.

    Raises     ValueError if another process holds it, or another block of this one
    """
    try:
        import fcntl  # which only Unix has
    except ImportError:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output folder: {folder} must be of one run at a time, got another one at work. "
                "Wait for its end, or choose another folder."
            ) from None
        except OSError:
            pass
        else:
            for left in Path(folder).glob(f".{name}.*"):
                left.unlink(missing_ok=True)
        yield
    finally:
        os.close(place)
