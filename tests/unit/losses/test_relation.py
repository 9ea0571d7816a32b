"""The relational terms against dense loops in float64, torchdistill and numbers by hand; the memories of CIRKD."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_common import admit, agree, labels_like, maps, rotated, seeded

from kdlib.losses.base import Context
from kdlib.losses.relation import IFVD, CrossImageRelation, PairwiseAffinity, SimilarityPreserving

SHAPES = [(3, 5, 6, 4), (2, 3, 4, 2, 3)]
PATIENTS = torch.arange(20)


def context(batch, seed=0):
    return Context(seeded(seed), PATIENTS[:batch])


def cirkd(**options):
    return admit(CrossImageRelation(**options))


def filled(channels, dims=2, **options):
    """A CIRKD term in evaluation mode whose memories hold two steps."""
    term = cirkd(**options)
    for step in range(2):
        student, teacher = maps(3, channels, *(6, 4, 3)[:dims], seed=10 + step)
        term(student, teacher, labels_like(student, seed=step), context(3, step))
    return term.eval()


def value(term, student, teacher, labels=None, seed=0):
    labels = labels_like(student) if labels is None else labels
    return term(student, teacher, labels, context(len(student), seed))


# --- similarity preserving --------------------------------------------------------------------------------------------


def similarity_oracle(student, teacher):
    """Entry by entry: the products of the images, each row divided by its length."""
    total = 0
    for i in range(len(student)):
        rows = [torch.stack([(x[i] * other).sum() for other in x]) for x in (student, teacher)]
        rows = [row / (row**2).sum().sqrt() for row in rows]
        total = total + ((rows[0] - rows[1]) ** 2).sum()
    return total / len(student) ** 2


@pytest.mark.parametrize("shape", SHAPES)
def test_similarity_preserving_is_its_formula(shape):
    student, teacher = maps(*shape, teacher_channels=7)
    loss, expected = SimilarityPreserving()(student, teacher), similarity_oracle(student, teacher)
    agree(loss, expected, student, teacher)


@pytest.mark.parametrize("shape", SHAPES)
def test_similarity_preserving_is_the_one_of_torchdistill_with_rows_of_length_one(shape, torchdistill, monkeypatch):
    # it calls normalize(z, 1), which makes the rows' absolute values sum to 1, where the paper has their length
    module = torchdistill.losses.mid_level
    monkeypatch.setattr(module, "normalize", lambda z, dim: F.normalize(z, dim=dim))
    student, teacher = maps(*shape, teacher_channels=7)
    oracle = module.SPKDLoss("s", "t", "batchmean")
    expected = oracle({"s": {"output": student}}, {"t": {"output": teacher}})
    torch.testing.assert_close(SimilarityPreserving()(student, teacher), expected)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 3e-4, 1.0, 1e10])
def test_similarity_preserving_does_not_depend_on_the_scale_of_the_features(scale):
    results = []
    for factor, dtype in ((1.0, torch.float64), (scale, torch.float32)):
        student, teacher = ((x.detach() * factor).to(dtype) for x in maps(4, 3, 6, 6))
        student.requires_grad_()
        loss = SimilarityPreserving()(student, teacher)
        results.append((loss.double(), torch.autograd.grad(loss, student)[0].double() * factor))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-8)


def test_similarity_preserving_by_hand():
    apart = torch.eye(2, dtype=torch.float64).reshape(2, 1, 1, 2)
    alike = torch.ones_like(apart)
    # rows (1, 0), (0, 1) against (1, 1) / sqrt 2, twice
    expected = (2 * (1 - math.sqrt(0.5)) ** 2 + 2 * 0.5) / 4
    assert SimilarityPreserving()(apart, alike).item() == pytest.approx(expected)


# --- pair-wise affinity -----------------------------------------------------------------------------------------------


def affinity_oracle(student, teacher, grid):
    """Window by window, position by position. Sizes of the maps are multiples of the grid's."""
    affinities = []
    for x in (student, teacher):
        images = []
        for image in x:
            steps = [n // g for n, g in zip(image.shape[1:], grid, strict=True)]
            nodes = []
            for place in torch.cartesian_prod(*[torch.arange(g) for g in grid]):
                window = image
                for axis, (p, step) in enumerate(zip(place.tolist(), steps, strict=True)):
                    window = window.narrow(axis + 1, p * step, step)
                nodes.append(window.flatten(1).mean(1))
            images.append(torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in nodes]) for a in nodes]))
        affinities.append(torch.stack(images))
    return ((affinities[0] - affinities[1]) ** 2).mean()


