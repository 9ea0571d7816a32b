"""The report of a study, from its tables and figures alone: the answer first, what it was made of last and folded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from kdlib.analysis import answer, show
from kdlib.analysis.capacity import worth_sentences
from kdlib.analysis.sentences import (
    comparison_sentences,
    convergence_sentence,
    gains_sentence,
    gap_sentence,
    verdict_sentence,
)
from kdlib.files import read_csv, write_text

COMPARED = {  # table of comparisons -> (question, its figure)
    "02_comparisons": ("Does distillation help?", "02_comparisons"),
    "02b_controls": ("Is it the teacher's knowledge? The thesis's recipe against its controls", "02b_controls"),
    "03_comparisons": ("Which term does the work? Subsets of the terms", "03_ablation"),
    "04_comparisons": ("Which distillation loss?", "04_loss_comparison"),
    "07_comparisons": ("With how few labels? With a teacher against alone", "07_fractions"),
    "08_comparisons": ("A higher plateau, or only a faster one?", "08_length"),
    "10_comparisons": ("What are network, labels and teacher worth?", "10_capacity"),
    "11_comparisons": ("Slices or volumes?", "11_dimensions"),
}
FIRST = "02_overview"


def _table(folder: Path, name: str) -> pd.DataFrame | None:
    path = folder / "tables" / f"{name}.csv"
    return read_csv(path) if path.is_file() else None


def _picture(folder: Path, name: str) -> list[show.Shown]:
    path = folder / "figures" / f"{name}.png"
    if not path.is_file():
        return []
    caption = path.with_suffix(".txt").read_text(encoding="utf-8")
    return [show.picture(path.read_bytes(), caption, caption.partition(". ")[0])]


def _rows(folder: Path, prefix: str = "") -> pd.DataFrame:
    """A study's tables of runs, packed or not; of one chapter, where its prefix is given ("02b_")."""
    paths = sorted(folder.glob(f"tables/{prefix}*_runs.csv*"))
    return pd.concat(map(read_csv, paths)) if paths else pd.DataFrame(columns=["run", "method", "seed"])


def runs_of(folder: Path) -> pd.DataFrame:
    """One row per run of a study's tables; one that stands for two methods (zero weights and none) under the first."""
    return _rows(folder).drop_duplicates("run")


def opening(folder: Path) -> show.Shown:
    """The answer: a sentence per student, the picture, the main table; and whether the trainings had converged.

    Writes the sentences and the table as `answer.md`, for pages that show no notebook.
    """
    main, parts = _table(folder, "02_answer"), []
    if main is not None:
        drawn = [png for name in (FIRST, "02_classes") if (folder / (png := f"figures/{name}.png")).is_file()]
        write_text(folder / "answer.md", answer.answer_markdown(main, *drawn[:1]))
        parts += [answer.shown(main), *_picture(folder, FIRST)]
        parts.append(show.view(main, columns=answer.ANSWER_COLUMNS))
    elif (means := _table(folder, "01_baseline")) is not None:
        parts += [show.say("No student has been distilled in this study yet.", gap_sentence(means)), show.view(means)]
    paths = sorted(folder.glob("tables/*_convergence.csv"))
    if paths:
        progress = pd.concat(map(read_csv, paths))
        if "stage" in progress:  # of the correction
            staged = progress["stage"].notna()
            progress["label"] = progress["label"].where(~staged, progress["stage"] + ", " + progress["label"])
        each = [name for name in ("stage", "method") if name in progress]
        parts.append(show.say(convergence_sentence(progress.drop_duplicates(each))))
    return sum(parts, show.say() if parts else show.say("Nothing was trained in this study."))


def findings(folder: Path) -> show.Shown:
    """What each chapter found: a question, its answer, its figure, and every comparison to open.

    Writes what losses and their terms are worth as `losses.md`, the label fractions as `labels.md`, the lengths as
    `length.md`, several classes as `classes.md`, and what the cumulative correction found as `worth.md`.
    """
    parts, losses = [], []
    for name, (question, figure) in COMPARED.items():
        found = _table(folder, name)
        if found is not None:
            runs = _rows(folder, name.partition("_")[0] + "_")
            lines = comparison_sentences(found, runs.groupby("method")["seed"].nunique())
            about = _sentences(folder, name, found)
            if name in ("03_comparisons", "04_comparisons"):
                losses += about
            parts += [show.heading(question), show.say(*about, verdict_sentence(found)), *_picture(folder, figure)]
            parts.append(show.folded(f"each of the {len(lines)} comparisons", show.bullets(lines)))
    if losses:
        write_text(folder / "losses.md", "".join(f"- {sentence}\n" for sentence in losses))
    classes = _table(folder, "02_classes")
    if classes is not None and classes["class"].nunique() > 1:
        write_text(folder / "classes.md", answer.classes_markdown(classes))
        parts += [show.heading("In which classes?"), show.say(answer.class_sentence(classes))]
        parts += _picture(folder, "02_classes")
        parts.append(show.folded("each class", show.view(classes, columns=answer.CLASS_COLUMNS)))
    changes = _table(folder, "05_correction")
    if changes is not None:
        gains = read_csv(folder / "tables" / "05_gains.csv")
        by_volume = read_csv(folder / "tables" / "05_gains_by_volume.csv")
        write_text(folder / "worth.md", answer.correction_markdown(changes, gains, by_volume))
        parts += [show.heading("From the published to the corrected protocol"), show.say(gains_sentence(gains))]
        parts += _picture(folder, "05_correction")
    return sum(parts, show.say())


