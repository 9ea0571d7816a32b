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

import kdlib.apps.notebooks
from kdlib.apps.engine import KILLED, Place, run_jobs
from kdlib.apps.notebooks import main, plan_study, study_parameters

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
    for name in ("00_data", "01_baseline", "02_distillation", "03_ablation", "04_loss_comparison", "06_figures"):
        write(tmp_path / "notebooks", name)
    return tmp_path / "notebooks"


def study(notebooks: Path, results: Path, *words: str) -> list[str]:
    given = ["--results", str(results), "--study", "s", "--notebooks", str(notebooks), "--device", "cpu"]
    return ["study", *given, "--cores", "2", *words]


def jobs(printed: str) -> list[str]:
    """The jobs that the terminal told of, in the order of their ends."""
    return re.findall(r"^== (\S+) took", printed, re.MULTILINE)


# -------------------------------------------------------------------------------------------------------------- order


def told(capsys, notebooks: Path, folds: list[int], seeds: list[int], only: list[str], device: str = "cpu") -> str:
    """What Snakemake says that it would run on eight cores."""
    results = str(notebooks.parent / "results")
    shared = study_parameters("phantom", "spleen", "quick", "corrected", folds, seeds, device, results, "s")
    dry = Place(cores=8, options=("--dry-run",))
    assert run_jobs(only, plan_study(shared, [*only, "01_baseline"], notebooks), shared, notebooks, dry) == []
    return capsys.readouterr().out + Path(results, "s", "jobs", "snakemake.log").read_text()


def graph(text: str) -> set[tuple[str, str]]:
    """Pairs of (job, job that waits for it)."""
    name = re.compile(r"(?:jobs/)?(\w[^\s/]*?)(?:/done\.json|\.html)")
    found = re.findall(r"^    input: (.*)\n    output: (.*)$", text, re.MULTILINE)
    return {(one, name.findall(output)[0]) for inputs, output in found for one in name.findall(inputs)}


def test_teachers_come_before_students_and_runs_before_reports(capsys, notebooks):
    experiments = ["00_data", "02_distillation", "03_ablation", "06_figures"]
    found = graph(told(capsys, notebooks, [0, 2], [0, 7], experiments))
    for fold in (0, 2):
        for seed in (0, 7):
            assert (f"teacher-T1-fold{fold}", f"02_distillation-fold{fold}-seed{seed}") in found
            assert (f"teacher-T2-fold{fold}", f"02_distillation-fold{fold}-seed{seed}") in found
            assert (f"teacher-T1-fold{fold}", f"03_ablation-fold{fold}-seed{seed}") in found
            assert (f"teacher-T2-fold{fold}", f"03_ablation-fold{fold}-seed{seed}") not in found
            assert (f"03_ablation-fold{fold}-seed{seed}", "03_ablation") in found
        assert ("00_data", f"teacher-T1-fold{fold}") in found
    assert ("teacher-T1-fold0", "03_ablation-fold2-seed0") not in found
    assert {("02_distillation", "06_figures"), ("03_ablation", "06_figures"), ("06_figures", "report")} <= found


def test_with_one_fold_and_seed_the_wide_notebook_is_the_job(capsys, notebooks):
    assert graph(told(capsys, notebooks, [1], [3], ["03_ablation"])) == {
        ("teacher-T1-fold1", "03_ablation"), ("03_ablation", "report"),
    }  # fmt: skip


@pytest.mark.parametrize("device, threads, gpu", [("cpu", 4, 0), ("cuda", 8, 1)])
def test_jobs_share_the_cores_and_queue_for_the_gpu(capsys, notebooks, device, threads, gpu):
    text = told(capsys, notebooks, [0, 1], [0], ["03_ablation"], device)
    training = re.findall(r"^rule (?:teacher|place):\n(?:    .*\n)+", text, re.MULTILINE)
    assert len(training) == 4
    assert all(f"    threads: {threads}\n" in block and f"gpu={gpu}" in block for block in training)
    assert "--resources gpu=1" in text, "all of them together have one"


# ------------------------------------------------------------------------------------------------ what is run and when


def test_hostile_names_reach_every_job_as_plain_text(tmp_path, notebooks, capsys):
    results = tmp_path / 'it\'s {b} $HOME "q"; touch `touch one` $(touch two) é'
    assert main(study(notebooks, results, "--folds", "0 1", "--only", "03_ablation")) == 0
    printed = capsys.readouterr().out
    assert sorted((results / "log.txt").read_text().splitlines()) == [
        "01_baseline|0|0|s/jobs/teacher-T1-fold0", "01_baseline|1|0|s/jobs/teacher-T1-fold1",
        "03_ablation|0|0|s/jobs/03_ablation-fold0-seed0", "03_ablation|0|1|0|s",
        "03_ablation|1|0|s/jobs/03_ablation-fold1-seed0",
    ]  # fmt: skip
    assert jobs(printed)[-1] == "03_ablation" and len(jobs(printed)) == 5
    assert printed.endswith("s:\n    notebooks/03_ablation.ipynb\n    tables/03_ablation.csv\n    report.html\n")
    assert [path for path in tmp_path.rglob("*") if path.name in ("one", "two", "touch")] == []


