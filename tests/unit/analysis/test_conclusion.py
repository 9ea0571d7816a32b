import json
import shutil

import numpy as np
import pandas as pd
import pytest
from analysis_tables import check, identity, tidy

from kdlib.analysis import conclusion, figures
from kdlib.analysis.figures.style import DOUBLE
from kdlib.analysis.labels import knowledge, methods
from kdlib.apps.notebooks import NOTEBOOKS
from kdlib.config import InputError
from kdlib.files import write_csv

ALONE = identity("S1 (10 %)")
KL = identity("KD(T1, S1)", method="kl", fraction=0.1, loss="kl", loss_label="KL", terms="PMD")
PSEUDO = identity("pseudo", role="control", control="pseudo_labels", teacher="T1", fraction=0.1)
SILENT = identity("zero", role="control", control="zero_weights", teacher="T1", fraction=0.1)
TEACHER = identity("T1")
STEPS = np.linspace(-0.004, 0.004, 8)  # by which patients differ


def save(folder, chapter, values, data="Scans", last=0.0, packed="", protocols=("corrected",)):
    """A chapter's tables: of each method (identity columns) its Dice in eight patients, converged but for `last`."""
    tables = []
    for columns, mean in values:
        rows = tidy({columns["method"]: list(mean + STEPS * (1 + mean))}).assign(**columns)
        tables += [
            rows.assign(protocol=protocol, patient=rows["case"], unlabelled=False, length=1.0) for protocol in protocols
        ]
    cases = pd.concat(tables)
    cases["run"] = f"{folder.name}-" + cases["run"]
    epochs = [(1, 0.5), (8, 0.8), (10, 0.8 + last)]
    history = pd.concat([
        cases.drop_duplicates("run").assign(epoch=epoch, name="val_dice", value=value) for epoch, value in epochs
    ])  # fmt: skip
    runs = cases.drop_duplicates("method").assign(parameters=57_297, data=data)
    for part, table in dict(cases=cases, history=history, runs=runs).items():
        path = folder / "tables" / f"{chapter}_{part}.csv"
        write_csv(path, table)
        if packed and part != "runs":
            table.to_csv(f"{path}.gz", index=False)
            path.unlink()


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_every_comparison_stands_once_with_its_gap(tmp_path, packed):
    save(tmp_path / "one", "07_fractions", [(TEACHER, 0.9), (ALONE, 0.8), (KL, 0.82), (PSEUDO, 0.85)], packed=packed)
    save(tmp_path / "one", "08_length", [(ALONE, 0.8), (KL, 0.82), (SILENT, 0.8)])
    save(tmp_path / "two", "07_fractions", [(ALONE, 0.8), (KL, 0.79)], data="phantom")
    table = conclusion.everything([tmp_path / "one", tmp_path / "two"])
    assert list(table["study"]) == ["one"] * 3 + ["two"]
    assert list(table["chapter"]) == ["07_fractions", "08_length", "08_length", "07_fractions"]
    assert list(table["knowledge"]) == ["pseudo-labels", "predictions", "control", "predictions"]
    assert list(table["difference"].round(6)) == [0.05, 0.02, 0.0, -0.01]
    assert list(table["gap"].round(6)[:3]) == [0.1] * 3 and np.isnan(table["gap"][3]), "the study's teacher, if any"
    assert list(table["closed"]) == ["50 %", "20 %", "0 %", ""]
    assert list(table["gain"][:2]) == ["8 of 8"] * 2 and set(table["labels"]) == {"10 %"}
    assert list(table["verdict"][:2]) == ["better", "better"]


def test_of_a_comparison_of_several_chapters_the_one_of_most_seeds_counts_then_the_last(tmp_path):
    save(tmp_path / "one", "02_x", [(ALONE, 0.8), (KL, 0.81), (PSEUDO, 0.81)])
    for part in ("cases", "history", "runs"):
        path = tmp_path / "one" / "tables" / f"02_x_{part}.csv"
        table = pd.read_csv(path)
        again = table[table["method"] != PSEUDO["method"]].assign(seed=1)
        again["run"] += "-1"
        write_csv(path, pd.concat([table, again]))
    save(tmp_path / "one", "04_x", [(ALONE, 0.8), (KL, 0.82), (PSEUDO, 0.82)])
    save(tmp_path / "one", "08_x", [(ALONE, 0.8), (KL, 0.83), (PSEUDO, 0.83)])
    table = conclusion.everything([tmp_path / "one"]).set_index("knowledge")
    assert (table["chapter"]["predictions"], table["seeds"]["predictions"]) == ("02_x", 2)
    assert table["chapter"]["pseudo-labels"] == "08_x" and table["difference"].round(6)["pseudo-labels"] == 0.03


