"""When does distillation help? Every comparison of a taught student with the same student alone, over all studies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.analysis.answer import fractions, verdicts_markdown, verdicts_of
from kdlib.analysis.labels import CONTROL, KNOWLEDGE, knowledge, methods
from kdlib.analysis.sentences import NOT_CONVERGED, counted_verdicts, listed, many, signed
from kdlib.config import InputError
from kdlib.files import packed_or_not, read_csv

NEAR = 0.02  # Dice between a student alone and its teacher that leaves little to distil
PRINTED = [  # of `everything`, to print
    "verdict", "study", "chapter", "data", "n", "seeds", "student", "labels", "times", "learns", "dice_alone",
    "dice_teacher", "change", "closed",
]  # fmt: skip


def everything(folders: Sequence[Path | str]) -> pd.DataFrame:
    """Every distilled student and every control against the same student alone, chapter by chapter, of several studies.

    Each chapter of a study is a family of tests of its own, as in its own table. A comparison that several chapters
    make stands once: that of most seeds, of these the last, since the last chapters train it beside their other label
    fractions and lengths; one that several studies make of the same trainings, under the first, or under that which has
    more seeds of it. Left out: the cumulative correction, whose protocols differ.

    Args:
        folders: of studies, with their `tables`.

    Returns: one row per comparison, with the columns of `answer.fractions` and study, chapter, data (the data set,
        without a remark in parentheses, and its class, or the number of them; "in 3D" of volumes), knowledge (one of
        `KNOWLEDGE` or "control"), fraction and parameters.

    Raises: InputError: a folder without any such chapter, or with no training that those before it lack.
    """
    found, known = [], set()
    for folder in map(Path, folders):
        chapters = list(filter(None, map(_read, sorted((folder / "tables").glob("*_cases.csv*")))))
        teachers = [cases[cases["role"] == "teacher"] for _, cases, _, _ in chapters]
        rows = [_comparisons(*chapter, teachers) for chapter in _with_teachers(chapters)] if chapters else []
        if not sum(map(len, rows)):
            raise InputError(f"{folder} holds no comparison with a student alone: run its chapters first")
        trained = pd.concat([cases[["method", "run"]] for _, cases, _, _ in chapters]).drop_duplicates()
        own = trained.loc[~trained["run"].isin(known), "method"]
        made = trained.groupby("method")["run"].agg(frozenset)
        known.update(trained["run"])
        table = pd.concat(rows, ignore_index=True)
        ranked = table[::-1].sort_values("seeds", ascending=False, kind="stable")
        table = table.loc[sorted(ranked.drop_duplicates(["a", "b"]).index)]
        if not table["a"].isin(own).any():
            raise InputError(f"{folder} holds only trainings of the studies named before it: leave it out")
        table = table[table["a"].isin(own)]
        found.append(table.assign(study=folder.name, made=table["a"].map(made)))
    table = pd.concat(found, ignore_index=True)
    rows = list(zip(table["a"], table["b"], table["made"], strict=True))
    within = [any((a, b) == other[:2] and made < other[2] for other in rows) for a, b, made in rows]
    return table[~np.array(within)].drop(columns="made").reset_index(drop=True)


def _with_teachers(chapters: Sequence[tuple]) -> list[tuple]:
    """Chapters as `_read` gives them, each with the histories of all the study's teachers, for `convergence`."""
    known = pd.concat([history[history["role"] == "teacher"] for _, _, history, _ in chapters])
    known = known.drop_duplicates(["run", "protocol", "epoch", "name"])
    return [
        (name, cases, pd.concat([history, known[
            ~known["run"].isin(history["run"]) & known["protocol"].isin(cases["protocol"])
        ]]), runs)
        for name, cases, history, runs in chapters
    ]  # fmt: skip


def _read(path: Path) -> tuple[str, pd.DataFrame, pd.DataFrame, pd.DataFrame] | None:
    """A chapter's name, cases, history and runs; None where its rows are not of one protocol."""
    name = path.name.partition("_cases.csv")[0]
    files = [packed_or_not(path.with_name(f"{name}_{part}.csv")) for part in ("history", "runs")]
    if None in files:
        return None
    cases, history, runs = map(read_csv, (path, *files))
    return None if cases["protocol"].nunique() > 1 else (name, cases, history, runs)


def _comparisons(
    name: str, cases: pd.DataFrame, history: pd.DataFrame, runs: pd.DataFrame, masters: Sequence[pd.DataFrame]
) -> pd.DataFrame:
    """The comparisons of one chapter, if any; its teachers are its own, else those of other chapters."""
    about = methods(cases)
    if not about["role"].isin(["distilled", "control"]).any():
        return pd.DataFrame()
    table = fractions(cases, verdicts_of(cases, history), masters)
    taught, parameters = about.loc[table["a"]], runs.drop_duplicates("method").set_index("method")["parameters"]
    classes = cases["class"].unique()
    target = classes[0] if len(classes) == 1 else f"{len(classes)} classes"
    scans = runs["data"].iloc[0].partition(" (")[0]
    return table.assign(
        chapter=name, data=f"{scans}, {target}" + taught["dimensions"].map({2: "", 3: ", in 3D"}).to_numpy(),
        knowledge=[knowledge(row)[0] for _, row in taught.iterrows()], fraction=taught["fraction"].to_numpy(),
        parameters=table["a"].map(parameters),
    )  # fmt: skip


