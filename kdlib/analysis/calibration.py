"""One number of a calibration table."""

from __future__ import annotations

import pandas as pd

from kdlib.config import InputError


def expected_calibration_error(table: pd.DataFrame) -> pd.DataFrame:
    """Expected calibration error of every case and class: sum of count |accuracy - confidence| over sum of count.

    Guo et al. 2017, arXiv 1706.04599, with the probability of the class in place of the winner's. NaN without pixels.

    Args:
        table: from `kdlib.evaluation.calibration.calibration`; further columns (a method, a fold) are kept, each of
            their values for itself.

    Returns: the table's columns but for those of bins, and metric ("ece") and value.

    Raises: InputError: a column of `calibration` is missing.
    """
    measured = ["bin", "confidence", "accuracy", "count"]
    if absent := [column for column in ["case", "class", *measured] if column not in table]:
        raise InputError(f"calibration table without {', '.join(absent)}: give what `calibration` returns")
    keys = [column for column in table if column not in measured]
    gap = (table["count"] * (table["accuracy"] - table["confidence"]).abs()).fillna(0)  # an empty bin has no gap
    gaps = table[keys].assign(gap=gap, count=table["count"])
    sums = gaps.groupby(keys, sort=False, dropna=False, as_index=False).sum()
    return sums[keys].assign(metric="ece", value=(sums["gap"] / sums["count"]).where(sums["count"] > 0))
