"""A small study for `test_faults.py`, which kills it. It is no test itself: processes of their own run it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from kdlib import InputError, Preprocessing, Profile, Run, TrainingError, study, thesis_recipe
from kdlib.training import loop
from kdlib.training.state import RunState

SIZE = Profile("tiny", Preprocessing(32, 12.0), 0.0625, 2, 2, 4, 4, folds=5)


def runs(phantom: str) -> list[Run]:
    """A baseline, and three students of one teacher in a cohort."""
    base = dict(data=phantom, target="spleen", model="S1", fraction=0.5, profile=SIZE)
    recipes = [thesis_recipe("S1"), thesis_recipe("S1", "infonce", ("B-B",)), thesis_recipe("S1", only=("PMD",))]
    return [Run(**base), *(Run(teacher="T1", recipe=recipe, **base) for recipe in recipes)]


def write_down(trace: Path) -> None:
    """Lets every optimiser step, before it is done, and every saved checkpoint leave a line, whatever happens next."""
    file = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def line(what: str, state: RunState) -> None:
        os.write(file, f"{os.getpid()}\t{what}\t{state.run.model} {state.run.label}\t{state.step}\n".encode())

    step, save = loop.training_step, RunState.save

    def training_step(state, *args):
        line("step", state)
        return step(state, *args)

    def save_and_tell(self):
        if self.checkpoint is None or self.failure is not None or not self.step:
            return
        line("saving", self)
        save(self)
        line("saved", self)

    loop.training_step, RunState.save = training_step, save_and_tell


def main(phantom: str, results: str, trace: str) -> None:
    torch.set_num_threads(1)
    write_down(Path(trace))
    if os.environ.get("KDLIB_CLOCK") == "jumps":
        hours = iter(range(10**6))
        time.time = lambda: 1.8e9 - 3600 * next(hours)
    found = study(runs(phantom), results, "cpu")
    found.save(Path(os.environ.get("KDLIB_TABLES", results)), "faults")


def in_a_process(phantom: Path, results: Path, trace: Path, output: Path, environment: dict[str, str]) -> None:
    """`main`, as a process of its own: what it prints goes to a file, and it exits as a command line would."""
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(str(phantom), str(results), str(trace))
    except (InputError, TrainingError) as error:
        print(f"error: {error}")
        sys.exit(2)
