"""From the tidy table of per-case metrics to means, intervals and paired tests; the patient is the unit throughout.

The tidy table has one row a (run, case, class, metric), with columns run, arm, model, teacher, fraction, recipe, fold,
seed, patient, case, class, metric and value.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from kdlib.analysis.metrics import METRICS
from kdlib.config import InputError

ALPHA = 0.05
POWER = 0.8  # of the smallest difference that a comparison could have shown
DECIDED = ("better", "non-inferior")  # verdicts that a printed table sets in bold
BOLD = "textbf:--rwrap;"
COMPARISON_COLUMNS = [
    "a",
    "b",
    "n",
    "difference",
    "low",
    "high",
    "p_holm",
    "effect",
    "verdict",
]  # of `compare`, to print
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
THESIS_COLUMNS = [*_LABELS, "params (M)", "n", *(f"thesis {label}" for label in _LABELS)]


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
        metric: one of `kdlib.analysis.metrics.METRICS`.
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


def interval_name(n: int, seeds: int = 1) -> str:
    """What `interval` makes of n patients and so many trainings a fold, in words for a caption."""
    return "Student's t" if n < 5 else "BCa bootstrap" if n >= 60 and seeds == 1 else "studentised bootstrap"


def interval(
    values: Sequence[float], level: float = 0.95, noise: pd.DataFrame | None = None, resamples: int = 9999
) -> tuple[float, float]:
    """Interval of the mean of patients: bootstrap of the patients, then of the trainings, with a fixed seed.

    Below 60 values, or with several trainings a fold, it is studentised (Efron & Tibshirani 1993, section 12.5), else
    BCa (Efron 1987); of fewer than 5, or where ties leave resamples without any spread, it is Student's t interval.

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
        values: one a patient.
        level: of the interval.
        noise: from `seed_noise`, in the order of `values`; None where every patient was seen by one training.
        resamples: bootstrap samples.

    Returns:
        low and high: NaN for fewer than two values, (value, value) for equal ones.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return np.nan, np.nan
    if np.ptp(values) < 1e-12:
        return float(values[0]), float(values[0])
    drawn = _draw(values, noise, resamples)
    if len(values) >= 60 and noise is None:
        return _bca(values, drawn, level)
    return _studentised(values.mean(), values.std(), drawn.mean(axis=1), drawn.std(axis=1), len(values), level)


def _draw(values: np.ndarray, noise: pd.DataFrame | None, resamples: int) -> np.ndarray:
    """Resampled values (resamples x n): patients with replacement, and the trainings they were seen by likewise.

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


def _studentised(
    mean: float, spread: float, means: np.ndarray, spreads: np.ndarray, n: int, level: float
) -> tuple[float, float]:
    """Limits from the bootstrap of t; Student's own of fewer than 5 values, or where ties leave resamples no spread."""
    flat = spreads < 1e-9 * spread
    if n < 5 or flat.mean() > 0.002:
        low, high = stats.t.interval(level, n - 1, mean, spread / np.sqrt(n - 1))
    else:
        t = (means[~flat] - mean) / spreads[~flat]
        low, high = mean - np.quantile(t, [(1 + level) / 2, (1 - level) / 2]) * spread
    return float(low), float(high)


