"""The answer of a study: one row and one sentence per student and teacher, from the test patients' Dice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kdlib.analysis import show
from kdlib.analysis.comparisons import SAME, baseline_pairs, by_patient, compare, compare_classes, term_effects
from kdlib.analysis.convergence import convergence
from kdlib.analysis.labels import CONTROLS, knowledge, methods, percent
from kdlib.analysis.sentences import (
    NOT_CONVERGED,
    comparison_sentences,
    correction_sentence,
    counted_verdicts,
    gains_sentence,
    interval_of,
    listed,
    many,
    signed,
    withhold,
)
from kdlib.analysis.tables import HEADINGS, markdown_table
from kdlib.protocol import is_single

ANSWER_COLUMNS = [  # of `answer`, to print
    "verdict", "student", "teacher", "dice_alone", "dice_distilled", "change", "gain", "dice_teacher",
]  # fmt: skip
CLASS_COLUMNS = [  # of `by_class`, to print
    "verdict", "class", "volume", "student", "teacher", "dice_alone", "dice_distilled", "change", "gain",
    "dice_teacher",
]  # fmt: skip
FRACTION_COLUMNS = [  # of `fractions`, to print
    "verdict", "student", "labels", "learns", "dice_alone", "dice", "change", "gain", "closed", "dice_teacher",
]  # fmt: skip
LENGTH_COLUMNS = ["verdict", "student", "times", *FRACTION_COLUMNS[3:]]  # the same, of trainings of several lengths
PLATEAUS = {  # verdict on the longest trainings -> what it says
    "better": "a higher plateau", "worse": "a lower plateau", "equivalent": "the same plateau",
    "inconclusive": "whether the plateau is higher is not decided", NOT_CONVERGED: "no plateau yet",
}  # fmt: skip


def verdicts_of(
    cases: pd.DataFrame, history: pd.DataFrame, pairs: Sequence[tuple[str, str]] | None = None
) -> pd.DataFrame:
    """`statistics.compare` of pairs of methods (None: every distilled student and control with the same student alone);
    no verdict where one has not converged."""
    return withhold(compare(cases, baseline_pairs(cases) if pairs is None else pairs), convergence(history))


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
    table = fractions(cases, verdicts).rename(columns={"dice": "dice_distilled"})
    table = table.assign(parameters=table["a"].map(parameters))
    counted = ["n", "volumes", "seeds", "difference", "low", "high", "interval", "p_holm", "smallest_p"]
    return table[[*ANSWER_COLUMNS[:3], "labels", *ANSWER_COLUMNS[3:], "parameters", *counted]]


def by_class(cases: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """Where distillation helps and where it hurts: the main table class by class, large organs first.

    Args:
        cases: tidy, of several classes, with students alone and distilled, and their teachers; metric truth_volume.
        history: of the same trainings, for their convergence.

    Returns: one row per class and comparison (`statistics.compare_classes`, one family of tests), the verdict first:
        class, volume (mean of the true ones, ml), student, teacher, dice_alone, dice_distilled, change
        (with interval, as text), gain (patients), dice_teacher, n, difference, low, high, interval, p_holm, and
        never_alone and never (trainings that find the class in no test case).
    """
    compared = withhold(compare_classes(cases, baseline_pairs(cases)), convergence(history))
    rows = []
    for name, verdicts in compared.groupby("class", sort=False):
        of = cases[cases["class"] == name]
        size = of.loc[of["metric"] == "truth_volume", "value"].mean()
        place = ["method", "fold", "seed", "case"]
        wide = of.pivot_table(index=place, columns="metric", values="value")
        best = wide.loc[wide["truth_volume"] > 0, "dice"].groupby(place[:3]).max()  # where there is something to find
        lost = (best == 0).groupby("method").sum()  # trainings without a right voxel of the class in any test case
        never_alone, never = (lost.reindex(verdicts[name], fill_value=0).to_numpy() for name in ("b", "a"))
        found = answer(of, verdicts, {}).assign(volume=size, never_alone=never_alone, never=never)
        found.insert(1, "class", name)
        rows.append(found)
    table = pd.concat(rows).sort_values("volume", ascending=False, kind="stable", ignore_index=True)
    return table.drop(columns=["labels", "parameters", "volumes", "seeds"])


def loss_sentences(table: pd.DataFrame, verdicts: pd.DataFrame) -> list[str]:
    """What the best of the distillation losses is worth, and beside it what the same student gains without a teacher.

    Args:
        table: tidy, or of `statistics.ranks`: it tells which methods have a teacher and which are controls.
        verdicts: from `verdicts_of`, of one student and share of labels.
    """
    about = methods(table).loc[verdicts["a"]]
    taught = verdicts[(about["role"] == "distilled").to_numpy()]
    settled = taught[taught["verdict"] != NOT_CONVERGED]
    best = (taught if settled.empty else settled).nlargest(1, "difference").iloc[0]
    ways = f"Of {many(len(taught), 'way')} to learn from a teacher: {counted_verdicts(taught['verdict'])}"
    most = "The most is gained by" if best["difference"] > 0 else "None gains on average; the least is lost by"
    said = [f"{ways}. {most} {best['label_a']}: {_worth(best)}."]
    alone = verdicts[(about["teacher"] == "").to_numpy()]
    return [*said, f"Without a teacher: {_each_worth(alone)}."] if len(alone) else said


def effects_of(cases: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """`statistics.term_effects`; no verdict where one of the trainings that a mean is of has not converged."""
    effects = term_effects(cases)
    done = convergence(history)["converged"].all()
    return effects if done else effects.assign(verdict=NOT_CONVERGED)


def effects_sentence(effects: pd.DataFrame) -> str:
    """Which term, at which scale, does the work.

    Args:
        effects: of `effects_of`.
    """
    return f"On average over all subsets of the other terms, Dice with a term minus without it: {_each_worth(effects)}."


def _each_worth(rows: pd.DataFrame) -> str:
    rows = rows.sort_values("difference", ascending=False)
    return listed([f"{row['label_a']} {_worth(row)}" for _, row in rows.iterrows()])


def _worth(row: pd.Series) -> str:
    return f"{interval_of(*row[['difference', 'low', 'high']])} Dice ({row['verdict']})"


def class_sentence(table: pd.DataFrame) -> str:
    """In which classes distillation helps and in which it hurts, whether it is the small ones, and which are not found.

    Args:
        table: of `by_class`.
    """
    if table["class"].nunique() == 1:
        return f"There is one class, {table['class'].iloc[0]}."
    said = []
    for (student, teacher), rows in table.groupby(["student", "teacher"], sort=False):
        parts = []
        for verdict in ("better", "worse"):
            names = list(rows.loc[rows["verdict"] == verdict, "class"])
            parts.append(f"{verdict} in {listed(names) if names else 'none'}")
        if rising := (rows["verdict"] == NOT_CONVERGED).sum():
            parts.append(
                f"{'in each' if rising == len(rows) else f'in {rising} of them'} without a verdict, not converged"
            )
        half = rows["volume"] < rows["volume"].median()
        means = [signed(f"{rows.loc[part, 'difference'].mean():+.3f}") for part in (half, ~half)]
        said.append(
            f"{student} distilled from {teacher} is, of {len(rows)} classes, {listed(parts)}; on average it changes by "
            f"{means[0]} Dice in the smaller half of the classes and by {means[1]} in the larger."
        )
        said += [
            f"Trainings that find the {row['class']} in no test case: {row['never']} of {student} distilled from "
            f"{teacher}, {row['never_alone']} of {student} alone."
            for _, row in rows[rows["never"] != rows["never_alone"]].iterrows()
        ]
    return " ".join(said)


def classes_markdown(table: pd.DataFrame) -> str:
    """`class_sentence` and the table of `by_class` as Markdown, for a page that shows no notebook."""
    sized = table.assign(volume=table["volume"].map("{:.1f}".format))
    return f"{class_sentence(table)}\n\n{verdicts_markdown(sized, CLASS_COLUMNS)}"


def lead_sentence(table: pd.DataFrame) -> str:
    """What the students reach alone, what the best teacher does, and how often distillation changes the former.

    Args:
        table: of `answer`.
    """
    count, said = len(table), counted_verdicts(table["verdict"])
    who = f"{count} distilled students, each" if count > 1 else "1 distilled student"
    text = f"Of {who} compared with itself alone: {said}."
    if table["dice_teacher"].isna().all():
        return text
    best = table.loc[table["dice_teacher"].idxmax()]
    alone = table.groupby("student")["dice_alone"].first()
    reached = " to ".join(dict.fromkeys(f"{dice:.3f}" for dice in (alone.min(), alone.max())))
    who = "the students reach" if len(alone) > 1 else f"{alone.index[0]} reaches"
    teacher = f"the best teacher, {best['teacher']}, {best['dice_teacher']:.3f} from all of them"
    return f"Alone, on {best['labels']} of the labels, {who} {reached} Dice; {teacher}. {text}"


def answer_sentences(table: pd.DataFrame) -> list[str]:
    """One honest sentence per student: its Dice alone and distilled from each teacher, and what that means.

    Args:
        table: of `answer`.
    """
    said = []
    for student, rows in table.groupby("student", sort=False):
        parts = [
            f"{row.dice_distilled:.3f} distilled from {row.teacher} ({row.change}, {row.verdict}; {row.gain} gain)"
            for row in rows.itertuples()
        ]
        first = rows.iloc[0]
        known = f"**{student}** ({first['parameters']:,} parameters, {first['labels']} of the labels)"
        said.append(f"{known}: Dice {first['dice_alone']:.3f} alone, {listed(parts)}.")
    return said


def terms_sentence(table: pd.DataFrame) -> str:
    """What the numbers of `answer_sentences` are of, and what their verdicts mean."""
    fewest, most = (int(table["seeds"].agg(end)) for end in ("min", "max"))
    of = f"{many(int(table['n'].max()), 'test patient')}, {f'{fewest} to ' * (fewest < most)}{many(most, 'seed')}"
    text = (
        f"Mean Dice of {of}; changes are paired by patient, with 95 % "
        f"intervals{' of patients: one seed does not show how much trainings differ' * (fewest == 1)}. "
        f'"Equivalent": neither better nor worse, and less than {SAME["dice"]:g} Dice either way.'
    )
    if (table["verdict"] == "inconclusive").any():
        text += ' "Inconclusive": so many patients do not decide it, by a test adjusted over all comparisons.'
    return text


def shown(table: pd.DataFrame) -> show.Shown:
    """The answer in words, as a page has it."""
    said = show.say(f"**{lead_sentence(table)}**") + show.bullets(answer_sentences(table))
    return said + show.say(terms_sentence(table))


def answer_markdown(table: pd.DataFrame, picture: str = "") -> str:
    """The lead, the picture (if any) and the main table as Markdown, for a page that shows no notebook."""
    lines = [f"**{lead_sentence(table)}**", "", terms_sentence(table), ""]
    lines += [f"![What distillation changes]({picture})", ""] if picture else []
    sizes = table["parameters"].map("{:,} parameters".format)
    table = table.assign(student=table["student"] + " (" + sizes + ")")
    return "\n".join([*lines, verdicts_markdown(table, ANSWER_COLUMNS)])


def verdicts_markdown(table: pd.DataFrame, columns: Sequence[str]) -> str:
    """These columns of a table of comparisons as Markdown, its verdicts bold."""
    return markdown(table.assign(verdict="**" + table["verdict"] + "**")[list(columns)])


def fractions(cases: pd.DataFrame, verdicts: pd.DataFrame, masters: Sequence[pd.DataFrame] = ()) -> pd.DataFrame:
    """What a teacher is worth to each student, and how much of the gap to the teacher that closes.

    Args:
        cases: tidy, with students alone and taught on several label fractions or for several lengths, and their
            teacher.
        verdicts: from `statistics.compare`, of the taught students with the same student alone on the same labels.
        masters: further tables, to look for the teacher in.

    Returns: one row per comparison, the verdict first: student, labels (share), length, times (the same as text),
        learns (`knowledge`), dice_alone, dice, change (text with interval), gain (patients), gap (from the student
        alone to its teacher, or to the only one that there is; NaN without one), gap_closed (share of it; NaN where it
        is less than 0.01 Dice) and closed (the same as text), teacher, dice_teacher, n, volumes, seeds, difference,
        low, high, interval, p_holm, smallest_p, a and b.
    """
    found, rows = methods(cases), []
    teachers = [_teachers(table) for table in (cases, *masters)]
    for row in verdicts.itertuples():
        method = found.loc[row.a]
        values = by_patient(cases, [row.a, row.b])
        means, change = values.mean(), (values[row.a] - values[row.b]).round(12)  # equal but for rounding is no gain
        name, reached = _teacher(method, values.index, teachers)
        gap = reached - means[row.b]
        seeds = cases.loc[cases["method"] == row.a, "seed"].nunique()  # its teacher may have others
        closed = row.difference / gap if gap > SAME["dice"] else np.nan
        length = method["length"]
        rows.append(dict(
            verdict=row.verdict, student=method["model"], labels=percent(method["fraction"]), length=length,
            times=f"{length:g} x", learns=knowledge(method)[1], dice_alone=means[row.b], dice=means[row.a],
            change=interval_of(row.difference, row.low, row.high), gain=f"{(change > 0).sum()} of {len(change)}",
            gap=gap, gap_closed=closed,
            closed="" if np.isnan(closed) else signed(percent(round(closed, 2))), teacher=name, dice_teacher=reached,
            n=row.n, volumes=row.volumes, seeds=seeds, difference=row.difference, low=row.low,
            high=row.high, interval=row.interval, p_holm=row.p_holm, smallest_p=row.smallest_p, a=row.a, b=row.b,
        ))  # fmt: skip
    return pd.DataFrame(rows)


def _teachers(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table's teachers, with their dimensions."""
    rows = table[table["role"] == "teacher"]
    return rows.assign(dimensions=rows["method"].map(methods(rows)["dimensions"]))


