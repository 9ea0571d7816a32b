"""The experiments: each is a function from a setting to its list of runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from monai.networks.nets import SegResNet

from kdlib.config import (
    PROTOCOLS,
    TEACHERS,
    InputError,
    Profile,
    Protocol,
    Run,
    cumulative_correction,
    lookup,
    override_profile,
)
from kdlib.experiments.recipes import QUICK, WEIGHTS, comparison_losses, distiller, negative_controls, thesis_recipe
from kdlib.experiments.source import run_source
from kdlib.models import MODELS, ExternalModel
from kdlib.strict import Range, check_fields
from kdlib.training.device import pick_device

HALF = 0.5  # of the training patients: whose labels the students may use
Number = Annotated[int, Range(0)]


@dataclass(frozen=True)
class Setting:
    """What all runs of a study share, checked once.

    Args:
        data: a folder of scans, or "phantom".
        target: label names joined by ",", or "all".
        profile: how large the study is: a name in `kdlib.config.PROFILES`, or a profile.
        changes: fields of the profile, or of its preprocessing, to change.
        protocol: a name in `kdlib.config.PROTOCOLS`, or a protocol.
        folds: outer folds whose patients are tested.
        seeds: of the students.
        on_defect: "raise" stops at defective cases, "drop" leaves them out and reports them.
        group: how cases are grouped into patients (see `kdlib.data.index`).
        device: "auto", "cpu" or "cuda".
        results: folder that keeps runs and studies.
        study: folder in `results` for this study's tables and figures.

    Raises:
        InputError: names the field, its value and what is allowed.
    """

    data: str = "phantom"
    target: str = "spleen"
    profile: Profile = "quick"
    changes: dict = field(default_factory=dict)
    protocol: Protocol = "corrected"
    folds: tuple[Number, ...] = (0,)
    seeds: tuple[Number, ...] = (0,)
    on_defect: Literal["raise", "drop"] = "raise"
    group: str = "auto"
    device: str = "auto"
    results: Path = Path("results")
    study: str = "phantom-spleen-quick"

    def __post_init__(self):
        for name in ("data", "results"):
            if isinstance(getattr(self, name), os.PathLike | str):
                kind = str if name == "data" else Path
                object.__setattr__(self, name, kind(getattr(self, name)))
        if not isinstance(self.profile, Profile):
            object.__setattr__(self, "profile", override_profile(self.profile, self.changes))
        if not isinstance(self.protocol, Protocol):
            object.__setattr__(self, "protocol", lookup("protocol", self.protocol, PROTOCOLS))
        check_fields(self)
        for name in ("folds", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise InputError(f"{name} {list(given)}: give at least one, and each once")
        if not self.study or Path(self.study).name != self.study or self.study in (".", ".."):
            raise InputError(f"study {self.study!r}: give the name of one folder in {self.results}")
        pick_device(self.device)
        for fold in self.folds:
            self.run(model="S1", fold=fold)

    @property
    def folder(self) -> Path:
        """Where the study's tables and figures belong."""
        return self.results / self.study

    @property
    def repeats(self) -> list[dict[str, int]]:
        """Fold and seed of each repetition of a student."""
        return [dict(fold=fold, seed=seed) for fold in self.folds for seed in self.seeds]

    @property
    def classes(self) -> list[str]:
        """Names of the target classes; reads the data set."""
        return list(run_source(self.run(model="S1"), self.results).classes)

    def run(self, **fields: object) -> Run:
        """A run of this setting, of its first fold where the fields name none."""
        shared = dict(data=self.data, target=self.target, profile=self.profile, protocol=self.protocol)
        shared |= dict(on_defect=self.on_defect, group=self.group, fold=self.folds[0])
        return Run(**(shared | fields))


def baseline(setting: Setting, networks: Sequence[str] = ("T1", "T2", "S1", "S2")) -> list[Run]:
    """Teachers, and students alone from all of the labels and from half of them."""
    for model in networks:
        lookup("network", model, MODELS)
    teachers = [setting.run(model=m, fold=fold) for fold in setting.folds for m in networks if m in TEACHERS]
    students = [model for model in networks if model not in TEACHERS]
    return teachers + [
        setting.run(model=model, fraction=fraction, **repeat)
        for repeat in setting.repeats
        for fraction in (1.0, HALF)
        for model in students
    ]


def distilled(setting: Setting, student: str, teacher: str, **fields: object) -> list[Run]:
    """One student on half of the labels, distilled from a teacher by the thesis's recipe, per repetition."""
    shared = dict(model=student, teacher=teacher, fraction=HALF, recipe=thesis_recipe(student)) | fields
    return [setting.run(**(shared | repeat)) for repeat in setting.repeats]


def distillation(setting: Setting) -> list[Run]:
    """The baselines, and both students distilled from both teachers."""
    pairs = [(teacher, student) for teacher in ("T1", "T2") for student in ("S1", "S2")]
    taught = [
        setting.run(model=student, teacher=teacher, fraction=HALF, recipe=thesis_recipe(student), **repeat)
        for repeat in setting.repeats
        for teacher, student in pairs
    ]
    return baseline(setting) + taught


