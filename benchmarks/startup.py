"""How long a reader waits before anything is computed: imports, a dry run, a finished chapter.

    python benchmarks/startup.py [--quick]

Each in a fresh interpreter, in turns, from a warm disk cache. `chapter` are the imports of a notebook and the setting
of its study; the finished chapter is `01_baseline` of a phantom study whose runs are done (S1 and S2, a few steps
each),
run by papermill as `make study` does. The dry run is that of a study of which nothing is trained.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measure import Record, run_alone, within

ROOT = Path(__file__).resolve().parents[1]
NAMES = "import kdlib; from kdlib import experiments; from kdlib.analysis import figures, statistics; kdlib.study"
TINY = '{"width": 0.125, "teacher_epochs": 1, "teacher_steps": 4, "student_epochs": 5, "student_steps": 2}'


def call(words: Sequence[object], folder: Path) -> float:
    """Seconds of a command.

    Raises: RuntimeError: it failed.
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=env,
    )
    taken = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return taken


def measure(record: Record) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "empty").mkdir()
        chapter = ["-m", "kdlib", "run", ROOT / "notebooks" / "01_baseline.ipynb", "-o", folder / "chapter.ipynb"]
        given = dict(results=folder / "results", changes=TINY, networks='["S1", "S2"]', study="tiny", device="cpu")
        for name, value in given.items():
            chapter += ["-p", name, value]
        dry = ["-m", "kdlib", "dry-run", "--device", "cpu", "--only", "01_baseline", "--results"]
        commands = {
            "python": (["-c", "pass"], None),
            "import torch": (["-c", "import torch"], None),
            "import monai": (["-c", "import monai"], None),
            "import kdlib": (["-c", "import kdlib"], 3),
            "the imports of a notebook": (["-c", NAMES], 3),
            "kdlib --help": (["-m", "kdlib", "--help"], None),
            "dry run of 01_baseline, nothing trained": (dry, 10),
            "a finished chapter, 01_baseline": (chapter, 20),
        }
        record.say("training what the finished chapter shows")
        if record.quick:
            commands = {name: each for name, each in commands.items() if name.startswith(("python", "import kdlib"))}
        else:
            call(chapter, folder)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(1 if record.quick else 6):
            for name, (words, _) in commands.items():
                # the phantom is made once; where nothing is trained there is no run that could tell the time
                words = [*words, folder / "empty"] if words[-1] == "--results" else words
                taken = call(words, folder)
                if number or record.quick:  # the first round warms the disk cache
                    times[name].append(taken)
            record.say(f"round {number} of 5")
        for name, (_, most) in commands.items():
            record.add(within(f"8 {name}", statistics.median(times[name]), most))


if __name__ == "__main__":
    run_alone("startup", measure, __doc__)
