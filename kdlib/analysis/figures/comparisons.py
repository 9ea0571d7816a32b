"""Figures that hold arms against each other: ablation, ranking of distillers, the bridge."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kdlib.analysis.figures.style import (
    DOUBLE,
    FAMILY_STYLES,
    HATCHES,
    MM,
    NO_LINE,
    SINGLE,
    STYLE,
    TERMS,
    VERDICTS,
    draw_mean,
    family_of,
    interval_kind,
    interval_text,
    legend_below,
    method_style,
    n_text,
    name_rows,
    need_columns,
)
from kdlib.analysis.metrics import METRICS
from kdlib.analysis.statistics import rows_of, summarise
from kdlib.config import InputError

STABILITY = {"first": "first", "beats": "better"}  # column of `kdlib.analysis.statistics.ranks` -> print


@plt.rc_context(STYLE)
def ablation(table: pd.DataFrame, verdicts: pd.DataFrame | None = None, metric: str = "dice") -> Figure:
    """Each subset of distillation terms, best first: which terms were on, mean and interval, difference to the student.

    Args:
        table: tidy, of one student and one teacher, and the student's baseline if there is one (a dotted line).
        verdicts: from `kdlib.analysis.statistics.compare` by recipe, the rows with b "baseline"; filled points are decided,
            hollow ones inconclusive. None leaves the panel of differences out.
        metric: that both tables are of.

    Raises:
        InputError: a recipe that is no subset of the terms, two of the same subset (filter by loss), several students,
            teachers or label fractions, or verdicts without a baseline.
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
    differences = None if verdicts is None else _against(verdicts, "baseline", list(subsets), "ablation")
    means = summarise(table, ["recipe"], metric)
    means = means.sort_values("mean", ascending=not METRICS[metric].higher, kind="stable").reset_index(drop=True)
    width, ratios = (SINGLE, [1, 2]) if differences is None else (DOUBLE, [1, 2.6, 2.6])
    size = (width, (4.6 * len(means) + 18) * MM)
    figure, (dots, forest, *beside) = plt.subplots(1, len(ratios), figsize=size, sharey=True, width_ratios=ratios)
    for y, row in enumerate(means.itertuples()):
        on = [x for x, term in enumerate(TERMS) if term in subsets[row.recipe]]
        dots.scatter(range(4), [y] * 4, s=5, color="#BBBBBB")
        dots.plot(on, [y] * len(on), color="black", marker="o", markersize=4.5, linewidth=1)
        style = method_style(arms[row.recipe])
        draw_mean(forest, y, row, style)
        if row.recipe == "baseline":
            forest.axvline(row.mean, color=style["color"], linestyle=":", linewidth=0.8, zorder=0)
        elif differences is not None and row.recipe in differences.index:
            _difference(beside[0], y, differences.loc[row.recipe], style)
    name_rows(forest, [""] * len(means), metric)
    dots.set(xticks=range(4), xlim=(-0.6, 3.6))
    dots.set_xticklabels(TERMS, rotation=90)
    dots.tick_params(length=0, labelsize=7, labelleft=False)
    dots.spines[:].set_visible(False)
    note = f"Dark dots: terms that were on. Points and bars: {interval_text(means)}; dotted: the student alone."
    if differences is not None:
        _difference_axis(beside[0], "the student alone", metric)
        note += " Right: " + _difference_note(differences, metric)
    legend_below(figure, [Line2D([], [], label=arm, **method_style(arm) | NO_LINE) for arm in arms.unique()], columns=3)
    figure.set_label(note)
    return figure


def _against(verdicts: pd.DataFrame, reference: str | None, names: Sequence[str], what: str) -> pd.DataFrame:
    """The verdicts on `names` against a reference, by name."""
    needed = ["a", "b", "n", "difference", "low", "high", "verdict"]
    need_columns(verdicts, needed, "verdicts", "kdlib.analysis.statistics.compare")
    found = verdicts[verdicts["b"] == reference].set_index("a")
    if not found.index.intersection(names).size:
        raise InputError(f"{what}: no comparison with the reference {reference!r} in the verdicts; give both")
    return found


def _difference(ax: Axes, y: float, row: pd.Series, style: Mapping[str, str]) -> None:
    whisker = np.maximum([[row["difference"] - row["low"]], [row["high"] - row["difference"]]], 0)
    hollow = {"markerfacecolor": "white"} if row["verdict"] == "inconclusive" else {}
    ax.errorbar(row["difference"], y, xerr=whisker, elinewidth=1.4, **dict(style) | NO_LINE | hollow)


