from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from analysis_tables import tidy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdlib.analysis.intervals import resample
from kdlib.analysis.statistics import interval, paired, per_patient, seed_noise, summarise
from kdlib.config import InputError


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


def test_each_level_is_averaged_before_the_next():
    # one patient: a case of three seeds and one of a single seed, in which the liver is defined too
    table = tidy({"S1": [[0.1, 0.2, 0.3], 0.5]})
    table = pd.concat([table, tidy({"S1": [0.9]}).assign(case="case_1", **{"class": "liver"})]).assign(patient="a")
    assert per_patient(table)["value"].tolist() == pytest.approx([(0.2 + (0.5 + 0.9) / 2) / 2])


def test_classes_are_averaged_within_a_case_unless_asked_for():
    table = pd.concat([tidy({"S1": [0.2, 0.4]}), tidy({"S1": [0.8, np.nan]}).assign(**{"class": "liver"})])
    assert per_patient(table)["value"].tolist() == pytest.approx([0.5, 0.4])  # of case 1 only the spleen is defined
    found = summarise(table, ["method", "class"]).set_index("class")
    assert found["n"].to_dict() == {"spleen": 2, "liver": 1}
    assert found["mean"].to_dict() == pytest.approx({"spleen": 0.3, "liver": 0.8})


def test_undefined_values_are_dropped_and_n_says_so():
    found = summarise(tidy({"S1": [0.5, np.nan, 0.7], "S2": [np.nan]}, "recall"), metric="recall").set_index("method")
    assert found["n"].tolist() == [2, 0]
    assert found.loc["S1", "mean"] == pytest.approx(0.6) and np.isnan(found.loc["S2", "mean"])


@pytest.mark.parametrize(
    "column, values", [("recipe", ["E-E", "B-B"]), ("fraction", [0.5, 1.0]), ("teacher", ["T1", None])]
)
def test_different_trainings_are_never_averaged(column, values):
    table = tidy({"KD": [0.5, 0.6]}).assign(**{column: values})
    with pytest.raises(InputError, match=f"'KD' mixes 2 values of '{column}'"):
        summarise(table)
    assert summarise(table, ["method", column])["n"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "table, metric, message",
    [
        (pd.DataFrame(), "dice", "no column method"),
        (tidy({"S1": [0.5]}).iloc[:0], "dice", "no rows"),
        (tidy({"S1": [0.5]}), "hd95", "no metric 'hd95': it has dice"),
    ],
)
def test_unusable_tables_are_refused(table, metric, message):
    for call in (lambda: summarise(table, metric=metric), lambda: paired(table, "S1", "S2", metric)):
        with pytest.raises(InputError, match=message):
            call()


def test_degenerate_intervals():
    for values in ([], [0.7]):
        assert np.isnan(interval(values)[:2]).all() and not interval(values).kind
    assert interval([0.1 + 0.2, 0.3, 0.3])[:2] == pytest.approx((0.3, 0.3))


def test_interval_of_few_values_is_that_of_t():
    # Student 1908 by the table: t of 2 degrees of freedom is 4.303
    values = np.array([0.6, 0.7, 0.9])
    half = 4.3027 * values.std(ddof=1) / np.sqrt(3)
    assert interval(values)[:2] == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-4)
    assert interval(values).kind == "Student's t"


def test_interval_falls_back_to_t_where_ties_leave_no_spread():
    values = np.array([0, 0, 0, 0, 0, 0, 0.1, 0.2])  # a tenth of the resamples are zeros only
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert interval(values)[:2] == pytest.approx((expected.low, expected.high))
    assert interval(values).kind == "Student's t"  # the name of what was really used, which n does not tell


