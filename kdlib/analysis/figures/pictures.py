"""Figures of slices, of features and of the pairs of a contrast, drawn from saved arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from kdlib.analysis.comparisons import SAME
from kdlib.analysis.figures import style
from kdlib.analysis.figures.results import choose_cases
from kdlib.analysis.intervals import interval_text
from kdlib.analysis.labels import method_labels
from kdlib.analysis.patients import patients_text, per_patient
from kdlib.analysis.sentences import interval_of, signed
from kdlib.analysis.tables import small_sample_note
from kdlib.config import InputError

SHORT = {"encoder": "E", "bottleneck": "B", "decoder": "D", "logits": "L"}  # scales, in the order of a forward pass


@plt.rc_context(style.STYLE)
def overview(
    table: pd.DataFrame, examples: pd.DataFrame, verdicts: pd.DataFrame, chosen: Mapping[str, str], data: str = "",
    tests: int | None = None,
) -> Figure:  # fmt: skip
    """The one picture: what the networks draw on a scan, and what distillation changes for every patient.

    Left: the distilled student's median volume (`choose_cases`), the slice with most truth: contours of the truth and
    of each method. Right: a panel per comparison, every patient's Dice from the student alone to the distilled one;
    below it the mean paired difference with its interval, in the colour and the word of the verdict.

    Args:
        table: tidy.
        examples: `Results.examples`, see `qualitative`.
        verdicts: from `kdlib.analysis.statistics.compare`: a the distilled student, b the student alone.
        chosen: role -> method: three roles to print, e.g. "teacher", "student alone" and "distilled".
        data: what the scan is of, for the note, e.g. a licence asks for it.
        tests: number of comparisons that the verdicts are adjusted for, where more than are drawn.

    Raises: InputError: no verdicts, or a method without example or Dice.
    """
    needed = ["a", "b", "n", "difference", "low", "high", "interval", "verdict"]
    style.need_columns(verdicts, needed, "overview", "kdlib.analysis.statistics.compare")
    tests = tests or len(verdicts)
    labels, cases = method_labels(table), choose_cases(table, list(chosen.values())[-1])
    case = cases.get("median", cases["best"])
    values = per_patient(table).pivot(index="patient", columns="method", values="value")
    figure = plt.figure(figsize=(style.DOUBLE, 88 * style.MM))
    left, right = figure.subfigures(1, 2, width_ratios=[1, 0.42 + 0.3 * len(verdicts)])
    pictures = left.subplots(2, 2).flat
    shown = {role: _example(examples, method, case) for role, method in chosen.items()}
    first = next(iter(shown.values()))
    view = _crop(np.any([first["truth"] > 0, *(each["prediction"] > 0 for each in shown.values())], axis=0))
    for ax, role in zip(pictures, [None, *chosen], strict=True):
        drawn = [shown[role]["prediction"][view]] if role else []
        _picture(ax, first["image"][view], first["truth"][view], *drawn)
        title = f"{role}, Dice {volume_dice(table, chosen[role], case):.3f}" if role else "scan and truth"
        ax.set_title(title, fontsize=8)
    sizes = dict(height_ratios=[2.4, 1], sharex="row", sharey="row", squeeze=False)
    panels = right.subplots(2, len(verdicts), **sizes)
    # a difference that does not matter must not fill its panel
    largest = max(SAME["dice"], verdicts[["difference", "low", "high"]].abs().max(axis=None))
    edge, widest = float(f"{largest:.0e}"), 1.15 * largest
    for (top, bottom), row in zip(panels.T, verdicts.itertuples(), strict=True):
        pairs = values[[row.b, row.a]].dropna()
        change = (pairs[row.a] - pairs[row.b]).round(12)
        for look, some in ((style.DIRECTIONS["loses"], change < 0), (style.DIRECTIONS["gains"], change >= 0)):
            top.plot([0, 1], pairs[some].T, **look)
        top.plot([0, 1], pairs.mean(), color="black", linewidth=2.2, marker="o", zorder=3)
        top.set(xticks=[0, 1], xlim=(-0.25, 1.25))
        top.set_xticklabels(["alone", "distilled" if len(verdicts) < 4 else "KD"])
        top.set_title(f"{labels[row.a]}\n{(change > 0).sum()} of {len(change)} gain", fontsize=8)
        top.grid(axis="y")
        look = style.VERDICTS[row.verdict]
        style.draw_interval(bottom, 0, row.difference, row.low, row.high, markersize=6, elinewidth=1.6, **look)
        bottom.axvline(0, color="black", linewidth=0.6, zorder=1)
        bottom.set(yticks=[], ylim=(-1, 1))
        bottom.set_xlim(-widest, widest)
        if len(verdicts) < 4:
            bottom.xaxis.get_major_locator().set_params(nbins=3)
        else:  # there is room for two
            bottom.set_xticks([-edge, edge], [signed(f"{side:g}") for side in (-edge, edge)])
        colour = look["color"] if row.verdict in ("better", "worse") else "black"
        words = interval_of(row.difference, row.low, row.high).replace(" [", "\n[")
        bottom.set_title(f"{words}\n{row.verdict}", fontsize=8, color=colour)
        bottom.grid(axis="x")
    panels[0, 0].set_ylabel("Dice of a patient")
    right.supxlabel("distilled minus alone (Dice)", fontsize=9)
    handles = style.legend_lines(style.OUTLINES, path_effects=style.HALO)
    mean = {"mean of the patients": dict(color="black", linewidth=2.2, marker="o")}
    handles += style.legend_lines(style.DIRECTIONS | mean)
    style.legend_below(figure, handles, columns=5)
    counts, bars = patients_text(verdicts["n"], verdicts.get("volumes", ())), interval_text(verdicts["interval"])
    note = (
        f"Left: {case}{f', {data}' if data else ''}: the volume at the median Dice of the distilled student, its slice "
    )
    note += "with the largest true area; Dice is of the volume. "
    note += f"Right: each line is a patient ({counts}), seeds averaged; below, the mean paired difference with its "
    note += f"{bars} and the verdict (Wilcoxon's signed-rank test after Holm's correction for {tests} "
    figure.set_label(f"{note}comparison{'s' * (tests > 1)}). {small_sample_note(verdicts)}".strip())
    return figure


def volume_dice(table: pd.DataFrame, method: str, case: str) -> float:
    """Dice of a volume, mean over its classes and the seeds of a method."""
    rows = table[(table["method"] == method) & (table["case"] == case) & (table["metric"] == "dice")]
    return float(rows["value"].mean())


@plt.rc_context(style.STYLE)
def qualitative(
    examples: pd.DataFrame, chosen: Mapping[str, str], cases: Mapping[str, str], table: pd.DataFrame
) -> Figure:
    """The slice with most truth of chosen cases: the slice, and the contours of truth and of each method on it.

    Args:
        examples: `Results.examples`: columns method, case, seed, and image, truth, prediction (HW arrays); the lowest
            seed of a method is shown.
        chosen: role -> method, the roles "teacher", "student", "distilled student" or others to print.
        cases: rule -> case, from `choose_cases`.
        table: tidy, for the Dice of the volumes.

    Raises: InputError: no example of a method and case.
    """
    if not chosen or not cases:
        raise InputError("qualitative figure: give at least one method and one case")
    labels = method_labels(examples)
    side = style.DOUBLE / (len(chosen) + 1)
    size = (style.DOUBLE, (side + 3 * style.MM) * len(cases) + 18 * style.MM)
    figure, axes = plt.subplots(len(cases), len(chosen) + 1, figsize=size, squeeze=False)
    for line, (rule, case) in zip(axes, cases.items(), strict=True):
        shown = [_example(examples, method, case) for method in chosen.values()]
        image, truth = shown[0]["image"], shown[0]["truth"]
        rows, columns = view = _crop(np.any([truth > 0, *(example["prediction"] > 0 for example in shown)], axis=0))
        _picture(line[0], image)
        seen = image > 0
        seen[view] = True
        whole = _crop(seen, margin=1.0)
        line[0].set(xlim=(whole[1].start - 0.5, whole[1].stop - 0.5), ylim=(whole[0].stop - 0.5, whole[0].start - 0.5))
        side = rows.stop - rows.start
        corner = (columns.start - 0.5, rows.start - 0.5)
        line[0].add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=0.8))
        line[0].set_ylabel(f"{rule}\n{case}")
        for ax, example, method in zip(line[1:], shown, chosen.values(), strict=True):
            _picture(ax, image[view], truth[view], example["prediction"][view])
            ax.set_xlabel(f"Dice {volume_dice(table, method, case):.3f}", labelpad=2)
    titles = [f"{role}\n{labels[method]}" for role, method in chosen.items()]
    for ax, title in zip(axes[0], ["slice", *titles], strict=True):
        ax.set_title(title)
    style.legend_below(figure, style.legend_lines(style.OUTLINES, path_effects=style.HALO), handlelength=3)
    note = (
        f"Per case (n = {len(cases)}) the slice with the largest true area; the box is the part shown beside it; Dice "
    )
    figure.set_label(f"{note}is of the whole volume, mean over its classes and seeds.")
    return figure


@plt.rc_context(style.STYLE)
def slice_montage(images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    """Slices side by side with their labels outlined; images and labels are uint8 NHW, one name per slice."""
    columns = min(6, len(names))
    side = style.DOUBLE / style.MM / columns
    figure, axes = style.panels(len(names), columns, style.DOUBLE, side + 4, 0)
    for ax, image, label, name in zip(axes, images, labels, names, strict=True):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        _contours(ax, label, color="#E69F00", linestyle="-")
        ax.set_title(name, fontsize=7)
        ax.set_axis_off()
    figure.set_label("One slice per case, the one with the most target, which is outlined.")
    return figure


@plt.rc_context(style.STYLE)
def step(
    images: np.ndarray, truth: np.ndarray, teacher: np.ndarray, student: np.ndarray, pulls: Mapping[str, np.ndarray]
) -> Figure:
    """One distillation step on some slices: what both networks say, and where each term pulls the student's logits.

    Args:
        images, truth: NHW; teacher, student: probabilities of the class.
        pulls: term -> gradient of its loss on the student's logits; its negative, the way a step goes, is drawn.
    """
    columns = ["slice and truth", "teacher's probability", "student's probability", *(f"pull of {t}" for t in pulls)]
    size = (style.DOUBLE, (style.DOUBLE / len(columns)) * len(images) + 14 * style.MM)
    figure, axes = plt.subplots(len(images), len(columns), figsize=size, squeeze=False)
    for number, line in enumerate(axes):
        line[0].imshow(images[number], cmap="gray", vmin=0, vmax=1)
        for ax, probability in zip(line[1:3], (teacher, student), strict=True):
            ax.imshow(probability[number], cmap="gray", vmin=0, vmax=1)
        for ax, gradient in zip(line[3:], pulls.values(), strict=True):
            most = float(abs(gradient).max())
            ax.imshow(-gradient[number], cmap="PuOr_r", vmin=-most, vmax=most)
        for ax in line:
            _contours(ax, np.asarray(truth[number]), **style.OUTLINES["truth"])
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title, fontsize=8)
    figure.set_label(
        f"n = {len(images)} slices; the outline is the truth. Pull: the negative gradient of the weighted term on each "
        "logit, orange towards the class, violet away from it, each term on a scale of its own."
    )
    return figure


@plt.rc_context(style.STYLE)
def features(samples: pd.DataFrame, similarity: pd.DataFrame, chosen: Mapping[str, str]) -> Figure:
    """Features of the same pixels in teacher and students, by class, in two dimensions; and CKA with the teacher.

    PCA and t-SNE (van der Maaten 2008), a column per model; below the students' columns the CKA of their scales (down)
    and the teacher's (across), and how it differs between the two.

    Args:
        samples: of `kdlib.experiments.illustrate.features`: columns class, case, and a method's features ([channels])
            under its id.
        similarity: columns method, scale_student, scale_teacher, value (`kdlib.teacher_agreement`), averaged over folds
            and seeds.
        chosen: role -> method: the teacher first, then the student before and after distillation.

    Raises: InputError: a missing column, a method without similarity or with features that do not vary, or not three.
    """
    if len(chosen) != 3:
        raise InputError(f"features: {len(chosen)} methods; give a teacher, a student and the distilled student")
    source = "the arrays of kdlib.experiments.illustrate.features"
    style.need_columns(samples, ["class", "case", *chosen.values()], "features", source)
    needed = ["method", "scale_student", "scale_teacher", "value"]
    style.need_columns(similarity, needed, "features", "the similarity table of kdlib.teacher_agreement")
    labels = method_labels(similarity)
    figure, axes = plt.subplots(3, 3, figsize=(style.DOUBLE, 158 * style.MM))
    # background last, above the others: it fills little room
    names = sorted(samples["class"].unique(), key="background".__eq__)
    styles = dict(zip(names, style.CLASSES * len(names), strict=False)) | {"background": style.BACKGROUND}
    styles = {name: styles[name] for name in names}
    for column, (role, method) in enumerate(chosen.items()):
        values = np.stack(samples[method].to_list()).astype(float)
        values -= values.mean(0)
        if not values.any():
            raise InputError(f"features: those of {method} are the same in every pixel: its network does nothing")
        values /= values.std()  # one factor for all channels: their scale is no matter, their ratios are
        pca = PCA(2, random_state=0).fit(values)
        flat = TSNE(perplexity=min(30, len(values) / 4), init="pca", random_state=0).fit_transform(values)
        for ax, points in zip(axes[:2, column], (pca.transform(values), flat), strict=True):
            for name, (colour, marker) in styles.items():
                some = points[(samples["class"] == name).to_numpy()]
                ax.scatter(*some.T, s=7, color=colour, marker=marker, linewidth=0.2, edgecolor="white")
            ax.set(xticks=[], yticks=[])
        shares = [f"component {n} ({100 * share:.0f} %)" for n, share in enumerate(pca.explained_variance_ratio_, 1)]
        title = "\n".join(filter(None, [role, labels.get(method)]))
        axes[0, column].set(xlabel=shares[0], ylabel=shares[1], title=title)
        if len(names) > 1:
            found = silhouette_score(values, samples["class"])
            axes[1, column].set_title(f"silhouette {found:.2f}", fontsize=8)
    axes[0, 0].set_ylabel(f"PCA: {axes[0, 0].get_ylabel()}")
    axes[1, 0].set_ylabel("t-SNE")
    before, after = list(chosen.values())[1:]
    grids = {method: _scales(similarity, method) for method in (before, after)}
    added = f"{labels[after]} minus {labels[before]}"
    shown = [(grids[after] - grids[before], added), (grids[before], labels[before]), (grids[after], labels[after])]
    for ax, (grid, title) in zip(axes[2], shown, strict=True):
        _matrix(ax, grid, title, difference=grid is shown[0][0])
    looks = {name: dict(color=colour, marker=marker) for name, (colour, marker) in styles.items()}
    style.legend_below(figure, style.legend_lines(looks, linestyle=""))
    counts = samples["class"].value_counts()
    classes = ", ".join(f"{counts[name]} {name}" for name in names)
    figure.set_label(
        f"The same n = {len(samples)} pixels of {samples['case'].nunique()} test cases in each model ({classes}). PCA "
        "with the share of the variance of each component; t-SNE with perplexity 30 and seed 0; the silhouette "
        "is of the classes in all channels (1: apart, 0: mixed). Below: feature similarity (linear CKA) of the scales "
        "(E: encoder, B: bottleneck, D: decoder, L: logits) of the student (down) and of the teacher (across), in "
        "hundredths, mean over folds and seeds; left: what distillation added."
    )
    return figure


def _scales(similarity: pd.DataFrame, method: str) -> pd.DataFrame:
    """Mean CKA of scales of the student (rows) and the teacher (columns), in the order of a forward pass."""
    rows = similarity[similarity["method"] == method]
    if rows.empty:
        has = ", ".join(similarity["method"].unique())
        raise InputError(f"features: no similarity of {method!r}; the table has {has}")
    grid = rows.pivot_table(index="scale_student", columns="scale_teacher", values="value", aggfunc="mean")
    order = [sorted(side, key=_depth) for side in (grid.index, grid.columns)]
    return grid.loc[order[0], order[1]]


def _depth(scale: str) -> tuple[int, int]:
    name = scale.rstrip("0123456789")
    number = int(scale[len(name) :] or 0)
    sides = list(SHORT)
    return sides.index(name) if name in sides else len(sides), -number if name == "decoder" else number


def _matrix(ax: Axes, grid: pd.DataFrame, title: str, difference: bool) -> None:
    """A heat map with its numbers, in hundredths."""
    values = grid.to_numpy()
    limits = dict(cmap="PuOr_r", vmin=-0.5, vmax=0.5) if difference else dict(cmap="Greys", vmin=0, vmax=1.4)
    ax.imshow(values, aspect="auto", **limits)
    for row, column in np.ndindex(values.shape):
        if np.isfinite(values[row, column]):
            text = f"{100 * values[row, column]:{'+' if difference else ''}.0f}".replace("+0", "0").replace("-0", "0")
            dark = abs(values[row, column]) > (0.35 if difference else 0.8)
            ax.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    for axis, names in ((ax.xaxis, grid.columns), (ax.yaxis, grid.index)):
        stems = [name.rstrip("0123456789") for name in names]
        labels = [SHORT.get(stem, stem) + name[len(stem) :] for stem, name in zip(stems, names, strict=True)]
        axis.set_ticks(range(len(names)), labels)
    ax.tick_params(length=0, labelsize=7)
    ax.set_title(title, fontsize=7)
    ax.set_xlabel("scales of the teacher", fontsize=7)
    ax.set_ylabel("scales of the student", fontsize=7)
    ax.spines[:].set_visible(False)


@plt.rc_context(style.STYLE)
def pairs(panels: pd.DataFrame) -> Figure:
    """Anchors of a supervised contrastive loss and, on slices of their batch, which keys of the teacher are positives.

    Args:
        panels: of `kdlib.experiments.illustrate.pairs`, a row per panel.

    Raises: InputError: a missing column.
    """
    needed = ["anchor", "shown", "case", "image", "labels", "role", "row", "column", "positives", "negatives"]
    needed += ["images", "step", "term"]
    style.need_columns(panels, needed, "pairs", "the arrays of kdlib.experiments.illustrate.pairs")
    anchors = list(panels["anchor"].unique())
    columns = len(panels) // len(anchors)
    width = style.DOUBLE * (columns + 0.3) / 3.3
    size = (width, (style.DOUBLE / 3.3 + 7 * style.MM) * len(anchors) + 12 * style.MM)
    figure, axes = plt.subplots(len(anchors), columns, figsize=size, squeeze=False)
    for line, anchor in zip(axes, anchors, strict=True):
        rows = panels[panels["anchor"] == anchor]
        for ax, panel in zip(line, rows.itertuples(), strict=True):
            image, role = panel.image, panel.role
            _picture(ax, image, panel.labels)
            factor = image.shape[0] / role.shape[0]  # of the slice's pixels to the term's positions
            for value, (colour, marker, _) in style.PAIR_ROLES.items():
                y, x = ((index + 0.5) * factor - 0.5 for index in np.nonzero(role == value))
                ax.scatter(x, y, s=6, color=colour, marker=marker, linewidth=0.8, zorder=3, path_effects=style.HALO)
            if panel.row >= 0:
                place = [(index + 0.5) * factor - 0.5 for index in (panel.column, panel.row)]
                ax.plot(*place, **style.ANCHOR, zorder=4)
            counts = [int((role == value).sum()) for value in style.PAIR_ROLES]
            ax.set_xlabel(f"{panel.case}\n{counts[0]} positive, {counts[1]} negative", fontsize=7, labelpad=2)
        first = rows.iloc[0]
        line[0].set_ylabel(f"anchor: {anchor}\n{first['positives']} positive, {first['negatives']} negative")
    for ax, title in zip(axes[0], rows["shown"], strict=True):
        ax.set_title(title)
    keys = style.PAIR_ROLES.values()
    marks = {f"{label} key (teacher)": dict(color=colour, marker=marker) for colour, marker, label in keys}
    handles = style.legend_lines({"anchor (student), its own key a positive": style.ANCHOR}, linestyle="")
    handles += style.legend_lines(marks, linestyle="", path_effects=style.HALO)
    handles += style.legend_lines({"labels": dict(color="white")}, path_effects=style.HALO)
    style.legend_below(figure, handles, columns=4)
    first = panels.iloc[0]
    figure.set_label(
        f"{first['term']}: positions drawn from the {first['images']} slices of the batch of step {first['step'] + 1}, "
        "before augmentation, in equal number from each class as far as it has them. The student's vector at a star is "
        "compared with the teacher's at every mark, on these slices and on the others of the batch; left: numbers "
        "in the batch."
    )
    return figure


def _example(examples: pd.DataFrame, method: str, case: str) -> pd.Series:
    found = examples[(examples["method"] == method) & (examples["case"] == case)]
    if found.empty:
        wanted = f"method {method!r} and case {case!r}"
        raise InputError(f"no example slice of {wanted}: run that method on the fold of the case")
    return found.sort_values("seed").iloc[0]


def _crop(mask: np.ndarray, margin: float = 1.3) -> tuple[slice, slice]:
    """Rows and columns of a square about a mask, with a margin; the whole slice where the mask is empty."""
    if not mask.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1])
    where = [np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)]
    extent, shortest = max(np.ptp(side) + 1 for side in where), min(mask.shape)
    size = min(max(int(margin * extent), shortest // 4), shortest)
    starts = np.clip([(side[0] + side[-1] + 1 - size) // 2 for side in where], 0, np.array(mask.shape) - size)
    return tuple(slice(start, start + size) for start in starts.tolist())


def _picture(ax: Axes, image: np.ndarray, *masks: np.ndarray) -> None:
    """A slice without ticks or frame, with the outlines of the truth and then of a prediction, as far as given."""
    ax.imshow(image, cmap="gray", vmin=0, vmax=255)
    for mask, look in zip(masks, style.OUTLINES.values(), strict=False):
        _contours(ax, mask, **look)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _contours(ax: Axes, labels: np.ndarray, color: str, linestyle: object) -> None:
    for value in np.unique(labels[labels > 0]):
        if (labels != value).any():  # a class that fills the view has no outline
            drawn = ax.contour(labels == value, levels=[0.5], colors=color, linestyles=[linestyle], linewidths=0.8)
            drawn.set_path_effects(style.HALO)
