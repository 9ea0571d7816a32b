"""Tables and example slices of a data set, as the data notebook shows them."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.orientations import io_orientation

from kdlib.data.decathlon import Dataset
from kdlib.data.slices import SliceBank
from kdlib.data.splits import Fold


def case_table(dataset: Dataset, classes: dict[str, int]) -> pd.DataFrame:
    """One row a case: patient, grid, spacing and thickness of axial slices in mm, volume of each target class in ml."""
    rows = []
    for case in dataset.cases:
        file = nib.load(case.label)
        label = np.asarray(file.dataobj).round()
        upwards = int(np.flatnonzero(io_orientation(file.affine)[:, 0] == 2)[0])
        ml = float(np.prod(case.spacing)) / 1000
        sizes = dict(zip(("x", "y", "z"), case.shape, strict=True))
        spacing = dict(zip(("dx (mm)", "dy (mm)", "dz (mm)"), case.spacing, strict=True))
        spacing["thickness (mm)"] = case.spacing[upwards]
        volumes = {f"{name} (ml)": float((label == value).sum()) * ml for name, value in classes.items()}
        rows.append({"case": case.name, "patient": case.group} | sizes | spacing | volumes)
    return pd.DataFrame(rows)


def split_table(folds: Sequence[Fold]) -> pd.DataFrame:
    """One row a fold: patients (and volumes) in the training part, its half, validation and test."""
    rows = []
    for number, fold in enumerate(folds):
        parts = {"train": fold.train, "train, half": fold.subset(0.5), "validation": fold.val, "test": fold.test}
        counts = {name: (len({fold.groups[case] for case in cases}), len(cases)) for name, cases in parts.items()}
        rows.append(
            {"fold": number} | {name: f"{patients} ({volumes})" for name, (patients, volumes) in counts.items()}
        )
    return pd.DataFrame(rows)


def largest_slices(bank: SliceBank, count: int = 12) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The slice with the most target of each of the first `count` cases: images, labels (uint8 NHW) and case names."""
    names, chosen = list(bank.cases[:count]), []
    area = (bank.labels > 0).sum((1, 2))
    for number in range(len(names)):
        own = (bank.case_index == number).nonzero()[:, 0]
        chosen.append(int(own[area[own].argmax()]))
    return bank.images[chosen].cpu().numpy(), bank.labels[chosen].cpu().numpy(), names
