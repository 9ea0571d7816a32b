"""A study on a real SLURM: one node of two CPUs, started on loopback for this test and stopped after it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import kdlib
from kdlib.apps.notebooks import NOTEBOOKS

SCRIPT = Path(__file__).parent / "slurm" / "one-node"
CHANGES = {
    "width": 0.125, "folds": 3, "teacher_epochs": 1, "student_epochs": 1, "teacher_steps": 4, "student_steps": 4,
}  # fmt: skip
CHECKS = "--default-resources runtime=10 mem_mb=1000 --slurm-no-account --quiet host"
CHECKS += " --slurm-init-seconds-before-status-checks 4 --seconds-between-status-checks 4"


@pytest.fixture
def slurm(tmp_path):
    """The environment in which commands find the cluster."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to start SLURM")
    tools = os.environ["PATH"] + ":/usr/sbin"
    missing = [tool for tool in ("slurmctld", "slurmd", "munged", "srun") if shutil.which(tool, path=tools) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    folder = tmp_path / "slurm"
    try:
        subprocess.run([SCRIPT, "start", folder], check=True, timeout=300)
        yield os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin:{tools}"}
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True, timeout=300)


def training_only(folder: Path) -> Path:
    """The baseline's notebook up to its tables, without figures: a test has no time for them."""
    notebook = nbformat.read(NOTEBOOKS / "01_baseline.ipynb", as_version=4)
    last = next(number for number, cell in enumerate(notebook.cells) if "found.save" in cell.source)
    notebook.cells = notebook.cells[: last + 1]
    folder.mkdir()
    nbformat.write(notebook, folder / "01_baseline.ipynb")
    for name in ("00_data", "06_figures", "report"):
        shutil.copy(NOTEBOOKS / f"{name}.ipynb", folder)
    return folder


def wait_for(path: Path, process: subprocess.Popen) -> None:
    begin = time.monotonic()
    while not path.exists():
        assert process.poll() is None and time.monotonic() - begin < 600, f"{path} did not appear"
        time.sleep(0.1)


def job_of(wildcards: str, environment: dict[str, str]) -> str:
    lines = subprocess.check_output(["squeue", "--noheader", "--format=%i %k"], env=environment, text=True).splitlines()
    (job,) = [line.split()[0] for line in lines if wildcards in line]
    return job


@pytest.mark.slow
def test_a_study_on_slurm_survives_a_killed_job_and_equals_the_local_one(slurm, phantom_of, tmp_path, capfd):
    results = tmp_path / 'my "$HOME" & more'
    for folder in (results, tmp_path / "local"):  # else each makes its own
        shutil.copytree(phantom_of(20), folder / "data" / "phantom")
    command = [
        sys.executable, "-m", "kdlib", "study", "--results", results, "--study", "tiny", "--device", "cpu",
        "--only", "01_baseline", "--notebooks", training_only(tmp_path / "notebooks"), "--changes", json.dumps(CHANGES),
        "--executor", "slurm", "--cores", "1", f"--snakemake-args={CHECKS}",
    ]  # fmt: skip
    with subprocess.Popen(command, env=slurm) as process:
        wait_for(results / "tiny" / "jobs" / "teacher-T2-fold0" / "failed.json", process)
        killed = job_of("T2", slurm)
        subprocess.run(["scancel", "--full", "--signal=KILL", killed], env=slurm, check=True)
        assert process.wait(timeout=1200) == 0, capfd.readouterr().out
    said = capfd.readouterr()
    assert "Trying to restart job" in said.out + said.err
    states = subprocess.check_output(["squeue", "--noheader", "--states=all", "--format=%i %T"], env=slurm, text=True)
    ends = dict(line.split() for line in states.splitlines())
    assert ends.pop(killed) in ("FAILED", "CANCELLED")
    assert list(ends.values()) == ["COMPLETED"] * 4, "both teachers, the baselines, the report"

    setting = dict(data="phantom", target="spleen", profile=kdlib.override_profile("quick", CHANGES))
    runs = [kdlib.Run(model=model, **setting) for model in ("T1", "T2")]
    runs += [
        kdlib.Run(model=model, fraction=fraction, **setting) for fraction in (1.0, 0.5) for model in ("S1", "S2", "E1")
    ]
    kdlib.study(runs, tmp_path / "local", "cpu").save(tmp_path / "local", "01_baseline")
    for table in ("cases", "history"):
        here, there = (
            folder / "tables" / f"01_baseline_{table}.csv" for folder in (tmp_path / "local", results / "tiny")
        )
        pd.testing.assert_frame_equal(pd.read_csv(there), pd.read_csv(here), check_exact=True)
