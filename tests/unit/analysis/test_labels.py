from __future__ import annotations

import pandas as pd
import pytest
from analysis_tables import distilled, identity, tidy

from kdlib.analysis.labels import method_labels, methods
from kdlib.analysis.statistics import compare, summarise
from kdlib.config import InputError

FULL = "E-E+B-B+D-D+PMD"


def labels(*rows: dict) -> list[str]:
    found = method_labels(pd.DataFrame(rows))
    assert list(found) == [row["method"] for row in rows]
    return list(found.values())


def test_networks_name_their_methods_where_there_are_several():
    names = ["T1", "S1", "S1 (50 %)", "KD(T1, S1)", "KD(T2, S1)"]
    opaque = [identity(name, method=f"id-{number}") for number, name in enumerate(names)]
    assert labels(*opaque) == names
    assert labels(identity("S1")) == ["S1"]


def test_a_student_without_a_teacher_is_no_distillation_where_all_rows_are_of_one_student():
    rows = [identity(name) for name in ("S1 (50 %)", "KD(T1, S1)", "shuffled teacher")]
    assert labels(*rows) == ["no distillation", "KD(T1, S1)", "shuffled teacher"]
    assert labels(*rows, identity("T1"))[0] == "S1 (50 %)"


def test_a_history_with_teachers_names_the_others_as_the_cases_do():
    rows = [identity(name) for name in ("S1 (50 %)", "KD(T1, S1)")]
    found = method_labels(pd.DataFrame([*rows, identity("T1")]), pd.DataFrame(rows))
    assert found == {"S1 (50 %)": "no distillation", "KD(T1, S1)": "KD(T1, S1)", "T1": "T1"}


def test_an_ablation_is_named_by_terms_and_a_comparison_of_losses_by_losses():
    alone = identity("S1 (50 %)")
    assert labels(alone, *(distilled("sp", terms) for terms in ("E-E", "E-E+PMD"))) == [
        "no distillation",
        "E-E",
        "E-E+PMD",
    ]
    rows = [distilled("kl"), distilled("sp", "E-E+B-B+D-D"), distilled("fitnet", FULL)]
    shuffled = [
        dict(row, role="control", control="shuffled_teacher", method=f"{row['method']}, shuffled") for row in rows[:2]
    ]
    assert labels(alone, *rows, *shuffled) == [
        "no distillation", "KL", "SP", "thesis terms, FITNET", "shuffled teacher, KL", "shuffled teacher, SP",
    ]  # fmt: skip


def test_labels_are_distinct_whatever_the_columns_say():
    rows = [identity("KD(T1, S1)", method=f"m{number}", length=float(number)) for number in (1, 2)]
    assert labels(*rows) == ["KD(T1, S1), 1 x as long", "KD(T1, S1), 2 x as long"]
    same = [identity("KD(T1, S1)", method=name) for name in ("a", "b")]
    assert labels(*same) == ["KD(T1, S1)", "KD(T1, S1) (b)"]
    tuned = [distilled("kl", recipe=name, method=name) for name in ("kl", "predictions", "mine")]
    assert labels(distilled("sp"), *tuned) == ["SP", "KL, balanced", "KL, tuned weight", "KL, mine"]
    assert labels(dict(method="x"), dict(method="y")) == ["x", "y"]  # nothing is known of them
    with pytest.raises(InputError, match="no column method"):
        methods(pd.DataFrame({"run": ["a"]}))


def test_empty_columns_of_a_csv_are_empty(tmp_path):
    table = pd.DataFrame([identity(name) for name in ("T1", "S1 (50 %)", "KD(T1, S1)")])
    table.to_csv(tmp_path / "table.csv", index=False)
    pd.testing.assert_frame_equal(methods(pd.read_csv(tmp_path / "table.csv")), methods(table), check_dtype=False)


def cases(*rows: dict) -> pd.DataFrame:
    parts = [tidy({row["method"]: [0.5, 0.6]}, **row) for row in rows]
    return pd.concat(parts, ignore_index=True)


def test_results_carry_labels_beside_ids():
    table = cases(identity("S1 (50 %)", method="x"), identity("KD(T1, S1)", method="y"))
    found = compare(table, [("y", "x")]).iloc[0]
    assert (found["a"], found["label_a"], found["label_b"]) == ("y", "KD(T1, S1)", "no distillation")
    assert summarise(table).set_index("method").loc["y", ["label", "role"]].tolist() == ["KD(T1, S1)", "distilled"]
