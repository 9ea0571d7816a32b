"""The one style of all figures: printed widths, colours and markers, and how a figure is saved.

Colours, markers and line styles belong to a method and are the same in every figure; markers and line styles differ
too, so that figures can be read in grey. The colours of verdicts mean verdicts and nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator

from kdlib.analysis.intervals import interval_text
from kdlib.analysis.labels import is_thesis_recipe, methods
from kdlib.analysis.patients import patients_text
from kdlib.config import InputError
from kdlib.files import write, write_text

plt.switch_backend(plt.get_backend())  # JupyterLab's interactive mode would end with the first rc_context otherwise
MM = 1 / 25.4
SINGLE, DOUBLE = 84 * MM, 174 * MM  # widths of a column and of a page, in inches
STYLE = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4.5, "figure.constrained_layout.use": True,
    "savefig.dpi": 300, "pdf.fonttype": 42, "ps.fonttype": 42, "grid.color": "#DDDDDD", "grid.linewidth": 0.5,
    "axes.axisbelow": True,
}  # fmt: skip
NO_LINE = {"linestyle": ""}

# Okabe & Ito's colours for the colour-blind, and shades of them
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#56B4E9"
GREY, PALE, DARK = "#7F7F7F", "#BBBBBB", "#444444"
METHODS = {  # (teacher, model, whole label fraction) -> colour, marker; teachers grey, S1 blue, S2 green
    ("", "T1", True): ("#000000", "s"), ("", "T2", True): (GREY, "D"), ("", "S1", True): (BLUE, "o"),
    ("", "S1", False): (SKY, "d"), ("", "S2", True): ("#00664B", "^"), ("", "S2", False): ("#2FBF97", "v"),
    ("T1", "S1", None): ("#E69F00", "P"), ("T1", "S2", None): (ORANGE, "X"),
    ("T2", "S1", None): (PINK, ">"), ("T2", "S2", None): ("#882255", "p"),
}  # fmt: skip
OTHER_COLOURS = ("#332288", "#999933", "#AA4499", "#44AA99", "#661100", "#6699CC")
FAMILIES = {  # column `family` -> label, colour, marker
    "prediction": ("predictions", BLUE, "s"), "feature": ("features", ORANGE, "D"),
    "relation": ("relations", GREEN, "^"), "contrast": ("contrast", PINK, "P"),
    "thesis": ("thesis terms", "#E69F00", "X"), "control": ("controls", GREY, "o"),
}  # fmt: skip
TERMS = ("E-E", "B-B", "D-D", "PMD")
TERM_COLOURS = dict(zip(("segmentation", *TERMS), (GREY, BLUE, ORANGE, GREEN, PINK), strict=True))
SHADES = ("", "///", "...", "xxx", "\\\\\\", "ooo")  # hatches of terms, for reading in grey
VERDICTS = {"better": "#4D9221", "inconclusive": PALE, "not converged": "#E6E6E6", "worse": "#C51B7D", "": DARK}
HATCHES = {"worse": "/////"}  # of a verdict's bar: two verdicts may be one grey
DIRECTIONS = {  # of a patient's change, for lines
    "better or equal": dict(color=BLUE, linewidth=0.8, linestyle="-", alpha=0.7),
    "worse": dict(color=ORANGE, linewidth=0.8, linestyle="--", alpha=0.9),
}
# of pictures: colour, hatch or line style, label
ERRORS = ((SKY, "......", "missed"), (ORANGE, "/////", "too much"), (PINK, "xxxxx", "wrong class"))
OUTLINES = (("white", "-", "truth"), (YELLOW, (0, (2, 1.2)), "prediction"))
CLASSES = ((BLUE, "^"), (ORANGE, "s"), (GREEN, "D"), (PINK, "v"), ("#E69F00", "P"))
BACKGROUND = PALE, "o"
PAIR_ROLES = {1: (SKY, "o", "positive"), -1: ("#E69F00", "x", "negative")}
ANCHOR = dict(color=YELLOW, marker="*", markersize=9, markeredgecolor="black", markeredgewidth=0.6)
HALO = [withStroke(linewidth=1.5, foreground="black")]  # seen on bright tissue too


def method_styles(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Method -> colour, marker and line style, from the identity columns.

    Controls are grey. Where distilled methods differ in terms or loss, each has its family's style, the thesis's terms
    their own, and a student without a teacher is one of the controls; else a method has the style of its networks.
    """
    found = methods(table)
    distilled = found[found["role"] == "distilled"]
    by_family = distilled.groupby(["teacher", "model"]).size().max() > 1 if len(distilled) else False
    return {row.Index: _style(row, by_family) for row in found.itertuples()}


def family_of(row: tuple, by_family: bool = True) -> str:
    """The key in `FAMILIES` of a method (a row of `methods`); "" for methods that are of none."""
    if row.role == "control" or by_family and row.role == "baseline":
        return "control"
    if by_family and row.role == "distilled":
        return "thesis" if is_thesis_recipe(row.terms) else row.family if row.family in FAMILIES else ""
    return ""


