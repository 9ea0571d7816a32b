"""One function for each format of a student: from slices or patches to logits."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from kdlib.config import InputError
from kdlib.inference.student import Student
from kdlib.models import CHANNELS_LAST, build_model
from kdlib.training.checkpoint import load_weights
from kdlib.training.device import pick_device, precision
from kdlib.training.validation import inference

# images [B,3,H,W] or [B,1,D,H,W] float32 in 0..1 on the CPU -> logits [B,K,...] float32 of the same grid
Backend = Callable[[Tensor], Tensor]
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}  # of OpenVINO, whose default is bf16 on some CPUs


def library(name: str) -> ModuleType:
    """A module of the extra `deploy`. Raises: InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{name} is not installed: pip install -e .[deploy]") from None


def load_backend(folder: Path, student: Student, device: str = "auto") -> Backend:
    """The network of a student.

    Args:
        folder: of the student, or of a finished run.
        student: from `load_student(folder)`.
        device: "auto", "cpu" or "cuda"; only PyTorch uses a GPU.

    Raises:
        InputError: the weights cannot be used, the device or the format's library is not there.
    """
    if student.format != "torch" and device not in ("auto", "cpu"):
        raise InputError(f"device {device!r}: a student of format {student.format!r} runs on the CPU; give auto or cpu")
    return BACKENDS[student.format](folder, student, device)


def load_network(folder: Path, student: Student) -> nn.Module:
    """The network of a student of format "torch", on the CPU in eval mode; see `load_backend`."""
    view = student.preprocessing
    model = build_model(student.model, view.dimensions, view.input_shape[0], len(student.classes), student.width)
    released = folder / "model.safetensors"
    load_weights(model, released if released.is_file() else folder / "best.safetensors")
    return model.eval()


def _torch(folder: Path, student: Student, device: str) -> Backend:
    dimensions = student.preprocessing.dimensions
    layout = CHANNELS_LAST[dimensions]
    model = load_network(folder, student).to(pick_device(device), memory_format=layout)

    def run(images: Tensor) -> Tensor:
        with precision(student.precision), inference(model, dimensions) as place:
            images = images.to(place, memory_format=layout)
            return model(images, reconstruct=False).segmentation.float().cpu()

    return run


def _onnx(folder: Path, student: Student, device: str) -> Backend:
    onnxruntime = library("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])


def _openvino(folder: Path, student: Student, device: str) -> Backend:
    return openvino_backend(openvino_core().read_model(folder / "model.xml"))


@functools.cache
def openvino_core():
    """The one `openvino.Core` of the process.

    A second one's plugin for CPUs would, on its end, free the stack that this thread handles signals on, and the next
    Ctrl-C would end the process without a word.
    """
    return library("openvino").Core()


def openvino_backend(model) -> Backend:
    """An `openvino.Model` on the CPU, in float32 where it is not int8."""
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino_core().compile_model(model, "CPU", PRECISION | threads)
    return lambda images: torch.from_numpy(compiled(images.contiguous().numpy())[0].copy())


BACKENDS: dict[str, Callable[[Path, Student, str], Backend]] = {
    "torch": _torch,
    "onnx": _onnx,
    "openvino": _openvino,
    "openvino-int8": _openvino,
}
