"""Settings are checked once, and each experiment asks for the runs that its question needs."""

from __future__ import annotations

import pytest

from kdlib.config import SWITCHES, InputError
from kdlib.experiments import EXPERIMENTS, Setting, ablation, baseline, distillation, negative_controls, requested_runs
from kdlib.experiments.dry_run import describe


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
    with pytest.raises(
        InputError, match="parameter of 03_ablation 'loss' does not exist: choose from .*student, teacher"
    ):
        requested_runs("03_ablation", {"results": tmp_path, "loss": "kl"})
    with pytest.raises(InputError, match="has several classes"):
        requested_runs("05_correction", {"results": tmp_path, "target": "all"})


def test_a_dry_run_lists_what_would_be_trained(tmp_path):
    plan = {"shared": {"results": str(tmp_path), "device": "cpu"}, "parameters": {}}
    plan["parameters"] = {name: {"results": str(tmp_path)} for name in ("00_data", "01_baseline", "03_ablation")}
    text = describe(plan)
    assert "00_data: no runs" in text and "01_baseline: 8 runs, 0 of them done" in text
    assert "    KD(T1,S1)@50:PMD, fold 0, seed 0: 400 steps, time unknown, runs/" in text
    assert text.splitlines()[-1] == "to train: 23 runs, time unknown"
    assert set(EXPERIMENTS) >= {"01_baseline", "05_correction"} and requested_runs("06_figures", {}) == []
