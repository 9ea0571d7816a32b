"""Studies that are killed, crowded or left without a disk, in processes of their own: what is finished stays, nothing
is trained twice, and the tables are those of a study that nobody disturbed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, nullcontext
from multiprocessing import forkserver
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from faulty_study import in_a_process
from nbformat import v4

from kdlib.apps.notebooks import NotebookError, execute

KILLS = int(os.environ.get("KDLIB_KILLS", 4))  # 20 in the long form
HERE = Path(__file__).resolve().parent
PATHS = os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
# new processes are forked from one that has imported kdlib: that takes longer than the whole study
FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def imported():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("KDLIB_PROGRESS", "plain")
        FORKS.set_forkserver_preload(["faulty_study"])
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def phantom(phantom_of) -> Path:
    return phantom_of(5)


def start(phantom: Path, results: Path, trace: Path, **environment: str):
    """A study in a process of its own; every step and checkpoint leaves a line in `trace`."""
    output = trace.with_name(f"{trace.name}-{uuid.uuid4().hex}.out")
    process = FORKS.Process(target=in_a_process, args=(phantom, results, trace, output, environment))
    process.start()
    process.output = output
    return process


def finish(process) -> tuple[int, str]:
    process.join(300)
    return process.exitcode, process.output.read_text() if process.output.exists() else ""


@pytest.fixture(scope="module")
def undisturbed(phantom, tmp_path_factory) -> tuple[Path, Path, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    begin = time.perf_counter()
    status, text = finish(start(phantom, folder / "results", folder / "trace"))
    assert status == 0, text
    return folder / "results", folder / "trace", time.perf_counter() - begin


def wait_for(trace: Path, lines: int, process) -> None:
    """Until the study has left so many lines, or has ended."""
    while len(events(trace)) < lines and process.is_alive():
        time.sleep(0.003)


def events(trace: Path) -> list[tuple[str, str, int]]:
    """(process, what, run, step) in the order in which they happened."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    return [(*line.split("\t")[:3], int(line.split("\t")[3])) for line in lines]


def same_tables(results: Path, expected: Path) -> None:
    assert sorted(path.name for path in (results / "runs").iterdir()) == sorted(
        path.name for path in (expected / "runs").iterdir()
    )
    for folder in (expected / "runs").iterdir():
        mine = results / "runs" / folder.name
        for name in ("metrics.csv", "history.csv", "best.safetensors", "last.safetensors"):
            assert (mine / name).read_bytes() == (folder / name).read_bytes(), f"{folder.name}/{name}"
        assert {path.name for path in mine.iterdir()} == {path.name for path in folder.iterdir()}, "nothing half done"
        assert json.loads((mine / "manifest.json").read_text())["status"] == "done"
    for name in ("cases", "history"):
        left, right = (pd.read_csv(path / "tables" / f"faults_{name}.csv") for path in (results, expected))
        pd.testing.assert_frame_equal(left, right)


def nothing_twice(trace: Path, expected: Path) -> int:
    """Checks that every process went on from the last checkpoint; returns the steps that were done again."""
    saved, saving, done, again = {}, {}, {}, 0
    for process, what, run, step in events(trace):
        if what == "saved":
            saved[run] = step
        if what == "saving":
            saving[run] = step
        if what != "step":
            continue
        if (run, process) not in done:  # this process's first step of the run
            last = {saved.get(run, 0), saving.get(run, 0)}  # killed while it was saved: one or the other
            assert step in last, f"{run} went on at step {step}, its checkpoint was of {last}"
        done.setdefault((run, process), []).append(step)
    steps = {}
    for (run, _), numbers in done.items():
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        again += len(set(numbers) & steps.setdefault(run, set()))
        steps[run] |= set(numbers)
    whole = {(run, step) for _, what, run, step in events(expected) if what == "step"}
    assert {(run, step) for run, numbers in steps.items() for step in numbers} == whole
    return again


