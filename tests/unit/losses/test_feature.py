"""Distillation of features: loops in float64, other libraries, and numbers by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_common import agree, labels_like, maps

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

SHAPES = [(2, 1, 4, 5), (3, 4, 3, 3), (2, 3, 2, 3, 4)]


def positions(grid):
    return itertools.product(*map(range, grid))


@pytest.mark.parametrize("shape", SHAPES)
def test_feature_mse_is_its_formula_and_feature_cwd_is_cwd_at_temperature_one(shape):
    student, teacher = maps(*shape)
    torch.testing.assert_close(FeatureMSE()(student, teacher), (student - teacher).pow(2).sum() / student.numel())
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
@pytest.mark.parametrize("term, power", [(AttentionTransfer, 2.0), (ImportanceMap, 4.0), (AttentionTransfer, 1.0)])
def test_attention_is_its_formula_with_the_powers_of_the_papers_by_default(shape, term, power):
    student, teacher = maps(*shape, teacher_channels=5)
    loss = (term() if power > 1 else term(power))(student, teacher)
    # the scale that guards the powers is a constant without loss
    agree(loss, attention_oracle(student, teacher, power), student, teacher)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_transfer_is_that_of_torchdistill_times_the_positions(torchdistill, shape):
    student, teacher = maps(*shape, teacher_channels=5)
    pair = {name: {"io": "output", "path": "layer"} for name in ("student", "teacher")}
    oracle = torchdistill.losses.mid_level.ATLoss({"pair": pair}, mode="code")
    expected = oracle({"layer": {"output": student}}, {"layer": {"output": teacher}}) * student[0, 0].numel()
    torch.testing.assert_close(AttentionTransfer()(student, teacher), expected)


def test_attention_by_hand():
    student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, -3.0]], [[0.0, 4.0]]]])
    for term in (AttentionTransfer(), ImportanceMap()):
        assert term(student, teacher).item() == pytest.approx(2)  # apart: the most there is
        assert term(student, teacher.flip(3)).item() == pytest.approx(0)
    even = torch.ones(1, 1, 1, 2)
    assert AttentionTransfer()(student, even).item() == pytest.approx(2 - 2**0.5)


@pytest.mark.parametrize("term", [AttentionTransfer, ImportanceMap])
@pytest.mark.parametrize("size", [1e-3, 6e4, 1e30])
def test_powers_neither_overflow_nor_vanish(term, size):
    student, teacher = (x.detach().float() for x in maps(2, 3, 4, 4))
    large = (size * student).requires_grad_()
    loss = term()(large, teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), term()(student, teacher))
    assert large.grad.isfinite().all() and large.grad.any()


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
    agree(RegionAffinity()(student, teacher, labels), affinity_oracle(student, teacher, labels), student, teacher)


def test_region_affinity_by_hand():
    labels = torch.tensor([[[0, 0, 1]]])
    alike = torch.tensor([[1.0, 3.0, 5.0], [1.0, 3.0, 5.0]])[None, :, None]  # means (2, 2) and (5, 5): cosine 1
    apart = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])[None, :, None]  # (1/2, 1/2) and (-1, -1): -1
    across = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])[None, :, None]
    assert RegionAffinity()(alike, apart, labels).item() == pytest.approx(4)
    assert RegionAffinity()(alike, across, labels).item() == pytest.approx(1)


def test_images_of_one_region_have_nothing_to_compare_and_do_not_dilute_the_others():
    student, teacher = maps(4, 3, 4, 4)
    labels = labels_like(student, 2)
    labels[1:] = torch.arange(3)[:, None, None]  # one region each, and not the same
    loss = RegionAffinity()(student, teacher, labels)
    torch.testing.assert_close(loss, RegionAffinity()(student[:1], teacher[:1], labels[:1]))
    alone = RegionAffinity()(student[1:], teacher[1:], labels[1:])
    (loss + alone).backward()
    assert alone.item() == 0 and student.grad[0].any() and not student.grad[1:].any()


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
def test_reviewkd_is_the_mean_hierarchical_loss_of_the_fused_scales(pyramid):
    module, student, teacher = reviewed(*pyramid)
    images = [review_oracle(module, [x[i] for x in student]) for i in range(2)]
    fused = [torch.stack(scale) for scale in zip(*images, strict=True)]
    losses = [hierarchical_context_loss(s, t) for s, t in zip(fused, teacher, strict=True)]
    torch.testing.assert_close(module(student, teacher), sum(losses) / len(losses))
    assert module(student, module.review(student)).item() == 0


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


def test_the_teacher_comes_to_the_grid_of_the_student():
    module, student, teacher = reviewed(*TWO, teacher_grids=[(3, 3), (6, 8)])
    resized = [
        torch.nn.functional.interpolate(t, size=s.shape[2:], mode="bilinear")
        for s, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(module(student, teacher), module(student, resized))


def test_reviewkd_passes_a_gradient_to_every_scale_and_weight_and_learns():
    module, student, teacher = reviewed(*THREE, width=16)
    teacher = [x.detach() for x in teacher]
    optimiser = torch.optim.Adam(module.parameters(), 0.03)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        losses.append(module(student, teacher))
        losses[-1].backward()
        assert all(x.grad.any() for x in [*student, *module.parameters()])
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


def test_reviewkd_starts_with_the_variance_of_its_input():
    torch.manual_seed(0)
    output = ReviewKD([16], [64], width=64).review([torch.randn(2, 16, 32, 32)])[0]
    assert 0.8 < output.std() < 1.2


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
