"""What every term asks of its two tensors."""

from __future__ import annotations

import torch

from kdlib.config import InputError


def as_float(x: torch.Tensor) -> torch.Tensor:
    """At least single precision: sums and exponentials in half precision lose what a loss is about."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_pair(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Raises InputError where the two are not maps of one shape, BNH[WD]."""
    if student.shape != teacher.shape:
        raise InputError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in shape: "
            "project and resize both to the same channels and grid first"
        )
    if student.dim() < 3 or 0 in student.shape:
        raise InputError(f"maps of shape {list(student.shape)}: give [batch, channels, spatial ...], none of them 0")
