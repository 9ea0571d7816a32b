"""The loop: reproducible, the same alone and in a cohort, blind to the test part, loud about dead terms and NaN."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch
from small_training import CPU, TINY, blobs, distilled, frozen_teacher, run_of, same, train_one

from kdlib.config import PROTOCOLS, InputError, Recipe, Run, Term, TrainingError
from kdlib.data.sampling import batch_indices
from kdlib.experiments.recipes import pseudo_labels, thesis_recipe, unused_images
from kdlib.losses import LOSSES
from kdlib.models import MODELS, ExternalModel
from kdlib.training import batch
from kdlib.training import loop as training
from kdlib.training.batch import Batch
from kdlib.training.frozen import teacher_forward
from kdlib.training.hooks import FeatureHooks
from kdlib.training.loop import balance, train_cohort, training_step
from kdlib.training.schedule import epochs_of, steps_per_epoch
from kdlib.training.state import new_model, new_state


@pytest.mark.parametrize("run", [run_of("S1"), run_of("T1"), distilled()], ids=["baseline", "teacher", "distilled"])
def test_same_seed_same_weights_to_the_bit(run):
    teacher = frozen_teacher() if run.teacher else None
    first, second = (train_one(run, teacher) for _ in range(2))
    assert same(first.model.state_dict(), second.model.state_dict()) and same(first.best, second.best)
    other = train_one(dataclasses.replace(run, seed=1), teacher)
    assert not same(first.model.state_dict(), other.model.state_dict())


def test_cohort_and_alone_give_the_same_weights():
    runs = [distilled(), distilled(("B-B", "D-D"), "infonce"), distilled(("E-E",), "fitnet"), distilled(model="S2")]
    teacher = frozen_teacher()
    together = train_cohort(runs, blobs(), blobs(1, seed=9), 3, CPU, teacher)
    for run, arm in zip(runs, together, strict=True):
        alone = train_one(run, teacher)
        assert same(arm.model.state_dict(), alone.model.state_dict()), run.recipe.name
        assert arm.history == alone.history


def test_a_training_keeps_what_its_steps_free(monkeypatch):
    kept = []
    monkeypatch.setattr(training, "keep_freed_memory", lambda: kept.append(True))
    train_one(run_of("S1"))
    assert kept == [True]


def test_the_teacher_is_untouched_by_a_cohort():
    teacher = frozen_teacher()
    before = {name: tensor.clone() for name, tensor in teacher["T1"].state_dict().items()}
    train_cohort([distilled()], blobs(), blobs(1), 3, CPU, teacher)
    assert same(before, teacher["T1"].state_dict())
    assert not any(module._forward_hooks for module in teacher["T1"].modules())


def test_order_is_shuffled_passes_and_depends_on_the_seed_alone():
    ten, three = torch.ones(10, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    batches = batch_indices(ten, 4, seed=3)
    drawn = torch.cat([next(batches) for _ in range(5)])
    assert sorted(drawn[:10].tolist()) == list(range(10)) == sorted(drawn[10:].tolist())
    assert drawn[:10].tolist() != drawn[10:].tolist()
    again = batch_indices(ten, 4, seed=3)
    assert torch.equal(drawn, torch.cat([next(again) for _ in range(5)]))
    assert not torch.equal(drawn[:4], next(batch_indices(ten, 4, seed=4)))
    assert len(next(batch_indices(three, 8, seed=0))) == 8, "a batch larger than the data is filled from further passes"


def test_initial_weights_do_not_depend_on_the_recipe():
    assert same(new_model(run_of("S1"), 1).state_dict(), new_model(distilled(), 1).state_dict())


def test_students_of_every_fraction_have_the_same_budget():
    free = dataclasses.replace(TINY, teacher_steps=None, student_steps=None)
    whole, half = (Run("phantom", "spleen", "S1", fraction=f, profile=free) for f in (1.0, 0.5))
    assert steps_per_epoch(whole, 320) == steps_per_epoch(half, 320) == 10
    assert steps_per_epoch(Run("phantom", "spleen", "T1", profile=free), 320) == 20
    assert steps_per_epoch(run_of("S1"), 320) == 3


def test_schedule_warms_up_and_decays():
    arm = new_state(run_of("S1"), 1, 100, CPU, {})
    factor = arm.schedule.lr_lambdas[0]
    assert factor(0) == pytest.approx(0.2) and factor(4) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.04)))
    assert factor(50) == pytest.approx(0.5) and factor(99) < 0.001
    thesis = new_state(run_of("S1", protocol=PROTOCOLS["thesis"]), 1, 100, CPU, {})
    assert {thesis.schedule.lr_lambdas[0](step) for step in range(100)} == {1.0}


def test_protocols_choose_the_optimiser():
    thesis = PROTOCOLS["thesis"]
    student = Run("phantom", "spleen", "S1", teacher="T1", recipe=thesis_recipe("S1"), profile=TINY, protocol=thesis)
    arm = new_state(student, 1, 10, CPU, frozen_teacher())
    assert isinstance(arm.optimiser, torch.optim.RMSprop) and arm.optimiser.defaults["lr"] == 1e-2
    arm = new_state(run_of("T1", protocol=thesis), 1, 10, CPU, {})
    assert isinstance(arm.optimiser, torch.optim.AdamW) and arm.optimiser.defaults["betas"] == (0.9, 0.95)


def test_projectors_are_in_the_optimiser_and_move():
    arm = new_state(distilled(), 1, 10, CPU, frozen_teacher())
    optimised = {id(parameter) for group in arm.optimiser.param_groups for parameter in group["params"]}
    assert all(id(parameter) in optimised for parameter in arm.distiller.parameters())
    trained = train_one(distilled(), frozen_teacher())
    for name, parameter in trained.distiller.named_parameters():
        assert not torch.equal(parameter, dict(arm.distiller.named_parameters())[name]), name


def test_a_baseline_learns_and_the_best_epoch_is_kept():
    profile = dataclasses.replace(TINY, student_epochs=4, student_steps=15)
    arm = train_cohort([Run("phantom", "spleen", "S1", profile=profile)], blobs(4), blobs(2, seed=9), 15, CPU)[0]
    dice = {row["epoch"]: row["value"] for row in arm.history if row["name"] == "val_dice"}
    assert arm.best_dice == max(dice.values()) == dice[arm.best_epoch] > 0.6
    assert arm.best_epoch == min(epoch for epoch, value in dice.items() if value == arm.best_dice)


def test_history_has_every_term_and_its_gradient():
    names = {row["name"] for row in train_one(distilled(), frozen_teacher()).history}
    terms = {"segmentation", "E-E", "B-B", "D-D", "PMD"}
    measured = {f"{kind}/{term}" for kind in ("grad", "share", "cosine") for term in terms}
    assert names == terms | measured | {f"projector_change/{term}" for term in ("E-E", "B-B", "D-D")} | {
        "loss",
        "val_dice",
        "lr",
    }
    assert "reconstruction" in {row["name"] for row in train_one(run_of("T1")).history}


def test_a_term_that_passes_no_gradient_stops_its_arm_and_no_other(monkeypatch):
    class Constant(torch.nn.Module):
        reads, adapt, needs_labels = "features", "both", False

        def __init__(self, temperature=None):
            super().__init__()

        def forward(self, student, teacher, labels=None, context=None):
            return torch.tensor(3.0)

    monkeypatch.setitem(LOSSES, "infonce", Constant)
    arms = train_cohort([distilled(("B-B",), "infonce"), distilled()], blobs(), blobs(1), 3, CPU, frozen_teacher())
    assert "B-B (infonce) passed no gradient" in str(arms[0].failure) and "epoch 1" in str(arms[0].failure)
    assert arms[1].failure is None and arms[1].best


def test_a_loss_that_cannot_be_of_such_a_batch_stops_its_run_and_no_other():
    one = dataclasses.replace(TINY, student=dataclasses.replace(TINY.student, batch=1))
    runs = [dataclasses.replace(distilled(("B-B",), loss), profile=one) for loss in ("infonce", "fitnet")]
    arms = train_cohort(runs, blobs(), blobs(1), 3, CPU, frozen_teacher())
    assert "needs at least two images" in str(arms[0].failure)
    assert arms[1].failure is None and arms[1].step == 6


def test_a_student_with_a_frozen_layer_can_be_distilled(monkeypatch):
    def build(dims, channels, classes):
        net = torch.nn.Sequential(torch.nn.Conv2d(channels, 4, 1), torch.nn.Conv2d(4, classes, 1))
        net[0].requires_grad_(False)
        return ExternalModel(net, {"bottleneck": "0", "decoder1": "1"})

    monkeypatch.setitem(MODELS, "Frozen", build)
    recipe = Recipe("r", terms=(Term("x", "fitnet", 1.0, student_layers="decoder1"),))
    run = run_of("Frozen", teacher="T1", recipe=recipe, fraction=0.5)
    arm = train_one(run, frozen_teacher())
    assert arm.failure is None and arm.best_epoch
    assert torch.equal(arm.model.network[0].weight, new_model(run, 1).network[0].weight)


def test_a_loss_may_learn_a_number(monkeypatch):
    class Scaled(LOSSES["fitnet"]):
        adapt = "student"

        def __init__(self):
            super().__init__()
            self.log = torch.nn.Parameter(torch.zeros(()))

        def compare(self, *parts):
            return super().compare(*parts) * self.log.exp()

    monkeypatch.setitem(LOSSES, "fitnet", Scaled)
    arm = train_one(distilled(("B-B",), "fitnet"), frozen_teacher())
    assert arm.failure is None and arm.distiller.terms["B-B"].loss.log != 0


def test_infonce_is_logged_against_chance():
    history = train_one(distilled(("B-B",), "infonce"), frozen_teacher()).history
    value, chance = (
        next(row["value"] for row in history if row["name"] == name) for name in ("B-B", "infonce_over_chance/B-B")
    )
    assert chance == pytest.approx(value / math.log(16))


def test_a_learned_projector_that_does_not_change_stops_its_run(monkeypatch):
    """Without its gradient, a teacher's projector still shrinks by weight decay, which is no change."""
    original = training.new_state

    def without_gradient(*args, **kwargs):
        state = original(*args, **kwargs)
        state.distiller.terms["B-B"].adapters[0].teacher.conv.weight.register_hook(torch.zeros_like)
        return state

    monkeypatch.setattr(training, "new_state", without_gradient)
    failure = train_one(distilled(("B-B",)), frozen_teacher()).failure
    assert "B-B (supcon) did not change one of its learned projectors in epoch 1" in str(failure)