def controls(setting: Setting, student: str = "S1", teacher: str = "T1") -> list[Run]:
    """The student alone and distilled, and its negative controls (see `kdlib.experiments.recipes`)."""
    shared = {name: value for name, value in _shared(setting).items() if name != "fold"}
    own = [setting.run(model=student, fraction=HALF, **repeat) for repeat in setting.repeats]
    negative = [
        run
        for repeat in setting.repeats
        for run in negative_controls(student, teacher, fraction=HALF, **repeat, **shared)
    ]
    return own + distilled(setting, student, teacher) + negative


def _shared(setting: Setting) -> dict[str, object]:
    names = ("data", "target", "profile", "protocol", "on_defect", "group")
    return {name: getattr(setting, name) for name in names}


def external_network(setting: Setting, teacher: str = "T1") -> list[Run]:
    """A network from elsewhere, alone and distilled: MONAI's SegResNet, which joins by naming its layers."""
    layers = {"encoder2": "down_layers.1", "bottleneck": "down_layers.3", "decoder1": "up_layers.2"}

    def build(dims: int, channels: int, classes: int) -> ExternalModel:
        return ExternalModel(SegResNet(dims, 8, channels, classes), layers)

    MODELS.setdefault("SegResNet", build)
    own = [setting.run(model="SegResNet", fraction=HALF, **repeat) for repeat in setting.repeats]
    return own + distilled(setting, "SegResNet", teacher)


def ablation(setting: Setting, student: str = "S1", teacher: str = "T1") -> list[Run]:
    """Every subset of the thesis's four terms, and the student without any."""
    subsets = [only for size in range(1, len(WEIGHTS) + 1) for only in combinations(WEIGHTS, size)]
    own = [setting.run(model=student, fraction=HALF, **repeat) for repeat in setting.repeats]
    return own + [
        setting.run(model=student, fraction=HALF, teacher=teacher, recipe=thesis_recipe(student, only=only), **repeat)
        for repeat in setting.repeats
        for only in subsets
    ]


def loss_comparison(
    setting: Setting,
    student: str = "S1",
    teacher: str = "T1",
    losses: Sequence[str] = (),
    shuffled_controls: bool = False,
) -> list[Run]:
    """Every distillation loss alone, the thesis's terms with three feature losses, and the negative controls.

    Args:
        losses: to compare; by default all, or two of each family in the quick profile. Of one class DKD equals KL, and
            is left out where it is not named.
        shuffled_controls: train every loss also with a shuffled teacher, as its own control.
    """
    names = list(losses or (QUICK if setting.profile.name == "quick" else comparison_losses()))
    if not losses and len(setting.classes) == 1:
        names.remove("dkd")
    single = [distiller(loss, student) for loss in names]
    shuffled = [
        dataclasses.replace(recipe, teacher="shuffled", name=f"{recipe.name}:shuffled", control="shuffled_teacher")
        for recipe in single
        if shuffled_controls
    ]
    thesis = [thesis_recipe(student, loss) for loss in ("fitnet", "infonce", "supcon")]
    others = [run for run in controls(setting, student, teacher) if run.recipe not in thesis]
    return others + [
        setting.run(model=student, fraction=HALF, teacher=teacher, recipe=recipe, **repeat)
        for repeat in setting.repeats
        for recipe in thesis + single + shuffled
    ]


def correction(setting: Setting, student: str = "S1", teacher: str = "T1") -> list[Run]:
    """From the published protocol to the corrected one: at each stage the student alone, distilled, and distilled with
    zero weights.

    Raises:
        InputError: the target has several classes.
    """
    if len(setting.classes) > 1:
        raise InputError(
            f"target {setting.target!r} has several classes: pooled Dice and the one-channel softmax need one; name it"
        )
    runs = []
    for protocol in cumulative_correction():
        stage = dataclasses.replace(setting, protocol=protocol)
        for run in controls(stage, student, teacher):
            if run.role in ("baseline", "distilled") or run.recipe.control == "zero_weights":
                runs.append(run)
    return runs


def _distillation(setting: Setting) -> list[Run]:
    return distillation(setting) + controls(setting) + external_network(setting)


EXPERIMENTS: dict[str, Callable[..., list[Run]]] = {  # by the name of the notebook that shows it
    "01_baseline": baseline,
    "02_distillation": _distillation,
    "03_ablation": ablation,
    "04_loss_comparison": loss_comparison,
    "05_correction": correction,
}


def requested_runs(name: str, parameters: Mapping[str, object]) -> list[Run]:
    """The runs of a notebook with these parameters, teachers first; none where the notebook trains nothing.

    Raises:
        InputError: parameters that its experiment cannot use.
    """
    if name not in EXPERIMENTS:
        return []
    fields = {field.name for field in dataclasses.fields(Setting)}
    setting = Setting(**{key: value for key, value in parameters.items() if key in fields})
    try:
        runs = EXPERIMENTS[name](setting, **{key: value for key, value in parameters.items() if key not in fields})
    except TypeError as error:
        raise InputError(f"{name}: {error}") from None
    teachers = [teacher for run in runs for teacher in run.teacher_runs().values()]
    return list(dict.fromkeys(teachers + runs))
