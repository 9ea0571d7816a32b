import pandas as pd

from kdlib.analysis.sentences import (
    comparison_sentences,
    controls_sentence,
    convergence_sentence,
    cost_sentence,
    diagnostics_sentence,
    gap_sentence,
    interval_of,
    listed,
    means_sentence,
    non_inferiority_sentence,
    sweep_sentence,
    verdict_sentence,
    withhold,
)

VERDICTS = pd.DataFrame(
    [
        dict(a="d", b="s", n=72, difference=0.0123, low=0.0041, high=0.0207, p_holm=0.0004, verdict="better"),
        dict(a="d", b="t", n=72, difference=-0.02, low=-0.03, high=0.001, p_holm=0.31, verdict="inconclusive"),
    ]
)
LABELS = {"d": "KD(T1, S1)", "s": "S1 (50 %)", "t": "T1"}
VERDICTS = VERDICTS.assign(label_a=VERDICTS["a"].map(LABELS), label_b=VERDICTS["b"].map(LABELS))


def test_a_sentence_says_effect_interval_patients_seeds_and_p():
    assert comparison_sentences(VERDICTS, {"d": 3, "s": 3, "t": 1}) == [
        "KD(T1, S1) does better than S1 (50 %): Dice +0.012 [+0.004, +0.021] (72 patients, 3 seeds, p < 0.001).",
        "KD(T1, S1) differs inconclusively from T1: Dice −0.020 [−0.030, +0.001] (72 patients, 3 seeds against 1, "
        "p 0.310).",
    ]


def test_a_method_that_has_not_converged_gets_no_verdict():
    table = pd.DataFrame(
        dict(method=["d", "s", "t"], label=LABELS.values(), last_fifth=[0, 0.02, 0], converged=[True, False, True])
    )
    withheld = withhold(VERDICTS, table)
    assert withheld["verdict"].tolist() == ["not converged", "inconclusive"]
    assert comparison_sentences(withheld, dict.fromkeys("dst", 1))[0].startswith(
        "KD(T1, S1) cannot be compared yet with S1 (50 %):"
    )
    assert "1 of 3 methods has not converged, and gets no verdict" in convergence_sentence(table)
    assert "S1 (50 %) (+0.020)" in convergence_sentence(table)
    assert convergence_sentence(table[table["converged"]]).startswith("All 2 methods have converged")


def judged(**columns):
    table = pd.DataFrame(dict(label_a=["KD(T1, S1)"] * 3, label_b=["zero", "random", "shuffled"], **columns))
    return table.assign(minimum_detectable=0.02)


def test_a_table_of_comparisons_is_summed_up_without_calling_open_ones_equal():
    table = judged(verdict=["better", "inconclusive", "worse"])
    said = verdict_sentence(table)
    assert said.startswith("Of 3 comparisons: 1 better (than zero), 1 worse (than shuffled), 1 inconclusive.")
    assert "differences of about 0.020 or more" in said and "inconclusive is not equal" in said
    assert "inconclusive is not equal" not in verdict_sentence(judged(verdict=["better"] * 3))
    several = judged(verdict=["better", "better", "worse"], question=["labels", "labels", "teacher"])
    assert verdict_sentence(several) == "Of 3 comparisons: 2 better, 1 worse.", "than what differs by question"


def test_a_margin_says_who_is_within_it_who_is_not_and_of_whom_nothing_is_known():
    table = pd.DataFrame(dict(
        label_a=["KD(T1, S1), 50 %", "KD(T1, S2), 50 %", "KD(T2, S1), 50 %", "E1"], margin=0.05,
        verdict=["non-inferior", "inferior", "not converged", "non-inferior"],
    ))  # fmt: skip
    assert non_inferiority_sentence(table) == (
        "Not worse than the teacher by 0.05 Dice: KD(T1, S1), 50 %; E1. Worse than it by more than 0.05 Dice: "
        "KD(T1, S2), 50 %. Not converged, so no verdict: KD(T2, S1), 50 %."
    )


def test_a_gain_that_a_control_shares_is_not_the_teacher_s():
    assert "every one of its 3 controls" in controls_sentence(judged(verdict=["better"] * 3))
    some = controls_sentence(judged(verdict=["better", "inconclusive", "worse"]))
    assert "does better than zero, but is not shown to do better than random and shuffled" in some
    assert "KD(T1, S1) is not shown" in controls_sentence(judged(verdict=["inconclusive"] * 3))


def test_means_and_gaps():
    means = pd.DataFrame(dict(
        label=["T1", "S1 (50 %)"], role=["teacher", "baseline"], model=["T1", "S1"], fraction=[1.0, 0.5],
        mean=[0.864, 0.855], low=[0.852, 0.843], high=[0.875, 0.864],
    ))  # fmt: skip
    assert means_sentence(means).endswith("that of S1 (50 %) 0.855 [0.843, 0.864]; their intervals overlap.")
    assert means_sentence(means.assign(high=[0.875, 0.85])).endswith("do not overlap.")
    assert "T1, reaches a Dice of 0.864" in gap_sentence(means) and "S1 \N{MINUS SIGN}0.009." in gap_sentence(means)


def test_inactive_terms_and_shrunk_teachers_are_named():
    signal = pd.DataFrame(dict(label="KD", term=["PMD", "B-B"], active=["always 0", "yes"], share=[0.0, 0.3]))
    assert diagnostics_sentence(signal) == "1 of 2 terms passes no gradient: PMD of KD (always 0)."
    assert "30% to 30%" in diagnostics_sentence(signal[1:])
    costs = pd.DataFrame(dict(
        model=["T1", "T2", "S1", "S2"], size="study", inference_parameters=[1000, 900, 50, 200],
        latency_ms=[10.0, 30.0, 5.0, 12.0],
    ))  # fmt: skip
    assert "5.0% of T1's parameters" in cost_sentence(costs) and "50% of its time" in cost_sentence(costs)
    assert "T1, narrower here than in the thesis, is faster than S2" in cost_sentence(costs)
    few = costs[costs["model"].isin(["T1", "S1"])]
    assert cost_sentence(few).endswith("50% of its time on a CPU."), "a study of one teacher and one student"


def test_numbers_in_sentences():
    assert interval_of(-0.01, -0.02, 0.001) == "\N{MINUS SIGN}0.010 [\N{MINUS SIGN}0.020, +0.001]"
    assert interval_of(0.5, float("nan"), float("nan")) == "+0.500"
    assert [listed("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_a_sweep_names_the_best_trial_of_each_and_what_the_choice_is_worth():
    rows = [("lr 0.01", "", 0.81), ("lr 0.02", "", 0.75), ("weight 1", "T1", 0.8), ("weight 2", "T1", 0.8349)]
    assert sweep_sentence(pd.DataFrame(rows, columns=["trial", "teacher", "dice_100"])) == (
        "Best of the student alone, 2 trials: lr 0.01, validation Dice 0.810 (the worst 0.750); "
        "of the distilled student, 2 trials: weight 2, validation Dice 0.835 (the worst 0.800)."
    )
