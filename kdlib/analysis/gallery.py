"""All figures of a study by name: what each is drawn from, how, and its caption.

A chapter draws its figures as it saves its tables; notebook 06 draws them again from what was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import pandas as pd
from matplotlib.figure import Figure

from kdlib.analysis import figures, show
from kdlib.analysis.answer import verdicts_of
from kdlib.analysis.comparisons import ranks
from kdlib.analysis.labels import methods
from kdlib.analysis.tables import THESIS_TABLE
from kdlib.config import InputError, lookup
from kdlib.files import packed_or_not, read_arrays, read_csv


class Results(Protocol):
    """What `kdlib.Results` holds, as far as figures are drawn from it."""

    cases: pd.DataFrame
    history: pd.DataFrame
    runs: pd.DataFrame
    examples: pd.DataFrame


class Saved(NamedTuple):
    """An experiment's results and the study's folder with what its chapters saved."""

    found: Results
    folder: Path

    def read(self, kind: str, name: str, reader: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
        path = self.folder / kind / name
        found = packed_or_not(path)
        if found is None:
            raise InputError(f"{path} does not exist: run notebook {name.partition('_')[0]} of this study to its end")
        return reader(found)

    def table(self, name: str) -> pd.DataFrame:
        return self.read("tables", f"{name}.csv", read_csv)

    def arrays(self, name: str) -> pd.DataFrame:
        return self.read("slices", f"{name}.npz", read_arrays)


class Entry(NamedTuple):
    """A figure: the experiment that it is drawn from, how, what it shows, and whether it has slices of scans."""

    experiment: str
    draw: Callable[[Saved], Figure]
    caption: str
    scans: bool = False


def pick(runs: pd.DataFrame, **columns: object) -> str:
    """The first method of a table whose columns have these values. Raises: InputError: there is none."""
    for name, value in columns.items():
        runs = runs[runs[name] == value]
    if runs.empty:
        raise InputError(f"no run with {', '.join(f'{name} {value}' for name, value in columns.items())} in the study")
    return runs["method"].iloc[0]


def trio(found: Results) -> dict[str, str]:
    """Role -> method: a teacher, a student alone on half of the labels, and distilled from it by the thesis's recipe.

    T1 and S1 where they are among them, else the first such pair. Raises: InputError: there is none.
    """
    runs, half = found.runs, found.runs[found.runs["fraction"] == 0.5]
    of_s1 = half[(half["model"] == "S1") & (half["teacher"] == "T1") & (half["loss"] == "supcon")]
    distilled = pick(half if of_s1.empty else of_s1, role="distilled", loss="supcon")
    pair = runs[runs["method"] == distilled].iloc[0]
    student, teacher = pair["model"], pair["teacher"]
    return {
        "teacher": pick(runs, role="teacher", model=teacher),
        f"{student} alone": pick(runs, role="baseline", model=student, fraction=0.5),
        f"{student} distilled": distilled,
    }


def against_shuffled(found: Results) -> pd.DataFrame:
    """Every distillation loss against the same with a shuffled teacher; KL of a tuned weight has no such control."""
    rows = methods(found.cases).reset_index()
    rows = rows[rows["control"].isin(["", "shuffled_teacher"]) & (rows["teacher"] != "")]
    rows = rows[rows["recipe"] != "predictions"]
    both = rows[rows["control"] == ""].merge(rows[rows["control"] != ""], on=["loss", "terms"])
    pairs = list(zip(both["method_x"], both["method_y"], strict=True))
    return verdicts_of(found.cases, found.history, pairs)


def _overview(saved: Saved) -> Figure:
    found, chosen = saved.found, trio(saved.found)
    verdicts, about = _against_alone(saved), methods(found.cases)
    shown = verdicts[verdicts["a"].map(about["teacher"]) == about.loc[chosen["teacher"], "model"]]
    first = found.runs.iloc[0]
    credit = f"{first['data']} ({first['credit']})" if first["credit"] else first["data"]
    return figures.overview(found.cases, found.examples, shown, chosen, credit, len(verdicts))


def _efficiency(saved: Saved) -> Figure:
    spleen = set(saved.found.cases["class"]) == {"spleen"}  # the thesis's numbers are of the spleen
    return figures.efficiency(saved.found.cases, saved.table("02_cost"), THESIS_TABLE if spleen else None)


def _reliability(saved: Saved) -> Figure:
    owners = saved.found.cases.drop_duplicates("case").set_index("case")["patient"]
    rows = saved.table("02b_calibration")
    return figures.reliability(rows.assign(patient=rows["case"].map(owners)))


def _failure(saved: Saved, chosen: Callable[[Results], Mapping[str, str]] = trio) -> Figure:
    return figures.failure(saved.found.cases, saved.table("00_data_cases"), list(chosen(saved.found).values()))


def _alone(found: Results) -> dict[str, str]:
    """Model -> method: the first teacher, and the students alone on the fewest labels."""
    rows = found.runs[found.runs["role"] == "baseline"]
    few = rows[rows["fraction"] == rows["fraction"].min()].drop_duplicates("model").set_index("model")["method"]
    return {"teacher": pick(found.runs, role="teacher"), **few}


def _qualitative(saved: Saved) -> Figure:
    found, chosen = saved.found, trio(saved.found)
    cases = figures.choose_cases(found.cases, list(chosen.values())[-1])
    return figures.qualitative(found.examples, chosen, cases, found.cases)


def _against_alone(saved: Saved) -> pd.DataFrame:
    return verdicts_of(saved.found.cases, saved.found.history)


def _losses(saved: Saved) -> Figure:
    cases = saved.found.cases
    order = ranks(cases, reference=pick(cases, role="baseline"))
    return figures.forest(_against_alone(saved), ranks=order, shares=cases["seed"].nunique() > 1)


def _terms(saved: Saved, protocol: int | None = None) -> Figure:
    history = saved.found.history
    if protocol is None:
        return figures.gradient_diagnostics(history[history["method"] == list(trio(saved.found).values())[-1]])
    chosen = history["protocol"].unique()[protocol]
    return figures.gradient_diagnostics(history[history["role"].eq("distilled") & history["protocol"].eq(chosen)])


def _learning(saved: Saved) -> Figure:
    return figures.learning_curves(saved.found.history)


MAIN = "02_distillation"
GALLERY: Mapping[str, Entry] = {
    "02_overview": Entry(
        MAIN, _overview, "What distillation changes: contours on a scan, and the Dice of every test patient.",
        scans=True,
    ),
    "01_learning_curves": Entry("01_baseline", _learning, "Baselines: validation Dice along the training."),
    "01_dice_per_method": Entry(
        "01_baseline", lambda saved: figures.dice_per_method(saved.found.cases), "Baselines: Dice of test patients."
    ),
    "01_failure": Entry(
        "01_baseline", partial(_failure, chosen=_alone),
        "Baselines: Dice by volume and enhancement of the target and thickness of the slices.",
    ),
    "02_comparisons": Entry(
        MAIN, lambda saved: figures.forest(_against_alone(saved)),
        "Distilled students against the same students alone: difference of Dice, paired by patient.",
    ),
    "02_dice_per_method": Entry(
        MAIN, lambda saved: figures.dice_per_method(saved.found.cases),
        "Teachers, students alone and distilled students: Dice of test patients.",
    ),
    "02_classes": Entry(
        MAIN, lambda saved: figures.by_class(saved.table("02_classes")),
        "What distillation changes class by class, large classes first.",
    ),
    "02_efficiency": Entry(MAIN, _efficiency, "Dice of test patients against the cost of a network."),
    "02_qualitative": Entry(
        MAIN, _qualitative, "Best, median and worst test volume of the distilled student by Dice.", scans=True
    ),
    "02_learning_curves": Entry(MAIN, _learning, "Distillation: validation Dice along the training."),
    "02_gradient_diagnostics": Entry(MAIN, _terms, "Gradient diagnostics of the terms of the distilled student."),
    "02_pairs": Entry(
        MAIN, lambda saved: figures.pairs(saved.arrays("02_pairs")),
        "Positive and negative pairs of the supervised contrastive loss.",
    ),
    "02_failure": Entry(MAIN, _failure, "Dice by volume and enhancement of the target and thickness of the slices."),
    "02b_controls": Entry(
        "02b_controls",
        lambda saved: figures.forest(saved.table("02b_controls").assign(label_a="the distilled student")),
        "The thesis's recipe against its negative controls: paired difference of Dice.",
    ),
    "02b_agreement": Entry(
        "02b_controls", lambda saved: figures.teacher_agreement(saved.table("02b_agreement")),
        "Agreement of students with T1 on test patients.",
    ),
    "02b_reliability": Entry("02b_controls", _reliability, "Predicted probability against observed frequency."),
    "02b_features": Entry(
        "02b_controls",
        lambda saved: figures.features(saved.arrays("02b_features"), saved.table("02b_similarity"), trio(saved.found)),
        "Features of the last decoder stage by class, before and after distillation.",
    ),
    "03_ablation": Entry(
        "03_ablation",
        lambda saved: figures.forest(_against_alone(saved), terms=methods(saved.found.cases)["terms"].to_dict()),
        "Subsets of the distillation terms against the student alone, paired by patient.",
    ),
    "04_loss_comparison": Entry(
        "04_loss_comparison", _losses, "Distillation losses and controls against no distillation, paired by patient."
    ),
    "05_correction": Entry(
        "05_correction",
        lambda saved: figures.cumulative_correction(saved.table("05_gains"), saved.table("05_correction")),
        "Correction: Dice with and without distillation, one published fault corrected, or put back, at a time.",
    ),
    "05_gradient_diagnostics_first": Entry(
        "05_correction", partial(_terms, protocol=0), "Gradient diagnostics of the terms under the first protocol."
    ),
    "05_gradient_diagnostics_last": Entry(
        "05_correction", partial(_terms, protocol=-1), "Gradient diagnostics of the terms under the last protocol."
    ),
    "07_fractions": Entry(
        "07_fractions", lambda saved: figures.along(saved.found.cases, "fraction"),
        "Dice of test patients by share of labels.",
    ),
    "08_length": Entry(
        "08_length", lambda saved: figures.along(saved.found.cases, "length"),
        "Dice of test patients by length of the training.",
    ),
    "10_capacity": Entry(
        "10_capacity", lambda saved: figures.capacity(saved.found.cases, saved.table("10_networks")),
        "Dice of test patients against parameters, arithmetic and latency of a network.",
    ),
    "11_dimensions": Entry(
        "11_dimensions", lambda saved: figures.dimensions(saved.found.cases, saved.table("11_costs")),
        "Dice of test patients against the latency of networks of slices and of volumes.",
    ),
}  # fmt: skip


def figure(name: str, found: Results, folder: Path | str) -> show.Shown:
    """Draws a figure of the gallery from its experiment's results, saves it in the study's folder and shows it.

    In place of a picture of scans whose slices are not all there (`kdlib.study` with `reuse`) it says so.

    Raises: InputError: no such figure, or something that it is drawn from is missing.
    """
    entry = lookup("figure", name, GALLERY)
    if entry.scans:
        shown = found.cases[found.cases["method"].isin(trio(found).values())]
        lacking = set(zip(shown["method"], shown["case"], strict=True)) - set(
            zip(found.examples["method"], found.examples["case"], strict=True)
        )
        if lacking:
            return show.say(f"`{name}` needs slices, and runs that are read from saved tables have none.")
    return show.figure(entry.draw(Saved(found, Path(folder))), folder, name, entry.caption)


def redraw(folder: Path | str, load: Callable[[Path, str], Results], name: str = "all") -> show.Shown:
    """Draws the figures of a study again from its saved tables; those of experiments that were not run are named.

    Args:
        folder: of the study.
        load: reads an experiment's results, as `kdlib.Results.load` does.
        name: of one figure, or "all".

    Raises: InputError: no such figure, or nothing to draw any from.
    """
    chosen = GALLERY if name == "all" else {name: lookup("figure", name, GALLERY)}
    shown, missing = [], []
    for each, entry in chosen.items():
        try:
            shown.append(figure(each, load(Path(folder), entry.experiment), folder))
        except InputError as error:
            missing.append(str(error))
    if not shown:
        raise InputError(missing[0])
    left_out = [show.folded("left out", show.bullets(list(dict.fromkeys(missing))))] if missing else []
    return sum(shown[1:] + left_out, shown[0])
