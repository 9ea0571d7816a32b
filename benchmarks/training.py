"""What the loop saves: native bfloat16 against float32, and a cohort against lone trainings; and what a teacher costs
(`Profile.step_cost`). Medians, in one process.

    python benchmarks/training.py [--size 128] [--batch 16] [--width 0.25] [--repeats 7]

Variants are timed in turns, so that a machine that slows down slows all of them; trust the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from kdlib.config import PROFILES, Preprocessing, Profile, Run
from kdlib.experiments.recipes import thesis_recipe
from kdlib.training import loop
from kdlib.training.batch import Batch
from kdlib.training.device import computes_bf16, pick_device, precision
from kdlib.training.hooks import FeatureHooks, scales_of
from kdlib.training.state import new_model, new_state


def seconds(function) -> float:
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_turns(variants: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each variant, after one warm-up of each."""
    for function in variants.values():
        function()
    times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    device = pick_device()
    profile = Profile("benchmark", Preprocessing(options.size), options.width, folds=PROFILES["quick"].folds)
    images = torch.rand(options.batch, 3, options.size, options.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    patients = torch.zeros(options.batch, dtype=torch.int64, device=device)
    labelled = torch.ones_like(patients, dtype=torch.bool)
    labels = (torch.rand(options.batch, options.size, options.size, device=device) > 0.9).long()
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, slices of {options.size}, batch {options.batch}"
    )

    def step(state, seen=None, name="auto"):
        def run() -> None:
            with precision(name):
                loop.training_step(state, Batch(images, labels, labelled, patients, 0, seen or {}))

        return run

    def state_of(model, teacher=None, **changes):
        run = Run("phantom", "spleen", model, profile=profile, teacher=teacher and "T1", **changes)
        return new_state(run, 1, 1000, device, {"T1": teacher} if teacher else {})

    if computes_bf16(device) and device.type == "cpu":
        for model in ("T1", "T2", "S1", "S2"):
            state = state_of(model)
            found = in_turns({name: step(state, name=name) for name in ("fp32", "bf16")}, options.repeats)
            ratio = found["fp32"] / found["bf16"]
            print(f"{model}: fp32 {found['fp32']:.3f} s, bf16 {found['bf16']:.3f} s, ratio {ratio:.2f}")

    teacher_run = Run("phantom", "spleen", "T1", profile=profile)
    teacher = new_model(teacher_run, 1).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    subsets = [("E-E",), ("B-B",), ("D-D",), ("PMD",), ("E-E", "B-B"), ("E-E", "D-D"), ("B-B", "PMD"), ("D-D", "PMD")]
    states = [state_of("S1", teacher, recipe=thesis_recipe("S1", only=only)) for only in subsets]
    hooks = FeatureHooks(teacher, teacher.scales, scales_of((state.run.recipe for state in states), "teacher"))

    def teach() -> dict:
        return {"T1": loop.teacher_forward(hooks, images)}

    def cohort() -> None:
        shared = teach()
        for state in states:
            step(state, shared)()

    def alone() -> None:
        for state in states:
            step(state, teach())()

    for model in ("S1", "S2", "E1"):
        lone, taught = state_of(model), state_of(model, teacher, recipe=thesis_recipe(model))
        pair = {"lone": step(lone), "taught": lambda taught=taught: step(taught, teach())()}
        found = in_turns(pair, options.repeats)
        print(f"{model}: a step without teacher {found['lone']:.3f} s, distilled with its teacher's pass "
              f"{found['taught']:.3f} s, ratio {found['taught'] / found['lone']:.2f}")  # fmt: skip
    found = in_turns({"alone": alone, "cohort": cohort}, options.repeats)
    print(f"8 distilled S1: alone {found['alone']:.3f} s, cohort {found['cohort']:.3f} s per step, "
          f"ratio {found['alone'] / found['cohort']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
