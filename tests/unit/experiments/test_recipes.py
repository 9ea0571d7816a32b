"""The recipes of the experiments: every distiller can be named, and every control differs in what it controls."""

from __future__ import annotations

import dataclasses

import pytest

from kdlib.config import InputError
from kdlib.experiments.recipes import BALANCE, QUICK, comparison_losses, controls, distiller, thesis_recipe
from kdlib.losses import LOSSES
from kdlib.training.distiller import check_recipe


def test_the_compared_losses_are_all_but_the_one_that_is_0():
    assert set(comparison_losses()) == set(LOSSES) - {"softmax_kl"} and set(QUICK) <= set(comparison_losses())


@pytest.mark.parametrize("loss", comparison_losses())
def test_every_distiller_is_reachable_by_name_and_balanced(loss):
    recipe = distiller(loss, "S1")
    check_recipe(recipe)
    assert recipe.name == loss and recipe.balance == BALANCE
    assert {term.loss for term in recipe.terms} == {loss}


def test_a_distiller_that_does_not_exist():
    with pytest.raises(InputError, match="loss 'softmax_kl' does not exist: choose from kl"):
        distiller("softmax_kl", "S1")


def test_a_feature_loss_keeps_its_own_temperature_but_for_the_thesis_contrasts():
    assert {term.temperature for term in thesis_recipe("S1", "at").terms} == {None, 4.0}
    assert {term.temperature for term in distiller("supcon", "S2").terms} == {0.1}
    check_recipe(thesis_recipe("S2", "cirkd"))


def test_each_control_differs_from_the_recipe_in_one_thing():
    recipe = thesis_recipe("S1")
    runs = {run.recipe.name: run for run in controls("S1", "T1", data="phantom", target="spleen", fraction=0.5)}
    assert list(runs) == [
        "zero_weights", "random_teacher", "shuffled_teacher", "frozen_projectors", "redrawn_projectors",
        "label_smoothing", "longer_training", "equal_time", "self_distillation",
    ]  # fmt: skip
    taught = {name: run.recipe for name, run in runs.items() if run.teacher == "T1"}
    plain = {field.name for field in dataclasses.fields(recipe)} - {"name", "control"}
    for name, changed in taught.items():
        differ = {field for field in plain if getattr(changed, field) != getattr(recipe, field)}
        assert differ == (
            {"teacher"} if "teacher" in name else {"redrawn_projectors"} if "redrawn" in name else {"terms"}
        ), name
    assert all(term.weight == 0 for term in taught["zero_weights"].terms)
    assert [term.projector for term in taught["frozen_projectors"].terms] == ["frozen"] * 3 + ["learned"]
    assert runs["self_distillation"].teacher == "S1" and runs["self_distillation"].recipe.terms == recipe.terms
    assert {runs[name].teacher for name in ("label_smoothing", "longer_training", "equal_time")} == {None}
    assert {run.fraction for run in runs.values()} == {0.5}
