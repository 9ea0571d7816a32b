from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from analysis_tables import distilled, identity, tidy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdlib.analysis.statistics import (
    compare,
    holm,
    interval,
    minimum_detectable_difference,
    non_inferiority,
    paired,
    rank_biserial,
    ranks,
    term_effects,
)
from kdlib.config import InputError


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
    assert (found["low"], found["high"]) == pytest.approx(interval((a - b).round(12))[:2])
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
def test_equal_methods(cases):
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
            plus = stats.wilcoxon(kept, alternative="greater", method="asymptotic").statistic
            assert found == pytest.approx(2 * plus / (len(kept) * (len(kept) + 1) / 2) - 1)


def test_smallest_detectable_difference():
    # pwr.t.test(d = 0.5, power = 0.8, type = "paired") in R asks for 33.37 pairs; the signed-rank test for pi / 3 of it
    pairs = np.random.default_rng(0).normal(size=35)
    assert minimum_detectable_difference(pairs) / pairs.std(ddof=1) == pytest.approx(0.5, abs=0.001)
    assert minimum_detectable_difference(pairs, tests=19) > minimum_detectable_difference(pairs)
    assert minimum_detectable_difference(np.concatenate([pairs, pairs])) < minimum_detectable_difference(pairs)


def test_too_few_patients_could_have_shown_nothing():
    # the least p of 5 patients is 1 / 16; of 8 patients 1 / 128, above 0.05 / 19
    assert minimum_detectable_difference(np.arange(5.0)) == np.inf and np.isfinite(
        minimum_detectable_difference(np.arange(6.0))
    )
    assert minimum_detectable_difference(np.arange(8.0), tests=19) == np.inf and np.isfinite(
        minimum_detectable_difference(np.arange(8.0), tests=6)
    )
    table = tidy({"a": np.linspace(0.3, 0.5, 8), "b": np.linspace(0.1, 0.4, 8), "c": np.linspace(0.2, 0.6, 8)})
    assert compare(table, [("a", "b"), ("c", "b")] * 4)["minimum_detectable"].tolist() == [np.inf] * 8
    assert (compare(table, [("a", "b"), ("c", "b")])["minimum_detectable"] < 0.5).all()


def test_paired_by_patient():
    table = tidy({"a": [0.5, 0.7, 0.9], "b": [0.4, 0.4, 0.8]}).assign(patient=["p", "p", "q"] * 2)
    found = paired(table, "a", "b")
    assert found["n"] == 2 and found["difference"] == pytest.approx((0.2 + 0.1) / 2)


def test_missing_cases_and_methods_are_named():
    table = tidy({"a": [0.5, 0.6, 0.7], "b": [0.5]})
    with pytest.raises(InputError, match="'b' has no dice of cases case_1, case_2"):
        paired(table, "a", "b")
    with pytest.raises(InputError, match="'b' has no dice of cases case_1, case_2"):
        paired(table, "b", "a")
    with pytest.raises(InputError, match="no method 'c'"):
        paired(table, "a", "c")
    with pytest.raises(InputError, match="no better direction"):
        paired(tidy({"a": [0.1], "b": [0.2]}, "volume_error"), "a", "b", "volume_error")


@pytest.mark.parametrize(
    "p, expected",
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x 0.01, then max(0.06, 2 x 0.03), then max(0.06, 0.04)
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),  # p.adjust(..., "holm") in R
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


@pytest.mark.parametrize(
    ("swing", "n", "said"), [(0.012, 30, "equivalent"), (0.04, 30, "inconclusive"), (0.001, 5, "inconclusive")]
)
def test_a_difference_is_equivalent_where_its_whole_interval_does_not_matter(swing, n, said):
    """Every other patient gains what the next one loses: intervals of about 0.36 swing to either side of 0."""
    base = np.linspace(0.5, 0.8, n)
    found = compare(tidy({"S1": base, "KD": base + np.where(np.arange(n) % 2, swing, -swing)}), [("KD", "S1")])
    assert found["verdict"].tolist() == [said], found[["low", "high"]]
    hd95 = compare(tidy({"S1": base, "KD": base}, metric="hd95"), [("KD", "S1")], metric="hd95")
    assert hd95["verdict"].tolist() == ["inconclusive"]  # no margin is stated for it


