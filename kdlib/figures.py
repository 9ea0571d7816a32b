"""One function a figure: tidy tables in, a matplotlib Figure out, in one style and at printed size.

Colours, markers and line styles belong to a method (arm) and are the same in every figure; markers and line styles
differ too, so that figures can be read in grey. Every figure carries a note on n and its intervals as its label, which
`save_figure` writes after the caption.
"""

from __future__ import annotations

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

from kdlib.config import InputError
from kdlib.metrics import METRICS
from kdlib.statistics import THESIS_TABLE, per_patient, rows_of, summarise

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
LINES = {"T": "-", "S": "--", "K": "-."}
BARE = {"linestyle": ""}
TERMS = ("E-E", "B-B", "D-D", "PMD")
LOSSES = {  # name in recipes -> (print, colour, marker)
    "baseline": ("no distillation", "#7F7F7F", "o"), "mse": ("MSE", "#0072B2", "s"),
    "infonce": ("InfoNCE", "#E69F00", "^"), "labelled": ("labelled contrast", "#D55E00", "D"),
}  # fmt: skip
ERRORS = (("#56B4E9", "missed"), ("#D55E00", "too much"), ("#CC79A7", "wrong class"))
OUTLINES = (("-", "truth"), ("--", "prediction"))


def method_style(arm: str) -> dict[str, str]:
    """Colour, marker and line style of a method; one not in `METHOD_COLOURS` always gets the same of a reserve."""
    other = OTHER_COLOURS[zlib.crc32(arm.encode()) % len(OTHER_COLOURS)]
    colour, marker = METHOD_COLOURS.get(arm, other), METHOD_MARKERS.get(arm, "h")
    return dict(color=colour, marker=marker, linestyle=LINES.get(arm[:1], ":"))


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
def loss_comparison(table: pd.DataFrame, metric: str = "dice") -> Figure:
    """Every arm under each feature loss it was distilled with: patients, mean and interval.

    Args:
        table: tidy; the loss is what a recipe's name has in brackets, and an arm may have one recipe a loss.

    Raises:
        InputError: an arm has two recipes with the same loss.
    """
    means = summarise(table, ["arm", "recipe"], metric)
    values = per_patient(table, metric, ["arm", "recipe"])
    means["loss"] = [recipe.rpartition(" (")[2].removesuffix(")") for recipe in means["recipe"]]
    twice = means.loc[means.duplicated(["arm", "loss"]), "arm"]
    if len(twice):
        raise InputError(f"loss comparison: {twice.iloc[0]!r} has several recipes with one loss; filter by recipe")
    arms, losses = list(means["arm"].unique()), set(means["loss"])
    known = LOSSES | {loss: (loss, method_style(loss)["color"], "h") for loss in sorted(losses - set(LOSSES))}
    figure, ax = plt.subplots(figsize=(SINGLE, (5 * len(means) + 4 * len(arms) + 24) * MM))
    y, ticks = 0.0, []
    for arm in arms:
        group = means[means["arm"] == arm].sort_values("loss", key=lambda loss: loss.map([*known].index))
        ticks.append(y + (len(group) - 1) / 2)
        for row in group.itertuples():
            chosen = values.loc[(values["arm"] == arm) & (values["recipe"] == row.recipe), "value"]
            _strip(ax, y, chosen, row, dict(zip(("color", "marker"), known[row.loss][1:], strict=True)))
            y += 1
        y += 0.7
    _rows(ax, arms, metric, ticks)
    shown = [entry for loss, entry in known.items() if loss in losses]
    handles = [Line2D([], [], color=colour, marker=mark, linestyle="", label=label) for label, colour, mark in shown]
    _legend(figure, handles, columns=2)
    figure.set_label(f"Small points: patients, seeds averaged; large ones: {_interval(means)}.")
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


def _n(counts: pd.Series) -> str:
    return f"n = {counts.min()}" + (f" to {counts.max()}" if counts.nunique() > 1 else "")


def _interval(means: pd.DataFrame) -> str:
    return f"mean over patients ({_n(means['n'])}) and 95 % BCa bootstrap interval"


def _legend(figure: Figure, handles: list, columns: int, **how) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), **how)


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