def test_a_study_does_again_what_has_changed_and_nothing_else(tmp_path, notebooks, capsys, monkeypatch):
    monkeypatch.setattr(kdlib.apps.notebooks, "EXPERIMENTS", ("00_data", "03_ablation", "06_figures"))
    command = study(notebooks, tmp_path / "results")

    def done() -> list[str]:
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert printed.count(" took ") == len(jobs(printed)), printed
        return jobs(printed)

    assert done() == ["00_data", "teacher-T1-fold0", "03_ablation", "06_figures"]
    assert done() == []
    (tmp_path / "results/s/tables/03_ablation.csv").unlink()
    assert done() == ["03_ablation", "06_figures"]
    write(notebooks, "06_figures", "print('changed')")
    assert done() == ["06_figures"]
    command += ["--only", "03_ablation"]
    assert done() == ["03_ablation"], "what is asked for by name is run again"


FAIL = "from kdlib import TrainingError\nif len(networks) > 1:\n    raise TrainingError('loss became nan\\nat step 3')"


def test_failures_hold_up_nothing_else_and_are_told_with_cause_and_remedy(tmp_path, notebooks, capsys):
    results = tmp_path / "my results"
    write(notebooks, "01_baseline", FAIL)
    write(notebooks, "02_distillation", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)")
    write(notebooks, "04_loss_comparison", "1 / 0")
    command = study(notebooks, results)
    assert main(command) == 1
    printed, errors = capsys.readouterr()
    assert set(jobs(printed)) == {"00_data", "teacher-T1-fold0", "teacher-T2-fold0", "03_ablation", "06_figures"}
    assert [line for line in errors.splitlines() if line.startswith("failed")] == [
        "failed: 01_baseline: loss became nan",
        f"failed: 02_distillation: {KILLED}",
        "failed: 04_loss_comparison: 04_loss_comparison.ipynb stopped in cell [3]: ZeroDivisionError",
    ]
    assert f"--results '{results}'" in errors, "can be pasted into a shell"
    made = [line.strip() for line in printed.partition("made in ")[2].splitlines()[1:]]
    assert made[:3] == ["notebooks/00_data.ipynb", "notebooks/03_ablation.ipynb", "notebooks/06_figures.ipynb"]
    write(notebooks, "04_loss_comparison")
    assert main([*command, "--only", "04_loss_comparison"]) == 0
    assert jobs(capsys.readouterr().out) == ["04_loss_comparison"]


def test_a_path_that_snakemake_would_break_on_a_cluster_is_refused(tmp_path, notebooks, capsys):
    assert main(study(notebooks, tmp_path / "it's", "--executor", "slurm")) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/it's/s: Snakemake quotes paths by '")


def test_input_that_a_notebook_refuses_is_one_line_and_stops_what_needs_it(tmp_path, notebooks, capsys):
    write(notebooks, "00_data", "from kdlib import InputError\nraise InputError('no such label')")
    assert main(study(notebooks, tmp_path / "r", "--only", "00_data", "01_baseline")) == 2
    printed, errors = capsys.readouterr()
    assert errors == "error: no such label\n" and "01_baseline" not in printed


# -------------------------------------------------------------------------------------------------- stopped and killed

SLOW = """\
import os, time
print("kernel", os.getpid())
time.sleep(0 if os.path.exists(results + "/go") else 5)
"""


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_was_stopped_or_killed_goes_on(tmp_path, notebooks, capsys, kill):
    results = tmp_path / "results"
    command = study(notebooks, results, "--only", "03_ablation")
    write(notebooks, "01_baseline", SLOW)
    call = [sys.executable, "-m", "kdlib.apps.notebooks", *command]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        kernel = next(int(line.split()[-1]) for line in process.stdout if "kernel" in line)
        (results / "go").touch()
        process.send_signal(kill)
        errors = process.communicate(timeout=30)[1]
    if kill != signal.SIGKILL:
        assert errors == "stopped: finished trainings are kept, the same command goes on from them\n"
        assert process.returncode == 128 + kill
        wait_until(lambda: not Path(f"/proc/{kernel}").exists())
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert jobs(printed) == ["teacher-T1-fold0", "03_ablation"]
    assert ("by another process: waiting for it" in printed) == (kill == signal.SIGKILL)


def wait_until(true) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
