"""Figures that compare methods with each other: a forest of paired differences, also class by class, the cumulative
correction, and what a teacher is worth over how far the student alone is from it."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.analysis.comparisons import SAME
from kdlib.analysis.figures import style
from kdlib.analysis.intervals import interval_text
from kdlib.analysis.labels import KNOWLEDGE
from kdlib.analysis.patients import patients_text
from kdlib.analysis.sentences import interval_of, many, signed
from kdlib.analysis.tables import small_sample_note
from kdlib.config import InputError
from kdlib.protocol import is_single

DIFFERENCE = ["a", "b", "label_a", "label_b", "n", "difference", "low", "high", "interval", "verdict"]
KNOWLEDGE_COLOURS = dict(zip(KNOWLEDGE, (style.BLUE, style.ORANGE, style.GREEN, style.PINK), strict=True))


@plt.rc_context(style.STYLE)
def forest(
    verdicts: pd.DataFrame, ranks: pd.DataFrame | None = None, terms: Mapping[str, str] | None = None,
    shares: bool = False,
) -> Figure:  # fmt: skip
    """Paired differences of Dice with their intervals, best first, in the colours of their verdicts.

    Methods that collapsed lie beyond a break of the axis, lest they flatten all others.

    Args:
        verdicts: from `kdlib.analysis.statistics.compare`.
        ranks: from `kdlib.analysis.statistics.ranks`, with a reference: a panel of ranks with their intervals.
        terms: method -> its distillation terms, joined by "+": a panel with a dot for each of the thesis's that is on.
        shares: print beside the ranks how often, in resamples of the patients, a method came first and was better than
            the reference; worth nothing with a single seed.

    Raises: InputError: no comparison, or terms that are none of the thesis's.
    """
    style.need_columns(verdicts, DIFFERENCE, "verdicts", "kdlib.analysis.statistics.compare")
    rows = verdicts.sort_values("difference", ascending=False, kind="stable").set_index("a")
    one, alone = (rows[name].nunique() == 1 for name in ("label_b", "label_a"))
    if not one and alone:  # one method against several: each row is one of these
        labels, reference = list(rows["label_b"]), "each of these"
    else:
        labels = [row.label_a if one else f"{row.label_a} \N{MINUS SIGN} {row.label_b}" for row in rows.itertuples()]
        reference = rows["label_b"].iloc[0] if one else "the same student alone"
    far = _collapsed(rows)
    ratios = {"terms": 0.5 * (terms is not None), "ranks": 0.8 * (ranks is not None), "far": 0.35 * far.any()}
    ratios |= {"main": 2.0, "shares": 0.4 * (shares and ranks is not None)}
    ratios = {name: ratio for name, ratio in ratios.items() if ratio}
    size = (style.DOUBLE if len(ratios) > 1 else 0.75 * style.DOUBLE, (4.8 * len(rows) + 24) * style.MM)
    figure, axes = plt.subplots(
        1, len(ratios), figsize=size, sharey=True, squeeze=False, width_ratios=[*ratios.values()]
    )
    panels = dict(zip(ratios, axes[0], strict=True))
    for y, row in enumerate(rows.itertuples()):
        if far.iloc[y]:
            panels["far"].plot(row.difference, y, **style.VERDICTS[row.verdict], markersize=5)
        else:
            _difference(panels["main"], y, row)
    style.name_rows(axes[0, 0], labels, "")
    _difference_axis(panels["main"], reference, rows["label_a"].iloc[0] if not one and alone else "")
    if "far" in panels:
        _break(panels["far"], panels["main"], rows.loc[far, "difference"])
    if terms is not None:
        _dots(panels["terms"], [terms[name] for name in rows.index])
    note = f"Points and bars: {_difference_note(rows)}"
    if ranks is not None:
        placed = ranks.set_index("method").reindex(rows.index)
        _ranks(panels["ranks"], placed, len(ranks))
        note += " Ranks: of the mean, with the 95 % percentile interval over a bootstrap of the patients."
        if shares:
            _numbers(panels["shares"], 100 * placed[["first", "beats"]].to_numpy(float), ["first", "better"], ".0f")
            panels["shares"].set_xlabel("% of resamples")
            note += " Right: per cent of the resamples in which the method came first, and was better than the "
            note += "reference."
    if "far" in panels:
        note += " Left of the break: methods that collapsed, without their intervals."
    if terms is not None:
        note += " Dark dots: terms that were on."
    _legend_of_verdicts(figure, rows["verdict"])
    figure.set_label(note)
    return figure


@plt.rc_context(style.STYLE)
def by_class(table: pd.DataFrame) -> Figure:
    """What distillation changes class by class, large classes first: a panel per student and teacher.

    Args:
        table: of `kdlib.analysis.answer.by_class`.
    """
    needed = ["class", "volume", "student", "teacher", "dice_alone", "dice_teacher", "interval", "verdict"]
    needed += ["n", "difference", "low", "high"]
    style.need_columns(table, needed, "by class", "`kdlib.analysis.answer.by_class`")
    volumes = table.drop_duplicates("class").set_index("class")["volume"]
    names = [f"{name} ({ml:,.{0 if ml > 10 else 1}f} ml)" for name, ml in volumes.items()]
    pairs = list(table.groupby(["student", "teacher"], sort=False))
    columns, ends = min(len(pairs), 2), [table["low"].min(), table["high"].max()]
    figure, axes = style.panels(
        2 * len(pairs),
        2 * columns,
        style.DOUBLE,
        4.8 * len(names) + 22,
        8,
        sharey=True,
        width_ratios=[2.0, 0.7] * columns,
    )
    for ((student, teacher), rows), main, side in zip(pairs, axes[::2], axes[1::2], strict=True):
        rows = rows.set_index("class").loc[volumes.index]
        for y, row in enumerate(rows.itertuples()):
            _difference(main, y, row)
        style.name_rows(main, names, "")
        main.set_xlim(ends[0] - 0.05 * np.ptp(ends), ends[1] + 0.05 * np.ptp(ends))
        main.set_title(f"{student} from {teacher}")
        _difference_axis(main, "the same alone")
        main.xaxis.get_major_locator().set_params(nbins=4)
        _numbers(side, rows[["dice_alone", "dice_teacher"]].to_numpy(), ["alone", teacher])
    _legend_of_verdicts(figure, table["verdict"])
    figure.set_label(f"Points and bars: {_difference_note(table)} Numbers: mean Dice of student alone and teacher.")
    return figure


def _difference(ax: Axes, y: float, row: tuple) -> None:
    """A paired difference with its interval in row `y`, in the look of its verdict."""
    look = style.VERDICTS[row.verdict]
    style.draw_interval(ax, y, row.difference, row.low, row.high, elinewidth=1.2, markersize=5, **look)


def _legend_of_verdicts(figure: Figure, verdicts: pd.Series) -> None:
    used = {verdict: look for verdict, look in style.VERDICTS.items() if verdict in set(verdicts)}
    style.legend_below(figure, style.legend_lines(used))


def _collapsed(rows: pd.DataFrame) -> pd.Series:
    """Which differences are so far below the others that they would flatten them."""
    size = rows["difference"].abs()
    reach = rows[["low", "high"]].abs().max(axis=1).fillna(size)
    far = (rows["difference"] < 0) & (size > 6 * reach.median())
    return far & (size > 1.5 * reach[~far].max()) if far.any() and not far.all() else far & False


def _break(left: Axes, right: Axes, beyond: pd.Series) -> None:
    """Draws two panels as one axis with a part left out."""
    left.spines["right"].set_visible(False)
    right.spines["left"].set_visible(False)
    spread = max(np.ptp(beyond), 0.02)
    left.set_xlim(beyond.min() - 0.4 * spread, beyond.max() + 0.4 * spread)
    left.set_xticks([beyond.mean()], [signed(f"{beyond.mean():.2f}")])
    left.grid(axis="x")
    for ax, x in ((left, 1), (right, 0)):
        mark = dict(marker=[(-0.6, -1), (0.6, 1)], markersize=6, color="black", clip_on=False, **style.NO_LINE)
        ax.plot([x], [0], transform=ax.transAxes, **mark)


def _dots(ax: Axes, terms: Sequence[str]) -> None:
    """A row of the thesis's terms for each method, those that were on dark and joined."""
    for y, joined in enumerate(terms):
        on = [style.TERMS.index(term) for term in joined.split("+") if term in style.TERMS]
        if len(on) < len(joined.split("+")):
            raise InputError(f"forest: terms {joined!r} are not all of {', '.join(style.TERMS)}")
        ax.scatter(range(4), [y] * 4, s=5, color=style.PALE)
        ax.plot(on, [y] * len(on), color="black", marker="o", markersize=4, linewidth=0.8)
    ax.set(xticks=range(4), xlim=(-0.6, 3.6))
    ax.set_xticklabels(style.TERMS, rotation=90)
    ax.tick_params(axis="x", length=0)
    ax.spines[:].set_visible(False)


