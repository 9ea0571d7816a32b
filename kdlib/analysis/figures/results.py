"""Figures of what the methods reached on the test patients."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.analysis.figures.style import (
    DARK,
    DIRECTIONS,
    DOUBLE,
    METHODS,
    MM,
    NO_LINE,
    OTHER_COLOURS,
    PALE,
    SINGLE,
    STYLE,
    axis_label,
    bar_lengths,
    draw_mean,
    legend_below,
    legend_lines,
    log_axis,
    mean_text,
    method_styles,
    name_rows,
    need_columns,
    p_text,
    panels,
    signed,
    spread,
)
from kdlib.analysis.intervals import canonical_order, interval, interval_text
from kdlib.analysis.labels import method_labels, methods, way_of_learning
from kdlib.analysis.metrics import METRICS
from kdlib.analysis.patients import patients_text, per_patient
from kdlib.analysis.tables import THESIS_TABLE, small_sample_note, summarise
from kdlib.config import InputError

AGREEMENT = {  # metric of kdlib.evaluation.agreement -> print
    "agreement": "Dice with the teacher", "band_agreement": "agreement at the boundary",
    "error_overlap": "overlap of errors (Dice)", "cka": "feature similarity (CKA)", "ece": "calibration error",
}  # fmt: skip
COSTS = {  # column of the cost table -> (label, its unit)
    "inference_parameters": ("parameters (millions)", 1e6), "gflops": ("GFLOPs per slice", 1),
    "latency_ms": ("CPU latency (ms per slice)", 1),
}  # fmt: skip


@plt.rc_context(STYLE)
def dice_per_method(table: pd.DataFrame, metric: str = "dice", means: pd.DataFrame | None = None) -> Figure:
    """Every patient's value for each method, with mean and interval.

    Args:
        table: tidy.
        metric: one of `kdlib.analysis.metrics.METRICS`.
        means: from `kdlib.analysis.statistics.summarise`; None makes the same from the table.

    Raises:
        InputError: see `kdlib.analysis.statistics.per_patient`.
    """
    means = summarise(table, metric=metric) if means is None else means
    styles = method_styles(table)
    values = per_patient(table, metric).pivot(index="patient", columns="method", values="value")[list(means["method"])]
    figure, ax = plt.subplots(figsize=(SINGLE, (7 * len(means) + 16) * MM))
    heights = np.arange(len(means)) + spread(len(values))[:, None]
    ax.plot(values.T, heights.T, color=PALE, linewidth=0.35, zorder=1)
    for y, row in enumerate(means.itertuples()):
        ax.scatter(values[row.method], heights[:, y], s=5, color=styles[row.method]["color"], alpha=0.45, linewidth=0)
        draw_mean(ax, y, row, styles[row.method])
    name_rows(ax, list(means["label"]), axis_label(metric))
    figure.set_label(
        f"Small points: patients, seeds averaged, thin lines from method to method; large ones: {mean_text(means)}."
    )
    return figure


@plt.rc_context(STYLE)
def slopes(table: pd.DataFrame, verdicts: pd.DataFrame, metric: str = "dice") -> Figure:
    """Every patient's value under a student and under the same student distilled, a panel per pair.

    Args:
        table: tidy.
        verdicts: from `kdlib.analysis.statistics.compare`: a the distilled student (drawn on the right), b the student.
        metric: that the verdicts are of.

    Raises:
        InputError: no verdicts, or a method of theirs that the table lacks; see also `per_patient`.
    """
    needed = ["a", "b", "n", "difference", "low", "high", "interval", "p_holm", "verdict"]
    need_columns(verdicts, needed, "verdicts", "compare's")
    values = per_patient(table, metric).pivot(index="patient", columns="method", values="value")
    missing = sorted({*verdicts["a"], *verdicts["b"]} - set(values))
    if missing:
        raise InputError(f"slopes: no method {', '.join(missing)} in the table: it has {', '.join(values)}")
    labels, styles = method_labels(table), method_styles(table)
    columns = min(4, len(verdicts))
    width = SINGLE if columns < 3 else DOUBLE
    figure, axes = panels(len(verdicts), columns, width, 58, 8, sharey=True, gridspec_kw={"wspace": 0.06})
    for ax, row in zip(axes, verdicts.itertuples(), strict=True):
        pairs = values[[row.b, row.a]].dropna()
        change = (pairs[row.a] - pairs[row.b]).round(12) * (1 if METRICS[metric].higher else -1)
        for style, some in ((DIRECTIONS["worse"], change < 0), (DIRECTIONS["better or equal"], change >= 0)):
            ax.plot([0, 1], pairs[some].T, **style)
        ax.plot([0, 1], pairs.mean(), color="black", linewidth=2, zorder=3)
        for x, method in enumerate((row.b, row.a)):
            style = styles[method] | NO_LINE | {"markersize": 7, "markeredgecolor": "white", "zorder": 4}
            ax.plot(x, pairs[method].mean(), **style)
        bounds = "" if np.isnan(row.low) else f"\n[{row.low:+.3f}, {row.high:+.3f}]"
        ax.set_title(signed(f"{row.difference:+.3f}{bounds}\n{p_text(row.p_holm)}, {row.verdict}"), fontsize=7)
        ax.set(xticks=[0, 1], xlim=(-0.25, 1.25))
        ax.set_xticklabels([labels[name].replace("(", "\n(", 1) for name in (row.b, row.a)])
        ax.grid(axis="y")
    for ax in axes[::columns]:
        ax.set_ylabel(axis_label(metric))
    mean = {"mean": dict(color="black", linewidth=2)}
    legend_below(figure, legend_lines(DIRECTIONS | mean), columns=3)
    note = (
        f"Lines: patients ({patients_text(verdicts['n'], verdicts.get('volumes', ()))}), seeds averaged. Above: mean "
        f"paired difference with its {interval_text(verdicts['interval'])}, and p of Wilcoxon's signed-rank test after "
        f"Holm's correction for {len(verdicts)} comparisons. {small_sample_note(verdicts)}"
    )
    figure.set_label(note.strip())
    return figure


@plt.rc_context(STYLE)
def along(table: pd.DataFrame, axis: str, metric: str = "dice") -> Figure:
    """Mean and interval along the share of labels or the length of the training, a line for each way of learning.

    Args:
        table: tidy; its teachers are a band.
        axis: "fraction" or "length".

    Raises:
        InputError: another axis; see also `kdlib.analysis.statistics.per_patient`.
    """
    title = {"fraction": "training patients with labels (%)", "length": "length of the training (profile = 1)"}
    if axis not in title:
        raise InputError(f"axis {axis!r} does not exist: choose from {', '.join(title)}")
    means = summarise(table, metric=metric).set_index("method")
    found = methods(table)
    figure, ax = plt.subplots(figsize=(SINGLE, 70 * MM))
    for row in means.loc[found.index[found["role"] == "teacher"]].itertuples():
        ax.axhspan(row.low, row.high, color=PALE, alpha=0.35, linewidth=0)
        ax.axhline(row.mean, color=DARK, linewidth=1, label=row.label)
    students = found[found["role"] != "teacher"]
    ways = students.apply(way_of_learning, axis="columns")
    for number, (way, group) in enumerate(students.groupby(ways, sort=False)):
        rows = means.loc[group.index].assign(at=group[axis]).sort_values("at")
        style = dict(color=("black", *OTHER_COLOURS)[number % 7], marker="osD^vPX"[number % 7], markersize=4)
        place = rows["at"] * (100 if axis == "fraction" else 1) * 1.02 ** (number - 2)
        ends = np.abs(rows[["low", "high"]].to_numpy().T - rows["mean"].to_numpy())
        ax.errorbar(place, rows["mean"], ends, label=way, linewidth=1, elinewidth=0.7, capsize=0, **style)
    ax.set_xscale("log")
    marks = sorted(set(students[axis] * (100 if axis == "fraction" else 1)))
    ax.set_xticks(marks, [f"{mark:g}" for mark in marks])
    ax.minorticks_off()
    ax.set(xlabel=title[axis], ylabel=axis_label(metric))
    ax.grid(axis="y")
    handles, _ = ax.get_legend_handles_labels()
    legend_below(figure, handles, columns=2)
    figure.set_label(f"Points: {mean_text(means)}; the teacher's as a band. Points of one place are set side by side.")
    return figure


def choose_cases(table: pd.DataFrame, method: str) -> dict[str, str]:
    """The cases of a method's best, median and worst Dice: rule -> case; two cases have no median, one is the best.

    Raises:
        InputError: the method has no Dice in the table; see also `kdlib.analysis.statistics.per_patient`.
    """
    values = per_patient(table, "dice", ["method", "case"]).dropna()
    order = list(values[values["method"] == method].sort_values("value", kind="stable")["case"])
    if not order:
        raise InputError(f"no method {method!r} in the table: it has {', '.join(table['method'].unique())}")
    chosen = {"best": order[-1], "median": order[(len(order) - 1) // 2], "worst": order[0]}
    rules = {1: ["best"], 2: ["best", "worst"]}.get(len(order), chosen)
    return {rule: chosen[rule] for rule in rules}


@plt.rc_context(STYLE)
def efficiency(table: pd.DataFrame, cost: pd.DataFrame, thesis: pd.DataFrame | None = THESIS_TABLE) -> Figure:
    """Dice against what a network costs where it is used: parameters, arithmetic, and latency on a CPU.

    Args:
        table: tidy, with the identity columns.
        cost: one row per (model, size): model, size ("study" as trained here, or "thesis": full width, 256 x 256),
            inference_parameters, gflops of a slice, latency_ms and threads.
        thesis: `THESIS_TABLE`, drawn at the cost of size "thesis"; None leaves it out.

    Raises:
        InputError: a missing column, or a model without its cost.
    """
    need_columns(cost, ["model", "size", *COSTS, "threads"], "cost", "tables/02_cost.csv of notebook 02")
    need_columns(table, ["model", "method"], "efficiency", "`Results.cases`")
    means, styles = summarise(table), method_styles(table)
    sizes = {size: rows.set_index("model") for size, rows in cost.groupby("size")}
    missing = sorted(set(means["model"]) - set(sizes.get("study", pd.DataFrame()).index))
    if missing:
        raise InputError(f"efficiency: no cost of {', '.join(missing)} in size study; run notebook 02 again")
    figure, axes = plt.subplots(1, len(COSTS), figsize=(DOUBLE, 78 * MM), sharey=True)
    for ax, (name, (label, unit)) in zip(axes, COSTS.items(), strict=True):
        points = [(row, row.mean, styles[row.method]) for row in means.itertuples()]
        at = means["model"].map(sizes["study"][name]) / unit
        known = at if thesis is None else pd.concat([at, thesis["model"].map(sizes["thesis"][name]) / unit])
        low, high = known.min(), known.max()
        apart = (2 * high / low) ** 0.03  # factor between methods of equal cost
        # a stair through those that no cheaper method reaches
        best = means.assign(cost=at).sort_values(["cost", "mean"], ascending=[True, False])
        best = best[best["mean"] > best["mean"].cummax().shift(fill_value=-np.inf)]
        ax.plot(best["cost"], best["mean"], color=PALE, drawstyle="steps-post", linewidth=1, zorder=0)
        for (row, mean, style), x in zip(points, _side_by_side(at, apart), strict=True):
            ax.errorbar(x, mean, yerr=bar_lengths(mean, row.low, row.high), elinewidth=1, **style | NO_LINE)
        if thesis is not None:
            for row, x in zip(thesis.itertuples(), _side_by_side(known[len(at) :], apart), strict=True):
                colour, marker = METHODS[row.teacher, row.model, None if row.teacher else True]
                ax.plot(x, row.dice, color=colour, marker=marker, markerfacecolor="none", **NO_LINE)
        log_axis(ax.xaxis, low / apart**3, high * apart**3)
        ax.set_xlabel(label)
        ax.grid(axis="y")
    axes[0].set_ylabel("Dice")
    handles = legend_lines({row.label: styles[row.method] for row in means.itertuples()}, **NO_LINE)
    note = (
        f"Points and bars: {mean_text(means)}; methods of equal cost stand side by side about it. Stair: the best mean "
    )
    note += "Dice at no more than that cost."
    if thesis is not None:
        handles += legend_lines({"hollow: thesis": dict(color=DARK, marker="o", markerfacecolor="none")}, **NO_LINE)
        note += " Hollow: the thesis's single runs, pixels of its test set pooled."
    legend_below(figure, handles, columns=6)
    threads = " or ".join(map(str, sorted(cost["threads"].unique())))
    figure.set_label(
        f"{note} Costs are of one slice, without a teacher's reconstruction decoder; latency: median, batch 1, "
        f"{threads} thread{'s' * (threads != '1')}."
    )
    return figure


def _side_by_side(costs: pd.Series, apart: float) -> np.ndarray:
    """Equal costs set apart by a factor, about their true place."""
    groups = costs.groupby(costs)
    return (costs * apart ** (groups.cumcount() - (groups.transform("size") - 1) / 2)).to_numpy()


@plt.rc_context(STYLE)
def reliability(table: pd.DataFrame) -> Figure:
    """Observed frequency against predicted probability of the class, a line per method, and where the pixels are.

    A case counts by the shares of its own pixels that lie in each bin, so that large organs do not decide the curve.

    Args:
        table: from `kdlib.evaluation.agreement.calibration`, with a column method; seeds and folds of a method are
            taken together.

    Raises:
        InputError: a missing column, or no pixel in any bin.
    """
    needed = ["method", "case", "class", "bin", "confidence", "accuracy", "count"]
    need_columns(table, needed, "calibration", "kdlib.evaluation.agreement.calibration with a column method")
    unit = "patient" if "patient" in table else "case"
    labels, styles, bins = method_labels(table), method_styles(table), int(table["bin"].max()) + 1
    figure, (curve, strip) = plt.subplots(
        2, 1, figsize=(SINGLE, 105 * MM), sharex=True, height_ratios=[3, 1], gridspec_kw={"hspace": 0.04}
    )
    curve.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    counts, lowest = [], 0.1
    for method, rows in table.groupby("method", sort=False):
        if not rows["count"].any():
            raise InputError(f"reliability: {method!r} has no pixel in any bin; are the classes in its cases?")
        shares, sums, sures = _bin_shares(rows, unit, bins)
        counts.append(len(shares))
        style = styles[method]
        # patients drawn anew, whole
        drawn = np.random.default_rng(0).multinomial(len(shares), np.full(len(shares), 1 / len(shares)), size=1000)
        with np.errstate(invalid="ignore"):  # a bin that no drawn patient fills
            x, y = sures.sum(0) / shares.sum(0), sums.sum(0) / shares.sum(0)
            redrawn = (drawn @ sums) / (drawn @ shares)
        filled = shares.sum(0) > 0
        band = np.nanquantile(redrawn[:, filled], [0.025, 0.975], axis=0)
        if len(shares) > 1:
            curve.fill_between(x[filled], *band, color=style["color"], alpha=0.15, linewidth=0)
        curve.plot(x[filled], y[filled], **style, markersize=3.5, label=labels[method])
        height = np.where(filled, shares.mean(0), np.nan)
        lowest = min(lowest, np.nanmin(height))
        look = dict(color=style["color"], linestyle=style["linestyle"])
        strip.stairs(height, np.linspace(0, 1, bins + 1), baseline=None, **look)
    curve.set(ylabel="observed frequency", ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
    strip.set(xlabel="predicted probability", ylabel="share of\npixels", yscale="log")
    # whole decades, so that two of them at least have a label; no labels between
    strip.set_ylim(10 ** np.floor(np.log10(lowest)), 1)
    strip.yaxis.set_minor_formatter("")
    for ax in (curve, strip):
        ax.grid()
    legend_below(figure, legend_lines({labels[method]: style for method, style in styles.items()}), handlelength=3)
    figure.set_label(
        f"Lines: mean over {_units_text(table, counts)}, each weighted by its pixels' shares in the bins; "
        f"bands: 95 % percentile interval over a bootstrap of the {unit}s; dotted: perfect calibration."
    )
    return figure


def _units_text(table: pd.DataFrame, counts: Sequence[int]) -> str:
    """ "patients (n = 14 patients with 28 volumes)", or "cases (n = 28)" where no patients are known."""
    if "patient" not in table:
        return f"cases ({patients_text(counts).removesuffix('s').removesuffix(' patient')})"
    return f"patients ({patients_text(counts, [table['case'].nunique()] if 'case' in table else ())})"


def _bin_shares(rows: pd.DataFrame, unit: str, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[patients, bins]: share of a patient's pixels in a bin, and that share times accuracy and times confidence.

    Shares are made of each case and class for itself, then averaged over those of a patient.
    """
    keys = [column for column in rows if column not in ("bin", "confidence", "accuracy", "count")]
    total = rows.groupby(keys, sort=False, dropna=False)["count"].transform("sum")
    rows = rows.assign(share=rows["count"] / total)[total > 0].fillna({"accuracy": 0.0, "confidence": 0.0})
    rows = rows.assign(accuracy=rows["share"] * rows["accuracy"], confidence=rows["share"] * rows["confidence"])
    means = rows.groupby([unit, "bin"])[["share", "accuracy", "confidence"]].mean().unstack(fill_value=0.0)
    wide = [means[name].reindex(columns=range(bins), fill_value=0.0) for name in ("share", "accuracy", "confidence")]
    order = canonical_order(np.hstack([part.to_numpy() for part in wide]))
    return tuple(part.to_numpy()[order] for part in wide)