def test_a_projector_that_moves_less_than_weight_decay_shrinks_it_is_no_failure():
    """As in long epochs: the decay of all their steps together is larger than the way between two of their ends."""
    run = distilled(("B-B",))
    how = dataclasses.replace(run.profile.student, weight_decay=0.3 / run.profile.student.lr)
    state = train_one(dataclasses.replace(run, profile=dataclasses.replace(run.profile, student=how)), frozen_teacher())
    assert state.failure is None


@pytest.mark.parametrize("kind", ["frozen", "redrawn"])
def test_controls_on_projectors(kind):
    terms = (Term("B-B", "infonce", 0.2, 0.4, projector="frozen" if kind == "frozen" else "learned"),)
    recipe = Recipe(kind, terms=terms, redrawn_projectors=kind == "redrawn")
    run = run_of("S1", teacher="T1", recipe=recipe, fraction=0.5)
    start = new_state(run, 1, 6, CPU, frozen_teacher()).distiller.state_dict()
    first, second = (train_one(run, frozen_teacher()) for _ in range(2))
    assert first.failure is None and same(first.model.state_dict(), second.model.state_dict())
    assert same(start, first.distiller.state_dict()) == (kind == "frozen")
    optimised = {id(parameter) for group in first.optimiser.param_groups for parameter in group["params"]}
    assert not any(id(parameter) in optimised and parameter.requires_grad for parameter in first.distiller.parameters())
    assert not any(row["name"].startswith("projector_change/") for row in first.history)


