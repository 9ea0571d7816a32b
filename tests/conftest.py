"""Fixtures that several test files share."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from filelock import FileLock

torch.set_num_threads(1)  # the tests' tensors are tiny: a second thread costs more than it saves

ROOT = Path(__file__).resolve().parents[1]


# what takes longest first, so that of the processes that share the files none is left with a long one at the end
FIRST = (
    "test_study", "test_golden", "test_snakefile", "test_packaging", "test_figures", "test_resume", "test_runs",
    "test_explore", "test_faults", "test_browser", "test_slurm", "test_parallel", "test_train",
)  # fmt: skip


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files of most tests


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def real_data():
    """`real_data("btcv")` is the folder of that real data set; the test is skipped where it is not to be had."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("KDLIB_DATA", ROOT.parent / "shared" / "data")) / name
        if not folder.is_dir():
            pytest.skip(f"real data not found: set KDLIB_DATA to the folder that holds {name}/")
        return folder

    return find


@pytest.fixture(scope="session")
def torchdistill() -> ModuleType:
    """torchdistill, an oracle for losses. It imports torchvision, whose CUDA build cannot load beside a CPU build of
    torch; its losses use nothing of it, so a stand-in serves there."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        with mock.patch.dict(sys.modules):
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
            for name in ("", ".models", ".ops", ".datasets", ".transforms"):
                sys.modules["torchvision" + name] = mock.MagicMock()
            importlib.import_module("torchdistill.losses")
            return importlib.import_module("torchdistill")
    importlib.import_module("torchdistill.losses")
    return importlib.import_module("torchdistill")


@pytest.fixture
def timed_shortly(monkeypatch):
    """Networks are timed for a tenth of the usual time: for tests that look at other things than how long they take."""
    module = importlib.import_module("kdlib.models.cost")  # `kdlib.models.cost` itself is the function of that name
    monkeypatch.setattr(module, "SECONDS", 0.05)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once(name, make)` is a folder that `make(folder)` fills: once in a run of pytest, by whichever of its
    processes comes first. Whoever changes it takes a copy."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def phantom_of(made_once):
    """`phantom_of(9)` is a phantom of so many patients, to be read."""
    from kdlib.data import make_phantom

    return lambda patients: made_once(f"phantom-{patients}", lambda folder: make_phantom(folder, patients=patients))


@pytest.fixture(scope="session")
def small_study(made_once, phantom_of, tmp_path_factory) -> Path:
    """A results folder with the study "tiny" of a phantom: T1, S1 and S2 alone, and S1 taught by T1 in two ways."""
    from kdlib import Run, override_profile, study, thesis_recipe

    def make(results: Path) -> None:
        tiny = dict(width=0.125, folds=3, teacher_epochs=2, student_epochs=2, teacher_steps=4, student_steps=4)
        setting = dict(data="phantom", target="spleen", profile=override_profile("quick", tiny))
        recipes = [thesis_recipe("S1"), thesis_recipe("S1", only=("PMD",))]
        runs = [Run(model="T1", **setting), *(Run(model=name, fraction=0.5, **setting) for name in ("S1", "S2"))]
        runs += [Run(model="S1", fraction=0.5, teacher="T1", recipe=recipe, **setting) for recipe in recipes]
        shutil.copytree(phantom_of(20), results / "data" / "phantom")
        study(runs, results, "cpu").save(results / "tiny", "02_distillation")

    return shutil.copytree(made_once("small-study", make), tmp_path_factory.mktemp("small") / "results")
