from __future__ import annotations

import ast
import itertools
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex, to_rgb

import kdlib.analysis.figures
from kdlib.analysis.figures import (
    DOUBLE,
    FAMILY_OF,
    METHOD_COLOURS,
    METHOD_MARKERS,
    SINGLE,
    ablation,
    choose_cases,
    dice_against_parameters,
    dice_per_method,
    efficiency,
    failure,
    fidelity,
    gradient_diagnostics,
    gradient_shares,
    method_style,
    qualitative,
    ranking,
    reliability,
    save_figure,
    slopes,
    training_curves,
    waterfall,
)
from kdlib.analysis.figures.style import HATCHES, VERDICTS
from kdlib.analysis.statistics import THESIS_TABLE, compare, interval, per_patient, ranks, summarise
from kdlib.config import LOSS_NAMES, InputError

ARMS = list(METHOD_COLOURS)
TERMS = ["E-E", "B-B", "D-D", "PMD"]
SUBSETS = ["+".join(terms) for size in range(1, 5) for terms in itertools.combinations(TERMS, size)]
FULL = "E-E+B-B+D-D+PMD"
PARAMS = {arm: 57_297 if arm.startswith("S1") or arm.endswith("S1)") else 227_233 for arm in ARMS} | {
    "T1": 31_043_521,
    "T2": 105_000_000,
}


@pytest.fixture(autouse=True)
def closed_figures():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where a layout collapses or a label is lost
        yield
    plt.close("all")


def tidy(arms, cases=6, seeds=2, metric="dice", recipes=None) -> pd.DataFrame:
    """Values that differ by arm, case and seed."""
    generator, rows = np.random.default_rng(0), []
    for number, arm in enumerate(arms):
        for recipe in recipes or [FULL + " (supcon)" if arm.startswith("KD") else "baseline"]:
            for seed, case in itertools.product(range(seeds), range(cases)):
                value = 0.3 + 0.02 * number + 0.02 * case + generator.normal(0, 0.01)
                row = dict(run=f"{arm}{seed}", arm=arm, recipe=recipe, fold=0, seed=seed, case=f"case_{case:02}")
                rows.append(row | {"class": "spleen", "metric": metric, "value": value})
    return pd.DataFrame(rows)


def trainings(arms=ARMS, epochs=12, runs=2) -> pd.DataFrame:
    rows = []
    for arm, run, epoch in itertools.product(arms, range(runs), range(1, epochs + 1)):
        names = ["loss", "segmentation", "val_dice", "lr"] + ["E-E", "PMD", "grad/E-E"] * arm.startswith("KD")
        rows += [dict(run=f"{arm}-{run}", arm=arm, epoch=epoch, name=name, value=(1 + run) / epoch) for name in names]
    return pd.DataFrame(rows)


def slices(arms, cases, size=48, seed=0) -> pd.DataFrame:
    rows, (y, x) = [], np.mgrid[:size, :size]
    for number, case in enumerate(cases):
        truth = ((y - 20) ** 2 + (x - 24 - number) ** 2 < 60).astype(np.uint8)
        image = (truth * 80 + 60).astype(np.uint8)
        for shift, arm in enumerate(arms):
            shot = dict(image=image, truth=truth, prediction=np.roll(truth, shift, 0))
            rows.append(dict(arm=arm, case=case, seed=seed) | shot)
    return pd.DataFrame(rows)


def check(figure, width) -> None:
    """Drawn at printed width, no text is cut off or under the legend, no panel is empty, no text is tiny."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    assert figure.get_size_inches()[0] == pytest.approx(width)
    page = figure.bbox.padded(2)
    legends = [legend.get_window_extent(renderer) for legend in figure.legends]
    panels = [ax.get_tightbbox(renderer) for ax in figure.axes]
    for box in legends + panels:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, "something is cut"
    for one, two in itertools.combinations(legends + panels, 2):
        assert not one.padded(-1).overlaps(two), "panels or legend overlap"
    for text in figure.findobj(matplotlib.text.Text):
        assert text.get_fontsize() >= 7 or not text.get_text()
    for ax in figure.axes:
        assert ax.has_data()
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            labels = [tick.label1 for tick in ticks if tick.label1.get_visible() and tick.label1.get_text()]
            boxes = [label.get_window_extent(renderer) for label in labels]
            for one, two in itertools.pairwise(boxes):
                assert not one.overlaps(two), "tick labels overlap"
    assert "n = " in figure.get_label()


# --------------------------------------------------------------------------------------------------------------- style


def test_every_method_has_its_own_colour_and_marker():
    assert len(set(METHOD_COLOURS.values())) == len(set(METHOD_MARKERS.values())) == len(METHOD_COLOURS)
    assert len({method_style(arm)["linestyle"] for arm in ("T1", "S1", "KD(T1, S1)", "KD(T2, S1)")}) == 4
    other = method_style("S1 (25 %)")
    assert other == method_style("S1 (25 %)") and other["color"] not in METHOD_COLOURS.values()


def luminance(colour: str) -> float:
    """Relative, 0 to 1 (WCAG 2.1)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_methods_and_verdicts_can_be_told_apart_in_grey():
    shown = [*ARMS, "DIST", "MSE", "SP", "CRD", "thesis terms, MSE", "no distillation"]
    styles = {arm: method_style(arm) for arm in shown}
    for one, two in itertools.combinations(shown, 2):
        if {one, two} & set(ARMS) and not {one, two} <= set(ARMS):
            continue  # families and arms stand in no figure together
        alike = abs(luminance(styles[one]["color"]) - luminance(styles[two]["color"])) < 0.05
        assert not alike or styles[one]["marker"] != styles[two]["marker"], f"{one} and {two} are one grey"
    bars = [(luminance(VERDICTS[verdict]), HATCHES.get(verdict)) for verdict in ("better", "inconclusive", "worse")]
    for (one, hatch), (two, other) in itertools.combinations(bars, 2):
        assert abs(one - two) > 0.2 or hatch != other


