"""The answer of a study: its rows, sentences and Markdown follow from the cases, and from nothing else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from analysis_tables import distilled, identity, tidy

from kdlib.analysis import report
from kdlib.analysis.answer import (
    answer,
    answer_markdown,
    answer_sentences,
    by_class,
    class_sentence,
    classes_markdown,
    effects_of,
    effects_sentence,
    fraction_sentences,
    fractions,
    fractions_markdown,
    lead_sentence,
    length_sentences,
    lengths_markdown,
    loss_sentences,
)
from kdlib.analysis.sentences import comparison_sentences
from kdlib.analysis.statistics import baseline_pairs, compare, image_pairs
from kdlib.config import InputError
from kdlib.files import write_csv

VALUES = {
    "T1": np.full(8, 0.9), "S1 (50 %)": 0.7 + 0.01 * np.arange(8), "KD(T1, S1)": 0.75 + 0.01 * np.arange(8),
    "S2 (50 %)": 0.7 + 0.01 * np.arange(8), "KD(T1, S2)": 0.7 + 0.01 * np.arange(8) * np.array([1, -1] * 4),
}  # fmt: skip


@pytest.fixture
def cases() -> pd.DataFrame:
    parts = [
        tidy({name: values}, **{k: v for k, v in identity(name).items() if k != "method"})
        for name, values in VALUES.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_one_row_per_student_and_teacher_with_the_verdict_first(cases):
    pairs = baseline_pairs(cases)
    assert pairs == [("KD(T1, S1)", "S1 (50 %)"), ("KD(T1, S2)", "S2 (50 %)")]
    table = answer(cases, compare(cases, pairs), dict.fromkeys(VALUES, 57_297))
    assert table.columns[0] == "verdict" and table["verdict"].tolist() == ["better", "inconclusive"]
    assert table["student"].tolist() == ["S1", "S2"] and table["gain"].tolist() == ["8 of 8", "0 of 8"]
    first = table.iloc[0]
    assert (first["dice_alone"], first["dice_distilled"], first["dice_teacher"]) == pytest.approx((0.735, 0.785, 0.9))
    assert first["change"] == "+0.050 [+0.050, +0.050]" and first["labels"] == "50 %"


def test_losses_stand_beside_what_needs_no_teacher(cases):
    """Numbers by hand: each method is the student alone, moved by the same amount in every patient."""
    verdicts = pd.DataFrame({
        "a": ["kl", "at", "dkd", "random", "longer"],
        "label_a": ["KL", "AT", "DKD", "random teacher", "longer training"],
        "difference": [0.004, -0.010, 0.02, 0.03, 0.008], "low": [0.001, -0.02, 0.01, 0.02, 0.005],
        "high": [0.007, -0.001, 0.03, 0.04, np.nan],
        "verdict": ["better", "worse", "not converged", "better", "better"],
    }).assign(low=lambda table: table["low"].where(table["high"].notna()))  # fmt: skip
    roles = ["distilled"] * 3 + ["control"] * 2
    table = pd.DataFrame({"method": verdicts["a"], "role": roles, "teacher": ["T1"] * 4 + [np.nan]})
    first, second = loss_sentences(table, verdicts)
    assert first == (
        "Of 3 ways to learn from a teacher: 1 better, 1 worse and 1 not converged. "
        "The most is gained by KL: +0.004 [+0.001, +0.007] Dice (better)."
    )
    assert second == "Without a teacher: longer training +0.008 Dice (better)."
    (least,) = loss_sentences(table, verdicts[1:2])
    assert least.endswith("None gains on average; the least is lost by AT: \N{MINUS SIGN}0.010 "
                          "[\N{MINUS SIGN}0.020, \N{MINUS SIGN}0.001] Dice (worse).")  # fmt: skip
    (only,) = loss_sentences(table, verdicts[2:4])
    assert only.endswith("gained by DKD: +0.020 [+0.010, +0.030] Dice (not converged).")


@pytest.mark.parametrize(("late", "verdicts"), [(0.0, ("better", "equivalent")), (0.05, ("not converged",) * 2)])
def test_what_each_term_is_worth_in_a_sentence(late, verdicts):
    """The thesis's terms at two scales: B-B brings 0.02 whatever else is on, PMD nothing; and PMD may learn on."""
    cases, history = [], []
    for about in [identity("S1 (50 %)"), *(distilled("kl", terms) for terms in ("B-B", "PMD", "B-B+PMD"))]:
        gain = 0.02 * ("B-B" in about["terms"])
        cases.append(tidy({about["method"]: 0.7 + gain + 0.01 * np.arange(8)}).assign(**about))
        dice = [0.9, 0.9 + late * ("PMD" in about["terms"])]
        rows = dict(run=about["method"], epoch=[4, 5], name="val_dice", value=dice)
        history.append(pd.DataFrame(rows).assign(**about))
    effects = effects_of(pd.concat(cases, ignore_index=True), pd.concat(history, ignore_index=True))
    assert effects_sentence(effects) == (
        "On average over all subsets of the other terms, Dice with a term minus without it: with B-B +0.020 "
        f"[+0.020, +0.020] Dice ({verdicts[0]}) and with PMD +0.000 [+0.000, +0.000] Dice ({verdicts[1]})."
    )


