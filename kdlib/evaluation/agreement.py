"""How far a student agrees with its teacher: gain is one thing, agreement another.

A student may gain without growing more like its teacher, and grow like it without gaining (Stanton et al. 2021,
arXiv 2106.05945), so tables of distilled students should stand beside the same tables of baselines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import nn

from kdlib.data.decathlon import Dataset
from kdlib.data.volumes import Bank
from kdlib.evaluation.cases import TOLERANCE
from kdlib.evaluation.masks import on_file_grid, predict_cases, surface_band, true_mask


def agreement(
    student: nn.Module, teacher: nn.Module, bank: Bank, dataset: Dataset, cases: Sequence[str],
    threshold: float = 0.5,
) -> pd.DataFrame:  # fmt: skip
    """How alike student and teacher segment each of `cases`, class by class, in the grid of the label files.

    `agreement` is the Dice of the student's and the teacher's mask, 1 where both are empty. `band_agreement` is the
    share of the voxels within 2 mm of the true surface (as `case_metrics` defines it: voxels of the mask with
    a face neighbour outside) where both decide alike, NaN where the truth is empty. `error_overlap` is the Dice of the
    student's wrong voxels and the teacher's, NaN where neither errs. Two good models agree because both are right:
    read the first two beside the Dice of both models, or look at the last.

    Args:
        student, teacher: networks with the bank's classes.
        bank: slices of at least these cases.
        dataset: where the label files and their spacing are.
        threshold: probability above which a voxel of one-channel models is foreground.

    Returns: a table with columns case, class, metric and value.

    Raises: InputError: a case that the bank or the data set does not hold.
    """
    rows = []
    for name in cases:  # one at a time: the probabilities of many classes fill the memory
        part, spacing = bank.select([name]), dataset.case(name).spacing
        scores = (predict_cases(model, part)[name] for model in (student, teacher))
        own, theirs = (on_file_grid(score, part, name, threshold) for score in scores)
        truth = true_mask(dataset, name, bank.classes)
        for value, label in enumerate(bank.classes, start=1):
            ours, other, true = (mask == value for mask in (own, theirs, truth))
            band, box = surface_band(true, spacing, TOLERANCE)
            found = {
                "agreement": _dice(ours, other, empty=1.0),
                "band_agreement": float((ours == other)[box][band].mean()) if band.any() else np.nan,
                "error_overlap": _dice(ours != true, other != true, empty=np.nan),
            }
            rows += [{"case": name, "class": label, "metric": key, "value": number} for key, number in found.items()]
    return pd.DataFrame(rows)


def _dice(a: np.ndarray, b: np.ndarray, empty: float) -> float:
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return float(2 * np.count_nonzero(a & b) / total) if total else empty
