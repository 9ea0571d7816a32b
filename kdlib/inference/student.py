"""A student's folder: `student.json`, which says all that inference needs, beside the weights.

    model.safetensors | model.onnx | model.xml and model.bin

A finished run's folder (`results/runs/<key>/`) serves as a student, too: what `student.json` would say is read off its
manifest and metrics.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from kdlib.config import InputError, Preprocessing, Run, from_json, lookup, structure
from kdlib.data import index
from kdlib.data.grouping import shorten
from kdlib.data.slices import read_case_file
from kdlib.files import read_csv, sha256, write_folder, write_json
from kdlib.models import MODELS
from kdlib.record import read_manifest, verified
from kdlib.strict import Positive, check_fields

RELEASED = Path(__file__).resolve().parents[2] / "results" / "students"
WEIGHTS = {  # format -> files that hold the network
    "torch": ("model.safetensors",),
    "onnx": ("model.onnx",),
    "openvino": ("model.xml", "model.bin"),
    "openvino-int8": ("model.xml", "model.bin"),
}


@dataclass(frozen=True)
class Student:
    """What inference needs of a trained network, but for its weights.

    Args:
        name: for people.
        model: a key of `kdlib.models.MODELS`.
        width: factor on a teacher's channels; students keep theirs.
        classes: names of the foreground classes; the mask's values 1..C in this order.
        modality: "CT" (intensities in HU) or "MR".
        preprocessing: how a volume becomes slices, or patches.
        precision: that PyTorch computes it in; see `kdlib.config.Optimisation`.
        threshold: probability above which a voxel is foreground, of one class.
        format: which library runs it; a key of `WEIGHTS`.
        facts: where it comes from (JSON values): data_set, run, method, teacher, fold, seed, training_cases, dice
            (test case -> class -> Dice), patients (test case -> patient), commit; split (its hash, number of folds,
            the names of the training cases, and how the data set was read); where the data set was at hand also
            training_patients, licence, attribution and negative (least and largest share of negative voxels in a
            training scan); of int8 also dice_int8 (test case -> class -> Dice).
        files: name -> sha256 of the files that run it; filled in by `write_student`.
    """

    name: str
    model: str
    width: Positive
    classes: tuple[str, ...]
    modality: Literal["CT", "MR"]
    preprocessing: Preprocessing
    threshold: float = 0.5
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    format: Literal["torch", "onnx", "openvino", "openvino-int8"] = "torch"
    facts: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)

    def __post_init__(self):
        check_fields(self)
        lookup("model", self.model, MODELS)
        if not self.classes:
            raise InputError(f"student {self.name!r} has no class")


# ------------------------------------------------------------------------------------------------------------- finding


def find_student(reference: str | Path, results: str | Path = "results") -> Path:
    """The folder of a student, or of a finished run.

    Args:
        reference: such a folder, a file in it, a run's key in `<results>/runs/`, or the name of a student in
            `<results>/students/` or among those released with the code.
        results: folder that trained runs are kept in.

    Raises:
        InputError: nothing fits; lists what there is.
    """
    results, path = Path(results), Path(os.path.expanduser(reference))
    places = [path.parent if os.path.isfile(path) else path]  # Path.is_file raises where a name is too long
    if path.name == str(reference):
        places += [folder / path.name for folder in (results / "runs", results / "students", RELEASED)]
    for folder in places:
        if any(os.path.isfile(folder / name) for name in ("student.json", "manifest.json")):
            return folder
    released = sorted(
        {file.parent.name for at in (results / "students", RELEASED) for file in at.glob("*/student.json")}
    )
    runs = sorted(file.parent.name for file in (results / "runs").glob("*/best.safetensors"))
    shown = shorten(runs, 8)
    raise InputError(
        f"student {str(reference)!r} does not exist: give the folder of a student, a released one "
        f"({', '.join(released) or 'none'}), or the key of a run in {results / 'runs'} ({shown or 'none'})"
    )


# ------------------------------------------------------------------------------------------------- reading and writing


def load_student(folder: Path, data: str | Path | None = None) -> Student:
    """The student in a folder that `find_student` found, its files checked; see `student_of_run` for `data`.

    Raises:
        InputError: a file is missing, damaged, or was changed; a run that is not finished.
    """
    path = folder / "student.json"
    if not path.is_file():
        return student_of_run(folder, data)
    try:
        student = structure(json.loads(path.read_text(encoding="utf-8")), Student)
    except InputError as error:
        raise InputError(f"{path}: {str(error).removesuffix(' @ student')}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): copy or export the student again") from None
    for name in WEIGHTS[student.format]:
        file = folder / name
        if not file.is_file():
            raise InputError(f"{file} is missing: copy the student's whole folder, or export it again")
        if sha256(file) != student.files.get(name):
            raise InputError(f"{file} was changed (its hash is not that in student.json): copy or export it again")
    return student


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raises: InputError: there is a folder, and not one of a student that may be replaced."""
    if folder.exists() and not (overwrite and (folder / "student.json").is_file()):
        what = "give --overwrite to replace it" if (folder / "student.json").is_file() else "choose another folder"
        raise InputError(f"{folder} exists: {what}")


