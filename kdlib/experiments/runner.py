"""`study`: trains what has no result yet, cohort by cohort, and returns the tables of all."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from kdlib.config import InputError, Run, TrainingError, lookup
from kdlib.data import Bank
from kdlib.evaluation.cases import evaluate
from kdlib.experiments.source import TrainingData, run_bank, run_source, training_part
from kdlib.experiments.store import (
    checkpoint_of,
    fail,
    is_done,
    locked,
    manifest,
    manifest_header,
    read_manifest,
    run_folder,
    run_key,
    trained,
    untrained,
    write_manifest,
)  # fmt: skip
from kdlib.experiments.tables import Results, collect, masters, saved_runs
from kdlib.files import remove_partial_files, write_arrays, write_csv
from kdlib.models import MODELS, count_parameters
from kdlib.models.pruning import check_smaller, prune_into
from kdlib.training.checkpoint import CODE_HASH, Checkpoint, save_tensors
from kdlib.training.device import pick_device, precision
from kdlib.training.distiller import check_recipe
from kdlib.training.fabric import ALONE, Processes
from kdlib.training.hooks import scales_of
from kdlib.training.loop import train_cohort
from kdlib.training.schedule import epochs_of, steps_per_epoch
from kdlib.training.state import RunState, new_model


def study(
    runs: Iterable[Run],
    results: Path | str = "results",
    device: str = "auto",
    processes: Processes = ALONE,
    reuse: Sequence[Path] = (),
) -> Results:
    """Trains and evaluates every run that has no result yet, teachers first, and returns the tables of all.

    Args:
        reuse: folders of studies; a run that stands in their tables, by its key, is read from them instead of trained,
            e.g. other seeds, trained on another machine whose run folders are gone. What is trained here, a teacher
            that others need among it, stands before it.
        processes: that train each run together (see `kdlib.experiments.parallel.train`); this is the first of them.

    Raises:
        InputError: the data, a fold, a target or the device cannot be used.
        TrainingError: some runs failed, each named with its cause; the others are finished and kept.
    """
    results, runs = Path(results).resolve(), list(dict.fromkeys(runs))
    if not runs:
        raise InputError("a study of no runs: give at least one")
    place = pick_device(device)
    saved = saved_runs(reuse)
    keys = {run: run_key(run, results) for run in runs} if saved else {}
    there = {key for key, parts in saved.items() if "runs" in parts}
    read = {run for run, key in keys.items() if key in there and not is_done(run, results)}
    own = [run for run in runs if run not in read]
    teachers = list(dict.fromkeys(needed for run in own for needed in run.needed_runs()))
    check(teachers + runs)
    check_names(runs)
    failures: list[str] = []
    for stage in (teachers, own):
        failures += _train_stage(cohorts(stage), results, place, processes)
    if failures:
        raise TrainingError(
            f"{len(failures)} of {len(runs)} runs failed, the others are kept: " + "; ".join(dict.fromkeys(failures))
        )
    read = {run for run in read if not is_done(run, results)}  # a teacher among them was trained for others
    if read:
        print(f"{len(read)} of {len(runs)} runs are read from the tables of {', '.join(map(str, reuse))}")
        if twice := sum(key in there for key in keys.values()) - len(read):
            print(f"{twice} others that stand there, too, were trained here as well, and are taken as trained here")
    others = [
        run for run in runs if run not in read and manifest(run, results).get("code", {}).get("hash") != CODE_HASH
    ]
    if others:
        print(f"{len(others)} of {len(runs)} runs were made by another version of the code and are used as they are")
    lacking = [*read, *(run for run in masters(runs) if saved and not is_done(run, results))]
    return collect(runs, results, {run: saved[key] for run in lacking if (key := run_key(run, results)) in saved})


def check(runs: Iterable[Run]) -> None:
    """Raises InputError where a run names a model, a distiller or a scale that does not exist, or cannot be pruned."""
    scales = {}
    for run in runs:
        check_recipe(run.effective_recipe)
        for models, side in (([run.model], "student"), (run.teacher_runs(), "teacher")):
            for model in models:
                lookup("model", model, MODELS)
                if model not in scales:
                    with torch.device("meta"):
                        scales[model] = new_model(dataclasses.replace(run, model=model), 1).scales
                for scale in scales_of([run.effective_recipe], side):
                    lookup(f"scale of {model}", scale, scales[model])
        if run.origin:
            with torch.device("meta"):
                check_smaller(new_model(run.origin, 1), new_model(run, 1), f"{run.model}, profile {run.profile.name}")


def check_names(runs: Iterable[Run]) -> None:
    """Raises InputError where two runs that differ would stand under one name in a table."""
    named: dict[tuple, Run] = {}
    for run in runs:
        other = named.setdefault((run.method, run.protocol.name, run.fold, run.seed, run.length), run)
        differ = [part.name for part in dataclasses.fields(Run) if getattr(run, part.name) != getattr(other, part.name)]
        if differ:
            remedy = "give their recipes different names" if "recipe" in differ else "make a study of each"
            text = f"two runs of this study are called {run.label} and differ in {', '.join(differ)}: {remedy}"
            raise InputError(text)


def cohorts(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that can share their teachers' pass: alike in all but model and recipe, trained with the same batches."""
    groups: dict[tuple, list[Run]] = {}
    shared = [field.name for field in dataclasses.fields(Run) if field.name not in ("model", "recipe")]
    for run in runs:
        recipe, how = run.recipe, run.optimisation
        alone = run.model if run.is_teacher else None
        key = (
            *(getattr(run, name) for name in shared), run.origin, alone, recipe.teacher == "random", recipe.budget,
            recipe.unlabelled, how.batch, how.target_share, how.precision, how.kernels, how.replay,
        )  # fmt: skip
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def _train_stage(groups: Sequence[list[Run]], results: Path, place: torch.device, processes: Processes) -> list[str]:
    """Trains what has no result; what another process is training is left for the end, and waited for."""
    failures, waiting = [], []
    for group in groups:
        found, busy = _train_free(group, results, place, processes)
        failures, waiting = failures + found, waiting + [busy]
    for busy in waiting:
        while busy:
            print(f"{busy[0].method}: another process is training it, waiting", flush=True)
            with locked(busy[0], results, wait=True):
                pass
            records = {run: read_manifest(run_folder(run, results)) for run in busy}
            failed = {run: record["error"] for run, record in records.items() if record.get("status") == "failed"}
            found, busy = _train_free([run for run in busy if run not in failed], results, place, processes)
            failures += [*failed.values(), *found]
    return failures