@pytest.mark.slow
def test_a_study_that_is_killed_at_random_moments_ends_as_if_it_never_was(phantom, undisturbed, tmp_path):
    """A study that is finished before it was killed often enough is followed by another one."""
    expected, steps, seconds = undisturbed
    chance, killed, again, rounds = random.Random(4), 0, 0, 0
    while killed < KILLS:
        rounds += 1
        results, trace, status = tmp_path / f"results{rounds}", tmp_path / f"trace{rounds}", None
        while status != 0:
            process = start(phantom, results, trace)
            if killed < KILLS:
                # a process needs a while until its first step: most kills come some steps after that, the others ever
                if chance.random() < 0.75:
                    wait_for(trace, len(events(trace)) + chance.randint(1, 25), process)
                    time.sleep(chance.random() * 0.05)
                else:
                    time.sleep(chance.random() * seconds / 2)
                process.kill()
            status, text = finish(process)
            assert status in (-signal.SIGKILL, 0), text
            killed += status != 0
        again += nothing_twice(trace, steps)
        same_tables(results, expected)
    print(f"{killed} kills survived in {rounds} studies, {again} steps were done again")


@pytest.mark.slow
def test_sigterm_ends_a_study_within_a_step_and_nothing_is_lost(phantom, undisturbed, tmp_path):
    """While the clock jumps: the time of day goes back by an hour at every look."""
    results, trace = tmp_path / "results", tmp_path / "trace"
    expected, steps, _ = undisturbed
    process = start(phantom, results, trace, KDLIB_CLOCK="jumps")
    wait_for(trace, 16, process)
    process.terminate()
    status, text = finish(process)
    assert status == 143, text
    assert "stopped, its state is kept" in text and "Traceback" not in text
    assert finish(start(phantom, results, trace, KDLIB_CLOCK="jumps"))[0] == 0
    assert nothing_twice(trace, steps) == 0
    same_tables(results, expected)
    for path in (results / "runs").glob("*/manifest.json"):
        seconds = json.loads(path.read_text())["seconds"]
        assert 0 < seconds["training"] < 300 and 0 <= seconds["evaluation"] < 300


@pytest.mark.slow
def test_two_studies_at_once_on_the_same_folder_train_each_run_once(phantom, undisturbed, tmp_path):
    """Both begin with nothing, not even the splits."""
    results, trace = tmp_path / "results", tmp_path / "trace"
    expected, steps, _ = undisturbed
    both = [start(phantom, results, trace) for _ in range(2)]
    ends = [finish(process) for process in both]
    assert [status for status, _ in ends] == [0, 0], ends
    seen = [(run, step) for _, what, run, step in events(trace) if what == "step"]
    assert len(seen) == len(set(seen)), "no step was done twice"
    assert "another process is training it, waiting" in ends[0][1] + ends[1][1]
    assert len({process for process, *_ in events(trace)}) == 2, "both had something to do"
    same_tables(results, expected)


@pytest.mark.slow
def test_one_of_two_studies_dies_and_the_other_takes_over(phantom, undisturbed, tmp_path):
    results, trace = tmp_path / "results", tmp_path / "trace"
    expected, steps, _ = undisturbed
    first = start(phantom, results, trace)
    wait_for(trace, 3, first)
    second = start(phantom, results, trace)
    time.sleep(1)
    first.kill()
    finish(first)
    status, text = finish(second)
    assert status == 0, text
    nothing_twice(trace, steps)
    same_tables(results, expected)


@pytest.mark.slow
def test_truncated_checkpoints_are_named_and_cost_their_own_training_alone(phantom, undisturbed, tmp_path):
    results, trace, rest = tmp_path / "results", tmp_path / "trace", tmp_path / "rest"
    process = start(phantom, results, trace)
    wait_for(trace, 44, process)  # within the second epoch of the cohort
    process.kill()
    finish(process)
    cut = list((results / "runs").glob("*/checkpoint.safetensors"))
    for path in cut:
        path.write_bytes(path.read_bytes()[:-7])
    status, text = finish(start(phantom, results, rest))
    assert status == 0, text
    assert cut and sum("is damaged" in line for line in text.splitlines()) == len(cut)
    assert min(step for _, what, _, step in events(rest) if what == "step") == 0
    same_tables(results, undisturbed[0])


# ----------------------------------------------------------------------------------------------------------- the disk


@contextmanager
def mounted(folder: Path, options: str):
    """A small file system of its own; the test is skipped where mounting is not allowed."""
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_study_is_one_line_and_goes_on_when_there_is_room(phantom, undisturbed, tmp_path):
    disk, trace = tmp_path / "disk", tmp_path / "trace"
    expected, steps, _ = undisturbed
    with mounted(disk, "size=3m"):
        status, text = finish(start(phantom, disk / "results", trace))
        assert status == 2, text
        assert text.splitlines()[-1].startswith("error: ") and "the disk is full" in text.splitlines()[-1]
        assert "Traceback" not in text
        names = {path.name for folder in (disk / "results" / "runs").iterdir() for path in folder.iterdir()}
        assert not any(name.startswith(".") for name in names - {".lock"}), "no half files"
        subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        status, text = finish(start(phantom, disk / "results", trace))
        assert status == 0, text
        nothing_twice(trace, steps)
        same_tables(disk / "results", expected)


