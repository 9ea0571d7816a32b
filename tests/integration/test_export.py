"""`kdlib export`: every format gives what PyTorch gives, with its card; int8 sees training slices alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from kdlib.apps.cli import main
from kdlib.config import InputError, Preprocessing
from kdlib.data import build_bank, index
from kdlib.inference.backends import openvino_backend
from kdlib.inference.export import calibration_slices, mean_dice, quantise, save_onnx, training_data
from kdlib.inference.student import Student, load_student
from kdlib.models import build_model
from kdlib.training.device import precision

onnxruntime, openvino = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def run(small_study) -> Path:
    """A finished run of S1 alone on the phantom."""
    for folder in sorted((small_study / "runs").iterdir()):
        if json.loads((folder / "manifest.json").read_text())["identity"]["method"] == "S1@50":
            return folder
    raise AssertionError("the study has no such run")


def phantom_of(run: Path) -> Path:
    return run.parents[1] / "data" / "phantom"


def as_trained(name: str, width: float) -> nn.Module:
    """A network whose batch norms do something, and whose logits are not all about 0."""
    torch.manual_seed(0)
    model = build_model(name, classes=2, width=width)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 2)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name, width", [("S1", 1), ("S2", 1), ("E1", 1), ("T1", 0.25), ("T2", 0.25)])
def test_onnx_and_openvino_give_what_torch_gives_at_any_size_and_batch(tmp_path, name, width):
    network = as_trained(name, width)
    save_onnx(network, Student("x", name, width, ("a", "b"), "CT", Preprocessing(64)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # weights are inside
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    other = openvino_backend(openvino.Core().read_model(tmp_path / "model.onnx"))
    for shape in ((1, 64, 64), (3, 96, 128), (2, 128, 32), (1, 256, 256)):
        images = torch.rand(shape[0], 3, *shape[1:])
        with torch.no_grad():
            expected = network(images, reconstruct=False).segmentation
        assert expected.abs().max() > 0.1
        (found,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(other(images), expected, atol=1e-4, rtol=0)


def masks_of(student: Path, scans: Path, out: Path) -> dict[str, np.ndarray]:
    assert main(["predict", str(student), str(scans), "-o", str(out)]) == 0
    return {path.name: np.asarray(nib.load(path).dataobj) for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def scans(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for path in sorted((phantom_of(run) / "imagesTr").iterdir())[:2]:
        shutil.copy(path, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino", "openvino-int8"])
def test_predict_runs_every_format(run, scans, tmp_path, to):
    assert main(["export", str(run), "--to", to, "-o", str(tmp_path / to), "--data", str(phantom_of(run))]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [to]  # nothing half written
    student = load_student(tmp_path / to)
    assert student.format == to and (to == "openvino-int8") == ("dice_int8" in student.facts)
    with precision("fp32"):  # as the other formats compute
        own = masks_of(run, scans, tmp_path / "own")
    found = masks_of(tmp_path / to, scans, tmp_path / "masks")
    assert own.keys() == found.keys() and len(own) == 2
    for name, mask in own.items():
        differ = np.count_nonzero(mask != found[name])
        assert differ <= (0.02 * mask.size if to == "openvino-int8" else 2)  # a tie at the threshold may turn
    card = (tmp_path / to / "README.md").read_text()
    assert all(digest in card for digest in student.files.values()) and student.facts["split"]["digest"] in card
    assert ("Int8 less float32" in card) == (to == "openvino-int8")
    assert f"{mean_dice(student.facts['dice']):.3f}" in card  # the phantom's patients have one volume each


@pytest.mark.slow
def test_monai_runs_the_bundle_and_gives_the_same_mask(run, scans, tmp_path, capsys):
    pytest.importorskip("fire")
    bundle = tmp_path / "bundle"
    assert main(["export", str(run), "--to", "bundle", "-o", str(bundle), "--data", str(phantom_of(run))]) == 0
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert files >= {"LICENSE", "README.md", "configs/metadata.json", "configs/inference.json", "model.safetensors"}
    words = ["--config_file", bundle / "configs" / "inference.json", "--meta_file", bundle / "configs/metadata.json"]
    words += ["--bundle_root", bundle, "--dataset_dir", scans, "--output_dir", tmp_path / "masks"]
    command = [sys.executable, "-m", "monai.bundle", "run", *map(str, words)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own = masks_of(run, scans, tmp_path / "own")
    for name, mask in own.items():
        np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "masks" / name).dataobj), mask)
    from monai.bundle import run as run_bundle

    given = {name.removeprefix("--"): str(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    with pytest.raises(SystemExit) as again:  # an error is one of the bundle's, too
        run_bundle(**given)
    assert again.value.code == 1 and "exists: give --overwrite" in capsys.readouterr().err


def test_calibration_reads_training_slices_alone(run):
    student = load_student(run, phantom_of(run))
    dataset = training_data(student, phantom_of(run))
    drawn = {image[0, 1].numpy().tobytes() for image in calibration_slices(student, dataset, 50)}
    bank = build_bank(dataset, {name: dataset.labels[name] for name in student.classes}, student.preprocessing)

    def slices(cases) -> set[bytes]:
        part = bank.select(cases)
        return {image[1].numpy().tobytes() for image in part.batch(torch.arange(len(part)))[0]}

    train = student.facts["split"]["train"]
    assert train and not set(train) & set(student.facts["dice"])
    assert len(drawn) > 20 and drawn <= slices(train)
    assert not drawn & (slices([case.name for case in dataset.cases if case.name not in train]) - slices(train))


def test_other_data_is_refused(run, tmp_path):
    student = load_student(run, phantom_of(run))
    shutil.copytree(phantom_of(run), tmp_path / "other")
    path = sorted((tmp_path / "other" / "imagesTr").iterdir())[0]
    image = nib.load(path)
    nib.save(type(image)(np.asarray(image.dataobj) + 1, image.affine, image.header), path)
    with pytest.raises(InputError, match="is not the data set that .* was trained on: give that of"):
        training_data(student, tmp_path / "other")
    assert index(tmp_path / "other").name == student.facts["data_set"]  # by name alone it would be


def test_int8_rounds_a_network_of_known_ranges():
    import openvino.opset13 as ops

    images = ops.parameter([-1, 3, -1, -1], np.float32)
    kernel = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    layer = ops.convolution(images, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    model = openvino.Model([ops.relu(layer)], [images])
    drawn = [torch.rand(1, 3, 16, 16) for _ in range(20)]
    exact, coarse = openvino_backend(model), openvino_backend(quantise(model, drawn))
    error = (exact(drawn[0]) - coarse(drawn[0])).abs().max()
    assert 0 < error < 0.05 * exact(drawn[0]).max()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not the environment of the plugin's signal stack")
def test_a_signal_still_reaches_its_handler_after_openvino():
    """In a process of its own: it died there without a word, for the plugin freed the stack of the signal."""
    script = """
