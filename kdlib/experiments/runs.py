"""Run folders: what has been trained, under which key, and the tables of it.

`results/runs/<key>/` holds `best.safetensors`, `last.safetensors`, `history.csv`, `metrics.csv`, `slices.npz`,
`log.txt`, `notebook.ipynb` (the executed notebook that trained it) and `manifest.json`. A run is done when the manifest
says so, which is written last; until then it says "training", or "failed" and why. Such a run is trained again, from
`checkpoint.safetensors` where there is one. Whoever trains a run holds the lock of its folder.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import os
import platform
import subprocess
import time
import traceback
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor, nn

from kdlib.config import BASELINE, STUDENTS, TEACHERS, InputError, Preprocessing, Run, TrainingError, lookup
from kdlib.data import Dataset, Fold, SliceBank, build_bank, check_view, index, make_phantom, split_file, splits
from kdlib.evaluation.agreement import calibration, fidelity, scale_similarity
from kdlib.evaluation.cases import evaluate
from kdlib.experiments.identity import identity
from kdlib.experiments.recipes import WEIGHTS
from kdlib.losses import LOSSES
from kdlib.models import MODELS, count_parameters
from kdlib.training import ranks
from kdlib.training.checkpoint import (
    CODE,
    CODE_HASH,
    Checkpoint,
    remove_partial_files,
    save_tensors,
    write,
    write_error,
)
from kdlib.training.device import computes_bf16, pick_device
from kdlib.training.distiller import check_recipe, scales_of
from kdlib.training.loop import RunState, epochs_of, new_model, steps_per_epoch, train_cohort

# ---------------------------------------------------------------------------------------------- what a run trains on


@dataclass(frozen=True, eq=False)
class TrainingData:
    """A data set as a run sees it: cases, target classes and folds, all fixed before anything is trained."""

    dataset: Dataset
    classes: dict[str, int]
    folds: tuple[Fold, ...]
    digest: str


@functools.cache
def source(
    data: str, target: str, folds: int, on_defect: str, group: str, results: Path, preprocessing: Preprocessing
) -> TrainingData:
    """Indexes a folder (or makes the phantom), and reads or writes its splits under `results/splits/`."""
    try:
        folder = make_phantom(results / "data" / "phantom") if data == "phantom" else Path(data)
        dataset = index(folder, on_defect, group)
        classes = dataset.classes(target)
        dataset = check_view(dataset, classes, preprocessing)
        path = split_file(results / "splits", dataset, classes, folds)
        parts = splits(dataset, classes, folds, path)
    except OSError as error:
        raise write_error(results, error) from None
    return TrainingData(dataset, classes, parts, hashlib.sha256(path.read_bytes()).hexdigest())


@functools.lru_cache(maxsize=1)
def _bank(found: TrainingData, preprocessing: Preprocessing) -> SliceBank:
    return build_bank(found.dataset, found.classes, preprocessing)


def run_source(run: Run, results: Path | str) -> TrainingData:
    """The data, classes and folds of a run; read once per process."""
    # the profile's slices, also where the protocol keeps a fault of theirs: all runs of a study have the same cases
    asked = run.data, run.target, run.profile.folds, run.on_defect, run.group
    return source(*asked, Path(results).resolve(), run.profile.preprocessing)


def run_bank(run: Run, results: Path | str) -> SliceBank:
    """All slices of a run's data set; kept for the next cohort of the same process."""
    return _bank(run_source(run, results), run.preprocessing)


def run_key(run: Run, results: Path) -> str:
    """A hash of what a run is: two with the same key have the same result on one machine and version of the code."""
    return hashlib.sha256(json.dumps(describe(run, results), sort_keys=True).encode()).hexdigest()[:16]


