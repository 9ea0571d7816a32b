"""Strict papermill: runs one notebook with checked parameters, or every experiment of a study in its order.

    python -m kdlib.apps.notebooks run notebooks/01_baseline.ipynb -p folds 0 -p seeds "0 1" -o baseline.ipynb
    python -m kdlib.apps.notebooks study --data phantom --profile quick --results results

Papermill only warns of a misspelt parameter and of a notebook without any; here both are errors, before anything runs.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import psutil
from papermill.exceptions import PapermillExecutionError, strip_color

from kdlib.apps.engine import WAITING, Place, dry_run, job_status, run_jobs
from kdlib.config import PROFILES, PROTOCOLS, InputError, TrainingError, lookup, override_profile

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
EXPERIMENTS = ("00_data", "01_baseline", "02_distillation", "03_ablation", "04_loss_comparison", "06_figures")
ORDER = (
    *EXPERIMENTS[:-1],
    "05_correction",
    EXPERIMENTS[-1],
)  # the bridge trains teachers anew at every stage: on request


class NotebookError(RuntimeError):
    """A notebook stopped on an error that kdlib did not dry_run: the message ends with where its copy lies."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGINT: what is trained is kept. Its argument is the signal's number."""


# --------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's `parameters` cell, e.g. `folds: list[int] = [0]`.

    Args:
        annotation: the type as written: int, float, str, bool, dict or list[...] of one of them, also with `| None`.
        required: its default is None although its type is not optional, so that whoever runs the notebook must choose.
    """

    annotation: str
    required: bool


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook file, checked against the notebook format.

    Raises:
        InputError: no such file (lists the notebooks beside it), or not a notebook.
    """
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        files = path.parent.glob("*.ipynb") if os.path.isdir(path.parent) else ()
        beside = ", ".join(sorted(file.name for file in files)) or "no notebook"
        raise InputError(f"{path} does not exist: {path.parent} has {beside}")
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    # a JSON file that is no notebook fails anywhere inside nbformat
    except (OSError, ValueError, TypeError, AttributeError, nbformat.ValidationError) as error:
        cause = str(error).splitlines()[0][:100]
        raise InputError(f"{path} is not a readable notebook ({cause}): restore it or save it again") from None
    return notebook


