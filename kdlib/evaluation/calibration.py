"""How well a model knows what it knows: predicted probabilities against observed frequencies."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import binned_statistic
from torch import nn

from kdlib.config import InputError
from kdlib.data.volumes import Bank
from kdlib.evaluation.masks import grown_box, predict_cases

BINS = 15  # of probability


def calibration(model: nn.Module, bank: Bank) -> pd.DataFrame:
    """How often a class is there where the model gives it a probability, for every case and class of the bank.

    Each class against the rest, on the pixels of the slices, in 15 equal bins of probability ([low, high), the last
    closed). Background would fill the first bin and decide all else, so only a box counts: the true mask's bounding
    box (slices, rows, columns) grown on every side by a quarter of its length, at least by one pixel. It depends on the
    truth alone, so all models are measured on the same pixels and none is chosen by its answer; what a model finds far
    from the organ is not in it. A case without the class has no box, and a count of 0 throughout.

    Args:
        model: network with the bank's classes.
        bank: slices, of the test cases.

    Returns: a table with columns case, class, bin (from 0), confidence (mean probability in the bin), accuracy (share
        of its pixels that are the class) and count; confidence and accuracy are NaN in a bin without pixels.
    """
    tables = []
    for name in bank.cases:
        part = bank.select([name])
        scores = predict_cases(model, part)[name].cpu()
        for value, label in enumerate(bank.classes, start=1):
            truth = (part.volume(name)[1] == value).cpu()
            box = grown_box(truth.numpy())
            said, seen = (x[box].flatten().double().numpy() for x in (scores[value if len(scores) > 1 else 0], truth))
            if not np.isfinite(said).all():
                raise InputError(f"{name}: the network's probabilities are not all finite, so it has no calibration")
            (confidence, accuracy), _, place = binned_statistic(said, [said, seen], "mean", BINS, (0, 1))
            count = np.bincount(place - 1, minlength=BINS)
            found = dict(bin=range(BINS), confidence=confidence, accuracy=accuracy, count=count)
            tables.append(pd.DataFrame(found).assign(case=name, **{"class": label}))
    return pd.concat(tables, ignore_index=True)[["case", "class", "bin", "confidence", "accuracy", "count"]]
