"""What a network learns from, and how it is optimised: distillation terms, recipes, optimiser and schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from kdlib.strict import AtLeastOne, InputError, NotNegative, Positive, Range, check_fields, either

UNLABELLED = 255  # label of every pixel of a slice whose labels a student may not use
RESERVED = ("segmentation", "reconstruction", "loss", "lr", "val_dice")  # what a history calls the rest of a training
# where the thesis's terms read; "/2" pools by 2 as the next stage would: E-E at 1/4 resolution is the second encoder
# stage after its pooling (teacher 128 channels, S1 32, S2 64)
SCALES = {"E-E": ("encoder2/2",), "B-B": ("bottleneck",), "D-D": ("decoder1",), "PMD": ("logits",)}


@dataclass(frozen=True)
class Term:
    """One distillation term.

    Args:
        name: unique in its recipe, without dots and none of `RESERVED`; "E-E", "B-B", "D-D" and "PMD" are the thesis's.
        loss: a name in `kdlib.losses.LOSSES`.
        weight: factor in the total loss.
        temperature: of the contrast or of the softened maps; None leaves the loss's own default.
        options: further arguments of the loss, e.g. `{"hard": 0.5}`.
        student_layers: scales that the student is read at, e.g. "decoder1", "encoder2/2" (pooled by 2) or "logits";
            several for a loss of several scales, from shallow to deep; by default as the thesis's term of this name.
        teacher_layers: scales of the teacher; by default `student_layers`.
        projector: "learned", or, as a control, "frozen" at its random weights.
    """

    name: str
    loss: str
    weight: NotNegative
    temperature: Positive | None = None
    options: tuple[tuple[str, object], ...] = ()
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    projector: Literal["learned", "frozen"] = "learned"

    def __post_init__(self):
        # dicts and single names are easier to write, only tuples can be part of a frozen key
        try:
            options = {str(name): tuple(v) if isinstance(v, list) else v for name, v in dict(self.options).items()}
        except (TypeError, ValueError):
            asked = f"term {self.name!r}, options {self.options!r}"
            raise InputError(f"{asked}: give a dict of the loss's arguments") from None
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        for field in ("student_layers", "teacher_layers"):
            if isinstance(given := getattr(self, field), str):
                object.__setattr__(self, field, (given,))
        check_fields(self)
        if not self.name or "." in self.name or self.name in RESERVED:
            raise InputError(f"distillation term {self.name!r}: choose a name without dots, and not {either(RESERVED)}")
        if self.temperature is not None and "temperature" in dict(self.options):
            raise InputError(f"term {self.name}: its temperature is given twice, by itself and among the options")
        if not self.student_layers and self.name not in SCALES:
            where = f"say where it reads (student_layers=...), or name it {either(SCALES)}"
            raise InputError(f"distillation term {self.name!r}: {where}")
        object.__setattr__(self, "student_layers", self.student_layers or SCALES[self.name])
        object.__setattr__(self, "teacher_layers", self.teacher_layers or self.student_layers)
        if len(self.student_layers) != len(self.teacher_layers):
            scales = f"{len(self.student_layers)} scales of the student, {len(self.teacher_layers)} of the teacher"
            raise InputError(f"term {self.name}: {scales}")

    @property
    def arguments(self) -> dict[str, object]:
        """What the loss is made with."""
        return dict(self.options) | ({} if self.temperature is None else {"temperature": self.temperature})


MOST = 100  # times its first weight that a term can get where gradients are balanced


@dataclass(frozen=True)
class Recipe:
    """What a network learns from: its labels, its input (reconstruction) and, through `terms`, a teacher.

    Args:
        name: free, and unique among the recipes of one student and teacher.
        segmentation: "dice+ce" (Dice plus binary or softmax cross entropy), or "dice" alone.
        segmentation_weight: factor of the segmentation loss.
        reconstruction_weight: factor of the mean squared error of the reconstruction, where the model has one.
        terms: distillation terms; none for a baseline.
        smoothing: label smoothing: this share of each target of the cross entropy is spread evenly over the classes.
        teacher: "trained", or, as controls, "random" (untrained weights) or "shuffled" (another slice's features).
        budget: "student"; or, of a control, "teacher+student" (the steps of both together) or "wall_clock" (as many
            steps as take the time of the distilled student, its teacher's pass included: see `Profile.step_cost`).
        balance: the terms' gradients on the student, together, as a multiple of the segmentation loss's: at the first
            step of every epoch their weights are set to that, in proportion to their own, but to no more than `MOST`
            times the first ones; None keeps the weights.
        warmup: share of the steps in which the student learns from its labels alone; the terms act after them.
        redrawn_projectors: projections of features are drawn again at every step and never trained (as published).
        unlabelled: half of each batch are slices of those training patients whose labels the run may not use: the
            terms see them, the segmentation loss does not.
        pseudo_labels: the teacher's masks take the place of the labels that are missing; needs `unlabelled`.
        control: "", or what a negative control changes, e.g. "zero_weights" (see `kdlib.experiments.recipes`).
    """

    name: str
    segmentation: Literal["dice", "dice+ce"] = "dice+ce"
    segmentation_weight: NotNegative = 0.4
    reconstruction_weight: NotNegative = 0.0
    terms: tuple[Term, ...] = ()
    smoothing: Annotated[float, Range(0, below=1)] = 0.0
    teacher: Literal["trained", "random", "shuffled"] = "trained"
    budget: Literal["student", "teacher+student", "wall_clock"] = "student"
    balance: Positive | None = None
    warmup: Annotated[float, Range(0, below=1)] = 0.0
    redrawn_projectors: bool = False
    unlabelled: bool = False
    pseudo_labels: bool = False
    control: str = ""

    def __post_init__(self):
        check_fields(self)
        if self.pseudo_labels and not self.unlabelled:
            raise InputError(f"recipe {self.name!r}: pseudo_labels are for slices without labels: set unlabelled, too")
        if self.smoothing and self.segmentation == "dice":
            raise InputError(
                f"recipe {self.name!r}, smoothing {self.smoothing}: it is for cross entropy: set 'dice+ce'"
            )
        if self.balance is not None and not any(term.weight for term in self.terms):
            raise InputError(f"recipe {self.name!r}, balance {self.balance}: it needs terms whose weights are not 0")
        if self.warmup and not self.terms:
            raise InputError(f"recipe {self.name!r}, warmup {self.warmup}: it is for terms, and there are none")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise InputError(f"recipe {self.name!r} names a distillation term twice: {', '.join(names)}")


TEACHER_RECIPE = Recipe("teacher", segmentation_weight=1.0, reconstruction_weight=0.2)
BASELINE = Recipe("baseline")


@dataclass(frozen=True)
class Optimisation:
    """Optimiser and schedule of one training.

    Args:
        batch: slices per step.
        warmup: share of the steps in which the learning rate rises.
        target_share: share of the (labelled) slices of each batch that hold target; None draws slices at random.
        precision: of networks, in training and evaluation: "bf16", "fp32", or "auto" for bf16 where the processor
            multiplies it natively (then a run's manifest says which it was), but float32 for volumes on a CPU. Losses
            are always computed in float32.
        kernels: "plain", or "fused": batch norms of frozen teachers folded into their convolutions, and the optimiser's
            fused kernel where it has one (AdamW). The same numbers to rounding.
        replay: so many batches are drawn, with their augmentation, and come again and again: what the teachers give for
            them is computed once and kept in half precision. None draws every batch anew.
    """

    optimiser: Literal["adamw", "rmsprop"] = "adamw"
    lr: Positive = 1e-3
    batch: AtLeastOne = 16
    betas: tuple[Annotated[float, Range(0, below=1)], Annotated[float, Range(0, below=1)]] = (0.9, 0.95)
    weight_decay: NotNegative = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Annotated[float, Range(0, below=1)] = 0.05
    target_share: Annotated[float, Range(0, 1)] | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    kernels: Literal["plain", "fused"] = "plain"
    replay: AtLeastOne | None = None

    def __post_init__(self):
        check_fields(self)
