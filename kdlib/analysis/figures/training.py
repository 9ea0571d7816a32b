"""Figures of how the networks trained: losses, validation, and whether each term acted."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kdlib.analysis.figures.style import (
    DOUBLE,
    MM,
    OTHER_COLOURS,
    SINGLE,
    STYLE,
    TERM_COLOURS,
    entries_beside,
    legend_below,
    method_style,
    n_text,
    need_columns,
)
from kdlib.config import InputError

LIVENESS = {  # kind of row in a history -> (title, value that would mean nothing is learnt)
    "share": ("share of the gradient", None), "cosine": ("cosine from step to step", 0.0),
    "chance": ("loss relative to chance", 1.0), "moved": ("movement of the projectors", None),
}  # fmt: skip
SHADES = ("", "///", "...", "xxx", "\\\\\\", "ooo")  # hatches of terms, for reading in grey


@plt.rc_context(STYLE)
def training_curves(history: pd.DataFrame, names: Sequence[str] | None = None) -> Figure:
    """Losses and validation Dice against the epoch: a line an arm (mean of its runs), a band from least to most.

    Args:
        history: tidy, columns run, arm, epoch, name, value.
        names: panels, by `name`; by default everything but learning rate and gradients.

    Raises:
        InputError: a column or a name is missing, or an arm mixes recipes.
    """
    absent = [column for column in ("run", "arm", "epoch", "name", "value") if column not in history]
    if absent or history.empty:
        raise InputError(f"history of trainings: no {', '.join(absent) or 'rows'}; give `Results.history`")
    if "recipe" in history and history.groupby("arm")["recipe"].nunique().max() > 1:
        raise InputError("history of trainings: an arm has several recipes; filter by recipe")
    known = list(history["name"].unique())
    names = [name for name in known if name != "lr" and "/" not in name] if names is None else list(names)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"history has no {', '.join(unknown) or 'losses'}: it has {', '.join(known)}")
    names.sort(key="val_dice".__ne__)  # validation first, the rest as they come
    titles = {"val_dice": "validation Dice", "loss": "total loss", "lr": "learning rate"}
    arms = list(history["arm"].unique())
    columns = min(len(names), 4 if -len(names) % 4 < -len(names) % 3 else 3)  # the fewer empty places
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(DOUBLE, (41 * rows + 12) * MM), squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        for arm in arms:
            chosen = history[(history["arm"] == arm) & (history["name"] == name)]
            curve = chosen.groupby("epoch")["value"].agg(["mean", "min", "max"])
            style = method_style(arm)
            ax.plot(curve.index, curve["mean"], **style, markevery=max(1, len(curve) // 6), markersize=3)
            ax.fill_between(curve.index, curve["min"], curve["max"], color=style["color"], alpha=0.15, linewidth=0)
        ax.set_title(titles.get(name, name.replace("grad/", "gradient of ") if "/" in name else f"{name} loss"))
        ax.set_xlabel("epoch")
        ax.tick_params(labelsize=7)
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes.flat[len(names) :]:
        ax.remove()
    legend_below(
        figure,
        [Line2D([], [], label=arm, **method_style(arm)) for arm in arms],
        entries_beside(arms, DOUBLE),
        handlelength=3,
    )
    runs = history.groupby("arm")["run"].nunique()
    figure.set_label(f"Lines: mean of the runs of an arm ({n_text(runs)}); bands: from the lowest to the highest run.")
    return figure


@plt.rc_context(STYLE)
def gradient_diagnostics(history: pd.DataFrame, arm: str | None = None, recipe: str | None = None) -> Figure:
    """Whether each distillation term acts, epoch by epoch: a line a term (mean of the runs), a band from least to most.

    Panels, as far as the history has them: the share of the gradient on the student that comes from the term
    (`share/<term>`), the cosine between the term's gradients of successive steps (`cosine/`), its loss relative to a
    guess among all negatives (`infonce_over_chance/`, InfoNCE over ln N; 1 is chance), and how far its learned
    projectors moved in the epoch, relative to their norm (`projector_change/`).

    Args:
        history: tidy, columns run, arm, epoch, name, value, maybe recipe.
        arm, recipe: which to draw; they may be left out where the history has only one.

    Raises:
        InputError: a missing column, several arms or recipes, or no rows of any panel.
    """
    need_columns(history, ["run", "arm", "epoch", "name", "value"], "history of trainings", "Results.history")
    for column, wanted in (("arm", arm), ("recipe", recipe)):
        if column in history:
            known = list(history[column].unique())
            if wanted is None and len(known) > 1 or wanted is not None and wanted not in known:
                raise InputError(f"gradient_diagnostics: {column} {wanted!r}; choose from {', '.join(map(str, known))}")
            history = history if wanted is None else history[history[column] == wanted]
    kinds = history["name"].str.partition("/")
    rows = history.assign(kind=kinds[0], term=kinds[2])
    rows = rows[(kinds[1] == "/") & rows["kind"].isin(list(LIVENESS))]
    panels = [kind for kind in LIVENESS if (rows["kind"] == kind).any()]
    if not panels:
        named = ", ".join(f"{kind}/<term>" for kind in LIVENESS)
        raise InputError(
            f"gradient_diagnostics: the history has no {named}: draw a distilled student trained with this version"
        )
    terms = _in_order(rows["term"])
    styles = {
        term: dict(color=_term_colour(term, number), marker="osD^vPX*"[number % 8], linestyle="-")
        for number, term in enumerate(terms)
    }
    columns = {1: 1, 3: 3}.get(len(panels), 2)
    lines = -(-len(panels) // columns)
    size = (DOUBLE if columns > 1 else SINGLE, (44 * lines + 12) * MM)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for ax, kind in zip(axes.flat, panels, strict=False):
        title, idle = LIVENESS[kind]
        if idle is not None:
            ax.axhline(idle, color="black", linestyle=":", linewidth=0.8, zorder=0)
        for term in terms:
            chosen = rows[(rows["kind"] == kind) & (rows["term"] == term)]
            if len(chosen):
                line = chosen.groupby("epoch")["value"].agg(["mean", "min", "max"])
                style = styles[term]
                ax.plot(line.index, line["mean"], **style, markevery=max(1, len(line) // 6), markersize=3)
                ax.fill_between(line.index, line["min"], line["max"], color=style["color"], alpha=0.15, linewidth=0)
        ax.set(title=title, xlabel="epoch")
        ax.tick_params(labelsize=7)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.margins(y=0.08)
        if idle is not None:  # a term that idles must look idle, not be magnified
            bottom, top = ax.get_ylim()
            ax.set_ylim(min(bottom, idle - 0.1), max(top, idle + 0.1))
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    handles = [Line2D([], [], label=term, **styles[term]) for term in terms]
    legend_below(figure, handles, columns=entries_beside(terms, size[0]), handlelength=3)
    runs = rows["run"].nunique()
    figure.set_label(
        f"{rows['arm'].iloc[0]}. Lines: mean of the runs (n = {runs}); bands: from the lowest to the highest run; "
        "dotted: what an idle term would show."
    )
    return figure


@plt.rc_context(STYLE)
def gradient_shares(history: pd.DataFrame) -> Figure:
    """Which part of the gradient on the student each term gave, epoch by epoch: a panel an arm, mean over its runs.

    Args:
        history: tidy, columns run, arm, epoch, name, value; the rows `share/<term>` are drawn, which are a term's part
            of the sum of all terms' gradient norms.

    Raises:
        InputError: a missing column, no rows `share/<term>`, or an arm mixes recipes.
    """
    need_columns(history, ["run", "arm", "epoch", "name", "value"], "history of trainings", "Results.history")
    rows = history[history["name"].str.startswith("share/")]
    if rows.empty:
        raise InputError("gradient shares: the history has no share/<term>: draw students that were distilled")
    if "recipe" in rows and rows.groupby("arm")["recipe"].nunique().max() > 1:
        raise InputError("gradient shares: an arm has several recipes; filter by recipe")
    rows = rows.assign(term=rows["name"].str.removeprefix("share/"))
    arms, terms = list(rows["arm"].unique()), _in_order(rows["term"])
    columns = min(4, len(arms))
    lines = -(-len(arms) // columns)
    width = DOUBLE if columns > 2 else SINGLE
    figure, axes = plt.subplots(
        lines, columns, figsize=(width, (44 * lines + 14) * MM), sharex=True, sharey=True, squeeze=False
    )
    looks = {term: dict(facecolor=_term_colour(term, i), hatch=SHADES[i % 6]) for i, term in enumerate(terms)}
    for ax, arm in zip(axes.flat, arms, strict=False):
        shares = rows[rows["arm"] == arm].pivot_table(index="epoch", columns="term", values="value")
        shares = shares.reindex(columns=terms).fillna(0.0)
        # an epoch's share holds for the whole of it, so that a single one has a width too
        edges = np.append(shares.index - 0.5, shares.index[-1] + 0.5)
        tops = shares.cumsum(axis=1)
        for term in terms:
            bottom, top = (np.append(of, of.iloc[-1]) for of in (tops[term] - shares[term], tops[term]))
            ax.fill_between(edges, bottom, top, step="post", edgecolor="white", linewidth=0.3, **looks[term])
        ax.set(title=arm, xlim=(edges[0], edges[-1]), ylim=(0, 1), xlabel="epoch")
        ax.tick_params(labelsize=7)
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("share of the gradient")
    for ax in axes.flat[len(arms) :]:
        ax.remove()
    handles = [Patch(label=term, edgecolor="white", linewidth=0, **looks[term]) for term in terms]
    legend_below(figure, handles, columns=entries_beside(terms, width))
    runs = rows.groupby("arm")["run"].nunique()
    figure.set_label(
        f"Areas: each term's part of the sum of all terms' gradient norms on the student, mean of the runs of an arm "
        f"({n_text(runs)}) in each epoch."
    )
    return figure


def _in_order(terms: pd.Series) -> list[str]:
    """The segmentation first, then the thesis's terms, then others as they come."""
    return sorted(terms.unique(), key=lambda term: [*TERM_COLOURS, term].index(term))


def _term_colour(term: str, number: int) -> str:
    return TERM_COLOURS.get(term, OTHER_COLOURS[number % len(OTHER_COLOURS)])
