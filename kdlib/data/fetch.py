"""Downloading a task of the Medical Segmentation Decathlon: resumed, checked, never half unpacked."""

from __future__ import annotations

import functools
import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

import pooch
import requests
from filelock import FileLock
from tqdm.auto import tqdm

from kdlib.config import InputError


def download(task: str, folder: str | Path, url: str | None = None, md5: str | None = None) -> Path:
    """Fetch and unpack a task of the Decathlon; a broken transfer is resumed, a task already there returned at once.

    Args:
        task: "Task09_Spleen" and its like.
        folder: receives the task's folder and, beside it, the archive.
        url, md5: of the archive; by default those that MONAI publishes for the task.

    Returns: the task's folder, for `index`.
    Raises: InputError for an unknown task, a failed transfer, a wrong checksum or an archive that cannot be trusted.
    """
    from monai.apps import DecathlonDataset  # slow to import, and only needed here

    tables = DecathlonDataset.resource, DecathlonDataset.md5
    if task not in tables[0] and (url is None or md5 is None):
        raise InputError(f"task {task!r}: choose from {', '.join(tables[0])}, or give its archive's url and md5")
    url, md5 = url or tables[0][task], md5 or tables[1][task]
    folder = Path(folder)
    target = folder / task
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{task}.lock"):  # parallel jobs must not write to one archive
            if (target / "dataset.json").is_file():
                return target
            if target.exists():
                raise InputError(f"{target}: exists but holds no dataset.json; move it away and run again")
            try:
                fetch = functools.partial(_resume, folder / f"{task}.tar.part")
                archive = pooch.retrieve(url, f"md5:{md5}", f"{task}.tar", folder, downloader=fetch)
            except ValueError as error:  # pooch names both hashes, and has removed the file
                raise InputError(f"{url}: {error} Run again to download it anew.") from None
            _extract(Path(archive), target)
    except OSError as error:
        raise InputError(f"{url}: {error}; what has arrived is kept, run again to resume") from None
    return target


def _resume(part: Path, url: str, file: str, _: None) -> None:
    """Downloader for pooch: appends to `part` what is missing of `url` (HTTP Range), then moves it to `file`."""
    start = part.stat().st_size if part.exists() else 0
    # identity: a compressed transfer could not be resumed by byte position
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
        if response.status_code != 416:  # nothing is left to send: the checksum decides
            response.raise_for_status()
            start = start if response.status_code == 206 else 0  # a server without Range sends all of it
            total = start + int(response.headers.get("Content-Length", 0))
            plain = os.environ.get("KDLIB_PROGRESS") == "plain"
            with (
                open(part, "ab" if start else "wb") as stream,
                tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=plain) as bar,
            ):
                for chunk in response.iter_content(1 << 20):
                    bar.update(stream.write(chunk))
            if part.stat().st_size < total:
                raise OSError(f"the connection closed after {part.stat().st_size} of {total} bytes")
    os.replace(part, file)


def _extract(archive: Path, target: Path) -> None:
    """Unpack beside `target` and rename when complete, so that a stopped extraction leaves no half data set."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            names, unpacked, most = set(), 0, 100 * archive.stat().st_size
            for member in tar:  # the "data" filter below would only strip the root of an absolute path
                path = PurePosixPath(member.name)
                unpacked += member.size + tarfile.BLOCKSIZE
                faults = {
                    "leaves the folder or is no plain file": path.is_absolute() or ".." in path.parts
                    or not (member.isfile() or member.isdir()) or "\0" in member.name,
                    "stands in it twice": member.isfile() and path in names,
                    "makes it unpack to more than a hundred times its size": unpacked > most,
                }  # fmt: skip
                for fault in (fault for fault, found in faults.items() if found):
                    remedy = "delete the archive and get it from a source you trust"
                    raise InputError(f"{archive}: {member.name!r} {fault}, so nothing was unpacked; {remedy}")
                names.add(path)
            tar.extractall(partial, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"{archive}: not a whole tar archive ({error}); delete it and run again") from None
    found = [path.parent for path in (*partial.glob("dataset.json"), *partial.glob("*/dataset.json"))]
    if len(found) != 1:
        raise InputError(f"{archive}: holds {len(found)} dataset.json, not one; give the archive of one Decathlon task")
    os.replace(found[0], target)
    shutil.rmtree(partial, ignore_errors=True)
