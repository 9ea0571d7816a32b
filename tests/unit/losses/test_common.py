"""What holds for every loss: gradients, half precision, hard batches, what it does not see, ignored labels, odd input.

The files beside this one hold each loss against its formula, and take their maps and comparisons from here.
"""

from __future__ import annotations

import inspect
import time

import pytest
import torch

from kdlib.config import InputError
from kdlib.losses import LOSSES, Context, DistillationLoss, SegmentationLoss
from kdlib.losses.memory import MemoryBank

PATIENTS = torch.tensor([4, 4, 7, 9])
MEMORIES = {"supcon": {"memory": 16}, "cirkd": {}, "crd": {}}
# every loss, and the options that take another way through its code
VARIANTS = {name: (name, MEMORIES.get(name, {})) for name in LOSSES} | {
    "cirkd equal": ("cirkd", dict(temperature=0.4, weights=(1, 1, 1), nodes=9, pixels=3)),
    "infonce patients": ("infonce", dict(temperature=0.4, same_patient=True)),
    "supcon hard": ("supcon", dict(temperature=0.4, samples=32, hard=0.5, memory=40, same_patient=True)),
    "supcon all": ("supcon", dict(temperature=0.4, samples=None)),
    "prototype images": ("prototype", dict(temperature=0.4, per_image=True)),
    "prototype pixels": ("prototype", dict(temperature=0.4, anchors="pixels")),
    "crd batch": ("crd", dict(temperature=0.4, memory=0, same_patient=True)),
}
LABELLED = [name for name in VARIANTS if name.split()[0] in ("dkd", "boundary_kl", "emkd_affinity", "ifvd", "cirkd",
                                                             "supcon", "prototype")]  # fmt: skip
# a contrast is least where each vector is far from all negatives, not where student and teacher are equal
NOT_ZERO_AT_THE_TEACHER = {"infonce", "supcon", "prototype", "crd", "reviewkd"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(*shape, seed=0, dtype=torch.float64, teacher_channels=None):
    generator = seeded(seed)
    shapes = shape, (shape[0], teacher_channels or shape[1], *shape[2:])
    return [torch.randn(each, generator=generator, dtype=dtype).requires_grad_() for each in shapes]


def labels_like(x, classes=3, seed=0):
    return torch.randint(classes, (len(x), *x.shape[2:]), generator=seeded(seed))


def agree(found, expected, *leaves, **tolerance):
    """Two losses have the same value and the same gradients."""
    torch.testing.assert_close(found, expected, **tolerance)
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for loss in (found, expected)]
    torch.testing.assert_close(*gradients, **tolerance)


def admit(loss):
    for module in loss.modules():
        if isinstance(module, MemoryBank):
            module.allow_patients(range(20))
    return loss


def make(variant: str, channels=3, dims=2, steps=0) -> DistillationLoss:
    """The loss in float64, after `steps` training steps for what it remembers."""
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    loss = admit(LOSSES[name](*(([channels] * 2, [channels] * 2, dims) if name == "reviewkd" else ()), **options))
    loss.double()
    for step in range(steps):
        student, teacher = maps(4, channels, *[4] * dims, seed=50 + step)
        value(loss, student, teacher, labels_like(student, max(2, min(3, channels))), patients=PATIENTS + 5)
    return loss


def value(loss, student, teacher, labels=None, ignored=None, patients=None):
    context = Context(seeded(), PATIENTS[: len(student)] if patients is None else patients, ignored)
    if loss.name == "reviewkd":  # takes the maps of several scales
        coarse = (..., *[slice(None, None, 2)] * (student.dim() - 2))
        student, teacher = ([x, x[coarse]] for x in (student, teacher))
    return loss(student, teacher, labels, context)


def finite(loss, *leaves) -> bool:
    loss.backward()
    return all(x.isfinite().all() for x in (loss, *(x.grad for x in leaves)))


# --- the registry -----------------------------------------------------------------------------------------------------