def test_of_two_studies_that_share_trainings_the_one_of_more_seeds_counts(tmp_path):
    save(tmp_path / "one", "02_x", [(ALONE, 0.8), (KL, 0.81), (PSEUDO, 0.81)])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for part in ("cases", "history", "runs"):
        path = tmp_path / "two" / "tables" / f"02_x_{part}.csv"
        table = pd.read_csv(path)
        table = table[table["method"] != PSEUDO["method"]]
        write_csv(path, pd.concat([table, table.assign(seed=1, run=table["run"] + "-1")]))
    table = conclusion.everything([tmp_path / "one", tmp_path / "two"]).set_index("knowledge")
    assert table["study"].to_dict() == {"pseudo-labels": "one", "predictions": "two"}
    assert table["seeds"].to_dict() == {"pseudo-labels": 1, "predictions": 2}


def test_a_teacher_of_another_chapter_that_still_gains_withholds_the_verdict(tmp_path):
    save(tmp_path / "one", "01_x", [(TEACHER, 0.9)], last=0.1)
    save(tmp_path / "one", "04_x", [(ALONE, 0.8), (KL, 0.82), (SILENT, 0.82)])
    table = conclusion.everything([tmp_path / "one"]).set_index("knowledge")["verdict"]
    assert table["predictions"] == "not converged" and table["control"] == "better", "zero weights: taught nothing"


def test_sentences_are_of_people_and_count_what_has_converged(tmp_path):
    save(tmp_path / "near", "02_x", [(TEACHER, 0.81), (ALONE, 0.8), (KL, 0.801), (SILENT, 0.99)])
    save(tmp_path / "far", "07_x", [(TEACHER, 0.9), (ALONE, 0.7), (KL, 0.721), (PSEUDO, 0.8)], data="CT")
    save(tmp_path / "rising", "07_x", [(TEACHER, 0.9), (ALONE, 0.1), (KL, 0.8)], data="MR", last=0.1)
    save(tmp_path / "made", "07_x", [(TEACHER, 0.9), (ALONE, 0.2), (KL, 0.9)], data="Phantom")
    table = conclusion.everything([tmp_path / name for name in ("near", "far", "rising", "made")])
    said = conclusion.sentences(table)
    assert (
        said[0].startswith("Of 3 comparisons") and "Scans, spleen (8 patients) and CT, spleen (8 patients)" in said[0]
    )
    assert "S1 with 10 % of the labels on CT, spleen from pseudo-labels of T1: +0.100" in said[1]
    assert "50 % of the gap to T1" in said[1] and "8 of 8 patients gain" in said[1]
    assert said[2].endswith("by +0.001 (1 comparison); where it lacks more, by +0.021 to +0.100 (2 comparisons).")
    mixed = conclusion.sentences(table[(table["study"] != "far") | (table["knowledge"] == "pseudo-labels")])[2]
    assert mixed.endswith("What the teachers give differs between the two, so the distance may not be the reason.")
    assert said[-1].endswith("predictions +0.011 Dice (2 comparisons) and pseudo-labels +0.100 Dice (1 comparison).")
    assert "Phantom" in " ".join(conclusion.sentences(table[table["study"] == "made"]))
    rising = conclusion.sentences(table[table["study"] == "rising"])
    assert rising == ["No comparison of a converged student with itself alone."]
    page = conclusion.conclusion_markdown(table, "figures/when.png")
    assert said[0].endswith("1 more has not converged and does not count.")
    assert page.startswith(f"**{said[0]}**") and f"- {said[1]}" in page and "(figures/when.png)" in page
    page = conclusion.table_markdown(table)
    assert (
        "Phantom" not in page and "zero-weight" not in page and page.splitlines()[-1].startswith("| **not converged**")
    )
    assert page.index("pseudo-labels of T1 |") < page.index("KL from T1 |"), "the largest change first"


