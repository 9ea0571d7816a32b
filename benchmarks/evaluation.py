"""The metrics of a volume against MONAI's, which are its public implementation.

    python benchmarks/evaluation.py [--quick] [--threads 1]

A spleen-sized blob in a volume of 256 x 256 x 100 voxels and a prediction that errs at its surface. kdlib gives nine
metrics (Dice, IoU, recall, precision, two distances, surface Dice, two volumes); MONAI's `DiceMetric` and
`HausdorffDistanceMetric` (95th percentile) give two, on the same masks as one-hot tensors.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from measure import Record, faster, in_turns, run_alone, within
from monai.metrics import DiceMetric, HausdorffDistanceMetric
from scipy.ndimage import gaussian_filter

from kdlib.evaluation.cases import case_metrics

SPACING = (0.8, 0.8, 3.0)


def volumes(side: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth, class indices XYZ."""
    generator = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (side, side, depth)), indexing="ij", sparse=True)
    body = ((x - 0.3) / 0.22) ** 2 + ((y + 0.2) / 0.3) ** 2 + (z / 0.5) ** 2
    noise = gaussian_filter(generator.normal(size=(side, side, depth)), (4, 4, 2))
    noise /= noise.std()
    return (body + 0.15 * noise < 1).astype(int), (body < 1).astype(int)


def ours(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    table = case_metrics(prediction, truth, ["spleen"], SPACING).set_index("metric")["value"]
    return {"dice": table["dice"], "hd95": table["hd95"]}


def monai(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    pair = [torch.from_numpy(np.stack([mask == 0, mask == 1])[None].astype(np.float32)) for mask in (prediction, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dice = DiceMetric(include_background=False)(*pair)
        distance = HausdorffDistanceMetric(include_background=False, percentile=95)(*pair, spacing=SPACING)
    return {"dice": float(dice), "hd95": float(distance)}


def measure(record: Record) -> None:
    side, depth = (48, 12) if record.quick else (256, 100)
    pair = volumes(side, depth)
    found, other = ours(*pair), monai(*pair)
    what = f"9 metrics of a volume, {side} x {side} x {depth}"
    for name in found:
        apart = float(abs(found[name] - other[name]) / max(abs(other[name]), 1e-12))
        record.add(within(f"{what}: {name} against MONAI's", apart, 1e-5, "relative"))
    taken = in_turns({"kdlib": lambda: ours(*pair), "monai": lambda: monai(*pair)}, torch.device("cpu"))
    record.add(faster(f"{what}: nine metrics against MONAI's two", taken["kdlib"], taken["monai"], 1))


if __name__ == "__main__":
    run_alone("evaluation", measure, __doc__)
