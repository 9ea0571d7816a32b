from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from analysis_tables import identity, tidy

from kdlib.analysis.sentences import worst_patient_sentence
from kdlib.analysis.statistics import (
    THESIS_COLUMNS,
    THESIS_TABLE,
    by_patient_table,
    compare,
    gradient_diagnostics,
    pivot_thesis,
    save_table,
)
from kdlib.files import read_csv, write_csv


@pytest.fixture
def study():
    values = {"S1 (50 %)": [0.6, 0.7, 0.8], "KD(T1, S1)": [0.7, 0.8, 0.9], "T1": [0.9, 0.9, 0.9]}
    parts = [
        tidy({name: each}, metric, **identity(name))
        for name, each in values.items()
        for metric in ("dice", "iou", "recall", "precision")
    ]
    table = pd.concat(parts, ignore_index=True)
    table.loc[(table["metric"] == "recall") & (table["case"] == "case_2") & (table["method"] == "T1"), "value"] = np.nan
    return table


def test_thesis_numbers_agree_with_each_other():
    # Dice = 2 IoU / (1 + IoU) for pooled pixels, to the three digits printed
    assert np.allclose(THESIS_TABLE["dice"], 2 * THESIS_TABLE["iou"] / (1 + THESIS_TABLE["iou"]), atol=0.0011)
    harmonic = 2 / (1 / THESIS_TABLE["recall"] + 1 / THESIS_TABLE["precision"])
    assert np.allclose(THESIS_TABLE["dice"], harmonic, atol=0.0011)


def test_pivot_in_the_form_of_the_thesis(study):
    found = pivot_thesis(study, {"S1 (50 %)": 57_297, "KD(T1, S1)": 57_297})
    assert list(found.index) == ["S1 (50 %)", "KD(T1, S1)", "T1"]
    assert set(THESIS_COLUMNS) <= set(found)
    row = found.loc["KD(T1, S1)"]
    assert row["Dice"] == "0.800 [0.55, 1.00]" and row["n"] == 3
    # t of 2 degrees of freedom; cut at 1
    assert (row["dice_low"], row["dice_mean"], row["dice_high"]) == pytest.approx((0.8 - 0.24841, 0.8, 1.0), abs=1e-5)
    assert row["params (M)"] == pytest.approx(0.057297)
    assert row["thesis Dice"] == 0.772 and found.loc["S1 (50 %)", "thesis Dice"] == 0.715
    assert pivot_thesis(study.assign(role="control"), {})["thesis Dice"].isna().all()
    assert found.loc["T1", "Recall"] == "0.900 [0.90, 0.90] (n = 2)"
    assert np.isnan(found.loc["T1", "params (M)"]) and np.isnan(found.loc["T1", "thesis Dice"])


def test_pivot_of_one_case_has_no_interval(study):
    found = pivot_thesis(study[study["case"] == "case_2"], {})
    assert found.loc["S1 (50 %)", "Dice"] == "0.800" and found.loc["T1", "Recall"] == "undefined"


def test_saved_tables(study, tmp_path):
    found = pivot_thesis(study, {})
    csv, tex = save_table(found, tmp_path / "tables", "thesis_4_2", "Mean & 95 % interval of method_1", THESIS_COLUMNS)
    assert csv.name == "thesis_4_2.csv" and tex.name == "thesis_4_2.tex"
    pd.testing.assert_frame_equal(pd.read_csv(csv, index_col=0).fillna({"interval": ""}), found, check_dtype=False)
    text = tex.read_text()
    for part in (r"\toprule", r"S1 (50 \%)", r"Mean \& 95 \% interval of method\_1", r"\label{tab:thesis_4_2}", "-- "):
        assert part in text
    assert "dice_mean" not in text and "dice\\_mean" not in text
    assert text.count(r"\\") == 4  # headings and three methods
    plain = save_table(compare(study, [("KD(T1, S1)", "T1")]), tmp_path, "pairs", "All pairs")[1].read_text()
    assert r"KD(T1, S1) & T1 & 3 &" in plain and "adjusted p" in plain and "\n0 &" not in plain


def test_bold_follows_the_verdict_and_never_the_largest(tmp_path):
    table = pd.DataFrame(
        {
            "a": ["KD_1", "KD_2", "KD_3"],
            "n": [8, 8, 8],
            "difference": [0.05, 0.2, -0.1],
            "p_holm": [0.0001, 0.3, np.nan],
            "minimum_detectable": [0.04, np.inf, 0.04],
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


def test_whole_numbers_are_printed_whole(tmp_path):
    table = pd.DataFrame({"group": ["a", "b"], "rank": [1.0, 2.0], "shared": [1.5, 2.0]})
    assert r"a & 1 & 1.500 \\" in save_table(table, tmp_path, "ranks", "Ranks")[1].read_text()


def test_diagnostics_tell_active_terms_from_inactive_ones():
    rows = [
        dict(run=method, method=method, epoch=epoch, name=name, value=value)
        for method, epoch, values in [
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
    found = gradient_diagnostics(pd.DataFrame(rows)).set_index(["method", "term"])
    assert found["active"].to_dict() == {("a", "PMD"): "always 0", ("a", "B-B"): "yes", ("b", "B-B"): "no gradient"}
    assert found.loc[("a", "B-B"), ["share", "cosine", "projector_change"]].tolist() == [0.3, 0.5, 0.1]
    assert found.loc[("b", "B-B"), "infonce_over_chance"] == 1.0 and np.isnan(
        found.loc[("a", "B-B"), "infonce_over_chance"]
    )


def test_by_patient_table_has_the_worst_first_and_what_its_scans_are_like():
    parts = [tidy({name: values}, **{k: v for k, v in identity(name).items() if k != "method"})
             for name, values in {"T1": [0.9, 0.5, 0.8], "S1": [0.7, 0.1, 0.8]}.items()]  # fmt: skip
    table = pd.concat(parts, ignore_index=True)
    table["patient"] = table["case"].map({"case_0": "a", "case_1": "b", "case_2": "a"})  # two scans of one patient
    cases = pd.DataFrame({
        "case": ["case_0", "case_1", "case_2"], "thickness (mm)": [3.0, 5.0, 5.0],
        "spleen (ml)": [100.0, 3000.0, 120.0], "spleen mean intensity": [120.0, 60.0, 100.0],
    })  # fmt: skip
    found = by_patient_table(table, cases)
    assert found["patient"].tolist() == ["b", "a"] and found["T1"].tolist() == pytest.approx([0.5, 0.85])
    assert found["mean"].tolist() == pytest.approx([0.3, 0.8])
    assert found.loc[1, ["volume", "thickness", "intensity"]].tolist() == [110, 4, 110], "means over both scans"
    assert worst_patient_sentence(found) == (
        "The hardest patient is b (3,000.0 ml, slices of 5 mm): Dice 0.100 to 0.500, by network; without it the means "
        "of the networks would change by +0.175 to +0.325."
    )
    of_mr = by_patient_table(table, cases.drop(columns="spleen mean intensity"))
    assert "intensity" not in of_mr and worst_patient_sentence(of_mr) == worst_patient_sentence(found)


def test_a_patient_called_na_is_no_missing_one(tmp_path):
    table = pd.DataFrame({"case": ["NA", "None"], "patient": ["null", "1"], "value": [np.nan, 0.5]})
    write_csv(tmp_path / "table.csv", table)
    pd.testing.assert_frame_equal(read_csv(tmp_path / "table.csv"), table, check_dtype=False)