@plt.rc_context(STYLE)
def teacher_agreement(table: pd.DataFrame) -> Figure:
    """Agreement with the teacher, a panel per metric, a row per method: patients, mean and interval.

    Args:
        table: columns method, metric (of `kdlib.evaluation.agreement`, or "cka"), case (or patient) and value; over
            seeds, classes and whatever else a case has several values for, values are averaged within the patient. For
            CKA, which has no cases, give the fold as case.

    Raises:
        InputError: a missing column, or no defined value.
    """
    unit = "patient" if "patient" in table else "case"
    source = "kdlib.teacher_agreement's first table"
    need_columns(table, ["method", "metric", unit, "value"], "teacher_agreement", source)
    table = table.dropna(subset="value")
    labels, styles, metrics = method_labels(table), method_styles(table), list(table["metric"].unique())
    metrics.sort(key=lambda name: [*AGREEMENT, name].index(name))
    if not metrics:
        raise InputError("teacher_agreement: no defined value in the table")
    columns = min(3, len(metrics))
    figure, axes = panels(
        len(metrics), columns, DOUBLE if columns > 1 else SINGLE, 6 * len(labels) + 16, 0, sharey=True
    )
    counts, kinds = [], []
    for ax, metric in zip(axes, metrics, strict=True):
        rows = table[table["metric"] == metric].groupby(["method", unit], sort=False, as_index=False)["value"].mean()
        for y, method in enumerate(labels):
            values = rows.loc[rows["method"] == method, "value"]
            if len(values):
                low, high, kind = interval(values)
                row = pd.DataFrame([dict(mean=values.mean(), low=low, high=high)])
                ax.scatter(values, y + spread(len(values)), s=5, color=styles[method]["color"], alpha=0.45, linewidth=0)
                draw_mean(ax, y, next(row.itertuples()), styles[method])
                counts.append(len(values))
                kinds.append(kind)
        name_rows(ax, list(labels.values()), AGREEMENT.get(metric, metric))
        ax.xaxis.get_major_locator().set_params(nbins=4)
    figure.set_label(
        f"Small points: {unit}s, seeds and classes averaged; large ones: mean over {_units_text(table, counts)} and "
        f"{interval_text(kinds)}."
    )
    return figure
