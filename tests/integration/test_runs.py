"""Run folders and the study: nothing trained twice, nothing finished lost, test patients seen at the very end."""

from __future__ import annotations

import dataclasses
import errno
import functools
import gzip
import hashlib
import json
import linecache
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.networks.nets import UNet

from kdlib.config import (
    BASELINE,
    PROTOCOLS,
    SWITCHES,
    InputError,
    Optimisation,
    Preprocessing,
    Profile,
    Recipe,
    Run,
    Term,
    TrainingError,
    correction_stages,
)  # fmt: skip
from kdlib.experiments import runner, source, store, tables
from kdlib.experiments.identity import identity
from kdlib.experiments.recipes import controls, thesis_recipe
from kdlib.experiments.runner import cohorts, study
from kdlib.experiments.store import run_folder, run_key
from kdlib.experiments.tables import Results
from kdlib.files import write, write_arrays, write_csv
from kdlib.losses import LOSSES
from kdlib.models import MODELS, ExternalModel, build_model
from kdlib.training import checkpoint as keeping
from kdlib.training import loop as training
from kdlib.training.checkpoint import load_weights, save_tensors

TINY = Profile("tiny", Preprocessing(32, 12.0), 0.125, 1, 1, 2, 2, folds=3)


@pytest.fixture(scope="session")
def phantom(phantom_of) -> Path:
    return phantom_of(9)


@pytest.fixture(autouse=True)
def fresh_caches():
    yield
    source.source.cache_clear()
    source._bank.cache_clear()


def runs_on(folder: Path, **changes) -> list[Run]:
    base = dict(data=str(folder), target="spleen", profile=TINY, **changes)
    recipes = [thesis_recipe("S1"), thesis_recipe("S1", only=("PMD",))]
    return [
        Run(model="S1", fraction=0.5, **base),
        *(Run(model="S1", fraction=0.5, teacher="T1", recipe=recipe, **base) for recipe in recipes),
    ]


def teacher_of(run: Run) -> Run:
    return run.teacher_runs()["T1"]


@pytest.fixture(scope="session")
def finished(phantom, tmp_path_factory) -> tuple[Path, list[Run], Results]:
    results, runs = tmp_path_factory.mktemp("results"), runs_on(phantom)
    return results, runs, study(runs, results, "cpu")


def test_study_trains_the_teacher_first_and_returns_tidy_tables(finished):
    results, runs, found = finished
    own = ["run", *identity(runs[0])]
    columns = [*own, "patient", "case", "class", "metric", "value"]
    assert list(found.cases.columns) == columns
    for table in (found.history, found.runs, found.examples):
        assert set(own) <= set(table.columns)
    assert set(found.cases["role"]) == {"baseline", "distilled"} and set(found.cases["loss"]) == {"", "supcon", "kl"}
    assert not found.cases.duplicated(["run", "case", "class", "metric"]).any()
    assert set(found.cases["method"]) == {run.method for run in runs} and found.runs["run"].nunique() == 3
    assert found.runs["parameters"].eq(57_297).all()
    assert (run_folder(teacher_of(runs[1]), results) / "manifest.json").is_file()
    assert {"E-E", "grad/PMD", "val_dice"} <= set(found.history["name"])
    teacher = run_key(teacher_of(runs[1]), results)
    assert set(found.history["run"]) == {*found.runs["run"], teacher}, "a student has converged only if its teacher has"
    assert teacher not in set(found.cases["run"])


def test_manifest_says_where_a_number_came_from(finished):
    results, runs, found = finished
    manifest = json.loads((run_folder(runs[1], results) / "manifest.json").read_text())
    data = manifest["data"]
    parts = [set(data[part]) for part in ("train", "val", "test")]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert set(found.cases["case"]) == parts[2]
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["status"] == "done"
    teacher = json.loads((run_folder(teacher_of(runs[1]), results) / "manifest.json").read_text())
    assert set(data["train"]) < set(teacher["data"]["train"]) and teacher["data"]["test"] == data["test"]
    assert store.manifest(runs[1], results)["adapters"]["PMD"] == "student logits; teacher logits"
    with pytest.raises(InputError, match="has no result in .*: train it first"):
        store.manifest(dataclasses.replace(runs[1], seed=9), results)


def test_teacher_agreement_is_computed_once_and_kept(finished, tmp_path, monkeypatch):
    results, runs, _ = finished
    found = tables.teacher_agreement(runs[:2], teacher_of(runs[1]), results, "cpu")
    agreement, similarity, confidence = found
    assert set(agreement["metric"]) == {"agreement", "band_agreement", "error_overlap"}
    assert set(agreement["method"]) == {runs[0].method, runs[1].method} and agreement["patient"].nunique() == 3
    assert {"encoder2", "bottleneck", "decoder1"} <= set(similarity["scale_student"])
    assert confidence["count"].sum() > 0
    monkeypatch.setattr(tables, "trained", lambda *args: pytest.fail("compared the same runs again"))
    for first, again in zip(
        found, tables.teacher_agreement(runs[:2], teacher_of(runs[1]), results, "cpu"), strict=True
    ):
        pd.testing.assert_frame_equal(first, again)
    # on a machine without their folders, from the tables of studies, of which two may hold the same run
    studies = [tmp_path / "study", tmp_path / "again"]
    for name, table in zip(("agreement", "similarity", "calibration"), found, strict=True):
        for folder in studies:
            write_csv(folder / "tables" / f"02b_{name}.csv", table)
    given = runs[:2], teacher_of(runs[1]), tmp_path / "here", "cpu"
    for first, read in zip(found, tables.teacher_agreement(*given, studies), strict=True):
        pd.testing.assert_frame_equal(first, read[first.columns], check_dtype=False)
    monkeypatch.undo()
    with pytest.raises(InputError, match="do not exist: train that run first"):
        tables.teacher_agreement(*given)


