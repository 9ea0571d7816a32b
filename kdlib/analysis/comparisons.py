"""Comparisons of methods on the same patients: paired tests, non-inferiority, ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from kdlib.analysis.intervals import canonical_order, interval, seed_noise
from kdlib.analysis.labels import IDENTITY, method_labels, methods
from kdlib.analysis.patients import per_patient, rows_of, volumes
from kdlib.config import InputError
from kdlib.metrics import METRICS

ALPHA = 0.05
POWER = 0.8  # of the minimum detectable difference
SAME = {"dice": 0.01}  # metric -> mean difference that would not matter: half of what distillation is hoped to bring
COMPARISON_COLUMNS = [  # of `compare`, to print
    "label_a", "label_b", "n", "difference", "low", "high", "p_holm", "smallest_p", "effect", "verdict",
]  # fmt: skip


def paired(table: pd.DataFrame, a: str, b: str, metric: str = "dice", tests: int = 1) -> dict[str, object]:
    """Method `a` against method `b` on the same patients: mean difference a - b, and Wilcoxon's signed-rank test.

    The p-value is two-sided, exact up to 50 patients (13 with ties or zeros), else by the normal approximation; with
    fewer than 6 patients it cannot fall below 0.05. The verdict is "better" or "worse" only if p < 0.05 and the 95 %
    interval of the mean difference lies on that side of 0, else "inconclusive".

    Args:
        a, b: values of the column `method`.
        tests: size of the family that this test is one of, for `minimum_detectable` alone.

    Returns: a, b, n (patients where both are defined), volumes, difference, low, high and interval (`interval`, of
        patients and trainings), p, effect (`rank_biserial`), superiority (probability that a beats b: the share of
        patients in whom it does, equal ones half), minimum_detectable (`minimum_detectable_difference`), verdict.

    Raises: InputError: a group that is not there, cases that only one of both has, a metric without a better direction;
        see also `per_patient`.
    """
    difference, found = _difference(table, a, b, metric)
    gain = difference if METRICS[metric].higher else -difference
    p = signed_rank(difference)
    return found | dict(
        p=p, effect=rank_biserial(difference),
        superiority=np.mean((gain > 0) + 0.5 * (gain == 0)) if len(gain) else np.nan,
        minimum_detectable=minimum_detectable_difference(difference, tests),
        verdict=verdict(p, found["low"], found["high"], metric),
    )  # fmt: skip


def _difference(table: pd.DataFrame, a: str, b: str, metric: str) -> tuple[np.ndarray, dict[str, object]]:
    """a - b of every patient where both are defined; and a, b, n, volumes, difference (their mean) and its interval."""
    wide = by_patient(table, [a, b], metric)
    rows = rows_of(table, metric, ["method"])
    parts = [rows[rows["method"] == name] for name in (a, b)]
    noise = seed_noise(*parts, metric=metric)
    difference = (wide[a] - wide[b]).round(12).to_numpy()  # rounded, so that means over seeds can tie
    seen = parts[0][parts[0]["patient"].isin(wide.index)]
    low, high, kind = interval(difference, noise=None if noise is None else noise.reindex(wide.index))
    mean = difference.mean() if len(difference) else np.nan
    about = dict(a=a, b=b, n=len(difference), volumes=volumes(seen), difference=mean)
    return difference, about | dict(low=low, high=high, interval=kind)


def by_patient(table: pd.DataFrame, names: Sequence[str] | None, metric: str = "dice") -> pd.DataFrame:
    """One row per patient with a value in each of the methods `names` (None: all), a column per method."""
    if metric not in METRICS or METRICS[metric].higher is None:
        directed = ", ".join(name for name, entry in METRICS.items() if entry.higher is not None)
        raise InputError(f"metric {metric!r} has no better direction to compare by: choose from {directed}")
    rows = rows_of(table, metric, ["method"])
    known = list(rows["method"].unique())
    for name in names or ():
        if name not in known:
            raise InputError(f"no method {name!r} in the table: it has {', '.join(known)}")
    rows = rows if names is None else rows[rows["method"].isin(names)]
    for name in rows["method"].unique():
        if missing := sorted(set(rows["case"]) - set(rows.loc[rows["method"] == name, "case"])):
            listed = ", ".join(map(str, missing))
            raise InputError(f"method {name!r} has no {metric} of cases {listed}: run the folds they are tested in")
    return per_patient(rows, metric).pivot(index="patient", columns="method", values="value").dropna()


def signed_rank(difference: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, zeros left out; 1 where all are 0, NaN for no differences."""
    if not len(difference):
        return np.nan
    return float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0


