"""Figures of what the methods reached on the test patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from kdlib.analysis.figures.style import (
    DOUBLE,
    MM,
    NO_LINE,
    SINGLE,
    STYLE,
    bar_lengths,
    draw_strip,
    entries_beside,
    interval_kind,
    interval_text,
    legend_below,
    log_axis,
    method_style,
    n_text,
    name_rows,
    need_columns,
    p_text,
    spread,
)
from kdlib.analysis.metrics import METRICS
from kdlib.analysis.statistics import THESIS_TABLE, interval, per_patient, rows_of, summarise
from kdlib.config import InputError

FIDELITY = {  # metric of kdlib.evaluation.agreement -> print
    "agreement": "Dice with the teacher", "band_agreement": "agreement at the boundary",
    "error_overlap": "Dice of both's errors", "cka": "CKA with the teacher", "ece": "calibration error",
}  # fmt: skip
COSTS = {  # column of the cost table -> (label, its unit)
    "inference_parameters": ("parameters (millions)", 1e6), "gflops": ("GFLOPs a slice", 1),
    "latency_ms": ("CPU latency (ms a slice)", 1),
}  # fmt: skip
DIRECTIONS = {  # of a patient's change, for lines
    "better or equal": dict(color="#0072B2", linewidth=0.8, linestyle="-", alpha=0.7),
    "worse": dict(color="#D55E00", linewidth=0.8, linestyle="--", alpha=0.9),
}


@plt.rc_context(STYLE)
def dice_per_method(table: pd.DataFrame, metric: str = "dice") -> Figure:
    """Every patient's value for each arm, with mean and interval.

    Raises:
        InputError: see `kdlib.analysis.statistics.per_patient`.
    """
    means = summarise(table, metric=metric)
    values = per_patient(table, metric).pivot(index="patient", columns="arm", values="value")[list(means["arm"])]
    figure, ax = plt.subplots(figsize=(SINGLE, (7 * len(means) + 16) * MM))
    heights = np.arange(len(means)) + spread(len(values))[:, None]
    ax.plot(values.T, heights.T, color="#BBBBBB", linewidth=0.35, zorder=1)
    for y, row in enumerate(means.itertuples()):
        draw_strip(ax, y, values[row.arm], row, method_style(row.arm))
    name_rows(ax, means["arm"], metric)
    figure.set_label(
        f"Small points: patients, seeds averaged, thin lines from arm to arm; large ones: {interval_text(means)}."
    )
    return figure


@plt.rc_context(STYLE)
def slopes(table: pd.DataFrame, verdicts: pd.DataFrame, metric: str = "dice") -> Figure:
    """Every patient's value under a student and under its distilled twin, a panel a pair.

    Args:
        table: tidy.
        verdicts: from `kdlib.analysis.statistics.compare`: a the distilled student (drawn on the right), b the student.
        metric: that the verdicts are of.

    Raises:
        InputError: no verdicts, or an arm of theirs that the table lacks; see also `kdlib.analysis.statistics.per_patient`.
    """
    need_columns(verdicts, ["a", "b", "n", "difference", "low", "high", "p_holm", "verdict"], "verdicts", "compare's")
    values = per_patient(table, metric).pivot(index="patient", columns="arm", values="value")
    missing = sorted({*verdicts["a"], *verdicts["b"]} - set(values))
    if missing:
        raise InputError(f"slopes: no arm {', '.join(missing)} in the table: it has {', '.join(values)}")
    label, unit, higher = METRICS[metric]
    columns = min(4, len(verdicts))
    lines = -(-len(verdicts) // columns)
    width = SINGLE if columns < 3 else DOUBLE
    figure, axes = plt.subplots(
        lines, columns, figsize=(width, (58 * lines + 8) * MM), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.06}
    )
    for ax, row in zip(axes.flat, verdicts.itertuples(), strict=False):
        pairs = values[[row.b, row.a]].dropna()
        change = (pairs[row.a] - pairs[row.b]).round(12) * (1 if higher else -1)
        for look, some in ((DIRECTIONS["worse"], change < 0), (DIRECTIONS["better or equal"], change >= 0)):
            ax.plot([0, 1], pairs[some].T, **look)
        ax.plot([0, 1], pairs.mean(), color="black", linewidth=2, zorder=3)
        for x, arm in enumerate((row.b, row.a)):
            style = dict(method_style(arm)) | NO_LINE | {"markersize": 7, "markeredgecolor": "white", "zorder": 4}
            ax.plot(x, pairs[arm].mean(), **style)
        bounds = "" if np.isnan(row.low) else f"\n[{row.low:+.3f}, {row.high:+.3f}]"
        title = f"{row.difference:+.3f}{bounds}\n{p_text(row.p_holm)}, {row.verdict}"
        ax.set_title(title.replace("-", "\N{MINUS SIGN}"), fontsize=7)
        ax.set(xticks=[0, 1], xlim=(-0.25, 1.25))
        ax.set_xticklabels([name.replace("(", "\n(", 1) for name in (row.b, row.a)])
        ax.tick_params(labelsize=7)
        ax.grid(axis="y", color="#DDDDDD", linewidth=0.5)
    for ax in axes[:, 0]:
        ax.set_ylabel(f"{label} ({unit})" if unit else label)
    for ax in axes.flat[len(verdicts) :]:
        ax.remove()
    handles = [Line2D([], [], label=name, **look) for name, look in DIRECTIONS.items()]
    legend_below(figure, [*handles, Line2D([], [], color="black", linewidth=2, label="mean")], columns=3)
    figure.set_label(
        f"Lines: patients ({n_text(verdicts['n'])}), seeds averaged. Above: mean paired difference with its "
        f"{interval_kind(verdicts['n'])}, and p of Wilcoxon's signed-rank test after Holm's correction "
        f"for {len(verdicts)} comparisons."
    )
    return figure


def choose_cases(table: pd.DataFrame, arm: str) -> dict[str, str]:
    """The cases of an arm's best, median and worst Dice: rule -> case; two cases have no median, one is the best.

    Raises:
        InputError: the arm has no Dice in the table; see also `kdlib.analysis.statistics.per_patient`.
    """
    values = per_patient(table, "dice", ["arm", "case"]).dropna()
    order = list(values[values["arm"] == arm].sort_values("value", kind="stable")["case"])
    if not order:
        raise InputError(f"no arm {arm!r} in the table: it has {', '.join(table['arm'].unique())}")
    chosen = {"best": order[-1], "median": order[(len(order) - 1) // 2], "worst": order[0]}
    rules = {1: ["best"], 2: ["best", "worst"]}.get(len(order), chosen)
    return {rule: chosen[rule] for rule in rules}


@plt.rc_context(STYLE)
def dice_against_parameters(
    table: pd.DataFrame, params: Mapping[str, int], thesis: pd.DataFrame | None = THESIS_TABLE
) -> Figure:
    """Dice against the number of parameters; the thesis's own numbers as hollow markers.

    Arms of equal size stand side by side about their true place.

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
    figure, ax = plt.subplots(figsize=(SINGLE, 95 * MM))
    points = None if thesis is None else thesis["params"]
    _frontier(ax, means, {arm: count / 1e6 for arm, count in params.items()}, thesis, points)
    ax.set(xlabel="parameters (millions)", ylabel="Dice")
    legend_below(figure, _frontier_legend(means, thesis), columns=3)
    figure.set_label(_frontier_note(means, thesis))
    return figure