def test_a_finished_study_only_reads(finished, monkeypatch):
    results, runs, found = finished
    monkeypatch.setattr(runner, "train_cohort", lambda *args: pytest.fail("trained a finished run again"))
    again = study(runs, results, "cpu")
    pd.testing.assert_frame_equal(again.cases, found.cases)


def test_a_run_without_a_manifest_is_trained_again_and_ends_the_same(finished, monkeypatch):
    results, runs, found = finished
    folder = run_folder(runs[2], results)
    (folder / "manifest.json").unlink()
    (folder / "metrics.csv").write_text("half a tab")
    trained = []
    original = runner.train_cohort
    monkeypatch.setattr(
        runner, "train_cohort", lambda group, *args, **more: trained.append(group) or original(group, *args, **more)
    )
    again = study(runs, results, "cpu")
    assert trained == [[runs[2]]], "alone, without its cohort"
    pd.testing.assert_frame_equal(again.cases, found.cases)


def test_tables_survive_saving(finished, tmp_path):
    _, _, found = finished
    found.save(tmp_path, "02_distillation")
    loaded = Results.load(tmp_path, "02_distillation")
    pd.testing.assert_frame_equal(loaded.cases.fillna(""), found.cases.fillna(""), check_dtype=False)
    assert np.array_equal(loaded.examples["image"][0], found.examples["image"][0])
    with pytest.raises(InputError, match="run notebook 03_ablation"):
        Results.load(tmp_path, "03_ablation")


def test_a_run_that_stands_in_saved_tables_is_read_from_them(finished, tmp_path, monkeypatch):
    results, runs, found = finished
    found.save(tmp_path / "elsewhere", "02_distillation")
    for part in ("cases", "runs"):  # long tables are packed
        table = tmp_path / "elsewhere" / "tables" / f"02_distillation_{part}.csv"
        table.with_name(f"{table.name}.gz").write_bytes(gzip.compress(table.read_bytes()))
        table.unlink()
    monkeypatch.setattr(runner, "train_cohort", lambda *args, **more: pytest.fail("trained what was saved"))
    again = study(runs, tmp_path / "here", "cpu", reuse=[tmp_path / "elsewhere"])
    for part in ("cases", "history", "runs"):
        first, second = (getattr(each, part).fillna("") for each in (found, again))
        pd.testing.assert_frame_equal(second[list(first)], first, check_dtype=False)
    assert again.examples.empty and not any(run_folder(run, tmp_path / "here").exists() for run in runs)
    again.save(tmp_path / "here" / "study", "02_distillation")
    assert len(Results.load(tmp_path / "here" / "study", "02_distillation").cases) == len(found.cases)
    monkeypatch.undo()
    # what was trained here stands before what was saved, and what stands in no table is trained, with its teacher
    other = dataclasses.replace(runs[1], seed=1)
    mixed = study([runs[1], other], tmp_path / "here", "cpu", reuse=[tmp_path / "elsewhere"])
    assert list(mixed.runs["seed"]) == [0, 1] and set(mixed.examples["seed"]) == {1}
    assert (run_folder(teacher_of(other), tmp_path / "here") / "best.safetensors").is_file()
    (tmp_path / "elsewhere" / "tables" / "02_distillation_history.csv").unlink()
    with pytest.raises(InputError, match="elsewhere holds no saved runs"):
        study(runs, tmp_path / "here", "cpu", reuse=[tmp_path / "elsewhere"])
    with pytest.raises(InputError, match="nowhere holds no saved runs .*reuse names studies that were run"):
        study(runs, tmp_path / "here", "cpu", reuse=[tmp_path / "nowhere"])


