"""What networks cost where they are used: size, arithmetic, receptive field, and latency in several libraries."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from kdlib.analysis.capacity import RUNTIMES
from kdlib.config import Preprocessing, lookup
from kdlib.inference.backends import load_backend, openvino_backend, openvino_core
from kdlib.inference.export import quantise, save_onnx
from kdlib.inference.student import Student
from kdlib.models.cost import milliseconds, receptive_field, untimed
from kdlib.training.device import computes_bf16, one_thread

LIBRARIES = {"onnx": ("onnxscript", "onnxruntime"), "openvino-int8": ("onnxscript", "openvino", "nncf")}


def network_costs(
    models: Sequence[str], width: float, size: int, classes: int = 1, runtimes: Sequence[str] = tuple(RUNTIMES)
) -> pd.DataFrame:
    """What each network costs for one slice, without the reconstruction decoder of a teacher.

    Weights are fresh: they change none of it.

    Args:
        models: names in `kdlib.models.MODELS`.
        width: of the study's teachers (`Profile.width`).
        size: side of its slices in pixels.
        classes: foreground classes.
        runtimes: of `kdlib.analysis.capacity.RUNTIMES`.

    Returns: a table with columns model, parameters, gflops (10^9 operations, two per multiply-add), receptive_field
        (side in pixels, at most 512) and, for each runtime, the median milliseconds of one thread of this CPU, batch of
        1; NaN where the library is not installed, or the processor has no bfloat16.

    Raises: InputError: no such model or runtime.
    """
    for runtime in runtimes:
        lookup("runtime", runtime, RUNTIMES)
    rows = []
    with one_thread():
        for name in models:
            model, found = untimed(name, width, size, classes)
            student = Student(name, name, width, tuple(map(str, range(classes))), "CT", Preprocessing(size))
            row = dict(model=name, parameters=found["inference_parameters"], gflops=found["gflops"])
            rows.append(row | dict(receptive_field=receptive_field(model)) | _latencies(model, student, runtimes))
    return pd.DataFrame(rows)


def _latencies(model: nn.Module, student: Student, runtimes: Sequence[str]) -> dict[str, float]:
    found = dict.fromkeys(runtimes, float("nan"))
    model = model.to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for runtime in filter(_is_there, runtimes):
            if runtime in LIBRARIES and not path.exists():
                save_onnx(model, student, path.parent)
            found[runtime] = milliseconds(_forward(model, student, runtime, path), student.preprocessing.input_shape)
    return found


def _is_there(runtime: str) -> bool:
    if runtime == "bf16":
        return computes_bf16(torch.device("cpu"))
    return all(importlib.util.find_spec(module) for module in LIBRARIES.get(runtime, ()))


def _forward(model: nn.Module, student: Student, runtime: str, path: Path) -> Callable[[Tensor], object]:
    if runtime == "onnx":
        return load_backend(path.parent, replace(student, format="onnx"), "cpu")
    if runtime == "openvino-int8":
        shape = student.preprocessing.input_shape
        image = torch.linspace(0, 1, math.prod(shape)).view(1, *shape)  # time does not depend on the ranges
        return openvino_backend(quantise(openvino_core().read_model(path), [image]))

    def forward(images: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=runtime == "bf16"):
            return model(images, reconstruct=False)

    return forward
