"""Figures of how the networks trained: losses, validation, and whether each term acted."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.analysis.figures import style
from kdlib.analysis.labels import method_labels
from kdlib.config import InputError

COLUMNS = ["run", "method", "epoch", "name", "value"]
DIAGNOSTICS = {  # kind of row in a history -> (title, value that an inactive term would show)
    "share": ("share of the gradient", None), "cosine": ("cosine from step to step", 0.0),
    "infonce_over_chance": ("InfoNCE relative to chance", 1.0), "projector_change": ("change of the projectors", None),
}  # fmt: skip


def _lines(ax: Axes, rows: pd.DataFrame, hue: str, styles: dict[str, dict[str, str]]) -> None:
    """Mean over runs by epoch, a line per value of `hue`, and a band from the lowest to the highest run."""
    for name, look in styles.items():
        chosen = rows[rows[hue] == name]
        if len(chosen):
            every = max(1, chosen["epoch"].nunique() // 6)
            how = dict(look, markersize=3, markeredgewidth=0, markevery=every, err_kws=dict(alpha=0.15, linewidth=0))
            sns.lineplot(chosen, x="epoch", y="value", errorbar=("pi", 100), ax=ax, legend=False, **how)
    ax.set(xlabel="epoch", ylabel="")
    ax.xaxis.get_major_locator().set_params(integer=True)


@plt.rc_context(style.STYLE)
def training_curves(history: pd.DataFrame, names: Sequence[str] | None = None) -> Figure:
    """Losses and validation Dice by epoch: a line per method (mean of its runs), a band from least to most.

    Args:
        history: tidy, columns run, method, epoch, name, value and the identity columns.
        names: panels, by `name`; by default everything but learning rate and gradients.

    Raises: InputError: a column or a name is missing.
    """
    style.need_columns(history, COLUMNS, "history of trainings", "`Results.history`")
    known = list(history["name"].unique())
    names = [name for name in known if name != "lr" and "/" not in name] if names is None else list(names)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"history has no {', '.join(unknown) or 'losses'}: it has {', '.join(known)}")
    names.sort(key="val_dice".__ne__)  # validation first, the rest as they come
    titles = {"val_dice": "validation Dice", "loss": "total loss", "lr": "learning rate"}
    labels, styles = method_labels(history), style.method_styles(history)
    columns = min(len(names), 4 if -len(names) % 4 < -len(names) % 3 else 3)  # the fewer empty places
    figure, axes = style.panels(len(names), columns, style.DOUBLE, 41, 12)
    for ax, name in zip(axes, names, strict=True):
        _lines(ax, history[history["name"] == name], "method", styles)
        ax.set_title(titles.get(name, name.replace("grad/", "gradient of ") if "/" in name else f"{name} loss"))
    looks = {labels[method]: look for method, look in styles.items()}
    style.legend_below(figure, style.legend_lines(looks), handlelength=3)
    runs = _runs_text(history)
    figure.set_label(f"Lines: mean of the runs of a method ({runs}); bands: from the lowest to the highest run.")
    return figure


def _runs_text(history: pd.DataFrame) -> str:
    low, high = history.groupby("method")["run"].nunique().agg(["min", "max"])
    return f"n = {low}" + (f" to {high}" if high > low else "") + " run" + ("s" if high > 1 else "")


@plt.rc_context(style.STYLE)
def gradient_diagnostics(history: pd.DataFrame, method: str | None = None) -> Figure:
    """Whether each distillation term acts, by epoch: a line per term (mean of the runs), a band from least to most.

    Panels, as far as the history has them: `share/<term>` of the gradient on the student, `cosine/<term>` between its
    gradients of successive steps, `infonce_over_chance/<term>` (InfoNCE over ln N; 1 is a guess), and
    `projector_change/<term>` (how far its learned projectors moved in the epoch, relative to their norm).

    Args:
        history: tidy, columns run, method, epoch, name, value.
        method: which to draw; it may be left out where the history has only one.

    Raises: InputError: a missing column, several methods, or no rows of any panel.
    """
    style.need_columns(history, COLUMNS, "history of trainings", "`Results.history`")
    labels = method_labels(history)
    if method is None and len(labels) > 1 or method is not None and method not in labels:
        raise InputError(f"gradient_diagnostics: method {method!r}; choose from {', '.join(labels)}")
    history = history if method is None else history[history["method"] == method]
    kinds = history["name"].str.partition("/")
    rows = history.assign(kind=kinds[0], term=kinds[2])
    rows = rows[(kinds[1] == "/") & rows["kind"].isin(list(DIAGNOSTICS))]
    shown = [kind for kind in DIAGNOSTICS if (rows["kind"] == kind).any()]
    if not shown:
        named = f"the history has no {', '.join(f'{kind}/<term>' for kind in DIAGNOSTICS)}"
        raise InputError(f"gradient_diagnostics: {named}: draw a distilled student trained with this version")
    terms = _in_order(rows["term"])
    looks = [dict(color=_term_colour(term, n), marker="osD^vPX*"[n % 8], linestyle="-") for n, term in enumerate(terms)]
    styles = dict(zip(terms, looks, strict=True))
    columns = {1: 1, 3: 3}.get(len(shown), 2)
    figure, axes = style.panels(len(shown), columns, style.DOUBLE if columns > 1 else style.SINGLE, 44, 12)
    for ax, kind in zip(axes, shown, strict=True):
        title, inactive = DIAGNOSTICS[kind]
        _lines(ax, rows[rows["kind"] == kind], "term", styles)
        ax.set(title=title)
        ax.margins(y=0.08)
        if inactive is not None:  # a term without effect must look so, not be magnified
            ax.axhline(inactive, color="black", linestyle=":", linewidth=0.8, zorder=0)
            bottom, top = ax.get_ylim()
            ax.set_ylim(min(bottom, inactive - 0.1), max(top, inactive + 0.1))
    style.legend_below(figure, style.legend_lines(styles), handlelength=3)
    note = f"{labels[rows['method'].iloc[0]]}. Lines: mean of the runs ({_runs_text(rows)}); bands: from the lowest to "
    figure.set_label(f"{note}the highest run; dotted: what an inactive term would show.")
    return figure


@plt.rc_context(style.STYLE)
def gradient_shares(history: pd.DataFrame) -> Figure:
    """Which part of the gradient on the student each term gave, epoch by epoch: a panel per method, mean over its runs.

    Args:
        history: tidy, columns run, method, epoch, name, value; the rows `share/<term>` are drawn, which are a term's
            part of the sum of all terms' gradient norms.

    Raises: InputError: a missing column, or no rows `share/<term>`.
    """
    style.need_columns(history, COLUMNS, "history of trainings", "`Results.history`")
    rows = history[history["name"].str.startswith("share/")]
    if rows.empty:
        raise InputError("gradient shares: the history has no share/<term>: draw students that were distilled")
    rows = rows.assign(term=rows["name"].str.removeprefix("share/"))
    labels, terms = method_labels(rows), _in_order(rows["term"])
    columns = min(4, len(labels))
    width = style.DOUBLE if columns > 2 else style.SINGLE
    figure, axes = style.panels(len(labels), columns, width, 44, 14, sharex=True, sharey=True)
    looks = {term: dict(facecolor=_term_colour(term, i), hatch=style.SHADES[i % 6]) for i, term in enumerate(terms)}
    for ax, (method, label) in zip(axes, labels.items(), strict=True):
        shares = rows[rows["method"] == method].pivot_table(index="epoch", columns="term", values="value")
        shares = shares.reindex(columns=terms).fillna(0.0)
        # an epoch's share holds for the whole of it, so that a single one has a width too
        edges = np.append(shares.index - 0.5, shares.index[-1] + 0.5)
        tops = shares.cumsum(axis=1)
        for term in terms:
            bottom, top = (np.append(of, of.iloc[-1]) for of in (tops[term] - shares[term], tops[term]))
            ax.fill_between(edges, bottom, top, step="post", edgecolor="white", linewidth=0.3, **looks[term])
        ax.set(title=label, xlim=(edges[0], edges[-1]), ylim=(0, 1), xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes[::columns]:
        ax.set_ylabel("share of the gradient")
    style.legend_below(figure, style.legend_areas(looks))
    areas = (
        "Areas: each term's part of the sum of all terms' gradient norms on the student, mean of the runs of a method"
    )
    figure.set_label(f"{areas} ({_runs_text(rows)}) in each epoch.")
    return figure


def _in_order(terms: pd.Series) -> list[str]:
    """The segmentation first, then the thesis's terms, then others as they come."""
    return sorted(terms.unique(), key=lambda term: [*style.TERM_COLOURS, term].index(term))


def _term_colour(term: str, number: int) -> str:
    return style.TERM_COLOURS.get(term, style.OTHER_COLOURS[number % len(style.OTHER_COLOURS)])