def test_test_patients_reach_nothing_but_the_final_evaluation(phantom, finished, tmp_path):
    """Other pixels and labels in the test patients leave all weights, and all but the metrics, as they were."""
    results, runs, _ = finished
    other = tmp_path / "phantom"
    shutil.copytree(phantom, other)
    for case in json.loads((run_folder(runs[1], results) / "manifest.json").read_text())["data"]["test"]:
        path = other / "imagesTr" / f"{case}.nii.gz"
        image = nib.load(path)
        noise = np.random.default_rng(0).integers(-125, 275, image.shape).astype(np.int16)
        nib.save(nib.Nifti1Image(noise, image.affine, image.header), path)
        path = other / "labelsTr" / f"{case}.nii.gz"
        label = nib.load(path)
        nib.save(nib.Nifti1Image(np.minimum(np.asarray(label.dataobj), 1), label.affine, label.header), path)
    # the folds are those of the clean data: a changed data set would rightly be refused, so its hashes are renewed
    spoiled = tmp_path / "results"
    stored = next((results / "splits").glob("*.json"))
    source.source(str(other), "spleen", 3, "raise", "auto", tmp_path / "scratch", Preprocessing(64, 5.0))
    hashes = json.loads(next((tmp_path / "scratch/splits").glob("*.json")).read_text())["cases"]
    document = json.loads(stored.read_text()) | {"cases": hashes}
    write(spoiled / "splits" / stored.name, lambda path: path.write_text(json.dumps(document)))
    study(runs_on(other), spoiled, "cpu")
    for clean, dirty in zip(
        [*runs, teacher_of(runs[1])], [*runs_on(other), teacher_of(runs_on(other)[1])], strict=True
    ):
        clean, dirty = run_folder(clean, results), run_folder(dirty, spoiled)
        for name in ("best.safetensors", "last.safetensors", "history.csv"):
            assert (clean / name).read_bytes() == (dirty / name).read_bytes(), name
        assert (clean / "metrics.csv").read_text() != (dirty / "metrics.csv").read_text()


def test_key_changes_with_all_that_changes_the_result_and_nothing_else(finished, phantom):
    results, runs, _ = finished
    student = runs[1]
    key = run_key(student, results)
    assert run_key(dataclasses.replace(student), results) == key
    renamed = dataclasses.replace(student, profile=dataclasses.replace(TINY, name="other", reduced_from_thesis="words"))
    assert run_key(renamed, results) == key
    longer = dataclasses.replace(student, profile=dataclasses.replace(TINY, student_epochs=2))
    slower_teacher = dataclasses.replace(student, profile=dataclasses.replace(TINY, teacher_epochs=2))
    changed = [
        longer, slower_teacher, runs[0], runs[2], *(dataclasses.replace(student, **change) for change in
        [{"seed": 1}, {"fold": 1}, {"fraction": 1.0}, {"teacher_seed": 1}, {"model": "S2"}, {"teacher": "T2"},
         {"target": "liver"}, {"teacher": "T1+T2"}, {"teacher": "S1"}]),
        *(dataclasses.replace(student, protocol=dataclasses.replace(PROTOCOLS["corrected"], **{switch: True}))
          for switch in SWITCHES if switch != "one_channel_softmax" or "PMD" in student.recipe.name),
        *(dataclasses.replace(student, recipe=dataclasses.replace(student.recipe, **change)) for change in
          [{"teacher": "random"}, {"teacher": "shuffled"}, {"budget": "teacher+student"},
           {"smoothing": 0.1}, {"balance": 0.5}, {"warmup": 0.5}]),
        *(dataclasses.replace(student, profile=dataclasses.replace(TINY, student=how)) for how in
          [dataclasses.replace(TINY.student, precision=precision) for precision in ("fp32", "bf16")]),
    ]  # fmt: skip
    keys = {run_key(run, results) for run in changed}
    assert len(keys) == len(changed) and key not in keys
    sized = dataclasses.replace(TINY, teacher_steps=None)
    more = dataclasses.replace(student.recipe, budget="teacher+student")
    keys = {
        run_key(dataclasses.replace(student, recipe=more, profile=dataclasses.replace(sized, teacher=how)), results)
        for how in (sized.teacher, dataclasses.replace(sized.teacher, batch=2 * sized.teacher.batch))
    }
    assert len(keys) == 2, "the teacher's batch decides how many steps a student of its length takes"
    assert run_key(teacher_of(longer), results) == run_key(teacher_of(student), results), "its teacher is the same run"


def test_a_protocol_without_its_faults_is_the_corrected_one(phantom, tmp_path):
    """`thesis` and `corrected` differ in the switches and in nothing else."""
    corrected = dataclasses.replace(PROTOCOLS["thesis"], name="corrected again", **dict.fromkeys(SWITCHES, False))
    for run in [*runs_on(phantom), teacher_of(runs_on(phantom)[1])]:
        same = dataclasses.replace(run, protocol=corrected)
        assert (same.effective_recipe, same.optimisation, same.preprocessing, same.threshold) == (
            run.effective_recipe, run.optimisation, run.preprocessing, run.threshold,
        )  # fmt: skip
        assert run_key(dataclasses.replace(run, protocol=corrected), tmp_path) == run_key(run, tmp_path)
        assert run_key(dataclasses.replace(run, protocol=PROTOCOLS["thesis"]), tmp_path) != run_key(run, tmp_path)


def test_a_teacher_is_shared_where_a_fault_is_not_of_teachers(phantom, tmp_path):
    run = runs_on(phantom)[1]
    for switch in SWITCHES:
        faulty = dataclasses.replace(run, protocol=dataclasses.replace(PROTOCOLS["corrected"], **{switch: True}))
        same = run_key(teacher_of(faulty), tmp_path) == run_key(teacher_of(run), tmp_path)
        assert same == (switch in ("redrawn_projectors", "one_channel_softmax", "unlabelled_contrast")), switch