def test_interval_is_studentised_by_its_definition():
    # Efron & Tibshirani 1993, eq. 12.22, on resamples of our own
    x = np.random.default_rng(5).lognormal(0, 0.8, size=20)
    drawn = np.random.default_rng(6).choice(x, (100_000, len(x)))
    t = (drawn.mean(1) - x.mean()) / (drawn.std(1, ddof=1) / np.sqrt(len(x)))
    error = x.std(ddof=1) / np.sqrt(len(x))
    expected = x.mean() - np.quantile(t, [0.975, 0.025]) * error
    normal = x.mean() + stats.t.ppf([0.025, 0.975], len(x) - 1) * error
    # near enough to tell it from Student's t
    assert (abs(interval(x)[:2] - expected) < 0.15 * abs(normal - expected)).all()
    assert interval(x).kind == "studentised bootstrap"


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
    assert (abs(interval(x)[:2] - expected) < 0.3 * abs(percentile - expected)).all()
    assert interval(x).kind == "BCa bootstrap"
    ours, theirs = (
        interval(x),
        stats.bootstrap((x,), np.mean, random_state=np.random.default_rng(1)).confidence_interval,
    )
    assert ours[:2] == pytest.approx((theirs.low, theirs.high), rel=0.02)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_interval_properties(values):
    low, high, kind = interval(values)
    assert (low, high, kind) == interval(sorted(values, reverse=True))  # whatever the order, with a fixed seed
    assert low - 1e-9 <= np.mean(values) <= high + 1e-9
    flipped = interval(-np.array(values))  # b against a mirrors a against b
    assert (-flipped.high, -flipped.low) == pytest.approx((low, high), abs=1e-9)
    wider = interval(values, 0.98)
    assert wider[0] <= low + 1e-9 and high - 1e-9 <= wider[1]


@pytest.mark.parametrize("n", [8, 30, 31])
def test_gains_and_losses_of_one_size_have_an_interval(n):
    """Sums near zero, of cubes too: a power that rounds the two signs differently must not swap them for ever."""
    for size in np.linspace(0.001, 0.1, 50):
        values = np.where(np.arange(n) % 2, size, -size)
        low, high, _ = interval(values, resamples=99)
        flipped = interval(-values, resamples=99)
        assert low < np.mean(values) < high and (-flipped.high, -flipped.low) == pytest.approx((low, high), abs=size)


def test_an_interval_ends_where_its_metric_does():
    found = summarise(tidy({"S1": [0.2, 0.99]})).iloc[0]
    assert (found["low"], found["high"]) == (0, 1)
    found = summarise(tidy({"S1": [1.0, 90.0]}, "hd95"), metric="hd95").iloc[0]
    assert found["low"] == 0 and found["high"] > 400
    found = summarise(tidy({"S1": [-5.0, 1.0]}, "volume_error"), metric="volume_error").iloc[0]
    assert found["low"] < -5


def test_noise_of_seeds_by_hand():
    table = tidy({"a": [[0.5, 0.7], [0.4, 0.8]], "b": [[0.1, 0.1], [0.2, 0.4]]})
    a, b = (table[table["method"] == name] for name in "ab")
    assert seed_noise(a).to_numpy() == pytest.approx(np.array([[-0.1, 0.1], [-0.2, 0.2]]))
    # differences of one seed belong together: 0.4, 0.6 and 0.2, 0.4
    assert seed_noise(a, b).to_numpy() == pytest.approx(np.array([[-0.1, 0.1], [-0.1, 0.1]]))
    assert seed_noise(a[a["seed"] == 0]) is None and seed_noise(a.drop(columns="seed")) is None


def test_noise_of_different_seeds_stands_apart():
    table = tidy({"a": [[0.5, 0.7], [0.4, 0.8]], "b": [0.1, 0.2]})
    a, b = (table[table["method"] == name] for name in "ab")
    found = seed_noise(a, b)
    assert found.to_numpy() == pytest.approx(np.array([[-0.1, 0.1, 0], [-0.2, 0.2, 0]]))
    assert found.columns.droplevel(-1).nunique() == 2


def test_trainings_of_a_fold_are_drawn_for_all_its_patients_at_once():
    # no patient differs from another, so that all spread is that of the trainings: three a fold, by hand
    values = np.full(4, 0.5) + [0, 1e-6, 2e-6, 3e-6]
    columns = pd.MultiIndex.from_tuples([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)])
    noise = pd.DataFrame(np.nan, index=range(4), columns=columns)
    noise.loc[[0, 1], 0], noise.loc[[2, 3], 1] = [[-0.3, 0, 0.3]] * 2, [[-0.6, 0, 0.6]] * 2
    drawn = resample(values, noise, 20_000)
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
    columns = ["method", "patient", "case", "class", "metric"]
    averaged = table.groupby(columns, as_index=False, sort=False)["value"].mean()
    with_seeds, without = paired(table, "KD", "S1"), paired(averaged, "KD", "S1")
    assert with_seeds["difference"] == pytest.approx(without["difference"])
    assert with_seeds["p"] == without["p"]  # the test sees means over seeds
    assert with_seeds["high"] - with_seeds["low"] > 1.5 * (without["high"] - without["low"])
    narrow, wide = summarise(averaged).set_index("method"), summarise(table).set_index("method")
    assert wide.loc["KD", "high"] > narrow.loc["KD", "high"] and wide.loc["S1", "high"] == narrow.loc["S1", "high"]
