"""From the tidy table of per-case metrics to means, intervals and paired tests; the patient is the unit throughout.

The tidy table has one row a (run, case, class, metric), with columns run, arm, model, teacher, fraction, recipe, fold,
seed, patient, case, class, metric and value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from kdlib.config import InputError
from kdlib.metrics import METRICS

ALPHA = 0.05
OVERLAP = ("iou", "dice", "recall", "precision")

# arXiv 2406.03173, Table 4.2: one run each, pixels of the whole test set pooled; params in millions
THESIS_TABLE = pd.DataFrame(
    {
        "S1": (0.557, 0.715, 0.685, 0.749, 0.057),
        "S2": (0.627, 0.770, 0.725, 0.822, 0.227),
        "KD(T1, S1)": (0.629, 0.772, 0.721, 0.831, 0.057),
        "KD(T1, S2)": (0.659, 0.794, 0.748, 0.846, 0.227),
        "KD(T2, S1)": (0.623, 0.767, 0.707, 0.839, 0.057),
        "KD(T2, S2)": (0.658, 0.793, 0.750, 0.841, 0.227),
    },
    index=[*OVERLAP, "params"],
).T
_LABELS = [METRICS[metric].label for metric in OVERLAP]
PRINTED = [*_LABELS, "params (M)", "n", *(f"thesis {label}" for label in _LABELS)]


def rows_of(table: pd.DataFrame, metric: str, by: Sequence[str]) -> pd.DataFrame:
    """The rows of one metric. Raises: InputError where a column is missing or no row has the metric."""
    absent = [column for column in [*by, "case", "class", "metric", "value"] if column not in table]
    if absent:
        raise InputError(f"the table has no column {', '.join(absent)}: it has {', '.join(map(str, table)) or 'none'}")
    known = [name for name in METRICS if name in set(table["metric"])]
    if metric not in known:
        raise InputError(f"the table has no metric {metric!r}: it has {', '.join(known) or 'no rows'}")
    return table[table["metric"] == metric]


def per_patient(table: pd.DataFrame, metric: str = "dice", by: Sequence[str] = ("arm",)) -> pd.DataFrame:
    """One value a (group, patient): seeds averaged first, then classes, then the cases of a patient.

    Undefined values (NaN) are left out of each mean; a patient with no defined value keeps a NaN. A table without a
    column `patient` takes each case as a patient.

    Args:
        table: tidy.
        metric: one of `kdlib.metrics.METRICS`.
        by: columns that make the groups (no patients or cases); with "class" among them classes are not averaged.

    Returns:
        columns of `by`, `patient` and `value`, in the order of the table.

    Raises:
        InputError: see `rows_of`; or a group mixes models, teachers, label fractions or recipes.
    """
    rows = rows_of(table, metric, by := list(by))
    for column in ("model", "teacher", "fraction", "recipe"):
        if column in rows and column not in by:
            several = rows.groupby(by, dropna=False)[column].nunique(dropna=False)
            if several.max() > 1:
                found = f"{several.idxmax()!r} mixes {several.max()} values of {column!r}"
                raise InputError(f"{found}: filter the table, or group by {column!r} too")
    levels = [column for column in ("patient", "case", "class") if column in rows and column not in by]
    for depth in range(len(levels), 0, -1):
        rows = rows.groupby([*by, *levels[:depth]], sort=False, dropna=False, as_index=False)["value"].mean()
    return rows.rename(columns={levels[0]: "patient"})


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % BCa bootstrap interval of the mean (Efron 1987), 9999 resamples with a fixed seed.

    Fewer than two values have none (NaN, NaN); equal values give (value, value). With fewer than about eight values it
    is too short: read it as a range of what was seen.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return np.nan, np.nan
    if np.ptp(values) < 1e-12:
        return values[0], values[0]
    found = stats.bootstrap((values,), np.mean, method="BCa", random_state=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def summarise(table: pd.DataFrame, by: Sequence[str] = ("arm",), metric: str = "dice") -> pd.DataFrame:
    """Mean over patients of each group, with its 95 % interval.

    Returns:
        columns of `by`, n (patients with a defined value), mean, sd (n - 1 in the denominator), low, high.

    Raises:
        InputError: see `per_patient`.
    """
    rows = []
    for key, group in per_patient(table, metric, by).groupby(list(by), sort=False, dropna=False):
        values = group["value"].dropna()
        low, high = interval(values)
        found = dict(n=len(values), mean=values.mean(), sd=values.std(), low=low, high=high)
        rows.append(dict(zip(by, key, strict=True)) | found)
    return pd.DataFrame(rows)


def all_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row an arm, one column a metric (with its unit): the mean over patients of defined values, and n."""
    columns = {}
    for name, metric in METRICS.items():
        found = summarise(table, metric=name).set_index("arm")
        columns[f"{metric.label} ({metric.unit})" if metric.unit else metric.label] = found["mean"]
    return pd.DataFrame(columns).assign(n=summarise(table).set_index("arm")["n"]).rename_axis(None)


