"""The loop: reproducible, the same alone and in a cohort, blind to the test part, loud about dead terms and NaN."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from kdlib import train as training
from kdlib.config import PROTOCOLS, Profile, Recipe, Run, Term, TrainingError, View, thesis_recipe
from kdlib.data import SliceBank
from kdlib.losses import LOSSES
from kdlib.train import EpochLog, gradient_norm, new_arm, new_model, order, steps_per_epoch, train_cohort

CPU = torch.device("cpu")
TINY = Profile("tiny", View(32), 0.125, 2, 2, 3, 3, folds=4)


def blobs(cases: int = 2, slices: int = 6, seed: int = 0, classes: int = 1) -> SliceBank:
    """Bright squares on noise: something a network can learn within a few steps."""
    generator = torch.Generator().manual_seed(seed)
    n = cases * slices
    images = torch.randint(0, 80, (n, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.zeros(n, 32, 32, dtype=torch.uint8)
    for i in range(n):
        top, left = torch.randint(2, 18, (2,), generator=generator).tolist()
        labels[i, top : top + 12, left : left + 12] = 1 + i % classes
    images[labels > 0] += 120
    index = torch.arange(n)
    return SliceBank(
        images, labels, index // slices, torch.stack([index, index], 1), tuple(f"c{i}" for i in range(cases)),
        tuple(f"class{i}" for i in range(classes)), "repeat", {},
    )  # fmt: skip


def run_of(model: str = "S1", **changes) -> Run:
    return Run("phantom", "spleen", model, profile=TINY, **changes)


def distilled(only=("E-E", "B-B", "D-D", "PMD"), loss="labelled", model="S1", seed=0) -> Run:
    return run_of(model, teacher="T1", recipe=thesis_recipe(model, loss, only), fraction=0.5, seed=seed)


def frozen_teacher() -> torch.nn.Module:
    return new_model(run_of("T1"), 1).eval().requires_grad_(False)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_one(run: Run, teacher=None, **kwargs):
    return train_cohort([run], blobs(), blobs(1, seed=9), 3, CPU, teacher, **kwargs)[0]


@pytest.mark.parametrize("run", [run_of("S1"), run_of("T1"), distilled()], ids=["baseline", "teacher", "distilled"])
def test_same_seed_same_weights_to_the_bit(run):
    teacher = frozen_teacher() if run.teacher else None
    first, second = (train_one(run, teacher) for _ in range(2))
    assert same(first.model.state_dict(), second.model.state_dict()) and same(first.best, second.best)
    other = train_one(dataclasses.replace(run, seed=1), teacher)
    assert not same(first.model.state_dict(), other.model.state_dict())


def test_cohort_and_alone_give_the_same_weights():
    runs = [
        distilled(),
        distilled(("PMD",)),
        distilled(("B-B", "D-D"), "infonce"),
        distilled(("E-E",), "mse"),
        distilled(model="S2"),
    ]
    teacher = frozen_teacher()
    together = train_cohort(runs, blobs(), blobs(1, seed=9), 3, CPU, teacher)
    for run, arm in zip(runs, together, strict=True):
        alone = train_one(run, teacher)
        assert same(arm.model.state_dict(), alone.model.state_dict()), run.recipe.name
        assert arm.history == alone.history


def test_the_teacher_is_untouched_by_a_cohort():
    teacher = frozen_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    train_cohort([distilled()], blobs(), blobs(1), 3, CPU, teacher)
    assert same(before, teacher.state_dict())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_order_is_shuffled_passes_and_depends_on_the_seed_alone():
    batches = order(10, 4, seed=3)
    drawn = torch.cat([next(batches) for _ in range(5)])
    assert sorted(drawn[:10].tolist()) == list(range(10)) == sorted(drawn[10:].tolist())
    assert drawn[:10].tolist() != drawn[10:].tolist()
    again = order(10, 4, seed=3)
    assert torch.equal(drawn, torch.cat([next(again) for _ in range(5)]))
    assert not torch.equal(drawn[:4], next(order(10, 4, seed=4)))
    assert len(next(order(3, 8, seed=0))) == 8, "a batch larger than the data is filled from further passes"


def test_initial_weights_do_not_depend_on_the_recipe():
    assert same(new_model(run_of("S1"), 1).state_dict(), new_model(distilled(), 1).state_dict())


def test_students_of_every_fraction_have_the_same_budget():
    free = dataclasses.replace(TINY, teacher_steps=None, student_steps=None)
    whole, half = (Run("phantom", "spleen", "S1", fraction=f, profile=free) for f in (1.0, 0.5))
    assert steps_per_epoch(whole, 320) == steps_per_epoch(half, 320) == 10
    assert steps_per_epoch(Run("phantom", "spleen", "T1", profile=free), 320) == 20
    assert steps_per_epoch(run_of("S1"), 320) == 3


def test_schedule_warms_up_and_decays():
    arm = new_arm(run_of("S1"), 1, 100, CPU, None)
    factor = arm.schedule.lr_lambdas[0]
    assert factor(0) == pytest.approx(0.2) and factor(4) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.04)))
    assert factor(50) == pytest.approx(0.5) and factor(99) < 0.001
    thesis = new_arm(run_of("S1", protocol=PROTOCOLS["thesis"]), 1, 100, CPU, None)
    assert {thesis.schedule.lr_lambdas[0](step) for step in range(100)} == {1.0}


def test_protocols_choose_the_optimiser():
    thesis = PROTOCOLS["thesis"]
    student = Run("phantom", "spleen", "S1", teacher="T1", recipe=thesis_recipe("S1"), profile=TINY, protocol=thesis)
    arm = new_arm(student, 1, 10, CPU, frozen_teacher())
    assert isinstance(arm.optimiser, torch.optim.RMSprop) and arm.optimiser.defaults["lr"] == 1e-2
    arm = new_arm(run_of("T1", protocol=thesis), 1, 10, CPU, None)
    assert isinstance(arm.optimiser, torch.optim.AdamW) and arm.optimiser.defaults["betas"] == (0.9, 0.95)


def test_projectors_are_in_the_optimiser_and_move():
    arm = new_arm(distilled(), 1, 10, CPU, frozen_teacher())
    optimised = {id(parameter) for group in arm.optimiser.param_groups for parameter in group["params"]}
    assert all(id(parameter) in optimised for parameter in arm.distiller.parameters())
    trained = train_one(distilled(), frozen_teacher())
    for name, parameter in trained.distiller.named_parameters():
        assert not torch.equal(parameter, dict(arm.distiller.named_parameters())[name]), name


def test_a_baseline_learns_and_the_best_epoch_is_kept():
    profile = dataclasses.replace(TINY, student_epochs=6, student_steps=15)
    arm = train_cohort([Run("phantom", "spleen", "S1", profile=profile)], blobs(4), blobs(2, seed=9), 15, CPU)[0]
    dice = {row["epoch"]: row["value"] for row in arm.history if row["name"] == "val_dice"}
    assert arm.best_dice == max(dice.values()) == dice[arm.best_epoch] > 0.6
    assert arm.best_epoch == min(epoch for epoch, value in dice.items() if value == arm.best_dice)


def test_history_has_every_term_and_its_gradient():
    names = {row["name"] for row in train_one(distilled(), frozen_teacher()).history}
    terms = {"segmentation", "E-E", "B-B", "D-D", "PMD"}
    assert names == terms | {f"grad/{term}" for term in terms} | {"loss", "val_dice", "lr"}
    assert "reconstruction" in {row["name"] for row in train_one(run_of("T1")).history}


def test_a_term_that_passes_no_gradient_stops_its_arm_and_no_other(monkeypatch):
    class Constant(torch.nn.Module):
        def __init__(self, temperature):
            super().__init__()

        def forward(self, student, teacher, labels=None, generator=None):
            return torch.tensor(3.0)

    monkeypatch.setitem(LOSSES, "infonce", Constant)
    arms = train_cohort([distilled(("B-B",), "infonce"), distilled()], blobs(), blobs(1), 3, CPU, frozen_teacher())
    assert "B-B (infonce) passed no gradient" in str(arms[0].failure) and "epoch 1" in str(arms[0].failure)
    assert arms[1].failure is None and arms[1].best


def test_the_published_prediction_term_would_be_caught():
    """Fault 2: a softmax over one channel is exactly 1, so the term and its gradient are exactly 0."""
    arm = new_arm(distilled(("PMD",)), 1, 10, CPU, frozen_teacher())
    log, logits = EpochLog(arm), torch.randn(2, 1, 8, 8, requires_grad=True)
    published = torch.nn.functional.kl_div(logits.log_softmax(1), torch.randn(2, 1, 8, 8).softmax(1), reduction="sum")
    log.add(
        {"loss": published, "segmentation": published, "PMD": published},
        {"segmentation": torch.ones(()), "PMD": torch.zeros(())},
    )
    with pytest.raises(TrainingError, match="PMD .* was exactly zero in epoch 4"):
        log.rows(4)


def test_a_gradient_that_is_zero_in_one_step_is_measured_again():
    arm = new_arm(distilled(("PMD",)), 1, 10, CPU, frozen_teacher())
    log = EpochLog(arm)
    assert log.unmeasured() == ["segmentation", "PMD"]
    log.add({"PMD": torch.ones(())}, {"segmentation": torch.ones(()), "PMD": torch.zeros(())})
    assert log.unmeasured() == ["PMD"]


def test_nan_stops_with_arm_epoch_and_loss(monkeypatch):
    bank = blobs()
    arms = train_cohort([run_of("S1")], bank, blobs(1), 3, CPU)
    assert arms[0].failure is None
    monkeypatch.setattr(training, "augment", lambda images, labels, generator: (images * float("nan"), labels))
    failure = train_cohort([run_of("S1")], bank, blobs(1), 3, CPU)[0].failure
    assert isinstance(failure, TrainingError)
    assert "S1, fold 0, seed 0" in str(failure) and "nan in epoch 1" in str(failure)


def test_gradient_norm_is_the_norm_of_the_gradient():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    unused = torch.nn.Parameter(torch.ones(2))
    assert gradient_norm((weight**2).sum() / 2, [weight, unused]) == pytest.approx(5.0)
    assert gradient_norm(torch.tensor(1.0), [weight]) == 0


def test_weights_of_the_recipe_scale_the_logged_gradient():
    recipe = Recipe("p", terms=(Term("PMD", "kl", 0.2, 4.0),))
    double = Recipe("p", terms=(Term("PMD", "kl", 0.4, 4.0),))
    logged = []
    for chosen in (recipe, double):
        run = run_of("S1", teacher="T1", recipe=chosen, fraction=0.5)
        logged.append(
            next(row["value"] for row in train_one(run, frozen_teacher()).history if row["name"] == "grad/PMD")
        )
    assert logged[1] == pytest.approx(2 * logged[0], rel=1e-5)


def test_plain_lines_where_asked(monkeypatch, capsys):
    monkeypatch.setenv("KDLIB_PROGRESS", "plain")
    train_one(run_of("S1"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == TINY.student_epochs and "epoch 1/2" in lines[0] and "validation Dice" in lines[0]


@pytest.mark.gpu
def test_gpu_trains_in_bf16_channels_last():
    device = torch.device("cuda")
    teacher = frozen_teacher().to(device, memory_format=torch.channels_last)
    arms = train_cohort(
        [distilled(), distilled(model="S2")], blobs().to(device), blobs(1).to(device), 3, device, teacher
    )
    for arm in arms:
        assert arm.failure is None
        assert all(math.isfinite(row["value"]) for row in arm.history)
        assert next(arm.model.parameters()).is_cuda