def _difference_axis(ax: Axes, reference: str, metric: str) -> None:
    label, unit, _ = METRICS[metric]
    ax.set_xlabel(f"{label} minus that of {reference}" + (f" ({unit})" if unit else ""))
    ax.axvline(0, color="black", linewidth=0.6, zorder=1)
    ax.xaxis.get_major_locator().set_params(nbins=6)
    ax.tick_params(labelsize=7)
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.5)
    ax.set_axisbelow(True)


def _difference_note(differences: pd.DataFrame, metric: str) -> str:
    return (
        f"mean paired difference ({n_text(differences['n'])}) and "
        f"{interval_kind(differences['n'])}, "
        f"{'higher' if METRICS[metric].higher else 'lower'} is better; hollow: inconclusive by Wilcoxon's signed-rank "
        f"test after Holm's correction for {len(differences)} comparisons."
    )


@plt.rc_context(STYLE)
def ranking(
    ranks: pd.DataFrame, reference: str | None = None, verdicts: pd.DataFrame | None = None, metric: str = "dice"
) -> Figure:
    """Every arm's rank with its interval, best first, the paired difference to a reference, and how stable both are.

    Args:
        ranks: from `kdlib.analysis.statistics.ranks`; its first column names the arms.
        reference: arm that the others are held against; its row is shaded.
        verdicts: from `kdlib.analysis.statistics.compare`, the rows with b = `reference`; filled points are decided, hollow
            ones inconclusive. None leaves the panel of differences out.
        metric: that both tables are of.

    Raises:
        InputError: no rows, a reference that is not ranked or not given, or no comparison with it.
    """
    need_columns(
        ranks, ["n", "mean", "rank", "rank_low", "rank_high", "first"], "ranks", "kdlib.analysis.statistics.ranks"
    )
    names = list(ranks.sort_values(["rank", "mean"], kind="stable").iloc[:, 0])
    rows = ranks.set_index(ranks.columns[0]).loc[names]
    if reference is not None and reference not in names:
        raise InputError(f"ranking: no reference {reference!r} among {', '.join(names)}")
    differences = None if verdicts is None else _against(verdicts, reference, names, "ranking")
    label = METRICS[metric].label
    families = {family_of(name): method_style(name) for name in names}
    shares = [column for column in STABILITY if column in rows]
    ratios = [1] + [1] * (differences is not None) + [0.19 * len(shares)]
    size = (DOUBLE, (4.4 * len(names) + 28) * MM)
    figure, (left, *middle, right) = plt.subplots(1, len(ratios), figsize=size, sharey=True, width_ratios=ratios)
    for y, row in enumerate(rows.itertuples()):
        whisker = np.maximum([[row.rank - row.rank_low], [row.rank_high - row.rank]], 0)
        left.errorbar(row.rank, y, xerr=whisker, elinewidth=1.4, **method_style(row.Index) | NO_LINE)
    name_rows(left, [f"{name}  {mean:.3f}" for name, mean in zip(names, rows["mean"], strict=True)], metric)
    left.set(xlabel=f"rank by mean {label} (1 = best)", xlim=(0.4, 1.03 * len(names) + 0.6))
    left.set_ylim(len(names) - 0.4, -0.7)
    left.xaxis.get_major_locator().set_params(integer=True)
    note = f"Beside the names: mean {label} over patients ({n_text(rows['n'])}). Left: rank of the mean and 95 % "
    note += "percentile interval over a bootstrap of the patients."
    if differences is not None:
        _ranked_differences(middle[0], differences, names)
        _difference_axis(middle[0], reference, metric)
        note += " Middle: " + _difference_note(differences, metric)
    _stability(right, rows[shares])
    note += " Right: per cent of the resamples in which the arm came first"
    note += f", and in which it was better than {reference}." if "beats" in shares else "."
    if reference is not None:
        y = names.index(reference)
        for ax in (left, *middle):
            ax.axhspan(y - 0.5, y + 0.5, color="#EEEEEE", linewidth=0, zorder=-1)
    if set(families) - {""}:
        known = [family for family in FAMILY_STYLES if family in families]
        handles = [Line2D([], [], label=family, **families[family] | NO_LINE) for family in known]
        legend_below(figure, handles, columns=len(handles))
    figure.set_label(note)
    return figure


