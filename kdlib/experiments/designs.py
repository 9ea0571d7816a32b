"""The experiments: each is a function from a setting to the list of runs that answer its question."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

from kdlib.config import (
    BASELINE,
    STUDENTS,
    TEACHERS,
    VARIANTS,
    InputError,
    Optimisation,
    Recipe,
    Run,
    Term,
    correction_stages,
    lookup,
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
    unused_images,
    zero_weights,
)
from kdlib.experiments.setting import Setting
from kdlib.models import MODELS, ExternalModel
from kdlib.strict import check_each_once

IN_3D = {"dimensions": 3, "size": 32, "channels": "repeat"}  # makes a profile of slices one of volumes


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


def pairs(setting: Setting, teachers: Sequence[str]) -> list[Run]:
    """The thesis's recipe for each of these teachers and every student of the profile, on half of the labels."""
    return [
        run
        for teacher, model in product(teachers, setting.students)
        for run in setting.everywhere(model, thesis_recipe(model), fraction=0.5, teacher=teacher)
    ]


def distillation(setting: Setting, teachers: Sequence[str] = (), fractions: Sequence[float] = (1.0, 0.5)) -> list[Run]:
    """The thesis's Table 4.2: teachers (none named: the profile's), students on these fractions of the labels, and each
    of the teachers with each of these on half of them."""
    if 0.5 not in fractions:
        raise InputError(f"fractions {list(fractions)}: 0.5 must be among them, with which distillation is compared")
    teachers = teachers or setting.teachers
    for name in teachers:
        lookup("teacher", name, dict.fromkeys(TEACHERS))
    return baseline(setting, (*teachers, *setting.students), fractions) + pairs(setting, teachers)


def agreement_runs(setting: Setting) -> list[Run]:
    """Students on half of the labels, alone and distilled from T1, to compare with it."""
    alone = [run for model in setting.students for run in setting.everywhere(model, fraction=0.5)]
    return alone + pairs(setting, ["T1"])


def negative_controls(setting: Setting, student: str = "S1", teacher: str = "T1") -> list[Run]:
    """Baseline, the thesis's recipe and its negative controls, on half of the labels."""
    _check_students(student)
    runs = setting.everywhere(student, fraction=0.5)
    runs += setting.everywhere(student, thesis_recipe(student), prediction_recipe(), fraction=0.5, teacher=teacher)
    for fold, seed in setting.places:
        runs += controls(student, teacher, fold=fold, seed=seed, fraction=0.5, **setting.fields)
    return runs


def controls_and_agreement(setting: Setting) -> list[Run]:
    """The negative controls of S1, and all students on half of the labels beside their teacher T1."""
    runs = teachers(setting, ["T1"]) + negative_controls(setting)
    return list(dict.fromkeys(runs + agreement_runs(setting)))


def ablation(setting: Setting, student: str = "S1", teacher: str = "T1") -> list[Run]:
    """Every subset of the thesis's terms, on half of the labels, beside the baseline."""
    _check_students(student)
    recipes = [thesis_recipe(student, only=only) for size in range(1, 5) for only in combinations(WEIGHTS, size)]
    alone = setting.everywhere(student, fraction=0.5)
    return alone + setting.everywhere(student, *recipes, fraction=0.5, teacher=teacher)


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
    runs += setting.everywhere(student, *recipes, fraction=0.5, teacher=teacher)
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
        runs += setting.everywhere(student, thesis_recipe(student), zero_weights(student), teacher=teacher, **shared)
    return runs


def label_fractions(
    setting: Setting,
    students: Sequence[str] = ("S1",),
    teacher: str = "T1",
    fractions: Sequence[float] = (0.1, 0.25, 0.5, 1.0),
) -> list[Run]:
    """With how few labels does distillation help? Of each student: baseline, distilled, distilled with unlabelled
    images and its three controls at every label fraction; and the teacher, which has all labels."""
    check_each_once(students=students, fractions=fractions)
    _check_students(*students)
    runs = teachers(setting, [teacher])
    for fraction, student in product(fractions, students):
        ways: list[tuple[str | None, Recipe | None]] = [(None, None), (teacher, prediction_recipe())]
        if fraction < 1:
            ways += [(teacher, unlabelled()), ("self", consistency()), (teacher, pseudo_labels())]
            ways += [(None, unused_images())]
        for name, recipe in ways:
            runs += setting.everywhere(student, recipe, fraction=fraction, teacher=name)
    return runs


def training_length(
    setting: Setting, student: str = "S1", teacher: str = "T1", lengths: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0)
) -> list[Run]:
    """Does distillation raise the plateau, or only the speed? Each length is a full schedule of its own; the teacher
    has its usual one."""
    check_each_once(lengths=lengths)
    _check_students(student)
    runs = teachers(setting, [teacher])
    for length in lengths:
        half = dict(fraction=0.5, length=length)
        runs += setting.everywhere(student, **half)
        runs += setting.everywhere(student, prediction_recipe(), unlabelled(), teacher=teacher, **half)
    return runs


def _check_students(*models: str) -> None:
    """Raises InputError for a name that is no network, or a teacher's."""
    for model in models:
        lookup("student", model, {name: None for name in MODELS if name not in TEACHERS})


