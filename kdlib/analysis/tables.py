"""Tables for readers: means per method, the form of the thesis, gradients; and how a table is saved."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype, is_object_dtype
from pandas.io.formats.style import Styler

from kdlib.analysis.comparisons import ALPHA, by_patient, with_identity
from kdlib.analysis.intervals import interval, interval_text, seed_noise
from kdlib.analysis.labels import IDENTITY, method_labels, methods
from kdlib.analysis.patients import patients_text, per_patient, rows_of, volumes
from kdlib.analysis.sentences import signed
from kdlib.config import InputError
from kdlib.files import write, write_text
from kdlib.metrics import METRICS

IN_BOLD = ("better", "non-inferior")  # verdicts that a printed table sets in bold
BOLD = "textbf:--rwrap;"
OVERLAP = ("iou", "dice", "recall", "precision")
HEADINGS = {  # column -> heading of a printed table
    "label": "method", "label_a": "method", "label_b": "compared with", "before": "compared with",
    "p_holm": "adjusted p", "p_adjusted": "adjusted p", "smallest_p": "smallest possible p",
    "rank_low": "rank, low", "rank_high": "rank, high",
    "minimum_detectable": "minimum detectable", "infonce_over_chance": "InfoNCE / chance",
    "projector_change": "projector change", "share": "share of the gradient", "n": "patients", "mean": "mean Dice",
    "sd": "SD", "dice": "Dice", "dice_25": "Dice at 25 % of the steps", "dice_50": "at 50 %", "dice_100": "at 100 %",
    "last_fifth": "gain in the last fifth", "effect": "effect (rank-biserial)", "first": "share of first places",
    "beats": "share above the reference", "inference_parameters": "parameters", "gflops": "GFLOP per slice or patch",
    "receptive_field": "receptive field (px)", "latency_ms": "CPU latency (ms per slice or patch)",
    "items": "slices or windows of a volume", "volume_gflops": "GFLOP per volume",
    "volume_ms": "CPU latency (ms per volume)", "slower": "latency, times",
    "dice_alone": "Dice alone", "dice_distilled": "Dice distilled",
    "change": "change [95 % interval]", "gain": "patients that gain", "dice_teacher": "teacher's Dice",
    "closed": "gap to the teacher closed", "volume": "volume (ml)", "thickness": "slice thickness (mm)",
    "intensity": "mean intensity (HU of CT)", "times": "length", "learns": "what it learns",
    "agreement": "Dice with the teacher", "band_agreement": "agreement at the boundary",
    "error_overlap": "overlap of errors (Dice)", "ece": "calibration error",
}  # fmt: skip
# columns of a CSV that a printed table leaves out: ids and what a label or the caption says
UNPRINTED = {*IDENTITY, "run", "method", "reference", "a", "b", "volumes", "interval"}

# arXiv 2406.03173, Table 4.2: one run each, pixels of the whole test set pooled; params in millions
THESIS_TABLE = pd.DataFrame(
    [
        ("S1", "", "S1", 0.557, 0.715, 0.685, 0.749, 0.057),
        ("S2", "", "S2", 0.627, 0.770, 0.725, 0.822, 0.227),
        ("KD(T1, S1)", "T1", "S1", 0.629, 0.772, 0.721, 0.831, 0.057),
        ("KD(T1, S2)", "T1", "S2", 0.659, 0.794, 0.748, 0.846, 0.227),
        ("KD(T2, S1)", "T2", "S1", 0.623, 0.767, 0.707, 0.839, 0.057),
        ("KD(T2, S2)", "T2", "S2", 0.658, 0.793, 0.750, 0.841, 0.227),
    ],
    columns=["label", "teacher", "model", *OVERLAP, "params"],
).set_index("label")
_LABELS = [METRICS[metric].label for metric in OVERLAP]
THESIS_COLUMNS = [*_LABELS, "params (M)", "n", *(f"thesis {label}" for label in _LABELS)]


def summarise(table: pd.DataFrame, by: Sequence[str] = ("method",), metric: str = "dice") -> pd.DataFrame:
    """Mean over patients of each group, with its 95 % interval (`interval`, cut where the metric ends).

    Returns: columns of `by`; label (of methods); n (patients with a defined value), volumes, mean, sd (n - 1 in the
        denominator), low, high and interval (its name); and of methods their identity columns.

    Raises: InputError: see `per_patient`.
    """
    rows, by = [], list(by)
    for key, group in rows_of(table, metric, by).groupby(by, sort=False, dropna=False):
        values = per_patient(group, metric, by).set_index("patient")["value"].dropna()
        noise = seed_noise(group, metric=metric)
        low, high, kind = interval(values, noise=None if noise is None else noise.loc[values.index])
        low, high = np.clip((low, high), *METRICS[metric].bounds)
        found = dict(n=len(values), volumes=volumes(group), mean=values.mean(), sd=values.std(), low=low, high=high)
        rows.append(dict(zip(by, key, strict=True)) | found | dict(interval=kind))
    result = pd.DataFrame(rows)
    if by != ["method"]:
        return result
    result.insert(1, "label", result["method"].map(method_labels(table)))
    return with_identity(result, table)


def all_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method, by label, and one column per metric (with its unit): the mean over patients of defined
    values, and n."""
    known = {name: metric.heading for name, metric in METRICS.items() if (table["metric"] == name).any()}
    columns = {heading: summarise(table, metric=name).set_index("label")["mean"] for name, heading in known.items()}
    return pd.DataFrame(columns).assign(n=summarise(table).set_index("label")["n"]).rename_axis(None)