def paired(table: pd.DataFrame, a: str, b: str, metric: str = "dice", by: str = "arm") -> dict[str, object]:
    """Group `a` against group `b` on the same patients: mean difference a - b, and Wilcoxon's signed-rank test.

    The p-value is two-sided, exact up to 50 patients (13 with ties or zeros), else by the normal approximation; with
    fewer than 6 patients it cannot fall below 0.05. The verdict is "better" or "worse" only if p < 0.05 and the 95 %
    BCa interval of the mean difference lies on that side of 0, else "inconclusive".

    Args:
        a, b: values of the column `by`.

    Returns:
        a, b, n (patients where both are defined), difference, low, high, p, verdict.

    Raises:
        InputError: a group that is not there, cases that only one of both has, a metric without a better direction;
            see also `per_patient`.
    """
    if metric not in METRICS or METRICS[metric].higher is None:
        directed = ", ".join(name for name, entry in METRICS.items() if entry.higher is not None)
        raise InputError(f"metric {metric!r} has no better direction to compare by: choose from {directed}")
    rows = rows_of(table, metric, [by])
    for name, other in ((a, b), (b, a)):
        if name not in set(rows[by]):
            raise InputError(f"no {by} {name!r} in the table: it has {', '.join(map(str, rows[by].unique()))}")
        missing = sorted(set(rows.loc[rows[by] == other, "case"]) - set(rows.loc[rows[by] == name, "case"]))
        if missing:
            listed = ", ".join(map(str, missing))
            raise InputError(f"{by} {name!r} has no {metric} of cases {listed}: run the folds they are tested in")
    values = per_patient(rows[rows[by].isin([a, b])], metric, [by])
    wide = values.pivot(index="patient", columns=by, values="value").dropna()
    difference = (wide[a] - wide[b]).round(12).to_numpy()  # rounded, so that means over seeds can tie
    low, high = interval(difference)
    p = mean = np.nan
    if len(difference):
        mean = float(difference.mean())
        p = float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0
    verdict = _verdict(p, low, high, metric)
    return dict(a=a, b=b, n=len(difference), difference=mean, low=low, high=high, p=p, verdict=verdict)


def _verdict(p: float, low: float, high: float, metric: str) -> str:
    if not p < ALPHA or not (low > 0 or high < 0):
        return "inconclusive"
    return "better" if (low > 0) == METRICS[metric].higher else "worse"


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """p-values adjusted for the number of tests by Holm's step-down (Scand J Stat 1979); a NaN counts as a test."""
    p = np.asarray(pvalues, float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def compare(
    table: pd.DataFrame, pairs: Sequence[tuple[str, str]], metric: str = "dice", by: str = "arm"
) -> pd.DataFrame:
    """`paired` for every (a, b), with p adjusted by Holm over all of them (`p_holm`) and the verdict from that."""
    if not pairs:
        raise InputError("no pairs to compare: give at least one (a, b)")
    rows = pd.DataFrame([paired(table, a, b, metric, by) for a, b in pairs])
    rows.insert(rows.columns.get_loc("p") + 1, "p_holm", holm(rows["p"]))
    rows["verdict"] = [_verdict(row.p_holm, row.low, row.high, metric) for row in rows.itertuples()]
    return rows


def thesis_row(arm: str) -> pd.Series:
    """The thesis's numbers for an arm, NaN where it has none; its baselines' label fraction is not recorded."""
    return THESIS_TABLE.reindex([arm.split(" (")[0]]).iloc[0]


def pivot_thesis(table: pd.DataFrame, params: Mapping[str, int]) -> pd.DataFrame:
    """The results in the form of the thesis's Table 4.2, its own numbers beside them.

    Args:
        table: tidy.
        params: arm -> number of parameters.

    Returns:
        one row an arm: the columns of `PRINTED` (means with their 95 % interval as text, n patients of the Dice), and
        for each metric its numbers as `<metric>_mean`, `_low`, `_high`.

    Raises:
        InputError: see `per_patient`.
    """
    dice = summarise(table).set_index("arm")
    printed, numbers = pd.DataFrame(index=dice.index), {}
    for metric in OVERLAP:
        found = summarise(table, metric=metric).set_index("arm").reindex(dice.index)
        cells = zip(found.itertuples(), dice["n"], strict=True)
        printed[METRICS[metric].label] = [_with_interval(row, usual) for row, usual in cells]
        numbers |= {f"{metric}_{part}": found[part] for part in ("mean", "low", "high")}
    printed["params (M)"] = [params.get(arm, np.nan) / 1e6 for arm in dice.index]
    printed["n"] = dice["n"]
    for metric, label in zip(THESIS_TABLE, [*_LABELS, "params (M)"], strict=True):
        printed[f"thesis {label}"] = [thesis_row(arm)[metric] for arm in dice.index]
    return printed.assign(**numbers)


def _with_interval(row: tuple, usual: int) -> str:
    """A mean as "0.772 [0.70, 0.81]", with n where it is not the usual one."""
    if not row.n:
        return "undefined"
    text = f"{row.mean:.3f}" + ("" if np.isnan(row.low) else f" [{row.low:.2f}, {row.high:.2f}]")
    return text if row.n == usual else f"{text} (n = {row.n})"


def to_latex(table: pd.DataFrame, path: Path | str, caption: str, label: str) -> Path:
    """Writes a booktabs table; text is escaped, so cells, headings and caption are plain text."""
    style = table.style.format(precision=3, na_rep="--", escape="latex")
    style = style.format_index(escape="latex", axis=0).format_index(escape="latex", axis=1)
    style = style.hide(axis="index", names=not isinstance(table.index, pd.RangeIndex))  # their names, or all of it
    escaped = caption.translate({ord(sign): f"\\{sign}" for sign in "%&_#$"})
    text = style.to_latex(hrules=True, caption=escaped, label=label, position_float="centering")
    Path(path).write_text(text, encoding="utf-8")
    return Path(path)


def save_table(
    table: pd.DataFrame, folder: Path | str, name: str, caption: str, printed: Sequence[str] | None = None
) -> list[Path]:
    """Writes `<name>.csv` with all columns and `<name>.tex` with those in `printed` (None: all); returns both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=not isinstance(table.index, pd.RangeIndex))
    chosen = table if printed is None else table[list(printed)]
    return [folder / f"{name}.csv", to_latex(chosen, folder / f"{name}.tex", caption, f"tab:{name}")]
