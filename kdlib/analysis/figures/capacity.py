"""Dice over what a network costs, with the frontier of those that nothing cheaper beats."""

from __future__ import annotations

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from kdlib.analysis.capacity import RUNTIMES, volume_times
from kdlib.analysis.figures import style
from kdlib.analysis.labels import SHAPES, percent
from kdlib.analysis.patients import patients_text
from kdlib.analysis.tables import summarise
from kdlib.config import InputError

PANELS = {  # column of the table of networks -> (label, its unit)
    "parameters": ("parameters (millions)", 1e6), "gflops": ("GFLOP per slice", 1),
    "eager": ("CPU latency (ms per slice)", 1),
}  # fmt: skip
LOOKS = {  # role -> as S1 looks in the other figures
    "baseline": ("alone", style.METHODS["", "S1", True]), "distilled": ("distilled", style.METHODS["T1", "S1", None]),
    "teacher": ("teacher", style.METHODS["", "T1", True]),
}  # fmt: skip
PLACES = ((0, 1), (1, 0.3), (-1, 0.3), (0.8, 0.9), (-0.8, 0.9), (1, -0.6), (-1, -0.6), (0, -1))  # of a name, best first
LINES = "-", (0, (3, 1.5))  # of the frontiers, most labels first
RUNTIME_LINES = {"bf16": ":", "onnx": "-.", "openvino-int8": "-"}  # grey


def pareto(cost: pd.Series, value: pd.Series) -> pd.Index:
    """Rows that no other one beats: of no more cost and a higher value; by rising cost.

    Of equal ones the first is kept.
    """
    order = np.lexsort([-value, cost])
    best = value.iloc[order].cummax()
    return best.index[~best.duplicated()]


@plt.rc_context(style.STYLE)
def capacity(table: pd.DataFrame, networks: pd.DataFrame) -> Figure:
    """Mean Dice over parameters, arithmetic and latency, a mark for each network, way of learning and share of labels.

    Args:
        table: tidy; students alone and distilled on one or two label fractions, and their teacher.
        networks: one row per network: model, parameters, gflops, and milliseconds per slice in PyTorch (eager) and of
            other runtimes, see `kdlib.inference.latency`.

    Raises: InputError: a missing column, or a network without its cost.
    """
    style.need_columns(networks, ["model", *PANELS], "capacity", "tables/10_networks.csv of notebook 10")
    style.need_columns(table, ["model", "method", "role", "fraction"], "capacity", "`Results.cases`")
    means, costs = summarise(table), networks.set_index("model")
    if missing := sorted(set(means["model"]) - set(costs.index)):
        raise InputError(f"capacity: no cost of {', '.join(missing)}; run notebook 10 again")
    whole = means["fraction"] == means["fraction"].max()
    shares = {percent(fraction): means["fraction"] == fraction for fraction in sorted(set(means["fraction"]))[::-1]}
    figure, axes = plt.subplots(1, len(PANELS), figsize=(style.DOUBLE, 105 * style.MM), sharey=True)
    for ax, (column, (label, unit)) in zip(axes, PANELS.items(), strict=True):
        at = means["model"].map(costs[column]) / unit
        style.log_axis(ax.xaxis, at.min() / 2.2, at.max() * 2.2)
        for here, line in zip(shares.values(), LINES, strict=False):
            edge = pareto(at[here], means.loc[here, "mean"])
            look = dict(color=style.DARK, linewidth=0.8, linestyle=line, zorder=1.5)
            ax.plot(at[edge], means.loc[edge, "mean"], drawstyle="steps-post", **look)
        for row, x, filled in zip(means.itertuples(), at, whole, strict=True):
            colour, marker = LOOKS[row.role][1]
            fill = {} if filled else {"markerfacecolor": "white"}
            ax.plot(x, row.mean, color=colour, marker=marker, markersize=4.5, **style.NO_LINE, **fill)
        ax.set_xlabel(label)
        ax.grid(axis="y")
        ax.margins(y=0.12)
    known = [name for name in RUNTIME_LINES if name in networks and networks[name].notna().any()]
    for name in known:
        at = means["model"].map(costs[name])[whole].dropna()
        edge = pareto(at, means.loc[at.index, "mean"])
        look = dict(color=style.GREY, linewidth=0.8, linestyle=RUNTIME_LINES[name], zorder=1)
        axes[-1].plot(at[edge], means.loc[edge, "mean"], drawstyle="steps-post", **look)
    every = costs.loc[means["model"], ["eager", *known]].to_numpy()
    style.log_axis(axes[-1].xaxis, np.nanmin(every) / 1.6, np.nanmax(every) * 2.2)
    axes[0].set_ylabel("Dice")
    handles = _role_handles(means["role"])
    for share, line, fill in zip(shares, LINES, (style.DARK, "white"), strict=False):
        look = dict(color=style.DARK, marker="o", markerfacecolor=fill, linestyle=line)
        handles += style.legend_lines({f"{share} of the labels, and their frontier": look})
    grey = {f"frontier in {RUNTIMES[name]}": dict(color=style.GREY, linestyle=RUNTIME_LINES[name]) for name in known}
    style.legend_below(figure, handles + style.legend_lines(grey), columns=3)
    figure.draw_without_rendering()  # names are placed where the layout has left room
    for ax, (column, (_, unit)) in zip(axes, PANELS.items(), strict=True):
        _name_networks(ax, means.assign(at=means["model"].map(costs[column]) / unit))
    note = f"Points: mean over patients ({patients_text(means['n'], means['volumes'])}); intervals stand in the table. "
    note += "Frontiers: no cheaper network reaches as much Dice. Costs are of one slice, without a teacher's "
    note += "reconstruction decoder; latency: median, batch 1, one thread, in PyTorch"
    figure.set_label(f"{note}; grey: in other libraries, with the Dice of PyTorch in float32." if known else f"{note}.")
    return figure


