"""Which cases are of one patient: by a rule, by a table, or each case alone. All cases of a patient stay together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kdlib.config import InputError

EACH_CASE = "each case is a patient"


def group_cases(cases: Sequence[str], group: str, root: Path) -> tuple[dict[str, str], str]:
    """Case name -> patient, and in a few words how the patients were recognised.

    Args:
        cases: names of the cases.
        group: "auto" (the pairs of the Decathlon's Hippocampus task, else each case is a patient); a regular
            expression that finds the patient in a case name, as its groups or as its whole match; or a CSV file with
            columns case and patient.
        root: folder of the data set, where a CSV file is looked for first.

    Raises: InputError for an expression or a table that leaves a case without a patient.
    """
    if not isinstance(group, str) or not group:
        raise InputError(f"group {group!r}: give 'auto', a regular expression or a CSV file")
    if group == "auto":
        if all(re.fullmatch(r"(?i)hippocampus_?\d+", case) for case in cases):
            # very probably the two hippocampi of one person
            pairs = {case: str((int(re.search(r"\d+$", case).group()) + 1) // 2) for case in cases}
            return pairs, "Hippocampus: volumes 2k - 1 and 2k"
        return {case: case for case in cases}, EACH_CASE
    if group.lower().endswith(".csv"):
        patients, source = _from_table(group, root), f"table {Path(group).name}"
    else:
        patients, source = _from_expression(cases, group), f"regular expression {group}"
    if missing := [case for case in cases if not patients.get(case)]:
        raise InputError(f"group, {source}: no patient for {shorten(missing)}")
    return {case: patients[case] for case in cases}, source


def shorten(names: Sequence[str], most: int = 5) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def suggest_pairs(cases: Sequence[str], labels: Sequence[str]) -> tuple[str, str] | None:
    """(what suggests that cases of one patient lie in several files, how to group them), or None.

    Such names part into many stems of which several cases share one: p01_left and p01_right, sub-01_ses-1 and
    sub-01_ses-2. The labels of Hippocampus tell that task even where everything was renamed.
    """
    own = "GROUP='(.+)' says that each case is a patient of its own"
    if {label.lower() for label in labels} == {"anterior", "posterior"}:
        found = "labels anterior and posterior: probably the Decathlon's Hippocampus, with two volumes of most patients"
        return found, f"group the pairs with GROUP=patients.csv (columns case and patient); {own}"
    # the last part of a name: a number, a side or a word behind a separator
    stems = {case: re.sub(r"[ _.-]*([0-9]+|[A-Za-z]+[0-9]*)$", "", case) for case in cases}
    count = Counter(stem for stem in stems.values() if re.search(r"\d", stem))
    shared = [stem for stem, number in count.items() if number > 1]
    if len(count) < 2 or 2 * len(shared) < len(count) or max(count.values()) > 6:
        return None
    example = " and ".join([case for case in cases if stems[case] == shared[0]][:2])
    found = f"names suggest {len(count)} patients for {len(cases)} cases ({example}), nothing groups them"
    return found, f"group them, e.g. with GROUP='(.+)[_.-]' or GROUP=patients.csv (columns case and patient); {own}"


def _from_expression(cases: Sequence[str], expression: str) -> dict[str, str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise InputError(f"group {expression!r}: not a regular expression ({error})") from None
    patients = {}
    for case in cases:
        if match := pattern.search(case):  # its groups, or the whole match where it has none
            patients[case] = "_".join(filter(None, match.groups() or (match.group(),)))
    return patients


def _from_table(group: str, root: Path) -> dict[str, str]:
    path = next((path for path in (root / group, Path(group)) if path.is_file()), None)
    if path is None:
        raise InputError(
            f"group {group}: no such file, neither in {root} nor here; give a CSV file of case and patient"
        )
    try:
        table = pd.read_csv(path, dtype=str, skipinitialspace=True, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:  # pandas's own errors are ValueErrors
        raise InputError(f"{path}: not a CSV file ({error})") from None
    if not {"case", "patient"} <= set(table.columns):
        raise InputError(f"{path}: columns {', '.join(map(str, table.columns))}; it needs case and patient")
    table = table.dropna(subset=["case", "patient"]).drop_duplicates(["case", "patient"])
    twice = table["case"][table["case"].duplicated()]
    if len(twice):
        raise InputError(f"{path}: case {twice.iloc[0]!r} has two patients; give each case one")
    return dict(zip(table["case"], table["patient"], strict=True))
