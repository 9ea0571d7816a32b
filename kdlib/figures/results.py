"""Figures of what the methods reached on the test patients."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kdlib.config import InputError
from kdlib.figures.style import (
    BARE,
    DOUBLE,
    FAMILY_STYLES,
    MM,
    SINGLE,
    STYLE,
    TERMS,
    VERDICTS,
    bar_lengths,
    draw_mean,
    draw_strip,
    entries_beside,
    family_of,
    interval_text,
    legend_below,
    method_style,
    n_text,
    name_rows,
    need_columns,
)
from kdlib.metrics import METRICS
from kdlib.statistics import THESIS_TABLE, interval, per_patient, rows_of, summarise

FIDELITY = {  # metric of kdlib.fidelity -> print
    "agreement": "Dice with the teacher", "band_agreement": "agreement at the boundary",
    "error_overlap": "Dice of both's errors", "cka": "CKA with the teacher", "ece": "calibration error",
}  # fmt: skip


@plt.rc_context(STYLE)
def dice_per_method(table: pd.DataFrame, metric: str = "dice") -> Figure:
    """Every patient's value for each arm, with mean and interval.

    Raises:
        InputError: see `kdlib.statistics.per_patient`.
    """
    values, means = per_patient(table, metric), summarise(table, metric=metric)
    figure, ax = plt.subplots(figsize=(SINGLE, (7 * len(means) + 16) * MM))
    for y, row in enumerate(means.itertuples()):
        draw_strip(ax, y, values.loc[values["arm"] == row.arm, "value"], row, method_style(row.arm))
    name_rows(ax, means["arm"], metric)
    figure.set_label(f"Small points: patients, seeds averaged; large ones: {interval_text(means)}.")
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
        draw_mean(forest, y, row, style)
        if row.recipe == "baseline":
            forest.axvline(row.mean, color=style["color"], linestyle=":", linewidth=0.8, zorder=0)
    name_rows(forest, [""] * len(means), metric)
    dots.set(xticks=range(4), xlim=(-0.6, 3.6))
    dots.set_xticklabels(TERMS, rotation=90)
    dots.tick_params(length=0, labelsize=7, labelleft=False)
    dots.spines[:].set_visible(False)
    legend_below(figure, [Line2D([], [], label=arm, **method_style(arm) | BARE) for arm in arms.unique()], columns=3)
    figure.set_label(f"Dark dots: terms that were on. Points and bars: {interval_text(means)}.")
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
        ax.errorbar(x, row.mean, yerr=bar_lengths(row), elinewidth=1, label=row.arm, **method_style(row.arm) | BARE)
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
    legend_below(figure, ax.get_legend_handles_labels()[0], columns=3)
    figure.set_label(f"Points and bars: {interval_text(means)}; arms of equal size stand side by side.{note}")
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
    need_columns(ranks, ["n", "mean", "rank", "rank_low", "rank_high"], "ranks", "kdlib.statistics.ranks")
    names = list(ranks.sort_values(["rank", "mean"], kind="stable").iloc[:, 0])
    rows = ranks.set_index(ranks.columns[0]).loc[names]
    if reference is not None and reference not in names:
        raise InputError(f"ranking: no reference {reference!r} among {', '.join(names)}")
    differences = None
    if verdicts is not None:
        need_columns(
            verdicts, ["a", "b", "n", "difference", "low", "high", "verdict"], "verdicts", "statistics.compare"
        )
        differences = verdicts[verdicts["b"] == reference].set_index("a")
        if not differences.index.intersection(names).size:
            raise InputError(f"ranking: no comparison with the reference {reference!r} in the verdicts; give both")
    label, unit, higher = METRICS[metric]
    families = {family_of(name): method_style(name) for name in names}
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
        name_rows(ax, [f"{name}  {mean:.3f}" for name, mean in zip(names, rows["mean"], strict=True)], metric)
        ax.set_ylim(len(names) - 0.4, -0.7)
        if reference is not None:
            y = names.index(reference)
            ax.axhspan(y - 0.5, y + 0.5, color="#EEEEEE", linewidth=0, zorder=-1)
    axes[0, 0].set(xlabel=f"rank by mean {label} (1 = best)", xlim=(0.4, 1.03 * len(names) + 0.6))
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    note = f"Beside the names: mean {label} over patients ({n_text(rows['n'])}). Left: rank of the mean and 95 % percentile "
    note += "interval over a bootstrap of the patients."
    if differences is not None:
        axes[0, 1].set_xlabel(f"{label} minus that of {reference}" + (f" ({unit})" if unit else ""))
        axes[0, 1].axvline(0, color="black", linewidth=0.6, zorder=1)
        axes[0, 1].xaxis.get_major_locator().set_params(nbins=6)
        axes[0, 1].tick_params(labelleft=False)
        if np.isfinite(cut):
            axes[0, 1].set_xlim(-cut, cut)
        note += f" Right: mean paired difference ({n_text(differences['n'])}) and 95 % BCa bootstrap interval, "
        note += f"{'higher' if higher else 'lower'} is better; hollow: inconclusive after Holm's correction."
    if set(families) - {""}:
        known = [family for family in FAMILY_STYLES if family in families]
        handles = [Line2D([], [], label=family, **families[family] | BARE) for family in known]
        legend_below(figure, handles, columns=len(handles))
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
    need_columns(table, ["step", "dice", "difference", "low", "high", "verdict", "n"], "bridge", "one row a stage")
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
        legend_below(figure, [Patch(color=VERDICTS[verdict], label=verdict) for verdict in used], columns=3)
    note = f"Dice of {n_text(table['n'])} patients at both ends and its change by each step, with the 95 % bootstrap "
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
    need_columns(table, needed, "calibration", "kdlib.fidelity.calibration with a column arm")
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
    legend_below(figure, handles, columns=entries_beside(names, SINGLE), handlelength=3)
    figure.set_label(
        f"Lines: mean over patients ({n_text(pd.Series(counts))}), each weighted by its pixels' shares in the bins; "
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
    need_columns(table, ["arm", "metric", unit, "value"], "fidelity", "kdlib.fidelity.fidelity with a column arm")
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
                draw_strip(ax, y, values, next(row.itertuples()), method_style(arm))
                counts.append(len(values))
        name_rows(ax, arms, "dice")
        ax.set_ylim(len(arms) - 0.4, -0.7)
        ax.set_xlabel(FIDELITY.get(metric, metric))
        ax.xaxis.get_major_locator().set_params(nbins=4)
    for ax in axes.flat[len(metrics) :]:
        ax.remove()
    means = pd.DataFrame(dict(n=counts))
    figure.set_label(f"Small points: patients, seeds and classes averaged; large ones: {interval_text(means)}.")
    return figure
