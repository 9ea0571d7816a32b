"""What makes a training faster and is chosen by name: it gives what the plain way gives, and another key."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_training import CPU, TINY, blobs, distilled, frozen_teacher, same

from kdlib.config import Optimisation, Run
from kdlib.experiments.runner import cohorts
from kdlib.experiments.store import run_key
from kdlib.models import ExternalModel
from kdlib.training import frozen
from kdlib.training import loop as training
from kdlib.training.checkpoint import Checkpoint
from kdlib.training.frozen import FrozenTeachers, folded, teacher_forward
from kdlib.training.hooks import FeatureHooks
from kdlib.training.loop import train_cohort
from kdlib.training.state import new_model


def with_student(run: Run, **how: object) -> Run:
    student = dataclasses.replace(run.profile.student, **how)
    return dataclasses.replace(run, profile=dataclasses.replace(run.profile, student=student))


def train(run: Run, steps: int = 4, checkpoints=()):
    return train_cohort([run], blobs(), blobs(1, seed=9), steps, CPU, frozen_teacher(), 2, checkpoints)[0]


@pytest.mark.parametrize("model", ["T1", "T2", "S2", "E1"])
def test_a_folded_network_gives_the_same_numbers_to_rounding(model):
    network = new_model(dataclasses.replace(distilled(), model=model, teacher=None, recipe=None), 3).double().train()
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        network(images)  # statistics that are not 0 and 1
    network.eval()
    names = ["encoder2", "bottleneck", "decoder1"]
    plain, quick = (teacher_forward(FeatureHooks(m, names), images) for m in (network, folded(network)))
    for name, maps in plain.items():
        torch.testing.assert_close(quick[name], maps)
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in each.modules()) for each in (network, folded(network))]
    assert norms[1] < norms[0]


def test_a_convolution_that_is_a_scale_is_not_folded():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 1, 1))
    torch.nn.init.uniform_(net[1].weight)
    images = torch.rand(2, 3, 8, 8)
    for layer, norms in (("0", 1), ("1", 0)):
        network = ExternalModel(net, {"bottleneck": layer}).eval()
        each = network, folded(network)
        plain, quick = (teacher_forward(FeatureHooks(m, ["bottleneck"]), images) for m in each)
        torch.testing.assert_close(quick, plain)
        assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in each[1].modules()) == norms


def test_fused_kernels_train_as_plain_ones_to_rounding():
    plain, fused = (train(with_student(distilled(), kernels=name)) for name in ("plain", "fused"))
    assert fused.optimiser.defaults["fused"] and not plain.optimiser.defaults["fused"]
    values = [{(row["epoch"], row["name"]): row["value"] for row in arm.history} for arm in (plain, fused)]
    for name in ("loss", "segmentation", "B-B", "PMD"):
        assert values[1][1, name] == pytest.approx(values[0][1, name], rel=1e-3)


def test_replayed_batches_come_again_and_the_teacher_sees_each_once(monkeypatch):
    seen, passes = [], []
    step, forward = training.training_step, frozen.teacher_forward
    monkeypatch.setattr(
        training, "training_step", lambda state, batch, *rest: (seen.append(batch), step(state, batch, *rest))
    )
    monkeypatch.setattr(frozen, "teacher_forward", lambda *given: passes.append(len(given[1])) or forward(*given))
    train(with_student(distilled(), replay=3))
    assert len(seen) == 8 and passes == [TINY.student.batch] * 3, "every batch once"
    assert [batch.step for batch in seen] == list(range(8)), "what a term draws is drawn anew"
    for i in range(5):
        assert torch.equal(seen[i].images, seen[i + 3].images) and torch.equal(seen[i].labels, seen[i + 3].labels)
        for name, maps in seen[i].teachers["T1"].items():
            assert torch.equal(maps, seen[i + 3].teachers["T1"][name])
    assert not torch.equal(seen[0].images, seen[1].images)


def test_what_is_kept_is_the_teachers_to_half_precision():
    teacher = frozen_teacher()["T1"]
    given = {"T1": teacher}, [distilled(("B-B",)).recipe]
    images = torch.rand(2, 3, 64, 64)
    kept = FrozenTeachers(*given, replay=2)
    plain = FrozenTeachers(*given)(images, 0)["T1"]
    for step in (0, 2):
        for name, maps in kept(images, step)["T1"].items():
            assert maps.dtype == torch.float32
            torch.testing.assert_close(maps, plain[name].float(), rtol=1e-3, atol=1e-4)


def test_a_replayed_training_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    run = with_student(distilled(), replay=3)
    whole, step, done = train(run), training.training_step, []

    def some(*given):
        if len(done) == 5:
            raise SystemExit(143)
        done.append(step(*given))

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", some)
        with pytest.raises(SystemExit):
            train(run, checkpoints=[Checkpoint(tmp_path, {})])
    again = train(run, checkpoints=[Checkpoint(tmp_path, {})])
    assert same(again.model.state_dict(), whole.model.state_dict()) and again.history == whole.history


def test_both_are_part_of_the_key_and_of_the_cohort(tmp_path):
    run = Run("phantom", "spleen", "S1")
    others = [with_student(run, kernels="fused"), with_student(run, replay=3)]
    assert len({run_key(each, tmp_path) for each in (run, *others)}) == 3
    assert len(cohorts([run, *others])) == 3
    assert run.optimisation == Optimisation(**{**dataclasses.asdict(run.optimisation), "kernels": "plain"})
