"""What the slices keep of the target: the share inside their field of view, and the best Dice that is left."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import numpy as np
import pandas as pd
import torch

from kdlib.config import Preprocessing
from kdlib.data.decathlon import DEFECT_COLUMNS, Case, Dataset, DataWarning, raise_defects
from kdlib.data.slices import Geometry, place_case, place_slices, read_case_file, restore
from kdlib.data.volumes import build_bank

LEAST_KEPT = 0.95  # of each class of a case; less is a defect


def target_in_view(case: Case, classes: dict[str, int], preprocessing: Preprocessing) -> dict[str, float]:
    """Class name -> share of its voxels that lies inside the slices, of the classes that the case has."""
    affine, label = read_case_file(case.label, np.int64)
    geometry = place_slices(case.shape, affine, preprocessing)
    label = geometry.orient(label)
    seen = label[(..., *np.ix_(*geometry.in_view()))]
    counts = {name: (np.count_nonzero(label == value), value) for name, value in classes.items()}
    return {name: np.count_nonzero(seen == value) / count for name, (count, value) in counts.items() if count}


def best_dice(dataset: Dataset, case: Case, classes: dict[str, int], preprocessing: Preprocessing) -> dict[str, float]:
    """Class name -> Dice of a network whose slices equal the labels', on the file's grid; classes that the case has.

    What is missing to 1 is lost by resampling and cropping, and no network can win it back.
    """
    bank = build_bank(dataclasses.replace(dataset, cases=(case,)), classes, preprocessing)
    _, truth = read_case_file(case.label, np.int64)
    geometry, labels = bank.geometry[case.name], bank.volume(case.name)[1]
    # class by class: the probabilities of all classes at once may not fit into memory
    best = restore((labels == 0)[None].float(), geometry)[0] if len(classes) > 1 else torch.full(case.shape, 0.5)
    found = torch.zeros(case.shape, dtype=torch.int64)
    for number, value in enumerate(classes.values(), 1):
        score = restore((labels == number)[None].float(), geometry)[0]
        found[score > best] = value
        best = torch.maximum(best, score)
    dice = {}
    for name, value in classes.items():
        predicted, true = found.numpy() == value, truth == value
        if true.any():
            dice[name] = float(2 * np.count_nonzero(predicted & true) / (predicted.sum() + true.sum()))
    return dice


def check_view(dataset: Dataset, classes: dict[str, int], preprocessing: Preprocessing) -> Dataset:
    """The data set without cases of which the slices show less than 95 % of a class, or that are too small for patches.

    Raises: DefectError where `dataset.on_defect` is "raise" and there are such cases, or where no case is left.
    """
    rows, names, size, padded = [], set(), preprocessing.input_shape[1:], 0
    spacing = "the volume's own spacing" if preprocessing.spacing is None else f"{preprocessing.spacing:g} mm"
    extent = f"{' x '.join(map(str, size))} {'pixels' if len(size) == 2 else 'voxels'} of {spacing}"
    for case in dataset.cases:
        geometry = place_case(case, preprocessing)
        if text := too_small(geometry, preprocessing):
            half = 16 * (2 * min(geometry.resampled) // 16)
            remedy = f"give a smaller patch: CHANGES='{{\"size\": {half}}}'" if half else "give a smaller spacing"
            rows.append((case.name, f"imagesTr/{case.image.name}", text, f"{remedy}, or remove the case"))
            names.add(case.name)
        padded += len(size) == 3 and min(geometry.resampled) < size[0]
        if all(mask.all() for mask in geometry.in_view()):
            continue
        for name, share in target_in_view(case, classes, preprocessing).items():
            if share < LEAST_KEPT:
                defect = f"only {100 * share:.0f} % of {name} lies inside the slices ({extent})"
                changes = json.dumps({"size": whole_size(case, preprocessing)})
                remedy = f"check the label, or show the whole volume: CHANGES='{changes}', or a larger spacing"
                rows.append((case.name, f"labelsTr/{case.label.name}", defect, remedy))
                names.add(case.name)
    if padded:
        said = f"{padded} of {len(dataset.cases)} volumes are smaller than the patch of {extent} along an axis"
        warnings.warn(f"{dataset.root}: {said}: padded with 0 about their centre", DataWarning, stacklevel=2)
    if not rows:
        return dataset
    table, left = pd.DataFrame(rows, columns=DEFECT_COLUMNS), len(dataset.cases) - len(names)
    if dataset.on_defect == "raise" or not left:
        raise_defects(dataset.root, table, len(dataset.cases), left)
    kept = tuple(case for case in dataset.cases if case.name not in names)
    return dataclasses.replace(dataset, cases=kept, defects=pd.concat([dataset.defects, table], ignore_index=True))


def too_small(geometry: Geometry, preprocessing: Preprocessing) -> str:
    """What is wrong with a volume that fills less than half of a patch along an axis; "" where nothing is.

    A volume that is a little smaller than a patch is padded about its centre with 0, as slices are.
    """
    if preprocessing.dimensions == 2 or 2 * min(geometry.resampled) >= preprocessing.size:
        return ""
    voxels = " x ".join(map(str, geometry.resampled))
    patch = " x ".join(map(str, preprocessing.input_shape[1:]))
    return f"{voxels} voxels of {preprocessing.spacing:g} mm: most of a patch of {patch} would be padding"


def whole_size(case: Case, preprocessing: Preprocessing) -> int:
    """Side of slices, a multiple of 16, that show every pixel of the case's resampled volume."""
    geometry = place_case(case, preprocessing)
    return 16 * math.ceil(max(geometry.size - 2 * start for start in geometry.start) / 16)