def _teacher(student: pd.Series, patients: pd.Index, tables: Sequence[pd.DataFrame]) -> tuple[str, float]:
    """The name of a student's teacher (a row of `methods`) and its mean Dice over these patients, by the first table
    of `_teachers` that has it of all of them, else NaN. Of a student that has no teacher but itself, the only
    teacher of the first table; "" and NaN where that has none or several. Teachers of other dimensions are no teachers
    of it."""
    name = student["teacher"]
    teachers = [table[table["dimensions"] == student["dimensions"]] for table in tables]
    known = {model for table in teachers for model in table["model"]}
    if name not in known | {"", "self", student["model"]}:
        return name, np.nan
    if name not in known:
        models = set(teachers[0]["model"])
        (name,) = models if len(models) == 1 else ("",)
    for table in teachers:
        own = table[table["model"] == name]
        if set(patients) <= set(own["patient"]):
            (method,) = own["method"].unique()
            return name, by_patient(own, [method]).loc[patients, method].mean()
    return name, np.nan


def fraction_sentences(table: pd.DataFrame) -> list[str]:
    """One sentence per label fraction and student: what it gains most by of what has converged, and how much of the gap
    that closes.

    Args:
        table: of `fractions`.
    """
    said = []
    for (labels, student), rows in table.groupby(["labels", "student"], sort=False):
        known = rows[rows["verdict"] != NOT_CONVERGED]
        if known.empty:
            said.append(f"With {labels} of the labels no training of a taught {student} has converged.")
            continue
        best = known.loc[known["difference"].idxmax()]
        closed = f", {best['closed']} of the gap" if best["gap_closed"] > 0 else ""
        of_teacher = f", {best['teacher']} {best['dice_teacher']:.3f}" * pd.notna(best["dice_teacher"])
        reached = f"{student} (alone {best['dice_alone']:.3f}{of_teacher})"
        most = "gains most by" if best["difference"] > 0 else "gains by nothing, and loses least by"
        said.append(
            f"With {labels} of the labels {reached} {most} {best['learns']}: {best['change']} Dice, "
            f"{best['verdict']}{closed}."
        )
    return said


