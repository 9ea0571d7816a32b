"""The notebooks, through papermill, at the smallest size: what `make study` leaves, and what a second look costs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from kdlib.apps.cli import main
from kdlib.apps.notebooks import NOTEBOOKS, execute
from kdlib.apps.study import EXPERIMENTS
from kdlib.config import SWITCHES, InputError

TINY = {
    "width": 0.125, "folds": 3, "teacher_epochs": 1, "student_epochs": 1, "teacher_steps": 4, "student_steps": 4,
}  # fmt: skip


def study(results: Path, *words: str, command: str = "study") -> int:
    given = ["--results", str(results), "--study", "tiny", "--changes", json.dumps(TINY), "--device", "cpu"]
    return main([command, *given, *words])


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The results of a whole study."""
    results = tmp_path_factory.mktemp("results")
    assert study(results) == 0
    return results


@pytest.mark.slow
def test_every_experiment_ends_and_leaves_tables_figures_and_pages(done):
    folder = done / "tiny"
    for suffix in (".ipynb", ".html"):
        found = {path.stem for path in (folder / "notebooks").glob(f"*{suffix}")}
        assert found == {*EXPERIMENTS, "report"} - ({"report"} if suffix == ".html" else set())
    assert (folder / "protocol.md").is_file() and list((folder / "cards").glob("*.md"))
    figures = {path.stem for path in (folder / "figures").glob("*.pdf")}
    assert {"02_dice_per_method", "03_ablation", "04_loss_comparison", "slopes", "failure", "features"} <= figures
    assert "cumulative_correction" not in figures, "left out until it has been run"
    assert all((folder / "figures" / f"{name}.txt").read_text() for name in figures)
    latex = (folder / "tables" / "02_distillation.tex").read_text()
    assert "\\toprule" in latex and "0.772" in latex, "the thesis's own numbers"
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert 'href="notebooks/02_distillation.html"' in report and "data:image/png;base64," in report
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
def test_runs_are_shared_between_experiments_and_a_second_look_only_draws(done, tmp_path, capsys):
    keys = [set(pd.read_csv(path)["run"]) for path in (done / "tiny" / "tables").glob("*_runs.csv")]
    assert len(set.union(*keys)) < sum(map(len, keys))
    before = {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*.safetensors")}
    values = {"results": str(done), "study": "tiny", "changes": TINY, "device": "cpu"}
    execute(NOTEBOOKS / "03_ablation.ipynb", tmp_path / "again.ipynb", values)
    assert {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*.safetensors")} == before
    figure = {"results": str(done), "study": "tiny", "figure": "ablatoin"}
    with pytest.raises(InputError, match="'ablatoin' does not exist: choose from training_curves"):
        execute(NOTEBOOKS / "06_figures.ipynb", tmp_path / "figure.ipynb", figure)


@pytest.mark.slow
def test_a_dry_run_knows_what_a_study_has_trained_and_what_it_would(done, capsys):
    assert study(done, "--seeds", "0 1", "--only", "03_ablation", command="dry-run") == 0
    assert re.search(r"^03_ablation: 3\d runs, 1\d of them done$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_a_dry_run_of_a_study_that_never_ran_trains_and_draws_nothing(tmp_path, capsys):
    assert study(tmp_path / "results", "--only", "00_data", "01_baseline", command="dry-run") == 0
    told = capsys.readouterr().out
    assert "00_data: no runs" in told and "01_baseline: 8 runs, 0 of them done" in told
    assert re.search(r"^to train: 8 runs, about \d+ (s|min) on one core", told, re.MULTILINE)
    assert not (tmp_path / "results" / "runs").exists() and not (tmp_path / "results" / "tiny").exists()


@pytest.mark.slow
def test_the_correction_goes_from_the_published_to_the_corrected_protocol(done):
    assert study(done, "--only", "05_correction") == 0
    tables = done / "tiny" / "tables"
    assert pd.read_csv(tables / "05_correction.csv")["step"].tolist() == ["thesis", *SWITCHES.values(), "corrected"]
    signal = pd.read_csv(tables / "05_gradient_diagnostics.csv")
    assert (done / "tiny" / "notebooks" / "05_correction.html").is_file() and set(signal["term"]) >= {"E-E", "PMD"}


@pytest.mark.slow
def test_chapters_on_labels_and_length_have_a_line_for_each_way_of_learning(done):
    assert study(done, "--only", "07_fractions", "08_length") == 0
    tables = done / "tiny" / "tables"
    fractions = pd.read_csv(tables / "07_fractions.csv")
    assert set(fractions["fraction"]) == {0.1, 0.25, 0.5, 1.0}
    assert set(fractions["control"].dropna()) == {"self_consistency", "pseudo_labels"}
    assert set(pd.read_csv(tables / "08_length.csv").query("role != 'teacher'")["length"]) == {0.125, 0.25, 0.5, 1, 2}
    verdicts = pd.read_csv(tables / "07_comparisons.csv")
    progress = pd.read_csv(tables / "07_convergence.csv").set_index("method")["converged"]
    rising = ~verdicts["a"].map(progress) | ~verdicts["b"].map(progress)
    assert (verdicts.loc[rising, "verdict"] == "not converged").all() and rising.any()
    assert {path.stem for path in (done / "tiny" / "figures").glob("0[78]*.pdf")} == {"07_fractions", "08_length"}


@pytest.mark.slow
def test_a_defective_data_set_is_the_last_that_a_user_sees(tmp_path, capfd):
    from kdlib.data import make_phantom

    folder = make_phantom(tmp_path / "phantom", patients=6)
    next((folder / "labelsTr").glob("*")).write_bytes(b"no image")
    assert study(tmp_path / "results", "--data", str(folder), "--only", "00_data") == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: ") and errors.count("error: ") == 1
    assert "ON_DEFECT=drop" in errors and "phantom_" in errors
    assert study(tmp_path / "results", "--data", str(folder), "--only", "00_data", "--on-defect", "drop") == 0


@pytest.mark.slow
def test_real_scans_run_end_to_end(real_data, tmp_path):
    """Both hippocampus classes, through data and baseline, at the smallest size."""
    sizes = ["--changes", json.dumps(TINY | {"folds": 8, "size": 64}), "--profile", "hippocampus", "--target", "all"]
    data = str(real_data("hippocampus"))
    assert study(tmp_path, *sizes, "--data", data, "--only", "00_data", "01_baseline") == 0
    cases = pd.read_csv(tmp_path / "tiny" / "tables" / "01_baseline_cases.csv")
    assert set(cases["class"]) == {"Anterior", "Posterior"}
    assert cases.groupby("method")["patient"].nunique().eq(9).all()


def test_committed_notebooks_are_short_cells_with_typed_commented_parameters():
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            lines = cell.source.splitlines()
            assert len(lines) <= 20, f"{path.name}: a cell reads like a chapter's paragraph"
            assert cell.cell_type != "code" or all(len(line) <= 100 for line in lines), path.name
            if "parameters" in cell.metadata.get("tags", []):
                for line in lines:
                    assert ": " in line.split("=")[0] and "  # " in line, f"{path.name}: {line}"
        assert json.loads(path.read_text())["metadata"].keys() == {"kernelspec"}
