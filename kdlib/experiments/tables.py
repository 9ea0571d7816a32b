"""Tidy tables of finished runs: of all metrics, of the trainings, and of how far students agree with a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.config import InputError, Run
from kdlib.evaluation.agreement import agreement
from kdlib.evaluation.calibration import calibration
from kdlib.evaluation.similarity import scale_similarity
from kdlib.experiments.identity import identity
from kdlib.experiments.setting import Setting
from kdlib.experiments.source import run_bank, run_source
from kdlib.experiments.store import is_done, manifest, run_folder, run_key, trained
from kdlib.files import packed_or_not, read_arrays, read_csv, write_arrays, write_csv
from kdlib.models import cost_of
from kdlib.record import verified
from kdlib.training.device import pick_device, precision

PARTS = ("cases", "history", "runs")
NO_EXAMPLES = pd.DataFrame(columns=["method", "case", "seed", "image", "truth", "prediction"])


@dataclass(frozen=True)
class Results:
    """Tables of a list of runs; all have the columns of `kdlib.experiments.identity`.

    Args:
        cases: tidy, one row per run, case, class and metric: with patient, case, class, metric and value.
        history: tidy, one row per run, epoch and name; also of teachers that are not among the runs, since a student
            has converged only if they have.
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
        # the array of a list of text is text: an object array would be a pickle
        columns = {column: np.array(self.examples[column].to_list()) for column in self.examples}
        write_arrays(folder / "slices" / f"{name}.npz", columns)

    @classmethod
    def load(cls, folder: Path, name: str) -> Results:
        """Reads what `save` wrote, without the runs themselves; its tables may be packed, and its slices gone.

        Raises: InputError: the experiment was not saved there.
        """
        files = {part: folder / "tables" / f"{name}_{part}.csv" for part in PARTS}
        for path in files.values():
            if not packed_or_not(path):
                raise InputError(f"{path} does not exist: run notebook {name} of this study first")
        tables, slices = {part: _read(path) for part, path in files.items()}, folder / "slices" / f"{name}.npz"
        return cls(**tables, examples=read_arrays(slices) if slices.is_file() else NO_EXAMPLES)


def saved_runs(folders: Sequence[Path]) -> dict[str, dict[str, pd.DataFrame]]:
    """Key -> part -> rows of every run in the tables that studies saved, by the first chapter that saved it.

    Of a teacher that no chapter lists there is the history alone.

    Raises: InputError: a folder without such tables.
    """
    found: dict[str, dict[str, pd.DataFrame]] = {}
    histories: dict[str, dict[str, pd.DataFrame]] = {}
    for folder in folders:
        names = sorted({path.name.partition("_runs.csv")[0] for path in folder.glob("tables/*_runs.csv*")})
        files = [[folder / "tables" / f"{name}_{part}.csv" for part in PARTS] for name in names]
        chapters = [paths for paths in files if all(map(packed_or_not, paths))]
        if not chapters:
            raise InputError(f"{folder} holds no saved runs (tables/*_runs.csv): reuse names studies that were run")
        for paths in chapters:
            tables = dict(zip(PARTS, map(_read, paths), strict=True))
            # several methods may be one run, e.g. a student alone and its control with zero weights
            once = tables["runs"].drop_duplicates("run")[["run", "method", "protocol"]]
            rows = {part: dict(tuple(table.merge(once).groupby("run"))) for part, table in tables.items()}
            for key in rows["runs"].keys() - found.keys():
                found[key] = {part: rows[part][key] for part in PARTS}
            others = tables["history"].loc[~tables["history"]["run"].isin(once["run"])]
            others = others.drop_duplicates(["run", "epoch", "name"])  # of several protocols
            histories |= {key: {"history": part} for key, part in others.groupby("run")}
    return histories | found


def masters(runs: Sequence[Run]) -> list[Run]:
    """The teachers of runs that are not among them; not those that are students, of which each study has its own."""
    found = dict.fromkeys(teacher for run in runs for teacher in run.teacher_runs().values() if teacher.is_teacher)
    return [teacher for teacher in found if teacher not in runs]


