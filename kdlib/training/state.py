"""A run in training: its network, projectors and optimiser, and everything that a checkpoint must keep of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kdlib.config import InputError, Run, TrainingError, derive_seed
from kdlib.losses import SegmentationLoss
from kdlib.models import CHANNELS_LAST, build_model
from kdlib.training.checkpoint import Checkpoint
from kdlib.training.device import seeded_rng
from kdlib.training.diagnostics import EpochDiagnostics
from kdlib.training.distiller import Distiller
from kdlib.training.fabric import ALONE, Processes
from kdlib.training.hooks import FeatureHooks, probe, scales_of
from kdlib.training.schedule import optimiser_of


def new_model(run: Run, classes: int) -> nn.Module:
    """The run's model with its initial weights: the same for every recipe of a seed."""
    with seeded_rng(derive_seed(run.seed, "weights", run.model)):
        view = run.preprocessing
        return build_model(run.model, view.dimensions, view.input_shape[0], classes, run.profile.width)


@dataclass
class RunState:
    """One model in training: what a step needs, and what it leaves.

    Args:
        hooks: on the layers of the model that its recipe reads.
        distiller: terms and projectors; None without distillation.
        checkpoint: where the state is kept; None keeps nothing.
        micro_batches: parts of a batch that go forward and backward one after the other.
        weights: of each loss in the total: the recipe's, until balancing changes those of the terms.
        terms_from: the step from which the terms act.
        step: optimiser steps done.
        diagnostics: of the epoch that it is in; None between two epochs.
        sessions: where it was trained, from which step on.
        best, best_distiller: weights of the best epoch, and the distiller's state beside them.
        seconds: that the training took.
    """

    run: Run
    model: nn.Module
    hooks: FeatureHooks
    distiller: Distiller | None
    segmentation: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    checkpoint: Checkpoint | None = None
    micro_batches: int = 1
    weights: dict[str, float] = field(default_factory=dict)
    terms_from: int = 0
    step: int = 0
    diagnostics: EpochDiagnostics | None = None
    history: list[dict] = field(default_factory=list)
    sessions: list[dict] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_distiller: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_dice: float = -1.0
    seconds: float = 0.0
    failure: TrainingError | InputError | None = None

    def __post_init__(self):
        recipe = self.run.effective_recipe
        self.weights = {"segmentation": recipe.segmentation_weight, "reconstruction": recipe.reconstruction_weight}
        self.weights |= self.distiller.weights if self.distiller is not None else {}

    def weights_at(self, step: int) -> dict[str, float]:
        """Of each loss in the total of a step: those of the terms are 0 during the student's warm-up."""
        silent = self.distiller.weights if step < self.terms_from else ()
        return {name: 0.0 if name in silent else weight for name, weight in self.weights.items()}

    def begin_epoch(self) -> EpochDiagnostics:
        """Training mode, and fresh diagnostics."""
        self.model.train()
        self.diagnostics = EpochDiagnostics(self.run, self.distiller, self.micro_batches)
        return self.diagnostics

    def log(self, text: str) -> None:
        """A line of the run's log, where it has one."""
        if self.checkpoint is not None:
            self.checkpoint.log(text)

    def save(self) -> None:
        """Saves a checkpoint, where the run has one and has done a step."""
        if self.checkpoint is not None and self.failure is None and self.step:
            self.checkpoint.save(self.state_dict())

    def resume(self, checkpoint: Checkpoint, steps: int, processes: int = 1) -> None:
        """Brings a new run to where its checkpoint was saved; a checkpoint of something else is the run's failure.

        Args:
            steps: of the whole training; processes: that train it.
        """
        self.checkpoint = checkpoint
        try:
            saved = checkpoint.load()
        except InputError as error:  # a person must decide
            self.failure = error
            return
        if saved is not None:
            self.load_state_dict(saved)
            checkpoint.log(text := f"resumes from step {self.step} of {steps}")
            print(f"{self.run.label}: {text}", flush=True)
        device = str(next(self.model.parameters()).device)
        session = {"from_step": self.step, "device": device, "torch": torch.__version__}
        self.sessions.append(session | {"micro_batches": self.micro_batches, "processes": processes})

    def state_dict(self) -> dict:
        """The whole state: nested dicts of tensors and JSON values."""
        optimiser = self.optimiser.state_dict()
        within = self.diagnostics is not None and self.diagnostics.steps
        return {
            "step": self.step, "seconds": self.seconds, "weights": self.weights, "history": self.history,
            "sessions": self.sessions, "best_epoch": self.best_epoch, "best_dice": self.best_dice,
            "model": self.model.state_dict(), "best": self.best, "best_distiller": self.best_distiller,
            "distiller": self.distiller.state_dict() if self.distiller is not None else {},
            "optimiser": optimiser["state"], "lr": [group["lr"] for group in optimiser["param_groups"]],
            "schedule": self.schedule.state_dict(),
            "diagnostics": self.diagnostics.state_dict() if within else None,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping) -> None:
        """Gives a new run the state of `state_dict`."""
        device = next(self.model.parameters()).device
        self.model.load_state_dict(state["model"])
        if self.distiller is not None:
            self.distiller.load_state_dict(state["distiller"])
        self._load_optimiser(state["optimiser"], state["lr"])
        self.schedule.load_state_dict(dict(state["schedule"]))
        for name in ("step", "seconds", "weights", "history", "sessions", "best_epoch", "best_dice"):
            setattr(self, name, state[name])
        for name in ("best", "best_distiller"):
            setattr(self, name, {key: tensor.to(device) for key, tensor in state[name].items()})
        if state["diagnostics"] is not None:
            self.begin_epoch().load_state_dict(state["diagnostics"], device)

    def _load_optimiser(self, state: Mapping, rates: Sequence[float]) -> None:
        groups = self.optimiser.state_dict()["param_groups"]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        state = {int(index): dict(values) for index, values in state.items()}
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        for parameter, own in self.optimiser.state.items():
            for name, value in own.items():
                if name != "step":  # laid out in memory as the parameter is, as the optimiser would
                    own[name] = torch.empty_like(parameter).copy_(value)