def _train_free(
    group: Sequence[Run], results: Path, place: torch.device, processes: Processes
) -> tuple[list[str], list[Run]]:
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
    if lost := dict.fromkeys(needed.method for needed in group[0].needed_runs() if not is_done(needed, results)):
        return [f"{run.method}: what it needs ({', '.join(lost)}) has no result" for run in missing.values()], []
    with ExitStack() as locks:
        mine = {key for key in sorted(missing) if locks.enter_context(locked(missing[key], results))}
        busy = [run for key, run in missing.items() if key not in mine]
        free = [run for key, run in missing.items() if key in mine and not is_done(run, results)]
        return [str(failure) for failure in train_missing(free, results, place, 1, processes)] if free else [], busy


def train_missing(
    group: list[Run], results: Path, device: torch.device, parts: int = 1, processes: Processes = ALONE
) -> list[TrainingError]:
    """Trains one cohort, whose locks are held, and saves each of its runs; returns the failures of single runs.

    Where the GPU's memory does not hold all runs, its halves are trained one after the other; where it does not hold
    one, its batch is split into `parts`, twice as many each time.
    """
    try:
        return _train(group, results, device, parts, processes)
    except torch.OutOfMemoryError as error:
        if processes.size > 1:  # the others are still at it
            raise
        cause = str(error).splitlines()[0]
    gc.collect()  # the runs of the failed try: its traceback held their tensors until here
    torch.cuda.empty_cache()
    if len(group) > 1:
        print(f"{len(group)} runs at once do not fit into memory ({cause}): trained in two halves", flush=True)
        half = len(group) // 2
        return [failure for some in (group[:half], group[half:]) for failure in train_missing(some, results, device)]
    run = group[0]
    batch, parts = run.optimisation.batch, 2 * parts
    text = f"{run.method}: batches of {2 * batch // parts} {run.preprocessing.unit} do not fit into memory ({cause})"
    if batch // parts >= 2:  # a contrast needs two images
        print(f"{text}: split into {parts} parts, whose losses are not those of the whole", flush=True)
        return train_missing(group, results, device, parts)
    record = manifest_header(run, run_source(run, results), results, device)
    return [fail(run, run_folder(run, results), record, TrainingError(text))]


def train_group(
    group: list[Run], results: Path, device: torch.device, parts: int, processes: Processes
) -> list[RunState]:
    """Trains one cohort, from its checkpoints where there are some.

    Args:
        parts: micro-batches of a step; processes: that train it together, of which the first one writes.
    """
    run = group[0]
    fold, bank = run_source(run, results).folds[run.fold], run_bank(run, results)
    train, slices = training_part(run, fold, bank), len(bank.select(fold.train))
    val = bank.select(fold.test if run.protocol.test_selection else fold.val)
    teachers = {
        name: untrained(teacher, len(bank.classes), device) if run.recipe.teacher == "random"
        else trained(teacher, len(bank.classes), results, device)
        for name, teacher in run.teacher_runs().items() if any(each.is_taught for each in group)
    }  # fmt: skip
    with precision(run.optimisation.precision):
        return train_cohort(
            group,
            train.to(device),
            val.to(device),
            steps_per_epoch(run, slices),
            device,
            teachers,
            epochs_of(run, slices),
            [dataclasses.replace(checkpoint_of(run, results), read_only=processes.rank > 0) for run in group],
            parts,
            processes=processes,
            initial=initial_weights(group, run.origin, len(bank.classes), results, device),
        )