def collect(runs: Sequence[Run], results: Path, saved: Mapping[Run, Mapping[str, pd.DataFrame]]) -> Results:
    """The tables of finished runs, read from their folders, or as `saved_runs` found them (without examples).

    Args:
        saved: what is read from tables: of runs, and of their teachers.
    """
    parts: dict[str, list[pd.DataFrame]] = {part: [] for part in (*PARTS, "examples")}
    for run in runs:
        folder, label = run_folder(run, results), _columns(run, results)
        if run in saved:
            for part, rows in saved[run].items():
                parts[part].append(rows.assign(**label))
            continue
        record, dataset = manifest(run, results), run_source(run, results).dataset
        parts["cases"].append(read_csv(verified(folder / "metrics.csv")).assign(**label))
        parts["history"].append(read_csv(verified(folder / "history.csv")).assign(**label))
        row = (
            label | {"parameters": record["parameters"]} | record["best"]
            | {f"{name}_seconds": value for name, value in record["seconds"].items()} | {"device": record["device"]}
            | {"data": dataset.name, "credit": ", ".join(filter(None, dataset.credit))}
        )  # fmt: skip
        parts["runs"].append(pd.DataFrame([row]))
        slices = read_arrays(verified(folder / "slices.npz")).rename(columns={"name": "case"})
        parts["examples"].append(slices.assign(**label))
    for teacher in masters(runs):
        if teacher in saved:
            rows = saved[teacher]["history"]
        elif is_done(teacher, results):
            rows = read_csv(verified(run_folder(teacher, results) / "history.csv"))
        else:  # its student was read from a table that lacks it
            continue
        parts["history"].append(rows.assign(**_columns(teacher, results)))
    if len({run.preprocessing.dimensions for run in runs}) > 1 or not parts["examples"]:
        parts["examples"] = [NO_EXAMPLES]  # slices and patches differ in size: no array holds both
    found = {part: pd.concat(tables, ignore_index=True) for part, tables in parts.items()}
    order = [*identity(runs[0]), "patient", "case", "class", "metric", "value"]
    return Results(**found | {"cases": found["cases"][["run", *order]]})


def volume_costs(setting: Setting, models: Sequence[str]) -> pd.DataFrame:
    """What networks cost for one volume of a study: for all slices of it, or for all windows.

    Args:
        models: names in `kdlib.models.MODELS`.

    Returns: a table with columns model, dimensions, items (slices or windows of a volume, on average), parameters
        (without the reconstruction decoder), volume_gflops and volume_ms (see `kdlib.models.cost`).
    """
    profile, bank = setting.sized, run_bank(setting.run("S1"), setting.results)
    cut, items = profile.preprocessing, len(bank) / len(bank.cases)
    rows = []
    for model in models:
        each = cost_of(model, profile.width, cut.size, len(bank.classes), cut.dimensions)
        rows.append(dict(
            model=model, dimensions=cut.dimensions, items=items, parameters=each["inference_parameters"],
            volume_gflops=each["gflops"] * items, volume_ms=each["latency_ms"] * items,
        ))  # fmt: skip
    return pd.DataFrame(rows)


def teacher_agreement(
    runs: Sequence[Run], teacher: Run, results: Path | str = "results", device: str = "auto", reuse: Sequence[Path] = ()
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """How far finished runs agree with a teacher on the test patients, and how well they know what they know.

    What is computed is kept in the run's folder.

    Args:
        runs: whose best weights are compared.
        teacher: with whose; the teacher of the same fold for each run.
        reuse: folders of studies; what their tables of chapter 2b hold of a run that was not trained here is read.

    Returns: tidy tables with the columns of `identity`: agreement by case and class, similarity of features by scale
        (CKA) and calibration by case, class and bin.
    """
    results, place = Path(results).resolve(), pick_device(device)
    tables: dict[str, list[pd.DataFrame]] = {"agreement": [], "similarity": [], "calibration": []}
    saved = {name: _rows_by_run(reuse, f"02b_{name}") for name in tables}
    for run in dict.fromkeys(runs):
        key = run_key(run, results)
        if not is_done(run, results) and all(key in rows for rows in saved.values()):
            for name, rows in saved.items():
                tables[name].append(rows[key].assign(**_columns(run, results)))
            continue
        master = dataclasses.replace(teacher, fold=run.fold)
        files = {name: run_folder(run, results) / f"{name}-{run_key(master, results)}.csv" for name in tables}
        if not all(path.is_file() for path in files.values()):
            found = run_source(run, results)
            fold = found.folds[run.fold]
            bank = run_bank(run, results).select(fold.test).to(place)
            models = [trained(who, len(bank.classes), results, place) for who in (run, master)]
            with precision(run.optimisation.precision):
                agreed = agreement(*models, bank, found.dataset, fold.test, run.threshold)
                write_csv(files["agreement"], agreed.assign(patient=agreed["case"].map(fold.groups)))
                write_csv(files["similarity"], scale_similarity(*models, bank))
                write_csv(files["calibration"], calibration(models[0], bank))
        for name, path in files.items():
            tables[name].append(read_csv(path).assign(**_columns(run, results)))
    return tuple(pd.concat(parts, ignore_index=True) for parts in tables.values())


def _rows_by_run(folders: Sequence[Path], name: str) -> dict[str, pd.DataFrame]:
    """Key -> rows of every run in a table of some studies, by the first of them that has it."""
    paths = [folder / "tables" / f"{name}.csv" for folder in reversed(folders)]
    return {key: rows for path in filter(packed_or_not, paths) for key, rows in _read(path).groupby("run")}


def _read(path: Path) -> pd.DataFrame:
    table = read_csv(packed_or_not(path))
    texts = table.columns.intersection(["teacher", "terms", "loss", "loss_label", "family", "control", "credit"])
    return table.assign(**{name: table[name].astype(object).fillna("") for name in texts})


def _columns(run: Run, results: Path) -> dict[str, object]:
    return {"run": run_key(run, results)} | identity(run)