def test_all_weights_zero_is_no_distillation():
    """Terms of weight 0 are not computed; with a weight that rounding makes nothing of, they change nothing."""
    recipe, found = thesis_recipe("S1"), {}
    for weight in (0.0, 1e-30):
        kinds = {"PMD": "learned"}  # a projector that learns nothing would stop the run
        terms = tuple(
            dataclasses.replace(term, weight=weight, projector=kinds.get(term.name, "frozen")) for term in recipe.terms
        )
        run = run_of("S1", teacher="T1", recipe=dataclasses.replace(recipe, terms=terms), fraction=0.5)
        found[weight] = train_one(run, frozen_teacher())
        assert found[weight].failure is None
    baseline = train_one(run_of("S1", fraction=0.5)).model.state_dict()
    assert {weight: arm.distiller is None for weight, arm in found.items()} == {0.0: True, 1e-30: False}
    assert same(found[0.0].model.state_dict(), baseline)
    for name, tensor in baseline.items():
        torch.testing.assert_close(found[1e-30].model.state_dict()[name], tensor, atol=1e-5, rtol=1e-3)


def test_before_the_end_of_its_warm_up_a_distilled_student_is_a_baseline():
    recipe = dataclasses.replace(distilled().recipe, warmup=0.5)  # of 2 epochs of 3 steps
    taught, alone = dataclasses.replace(distilled(), recipe=recipe), run_of("S1", fraction=0.5)
    seen: dict[Run, list[torch.Tensor]] = {taught: [], alone: []}  # weights after each epoch
    for run, teachers in ((taught, frozen_teacher()), (alone, None)):

        def keep(states, at=seen[run]):
            at.append(torch.cat([weight.detach().flatten() for weight in states[0].model.parameters()]))

        train_one(run, teachers, on_epoch=keep)
    differences = [(a - b).abs().max().item() for a, b in zip(*seen.values(), strict=True)]
    assert differences[0] < 1e-5 and differences[1] > 1e-3, differences
    with pytest.raises(InputError, match="recipe 'alone', warmup 0.5: it is for terms, and there are none"):
        Recipe("alone", warmup=0.5)


