"""Looking by hand: what is shown is what the study measured, and nothing that is tried becomes a result."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from kdlib import InputError, Run, override_profile, study, thesis_recipe
from kdlib.apps import drawing, explore, gradients, panels
from kdlib.apps.notebooks import NOTEBOOKS, execute
from kdlib.data.slices import Geometry
from kdlib.evaluation.cases import case_metrics
from kdlib.experiments.recipes import consistency, pseudo_labels, unlabelled

TINY = {"width": 0.125, "folds": 3, "teacher_epochs": 2, "student_epochs": 2, "teacher_steps": 4, "student_steps": 4}
FULL, ONLY_PMD = "supcon:E-E+B-B+D-D+PMD", "PMD"


@pytest.fixture(scope="module")
def table(small_study) -> pd.DataFrame:
    return explore.finished_runs(small_study, "tiny")


@pytest.fixture
def find(small_study, table):
    """`find("S1", recipe)` is that run and its teachers."""

    def run(model: str, recipe: str | None = None):
        rows = table[
            (table["model"] == model) & (table["recipe"].eq(recipe) if recipe else table["role"].ne("distilled"))
        ]
        student = explore.load_run(small_study, rows["run"].item(), device="cpu")
        return student, explore.teachers_of(student, table, "phantom", "cpu")

    return run


def is_picture(image) -> bool:
    return bytes(image.value[:4]) == b"\x89PNG"


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# -------------------------------------------------------------------------------------------------- what has been done


def test_studies_and_their_runs_are_listed(small_study, table):
    assert explore.studies(small_study) == ["tiny"]
    labels = table["label"].tolist()
    assert labels[:3] == ["T1, fold 0, seed 0", "S1 (50 %), fold 0, seed 0", "S2 (50 %), fold 0, seed 0"]
    assert len(set(labels)) == 5 and all(label.startswith("KD(T1, S1)") for label in labels[3:])


def test_the_newest_study_whose_runs_are_kept_comes_first(small_study, tmp_path):
    shutil.copytree(small_study, tmp_path / "results")
    results = tmp_path / "results"
    shutil.copytree(results / "tiny", results / "later")
    committed = results / "a-committed-study" / "tables"
    committed.mkdir(parents=True)
    (committed / "01_baseline_runs.csv").write_text("run,method\n0123,S1\n")  # its runs are not kept
    os.utime(results / "tiny" / "tables" / "02_distillation_runs.csv", (1, 1))
    assert explore.studies(results) == ["later", "tiny"]
    assert panels.Picker(results, device="cpu").study_list.value == "later"


def test_without_a_study_every_panel_is_there_and_says_how_to_make_one(tmp_path, small_study):
    pick = panels.Picker(tmp_path)
    assert "run one first, e.g. make study" in pick.message.value and "\n" not in pick.message.value
    viewer = panels.Viewer(pick)
    region, bench = panels.GradientPanel(pick, viewer), panels.TrainingPanel(pick)
    region.show(), bench.train()
    assert not any(panel.children for panel in (viewer, region, bench, panels.ComparisonPanel(pick)))
    with pytest.raises(InputError, match="study 'tini' does not exist: choose from tiny"):
        explore.finished_runs(small_study, "tini")


def test_runs_of_several_protocols_have_names_of_their_own(small_study, table, monkeypatch):
    assert not table["label"].str.contains("corrected").any(), "one protocol needs no name"
    both = pd.concat([table, table.assign(protocol="thesis")], ignore_index=True).drop(columns="label")
    monkeypatch.setattr(explore, "runs_of", lambda folder: both)
    labels = explore.finished_runs(small_study, "tiny")["label"]
    assert labels.is_unique and labels.str.contains(", corrected, fold").sum() == len(table)


def test_a_study_whose_runs_are_gone_says_so(small_study, tmp_path):
    shutil.copytree(small_study / "tiny", tmp_path / "tiny")
    with pytest.raises(InputError, match="holds no study whose runs are kept"):
        explore.finished_runs(tmp_path, "tiny")


def test_a_run_is_read_back_as_it_was_described(find):
    student, (teacher,) = find("S1", FULL)
    setting = dict(data="phantom", target="spleen", profile=override_profile("quick", TINY))
    assert student.run == Run(model="S1", fraction=0.5, teacher="T1", recipe=thesis_recipe("S1"), **setting)
    assert teacher.run == Run(model="T1", **setting)


def test_a_run_needs_the_data_that_it_was_trained_on(small_study, table, tmp_path):
    key = table["run"][1]
    with pytest.raises(InputError, match="run 123: .*manifest.json is not of a finished run"):
        explore.load_run(small_study, "123")
    copy = tmp_path / "runs" / key
    shutil.copytree(small_study / "runs" / key, copy)
    shutil.copytree(small_study / "data", tmp_path / "data")
    shutil.copytree(small_study / "splits", tmp_path / "splits")
    record = json.loads((copy / "manifest.json").read_text())

    def changed(**changes) -> None:
        explore.load_run.cache_clear()
        (copy / "manifest.json").write_text(json.dumps(record | changes))

    changed(run=record["run"] | {"data": "Spleen"})
    with pytest.raises(InputError, match="was trained on 'Spleen', no folder is given: give that data set's folder"):
        explore.load_run(tmp_path, key)
    with pytest.raises(InputError, match="was trained on 'Spleen', .*phantom holds Phantom"):
        explore.load_run(tmp_path, key, str(tmp_path / "data" / "phantom"))
    changed(data=record["data"] | {"digest": "0"})
    with pytest.raises(InputError, match="trained on other files or folds"):
        explore.load_run(tmp_path, key)
    changed(run=record["run"] | {"seed": 7})
    with pytest.raises(InputError, match="does not describe the run of its key"):
        explore.load_run(tmp_path, key)


# ---------------------------------------------------------------------------------------------------------- one case


def test_what_is_shown_is_what_was_measured(find):
    """Masks in the case's own grid give the Dice and the distances of the run's table."""
    student, teachers = find("S1", FULL)
    for case in student.fold.test[:2]:
        seen = explore.look(student, teachers, case)
        assert list(seen.masks) == ["truth", "teacher T1", "student S1"]
        recorded = pd.read_csv(student.folder / "metrics.csv").query("case == @case").set_index("metric")["value"]
        spacing = student.source.dataset.case(case).spacing
        found = case_metrics(seen.masks["student S1"], seen.masks["truth"], seen.classes, spacing)
        pd.testing.assert_series_equal(found.set_index("metric")["value"], recorded, check_names=False)


def test_every_case_is_there_with_its_part_and_only_test_cases_have_a_dice(find):
    student, _ = find("S1", FULL)
    listed = explore.cases(student)
    assert sorted(listed["case"]) == sorted(student.fold.groups)
    used = student.fold.subset(0.5)
    assert set(listed.loc[listed["part"] == "train", "case"]) == set(used)
    assert set(listed.loc[listed["part"] == "unused", "case"]) == set(student.fold.train) - set(used)
    assert listed["dice"].notna().equals(listed["part"] == "test")
    with pytest.raises(InputError, match="case 'nobody' does not exist"):
        explore.look(student, (), "nobody")


def test_differences_tell_missed_from_too_much_and_from_the_wrong_class():
    truth = np.array([0, 1, 0, 1, 2, 2], np.uint8)
    said = np.array([0, 0, 1, 1, 1, 2], np.uint8)
    assert explore.difference(said, truth).tolist() == [0, 1, 2, 0, 3, 0]
    assert explore.difference(truth, said).tolist() == [0, 2, 1, 0, 3, 0]


def test_a_voxel_is_found_in_the_slices():
    """LAS: x runs to the left and y to the front, so columns follow x and rows run against y; 2 pixels a voxel."""
    affine = ((-1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0))
    geometry = Geometry((10, 20, 5), affine, (2.0, 2.0), (12, 22), 64)
    number, row, column = explore.place(geometry, (3, 4, 1))
    assert number == 1
    mark = np.zeros(geometry.shape)
    mark[3, 4, 1] = 1
    ((number_, row_, column_),) = np.argwhere(geometry.orient(mark))
    assert (row, column) == (round(row_ * 2 + 0.5 + 12), round(column_ * 2 + 0.5 + 22)) and number == number_
    assert row_ == 19 - 4


def test_the_middle_of_the_truth_is_truth_in_the_slices(find):
    student, _ = find("S1", FULL)
    case = student.fold.test[0]
    seen = explore.look(student, (), case)
    bank = explore.case_slices(student, (case,))
    inside = np.argwhere(seen.masks["truth"])
    for voxel in inside[:: len(inside) // 7]:
        around = explore.place(seen.geometry, tuple(voxel))
        near = bank.labels[around[0], around[1] - 1 : around[1] + 2, around[2] - 1 : around[2] + 2]
        assert (near == 1).any()


# ---------------------------------------------------------------------------------------------------- terms' gradients


def test_the_gradient_of_the_prediction_term_is_its_closed_form(find):
    """Bernoulli KL times T squared, averaged over pixels, has the gradient T (p - q) / pixels on the logits."""
    student, teachers = find("S1", ONLY_PMD)
    case = student.fold.test[0]
    found = gradients.term_gradients(student, teachers, case, 8)
    images, _ = explore.case_slices(student, (case,)).batch(torch.tensor([8]))
    with torch.no_grad():
        logits = [explore.network(who)(images, reconstruct=False).segmentation[0, 0] for who in (student, *teachers)]
    own, taught = (torch.sigmoid(part / 4) for part in logits)
    expected = 0.2 * 4 * (own - taught).abs() / (student.run.optimisation.batch * own.numel())
    np.testing.assert_allclose(found.maps["PMD"], expected.numpy(), rtol=0.02, atol=float(expected.max()) * 0.01)


def test_regions_share_the_whole_gradient_of_every_term(find):
    student, teachers = find("S1", FULL)
    case, size = student.fold.test[0], student.run.preprocessing.size
    whole = gradients.term_gradients(student, teachers, case, 8).table.set_index("term")
    halves = [
        gradients.term_gradients(student, teachers, case, 8, region).table.set_index("term")
        for region in ((0, size // 2, 0, size), (size // 2, size, 0, size))
    ]
    assert list(whole.index) == ["E-E", "B-B", "D-D", "PMD"] and whole["share_in_region"].eq(1).all()
    assert (whole["grad_norm"] > 0).all() and whole["cosine"].between(-1, 1).all()
    np.testing.assert_allclose(halves[0]["share_in_region"] + halves[1]["share_in_region"], 1, rtol=1e-5)
    np.testing.assert_allclose(
        halves[0]["grad_norm"] ** 2 + halves[1]["grad_norm"] ** 2, whole["grad_norm"] ** 2, rtol=1e-4
    )


def test_a_baseline_shows_the_prediction_term_and_a_teacher_is_refused(find):
    student, teachers = find("S1")
    assert [teacher.run.model for teacher in teachers] == ["T1"]
    found = gradients.term_gradients(student, teachers, student.fold.val[0], 3, (10, 20, 10, 20))
    assert list(found.table["term"]) == ["PMD"]
    teacher, none = find("T1")
    assert none == ()
    with pytest.raises(InputError, match="T1 has no teacher in this study: choose a student"):
        gradients.term_gradients(teacher, none, teacher.fold.test[0], 3)


@pytest.mark.parametrize(
    "number, region, message",
    [(99, None, "slice 99: case .* has 0 to"), (3, (5, 5, 0, 9), "region"), (3, (0, 9, 0, 999), "from 0 to 48")],
)
def test_a_slice_or_region_that_is_not_there_is_refused(find, number, region, message):
    student, teachers = find("S1", FULL)
    with pytest.raises(InputError, match=message):
        gradients.term_gradients(student, teachers, student.fold.test[0], number, region)


# ------------------------------------------------------------------------------------------------- two runs compared


def test_two_runs_are_compared_by_case_with_the_worst_first(find):
    student, (teacher,) = find("S1", FULL)
    table = explore.compare(student, teacher, "volume_error")
    read = [pd.read_csv(who.folder / "metrics.csv").query("metric == 'volume_error'") for who in (student, teacher)]
    a, b = (one.set_index("case")["value"] for one in read)
    pd.testing.assert_series_equal(table.set_index("case")["a"].sort_index(), a.sort_index(), check_names=False)
    assert table["difference"].is_monotonic_increasing
    assert table["difference"].min() == pytest.approx((a - b).min())
    assert explore.compare(student, teacher, "hd95")["difference"].is_monotonic_decreasing, "a lower distance is better"
    assert explore.compare(student, student)["difference"].eq(0).all()
    with pytest.raises(InputError, match="metric 'dise' does not exist: choose from assd, dice"):
        explore.compare(student, teacher, "dise")


# ------------------------------------------------------------------------------------------------ a training in place


def test_an_unchanged_training_in_place_is_the_run_itself_and_leaves_nothing(find, small_study):
    student, teachers = find("S1", FULL)
    before, heard = files(small_study), []
    history = explore.train_small(student, teachers, epochs=2, steps=4, on_epoch=heard.append)
    recorded = pd.read_csv(student.folder / "history.csv")
    pd.testing.assert_frame_equal(history, recorded, rtol=1e-6)
    assert [part["epoch"].max() for part in heard] == [1, 2] and heard[-1].equals(history)
    assert files(small_study) == before


def test_a_pruned_network_begins_in_place_with_its_own_weights(small_study, table):
    run = Run("phantom", "spleen", "T1-pruned", profile=override_profile("quick", TINY))
    student = explore.load_run(small_study, study([run], small_study, "cpu").runs["run"].item(), device="cpu")
    history = explore.train_small(student, epochs=2, steps=4)
    pd.testing.assert_frame_equal(history, pd.read_csv(student.folder / "history.csv"), rtol=1e-6)


def test_a_training_in_place_takes_other_weights_and_never_reads_a_test_case(find, monkeypatch):
    student, teachers = find("S1", FULL)
    read, slices = set(), explore.case_slices
    monkeypatch.setattr(explore, "case_slices", lambda who, names: read.update(names) or slices(who, names))
    plain, heavy = (
        explore.train_small(student, teachers, weights, {"PMD": 2.0}, 1, 2) for weights in ({}, {"PMD": 2.0})
    )
    assert read == {*student.fold.subset(0.5), *student.fold.val}
    share = [history.set_index("name").loc["share/PMD", "value"] for history in (plain, heavy)]
    assert share[1] > 2 * share[0]


def test_what_cannot_be_trained_is_refused(find):
    student, teachers = find("S1", FULL)
    with pytest.raises(InputError, match="term 'EE' does not exist: choose from E-E, B-B, D-D, PMD"):
        explore.train_small(student, teachers, weights={"EE": 1.0})
    with pytest.raises(InputError, match="term 'E-E', weight -1: give a number of 0 or more"):
        explore.train_small(student, teachers, weights={"E-E": -1})
    with pytest.raises(InputError, match="0 epochs of 20 steps"):
        explore.train_small(student, teachers, epochs=0)
    teacher, _ = find("T1")
    with pytest.raises(InputError, match="T1 is a teacher"):
        explore.train_small(teacher)


@pytest.mark.parametrize(
    "teacher, recipe, terms", [("T1", pseudo_labels(), 0), ("T1", unlabelled(), 1), ("self", consistency(), 0)]
)
def test_what_learns_from_unlabelled_images_does_so_in_place_too(small_study, table, teacher, recipe, terms):
    tiny = override_profile("quick", TINY)
    run = Run("phantom", "spleen", "S1", fraction=0.5, teacher=teacher, recipe=recipe, profile=tiny)
    student = explore.load_run(small_study, study([run], small_study, "cpu").runs["run"].item(), device="cpu")
    teachers = explore.teachers_of(student, table, "phantom", "cpu")
    history = explore.train_small(student, teachers, epochs=2, steps=4)
    pd.testing.assert_frame_equal(history, pd.read_csv(student.folder / "history.csv"), rtol=1e-6)
    try:
        found = gradients.term_gradients(student, teachers, student.fold.test[0], 8)
    except InputError as error:
        assert not terms and "is compared with no teacher as it trains: choose a distilled student" in str(error)
    else:
        assert len(found.table) == terms


# ------------------------------------------------------------------------------------------------- several classes


@pytest.fixture(scope="module")
def organs(small_study):
    """A student of all of the phantom's organs."""
    run = Run("phantom", "all", "S1", profile=override_profile("quick", TINY))
    return explore.load_run(small_study, study([run], small_study, "cpu").runs["run"].item(), device="cpu")