def test_the_report_says_which_loss_and_which_term_is_worth_something(tmp_path):
    """Also as losses.md, which the README shows."""
    row = dict(a="kl", b="S1", label_a="KL", label_b="S1", n=8, difference=0.004, low=0.001, high=0.007, p_holm=0.01,
               verdict="better", minimum_detectable=0.1)  # fmt: skip
    tables = {
        "03_comparisons": row, "03_terms": row | dict(label_a="with B-B"), "04_comparisons": row,
        "04_loss_comparison": dict(method="kl", role="distilled", teacher="T1"),
    }  # fmt: skip
    for name, one in tables.items():
        write_csv(tmp_path / "tables" / f"{name}.csv", pd.DataFrame([one]))
    for name in ("03_ablation_runs", "04_loss_comparison_runs"):
        write_csv(tmp_path / "tables" / f"{name}.csv", pd.DataFrame(dict(run=["r", "s"], method=["kl", "S1"], seed=0)))
    page = report.findings(tmp_path).text
    term, loss = (tmp_path / "losses.md").read_text(encoding="utf-8").splitlines()
    assert term.endswith("Dice with a term minus without it: with B-B +0.004 [+0.001, +0.007] Dice (better).")
    assert loss.startswith("- Of 1 way to learn from a teacher: 1 better. The most is gained by KL: +0.004")
    assert term.removeprefix("- ") in page and loss.removeprefix("- ") in page


def test_by_class_tells_where_it_helps_and_where_it_hurts(cases):
    down = cases["method"].eq("KD(T1, S1)") & cases["metric"].eq("dice")
    small = cases.assign(value=cases["value"].mask(down, cases["value"] - 0.08))  # 0.05 gained becomes 0.03 lost
    parts = [part.assign(**{"class": name}) for name, part in {"adrenal": small, "spleen": cases}.items()]
    volume = [part[part["metric"] == "dice"].assign(metric="truth_volume", value=ml)
              for part, ml in zip(parts, (5.0, 200.0), strict=True)]  # fmt: skip
    both = pd.concat([*parts, *volume], ignore_index=True)
    history = pd.DataFrame([dict(identity(name), run=name, epoch=epoch, name="val_dice", value=0.7)
                            for name in VALUES for epoch in (1, 4, 5)])  # fmt: skip
    table = by_class(both, history)
    assert table["class"].tolist() == ["spleen"] * 2 + ["adrenal"] * 2 and table["volume"].tolist()[::2] == [
        200,
        5,
    ]
    assert table["verdict"].tolist() == ["better", "inconclusive", "worse", "inconclusive"]
    first = table.iloc[0]
    assert first["dice_teacher"] == pytest.approx(0.9) and first["difference"] == pytest.approx(0.05)
    assert first["p_holm"] == pytest.approx(4 / 2**7), "one family of four tests"
    said = class_sentence(table)
    assert said.startswith(
        "S1 distilled from T1 is, of 2 classes, better in spleen and worse in adrenal; on average it changes by "
        "\N{MINUS SIGN}0.030 Dice in the smaller half of the classes and by +0.050 in the larger."
    )
    assert class_sentence(table[table["class"] == "spleen"]) == "There is one class, spleen."
    assert "no test case" not in said and not table[["never", "never_alone"]].to_numpy().any()
    lost = both["method"].eq("KD(T1, S1)") & both["metric"].eq("dice") & both["class"].eq("adrenal")
    missed = by_class(both.assign(value=both["value"].mask(lost, 0.0)), history)
    assert "Trainings that find the adrenal in no test case: 1 of S1 distilled from T1, 0 of S1 alone." in (
        class_sentence(missed)
    )
    without = both["metric"].isin(["dice", "truth_volume"]) & both["class"].eq("adrenal") & both["patient"].eq("case_0")
    assert without.any()
    none = both.assign(value=both["value"].mask(lost, 0.0))  # a patient without adrenals, in whom nothing is right
    none.loc[without, "value"] = none.loc[without, "metric"].eq("dice").astype(float)
    assert by_class(none, history)["never"].tolist() == missed["never"].tolist()
    late = (history["epoch"] == 5) & (history["run"] == "KD(T1, S1)")
    rising = history.assign(value=history["value"].mask(late, 0.8))
    said_less = class_sentence(by_class(both, rising))
    assert "of 2 classes, better in none, worse in none and in each without a verdict, not converged;" in said_less
    page = classes_markdown(table)
    assert page.startswith(said) and "| **worse** | adrenal | 5.0 | S1 | T1 | 0.735 | 0.705 |" in page


