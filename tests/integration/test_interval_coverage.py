"""Simulated studies: intervals cover as often as they say, and families of equal methods are rarely told apart."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def coverage() -> dict:
    """The functions of the benchmark that simulates studies; the truth of a kind is drawn once."""
    found = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "coverage.py"))
    own = found["coverage"].__globals__
    own["truth"] = functools.cache(own["truth"])
    return found


@pytest.mark.parametrize("n", [24, 41])
@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_of_skewed_dice_cover_as_often_as_they_say(coverage, n, seeds):
    found = coverage["coverage"]("skewed", n, seeds, 800, ["studentised"], resamples=999)
    assert 0.93 <= found["studentised"] <= 0.97


def test_of_few_patients_the_studentised_interval_covers_best(coverage):
    found = coverage["coverage"]("skewed", 8, 1, 800, resamples=999)
    assert found["studentised"] > 0.91 and found["BCa"] < 0.9 and found["percentile"] < 0.9


def test_seeds_widen_the_interval_where_trainings_differ_as_a_whole(coverage):
    own = [coverage["coverage"]("own trainings", 24, 3, 400, ["studentised"], resamples=499)["studentised"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(coverage["coverage"].__globals__, "noise_of", lambda study: None)
        own.append(coverage["coverage"]("own trainings", 24, 3, 400, ["studentised"], resamples=499)["studentised"])
    assert own[0] > own[1] + 0.02


@pytest.mark.parametrize("n, tests", [(14, 1), (24, 19)])
def test_the_detectable_difference_is_found_in_four_studies_of_five(coverage, n, tests):
    assert coverage["power"](n, tests, 2000) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("n", [14, 24])
def test_a_family_of_equal_methods_is_rarely_told_apart(coverage, n):
    assert coverage["false_families"](n, 300) <= 0.05


@pytest.mark.parametrize("pooled", [False, True])
def test_a_correction_that_changes_nothing_is_rarely_told_to(coverage, pooled):
    assert coverage["false_corrections"](8, 150, pooled=pooled) <= 0.05
