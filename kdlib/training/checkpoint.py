"""What survives a stop: the state of a training, the code that made it, and its log.

A checkpoint is one safetensors file: tensors, and the rest as readable JSON in its metadata. No pickle is written or
read. What a step draws comes from streams that depend on the seed and the step alone (`kdlib.training.loop`), so the
number of steps done is all that there is to keep of random states and of the order of the data.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kdlib.config import InputError
from kdlib.files import sha256, write, write_error
from kdlib.record import verified

FORMAT = 2  # of checkpoints
TENSOR = "tensor of this file"  # key that stands in the JSON for a tensor, with its name

# what a training or its evaluation passes through; drawing, statistics and notebooks read finished tables alone, and
# recipes are part of a run's key
SOURCES = (
    "config.py", "recipe.py", "protocol.py", "strict.py", "metrics.py", "data/*.py", "evaluation/*.py",
    "experiments/runner.py", "experiments/source.py", "losses/*.py", "models/*.py", "training/*.py",
)  # fmt: skip


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes safetensors. Raises: InputError as `kdlib.files.write`."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(partial: Path) -> None:
        try:
            safetensors.torch.save_file(plain, partial, dict(metadata or {}))
        except SafetensorError as error:
            raise write_error(path, error) from None

    write(path, save)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads safetensors into `model`.

    Raises:
        InputError: no such file, one that is damaged or was changed after its run, or one that does not fit the model
            (names what differs).
    """
    try:
        weights = safetensors.torch.load_file(verified(path))
    except FileNotFoundError:
        raise InputError(f"weights {path} do not exist: train that run first") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights {path} cannot be read ({error}): delete the run's folder and train again") from None
    own = model.state_dict()
    differ = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    faults = [*sorted(own.keys() ^ weights.keys()), *sorted(differ)]
    turned = [(own[name].dim(), weights[name].dim()) for name in differ if own[name].dim() != weights[name].dim()]
    if turned and set(turned[0]) == {4, 5}:
        kinds = {4: "slices (2D)", 5: "volumes (3D)"}
        raise InputError(
            f"weights {path} are of {kinds[turned[0][1]]}, and this {type(model).__name__} takes "
            f"{kinds[turned[0][0]]}: use the weights of a run whose profile has the same dimensions"
        )
    if faults:
        raise InputError(
            f"weights {path} do not fit {type(model).__name__}: {len(faults)} tensors are missing, unknown or of "
            f"another shape, the first {faults[0]!r}; use the file of the same model, width and number of classes"
        )
    model.load_state_dict(weights)


ROOT = Path(__file__).resolve().parents[2]
CODE = {  # file -> hash, at import: a file that is edited later is not what this process runs
    path.relative_to(ROOT).as_posix(): sha256(path)[:12]
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(f"kdlib/{pattern}"))
}
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


@dataclass(frozen=True)
class Checkpoint:
    """Where one run's state is kept while it trains, and its log.

    Args:
        folder: of the run.
        identity: what the run is (see `kdlib.experiments.store.key_facts`), as JSON values.
        commit: of the code, for the reader of a refusal.
        read_only: writes nothing: of several processes that train a run, the first one writes.
    """

    folder: Path
    identity: Mapping[str, object]
    commit: str | None = None
    read_only: bool = False

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def log(self, text: str) -> None:
        """Adds a line to the run's `log.txt`.

        Raises:
            InputError: it cannot be written.
        """
        if self.read_only:
            return
        path = self.folder / "log.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            raise write_error(path, error) from None

    def save(self, state: Mapping) -> None:
        """Replaces the checkpoint by a state: nested dicts and lists of tensors and JSON values.

        Raises:
            InputError: as `kdlib.files.write`.
        """
        if self.read_only:
            return
        tensors: dict[str, Tensor] = {}
        plain = _take_tensors(state, "", tensors)
        record = {
            "format": FORMAT, "identity": self.identity, "code": CODE, "commit": self.commit,
            "checksum": _checksum(tensors), "state": plain,
        }  # fmt: skip
        save_tensors(tensors, self.path, {"kdlib": json.dumps(record)})

    def load(self) -> dict | None:
        """The state that was saved; None where there is none, or where the file is damaged, which is said in one line.

        Raises:
            InputError: the checkpoint is of another recipe, data set, version of the code or newer version of kdlib.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                record = json.loads((file.metadata() or {})["kdlib"])
                self._refuse(record)
                tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}  # copies
            if _checksum(tensors) != record["checksum"]:
                raise ValueError("checksum differs")
            return _put_tensors(record["state"], tensors)
        except InputError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            text = f"{self.path} is damaged ({error}): training starts again from its first step"
            print(text, flush=True)
            self.log(text)
            return None

    def _refuse(self, record: Mapping) -> None:
        remedy = "delete that file to start the training again"
        if record["format"] > FORMAT:
            raise InputError(f"{self.path}: written by a newer version (format {record['format']}); update kdlib")
        if found := differences(record["identity"], self.identity):
            raise InputError(f"{self.path} is of another run: {'; '.join(found[:3])}; {remedy}")
        if found := [name for name in sorted(CODE | record["code"]) if CODE.get(name) != record["code"].get(name)]:
            commit = f", or check out commit {record['commit'][:9]}" if record["commit"] else ""
            raise InputError(f"{self.path} was made by another version of {', '.join(found)}: {remedy}{commit}")

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


def _take_tensors(value: object, name: str, found: dict[str, Tensor]) -> object:
    """The value with the name of each tensor in its place, e.g. "model/conv.weight"; the tensors go into `found`."""
    if isinstance(value, Tensor):
        found[name] = value.detach().cpu().contiguous()
        return {TENSOR: name}
    if isinstance(value, Mapping):
        return {str(key): _take_tensors(part, f"{name}/{key}".lstrip("/"), found) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_take_tensors(part, f"{name}/{i}", found) for i, part in enumerate(value)]
    return value


def _put_tensors(value: object, tensors: Mapping[str, Tensor]) -> object:
    """The inverse of `_take_tensors`."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _put_tensors(part, tensors) for key, part in value.items()}
    return [_put_tensors(part, tensors) for part in value] if isinstance(value, list) else value


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of all values: safetensors itself only knows whether a file is as long as it should be."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), total)
    return total