def _bca(values: np.ndarray, drawn: np.ndarray, level: float) -> tuple[float, float]:
    """Scipy's BCa limits, on resamples of ours."""
    ours = SimpleNamespace(bootstrap_distribution=drawn.mean(axis=1))
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=0, bootstrap_result=ours, method="BCa", confidence_level=level
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def seed_noise(*tables: pd.DataFrame, metric: str = "dice") -> pd.DataFrame | None:
    """How far each training's value of a patient lies from the patient's mean over trainings.

    Args:
        tables: tidy, of one group; or of two, for the difference of the first to the second. Their trainings of one
            fold and seed, which see the same batches, are then taken together; where the two have different seeds,
            each one's trainings stand for themselves.
        metric: one of `kdlib.analysis.metrics.METRICS`.

    Returns:
        one row a patient, one column a training; the last level of the columns is the seed, the others name the group
        in which trainings are drawn. None where there is one training a fold.
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
    if len(parts) == 2 and set(parts[0]) == set(parts[1]):
        return parts[0] + parts[1]
    return pd.concat(parts, axis=1, keys=range(len(parts)))


def summarise(table: pd.DataFrame, by: Sequence[str] = ("arm",), metric: str = "dice") -> pd.DataFrame:
    """Mean over patients of each group, with its 95 % interval (`interval`, cut where the metric ends).

    Returns:
        columns of `by`, n (patients with a defined value), mean, sd (n - 1 in the denominator), low, high.

    Raises:
        InputError: see `per_patient`.
    """
    rows = []
    for key, group in rows_of(table, metric, by).groupby(list(by), sort=False, dropna=False):
        values = per_patient(group, metric, by).set_index("patient")["value"].dropna()
        noise = seed_noise(group, metric=metric)
        limits = interval(values, noise=None if noise is None else noise.loc[values.index])
        low, high = np.clip(limits, *METRICS[metric].bounds)
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


def paired(
    table: pd.DataFrame, a: str, b: str, metric: str = "dice", by: str = "arm", tests: int = 1
) -> dict[str, object]:
    """Group `a` against group `b` on the same patients: mean difference a - b, and Wilcoxon's signed-rank test.

    The p-value is two-sided, exact up to 50 patients (13 with ties or zeros), else by the normal approximation; with
    fewer than 6 patients it cannot fall below 0.05. The verdict is "better" or "worse" only if p < 0.05 and the 95 %
    interval of the mean difference lies on that side of 0, else "inconclusive".

    Args:
        a, b: values of the column `by`.
        tests: size of the family that this test is one of, for `detectable` alone.

    Returns:
        a, b, n (patients where both are defined), difference, low, high (`interval`, of patients and trainings), p,
        effect (`rank_biserial`), superiority (probability that a beats b: the share of patients in whom it does, equal
        ones half), detectable (`detectable`), verdict.

    Raises:
        InputError: a group that is not there, cases that only one of both has, a metric without a better direction;
            see also `per_patient`.
    """
    difference, noise = _difference(table, a, b, metric, by)
    low, high = interval(difference, noise=noise)
    gain = difference if METRICS[metric].higher else -difference
    p = signed_rank(difference)
    return dict(
        a=a, b=b, n=len(difference), difference=np.mean(difference) if len(difference) else np.nan, low=low, high=high,
        p=p, effect=rank_biserial(difference),
        superiority=np.mean((gain > 0) + 0.5 * (gain == 0)) if len(gain) else np.nan,
        detectable=detectable(difference, tests), verdict=_verdict(p, low, high, metric),
    )  # fmt: skip


def _difference(table: pd.DataFrame, a: str, b: str, metric: str, by: str) -> tuple[np.ndarray, pd.DataFrame | None]:
    """a - b of every patient where both are defined, and its `seed_noise`."""
    wide = _by_patient(table, [a, b], metric, by)
    rows = rows_of(table, metric, [by])
    noise = seed_noise(*(rows[rows[by] == name] for name in (a, b)), metric=metric)
    difference = (wide[a] - wide[b]).round(12).to_numpy()  # rounded, so that means over seeds can tie
    return difference, None if noise is None else noise.reindex(wide.index)


def signed_rank(difference: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, zeros left out; 1 where all are 0, NaN for no differences."""
    if not len(difference):
        return np.nan
    return float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0


def rank_biserial(difference: np.ndarray) -> float:
    """Matched-pairs rank-biserial correlation (Kerby 2014): from -1, all differences negative, to 1, all positive.

    The sum of the ranks of the positive differences less that of the negative ones, over their sum; zeros are left out,
    as in the test that it belongs to. NaN where no difference is left.
    """
    difference = difference[difference != 0]
    if not len(difference):
        return np.nan
    ranked = stats.rankdata(np.abs(difference))
    return float((ranked * np.sign(difference)).sum() / ranked.sum())


