"""Files that are whole or not there: the one way in which this package writes."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from kdlib.config import InputError


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: into a neighbour, onto the disk, then renamed.

    Args:
        path: where the file belongs; missing folders are made.
        writer: is given the path of the neighbour and writes it.

    Raises:
        InputError: the file system refuses (full disk, read-only folder); what was finished before stays.
    """
    partial = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")  # two hosts may share process ids
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(partial)
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        try:
            partial.unlink(missing_ok=True)
        except OSError:  # as little can be deleted as written
            pass


def write_text(path: Path, text: str) -> None:
    """Writes a text file; see `write`."""
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _sync(path: Path) -> None:
    """A power cut after this leaves what is there now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(path: Path, error: Exception) -> InputError:
    """The one clear line for a file that could not be saved."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error).lower()
    cause = "the disk is full" if full else str(error)
    return InputError(f"{path} could not be saved: {cause}; fix that and run again, finished runs are kept")


def remove_partial_files(folder: Path) -> None:
    """Removes what a killed writer left half done in a run's folder; its lock must be held."""
    for partial in folder.glob(".????????????.*"):
        partial.unlink()
