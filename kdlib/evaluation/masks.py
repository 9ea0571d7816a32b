"""Masks of volumes: the truth of a label file, predictions on the file's grid, boxes and bands around a surface."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects
from torch import Tensor, nn

from kdlib.data.decathlon import Dataset
from kdlib.data.slices import read_case_file, restore
from kdlib.data.volumes import Bank
from kdlib.losses import most_probable, probabilities
from kdlib.training.validation import inference, slice_logits


def true_mask(dataset: Dataset, name: str, classes: Sequence[str]) -> np.ndarray:
    """Class indices XYZ of a case's label file: 0 background, 1..C the position in `classes`.

    Raises: InputError: a case that the data set does not hold.
    """
    _, file = read_case_file(dataset.case(name).label, np.int64)
    truth = np.zeros_like(file)
    for value, label in enumerate(classes, start=1):
        truth[file == dataset.labels[label]] = value
    return truth


def predict_cases(model: nn.Module, bank: Bank, batch: int = 32) -> dict[str, Tensor]:
    """Probabilities of every case of the bank: name -> [C,D,H,W] in its slice grid, on the model's device.

    C is 1 (sigmoid) for one class, classes + 1 (softmax, channel 0 background) for several.
    """
    parts: dict[str, list[Tensor]] = {case: [] for case in bank.cases}
    with inference(model, bank.dims) as device:
        for logits, _, owner in slice_logits(model, bank, device, batch):
            for number in owner.unique().tolist():
                parts[bank.cases[number]].append(probabilities(logits[owner == number]))
    return {case: torch.cat(scores).transpose(0, 1) for case, scores in parts.items()}


def on_file_grid(scores: Tensor, bank: Bank, name: str, threshold: float = 0.5) -> np.ndarray:
    """Class indices XYZ on the grid of a case's label file, of its probabilities [C,D,H,W] in the slice grid.

    Probabilities, not labels, go back to the file's grid, and are cut there.
    """
    return most_probable(restore(scores, bank.geometry[name])[None], threshold)[0].cpu().numpy()


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Bounding box of a boolean XYZ mask that is not empty."""
    return find_objects(mask.view(np.uint8))[0]


def grown_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The bounding box grown on every side by a quarter of its length, at least a voxel; an empty mask's is empty."""
    if not mask.any():
        return (slice(0, 0),) * 3
    grown = [(side, max(1, (side.stop - side.start) // 4)) for side in bounding_box(mask)]
    return tuple(slice(max(side.start - margin, 0), side.stop + margin) for side, margin in grown)


def surface_band(truth: np.ndarray, spacing: Sequence[float], width: float) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Voxels of a boolean XYZ mask whose centre lies within `width` mm of one on the mask's surface.

    The surface are the voxels of the mask with a face neighbour outside it.

    Returns:
        the band inside a box, and the box that holds all of it: a distance to every voxel of a body would take long.
    """
    if not truth.any():
        return np.zeros((0, 0, 0), bool), (slice(0, 0),) * 3
    reach = [int(width / side) for side in spacing]
    box = tuple(slice(max(s.start - r, 0), s.stop + r) for s, r in zip(bounding_box(truth), reach, strict=True))
    mask = truth[box]
    surface = mask & ~binary_erosion(mask)
    return distance_transform_edt(~surface, sampling=spacing) <= width, box