@plt.rc_context(style.STYLE)
def dimensions(table: pd.DataFrame, costs: pd.DataFrame) -> Figure:
    """Mean Dice over what a volume takes on a CPU, of networks of slices (left) and of volumes (right).

    Args:
        table: tidy, of both, with a column dimensions; students alone and distilled, and their teacher.
        costs: a row per network and dimensions: model, dimensions and volume_ms.
    """
    style.need_columns(table, ["model", "method", "role", "fraction", "dimensions"], "dimensions", "`Results.cases`")
    means = summarise(table)
    means["at"] = volume_times(means, costs)
    figure, axes = plt.subplots(1, 2, figsize=(style.DOUBLE, 90 * style.MM), sharex=True, sharey=True)
    for ax, (number, title) in zip(axes, SHAPES.items(), strict=True):
        own = means[means["dimensions"] == number]
        for row in own.itertuples():
            colour, marker = LOOKS[row.role][1]
            fill = {} if row.fraction == means["fraction"].max() else {"markerfacecolor": "white"}
            ax.errorbar(
                row.at, row.mean, yerr=[[row.mean - row.low], [row.high - row.mean]], color=style.GREY, linewidth=0.6
            )
            ax.plot(row.at, row.mean, color=colour, marker=marker, markersize=4.5, **style.NO_LINE, **fill)
        ax.set(title=title, xlabel="CPU latency (ms per volume)")
        ax.grid(axis="y")
        ax.margins(y=0.12)
    style.log_axis(axes[0].xaxis, means["at"].min() / 1.6, means["at"].max() * 1.6)
    axes[0].set_ylabel("Dice")
    handles = _role_handles(means["role"])
    for share, fill in zip(sorted(set(means["fraction"]))[::-1], (style.DARK, "white"), strict=False):
        look = dict(color=style.DARK, marker="o", markerfacecolor=fill, linestyle="")
        handles += style.legend_lines({f"{percent(share)} of the labels": look})
    style.legend_below(figure, handles, columns=3)
    figure.draw_without_rendering()
    for ax, number in zip(axes, SHAPES, strict=True):
        _name_networks(ax, means[means["dimensions"] == number])
    figure.set_label(
        f"Mean and 95 % interval over patients ({patients_text(means['n'], means['volumes'])}). Latency: median of one "
        "thread in PyTorch, of all slices or windows of an average volume, one at a time."
    )
    return figure


def _role_handles(roles: pd.Series) -> list[Line2D]:
    """Of the legend, a mark for each role that is there."""
    shown = {label: look for role, (label, look) in LOOKS.items() if (roles == role).any()}
    return style.legend_lines({name: dict(color=look[0], marker=look[1], linestyle="") for name, look in shown.items()})


def _name_networks(ax: Axes, rows: pd.DataFrame) -> None:
    """The name of each network beside its highest point, where it covers neither points nor other names."""
    renderer = ax.figure.canvas.get_renderer()
    marks = [line.get_xydata() for line in ax.lines if line.get_linestyle() == "None"]
    points = ax.transData.transform(np.concatenate(marks))
    taken, frame, scale = [], ax.get_window_extent(renderer), ax.figure.dpi / 72
    look = dict(textcoords="offset points", fontsize=7, path_effects=[withStroke(linewidth=1.5, foreground="white")])
    best = rows.loc[rows.groupby("model")["mean"].idxmax()].sort_values("mean", ascending=False)
    for row in best.itertuples():
        point, choices = (row.at, row.mean), []
        text = ax.annotate(row.model, point, xytext=(0, 0), **look)
        for distance, (across, up) in product((5, 12, 20, 30, 42), PLACES):
            text.set_position((distance * across, distance * up))
            how = dict(ha="center" if not across else "left" if across > 0 else "right")
            how |= dict(va="bottom" if up > 0.5 else "top" if up < -0.5 else "center")
            text.set(**how)
            box = text.get_window_extent(renderer)
            room = box.padded(3 * scale)
            bad = sum(room.overlaps(other) for other in taken) + room.count_contains(points)
            bad += 100 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            choices.append((bad, distance, text.get_position(), how, box))
        _, distance, place, how, box = min(choices, key=lambda choice: choice[:2])
        text.remove()
        line = dict(arrowstyle="-", color=style.GREY, linewidth=0.4, shrinkA=0, shrinkB=2) if distance > 5 else None
        ax.annotate(row.model, point, xytext=place, arrowprops=line, **how, **look)
        taken.append(box)
