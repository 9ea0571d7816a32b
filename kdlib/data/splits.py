"""Who is trained on, who selects, who is tested: folds by patient, written once with the hash of every file."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.config import InputError
from kdlib.data.decathlon import WARNING_COLUMNS, Case, Dataset, DataWarning
from kdlib.data.nifti import read_again
from kdlib.files import sha256, write_text

FORMAT = 1
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Fold:
    """One outer fold; no patient is in two of its parts.

    Args:
        train: case names, patient by patient, so ordered that each label fraction is a prefix and spans the covariate.
        val: case names that choose the checkpoint.
        test: case names for the final numbers; every patient is in the test part of exactly one fold.
        groups: case name -> patient.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    groups: dict[str, str]

    def subset(self, fraction: float) -> tuple[str, ...]:
        """Training cases of the first `round(fraction * n)` patients; a smaller fraction lies in a larger one.

        Raises: InputError for a fraction outside (0, 1], or one that leaves no patient.
        """
        patients = list(dict.fromkeys(self.groups[case] for case in self.train))
        if not 0 < fraction <= 1 or not (count := round(fraction * len(patients))):
            asked = f"label fraction {fraction} of {len(patients)} training patients is no patient"
            raise InputError(f"{asked}; choose from {1 / len(patients):.2g} to 1")
        kept = set(patients[:count])
        return tuple(case for case in self.train if self.groups[case] in kept)


def split_file(folder: Path, dataset: Dataset, classes: dict[str, int], folds: int) -> Path:
    """Where the split of these classes lies: in `folder`, whatever the data set and its labels are called."""
    name = re.sub(r'[\\/:*?"<>| ]', "_", "-".join([dataset.name, *classes, str(folds)]).lower())
    if len(name.encode()) > 200:
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return folder / f"{name}.json"


def splits(dataset: Dataset, classes: dict[str, int], folds: int, path: Path, seed: int = 0) -> tuple[Fold, ...]:
    """Split the patients of a data set into `folds` test parts, with a validation part (20 %) in each rest.

    The parts are stratified by what makes a patient hard: in CT the mean HU inside the target (contrast phase), in MR,
    whose intensities cannot be compared, the target's volume in ml.

    Args:
        dataset: as indexed.
        classes: names -> values of the target.
        folds: number of outer folds.
        path: JSON file, written at the first call and from then on read.
        seed: of all random choices.

    Raises: InputError for too few patients, for a file that cannot be read, or that was made from other data.
    """
    asked = {"dataset": dataset.name, "classes": classes, "folds": folds, "seed": seed}
    if path.exists():
        record = _read(path)
        if changes := _changes(record, asked, dataset):
            remedy = "restore that, or use another results folder (or delete the file) if you mean to start anew"
            raise InputError(f"{path}: the split was made from something else: {'; '.join(changes)}; {remedy}")
    else:
        cases = {case.name: _describe(case, classes, dataset.modality) for case in dataset.cases}
        parts = {"stratified by": _covariate(dataset.modality), "parts": _stratify(cases, folds, seed)}
        record = {"format": FORMAT, **asked, **parts, "cases": cases}
        write_text(path, json.dumps(record, indent=1, ensure_ascii=False))
    groups = {name: entry["patient"] for name, entry in record["cases"].items()}
    found = tuple(Fold(*(tuple(fold[part]) for part in PARTS), groups) for fold in record["parts"])
    for text in split_warnings(found, dataset, classes)["warning"]:
        warnings.warn(f"{dataset.root}: {text}", DataWarning, stacklevel=2)
    return found


def split_warnings(folds: Sequence[Fold], dataset: Dataset, classes: dict[str, int]) -> pd.DataFrame:
    """What the parts of each fold lack, in the columns of `Dataset.warnings`, one row per part.

    A class that no case has is not repeated here.
    """
    held = {case.name: {name for name, value in classes.items() if value in case.voxels} for case in dataset.cases}
    occurring = set().union(*held.values())
    rows = []
    for number, fold in enumerate(folds):
        parts = {"train": fold.train, "validation": fold.val, "test": fold.test}
        if len({fold.groups[case] for case in fold.train}) > 1:  # of one patient there is no half
            parts["half of train"] = fold.subset(0.5)
        for part, cases in parts.items():
            if missing := occurring - set().union(*(held[case] for case in cases)):
                names = ", ".join(name for name in classes if name in missing)
                text = (
                    f"fold {number}: no case of the {part} part holds {'the target' if missing == occurring else names}"
                )
                rows.append(("", "", text, "use fewer folds, or add patients who have it"))
    return pd.DataFrame(rows, columns=WARNING_COLUMNS)


def _covariate(modality: str) -> str:
    """What the parts are stratified by; so a split's record also says which modality it was made of."""
    return "mean intensity in the target (HU)" if modality == "CT" else "volume of the target (ml)"


