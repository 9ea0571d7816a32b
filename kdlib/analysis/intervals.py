"""Intervals of means over patients: bootstrap of the patients, and of the trainings that saw them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from kdlib.analysis.patients import per_patient


class Interval(NamedTuple):
    """Two limits, and the name of the interval that they are of ("" where there is none)."""

    low: float
    high: float
    kind: str


def interval_text(kinds: Iterable[str]) -> str:
    """The intervals that a table or figure holds, in words for a caption; a single patient has none ("", or NaN)."""
    names = [name for name in dict.fromkeys(kinds) if isinstance(name, str) and name]
    return f"95 % {' or '.join(names)} interval" if names else "no interval, which takes two patients"


def interval(
    values: Sequence[float], level: float = 0.95, noise: pd.DataFrame | None = None, resamples: int = 9999
) -> Interval:
    """Interval of the mean of patients: bootstrap of the patients, then of the trainings, with a fixed seed.

    The same values give the same limits in whatever order they come. Below 60 values, or with several trainings per
    fold, the interval is studentised (Efron & Tibshirani 1993, section 12.5), else BCa (Efron 1987); of fewer than 5,
    or where ties leave resamples without any spread, it is Student's t interval.

    Coverage of 95 % intervals, by simulation of differences in Dice (`benchmarks/coverage.py`, 2000 studies each):

    | patients           | 8      | 24     | 41     |
    |--------------------|--------|--------|--------|
    | skewed differences | 92.7 % | 93.9 % | 93.5 % |
    | and three seeds    | 94.2 % | 93.8 % | 94.8 % |
    | by BCa             | 85.3 % | 91.5 % | 92.7 % |
    | by percentiles     | 86.2 % | 91.8 % | 92.5 % |

    What one seed cannot show is that trainings differ as a whole: where they do, 24 patients and one seed cover 75.6 %,
    three seeds 90.3 %. Where one patient in ten fails badly, 8 patients cover 89.1 % and 24 patients 94.4 %.

    Args:
        values: one per patient.
        level: of the interval.
        noise: from `seed_noise`, in the order of `values`; None where every patient was seen by one training.
        resamples: bootstrap samples.

    Returns: limits and kind: NaN for fewer than two values, (value, value) for equal ones; then the kind is "".
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(np.nan, np.nan, "")
    if np.ptp(values) < 1e-12:
        return Interval(float(values.min()), float(values.min()), "")
    cubes = values * values * values  # unlike values**3 the same for both signs, to the last digit, on every processor
    if (math.fsum(values) or math.fsum(cubes)) < 0:  # b against a mirrors a against b
        low, high, kind = interval(-values, level, None if noise is None else -noise, resamples)
        return Interval(-high, -low, kind)
    order = canonical_order(values if noise is None else np.column_stack([values, noise.fillna(0)]))
    values, noise = values[order], None if noise is None else noise.iloc[order]
    drawn = resample(values, noise, resamples)
    if len(values) >= 60 and noise is None:
        return bca(values, drawn, level)
    return studentised(values.mean(), values.std(), drawn.mean(axis=1), drawn.std(axis=1), len(values), level)


def canonical_order(rows: np.ndarray) -> np.ndarray:
    """Indices that sort patients (rows) by their values, so that resamples with a fixed seed are the same whatever the
    order of the table (a CSV that is read back may sort its patients otherwise)."""
    return np.lexsort(rows.reshape(len(rows), -1).T[::-1])


def resample(values: np.ndarray, noise: pd.DataFrame | None, resamples: int) -> np.ndarray:
    """Resampled values [resamples, n]: patients with replacement, and the trainings that they were seen by likewise.

    A training is seen by all patients of its fold, so that it is drawn once for all of them, not anew for each (the
    pigeonhole bootstrap, Owen 2007, arXiv 0712.1111).
    """
    generator, n = np.random.default_rng(0), len(values)
    patients = generator.integers(n, size=(resamples, n))
    found = values[patients]
    if noise is None:
        return found
    shares = np.zeros((resamples, noise.shape[1]))
    groups, names = noise.columns.droplevel(-1).factorize()
    for group in range(len(names)):
        columns = np.flatnonzero(groups == group)
        count = len(columns)
        shares[:, columns] = generator.multinomial(count, np.full(count, 1 / count), size=resamples) / count
    shift = shares @ noise.fillna(0).to_numpy().T  # a patient is in one fold: other trainings never saw it
    return found + np.take_along_axis(shift, patients, axis=1)


def studentised(
    mean: float, spread: float, means: np.ndarray, spreads: np.ndarray, n: int, level: float = 0.95
) -> Interval:
    """Limits from the bootstrap of t; Student's own of fewer than 5 values, or where ties leave resamples no spread.

    Args:
        mean, spread: of the values; `spread` is their standard deviation with n in the denominator.
        means, spreads: the same of each resample.
        n: number of values.
    """
    flat = spreads < 1e-9 * spread
    if n < 5 or flat.mean() > 0.002:
        low, high = stats.t.interval(level, n - 1, mean, spread / np.sqrt(n - 1))
        return Interval(float(low), float(high), "Student's t")
    t = (means[~flat] - mean) / spreads[~flat]
    low, high = mean - np.quantile(t, [(1 + level) / 2, (1 - level) / 2]) * spread
    return Interval(float(low), float(high), "studentised bootstrap")


def bca(values: np.ndarray, drawn: np.ndarray, level: float = 0.95) -> Interval:
    """Scipy's BCa limits, on resamples of ours."""
    ours = SimpleNamespace(bootstrap_distribution=drawn.mean(axis=1))
    how = dict(n_resamples=0, bootstrap_result=ours, method="BCa", confidence_level=level)
    return Interval(*map(float, stats.bootstrap((values,), np.mean, **how).confidence_interval), "BCa bootstrap")


def seed_noise(*tables: pd.DataFrame, metric: str = "dice") -> pd.DataFrame | None:
    """How far each training's value of a patient lies from the patient's mean over trainings.

    Args:
        tables: tidy, of one group; or of two, for the difference of the first to the second. Their trainings of one
            fold and seed, which see the same batches, are then taken together; where the two have different seeds,
            each one's trainings stand for themselves.
        metric: one of `kdlib.metrics.METRICS`.

    Returns: one row per patient, one column per training; the last level of the columns is the seed, the others name
        the group in which trainings are drawn. None where there is one training per fold.
    """
    tables = [table if "fold" in table else table.assign(fold=0) for table in tables]
    if not all("seed" in table for table in tables):
        return None
    if pd.concat(tables).groupby("fold")["seed"].nunique().max() < 2:
        return None
    parts = []
    for table, sign in zip(tables, (1, -1), strict=False):
        own = per_patient(table, metric, ["fold", "seed"])
        wide = sign * own.pivot(index="patient", columns=["fold", "seed"], values="value")
        parts.append(wide.sub(wide.mean(axis=1), axis=0))
    return taken_together(parts)


def taken_together(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Deviations of the trainings of one or two groups, added up where both have the same folds and seeds."""
    if len(parts) == 2 and set(parts[0]) == set(parts[1]):
        return parts[0] + parts[1]
    return pd.concat(parts, axis=1, keys=range(len(parts)))
