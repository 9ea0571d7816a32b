"""The training step: against the plain one, its parts, a cohort against lone trainings, and how its cost grows.

    python benchmarks/training.py [--quick] [--device cpu] [--threads 1] [--output results/benchmarks]

Rows 1 to 5 of the goals, in turns, each fast way checked against the plain one before it is timed. Weights are fresh,
which changes no time. On a CPU slices are of 256 x 256, two at a time; on a GPU twenty, as in the thesis. The terms are
the thesis's four with InfoNCE between images, so that the plain way needs no choice of pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Mapping

import torch
from measure import (
    NO_BF16,
    NO_GPU,
    Record,
    difference,
    faster,
    gradients,
    has_bf16,
    in_turns,
    must_agree,
    probes,
    run_alone,
    share,
    unmeasured,
    within,
)
from plain import READ, PlainStep, dice, supervised_step
from torch import nn

from kdlib.config import PROFILES, Optimisation, Preprocessing, Profile, Recipe, Run
from kdlib.experiments.recipes import prediction_recipe, thesis_recipe
from kdlib.models import build_model, gflops
from kdlib.training import loop
from kdlib.training.batch import Batch
from kdlib.training.device import precision
from kdlib.training.frozen import FrozenTeachers, folded
from kdlib.training.state import RunState, new_model, new_state

MOST = 2e-3  # of losses and gradients in float32, between two orders of the same sums in networks of 30 layers
SUBSETS = [only for size in range(1, 5) for only in itertools.combinations((*READ, "PMD"), size)]  # of an ablation


@dataclasses.dataclass(frozen=True)
class Bench:
    """Slices of one size, and runs on them.

    Args:
        size: side of the slices; batch: slices of a step; width: of the teacher.
    """

    device: torch.device
    size: int
    batch: int
    width: float = 1.0
    classes: int = 1

    def profile(self) -> Profile:
        how = Optimisation("rmsprop", 1e-2, self.batch, weight_decay=0.0, schedule="constant")
        return Profile("benchmark", Preprocessing(self.size), self.width, student=how)

    def slices(self) -> Batch:
        generator = torch.Generator().manual_seed(0)
        shape = self.batch, self.size, self.size
        images = torch.rand(self.batch, 3, self.size, self.size, generator=generator).to(self.device)
        labels = torch.zeros(shape, dtype=torch.int64)
        labels[:, self.size // 4 : self.size // 2, self.size // 4 : self.size // 2] = 1
        for value in range(2, self.classes + 1):
            labels[:, value :: self.classes, ::3] = value
        patients = torch.arange(self.batch, device=self.device)
        known = torch.ones(self.batch, dtype=torch.bool, device=self.device)
        images = images.contiguous(memory_format=torch.channels_last)
        return Batch(images, labels.to(self.device), known, patients, 0, {})

    def teacher(self) -> nn.Module:
        model = new_model(Run("phantom", "spleen", "T1", profile=self.profile()), self.classes)
        model.train()
        with torch.no_grad():  # batch statistics of its own, as after a training; fresh ones would let it explode
            for _ in range(2):
                model(torch.rand(2, 3, 64, 64))
        return model.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def student(self, model: str, teacher: nn.Module | None = None, recipe: Recipe | None = None) -> RunState:
        run = Run(
            "phantom", "spleen", model, profile=self.profile(), teacher=teacher and "T1",
            recipe=recipe or (thesis_infonce(model) if teacher else None),
        )  # fmt: skip
        return new_state(run, self.classes, 10**6, self.device, {"T1": teacher} if teacher else {})


def thesis_infonce(student: str, only: tuple[str, ...] = (*READ, "PMD")) -> Recipe:
    return dataclasses.replace(thesis_recipe(student, "infonce", only), segmentation="dice")


def teaching(teacher: nn.Module, states: list[RunState], replay: int | None = None) -> Callable:
    return FrozenTeachers({"T1": teacher}, [state.run.recipe for state in states], replay)


def steps(states: list[RunState], batch: Batch, taught: Callable | None = None, name: str = "auto") -> Callable:
    """One step of each of these students on one pass of the teacher."""

    def run() -> None:
        with precision(name):
            given = dataclasses.replace(batch, teachers=taught(batch.images, states[0].step)) if taught else batch
            for state in states:
                loop.training_step(state, given)

    return run


def settle(*functions: Callable) -> None:
    """The first two steps of an epoch measure gradients: what is timed are the others."""
    for function in functions:
        for _ in range(2):
            function()


# ---------------------------------------------------------------------------------------------------- 1, 2, 3 and 5


def check_equal(bench: Bench, batch: Batch, teacher: nn.Module, record: Record) -> PlainStep:
    """The plain step from the same weights, after both have given the same losses and gradients in float32."""
    state = bench.student("S1", teacher)
    student, plain_teacher = new_model(state.run, bench.classes).to(bench.device), copy.deepcopy(teacher)
    for model in (student, plain_teacher):
        model.to(memory_format=torch.contiguous_format)
    pairs = {name: state.distiller.terms[name].adapters[0] for name in READ}
    copies = {name: tuple(copy.deepcopy(p.conv) for p in (a.student, a.teacher)) for name, a in pairs.items()}
    for model in (state.model, student):
        model.train()
    plain = PlainStep(plain_teacher, student, 0.4, copies)
    others = plain.losses(batch.images.contiguous(), batch.labels)
    sum(state.weights[name] * value for name, value in others.items()).backward()
    for name, used in (("kdlib", teacher), ("fused kernels", folded(teacher))):
        state.optimiser.zero_grad()
        with precision("fp32"):
            given = dataclasses.replace(batch, teachers=teaching(used, [state])(batch.images, 0))
            ours = loop.student_losses(state, given)
            sum(state.weights[n] * value for n, value in ours.items()).backward()
        apart = max(difference([ours[n]], [value]) for n, value in others.items())
        apart = max(apart, difference(gradients(state.model), gradients(student)))
        must_agree(f"{name}: losses and gradients", apart, MOST)
        record.add(
            within(f"1 losses and gradients of the step, {name}, against the plain way", apart, MOST, "relative")
        )
    return plain


def against_plain(bench: Bench, record: Record) -> None:
    batch, teacher, device = bench.slices(), bench.teacher(), bench.device
    plain = check_equal(bench, batch, teacher, record)
    images, labels = batch.images.contiguous(), batch.labels
    size = f"batch {bench.batch}, {bench.size} x {bench.size}"
    state, fused, cached, logits = (
        bench.student("S1", teacher, recipe) for recipe in (None,) * 3 + (prediction_recipe(),)
    )
    alone = bench.student("S1")
    seen = teaching(teacher, [state])(batch.images, 0)
    variants = {
        "plain": lambda: plain(images, labels),
        "kdlib": steps([state], batch, teaching(teacher, [state])),
        "fused": steps([fused], batch, teaching(folded(teacher), [fused])),
        "features kept": steps([cached], batch, teaching(teacher, [cached], replay=1)),
        "logits kept": steps([logits], batch, teaching(teacher, [logits], replay=1)),
        "terms": steps([state], batch, lambda images, step: seen),
        "alone": steps([alone], batch),
    }
    if has_bf16(device):
        exact = bench.student("S1", teacher)
        variants["fp32"] = steps([exact], batch, teaching(folded(teacher), [exact]), "fp32")
    settle(*(function for name, function in variants.items() if name != "plain"))
    taken = in_turns(variants, device)
    gpu = device.type == "cuda"
    what = f"1 step T1 to S1, four terms, {size}"
    record.add(faster(f"{what}, plain kernels", taken["kdlib"], taken["plain"]))
    if has_bf16(device):
        record.add(faster(f"{what}, fused kernels, bf16", taken["fused"], taken["plain"], 4 if gpu else 3))
        record.add(faster(f"{what}, fused kernels, float32", taken["fp32"], taken["plain"]))
    else:
        record.add(unmeasured(f"{what}, fused kernels, bf16", "at least 3 times", NO_BF16))
        record.add(faster(f"{what}, fused kernels, float32", taken["fused"], taken["plain"]))
    best = record.scripts[record.script]["probes"]
    rate = 1e12 * max(value for name, value in best.items() if "TFLOP" in name)
    work = (
        bench.batch
        * 1e9
        * (
            gflops(teacher, bench.size, reconstruct=False)
            + 3 * gflops(build_model("S1"), bench.size, reconstruct=False)
        )
    )
    record.add(
        share(f"1 the same beside its arithmetic at the rate of matrix products, {size}", taken["fused"], work / rate)
    )
    if gpu and bench.size == 256 and bench.batch == 20:
        record.add(share("1 the same beside 3.6 ms, the minimum of an H100", taken["fused"], 3.6e-3, 2))
    elif not gpu:
        record.add(unmeasured("1 step T1 to S1, batch 20, 256 x 256, H100", "at least 4 times; at most 7.2 ms", NO_GPU))
    record.add(faster(f"3 step with kept features and logits, {size}", taken["features kept"], taken["plain"], 5))
    record.add(faster(f"3 step with kept logits alone, {size}", taken["logits kept"], taken["plain"], 15))
    extra = taken["terms"] - taken["alone"]
    record.add(
        share(f"5 distillation terms beside the student's own step, InfoNCE, {size}", extra, taken["alone"], 0.5)
    )


def students_alone(bench: Bench, record: Record, compiled: tuple[str, ...]) -> None:
    """The student's own step: kdlib's, and compiled with the start-up shared by the steps of a training."""
    batch, device = bench.slices(), bench.device
    images, labels = batch.images.contiguous(), batch.labels
    for name in ("S1", "S2", "E1"):
        recipe = Recipe("dice", segmentation="dice", segmentation_weight=1.0)
        state = bench.student(name, recipe=recipe)
        model = copy.deepcopy(state.model).to(memory_format=torch.contiguous_format).train()
        optimiser = torch.optim.RMSprop(model.parameters(), lr=1e-2)
        state.model.train()
        with precision("fp32"):
            loop.student_losses(state, batch)["segmentation"].backward()
        twin = copy.deepcopy(state.model)  # of the same memory format, which changes float32 more (benchmarks/NOTES.md)
        twin.zero_grad()
        dice(twin(batch.images).segmentation, labels).backward()
        must_agree(f"{name}: gradients", difference(gradients(state.model), gradients(twin)), MOST)
        variants = {
            "plain": lambda model=model, optimiser=optimiser: supervised_step(model, optimiser, images, labels),
            "kdlib": steps([state], batch),
            "float32": steps([state], batch, name="fp32"),
        }
        if not has_bf16(device):
            del variants["float32"]
        if name in compiled and (device.type == "cuda" or shutil.which("g++")):
            twin = copy.deepcopy(state.model)
            quick, own = torch.compile(twin), torch.optim.RMSprop(twin.parameters(), lr=1e-2)
            variants["compiled"] = lambda quick=quick, own=own: supervised_step(quick, own, batch.images, labels)
            begin = time.perf_counter()
            variants["compiled"]()
            start_up = time.perf_counter() - begin
        settle(variants["kdlib"])
        taken = in_turns(variants, device)
        what = f"2 step of {name} alone, batch {bench.batch}, {bench.size} x {bench.size}"
        if has_bf16(device):
            record.add(faster(f"{what}, bf16", taken["kdlib"], taken["plain"], 1.7))
            record.add(faster(f"{what}, float32", taken["float32"], taken["plain"]))
        else:
            record.add(unmeasured(f"{what}, bf16", "at least 1.7 times", NO_BF16))
            record.add(faster(f"{what}, float32", taken["kdlib"], taken["plain"]))
        if "compiled" in taken:
            number = PROFILES["ct128"].student_epochs * PROFILES["ct128"].student_steps
            with_start = taken["compiled"] + start_up / number
            record.say(f"compiling {name}: {start_up:.0f} s, shared by {number} steps")
            record.add(
                faster(f"{what}, compiled, float32, start-up shared by {number} steps", with_start, taken["plain"], 2)
            )
        elif name in compiled:
            record.add(unmeasured(f"{what}, compiled", "at least 2 times", "not measured: no compiler here"))


def terms_of_labels(bench: Bench, record: Record) -> None:
    """The default recipe of the corrected protocol: contrasts of 1,024 labelled pixels."""
    batch, teacher = bench.slices(), bench.teacher()
    for name in ("S1", "S2", "E1"):
        state, alone = bench.student(name, teacher, thesis_recipe(name)), bench.student(name)
        taught = teaching(teacher, [state])
        seen = taught(batch.images, 0)
        variants = {
            "terms": steps([state], batch, lambda images, step, seen=seen: seen),
            "alone": steps([alone], batch),
            "taught": steps([state], batch, taught),
        }
        settle(*variants.values())
        taken = in_turns(variants, bench.device)
        size, extra = f"batch {bench.batch}, {bench.size} x {bench.size}", taken["terms"] - taken["alone"]
        record.add(
            share(
                f"5 distillation terms beside {name}'s own step, contrast of pixels, {size}", extra, taken["alone"], 0.5
            )
        )
        what = f"step of {name} with its teacher at width {bench.width:g} beside one alone, {size}"
        record.add(share(what, taken["taught"], taken["alone"]))


# -------------------------------------------------------------------------------------------------------- 4, a cohort


def recipes(count: int) -> list[Recipe]:
    every = [thesis_recipe("S1"), *(thesis_infonce("S1", only) for only in SUBSETS)]
    return [every[i % len(every)] for i in range(count)]


def cohort(bench: Bench, record: Record, count: int = 16) -> None:
    """`count` students on one pass of the teacher, and each with a pass of its own: the same weights."""
    batch, teacher = bench.slices(), bench.teacher()
    together, lone = ([bench.student("S1", teacher, recipe) for recipe in recipes(count)] for _ in range(2))
    taught = teaching(teacher, together)
    own = [steps([state], batch, taught) for state in lone]

    def alone() -> None:
        for function in own:
            function()

    variants = {"cohort": steps(together, batch, taught), "alone": alone}
    settle(*variants.values())
    taken = in_turns(variants, bench.device)
    size = f"batch {bench.batch}, {bench.size} x {bench.size}"
    goal = 3 if bench.device.type == "cuda" else 4
    record.add(faster(f"4 step of {count} distilled S1 in one cohort, {size}", taken["cohort"], taken["alone"], goal))
    apart = difference(
        [p for state in together for p in state.model.parameters()],
        [p for state in lone for p in state.model.parameters()],
    )
    if bench.device.type == "cpu":
        must_agree("weights of cohort and lone trainings", apart, 0)
    record.add(within("4 weights after these steps, cohort against alone", apart, 1e-12, "relative"))


# ------------------------------------------------------------------------------------------------------------- curves


def curves(bench: Bench, record: Record, batches: tuple, sizes: tuple, numbers: tuple, classes: tuple) -> None:
    """A distilled S1's step over batch, side of the slices, number of students, and number of classes."""

    def taken(of: Bench, count: int = 1) -> tuple[float, float]:
        batch, teacher = of.slices(), of.teacher()
        states = (
            [of.student("S1", teacher, recipe) for recipe in recipes(count)]
            if count > 1
            else [of.student("S1", teacher, thesis_recipe("S1"))]
        )
        lone = of.student("S1")
        variants = {"distilled": steps(states, batch, teaching(teacher, states)), "alone": steps([lone], batch)}
        settle(*variants.values())
        found = in_turns(variants, of.device)
        return found["distilled"], found["alone"]

    def points(changes: Mapping[float, Bench]) -> list[tuple[str, float, float]]:
        found = {x: taken(of) for x, of in changes.items()}
        return [(name, x, both[i]) for i, name in enumerate(("distilled S1", "S1 alone")) for x, both in found.items()]

    change = dataclasses.replace
    record.curve("step over batch", "slices", points({n: change(bench, batch=n) for n in batches}))
    record.curve("step over side", "pixels", points({n: change(bench, size=n) for n in sizes}))
    record.curve("step over classes", "classes", points({n: change(bench, classes=n) for n in classes}))
    of_cohorts = [("one teacher pass", n, taken(bench, n)[0]) for n in numbers]
    record.curve("step of a cohort", "students", of_cohorts)


def measure(record: Record) -> None:
    gpu, quick = record.device.type == "cuda", record.quick
    record.note("probes", probes(record.device))
    large = Bench(record.device, 256, 20 if gpu else 2)
    middle = Bench(record.device, 256 if gpu else 128, 20 if gpu else 4, 1.0 if gpu else 0.25)
    small = Bench(record.device, 256 if gpu else 64, 20 if gpu else 8, 1.0 if gpu else 0.25)
    cohorts = Bench(record.device, 256 if gpu else 128, 20 if gpu else 2)
    if quick:
        large = middle = small = cohorts = Bench(record.device, 32, 2, 0.125)
    against_plain(large, record)
    students_alone(dataclasses.replace(large, batch=large.batch if quick or gpu else 4), record, ("S1",) * (not quick))
    terms_of_labels(middle, record)
    cohort(cohorts, record, 3 if quick else 16)
    if quick:
        curves(small, record, (2, 4), (32, 64), (1, 2), (1, 3))
    else:
        curves(small, record, (4, 8, 16, 32), (32, 64, 128, 256), (1, 4, 16), (1, 4, 13))


if __name__ == "__main__":
    run_alone("training", measure, __doc__)