def test_data_are_named_with_their_class_or_the_number_of_them(tmp_path):
    save(tmp_path / "one", "02_x", [(TEACHER, 0.9), (ALONE, 0.7), (KL, 0.72)], data="CT (24 subjects, windowed)")
    path = tmp_path / "one" / "tables" / "02_x_cases.csv"
    cases = pd.read_csv(path)
    save(tmp_path / "all", "02_x", [(TEACHER, 0.9), (ALONE, 0.7), (KL, 0.72)], data="CT (24 subjects, windowed)")
    both = pd.concat([cases, cases.assign(**{"class": "liver"})])
    both["run"] = both["run"].str.replace("one", "all")
    write_csv(tmp_path / "all" / "tables" / "02_x_cases.csv", both)
    table = conclusion.everything([tmp_path / "one", tmp_path / "all"])
    assert list(table["data"]) == ["CT, spleen", "CT, 2 classes"]
    assert "on CT, spleen (8 patients) and CT, 2 classes (8 patients)" in conclusion.sentences(table)[0]


def test_lengths_are_compared_within_one_study(tmp_path):
    save(tmp_path / "best", "07_x", [(TEACHER, 0.9), (ALONE, 0.7), (PSEUDO, 0.8), (KL, 0.79)], data="CT")
    save(tmp_path / "long", "08_x", [(TEACHER, 0.9), (ALONE, 0.7), (KL, 0.71)])
    for part, change in {"cases": 0.02, "history": 0, "runs": 0}.items():  # twice as long, everything as it was but KL
        path = tmp_path / "long" / "tables" / f"08_x_{part}.csv"
        table = pd.read_csv(path)
        twice = table[table["role"] != "teacher"].assign(length=2.0)
        twice["run"] += "-twice"
        twice["value"] += change * (twice["method"] == "kl")
        twice["method"] += " 2 x"
        write_csv(path, pd.concat([table, twice]))
    said = conclusion.sentences(conclusion.everything([tmp_path / "best", tmp_path / "long"]))[-1]
    assert said == (
        "By length of training (1 x: the usual steps of that study), S1 with 10 % of the labels on Scans, spleen, "
        "taught by KL from T1: 1 x +0.010 [+0.010, +0.010] (better) and 2 x +0.030 [+0.030, +0.030] (better)."
    )


def test_nobody_gains(tmp_path):
    save(tmp_path / "one", "07_x", [(TEACHER, 0.9), (ALONE, 0.8), (KL, 0.78)])
    said = conclusion.sentences(conclusion.everything([tmp_path / "one"]))
    assert said[1] == (
        "In none of them does the student gain. The most is lost by S1 with 10 % of the labels on Scans, spleen from "
        "KL from T1: \N{MINUS SIGN}0.020 [\N{MINUS SIGN}0.020, \N{MINUS SIGN}0.020] Dice (worse; 0 of 8 patients gain)."
    )


def test_a_decided_loss_is_told_though_an_undecided_one_is_larger(tmp_path):
    save(tmp_path / "one", "07_x", [(TEACHER, 0.9), (ALONE, 0.8), (KL, 0.78)])
    table = conclusion.everything([tmp_path / "one"])
    open_one = table.assign(difference=-0.05, verdict="inconclusive")
    said = conclusion.sentences(pd.concat([table, open_one], ignore_index=True))[1]
    assert "The largest decided loss is of S1 with 10 % of the labels" in said
    assert "lost" not in (alone := conclusion.sentences(open_one)[1]) and "loss" not in alone


def test_what_a_student_learns_is_named():
    thesis = identity("KD(T2, S1)")
    unlabelled = dict(KL, method="u", unlabelled=True)
    feature = identity("KD(T1, S1)", method="f", loss="at", loss_label="attention", terms="B-B")
    balanced = dict(KL, method="b", recipe="kl")
    given = pd.DataFrame([thesis, KL, balanced, unlabelled, feature, PSEUDO, SILENT]).fillna({"unlabelled": False})
    assert [knowledge(row) for _, row in methods(given).iterrows()] == [
        ("features (and predictions)", "the thesis's terms from T2"),
        ("predictions", "KL from T1"),
        ("predictions", "KL, balanced from T1"),
        ("predictions, unlabelled images", "KL from T1, on unlabelled images too"),
        ("features (and predictions)", "attention, B-B from T1"),
        ("pseudo-labels", "pseudo-labels of T1"),
        ("control", "zero-weight control"),
    ]