def detectable(difference: np.ndarray, tests: int = 1) -> float:
    """The smallest mean difference that so many patients, who differ as these do, could have shown with 80 % power.

    For a two-sided paired t test at 0.05 / tests, with n times 3 / pi, the efficiency of the signed-rank test under
    normal differences. Infinite where n is so small that the exact test cannot reach that level, whatever the data.
    """
    n = len(difference)
    if n < 2 or 2.0 ** (1 - n) >= ALPHA / tests:
        return np.inf
    effect = TTestPower().solve_power(nobs=n * 3 / np.pi, alpha=ALPHA / tests, power=POWER)
    return float(np.squeeze(effect) * np.std(difference, ddof=1))


def _by_patient(table: pd.DataFrame, names: Sequence[str] | None, metric: str, by: str) -> pd.DataFrame:
    """One row a patient with a value in each of the groups `names` (None: all), one column a group; see `paired`."""
    _directed(metric)
    rows = rows_of(table, metric, [by])
    names = list(rows[by].unique()) if names is None else names
    for name in names:
        if name not in set(rows[by]):
            raise InputError(f"no {by} {name!r} in the table: it has {', '.join(map(str, rows[by].unique()))}")
    rows = rows[rows[by].isin(names)]
    for name in names:
        missing = sorted(set(rows["case"]) - set(rows.loc[rows[by] == name, "case"]))
        if missing:
            listed = ", ".join(map(str, missing))
            raise InputError(f"{by} {name!r} has no {metric} of cases {listed}: run the folds they are tested in")
    return per_patient(rows, metric, [by]).pivot(index="patient", columns=by, values="value").dropna()


def _directed(metric: str) -> None:
    """Raises InputError for a metric of which neither more nor less is better."""
    if metric not in METRICS or METRICS[metric].higher is None:
        directed = ", ".join(name for name, entry in METRICS.items() if entry.higher is not None)
        raise InputError(f"metric {metric!r} has no better direction to compare by: choose from {directed}")


def _verdict(p: float, low: float, high: float, metric: str) -> str:
    if not p < ALPHA or not (low > 0 or high < 0):
        return "inconclusive"
    return "better" if (low > 0) == METRICS[metric].higher else "worse"


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """p-values adjusted for the number of tests by Holm's step-down (Scand J Stat 1979); a NaN counts as a test."""
    p = np.asarray(pvalues, float)
    return np.where(np.isnan(p), np.nan, multipletests(np.nan_to_num(p, nan=1.0), method="holm")[1])


def compare(
    table: pd.DataFrame, pairs: Sequence[tuple[str, str]], metric: str = "dice", by: str = "arm"
) -> pd.DataFrame:
    """`paired` for every (a, b), with p adjusted by Holm over all of them (`p_holm`) and the verdict from that.

    The smallest difference that could have been shown is that of Holm's first step, at 0.05 / number of pairs. Of 2000
    simulated families of 19 arms no different from their reference, at most 4.0 % (14, 24 and 41 patients) hold a
    verdict other than inconclusive; at 8 patients and fewer none can (`benchmarks/coverage.py`).
    """
    if not pairs:
        raise InputError("no pairs to compare: give at least one (a, b)")
    rows = pd.DataFrame([paired(table, a, b, metric, by, len(pairs)) for a, b in pairs])
    rows.insert(rows.columns.get_loc("p") + 1, "p_holm", holm(rows["p"]))
    rows["verdict"] = [_verdict(row.p_holm, row.low, row.high, metric) for row in rows.itertuples()]
    return rows


