"""The command line, `python -m kdlib <command>`: a study, one notebook, a dry run, a report, one training.

A study is one call of Snakemake: here its parameters are checked first, and the cause of each failure is printed last.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kdlib.apps.notebooks import (
    NOTEBOOKS,
    NotebookError,
    Stopped,
    as_text,
    check_parameters,
    check_study,
    convert,
    execute,
    read_parameters,
    render,
)
from kdlib.config import PROTOCOLS, InputError, Run, TrainingError, from_json, lookup, override_profile
from kdlib.files import write_text

ROOT = NOTEBOOKS.parent
ORDER = (
    "00_data", "01_baseline", "02_distillation", "03_ablation", "04_loss_comparison", "05_correction", "07_fractions",
    "08_length", "06_figures",
)  # fmt: skip
ON_REQUEST = ("05_correction", "07_fractions", "08_length")  # they train most
EXPERIMENTS = tuple(name for name in ORDER if name not in ON_REQUEST)
KILLED = "killed from outside, or out of memory"
STOPPED = "stopped"  # by a scheduler or by Ctrl-C
WAITING = "not run, because of what failed before it"
MADE = {"notebooks": "html", "tables": "csv", "figures": "png", "cards": "md"}  # folder -> suffix


# --------------------------------------------------------------------------------------------------------- parameters


class Parser(argparse.ArgumentParser):
    """argparse, except that its errors are one line too."""

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")


def parser() -> Parser:
    line = Parser(prog="python -m kdlib", description="Knowledge distillation for medical image segmentation.")
    commands = line.add_subparsers(dest="command", required=True)
    study = argparse.ArgumentParser(add_help=False)
    study.add_argument("--data", default="phantom", help="folder in Decathlon layout, or 'phantom'")
    study.add_argument("--target", default="spleen", help="label names joined by ',', or 'all'")
    study.add_argument("--profile", default="quick", help="quick, hippocampus, ct96, ct128 or thesis")
    study.add_argument("--protocol", default="corrected", help="corrected or thesis")
    study.add_argument("--changes", default="{}", help="fields of the profile to change, as JSON")
    study.add_argument("--on-defect", default="raise", help="raise: stop at defective cases; drop: leave them out")
    study.add_argument("--group", default="auto", help="which cases are of one patient: a regular expression or a CSV")
    study.add_argument("--folds", default="0", help="e.g. '0 1'")
    study.add_argument("--seeds", default="0", help="e.g. '0 1'")
    study.add_argument("--device", default="auto", help="auto, cpu or cuda")
    study.add_argument("--results", default="results", help="folder that trained runs and studies are kept in")
    study.add_argument("--study", default="", help="name of the study's folder in results")
    study.add_argument("--only", nargs="+", default=[], metavar="NAME", help="experiments to run, even if up to date")
    study.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="folder of the experiments' notebooks")
    each = commands.add_parser("study", parents=[study], help="run every experiment, then write the report")
    each.add_argument("--cores", default="", help="CPUs that all jobs share, on a cluster of each job; all, or 2")
    each.add_argument("--executor", default="local", help="where the jobs run: local, slurm, or a Snakemake plugin")
    each.add_argument("--snakemake-args", default="", help="more options for Snakemake, as one text")
    commands.add_parser("dry-run", parents=[study], help="list what a study would train, and for how long")
    run = commands.add_parser("run", help="run one notebook")
    run.add_argument("notebook", type=Path)
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("-o", "--output", type=Path, required=True, help="the executed copy")
    train = commands.add_parser("train", help="train runs that a file describes, on one or several processes")
    train.add_argument("file", type=Path, help="JSON: a run, or a list of runs, with the fields of kdlib.Run")
    train.add_argument("--results", default="results", help="folder that trained runs are kept in")
    train.add_argument("--processes", type=int, default=1, help="processes of each training, each on a GPU of its own")
    train.add_argument("--device", default="auto", help="auto, cpu or cuda")
    report = commands.add_parser("report", help="write report.html and a page per chapter")
    report.add_argument("folder", type=Path, help="the study's folder, e.g. results/phantom-spleen-quick")
    report.add_argument("--notebook", type=Path, default=NOTEBOOKS / "report.ipynb", help=argparse.SUPPRESS)
    for command in (run, report):
        command.add_argument("--record", type=Path, help="file that says the job is done; for the Snakefile")
    return line


def _numbers(name: str, text: str) -> list[int]:
    try:
        return convert(text, "list[int]")
    except ValueError:
        raise InputError(f"{name} {text!r}: give whole numbers, e.g. '0 1'") from None


def study_parameters(options: argparse.Namespace) -> dict[str, object]:
    """The parameters that all experiments share, checked before anything runs; paths become absolute.

    Raises:
        InputError: a value that no run can have, no such folder, or a study name that is not a plain folder name.
    """
    try:
        changes = json.loads(options.changes)
    except json.JSONDecodeError:
        raise InputError(f"changes {options.changes!r}: give a JSON object, e.g. '{{\"spacing\": 2.0}}'") from None
    folds, seeds = _numbers("folds", options.folds), _numbers("seeds", options.seeds)
    if not folds or not seeds:
        raise InputError("folds and seeds: give at least one of each, e.g. 0")
    profile, protocol = override_profile(options.profile, changes), lookup("protocol", options.protocol, PROTOCOLS)
    data = options.data
    if data != "phantom":
        data = str(Path(data).expanduser().resolve())
        if not os.path.isdir(data):
            raise InputError(f"data folder {data} does not exist: give a folder in Decathlon layout, or 'phantom'")
    for fold in folds:
        for seed in seeds:
            Run(
                data,
                options.target,
                "T1",
                fold,
                seed=seed,
                profile=profile,
                protocol=protocol,
                on_defect=options.on_defect,
            )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", options.device):
        raise InputError(f"device {options.device!r}: choose 'auto', 'cpu' or 'cuda'")
    if not options.target.strip() or options.target.startswith("-"):  # a job could not be given it as a word
        raise InputError(f"target {options.target!r}: it must not be empty or begin with '-'")
    parts = [Path(data).name, options.target, options.profile, *([protocol.name] * (protocol.name != "corrected"))]
    study = options.study or re.sub("[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
    check_study(study)
    return {
        "data": data, "target": options.target, "profile": options.profile, "changes": changes,
        "protocol": options.protocol, "folds": folds, "seeds": seeds, "on_defect": options.on_defect,
        "group": options.group, "device": options.device, "results": str(Path(options.results).expanduser().resolve()),
        "study": study,
    }  # fmt: skip


def plan(options: argparse.Namespace) -> dict[str, object]:
    """What a study consists of, for the Snakefile: experiments, shared parameters, and those of each notebook.

    Raises:
        InputError: an experiment does not exist, or its notebook cannot take these parameters.
    """
    chosen = options.only or EXPERIMENTS
    for name in chosen:
        lookup("experiment", name, dict.fromkeys(ORDER))
    shared = study_parameters(options)
    experiments, parameters = [name for name in ORDER if name in chosen], {}
    for name in dict.fromkeys([*experiments, "00_data", "01_baseline", "06_figures"]):
        path = options.notebooks / f"{name}.ipynb"
        declared = read_parameters(path)
        parameters[name] = check_parameters(path, {key: value for key, value in shared.items() if key in declared})
    notebooks = str(options.notebooks.resolve())
    return {"experiments": experiments, "shared": shared, "parameters": parameters, "notebooks": notebooks}


# -------------------------------------------------------------------------------------------------------------- study


def _study(options: argparse.Namespace, command: Sequence[str]) -> int:
    config, local = plan(options), options.executor == "local"
    shared, experiments = config["shared"], config["experiments"]
    (cores,) = _numbers("cores", options.cores or str(len(os.sched_getaffinity(0)) if local else 2)) or [0]
    if cores < 1:
        raise InputError(f"cores {options.cores!r}: give a number of CPUs")
    folder = Path(shared["results"], shared["study"])
    if not local and "'" in f"{folder}{ROOT}":
        raise InputError(f"{folder}: Snakemake quotes paths by ' for a cluster, so none may hold one; rename it")
    try:
        words = _options(options.executor, cores) + shlex.split(options.snakemake_args)
    except ValueError as error:
        raise InputError(f"Snakemake's options {options.snakemake_args!r}: {error}") from None
    texts = {name: {key: as_text(value) for key, value in each.items()} for name, each in config["parameters"].items()}
    config |= {
        "parameters": texts,
        "cores": cores,
        "local": local,
        "files": _fingerprint(shared["data"]),
        "ended": False,
    }
    print(f"study {shared['study']}: " + ", ".join(f"{key} {value}" for key, value in shared.items() if key != "study"))
    with _alone(folder) as lock:
        _forget(folder, options.only)
        failures: dict[str, dict] = {}
        if _snakemake(folder, config, words, lock):
            failures = _failures(folder, experiments)
            done = [name for name in experiments if (folder / "jobs" / name / "done.json").exists()]
            if any(name > "01" for name in done) and "report" not in failures:  # draw from what there is
                targets = [f"jobs/{name}/done.json" for name in ("06_figures", "report") if name not in done]
                _snakemake(
                    folder, config | {"ended": True}, words + ["--allowed-rules", "figures", "report"], lock, *targets
                )
                failures |= {name: each for name, each in _failures(folder, []).items() if name != "snakemake"}
                failures = {
                    name: each for name, each in failures.items() if not (folder / "jobs" / name / "done.json").exists()
                }
    causes = {name: failure for name, failure in failures.items() if failure["cause"] != WAITING}
    if causes and all(failure["status"] == 2 for failure in causes.values()):
        raise InputError("\n".join(dict.fromkeys(failure["cause"] for failure in causes.values())))
    made = {kind: len([*folder.glob(f"{kind}/*.{suffix}")]) for kind, suffix in MADE.items()}
    print(f"{folder}: " + ", ".join(f"{count} {kind}" for kind, count in made.items() if count))
    if (folder / "report.html").exists():
        print(f"report: {folder / 'report.html'}")
    for name, failure in failures.items():
        print(f"failed: {name}: {failure['cause'].splitlines()[0]}", file=sys.stderr)
    if failures:
        print("finished trainings are kept; the same command resumes from them:", file=sys.stderr)
        print(f"    {shlex.join([sys.executable, '-m', 'kdlib', *command])}", file=sys.stderr)
    return 1 if failures else 0


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Locks a study's folder. Snakemake inherits the lock, which therefore outlives a killed parent and, unlike
    Snakemake's own, never outlives Snakemake."""
    try:
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
        file = (folder / "jobs" / ".lock").open("w")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): fix that, or choose other results") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is working on {folder}: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _forget(folder: Path, again: Sequence[str]) -> None:
    """Removes the records of earlier failures, and of jobs that are to run again or have lost what they made."""
    for record in folder.glob("jobs/*/failed.json"):
        record.unlink()
    for record in folder.glob("jobs/*/done.json"):
        made = json.loads(record.read_text())["made"]
        if record.parent.name in again or not all((record.parent / path).exists() for path in made):
            record.unlink()