@pytest.mark.slow
def test_a_read_only_results_folder_is_one_line_and_a_finished_study_can_be_read_there(phantom, undisturbed, tmp_path):
    disk, trace = tmp_path / "disk", tmp_path / "trace"
    with mounted(disk, "size=60m"):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for part in (None, "splits"):  # with nothing there, and where the first training begins
            if part:
                subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
                shutil.copytree(undisturbed[0] / part, disk / "results" / part)
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            status, text = finish(start(phantom, disk / "results", trace))
            assert status == 2 and "Traceback" not in text
            assert text.startswith("error: ") and "could not be saved" in text and "Read-only file system" in text
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        shutil.copytree(undisturbed[0], disk / "results", dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        status, text = finish(start(phantom, disk / "results", trace, KDLIB_TABLES=str(tmp_path / "tables")))
        assert status == 0 and not events(trace), text


# ---------------------------------------------------------------------------------------------------- through papermill


def write_notebook(path: Path, parameters: str, source: str) -> Path:
    first = v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=[first, v4.new_code_cell(source)]), path)
    return path


@pytest.mark.slow
def test_sigterm_to_the_wrapper_reaches_the_kernel_and_nothing_is_lost(phantom, undisturbed, tmp_path):
    results, trace, output = tmp_path / "results", tmp_path / "trace", tmp_path / "out" / "job.ipynb"
    work = "from faulty_study import main\nmain(phantom, results, trace)"
    job = write_notebook(tmp_path / "job.ipynb", "phantom: str = None\nresults: str = None\ntrace: str = None", work)
    command = [sys.executable, "-m", "kdlib", "run", str(job), "-o", str(output)]
    for name, value in {"phantom": phantom, "results": results, "trace": trace}.items():
        command += ["-p", name, str(value)]
    environment = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    with subprocess.Popen(command, **pipes) as process:
        while len(events(trace)) < 16 and process.poll() is None:
            time.sleep(0.005)
        process.terminate()
        text, errors = process.communicate(timeout=300)
    assert process.returncode == 143 and "its state is kept" in text
    assert errors == "stopped: finished trainings are kept, the same command resumes from them\n"
    assert [path.name for path in output.parent.iterdir()] == ["job.failed.ipynb"]
    records = [json.loads(path.read_text()) for path in (results / "runs").glob("*/manifest.json")]
    assert {record["notebook"] for record in records} == {"../out/job.ipynb"}
    assert finish(start(phantom, results, trace))[0] == 0
    assert nothing_twice(trace, undisturbed[1]) == 0
    for notebook in (results / "runs").glob("*/notebook.ipynb"):
        assert notebook.read_bytes() == (output.parent / "job.failed.ipynb").read_bytes()
        notebook.unlink()  # all else is as without a notebook
    same_tables(results, undisturbed[0])


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_an_executed_notebook_lies_with_the_runs_that_it_trained(tmp_path, ends):
    folder, output = tmp_path / "runs" / "key", tmp_path / "out" / "job.ipynb"
    folder.mkdir(parents=True)
    work = f"""import os
with open(os.environ["KDLIB_TRAINED"], "a") as file:
    print({str(folder)!r}, file=file)
print(os.environ["KDLIB_NOTEBOOK"])
print(os.environ["KDLIB_RERUN"])
assert {ends == "well"}"""
    job = write_notebook(tmp_path / "job.ipynb", "folds: list[int] = [0]", work)
    with nullcontext() if ends == "well" else pytest.raises(NotebookError):
        execute(job, output, {"folds": [0, 1]})
    made = output if ends == "well" else output.with_name("job.failed.ipynb")
    assert (folder / "notebook.ipynb").read_bytes() == made.read_bytes()
    assert [path.name for path in folder.iterdir()] == ["notebook.ipynb"]
    assert [path.name for path in output.parent.iterdir()] == [made.name]
    where, again = nbformat.read(made, 4).cells[-1].outputs[0].text.splitlines()
    assert where == str(output)
    assert again.endswith(f"-m kdlib run {job} -o {output} -p folds '[0, 1]'")