def test_figures_need_tables_alone():
    """No module of the figures imports torch or code that trains."""
    folder = Path(kdlib.analysis.figures.__file__).parent
    for path in folder.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
        assert {name.split(".")[0] for name in names}.isdisjoint({"torch", "monai"}), path
        own = {
            name for name in names if name.split(".")[0] == "kdlib" and not name.startswith("kdlib.analysis.figures.")
        }
        assert own <= {"kdlib.config", "kdlib.analysis.metrics", "kdlib.analysis.statistics"}, path


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("arms", [ARMS, ["S1"], ["S1", "S1 (25 %)", "KD(T1, S1)"]])
def test_training_curves(arms):
    figure = training_curves(trainings(arms))
    check(figure, DOUBLE)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:3] == ["validation Dice", "total loss", "segmentation loss"]
    assert ("E-E loss" in titles) == any(arm.startswith("KD") for arm in arms)
    line = figure.axes[0].lines[0]
    assert line.get_ydata() == pytest.approx(1.5 / np.arange(1, 13))  # mean of the runs' 1 / epoch and 2 / epoch
    assert to_hex(line.get_color()).upper() == method_style(arms[0])["color"]


def test_training_curves_of_chosen_names_and_one_epoch():
    figure = training_curves(trainings(["KD(T1, S1)"], epochs=1, runs=1), ["lr", "grad/E-E"])
    check(figure, DOUBLE)
    assert [ax.get_title() for ax in figure.axes] == ["learning rate", "gradient of E-E"]


def test_training_curves_refuse():
    with pytest.raises(InputError, match="no run, arm"):
        training_curves(pd.DataFrame())
    with pytest.raises(InputError, match="no rows"):
        training_curves(trainings().iloc[:0])
    with pytest.raises(InputError, match="no B-B"):
        training_curves(trainings(), ["B-B"])
    mixed = trainings(["KD(T1, S1)"]).assign(recipe=lambda table: table["run"])
    with pytest.raises(InputError, match="several recipes"):
        training_curves(mixed)


@pytest.mark.parametrize("arms, cases, metric", [(ARMS, 24, "dice"), (ARMS[:3], 1, "dice"), (["S1"], 4, "hd95")])
def test_dice_per_method(arms, cases, metric):
    table = tidy(arms, cases, metric=metric)
    figure = dice_per_method(table, metric)
    check(figure, SINGLE)
    ax = figure.axes[0]
    points = [found.get_offsets() for found in ax.collections if isinstance(found, PathCollection)]
    assert [len(found) for found in points] == [cases] * len(arms)
    found = summarise(table, metric=metric)
    assert [np.mean(offsets[:, 0]) for offsets in points] == pytest.approx(found["mean"].tolist())
    lines = [line for line in ax.lines if len(line.get_xdata()) == len(arms) and line.get_color() == "#BBBBBB"]
    values = per_patient(table, metric).pivot(index="patient", columns="arm", values="value")[arms]
    if len(arms) > 1:  # a line a patient, from point to point
        assert np.array([line.get_xdata() for line in lines]) == pytest.approx(values.to_numpy())
        assert [line.get_xydata()[0].tolist() for line in lines] == points[0].tolist()
    means = [container.lines[0].get_xdata()[0] for container in ax.containers]
    assert means == pytest.approx(found["mean"].tolist())
    bars = [container.lines[2][0].get_segments()[0] for container in ax.containers]
    if cases > 1:
        assert [bar[:, 0] for bar in bars] == pytest.approx(found[["low", "high"]].to_numpy())
    else:
        assert not any(map(len, bars))  # one patient has no interval
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == arms and ax.yaxis_inverted()
    assert ax.get_xlabel() == {"dice": "Dice", "hd95": "HD95 (mm)"}[metric]


def test_undefined_values_and_equal_values_draw():
    table = tidy(["S1", "S2"], 5)
    table.loc[table["arm"] == "S1", "value"] = np.nan
    table.loc[table["arm"] == "S2", "value"] = 0.7
    figure = dice_per_method(table)
    check(figure, SINGLE)
    assert "n = 0 to 5" in figure.get_label()


def test_cases_are_chosen_by_rule():
    table = tidy(["S1", "KD(T1, S1)"], 7, seeds=1)
    table["value"] = table["value"].where(table["arm"] == "S1", [0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.6] * 2)
    assert choose_cases(table, "KD(T1, S1)") == {"best": "case_02", "median": "case_00", "worst": "case_01"}
    assert choose_cases(table[table["case"] < "case_02"], "KD(T1, S1)") == {"best": "case_00", "worst": "case_01"}
    assert choose_cases(table[table["case"] < "case_01"], "KD(T1, S1)") == {"best": "case_00"}
    with pytest.raises(InputError, match="no arm 'T1'"):
        choose_cases(table, "T1")


ROLES = {"teacher": "T1", "student": "S1 (50 %)", "distilled student": "KD(T1, S1)"}


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
    truth = slices(["x"], "a")["truth"][0]
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


def test_qualitative_refuses():
    examples = slices(["S1"], "a")
    with pytest.raises(InputError, match="no example slice of arm 'T1' and case 'a'"):
        qualitative(examples, {"teacher": "T1"}, {"best": "a"})
    with pytest.raises(InputError, match="several recipes"):
        twice = pd.concat([examples.assign(recipe="E-E"), examples.assign(recipe="B-B")])
        qualitative(twice, {"student": "S1"}, {"best": "a"})
    with pytest.raises(InputError, match="at least one"):
        qualitative(examples, {"student": "S1"}, {})