def test_a_loss_is_one_class(monkeypatch):
    known = {}
    monkeypatch.setattr("kdlib.losses.base.LOSSES", known)

    class Mine(DistillationLoss):
        name, label, family, reads, adapt = "mine", "my loss", "feature", "features", "none"

        def compare(self, student, teacher, labels, kept, context):
            return (student - teacher).abs().mean()

    assert list(known.values()) == [Mine] and Mine()(torch.ones(1, 1, 2), torch.zeros(1, 1, 2)) == 1
    near = torch.full((1, 1, 2), 1.0, dtype=torch.bfloat16)
    assert Mine()(near, near + 0.0078125).dtype == torch.float32, "whatever a subclass computes"
    with pytest.raises(InputError, match="loss Other: the name 'mine' is that of Mine; choose another"):
        type("Other", (Mine,), {"name": "mine"})
    with pytest.raises(InputError, match="loss Blank: give its label, for tables and figures"):
        type("Blank", (Mine,), {"name": "blank", "label": ""})
    with pytest.raises(InputError, match="loss Odd: give its family, one of prediction, feature, relation, contrast"):
        type("Odd", (DistillationLoss,), {"name": "odd"})


def test_the_registry_is_complete():
    assert len({loss.label for loss in LOSSES.values()}) == len(LOSSES)
    assert all(loss.name == name and loss.__doc__ for name, loss in LOSSES.items())
    assert {name for name in VARIANTS if make(name).needs_labels} == set(LABELLED)


# --- gradients and precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [(4, 3, 4, 2), (4, 3, 4, 2, 2), (4, 1, 2, 3)])
def test_gradients_are_right_and_a_frozen_teacher_gets_none(name, shape):
    term = make(name, shape[1], len(shape) - 2, steps=2).eval()
    student, teacher = maps(*shape)
    labels = labels_like(student, 3 if shape[1] > 1 else 2)
    assert torch.autograd.gradcheck(lambda s, t: value(term, s, t, labels), (student, teacher), fast_mode=True)
    frozen = teacher.detach()
    value(term, student, frozen, labels).backward()
    assert frozen.grad is None and student.grad.isfinite().all()
    if shape[1] > 1:  # unit vectors of one channel are signs, and a softmax over it is 1
        assert student.grad.abs().max() > 1e-6


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_nothing_but_its_own_rounding(name, channels, dtype):
    term = make(name, channels, steps=2).eval()
    student, teacher = maps(4, channels, 8, 8, dtype=torch.float32)
    labels = labels_like(student, 2)
    exact = value(term, student.to(dtype).double(), teacher.to(dtype).double(), labels)
    with torch.autocast("cpu", dtype):
        half = value(term.float(), student.to(dtype), teacher.to(dtype), labels)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-7)
    assert finite(half, student, teacher)


# --- batches that are hard --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("channels, grid", [(4, (4, 4)), (1, (2, 2, 2))])
def test_constant_maps_one_class_and_one_patient_are_finite(name, channels, grid):
    term = make(name, channels, len(grid), steps=2).float()
    for levels in ((0.0, 0.0), (0.0, 1.0), (1e4, -1e4), (6e4, -6e4), (1e-30, 1e-30)):
        for classes, patients in ((1, PATIENTS), (2, torch.zeros_like(PATIENTS))):
            student, teacher = (torch.full((4, channels, *grid), level, requires_grad=True) for level in levels)
            loss = value(term, student, teacher, labels_like(student, classes), patients=patients)
            assert finite(loss, student, teacher), (levels, classes, patients)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "infonce" not in name])
@pytest.mark.parametrize("grid, label", [((4, 4), 0), ((4, 4), 1), ((1, 1), 1)])
def test_one_image_of_one_class_and_one_position_are_enough(name, grid, label):
    for term in (make(name), make(name, steps=2)):
        student, teacher = maps(1, 3, *grid)
        loss = value(term, student, teacher, torch.full((1, *grid), label))
        assert finite(loss, student, teacher) and (name != "sp" or loss == 0)