def describe(run: Run, results: Path) -> dict[str, object]:
    """What a run is, as JSON values: all that its key depends on.

    That is its model, recipe, seed, view, length and optimisation, the published faults that are kept in selection and
    evaluation, the files and folds of its data (not their path: a moved folder keeps its runs), and the keys of its
    teachers. Device, precision and versions stand in the manifest instead: a run made elsewhere is not trained again.
    """
    profile, protocol = run.profile, run.protocol
    length = [profile.teacher_epochs, profile.teacher_steps]
    if not run.is_teacher:
        length = [
            profile.student_epochs,
            profile.student_steps,
            *(length if run.effective_recipe.budget == "teacher+student" else ()),
            *([profile.step_cost] if run.effective_recipe.budget == "wall_clock" else ()),
        ]
    return {
        "data": run_source(run, results).digest,
        "run": [run.model, run.fold, run.fraction, run.seed],
        "recipe": dataclasses.asdict(run.effective_recipe) | {"name": ""},
        "preprocessing": dataclasses.asdict(run.preprocessing),
        "length": length if run.length == 1 else [*length, run.length],
        "width": profile.width if run.model in TEACHERS else None,
        "network": _architecture(run.model),
        "optimisation": dataclasses.asdict(run.optimisation),
        "faults": [protocol.test_selection, protocol.pooled_dice, run.threshold],
        "teacher": [run_key(teacher, results) for teacher in run.teacher_runs().values()],
    }


def _architecture(model: str) -> list | None:
    """The layers of a network from outside, in words, and its scales: its name alone says nothing of them."""
    if model in TEACHERS + STUDENTS:
        return None
    with torch.device("meta"):  # no weights: they come from the seed
        network = lookup("model", model, MODELS)(2, 3, 1)
    return [str(network), network.scales]


def run_folder(run: Run, results: Path) -> Path:
    return results / "runs" / run_key(run, results)


FORMAT = 1  # of manifests; those of before have none


def read_manifest(folder: Path) -> dict:
    """The manifest of a run's folder, whatever its status; empty where there is none.

    Raises:
        InputError: it is of a newer version of kdlib, or damaged.
    """
    path = folder / "manifest.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        number = record.get("format", 0)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete {folder} to train that run again") from None
    if number > FORMAT:
        raise InputError(f"{path}: written by a newer version (format {number}); update kdlib")
    return record


def is_done(run: Run, results: Path) -> bool:
    """As rank 0 sees it: it writes while the others may be further on."""
    return ranks.agree(is_marked_done(run_folder(run, results)))


def is_marked_done(folder: Path) -> bool:
    return read_manifest(folder).get("status") == "done"


def manifest(run: Run, results: Path | str = "results") -> dict:
    """What a finished run says of itself: its parameters, data, adapters, timings and versions.

    Raises:
        InputError: the run is not finished.
    """
    record = read_manifest(run_folder(run, Path(results).resolve()))
    if record.get("status") != "done":
        raise InputError(f"{run.name} ({run.recipe.name}) has no result in {results}: train it first")
    return record