def test_zero_weights_are_a_training_of_their_own_only_where_the_optimiser_is(phantom, tmp_path):
    """One optimiser for all: the student that learns nothing from its teacher is the student alone."""
    student = runs_on(phantom)[1]
    silent = tuple(dataclasses.replace(term, weight=0.0) for term in student.recipe.terms)
    zero = dataclasses.replace(student, recipe=dataclasses.replace(student.recipe, terms=silent))
    for protocol, alike in (("corrected", True), ("thesis", False)):
        taught, silenced = (dataclasses.replace(run, protocol=PROTOCOLS[protocol]) for run in (student, zero))
        alone = dataclasses.replace(taught, teacher=None, recipe=BASELINE)
        assert (run_key(silenced, tmp_path) == run_key(alone, tmp_path)) == alike
        assert run_key(taught, tmp_path) not in {run_key(silenced, tmp_path), run_key(alone, tmp_path)}


def test_no_run_is_trained_twice_under_two_names(phantom, tmp_path, monkeypatch):
    trained = []

    def pretend(group, results, *_):
        for run in group:
            trained.append(run_key(run, results))
            write(
                run_folder(run, results) / "manifest.json",
                lambda path: path.write_text('{"format": 2, "status": "done"}'),
            )
        return []

    monkeypatch.setattr(runner, "train_missing", pretend)
    monkeypatch.setattr(runner, "collect", lambda runs, results, saved: None)
    runs = [
        dataclasses.replace(run, protocol=protocol)
        for protocol in correction_stages("cumulative")
        for run in runs_on(phantom)[:2]
    ]
    thesis = dict(teacher="T1", fraction=0.5, data=str(phantom), target="spleen", profile=TINY)
    others = [Run(model="S1", recipe=thesis_recipe("S1", loss), protocol=PROTOCOLS["thesis"], **thesis)
             for loss in ("infonce", "supcon")]  # fmt: skip
    study(runs + others, tmp_path, "cpu")
    assert len(trained) == len(set(trained))


@pytest.mark.parametrize(
    "change", [{"student_layers": "encoder9"}, {"student_layers": "encoder2", "teacher_layers": "encoder9"}]
)
def test_a_scale_that_does_not_exist_is_named_before_anything_is_trained(phantom, tmp_path, change):
    recipe = Recipe("r", terms=(Term("x", "fitnet", 0.1, **change),))
    run = dataclasses.replace(runs_on(phantom)[1], recipe=recipe)
    with pytest.raises(InputError, match="scale of [ST]1 'encoder9' does not exist: choose from encoder1"):
        study([run], tmp_path, "cpu")
    assert not (tmp_path / "runs").exists()


def test_the_key_of_an_outside_network_changes_with_its_layers_and_taps(phantom, tmp_path, monkeypatch):
    def add(width: int, tap: str) -> str:
        def build(spatial_dims, in_channels, out_channels):
            net = torch.nn.Sequential(torch.nn.Conv2d(in_channels, width, 1), torch.nn.Conv2d(width, out_channels, 1))
            return ExternalModel(net, {"bottleneck": tap})

        monkeypatch.setitem(MODELS, "Net", build)
        return run_key(Run(str(phantom), "spleen", "Net", profile=TINY), tmp_path)

    assert len({add(8, "0"), add(16, "0"), add(8, "1")}) == 3 and add(8, "0") == add(8, "0")


def test_a_network_from_outside_may_be_of_volumes_alone(phantom, tmp_path, monkeypatch):
    def build(spatial_dims, in_channels, out_channels, width=8):
        assert (spatial_dims, in_channels) == (3, 1)
        return ExternalModel(torch.nn.Conv3d(1, width, 1), {})

    deep = dataclasses.replace(TINY, preprocessing=dataclasses.replace(TINY.preprocessing, dimensions=3, size=16))
    run, keys = Run(str(phantom), "spleen", "Deep", profile=deep), set()
    for width in (8, 16):
        monkeypatch.setitem(MODELS, "Deep", functools.partial(build, width=width))
        keys.add(run_key(run, tmp_path))
    assert len(keys) == 2


def test_the_key_of_a_loss_from_outside_changes_with_its_code(phantom, tmp_path, monkeypatch):
    """Of a class in a cell of a notebook, as IPython compiles one: its module, `__main__`, has no file."""
    recipe = Recipe("r", terms=(Term("B-B", "mine", 0.2),))
    run = dataclasses.replace(runs_on(phantom)[1], recipe=recipe)

    def key(text: str, cell: str) -> str:
        if cell:
            monkeypatch.setitem(linecache.cache, cell, (len(text), None, text.splitlines(True), cell))
        names = {"__name__": "__main__"}
        exec(compile(text, cell or "<stdin>", "exec"), names)
        monkeypatch.setitem(LOSSES, "mine", names["Mine"])
        return run_key(run, tmp_path)

    text = """from kdlib.losses import LOSSES
class Mine(LOSSES["fitnet"]):
    number = 1
    def compare(self, *parts):
        return self.number * super().compare(*parts)
    @staticmethod
    def unused():
        return 0
"""
    keys = {name: key(of, f"cell-{name}") for name, of in {
        "first": text, "again": text, "attribute": text.replace("= 1", "= 2"),
        "method": text.replace("return self", "return -self"), "static": text.replace("return 0", "return 1"),
    }.items()}  # fmt: skip
    assert keys["first"] == keys["again"] and len(set(keys.values())) == 4
    with pytest.raises(InputError, match="its code cannot be read.*define it in a file, or in a cell"):
        key(text, "")


