"""A student's mask of a new scan, on the scan's own grid: what the study's evaluation would give."""

from __future__ import annotations

import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from kdlib.data import DataWarning
from kdlib.data.roundtrip import too_small
from kdlib.data.slices import Geometry, image_slices, restore, stack_channels
from kdlib.inference.backends import Backend, load_backend
from kdlib.inference.scans import Scan, on_grid, read_scan
from kdlib.inference.student import Student, find_student, load_student
from kdlib.losses import most_probable, probabilities
from kdlib.training.validation import volume_logits

NEGATIVE = {"CT": (0.1, 1.0), "MR": (0.0, 0.0)}  # share of negative voxels where training scans are not known


def predict(
    student: str | Path,
    scan: str | Path,
    results: str | Path = "results",
    data: str | Path | None = None,
    device: str = "auto",
    batch: int = 32,
    postprocess: bool = False,
) -> nib.Nifti1Image:
    """The mask of a scan: class indices 1..C in the order of the student's classes, uint8, on the scan's own grid.

    Args:
        student: see `kdlib.inference.student.find_student`.
        scan: a NIfTI file, or the folder of a DICOM series.
        results: folder that trained runs are kept in.
        data: the data set of a run of an older version; see `student_of_run`.
        device: "auto", "cpu" or "cuda".
        batch: slices that pass the network at once, eight for each patch of a volume.
        postprocess: keep the largest connected component of each class.

    Raises:
        InputError: the student or the scan cannot be used. What is odd is said by `DataWarning`.
    """
    folder = find_student(student, results)
    described = load_student(folder, data)
    backend = load_backend(folder, described, device)
    read = read_scan(Path(scan))
    return mask_of(segment(described, backend, read, batch), described, read, postprocess)


def segment(student: Student, backend: Backend, scan: Scan, batch: int = 32) -> Tensor:
    """Probabilities [C,X,Y,Z] of a scan on its own grid; C is 1 (sigmoid) for one class, else classes + 1 (softmax,
    channel 0 background)."""
    geometry, slices = image_slices(scan.voxels, scan.affine, student.modality, student.preprocessing, scan.path)
    for text in oddities(student, scan, geometry):
        warnings.warn(f"{scan.path}: {text}", DataWarning, stacklevel=2)
    images = torch.from_numpy(slices)
    if student.preprocessing.dimensions == 3:
        logits = volume_logits(backend, images, student.preprocessing.size, batch)
        return restore(probabilities(logits).transpose(0, 1), geometry)
    channels, one_case = student.preprocessing.channels, torch.zeros(len(slices), dtype=torch.int64)
    parts = torch.arange(len(slices)).split(batch)
    scores = [probabilities(backend(stack_channels(images, index, one_case, channels))) for index in parts]
    return restore(torch.cat(scores).transpose(0, 1), geometry)


def mask_of(scores: Tensor, student: Student, scan: Scan, postprocess: bool = False) -> nib.Nifti1Image:
    """The mask of `segment`'s probabilities; see `predict`."""
    mask = most_probable(scores[None], student.threshold)[0].numpy().astype(np.uint8)
    return on_grid(scan, largest_components(mask) if postprocess else mask, f"kdlib {student.name}")


def largest_components(mask: np.ndarray) -> np.ndarray:
    """Of each class of XYZ class indices the largest component, voxels that touch at a corner connected."""
    kept = np.zeros_like(mask)
    for value in range(1, int(mask.max()) + 1):
        parts, count = ndimage.label(mask == value, np.ones((3, 3, 3)))
        if count:
            kept[parts == 1 + np.bincount(parts.ravel())[1:].argmax()] = value
    return kept


def oddities(student: Student, scan: Scan, geometry: Geometry) -> list[str]:
    """What makes a scan unlike those that the student was trained on, in words."""
    found = []
    known = student.facts.get("negative")
    least, most = known or NEGATIVE[student.modality]
    negative = float(np.mean(scan.voxels < 0))
    other = {"CT": "MR", "MR": "CT"}[student.modality]
    if scan.modality not in ("", student.modality):
        found.append(f"its modality is {scan.modality}, and {student.name} was trained on {student.modality}")
    elif negative < least / 4 or negative > most + 0.05:
        usual = f"{least:.0%} to {most:.0%} {'in the training scans' if known else 'as a rule'}"
        found.append(
            f"{negative:.0%} of its intensities are negative ({usual}): is it {other}, or another scale, and not the "
            f"{student.modality} that {student.name} was trained on?"
        )
    if text := too_small(geometry, student.preprocessing):
        found.append(text)
    seen = [float(side.mean()) for side in geometry.in_view()]
    if min(seen) < 0.5:  # a margin of air is no loss
        found.append(
            f"the student sees {seen[0]:.0%} x {seen[1]:.0%} of each slice, about its centre: outside it the mask is "
            "empty; crop the scan about the target"
        )
    return found
