from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

import kdlib
from kdlib.apps import jobs, study
from kdlib.apps.cli import main, parser
from kdlib.apps.notebooks import NotebookError, check_parameters, convert, execute, read_parameters, render
from kdlib.apps.study import plan
from kdlib.config import InputError, TrainingError


def write_notebook(path: Path, parameters: str, *cells: str) -> Path:
    """A notebook whose first cell declares parameters."""
    first = v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=[first, *map(v4.new_code_cell, cells)]), path)
    return path


def outputs(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells if cell.cell_type == "code" for output in cell.outputs)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("3", "int", 3),
        (3, "int", 3),
        ("1e-4", "float", 1e-4),
        (2, "float", 2.0),
        ("spleen", "str", "spleen"),
        ("3", "str", "3"),
        ("false", "bool", False),
        ("True", "bool", True),
        (True, "bool", True),
        ("0 1", "list[int]", [0, 1]),
        ("[0, 1]", "list[int]", [0, 1]),
        ("", "list[int]", []),
        ((0, 1), "list[int]", [0, 1]),
        ('["kl", "at"]', "list[str]", ["kl", "at"]),
        ("0.5,1", "list[float]", [0.5, 1.0]),
        ("None", "str | None", None),
        (None, "str | None", None),
        ("violin", "str | None", "violin"),
        ('{"spacing": 2.0}', "dict[str, object]", {"spacing": 2.0}),
        ({}, "dict", {}),
    ],
)
def test_a_value_becomes_what_its_annotation_says(value, annotation, expected):
    converted = convert(value, annotation)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("abc", "int"),
        ("1.5", "int"),
        (1.5, "int"),
        (True, "int"),
        (None, "int"),
        ("much", "float"),
        (True, "float"),
        (3, "str"),
        ("maybe", "bool"),
        (1, "bool"),
        ("0 x", "list[int]"),
        (0, "list[int]"),
        ([0.5], "list[int]"),
        (3, "str | None"),
        ("[1]", "dict"),
        ("{", "dict"),
    ],
)
def test_a_value_of_another_type_is_refused(value, annotation):
    with pytest.raises(ValueError):
        convert(value, annotation)


# ---------------------------------------------------------------------------------------------------------- parameters

DECLARED = """\
# what to run
data: str = "phantom"  # folder
folds: list[int] = [0]  # outer folds, a = b
weight: float = 1e-4
figure: str | None = None
"""


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "01_baseline.ipynb", DECLARED)


def test_parameters_are_read_with_their_types(notebook):
    expected = {"data": "str", "folds": "list[int]", "weight": "float", "figure": "str | None"}
    assert read_parameters(notebook) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": "x", "fold": "0"}, ["01_baseline.ipynb", "'fold'", "did you mean 'folds'", "data, folds, weight"]),
        ({"data": "x", "zzz": "0"}, ["'zzz'", "data, folds, weight, figure"]),
        ({"data": "x", "weight": "abc"}, ["'weight'", "float", "'abc'"]),
    ],
)
def test_parameters_that_do_not_fit_name_what_is_wrong(notebook, given, words):
    with pytest.raises(InputError) as caught:
        check_parameters(notebook, given)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_text_is_converted_and_defaults_are_left_to_the_notebook(notebook):
    assert check_parameters(notebook, {"data": "phantom", "folds": "0 1"}) == {"data": "phantom", "folds": [0, 1]}


@pytest.mark.parametrize(
    ("sources", "tags", "word"),
    [
        (["fold: int = 0"], (), "0 cells are tagged"),
        (["fold: int = 0"] * 2, ("parameters",), "2 cells"),
        (["fold = 0"], ("parameters",), "no type"),
        (["fold: int = "], ("parameters",), "line 1"),
        (["fold: Path = 0"], ("parameters",), "'Path'.*int, float, str, bool"),
    ],
)
def test_a_bad_parameters_cell_is_an_error(tmp_path, sources, tags, word):
    cells = [v4.new_code_cell(source, metadata={"tags": list(tags)}) for source in sources]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    with pytest.raises(InputError, match=word):
        check_parameters(tmp_path / "a.ipynb", {"fold": "0"})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"cells": [', '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{}]}', "\xff"],
)
def test_a_file_that_is_no_notebook_is_an_error_and_a_missing_one_lists_those_there_are(tmp_path, text):
    path = tmp_path / "a.ipynb"
    path.write_bytes(text.encode("latin-1"))
    for asked, message in ((path, "not a readable notebook"), (tmp_path / "b.ipynb", "does not exist.*a.ipynb")):
        with pytest.raises(InputError, match=message) as caught:
            read_parameters(asked)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- execution


