"""The pictures of `notebooks/explore.ipynb`, for the screen; those of the chapters are in `kdlib.analysis.figures`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from kdlib.analysis.figures.style import ERRORS, ORANGE, SKY, STYLE
from kdlib.apps.explore import CaseView
from kdlib.apps.gradients import Gradients
from kdlib.metrics import METRICS

# of classes, for the colour-blind (after Paul Tol), other than those of errors
COLOURS = ("#44BB99", "#EEDD88", "#6655CC", "#BBCC33", "#DDDDDD", "#AA7744", "#99DDFF", "#AAAA00", "#FFAABB")


def _figure(width: float, height: float) -> Figure:
    """A figure of its own (inches), which pyplot does not keep."""
    return Figure(figsize=(width, height), layout="constrained")


def _paint(ax: Axes, mask: np.ndarray, colours: tuple[str, ...], alpha: float, **how) -> None:
    """Lays a mask over what is drawn: k in the k-th colour, 0 not at all."""
    shades = ListedColormap([colours[number % len(colours)] for number in range(max(int(mask.max()), 1))])
    shown = np.ma.masked_equal(mask, 0)
    ax.imshow(shown, cmap=shades, vmin=1, vmax=shades.N, alpha=alpha, interpolation="nearest", **how)


def legend(seen: CaseView) -> dict[str, str]:
    """Each class, and each kind of difference that there can be, -> its colour."""
    errors = {kind: colour for colour, kind in ERRORS[: 3 if len(seen.classes) > 1 else 2]}
    return dict(zip(seen.classes, itertools.cycle(COLOURS), strict=False)) | errors


@rc_context(STYLE)
def draw_slice(seen: CaseView, number: int) -> Figure:
    """One slice of a case: a panel for each mask, and below one for each difference between two of them."""
    geometry = seen.geometry
    rows = (seen.masks, COLOURS), (seen.differences(), tuple(colour for colour, _ in ERRORS))
    columns = max(len(panels) for panels, _ in rows)
    figure = _figure(2.6 * columns, 5.6)
    axes = figure.subplots(2, columns, squeeze=False)
    image = geometry.orient(seen.image)[number]
    aspect = geometry.factor[0] / geometry.factor[1]
    for row, (panels, colours) in zip(axes, rows, strict=True):
        for ax, (name, mask) in zip(row, panels.items(), strict=False):
            ax.imshow(image, cmap="gray", vmin=seen.shown[0], vmax=seen.shown[1], aspect=aspect)
            _paint(ax, geometry.orient(mask)[number], colours, 0.5, aspect=aspect)
            ax.set_title(name, fontsize=8)
    for ax in axes.flat:
        ax.set_axis_off()
    handles = [Patch(color=colour, label=name) for name, colour in legend(seen).items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    figure.suptitle(f"{seen.case}, slice {number} of 0 to {geometry.depth - 1}", fontsize=9)
    return figure


@rc_context(STYLE)
def draw_gradients(found: Gradients) -> Figure:
    """The slice with truth and region, and each term's gradient on it, all on one scale: brighter is larger."""
    columns = 1 + len(found.maps)
    figure = _figure(2.2 * min(columns, 5), 2.5 * -(-columns // 5))
    axes = figure.subplots(-(-columns // 5), min(columns, 5), squeeze=False).flatten()
    top, bottom, left, right = found.region
    axes[0].imshow(found.image, cmap="gray", vmin=0, vmax=1)
    _paint(axes[0], found.truth, COLOURS, 0.5)
    axes[0].set_title("slice, truth and region", fontsize=8)
    largest = max((float(gradient.max()) for gradient in found.maps.values()), default=0.0) or 1.0
    for ax, (name, gradient) in zip(axes[1:], found.maps.items(), strict=False):
        picture = ax.imshow(gradient, cmap="magma", vmin=0, vmax=largest)
        ax.set_title(f"gradient of {name}", fontsize=8)
    if found.maps:
        bar = figure.colorbar(picture, ax=axes[1:columns].tolist(), shrink=0.8, format="%.1e")
        bar.set_label("gradient norm per pixel", fontsize=7)
        bar.ax.tick_params(labelsize=6)
    for ax in axes[:columns]:
        look = dict(fill=False, edgecolor=SKY, linewidth=1.2)
        ax.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, **look))
    for ax in axes:
        ax.set_axis_off()
    return figure


@rc_context(STYLE)
def draw_comparison(table: pd.DataFrame, a: str, b: str, metric: str = "dice") -> Figure:
    """Two runs by case, from `compare`: a row per case (classes averaged), the least favourable to `a` on top."""
    rows = table.groupby("case")[["a", "b", "difference"]].mean()
    rows = rows.sort_values("difference", ascending=METRICS[metric].higher is not False)
    figure = _figure(6.0, 1.3 + 0.16 * len(rows))
    ax = figure.subplots()
    at = np.arange(len(rows))
    ax.hlines(at, rows["b"], rows["a"], color="#999999", linewidth=1)
    ax.plot(rows["b"], at, "o", color=SKY, label=b, markersize=5)
    ax.plot(rows["a"], at, "D", color=ORANGE, label=a, markersize=4)
    ax.set(xlabel=METRICS[metric].heading, ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(at, rows.index)
    ax.grid(axis="x")
    figure.legend(loc="outside upper center")
    return figure


@rc_context(STYLE)
def draw_history(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Validation Dice, the losses and the terms' shares of the gradient by epoch, a line style per training.

    Args:
        histories: name -> history of `train_small` (or of a run).
    """
    figure = _figure(8.5, 3.2)
    axes = figure.subplots(1, 3)
    lines = dict(zip(histories, ("-", "--", ":", "-."), strict=False))
    for title, history in histories.items():
        shares = [name for name in history["name"].unique() if name.startswith("share/")]
        for ax, names in zip(axes, (["val_dice"], ["loss", "segmentation"], shares), strict=True):
            for number, name in enumerate(names):
                curve = history[history["name"] == name]
                how = dict(color=f"C{number}", label=name.removeprefix("share/"))
                ax.plot(curve["epoch"], curve["value"], lines[title], marker=".", **how)
    last = max(history["epoch"].max() for history in histories.values())
    for ax, title in zip(axes, ("validation Dice", "losses", "shares of the gradient"), strict=True):
        ax.set(title=title, xlabel="epoch", xlim=(0.7, last + 0.3))
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.ticklabel_format(axis="y", useOffset=False)
        handles, labels = ax.get_legend_handles_labels()
        colours = {label: Patch(color=line.get_color()) for label, line in zip(labels, handles, strict=True)}
        if len(colours) > 1:
            ax.legend(colours.values(), colours, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    trained = [Line2D([], [], color="black", linestyle=line, label=title) for title, line in lines.items()]
    figure.legend(handles=trained, loc="outside upper left", ncols=4)
    return figure