def read_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters that a notebook declares in its one cell tagged `parameters`.

    Papermill's own inspection cannot read `str | None`, hence the syntax tree.

    Raises:
        InputError: not exactly one such cell, not valid Python, or a parameter without a type.
    """
    cells = [cell for cell in read_notebook(path).cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{path}: {len(cells)} cells are tagged 'parameters', one must be; set the tag in JupyterLab")
    try:
        lines = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise InputError(f"{path}: line {error.lineno} of its parameters cell is not Python ({error.msg})") from None
    parameters = {}
    for line in lines:
        if isinstance(line, ast.Assign):
            raise InputError(f"{path}: parameter {ast.unparse(line)!r} has no type; write it as `name: int = 0`")
        if isinstance(line, ast.AnnAssign):
            annotation = ast.unparse(line.annotation)
            unset = line.value is None or (isinstance(line.value, ast.Constant) and line.value.value is None)
            parameters[ast.unparse(line.target)] = Parameter(annotation, unset and not annotation.endswith("| None"))
    return parameters


def convert(value: object, annotation: str) -> object:
    """A value as its annotation says: text is parsed, anything else must already be of that type.

    Raises:
        ValueError: it is not of that type.
    """
    if annotation.endswith(" | None"):
        return None if value in (None, "None") else convert(value, annotation.removesuffix(" | None"))
    if annotation.startswith("list["):
        items = value.strip("[]() ").replace(",", " ").split() if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ValueError(value)
        return [convert(item, annotation.removeprefix("list[").removesuffix("]")) for item in items]
    if annotation.startswith("dict"):
        kind, parse = dict, json.loads
    else:
        kinds = {
            "int": (int, int),
            "float": (float, float),
            "str": (str, str),
            "bool": (bool, lambda text: ("false", "true").index(text.lower()) == 1),
        }
        kind, parse = lookup("type", annotation, kinds)
    value = parse(value) if isinstance(value, str) else value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(value)
    return value


def check_parameters(path: Path, given: Mapping[str, object]) -> dict[str, object]:
    """The given values, converted to the types that the notebook declares.

    Raises:
        InputError: a name that the notebook does not have, a value of another type, or a required one not given.
    """
    declared = read_parameters(path)
    values = {}
    for name, value in given.items():
        if name not in declared:
            close = difflib.get_close_matches(name, declared, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ";"
            raise InputError(f"{path} has no parameter {name!r}{hint} It has: {', '.join(declared) or 'none'}")
        try:
            values[name] = convert(value, declared[name].annotation)
        except InputError as error:
            raise InputError(f"{path}: parameter {name!r}: {error}") from None
        except ValueError:
            raise InputError(f"{path}: parameter {name!r} is {declared[name].annotation}, not {value!r}") from None
    for part in str(values.get("study", "x")).split("/"):  # a job of a study has a folder in it
        check_study(part)
    missing = [name for name, parameter in declared.items() if parameter.required and name not in values]
    if missing:
        raise InputError(f"{path}: give its required parameters: {', '.join(missing)}")
    return values


# ------------------------------------------------------------------------------------------------------- one notebook


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _forwarding() -> Iterator[list[int]]:
    """SIGTERM and SIGINT go on to the kernel as SIGTERM: a training there ends its step, saves a checkpoint and stops;
    anything else stops at once. A second Ctrl-C does not wait for that. Yields the signals that came."""
    asked: list[int] = []
    others = psutil.Process().children()

    def forward(number: int, frame: object) -> None:
        kernels = [child for child in psutil.Process().children() if child not in others]
        if not kernels or (asked and number == signal.SIGINT):
            raise Stopped(number)
        asked.append(number)
        logging.disable()  # that the kernel dies is no news
        for kernel in kernels:
            kernel.terminate()

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield asked
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        logging.disable(logging.NOTSET)


def _share(notebook: Path, listing: Path) -> None:
    """Puts an executed notebook into the folders of the runs that it trained, which its kernel listed."""
    if not listing.exists():
        return
    for folder in map(Path, listing.read_text(encoding="utf-8").splitlines()):
        partial = folder / f".{listing.name}.ipynb"
        try:
            os.link(notebook, partial)
        except OSError:  # another disk, or one without links
            shutil.copyfile(notebook, partial)
        os.replace(partial, folder / "notebook.ipynb")
    listing.unlink()


def _literal(path: Path) -> str:
    """A path that papermill leaves as it is: it reads braces as placeholders."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


def execute(notebook: Path, output: Path, parameters: Mapping[str, object], kernel: str = "python3") -> None:
    """Runs a notebook in its own folder and saves the executed copy; what it prints also goes to the terminal.

    Args:
        notebook: the file to run; it is not changed.
        output: the executed copy, written whole or not at all. A notebook that stops is kept as `<name>.failed.ipynb`.
        parameters: values by name; text is converted to the type that the notebook declares.
        kernel: name of the Jupyter kernel.

    Raises:
        InputError: parameters that do not fit the notebook, a folder that cannot be written, or the notebook's own.
        TrainingError: the notebook's own.
        NotebookError: any other error in the notebook, with the last lines of its traceback.
        Stopped: by SIGTERM or SIGINT.
    """
    values = check_parameters(notebook, parameters)
    partial = output.with_name(f".{output.stem}.{os.getpid()}.ipynb")  # papermill saves after every cell
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    listing = output.with_name(f".{output.stem}.{os.getpid()}.runs")
    given = [str(part) for name, value in parameters.items() for part in ("-p", name, _text(value))]
    again = [sys.executable, "-m", "kdlib.apps.notebooks", "run", str(notebook), "-o", str(output.resolve()), *given]
    inherited = {  # by the kernel: lines, not bars, in a log; what stands in the manifests of the runs that it trains
        "KDLIB_PROGRESS": "plain", "KDLIB_NOTEBOOK": str(output.resolve()), "KDLIB_TRAINED": str(listing.resolve()),
        "KDLIB_RERUN": shlex.join(again),
    }  # fmt: skip
    asked: list[int] = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _environment(**inherited), _forwarding() as asked:
            papermill.execute_notebook(
                _literal(notebook), _literal(partial), values, kernel_name=kernel, language="python",
                cwd=notebook.resolve().parent, progress_bar=False, stdout_file=sys.stdout,
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # the kernel's own log tells a reader nothing
            )  # fmt: skip
        os.replace(partial, output)
        failed.unlink(missing_ok=True)
    except PapermillExecutionError as error:
        raise Stopped(asked[0]) if asked else _stopped(notebook, error, failed) from None
    except RuntimeError as error:  # of the kernel, not of the code in it
        if asked:
            raise Stopped(asked[0]) from None
        raise NotebookError(f"{notebook.name}: {error} (out of memory?); as far as it came: {failed}") from None
    except OSError as error:
        raise InputError(f"{output} could not be saved: {error}; mend that and run again") from None
    finally:
        if partial.exists():  # whatever stopped it, Ctrl-C included
            os.replace(partial, failed)
        _share(failed if failed.exists() else output, listing)
    if asked:
        raise Stopped(asked[0])


