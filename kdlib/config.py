"""What a run is: frozen, strict descriptions of data view, recipe, protocol, profile and run.

Everything here is plain data. A `Run` holds all that changes a result, so that its key can be a hash of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Literal, get_args

import cattrs

from kdlib.protocol import LOGIT_CUT, PROTOCOLS, PUBLISHED_OPTIMISATION, SWITCHES, Protocol, correction_stages
from kdlib.recipe import BASELINE, SCALES, TEACHER_RECIPE, UNLABELLED, Optimisation, Recipe, Term
from kdlib.strict import AtLeastOne, InputError, Positive, Range, TrainingError, Whole, check_fields, lookup

__all__ = [  # of other files, but imported from here
    "BASELINE", "PROTOCOLS", "SCALES", "SWITCHES", "TEACHER_RECIPE", "UNLABELLED", "InputError", "Optimisation",
    "Protocol", "Recipe", "Term", "TrainingError", "correction_stages", "lookup",
]  # fmt: skip

STUDENTS = ("S1", "S2", "E1")
TEACHERS = ("T1", "T2")
VARIANTS = {  # network of another capacity -> the one that it varies (kdlib/models/registry.py says how)
    "E1-quarter": "E1", "E1-fourfold": "E1", "E1-30px": "E1", "E1-102px": "E1", "E1-230px": "E1",
    "T1-quarter": "T1", "T1-pruned": "T1",
}  # fmt: skip
PRUNED = ("T1-pruned",)  # of them those that start with the channels of the trained network


@dataclass(frozen=True)
class Preprocessing:
    """How a volume becomes slices, or, with three dimensions, patches of a resampled volume.

    Args:
        size: side of the square slice in pixels, or of the cubic patch in voxels; a multiple of 16, because the
            teacher halves it four times.
        spacing: in-plane spacing in mm that every slice is resampled to, of volumes along all three axes; None keeps
            the volume's own.
        channels: "repeat" (the slice three times, as the thesis) or "neighbours" (the slice between its neighbours).
        window: (low, high) in HU that CT is clipped to.
        percentiles: (low, high) of each volume's non-zero voxels that MR is clipped to.
        published: slices as the published code makes them: intensities clipped to 0..255 whatever the modality, the
            whole field of view resized to the slice whatever the spacing, in the file's own axes.
        dimensions: 2 for slices, 3 for volumes: the one field that makes all networks, losses and augmentation 3D.
    """

    size: Annotated[int, Range(16)] = 256
    spacing: Positive | None = None
    channels: Literal["repeat", "neighbours"] = "repeat"
    window: tuple[float, float] = (-125.0, 275.0)
    percentiles: tuple[float, float] = (0.5, 99.5)
    published: bool = False
    dimensions: Annotated[int, Range(2, 3)] = 2

    def __post_init__(self):
        check_fields(self)
        if self.size % 16:
            why = "the U-Nets halve it four times, so it must be a multiple of 16"
            what = "slice" if self.dimensions == 2 else "patch"
            raise InputError(f"{what} size {self.size}: {why}; try {max(16, round(self.size / 16) * 16)}")
        if self.dimensions == 3:
            for refused, why in (
                (self.spacing is None, "volumes need one spacing in mm along all three axes: give it, e.g. 1.0"),
                (self.channels != "repeat", "channels 'neighbours' are of slices, and volumes have one: give 'repeat'"),
                (self.published, "the published conversion makes slices: choose a protocol without byte_image"),
            ):
                if refused:
                    raise InputError(f"dimensions 3: {why}")
        if not self.window[0] < self.window[1]:
            raise InputError(f"window {self.window}: the low end must be under the high end (HU)")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise InputError(f"percentiles {self.percentiles}: give low < high between 0 and 100")

    @property
    def unit(self) -> str:
        """What a network takes, in the plural."""
        return "slices" if self.dimensions == 2 else "patches"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Channels and sides of what a network takes: (3, size, size) of a slice, (1, size, size, size) of a patch."""
        return (3 if self.dimensions == 2 else 1, *[self.size] * self.dimensions)