def smallest_p(n: int, tests: int = 1) -> float:
    """The smallest two-sided p that n patients allow, adjusted for the number of tests (Holm's first step).

    2 / 2^n for the signed-rank test (all patients change in one direction), as for a permutation of paired values.
    """
    return float(min(1.0, tests * 2.0 ** (1 - n)))


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


def minimum_detectable_difference(difference: np.ndarray, tests: int = 1) -> float:
    """The smallest mean difference that so many patients, who differ as these do, could have shown with 80 % power.

    For a two-sided paired t test at 0.05 / tests, with n times 3 / pi, the efficiency of the signed-rank test under
    normal differences. Infinite where n is so small that the exact test cannot reach that level, whatever the data.
    """
    n = len(difference)
    if n < 2 or smallest_p(n) >= ALPHA / tests:
        return np.inf
    effect = TTestPower().solve_power(nobs=n * 3 / np.pi, alpha=ALPHA / tests, power=POWER)
    return float(np.squeeze(effect) * np.std(difference, ddof=1))


def verdict(p: float, low: float, high: float, metric: str) -> str:
    """ "better" or "worse" where test and interval agree, else "inconclusive"."""
    if not p < ALPHA or not (low > 0 or high < 0):
        return "inconclusive"
    return "better" if (low > 0) == METRICS[metric].higher else "worse"


