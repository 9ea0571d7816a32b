"""Has a training converged? Nothing is compared before it has."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from kdlib.analysis.labels import method_labels
from kdlib.config import InputError

TOLERATED_GAIN = 0.01  # Dice that the last fifth of a training may still gain


def convergence(
    history: pd.DataFrame, by: Sequence[str] = ("method",), named: Sequence[pd.DataFrame] = ()
) -> pd.DataFrame:
    """Validation Dice at 25, 50 and 100 % of the steps of every method, and what the last fifth of them gained.

    The Dice at a share of a training is the best of the validations until then, as the best weights are those that are
    kept; it is averaged over the runs (folds and seeds) of a method. The learning rate falls to 0 over each training,
    so that Dice at 50 % of the steps is less than that of a training of half the length.

    Args:
        history: tidy, a row per run, epoch and name, with the validation Dice as name `val_dice`; of distilled students
            with the columns role, model and teacher.
        by: columns that make a method.
        named: a chapter's table of cases, to name methods as there; it lacks teachers that the history has.

    Returns: a table with columns `by`, label (of methods), runs, dice_25, dice_50, dice_100, last_fifth (gain of Dice)
        and converged (the gain is at most 0.01, and so is that of its teachers in this history).

    Raises: InputError: the history holds no validation Dice.
    """
    dice = history[history["name"] == "val_dice"]
    if dice.empty:
        raise InputError("a history without val_dice: give the history table of a study")
    each = ["run", *by]  # methods of several protocols may share a run
    end = dice.groupby(each)["epoch"].transform("max")
    table = dice[each].drop_duplicates().set_index(each)
    for percent in (25, 50, 80, 100):
        until = dice[dice["epoch"] <= percent / 100 * end]
        table[f"dice_{percent}"] = until.groupby(each)["value"].max()
    table = table.fillna(dict.fromkeys(("dice_25", "dice_50", "dice_80"), 0.0))  # no validation until then
    table["last_fifth"] = table["dice_100"] - table.pop("dice_80")
    groups = table.groupby(list(by), sort=False)
    found = groups[["dice_25", "dice_50", "dice_100", "last_fifth"]].mean()
    found.insert(0, "runs", groups.size())
    rising = found["last_fifth"] > TOLERATED_GAIN
    found = found.assign(converged=~(rising | _taught_by(rising, dice))).reset_index()
    if "method" in by:
        found.insert(len(by), "label", found["method"].map(method_labels(history, *named)))
    return found


def _taught_by(rising: pd.Series, dice: pd.DataFrame) -> pd.Series:
    """Of each method (index of `rising`, after its protocol if any): whether a teacher of it, there, is `rising`.

    A teacher has all labels: one of a part is only pruned. A control with zero weights has one that teaches it nothing.
    """
    by = list(rising.index.names)
    columns = [*by[:-1], "dimensions", "role", "model", "fraction", "teacher", "control"]  # what is missing is NaN
    about = dice.drop_duplicates(by).set_index(by, drop=False).loc[rising.index].reindex(columns=columns)
    rows = list(about.fillna({"dimensions": 2, "fraction": 1.0}).itertuples(index=False, name=None))
    unfinished = [row for row, rises in zip(rows, rising, strict=True) if rises]
    masters = {(*at, model) for *at, role, model, part, _, _ in unfinished if role == "teacher" and part == 1}
    taught = [
        control != "zero_weights" and any((*at, name) in masters for name in str(names).split("+"))
        for *at, _, _, _, names, control in rows
    ]
    return pd.Series(taught, rising.index)
