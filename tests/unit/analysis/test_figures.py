from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from analysis_tables import check, distilled, identity, tidy
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex, to_rgb

from kdlib.analysis.figures import (
    DOUBLE,
    SINGLE,
    ablation,
    along,
    choose_cases,
    cumulative_correction,
    dice_per_method,
    efficiency,
    failure,
    gradient_diagnostics,
    gradient_shares,
    method_styles,
    qualitative,
    ranking,
    reliability,
    save_figure,
    slopes,
    teacher_agreement,
    training_curves,
)
from kdlib.analysis.figures.style import HATCHES, VERDICTS
from kdlib.analysis.statistics import THESIS_TABLE, compare, interval, per_patient, ranks, summarise
from kdlib.config import InputError

pytestmark = pytest.mark.slow  # they draw

METHODS = [
    "T1", "T2", "S1", "S1 (50 %)", "S2", "S2 (50 %)", "KD(T1, S1)", "KD(T1, S2)", "KD(T2, S1)", "KD(T2, S2)",
]  # fmt: skip
TERMS = ["E-E", "B-B", "D-D", "PMD"]
SUBSETS = ["+".join(terms) for size in range(1, 5) for terms in itertools.combinations(TERMS, size)]
FULL = "E-E+B-B+D-D+PMD"
ALONE = identity("S1 (50 %)")


@pytest.fixture(autouse=True)
def closed_figures():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where a layout collapses or a label is lost
        yield
    plt.close("all")


def results(methods, cases=6, seeds=2, metric="dice") -> pd.DataFrame:
    """Values that differ by method, case and seed; methods are labels or identity columns."""
    generator, parts = np.random.default_rng(0), []
    for number, method in enumerate(methods):
        columns = identity(method) if isinstance(method, str) else method
        level = 0.3 + 0.02 * number + 0.02 * np.arange(cases)[:, None]
        values = level + generator.normal(0, 0.01, (cases, seeds))
        parts.append(tidy({columns["method"]: values}, metric, **columns))
    return pd.concat(parts, ignore_index=True)


def trainings(methods=METHODS, epochs=12, runs=2) -> pd.DataFrame:
    rows = []
    for method, run, epoch in itertools.product(methods, range(runs), range(1, epochs + 1)):
        names = ["loss", "segmentation", "val_dice", "lr"] + ["E-E", "PMD", "grad/E-E"] * method.startswith("KD")
        row = identity(method) | dict(run=f"{method}-{run}", epoch=epoch, value=(1 + run) / epoch)
        rows += [row | dict(name=name) for name in names]
    return pd.DataFrame(rows)


def bars(ax) -> np.ndarray:
    """Limits of all horizontal intervals of a panel."""
    return np.array([container.lines[2][0].get_segments()[0][:, 0] for container in ax.containers])


def points(ax) -> list[float]:
    """Centres of all horizontal intervals of a panel."""
    return [container.lines[0].get_xdata()[0] for container in ax.containers]


def filled(ax) -> list[bool]:
    return [container.lines[0].get_markerfacecolor() != "white" for container in ax.containers]


# --------------------------------------------------------------------------------------------------------------- style