def test_a_class_that_no_test_patient_has_is_missed_by_no_training(cases):
    empty = cases[cases["metric"] == "dice"].assign(metric="truth_volume", value=0.0)
    history = pd.DataFrame([dict(identity(name), run=name, epoch=epoch, name="val_dice", value=0.7)
                            for name in VALUES for epoch in (1, 4, 5)])  # fmt: skip
    table = by_class(pd.concat([cases, empty], ignore_index=True), history)
    assert len(table) and (table[["never_alone", "never"]] == 0).all(axis=None) and (table["volume"] == 0).all()


@pytest.mark.parametrize("several", [True, False])
def test_the_report_of_several_classes_says_where_it_helps(several, tmp_path):
    row = dict(verdict="better", student="S1", teacher="T1", dice_alone=0.7, dice_distilled=0.8, change="+0.100",
               gain="8 of 8", dice_teacher=0.9, n=8, difference=0.1, volume=5.0, never=0, never_alone=0)  # fmt: skip
    table = pd.DataFrame([row | {"class": "adrenal"}, row | {"class": "spleen" if several else "adrenal"}])
    write_csv(tmp_path / "tables" / "02_classes.csv", table)
    assert ("In which classes?" in report.findings(tmp_path).text) == several
    assert (tmp_path / "classes.md").is_file() == several


def test_the_report_counts_the_seeds_of_each_chapter_alone(tmp_path):
    row = dict(a="KD", b="S1", label_a="KD", label_b="S1", n=8, difference=0.1, low=0.0, high=0.2, p_holm=0.01,
               verdict="better", minimum_detectable=0.1)  # fmt: skip
    for chapter, table, seeds, alone in (("02", "distillation", 3, 1), ("02b", "controls", 1, 1)):
        write_csv(tmp_path / "tables" / f"{chapter}_{'comparisons' if seeds > 1 else table}.csv", pd.DataFrame([row]))
        trained = [("KD", seed) for seed in range(seeds)] + [("S1", seed) for seed in range(alone)]
        runs = pd.DataFrame([dict(run=f"{chapter}{key}{seed}", method=key, seed=seed) for key, seed in trained])
        write_csv(tmp_path / "tables" / f"{chapter}_{table}_runs.csv", runs)
    said = report.findings(tmp_path).text
    assert said.count("8 patients, 3 seeds against 1,") == said.count("8 patients, 1 seed,") == 1


def test_sentences_and_markdown_say_what_the_table_says(cases):
    table = answer(cases, compare(cases, baseline_pairs(cases)), dict.fromkeys(VALUES, 57_297))
    one, two = answer_sentences(table)
    assert one == (
        "**S1** (57,297 parameters, 50 % of the labels): Dice 0.735 alone, 0.785 distilled from T1 "
        "(+0.050 [+0.050, +0.050], better; 8 of 8 gain)."
    )
    assert "inconclusive; 0 of 8 gain" in two
    assert lead_sentence(table) == (
        "Alone, on 50 % of the labels, the students reach 0.735 Dice; the best teacher, T1, 0.900 from all of them. "
        "Of 2 distilled students, each compared with itself alone: 1 better and 1 inconclusive."
    )
    lines = answer_markdown(table, "figures/02_overview.png").splitlines()
    assert lines[0] == f"**{lead_sentence(table)}**"
    assert lines[2].startswith("Mean Dice of 8 test patients, 1 seed") and "Inconclusive" in lines[2]
    assert "(figures/02_overview.png)" in lines[4]
    assert lines[6].startswith("| verdict | student | teacher | Dice alone")
    assert lines[8].startswith("| **better** | S1 (57,297 parameters) | T1 | 0.735 | 0.785 |")


