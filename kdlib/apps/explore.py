"""Looking by hand at any case of any finished run: what `notebooks/explore.ipynb` does.

Plain functions, without widgets (those are in `kdlib.apps.panels`) or pictures (`kdlib.apps.drawing`): what has been
trained, a case with its masks, two runs compared by case, a small training; gradients are in `kdlib.apps.gradients`.
Nothing here writes a result: a training lives in memory alone and is never tested.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from torch import nn

from kdlib.analysis.labels import method_labels
from kdlib.analysis.report import runs_of
from kdlib.config import TEACHERS, InputError, Run, from_json, lookup
from kdlib.data import Fold, SliceBank, build_bank
from kdlib.data.description import read_description
from kdlib.data.slices import Geometry, intensity_range
from kdlib.evaluation.masks import on_file_grid, predict_cases, true_mask
from kdlib.experiments.recipes import WEIGHTS, thesis_recipe
from kdlib.experiments.runner import initial_weights
from kdlib.experiments.source import TrainingData, run_source, training_part
from kdlib.experiments.store import run_key, trained, untrained
from kdlib.files import read_csv
from kdlib.metrics import METRICS
from kdlib.models import MODELS
from kdlib.record import read_manifest
from kdlib.training.device import pick_device, precision
from kdlib.training.loop import train_cohort

PHANTOM = "Phantom"  # name of the built-in data set, which every results folder can make by itself


# -------------------------------------------------------------------------------------------------- what has been done


def studies(results: Path | str) -> list[str]:
    """Names of the studies in a results folder whose runs are kept there, the newest first.

    Raises: InputError: there is none, and how to make one.
    """
    results = Path(results).resolve()
    newest: dict[str, float] = {}
    for path in results.glob("*/tables/*_runs.csv*"):
        keys = pd.read_csv(path, usecols=["run"], dtype=str)["run"]
        if any((results / "runs" / key / "manifest.json").is_file() for key in keys):
            newest[path.parents[1].name] = max(path.stat().st_mtime, newest.get(path.parents[1].name, 0.0))
    if not newest:
        remedy = "run one first, e.g. make study, and open this notebook again"
        raise InputError(f"{results} holds no study whose runs are kept (their folders are not committed): {remedy}")
    return sorted(newest, key=newest.get, reverse=True)


def finished_runs(results: Path | str, study: str) -> pd.DataFrame:
    """One row per run of a study whose weights are kept: run (its key), label and the columns of its tables.

    Raises: InputError: no such study, or none of its runs is kept.
    """
    results = Path(results)
    lookup("study", study, dict.fromkeys(studies(results)))
    table = runs_of(results / study)
    kept = [(results / "runs" / key / "manifest.json").is_file() for key in table["run"]]
    # a network from elsewhere is known only where its builder was put into MODELS
    table = table[np.array(kept) & table["model"].isin(list(MODELS))].reset_index(drop=True)
    if table.empty:
        raise InputError(f"no run of study {study} is kept in {results.resolve() / 'runs'}: run the study again there")
    labels = table["method"].map(method_labels(table))
    if table["protocol"].nunique() > 1:
        labels += ", " + table["protocol"]
    places = zip(labels, table["fold"], table["seed"], strict=True)
    return table.assign(label=[f"{label}, fold {fold}, seed {seed}" for label, fold, seed in places])


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run and what it was trained on.

    Args:
        key: name of its folder in `results/runs`.
        run: its description, with the folder of its data.
        source: data set, classes and folds.
        results: folder that keeps runs and studies.
        device: where to compute.
    """

    key: str
    run: Run
    source: TrainingData
    results: Path
    device: torch.device

    @property
    def folder(self) -> Path:
        return self.results / "runs" / self.key

    @property
    def fold(self) -> Fold:
        return self.source.folds[self.run.fold]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.source.classes)


