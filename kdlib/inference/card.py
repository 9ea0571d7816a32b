"""The model card of a student's folder, from what `student.json` says: nothing here is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from kdlib.analysis.cards import UNKNOWN, performance, templates, worst
from kdlib.analysis.intervals import interval_text
from kdlib.analysis.tables import summarise
from kdlib.inference.student import Student

NEEDS = {"onnx": "onnxruntime", "openvino": "OpenVINO", "openvino-int8": "OpenVINO", "torch": "PyTorch"}


def model_card(student: Student, to: str, hashes: Mapping[str, str]) -> str:
    """Data, split, Dice with its interval, worst cases, licence, hashes and how to run it, in Markdown.

    Args:
        to: one of `kdlib.inference.export.FORMATS`.
        hashes: file -> sha256.
    """
    facts = student.facts
    before = _cases(facts, "dice")
    exported = _cases(facts, "dice_int8")
    shown = before if exported.empty else exported
    return templates("kdlib.inference").get_template("card.md.j2").render(
        student=student, facts=facts, to=to, hashes=hashes, needs=NEEDS[student.format], unknown=UNKNOWN,
        dice=_means(before), dice_int8=_means(exported), costs=_costs(before, exported),
        worst=shown if shown.empty else worst(shown),
        interval=interval_text(summarise(shown, ["run"])["interval"]) if not shown.empty else UNKNOWN,
    )  # fmt: skip


def licence_text(student: Student) -> str:
    """The terms of the weights."""
    page = templates("kdlib.inference").get_template("licence.j2")
    return page.render(student=student, facts=student.facts, unknown=UNKNOWN)


def _cases(facts: Mapping, name: str) -> pd.DataFrame:
    """The tidy table of Dice by case and class; empty where it was not measured."""
    patients = facts.get("patients", {})
    rows = [
        dict(run="", case=case, patient=patients.get(case, case), metric="dice", value=value) | {"class": label}
        for case, values in facts.get(name, {}).items()
        for label, value in values.items()
    ]
    return pd.DataFrame(rows)


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice over patients with its interval, of all classes and of each."""
    if table.empty:
        return table
    return performance(table).drop(columns="metric").rename(columns={"mean": "Dice", "n": "patients"})


def _costs(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """What int8 changes: by case, the mean over classes."""
    if after.empty or before.empty:
        return pd.DataFrame()
    means = [table.groupby("case", sort=False)["value"].mean() for table in (before, after)]
    change = means[1] - means[0]
    cells = {"mean change": change.mean(), "largest loss": change.min(), "largest gain": change.max()}
    return pd.DataFrame([{name: f"{value:+.4f}" for name, value in cells.items()} | {"cases": len(change)}])