def by_patient_table(table: pd.DataFrame, cases: pd.DataFrame) -> pd.DataFrame:
    """Every test patient's Dice by every method, the worst first, and what its scans are like.

    Args:
        table: tidy, of methods that were tested on the same patients.
        cases: as notebook 00 saves them.

    Returns: one row per patient: patient, mean (over the methods), volume (ml, of all classes), thickness (mm of axial
        slices), of CT intensity (mean in the target, HU), and the Dice of each method, by label; means over its scans.
    """
    labels = method_labels(table)
    dice = by_patient(table, None)[list(labels)].rename(columns=labels)
    about = cases.set_index("case")
    scans = pd.DataFrame({
        "volume": about.filter(like="(ml)").sum(axis="columns"), "thickness": about["thickness (mm)"],
        "intensity": about.filter(like="mean intensity").mean(axis="columns"),
    })  # fmt: skip
    owner = table.drop_duplicates("case").set_index("case")["patient"]
    found = scans.dropna(axis="columns", how="all").groupby(owner).mean().join(dice, how="right")
    found.insert(0, "mean", dice.mean(axis="columns"))
    return found.sort_values("mean").reset_index(names="patient")


def pivot_thesis(table: pd.DataFrame, params: Mapping[str, int]) -> pd.DataFrame:
    """The results in the form of the thesis's Table 4.2, and its own numbers of the same teacher and model beside them,
    NaN for controls; the label fraction of its baselines is not recorded.

    Args:
        table: tidy.
        params: method -> number of parameters.

    Returns: one row per method, by label: the columns of `THESIS_COLUMNS` (means with their 95 % interval as text, n
        patients of the Dice), `method`, volumes and interval of the Dice, and for each metric its numbers as
        `<metric>_mean`, `_low`, `_high`.

    Raises: InputError: see `per_patient`.
    """
    dice = summarise(table).set_index("method")
    printed, numbers = pd.DataFrame(index=dice.index), {}
    for metric in OVERLAP:
        found = summarise(table, metric=metric).set_index("method").reindex(dice.index)
        cells = zip(found.itertuples(), dice["n"], strict=True)
        printed[METRICS[metric].label] = [_with_interval(row, usual) for row, usual in cells]
        numbers |= {f"{metric}_{part}": found[part] for part in ("mean", "low", "high")}
    printed["params (M)"] = [params.get(method, np.nan) / 1e6 for method in dice.index]
    printed["n"] = dice["n"]
    about = methods(table).loc[dice.index]
    about = about.assign(model=about["model"].where(about["role"].isin(["baseline", "distilled"]), ""))
    thesis = about[["teacher", "model"]].merge(THESIS_TABLE, on=["teacher", "model"], how="left")
    printed[[f"thesis {label}" for label in _LABELS]] = thesis[list(OVERLAP)].to_numpy()
    printed = printed.assign(method=dice.index, volumes=dice["volumes"], interval=dice["interval"], **numbers)
    return printed.set_axis(dice["label"]).rename_axis(None)


def _with_interval(row: tuple, usual: int) -> str:
    """A mean as "0.772 [0.70, 0.81]", with n where it is not the usual one."""
    if not row.n:
        return "undefined"
    text = f"{row.mean:.3f}" + ("" if np.isnan(row.low) else f" [{row.low:.2f}, {row.high:.2f}]")
    return text if row.n == usual else f"{text} (n = {row.n})"


