"""The frozen study gives the numbers that it gave before: see `tests/golden/study.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("golden_study", GOLDEN / "study.py")
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    then = (GOLDEN / "machine.txt").read_text().strip()
    if golden.machine() != then:
        pytest.skip(f"golden files are of {then}, this is {golden.machine()}")
    results = tmp_path_factory.mktemp("golden")
    return golden.measure(golden.golden_runs(results), results)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, key", [("weights", ["run"]), ("metrics", ["run", "name"]), ("history", ["run", "epoch", "name"])]
)
def test_the_frozen_study_is_as_it_was(measured, name, key):
    then = pd.read_csv(GOLDEN / f"{name}.csv").set_index(key).sort_index()
    now = measured[name].set_index(key).sort_index()
    pd.testing.assert_frame_equal(now[then.columns], then, check_exact=True)
