"""Tidy tables of finished runs: of all metrics, of the trainings, and of how far students agree with a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.config import InputError, Run
from kdlib.evaluation.agreement import agreement
from kdlib.evaluation.calibration import calibration
from kdlib.evaluation.similarity import scale_similarity
from kdlib.experiments.identity import identity
from kdlib.experiments.source import run_bank, run_source
from kdlib.experiments.store import manifest, run_folder, run_key, trained
from kdlib.files import read_arrays, read_csv, write_arrays, write_csv
from kdlib.record import verified
from kdlib.training.device import pick_device

PARTS = ("cases", "history", "runs")


@dataclass(frozen=True)
class Results:
    """Tables of a list of runs; all have the columns of `kdlib.experiments.identity`.

    Args:
        cases: tidy, one row per run, case, class and metric: with patient, case, class, metric and value.
        history: tidy, one row per run, epoch and name.
        runs: one row per run: parameters, best epoch and its validation Dice, seconds, device, data set and its credit.
        examples: one row per run and case, with the slice of most truth: image, truth and prediction (HW).
    """

    cases: pd.DataFrame
    history: pd.DataFrame
    runs: pd.DataFrame
    examples: pd.DataFrame

    def save(self, folder: Path, name: str) -> None:
        """Writes `tables/<name>_{cases,history,runs}.csv` and `slices/<name>.npz` under a study's folder."""
        for part in PARTS:
            write_csv(folder / "tables" / f"{name}_{part}.csv", getattr(self, part))
        # the stack of a text column is text: an object array would be a pickle
        columns = {column: np.stack(self.examples[column].to_list()) for column in self.examples}
        write_arrays(folder / "slices" / f"{name}.npz", columns)

    @classmethod
    def load(cls, folder: Path, name: str) -> Results:
        """Reads what `save` wrote, without the runs themselves.

        Raises: InputError: the experiment was not saved there.
        """
        try:
            tables = {part: _read(folder / "tables" / f"{name}_{part}.csv") for part in PARTS}
            examples = read_arrays(folder / "slices" / f"{name}.npz")
        except FileNotFoundError as error:
            raise InputError(f"{error.filename} does not exist: run notebook {name} of this study first") from None
        return cls(**tables, examples=examples)


def collect(runs: Sequence[Run], results: Path) -> Results:
    """The tables of finished runs, read from their folders."""
    cases, history, rows, examples = [], [], [], []
    for run in runs:
        folder = run_folder(run, results)
        record = manifest(run, results)
        label = _columns(run, results)
        cases.append(read_csv(verified(folder / "metrics.csv")).assign(**label))
        history.append(read_csv(verified(folder / "history.csv")).assign(**label))
        dataset = run_source(run, results).dataset
        rows.append(
            label | {"parameters": record["parameters"]} | record["best"]
            | {f"{name}_seconds": value for name, value in record["seconds"].items()} | {"device": record["device"]}
            | {"data": dataset.name, "credit": ", ".join(filter(None, dataset.credit))}
        )  # fmt: skip
        examples.append(read_arrays(verified(folder / "slices.npz")).rename(columns={"name": "case"}).assign(**label))
    order = [*label, "patient", "case", "class", "metric", "value"]
    cases, history, examples = (pd.concat(parts, ignore_index=True) for parts in (cases, history, examples))
    return Results(cases[order], history, pd.DataFrame(rows), examples)


def teacher_agreement(
    runs: Sequence[Run], teacher: Run, results: Path | str = "results", device: str = "auto"
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """How far finished runs agree with a teacher on the test patients, and how well they know what they know.

    What is computed is kept in the run's folder.

    Args:
        runs: whose best weights are compared.
        teacher: with whose; the teacher of the same fold for each run.

    Returns: tidy tables with the columns of `identity`: agreement by case and class, similarity of features by scale
        (CKA) and calibration by case, class and bin.
    """
    results, place = Path(results).resolve(), pick_device(device)
    tables: dict[str, list[pd.DataFrame]] = {"agreement": [], "similarity": [], "calibration": []}
    for run in dict.fromkeys(runs):
        folder, missing = run_folder(run, results), dict.fromkeys(tables)
        master = dataclasses.replace(teacher, fold=run.fold)
        files = {name: folder / f"{name}-{run_key(master, results)}.csv" for name in tables}
        if not all(path.is_file() for path in files.values()):
            found = run_source(run, results)
            test = found.folds[run.fold].test
            bank = run_bank(run, results).select(test).to(place)
            models = [trained(who, len(bank.classes), results, place) for who in (run, master)]
            missing["agreement"] = agreement(*models, bank, found.dataset, test, run.threshold)
            missing["agreement"]["patient"] = missing["agreement"]["case"].map(found.folds[run.fold].groups)
            missing["similarity"] = scale_similarity(*models, bank)
            missing["calibration"] = calibration(models[0], bank)
            for name, path in files.items():
                write_csv(path, missing[name])
        for name, path in files.items():
            tables[name].append(read_csv(path).assign(**_columns(run, results)))
    return tuple(pd.concat(parts, ignore_index=True) for parts in tables.values())


def _read(path: Path) -> pd.DataFrame:
    table = read_csv(path)
    texts = [
        name for name in ("teacher", "terms", "loss", "loss_label", "family", "control", "credit") if name in table
    ]
    return table.assign(**{name: table[name].astype(object).fillna("") for name in texts})


def _columns(run: Run, results: Path) -> dict[str, object]:
    return {"run": run_key(run, results)} | identity(run)
