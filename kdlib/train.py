"""The loop: one frozen teacher, many students on the same batches, one visible training step.

A teacher is trained by the same loop, as a cohort of one without a teacher. Order of the data, augmentation and
initial weights come from streams of random numbers that depend on the seed and the step alone, never on the recipe or
on who else is in the cohort.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from kdlib.config import STUDENTS, Run, TrainingError, derive_seed
from kdlib.data import SliceBank, augment
from kdlib.device import autocast
from kdlib.distill import Distiller, Taps, channels_of, scales_of
from kdlib.evaluate import volume_dice
from kdlib.losses import SegmentationLoss
from kdlib.models import build_model


def steps_per_epoch(run: Run, slices: int) -> int:
    """Optimiser steps an epoch of `run`.

    Args:
        slices: slices of the teacher's whole training part. Where the profile fixes no number of steps, an epoch is
            one pass over them for a teacher and one pass over half of them for every student, whatever its label
            fraction, so that all students have the same budget.
    """
    student = run.model in STUDENTS
    fixed = run.profile.student_steps if student else run.profile.teacher_steps
    return fixed or math.ceil(slices / (2 if student else 1) / run.optimisation.batch)


def order(slices: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of slice indices for ever: passes over shuffled slices, every batch full."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
    queue = torch.empty(0, dtype=torch.long)
    while True:
        while len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(slices, generator=generator)])
        yield queue[:batch]
        queue = queue[batch:]


@dataclass
class Arm:
    """One model in training: what a step needs, and what it leaves."""

    run: Run
    model: nn.Module
    taps: Taps
    distiller: Distiller | None
    segmentation: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    history: list[dict] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_dice: float = -1.0
    seconds: float = 0.0
    failure: TrainingError | None = None

    @property
    def label(self) -> str:
        recipe = f" {self.run.recipe.name}" if self.run.recipe.terms else ""
        return f"{self.run.name}{recipe}, fold {self.run.fold}, seed {self.run.seed}"


def new_model(run: Run, classes: int) -> nn.Module:
    """The run's model with its initial weights: the same for every recipe of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, "weights", run.model))
        return build_model(run.model, classes=classes, width=run.profile.width)


def new_arm(run: Run, classes: int, steps: int, device: torch.device, teacher: nn.Module | None) -> Arm:
    """An arm ready for its first of `steps` optimiser steps."""
    model = new_model(run, classes)
    scales, distiller = scales_of([run.recipe]), None
    if teacher is not None:
        seen = [channels_of(network, network.scales, scales, in_channels=3) for network in (model, teacher)]
        distiller = Distiller(run.recipe, *seen, seed=run.seed).to(device)
    model = model.to(device, memory_format=torch.channels_last)
    parameters = [*model.parameters(), *(distiller.parameters() if distiller else ())]
    how = run.optimisation
    if how.optimiser == "adamw":
        optimiser = torch.optim.AdamW(parameters, how.lr, how.betas, weight_decay=how.weight_decay)
    else:
        optimiser = torch.optim.RMSprop(parameters, how.lr, weight_decay=how.weight_decay)
    warmup = max(1, round(how.warmup * steps))

    def factor(step: int) -> float:
        if how.schedule == "constant":
            return 1.0
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    segmentation = SegmentationLoss(cross_entropy=run.recipe.segmentation == "dice+ce")
    return Arm(run, model, Taps(model, model.scales, scales), distiller, segmentation, optimiser, schedule)


def gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm of the gradient of `loss` on `parameters`; the graph is kept."""
    if not loss.requires_grad:
        return torch.zeros((), device=loss.device)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [gradient.norm() for gradient in gradients if gradient is not None]
    return torch.stack(norms).norm() if norms else torch.zeros((), device=loss.device)


def training_step(
    arm: Arm, images: Tensor, labels: Tensor, taught: dict[str, Tensor], step: int, measure: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One optimiser step of one arm: forward, every loss by name, backward, update.

    Args:
        images: B3HW in 0..1; labels: BHW class indices.
        taught: the teacher's features and logits on the same images; empty without a teacher.
        step: number of the step, for the terms that draw pixels.
        measure: losses whose gradient on the model is wanted.

    Returns:
        unweighted losses by name, and the norm of the gradient of each loss in `measure` on the model's parameters.
    """
    recipe = arm.run.recipe
    weights = {"segmentation": recipe.segmentation_weight} | {term.name: term.weight for term in recipe.terms}
    with autocast(images.device):
        output, features = arm.taps(images, reconstruct=recipe.reconstruction_weight > 0)
        losses = {"segmentation": arm.segmentation(output.segmentation, labels)}
        if output.reconstruction is not None:
            weights["reconstruction"] = recipe.reconstruction_weight
            losses["reconstruction"] = F.mse_loss(output.reconstruction.float(), images)
        if arm.distiller is not None:
            seed = derive_seed(arm.run.seed, "terms", step)
            losses |= arm.distiller(features | {"logits": output.segmentation}, taught, labels, seed)
        loss = sum(weights[name] * value for name, value in losses.items())
    norms = {name: gradient_norm(losses[name], list(arm.model.parameters())) for name in measure}
    arm.optimiser.zero_grad()
    loss.backward()
    arm.optimiser.step()
    arm.schedule.step()
    return {"loss": loss} | losses, norms


class EpochLog:
    """Sums an epoch's losses on the device, keeps each term's gradient, and tells a dead term from a live one."""

    def __init__(self, arm: Arm):
        self.arm = arm
        self.losses: dict[str, Tensor] = defaultdict(float)
        self.magnitude: dict[str, Tensor] = defaultdict(float)
        self.gradients: dict[str, float] = {}
        self.steps = 0

    def unmeasured(self) -> list[str]:
        """Losses whose gradient has been zero in every step so far, to be measured in the next."""
        recipe = self.arm.run.recipe
        return [name for name in ["segmentation", *(t.name for t in recipe.terms)] if not self.gradients.get(name)]

    def add(self, losses: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in losses.items():
            self.losses[name] += value.detach()
            self.magnitude[name] += value.detach().abs()
        self.gradients |= {name: float(norm) for name, norm in norms.items()}

    def rows(self, epoch: int) -> list[dict]:
        """Tidy rows of the epoch.

        Raises:
            TrainingError: a loss that is not finite, or a distillation term that was exactly zero or passed no
                gradient to the student in any step of the epoch.
        """
        values = {name: float(total) / self.steps for name, total in self.losses.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self.arm.label}: {name} became {value} in epoch {epoch}; lower the learning rate "
                    f"({self.arm.run.optimisation.lr:g}) or look at the data; other runs are kept"
                )
        recipe = self.arm.run.recipe
        for term in recipe.terms:
            if float(self.magnitude[term.name]) == 0 or self.gradients[term.name] == 0:
                fault = (
                    "was exactly zero" if float(self.magnitude[term.name]) == 0 else "passed no gradient to the student"
                )
                raise TrainingError(
                    f"{self.arm.label}: distillation term {term.name} ({term.loss}) {fault} in epoch {epoch}"
                )
        weights = {"segmentation": recipe.segmentation_weight} | {term.name: term.weight for term in recipe.terms}
        shares = {f"grad/{name}": weights[name] * norm for name, norm in self.gradients.items()}
        return [dict(epoch=epoch, name=name, value=value) for name, value in (values | shares).items()]


