"""Where the methods fail: Dice against the volume of the target and the thickness of the slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from kdlib.analysis.figures import style
from kdlib.analysis.intervals import interval, interval_text
from kdlib.analysis.labels import method_labels
from kdlib.analysis.patients import patients_text, per_patient, rows_of
from kdlib.analysis.sentences import signed
from kdlib.config import InputError
from kdlib.metrics import METRICS


@plt.rc_context(style.STYLE)
def failure(table: pd.DataFrame, cases: pd.DataFrame, chosen: Sequence[str] | None = None) -> Figure:
    """Where the methods fail: each patient's Dice against the target's volume, its enhancement and the thickness of
    slices.

    Patients are grouped, by thirds of volume and mean intensity (halves or none where they are few) and by thickness;
    lines join the groups' means. A data set of one thickness has no panel of it, nor has one whose cases were saved
    without mean intensities.

    Args:
        table: tidy, with the metrics dice and truth_volume.
        cases: columns case, "thickness (mm)" and of each class "... mean intensity", as notebook 00 saves them.
        chosen: which methods to draw, by default all.

    Raises: InputError: a missing column, metric or method, or a case whose thickness is not known.
    """
    style.need_columns(cases, ["case", "thickness (mm)"], "cases", "tables/00_data_cases.csv; run notebook 00 again")
    known = per_patient(table, "dice")
    chosen = list(known["method"].unique()) if chosen is None else list(chosen)
    has = known["method"].unique()
    if missing := [method for method in chosen if method not in has]:
        raise InputError(f"failure: no method {', '.join(missing)} in the table: it has {', '.join(has)}")
    wide = known.pivot(index="patient", columns="method", values="value")[chosen].dropna()
    rows = rows_of(table, "truth_volume", ["method"])
    owner = rows.drop_duplicates("case").set_index("case")["patient" if "patient" in rows else "case"]
    volume = rows.groupby(["case", "class"])["value"].mean().groupby("case").sum()
    about = cases.set_index("case").reindex(owner.index)
    thickness, intensity = about["thickness (mm)"], about.filter(like="mean intensity").mean(axis="columns")
    if thickness.isna().any():
        unknown = ", ".join(thickness.index[thickness.isna()])
        raise InputError(f"failure: no thickness of cases {unknown}; run notebook 00 of this study again")
    shown = volume, thickness.round(2), intensity
    volume, thickness, intensity = (of.groupby(owner).mean().loc[wide.index] for of in shown)
    # log axis; no target, no failure
    wide, volume, thickness, intensity = (of[volume > 0] for of in (wide, volume, thickness, intensity))
    if wide.empty:
        raise InputError("failure: no patient with a target and a Dice of every method")
    labels, styles = method_labels(table), style.method_styles(table)
    several, enhanced = thickness.nunique() > 1, intensity.notna().all() and intensity.nunique() > 1
    count = 1 + several + enhanced
    figure, axes = style.panels(count, count, style.DOUBLE if count > 1 else style.SINGLE, 75, 0, sharey=True)
    low, high = volume.min() / 1.1, volume.max() * 1.1
    step = (high / low) ** (0.02 * count / 2)
    kinds = _thirds(axes[0], wide, volume, stats.gmean, lambda x, move: x * step**move, styles)
    style.log_axis(axes[0].xaxis, low, high)
    axes[0].set(xlabel="true volume (ml)", ylabel="Dice")
    named = wide.rename(columns=labels)
    note = _correlations(named, volume, "volume")
    if enhanced:
        width = 0.02 * count / 2 * np.ptp(intensity)
        kinds += _thirds(axes[-1], wide, intensity, np.mean, lambda x, move: x + width * move, styles)
        axes[-1].set(xlabel="mean intensity of the target (HU of CT)")
        note += " " + _correlations(named, intensity, "mean intensity")
    if several:
        sharp = thickness
        if thickness.nunique() > 5:  # thirds, each at its median
            sharp = thickness.groupby(pd.qcut(thickness, 3, labels=False, duplicates="drop")).transform("median")
        levels = {level: number for number, level in enumerate(sorted(sharp.unique()))}
        at = sharp.map(levels).astype(float)
        places = pd.Series(levels.values(), levels.values())
        spaced = at + 0.3 * style.spread(len(at))
        kinds += _groups(axes[1], wide, spaced, at, places, lambda x, move: x + 0.13 * move, styles)
        counts = sharp.value_counts()
        axes[1].set(xlabel="slice thickness (mm)", xlim=(-0.5, len(levels) - 0.5), xticks=range(len(levels)))
        axes[1].set_xticklabels([f"{level:g}\nn = {counts[level]}" for level in levels])
        note += " " + _correlations(named, thickness, "thickness")
    looks = {labels[method]: styles[method] for method in chosen}
    style.legend_below(figure, style.legend_lines(looks), handlelength=3)
    counts = patients_text([len(wide)], [int((owner.isin(wide.index)).sum())])
    points = f"Small points: patients ({counts}), seeds and classes averaged; large ones: means of groups of them and "
    figure.set_label(f"{points}{interval_text(kinds)}. {note}")
    return figure


def _thirds(ax: Axes, wide: pd.DataFrame, at: pd.Series, middle: Callable, apart: Callable, styles: dict) -> list[str]:
    """`_groups` by thirds of `at`, each at its median, with the `middle` between two of them marked, and their sizes;
    returns the kinds of the groups' intervals."""
    thirds = pd.qcut(at.rank(method="first"), min(3, max(1, len(at) // 4)), labels=False)
    found = at.groupby(thirds).agg(["median", "min", "max", "size"])
    kinds = _groups(ax, wide, at, thirds, found["median"], apart, styles)
    for edge in middle([found["min"].to_numpy()[1:], found["max"].to_numpy()[:-1]], axis=0):
        ax.axvline(edge, color=style.PALE, linewidth=0.6, linestyle=":", zorder=0)
    for number, group in enumerate(found.itertuples()):  # every second one higher: medians may be close to each other
        where = dict(xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7)
        ax.annotate(f"n = {group.size}", (group.median, 1.0 + 0.05 * (number % 2)), **where)
    return kinds


def _groups(
    ax: Axes, wide: pd.DataFrame, at: pd.Series, group: pd.Series, places: pd.Series, apart: Callable, styles: dict
) -> list[str]:
    """Patients at `at`, and the means of their groups at `places`, those of the methods moved by `apart(x, move)`;
    returns the kinds of the groups' intervals."""
    kinds = []
    for number, method in enumerate(wide):
        move, look = number - (len(wide.columns) - 1) / 2, styles[method]
        points = dict(color=look["color"], marker=look["marker"], alpha=0.45, linewidth=0)
        sns.scatterplot(x=at, y=wide[method], s=9, ax=ax, legend=False, **points)
        means = wide[method].groupby(group).mean()
        low, high, names = zip(*(interval(values) for _, values in wide[method].groupby(group)), strict=True)
        low, high = np.clip((low, high), *METRICS["dice"].bounds)
        bars, at_groups = np.maximum([means - low, high - means], 0), places.loc[means.index]
        ax.errorbar(apart(at_groups, move), means, yerr=bars, elinewidth=1, markersize=6, zorder=3, **look)
        kinds += names
    ax.grid(axis="y")
    return kinds


def _correlations(wide: pd.DataFrame, with_: pd.Series, name: str) -> str:
    """Spearman's rank correlation of each method's Dice with something, its interval (Fieller, Hartley & Pearson,
    Biometrika 1957) and p, as text."""
    if len(wide) < 6 or with_.nunique() < 2:
        return f"Too few patients for a correlation with {name}."
    texts = []
    for label in wide:
        if np.ptp(wide[label]) < 1e-12:
            texts.append(f"{label} none, its Dice is constant")
            continue
        rho, p = stats.spearmanr(with_, wide[label])
        if len(wide) < 10:  # too few for Student's t
            how = dict(permutation_type="pairings", vectorized=False, n_resamples=999, rng=np.random.default_rng(0))
            p = stats.permutation_test((with_,), lambda x, y=wide[label]: stats.spearmanr(x, y).statistic, **how).pvalue
        centre, width = np.arctanh(np.clip(rho, -0.9999, 0.9999)), 1.96 * np.sqrt(1.06 / (len(wide) - 3))
        low, high = np.tanh([centre - width, centre + width])
        said = "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"
        texts.append(f"{label} {signed(f'{rho:+.2f} [{low:+.2f}, {high:+.2f}]')}, {said}")
    return f"Spearman's correlation of Dice with {name}, 95 % interval and p: {'; '.join(texts)}."
