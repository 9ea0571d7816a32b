"""Figures of how the networks trained: validation Dice along the training, and whether each term acted."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.analysis.figures import style
from kdlib.analysis.labels import method_labels, methods
from kdlib.config import InputError

COLUMNS = ["run", "method", "epoch", "name", "value"]
DIAGNOSTICS = {  # kind of row in a history -> (title, value that an inactive term would show)
    "share": ("share of the gradient", 0.0), "infonce_over_chance": ("InfoNCE relative to chance", 1.0),
    "projector_change": ("change of the projectors", 0.0),
}  # fmt: skip


def _lines(ax: Axes, rows: pd.DataFrame, hue: str, styles: Mapping[str, Mapping[str, str]], x: str) -> None:
    """Mean over runs, a line per value of `hue`, and a band from the lowest to the highest run."""
    for name, look in styles.items():
        chosen = rows[rows[hue] == name]
        if len(chosen):
            every = max(1, chosen[x].nunique() // 6)
            how = dict(look, markersize=3.5, markeredgewidth=0, markevery=every, err_kws=dict(alpha=0.15, linewidth=0))
            sns.lineplot(chosen, x=x, y="value", errorbar=("pi", 100), ax=ax, legend=False, **how)
    ax.set(xlabel="", ylabel="")
    ax.grid(axis="y")


@plt.rc_context(style.STYLE)
def learning_curves(history: pd.DataFrame) -> Figure:
    """Validation Dice along the training: a panel per network, a line per method, a band from least to most run.

    Args:
        history: tidy, columns run, method, epoch, name, value and the identity columns.

    Raises: InputError: a column or the validation Dice is missing.
    """
    style.need_columns(history, COLUMNS, "history of trainings", "`Results.history`")
    rows = history[history["name"] == "val_dice"]
    if rows.empty:
        raise InputError(f"history has no val_dice: it has {', '.join(history['name'].unique())}")
    rows = rows.assign(done=100 * rows["epoch"] / history.groupby("run")["epoch"].max().loc[rows["run"]].to_numpy())
    found, styles = methods(rows), style.method_styles(rows)
    group = found["model"].where(found["role"] != "teacher", "teachers")
    names = list(group.unique())
    columns = min(4, len(names))
    width = style.SINGLE if columns == 1 else style.DOUBLE
    figure, axes = style.panels(len(names), columns, width, 48, 22, sharex=True, sharey=True)
    for ax, name in zip(axes, names, strict=True):
        chosen = group.index[group == name]
        own = {method: styles[method] for method in chosen}
        _lines(ax, rows[rows["method"].isin(chosen)], "method", own, "done")
        ax.set_title(name)
        looks = {found.loc[method, "label"]: look for method, look in own.items()}
        ax.legend(handles=style.legend_lines(looks, markersize=3.5), loc="lower right", handlelength=2.4)
    figure.supxlabel("steps (% of the training)", fontsize=9)
    figure.supylabel("validation Dice", fontsize=9)
    figure.set_label(
        f"Lines: mean of the runs of a method ({_runs_text(rows)}); bands: from the lowest to the highest."
    )
    return figure


def _runs_text(history: pd.DataFrame) -> str:
    low, high = history.groupby("method")["run"].nunique().agg(["min", "max"])
    return f"n = {low}" + (f" to {high}" if high > low else "") + " run" + ("s" if high > 1 else "")


@plt.rc_context(style.STYLE)
def gradient_diagnostics(history: pd.DataFrame) -> Figure:
    """Whether each distillation term acts, by epoch: a line per term (mean of the runs), a band from least to most.

    Panels, as far as the history has them: `share/<term>` of the gradient on the student, `infonce_over_chance/<term>`
    (InfoNCE over ln N; 1 is a guess), and `projector_change/<term>` (how far its learned projectors moved in the epoch,
    relative to their norm).

    Args:
        history: tidy, of one method, columns run, method, epoch, name, value.

    Raises: InputError: a missing column, several methods, or no rows of any panel.
    """
    style.need_columns(history, COLUMNS, "history of trainings", "`Results.history`")
    labels = method_labels(history)
    if len(labels) > 1:
        raise InputError(f"gradient_diagnostics: several methods; give the history of one of {', '.join(labels)}")
    kinds = history["name"].str.partition("/")
    rows = history.assign(kind=kinds[0], term=kinds[2])
    rows = rows[(kinds[1] == "/") & rows["kind"].isin(list(DIAGNOSTICS))]
    shown = [kind for kind in DIAGNOSTICS if (rows["kind"] == kind).any()]
    if not shown:
        named = f"the history has no {', '.join(f'{kind}/<term>' for kind in DIAGNOSTICS)}"
        raise InputError(f"gradient_diagnostics: {named}: draw a distilled student trained with this version")
    # the segmentation first, then the thesis's terms, then others as they come
    terms = sorted(rows["term"].unique(), key=lambda term: [*style.TERM_COLOURS, term].index(term))
    styles = {}
    for n, term in enumerate(terms):
        colour = style.TERM_COLOURS.get(term, style.OTHER_COLOURS[n % 6])
        styles[term] = dict(color=colour, marker="osD^vPX*"[n % 8], linestyle="-")
    width = style.SINGLE if len(shown) == 1 else style.DOUBLE
    figure, axes = style.panels(len(shown), len(shown), width, 44, 16)
    for ax, kind in zip(axes, shown, strict=True):
        title, inactive = DIAGNOSTICS[kind]
        _lines(ax, rows[rows["kind"] == kind], "term", styles, "epoch")
        ax.set(title=title, xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.margins(y=0.08)
        # a term without effect must look so, not be magnified
        ax.axhline(inactive, color="black", linestyle=":", linewidth=0.8, zorder=0)
        bottom, top = ax.get_ylim()
        ax.set_ylim(min(bottom, inactive - 0.02), max(top, inactive + 0.1))
    style.legend_below(figure, style.legend_lines(styles), handlelength=3)
    note = f"{labels[rows['method'].iloc[0]]}. Lines: mean of the runs ({_runs_text(rows)}); bands: from the lowest to "
    figure.set_label(f"{note}the highest run; dotted: what an inactive term would show.")
    return figure
