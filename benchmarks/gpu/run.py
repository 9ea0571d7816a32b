"""All that this project wants of a borrowed GPU, in steps of under ten minutes, resumable.

    pip download ... (once, where there is internet: see wheels.txt)
    python benchmarks/gpu/run.py --wheels wheels --data btcv --output gpu-results [--minutes 45]
    python benchmarks/gpu/run.py --quick --device cpu --output trial      # the whole way in small, without a GPU

The machine needs Python 3.12 and torch 2.11, no internet and none of the other packages: they are installed from
`--wheels` into a folder of their own beside what comes out. The same command resumes where the last one stopped, was
killed or ran out of its minutes: a step that is done stays done, a training resumes from its checkpoint, and a step
that was killed twice is left out. At the end, and whenever it stops, what there is lies in one archive,
`<output>.tar.gz`:
rows and curves of the benchmarks, tables, histories, manifests and logs. Weights and pixels of the data are not in it.

This file needs nothing but Python itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("wheels.txt")
KEPT = (".json", ".md", ".png", ".csv", ".txt", ".log")  # what goes into the archive
FOLDS = range(4)
ATTEMPTS = 2  # of a step that is killed


@dataclass(frozen=True)
class Step:
    """A command and the minutes that it may take; one that `resumes` is called again where they were not enough."""

    name: str
    minutes: float
    command: tuple[str, ...]
    resumes: bool = False


def steps(options: argparse.Namespace) -> list[Step]:
    """In the order of their worth: what is left out at the end is worth least."""
    python, quick = sys.executable, ("--quick",) * options.quick
    device, output = options.device, options.output.resolve()
    made = []
    if options.wheels:
        site, wheels = str(output / "site"), str(options.wheels.resolve())
        install = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site)
        made.append(Step("install", 4, (python, *install, "--find-links", wheels, "-r", str(LIST))))
    # of the files alone that hold such tests: the others need packages that are not brought along
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    pytest = (python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files)
    made.append(Step("tests", 8, pytest))
    bench = (python, "benchmarks", "--device", device, "--output", str(output / "benchmarks"), *quick, "--only")
    for script in ("training", "gpu_rows", "contrastive", "slices", "evaluation"):
        made.append(Step(f"bench-{script}", 5, (*bench, script)))
    if options.data:
        for fold in FOLDS[:1] if options.quick else FOLDS:
            main = (python, "benchmarks/gpu/main_table.py", options.data, str(output / "results"), str(fold), device)
            made.append(Step(f"main-table-{fold}", 9, (*main, *quick), resumes=True))
    return made


class Journal:
    """What became of each step: a file that is always whole."""

    def __init__(self, folder: Path):
        self.path = folder / "steps.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.steps: dict[str, dict] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def set(self, name: str, **facts: object) -> None:
        self.steps[name] = self.steps.get(name, {}) | facts
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.steps, indent=1))
        os.replace(partial, self.path)

    def of(self, name: str) -> dict:
        return self.steps.get(name, {"status": "new"})


def call(step: Step, folder: Path, minutes: float) -> str:
    """Runs a step; returns "done", "failed", or "stopped" where its minutes were over."""
    (folder / "logs").mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), str(folder / "site"), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "KDLIB_PROGRESS": "plain", "PYTHONDONTWRITEBYTECODE": "1"}
    with (folder / "logs" / f"{step.name}.log").open("a") as log:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return "failed" if process.wait(60 * minutes) else "done"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            if process.poll() is None:
                for number, patience in ((signal.SIGTERM, 60), (signal.SIGKILL, None)):
                    os.killpg(process.pid, number)  # a training saves its checkpoint
                    try:
                        process.wait(patience)
                        break
                    except subprocess.TimeoutExpired:
                        continue


def archive(folder: Path) -> Path:
    """What came out, without weights, pixels and installed packages."""
    target, partial = folder.with_name(f"{folder.name}.tar.gz"), folder.with_name(f".{folder.name}.partial")
    with tarfile.open(partial, "w:gz") as file:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if (
                path.is_file()
                and path.suffix in KEPT
                and inside.parts[0] != "site"
                and "slices" not in inside.parts[-1]
            ):
                file.add(path, Path(folder.name) / inside)
    os.replace(partial, target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="folder of all that comes out")
    parser.add_argument("--wheels", type=Path, help="folder of the packages; none where they are installed")
    parser.add_argument("--data", default="", help="folder of btcv in Decathlon layout; without it no main table")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=45, help="of this call")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see every step run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    options.output.mkdir(parents=True, exist_ok=True)
    folder = options.output.resolve()
    journal, end = Journal(folder), time.monotonic() + 60 * options.minutes
    try:
        for step in steps(options):
            known = journal.of(step.name)
            while known["status"] not in ("done", "failed"):
                tries = known.get("tries", 0) + (known["status"] == "running")  # killed with this script
                if tries >= ATTEMPTS:
                    journal.set(step.name, status="failed", cause=f"killed {tries} times")
                    break
                left = (end - time.monotonic()) / 60
                if left < (1 if step.resumes else min(step.minutes, options.minutes) / 2):
                    print(f"{step.name}: left for the next call ({left:.0f} minutes are left)", flush=True)
                    break
                begin = time.monotonic()
                journal.set(step.name, status="running", tries=tries)
                became = call(step, folder, min(step.minutes, left))
                taken = round(known.get("seconds", 0) + time.monotonic() - begin, 1)
                if became == "stopped" and not step.resumes:
                    became = "failed"
                journal.set(step.name, status=became, seconds=taken, cause=f"see logs/{step.name}.log")
                known = journal.of(step.name)
                print(f"{step.name}: {became} after {taken:.0f} s", flush=True)
            if step.name == "install" and journal.of(step.name)["status"] != "done":
                break
    finally:
        print(f"what there is: {archive(folder)}", flush=True)
    return int(any(journal.of(step.name)["status"] != "done" for step in steps(options)))


if __name__ == "__main__":
    sys.exit(main())
