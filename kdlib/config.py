"""What a run is: frozen, strict descriptions of data view, recipe, protocol, profile and run.

Everything here is plain data. A `Run` holds all that changes a result, so that its key can be a hash of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass

STUDENTS = ("S1", "S2")
TEACHERS = ("T1", "T2")
LOSS_NAMES = {  # of the distillers, as printed
    "kl": "KL (Hinton)", "softmax_kl": "KL over one channel (published)", "dkd": "DKD", "dist": "DIST",
    "cwd": "CWD (logits)", "boundary_kl": "boundary KL", "fitnet": "MSE", "at": "AT", "feature_cwd": "CWD (features)",
    "reviewkd": "ReviewKD", "emkd_importance": "EMKD importance", "emkd_affinity": "EMKD affinity", "sp": "SP",
    "skd": "SKD pair-wise", "ifvd": "IFVD", "cirkd": "CIRKD", "infonce": "InfoNCE", "supcon": "supervised contrastive loss",
    "prototype": "prototype contrast", "crd": "CRD",
}  # fmt: skip
PROJECTED = (
    "fitnet",
    "feature_cwd",
    "cirkd",
    "infonce",
    "supcon",
    "prototype",
    "crd",
)  # losses behind a 1x1 projection
# where the thesis's terms read; "/2" pools by 2 as the next stage would: E-E at 1/4 resolution is the second encoder
# stage after its pooling (teacher 128 channels, S1 32, S2 64)
SCALES = {"E-E": ("encoder2/2",), "B-B": ("bottleneck",), "D-D": ("decoder1",), "PMD": ("logits",)}


class InputError(ValueError):
    """Input that cannot be used: the message names what is wrong and what to do about it."""

    def _render_traceback_(self) -> list[str]:  # IPython prints this instead of a stack trace
        return [f"{type(self).__name__}: {self}"]


class TrainingError(RuntimeError):
    """A training that cannot go on (NaN, a dead distillation term): the message names arm, epoch and cause."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class Preprocessing:
    """How a volume becomes slices.

    Args:
        size: side of the square slice in pixels; a multiple of 16, because the teacher halves it four times.
        spacing: in-plane spacing in mm that every slice is resampled to; None keeps the volume's own.
        channels: "repeat" (the slice three times, as the thesis) or "neighbours" (the slice between its neighbours).
        window: (low, high) in HU that CT is clipped to.
        percentiles: (low, high) of each volume's non-zero voxels that MR is clipped to.
        published: slices as the published code makes them: intensities clipped to 0..255 whatever the modality, the
            whole field of view resized to the slice whatever the spacing, in the file's own axes.
    """

    size: int = 256
    spacing: float | None = None
    channels: str = "repeat"
    window: tuple[float, float] = (-125.0, 275.0)
    percentiles: tuple[float, float] = (0.5, 99.5)
    published: bool = False

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
        name: unique in its recipe; "E-E", "B-B", "D-D" and "PMD" are the thesis's.
        loss: a name in `kdlib.losses.LOSSES`.
        weight: factor in the total loss.
        temperature: of the contrast or of the softened maps; None leaves the loss's own default.
        options: further arguments of the loss, e.g. `{"hard": 0.5}`.
        student_layers: scales that the student is read at, e.g. "decoder1", "encoder2/2" (pooled by 2) or "logits"; several for a
            loss of several scales, from shallow to deep; by default where the thesis's term of this name reads.
        teacher_layers: scales of the teacher; by default `at`.
        projector: "learned", or, as controls, "frozen" at random weights or "redrawn" at every step.
    """

    name: str
    loss: str
    weight: float
    temperature: float | None = None
    options: tuple[tuple[str, object], ...] = ()
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    projector: str = "learned"

    def __post_init__(self):
        if self.temperature is not None and self.temperature <= 0:
            raise InputError(f"temperature {self.temperature} of term {self.name}: it must be positive")
        if not self.weight >= 0:
            raise InputError(f"weight {self.weight} of term {self.name}: it must be 0 or more")
        if self.projector not in ("learned", "frozen", "redrawn"):
            raise InputError(f"projector {self.projector!r} of term {self.name}: choose learned, frozen or redrawn")
        # dicts and single names are easier to write, only tuples can be part of a frozen key
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in dict(self.options).items()}
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        for field in ("student_layers", "teacher_layers"):
            given = getattr(self, field)
            object.__setattr__(self, field, (given,) if isinstance(given, str) else tuple(given))
        if not self.student_layers and self.name not in SCALES:
            raise InputError(
                f"distillation term {self.name!r}: say where it reads (student_layers=...), or name it {_or(SCALES)}"
            )
        object.__setattr__(self, "student_layers", self.student_layers or SCALES[self.name])
        object.__setattr__(self, "teacher_layers", self.teacher_layers or self.student_layers)
        if len(self.student_layers) != len(self.teacher_layers):
            raise InputError(
                f"term {self.name}: {len(self.student_layers)} scales of the student, {len(self.teacher_layers)} of the teacher"
            )

    @property
    def arguments(self) -> dict[str, object]:
        """What the loss is made with."""
        return dict(self.options) | ({} if self.temperature is None else {"temperature": self.temperature})


@dataclass(frozen=True)
class Recipe:
    """What a network learns from: its labels, its input (reconstruction) and, through `terms`, a teacher.

    Args:
        name: as tables show it.
        segmentation: "dice", or "dice+ce" (plus binary or softmax cross entropy).
        segmentation_weight: factor of the segmentation loss.
        reconstruction_weight: factor of the mean squared error of the reconstruction, where the model has one.
        terms: distillation terms; none for a baseline.
        smoothing: label smoothing: this share of every pixel's target is spread evenly over the classes.
        teacher: "trained", or, as controls, "random" (untrained weights) or "shuffled" (another slice's features).
        budget: "student", or, as a control, "both": the teacher's steps and the student's together.
        balance: the terms' gradients on the student, together, as a multiple of the segmentation loss's: at the first
            step of every epoch their weights are set to that, in proportion to their own; None keeps the weights.
    """

    name: str
    segmentation: str = "dice"
    segmentation_weight: float = 0.4
    reconstruction_weight: float = 0.0
    terms: tuple[Term, ...] = ()
    smoothing: float = 0.0
    teacher: str = "trained"
    budget: str = "student"
    balance: float | None = None

    def __post_init__(self):
        for field, options in (
            ("segmentation", ("dice", "dice+ce")),
            ("teacher", ("trained", "random", "shuffled")),
            ("budget", ("student", "both")),
        ):
            if getattr(self, field) not in options:
                raise InputError(f"recipe {self.name!r}, {field} {getattr(self, field)!r}: choose {_or(options)}")
        if not 0 <= self.smoothing < 1:
            raise InputError(f"recipe {self.name!r}, label smoothing {self.smoothing}: choose from 0 to below 1")
        if self.balance is not None and not (self.balance > 0 and any(term.weight for term in self.terms)):
            raise InputError(
                f"recipe {self.name!r}, balance {self.balance}: give a positive one, and terms with weights"
            )
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise InputError(f"recipe {self.name!r} names a distillation term twice: {', '.join(names)}")


def _or(names) -> str:
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}"


TEACHER_RECIPE = Recipe("teacher", "dice+ce", segmentation_weight=1.0, reconstruction_weight=0.2)
BASELINE = Recipe("baseline")


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
    """How a study is done. Each switch keeps one fault of the published study; `corrected` keeps none.

    Args:
        redrawn_projectors: projections of features are drawn anew at every step and never trained (fault 1).
        one_channel_softmax: the prediction-map term takes a softmax over one channel; it is then exactly 0 (fault 2).
        own_optimisers: teacher, baseline and distilled students each have the published optimiser, learning rate,
            schedule and batch, and baselines the teachers' Dice + cross entropy (fault 4).
        test_selection: the best epoch is chosen on the test patients (fault 5).
        pooled_dice: Dice of the pixels of all slices pooled, in selection and result (fault 7).
        logit_threshold: the raw logit is cut at 0.5, a probability of 0.62; one-channel models (fault 9).
        byte_image: intensities are clipped to 0..255 by an image conversion; no window, spacing or orientation (10).
        unlabelled_contrast: contrast of one vector a slice, without labels (fault 12).
    """

    name: str
    redrawn_projectors: bool = False
    one_channel_softmax: bool = False
    own_optimisers: bool = False
    test_selection: bool = False
    pooled_dice: bool = False
    logit_threshold: bool = False
    byte_image: bool = False
    unlabelled_contrast: bool = False


SWITCHES = {  # in the order in which the bridge mends them -> the mended state in a few words
    "own_optimisers": "one optimiser for all",
    "byte_image": "HU window, spacing",
    "redrawn_projectors": "learned projectors",
    "one_channel_softmax": "Bernoulli KL",
    "unlabelled_contrast": "contrast with labels",
    "test_selection": "selection on validation",
    "logit_threshold": "cut at probability 0.5",
    "pooled_dice": "Dice by volume",
}
PROTOCOLS = {
    "corrected": Protocol("corrected"),
    "thesis": Protocol("thesis", **dict.fromkeys(SWITCHES, True)),
}
LOGIT_CUT = 1 / (1 + math.exp(-0.5))  # probability of a logit of 0.5
SHARED_OPTIMISATION = Optimisation()  # for every arm, so that arms differ in nothing but what they learn from
PUBLISHED_OPTIMISATION = {
    "teacher": Optimisation("adamw", 1e-4, 8, schedule="constant"),
    "baseline": Optimisation("adamw", 1.5e-4, 16, schedule="constant"),
    "distilled": Optimisation("rmsprop", 1e-2, 20, weight_decay=0.0, schedule="constant"),
}


def cumulative_correction() -> list[Protocol]:
    """From `thesis` to `corrected`, one fault mended at a time; each protocol is named after what was mended last."""
    steps = [PROTOCOLS["thesis"]]
    for switch, name in SWITCHES.items():
        steps.append(dataclasses.replace(steps[-1], name=name, **{switch: False}))
    return steps


@dataclass(frozen=True)
class Profile:
    """How large a study is; `reduced_from_thesis` says in words what it takes away from the thesis's size.

    Args:
        view: slices.
        width: factor on the teachers' channels (1.0 is the thesis; students are never shrunk).
        teacher_epochs, student_epochs: epochs of each training.
        teacher_steps, student_steps: optimiser steps an epoch; None means one pass over the teacher's part, and for
            students (of every label fraction, so that all have the same budget) over half of it.
        folds: number of outer folds the patients are split into.
        reduced_from_thesis: what a reader must know before comparing with the thesis.
    """

    name: str
    preprocessing: Preprocessing
    width: float = 1.0
    teacher_epochs: int = 200
    student_epochs: int = 120
    teacher_steps: int | None = None
    student_steps: int | None = None
    folds: int = 5
    reduced_from_thesis: str = "nothing"


def _shrunk(
    name: str, preprocessing: Preprocessing, epochs: int, steps: int, folds: int, reduced_from_thesis: str
) -> Profile:
    """A profile for CPUs: teachers a quarter as wide, the same length for teachers and students."""
    reduced_from_thesis = f"{reduced_from_thesis}, teachers a quarter as wide, {epochs * steps} steps a training"
    return Profile(name, preprocessing, 0.25, epochs, epochs, steps, steps, folds, reduced_from_thesis)


PROFILES = {
    "quick": Profile(
        "quick",
        Preprocessing(64, 5.0),
        width=0.25,
        teacher_epochs=4,
        student_epochs=3,
        teacher_steps=50,
        student_steps=35,
        folds=4,
        reduced_from_thesis="64 x 64 slices at 5 mm, teachers a quarter as wide, 200 steps for them and 105 for students: "
        "to try out, not for claims",
    ),
    "hippocampus": _shrunk(
        "hippocampus", Preprocessing(64, 1.0), 10, 40, 5, "64 x 64 slices at 1 mm (a hippocampus volume fits)"
    ),
    "ct128": _shrunk("ct128", Preprocessing(128, 3.0), 8, 50, 4, "128 x 128 slices at 3 mm"),
    "thesis": Profile("thesis", Preprocessing(256, 1.5)),
}


@dataclass(frozen=True)
class Run:
    """One training and its evaluation: everything that changes the result, and nothing else.

    Args:
        data: a folder in Decathlon layout, or "phantom".
        target: label names to segment ("spleen"), several joined by ",", or "all".
        model: a name in `kdlib.models.MODELS`: "T1", "T2", "S1", "S2", or one added there.
        fold: outer fold whose patients are the test part.
        fraction: part of the training patients whose labels are used (nested: 0.5 lies in 1.0).
        teacher: the model that is_teacher a distilled student, several joined by "+", else None. A student (`STUDENTS`) as
            teacher was trained alone, on the same fraction.
        recipe: what the model learns from; None means `TEACHER_RECIPE` for T1 and T2 and `BASELINE` for others.
        seed: of initial weights, data order and augmentation.
        teacher_seed: seed of the teacher that a distilled student learns from.
        profile, protocol: size, and the published faults that are kept.
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
        if self.recipe is None:
            object.__setattr__(self, "recipe", TEACHER_RECIPE if self.model in TEACHERS else BASELINE)
        if (self.teacher is None) != (not self.recipe.terms):
            raise InputError(f"recipe {self.recipe.name!r}, teacher {self.teacher}: distillation needs both or neither")
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
    def is_teacher(self) -> bool:
        """Whether the run trains a teacher: at a teacher's length, with the teachers' recipe."""
        return self.recipe == TEACHER_RECIPE

    @property
    def effective_recipe(self) -> Recipe:
        """The recipe with the faults that the protocol keeps."""
        protocol, recipe = self.protocol, self.recipe
        if protocol.own_optimisers and not self.teacher:
            recipe = dataclasses.replace(recipe, segmentation="dice+ce", segmentation_weight=1.0)
        published = {}
        if protocol.one_channel_softmax:
            published["kl"] = "softmax_kl"
        if protocol.unlabelled_contrast:
            published["supcon"] = "infonce"
        terms = []
        for term in recipe.terms:
            loss = published.get(term.loss, term.loss)
            if loss != term.loss:  # a contrast without labels has no use for the options of one with labels
                options = [(name, value) for name, value in term.options if name == "same_patient"]
                term = dataclasses.replace(term, loss=loss, options=tuple(options))
            if protocol.redrawn_projectors and loss in PROJECTED:
                term = dataclasses.replace(term, projector="redrawn")
            terms.append(term)
        return dataclasses.replace(recipe, terms=tuple(terms))

    @property
    def preprocessing(self) -> Preprocessing:
        """The profile's view, as published where the protocol keeps that fault."""
        return dataclasses.replace(self.profile.preprocessing, published=self.protocol.byte_image)

    @property
    def optimisation(self) -> Optimisation:
        if not self.protocol.own_optimisers:
            return SHARED_OPTIMISATION
        return PUBLISHED_OPTIMISATION["teacher" if self.is_teacher else "distilled" if self.teacher else "baseline"]

    @property
    def threshold(self) -> float:
        """Probability above which a pixel of a one-channel model is foreground."""
        return LOGIT_CUT if self.protocol.logit_threshold else 0.5

    def teacher_runs(self) -> dict[str, Run]:
        """Model -> the run that trains it as a teacher of this student: same fold, all of the training patients.

        A student that is_teacher is trained alone, at a student's length, on the fraction of the student that it is_teacher.
        """
        found = {}
        for model in self.teacher.split("+") if self.teacher else ():
            peer = model in STUDENTS
            found[model] = dataclasses.replace(
                self,
                model=model,
                fraction=self.fraction if peer else 1.0,
                teacher=None,
                recipe=BASELINE if peer else TEACHER_RECIPE,
                # the student's own like must not be the student's own baseline
                seed=derive_seed(self.teacher_seed, "peer") if peer else self.teacher_seed,
                teacher_seed=0,
            )
        return found


def override_profile(name: str, changes: dict[str, object] | None = None) -> Profile:
    """The profile called `name` with fields of `Profile` or of its `Preprocessing` changed, e.g. `{"spacing": 2.0, "folds": 3}`.

    Raises:
        InputError: no such profile, or a field that neither has.
    """
    profile, changes = lookup("profile", name, PROFILES), dict(changes or {})
    fields = {field.name for field in dataclasses.fields(Preprocessing)}
    known = [
        field.name for field in dataclasses.fields(Profile) if field.name not in ("name", "preprocessing")
    ] + sorted(fields)
    for field in changes:
        lookup("field of a profile", field, dict.fromkeys(known))
    # JSON and papermill know lists, not tuples, and only tuples can be part of a frozen key
    changes = {field: tuple(value) if isinstance(value, list) else value for field, value in changes.items()}
    if changes:
        said = ", ".join(f"{field} {value}" for field, value in changes.items())
        changes = {"reduced_from_thesis": f"{profile.reduced_from_thesis}; here {said}"} | changes
    view = dataclasses.replace(
        profile.preprocessing, **{field: changes.pop(field) for field in fields & changes.keys()}
    )
    return dataclasses.replace(profile, preprocessing=view, **changes)


def derive_seed(*parts: object) -> int:
    """A seed that depends on every part and on nothing else, so that no random stream shifts another."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6])


def lookup(kind: str, name: str, options: dict):
    """`options[name]`, or an error that lists the names there are."""
    if name not in options:
        raise InputError(f"{kind} {name!r} does not exist: choose from {', '.join(options)}")
    return options[name]
