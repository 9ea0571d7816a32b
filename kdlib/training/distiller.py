"""Distillation terms: from the features of teachers and a student to a dict of losses."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlib.config import UNLABELLED, InputError, Recipe, Term, derive_seed, lookup
from kdlib.losses import LOSSES, Context
from kdlib.training.adapters import Adapter, resize
from kdlib.training.device import seeded_rng
from kdlib.training.hooks import scales_of, split_scale


def _arguments(term: Term) -> tuple[type[nn.Module], dict[str, object]]:
    """The loss of a term and what it is made with. Raises: InputError for what does not exist or fit."""
    loss = lookup("distillation loss", term.loss, LOSSES)
    parameters = inspect.signature(loss).parameters
    own = [name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    options = [name for name in own if loss.adapt != "own" or name not in _SHAPES]
    unknown = [name for name in term.arguments if name not in options]
    if unknown:
        asked = f"term {term.name}: loss {term.loss!r} has no option {', '.join(unknown)}"
        raise InputError(f"{asked}; it has {', '.join(options) or 'none'}")
    for name, value in term.arguments.items():
        if isinstance(parameters[name].default, bool) and not isinstance(value, bool):
            raise InputError(f"term {term.name}: option {name} is {value!r}: give true or false")
    read = [split_scale(scale) for scale in term.student_layers + term.teacher_layers]
    if {layer == "logits" for layer, _ in read} != {loss.reads == "logits"}:
        kind = "logits: let it read at 'logits'" if loss.reads == "logits" else "features: let it read at scales"
        raise InputError(f"term {term.name}: loss {term.loss!r} compares {kind}")
    if len(term.student_layers) > 1 and loss.adapt != "own":
        raise InputError(f"term {term.name}: loss {term.loss!r} takes one scale; write a term for each")
    if any(factor > 1 for _, factor in read) and (loss.adapt == "own" or loss.reads == "logits"):
        raise InputError(f"term {term.name}: loss {term.loss!r} reads whole maps: name its scales without a factor")
    if term.projector != "learned" and loss.adapt in ("none", "own"):
        raise InputError(f"term {term.name}: loss {term.loss!r} has no projector that could be {term.projector}")
    return loss, term.arguments


_SHAPES = ("student_channels", "teacher_channels", "dims")


def check_recipe(recipe: Recipe) -> None:
    """Raises InputError where a term names a loss, an option or a scale that cannot be."""
    for term in recipe.terms:
        if hasattr(nn.ModuleDict(), term.name):
            raise InputError(f"distillation term {term.name!r}: PyTorch has this word for itself; choose another name")
        loss, arguments = _arguments(term)
        shapes = ([8] * len(term.student_layers), [8] * len(term.student_layers), 2) if loss.adapt == "own" else ()
        loss(*shapes, **arguments)
    scales_of([recipe]), scales_of([recipe], "teacher")


class DistillationTerm(nn.Module):
    """One term between one student and one teacher: adapters where the loss needs them, and the loss.

    Args:
        term: what is compared, where and how.
        student, teacher: scale name -> [N, H, W (, D)] (see `probe`).
        redrawn: draw its projectors anew at every step, as the published code does.
    """

    def __init__(self, term: Term, student: Mapping[str, Sequence[int]], teacher: Mapping, redrawn: bool):
        super().__init__()
        self.term = term
        loss, arguments = _arguments(term)
        self.adapters = nn.ModuleList()
        if loss.adapt == "own":
            shapes = self._read(student, teacher)
            channels = [[shape[0] for shape in side] for side in shapes]
            self.loss = loss(*channels, len(shapes[0][0]) - 1, **arguments)
            return
        self.loss = loss(**arguments)
        if loss.reads == "features":
            (shape,), (teacher_shape,) = self._read(student, teacher)
            scales, kind = (*term.student_layers, *term.teacher_layers), "redrawn" if redrawn else term.projector
            self.adapters.append(Adapter(loss.adapt, shape, teacher_shape, scales, kind))

    def _read(self, student: Mapping, teacher: Mapping) -> tuple[list, list]:
        """What the term reads of both sides, scale by scale."""
        sides = (student, self.term.student_layers), (teacher, self.term.teacher_layers)
        return tuple([found[split_scale(scale)[0]] for scale in scales] for found, scales in sides)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, context: Context, seed: int
    ) -> Tensor:
        students, teachers = self._read(student, teacher)
        if self.loss.adapt == "own":
            return self.loss(students, teachers, labels, context)
        (student,), (teacher,) = students, teachers
        if self.adapters:
            student, teacher = self.adapters[0](student, teacher, derive_seed(seed, "projector"))
        else:
            teacher = resize(teacher, student.shape[2:])
        return self.loss(student, teacher, labels, context)

    def describe(self) -> str:
        """What is compared with what, in words."""
        if self.adapters:
            return self.adapters[0].description
        own = "; the loss's own projections" if self.loss.adapt == "own" else ""
        return f"student {', '.join(self.term.student_layers)}; teacher {', '.join(self.term.teacher_layers)}{own}"


def shuffled_features(features: Mapping[str, Tensor], patients: Tensor, seed: int) -> dict[str, Tensor]:
    """Every image gets the features of another one of the batch, the same one for all scales: of another patient, as
    far as no patient has more than half of the batch. The shuffled teacher, a negative control, gives these."""
    ring = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed))
    ring = ring[patients.cpu()[ring].argsort(stable=True)]  # a ring through all images, patient by patient
    steps = int(patients.unique(return_counts=True)[1].max())  # along it, so many lead out of every patient
    other = torch.empty_like(ring)
    other[ring] = ring.roll(steps if steps < len(ring) else 1)
    return {name: feature[other.to(feature.device)] for name, feature in features.items()}


class Distiller(nn.Module):
    """All distillation terms of a recipe for one student and its teachers.

    Its parameters are the projectors; they belong into the student's optimiser. Initial weights depend on `seed` and
    on the term's name alone, so a term starts alike in every subset of an ablation. With several teachers every term
    is there once per teacher, under the name "<teacher> <term>", and its weight is divided among them.

    Args:
        recipe: its terms say what is compared, how, and with which temperature; a "shuffled" teacher is shuffled here.
        student: scale name -> [N, H, W (, D)] of the student (see `probe`).
        teachers: teacher -> the same of it.
        seed: of the projectors.
        patients: numbers of the training patients, whose features alone may enter a memory.
    """

    def __init__(
        self, recipe: Recipe, student: Mapping[str, Sequence[int]], teachers: Mapping[str, Mapping[str, Sequence[int]]],
        seed: int, patients: Iterable[int] = (),
    ):  # fmt: skip
        super().__init__()
        self.shuffled = recipe.teacher == "shuffled"
        self.ignored = UNLABELLED if recipe.unlabelled and not recipe.pseudo_labels else None
        self.terms, self.weights, self.teacher_of = nn.ModuleDict(), {}, {}
        for teacher, shapes in teachers.items():
            for term in recipe.terms:
                name = term.name if len(teachers) == 1 else f"{teacher} {term.name}"
                with seeded_rng(derive_seed(seed, "projector", name)):
                    self.terms[name] = DistillationTerm(term, student, shapes, recipe.redrawn_projectors)
                self.weights[name] = term.weight / len(teachers)
                self.teacher_of[name] = teacher
        known = sorted(set(patients))
        for module in self.modules():
            if hasattr(module, "allow_patients"):
                module.allow_patients(known)

    def forward(
        self, student: Mapping[str, Tensor], teachers: Mapping[str, Mapping[str, Tensor]], labels: Tensor, seed: int,
        patients: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Unweighted terms by name.

        Args:
            student: scale name -> features (BNH[WD]), with "logits" the segmentation logits;
                teachers: the same of every teacher.
            labels: BH[WD] class indices of the student's input.
            seed: of whatever a term draws in this step (the pixels of a contrast); each term has its own stream.
            patients: [B], the patient of each image, for terms with a memory and a shuffled teacher.
        """
        if self.shuffled:
            mix = derive_seed(seed, "shuffle")
            teachers = {name: shuffled_features(features, patients, mix) for name, features in teachers.items()}
        losses = {}
        for name, module in self.terms.items():
            own = derive_seed(seed, name)
            ignored = self.ignored if module.loss.needs_labels else None
            context = Context(torch.Generator().manual_seed(own), patients, ignored)
            losses[name] = module(student, teachers[self.teacher_of[name]], labels, context, own)
        return losses

    def learned(self, name: str) -> list[nn.Parameter]:
        """The parameters of a term that are trained with the student."""
        return [parameter for parameter in self.terms[name].parameters() if parameter.requires_grad]

    def describe(self) -> dict[str, str]:
        """Term -> what is compared with what, and how the two were brought to the same channels and grid."""
        return {name: module.describe() for name, module in self.terms.items()}
