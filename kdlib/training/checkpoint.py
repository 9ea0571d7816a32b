"""What survives a stop: files that are whole or not there, the state of a training, and the code it was made by.

A checkpoint is one safetensors file: tensors, and the rest as readable JSON in its metadata. No pickle is written or
read. What a step draws comes from streams that depend on the seed and the step alone (`kdlib.training.loop`), so the number of
steps done is all that there is to keep of random states and of the order of the data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdlib.config import InputError
from kdlib.training import ranks

if TYPE_CHECKING:
    from kdlib.training.loop import RunState

FORMAT = 1  # of checkpoints

# ------------------------------------------------------------------------------------------------------- whole files


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: into a neighbour, onto the disk, then renamed. Of several ranks, rank 0 does.

    Raises:
        InputError: the file system refuses (full disk, read-only folder); what was finished before stays.
    """
    if ranks.rank():
        return
    partial = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")  # two hosts may share process ids
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(partial)
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from None
    finally:
        try:
            partial.unlink(missing_ok=True)
        except OSError:  # as little can be deleted as written
            pass


def _sync(path: Path) -> None:
    """A power cut after this leaves what is there now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(path: Path, error: Exception) -> InputError:
    """The one clear line for a file that could not be saved."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error).lower()
    cause = "the disk is full" if full else str(error)
    return InputError(f"{path} could not be saved: {cause}; mend that and run again, finished runs are kept")


def remove_partial_files(folder: Path) -> None:
    """Removes what a killed writer left half done in a run's folder; its lock must be held."""
    for partial in folder.glob(".????????????.*") if not ranks.rank() else ():
        partial.unlink()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes safetensors. Raises: InputError as `write`."""
    plain = _plain(tensors)
    write(path, lambda partial: safetensors.torch.save_file(plain, partial, dict(metadata or {})))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------- what made a run

# what a training or its evaluation passes through; drawing, statistics and notebooks read finished tables alone, and
# recipes are part of a run's key
SOURCES = (
    "config.py", "data/*.py", "evaluation/*.py", "experiments/runner.py", "experiments/source.py", "losses/*.py",
    "models/*.py", "training/*.py",
)  # fmt: skip


def _hash_sources() -> dict[str, str]:
    root = Path(__file__).resolve().parents[1]
    files = sorted(path for pattern in SOURCES for path in root.glob(pattern))
    return {
        f"kdlib/{path.relative_to(root).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in files
    }


CODE = _hash_sources()  # at import: a file that is edited later is not what this process runs
CODE_HASH = hashlib.sha256(json.dumps(CODE).encode()).hexdigest()[:16]


def differences(then: object, now: object, name: str = "") -> list[str]:
    """What differs between two descriptions made of JSON values, in words, e.g. "recipe.terms.0.weight 0.1 -> 0.2"."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        then, now = dict(enumerate(then)), dict(enumerate(now))
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [*then, *(key for key in now if key not in then)]
        parts = (differences(then.get(key), now.get(key), f"{name}.{key}" if name else str(key)) for key in keys)
        return [line for part in parts for line in part]
    return [] if then == now else [f"{name} {then} -> {now}"]


