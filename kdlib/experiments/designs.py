"""The experiments: each is a function from a setting to the list of runs that answer its question."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from kdlib.config import (
    BASELINE,
    PROTOCOLS,
    STUDENTS,
    TEACHERS,
    VARIANTS,
    InputError,
    Optimisation,
    Profile,
    Recipe,
    Run,
    Term,
    correction_stages,
    lookup,
    override_profile,
)
from kdlib.experiments.recipes import (
    WEIGHTS,
    comparison_losses,
    consistency,
    controls,
    distiller,
    prediction_recipe,
    pseudo_labels,
    thesis_recipe,
    unlabelled,
    zero_weights,
)
from kdlib.experiments.source import run_source
from kdlib.files import check_study
from kdlib.models import MODELS, ExternalModel
from kdlib.strict import Range, check_fields
from kdlib.training.device import pick_device

LABEL_FRACTIONS = (0.1, 0.25, 0.5, 1.0)
LENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
Number = Annotated[int, Range(0)]


@dataclass(frozen=True)
class Setting:
    """What the experiments of a study share: the parameters of every notebook, checked once.

    Args:
        data: a folder in Decathlon or nnU-Net layout, or "phantom".
        target: label names joined by ",", or "all".
        profile: name in `kdlib.PROFILES`; `changes`: fields of it to change.
        protocol: name in `kdlib.PROTOCOLS`.
        folds, seeds: outer folds whose patients are tested, and seeds of the students.
        on_defect: "raise" or "drop", see `kdlib.data.index`; `group`: how cases are grouped into patients.
        device: "auto", "cpu" or "cuda".
        results: folder that keeps runs and studies; `study`: folder in it for this study's tables and figures.
        reuse: studies in `results`: a run that stands in their tables is read from there, see `kdlib.study`.

    Raises:
        InputError: names the parameter, its value and what is allowed.
    """

    data: str = "phantom"
    target: str = "spleen"
    profile: str = "quick"
    changes: dict = field(default_factory=dict)
    protocol: str = "corrected"
    folds: tuple[Number, ...] = (0,)
    seeds: tuple[Number, ...] = (0,)
    on_defect: Literal["raise", "drop"] = "raise"
    group: str = "auto"
    device: str = "auto"
    results: Path = Path("results")
    study: str = "phantom-spleen-quick"
    reuse: tuple[str, ...] = ()

    def __post_init__(self):
        for name, kind in (("data", str), ("results", Path)):
            if isinstance(getattr(self, name), str | os.PathLike):
                object.__setattr__(self, name, kind(getattr(self, name)))
        check_fields(self)
        for name, numbers in (("folds", self.folds), ("seeds", self.seeds)):
            if not numbers or len(set(numbers)) < len(numbers):
                raise InputError(f"{name} {list(numbers)}: give at least one, and each once")
        for name in (self.study.split("/")[0], *self.reuse):
            check_study(name)
        pick_device(self.device)
        self.run("S1")  # whatever a run refuses
        for fold, seed in self.places:
            self.run("S1", fold=fold, seed=seed)

    @property
    def sized(self) -> Profile:
        """The profile with its changes."""
        return override_profile(self.profile, dict(self.changes))

    @property
    def teachers(self) -> list[str]:
        """Those that the profile's studies train."""
        return [model for model in self.sized.networks if model in TEACHERS]

    @property
    def students(self) -> list[str]:
        """Those that the profile's studies train."""
        return [model for model in self.sized.networks if model not in TEACHERS]

    @property
    def classes(self) -> list[str]:
        """Names of the target classes; reads the data set."""
        return list(run_source(self.run("S1"), self.results).classes)

    @property
    def folder(self) -> Path:
        """Where the study's tables and figures are."""
        return self.results / self.study

    @property
    def reused(self) -> list[Path]:
        """Folders of the studies whose tables are read instead of trained."""
        return [self.results / name for name in self.reuse]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Every fold with every seed."""
        return [(fold, seed) for fold in self.folds for seed in self.seeds]

    @property
    def fields(self) -> dict[str, object]:
        """The fields of `kdlib.Run` that all runs share."""
        shared = dict(data=self.data, target=self.target, profile=self.sized, on_defect=self.on_defect)
        return shared | dict(protocol=lookup("protocol", self.protocol, PROTOCOLS), group=self.group)

    def run(self, model: str, **fields: object) -> Run:
        """A run of this setting, of its first fold unless `fields`, further fields of `kdlib.Run`, say otherwise."""
        return Run(model=model, **(self.fields | dict(fold=self.folds[0]) | fields))

    def everywhere(self, model: str, **fields: object) -> list[Run]:
        """The same run in every fold and seed."""
        return [self.run(model, fold=fold, seed=seed, **fields) for fold, seed in self.places]


def teachers(setting: Setting, models: Sequence[str] = TEACHERS) -> list[Run]:
    """The teachers of every fold, trained on all labels with the first seed of teachers."""
    return [setting.run(model, fold=fold) for fold in setting.folds for model in models]


def baseline(setting: Setting, networks: Sequence[str] = (), fractions: Sequence[float] = (1.0, 0.5)) -> list[Run]:
    """Teachers, and students without distillation on all and on half of the labels.

    Args:
        networks: names in `kdlib.models.MODELS`; none: the profile's.
        fractions: of the labels, for the students.
    """
    networks = networks or setting.sized.networks
    for model in networks:
        lookup("network", model, MODELS)
    students = [model for model in networks if model not in TEACHERS]
    runs = teachers(setting, [model for model in networks if model in TEACHERS])
    return runs + [run for f in fractions for model in students for run in setting.everywhere(model, fraction=f)]


def pairs(setting: Setting, students: Sequence[str] = (), teachers: Sequence[str] = ()) -> list[Run]:
    """The thesis's recipe for every teacher and student (none named: the profile's), on half of the labels."""
    return [
        run
        for teacher in teachers or setting.teachers
        for model in students or setting.students
        for run in setting.everywhere(model, fraction=0.5, teacher=teacher, recipe=thesis_recipe(model))
    ]


def distillation(setting: Setting, teachers: Sequence[str] = (), fractions: Sequence[float] = (1.0, 0.5)) -> list[Run]:
    """The thesis's Table 4.2: teachers (none named: the profile's), students on these fractions of the labels, and each
    of the teachers with each of these on half of them."""
    if 0.5 not in fractions:
        raise InputError(f"fractions {list(fractions)}: 0.5 must be among them, with which distillation is compared")
    teachers = teachers or setting.teachers
    for name in teachers:
        lookup("teacher", name, dict.fromkeys(TEACHERS))
    return baseline(setting, (*teachers, *setting.students), fractions) + pairs(setting, teachers=teachers)


def agreement_runs(setting: Setting, teacher: str = "T1") -> list[Run]:
    """Students on half of the labels, alone and distilled from one teacher, to compare with that teacher."""
    alone = [run for model in setting.students for run in setting.everywhere(model, fraction=0.5)]
    return alone + pairs(setting, teachers=[teacher])


def negative_controls(setting: Setting, student: str = "S1", teacher: str = "T1") -> list[Run]:
    """Baseline, the thesis's recipe and its negative controls, on half of the labels."""
    half = dict(fraction=0.5)
    runs = setting.everywhere(student, **half)
    for recipe in (thesis_recipe(student), prediction_recipe()):
        runs += setting.everywhere(student, teacher=teacher, recipe=recipe, **half)
    for fold, seed in setting.places:
        runs += controls(student, teacher, fold=fold, seed=seed, **half, **setting.fields)
    return runs


