"""The metrics a table may hold: how they are printed, their unit, and which direction is better."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """`higher` is True where higher is better, False where lower is, None where neither is."""

    label: str
    unit: str
    higher: bool | None


METRICS = {
    "dice": Metric("Dice", "", True),
    "iou": Metric("IoU", "", True),
    "recall": Metric("Recall", "", True),
    "precision": Metric("Precision", "", True),
    "hd95": Metric("HD95", "mm", False),
    "assd": Metric("ASSD", "mm", False),
    "nsd": Metric("NSD at 2 mm", "", True),
    "volume_error": Metric("Volume error", "ml", None),
    "truth_volume": Metric("True volume", "ml", None),
}
