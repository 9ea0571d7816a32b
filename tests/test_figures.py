from __future__ import annotations

import itertools
import re
import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from kdlib.config import InputError
from kdlib.figures import (
    DOUBLE,
    METHOD_COLOURS,
    METHOD_MARKERS,
    SINGLE,
    ablation,
    choose_cases,
    dice_against_parameters,
    dice_per_method,
    loss_comparison,
    method_style,
    qualitative,
    save_figure,
    training_curves,
)
from kdlib.statistics import THESIS_TABLE, summarise

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
        for recipe in recipes or [FULL + " (labelled)" if arm.startswith("KD") else "baseline"]:
            for seed, case in itertools.product(range(seeds), range(cases)):
                value = 0.5 + 0.03 * number + 0.02 * case + generator.normal(0, 0.01)
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
            boxes = [tick.label1.get_window_extent(renderer) for tick in ticks if tick.label1.get_text()]
            for one, two in itertools.pairwise(boxes):
                assert not one.overlaps(two), "tick labels overlap"
    assert "n = " in figure.get_label()


# --------------------------------------------------------------------------------------------------------------- style


def test_every_method_has_its_own_colour_and_marker():
    assert len(set(METHOD_COLOURS.values())) == len(set(METHOD_MARKERS.values())) == len(METHOD_COLOURS)
    assert len({method_style(arm)["linestyle"] for arm in ("T1", "S1", "KD(T1, S1)")}) == 3
    other = method_style("S1 (25 %)")
    assert other == method_style("S1 (25 %)") and other["color"] not in METHOD_COLOURS.values()


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
    return subset if subset == "PMD" else f"{subset} (labelled)"


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
    dark = {tuple(dot.get_offsets()[0]) for dot in dots.collections if to_hex(dot.get_facecolor()[0]) == "#000000"}
    expected = {
        (x, y)
        for y, recipe in enumerate(found["recipe"])
        for x, term in enumerate(TERMS)
        if term in recipe.split(" (")[0].split("+")
    }
    assert dark == expected and len(dots.collections) == 4 * len(found)


def test_ablation_refuses():
    with pytest.raises(InputError, match="'shuffled teacher' is no subset"):
        ablation(tidy(["KD(T1, S1)"], recipes=["E-E (mse)", "shuffled teacher"]))
    with pytest.raises(InputError, match="terms of another recipe"):
        ablation(tidy(["KD(T1, S1)"], recipes=["E-E (mse)", "E-E (labelled)"]))
    with pytest.raises(InputError, match="filter the table by arm"):
        ablation(tidy(["KD(T1, S1)", "KD(T2, S1)"], recipes=["E-E (mse)"]))


def test_loss_comparison():
    recipes = [f"{FULL} ({loss})" for loss in ("labelled", "mse", "infonce")]
    table = pd.concat([tidy(["KD(T1, S1)", "KD(T1, S2)"], recipes=recipes), tidy(["S1 (50 %)"])])
    figure = loss_comparison(table)
    check(figure, SINGLE)
    ax = figure.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["KD(T1, S1)", "KD(T1, S2)", "S1 (50 %)"]
    found = summarise(table, ["arm", "recipe"]).set_index(["arm", "recipe"])["mean"]
    order = [(arm, recipes[k]) for arm in ("KD(T1, S1)", "KD(T1, S2)") for k in (1, 2, 0)] + [("S1 (50 %)", "baseline")]
    means = [container.lines[0].get_xdata()[0] for container in ax.containers]
    assert means == pytest.approx([found[key] for key in order])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "no distillation", "MSE", "InfoNCE", "labelled contrast",
    ]  # fmt: skip
    check(loss_comparison(tidy(["KD(T1, S1)"], recipes=["PMD", "E-E (mse)"])), SINGLE)  # another loss
    with pytest.raises(InputError, match="several recipes with one loss"):
        loss_comparison(tidy(["KD(T1, S1)"], recipes=["E-E (mse)", "B-B (mse)"]))


@pytest.mark.parametrize("arms, cases", [(ARMS, 24), (["S1"], 1)])
def test_dice_against_parameters(arms, cases):
    table = tidy(arms, cases)
    figure = dice_against_parameters(table, PARAMS)
    check(figure, SINGLE)
    ax = figure.axes[0]
    assert ax.get_xscale() == "log"
    points = [container.lines[0].get_xydata()[0] for container in ax.containers]
    assert [y for _, y in points] == pytest.approx(summarise(table)["mean"].tolist())
    for arm, (x, _) in zip(arms, points, strict=True):
        assert 1 <= x / (PARAMS[arm] / 1e6) < 2
    assert len({x for x, _ in points}) == len(points)
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert [line.get_ydata()[0] for line in hollow] == THESIS_TABLE["dice"].tolist()
    assert [to_hex(line.get_color()).upper() for line in hollow] == [METHOD_COLOURS[arm] for arm in THESIS_TABLE.index]
    alone = dice_against_parameters(table, PARAMS, thesis=None)
    assert not [line for line in alone.axes[0].lines if line.get_markerfacecolor() == "none"]
    with pytest.raises(InputError, match=f"no number of parameters for {re.escape(arms[0])}"):
        dice_against_parameters(table, {arm: 1 for arm in arms[1:]})


@pytest.mark.parametrize("draw", [dice_per_method, ablation, loss_comparison])
def test_empty_tables_are_refused(draw):
    for table in (pd.DataFrame(), tidy(["S1"]).iloc[:0], tidy(["S1"], metric="iou")):
        with pytest.raises(InputError):
            draw(table)
    with pytest.raises(InputError):
        dice_against_parameters(tidy(["S1"]).iloc[:0], PARAMS)


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
    assert image.shape[1] == pytest.approx(85 / 25.4 * 300, abs=1)
    caption = first[2].read_text(encoding="utf-8")
    assert caption.startswith("Dice of each method. ") and "n = 6" in caption and "95 % BCa" in caption
