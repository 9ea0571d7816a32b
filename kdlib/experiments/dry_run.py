"""What a study would train, and for how long, without training it: `make study DRY=1`.

A notebook says itself which runs it wants: its cells are run here up to each `kdlib.study`, which only takes note.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import pandas as pd
import torch

import kdlib
from kdlib.config import InputError, Run
from kdlib.experiments.runs import is_done, read_manifest, run_key, run_source
from kdlib.training.device import pick_device
from kdlib.training.loop import epochs_of, steps_per_epoch

ASKING = "kdlib.study("


class DryRun(Exception):
    """Ends a cell in place of training."""


def requested_runs(notebook: Path, parameters: Mapping[str, object]) -> list[Run]:
    """The runs that a notebook asks `kdlib.study` for, and their teachers.

    Its cells are run up to the first study; of the rest, which draws results that may not be there, only those that
    ask for more runs.

    Raises:
        InputError: the notebook's own, of parameters that it cannot use.
    """
    runs: list[Run] = []
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    if not any(ASKING in cell.source for cell in cells):
        return runs

    def note(asked: Sequence[Run], *_: object) -> None:
        runs.extend(teacher for run in asked for teacher in run.teacher_runs().values())
        runs.extend(asked)
        raise DryRun

    names: dict[str, object] = {}
    kdlib.study = note
    try:
        for cell in cells:
            if runs and ASKING not in cell.source:
                continue
            with contextlib.suppress(DryRun):
                exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names.update(parameters)
    finally:
        del kdlib.study
    return list(dict.fromkeys(runs))


def steps_of(run: Run, results: Path) -> int:
    """Steps of a training; where the profile fixes none, slices are counted by the headers of the scans."""
    found = run_source(run, results)
    train = set(found.folds[run.fold].train)
    slices = sum(case.shape[2] for case in found.dataset.cases if case.name in train)
    return epochs_of(run, slices) * steps_per_epoch(run, slices)


def past_runs(results: Path) -> pd.DataFrame:
    """Seconds a step and seconds of evaluation of every finished run in `results`, and what they depend on."""
    rows = []
    for folder in sorted((results / "runs").glob("*")):
        record = read_manifest(folder)
        if record.get("status") != "done":
            continue
        run, profile = record["run"], record["run"]["profile"]
        fixed = profile["teacher_steps" if run["recipe"]["name"] == "teacher" else "student_steps"]
        steps = record.get("steps") or (fixed or 0) * len(pd.read_csv(folder / "history.csv")["epoch"].unique())
        if steps:
            rows.append(
                dict(
                    model=run["model"], taught=run["teacher"] is not None, recipe=run["recipe"]["name"],
                    size=profile["preprocessing"]["size"], width=profile["width"], device=record["device"],
                    pace=record["seconds"]["training"] / steps, evaluation=record["seconds"]["evaluation"],
                )
            )  # fmt: skip
    return pd.DataFrame(rows)


def seconds_of(run: Run, past: pd.DataFrame, steps: int, device: str) -> float | None:
    """What a run will take, by the median of its like; None where nothing like it was trained before.

    Its like have its model, size of slices and device, the same recipe if there are such, else at least a teacher too.
    """
    if past.empty:
        return None
    like = past[
        (past["model"] == run.model) & (past["size"] == run.profile.preprocessing.size) & (past["device"] == device)
    ]
    like = like[(like["width"] == run.profile.width) & (like["taught"] == (run.teacher is not None))]
    same = like[like["recipe"] == run.recipe.name]
    like = same if len(same) else like
    return None if like.empty else float(like["pace"].median() * steps + like["evaluation"].median())


def describe(plan: Mapping[str, object]) -> str:
    """The plan of a study (see `kdlib.apps.engine.run_jobs`) in words."""
    shared = plan["shared"]
    results, lines, total, unknown, seen = Path(shared["results"]), [], 0.0, 0, set()
    place = pick_device(shared["device"])
    device = str(place) if place.type == "cpu" else torch.cuda.get_device_name(place)
    past = past_runs(results)
    for name, parameters in plan["parameters"].items():
        runs = {
            run_key(run, results): run for run in requested_runs(Path(plan["notebooks"], f"{name}.ipynb"), parameters)
        }
        missing = {key: run for key, run in runs.items() if not is_done(run, results)}
        lines.append(
            f"{name}: {len(runs)} runs, {len(runs) - len(missing)} of them done" if runs else f"{name}: no runs"
        )
        for key, run in missing.items():
            if key in seen:
                continue
            steps = steps_of(run, results)
            seconds = seconds_of(run, past, steps, device)
            seen.add(key)
            total, unknown = total + (seconds or 0), unknown + (seconds is None)
            time = "time unknown" if seconds is None else _time(seconds)
            place = f"fold {run.fold}, seed {run.seed}"
            lines.append(f"    {run.name} ({run.recipe.name}), {place}: {steps} steps, {time}, runs/{key}")
    end = f"to train: {len(seen)} runs"
    if seen:
        known = (
            f"about {_time(total)} of {device}, by past runs in {results}" if unknown < len(seen) else "time unknown"
        )
        end += f", {known}" + (f"; {unknown} unlike any of them" if 0 < unknown < len(seen) else "")
    return "\n".join([*lines, end])


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


if __name__ == "__main__":
    try:
        print(describe(json.load(sys.stdin)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
