"""Fixtures that several test files share."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are tiny: a second thread costs more than it saves

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
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


@pytest.fixture(scope="session")
def small_study(tmp_path_factory) -> Path:
    """A results folder with the study "tiny" of a phantom: T1, S1 and S2 alone, and S1 taught by T1 in two ways."""
    from kdlib import Run, override_profile, study, thesis_recipe

    results = tmp_path_factory.mktemp("small")
    tiny = dict(width=0.125, folds=3, teacher_epochs=2, student_epochs=2, teacher_steps=4, student_steps=4)
    setting = dict(data="phantom", target="spleen", profile=override_profile("quick", tiny))
    recipes = [thesis_recipe("S1"), thesis_recipe("S1", only=("PMD",))]
    runs = [Run(model="T1", **setting), *(Run(model=name, fraction=0.5, **setting) for name in ("S1", "S2"))]
    runs += [Run(model="S1", fraction=0.5, teacher="T1", recipe=recipe, **setting) for recipe in recipes]
    study(runs, results, "cpu").save(results / "tiny", "02_distillation")
    return results
