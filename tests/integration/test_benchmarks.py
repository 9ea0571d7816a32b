"""The benchmarks at tiny sizes: each fast way equals its plain one, rows have their form; nothing here is timed."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FIELDS = {"name", "value", "unit", "other", "ratio", "goal", "holds"}


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of benchmarks/, and forgets all of them again: their names are common words."""
    names = [path.stem for path in BENCHMARKS.glob("[!_]*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def record(benchmark, tmp_path):
    return benchmark("measure").Record(tmp_path / "benchmarks", torch.device("cpu"), quick=True)


def rows_of(record) -> list[dict]:
    record.write()
    rows = json.loads(record.path.read_text())["scripts"][record.script]["rows"]
    table = record.path.with_suffix(".md").read_text()
    for row in rows:
        assert row.keys() == FIELDS and row["name"] in table
        assert isinstance(row["holds"], bool) == bool(row["goal"] and row["value"] is not None)
        if row["value"] is None:
            assert row["holds"].startswith("not measured: ")
        elif row["other"] is not None:
            assert row["ratio"] == pytest.approx(row["other"] / row["value"]) or row["ratio"] == pytest.approx(
                row["value"] / row["other"]
            )
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("script", ["training", "contrastive", "slices", "evaluation", "startup", "gpu_rows"])
def test_a_script_compares_equals_and_writes_its_rows(benchmark, record, script):
    record.start(script)
    benchmark(script).measure(record)  # stops where two ways do not compute the same
    rows = rows_of(record)
    assert rows and all(row["holds"] is True for row in rows if row["unit"] == "relative")
    curves = json.loads(record.path.read_text())["scripts"][script]["curves"]
    assert bool(curves) == (script in ("training", "contrastive")) == record.path.with_suffix(".png").exists()


def test_a_way_that_computes_something_else_stops_the_benchmark(benchmark, record, monkeypatch):
    plain, training = benchmark("plain"), benchmark("training")
    monkeypatch.setattr(
        plain, "info_nce", lambda student, teacher, temperature: (student - teacher.mean()).pow(2).mean()
    )
    record.start("training")
    with pytest.raises(RuntimeError, match="the two ways differ"):
        training.check_equal(
            bench := training.Bench(record.device, 32, 2, 0.125), bench.slices(), bench.teacher(), record
        )


def test_a_script_that_runs_again_replaces_its_own_rows_alone(benchmark, record):
    measure = benchmark("measure")
    for script, value in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        again = measure.Record(record.path.parent, torch.device("cpu"), quick=True)
        again.start(script)
        again.add(measure.faster("x", value, 6.0, 2))
        again.write()
    found = {script: each["rows"] for script, each in json.loads(record.path.read_text())["scripts"].items()}
    assert {script: [row["value"] for row in rows] for script, rows in found.items()} == {"a": [3.0], "b": [2.0]}
    assert found["a"][0]["ratio"] == 2 and found["a"][0]["holds"] is True
    assert measure.faster("x", 4.0, 6.0, 2).holds is False and measure.share("x", 2.0, 4.0, 0.5).holds is True


@pytest.fixture
def kit(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    yield importlib.import_module("run")
    sys.modules.pop("run", None)


def test_the_kit_for_a_gpu_goes_on_after_a_kill(tmp_path):
    """Killed in its second step, by the hardest signal: the first is not done again, the second is."""
    script = tmp_path / "kit.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS / 'gpu')!r})\n"
        "import run\n"
        f"touch = \"import sys, time, pathlib; open({str(tmp_path / 'calls')!r}, 'a').write(sys.argv[1]);\"\n"
        f'waits = touch + "pathlib.Path({str(tmp_path / "again")!r}).exists() or time.sleep(60)"\n'
        "steps = [run.Step(name, 1, (sys.executable, '-c', code, name)) for name, code in\n"
        "         (('a', touch), ('b', waits), ('c', touch))]\n"
        "run.steps = lambda options: steps\n"
        "sys.exit(run.main())\n"
    )
    words = [sys.executable, str(script), "--output", str(tmp_path / "out")]
    first = subprocess.Popen(words, start_new_session=True)
    calls = tmp_path / "calls"
    while not calls.exists() or "b" not in calls.read_text():
        assert first.poll() is None
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    (tmp_path / "again").touch()
    assert subprocess.run(words).returncode == 0 and calls.read_text() == "abbc"
    steps = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert {name: step["status"] for name, step in steps.items()} == dict.fromkeys("abc", "done")
    with tarfile.open(tmp_path / "out.tar.gz") as file:
        assert {"out/steps.json", "out/logs/b.log"} <= set(file.getnames())


def test_the_kits_archive_has_no_weights_and_no_pixels(kit, tmp_path):
    folder = tmp_path / "out"
    made = "runs/k/best.safetensors", "runs/k/slices.npz", "runs/k/metrics.csv", "main-table/slices/fold_0.npz"
    for name in ("steps.json", "site/pkg/data.json", *(f"results/{path}" for path in made)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    with tarfile.open(kit.archive(folder)) as file:
        assert set(file.getnames()) == {"out/steps.json", "out/results/runs/k/metrics.csv"}


def test_the_kits_wheels_are_those_of_the_lock(kit):
    lock = (BENCHMARKS.parent / "requirements.lock").read_text().splitlines()
    pinned = {line.split(" ")[0].rstrip("\\").strip() for line in lock if "==" in line}
    wheels = [line.split()[0] for line in kit.LIST.read_text().splitlines() if line and not line.startswith("#")]
    assert wheels and [wheel for wheel in wheels if wheel not in pinned] == []
    assert not any(wheel.startswith(("torch==", "nvidia", "triton")) for wheel in wheels)
