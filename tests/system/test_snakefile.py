"""The jobs of a study: their order, their parameters, what is up to date, and what becomes of failures and kills."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from kdlib.apps.cli import main
from kdlib.apps.jobs import KILLED
from kdlib.apps.study import BY_DEFAULT

PARAMETERS = """\
data: str = "phantom"
target: str = "spleen"
profile: str = "quick"
changes: dict = {}
protocol: str = "corrected"
folds: list[int] = [0]
seeds: list[int] = [0]
on_defect: str = "raise"
device: str = "auto"
results: str = "../results"
study: str = "phantom-spleen-quick"
"""
NETWORKS = 'networks: list[str] = ["T1", "T2", "S1", "S2"]\n'
TABLE = """\
import time
from pathlib import Path
start = time.monotonic()
table = Path(results, study, "tables", "{name}.csv")
table.parent.mkdir(parents=True, exist_ok=True)
table.write_text("a table")
with open(Path(results, "log.txt"), "a") as log:
    print("{name}", *folds, *seeds, study, sep="|", file=log)
"""


def write(folder: Path, name: str, *cells: str) -> Path:
    """A notebook with the parameters of an experiment; by default it writes a table and a line into a log."""
    declared = PARAMETERS + (NETWORKS if name == "01_baseline" else "")
    first = v4.new_code_cell(declared, metadata={"tags": ["parameters"]})
    cells = [v4.new_code_cell(cell) for cell in cells or [TABLE.replace("{name}", name)]]
    folder.mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=[first, *cells]), folder / f"{name}.ipynb")
    return folder


@pytest.fixture
def notebooks(tmp_path) -> Path:
    for name in BY_DEFAULT:
        write(tmp_path / "notebooks", name)
    write(tmp_path / "notebooks", "report", "print(study)")
    return tmp_path / "notebooks"


def study(notebooks: Path, results: Path, *words: str) -> list[str]:
    given = ["--results", str(results), "--study", "s", "--notebooks", str(notebooks), "--device", "cpu"]
    return ["study", *given, "--cores", "2", *words]


def jobs(printed: str) -> list[str]:
    """The jobs that the terminal told of, in the order of their ends."""
    return re.findall(r"^== (\S+) took", printed, re.MULTILINE)


# -------------------------------------------------------------------------------------------------------------- order


def planned(capfd, notebooks: Path, *words: str) -> str:
    """What Snakemake says that it would run on 16 cores."""
    dry = ["--cores", "16", "--snakemake-args=--dry-run --quiet host"]
    assert main([*study(notebooks, notebooks.parent / "results", *words), *dry]) == 0
    return "".join(capfd.readouterr())


def graph(text: str) -> set[tuple[str, str]]:
    """Pairs of (job, job that waits for it)."""
    name = re.compile(r"jobs/([^\s/]+)/done\.json")
    found = re.findall(r"^    input: (.*)\n    output: (.*)$", text, re.MULTILINE)
    return {(one, name.findall(output)[0]) for inputs, output in found for one in name.findall(inputs)}


def shares(text: str) -> set[tuple[str, str]]:
    """Threads and GPUs of the jobs that train."""
    training = re.findall(r"^rule (?:teacher|fold_and_seed):\n(?:    .*\n)+", text, re.MULTILINE)
    return {(*re.findall(r"    threads: (\d+)\n", job), *re.findall(r"gpu=(\d)", job)) for job in training}


def test_teachers_come_before_students_and_runs_before_reports_and_jobs_share_the_cores(capfd, notebooks):
    only = ["--only", "00_data", "02_distillation", "03_ablation", "06_figures"]
    text = planned(capfd, notebooks, "--folds", "0 1", "--seeds", "0 7", *only)
    found = graph(text)
    for fold in (0, 1):
        for seed in (0, 7):
            assert (f"teacher-T1-fold{fold}", f"02_distillation-fold{fold}-seed{seed}") in found
            assert (f"teacher-T2-fold{fold}", f"02_distillation-fold{fold}-seed{seed}") in found
            assert (f"teacher-T1-fold{fold}", f"03_ablation-fold{fold}-seed{seed}") in found
            assert (f"teacher-T2-fold{fold}", f"03_ablation-fold{fold}-seed{seed}") not in found
            assert (f"03_ablation-fold{fold}-seed{seed}", "03_ablation") in found
        assert ("00_data", f"teacher-T1-fold{fold}") in found
    assert ("teacher-T1-fold0", "03_ablation-fold1-seed0") not in found
    assert {("02_distillation", "06_figures"), ("03_ablation", "06_figures"), ("06_figures", "report")} <= found
    assert shares(text) == {("2", "0")}, "16 cores for two experiments of two folds and two seeds"


def test_with_one_fold_and_seed_the_aggregate_notebook_is_the_job_and_jobs_queue_for_the_gpu(capfd, notebooks):
    one = ["--folds", "1", "--seeds", "3", "--only", "03_ablation", "--device", "cuda"]
    text = planned(capfd, notebooks, *one)
    assert graph(text) == {("teacher-T1-fold1", "03_ablation"), ("03_ablation", "report")}
    assert shares(text) == {("16", "1")}


def test_teachers_are_those_of_the_profile(capfd, notebooks):
    text = planned(capfd, notebooks, "--folds", "0 1", "--only", "02_distillation", "--profile", "hippocampus3d")
    assert "teacher-T1-fold1" in text and "teacher-T2" not in text


# ------------------------------------------------------------------------------------------------ what is run and when


def test_hostile_names_reach_every_job_as_plain_text(tmp_path, notebooks, capfd):
    results = tmp_path / 'it\'s {b} $HOME "q"; touch `touch one` $(touch two) é'
    assert main(study(notebooks, results, "--folds", "0 1", "--only", "03_ablation")) == 0
    printed = capfd.readouterr().out
    assert sorted((results / "log.txt").read_text().splitlines()) == [
        "01_baseline|0|0|s/jobs/teacher-T1-fold0", "01_baseline|1|0|s/jobs/teacher-T1-fold1",
        "03_ablation|0|0|s/jobs/03_ablation-fold0-seed0", "03_ablation|0|1|0|s",
        "03_ablation|1|0|s/jobs/03_ablation-fold1-seed0",
    ]  # fmt: skip
    assert jobs(printed)[-2:] == ["03_ablation", "report"] and len(jobs(printed)) == 6
    assert printed.endswith(f"s: 1 notebooks, 1 tables\nreport: {results}/s/report.html\n")
    assert [path for path in tmp_path.rglob("*") if path.name in ("one", "two", "touch")] == []


KILLED_ONCE = """\
import os, signal
try:
    open(results + "/once", "x")
