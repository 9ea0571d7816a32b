"""A student in the formats of other libraries: ONNX, OpenVINO in float32 and int8, a MONAI bundle."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from kdlib.config import InputError, lookup
from kdlib.data import Dataset, DataWarning, build_bank, check_view, index, split_file, splits
from kdlib.evaluation.cases import case_metrics
from kdlib.evaluation.masks import true_mask
from kdlib.files import sha256, write_json, write_text
from kdlib.inference import FORMATS
from kdlib.inference.backends import Backend, library, load_network, openvino_backend, openvino_core
from kdlib.inference.card import licence_text, model_card
from kdlib.inference.predict import mask_of, segment
from kdlib.inference.scans import read_scan
from kdlib.inference.student import WEIGHTS, Student, check_replaceable, load_student, write_student
from kdlib.training.checkpoint import save_tensors

CALIBRATION = 300  # slices that ranges of activations are measured on, NNCF's default
LARGEST_COST = 0.002  # of mean Dice, that int8 may have


class Logits(nn.Module):
    """A network that gives its segmentation logits and nothing else."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images, reconstruct=False).segmentation


def export(folder: Path, to: str, out: Path, data: str | Path | None = None, overwrite: bool = False) -> Student:
    """Writes a student in another format, with its model card, as a folder that `kdlib predict` runs.

    Args:
        folder: of a student of format "torch", or of a finished run; see `find_student`.
        to: one of `FORMATS`.
        out: becomes the exported student's folder, whole or not at all.
        data: the data set that the student was trained on: int8 is calibrated on its training slices, and its Dice on
            the test cases becomes part of the card.
        overwrite: replace a student that is there.

    Returns:
        the exported student.

    Raises:
        InputError: an unknown format, a student that was exported before, a library that is not installed, int8
            without data or with other data than the student's; or what `load_student` and `write_student` raise.
    """
    lookup("format", to, dict.fromkeys(FORMATS))
    student = load_student(folder, data)
    if student.format != "torch":
        raise InputError(f"{folder} is an export itself ({student.format}): export the student or run that it is of")
    check_replaceable(out, overwrite)
    network = load_network(folder, student)
    model = openvino_model(network, student) if to.startswith("openvino") else None
    if to == "openvino-int8":
        student, model = _quantised(model, student, data)
    if to != "bundle":
        student = replace(student, format=to)

    def make(made: Path) -> None:
        if to == "bundle":
            _save_bundle(network, student, made)
        elif to == "onnx":
            save_onnx(network, student, made)
        else:  # in an int8 model few tensors are left in float32: halving them saves nothing
            library("openvino").save_model(model, made / "model.xml", compress_to_fp16=False)
        hashes = {name: sha256(made / name) for name in WEIGHTS[student.format]}
        write_text(made / "README.md", model_card(student, to, hashes))

    write_student(student, out, make, overwrite)
    return student


# ------------------------------------------------------------------------------------------------------------- formats


def save_onnx(network: nn.Module, student: Student, made: Path) -> None:
    """Writes `model.onnx`: `images` [B,3,H,W] -> `logits` [B,K,H,W], batch and size free, weights inside the file.

    Of volumes, `images` are patches [B,1,S,S,S] and only the batch is free: `kdlib predict` slides the window.
    """
    library("onnxscript")  # the exporter's; torch would name it in a trace
    shape, free = student.preprocessing.input_shape, torch.export.Dim.DYNAMIC
    axes = (0, 2, 3) if student.preprocessing.dimensions == 2 else (0,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch to its own authors
        program = torch.onnx.export(
            Logits(network), (torch.zeros(2, *shape),), dynamo=True, verbose=False,
            input_names=["images"], output_names=["logits"], dynamic_shapes=(dict.fromkeys(axes, free),),
        )  # fmt: skip
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with paths of this machine
    program.save(made / "model.onnx", external_data=False)


def openvino_model(network: nn.Module, student: Student):
    """The network as an `openvino.Model`, in float32; OpenVINO itself reads ONNX, and reports to nobody."""
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(network, student, Path(folder))
        return openvino_core().read_model(Path(folder) / "model.onnx")


def _quantised(model, student: Student, data: str | Path | None) -> tuple[Student, object]:
    """The int8 model, and the student whose facts hold the Dice that it has on the test cases."""
    if data is None:
        raise InputError(f"int8 is calibrated on training slices: give --data, the folder of {_name(student)}")
    dataset = training_data(student, data)
    quantised = quantise(model, calibration_slices(student, dataset))
    dice = dice_by_case(student, openvino_backend(quantised), dataset)
    student = replace(student, facts=student.facts | {"dice_int8": dice})
    cost = mean_dice(student.facts["dice"]) - mean_dice(dice)
    if cost > LARGEST_COST:
        text = f"int8 costs {cost:.4f} of the mean Dice on the test cases; kdlib.inference.finetune says what helps"
        warnings.warn(f"{student.name}: {text}", DataWarning, stacklevel=3)
    return student, quantised


def quantise(model, images: list[Tensor]):
    """An `openvino.Model` in int8, by NNCF's post-training quantisation (min-max ranges, bias correction).

    Args:
        images: slices [1,3,H,W], or patches [1,1,S,S,S], that the ranges of activations are measured on.
    """
    os.environ.setdefault("NNCF_CI", "1")  # it reports its use to its authors otherwise
    nncf = library("nncf")
    nncf.set_log_level(40)
    return nncf.quantize(model, nncf.Dataset([image.numpy() for image in images]), subset_size=len(images))


# ---------------------------------------------------------------------------------------------------------------- data


def training_data(student: Student, data: str | Path) -> Dataset:
    """The data set that a student was trained on, after a look at the hash of its files and folds.

    Raises:
        InputError: it is another, or the student's folder does not say which it was.
    """
    if not (split := student.facts.get("split")):
        raise InputError(f"{student.name} does not say which cases it was trained on: export it from its run")
    other = InputError(f"{data} is not the data set that {student.name} was trained on: give that of {_name(student)}")
    dataset = index(Path(data), split["on_defect"], split["group"])
    if set(student.classes) - dataset.labels.keys():
        raise other
    classes = {name: dataset.labels[name] for name in student.classes}
    dataset = check_view(dataset, classes, replace(student.preprocessing, published=False))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the training has said them
        path = split_file(Path(folder), dataset, classes, split["folds"])
        splits(dataset, classes, split["folds"], path)
        if sha256(path) != split["digest"]:
            raise other
    return dataset


def calibration_slices(student: Student, dataset: Dataset, count: int = CALIBRATION) -> list[Tensor]:
    """Slices [1,3,H,W] (or patches [1,1,S,S,S]) of the student's own training cases, drawn with a fixed seed; no other
    case is read."""
    cases = tuple(dataset.case(name) for name in student.facts["split"]["train"])
    classes = {name: dataset.labels[name] for name in student.classes}
    bank = build_bank(replace(dataset, cases=cases), classes, student.preprocessing)
    drawn = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:count]
    return list(bank.batch(drawn)[0].split(1))