@plt.rc_context(STYLE)
def efficiency(table: pd.DataFrame, cost: pd.DataFrame, thesis: pd.DataFrame | None = THESIS_TABLE) -> Figure:
    """Dice against what a network costs where it is used: parameters, arithmetic, and latency on a CPU.

    Args:
        table: tidy, with a column model.
        cost: one row a (model, size): model, size ("study" as trained here, or "thesis": full width, 256 x 256),
            inference_parameters, gflops of a slice, latency_ms and threads.
        thesis: column dice by arm, drawn at the cost of size "thesis"; None leaves it out.

    Raises:
        InputError: a missing column, or a model without its cost.
    """
    need_columns(cost, ["model", "size", *COSTS, "threads"], "cost", "tables/02_cost.csv of notebook 02")
    need_columns(table, ["model", "arm"], "efficiency", "`Results.cases`")
    means = summarise(table)
    models = dict(zip(table["arm"], table["model"], strict=True))
    sizes = {size: rows.set_index("model") for size, rows in cost.groupby("size")}
    missing = sorted(set(models.values()) - set(sizes.get("study", pd.DataFrame()).index))
    if missing:
        raise InputError(f"efficiency: no cost of {', '.join(missing)} in size study; run notebook 02 again")
    figure, axes = plt.subplots(1, len(COSTS), figsize=(DOUBLE, 78 * MM), sharey=True)
    for ax, (name, (label, unit)) in zip(axes, COSTS.items(), strict=True):
        points = None
        if thesis is not None:
            students = [arm.split(", ")[-1].rstrip(")") for arm in thesis.index]
            points = pd.Series(sizes["thesis"][name].reindex(students).to_numpy() / unit, thesis.index)
        _frontier(ax, means, {arm: sizes["study"][name][model] / unit for arm, model in models.items()}, thesis, points)
        ax.set_xlabel(label)
    axes[0].set_ylabel("Dice")
    legend_below(figure, _frontier_legend(means, thesis), columns=6)
    threads = " or ".join(map(str, sorted(cost["threads"].unique())))
    figure.set_label(
        f"{_frontier_note(means, thesis)} Costs are of one slice, without a teacher's reconstruction decoder; latency: "
        f"median, batch 1, {threads} thread{'s' * (threads != '1')}."
    )
    return figure


