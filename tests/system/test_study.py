"""The notebooks, through papermill, at the smallest size: what `make study` leaves, and what a second look costs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from kdlib.apps.cli import main
from kdlib.apps.notebooks import NOTEBOOKS, execute
from kdlib.apps.study import BY_DEFAULT
from kdlib.config import SWITCHES, InputError

TINY = {
    "size": 32, "spacing": 10.0, "width": 0.125, "folds": 5,
    "teacher_epochs": 1, "student_epochs": 1, "teacher_steps": 4, "student_steps": 4,
}  # fmt: skip


def study(results: Path, *words: str, command: str = "study", data: Path | str = "phantom") -> int:
    given = ["--results", str(results), "--study", "tiny", "--changes", json.dumps(TINY), "--device", "cpu"]
    return main([command, *given, "--data", str(data), *words])


@pytest.fixture(scope="module")
def data(tmp_path_factory, phantom_of) -> Path:
    """A folder of 20 patients, of whom one has a damaged label."""
    folder = shutil.copytree(phantom_of(20), tmp_path_factory.mktemp("data") / "phantom")
    (folder / "labelsTr" / "phantom_007.nii.gz").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory, data) -> Path:
    """The results of a whole study of the patients without defects."""
    results = tmp_path_factory.mktemp("results")
    assert study(results, "--on-defect", "drop", data=data) == 0
    return results


@pytest.mark.slow
def test_a_defective_data_set_is_the_last_that_a_user_sees(tmp_path, data, capfd):
    assert study(tmp_path / "results", "--only", "00_data", "01_baseline", data=data) == 2
    printed, errors = capfd.readouterr()
    assert errors.startswith("error: ") and errors.count("error: ") == 1 and "01_baseline" not in printed
    assert "ON_DEFECT=drop" in errors and "phantom_007" in errors


@pytest.mark.slow
def test_every_experiment_ends_and_leaves_tables_figures_and_pages(done):
    folder = done / "tiny"
    for suffix in (".ipynb", ".html"):
        found = {path.stem for path in (folder / "notebooks").glob(f"*{suffix}")}
        assert found == {*BY_DEFAULT, "report"} - ({"report"} if suffix == ".html" else set())
    assert (folder / "protocol.md").is_file() and list((folder / "cards").glob("*.md"))
    figures = {path.stem for path in (folder / "figures").glob("*.pdf")}
    assert {"00_by_hand", "02_overview", "02b_controls", "02b_features", "03_ablation", "04_loss_comparison"} <= figures
    assert "05_correction" not in figures, "left out until it has been run"
    assert all((folder / "figures" / f"{name}.txt").read_text() for name in figures)
    latex = (folder / "tables" / "02_distillation.tex").read_text()
    assert "\\toprule" in latex and "0.772" in latex, "the thesis's own numbers"
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "[PosixPath(" not in "".join(path.read_text() for path in folder.glob("notebooks/*.html"))
    answer = (folder / "answer.md").read_text(encoding="utf-8")
    assert answer.startswith("**Alone, on 50 %") and "| S1 (57," in answer and "| verdict |" in answer
    assert 'href="notebooks/02_distillation.html"' in report and "data:image/png;base64," in report
    assert "<li>protocol and model cards could not be written" not in report
    assert re.search(r"commit [0-9a-f]{12}|not a git checkout", report) and "KD(T1, S1)" in report


@pytest.mark.slow
def test_every_method_is_tested_on_the_same_patients_by_every_metric(done):
    cases = pd.read_csv(done / "tiny" / "tables" / "02_distillation_cases.csv")
    assert cases.groupby("method")["case"].nunique().nunique() == 1
    assert set(cases["metric"]) == {
        "dice", "iou", "recall", "precision", "hd95", "assd", "nsd", "volume_error", "truth_volume",
    }  # fmt: skip
    rows = cases.drop_duplicates("method")
    assert set(rows.loc[rows["role"] == "distilled", ["teacher", "model"]].itertuples(index=False, name=None)) == {
        (teacher, student) for teacher in ("T1", "T2") for student in ("S1", "S2", "E1")
    }


@pytest.mark.slow
def test_runs_are_shared_between_experiments(done):
    keys = [set(pd.read_csv(path)["run"]) for path in (done / "tiny" / "tables").glob("*_runs.csv")]
    assert len(set.union(*keys)) < sum(map(len, keys))


@pytest.mark.slow
def test_a_figure_that_does_not_exist_is_an_input_error(done, tmp_path):
    figure = {"results": str(done), "study": "tiny", "figure": "ablatoin"}
    with pytest.raises(InputError, match="'ablatoin' does not exist: choose from 02_overview"):
        execute(NOTEBOOKS / "06_figures.ipynb", tmp_path / "figure.ipynb", figure)


@pytest.mark.slow
def test_a_dry_run_knows_what_a_study_has_trained_and_what_it_would(done, data, capsys):
    words = ["--seeds", "0 1", "--only", "03_ablation", "--on-defect", "drop"]
    assert study(done, *words, command="dry-run", data=data) == 0
    assert re.search(r"^03_ablation: 3\d runs, 1\d of them done$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_a_dry_run_of_a_study_that_never_ran_trains_and_draws_nothing(tmp_path, capsys):
    assert study(tmp_path / "results", "--only", "00_data", "01_baseline", command="dry-run") == 0
    told = capsys.readouterr().out
    assert "00_data: no runs" in told and "01_baseline: 8 runs, 0 of them done" in told
    assert re.search(r"^to train: 8 runs, about \d+ (s|min) on one core", told, re.MULTILINE)
    assert not (tmp_path / "results" / "runs").exists() and not (tmp_path / "results" / "tiny").exists()


@pytest.fixture(scope="module")
def later(done, data) -> Path:
    """The same study, when an experiment was asked for again and three more had been run."""
    before = {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*.safetensors")}
    more = ["--only", "03_ablation", "05_correction", "07_fractions", "08_length"]
    assert study(done, "--on-defect", "drop", *more, data=data) == 0
    assert before and {path: path.stat().st_mtime_ns for path in before} == before, "a second look only draws"
    return done / "tiny"


@pytest.mark.slow
def test_the_correction_goes_from_the_published_to_the_corrected_protocol(later):
    assert pd.read_csv(later / "tables/05_correction.csv")["step"].tolist() == [
        "thesis", *SWITCHES.values(), "corrected",
    ]  # fmt: skip
    signal = pd.read_csv(later / "tables/05_gradient_diagnostics.csv")
    assert (later / "notebooks/05_correction.html").is_file() and set(signal["term"]) >= {"E-E", "PMD"}


@pytest.mark.slow
def test_chapters_on_labels_and_length_have_a_line_for_each_way_of_learning(later):
    fractions = pd.read_csv(later / "tables/07_fractions.csv")
    assert set(fractions["fraction"]) == {0.1, 0.25, 0.5, 1.0}
    assert set(fractions["control"].dropna()) == {"self_consistency", "pseudo_labels", "unused_images"}
    lengths = pd.read_csv(later / "tables/08_length.csv").query("role != 'teacher'")["length"]
    assert set(lengths) == {0.125, 0.25, 0.5, 1, 2}
    assert len(pd.read_csv(later / "tables/07_images.csv")) == 3 * 4, "of each fraction but 1"
    verdicts = pd.read_csv(later / "tables/07_comparisons.csv")
    progress = pd.read_csv(later / "tables/07_convergence.csv").set_index("method")["converged"]
    rising = ~verdicts["a"].map(progress) | ~verdicts["b"].map(progress)
    assert (verdicts.loc[rising, "verdict"] == "not converged").all() and rising.any()
    assert {path.stem for path in (later / "figures").glob("0[78]*.pdf")} == {"07_fractions", "08_length"}


@pytest.mark.slow
def test_the_chapter_on_capacity_asks_what_network_labels_and_teacher_are_worth(done, data, tmp_path):
    """With two of its networks, of which one is pruned from the teacher that the study has trained."""
    values = {"data": str(data), "on_defect": "drop", "changes": TINY, "results": str(done), "study": "capacity"}
    values |= {"device": "cpu", "students": ["S1", "T1-pruned"], "runtimes": ["eager"]}
    execute(NOTEBOOKS / "10_capacity.ipynb", tmp_path / "capacity.ipynb", values)
    tables = done / "capacity" / "tables"
    networks = pd.read_csv(tables / "10_networks.csv").set_index("model")
    assert set(networks.index) == {"T1", "S1", "T1-pruned"} and (networks["eager"] > 0).all()
    worth = pd.read_csv(tables / "10_comparisons.csv")
    assert worth.groupby("question").size().to_dict() == {"network": 2, "labels": 2, "teacher": 4}
    progress = pd.read_csv(tables / "10_convergence.csv").set_index("method")["converged"]
    rising = ~worth["a"].map(progress) | ~worth["b"].map(progress)
    assert rising.any() and ((worth["verdict"] == "not converged") == rising).all()
    assert (done / "capacity" / "figures" / "10_capacity.png").is_file()
    cells = nbformat.read(tmp_path / "capacity.ipynb", 4).cells
    answer = next(cell for cell in cells if "answer" in cell.metadata.get("tags", []))
    for asked in ("The network, alone, instead of S1", "The labels, student alone", "The teacher, instead of"):
        assert asked in str(answer.outputs)


@pytest.mark.slow
def test_the_chapter_on_volumes_compares_them_with_the_slices_of_the_same_study(done, data, tmp_path):
    """Its slices are trained already, and its volumes are of 16 x 16 x 16."""
    values = {"data": str(data), "on_defect": "drop", "changes": TINY | {"networks": ["T1", "S1"]}, "device": "cpu"}
    values |= {"results": str(done), "study": "volumes", "volume_changes": {"size": 16, "spacing": 20.0}}
    execute(NOTEBOOKS / "11_dimensions.ipynb", tmp_path / "volumes.ipynb", values)
    tables = done / "volumes" / "tables"
    costs = pd.read_csv(tables / "11_costs.csv").set_index(["model", "dimensions"])
    assert set(costs.index) == {(model, number) for model in ("T1", "S1") for number in (2, 3)}
    assert costs.loc[("S1", 3), "parameters"] > costs.loc[("S1", 2), "parameters"] and (costs["volume_ms"] > 0).all()
    asked = pd.read_csv(tables / "11_comparisons.csv").groupby("question").size()
    assert asked.drop("equal latency", errors="ignore").to_dict() == {"same network": 4, "teacher": 1}
    runs = pd.read_csv(tables / "11_dimensions_runs.csv")
    known = set(pd.read_csv(done / "tiny" / "tables" / "02_distillation_runs.csv")["run"])
    assert set(runs.loc[runs["dimensions"] == 2, "run"]) < known, "shared with chapter 2"
    assert not set(runs.loc[runs["dimensions"] == 3, "run"]) & known
    assert (done / "volumes" / "figures" / "11_dimensions.png").is_file()


@pytest.mark.slow
def test_real_scans_run_end_to_end(real_data, tmp_path):
    """Both hippocampus classes, through data and baseline, at the smallest size."""
    size = TINY | {"folds": 8, "size": 64, "spacing": 1.0}
    values = {"data": str(real_data("hippocampus")), "target": "all", "profile": "hippocampus", "changes": size}
    values |= {"results": str(tmp_path), "study": "tiny", "device": "cpu"}
    execute(NOTEBOOKS / "00_data.ipynb", tmp_path / "data.ipynb", values)
    execute(NOTEBOOKS / "01_baseline.ipynb", tmp_path / "baseline.ipynb", values | {"networks": ["T1", "S1"]})
    cases = pd.read_csv(tmp_path / "tiny" / "tables" / "01_baseline_cases.csv")
    assert set(cases["class"]) == {"Anterior", "Posterior"} and set(cases["model"]) == {"T1", "S1"}
    assert cases.groupby("method")["patient"].nunique().eq(9).all()


def test_committed_notebooks_are_short_cells_with_typed_commented_parameters():
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            lines = cell.source.splitlines()
            chapter = path.stem[0].isdigit() or path.stem == "report"
            own = chapter and cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])
            short = 10 if own else 25
            assert len(lines) <= short, f"{path.name}: a cell reads like a chapter's paragraph"
            assert cell.cell_type != "code" or all(len(line) <= 100 for line in lines), path.name
            if "parameters" in cell.metadata.get("tags", []):
                for line in lines:
                    assert ": " in line.split("=")[0] and "  # " in line, f"{path.name}: {line}"
        assert json.loads(path.read_text())["metadata"].keys() == {"kernelspec"}
