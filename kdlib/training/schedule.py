"""How long a run trains, with which optimiser, and how its learning rate goes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import nn

from kdlib.config import TEACHER_RECIPE, Optimisation, Run


def steps_per_epoch(run: Run, slices: int) -> int:
    """Optimiser steps per epoch of `run`.

    Args:
        slices: slices of the teacher's whole training part. Where the profile fixes no number of steps, an epoch is
            one pass over them for a teacher and one pass over half of them for every student, whatever its label
            fraction, so that all students have the same budget.
    """
    fixed = run.profile.teacher_steps if run.is_teacher else run.profile.student_steps
    steps = fixed or math.ceil(slices / (1 if run.is_teacher else 2) / run.optimisation.batch)
    return max(1, round(run.length * steps))


def epochs_of(run: Run, slices: int) -> int:
    """Epochs of `run`: the profile's, or as many more as its recipe's budget asks for (see `Recipe`).

    Args:
        slices: as for `steps_per_epoch`.
    """
    profile = run.profile
    if run.is_teacher:
        return profile.teacher_epochs
    budget = run.effective_recipe.budget
    if budget == "student":
        return profile.student_epochs
    if budget == "wall_clock":
        return round(profile.student_epochs * profile.step_cost)
    teaching = steps_per_epoch(dataclasses.replace(run, recipe=TEACHER_RECIPE, teacher=None, length=1.0), slices)
    return profile.student_epochs + round(profile.teacher_epochs * teaching / steps_per_epoch(run, slices))


def optimiser_of(
    how: Optimisation, parameters: Iterable[nn.Parameter], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Optimiser and schedule of the learning rate for a training of `steps` optimiser steps."""
    if how.optimiser == "adamw":
        fused = how.kernels == "fused" or None  # None is torch's own choice
        optimiser = torch.optim.AdamW(parameters, how.lr, how.betas, weight_decay=how.weight_decay, fused=fused)
    else:
        optimiser = torch.optim.RMSprop(parameters, how.lr, weight_decay=how.weight_decay)
    warmup = max(1, round(how.warmup * steps))

    def factor(step: int) -> float:
        if how.schedule == "constant":
            return 1.0
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