def _fingerprint(data: str) -> str:
    """A mark that changes with the files of a data set: then every job looks at them again."""
    paths = [
        Path(data) / "dataset.json",
        *(path for part in ("imagesTr", "labelsTr") for path in Path(data, part).glob("*")),
    ]
    seen = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists())
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def _options(executor: str, cores: int) -> list[str]:
    if executor == "local":
        return ["--cores", str(cores), "--resources", "gpu=1", "--quiet", "all"]
    words = ["--executor", executor, "--jobs", "100", "--quiet", "rules", "progress", "reason", "host"]
    if executor == "slurm":
        words.append("--slurm-pass-command-as-script")  # else a $ in a path would be the shell's
        if not shutil.which("sacct") or subprocess.run(["sacct"], capture_output=True).returncode:
            words += ["--slurm-status-command", "squeue"]  # without accounting it would wait for ever
    return [*words, "--default-resources", "runtime=1440", "mem_mb=16000"]


def _snakemake(folder: Path, config: Mapping[str, object], words: Sequence[str], lock: int, *targets: str) -> bool:
    """Runs Snakemake in the study's folder; returns whether anything failed. Ctrl-C, or a scheduler's SIGTERM, reaches
    it and its jobs once, as SIGINT."""
    write_text(folder / "jobs" / "study.json", json.dumps(config, indent=1))
    command = [sys.executable, "-P", "-m", "snakemake", *targets, "--snakefile", str(ROOT / "Snakefile"), "--nolock"]
    # what is finished stays, whatever ONLY leaves out and whatever became of the code; a job that was killed runs again
    command += ["--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", "params", "--retries", "1"]
    command += [
        "--scheduler",
        "greedy",
        "--directory",
        str(folder),
        "--configfile",
        str(folder / "jobs" / "study.json"),
        *words,
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # jobs run in other folders
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path}, pass_fds=[lock], process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & has it ignored
    )  # fmt: skip
    try:
        return process.wait() != 0
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise


def _failures(folder: Path, experiments: Sequence[str]) -> dict[str, dict]:
    """Job -> cause and exit status, of those that failed and of those that waited for them."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("jobs/*/failed.json"))}
    if not found:  # Snakemake itself: an option or a plugin that is not there, no allocation
        logs = sorted(folder.glob(".snakemake/log/*.log"), key=lambda path: path.stat().st_mtime)
        lines = logs[-1].read_text().strip().splitlines() if logs else []
        found["snakemake"] = {"cause": f"{lines[-1]} ({logs[-1]})" if lines else "see above", "status": 1}
    ended = found.keys() | {path.parent.name for path in folder.glob("jobs/*/done.json")}
    return found | {name: {"cause": WAITING, "status": 1} for name in experiments if name not in ended}


# ------------------------------------------------------------------------------------------------------------ one job


@contextlib.contextmanager
def _recorded(done: Path | None, folder: Path) -> Iterator[None]:
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
    write_text(failed, json.dumps({"cause": KILLED, "status": 1}))
    print(f"== {name}")
    try:
        with contextlib.redirect_stdout(_Labelled(name)):
            yield
    except BaseException as error:
        cause = STOPPED if isinstance(error, KeyboardInterrupt) else str(error)
        print(f"== {name} failed after {time.perf_counter() - begin:.0f} s: {cause.partition(chr(10))[0]}")
        write_text(failed, json.dumps({"cause": cause, "status": 2 if isinstance(error, InputError) else 1}))
        raise
    print(f"== {name} took {time.perf_counter() - begin:.0f} s")
    own = "[a-z]*" if name == "06_figures" else f"{name[:3]}*"  # experiments side by side write into one folder
    made = [path for part in ("tables", "figures", "slices") for path in folder.glob(f"{part}/{own}")]
    made += folder.glob("report.html") if name == "report" else []
    write_text(
        done,
        json.dumps(
            {"finished": time.time(), "made": sorted(os.path.relpath(path, done.parent) for path in made)}, indent=1
        ),
    )
    failed.unlink()


class _Labelled(io.TextIOBase):
    """Puts a job's name before each of its lines: jobs side by side share one terminal."""

    def __init__(self, name: str):
        self.stream, self.name, self.rest = sys.stdout, name, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.stream.write(f"{self.name}: {line}\n")
        return len(text)