def named(subset):
    return subset if subset == "PMD" else f"{subset} (supcon)"


@pytest.mark.parametrize("subsets, baseline", [(SUBSETS, True), (["PMD", "E-E"], False), (["B-B"], True)])
def test_ablation(subsets, baseline):
    table = tidy(["KD(T1, S1)"], recipes=[named(subset) for subset in subsets])
    if baseline:
        table = pd.concat([table, tidy(["S1 (50 %)"])])
    figure = ablation(table)
    check(figure, SINGLE)
    dots, forest = figure.axes
    found = summarise(table, ["recipe"]).sort_values("mean", ascending=False)
    means = [container.lines[0].get_xdata()[0] for container in forest.containers]
    assert means == pytest.approx(found["mean"].tolist())  # the best first
    on = [recipe.split(" (")[0].split("+") for recipe in found["recipe"]]
    expected = [[term for term in TERMS if term in names] for names in on]
    dark = [line.get_xydata().astype(int).tolist() for line in dots.lines]
    assert [[TERMS[x] for x, _ in line] for line in dark] == expected
    assert [{y for _, y in line} for line in dark] == [{y} if names else set() for y, names in enumerate(expected)]


def test_ablation_shows_paired_differences_to_the_student():
    table = tidy(["KD(T1, S1)"], recipes=[named(subset) for subset in SUBSETS], cases=12)
    table.loc[table["recipe"] == "PMD", "value"] -= 0.2
    table = pd.concat([table, tidy(["S1 (50 %)"], cases=12).assign(value=lambda rows: rows["value"] + 0.001)])
    verdicts = compare(table, [(named(subset), "baseline") for subset in SUBSETS], by="recipe")
    assert set(verdicts["verdict"]) == {"worse", "inconclusive"}
    figure = ablation(table, verdicts)
    check(figure, DOUBLE)
    _, forest, beside = figure.axes
    order = summarise(table, ["recipe"]).sort_values("mean", ascending=False)["recipe"]
    expected = verdicts.set_index("a").reindex([recipe for recipe in order if recipe != "baseline"])
    points = [container.lines[0] for container in beside.containers]
    assert [point.get_xdata()[0] for point in points] == pytest.approx(expected["difference"].tolist())
    filled = [point.get_markerfacecolor() != "white" for point in points]
    assert filled == (expected["verdict"] == "worse").tolist()
    assert "Holm's correction for 15 comparisons" in figure.get_label()
    with pytest.raises(InputError, match="no comparison with the reference 'baseline'"):
        ablation(table, verdicts.assign(b="S2"))


def test_ablation_refuses():
    with pytest.raises(InputError, match="'shuffled teacher' is no subset"):
        ablation(tidy(["KD(T1, S1)"], recipes=["E-E (fitnet)", "shuffled teacher"]))
    with pytest.raises(InputError, match="terms of another recipe"):
        ablation(tidy(["KD(T1, S1)"], recipes=["E-E (fitnet)", "E-E (supcon)"]))
    with pytest.raises(InputError, match="filter the table by arm"):
        ablation(tidy(["KD(T1, S1)", "KD(T2, S1)"], recipes=["E-E (fitnet)"]))


@pytest.mark.parametrize("arms, cases", [(ARMS, 24), (["S1"], 1)])
def test_dice_against_parameters(arms, cases):
    table = tidy(arms, cases)
    figure = dice_against_parameters(table, PARAMS)
    check(figure, SINGLE)
    ax = figure.axes[0]
    assert ax.get_xscale() == "log"
    points = [container.lines[0].get_xydata()[0] for container in ax.containers]
    assert [y for _, y in points] == pytest.approx(summarise(table)["mean"].tolist())
    sizes = pd.Series([x for x, _ in points]).groupby([PARAMS[arm] / 1e6 for arm in arms])
    assert np.exp(np.log(sizes.apply(np.array).iloc[0]).mean()) == pytest.approx(min(map(PARAMS.get, arms)) / 1e6)
    assert (sizes.max() / sizes.min() < 2.5).all() and len({x for x, _ in points}) == len(points)
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert [line.get_ydata()[0] for line in hollow] == THESIS_TABLE["dice"].tolist()
    assert [to_hex(line.get_color()).upper() for line in hollow] == [METHOD_COLOURS[arm] for arm in THESIS_TABLE.index]
    alone = dice_against_parameters(table, PARAMS, thesis=None)
    assert not [line for line in alone.axes[0].lines if line.get_markerfacecolor() == "none"]
    with pytest.raises(InputError, match=f"no number of parameters for {re.escape(arms[0])}"):
        dice_against_parameters(table, {arm: 1 for arm in arms[1:]})


PAIRS = [("KD(T1, S1)", "S1"), ("KD(T1, S2)", "S2"), ("KD(T2, S1)", "S1"), ("KD(T2, S2)", "S2")]


@pytest.mark.parametrize("count, cases", [(1, 8), (2, 1), (4, 24)])
def test_slopes(count, cases):
    table = tidy(["S1", "S2", "KD(T1, S1)", "KD(T1, S2)", "KD(T2, S1)", "KD(T2, S2)"], cases)
    table.loc[(table["case"] == "case_00") & (table["arm"] == "KD(T1, S1)"), "value"] = 0.1
    verdicts = compare(table, PAIRS[:count])
    figure = slopes(table, verdicts)
    check(figure, DOUBLE if count > 2 else SINGLE)
    values = per_patient(table).pivot(index="patient", columns="arm", values="value")
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
    assert f"n = {cases}" in figure.get_label() and f"{count} comparisons" in figure.get_label()


