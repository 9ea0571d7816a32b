"""`kdlib predict`: the mask that the study's evaluation gives, on the scan's own grid; bad input is one clear line."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel import orientations

import kdlib
from kdlib.apps.cli import main
from kdlib.apps.notebooks import NOTEBOOKS, execute
from kdlib.config import Preprocessing, Run
from kdlib.data import build_bank, index
from kdlib.evaluation.masks import on_file_grid, predict_cases
from kdlib.experiments.source import run_source
from kdlib.inference.predict import largest_components
from kdlib.inference.student import Student, write_student
from kdlib.models import build_model
from kdlib.training.checkpoint import save_tensors


def student_folder(
    folder: Path, modality="MR", classes=("front", "back"), view=None, threshold=0.5, **facts
) -> torch.nn.Module:
    """An untrained student, of whose classes none wins everywhere: its masks are speckled, so that a voxel out of place
    shows."""
    torch.manual_seed(1)
    model = build_model("S1", classes=len(classes)).eval()
    head = model.get_submodule(model.scales["logits"])
    with torch.no_grad():
        logits = model(torch.rand(4, 3, 32, 32), reconstruct=False).segmentation
        head.weight *= 20
        head.bias.copy_(20 * (head.bias - logits.mean((0, 2, 3))))
    view = view or Preprocessing(32, 1.3, "neighbours")
    student = Student("test-s1", "S1", 1, classes, modality, view, threshold, facts=facts)
    write_student(student, folder, lambda made: save_tensors(model.state_dict(), made / "model.safetensors"))
    return model


def scan_of(shape=(21, 18, 6), low=0, high=1000, dtype=np.float32, seed=0) -> nib.Nifti1Image:
    voxels = np.random.default_rng(seed).integers(low, high, shape).astype(dtype)
    affine = np.array([[0.9, 0.1, 0, -5], [-0.1, 1.1, 0, 7], [0, 0, 2.5, 30], [0, 0, 0, 1]])  # oblique
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1)
    image.set_sform(affine, 4)
    return image


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """A folder, worked in, with a student `mr`, and a scan of its kind."""
    monkeypatch.chdir(tmp_path)
    student_folder(tmp_path / "mr")
    nib.save(scan_of(), "scan.nii.gz")
    return tmp_path


def mask_at(path: str) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


# ----------------------------------------------------------------------------------------------------------- the mask


def as_evaluated(data: Path, folder: Path, model: torch.nn.Module, view: Preprocessing, number: int) -> None:
    """Prediction equals evaluation, to the voxel, of a case of a data set."""
    dataset = index(data)
    case = dataset.cases[number]
    classes = dataset.classes("all")
    dataset = type(dataset)(dataset.name, data, dataset.modality, dataset.labels, (case,), dataset.defects)
    bank = build_bank(dataset, classes, view)
    expected = on_file_grid(predict_cases(model, bank)[case.name], bank, case.name)
    mask = kdlib.predict(folder, case.image, device="cpu")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), expected)
    assert set(np.unique(expected)) == set(range(len(classes) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("published", [False, True])
def test_a_mask_is_what_the_evaluation_gives_on_the_phantom(tmp_path, phantom_of, published):
    data, view = phantom_of(5), Preprocessing(64, 5.0, published=published)
    classes = tuple(index(data).classes("all"))
    model = student_folder(tmp_path / "s1", "CT", classes, view)
    as_evaluated(data, tmp_path / "s1", model, view, 3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 77])
def test_a_mask_is_what_the_evaluation_gives_on_real_scans(tmp_path, real_data, number):
    view = Preprocessing(64, 1.0, "neighbours")
    model = student_folder(tmp_path / "s1", "MR", ("Anterior", "Posterior"), view)
    as_evaluated(real_data("hippocampus"), tmp_path / "s1", model, view, number)


def test_a_mask_takes_over_the_grid_and_header_codes_of_its_scan(there, capsys):
    assert main(["predict", "mr", "scan.nii.gz", "-o", "out/mask.nii.gz"]) == 0
    scan, mask = nib.load("scan.nii.gz"), nib.load("out/mask.nii.gz")
    assert mask.shape == scan.shape and mask.get_data_dtype() == np.uint8
    for name in ("qform_code", "sform_code", "pixdim", "xyzt_units", "quatern_b", "qoffset_x", "srow_x", "srow_y"):
        np.testing.assert_array_equal(mask.header[name], scan.header[name], name)
    assert mask.dataobj.slope == 1 and mask.dataobj.inter == 0
    found = mask_at("out/mask.nii.gz")
    assert set(np.unique(found)) == {0, 1, 2}
    said = re.fullmatch(r"out/mask\.nii\.gz: front (\S+) ml, back (\S+) ml\n", capsys.readouterr().out)
    assert [float(ml) for ml in said.groups()] == pytest.approx([ml_of(found, 1), ml_of(found, 2)], abs=0.00501)
    assert [path.name for path in Path("out").iterdir()] == ["mask.nii.gz"]


def ml_of(mask: np.ndarray, value: int) -> float:
    return np.count_nonzero(mask == value) * 2.5 * (0.9 * 1.1 + 0.01) / 1000


@pytest.mark.parametrize("axes", ["LAS", "PSR", "IRA"])
def test_an_orientation_turns_the_mask_alone(there, axes):
    image = scan_of()
    affine = np.diag([0.9, 1.1, 2.5, 1])  # an oblique one would be turned about other axes
    image = nib.Nifti1Image(np.asarray(image.dataobj), affine)
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(axes))
    nib.save(image, "a.nii")
    nib.save(image.as_reoriented(turn), "b.nii")
    assert main(["predict", "mr", "a.nii", "b.nii", "-o", "out"]) == 0
    turned = nib.load("out/a.nii.gz").as_reoriented(turn)
    np.testing.assert_array_equal(mask_at("out/b.nii.gz"), np.asarray(turned.dataobj))
    np.testing.assert_allclose(nib.load("out/b.nii.gz").affine, turned.affine)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, ">i4"])
def test_storage_changes_nothing(there, dtype):
    """Any type, any scale of the header: the same intensities give the same mask."""
    image = scan_of(low=1, high=250)
    nib.save(image, "a.nii.gz")
    scaled = np.dtype(dtype).kind == "i"
    voxels = (np.asarray(image.dataobj) + 20) / 0.5 if scaled else np.asarray(image.dataobj)
    stored = nib.Nifti1Image(voxels.astype(dtype), image.affine, dtype=dtype)
    if scaled:
        stored.header.set_slope_inter(0.5, -20)
    nib.save(stored, "b.nii")
    np.testing.assert_array_equal(nib.load("b.nii").get_fdata(), image.get_fdata())
    assert nib.load("b.nii").dataobj.slope == (0.5 if scaled else 1)
    assert main(["predict", "mr", "a.nii.gz", "b.nii", "-o", "out"]) == 0
    np.testing.assert_array_equal(mask_at("out/a.nii.gz"), mask_at("out/b.nii.gz"))


def test_probabilities_are_those_that_the_mask_is_cut_from(there):
    student_folder(there / "one", classes=("organ",))
    assert main(["predict", "mr", "scan.nii.gz", "-o", "two.nii.gz", "--probabilities"]) == 0
    assert main(["predict", "one", "scan.nii.gz", "-o", "one.nii.gz", "--probabilities"]) == 0
    two, one = nib.load("two_probabilities.nii.gz"), nib.load("one_probabilities.nii.gz")
    assert two.get_data_dtype() == one.get_data_dtype() == np.float32
    assert two.shape == (21, 18, 6, 2) and one.shape == (21, 18, 6, 1)
    np.testing.assert_array_equal(two.affine, nib.load("scan.nii.gz").affine)
    classes = np.asarray(two.dataobj)
    background = 1 - classes.sum(-1)
    mask = np.argmax(np.concatenate([background[..., None], classes], -1), -1)
    assert np.mean(mask != mask_at("two.nii.gz")) < 1e-3  # ties, by the rounding of the background
    np.testing.assert_array_equal(np.asarray(one.dataobj)[..., 0] > 0.5, mask_at("one.nii.gz") == 1)


def test_postprocessing_keeps_the_largest_component_of_each_class(there):
    mask = np.zeros((9, 9, 3), np.uint8)
    mask[:2, :2], mask[2, 2, 0], mask[5:7, 5:7, 0] = 1, 1, 1  # a block with a corner that touches it, and another
    mask[8, :5, 0], mask[8, 6:9, 2] = 2, 2
    kept = largest_components(mask)
    expected = mask.copy()
    expected[5:7, 5:7, 0], expected[8, 6:9, 2] = 0, 0
    np.testing.assert_array_equal(kept, expected)
    assert not largest_components(np.zeros((3, 3, 3), np.uint8)).any()
    assert main(["predict", "mr", "scan.nii.gz", "-o", "raw.nii.gz"]) == 0
    assert main(["predict", "mr", "scan.nii.gz", "-o", "kept.nii.gz", "--postprocess"]) == 0
    np.testing.assert_array_equal(mask_at("kept.nii.gz"), largest_components(mask_at("raw.nii.gz")))
    assert (mask_at("kept.nii.gz") != mask_at("raw.nii.gz")).any()


# ---------------------------------------------------------------------------------------------------------- bad input


def save_bad(name: str, voxels: np.ndarray, affine=None, **fields) -> None:
    image = nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
    for field, value in fields.items():
        image.header[field] = value
    nib.save(image, name)


def no_affine() -> None:
    image = scan_of()
    image.set_qform(None, 0)
    image.set_sform(None, 0)
    nib.save(image, "bad.nii.gz")


def corrupt() -> None:
    blob = bytearray(gzip.compress(scan_of().to_bytes()))
    blob[len(blob) // 2] ^= 255
    Path("bad.nii.gz").write_bytes(blob)


def with_nan() -> None:
    voxels = np.asarray(scan_of().dataobj).copy()
    voxels[1, 2, 3] = np.nan
    save_bad("bad.nii.gz", voxels)


RANDOM = np.random.default_rng(0)
BAD = {
    "nan": (with_nan, "NaN or infinite intensities; replace them"),
    "four dimensions": (lambda: save_bad("bad.nii.gz", RANDOM.random((9, 9, 9, 2))), "not three-dimensional; save one"),
    "one slice": (lambda: save_bad("bad.nii.gz", RANDOM.random((9, 9, 1))), "one slice, of shape (9, 9, 1); give the"),
    "no affine": (no_affine, "header with no orientation, or an unknown one; export it again, with a whole header"),
    "colour": (lambda: save_bad("bad.nii.gz", np.zeros((9, 9, 9), [(c, "u1") for c in "RGB"])), "save one number per"),
    "corrupt gzip": (corrupt, "truncated, damaged or unreadable; download or export it again"),
    "a mask": (
        lambda: save_bad("bad.nii.gz", RANDOM.integers(0, 3, (9, 9, 9)).astype(np.uint8)),
        "holds the values 0, 1, 2 alone, so it is a mask or empty; give the scan itself",
    ),
    "text": (lambda: Path("bad.nii.gz").write_text("no scan"), "not a gzip file; rename it"),
    "nothing": (lambda: None, "bad.nii.gz does not exist: give a NIfTI file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_scan_is_one_line_and_leaves_nothing(there, capsys, kind):
    make, message = BAD[kind]
    make()
    before = sorted(there.rglob("*"))
    assert main(["predict", "mr", "bad.nii.gz", "-o", "mask.nii.gz"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == ""
    assert said.err.startswith("error: bad.nii.gz") and message in said.err
    assert sorted(there.rglob("*")) == before


def test_bad_scans_cost_their_own_masks_alone(there, capsys):
    Path("scans").mkdir()
    for name in ("a", "c"):
        nib.save(scan_of(), f"scans/{name}.nii.gz")
    Path("scans/b.nii.gz").write_bytes(b"")
    Path("scans/._a.nii.gz").write_bytes(b"")  # left by macOS
    assert main(["predict", "mr", "scans", "missing.nii", "-o", "out"]) == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: scans/b.nii.gz: not a gzip file; rename it, or download or export it again",
        "error: missing.nii does not exist: give a NIfTI file, a folder of them, or that of a DICOM series",
        "error: 2 of 4 scans failed; the others are done",
    ]
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.nii.gz", "c.nii.gz"]


@pytest.mark.parametrize(
    "modality, low, high, message",
    [
        ("MR", -900, 400, "are negative (0% to 0% as a rule): is it CT,"),
        ("CT", 0, 900, "0% of its intensities are negative (10% to 100% as a rule): is it MR, or"),
        ("CT", -900, 400, ""),
        ("MR", 0, 900, ""),
    ],
)  # fmt: skip
def test_a_scan_of_the_other_modality_is_warned_of(there, capsys, modality, low, high, message):
    student_folder(there / "student", modality)
    nib.save(scan_of(low=low, high=high), "scan.nii.gz")
    assert main(["predict", "student", "scan.nii.gz", "-o", "mask.nii.gz"]) == 0
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == (1 if message else 0)
    assert err == "" or err.startswith("warning: scan.nii.gz: ")


def test_what_training_scans_held_is_not_odd_and_a_narrow_view_is(there, capsys):
    student_folder(there / "student", "MR", view=Preprocessing(16, 0.5), negative=[0.5, 0.8])
    nib.save(scan_of(low=-900, high=400), "scan.nii.gz")
    assert main(["predict", "student", "scan.nii.gz", "-o", "mask.nii.gz"]) == 0
    assert "warning: scan.nii.gz: the student sees 44% x 38% of each slice" in (err := capsys.readouterr().err)
    assert err.count("\n") == 1


def test_a_changed_student_and_an_unknown_format_are_refused(there, capsys):
    path = there / "mr" / "student.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"format": "tflite"}))
    assert main(["predict", "mr", "scan.nii.gz", "-o", "mask.nii.gz"]) == 2
    assert "format 'tflite': give 'torch', 'onnx', 'openvino' or 'openvino-int8'" in capsys.readouterr().err
    path.write_text(text)
    with (there / "mr" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert main(["predict", "mr", "scan.nii.gz", "-o", "mask.nii.gz"]) == 2
    assert capsys.readouterr().err == (
        "error: mr/model.safetensors was changed (its hash is not that in student.json): copy or export it again\n"
    )
    (there / "mr" / "model.safetensors").unlink()
    assert main(["predict", "mr", "scan.nii.gz", "-o", "mask.nii.gz"]) == 2
    assert "model.safetensors is missing: copy the student's whole folder" in capsys.readouterr().err
    assert not Path("mask.nii.gz").exists()


def test_an_output_that_exists_is_kept_unless_asked(there, capsys):
    Path("mask.nii.gz").write_text("precious")
    assert main(["predict", "mr", "scan.nii.gz", "-o", "mask.nii.gz"]) == 2
    assert capsys.readouterr().err == (
        "error: mask.nii.gz exists: give --overwrite to replace it; or choose another output\n"
    )
    assert Path("mask.nii.gz").read_text() == "precious"
    assert main(["predict", "mr", "scan.nii.gz", "-o", "mask.nii.gz", "--overwrite"]) == 0
    assert mask_at("mask.nii.gz").shape == (21, 18, 6)
    before = Path("scan.nii.gz").read_bytes()
    assert main(["predict", "mr", "scan.nii.gz", "-o", "scan.nii.gz", "--overwrite"]) == 2
    assert "scan.nii.gz exists: it is the scan" in capsys.readouterr().err
    assert Path("scan.nii.gz").read_bytes() == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["scan.nii.gz", "-o", "mask.nrrd"], "mask.nrrd: an unknown format; give .nii.gz, .nii or .dcm, or a folder"),
        (["scan.nii.gz", "mr", "-o", "m.nii"], "m.nii: the masks of 2 scans need a folder; give -o FOLDER"),
        (["a/scan.nii", "b/scan.nii", "-o", "m"], "b/scan.nii: another scan's mask is called m/scan.nii.gz, too"),
        (["scan.nii.gz", "-o", "m", "--batch", "0"], "batch 0: give a number of slices"),
        (["scan.nii.gz", "-o", "m", "--device", "abacus"], "device 'abacus' does not exist"),
        (["mr/student.json", "-o", "m"], "mr/student.json is neither .nii.gz nor .nii"),
    ],
)
def test_outputs_and_options_are_checked_first(there, capsys, words, message):
    assert main(["predict", "mr", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("m").exists()


# ------------------------------------------------------------------------------------------------------- the notebook


@pytest.mark.slow
def test_the_notebook_shows_the_mask_that_the_function_gives(small_study, tmp_path):
    key = next((small_study / "runs").glob("*/best.safetensors")).parent.name
    values = {"results": str(small_study), "student": key, "output": str(tmp_path / "mask.nii.gz"), "device": "cpu"}
    execute(NOTEBOOKS / "deploy.ipynb", tmp_path / "deploy.ipynb", values)
    phantom = Run("phantom", "spleen", "S1", fraction=0.5)
    found = run_source(phantom, small_study)
    scan = found.dataset.case(found.folds[0].test[0]).image
    expected = kdlib.predict(key, scan, small_study, device="cpu")
    np.testing.assert_array_equal(mask_at(str(tmp_path / "mask.nii.gz")), np.asarray(expected.dataobj))