def luminance(colour: str) -> float:
    """Relative, 0 to 1 (WCAG 2.1)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_methods_and_verdicts_can_be_told_apart_in_grey():
    networks = method_styles(pd.DataFrame(map(identity, METHODS)))
    losses = [
        ALONE,
        distilled("dkd"),
        distilled("fitnet"),
        distilled("sp"),
        distilled("crd"),
        distilled("fitnet", FULL),
    ]
    for styles in (networks, method_styles(pd.DataFrame(losses))):
        for one, two in itertools.combinations(styles.values(), 2):
            alike = abs(luminance(one["color"]) - luminance(two["color"])) < 0.05
            assert not alike or one["marker"] != two["marker"]
    looks = [(luminance(VERDICTS[verdict]), HATCHES.get(verdict)) for verdict in ("better", "inconclusive", "worse")]
    for (one, hatch), (two, other) in itertools.combinations(looks, 2):
        assert abs(one - two) > 0.2 or hatch != other
    assert len({networks[name]["linestyle"] for name in ("T1", "S1", "KD(T1, S1)", "KD(T2, S1)")}) == 4


def test_styles_follow_the_columns_not_the_names():
    rows = [ALONE, distilled("kl"), distilled("dkd"), distilled("fitnet"), identity("shuffled teacher")]
    renamed = [dict(row, method=f"id {number}") for number, row in enumerate(rows)]
    styles = list(method_styles(pd.DataFrame(rows)).values())
    assert styles == list(method_styles(pd.DataFrame(renamed)).values())
    assert styles[1] == styles[2] != styles[3] and styles[0] == styles[4]  # two families; controls
    other = method_styles(pd.DataFrame([identity("S1 (25 %)")]))["S1 (25 %)"]
    assert other not in method_styles(pd.DataFrame(map(identity, METHODS))).values()


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("methods", [METHODS, ["S1"], ["S1", "S1 (25 %)", "KD(T1, S1)"]])
def test_training_curves(methods):
    history = trainings(methods)
    figure = training_curves(history)
    check(figure, DOUBLE)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:3] == ["validation Dice", "total loss", "segmentation loss"]
    assert ("E-E loss" in titles) == any(method.startswith("KD") for method in methods)
    line = figure.axes[0].lines[0]
    assert line.get_ydata() == pytest.approx(1.5 / np.arange(1, 13))  # mean of the runs' 1 / epoch and 2 / epoch
    assert to_hex(line.get_color()).upper() == method_styles(history)[methods[0]]["color"]
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1 / 12, 2))  # from the lowest to the highest run


def test_training_curves_of_chosen_names_and_one_epoch():
    figure = training_curves(trainings(["KD(T1, S1)"], epochs=1, runs=1), ["lr", "grad/E-E"])
    check(figure, DOUBLE)
    assert [ax.get_title() for ax in figure.axes] == ["learning rate", "gradient of E-E"]


def diagnostics(method="KD(T1, S1)", kinds=None, terms=TERMS, epochs=12, runs=2):
    kinds, rows = kinds or ("share", "cosine", "infonce_over_chance", "projector_change"), []
    for kind, term, run, epoch in itertools.product(kinds, terms, range(runs), range(1, epochs + 1)):
        row = identity(method) | dict(run=f"{method}-{run}", epoch=epoch, name=f"{kind}/{term}")
        rows.append(row | dict(value=(1 + run) / epoch + terms.index(term)))
    return pd.concat([pd.DataFrame(rows), trainings([method], epochs, runs)])


def test_gradient_diagnostics():
    figure = gradient_diagnostics(diagnostics())
    check(figure, DOUBLE)
    assert [ax.get_title() for ax in figure.axes] == [
        "share of the gradient", "cosine from step to step", "InfoNCE relative to chance", "change of the projectors",
    ]  # fmt: skip
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert len(curves) == len(TERMS) and curves[0].get_ydata() == pytest.approx(1.5 / np.arange(1, 13))
    assert len({line.get_color() for line in curves}) == len({line.get_marker() for line in curves}) == len(TERMS)
    inactive = [[line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"] for ax in figure.axes]
    assert inactive == [[], [0.0], [1.0], []]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == TERMS
    assert figure.get_label().startswith("KD(T1, S1). ") and "n = 2 runs" in figure.get_label()


@pytest.mark.parametrize("kinds", [["infonce_over_chance"], ["share", "cosine", "projector_change"]])
def test_diagnostics_leave_out_what_was_not_measured(kinds):
    terms = ["segmentation", "PMD", "attention transfer", "region contrast", "affinity of pairs", "E-E"]
    figure = gradient_diagnostics(diagnostics(kinds=kinds, terms=terms, epochs=1, runs=1))
    check(figure, DOUBLE if len(kinds) > 1 else SINGLE)
    assert len(figure.axes) == len(kinds)
    assert [text.get_text() for text in figure.legends[0].get_texts()][:3] == ["segmentation", "E-E", "PMD"]


def test_diagnostics_of_one_method():
    both = pd.concat([diagnostics(), diagnostics("KD(T2, S1)").assign(value=9.0)])
    curve = gradient_diagnostics(both, "KD(T2, S1)").axes[0].lines[0]
    assert (curve.get_ydata() == 9).all() and len(curve.get_xdata()) == 12


@pytest.mark.parametrize("methods, epochs", [(["KD(T1, S1)"], 1), (METHODS[6:], 40)])
def test_gradient_shares(methods, epochs):
    names = ["segmentation", *TERMS]
    given = np.random.default_rng(0).dirichlet(np.ones(5), size=(len(methods), epochs, 2))  # of method, epoch, run
    rows = [
        identity(method)
        | dict(run=f"{method}-{run}", epoch=epoch + 1, name=f"share/{name}", value=given[m, epoch, run, n])
        for (m, method), epoch, run, (n, name) in itertools.product(
            enumerate(methods), range(epochs), range(2), enumerate(names)
        )
    ]
    figure = gradient_shares(pd.concat([pd.DataFrame(rows), trainings(["S1"])]))
    check(figure, DOUBLE if len(methods) > 2 else SINGLE)
    assert [ax.get_title() for ax in figure.axes] == methods
    for ax, shares in zip(figure.axes, given, strict=True):
        level = np.zeros(epochs)
        for area, n in zip(ax.collections, range(5), strict=True):
            level = level + shares[:, :, n].mean(axis=1)
            outline = area.get_paths()[0].vertices
            for epoch in range(epochs):  # the area's upper edge over the epoch
                assert np.isclose(outline[np.isclose(outline[:, 0], epoch + 0.5)][:, 1], level[epoch]).any()
        assert level == pytest.approx(1)
    looks = {(patch.get_facecolor(), patch.get_hatch()) for patch in figure.legends[0].get_patches()}
    assert len({hatch for _, hatch in looks}) == 5, "areas differ in grey"


# ------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(
    "methods, cases, metric", [(METHODS, 24, "dice"), (METHODS[:3], 1, "dice"), (["S1"], 4, "hd95")]
)
def test_dice_per_method(methods, cases, metric):
    table = results(methods, cases, metric=metric)
    figure = dice_per_method(table, metric)
    check(figure, SINGLE)
    ax = figure.axes[0]
    drawn = [found.get_offsets() for found in ax.collections if isinstance(found, PathCollection)]
    assert [len(found) for found in drawn] == [cases] * len(methods)
    found = summarise(table, metric=metric)
    assert [np.mean(offsets[:, 0]) for offsets in drawn] == pytest.approx(found["mean"].tolist())
    lines = [line for line in ax.lines if len(line.get_xdata()) == len(methods) and line.get_color() == "#BBBBBB"]
    values = per_patient(table, metric).pivot(index="patient", columns="method", values="value")[methods]
    if len(methods) > 1:  # a line per patient, from point to point
        assert np.array([line.get_xdata() for line in lines]) == pytest.approx(values.to_numpy())
    assert points(ax) == pytest.approx(found["mean"].tolist())
    if cases > 1:
        assert bars(ax) == pytest.approx(found[["low", "high"]].to_numpy())
    assert [tick.get_text() for tick in ax.get_yticklabels()] == methods and ax.yaxis_inverted()
    assert ax.get_xlabel() == {"dice": "Dice", "hd95": "HD95 (mm)"}[metric]


def test_the_figure_draws_the_limits_of_the_table_however_it_was_read(tmp_path):
    table = results(["S1", "S2"], 14).assign(patient=lambda rows: rows["case"].str.removeprefix("case_"))
    table.to_csv(tmp_path / "cases.csv", index=False)
    again = pd.read_csv(tmp_path / "cases.csv")  # patients are numbers now, and sorted as numbers: 2 before 10
    limits = summarise(table)[["low", "high"]].to_numpy()
    assert (summarise(again)[["low", "high"]].to_numpy() == limits).all()
    assert (bars(dice_per_method(again).axes[0]) == bars(dice_per_method(table).axes[0])).all()
    one, two = (compare(each, [("S2", "S1")])[["low", "high"]].to_numpy() for each in (table, again))
    assert (one == two).all()


def test_captions_name_the_interval_that_was_made_and_tell_patients_from_volumes():
    notes = {n: dice_per_method(results(["S1", "S2"], n, seeds=1)).get_label() for n in (1, 3, 6, 60)}
    assert "n = 1 patient) and no interval" in notes[1] and "95 % Student's t interval" in notes[3]
    assert "95 % studentised bootstrap interval" in notes[6] and "95 % BCa bootstrap interval" in notes[60]
    ties = tidy({"S1": [0, 0, 0, 0, 0, 0, 0.1, 0.2]})
    assert "Student's t interval" in dice_per_method(ties).get_label()
    pairs = results(["S1"], 28).assign(patient=lambda rows: rows["case"].str.removeprefix("case_").astype(int) // 2)
    assert "n = 14 patients with 28 volumes" in dice_per_method(pairs).get_label()


def test_undefined_values_and_equal_values_draw():
    table = results(["S1", "S2"], 5)
    table["value"] = np.where(table["method"] == "S1", np.nan, 0.7)
    figure = dice_per_method(table)
    check(figure, SINGLE)
    assert "n = 0 to 5" in figure.get_label()


def test_cases_are_chosen_by_rule():
    table = results(["S1", "KD(T1, S1)"], 7, seeds=1)
    table["value"] = [0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.6] * 2
    assert choose_cases(table, "KD(T1, S1)") == {"best": "case_2", "median": "case_0", "worst": "case_1"}
    assert choose_cases(table[table["case"] < "case_2"], "KD(T1, S1)") == {"best": "case_0", "worst": "case_1"}
    assert choose_cases(table[table["case"] < "case_1"], "KD(T1, S1)") == {"best": "case_0"}


PAIRS = [("KD(T1, S1)", "S1"), ("KD(T1, S2)", "S2"), ("KD(T2, S1)", "S1"), ("KD(T2, S2)", "S2")]


@pytest.mark.parametrize("count, cases", [(1, 8), (2, 1), (4, 24)])
def test_slopes(count, cases):
    table = results(["S1", "S2", "KD(T1, S1)", "KD(T1, S2)", "KD(T2, S1)", "KD(T2, S2)"], cases)
    table.loc[(table["case"] == "case_0") & (table["method"] == "KD(T1, S1)"), "value"] = 0.1
    verdicts = compare(table, PAIRS[:count])
    figure = slopes(table, verdicts)
    check(figure, DOUBLE if count > 2 else SINGLE)
    values = per_patient(table).pivot(index="patient", columns="method", values="value")
    for ax, (a, b) in zip(figure.axes, PAIRS, strict=False):
        *patients, mean = [line for line in ax.lines if len(line.get_xdata()) == 2]
        drawn = np.array([line.get_ydata() for line in patients])
        falls = np.array([line.get_linestyle() == "--" for line in patients])
        assert sorted(drawn.tolist()) == sorted(values[[b, a]].to_numpy().tolist())
        assert falls.tolist() == (drawn[:, 1] < drawn[:, 0]).tolist()
        assert mean.get_ydata() == pytest.approx(values[[b, a]].mean().to_numpy())
        assert [tick.get_text().replace("\n", "") for tick in ax.get_xticklabels()] == [b, a]
    assert sum(line.get_linestyle() == "--" for line in figure.axes[0].lines) >= 1
    title, row = figure.axes[0].get_title().replace("\N{MINUS SIGN}", "-"), verdicts.iloc[0]
    assert f"{row['difference']:+.3f}" in title and title.endswith(row["verdict"])
    assert f"{count} comparisons" in figure.get_label()
    assert ("no adjusted p can fall below" in figure.get_label()) == (cases == 1)


def test_slopes_of_a_metric_where_lower_is_better():
    table = results(["S1", "KD(T1, S1)"], cases=4, metric="hd95")
    table.loc[table["method"] == "KD(T1, S1)", "value"] -= 0.3
    figure = slopes(table, compare(table, PAIRS[:1], "hd95"), "hd95")
    check(figure, SINGLE)
    assert not any(line.get_linestyle() == "--" for line in figure.axes[0].lines), "a fall is no worsening"
    assert figure.axes[0].get_ylabel() == "HD95 (mm)"


def costs(models=("T1", "T2", "S1", "S2")) -> pd.DataFrame:
    rows = []
    for number, (size, model) in enumerate(itertools.product(("study", "thesis"), models)):
        cost = dict(inference_parameters=10 ** (4 + number % 4), gflops=2.0 ** (number % 4), latency_ms=10.0 + number)
        rows.append(dict(model=model, size=size, threads=1) | cost)
    return pd.DataFrame(rows)


@pytest.mark.parametrize("methods, thesis", [(METHODS, THESIS_TABLE), (METHODS, None), (["S1"], THESIS_TABLE)])
def test_efficiency(methods, thesis):
    table, cost = results(methods), costs()
    figure = efficiency(table, cost, thesis)
    check(figure, DOUBLE)
    means = summarise(table)
    at = cost[cost["size"] == "study"].set_index("model")
    units = dict(inference_parameters=1e6, gflops=1, latency_ms=1)
    for ax, (name, unit) in zip(figure.axes, units.items(), strict=True):
        drawn = [container.lines[0].get_xydata()[0] for container in ax.containers]
        assert [y for _, y in drawn] == pytest.approx(means["mean"].tolist())
        true = (means["model"].map(at[name]) / unit).to_numpy()
        ratios = np.array([x for x, _ in drawn]) / true
        assert ((ratios > 0.5) & (ratios < 2)).all() and np.log(ratios).sum() == pytest.approx(0, abs=1e-9)
        hollow = [line for line in ax.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
        assert [line.get_ydata()[0] for line in hollow] == ([] if thesis is None else thesis["dice"].tolist())
        stair = next(line for line in ax.lines if line.get_drawstyle() == "steps-post")
        for x, y in stair.get_xydata():  # nothing that costs no more is better
            assert y == pytest.approx(means["mean"][true <= x].max())
    assert ("Hollow" in figure.get_label()) == (thesis is not None) and "1 thread." in figure.get_label()


def sized(methods, volumes, thickness, slope=0.1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Dice that grows by `slope` with each doubling of the volume, and the cases' thickness."""
    rows, names = [], [f"case_{number}" for number in range(len(volumes))]
    for (number, method), (case, volume) in itertools.product(enumerate(methods), zip(names, volumes, strict=True)):
        row = identity(method) | {"case": case, "patient": f"p{case}", "class": "spleen", "seed": 0}
        dice = 0.4 + 0.05 * number + slope * np.log2(volume / min(volumes))
        rows += [row | {"metric": "dice", "value": dice}, row | {"metric": "truth_volume", "value": volume}]
    return pd.DataFrame(rows), pd.DataFrame({"case": names, "thickness (mm)": thickness})


