"""A student's folder: what is written is read, and what was changed, lost or never there is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from kdlib.config import PROFILES, InputError, Preprocessing
from kdlib.inference.backends import load_backend
from kdlib.inference.student import Student, find_student, load_student, student_of_run, write_student
from kdlib.models import build_model
from kdlib.training.checkpoint import save_tensors
from kdlib.training.device import precision

STUDENT = Student(
    "abdomen-s1", "S1", 1, ("spleen", "liver"), "CT", Preprocessing(32, 2.0, "neighbours"), facts={"fold": 0}
)


def written(folder: Path, overwrite: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model("S1", classes=2).eval()
    write_student(STUDENT, folder, lambda made: save_tensors(model.state_dict(), made / "model.safetensors"), overwrite)
    return model


def test_a_folder_gives_back_the_student_and_its_network(tmp_path):
    model = written(tmp_path / "s1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s1"]  # nothing half written beside it
    student = load_student(tmp_path / "s1")
    assert dataclasses.replace(student, files={}) == STUDENT
    images = torch.rand(3, 3, 32, 48)
    with torch.no_grad():
        expected = model(images, reconstruct=False).segmentation
    with precision("fp32"):
        torch.testing.assert_close(load_backend(tmp_path / "s1", student, "cpu")(images), expected)


@pytest.mark.parametrize("name, around", [("bf16", "fp32"), ("fp32", "bf16"), ("auto", "bf16")])
def test_a_student_computes_in_its_own_precision(tmp_path, name, around):
    model = written(tmp_path / "s1")
    student = dataclasses.replace(load_student(tmp_path / "s1"), precision=name)
    images = torch.rand(3, 3, 32, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name != "fp32"):
        expected = model(images, reconstruct=False).segmentation.float()
    with precision(around):
        found = load_backend(tmp_path / "s1", student, "cpu")(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # another layout in memory


@pytest.mark.parametrize("device", ["cuda", "abacus"])
@pytest.mark.parametrize("kind", ["onnx", "openvino", "openvino-int8"])
def test_what_runs_on_the_cpu_alone_takes_no_other_device(tmp_path, device, kind):
    with pytest.raises(InputError, match=f"device '{device}': a student of format '{kind}' runs on the CPU"):
        load_backend(tmp_path, dataclasses.replace(STUDENT, format=kind), device)


def change(folder: Path, **fields) -> None:
    path = folder / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing: copy"),
        (lambda folder: (folder / "model.safetensors").open("ab").write(b"x"), "model.safetensors was changed"),
        (lambda folder: (folder / "student.json").write_text("{"), "student.json is damaged"),
        (lambda folder: (folder / "student.json").write_text("[]"), "student.json: .* give its fields"),
        (lambda folder: change(folder, format="tflite"), "'tflite': give 'torch', 'onnx', 'openvino' or"),
        (lambda folder: change(folder, modality="PET"), "'PET': give 'CT' or 'MR'"),
        (lambda folder: change(folder, model="S9"), "model 'S9' does not exist: choose from"),
        (lambda folder: change(folder, size=3), "field 'size' of a student does not exist"),
        (lambda folder: change(folder, classes=[]), "has no class"),
    ],
)
def test_a_folder_that_was_changed_is_refused(tmp_path, spoil, message):
    written(tmp_path / "s1")
    spoil(tmp_path / "s1")
    with pytest.raises(InputError, match=message) as caught:
        load_student(tmp_path / "s1")
    assert "\n" not in str(caught.value) and "s1" in str(caught.value)


def test_a_student_is_replaced_only_where_that_is_asked_for(tmp_path):
    written(tmp_path / "s1")
    with pytest.raises(InputError, match="exists: give --overwrite"):
        written(tmp_path / "s1")
    written(tmp_path / "s1", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").touch()
    with pytest.raises(InputError, match="exists: choose another folder"):
        written(tmp_path / "other", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "s1"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "model.safetensors").touch()
        raise OSError("no space")

    with pytest.raises(InputError, match="could not be saved: no space"):
        write_student(STUDENT, tmp_path / "s1", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_student_is_found_by_folder_file_key_or_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, results = tmp_path / "here" / "s1", tmp_path / "results"
    written(folder)
    written(results / "students" / "abdomen")
    (results / "runs" / "0123").mkdir(parents=True)
    for name in ("manifest.json", "best.safetensors"):
        (results / "runs" / "0123" / name).touch()
    assert find_student(folder) == find_student(folder / "model.safetensors") == folder
    assert find_student("abdomen", results) == results / "students" / "abdomen"
    assert find_student("0123", results) == results / "runs" / "0123"
    for unknown in ("s1", "x" * 300, str(tmp_path)):
        with pytest.raises(InputError, match=r"does not exist: .*released one \(abdomen.*the key of a run .*\(0123\)"):
            find_student(unknown, results)


@pytest.fixture(scope="module")
def a_run(small_study) -> Path:
    return next(
        path.parent for path in sorted((small_study / "runs").glob("*/manifest.json"))
        if json.loads(path.read_text())["identity"]["method"] == "S1@50"
    )  # fmt: skip


@pytest.mark.slow
def test_a_runs_folder_is_a_student(a_run, small_study, tmp_path):
    student = load_student(a_run)
    record = json.loads((a_run / "manifest.json").read_text())
    assert (student.model, student.classes, student.modality, student.format) == ("S1", ("spleen",), "CT", "torch")
    assert student.preprocessing == PROFILES["quick"].preprocessing
    assert student.facts["run"] == a_run.name and student.facts["dice"].keys() == set(record["data"]["test"])
    full = student_of_run(a_run, small_study / "data" / "phantom")
    assert full.name == student.name and full.facts.items() > student.facts.items()
    assert 1 <= full.facts["training_patients"] <= full.facts["training_cases"] == len(record["data"]["train"])
    assert 0 < full.facts["negative"][0] <= full.facts["negative"][1] <= 1  # HU of air
    write_student(
        full, tmp_path / "copy", lambda made: shutil.copy(a_run / "best.safetensors", made / "model.safetensors")
    )
    images = torch.rand(2, 3, 64, 64)
    copy = load_student(tmp_path / "copy")
    assert dataclasses.replace(copy, files={}) == full
    assert torch.equal(load_backend(tmp_path / "copy", copy)(images), load_backend(a_run, student)(images))


@pytest.mark.slow
def test_a_run_that_is_no_student_yet_is_refused(a_run, small_study, tmp_path):
    shutil.copytree(a_run, tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    record = json.loads(path.read_text())
    for change, message in (
        ({"status": "training"}, "holds no finished run"),
        (
            {"data": {key: value for key, value in record["data"].items() if key != "modality"}},
            r"give its data set \(--data\)",
        ),
    ):
        path.write_text(json.dumps(record | change))
        with pytest.raises(InputError, match=message):
            load_student(tmp_path / "run")
    path.write_text(json.dumps(record | {"run": record["run"] | {"data": "Other"}}))
    with pytest.raises(InputError, match="is not the data set of that run: give that of Other"):
        load_student(tmp_path / "run", small_study / "data" / "phantom")