def new_state(
    run: Run,
    classes: int,
    steps: int,
    device: torch.device,
    teachers: Mapping[str, nn.Module],
    patients: Sequence[int] = (),
    micro_batches: int = 1,
    processes: Processes = ALONE,
) -> RunState:
    """A run ready for its first of `steps` optimiser steps.

    Args:
        classes: number of target classes.
        teachers: by name; of a recipe with terms.
        patients: numbers of the patients of the training part, whose features alone may enter a memory.
        micro_batches: parts that every batch is split into; processes: that train the run.
    """
    model, recipe, view = new_model(run, classes), run.effective_recipe, run.preprocessing
    if processes.size > 1 and device.type == "cuda":  # batch norms over the images of all processes; CUDA alone can
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    layers, distiller = scales_of([recipe]), None
    if recipe.terms:
        shapes = probe(model, layers, view.input_shape)
        read = scales_of([recipe], "teacher")
        of_teachers = {name: probe(teacher, read, view.input_shape) for name, teacher in teachers.items()}
        if run.teacher == "self":
            of_teachers = {"self": shapes}
        distiller = Distiller(recipe, shapes, of_teachers, run.seed, patients).to(device)
    model = model.to(device, memory_format=CHANNELS_LAST[view.dimensions])
    parameters = [*model.parameters(), *(distiller.parameters() if distiller is not None else ())]
    hooks = FeatureHooks(model, layers)
    segmentation = SegmentationLoss(recipe.segmentation == "dice+ce", recipe.smoothing)
    optimiser, schedule = optimiser_of(run.optimisation, parameters, steps)
    parts = run, model, hooks, distiller, segmentation, optimiser, schedule
    return RunState(*parts, micro_batches=micro_batches, terms_from=round(recipe.warmup * steps))