def _describe(case: Case, classes: dict[str, int], modality: str) -> dict:
    """Patient, hashes and covariate of a case."""
    target = np.isin(np.asanyarray(read_again(case.label).dataobj), list(classes.values()))
    if modality == "MR":
        covariate = np.count_nonzero(target) * float(np.prod(case.spacing)) / 1000
    elif target.any():
        stored = read_again(case.image).dataobj
        covariate = float(stored.get_unscaled()[target].mean(dtype=np.float64) * stored.slope + stored.inter)
    else:
        covariate = None
    return {"patient": case.group, "covariate": covariate, "image": sha256(case.image), "label": sha256(case.label)}


def _stratify(cases: dict[str, dict], folds: int, seed: int) -> list[dict[str, list[str]]]:
    """Train, val and test case names of each fold."""
    table = pd.DataFrame(cases).T.astype({"covariate": float}).sort_index()
    # patients from the lowest to the highest covariate, without one last; ties by name, so that file order is nothing
    ranked = table.groupby("patient")["covariate"].mean().sort_values(kind="stable").index.to_numpy()
    count = len(ranked)
    if not _can_split(count, folds):
        possible = next((fewer for fewer in range(min(folds, count), 1, -1) if _can_split(count, fewer)), None)
        advice = f"use fewer folds: CHANGES='{json.dumps({'folds': possible})}', or add patients" if possible else ""
        if folds < 2 and count > 2:
            advice = f"choose from 2 to {count} folds: CHANGES='{json.dumps({'folds': min(count, 4)})}'"
        asked = (
            f"{count} patients cannot be split into {folds} folds with training, validation and test patients in each"
        )
        raise InputError(f"{asked}; {advice or 'add patients, at least 3 are needed'}")
    rng = np.random.default_rng(seed)
    # each block of `folds` neighbours gives one patient to each fold; an incomplete block lies mid-rank, so that the
    # unusual patients, at both ends, are parted
    ranks = np.arange(count)
    blocks = (ranks + -count % folds * (ranks >= count // folds // 2 * folds)) // folds
    fold_of = np.concatenate([rng.permutation(folds)[: np.sum(blocks == block)] for block in np.unique(blocks)])
    members = table.groupby("patient").groups

    parts = []
    for fold in range(folds):
        rest = ranked[fold_of != fold]
        val = [rng.choice(block) for block in np.array_split(rest, max(1, round(len(rest) / 5)))]
        train = _spread([patient for patient in rest if patient not in val], rng)
        chosen = {"train": train, "val": sorted(val), "test": sorted(ranked[fold_of == fold])}
        parts.append({part: [case for patient in who for case in members[patient]] for part, who in chosen.items()})
    return parts


def _can_split(patients: int, folds: int) -> bool:
    """Whether each fold gets a test patient, and its rest at least two patients."""
    return 2 <= folds <= patients and patients - -(-patients // folds) >= 2


def _spread(ranked: list[str], rng: np.random.Generator) -> list[str]:
    """Random order whose every prefix spans the ranks: one of each two neighbours first, then the others."""
    if len(ranked) < 2:
        return ranked
    first = [ranked[i + rng.integers(2)] for i in range(0, len(ranked) - 1, 2)]
    return _spread(first, rng) + _spread([patient for patient in ranked if patient not in first], rng)


def _read(path: Path) -> dict:
    remedy = "restore the file, or delete it if you mean to start anew"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] > FORMAT:
            raise InputError(f"{path}: written by a newer version (format {record['format']}); update kdlib")
        names = sorted(record["cases"])
        for fold in record["parts"]:
            patients = [{record["cases"][case]["patient"] for case in fold[part]} for part in PARTS]
            whole = sorted(fold["train"] + fold["val"] + fold["test"]) == names
            if not whole or sum(map(len, patients)) != len(set.union(*patients)):
                raise InputError(f"{path}: a fold lacks a case, or has a patient in two parts; {remedy}")
        tested = sorted(case for fold in record["parts"] for case in fold["test"])
        if tested != names or len(record["parts"]) != record["folds"]:
            raise InputError(f"{path}: a fold is missing, or a case is tested twice; {remedy}")
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: not a whole record of a split; {remedy}") from None
    return record


def _changes(record: dict, asked: dict, dataset: Dataset) -> list[str]:
    """What differs between a stored split and the present request and files, in words."""
    changes = [f"{key} {record.get(key)} -> {value}" for key, value in asked.items() if record.get(key) != value]
    if record.get("stratified by") != _covariate(dataset.modality):
        changes.append(f"another modality than {dataset.modality}")
    stored, present = record["cases"], {case.name: case for case in dataset.cases}
    different = {"added": present.keys() - stored, "removed": stored.keys() - present}
    shared = [(stored[name], present[name]) for name in stored.keys() & present]
    different["of another patient"] = {case.name for old, case in shared if old["patient"] != case.group}
    for part in ("image", "label"):
        different[f"with another {part}"] = {
            case.name for old, case in shared if old.get(part) != sha256(getattr(case, part))
        }
    return changes + [f"cases {how}: {', '.join(sorted(names))}" for how, names in different.items() if names]
