"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

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
