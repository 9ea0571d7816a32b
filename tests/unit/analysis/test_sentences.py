import pandas as pd

from kdlib.analysis.sentences import comparison_sentences, convergence_sentence, withhold

VERDICTS = pd.DataFrame(
    [
        dict(a="d", b="s", n=72, difference=0.0123, low=0.0041, high=0.0207, p_holm=0.0004, verdict="better"),
        dict(a="d", b="t", n=72, difference=-0.02, low=-0.03, high=0.001, p_holm=0.31, verdict="inconclusive"),
    ]
)
LABELS = {"d": "KD(T1, S1)", "s": "S1 (50 %)", "t": "T1"}


def test_a_sentence_says_effect_interval_patients_seeds_and_p():
    assert comparison_sentences(VERDICTS, LABELS, 3) == [
        "KD(T1, S1) does better than S1 (50 %): Dice +0.012 [+0.004, +0.021] (72 patients, 3 seeds, p < 0.001).",
        "KD(T1, S1) differs inconclusively from T1: Dice -0.020 [-0.030, +0.001] (72 patients, 3 seeds, p 0.310).",
    ]


def test_a_method_that_has_not_converged_gets_no_verdict():
    table = pd.DataFrame(dict(method=["d", "s", "t"], last_fifth=[0.0, 0.02, 0.0], converged=[True, False, True]))
    withheld = withhold(VERDICTS, table)
    assert withheld["verdict"].tolist() == ["not converged", "inconclusive"]
    assert comparison_sentences(withheld, LABELS, 1)[0].startswith("KD(T1, S1) cannot be compared yet with S1 (50 %):")
    assert "1 of 3 methods have not converged" in convergence_sentence(table, LABELS)
    assert "S1 (50 %) (+0.020)" in convergence_sentence(table, LABELS)
    assert convergence_sentence(table[table["converged"]], LABELS).startswith("All 2 methods have converged")