def test_an_executed_copy_is_saved_and_its_lines_reach_the_terminal(tmp_path, capsys):
    path = write_notebook(
        tmp_path / "note {books}" / "a.ipynb",
        DECLARED,
        "import os\nprint(data, folds, weight, figure, os.environ['KDLIB_PROGRESS'])",
        "print(os.path.basename(os.getcwd()))",
    )
    before, output = path.read_bytes(), tmp_path / "out {0}" / "b.ipynb"
    output.parent.mkdir()
    output.with_name("b.failed.ipynb").touch()  # of an earlier, failed run
    execute(path, output, {"data": "it's $HOME", "folds": "0 1"})
    printed = "it's $HOME [0, 1] 0.0001 None plain\nnote {books}\n"
    assert capsys.readouterr().out == printed
    assert outputs(output) == printed
    assert names(output.parent) == ["b.ipynb"]
    assert path.read_bytes() == before
    assert "KDLIB_PROGRESS" not in os.environ


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (
            "from kdlib.config import InputError\nraise InputError('label x: choose spleen')",
            InputError,
            "^label x: choose spleen$",
        ),
        ("from kdlib.config import TrainingError\nraise TrainingError('S1 is NaN')", TrainingError, "^S1 is NaN$"),
        ("1 / 0", NotebookError, r"(?s)a\.ipynb stopped in cell \[3\].*Error: division by zero.*b\.failed\.ipynb$"),
        ("import os\nos._exit(1)", NotebookError, "(?i)kernel died"),
    ],
)
def test_a_notebook_that_stops_is_kept_beside_the_last_good_one(tmp_path, cell, error, message):
    path = write_notebook(tmp_path / "a.ipynb", "fold: int = 0", cell)
    output = tmp_path / "out" / "b.ipynb"
    output.parent.mkdir()
    output.write_text("finished earlier")
    with pytest.raises(error, match=message) as caught:
        execute(path, output, {"fold": 1})
    assert "\x1b" not in str(caught.value)
    assert names(output.parent) == ["b.failed.ipynb", "b.ipynb"]
    assert output.read_text() == "finished earlier"
    assert cell.splitlines()[-1] in output.with_name("b.failed.ipynb").read_text().replace("\\n", "\n")


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "fold: int = 0")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="could not be saved"):
        execute(path, tmp_path / "file" / "b.ipynb", {})


