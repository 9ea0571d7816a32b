"""One function a figure: tidy tables in, a matplotlib Figure out, in one style and at printed size.

Colours, markers and line styles belong to a method (arm) and are the same in every figure; markers and line styles
differ too, so that figures can be read in grey. Every figure carries a note on n and its intervals as its label, which
`save_figure` writes after the caption.
"""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from kdlib.config import LOSS_NAMES, InputError
from kdlib.metrics import METRICS
from kdlib.statistics import THESIS_TABLE, interval, per_patient, rows_of, summarise

MM = 1 / 25.4
SINGLE, DOUBLE = 85 * MM, 175 * MM  # column widths in inches
STYLE = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4.5, "figure.constrained_layout.use": True,
    "savefig.dpi": 300, "pdf.fonttype": 42, "ps.fonttype": 42,
}  # fmt: skip
# Okabe & Ito's colours for the colour-blind, and shades of them: teachers grey, S1 blue, S2 green, distilled warm
METHOD_COLOURS = {
    "T1": "#000000", "T2": "#7F7F7F", "S1": "#0072B2", "S1 (50 %)": "#56B4E9", "S2": "#00664B", "S2 (50 %)": "#2FBF97",
    "KD(T1, S1)": "#E69F00", "KD(T1, S2)": "#D55E00", "KD(T2, S1)": "#CC79A7", "KD(T2, S2)": "#882255",
}  # fmt: skip
METHOD_MARKERS = dict(zip(METHOD_COLOURS, "sDod^vPX*p", strict=True))
OTHER_COLOURS = ("#332288", "#999933", "#AA4499", "#44AA99", "#661100", "#6699CC")
FAMILIES = {  # of distillers -> (names in kdlib.config.LOSS_NAMES, colour, marker)
    "predictions": (("kl", "softmax_kl", "dkd", "dist", "cwd", "boundary_kl"), "#0072B2", "s"),
    "features": (("mse", "at", "feature_cwd", "reviewkd", "importance", "affinity"), "#D55E00", "D"),
    "relations": (("sp", "skd", "ifvd", "cirkd"), "#009E73", "^"),
    "contrast": (("infonce", "labelled", "prototype", "crd"), "#CC79A7", "P"),
}  # fmt: skip
FAMILY_OF = {LOSS_NAMES[loss]: family for family, (losses, *_) in FAMILIES.items() for loss in losses}
LINES = {"T": "-", "S": "--", "K": "-."}
BARE = {"linestyle": ""}
TERMS = ("E-E", "B-B", "D-D", "PMD")
CONTROLS = (  # arms that a distiller must beat
    "no distillation", "all weights 0", "random teacher", "shuffled teacher", "frozen projectors", "redrawn projectors",
    "label smoothing", "both budgets", "self-teacher",
)  # fmt: skip
FAMILY_STYLES = {family: style for family, (_, *style) in FAMILIES.items()}
FAMILY_STYLES |= {"thesis terms": ("#E69F00", "X"), "controls": ("#7F7F7F", "o")}
ERRORS = (("#56B4E9", "missed"), ("#D55E00", "too much"), ("#CC79A7", "wrong class"))
OUTLINES = (("-", "truth"), ("--", "prediction"))
VERDICTS = {"better": "#0072B2", "inconclusive": "#999999", "worse": "#D55E00", "": "#444444"}
FIDELITY = {  # metric of kdlib.fidelity -> print
    "agreement": "Dice with the teacher", "band_agreement": "agreement at the boundary",
    "error_overlap": "Dice of both's errors", "cka": "CKA with the teacher", "ece": "calibration error",
}  # fmt: skip
LIVENESS = {  # kind of row in a history -> (title, value that would mean nothing is learnt)
    "share": ("share of the gradient", None), "cosine": ("cosine from step to step", 0.0),
    "chance": ("loss relative to chance", 1.0), "moved": ("movement of the projectors", None),
}  # fmt: skip
TERM_COLOURS = dict(zip(("segmentation", *TERMS), ("#7F7F7F", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))


def method_style(arm: str) -> dict[str, str]:
    """Colour, marker and line style of a method: a distiller has its family's, the thesis's terms are orange, controls
    grey, and an unknown method always gets the same of a reserve."""
    family = _family(arm)
    if family:
        return dict(zip(("color", "marker"), FAMILY_STYLES[family], strict=True)) | {"linestyle": ":"}
    other = OTHER_COLOURS[zlib.crc32(arm.encode()) % len(OTHER_COLOURS)]
    colour, marker = METHOD_COLOURS.get(arm, other), METHOD_MARKERS.get(arm, "h")
    return dict(color=colour, marker=marker, linestyle=LINES.get(arm[:1], ":"))


def _family(arm: str) -> str:
    """Which family a distiller or control is of; "" for other arms."""
    if arm in CONTROLS or arm.endswith(", shuffled"):
        return "controls"
    return "thesis terms" if arm.startswith("thesis terms") else FAMILY_OF.get(arm, "")


@plt.rc_context(STYLE)
def training_curves(history: pd.DataFrame, names: Sequence[str] | None = None) -> Figure:
    """Losses and validation Dice against the epoch: a line an arm (mean of its runs), a band from least to most.

    Args:
        history: tidy, columns run, arm, epoch, name, value.
        names: panels, by `name`; by default everything but learning rate and gradients.

    Raises:
        InputError: a column or a name is missing, or an arm mixes recipes.
    """
    absent = [column for column in ("run", "arm", "epoch", "name", "value") if column not in history]
    if absent or history.empty:
        raise InputError(f"history of trainings: no {', '.join(absent) or 'rows'}; give `Results.history`")
    if "recipe" in history and history.groupby("arm")["recipe"].nunique().max() > 1:
        raise InputError("history of trainings: an arm has several recipes; filter by recipe")
    known = list(history["name"].unique())
    names = [name for name in known if name != "lr" and "/" not in name] if names is None else list(names)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"history has no {', '.join(unknown) or 'losses'}: it has {', '.join(known)}")
    names.sort(key="val_dice".__ne__)  # validation first, the rest as they come
    titles = {"val_dice": "validation Dice", "loss": "total loss", "lr": "learning rate"}
    columns, arms = min(3, len(names)), list(history["arm"].unique())
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(DOUBLE, (41 * rows + 12) * MM), squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        for arm in arms:
            chosen = history[(history["arm"] == arm) & (history["name"] == name)]
            curve = chosen.groupby("epoch")["value"].agg(["mean", "min", "max"])
            style = method_style(arm)
            ax.plot(curve.index, curve["mean"], **style, markevery=max(1, len(curve) // 6), markersize=3)
            ax.fill_between(curve.index, curve["min"], curve["max"], color=style["color"], alpha=0.15, linewidth=0)
        ax.set_title(titles.get(name, name.replace("grad/", "gradient of ") if "/" in name else f"{name} loss"))
        ax.set_xlabel("epoch")
        ax.tick_params(labelsize=7)
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes.flat[len(names) :]:
        ax.remove()
    _legend(figure, [Line2D([], [], label=arm, **method_style(arm)) for arm in arms], columns=5, handlelength=3)
    runs = history.groupby("arm")["run"].nunique()
    figure.set_label(f"Lines: mean of the runs of an arm ({_n(runs)}); bands: from the lowest to the highest run.")
    return figure


@plt.rc_context(STYLE)
def dice_per_method(table: pd.DataFrame, metric: str = "dice") -> Figure:
    """Every patient's value for each arm, with mean and interval.

    Raises:
        InputError: see `kdlib.statistics.per_patient`.
    """
    values, means = per_patient(table, metric), summarise(table, metric=metric)
    figure, ax = plt.subplots(figsize=(SINGLE, (7 * len(means) + 16) * MM))
    for y, row in enumerate(means.itertuples()):
        _strip(ax, y, values.loc[values["arm"] == row.arm, "value"], row, method_style(row.arm))
    _rows(ax, means["arm"], metric)
    figure.set_label(f"Small points: patients, seeds averaged; large ones: {_interval(means)}.")
    return figure


def choose_cases(table: pd.DataFrame, arm: str) -> dict[str, str]:
    """The cases of an arm's best, median and worst Dice: rule -> case; two cases have no median, one is the best.

    Raises:
        InputError: the arm has no Dice in the table; see also `kdlib.statistics.per_patient`.
    """
    values = per_patient(table, "dice", ["arm", "case"]).dropna()
    order = list(values[values["arm"] == arm].sort_values("value", kind="stable")["case"])
    if not order:
        raise InputError(f"no arm {arm!r} in the table: it has {', '.join(table['arm'].unique())}")
    chosen = {"best": order[-1], "median": order[(len(order) - 1) // 2], "worst": order[0]}
    rules = {1: ["best"], 2: ["best", "worst"]}.get(len(order), chosen)
    return {rule: chosen[rule] for rule in rules}


@plt.rc_context(STYLE)
def qualitative(examples: pd.DataFrame, arms: Mapping[str, str], cases: Mapping[str, str]) -> Figure:
    """The slice with most truth of chosen cases: input, truth, and each arm's contours and errors.

    Args:
        examples: `Results.examples`: columns arm, case, seed, and image, truth, prediction (HW arrays); the lowest
            seed of an arm is shown.
        arms: role -> arm, e.g. {"teacher": "T1", "student": "S1 (50 %)", "distilled student": "KD(T1, S1)"}.
        cases: rule -> case, from `choose_cases`.

    Raises:
        InputError: no example of an arm and case, or several recipes of the arm.
    """
    if not arms or not cases:
        raise InputError("qualitative figure: give at least one arm and one case")
    side = DOUBLE / (len(arms) + 2)
    size = (DOUBLE, side * len(cases) + 16 * MM)
    figure, axes = plt.subplots(len(cases), len(arms) + 2, figsize=size, squeeze=False)
    confused = False
    for line, (rule, case) in zip(axes, cases.items(), strict=True):
        shown = [_example(examples, arm, case) for arm in arms.values()]
        image, truth = shown[0]["image"], shown[0]["truth"]
        confused |= truth.max() > 1
        rows, columns = _crop(np.any([truth > 0, *(example["prediction"] > 0 for example in shown)], axis=0))
        line[0].imshow(image, cmap="gray", vmin=0, vmax=255)
        corner, side = (columns.start - 0.5, rows.start - 0.5), rows.stop - rows.start
        line[0].add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=0.6))
        line[0].set_ylabel(f"{rule}\n{case}")
        for ax, prediction in zip(line[1:], [None, *(example["prediction"] for example in shown)], strict=True):
            ax.imshow(image[rows, columns], cmap="gray", vmin=0, vmax=255)
            _contours(ax, truth[rows, columns], "white", "solid")
            if prediction is not None:
                _errors(ax, truth[rows, columns], prediction[rows, columns])
                total = (prediction > 0).sum() + (truth > 0).sum()
                dice = 2 * ((prediction == truth) & (truth > 0)).sum() / total if total else 1.0
                ax.set_xlabel(f"slice Dice {dice:.2f}", labelpad=2)
    for ax, title in zip(axes[0], ["input", "truth", *(f"{role}\n{arm}" for role, arm in arms.items())], strict=True):
        ax.set_title(title)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    lines = [Line2D([], [], color="#AAAAAA", linestyle=style, label=label) for style, label in OUTLINES]
    patches = [Patch(color=colour, label=label) for colour, label in ERRORS[: 3 if confused else 2]]
    _legend(figure, [*lines, *patches], columns=5)
    figure.set_label(f"Slices with the largest true area of n = {len(cases)} cases; box: the part shown beside it.")
    return figure


@plt.rc_context(STYLE)
def slice_montage(images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    """Slices side by side with their labels outlined; images and labels are uint8 NHW, one name a slice."""
    columns = min(6, len(names))
    rows = -(-len(names) // columns)
    side = DOUBLE / columns
    figure, axes = plt.subplots(rows, columns, figsize=(DOUBLE, rows * (side + 4 * MM)), squeeze=False)
    for ax, image, label, name in zip(axes.flat, images, labels, names, strict=False):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        _contours(ax, label, "#E69F00", "solid")
        ax.set_title(name, fontsize=7)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.set_label("One slice a case, the one with the most target, which is outlined.")
    return figure


@plt.rc_context(STYLE)
def ablation(table: pd.DataFrame, metric: str = "dice") -> Figure:
    """Each subset of distillation terms: which terms were on, and mean and interval, best first.

    Args:
        table: tidy, of one student and one teacher, and the student's baseline if there is one (a dotted line).

    Raises:
        InputError: a recipe that is no subset of the terms, two of the same subset (filter by loss), several students,
            teachers or label fractions.
    """
    rows = rows_of(table, metric, ["recipe", "arm"])
    subsets = {name: set(name.split(" (")[0].split("+")) - {"baseline"} for name in rows["recipe"].unique()}
    for recipe, terms in subsets.items():
        if not terms <= set(TERMS):
            raise InputError(f"ablation: recipe {recipe!r} is no subset of {', '.join(TERMS)}; filter the table")
        if list(subsets.values()).count(terms) > 1:
            raise InputError(f"ablation: {recipe!r} has the terms of another recipe; filter the table by loss")
    arms = rows.drop_duplicates(["recipe", "arm"]).set_index("recipe")["arm"]
    if not arms.index.is_unique:
        raise InputError(f"ablation: recipes were run for several of {', '.join(set(arms))}; filter the table by arm")
    means = summarise(table, ["recipe"], metric)
    means = means.sort_values("mean", ascending=not METRICS[metric].higher, kind="stable").reset_index(drop=True)
    size = (SINGLE, (4.6 * len(means) + 18) * MM)
    figure, (dots, forest) = plt.subplots(1, 2, figsize=size, sharey=True, width_ratios=[1, 2])
    for y, row in enumerate(means.itertuples()):
        for x, term in enumerate(TERMS):
            on = term in subsets[row.recipe]
            dots.scatter(x, y, s=22 if on else 5, color="black" if on else "#BBBBBB")
        style = method_style(arms[row.recipe])
        _mean(forest, y, row, style)
        if row.recipe == "baseline":
            forest.axvline(row.mean, color=style["color"], linestyle=":", linewidth=0.8, zorder=0)
    _rows(forest, [""] * len(means), metric)
    dots.set(xticks=range(4), xlim=(-0.6, 3.6))
    dots.set_xticklabels(TERMS, rotation=90)
    dots.tick_params(length=0, labelsize=7, labelleft=False)
    dots.spines[:].set_visible(False)
    _legend(figure, [Line2D([], [], label=arm, **method_style(arm) | BARE) for arm in arms.unique()], columns=3)
    figure.set_label(f"Dark dots: terms that were on. Points and bars: {_interval(means)}.")
    return figure


@plt.rc_context(STYLE)
def dice_against_parameters(
    table: pd.DataFrame, params: Mapping[str, int], thesis: pd.DataFrame | None = THESIS_TABLE
) -> Figure:
    """Dice against the number of parameters; the thesis's own numbers as hollow markers.

    Arms of equal size are set apart sideways, those of the thesis to the left.

    Args:
        table: tidy.
        params: arm -> number of parameters.
        thesis: columns dice and params (millions) by arm; None leaves it out.

    Raises:
        InputError: an arm without a number of parameters.
    """
    means = summarise(table)
    missing = [arm for arm in means["arm"] if arm not in params]
    if missing:
        raise InputError(f"no number of parameters for {', '.join(missing)}: give it in `params`")
    apart = 1.2  # factor between arms of equal size
    figure, ax = plt.subplots(figsize=(SINGLE, 95 * MM))
    for row, step in zip(means.itertuples(), means.groupby(means["arm"].map(params)).cumcount(), strict=True):
        x = params[row.arm] / 1e6 * apart**step
        ax.errorbar(x, row.mean, yerr=_bar(row), elinewidth=1, label=row.arm, **method_style(row.arm) | BARE)
    note = ""
    if thesis is not None:
        note = " Hollow: the thesis's single runs, pixels of its test set pooled."
        hollow = BARE | {"markerfacecolor": "none"}
        for row, step in zip(thesis.itertuples(), thesis.groupby("params").cumcount() + 1, strict=True):
            ax.plot(row.params / apart**step, row.dice, **method_style(row.Index) | hollow)
        ax.plot([], [], color="#555555", marker="o", label="hollow: thesis", **hollow)
    ax.set(xscale="log", xlabel="parameters (millions)", ylabel="Dice")
    ax.tick_params(labelsize=7)
    ax.xaxis.set_major_formatter("{x:g}")
    _legend(figure, ax.get_legend_handles_labels()[0], columns=3)
    figure.set_label(f"Points and bars: {_interval(means)}; arms of equal size stand side by side.{note}")
    return figure


@plt.rc_context(STYLE)
def ranking(
    ranks: pd.DataFrame, reference: str | None = None, verdicts: pd.DataFrame | None = None, metric: str = "dice"
) -> Figure:
    """Every arm's rank with its interval, best first, and beside it the paired difference to a reference.

    Args:
        ranks: from `kdlib.statistics.ranks`; its first column names the arms.
        reference: arm that the others are held against; its row is shaded.
        verdicts: from `kdlib.statistics.compare`, the rows with b = `reference`; filled points are decided, hollow
            ones inconclusive. None leaves the second panel out.
        metric: that both tables are of.

    Raises:
        InputError: no rows, a reference that is not ranked or not given, or no comparison with it.
    """
    _columns(ranks, ["n", "mean", "rank", "rank_low", "rank_high"], "ranks", "kdlib.statistics.ranks")
    names = list(ranks.sort_values(["rank", "mean"], kind="stable").iloc[:, 0])
    rows = ranks.set_index(ranks.columns[0]).loc[names]
    if reference is not None and reference not in names:
        raise InputError(f"ranking: no reference {reference!r} among {', '.join(names)}")
    differences = None
    if verdicts is not None:
        _columns(verdicts, ["a", "b", "n", "difference", "low", "high", "verdict"], "verdicts", "statistics.compare")
        differences = verdicts[verdicts["b"] == reference].set_index("a")
        if not differences.index.intersection(names).size:
            raise InputError(f"ranking: no comparison with the reference {reference!r} in the verdicts; give both")
    label, unit, higher = METRICS[metric]
    families = {_family(name): method_style(name) for name in names}
    size = (DOUBLE, (4.4 * len(names) + 28) * MM)
    figure, axes = plt.subplots(1, 1 + (differences is not None), figsize=size, sharey=True, squeeze=False)
    cut = np.inf if differences is None else _cut(differences.loc[differences.index.intersection(names)])
    for y, row in enumerate(rows.itertuples()):
        style = dict(method_style(row.Index)) | BARE
        whisker = np.maximum([[row.rank - row.rank_low], [row.rank_high - row.rank]], 0)
        axes[0, 0].errorbar(row.rank, y, xerr=whisker, elinewidth=1.4, **style)
        if differences is not None and row.Index in differences.index:
            found = differences.loc[row.Index]
            hollow = {"markerfacecolor": "white"} if found["verdict"] == "inconclusive" else {}
            if abs(found["difference"]) > cut:  # named at the edge: one far outlier must not flatten all others
                side = np.sign(found["difference"])
                text = f"{found['difference']:+.2f}".replace("-", "\N{MINUS SIGN}")
                text = f"{text} \N{RIGHTWARDS ARROW}" if side > 0 else f"\N{LEFTWARDS ARROW} {text}"
                where = dict(ha="right" if side > 0 else "left", va="center", fontsize=7, color=style["color"])
                axes[0, 1].text(side * cut, y, text, **where)
                continue
            whisker = np.maximum([[found["difference"] - found["low"]], [found["high"] - found["difference"]]], 0)
            axes[0, 1].errorbar(found["difference"], y, xerr=whisker, elinewidth=1.4, **style | hollow)
    for ax in axes.flat:
        _rows(ax, [f"{name}  {mean:.3f}" for name, mean in zip(names, rows["mean"], strict=True)], metric)
        ax.set_ylim(len(names) - 0.4, -0.7)
        if reference is not None:
            y = names.index(reference)
            ax.axhspan(y - 0.5, y + 0.5, color="#EEEEEE", linewidth=0, zorder=-1)
    axes[0, 0].set(xlabel=f"rank by mean {label} (1 = best)", xlim=(0.4, 1.03 * len(names) + 0.6))
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    note = (
        f"Beside the names: mean {label} over patients ({_n(rows['n'])}). Left: rank of the mean and 95 % percentile "
    )
    note += "interval over a bootstrap of the patients."
    if differences is not None:
        axes[0, 1].set_xlabel(f"{label} minus that of {reference}" + (f" ({unit})" if unit else ""))
        axes[0, 1].axvline(0, color="black", linewidth=0.6, zorder=1)
        axes[0, 1].xaxis.get_major_locator().set_params(nbins=6)
        axes[0, 1].tick_params(labelleft=False)
        if np.isfinite(cut):
            axes[0, 1].set_xlim(-cut, cut)
        note += f" Right: mean paired difference ({_n(differences['n'])}) and 95 % BCa bootstrap interval, "
        note += f"{'higher' if higher else 'lower'} is better; hollow: inconclusive after Holm's correction."
    if set(families) - {""}:
        known = [family for family in FAMILY_STYLES if family in families]
        handles = [Line2D([], [], label=family, **families[family] | BARE) for family in known]
        _legend(figure, handles, columns=len(handles))
    figure.set_label(note)
    return figure


def _cut(differences: pd.DataFrame) -> float:
    """Where the axis of differences ends: infinite, or what holds all that is not far from the usual."""
    reach = differences[["low", "high"]].abs().max(axis=1).fillna(differences["difference"].abs())
    usual = reach <= 6 * reach.median()
    return np.inf if usual.all() or not reach.median() else 1.25 * reach[usual].max()


@plt.rc_context(STYLE)
def waterfall(table: pd.DataFrame, double: bool = True) -> Figure:
    """The bridge: the mean at its start and at its end, and between them what each step changed.

    Args:
        table: one row a stage in order, columns step (label), dice (mean after the step), difference (to the stage
            before), low, high, verdict and n. The first row is the start; the last the end, whose Dice is that of the
            stage before it, and whose difference, if not NaN, is the whole change from the start (told in the note).
        double: drawn for a page's width, else for a column's.

    Raises:
        InputError: fewer than two rows, a missing column, or differences that do not lead from each mean to the next.
    """
    _columns(table, ["step", "dice", "difference", "low", "high", "verdict", "n"], "bridge", "one row a stage")
    if len(table) < 2:
        raise InputError("bridge: give at least its start and its end")
    rows = list(table.reset_index(drop=True).itertuples())
    last = len(rows) - 1
    for before, row in zip(rows[:-1], rows[1:], strict=True):
        change = 0.0 if row.Index == last else row.difference
        if not abs(row.dice - before.dice - change) < 1e-3:
            found = f"{before.dice:.3f} before, {row.dice:.3f} after, a difference of {change:.3f}"
            advice = "the last row repeats the one before" if row.Index == last else "use the same cases at every stage"
            raise InputError(f"bridge: step {row.step!r} does not add up ({found}); {advice}")
    labels = [textwrap.fill(str(row.step), 42 if double else 20) for row in rows]
    heights = np.array([3.1 * (label.count("\n") + 1) + 3.2 for label in labels])  # mm, as is the y axis
    places = np.cumsum(heights) - heights / 2
    size = (DOUBLE if double else SINGLE, (heights.sum() + 20) * MM)
    figure, ax = plt.subplots(figsize=size)
    reached = [row.dice for row in rows]
    for row in rows[1:last]:
        reached += [row.dice - row.difference + bound for bound in (row.low, row.high)]
    low, high = np.nanmin(reached), np.nanmax(reached)
    span = max(high - low, 0.02)
    edge = max(low - 0.18 * span, 0.0)
    for place, row, above in zip(places, rows, [None, *places], strict=False):
        end = row.Index in (0, last)
        start = edge if end else row.dice - row.difference
        verdict = "" if end else row.verdict
        ax.barh(place, row.dice - start, 4, start, color=VERDICTS[verdict], zorder=2)
        if not end:
            whisker = np.maximum([[row.difference - row.low], [row.high - row.difference]], 0)
            ax.errorbar(row.dice, place, xerr=whisker, color="black", elinewidth=0.9, capsize=2, capthick=0.9, zorder=3)
        right = np.nanmax([row.dice, start, np.nan if end else start + row.high])
        text = f"{row.dice:.3f}" if end else f"{row.difference:+.3f}".replace("-", "\N{MINUS SIGN}")
        ax.annotate(text, (right, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
        if above is not None:
            before = row.dice if end else start
            ax.plot([before, before], [above - 2, place + 2], color="black", linewidth=0.5, zorder=1)
    ax.set_yticks(places, labels)
    ax.set(ylim=(heights.sum(), 0), xlim=(edge, high + (0.14 if double else 0.3) * span), xlabel="Dice")
    ax.xaxis.get_major_locator().set_params(nbins=8 if double else 4)
    ax.tick_params(labelsize=7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.5)
    ax.set_axisbelow(True)
    used = [verdict for verdict in VERDICTS if verdict and verdict in {row.verdict for row in rows[1:last]}]
    if used:
        _legend(figure, [Patch(color=VERDICTS[verdict], label=verdict) for verdict in used], columns=3)
    note = f"Dice of {_n(table['n'])} patients at both ends and its change by each step, with the 95 % bootstrap "
    note += (
        "interval of the paired difference; the mean over patients, or, as long as that fault is kept, that of their "
    )
    note += f"pooled voxels. The axis begins at {edge:.2f}."
    whole = rows[last]
    if pd.notna(whole.low):
        note += f" From start to end: {whole.difference:+.3f} [{whole.low:+.3f}, {whole.high:+.3f}], {whole.verdict}."
    figure.set_label(note)
    return figure


@plt.rc_context(STYLE)
def reliability(table: pd.DataFrame) -> Figure:
    """How often the class is there against the probability it was given, a line an arm, and where the pixels are.

    A case counts by the shares of its own pixels that lie in each bin, so that large organs do not decide the curve.

    Args:
        table: from `kdlib.fidelity.calibration`, with a column arm; seeds and folds of an arm are taken together.

    Raises:
        InputError: a missing column, or no pixel in any bin.
    """
    needed = ["arm", "case", "class", "bin", "confidence", "accuracy", "count"]
    _columns(table, needed, "calibration", "kdlib.fidelity.calibration with a column arm")
    unit = "patient" if "patient" in table else "case"
    bins = int(table["bin"].max()) + 1
    figure, (curve, strip) = plt.subplots(
        2, 1, figsize=(SINGLE, 105 * MM), sharex=True, height_ratios=[3, 1], gridspec_kw={"hspace": 0.04}
    )
    curve.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    counts, lowest = [], 0.1
    for arm, rows in table.groupby("arm", sort=False):
        if not rows["count"].any():
            raise InputError(f"reliability: {arm!r} has no pixel in any bin; are the classes in its cases?")
        shares, sums, sures = _bin_shares(rows, unit, bins)
        counts.append(len(shares))
        style = method_style(arm)
        # patients drawn anew, whole
        generator = np.random.default_rng(0)
        drawn = generator.multinomial(len(shares), np.full(len(shares), 1 / len(shares)), size=1000)
        with np.errstate(invalid="ignore"):  # a bin that no drawn patient fills
            x, y = sures.sum(0) / shares.sum(0), sums.sum(0) / shares.sum(0)
            spread = (drawn @ sums) / (drawn @ shares)
        filled = shares.sum(0) > 0
        band = np.nanquantile(spread[:, filled], [0.025, 0.975], axis=0)
        if len(shares) > 1:
            curve.fill_between(x[filled], *band, color=style["color"], alpha=0.15, linewidth=0)
        curve.plot(x[filled], y[filled], **style, markersize=3.5, label=arm)
        height = np.where(filled, shares.mean(0), np.nan)
        lowest = min(lowest, np.nanmin(height))
        look = dict(color=style["color"], linestyle=style["linestyle"])
        strip.stairs(height, np.linspace(0, 1, bins + 1), baseline=None, **look)
    curve.set(ylabel="share that is the class", ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
    strip.set(xlabel="probability of the class", ylabel="share of\npixels", yscale="log")
    # whole decades, so that two of them at least have a label; no labels between
    strip.set_ylim(10 ** np.floor(np.log10(lowest)), 1)
    strip.yaxis.set_minor_formatter("")
    for ax in (curve, strip):
        ax.tick_params(labelsize=7)
        ax.grid(color="#DDDDDD", linewidth=0.5)
        ax.set_axisbelow(True)
    handles, names = curve.get_legend_handles_labels()
    _legend(figure, handles, columns=_beside(names, SINGLE), handlelength=3)
    figure.set_label(
        f"Lines: mean over patients ({_n(pd.Series(counts))}), each weighted by its pixels' shares in the bins; "
        "bands: 95 % percentile interval over a bootstrap of the patients; dotted: perfect calibration."
    )
    return figure


def _bin_shares(rows: pd.DataFrame, unit: str, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[patients, bins]: share of a patient's pixels in a bin, and that share times accuracy and times confidence.

    Shares are made of each case and class for itself, then averaged over those of a patient.
    """
    keys = [column for column in rows if column not in ("bin", "confidence", "accuracy", "count")]
    total = rows.groupby(keys, sort=False, dropna=False)["count"].transform("sum")
    rows = rows.assign(share=rows["count"] / total)[total > 0].fillna({"accuracy": 0.0, "confidence": 0.0})
    rows = rows.assign(accuracy=rows["share"] * rows["accuracy"], confidence=rows["share"] * rows["confidence"])
    means = rows.groupby([unit, "bin"])[["share", "accuracy", "confidence"]].mean().unstack(fill_value=0.0)
    wide = (means[name].reindex(columns=range(bins), fill_value=0.0) for name in ("share", "accuracy", "confidence"))
    return tuple(part.to_numpy() for part in wide)


@plt.rc_context(STYLE)
def fidelity(table: pd.DataFrame) -> Figure:
    """Closeness to the teacher, a panel a metric, a row an arm: patients, mean and interval.

    Args:
        table: columns arm, metric (of `kdlib.fidelity`, or "cka"), case (or patient) and value; over seeds, classes
            and whatever else a case has several values for, values are averaged within the patient. For CKA, which has
            no cases, give the fold as case.

    Raises:
        InputError: a missing column, or no defined value.
    """
    unit = "patient" if "patient" in table else "case"
    _columns(table, ["arm", "metric", unit, "value"], "fidelity", "kdlib.fidelity.fidelity with a column arm")
    table = table.dropna(subset="value")
    arms, metrics = list(table["arm"].unique()), list(table["metric"].unique())
    metrics.sort(key=lambda name: [*FIDELITY, name].index(name))
    if not metrics:
        raise InputError("fidelity: no defined value in the table")
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    width = DOUBLE if columns > 1 else SINGLE
    size = (width, ((6 * len(arms) + 16) * lines) * MM)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True)
    counts = []
    for ax, metric in zip(axes.flat, metrics, strict=False):
        for y, arm in enumerate(arms):
            chosen = table[(table["arm"] == arm) & (table["metric"] == metric)]
            values = chosen.groupby(unit, sort=False)["value"].mean()
            if len(values):
                row = pd.DataFrame(
                    [dict(mean=values.mean(), **dict(zip(("low", "high"), interval(values), strict=True)))]
                )
                _strip(ax, y, values, next(row.itertuples()), method_style(arm))
                counts.append(len(values))
        _rows(ax, arms, "dice")
        ax.set_ylim(len(arms) - 0.4, -0.7)
        ax.set_xlabel(FIDELITY.get(metric, metric))
        ax.xaxis.get_major_locator().set_params(nbins=4)
    for ax in axes.flat[len(metrics) :]:
        ax.remove()
    means = pd.DataFrame(dict(n=counts))
    figure.set_label(f"Small points: patients, seeds and classes averaged; large ones: {_interval(means)}.")
    return figure


@plt.rc_context(STYLE)
def liveness(history: pd.DataFrame, arm: str | None = None, recipe: str | None = None) -> Figure:
    """Whether each distillation term acts, epoch by epoch: a line a term (mean of the runs), a band from least to most.

    Panels, as far as the history has them: the share of the gradient on the student that comes from the term
    (`share/<term>`), the cosine between the term's gradients of successive steps (`cosine/`), its loss relative to a
    guess among all negatives (`chance/`, InfoNCE over ln N; 1 is chance), and how far its learned
    projectors moved in the epoch, relative to their norm (`moved/`).

    Args:
        history: tidy, columns run, arm, epoch, name, value, maybe recipe.
        arm, recipe: which to draw; they may be left out where the history has only one.

    Raises:
        InputError: a missing column, several arms or recipes, or no rows of any panel.
    """
    _columns(history, ["run", "arm", "epoch", "name", "value"], "history of trainings", "Results.history")
    for column, wanted in (("arm", arm), ("recipe", recipe)):
        if column in history:
            known = list(history[column].unique())
            if wanted is None and len(known) > 1 or wanted is not None and wanted not in known:
                raise InputError(f"liveness: {column} {wanted!r}; choose from {', '.join(map(str, known))}")
            history = history if wanted is None else history[history[column] == wanted]
    kinds = history["name"].str.partition("/")
    rows = history.assign(kind=kinds[0], term=kinds[2])
    rows = rows[(kinds[1] == "/") & rows["kind"].isin(list(LIVENESS))]
    panels = [kind for kind in LIVENESS if (rows["kind"] == kind).any()]
    if not panels:
        named = ", ".join(f"{kind}/<term>" for kind in LIVENESS)
        raise InputError(f"liveness: the history has no {named}: draw a distilled student trained with this version")
    terms = sorted(rows["term"].unique(), key=lambda term: [*TERM_COLOURS, term].index(term))
    styles = {}
    for number, term in enumerate(terms):
        other = OTHER_COLOURS[number % len(OTHER_COLOURS)]
        styles[term] = dict(color=TERM_COLOURS.get(term, other), marker="osD^vPX*"[number % 8], linestyle="-")
    columns = 2 if len(panels) > 1 else 1
    lines = -(-len(panels) // columns)
    size = (DOUBLE if columns > 1 else SINGLE, (44 * lines + 12) * MM)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for ax, kind in zip(axes.flat, panels, strict=False):
        title, idle = LIVENESS[kind]
        if idle is not None:
            ax.axhline(idle, color="black", linestyle=":", linewidth=0.8, zorder=0)
        for term in terms:
            chosen = rows[(rows["kind"] == kind) & (rows["term"] == term)]
            if len(chosen):
                line = chosen.groupby("epoch")["value"].agg(["mean", "min", "max"])
                style = styles[term]
                ax.plot(line.index, line["mean"], **style, markevery=max(1, len(line) // 6), markersize=3)
                ax.fill_between(line.index, line["min"], line["max"], color=style["color"], alpha=0.15, linewidth=0)
        ax.set(title=title, xlabel="epoch")
        ax.tick_params(labelsize=7)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.margins(y=0.08)
        if idle is not None:  # a term that idles must look idle, not be magnified
            bottom, top = ax.get_ylim()
            ax.set_ylim(min(bottom, idle - 0.1), max(top, idle + 0.1))
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    handles = [Line2D([], [], label=term, **styles[term]) for term in terms]
    _legend(figure, handles, columns=_beside(terms, size[0]), handlelength=3)
    runs = rows["run"].nunique()
    figure.set_label(
        f"{rows['arm'].iloc[0]}. Lines: mean of the runs (n = {runs}); bands: from the lowest to the highest run; "
        "dotted: what an idle term would show."
    )
    return figure


def save_figure(figure: Figure, folder: Path | str, name: str, caption: str) -> list[Path]:
    """Writes `<name>.pdf` (TrueType fonts), `<name>.png` (300 dpi) and `<name>.txt` (caption and the figure's note).

    Files are the same to the byte for the same figure: they carry no date and no version.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("pdf", "png", "txt")]
    with plt.rc_context(STYLE):
        figure.savefig(paths[0], metadata={"CreationDate": None, "Creator": None, "Producer": None})
        figure.savefig(paths[1], metadata={"Software": None})
    paths[2].write_text(f"{caption} {figure.get_label()}".strip() + "\n", encoding="utf-8")
    return paths


def _columns(table: pd.DataFrame, needed: Sequence[str], what: str, source: str) -> None:
    """Raises InputError where a table has no rows or not the columns that a figure needs."""
    absent = [column for column in needed if column not in table]
    if absent or table.empty:
        raise InputError(f"{what}: no {', '.join(absent) or 'rows'} in the table; give {source}")


def _n(counts: pd.Series) -> str:
    return f"n = {counts.min()}" + (f" to {counts.max()}" if counts.nunique() > 1 else "")


def _interval(means: pd.DataFrame) -> str:
    return f"mean over patients ({_n(means['n'])}) and 95 % BCa bootstrap interval"


def _legend(figure: Figure, handles: list, columns: int, **how) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), **how)


def _beside(names: Sequence[str], width: float) -> int:
    """How many entries of a legend with such names fit side by side."""
    return max(1, int(width / MM / (13 + 1.4 * max(map(len, names)))))


def _bar(row: tuple) -> np.ndarray:
    """Lengths of an interval below and above the mean; rounding can make one negative by 1e-17."""
    return np.maximum([[row.mean - row.low], [row.high - row.mean]], 0)


def _mean(ax: Axes, y: float, row: tuple, style: Mapping[str, str]) -> None:
    look = dict(style) | BARE | {"markeredgecolor": "white", "markeredgewidth": 0.4, "elinewidth": 1.4}
    ax.errorbar(row.mean, y, xerr=_bar(row), markersize=6.5, zorder=3, **look)


def _strip(ax: Axes, y: float, values: pd.Series, row: tuple, style: Mapping[str, str]) -> None:
    """Patients as small points spread about `y` in a fixed pattern, mean and interval above them."""
    spread = (np.arange(len(values)) * 0.618034 % 1 - 0.5) * 0.5
    ax.scatter(values, y + spread, s=5, color=style["color"], alpha=0.45, linewidth=0, zorder=2)
    _mean(ax, y, row, style)


def _rows(ax: Axes, labels: Sequence[str], metric: str, ticks: Sequence[float] | None = None) -> None:
    """Names down the left side, first on top, and the metric along the bottom."""
    label, unit, _ = METRICS[metric]
    ax.set_yticks(range(len(labels)) if ticks is None else ticks, labels)
    ax.set_xlabel(f"{label} ({unit})" if unit else label)
    ax.tick_params(labelsize=7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.set_ylim(ax.dataLim.y1 + 0.6, -0.7)


def _example(examples: pd.DataFrame, arm: str, case: str) -> pd.Series:
    found = examples[(examples["arm"] == arm) & (examples["case"] == case)]
    if found.empty:
        raise InputError(f"no example slice of arm {arm!r} and case {case!r}: run that arm on the fold of the case")
    if "recipe" in found and found["recipe"].nunique() > 1:
        raise InputError(f"{arm!r} has examples of several recipes: filter them by recipe")
    return found.sort_values("seed").iloc[0]


def _crop(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a square about a mask, with a margin; the whole slice where the mask is empty."""
    if not mask.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1])
    where = [np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)]
    extent, shortest = max(np.ptp(side) + 1 for side in where), min(mask.shape)
    size = min(max(int(1.3 * extent), shortest // 4), shortest)
    starts = [(side[0] + side[-1] + 1 - size) // 2 for side in where]
    starts = np.clip(starts, 0, np.array(mask.shape) - size).tolist()
    return slice(starts[0], starts[0] + size), slice(starts[1], starts[1] + size)


def _contours(ax: Axes, labels: np.ndarray, colour: str, style: str) -> None:
    for value in np.unique(labels[labels > 0]):
        if (labels != value).any():  # a class that fills the view has no outline
            ax.contour(labels == value, levels=[0.5], colors=colour, linestyles=[style], linewidths=0.8)


def _errors(ax: Axes, truth: np.ndarray, prediction: np.ndarray) -> None:
    """Colours what is missed, too much or of the wrong class, and outlines the prediction."""
    true, said = truth > 0, prediction > 0
    wrong = (true & ~said, ~true & said, true & said & (truth != prediction))
    for (colour, _), mask in zip(ERRORS, wrong, strict=True):
        overlay = np.zeros((*mask.shape, 4))
        overlay[mask] = to_rgba(colour, 0.65)
        ax.imshow(overlay)
    _contours(ax, prediction, "#F0E442", (0, (2, 1.5)))
