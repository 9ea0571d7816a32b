"""What every term asks of its tensors, and what it may know of a step besides them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.config import InputError


@dataclass(frozen=True)
class Context:
    """What a term may know of a training step besides its tensors and labels.

    Args:
        generator: on the CPU, for whatever the term draws; None takes torch's own.
        patients: [B] int64, the patient of each image of the batch; None where a term cannot need it.
        step: number of the training step.
    """

    generator: torch.Generator | None = None
    patients: Tensor | None = None
    step: int = 0


EMPTY_CONTEXT = Context()
LOSSES: dict[str, type[DistillationLoss]] = {}  # by name; filled as the classes below are defined
FAMILIES = ("prediction", "feature", "relation", "contrast")
ADAPTS = ("none", "student", "both", "own")


class DistillationLoss(nn.Module):
    """A distillation loss: compares a student's maps with a teacher's, and returns a scalar.

    A subclass with a `name` is registered in `kdlib.losses.LOSSES`, and can then be named by a `Term`.

    Attributes:
        name: unique; what a `Term` calls the loss.
        label: for readers, in tables and figures.
        family: "prediction", "feature", "relation" or "contrast".
        reads: "logits" or "features".
        adapt: channels that the loss needs: "none" (as they come), "student" (the student is projected to the
            teacher's), "both" (both are projected to a common width) or "own" (the loss has its own projections).
    """

    name: ClassVar[str]
    label: ClassVar[str]
    family: ClassVar[str]
    reads: ClassVar[str]
    adapt: ClassVar[str]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        for field, known in (("family", FAMILIES), ("reads", ("logits", "features")), ("adapt", ADAPTS)):
            if getattr(cls, field, None) not in known:
                raise InputError(f"loss {cls.__name__}: give its {field}, one of {', '.join(known)}")
        other = LOSSES.get(cls.name)
        # a cell of a notebook, or a module, that is run again defines its class again
        if other and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f"loss {cls.__name__}: the name {cls.name!r} is that of {other.__name__}; choose another")
        LOSSES[cls.name] = cls


def as_float(x: Tensor) -> Tensor:
    """At least single precision: sums and exponentials in half precision lose what a loss is about."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2_normalize(vectors: Tensor, dim: int = 1) -> Tensor:
    """Vectors of length 1 in at least single precision."""
    # eps bounds the gradient of a vector of zeros, which a ReLU can give, at 1e4 instead of 1e12
    return F.normalize(as_float(vectors), dim=dim, eps=1e-4)


def check_pair(student: Tensor, teacher: Tensor, channels: bool = True) -> None:
    """Raises InputError where the two are not maps BNH[WD] of one shape (one batch and grid where not `channels`)."""
    differ = student.shape != teacher.shape if channels else _without(student) != _without(teacher)
    if differ:
        raise InputError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in shape: "
            f"project and resize both to the same {'channels and ' if channels else ''}grid first"
        )
    if student.dim() < 3 or 0 in student.shape or 0 in teacher.shape:
        raise InputError(f"maps of shape {list(student.shape)}: give [batch, channels, spatial ...], none of them 0")


def _without(maps: Tensor) -> tuple[int, ...]:
    return (*maps.shape[:1], *maps.shape[2:])


def check_positive(**values: float) -> None:
    """Raises InputError where a named value is not above 0: a negative temperature would teach the opposite."""
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{name} is {value}: give a number above 0")


def resize_labels(labels: Tensor | None, maps: Tensor, term: str) -> Tensor:
    """Labels BH[WD] (int64) on the grid of `maps` (BNH[WD]).

    A position takes the label nearest to its centre: averages are no labels, a majority would erase thin structures.

    Raises:
        InputError: labels are missing, or not of the maps' batch and dimensions.
    """
    if labels is None:
        raise InputError(f"the {term} needs labels: use a term without where there are none")
    if labels.dim() != maps.dim() - 1 or len(labels) != len(maps):
        shapes = f"labels {list(labels.shape)} do not fit maps {list(maps.shape)}"
        raise InputError(f"{shapes}: give one label map an image, of as many dimensions")
    if labels.shape[1:] == maps.shape[2:]:
        return labels
    # as float: interpolation knows no integers, and labels are small enough to be exact
    return F.interpolate(labels[:, None].float(), size=maps.shape[2:], mode="nearest-exact")[:, 0].long()