def _frontier(
    ax: Axes, means: pd.DataFrame, cost: Mapping[str, float], thesis: pd.DataFrame | None, at: pd.Series | None
) -> None:
    """Means against a cost on a log axis, a stair through those that no cheaper arm reaches, the thesis's hollow."""
    costs = means["arm"].map(cost)
    known = costs if at is None else pd.concat([costs, at])
    low, high = known.min(), known.max()
    apart = (2 * high / low) ** 0.03  # factor between arms of equal cost
    best = means.assign(cost=costs).sort_values(["cost", "mean"], ascending=[True, False])
    best = best[best["mean"] > best["mean"].cummax().shift(fill_value=-np.inf)]
    ax.plot(best["cost"], best["mean"], color="#BBBBBB", drawstyle="steps-post", linewidth=1, zorder=0)
    for row, x in zip(means.itertuples(), _side_by_side(costs, apart), strict=True):
        ax.errorbar(x, row.mean, yerr=bar_lengths(row), elinewidth=1, **method_style(row.arm) | NO_LINE)
    if thesis is not None:
        for arm, x in zip(thesis.index, _side_by_side(at, apart), strict=True):
            ax.plot(x, thesis["dice"][arm], **method_style(arm) | NO_LINE | {"markerfacecolor": "none"})
    log_axis(ax.xaxis, low / apart**3, high * apart**3)
    ax.tick_params(labelsize=7)
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.5)
    ax.set_axisbelow(True)


def _side_by_side(costs: pd.Series, apart: float) -> np.ndarray:
    """Equal costs set apart by a factor, about their true place."""
    groups = costs.groupby(costs)
    return (costs * apart ** (groups.cumcount() - (groups.transform("size") - 1) / 2)).to_numpy()


def _frontier_legend(means: pd.DataFrame, thesis: pd.DataFrame | None) -> list[Line2D]:
    handles = [Line2D([], [], label=arm, **method_style(arm) | NO_LINE) for arm in means["arm"]]
    hollow = Line2D([], [], color="#555555", marker="o", label="hollow: thesis", **NO_LINE, markerfacecolor="none")
    return handles + [hollow] * (thesis is not None)


def _frontier_note(means: pd.DataFrame, thesis: pd.DataFrame | None) -> str:
    note = f"Points and bars: {interval_text(means)}; arms of equal cost stand side by side about it. Stair: the best "
    note += "mean Dice at no more than that cost."
    return note + (" Hollow: the thesis's single runs, pixels of its test set pooled." if thesis is not None else "")