def test_several_classes_are_shown_and_drawn(organs):
    case = organs.fold.test[0]
    seen = explore.look(organs, (), case)
    assert seen.masks["truth"].max() == len(seen.classes) > 1
    recorded = pd.read_csv(organs.folder / "metrics.csv").query("case == @case and metric == 'dice'")
    spacing = organs.source.dataset.case(case).spacing
    found = case_metrics(seen.masks["student S1"], seen.masks["truth"], seen.classes, spacing).query("metric == 'dice'")
    np.testing.assert_allclose(found["value"], recorded["value"])
    drawn = drawing.draw_slice(seen, explore.on_target(seen)[0])
    assert isinstance(drawn, Figure) and "wrong class" in [text.get_text() for text in drawn.legends[0].get_texts()]


# -------------------------------------------------------------------------------------------------------------- panels


def test_panels_follow_the_choice(small_study, table):
    pick = panels.Picker(small_study, device="cpu")
    assert pick.run.run.recipe.name == FULL and pick.case == pick.run.fold.test[0]
    viewer = panels.Viewer(pick)
    assert viewer.mode.value == "slices" and is_picture(viewer.image)
    first = bytes(viewer.image.value)
    pick.case_list.value = pick.run.fold.val[0]
    assert viewer.seen.case == pick.run.fold.val[0] and bytes(viewer.image.value) != first
    comparison = panels.ComparisonPanel(pick)
    assert table.set_index("run").loc[comparison.other.value, "method"] == "S1@50"
    pick.run_list.value = table["run"][0]
    assert list(viewer.seen.masks) == ["truth", "teacher T1"] and pick.message.value == ""
    assert viewer.seen.case == pick.run.fold.val[0], "the case stays where the run has it"