def controls_and_agreement(setting: Setting, teacher: str = "T1") -> list[Run]:
    """The negative controls of S1, and all students on half of the labels beside their teacher."""
    runs = teachers(setting, [teacher]) + negative_controls(setting, teacher=teacher)
    return list(dict.fromkeys(runs + agreement_runs(setting, teacher)))


def ablation(setting: Setting, student: str = "S1", teacher: str = "T1") -> list[Run]:
    """Every subset of the thesis's terms, on half of the labels, beside the baseline."""
    subsets = [only for size in range(1, 5) for only in combinations(WEIGHTS, size)]
    recipes = [thesis_recipe(student, only=only) for only in subsets]
    return setting.everywhere(student, fraction=0.5) + [
        run for recipe in recipes for run in setting.everywhere(student, fraction=0.5, teacher=teacher, recipe=recipe)
    ]


def loss_comparison(
    setting: Setting,
    student: str = "S1",
    teacher: str = "T1",
    losses: Sequence[str] = (),
    shuffled_controls: bool = False,
) -> list[Run]:
    """Every distillation loss alone under one training setup, the thesis's terms with three losses, and the controls.

    Args:
        losses: names in `kdlib.losses.LOSSES`; none: all, or two of each family in profile quick. DKD
            equals KL where there is one class, and is left out where it is not named.
        shuffled_controls: every loss also with a shuffled teacher, as its own control.
    """
    names = list(losses or comparison_losses(quick=setting.profile == "quick"))
    if not losses and len(setting.classes) == 1:
        names.remove("dkd")
    recipes = [thesis_recipe(student, loss) for loss in ("fitnet", "infonce", "supcon")]
    recipes += [distiller(loss, student) for loss in names]
    if shuffled_controls:
        shuffled = dict(teacher="shuffled", control="shuffled_teacher")
        recipes += [dataclasses.replace(r, name=f"{r.name} shuffled", **shuffled) for r in recipes[3:]]
    runs = negative_controls(setting, student, teacher)
    for recipe in recipes:
        runs += setting.everywhere(student, fraction=0.5, teacher=teacher, recipe=recipe)
    return list(dict.fromkeys(runs))


