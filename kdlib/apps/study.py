"""A study: its parameters are checked first, one call of Snakemake runs it, and the cause of each failure is printed
last."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kdlib.apps.notebooks import NOTEBOOKS, as_text, check_parameters, convert, read_parameters
from kdlib.config import PROTOCOLS, TEACHERS, InputError, Profile, Run, lookup, override_profile
from kdlib.files import check_study, write_json
from kdlib.strict import check_each_once

ROOT = NOTEBOOKS.parent
ORDER = (
    "00_by_hand", "00_data", "01_baseline", "02_distillation", "02b_controls", "02c_external", "03_ablation",
    "04_loss_comparison", "05_correction", "07_fractions", "08_length", "09_sweep", "10_capacity", "11_dimensions",
    "06_figures",
)  # fmt: skip
ON_REQUEST = (  # they train most
    "05_correction", "07_fractions", "08_length", "09_sweep", "10_capacity", "11_dimensions",
)  # fmt: skip
BY_DEFAULT = tuple(name for name in ORDER if name not in ON_REQUEST)
WAITING = "not run, because of what failed before it"
MADE = {"notebooks": "html", "tables": "csv", "figures": "png", "cards": "md"}  # folder -> suffix


# --------------------------------------------------------------------------------------------------------- parameters


def _numbers(name: str, text: str) -> list[int]:
    try:
        return convert(text, "list[int]")
    except ValueError:
        raise InputError(f"{name} {text!r}: give whole numbers, e.g. '0 1'") from None


def study_parameters(options: argparse.Namespace) -> tuple[dict[str, object], Profile]:
    """The parameters that all experiments share, checked before anything runs, and their profile; paths are absolute.

    Raises:
        InputError: a value that no run can have, no such folder, or a study name that is not a plain folder name.
    """
    try:
        changes = json.loads(options.changes)
    except json.JSONDecodeError:
        raise InputError(f"changes {options.changes!r}: give a JSON object, e.g. '{{\"spacing\": 2.0}}'") from None
    folds, seeds = _numbers("folds", options.folds), _numbers("seeds", options.seeds)
    check_each_once(folds=folds, seeds=seeds)
    profile, protocol = override_profile(options.profile, changes), lookup("protocol", options.protocol, PROTOCOLS)
    data = options.data
    if data != "phantom":
        data = str(Path(os.path.expanduser(data)).resolve())
        if not os.path.isdir(data):
            raise InputError(f"data folder {data} does not exist: give a folder in Decathlon layout, or 'phantom'")
    fields = dict(profile=profile, protocol=protocol, on_defect=options.on_defect)
    for fold, seed in itertools.product(folds, seeds):
        Run(data, options.target, "T1", fold, seed=seed, **fields)  # whatever it refuses
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", options.device):
        raise InputError(f"device {options.device!r}: choose 'auto', 'cpu' or 'cuda'")
    for name, word in (("target", options.target), ("group", options.group)):
        if not word.strip() or word.startswith("-"):  # a job could not be given it as a word
            raise InputError(f"{name} {word!r}: it must not be empty or begin with '-'")
    parts = [Path(data).name, options.target, options.profile, *([protocol.name] * (protocol.name != "corrected"))]
    parts += [options.changes] * bool(changes)  # a study of its own
    study = options.study or re.sub("[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")[:100]
    check_study(study)
    return {
        "data": data, "target": options.target, "profile": options.profile, "changes": changes,
        "protocol": options.protocol, "folds": folds, "seeds": seeds, "on_defect": options.on_defect,
        "group": _group(options.group, data), "device": options.device,
        "results": str(Path(os.path.expanduser(options.results)).resolve()), "study": study,
    }, profile  # fmt: skip


def _group(group: str, data: str) -> str:
    """How cases are grouped; a table outside the data set's folder as an absolute path, since jobs run elsewhere."""
    if not group.lower().endswith(".csv") or os.path.isfile(Path(data, group)):
        return group
    path = Path(os.path.expanduser(group)).resolve()
    if not os.path.isfile(path):
        raise InputError(f"group {group}: no such file, neither in {data} nor here; give a CSV of case and patient")
    return str(path)


