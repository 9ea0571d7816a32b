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
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex, to_rgb

from kdlib.analysis import gallery
from kdlib.analysis.figures import (
    DOUBLE,
    SINGLE,
    along,
    by_class,
    choose_cases,
    cumulative_correction,
    dice_per_method,
    efficiency,
    failure,
    forest,
    gradient_diagnostics,
    learning_curves,
    method_styles,
    overview,
    qualitative,
    reliability,
    save_figure,
    step,
    teacher_agreement,
)
from kdlib.analysis.figures.style import METHODS as COLOURS
from kdlib.analysis.figures.style import VERDICTS
from kdlib.analysis.statistics import THESIS_TABLE, baseline_pairs, compare, interval, per_patient, ranks, summarise
from kdlib.config import InputError
from kdlib.experiments.tables import NO_EXAMPLES, Results
from kdlib.files import write_csv

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


DEUTERANOPIA = np.array([  # of linear RGB (Machado, Oliveira & Fernandes 2009, severity 1)
    [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881],
])  # fmt: skip
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
CAT02 = np.array([[0.7328, 0.4296, -0.1624], [-0.7036, 1.6975, 0.0061], [0.0030, 0.0136, 0.9834]])
HPE = np.array([[0.38971, 0.68898, -0.07868], [-0.22981, 1.18340, 0.04641], [0.0, 0.0, 1.0]])


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def cam02_ucs(rgb: np.ndarray) -> np.ndarray:
    """J', a', b' of linear RGB (Moroney 2002, Luo 2006), as sRGB is viewed: 64 lux, a background of 20 %."""
    lit, white = 64 / np.pi / 5, 100 * TO_XYZ.sum(1)
    k = 1 / (5 * lit + 1)
    adapted = 0.2 * k**4 * 5 * lit + 0.1 * (1 - k**4) ** 2 * (5 * lit) ** (1 / 3)
    n = 20 / white[1]
    nbb, z = 0.725 * n**-0.2, 1.48 + np.sqrt(n)
    degree = 1 - np.exp((-lit - 42) / 92) / 3.6
    gain = white[1] * degree / (CAT02 @ white) + 1 - degree

    def cones(xyz):
        part = np.power(adapted * (HPE @ np.linalg.inv(CAT02) @ (gain * (CAT02 @ xyz))).clip(0) / 100, 0.42)
        return 400 * part / (27.13 + part) + 0.1

    (r, g, b), (rw, gw, bw) = cones(100 * TO_XYZ @ rgb), cones(white)
    red, yellow = r - 12 * g / 11 + b / 11, (r + g - 2 * b) / 9
    hue = np.arctan2(yellow, red)
    bright = (2 * r + g + b / 20 - 0.305) / (2 * rw + gw + bw / 20 - 0.305)
    light = 100 * bright ** (0.69 * z)
    t = 50000 / 13 * nbb * 0.25 * (np.cos(hue + 2) + 3.8) * np.hypot(red, yellow) / (r + g + 21 * b / 20)
    colourful = t**0.9 * np.sqrt(light / 100) * (1.64 - 0.29**n) ** 0.73 * adapted**0.25
    radius = np.log(1 + 0.0228 * colourful) / 0.0228
    return np.array([1.7 * light / (1 + 0.007 * light), radius * np.cos(hue), radius * np.sin(hue)])


def test_colours_in_cam02_ucs_are_those_that_are_known():
    # of colorspacious, the reference implementation
    assert cam02_ucs(linear("#FFFFFF"))[0] == pytest.approx(100, abs=0.01)
    assert cam02_ucs(linear("#FF0000")) == pytest.approx([60.1, 39.6, 24.6], abs=1.0)


