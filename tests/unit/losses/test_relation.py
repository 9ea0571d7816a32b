"""The relational terms against dense loops in float64, known values, invariances, and the batches that are hard."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdlib.config import InputError
from kdlib.losses.base import Context
from kdlib.losses.relation import IFVD, CrossImageRelation, PairwiseAffinity, SimilarityPreserving

SHAPES = [(3, 5, 6, 4), (2, 3, 4, 2, 3)]
PATIENTS = torch.arange(100)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(*shape, seed=0, dtype=torch.float64, teacher_channels=None):
    generator = seeded(seed)
    other = (shape[0], teacher_channels or shape[1], *shape[2:])
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in (shape, other)]


def labels_like(x, classes=3, seed=0):
    return torch.randint(classes, (len(x), *x.shape[2:]), generator=seeded(seed))


def context(batch, seed=0, step=0):
    return Context(seeded(seed), PATIENTS[:batch], step)


def cirkd(**options):
    term = CrossImageRelation(**options)
    for bank in (term.pixel_bank, term.region_bank):
        bank.allow_patients(range(100))
    return term


def filled(channels, dims=2, **options):
    """A CIRKD term in evaluation mode whose memories hold two steps."""
    term = cirkd(**options)
    for step in range(2):
        shape = (3, channels, *(6, 4, 3)[:dims])
        student, teacher = maps(*shape, seed=10 + step)
        term(student, teacher, labels_like(student, seed=step), context(3, step, step))
    return term.eval()


def terms(channels, dims=2):
    return {
        "sp": SimilarityPreserving(),
        "emkd_affinity": PairwiseAffinity(),
        "affinity max": PairwiseAffinity(pool="max"),
        "ifvd": IFVD(),
        "cirkd": filled(channels, dims, temperature=0.4, weights=(1, 1, 1), nodes=9, pixels=3),
    }


NAMES = ["sp", "emkd_affinity", "affinity max", "ifvd", "cirkd"]


def value(term, student, teacher, labels=None, seed=0):
    labels = labels_like(student) if labels is None else labels
    return term(student, teacher, labels, context(len(student), seed))


# --- what all terms share ---------------------------------------------------------------------------------------------


def test_what_the_terms_ask_of_the_harness():
    for term in (SimilarityPreserving, PairwiseAffinity, IFVD):
        assert (term.reads, term.adapt) == ("features", "none")
    assert (CrossImageRelation.reads, CrossImageRelation.adapt) == ("features", "student")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_student_like_its_teacher_has_no_loss(name, shape):
    x = maps(*shape)[0]
    loss = value(terms(shape[1], len(shape) - 2)[name], x, x.detach())
    assert abs(loss.item()) < 1e-12
    loss.backward()
    assert x.grad.abs().max() < 1e-9  # a minimum


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_reach_both_sides_and_are_right(name, shape):
    shape = (*shape[:2], *(n // 2 + 1 for n in shape[2:]))
    student, teacher = maps(*shape)
    term = terms(shape[1], len(shape) - 2)[name]
    assert torch.autograd.gradcheck(lambda s, t: value(term, s, t), (student, teacher), fast_mode=name == "cirkd")
    value(term, student, teacher).backward()
    assert student.grad.abs().max() > 1e-6 and teacher.grad.abs().max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_teacher_gets_no_gradient(name):
    student, teacher = maps(3, 5, 6, 4)
    teacher = teacher.detach()
    value(terms(5)[name], student, teacher).backward()
    assert teacher.grad is None and student.grad.any()


@pytest.mark.parametrize("name", NAMES[:-1])
def test_channels_may_differ_where_nothing_is_adapted(name):
    student, teacher = maps(3, 2, 4, 2, teacher_channels=5)
    term = terms(2)[name]
    assert torch.autograd.gradcheck(lambda s, t: value(term, s, t), (student, teacher))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 8])
def test_terms_are_finite_in_half_precision_and_keep_single(name, dtype, channels):
    student, teacher = maps(4, channels, 8, 8, dtype=torch.float32)
    term = terms(channels)[name]
    with torch.autocast("cpu", dtype):
        half = value(term, student.to(dtype), teacher.to(dtype))
    assert half.dtype == torch.float32
    # what half inputs lose is their own rounding: nothing more is lost inside
    exact = value(term, student.to(dtype).double(), teacher.to(dtype).double())
    assert half.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-8)
    half.backward()
    assert student.grad.isfinite().all() and teacher.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("student", "teacher"), [(0.0, 0.0), (0.0, 1.0), (1e4, -1e4), (6e4, 1.0), (1e-30, 1e-30)])
def test_constant_maps_are_finite(name, student, teacher):
    student, teacher = (torch.full((2, 4, 4, 4), x, requires_grad=True) for x in (student, teacher))
    loss = value(terms(4)[name], student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and teacher.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_dead_position_of_the_student_has_a_bounded_gradient(name):
    student, teacher = maps(2, 4, 8, 8, dtype=torch.float32)
    dead = student.detach().clone()
    dead[0, :, :2, :2] = 0  # a ReLU can leave no channel alive
    dead.requires_grad_()
    value(terms(4)[name], dead, teacher).backward()
    assert 0 < dead.grad.abs().max() < 1e4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("label", [0, 1, 7])
def test_a_batch_of_one_image_and_one_class_is_finite(name, label):
    student, teacher = maps(1, 4, 4, 4)
    loss = value(terms(4)[name], student, teacher, torch.full((1, 4, 4), label))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and teacher.grad.isfinite().all()
    assert loss == 0 if name == "sp" else loss > 0  # one image has no other to be like


@pytest.mark.parametrize("name", NAMES)
def test_a_map_of_one_position_is_finite(name):
    student, teacher = maps(2, 4, 1, 1)
    loss = value(terms(4)[name], student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", ["ifvd", "cirkd"])
@pytest.mark.parametrize(("labels", "message"), [(None, "needs labels"), ((3, 4, 4), "labels"), ((2, 4), "labels")])
def test_labels_that_do_not_fit(name, labels, message):
    labels = None if labels is None else torch.zeros(labels, dtype=torch.int64)
    with pytest.raises(InputError, match=message):
        terms(4)[name](torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4), labels, context(2))


@pytest.mark.parametrize("name", ["ifvd", "cirkd"])
def test_labels_come_to_the_grid_of_the_maps(name):
    student, teacher = maps(2, 4, 4, 4)
    labels = labels_like(student)
    fine = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    term = terms(4)[name]
    torch.testing.assert_close(value(term, student, teacher, fine), value(term, student, teacher, labels))


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_images_is_nothing(name):
    student, teacher = maps(3, 4, 6, 4)
    labels = labels_like(student)
    order = torch.tensor([2, 0, 1])
    term = filled(4, weights=(1, 1, 1), pixels=10_000) if name == "cirkd" else terms(4)[name]  # all pixels, so no draw
    expected = value(term, student, teacher, labels)
    torch.testing.assert_close(value(term, student[order], teacher[order], labels[order]), expected)


@pytest.mark.parametrize("name", ["sp", "emkd_affinity", "ifvd"])
def test_a_rotation_of_channels_and_one_scale_are_nothing(name):
    student, teacher = maps(3, 5, 6, 4)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=seeded(), dtype=torch.float64))[0]
    term = terms(5)[name]
    turned = torch.einsum("ij,bjhw->bihw", rotation, student)
    torch.testing.assert_close(value(term, 7 * turned, teacher / 3), value(term, student, teacher))


def test_cirkd_is_blind_to_a_rotation_of_both_within_a_batch_but_not_to_a_memory_that_is_not_turned():
    student, teacher = maps(3, 5, 6, 4)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=seeded(), dtype=torch.float64))[0]
    turned = torch.einsum("ij,bjhw->bihw", rotation, student)
    batch, memory = cirkd(weights=(1, 0, 0)), filled(5, weights=(0, 1, 0))
    torch.testing.assert_close(value(batch, turned, teacher), value(batch, student, teacher))
    assert (value(memory, turned, teacher) - value(memory, student, teacher)).abs() > 1e-3


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
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*[torch.autograd.grad(x, (student, teacher)) for x in (loss, expected)])


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


def affinity_oracle(student, teacher, grid, pool):
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
                window = window.flatten(1)
                nodes.append(window.mean(1) if pool == "avg" else window.max(1).values)
            images.append(torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in nodes]) for a in nodes]))
        affinities.append(torch.stack(images))
    return ((affinities[0] - affinities[1]) ** 2).mean()


@pytest.mark.parametrize("pool", ["avg", "max"])
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
def test_affinity_is_its_formula(shape, options, grid, pool):
    student, teacher = maps(*shape, teacher_channels=4)
    loss = PairwiseAffinity(pool=pool, **options)(student, teacher)
    expected = affinity_oracle(student, teacher, grid, pool)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*[torch.autograd.grad(x, (student, teacher)) for x in (loss, expected)])


def test_affinity_by_hand():
    apart = torch.eye(2, dtype=torch.float64).reshape(1, 2, 1, 2)  # two pixels, orthogonal
    alike = torch.ones_like(apart)
    assert PairwiseAffinity(scale=1)(apart, alike).item() == pytest.approx(0.5)  # 2 of 4 pairs differ by 1
    assert PairwiseAffinity(scale=1)(apart, apart.flip(3)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("shape", "most"), [((1, 2, 64, 64), 16**2), ((1, 2, 32, 32, 32), 6**3)])
def test_affinity_of_large_maps_stays_small(shape, most, monkeypatch):
    seen = []
    monkeypatch.setattr(F, "mse_loss", lambda s, t: seen.append(s.shape) or s.mean())
    PairwiseAffinity()(*maps(*shape, dtype=torch.float32))
    assert seen == [(1, most, most)]


def test_affinity_does_not_change_with_a_permutation_of_positions_alike_in_both():
    student, teacher = maps(2, 4, 5, 3)
    order = torch.randperm(15, generator=seeded())
    moved = [x.flatten(2)[..., order].unflatten(2, (5, 3)) for x in (student, teacher)]
    loss = PairwiseAffinity(scale=1)
    torch.testing.assert_close(loss(*moved), loss(student, teacher))


@pytest.mark.parametrize("options", [{"scale": 0}, {"scale": 1.5}, {"nodes": 1}, {"pool": "mean"}])
def test_affinity_refuses_options_out_of_range(options):
    with pytest.raises(InputError, match=next(iter(options))):
        PairwiseAffinity(**options)


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
    loss, expected = IFVD()(student, teacher, labels), ifvd_oracle(student, teacher, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*[torch.autograd.grad(x, (student, teacher)) for x in (loss, expected)])


def test_ifvd_where_an_image_lacks_a_class():
    student, teacher = maps(2, 5, 4, 4)
    labels = labels_like(student, 3)
    labels[1] = 0
    torch.testing.assert_close(IFVD()(student, teacher, labels), ifvd_oracle(student, teacher, labels))
    # its prototypes are its own: the other image changes nothing in it
    alone = [IFVD()(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(IFVD()(student, teacher, labels), sum(alone) / 2)


def test_ifvd_of_classes_of_one_pixel_is_zero():
    student, teacher = maps(2, 5, 2, 2)
    assert IFVD()(student, teacher, torch.arange(4).reshape(1, 2, 2).expand(2, 2, 2)).item() < 1e-20


def test_ifvd_ignores_the_names_of_classes():
    student, teacher = maps(2, 5, 4, 4)
    labels = labels_like(student, 3)
    renamed = torch.tensor([4, 0, 9])[labels]
    torch.testing.assert_close(IFVD()(student, teacher, renamed), IFVD()(student, teacher, labels))


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
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*[torch.autograd.grad(x, (student, teacher)) for x in (loss, expected)])


def test_minibatch_relation_is_of_the_pooled_maps():
    student, teacher = maps(2, 3, 8, 6)
    pooled = [F.avg_pool2d(x, (4, 3)) for x in (student, teacher)]
    loss = value(cirkd(weights=(2, 0, 0), nodes=4), student, teacher)
    torch.testing.assert_close(loss, 2 * minibatch_oracle(*pooled, 0.1))


def test_minibatch_relation_needs_neither_labels_nor_patients():
    student, teacher = maps(2, 3, 4, 4)
    assert cirkd(weights=(1, 0, 0))(student, teacher).isfinite()


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
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)  # the memory keeps single precision
    torch.testing.assert_close(
        *[torch.autograd.grad(x, (student, teacher)) for x in (loss, expected)], rtol=1e-5, atol=1e-7
    )


def test_an_empty_memory_leaves_the_minibatch_alone():
    student, teacher = maps(2, 3, 4, 4)
    first = value(cirkd(weights=(1, 5, 5)), student, teacher)
    torch.testing.assert_close(first, value(cirkd(weights=(1, 0, 0)), student, teacher))


def test_a_batch_is_compared_with_earlier_ones_before_it_enters():
    term = cirkd(weights=(0, 1, 1), pixels=2)
    batches = [(*maps(2, 3, 4, 4, seed=seed), context(2, seed, seed)) for seed in range(3)]
    copies = []
    for step, (student, teacher, given) in enumerate(batches):
        state = {name: x.clone() for name, x in term.state_dict().items()}
        loss = term(student, teacher, labels_like(student), given)
        loss.backward() if step else None  # the push must not disturb what backward needs
        before = cirkd(weights=(0, 1, 1), pixels=2)
        before.load_state_dict(state)
        copies.append(before.eval()(student, teacher, labels_like(student), context(2, step)) - loss)
    assert max(copies).item() == min(copies).item() == 0
    assert term.pixel_bank.entries()[3].unique().tolist() == [0, 1, 2]


def test_what_enters_the_memories():
    student, teacher = maps(3, 4, 6, 6)
    labels = labels_like(student, 2)
    labels[0] = 0
    labels[1, 2, 3] = 2  # a class of one pixel
    term = cirkd(pixels=4)
    term(student, teacher, labels, Context(seeded(), torch.tensor([7, 9, 9]), step=12))

    vectors, of, patients, steps = term.pixel_bank.entries()
    assert (steps == 12).all() and not vectors.requires_grad
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

    vectors, of, patients, steps = term.region_bank.entries()
    assert of.tolist() == [0, 0, 1, 2, 0, 1] and patients.tolist() == [7, 9, 9, 9, 9, 9] and (steps == 12).all()
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


def test_nothing_enters_the_memories_in_evaluation():
    term = filled(4)
    before = {name: x.clone() for name, x in term.state_dict().items()}
    student, teacher = maps(2, 4, 4, 4)
    term(student, teacher, labels_like(student), Context(seeded()))  # and no patients are needed
    torch.testing.assert_close(term.state_dict(), before, rtol=0, atol=0)


def test_keys_are_drawn_in_equal_number_from_each_class(monkeypatch):
    term = cirkd(weights=(0, 1, 0), pixel_memory=500, pixel_keys=30)
    labels = torch.tensor([0] * 400 + [2] * 95 + [5] * 5)
    term.pixel_bank.push(torch.eye(500), labels, PATIENTS.repeat(5), 0)
    seen = []
    divergence = CrossImageRelation.compare.__globals__["_divergence"]
    monkeypatch.setitem(
        CrossImageRelation.compare.__globals__, "_divergence", lambda s, t: seen.append(s) or divergence(s, t)
    )
    one = torch.eye(500).reshape(1, 500, 1, 500) + 0.1  # pixel i is near to key i
    value(term.eval(), one, one, torch.zeros(1, 1, 500, dtype=torch.int64))
    drawn = seen[1]
    assert drawn.shape[1] == 10 + 10 + 5  # a third of 30 each, and all of the class that has fewer
    one_of = filled(3, weights=(0, 1, 0), pixel_keys=1)  # at least one a class
    student, teacher = maps(2, 3, 4, 4)
    seen.clear()
    value(one_of, student, teacher)
    assert seen[1].shape[1] == 3


def test_a_small_organ_counts_as_much_as_the_background():
    student, teacher = maps(1, 4, 16, 16)
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    labels[0, 3, 4:8] = 1
    value(filled(4, weights=(0, 1, 1), pixels=4), student, teacher, labels).backward()
    touched = student.grad.abs().sum(1) > 0
    assert touched[labels == 1].sum() == 4 and touched[labels == 0].sum() == 4


def test_cirkd_is_reproducible_and_draws_anew():
    student, teacher = maps(3, 4, 6, 6)
    term = filled(4, pixels=2, pixel_keys=9)
    assert value(term, student, teacher, seed=1) == value(term, student, teacher, seed=1)
    assert value(term, student, teacher, seed=1) != value(term, student, teacher, seed=2)


def test_memories_survive_in_a_state_dict():
    term, other = filled(4), cirkd().eval()
    other.load_state_dict(term.state_dict())
    student, teacher = maps(3, 4, 6, 6)
    assert value(other, student, teacher) == value(term, student, teacher)


@pytest.mark.parametrize("patients", [None, torch.tensor([1]), torch.tensor([[1], [2]])])
def test_a_memory_needs_to_know_the_patients(patients):
    student, teacher = maps(2, 3, 4, 4)
    with pytest.raises(InputError, match="patient"):
        cirkd()(student, teacher, labels_like(student), Context(seeded(), patients))


def test_only_admitted_patients_enter():
    student, teacher = maps(2, 3, 4, 4)
    term = cirkd()
    with pytest.raises(InputError, match="100"):
        term(student, teacher, labels_like(student), Context(seeded(), torch.tensor([1, 100])))
    assert len(term.pixel_bank) == len(term.region_bank) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature"),
        ({"weights": (1, 1)}, "weights"),
        ({"weights": (1, -1, 1)}, "weights"),
        ({"weights": (1, 1, math.nan)}, "weights"),
        ({"nodes": 0}, "nodes"),
        ({"pixels": 0}, "pixels"),
        ({"pixel_keys": 0}, "pixel_keys"),
        ({"region_keys": 0}, "region_keys"),
        ({"pixel_memory": 0}, "memory"),
        ({"region_memory": 0}, "memory"),
    ],
)
def test_cirkd_refuses_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        CrossImageRelation(**options)
