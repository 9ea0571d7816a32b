from __future__ import annotations

import ast
import itertools
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import kdlib.analysis.metrics
import kdlib.analysis.statistics
from kdlib.analysis.statistics import (
    THESIS_COLUMNS,
    THESIS_TABLE,
    compare,
    detectable,
    gains,
    gradient_diagnostics,
    holm,
    interval,
    interval_name,
    non_inferiority,
    overlap_weights,
    paired,
    per_patient,
    pivot_thesis,
    rank_biserial,
    ranks,
    save_table,
    seed_noise,
    step_changes,
    summarise,
    thesis_row,
)
from kdlib.config import InputError


def tidy(arms: dict[str, object], metric="dice", **columns) -> pd.DataFrame:
    """A table of arm -> values, one case each (or a list of values a case, one a seed)."""
    rows = []
    for arm, values in arms.items():
        for number, seeds in enumerate(values):
            for seed, value in enumerate(np.atleast_1d(seeds)):
                row = dict(run=f"{arm}-{seed}", arm=arm, model="S1", fold=0, seed=seed, case=f"case_{number}")
                rows.append(row | {"class": "spleen", "metric": metric, "value": value} | columns)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def coverage() -> dict:
    """The functions of the benchmark that simulates studies."""
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "coverage.py"))


# -------------------------------------------------------------------------------------------------- the unit of a mean


def test_seeds_are_averaged_within_a_case_first():
    # case 0 was run with three seeds, case 1 with one: each counts once
    found = summarise(tidy({"S1": [[0.6, 0.7, 0.8], [0.5]]})).iloc[0]
    assert found["n"] == 2
    assert found["mean"] == pytest.approx(0.6)
    assert found["sd"] == pytest.approx(np.std([0.7, 0.5], ddof=1))


def test_two_cases_of_a_patient_are_one_unit():
    table = tidy({"S1": [0.2, 0.4, 0.9]}).assign(patient=["a", "a", "b"])
    assert per_patient(table)["value"].tolist() == pytest.approx([0.3, 0.9])
    found = summarise(table).iloc[0]
    assert (found["n"], found["mean"]) == (2, pytest.approx(0.6))
    assert summarise(table.drop(columns="patient")).iloc[0]["n"] == 3


def test_each_level_is_averaged_before_the_next():
    # one patient: a case of three seeds and one of a single seed, in which the liver is defined too
    table = tidy({"S1": [[0.1, 0.2, 0.3], 0.5]})
    table = pd.concat([table, tidy({"S1": [0.9]}).assign(case="case_1", **{"class": "liver"})]).assign(patient="a")
    assert per_patient(table)["value"].tolist() == pytest.approx([(0.2 + (0.5 + 0.9) / 2) / 2])


def test_classes_are_averaged_within_a_case_unless_asked_for():
    table = pd.concat([tidy({"S1": [0.2, 0.4]}), tidy({"S1": [0.8, np.nan]}).assign(**{"class": "liver"})])
    assert per_patient(table)["value"].tolist() == pytest.approx([0.5, 0.4])  # of case 1 only the spleen is defined
    found = summarise(table, ["arm", "class"]).set_index("class")
    assert found["n"].to_dict() == {"spleen": 2, "liver": 1}
    assert found["mean"].to_dict() == pytest.approx({"spleen": 0.3, "liver": 0.8})


def test_undefined_values_are_dropped_and_n_says_so():
    found = summarise(tidy({"S1": [0.5, np.nan, 0.7], "S2": [np.nan]}, "recall"), metric="recall").set_index("arm")
    assert found["n"].tolist() == [2, 0]
    assert found.loc["S1", "mean"] == pytest.approx(0.6) and np.isnan(found.loc["S2", "mean"])


@pytest.mark.parametrize(
    "column, values", [("recipe", ["E-E", "B-B"]), ("fraction", [0.5, 1.0]), ("teacher", ["T1", None])]
)
def test_different_trainings_are_never_averaged(column, values):
    table = tidy({"KD": [0.5, 0.6]}).assign(**{column: values})
    with pytest.raises(InputError, match=f"'KD' mixes 2 values of '{column}'"):
        summarise(table)
    assert summarise(table, ["arm", column])["n"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "table, metric, message",
    [
        (pd.DataFrame(), "dice", "no column arm"),
        (tidy({"S1": [0.5]}).iloc[:0], "dice", "no rows"),
        (tidy({"S1": [0.5]}), "hd95", "no metric 'hd95': it has dice"),
    ],
)
def test_unusable_tables_are_refused(table, metric, message):
    for call in (lambda: summarise(table, metric=metric), lambda: paired(table, "S1", "S2", metric)):
        with pytest.raises(InputError, match=message):
            call()


# ----------------------------------------------------------------------------------------------------------- intervals


def test_degenerate_intervals():
    assert np.isnan(interval([])).all() and np.isnan(interval([0.7])).all()
    assert interval([0.1 + 0.2, 0.3, 0.3]) == pytest.approx((0.3, 0.3))


def test_interval_of_few_values_is_that_of_t():
    # Student 1908 by the table: t of 2 degrees of freedom is 4.303
    values = np.array([0.6, 0.7, 0.9])
    half = 4.3027 * values.std(ddof=1) / np.sqrt(3)
    assert interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-4)
    assert interval_name(3) == "Student's t"


def test_interval_falls_back_to_t_where_ties_leave_no_spread():
    values = np.array([0, 0, 0, 0, 0, 0, 0.1, 0.2])  # a tenth of the resamples are zeros only
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert interval(values) == pytest.approx((expected.low, expected.high))