def test_any_two_methods_differ_for_readers_with_deuteranopia_and_in_grey():
    for eyes in (np.eye(3), DEUTERANOPIA):
        seen = {name: cam02_ucs((eyes @ linear(colour)).clip(0, 1)) for name, (colour, _) in COLOURS.items()}
        close = {
            (one, two): np.linalg.norm(seen[one] - seen[two]).round(1) for one, two in itertools.combinations(seen, 2)
        }
        assert min(close.values()) >= 15, min(close.items(), key=lambda item: item[1])
    for (one, mark), (two, other) in itertools.combinations(COLOURS.values(), 2):
        assert mark != other or abs(luminance(one) - luminance(two)) > 0.02
    styles = method_styles(pd.DataFrame(map(identity, METHODS)))
    assert len({styles[name]["linestyle"] for name in ("T1", "S1", "KD(T1, S1)", "KD(T2, S1)")}) == 4
    looks = [VERDICTS[verdict] for verdict in ("better", "inconclusive", "worse")]
    assert len({look["marker"] for look in looks}) == 3 and [look.get("markerfacecolor") for look in looks] == [
        None, "white", None,
    ]  # fmt: skip
    assert not {look["color"] for look in VERDICTS.values()} & {colour for colour, _ in COLOURS.values()}


def test_styles_follow_the_columns_not_the_names():
    rows = [ALONE, distilled("kl"), identity("shuffled teacher"), identity("zero-weight control")]
    renamed = [dict(row, method=f"id {number}") for number, row in enumerate(rows)]
    styles = list(method_styles(pd.DataFrame(rows)).values())
    assert styles == list(method_styles(pd.DataFrame(renamed)).values())
    assert styles[2]["color"] == styles[3]["color"] and styles[2]["marker"] != styles[3]["marker"]
    mine = list(method_styles(pd.DataFrame([dict(rows[2], control="mine")])).values())
    assert mine[0]["color"] == styles[2]["color"] and mine[0]["marker"]
    other = method_styles(pd.DataFrame([identity("S1 (25 %)")]))["S1 (25 %)"]
    assert other not in method_styles(pd.DataFrame(map(identity, METHODS))).values()


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("methods", [METHODS, ["S1"], ["S1", "S1 (25 %)", "KD(T1, S1)"]])
def test_learning_curves(methods):
    history = trainings(methods)
    figure = learning_curves(history)
    titles = [ax.get_title() for ax in figure.axes]
    check(figure, DOUBLE if len(titles) > 1 else SINGLE)
    assert titles == (["teachers", "S1", "S2"] if methods == METHODS else ["S1"])
    line = figure.axes[0].lines[0]
    assert line.get_xdata() == pytest.approx(100 / 12 * np.arange(1, 13))
    assert line.get_ydata() == pytest.approx(1.5 / np.arange(1, 13))  # mean of the runs' 1 / epoch and 2 / epoch
    assert to_hex(line.get_color()).upper() == method_styles(history)[methods[0]]["color"].upper()
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1 / 12, 2))  # from the lowest to the highest run


def diagnostics(method="KD(T1, S1)", kinds=None, terms=TERMS, epochs=12, runs=2):
    kinds, rows = kinds or ("share", "cosine", "infonce_over_chance", "projector_change"), []
    for kind, term, run, epoch in itertools.product(kinds, terms, range(runs), range(1, epochs + 1)):
        row = identity(method) | dict(run=f"{method}-{run}", epoch=epoch, name=f"{kind}/{term}")
        rows.append(row | dict(value=(1 + run) / epoch + terms.index(term)))
    return pd.concat([pd.DataFrame(rows), trainings([method], epochs, runs)])


def test_each_loss_is_compared_with_itself_and_a_shuffled_teacher_alone():
    """KL twice, balanced and of the tuned weight: only the former has a shuffled control."""
    kinds = [distilled(loss, recipe=loss) for loss in ("kl", "sp")]
    shuffled = [
        row | dict(method=f"{row['method']}, shuffled", role="control", control="shuffled_teacher") for row in kinds
    ]
    about = [*kinds, distilled("kl", recipe="predictions", method="tuned"), *shuffled, identity("S1 (50 %)")]
    cases = pd.concat([tidy({row["method"]: np.linspace(0.6, 0.9, 8)}).assign(**row) for row in about])
    history = pd.DataFrame(about).assign(run=range(len(about)), epoch=1, name="val_dice", value=0.8)
    found = gallery.against_shuffled(Results(cases, history, pd.DataFrame(about), NO_EXAMPLES))
    pairs = set(zip(found["a"], found["b"], strict=True))
    assert pairs == {("kl:PMD", "kl:PMD, shuffled"), ("sp:PMD", "sp:PMD, shuffled")}