def test_what_a_study_reuses_of_another_stands_once_and_volumes_stand_apart(tmp_path):
    save(tmp_path / "flat", "02_distillation", [(ALONE, 0.8), (KL, 0.82)])
    deep = [dict(row, dimensions=3, method=f"3D {row['method']}") for row in (ALONE, KL)]
    save(tmp_path / "deep", "11_dimensions", [(ALONE, 0.8), (KL, 0.82), (deep[0], 0.9), (deep[1], 0.91)])
    path = tmp_path / "deep" / "tables" / "11_dimensions_cases.csv"
    reused = pd.read_csv(path).replace({"run": {"deep-kl-0": "flat-kl-0"}})
    write_csv(path, reused.fillna({"dimensions": 2}))
    table = conclusion.everything([tmp_path / "flat", tmp_path / "deep"])
    assert list(table["study"]) == ["flat", "deep"] and list(table["difference"].round(6)) == [0.02, 0.01]
    assert list(table["data"]) == ["Scans, spleen", "Scans, spleen, in 3D"]


def test_what_cannot_be_concluded_is_one_line(tmp_path):
    save(tmp_path / "teachers", "01_baseline", [(TEACHER, 0.9), (ALONE, 0.8)])
    save(tmp_path / "corrected", "05_correction", [(ALONE, 0.8), (KL, 0.8)], protocols=("thesis", "corrected"))
    for name in ("teachers", "corrected", "nothing"):
        with pytest.raises(InputError, match=f"{name} holds no comparison with a student alone"):
            conclusion.everything([tmp_path / name])
    save(tmp_path / "one", "07_x", [(ALONE, 0.8), (KL, 0.78)])
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    with pytest.raises(InputError, match="again holds only trainings of the studies named before it: leave it out"):
        conclusion.everything([tmp_path / "one", tmp_path / "again"])
    with pytest.raises(InputError, match="no comparison whose teacher is known"):
        figures.when(conclusion.counted(conclusion.everything([tmp_path / "one"])))


def test_figure_has_a_mark_for_each_comparison(tmp_path):
    save(tmp_path / "one", "07_x", [(TEACHER, 0.9), (ALONE, 0.8), (KL, 0.82), (PSEUDO, 0.85), (SILENT, 0.8)])
    save(tmp_path / "two", "07_x", [(TEACHER, 0.9), (ALONE, 0.7), (KL, 0.72)], data="CT")
    save(tmp_path / "rising", "07_x", [(TEACHER, 0.9), (ALONE, 0.1), (KL, 0.8)], data="MR", last=0.1)
    table = conclusion.everything([tmp_path / name for name in ("one", "two", "rising")])
    drawn = figures.when(conclusion.counted(table))
    check(drawn, DOUBLE)
    assert len(drawn.axes[0].containers) == 3
    many = pd.concat([conclusion.counted(table).head(1).assign(data=f"data {number}") for number in range(8)])
    check(figures.when(many), DOUBLE)


def test_the_notebook_writes_table_figure_and_page(tmp_path):
    from kdlib.apps.notebooks import execute

    save(tmp_path / "one", "07_x", [(TEACHER, 0.9), (ALONE, 0.8), (KL, 0.82), (PSEUDO, 0.85)])
    parameters = {"results": str(tmp_path), "studies": ["one"], "study": "both"}
    execute(NOTEBOOKS / "conclusion.ipynb", tmp_path / "executed.ipynb", parameters)
    written = {str(path.relative_to(tmp_path / "both")) for path in (tmp_path / "both").rglob("*.*")}
    assert {"tables/everything.csv", "figures/when.pdf", "figures/when.png", "when.md", "everything.md"} <= written
    assert len(pd.read_csv(tmp_path / "both/tables/everything.csv")) == 2
    assert "The most is gained by S1" in json.dumps(json.loads((tmp_path / "executed.ipynb").read_text()))
