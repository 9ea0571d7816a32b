"""Figures that show slices: examples of all methods, and a montage of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from kdlib.config import InputError
from kdlib.figures.style import DOUBLE, MM, STYLE, legend_below

ERRORS = (("#56B4E9", "missed"), ("#D55E00", "too much"), ("#CC79A7", "wrong class"))
OUTLINES = (("-", "truth"), ("--", "prediction"))


@plt.rc_context(STYLE)
def qualitative(examples: pd.DataFrame, arms: Mapping[str, str], cases: Mapping[str, str]) -> Figure:
    """The slice with most truth of chosen cases: input, truth, and each arm's contours and errors.

    Args:
        examples: `Results.examples`: columns arm, case, seed, and image, truth, prediction (HW arrays); the lowest
            seed of an arm is shown.
        arms: role -> arm, e.g. {"teacher": "T1", "student": "S1 (50 %)", "distilled student": "KD(T1, S1)"}.
        cases: rule -> case, from `choose_cases`.

    Raises:
        InputError: no example of an arm and case, or several recipes of the arm.
    """
    if not arms or not cases:
        raise InputError("qualitative figure: give at least one arm and one case")
    side = DOUBLE / (len(arms) + 2)
    size = (DOUBLE, side * len(cases) + 16 * MM)
    figure, axes = plt.subplots(len(cases), len(arms) + 2, figsize=size, squeeze=False)
    confused = False
    for line, (rule, case) in zip(axes, cases.items(), strict=True):
        shown = [_example(examples, arm, case) for arm in arms.values()]
        image, truth = shown[0]["image"], shown[0]["truth"]
        confused |= truth.max() > 1
        rows, columns = _crop(np.any([truth > 0, *(example["prediction"] > 0 for example in shown)], axis=0))
        line[0].imshow(image, cmap="gray", vmin=0, vmax=255)
        corner, side = (columns.start - 0.5, rows.start - 0.5), rows.stop - rows.start
        line[0].add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=0.6))
        line[0].set_ylabel(f"{rule}\n{case}")
        for ax, prediction in zip(line[1:], [None, *(example["prediction"] for example in shown)], strict=True):
            ax.imshow(image[rows, columns], cmap="gray", vmin=0, vmax=255)
            _contours(ax, truth[rows, columns], "white", "solid")
            if prediction is not None:
                _errors(ax, truth[rows, columns], prediction[rows, columns])
                total = (prediction > 0).sum() + (truth > 0).sum()
                dice = 2 * ((prediction == truth) & (truth > 0)).sum() / total if total else 1.0
                ax.set_xlabel(f"slice Dice {dice:.2f}", labelpad=2)
    for ax, title in zip(axes[0], ["input", "truth", *(f"{role}\n{arm}" for role, arm in arms.items())], strict=True):
        ax.set_title(title)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    lines = [Line2D([], [], color="#AAAAAA", linestyle=style, label=label) for style, label in OUTLINES]
    patches = [Patch(color=colour, label=label) for colour, label in ERRORS[: 3 if confused else 2]]
    legend_below(figure, [*lines, *patches], columns=5)
    figure.set_label(f"Slices with the largest true area of n = {len(cases)} cases; box: the part shown beside it.")
    return figure


@plt.rc_context(STYLE)
def slice_montage(images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    """Slices side by side with their labels outlined; images and labels are uint8 NHW, one name a slice."""
    columns = min(6, len(names))
    rows = -(-len(names) // columns)
    side = DOUBLE / columns
    figure, axes = plt.subplots(rows, columns, figsize=(DOUBLE, rows * (side + 4 * MM)), squeeze=False)
    for ax, image, label, name in zip(axes.flat, images, labels, names, strict=False):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        _contours(ax, label, "#E69F00", "solid")
        ax.set_title(name, fontsize=7)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.set_label("One slice a case, the one with the most target, which is outlined.")
    return figure


def _example(examples: pd.DataFrame, arm: str, case: str) -> pd.Series:
    found = examples[(examples["arm"] == arm) & (examples["case"] == case)]
    if found.empty:
        raise InputError(f"no example slice of arm {arm!r} and case {case!r}: run that arm on the fold of the case")
    if "recipe" in found and found["recipe"].nunique() > 1:
        raise InputError(f"{arm!r} has examples of several recipes: filter them by recipe")
    return found.sort_values("seed").iloc[0]


def _crop(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a square about a mask, with a margin; the whole slice where the mask is empty."""
    if not mask.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1])
    where = [np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)]
    extent, shortest = max(np.ptp(side) + 1 for side in where), min(mask.shape)
    size = min(max(int(1.3 * extent), shortest // 4), shortest)
    starts = [(side[0] + side[-1] + 1 - size) // 2 for side in where]
    starts = np.clip(starts, 0, np.array(mask.shape) - size).tolist()
    return slice(starts[0], starts[0] + size), slice(starts[1], starts[1] + size)


def _contours(ax: Axes, labels: np.ndarray, colour: str, style: str) -> None:
    for value in np.unique(labels[labels > 0]):
        if (labels != value).any():  # a class that fills the view has no outline
            ax.contour(labels == value, levels=[0.5], colors=colour, linestyles=[style], linewidths=0.8)


def _errors(ax: Axes, truth: np.ndarray, prediction: np.ndarray) -> None:
    """Colours what is missed, too much or of the wrong class, and outlines the prediction."""
    true, said = truth > 0, prediction > 0
    wrong = (true & ~said, ~true & said, true & said & (truth != prediction))
    for (colour, _), mask in zip(ERRORS, wrong, strict=True):
        overlay = np.zeros((*mask.shape, 4))
        overlay[mask] = to_rgba(colour, 0.65)
        ax.imshow(overlay)
    _contours(ax, prediction, "#F0E442", (0, (2, 1.5)))