def _text(value: object) -> str:
    """A parameter as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _stopped(notebook: Path, error: PapermillExecutionError, failed: Path) -> Exception:
    for known in (InputError, TrainingError):
        if error.ename == known.__name__:
            return known(error.evalue)
    trace = strip_color("\n".join(error.traceback)).rstrip().splitlines()[-12:]
    lines = [f"{notebook.name} stopped in cell [{error.exec_count}]: {error.ename}", *(f"    {line}" for line in trace)]
    return NotebookError("\n".join([*lines, f"as far as it came: {failed}"]))


# -------------------------------------------------------------------------------------------------------------- study


def check_study(name: str) -> None:
    """Raises InputError where a study's name is not that of a folder in results, and of one that is free."""
    if name in ("data", "runs", "splits"):
        raise InputError(f"study name {name!r}: results keeps its {name} under that name; choose another")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(
            f"study name {name[:100]!r}: use up to 100 letters, digits, '.', '_' and '-', the first a letter or digit"
        )


def study_parameters(
    data: str, target: str, profile: str, protocol: str, folds: list[int], seeds: list[int], device: str, results: str,
    study: str = "", changes: Mapping[str, object] | None = None, on_defect: str = "raise",
) -> dict[str, object]:  # fmt: skip
    """The parameters that the experiments share, checked before the first training; paths become absolute.

    Args:
        study: name of the study's folder in `results`; empty for one made of data, target, profile and protocol.
        changes: fields of the profile to change (see `kdlib.config.override_profile`).

    Raises:
        InputError: no such folder, profile, protocol or fold, or a study name that is not a plain folder name.
    """
    lookup("protocol", protocol, PROTOCOLS)
    known = range(override_profile(profile, changes).folds)
    for name, numbers in (("folds", folds), ("seeds", seeds)):
        if not numbers:
            raise InputError(f"{name}: give at least one, e.g. 0")
    for name, text in (("target", target), ("on_defect", on_defect), ("device", device)):
        if not text.strip() or text.startswith("-"):  # a job could not be given it on its command line
            raise InputError(f"{name} {text!r}: it must not be empty or begin with '-'")
    if any(fold not in known for fold in folds):
        raise InputError(f"folds {folds}: profile {profile!r} has folds 0 to {known[-1]}")
    if data != "phantom":
        folder = Path(data).expanduser().resolve()
        if not os.path.isdir(folder):
            raise InputError(f"data folder {folder} does not exist: give a folder in Decathlon layout, or 'phantom'")
        data = str(folder)
    if not study:
        parts = [Path(data).name, target, profile, *([protocol] if protocol != "corrected" else [])]
        study = re.sub("[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
    check_study(study)
    return {
        "data": data, "target": target, "profile": profile, "protocol": protocol, "folds": folds, "seeds": seeds,
        "changes": dict(changes or {}), "on_defect": on_defect, "device": device,
        "results": str(Path(results).expanduser().resolve()), "study": study,
    }  # fmt: skip


def plan_study(
    shared: Mapping[str, object], experiments: Iterable[str], notebooks: Path
) -> dict[str, dict[str, object]]:
    """The parameters of each experiment's notebook: of the shared ones those that it declares.

    Raises:
        InputError: an experiment does not exist, or its notebook cannot take these parameters.
    """
    plans = {}
    for name in experiments:
        path = notebooks / f"{name}.ipynb"
        declared = read_parameters(path)
        plans[name] = check_parameters(path, {key: value for key, value in shared.items() if key in declared})
    return plans


def run_study(
    shared: Mapping[str, object], experiments: Sequence[str] = EXPERIMENTS, notebooks: Path = NOTEBOOKS
) -> dict[str, str]:
    """Runs experiments in turn into `<results>/<study>/notebooks/`; one that fails does not hold up the others.

    The simple way, for tests and for debugging; the command line has the jobs of the Snakefile do the same.

    Args:
        shared: see `study_parameters`; each notebook gets those that it declares.
        experiments: names of notebooks, without `.ipynb`.
        notebooks: the folder they lie in.

    Returns:
        What stopped each experiment that failed; empty when all went well.

    Raises:
        InputError: an experiment does not exist, or its notebook cannot take these parameters, and nothing has run; or
            a notebook refused its input, which would stop all that follow too.
    """
    folder = Path(str(shared["results"])) / str(shared["study"])
    failures = {}
    for name, values in plan_study(shared, experiments, notebooks).items():
        path = notebooks / f"{name}.ipynb"
        print(f"== {path.stem}")
        start = time.perf_counter()
        try:
            execute(path, folder / "notebooks" / path.name, values)
            print(f"== {path.stem} took {time.perf_counter() - start:.0f} s")
        except (TrainingError, NotebookError) as error:
            failures[path.stem] = str(error)
            print(f"== {path.stem} failed after {time.perf_counter() - start:.0f} s: {error}")
    return failures


def _made(folder: Path, experiments: Sequence[str]) -> list[Path]:
    notebooks = [folder / "notebooks" / f"{name}.ipynb" for name in experiments]
    patterns = ("tables/*.csv", "tables/*.tex", "figures/*.pdf", "figures/*.png", "report.html")
    return notebooks + [path for pattern in patterns for path in sorted(folder.glob(pattern))]


# ------------------------------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kdlib.apps.notebooks", description="Runs notebooks without JupyterLab."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run one notebook")
    run.add_argument("notebook", type=Path)
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("-o", "--output", type=Path, required=True, help="the executed copy")
    run.add_argument("--record", type=Path, help="file that says the notebook is done; for a job of the Snakefile")
    study = commands.add_parser("study", help="run every experiment")
    study.add_argument("--data", default="phantom", help="folder in Decathlon layout, or 'phantom'")
    study.add_argument("--target", default="spleen", help="label names joined by ',', or 'all'")
    study.add_argument("--profile", default="quick", help=", ".join(PROFILES))
    study.add_argument("--protocol", default="corrected", help=", ".join(PROTOCOLS))
    study.add_argument("--changes", default="{}", help="fields of the profile to change, as JSON")
    study.add_argument("--on-defect", default="raise", help="raise: stop at defective cases; drop: leave them out")
    study.add_argument("--folds", default="0", help="e.g. '0 1'")
    study.add_argument("--seeds", default="0", help="e.g. '0 1'")
    study.add_argument("--device", default="auto", help="auto, cpu or cuda")
    study.add_argument("--results", default="results", help="folder that trained runs and studies are kept in")
    study.add_argument(
        "--study", default="", help="name of the study's folder in results; empty for data-target-profile"
    )
    study.add_argument("--only", nargs="+", metavar="NAME", help="experiments to run, even if up to date")
    study.add_argument("--dry-run", action="store_true", help="list what would be trained, and for how long")
    study.add_argument("--cores", type=int, default=0, help="CPUs of all jobs; on a cluster of each; 0 for all, or 2")
    study.add_argument("--executor", default="local", help="where the jobs run: local, slurm, or a Snakemake plugin")
    study.add_argument("--snakemake-args", default="", help="more options for Snakemake, as one text")
    study.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="folder of the experiments' notebooks")
    return parser


