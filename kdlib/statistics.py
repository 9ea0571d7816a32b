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
    wide = _by_patient(table, [a, b], metric, by)
    difference = (wide[a] - wide[b]).round(12).to_numpy()  # rounded, so that means over seeds can tie
    low, high = interval(difference)
    p = mean = np.nan
    if len(difference):
        mean = float(difference.mean())
        p = float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0
    verdict = _verdict(p, low, high, metric)
    return dict(a=a, b=b, n=len(difference), difference=mean, low=low, high=high, p=p, verdict=verdict)


def _by_patient(table: pd.DataFrame, names: Sequence[str] | None, metric: str, by: str) -> pd.DataFrame:
    """One row a patient with a value in each of the groups `names` (None: all), one column a group; see `paired`."""
    if metric not in METRICS or METRICS[metric].higher is None:
        directed = ", ".join(name for name, entry in METRICS.items() if entry.higher is not None)
        raise InputError(f"metric {metric!r} has no better direction to compare by: choose from {directed}")
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


def _resampled(a: pd.DataFrame, b: pd.DataFrame, level: float, resamples: int = 9999) -> dict[str, object]:
    """Weighted mean of `a`, its difference to that of `b` on the same patients, and the difference's interval."""
    a, b = (group.set_index("patient")[["dice", "weight"]] for group in (a, b))
    if set(a.index) != set(b.index):
        raise InputError(f"patients {', '.join(sorted(set(a.index) ^ set(b.index)))} are not in both: run their folds")
    b = b.loc[a.index]
    drawn = np.random.default_rng(0).integers(len(a), size=(resamples, len(a)))

    def means(group: pd.DataFrame) -> tuple[float, np.ndarray]:
        dice, weight = group["dice"].to_numpy(), group["weight"].to_numpy()
        total = weight[drawn].sum(1)
        several = np.divide((dice * weight)[drawn].sum(1), total, out=np.ones(resamples), where=total > 0)
        return float(np.average(dice, weights=weight)) if weight.any() else 1.0, several

    (here, some), (there, others) = means(a), means(b)
    low, high = np.quantile(some - others, [0.025, 0.975])
    strict = np.quantile(some - others, [(1 - level) / 2, (1 + level) / 2])
    verdict = "better" if strict[0] > 0 else "worse" if strict[1] < 0 else "inconclusive"
    verdict = "inconclusive" if len(a) < 6 else verdict  # so few patients leave a bootstrap interval far too short
    return dict(n=len(a), dice=here, difference=here - there, low=float(low), high=float(high), verdict=verdict)


def _of_stage(table: pd.DataFrame, stage: str, pooled: Sequence[str]) -> pd.DataFrame:
    rows = table[table["protocol"] == stage]
    if rows.empty:
        raise InputError(f"no stage {stage!r} in the table: it has {', '.join(table['protocol'].unique())}")
    return overlap_weights(rows, "protocol", stage in pooled)


def walk(table: pd.DataFrame, stages: Sequence[str], pooled: Sequence[str]) -> pd.DataFrame:
    """The bridge: how the Dice of one arm changes from stage to stage of the protocol.

    Args:
        table: tidy, of one arm and one class, with the stage as `protocol`.
        stages: in order, the first the published protocol.
        pooled: the stages whose Dice is that of pooled voxels.

    Returns:
        one row a stage and a last one, "corrected", for the whole way: step, dice, difference to the stage before (of
        the last row to the first stage), its 95 % bootstrap interval over patients (percentile, 9999 resamples),
        verdict (of the interval at 1 - 0.05 / number of steps, by Bonferroni; inconclusive below 6 patients) and n.

    Raises:
        InputError: a stage is missing, or has other patients than the one before.
    """
    values = [_of_stage(table, stage, pooled) for stage in stages]
    level = 1 - ALPHA / (len(stages) - 1)
    rows = [dict(step=stages[0], dice=_resampled(values[0], values[0], level)["dice"], n=len(values[0]))]
    for stage, before, after in zip(stages[1:], values[:-1], values[1:], strict=True):
        rows.append(dict(step=stage) | _resampled(after, before, level))
    rows.append(dict(step="corrected") | _resampled(values[-1], values[0], level))
    return pd.DataFrame(rows)[["step", "dice", "difference", "low", "high", "verdict", "n"]]


def gains(
    table: pd.DataFrame, arm: str, references: Sequence[str], stages: Sequence[str], pooled: Sequence[str]
) -> pd.DataFrame:
    """What an arm is worth at every stage of the bridge, against each reference on the same patients.

    Args:
        table: tidy, of one class, with the stage as `protocol`.
        arm, references: values of the column `arm`.
        stages, pooled: as for `walk`.

    Returns:
        one row a (stage, reference): stage, reference, dice of the arm, difference to the reference, its 95 % bootstrap
        interval, verdict (by Bonferroni over all rows) and n.
    """
    level, rows = 1 - ALPHA / (len(stages) * len(references)), []
    for stage in stages:
        for reference in references:
            pair = [_of_stage(table[table["arm"] == name], stage, pooled) for name in (arm, reference)]
            rows.append(dict(stage=stage, reference=reference) | _resampled(*pair, level))
    return pd.DataFrame(rows)[["stage", "reference", "dice", "difference", "low", "high", "verdict", "n"]]


def liveness(history: pd.DataFrame) -> pd.DataFrame:
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
