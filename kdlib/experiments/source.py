"""What a run trains on: its data set, target classes, folds and slices."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from kdlib.config import Preprocessing, Run
from kdlib.data import Bank, Dataset, Fold, build_bank, check_view, index, make_phantom, split_file, splits
from kdlib.files import sha256, write_error


@dataclass(frozen=True)
class TrainingData:
    """A data set as a run sees it: cases, target classes and folds, all fixed before anything is trained."""

    dataset: Dataset
    classes: dict[str, int]
    folds: tuple[Fold, ...]
    digest: str


@functools.cache
def source(
    data: str, target: str, folds: int, on_defect: str, group: str, results: Path, preprocessing: Preprocessing
) -> TrainingData:
    """Indexes a folder (or makes the phantom), and reads or writes its splits under `results/splits/`."""
    try:
        folder = make_phantom(results / "data" / "phantom") if data == "phantom" else Path(data)
        dataset = index(folder, on_defect, group)
        classes = dataset.classes(target)
        dataset = check_view(dataset, classes, preprocessing)
        path = split_file(results / "splits", dataset, classes, folds)
        parts = splits(dataset, classes, folds, path)
    except OSError as error:
        raise write_error(results, error) from None
    return TrainingData(dataset, classes, parts, sha256(path))


@functools.lru_cache(maxsize=1)
def _bank(preprocessing: Preprocessing, *source_of: object) -> Bank:
    found = source(*source_of)
    return build_bank(found.dataset, found.classes, preprocessing)


def run_source(run: Run, results: Path | str) -> TrainingData:
    """The data, classes and folds of a run; read once per process."""
    return source(*_source_of(run, results))


def run_bank(run: Run, results: Path | str) -> Bank:
    """All slices or volumes of a run's data set; kept for the next cohort of the same process."""
    return _bank(run.preprocessing, *_source_of(run, results))


def training_part(run: Run, fold: Fold, bank: Bank) -> Bank:
    """What a run trains on: the patients whose labels it has; where its recipe has unlabelled images, also the others
    of the training part, without theirs."""
    labelled = fold.subset(run.fraction)
    if not run.recipe.unlabelled:
        return bank.select(labelled)
    return bank.select(fold.train).hide_labels(set(fold.train) - set(labelled))


def _source_of(run: Run, results: Path | str) -> tuple:
    # the profile's slices, also where the protocol keeps a fault of theirs: all runs of a study have the same cases
    asked = run.data, run.target, run.profile.folds, run.on_defect, run.group
    return *asked, Path(results).resolve(), run.profile.preprocessing