@pytest.mark.parametrize("cases, several", [(24, True), (8, False), (3, False)])
def test_failure(cases, several):
    volumes = 50 * 1.1 ** np.random.default_rng(0).permutation(cases)
    methods = ["T1", "S1 (50 %)", "KD(T1, S1)"] if several else ["T1"]  # the p of few patients is exact, and slow
    table, known = sized(methods, volumes, np.where(np.arange(cases) % 2, 5.0, 3.0) if several else 2.0)
    figure = failure(table, known)
    check(figure, DOUBLE if several else SINGLE)
    left, groups = figure.axes[0], min(3, max(1, cases // 4))
    assert [text.get_text() for text in left.texts] == [f"n = {cases // groups}"] * groups
    values = table[table["metric"] == "dice"].pivot(index="patient", columns="method", values="value")
    order = values.loc[table.drop_duplicates("patient").set_index("patient").index[np.argsort(volumes)], "T1"]
    means = [chunk.mean() for chunk in np.array_split(order.to_numpy(), groups)]
    assert left.containers[0].lines[0].get_ydata() == pytest.approx(means)
    if several:
        labels = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
        assert labels == [f"3\nn = {cases // 2}", f"5\nn = {cases // 2}"]
    assert ("thickness" in figure.get_label()) == several  # of what is not drawn, the caption says nothing
    assert ("T1 +1.00 [" in figure.get_label()) == (cases >= 6) and f"n = {cases}" in figure.get_label()


def test_failure_of_many_thicknesses_and_of_few_patients_is_exact():
    table, known = sized(["S1", "T1"], np.arange(50, 62), np.linspace(1, 5, 12).round(1))
    figure = failure(table, known, ["S1"])
    check(figure, DOUBLE)
    assert len(figure.axes[1].get_xticks()) == 3 and "T1" not in figure.get_label()
    # six patients in perfect order: 2 of 720 orders are as extreme
    table, known = sized(["S1"], [50, 60, 70, 80, 90, 100], 3.0)
    assert "p = 0.0028" in failure(table, known).get_label()
    # an empty target is left out
    empty = table.copy()
    empty.loc[(empty["case"] == "case_0") & (empty["metric"] == "truth_volume"), "value"] = 0
    assert "n = 5" in failure(empty, known).get_label()


def binned(methods, cases=6, bins=15, empty=()) -> pd.DataFrame:
    generator, rows = np.random.default_rng(0), []
    for method, case in itertools.product(methods, range(cases)):
        for index in range(bins):
            confidence, count = (index + 0.5) / bins, 0 if index in empty else 10 ** generator.integers(1, 5)
            accuracy = np.clip(confidence**2 + generator.normal(0, 0.02), 0, 1) if count else np.nan
            row = identity(method) | dict(case=f"case_{case}", bin=index, confidence=confidence if count else np.nan)
            rows.append(row | {"accuracy": accuracy, "count": count, "class": "spleen"})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("methods, cases, empty", [(["S1 (50 %)", "KD(T1, S1)", "T1"], 6, ()), (["S1"], 1, (0, 7))])
def test_reliability(methods, cases, empty):
    figure = reliability(binned(methods, cases, empty=empty))
    check(figure, SINGLE)
    curve, shares = figure.axes
    lines = [line for line in curve.lines if line.get_label() in methods]
    assert len(lines) == len(methods)
    for line in lines:
        x, y = line.get_data()
        assert len(x) == 15 - len(empty) and y == pytest.approx(x**2, abs=0.06)
    assert f"cases (n = {cases})" in figure.get_label()
    assert (curve.get_ylabel(), shares.get_xlabel()) == ("observed frequency", "predicted probability")
    assert len(curve.collections) == (len(methods) if cases > 1 else 0)  # one case has no band


def test_reliability_weighs_cases_alike():
    # a large case that is right in half of its pixels, a small one always; classes and seeds share a case's weight
    part = dict(method="S1", bin=0, confidence=0.5)
    large = part | {"case": "a", "class": "spleen", "accuracy": 0.5, "count": 10_000}
    small = [part | {"case": "b", "class": name, "accuracy": 1.0, "count": 10} for name in ("spleen", "liver")]
    absent = part | {"case": "c", "class": "liver", "accuracy": np.nan, "confidence": np.nan, "count": 0}
    table = pd.DataFrame([large, *small, absent])
    assert reliability(table).axes[0].lines[1].get_ydata() == pytest.approx([0.75])
    patients = table.assign(patient=["p", "q", "q", "q"])
    found = reliability(patients)
    assert found.axes[0].lines[1].get_ydata() == pytest.approx([0.75])
    assert "n = 2 patients with 3 volumes" in found.get_label()


CLOSE = ["agreement", "band_agreement", "error_overlap", "cka", "ece"]


def closeness(methods, metrics, cases=6) -> pd.DataFrame:
    generator, rows = np.random.default_rng(0), []
    for method, metric, case, seed in itertools.product(methods, metrics, range(cases), range(2)):
        row = identity(method) | dict(metric=metric, case=f"case_{case}", seed=seed)
        rows.append(row | dict(value=generator.uniform(0.3, 0.9)))
    return pd.DataFrame(rows)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_teacher_agreement(count):
    methods, metrics = ["S1 (50 %)", "KD(T1, S1)"], CLOSE[:count]
    table = closeness(methods, metrics[::-1])
    table.loc[(table["metric"] == "error_overlap") & (table["case"] == "case_0"), "value"] = np.nan
    figure = teacher_agreement(table)
    check(figure, SINGLE if count == 1 else DOUBLE)
    assert len(figure.axes) == count and figure.axes[0].get_xlabel() == "Dice with the teacher"
    for ax, metric in zip(figure.axes, metrics, strict=True):
        for method, drawn, line in zip(methods, ax.collections[::2], ax.containers, strict=True):
            chosen = table[(table["method"] == method) & (table["metric"] == metric)].dropna()
            values = chosen.groupby("case")["value"].mean()
            assert sorted(drawn.get_offsets()[:, 0]) == pytest.approx(sorted(values))
            assert line.lines[0].get_xdata()[0] == pytest.approx(values.mean())
            assert line.lines[2][0].get_segments()[0][:, 0] == pytest.approx(interval(values)[:2])
    assert ("n = 5 to 6" if count > 2 else "n = 6") in figure.get_label()


# --------------------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize("subsets, baseline", [(SUBSETS, True), (["PMD", "E-E"], False), (["B-B"], True)])
def test_ablation(subsets, baseline):
    table = results([distilled("supcon", terms) for terms in subsets] + [ALONE] * baseline)
    figure = ablation(table)
    check(figure, SINGLE)
    dots, forest = figure.axes
    found = summarise(table).sort_values("mean", ascending=False)
    assert points(forest) == pytest.approx(found["mean"].tolist())  # the best first
    expected = [[term for term in TERMS if term in terms.split("+")] for terms in found["terms"]]
    dark = [line.get_xydata().astype(int).tolist() for line in dots.lines]
    assert [[TERMS[x] for x, _ in line] for line in dark] == expected
    assert [{y for _, y in line} for line in dark] == [{y} if names else set() for y, names in enumerate(expected)]


FEW = SUBSETS[:5]


def test_ablation_shows_paired_differences_to_the_student():
    table = results([distilled("supcon", terms) for terms in FEW], cases=12)
    table.loc[table["terms"] == "PMD", "value"] -= 0.2
    table = pd.concat([table, results([ALONE], cases=12)])
    verdicts = compare(table, [(method, ALONE["method"]) for method in table["method"].unique()[:-1]])
    assert set(verdicts["verdict"]) == {"worse", "better", "inconclusive"}
    figure = ablation(table, verdicts)
    check(figure, DOUBLE)
    beside = figure.axes[2]
    order = summarise(table).sort_values("mean", ascending=False)["method"]
    expected = verdicts.set_index("a").loc[[method for method in order if method != ALONE["method"]]]
    assert points(beside) == pytest.approx(expected["difference"].tolist())
    assert filled(beside) == (expected["verdict"] != "inconclusive").tolist()
    assert f"Holm's correction for {len(FEW)} comparisons" in figure.get_label()


MANY = [ALONE, *(distilled("sp", f"term {number}") for number in range(19)), identity("shuffled teacher")]


@pytest.mark.parametrize(
    "methods, cases", [(MANY, 8), (["S1 (50 %)", "KD(T1, S1)", "S1"], 8), (["S1 (50 %)", "S1"], 1)]
)
def test_ranking(methods, cases):
    table = results(methods, cases)
    names = list(table["method"].unique())
    found = ranks(table, resamples=100)
    verdicts = compare(table, [(name, "S1 (50 %)") for name in names[1:]])
    figure = ranking(found, "S1 (50 %)", verdicts)
    check(figure, DOUBLE)
    left, right, shares = figure.axes
    assert [text.get_text() for text in shares.texts] == [f"{100 * share:.0f}" for share in found["first"]]
    assert points(left) == list(range(1, len(names) + 1))
    assert bars(left) == pytest.approx(found[["rank_low", "rank_high"]].to_numpy())
    entries = [f"{row.label}  {row.mean:.3f}" for row in found.itertuples()]
    assert [tick.get_text() for tick in left.get_yticklabels()] == entries and left.yaxis_inverted()
    verdicts = verdicts.set_index("a").loc[[name for name in found["method"] if name != "S1 (50 %)"]]
    assert points(right) == pytest.approx(verdicts["difference"].tolist())
    assert filled(right) == (verdicts["verdict"] != "inconclusive").tolist()
    assert f"n = {cases}" in figure.get_label() and "hollow" in figure.get_label()


def test_ranking_without_reference_and_of_a_distance():
    figure = ranking(ranks(results(["S1", "S2", "KD(T1, S1)"]), resamples=50))
    check(figure, DOUBLE)
    assert len(figure.axes) == 2 and "Middle" not in figure.get_label()
    far = results(["S1", "S2"], metric="hd95")
    figure = ranking(ranks(far, metric="hd95"), "S1", compare(far, [("S2", "S1")], "hd95"), metric="hd95")
    assert "lower is better" in figure.get_label() and figure.axes[1].get_xlabel() == "HD95 minus that of S1 (mm)"


def test_ranking_names_a_far_outlier_at_the_edge_and_the_families():
    methods = [
        ALONE,
        distilled("kl"),
        distilled("fitnet", "E-E"),
        distilled("infonce", FULL),
        identity("shuffled teacher"),
    ]
    table = results(methods, cases=8)
    table["value"] = 0.8 + 0.001 * table["value"] - 0.4 * (table["role"] == "control")
    names, alone = list(table["method"].unique()), ALONE["method"]
    verdicts = compare(table, [(name, alone) for name in names[1:]])
    verdicts.loc[0, "verdict"] = "not converged"  # of `sentences.withhold`: not decided either
    stability = ranks(table, resamples=50, reference=alone)
    figure = ranking(stability, alone, verdicts)
    check(figure, DOUBLE)
    assert any("0.40" in text.get_text() for text in figure.axes[1].texts)
    assert max(map(abs, figure.axes[1].get_xlim())) < 0.05
    shown = [f"{100 * value:.0f}" for row in stability.itertuples() for value in (row.first, row.beats) if value >= 0]
    assert [text.get_text() for text in figure.axes[2].texts] == shown and len(shown) == 2 * len(names) - 1
    families = [text.get_text() for text in figure.legends[0].get_texts()]
    assert families == ["predictions", "features", "thesis terms", "controls"]


def steps(changes=(0.03, -0.05, 0.004), verdicts=("better", "worse", "inconclusive"), wide=0.01, n=24) -> pd.DataFrame:
    rows, level = [dict(step="thesis", dice=0.715, verdict="", n=n, interval="")], 0.715
    for number, (change, verdict) in enumerate(zip(changes, verdicts, strict=True), start=1):
        level += change
        step = f"same optimiser, rate and batch for every method (fault {number})"
        bounds = dict(low=change - wide, high=change + 2 * wide, interval="studentised bootstrap")
        rows.append(dict(step=step, dice=level, difference=change, verdict=verdict, n=n) | bounds)
    whole = level - 0.715
    end = dict(step="corrected", dice=level, difference=whole, low=whole - wide, high=whole + wide, interval="")
    return pd.DataFrame([*rows, end | dict(verdict="inconclusive", n=n)]).assign(p_adjusted=0.01, smallest_p=0.01)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("repeats", [0, 1, 4])
def test_cumulative_correction(repeats, double):
    table = steps([0.03, -0.05, 0.004] * repeats, ["better", "worse", "inconclusive"] * repeats)
    figure = cumulative_correction(table, double)
    check(figure, DOUBLE if double else SINGLE)
    ax = figure.axes[0]
    drawn = [bar for container in ax.containers if hasattr(container, "patches") for bar in container.patches]
    ends = [bar.get_x() + bar.get_width() for bar in drawn]
    assert ends == pytest.approx(table["dice"].tolist())
    # every step begins where the one before ended
    assert [bar.get_x() for bar in drawn[1:-1]] == pytest.approx(ends[:-2])
    whiskers = [line.lines[2][0].get_segments()[0][:, 0] for line in ax.containers if hasattr(line, "lines")]
    rows = table.iloc[1:-1]
    start = rows["dice"] - rows.get("difference", 0)
    if repeats:
        assert np.array(whiskers) == pytest.approx(np.stack([start + rows["low"], start + rows["high"]], 1))
        colours = [VERDICTS[verdict].lower() for verdict in rows["verdict"]]
        assert [to_hex(bar.get_facecolor()) for bar in drawn[1:-1]] == colours
    labels = [tick.get_text().replace("\n", " ") for tick in ax.get_yticklabels()]
    assert labels == table["step"].tolist() and ax.yaxis_inverted()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert max(box.x1 for box in boxes) <= figure.bbox.x1, "a number is cut"
    assert "From start to end" in figure.get_label() and "axis begins at" in figure.get_label()


def test_correction_of_one_patient_has_no_intervals():
    figure = cumulative_correction(steps(wide=np.nan, n=1).assign(interval=""))
    check(figure, DOUBLE)
    assert "n = 1" in figure.get_label() and "From start" not in figure.get_label()


# ------------------------------------------------------------------------------------------------------------ pictures

ROLES = {"teacher": "T1", "student": "S1 (50 %)", "distilled student": "KD(T1, S1)"}


def slices(methods, cases, size=48, seed=0) -> pd.DataFrame:
    rows, (y, x) = [], np.mgrid[:size, :size]
    for number, case in enumerate(cases):
        truth = ((y - 20) ** 2 + (x - 24 - number) ** 2 < 60).astype(np.uint8)
        image = (truth * 80 + 60).astype(np.uint8)
        for shift, method in enumerate(methods):
            shot = dict(image=image, truth=truth, prediction=np.roll(truth, shift, 0))
            rows.append(identity(method) | dict(case=case, seed=seed) | shot)
    return pd.DataFrame(rows)


def test_qualitative():
    cases = {"best": "a", "median": "b", "worst": "c"}
    examples = pd.concat([slices(ROLES.values(), "abc"), slices(ROLES.values(), "abc", seed=1).assign(prediction=None)])
    figure = qualitative(examples, ROLES, cases)
    check(figure, DOUBLE)
    axes = np.array(figure.axes).reshape(3, 5)
    assert [ax.get_title() for ax in axes[0]] == [
        "input", "truth", "teacher\nT1", "student\nS1 (50 %)", "distilled student\nKD(T1, S1)",
    ]  # fmt: skip
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["best\na", "median\nb", "worst\nc"]
    assert axes[0, 2].get_xlabel() == "slice Dice 1.00"
    # errors of the student, whose prediction lies one pixel lower: missed above, too much below
    truth = slices(["T1"], "a")["truth"][0]
    moved = np.roll(truth, 1, 0)
    missed, extra, confused = (image.get_array()[..., 3] > 0 for image in axes[0, 3].images[1:])
    assert missed.sum() == ((truth == 1) & (moved == 0)).sum() == extra.sum() and not confused.any()
    assert np.argwhere(missed).mean(0)[0] < np.argwhere(extra).mean(0)[0]
    assert axes[0, 3].get_xlabel() == f"slice Dice {2 * (truth & moved).sum() / (truth.sum() + moved.sum()):.2f}"


@pytest.mark.parametrize("edit", ["nothing true", "nothing at all", "everything", "another class"])
def test_qualitative_of_odd_masks(edit):
    examples = slices(["S1"], "a")
    mask = examples["truth"][0]
    truth, prediction = {
        "nothing true": (mask * 0, mask),
        "nothing at all": (mask * 0, mask * 0),
        "everything": (mask * 0 + 1, mask * 0 + 1),
        "another class": (mask * 2, mask),
    }[edit]
    examples["truth"], examples["prediction"] = [truth], [prediction]
    figure = qualitative(examples, {"student": "S1"}, {"only": "a"})
    check(figure, DOUBLE)
    expected = {"nothing true": 0, "nothing at all": 1, "everything": 1, "another class": 0}[edit]
    assert figure.axes[2].get_xlabel() == f"slice Dice {expected:.2f}"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("wrong class" in legend) == (edit == "another class")
    # the caption speaks of a box only where there is one: not where the whole slice is shown beside it
    boxed = edit in ("nothing true", "another class")
    assert bool(figure.axes[0].patches) == ("box" in figure.get_label()) == boxed


# -------------------------------------------------------------------------------------------------------------- saving


def test_saved_figures(tmp_path):
    table = results(METHODS[:4])
    first = save_figure(dice_per_method(table), tmp_path / "figures", "dice", "Dice of each method.")
    again = save_figure(dice_per_method(table), tmp_path / "again", "dice", "Dice of each method.")
    assert [path.name for path in first] == ["dice.pdf", "dice.png", "dice.txt"]
    assert sorted(path.name for path in first[0].parent.iterdir()) == ["dice.pdf", "dice.png", "dice.txt"]
    for one, two in zip(first, again, strict=True):
        assert one.read_bytes() == two.read_bytes()  # no dates
    pdf = first[0].read_bytes()
    assert b"/Type3" not in pdf and b"/FontFile2" in pdf and b"CreationDate" not in pdf
    image = plt.imread(first[1])
    assert image.shape[1] == pytest.approx(84 / 25.4 * 300, abs=1)
    caption = first[2].read_text(encoding="utf-8")
    assert caption.startswith("Dice of each method. ") and "n = 6" in caption


@pytest.mark.skipif(not shutil.which("pdffonts"), reason="poppler's pdffonts is not installed")
def test_saved_figures_embed_their_fonts(tmp_path):
    path = save_figure(dice_per_method(results(METHODS[:2])), tmp_path, "dice", "")[0]
    listed = subprocess.run(["pdffonts", path], capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    assert listed and all(re.search(r"TrueType.*\byes yes (yes|no)", line) for line in listed), listed


@pytest.mark.parametrize("axis, values", [("fraction", (0.1, 0.5, 1.0)), ("length", (0.25, 1.0, 2.0))])
def test_a_line_for_each_way_of_learning_along_an_axis(axis, values):
    """Each line passes through the means of its methods, in the axis's order; the teacher is a band."""
    ways = {
        "alone": dict(role="baseline", teacher="", control="", unlabelled=False),
        "distilled": dict(role="distilled", teacher="T1", control="", unlabelled=False),
        "distilled, with unlabelled images": dict(role="distilled", teacher="T1", control="", unlabelled=True),
        "pseudo-labels": dict(role="control", teacher="T1", control="pseudo_labels", unlabelled=True),
    }
    teacher = dict(role="teacher", teacher="", control="", fraction=1.0, length=1.0)
    tables = [tidy({"T1": [0.9, 0.92, 0.94]}, **teacher)]
    for number, columns in enumerate(ways.values()):
        for value in reversed(values):
            table = tidy({f"{number} {value}": [0.5 + value / 10, 0.6 + value / 10, 0.7]})
            tables.append(table.assign(model="S1", **columns, **{axis: value}))
    figure = along(pd.concat(tables, ignore_index=True), axis)
    lines = {line.get_label(): line for line in figure.axes[0].containers}
    assert set(lines) == set(ways)
    for container in lines.values():
        drawn = container.lines[0].get_ydata()
        assert drawn == pytest.approx([(1.8 + 2 * value / 10) / 3 for value in values])
    assert figure.axes[0].get_xscale() == "log" and "as a band" in figure.get_label()


# ------------------------------------------------------------------------------------------------------------ refusals


def two_methods():
    return pd.concat([diagnostics(epochs=2), diagnostics("KD(T2, S1)", epochs=2)])


EDGES = [distilled("fitnet", "E-E"), distilled("supcon", "E-E")]


def test_tables_without_what_is_drawn_are_refused():
    nothing = pd.DataFrame()
    refused = [
        *((draw, (table,), message) for draw in (training_curves, gradient_diagnostics, gradient_shares)
          for table, message in ((nothing, "no run, method"), (trainings().iloc[:0], "no rows"))),
        (training_curves, (trainings(["S1"]), ["B-B"]), "no B-B"),
        (gradient_shares, (trainings(["S1"]),), "no share/<term>"),
        (gradient_diagnostics, (two_methods(),), r"method None; choose from KD\(T1, S1\), KD\(T2, S1\)"),
        (gradient_diagnostics, (two_methods(), "S1"), "method 'S1'"),
        (gradient_diagnostics, (trainings(["KD(T1, S1)"]),), "no share/<term>, cosine/<term>"),
        (choose_cases, (results(["S1"]), "T1"), "no method 'T1'"),
        (efficiency, (results(["S1", "T1"]), costs(["S1"])), "no cost of T1 in size study"),
        (efficiency, (results(["S1", "T1"]), costs().drop(columns="latency_ms")), "no latency_ms in the table"),
        (teacher_agreement, (pd.DataFrame(columns=["metric", "case"]),), "no method, value"),
        (teacher_agreement, (closeness(["S1"], ["agreement"]).assign(value=np.nan),), "no defined value"),
        (reliability, (binned(["S1"], 1, 2, empty=(0, 1)),), "'S1' has no pixel"),
        (reliability, (binned(["S1"]).drop(columns="method"),), "no method"),
        (ablation, (results([distilled("at", "E-E"), distilled("reviewkd", "scales")]),), "has other terms than E-E"),
        (ablation, (results(EDGES),), "the terms of another method"),
        (ablation, (results([EDGES[0], distilled("fitnet", "B-B", teacher="T2")]),), "several students or teachers"),
        (ranking, (ranks(results(["S1", "S2"])), "T1"), "no reference 'T1' among S2, S1"),
        (ranking, (ranks(results(["S1", "S2"])).drop(columns="rank_low"),), "no rank_low"),
        (cumulative_correction, (steps().assign(dice=[0.715, 0.745, 0.695, 0.699, 0.8]),),
         "'corrected' does not add up .*repeats the one before"),
        (cumulative_correction, (steps().assign(difference=[np.nan, 0.03, 0.05, 0.004, 0]),),
         r"\(fault 2\)' does not add up .*same cases"),
        (cumulative_correction, (steps().iloc[:1],), "its start and its end"),
        (cumulative_correction, (steps().drop(columns="verdict"),), "no verdict"),
        (qualitative, (slices(["S1"], "a"), {"teacher": "T1"}, {"best": "a"}), "no example slice of method 'T1'"),
        (qualitative, (slices(["S1"], "a"), {"student": "S1"}, {}), "at least one"),
        (along, (results(["S1"]), "width"), "axis 'width' does not exist"),
        *((draw, (table,), ".") for draw in (dice_per_method, ablation)
          for table in (nothing, results(["S1"]).iloc[:0], results(["S1"], metric="iou"))),
    ]  # fmt: skip
    for draw, given, message in refused:
        with pytest.raises(InputError, match=message):
            draw(*given)


def test_comparisons_and_cases_that_do_not_fit_their_table_are_refused():
    table = results(["KD(T1, S1)", "S1", "KD(T1, S2)", "S2"], 3)
    verdicts = compare(table, PAIRS[:2])
    known, thick = sized(["S1"], [50, 60], 3.0)
    for draw, given, message in [
        (slopes, (table[table["method"].isin(["S1", "KD(T1, S1)"])], verdicts), r"no method KD\(T1, S2\), S2 in the"),
        (slopes, (table, verdicts.iloc[:0]), "no rows"),
        (ranking, (ranks(table), None, verdicts), "no comparison with the reference None"),
        (ablation, (results(EDGES[:1]), verdicts), "no comparison with the reference"),
        (failure, (known, thick.iloc[:1]), "no thickness of cases case_1"),
        (failure, (known, thick.drop(columns="thickness (mm)")), "run notebook 00 again"),
        (failure, (known, thick, ["T1"]), "no method T1"),
        (failure, (known.assign(value=known["value"].where(known["metric"] == "dice", 0)), thick), "no patient with"),
    ]:
        with pytest.raises(InputError, match=message):
            draw(*given)