def test_interval_is_studentised_by_its_definition():
    # Efron & Tibshirani 1993, eq. 12.22, on resamples of our own
    x = np.random.default_rng(5).lognormal(0, 0.8, size=20)
    drawn = np.random.default_rng(6).choice(x, (100_000, len(x)))
    t = (drawn.mean(1) - x.mean()) / (drawn.std(1, ddof=1) / np.sqrt(len(x)))
    error = x.std(ddof=1) / np.sqrt(len(x))
    expected = x.mean() - np.quantile(t, [0.975, 0.025]) * error
    normal = x.mean() + stats.t.ppf([0.025, 0.975], len(x) - 1) * error
    # near enough to tell it from Student's t
    assert (abs(interval(x) - expected) < 0.15 * abs(normal - expected)).all()
    assert interval_name(20) == "studentised bootstrap"


def test_interval_of_many_values_is_bca_by_its_definition():
    # Efron & Tibshirani 1993, eq. 14.9 to 14.15, on resamples of our own
    x = np.random.default_rng(5).lognormal(0, 1.2, size=60)
    means = np.sort(np.random.default_rng(6).choice(x, (100_000, len(x))).mean(1))
    bias = stats.norm.ppf((means < x.mean()).mean())
    left_out = (x.sum() - x) / (len(x) - 1)
    away = left_out.mean() - left_out
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    shifted = bias + stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(means, stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    percentile = np.quantile(means, [0.025, 0.975])
    # near enough to tell BCa from the plain percentile interval
    assert (abs(interval(x) - expected) < 0.3 * abs(percentile - expected)).all()
    assert interval_name(60) == "BCa bootstrap" and interval_name(60, seeds=3) == "studentised bootstrap"
    ours, theirs = (
        interval(x),
        stats.bootstrap((x,), np.mean, random_state=np.random.default_rng(1)).confidence_interval,
    )
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.02)


@pytest.mark.parametrize("n", [24, 41])
@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_of_skewed_dice_cover_as_often_as_they_say(coverage, n, seeds):
    found = coverage["coverage"]("skewed", n, seeds, 800, ["studentised"], resamples=999)
    assert 0.93 <= found["studentised"] <= 0.97


def test_of_few_patients_the_studentised_interval_covers_best(coverage):
    found = coverage["coverage"]("skewed", 8, 1, 800, resamples=999)
    assert found["studentised"] > 0.91 and found["BCa"] < 0.9 and found["percentile"] < 0.9