@pytest.mark.parametrize(
    ("shape", "options", "grid"),
    [
        ((2, 5, 6, 4), {}, (3, 2)),
        ((2, 5, 6, 4), {"scale": 1.0}, (6, 4)),
        ((2, 5, 6, 8), {"scale": 1.0, "nodes": 6}, (2, 2)),
        ((2, 3, 4, 4, 2), {}, (2, 2, 1)),
        ((2, 3, 6, 6, 2), {"scale": 1.0, "nodes": 18}, (3, 3, 2)),
    ],
)
def test_affinity_is_its_formula(shape, options, grid):
    student, teacher = maps(*shape, teacher_channels=4)
    loss = PairwiseAffinity(**options)(student, teacher)
    expected = affinity_oracle(student, teacher, grid)
    agree(loss, expected, student, teacher)


def test_affinity_by_hand():
    apart = torch.eye(2, dtype=torch.float64).reshape(1, 2, 1, 2)  # two pixels, orthogonal
    alike = torch.ones_like(apart)
    assert PairwiseAffinity(scale=1)(apart, alike).item() == pytest.approx(0.5)  # 2 of 4 pairs differ by 1
    assert PairwiseAffinity(scale=1)(apart, apart.flip(3)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("shape", "most"), [((1, 2, 64, 64), 16), ((1, 2, 24, 24, 24), 6)])
def test_affinity_of_large_maps_is_that_of_256_nodes(shape, most):
    student, teacher = maps(*shape)
    pooled = [x.unflatten(2, (most, -1)).mean(3) for x in (student, teacher)]
    for axis in range(3, len(shape)):
        pooled = [x.unflatten(axis, (most, -1)).mean(axis + 1) for x in pooled]
    torch.testing.assert_close(PairwiseAffinity()(student, teacher), PairwiseAffinity(scale=1)(*pooled))


# --- intra-class variation --------------------------------------------------------------------------------------------


def ifvd_oracle(student, teacher, labels):
    """Pixel by pixel: the cosine to the mean of the class's pixels in the image."""
    total = []
    for b in range(len(student)):
        for p in range(labels[b].numel()):
            own = labels[b].flatten() == labels[b].flatten()[p]
            cosines = [
                F.cosine_similarity(x[b].flatten(1)[:, p], x[b].flatten(1)[:, own].mean(1), dim=0)
                for x in (student, teacher)
            ]
            total.append((cosines[0] - cosines[1]) ** 2)
    return torch.stack(total).mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_ifvd_is_its_formula(shape, classes):
    student, teacher = maps(*shape, teacher_channels=7)
    labels = labels_like(student, classes)
    labels[1] = 0  # an image without some of the classes
    loss, expected = IFVD()(student, teacher, labels), ifvd_oracle(student, teacher, labels)
    agree(loss, expected, student, teacher)


def test_ifvd_by_hand():
    apart = torch.eye(2, dtype=torch.float64).reshape(1, 2, 1, 2)  # both at 45 degrees to their mean
    alike = torch.ones_like(apart)
    labels = torch.zeros(1, 1, 2, dtype=torch.int64)
    assert IFVD()(apart, alike, labels).item() == pytest.approx((1 - math.sqrt(0.5)) ** 2)


# --- relation across images -------------------------------------------------------------------------------------------


def divergence_oracle(z_student, z_teacher, k_student, k_teacher, temperature):
    """KL of the relation of one vector to some keys."""
    p, q = (
        (F.cosine_similarity(z[None], keys) / temperature).exp()
        for z, keys in ((z_teacher, k_teacher), (z_student, k_student))
    )
    p, q = p / p.sum(), q / q.sum()
    return (p * (p / q).log()).sum()