# ------------------------------------------------------------------------------------------------------------ saving


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    save_tensors(weights, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads safetensors into `model`.

    Raises:
        InputError: no such file, a damaged one, or one that does not fit the model (names what differs).
    """
    try:
        weights = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"weights {path} do not exist: train that run first") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights {path} cannot be read ({error}): delete the run's folder and train again") from None
    own = model.state_dict()
    differ = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    faults = [*sorted(own.keys() ^ weights.keys()), *sorted(differ)]
    if faults:
        raise InputError(
            f"weights {path} do not fit {type(model).__name__}: {len(faults)} tensors are missing, unknown or of "
            f"another shape, the first {faults[0]!r}; use the file of the same model, width and number of classes"
        )
    model.load_state_dict(weights)


@functools.cache
def git_state() -> dict[str, object]:
    """Commit of the code and whether the tree differs from it; nulls outside a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


@functools.cache
def machine() -> dict[str, object]:
    """Hardware and package versions of this process."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    packages = ("torch", "monai", "numpy", "scipy", "scikit-learn", "pandas", "nibabel", "safetensors")
    return {
        "hardware": {"cpu": name, "instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }


def manifest_header(run: Run, found: TrainingData, results: Path, device: torch.device) -> dict:
    """What is known of a run before it is trained: the first part of its manifest."""
    fold = found.folds[run.fold]
    parts = {"train": fold.subset(run.fraction), "val": fold.val, "test": fold.test}
    notebook = os.environ.get("KDLIB_NOTEBOOK")
    return {
        "format": FORMAT,
        "key": run_key(run, results),
        "arm": run.name,
        "run": dataclasses.asdict(run) | {"data": found.dataset.name},
        "effective_recipe": dataclasses.asdict(run.effective_recipe),
        "seeds": {"run": run.seed, "teacher": run.teacher_seed},
        "teachers": {name: run_key(teacher, results) for name, teacher in run.teacher_runs().items()},
        "data": {"digest": found.digest, "fold_digest": hashlib.sha256(json.dumps(parts).encode()).hexdigest()} | parts,
        "code": {"hash": CODE_HASH, "files": CODE},
        "git": git_state(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "precision": "bf16" if computes_bf16(device) else "fp32",
        **machine(),
        "processes": ranks.size(),
        "notebook": os.path.relpath(notebook, results) if notebook else None,
        "started": _now(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _save_json(path: Path, record: dict) -> None:
    write(path, lambda partial: partial.write_text(json.dumps(record, indent=1), encoding="utf-8"))


def fail(arm: str, folder: Path, record: dict, failure: Exception) -> TrainingError:
    """Leaves the cause of a failure, and how to try again, in a run's manifest and log; returns the failure."""
    again = os.environ.get("KDLIB_RERUN", "call kdlib.study with this run again")
    error = failure if isinstance(failure, TrainingError) else TrainingError(f"{arm}: {failure}")
    record = record | {"failed": _now(), "status": "failed", "error": str(error), "rerun": again}
    _save_json(folder / "manifest.json", record)
    Checkpoint(folder, {}).note("failed: " + "".join(traceback.format_exception(failure)).rstrip())
    return error


def save_run(arm: RunState, bank: SliceBank, found: TrainingData, record: dict, folder: Path) -> None:
    """Evaluates the best weights on the test patients and writes the run folder, its manifest last.

    Raises:
        TrainingError: a case that cannot be evaluated.
        InputError: the folder cannot be written.
    """
    run, fold = arm.run, found.folds[arm.run.fold]
    save_weights(arm.model.state_dict(), folder / "last.safetensors")
    save_weights(arm.best, folder / "best.safetensors")
    arm.model.load_state_dict(arm.best)
    begin, own, cause = time.perf_counter(), [], None
    test = bank.select(fold.test).to(next(arm.model.parameters()).device)
    for case in ranks.deal(fold.test):
        try:
            table, (example,) = evaluate(arm.model, test, found.dataset, [case], run.threshold)
            own.append((table.to_dict("records"), example, ""))
        except Exception as error:  # whatever a bad file raises, it must name the case and cost this run alone
            own.append(([], {}, f"case {case} cannot be evaluated ({type(error).__name__}: {error})"))
            cause = error
    tables, examples, faults = zip(*ranks.collect(own), strict=True)
    if any(faults):
        text = "; ".join(filter(None, faults))
        raise TrainingError(f"{arm.label}: {text}; mend it and run again, the training is kept") from cause
    metrics = pd.DataFrame(sum(tables, []))
    metrics["patient"] = metrics["case"].map(fold.groups)
    history = pd.DataFrame(arm.history)
    write(folder / "history.csv", lambda path: history.to_csv(path, index=False))
    write(folder / "metrics.csv", lambda path: metrics.to_csv(path, index=False))
    parts = {
        part: np.stack([example[part] for example in examples]) for part in ("name", "image", "truth", "prediction")
    }
    save_arrays(folder / "slices.npz", parts)
    record = record | {
        "adapters": arm.distiller.describe() if arm.distiller is not None else {},
        "parameters": count_parameters(arm.model),
        "best": {"epoch": arm.best_epoch, "val_dice": arm.best_dice},
        "steps": arm.step,
        "sessions": arm.sessions,
        "micro_batches": max(session.get("micro_batches", 1) for session in arm.sessions),
        "seconds": {"training": round(arm.seconds, 1), "evaluation": round(time.perf_counter() - begin, 1)},
        "finished": _now(),
        "status": "done",
    }
    _save_json(folder / "manifest.json", record)


def save_arrays(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Compressed arrays; an open file keeps numpy from adding a suffix to the partial name."""

    def save(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez_compressed(file, **columns)

    write(path, save)


def load_arrays(path: Path) -> pd.DataFrame:
    """The arrays of `save_arrays` as columns, one row for each first index; pickles are refused."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return pd.DataFrame({column: list(file[column]) for column in file.files})
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} holds no plain arrays ({error}): delete its folder and run again") from None


# ------------------------------------------------------------------------------------------------------------- study


def cohorts(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that can share their teachers' pass: alike in all but model and recipe, trained with the same batches."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        how = run.optimisation
        alone = run.model if run.is_teacher else None
        key = (
            run.data,
            run.target,
            run.fold,
            run.seed,
            run.fraction,
            run.profile,
            run.protocol,
            run.teacher,
            run.teacher_seed,
            run.recipe.teacher == "random",
            run.recipe.budget,
            run.recipe.unlabelled,
            run.length,
            how.batch,
            how.target_share,
            alone,
        )
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def checkpoint_of(run: Run, results: Path) -> Checkpoint:
    identity = json.loads(json.dumps(describe(run, results)))
    return Checkpoint(run_folder(run, results), identity, git_state()["commit"])


def train_missing(group: list[Run], results: Path, device: torch.device, parts: int = 1) -> list[TrainingError]:
    """Trains one cohort, whose locks are held, and saves each of its runs; returns the failures of single arms.

    Where the GPU's memory does not hold all arms, its halves are trained one after the other; where it does not hold
    one, its batch is split into `parts`, twice as many each time.
    """
    try:
        return _train(group, results, device, parts)
    except torch.OutOfMemoryError as error:
        if ranks.size() > 1:  # the others are still at it
            raise
        cause = str(error).splitlines()[0]
    gc.collect()  # the arms of the failed try: its traceback held their tensors until here
    torch.cuda.empty_cache()
    if len(group) > 1:
        print(f"{len(group)} arms at once do not fit into memory ({cause}): trained in two halves", flush=True)
        half = len(group) // 2
        return [failure for some in (group[:half], group[half:]) for failure in train_missing(some, results, device)]
    run = group[0]
    batch, parts = run.optimisation.batch, 2 * parts
    text = f"{run.name} ({run.recipe.name}): batches of {2 * batch // parts} slices do not fit into memory ({cause})"
    if batch // parts >= 2:  # a contrast needs two images
        print(f"{text}: split into {parts} parts, whose losses are not those of the whole", flush=True)
        return train_missing(group, results, device, parts)
    record = manifest_header(run, run_source(run, results), results, device)
    return [fail(run.name, run_folder(run, results), record, TrainingError(text))]


def _train(group: list[Run], results: Path, device: torch.device, parts: int) -> list[TrainingError]:
    run = group[0]
    found = run_source(run, results)
    fold = found.folds[run.fold]
    bank = run_bank(run, results)
    labelled = fold.subset(run.fraction)
    train, val = bank.select(labelled), bank.select(fold.val)
    if run.recipe.unlabelled:
        train = bank.select(fold.train).hide_labels(set(fold.train) - set(labelled))
    if run.protocol.test_selection:
        val = bank.select(fold.test)
    slices = len(bank.select(fold.train))
    teachers = {}
    for name, teacher_run in run.teacher_runs().items():
        if run.recipe.teacher == "random":
            teacher = new_model(teacher_run, len(bank.classes)).to(device, memory_format=torch.channels_last)
            teachers[name] = teacher.eval().requires_grad_(False)
        else:
            teachers[name] = trained(teacher_run, len(bank.classes), results, device)
    steps, epochs = steps_per_epoch(run, slices), epochs_of(run, slices)
    keep = [checkpoint_of(run, results) for run in group]
    records = [manifest_header(run, found, results, device) for run in group]
    for checkpoint, record in zip(keep, records, strict=True):
        remove_partial_files(checkpoint.folder)
        _save_json(checkpoint.folder / "manifest.json", record | {"status": "training"})
        checkpoint.note(f"training on {record['device']}, code {CODE_HASH}")
    try:
        banks = train.to(device), val.to(device)
        arms = train_cohort(group, *banks, steps, device, teachers, epochs, keep, parts)
        return [error for each in zip(arms, keep, records, strict=True) if (error := _finish(*each, bank, found))]
    except torch.OutOfMemoryError:
        raise
    except InputError:  # nothing can be written
        raise
    except Exception as error:
        for run, checkpoint, record in zip(group, keep, records, strict=True):
            if not is_marked_done(checkpoint.folder):
                fail(run.name, checkpoint.folder, record, error)
        raise


def _finish(
    arm: RunState, checkpoint: Checkpoint, record: dict, bank: SliceBank, found: TrainingData
) -> TrainingError | None:
    """Saves a trained arm, or its failure."""
    folder = checkpoint.folder
    try:
        if arm.failure is not None:
            raise arm.failure
        save_run(arm, bank, found, record, folder)
    except TrainingError as error:
        if arm.failure is not None:  # from a state that has failed, it would fail again
            checkpoint.delete()
        return fail(arm.label, folder, record, error)
    except InputError as error:
        if error is not arm.failure:
            raise
        return fail(arm.label, folder, record, error)
    checkpoint.delete()
    checkpoint.note("done")
    listing = os.environ.get("KDLIB_TRAINED")
    if listing and not ranks.rank():  # whoever runs the notebook puts its executed copy there
        with open(listing, "a", encoding="utf-8") as file:
            file.write(f"{folder}\n")
    return None


@dataclass(frozen=True)
class Results:
    """Tables of a list of runs.

    Args:
        cases: tidy, one row a (run, case, class, metric): run, arm, model, teacher, fraction, recipe, protocol, fold,
            seed, patient, case, class, metric, value.
        history: tidy, one row a (run, epoch, name).
        runs: one row a run: key, arm, recipe, parameters, best epoch and its validation Dice, seconds.
        examples: one row a (run, case) with `image`, `truth`, `prediction` arrays (HW) of the slice with most truth.
    """

    cases: pd.DataFrame
    history: pd.DataFrame
    runs: pd.DataFrame
    examples: pd.DataFrame

    def by_recipe(self, part: str = "cases") -> pd.DataFrame:
        """`cases` (or `history`) with the recipe as the arm, as printed; a student without any is "no distillation"."""
        table = getattr(self, part)
        full = "+".join(WEIGHTS)
        names = {f"{full} ({name})": f"thesis terms, {loss.label}" for name, loss in LOSSES.items()}
        return table.assign(arm=table["recipe"].replace(names | {BASELINE.name: "no distillation"}))

    def parameters(self) -> dict[str, int]:
        """Parameters of the whole network (a teacher's reconstruction decoder included), by arm."""
        return dict(zip(self.runs["arm"], self.runs["parameters"], strict=True))

    def save(self, folder: Path, name: str) -> None:
        """Writes `tables/<name>_{cases,history,runs}.csv` and `slices/<name>.npz` under a study's folder."""
        for part in ("cases", "history", "runs"):
            write(
                folder / "tables" / f"{name}_{part}.csv",
                lambda path, part=part: getattr(self, part).to_csv(path, index=False),
            )
        # the stack of a text column is text: an object array would be a pickle
        columns = {column: np.stack(self.examples[column].to_list()) for column in self.examples}
        save_arrays(folder / "slices" / f"{name}.npz", columns)

    @classmethod
    def load(cls, folder: Path, name: str) -> Results:
        """Reads what `save` wrote, without the runs themselves.

        Raises:
            InputError: the experiment was not saved there.
        """
        try:
            tables = {
                part: pd.read_csv(folder / "tables" / f"{name}_{part}.csv") for part in ("cases", "history", "runs")
            }
            examples = load_arrays(folder / "slices" / f"{name}.npz")
        except FileNotFoundError as error:
            raise InputError(f"{error.filename} does not exist: run notebook {name} of this study first") from None
        return cls(**tables, examples=examples)


def check(runs: Iterable[Run]) -> None:
    """Raises InputError where a run names a model, a distiller or a scale that does not exist."""
    scales = {}
    for run in runs:
        for model in (run.model, *run.teacher_runs()):
            lookup("model", model, MODELS)
            if model not in scales:
                with torch.device("meta"):
                    scales[model] = new_model(dataclasses.replace(run, model=model), 1).scales
        check_recipe(run.effective_recipe)
        for models, taught in (([run.model], False), (run.teacher_runs(), True)):
            for model, scale in [
                (model, scale) for model in models for scale in scales_of([run.effective_recipe], taught)
            ]:
                lookup(f"scale of {model}", scale, scales[model])


def study(runs: Iterable[Run], results: Path | str = "results", device: str = "auto") -> Results:
    """Trains and evaluates every run that has no result yet, teachers first, and returns the tables of all.

    Raises:
        InputError: the data, a fold, a target or the device cannot be used.
        TrainingError: some runs failed, each named with its cause; the others are finished and kept.
    """
    results, runs = Path(results).resolve(), list(dict.fromkeys(runs))
    place = pick_device(device)
    teachers = list(dict.fromkeys(teacher for run in runs for teacher in run.teacher_runs().values()))
    check(teachers + runs)
    if ranks.asked() > 1:
        from kdlib.experiments.parallel import launch  # which imports this module

        # a network that was added to `MODELS` is known in this process alone, and trained here
        own = {*TEACHERS, *STUDENTS}
        launch([run for run in runs if {run.model, *run.teacher_runs()} <= own], results, ranks.asked(), device)
    failures: list[str] = []
    for stage in (teachers, runs):
        failures += _train_stage(cohorts(stage), results, place)
    ranks.agree(None)  # by now rank 0 has written everything
    if failures:
        raise TrainingError(
            f"{len(failures)} of {len(runs)} runs failed, the others are kept: " + "; ".join(dict.fromkeys(failures))
        )
    others = [run for run in runs if manifest(run, results).get("code", {}).get("hash") != CODE_HASH]
    if others:
        print(f"{len(others)} of {len(runs)} runs were made by another version of the code and are used as they are")
    return collect(runs, results)


def _train_stage(groups: Sequence[list[Run]], results: Path, place: torch.device) -> list[str]:
    """Trains what has no result; what another process is training is left for the end, and waited for."""
    failures, waiting = [], []
    for group in groups:
        found, busy = _train_free(group, results, place)
        failures, waiting = failures + found, waiting + [busy]
    for busy in waiting:
        while busy:
            print(f"{busy[0].name} ({busy[0].recipe.name}): another process is training it, waiting", flush=True)
            with _locked(busy[0], results, wait=True):
                pass
            records = ranks.agree([read_manifest(run_folder(run, results)) for run in busy])
            failures += [record["error"] for record in records if record.get("status") == "failed"]
            left = [run for run, record in zip(busy, records, strict=True) if record.get("status") != "failed"]
            found, busy = _train_free(left, results, place)
            failures += found
    return failures


def _train_free(group: Sequence[Run], results: Path, place: torch.device) -> tuple[list[str], list[Run]]:
    """Trains those runs of a cohort that have no result and that no other process is training.

    Returns:
        failures, and the runs that another process is training.
    """
    # runs of several protocols may be one and the same, and done by now
    missing = {}
    for run in group:
        if not is_done(run, results):
            missing[run_key(run, results)] = run
            continue
        with suppress(OSError):  # there is one where the process was killed between its last two steps
            (run_folder(run, results) / "checkpoint.safetensors").unlink()
    if not missing:
        return [], []
    if not all(is_done(teacher, results) for teacher in group[0].teacher_runs().values()):
        return [f"{run.name}: its teacher {run.teacher} has no result" for run in missing.values()], []
    with ExitStack() as locks:
        mine = {key for key in sorted(missing) if locks.enter_context(_locked(missing[key], results))}
        busy = [run for key, run in missing.items() if key not in mine]
        free = [run for key, run in missing.items() if key in mine and not is_done(run, results)]
        return [str(failure) for failure in train_missing(free, results, place)] if free else [], busy


@contextmanager
def _locked(run: Run, results: Path, wait: bool = False) -> Iterator[bool]:
    """Holds the lock of a run's folder; yields False where another process holds it and is not waited for.

    The operating system keeps it, and frees it when its holder dies. Of several ranks the first holds it for all.
    """
    if ranks.rank():
        yield ranks.agree(None)
        return
    folder = run_folder(run, results)
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except Timeout:
        yield ranks.agree(False)
        return
    except OSError as error:
        raise write_error(folder, error) from None
    try:
        yield ranks.agree(True)
    finally:
        lock.release()


def teacher_agreement(
    runs: Sequence[Run], teacher: Run, results: Path | str = "results", device: str = "auto"
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """How far finished runs agree with a teacher on the test patients, and how well they know what they know.

    What is computed is kept in the run's folder.

    Args:
        runs: whose best weights are compared.
        teacher: with whose; the teacher of the same fold for each run.

    Returns:
        tidy tables with the run's labels: agreement by case and class (`kdlib.evaluation.agreement.fidelity`), similarity of
        features by scale (`scale_similarity`) and calibration by case, class and bin (`calibration`).
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
            missing["agreement"] = fidelity(*models, bank, found.dataset, test, run.threshold)
            missing["agreement"]["patient"] = missing["agreement"]["case"].map(found.folds[run.fold].groups)
            missing["similarity"] = scale_similarity(*models, bank)
            missing["calibration"] = calibration(models[0], bank)
            for name, path in files.items():
                write(path, lambda partial, name=name: missing[name].to_csv(partial, index=False))
        for name, path in files.items():
            label = {"arm": run.name} | identity(run)
            tables[name].append(pd.read_csv(path, dtype={"case": str, "patient": str}).assign(run=folder.name, **label))
    return tuple(pd.concat(parts, ignore_index=True) for parts in tables.values())


def trained(run: Run, classes: int, results: Path, device: torch.device) -> nn.Module:
    """The network of a finished run with its best weights, frozen, in eval mode."""
    model = new_model(run, classes)
    load_weights(model, run_folder(run, results) / "best.safetensors")
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def collect(runs: Sequence[Run], results: Path) -> Results:
    """The tables of finished runs, read from their folders."""
    cases, history, rows, examples = [], [], [], []
    for run in runs:
        folder = run_folder(run, results)
        record = manifest(run, results)
        label = {"run": folder.name, "arm": run.name} | identity(run)  # arm: until analysis reads the columns
        cases.append(pd.read_csv(folder / "metrics.csv", dtype={"case": str, "patient": str}).assign(**label))
        history.append(pd.read_csv(folder / "history.csv").assign(**label))
        rows.append(
            label | {"parameters": record["parameters"]} | record["best"]
            | {f"{name}_seconds": value for name, value in record["seconds"].items()} | {"device": record["device"]}
        )  # fmt: skip
        examples.append(load_arrays(folder / "slices.npz").rename(columns={"name": "case"}).assign(**label))
    order = [*label, "patient", "case", "class", "metric", "value"]
    return Results(
        pd.concat(cases, ignore_index=True)[order],
        pd.concat(history, ignore_index=True),
        pd.DataFrame(rows),
        pd.concat(examples, ignore_index=True),
    )
