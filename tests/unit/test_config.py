"""Descriptions of runs are strict: what cannot be meant is refused with a word on what can."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kdlib.config import (
    BASELINE,
    PROFILES,
    PROTOCOLS,
    SWITCHES,
    TEACHER_RECIPE,
    InputError,
    Optimisation,
    Preprocessing,
    Profile,
    Protocol,
    Recipe,
    Run,
    Term,
    correction_stages,
    derive_seed,
    from_json,
    lookup,
    override_profile,
    to_json,
)  # fmt: skip
from kdlib.experiments.recipes import comparison_losses, distiller, thesis_recipe
from kdlib.losses import LOSSES
from kdlib.training.distiller import check_recipe


@pytest.mark.parametrize(
    "build, word",
    [
        (lambda: Preprocessing(size=100), "multiple of 16"),
        (lambda: Preprocessing(size=8), "size 8: give a whole number of 16 or more"),
        (lambda: Preprocessing(spacing=0), "spacing"),
        (lambda: Preprocessing(channels="rgb"), "neighbours"),
        (lambda: Preprocessing(window=(10, 10)), "window"),
        (lambda: Preprocessing(percentiles=(50, 101)), "percentiles"),
        (lambda: Term("E-B", "fitnet", 0.1), "say where it reads .*'E-E', 'B-B', 'D-D' or 'PMD'"),
        (lambda: Term("E-E", "fitnet", -0.1), "weight -0.1"),
        (lambda: Term("E-E", "fitnet", 0.1, projector="fixed"), "'learned' or 'frozen'"),
        (
            lambda: Term("x", "fitnet", 0.1, student_layers="a", teacher_layers=("a", "b")),
            "1 scales of the student, 2 of the teacher",
        ),
        (lambda: Recipe("x", smoothing=1.0), "recipe 'x', smoothing 1.0: give a number from 0 and below 1"),
        (
            lambda: Recipe("x", "dice", smoothing=0.1),
            "smoothing 0.1: it is for cross entropy: set 'dice.ce'",
        ),
        (lambda: Recipe("x", teacher="absent"), "'trained', 'random' or 'shuffled'"),
        (lambda: Recipe("x", budget="all"), "'student', 'teacher\\+student' or 'wall_clock'"),
        (lambda: Recipe("x", balance=0.5), "needs terms whose weights are not 0"),
        (lambda: Term("E-E", "fitnet", 0.1, 0.0), "temperature"),
        (lambda: Recipe("twice", terms=(Term("E-E", "fitnet", 0.1), Term("E-E", "fitnet", 0.2))), "twice"),
        (lambda: Recipe("x", segmentation="focal"), "dice"),
        (lambda: Optimisation("sgd"), "adamw"),
        (lambda: Optimisation(schedule="step"), "cosine"),
        (lambda: Run("phantom", "spleen", "S1", teacher="T1"), "both or neither"),
        (lambda: Run("phantom", "spleen", "S1", recipe=thesis_recipe("S1")), "both or neither"),
        (lambda: Run("phantom", "spleen", "S1", fraction=0.0), "fraction"),
        (lambda: Run("phantom", "spleen", "S1", fold=9), "has 0 to 1"),
        (lambda: thesis_recipe("S1", only=("E-D",)), "E-E"),
        (lambda: lookup("profile", "fast", PROFILES), "quick"),
    ],
)
def test_refused_with_a_word_on_what_can_be_meant(build, word):
    with pytest.raises(InputError, match=word):
        build()


def test_thesis_recipe_has_the_thesis_weights_and_temperatures():
    small, large = thesis_recipe("S1"), thesis_recipe("S2")
    assert {t.name: t.weight for t in small.terms} == {"E-E": 0.1, "B-B": 0.2, "D-D": 0.1, "PMD": 0.2}
    assert small.segmentation_weight == 0.4 and small.segmentation == "dice+ce"
    assert {t.temperature for t in small.terms if t.name != "PMD"} == {0.4}
    assert {t.temperature for t in large.terms if t.name != "PMD"} == {0.1}
    assert {t.temperature for t in large.terms if t.name == "PMD"} == {4.0}


def test_a_term_takes_options_and_scales_as_they_are_easy_to_write():
    term = Term("x", "supcon", 0.1, options={"samples": 64, "hard": 0.5}, student_layers="decoder1")
    assert term.options == (("hard", 0.5), ("samples", 64)) and hash(term)
    assert hash(Term("x", "cirkd", 0.1, options={"weights": [1, 0, 0]}, student_layers="decoder1"))
    assert term.student_layers == term.teacher_layers == ("decoder1",)
    assert term.arguments == {"hard": 0.5, "samples": 64}
    assert Term("PMD", "kl", 0.2, 4.0).arguments == {"temperature": 4.0} and Term("B-B", "fitnet", 1.0).arguments == {}


def arms(protocol: str) -> list[Run]:
    taught = dict(teacher="T1", recipe=thesis_recipe("S1"), fraction=0.5)
    models = [("T1", {}), ("S1", {}), ("S1", taught)]
    return [Run("phantom", "spleen", model, protocol=PROTOCOLS[protocol], **more) for model, more in models]


def test_corrected_protocol_treats_every_arm_alike_and_thesis_does_not():
    teacher, *students = arms("corrected")
    assert len({run.optimisation for run in students}) == 1 and teacher.optimisation == teacher.profile.teacher
    assert {run.effective_recipe.segmentation for run in [teacher, *students]} == {"dice+ce"}
    teacher, baseline, distilled = (run.optimisation for run in arms("thesis"))
    assert (baseline.optimiser, baseline.lr, baseline.batch) == ("adamw", 1.5e-4, 16)
    assert (distilled.optimiser, distilled.lr, distilled.batch) == ("rmsprop", 1e-2, 20)
    assert (teacher.lr, teacher.betas, teacher.weight_decay) == (1e-4, (0.9, 0.95), 0.05)


def test_the_effective_recipe_keeps_the_published_faults():
    corrected, thesis = arms("corrected")[2], arms("thesis")[2]
    assert (
        corrected.effective_recipe == corrected.recipe
        and corrected.threshold == 0.5
        and not corrected.preprocessing.published
    )
    assert {term.name: term.loss for term in thesis.effective_recipe.terms} == {
        "E-E": "infonce", "B-B": "infonce", "D-D": "infonce", "PMD": "softmax_kl",
    }  # fmt: skip
    assert thesis.effective_recipe.redrawn_projectors and not corrected.effective_recipe.redrawn_projectors
    assert thesis.preprocessing.published and thesis.threshold == pytest.approx(0.6225, abs=1e-4)
    weights = [(term.weight, term.temperature) for term in thesis.recipe.terms]
    assert [(term.weight, term.temperature) for term in thesis.effective_recipe.terms] == weights


@pytest.mark.parametrize("loss", comparison_losses())
def test_every_distiller_can_be_had_with_the_published_faults(loss):
    run = Run("phantom", "spleen", "S1", teacher="T1", recipe=distiller(loss, "S1"), protocol=PROTOCOLS["thesis"])
    check_recipe(run.effective_recipe)
    assert run.effective_recipe.redrawn_projectors == (LOSSES[loss].reads == "features")


def test_options_of_labels_are_dropped_where_labels_are():
    terms = (Term("B-B", "supcon", 0.1, 0.1, options={"samples": 64, "same_patient": True}),)
    run = Run("phantom", "spleen", "S1", teacher="T1", recipe=Recipe("r", terms=terms), protocol=PROTOCOLS["thesis"])
    assert run.effective_recipe.terms[0].loss == "infonce" and run.effective_recipe.terms[0].options == (
        ("same_patient", True),
    )


def test_the_bridge_mends_one_fault_at_a_time():
    protocols = correction_stages("cumulative")
    assert protocols[0] == PROTOCOLS["thesis"]
    faults = [[getattr(protocol, switch) for switch in SWITCHES] for protocol in protocols]
    assert [sum(row) for row in faults] == list(range(len(SWITCHES), -1, -1))
    fields = {field.name for field in dataclasses.fields(protocols[0])}
    assert fields == {"name", *SWITCHES}, "a protocol is its switches and nothing else"


def test_single_faults_are_put_back_into_the_corrected_protocol():
    first, *faults = correction_stages("single")
    assert first == PROTOCOLS["corrected"] and [fault.name for fault in faults][:2] == ["own optimisers", "byte image"]
    assert [{name for name in SWITCHES if getattr(fault, name)} for fault in faults] == [{name} for name in SWITCHES]
    assert correction_stages("ends") == [PROTOCOLS["thesis"], PROTOCOLS["corrected"]]
    with pytest.raises(
        InputError, match="way of correction 'all' does not exist: choose from cumulative, ends, single"
    ):
        correction_stages("all")


def test_thesis_profile_is_the_thesis_size():
    profile = PROFILES["thesis"]
    epochs = profile.teacher_epochs, profile.student_epochs
    assert (profile.preprocessing.size, profile.width, *epochs) == (256, 1.0, 200, 120)


def test_a_profile_is_tailored_strictly():
    profile = override_profile("quick", {"spacing": 2.0, "window": [-160, 240], "folds": 3})
    assert (profile.preprocessing.spacing, profile.preprocessing.window, profile.folds) == (2.0, (-160, 240), 3)
    quick = PROFILES["quick"]
    assert (profile.preprocessing.size, profile.width) == (quick.preprocessing.size, quick.width)
    assert override_profile("thesis") == PROFILES["thesis"]
    with pytest.raises(InputError, match="'epoch' does not exist.*student_epochs"):
        override_profile("quick", {"epoch": 3})
    with pytest.raises(InputError, match="multiple of 16"):
        override_profile("quick", {"size": 100})


def test_run_names_recipe_and_teacher_run():
    student = Run(
        "phantom", "spleen", "S1", fraction=0.5, teacher="T1", recipe=thesis_recipe("S1"), seed=3, teacher_seed=1
    )
    assert (student.method, student.role) == ("KD(T1,S1)@50:supcon:E-E+B-B+D-D+PMD", "distilled")
    alone = Run("phantom", "spleen", "S2", fraction=0.5)
    assert (alone.method, alone.role) == ("S2@50", "baseline")
    assert dataclasses.replace(student, fold=1, seed=4).method == student.method
    assert Run("phantom", "spleen", "S2").recipe == BASELINE
    (teacher,) = student.teacher_runs().values()
    assert (teacher.model, teacher.fraction, teacher.seed, teacher.recipe) == ("T1", 1.0, 1, TEACHER_RECIPE)
    assert teacher == Run("phantom", "spleen", "T1", seed=1)


def test_derived_seeds_differ_and_repeat():
    seeds = {
        derive_seed(seed, stream, step) for seed in range(3) for stream in ("order", "augment") for step in range(50)
    }
    assert len(seeds) == 300
    assert derive_seed(1, "order") == derive_seed(1, "order")


def test_errors_show_as_one_line_in_jupyter():
    assert InputError("no such fold")._render_traceback_() == ["InputError: no such fold"]


# ----------------------------------------------------------------------------------------------------- strict reading


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"folds": "three"}, "profile 'quick', folds 'three': give a whole number of 2 or more"),
        ({"folds": 0}, "folds 0: give a whole number of 2 or more"),
        ({"spacing": "two"}, "preprocessing, spacing 'two': give a number above 0, or None"),
        ({"spacing": float("nan")}, "spacing nan: give a number above 0"),
        ({"student_steps": -3}, "student_steps -3: give a whole number of 1 or more, or None"),
        ({"student_epochs": 0}, "student_epochs 0: give a whole number of 1 or more"),
        ({"teacher_epochs": 2.5}, "teacher_epochs 2.5: give a whole number"),
        ({"width": -1}, "width -1: give a number above 0"),
        ({"size": True}, "size True: give a whole number of 16 or more"),
        ({"window": [1]}, "window \\[1\\]: give 2 values, each a number"),
        ({"published": True}, "field of a profile 'published' does not exist"),
        ({"student": {"rate": 1}}, "field of the student's optimisation 'rate' does not exist: choose from optimiser"),
        ({"student": {"lr": -1}}, "optimisation, lr -1: give a number above 0"),
        ({"student": 3}, "student 3: give a Optimisation"),
        ([3], "changes \\[3\\] of profile 'quick': give fields and values"),
    ],
)
def test_changes_of_a_profile_are_read_strictly(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        override_profile("quick", changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "segmentation", "loss", "val_dice", "L1.5"])
def test_a_term_is_not_called_as_the_rest_of_a_training(name):
    with pytest.raises(InputError, match=f"distillation term {name!r}: choose a name without dots"):
        Term(name, "fitnet", 1.0, student_layers="bottleneck")


def test_a_temperature_is_given_once():
    with pytest.raises(InputError, match="term PMD: its temperature is given twice"):
        Term("PMD", "kl", 1.0, 4.0, options={"temperature": 2.0})


def test_single_fields_of_an_optimisation_can_be_changed():
    quick = PROFILES["quick"]
    changed = override_profile("quick", {"student": {"lr": 0.004, "betas": [0.9, 0.99]}, "folds": 3})
    assert changed.student == dataclasses.replace(quick.student, lr=0.004, betas=(0.9, 0.99))
    assert changed.teacher == quick.teacher and changed.folds == 3


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("r", unlabelled=True, pseudo_labels=True),
        Recipe("r", terms=(Term("B-B", "fitnet", 1.0),), teacher="random"),
        Recipe("r", terms=(Term("x", "fitnet", 1.0, student_layers="encoder1", teacher_layers="encoder2"),)),
    ],
)
def test_what_a_student_cannot_teach_itself_is_refused(recipe):
    with pytest.raises(InputError, match="teacher 'self': the student itself has neither pseudo-labels"):
        Run("phantom", "spleen", "S1", fraction=0.5, teacher="self", recipe=recipe)


@pytest.mark.parametrize("kind", [Preprocessing, Term, Recipe, Optimisation, Protocol, Profile, Run])
def test_every_field_of_every_description_refuses_another_type(kind):
    """An object is of no type that a field may have."""
    made = {
        Preprocessing: Preprocessing(), Term: Term("E-E", "fitnet", 0.1), Recipe: BASELINE,
        Optimisation: Optimisation(),
        Protocol: PROTOCOLS["thesis"], Profile: PROFILES["quick"], Run: Run("phantom", "spleen", "S1"),
    }[kind]  # fmt: skip
    for field in dataclasses.fields(kind):
        with pytest.raises(InputError, match=rf"{field.name}.* give "):
            dataclasses.replace(made, **{field.name: object()})


def test_a_run_survives_json():
    run = Run(
        "phantom", "spleen", "S1", 1, 0.5, "T1", thesis_recipe("S1"), profile=override_profile("quick", {"spacing": 2})
    )
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    whole, real = (override_profile("quick", {"spacing": spacing}).preprocessing for spacing in (2, 2.0))
    assert whole == real and json.dumps(whole.spacing) == "2.0", "equal descriptions have equal keys"
    named = {"data": "phantom", "target": "spleen", "model": "S1", "profile": "thesis", "protocol": "thesis"}
    assert from_json(named).profile == PROFILES["thesis"] and from_json(named).protocol == PROTOCOLS["thesis"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fold": "a"}, "run, fold 'a': give a whole number of 0 or more @ run"),
        ({"colour": 1}, "field 'colour' of a run does not exist: choose from data, target"),
        ({"profile": "fast"}, "profile 'fast' does not exist: choose from quick"),
        ({"profile": {"name": "x"}}, "a required field is missing @ run.profile.preprocessing"),
        ({"recipe": 3}, "3 is no recipe: give its fields @ run.recipe"),
        ({"recipe": {"name": "r", "terms": 3}}, "give a list @ run.recipe.terms"),
        (
            {"recipe": {"name": "r", "terms": [{"name": "E-E", "loss": "kl", "weight": "big"}]}},
            "weight 'big': give a number",
        ),
    ],
)
def test_a_run_that_cannot_be_read_is_one_clear_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        from_json({"data": "phantom", "target": "spleen", "model": "S1"} | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", [[], 3, "S1", None])
def test_what_is_no_run(record):
    with pytest.raises(InputError, match="is no run"):
        from_json(record)