@pytest.mark.parametrize("name", [name for name in VARIANTS if LOSSES[VARIANTS[name][0]].reads == "features"])
def test_positions_where_all_channels_are_dead_have_a_bounded_gradient(name):
    """As a ReLU leaves them: zeros in a part of an image, and maps near zero."""
    alive, teacher = maps(4, 4, 8, 8, dtype=torch.float32)
    for size, part in ((0, (0, slice(None), slice(2), slice(2))), (1e-6, ...), (1e-12, ...), (1e-30, ...)):
        if size and name in ("sp", "prototype", "prototype images"):
            continue  # SP sees no scale of a whole batch, and means of short vectors are made unit vectors once more
        student = alive.detach().clone()
        student[part] *= size
        student.requires_grad_()
        loss = value(make(name, 4, steps=2).float(), student, teacher, labels_like(student))
        assert finite(loss, student, teacher) and student.grad.abs().max() < 1e5, size


@pytest.mark.parametrize("name", [name for name in VARIANTS if LOSSES[VARIANTS[name][0]].reads == "logits"])
@pytest.mark.parametrize("channels", [1, 3])
def test_certain_and_contrary_predictions_are_finite(name, channels):
    student = torch.zeros(1, channels, 2, 2)
    student[:, 0, 0] = 6e4  # what half precision can hold at most
    student.requires_grad_()
    assert finite(value(make(name), student, -student.detach(), torch.tensor([[[0, 1], [1, 0]]])), student)


# --- what a loss does not see -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dims", [2, 3])
def test_the_order_of_the_images_and_their_memory_layout_do_not_matter(name, dims):
    term = make(name, 3, dims, steps=2).eval()
    if name.startswith(("supcon", "cirkd")):  # what is drawn depends on the order: all are taken
        term.samples, term.hard, term.pixels = None, 0.0, 10_000
    student, teacher = maps(4, 3, *[4] * dims)
    labels, order = labels_like(student), torch.tensor([2, 0, 3, 1])
    expected = value(term, student, teacher, labels)
    moved = value(term, student[order], teacher[order], labels[order], patients=PATIENTS[order])
    torch.testing.assert_close(moved, expected)
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    torch.testing.assert_close(
        value(term, *(x.contiguous(memory_format=last) for x in (student, teacher)), labels), expected
    )


ROTATION = torch.linalg.qr(torch.randn(3, 3, generator=seeded(), dtype=torch.float64)).Q
MIXED = torch.randperm(36, generator=seeded())


def rotated(x):
    return torch.einsum("ij,bj...->bi...", ROTATION, x)


def mixed(x):
    return x.flatten(-2)[..., MIXED].unflatten(-1, (6, 6))


AFFINITIES, CONTRASTS = {"sp", "skd", "ifvd", "emkd_affinity"}, {"infonce", "supcon all", "prototype", "crd", "cirkd"}
UNSEEN = {
    "the scale of each side": (
        lambda s, t, y: (7 * s, t / 3, y), {"at", "emkd_importance", "prototype pixels"} | AFFINITIES | CONTRASTS),
    "a rotation of the student's channels": (lambda s, t, y: (rotated(s), t, y), AFFINITIES),
    "a common rotation of the channels": (
        lambda s, t, y: (rotated(s), rotated(t), y), {"fitnet", "prototype images", "prototype pixels"} | CONTRASTS),
    "signs, and the order of channels": (lambda s, t, y: (-s.flip(1), t.roll(1, 1), y), {"at", "emkd_importance"}),
    "the order of channels of both": (
        lambda s, t, y: (s.flip(1), t.flip(1), y), {"kl", "dist", "cwd", "fitnet", "feature_cwd", "boundary_kl"}),
    "what is added to a channel": (
        lambda s, t, y: (s + torch.tensor([5.0, 0, -9])[:, None, None], t - 3, y), {"cwd", "feature_cwd"}),
    "the names of classes": (
        lambda s, t, y: (s, t, torch.tensor([9, 0, 4])[y]),
        {"emkd_affinity", "ifvd", "supcon all", "prototype", "prototype pixels", "cirkd"}),
    "the order of positions": (
        lambda s, t, y: (mixed(s), mixed(t), mixed(y)),
        {"kl", "dkd", "dist", "cwd", "fitnet", "at", "emkd_affinity", "sp", "ifvd", "infonce", "supcon all",
         "prototype", "prototype pixels", "crd"}),
}  # fmt: skip