def _sentences(folder: Path, name: str, found: pd.DataFrame) -> list[str]:
    """What a chapter says of its comparisons first, by a table of its own; fractions and lengths also as pages."""
    if name == "03_comparisons" and (effects := _table(folder, "03_terms")) is not None:
        return [answer.effects_sentence(effects)]
    if name == "04_comparisons" and (ranked := _table(folder, "04_loss_comparison")) is not None:
        return answer.loss_sentences(ranked, found)
    if name == "07_comparisons" and (shares := _table(folder, "07_answer")) is not None:
        write_text(folder / "labels.md", answer.fractions_markdown(shares, _table(folder, "07_images")))
        return answer.fraction_sentences(shares)
    if name == "08_comparisons" and (lengths := _table(folder, "08_answer")) is not None:
        write_text(folder / "length.md", answer.lengths_markdown(lengths))
        return answer.length_sentences(lengths)
    if name in ("10_comparisons", "11_comparisons"):
        return worth_sentences(found)
    return []


def provenance(records: Sequence[Mapping], wanted: int, cards: str) -> show.Shown:
    """What a study was made of, folded.

    Args:
        records: manifests of its runs.
        wanted: number of runs in its tables.
        cards: what became of the protocol and the model cards.
    """
    told = _facts(records, wanted) if wanted else {}
    lines = [f"**{name}**: {text}" for name, text in told.items()]
    return show.folded("data, code, versions, time, protocol and model cards", show.bullets([*lines, cards]))


def _facts(manifests: Iterable[Mapping], wanted: int) -> dict[str, str]:
    """What a study was made of, from the manifests of its runs, some of which may not be kept here."""
    records = [record for record in manifests if record.get("status") == "done"]
    if not records:
        return {"runs": f"{wanted}, without any manifest here"}
    hours = sum(sum(record["seconds"].values()) for record in records) / 3600
    dates = sorted(record["finished"] for record in records)
    parts = {part: {case for record in records for case in record["data"][part]} for part in ("train", "val", "test")}
    profiles = [record["run"]["profile"] for record in records]
    seeds = sorted({record["run"]["seed"] for record in records})
    return {
        "data set": _distinct(f"{record['run']['data']}, target {record['run']['target']}" for record in records),
        "volumes": ", ".join(f"{len(cases)} {part}" for part, cases in parts.items()),
        "profile": _distinct(f"{p['name']}; against the thesis: {p['reduced_from_thesis']}" for p in profiles),
        "protocol": _distinct(record["run"]["protocol"]["name"] for record in records),
        "folds": _distinct(str(record["run"]["fold"]) for record in records),
        "runs": f"{len(records)} of {wanted}, seeds {', '.join(map(str, seeds))}",
        "time": f"{hours:.1f} hours of training and evaluation, {dates[0][:16]} to {dates[-1][:16]}",
        "code": _distinct(map(_code, records)),
        "versions": _distinct(
            ", ".join(f"{name} {text}" for name, text in record["versions"].items()) for record in records
        ),
        "device": _distinct(f"{record['device']}, {record['precision']}" for record in records),
    }


def _code(record: Mapping) -> str:
    commit = record["git"]["commit"]
    if commit is None:
        return f"not a git checkout; files of the package: hash {record['code']['hash'][:12]}"
    return f"commit {commit[:12]}{' with changes' if record['git']['dirty'] else ''}"


def _distinct(values: Iterable[str]) -> str:
    """Values in order of appearance; how often each occurs where there are several."""
    counts = pd.Series(list(values)).value_counts(sort=False)
    return counts.index[0] if len(counts) == 1 else "; ".join(f"{text} ({n} runs)" for text, n in counts.items())