def length_sentences(table: pd.DataFrame) -> list[str]:
    """Does a teacher raise the plateau or only the speed? One sentence for each student and way of learning.

    Args:
        table: of `fractions`, of one label fraction. The longest training shows the plateau; speed is the length from
            which on the best Dice of the student alone is reached but for 0.01.
    """
    said = []
    for (student, learns), rows in table.sort_values("length").groupby(["student", "learns"], sort=False):
        longest = rows.iloc[-1]
        plateau = _plateau(rows)
        alone, taught = (rows.loc[rows[name].idxmax()] for name in ("dice_alone", "dice"))
        enough = alone["dice_alone"] - SAME["dice"]
        first, first_taught = (  # the lengths from which on all longer ones reach it
            rows.loc[(rows[name] >= enough)[::-1].cummin()[::-1], "times"] for name in ("dice_alone", "dice")
        )
        held = "which longer ones lose" if first.empty else f"within {SAME['dice']:g} from {first.iloc[0]} on"
        there = "at no length" if first_taught.empty else f"from {first_taught.iloc[0]} on"
        said.append(
            f"{student} taught by {learns}: {longest['change']} Dice at {longest['times']} the usual steps "
            f"({longest['verdict']}), {plateau}. Alone its best Dice is {alone['dice_alone']:.3f} "
            f"({alone['times']}), {held}; so taught it is there {there}, and "
            f"at best {taught['dice']:.3f} ({taught['times']})."
        )
    return said


