"""The one style of all figures: printed widths, colours and markers of methods, and how a figure is saved.

Colours, markers and line styles belong to a method (arm) and are the same in every figure; markers and line styles
differ too, so that figures can be read in grey.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from kdlib.analysis.metrics import METRICS
from kdlib.analysis.statistics import interval_name
from kdlib.config import LOSS_NAMES, InputError

plt.switch_backend(plt.get_backend())  # JupyterLab's interactive mode would end with the first rc_context otherwise
MM = 1 / 25.4
SINGLE, DOUBLE = 84 * MM, 174 * MM  # widths of a column and of a page, in inches
STYLE = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4.5, "figure.constrained_layout.use": True,
    "savefig.dpi": 300, "pdf.fonttype": 42, "ps.fonttype": 42,
}  # fmt: skip
# Okabe & Ito's colours for the colour-blind, and shades of them: teachers grey, S1 blue, S2 green, distilled warm
METHOD_COLOURS = {
    "T1": "#000000", "T2": "#7F7F7F", "S1": "#0072B2", "S1 (50 %)": "#56B4E9", "S2": "#00664B", "S2 (50 %)": "#2FBF97",
    "KD(T1, S1)": "#E69F00", "KD(T1, S2)": "#D55E00", "KD(T2, S1)": "#CC79A7", "KD(T2, S2)": "#882255",
}  # fmt: skip
METHOD_MARKERS = dict(zip(METHOD_COLOURS, "sDod^vPX>p", strict=True))
OTHER_COLOURS = ("#332288", "#999933", "#AA4499", "#44AA99", "#661100", "#6699CC")
FAMILIES = {  # of distillers -> (names in kdlib.config.LOSS_NAMES, colour, marker)
    "predictions": (("kl", "softmax_kl", "dkd", "dist", "cwd", "boundary_kl"), "#0072B2", "s"),
    "features": (("fitnet", "at", "feature_cwd", "reviewkd", "emkd_importance", "emkd_affinity"), "#D55E00", "D"),
    "relations": (("sp", "skd", "ifvd", "cirkd"), "#009E73", "^"),
    "contrast": (("infonce", "supcon", "prototype", "crd"), "#CC79A7", "P"),
}  # fmt: skip
FAMILY_OF = {LOSS_NAMES[loss]: family for family, (losses, *_) in FAMILIES.items() for loss in losses}
LINES = {"T": "-", "S": "--", "KD(T1": "-.", "KD(T2": ":"}  # by the first letters of an arm
NO_LINE = {"linestyle": ""}
TERMS = ("E-E", "B-B", "D-D", "PMD")
CONTROLS = (  # arms that a distiller must beat
    "no distillation", "all weights 0", "random teacher", "shuffled teacher", "frozen projectors", "redrawn projectors",
    "label smoothing", "both budgets", "self-teacher",
)  # fmt: skip
FAMILY_STYLES = {family: style for family, (_, *style) in FAMILIES.items()}
FAMILY_STYLES |= {"thesis terms": ("#E69F00", "X"), "controls": ("#7F7F7F", "o")}
VERDICTS = {"better": "#0072B2", "inconclusive": "#BBBBBB", "worse": "#D55E00", "": "#444444"}
HATCHES = {"worse": "/////"}  # of a verdict's bar: blue and orange are one grey
TERM_COLOURS = dict(zip(("segmentation", *TERMS), ("#7F7F7F", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))


def method_style(arm: str) -> dict[str, str]:
    """Colour, marker and line style of a method: a distiller has its family's, the thesis's terms are orange, controls
    grey, and an unknown method always gets the same of a reserve."""
    family = family_of(arm)
    if family:
        return dict(zip(("color", "marker"), FAMILY_STYLES[family], strict=True)) | {"linestyle": ":"}
    other = OTHER_COLOURS[zlib.crc32(arm.encode()) % len(OTHER_COLOURS)]
    colour, marker = METHOD_COLOURS.get(arm, other), METHOD_MARKERS.get(arm, "h")
    lines = [line for start, line in LINES.items() if arm.startswith(start)]
    return dict(color=colour, marker=marker, linestyle=lines[0] if lines else ":")


def family_of(arm: str) -> str:
    """Which family a distiller or control is of; "" for other arms."""
    if arm in CONTROLS or arm.endswith(", shuffled"):
        return "controls"
    return "thesis terms" if arm.startswith("thesis terms") else FAMILY_OF.get(arm, "")


def save_figure(figure: Figure, folder: Path | str, name: str, caption: str) -> list[Path]:
    """Writes `<name>.pdf` (TrueType fonts), `<name>.png` (300 dpi) and `<name>.txt` (caption and the figure's note).

    Files are the same to the byte for the same figure: they carry no date and no version.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("pdf", "png", "txt")]
    with plt.rc_context(STYLE):
        figure.savefig(paths[0], metadata={"CreationDate": None, "Creator": None, "Producer": None})
        figure.savefig(paths[1], metadata={"Software": None})
    paths[2].write_text(f"{caption} {figure.get_label()}".strip() + "\n", encoding="utf-8")
    return paths


