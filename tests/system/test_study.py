"""The notebooks, through papermill, at the smallest size: what `make study` leaves, and what a second look costs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from kdlib.apps.notebooks import EXPERIMENTS, NOTEBOOKS, execute, main, run_study, study_parameters
from kdlib.config import SWITCHES, InputError, override_profile
from kdlib.experiments import dry_run as plan
from kdlib.experiments.recipes import QUICK, thesis_recipe
from kdlib.experiments.store import is_done, run_key
from kdlib.losses import LOSSES

TINY = {
    "width": 0.125, "folds": 3, "teacher_epochs": 2, "student_epochs": 2, "teacher_steps": 4, "student_steps": 4,
}  # fmt: skip


def parameters(results: Path, **changes) -> dict[str, object]:
    given = dict(
        data="phantom", target="spleen", profile="quick", protocol="corrected", folds=[0], seeds=[0], device="cpu",
        results=str(results), study="tiny", changes=TINY,
    )  # fmt: skip
    return study_parameters(**(given | changes))


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, int]:
    """What `make study` leaves, and its exit status."""
    results = tmp_path_factory.mktemp("results")
    sizes = ["--changes", json.dumps(TINY), "--device", "cpu"]
    return results, main(["study", "--results", str(results), "--study", "tiny", *sizes])


@pytest.mark.slow
def test_every_experiment_ends_and_leaves_tables_and_figures(done):
    results, status = done
    assert status == 0
    folder = results / "tiny"
    assert sorted(path.stem for path in (folder / "notebooks").iterdir()) == sorted(EXPERIMENTS)
    figures = {path.stem for path in (folder / "figures").glob("*.pdf")}
    assert {"01_training_curves", "02_dice_per_method", "02_qualitative", "02_efficiency"} <= figures
    assert {"03_ablation", "04_loss_comparison", "ablation", "qualitative", "ranking"} <= figures
    assert {"02_features", "02_pairs", "02_diagram", "features", "pairs", "diagram", "failure", "slopes"} <= figures
    assert {"gradient_shares", "efficiency", "reliability", "fidelity", "training_curves"} <= figures
    assert (folder / "report.html").is_file() and (folder / "protocol.md").is_file()
    assert {
        "02_controls",
        "02_liveness",
        "02_fidelity",
        "02_reliability",
        "controls",
        "gradient_diagnostics",
    } <= figures
    assert "bridge" not in figures, "left out until it has been run"
    for name in figures:
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5_000 and (
            folder / "figures" / f"{name}.txt"
        ).read_text()
    latex = (folder / "tables" / "02_distillation.tex").read_text()
    assert "\\toprule" in latex and "thesis Dice" in latex and "0.772" in latex


@pytest.mark.slow
def test_the_experiments_have_the_arms_of_the_thesis(done):
    tables = done[0] / "tiny" / "tables"
    arms = set(pd.read_csv(tables / "02_distillation_cases.csv")["arm"])
    students = {"S1", "S2", "S1 (50 %)", "S2 (50 %)"}
    assert arms == {"T1", "T2"} | students | {f"KD({t}, {s})" for t in ("T1", "T2") for s in ("S1", "S2")}
    assert set(pd.read_csv(tables / "01_baseline_cases.csv")["arm"]) == {"T1", "T2"} | students
    assert pd.read_csv(tables / "03_ablation_runs.csv")["recipe"].nunique() == 16
    controls = {
        "all weights 0", "random teacher", "shuffled teacher", "frozen projectors", "redrawn projectors",
        "label smoothing", "both budgets", "self-teacher",
    }  # fmt: skip
    assert controls < set(pd.read_csv(tables / "02_controls_runs.csv")["recipe"])
    assert set(pd.read_csv(tables / "02_outside_runs.csv")["arm"]) == {"SegResNet (50 %)", "KD(T1, SegResNet)"}
    losses = set(pd.read_csv(tables / "04_loss_comparison_runs.csv")["recipe"])
    thesis = {thesis_recipe("S1", loss).name for loss in ("fitnet", "infonce", "supcon")}
    assert losses == controls | thesis | {LOSSES[loss].label for loss in QUICK} | {"baseline"}
    signal = pd.read_csv(tables / "04_liveness.csv").groupby("arm")["alive"].agg(set)
    assert signal.pop("all weights 0") == {"no gradient"} and all(alive == {"yes"} for alive in signal)
    cases = pd.read_csv(tables / "02_distillation_cases.csv")
    assert set(cases["metric"]) == {
        "dice", "iou", "recall", "precision", "hd95", "assd", "nsd", "volume_error", "truth_volume",
    }  # fmt: skip
    assert cases.groupby("arm")["case"].nunique().nunique() == 1, "every arm is tested on the same patients"


@pytest.mark.slow
def test_runs_are_shared_between_experiments(done):
    keys = [set(pd.read_csv(path)["run"]) for path in (done[0] / "tiny" / "tables").glob("*_runs.csv")]
    assert len(set.union(*keys)) < sum(map(len, keys))
    folders = list((done[0] / "runs").iterdir())
    records = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    teachers = {key for record in records for key in record["teachers"].values()}
    assert {folder.name for folder in folders} == set.union(teachers, *keys), "nothing else was trained"
    assert len(teachers - set.union(*keys)) == 1, "the self-teacher of the controls alone is no arm"


@pytest.mark.slow
def test_a_notebook_opened_again_only_draws(done, tmp_path, capsys):
    results, _ = done
    before = {path: path.stat().st_mtime_ns for path in (results / "runs").rglob("*")}
    values = {key: value for key, value in parameters(results).items()}
    execute(NOTEBOOKS / "03_ablation.ipynb", tmp_path / "again.ipynb", values)
    assert "epoch" not in capsys.readouterr().out, "nothing was trained"
    assert {path: path.stat().st_mtime_ns for path in (results / "runs").rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("name, seeds", [("01_baseline", [0]), ("02_distillation", [0]), ("03_ablation", [0, 1])])
def test_a_dry_run_knows_what_a_study_has_trained_and_what_it_would(done, name, seeds):
    results, _ = done
    shared = parameters(results, seeds=seeds)
    runs = plan.requested_runs(NOTEBOOKS / f"{name}.ipynb", shared)
    tables = (done[0] / "tiny" / "tables").glob(f"{name[:2]}_*_runs.csv")
    trained = set.union(*(set(pd.read_csv(table)["run"]) for table in tables))
    keys = {run_key(run, results): run for run in runs}
    assert trained <= keys.keys()
    missing = [run for run in keys.values() if not is_done(run, results)]
    assert len(missing) == (16 if len(seeds) == 2 else 0) and all(run.seed == 1 for run in missing)
    text = plan.describe({"parameters": {name: shared}, "shared": shared, "notebooks": str(NOTEBOOKS)})
    assert text.startswith(f"{name}: {len(keys)} runs, {len(keys) - len(missing)} of them done")
    assert f"to train: {len(missing)} runs" in text and "unknown" not in text
    past, (teacher, *_) = plan.past_runs(results), runs
    record = json.loads((results / "runs" / run_key(teacher, results) / "manifest.json").read_text())
    seconds = plan.seconds_of(teacher, past, record["steps"], "cpu")
    assert seconds == pytest.approx(sum(record["seconds"].values()), rel=0.01), "the only run like it is itself"
    assert plan.seconds_of(replace(teacher, profile=override_profile("ct128", TINY)), past, 8, "cpu") is None


@pytest.mark.slow
def test_a_dry_run_of_a_study_that_never_ran_trains_and_draws_nothing(tmp_path, capfd):
    results, sizes = tmp_path / "results", ["--changes", json.dumps(TINY), "--device", "cpu"]
    assert main(["study", "--dry-run", "--results", str(results), "--study", "new", *sizes]) == 0
    told = capfd.readouterr().out
    counts = re.findall(r"^(\w+): (\d+) runs, 0 of them done$", told, re.MULTILINE)
    assert [name for name, _ in counts] == [name for name in EXPERIMENTS if name not in ("00_data", "06_figures")]
    assert re.search(r"^to train: (\d+) runs, time unknown$", told, re.MULTILINE), "no past run to tell by"
    assert not (results / "runs").exists() and not (results / "new").exists()


@pytest.mark.slow
def test_one_figure_can_be_redrawn_alone(done, tmp_path):
    results, _ = done
    for path in (results / "tiny" / "figures").iterdir():
        path.unlink()
    shared = {"results": str(results), "study": "tiny"}
    execute(NOTEBOOKS / "06_figures.ipynb", tmp_path / "figure.ipynb", shared | {"figure": "ablation"})
    assert {path.name for path in (results / "tiny" / "figures").iterdir()} == {
        "ablation.pdf",
        "ablation.png",
        "ablation.txt",
    }
    with pytest.raises(InputError, match="'ablatoin' does not exist: choose from training_curves"):
        execute(NOTEBOOKS / "06_figures.ipynb", tmp_path / "figure.ipynb", shared | {"figure": "ablatoin"})


@pytest.mark.slow
def test_the_bridge_walks_from_the_published_to_the_corrected_protocol(done):
    results, _ = done
    assert run_study(parameters(results), ("05_correction", "06_figures")) == {}
    folder = results / "tiny"
    walk = pd.read_csv(folder / "tables" / "05_correction.csv")
    assert walk["step"].tolist() == ["thesis", *SWITCHES.values(), "corrected"]
    signal = pd.read_csv(folder / "tables" / "05_liveness.csv").set_index(["arm", "term"])
    assert signal.loc[("thesis", "PMD"), "alive"] == "always 0"
    assert signal.loc["thesis"]["chance"].dropna().between(0.95, 1.05).all(), "InfoNCE learns nothing"
    assert signal.loc["Dice by volume"]["alive"].eq("yes").all()
    gains = pd.read_csv(folder / "tables" / "05_gains.csv")
    assert len(gains) == 18 and set(gains["reference"]) == {"no distillation", "all weights 0"}
    figures = {path.stem for path in (folder / "figures").glob("*.pdf")}
    assert {"05_correction", "05_liveness_published", "bridge"} <= figures


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "no/such/folder"], "no/such/folder does not exist"),
        (["--profile", "fast"], "choose from quick"),
        (["--folds", "7"], "folds 0 to 3"),
        (["--changes", '{"size": 100}'], "multiple of 16"),
        (["--changes", "size=64"], "JSON object"),
        (["--protocol", "theses"], "choose from corrected, thesis"),
        (["--study", "../elsewhere"], "study name"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(options, message, tmp_path, capsys):
    assert main(["study", "--results", str(tmp_path), *options]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target": "splen"}, "did you mean 'spleen'"),
        ({"device": "cuda:9"}, "'cuda:9' is not there"),
        ({"data": "EMPTY"}, "dataset.json"),
    ],
)
def test_bad_input_within_a_notebook_is_one_line(changes, message, tmp_path):
    if changes.get("data"):
        changes = {"data": str(tmp_path)}
    with pytest.raises(InputError, match=message) as caught:
        execute(NOTEBOOKS / "01_baseline.ipynb", tmp_path / "out.ipynb", parameters(tmp_path / "results", **changes))
    assert str(caught.value).count("\n") == 0


@pytest.mark.slow
def test_real_scans_run_end_to_end(real_data, tmp_path):
    """Both hippocampus classes, through data, baseline and distillation, at the smallest size."""
    shared = parameters(
        tmp_path, data=str(real_data("hippocampus")), target="all", profile="hippocampus",
        changes=TINY | {"folds": 8, "size": 64},
    )  # fmt: skip
    assert run_study(shared, ("00_data", "01_baseline")) == {}
    cases = pd.read_csv(tmp_path / "tiny" / "tables" / "01_baseline_cases.csv")
    assert set(cases["class"]) == {"Anterior", "Posterior"}
    assert cases.groupby("arm")["patient"].nunique().eq(9).all() and cases.groupby("arm")["case"].nunique().eq(18).all()


def test_committed_notebooks_are_short_cells_with_typed_commented_parameters():
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            assert len(cell.source.splitlines()) <= 20, f"{path.name}: a cell reads like a chapter's paragraph"
            if "parameters" in cell.metadata.get("tags", []):
                for line in cell.source.splitlines():
                    assert ": " in line.split("=")[0] and "  # " in line, f"{path.name}: {line}"
        assert json.loads(path.read_text())["metadata"].keys() == {"kernelspec"}