def write_student(student: Student, folder: Path, make: Callable[[Path], object], overwrite: bool = False) -> None:
    """Writes a student's folder whole or not at all.

    Args:
        folder: becomes the student's.
        make: is given an empty folder and writes the files of the student's format there, and what else belongs there.
        overwrite: replace a student that is there.

    Raises:
        InputError: the folder exists, or cannot be written.
    """
    check_replaceable(folder, overwrite)

    def fill(partial: Path) -> None:
        make(partial)
        files = {name: sha256(partial / name) for name in WEIGHTS[student.format]}
        write_json(partial / "student.json", dataclasses.asdict(dataclasses.replace(student, files=files)))

    write_folder(folder, fill, overwrite)


# ---------------------------------------------------------------------------------------------------------------- runs


def student_of_run(folder: Path, data: str | Path | None = None) -> Student:
    """The student that a finished run's folder holds, `best.safetensors` its weights.

    Args:
        data: the data set that it was trained on: adds to its facts what the run's folder does not hold, and says the
            modality where the run is of a version that did not record it.

    Raises:
        InputError: the run is not finished; a file of it was changed; another data set; an unknown modality.
    """
    record = read_manifest(folder)
    if record.get("status") != "done":
        raise InputError(f"{folder} holds no finished run: train it first")
    run = from_json(record["run"])
    metrics = read_csv(verified(folder / "metrics.csv"))
    dice = metrics[metrics["metric"] == "dice"]
    facts = {
        "data_set": run.data, "run": record["key"], "method": run.method, "teacher": run.teacher or "",
        "fold": run.fold, "seed": run.seed, "training_cases": len(record["data"]["train"]),
        "dice": {case: dict(zip(rows["class"], rows["value"], strict=True)) for case, rows in dice.groupby("case")},
        "patients": dict(zip(dice["case"], dice["patient"], strict=True)),
        "split": {"digest": record["data"]["digest"], "folds": run.profile.folds, "on_defect": run.on_defect,
                  "group": run.group, "train": record["data"]["train"]},
        "commit": record["git"]["commit"] or "",
    }  # fmt: skip
    modality = record["data"].get("modality")
    if data is not None:
        modality, known = _of_data_set(run, data, record["data"]["train"])
        facts |= known
    if modality is None:
        raise InputError(f"{folder}: a run of an older version, which did not say CT or MR: give its data set (--data)")
    return Student(
        name=f"{run.data}-{run.model}-{record['key'][:8]}".lower(),
        model=run.model,
        width=run.profile.width,
        classes=tuple(dice["class"].unique()),
        modality=modality,
        preprocessing=run.preprocessing,
        threshold=run.threshold,
        precision=run.optimisation.precision,
        facts=facts,
    )


def _of_data_set(run: Run, data: str | Path, train: list[str]) -> tuple[str, dict[str, object]]:
    """Modality and further facts of a run, read off the data set itself."""
    dataset = index(data, "drop", run.group)
    cases = [case for case in dataset.cases if case.name in train]
    if len(cases) < len(train) or dataset.name != run.data:
        raise InputError(f"{data} is not the data set of that run: give that of {run.data}, which holds {train[0]}")
    licence, attribution = dataset.credit
    negative = [float(np.mean(read_case_file(case.image, np.float32)[1] < 0)) for case in cases]
    return dataset.modality, {
        "training_patients": len({case.group for case in cases}), "licence": licence, "attribution": attribution,
        "negative": [min(negative), max(negative)],
    }  # fmt: skip