@pytest.mark.slow
def test_the_published_study_runs_with_all_its_faults(phantom, tmp_path, monkeypatch):
    """They are those of its switches, whatever it is called."""
    selected, original = [], runner.train_cohort

    def train(group, train, val, *rest, **more):
        selected.append(val)
        return original(group, train, val, *rest, **more)

    monkeypatch.setattr(runner, "train_cohort", train)
    thesis = dataclasses.replace(PROTOCOLS["thesis"], name="corrected")
    runs = [dataclasses.replace(run, protocol=thesis) for run in runs_on(phantom)]
    found = study(runs, tmp_path, "cpu")
    test = json.loads((run_folder(runs[1], tmp_path) / "manifest.json").read_text())["data"]["test"]
    assert {bank.cases for bank in selected} == {tuple(test)}, "fault 5: the best epoch is chosen on the test patients"
    history = found.history[found.history["terms"].str.startswith("E-E+B-B")]
    assert (history.loc[history["name"] == "PMD", "value"] == 0).all(), "fault 2: the prediction term is exactly 0"
    assert not history["name"].str.startswith("projector_change/").any(), "fault 1: no projector is trained"
    assert history["name"].str.startswith("infonce_over_chance/").any(), "fault 12: InfoNCE without labels"


@pytest.mark.slow
def test_controls_and_external_networks_run(phantom, tmp_path, monkeypatch):
    def small(spatial_dims, in_channels, out_channels):
        torch.manual_seed(0)
        net = UNet(spatial_dims, in_channels, out_channels, channels=(8, 16, 32), strides=(2, 2))
        return ExternalModel(net, {"encoder2": "model.0", "bottleneck": "model.1.submodule.1", "decoder1": "model.2"})

    monkeypatch.setitem(MODELS, "MONAI U-Net", small)
    recipe, base = thesis_recipe("S1", only=("B-B", "PMD")), dict(data=str(phantom), target="spleen", profile=TINY)
    half = dict(fraction=0.5, **base)
    runs = [
        Run(model="MONAI U-Net", **half),
        Run(model="S1", teacher="T1", recipe=recipe, **half),
        Run(model="S1", teacher="T1", recipe=dataclasses.replace(recipe, name="random", teacher="random"), **half),
        Run(model="S1", teacher="T1", recipe=dataclasses.replace(recipe, name="shuffled", teacher="shuffled"), **half),
        Run(model="S1", teacher="MONAI U-Net", recipe=recipe, **half),
        Run(model="MONAI U-Net", teacher="T1+S1", recipe=recipe, **half),
        Run(model="S1", teacher="S1", recipe=recipe, **half),
        Run(model="S1", recipe=Recipe("long", budget="teacher+student"), **half),
        Run(model="S1", recipe=Recipe("smooth", smoothing=0.1), **half),
    ]  # fmt: skip
    found = study(runs, tmp_path, "cpu")
    assert found.runs["run"].nunique() == len(runs)
    assert set(found.runs["method"]) >= {run.method for run in runs[4:7]}
    manifest = json.loads((run_folder(runs[4], tmp_path) / "manifest.json").read_text())
    assert "teacher bottleneck" in manifest["adapters"]["B-B"] and "1x1 projection" in manifest["adapters"]["B-B"]
    epochs = found.history.groupby("recipe")["epoch"].max()
    assert epochs["long"] == 2 and epochs["smooth"] == 1


def test_a_model_that_does_not_exist_is_named_before_anything_is_trained(phantom, tmp_path):
    for run in (Run(str(phantom), "spleen", "S3", profile=TINY),
                dataclasses.replace(runs_on(phantom)[1], teacher="T3")):  # fmt: skip
        with pytest.raises(InputError, match="model '[ST]3' does not exist: choose from T1, T2, S1, S2"):
            study([*runs_on(phantom), run], tmp_path, "cpu")
    assert not (tmp_path / "runs").exists()


def test_two_recipes_under_one_name_are_refused(phantom, tmp_path):
    run = runs_on(phantom)[1]
    other = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, smoothing=0.1))
    with pytest.raises(InputError, match="two runs of this study are called .* give their recipes different names"):
        study([run, other], tmp_path, "cpu")
    for change in ({"target": "liver"}, {"profile": dataclasses.replace(TINY, student_epochs=2)}, {"group": "(.*)"}):
        with pytest.raises(InputError, match=f"differ in {next(iter(change))}: make a study of each"):
            study([run, dataclasses.replace(run, **change)], tmp_path, "cpu")