def _plateau(rows: pd.DataFrame) -> str:
    """What the longest of some trainings says of the plateau: nothing where it still gained over the second longest."""
    if len(rows) == 1:
        return "one length shows no plateau"
    before, longest = rows.iloc[-2], rows.iloc[-1]
    alone, taught = (longest[name] - before[name] for name in ("dice_alone", "dice"))
    if longest["verdict"] == NOT_CONVERGED or max(alone, taught) <= SAME["dice"]:
        return PLATEAUS[longest["verdict"]]
    gained = signed(f"{alone:+.3f} alone and {taught:+.3f} taught")
    return f"not shown to be a plateau: {before['times']} to {longest['times']} still changed it by {gained}"


def lengths_markdown(table: pd.DataFrame) -> str:
    """`length_sentences` and the table of `fractions` as Markdown, for a page that shows no notebook."""
    said = "\n".join(f"- {sentence}" for sentence in length_sentences(table))
    return "\n\n".join([said, terms_sentence(table), verdicts_markdown(table, LENGTH_COLUMNS)])


def fractions_markdown(table: pd.DataFrame, images: pd.DataFrame | None = None) -> str:
    """The sentences and the table of `fractions` as Markdown, for a page that shows no notebook.

    Args:
        images: from `statistics.compare` of `statistics.image_pairs`, where images were unlabelled.
    """
    said = [f"**{' '.join(fraction_sentences(table))}**", terms_sentence(table)]
    if images is not None:
        compared = [f"- {sentence}" for sentence in comparison_sentences(images, table.set_index("a")["seeds"])]
        said += ["Is it the teacher, or the unlabelled images?", "\n".join(compared)]
    return "\n\n".join([*said, verdicts_markdown(table, FRACTION_COLUMNS)])


