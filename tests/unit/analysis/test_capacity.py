"""What network, labels and teacher are worth, and the figure of it, from tables made by hand."""

from __future__ import annotations

import itertools

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from analysis_tables import check, identity, tidy

from kdlib.analysis.answer import fractions, verdicts_of
from kdlib.analysis.capacity import against_slices, worth, worth_sentences
from kdlib.analysis.comparisons import baseline_pairs
from kdlib.analysis.figures import DOUBLE, capacity, dimensions
from kdlib.analysis.figures.capacity import pareto
from kdlib.config import InputError

NETWORKS = pd.DataFrame(  # E1-30px is within 5 % of E1's arithmetic, E1-quarter is not
    [("T1", 2_000_000, 6.0, 60.0), ("S1", 57_000, 1.70, 8.0), ("E1", 53_000, 0.53, 6.0), ("E1-30px", 15_000, 0.52, 5.0),
     ("E1-quarter", 16_000, 0.14, 2.0)],
    columns=["model", "parameters", "gflops", "eager"],
).assign(onnx=lambda table: table["eager"] / 2, bf16=np.nan)  # fmt: skip
DICE = {  # model -> alone on all labels, distilled on all, alone on a quarter, distilled on a quarter
    "S1": (0.70, 0.72, 0.60, 0.68), "E1": (0.85, 0.86, 0.75, 0.76), "E1-30px": (0.75, 0.75, 0.66, 0.70),
    "E1-quarter": (0.80, 0.81, 0.70, 0.71),
}  # fmt: skip


def chapter(models=tuple(DICE), patients: int = 12) -> pd.DataFrame:
    """Dice of patients about the means of `DICE`; all differences between methods are the same in every patient but for
    a little."""
    noise, parts = np.linspace(-0.05, 0.05, patients), []
    jitter = np.random.default_rng(0)
    columns = [identity("T1")]
    for model, (fraction, teacher) in itertools.product(models, itertools.product((1.0, 0.25), ("", "T1"))):
        name = f"{teacher}>{model}@{fraction:g}"
        about = dict(role="distilled" if teacher else "baseline", teacher=teacher, fraction=fraction, model=model)
        columns.append(identity(name, length=1.0, **about))
    for about in columns:
        level = 0.9
        if about["role"] != "teacher":
            level = DICE[about["model"]][2 * (about["fraction"] < 1) + bool(about["teacher"])]
        values = level + noise + jitter.normal(0, 0.002, patients)
        parts.append(tidy({about["method"]: values}, **about))
    return pd.concat(parts, ignore_index=True)


def trained(cases: pd.DataFrame, rising: str = "") -> pd.DataFrame:
    """Flat validation Dice, but for one method that still rises."""
    rows = []
    for row in cases.drop_duplicates("run").to_dict("records"):
        for epoch in range(1, 11):
            value = 0.5 + 0.05 * epoch * (row["method"] == rising)
            rows.append(row | dict(epoch=epoch, name="val_dice", value=value))
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """What everything is worth, where all has converged."""
    cases = chapter()
    return worth(cases, trained(cases), NETWORKS)


def test_each_question_compares_what_it_asks_for(table):
    asked = {name: list(zip(rows["a"], rows["b"], strict=True)) for name, rows in table.groupby("question")}
    others = ("E1", "E1-30px", "E1-quarter")
    assert set(asked["network"]) == {(f">{name}@{f}", f">S1@{f}") for name in others for f in ("1", "0.25")}
    assert set(asked["equal cost"]) == {(f">E1-30px@{f}", f">E1@{f}") for f in ("1", "0.25")}, "within 5 % of its GFLOP"
    assert set(asked["labels"]) == {(f">{name}@1", f">{name}@0.25") for name in DICE}
    assert set(asked["teacher"]) == {(f"T1>{name}@{f}", f">{name}@{f}") for name in DICE for f in ("1", "0.25")}
    by = table.set_index(["question", "a"])["difference"]
    assert by["network", ">E1@1"] == pytest.approx(0.15, abs=0.003)
    assert by["labels", ">S1@1"] == pytest.approx(0.10, abs=0.003)
    assert by["teacher", "T1>S1@0.25"] == pytest.approx(0.08, abs=0.003)
    # each question is a family of its own: 6 networks, 2, 4 and 8 comparisons of 12 patients
    assert table.groupby("question")["smallest_p"].first().to_dict() == pytest.approx(
        {"network": 6 / 2**11, "equal cost": 2 / 2**11, "labels": 4 / 2**11, "teacher": 8 / 2**11}
    )