def _run(options: argparse.Namespace) -> int:
    names = [name for name, _ in options.parameter]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"parameter {repeated[0]!r} is given twice; a list is one value, e.g. '0 1'")
    values = dict(options.parameter)
    if options.record is None:
        execute(options.notebook, options.output, values)
        print(f"wrote {options.output}")
    else:
        with job_status(options.record, Path(values["results"], values["study"])):
            execute(options.notebook, options.output, values)
    return 0


def _changes(text: str) -> dict[str, object]:
    try:
        changes = json.loads(text)
    except json.JSONDecodeError:
        changes = None
    if not isinstance(changes, dict):
        raise InputError(f"changes {text!r}: give a JSON object of profile fields, e.g. '{{\"spacing\": 2.0}}'")
    return changes


def _study(options: argparse.Namespace, command: Sequence[str]) -> int:
    numbers = {}
    for name in ("folds", "seeds"):
        try:
            numbers[name] = convert(getattr(options, name), "list[int]")
        except ValueError:
            raise InputError(f"{name} {getattr(options, name)!r}: give whole numbers, e.g. '0 1'") from None
    only = EXPERIMENTS if options.only is None else options.only
    for name in only:
        lookup("experiment", name, dict.fromkeys(ORDER))
    experiments = [name for name in ORDER if name in only]
    shared = study_parameters(
        options.data, options.target, options.profile, options.protocol, **numbers, device=options.device,
        results=options.results, study=options.study, changes=_changes(options.changes), on_defect=options.on_defect,
    )  # fmt: skip
    place = _place(options)
    plans = plan_study(shared, dict.fromkeys([*experiments, "01_baseline"]), options.notebooks)
    print(f"study {shared['study']}: " + ", ".join(f"{key} {value}" for key, value in shared.items() if key != "study"))
    print(
        f"profile {options.profile} against the thesis: {override_profile(options.profile, shared['changes']).reduced_from_thesis}"
    )
    if options.dry_run:
        return dry_run({name: plans[name] for name in experiments}, shared, options.notebooks)
    failures = run_jobs(experiments, plans, shared, options.notebooks, place, again=options.only or ())
    if failures and all(failure.status == 2 for failure in failures if failure.cause != WAITING):
        raise InputError("\n".join(dict.fromkeys(failure.cause for failure in failures if failure.cause != WAITING)))
    folder = Path(str(shared["results"])) / str(shared["study"])
    print(f"made in {folder}:")
    failed = {failure.job for failure in failures}
    for path in _made(folder, [name for name in experiments if name not in failed]):
        print(f"    {path.relative_to(folder)}")
    for failure in failures:
        print(f"failed: {failure.job}: {failure.cause}", file=sys.stderr)
    if failures:
        print("finished trainings are kept; the same command goes on from them:", file=sys.stderr)
        print(f"    {shlex.join([sys.executable, '-m', 'kdlib.apps.notebooks', *command])}", file=sys.stderr)
    return 1 if failures else 0


def _place(options: argparse.Namespace) -> Place:
    if options.cores < 0:
        raise InputError(f"cores {options.cores}: give a number of CPUs, or 0 for all")
    try:
        words = shlex.split(options.snakemake_args)
    except ValueError as error:
        raise InputError(f"Snakemake's options {options.snakemake_args!r}: {error}") from None
    return Place(options.executor, options.cores, tuple(words))


def main(command: Sequence[str]) -> int:
    """Runs a command line.

    Returns:
        The exit status: 0, 1 for a notebook that failed, 2 for input that cannot be used, 130 when stopped by Ctrl-C,
        143 when stopped by SIGTERM.
    """
    options = _parser().parse_args(command)
    try:
        for word in command:
            if re.search("[\0\ud800-\udfff]", word):
                raise InputError(f"{ascii(word)}: no text (NUL, or bytes that are no UTF-8); rename the file")
        return _run(options) if options.command == "run" else _study(options, command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingError, NotebookError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("stopped: finished trainings are kept, the same command goes on from them", file=sys.stderr)
        return 128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT)


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log shows each line when it is printed
    signal.signal(signal.SIGTERM, _stop)  # a cluster's stop ends this as Ctrl-C does
    sys.exit(main(sys.argv[1:]))