except FileExistsError:
    pass
else:
    os.kill(os.getppid(), signal.SIGKILL)
"""
FAIL = "from kdlib import TrainingError\nif len(networks) > 1:\n    raise TrainingError('loss became nan\\nat step 3')"


def test_failures_hold_up_nothing_else_and_the_same_command_does_what_is_missing_or_has_changed(
    tmp_path, notebooks, capfd, monkeypatch
):
    results = tmp_path / "my results"
    # 03 stands for all that wait for T1 alone
    chapters = tuple(name for name in BY_DEFAULT if name not in ("02b_controls", "02c_external"))
    monkeypatch.setattr("kdlib.apps.study.BY_DEFAULT", chapters)
    write(notebooks, "00_data", KILLED_ONCE, TABLE.replace("{name}", "00_data"))
    write(notebooks, "01_baseline", FAIL)
    write(notebooks, "02_distillation", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)")
    write(notebooks, "04_loss_comparison", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")  # the kernel
    command = study(notebooks, results)
    assert main(command) == 1
    printed, errors = capfd.readouterr()
    first = {"00_data", "00_by_hand", "teacher-T1-fold0", "teacher-T2-fold0", "03_ablation"}
    assert set(jobs(printed)) == first | {"06_figures", "report"}, "a retry, and figures and report of what there is"
    failed = [line for line in errors.splitlines() if line.startswith("failed")]
    assert failed[:2] == ["failed: 01_baseline: loss became nan", f"failed: 02_distillation: {KILLED}"]
    assert len(failed) == 3 and failed[2].startswith("failed: 04_loss_comparison: ") and "died" in failed[2]
    assert f"--results '{results}'" in errors, "can be pasted into a shell"

    def done(*words: str) -> list[str]:
        assert main([*command, *words]) == 0
        return jobs(capfd.readouterr().out)

    repaired = {"01_baseline", "02_distillation", "04_loss_comparison"}
    for name in repaired:
        write(notebooks, name)
    assert set(done()) == repaired | {"06_figures", "report"}, "no teachers, and neither 00 nor 03"
    (results / "s/tables/03_ablation.csv").unlink()
    assert done() == ["03_ablation", "06_figures", "report"]
    write(notebooks, "06_figures", "print('changed')")
    assert done() == ["06_figures", "report"]
    assert done("--only", "00_data") == ["00_data", "report"], "what is asked for by name is run again"
    assert done() == [], "a new look at the same data trains and draws nothing again"
    write(notebooks, "00_data", "print('changed')", TABLE.replace("{name}", "00_data"))
    write(notebooks, "03_ablation", "print('changed')", TABLE.replace("{name}", "03_ablation"))
    both = {"00_data", "03_ablation", "06_figures", "report"}
    assert set(done()) == both, "what has changed is run again though the data that it waits for are looked at again"
    assert done() == []


def test_a_path_that_snakemake_would_break_on_a_cluster_is_refused(tmp_path, notebooks, capfd):
    assert main(study(notebooks, tmp_path / "it's", "--executor", "slurm")) == 2
    assert capfd.readouterr().err.startswith(f"error: {tmp_path}/it's/s: Snakemake quotes paths by '")


# -------------------------------------------------------------------------------------------------- stopped and killed

RESUME = "finished trainings are kept, the same command resumes from them\n"
SLOW = """\
import os, time
print("kernel", os.getpid())
time.sleep(0 if os.path.exists(results + "/go") else 5)
"""


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_was_stopped_or_killed_resumes(tmp_path, notebooks, capfd, kill):
    results = tmp_path / "results"
    command = study(notebooks, results, "--only", "03_ablation")
    write(notebooks, "01_baseline", SLOW)
    call = [sys.executable, "-m", "kdlib", *command]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        kernel = next(int(line.split()[-1]) for line in process.stdout if "kernel" in line)
        (results / "go").touch()
        process.send_signal(kill)
        if kill == signal.SIGTERM:
            assert process.communicate(timeout=300)[1] == "stopped: " + RESUME
            assert process.returncode == 128 + kill
            wait_until(lambda: not Path(f"/proc/{kernel}").exists())
        process.wait(300)
        assert main(command) == 0
    printed = capfd.readouterr().out
    if kill == signal.SIGTERM:
        assert jobs(printed) == ["teacher-T1-fold0", "03_ablation", "report"]
    else:
        assert "another process is working on" in printed, "Snakemake outlives its parent, and is waited for"
        assert jobs(printed) == ["03_ablation", "report"]


def wait_until(true) -> None:
    end = time.monotonic() + 300
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
