"""Labels for readers, made from the identity columns of a table; the only place that names a method.

A method is one row of a results table: everything about a run but its data, protocol, fold and seed. Its id (column
`method`) is opaque; code selects rows by the other identity columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from kdlib.config import InputError

TEXT_COLUMNS = ("model", "role", "teacher", "recipe", "terms", "loss", "loss_label", "family", "control", "protocol")
USUAL = dict.fromkeys(TEXT_COLUMNS, "") | dict(fraction=1.0, unlabelled=False, length=1.0, dimensions=2)
IDENTITY = tuple(USUAL)  # columns that say what a method is
THESIS_TERMS = "E-E+B-B+D-D+PMD"
NO_DISTILLATION = "no distillation"
CONTROLS = {  # column `control` -> label
    "zero_weights": "zero-weight control", "random_teacher": "random teacher", "shuffled_teacher": "shuffled teacher",
    "frozen_projectors": "frozen projectors", "redrawn_projectors": "redrawn projectors",
    "label_smoothing": "label smoothing", "longer_training": "longer training",
    "equal_time": "equal wall-clock time", "pseudo_labels": "pseudo-labels", "self_consistency": "self-consistency",
    "self_distillation": "self-distillation", "unused_images": "unused images",
}  # fmt: skip
RECIPES = {  # recipe -> what tells it from others of the same loss
    "predictions": "tuned weight", "kl": "balanced", "PMD": "thesis's weight",
}  # fmt: skip
KNOWLEDGE = (
    "features (and predictions)",
    "predictions",
    "predictions, unlabelled images",
    "pseudo-labels",
)  # what a teacher gives
CONTROL = "control"
SHAPES = {2: "slices", 3: "volumes"}  # column `dimensions` -> label


def methods(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method of a tidy table, in its order: the identity columns and `label`, indexed by `method`.

    Columns that the table lacks are empty; labels are distinct, and as short as the other methods of the table allow:
    where all rows are of one student and label fraction, the student without a teacher is "no distillation" and
    distilled ones are named by what differs between them (terms or loss).

    Raises: InputError: the table has no column `method`.
    """
    if "method" not in table:
        raise InputError(f"the table has no column method: it has {', '.join(map(str, table)) or 'none'}")
    found = table.drop_duplicates("method").set_index("method").reindex(columns=list(IDENTITY)).astype(object)
    found = found.fillna(USUAL).astype({column: type(value) for column, value in USUAL.items()})
    found["loss_label"] = found["loss_label"].where(found["loss_label"] != "", found["loss"])
    return found.assign(label=_distinct(found, _short_labels(found)))


def way_of_learning(method: pd.Series) -> str:
    """What a student learns from, whatever its labels and its length: a row of `methods` in words."""
    if method["role"] == "baseline":
        return "alone"
    if method["role"] == "control":
        return CONTROLS.get(method["control"], method["control"])
    return "distilled, with unlabelled images" if method["unlabelled"] else "distilled"


def knowledge(method: pd.Series) -> tuple[str, str]:
    """What a student (a row of `methods`) learns: one of `KNOWLEDGE` or `CONTROL`, and the same in full."""
    if method["control"] == "pseudo_labels":
        return "pseudo-labels", f"pseudo-labels of {method['teacher']}"
    if method["role"] == "control":
        return CONTROL, way_of_learning(method)
    features = method["terms"] != "PMD"
    what = f"{method['loss_label']}, {method['terms']}" if features else method["loss_label"]
    if method["recipe"] in ("kl", "PMD"):
        what += f", {RECIPES[method['recipe']]}"
    if method["terms"] == THESIS_TERMS and method["loss"] == "supcon":
        what = "the thesis's terms"
    if method["unlabelled"]:
        return "predictions, unlabelled images", f"{what} from {method['teacher']}, on unlabelled images too"
    return "features (and predictions)" if features else "predictions", f"{what} from {method['teacher']}"


def method_labels(*tables: pd.DataFrame) -> dict[str, str]:
    """Method -> its label in a table, the last one that has it; see `methods`."""
    return {method: label for table in tables for method, label in methods(table)["label"].items()}


def percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


DISTINGUISHING = {  # column -> its values in words, in the order in which they tell methods of one label apart
    "dimensions": SHAPES.get, "loss_label": str, "terms": str, "teacher": str, "model": str, "fraction": percent,
    "unlabelled": {True: "with unlabelled slices", False: ""}.get, "length": "{:g} x as long".format,
    "protocol": str, "recipe": lambda name: RECIPES.get(name, name),
}  # fmt: skip


def _short_labels(found: pd.DataFrame) -> list[str]:
    students = found[found["role"] != "teacher"]
    one_student = len(students) == len(found) and len(students[["model", "fraction"]].drop_duplicates()) == 1
    one_student &= (students["role"] != "baseline").any()
    distilled = found[found["role"] == "distilled"]
    by_terms, by_loss = (distilled[column].nunique() for column in ("terms", "loss"))
    # an ablation has one loss of features, and of every method its own terms
    ablation = by_terms == len(distilled) and distilled.loc[distilled["terms"] != "PMD", "loss"].nunique() <= 1
    labels = []
    for row in found.itertuples():
        share = "" if row.fraction == 1 else f" ({percent(row.fraction)})"
        label = f"{row.model}{share}" if row.role else str(row.Index)
        if row.role == "control":
            label = CONTROLS.get(row.control, row.control)
        elif row.role == "distilled" and one_student and max(by_terms, by_loss) > 1:
            by_loss_label = f"thesis terms, {row.loss_label}" if row.terms == THESIS_TERMS else row.loss_label
            label = row.terms if ablation else by_loss_label
        elif row.role == "distilled":
            label = f"KD({row.teacher}, {row.model})"
        elif row.role == "baseline" and one_student:
            label = NO_DISTILLATION
        labels.append(label)
    return labels


def _distinct(found: pd.DataFrame, labels: Iterable[str]) -> list[str]:
    """Equal labels are followed by the first identity columns that tell their methods apart."""
    labels = pd.Series(labels, found.index)
    for column, words in DISTINGUISHING.items():
        if not labels.duplicated().any():
            break
        for label, group in found[labels.duplicated(keep=False)].groupby(labels, sort=False):
            if group[column].nunique() > 1:
                texts = map(words, group[column])
                labels[group.index] = [f"{label}, {text}" if text else label for text in texts]
    return labels.mask(labels.duplicated(), labels + " (" + labels.index.astype(str) + ")").tolist()
