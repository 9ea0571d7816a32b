"""The answer of a study: one row and one sentence per student and teacher, from the test patients' Dice."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from kdlib.analysis.comparisons import SAME, baseline_pairs, by_patient, compare
from kdlib.analysis.convergence import convergence
from kdlib.analysis.labels import CONTROLS, methods, percent
from kdlib.analysis.sentences import correction_sentence, interval_of, listed, withhold
from kdlib.analysis.tables import HEADINGS

SAID = {
    "better": "distillation from {} helps", "worse": "distillation from {} does harm",
    "equivalent": f"distillation from {{}} changes nothing that matters (less than {SAME['dice']:g} Dice either way)",
    "inconclusive": "whether distillation from {} changes anything is not decided by {} patients",
    "not converged": "no verdict yet on distillation from {}, a training has not converged",
}  # fmt: skip
ANSWER_COLUMNS = [  # of `answer`, to print
    "verdict", "student", "teacher", "dice_alone", "dice_distilled", "change", "gain", "dice_teacher",
]  # fmt: skip


def verdicts_of(cases: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """`statistics.compare` of every distilled student with itself alone; no verdict where one has not converged."""
    return withhold(compare(cases, baseline_pairs(cases)), convergence(history))


def answer(cases: pd.DataFrame, verdicts: pd.DataFrame, parameters: Mapping[str, int]) -> pd.DataFrame:
    """The main table: what distillation changes, for each student and teacher.

    Args:
        cases: tidy, with students alone and distilled, and their teachers.
        verdicts: from `verdicts_of`.
        parameters: method -> number of parameters.

    Returns: one row per comparison, the verdict first: student, teacher, labels (share), dice_alone, dice_distilled,
        change (with interval, as text), gain (patients), dice_teacher (NaN without one), parameters, and n, volumes,
        seeds, difference, low, high, interval, p_holm and smallest_p of the comparison.
    """
    found, rows = methods(cases), []
    teachers = found[found["role"] == "teacher"].reset_index().set_index("model")["method"].to_dict()
    seeds = cases["seed"].nunique() if "seed" in cases else 1
    for row in verdicts.itertuples():
        values = by_patient(cases, [row.a, row.b], "dice", "method")
        change = (values[row.a] - values[row.b]).round(12)
        about = found.loc[row.a]
        teacher = teachers.get(about["teacher"])
        reached = by_patient(cases, [teacher], "dice", "method")[teacher].mean() if teacher else np.nan
        rows.append(dict(
            verdict=row.verdict, student=about["model"], teacher=about["teacher"], labels=percent(about["fraction"]),
            dice_alone=values[row.b].mean(), dice_distilled=values[row.a].mean(),
            change=interval_of(row.difference, row.low, row.high), gain=f"{(change > 0).sum()} of {len(change)}",
            dice_teacher=reached, parameters=parameters[row.a], n=row.n, volumes=row.volumes, seeds=seeds,
            difference=row.difference, low=row.low, high=row.high, interval=row.interval, p_holm=row.p_holm,
            smallest_p=row.smallest_p,
        ))  # fmt: skip
    return pd.DataFrame(rows)


def answer_sentences(table: pd.DataFrame) -> list[str]:
    """One honest sentence per student: what distillation from each teacher changed, for how many, and what that means.

    Args:
        table: of `answer`.
    """
    said = []
    for student, rows in table.groupby("student", sort=False):
        parts = [
            f"{SAID[row.verdict].format(row.teacher, row.n)}: Dice {row.dice_distilled:.3f} against "
            f"{row.dice_alone:.3f} alone ({row.change}; {row.gain} patients gain)"
            for row in rows.itertuples()
        ]
        reached = [f"{row.teacher} {row.dice_teacher:.3f}" for row in rows.dropna(subset="dice_teacher").itertuples()]
        first, seeds = rows.iloc[0], int(rows["seeds"].iloc[0])
        known = (
            f"**{student}**, {first['parameters']:,} parameters, {first['labels']} of the labels: {'; '.join(parts)}."
        )
        known += f" With all labels {listed(reached)}." if reached else ""
        said.append(f"{known} {seeds} seed{'s' * (seeds > 1)}.")
    return said


def answer_markdown(table: pd.DataFrame, picture: str) -> str:
    """The sentences, the picture and the main table as Markdown, for a page that shows no notebook."""
    lines = [f"- {sentence}" for sentence in answer_sentences(table)]
    shown = table.assign(verdict="**" + table["verdict"] + "**")[ANSWER_COLUMNS]
    return "\n".join([*lines, "", f"![What distillation changes]({picture})", "", markdown(shown)])


def correction_markdown(changes: pd.DataFrame, gains: pd.DataFrame) -> str:
    """What each step of the cumulative correction is worth, as Markdown.

    Args:
        changes: from `statistics.step_changes`.
        gains: from `statistics.gains`, with the zero-weight control among its references.
    """
    control = gains[gains["label_b"] == CONTROLS["zero_weights"]].set_index("stage")
    rows = []
    for row in changes.itertuples():
        gain = control.loc[row.step] if row.step in control.index else None
        rows.append({
            "step": row.step, "Dice of the distilled student": row.dice,
            "change by this step [95 % interval]": "" if pd.isna(row.difference) else
            f"{interval_of(row.difference, row.low, row.high)}, {row.verdict}",
            "gain over the zero-weight control here": "" if gain is None else
            f"{interval_of(*gain[['difference', 'low', 'high']])}, {gain['verdict']}",
        })  # fmt: skip
    return f"{correction_sentence(changes)} n = {changes['n'].iloc[0]} patients.\n\n{markdown(pd.DataFrame(rows))}"


def markdown(table: pd.DataFrame) -> str:
    """A table of text and numbers with three digits, under readers' headings."""
    cells = table.map(
        lambda value: "" if pd.isna(value) else f"{value:.3f}" if isinstance(value, float) else str(value)
    )
    rows = [[HEADINGS.get(name, name) for name in table], ["---"] * table.shape[1], *cells.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
