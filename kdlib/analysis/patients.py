"""From the tidy table of per-case metrics to one value per patient; the patient is the unit throughout.

The tidy table has one row per (run, case, class, metric): the identity columns (`kdlib.analysis.labels.IDENTITY`), run,
method, fold, seed, patient, case, class, metric and value.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from kdlib.config import InputError
from kdlib.metrics import METRICS


def rows_of(table: pd.DataFrame, metric: str, by: Sequence[str]) -> pd.DataFrame:
    """The rows of one metric. Raises: InputError where a column is missing or no row has the metric."""
    absent = [column for column in [*by, "patient", "case", "class", "metric", "value"] if column not in table]
    if absent:
        raise InputError(f"the table has no column {', '.join(absent)}: it has {', '.join(map(str, table)) or 'none'}")
    known = [name for name in METRICS if name in set(table["metric"])]
    if metric not in known:
        raise InputError(f"the table has no metric {metric!r}: it has {', '.join(known) or 'no rows'}")
    return table[table["metric"] == metric]


def per_patient(table: pd.DataFrame, metric: str = "dice", by: Sequence[str] = ("method",)) -> pd.DataFrame:
    """One value per (group, patient): seeds averaged first, then classes, then the cases of a patient.

    Undefined values (NaN) are left out of each mean; a patient with no defined value keeps a NaN.

    Args:
        table: tidy.
        metric: one of `kdlib.metrics.METRICS`.
        by: columns that make the groups (no patients or cases); with "class" among them classes are not averaged.

    Returns: columns of `by`, `patient` and `value`, in the order of the table.

    Raises: InputError: see `rows_of`; or a group mixes methods or protocols.
    """
    rows = rows_of(table, metric, by := list(by))
    for column in ("method", "protocol", "model", "teacher", "fraction", "recipe"):
        if column in rows and column not in by:
            several = rows.groupby(by, dropna=False)[column].nunique(dropna=False)
            if several.max() > 1:
                found = f"{several.idxmax()!r} mixes {several.max()} values of {column!r}"
                raise InputError(f"{found}: filter the table, or group by {column!r} too")
    levels = [column for column in ("patient", "case", "class") if column not in by]
    for depth in range(len(levels), 0, -1):
        rows = rows.groupby([*by, *levels[:depth]], sort=False, dropna=False, as_index=False)["value"].mean()
    return rows


def volumes(table: pd.DataFrame) -> int:
    """Number of volumes with a defined value: patients may have several."""
    return int(table.loc[table["value"].notna(), "case"].nunique())


def patients_text(patients: Sequence[int], volumes: Sequence[int] = ()) -> str:
    """Counts in words for a caption, e.g. "n = 14 patients with 28 volumes" or "n = 0 to 5 patients"."""

    def spread(counts: Sequence[int]) -> str:
        low, high = int(min(counts)), int(max(counts))
        return f"{low}" + (f" to {high}" if high > low else "")

    patients, volumes = list(patients), list(volumes)
    text = f"n = {spread(patients)} patient" + ("" if max(patients) == 1 else "s")
    return f"{text} with {spread(volumes)} volumes" if volumes and volumes != patients else text