def test_a_balanced_recipe_gives_its_terms_the_gradient_it_says():
    terms = (Term("B-B", "fitnet", 1.0), Term("PMD", "kl", 3.0, 4.0))
    run = run_of("S1", teacher="T1", recipe=Recipe("b", terms=terms, balance=0.5), fraction=0.5)
    # one step an epoch, so that what is logged is what the weights were set from
    arm = train_cohort([run], blobs(), blobs(1, seed=9), 1, CPU, frozen_teacher())[0]
    for epoch in (1, 2):
        rows = {row["name"]: row["value"] for row in arm.history if row["epoch"] == epoch}
        assert rows["grad/B-B"] == pytest.approx(0.5 * rows["grad/segmentation"] / 4, rel=1e-4)
        assert rows["grad/PMD"] == pytest.approx(0.5 * rows["grad/segmentation"] * 3 / 4, rel=1e-4)
        assert rows["weight/PMD"] * rows["PMD"] > 0


def test_a_loss_that_is_as_good_as_solved_gets_no_boundless_weight():
    terms = (Term("B-B", "fitnet", 1.0), Term("PMD", "kl", 3.0, 4.0))
    run = run_of("S1", teacher="T1", recipe=Recipe("b", terms=terms, balance=0.5), fraction=0.5)
    arm = new_state(run, 1, 6, CPU, frozen_teacher())
    arm.begin_epoch()
    balance(arm, {"segmentation": 1.0, "B-B": 0.5, "PMD": 1e-9})
    first = dict(arm.weights)
    assert first["PMD"] == pytest.approx(0.5 * 0.4 * 3 / 4 / 1e-9), "the first weight, however large"
    for epoch, silent in ((1, 0.0), (2, 1.0), (3, 5.0)):  # during a warm-up the weight in use is 0
        arm.history += [
            dict(epoch=epoch, name=f"weight/{name}", value=silent * first[name])
            for name in first
            if name != "segmentation"
        ]
    balance(arm, {"segmentation": 1.0, "B-B": 1e-9, "PMD": 1e-9})
    assert arm.weights["B-B"] == 100 * first["B-B"], "of the first epoch in which it acts"
    assert arm.weights["PMD"] == first["PMD"]


def test_a_batch_without_foreground_balances_nothing():
    terms = (Term("B-B", "fitnet", 1.0),)
    run = run_of("S1", teacher="T1", recipe=Recipe("b", terms=terms, balance=0.5), fraction=0.5)
    arm = new_state(run, 1, 6, CPU, frozen_teacher())
    images, labels = blobs().batch(torch.arange(4))
    teacher = frozen_teacher()["T1"]
    seen = {"T1": teacher_forward(FeatureHooks(teacher, ["bottleneck"]), images)}
    batch = Batch(images, labels, torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), 0, seen)
    training_step(arm, dataclasses.replace(batch, labels=torch.zeros_like(labels)))
    assert arm.weights["B-B"] == 1.0 and not arm.diagnostics.balanced
    assert arm.diagnostics.unmeasured() == ["segmentation", "B-B"], "measured until it is balanced"
    training_step(arm, batch)
    assert arm.weights["B-B"] != 1.0 and arm.diagnostics.balanced