def non_inferiority(
    table: pd.DataFrame, pairs: Sequence[tuple[str, str]], margin: float, metric: str = "dice", by: str = "arm"
) -> pd.DataFrame:
    """Whether each a, say a student, is worse than its b, say its teacher, by less than a margin on the same patients.

    The verdict is "non-inferior" if the 95 % interval of the mean difference lies wholly on the better side of the
    margin (as CONSORT has it, Piaggio et al. 2012) and the signed-rank test of the differences against the margin
    agrees, at p < 0.05 (two-sided, so 0.025 on the one side) after Holm's step-down over the pairs; "inferior" if both
    say the opposite; else "inconclusive". The margin has to be stated before the results are seen.

    Args:
        pairs: (a, b), values of the column `by`.
        margin: largest loss that would not matter, in the metric's unit; positive.

    Returns:
        a, b, n, margin, difference, low, high, p (against the margin), p_holm, verdict.

    Raises:
        InputError: no pairs, a margin that is not positive; see also `paired`.
    """
    if not pairs or not margin > 0:
        raise InputError(f"{len(pairs)} pairs, margin {margin}: give at least one (a, b), and a margin above 0")
    _directed(metric)
    edge, rows = -margin if METRICS[metric].higher else margin, []
    for a, b in pairs:
        difference, noise = _difference(table, a, b, metric, by)
        low, high = interval(difference, noise=noise)
        mean, p = np.mean(difference) if len(difference) else np.nan, signed_rank((difference - edge).round(12))
        rows.append(dict(a=a, b=b, n=len(difference), margin=margin, difference=mean, low=low, high=high, p=p))
    found = pd.DataFrame(rows)
    found["p_holm"] = holm(found["p"])
    words = {"better": "non-inferior", "worse": "inferior"}
    verdicts = [_verdict(row.p_holm, row.low - edge, row.high - edge, metric) for row in found.itertuples()]
    return found.assign(verdict=[words.get(verdict, verdict) for verdict in verdicts])


def ranks(
    table: pd.DataFrame,
    by: str = "arm",
    metric: str = "dice",
    resamples: int = 2000,
    seed: int = 0,
    reference: str | None = None,
) -> pd.DataFrame:
    """The rank of every group's mean over the same patients, and how far it hangs on which patients those were.

    Patients are drawn anew, with replacement and for all groups at once, and the groups ranked by their means in each
    resample (as Wiesenfarth et al. 2021 rank challenge results, arXiv 1910.05121). Equal means share the mean of their
    ranks, and a first place.

    Args:
        table: tidy.
        by: column that makes the groups.
        metric: a metric with a better direction.
        resamples: bootstrap samples of the patients.
        seed: of the samples.
        reference: group that the others are held against.

    Returns:
        best first, columns: `by`; n (patients with a defined value in every group); mean; rank of the mean, 1 the best;
        rank_low and rank_high, its 95 % percentile interval; first, the share of resamples in which the group has rank
        1; and with a reference beats, the share in which its mean is better than the reference's (equal counts half;
        NaN for the reference).

    Raises:
        InputError: as `paired`, for the cases that any group has; no patient is defined in every group.
    """
    wide = _by_patient(table, None, metric, by)
    names, n = [name for name in table[by].unique() if name in wide], len(wide)
    if not n:
        raise InputError(f"no patient has a defined {metric} in every {by}: rank fewer of them, or another metric")
    if reference is not None and reference not in names:
        raise InputError(f"no {by} {reference!r} in the table to be the reference: it has {', '.join(map(str, names))}")
    values = wide[names].to_numpy() * (-1 if METRICS[metric].higher else 1)  # the best is the lowest, as its rank is
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    means = (drawn @ values / n).round(12)  # rounded, so that equal groups tie
    found = stats.rankdata(means, axis=1)
    winners = means == means.min(axis=1, keepdims=True)
    low, high = np.quantile(found, [0.025, 0.975], axis=0, method="inverted_cdf")  # ranks that did occur
    result = pd.DataFrame({by: names, "n": n, "mean": wide[names].mean().to_numpy()})
    result["rank"] = stats.rankdata(values.mean(axis=0).round(12))
    result["rank_low"], result["rank_high"] = low, high
    result["first"] = (winners / winners.sum(axis=1, keepdims=True)).mean(axis=0)
    if reference is not None:
        level = means[:, [names.index(reference)]]
        result["beats"] = ((means < level) + 0.5 * (means == level)).mean(axis=0)
        result.loc[result[by] == reference, "beats"] = np.nan
    return result.sort_values("rank", kind="stable", ignore_index=True)


def thesis_row(arm: str) -> pd.Series:
    """The thesis's numbers for an arm, NaN where it has none; its baselines' label fraction is not recorded."""
    return THESIS_TABLE.reindex([arm.split(" (")[0]]).iloc[0]


