"""What every loss has in common: the registry, ignored labels, odd input, and no loss at the teacher itself."""

from __future__ import annotations

import time

import pytest
import torch

from kdlib.config import InputError
from kdlib.losses import LOSSES, Context, DistillationLoss, SegmentationLoss
from kdlib.losses.memory import MemoryBank

PATIENTS = torch.arange(4)
LIST_LOSS = "reviewkd"  # takes the maps of several scales
MEMORIES = {"supcon": {"memory": 16}, "cirkd": {}, "crd": {}}
# a contrast is least where each vector is far from all negatives, not where student and teacher are equal
NOT_ZERO_AT_THE_TEACHER = {"infonce", "supcon", "prototype", "crd", "reviewkd"}


def make(name: str, seed: int = 0) -> DistillationLoss:
    torch.manual_seed(seed)
    loss = LOSSES[name](*(([3, 3], [3, 3]) if name == LIST_LOSS else ()), **MEMORIES.get(name, {}))
    for module in loss.modules():
        if isinstance(module, MemoryBank):
            module.allow_patients(range(4))
    return loss.double()


def value(loss: DistillationLoss, student, teacher, labels=None, ignore_index=None, patients=PATIENTS):
    context = Context(torch.Generator().manual_seed(0), patients, 0, ignore_index)
    if loss.name == LIST_LOSS:
        student, teacher = ([x, x[..., ::2, ::2]] for x in (student, teacher))
    return loss(student, teacher, labels, context)


def maps(seed=0, shape=(4, 3, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def labels_with(ignored: int):
    """Three classes in quarters, the right half of each image ignored; the last image is ignored as a whole."""
    labels = torch.zeros(4, 8, 8, dtype=torch.int64)
    labels[:, :4, :2], labels[:, 4:, 2:4] = 1, 2
    labels[..., 4:], labels[3] = ignored, ignored
    return labels


# --- the registry -----------------------------------------------------------------------------------------------------


def test_a_loss_is_one_class(monkeypatch):
    known = {}
    monkeypatch.setattr("kdlib.losses.base.LOSSES", known)

    class Mine(DistillationLoss):
        name, label, family, reads, adapt = "mine", "my loss", "feature", "features", "none"

        def compare(self, student, teacher, labels, kept, context):
            return (student - teacher).abs().mean()

    assert list(known.values()) == [Mine] and Mine()(torch.ones(1, 1, 2), torch.zeros(1, 1, 2)) == 1
    with pytest.raises(InputError, match="loss Other: the name 'mine' is that of Mine; choose another"):
        type("Other", (Mine,), {"name": "mine"})
    with pytest.raises(InputError, match="loss Odd: give its family, one of prediction, feature, relation, contrast"):
        type("Odd", (DistillationLoss,), {"name": "odd"})


def test_the_registry_is_complete():
    assert len({loss.label for loss in LOSSES.values()}) == len(LOSSES) == 20
    assert all(loss.name == name and loss.__doc__ for name, loss in LOSSES.items())


# --- ignored labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ignored", [255, -1])
def test_ignored_positions_take_no_part(name, ignored):
    labels, results = labels_with(ignored), []
    hidden = (labels == ignored)[:, None].expand(-1, 3, -1, -1)
    for hides in (0.0, 1e3, torch.nan):
        loss = make(name)
        odd = [x.masked_fill(hidden, hides) for x in maps()]
        student, teacher = (x.requires_grad_() for x in odd)
        first = value(loss, student, teacher, labels, ignored)  # fills a memory
        again = value(loss, student, teacher, labels, ignored)
        gradient = torch.autograd.grad(again, student)[0]
        assert not gradient[hidden].any() and gradient.isfinite().all()
        results.append((first.detach(), again.detach(), gradient))
        for bank in (module for module in loss.modules() if isinstance(module, MemoryBank)):
            vectors, held, patients, _ = bank.entries()
            assert len(bank) and vectors.isfinite().all() and set(held.tolist()) <= {0, 1, 2}
            assert 3 not in patients, "an image that is ignored as a whole enters no memory"
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("name", LOSSES)
def test_an_ignore_index_that_does_not_occur_changes_nothing(name):
    student, teacher = maps()
    labels = torch.randint(3, (4, 8, 8), generator=torch.Generator().manual_seed(1))
    with_it, without = (value(make(name), student, teacher, labels, index) for index in (255, None))
    torch.testing.assert_close(with_it, without)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_that_is_ignored_gives_nothing(name):
    student, teacher = (x.requires_grad_() for x in maps())
    loss = value(make(name), student, teacher, torch.full((4, 8, 8), 255), 255)
    loss.backward()
    assert loss == 0 and (student.grad is None or not student.grad.any())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cross_entropy", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_segmentation_loss_leaves_ignored_pixels_out(channels, cross_entropy, smoothing):
    logits = torch.randn(2, channels, 4, 6, dtype=torch.float64)
    labels = torch.randint(max(2, channels), (2, 4, 6))
    expected = SegmentationLoss(cross_entropy, smoothing)(logits[..., :3], labels[..., :3])
    labels[..., 3:] = 255
    logits[..., 4:] = torch.nan
    logits.requires_grad_()
    found = SegmentationLoss(cross_entropy, smoothing, ignore_index=255)(logits, labels)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert not logits.grad[..., 3:].any()


# --- odd input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LOSSES if name != LIST_LOSS])
def test_odd_labels_and_types_are_one_clear_line(name):
    loss, (student, teacher) = make(name), maps()
    for labels, message in [
        (torch.full((4, 8, 8), -1), "labels reach down to -1: give classes from 0"),
        (torch.zeros(4, 8, 8, dtype=torch.int32), "labels are torch.int32: give int64"),
    ]:
        if loss.needs_labels:
            with pytest.raises(InputError, match=message):
                value(loss, student, teacher, labels)
    with pytest.raises(InputError, match="needs labels, to know the positions of label 255"):
        value(loss, student, teacher, None, 255)
    with pytest.raises(InputError, match="student maps are torch.float32 and teacher maps torch.float64: give both"):
        value(loss, student.float(), teacher, torch.zeros(4, 8, 8, dtype=torch.int64))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != LIST_LOSS])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((2, 3, 4, 4), (2, 3, 2, 2)),
        ((2, 3, 4, 4), (3, 3, 4, 4)),
        ((2, 3, 4, 4), (2, 3, 4, 4, 4)),
        ((2, 3), (2, 3)),
        ((2, 3, 0, 4), (2, 3, 0, 4)),
        ((2, 3, 4, 4), (2, 4, 4, 4)),
    ],
)
def test_maps_that_do_not_fit(name, student, teacher):
    loss, labels = make(name), torch.zeros(2, 4, 4, dtype=torch.int64)
    maps_of = [torch.ones(shape, dtype=torch.float64) for shape in (student, teacher)]
    if (loss.reads, loss.adapt) == ("features", "none") and student[2:] == teacher[2:] and student[1] != teacher[1]:
        assert value(loss, *maps_of, labels).isfinite(), "each side may have its own channels"
        return
    with pytest.raises(InputError, match="shape"):
        value(loss, *maps_of, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_channels_last_gives_the_same(name):
    labels = torch.randint(3, (4, 8, 8), generator=torch.Generator().manual_seed(1))
    last = [x.contiguous(memory_format=torch.channels_last) for x in maps()]
    torch.testing.assert_close(value(make(name), *last, labels), value(make(name), *maps(), labels))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kl", {"temperature": float("inf")}, "temperature is inf: give a number above 0"),
        ("kl", {"temperature": "4"}, "temperature is '4': give a number above 0"),
        ("dkd", {"beta": "8"}, "beta is '8': give a number of at least 0"),
        ("dist", {"gamma": -1}, "gamma is -1: give a number of at least 0"),
        ("supcon", {"samples": 0}, "samples is 0: give a whole number of at least 1"),
        ("supcon", {"radius": 1.5}, "radius is 1.5: give a whole number of at least 1"),
        ("boundary_kl", {"radius": 1.5}, "radius is 1.5: give a whole number of at least 1"),
        ("skd", {"nodes": 2.5}, "nodes is 2.5: give a whole number of at least 2"),
        ("cirkd", {"nodes": 2.5}, "nodes is 2.5: give a whole number of at least 1"),
        ("crd", {"memory": -1}, "memory is -1: give a whole number of at least 0"),
        ("at", {"power": "2"}, "power is '2': give a number above 0"),
    ],
)
def test_options_that_cannot_be(name, options, message):
    with pytest.raises(InputError, match=message):
        LOSSES[name](**options)