@plt.rc_context(STYLE)
def reliability(table: pd.DataFrame) -> Figure:
    """How often the class is there against the probability it was given, a line an arm, and where the pixels are.

    A case counts by the shares of its own pixels that lie in each bin, so that large organs do not decide the curve.

    Args:
        table: from `kdlib.evaluation.agreement.calibration`, with a column arm; seeds and folds of an arm are taken together.

    Raises:
        InputError: a missing column, or no pixel in any bin.
    """
    needed = ["arm", "case", "class", "bin", "confidence", "accuracy", "count"]
    need_columns(table, needed, "calibration", "kdlib.evaluation.agreement.calibration with a column arm")
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
            redrawn = (drawn @ sums) / (drawn @ shares)
        filled = shares.sum(0) > 0
        band = np.nanquantile(redrawn[:, filled], [0.025, 0.975], axis=0)
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
        table: columns arm, metric (of `kdlib.evaluation.agreement`, or "cka"), case (or patient) and value; over seeds, classes
            and whatever else a case has several values for, values are averaged within the patient. For CKA, which has
            no cases, give the fold as case.

    Raises:
        InputError: a missing column, or no defined value.
    """
    unit = "patient" if "patient" in table else "case"
    need_columns(
        table, ["arm", "metric", unit, "value"], "fidelity", "kdlib.evaluation.agreement.fidelity with a column arm"
    )
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


@plt.rc_context(STYLE)
def failure(table: pd.DataFrame, cases: pd.DataFrame, arms: Sequence[str] | None = None) -> Figure:
    """Where the arms fail: every patient's Dice against the target's volume and the thickness of the slices.

    Patients are grouped, by thirds of the volume (halves or none where they are few) and by thickness; lines join the
    groups' means. A data set of one thickness has no second panel.

    Args:
        table: tidy, with the metrics dice and truth_volume.
        cases: columns case and "thickness (mm)", as notebook 00 saves them.
        arms: which to draw, by default all.

    Raises:
        InputError: a missing column, metric or arm, or a case whose thickness is not known.
    """
    need_columns(cases, ["case", "thickness (mm)"], "cases", "tables/00_data_cases.csv; run notebook 00 again")
    known = per_patient(table, "dice")
    arms = list(known["arm"].unique()) if arms is None else list(arms)
    missing = [arm for arm in arms if arm not in set(known["arm"])]
    if missing:
        raise InputError(
            f"failure: no arm {', '.join(missing)} in the table: it has {', '.join(known['arm'].unique())}"
        )
    wide = known.pivot(index="patient", columns="arm", values="value")[arms].dropna()
    rows = rows_of(table, "truth_volume", ["arm"])
    owner = rows.drop_duplicates("case").set_index("case")["patient" if "patient" in rows else "case"]
    volume = rows.groupby(["case", "class"])["value"].mean().groupby("case").sum()
    thickness = cases.set_index("case")["thickness (mm)"].reindex(owner.index)
    if thickness.isna().any():
        unknown = ", ".join(thickness.index[thickness.isna()])
        raise InputError(f"failure: no thickness of cases {unknown}; run notebook 00 of this study again")
    volume, thickness = (of.groupby(owner).mean().loc[wide.index] for of in (volume, thickness.round(2)))
    wide, volume, thickness = (of[volume > 0] for of in (wide, volume, thickness))  # log axis; no target, no failure
    if wide.empty:
        raise InputError("failure: no patient with a target and a Dice of every arm")
    several = thickness.nunique() > 1
    figure, axes = plt.subplots(
        1, 1 + several, figsize=(DOUBLE if several else SINGLE, 75 * MM), sharey=True, squeeze=False
    )
    thirds = pd.qcut(volume.rank(method="first"), min(3, max(1, len(volume) // 4)), labels=False)
    low, high = volume.min() / 1.1, volume.max() * 1.1
    left, step = axes[0, 0], (high / low) ** 0.02
    _groups(left, wide, volume, thirds, volume.groupby(thirds).median(), lambda x, move: x * step**move)
    ends = volume.groupby(thirds).agg(["min", "max"])
    for edge in np.sqrt(ends["min"].to_numpy()[1:] * ends["max"].to_numpy()[:-1]):
        left.axvline(edge, color="#BBBBBB", linewidth=0.6, linestyle=":", zorder=0)
    for group, place in volume.groupby(thirds).median().items():
        where = dict(xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7)
        left.annotate(f"n = {(thirds == group).sum()}", (place, 1.0), **where)
    log_axis(left.xaxis, low, high)
    left.set(xlabel="true volume (ml)", ylabel="Dice")
    note, sizes = _correlations(wide, volume, "volume"), list(thirds.value_counts())
    if several:
        sharp = thickness
        if thickness.nunique() > 5:  # thirds, each at its median
            sharp = thickness.groupby(pd.qcut(thickness, 3, labels=False, duplicates="drop")).transform("median")
        levels = {level: number for number, level in enumerate(sorted(sharp.unique()))}
        at = sharp.map(levels).astype(float)
        places = pd.Series(levels.values(), levels.values())
        _groups(axes[0, 1], wide, at + 0.3 * spread(len(at)), at, places, lambda x, move: x + 0.13 * move)
        counts = sharp.value_counts()
        sizes += list(counts)
        axes[0, 1].set(xlabel="slice thickness (mm)", xlim=(-0.5, len(levels) - 0.5), xticks=range(len(levels)))
        axes[0, 1].set_xticklabels([f"{level:g}\nn = {counts[level]}" for level in levels])
        note += " " + _correlations(wide, thickness, "thickness")
    else:
        note += f" All slices are {thickness.iloc[0]:g} mm thick."
    handles = [Line2D([], [], label=arm, **method_style(arm)) for arm in arms]
    legend_below(figure, handles, columns=entries_beside(arms, figure.get_figwidth()), handlelength=3)
    figure.set_label(
        f"Small points: patients (n = {len(wide)}), seeds and classes averaged; large ones: means of groups of them "
        f"and {interval_kind(sizes)}. {note}"
    )
    return figure


def _groups(ax: Axes, wide: pd.DataFrame, at: pd.Series, group: pd.Series, places: pd.Series, apart: Callable) -> None:
    """Patients at `at`, and the means of their groups at `places`, those of the arms moved by `apart(x, move)`."""
    for number, arm in enumerate(wide):
        move, style = number - (len(wide.columns) - 1) / 2, method_style(arm)
        ax.scatter(at, wide[arm], s=9, color=style["color"], marker=style["marker"], alpha=0.45, linewidth=0)
        means = wide[arm].groupby(group).mean()
        bounds = np.array([interval(values) for _, values in wide[arm].groupby(group)]).T
        bars = np.maximum([means - bounds[0], bounds[1] - means], 0)
        x = apart(places.loc[means.index], move)
        ax.errorbar(x, means, yerr=bars, elinewidth=1, markersize=6, zorder=3, **style)
    ax.tick_params(labelsize=7)
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.5)
    ax.set_axisbelow(True)


def _correlations(wide: pd.DataFrame, with_: pd.Series, name: str) -> str:
    """Spearman's rank correlation of each arm's Dice with something, its interval (Fieller, Hartley & Pearson,
    Biometrika 1957) and p, as text."""
    if len(wide) < 6 or with_.nunique() < 2:
        return f"Too few patients for a correlation with {name}."
    texts = []
    for arm in wide:
        if np.ptp(wide[arm]) < 1e-12:
            texts.append(f"{arm} none, its Dice is constant")
            continue
        rho, p = stats.spearmanr(with_, wide[arm])
        if len(wide) < 10:  # too few for Student's t
            exact = stats.permutation_test(
                (with_,), lambda x, y=wide[arm]: stats.spearmanr(x, y).statistic, permutation_type="pairings",
                vectorized=False, n_resamples=999, rng=np.random.default_rng(0),
            )  # fmt: skip
            p = exact.pvalue
        centre, width = np.arctanh(np.clip(rho, -0.9999, 0.9999)), 1.96 * np.sqrt(1.06 / (len(wide) - 3))
        low, high = np.tanh([centre - width, centre + width])
        texts.append(f"{arm} {rho:+.2f} [{low:+.2f}, {high:+.2f}], {p_text(p)}".replace("-", "\N{MINUS SIGN}"))
    return f"Spearman's correlation of Dice with {name}, 95 % interval and p: {'; '.join(texts)}."
