"""`kdlib site`: pages for the web, of studies whose scans may be shown."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from kdlib.apps.cli import main
from kdlib.apps.site import OPEN_LICENCES


def executed(path: Path, title: str, **parameters: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"papermill": {"parameters": parameters}}
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {title}\n\nmade in {parameters}")], metadata=about), path)


def study(results: Path, name: str, **parameters: str) -> None:
    executed(results / name / "notebooks" / "report.ipynb", f"Report of {name}", results=str(results), study=name)
    executed(results / name / "notebooks" / "01_baseline.ipynb", "Baseline", results=str(results), **parameters)


def data_set(folder: Path, **about: str) -> str:
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(about))
    return str(folder)


def test_studies_of_the_phantom_and_of_open_data_become_pages_without_paths(tmp_path, capsys):
    results, out = tmp_path / "results", tmp_path / "site"
    study(results, "phantom", data="phantom")
    study(results, "brains", data=data_set(tmp_path / "brains", licence="CC-BY-SA 4.0"))
    assert main(["site", f"--results={results}", f"--output={out}"]) == 0
    assert capsys.readouterr().out == f"wrote {out}/index.html of 2 studies\n"
    index = (out / "index.html").read_text()
    for name in ("phantom", "brains"):
        assert f'href="{name}/report.html"' in index
        assert "Report of" in (out / name / "report.html").read_text()
        assert str(tmp_path) not in (out / name / "notebooks" / "01_baseline.html").read_text()


@pytest.mark.parametrize("licence", ["CC0", "cc by 4.0", "CC-BY-SA-4.0", "Apache License, Version 2.0", "MIT License"])
def test_open_licences_are_known_by_their_usual_names(licence):
    assert OPEN_LICENCES.fullmatch(licence)


def test_studies_are_never_written_over_and_pages_stay_until_new_ones_are_whole(tmp_path, capsys):
    results, out = tmp_path / "results", tmp_path / "site"
    study(results, "phantom", data="phantom")
    kept = sorted(results.rglob("*"))
    assert main(["site", f"--results={results}", f"--output={results}/../results"]) == 2
    assert "holds the studies themselves" in capsys.readouterr().err and sorted(results.rglob("*")) == kept
    assert main(["site", f"--results={results}", f"--output={out}"]) == 0
    (results / "phantom" / "notebooks" / "02_distillation.ipynb").write_text("no notebook")
    assert main(["site", f"--results={results}", f"--output={out}"]) == 2
    assert sorted(path.name for path in (out / "phantom").rglob("*.html")) == ["01_baseline.html", "report.html"]


def test_a_page_that_is_not_there_is_one_line(tmp_path, capsys):
    study(tmp_path, "phantom", data="phantom")
    (tmp_path / "phantom" / "answer.md").write_text("yes")
    words = [f"--results={tmp_path}", f"--output={tmp_path}/site", "--block", "nowhere.md", "answer", "phantom"]
    assert main(["site", *words]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere.md cannot be read")


def test_the_index_keeps_the_pages_of_studies_that_are_not_here(tmp_path):
    out = tmp_path / "site"
    for place, name in (("there", "phantom"), ("here", "later")):
        study(tmp_path / place, name, data="phantom")
        assert main(["site", f"--results={tmp_path / place}", f"--output={out}"]) == 0
    index = (out / "index.html").read_text()
    assert [index.count(f'href="{name}/report.html"') for name in ("phantom", "later")] == [1, 1]


@pytest.mark.parametrize(
    "about, why",
    [
        ({"licence": "see README.md"}, "names no open licence (see README.md)"),
        ({}, "names no open licence (none)"),
        ({"licence": "CC BY-NC-ND 4.0"}, "names no open licence (CC BY-NC-ND 4.0)"),
        ({"licence": "MIT-internal, no redistribution"}, "names no open licence (MIT-internal"),
        (None, "cannot be read"),
    ],
)
def test_a_study_whose_scans_may_not_be_shown_is_left_out_and_named(tmp_path, capsys, about, why):
    results, out = tmp_path / "results", tmp_path / "site"
    data = str(tmp_path / "gone") if about is None else data_set(tmp_path / "abdomen", **about)
    study(results, "abdomen", data=data)
    study(results, "phantom", data="phantom")
    assert main(["site", f"--results={results}", f"--output={out}"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"left out: {results}/abdomen: ") and why in said.err and said.err.count("\n") == 1
    assert not (out / "abdomen").exists() and "abdomen" not in (out / "index.html").read_text()


def test_a_folder_without_studies_is_one_line(tmp_path, capsys):
    assert main(["site", f"--results={tmp_path}", f"--output={tmp_path}/site"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no study with a report: run make study first\n"