def test_a_memory_takes_in_the_training_patients_alone():
    terms = (Term("B-B", "supcon", 0.2, 0.1, options={"memory": 64, "hard": 0.5, "same_patient": True}),)
    run = run_of("S1", teacher="T1", recipe=Recipe("memory", terms=terms), fraction=0.5)
    bank = dataclasses.replace(blobs(3), patients=(7, 7, 9))
    assert bank.patient_of(torch.tensor([0, 6, 12])).tolist() == [7, 7, 9]
    arm = train_cohort([run], bank, blobs(1, seed=9), 3, CPU, frozen_teacher())[0]
    memory = arm.distiller.terms["B-B"].loss.bank
    assert arm.failure is None and len(memory) == 64 and memory.admitted.tolist() == [7, 9]
    assert set(memory.entries()[2].tolist()) <= {7, 9}


def test_label_smoothing_changes_the_targets_alone():
    plain, smooth = run_of("S1"), run_of("S1", recipe=Recipe("smooth", smoothing=0.1))
    a, b = train_one(plain), train_one(smooth)
    assert not same(a.model.state_dict(), b.model.state_dict())
    assert same(new_model(plain, 1).state_dict(), new_model(smooth, 1).state_dict())


def test_two_teachers_teach_one_student():
    teachers = frozen_teacher() | {"T2": new_model(run_of("T2"), 1).eval().requires_grad_(False)}
    run = run_of("S1", teacher="T1+T2", recipe=thesis_recipe("S1"), fraction=0.5)
    arm = train_one(run, teachers)
    assert arm.failure is None and run.method.startswith("KD(T1+T2,S1)@50:")
    assert arm.weights["T1 PMD"] == arm.weights["T2 PMD"] == 0.1
    assert {"T1 B-B", "share/T2 D-D"} <= {row["name"] for row in arm.history}


def test_a_student_teaches_itself():
    run = run_of("S1", teacher="S1", recipe=thesis_recipe("S1"), fraction=0.5)
    (teacher,) = run.teacher_runs().values()
    assert (teacher.model, teacher.fraction, teacher.teacher, teacher.is_teacher) == ("S1", 0.5, None, False)
    assert teacher != run_of("S1", fraction=0.5), "not the baseline that it is compared with"
    assert train_one(run, {"S1": new_model(teacher, 1).eval().requires_grad_(False)}).failure is None


def test_budget_of_teacher_and_student_is_teachers_and_students_steps():
    profile = dataclasses.replace(TINY, teacher_epochs=4, teacher_steps=30, student_epochs=5, student_steps=10)
    both = Run("phantom", "spleen", "S1", profile=profile, recipe=Recipe("longer", budget="teacher+student"))
    assert epochs_of(both, 320) * steps_per_epoch(both, 320) == 4 * 30 + 5 * 10
    recipe = dataclasses.replace(thesis_recipe("S1"), budget="teacher+student")
    assert epochs_of(dataclasses.replace(both, teacher="T1", recipe=recipe), 320) == epochs_of(both, 320)
    free = dataclasses.replace(both, profile=dataclasses.replace(profile, teacher_steps=None, student_steps=None))
    assert epochs_of(free, 320) * steps_per_epoch(free, 320) == 4 * 20 + 5 * 10
    assert epochs_of(run_of("S1"), 320) == TINY.student_epochs and epochs_of(run_of("T1"), 320) == TINY.teacher_epochs


def test_the_thesis_protocol_trains_with_its_dead_term():
    run = dataclasses.replace(distilled(), protocol=PROTOCOLS["thesis"])
    arm = train_one(run, frozen_teacher())
    assert arm.failure is None
    rows = {row["name"]: row["value"] for row in arm.history}
    assert rows["PMD"] == 0 and rows["grad/PMD"] == 0
    assert abs(rows["cosine/B-B"]) < 0.9 and not any(name.startswith("projector_change/") for name in rows)