@dataclass(frozen=True)
class Profile:
    """How large a study is; `reduced_from_thesis` says in words what it takes away from the thesis's size.

    Args:
        preprocessing: how volumes become slices.
        width: factor on the teachers' channels (1.0 is the thesis; students are never shrunk).
        teacher_epochs, student_epochs: epochs of each training.
        teacher_steps, student_steps: optimiser steps an epoch; None means one pass over the teacher's part, and for
            students (of every label fraction, so that all have the same budget) over half of it.
        folds: number of outer folds the patients are split into.
        reduced_from_thesis: what a reader must know before comparing with the thesis.
        teacher, student: optimisation of all teachers, and of all students whatever they learn from; chosen on
            validation patients (docs/recipe.md).
        networks: that a study trains where its notebook names none.
        step_cost: time of a step of a distilled student, its teacher's pass included, as a multiple of the same
            student's step without teacher. S1 takes 3.4 times as long under the thesis's recipe, E1 3.2 and S2 1.8
            (benchmarks/training.py --size 64, one core, float32).
    """

    name: str
    preprocessing: Preprocessing
    width: Positive = 1.0
    teacher_epochs: AtLeastOne = 200
    student_epochs: AtLeastOne = 120
    teacher_steps: AtLeastOne | None = None
    student_steps: AtLeastOne | None = None
    folds: Annotated[int, Range(2)] = 5
    reduced_from_thesis: str = "nothing"
    teacher: Optimisation = Optimisation(lr=2e-3, target_share=0.5)
    student: Optimisation = Optimisation(lr=8e-3, target_share=0.5)
    step_cost: Annotated[float, Range(1)] = 3.5
    networks: tuple[str, ...] = TEACHERS + STUDENTS

    def __post_init__(self):
        check_fields(self)


def _reduced(
    name: str, preprocessing: Preprocessing, teacher_steps: int, student_steps: int, folds: int, said: str,
    batch: int = 16,
) -> Profile:  # fmt: skip
    """A profile for CPUs: teachers a quarter as wide, and steps after which validation Dice hardly rises any more."""
    epochs = 10  # validations of each training
    said = f"{said}, teachers a quarter as wide, {teacher_steps} steps for them and {student_steps} for students"
    return Profile(
        name, preprocessing, 0.25, epochs, epochs, teacher_steps // epochs, student_steps // epochs, folds, said,
        teacher=Optimisation(lr=2e-3, batch=batch, target_share=0.5),
        student=Optimisation(lr=8e-3, batch=batch, target_share=0.5),
    )  # fmt: skip


PROFILES = {  # lengths, sizes and optimisation were chosen on validation patients: docs/recipe.md
    "quick": _reduced(
        "quick", Preprocessing(48, 6.5), 480, 200, 2, "to try out, not for claims: 48 x 48 slices at 6.5 mm", batch=8
    ),
    "hippocampus": _reduced(
        "hippocampus", Preprocessing(64, 1.0, "neighbours"), 1200, 1200, 5, "64 x 64 slices at 1 mm (a volume fits)"
    ),
    "hippocampus3d": dataclasses.replace(
        _reduced("hippocampus3d", Preprocessing(48, 1.0, dimensions=3), 600, 800, 5, "48 x 48 x 48 at 1 mm", batch=2),
        networks=("T1", "S1", "E1"),
    ),
    "ct96": _reduced("ct96", Preprocessing(96, 4.0, "neighbours"), 1200, 2400, 4, "96 x 96 slices at 4 mm"),
    "ct128": _reduced("ct128", Preprocessing(128, 3.0, "neighbours"), 1200, 2400, 4, "128 x 128 slices at 3 mm"),
    "thesis": Profile("thesis", Preprocessing(256, 1.5)),
}


