"""Settings are checked once, and each experiment asks for the runs that its question needs."""

from __future__ import annotations

import dataclasses
import re

import pytest

from kdlib.config import PROTOCOLS, SWITCHES, InputError
from kdlib.experiments import (
    EXPERIMENTS,
    Setting,
    ablation,
    baseline,
    capacity,
    distillation,
    label_fractions,
    negative_controls,
    requested_runs,
    sweep,
)
from kdlib.experiments.dry_run import describe
from kdlib.experiments.recipes import thesis_recipe
from kdlib.experiments.runner import check
from kdlib.experiments.source import run_source
from kdlib.experiments.store import run_key


@pytest.mark.parametrize(
    "change, message",
    [
        ({"device": "tpu"}, "device 'tpu' does not exist: choose 'auto', 'cpu' or 'cuda'"),
        ({"folds": [9]}, "fold 9 does not exist: profile 'quick' has 0 to 1"),
        ({"folds": []}, "folds .*: give at least one, and each once"),
        ({"folds": 0}, "setting, folds 0: give a list, each a whole number of 0 or more"),
        ({"seeds": [1, 1]}, "seeds .*: give at least one, and each once"),
        ({"seeds": ["a"]}, "setting, seeds .*: give a list, each a whole number"),
        ({"study": ".."}, "study name '..': use up to 100 letters"),
        ({"study": "runs"}, "results keeps its runs under that name"),
        ({"changes": [3]}, "setting, changes .3.: give a dict"),
        ({"profile": "fast"}, "profile 'fast' does not exist"),
        ({"protocol": 3}, "setting, protocol 3: give a text"),
        ({"protocol": "x"}, "protocol 'x' does not exist: choose from corrected, thesis"),
        ({"changes": {"folds": "three"}}, "folds 'three': give a whole number"),
        ({"on_defect": "ignore"}, "on_defect 'ignore': give 'raise' or 'drop'"),
        ({"target": 3}, "setting, target 3: give a text"),
    ],
)
def test_a_setting_that_cannot_be_is_one_clear_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        Setting(**change)
    assert "\n" not in str(caught.value)


def test_a_setting_makes_runs_and_knows_its_folder():
    setting = Setting(changes={"folds": 5}, folds=[3], protocol="thesis", results="out", study="mine")
    run = setting.run("S1", seed=2)
    assert (run.fold, run.seed, run.profile.folds, run.protocol.name) == (3, 2, 5, "thesis")
    assert str(setting.folder) == "out/mine"


def test_each_experiment_asks_for_its_runs(tmp_path):
    setting = Setting(folds=[0, 1], seeds=[0, 1, 2], results=tmp_path)
    assert len(baseline(setting)) == 2 * 2 + 6 * 2 * 3 and len(baseline(setting, ["T1"])) == 2
    assert len(distillation(setting)) == len(baseline(setting)) + 6 * 2 * 3
    assert len(ablation(setting)) == 6 * 16 and len(set(ablation(setting))) == 6 * 16
    roles = [run.role for run in negative_controls(setting)]
    assert (roles.count("baseline"), roles.count("distilled"), roles.count("control")) == (6, 6 * 2, 6 * 9)
    with pytest.raises(InputError, match="network 'S9' does not exist"):
        baseline(setting, ["S9"])
    half = distillation(setting, ["T1"], [0.5])
    assert {run.fraction for run in half if not run.is_teacher} == {0.5} and set(half) < set(distillation(setting))
    with pytest.raises(InputError, match=r"fractions \[1.0\]: 0.5 must be among them"):
        distillation(setting, ["T1"], [1.0])


def test_comparison_and_correction(tmp_path):
    runs = requested_runs("04_loss_comparison", {"results": tmp_path, "shuffled_controls": True})
    methods = [run.method for run in runs if run.model == "S1" and run.seed == 0]
    assert len(methods) == len(set(methods)), "one row per method"
    losses = {run.recipe.name for run in runs}
    assert "kl shuffled" in losses and "dkd" not in losses, "of one class DKD is KL"
    assert "dkd" in {
        r.recipe.name for r in requested_runs("04_loss_comparison", {"results": tmp_path, "losses": ["dkd"]})
    }
    runs = [run for run in requested_runs("05_correction", {"results": tmp_path}) if run.model == "S1"]
    assert len(runs) == 3 * (len(SWITCHES) + 1)
    ends = [r for r in requested_runs("05_correction", {"results": tmp_path, "way": "ends"}) if r.model == "S1"]
    expected = [dataclasses.replace(run, protocol=PROTOCOLS["corrected"]) for run in runs[-3:]]
    assert ends == [*runs[:3], *expected]
    assert [run_key(run, tmp_path) for run in expected] == [run_key(run, tmp_path) for run in runs[-3:]]
    single = [r for r in requested_runs("05_correction", {"results": tmp_path, "way": "single"}) if r.model == "S1"]
    assert len(single) == len(runs) and [run.protocol.name for run in single[:4]] == ["corrected"] * 3 + [
        "own optimisers"
    ]
    with pytest.raises(
        InputError, match="parameter of 03_ablation 'loss' does not exist: choose from .*student, teacher"
    ):
        requested_runs("03_ablation", {"results": tmp_path, "loss": "kl"})
    with pytest.raises(InputError, match="has several classes"):
        requested_runs("05_correction", {"results": tmp_path, "target": "all"})


