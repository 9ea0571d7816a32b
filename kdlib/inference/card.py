"""The model card of a student's folder, from what `student.json` says: nothing here is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from kdlib.analysis.cards import UNKNOWN, markdown
from kdlib.analysis.intervals import interval_text
from kdlib.analysis.tables import summarise
from kdlib.inference.student import Student

NEEDS = {"onnx": "onnxruntime", "openvino": "OpenVINO", "openvino-int8": "OpenVINO", "torch": "PyTorch"}
WORST = 3


def model_card(student: Student, to: str, hashes: Mapping[str, str]) -> str:
    """Data, split, Dice with its interval, worst cases, licence, hashes and how to run it, in Markdown.

    Args:
        to: one of `kdlib.inference.export.FORMATS`.
        hashes: file -> sha256.
    """
    facts = student.facts
    before = _cases(facts, "dice")
    exported = _cases(facts, "dice_int8")
    shown, worst = before if exported.empty else exported, pd.DataFrame()
    if not shown.empty:
        means = shown.groupby(["patient", "case"], sort=False)["value"].mean().sort_values(kind="stable").head(WORST)
        worst = means.map("{:.3f}".format).reset_index().rename(columns={"value": "Dice"})
    return _page("card.md.j2").render(
        student=student, facts=facts, to=to, hashes=hashes, needs=NEEDS[student.format], unknown=UNKNOWN,
        dice=_means(before), dice_int8=_means(exported), costs=_costs(before, exported), worst=worst,
        interval=interval_text(summarise(shown, ["run"])["interval"]) if not shown.empty else UNKNOWN,
        licence=facts.get("licence") or UNKNOWN, attribution=facts.get("attribution") or UNKNOWN,
    )  # fmt: skip


def licence_text(student: Student) -> str:
    """The terms of the weights."""
    facts = student.facts
    return _page("licence.j2").render(
        student=student, data_set=facts.get("data_set", UNKNOWN), licence=facts.get("licence") or UNKNOWN,
        attribution=facts.get("attribution") or UNKNOWN,
    )  # fmt: skip


def _page(name: str):
    pages = Environment(
        loader=PackageLoader("kdlib.inference"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    pages.filters["table"] = markdown
    return pages.get_template(name)


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
    parts = [("all", table), *table.groupby("class", sort=False)] if table["class"].nunique() > 1 else [
        (table["class"].iloc[0], table)
    ]  # fmt: skip
    rows = []
    for label, part in parts:
        found = summarise(part, ["run"]).iloc[0]
        ends = UNKNOWN if pd.isna(found["low"]) else f"{found['low']:.3f} to {found['high']:.3f}"
        rows.append({"class": label, "Dice": f"{found['mean']:.3f}", "95 % interval": ends, "patients": found["n"]})
    return pd.DataFrame(rows)


def _costs(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """What int8 changes: by case, the mean over classes."""
    if after.empty or before.empty:
        return pd.DataFrame()
    means = [table.groupby("case", sort=False)["value"].mean() for table in (before, after)]
    change = means[1] - means[0]
    cells = {"mean change": change.mean(), "largest loss": change.min(), "largest gain": change.max()}
    return pd.DataFrame([{name: f"{value:+.4f}" for name, value in cells.items()} | {"cases": len(change)}])
