"""The loop: one frozen teacher, many students on the same batches, one visible training step.

A teacher is trained by the same loop, as a cohort of one without a teacher. Order of the data, augmentation and
initial weights come from streams of random numbers that depend on the seed and the step alone, never on the recipe or
on who else is in the cohort.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from kdlib.config import TEACHER_RECIPE, UNLABELLED, InputError, Run, TrainingError, derive_seed
from kdlib.data import SliceBank, augment
from kdlib.data.sampling import batch_indices
from kdlib.evaluation.cases import volume_dice
from kdlib.losses import SegmentationLoss, most_probable, probabilities
from kdlib.models import build_model
from kdlib.training import ranks
from kdlib.training.checkpoint import Checkpoint, InterruptHandler
from kdlib.training.device import autocast
from kdlib.training.distiller import Distiller, FeatureHooks, probe, scales_of

CHECKPOINT_SECONDS = 300  # at most between two checkpoints within an epoch


def steps_per_epoch(run: Run, slices: int) -> int:
    """Optimiser steps an epoch of `run`.

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
    teaching = profile.teacher_steps or math.ceil(
        slices / dataclasses.replace(run, recipe=TEACHER_RECIPE).optimisation.batch
    )
    return profile.student_epochs + round(profile.teacher_epochs * teaching / steps_per_epoch(run, slices))


@dataclass
class RunState:
    """One model in training: what a step needs, and what it leaves."""

    run: Run
    model: nn.Module
    taps: FeatureHooks
    distiller: Distiller | None
    segmentation: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: nn.Module = field(init=False)  # of a batch, by name
    history: list[dict] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_projectors: dict[str, Tensor] = field(default_factory=dict)  # the distiller beside the best weights
    best_epoch: int = 0
    best_dice: float = -1.0
    seconds: float = 0.0
    failure: TrainingError | InputError | None = None
    weights: dict[str, float] = field(default_factory=dict)
    balanced: bool = False  # whether the weights of this epoch are set, where the recipe balances them
    step: int = 0  # optimiser steps done
    log: EpochLog | None = None  # of the epoch that it is in; None between two
    micro_batches: int = 1  # parts of a batch that go forward and backward one after the other
    checkpoint: Checkpoint | None = None
    sessions: list[dict] = field(default_factory=list)  # where it was trained, from which step on

    def __post_init__(self):
        """Weights of each loss in the total: the recipe's, until `balance` changes those of the terms."""
        self.losses = ranks.wrap(Losses(self.run, self.taps, self.distiller, self.segmentation))
        recipe = self.run.effective_recipe
        self.weights = {"segmentation": recipe.segmentation_weight, "reconstruction": recipe.reconstruction_weight}
        self.weights |= self.distiller.weights if self.distiller is not None else {}

    def begin_epoch(self) -> EpochLog:
        """A fresh log; balanced weights are set anew."""
        self.model.train()
        self.balanced, self.log = False, EpochLog(self)
        return self.log

    def save(self) -> None:
        """Saves a checkpoint, where the arm has one and is worth it."""
        if self.checkpoint is not None and self.failure is None and self.step:
            self.checkpoint.save(self)

    def note(self, text: str, echo: bool = False) -> None:
        """A line of the run's log, where it has one; `echo` prints it too."""
        if self.checkpoint is not None:
            self.checkpoint.note(text)
        if echo:
            print(f"{self.label}: {text}", flush=True)

    @property
    def label(self) -> str:
        recipe = f" {self.run.recipe.name}" if self.run.recipe.terms else ""
        return f"{self.run.name}{recipe}, fold {self.run.fold}, seed {self.run.seed}"


