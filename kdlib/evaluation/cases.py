"""Volumes in, metrics of every case out: in the label file's own grid, in mm and ml."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from kdlib.config import InputError
from kdlib.data.decathlon import Dataset
from kdlib.data.summary import largest_slice
from kdlib.data.volumes import Bank
from kdlib.evaluation.masks import bounding_box, on_file_grid, predict_cases, true_mask
from kdlib.losses import most_probable
from kdlib.metrics import METRICS

TOLERANCE = 2.0  # mm that a surface may be off and still count as right (NSD)


def case_metrics(
    prediction: np.ndarray, truth: np.ndarray, classes: Sequence[str], spacing: Sequence[float]
) -> pd.DataFrame:
    """Every metric of every class of one volume.

    Overlap: dice, iou, recall and precision of voxels, 0 to 1. Surfaces are the voxels of a mask with a face neighbour
    outside it, distances run between voxel centres in mm, all as MONAI defines them: `hd95` is the larger of the two
    directed 95th percentiles, `assd` the mean over both surfaces' voxels taken together, `nsd` (surface Dice,
    arXiv 1809.04430, counted in voxels) the part of both surfaces within 2 mm of the other. `volume_error` is
    prediction minus truth and `truth_volume` the truth's volume, in ml.

    | empty           | dice, iou, nsd | recall | precision | hd95, assd             |
    |-----------------|----------------|--------|-----------|------------------------|
    | both            | 1              | 1      | 1         | 0                      |
    | truth only      | 0              | NaN    | 0         | the volume's diagonal  |
    | prediction only | 0              | 0      | NaN       | the volume's diagonal  |

    NaN stands for a ratio that is undefined; the diagonal, longer than any distance within the volume, keeps a missed
    organ from dropping out of the mean.

    Args:
        prediction, truth: XYZ class indices, 0 background, 1..C the position in `classes`.
        classes: names of the foreground classes.
        spacing: mm of a voxel along X, Y and Z.

    Returns: a table with columns class, metric (the names in `METRICS`) and value.

    Raises: InputError: shapes differ, or a label lies outside 0..C.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise InputError(f"prediction has shape {prediction.shape} and truth {truth.shape}: give both in the same grid")
    for name, labels in (("prediction", prediction), ("truth", truth)):
        if labels.min() < 0 or labels.max() > len(classes):
            found = f"{labels.min()} to {labels.max()}"
            raise InputError(f"{name} has labels {found}: {len(classes)} classes allow 0 to {len(classes)}")
    spacing = [float(side) for side in spacing]
    rows = []
    for value, name in enumerate(classes, start=1):
        metrics = _mask_metrics(prediction == value, truth == value, spacing)
        rows += [{"class": name, "metric": metric, "value": metrics[metric]} for metric in METRICS]
    return pd.DataFrame(rows)


def _mask_metrics(prediction: np.ndarray, truth: np.ndarray, spacing: list[float]) -> dict[str, float]:
    """The metrics of two boolean XYZ masks; see `case_metrics`."""
    from monai.metrics import compute_confusion_matrix_metric, get_confusion_matrix  # slow to import
    from monai.metrics.utils import get_edge_surface_distance

    ml = float(np.prod(spacing)) / 1000
    predicted, true = np.count_nonzero(prediction), np.count_nonzero(truth)
    volumes = {"volume_error": (predicted - true) * ml, "truth_volume": true * ml}
    if not predicted and not true:
        return dict(dice=1.0, iou=1.0, recall=1.0, precision=1.0, nsd=1.0, hd95=0.0, assd=0.0) | volumes
    # every voxel of either mask lies in the box, so a crop to it changes no metric and saves most of the time
    box = bounding_box(prediction | truth)
    pair = [torch.from_numpy(mask[box]) for mask in (prediction, truth)]
    counts = get_confusion_matrix(*(mask[None, None].to(torch.uint8) for mask in pair))
    names = {"dice": "f1 score", "iou": "threat score", "recall": "recall", "precision": "precision"}
    overlap = {ours: float(compute_confusion_matrix_metric(theirs, counts)) for ours, theirs in names.items()}
    if not predicted or not true:
        diagonal = float(np.linalg.norm(np.multiply(prediction.shape, spacing)))
        return overlap | dict(nsd=0.0, hd95=diagonal, assd=diagonal) | volumes
    with warnings.catch_warnings():  # MONAI 1.6 calls itself with an argument that it deprecates
        warnings.simplefilter("ignore", FutureWarning)
        directed = get_edge_surface_distance(*pair, spacing=spacing, symmetric=True)[1]
    both = np.concatenate(directed)
    surface = dict(
        hd95=float(max(np.quantile(distances, 0.95) for distances in directed)),
        assd=float(both.mean(dtype=np.float64)),
        nsd=float((both <= TOLERANCE).mean()),
    )
    return overlap | surface | volumes


def evaluate(
    model: nn.Module, bank: Bank, dataset: Dataset, cases: Sequence[str], threshold: float = 0.5
) -> tuple[pd.DataFrame, list[dict]]:
    """Metrics of `cases` in the grid of their label files, which the truth is read from.

    Args:
        bank: slices or volumes of at least these cases.
        dataset: where the label files and their spacing are.
        threshold: probability above which a voxel of a one-channel model is foreground.

    Returns: a table with columns case, class, metric and value; and for every case the slice (in the slice grid) with
        the largest true area, as a dict of name, and image, truth and prediction (uint8 HW, of a slice's or patch's
        size).

    Raises: InputError: a case that the bank or the data set does not hold.
    """
    tables, examples = [], []
    for name in cases:  # one at a time: the probabilities of many classes fill the memory
        part = bank.select([name])
        scores = predict_cases(model, part)[name]
        prediction, truth = on_file_grid(scores, part, name, threshold), true_mask(dataset, name, bank.classes)
        table = case_metrics(prediction, truth, bank.classes, dataset.case(name).spacing)
        tables.append(table.assign(case=name))
        shown = dict(zip(("image", "truth"), part.volume(name), strict=True))
        shown |= {"prediction": most_probable(scores[None], threshold)[0]}
        place = largest_slice(shown["truth"], part.geometry[name].size)
        shown = {key: value[place] for key, value in shown.items()}
        examples.append({"name": name} | {key: value.cpu().numpy().astype(np.uint8) for key, value in shown.items()})
    return pd.concat(tables, ignore_index=True)[["case", "class", "metric", "value"]], examples
