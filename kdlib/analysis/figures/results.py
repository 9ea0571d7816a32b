"""Figures of what the methods reached on the test patients."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.analysis.figures import style
from kdlib.analysis.intervals import canonical_order, interval, interval_text
from kdlib.analysis.labels import method_labels, methods, way_of_learning
from kdlib.analysis.patients import patients_text, per_patient
from kdlib.analysis.sentences import cost_sentence
from kdlib.analysis.tables import HEADINGS, THESIS_TABLE, expected_calibration_error, summarise
from kdlib.config import InputError

COSTS = {  # column of the cost table -> (label, its unit)
    "inference_parameters": ("parameters (millions)", 1e6), "latency_ms": (HEADINGS["latency_ms"], 1),
}  # fmt: skip


@plt.rc_context(style.STYLE)
def dice_per_method(table: pd.DataFrame) -> Figure:
    """Every patient's Dice for each method, with mean and interval.

    Args:
        table: tidy.

    Raises: InputError: see `kdlib.analysis.statistics.per_patient`.
    """
    means, styles = summarise(table), style.method_styles(table)
    values = per_patient(table).pivot(index="patient", columns="method", values="value")
    figure, ax = plt.subplots(figsize=(style.SINGLE, (7 * len(means) + 16) * style.MM))
    for y, row in enumerate(means.itertuples()):
        style.draw_row(ax, y, values[row.method], row.mean, row.low, row.high, styles[row.method])
    style.name_rows(ax, list(means["label"]), "Dice")
    note = "Small points: patients, seeds averaged; large ones: "
    figure.set_label(f"{note}{style.mean_text(means)}.")
    return figure


@plt.rc_context(style.STYLE)
def along(table: pd.DataFrame, axis: str) -> Figure:
    """Mean Dice and interval along the share of labels or the length of the training: a line for each way of learning,
    a panel for each student.

    Args:
        table: tidy; its teachers are a band.
        axis: "fraction" or "length".

    Raises: InputError: another axis; see also `kdlib.analysis.statistics.per_patient`.
    """
    title = {"fraction": "training patients with labels (%)", "length": "length of the training (profile = 1)"}
    if axis not in title:
        raise InputError(f"axis {axis!r} does not exist: choose from {', '.join(title)}")
    means = summarise(table).set_index("method")
    found = methods(table)
    teachers = means.loc[found.index[found["role"] == "teacher"]]
    learners = found[found["role"] != "teacher"]
    names = list(learners["model"].unique())
    size = (style.SINGLE if len(names) == 1 else style.DOUBLE, 70 * style.MM)
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    looks: dict[str, dict] = {}  # a way of learning looks the same in all panels
    for ax, name in zip(axes[0], names, strict=True):
        students = learners[learners["model"] == name]
        for row in teachers.itertuples():
            ax.axhspan(row.low, row.high, color=style.PALE, alpha=0.35, linewidth=0)
            ax.axhline(row.mean, color=style.DARK, linewidth=1, label=row.label)
        ways = students.apply(way_of_learning, axis="columns")
        for number, (way, group) in enumerate(students.groupby(ways, sort=False)):
            rows = means.loc[group.index].assign(at=group[axis]).sort_values("at")
            own = style.method_styles(group.reset_index())
            usual = own[group.index[(group["fraction"] - 0.5).abs().argmin()]]
            other = dict(color=style.OTHER_COLOURS[number % 6], marker="D^vs<>"[number % 6], linestyle=":")
            look = looks.setdefault(way, (usual if way in ("alone", "distilled") else other) | dict(markersize=4.5))
            place = rows["at"] * (100 if axis == "fraction" else 1) * 1.02 ** (number - 2)
            ends = np.abs(rows[["low", "high"]].to_numpy().T - rows["mean"].to_numpy())
            ax.errorbar(place, rows["mean"], ends, label=way, linewidth=1.1, elinewidth=0.7, capsize=0, **look)
        ax.set_xscale("log")
        marks = sorted(set(students[axis] * (100 if axis == "fraction" else 1)))
        ax.set_xticks(marks, [f"{mark:g}" for mark in marks])
        ax.minorticks_off()
        ax.set(xlabel=title[axis], title=name if len(names) > 1 else "")
        ax.grid(axis="y")
    axes[0, 0].set_ylabel("Dice")
    handles, _ = axes[0, 0].get_legend_handles_labels()
    style.legend_below(figure, handles, columns=2 if len(names) == 1 else 3)
    band = "" if teachers.empty else "; the teacher's as a band"
    figure.set_label(f"Points: {style.mean_text(means)}{band}. Points of one place are set side by side.")
    return figure


def choose_cases(table: pd.DataFrame, method: str) -> dict[str, str]:
    """The cases of a method's best, median and worst Dice: rule -> case; two cases have no median, one is the best.

    Raises: InputError: the method has no Dice in the table; see also `kdlib.analysis.statistics.per_patient`.
    """
    values = per_patient(table, "dice", ["method", "case"]).dropna()
    order = list(values[values["method"] == method].sort_values("value", kind="stable")["case"])
    if not order:
        raise InputError(f"no method {method!r} in the table: it has {', '.join(table['method'].unique())}")
    chosen = {"best": order[-1], "median": order[(len(order) - 1) // 2], "worst": order[0]}
    rules = {1: ["best"], 2: ["best", "worst"]}.get(len(order), chosen)
    return {rule: chosen[rule] for rule in rules}


@plt.rc_context(style.STYLE)
def efficiency(table: pd.DataFrame, cost: pd.DataFrame, thesis: pd.DataFrame | None = THESIS_TABLE) -> Figure:
    """Dice against what a network costs where it is used: parameters, and latency on a CPU.

    Args:
        table: tidy, with the identity columns.
        cost: one row per (model, size): model, size ("study" as trained here, or "thesis": full width, 256 x 256),
            inference_parameters and latency_ms of a slice or patch.
        thesis: `THESIS_TABLE`, drawn in a panel of its own; None leaves it out.

    Raises: InputError: a missing column, or a model without its cost.
    """
    style.need_columns(cost, ["model", "size", *COSTS], "cost", "tables/02_cost.csv of notebook 02")
    style.need_columns(table, ["model", "method", "role"], "efficiency", "`Results.cases`")
    means, own = summarise(table), cost[cost["size"] == "study"].set_index("model")
    if missing := sorted(set(means["model"]) - set(own.index)):
        raise InputError(f"efficiency: no cost of {', '.join(missing)} in size study; run notebook 02 again")
    count = len(COSTS) + (thesis is not None)
    figure, axes = plt.subplots(1, count, figsize=(style.DOUBLE, 66 * style.MM), sharey=thesis is None)
    for ax, (name, (label, unit)) in zip(axes, COSTS.items(), strict=False):
        _by_cost(ax, means, means["model"].map(own[name]) / unit, "mean")
        ax.set_xlabel(label)
    if thesis is not None:
        rows = thesis.reset_index().assign(role=["distilled" if t else "baseline" for t in thesis["teacher"]])
        _by_cost(axes[-1], rows.assign(fraction=1.0, method=rows["label"]), rows["params"], "dice")
        axes[-1].set(xlabel=COSTS["inference_parameters"][0], title="the thesis's own numbers")
        axes[1].sharey(axes[0])
        axes[1].tick_params(labelleft=False)
    axes[0].set_ylabel("Dice")
    roles = {"teacher": ("s", means["role"] == "teacher")}
    roles |= {"student alone, all labels": ("o", (means["role"] == "baseline") & (means["fraction"] == 1))}
    roles |= {"alone, half of the labels": ("d", (means["role"] == "baseline") & (means["fraction"] == 0.5))}
    roles |= {f"distilled from {name}": (mark, means["teacher"] == name) for name, mark in (("T1", "P"), ("T2", "X"))}
    looks = {name: dict(color=style.DARK, marker=marker) for name, (marker, here) in roles.items() if here.any()}
    style.legend_below(figure, style.legend_lines(looks, **style.NO_LINE))
    note = f"Points: mean over patients ({patients_text(means['n'], means['volumes'])}) at the network's true cost; "
    note += "intervals stand in the table. Costs are without a teacher's reconstruction decoder; latency: "
    note += "median, batch 1, 1 thread."
    if thesis is not None:
        note += " Right: single runs of the thesis at full width, pixels of its test set pooled."
    figure.set_label(f"{note} {cost_sentence(cost)}")
    return figure


def _by_cost(ax: Axes, rows: pd.DataFrame, at: pd.Series, value: str) -> None:
    """Points of methods at their cost, and the name of each network above its points."""
    looks = style.method_styles(rows)
    for row, x in zip(rows.itertuples(), at, strict=True):
        ax.plot(x, getattr(row, value), **looks[row.method] | style.NO_LINE | dict(markersize=5, alpha=0.9))
    style.log_axis(ax.xaxis, at.min() / 1.6, at.max() * 1.6)
    for model, group in rows.assign(at=at).groupby("model", sort=False):
        where = dict(xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)
        ax.annotate(model, (group["at"].iloc[0], group[value].max()), **where)
    ax.margins(y=0.14)
    ax.grid(axis="y")


@plt.rc_context(style.STYLE)
def reliability(table: pd.DataFrame) -> Figure:
    """Observed frequency against predicted probability of the class, a line per method, and where the pixels are.

    A case counts by the shares of its own pixels that lie in each bin, so that large organs do not decide the curve.

    Args:
        table: from `kdlib.evaluation.calibration.calibration`, with columns method and patient; seeds and folds of a
            method are taken together.

    Raises: InputError: a missing column, or no pixel in any bin.
    """
    needed = ["method", "patient", "case", "class", "bin", "confidence", "accuracy", "count"]
    style.need_columns(table, needed, "calibration", "kdlib.teacher_agreement's last table, with a column patient")
    labels, styles, bins = method_labels(table), style.method_styles(table), int(table["bin"].max()) + 1
    size, grid = (style.SINGLE, 105 * style.MM), dict(height_ratios=[3, 1], hspace=0.04)
    figure, (curve, strip) = plt.subplots(2, 1, figsize=size, sharex=True, gridspec_kw=grid)
    curve.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    counts, lowest = [], 0.1
    for method, rows in table.groupby("method", sort=False):
        if not rows["count"].any():
            raise InputError(f"reliability: {method!r} has no pixel in any bin; are the classes in its cases?")
        shares, sums, sures = _bin_shares(rows, bins)
        counts.append(len(shares))
        look = styles[method]
        # patients drawn anew, whole
        n, filled = len(shares), shares.sum(0) > 0
        x, y = (part.sum(0)[filled] / shares.sum(0)[filled] for part in (sures, sums))
        if n > 1:
            drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
            with np.errstate(invalid="ignore"):  # a bin that no drawn patient fills
                redrawn = (drawn @ sums[:, filled]) / (drawn @ shares[:, filled])
            band = np.nanquantile(redrawn, [0.025, 0.975], axis=0)
            curve.fill_between(x, *band, color=look["color"], alpha=0.15, linewidth=0)
        curve.plot(x, y, **look, markersize=3.5, label=labels[method])
        height = np.where(filled, shares.mean(0), np.nan)
        lowest = min(lowest, np.nanmin(height))
        how = dict(color=look["color"], linestyle=look["linestyle"])
        strip.stairs(height, np.linspace(0, 1, bins + 1), baseline=None, **how)
    curve.set(ylabel="observed frequency", ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
    strip.set(xlabel="predicted probability", ylabel="share of\npixels", yscale="log")
    # whole decades, so that two of them at least have a label; no labels between
    strip.set_ylim(10 ** np.floor(np.log10(lowest)), 1)
    strip.yaxis.set_minor_formatter("")
    for ax in (curve, strip):
        ax.grid()
    errors = expected_calibration_error(table).groupby(["method", "patient"])["value"].mean().groupby("method").mean()
    looks = {f"{labels[method]}: error {errors[method]:.3f}": look for method, look in styles.items()}
    style.legend_below(figure, style.legend_lines(looks), columns=2, handlelength=3)
    note = f"Lines: mean over patients ({patients_text(counts, [table['case'].nunique()])}), each weighted by its "
    note += "pixels' shares in the bins; bands: 95 % percentile interval over a bootstrap of the patients; dotted: "
    figure.set_label(f"{note}perfect calibration. Error: expected calibration error, mean over patients.")
    return figure


def _bin_shares(rows: pd.DataFrame, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[patients, bins]: share of a patient's pixels in a bin, and that share times accuracy and times confidence.

    Shares are made of each case and class for itself, then averaged over those of a patient.
    """
    keys = [column for column in rows if column not in ("bin", "confidence", "accuracy", "count")]
    total = rows.groupby(keys, sort=False, dropna=False)["count"].transform("sum")
    rows = rows.assign(share=rows["count"] / total)[total > 0].fillna({"accuracy": 0.0, "confidence": 0.0})
    rows = rows.assign(accuracy=rows["share"] * rows["accuracy"], confidence=rows["share"] * rows["confidence"])
    names = ["share", "accuracy", "confidence"]
    means = rows.groupby(["patient", "bin"])[names].mean().unstack(fill_value=0.0)
    wide = [means[name].reindex(columns=range(bins), fill_value=0.0).to_numpy() for name in names]
    order = canonical_order(np.hstack(wide))
    return tuple(part[order] for part in wide)