def _ranked_differences(ax: Axes, differences: pd.DataFrame, names: Sequence[str]) -> None:
    """Differences in the order of `names`; a far outlier is named at the edge, lest it flatten all others."""
    shown = differences.loc[[name for name in names if name in differences.index]]
    far = shown["difference"].abs() > _cut(shown)
    far &= shown["difference"].abs() > 1.5 * shown.loc[~far, ["difference", "low", "high"]].abs().max(axis=None)
    reached = shown.loc[~far, ["difference", "low", "high"]].to_numpy()
    low, high = np.nanmin(np.append(reached, 0)), np.nanmax(np.append(reached, 0))
    span = max(high - low, 1e-3)
    low -= span * (0.3 if (shown.loc[far, "difference"] < 0).any() else 0.05)
    high += span * (0.3 if (shown.loc[far, "difference"] > 0).any() else 0.05)
    for y, name in enumerate(names):
        if name not in shown.index:
            continue
        row = shown.loc[name]
        if far[name]:
            above, text = row["difference"] > 0, f"{row['difference']:+.2f}".replace("-", "\N{MINUS SIGN}")
            text = f"{text} \N{RIGHTWARDS ARROW}" if above else f"\N{LEFTWARDS ARROW} {text}"
            ax.text(high if above else low, y, text, ha="right" if above else "left", va="center", fontsize=7)
        else:
            _difference(ax, y, row, method_style(name))
    ax.set_xlim(low, high)


def _stability(ax: Axes, shares: pd.DataFrame) -> None:
    """Shares of resamples as per cent, the larger the darker."""
    edges = [np.arange(length + 1) - 0.5 for length in shares.shape[::-1]]
    ax.pcolormesh(*edges, shares.to_numpy(float), cmap="Greys", vmin=0, vmax=2, linewidth=0)
    for (y, x), share in np.ndenumerate(shares.to_numpy(float)):
        if not np.isnan(share):
            ax.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
    ax.set_xticks(range(shares.shape[1]), [STABILITY[column] for column in shares])
    ax.set_xlabel("% of\nresamples", fontsize=7)
    ax.tick_params(length=0, labelsize=7, labelleft=False)
    ax.spines[:].set_visible(False)


def _cut(differences: pd.DataFrame) -> float:
    """Beyond which a difference is far: infinite, or what holds all that is not far from the usual."""
    reach = differences[["low", "high"]].abs().max(axis=1).fillna(differences["difference"].abs())
    usual = reach <= 6 * reach.median()
    return np.inf if usual.all() or not reach.median() else 1.25 * reach[usual].max()


@plt.rc_context(STYLE)
def waterfall(table: pd.DataFrame, double: bool = True) -> Figure:
    """The bridge: the mean at its start and at its end, and between them what each step changed.

    Args:
        table: from `kdlib.analysis.statistics.step_changes`, one row a stage in order: step (label), dice (mean after the step),
            difference (to the stage before), low, high, p_adjusted, verdict and n. The first row is the start; the last
            the end, whose Dice is that of the stage before it, and whose difference, if not NaN, is the whole change
            from the start (told in the note).
        double: drawn for a page's width, else for a column's.

    Raises:
        InputError: fewer than two rows, a missing column, or differences that do not lead from each mean to the next.
    """
    needed = ["step", "dice", "difference", "low", "high", "p_adjusted", "verdict", "n"]
    need_columns(table, needed, "bridge", "kdlib.analysis.statistics.step_changes (notebook 05)")
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
        look = dict(color=VERDICTS[verdict], hatch=HATCHES.get(verdict), edgecolor="white", linewidth=0)
        ax.barh(place, row.dice - start, 4, start, **look, zorder=2)
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
        looks = {verdict: dict(facecolor=VERDICTS[verdict], hatch=HATCHES.get(verdict)) for verdict in used}
        handles = [Patch(label=verdict, edgecolor="white", linewidth=0, **looks[verdict]) for verdict in used]
        legend_below(figure, handles, columns=3)
    note = f"Dice of {n_text(table['n'])} patients at both ends and its change by each step, with the 95 % bootstrap "
    note += "interval of the paired difference; the mean over patients, or, as long as that fault is kept, that of "
    note += f"their pooled voxels. Verdicts: patients' values swapped at random, in all {last} changes "
    note += f"at once (p below 0.05). The axis begins at {edge:.2f}."
    whole = rows[last]
    if pd.notna(whole.low):
        note += f" From start to end: {whole.difference:+.3f} [{whole.low:+.3f}, {whole.high:+.3f}], {whole.verdict}."
    figure.set_label(note)
    return figure