def _ranks(ax: Axes, ranks: pd.DataFrame, count: int) -> None:
    for y, row in enumerate(ranks.itertuples()):
        look = dict(color=style.DARK, marker="o", markersize=3.5, elinewidth=1)
        style.draw_interval(ax, y, row.rank, row.rank_low, row.rank_high, **look | style.NO_LINE)
    room = 0.5 + 0.02 * count  # for the dots of the first and the last
    ax.set(xlim=(1 - room, count + room), xticks=[1, *range(5, count + 1, 5)], xlabel="rank (1 = best)")
    ax.grid(axis="x")


def _numbers(ax: Axes, values: np.ndarray, names: Sequence[str], form: str = ".2f") -> None:
    """A column of numbers for each name, row by row of the panel beside it."""
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            ax.text(x, y, f"{value:{form}}", ha="center", va="center", fontsize=8)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.scatter(range(len(names)), [0] * len(names), s=0)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _difference_axis(ax: Axes, reference: str, method: str = "") -> None:
    ax.set_xlabel(f"Dice{f' of {method}' if method else ''} minus that of {reference}")
    ax.axvline(0, color="black", linewidth=0.6, zorder=1)
    ax.xaxis.get_major_locator().set_params(nbins=6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")


def _difference_note(differences: pd.DataFrame) -> str:
    counts = patients_text(differences["n"], differences.get("volumes", ()))
    note = f"mean paired difference ({counts}) and {interval_text(differences['interval'])}, higher is better; "
    note += "hollow: not decided by Wilcoxon's signed-rank test after Holm's correction for "
    return f"{note}{many(len(differences), 'comparison')}. {small_sample_note(differences)}".strip()


@plt.rc_context(style.STYLE)
def cumulative_correction(gains: pd.DataFrame, changes: pd.DataFrame) -> Figure:
    """Dice from the published to the corrected protocol: of the distilled student and of each reference, and the gap;
    or with each fault alone put back into the corrected one, where no line joins the stages.

    Args:
        gains: from `kdlib.analysis.statistics.gains`, one row per stage and reference.
        changes: from `kdlib.analysis.statistics.step_changes`, for the note.

    Raises: InputError: a missing column or no row.
    """
    needed = ["stage", "label_b", "n", "dice", "difference", "low", "high", "verdict"]
    style.need_columns(gains, needed, "gains", "kdlib.analysis.statistics.gains (notebook 05)")
    stages, references = list(gains["stage"].unique()), list(gains["label_b"].unique())
    size = (style.DOUBLE, (9 * len(stages) + 26) * style.MM)
    single = is_single(stages)
    looks = [
        dict(color="black", marker="s", markersize=3.5, linestyle="none" if single else "-"),
        dict(color=style.GREY, marker="o", markersize=3.5, linestyle="none" if single else "--"),
    ]
    figure, axes = plt.subplots(1, len(references), figsize=size, sharex=True, sharey=True, squeeze=False)
    places = np.arange(len(stages))
    for ax, reference in zip(axes[0], references, strict=True):
        rows = gains[gains["label_b"] == reference].set_index("stage").loc[stages]
        other = rows["dice"] - rows["difference"]
        if single:
            ax.hlines(places, other, rows["dice"], color=style.PALE, linewidth=3)
        else:
            ax.fill_betweenx(places, other, rows["dice"], color=style.PALE, alpha=0.5, linewidth=0)
        ax.plot(other, places, **looks[1])
        ax.plot(rows["dice"], places, **looks[0])
        for y, row in zip(places, rows.itertuples(), strict=True):
            colour = style.VERDICTS[row.verdict]["color"] if row.verdict in ("better", "worse") else style.DARK
            text = signed(f"{row.difference:+.3f}")
            right = max(row.dice, row.dice - row.difference)
            ax.annotate(text, (right, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=colour)
        ax.set(title=f"against {reference}", xlabel="Dice")
        ax.grid(axis="x")
        ax.margins(x=0.16)
    axes[0, 0].set_yticks(places, [textwrap.fill(str(stage), 34) for stage in stages])
    axes[0, 0].set_ylim(len(stages) - 0.5, -0.5)
    lines = dict(zip(("distilled", "the student that it is compared with"), looks, strict=True))
    style.legend_below(figure, style.legend_lines(lines), columns=2, handlelength=3)
    counts, whole = patients_text(gains["n"]), changes.iloc[-1]
    note = (
        f"Dice {'with each fault alone put back' if single else 'after each stage'} ({counts}), the mean over "
        f"patients, or, {'with' if single else 'as long as'} pooled Dice{'' if single else ' is kept'}, that of their "
        "pooled voxels; shaded: the gap, its size beside it, coloured where it is decided (paired permutation test, "
        "max-T adjusted for all gaps)."
    )
    if not single and pd.notna(whole["low"]):
        change = interval_of(*whole[["difference", "low", "high"]])
        note += f" The distilled student from start to end: {change}, {whole['verdict']}."
    figure.set_label(f"{note} {small_sample_note(gains)}".strip())
    return figure


@plt.rc_context(style.STYLE)
def when(table: pd.DataFrame) -> Figure:
    """Change of Dice by a teacher, over the gap between the student alone and that teacher, for every comparison.

    Args:
        table: of `conclusion.counted`: data, knowledge, gap, difference, low, high, verdict, n, volumes.

    Raises: InputError: a missing column, or no comparison with a known teacher.
    """
    needed = ["data", "knowledge", "gap", "difference", "low", "high", "verdict", "n", "volumes"]
    style.need_columns(table, needed, "when", "`kdlib.analysis.conclusion.counted`")
    rows = table.dropna(subset="gap")
    if rows.empty:
        raise InputError("when: no comparison whose teacher is known")
    figure, ax = plt.subplots(figsize=(style.DOUBLE, 95 * style.MM))
    markers = dict(zip(rows["data"].unique(), itertools.cycle("osD^vP"), strict=False))
    for row in rows.itertuples():
        look = style.VERDICTS[row.verdict] | dict(color=KNOWLEDGE_COLOURS[row.knowledge], marker=markers[row.data])
        errors = [[row.difference - row.low], [row.high - row.difference]]
        ax.errorbar(row.gap, row.difference, errors, elinewidth=0.7, markersize=5, **look)
    ax.axhspan(-SAME["dice"], SAME["dice"], color=style.PALE, alpha=0.35, linewidth=0, zorder=0)
    ax.axhline(0, color=style.DARK, linewidth=0.6, zorder=0.5)
    ends = [min(0.0, rows["gap"].min()), rows["gap"].max()]
    ax.plot(ends, ends, color=style.GREY, linewidth=0.8, linestyle="--", zorder=0.5)
    ax.set(xlabel="Dice of the teacher above the student alone", ylabel="change of Dice by the teacher")
    dot = dict(color=style.DARK, marker="o", linestyle="")
    given = [name for name in KNOWLEDGE if name in set(rows["knowledge"])]
    handles = style.legend_lines({name: dot | dict(color=KNOWLEDGE_COLOURS[name]) for name in given})
    handles += style.legend_lines({data: dot | dict(marker=marker) for data, marker in markers.items()})
    handles += style.legend_lines({"not decided": dot | dict(markerfacecolor="white")})
    handles += style.legend_lines({"as good as the teacher": dict(color=style.GREY, linestyle="--")})
    style.legend_below(figure, handles)
    figure.set_label(
        f"Points: mean change of Dice with its 95 % interval, paired by patient "
        f"({patients_text(rows['n'], rows['volumes'])}), without trainings that have not "
        f"converged; grey: less than {SAME['dice']:g} Dice either way."
    )
    return figure
