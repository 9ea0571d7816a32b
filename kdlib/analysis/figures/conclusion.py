"""What a teacher is worth, over how far the student alone is from it."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kdlib.analysis.comparisons import SAME
from kdlib.analysis.figures import style
from kdlib.analysis.labels import KNOWLEDGE
from kdlib.analysis.patients import patients_text
from kdlib.config import InputError

COLOURS = dict(zip(KNOWLEDGE, (style.BLUE, style.ORANGE, style.GREEN, style.PINK), strict=True))
MARKERS = "osD^vP"  # of data sets


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
    markers = dict(zip(rows["data"].unique(), itertools.cycle(MARKERS), strict=False))
    for row in rows.itertuples():
        look = dict(color=COLOURS[row.knowledge], marker=markers[row.data], markersize=5, **style.NO_LINE)
        errors = [[row.difference - row.low], [row.high - row.difference]]
        fill = {} if row.verdict in style.DECIDED else {"markerfacecolor": "white"}
        ax.errorbar(row.gap, row.difference, errors, elinewidth=0.7, **look, **fill)
    ax.axhspan(-SAME["dice"], SAME["dice"], color=style.PALE, alpha=0.35, linewidth=0, zorder=0)
    ax.axhline(0, color=style.DARK, linewidth=0.6, zorder=0.5)
    ends = [min(0.0, rows["gap"].min()), rows["gap"].max()]
    ax.plot(ends, ends, color=style.GREY, linewidth=0.8, linestyle="--", zorder=0.5)
    ax.set(xlabel="Dice of the teacher above the student alone", ylabel="change of Dice by the teacher")
    dot = dict(color=style.DARK, marker="o", linestyle="")
    given = [name for name in KNOWLEDGE if name in set(rows["knowledge"])]
    handles = style.legend_lines({name: dot | dict(color=COLOURS[name]) for name in given})
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
