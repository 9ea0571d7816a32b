"""What a run is: frozen, strict descriptions of data view, recipe, protocol, profile and run.

Everything here is plain data. A `Run` holds all that changes a result, so that its key can be a hash of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

STUDENTS = ("S1", "S2")
TEACHERS = ("T1", "T2")
LOSS_NAMES = {"mse": "MSE", "infonce": "InfoNCE", "labelled": "labelled contrast"}  # of feature terms, as printed


class InputError(ValueError):
    """Input that cannot be used: the message names what is wrong and what to do about it."""

    def _render_traceback_(self) -> list[str]:  # IPython prints this instead of a stack trace
        return [f"{type(self).__name__}: {self}"]


class TrainingError(RuntimeError):
    """A training that cannot go on (NaN, a dead distillation term): the message names arm, epoch and cause."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class View:
    """How a volume becomes slices.

    Args:
        size: side of the square slice in pixels; a multiple of 16, because the teacher halves it four times.
        spacing: in-plane spacing in mm that every slice is resampled to; None keeps the volume's own.
        channels: "repeat" (the slice three times, as the thesis) or "neighbours" (the slice between its neighbours).
        window: (low, high) in HU that CT is clipped to.
        percentiles: (low, high) of each volume's non-zero voxels that MR is clipped to.
    """

    size: int = 256
    spacing: float | None = None
    channels: str = "repeat"
    window: tuple[float, float] = (-125.0, 275.0)
    percentiles: tuple[float, float] = (0.5, 99.5)

    def __post_init__(self):
        if self.size < 16 or self.size % 16:
            raise InputError(
                f"slice size {self.size}: the U-Nets halve it four times, so it must be a multiple of 16; "
                f"try {max(16, round(self.size / 16) * 16)}"
            )
        if self.spacing is not None and self.spacing <= 0:
            raise InputError(f"spacing {self.spacing} mm: it must be positive, or None for the volume's own")
        if self.channels not in ("repeat", "neighbours"):
            raise InputError(f"channels {self.channels!r}: choose 'repeat' or 'neighbours'")
        if not self.window[0] < self.window[1]:
            raise InputError(f"window {self.window}: the low end must be under the high end (HU)")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise InputError(f"percentiles {self.percentiles}: give low < high between 0 and 100")


@dataclass(frozen=True)
class Term:
    """One distillation term.

    Args:
        name: "E-E", "B-B", "D-D" (features) or "PMD" (prediction maps).
        loss: "infonce", "mse" or "labelled" for features; "kl" for prediction maps.
        weight: factor in the total loss.
        temperature: of the contrast or of the softened maps; unused by "mse".
    """

    name: str
    loss: str
    weight: float
    temperature: float = 1.0

    def __post_init__(self):
        losses = ("kl",) if self.name == "PMD" else tuple(LOSS_NAMES)
        if self.name not in ("E-E", "B-B", "D-D", "PMD"):
            raise InputError(f"distillation term {self.name!r}: choose from E-E, B-B, D-D, PMD")
        if self.loss not in losses:
            raise InputError(f"loss {self.loss!r} of term {self.name}: choose from {', '.join(losses)}")
        if self.temperature <= 0:
            raise InputError(f"temperature {self.temperature} of term {self.name}: it must be positive")


@dataclass(frozen=True)
class Recipe:
    """What a network learns from: its labels, its input (reconstruction) and, through `terms`, a teacher.

    Args:
        name: as tables show it.
        segmentation: "dice", or "dice+ce" (plus binary or softmax cross entropy).
        segmentation_weight: factor of the segmentation loss.
        reconstruction_weight: factor of the mean squared error of the reconstruction, where the model has one.
        terms: distillation terms; none for a baseline.
    """

    name: str
    segmentation: str = "dice"
    segmentation_weight: float = 0.4
    reconstruction_weight: float = 0.0
    terms: tuple[Term, ...] = ()

    def __post_init__(self):
        if self.segmentation not in ("dice", "dice+ce"):
            raise InputError(f"segmentation loss {self.segmentation!r}: choose 'dice' or 'dice+ce'")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise InputError(f"recipe {self.name!r} names a distillation term twice: {', '.join(names)}")


TEACHING = Recipe("teacher", "dice+ce", segmentation_weight=1.0, reconstruction_weight=0.2)
BASELINE = Recipe("baseline")