def test_cohorts_share_what_can_be_shared(phantom):
    runs = runs_on(phantom) + runs_on(phantom, seed=1)
    assert [len(group) for group in cohorts(runs)] == [1, 2, 1, 2]
    teachers = [Run(str(phantom), "spleen", model, profile=TINY) for model in ("T1", "T2")]
    assert [len(group) for group in cohorts(teachers)] == [1, 1], "a teacher trains alone"
    other = dataclasses.replace(runs[1], model="S2", group="(.*)")
    assert len(cohorts([runs[1], other])) == 2, "patients that are grouped otherwise are other folds"
    with pytest.raises(InputError, match="a study of no runs: give at least one"):
        study([], "nowhere")


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_file(tmp_path):
    target = tmp_path / "history.csv"
    write(target, lambda path: path.write_text("old"))

    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match="history.csv could not be saved: the disk is full.*finished runs are kept"):
        write(target, full)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        write(disk / "run" / "history.csv", lambda path: path.write_text("epoch,name,value"))
        with pytest.raises(InputError, match="best.safetensors could not be saved: the disk is full"):
            save_tensors(build_model("S2").state_dict(), disk / "run" / "best.safetensors")
        with pytest.raises(InputError, match="slices.npz could not be saved: the disk is full"):
            write_arrays(disk / "run" / "slices.npz", {"image": np.random.default_rng(0).random((2, 400, 400))})
        assert [path.name for path in (disk / "run").iterdir()] == ["history.csv"], "finished files stay, no half ones"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_teacher_file_that_does_not_fit(tmp_path):
    path = tmp_path / "best.safetensors"
    save_tensors(build_model("T1", width=0.125).state_dict(), path)
    load_weights(build_model("T1", width=0.125), path)
    for other in (build_model("T1", width=0.25), build_model("S1"), build_model("T1", width=0.125, classes=2)):
        with pytest.raises(InputError, match="do not fit"):
            load_weights(other, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        load_weights(build_model("T1", width=0.125), path)
    with pytest.raises(InputError, match="do not exist"):
        load_weights(build_model("S1"), tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "change, word",
    [({"data": "no/such/folder"}, "no/such/folder"), ({"target": "splen"}, "spleen"), ({"fraction": 0.01}, "fraction")],
)
def test_bad_input_is_one_clear_line(phantom, tmp_path, change, word):
    run = dataclasses.replace(runs_on(phantom)[0], **change)
    with pytest.raises(InputError, match=word) as caught:
        study([run], tmp_path, "cpu")
    assert "\n" not in str(caught.value)


def test_a_changed_data_set_is_refused(phantom, finished, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished[0] / "splits", results / "splits")
    other = tmp_path / "phantom"
    shutil.copytree(phantom, other)
    label = next((other / "labelsTr").glob("*.nii.gz"))
    image = nib.load(label)
    nib.save(nib.Nifti1Image(np.roll(np.asarray(image.dataobj), 1, 0), image.affine, image.header), label)
    with pytest.raises(InputError, match=label.name.split(".")[0]):
        study(runs_on(other), results, "cpu")


# ---------------------------------------------------------------------------------------------------------------- keys


def test_keys_are_those_of_results_that_were_made_before(monkeypatch):
    """A key that changes would train finished runs again."""
    monkeypatch.setattr(store, "run_source", lambda run, results: SimpleNamespace(digest="0" * 64))
    same = dict(teacher=Optimisation(), student=Optimisation())
    profile = Profile("fixed", Preprocessing(64, 5.0), 0.25, 4, 3, 50, 35, folds=4, **same)
    base = dict(data="phantom", target="spleen", profile=profile)
    thesis = Run(
        model="S2", teacher="T1", recipe=thesis_recipe("S2"), fraction=0.5, protocol=PROTOCOLS["thesis"], **base
    )
    runs = [
        Run(model="T2", **base),
        Run(model="S1", fraction=0.5, seed=3, **base),
        thesis,
        controls("S1", "T1", fraction=0.5, **base)[3],
    ]
    keys = [run_key(run, Path(".")) for run in runs]
    assert keys == ["2ff3b74e29231854", "d5baa61602d8f1e4", "068032fe3c1e8859", "2fd143abbafc5cd5"]


# ------------------------------------------------------------------------------------------------------------ manifest


def test_the_manifest_names_code_machine_seeds_and_hashes(finished, phantom):
    results, runs, _ = finished
    record = store.manifest(runs[1], results)
    assert (
        record["code"]["files"]["kdlib/training/loop.py"] == sha256("kdlib/training/loop.py")[:12]
        and record["format"] == 2
    )
    assert record["git"].keys() == {"commit", "dirty"} and record["versions"]["safetensors"]
    assert record["seeds"] == {"run": 0, "teacher": 0} and record["hardware"]["cores"]
    assert record["run"]["protocol"]["name"] == "corrected" and record["teachers"] == {
        "T1": run_key(teacher_of(runs[1]), results)
    }
    stored = next((results / "splits").glob("*.json"))
    assert record["data"]["digest"] == sha256(stored) and len(record["data"]["fold_digest"]) == 64
    assert record["steps"] == 2 and record["sessions"] == [
        {"from_step": 0, "device": "cpu", "torch": torch.__version__, "micro_batches": 1, "processes": 1}
    ]
    assert record["seconds"]["training"] > 0 and record["started"] <= record["finished"]
    log = (run_folder(runs[1], results) / "log.txt").read_text().splitlines()
    assert "training on cpu, code" in log[0] and "epoch 1 of 1, 2 steps" in log[1] and log[2].endswith("done")


def sha256(path: Path | str) -> str:
    path = Path(store.__file__).resolve().parents[2] / path if isinstance(path, str) else path
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_finished_folder_holds_these_files_and_no_others(finished):
    results, runs, _ = finished
    for run in [*runs, teacher_of(runs[1])]:
        names = {path.name for path in run_folder(run, results).iterdir() if not path.name.startswith("agreement")}
        assert names >= {"manifest.json", "history.csv", "metrics.csv", "slices.npz", "log.txt", "best.safetensors"}
        assert "checkpoint.safetensors" not in names and not any(name.startswith(".") for name in names - {".lock"})
        hashed = store.manifest(run, results)["files"].keys()
        assert {"best.safetensors", "metrics.csv"} <= hashed
        assert ("projectors.safetensors" in hashed) == (run == runs[1]), "PMD has none"


def test_results_of_other_code_are_used_and_said(finished, copied, capsys):
    results, runs, found = finished
    old = copied[0]
    for path in (old / "runs").glob("*/manifest.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"code": {}}))
    again = study(runs, old, "cpu")
    pd.testing.assert_frame_equal(again.cases, found.cases)
    assert "3 of 3 runs were made by another version of the code and are used as they are" in capsys.readouterr().out
    study(runs, results, "cpu")
    assert "another version" not in capsys.readouterr().out


@pytest.fixture
def copied(finished, tmp_path) -> tuple[Path, list[Run]]:
    """A copy of the finished study, to be changed."""
    shutil.copytree(finished[0], tmp_path / "results")
    return tmp_path / "results", finished[1]


@pytest.mark.parametrize("name", ["best.safetensors", "metrics.csv", "slices.npz"])
def test_a_file_that_was_changed_after_its_run_is_refused(copied, name):
    results, runs = copied
    path = run_folder(runs[1], results) / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name} was changed after its run: delete .* to train that run again"):
        store.trained(runs[1], 1, results, torch.device("cpu")) if "best" in name else study(runs, results, "cpu")


@pytest.mark.parametrize("name", ["best.safetensors", "metrics.csv", "slices.npz"])
def test_a_file_that_a_finished_run_lacks_is_named(copied, name):
    results, runs = copied
    (run_folder(runs[1], results) / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing: copy the run's whole folder, or delete"):
        store.trained(runs[1], 1, results, torch.device("cpu")) if "best" in name else study(runs, results, "cpu")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"format": 99, "status": "done"}', "newer version .format 99.; update kdlib"),
        ('{"form', "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1, "status": "done"}', None),
    ],
)
def test_a_manifest_that_cannot_be_judged_is_refused_and_one_of_an_older_format_is_no_result(copied, text, message):
    results, runs = copied
    (run_folder(runs[0], results) / "manifest.json").write_text(text)
    if message is None:
        assert not store.is_done(runs[0], results)
        return
    with pytest.raises(InputError, match=message) as caught:
        study(runs, results, "cpu")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.fixture