def pivot_thesis(table: pd.DataFrame, params: Mapping[str, int]) -> pd.DataFrame:
    """The results in the form of the thesis's Table 4.2, its own numbers beside them.

    Args:
        table: tidy.
        params: arm -> number of parameters.

    Returns:
        one row an arm: the columns of `THESIS_COLUMNS` (means with their 95 % interval as text, n patients of the Dice), and
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


def to_latex(table: pd.DataFrame, path: Path | str, caption: str, label: str, bold: Sequence[str] = ()) -> Path:
    """Writes a booktabs table; text is escaped, so cells, headings and caption are plain text.

    Bold are the name and the difference of rows with a verdict for them ("better", "non-inferior"), never a row for
    being the largest: an inconclusive lead is none.

    Args:
        bold: names (of the index, else of the first column) to set in bold in a table without verdicts.
    """
    named = not isinstance(table.index, pd.RangeIndex)
    names = table.index.to_series() if named else table.iloc[:, 0]
    won = (names.isin(bold) | table.get("verdict", names).isin(DECIDED)).to_numpy()
    marks = pd.DataFrame("", index=table.index, columns=table.columns)
    marks.loc[won, [column for column in table if column == "difference" or not named and column == names.name]] = BOLD
    whole = [c for c in table if is_numeric_dtype(table[c]) and (table[c].dropna() % 1 == 0).all()]
    style = table.style.format(_printed, na_rep="--", escape="latex").format("{:.0f}", subset=whole, na_rep="--")
    style = style.format(_printed_p, subset=[c for c in table if c in ("p", "p_holm", "p_adjusted")], na_rep="--")
    style = style.apply(lambda _: marks, axis=None).format_index(escape="latex", axis=1)
    style = style.format_index(escape="latex", axis=0).apply_index(lambda index: np.where(won, BOLD, ""), axis=0)
    style = style.hide(axis="index", names=named)  # their names, or all of it
    escaped = caption.translate({ord(sign): f"\\{sign}" for sign in "%&_#$"})
    text = style.to_latex(hrules=True, caption=escaped, label=label, position_float="centering")
    Path(path).write_text(text, encoding="utf-8")
    return Path(path)


def _printed(value: object) -> object:
    """A cell of a LaTeX table: numbers with three digits and a minus that is one."""
    if not isinstance(value, float):
        return value
    return "$\\infty$" if np.isinf(value) else f"{value:.3f}".replace("-", "$-$")


def _printed_p(value: float) -> str:
    return "$<$0.001" if value < 0.0005 else f"{value:.3f}"


def save_table(
    table: pd.DataFrame,
    folder: Path | str,
    name: str,
    caption: str,
    printed: Sequence[str] | None = None,
    bold: Sequence[str] = (),
) -> list[Path]:
    """Writes `<name>.csv` with all columns and `<name>.tex` with those in `printed` (None: all); returns both paths.

    `bold`: see `to_latex`, which takes them from a printed column `verdict` too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=not isinstance(table.index, pd.RangeIndex))
    chosen = table if printed is None else table[list(printed)]
    return [folder / f"{name}.csv", to_latex(chosen, folder / f"{name}.tex", caption, f"tab:{name}", bold)]


def overlap_weights(table: pd.DataFrame, by: str = "arm", pooled: bool = False) -> pd.DataFrame:
    """Dice of every (group, patient) with its weight in the group's mean.

    A patient's weight is 1; `pooled`, it is the volume of both masks, so that the weighted mean is the Dice of the
    voxels of all patients together, as the published study has it: Dice = 2 |A B| / (|A| + |B|) of sums.

    Args:
        table: tidy, of one class, with dice, truth_volume and volume_error of every case.

    Returns:
        columns of `by`, patient, dice and weight; seeds are averaged.
    """
    if not pooled:
        return per_patient(table, "dice", [by]).rename(columns={"value": "dice"}).assign(weight=1.0)
    if table["class"].nunique() > 1:
        raise InputError("pooled Dice: several classes; filter the table to one")
    wide = table.pivot_table(index=[by, "patient", "seed", "case"], columns="metric", values="value", sort=False)
    weight = (2 * wide["truth_volume"] + wide["volume_error"]).rename("weight")
    found = pd.DataFrame({"weight": weight, "shared": weight * wide["dice"]})
    found = found.groupby([by, "patient", "seed"], sort=False).sum().groupby([by, "patient"], sort=False).mean()
    dice = (found["shared"] / found["weight"]).fillna(1.0)  # two empty masks: right, and without weight
    return found.assign(dice=dice).drop(columns="shared").reset_index()