def test_slopes_of_a_metric_where_lower_is_better():
    table = tidy(["S1", "KD(T1, S1)"], cases=4, metric="hd95")
    table.loc[table["arm"] == "KD(T1, S1)", "value"] -= 0.3
    figure = slopes(table, compare(table, PAIRS[:1], "hd95"), "hd95")
    check(figure, SINGLE)
    assert not any(line.get_linestyle() == "--" for line in figure.axes[0].lines), "a fall is no worsening"
    assert figure.axes[0].get_ylabel() == "HD95 (mm)"


def test_slopes_refuse():
    table = tidy(["S1", "KD(T1, S1)", "S2", "KD(T1, S2)"])
    verdicts = compare(table, PAIRS[:2])
    with pytest.raises(InputError, match=r"no arm KD\(T1, S2\), S2 in the table"):
        slopes(table[table["arm"].isin(PAIRS[0])], verdicts)
    with pytest.raises(InputError, match="no rows"):
        slopes(table, verdicts.iloc[:0])


def costs(models=("T1", "T2", "S1", "S2")) -> pd.DataFrame:
    rows = []
    for number, (size, model) in enumerate(itertools.product(("study", "thesis"), models)):
        cost = dict(inference_parameters=10 ** (4 + number % 4), gflops=2.0 ** (number % 4), latency_ms=10.0 + number)
        rows.append(dict(model=model, size=size, threads=1) | cost)
    return pd.DataFrame(rows)