@plt.rc_context(style.STYLE)
def teacher_agreement(table: pd.DataFrame) -> Figure:
    """Agreement with the teacher, a panel per metric, a row per method: patients, mean and interval.

    Args:
        table: columns method, metric (of `kdlib.evaluation.agreement`), patient, case and value; over seeds, classes
            and whatever else a case has several values for, values are averaged within the patient.

    Raises: InputError: a missing column, or no defined value.
    """
    needed = ["method", "metric", "patient", "case", "value"]
    style.need_columns(table, needed, "teacher_agreement", "kdlib.teacher_agreement's first table")
    table = table.dropna(subset="value")
    labels, styles, metrics = method_labels(table), style.method_styles(table), list(table["metric"].unique())
    if not metrics:
        raise InputError("teacher_agreement: no defined value in the table")
    columns = min(3, len(metrics))
    width = style.DOUBLE if columns > 1 else style.SINGLE
    figure, axes = style.panels(len(metrics), columns, width, 6 * len(labels) + 16, 0, sharey=True)
    counts, kinds = [], []
    for ax, metric in zip(axes, metrics, strict=True):
        rows = table[table["metric"] == metric]
        for y, method in enumerate(labels):
            values = rows[rows["method"] == method].groupby("patient", sort=False)["value"].mean()
            if len(values):
                *limits, kind = interval(values)
                style.draw_row(ax, y, values, values.mean(), *limits, styles[method])
                counts.append(len(values))
                kinds.append(kind)
        style.name_rows(ax, list(labels.values()), HEADINGS[metric])
        ax.xaxis.get_major_locator().set_params(nbins=4)
    note = "Small points: patients, seeds and classes averaged; large ones: mean over patients "
    figure.set_label(f"{note}({patients_text(counts, [table['case'].nunique()])}) and {interval_text(kinds)}.")
    return figure