def initial_weights(
    group: Sequence[Run], origin: Run | None, classes: int, results: Path, device: torch.device
) -> dict[Run, dict[str, Tensor]]:
    """The weights that runs of a pruned network begin with; others begin with those of their seed.

    Args:
        origin: the run whose network theirs is pruned from, see `Run.origin`.
    """
    if origin is None:
        return {}
    larger = trained(origin, classes, results, device)
    return {run: prune_into(larger, new_model(run, classes)).state_dict() for run in group}


def _train(
    group: list[Run], results: Path, device: torch.device, parts: int, processes: Processes
) -> list[TrainingError]:
    """Trains one cohort and saves each of its runs; returns the failures of single runs."""
    found, bank = run_source(group[0], results), run_bank(group[0], results)
    checkpoints = [checkpoint_of(run, results) for run in group]
    records = [manifest_header(run, found, results, device, processes.size) for run in group]
    for checkpoint, record in zip(checkpoints, records, strict=True):
        remove_partial_files(checkpoint.folder)
        write_manifest(checkpoint.folder, record | {"status": "training"})
        checkpoint.log(f"training on {record['device']}, code {CODE_HASH}")
    try:
        processes.broadcast((group, results, parts))  # the others train with this one: see `kdlib.experiments.parallel`
        states = train_group(group, results, device, parts, processes)
        parts_of = zip(states, checkpoints, records, strict=True)
        with precision(group[0].optimisation.precision):
            return [error for each in parts_of if (error := _finish(*each, bank, found))]
    except (torch.OutOfMemoryError, InputError):  # the caller tries again, or nothing can be written
        raise
    except Exception as error:
        for run, checkpoint, record in zip(group, checkpoints, records, strict=True):
            if not is_done(run, results):
                fail(run, checkpoint.folder, record, error)
        raise


def _finish(
    state: RunState, checkpoint: Checkpoint, record: dict, bank: Bank, found: TrainingData
) -> TrainingError | None:
    """Saves a trained run, or its failure."""
    folder = checkpoint.folder
    if state.failure is not None:
        if isinstance(state.failure, TrainingError):  # from a state that has failed, it would fail again
            checkpoint.delete()
        return fail(state.run, folder, record, state.failure)
    try:
        save_run(state, bank, found, record, folder)
    except TrainingError as error:
        return fail(state.run, folder, record, error)
    checkpoint.delete()
    checkpoint.log("done")
    if listing := os.environ.get("KDLIB_TRAINED"):  # whoever runs the notebook puts its executed copy there
        with open(listing, "a", encoding="utf-8") as file:
            file.write(f"{folder}\n")
    return None


def save_run(state: RunState, bank: Bank, found: TrainingData, record: dict, folder: Path) -> None:
    """Evaluates the best weights on the test patients and writes the run folder, its manifest last.

    Raises:
        TrainingError: a case that cannot be evaluated.
        InputError: the folder cannot be written.
    """
    run, fold = state.run, found.folds[state.run.fold]
    save_tensors(state.model.state_dict(), folder / "last.safetensors")
    save_tensors(state.best, folder / "best.safetensors")
    if state.best_distiller:
        save_tensors(state.best_distiller, folder / "projectors.safetensors")
    state.model.load_state_dict(state.best)
    begin = time.perf_counter()
    test = bank.select(fold.test).to(next(state.model.parameters()).device)
    tables, examples, faults, cause = [], [], [], None
    for case in fold.test:
        try:
            table, (example,) = evaluate(state.model, test, found.dataset, [case], run.threshold)
            tables.append(table)
            examples.append(example)
        except Exception as error:  # whatever a bad file raises, it must name the case and cost this run alone
            faults.append(f"case {case} cannot be evaluated ({type(error).__name__}: {error})")
            cause = error
    if faults:
        text = "; ".join(faults)
        raise TrainingError(f"{run.label}: {text}; fix it and run again, the training is kept") from cause
    metrics = pd.concat(tables, ignore_index=True)
    metrics["patient"] = metrics["case"].map(fold.groups)
    parts = {
        part: np.stack([example[part] for example in examples]) for part in ("name", "image", "truth", "prediction")
    }
    write_csv(folder / "history.csv", pd.DataFrame(state.history))
    write_csv(folder / "metrics.csv", metrics)
    write_arrays(folder / "slices.npz", parts)
    record = record | {
        "adapters": state.distiller.describe() if state.distiller is not None else {},
        "parameters": count_parameters(state.model),
        "best": {"epoch": state.best_epoch, "val_dice": state.best_dice},
        "steps": state.step,
        "sessions": state.sessions,
        "micro_batches": max(session["micro_batches"] for session in state.sessions),
        "seconds": {"training": round(state.seconds, 1), "evaluation": round(time.perf_counter() - begin, 1)},
        "status": "done",
    }
    write_manifest(folder, record)