def _run(options: argparse.Namespace) -> int:
    values = dict(options.parameter)
    if len(values) < len(options.parameter):
        raise InputError("a parameter is given twice; a list is one value, e.g. '0 1'")
    with _recorded(options.record, Path(values.get("results", ""), values.get("study", ""))):
        execute(options.notebook, options.output, values)
        print(f"wrote {options.output}")
    return 0


def _report(options: argparse.Namespace) -> int:
    folder = options.folder.resolve()
    if not any(folder.glob("notebooks/*.ipynb")) and not any(folder.glob("tables/*.csv")):
        others = sorted({path.parents[1].name for path in folder.parent.glob("*/tables")})
        raise InputError(f"{folder} holds no study: {folder.parent} has {', '.join(others) or 'none'}")
    with _recorded(options.record, folder):
        values = {"results": str(folder.parent), "study": folder.name}
        execute(options.notebook, folder / "notebooks" / "report.ipynb", values)
        print(f"wrote {render(folder)[0]}")
    return 0


def _train(options: argparse.Namespace) -> int:
    from kdlib.experiments import parallel  # needs torch

    try:
        found = json.loads(options.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{options.file} cannot be read as JSON: {error}") from None
    records = found if isinstance(found, list) else [found]
    try:
        runs = [from_json(record) for record in records]
    except InputError as error:
        raise InputError(f"{options.file}: {error}") from None
    if not runs:
        raise InputError(f"{options.file} holds no run: give one, or a list of runs, with the fields of kdlib.Run")
    parallel.train(runs, options.results, options.processes, options.device)
    print(f"{len(runs)} runs are done in {Path(options.results, 'runs')}")
    return 0


def _dry_run(options: argparse.Namespace) -> int:
    from kdlib.experiments.dry_run import describe  # needs torch

    found = plan(options)
    parameters = {name: found["parameters"][name] for name in found["experiments"]}
    print(describe(found | {"parameters": parameters}))
    return 0


def main(command: Sequence[str]) -> int:
    """Runs a command line.

    Returns:
        The exit status: 0, 1 for a job that failed, 2 for input that cannot be used, 130 when stopped by Ctrl-C, 143
        when stopped by SIGTERM.
    """
    recorded = False
    try:
        for word in command:
            if re.search("[\0\ud800-\udfff]", word):
                raise InputError(f"{ascii(word)}: no text (NUL, or bytes that are no UTF-8); rename the file")
        options = parser().parse_args(command)
        recorded = getattr(options, "record", None) is not None
        if options.command == "study":
            return _study(options, command)
        return {"run": _run, "report": _report, "train": _train, "dry-run": _dry_run}[options.command](options)
    except (InputError, TrainingError, NotebookError) as error:
        # a study prints the causes of its failed jobs when all have ended
        if not recorded or isinstance(error, NotebookError):
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt as stop:
        if not recorded:
            print("stopped: finished trainings are kept, the same command resumes from them", file=sys.stderr)
        return 128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT)