@pytest.mark.parametrize("what, name", [(what, name) for what, (_, names) in UNSEEN.items() for name in sorted(names)])
def test_what_does_not_matter(what, name):
    for seed in range(3):
        student, teacher = maps(4, 3, 6, 6, seed=seed)
        given = student, teacher, labels_like(student, seed=seed)
        torch.testing.assert_close(value(make(name), *UNSEEN[what][0](*given)), value(make(name), *given))


@pytest.mark.parametrize("name", LABELLED)
def test_labels_come_to_the_grid_of_the_maps_by_the_nearest_centre(name):
    for shape in ((4, 3, 4, 4), (4, 3, 2, 2, 4)):
        dims = len(shape) - 2
        student, teacher = maps(*shape)
        fine = labels_like(torch.zeros(4, 1, *(2 * n for n in shape[2:])))
        near, far = (fine[(slice(None), *[slice(begin, None, 2)] * dims)].contiguous() for begin in (1, 0))
        found, expected, other = (
            value(make(name, 3, dims, steps=2).eval(), student, teacher, y) for y in (fine, near, far)
        )
        torch.testing.assert_close(found, expected)
        if name != "boundary_kl" and "cirkd" not in name:  # of random labels all is boundary, and all is drawn
            assert not torch.isclose(found, other)


# --- ignored labels ---------------------------------------------------------------------------------------------------


def labels_with(ignored: int):
    """Three classes in quarters, the right half of each image ignored; the last image is ignored as a whole."""
    labels = torch.zeros(4, 8, 8, dtype=torch.int64)
    labels[:, :4, :2], labels[:, 4:, 2:4] = 1, 2
    labels[..., 4:], labels[3] = ignored, ignored
    return labels


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("ignored", [255, -1])
def test_ignored_positions_take_no_part(name, ignored):
    labels, results = labels_with(ignored), []
    hidden = (labels == ignored)[:, None].expand(-1, 3, -1, -1)
    for hides in (0.0, 1e3, torch.nan):
        loss = make(name)
        student, teacher = (x.detach().masked_fill(hidden, hides).requires_grad_() for x in maps(4, 3, 8, 8))
        first = value(loss, student, teacher, labels, ignored)  # fills a memory
        again = value(loss, student, teacher, labels, ignored)
        gradient = torch.autograd.grad(again, student)[0]
        assert not gradient[hidden].any() and gradient.isfinite().all()
        results.append((first.detach(), again.detach(), gradient))
        for bank in (module for module in loss.modules() if isinstance(module, MemoryBank)):
            vectors, held, patients = bank.entries()
            assert len(bank) and vectors.isfinite().all() and set(held.tolist()) <= {0, 1, 2}
            assert 9 not in patients, "an image that is ignored as a whole enters no memory"
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_ignored_changes_nothing_and_all_ignored_leaves_nothing(name):
    student, teacher = maps(4, 3, 8, 8)
    with_it, without = (value(make(name), student, teacher, labels_like(student), index) for index in (255, None))
    torch.testing.assert_close(with_it, without)
    loss = value(make(name), student, teacher, torch.full((4, 8, 8), 255), 255)
    loss.backward()
    assert loss == 0 and (student.grad is None or not student.grad.any())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cross_entropy", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_segmentation_loss_leaves_ignored_pixels_out(channels, cross_entropy, smoothing):
    logits = maps(2, channels, 4, 6)[0].detach()
    labels = labels_like(logits, max(2, channels))
    expected = SegmentationLoss(cross_entropy, smoothing)(logits[..., :3], labels[..., :3])
    labels[..., 3:] = 255
    logits[..., 4:] = torch.nan
    logits.requires_grad_()
    found = SegmentationLoss(cross_entropy, smoothing, ignore_index=255)(logits, labels)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert not logits.grad[..., 3:].any()