@pytest.mark.slow
def test_a_dry_run_lists_what_would_be_trained(tmp_path):
    plan = {"shared": {"results": str(tmp_path), "device": "cpu"}, "parameters": {}}
    small = {"results": str(tmp_path), "changes": {"size": 32, "spacing": 12.0, "width": 0.125}, "folds": (0, 1)}
    plan["parameters"] = {"00_data": {}, "01_baseline": small | {"networks": ("T1", "S1")}}
    text = describe(plan)
    assert "00_data: no runs" in text and "01_baseline: 6 runs, 0 of them done" in text
    times = re.findall(r"^    (.+), fold [01], seed 0: \d+ steps, (\d+) (?:s|min), runs/\w{16}$", text, re.MULTILINE)
    assert [name for name, _ in times] == ["T1", "T1", "S1", "S1", "S1@50", "S1@50"]
    assert all(int(time) for _, time in times), "measured, where there is no similar run"
    assert re.match(
        r"to train: 6 runs, about .+ on one core, .+ on the \d+ of this machine; by sim", text.split("\n")[-1]
    )
    assert not (tmp_path / "runs").exists(), "nothing is kept"
    assert set(EXPERIMENTS) >= {"01_baseline", "05_correction"} and requested_runs("06_figures", {}) == []


def test_capacity_trains_every_network_alone_and_distilled_on_every_share_of_labels(tmp_path):
    setting = Setting(results=tmp_path, seeds=[0, 1])
    runs = capacity(setting)
    assert len(set(runs)) == len(runs) == 1 + 2 * 10 * 2 * 2
    assert {(run.fraction, run.teacher) for run in runs if run.model == "E1-30px"} == {
        (fraction, teacher) for fraction in (1.0, 0.25) for teacher in (None, "T1")
    }
    both = label_fractions(setting, ["S1", "E1"])
    assert {run.model for run in both} == {"T1", "S1", "E1"} and set(label_fractions(setting)) < set(both)
    shared = set(label_fractions(setting)) & set(runs)
    assert {run.method for run in shared} == {"T1", "S1", "S1@25", "KD(T1,S1):predictions", "KD(T1,S1)@25:predictions"}
    pruned = [run for run in runs if run.model == "T1-pruned"]
    assert {run.origin for run in pruned} == {setting.run("T1", fraction=fraction) for fraction in (1.0, 0.25)}, (
        "from the T1 of the same labels, whatever the seed"
    )
    asked = requested_runs("10_capacity", {"results": tmp_path, "students": ["T1-pruned"], "fractions": [0.25]})
    assert [run.method for run in asked] == ["T1@25", "T1", "T1-pruned@25", "KD(T1,T1-pruned)@25:predictions"]
    assert len({run_key(run, tmp_path) for run in runs}) == len(runs)
    some = capacity(setting, ["S1", "E1"], repeated=["E1"])
    assert {(run.model, run.seed) for run in some if not run.is_teacher} == {("S1", 0), ("E1", 0), ("E1", 1)}
    other = dataclasses.replace(pruned[0], teacher_seed=1)
    assert run_key(other, tmp_path) != run_key(pruned[0], tmp_path), "another T1 is another start"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"students": ["T2"]}, "student 'T2' does not exist: choose from S1, S2, E1, E1-quarter"),
        ({"students": ["E1", "E1"]}, "students .'E1', 'E1'.: give at least one, and each once"),
        ({"fractions": []}, "fractions ..: give at least one, and each once"),
        ({"fractions": [2.0]}, "fraction 2.0"),
        ({"fractions": [1.0, 0.5, 0.25]}, "fractions .1.0, 0.5, 0.25.: give one or two"),
        ({"teacher": "E1"}, "teacher 'E1' does not exist: choose from T1, T2"),
        ({"students": ["S1"], "repeated": ["E1"]}, "repeated student 'E1' does not exist: choose from S1"),
    ],
)
def test_capacity_refuses_in_one_line_what_it_cannot_train(tmp_path, given, message):
    with pytest.raises(InputError, match=message) as caught:
        requested_runs("10_capacity", {"results": tmp_path} | given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("notebook", "given", "message"),
    [
        ("03_ablation", {"student": "T1"}, "student 'T1' does not exist: choose from S1"),
        ("04_loss_comparison", {"student": "T2"}, "student 'T2' does not exist: choose from S1"),
        ("07_fractions", {"students": ["S1", "T1"]}, "student 'T1' does not exist: choose from S1"),
        ("07_fractions", {"students": []}, "students ..: give at least one, and each once"),
        ("07_fractions", {"fractions": [0.5, 0.5]}, "fractions .0.5, 0.5.: give at least one, and each once"),
        ("08_length", {"student": "T1"}, "student 'T1' does not exist: choose from S1"),
        ("08_length", {"lengths": []}, "lengths ..: give at least one, and each once"),
    ],
)
def test_what_could_not_be_compared_is_refused_before_it_is_trained(tmp_path, notebook, given, message):
    with pytest.raises(InputError, match=message):
        requested_runs(notebook, {"results": tmp_path} | given)


