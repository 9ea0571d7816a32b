"""The command line, `kdlib <command>`: a study, one notebook, a dry run, a report, one training, masks, exports."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kdlib.apps.exporting import add_export, run_export
from kdlib.apps.importing import add_import, run_import
from kdlib.apps.jobs import recorded
from kdlib.apps.notebooks import NOTEBOOKS, NotebookError, Stopped, execute, render
from kdlib.apps.predicting import add_predict, run_predict
from kdlib.apps.site import add_site, run_site
from kdlib.apps.study import plan, run_study
from kdlib.config import PROFILES, InputError, TrainingError, from_json


class Parser(argparse.ArgumentParser):
    """argparse, except that its errors are one line too."""

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")


def parser() -> Parser:
    line = Parser(prog="kdlib", description="Knowledge distillation for medical image segmentation.")
    commands = line.add_subparsers(dest="command", required=True)
    study = argparse.ArgumentParser(add_help=False)
    study.add_argument("--data", default="phantom", help="folder in Decathlon layout, or 'phantom'")
    study.add_argument("--target", default="spleen", help="label names joined by ',', or 'all'")
    study.add_argument("--profile", default="quick", help=f"one of {', '.join(PROFILES)}")
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
    add_import(commands)
    add_predict(commands)
    add_export(commands)
    add_site(commands)
    report = commands.add_parser("report", help="write report.html and a page per chapter")
    report.add_argument("folder", type=Path, help="the study's folder, e.g. results/phantom-spleen-quick")
    report.add_argument("--notebook", type=Path, default=NOTEBOOKS / "report.ipynb", help=argparse.SUPPRESS)
    for command in (run, report):
        command.add_argument("--record", type=Path, help="file that says the job is done; for the Snakefile")
    return line


def _run(options: argparse.Namespace) -> int:
    values = dict(options.parameter)
    if len(values) < len(options.parameter):
        raise InputError("a parameter is given twice; a list is one value, e.g. '0 1'")
    with recorded(options.record, Path(values.get("results", ""), values.get("study", ""))):
        execute(options.notebook, options.output, values)
        print(f"wrote {options.output}")
    return 0


def _report(options: argparse.Namespace) -> int:
    folder = options.folder.resolve()
    if not any(folder.glob("notebooks/*.ipynb")) and not any(folder.glob("tables/*.csv")):
        others = sorted({path.parents[1].name for path in folder.parent.glob("*/tables")})
        raise InputError(f"{folder} holds no study: {folder.parent} has {', '.join(others) or 'none'}")
    with recorded(options.record, folder):
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
    for_snakemake = False
    try:
        for word in command:
            if re.search("[\0\ud800-\udfff]", word):
                raise InputError(f"{ascii(word)}: no text (NUL, or bytes that are no UTF-8); rename the file")
        options = parser().parse_args(command)
        for_snakemake = getattr(options, "record", None) is not None
        if options.command == "study":
            return run_study(options, command)
        commands = {"run": _run, "report": _report, "train": _train, "dry-run": _dry_run}
        commands |= {"predict": run_predict, "export": run_export, "import": run_import, "site": run_site}
        return commands[options.command](options)
    except (InputError, TrainingError, NotebookError) as error:
        # a study prints the causes of its failed jobs when all have ended
        if not for_snakemake or isinstance(error, NotebookError):
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt as stop:
        if not for_snakemake:
            print("stopped: finished trainings are kept, the same command resumes from them", file=sys.stderr)
        return 128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT)
