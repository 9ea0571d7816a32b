"""One function for each format of a student: from slices to logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kdlib.inference.student import Student
from kdlib.models import build_model
from kdlib.training.checkpoint import load_weights
from kdlib.training.device import pick_device
from kdlib.training.validation import inference

Backend = Callable[[Tensor], Tensor]  # images [B,3,H,W] float32 in 0..1 on the CPU -> logits [B,K,H,W] float32


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


def _torch(folder: Path, student: Student, device: str) -> Backend:
    model = build_model(student.model, classes=len(student.classes), width=student.width)
    released = folder / "model.safetensors"
    load_weights(model, released if released.is_file() else folder / "best.safetensors")
    model = model.to(pick_device(device), memory_format=torch.channels_last).eval()

    def run(images: Tensor) -> Tensor:
        with inference(model) as place:
            images = images.to(place, memory_format=torch.channels_last)
            return model(images, reconstruct=False).segmentation.float().cpu()

    return run


BACKENDS: dict[str, Callable[[Path, Student, str], Backend]] = {"torch": _torch}