def train_cohort(
    runs: Sequence[Run],
    train: SliceBank,
    val: SliceBank,
    steps: int,
    device: torch.device,
    teacher: nn.Module | None = None,
    epochs: int | None = None,
) -> list[Arm]:
    """Trains runs that share data, fold, seed and batch size on one pass of one frozen teacher.

    A run ends with the same weights, to the bit on CPU, as if it were trained alone. An arm that fails keeps its
    `failure`, and the others go on.

    Args:
        runs: of one cohort (see `kdlib.runs.cohorts`).
        train: slices of the training subset, on `device`; val: of the validation part. No test patient is in either.
        steps: optimiser steps an epoch.
        device: where the banks are.
        teacher: frozen, in eval mode, on `device`; None for teachers and baselines.
        epochs: of the training; by default what the profile says.
    """
    seed, batch, profile = runs[0].seed, runs[0].optimisation.batch, runs[0].profile
    epochs = epochs or (profile.student_epochs if runs[0].model in STUDENTS else profile.teacher_epochs)
    arms = [new_arm(run, len(train.classes), epochs * steps, device, teacher) for run in runs]
    teacher_taps = Taps(teacher, teacher.scales, scales_of(run.recipe for run in runs)) if teacher is not None else None
    batches = order(len(train), batch, seed)
    begin = time.perf_counter()
    place = f"fold {runs[0].fold}, seed {seed}"
    students = f"{len(arms)} students {f'of {runs[0].teacher}' if runs[0].teacher else 'without a teacher'}, {place}"
    what = arms[0].label if len(arms) == 1 else students
    with Progress(what, epochs, steps) as progress:
        for epoch in range(1, epochs + 1):
            logs = {id(arm): EpochLog(arm) for arm in arms}
            for arm in arms:
                arm.model.train()
            for step in range((epoch - 1) * steps, epoch * steps):
                images, labels = train.batch(next(batches).to(device))
                images, labels = augment(
                    images, labels, torch.Generator().manual_seed(derive_seed(seed, "augment", step))
                )
                images = images.contiguous(memory_format=torch.channels_last)
                taught: dict[str, Tensor] = {}
                if teacher is not None:
                    with torch.no_grad(), autocast(device):
                        output, taught = teacher_taps(images, reconstruct=False)
                    taught["logits"] = output.segmentation
                for arm in arms:
                    if arm.failure is None:
                        log = logs[id(arm)]
                        log.add(*training_step(arm, images, labels, taught, step, log.unmeasured()))
                progress.step()
            for arm in arms:
                if arm.failure is None:
                    _end_epoch(arm, logs[id(arm)], val, epoch)
            alive = [arm for arm in arms if arm.failure is None]
            if not alive:
                break
            progress.epoch(epoch, alive)
    if teacher_taps is not None:
        teacher_taps.close()
    for arm in arms:
        arm.taps.close()
        arm.seconds = (time.perf_counter() - begin) / len(arms)
    return arms


def _end_epoch(arm: Arm, log: EpochLog, val: SliceBank, epoch: int) -> None:
    """Logs, validates and keeps the weights of the best epoch (the first of equals)."""
    try:
        arm.history += log.rows(epoch)
    except TrainingError as error:
        arm.failure = error
        return
    dice = volume_dice(arm.model, val)
    arm.history += [
        dict(epoch=epoch, name="val_dice", value=dice),
        dict(epoch=epoch, name="lr", value=arm.schedule.get_last_lr()[0]),
    ]
    if dice > arm.best_dice:
        arm.best_dice, arm.best_epoch = dice, epoch
        arm.best = copy.deepcopy(arm.model.state_dict())


class Progress:
    """A bar in a terminal and in JupyterLab; one plain line an epoch where `KDLIB_PROGRESS` is "plain"."""

    def __init__(self, what: str, epochs: int, steps: int):
        self.what, self.epochs = what, epochs
        self.plain = os.environ.get("KDLIB_PROGRESS") == "plain"
        self.begin = time.perf_counter()
        self.bar = tqdm(total=epochs * steps, desc=what, unit="step", disable=self.plain, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def step(self) -> None:
        self.bar.update()

    def epoch(self, epoch: int, arms: Sequence[Arm]) -> None:
        dice = [next(row["value"] for row in reversed(arm.history) if row["name"] == "val_dice") for arm in arms]
        loss = [next(row["value"] for row in reversed(arm.history) if row["name"] == "loss") for arm in arms]
        text = f"loss {sum(loss) / len(loss):.3f}, validation Dice {min(dice):.3f}"
        text += f" to {max(dice):.3f}" if len(dice) > 1 else ""
        self.bar.set_postfix_str(text)
        if self.plain:
            print(
                f"{self.what}: epoch {epoch}/{self.epochs}, {text}, {time.perf_counter() - self.begin:.0f} s",
                flush=True,
            )