def new_model(run: Run, classes: int) -> nn.Module:
    """The run's model with its initial weights: the same for every recipe of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, "weights", run.model))
        return build_model(run.model, classes=classes, width=run.profile.width)


def new_arm(
    run: Run,
    classes: int,
    steps: int,
    device: torch.device,
    teachers: Mapping[str, nn.Module],
    patients: Sequence[int] = (),
) -> RunState:
    """An arm ready for its first of `steps` optimiser steps; `patients` are those of the training part."""
    model, recipe = ranks.norms_of_whole_batches(new_model(run, classes), device), run.effective_recipe
    scales, distiller = scales_of([recipe]), None
    if run.teacher == "self":
        own = probe(model, model.scales, scales, size=run.preprocessing.size)
        distiller = Distiller(recipe, own, {"self": own}, run.seed, patients=patients).to(device)
    if teachers and recipe.terms:
        teacher_layers = scales_of([recipe], taught=True)
        size = run.preprocessing.size
        taught = {name: probe(teacher, teacher.scales, teacher_layers, size=size) for name, teacher in teachers.items()}
        own = probe(model, model.scales, scales, size=size)
        distiller = Distiller(recipe, own, taught, run.seed, patients=patients)
        distiller = distiller.to(device)
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
    segmentation = SegmentationLoss(recipe.segmentation == "dice+ce", recipe.smoothing)
    return RunState(run, model, FeatureHooks(model, model.scales, scales), distiller, segmentation, optimiser, schedule)


def gradient_of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Gradient of `loss` on all `parameters` as one vector, 0 where it does not reach; the graph is kept.

    Of a loss of several ranks' whole batch, `parameters` being those of the network.
    """
    gradients = [None] * len(parameters)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return ranks.mean(torch.cat([(torch.zeros_like(p) if g is None else g).detach().flatten() for g, p in pairs]))


def shuffle(features: Mapping[str, Tensor], patients: Tensor, seed: int) -> dict[str, Tensor]:
    """Every image gets the features of another one of the batch, the same one for all scales: of another patient, as
    far as no patient has more than half of the batch."""
    ring = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed))
    ring = ring[patients.cpu()[ring].argsort(stable=True)]  # a ring through all images, patient by patient
    steps = int(patients.unique(return_counts=True)[1].max())  # along it, so many lead out of every patient
    other = torch.empty_like(ring)
    other[ring] = ring.roll(steps if steps < len(ring) else 1)
    return {name: feature[other.to(feature.device)] for name, feature in features.items()}


@dataclass(frozen=True)
class Batch:
    """What all arms of a cohort see in one step.

    Args:
        images: B3HW in 0..1; labels: BHW class indices; patients: [B] numbers of the images' patients.
        labelled: [B] bool; labels of other images are `UNLABELLED` throughout.
        taught: teacher -> its features and logits on the same images; empty without a teacher.
        step: number of the step, for the terms that draw pixels.
    """

    images: Tensor
    labels: Tensor
    labelled: Tensor
    patients: Tensor
    taught: Mapping[str, Mapping[str, Tensor]]
    step: int

    def split(self, parts: int) -> list[Batch]:
        """The batch in parts of about equal size."""

        def part(i: int, tensor: Tensor) -> Tensor:
            return tensor.tensor_split(parts)[i]

        return [
            Batch(
                part(i, self.images),
                part(i, self.labels),
                part(i, self.labelled),
                part(i, self.patients),
                {who: {name: part(i, maps) for name, maps in seen.items()} for who, seen in self.taught.items()},
                self.step,
            )
            for i in range(parts)
        ]


def balance(arm: RunState, norms: Mapping[str, float]) -> None:
    """Sets the terms' weights so that their gradients are `recipe.balance` times that of the segmentation loss.

    Distillers then get the same say, whatever the scale of their formulas; within a recipe it is divided in proportion
    to the terms' own weights. A term without gradient keeps its weight.

    Args:
        norms: of the unweighted losses' gradients on the student.
    """
    own = arm.distiller.weights
    share = arm.run.effective_recipe.balance * arm.weights["segmentation"] * norms["segmentation"] / sum(own.values())
    arm.weights |= {name: share * weight / norms[name] for name, weight in own.items() if norms[name] > 0}
    arm.balanced = True