def correction(setting: Setting, student: str = "S1", teacher: str = "T1", way: str = "cumulative") -> list[Run]:
    """Baseline, zero weights and the distilled student under every protocol of a way of correction.

    Args:
        way: of `correction_stages`: cumulative, ends or single.

    Raises:
        InputError: the target has several classes, or another way.
    """
    if len(setting.classes) > 1:
        raise InputError(
            f"target {setting.target!r} has several classes: pooled Dice and the one-channel softmax need one; name it"
        )
    runs = []
    for protocol in correction_stages(way):
        shared = dict(fraction=0.5, protocol=protocol)
        runs += setting.everywhere(student, **shared)
        for recipe in (thesis_recipe(student), zero_weights(student)):
            runs += setting.everywhere(student, teacher=teacher, recipe=recipe, **shared)
    return runs


def label_fractions(
    setting: Setting,
    students: Sequence[str] = ("S1",),
    teacher: str = "T1",
    fractions: Sequence[float] = LABEL_FRACTIONS,
) -> list[Run]:
    """With how few labels does distillation help? Of each student: baseline, distilled, distilled with unlabelled
    images and its two controls at every label fraction; and the teacher, which has all labels."""
    runs = teachers(setting, [teacher])
    for fraction, student in product(fractions, students):
        runs += setting.everywhere(student, fraction=fraction)
        taught: list[tuple[str, Recipe]] = [(teacher, prediction_recipe())]
        if fraction < 1:
            taught += [(teacher, unlabelled()), ("self", consistency()), (teacher, pseudo_labels())]
        for name, recipe in taught:
            runs += setting.everywhere(student, fraction=fraction, teacher=name, recipe=recipe)
    return runs


def training_length(
    setting: Setting, student: str = "S1", teacher: str = "T1", lengths: Sequence[float] = LENGTHS
) -> list[Run]:
    """Does distillation raise the plateau, or only the speed? Each length is a full schedule of its own; the teacher
    has its usual one."""
    runs = teachers(setting, [teacher])
    for length in lengths:
        half = dict(fraction=0.5, length=length)
        runs += setting.everywhere(student, **half)
        for recipe in (prediction_recipe(), unlabelled()):
            runs += setting.everywhere(student, teacher=teacher, recipe=recipe, **half)
    return runs


def capacity(
    setting: Setting,
    students: Sequence[str] = (),
    teacher: str = "T1",
    fractions: Sequence[float] = (1.0, 0.25),
) -> list[Run]:
    """What are network, labels and teacher worth? Networks of several sizes and receptive fields, each alone and
    distilled on every label fraction, and the teacher.

    Args:
        students: names in `STUDENTS` and `VARIANTS` of `kdlib.config`; none: all.

    Raises: InputError: another name, one given twice, or a study of volumes.
    """
    if setting.sized.preprocessing.dimensions == 3:
        raise InputError("10_capacity: its networks and their receptive fields are of slices; choose a 2D profile")
    known = dict.fromkeys((*STUDENTS, *VARIANTS))
    students = tuple(students or known)
    for model in students:
        lookup("student", model, known)
    lookup("teacher", teacher, dict.fromkeys(TEACHERS))
    for name, given in (("students", students), ("fractions", fractions)):
        if not given or len(set(given)) < len(given):
            raise InputError(f"{name} {list(given)}: give at least one, and each once")
    runs = teachers(setting, [teacher])
    for model, fraction in product(students, fractions):
        runs += setting.everywhere(model, fraction=fraction)
        runs += setting.everywhere(model, fraction=fraction, teacher=teacher, recipe=prediction_recipe())
    return runs


BASELINE_TRIALS = {"lr": (4e-3, 8e-3, 1.6e-2), "weight_decay": (0.01, 0.05, 0.2)}
DISTILLED_TRIALS = {"weight": (0.4, 1.6), "balance": (0.5,), "temperature": (1.0, 2.0, 4.0), "warmup": (0.0,)}