@functools.cache
def load_run(results: Path | str, key: str, data: str = "phantom", device: str = "auto") -> Finished:
    """A finished run, from its manifest.

    Args:
        key: name of its folder in `results/runs`.
        data: folder of the data set that it was trained on (a manifest holds no path); phantoms need none.

    Raises: InputError: no such run, one of another version of kdlib, or data that are not the run's.
    """
    results = Path(results).resolve()
    path = results / "runs" / key / "manifest.json"
    record = read_manifest(path.parent)
    if record.get("status") != "done":
        raise InputError(f"run {key}: {path} is not of a finished run of this version; choose a run that is kept")
    name, method = record["run"]["data"], record["identity"]["method"]
    if name == PHANTOM:
        data = "phantom"
    elif data == "phantom" or (found := read_description(Path(data)).name) != name:
        instead = "no folder is given" if data == "phantom" else f"{data} holds {found}"
        raise InputError(f"{method} ({key}) was trained on {name!r}, {instead}: give that data set's folder as data")
    run = from_json(record["run"] | {"data": str(data)})
    if run.preprocessing.dimensions == 3:
        raise InputError(f"{method} ({key}) is a run of volumes, and the explorer shows slices: choose a 2D study")
    source = run_source(run, results)
    if source.digest != record["data"]["digest"]:
        raise InputError(f"{method} ({key}) was trained on other files or folds than {data} has now: restore them")
    if run_key(run, results) != key:  # a manifest of another version may say what this one does not understand
        raise InputError(f"{path} does not describe the run of its key in this version of kdlib: train that run again")
    return Finished(key, run, source, results, pick_device(device))


def teachers_of(student: Finished, table: pd.DataFrame, data: str, device: str = "auto") -> tuple[Finished, ...]:
    """The teachers of `student`; of a baseline, the study's first teacher of the same fold, to compare with.

    Args:
        table: of the study's runs, from `finished_runs`.

    Returns: nothing for a teacher, or where the study has none of that fold.
    """
    keys = [run_key(run, student.results) for run in student.run.teacher_runs().values()]
    if not keys and student.run.model not in TEACHERS:
        place = (table["fold"] == student.run.fold) & (table["protocol"] == student.run.protocol.name)
        keys = table.loc[table["model"].isin(TEACHERS) & place, "run"].tolist()[:1]
    return tuple(load_run(student.results, key, data, device) for key in keys)


@functools.lru_cache(maxsize=8)
def network(finished: Finished) -> nn.Module:
    """The network of a run with its best weights, frozen, in eval mode."""
    return trained(finished.run, len(finished.classes), finished.results, finished.device)


@functools.lru_cache(maxsize=4)
def case_slices(finished: Finished, cases: tuple[str, ...]) -> SliceBank:
    """Slices of these cases alone: looking at one must not wait for all."""
    dataset = finished.source.dataset
    part = dataclasses.replace(dataset, cases=tuple(dataset.case(name) for name in cases))
    return build_bank(part, finished.source.classes, finished.run.preprocessing).to(finished.device)


# ---------------------------------------------------------------------------------------------------------- one case


def cases(finished: Finished) -> pd.DataFrame:
    """Every case of a run's data: case, patient, part (test, val, train, or unused) and, of the test part, its Dice."""
    fold, used = finished.fold, finished.fold.subset(finished.run.fraction)
    unused = [case for case in fold.train if case not in used]
    parts = {"test": fold.test, "val": fold.val, "train": used, "unused": unused}
    rows = [(case, fold.groups[case], part) for part, names in parts.items() for case in names]
    table = pd.DataFrame(rows, columns=["case", "patient", "part"])
    return table.assign(dice=table["case"].map(metrics_of(finished).groupby("case")["dice"].mean()))


def metrics_of(finished: Finished) -> pd.DataFrame:
    """case, patient, class and one column a metric."""
    table = read_csv(finished.folder / "metrics.csv")
    return table.pivot_table(index=["case", "patient", "class"], columns="metric", values="value").reset_index()


def predict_case(finished: Finished, case: str) -> np.ndarray:
    """What a run says of a case, in the grid of the case's own files: XYZ uint8, 0 background, 1..C the classes."""
    bank = case_slices(finished, (case,))
    with precision(finished.run.optimisation.precision):
        scores = predict_cases(network(finished), bank)[case]
    return on_file_grid(scores, bank, case, finished.run.threshold).astype(np.uint8)