def plan(options: argparse.Namespace) -> dict[str, object]:
    """What a study consists of, for the Snakefile: experiments, shared parameters, and those of each notebook.

    Raises:
        InputError: an experiment does not exist, or its notebook cannot take these parameters.
    """
    chosen = options.only or BY_DEFAULT
    for name in chosen:
        lookup("experiment", name, dict.fromkeys(ORDER))
    shared, profile = study_parameters(options)
    experiments, parameters = [name for name in ORDER if name in chosen], {}
    for name in dict.fromkeys([*experiments, "00_data", "01_baseline", "06_figures"]):
        path = options.notebooks / f"{name}.ipynb"
        declared = read_parameters(path)
        parameters[name] = check_parameters(path, {key: value for key, value in shared.items() if key in declared})
    teachers = [name for name in profile.networks if name in TEACHERS]
    return {
        "experiments": experiments, "shared": shared, "parameters": parameters, "teachers": teachers,
        "notebooks": str(options.notebooks.resolve()),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- study


def run_study(options: argparse.Namespace, command: Sequence[str]) -> int:
    config, local = plan(options), options.executor == "local"
    shared, experiments = config["shared"], config["experiments"]
    given = _numbers("cores", options.cores or str(len(os.sched_getaffinity(0)) if local else 2))
    if len(given) != 1 or given[0] < 1:
        raise InputError(f"cores {options.cores!r}: give a number of CPUs")
    cores = given[0]
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
        "files": _fingerprint(shared["data"], shared["group"]),
        "ended": False,
    }
    print(f"study {shared['study']}: " + ", ".join(f"{key} {value}" for key, value in shared.items() if key != "study"))
    with _alone(folder) as lock:
        _forget(folder, options.only)
        failures: dict[str, dict] = {}
        if _until_all_is_done(folder, config, words, lock):
            failures = _failures(folder, experiments)
            done = _done(folder).keys() & experiments
            if any(name > "01" for name in done) and "report" not in failures:  # draw from what there is
                targets = [f"jobs/{name}/done.json" for name in ("06_figures", "report") if name not in done]
                drawing = [*words, "--allowed-rules", "figures", "report"]
                _snakemake(folder, config | {"ended": True}, drawing, lock, *targets)
                failures |= {name: each for name, each in _failures(folder, []).items() if name != "snakemake"}
                failures = {name: each for name, each in failures.items() if name not in _done(folder)}
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


def _done(folder: Path) -> dict[str, int]:
    """Job that is done -> since when."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("jobs/*/done.json")}


def _fingerprint(data: str, group: str) -> str:
    """A mark that changes with a data set's files and its table of patients: then every job looks at them again."""
    paths = [path for name in ("dataset.json", "imagesTr/*", "labelsTr/*") for path in Path(data).glob(name)]
    paths += [Path(data, group)] * group.lower().endswith(".csv")
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


def _until_all_is_done(folder: Path, config: Mapping[str, object], words: Sequence[str], lock: int) -> bool:
    """Runs Snakemake until a pass makes nothing that none before it has made; returns whether anything failed.

    One pass may leave jobs out: where a job runs whose result others take as `ancient`, Snakemake 9 does not look at
    whether these have reasons of their own to run, such as a changed notebook (snakemake/snakemake#4166).
    """
    before, done = _done(folder), set()
    while not (failed := _snakemake(folder, config, words, lock)):
        new = {name for name, time in _done(folder).items() if before.get(name) != time}
        if new == done or new >= {*config["experiments"]}:  # a forced job runs in each pass
            break
        done = new
    return failed


def _snakemake(folder: Path, config: Mapping[str, object], words: Sequence[str], lock: int, *targets: str) -> bool:
    """Runs Snakemake in the study's folder; returns whether anything failed. Ctrl-C, or a scheduler's SIGTERM, reaches
    it and its jobs once, as SIGINT."""
    record = folder / "jobs" / "study.json"
    write_json(record, config)
    command = [sys.executable, "-P", "-m", "snakemake", *targets, "--snakefile", str(ROOT / "Snakefile"), "--nolock"]
    # what is finished stays, whatever ONLY leaves out and whatever became of the code; a job that was killed runs again
    command += ["--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", "params", "--retries", "1"]
    command += ["--scheduler", "greedy", "--directory", str(folder), "--configfile", str(record), *words]
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
    ended = found.keys() | _done(folder).keys()
    return found | {name: {"cause": WAITING, "status": 1} for name in experiments if name not in ended}