def half_done(copied) -> tuple[Path, list[Run]]:
    """A copy of a finished study in which the two students of the teacher are still to be trained."""
    for run in copied[1][1:]:
        shutil.rmtree(run_folder(run, copied[0]))
    return copied


def test_a_failed_arm_leaves_its_cause_and_is_trained_again(half_done, monkeypatch):
    (results, runs), original = half_done, training.training_step

    def nan(state, *args):
        original(state, *args)
        if state.run == runs[1]:
            state.diagnostics.losses["loss"] *= float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", nan)
        patch.setenv("KDLIB_RERUN", "make study")
        with pytest.raises(TrainingError, match="1 of 3 runs failed, the others are kept.*loss became nan in epoch 1"):
            study(runs, results, "cpu")
    folder = run_folder(runs[1], results)
    record = json.loads((folder / "manifest.json").read_text())
    assert record["status"] == "failed" and "loss became nan in epoch 1" in record["error"]
    assert record["rerun"] == "make study" and "Traceback" in (folder / "log.txt").read_text()
    assert not (folder / "checkpoint.safetensors").exists()
    with pytest.raises(InputError, match="has no result"):
        store.manifest(runs[1], results)
    assert study(runs, results, "cpu").runs["run"].nunique() == 3
    assert "error" not in store.manifest(runs[1], results)


def test_a_bad_case_costs_its_run_alone_and_the_training_is_kept(half_done, monkeypatch):
    (results, runs), original, steps, bad = half_done, runner.evaluate, [], []

    def spoilt(model, bank, dataset, cases, threshold):
        bad.append(cases[0])
        if len(bad) == 2:  # the second case of the second run
            raise EOFError("Compressed file ended")
        return original(model, bank, dataset, cases, threshold)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "evaluate", spoilt)
        with pytest.raises(TrainingError, match="1 of 3 runs failed.*case phantom_.* cannot be evaluated .EOFError"):
            study(runs, results, "cpu")
    assert [store.is_done(run, results) for run in runs] == [True, False, True]
    step = training.training_step
    monkeypatch.setattr(training, "training_step", lambda *args: steps.append(args) or step(*args))
    study(runs, results, "cpu")
    assert not steps, "only evaluated again"


