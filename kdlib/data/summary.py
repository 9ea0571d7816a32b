"""Tables and example slices of a data set, as the data notebook shows them."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from nibabel.orientations import io_orientation

from kdlib.config import Preprocessing
from kdlib.data.decathlon import Dataset
from kdlib.data.roundtrip import best_dice, target_in_view
from kdlib.data.slices import read_case_file
from kdlib.data.splits import Fold, split_warnings
from kdlib.data.volumes import Bank


def case_table(dataset: Dataset, classes: dict[str, int], preprocessing: Preprocessing | None = None) -> pd.DataFrame:
    """One row per case.

    Columns: case, patient and how patients were recognised, grid, spacing and thickness of axial slices in mm, and for
    each target class its volume in ml. With a `preprocessing` also, for each class, of CT its mean intensity (HU: how
    strongly contrast medium enhances it; MR has no unit), the share (%) that lies inside the slices and the Dice that a
    perfect network would reach on the file's grid; NaN where a case lacks the class.
    """
    rows = []
    for case in dataset.cases:
        upwards = int(np.flatnonzero(io_orientation(nib.load(case.label).affine)[:, 0] == 2)[0])
        ml = float(np.prod(case.spacing)) / 1000
        row = {"case": case.name, "patient": case.group, "patients from": dataset.grouping}
        row |= dict(zip(("x", "y", "z"), case.shape, strict=True))
        row |= dict(zip(("dx (mm)", "dy (mm)", "dz (mm)"), case.spacing, strict=True))
        row["thickness (mm)"] = case.spacing[upwards]
        row |= {f"{name} (ml)": case.voxels.get(value, 0) * ml for name, value in classes.items()}
        if preprocessing is not None:
            kept = target_in_view(case, classes, preprocessing)
            dice = best_dice(dataset, case, classes, preprocessing)
            if dataset.modality == "CT":
                (_, image), (_, label) = read_case_file(case.image, np.float32), read_case_file(case.label, np.int64)
                means = pd.Series(image.ravel()).groupby(label.ravel()).mean()
                row |= {f"{name} mean intensity": means.get(value, np.nan) for name, value in classes.items()}
            row |= {f"{name} in slices (%)": 100 * kept.get(name, np.nan) for name in classes}
            row |= {f"{name} best Dice": dice.get(name, np.nan) for name in classes}
        rows.append(row)
    return pd.DataFrame(rows)


def warning_table(dataset: Dataset, folds: Sequence[Fold] = (), classes: dict[str, int] | None = None) -> pd.DataFrame:
    """What is odd about a data set and its folds but used: columns case, file, warning, remedy."""
    found = [dataset.warnings, split_warnings(folds, dataset, classes or {})]
    return pd.concat([table for table in found if len(table)] or found[:1], ignore_index=True)


def split_table(folds: Sequence[Fold]) -> pd.DataFrame:
    """One row per fold: patients (and volumes) in the training part, its half, validation and test."""
    rows = []
    for number, fold in enumerate(folds):
        half = fold.subset(0.5) if len({fold.groups[case] for case in fold.train}) > 1 else ()
        parts = {"train": fold.train, "train, half": half, "validation": fold.val, "test": fold.test}
        counts = {name: (len({fold.groups[case] for case in cases}), len(cases)) for name, cases in parts.items()}
        rows.append({"fold": number} | {name: "{} ({})".format(*found) for name, found in counts.items()})
    return pd.DataFrame(rows)


def largest_slice(labels: torch.Tensor, size: int) -> tuple[int | slice, ...]:
    """Where in [D,H,W] the slice with the most target is, cut to a window of `size` about the target's middle."""
    area = (labels > 0).sum((1, 2))
    number = int(area.argmax())
    seen, place = (labels[number] > 0).nonzero().double(), [number]
    for axis, side in enumerate(labels.shape[1:]):
        middle = seen[:, axis].mean().item() if len(seen) else side / 2
        first = min(max(round(middle - size / 2), 0), side - size)
        place.append(slice(first, first + size))
    return tuple(place)


def largest_slices(bank: Bank, count: int = 12) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The slice with the most target of each of the first `count` cases: images, labels (uint8 NHW) and case names."""
    names, cut = list(bank.cases[:count]), []
    for name in names:
        image, labels = bank.volume(name)
        place = largest_slice(labels, bank.geometry[name].size)
        cut.append((image[place].cpu().numpy(), labels[place].cpu().numpy()))
    return *map(np.stack, zip(*cut, strict=True)), names