def test_sentences_give_the_smallest_and_the_largest_change_with_intervals(table):
    said = worth_sentences(table)
    assert len(said) == 2 + 2 + 1 + 2
    network = next(line for line in said if line.startswith("**The network, alone, instead of S1, on 100 %"))
    assert " (E1-30px) to +0.1" in network and "(E1); of 3 comparisons: 3 better. n = 12 patients." in network
    only = next(line for line in said if "arithmetic of E1" in line and "on 25 %" in line)
    assert "of 1 comparison: " in only and " to " not in only.partition("changes by")[2]
    assert any(line.startswith("**The labels, student alone, 100 % instead of 25 %**") for line in said)
    teacher = next(line for line in said if line.startswith("**The teacher") and "on 25 %" in line)
    assert "(S1)" in teacher and "+0.0" in teacher


def test_nothing_is_compared_before_it_has_converged():
    cases = chapter(("S1", "E1"))
    table = worth(cases, trained(cases, rising=">E1@1"), NETWORKS)
    rising = table["a"].eq(">E1@1") | table["b"].eq(">E1@1")
    assert rising.any() and (table.loc[rising, "verdict"] == "not converged").all()
    assert (table.loc[~rising, "verdict"] != "not converged").all()
    said = worth_sentences(table)
    assert "no verdict yet, a training of each of the 1 pairs has not converged" in said[0], "E1 against S1, all labels"
    labels = next(line for line in said if line.startswith("**The labels"))
    assert "(S1); of 1 comparison: 1 better; left out: 1 that have not converged" in labels


def test_the_frontier_is_what_nothing_cheaper_beats():
    cost, value = pd.Series([1.0, 2, 2, 3, 4, 5]), pd.Series([0.5, 0.7, 0.8, 0.8, 0.75, 0.9])
    assert list(pareto(cost, value)) == [0, 2, 5]
    mixed = [4, 0, 5, 2, 1, 3]  # whatever the order of the rows
    assert list(pareto(cost[mixed], value[mixed])) == [0, 2, 5]


@pytest.mark.slow
def test_the_figure_shows_every_method_at_its_cost_and_names_every_network():
    cases = chapter()
    figure = capacity(cases, NETWORKS)
    check(figure, DOUBLE)
    for ax, (column, unit) in zip(figure.axes, (("parameters", 1e6), ("gflops", 1), ("eager", 1)), strict=True):
        texts = {text.get_text(): text for text in ax.texts}
        assert set(texts) == {"T1", *DICE}
        renderer = figure.canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for text in texts.values()]
        assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
        drawn = {tuple(line.get_xydata()[0].round(6)) for line in ax.lines if len(line.get_xdata()) == 1}
        at = NETWORKS.set_index("model")[column] / unit
        means = cases.groupby(["model", "method"])["value"].mean()
        assert drawn == {(round(at[model], 6), round(mean, 6)) for (model, _), mean in means.items()}
    frontier = figure.axes[1].lines[0]  # the teacher is better than all, E1 better than S1 and cheaper
    assert frontier.get_xdata().tolist() == [0.14, 0.53, 6.0] and frontier.get_linestyle() == "-"
    note = figure.get_label()
    assert "grey: in other libraries" in note
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "frontier in ONNX Runtime" in named and "frontier in PyTorch bf16" not in named, "what was measured"
    plt.close(figure)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="gflops"), "capacity: no gflops in the table; give tables/10_networks.csv"),
        (lambda table: table[table["model"] != "E1"], "capacity: no cost of E1; run notebook 10 again"),
    ],
)
def test_a_table_of_networks_that_does_not_fit_is_one_clear_line(change, message):
    cases = chapter()
    with pytest.raises(InputError, match=message):
        capacity(cases, change(NETWORKS))
    if "E1" in message.partition("of ")[2]:
        with pytest.raises(InputError, match="no cost of E1 in the table of networks"):
            worth(cases, trained(cases), change(NETWORKS))


# ---------------------------------------------------------------------------------------------------- slices or volumes

COSTS = pd.DataFrame(  # E1 of volumes takes what S1 of slices takes
    [("T1", 2, 500.0), ("S1", 2, 100.0), ("E1", 2, 40.0), ("T1", 3, 3000.0), ("S1", 3, 220.0), ("E1", 3, 95.0)],
    columns=["model", "dimensions", "volume_ms"],
)