def test_a_choice_that_cannot_be_shown_leaves_the_one_before(small_study, table, monkeypatch):
    pick = panels.Picker(small_study, device="cpu")
    comparison = panels.ComparisonPanel(pick)
    before = pick.study_list.value, pick.run_list.value, pick.run_list.options, pick.case
    other = table.assign(run=[f"other-{key}" for key in table["run"]])
    monkeypatch.setattr(explore, "finished_runs", lambda results, study: other)
    pick.study_list.options = [*pick.study_list.options, ("other", "other")]
    with monkeypatch.context() as patched:
        patched.setattr(explore, "load_run", lambda *_: (_ for _ in ()).throw(InputError("a run of volumes")))
        pick.study_list.value = "other"
    assert "a run of volumes" in pick.message.value
    assert (pick.study_list.value, pick.run_list.value, pick.run_list.options, pick.case) == before
    comparison.metric.value = "hd95"
    assert comparison.message.value == "" and is_picture(comparison.image)


def test_a_comparison_with_nothing_shows_no_picture_of_another(small_study, table):
    pick = panels.Picker(small_study, device="cpu")
    comparison = panels.ComparisonPanel(pick)
    assert is_picture(comparison.image)
    comparison.other.options = []
    comparison.show()
    assert comparison.message.value == "no other run of this fold" and comparison.image.layout.display == "none"


