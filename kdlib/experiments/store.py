"""Run folders: under which key a run is kept, its manifest, its weights and who holds its lock.

`results/runs/<key>/` holds `best.safetensors`, `last.safetensors`, `projectors.safetensors` (of a distilled run),
`history.csv`, `metrics.csv`, `slices.npz`, `log.txt`, `notebook.ipynb` (the executed notebook that trained it) and
`manifest.json`. A run is done when the manifest says so, which is written last and names the hash of each file; until
then it says "training", or "failed" and why. Such a run is trained again, from `checkpoint.safetensors` where there is
one. Whoever trains a run holds the lock of its folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn

from kdlib.config import STUDENTS, TEACHERS, InputError, Run, TrainingError, lookup, to_json
from kdlib.experiments.identity import identity
from kdlib.experiments.source import TrainingData, run_source
from kdlib.files import sha256, write_error, write_json
from kdlib.losses import LOSSES
from kdlib.models import CHANNELS_LAST, MODELS
from kdlib.record import FORMAT, read_manifest
from kdlib.training.checkpoint import CODE, CODE_HASH, Checkpoint, load_weights
from kdlib.training.device import precision_on
from kdlib.training.state import new_model

OUTPUTS = (
    "best.safetensors", "last.safetensors", "projectors.safetensors", "history.csv", "metrics.csv", "slices.npz",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------- what


def run_key(run: Run, results: Path) -> str:
    """A hash of what a run is: two with the same key have the same result on one machine and version of the code."""
    return hashlib.sha256(json.dumps(key_facts(run, results), sort_keys=True).encode()).hexdigest()[:16]


def key_facts(run: Run, results: Path) -> dict[str, object]:
    """What a run is, as JSON values: all that its key depends on.

    That is its model, recipe, seed, view, length and optimisation, the published faults that are kept in selection and
    evaluation, the files and folds of its data (not their path: a moved folder keeps its runs), and the keys of the
    teachers that it learns from and of the network that it is pruned from. Device and versions stand in the manifest
    instead: a run made elsewhere is not trained again; neither is one of precision "auto", which is what its machine
    computes fast.
    """
    profile, protocol = run.profile, run.protocol
    length = [profile.teacher_epochs, profile.teacher_steps]
    if not run.is_teacher:
        more = {  # the teacher's batch decides on its steps where the profile does not
            "teacher+student": length + [profile.teacher.batch] * (profile.teacher_steps is None),
            "wall_clock": [profile.step_cost],
        }
        length = [profile.student_epochs, profile.student_steps, *more.get(run.effective_recipe.budget, [])]
    recipe = _chosen(run.effective_recipe, warmup=0.0) | {"name": "", "control": ""}
    if run.effective_recipe.smoothing:  # a key of its own: before, the labels of Dice were smoothed, too
        recipe["smoothing"] = ["cross entropy", run.effective_recipe.smoothing]
    named = {term.loss: lookup("distillation loss", term.loss, LOSSES) for term in run.effective_recipe.terms}
    texts = {name: text for name, loss in sorted(named.items()) if (text := _text_from_outside(loss))}
    return {
        "data": run_source(run, results).digest,
        "run": [run.model, run.fold, run.fraction, run.seed],
        "recipe": recipe,
        "preprocessing": _chosen(run.preprocessing, dimensions=2),
        "length": length if run.length == 1 else [*length, run.length],
        "width": profile.width if run.model in TEACHERS else None,
        "network": _architecture(run),
        "optimisation": _chosen(run.optimisation, precision="auto", kernels="plain", replay=None),
        "faults": [protocol.test_selection, protocol.pooled_dice, run.threshold],
        "teacher": [run_key(teacher, results) for teacher in run.teacher_runs().values()] if run.is_taught else [],
        **({"losses": texts} if texts else {}),
        **({"origin": run_key(run.origin, results)} if run.origin else {}),
    }


def _chosen(description: object, **later: object) -> dict[str, object]:
    """The fields of a description, without those that came `later` and are at the value that runs before them had."""
    fields = dataclasses.asdict(description)
    return {name: value for name, value in fields.items() if (name, value) not in later.items()}


def _text_from_outside(loss: type) -> str:
    """Hash of the code of a loss, as far as it is not kdlib's or torch's own: its name alone says nothing of it.

    That is the text of its methods, and its plain attributes: of a class in a notebook there is no text as a whole.

    Raises: InputError: there is no text, as of methods typed at a prompt.
    """
    kinds = [kind for kind in loss.__mro__ if kind.__module__.partition(".")[0] not in ("kdlib", "torch", "builtins")]
    parts = []
    for name, value in (item for kind in kinds for item in sorted(vars(kind).items(), key=lambda item: item[0])):
        method = getattr(value, "__func__", getattr(value, "fget", value))
        if inspect.isfunction(method):
            try:
                parts.append(inspect.getsource(method))
            except OSError:
                asked = f"loss {loss.name!r}: its code cannot be read, so its results are not told from those of others"
                raise InputError(f"{asked}; define it in a file, or in a cell of a notebook") from None
        elif isinstance(value, str | int | float | tuple) and not name.startswith("__"):
            parts.append(f"{name} = {value!r}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if kinds else ""


def _architecture(run: Run) -> list | None:
    """The layers of a network from outside, in words, and its scales: its name alone says nothing of them."""
    if run.model in TEACHERS + STUDENTS:
        return None
    view = run.preprocessing
    with torch.device("meta"):  # no weights: they come from the seed
        network = lookup("model", run.model, MODELS)(view.dimensions, view.input_shape[0], 1)
    return [str(network), network.scales]


def run_folder(run: Run, results: Path) -> Path:
    return results / "runs" / run_key(run, results)


# ----------------------------------------------------------------------------------------------------------- manifests


def is_done(run: Run, results: Path) -> bool:
    return read_manifest(run_folder(run, results)).get("status") == "done"


def manifest(run: Run, results: Path | str = "results") -> dict:
    """The metadata of a finished run: its parameters, data, adapters, timings and versions.

    Raises:
        InputError: the run is not finished.
    """
    record = read_manifest(run_folder(run, Path(results).resolve()))
    if record.get("status") != "done":
        raise InputError(f"{run.method} has no result in {results}: train it first")
    return record


def manifests(keys: Iterable[str], results: Path | str) -> dict[str, dict]:
    """Key -> manifest of finished runs, then those of the teachers that they learned from or were pruned from.

    Raises:
        InputError: runs without a manifest of a finished training, all named; or what `read_manifest` refuses.
    """
    folder = Path(results) / "runs"
    found = {key: read_manifest(folder / key) for key in keys}
    missing = [key for key, record in found.items() if record.get("status") != "done"]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(found)} runs are not finished in {folder} ({', '.join(missing[:8])}): bring their "
            "folders back, or run the study again"
        )
    needed = [key for each in found.values() for key in [*each["teachers"].values(), each.get("origin")]]
    records = {key: read_manifest(folder / key) for key in dict.fromkeys(needed) if key and key not in found}
    return found | {key: record for key, record in records.items() if record.get("status") == "done"}


def manifest_header(run: Run, found: TrainingData, results: Path, device: torch.device, processes: int = 1) -> dict:
    """What is known of a run before it is trained: the first part of its manifest."""
    fold = found.folds[run.fold]
    parts = {"train": fold.subset(run.fraction), "val": fold.val, "test": fold.test}
    notebook = os.environ.get("KDLIB_NOTEBOOK")
    return {
        "format": FORMAT,
        "key": run_key(run, results),
        "identity": identity(run),
        "run": to_json(run) | {"data": found.dataset.name},
        "effective_recipe": dataclasses.asdict(run.effective_recipe),
        "seeds": {"run": run.seed, "teacher": run.teacher_seed},
        "teachers": {name: run_key(teacher, results) for name, teacher in run.teacher_runs().items()},
        "origin": run_key(run.origin, results) if run.origin else None,
        "data": {
            "digest": found.digest,
            "fold_digest": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
            "modality": found.dataset.modality,
            "classes": list(found.classes),
        }
        | parts,
        "code": {"hash": CODE_HASH, "files": CODE},
        "git": git_state(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "precision": precision_on(device, run.preprocessing.dimensions, run.optimisation.precision),
        **machine(),
        "processes": processes,
        "notebook": os.path.relpath(notebook, results) if notebook else None,
        "started": _now(),
    }


def write_manifest(folder: Path, record: dict) -> None:
    """Writes a run's manifest; of a finished run with the hash of each file that it names as its result."""
    if record.get("status") == "done":
        made = [name for name in OUTPUTS if (folder / name).is_file()]
        record = record | {"finished": _now(), "files": {name: sha256(folder / name) for name in made}}
    write_json(folder / "manifest.json", record)