@dataclass(frozen=True)
class Run:
    """One training and its evaluation: everything that changes the result, and nothing else.

    Args:
        data: a folder in Decathlon layout, or "phantom".
        target: label names to segment ("spleen"), several joined by ",", or "all".
        model: a name in `kdlib.models.MODELS`: "T1", "S1", "E1" and others, or one added there.
        fold: outer fold whose patients are the test part.
        fraction: part of the training patients whose labels are used (nested: 0.5 lies in 1.0).
        teacher: the model that a distilled student learns from, several joined by "+", else None. A student
            (`STUDENTS`) as teacher was trained alone, on the same fraction. "self" is the student as it stands, on the
            same slices with other noise (the consistency control).
        recipe: what the model learns from; None means `TEACHER_RECIPE` for T1 and T2 and `BASELINE` for others.
        seed: of initial weights, data order and augmentation.
        teacher_seed: seed of the teacher that a distilled student learns from.
        profile, protocol: size, and the published faults that are kept.
        length: factor on the profile's steps; each length is a full schedule of its own.
        on_defect: "raise" stops at defective cases of the data, "drop" leaves them out and reports them.
        group: how cases are grouped into patients (see `kdlib.data.index`).
    """

    data: str
    target: str
    model: str
    fold: Whole = 0
    fraction: Annotated[float, Range(above=0, high=1)] = 1.0
    teacher: str | None = None
    recipe: Recipe | None = None
    seed: Whole = 0
    teacher_seed: Whole = 0
    length: Positive = 1.0
    profile: Profile = PROFILES["quick"]
    protocol: Protocol = PROTOCOLS["corrected"]
    on_defect: Literal["raise", "drop"] = "raise"
    group: str = "auto"

    def __post_init__(self):
        if self.recipe is None:
            object.__setattr__(self, "recipe", TEACHER_RECIPE if self.model in TEACHERS else BASELINE)
        check_fields(self)
        if (self.teacher is None) != (not self.recipe.terms and not self.recipe.pseudo_labels):
            raise InputError(f"recipe {self.recipe.name!r}, teacher {self.teacher}: distillation needs both or neither")
        alike = all(term.teacher_layers == term.student_layers for term in self.recipe.terms)
        if self.teacher == "self" and (self.recipe.pseudo_labels or self.recipe.teacher != "trained" or not alike):
            asked = "neither pseudo-labels, nor another teacher, nor other layers of it"
            raise InputError(f"recipe {self.recipe.name!r}, teacher 'self': the student itself has {asked}")
        if self.recipe.unlabelled and self.fraction == 1:
            raise InputError(f"recipe {self.recipe.name!r}: with label fraction 1 no image is unlabelled; lower it")
        if self.fold >= self.profile.folds:
            known = f"profile {self.profile.name!r} has 0 to {self.profile.folds - 1}"
            raise InputError(f"fold {self.fold} does not exist: {known}")
        _ = self.preprocessing  # whatever it refuses

    @property
    def label(self) -> str:
        """The run in a line of a log or an error."""
        return f"{self.method}, fold {self.fold}, seed {self.seed}"

    @property
    def method(self) -> str:
        """Which row of a table the run belongs to: all about it but data, protocol, fold and seed, by the names of its
        model, teacher and recipe, and its dimensions. To be compared with other runs' and with nothing else."""
        model = self.model if self.fraction == 1 else f"{self.model}@{100 * self.fraction:g}"
        model += "" if self.length == 1 else f"x{self.length:g}"
        head = f"KD({self.teacher},{self.model}){model.removeprefix(self.model)}" if self.teacher else model
        head = f"3D {head}" if self.preprocessing.dimensions == 3 else head
        return head if self.recipe in (TEACHER_RECIPE, BASELINE) else f"{head}:{self.recipe.name}"

    @property
    def role(self) -> str:
        """ "teacher", "baseline", "distilled" or "control"."""
        if self.recipe.control:
            return "control"
        return "distilled" if self.teacher else "teacher" if self.is_teacher else "baseline"

    @property
    def is_teacher(self) -> bool:
        """Whether the run trains a teacher: at a teacher's length, with the teachers' recipe."""
        return self.recipe == TEACHER_RECIPE

    @property
    def effective_recipe(self) -> Recipe:
        """The recipe with the faults that the protocol keeps, and without terms of weight 0, which change nothing."""
        protocol, recipe = self.protocol, self.recipe
        if protocol.own_optimisers:
            change = {"segmentation": "dice", "smoothing": 0.0} if self.teacher else {"segmentation_weight": 1.0}
            recipe = dataclasses.replace(recipe, **change)
        published = {"kl": "softmax_kl"} if protocol.one_channel_softmax else {}
        published |= {"supcon": "infonce"} if protocol.unlabelled_contrast else {}
        terms = []
        for term in filter(lambda term: term.weight, recipe.terms):
            if loss := published.get(term.loss):  # a contrast without labels has no use for options of one with them
                options = tuple((name, value) for name, value in term.options if name == "same_patient")
                term = dataclasses.replace(term, loss=loss, options=options)
            terms.append(term)
        features = any(term.student_layers != SCALES["PMD"] for term in terms)
        redrawn = recipe.redrawn_projectors or (protocol.redrawn_projectors and features)
        return dataclasses.replace(recipe, terms=tuple(terms), redrawn_projectors=redrawn)

    @property
    def is_taught(self) -> bool:
        """Whether anything of a teacher reaches the network: not with zero weights, the negative control."""
        return bool(self.effective_recipe.terms) or self.recipe.pseudo_labels

    @property
    def preprocessing(self) -> Preprocessing:
        """The profile's, as published where the protocol keeps that fault."""
        return dataclasses.replace(self.profile.preprocessing, published=self.protocol.byte_image)

    @property
    def optimisation(self) -> Optimisation:
        if not self.protocol.own_optimisers:
            return self.profile.teacher if self.is_teacher else self.profile.student
        return PUBLISHED_OPTIMISATION["teacher" if self.is_teacher else "distilled" if self.teacher else "baseline"]

    @property
    def threshold(self) -> float:
        """Probability above which a pixel of a one-channel model is foreground."""
        return LOGIT_CUT if self.protocol.logit_threshold else 0.5

    def teacher_runs(self) -> dict[str, Run]:
        """Model -> the run that trains it as a teacher of this student: same fold, all of the training patients.

        A student as teacher is trained alone, at a student's length, on the fraction of the student that it teaches.
        """
        found = {}
        for model in self.teacher.split("+") if self.teacher not in (None, "self") else ():
            peer = model in STUDENTS
            # in self-distillation the teacher must not be the student's own baseline
            seed = derive_seed(self.teacher_seed, "peer") if peer else self.teacher_seed
            found[model] = dataclasses.replace(
                self, model=model, fraction=self.fraction if peer else 1.0, teacher=None, length=1.0,
                recipe=BASELINE if peer else TEACHER_RECIPE, seed=seed, teacher_seed=0,
            )  # fmt: skip
        return found

    @property
    def origin(self) -> Run | None:
        """The run whose network this one is pruned from, of the same fold and label fraction; None for all others."""
        if self.model not in PRUNED:
            return None
        return dataclasses.replace(
            self, model=VARIANTS[self.model], teacher=None, recipe=TEACHER_RECIPE, length=1.0, seed=self.teacher_seed,
            teacher_seed=0,
        )  # fmt: skip

    def needed_runs(self) -> list[Run]:
        """What must be done before this run: its teachers, and the network that it is pruned from."""
        return [*self.teacher_runs().values(), *([self.origin] if self.origin else [])]