def test_the_viewer_takes_the_volume_where_there_is_webgl_and_a_click_moves_the_region(small_study):
    pick = panels.Picker(small_study, device="cpu")
    viewer = panels.Viewer(pick)
    region = panels.GradientPanel(pick, viewer)
    viewer.webgl.there = False
    assert viewer.mode.value == "slices"
    viewer.webgl.there = True
    assert viewer.mode.value == "volume" and len(viewer.volume.volumes) == 7
    shown = [layer.name for layer in viewer.volume.volumes[1:] if layer.opacity]
    assert shown == ["student S1 against truth.nii.gz"]
    viewer.masks.children[0].value = True
    assert viewer.volume.volumes[1].opacity > 0
    assert "spleen" in viewer.legend.value and "missed" in viewer.legend.value
    number, row, column = viewer.place
    assert viewer.seen.geometry.orient(viewer.seen.masks["truth"])[number].any(), "the region lies on the target"
    assert region.image.layout.display == "none", "no broken picture before there is one"
    voxel = tuple(int(i) for i in np.argwhere(viewer.seen.masks["truth"]).mean(0))
    viewer._clicked({"vox": [*voxel, 0]})
    number, row, column = explore.place(viewer.seen.geometry, voxel)
    assert region.number.value == number
    assert region.rows.value[0] < row < region.rows.value[1]
    assert region.columns.value[0] < column < region.columns.value[1]
    region.show()
    assert is_picture(region.image) and "cosine" in region.table.value
    pick.case_list.value = pick.run.fold.val[0]
    assert not region.image.value and not region.table.value, "they were of another case"
    assert [box.value for box in viewer.masks.children] == [True, False, False, False, True, False]


def test_the_training_panel_trains_and_says_that_it_is_no_result(small_study):
    pick = panels.Picker(small_study, device="cpu")
    bench = panels.TrainingPanel(pick)
    bench.epochs.value, bench.steps.value = 1, 2
    bench.weights["E-E"].value = 0.3
    bench.button.click()
    bench.button.click()
    assert list(bench.histories) == ["training 1", "training 2"] and is_picture(bench.image)
    assert bench.message.value.startswith("not a result") and not bench.button.disabled
    bench.weights["E-E"].value = -1
    bench.button.click()
    assert "weight -1.0: give a number of 0 or more" in bench.message.value
    pick.run_list.value = pick.table["run"][0]
    assert bench.button.disabled and "T1 has no teacher" in bench.message.value


@pytest.mark.slow
def test_the_notebook_runs_to_its_end_without_a_browser(small_study, tmp_path):
    before = files(small_study / "runs")
    execute(NOTEBOOKS / "explore.ipynb", tmp_path / "explore.ipynb", {"results": str(small_study), "device": "cpu"})
    assert files(small_study / "runs") == before
