"""Figures that compare methods with each other: ablation, ranking of losses, cumulative correction."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.analysis.figures import style
from kdlib.analysis.intervals import interval_text
from kdlib.analysis.labels import methods
from kdlib.analysis.metrics import METRICS
from kdlib.analysis.patients import patients_text, rows_of
from kdlib.analysis.tables import small_sample_note, summarise
from kdlib.config import InputError

DIFFERENCE = ["a", "b", "n", "difference", "low", "high", "interval", "verdict"]
STABILITY = {"first": "first", "beats": "better"}  # column of `kdlib.analysis.statistics.ranks` -> print


@plt.rc_context(style.STYLE)
def ablation(table: pd.DataFrame, verdicts: pd.DataFrame | None = None, metric: str = "dice") -> Figure:
    """Each subset of distillation terms, best first: which terms were on, mean and interval, difference to the student.

    Args:
        table: tidy, of one student and one teacher, and the student's baseline if there is one (a dotted line).
        verdicts: from `kdlib.analysis.statistics.compare`, the rows with the baseline as b; filled points are decided,
            hollow ones are not. None leaves the panel of differences out.
        metric: that both tables are of.

    Raises: InputError: terms that are none of the thesis's, two methods with the same terms (filter by loss), several
        students, teachers or label fractions, or verdicts without a baseline.
    """
    rows_of(table, metric, ["method"])
    found = methods(table)
    subsets = {method: set(filter(None, terms.split("+"))) for method, terms in found["terms"].items()}
    for method, terms in subsets.items():
        if not terms <= set(style.TERMS):
            raise InputError(f"ablation: {method!r} has other terms than {', '.join(style.TERMS)}; filter the table")
        if list(subsets.values()).count(terms) > 1:
            raise InputError(f"ablation: {method!r} has the terms of another method; filter the table")
    if found["model"].nunique() > 1 or found.loc[found["teacher"] != "", "teacher"].nunique() > 1:
        raise InputError("ablation: the table has several students or teachers; filter it")
    baseline = next((method for method, terms in subsets.items() if not terms), None)
    differences = None if verdicts is None else _with_reference(verdicts, baseline, list(subsets), "ablation")
    means = summarise(table, metric=metric)
    means = means.sort_values("mean", ascending=not METRICS[metric].higher, kind="stable").reset_index(drop=True)
    styles = {  # one for all subsets: what differs is drawn as dots
        label: next(iter(style.method_styles(table[table["method"] == method]).values()))
        for label, method in (("distilled", next((m for m in subsets if m != baseline), None)), ("baseline", baseline))
        if method is not None
    }
    width, ratios = (style.SINGLE, [1, 2]) if differences is None else (style.DOUBLE, [1, 2.6, 2.6])
    size = (width, (4.6 * len(means) + 18) * style.MM)
    figure, (dots, forest, *beside) = plt.subplots(1, len(ratios), figsize=size, sharey=True, width_ratios=ratios)
    for y, row in enumerate(means.itertuples()):
        on = [x for x, term in enumerate(style.TERMS) if term in subsets[row.method]]
        dots.scatter(range(4), [y] * 4, s=5, color=style.VERDICTS["inconclusive"])
        dots.plot(on, [y] * len(on), color="black", marker="o", markersize=4.5, linewidth=1)
        look = styles["baseline" if row.method == baseline else "distilled"]
        style.draw_mean(forest, y, row.mean, row.low, row.high, look)
        if row.method == baseline:
            forest.axvline(row.mean, color=look["color"], linestyle=":", linewidth=0.8, zorder=0)
        elif differences is not None and row.method in differences.index:
            _difference(beside[0], y, differences.loc[row.method], look)
    style.name_rows(forest, [""] * len(means), METRICS[metric].heading)
    dots.set(xticks=range(4), xlim=(-0.6, 3.6))
    dots.set_xticklabels(style.TERMS, rotation=90)
    dots.tick_params(length=0, labelleft=False)
    dots.spines[:].set_visible(False)
    note = f"Dark dots: terms that were on. Points and bars: {style.mean_text(means)}; dotted: the student without a "
    note += "teacher."
    if differences is not None:
        _difference_axis(beside[0], "the student without a teacher", metric)
        note += " Right: " + _difference_note(differences, metric)
    style.legend_below(figure, style.legend_lines(styles, **style.NO_LINE))
    figure.set_label(note)
    return figure


def _with_reference(verdicts: pd.DataFrame, reference: str | None, names: Sequence[str], what: str) -> pd.DataFrame:
    """The verdicts on `names` compared with a reference, by name."""
    style.need_columns(verdicts, DIFFERENCE, "verdicts", "kdlib.analysis.statistics.compare")
    found = verdicts[verdicts["b"] == reference].set_index("a")
    if not found.index.intersection(names).size:
        raise InputError(f"{what}: no comparison with the reference {reference!r} in the verdicts; give both")
    return found


def _difference(ax: Axes, y: float, row: pd.Series, look: Mapping[str, str]) -> None:
    decided = {} if row["verdict"] in ("better", "worse") else {"markerfacecolor": "white"}
    look = dict(look) | style.NO_LINE | decided
    style.draw_interval(ax, y, *row[["difference", "low", "high"]], elinewidth=1.4, **look)


def _difference_axis(ax: Axes, reference: str, metric: str) -> None:
    label, unit, _ = METRICS[metric]
    ax.set_xlabel(f"{label} minus that of {reference}" + (f" ({unit})" if unit else ""))
    ax.axvline(0, color="black", linewidth=0.6, zorder=1)
    ax.xaxis.get_major_locator().set_params(nbins=6)
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.grid(axis="x")


def _difference_note(differences: pd.DataFrame, metric: str) -> str:
    direction = "higher" if METRICS[metric].higher else "lower"
    counts = patients_text(differences["n"], differences.get("volumes", ()))
    note = f"mean paired difference ({counts}) and {interval_text(differences['interval'])}, {direction} is better; "
    note += "hollow: not decided by Wilcoxon's signed-rank test after Holm's correction for "
    return f"{note}{len(differences)} comparisons. {small_sample_note(differences)}".strip()


@plt.rc_context(style.STYLE)
def ranking(
    ranks: pd.DataFrame, reference: str | None = None, verdicts: pd.DataFrame | None = None, metric: str = "dice"
) -> Figure:
    """Every method's rank with its interval, best first, the paired difference to a reference, and how stable both are.

    Args:
        ranks: from `kdlib.analysis.statistics.ranks`, by method.
        reference: method that the others are compared with; its row is shaded.
        verdicts: from `kdlib.analysis.statistics.compare`, the rows with b = `reference`; filled points are decided,
            hollow ones are not. None leaves the panel of differences out.
        metric: that both tables are of.

    Raises: InputError: no rows, a reference that is not ranked or not given, or no comparison with it.
    """
    needed = ["method", "label", "n", "mean", "rank", "rank_low", "rank_high", "first"]
    style.need_columns(ranks, needed, "ranks", "kdlib.analysis.statistics.ranks")
    rows = ranks.sort_values(["rank", "mean"], kind="stable").set_index("method")
    names = list(rows.index)
    if reference is not None and reference not in names:
        raise InputError(f"ranking: no reference {reference!r} among {', '.join(names)}")
    differences = None if verdicts is None else _with_reference(verdicts, reference, names, "ranking")
    label, styles = METRICS[metric].label, style.method_styles(ranks)
    shares = [column for column in STABILITY if column in rows]
    ratios = [1] + [1] * (differences is not None) + [0.19 * len(shares)]
    size = (style.DOUBLE, (4.4 * len(names) + 28) * style.MM)
    figure, (left, *middle, right) = plt.subplots(1, len(ratios), figsize=size, sharey=True, width_ratios=ratios)
    for y, row in enumerate(rows.itertuples()):
        look = styles[row.Index] | style.NO_LINE
        style.draw_interval(left, y, row.rank, row.rank_low, row.rank_high, elinewidth=1.4, **look)
    entries = [f"{row.label}  {row.mean:.3f}" for row in rows.itertuples()]
    style.name_rows(left, entries, f"rank by mean {label} (1 = best)")
    left.set_xlim(0.4, 1.03 * len(names) + 0.6)
    left.xaxis.get_major_locator().set_params(integer=True)
    note = f"Beside the names: mean {label} over patients ({patients_text(rows['n'])}). Left: rank of the mean and "
    note += "95 % percentile interval over a bootstrap of the patients."
    if differences is not None:
        _ranked_differences(middle[0], differences, styles, names)
        _difference_axis(middle[0], rows.loc[reference, "label"], metric)
        note += " Middle: " + _difference_note(differences, metric)
    _stability(right, rows[shares])
    note += " Right: per cent of the resamples in which the method came first"
    note += f", and in which it was better than {rows.loc[reference, 'label']}." if "beats" in shares else "."
    if reference is not None:
        y = names.index(reference)
        for ax in (left, *middle):
            ax.axhspan(y - 0.5, y + 0.5, color="#EEEEEE", linewidth=0, zorder=-1)
    seen = {styles[row.Index]["color"]: style.family_of(row) for row in methods(ranks).itertuples()}
    used = {family for colour, family in seen.items() if family and style.FAMILIES[family][1] == colour}
    if used - {"control"}:
        shown = [entry for family, entry in style.FAMILIES.items() if family in used]
        looks = {name: dict(color=colour, marker=marker) for name, colour, marker in shown}
        style.legend_below(figure, style.legend_lines(looks, **style.NO_LINE), columns=len(shown))
    figure.set_label(note)
    return figure


def _ranked_differences(ax: Axes, differences: pd.DataFrame, styles: Mapping, names: Sequence[str]) -> None:
    """Differences in the order of `names`; a far outlier is named at the edge, lest it flatten all others."""
    shown = differences.loc[[name for name in names if name in differences.index]]
    bounds = ["difference", "low", "high"]
    reach = shown[["low", "high"]].abs().max(axis=1).fillna(shown["difference"].abs())
    usual = reach <= 6 * reach.median()
    far = pd.Series(False, shown.index)
    if not usual.all() and reach.median():
        size = shown["difference"].abs()
        far = size > 1.25 * reach[usual].max()
        far &= size > 1.5 * shown.loc[~far, bounds].abs().max(axis=None)
    reached = np.append(shown.loc[~far, bounds].to_numpy(), 0)
    low, high = np.nanmin(reached), np.nanmax(reached)
    span = max(high - low, 1e-3)
    low -= span * (0.3 if (shown.loc[far, "difference"] < 0).any() else 0.05)
    high += span * (0.3 if (shown.loc[far, "difference"] > 0).any() else 0.05)
    for name, row in shown.iterrows():
        y = names.index(name)
        if far[name]:
            above, text = row["difference"] > 0, style.signed(f"{row['difference']:+.2f}")
            text = f"{text} \N{RIGHTWARDS ARROW}" if above else f"\N{LEFTWARDS ARROW} {text}"
            ax.text(high if above else low, y, text, ha="right" if above else "left", va="center", fontsize=7)
        else:
            _difference(ax, y, row, styles[name])
    ax.set_xlim(low, high)


def _stability(ax: Axes, shares: pd.DataFrame) -> None:
    """Shares of resamples as per cent, the larger the darker."""
    values = shares.to_numpy(float)
    edges = [np.arange(length + 1) - 0.5 for length in values.shape[::-1]]
    ax.pcolormesh(*edges, values, cmap="Greys", vmin=0, vmax=2, linewidth=0)
    for (y, x), share in np.ndenumerate(values):
        if not np.isnan(share):
            ax.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
    ax.set_xticks(range(values.shape[1]), [STABILITY[column] for column in shares])
    ax.set_xlabel("% of\nresamples", fontsize=7)
    ax.tick_params(length=0, labelleft=False)
    ax.spines[:].set_visible(False)


@plt.rc_context(style.STYLE)
def cumulative_correction(table: pd.DataFrame, double: bool = True) -> Figure:
    """The mean at the published protocol and at the corrected one, and between them what each step changed.

    Args:
        table: from `kdlib.analysis.statistics.step_changes`, one row per stage in order: step (label), dice (mean
            after the step), difference (to the stage before), low, high, interval, p_adjusted, verdict and n. The first
            row is the start; the last the end, whose Dice is that of the stage before it, and whose difference, if not
            NaN, is the whole change from the start (told in the note).
        double: drawn for a page's width, else for a column's.

    Raises:
        InputError: fewer than two rows, a missing column, or differences that do not lead from each mean to the next.
    """
    needed = ["step", "dice", "difference", "low", "high", "interval", "p_adjusted", "verdict", "n"]
    style.need_columns(table, needed, "correction", "kdlib.analysis.statistics.step_changes (notebook 05)")
    if len(table) < 2:
        raise InputError("correction: give at least its start and its end")
    rows = list(table.reset_index(drop=True).itertuples())
    last = len(rows) - 1
    for before, row in zip(rows[:-1], rows[1:], strict=True):
        change = 0.0 if row.Index == last else row.difference
        if not abs(row.dice - before.dice - change) < 1e-3:
            found = f"{before.dice:.3f} before, {row.dice:.3f} after, a difference of {change:.3f}"
            advice = "the last row repeats the one before" if row.Index == last else "use the same cases at every stage"
            raise InputError(f"correction: step {row.step!r} does not add up ({found}); {advice}")
    labels = [textwrap.fill(str(row.step), 42 if double else 20) for row in rows]
    heights = np.array([3.1 * (label.count("\n") + 1) + 3.2 for label in labels])  # mm, as is the y axis
    places = np.cumsum(heights) - heights / 2
    figure, ax = plt.subplots(figsize=(style.DOUBLE if double else style.SINGLE, (heights.sum() + 20) * style.MM))
    steps = table.iloc[1:-1]
    ends = (steps["dice"] - steps["difference"]).to_numpy()[:, None] + steps[["low", "high"]].to_numpy()
    reached = np.append(table["dice"], ends)
    low, high = np.nanmin(reached), np.nanmax(reached)
    span = max(high - low, 0.02)
    edge = max(low - 0.18 * span, 0.0)
    for place, row, above in zip(places, rows, [None, *places], strict=False):
        end = row.Index in (0, last)
        start = edge if end else row.dice - row.difference
        verdict = "" if end else row.verdict
        look = dict(color=style.VERDICTS[verdict], hatch=style.HATCHES.get(verdict), edgecolor="white", linewidth=0)
        ax.barh(place, row.dice - start, 4, start, zorder=2, **look)
        if not end:
            ends, look = (start + row.low, start + row.high), dict(color="black", capsize=2, capthick=0.9, zorder=3)
            style.draw_interval(ax, place, row.dice, *ends, elinewidth=0.9, **look)
        right = np.nanmax([row.dice, start, np.nan if end else start + row.high])
        text = f"{row.dice:.3f}" if end else style.signed(f"{row.difference:+.3f}")
        ax.annotate(text, (right, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
        if above is not None:
            before = row.dice if end else start
            ax.plot([before, before], [above - 2, place + 2], color="black", linewidth=0.5, zorder=1)
    ax.set_yticks(places, labels)
    ax.set(ylim=(heights.sum(), 0), xlim=(edge, high + (0.14 if double else 0.3) * span), xlabel="Dice")
    ax.xaxis.get_major_locator().set_params(nbins=8 if double else 4)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    used = [verdict for verdict in style.VERDICTS if verdict and verdict in {row.verdict for row in rows[1:last]}]
    if used:
        looks = {verdict: dict(facecolor=style.VERDICTS[verdict], hatch=style.HATCHES.get(verdict)) for verdict in used}
        style.legend_below(figure, style.legend_areas(looks), columns=3)
    counts = patients_text(table["n"], table.get("volumes", ()))
    bars = interval_text(table["interval"].fillna(""))
    note = f"Dice of both ends ({counts}) and its change by each step, with the {bars} of the paired difference; the "
    note += "mean over patients, or, as long as that fault is kept, that of their pooled voxels. Verdicts: paired "
    note += f"permutation test, max-T adjusted for all {last} changes (p below 0.05). The axis begins at {edge:.2f}."
    whole = rows[last]
    if pd.notna(whole.low):
        note += style.signed(f" From start to end: {whole.difference:+.3f} [{whole.low:+.3f}, {whole.high:+.3f}]")
        note += f", {whole.verdict}."
    figure.set_label(f"{note} {small_sample_note(table)}".strip())
    return figure