def test_a_checkpoint_of_other_code_stops_its_run_and_no_other(half_done, monkeypatch):
    (results, runs), step = half_done, training.training_step

    def stop(arm, *args):
        if arm.run == runs[2]:
            raise SystemExit(143)
        return step(arm, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", stop)
        with pytest.raises(SystemExit):
            study(runs, results, "cpu")
    path = run_folder(runs[1], results) / "checkpoint.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "CODE", keeping.CODE | {"kdlib/training/loop.py": "0" * 12})
        with pytest.raises(
            TrainingError, match="1 of 3 runs.*another version of kdlib/training/loop.py: delete that file"
        ):
            study(runs, results, "cpu")
    assert path.is_file() and [store.is_done(run, results) for run in runs] == [True, False, True]
    study(runs, results, "cpu")
    assert not path.exists()


def test_memory_that_does_not_hold_a_cohort_holds_its_halves(half_done, monkeypatch, capsys):
    recipes, (results, runs) = [thesis_recipe("S1", only=(name,)) for name in ("E-E", "B-B", "D-D")], half_done
    runs = [dataclasses.replace(runs[1], recipe=recipe) for recipe in recipes]
    calls, original = [], runner.train_cohort

    def small(group, *args, **kwargs):
        calls.append(len(group))
        if len(group) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(group, *args, **kwargs)

    monkeypatch.setattr(runner, "train_cohort", small)
    assert study(runs, results, "cpu").runs["run"].nunique() == 3
    assert calls == [3, 1, 2, 1, 1], "the cohort, its first arm, the other two, each alone"
    assert "3 runs at once do not fit into memory (CUDA out of memory. Tried" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_split_and_says_so(half_done, monkeypatch, capsys):
    (results, runs), original = half_done, training.student_losses

    def small(state, batch, *args):
        if state.run.teacher and len(batch.images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(state, batch, *args)

    monkeypatch.setattr(training, "student_losses", small)
    study(runs, results, "cpu")
    parts = [store.manifest(run, results)["micro_batches"] for run in [teacher_of(runs[1]), *runs]]
    assert parts == [1, 1, 4, 4]
    printed = capsys.readouterr().out
    assert "KD(T1,S1)@50:PMD: batches of 8 slices do not fit into memory (CUDA out of memory.): split into 4" in printed


def test_a_batch_that_cannot_be_split_further_is_named_and_the_others_go_on(half_done, monkeypatch):
    (results, runs), original = half_done, runner.train_cohort

    def small(group, *args, **kwargs):
        if group[0].teacher:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(group, *args, **kwargs)

    monkeypatch.setattr(runner, "train_cohort", small)
    with pytest.raises(TrainingError, match="2 of 3 runs failed.*batches of 2 slices do not fit into memory .CUDA out"):
        study(runs, results, "cpu")
    assert store.is_done(runs[0], results)


# --------------------------------------------------------------------------------------------------------------- locks


@contextmanager
def another_process(run: Run, results: Path, then: str = "pass"):
    """Holds the run's lock in another process until `let.go()`, or until it is killed."""
    folder = run_folder(run, results)
    folder.mkdir(parents=True, exist_ok=True)
    code = (
        "import sys, filelock, json, pathlib\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "lock = filelock.FileLock(folder / '.lock'); lock.acquire()\n"
        f"print('held', flush=True); sys.stdin.readline()\n{then}\nlock.release()"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_what_another_process_trains_is_left_for_the_end_and_then_read(
    phantom, finished, tmp_path, monkeypatch, capsys
):
    """The other finishes its run while we wait for it: it is not trained again."""
    results, runs, found = finished
    mine = tmp_path / "results"
    shutil.copytree(results / "splits", mine / "splits")
    done = run_folder(runs[1], results)
    copy = f"import shutil; shutil.copytree({str(done)!r}, folder, dirs_exist_ok=True)"
    trained, original = [], runner.train_missing
    monkeypatch.setattr(
        runner, "train_missing", lambda group, *args, **more: trained.append(group) or original(group, *args, **more)
    )
    with another_process(runs[1], mine, copy) as other:
        locked = runner.locked

        @contextmanager
        def noticed(run, folder, wait=False):
            if wait:
                other.stdin.write("\n")
                other.stdin.flush()
            with locked(run, folder, wait) as got:
                yield got

        monkeypatch.setattr(runner, "locked", noticed)
        again = study(runs, mine, "cpu")
    assert runs[1] not in [run for group in trained for run in group]
    assert trained[-1] == [runs[2]], "the others of the cohort did not wait"
    assert "another process is training it, waiting" in capsys.readouterr().out
    pd.testing.assert_frame_equal(again.cases, found.cases)


def test_a_lock_whose_holder_died_is_taken_over(phantom, tmp_path, monkeypatch):
    run = runs_on(phantom)[0]
    with another_process(run, tmp_path) as other:
        other.kill()
        other.wait()
        assert (run_folder(run, tmp_path) / ".lock").exists()
        study([run], tmp_path, "cpu")
    assert store.is_done(run, tmp_path)


def test_a_failure_of_another_process_is_reported_not_repeated(phantom, tmp_path, monkeypatch):
    run = runs_on(phantom)[0]
    record = {"format": 2, "status": "failed", "error": "S1: loss became nan"}
    failed = f"(folder / 'manifest.json').write_text(json.dumps({record}))"
    monkeypatch.setattr(runner, "train_missing", lambda *args: pytest.fail("trained"))
    with another_process(run, tmp_path, failed) as other:
        Timer(0.5, lambda: (other.stdin.write("\n"), other.stdin.flush())).start()
        with pytest.raises(TrainingError, match="1 of 1 runs failed.*S1: loss became nan"):
            study([run], tmp_path, "cpu")
