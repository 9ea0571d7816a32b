"""Distillation of features: loops in float64, other libraries, invariances, and the batches that are hard."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.config import InputError
from kdlib.losses.feature import (
    AttentionTransfer,
    FeatureCWD,
    FeatureMSE,
    ImportanceMap,
    RegionAffinity,
    ReviewKD,
    hierarchical_context_loss,
)
from kdlib.losses.prediction import ChannelWiseDistillation

TERMS = {
    "fitnet": FeatureMSE(),
    "feature_cwd": FeatureCWD(),
    "at": AttentionTransfer(),
    "emkd_importance": ImportanceMap(),
    "emkd_affinity": RegionAffinity(),
}
ADAPT = {
    "fitnet": "student",
    "feature_cwd": "student",
    "at": "none",
    "emkd_importance": "none",
    "emkd_affinity": "none",
}
ANY_CHANNELS = ["at", "emkd_importance", "emkd_affinity"]
SHAPES = [(2, 1, 4, 5), (3, 4, 3, 3), (2, 3, 2, 3, 4)]
seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=15)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(*shape, seed=0, dtype=torch.float64, teacher_channels=None):
    generator = seeded(seed)
    shapes = shape, (shape[0], teacher_channels or shape[1], *shape[2:])
    return [torch.randn(each, generator=generator, dtype=dtype).requires_grad_() for each in shapes]


def labels_like(x, classes=3, seed=0):
    return torch.randint(classes, (len(x), *x.shape[2:]), generator=seeded(seed))


def positions(grid):
    return itertools.product(*map(range, grid))


# --- what holds for all terms of one scale ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
def test_terms_say_what_they_read(name):
    assert (TERMS[name].reads, TERMS[name].adapt) == ("features", ADAPT[name])


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_least_at_the_teacher(name, shape):
    student, teacher = maps(*shape)
    labels = labels_like(student)
    same = teacher.detach().clone().requires_grad_()
    loss = TERMS[name](same, teacher.detach(), labels)
    assert abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss, same)[0].abs().max() < 1e-12
    assert TERMS[name](student, teacher, labels) > 1e-3


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("shape", [(2, 2, 2, 3), (1, 3, 2, 1, 2)])
def test_gradients_are_right_and_a_frozen_teacher_gets_none(name, shape):
    student, teacher = maps(*shape, teacher_channels=4 if name in ANY_CHANNELS else None)
    labels = torch.arange(student[:, 0].numel()).reshape(student[:, 0].shape) % 3
    assert torch.autograd.gradcheck(lambda s, t: TERMS[name](s, t, labels), (student, teacher))
    frozen = teacher.detach()
    TERMS[name](student, frozen, labels).backward()
    assert frozen.grad is None and student.grad.any()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_nothing_but_its_own_rounding(name, channels, dtype):
    student, teacher = (x.detach().to(dtype) for x in maps(2, channels, 8, 8))
    labels = labels_like(student)
    student.requires_grad_()
    with torch.autocast("cpu", dtype):
        half = TERMS[name](student, teacher, labels)
    assert half.dtype == torch.float32
    exact = TERMS[name](student.detach().double(), teacher.double(), labels)
    assert half.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-7)
    half.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("student", "teacher"), [(0.0, 0.0), (0.0, 1.0), (6e4, -6e4), (1e-30, 1e-30)])
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (2, 2, 2)])
def test_constant_maps_are_finite(name, channels, student, teacher, grid):
    student, teacher = (torch.full((1, channels, *grid), value, requires_grad=True) for value in (student, teacher))
    loss = TERMS[name](student, teacher, labels_like(student))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and teacher.grad.isfinite().all()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_images_does_not_matter(name, shape):
    student, teacher = maps(*shape)
    labels = labels_like(student)
    torch.testing.assert_close(
        TERMS[name](student.flip(0), teacher.flip(0), labels.flip(0)), TERMS[name](student, teacher, labels)
    )


@pytest.mark.parametrize("name", TERMS)
def test_only_some_terms_take_any_channels(name):
    student, teacher = maps(2, 3, 4, 4, teacher_channels=5)
    labels = labels_like(student)
    if name in ANY_CHANNELS:
        assert TERMS[name](student, teacher, labels) > 0
    else:
        with pytest.raises(InputError, match="channels"):
            TERMS[name](student, teacher, labels)


def test_feature_cwd_is_channel_wise_distillation_at_temperature_one():
    student, teacher = maps(2, 3, 4, 4)
    assert torch.equal(FeatureCWD()(student, teacher), ChannelWiseDistillation(1.0)(student, teacher))
    assert torch.equal(FeatureCWD(2.0)(student, teacher), ChannelWiseDistillation(2.0)(student, teacher))


# --- attention --------------------------------------------------------------------------------------------------------


def attention_oracle(student, teacher, power):
    losses = []
    for pair in zip(student, teacher, strict=True):
        vectors = []
        for x in pair:
            sums = torch.stack(
                [sum(x[(c, *at)].abs() ** power for c in range(len(x))) for at in positions(x.shape[1:])]
            )
            vectors.append(sums / (sums**2).sum().sqrt())
        losses.append(((vectors[0] - vectors[1]) ** 2).sum())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 4.0])
def test_attention_transfer_is_its_formula(shape, power):
    student, teacher = maps(*shape, teacher_channels=5)
    loss, expected = AttentionTransfer(power)(student, teacher), attention_oracle(student, teacher, power)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, (student, teacher)) for value in (loss, expected)]
    torch.testing.assert_close(*gradients)  # the scale that guards the powers is a constant without loss
    torch.testing.assert_close(ImportanceMap(power)(student, teacher), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_transfer_is_that_of_torchdistill_times_the_positions(torchdistill, shape):
    student, teacher = maps(*shape, teacher_channels=5)
    pair = {name: {"io": "output", "path": "layer"} for name in ("student", "teacher")}
    oracle = torchdistill.losses.mid_level.ATLoss({"pair": pair}, mode="code")
    expected = oracle({"layer": {"output": student}}, {"layer": {"output": teacher}}) * student[0, 0].numel()
    torch.testing.assert_close(AttentionTransfer()(student, teacher), expected)


@pytest.mark.parametrize("name", ["at", "emkd_importance"])
@few
@given(seed=seeds, factor=st.floats(0.01, 1000))
def test_attention_ignores_scale_sign_and_the_order_of_channels(name, seed, factor):
    student, teacher = maps(2, 3, 3, 4, seed=seed)
    term = TERMS[name]
    torch.testing.assert_close(term(-factor * student.flip(1), teacher.flip(1) / factor), term(student, teacher))


def test_attention_by_hand():
    student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, -3.0]], [[0.0, 4.0]]]])
    for term in (AttentionTransfer(), ImportanceMap()):
        assert term(student, teacher).item() == pytest.approx(2)  # apart: the most there is
        assert term(student, teacher.flip(3)).item() == pytest.approx(0)
    even = torch.ones(1, 1, 1, 2)
    assert AttentionTransfer()(student, even).item() == pytest.approx(2 - 2**0.5)


def test_the_default_powers_are_those_of_the_papers():
    student, teacher = maps(2, 3, 4, 4)
    torch.testing.assert_close(AttentionTransfer()(student, teacher), attention_oracle(student, teacher, 2))
    torch.testing.assert_close(ImportanceMap()(student, teacher), attention_oracle(student, teacher, 4))


@pytest.mark.parametrize("term", [AttentionTransfer, ImportanceMap])
@pytest.mark.parametrize("size", [1e-3, 6e4, 1e30])
def test_powers_neither_overflow_nor_vanish(term, size):
    student, teacher = (x.detach().float() for x in maps(2, 3, 4, 4))
    large = (size * student).requires_grad_()
    loss = term()(large, teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), term()(student, teacher))
    assert large.grad.isfinite().all() and large.grad.any()


@pytest.mark.parametrize("term", [AttentionTransfer, ImportanceMap, RegionAffinity])
@pytest.mark.parametrize("size", [1e-6, 1e-12, 1e-30])
def test_features_near_zero_have_bounded_gradients(term, size):
    student, teacher = (x.detach().float() for x in maps(2, 3, 4, 4))
    small = (size * student).requires_grad_()
    loss = term()(small, teacher, labels_like(small))
    loss.backward()
    assert loss.isfinite() and small.grad.abs().max() < 1e5


@pytest.mark.parametrize("power", [0.5, 0.0, -1.0, float("nan")])
def test_powers_without_a_gradient(power):
    with pytest.raises(InputError, match="power"):
        AttentionTransfer(power)


# --- region affinity --------------------------------------------------------------------------------------------------


def affinity_oracle(student, teacher, labels):
    """For every image and every pair of its regions: cosines of the mean features, one position after the other."""
    losses = []
    for i in range(len(student)):
        present = sorted(set(labels[i].flatten().tolist()))
        for a, b in itertools.combinations(present, 2):
            cosines = []
            for x in (student[i], teacher[i]):
                means = []
                for region in (a, b):
                    vectors = [x[(slice(None), *at)] for at in positions(x.shape[1:]) if labels[(i, *at)] == region]
                    means.append(sum(vectors) / len(vectors))
                cosines.append((means[0] * means[1]).sum() / (means[0].norm() * means[1].norm()))
            losses.append((cosines[0] - cosines[1]) ** 2)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (2, 3, 2, 3, 4), (1, 2, 4, 4)])
@pytest.mark.parametrize("classes", [2, 4])
def test_region_affinity_is_its_formula(shape, classes):
    student, teacher = maps(*shape, teacher_channels=5)
    labels = 3 * labels_like(student, classes)  # names need not follow on each other
    labels[0] = labels[0].clamp(max=3)  # the first image has two regions alone
    loss, expected = RegionAffinity()(student, teacher, labels), affinity_oracle(student, teacher, labels)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, (student, teacher)) for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_region_affinity_by_hand():
    labels = torch.tensor([[[0, 0, 1]]])
    alike = torch.tensor([[1.0, 3.0, 5.0], [1.0, 3.0, 5.0]])[None, :, None]  # means (2, 2) and (5, 5): cosine 1
    apart = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])[None, :, None]  # (1/2, 1/2) and (-1, -1): -1
    across = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])[None, :, None]
    assert RegionAffinity()(alike, apart, labels).item() == pytest.approx(4)
    assert RegionAffinity()(alike, across, labels).item() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 2, 2, 2)])
@pytest.mark.parametrize("label", [0, 2])
def test_one_region_alone_has_nothing_to_compare(shape, label):
    student, teacher = maps(*shape)
    loss = RegionAffinity()(student, teacher, torch.full((len(student), *shape[2:]), label))
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


def test_images_of_one_region_do_not_dilute_the_others():
    student, teacher = maps(4, 3, 4, 4)
    labels = labels_like(student, 2)
    labels[1:] = torch.arange(3)[:, None, None]  # one region each, and not the same
    loss = RegionAffinity()(student, teacher, labels)
    torch.testing.assert_close(loss, RegionAffinity()(student[:1], teacher[:1], labels[:1]))
    loss.backward()
    assert student.grad[0].any() and not student.grad[1:].any()


@few
@given(seed=seeds, factor=st.floats(0.1, 100))
def test_region_affinity_ignores_rotations_scale_and_the_names_of_regions(seed, factor):
    student, teacher = maps(2, 3, 3, 4, seed=seed)
    labels = labels_like(student, 3, seed)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=seeded(seed), dtype=torch.float64))[0]
    rotated = factor * torch.einsum("ij,bjhw->bihw", rotation, student)
    torch.testing.assert_close(
        RegionAffinity()(rotated, teacher, 7 - labels), RegionAffinity()(student, teacher, labels), atol=1e-6, rtol=1e-5
    )


def test_labels_come_to_the_grid_of_the_features_by_the_nearest_centre():
    student, teacher = maps(2, 3, 4, 4)
    labels = labels_like(torch.zeros(2, 1, 8, 8))
    torch.testing.assert_close(
        RegionAffinity()(student, teacher, labels), RegionAffinity()(student, teacher, labels[:, 1::2, 1::2])
    )


@pytest.mark.parametrize(
    ("labels", "message"), [(None, "needs labels"), (torch.zeros(3, 4, 4, dtype=torch.int64), "do not fit")]
)
def test_labels_that_region_affinity_cannot_use(labels, message):
    with pytest.raises(InputError, match=message):
        RegionAffinity()(*maps(2, 3, 4, 4), labels)


# --- ReviewKD ---------------------------------------------------------------------------------------------------------


def reviewed(grids, student_channels, teacher_channels, teacher_grids=None, width=3, batch=2, seed=0):
    """A ReviewKD in float64 with features for it."""
    torch.manual_seed(seed)
    module = ReviewKD(student_channels, teacher_channels, dims=len(grids[0]), width=width).double()
    student, teacher = (
        [torch.randn(batch, c, *grid, dtype=torch.float64).requires_grad_() for c, grid in zip(*each, strict=True)]
        for each in ((student_channels, grids), (teacher_channels, teacher_grids or grids))
    )
    return module, student, teacher


TWO = [(6, 5), (3, 2)], [2, 3], [4, 1]
THREE = [(4, 4), (2, 2), (2, 2)], [2, 1, 3], [1, 2, 2]
SOLID = [(3, 4, 2), (2, 2, 1)], [2, 2], [1, 3]
DECODER = [(2, 2), (4, 4)], [2, 3], [2, 2]  # a deeper scale may be the larger one
ALONE = [(4, 3)], [2], [3]
PYRAMIDS = {"two": TWO, "three": THREE, "solid": SOLID, "decoder": DECODER, "alone": ALONE}


def convolution_oracle(x, layer):
    """One image [N, grid] through a convolution with zero padding, window by window."""
    grid, reach = x.shape[1:], layer.kernel_size[0] // 2
    outputs = []
    for at in positions(grid):
        total = layer.bias
        for step in positions(layer.kernel_size):
            source = [a + s - reach for a, s in zip(at, step, strict=True)]
            if all(0 <= p < size for p, size in zip(source, grid, strict=True)):
                total = total + layer.weight[(slice(None), slice(None), *step)] @ x[(slice(None), *source)]
        outputs.append(total)
    return torch.stack(outputs, 1).reshape(-1, *grid)


def review_oracle(module, student):
    """Figure 3 of Chen 2021 for one image, scale by scale and position by position."""
    outputs, fused = {}, None
    for scale in range(len(student) - 1, -1, -1):
        features = convolution_oracle(student[scale], module.reduce[scale])
        if fused is not None:
            mixed = torch.empty_like(features)
            weight, bias = module.attend[scale].weight.flatten(1), module.attend[scale].bias
            grid = features.shape[1:]
            for at in positions(grid):
                nearest = [int((a + 0.5) * f / g) for a, f, g in zip(at, fused.shape[1:], grid, strict=True)]
                here, deeper = features[(slice(None), *at)], fused[(slice(None), *nearest)]
                attention = 1 / (1 + torch.exp(-(weight @ torch.cat([here, deeper]) + bias)))
                mixed[(slice(None), *at)] = here * attention[0] + deeper * attention[1]
            features = mixed
        fused = features
        outputs[scale] = convolution_oracle(fused, module.expand[scale])
    return [outputs[scale] for scale in range(len(student))]


@torch.no_grad()
@pytest.mark.parametrize("pyramid", PYRAMIDS.values(), ids=PYRAMIDS)
def test_the_fusion_is_its_formula(pyramid):
    module, student, _ = reviewed(*pyramid)
    got = module.review(student)
    for image in range(2):
        for ours, expected in zip(got, review_oracle(module, [x[image] for x in student]), strict=True):
            torch.testing.assert_close(ours[image], expected)


@pytest.mark.parametrize("pyramid", PYRAMIDS.values(), ids=PYRAMIDS)
def test_reviewkd_is_the_mean_of_the_scales_hierarchical_losses(pyramid):
    module, student, teacher = reviewed(*pyramid)
    losses = [hierarchical_context_loss(s, t) for s, t in zip(module.review(student), teacher, strict=True)]
    torch.testing.assert_close(module(student, teacher), sum(losses) / len(losses))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_the_hierarchical_loss_agrees_with_torchdistill(torchdistill, size):
    student, teacher = maps(2, 3, size, size)
    oracle = torchdistill.losses.mid_level.HierarchicalContextLoss("s", "io", "t", "io")
    expected = oracle({"s": {"io": (student, None)}}, {"t": {"io": teacher}})
    torch.testing.assert_close(hierarchical_context_loss(student, teacher), expected)


def test_the_hierarchical_loss_of_a_volume_by_hand():
    student, teacher = maps(2, 3, 4, 8, 4)  # averages over 2 and 1 an axis: the shortest axis has 4 already
    difference = (student - teacher).pow(2).mean()
    for size, weight in ((2, 1 / 2), (1, 1 / 4)):
        blocks = (student - teacher).reshape(2, 3, size, 4 // size, size, 8 // size, size, 4 // size).mean((3, 5, 7))
        difference = difference + weight * blocks.pow(2).mean()
    torch.testing.assert_close(hierarchical_context_loss(student, teacher), difference / 1.75)
    assert hierarchical_context_loss(student, student).item() == 0


def test_the_teacher_comes_to_the_grid_of_the_student():
    module, student, teacher = reviewed(*TWO, teacher_grids=[(3, 3), (6, 8)])
    resized = [
        torch.nn.functional.interpolate(t, size=s.shape[2:], mode="bilinear")
        for s, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(module(student, teacher), module(student, resized))


@pytest.mark.parametrize("pyramid", PYRAMIDS.values(), ids=PYRAMIDS)
def test_a_review_that_equals_the_teacher_costs_nothing(pyramid):
    module, student, teacher = reviewed(*pyramid)
    assert module(student, [x.detach() for x in module.review(student)]).item() == 0 < module(student, teacher).item()


@pytest.mark.parametrize("pyramid", [THREE, SOLID], ids=["three", "solid"])
def test_reviewkd_gradients_are_right_and_reach_every_scale_and_weight(pyramid):
    module, student, teacher = reviewed(*pyramid, width=2, batch=1)
    scales = len(student)
    assert torch.autograd.gradcheck(lambda *x: module(x[:scales], x[scales:]), (*student, *teacher))
    frozen = [x.detach() for x in teacher]
    module(student, frozen).backward()
    assert all(x.grad.any() for x in [*student, *module.parameters()])
    assert all(x.grad is None for x in frozen)


def test_an_image_counts_the_same_in_any_batch():
    module, student, teacher = reviewed(*THREE, batch=3)
    alone = [module([x[i : i + 1] for x in student], [x[i : i + 1] for x in teacher]) for i in range(3)]
    torch.testing.assert_close(module(student, teacher), sum(alone) / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [None, 0.0, 100.0])
def test_reviewkd_in_half_precision(dtype, value):
    module, student, teacher = reviewed(*TWO)
    student, teacher = ([x.detach().to(dtype) for x in each] for each in (student, teacher))
    if value is not None:
        student, teacher = ([torch.full_like(x, value) for x in each] for each in (student, teacher))
    for x in student:
        x.requires_grad_()
    exact = module([x.double() for x in student], [x.double() for x in teacher])
    with torch.autocast("cpu", dtype):
        half = module.float()(student, teacher)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=1e-5)
    half.backward()
    assert all(x.grad.isfinite().all() for x in [*student, *module.parameters()])


def test_reviewkd_learns():
    module, student, teacher = reviewed(*TWO, width=16)
    optimiser = torch.optim.Adam(module.parameters(), 0.01)
    before = module(student, teacher).item()
    for _ in range(60):
        optimiser.zero_grad()
        module([x.detach() for x in student], teacher).backward()
        optimiser.step()
    assert module(student, teacher).item() < 0.5 * before


def test_reviewkd_starts_with_the_variance_of_its_input():
    torch.manual_seed(0)
    features = [torch.randn(2, 16, 32, 32)]
    output = ReviewKD([16], [64], width=64).review(features)[0]
    assert 0.8 < output.std() < 1.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "0 scales"),
        (([2, 3], [4]), "2 scales of the student and 1 of the teacher"),
        (([2], [2], 1), "dimensions"),
        (([2], [2], 2, 0), "width"),
    ],
)
def test_reviews_that_cannot_be_built(arguments, message):
    with pytest.raises(InputError, match=message):
        ReviewKD(*arguments)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([(2, 2, 4, 4)], [(2, 4, 4, 4)], "2 scales"),
        ([(2, 2, 4, 4), (2, 3, 2, 2)], [(2, 4, 4, 4)], "2 scales"),
        ([(2, 2, 4, 4), (2, 2, 2, 2)], [(2, 4, 4, 4), (2, 1, 2, 2)], r"\[2, 3, 2 spatial axes\]"),
        ([(2, 2, 4, 4), (2, 3, 2, 2)], [(2, 4, 4, 4), (2, 4, 2, 2)], r"\[2, 1, 2 spatial axes\]"),
        ([(2, 2, 4, 4), (3, 3, 2, 2)], [(2, 4, 4, 4), (2, 1, 2, 2)], r"\[2, 3, 2 spatial axes\]"),
        ([(2, 2, 4, 4), (2, 3, 2, 2)], [(3, 4, 4, 4), (3, 1, 2, 2)], r"\[2, 4, 2 spatial axes\]"),
        ([(2, 2, 4, 4, 4), (2, 3, 2, 2)], [(2, 4, 4, 4), (2, 1, 2, 2)], "shape"),
        ([(2, 2, 0, 4), (2, 3, 2, 2)], [(2, 4, 4, 4), (2, 1, 2, 2)], "shape"),
    ],
)
def test_maps_that_a_review_cannot_take(student, teacher, message):
    module = ReviewKD([2, 3], [4, 1], width=2)
    with pytest.raises(InputError, match=message):
        module([torch.zeros(shape) for shape in student], [torch.zeros(shape) for shape in teacher])
