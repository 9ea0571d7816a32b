"""The manifest of a run's folder, as everyone reads it: `kdlib.experiments.store` writes it."""

from __future__ import annotations

import json
from pathlib import Path

from kdlib.files import sha256
from kdlib.strict import InputError

FORMAT = 2  # of manifests


def read_manifest(folder: Path) -> dict:
    """The manifest of a run's folder, whatever its status; empty where there is none, or one of an older version.

    Raises:
        InputError: it is of a newer version of kdlib, or damaged.
    """
    path = folder / "manifest.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        number = int(record.get("format", 0))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete {folder} to train that run again") from None
    if number > FORMAT:
        raise InputError(f"{path}: written by a newer version (format {number}); update kdlib")
    return record if number == FORMAT else {}


def verified(path: Path) -> Path:
    """A file of a finished run, after a look at its hash.

    Raises:
        InputError: it is gone, or not the file that the manifest beside it names; or what `read_manifest` refuses.
    """
    known = read_manifest(path.parent).get("files", {}).get(path.name)
    if known is not None and not path.is_file():
        raise InputError(f"{path} is missing: copy the run's whole folder, or delete {path.parent} to train it again")
    if known is not None and sha256(path) != known:
        raise InputError(f"{path} was changed after its run: delete {path.parent} to train that run again")
    return path