# --------------------------------------------------------------------------------------------------------- checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """Where one run's state is kept while it trains, and its log.

    Args:
        folder: of the run.
        identity: what the run is (see `kdlib.experiments.store.key_facts`), as JSON values.
        commit: of the code, for the reader of a refusal.
    """

    folder: Path
    identity: Mapping[str, object]
    commit: str | None = None

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def note(self, text: str) -> None:
        """Adds a line to the run's `log.txt`.

        Raises:
            InputError: it cannot be written.
        """
        if ranks.rank():
            return
        path = self.folder / "log.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            raise write_error(path, error) from None

    def save(self, arm: RunState) -> None:
        """Replaces the checkpoint by the arm's state as it is now. Raises: InputError as `write`."""
        tensors, record = pack(arm)
        head = {
            "format": FORMAT, "identity": self.identity, "code": CODE, "commit": self.commit,
            "checksum": _checksum(tensors), "names": list(tensors),
        }  # fmt: skip
        save_tensors(tensors, self.path, {"kdlib": json.dumps(head | record)})

    def restore(self, arm: RunState) -> bool:
        """Brings a new arm to where the checkpoint was saved; returns whether there is one.

        A damaged file is named in one line, and the arm starts anew.

        Raises:
            InputError: the checkpoint is of another recipe, data set, version of the code or newer version of kdlib.
        """
        if not self.path.is_file():
            return False
        try:
            tensors, record = _read(self.path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            text = f"{arm.label}: {self.path} is damaged ({error}): training starts anew"
            print(text, flush=True)
            self.note(text)
            return False
        self._refuse(record)
        unpack(arm, tensors, record)
        return True

    def _refuse(self, record: Mapping) -> None:
        remedy = "delete that file to start the training anew"
        if record["format"] > FORMAT:
            raise InputError(f"{self.path}: written by a newer version (format {record['format']}); update kdlib")
        if found := differences(record["identity"], self.identity):
            raise InputError(f"{self.path} is of another run: {'; '.join(found[:3])}; {remedy}")
        if found := [name for name in sorted(CODE | record["code"]) if CODE.get(name) != record["code"].get(name)]:
            commit = f", or check out commit {record['commit'][:9]}" if record["commit"] else ""
            raise InputError(f"{self.path} was made by another version of {', '.join(found)}: {remedy}{commit}")

    def delete(self) -> None:
        if not ranks.rank():
            self.path.unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of all values: safetensors itself only knows whether a file is as long as it should be."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), total)
    return total


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    with safe_open(path, framework="pt") as file:
        record = json.loads((file.metadata() or {})["kdlib"])
        if record["format"] > FORMAT:  # nothing else of it can be judged
            return {}, record
        # in the order of before, which rows of the history follow; copies, as the file may go
        tensors = {name: file.get_tensor(name).clone() for name in record["names"]}
    if _checksum(tensors) != record["checksum"]:
        raise ValueError("checksum differs")
    return tensors, record


def pack(arm: RunState) -> tuple[dict[str, Tensor], dict]:
    """The whole state of an arm: tensors by name, and JSON values."""
    parts: dict[str, Mapping[str, Tensor]] = {"model": arm.model.state_dict(), "best": arm.best}
    parts["best_projectors"] = arm.best_projectors
    if arm.distiller is not None:  # its projectors, and the memories of its terms
        parts["distiller"] = arm.distiller.state_dict()
    optimiser = arm.optimiser.state_dict()
    parts["optimiser"] = {f"{i}.{name}": v for i, state in optimiser["state"].items() for name, v in state.items()}
    record = {
        "step": arm.step, "best": [arm.best_epoch, arm.best_dice], "seconds": arm.seconds, "weights": arm.weights,
        "balanced": arm.balanced, "lr": [group["lr"] for group in optimiser["param_groups"]],
        "schedule": arm.schedule.state_dict(), "history": arm.history,
        "sessions": arm.sessions, "log": None,
    }  # fmt: skip
    if (log := arm.log) is not None and log.steps:
        parts["losses"], parts["magnitude"] = log.losses, log.magnitude
        parts["gradients"] = {f"{i}.{name}": v for name, seen in log.gradients.items() for i, v in enumerate(seen)}
        parts["projectors"] = {f"{i}.{name}": v for name, seen in log.projectors.items() for i, v in enumerate(seen)}
        record["log"] = {"steps": log.steps, "gradient_seen": sorted(log.gradient_seen), "decay": log.decay}
    tensors = {f"{part}/{name}": tensor for part, values in parts.items() for name, tensor in values.items()}
    return _plain(tensors), record


def unpack(arm: RunState, tensors: Mapping[str, Tensor], record: Mapping) -> None:
    """Gives a new arm the state that `pack` took."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, name = name.partition("/")
        parts.setdefault(part, {})[name] = tensor
    device = next(arm.model.parameters()).device
    arm.model.load_state_dict(parts["model"])
    if arm.distiller is not None:
        arm.distiller.load_state_dict(parts.get("distiller", {}))
    arm.best = {name: tensor.to(device) for name, tensor in parts.get("best", {}).items()}
    found = parts.get("best_projectors", {})
    arm.best_projectors = {name: tensor.to(device) for name, tensor in found.items()}
    _restore_optimiser(arm.optimiser, parts.get("optimiser", {}), record["lr"])
    arm.schedule.load_state_dict(dict(record["schedule"]))
    arm.step, arm.seconds, arm.history = record["step"], record["seconds"], record["history"]
    arm.sessions = record["sessions"]
    (arm.best_epoch, arm.best_dice), arm.weights = record["best"], dict(record["weights"])
    if record["log"] is not None:
        log = arm.begin_epoch()
        for name in ("losses", "magnitude"):
            getattr(log, name).update((key, value.to(device)) for key, value in parts.get(name, {}).items())
        for name in ("gradients", "projectors"):
            found: dict[str, list[Tensor]] = {}
            for key, value in parts.get(name, {}).items():
                found.setdefault(key.partition(".")[2], []).append(value.to(device))
            getattr(log, name).update(found)
        arm.balanced = record["balanced"]
        log.steps, log.gradient_seen, log.decay = (
            record["log"]["steps"],
            set(record["log"]["gradient_seen"]),
            record["log"]["decay"],
        )


def _restore_optimiser(optimiser: torch.optim.Optimizer, values: Mapping[str, Tensor], rates: list[float]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in values.items():
        index, _, name = name.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimiser.state_dict()["param_groups"]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    for parameter, own in optimiser.state.items():
        for name, value in own.items():
            if name != "step":  # laid out in memory as the parameter is, as the optimiser would
                own[name] = torch.empty_like(parameter).copy_(value)


# --------------------------------------------------------------------------------------------------------------- stops


class InterruptHandler:
    """SIGTERM and SIGINT end a training: at once, or where it is `held`, as soon as that is left.

    A context: handlers are those of before when it is left. ExternalModel the main thread, which alone gets signals, it does
    nothing. Several ranks end together, at the next step after a signal to any of them: see `agree`.

    Raises:
        KeyboardInterrupt: in the main thread after SIGINT.
        SystemExit: of status 143 after SIGTERM.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.holding, self.number, self.before = False, None, {}
        self.together = ranks.size() > 1

    def __enter__(self) -> InterruptHandler:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._stop) for number in self.SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self.number = number
        if not (self.holding or self.together):
            self._end()

    def _end(self) -> None:
        raise KeyboardInterrupt if self.number == signal.SIGINT else SystemExit(128 + self.number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What is done within is done whole."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.number is not None and not self.together:
            self._end()

    def agree(self) -> None:
        """Ends all ranks here if one of them was told to; each must come by."""
        if self.together and (number := ranks.highest(self.number or 0)):
            self.number = number
            self._end()