def gradient_diagnostics(history: pd.DataFrame, named: Sequence[pd.DataFrame] = ()) -> pd.DataFrame:
    """What each distillation term did in the last epoch, one row per (method, term), mean over runs.

    Args:
        history: tidy, a row per run, epoch and name.
        named: see `kdlib.analysis.convergence.convergence`.

    Returns: method, label, term, value (unweighted), share (of the gradient on the student), cosine (of its gradients
        of two successive steps; NaN where a gradient is 0), infonce_over_chance (InfoNCE over ln N; NaN for others),
        projector_change (of its learned projectors in the epoch, relative to their norm; NaN without any), and active:
        "yes", or what is wrong with it.
    """
    last = history[history["epoch"] == history.groupby("run")["epoch"].transform("max")]
    wide = last.pivot_table(index="method", columns="name", values="value", sort=False)
    terms = [name.removeprefix("share/") for name in wide if name.startswith("share/")]
    labels, rows = method_labels(history, *named), []
    kinds = ("share", "cosine", "infonce_over_chance", "projector_change")
    for (method, values), term in itertools.product(wide.iterrows(), terms):
        found = {kind: values.get(f"{kind}/{term}", np.nan) for kind in kinds}
        if term != "segmentation" and not np.isnan(found["share"]):
            active = "always 0" if values[term] == 0 else "no gradient" if found["share"] == 0 else "yes"
            row = dict(method=method, label=labels[method], term=term, value=values[term])
            rows.append(row | found | dict(active=active))
    return pd.DataFrame(rows)


def expected_calibration_error(table: pd.DataFrame) -> pd.DataFrame:
    """Expected calibration error of every case and class: sum of count |accuracy - confidence| over sum of count.

    Guo et al. 2017, arXiv 1706.04599, with the probability of the class in place of the winner's. NaN without pixels.

    Args:
        table: from `kdlib.evaluation.calibration.calibration`; further columns (a method, a fold) are kept, each of
            their values for itself.

    Returns: the table's columns but for those of bins, and metric ("ece") and value.

    Raises: InputError: a column of `calibration` is missing.
    """
    measured = ["bin", "confidence", "accuracy", "count"]
    if absent := [column for column in ["case", "class", *measured] if column not in table]:
        raise InputError(f"calibration table without {', '.join(absent)}: give what `calibration` returns")
    keys = [column for column in table if column not in measured]
    gap = (table["count"] * (table["accuracy"] - table["confidence"]).abs()).fillna(0)  # an empty bin has no gap
    gaps = table[keys].assign(gap=gap, count=table["count"])
    sums = gaps.groupby(keys, sort=False, dropna=False, as_index=False).sum()
    return sums[keys].assign(metric="ece", value=(sums["gap"] / sums["count"]).where(sums["count"] > 0))


# --------------------------------------------------------------------------------------------------- printed and saved


def caption_note(table: pd.DataFrame) -> str:
    """What a caption must say of a table: patients and volumes, the interval that was really used, and, where n is too
    small for any verdict, the smallest p that n allows. "" for tables without patients."""
    if "n" not in table or not len(table):
        return ""
    parts = [patients_text(table["n"].dropna(), table["volumes"].dropna() if "volumes" in table else ())]
    if "interval" in table:
        parts.append(interval_text(table["interval"]))
    return "; ".join(parts) + "." + (f" {note}" if (note := small_sample_note(table)) else "")


def small_sample_note(table: pd.DataFrame) -> str:
    """That, and why, no comparison of a table can be decided; "" where one can."""
    if "smallest_p" not in table or not len(table) or table["smallest_p"].min() < ALPHA:
        return ""
    n, least = int(table["n"].max()), table["smallest_p"].min()
    known = f"With {n} patient{'s' * (n != 1)} no adjusted p can fall below {least:.2g}"
    return f"{known}: every verdict is inconclusive, whatever the data."


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of a table that a reader needs, under headings: labels in place of ids, no identity columns."""
    labelled = any(column in table for column in ("label", "label_a", "label_b"))
    hidden = UNPRINTED if labelled else {"volumes", "interval"} if "n" in table else set()
    return _headed(table[[column for column in table if column not in hidden]])


def _headed(table: pd.DataFrame) -> pd.DataFrame:
    """A table under readers' headings, its two limits as one column."""
    if {"low", "high"} <= set(table) and not is_object_dtype(table["low"]):
        sign = "+" if "difference" in table else ""
        ends = zip(table["low"], table["high"], strict=True)
        limits = ["" if np.isnan(low) else signed(f"[{low:{sign}.3f}, {high:{sign}.3f}]") for low, high in ends]
        table = table.assign(low=limits).drop(columns="high").rename(columns={"low": "95 % interval"})
    table = table.assign(**{name: table[name].map({True: "yes", False: "no"}) for name in table.select_dtypes(bool)})
    return table.rename(columns={column: name for column, name in HEADINGS.items() if name not in table})