def to_json(run: Run) -> dict:
    """A run as values that JSON can hold; `from_json` gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def from_json(record: object) -> Run:
    """The run that JSON describes: an object of the fields of `Run`, of which profile and protocol may be names.

    Raises: InputError: a field that does not exist, is missing, or has a value of another type or out of range.
    """
    return structure(record, Run)


def structure(record: object, kind: type):
    """A description (a frozen dataclass) of what JSON holds, strictly.

    Raises:
        InputError: a field that does not exist, is missing, or has a value of another type or out of range.
    """
    try:
        return _CONVERTER.structure(record, kind)
    except cattrs.BaseValidationError as group:
        raise InputError("; ".join(cattrs.transform_error(group, kind.__name__.lower(), _fault))) from None


def _fault(error: BaseException, kind: type | None) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        fields = ", ".join(field.name for field in dataclasses.fields(error.cl))
        names = ", ".join(sorted(map(repr, error.extra_fields)))
        return f"field {names} of a {error.cl.__name__.lower()} does not exist: choose from {fields}"
    said = {KeyError: "a required field is missing", TypeError: "give a list"}
    return said.get(type(error)) or str(error)


def _holds_dataclass(kind: object) -> bool:
    return is_dataclass(kind) or any(map(_holds_dataclass, get_args(kind)))


def _converter() -> cattrs.Converter:
    """Reads nested dataclasses; of all other values, their `check_fields` judges types and ranges."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook_func(lambda kind: not _holds_dataclass(kind), lambda value, _: value)
    for plain in (int, float, str, bool):  # of `Annotated` ones, too
        converter.register_structure_hook(plain, lambda value, _: value)
    named = {Profile: PROFILES, Protocol: PROTOCOLS}

    def reader(kind: type) -> Callable[[object, type], object]:
        read = cattrs.gen.make_dict_structure_fn(kind, converter)

        def structure(value: object, kind: type) -> object:
            if kind in named and isinstance(value, str):
                return lookup(kind.__name__.lower(), value, named[kind])
            if not isinstance(value, Mapping):
                raise InputError(f"{value!r:.50} is no {kind.__name__.lower()}: give its fields")
            return read(value, kind)

        return structure

    converter.register_structure_hook_factory(is_dataclass, reader)
    return converter