def test_without_teachers_the_answer_says_nothing_of_them(cases):
    table = answer(cases, compare(cases, baseline_pairs(cases)), dict.fromkeys(VALUES, 1)).assign(dice_teacher=np.nan)
    assert lead_sentence(table).startswith("Of 2 distilled students, each compared with itself")


def test_a_fraction_says_what_share_of_the_gap_to_the_teacher_is_closed(cases):
    """T1 0.9, S1 alone 0.735 and distilled 0.785: 0.05 of 0.165; where the teacher is not better there is no share."""
    chosen = cases[cases["model"] != "S2"]
    table = fractions(chosen, compare(chosen, [("KD(T1, S1)", "S1 (50 %)")]))
    row = table.iloc[0]
    assert row["gap_closed"] == pytest.approx(0.05 / 0.165) and (row["closed"], row["gain"]) == ("30 %", "8 of 8")
    assert fraction_sentences(table) == [
        "With 50 % of the labels S1 (alone 0.735, T1 0.900) gains most by the thesis's terms from T1: "
        "+0.050 [+0.050, +0.050] Dice, better, 30 % of the gap."
    ]
    lines = fractions_markdown(table).splitlines()
    assert lines[0].startswith("**With 50 %") and lines[6].startswith(
        "| **better** | S1 | 50 % | the thesis's terms from T1 | 0.735 | 0.785 |"
    )
    compared, seeds = compare(chosen, [("KD(T1, S1)", "S1 (50 %)")]), {"KD(T1, S1)": 1, "S1 (50 %)": 1}
    (sentence,) = comparison_sentences(compared, seeds)
    asked = f"Is it the teacher, or the unlabelled images?\n\n- {sentence}\n\n| verdict |"
    both = pd.concat([table, table.assign(a="S1 (50 %)")], ignore_index=True)
    assert asked in fractions_markdown(both, compared)
    mixed = fractions_markdown(both.assign(seeds=[1, 3]))
    assert "Mean Dice of 8 test patients, 1 to 3 seeds; changes" in mixed and "one seed does not show" in mixed
    lost = fraction_sentences(table.assign(difference=-0.01, gap_closed=-0.06))
    assert "gains by nothing, and loses least by the thesis's terms" in lost[0] and "gap" not in lost[0]
    rising = pd.concat([table, table.assign(difference=0.2, verdict="not converged")])
    assert fraction_sentences(rising) == fraction_sentences(table), "the largest gain has not converged"
    assert fraction_sentences(rising.iloc[1:]) == ["With 50 % of the labels no training of a taught S1 has converged."]
    weak = chosen.assign(value=chosen["value"].mask(chosen["method"] == "T1", 0.5))
    row = fractions(weak, compare(weak, [("KD(T1, S1)", "S1 (50 %)")])).iloc[0]
    assert np.isnan(row["gap_closed"]) and row["closed"] == ""


def test_a_teacher_that_is_not_in_the_tables_is_not_taken_for_another(cases):
    chosen = cases[cases["model"] != "S2"]
    other = chosen.assign(teacher=chosen["teacher"].replace("T1", "T2"))
    row = fractions(other, compare(other, [("KD(T1, S1)", "S1 (50 %)")]))
    assert row["teacher"].item() == "T2" and row[["dice_teacher", "gap"]].isna().all(axis=None)
    assert "(alone 0.735) gains most by" in fraction_sentences(row)[0]


def test_unlabelled_images_are_compared_with_what_lacks_them_or_the_teacher():
    """Of each student and fraction: KL on all images with KL on labelled ones; it, and masks, with self-consistency."""

    def of(model, fraction, dice, **about):
        columns = identity(f"{model} {fraction} {about}", model=model, fraction=fraction, length=1.0, **about)
        return tidy({columns["method"]: dice + 0.01 * np.arange(10)}).assign(**columns)

    def ways(model, fraction):
        taught = dict(model=model, fraction=fraction, teacher="T1", role="distilled", loss="kl", terms="PMD")
        control = dict(model=model, fraction=fraction, role="control", unlabelled=True)
        return [
            of(**taught, dice=0.8, unlabelled=False), of(**taught, dice=0.84, unlabelled=True),
            of(**control, dice=0.82, teacher="self", control="self_consistency"),
            of(**control, dice=0.9, teacher="T1", control="pseudo_labels"),
            of(**control, dice=0.81, control="unused_images"),
        ]  # fmt: skip

    whole = of("S1", 1.0, 0.85, teacher="T1", role="distilled", loss="kl", terms="PMD", unlabelled=False)
    table = pd.concat([*ways("S1", 0.1), *ways("E1", 0.5), whole], ignore_index=True)
    pairs = image_pairs(table)
    found = compare(table, pairs)
    assert len(pairs) == 8 and found["difference"].tolist() == pytest.approx([0.04, 0.02, 0.08, 0.01] * 2)
    assert image_pairs(whole) == []
    said = comparison_sentences(found[found["a"].str.startswith("E1")], dict.fromkeys(table["method"], 1))
    assert (
        said[0].endswith("Dice +0.040 [+0.040, +0.040] (10 patients, 1 seed, p 0.016).") and " does better " in said[0]
    )
    assert said[1].count("self-consistency") == 1


