"""Strict papermill: a notebook runs with checked parameters, and its executed copy becomes a page to read.

Papermill only warns of a misspelt parameter and of a notebook without any; here both are errors, before anything runs.
"""

from __future__ import annotations

import ast
import difflib
import json
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import nbformat
import papermill
import psutil
from papermill.exceptions import PapermillExecutionError, strip_color

from kdlib.config import InputError, lookup
from kdlib.files import check_study_or_job, write_text
from kdlib.strict import FORESEEN

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
KINDS = {"int": int, "float": float, "str": str, "bool": bool, "dict": dict}


class NotebookError(RuntimeError):
    """A notebook stopped on an error that kdlib did not foresee: the message ends with the path of its copy."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGINT: what is trained is kept. Its argument is the signal's number."""


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook file, checked against the notebook format.

    Raises: InputError: no such file (lists the notebooks beside it), or not a notebook.
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


def read_parameters(path: Path) -> dict[str, str]:
    """Name -> type, as written, of the parameters in the one cell tagged `parameters`, e.g. `folds: list[int] = [0]`.

    A type is int, float, str, bool, dict or list[...] of one of them, also with `| None`, which papermill's own
    inspection cannot read.

    Raises: InputError: not exactly one such cell, not valid Python, or a parameter without a type.
    """
    cells = [cell for cell in read_notebook(path).cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{path}: {len(cells)} cells are tagged 'parameters', one must be; set the tag in JupyterLab")
    try:
        lines = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise InputError(f"{path}: line {error.lineno} of its parameters cell is not Python ({error.msg})") from None
    for line in lines:
        if isinstance(line, ast.Assign):
            raise InputError(f"{path}: parameter {ast.unparse(line)!r} has no type; write it as `name: int = 0`")
    return {ast.unparse(line.target): ast.unparse(line.annotation) for line in lines if isinstance(line, ast.AnnAssign)}


def convert(value: object, annotation: str) -> object:
    """A value as its annotation says: text is parsed, anything else must already be of that type.

    Raises: ValueError: it is not of that type.
    """
    if annotation.endswith(" | None"):
        return None if value in (None, "None") else convert(value, annotation.removesuffix(" | None"))
    if annotation.startswith("list["):
        if isinstance(value, str):
            value = json.loads(value) if value.lstrip().startswith("[") else value.replace(",", " ").split()
        if not isinstance(value, (list, tuple)):
            raise ValueError(value)
        return [convert(item, annotation.removeprefix("list[").removesuffix("]")) for item in value]
    kind = lookup("type", annotation.partition("[")[0], KINDS)
    if isinstance(value, str) and kind is not str:
        value = json.loads(value.lower() if kind is bool else value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(value)
    return value


def check_parameters(path: Path, given: Mapping[str, object]) -> dict[str, object]:
    """The given values, converted to the types that the notebook declares.

    Raises: InputError: a name that the notebook does not have, or a value of another type.
    """
    declared, values = read_parameters(path), {}
    for name, value in given.items():
        if name not in declared:
            close = difflib.get_close_matches(name, declared, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ";"
            raise InputError(f"{path} has no parameter {name!r}{hint} It has: {', '.join(declared) or 'none'}")
        try:
            values[name] = convert(value, declared[name])
        except InputError as error:
            raise InputError(f"{path}: parameter {name!r}: {error}") from None
        except ValueError:
            raise InputError(f"{path}: parameter {name!r} is {declared[name]}, not {value!r}") from None
    check_study_or_job(str(values.get("study", "x")))
    return values


@contextmanager
def _forwarding() -> Iterator[list[int]]:
    """SIGTERM and SIGINT reach the kernel as SIGTERM: a training there ends its step, saves a checkpoint and stops;
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

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        logging.disable(logging.NOTSET)


def _share(notebook: Path, listing: Path) -> None:
    """Copies an executed notebook into the folders of the runs that it trained, which its kernel listed."""
    if listing.exists():
        for folder in map(Path, listing.read_text(encoding="utf-8").splitlines()):
            partial = folder / f".{listing.name}.ipynb"
            shutil.copyfile(notebook, partial)
            os.replace(partial, folder / "notebook.ipynb")
        listing.unlink()


def _literal(path: Path) -> str:
    """A path that papermill leaves as it is: it reads braces as placeholders."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


def as_text(value: object) -> str:
    """A parameter as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def execute(notebook: Path, output: Path, parameters: Mapping[str, object]) -> None:
    """Runs a notebook in its own folder and saves the executed copy; what it prints also goes to the terminal.

    Args:
        notebook: the file to run; it is not changed.
        output: the executed copy, written whole or not at all. A notebook that stops is kept as `<name>.failed.ipynb`.
        parameters: values by name; text is converted to the type that the notebook declares.

    Raises:
        InputError: parameters that do not fit the notebook, a folder that cannot be written, or the notebook's own.
        TrainingError: the notebook's own.
        NotebookError: any other error in the notebook, with the last lines of its traceback.
        Stopped: by SIGTERM or SIGINT.
    """
    values = check_parameters(notebook, parameters)
    if os.path.isdir(output):
        raise InputError(f"{output} is a folder: name the executed copy, e.g. {output / notebook.name}")
    partial = output.with_name(f".{output.stem}.{os.getpid()}.ipynb")  # papermill saves after every cell
    failed, listing = output.with_name(f"{output.stem}.failed.ipynb"), partial.with_suffix(".runs")
    given = [word for name, value in parameters.items() for word in ("-p", name, as_text(value))]
    again = [sys.executable, "-m", "kdlib", "run", str(notebook), "-o", str(output.resolve()), *given]
    inherited = {  # by the kernel: lines, not bars, in a log; what the manifests of the runs that it trains record
        "KDLIB_PROGRESS": "plain", "KDLIB_NOTEBOOK": str(output.resolve()), "KDLIB_TRAINED": str(listing.resolve()),
        "KDLIB_RERUN": shlex.join(again),
    }  # fmt: skip
    asked: list[int] = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with mock.patch.dict(os.environ, inherited), _forwarding() as asked:
            papermill.execute_notebook(
                _literal(notebook), _literal(partial), values, kernel_name="python3", language="python",
                cwd=notebook.resolve().parent, progress_bar=False, stdout_file=sys.stdout,
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # the kernel's own log tells a reader nothing
            )  # fmt: skip
        _fold(partial)
        os.replace(partial, output)
        failed.unlink(missing_ok=True)
    except (PapermillExecutionError, RuntimeError) as error:
        raise Stopped(asked[0]) if asked else _failure(notebook, error, failed) from None
    except OSError as error:
        raise InputError(f"{output} could not be saved: {error}; fix that and run again") from None
    finally:
        if partial.exists():  # whatever stopped it, Ctrl-C included
            os.replace(partial, failed)
        _share(failed if failed.exists() else output, listing)
    if asked:
        raise Stopped(asked[0])


def _fold(path: Path) -> None:
    """Hides parameters and logs of an executed notebook, for JupyterLab as its pages do; a click opens them."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        hidden = {}
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            hidden["source_hidden"] = True
        if cell.get("outputs") and all(output.output_type == "stream" for output in cell.outputs):
            hidden["outputs_hidden"] = True
        if hidden:
            cell.metadata["jupyter"] = hidden
    nbformat.write(notebook, path)


def _failure(notebook: Path, error: Exception, failed: Path) -> Exception:
    if isinstance(error, RuntimeError):  # of the kernel, not of the code in it
        return NotebookError(f"{notebook.name}: {error} (out of memory?); executed so far: {failed}")
    if error.ename in FORESEEN:
        return FORESEEN[error.ename](error.evalue)
    trace = strip_color("\n".join(error.traceback)).rstrip().splitlines()[-12:]
    lines = [f"{notebook.name} stopped in cell [{error.exec_count}]: {error.ename}", *(f"    {line}" for line in trace)]
    return NotebookError("\n".join([*lines, f"executed so far: {failed}"]))


def render(folder: Path, leave_out: Sequence[str] = ()) -> list[Path]:
    """Writes a study's executed notebooks as pages: `report.html`, and one in `notebooks/` for each chapter.

    A page loads nothing, from this machine or from elsewhere, and runs no script; its code is folded away.

    Args:
        folder: of the study; its `notebooks/` hold the executed copies.
        leave_out: chapters that get no page.

    Returns: the pages, the report first where there is one.
    """
    from nbconvert import HTMLExporter  # half a second that only this needs
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    paths = sorted(folder.glob("notebooks/[a-z0-9]*.ipynb"), key=lambda path: (path.stem != "report", path.stem))
    chapters = {
        path: read_notebook(path) for path in paths if not path.stem.endswith(".failed") and path.stem not in leave_out
    }
    titles = {path: _title(notebook, path.stem) for path, notebook in chapters.items()}
    pages = {path: folder / "report.html" if path.stem == "report" else path.with_suffix(".html") for path in chapters}
    exporter = HTMLExporter(
        template_file=str(Path(__file__).with_name("chapter.html.j2")), embed_images=True, exclude_input_prompt=True,
        exclude_output_prompt=True, exclude_anchor_links=True,
    )  # fmt: skip
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)  # one log for each cell, not a line each
    for path, notebook in chapters.items():
        paths_to = {other: os.path.relpath(page, pages[path].parent) for other, page in pages.items()}
        links = [(paths_to[other], title, other == path) for other, title in titles.items()]
        facts = {"title": titles[path], "study": folder.resolve().name, "links": links}
        for cell in notebook.cells:  # nbconvert embeds only pictures below the folder that it is given
            cell.source = cell.source.replace("](../", "](") if cell.cell_type == "markdown" else cell.source
        rest = sorted(notebook.cells[1:], key=lambda cell: "answer" not in cell.metadata.get("tags", []))
        notebook.cells[1:] = rest  # the answer moves up to below the chapter's title and question
        about = {"metadata": {"name": path.stem, "path": str(NOTEBOOKS.parent)}}
        text, _ = exporter.from_notebook_node(notebook, about | facts)
        write_text(pages[path], text)
    return list(pages.values())


def _title(notebook: nbformat.NotebookNode, otherwise: str) -> str:
    first = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    heading = first.partition("\n")[0]
    return heading.removeprefix("# ") if heading.startswith("# ") else otherwise