class Losses(nn.Module):
    """A network and its distiller as one module, from a batch to every unweighted loss by name.

    Each of several ranks passes its part of the batch through the network; the losses are those of the whole.
    """

    def __init__(self, run: Run, taps: FeatureHooks, distiller: Distiller | None, segmentation: nn.Module):
        super().__init__()
        self.run, self.recipe, self.taps = run, run.effective_recipe, taps
        self.model, self.distiller, self.segmentation = taps.model, distiller, segmentation

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        recipe, labels, labelled = self.recipe, batch.labels, batch.labelled
        output, features = self.taps(ranks.share(batch.images), reconstruct=recipe.reconstruction_weight > 0)
        logits, reconstruction = map(ranks.gather, output)
        if recipe.pseudo_labels:
            found = torch.stack([probabilities(seen["logits"].float()) for seen in batch.taught.values()]).mean(0)
            labels = torch.where(labelled[:, None, None], labels, most_probable(found))
        known = (logits, labels)
        if recipe.unlabelled and not recipe.pseudo_labels:
            known = (logits[labelled], labels[labelled])
        losses = {"segmentation": self.segmentation(*known)}
        if reconstruction is not None:
            losses["reconstruction"] = F.mse_loss(reconstruction.float(), batch.images)
        if self.distiller is not None:
            seed, taught = derive_seed(self.run.seed, "terms", batch.step), batch.taught
            if self.run.teacher == "self":
                taught = {"self": self.own_view(batch)}
            if recipe.teacher == "shuffled":
                mix = derive_seed(seed, "shuffle")
                taught = {name: shuffle(features, batch.patients, mix) for name, features in taught.items()}
            own = {name: ranks.gather(feature) for name, feature in features.items()} | {"logits": logits}
            losses |= self.distiller(own, taught, labels, seed, batch.patients, batch.step)
        return losses

    @torch.no_grad()
    def own_view(self, batch: Batch) -> dict[str, Tensor]:
        """What the network itself gives for the same slices with other noise (the pi-model of Laine and Aila 2017,
        arXiv 1610.02242): what the consistency control learns from."""
        generator = torch.Generator().manual_seed(derive_seed(self.run.seed, "view", batch.step))
        noise = 0.05 * torch.randn(batch.images.shape, generator=generator).to(batch.images)
        output, features = self.taps(ranks.share((batch.images + noise).clamp(0, 1)), reconstruct=False)
        return {name: ranks.gather(maps) for name, maps in (features | {"logits": output.segmentation}).items()}


def losses_of(arm: RunState, batch: Batch) -> dict[str, Tensor]:
    """The forward pass: every unweighted loss by name."""
    with autocast(batch.images.device):
        return arm.losses(batch)