_CONVERTER = _converter()


def override_profile(name: str, changes: dict[str, object] | None = None) -> Profile:
    """The profile called `name` with fields of it or its `Preprocessing` changed, e.g. `{"spacing": 2.0, "folds": 3}`;
    of teacher and student also single fields of their `Optimisation`, e.g. `{"student": {"lr": 0.004}}`.

    Raises: InputError: no such profile, or a field that neither has.
    """
    profile = lookup("profile", name, PROFILES)
    if not isinstance(changes or {}, Mapping):
        raise InputError(f"changes {changes!r} of profile {name!r}: give fields and values, e.g. {{'folds': 3}}")
    own, view = ([field.name for field in dataclasses.fields(kind)] for kind in (Profile, Preprocessing))
    known = dict.fromkeys(name for name in own + view if name not in ("name", "preprocessing", "published"))
    changes = dict(changes or {})
    for field in changes:
        lookup("field of a profile", field, known)
    if changes:
        said = ", ".join(f"{field} {value}" for field, value in changes.items())
        changes = {"reduced_from_thesis": f"{profile.reduced_from_thesis}; here {said}"} | changes
    of_optimisation = dict.fromkeys(field.name for field in dataclasses.fields(Optimisation))
    for whose in ("teacher", "student"):
        if isinstance(own := changes.get(whose), Mapping):
            for field in own:
                lookup(f"field of the {whose}'s optimisation", field, of_optimisation)
            changes[whose] = dataclasses.replace(getattr(profile, whose), **own)
    of_view = {field: changes.pop(field) for field in view if field in changes}
    return dataclasses.replace(profile, preprocessing=dataclasses.replace(profile.preprocessing, **of_view), **changes)


def derive_seed(*parts: object) -> int:
    """A seed that depends on every part and on nothing else, so that no random stream shifts another."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6])