def sweep(
    setting: Setting,
    student: str = "S1",
    teacher: str = "T1",
    fraction: float = 0.5,
    alone: Mapping[str, Sequence[float]] = MappingProxyType(BASELINE_TRIALS),
    taught: Mapping[str, Sequence[float]] = MappingProxyType(DISTILLED_TRIALS),
) -> list[Run]:
    """As many trials for the student alone as for the distilled one, to choose a recipe on validation patients.

    An untuned method loses to a tuned one, whatever it is worth: so learning rate, weight decay and batch of the
    baseline get as many trials as weight (or, in its place, balance of gradients), temperature and warm-up of KL.

    Args:
        fraction: label fraction of all trials.
        alone: fields of `Optimisation` of the student alone, each with its values, all combined; the distilled one has
            the profile's.
        taught: weight and balance of KL on predictions (see `Recipe`), each with every temperature (1) and warmup (0).

    Raises:
        InputError: an unknown field, or different numbers of trials of the baseline and of the distilled student.
    """
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Optimisation))
    for what, given, known in (("alone", alone, fields), ("taught", taught, DISTILLED_TRIALS)):
        for name in given:
            lookup(f"sweep: {what}", name, known)
    own = [dict(zip(alone, values, strict=True)) for values in product(*alone.values())]
    says = [(rule, value) for rule in ("weight", "balance") for value in taught.get(rule, ())]
    trials = list(product(says, taught.get("temperature", [1.0]), taught.get("warmup", [0.0])))
    if len(own) != len(trials):
        raise InputError(
            f"sweep: {len(own)} trials of the student alone and {len(trials)} of the distilled one; the better tuned "
            "one would win: give both the same number"
        )
    runs = []
    for chosen in own:
        how = dataclasses.replace(setting.sized.student, **chosen)
        profile = dataclasses.replace(setting.sized, student=how)
        recipe = dataclasses.replace(BASELINE, name=", ".join(f"{name} {value}" for name, value in chosen.items()))
        runs += setting.everywhere(student, fraction=fraction, recipe=recipe, profile=profile)
    for (rule, value), temperature, warmup in trials:
        term = Term("PMD", "kl", value if rule == "weight" else 1.0, temperature)
        name = f"{rule} {value:g}, temperature {temperature:g}, warm-up {warmup:g}"
        recipe = Recipe(name, terms=(term,), balance=value if rule == "balance" else None, warmup=warmup)
        runs += setting.everywhere(student, fraction=fraction, teacher=teacher, recipe=recipe)
    return runs


def external_network(setting: Setting, teacher: str = "T1") -> list[Run]:
    """A network from elsewhere, alone and distilled: MONAI's SegResNet, which joins by naming its layers."""
    layers = {"encoder2": "down_layers.1", "bottleneck": "down_layers.3", "decoder1": "up_layers.2"}

    def build(dims: int, channels: int, classes: int) -> ExternalModel:
        from monai.networks.nets import SegResNet  # seconds that only this needs

        return ExternalModel(SegResNet(dims, 8, channels, classes), layers)

    MODELS.setdefault("SegResNet", build)
    half = dict(fraction=0.5)
    taught = dict(teacher=teacher, recipe=thesis_recipe("SegResNet"))
    return setting.everywhere("SegResNet", **half) + setting.everywhere("SegResNet", **half, **taught)


def requested_runs(name: str, parameters: Mapping[str, object]) -> list[Run]:
    """The runs of a notebook with these parameters, teachers first; none where the notebook trains nothing.

    Raises:
        InputError: parameters that its experiment cannot use.
    """
    if name not in EXPERIMENTS:
        return []
    fields = {field.name for field in dataclasses.fields(Setting)}
    setting = Setting(**{key: value for key, value in parameters.items() if key in fields})
    own = {key: value for key, value in parameters.items() if key not in fields}
    known = list(inspect.signature(EXPERIMENTS[name]).parameters)[1:]
    for key in own:
        lookup(f"parameter of {name}", key, dict.fromkeys([*fields, *known]))
    runs = EXPERIMENTS[name](setting, **own)
    return list(dict.fromkeys([needed for run in runs for needed in run.needed_runs()] + runs))


EXPERIMENTS: dict[str, Callable[..., list[Run]]] = {  # by notebook
    "01_baseline": baseline,
    "02_distillation": distillation,
    "02b_controls": controls_and_agreement,
    "02c_external": external_network,
    "03_ablation": ablation,
    "04_loss_comparison": loss_comparison,
    "05_correction": correction,
    "07_fractions": label_fractions,
    "08_length": training_length,
    "09_sweep": sweep,
    "10_capacity": capacity,
}
