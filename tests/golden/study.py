"""The frozen study: small trainings of every kind on the phantom, and the numbers that they must go on giving.

    python tests/golden/study.py    # regenerates the golden files; say in the commit why they changed

They hold to the bit for one version of PyTorch on one kind of processor, both named in `machine.txt`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

from kdlib import (
    PROTOCOLS,
    Run,
    comparison_losses,
    controls,
    distiller,
    override_profile,
    study,
    thesis_recipe,
)
from kdlib.config import Optimisation, Preprocessing
from kdlib.data import make_phantom
from kdlib.experiments.store import run_folder

HERE = Path(__file__).parent


def golden_runs(results: Path) -> dict[str, Run]:
    """Every kind of run by a name, of one fold: networks, fractions, teachers, controls, losses, protocols, classes."""
    tiny = dict(width=0.125, folds=3, teacher_epochs=2, student_epochs=2, teacher_steps=4, student_steps=4)
    profile = dataclasses.replace(  # the golden files outlive a change of the profile
        override_profile("quick", tiny),
        preprocessing=Preprocessing(64, 5.0),
        teacher=Optimisation(lr=2e-3, target_share=1 / 3),
        student=Optimisation(lr=8e-3, target_share=1 / 3),
        step_cost=3.0,
    )
    data = make_phantom(results / "golden-phantom", patients=16)
    whole = dict(data=str(data), target="spleen", profile=profile)
    runs = {}
    for model in ("T1", "T2"):
        runs[model] = Run(model=model, **whole)
    for model in ("S1", "S2"):
        for fraction in (1.0, 0.5):
            runs[f"{model} {fraction}"] = Run(model=model, fraction=fraction, **whole)
    for teacher in ("T1", "T2", "T1+T2"):
        for model in ("S1", "S2"):
            taught = dict(teacher=teacher, recipe=thesis_recipe(model), fraction=0.5)
            runs[f"KD {teacher} {model}"] = Run(model=model, **taught, **whole)
    half = dict(whole, fraction=0.5)
    for number, run in enumerate(controls("S1", "T1", **half)):
        runs[f"control {number}"] = run
    for loss in comparison_losses():
        runs[f"loss {loss}"] = Run(model="S1", teacher="T1", recipe=distiller(loss, "S1"), **half)
    published = dict(protocol=PROTOCOLS["thesis"])
    runs["thesis T1"] = Run(model="T1", **whole, **published)
    runs["thesis S1"] = Run(model="S1", **half, **published)
    runs["thesis KD"] = Run(model="S1", teacher="T1", recipe=thesis_recipe("S1"), **half, **published)
    classes = dict(half, target="all")
    runs["all KD"] = Run(model="S2", teacher="T1", recipe=thesis_recipe("S2"), **classes)
    return runs


def machine() -> str:
    """What the last bits of a training depend on besides the code."""
    bf16 = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {bf16}"


def weights_hash(path: Path) -> str:
    """A hash of names and values of a safetensors file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def measure(runs: dict[str, Run], results: Path) -> dict[str, pd.DataFrame]:
    """Trains the runs and returns the tables `metrics`, `history` and `weights`, a row per number, run by name."""
    study(runs.values(), results, "cpu")
    tables: dict[str, list[pd.DataFrame]] = {"metrics": [], "history": [], "weights": []}
    for name, run in runs.items():
        folder = run_folder(run, results)
        metrics = pd.read_csv(folder / "metrics.csv", dtype=dict.fromkeys(("case", "class"), str))
        metrics = metrics[metrics["metric"].isin(["dice", "hd95", "nsd"])]
        label = metrics["case"] + " " + metrics["class"] + " " + metrics["metric"]
        tables["metrics"].append(pd.DataFrame(dict(run=name, name=label, value=metrics["value"])))
        history = pd.read_csv(folder / "history.csv")
        tables["history"].append(history[["epoch", "name", "value"]].assign(run=name))
        hashes = {part: weights_hash(folder / f"{part}.safetensors") for part in ("best", "last")}
        tables["weights"].append(pd.DataFrame([dict(run=name, **hashes)]))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "golden-results")
    for name, table in measure(golden_runs(folder), folder).items():
        table.to_csv(HERE / f"{name}.csv", index=False)
    HERE.joinpath("machine.txt").write_text(f"{machine()}\n")