def thesis_recipe(student: str, loss: str = "labelled", only: tuple[str, ...] = ("E-E", "B-B", "D-D", "PMD")) -> Recipe:
    """The thesis's weights and temperatures (section "systems" of its method) for a chosen feature loss.

    Args:
        student: "S1" (contrastive temperature 0.4) or "S2" (0.1).
        loss: "infonce" as published, "mse", or "labelled" (supervised contrast on pixels).
        only: the terms to keep, for an ablation.
    """
    weights = {"E-E": 0.1, "B-B": 0.2, "D-D": 0.1, "PMD": 0.2}
    unknown = [name for name in only if name not in weights]
    if unknown:
        raise InputError(f"distillation terms {unknown}: choose from {', '.join(weights)}")
    temperature = {"S1": 0.4, "S2": 0.1}[student]
    terms = tuple(
        Term(name, "kl", weight, 4.0) if name == "PMD" else Term(name, loss, weight, temperature)
        for name, weight in weights.items()
        if name in only
    )
    names = "+".join(term.name for term in terms)
    return Recipe(f"{names} ({loss})" if names != "PMD" else names, terms=terms)


@dataclass(frozen=True)
class Optimisation:
    """Optimiser and schedule of one training."""

    optimiser: str = "adamw"
    lr: float = 1e-3
    batch: int = 16
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup: float = 0.05

    def __post_init__(self):
        if self.optimiser not in ("adamw", "rmsprop"):
            raise InputError(f"optimiser {self.optimiser!r}: choose 'adamw' or 'rmsprop'")
        if self.schedule not in ("cosine", "constant"):
            raise InputError(f"schedule {self.schedule!r}: choose 'cosine' or 'constant'")


@dataclass(frozen=True)
class Protocol:
    """How trainings are optimised: one for teachers, one for baseline students, one for distilled students."""

    name: str
    teacher: Optimisation
    baseline: Optimisation
    distilled: Optimisation


_SAME = Optimisation()
PROTOCOLS = {
    # one optimiser, schedule and batch for every arm, so that arms differ in nothing but what they learn from
    "corrected": Protocol("corrected", teacher=_SAME, baseline=_SAME, distilled=_SAME),
    # the published optimisers: baseline and distilled students differ, as in the thesis
    "thesis": Protocol(
        "thesis",
        teacher=Optimisation("adamw", 1e-4, 8, schedule="constant"),
        baseline=Optimisation("adamw", 1.5e-4, 16, schedule="constant"),
        distilled=Optimisation("rmsprop", 1e-2, 20, weight_decay=0.0, schedule="constant"),
    ),
}


@dataclass(frozen=True)
class Profile:
    """How large a study is; `shrinks` says in words what it takes away from the thesis's size.

    Args:
        view: slices.
        width: factor on the teachers' channels (1.0 is the thesis; students are never shrunk).
        teacher_epochs, student_epochs: epochs of each training.
        teacher_steps, student_steps: optimiser steps an epoch; None means one pass over the teacher's part, and for
            students (of every label fraction, so that all have the same budget) over half of it.
        folds: number of outer folds the patients are split into.
        shrinks: what a reader must know before comparing with the thesis.
    """

    name: str
    view: View
    width: float = 1.0
    teacher_epochs: int = 200
    student_epochs: int = 120
    teacher_steps: int | None = None
    student_steps: int | None = None
    folds: int = 5
    shrinks: str = "nothing"


def _shrunk(name: str, view: View, epochs: int, steps: int, folds: int, shrinks: str) -> Profile:
    """A profile for CPUs: teachers a quarter as wide, the same length for teachers and students."""
    shrinks = f"{shrinks}, teachers a quarter as wide, {epochs * steps} steps a training"
    return Profile(name, view, 0.25, epochs, epochs, steps, steps, folds, shrinks)


PROFILES = {
    "quick": Profile(
        "quick",
        View(64, 5.0),
        width=0.25,
        teacher_epochs=8,
        student_epochs=5,
        teacher_steps=25,
        student_steps=25,
        folds=4,
        shrinks="64 x 64 slices at 5 mm, teachers a quarter as wide, 200 steps for them and 125 for students: "
        "to try out, not for claims",
    ),
    "hippocampus": _shrunk(
        "hippocampus", View(64, 1.0), 10, 60, 5, "64 x 64 slices at 1 mm (a hippocampus volume fits)"
    ),
    "ct128": _shrunk("ct128", View(128, 3.0), 8, 50, 4, "128 x 128 slices at 3 mm"),
    "thesis": Profile("thesis", View(256, 1.5)),
}