# --- odd input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "reviewkd"])
def test_odd_labels_and_types_are_one_clear_line(name):
    loss, (student, teacher) = make(name), maps(4, 3, 8, 8)
    for labels, message in [
        (None, "needs labels"),
        (torch.full((4, 8, 8), -1), "labels reach down to -1: give classes from 0"),
        (torch.zeros(4, 8, 8, dtype=torch.int32), "labels are torch.int32: give int64"),
        *((torch.zeros(shape).long(), "do not fit") for shape in ((3, 8, 8), (4, 8), (4, 1, 8, 8))),
    ]:
        if loss.needs_labels:
            with pytest.raises(InputError, match=message):
                value(loss, student, teacher, labels)
    with pytest.raises(InputError, match="needs labels, to know the positions of label 255"):
        value(loss, student, teacher, None, 255)
    with pytest.raises(InputError, match="student maps are torch.float32 and teacher maps torch.float64: give both"):
        value(loss, student.float(), teacher, torch.zeros(4, 8, 8).long())


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "reviewkd"])
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
    loss, labels = make(name), torch.zeros(2, 4, 4).long()
    maps_of = [torch.ones(shape, dtype=torch.float64) for shape in (student, teacher)]
    if (loss.reads, loss.adapt) == ("features", "none") and student[2:] == teacher[2:] and student[1] != teacher[1]:
        assert value(loss, *maps_of, labels).isfinite(), "each side may have its own channels"
        return
    with pytest.raises(InputError, match="shape"):
        value(loss, *maps_of, labels)


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if "temperature" in inspect.signature(LOSSES[name]).parameters]
)
def test_temperatures_that_teach_nothing_or_the_opposite(name):
    for temperature in (0.0, -4.0, float("nan"), float("inf"), "4"):
        with pytest.raises(InputError, match=f"temperature is {temperature!r}: give a number above 0"):
            LOSSES[name](temperature=temperature)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dkd", {"beta": "8"}, "beta is '8': give a number of 0 or more"),
        ("dist", {"gamma": -1}, "gamma is -1: give a number of 0 or more"),
        ("boundary_kl", {"boundary": 0.0}, "boundary is 0.0: give a number above 0"),
        ("boundary_kl", {"radius": 1.5}, "radius is 1.5: give a whole number of 1 or more"),
        ("at", {"power": "2"}, "power is '2': give a number of 1 or more"),
        ("at", {"power": 0.5}, "power is 0.5: give a number of 1 or more"),
        ("skd", {"scale": 0}, "scale is 0: give a number above 0 and up to 1"),
        ("skd", {"scale": 1.5}, "scale is 1.5: give a number above 0 and up to 1"),
        ("skd", {"nodes": 1}, "nodes is 1: give a whole number of 2 or more"),
        ("cirkd", {"nodes": 2.5}, "nodes is 2.5: give a whole number of 1 or more"),
        ("cirkd", {"weights": (1, 1)}, "weights is .1, 1.: give 3 values, each a number of 0 or more"),
        ("cirkd", {"weights": (1, -1, 1)}, "weights is .1, -1, 1.: give 3 values, each a number of 0 or more"),
        ("cirkd", {"pixels": 0}, "pixels is 0"),
        ("cirkd", {"pixel_keys": 0}, "pixel_keys is 0"),
        ("cirkd", {"region_keys": 0}, "region_keys is 0"),
        ("cirkd", {"pixel_memory": 0}, "size of a memory is 0"),
        ("cirkd", {"region_memory": 0}, "size of a memory is 0"),
        ("crd", {"memory": -1}, "memory is -1: give a whole number of 0 or more"),
        ("supcon", {"samples": 0}, "samples is 0: give a whole number of 1 or more, or None"),
        ("supcon", {"radius": 1.5}, "radius is 1.5: give a whole number of 1 or more"),
        ("supcon", {"memory": -1}, "memory is -1: give a whole number of 0 or more"),
        ("supcon", {"hard": 1.5}, "hard is 1.5: give a number from 0 and up to 1"),
        ("supcon", {"samples": None, "hard": 0.5}, "give samples, or hard=0"),
        ("prototype", {"anchors": "pixel"}, "anchors is 'pixel': give 'regions' or 'pixels'"),
        ("reviewkd", {"student_channels": [], "teacher_channels": []}, "0 scales"),
        ("reviewkd", {"student_channels": [2, 3], "teacher_channels": [4]}, "2 scales of the student and 1 of the"),
        ("reviewkd", {"student_channels": [2], "teacher_channels": [2], "dims": 1}, "dimensions"),
        ("reviewkd", {"student_channels": [2], "teacher_channels": [2], "width": 0}, "width"),
    ],
)
def test_options_that_cannot_be(name, options, message):
    with pytest.raises(InputError, match=message):
        LOSSES[name](**options)


