"""What follows from a table, in sentences: generated, so that no sentence says what its table does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kdlib.analysis.convergence import TOLERATED_GAIN
from kdlib.config import TEACHERS
from kdlib.protocol import has_steps, is_single

NOT_CONVERGED = "not converged"
VERDICTS = {
    "better": "does better than", "worse": "does worse than", "equivalent": "is equivalent to",
    "inconclusive": "differs inconclusively from", NOT_CONVERGED: "cannot be compared yet with",
}  # fmt: skip


def withhold(verdicts: pd.DataFrame, convergence: pd.DataFrame) -> pd.DataFrame:
    """The verdicts, with "not converged" wherever one of the two methods has not: nothing is compared before it has.

    Args:
        verdicts: from `statistics.compare`, with columns a, b and verdict.
        convergence: from `kdlib.analysis.convergence.convergence`.
    """
    rising = set(convergence.loc[~convergence["converged"], "method"])
    unfinished = verdicts["a"].isin(rising) | verdicts["b"].isin(rising)
    return verdicts.assign(verdict=verdicts["verdict"].mask(unfinished, NOT_CONVERGED))


def many(number: int, word: str) -> str:
    """How many there are of something that takes a plain s in the plural, e.g. "1 patient" or "3 patients"."""
    return f"{number} {word if number == 1 else f'{word}s'}"


def signed(text: str) -> str:
    """With a minus that is one."""
    return text.replace("-", "\N{MINUS SIGN}")


def interval_of(value: float, low: float, high: float, sign: str = "+") -> str:
    """A value with its interval as text, e.g. "+0.012 [-0.003, +0.027]"; no interval where there is none."""
    text = f"{value:{sign}.3f}"
    return signed(text if np.isnan(low) else f"{text} [{low:{sign}.3f}, {high:{sign}.3f}]")


def comparison_sentences(verdicts: pd.DataFrame, seeds: Mapping[str, int]) -> list[str]:
    """One sentence per comparison: methods, effect with its interval, patients, seeds, adjusted p and verdict.

    Args:
        verdicts: columns a, b, label_a, label_b, n, difference, low, high, p_holm and verdict.
        seeds: method -> trainings per fold that its mean is over.
    """
    sentences = []
    for row in verdicts.itertuples():
        effect = interval_of(row.difference, row.low, row.high)
        ours, theirs = int(seeds[row.a]), int(seeds[row.b])
        against = f" against {theirs}" * (ours != theirs)
        trained = f"{many(row.n, 'patient')}, {many(ours, 'seed')}{against}"
        p = "" if pd.isna(row.p_holm) else f", p {row.p_holm:.3f}" if row.p_holm >= 0.001 else ", p < 0.001"
        sentences.append(f"{row.label_a} {VERDICTS[row.verdict]} {row.label_b}: Dice {effect} ({trained}{p}).")
    return sentences


def counted_verdicts(verdicts: pd.Series) -> str:
    """How many comparisons have each verdict, e.g. "1 better, 2 worse and 20 equivalent"."""
    counts = verdicts.value_counts()
    return listed([f"{counts[word]} {word}" for word in VERDICTS if word in counts])


def verdict_sentence(verdicts: pd.DataFrame) -> str:
    """What a table of comparisons decides: how many are better, worse or open, and what it could have shown.

    Args:
        verdicts: from `statistics.compare`.
    """
    count = len(verdicts)
    parts = []
    for word in VERDICTS:
        rows = verdicts[verdicts["verdict"] == word]
        names = rows["label_a"] if verdicts["label_a"].nunique() > 1 else "than " + rows["label_b"]
        one = "question" not in verdicts or verdicts["question"].nunique() == 1  # else: better than what?
        named = f" ({'; '.join(names)})" if one and word in ("better", "worse") and 0 < len(rows) <= 6 else ""
        if len(rows):
            parts.append(f"{len(rows)} {word}{named}")
    text = f"Of {many(count, 'comparison')}: {', '.join(parts)}."
    if (verdicts["verdict"] == "inconclusive").any():
        least = verdicts["minimum_detectable"].median()
        unseen = "no difference, whatever its size" if np.isinf(least) else f"differences of about {least:.3f} or more"
        text += f" So many patients could have shown {unseen} (80 % power): inconclusive is not equal."
    return text


def means_sentence(means: pd.DataFrame) -> str:
    """Highest and lowest mean of a table of `statistics.summarise`, and whether their intervals overlap."""
    best, worst = means.loc[means["mean"].idxmax()], means.loc[means["mean"].idxmin()]
    parts = [f"{row['label']} {interval_of(*row[['mean', 'low', 'high']], sign='')}" for row in (best, worst)]
    text = f"The highest mean is that of {parts[0]}, the lowest that of {parts[1]}"
    if pd.isna(best["low"]) or pd.isna(worst["low"]):
        return f"{text}."
    return f"{text}; their intervals {'overlap' if worst['high'] >= best['low'] else 'do not overlap'}."


def worst_patient_sentence(patients: pd.DataFrame) -> str:
    """Which patient is hardest, and what it takes off each mean; from `statistics.by_patient_table`."""
    dice = patients.drop(columns=["patient", "mean", "volume", "thickness", "intensity"], errors="ignore")
    worst, costs = patients.iloc[0], dice.iloc[1:].mean() - dice.mean()
    text = (
        f"The hardest patient is {worst['patient']} ({worst['volume']:,.1f} ml, slices of {worst['thickness']:g} mm): "
        f"Dice {dice.iloc[0].min():.3f} to {dice.iloc[0].max():.3f}, by network"
    )
    if len(patients) == 1:
        return f"{text}."
    change = signed(f"{costs.min():+.3f} to {costs.max():+.3f}")
    return f"{text}; without it the means of the networks would change by {change}."


def non_inferiority_sentence(table: pd.DataFrame) -> str:
    """Which students are not worse than their teachers by the margin of `statistics.non_inferiority`, which are, and
    which have not converged."""
    margin, said = f"{table['margin'].iloc[0]:g} Dice", []
    texts = {
        "non-inferior": f"Not worse than the teacher by {margin}", "inferior": f"Worse than it by more than {margin}",
        "inconclusive": "Not decided", NOT_CONVERGED: "Not converged, so no verdict",
    }  # fmt: skip
    for verdict, text in texts.items():
        if len(names := table.loc[table["verdict"] == verdict, "label_a"]):
            said.append(f"{text}: {'; '.join(names)}.")
    return " ".join(said)


def ranks_sentence(ranks: pd.DataFrame) -> str:
    """How sure the first place of a ranking (`statistics.ranks`) is."""
    first = ranks.iloc[0]
    low, high = int(first["rank_low"]), int(first["rank_high"])
    text = f"{first['label']} has the highest mean ({first['mean']:.3f}); over resampled patients its rank goes from"
    return f"{text} {low} to {high} of {len(ranks)}" + (", so the order is not settled." if high > 1 else ".")


def diagnostics_sentence(signal: pd.DataFrame) -> str:
    """Which distillation terms act, from `statistics.gradient_diagnostics`."""
    idle = signal[signal["active"] != "yes"]
    if idle.empty:
        low, high = signal["share"].min(), signal["share"].max()
        return f"Every term is active: its share of the gradient on the student is {low:.0%} to {high:.0%}."
    named = [f"{row.term} of {row.label} ({row.active})" for row in idle.itertuples()]
    return f"{len(idle)} of {many(len(signal), 'term')} pass{'es' * (len(idle) == 1)} no gradient: {listed(named)}."


def agreement_sentence(means: pd.DataFrame, student: str, distilled: str) -> str:
    """Whether a distilled student agrees more with its teacher than the student alone does.

    Args:
        means: mean agreement ("agreement", a Dice) by label.
        student, distilled: labels.
    """
    before, after = means.loc[[student, distilled], "agreement"]
    word = "more" if after > before + 0.0005 else "less" if after < before - 0.0005 else "as much"
    than = "than" if word != "as much" else "as"
    return (
        f"{distilled} agrees {word} with its teacher {than} {student} does (Dice of the two masks {after:.3f} and "
        f"{before:.3f}); a gain without more agreement does not come from imitating the teacher."
    )


def cost_sentence(costs: pd.DataFrame) -> str:
    """What the first student costs beside the first teacher, and which shrunk teachers are faster than a student.

    Args:
        costs: of `kdlib.models.cost`, with at least one teacher and one student.
    """
    own = costs[costs["size"] == "study"].set_index("model")
    teachers, students = ([name for name in own.index if (name in TEACHERS) == kind] for kind in (True, False))
    time, teacher, student = own["latency_ms"], teachers[0], students[0]
    part = own.loc[student, "inference_parameters"] / own.loc[teacher, "inference_parameters"]
    pace = time[student] / time[teacher]
    text = (
        f"As trained here {student} has {part:.1%} of {teacher}'s parameters and takes {pace:.0%} of its time on a CPU."
    )
    slow = time[students].idxmax()
    if cheap := [name for name in teachers if time[name] < time[slow]]:
        are = "are" if len(cheap) > 1 else "is"
        text += f" {listed(cheap)}, narrower here than in the thesis, {are} faster than {slow}."
    return text


def correction_sentence(changes: pd.DataFrame) -> str:
    """What the correction changed, or what a single fault does, from `statistics.step_changes`."""
    names, whole = list(changes["step"]), changes.iloc[-1]
    single, several = is_single(names), has_steps(names)
    text = "From the published to the corrected protocol Dice changes by "
    text += f"{interval_of(*whole[['difference', 'low', 'high']])} ({whole['verdict']})"
    if not (single or several):
        return f"{text}."
    steps = changes.iloc[1:-1] if several else changes.iloc[1:]
    decided = steps[steps["verdict"].isin(["better", "worse"])]
    most = steps.loc[steps["difference"].abs().idxmax()]
    largest = f"{interval_of(*most[['difference', 'low', 'high']])} ({most['verdict']}), by: {most['step']}"
    text += f"; the largest single change is {largest}."
    if single:
        text = f"Put back alone into the corrected protocol, the fault that changes Dice most changes it by {largest}."
    named, what = f" ({listed(decided['step'])})" if 0 < len(decided) <= 4 else "", "faults" if single else "steps"
    return f"{text} {len(decided)} of {len(steps)} {what} {'is' if len(decided) == 1 else 'are'} decided{named}."


def gains_sentence(gains: pd.DataFrame) -> str:
    """What distillation is worth in the published and in the corrected protocol, or in the latter and with that fault
    put back with which it is worth most; from `statistics.gains`."""
    stages = list(gains["stage"].unique())
    ends = {"under the published protocol": stages[0], "under the corrected protocol": stages[-1]}
    if is_single(stages):
        back = gains[gains["stage"] != stages[0]]
        most = back.loc[back["difference"].idxmax(), "stage"]
        ends = {"under the corrected protocol": stages[0], f"most with one fault put back, {most},": most}
    parts = []
    for where, stage in ends.items():
        said = [
            f"{interval_of(*row[['difference', 'low', 'high']])} against {row['label_b']} ({row['verdict']})"
            for _, row in gains[gains["stage"] == stage].iterrows()
        ]
        parts.append(f"{where} by {listed(said)}")
    n = int(gains["n"].iloc[0])
    of = f"{many(n, 'patient')}; 95 % intervals of patients and, where there are several, of seeds"
    return f"Distillation changes the student's Dice {'; '.join(parts)}. {of}."


def convergence_sentence(convergence: pd.DataFrame) -> str:
    """Which trainings have converged, in one sentence."""
    rising = convergence[convergence["last_fifth"] > TOLERATED_GAIN]
    if rising.empty:
        most = f"{convergence['last_fifth'].max():.3f} Dice"
        each = "on average over its trainings no method gained more than"
        return f"All {len(convergence)} methods have converged: {each} {most} in the last fifth."
    parts = [f"{row.label} ({row.last_fifth:+.3f})" for row in rising.itertuples()]
    one = len(rising) == 1
    text = (
        f"{len(rising)} of {many(len(convergence), 'method')} {'has' if one else 'have'} not converged, and "
        f"get{'s' * one} no verdict: the last fifth of the training still gained more than {TOLERATED_GAIN:g} Dice for "
        f"{', '.join(parts)}."
    )
    taught = convergence.loc[~convergence["converged"] & (convergence["last_fifth"] <= TOLERATED_GAIN), "label"]
    return f"{text} Nor does what such a teacher taught: {listed(taught)}." if len(taught) else text


def sweep_sentence(trials: pd.DataFrame) -> str:
    """Which trial of the student alone and of the distilled one is best on the validation patients, and what the choice
    is worth.

    Args:
        trials: trial (its settings), teacher ("" alone) and dice_100, the validation Dice.
    """
    parts = []
    for taught, rows in trials.groupby(trials["teacher"].ne(""), sort=True):
        best, worst = rows.loc[rows["dice_100"].idxmax()], rows["dice_100"].min()
        who = "the distilled student" if taught else "the student alone"
        dice = f"validation Dice {best['dice_100']:.3f} (the worst {worst:.3f})"
        parts.append(f"{who}, {len(rows)} trials: {best['trial']}, {dice}")
    return f"Best of {'; of '.join(parts)}."


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last


def gap_sentence(means: pd.DataFrame) -> str:
    """How far the students on half of the labels stay behind the best teacher, from `statistics.summarise`."""
    teachers = means[means["role"] == "teacher"]
    half = means[(means["role"] == "baseline") & (means["fraction"] == 0.5)]
    if teachers.empty or half.empty:
        return means_sentence(means)
    best = teachers.loc[teachers["mean"].idxmax()]
    gaps = [signed(f"{row.model} {row.mean - best['mean']:+.3f}") for row in half.itertuples()]
    who = "The better teacher" if len(teachers) > 1 else "The teacher"
    return (
        f"{who}, {best['label']}, reaches a Dice of {best['mean']:.3f}; alone, on half of the labels, the students "
        f"differ from it by: {listed(gaps)}. That is what distillation may close."
    )


def controls_sentence(verdicts: pd.DataFrame) -> str:
    """What the negative controls say of a distilled student, from `statistics.compare` of it with each of them."""
    name = verdicts["label_a"].iloc[0]
    beaten = verdicts.loc[verdicts["verdict"] == "better", "label_b"]
    if len(beaten) == len(verdicts):
        return f"{name} does better than every one of its {len(verdicts)} controls."
    open_ = verdicts.loc[verdicts["verdict"] != "better", "label_b"]
    than = f"does better than {listed(beaten)}, but is" if len(beaten) else "is"
    return (
        f"{name} {than} not shown to do better than {listed(open_)}: what it gains, if anything, cannot be put down to "
        "the teacher's knowledge alone."
    )


def folds_sentence(parts: pd.DataFrame) -> str:
    """That folds are by patient, and how many patients (and volumes) their test parts hold, from `split_table`."""
    return (
        f"{len(parts)} folds by patient; their test parts hold {listed(parts['test'])} patients (volumes), each "
        "patient in one of them."
    )
