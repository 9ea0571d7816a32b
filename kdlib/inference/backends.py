"""One function for each format of a student: from slices or patches to logits."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from kdlib.config import InputError
from kdlib.inference.student import Student
from kdlib.models import CHANNELS_LAST, build_model
from kdlib.training.checkpoint import load_weights
from kdlib.training.device import pick_device
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
        with inference(model, dimensions) as place:
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
    return openvino_backend(library("openvino").Core().read_model(folder / "model.xml"))


class SignalStack(ctypes.Structure):
    """`stack_t` of signal.h: the memory in which this thread's signals are handled."""

    _fields_ = (("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """The thread has the signal stack afterwards that it had before.

    OpenVINO's plugin for CPUs gives the thread a stack of its own for signals. Of several plugins that live at once it
    frees one that is still in use: the next signal, be it Ctrl-C, would end the process without a word.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    libc, before = ctypes.CDLL(None), SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


@same_signal_stack()
def openvino_backend(model) -> Backend:
    """An `openvino.Model` on the CPU, in float32 where it is not int8."""
    openvino = library("openvino")
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", PRECISION | threads)
    return lambda images: torch.from_numpy(compiled(images.contiguous().numpy())[0].copy())


BACKENDS: dict[str, Callable[[Path, Student, str], Backend]] = {
    "torch": _torch,
    "onnx": _onnx,
    "openvino": _openvino,
    "openvino-int8": _openvino,
}