def correction_markdown(changes: pd.DataFrame, gains: pd.DataFrame, by_volume: pd.DataFrame) -> str:
    """What each step of the cumulative correction is worth, or each fault put back alone, as Markdown.

    Args:
        changes: from `statistics.step_changes`.
        gains: from `statistics.gains`, with the zero-weight control among its references.
        by_volume: the same, with the Dice of volumes at every stage.
    """

    def judged(row: tuple) -> str:
        return f"{interval_of(row.difference, row.low, row.high)}, {row.verdict}"

    single = is_single(list(changes["step"]))
    table = pd.DataFrame({
        "fault put back" if single else "step": changes["step"], "Dice of the distilled student": changes["dice"],
        f"change by this {'fault' if single else 'step'} [95 % interval]":
        ["", *map(judged, changes[1:].itertuples())],  # the first is no change
    })  # fmt: skip
    for where, of in {"": gains, ", by Dice of volumes": by_volume}.items():
        worth = {row.stage: judged(row) for row in of.itertuples() if row.label_b == CONTROLS["zero_weights"]}
        table[f"gain over the zero-weight control here{where}"] = [worth.get(step, "") for step in changes["step"]]
    note = (
        "A change counts as better or worse where its interval excludes 0 and a paired permutation test, adjusted over "
        "all comparisons, gives p below 0.05."
    )
    said = f"**{gains_sentence(gains)}**\n\n{correction_sentence(changes)} {note}"
    return f"{said}\n\n{markdown(table)}"


def markdown(table: pd.DataFrame) -> str:
    """A table of text and numbers with three digits, under readers' headings."""
    cells = table.map(
        lambda value: "" if pd.isna(value) else f"{value:.3f}" if isinstance(value, float) else str(value)
    )
    return f"{markdown_table(cells.rename(columns=HEADINGS))}\n"