def test_compare_takes_its_verdict_from_the_adjusted_p():
    base = np.linspace(0.3, 0.6, 7)
    better = base + [0.1, 0.2, 0.15, 0.12, 0.11, 0.13, -0.01]  # p = 4 / 128 alone
    table = tidy({"S1": base, "KD": better, "far": base + np.linspace(0.1, 0.2, 7), "same": base})
    assert paired(table, "KD", "S1")["verdict"] == "better"
    found = compare(table, [("KD", "S1"), ("far", "S1"), ("same", "S1")])
    assert found["p"].tolist() == pytest.approx([4 / 128, 2 / 128, 1.0])
    assert found["p_holm"].tolist() == pytest.approx([8 / 128, 6 / 128, 1.0])
    assert found["verdict"].tolist() == ["inconclusive", "better", "equivalent"]  # the same numbers
    with pytest.raises(InputError, match="no pairs"):
        compare(table, [])


def test_non_inferior_inferior_and_neither():
    teacher = np.linspace(0.6, 0.9, 10)
    spread = np.linspace(-0.02, 0.02, 10)
    methods = {
        "T1": teacher,
        "near": teacher - 0.01 + spread,
        "far": teacher - 0.2 + spread,
        "even": teacher - 0.05 + spread,
    }
    found = non_inferiority(tidy(methods), [(method, "T1") for method in ("near", "far", "even")], 0.05)
    assert found["verdict"].tolist() == ["non-inferior", "inferior", "inconclusive"]
    assert found["difference"].tolist() == pytest.approx([-0.01, -0.2, -0.05]) and (found["margin"] == 0.05).all()
    assert found["p"].tolist() == pytest.approx([2 / 2**10, 2 / 2**10, 1.0], abs=0.01)
    assert found["p_holm"].tolist()[:2] == pytest.approx([6 / 2**10] * 2)
    # a worse student can be non-inferior: "near" loses for sure
    assert compare(tidy(methods), [("near", "T1")])["high"].iloc[0] > -0.05


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


def ablated(subsets: dict[str, float]) -> pd.DataFrame:
    """Eight patients, two seeds; subset of terms -> what it adds to the Dice of each."""
    alone = identity("S1 (50 %)")
    rows = []
    for terms, gain in subsets.items():
        about = distilled("supcon", terms) if terms else alone
        dice = [[0.70 + 0.01 * number + gain, 0.72 + 0.01 * number + gain] for number in range(8)]
        rows.append(tidy({about["method"]: dice}).assign(**about))
    return pd.concat(rows, ignore_index=True)


def test_what_a_term_is_worth_over_all_subsets_of_the_others():
    """By hand: with A 0.03 and 0.01 (B on), without 0 and 0.04, so A changes by (0.03 + 0.01 - 0.04) / 2 = 0."""
    found = term_effects(ablated({"": 0.0, "A": 0.03, "B": 0.04, "A+B": 0.01})).set_index("label_a")
    assert found["difference"].to_dict() == pytest.approx({"with A": 0.0, "with B": 0.01})
    assert found["label_b"].to_dict() == {"with A": "without A", "with B": "without B"}
    assert (found["n"] == 8).all() and found.loc["with B", "verdict"] == "better"
    assert found.loc["with B", "p_holm"] == pytest.approx(2 * 2 / 2**8)


@pytest.mark.parametrize("subsets", [{"": 0.0, "A": 0.1, "B": 0.1}, {"": 0.0}])
def test_a_subset_that_is_missing_leaves_no_effect(subsets):
    with pytest.raises(InputError, match="an ablation takes each of the"):
        term_effects(ablated(subsets))


def test_ranks_that_no_resample_can_change():
    base = np.linspace(0.2, 0.5, 6)
    found = ranks(tidy({"worst": base, "best": base + 0.2, "middle": base + 0.1}), reference="middle")
    assert found["method"].tolist() == ["best", "middle", "worst"] and (found["n"] == 6).all()
    assert found["mean"].tolist() == pytest.approx([0.55, 0.45, 0.35])
    for column in ("rank", "rank_low", "rank_high"):
        assert found[column].tolist() == [1, 2, 3]
    assert found["first"].tolist() == [1, 0, 0]
    assert found["beats"].tolist() == pytest.approx([1, np.nan, 0], nan_ok=True)
    assert "beats" not in ranks(tidy({"a": base}))