def minibatch_oracle(student, teacher, temperature):
    total = 0
    for i in range(len(student)):
        for j in range(len(student)):
            s_i, s_j, t_i, t_j = (x[b].flatten(1).T for x in (student, teacher) for b in (i, j))
            rows = [divergence_oracle(s, t, s_j, t_j, temperature) for s, t in zip(s_i, t_i, strict=True)]
            total = total + sum(rows) / len(rows)
    return total / len(student) ** 2


@pytest.mark.parametrize("shape", [(3, 5, 3, 4), (2, 3, 2, 2, 3), (1, 4, 3, 3)])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_minibatch_relation_is_its_formula(shape, temperature):
    student, teacher = maps(*shape)
    loss = value(cirkd(temperature=temperature, weights=(1, 0, 0)), student, teacher)
    expected = minibatch_oracle(student, teacher, temperature)
    agree(loss, expected, student, teacher)


def test_minibatch_relation_is_of_the_pooled_maps():
    student, teacher = maps(2, 3, 8, 6)
    pooled = [F.avg_pool2d(x, (4, 3)) for x in (student, teacher)]
    loss = value(cirkd(weights=(2, 0, 0), nodes=4), student, teacher)
    torch.testing.assert_close(loss, 2 * minibatch_oracle(*pooled, 0.1))


def memory_oracle(student, teacher, keys, temperature, chosen):
    rows = [
        divergence_oracle(
            *(x[b].flatten(1)[:, p] for x in (student, teacher)), keys.double(), keys.double(), temperature
        )
        for b, p in chosen
    ]
    return sum(rows) / len(rows)


@pytest.mark.parametrize("weights", [(0, 1, 0), (0, 0, 1), (0.5, 0.2, 3)])
@pytest.mark.parametrize("dims", [2, 3])
def test_relation_to_a_memory_is_its_formula(weights, dims):
    student, teacher = maps(2, 3, *(3, 4, 2)[:dims], seed=5)
    term = filled(3, dims, temperature=0.3, weights=weights, pixels=3)
    term.pixels = 10_000  # more than there are: all are taken
    pixels, regions = term.pixel_bank.entries()[0], term.region_bank.entries()[0]
    everywhere = [(b, p) for b in range(2) for p in range(student[0, 0].numel())]
    expected = (
        weights[0] * minibatch_oracle(student, teacher, 0.3)
        + weights[1] * memory_oracle(student, teacher, pixels, 0.3, everywhere)
        + weights[2] * memory_oracle(student, teacher, regions, 0.3, everywhere)
    )
    loss = value(term, student, teacher)
    agree(loss, expected, student, teacher, rtol=1e-5, atol=1e-7)  # the memory keeps single precision


def test_an_empty_memory_leaves_the_minibatch_alone():
    student, teacher = maps(2, 3, 4, 4)
    first = value(cirkd(weights=(1, 5, 5)), student, teacher)
    torch.testing.assert_close(first, value(cirkd(weights=(1, 0, 0)), student, teacher))


def test_a_batch_is_compared_with_earlier_ones_before_it_enters():
    term = cirkd(weights=(0, 1, 1), pixels=2)
    batches = [(*maps(2, 3, 4, 4, seed=seed), context(2, seed)) for seed in range(3)]
    copies = []
    for step, (student, teacher, given) in enumerate(batches):
        state = {name: x.clone() for name, x in term.state_dict().items()}
        loss = term(student, teacher, labels_like(student), given)
        loss.backward() if step else None  # the push must not disturb what backward needs
        before = cirkd(weights=(0, 1, 1), pixels=2)
        before.load_state_dict(state)
        copies.append(before.eval()(student, teacher, labels_like(student), context(2, step)) - loss)
    assert max(copies).item() == min(copies).item() == 0
    assert len(term.region_bank) > len(before.region_bank) > 0