def with_models(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(model=table["arm"].map(lambda arm: arm.split(" (")[0].split(", ")[-1].rstrip(")")))


@pytest.mark.parametrize("thesis", [THESIS_TABLE, None])
@pytest.mark.parametrize("arms", [ARMS, ["S1"]])
def test_efficiency(arms, thesis):
    table, cost = with_models(tidy(arms)), costs()
    figure = efficiency(table, cost, thesis)
    check(figure, DOUBLE)
    means = summarise(table).set_index("arm")["mean"]
    at = cost[cost["size"] == "study"].set_index("model")
    units = dict(inference_parameters=1e6, gflops=1, latency_ms=1)
    for ax, (name, unit) in zip(figure.axes, units.items(), strict=True):
        points = [container.lines[0].get_xydata()[0] for container in ax.containers]
        assert [y for _, y in points] == pytest.approx(means.tolist())
        models = with_models(pd.DataFrame({"arm": arms}))["model"]
        ratios = [x / (at.loc[model, name] / unit) for (x, _), model in zip(points, models, strict=True)]
        assert all(0.5 < ratio < 2 for ratio in ratios) and np.log(ratios).sum() == pytest.approx(0, abs=1e-9)
        hollow = [line for line in ax.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
        assert [line.get_ydata()[0] for line in hollow] == ([] if thesis is None else thesis["dice"].tolist())
        stair = next(line for line in ax.lines if line.get_drawstyle() == "steps-post")
        for x, y in stair.get_xydata():  # nothing that costs no more is better
            cheap = [mean for arm, mean in means.items() if at.loc[dict(zip(arms, models))[arm], name] / unit <= x]
            assert y == pytest.approx(max(cheap))
    assert ("Hollow" in figure.get_label()) == (thesis is not None) and "1 thread." in figure.get_label()


def test_efficiency_refuses():
    table = with_models(tidy(["S1", "T1"]))
    with pytest.raises(InputError, match="no cost of T1 in size study"):
        efficiency(table, costs(["S1"]))
    with pytest.raises(InputError, match="no latency_ms in the table"):
        efficiency(table, costs().drop(columns="latency_ms"))


def sized(arms, volumes, thickness, slope=0.1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Dice that grows by `slope` with each doubling of the volume, and the cases' thickness."""
    rows, names = [], [f"case_{number}" for number in range(len(volumes))]
    for (number, arm), (case, volume) in itertools.product(enumerate(arms), zip(names, volumes, strict=True)):
        row = {"arm": arm, "case": case, "patient": f"p{case}", "class": "spleen", "seed": 0}
        dice = 0.4 + 0.05 * number + slope * np.log2(volume / min(volumes))
        rows += [row | {"metric": "dice", "value": dice}, row | {"metric": "truth_volume", "value": volume}]
    return pd.DataFrame(rows), pd.DataFrame({"case": names, "thickness (mm)": thickness})


@pytest.mark.parametrize("cases, several", [(24, True), (24, False), (8, True), (3, False)])
def test_failure(cases, several):
    arms = ["T1", "S1 (50 %)", "KD(T1, S1)"]
    volumes = 50 * 1.1 ** np.random.default_rng(0).permutation(cases)
    table, known = sized(arms, volumes, np.where(np.arange(cases) % 2, 5.0, 3.0) if several else 2.0)
    figure = failure(table, known)
    check(figure, DOUBLE if several else SINGLE)
    left, groups = figure.axes[0], min(3, max(1, cases // 4))
    assert [text.get_text() for text in left.texts] == [f"n = {cases // groups}"] * groups
    values = table[table["metric"] == "dice"].pivot(index="patient", columns="arm", values="value")
    order = values.loc[table.drop_duplicates("patient").set_index("patient").index[np.argsort(volumes)], "T1"]
    means = [chunk.mean() for chunk in np.array_split(order.to_numpy(), groups)]
    assert left.containers[0].lines[0].get_ydata() == pytest.approx(means)
    if several:
        labels = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
        assert labels == [f"3\nn = {cases // 2}", f"5\nn = {cases // 2}"]
    else:
        assert "All slices are 2 mm thick" in figure.get_label()
    assert ("T1 +1.00 [" in figure.get_label()) == (cases >= 6) and f"n = {cases}" in figure.get_label()


def test_failure_of_many_thicknesses_and_of_few_patients_is_exact():
    table, known = sized(["S1", "T1"], np.arange(50, 62), np.linspace(1, 5, 12).round(1))
    figure = failure(table, known, ["S1"])
    check(figure, DOUBLE)
    assert len(figure.axes[1].get_xticks()) == 3 and "T1" not in figure.get_label()
    # six patients in perfect order: 2 of 720 orders are as extreme
    table, known = sized(["S1"], [50, 60, 70, 80, 90, 100], 3.0)
    assert "p = 0.0028" in failure(table, known).get_label()
    # the classes of a patient make one volume, and an empty target is left out
    empty = table.copy()
    empty.loc[(empty["case"] == "case_0") & (empty["metric"] == "truth_volume"), "value"] = 0
    assert "n = 5" in failure(empty, known).get_label()


def test_failure_refuses():
    table, known = sized(["S1"], [50, 60], 3.0)
    with pytest.raises(InputError, match="no thickness of cases case_1"):
        failure(table, known.iloc[:1])
    with pytest.raises(InputError, match="run notebook 00 again"):
        failure(table, known.drop(columns="thickness (mm)"))
    with pytest.raises(InputError, match="no arm T1"):
        failure(table, known, ["T1"])
    with pytest.raises(InputError, match="no metric 'truth_volume'"):
        failure(table[table["metric"] == "dice"], known)
    with pytest.raises(InputError, match="no patient with a target"):
        failure(table.assign(value=table["value"].where(table["metric"] == "dice", 0)), known)


MANY = ["S1 (50 %)", *(f"method {number}" for number in range(27)), "S1", FULL + " (supcon)"]


@pytest.mark.parametrize("arms, cases", [(MANY, 8), (["S1 (50 %)", "KD(T1, S1)", "S1"], 8), (["S1 (50 %)", "S1"], 1)])
def test_ranking(arms, cases):
    table = tidy(arms, cases)
    found = ranks(table, resamples=200)
    verdicts = compare(table, [(arm, "S1 (50 %)") for arm in arms[1:]])
    figure = ranking(found, "S1 (50 %)", verdicts)
    check(figure, DOUBLE)
    left, right, shares = figure.axes
    assert [text.get_text() for text in shares.texts] == [f"{100 * share:.0f}" for share in found["first"]]
    assert [line.lines[0].get_xdata()[0] for line in left.containers] == list(range(1, len(arms) + 1))
    bars = [line.lines[2][0].get_segments()[0][:, 0] for line in left.containers]
    assert np.array(bars) == pytest.approx(found[["rank_low", "rank_high"]].to_numpy())
    names = [f"{row.arm}  {row.mean:.3f}" for row in found.itertuples()]
    assert [tick.get_text() for tick in left.get_yticklabels()] == names and left.yaxis_inverted()
    verdicts = verdicts.set_index("a").loc[[arm for arm in found["arm"] if arm != "S1 (50 %)"]]
    points = [line.lines[0] for line in right.containers]
    assert [point.get_xdata()[0] for point in points] == pytest.approx(verdicts["difference"].tolist())
    filled = [point.get_markerfacecolor() != "white" for point in points]
    assert filled == (verdicts["verdict"] != "inconclusive").tolist()
    assert f"n = {cases}" in figure.get_label() and "hollow" in figure.get_label()


def test_ranking_without_reference_and_by_recipe():
    figure = ranking(ranks(tidy(["S1", "S2", "KD(T1, S1)"]), resamples=50))
    check(figure, DOUBLE)
    assert len(figure.axes) == 2 and "Middle" not in figure.get_label()
    recipes = ranks(tidy(["KD(T1, S1)"], recipes=["E-E", "PMD"]), by="recipe", resamples=50)
    assert {tick.get_text()[:3] for tick in ranking(recipes).axes[0].get_yticklabels()} == {"E-E", "PMD"}
    far = tidy(["S1", "S2"], metric="hd95")
    figure = ranking(ranks(far, metric="hd95"), "S1", compare(far, [("S2", "S1")], "hd95"), metric="hd95")
    assert "lower is better" in figure.get_label() and figure.axes[1].get_xlabel() == "HD95 minus that of S1 (mm)"


def test_ranking_names_a_far_outlier_at_the_edge_and_the_families():
    table = tidy(["S1", "S2", "KD(T1, S1)", "T1"], cases=8)
    names = {"S1": "no distillation", "S2": "KL (Hinton)", "KD(T1, S1)": "MSE", "T1": "shuffled teacher"}
    table["arm"] = table["arm"].replace(names)
    table["value"] = 0.8 + 0.001 * table["value"] - 0.4 * (table["arm"] == "shuffled teacher")
    verdicts = compare(table, [(arm, "no distillation") for arm in names.values() if arm != "no distillation"])
    figure = ranking(ranks(table, resamples=50), "no distillation", verdicts)
    check(figure, DOUBLE)
    assert any("0.40" in text.get_text() for text in figure.axes[1].texts)
    assert max(map(abs, figure.axes[1].get_xlim())) < 0.05
    stability = ranks(table, resamples=50, reference="no distillation")
    texts = [text.get_text() for text in ranking(stability, "no distillation", verdicts).axes[2].texts]
    shown = [f"{100 * value:.0f}" for row in stability.itertuples() for value in (row.first, row.beats) if value >= 0]
    assert texts == shown and len(texts) == 2 * len(names) - 1  # the reference is not held against itself
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["predictions", "features", "controls"]


def test_every_distiller_has_a_family():
    assert set(FAMILY_OF) == set(LOSS_NAMES.values())
    assert method_style("DIST") == method_style("DKD") != method_style("MSE")
    assert method_style("MSE, shuffled") == method_style("no distillation")


def test_ranking_refuses():
    table = tidy(["S1", "S2"])
    found, verdicts = ranks(table), compare(table, [("S2", "S1")])
    with pytest.raises(InputError, match="no reference 'T1' among S2, S1"):
        ranking(found, "T1")
    with pytest.raises(InputError, match="no comparison with the reference None"):
        ranking(found, None, verdicts)
    with pytest.raises(InputError, match="no rank_low"):
        ranking(found.drop(columns="rank_low"))


def cumulative_correction(
    changes=(0.03, -0.05, 0.004), verdicts=("better", "worse", "inconclusive"), wide=0.01, n=24
) -> pd.DataFrame:
    rows, level = [dict(step="thesis", dice=0.715, verdict="", n=n)], 0.715
    for number, (change, verdict) in enumerate(zip(changes, verdicts, strict=True), start=1):
        level += change
        step = f"same optimiser, rate and batch for every arm (fault {number})"
        bounds = dict(low=change - wide, high=change + 2 * wide)
        rows.append(dict(step=step, dice=level, difference=change, verdict=verdict, n=n) | bounds)
    whole = level - 0.715
    end = dict(step="corrected", dice=level, difference=whole, low=whole - wide, high=whole + wide)
    return pd.DataFrame([*rows, end | dict(verdict="inconclusive", n=n)]).assign(p_adjusted=0.01)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("steps", [0, 3, 12])
def test_waterfall(steps, double):
    table = cumulative_correction(
        [0.03, -0.05, 0.004, 0.0] * 3, ["better", "worse", "inconclusive", "inconclusive"] * 3
    )
    table = cumulative_correction() if steps == 3 else cumulative_correction([], []) if steps == 0 else table
    figure = waterfall(table, double)
    check(figure, DOUBLE if double else SINGLE)
    ax = figure.axes[0]
    bars = [bar for container in ax.containers if hasattr(container, "patches") for bar in container.patches]
    ends = [bar.get_x() + bar.get_width() for bar in bars]
    assert ends == pytest.approx(table["dice"].tolist())
    # every step begins where the one before ended
    assert [bar.get_x() for bar in bars[1:-1]] == pytest.approx(ends[:-2])
    whiskers = [line.lines[2][0].get_segments()[0][:, 0] for line in ax.containers if hasattr(line, "lines")]
    rows = table.iloc[1:-1]
    start = rows["dice"] - rows["difference"]
    assert np.array(whiskers).reshape(-1, 2) == pytest.approx(np.stack([start + rows["low"], start + rows["high"]], 1))
    colours = {"better": "#0072b2", "worse": "#d55e00", "inconclusive": "#bbbbbb"}
    assert [to_hex(bar.get_facecolor()) for bar in bars[1:-1]] == [colours[verdict] for verdict in rows["verdict"]]
    labels = [tick.get_text().replace("\n", " ") for tick in ax.get_yticklabels()]
    assert labels == table["step"].tolist() and ax.yaxis_inverted()
    texts = [text.get_text().replace("\N{MINUS SIGN}", "-") for text in ax.texts]
    assert texts == ["0.715", *(f"{change:+.3f}" for change in rows["difference"]), f"{table['dice'].iloc[-1]:.3f}"]
    boxes = [text.get_window_extent() for text in ax.texts]
    assert max(box.x1 for box in boxes) <= figure.bbox.x1, "a number is cut"
    assert "From start to end" in figure.get_label() and "axis begins at" in figure.get_label()


def test_waterfall_of_one_patient_has_no_intervals():
    table = cumulative_correction(wide=np.nan, n=1)
    figure = waterfall(table)
    check(figure, DOUBLE)
    assert "n = 1" in figure.get_label() and "From start" not in figure.get_label()


def test_waterfall_refuses():
    with pytest.raises(InputError, match="'corrected' does not add up .*repeats the one before"):
        waterfall(cumulative_correction().assign(dice=[0.715, 0.745, 0.695, 0.699, 0.8]))
    with pytest.raises(InputError, match=r"\(fault 2\)' does not add up .*same cases"):
        waterfall(cumulative_correction().assign(difference=[np.nan, 0.03, 0.05, 0.004, 0]))
    with pytest.raises(InputError, match="its start and its end"):
        waterfall(cumulative_correction().iloc[:1])
    with pytest.raises(InputError, match="no verdict"):
        waterfall(cumulative_correction().drop(columns="verdict"))


def binned(arms, cases=6, bins=15, empty=()) -> pd.DataFrame:
    generator, rows = np.random.default_rng(0), []
    for number, (arm, case) in enumerate(itertools.product(arms, range(cases))):
        for index in range(bins):
            confidence, count = (index + 0.5) / bins, 0 if index in empty else 10 ** generator.integers(1, 5)
            accuracy = np.clip(confidence**2 + generator.normal(0, 0.02), 0, 1) if count else np.nan
            row = dict(arm=arm, case=f"case_{case}", bin=index, confidence=confidence if count else np.nan)
            rows.append(row | {"accuracy": accuracy, "count": count, "class": "spleen"})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("arms, cases, empty", [(["S1 (50 %)", "KD(T1, S1)", "T1"], 6, ()), (["S1"], 1, (0, 7))])
def test_reliability(arms, cases, empty):
    figure = reliability(binned(arms, cases, empty=empty))
    check(figure, SINGLE)
    curve, _ = figure.axes
    lines = [line for line in curve.lines if line.get_label() in arms]
    assert [to_hex(line.get_color()).upper() for line in lines] == [METHOD_COLOURS[arm] for arm in arms]
    for line in lines:
        x, y = line.get_data()
        assert len(x) == 15 - len(empty) and y == pytest.approx(x**2, abs=0.06)
    assert f"n = {cases}" in figure.get_label()
    assert len(curve.collections) == (len(arms) if cases > 1 else 0)  # one case has no band


def test_reliability_weighs_cases_alike():
    # a large case that is right in half of its pixels, a small one always; classes and seeds share a case's weight
    part = dict(arm="S1", bin=0, confidence=0.5)
    large = part | {"case": "a", "class": "spleen", "accuracy": 0.5, "count": 10_000}
    small = [part | {"case": "b", "class": name, "accuracy": 1.0, "count": 10} for name in ("spleen", "liver")]
    absent = part | {"case": "c", "class": "liver", "accuracy": np.nan, "confidence": np.nan, "count": 0}
    table = pd.DataFrame([large, *small, absent])
    assert reliability(table).axes[0].lines[1].get_ydata() == pytest.approx([0.75])
    patients = table.assign(patient=["p", "q", "q", "q"])
    assert reliability(patients).axes[0].lines[1].get_ydata() == pytest.approx([0.75])
    with pytest.raises(InputError, match="'S1' has no pixel"):
        reliability(table.iloc[3:])
    with pytest.raises(InputError, match="no arm"):
        reliability(table.drop(columns="arm"))


CLOSE = ["agreement", "band_agreement", "error_overlap", "cka", "ece"]


def closeness(arms, metrics, cases=6) -> pd.DataFrame:
    generator, rows = np.random.default_rng(0), []
    for arm, metric, case, seed in itertools.product(arms, metrics, range(cases), range(2)):
        rows.append(dict(arm=arm, metric=metric, case=f"case_{case}", seed=seed, value=generator.uniform(0.3, 0.9)))
    return pd.DataFrame(rows)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_fidelity(count):
    arms, metrics = ["S1 (50 %)", "KD(T1, S1)"], CLOSE[:count]
    table = closeness(arms, metrics[::-1])
    table.loc[(table["metric"] == "error_overlap") & (table["case"] == "case_0"), "value"] = np.nan
    figure = fidelity(table)
    check(figure, SINGLE if count == 1 else DOUBLE)
    assert len(figure.axes) == count and figure.axes[0].get_xlabel() == "Dice with the teacher"
    for ax, metric in zip(figure.axes, metrics, strict=True):
        for arm, points, line in zip(arms, ax.collections[::2], ax.containers, strict=True):
            chosen = table[(table["arm"] == arm) & (table["metric"] == metric)].dropna()
            values = chosen.groupby("case")["value"].mean()
            assert sorted(points.get_offsets()[:, 0]) == pytest.approx(sorted(values))
            assert line.lines[0].get_xdata()[0] == pytest.approx(values.mean())
            assert line.lines[2][0].get_segments()[0][:, 0] == pytest.approx(interval(values))
    assert ("n = 5 to 6" if count > 2 else "n = 6") in figure.get_label()


def test_fidelity_refuses():
    with pytest.raises(InputError, match="no arm, value"):
        fidelity(pd.DataFrame(columns=["metric", "case"]))
    with pytest.raises(InputError, match="no defined value"):
        fidelity(closeness(["S1"], ["agreement"]).assign(value=np.nan))


def pulses(arm="KD(T1, S1)", kinds=("share", "cosine", "chance", "moved"), terms=TERMS, epochs=12, runs=2):
    rows = []
    for kind, term, run, epoch in itertools.product(kinds, terms, range(runs), range(1, epochs + 1)):
        name, value = f"{kind}/{term}", (1 + run) / epoch + terms.index(term)
        rows.append(dict(run=f"{arm}-{run}", arm=arm, recipe=FULL, epoch=epoch, name=name, value=value))
    return pd.concat([pd.DataFrame(rows), trainings([arm], epochs, runs).assign(recipe=FULL)])


def test_liveness():
    figure = gradient_diagnostics(pulses())
    check(figure, DOUBLE)
    assert [ax.get_title() for ax in figure.axes] == [
        "share of the gradient", "cosine from step to step", "loss relative to chance", "movement of the projectors",
    ]  # fmt: skip
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert len(curves) == len(TERMS) and curves[0].get_ydata() == pytest.approx(1.5 / np.arange(1, 13))
    assert len({line.get_color() for line in curves}) == len({line.get_marker() for line in curves}) == len(TERMS)
    idle = [[line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"] for ax in figure.axes]
    assert idle == [[], [0.0], [1.0], []]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == TERMS
    assert figure.get_label().startswith("KD(T1, S1). ") and "n = 2" in figure.get_label()


@pytest.mark.parametrize("kinds", [["chance"], ["moved", "share"], ["share", "cosine", "moved"]])
def test_liveness_leaves_out_what_was_not_measured(kinds):
    terms = ["segmentation", "PMD", "attention transfer", "region contrast", "affinity of pairs", "E-E"]
    figure = gradient_diagnostics(pulses(kinds=kinds, terms=terms, epochs=1, runs=1))
    check(figure, DOUBLE if len(kinds) > 1 else SINGLE)
    assert len(figure.axes) == len(kinds)
    assert [text.get_text() for text in figure.legends[0].get_texts()][:3] == ["segmentation", "E-E", "PMD"]


def test_liveness_of_one_arm_and_recipe():
    other = pulses("KD(T2, S1)").assign(value=9.0)
    both = pd.concat([pulses(), other, pulses().assign(recipe="PMD", value=7.0)])
    with pytest.raises(InputError, match=r"arm None; choose from KD\(T1, S1\), KD\(T2, S1\)"):
        gradient_diagnostics(both)
    with pytest.raises(InputError, match="recipe None; choose from"):
        gradient_diagnostics(both, "KD(T1, S1)")
    with pytest.raises(InputError, match="arm 'S1'"):
        gradient_diagnostics(both, "S1")
    for arm, recipe, value in (("KD(T1, S1)", "PMD", 7.0), ("KD(T2, S1)", None, 9.0)):
        curve = gradient_diagnostics(both, arm, recipe).axes[0].lines[0]
        assert (curve.get_ydata() == value).all() and len(curve.get_xdata()) == 12
    with pytest.raises(InputError, match="no share/<term>, cosine/<term>"):
        gradient_diagnostics(trainings(["KD(T1, S1)"]))
    with pytest.raises(InputError, match="no rows"):
        gradient_diagnostics(both.iloc[:0])


@pytest.mark.parametrize("arms, epochs", [(["KD(T1, S1)"], 1), (["KD(T1, S1)", "KD(T2, S1)"], 12), (ARMS[6:], 120)])
def test_gradient_shares(arms, epochs):
    names = ["segmentation", *TERMS]
    given = np.random.default_rng(0).dirichlet(np.ones(5), size=(len(arms), epochs, 2))  # of arm, epoch, run
    rows = [
        dict(run=f"{arm}-{run}", arm=arm, epoch=epoch + 1, name=f"share/{name}", value=given[a, epoch, run, n])
        for (a, arm), epoch, run, (n, name) in itertools.product(
            enumerate(arms), range(epochs), range(2), enumerate(names)
        )
    ]
    figure = gradient_shares(pd.concat([pd.DataFrame(rows).sample(frac=1, random_state=0), trainings(["S1"])]))
    check(figure, DOUBLE if len(arms) > 2 else SINGLE)
    assert [ax.get_title() for ax in figure.axes] == list(dict.fromkeys(arms)) or set(arms) == {
        ax.get_title() for ax in figure.axes
    }
    for ax in figure.axes:
        level = np.zeros(epochs)
        for area, n in zip(ax.collections, range(5), strict=True):
            top = level + given[arms.index(ax.get_title()), :, :, n].mean(axis=1)
            outline = area.get_paths()[0].vertices
            for epoch in range(epochs):  # the area's upper edge over the epoch
                inside = outline[np.isclose(outline[:, 0], epoch + 0.5)][:, 1]
                assert np.isclose(inside, top[epoch]).any()
            level = top
        assert level == pytest.approx(1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    looks = {(patch.get_facecolor(), patch.get_hatch()) for patch in figure.legends[0].get_patches()}
    assert len({hatch for _, hatch in looks}) == 5, "areas differ in grey"
    assert "n = 2" in figure.get_label()


def test_gradient_shares_refuse():
    with pytest.raises(InputError, match="no share/<term>"):
        gradient_shares(trainings(["S1"]))
    with pytest.raises(InputError, match="several recipes"):
        gradient_shares(pd.concat([pulses(), pulses().assign(recipe="PMD")]))
    with pytest.raises(InputError, match="no run, arm"):
        gradient_shares(pd.DataFrame())


@pytest.mark.parametrize("draw", [dice_per_method, ablation])
def test_empty_tables_are_refused(draw):
    for table in (pd.DataFrame(), tidy(["S1"]).iloc[:0], tidy(["S1"], metric="iou")):
        with pytest.raises(InputError):
            draw(table)
    with pytest.raises(InputError):
        dice_against_parameters(tidy(["S1"]).iloc[:0], PARAMS)


def test_captions_name_the_interval_that_was_made():
    notes = {n: dice_per_method(tidy(["S1", "S2"], n)).get_label() for n in (1, 3, 6, 60)}
    assert "n = 1) and no interval" in notes[1] and "n = 3) and 95 % Student's t interval" in notes[3]
    assert "n = 6) and 95 % studentised bootstrap interval" in notes[6] and "95 % bootstrap interval" in notes[60]


# -------------------------------------------------------------------------------------------------------------- saving


def test_saved_figures(tmp_path):
    table = tidy(ARMS[:4])
    first = save_figure(dice_per_method(table), tmp_path / "figures", "dice", "Dice of each method.")
    again = save_figure(dice_per_method(table), tmp_path / "again", "dice", "Dice of each method.")
    assert [path.name for path in first] == ["dice.pdf", "dice.png", "dice.txt"]
    for one, two in zip(first, again, strict=True):
        assert one.read_bytes() == two.read_bytes()  # no dates
    pdf = first[0].read_bytes()
    assert b"/Type3" not in pdf and b"/FontFile2" in pdf and b"CreationDate" not in pdf
    image = plt.imread(first[1])
    assert image.shape[1] == pytest.approx(84 / 25.4 * 300, abs=1)
    caption = first[2].read_text(encoding="utf-8")
    assert (
        caption.startswith("Dice of each method. ")
        and "n = 6" in caption
        and "95 % studentised bootstrap interval" in caption
    )


@pytest.mark.skipif(not shutil.which("pdffonts"), reason="poppler's pdffonts is not installed")
def test_saved_figures_embed_their_fonts(tmp_path):
    path = save_figure(dice_per_method(tidy(ARMS[:2])), tmp_path, "dice", "")[0]
    listed = subprocess.run(["pdffonts", path], capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    assert listed and all(re.search(r"TrueType.*\byes yes (yes|no)", line) for line in listed), listed


def test_the_notebook_of_figures_names_what_it_can_draw():
    path = Path(__file__).parents[2] / "notebooks" / "06_figures.ipynb"
    source = "\n".join(cell["source"] for cell in nbformat.read(path, as_version=4).cells)
    listed = re.search(r"a name below: (.*)", source)[1].split(", ")
    keys = re.findall(r'^    "(\w+)": \("\d\d_', source, flags=re.MULTILINE)
    assert sorted(listed) == sorted(keys) and len(keys) == len(set(keys)) == 17