import gc, signal
import numpy as np, openvino, torch
import openvino.opset13 as ops
from kdlib.inference.backends import openvino_backend
from kdlib.inference.export import quantise
images = ops.parameter([-1, 3, -1, -1], np.float32)
layer = ops.convolution(images, np.ones((4, 3, 3, 3), np.float32), [1, 1], [1, 1], [1, 1], [1, 1])
model, drawn = openvino.Model([ops.relu(layer)], [images]), [torch.rand(1, 3, 16, 16) for _ in range(4)]
first, second = openvino_backend(model), openvino_backend(quantise(model, drawn))
first(drawn[0]), second(drawn[0])
del first, second
gc.collect()
signal.signal(signal.SIGTERM, lambda number, frame: print("stopped", number))
signal.raise_signal(signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["stopped 15"]), done.stderr[-500:]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "words, said",
    [
        (["--to", "tflite"], "invalid choice: 'tflite'"),
        (["--to", "openvino-int8"], "int8 is calibrated on training slices: give --data"),
        (["--to", "onnx", "-o", "there"], "there exists: choose another folder"),
        (["--to", "onnx", "-o", "there", "--overwrite"], "there exists: choose another folder"),  # it is no student's
        (["--to", "onnx", "--results", "nowhere", "student"], "'nothing' does not exist"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdlib.inference.export.openvino_model", lambda *_: None)
    (tmp_path / "there").mkdir()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"].get("modality") == "CT"  # so that --data is not asked for its sake
    student = "nothing" if words[-1] == "student" else str(run)
    words = [word for word in words if word != "student"]
    assert main(["export", student, *([] if "-o" in words else ["-o", "out"]), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("name, to", [("nncf", "openvino-int8"), ("openvino", "openvino"), ("onnxscript", "onnx")])
def test_a_missing_library_is_named(run, tmp_path, monkeypatch, capsys, name, to):
    monkeypatch.setitem(sys.modules, name, None)
    if name == "nncf":
        monkeypatch.setattr("kdlib.inference.export.openvino_model", lambda *_: None)
    data = ["--data", str(phantom_of(run))]
    assert main(["export", str(run), "--to", to, "-o", str(tmp_path / "out"), *data]) == 2
    assert capsys.readouterr().err.endswith(f"error: {name} is not installed: pip install -e .[deploy]\n")
    assert list(tmp_path.iterdir()) == []


def test_changed_weights_and_exports_of_exports_are_refused(run, tmp_path, capsys):
    words = ["export", str(tmp_path / "made"), "--to", "onnx", "-o", str(tmp_path / "out")]
    assert main(["export", str(run), "--to", "bundle", "-o", str(tmp_path / "made")]) == 0
    record = json.loads((tmp_path / "made" / "student.json").read_text())
    (tmp_path / "made" / "model.onnx").touch()
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    changed = record | {"format": "onnx", "files": {"model.onnx": digest}}
    (tmp_path / "made" / "student.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert main(words) == 2 and "is an export itself (onnx)" in capsys.readouterr().err
    (tmp_path / "made" / "student.json").write_text(json.dumps(record))
    with (tmp_path / "made" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert main(words) == 2 and "model.safetensors was changed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