def training_step(
    arm: RunState, batch: Batch, measure: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One optimiser step of one arm: forward, every loss by name, backward, update.

    Where memory does not hold the graph of the whole batch, its parts (`RunState.micro_batches`) go forward and backward one
    after the other; losses that look at several images then see those of a part alone.

    Args:
        measure: losses whose gradient on the model is wanted.

    Returns:
        unweighted losses by name, and the gradient of each loss in `measure` on the model's parameters, as a vector.
    """
    arm.optimiser.zero_grad()
    totals: list[dict[str, Tensor]] = [defaultdict(float), defaultdict(float)]
    for part in batch.split(arm.micro_batches):
        share = len(part.images) / len(batch.images)
        losses = losses_of(arm, part)
        gradients = {name: gradient_of(losses[name], list(arm.model.parameters())) for name in measure}
        # without foreground the Dice loss has almost no gradient to measure others by
        if arm.run.effective_recipe.balance is not None and not arm.balanced and (part.labels[part.labelled] > 0).any():
            balance(arm, {name: float(gradient.norm()) for name, gradient in gradients.items()})
        loss = sum(arm.weights[name] * value for name, value in losses.items())
        (share * loss).backward()
        for total, values in zip(totals, ({"loss": loss} | losses, gradients), strict=True):
            for name, value in values.items():
                total[name] += share * value.detach()
    arm.optimiser.step()
    arm.schedule.step()
    return dict(totals[0]), dict(totals[1])


KNOWN_DEAD = ("softmax_kl",)  # published terms that a protocol keeps although they are zero


class EpochLog:
    """Sums an epoch's losses on the device, measures each term's gradient, and tells a dead term from a live one.

    Gradients on the student are taken in the first two steps of an epoch, and in later ones while they are zero.
    """

    def __init__(self, arm: RunState):
        self.arm = arm
        self.losses: dict[str, Tensor] = defaultdict(float)
        self.magnitude: dict[str, Tensor] = defaultdict(float)
        self.gradients: dict[str, list[Tensor]] = defaultdict(list)
        self.steps = 0
        self.terms = list(arm.distiller.weights) if arm.distiller is not None else []
        # a gradient of 0 is measured again, but for a term that is known to have no other
        self.gradient_seen = {name for name in self.terms if arm.distiller.terms[name].term.loss in KNOWN_DEAD}
        self.projectors = {name: [p.detach().clone() for p in arm.distiller.learned(name)] for name in self.terms}
        self.decay = (
            0.0  # how far weight decay alone reduced_from_thesis a parameter in this epoch, relative to its norm
        )

    def unmeasured(self) -> list[str]:
        """Losses whose gradient is still to be measured."""
        asked = ["segmentation", *self.terms] if self.terms else []
        unbalanced = self.arm.run.effective_recipe.balance is not None and not self.arm.balanced
        return [n for n in asked if unbalanced or len(self.gradients[n]) < 2 or n not in self.gradient_seen]

    def add(self, losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        self.steps += 1
        group = self.arm.optimiser.param_groups[0]
        self.decay += group["lr"] * group["weight_decay"]
        for name, value in losses.items():
            self.losses[name] += value.detach()
            self.magnitude[name] += value.detach().abs()
        for name, gradient in gradients.items():
            self.gradients[name] = [*self.gradients[name][-1:], gradient]
            if gradient.any():
                self.gradient_seen.add(name)

    def rows(self, epoch: int) -> list[dict]:
        """Tidy rows of the epoch: each loss; of the segmentation loss and each term `grad/`, the norm of its weighted
        gradient on the student, `share/`, its part of the sum of these norms, `cosine/`, between its gradients of two
        successive steps; and of each term `weight/` where it is balanced, `infonce_over_chance/`, InfoNCE over the ln N of a student
        that knows nothing, and `projector_change/`, how far its least moved learned projector moved, relative to its norm.

        Raises:
            TrainingError: a loss that is not finite; a distillation term that was exactly zero or passed no gradient to
                the student in any step of the epoch; or one of whose learned projectors did not move (further than
                weight decay alone would).
        """
        values = {name: float(total) / self.steps for name, total in self.losses.items()}
        run = self.arm.run
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self.arm.label}: {name} became {value} in epoch {epoch}; lower the learning rate "
                    f"({run.optimisation.lr:g}) or look at the data; other runs are kept"
                )
        norms = {name: float(seen[0].norm() or seen[-1].norm()) for name, seen in self.gradients.items()}
        measured = {f"grad/{name}": self.arm.weights[name] * norm for name, norm in norms.items()}
        total = sum(measured.values()) or 1.0
        if run.effective_recipe.balance is not None:
            measured |= {f"weight/{name}": self.arm.weights[name] for name in self.terms}
        measured |= {f"share/{name}": measured[f"grad/{name}"] / total for name in norms}
        for name, seen in self.gradients.items():
            if len(seen) == 2 and all(gradient.any() for gradient in seen):
                measured[f"cosine/{name}"] = float(F.cosine_similarity(*seen, dim=0))
        for name in self.terms:
            measured |= self._life(name, values[name], norms[name], epoch)
        return [dict(epoch=epoch, name=name, value=value) for name, value in (values | measured).items()]

    def _life(self, name: str, value: float, norm: float, epoch: int) -> dict[str, float]:
        """`infonce_over_chance/` and `projector_change/` of a term that is alive; see `rows`."""
        term = self.arm.distiller.terms[name].term
        found, fault = {}, ""
        if float(self.magnitude[name]) == 0:
            fault = "was exactly zero"
        elif norm == 0:
            fault = "passed no gradient to the student"
        pairs = list(zip(self.arm.distiller.learned(name), self.projectors[name], strict=True))
        if pairs:
            # biases are left out: a loss may be invariant to a shift, as CWD is
            moved = [float((now.detach() - then).norm() / then.norm()) for now, then in pairs if now.dim() > 1]
            found[f"projector_change/{name}"] = min(moved)
            if term.weight and min(moved) <= 2 * self.decay:
                fault = fault or "did not move one of its learned projectors"
        if fault and term.loss not in KNOWN_DEAD:
            raise TrainingError(f"{self.arm.label}: distillation term {name} ({term.loss}) {fault} in epoch {epoch}")
        if term.loss == "infonce" and not term.arguments.get("same_patient"):
            found[f"infonce_over_chance/{name}"] = value / math.log(
                self.arm.run.optimisation.batch / self.arm.micro_batches
            )
        return found


def train_cohort(
    runs: Sequence[Run],
    train: SliceBank,
    val: SliceBank,
    steps: int,
    device: torch.device,
    teachers: Mapping[str, nn.Module] | None = None,
    epochs: int | None = None,
    keep: Sequence[Checkpoint] = (),
    micro_batches: int = 1,
    on_epoch: Callable[[list[RunState]], None] | None = None,
) -> list[RunState]:
    """Trains runs that share data, fold, seed and batch size on one pass of each frozen teacher.

    A run ends with the same weights, to the bit on CPU, as if it were trained alone, and as if it had never been
    stopped. An arm that fails keeps its `failure`, and the others go on. Arms whose checkpoints are of different steps
    are brought together: the one that is further on waits.

    Args:
        runs: of one cohort (see `kdlib.experiments.runner.cohorts`).
        train: slices of the training subset, on `device`; val: of the validation part. No test patient is in either.
        steps: optimiser steps an epoch.
        device: where the banks are.
        teachers: by name, frozen, in eval mode, on `device`; None for teachers and baselines.
        epochs: of the training; by default the profile's.
        keep: for each run, where its state is read from and saved: at the end of every epoch, within an epoch every
            `CHECKPOINT_SECONDS`, and when SIGTERM or SIGINT ends the training.
        micro_batches: parts that every batch is split into, where memory does not hold it (see `training_step`).
        on_epoch: is called after each epoch with the arms that go on.

    Raises:
        InputError: a checkpoint is of something else, or cannot be saved.
        KeyboardInterrupt, SystemExit: see `kdlib.training.checkpoint.InterruptHandler`.
    """
    seed, batch, profile, teachers = runs[0].seed, runs[0].optimisation.batch, runs[0].profile, teachers or {}
    ranks.check_batch(batch, ranks.size())
    epochs = epochs or (profile.teacher_epochs if runs[0].is_teacher else profile.student_epochs)
    arms = [new_arm(run, len(train.classes), epochs * steps, device, teachers, train.patients) for run in runs]
    for arm in arms:
        arm.micro_batches = micro_batches
    for arm, checkpoint in zip(arms, keep, strict=bool(keep)):
        arm.checkpoint = checkpoint
        try:
            resumed = checkpoint.restore(arm)
        except InputError as error:  # of something else: a person must decide
            arm.failure = error
            continue
        if resumed:
            arm.note(f"goes on from step {arm.step} of {epochs * steps}", echo=True)
        session = {"from_step": arm.step, "device": str(device), "torch": torch.__version__}
        session |= {"micro_batches": micro_batches} if micro_batches > 1 else {}
        arm.sessions.append(session | ({"processes": ranks.size()} if ranks.size() > 1 else {}))
    teacher_layers = scales_of((run.effective_recipe for run in runs), taught=True)
    taught_taps = {name: FeatureHooks(teacher, teacher.scales, teacher_layers) for name, teacher in teachers.items()}
    share = runs[0].optimisation.target_share
    labelled = train.labelled.cpu() if runs[0].effective_recipe.unlabelled else None
    batches, first = (
        batch_indices(train.holds_target.cpu(), batch, seed, share, labelled),
        min((arm.step for arm in arms if arm.failure is None), default=0),
    )
    for _ in range(first):
        next(batches)
    place = f"fold {runs[0].fold}, seed {seed}"
    students = f"{len(arms)} students {f'of {runs[0].teacher}' if runs[0].teacher else 'without a teacher'}, {place}"
    what = arms[0].label if len(arms) == 1 else students
    with ExitStack() as hooks, Progress(what, epochs, steps, first) as progress, InterruptHandler() as stops:
        for taps in [*taught_taps.values(), *(arm.taps for arm in arms)]:
            hooks.callback(taps.close)
        clock = Clock()
        try:
            for epoch in range(max(1, math.ceil(first / steps)), epochs + 1):
                for step in range(max(first, (epoch - 1) * steps), epoch * steps):
                    stops.agree()
                    index = next(batches).to(device)
                    due = [arm for arm in arms if arm.failure is None and arm.step == step]
                    if not due:
                        continue
                    seen = make_batch(train, index, seed, step, taught_taps)
                    for arm in due:
                        with stops.deferred():
                            log = arm.log or arm.begin_epoch()
                            with seeded_rng(derive_seed(seed, "layers", step), device):
                                log.add(*training_step(arm, seen, log.unmeasured()))
                            arm.step += 1
                    progress.step()
                    clock.share(due)
                    clock.save(due, every=CHECKPOINT_SECONDS)
                due = [arm for arm in arms if arm.failure is None and arm.log and arm.step == epoch * steps]
                for arm in due:
                    _end_epoch(arm, val, epoch, stops)
                clock.share(due)
                ended = [arm for arm in due if arm.failure is None]
                clock.save(ended)
                for arm in ended:
                    arm.note(f"epoch {epoch} of {epochs}, {arm.step} steps: {summary([arm])}")
                if ended:
                    progress.epoch(epoch, ended)
                    if on_epoch is not None:
                        on_epoch(ended)
                if all(arm.failure for arm in arms):
                    break
        except (KeyboardInterrupt, SystemExit):
            stops.holding = True  # a second signal waits for the checkpoints
            for arm in arms:
                arm.save()
                arm.note(f"stopped at step {arm.step} of {epochs * steps}")
            print(f"{what}: stopped{', its state is kept' if keep else ''}", flush=True)
            raise
    return arms


@contextmanager
def seeded_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Layers that draw from torch's own random numbers (dropout) draw from a stream of their own."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Clock:
    """Shares the time that passes among the arms, and saves them from time to time."""

    def __init__(self):
        self.mark = self.saved = time.perf_counter()  # never set back, as the time of day can be

    def share(self, arms: Sequence[RunState]) -> None:
        now = time.perf_counter()
        for arm in arms:
            arm.seconds += (now - self.mark) / len(arms)
        self.mark = now

    def save(self, arms: Sequence[RunState], every: float = 0.0) -> None:
        """Saves the arms where the last time is at least `every` seconds ago."""
        if self.mark - self.saved >= every:
            for arm in arms:
                arm.save()
            self.saved = self.mark


def make_batch(train: SliceBank, index: Tensor, seed: int, step: int, taught_taps: Mapping[str, FeatureHooks]) -> Batch:
    """The batch of a step: slices `index` of the bank, augmented by the step's own draws, and what the teachers see."""
    images, labels = train.batch(index)
    images, labels = augment(images, labels, torch.Generator().manual_seed(derive_seed(seed, "augment", step)))
    images = images.contiguous(memory_format=torch.channels_last)
    labelled = train.labelled[index]
    labels = labels.masked_fill(~labelled[:, None, None], UNLABELLED)  # also where the augmentation moved a border in
    taught = {name: teacher_forward(taps, images) for name, taps in taught_taps.items()}
    return Batch(images, labels, labelled, train.patient_of(index), taught, step)


@torch.no_grad()
def teacher_forward(taps: FeatureHooks, images: Tensor) -> dict[str, Tensor]:
    """A teacher's features and logits of images, of which each of several ranks takes its part."""
    with autocast(images.device):
        output, features = taps(ranks.share(images), reconstruct=False)
    return {name: ranks.gather(maps) for name, maps in (features | {"logits": output.segmentation}).items()}


def _end_epoch(arm: RunState, val: SliceBank, epoch: int, stops: InterruptHandler) -> None:
    """Logs, validates and keeps the weights of the best epoch (the first of equals)."""
    try:
        rows = arm.log.rows(epoch)
    except TrainingError as error:
        arm.failure = error
        return
    run = arm.run
    dice = volume_dice(arm.model, val, threshold=run.threshold, pooled=run.protocol.pooled_dice)
    rows += [
        dict(epoch=epoch, name="val_dice", value=dice),
        dict(epoch=epoch, name="lr", value=arm.schedule.get_last_lr()[0]),
    ]
    with stops.deferred():
        arm.history += rows
        if dice > arm.best_dice:
            arm.best_dice, arm.best_epoch = dice, epoch
            arm.best = copy.deepcopy(arm.model.state_dict())
            if arm.distiller is not None:
                arm.best_projectors = copy.deepcopy(arm.distiller.state_dict())
        arm.log = None


def summary(arms: Sequence[RunState]) -> str:
    """Mean loss and validation Dice of the arms' last epoch, in words."""
    last = [{row["name"]: row["value"] for row in arm.history} for arm in arms]
    dice = [rows["val_dice"] for rows in last]
    text = f"loss {sum(rows['loss'] for rows in last) / len(last):.3f}, validation Dice {min(dice):.3f}"
    return text + (f" to {max(dice):.3f}" if len(dice) > 1 else "")


class Progress:
    """A bar in a terminal and in JupyterLab; one plain line an epoch where `KDLIB_PROGRESS` is "plain"."""

    def __init__(self, what: str, epochs: int, steps: int, done: int = 0):
        self.what, self.epochs = what, epochs
        self.plain = os.environ.get("KDLIB_PROGRESS") == "plain"
        self.begin = time.perf_counter()
        quiet = self.plain or ranks.rank() > 0
        self.bar = tqdm(total=epochs * steps, initial=done, desc=what, unit="step", disable=quiet, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def step(self) -> None:
        self.bar.update()

    def epoch(self, epoch: int, arms: Sequence[RunState]) -> None:
        text = summary(arms)
        self.bar.set_postfix_str(text)
        if self.plain:
            print(
                f"{self.what}: epoch {epoch}/{self.epochs}, {text}, {time.perf_counter() - self.begin:.0f} s",
                flush=True,
            )