def test_slices_or_volumes_is_the_same_study_twice(tmp_path):
    given = {"results": tmp_path, "profile": "hippocampus", "volumes": "hippocampus3d", "seeds": (0, 1)}
    runs = requested_runs("11_dimensions", given)
    flat, deep = ([run for run in runs if run.preprocessing.dimensions == number] for number in (2, 3))
    assert {run.model for run in flat} == {"T1", "S1", "S2", "E1"} and {run.model for run in deep} == {"T1", "S1", "E1"}
    named = {(run.method, run.seed) for run in deep}
    assert named < {(f"3D {run.method}", run.seed) for run in flat} and len(deep) == 1 + 2 * (2 + 2 + 2)
    own = requested_runs("11_dimensions", {"results": tmp_path, "changes": {"spacing": 9.0}})
    assert {(run.preprocessing.dimensions, run.preprocessing.size, run.preprocessing.spacing) for run in own} == {
        (2, 48, 9.0), (3, 32, 9.0)
    }  # fmt: skip
    assert {run.method for run in own if run.preprocessing.dimensions == 3 and run.is_teacher} == {"3D T1"}
    for name in ("hippocampus", "ct96", "thesis"):
        assert requested_runs("11_dimensions", {"results": tmp_path, "profile": name})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"volumes": "ct96"}, "profile 'ct96' of the volumes: its dimensions must be 3"),
        (
            {"profile": "ct96", "volumes": "hippocampus3d"},
            "4 folds of the slices, 5 of the volumes: patients are compar",
        ),
        ({"profile": "hippocampus3d"}, "profile 'hippocampus3d' of the slices: its dimensions must be 2"),
    ],
)
def test_volumes_against_volumes_or_slices_against_slices_are_refused(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        requested_runs("11_dimensions", {"results": tmp_path} | given)


def test_a_teacher_too_narrow_to_prune_is_refused_before_anything_is_trained(tmp_path):
    setting = Setting(results=tmp_path, changes={"width": 0.03})
    with pytest.raises(InputError, match="T1-pruned, profile quick: it keeps 9 channels of encoder.2.* from has 8"):
        check(capacity(setting, ["T1-pruned"]))


def test_a_sweep_gives_both_the_same_number_of_trials(tmp_path):
    setting = Setting(results=tmp_path)
    runs = sweep(setting)
    alone, taught = [run for run in runs if not run.teacher], [run for run in runs if run.teacher]
    assert len(alone) == len(taught) == len({run.method for run in alone}) == len({run.method for run in taught}) == 9
    assert {run.optimisation.lr for run in alone} == {4e-3, 8e-3, 1.6e-2}
    assert {run.optimisation for run in taught} == {setting.sized.student}
    assert {run.recipe.balance for run in taught} == {None, 0.5}
    assert len({run_key(run, tmp_path) for run in runs}) == 18
    of_profile = next(run for run in alone if run.optimisation == setting.sized.student)
    assert run_key(of_profile, tmp_path) == run_key(setting.run("S1", fraction=0.5), tmp_path), "trained once"
    with pytest.raises(InputError, match="2 trials of the student alone and 9 of the distilled one"):
        sweep(setting, alone={"lr": (1e-3, 2e-3)})
    with pytest.raises(InputError, match="sweep: alone 'rate' does not exist: choose from optimiser, lr"):
        sweep(setting, alone={"rate": (1e-3,)})
    (one,) = [run for run in sweep(setting, alone={"batch": [4]}, taught={"balance": [0.5]}) if run.teacher]
    assert one.recipe.balance == 0.5 and one.recipe.terms[0].temperature == 1 and one.recipe.warmup == 0


def test_a_teacher_has_seen_no_validation_or_test_patient_of_its_student(tmp_path):
    """Of every experiment, fold and label fraction, and of every teacher of an ensemble."""
    setting = Setting(results=tmp_path, folds=(0, 1))
    runs = [run for design in EXPERIMENTS.values() for run in design(setting)]
    ensemble = setting.run("S1", fold=1, fraction=0.5, teacher="T1+T2", recipe=thesis_recipe("S1"))
    pairs = [(run, teacher) for run in (*runs, ensemble) for teacher in run.teacher_runs().values()]
    assert {teacher.model for _, teacher in pairs} == {"T1", "T2", "S1"} and {run.fold for run, _ in pairs} == {0, 1}
    for run, teacher in pairs:
        mine, its = run_source(run, tmp_path), run_source(teacher, tmp_path)
        fold, seen = mine.folds[run.fold], its.folds[teacher.fold].subset(teacher.fraction)
        patients = its.folds[teacher.fold].groups
        held_out = {fold.groups[case] for case in (*fold.val, *fold.test)}
        assert not held_out & {patients[case] for case in seen}, (run.method, teacher.method)