def dice_by_case(student: Student, backend: Backend, dataset: Dataset) -> dict[str, dict[str, float]]:
    """Test case -> class -> Dice on the scan's own grid."""
    found = {}
    for name in student.facts["dice"]:
        scan = read_scan(dataset.case(name).image)
        mask = mask_of(segment(student, backend, scan), student, scan).get_fdata()
        table = case_metrics(
            mask, true_mask(dataset, name, student.classes), student.classes, dataset.case(name).spacing
        )
        rows = table[table["metric"] == "dice"]
        found[name] = dict(zip(rows["class"], rows["value"], strict=True))
    return found


def mean_dice(dice: dict[str, dict[str, float]]) -> float:
    """Mean over cases and classes."""
    values = [value for each in dice.values() for value in each.values()]
    return sum(values) / len(values)


def _name(student: Student) -> str:
    return student.facts.get("data_set") or "its training"


# -------------------------------------------------------------------------------------------------------------- bundle


def _save_bundle(network: nn.Module, student: Student, made: Path) -> None:
    """Adds to a student's folder what makes it a MONAI bundle: it is run by kdlib, with the student's preprocessing."""
    save_tensors(network.state_dict(), made / "model.safetensors")
    write_text(made / "LICENSE", licence_text(student))
    for name, record in (("metadata", _metadata(student)), ("inference", INFERENCE)):
        write_json(made / "configs" / f"{name}.json", record)


INFERENCE = {
    "imports": [
        "$import sys",
        "$from pathlib import Path",
        "$from kdlib.apps.cli import main",
        "$from kdlib.inference.backends import load_network",
        "$from kdlib.inference.student import load_student",
    ],
    "bundle_root": ".",
    "dataset_dir": "$@bundle_root + '/scans'",
    "output_dir": "$@bundle_root + '/masks'",
    "device": "auto",
    "student": "$load_student(Path(@bundle_root))",
    "network": "$load_network(Path(@bundle_root), @student)",
    "run": ["$main(['predict', @bundle_root, @dataset_dir, '-o', @output_dir, '--device', @device]) and sys.exit(1)"],
}


def _metadata(student: Student) -> dict:
    """metadata.json by MONAI's schema."""
    channels, (planes, *sides) = len(student.classes) + (len(student.classes) > 1), student.preprocessing.input_shape
    patch = student.preprocessing.dimensions == 3
    names = student.classes if channels == 1 else ("background", *student.classes)
    image = {"type": "image", "format": "magnitude" if student.modality == "MR" else "hounsfield", "dtype": "float32",
             "modality": student.modality, "num_channels": planes, "spatial_shape": sides, "value_range": [0, 1],
             "is_patch_data": patch,
             "channel_def": {str(i): "image" if patch else "slice" for i in range(planes)}}  # fmt: skip
    logits = {"type": "image", "format": "segmentation", "dtype": "float32", "num_channels": channels,
              "spatial_shape": sides, "value_range": [], "is_patch_data": patch,
              "channel_def": {str(i): name for i, name in enumerate(names)}}  # fmt: skip
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
        "meta_schema_20240725.json",
        "version": version("kdlib"),
        "changelog": {version("kdlib"): "exported by kdlib"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in ("kdlib", "nibabel", "safetensors")},
        "supported_apps": {},
        "name": student.name,
        "task": f"segmentation of {', '.join(student.classes)} in {student.modality}",
        "description": f"{student.model} of the kdlib study, trained on {_name(student)}",
        "authors": "the authors of kdlib",
        "copyright": "see LICENSE",
        "data_source": _name(student),
        "data_type": "nifti or dicom",
        "eval_metrics": {"mean_dice": mean_dice(student.facts["dice"])} if student.facts.get("dice") else {},
        "intended_use": "research, not clinical use",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": logits}},
    }