def capacity(
    setting: Setting,
    students: Sequence[str] = (),
    teacher: str = "T1",
    fractions: Sequence[float] = (1.0, 0.25),
    repeated: Sequence[str] = (),
) -> list[Run]:
    """What are network, labels and teacher worth? Networks of several sizes and receptive fields, each alone and
    distilled on every label fraction, and the teacher.

    Args:
        students: names in `STUDENTS` and `VARIANTS` of `kdlib.config`; none: all.
        repeated: those of them that have all seeds of the setting, the others its first; none: all have all.

    Raises: InputError: another name, one given twice, or a study of volumes.
    """
    if setting.sized.preprocessing.dimensions == 3:
        raise InputError("10_capacity: its networks and their receptive fields are of slices; choose a 2D profile")
    known = dict.fromkeys((*STUDENTS, *VARIANTS))
    students = tuple(students or known)
    for model in students:
        lookup("student", model, known)
    lookup("teacher", teacher, dict.fromkeys(TEACHERS))
    for model in repeated:
        lookup("repeated student", model, dict.fromkeys(students))
    check_each_once(students=students, fractions=fractions)
    if len(fractions) > 2:
        raise InputError(f"fractions {list(fractions)}: give one or two, most labels are compared with fewest")
    runs, once = teachers(setting, [teacher]), dataclasses.replace(setting, seeds=setting.seeds[:1])
    for model, fraction in product(students, fractions):
        own = setting if model in (repeated or students) else once
        runs += own.everywhere(model, fraction=fraction)
        runs += own.everywhere(model, prediction_recipe(), fraction=fraction, teacher=teacher)
    return runs


def of_volumes(setting: Setting, volumes: str = "", volume_changes: Mapping[str, object] = {}) -> Setting:
    """The same study on volumes.

    Args:
        volumes: name of a profile, e.g. "hippocampus3d"; none: the setting's own, in patches of 32 voxels a side.
        volume_changes: fields of it to change; those of the setting are kept only where no other profile is named.

    Raises: InputError: a profile of slices, a setting that is of volumes itself, or different numbers of folds.
    """
    changes = ({} if volumes else dict(setting.changes) | IN_3D) | dict(volume_changes)
    deep = dataclasses.replace(setting, profile=volumes or setting.profile, changes=changes)
    for wanted, what, profile in ((2, "slices", setting.sized), (3, "volumes", deep.sized)):
        if profile.preprocessing.dimensions != wanted:
            raise InputError(f"profile {profile.name!r} of the {what}: its dimensions must be {wanted}")
    if setting.sized.folds != deep.sized.folds:
        folds = f"{setting.sized.folds} folds of the slices, {deep.sized.folds} of the volumes"
        raise InputError(f"{folds}: patients are compared, so give both the same, by changes or volume_changes")
    return deep


def dimensions(
    setting: Setting, teacher: str = "T1", volumes: str = "", volume_changes: Mapping[str, object] = {}
) -> list[Run]:
    """Slices or volumes? The thesis's main table with one teacher, in two dimensions and in three; see `of_volumes`."""
    deep = of_volumes(setting, volumes, volume_changes)
    return distillation(setting, [teacher]) + distillation(deep, [teacher])


BASELINE_TRIALS = {"lr": (4e-3, 8e-3, 1.6e-2), "weight_decay": (0.01, 0.05, 0.2)}
DISTILLED_TRIALS = {"weight": (0.4, 1.6), "balance": (0.5,), "temperature": (1.0, 2.0, 4.0), "warmup": (0.0,)}


def sweep(
    setting: Setting,
    student: str = "S1",
    teacher: str = "T1",
    fraction: float = 0.5,
    alone: Mapping[str, Sequence[float]] = BASELINE_TRIALS,
    taught: Mapping[str, Sequence[float]] = DISTILLED_TRIALS,
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
        runs += setting.everywhere(student, recipe, fraction=fraction, profile=profile)
    for (rule, value), temperature, warmup in trials:
        term = Term("PMD", "kl", value if rule == "weight" else 1.0, temperature)
        name = f"{rule} {value:g}, temperature {temperature:g}, warm-up {warmup:g}"
        recipe = Recipe(name, terms=(term,), balance=value if rule == "balance" else None, warmup=warmup)
        runs += setting.everywhere(student, recipe, fraction=fraction, teacher=teacher)
    return runs


def external_network(setting: Setting) -> list[Run]:
    """A network from elsewhere, alone and distilled from T1: MONAI's SegResNet, which joins by naming its layers."""
    layers = {"encoder2": "down_layers.1", "bottleneck": "down_layers.3", "decoder1": "up_layers.2"}

    def build(dims: int, channels: int, classes: int) -> ExternalModel:
        from monai.networks.nets import SegResNet  # seconds that only this needs

        return ExternalModel(SegResNet(dims, 8, channels, classes), layers)

    MODELS.setdefault("SegResNet", build)
    alone = setting.everywhere("SegResNet", fraction=0.5)
    return alone + setting.everywhere("SegResNet", thesis_recipe("SegResNet"), fraction=0.5, teacher="T1")


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
    "11_dimensions": dimensions,
}