def styled(table: pd.DataFrame, latex: bool = False) -> Styler:
    """A table as it is printed: the same headings, digits and bold cells in a notebook, a page and LaTeX.

    Bold are the name and the difference of rows with a verdict for them ("better", "non-inferior"), never a row for
    being the largest: an inconclusive lead is none. Text is plain text, and escaped.

    Args:
        latex: escaped and marked for LaTeX, else for HTML.
    """
    table = _headed(table)
    escape, mark = ("latex", BOLD) if latex else ("html", "font-weight: bold")
    named = not isinstance(table.index, pd.RangeIndex)
    names = table.index.to_series() if named else table.iloc[:, 0]
    won = table.get("verdict", names).isin(IN_BOLD).to_numpy()
    marks = pd.DataFrame("", index=table.index, columns=table.columns)
    for column in table:
        if column == "difference" or not named and column == names.name:
            marks[column] = np.where(won, mark, "")
    whole = [c for c in table if is_numeric_dtype(table[c]) and (table[c].dropna() % 1 == 0).all()]
    tests = [c for c in table if c == "p" or c in ("adjusted p", "smallest possible p")]
    missing, least = ("--", "$<$0.001") if latex else ("\N{EN DASH}", "&lt;0.001")
    style = table.style.format(lambda value: _cell(value, latex), na_rep=missing, escape=escape)
    style = style.format("{:.0f}", subset=whole, na_rep=missing)
    style = style.format(lambda p: least if p < 0.0005 else f"{p:.3f}", subset=tests, na_rep=missing)
    style = style.apply(lambda _: marks, axis=None).format_index(escape=escape, axis=1)
    style = style.format_index(escape=escape, axis=0).apply_index(lambda index: np.where(won, mark, ""), axis=0)
    return style.hide(axis="index", names=named)  # their names, or all of it


def markdown_table(table: pd.DataFrame) -> str:
    """A table of text in Markdown; bars in its cells become slashes."""
    rows = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows)


def to_latex(table: pd.DataFrame, path: Path | str, caption: str, label: str) -> Path:
    """Writes a booktabs table, see `styled`; cells, headings and caption are plain text."""
    escaped = caption.translate({ord(sign): f"\\{sign}" for sign in "%&_#$"})
    text = styled(table, latex=True).to_latex(hrules=True, caption=escaped, label=label, position_float="centering")
    write_text(Path(path), text)
    return Path(path)


def _cell(value: object, latex: bool) -> object:
    """A cell: numbers with three digits and a minus that is one."""
    if not isinstance(value, float):
        return value
    if np.isinf(value):
        return "$\\infty$" if latex else "\N{INFINITY}"
    return f"{value:.3f}".replace("-", "$-$") if latex else signed(f"{value:.3f}")


def save_table(
    table: pd.DataFrame, folder: Path | str, name: str, caption: str, columns: Sequence[str] | None = None,
    latex: bool = True,
) -> list[Path]:  # fmt: skip
    """Writes `<name>.csv` with all columns and `<name>.tex` with those in `columns`; returns the paths.

    Args:
        caption: what the table shows; patients, interval and smallest p (`caption_note`) are added to it.
        columns: of the printed table; None: all but ids and identity columns where labels name the rows.
        latex: False for a table that is not printed: then there is no `<name>.tex`.
    """
    csv, tex = (Path(folder) / f"{name}.{suffix}" for suffix in ("csv", "tex"))
    write(csv, lambda path: table.to_csv(path, index=not isinstance(table.index, pd.RangeIndex)))
    if not latex:
        return [csv]
    chosen = printed(table) if columns is None else table[list(columns)]
    return [csv, to_latex(chosen, tex, f"{caption} {caption_note(table)}".strip(), f"tab:{name}")]
