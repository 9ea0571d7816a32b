"""How well a model knows what it knows: predicted probabilities against observed frequencies."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor, nn

from kdlib.config import InputError
from kdlib.data.volumes import Bank
from kdlib.evaluation.masks import grown_box, predict_cases


def calibration(model: nn.Module, bank: Bank, bins: int = 15) -> pd.DataFrame:
    """How often a class is there where the model gives it a probability, for every case and class of the bank.

    Each class against the rest, on the pixels of the slices, in `bins` equal bins of probability ([low, high), the last
    closed). Background would fill the first bin and decide all else, so only a box counts: the true mask's bounding
    box (slices, rows, columns) grown on every side by a quarter of its length, at least by one pixel. It depends on the
    truth alone, so all models are measured on the same pixels and none is chosen by its answer; what a model finds far
    from the organ is not in it. A case without the class has no box, and a count of 0 throughout.

    Args:
        model: network with the bank's classes.
        bank: slices, of the test cases.

    Returns: a table with columns case, class, bin (from 0), confidence (mean probability in the bin), accuracy (share
        of its pixels that are the class) and count; the first two NaN in a bin without pixels.

    Raises: InputError: fewer than one bin.
    """
    if bins < 1:
        raise InputError(f"{bins} bins: give at least one, usually 15")
    tables = []
    for name in bank.cases:
        part = bank.select([name])
        scores = predict_cases(model, part)[name].cpu()
        for value, label in enumerate(bank.classes, start=1):
            truth = (part.volume(name)[1] == value).cpu()
            box = grown_box(truth.numpy())
            found = _binned(scores[value if len(scores) > 1 else 0][box], truth[box], bins)
            tables.append(found.assign(case=name, **{"class": label}))
    return pd.concat(tables, ignore_index=True)[["case", "class", "bin", "confidence", "accuracy", "count"]]


def _binned(scores: Tensor, truth: Tensor, bins: int) -> pd.DataFrame:
    """Columns bin, confidence, accuracy and count; in float64, as float32 would round the sums of large volumes."""
    scores, truth = scores.flatten().double(), truth.flatten().double()
    place = (scores * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights=weights, minlength=bins) for weights in (scores, truth)]
    confidence, accuracy = ((total / counts).numpy() for total in sums)  # 0 / 0 is NaN
    return pd.DataFrame(dict(bin=range(bins), confidence=confidence, accuracy=accuracy, count=counts.numpy()))