@dataclass(frozen=True)
class Run:
    """One training and its evaluation: everything that changes the result, and nothing else.

    Args:
        data: a folder in Decathlon layout, or "phantom".
        target: label names to segment ("spleen"), several joined by ",", or "all".
        model: "T1", "T2", "S1" or "S2".
        fold: outer fold whose patients are the test part.
        fraction: part of the training patients whose labels are used (nested: 0.5 lies in 1.0).
        teacher: "T1" or "T2" for a distilled student, else None.
        recipe: what the model learns from; None means `TEACHING` for a teacher and `BASELINE` for a student.
        seed: of initial weights, data order and augmentation.
        teacher_seed: seed of the teacher that a distilled student learns from.
        profile, protocol: size and optimisation.
        on_defect: "raise" stops at defective cases of the data, "drop" leaves them out and reports them.
    """

    data: str
    target: str
    model: str
    fold: int = 0
    fraction: float = 1.0
    teacher: str | None = None
    recipe: Recipe | None = None
    seed: int = 0
    teacher_seed: int = 0
    profile: Profile = PROFILES["quick"]
    protocol: Protocol = PROTOCOLS["corrected"]
    on_defect: str = "raise"

    def __post_init__(self):
        if self.model not in TEACHERS + STUDENTS:
            raise InputError(f"model {self.model!r}: choose from {', '.join(TEACHERS + STUDENTS)}")
        if self.recipe is None:
            object.__setattr__(self, "recipe", TEACHING if self.model in TEACHERS else BASELINE)
        if self.teacher is not None and self.teacher not in TEACHERS:
            raise InputError(f"teacher {self.teacher!r}: choose from {', '.join(TEACHERS)}")
        if (self.teacher is None) != (not self.recipe.terms):
            raise InputError(
                f"recipe {self.recipe.name!r}, teacher {self.teacher}: distillation needs both or neither"
            )
        if not 0 < self.fraction <= 1:
            raise InputError(f"label fraction {self.fraction}: it must lie above 0 and at most at 1")
        if not 0 <= self.fold < self.profile.folds:
            raise InputError(
                f"fold {self.fold} does not exist: profile {self.profile.name!r} has 0 to {self.profile.folds - 1}"
            )

    @property
    def name(self) -> str:
        """The arm's name as tables and figures show it, e.g. `KD(T1, S1)` or `S1 (50 %)`."""
        share = "" if self.fraction == 1 else f" ({self.fraction:.0%})".replace("%", " %")
        return f"KD({self.teacher}, {self.model})" if self.teacher else f"{self.model}{share}"

    @property
    def optimisation(self) -> Optimisation:
        if self.model in TEACHERS:
            return self.protocol.teacher
        return self.protocol.distilled if self.teacher else self.protocol.baseline

    def teacher_run(self) -> Run:
        """The run that trains this student's teacher: same fold, all of the training patients."""
        return dataclasses.replace(
            self,
            model=self.teacher,
            fraction=1.0,
            teacher=None,
            recipe=TEACHING,
            seed=self.teacher_seed,
            teacher_seed=0,
        )


def tailor(name: str, changes: dict[str, object] | None = None) -> Profile:
    """The profile called `name` with fields of `Profile` or of its `View` changed, e.g. `{"spacing": 2.0, "folds": 3}`.

    Raises:
        InputError: no such profile, or a field that neither has.
    """
    profile, changes = choose("profile", name, PROFILES), dict(changes or {})
    fields = {field.name for field in dataclasses.fields(View)}
    known = [field.name for field in dataclasses.fields(Profile) if field.name not in ("name", "view")] + sorted(fields)
    for field in changes:
        choose("field of a profile", field, dict.fromkeys(known))
    # JSON and papermill know lists, not tuples, and only tuples can be part of a frozen key
    changes = {field: tuple(value) if isinstance(value, list) else value for field, value in changes.items()}
    view = dataclasses.replace(profile.view, **{field: changes.pop(field) for field in fields & changes.keys()})
    return dataclasses.replace(profile, view=view, **changes)


def derive_seed(*parts: object) -> int:
    """A seed that depends on every part and on nothing else, so that no random stream shifts another."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6])


def choose(kind: str, name: str, options: dict):
    """`options[name]`, or an error that lists the names there are."""
    if name not in options:
        raise InputError(f"{kind} {name!r} does not exist: choose from {', '.join(options)}")
    return options[name]