def test_gradient_diagnostics():
    figure = gradient_diagnostics(diagnostics())
    check(figure, DOUBLE)
    assert [ax.get_title() for ax in figure.axes] == [
        "share of the gradient", "InfoNCE relative to chance", "change of the projectors",
    ]  # fmt: skip
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert len(curves) == len(TERMS) and curves[0].get_ydata() == pytest.approx(1.5 / np.arange(1, 13))
    assert len({line.get_color() for line in curves}) == len({line.get_marker() for line in curves}) == len(TERMS)
    inactive = [[line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"] for ax in figure.axes]
    assert inactive == [[0.0], [1.0], [0.0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == TERMS
    assert figure.get_label().startswith("KD(T1, S1). ") and "n = 2 runs" in figure.get_label()


@pytest.mark.parametrize("kinds", [["infonce_over_chance"], ["share", "projector_change"]])
def test_diagnostics_leave_out_what_was_not_measured(kinds):
    terms = ["segmentation", "PMD", "attention transfer", "region contrast", "affinity of pairs", "E-E"]
    figure = gradient_diagnostics(diagnostics(kinds=kinds, terms=terms, epochs=1, runs=1))
    check(figure, DOUBLE if len(kinds) > 1 else SINGLE)
    assert len(figure.axes) == len(kinds)
    assert [text.get_text() for text in figure.legends[0].get_texts()][:3] == ["segmentation", "E-E", "PMD"]


def test_diagnostics_of_one_method():
    both = pd.concat([diagnostics(), diagnostics("KD(T2, S1)").assign(value=9.0)])
    curve = gradient_diagnostics(both[both["method"] == "KD(T2, S1)"]).axes[0].lines[0]
    assert (curve.get_ydata() == 9).all() and len(curve.get_xdata()) == 12


# ------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("methods, cases", [(METHODS, 24), (METHODS[:3], 1), (["S1"], 4)])
def test_dice_per_method(methods, cases):
    table = results(methods, cases)
    figure = dice_per_method(table)
    check(figure, SINGLE)
    ax = figure.axes[0]
    drawn = [found.get_offsets() for found in ax.collections if isinstance(found, PathCollection)]
    assert [len(found) for found in drawn] == [cases] * len(methods)
    found = summarise(table)
    assert [np.mean(offsets[:, 0]) for offsets in drawn] == pytest.approx(found["mean"].tolist())
    assert points(ax) == pytest.approx(found["mean"].tolist())
    if cases > 1:
        assert bars(ax) == pytest.approx(found[["low", "high"]].to_numpy())
    assert [tick.get_text() for tick in ax.get_yticklabels()] == methods and ax.yaxis_inverted()
    assert ax.get_xlabel() == "Dice"


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
def test_overview(count, cases):
    table = results(["T1", "S1", "S2", "KD(T1, S1)", "KD(T1, S2)", "KD(T2, S1)", "KD(T2, S2)"], cases)
    table.loc[(table["case"] == "case_0") & (table["method"] == "KD(T1, S1)"), "value"] = 0.1
    verdicts = compare(table, PAIRS[:count])
    chosen = {"teacher": "T1", "S1 alone": "S1", "S1 distilled": "KD(T1, S1)"}
    median = choose_cases(table, "KD(T1, S1)").get("median", "case_0")
    figure = overview(table, slices(chosen.values(), [median]), verdicts, chosen, "Phantom (Apache-2.0)")
    check(figure, DOUBLE)
    values = per_patient(table).pivot(index="patient", columns="method", values="value")
    pictures, panels = figure.axes[:4], np.array(figure.axes[4:]).reshape(2, count)
    for ax, (role, method) in zip(pictures[1:], chosen.items(), strict=True):
        seen = table[(table["method"] == method) & (table["case"] == median)]["value"].mean()
        assert ax.get_title() == f"{role}, Dice {seen:.3f}"
    for (top, bottom), (a, b), row in zip(panels.T, PAIRS, verdicts.itertuples(), strict=False):
        *patients, mean = [line for line in top.lines if len(line.get_xdata()) == 2]
        drawn = np.array([line.get_ydata() for line in patients])
        solid = np.array([line.get_linestyle() == "-" for line in patients])
        assert sorted(drawn.tolist()) == sorted(values[[b, a]].to_numpy().tolist())
        assert solid.tolist() == (drawn[:, 1] >= drawn[:, 0]).tolist()
        assert mean.get_ydata() == pytest.approx(values[[b, a]].mean().to_numpy())
        assert points(bottom) == pytest.approx([row.difference])
        words = bottom.get_title().replace("\N{MINUS SIGN}", "-")
        assert f"{row.difference:+.3f}" in words and words.endswith(row.verdict)
        gain = (values[a] - values[b] > 1e-9).sum()
        assert top.get_title() == f"{a}\n{gain} of {cases} gain"
    note = figure.get_label()
    assert f"{count} comparison" in note and "Phantom (Apache-2.0)" in note
    assert ("no adjusted p can fall below" in note) == (cases == 1)


def test_one_step_points_where_a_step_goes():
    truth = np.zeros((2, 8, 8))
    truth[:, 2:5, 2:5] = 1
    figure = step(truth, truth, truth, truth * 0.5, {"segmentation": -truth})
    check(figure, DOUBLE)
    pull = figure.axes[3].images[0].get_array()
    assert (pull[truth[0] == 1] == 1).all() and (pull[truth[0] == 0] == 0).all()


def costs(models=("T1", "T2", "S1", "S2")) -> pd.DataFrame:
    rows = []
    for number, (size, model) in enumerate(itertools.product(("study", "thesis"), models)):
        cost = dict(inference_parameters=10 ** (4 + number % 4), gflops=2.0 ** (number % 4), latency_ms=10.0 + number)
        rows.append(dict(model=model, size=size) | cost)
    return pd.DataFrame(rows)


@pytest.mark.parametrize("methods, thesis", [(METHODS, THESIS_TABLE), (METHODS, None)])
def test_efficiency(methods, thesis):
    table, cost = results(methods), costs()
    figure = efficiency(table, cost, thesis)
    check(figure, DOUBLE)
    means, at = summarise(table), cost[cost["size"] == "study"].set_index("model")
    for ax, (name, unit) in zip(figure.axes, dict(inference_parameters=1e6, latency_ms=1).items(), strict=False):
        drawn = np.array([line.get_xydata()[0] for line in ax.lines])
        assert drawn[:, 1] == pytest.approx(means["mean"].to_numpy())
        assert drawn[:, 0] == pytest.approx((means["model"].map(at[name]) / unit).to_numpy()), "at its true cost"
        assert {text.get_text() for text in ax.texts} == {"T1", "T2", "S1", "S2"}
    assert len(figure.axes) == 2 + (thesis is not None)
    if thesis is not None:
        assert [line.get_ydata()[0] for line in figure.axes[2].lines] == thesis["dice"].tolist()
    note = figure.get_label()
    assert ("thesis" in note.partition("Right: ")[2]) == (thesis is not None) and "1 thread." in note
    assert "T1 and T2, narrower here than in the thesis, are faster than S2" in note, "10 and 11 ms against 13"


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
    assert "intensity" not in figure.get_label()


def test_baselines_by_volume_are_drawn_of_all_folds_and_seeds(tmp_path):
    """A run of its own for every fold and seed, and each method once in the figure."""
    table, known = sized(["T1", "S1", "S1 (50 %)", "S2 (50 %)"], np.arange(50, 58), 2.0)
    runs = table.drop_duplicates("method")
    found = Results(table, table, pd.concat([runs, runs.assign(seed=1)]), NO_EXAMPLES)
    write_csv(tmp_path / "tables" / "00_data_cases.csv", known)
    drawn = gallery.GALLERY["01_failure"].draw(gallery.Saved(found, tmp_path))
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["T1", "S1 (50 %)", "S2 (50 %)"]


def test_failure_by_enhancement():
    table, known = sized(["T1", "S1 (50 %)"], np.arange(50, 62), [3.0, 5.0] * 6)
    known["spleen mean intensity"] = np.linspace(150, 95, 12)
    figure = failure(table, known)
    check(figure, DOUBLE)
    assert len(figure.axes) == 3 and "HU" in figure.axes[2].get_xlabel()
    assert "with mean intensity, 95 % interval and p: T1 \N{MINUS SIGN}1.00" in figure.get_label()
    outlier = table.assign(value=table["value"].mask(table["metric"].eq("dice") & table["case"].eq("case_5"), 0.0))
    bars = [path.vertices[:, 1] for ax in failure(outlier, known).axes for group in ax.collections
            if isinstance(group, LineCollection) for path in group.get_paths()]  # fmt: skip
    assert bars and min(map(min, bars)) >= 0 and max(map(max, bars)) <= 1, "no interval beyond what a Dice can be"
    edges = [line.get_xdata()[0] for line in figure.axes[2].lines if line.get_linestyle() == ":"]
    assert edges == pytest.approx([112.5, 132.5]), "half way between two thirds"


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
            row = identity(method) | dict(patient=case, case=f"case_{case}", bin=index, accuracy=accuracy)
            rows.append(row | {"confidence": confidence if count else np.nan, "count": count, "class": "spleen"})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("methods, cases, empty", [(["S1 (50 %)", "KD(T1, S1)", "T1"], 6, ()), (["S1"], 1, (0, 7))])
def test_reliability(methods, cases, empty):
    figure = reliability(binned(methods, cases, empty=empty))
    check(figure, SINGLE)
    curve, shares = figure.axes
    lines = [line for line in curve.lines if line.get_label() in methods]
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.partition(": error ")[0] for text in said] == methods
    assert len(lines) == len(methods)
    for line in lines:
        x, y = line.get_data()
        assert len(x) == 15 - len(empty) and y == pytest.approx(x**2, abs=0.06)
    assert f"patients (n = {cases} patient" in figure.get_label()
    assert (curve.get_ylabel(), shares.get_xlabel()) == ("observed frequency", "predicted probability")
    assert len(curve.collections) == (len(methods) if cases > 1 else 0)  # one case has no band


def test_reliability_weighs_cases_alike():
    # a large case that is right in half of its pixels, a small one always; classes and seeds share a case's weight
    part = dict(method="S1", bin=0, confidence=0.5)
    large = part | {"case": "a", "class": "spleen", "accuracy": 0.5, "count": 10_000}
    small = [part | {"case": "b", "class": name, "accuracy": 1.0, "count": 10} for name in ("spleen", "liver")]
    absent = part | {"case": "c", "class": "liver", "accuracy": np.nan, "confidence": np.nan, "count": 0}
    found = reliability(pd.DataFrame([large, *small, absent]).assign(patient=["p", "q", "q", "q"]))
    assert found.axes[0].lines[1].get_ydata() == pytest.approx([0.75])
    assert "n = 2 patients with 3 volumes" in found.get_label()


CLOSE = ["agreement", "band_agreement", "error_overlap"]


def closeness(methods, metrics, cases=6) -> pd.DataFrame:
    generator, rows = np.random.default_rng(0), []
    for method, metric, case, seed in itertools.product(methods, metrics, range(cases), range(2)):
        row = identity(method) | dict(metric=metric, patient=case, case=f"case_{case}", seed=seed)
        rows.append(row | dict(value=generator.uniform(0.3, 0.9)))
    return pd.DataFrame(rows)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_teacher_agreement(count):
    methods, metrics = ["S1 (50 %)", "KD(T1, S1)"], CLOSE[:count]
    table = closeness(methods, metrics)
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


MANY = [ALONE, *(distilled("sp", f"term {number}") for number in range(19)), identity("shuffled teacher")]


def family(methods, cases=12):
    table = results(methods, cases)
    alone = table["method"].iloc[0]
    return table, compare(table, [(name, alone) for name in table["method"].unique() if name != alone])


@pytest.mark.parametrize("subsets", [SUBSETS, ["B-B"]])
def test_forest_of_subsets(subsets):
    table, verdicts = family([ALONE, *(distilled("supcon", terms) for terms in subsets)])
    terms = dict(zip(table["method"], table["terms"], strict=True))
    figure = forest(verdicts, terms=terms)
    check(figure, DOUBLE)
    dots, main = figure.axes
    order = verdicts.sort_values("difference", ascending=False, kind="stable")
    assert points(main) == pytest.approx(order["difference"].tolist()), "the best first"
    assert bars(main) == pytest.approx(order[["low", "high"]].to_numpy())
    assert filled(main) == (order["verdict"] != "inconclusive").tolist()
    dark = [line.get_xydata().astype(int).tolist() for line in dots.lines]
    assert [[TERMS[x] for x, _ in line] for line in dark] == [
        [term for term in TERMS if term in terms[name].split("+")] for name in order["a"]
    ]
    counted = "1 comparison." if len(subsets) == 1 else f"{len(subsets)} comparisons."
    assert f"Holm's correction for {counted}" in figure.get_label()


@pytest.mark.parametrize("methods, cases, shares", [(MANY, 12, True), (MANY[:3], 1, False)])
def test_forest_with_ranks(methods, cases, shares):
    table, verdicts = family(methods, cases)
    found = ranks(table, resamples=100, reference=ALONE["method"])
    figure = forest(verdicts, ranks=found, shares=shares)
    check(figure, DOUBLE)
    order = verdicts.sort_values("difference", ascending=False, kind="stable")["a"]
    rows = found.set_index("method").loc[order]
    assert points(figure.axes[0]) == rows["rank"].tolist()
    assert figure.axes[0].get_xticks()[0] == 1, "ranks begin at 1"
    texts = [text.get_text() for text in figure.axes[-1].texts]
    shown = [f"{100 * value:.0f}" for row in rows.itertuples() for value in (row.first, row.beats)]
    assert texts == (shown if shares else [])
    assert ("no adjusted p can fall below" in figure.get_label()) == (cases == 1)


def test_forest_of_several_references():
    table = results(["S1", "S2", "KD(T1, S1)", "KD(T1, S2)"], 8)
    figure = forest(compare(table, baseline_pairs(table.assign(fraction=0.5))))
    names = {tick.get_text() for tick in figure.axes[0].get_yticklabels()}
    assert names == {"KD(T1, S1) \N{MINUS SIGN} S1", "KD(T1, S2) \N{MINUS SIGN} S2"}


def test_methods_that_collapsed_lie_beyond_a_break():
    methods = [ALONE, distilled("kl"), distilled("fitnet", "E-E"), identity("shuffled teacher")]
    table = results(methods, cases=8)
    table["value"] = 0.8 + 0.001 * table["value"] - 0.4 * (table["role"] == "control")
    verdicts = compare(table, [(name, ALONE["method"]) for name in table["method"].unique()[1:]])
    verdicts.loc[0, "verdict"] = "not converged"  # of `sentences.withhold`: not decided either
    figure = forest(verdicts)
    check(figure, DOUBLE)
    left, main = figure.axes
    assert left.lines[0].get_xdata()[0] == pytest.approx(-0.4, abs=0.01) and left.get_xlim()[1] < main.get_xlim()[0]
    assert len(points(main)) == 2 and max(map(abs, main.get_xlim())) < 0.05 and filled(main)[-1] is False
    assert "beyond" in figure.get_label() or "break" in figure.get_label()
    assert "not converged" in [text.get_text() for text in figure.legends[0].get_texts()]


def organs(pairs=(("S1", "T1"), ("E1", "T1"))) -> pd.DataFrame:
    volumes = {"liver": 1769.8, "esophagus": 17.2, "left adrenal gland": 5.05}
    rows = []
    for (number, (name, ml)), (student, teacher) in itertools.product(enumerate(volumes.items()), pairs):
        change, verdict = 0.02 - 0.03 * number, ("better", "inconclusive", "worse")[number]
        rows.append({"class": name} | dict(
            volume=ml, student=student, teacher=teacher, dice_alone=0.9 - 0.2 * number, dice_teacher=0.95, n=24,
            difference=change, low=change - 0.01 - 0.05 * (student == "E1"), high=change + 0.01, verdict=verdict,
            interval="t", smallest_p=1e-6,
        ))  # fmt: skip
    return pd.DataFrame(rows)


def test_every_class_has_its_row_in_the_panel_of_every_student_on_one_scale():
    figure = by_class(organs())
    check(figure, DOUBLE)
    mains, sides = figure.axes[::2], figure.axes[1::2]
    assert [ax.get_title() for ax in mains] == ["S1 from T1", "E1 from T1"]
    assert mains[0].get_xlim() == mains[1].get_xlim()
    names = [tick.get_text() for tick in mains[0].get_yticklabels()]
    assert names == ["liver (1,770 ml)", "esophagus (17 ml)", "left adrenal gland (5.0 ml)"]
    for ax, side in zip(mains, sides, strict=True):
        assert points(ax) == pytest.approx([0.02, -0.01, -0.04])
        assert [text.get_text() for text in side.texts] == ["0.90", "0.95", "0.70", "0.95", "0.50", "0.95"]
    assert "6 comparisons" in figure.get_label() and mains[0].get_ylim()[0] > mains[0].get_ylim()[1]
    many = by_class(organs([(student, teacher) for teacher in ("T1", "T2") for student in ("S1", "S2", "E1")]))
    check(many, DOUBLE)
    assert len(many.axes) == 12


def stages(count=9, n=24) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = []
    for number in range(count):
        for reference, gap in (("no distillation", 0.05), ("zero-weight control", -0.01 * number)):
            row = dict(stage=f"stage {number}, one optimiser for all", label_b=reference, n=n, dice=0.6 + 0.02 * number)
            verdict = "better" if gap > 0.04 else "inconclusive"
            rows.append(row | dict(difference=gap, low=gap - 0.01, high=gap + 0.01, verdict=verdict, smallest_p=0.01))
    low = np.nan if n == 1 else 0.1
    return pd.DataFrame(rows), pd.DataFrame([dict(difference=0.2, low=low, high=0.3, verdict="better")])


@pytest.mark.parametrize("n", [24, 1])
def test_cumulative_correction_is_two_lines_and_the_gap(n):
    gains, changes = stages(n=n)
    figure = cumulative_correction(gains, changes)
    check(figure, DOUBLE)
    for ax, (reference, rows) in zip(figure.axes, gains.groupby("label_b", sort=False), strict=True):
        other, own = [line.get_xdata() for line in ax.lines]
        assert ax.get_title() == f"against {reference}" and own == pytest.approx(rows["dice"].to_numpy())
        assert own - other == pytest.approx(rows["difference"].to_numpy())
        texts = [text.get_text().replace("\N{MINUS SIGN}", "-") for text in ax.texts]
        assert texts == [f"{gap:+.3f}" for gap in rows["difference"]]
    assert ("from start to end" in figure.get_label()) == (n > 1)


def test_single_faults_are_points_that_no_line_joins():
    gains, changes = stages(3)
    names = ["corrected", "byte image", "pooled dice"]
    gains["stage"] = gains["stage"].map(dict(zip(gains["stage"].unique(), names, strict=True)))
    figure = cumulative_correction(gains, changes)
    check(figure, DOUBLE)
    assert {line.get_linestyle() for ax in figure.axes for line in ax.lines} == {"None"}
    assert "with each fault alone put back" in figure.get_label() and "start to end" not in figure.get_label()


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
    table = results(ROLES.values(), 3).replace({"case": {"case_0": "a", "case_1": "b", "case_2": "c"}})
    figure = qualitative(examples, ROLES, cases, table)
    check(figure, DOUBLE)
    axes = np.array(figure.axes).reshape(3, 4)
    assert [ax.get_title() for ax in axes[0]] == [
        "slice", "teacher\nT1", "student\nS1 (50 %)", "distilled student\nKD(T1, S1)",
    ]  # fmt: skip
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["best\na", "median\nb", "worst\nc"]
    seen = table[(table["method"] == "T1") & (table["case"] == "a")]["value"].mean()
    assert axes[0, 1].get_xlabel() == f"Dice {seen:.3f}", "of the volume"
    # contours, no fills: the student's lies one pixel below the truth's
    assert all(len(ax.images) == 1 for ax in axes.flat)
    truth, drawn = (contour.get_paths()[0].vertices for contour in axes[0, 2].collections)
    assert drawn[:, 1].mean() - truth[:, 1].mean() == pytest.approx(1, abs=0.1)


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
    table = results(["S1"], 1).replace({"case": {"case_0": "a"}})
    check(qualitative(examples, {"student": "S1"}, {"only": "a"}, table), DOUBLE)


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
    others = [table.assign(model="E1", method="E1 " + table["method"]) for table in tables[1:]]
    figure = along(pd.concat([*tables, *others], ignore_index=True), axis)
    check(figure, DOUBLE)
    assert [ax.get_title() for ax in figure.axes] == ["S1", "E1"]
    assert all({line.get_label() for line in ax.containers} == set(ways) for ax in figure.axes)


# ------------------------------------------------------------------------------------------------------------ refusals


def two_methods():
    return pd.concat([diagnostics(epochs=2), diagnostics("KD(T2, S1)", epochs=2)])


def test_tables_without_what_is_drawn_are_refused():
    nothing = pd.DataFrame()
    refused = [
        *((draw, (table,), message) for draw in (learning_curves, gradient_diagnostics)
          for table, message in ((nothing, "no run, method"), (trainings().iloc[:0], "no rows"))),
        (learning_curves, (trainings(["S1"]).query("name == 'loss'"),), "no val_dice"),
        (gradient_diagnostics, (two_methods(),), r"several methods; give .* of one of KD\(T1, S1\), KD\(T2, S1\)"),
        (gradient_diagnostics, (trainings(["KD(T1, S1)"]),), "no share/<term>, infonce_over_chance/<term>"),
        (choose_cases, (results(["S1"]), "T1"), "no method 'T1'"),
        (efficiency, (results(["S1", "T1"]), costs(["S1"])), "no cost of T1 in size study"),
        (efficiency, (results(["S1", "T1"]), costs().drop(columns="latency_ms")), "no latency_ms in the table"),
        (teacher_agreement, (pd.DataFrame(columns=["metric", "case"]),), "no method, patient, value"),
        (teacher_agreement, (closeness(["S1"], ["agreement"]).assign(value=np.nan),), "no defined value"),
        (reliability, (binned(["S1"], 1, 2, empty=(0, 1)),), "'S1' has no pixel"),
        (reliability, (binned(["S1"]).drop(columns="method"),), "no method"),
        (forest, (family(MANY[:2])[1].iloc[:0],), "no rows"),
        (forest, (family(MANY[:2])[1], None, {MANY[1]["method"]: "scales"}), "are not all of E-E"),
        (by_class, (organs().drop(columns="volume"),), "no volume"),
        (cumulative_correction, (stages()[0].drop(columns="verdict"), stages()[1]), "no verdict"),
        (qualitative, (slices(["S1"], "a"), {"teacher": "T1"}, {"best": "a"}, nothing), "no example slice of method"),
        (qualitative, (slices(["S1"], "a"), {"student": "S1"}, {}, nothing), "at least one"),
        (along, (results(["S1"]), "width"), "axis 'width' does not exist"),
        *((dice_per_method, (table,), ".")
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
        (overview, (table, table, verdicts.iloc[:0], {}), "no rows"),
        (failure, (known, thick.iloc[:1]), "no thickness of cases case_1"),
        (failure, (known, thick.drop(columns="thickness (mm)")), "run notebook 00 again"),
        (failure, (known, thick, ["T1"]), "no method T1"),
        (failure, (known.assign(value=known["value"].where(known["metric"] == "dice", 0)), thick), "no patient with"),
    ]:
        with pytest.raises(InputError, match=message):
            draw(*given)