def test_seeds_widen_the_interval_where_trainings_differ_as_a_whole(coverage):
    own = [coverage["coverage"]("own trainings", 24, 3, 400, ["studentised"], resamples=499)["studentised"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(coverage["coverage"].__globals__, "noise_of", lambda study: None)
        own.append(coverage["coverage"]("own trainings", 24, 3, 400, ["studentised"], resamples=499)["studentised"])
    assert own[0] > own[1] + 0.02


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_interval_properties(values):
    low, high = interval(values)
    assert (low, high) == interval(values)  # the seed is fixed
    assert low - 1e-9 <= np.mean(values) <= high + 1e-9
    flipped = interval(-np.array(values))  # b against a mirrors a against b
    assert (-flipped[1], -flipped[0]) == pytest.approx((low, high), abs=1e-9)
    wider = interval(values, 0.98)
    assert wider[0] <= low + 1e-9 and high - 1e-9 <= wider[1]


def test_an_interval_ends_where_its_metric_does():
    found = summarise(tidy({"S1": [0.2, 0.99]})).iloc[0]
    assert (found["low"], found["high"]) == (0, 1)
    found = summarise(tidy({"S1": [1.0, 90.0]}, "hd95"), metric="hd95").iloc[0]
    assert found["low"] == 0 and found["high"] > 400
    found = summarise(tidy({"S1": [-5.0, 1.0]}, "volume_error"), metric="volume_error").iloc[0]
    assert found["low"] < -5


# --------------------------------------------------------------------------------------------------------------- seeds


def test_noise_of_seeds_by_hand():
    table = tidy({"a": [[0.5, 0.7], [0.4, 0.8]], "b": [[0.1, 0.1], [0.2, 0.4]]})
    a, b = (table[table["arm"] == name] for name in "ab")
    assert seed_noise(a).to_numpy() == pytest.approx(np.array([[-0.1, 0.1], [-0.2, 0.2]]))
    # differences of one seed belong together: 0.4, 0.6 and 0.2, 0.4
    assert seed_noise(a, b).to_numpy() == pytest.approx(np.array([[-0.1, 0.1], [-0.1, 0.1]]))
    assert seed_noise(a[a["seed"] == 0]) is None and seed_noise(a.drop(columns="seed")) is None


def test_noise_of_different_seeds_stands_apart():
    table = tidy({"a": [[0.5, 0.7], [0.4, 0.8]], "b": [0.1, 0.2]})
    a, b = (table[table["arm"] == name] for name in "ab")
    found = seed_noise(a, b)
    assert found.to_numpy() == pytest.approx(np.array([[-0.1, 0.1, 0], [-0.2, 0.2, 0]]))
    assert found.columns.droplevel(-1).nunique() == 2


def test_trainings_of_a_fold_are_drawn_for_all_its_patients_at_once():
    # no patient differs from another, so that all spread is that of the trainings: three a fold, by hand
    values = np.full(4, 0.5) + [0, 1e-6, 2e-6, 3e-6]
    columns = pd.MultiIndex.from_tuples([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)])
    noise = pd.DataFrame(np.nan, index=range(4), columns=columns)
    noise.loc[[0, 1], 0], noise.loc[[2, 3], 1] = [[-0.3, 0, 0.3]] * 2, [[-0.6, 0, 0.6]] * 2
    drawn = kdlib.analysis.statistics._draw(values, noise, 20_000)
    of_first = np.isclose(drawn % 0.1, 0, atol=1e-5) | np.isclose(drawn % 0.1, 0.1, atol=1e-5)
    assert of_first.all()  # means of three draws of -0.3, 0, 0.3 or their doubles
    generator = np.random.default_rng(7)
    first, second = (generator.choice([-1, 0, 1], (20_000, 3)).mean(1) * size for size in (0.3, 0.6))
    share = generator.binomial(4, 0.5, 20_000) / 4
    assert drawn.mean(axis=1).std() == pytest.approx((share * first + (1 - share) * second).std(), rel=0.03)


def test_seeds_widen_the_interval_of_a_difference():
    generator = np.random.default_rng(3)
    base = generator.uniform(0.4, 0.8, 12)
    trained = generator.normal(0, 0.05, 3)  # one training is better with all patients
    runs = [[x + 0.1 + shift for shift in trained] for x in base + generator.normal(0, 0.02, 12)]
    table = tidy({"KD": runs, "S1": base})
    averaged = table.groupby(["arm", "case", "class", "metric"], as_index=False, sort=False)["value"].mean()
    with_seeds, without = paired(table, "KD", "S1"), paired(averaged, "KD", "S1")
    assert with_seeds["difference"] == pytest.approx(without["difference"])
    assert with_seeds["p"] == without["p"]  # the test sees means over seeds
    assert with_seeds["high"] - with_seeds["low"] > 1.5 * (without["high"] - without["low"])
    narrow, wide = summarise(averaged).set_index("arm"), summarise(table).set_index("arm")
    assert wide.loc["KD", "high"] > narrow.loc["KD", "high"] and wide.loc["S1", "high"] == narrow.loc["S1", "high"]


# -------------------------------------------------------------------------------------------------------- paired tests


def test_paired_difference_and_exact_p():
    a, b = np.array([0.7, 0.8, 0.6, 0.9, 0.75, 0.72, 0.66]), np.array([0.6, 0.65, 0.62, 0.7, 0.5, 0.69, 0.60])
    found = paired(tidy({"KD": a, "S1": b}), "KD", "S1")
    assert found["difference"] == pytest.approx((a - b).mean()) and found["n"] == 7
    # all 2^7 signs of the ranks of |a - b| by hand
    ranks = stats.rankdata(abs(a - b).round(12))
    plus = (ranks * (a > b)).sum()
    sums = np.array([(ranks * signs).sum() for signs in itertools.product([0, 1], repeat=7)])
    centre = ranks.sum() / 2
    assert found["p"] == pytest.approx((abs(sums - centre) >= abs(plus - centre) - 1e-9).mean())
    assert found["p"] == pytest.approx(4 / 128)  # one negative difference, of rank 1
    assert (found["low"], found["high"]) == pytest.approx(interval((a - b).round(12)))
    assert found["verdict"] == "better"
    assert found["superiority"] == pytest.approx(6 / 7)
    assert found["effect"] == pytest.approx((2 + 3 + 4 + 5 + 6 + 7 - 1) / 28)


def test_exact_p_with_ties():
    a = np.full(8, 0.7)
    b = a - [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, -0.1]
    found = paired(tidy({"a": a, "b": b}), "a", "b")
    assert found["p"] == pytest.approx(2 * (1 + 8) / 2**8)  # sign flips at most as extreme, both tails
    assert found["verdict"] == "inconclusive"


@pytest.mark.parametrize("metric, verdict", [("dice", "better"), ("hd95", "worse")])
def test_verdict_knows_which_direction_is_better(metric, verdict):
    base = np.linspace(0.1, 0.5, 8)
    table = tidy({"a": base + np.linspace(0.05, 0.1, 8), "b": base}, metric)
    assert paired(table, "a", "b", metric)["verdict"] == verdict
    opposite = {"better": "worse", "worse": "better"}[verdict]
    assert paired(table, "b", "a", metric)["verdict"] == opposite


def test_few_patients_stay_inconclusive():
    # five patients, all better: the exact two-sided p is 2 / 2^5
    found = paired(tidy({"a": [0.9] * 5, "b": [0.1, 0.2, 0.3, 0.35, 0.4]}), "a", "b")
    assert found["p"] == pytest.approx(0.0625) and found["verdict"] == "inconclusive"
    alone = paired(tidy({"a": [0.9], "b": [0.1]}), "a", "b")
    assert alone["n"] == 1 and alone["verdict"] == "inconclusive" and np.isnan(alone["low"])


@pytest.mark.parametrize("cases", [2, 10, 60])
def test_equal_arms(cases):
    same = np.linspace(0.2, 0.8, cases)
    # three seeds in another order average to the same number but for rounding
    table = tidy({"a": [[x, x + 0.1, x + 0.3] for x in same], "b": [[x + 0.3, x, x + 0.1] for x in same]})
    found = paired(table, "a", "b")
    assert (found["difference"], found["p"], found["verdict"]) == (0, 1, "inconclusive")


def test_undefined_pairs_are_dropped():
    found = paired(tidy({"a": [0.5, np.nan, 0.7], "b": [0.4, 0.4, np.nan]}, "recall"), "a", "b", "recall")
    assert found["n"] == 1 and found["difference"] == pytest.approx(0.1)
    none = paired(tidy({"a": [np.nan], "b": [0.4]}, "recall"), "a", "b", "recall")
    assert none["n"] == 0 and np.isnan(none["difference"]) and none["verdict"] == "inconclusive"


# Hollander & Wolfe 1973, depression scale of nine patients before and after a tranquilliser: in R,
# wilcox.test(first, second, paired = TRUE, alternative = "greater") gives V = 40, p = 0.01953, and
# effectsize::rank_biserial(first, second, paired = TRUE) gives 0.78
DEPRESSION = (
    [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30],
    [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29],
)
# Darwin's maize, crossed less self-fertilised, in eighths of an inch: their mean is
# 20.93, and in R wilcox.test gives V = 96 and p = 0.04126
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
# Student's sleep, ten patients under two drugs: one difference is zero, two are tied; all others go one way
SLEEP = ([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


def test_published_examples_of_the_signed_rank_test():
    first, second = DEPRESSION
    found = paired(tidy({"first": first, "second": second}, "hd95"), "first", "second", "hd95")
    assert found["p"] == pytest.approx(2 * 0.01953125)
    assert found["effect"] == pytest.approx((40 - 5) / 45) and round(found["effect"], 2) == 0.78
    assert found["superiority"] == pytest.approx(2 / 9)  # a distance is better where it is less
    assert found["verdict"] == "worse"
    found = paired(tidy({"crossed": MAIZE, "selfed": [0] * 15}, "assd"), "crossed", "selfed", "assd")
    assert found["difference"] == pytest.approx(20.9333, abs=1e-4) and found["p"] == pytest.approx(0.04126, abs=5e-6)
    assert found["effect"] == pytest.approx((96 - 24) / 120)


def test_zeros_are_left_out_and_ties_are_exact():
    found = paired(tidy({"a": SLEEP[0], "b": SLEEP[1]}, "assd"), "a", "b", "assd")
    assert found["n"] == 10 and found["p"] == pytest.approx(2 / 2**9)  # nine differences of one sign
    assert found["effect"] == -1 and found["superiority"] == pytest.approx(9.5 / 10)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_rank_biserial_properties(values):
    values = np.array(values, float)
    found = rank_biserial(values)
    if not values.any():
        assert np.isnan(found)
    else:
        assert -1 <= found <= 1 and rank_biserial(-values) == pytest.approx(-found)
        kept = values[values != 0]
        if len(kept) > 1:
            plus = stats.wilcoxon(kept, alternative="greater").statistic
            assert found == pytest.approx(2 * plus / (len(kept) * (len(kept) + 1) / 2) - 1)


def test_smallest_detectable_difference():
    # pwr.t.test(d = 0.5, power = 0.8, type = "paired") in R asks for 33.37 pairs; the signed-rank test for pi / 3 of it
    pairs = np.random.default_rng(0).normal(size=35)
    assert detectable(pairs) / pairs.std(ddof=1) == pytest.approx(0.5, abs=0.001)
    assert detectable(pairs, tests=19) > detectable(pairs)
    assert detectable(np.concatenate([pairs, pairs])) < detectable(pairs)


def test_too_few_patients_could_have_shown_nothing():
    # the least p of 5 patients is 1 / 16; of 8 patients 1 / 128, above 0.05 / 19
    assert detectable(np.arange(5.0)) == np.inf and np.isfinite(detectable(np.arange(6.0)))
    assert detectable(np.arange(8.0), tests=19) == np.inf and np.isfinite(detectable(np.arange(8.0), tests=6))
    table = tidy({"a": np.linspace(0.3, 0.5, 8), "b": np.linspace(0.1, 0.4, 8), "c": np.linspace(0.2, 0.6, 8)})
    assert compare(table, [("a", "b"), ("c", "b")] * 4)["detectable"].tolist() == [np.inf] * 8
    assert (compare(table, [("a", "b"), ("c", "b")])["detectable"] < 0.5).all()


@pytest.mark.parametrize("n, tests", [(14, 1), (24, 19)])
def test_the_detectable_difference_is_found_in_four_studies_of_five(coverage, n, tests):
    assert coverage["power"](n, tests, 2000) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("n", [14, 24])
def test_a_family_of_equal_arms_is_rarely_told_apart(coverage, n):
    assert coverage["false_families"](n, 300) <= 0.05


@pytest.mark.parametrize("pooled", [False, True])
def test_a_bridge_that_changes_nothing_is_rarely_told_to(coverage, pooled):
    assert coverage["false_walks"](8, 150, pooled=pooled) <= 0.05


def test_paired_by_patient():
    table = tidy({"a": [0.5, 0.7, 0.9], "b": [0.4, 0.4, 0.8]}).assign(patient=["p", "p", "q"] * 2)
    found = paired(table, "a", "b")
    assert found["n"] == 2 and found["difference"] == pytest.approx((0.2 + 0.1) / 2)


def test_paired_by_recipe():
    table = pd.concat([tidy({"KD": [0.5, 0.6]}, recipe="E-E"), tidy({"KD": [0.4, 0.4]}, recipe="B-B")])
    assert paired(table, "E-E", "B-B", by="recipe")["difference"] == pytest.approx(0.15)


def test_missing_cases_and_arms_are_named():
    table = tidy({"a": [0.5, 0.6, 0.7], "b": [0.5]})
    with pytest.raises(InputError, match="'b' has no dice of cases case_1, case_2"):
        paired(table, "a", "b")
    with pytest.raises(InputError, match="'b' has no dice of cases case_1, case_2"):
        paired(table, "b", "a")
    with pytest.raises(InputError, match="no arm 'c'"):
        paired(table, "a", "c")
    with pytest.raises(InputError, match="no better direction"):
        paired(tidy({"a": [0.1], "b": [0.2]}, "volume_error"), "a", "b", "volume_error")


# ---------------------------------------------------------------------------------------------------------------- Holm


@pytest.mark.parametrize(
    "p, expected",
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x 0.01, then max(0.06, 2 x 0.03), then max(0.06, 0.04)
        ([0.02], [0.02]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([0.03, np.nan], [0.06, np.nan]),
        ([], []),
    ],
)
def test_holm_by_hand(p, expected):
    assert holm(p) == pytest.approx(expected, nan_ok=True)


@settings(deadline=None, max_examples=8)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_properties(p):
    p = np.array(p)
    adjusted = holm(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(p * len(p), 1) + 1e-15).all()  # no worse than Bonferroni
    order = np.argsort(p)
    assert (np.diff(adjusted[order]) >= 0).all()
    # what Holm's procedure rejects at 0.05, step by step
    rejected = np.zeros(len(p), bool)
    for step, index in enumerate(order):
        if p[index] * (len(p) - step) > 0.05:
            break
        rejected[index] = True
    assert ((adjusted <= 0.05) == rejected).all()


def test_compare_takes_its_verdict_from_the_adjusted_p():
    base = np.linspace(0.3, 0.6, 7)
    better = base + [0.1, 0.2, 0.15, 0.12, 0.11, 0.13, -0.01]  # p = 4 / 128 alone
    table = tidy({"S1": base, "KD": better, "far": base + np.linspace(0.1, 0.2, 7), "same": base})
    assert paired(table, "KD", "S1")["verdict"] == "better"
    found = compare(table, [("KD", "S1"), ("far", "S1"), ("same", "S1")])
    assert found["p"].tolist() == pytest.approx([4 / 128, 2 / 128, 1.0])
    assert found["p_holm"].tolist() == pytest.approx([8 / 128, 6 / 128, 1.0])
    assert found["verdict"].tolist() == ["inconclusive", "better", "inconclusive"]
    with pytest.raises(InputError, match="no pairs"):
        compare(table, [])


# ------------------------------------------------------------------------------------------------------ non-inferiority


def test_non_inferior_inferior_and_neither():
    teacher = np.linspace(0.6, 0.9, 10)
    spread = np.linspace(-0.02, 0.02, 10)
    arms = {
        "T1": teacher,
        "near": teacher - 0.01 + spread,
        "far": teacher - 0.2 + spread,
        "even": teacher - 0.05 + spread,
    }
    found = non_inferiority(tidy(arms), [(arm, "T1") for arm in ("near", "far", "even")], 0.05)
    assert found["verdict"].tolist() == ["non-inferior", "inferior", "inconclusive"]
    assert found["difference"].tolist() == pytest.approx([-0.01, -0.2, -0.05]) and (found["margin"] == 0.05).all()
    assert found["p"].tolist() == pytest.approx([2 / 2**10, 2 / 2**10, 1.0], abs=0.01)
    assert found["p_holm"].tolist()[:2] == pytest.approx([6 / 2**10] * 2)
    # a worse student can be non-inferior: "near" loses for sure
    assert compare(tidy(arms), [("near", "T1")])["high"].iloc[0] > -0.05


def test_non_inferiority_of_a_distance_looks_the_other_way():
    teacher = np.linspace(2, 5, 10)
    table = tidy({"T1": teacher, "near": teacher + np.linspace(0.1, 0.3, 10), "far": teacher + 3}, "hd95")
    found = non_inferiority(table, [("near", "T1"), ("far", "T1")], 1.0, "hd95")
    assert found["verdict"].tolist() == ["non-inferior", "inferior"]


def test_few_patients_are_never_non_inferior():
    table = tidy({"T1": [0.5, 0.6, 0.7, 0.8, 0.9], "S1": [0.5, 0.6, 0.7, 0.8, 0.9]})
    assert non_inferiority(table, [("S1", "T1")], 0.3)["verdict"].tolist() == ["inconclusive"]


def test_non_inferiority_needs_a_margin_and_a_direction():
    table = tidy({"T1": [0.5, 0.6], "S1": [0.5, 0.6]})
    for pairs, margin in (([], 0.1), ([("S1", "T1")], 0), ([("S1", "T1")], float("nan"))):
        with pytest.raises(InputError, match="at least one .* a margin above 0"):
            non_inferiority(table, pairs, margin)
    with pytest.raises(InputError, match="no better direction"):
        non_inferiority(table, [("S1", "T1")], 0.1, "volume_error")


def test_holm_as_in_r():
    # p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])


# --------------------------------------------------------------------------------------------------------------- ranks


def test_ranks_that_no_resample_can_change():
    base = np.linspace(0.2, 0.5, 6)
    found = ranks(tidy({"worst": base, "best": base + 0.2, "middle": base + 0.1}), reference="middle")
    assert found["arm"].tolist() == ["best", "middle", "worst"] and (found["n"] == 6).all()
    assert found["mean"].tolist() == pytest.approx([0.55, 0.45, 0.35])
    for column in ("rank", "rank_low", "rank_high"):
        assert found[column].tolist() == [1, 2, 3]
    assert found["first"].tolist() == [1, 0, 0]
    assert found["beats"].tolist() == pytest.approx([1, np.nan, 0], nan_ok=True)
    assert "beats" not in ranks(tidy({"a": base}))


def test_ranks_of_a_distance_are_best_where_it_is_least():
    base = np.linspace(1, 5, 6)
    found = ranks(tidy({"far": base + 1, "near": base}, "hd95"), metric="hd95", reference="far")
    assert found["arm"].tolist() == ["near", "far"] and found["mean"].tolist() == pytest.approx([3, 4])
    assert found["first"].tolist() == [1, 0] and found["beats"][0] == 1


def test_equal_groups_share_rank_and_first_place():
    same = np.linspace(0.2, 0.8, 7)
    table = tidy({"a": [[x, x + 0.1, x + 0.3] for x in same], "b": [[x + 0.3, x, x + 0.1] for x in same], "c": same})
    found = ranks(table, reference="a").set_index("arm")
    assert found["rank"].to_dict() == {"a": 1.5, "b": 1.5, "c": 3}
    assert (found.loc[["a", "b"], ["rank_low", "rank_high"]] == 1.5).all(axis=None)
    assert found["first"].to_dict() == {"a": 0.5, "b": 0.5, "c": 0}
    assert found["beats"].to_dict() == pytest.approx({"a": np.nan, "b": 0.5, "c": 0}, nan_ok=True)


def test_ranks_over_every_resample_of_three_patients():
    a, b = np.array([0.9, 0.2, 0.2]), np.array([0.3, 0.4, 0.3])
    # all 27 draws by hand: a is ahead once case 0 was drawn; a lead of 0.6 against 0.2 and 0.1 behind, no draw ties
    ahead = np.mean([np.sum((a - b)[list(draw)]) > 0 for draw in itertools.product(range(3), repeat=3)])
    assert ahead == pytest.approx(19 / 27)
    found = ranks(tidy({"b": b, "a": a}), resamples=100_000, reference="b").set_index("arm")
    assert found.loc["a", "beats"] == found.loc["a", "first"] == pytest.approx(ahead, abs=0.005)
    assert found["first"].sum() == pytest.approx(1)
    assert found[["rank_low", "rank_high"]].to_numpy().tolist() == [[1, 2], [1, 2]]
    assert found["rank"].to_dict() == {"a": 1, "b": 2}


def test_patients_not_cases_are_drawn_and_seeds_are_averaged():
    # patient p has three good cases, q and r one bad each: by cases `a` would be first, by patients `b` is
    cases = {"a": [[0.8, 1.0], 0.9, 0.9, 0.1, 0.1], "b": [0.5, 0.5, 0.5, 0.4, 0.4]}
    found = ranks(tidy(cases).assign(patient=[*"ppppqr", *"pppqr"]))
    assert found["arm"].tolist() == ["b", "a"] and (found["n"] == 3).all()
    assert found["mean"].tolist() == pytest.approx([1.3 / 3, 1.1 / 3])


def test_ranks_depend_on_the_seed_alone():
    generator = np.random.default_rng(0)
    table = tidy({name: generator.random(12) for name in "abcdef"})
    found = ranks(table, reference="a")
    pd.testing.assert_frame_equal(found, ranks(table, reference="a"))
    pd.testing.assert_frame_equal(found, ranks(table.sample(frac=1, random_state=1), reference="a"), rtol=1e-9)
    other = ranks(table, reference="a", seed=1)
    assert found["rank"].tolist() == other["rank"].tolist() and found["first"].tolist() != other["first"].tolist()
    assert (found["rank_low"] <= found["rank"]).all() and (found["rank"] <= found["rank_high"]).all()


def test_ranks_leave_out_patients_undefined_in_a_group():
    table = tidy({"a": [0.5, np.nan, 0.7], "b": [0.4, 0.4, 0.9]}, "recall")
    found = ranks(table, metric="recall")
    assert (found["n"] == 2).all() and found["mean"].tolist() == pytest.approx([0.65, 0.6])
    with pytest.raises(InputError, match="no patient has a defined recall in every arm"):
        ranks(table[table["case"] == "case_1"], metric="recall")
    alone = ranks(tidy({"a": [0.5], "b": [0.4]}))
    assert alone[["rank_low", "rank_high"]].to_numpy().tolist() == [[1, 1], [2, 2]]


def test_ranks_of_recipes():
    table = pd.concat([tidy({"KD": [0.5, 0.6]}, recipe="E-E"), tidy({"KD": [0.4, 0.4]}, recipe="B-B")])
    assert ranks(table, by="recipe")["recipe"].tolist() == ["E-E", "B-B"]
    with pytest.raises(InputError, match="'KD' mixes 2 values of 'recipe'"):
        ranks(table)


def test_ranks_name_missing_cases_and_arms():
    table = tidy({"a": [0.5, 0.6, 0.7], "b": [0.5, 0.6], "c": [0.4, 0.4, 0.4]})
    with pytest.raises(InputError, match="'b' has no dice of cases case_2"):
        ranks(table)
    with pytest.raises(InputError, match="no arm 'T1' in the table to be the reference: it has a, c"):
        ranks(table[table["arm"] != "b"], reference="T1")
    with pytest.raises(InputError, match="no better direction"):
        ranks(tidy({"a": [0.1]}, "volume_error"), metric="volume_error")


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.fixture
def study():
    arms = {"S1 (50 %)": [0.6, 0.7, 0.8], "KD(T1, S1)": [0.7, 0.8, 0.9], "T1": [0.9, 0.9, 0.9]}
    parts = [tidy(arms, metric) for metric in ("dice", "iou", "recall", "precision")]
    table = pd.concat(parts, ignore_index=True)
    table.loc[(table["metric"] == "recall") & (table["case"] == "case_2") & (table["arm"] == "T1"), "value"] = np.nan
    return table


def test_thesis_numbers_agree_with_each_other():
    # Dice = 2 IoU / (1 + IoU) for pooled pixels, to the three digits printed
    assert np.allclose(THESIS_TABLE["dice"], 2 * THESIS_TABLE["iou"] / (1 + THESIS_TABLE["iou"]), atol=0.0011)
    harmonic = 2 / (1 / THESIS_TABLE["recall"] + 1 / THESIS_TABLE["precision"])
    assert np.allclose(THESIS_TABLE["dice"], harmonic, atol=0.0011)
    assert thesis_row("S1 (50 %)")["dice"] == thesis_row("S1")["dice"] == 0.715
    assert thesis_row("KD(T2, S2)")["dice"] == 0.793 and thesis_row("T1").isna().all()


def test_pivot_in_the_form_of_the_thesis(study):
    found = pivot_thesis(study, {"S1 (50 %)": 57_297, "KD(T1, S1)": 57_297})
    assert list(found.index) == ["S1 (50 %)", "KD(T1, S1)", "T1"]
    assert set(THESIS_COLUMNS) <= set(found)
    row = found.loc["KD(T1, S1)"]
    assert row["Dice"] == "0.800 [0.55, 1.00]" and row["n"] == 3
    # t of 2 degrees of freedom; cut at 1
    assert (row["dice_low"], row["dice_mean"], row["dice_high"]) == pytest.approx((0.8 - 0.24841, 0.8, 1.0), abs=1e-5)
    assert row["params (M)"] == pytest.approx(0.057297)
    assert row["thesis Dice"] == 0.772 and row["thesis params (M)"] == 0.057
    assert found.loc["T1", "Recall"] == "0.900 [0.90, 0.90] (n = 2)"
    assert np.isnan(found.loc["T1", "params (M)"]) and np.isnan(found.loc["T1", "thesis Dice"])


def test_pivot_of_one_case_has_no_interval(study):
    found = pivot_thesis(study[study["case"] == "case_2"], {})
    assert found.loc["S1 (50 %)", "Dice"] == "0.800" and found.loc["T1", "Recall"] == "undefined"


def test_saved_tables(study, tmp_path):
    found = pivot_thesis(study, {})
    csv, tex = save_table(found, tmp_path / "tables", "thesis_4_2", "Mean & 95 % interval of arm_1", THESIS_COLUMNS)
    assert csv.name == "thesis_4_2.csv" and tex.name == "thesis_4_2.tex"
    pd.testing.assert_frame_equal(pd.read_csv(csv, index_col=0), found, check_dtype=False)
    text = tex.read_text()
    for part in (r"\toprule", r"S1 (50 \%)", r"Mean \& 95 \% interval of arm\_1", r"\label{tab:thesis_4_2}", "-- "):
        assert part in text
    assert "dice_mean" not in text and "dice\\_mean" not in text
    assert text.count(r"\\") == 4  # headings and three arms
    plain = save_table(compare(study, [("KD(T1, S1)", "T1")]), tmp_path, "pairs", "All pairs")[1].read_text()
    assert r"KD(T1, S1) & T1 & 3 &" in plain and r"p\_holm" in plain and "\n0 &" not in plain


def test_bold_follows_the_verdict_and_never_the_largest(tmp_path):
    table = pd.DataFrame(
        {
            "a": ["KD_1", "KD_2", "KD_3"],
            "n": [8, 8, 8],
            "difference": [0.05, 0.2, -0.1],
            "p_holm": [0.0001, 0.3, np.nan],
            "detectable": [0.04, np.inf, 0.04],
            "verdict": ["better", "inconclusive", "worse"],
        }
    )
    text = save_table(table, tmp_path, "judged", "Judged")[1].read_text()
    lines = [line.strip() for line in text.splitlines() if "KD" in line]
    assert lines == [
        r"\textbf{KD\_1} & 8 & \textbf{0.050} & $<$0.001 & 0.040 & better \\",
        r"KD\_2 & 8 & 0.200 & 0.300 & $\infty$ & inconclusive \\",
        r"KD\_3 & 8 & $-$0.100 & -- & 0.040 & worse \\",
    ]
    assert text.count(r"\textbf") == 2 and r"\toprule" in text
    margin = save_table(table.assign(verdict="non-inferior"), tmp_path, "margin", "Margin")[1].read_text()
    assert margin.count(r"\textbf") == 6


def test_names_can_be_set_in_bold_in_a_table_without_verdicts(study, tmp_path):
    text = save_table(pivot_thesis(study, {}), tmp_path, "pivot", "Pivot", THESIS_COLUMNS, bold=["KD(T1, S1)"])[
        1
    ].read_text()
    assert r"\textbf{KD(T1, S1)} &" in text and text.count(r"\textbf") == 1


def test_whole_numbers_are_printed_whole(tmp_path):
    table = pd.DataFrame({"arm": ["a", "b"], "rank": [1.0, 2.0], "shared": [1.5, 2.0]})
    assert r"a & 1 & 1.500 \\" in save_table(table, tmp_path, "ranks", "Ranks")[1].read_text()


@pytest.mark.parametrize("module", [kdlib.analysis.statistics, kdlib.analysis.metrics])
def test_tables_are_enough(module):
    """No torch and no training code is imported."""
    nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    assert imported.isdisjoint({"torch", "monai", "kdlib"})
    own = {name for name in imported if name.startswith("kdlib.")}
    assert own <= {"kdlib.config", "kdlib.analysis.metrics", "kdlib.analysis.statistics"}


# ---------------------------------------------------------------------------------------------------------- the bridge


def stages(values: dict[str, list[float]], volumes: list[float] | None = None) -> pd.DataFrame:
    """A tidy table of one arm: stage -> Dice of each patient, whose predictions have the volume of the truth."""
    rows = []
    for stage, dice in values.items():
        for number, value in enumerate(dice):
            row = dict(run=stage, arm="KD", protocol=stage, seed=0, patient=f"p{number}", case=f"c{number}")
            truth = (volumes or [1.0] * len(dice))[number]
            metrics = {"dice": value, "truth_volume": truth, "volume_error": 0.0}
            rows += [row | {"class": "spleen", "metric": name, "value": found} for name, found in metrics.items()]
    return pd.DataFrame(rows)


def test_walk_adds_up_from_stage_to_stage():
    dice = {"thesis": [0.5] * 8, "a": [0.6] * 8, "b": [0.57, 0.53] * 4}
    found = step_changes(stages(dice), list(dice), [])
    assert list(found["step"]) == ["thesis", "a", "b", "corrected"] and set(found["n"]) == {8}
    assert found["dice"].tolist() == pytest.approx([0.5, 0.6, 0.55, 0.55])
    assert found["difference"].tolist()[1:] == pytest.approx([0.1, -0.05, 0.05])
    assert found["verdict"].tolist()[1:] == ["better", "worse", "better"]
    assert found.loc[1, ["low", "high"]].tolist() == pytest.approx([0.1, 0.1])


def test_pooled_dice_is_that_of_all_voxels_together():
    # |A| = |B| = 30 with 27 shared, and |A| = |B| = 10 with 1 shared: 2 * 28 / 80
    table = stages({"thesis": [0.9, 0.1]}, [30.0, 10.0])
    found = overlap_weights(table, "protocol", pooled=True)
    assert found["weight"].tolist() == [60, 20] and found["dice"].tolist() == pytest.approx([0.9, 0.1])
    both = step_changes(stages({"thesis": [0.9, 0.1], "b": [0.9, 0.1]}, [30.0, 10.0]), ["thesis", "b"], ["thesis"])
    assert both["dice"].tolist() == pytest.approx([0.7, 0.5, 0.5])


def test_pooled_dice_adds_up_the_cases_of_a_patient():
    table = stages({"thesis": [1.0, 1.0, 0.0]})
    table["patient"] = table["patient"].replace({"p1": "p0"})  # two equal volumes of one patient, one of another
    found = step_changes(pd.concat([table, table.assign(protocol="b")]), ["thesis", "b"], ["thesis", "b"])
    assert found["dice"].tolist() == pytest.approx([2 / 3] * 3)


def test_a_patient_without_target_or_prediction_is_right_and_weighs_nothing():
    dice = {"thesis": [0.5, 1.0], "b": [0.5, 1.0]}
    found = step_changes(stages(dice, [10.0, 0.0]), list(dice), ["thesis"])
    assert found["dice"].tolist() == pytest.approx([0.5, 0.75, 0.75])


def test_swaps_of_a_bridge_by_hand():
    # three patients, two steps: all eight ways to swap the patients' values, in both steps at once
    dice = {"thesis": [0.1, 0.2, 0.3], "a": [0.3, 0.3, 0.7], "b": [0.35, 0.2, 0.8]}
    found = step_changes(stages(dice), list(dice), []).set_index("step")["p_adjusted"]
    values = np.array(list(dice.values()))
    differences = np.array([values[1] - values[0], values[2] - values[1], values[2] - values[0]])
    signs = np.array(list(itertools.product([1, -1], repeat=3)))
    sizes = abs(differences @ signs.T) / np.sqrt((differences**2).sum(axis=1))[:, None]  # of sums of random signs
    expected = (sizes.max(axis=0) >= sizes[:, :1] - 1e-9).mean(axis=1)
    assert found.tolist()[1:] == pytest.approx(expected.tolist()) and np.isnan(found["thesis"])


def test_six_patients_can_decide_a_bridge_of_many_steps():
    base = np.linspace(0.2, 0.4, 6)
    dice = {f"step {step}": (base + 0.05 * step + 0.001 * step * np.arange(6)).tolist() for step in range(9)}
    assert set(step_changes(stages(dice), list(dice), [])["verdict"][1:]) == {"better"}  # the least p is 2 / 2^6


def test_stages_of_different_patients_are_named_in_gains():
    table = pd.concat([stages({"thesis": [0.5, 0.6], "b": [0.5]})] * 2).reset_index(drop=True)
    table["arm"] = ["KD"] * (len(table) // 2) + ["alone"] * (len(table) // 2)
    with pytest.raises(InputError, match="patients p1 are not in both"):
        gains(table, "KD", ["alone"], ["thesis", "b"], [])


def test_few_patients_are_never_decided_by_a_bootstrap():
    dice = {"thesis": [0.5] * 5, "a": [0.9] * 5}
    assert step_changes(stages(dice), list(dice), [])["verdict"].tolist()[1:] == ["inconclusive"] * 2


def test_walk_names_what_is_missing():
    with pytest.raises(InputError, match="no stage 'b' in the table: it has thesis"):
        step_changes(stages({"thesis": [0.5]}), ["thesis", "b"], [])
    with pytest.raises(InputError, match="patients p1 are not in both"):
        step_changes(stages({"thesis": [0.5, 0.6], "b": [0.5]}), ["thesis", "b"], [])
    two = pd.concat([stages({"thesis": [0.5]}), stages({"thesis": [0.5]}).assign(**{"class": "liver"})])
    with pytest.raises(InputError, match="several classes; filter the table to one"):
        overlap_weights(two, "protocol", pooled=True)


def test_gains_compare_arms_within_a_stage():
    dice = {"thesis": [0.5, 0.6] * 4, "b": [0.7, 0.8] * 4}
    lower = {stage: [value - 0.1 for value in values] for stage, values in dice.items()}
    table = pd.concat([stages(dice), stages(lower).assign(arm="alone")])
    found = gains(table, "KD", ["alone"], list(dice), [])
    assert found["difference"].tolist() == pytest.approx([0.1, 0.1]) and set(found["verdict"]) == {"better"}
    assert found["dice"].tolist() == pytest.approx([0.55, 0.75])


def test_liveness_tells_the_dead_from_the_living():
    rows = [
        dict(run=arm, arm=arm, epoch=epoch, name=name, value=value)
        for arm, epoch, values in [
            ("a", 1, {"PMD": 9.0, "share/PMD": 0.9}),
            (
                "a",
                2,
                {
                    "PMD": 0.0,
                    "share/PMD": 0.0,
                    "B-B": 2.0,
                    "share/B-B": 0.3,
                    "cosine/B-B": 0.5,
                    "projector_change/B-B": 0.1,
                },
            ),
            ("b", 1, {"B-B": 2.7, "share/B-B": 0.0, "infonce_over_chance/B-B": 1.0}),
        ]
        for name, value in values.items()
    ]
    found = gradient_diagnostics(pd.DataFrame(rows)).set_index(["arm", "term"])
    assert found["alive"].to_dict() == {("a", "PMD"): "always 0", ("a", "B-B"): "yes", ("b", "B-B"): "no gradient"}
    assert found.loc[("a", "B-B"), ["share", "cosine", "moved"]].tolist() == [0.3, 0.5, 0.1]
    assert found.loc[("b", "B-B"), "chance"] == 1.0 and np.isnan(found.loc[("a", "B-B"), "chance"])
