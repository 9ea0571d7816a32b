"""Files that are whole or not there: the one way in which this package writes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdlib.config import InputError

RESULT_FOLDERS = ("data", "runs", "splits")  # folders of `results` that are no study

if TYPE_CHECKING:  # the command line does not wait for its import
    import pandas as pd


def check_study(name: str) -> None:
    """Raises InputError where a study's name is not that of a folder in results, or of one that is taken."""
    if name in RESULT_FOLDERS:
        raise InputError(f"study name {name!r}: results keeps its {name} under that name; choose another")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        allowed = "up to 100 letters, digits, '.', '_' and '-', the first a letter or digit"
        raise InputError(f"study name {name[:100]!r}: use {allowed}")


def check_study_or_job(path: str) -> None:
    """`check_study` of every part: a per-fold job lies in its study's folder. Raises: InputError as it does."""
    for part in path.split("/"):
        check_study(part)


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: into a neighbour, onto the disk, then renamed.

    Args:
        path: where the file belongs; missing folders are made.
        writer: is given the path of the neighbour and writes it.

    Raises: InputError: the file system refuses (full disk, read-only folder); what was finished before stays.
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
        with contextlib.suppress(OSError):  # as little can be deleted as written
            partial.unlink(missing_ok=True)


def write_folder(path: Path, writer: Callable[[Path], object], replace: bool = False) -> None:
    """Writes a folder whole or not at all: `writer` fills a neighbour, which then gets the name.

    Args:
        replace: take the place of one that is there.

    Raises: InputError: the file system refuses, also where there is one that is not to be replaced.
    """
    partial, old = (path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}") for _ in range(2))
    try:
        partial.mkdir(parents=True)
        writer(partial)
        if replace and path.exists():
            os.rename(path, old)
        os.rename(partial, path)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file; see `write`."""
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, record: object) -> None:
    """Writes a JSON file; see `write`."""
    write_text(path, json.dumps(record, indent=1))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Writes a table without its index; see `write`."""
    write(path, lambda partial: table.to_csv(partial, index=False))


def read_csv(path: Path) -> pd.DataFrame:
    """Reads a table of `write_csv`; names of cases, patients and classes, and keys of runs, stay text, "NA" too."""
    import pandas as pd

    text = dict.fromkeys(("case", "patient", "class", "run"), str)
    # whole: read in parts, a column that is empty in one of them has mixed types
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""], low_memory=False)


def packed_or_not(path: Path) -> Path | None:
    """A saved table, or the same packed (`.csv.gz`), whichever is there."""
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)


def entries(folder: Path) -> list[Path]:
    """What a folder holds, by name. Raises: InputError for one that cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}; change that") from None


def write_arrays(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes compressed arrays, to a name that ends in .npz; see `write`."""
    write(path, lambda partial: np.savez_compressed(partial, **columns))


def read_arrays(path: Path) -> pd.DataFrame:
    """The arrays of `write_arrays` as columns, one row per first index; pickles are refused.

    Raises: InputError: a damaged file, or one of other things.
    """
    import pandas as pd

    try:
        with np.load(path, allow_pickle=False) as file:
            return pd.DataFrame({column: list(file[column]) for column in file.files})
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} holds no plain arrays ({error}): delete its folder and run again") from None


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    for pattern in (".????????????.*", ".tmp??????"):  # of `write`, and of safetensors
        for partial in folder.glob(pattern):
            partial.unlink()
