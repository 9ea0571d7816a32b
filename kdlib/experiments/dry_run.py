"""What a study would train, and for how long, without training it: `make study DRY=1`."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from kdlib.config import Run, from_json
from kdlib.data.slices import place_case
from kdlib.evaluation.cases import evaluate
from kdlib.experiments.designs import requested_runs
from kdlib.experiments.runner import cohorts
from kdlib.experiments.source import run_bank, run_source, training_part
from kdlib.experiments.store import is_done, read_manifest, run_key, untrained
from kdlib.training.device import one_thread, pick_device, precision
from kdlib.training.loop import train_cohort
from kdlib.training.schedule import epochs_of, steps_per_epoch
from kdlib.training.state import RunState
from kdlib.training.validation import volume_dice

TIMED = 4  # steps that a step is timed by


def steps_of(run: Run, results: Path) -> int:
    """Steps of a training; where the profile fixes none, slices are counted by the headers of the scans."""
    slices = slices_of(run, results)
    return epochs_of(run, slices) * steps_per_epoch(run, slices)


def slices_of(run: Run, results: Path) -> int:
    """Slices of all training patients, by the headers of the scans; or patches of them.

    0 where the profile fixes the steps, so that nobody counts them.
    """
    if run.profile.teacher_steps and run.profile.student_steps:
        return 0
    found = run_source(run, results)
    train = set(found.folds[run.fold].train)
    if run.preprocessing.dimensions == 3:
        return len(run_bank(run, results).select(list(train)))
    return sum(place_case(case, run.preprocessing).depth for case in found.dataset.cases if case.name in train)


def _kind(run: Run, device: str) -> dict[str, object]:
    """What the time of a step depends on."""
    view, distilled = run.preprocessing, run.teacher is not None
    return {"model": run.model, "distilled": distilled, "width": run.profile.width, "size": view.size,
            "dims": view.dimensions, "batch": run.optimisation.batch, "device": device}  # fmt: skip


def past_runs(results: Path) -> pd.DataFrame:
    """Seconds per step and of evaluation, on a CPU of one core, of every finished run in `results`, and what they
    depend on."""
    rows = []
    for folder in sorted((results / "runs").glob("*")):
        record = read_manifest(folder)
        if record.get("status") != "done":
            continue
        run, seconds = from_json(record["run"]), record["seconds"]
        cores = record["threads"] if record["device"] == "cpu" else 1  # times of one core
        pace = cores * seconds["training"] / record["steps"]
        times = {"method": run.method, "pace": pace, "evaluation": seconds["evaluation"]}
        rows.append(_kind(run, record["device"]) | times)
    return pd.DataFrame(rows)


def seconds_of(run: Run, past: pd.DataFrame, steps: int, device: str) -> float | None:
    """What a run will take, by the median of similar runs; None where none was trained before.

    Similar are runs of the same method, else of the same model with (or without) a teacher; size and device alike.
    """
    if past.empty:
        return None
    for name, value in _kind(run, device).items():
        past = past[past[name] == value]
    same = past[past["method"] == run.method]
    like = same if len(same) else past
    return None if like.empty else float(like["pace"].median() * steps + like["evaluation"].median())


def timed(group: Sequence[Run], results: Path, device: torch.device) -> tuple[float, float, float]:
    """Seconds of one training step, of one validation, and of the evaluation of the test patients, each of one run of
    a cohort: measured on its own data with networks that have learned nothing, on a CPU with one core."""
    run = group[0]
    fold, bank = run_source(run, results).folds[run.fold], run_bank(run, results)
    train = training_part(run, fold, bank).to(device)
    val = bank.select(fold.val[:1]).to(device)  # a case stands for all
    teachers = {name: untrained(teacher, len(bank.classes), device) for name, teacher in run.teacher_runs().items()}

    def train_for(count: int) -> float:
        states.extend(train_cohort(group, train, val, count, device, teachers, epochs=1))
        return sum(state.seconds for state in states[-len(group) :])

    states: list[RunState] = []
    with one_thread(), precision(run.optimisation.precision), contextlib.redirect_stderr(io.StringIO()):
        train_for(1)  # the first pass chooses kernels and allocates
        short, long = min(train_for(1), train_for(1)), train_for(1 + TIMED)  # whatever else runs only adds time
        begin = time.perf_counter()
        volume_dice(states[0].model, val)
        validation = (time.perf_counter() - begin) * len(fold.val)
        begin = time.perf_counter()
        one = bank.select(fold.test[:1])
        evaluate(states[0].model, one.to(device), run_source(run, results).dataset, one.cases)
        evaluation = (time.perf_counter() - begin) * len(fold.test)
    return (long - short) / TIMED / len(group), validation, evaluation


def foretell(runs: Sequence[Run], past: pd.DataFrame, results: Path, device: torch.device) -> dict[Run, float]:
    """Seconds that each of these runs will take: by similar past runs, else by a few timed steps of its cohort."""
    name = str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)
    found = {run: seconds_of(run, past, steps_of(run, results), name) for run in runs}
    measured: dict[tuple, tuple[float, float, float]] = {}
    for group in cohorts(run for run in runs if found[run] is None):
        alike = tuple((run.method, run.profile, run.effective_recipe, run.optimisation) for run in group)
        if alike not in measured:  # another fold, seed or way of evaluating takes as long
            measured[alike] = timed(group, results, device)
        step, validation, evaluation = measured[alike]
        for run in group:
            epochs = epochs_of(run, slices_of(run, results))
            found[run] = steps_of(run, results) * step + epochs * validation + evaluation
    return found


def describe(plan: Mapping[str, object]) -> str:
    """The plan of a study in words.

    Args:
        plan: "shared" (with "results" and "device") and "parameters", by notebook.
    """
    shared, parameters = plan["shared"], plan["parameters"]
    results, place = Path(shared["results"]), pick_device(shared["device"])
    asked: dict[str, dict[str, Run]] = {name: {} for name in parameters}
    for name, runs in asked.items():
        for run in requested_runs(name, parameters[name]):
            runs.setdefault(run_key(run, results), run)  # of two that are one, the first is trained
    missing = {key: run for runs in asked.values() for key, run in runs.items() if not is_done(run, results)}
    past = past_runs(results)
    seconds = foretell(list(missing.values()), past, results, place)
    lines, left = [], dict(missing)
    for name, runs in asked.items():
        done = sum(key not in missing for key in runs)
        lines.append(f"{name}: {len(runs)} runs, {done} of them done" if runs else f"{name}: no runs")
        for key in runs:
            if run := left.pop(key, None):
                lines.append(f"    {run.label}: {steps_of(run, results)} steps, {_time(seconds[run])}, runs/{key}")
    end = f"to train: {len(missing)} runs"
    if missing:
        total, cores = sum(seconds.values()), len(os.sched_getaffinity(0))
        if place.type == "cpu":
            end += f", about {_time(total)} on one core, {_time(total / cores)} on the {cores} of this machine"
        else:
            end += f", about {_time(total)} on {torch.cuda.get_device_name(place)}"
        end += f"; by similar runs in {results}, else by a few timed steps"
    return "\n".join([*lines, end])


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
