"""The recipes of the experiments: the thesis's, every distiller alone, and the negative controls."""

from __future__ import annotations

import dataclasses

from kdlib.config import SCALES, Recipe, Run, Term, lookup
from kdlib.losses import LOSSES

WEIGHTS = {"E-E": 0.1, "B-B": 0.2, "D-D": 0.1, "PMD": 0.2}  # of the thesis
BALANCE = 0.5  # gradient of a distiller that is compared with others, as a multiple of the segmentation loss's
QUICK = ("kl", "dkd", "fitnet", "at", "sp", "ifvd", "infonce", "supcon")  # two of each family, for a small comparison


def comparison_losses(quick: bool = False) -> tuple[str, ...]:
    """Names of the losses to compare, by family: all but the published one that is always 0 on one channel.

    Args:
        quick: two of each family alone.
    """
    return QUICK if quick else tuple(name for name in LOSSES if name != "softmax_kl")


def thesis_recipe(student: str, loss: str = "supcon", only: tuple[str, ...] = tuple(WEIGHTS)) -> Recipe:
    """The thesis's four terms, with its weights and temperatures, for a chosen feature loss.

    Args:
        student: "S1" (contrastive temperature 0.4), "S2" or another (0.1).
        loss: of the feature terms: "supcon" (supervised contrast on pixels), "infonce" as published, "fitnet", or any
            other feature loss of `kdlib.losses.LOSSES`, which then keeps its own temperature.
        only: the terms to keep, for an ablation.
    """
    for name in only:
        lookup("distillation term", name, WEIGHTS)
    temperature = _temperature(student, loss)
    terms = tuple(
        Term(name, "kl", weight, 4.0) if name == "PMD" else Term(name, loss, weight, temperature)
        for name, weight in WEIGHTS.items()
        if name in only
    )
    names = "+".join(term.name for term in terms)
    return Recipe(f"{loss}:{names}" if names != "PMD" else names, terms=terms)


def _temperature(student: str, loss: str) -> float | None:
    return {"S1": 0.4}.get(student, 0.1) if loss in ("supcon", "infonce") else None


def prediction_recipe() -> Recipe:
    """KL on predictions alone (Hinton 2015), with the weight and temperature of docs/recipe.md."""
    return Recipe("predictions", terms=(Term("PMD", "kl", 0.4, temperature=1.0),))


def unlabelled() -> Recipe:
    """The same on slices of all training patients; the segmentation loss sees those with labels."""
    return dataclasses.replace(prediction_recipe(), name="predictions, unlabelled images", unlabelled=True)


def consistency() -> Recipe:
    """Control of `unlabelled`: the same images without a teacher; the student agrees with itself under other noise."""
    return dataclasses.replace(unlabelled(), name="self-consistency", control="self_consistency")


def unused_images() -> Recipe:
    """Control of these three: the same batches, of which the half without labels teaches nothing. With `unlabelled` a
    student sees half as many labelled slices in each step as without, and so does this one."""
    return Recipe("unused unlabelled images", unlabelled=True, control="unused_images")


def pseudo_labels() -> Recipe:
    """Control of `unlabelled`: the teacher's masks as labels of the images that have none, and no distillation."""
    return Recipe("pseudo-labels", unlabelled=True, pseudo_labels=True, control="pseudo_labels")


def distiller(loss: str, student: str) -> Recipe:
    """One distiller alone, where its paper puts it: prediction maps at the logits, features at E-E, B-B and D-D.

    Papers scale their losses in all ways, so weights would compare scales, not distillers: here each distiller's
    gradient on the student is kept at `BALANCE` times that of the segmentation loss (see `kdlib.training`).

    Args:
        loss: one of `comparison_losses()`.
        student: for the thesis's temperature of its contrast, 0.4 for "S1" and 0.1 for others.

    Raises: InputError: no such loss.
    """
    made = lookup("distillation loss", loss, {name: LOSSES[name] for name in comparison_losses()})
    if made.reads == "logits":
        terms = (Term("PMD", loss, 1.0),)
    elif made.adapt == "own":
        terms = (Term("scales", loss, 1.0, student_layers=("encoder1", "encoder2", "bottleneck")),)
    else:
        features = [name for name, at in SCALES.items() if at != ("logits",)]
        terms = tuple(Term(name, loss, WEIGHTS[name], _temperature(student, loss)) for name in features)
    return Recipe(loss, terms=terms, balance=BALANCE)


def zero_weights(student: str) -> Recipe:
    """Control of the thesis's recipe: its terms weigh nothing."""
    recipe = thesis_recipe(student)
    silent = tuple(dataclasses.replace(term, weight=0.0) for term in recipe.terms)
    return dataclasses.replace(recipe, name="zero_weights", control="zero_weights", terms=silent)


def controls(student: str, teacher: str, **setting) -> list[Run]:
    """Negative controls of the thesis's recipe: if they do as well as it does, distillation is worth nothing.

    Zero weights; a teacher with random weights; a shuffled teacher (another slice's features); projectors frozen at
    random weights, or redrawn at every step; and, without a teacher, label smoothing and a student trained for the
    teacher's steps and its own together, or for the time of the distilled one; and self-distillation.

    Args:
        setting: the other fields of the runs.
    """
    recipe = thesis_recipe(student)
    frozen = tuple(t if t.name == "PMD" else dataclasses.replace(t, projector="frozen") for t in recipe.terms)
    taught = {
        "random_teacher": dict(teacher="random"), "shuffled_teacher": dict(teacher="shuffled"),
        "frozen_projectors": dict(terms=frozen), "redrawn_projectors": dict(redrawn_projectors=True),
    }  # fmt: skip
    changed = [dataclasses.replace(recipe, name=name, control=name, **change) for name, change in taught.items()]
    runs = [Run(model=student, teacher=teacher, recipe=each, **setting) for each in (zero_weights(student), *changed)]
    alone = [
        Recipe("label_smoothing", smoothing=0.1, control="label_smoothing"),
        Recipe("longer_training", budget="teacher+student", control="longer_training"),
        Recipe("equal_time", budget="wall_clock", control="equal_time"),
    ]
    runs += [Run(model=student, recipe=recipe, **setting) for recipe in alone]
    own = dataclasses.replace(recipe, name="self_distillation", control="self_distillation")
    return [*runs, Run(model=student, teacher=student, recipe=own, **setting)]