def test_ranks_of_a_distance_are_best_where_it_is_least():
    base = np.linspace(1, 5, 6)
    found = ranks(tidy({"far": base + 1, "near": base}, "hd95"), metric="hd95", reference="far")
    assert found["method"].tolist() == ["near", "far"] and found["mean"].tolist() == pytest.approx([3, 4])
    assert found["first"].tolist() == [1, 0] and found["beats"][0] == 1


def test_equal_groups_share_rank_and_first_place():
    same = np.linspace(0.2, 0.8, 7)
    table = tidy({"a": [[x, x + 0.1, x + 0.3] for x in same], "b": [[x + 0.3, x, x + 0.1] for x in same], "c": same})
    found = ranks(table, reference="a").set_index("method")
    assert found["rank"].to_dict() == {"a": 1.5, "b": 1.5, "c": 3}
    assert (found.loc[["a", "b"], ["rank_low", "rank_high"]] == 1.5).all(axis=None)
    assert found["first"].to_dict() == {"a": 0.5, "b": 0.5, "c": 0}
    assert found["beats"].to_dict() == pytest.approx({"a": np.nan, "b": 0.5, "c": 0}, nan_ok=True)


def test_ranks_over_every_resample_of_three_patients():
    a, b = np.array([0.9, 0.2, 0.2]), np.array([0.3, 0.4, 0.3])
    # all 27 draws by hand: a is ahead once case 0 was drawn; a lead of 0.6 against 0.2 and 0.1 behind, no draw ties
    ahead = np.mean([np.sum((a - b)[list(draw)]) > 0 for draw in itertools.product(range(3), repeat=3)])
    assert ahead == pytest.approx(19 / 27)
    found = ranks(tidy({"b": b, "a": a}), resamples=100_000, reference="b").set_index("method")
    assert found.loc["a", "beats"] == found.loc["a", "first"] == pytest.approx(ahead, abs=0.005)
    assert found["first"].sum() == pytest.approx(1)
    assert found[["rank_low", "rank_high"]].to_numpy().tolist() == [[1, 2], [1, 2]]
    assert found["rank"].to_dict() == {"a": 1, "b": 2}


def test_patients_not_cases_are_drawn_and_seeds_are_averaged():
    # patient p has three good cases, q and r one bad each: by cases `a` would be first, by patients `b` is
    cases = {"a": [[0.8, 1.0], 0.9, 0.9, 0.1, 0.1], "b": [0.5, 0.5, 0.5, 0.4, 0.4]}
    found = ranks(tidy(cases).assign(patient=[*"ppppqr", *"pppqr"]))
    assert found["method"].tolist() == ["b", "a"] and (found["n"] == 3).all()
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
    with pytest.raises(InputError, match="no patient has a defined recall in every method"):
        ranks(table[table["case"] == "case_1"], metric="recall")
    alone = ranks(tidy({"a": [0.5], "b": [0.4]}))
    assert alone[["rank_low", "rank_high"]].to_numpy().tolist() == [[1, 1], [2, 2]]


def test_methods_of_several_recipes_cannot_be_ranked():
    table = pd.concat([tidy({"KD": [0.5, 0.6]}, recipe="E-E"), tidy({"KD": [0.4, 0.4]}, recipe="B-B")])
    with pytest.raises(InputError, match="'KD' mixes 2 values of 'recipe'"):
        ranks(table)


def test_ranks_name_missing_cases_and_methods():
    table = tidy({"a": [0.5, 0.6, 0.7], "b": [0.5, 0.6], "c": [0.4, 0.4, 0.4]})
    with pytest.raises(InputError, match="'b' has no dice of cases case_2"):
        ranks(table)
    with pytest.raises(InputError, match="no method 'T1' in the table to be the reference: it has a, c"):
        ranks(table[table["method"] != "b"], reference="T1")
    with pytest.raises(InputError, match="no better direction"):
        ranks(tidy({"a": [0.1]}, "volume_error"), metric="volume_error")