@pytest.mark.parametrize("name", ["ifvd", "cirkd", "emkd_affinity", "prototype", "supcon"])
def test_a_large_label_costs_no_more_than_a_small_one(name):
    student, teacher = maps(4, 3, 8, 8)
    labels = labels_like(student, 2)
    begin = time.perf_counter()
    large = value(make(name), student, teacher, labels * 30_000_000)
    assert time.perf_counter() - begin < 5, "30 million masks would take hours"
    torch.testing.assert_close(large, value(make(name), student, teacher, labels))


# --- memories ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["supcon", "supcon hard", "crd", "crd batch", "cirkd", "infonce patients"])
def test_patients_must_be_known(name):
    student, teacher = maps(4, 3, 4, 4)
    for patients, message in ((None, "patient of each image"), (PATIENTS[:3], "one patient"), (PATIENTS[None], "one")):
        with pytest.raises(InputError, match=message):
            make(name)(student, teacher, labels_like(student), Context(None, patients))


@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_is_kept_by_a_checkpoint_left_alone_in_evaluation_and_closed_to_others(name):
    term, other = make(name, steps=2), make(name)
    other.load_state_dict(term.state_dict())
    student, teacher = maps(4, 3, 8, 8)
    labels = labels_like(student)
    before = {key: x.clone() for key, x in term.state_dict().items()}
    assert value(term.eval(), student, teacher, labels) == value(other.eval(), student, teacher, labels)
    torch.testing.assert_close(dict(term.state_dict()), before, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"patients \[20, 31\] are not admitted"):
        value(term.train(), student, teacher, labels, patients=torch.tensor([31, 4, 20, 4]))
    torch.testing.assert_close(dict(term.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", MEMORIES)
def test_a_step_of_nan_does_not_stay(name):
    student, teacher = maps(4, 3, 8, 8)
    loss = make(name)
    value(loss, student, torch.full_like(teacher, torch.nan), labels_like(student))
    value(loss, student, teacher, labels_like(student))
    assert value(loss, student, teacher, labels_like(student)).isfinite()


# --- the teacher itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [(4, 3, 6, 4), (4, 2, 4, 2, 2), (4, 1, 6, 4)])
def test_a_student_that_equals_its_teacher(name, shape):
    teacher = maps(*shape)[1].detach()
    same, other = teacher.clone().requires_grad_(), maps(*shape)[0]
    labels = labels_like(same, max(2, shape[1]))
    loss = make(name, shape[1], len(shape) - 2, steps=2).eval()
    found = value(loss, same, teacher, labels)
    gradient = torch.autograd.grad(found, same)[0]
    nothing = found.abs() < 1e-12 and gradient.abs().max() < 1e-9
    if shape[1] > 1:
        assert nothing == (loss.name not in NOT_ZERO_AT_THE_TEACHER)
        assert value(loss, other, teacher, labels) > 1e-3
    assert nothing or loss.name in NOT_ZERO_AT_THE_TEACHER


# --- one GPU test for all ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_loss_on_a_gpu_agrees_with_the_cpu():
    labels = labels_with(255)
    for name in VARIANTS:
        for index, given in ((255, labels), (None, labels % 3)):
            results = []
            for device in ("cpu", "cuda"):
                loss = make(name).to(device)
                student, teacher = (x.detach().to(device).requires_grad_() for x in maps(4, 3, 8, 8))
                found = value(loss, student, teacher, given.to(device), index)
                gradients = torch.autograd.grad(found, (student, teacher))
                results.append([x.cpu() for x in (found, *gradients)])
            torch.testing.assert_close(*results, msg=lambda text, name=name: f"{name}: {text}")
