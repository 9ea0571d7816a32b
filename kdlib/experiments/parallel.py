"""Several processes for one training, each on its GPU: torchrun and DDP.

    python -m kdlib.experiments.parallel runs.json --processes 4 --results results
    torchrun --standalone --nproc-per-node 4 -m kdlib.experiments.parallel runs.json --results results

trains the runs that `runs.json` describes (as `kdlib.config.to_json` does), their teachers first, into the usual run
folders: `kdlib.study` then finds them done. Both commands do the same; the first says in one line what went wrong.
From a notebook, `kdlib.experiments.parallel.launch(runs, results, processes=4)`; or set `KDLIB_PROCESSES=4`, with
which every `kdlib.study` trains that way. How many processes trained a run stands in its manifest, and not in its key:
they give the weights of one process but for the rounding of sums (1e-8 after 20 steps in double precision; in single
precision as far apart as one process and itself from initial weights that are off by one rounding). A network that a
notebook adds to `MODELS` is not known to the processes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kdlib.config import InputError, Run, TrainingError, from_json, to_json
from kdlib.experiments.runner import check, study
from kdlib.experiments.source import run_source
from kdlib.experiments.store import is_done
from kdlib.training import ranks
from kdlib.training.checkpoint import InterruptHandler
from kdlib.training.device import pick_device


def _load(path: Path) -> list[Run]:
    try:
        records = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); give a run or a list of runs") from None
    records = records if isinstance(records, list) else [records]
    if not records or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path}: give a run (an object with data, target, model ...) or a list of them")
    return [from_json(record) for record in records]


# ---------------------------------------------------------------------------------------------------- the two sides


def launch(runs: Iterable[Run], results: Path | str = "results", processes: int = 2, device: str = "auto") -> None:
    """Trains runs, and their teachers, on several processes; returns when their run folders are there.

    What they say is printed as it comes. An interrupt, or SIGTERM, ends them all with a checkpoint.

    Args:
        processes: of one machine, each on a GPU of its own, or all on the CPU.
        device: "auto", "cuda" or "cpu".

    Raises:
        InputError: too few GPUs, a batch that cannot be divided, or whatever `kdlib.study` refuses.
        TrainingError: some runs failed, or a process died; what was finished before is kept.
    """
    runs = list(dict.fromkeys(runs))
    _check(runs, processes, device)
    runs = [run for run in runs if not is_done(run, Path(results).resolve())]
    if not runs:
        return
    with InterruptHandler(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.json"
        path.write_text(json.dumps([to_json(run) for run in runs]))
        options = ["--results", str(results), "--processes", str(processes), "--device", device]
        child = subprocess.Popen(
            [sys.executable, "-u", "-m", "kdlib.experiments.parallel", str(path), *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"KDLIB_PROGRESS": "plain"},
        )  # fmt: skip
        said = ""
        try:
            for line in child.stdout:
                if line.startswith("error: "):
                    said = line.removeprefix("error: ").strip()
                else:
                    print(line, end="", flush=True)
        except BaseException:
            child.terminate()
            raise
        finally:
            code = child.wait()
    if code:
        kind = InputError if code == 2 else TrainingError
        raise kind(said or f"training on {processes} processes ended with exit status {code}")


def _check(runs: list[Run], processes: int, device: str) -> None:
    """Raises InputError for what can be known before any process is started."""
    teachers = [teacher for run in runs for teacher in run.teacher_runs().values()]
    check(teachers + runs)
    if processes < 1:
        raise InputError(f"{processes} processes: give at least 1")
    if pick_device(device).type == "cuda" and processes > (count := torch.cuda.device_count()):
        raise InputError(f"{processes} processes need a GPU each, and this machine has {count}: take {count}")
    for run in teachers + runs:
        ranks.check_batch(run.optimisation.batch, processes)


def _start(arguments: list[str], processes: int) -> int:
    """Starts the ranks and waits for them; of their errors the first is told. Returns the exit status."""
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP finds it worth a warning that every parameter is used
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0,
        run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "kdlib.experiments.parallel", *arguments)
    except ChildFailedError as error:
        kind, text = _cause(error.failures, processes)
        print(f"error: {text}", file=sys.stderr)
        return 2 if kind == "InputError" else 1
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def _cause(failures: Mapping[int, ProcessFailure], processes: int) -> tuple[str, str]:
    """Kind and text of the failure that others followed from: a death without a word first, broken links last."""
    found = []
    for rank, failure in failures.items():
        kind, text, order = "", f"was killed by {failure.signal_name()}", 0
        if isinstance(failure.message, dict):
            kind, _, text = failure.message["message"].partition(": ")
            order = 1 if kind in ("InputError", "TrainingError") else 2
        elif failure.exitcode > 0:
            text = f"ended with exit status {failure.exitcode}"
        found.append((order, failure.timestamp, rank, kind, text))
    order, _, rank, kind, text = min(found)
    if order == 1:
        return kind, text
    if order == 2:
        print(failures[rank].message["extraInfo"]["py_callstack"], file=sys.stderr)
        text = f"failed with {kind} ({text})"
    return kind, f"process {rank} of {processes} {text}, and the others were ended; finished runs are kept"


def _work(runs: list[Run], results: Path, device: str) -> None:
    """What each rank does."""
    with ranks.joined(device) as place:
        _check(runs, ranks.size(), device)
        with ranks.one_after_another():  # the first may make splits, or the phantom
            for run in runs:
                run_source(run, results)
        study(runs, results, str(place))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m kdlib.experiments.parallel", description="Several processes for one training."
    )
    parser.add_argument("runs", type=Path, help="JSON file: a run, or a list of runs")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of results")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--processes", type=int, default=2, help="how many; under torchrun, torchrun says")
    given = parser.parse_args(arguments)
    try:
        runs = _load(given.runs)
        if dist.is_torchelastic_launched():
            _work(runs, given.results, given.device)
            return 0
        _check(runs, given.processes, given.device)
    except KeyboardInterrupt:  # its state is kept
        return 130
    except Exception as error:
        if dist.is_torchelastic_launched():
            get_error_handler().record_exception(error)  # whoever started the ranks tells it once
            return 1
        if not isinstance(error, InputError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    options = ["--results", str(given.results), "--device", given.device]
    return _start([str(given.runs), *options], given.processes)


if __name__ == "__main__":
    sys.exit(main())