def test_the_longest_training_says_whether_the_plateau_is_higher_and_the_shorter_ones_who_is_faster():
    alone, taught = {0.5: 0.6, 1.0: 0.795, 2.0: 0.8}, {0.5: 0.79, 1.0: 0.81, 2.0: 0.83}
    parts = []
    for way, dices in dict(alone=alone, taught=taught).items():
        about = dict(role="baseline")
        if way == "taught":
            about = dict(role="distilled", teacher="T1", loss="kl", terms="PMD")
        for length, dice in dices.items():
            about |= dict(model="S1", fraction=0.5, length=length, method=f"{way}{length}")
            parts.append(tidy({about["method"]: dice + 0.01 * np.linspace(-1, 1, 8)}).assign(**about))
    table = pd.concat(parts, ignore_index=True)
    rows = fractions(table, compare(table, baseline_pairs(table)))
    assert rows["times"].tolist() == ["0.5 x", "1 x", "2 x"] and rows["length"].tolist() == [0.5, 1, 2]
    (said,) = length_sentences(rows.iloc[::-1])
    assert "S1 taught by kl from T1: +0.030 [+0.030, +0.030] Dice at 2 x the usual steps (better), not shown" in said
    assert "to be a plateau: 1 x to 2 x still changed it by +0.005 alone and +0.020 taught. Alone" in said
    (flat,) = length_sentences(rows.assign(dice=rows["dice"].clip(upper=0.815)))
    assert "(better), a higher plateau. Alone" in flat
    (once,) = length_sentences(rows.tail(1))
    assert "(better), one length shows no plateau. Alone" in once
    assert "Alone its best Dice is 0.800 (2 x), within 0.01 from 1 x on;" in said
    assert said.endswith("so taught it is there from 0.5 x on, and at best 0.830 (2 x).")
    dip = length_sentences(rows.assign(dice_alone=[0.8, 0.78, 0.805], dice=[0.8, 0.78, 0.8]))[0]
    assert "within 0.01 from 2 x on; so taught it is there from 2 x on" in dip, "lost in between"
    lost = length_sentences(rows.assign(dice_alone=[0.8, 0.82, 0.78]))[0]
    assert "Alone its best Dice is 0.820 (1 x), which longer ones lose; so taught it is there" in lost
    page = lengths_markdown(rows.assign(verdict="not converged", dice=0.0))
    assert "(not converged), no plateau yet." in page and "so taught it is there at no length, and" in page
    assert page.count("| **not converged** |") == 3 and "| length |" in page


def test_a_report_judges_each_stage_of_the_correction_for_itself(tmp_path):
    rows = dict(method="s", label="S1 (50 %)", dice_100=0.8, converged=[False, True], last_fifth=[0.04, 0.001])
    staged = pd.DataFrame(rows | dict(stage=["thesis", "corrected"]))
    write_csv(tmp_path / "tables" / "05_convergence.csv", staged)
    write_csv(tmp_path / "tables" / "02_convergence.csv", staged[1:].drop(columns="stage"))
    said = report.opening(tmp_path).text
    assert "1 of 3 methods has not converged, and gets no verdict" in said and "thesis, S1 (50 %) (+0.040)" in said


def test_seeds_are_those_of_the_students(cases):
    trained = cases[cases["role"] != "teacher"]
    seeds = pd.concat([cases[cases["role"] == "teacher"], *(trained.assign(seed=seed) for seed in (1, 2))])
    assert set(answer(seeds, compare(seeds, baseline_pairs(seeds)), {})["seeds"]) == {2}
    one = seeds[seeds["seed"] != 2]
    assert "one seed does not show" in answer_markdown(
        answer(one, compare(one, baseline_pairs(one)), dict.fromkeys(VALUES, 1))
    )


def test_a_student_alone_has_no_answer(cases):
    with pytest.raises(InputError, match="no distilled student or control beside the same student alone"):
        baseline_pairs(cases[cases["role"] != "distilled"])