def counted(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `everything` that sentences and figure are drawn from: of people, taught by a teacher, converged."""
    rows = _taught(table)
    return rows[rows["verdict"] != NOT_CONVERGED]


def _taught(table: pd.DataFrame) -> pd.DataFrame:
    """The rows without controls, and without those of the phantom where there are scans of people."""
    phantom = table["data"].str.lower().str.startswith("phantom,")
    return table[(table["knowledge"] != CONTROL) & (~phantom | phantom.all())]


def sentences(table: pd.DataFrame) -> list[str]:
    """What follows from everything that was compared: how often a teacher helps, where most, and what it depends on.

    Args:
        table: of `everything`; only what is `counted` counts.
    """
    rows = counted(table)
    if rows.empty:
        return ["No comparison of a converged student with itself alone."]
    said = [_count_sentence(rows, rising=len(_taught(table)) - len(rows)), _most_sentence(rows)]
    known = rows.dropna(subset="gap")
    near = known["gap"] < NEAR
    if near.any() and (~near).any():
        mixed = not set(known["knowledge"][near]) & set(known["knowledge"][~near])
        said.append(
            f"Where the student alone lacks less than {NEAR:g} Dice of its teacher, a teacher changes Dice by "
            f"{_span(known[near])}; where it lacks more, by {_span(known[~near])}."
            + " What the teachers give differs between the two, so the distance may not be the reason."
            * mixed
        )
    if rows["fraction"].nunique() > 1:
        best = rows.loc[rows.groupby("fraction")["difference"].idxmax()]
        other = " (on different data)" * (best["data"].nunique() > 1)
        parts = [f"{row.labels} {row.change} ({row.student}, {row.learns}, {row.verdict})" for row in best.itertuples()]
        said.append(f"The most that a teacher brings, by labels{other}: {listed(parts)}.")
    if rows["knowledge"].nunique() > 1:
        parts = [
            f"{name} {signed(f'{part.mean():+.3f}')} Dice ({many(len(part), 'comparison')})"
            for name in KNOWLEDGE if len(part := rows.loc[rows["knowledge"] == name, "difference"])
        ]  # fmt: skip
        said.append(
            "By what the teacher gives, on average over what was compared (each on data and labels of its own: no "
            f"ranking): {listed(parts)}."
        )
    alike = rows.groupby(["study", "student", "labels", "learns"])
    lengths = [group for _, group in alike if group["length"].nunique() > 1]
    if lengths:
        most = max(map(len, lengths))
        along = "; ".join(_along(group) for group in lengths if len(group) == most)
        said.append(f"By length of training (1 x: the usual steps of that study), {along}.")
    return said


def _along(rows: pd.DataFrame) -> str:
    """What a teacher changes in trainings that differ in nothing but their length."""
    first = rows.iloc[0]
    who = f"{first['student']} with {first['labels']} of the labels on {first['data']}, taught by {first['learns']}"
    by_length = rows.sort_values("length").itertuples()
    return f"{who}: {listed([f'{row.times} {row.change} ({row.verdict})' for row in by_length])}"


def _count_sentence(rows: pd.DataFrame, rising: int) -> str:
    decided = counted_verdicts(rows["verdict"])
    data = listed([f"{name} ({many(part['n'].max(), 'patient')})" for name, part in rows.groupby("data", sort=False)])
    more = f" {rising} more {'has' if rising == 1 else 'have'} not converged and do{'es' * (rising == 1)} not count."
    of = f"{many(len(rows), 'comparison')} of a student taught by a teacher with the same student alone"
    said = f"Of {of}, on {data}: {decided}."
    return said + more * bool(rising)


def _most_sentence(rows: pd.DataFrame) -> str:
    """Who gains the most, and whose loss is the largest of those that are decided."""
    best = rows.loc[rows["difference"].idxmax()]
    closed = f", {best['closed']} of the gap to {best['teacher']}" if best["closed"] else ""
    said = f"The most is gained by {_who(best)} ({best['verdict']}; {best['gain']} patients gain{closed})."
    if best["difference"] <= 0:
        said = "In none of them does the student gain."
    decided = rows[rows["verdict"] == "worse"]
    if decided.empty:
        return said
    worst = decided.loc[decided["difference"].idxmin()]
    first = (
        "The most is lost by" if worst["difference"] == rows["difference"].min() else "The largest decided loss is of"
    )
    return f"{said} {first} {_who(worst)} (worse; {worst['gain']} patients gain)."


def _who(row: pd.Series) -> str:
    where = f"{row['student']} with {row['labels']} of the labels on {row['data']}"
    return f"{where} from {row['learns']}: {row['change']} Dice"


def _span(rows: pd.DataFrame) -> str:
    """From the least to the largest change of Dice, and of how many comparisons."""
    ends = [signed(f"{rows['difference'].agg(end):+.3f}") for end in ("min", "max")]
    text = " to ".join(dict.fromkeys(ends))
    return f"{text} ({many(len(rows), 'comparison')})"


def conclusion_markdown(table: pd.DataFrame, picture: str) -> str:
    """Sentences and figure as Markdown, for a page that shows no notebook."""
    first, *others = sentences(table)
    bullets = "".join(f"- {sentence}\n" for sentence in others)
    return f"**{first}**\n\n{bullets}\n![When does distillation help?]({picture})\n"


def table_markdown(table: pd.DataFrame) -> str:
    """What was compared on scans of people, without controls, the largest change first, as Markdown."""
    rows = _taught(table).sort_values("difference", ascending=False)
    rows = rows.sort_values("verdict", key=lambda column: column == NOT_CONVERGED, kind="stable")
    return verdicts_markdown(rows, PRINTED)
