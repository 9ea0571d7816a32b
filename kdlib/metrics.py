"""The metrics a table may hold: how they are printed, their unit, and which direction is better."""

from __future__ import annotations

import math
from typing import NamedTuple


class Metric(NamedTuple):
    """`higher` is True where higher is better, False where lower is, None where neither is."""

    label: str
    unit: str
    higher: bool | None

    @property
    def heading(self) -> str:
        """Label and unit, e.g. "HD95 (mm)"."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest value; no bounds where neither direction is better."""
        return (-math.inf, math.inf) if self.higher is None else (0.0, math.inf if self.unit else 1.0)


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
