"""Runs a study's notebooks as the jobs of the Snakefile, side by side on this machine or on a cluster."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters
from typing import TextIO

from kdlib.config import InputError

ROOT = Path(__file__).resolve().parents[2]
SNAKEFILE = ROOT / "Snakefile"
KILLED = "killed from outside, or out of memory"
WAITING = "not run, because of what failed before it"


@dataclass(frozen=True)
class Place:
    """Where the jobs run.

    Args:
        executor: Snakemake's executor: "local", "slurm", or another whose plugin is installed.
        cores: on this machine all that jobs share, elsewhere those of one job; 0 for all of this machine, or 2.
        options: more words for Snakemake's command line.
    """

    executor: str = "local"
    cores: int = 0
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A job that did not end well: its name, the cause, and the exit status (2: input that cannot be used)."""

    job: str
    cause: str
    status: int


def run_jobs(
    experiments: Sequence[str], parameters: Mapping[str, Mapping[str, object]], shared: Mapping[str, object],
    notebooks: Path, place: Place, again: Sequence[str] = (),
) -> list[Failure]:  # fmt: skip
    """Runs experiments, and whatever they wait for, as far as they are not up to date; a failure holds up no other job.

    Args:
        experiments: their names.
        parameters: of each experiment's notebook, and of "01_baseline", which trains the teachers of the others.
        shared: the study's parameters (see `kdlib.apps.notebooks.study_parameters`).
        notebooks: the folder of the notebooks.
        again: experiments to run even where they are up to date.

    Returns:
        The jobs that failed; empty when all went well.

    Raises:
        InputError: the study's folder cannot be written, or cannot be handed to a cluster.
    """
    folder = Path(str(shared["results"])) / str(shared["study"])
    if place.executor != "local" and "'" in f"{folder}{SNAKEFILE}":
        raise InputError(f"{folder}: Snakemake quotes paths by ' for a cluster, so none may hold one; rename it")
    with _alone(folder) as lock:
        _forget(folder, again)
        plan = _plan(experiments, parameters, shared, notebooks, place)
        failed = _snakemake(folder, plan, place, lock, "all")
        if failed:
            _draw_what_there_is(folder, plan, place, lock)
        return _failures(folder, experiments) if failed else []


def _draw_what_there_is(folder: Path, plan: Mapping[str, object], place: Place, lock: int) -> None:
    """Figures and report of those experiments that ended, after others failed."""
    done = [name for name in plan["experiments"] if (folder / "jobs" / name / "done.json").exists()]
    last = [f"jobs/{name}/done.json" for name in plan["experiments"] if name == "06_figures" and name not in done]
    last += ["report.html"] if plan["report"] else []
    tried = (folder / "jobs" / "06_figures" / "failed.json").exists() or (folder / "jobs" / "report.log").exists()
    if last and not tried and any(name > "01" for name in done):
        rules = ["--allowed-rules", "figures", "report"]
        _snakemake(folder, {**plan, "ended": True}, place, lock, *last, *rules)


def dry_run(parameters: Mapping[str, Mapping[str, object]], shared: Mapping[str, object], notebooks: Path) -> int:
    """Prints what experiments would train (see `kdlib.experiments.dry_run`, which needs torch); returns the exit status."""
    plan = {"parameters": parameters, "shared": shared, "notebooks": str(notebooks.resolve())}
    command = [sys.executable, "-P", "-m", "kdlib.experiments.dry_run"]
    done = subprocess.run(command, input=json.dumps(plan), capture_output=True, text=True, env=_environment())
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Holds a study's folder against a second engine; Snakemake inherits the lock, so it outlives a killed parent."""
    with _writing(folder):
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
        file = (folder / "jobs" / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder} is being worked on by another process: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): mend that, or choose other results") from None


def _save(path: Path, record: Mapping[str, object]) -> None:
    """Writes JSON whole or not at all."""
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}.{path.name}")
        partial.write_text(json.dumps(record, indent=1))
        os.replace(partial, path)


