"""What a study would train, and for how long, without training it: `make study DRY=1`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch

from kdlib.config import Run, from_json
from kdlib.experiments.designs import requested_runs
from kdlib.experiments.source import run_source
from kdlib.experiments.store import is_done, read_manifest, run_key
from kdlib.training.device import pick_device
from kdlib.training.schedule import epochs_of, steps_per_epoch


def steps_of(run: Run, results: Path) -> int:
    """Steps of a training; where the profile fixes none, slices are counted by the headers of the scans."""
    found = run_source(run, results)
    train = set(found.folds[run.fold].train)
    slices = sum(case.shape[2] for case in found.dataset.cases if case.name in train)
    return epochs_of(run, slices) * steps_per_epoch(run, slices)


def past_runs(results: Path) -> pd.DataFrame:
    """Seconds per step and seconds of evaluation of every finished run in `results`, and what they depend on."""
    rows = []
    for folder in sorted((results / "runs").glob("*")):
        record = read_manifest(folder)
        if record.get("status") != "done":
            continue
        run, steps = from_json(record["run"]), record["steps"]
        rows.append(
            dict(
                model=run.model, distilled=run.teacher is not None, method=run.method, device=record["device"],
                size=run.preprocessing.size, width=run.profile.width, pace=record["seconds"]["training"] / steps,
                evaluation=record["seconds"]["evaluation"],
            )
        )  # fmt: skip
    return pd.DataFrame(rows)


def seconds_of(run: Run, past: pd.DataFrame, steps: int, device: str) -> float | None:
    """What a run will take, by the median of similar runs; None where none was trained before.

    Similar are runs of the same method, else of the same model with (or without) a teacher; size and device alike.
    """
    if past.empty:
        return None
    like = past[
        (past["model"] == run.model) & (past["size"] == run.profile.preprocessing.size) & (past["device"] == device)
    ]
    like = like[(like["width"] == run.profile.width) & (like["distilled"] == (run.teacher is not None))]
    same = like[like["method"] == run.method]
    like = same if len(same) else like
    return None if like.empty else float(like["pace"].median() * steps + like["evaluation"].median())


def describe(plan: Mapping[str, object]) -> str:
    """The plan of a study in words.

    Args:
        plan: "shared" (with "results" and "device") and "parameters", by notebook.
    """
    shared = plan["shared"]
    results, lines, total, unknown, seen = Path(shared["results"]), [], 0.0, 0, set()
    place = pick_device(shared["device"])
    device = str(place) if place.type == "cpu" else torch.cuda.get_device_name(place)
    past = past_runs(results)
    for name, parameters in plan["parameters"].items():
        runs = {run_key(run, results): run for run in requested_runs(name, parameters)}
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
            lines.append(f"    {run.method}, {place}: {steps} steps, {time}, runs/{key}")
    end = f"to train: {len(seen)} runs"
    if seen:
        known = (
            f"about {_time(total)} of {device}, by past runs in {results}" if unknown < len(seen) else "time unknown"
        )
        end += f", {known}" + (f"; {unknown} with no similar run" if 0 < unknown < len(seen) else "")
    return "\n".join([*lines, end])


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