@pytest.mark.parametrize("name", ["ifvd", "cirkd", "emkd_affinity", "prototype", "supcon"])
def test_a_large_label_costs_no_more_than_a_small_one(name):
    student, teacher = maps()
    labels = torch.randint(2, (4, 8, 8), generator=torch.Generator().manual_seed(1))
    begin = time.perf_counter()
    large = value(make(name), student, teacher, labels * 30_000_000)
    assert time.perf_counter() - begin < 5, "30 million masks would take hours"
    torch.testing.assert_close(large, value(make(name), student, teacher, labels))


@pytest.mark.parametrize("name", MEMORIES)
def test_a_step_of_nan_does_not_stay(name):
    student, teacher = maps()
    labels = torch.randint(3, (4, 8, 8), generator=torch.Generator().manual_seed(1))
    loss = make(name)
    value(loss, student, torch.full_like(teacher, torch.nan), labels)
    value(loss, student, teacher, labels)
    assert value(loss, student, teacher, labels).isfinite()


# --- the teacher itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_equals_its_teacher(name):
    teacher = maps()[1]
    student = teacher.clone().requires_grad_()
    labels = torch.randint(3, (4, 8, 8), generator=torch.Generator().manual_seed(1))
    loss = make(name)
    value(loss, student, teacher, labels)  # with a memory, where there is one
    found = value(loss, student, teacher, labels)
    gradient = torch.autograd.grad(found, student)[0]
    nothing = found.abs() < 1e-12 and gradient.abs().max() < 1e-12
    assert nothing == (name not in NOT_ZERO_AT_THE_TEACHER)


# --- one GPU test for all ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_loss_on_a_gpu_agrees_with_the_cpu():
    labels = labels_with(255)
    for name in LOSSES:
        for index, given in ((255, labels), (None, labels % 3)):
            results = []
            for device in ("cpu", "cuda"):
                loss = make(name).to(device)
                student, teacher = (x.to(device).requires_grad_() for x in maps())
                found = value(loss, student, teacher, given.to(device), index)
                gradients = torch.autograd.grad(found, (student, teacher))
                results.append([x.cpu() for x in (found, *gradients)])
            torch.testing.assert_close(*results, msg=lambda text, name=name: f"{name}: {text}")