def baseline_pairs(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Every distilled student and control with the same student alone: same labels, length and dimensions.

    Returns: pairs (method, baseline) of values of the column `method`.

    Raises: InputError: the table holds no such pair.
    """
    found = methods(table).reset_index()
    alone, others = found[found["role"] == "baseline"], found[found["role"].isin(["distilled", "control"])]
    same = ["model", "fraction", "length", "dimensions"]
    pairs = others.merge(alone.drop_duplicates(same, keep="last"), on=same)
    if pairs.empty:
        raise InputError(
            "no distilled student or control beside the same student alone, on the same labels: train both"
        )
    return list(zip(pairs["method_x"], pairs["method_y"], strict=True))


def term_effects(table: pd.DataFrame) -> pd.DataFrame:
    """What each distillation term is worth on average over all subsets of the others, the main effects of a full
    factorial design: `compare` of the mean of the students that learn by it with that of those that do not.

    Args:
        table: tidy, of one student and share of labels: alone, and distilled by every subset of the terms.

    Raises: InputError: a subset is missing, or there twice.
    """
    about = methods(table)
    learned = about.loc[about["role"].isin(["baseline", "distilled"]), "terms"].str.split("+")
    names = [name for name in dict.fromkeys(learned.explode()) if name]
    subsets = list(map(frozenset, learned))
    if not names or not len(set(subsets)) == len(subsets) == 2 ** len(names):
        told = f"{len(subsets)} students learn by {len(set(subsets))} subsets of {len(names)} terms"
        raise InputError(f"{told}: an ablation takes each of the {2 ** len(names)} once")
    rows, place = table[table["metric"] == "dice"], ["fold", "seed", "patient", "case", "class", "metric"]
    parts = []
    for name in names:
        kind = {method: f"{'with' if name in found else 'without'} {name}" for method, found in learned.items()}
        kinds = rows.assign(method=rows["method"].map(kind)).groupby(["method", *place], sort=False, as_index=False)
        parts.append(kinds["value"].mean())
    return compare(pd.concat(parts), [(f"with {name}", f"without {name}") for name in names])


def image_pairs(table: pd.DataFrame) -> list[tuple[str, str]]:
    """What asks whether unlabelled images help by the teacher or by themselves: distillation on all images with that on
    the labelled ones, both that and pseudo-labels with self-consistency, which has the images and no teacher, and this
    with the control that does not use them but has as few labelled slices in each step.

    Returns: pairs of values of the column `method`, of one student, label fraction and length each; none where no image
        was unlabelled.
    """
    pairs = []
    for _, rows in methods(table).groupby(["model", "fraction", "length"], sort=False):
        distilled = rows[rows["role"] == "distilled"]
        everywhere, labelled = (distilled.index[distilled["unlabelled"] == kind] for kind in (True, False))
        kinds = "pseudo_labels", "self_consistency", "unused_images"
        pseudo, alone, unused = (rows.index[rows["control"] == kind] for kind in kinds)
        pairs += [*product(everywhere, labelled), *product([*everywhere, *pseudo], alone), *product(alone, unused)]
    return pairs


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """p-values adjusted for the number of tests by Holm's step-down (Scand J Stat 1979); a NaN counts as a test."""
    p = np.asarray(pvalues, float)
    return np.where(np.isnan(p), np.nan, multipletests(np.nan_to_num(p, nan=1.0), method="holm")[1])


def compare(table: pd.DataFrame, pairs: Sequence[tuple[str, str]], metric: str = "dice") -> pd.DataFrame:
    """`paired` for every (a, b), with p adjusted by Holm over all of them (`p_holm`) and the verdict from that.

    Where nothing is decided so, the interval of the mean difference lies wholly within `SAME` of 0 (as in a test of
    equivalence, Schuirmann 1987), and so many patients could have decided otherwise, the verdict is "equivalent".

    `label_a` and `label_b` are what a reader sees; `smallest_p` is the least adjusted p that n patients allow. The
    minimum detectable difference is that of Holm's first step, at 0.05 / number of pairs. Of 2000 simulated families
    of 19 methods no different from their reference, at most 4.0 % (14, 24 and 41 patients) find one better or
    worse; at 8 patients and fewer none can (`benchmarks/coverage.py`).
    """
    if not pairs:
        raise InputError("no pairs to compare: give at least one (a, b)")
    found = pd.DataFrame([paired(table, a, b, metric, len(pairs)) for a, b in pairs])
    return _decided(found, method_labels(table), metric)


def compare_classes(table: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """`compare` of every pair of methods class by class (organ by organ): one family of tests over classes and pairs.

    Returns: as `compare`, with the column "class" first.
    """
    classes = list(table.groupby("class", sort=False))
    tests = len(classes) * len(pairs)
    rows = [{"class": name} | paired(of, a, b, tests=tests) for name, of in classes for a, b in pairs]
    return _decided(pd.DataFrame(rows), method_labels(table), "dice")


def _decided(found: pd.DataFrame, labels: Mapping[object, str], metric: str) -> pd.DataFrame:
    """A family of `paired` comparisons with their adjusted p, and the verdicts from that; see `compare`."""
    found = _adjusted(found, labels)
    decided = pd.Series([verdict(row.p_holm, row.low, row.high, metric) for row in found.itertuples()], found.index)
    same = found["low"].gt(-SAME.get(metric, 0)) & found["high"].lt(SAME.get(metric, 0)) & (found["smallest_p"] < ALPHA)
    return found.assign(verdict=decided.mask(same & (decided == "inconclusive"), "equivalent"))


def _adjusted(found: pd.DataFrame, labels: dict[object, str]) -> pd.DataFrame:
    """With p_holm and smallest_p beside p, and the labels of a and b beside them."""
    place = found.columns.get_loc("p") + 1
    found.insert(place, "smallest_p", [smallest_p(n, len(found)) for n in found["n"]])
    found.insert(place, "p_holm", holm(found["p"]))
    found.insert(2, "label_b", found["b"].map(labels))
    found.insert(2, "label_a", found["a"].map(labels))
    return found


def non_inferiority(
    table: pd.DataFrame, pairs: Sequence[tuple[str, str]], margin: float, metric: str = "dice"
) -> pd.DataFrame:
    """Whether each a, say a student, is worse than its b, say its teacher, by less than a margin on the same patients.

    The verdict is "non-inferior" if the 95 % interval of the mean difference lies wholly on the better side of the
    margin (as CONSORT has it, Piaggio et al. 2012) and the signed-rank test of the differences against the margin
    agrees, at p < 0.05 (two-sided, so 0.025 on the one side) after Holm's step-down over the pairs; "inferior" if both
    say the opposite; else "inconclusive". The margin has to be stated before the results are seen.

    Args:
        pairs: (a, b), values of the column `method`.
        margin: largest loss that would not matter, in the metric's unit; positive.

    Returns: a, b, label_a, label_b, n, volumes, margin, difference, low, high, interval, p (against the margin),
        p_holm, smallest_p, verdict.

    Raises: InputError: no pairs, a margin that is not positive; see also `paired`.
    """
    if not pairs or not margin > 0:
        raise InputError(f"{len(pairs)} pairs, margin {margin}: give at least one (a, b), and a margin above 0")
    differences, rows = zip(*(_difference(table, a, b, metric) for a, b in pairs), strict=True)
    edge = -margin if METRICS[metric].higher else margin
    p = [signed_rank((difference - edge).round(12)) for difference in differences]
    found = _adjusted(pd.DataFrame(list(rows)).assign(p=p), method_labels(table))
    found.insert(found.columns.get_loc("difference"), "margin", margin)
    words = {"better": "non-inferior", "worse": "inferior"}
    verdicts = [verdict(row.p_holm, row.low - edge, row.high - edge, metric) for row in found.itertuples()]
    return found.assign(verdict=[words.get(word, word) for word in verdicts])


def ranks(
    table: pd.DataFrame, metric: str = "dice", resamples: int = 2000, seed: int = 0, reference: str | None = None
) -> pd.DataFrame:
    """The rank of every method's mean over the same patients, and how far it hangs on which patients those were.

    Patients are drawn anew, with replacement and for all methods at once, and the methods ranked by their means in each
    resample (as Wiesenfarth et al. 2021 rank challenge results, arXiv 1910.05121). Equal means share the mean of their
    ranks, and a first place.

    Args:
        table: tidy.
        metric: a metric with a better direction.
        resamples: bootstrap samples of the patients.
        seed: of the samples.
        reference: method that the others are compared with.

    Returns: best first, columns: method; label; n (patients with a defined value in every method); mean; rank of the
        mean, 1 the best; rank_low and rank_high, its 95 % percentile interval; first, the share of resamples in which
        the method has rank 1; with a reference beats, the share in which its mean is better than the reference's (equal
        counts half; NaN for the reference); and the identity columns.

    Raises: InputError: as `paired`, for the cases that any method has; no patient is defined in every method.
    """
    wide = by_patient(table, None, metric)
    names, n = [name for name in table["method"].unique() if name in wide], len(wide)
    if not n:
        raise InputError(f"no patient has a defined {metric} in every method: rank fewer of them, or another metric")
    if reference is not None and reference not in names:
        raise InputError(f"no method {reference!r} in the table to be the reference: it has {', '.join(names)}")
    wide = wide.iloc[canonical_order(wide[sorted(names)].to_numpy())]
    values = wide[names].to_numpy() * (-1 if METRICS[metric].higher else 1)  # the best is the lowest, as its rank is
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    means = (drawn @ values / n).round(12)  # rounded, so that equal groups tie
    found = stats.rankdata(means, axis=1)
    winners = means == means.min(axis=1, keepdims=True)
    low, high = np.quantile(found, [0.025, 0.975], axis=0, method="inverted_cdf")  # ranks that did occur
    labels = method_labels(table)
    result = pd.DataFrame({
        "method": names, "label": [labels[name] for name in names], "n": n, "mean": wide[names].mean().to_numpy(),
        "rank": stats.rankdata(values.mean(axis=0).round(12)), "rank_low": low, "rank_high": high,
        "first": (winners / winners.sum(axis=1, keepdims=True)).mean(axis=0),
    })  # fmt: skip
    if reference is not None:
        level = means[:, [names.index(reference)]]
        result["beats"] = ((means < level) + 0.5 * (means == level)).mean(axis=0)
        result.loc[result["method"] == reference, "beats"] = np.nan
    return with_identity(result, table).sort_values("rank", kind="stable", ignore_index=True)


def with_identity(result: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """A result of methods, with those identity columns that the table has."""
    known = [column for column in IDENTITY if column in table and column not in result]
    return result.join(methods(table)[known], on="method")