def _aligned(groups: Sequence[pd.DataFrame]) -> np.ndarray:
    """Dice and weight of the same patients in each of some groups: (groups x 2 x patients)."""
    first = groups[0].set_index("patient")
    parts = []
    for group in groups:
        group = group.set_index("patient")
        if other := set(first.index) ^ set(group.index):
            raise InputError(f"patients {', '.join(sorted(other))} are not in both: run their folds")
        parts.append(group.loc[first.index, ["dice", "weight"]].to_numpy(float).T)
    return np.stack(parts)


def _changes(values: np.ndarray, pairs: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """For each pair of groups of `_aligned`: n, dice of the first, difference to the second, low, high, p_adjusted and
    verdict."""
    n, rows = values.shape[-1], []
    drawn = np.random.default_rng(0).integers(n, size=(9999, n))
    for pair in pairs:
        dice, weight = values[list(pair)].transpose(1, 0, 2)
        means, shares = _weighted(dice, weight)
        difference, share = means[0] - means[1], shares[0] - shares[1]
        low = high = difference if n > 1 else np.nan
        if np.ptp(share) > 1e-12:
            several, parts = _weighted(dice[:, drawn], weight[:, drawn])
            spreads = (parts[0] - parts[1]).std(axis=1)
            low, high = _studentised(difference, share.std(), several[0] - several[1], spreads, n, 0.95)
        rows.append(dict(n=n, dice=means[0], difference=difference, low=low, high=high))
    found = pd.DataFrame(rows).assign(p_adjusted=_swapped(values, pairs))
    return found.assign(verdict=[_verdict(row.p_adjusted, row.low, row.high, "dice") for row in found.itertuples()])


def _weighted(dice: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean over the last axis, 1 without any weight (empty masks are right), and each patient's influence."""
    total = weight.sum(axis=-1, keepdims=True)
    mean = np.divide((dice * weight).sum(axis=-1, keepdims=True), total, out=np.ones(total.shape), where=total > 0)
    share = np.divide(weight * dice.shape[-1], total, out=np.zeros(weight.shape), where=total > 0)
    return mean[..., 0], share * (dice - mean)


def _swapped(values: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Two-sided p of each pair's difference, adjusted for the family: how often the largest of all differences, each in
    its own standard deviations, is as large when patients' two values are swapped at random, in all pairs at once
    (Westfall & Young 1993). All swaps up to 13 patients, else 9999.

    Weights are swapped too, made alike first, so that a stage with weights can be held against one without.
    """
    n = values.shape[-1]
    every = n <= 13
    swaps = np.array(list(itertools.product([False, True], repeat=n))) if every else np.zeros((10_000, n), bool)
    if not every:
        swaps[1:] = np.random.default_rng(0).random((9999, n)) < 0.5  # the first are the values as they are
    dice, weight = values.transpose(1, 0, 2)
    weight = weight / np.maximum(weight.mean(axis=-1, keepdims=True), 1e-12)
    sizes = []
    for a, b in pairs:
        one, other = (
            _weighted(np.where(swaps, dice[j], dice[i]), np.where(swaps, weight[j], weight[i]))[0]
            for i, j in ((a, b), (b, a))
        )
        difference = np.abs(one - other).round(12)
        sizes.append(difference / max(np.sqrt(np.mean(difference**2)), 1e-12))
    largest = np.max(sizes, axis=0)
    return np.array([np.mean(largest >= size[0] - 1e-9) for size in sizes])


def _of_stage(table: pd.DataFrame, stage: str, pooled: Sequence[str]) -> pd.DataFrame:
    rows = table[table["protocol"] == stage]
    if rows.empty:
        raise InputError(f"no stage {stage!r} in the table: it has {', '.join(table['protocol'].unique())}")
    return overlap_weights(rows, "protocol", stage in pooled)


def step_changes(table: pd.DataFrame, stages: Sequence[str], pooled: Sequence[str]) -> pd.DataFrame:
    """The bridge: how the Dice of one arm changes from stage to stage of the protocol.

    Args:
        table: tidy, of one arm and one class, with the stage as `protocol`.
        stages: in order, the first the published protocol.
        pooled: the stages whose Dice is that of pooled voxels.

    Returns:
        one row a stage and a last one, "corrected", for the whole way: step, dice, difference to the stage before (of
        the last row to the first stage), its 95 % interval (studentised bootstrap of the patients), p_adjusted (of
        the patients' values swapped at random, for all rows together), verdict (as `paired` has it) and n.

    Raises:
        InputError: a stage is missing, or has other patients than the one before.
    """
    values = _aligned([_of_stage(table, stage, pooled) for stage in stages])
    last = len(stages) - 1
    found = _changes(values, [(0, 0), *((stage, stage - 1) for stage in range(1, last + 1)), (last, 0)])
    found.loc[0, ["difference", "low", "high", "p_adjusted", "verdict"]] = np.nan  # the first stage is no change
    found.insert(0, "step", [*stages, "corrected"])
    return found[["step", "dice", "difference", "low", "high", "p_adjusted", "verdict", "n"]]


def gains(
    table: pd.DataFrame, arm: str, references: Sequence[str], stages: Sequence[str], pooled: Sequence[str]
) -> pd.DataFrame:
    """What an arm is worth at every stage of the bridge, against each reference on the same patients.

    Args:
        table: tidy, of one class, with the stage as `protocol`.
        arm, references: values of the column `arm`.
        stages, pooled: as for `walk`.

    Returns:
        one row a (stage, reference): stage, reference, dice of the arm, difference to the reference, its 95 %
        interval, p_adjusted and verdict (as for `walk`) and n.

    Raises:
        InputError: as `walk`.
    """
    groups, pairs, names = [], [], []
    for stage in stages:
        own = len(groups)
        groups += [_of_stage(table[table["arm"] == name], stage, pooled) for name in (arm, *references)]
        pairs += [(own, own + number) for number in range(1, len(references) + 1)]
        names += [dict(stage=stage, reference=reference) for reference in references]
    found = pd.DataFrame(names).join(_changes(_aligned(groups), pairs))
    return found[["stage", "reference", "dice", "difference", "low", "high", "p_adjusted", "verdict", "n"]]


def gradient_diagnostics(history: pd.DataFrame) -> pd.DataFrame:
    """What each distillation term did in the last epoch, one row an (arm, term), mean over runs.

    Returns:
        arm, term, value (unweighted), share (of the gradient on the student), cosine (of its gradients of two
        successive steps; NaN where a gradient is 0), chance (InfoNCE over ln N; NaN for others), moved (of its learned
        projectors in the epoch, relative to their norm; NaN without any), and alive: "yes", or what is wrong with it.
    """
    last = history[history["epoch"] == history.groupby("run")["epoch"].transform("max")]
    wide = last.pivot_table(index="arm", columns="name", values="value", sort=False)
    terms = [name.removeprefix("share/") for name in wide if name.startswith("share/")]
    kinds, rows = ("share", "cosine", "chance", "moved"), []
    for arm in wide.index:
        for term in terms:
            found = {kind: wide.loc[arm].get(f"{kind}/{term}", np.nan) for kind in kinds}
            if term != "segmentation" and not np.isnan(found["share"]):
                value = wide.loc[arm, term]
                alive = "always 0" if value == 0 else "no gradient" if found["share"] == 0 else "yes"
                rows.append(dict(arm=arm, term=term, value=value) | found | dict(alive=alive))
    return pd.DataFrame(rows)
