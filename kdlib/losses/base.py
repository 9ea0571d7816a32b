"""What all distillation losses have in common: their registry, shapes, labels, context and errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.config import InputError
from kdlib.strict import checked


@dataclass(frozen=True)
class Context:
    """What a term may know of a training step besides its tensors and labels.

    Args:
        generator: on the CPU, for whatever the term draws; None takes torch's own.
        patients: [B] int64, the patient of each image of the batch; None where a term cannot need it.
        ignore_index: label of positions that take no part in any loss, e.g. 255 or -1; None where there is none.
    """

    generator: torch.Generator | None = None
    patients: Tensor | None = None
    ignore_index: int | None = None


EMPTY_CONTEXT = Context()
LOSSES: dict[str, type[DistillationLoss]] = {}  # by name; filled as the classes below are defined
FAMILIES = ("prediction", "feature", "relation", "contrast")
ADAPTS = ("none", "student", "both", "own")


class DistillationLoss(nn.Module):
    """A distillation loss: compares a student's maps with a teacher's, and returns a scalar.

    A subclass defines `compare` and the attributes below, and is then registered in `kdlib.losses.LOSSES` by its name.

    `loss(student, teacher, labels, context)` takes

    - student, teacher: maps BNH[WD] of one shape (of features with `adapt` "none", channels may differ). Gradients flow
      to both; give the teacher detached. The loss is computed in at least single precision, also under autocast.
    - labels: BH[WD], int64, 0 is background; needed where `needs_labels`. They come to the maps' grid by the label
      nearest to each position's centre, because averages are no labels and a majority would erase thin structures.
      Every label that occurs is a class of its own; for logits of one channel all above 0 are the foreground.
    - context: what else a loss may know of the step. Positions with its `ignore_index` take no part: not in values and
      gradients, boundaries, counts of classes or memories. An image without any other position is left out, and a
      batch of such images gives 0.

    and raises InputError where shapes or types of the maps do not fit, labels are missing, of another shape or not
    int64, a label is below 0 or has no channel (on a GPU the kernels themselves assert this: to look would make every
    step wait), or patients are needed and missing. Constructors raise InputError for options out of their range.

    Attributes:
        name: unique; what a `Term` calls the loss.
        label: for readers, in tables and figures.
        family: "prediction", "feature", "relation" or "contrast".
        reads: "logits" or "features".
        adapt: channels that the loss needs: "none" (as they come), "student" (the student is projected to the
            teacher's), "both" (both are projected to a common width) or "own" (the loss has its own projections: it is
            made with the channels of both sides and the dimensions first, and overrides `forward`, which then takes
            lists of maps, one for each scale; see `ReviewKD`).
        needs_labels: whether it cannot do without labels.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    family: ClassVar[str]
    reads: ClassVar[str]
    adapt: ClassVar[str]
    needs_labels: bool = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        for field, known in (("family", FAMILIES), ("reads", ("logits", "features")), ("adapt", ADAPTS)):
            if getattr(cls, field, None) not in known:
                raise InputError(f"loss {cls.__name__}: give its {field}, one of {', '.join(known)}")
        if not getattr(cls, "label", ""):
            raise InputError(f"loss {cls.__name__}: give its label, for tables and figures")
        other = LOSSES.get(cls.name)
        # a cell of a notebook, or a module, that is run again defines its class again
        if other and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f"loss {cls.__name__}: the name {cls.name!r} is that of {other.__name__}; choose another")
        LOSSES[cls.name] = cls

    def keep(self, kind: object, **options: object) -> None:
        """Sets options as attributes. Raises: InputError where one is not of the kind, e.g. `kdlib.strict.Positive`."""
        for name, value in options.items():
            setattr(self, name, checked(f"{name} is", value, kind))

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, context: Context = EMPTY_CONTEXT
    ) -> Tensor:
        check_pair(student, teacher, channels=self.reads == "logits" or self.adapt != "none")
        kept = None
        if self.needs_labels or context.ignore_index is not None:
            labels = usable_labels(labels, context.ignore_index, self.label)
            if self.reads == "logits" and student.shape[1] > 1:
                check_classes(labels, student.shape[1])
            labels = resize_labels(labels, student)
        if context.ignore_index is not None:
            kept = labels >= 0
            images = kept.flatten(1).any(1)
            if not images.any():
                return as_float(student[:0]).sum() + as_float(teacher[:0]).sum()
            # whatever stands at an ignored position, NaN included, is 0 from here on, and so is its gradient
            student, teacher = (x.masked_fill(~kept[:, None], 0)[images] for x in (student, teacher))
            labels, kept = labels[images], kept[images]
            if context.patients is not None and len(context.patients) == len(images):
                context = replace(context, patients=context.patients[images.to(context.patients.device)])
        with torch.autocast(student.device.type, enabled=False):
            return self.compare(as_float(student), as_float(teacher), labels, kept, context)

    def compare(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, kept: Tensor | None, context: Context
    ) -> Tensor:
        """The loss of checked maps in at least single precision, with autocast off.

        Args:
            labels: on the maps' grid, -1 at ignored positions; as given, hence perhaps None, where not needed.
            kept: BH[WD] bool, positions that are not ignored; None where all count. The maps are 0 elsewhere.
        """
        raise NotImplementedError


