"""What only a GPU can tell: the memory of a cohort, waiting for slices, and the length of the thesis's whole grid.

    python benchmarks/gpu_rows.py [--quick]

The peak memory of a cohort of 16 is foretold from those of one and of two students: what the second adds, fourteen
times more. The grid is what `make study PROFILE=thesis` trains with all experiments, five folds and one seed: its steps
are counted, and a few of each kind of cohort are timed on slices made up for it. On a CPU these rows say so.
"""

from __future__ import annotations

import dataclasses

import torch
from measure import NO_GPU, Record, in_turns, run_alone, share, unmeasured, within
from training import Bench, recipes, settle, steps, teaching

from kdlib.data import augment
from kdlib.experiments import Setting, ablation, distillation, loss_comparison
from kdlib.experiments.runner import cohorts
from kdlib.training.state import new_state

SLICES = 2500  # of the training patients of a fold: an assumption, of the size of the spleen task


def peak_of(bench: Bench, count: int) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    batch, teacher = bench.slices(), bench.teacher()
    states = [bench.student("S1", teacher, recipe) for recipe in recipes(count)]
    settle(steps(states, batch, teaching(teacher, states)))
    return torch.cuda.max_memory_allocated(bench.device)


def memory(bench: Bench, record: Record) -> None:
    one, two, all_of_them = (peak_of(bench, count) for count in (1, 2, 16))
    foretold = one + 15 * (two - one)
    record.add(
        share(
            "11 peak memory of a cohort of 16, beside what is foretold of it",
            all_of_them / 1e9,
            foretold / 1e9,
            unit="GB",
        )
    )
    record.add(within("11 error of the foretelling", abs(foretold / all_of_them - 1), 0.1, "relative"))


def waiting(bench: Bench, record: Record) -> None:
    """Share of a step that goes into fetching and augmenting its slices."""
    images = torch.randint(256, (500, bench.size, bench.size), device=bench.device, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)

    def fetch() -> object:
        index = torch.randint(len(images), (bench.batch,), generator=generator).to(bench.device)
        taken = images[index]
        return augment(taken[:, None].expand(-1, 3, -1, -1).float() / 255, (taken > 250).long(), generator)

    batch, teacher = bench.slices(), bench.teacher()
    state = bench.student("S1", teacher)
    step = steps([state], batch, teaching(teacher, [state]))
    settle(step)
    taken = in_turns({"both": lambda: (fetch(), step()), "step": step}, bench.device)
    record.add(share("6 step with its slices beside one without", taken["both"], taken["step"], 1.02))


def grid(bench: Bench, record: Record) -> None:
    """Steps of all cohorts of the grid, each kind timed; without validation, evaluation and start-up."""
    setting = Setting(profile="thesis", folds=tuple(range(5)), device="cpu")
    losses = loss_comparison(setting, losses=("kl", "fitnet", "at", "infonce", "supcon"))
    runs = list(dict.fromkeys([*distillation(setting), *ablation(setting), *losses]))
    profile, batch, teacher = setting.sized, bench.slices(), bench.teacher()
    total, known = 0.0, {}
    for group in cohorts(runs):
        kind = tuple((run.model, run.recipe.name) for run in group)
        if kind not in known:
            # of T2 and of a student as teacher, too, the pass is that of T1
            taught = [run if run.teacher is None else dataclasses.replace(run, teacher="T1") for run in group]
            read = {"T1": teacher} if taught[0].teacher else {}
            states = [new_state(run, 1, 10**6, bench.device, read, patients=range(64)) for run in taught]
            step = steps(states, batch, teaching(teacher, states) if read else None)
            settle(step)
            known[kind] = in_turns({"step": step}, bench.device)["step"]
            record.say(f"{len(group)} runs, {group[0].model} and others: {1000 * known[kind]:.1f} ms a step")
        is_teacher = group[0].is_teacher
        epochs = profile.teacher_epochs if is_teacher else profile.student_epochs
        total += known[kind] * epochs * SLICES / (1 if is_teacher else 2) / group[0].optimisation.batch
    what = (
        f"12 steps of the thesis's grid, {len(runs)} runs in 5 folds, extrapolated from a few timed ones of each kind"
    )
    record.add(within(what, total / 3600, 2, "h"))


def measure(record: Record) -> None:
    if record.device.type != "cuda":
        record.add(unmeasured("11 peak memory of a cohort of 16", "foretold within 10 %", NO_GPU))
        record.add(unmeasured("12 whole grid of the thesis on one H100", "at most 2 h", NO_GPU))
        return
    bench = Bench(record.device, 32, 4, 0.125) if record.quick else Bench(record.device, 256, 20)
    memory(bench, record)
    waiting(bench, record)
    if not record.quick:
        grid(bench, record)


if __name__ == "__main__":
    run_alone("gpu_rows", measure, __doc__)