def test_ctrl_c_stops_the_kernel_and_says_how_to_go_on(tmp_path):
    path = write_notebook(
        tmp_path / "a.ipynb", "seconds: int = 1", "import os, time\nprint('kernel', os.getpid())\ntime.sleep(seconds)"
    )
    command = [sys.executable, "-m", "kdlib", "run", path, "-o", tmp_path / "b.ipynb", "-p", "seconds", "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        kernel = int(process.stdout.readline().split()[1])
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors == "stopped: finished trainings are kept, the same command resumes from them\n"
    assert names(tmp_path) == ["a.ipynb", "b.failed.ipynb"]
    for _ in range(3000):  # the kernel may need a moment to leave
        if not Path(f"/proc/{kernel}").exists():
            return
        time.sleep(0.1)
    pytest.fail(f"kernel {kernel} is still running")


# -------------------------------------------------------------------------------------------------------------- pages


def test_executed_notebooks_become_pages_that_load_nothing_and_hide_their_code(tmp_path):
    folder = tmp_path / "s"
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    for name, title in (("report", "The study"), ("02_distillation", "2 · Does it <help>?")):
        data = {"image/png": png, "text/html": "<script>alert(1)</script><table></table>"}
        outputs = [v4.new_output("stream", name="stdout", text=f"epoch {epoch}\n") for epoch in range(5)]
        outputs += [v4.new_output("display_data", data), v4.new_output("display_data", {"image/png": png})]
        cells = [v4.new_markdown_cell(f"# {title}\n\nWords."), v4.new_code_cell("secret = 1", outputs=outputs)]
        (folder / "notebooks").mkdir(parents=True, exist_ok=True)
        nbformat.write(v4.new_notebook(cells=cells), folder / "notebooks" / f"{name}.ipynb")
    (folder / "notebooks" / "03_ablation.failed.ipynb").write_text("no notebook")
    assert render(folder) == [folder / "report.html", folder / "notebooks" / "02_distillation.html"]
    report, chapter = (path.read_text(encoding="utf-8") for path in render(folder))
    assert 'href="notebooks/02_distillation.html"' in report and 'href="../report.html"' in chapter
    assert "2 · Does it &lt;help&gt;?" in report
    for page in (report, chapter):
        assert "default-src 'none'" in page and "data:image/png;base64," in page
        assert not re.search(r'(src|href)="(https?:|//)', page) and "<script src" not in page
        assert re.search(r"<details><summary>code</summary>\s*<pre>secret = 1", page)
        assert page.count("<summary>log</summary>") == 1 and "epoch 4" in page, "one log, whatever it was written in"


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["run", "{notebook}", "-o", "b.ipynb", "-p", "fold", "0"], "did you mean 'folds'"),
        (["run", "{notebook}", "-o", "b.ipynb", "-p", "folds", "0", "-p", "folds", "1"], "given twice"),
        (["run", "nowhere.ipynb", "-o", "b.ipynb"], "does not exist"),
        (["study", "--folds", "0 x"], "whole numbers"),
        (["study", "--folds", "7"], "fold 7"),
        (["study", "--folds", ""], "at least one"),
        (["study", "--folds", "0 0"], "each once"),
        (["study", "--group=-(.)$"], "group '-(.)$': it must not be empty or begin with '-'"),
        (["study", "--group=patients.csv"], "group patients.csv: no such file"),
        (["study", "--data", "~nobody-of-that-name/d"], "does not exist"),
        (["study", "--changes", '{"spacing": 1' + "0" * 400 + "}"], "spacing"),
        (["run", "{notebook}", "-o", ".", "-p", "folds", "0"], "is a folder"),
        (["study", "--seeds", "-1"], "seed"),
        (["study", "--only", "01_base"], "00_data, 01_baseline"),
        (["study", "--data", "no-such-folder"], "no-such-folder does not exist"),
        (["study", "--profile", "fast"], "quick, hippocampus"),
        (["study", "--protocol", "theses"], "corrected, thesis"),
        (["study", "--changes", "size=64"], "JSON object"),
        (["study", "--changes", '{"size": 100}'], "multiple of 16"),
        (["study", "--changes", '{"folds": "three"}'], "folds"),
        (["study", "--changes", '{"student_steps": -3}'], "student_steps"),
        (["study", "--study", "../elsewhere"], "study name"),
        (["study", "--study", "runs"], "study name"),
        (["study", "--target", " "], "target"),
        (["study", "--target=--help"], "target"),
        (["study", "--device", "tpu"], "'tpu'"),
        (["study", "--on-defect", "ignore"], "ignore"),
        (["study", "--cores", "abc"], "whole numbers"),
        (["study", "--cores", "-2"], "number of CPUs"),
        (["study", "--coers", "2"], "--coers"),
        (["report", "nowhere"], "holds no study"),
    ],
)
def test_input_errors_are_one_line_and_status_2(notebook, monkeypatch, capsys, command, word):
    monkeypatch.chdir(notebook.parent)
    assert main([part.replace("{notebook}", str(notebook)) for part in command]) == 2
    printed, errors = capsys.readouterr()
    assert errors.startswith("error: ") and errors.count("\n") == 1 and word in errors
    assert printed == "" and [path.name for path in notebook.parent.iterdir()] == [notebook.name]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "phantom-spleen-quick"),
        (["--protocol", "thesis"], "phantom-spleen-quick-thesis"),
        (["--changes", '{"size": 64, "student": {"lr": 0.01}}'], "phantom-spleen-quick-size-64-student-lr-0-01"),
        (["--data", "Task09 Spleen/", "--profile", "ct128"], "task09-spleen-spleen-ct128"),
        (["--study", "My_study.2"], "My_study.2"),
    ],
)
def test_a_study_is_named_after_what_it_is_made_of(tmp_path, monkeypatch, words, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Task09 Spleen").mkdir()
    shared = plan(parser().parse_args(["study", *words]))["shared"]
    assert shared["study"] == name
    assert shared["results"] == str(tmp_path / "results")
    assert shared["data"] in ("phantom", str(tmp_path / "Task09 Spleen"))


def test_a_table_of_patients_is_found_where_the_command_is_typed_and_its_change_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    words = ["study", "--data", "data", "--group", "patients.csv"]
    (tmp_path / "patients.csv").write_text("case,patient\na,1\n")
    here = study.study_parameters(parser().parse_args(words))[0]
    assert here["group"] == str(tmp_path / "patients.csv")
    (tmp_path / "data" / "patients.csv").write_text("case,patient\na,1\n")
    there = study.study_parameters(parser().parse_args(words))[0]
    assert there["group"] == "patients.csv"
    for shared, path in ((here, Path("patients.csv")), (there, Path("data/patients.csv"))):
        before = study._fingerprint(shared["data"], shared["group"])
        path.write_text("case,patient\na,1\nb,1\n")
        assert study._fingerprint(shared["data"], shared["group"]) != before


def test_the_conclusion_is_no_study_to_report_on(tmp_path, capsys):
    for name, table in (("conclusion", "everything"), ("mine", "01_baseline")):
        (tmp_path / name / "tables").mkdir(parents=True)
        (tmp_path / name / "tables" / f"{table}.csv").write_text("a\n1\n")
    assert main(["report", str(tmp_path / "conclusion")]) == 2
    assert capsys.readouterr().err.endswith("holds no study: " + f"{tmp_path} has mine\n")


def test_the_last_line_of_a_job_needs_no_end(tmp_path, capsys):
    with jobs.recorded(tmp_path / "01_baseline" / "done.json", tmp_path):
        print("one\ntwo", end="")
    assert "01_baseline: one\n01_baseline: two\n==" in capsys.readouterr().out


def test_the_wrapper_waits_for_neither_torch_nor_training_code():
    code = "import sys, kdlib.apps.cli; print({'torch', 'monai', 'pandas', 'kdlib.experiments'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_every_name_of_the_package_is_there():
    assert {name for name in kdlib.__all__ if not hasattr(kdlib, name)} == set()
    with pytest.raises(AttributeError, match="no attribute 'studdy'"):
        kdlib.studdy  # noqa: B018