def test_what_enters_the_memories():
    student, teacher = maps(3, 4, 6, 6)
    labels = labels_like(student, 2)
    labels[0] = 0
    labels[1, 2, 3] = 2  # a class of one pixel
    term = cirkd(pixels=4)
    term(student, teacher, labels, Context(seeded(), torch.tensor([7, 9, 9])))

    vectors, of, patients = term.pixel_bank.entries()
    assert not vectors.requires_grad
    found = []
    for vector, label, patient in zip(vectors, of, patients, strict=True):
        similarity = F.cosine_similarity(teacher.float(), vector[None, :, None, None], dim=1)
        b, i, j = (
            (similarity > 1 - 1e-5).nonzero()[0].tolist()
        )  # it is a pixel of the teacher, of this class and patient
        assert labels[b, i, j] == label and [7, 9, 9][b] == patient
        found.append((b, i, j))
    assert len(set(found)) == len(found) and (1, 2, 3) in found
    counts = {(b, int(labels[b, i, j])): 0 for b, i, j in found}
    for b, i, j in found:
        counts[b, int(labels[b, i, j])] += 1
    assert counts == {(0, 0): 4, (1, 0): 4, (1, 1): 4, (1, 2): 1, (2, 0): 4, (2, 1): 4}

    vectors, of, patients = term.region_bank.entries()
    assert of.tolist() == [0, 0, 1, 2, 0, 1] and patients.tolist() == [7, 9, 9, 9, 9, 9]
    image = [0, 1, 1, 1, 2, 2]
    unit = teacher / teacher.norm(dim=1, keepdim=True)
    for vector, b, label in zip(vectors, image, of, strict=True):
        mean = unit[b][:, labels[b] == label].mean(1)
        torch.testing.assert_close(vector.double(), (mean / mean.norm()).detach(), rtol=1e-5, atol=1e-6)


def test_a_region_of_one_pixel_in_a_large_map_is_a_unit_vector():
    student, teacher = maps(1, 4, 128, 128, dtype=torch.float32)
    labels = torch.zeros(1, 128, 128, dtype=torch.int64)
    labels[0, 7, 9] = 1
    term = cirkd(weights=(0, 1, 1))
    value(term, student, teacher, labels)
    torch.testing.assert_close(term.region_bank.entries()[0].norm(dim=1), torch.ones(2))


def test_keys_are_drawn_in_equal_number_from_each_class():
    """Keys are the axes of space, and z is near to all: the gradient of channel i tells whether key i is drawn."""
    term = cirkd(weights=(0, 1, 0), pixel_memory=500, pixel_keys=30)
    term.pixel_bank.push(torch.eye(500), torch.tensor([0] * 400 + [2] * 95 + [5] * 5), PATIENTS.repeat(25))
    student = torch.ones(1, 500, 1, 1, dtype=torch.float64, requires_grad=True)
    teacher = torch.rand(1, 500, 1, 1, dtype=torch.float64, generator=seeded()) + 1
    value(term.eval(), student, teacher, torch.zeros(1, 1, 1).long()).backward()
    gradient = student.grad.flatten()
    drawn = (gradient - gradient.median()).abs() > 1e-12  # most axes are no keys
    assert [int(part.sum()) for part in drawn.split([400, 95, 5])] == [10, 10, 5]  # a third each, or all there are


def test_a_small_organ_counts_as_much_as_the_background():
    student, teacher = maps(1, 4, 16, 16)
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    labels[0, 3, 4:8] = 1
    value(filled(4, weights=(0, 1, 1), pixels=4), student, teacher, labels).backward()
    touched = student.grad.abs().sum(1) > 0
    assert touched[labels == 1].sum() == 4 and touched[labels == 0].sum() == 4


def test_cirkd_sees_a_rotation_against_a_memory_that_is_not_turned():
    student, teacher = maps(3, 3, 6, 4)
    term = filled(3, weights=(0, 1, 0))
    assert (value(term, rotated(student), teacher) - value(term, student, teacher)).abs() > 1e-3


def test_cirkd_is_reproducible_and_draws_anew():
    student, teacher = maps(3, 4, 6, 6)
    term = filled(4, pixels=2, pixel_keys=9)
    assert value(term, student, teacher, seed=1) == value(term, student, teacher, seed=1)
    assert value(term, student, teacher, seed=1) != value(term, student, teacher, seed=2)
