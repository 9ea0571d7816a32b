"""Gradient diagnostics: measured gradients, and terms that pass none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_training import CPU, distilled, frozen_teacher, run_of

from kdlib.config import PROTOCOLS, TrainingError
from kdlib.training.diagnostics import gradient_of
from kdlib.training.state import new_state

WEIGHTS = {"segmentation": 0.4, "PMD": 0.2}


def test_the_published_prediction_term_would_be_caught():
    """Fault 2: a softmax over one channel is exactly 1, so the term and its gradient are exactly 0."""
    state = new_state(distilled(("PMD",)), 1, 10, CPU, frozen_teacher())
    log, logits = state.begin_epoch(), torch.randn(2, 1, 8, 8, requires_grad=True)
    published = torch.nn.functional.kl_div(logits.log_softmax(1), torch.randn(2, 1, 8, 8).softmax(1), reduction="sum")
    log.add(
        {"loss": published, "segmentation": published, "PMD": published},
        {"segmentation": torch.ones(3), "PMD": torch.zeros(3)},
        0.0,
    )
    with pytest.raises(TrainingError, match="PMD .* was exactly zero in epoch 4"):
        log.rows(4, WEIGHTS)


def test_gradients_are_measured_twice_and_again_while_they_are_zero():
    log = new_state(distilled(("PMD",)), 1, 10, CPU, frozen_teacher()).begin_epoch()
    assert log.unmeasured() == ["segmentation", "PMD"]
    for _ in range(2):
        log.add({"PMD": torch.ones(())}, {"segmentation": torch.ones(3), "PMD": torch.zeros(3)}, 0.0)
    assert log.unmeasured() == ["PMD"]
    log.add({"PMD": torch.ones(())}, {"PMD": torch.ones(3)}, 0.0)
    assert log.unmeasured() == []
    assert new_state(run_of("S1"), 1, 10, CPU, {}).begin_epoch().unmeasured() == [], "nothing to compare in a baseline"


def test_a_term_that_is_known_to_be_dead_is_not_measured_for_ever():
    thesis = dataclasses.replace(distilled(("PMD",)), protocol=PROTOCOLS["thesis"])
    log = new_state(thesis, 1, 10, CPU, frozen_teacher()).begin_epoch()
    for _ in range(2):
        log.add({}, {"segmentation": torch.ones(3), "PMD": torch.zeros(3)}, 0.0)
    assert log.unmeasured() == []


def test_shares_and_cosines_of_gradients():
    log = new_state(distilled(("PMD",)), 1, 10, CPU, frozen_teacher()).begin_epoch()
    losses = {name: torch.ones(()) for name in ("loss", "segmentation", "PMD")}
    log.add(losses, {"segmentation": torch.tensor([1.0, 0.0]), "PMD": torch.tensor([0.0, 1.0])}, 0.0)
    log.add(losses, {"segmentation": torch.tensor([3.0, 0.0]), "PMD": torch.tensor([3.0, 3.0])}, 0.0)
    rows = {row["name"]: row["value"] for row in log.rows(1, WEIGHTS)}
    assert rows["grad/segmentation"] == pytest.approx(0.4) and rows["grad/PMD"] == pytest.approx(0.2)
    assert rows["share/segmentation"] == pytest.approx(0.4 / 0.6)
    assert rows["cosine/segmentation"] == pytest.approx(1) and rows["cosine/PMD"] == pytest.approx(0.5**0.5)


def test_gradient_is_a_vector_over_all_parameters():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    unused = torch.nn.Parameter(torch.ones(2))
    assert gradient_of((weight**2).sum() / 2, [weight, unused]).tolist() == [3, 4, 0, 0]
    assert gradient_of(torch.tensor(1.0), [weight]).tolist() == [0, 0]