def test_nan_stops_with_arm_epoch_and_loss(monkeypatch):
    bank = blobs()
    arms = train_cohort([run_of("S1")], bank, blobs(1), 3, CPU)
    assert arms[0].failure is None
    spoiled = lambda images, labels, generator: (images * float("nan"), labels)  # noqa: E731
    monkeypatch.setattr(batch, "augment", spoiled)
    failure = train_cohort([run_of("S1")], bank, blobs(1), 3, CPU)[0].failure
    assert isinstance(failure, TrainingError)
    assert "S1, fold 0, seed 0" in str(failure) and "nan in epoch 1" in str(failure)


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
    teacher = {name: model.to(device, memory_format=torch.channels_last) for name, model in frozen_teacher().items()}
    arms = train_cohort(
        [distilled(), distilled(model="S2")], blobs().to(device), blobs(1).to(device), 3, device, teacher
    )
    for arm in arms:
        assert arm.failure is None
        assert all(math.isfinite(row["value"]) for row in arm.history)
        assert next(arm.model.parameters()).is_cuda


def test_images_that_are_not_used_teach_nothing_by_themselves():
    """Whatever stands where labels are missing, the student's gradient is that of the labelled half."""
    images, labels = blobs().batch(torch.arange(8))
    gradients = []
    for hidden in (0, 1):
        given = labels.clone()
        given[4:] = hidden
        patients = torch.zeros(8, dtype=torch.long)
        state = new_state(run_of("S1", recipe=unused_images(), fraction=0.5), 1, 10, CPU, {})
        training_step(state, Batch(images, given, torch.arange(8) < 4, patients, 0, {}))
        gradients.append([parameter.grad for parameter in state.model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert any(gradient.abs().sum() for gradient in gradients[0])


@pytest.mark.parametrize("teachers", [1, 2])
def test_pseudo_labels_teach_as_the_masks_of_the_mean_teacher_would(teachers):
    """A baseline whose missing labels are these masks gets the same gradient; the true labels stay."""
    images, labels = blobs().batch(torch.arange(8))
    certain = torch.zeros(8, 1, 32, 32)
    certain[:, :, :10], certain[:, :, 10:20] = 8.0, -8.0  # of a second, unsure teacher: the first one decides there
    logits = [certain - 1, torch.full_like(certain, 0.5)][:teachers]
    given = {f"T{i}": {"logits": maps} for i, maps in enumerate(logits, 1)}
    masks = torch.zeros_like(labels)
    masks[:, :10] = 1  # below, -1 and 0.5 mean 0.27 and 0.62, so 0.45 on average: background
    unlabelled, patients = labels.clone(), torch.zeros(8, dtype=torch.long)
    unlabelled[4:] = 1 - masks[4:]  # must not be read
    whole, first = torch.ones(8, dtype=torch.bool), torch.arange(8) < 4
    taught = run_of("S1", teacher="+".join(given), recipe=pseudo_labels(), fraction=0.5)
    gradients = []
    for run, target, labelled, teaching in (
        (taught, unlabelled, first, given),
        (run_of("S1"), torch.where(first[:, None, None], labels, masks), whole, {}),
    ):
        state = new_state(run, 1, 10, CPU, {})
        training_step(state, Batch(images, target, labelled, patients, 0, teaching))
        gradients.append([parameter.grad for parameter in state.model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_split_batch_gives_the_gradient_of_the_mean_of_its_parts(monkeypatch):
    """Without batch statistics and with a loss that is a mean over images, the parts add up to the whole."""
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", lambda self, x: x)
    monkeypatch.setattr(training, "autocast", lambda *where: nullcontext())
    images, labels = blobs().batch(torch.arange(8))
    every = torch.ones(8, dtype=torch.bool)
    batch = Batch(images.double(), labels, every, torch.zeros(8, dtype=torch.long), 0, {})
    states = [new_state(run_of("S1"), 1, 10, CPU, {}, micro_batches=parts) for parts in (1, 3)]
    for state in states:
        state.model.double()
        state.segmentation = lambda logits, labels: (logits[:, 0] - labels).square().mean()
        training_step(state, batch)
    whole, split = states
    torch.testing.assert_close(whole.diagnostics.losses["loss"], split.diagnostics.losses["loss"])
    for one, other in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    halved = dataclasses.replace(batch, labelled=torch.arange(8) < 4)  # as the order of the batches has it
    assert [(len(part.images), int(part.labelled.sum())) for part in halved.split(3)] == [(3, 2), (3, 1), (2, 1)]
