"""Several processes for one training, each on its GPU.

    python -m kdlib train runs.json --processes 4 --results results

trains the runs that `runs.json` describes (as `kdlib.config.to_json` does), their teachers first, into the usual run
folders: `kdlib.study` then finds them done. The first process is that study; where it trains a cohort, the others train
it too, each with its part of every batch. The number of processes stands in a run's manifest, and not in its key: they
give the weights of one process but for the rounding of sums. On CPUs, which is for tests, batch norm sees the part of
each process alone. A network that a notebook adds to `MODELS` is not known to the processes.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from kdlib.config import InputError, Run, TrainingError, from_json, to_json
from kdlib.experiments.runner import check, study, train_group
from kdlib.strict import FORESEEN
from kdlib.training.device import pick_device
from kdlib.training.fabric import Processes, launch
from kdlib.training.interrupt import InterruptHandler

HEAD = "Traceback (most recent call last):\n"


def train(runs: Sequence[Run], results: Path | str = "results", processes: int = 2, device: str = "auto") -> None:
    """Trains runs, and their teachers, on several processes; returns when their run folders are there.

    An interrupt, or SIGTERM, ends them all with a checkpoint. From a notebook, use the command line.

    Args:
        processes: of one machine, each on a GPU of its own, or all on the CPU.
        device: "auto", "cuda" or "cpu".

    Raises:
        InputError: too few GPUs, a batch that cannot be divided, or whatever `kdlib.study` refuses.
        TrainingError: some runs failed, or a process died; what was finished before is kept.
    """
    place, everything = pick_device(device), [*(each for run in runs for each in run.needed_runs()), *runs]
    check(everything)
    if processes < 1:
        raise InputError(f"{processes} processes: give at least 1")
    if place.type == "cuda" and processes > (count := torch.cuda.device_count()):
        raise InputError(f"{processes} processes need a GPU each, and this machine has {count}: take {count}")
    for batch in (run.optimisation.batch for run in everything):
        if batch % processes:
            fitting = ", ".join(str(n) for n in range(2, batch + 1) if batch % n == 0)
            asked = f"a batch of {batch} images cannot be divided by {processes} processes"
            raise InputError(f"{asked}: take {fitting} processes")
    if processes == 1:
        study(runs, results, device)
        return
    try:
        with InterruptHandler():
            launch(_work, processes, place, [to_json(run) for run in runs], str(Path(results).resolve()))
    except ProcessRaisedException as error:  # its text is a traceback, at whose end stands the error, of several lines
        ends = re.search(r"^(?:\w+\.)*(\w+): ((?s:.*))", str(error).rpartition(HEAD)[2].strip(), re.MULTILINE)
        if ends is None or ends[1] not in FORESEEN:
            raise
        raise FORESEEN[ends[1]](ends[2]) from None
    except ProcessExitedException as error:
        cause = f"was killed by {error.signal_name}" if error.signal_name else f"ended with status {error.exit_code}"
        found = f"process {error.error_index} of {processes} {cause}, and the others were ended"
        raise TrainingError(f"{found}; finished runs are kept") from None
    finally:
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()
        for child in children:
            child.join()


def _work(processes: Processes, runs: list[dict], results: str) -> None:
    """What each process does: the first one the study, the others the trainings that it tells them.

    Runs come as JSON, since Fabric looks into what it passes on and cannot look into a frozen dataclass.
    """
    device = processes.fabric.device
    if processes.rank == 0:
        study([from_json(run) for run in runs], results, str(device), processes)
        processes.broadcast(None)
        return
    try:
        while (job := processes.broadcast(None)) is not None:
            group, results, parts = job
            train_group(group, results, device, parts, processes)
    except RuntimeError:
        time.sleep(5)  # of a lost connection, the process that ended first tells the cause
        raise