def _forget(folder: Path, again: Sequence[str]) -> None:
    """Removes what is said of earlier failures, and the ends of jobs that are to run again or whose files are gone."""
    with _writing(folder):
        for record in [*folder.glob("jobs/*/failed.json"), *folder.glob("jobs/report.log")]:
            record.unlink()
        for record in folder.glob("jobs/*/done.json"):
            made = json.loads(record.read_text())["made"]
            if record.parent.name in again or not all((record.parent / path).exists() for path in made):
                record.unlink()


def _plan(
    experiments: Sequence[str], parameters: Mapping[str, Mapping[str, object]], shared: Mapping[str, object],
    notebooks: Path, place: Place,
) -> dict[str, object]:  # fmt: skip
    """What the Snakefile has to know, as JSON."""
    trained = sum(name not in ("00_data", "06_figures") for name in experiments)
    width = max(1, trained * len(shared["folds"]) * len(shared["seeds"]))
    gpu = int(str(shared["device"]).startswith("cuda") or (shared["device"] == "auto" and _has_gpu()))
    cores = place.cores or (usable_cores() if place.executor == "local" else 2)
    return {
        "experiments": list(experiments),
        "parameters": {name: {key: _text(value) for key, value in each.items()} for name, each in parameters.items()},
        "folds": list(shared["folds"]), "seeds": list(shared["seeds"]), "notebooks": str(notebooks.resolve()),
        "threads": max(1, cores // (1 if gpu else width)) if place.executor == "local" else cores, "gpu": gpu,
        "state": _state(str(shared["data"])), "report": (ROOT / "kdlib" / "report.py").is_file(), "ended": False,
    }  # fmt: skip


def usable_cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).stdout.startswith(b"GPU")


def _text(value: object) -> str:
    """A parameter as the command line takes it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _state(data: str) -> str:
    """A mark that changes with the files of a data set: then every job looks at them again."""
    if data == "phantom":
        return data
    files = [Path(data) / "dataset.json", *(Path(data) / "imagesTr").glob("*"), *(Path(data) / "labelsTr").glob("*")]
    seen = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.exists())
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def _snakemake(folder: Path, plan: Mapping[str, object], place: Place, lock: int, *targets: str) -> bool:
    """Runs Snakemake in the study's folder, shows what the jobs print, and returns whether anything failed."""
    _save(folder / "jobs" / "study.json", plan)
    local = place.executor == "local"
    command = [
        sys.executable, "-P", "-m", "snakemake", *targets, "--snakefile", str(SNAKEFILE), "--directory", str(folder),
        "--configfile", str(folder / "jobs" / "study.json"), "--scheduler", "greedy", "--keep-going",
        "--rerun-triggers", "mtime", "params",  # not "input": ONLY takes some away
        "--rerun-incomplete", "--nolock",  # a lock of a killed Snakemake stays behind; ours does not
        *_options(place), *place.options,
    ]  # fmt: skip
    with (folder / "jobs" / "snakemake.log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log if local else subprocess.STDOUT,
            text=True, errors="replace", env=_environment(), pass_fds=[lock], process_group=0,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & has it ignored
        )  # fmt: skip
        with process, _stopping(process):
            _show(process)
    return process.returncode != 0


def _has_accounting() -> bool:
    return shutil.which("sacct") is not None and subprocess.run(["sacct"], capture_output=True).returncode == 0


def _environment() -> dict[str, str]:
    """Jobs run in other folders, with the kdlib that started them."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path}


def _options(place: Place) -> list[str]:
    """Snakemake's options for this machine, or for a cluster: there a job that was killed is tried once more."""
    if place.executor == "local":
        return ["--cores", str(place.cores or usable_cores()), "--resources", "gpu=1"]
    options = ["--executor", place.executor, "--jobs", "100", "--retries", "1"]
    options += ["--quiet", "rules", "progress", "reason", "host"]
    if place.executor == "slurm":
        options.append("--slurm-pass-command-as-script")  # else a $ in a path would be the shell's
        if not _has_accounting():
            options += ["--slurm-status-command", "squeue"]  # else it would wait for ever
    return [*options, "--default-resources", "runtime=1440", "mem_mb=16000"]