def need_columns(table: pd.DataFrame, needed: Sequence[str], what: str, source: str) -> None:
    """Raises InputError where a table has no rows or not the columns that a figure needs."""
    absent = [column for column in needed if column not in table]
    if absent or table.empty:
        raise InputError(f"{what}: no {', '.join(absent) or 'rows'} in the table; give {source}")


def n_text(counts: pd.Series) -> str:
    return f"n = {counts.min()}" + (f" to {counts.max()}" if counts.nunique() > 1 else "")


def interval_text(means: pd.DataFrame) -> str:
    return f"mean over patients ({n_text(means['n'])}) and {interval_kind(means['n'])}"


def interval_kind(counts: Iterable[int]) -> str:
    """Which 95 % intervals `kdlib.analysis.statistics.interval` makes of so many patients; below two there is none."""
    kinds = [{interval_name(n, seeds) for seeds in (1, 2)} for n in sorted(set(counts)) if n > 1]
    names = dict.fromkeys(found.pop() if len(found) == 1 else "bootstrap" for found in kinds)
    return f"95 % {' or '.join(names)} interval" if names else "no interval, which takes two"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def legend_below(figure: Figure, handles: list, columns: int, **how) -> None:
    """A legend of at most so many columns, its rows evenly filled."""
    rows = -(-len(handles) // columns)
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows), **how)


def entries_beside(names: Sequence[str], width: float) -> int:
    """How many entries of a legend with such names fit side by side."""
    return max(1, int(width / MM / (13 + 1.4 * max(map(len, names)))))


def log_axis(axis: Axis, low: float, high: float) -> None:
    """A log scale from `low` to `high` with as many labelled ticks as such a range needs."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    decades = np.log10(high / low)
    few = MaxNLocator(nbins=5, steps=[1, 2, 5, 10])
    axis.set_major_locator(few if decades < 0.8 else LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.9 else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def bar_lengths(row: tuple) -> np.ndarray:
    """Lengths of an interval below and above the mean; rounding can make one negative by 1e-17."""
    return np.maximum([[row.mean - row.low], [row.high - row.mean]], 0)


def draw_mean(ax: Axes, y: float, row: tuple, style: Mapping[str, str]) -> None:
    look = dict(style) | NO_LINE | {"markeredgecolor": "white", "markeredgewidth": 0.4, "elinewidth": 1.6}
    ax.errorbar(row.mean, y, xerr=bar_lengths(row), markersize=5.5, zorder=3, **look)


def spread(count: int) -> np.ndarray:
    """Where in a row each of so many patients' points lies: -0.25 to 0.25, in a fixed pattern without clumps."""
    return (np.arange(count) * 0.618034 % 1 - 0.5) * 0.5


def draw_strip(ax: Axes, y: float, values: pd.Series, row: tuple, style: Mapping[str, str]) -> None:
    """Patients as small points spread about `y`, mean and interval above them."""
    ax.scatter(values, y + spread(len(values)), s=5, color=style["color"], alpha=0.45, linewidth=0, zorder=2)
    draw_mean(ax, y, row, style)


def name_rows(ax: Axes, labels: Sequence[str], metric: str, ticks: Sequence[float] | None = None) -> None:
    """Names down the left side, first on top, and the metric along the bottom."""
    label, unit, _ = METRICS[metric]
    ax.set_yticks(range(len(labels)) if ticks is None else ticks, labels)
    ax.set_xlabel(f"{label} ({unit})" if unit else label)
    ax.tick_params(labelsize=7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.set_ylim(ax.dataLim.y1 + 0.6, -0.7)
