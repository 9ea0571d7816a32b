"""The one style of all figures: printed widths, colours and markers, and how a figure is saved.

Colours, markers and line styles belong to a method and are the same in every figure. Any two colours of methods differ
by 15 or more (CAM02-UCS) for readers with deuteranopia, too; markers and line styles differ as well, so that figures
can be read in grey. The colours of verdicts mean verdicts and nothing else.
"""

from __future__ import annotations

import io
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
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

from kdlib.analysis.intervals import interval_text
from kdlib.analysis.labels import CONTROLS, methods
from kdlib.analysis.patients import patients_text
from kdlib.config import InputError
from kdlib.files import write, write_text

plt.switch_backend(plt.get_backend())  # JupyterLab's interactive mode would end with the first rc_context otherwise
MM = 1 / 25.4
SINGLE, DOUBLE = 84 * MM, 174 * MM  # widths of a column and of a page, in inches
STYLE = {  # STIX is a typeface for print that comes with matplotlib; at 9 points it is as wide as others at 8
    "font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9, "axes.labelsize": 9, "axes.titlesize": 9,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4.5, "figure.constrained_layout.use": True,
    "savefig.dpi": 300, "pdf.fonttype": 42, "ps.fonttype": 42, "grid.color": "#DDDDDD", "grid.linewidth": 0.5,
    "axes.axisbelow": True,
}  # fmt: skip
NO_LINE = {"linestyle": ""}

# Okabe & Ito's colours for the colour-blind, and shades of them
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#56B4E9"
GREY, PALE, DARK = "#7F7F7F", "#BBBBBB", "#444444"
METHODS = {  # (teacher, model, whole label fraction) -> colour, marker
    ("", "T1", True): ("#000000", "s"), ("", "T2", True): ("#602E55", "h"),
    ("", "S1", True): ("#0628C5", "o"), ("", "S1", False): ("#0685FF", "d"),
    ("T1", "S1", None): ("#FB9D04", "P"), ("T2", "S1", None): ("#83330A", "X"),
    ("", "S2", True): ("#6F7162", "o"), ("", "S2", False): ("#8E5D95", "d"),
    ("T1", "S2", None): ("#E76CA9", "P"), ("T2", "S2", None): ("#A27B15", "X"),
    ("", "E1", True): ("#0E1342", "o"), ("", "E1", False): ("#A2AFFF", "d"),
    ("T1", "E1", None): ("#B5CD9D", "P"), ("T2", "E1", None): ("#3C2211", "X"),
}  # fmt: skip
CONTROL_COLOUR, CONTROL_MARKERS = "#8C8C8C", "oX*<D>sp^v"
OTHER_COLOURS = ("#332288", "#999933", "#AA4499", "#44AA99", "#661100", "#6699CC")
TERMS = ("E-E", "B-B", "D-D", "PMD")
TERM_COLOURS = dict(zip(("segmentation", *TERMS), (GREY, BLUE, ORANGE, GREEN, PINK), strict=True))
VERDICTS = {  # verdict -> look of a difference; whatever is not decided is hollow
    "better": dict(color="#4D9221", marker="^", **NO_LINE), "worse": dict(color="#C51B7D", marker="v", **NO_LINE),
    "equivalent": dict(color=DARK, marker="s", **NO_LINE),
    "inconclusive": dict(color=GREY, marker="o", markerfacecolor="white", **NO_LINE),
    "not converged": dict(color=PALE, marker="o", markerfacecolor="white", **NO_LINE),
}  # fmt: skip
DIRECTIONS = {  # of a patient's change, for lines
    "gains": dict(color=DARK, linewidth=0.7, linestyle="-", alpha=0.6),
    "loses": dict(color=DARK, linewidth=0.7, linestyle=(0, (1.5, 1.5)), alpha=0.8),
}
ERRORS = ((SKY, "missed"), (ORANGE, "too much"), (PINK, "wrong class"))  # colour, label; of the explorer
OUTLINES = {"truth": dict(color="white", linestyle="-"), "prediction": dict(color=YELLOW, linestyle=(0, (2, 1.2)))}
CLASSES = ((BLUE, "^"), (ORANGE, "s"), (GREEN, "D"), (PINK, "v"), ("#E69F00", "P"))
BACKGROUND = PALE, "o"
PAIR_ROLES = {1: (SKY, "o", "positive"), -1: ("#E69F00", "x", "negative")}
ANCHOR = dict(color=YELLOW, marker="*", markersize=9, markeredgecolor="black", markeredgewidth=0.6)
HALO = [withStroke(linewidth=1.5, foreground="black")]  # seen on bright tissue too


def method_styles(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Method -> colour, marker and line style, from the identity columns.

    Controls are grey, each with a marker of its own; any other method has the style of its networks.
    """
    return {row.Index: _style(row) for row in methods(table).itertuples()}


def _style(row: tuple) -> dict[str, str]:
    if row.role == "control":
        kind = [*CONTROLS, row.control].index(row.control)  # a recipe of one's own may name another
        marker = CONTROL_MARKERS[kind % len(CONTROL_MARKERS)]
        return dict(color=CONTROL_COLOUR, marker=marker, linestyle=":")
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
        write(paths[1], lambda path: _write_png(figure, path))
    write_text(paths[2], f"{caption} {figure.get_label()}".strip() + "\n")
    return paths


def _write_png(figure: Figure, path: Path) -> None:
    """In 256 colours, a third of the size; those that few pixels have (a verdict's) are among them."""
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", metadata={"Software": None})
    image = Image.open(pixels).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    image.save(path, "png", dpi=[STYLE["savefig.dpi"]] * 2)


def need_columns(table: pd.DataFrame, needed: Sequence[str], what: str, source: str) -> None:
    """Raises InputError where a table has no rows or not the columns that a figure needs."""
    absent = [column for column in needed if column not in table]
    if absent or table.empty:
        raise InputError(f"{what}: no {', '.join(absent) or 'rows'} in the table; give {source}")


def mean_text(means: pd.DataFrame) -> str:
    """What points and bars of a summary (`statistics.summarise`) are, in words."""
    counts = patients_text(means["n"], means.get("volumes", ()))
    return f"mean over patients ({counts}) and {interval_text(means['interval'])}"


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


def draw_row(
    ax: Axes, y: float, values: pd.Series, mean: float, low: float, high: float, style: Mapping[str, str]
) -> None:
    """Patients in row `y`, and their mean with its interval."""
    ax.scatter(values, y + spread(len(values)), s=5, color=style["color"], alpha=0.45, linewidth=0)
    edge = NO_LINE | {"markeredgecolor": "white", "markeredgewidth": 0.4, "elinewidth": 1.6}
    draw_interval(ax, y, mean, low, high, markersize=5.5, zorder=3, **style | edge)


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