def both_dimensions() -> pd.DataFrame:
    """The same networks on slices and on volumes, which gain 0.02; S1 and E1 as in `chapter`."""
    flat = chapter(("S1", "E1"))
    names = "3D " + flat["method"]
    deep = flat.assign(dimensions=3, method=names, run=names, value=flat["value"] + 0.02)
    return pd.concat([flat.assign(dimensions=2), deep], ignore_index=True)


def test_volumes_are_compared_with_the_same_network_and_with_that_of_about_the_same_latency():
    cases = both_dimensions()
    table = against_slices(cases, trained(cases), COSTS)
    pairs = {name: dict(zip(rows["a"], rows["b"], strict=True)) for name, rows in table.groupby("question")}
    same = pairs["same network"]
    assert len(same) == 1 + 2 * 4 and all(a == f"3D {b}" for a, b in same.items())
    assert table.loc[table["question"] == "same network", "difference"].to_numpy() == pytest.approx(0.02)
    assert pairs["equal latency"] == {f"3D {t}>E1@{f}": f"{t}>S1@{f}" for t in ("", "T1") for f in ("1", "0.25")}, (
        "95 ms against 100; nothing on slices takes as long as S1 on volumes, and teachers are not compared"
    )
    assert pairs["teacher"] == {f"3D T1>{m}@{f}": f"3D >{m}@{f}" for m in ("S1", "E1") for f in ("1", "0.25")}
    slower = table.set_index(["question", "a"])["slower"]
    assert slower["equal latency", "3D >E1@1"] == pytest.approx(0.95)
    assert slower["same network", "3D T1"] == pytest.approx(6)
    said = worth_sentences(table)
    assert any(line.startswith("**Volumes instead of slices, the same network, on 25 %") for line in said)
    assert any("(E1 alone)" in line or "(E1 distilled)" in line for line in said)
    labels = set(table["label_a"]) | set(table["label_b"])
    assert {"S1 (25 %), volumes", "S1 (25 %), slices", "T1, volumes"} <= labels


def test_a_teacher_of_slices_that_has_not_converged_says_nothing_of_students_on_volumes():
    cases = both_dimensions()
    table = against_slices(cases, trained(cases, rising="T1"), COSTS).set_index(["question", "a"])
    assert (table.loc["teacher", "verdict"] != "not converged").all()
    assert table.loc["same network", "verdict"]["3D T1>S1@1"] == "not converged"
    assert table.loc["same network", "verdict"]["3D >S1@1"] == "better"


def test_a_student_on_volumes_is_compared_with_itself_on_volumes_and_has_a_teacher_of_volumes():
    cases = both_dimensions()
    pairs = baseline_pairs(cases)
    assert len(pairs) == 8 and all(a.startswith("3D") == b.startswith("3D") for a, b in pairs)
    found = fractions(cases, verdicts_of(cases, trained(cases))).set_index("a")
    assert found.loc["3D T1>S1@1", "dice_teacher"] - found.loc["T1>S1@1", "dice_teacher"] == pytest.approx(0.02)


def test_without_volumes_or_a_cost_there_is_no_comparison():
    cases = both_dimensions()
    flat = cases[cases["dimensions"] == 2]
    for table in (flat, flat.drop(columns="dimensions")):
        with pytest.raises(InputError, match="on slices and on volumes"):
            against_slices(table, trained(cases), COSTS)
    for costs, missing in (
        (COSTS[COSTS["model"] != "E1"], r"E1 \(slices\), E1 \(volumes\)"),
        (COSTS[COSTS["dimensions"] == 2], r"E1 \(volumes\), S1 \(volumes\), T1 \(volumes\)"),
    ):
        for draw in (
            lambda costs=costs: against_slices(cases, trained(cases), costs),
            lambda costs=costs: dimensions(cases, costs),
        ):
            with pytest.raises(InputError, match=f"no cost of {missing} in the table of costs: run notebook 11 again"):
                draw()


@pytest.mark.slow
def test_the_figure_of_slices_and_volumes_has_a_panel_for_each():
    figure = dimensions(both_dimensions(), COSTS)
    check(figure, DOUBLE)
    assert [ax.get_title() for ax in figure.axes] == ["slices", "volumes"]
    for ax in figure.axes:
        assert {text.get_text() for text in ax.texts} == {"T1", "S1", "E1"}
    assert "n = 12 patients" in figure.get_label()
    plt.close(figure)