def as_float(x: Tensor) -> Tensor:
    """At least single precision: sums and exponentials in half precision lose what a loss is about."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2_normalize(vectors: Tensor, dim: int = 1) -> Tensor:
    """Vectors of length 1 in at least single precision.

    Vectors shorter than 1e-4 are divided by 1e-4 instead, and stay shorter than 1: so a position that a ReLU sets to 0
    has a gradient of at most 1e4 and not 1e12. Cosines of such vectors, and all that is made of them, come out smaller.
    """
    return F.normalize(as_float(vectors), dim=dim, eps=1e-4)


def vectors_at(maps: Tensor, positions: Tensor) -> Tensor:
    """[n, N], the vectors of BNH[WD] maps at positions [n] of the flat BH[WD] grid. Channels last, nothing is copied
    but they, and their gradient goes back to them alone."""
    return maps.movedim(1, -1).flatten(0, -2).index_select(0, positions)


def mean_over(values: Tensor, kept: Tensor | None) -> Tensor:
    """Mean of BH[WD] or BNH[WD] values over the positions that are `kept` (BH[WD] bool; None: all)."""
    if kept is None:
        return values.mean()
    return (values if values.dim() == kept.dim() else values.movedim(1, -1))[kept].mean()


def mean_square(a: Tensor, b: Tensor, kept: Tensor | None) -> Tensor:
    """Mean squared difference of BNH[WD] or BH[WD] values over the positions that are `kept` (see `mean_over`)."""
    return F.mse_loss(a, b) if kept is None else mean_over((a - b).pow(2), kept)


def near_boundary(labels: Tensor, radius: int) -> Tensor:
    """Where BH[WD] labels have another label (not below 0) within `radius` positions along axes or diagonals, bool.

    A window of 2 radius + 1; the border of the image is no boundary.
    """
    pool = {2: F.max_pool1d, 3: F.max_pool2d, 4: F.max_pool3d}[labels.dim()]
    values, ignored = labels[:, None].float(), labels[:, None] < 0
    greatest, least = (
        sign * pool((sign * values).masked_fill(ignored, -torch.inf), 2 * radius + 1, stride=1, padding=radius)
        for sign in (1, -1)
    )
    return (greatest != least)[:, 0]


def classes_of(labels: Tensor) -> Tensor:
    """The labels that occur, ascending, without ignored ones."""
    classes = labels.unique()
    return classes[classes >= 0]


def patients_of(context: Context, maps: Tensor, term: str) -> Tensor:
    """The patient of each image, [B] int64 on the maps' device."""
    if context.patients is None:
        raise InputError(f"{term} needs to know the patient of each image: give a Context with patients")
    if context.patients.shape != maps.shape[:1]:
        raise InputError(f"patients {list(context.patients.shape)} for {len(maps)} images: give one patient per image")
    return context.patients.to(maps.device)


def check_pair(student: Tensor, teacher: Tensor, channels: bool = True) -> None:
    """Raises InputError where the two are not maps BNH[WD] of one shape (one batch and grid where not `channels`)."""
    shapes = [x.shape if channels else (*x.shape[:1], *x.shape[2:]) for x in (student, teacher)]
    if shapes[0] != shapes[1]:
        found = f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in shape"
        remedy = f"project and resize both to the same {'channels and ' if channels else ''}grid first"
        raise InputError(f"{found}: {remedy}")
    if student.dim() < 3 or 0 in student.shape or 0 in teacher.shape:
        raise InputError(f"maps of shape {list(student.shape)}: give [batch, channels, spatial ...], none of them 0")
    kinds, floating = (student.dtype, teacher.dtype), student.is_floating_point() and teacher.is_floating_point()
    if not floating or as_float(student[:0]).dtype != as_float(teacher[:0]).dtype:
        raise InputError(f"student maps are {kinds[0]} and teacher maps {kinds[1]}: give both in one floating type")


def usable_labels(labels: Tensor | None, ignore_index: int | None, term: str) -> Tensor:
    """Checked labels, with -1 for `ignore_index`.

    Raises: InputError: labels are missing, not int64, or below 0 without being ignored.
    """
    if labels is None:
        why = "needs labels" if ignore_index is None else f"needs labels, to know the positions of label {ignore_index}"
        raise InputError(f"{term} {why}: choose a loss without labels where there are none")
    if labels.dtype != torch.int64:
        raise InputError(f"labels are {labels.dtype}: give int64, labels.long()")
    if labels.device.type == "cpu":  # on a GPU the check would wait for the device at every step
        kept = labels if ignore_index is None else labels[labels != ignore_index]
        if kept.numel() and kept.min() < 0:
            raise InputError(f"labels reach down to {kept.min()}: give classes from 0, or say it with ignore_index")
    return labels if ignore_index is None else labels.masked_fill(labels == ignore_index, -1)


def check_classes(labels: Tensor, channels: int) -> None:
    """Raises InputError where a label (BH[WD]) has no channel; on the CPU alone, a GPU's kernels assert it."""
    if labels.device.type == "cpu" and labels.numel() and labels.max() >= channels:
        found = f"labels reach from {labels.min()} to {labels.max()}"
        raise InputError(f"{found}: logits with {channels} channels take 0 to {channels - 1}")


def resize_labels(labels: Tensor, maps: Tensor) -> Tensor:
    """Labels BH[WD] (int64) on the grid of `maps` (BNH[WD]): the label nearest to each position's centre.

    Raises: InputError: labels are not of the maps' batch and dimensions.
    """
    if labels.dim() != maps.dim() - 1 or len(labels) != len(maps):
        shapes = f"labels {list(labels.shape)} do not fit maps {list(maps.shape)}"
        raise InputError(f"{shapes}: give one label map per image, of as many dimensions")
    if labels.shape[1:] == maps.shape[2:]:
        return labels
    # as float: interpolation knows no integers, and labels are small enough to be exact
    return F.interpolate(labels[:, None].float(), size=maps.shape[2:], mode="nearest-exact")[:, 0].long()