def fail(run: Run, folder: Path, record: dict, failure: Exception) -> TrainingError:
    """Leaves the cause of a failure, and how to try again, in a run's manifest and log; returns the failure."""
    again = os.environ.get("KDLIB_RERUN", "call kdlib.study with this run again")
    error = failure if isinstance(failure, TrainingError) else TrainingError(f"{run.method}: {failure}")
    record = record | {"failed": _now(), "status": "failed", "error": str(error), "rerun": again}
    write_manifest(folder, record)
    Checkpoint(folder, {}).log("failed: " + "".join(traceback.format_exception(failure)).rstrip())
    return error


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


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# ------------------------------------------------------------------------------------------------------ weights, locks


def untrained(run: Run, classes: int, device: torch.device) -> nn.Module:
    """The network of a run with its initial weights, frozen, in eval mode."""
    layout = CHANNELS_LAST[run.preprocessing.dimensions]
    return new_model(run, classes).to(device, memory_format=layout).eval().requires_grad_(False)


def trained(run: Run, classes: int, results: Path, device: torch.device) -> nn.Module:
    """The network of a finished run with its best weights, frozen, in eval mode."""
    model = untrained(run, classes, device)
    load_weights(model, run_folder(run, results) / "best.safetensors")
    return model


def checkpoint_of(run: Run, results: Path) -> Checkpoint:
    identity = json.loads(json.dumps(key_facts(run, results)))
    return Checkpoint(run_folder(run, results), identity, git_state()["commit"])


@contextmanager
def locked(run: Run, results: Path, wait: bool = False) -> Iterator[bool]:
    """Holds the lock of a run's folder; yields False where another process holds it and is not waited for.

    The operating system keeps it, and frees it when its holder dies.
    """
    folder = run_folder(run, results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".lock").acquire(blocking=wait)
    except Timeout:
        yield False
        return
    except OSError as error:
        raise write_error(folder, error) from None
    with held:
        yield True
