"""The loop: one frozen teacher, many students on the same batches, one visible training step.

A teacher is trained by the same loop, as a cohort of one without a teacher. Order of the data, augmentation and
initial weights come from streams of random numbers that depend on the seed and the step alone, never on the recipe or
on who else is in the cohort.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.config import InputError, Run, TrainingError, derive_seed
from kdlib.data import Bank
from kdlib.data.augment import per_image
from kdlib.data.sampling import batch_indices
from kdlib.losses import most_probable, probabilities
from kdlib.recipe import MOST
from kdlib.training.batch import Batch, load_batch
from kdlib.training.checkpoint import Checkpoint
from kdlib.training.device import autocast, keep_freed_memory, seeded_rng
from kdlib.training.diagnostics import gradient_of
from kdlib.training.fabric import ALONE, Processes
from kdlib.training.frozen import FrozenTeachers, folded, teacher_forward
from kdlib.training.interrupt import InterruptHandler
from kdlib.training.progress import Clock, Progress, summary
from kdlib.training.state import RunState, new_state
from kdlib.training.validation import volume_dice

CHECKPOINT_SECONDS = 300  # at most between two checkpoints within an epoch

# ---------------------------------------------------------------------------------------------------------- one step


def student_losses(state: RunState, batch: Batch, processes: Processes = ALONE) -> dict[str, Tensor]:
    """The forward pass of a run: every unweighted loss by name."""
    run, recipe, labels, teachers = state.run, state.run.effective_recipe, batch.labels, batch.teachers
    with autocast(batch.images.device, batch.images.dim() - 2):
        output, features = state.hooks(processes.share(batch.images), reconstruct=recipe.reconstruction_weight > 0)
        logits, reconstruction = map(processes.gather, output)
        features = {name: processes.gather(maps) for name, maps in features.items()} | {"logits": logits}
        if recipe.pseudo_labels:
            mean = torch.stack([probabilities(maps["logits"].float()) for maps in teachers.values()]).mean(0)
            labels = torch.where(per_image(batch.labelled, labels), labels, most_probable(mean))
        known = (logits, labels)
        if recipe.unlabelled and not recipe.pseudo_labels:
            known = (logits[batch.labelled], labels[batch.labelled])
        losses = {"segmentation": state.segmentation(*known)}
        if reconstruction is not None:
            losses["reconstruction"] = F.mse_loss(reconstruction.float(), batch.images)
        if state.distiller is not None:
            if run.teacher == "self":
                teachers = {"self": noisy_forward(state, batch, processes)}
            seed = derive_seed(run.seed, "terms", batch.step)
            losses |= state.distiller(features, teachers, labels, seed, batch.patients)
    return losses


def noisy_forward(state: RunState, batch: Batch, processes: Processes = ALONE) -> dict[str, Tensor]:
    """What the network itself gives for the same slices with other noise (the pi-model of Laine and Aila 2017,
    arXiv 1610.02242): what the consistency control learns from."""
    generator = torch.Generator().manual_seed(derive_seed(state.run.seed, "view", batch.step))
    noise = 0.05 * torch.randn(batch.images.shape, generator=generator).to(batch.images)
    return teacher_forward(state.hooks, (batch.images + noise).clamp(0, 1), processes)


def balance(state: RunState, norms: Mapping[str, float]) -> None:
    """Sets the terms' weights so that their gradients are `recipe.balance` times that of the segmentation loss.

    Losses then get the same say, whatever the scale of their formulas; within a recipe it is divided in proportion to
    the terms' own weights. A term without gradient keeps its weight, and none gets more than `MOST` times the weight
    that it had at the end of its first epoch: a loss that is as good as solved has hardly a gradient to go by, and the
    next batch that it is not solved for would wreck the student.

    Args:
        norms: of the unweighted losses' gradients on the student.
    """
    own, total = state.distiller.weights, state.run.effective_recipe.balance * state.weights["segmentation"]
    share = total * norms["segmentation"] / sum(own.values())
    first = {row["name"]: row["value"] for row in reversed(state.history) if row["value"] > 0}
    for name in own:
        if norms[name] > 0:
            most = MOST * first.get(f"weight/{name}", math.inf)
            state.weights[name] = min(share * own[name] / norms[name], most)
    state.diagnostics.balanced = True


def training_step(state: RunState, batch: Batch, processes: Processes = ALONE) -> None:
    """One optimiser step of one run: forward, every loss by name, backward, update.

    Where memory does not hold the graph of the whole batch, its parts (`RunState.micro_batches`) go forward and
    backward one after the other; losses that look at several images then see those of a part alone.
    """
    diagnostics = state.diagnostics or state.begin_epoch()
    measured, parameters = diagnostics.unmeasured(), [p for p in state.model.parameters() if p.requires_grad]
    balances = state.run.effective_recipe.balance is not None
    mean_losses, mean_gradients = defaultdict(float), defaultdict(float)
    state.optimiser.zero_grad()
    for part in batch.split(state.micro_batches):
        losses = student_losses(state, part, processes)
        gradients = {name: processes.average(gradient_of(losses[name], parameters)) for name in measured}
        # without foreground the Dice loss has almost no gradient to measure others by
        if balances and not diagnostics.balanced and (part.labels[part.labelled] > 0).any():
            balance(state, {name: float(gradient.norm()) for name, gradient in gradients.items()})
        weights = state.weights_at(state.step)
        loss = sum(weights[name] * value for name, value in losses.items())
        share = len(part.images) / len(batch.images)
        (share * loss).backward()
        for totals, values in ((mean_losses, {"loss": loss} | losses), (mean_gradients, gradients)):
            for name, value in values.items():
                totals[name] += share * value.detach()
    processes.average_gradients(p for group in state.optimiser.param_groups for p in group["params"])
    group = state.optimiser.param_groups[0]
    decay = group["lr"] * group["weight_decay"]  # of this step
    state.optimiser.step()
    state.schedule.step()
    state.step += 1
    diagnostics.add(mean_losses, mean_gradients, decay)


def end_epoch(state: RunState, val: Bank, epoch: int, interrupts: InterruptHandler) -> None:
    """Diagnostics, validation, and the weights of the best epoch (the first of equals)."""
    run = state.run
    try:
        rows = state.diagnostics.rows(epoch, state.weights_at(state.step - 1))
    except TrainingError as error:
        state.failure = error
        return
    dice = volume_dice(state.model, val, threshold=run.threshold, pooled=run.protocol.pooled_dice)
    rows.append(dict(epoch=epoch, name="val_dice", value=dice))
    rows.append(dict(epoch=epoch, name="lr", value=state.schedule.get_last_lr()[0]))
    with interrupts.deferred():
        state.history += rows
        if dice > state.best_dice:
            state.best_dice, state.best_epoch = dice, epoch
            state.best = copy.deepcopy(state.model.state_dict())
            if state.distiller is not None:
                state.best_distiller = copy.deepcopy(state.distiller.state_dict())
        state.diagnostics = None


# ------------------------------------------------------------------------------------------------------ one training


def train_cohort(
    runs: Sequence[Run],
    train: Bank,
    val: Bank,
    steps: int,
    device: torch.device,
    teachers: Mapping[str, nn.Module] | None = None,
    epochs: int | None = None,
    checkpoints: Sequence[Checkpoint] = (),
    micro_batches: int = 1,
    on_epoch: Callable[[list[RunState]], None] | None = None,
    processes: Processes = ALONE,
    initial: Mapping[Run, Mapping[str, Tensor]] | None = None,
) -> list[RunState]:
    """Trains runs that share data, fold, seed and batch size on one pass of each frozen teacher.

    A run ends with the same weights, to the bit on CPU, as if it were trained alone, and as if it had never been
    stopped. A run that fails keeps its `failure`, and the others continue. Runs whose checkpoints are of different
    steps are brought together: the one that is further on waits.

    Args:
        runs: of one cohort (see `kdlib.experiments.runner.cohorts`).
        train: of the training subset, on `device`; val: of the validation part. No test patient is in either.
        steps: optimiser steps per epoch.
        device: where the banks are.
        teachers: by name, frozen, in eval mode, on `device`; None for teachers and baselines.
        epochs: of the training; by default the profile's.
        checkpoints: for each run, where its state is read from and saved: at the end of every epoch, within an epoch
            every `CHECKPOINT_SECONDS`, and when SIGTERM or SIGINT ends the training.
        micro_batches: parts that every batch is split into, where memory does not hold it (see `training_step`).
        on_epoch: is called after each epoch with the runs that continue.
        processes: that train these runs together; their number divides the batch.
        initial: of runs that do not start with weights of their seed, those that they start with.

    Raises:
        InputError: a checkpoint cannot be saved.
        KeyboardInterrupt, SystemExit: see `kdlib.training.interrupt.InterruptHandler`.
    """
    keep_freed_memory()
    first_run, teachers = runs[0], teachers or {}
    seed, how, profile = first_run.seed, first_run.optimisation, first_run.profile
    epochs = epochs or (profile.teacher_epochs if first_run.is_teacher else profile.student_epochs)
    parts = len(train.classes), epochs * steps, device, teachers, train.patients, micro_batches, processes
    states = [new_state(run, *parts) for run in runs]
    for state in states:
        if state.run in (initial or {}):
            state.model.load_state_dict(initial[state.run])
    for state, checkpoint in zip(states, checkpoints, strict=bool(checkpoints)):
        state.resume(checkpoint, epochs * steps, processes.size)
    if how.kernels == "fused":
        teachers = {name: folded(teacher) for name, teacher in teachers.items()}
    taught = FrozenTeachers(teachers, [run.effective_recipe for run in runs], how.replay, processes)
    batches = batch_indices(train.holds_target.cpu(), how.batch, seed, how.target_share, train.labelled.cpu())
    if how.replay:
        batches = itertools.cycle(itertools.islice(batches, how.replay))
    first = min((state.step for state in states if state.failure is None), default=0)
    for _ in range(first):
        next(batches)
    teacher = f"of {first_run.teacher}" if first_run.teacher else "without a teacher"
    what = f"{len(states)} students {teacher}, fold {first_run.fold}, seed {seed}"
    what, silent = first_run.label if len(states) == 1 else what, processes.rank > 0
    together = processes.highest if processes.size > 1 else None
    progress = Progress(what, epochs, steps, first, silent)
    with ExitStack() as hooks, progress.bar, InterruptHandler(together) as interrupts:
        for each in [*taught.hooks.values(), *(state.hooks for state in states)]:
            hooks.callback(each.close)
        clock = Clock()
        try:
            for epoch in range(max(1, math.ceil(first / steps)), epochs + 1):
                for step in range(max(first, (epoch - 1) * steps), epoch * steps):
                    interrupts.check()
                    index = next(batches).to(device)
                    due = [state for state in states if state.failure is None and state.step == step]
                    if not due:
                        continue
                    batch = load_batch(train, index, seed, step, taught)
                    for state in due:
                        with interrupts.deferred(), seeded_rng(derive_seed(seed, "layers", step), device):
                            try:
                                training_step(state, batch, processes)
                            except InputError as error:  # a loss that cannot be of such a batch
                                state.failure = error
                    progress.bar.update()
                    clock.share(due)
                    clock.save(due, every=CHECKPOINT_SECONDS)
                due = [s for s in states if s.failure is None and s.diagnostics and s.step == epoch * steps]
                for state in due:
                    end_epoch(state, val, epoch, interrupts)
                clock.share(due)
                ended = [state for state in due if state.failure is None]
                clock.save(ended)
                for state in ended:
                    state.log(f"epoch {epoch} of {epochs}, {state.step} steps: {summary([state])}")
                if ended:
                    progress.epoch(epoch, ended)
                    if on_epoch is not None:
                        on_epoch(ended)
                if all(state.failure for state in states):
                    break
        except (KeyboardInterrupt, SystemExit):
            interrupts.waits = True  # a second signal must not cut the checkpoints short
            for state in states:
                state.save()
                state.log(f"stopped at step {state.step} of {epochs * steps}")
            print(f"{what}: stopped{', its state is kept' if checkpoints else ''}", flush=True)
            raise
    return states