@dataclass(frozen=True)
class CaseView:
    """One case in the grid of its own files.

    Args:
        case: its name.
        image: XYZ, as stored (HU for CT); affine: voxel to world in mm (RAS).
        shown: (low, high) intensities to show, as the network sees them.
        masks: "truth", "teacher <model>" and "student <model>" -> XYZ uint8, 0 background, 1..C the classes.
        classes: names of the classes.
        geometry: how its volume became the network's slices.
    """

    case: str
    image: np.ndarray
    affine: np.ndarray
    shown: tuple[float, float]
    masks: dict[str, np.ndarray]
    classes: tuple[str, ...]
    geometry: Geometry

    def differences(self) -> dict[str, np.ndarray]:
        """For each mask a and each b before it, "a against b" -> their `difference`."""
        names = list(self.masks)
        pairs = [(a, b) for number, a in enumerate(names) for b in names[:number]]
        return {f"{a} against {b}": difference(self.masks[a], self.masks[b]) for a, b in pairs}


def difference(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Where two masks differ: 0 alike, 1 missed, 2 too much, 3 the wrong class (uint8)."""
    missed, added = (reference > 0) & (prediction == 0), (reference == 0) & (prediction > 0)
    return np.select([prediction == reference, missed, added], [0, 1, 2], 3).astype(np.uint8)


def look(finished: Finished, teachers: tuple[Finished, ...], case: str) -> CaseView:
    """A case with its truth, what the teachers say of it and what the run says.

    Raises: InputError: the data have no such case.
    """
    lookup("case", case, dict.fromkeys(finished.fold.groups))
    dataset, bank = finished.source.dataset, case_slices(finished, (case,))
    image = nib.load(dataset.case(case).image)
    masks = {"truth": true_mask(dataset, case, finished.classes).astype(np.uint8)}
    masks |= {f"teacher {teacher.run.model}": predict_case(teacher, case) for teacher in teachers}
    role = "teacher" if finished.run.model in TEACHERS else "student"
    masks[f"{role} {finished.run.model}"] = predict_case(finished, case)
    voxels = np.asarray(image.dataobj, np.float32)
    low, high = intensity_range(voxels, dataset.modality, finished.run.preprocessing)
    return CaseView(case, voxels, image.affine, (float(low), float(high)), masks, finished.classes, bank.geometry[case])


def place(geometry: Geometry, voxel: tuple[int, int, int]) -> tuple[int, int, int]:
    """Slice, row and column, in the network's slices, of a voxel of the case's own grid; clipped to the slice."""
    mark = np.zeros(geometry.shape, bool)
    mark[voxel] = True
    return _middle(geometry, geometry.orient(mark))


def _middle(geometry: Geometry, mask: np.ndarray) -> tuple[int, int, int]:
    """The slice that holds most of an oriented mask, and the row and column of its middle, in the network's slices."""
    number = int(mask.sum((1, 2)).argmax())
    voxels = mask[number].nonzero()
    where = [axis[i].mean() for axis, i in zip(geometry.positions(), voxels, strict=True)]
    return number, *np.rint(where).astype(int).clip(0, geometry.size - 1).tolist()


def on_target(seen: CaseView) -> tuple[int, int, int]:
    """Slice, row and column, in the network's slices, of the middle of the truth on the slice with the largest true
    area; the middle of the volume where the case has no target."""
    geometry, truth = seen.geometry, seen.geometry.orient(seen.masks["truth"]) > 0
    return _middle(geometry, truth) if truth.any() else (geometry.depth // 2, geometry.size // 2, geometry.size // 2)


# ------------------------------------------------------------------------------------------------- two runs compared


def compare(a: Finished, b: Finished, metric: str = "dice") -> pd.DataFrame:
    """Two runs by test case: case, patient, class, a, b and difference (a minus b), from the least favourable to `a`.

    Raises: InputError: no such metric, or the runs were tested on no case in common.
    """
    keys, tables = ["case", "patient", "class"], [metrics_of(run) for run in (a, b)]
    lookup("metric", metric, dict.fromkeys(tables[0].columns.drop(keys)))
    a_table, b_table = (table[[*keys, metric]] for table in tables)
    both = a_table.rename(columns={metric: "a"}).merge(b_table.rename(columns={metric: "b"}), on=keys)
    if both.empty:
        runs = f"{a.run.method} ({a.key}) and {b.run.method} ({b.key})"
        raise InputError(f"{runs} were tested on no case in common: choose one fold")
    upwards = METRICS[metric].higher is not False
    return both.assign(difference=both["a"] - both["b"]).sort_values("difference", ascending=upwards, ignore_index=True)


# ------------------------------------------------------------------------------------------------ a training in place


def distillation_run(student: Finished, teachers: tuple[Finished, ...], only: Sequence[str] = ()) -> Run:
    """The student's run; of a baseline, the run that would distil it from `teachers` by the thesis's recipe.

    Args:
        only: terms of that recipe; none for all.

    Raises: InputError: it is a teacher, or has none.
    """
    run = student.run
    if run.model in TEACHERS or not teachers:
        raise InputError(f"{run.method} has no teacher in this study: choose a student of a fold that a teacher is of")
    if run.teacher:
        return run
    taught = "+".join(teacher.run.model for teacher in teachers)
    recipe = thesis_recipe(run.model, only=tuple(only) or tuple(WEIGHTS))
    return dataclasses.replace(run, teacher=taught, recipe=recipe)


def teacher_networks(run: Run, teachers: tuple[Finished, ...]) -> dict[str, nn.Module]:
    """Teachers by model; untrained ones for the control that learns from random weights."""
    if run.recipe.teacher != "random":
        return {teacher.run.model: network(teacher) for teacher in teachers}
    return {teacher.run.model: untrained(teacher.run, len(teacher.classes), teacher.device) for teacher in teachers}


def train_small(
    student: Finished, teachers: tuple[Finished, ...] = (), weights: Mapping[str, float] | None = None,
    temperatures: Mapping[str, float] | None = None, epochs: int = 5, steps: int = 20,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Trains a student for a few steps with other weights or temperatures, in memory: nothing is saved or tested.

    It starts from the run's initial weights, on the run's training cases in the run's order, and is validated on its
    validation cases: test cases are never seen, so that trying out cannot choose by them.

    Args:
        student: a distilled student, or a baseline, which is then distilled from `teachers` by the thesis's recipe;
            without teachers it stays a baseline.
        weights, temperatures: of terms, by name; the others keep theirs.
        epochs, steps: length; steps are of one epoch.
        on_epoch: is called after each epoch with the history so far.

    Returns: history: tidy, columns epoch, name, value, as of a run.

    Raises:
        InputError: a teacher is to be trained, no such term, a value that cannot be, or a length below 1.
        TrainingError: the training failed, e.g. by a term that passes no gradient.
    """
    if epochs < 1 or steps < 1:
        raise InputError(f"{epochs} epochs of {steps} steps: give at least 1 of each")
    run = distillation_run(student, teachers) if teachers or student.run.teacher else student.run
    if run.model in TEACHERS:
        raise InputError(f"{run.method} is a teacher: choose a student to train in place")
    terms = {term.name: term for term in run.recipe.terms}
    for field, given in (("weight", weights), ("temperature", temperatures)):
        for name, value in (given or {}).items():
            terms[name] = dataclasses.replace(lookup("term", name, terms), **{field: value})
    recipe = dataclasses.replace(run.recipe, terms=tuple(terms.values()))
    profile = dataclasses.replace(run.profile, student_epochs=epochs, student_steps=steps)
    run = dataclasses.replace(run, recipe=recipe, profile=profile)
    fold = student.fold
    seen = fold.train if run.recipe.unlabelled else fold.subset(run.fraction)
    train, val = training_part(run, fold, case_slices(student, seen)), case_slices(student, fold.val)
    heard = None if on_epoch is None else lambda arms: on_epoch(pd.DataFrame(arms[0].history))
    networks = teacher_networks(run, teachers) if run.teacher else {}
    pruned = initial_weights([run], student.run.origin, len(student.classes), student.results, student.device)
    with precision(run.optimisation.precision):
        (arm,) = train_cohort(
            [run], train, val, steps, student.device, networks, epochs, on_epoch=heard, initial=pruned
        )
    if arm.failure is not None:
        raise arm.failure
    return pd.DataFrame(arm.history)
