"""What the terminal is told: warnings in one line each, and how a job of a study ends, also on disk for Snakemake."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from kdlib.config import InputError
from kdlib.files import write_json

KILLED = "killed from outside, or out of memory"
STOPPED = "stopped"  # by a scheduler or by Ctrl-C


@contextlib.contextmanager
def warnings_said(kind: type[Warning] = UserWarning) -> Iterator[None]:
    """Warnings of this kind are one line each on stderr, also beside a bar; others are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", kind)
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        yield


@contextlib.contextmanager
def recorded(done: Path | None, folder: Path) -> Iterator[None]:
    """Says how a job ends, on the terminal and beside `done`, where `failed.json` stands from its start to its end.

    A job that failed with a cause and is tried again ends at once.

    Args:
        done: tells Snakemake that the job is done, and lists what it made; None where nobody asks.
        folder: the study, or the per-fold job, that its tables and figures belong to.
    """
    if done is None:
        yield
        return
    name, failed, begin = done.parent.name, done.with_name("failed.json"), time.perf_counter()
    before = json.loads(failed.read_text()) if failed.exists() else {"cause": KILLED}
    if before["cause"] not in (KILLED, STOPPED):
        sys.exit(before["status"])
    write_json(failed, {"cause": KILLED, "status": 1})
    print(f"== {name}")
    try:
        with _labelled(name):
            yield
    except BaseException as error:
        cause = STOPPED if isinstance(error, KeyboardInterrupt) else str(error)
        print(f"== {name} failed after {time.perf_counter() - begin:.0f} s: {cause.partition(chr(10))[0]}")
        write_json(failed, {"cause": cause, "status": 2 if isinstance(error, InputError) else 1})
        raise
    print(f"== {name} took {time.perf_counter() - begin:.0f} s")
    own = f"{name.partition('_')[0]}_*"  # experiments side by side write into one folder
    made = [path for part in ("tables", "figures", "slices") for path in folder.glob(f"{part}/{own}")]
    made += folder.glob("report.html") if name == "report" else []
    names = sorted(os.path.relpath(path, done.parent) for path in made)
    write_json(done, {"made": names})
    failed.unlink()


@contextlib.contextmanager
def _labelled(name: str) -> Iterator[None]:
    """Puts a job's name before each of its lines: jobs side by side share one terminal."""
    lines = _Labelled(name)
    try:
        with contextlib.redirect_stdout(lines):
            yield
    finally:
        if lines.rest:  # the last one had no end
            lines.write("\n")


class _Labelled(io.TextIOBase):
    def __init__(self, name: str):
        self.stream, self.name, self.rest = sys.stdout, name, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.stream.write(f"{self.name}: {line}\n")
        return len(text)