def _show(process: subprocess.Popen) -> None:
    for line in process.stdout:
        print(line, end="")


@contextmanager
def _stopping(process: subprocess.Popen) -> Iterator[None]:
    """Ctrl-C, or a scheduler's SIGTERM (see `kdlib.apps.notebooks`), reaches Snakemake and its jobs once, as SIGINT."""
    try:
        yield
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        _show(process)  # else a job could wait for somebody to read what it says
        raise


def _failures(folder: Path, experiments: Sequence[str]) -> list[Failure]:
    found = []
    for path in sorted(folder.glob("jobs/*/failed.json")):
        record = json.loads(path.read_text())
        found.append(Failure(path.parent.name, record["cause"], record["status"]))
    report = folder / "jobs" / "report.log"
    if report.exists() and not (folder / "report.html").exists():
        found.append(Failure("report", (report.read_text().strip().splitlines() or [KILLED])[-1], 1))
    if not found:  # Snakemake itself: an option or a plugin that is not there, no allocation
        log = folder / "jobs" / "snakemake.log"
        found.append(Failure("snakemake", (log.read_text().strip().splitlines() or ["see above"])[-1] + f" ({log})", 1))
    ended = {failure.job for failure in found} | {path.parent.name for path in folder.glob("jobs/*/done.json")}
    return found + [Failure(name, WAITING, 1) for name in experiments if name not in ended]


# ------------------------------------------------------------------------------------------------------ within a job


@contextmanager
def job_status(done: Path, folder: Path) -> Iterator[None]:
    """Says how a job ends, on the terminal and beside `done`, where `failed.json` stands from its start to its end.

    Args:
        done: tells Snakemake that the job is done, and lists what it made.
        folder: of the study, or of the narrow job, whose tables and figures it makes.
    """
    name, failed, begin = done.parent.name, done.with_name("failed.json"), time.perf_counter()
    _save(failed, {"cause": KILLED, "status": 1})
    before = _made(folder)
    print(f"== {name}")
    try:
        with contextlib.redirect_stdout(_Labelled(sys.stdout, name)) as lines:
            yield
            lines.write("\n" * bool(lines.rest))
    except BaseException as error:
        cause = "stopped" if isinstance(error, KeyboardInterrupt) else str(error).partition("\n")[0]
        print(f"== {name} failed after {time.perf_counter() - begin:.0f} s: {cause}")
        _save(failed, {"cause": cause, "status": 2 if isinstance(error, InputError) else 1})
        raise
    seconds = time.perf_counter() - begin
    changed = [path for path, when in _made(folder).items() if before.get(path) != when]
    # experiments side by side write into one folder: theirs begin with their numbers, the last one's with none
    made = [os.path.relpath(path, done.parent) for path in changed if path.name.startswith((name[:3], *ascii_letters))]
    print(f"== {name} took {seconds:.0f} s")
    failed.unlink()
    _save(done, {"seconds": round(seconds, 1), "made": made})


def _made(folder: Path) -> dict[Path, int]:
    files = [path for part in ("tables", "figures", "slices") for path in (folder / part).glob("[!.]*")]
    return {path: path.stat().st_mtime_ns for path in sorted(files)}


class _Labelled(io.TextIOBase):
    """Puts a job's name before each of its lines: jobs side by side share one terminal."""

    def __init__(self, stream: TextIO, name: str):
        self.stream, self.name, self.rest = stream, name, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.stream.write(f"{self.name}: {line}\n")
        return len(text)