def _style(row: tuple, by_family: bool) -> dict[str, str]:
    if family := family_of(row, by_family):
        return dict(zip(("color", "marker"), FAMILIES[family][1:], strict=True), linestyle=":")
    other = OTHER_COLOURS[zlib.crc32(str(row.Index).encode()) % len(OTHER_COLOURS)], "h"
    whole = None if row.teacher else row.fraction == 1
    # 50 % has a style of its own; another fraction is an unknown method
    known = row.fraction in (1, 0.5) or row.teacher
    colour, marker = METHODS.get((row.teacher, row.model, whole), other) if known else other
    line = {"teacher": "-", "baseline": "--"}.get(row.role, {"T1": "-.", "T2": ":"}.get(row.teacher, ":"))
    return dict(color=colour, marker=marker, linestyle=line)


def save_figure(figure: Figure, folder: Path | str, name: str, caption: str) -> list[Path]:
    """Writes `<name>.pdf` (TrueType fonts), `<name>.png` (300 dpi) and `<name>.txt` (caption and the figure's note).

    Files are the same to the byte for the same figure: they carry no date and no version.
    """
    paths = [Path(folder) / f"{name}.{suffix}" for suffix in ("pdf", "png", "txt")]
    with plt.rc_context(STYLE):
        no_dates = {"CreationDate": None, "Creator": None, "Producer": None}
        write(paths[0], lambda path: figure.savefig(path, metadata=no_dates))
        write(paths[1], lambda path: figure.savefig(path, metadata={"Software": None}))
    write_text(paths[2], f"{caption} {figure.get_label()}".strip() + "\n")
    return paths


def need_columns(table: pd.DataFrame, needed: Sequence[str], what: str, source: str) -> None:
    """Raises InputError where a table has no rows or not the columns that a figure needs."""
    absent = [column for column in needed if column not in table]
    if absent or table.empty:
        raise InputError(f"{what}: no {', '.join(absent) or 'rows'} in the table; give {source}")


def mean_text(means: pd.DataFrame) -> str:
    """What points and bars of a summary (`statistics.summarise`) are, in words."""
    counts = patients_text(means["n"], means.get("volumes", ()))
    return f"mean over patients ({counts}) and {interval_text(means['interval'])}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def signed(text: str) -> str:
    """With a minus that is one."""
    return text.replace("-", "\N{MINUS SIGN}")


def panels(count: int, columns: int, width: float, height: float, extra: float, **kwargs) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels in so many columns; `height` of a row and `extra` below all, in mm."""
    rows = -(-count // columns)
    size = (width, (height * rows + extra) * MM)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **kwargs)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def legend_below(figure: Figure, handles: list, columns: int | None = None, **kwargs) -> None:
    """A legend of at most so many columns (None: as many as fit), its rows evenly filled."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = columns or max(1, int(figure.get_figwidth() / MM / (13 + 1.4 * longest)))
    rows = -(-len(handles) // columns)
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows), **kwargs)


def legend_lines(styles: Mapping[str, Mapping[str, str]], **kwargs) -> list[Line2D]:
    """Label -> style as entries of a legend."""
    return [Line2D([], [], label=label, **dict(style) | kwargs) for label, style in styles.items()]


def legend_areas(looks: Mapping[str, Mapping[str, str]], edgecolor: str = "white") -> list[Patch]:
    """Label -> colour and hatch as entries of a legend."""
    return [Patch(label=label, edgecolor=edgecolor, linewidth=0, **look) for label, look in looks.items()]


def log_axis(axis: Axis, low: float, high: float) -> None:
    """A log scale from `low` to `high` with as many labelled ticks as such a range needs."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    decades = np.log10(high / low)
    few = MaxNLocator(nbins=5, steps=[1, 2, 5, 10])
    axis.set_major_locator(few if decades < 0.8 else LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.9 else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def draw_interval(ax: Axes, y: float, value: float, low: float, high: float, **look) -> None:
    """A point with its interval in row `y`; rounding can make the length of a bar negative by 1e-17."""
    ax.errorbar(value, y, xerr=np.maximum([[value - low], [high - value]], 0), **look)


def draw_mean(ax: Axes, y: float, mean: float, low: float, high: float, style: Mapping[str, str]) -> None:
    """A mean of patients in row `y`, with its interval."""
    edge = NO_LINE | {"markeredgecolor": "white", "markeredgewidth": 0.4, "elinewidth": 1.6}
    draw_interval(ax, y, mean, low, high, markersize=5.5, zorder=3, **style | edge)


def draw_patients(ax: Axes, values: pd.Series, heights: np.ndarray, style: Mapping[str, str]) -> None:
    ax.scatter(values, heights, s=5, color=style["color"], alpha=0.45, linewidth=0)


def spread(count: int) -> np.ndarray:
    """Where in a row each of so many patients' points lies: -0.25 to 0.25, in a fixed pattern without clumps."""
    return (np.arange(count) * 0.618034 % 1 - 0.5) * 0.5


def name_rows(ax: Axes, labels: Sequence[str], xlabel: str) -> None:
    """Names down the left side, first on top, and what is measured along the bottom."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_xlabel(xlabel)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    ax.set_ylim(len(labels) - 0.4, -0.7)
