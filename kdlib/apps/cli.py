"""The command line, `kdlib <command>`: a study, one notebook, a dry run, a report, one training, masks, exports."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kdlib.apps.jobs import recorded, warnings_said
from kdlib.apps.notebooks import NOTEBOOKS, NotebookError, Stopped, execute, render
from kdlib.apps.study import plan, run_study
from kdlib.config import PROFILES, InputError, TrainingError, from_json
from kdlib.inference import FORMATS


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
    each.add_argument("--cores", default="", help="CPUs that all jobs share, on a cluster of each job; none: all, or 2")
    each.add_argument("--executor", default="local", help="where the jobs run: local, slurm, or a Snakemake plugin")
    each.add_argument("--snakemake-args", default="", help="more options for Snakemake, as one text")
    commands.add_parser("dry-run", parents=[study], help="list what a study would train, and for how long")
    run = commands.add_parser("run", help="run one notebook")
    run.add_argument("notebook", type=Path)
    said = "one of the notebook's; paths count from the notebook's folder"
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help=said)
    run.add_argument("-o", "--output", type=Path, required=True, help="the executed copy")
    train = commands.add_parser("train", help="train runs that a file describes, on one or several processes")
    train.add_argument("file", type=Path, help="JSON: a run, or a list of runs, with the fields of kdlib.Run")
    train.add_argument("--results", default="results", help="folder that trained runs are kept in")
    train.add_argument("--processes", type=int, default=1, help="processes of each training, each on a GPU of its own")
    train.add_argument("--device", default="auto", help="auto, cpu or cuda")
    _add_import(commands)
    _add_predict_and_export(commands)
    report = commands.add_parser("report", help="write report.html and a page per chapter")
    report.add_argument("folder", type=Path, help="the study's folder, e.g. results/phantom-spleen-quick")
    report.add_argument("--notebook", type=Path, default=NOTEBOOKS / "report.ipynb", help=argparse.SUPPRESS)
    for command in (run, report):
        command.add_argument("--record", type=Path, help="file that says the job is done; for the Snakefile")
    site = commands.add_parser("site", help="write the pages of studies as a folder of plain files for the web")
    site.add_argument("--results", type=Path, default=Path("results"), help="folder that studies are kept in")
    site.add_argument("--output", type=Path, default=Path("docs/site"), help="folder of the pages")
    site.add_argument(
        "--block", nargs=3, action="append", default=[], metavar=("PAGE", "BLOCK", "STUDY"),
        help="write <STUDY>/<BLOCK>.md, e.g. its 'answer', into a page, between its two comments; repeatable",
    )  # fmt: skip
    return line


def _add_import(commands: argparse._SubParsersAction) -> None:
    line = commands.add_parser("import", help="make a data set of your own images and masks")
    line.add_argument("pairs", type=Path, help="folder of images and masks, or a CSV with columns image and mask")
    line.add_argument("-o", "--output", type=Path, required=True, help="folder of the new data set")
    line.add_argument("--modality", required=True, choices=("CT", "MR"))
    line.add_argument("--labels", default="", help="e.g. 'spleen,liver' (values 1 and 2) or 'spleen=1,liver=6'")
    line.add_argument(
        "--images", metavar="GLOB", help="which files are images, e.g. 'ct/*.nii.gz'; only * stands for others"
    )
    line.add_argument("--masks", metavar="GLOB", help="which are masks, e.g. 'seg/*_seg.nii.gz'; * pairs them")
    line.add_argument("--on-defect", default="raise", choices=("raise", "drop"), help="drop: leave such cases out")
    line.add_argument("--copy", action="store_true", help="copy the files; else they are hard links where that can be")


def _add_predict_and_export(commands: argparse._SubParsersAction) -> None:
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("student", help="folder of a student, name of a released one, or key of a run")
    both.add_argument("--overwrite", action="store_true", help="replace what exists")
    both.add_argument("--results", default="results", help="folder that trained runs are kept in")
    line = commands.add_parser("predict", parents=[both], help="segment new scans with a trained student")
    line.add_argument("scans", nargs="+", type=Path, metavar="SCAN", help="NIfTI file, folder of them, DICOM series")
    line.add_argument("-o", "--output", type=Path, required=True, help="the mask (.nii.gz, .nii, .dcm), or a folder")
    line.add_argument("--probabilities", action="store_true", help="also write the probability of each class")
    line.add_argument("--dicom-seg", action="store_true", help="also write the mask of a DICOM series as DICOM SEG")
    line.add_argument("--postprocess", action="store_true", help="keep the largest component of each class")
    line.add_argument("--data", help="data set of a run of an older version, which did not record CT or MR")
    line.add_argument("--device", default="auto", help="auto, cpu or cuda")
    line.add_argument("--batch", type=int, default=32, help="slices that pass the network at once (eight: a patch)")
    said = "write a student as ONNX, OpenVINO or a MONAI bundle, with its card"
    line = commands.add_parser("export", parents=[both], help=said)
    line.add_argument("--to", required=True, choices=FORMATS, help="the format")
    line.add_argument("-o", "--output", type=Path, required=True, help="the exported student's folder")
    line.add_argument("--data", help="data set that it was trained on; int8 is calibrated on its training slices")


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
    if not any(folder.glob("notebooks/[0-9]*.ipynb")) and not any(folder.glob("tables/[0-9]*.csv")):
        others = sorted({path.parents[1].name for path in folder.parent.glob("*/tables/[0-9]*.csv")})
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
        runs = [from_json(record) for record in (found if isinstance(found, list) else [found])]
    except InputError as error:
        raise InputError(f"{options.file}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{options.file} cannot be read as JSON: {error}") from None
    if not runs:
        raise InputError(f"{options.file} holds no run: give one, or a list of runs, with the fields of kdlib.Run")
    parallel.train(runs, options.results, options.processes, options.device)
    print(f"{len(runs)} runs are done in {Path(options.results, 'runs')}")
    return 0


def _dry_run(options: argparse.Namespace) -> int:
    from kdlib.experiments.dry_run import describe  # needs torch

    found = plan(options)
    parameters = {name: found["parameters"][name] for name in found["experiments"]}
    with warnings_said():
        print(describe(found | {"parameters": parameters}))
    return 0


def main(command: Sequence[str]) -> int:
    """Runs a command line.

    Returns:
        The exit status: 0, 1 for a job that failed, 2 for input that cannot be used, 130 when stopped by Ctrl-C, 143
        when stopped by SIGTERM.
    """
    for_snakemake = trains = False
    try:
        for word in command:
            if re.search("[\0\ud800-\udfff]", word):
                raise InputError(f"{ascii(word)}: no text (NUL, or bytes that are no UTF-8); rename the file")
        options = parser().parse_args(command)
        trains = options.command in ("study", "run", "train")
        for_snakemake = getattr(options, "record", None) is not None
        if options.command == "study":
            return run_study(options, command)
        commands = {"run": _run, "report": _report, "train": _train, "dry-run": _dry_run}
        if options.command not in commands:
            from kdlib.apps import importing, site, students  # need torch

            commands |= {"import": importing.run_import, "site": site.run_site}
            commands |= {"predict": students.run_predict, "export": students.run_export}
        return commands[options.command](options)
    except (InputError, TrainingError, NotebookError) as error:
        # a study prints the causes of its failed jobs when all have ended
        if not for_snakemake or isinstance(error, NotebookError):
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt as stop:
        if not for_snakemake:
            kept = (
                "finished trainings are kept, the same command resumes from them" if trains else "what is written stays"
            )
            print(f"stopped: {kept}", file=sys.stderr)
        return 128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT)
