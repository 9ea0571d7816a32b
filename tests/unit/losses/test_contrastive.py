"""The contrastive terms against their formulas in float64, public implementations and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from info_nce import InfoNCE as PublicInfoNCE
from pytorch_metric_learning.losses import SupConLoss
from test_common import PATIENTS, admit, agree, labels_like, maps, seeded
from torch.nn import functional as F

from kdlib.config import InputError
from kdlib.losses import Context, InfoNCE, SupervisedContrastiveLoss
from kdlib.losses.base import near_boundary
from kdlib.losses.contrastive import CRD, PrototypeContrast


def pixels(x):
    """Unit vectors of all positions, [positions, channels]."""
    return F.normalize(x.movedim(1, -1).flatten(0, -2), dim=1)


# --- InfoNCE ----------------------------------------------------------------------------------------------------------


def test_infonce_agrees_with_the_public_one():
    student, teacher = maps(5, 3, 4, 4)
    agree(InfoNCE(0.2)(student, teacher), PublicInfoNCE(0.2)(student.flatten(1), teacher.flatten(1)), student, teacher)


@pytest.mark.parametrize("shape", [(4, 3, 4, 4), (4, 3, 2, 3, 4)])
@pytest.mark.parametrize("same_patient", [False, True])
def test_infonce_is_its_formula(shape, same_patient):
    student, teacher = maps(*shape)
    z, k = (F.normalize(x.flatten(1), dim=1) for x in (student, teacher))
    total = 0.0
    for i in range(4):
        keys = [j for j in range(4) if j == i or not same_patient or PATIENTS[j] != PATIENTS[i]]
        total = total - torch.log((z[i] @ k[i] / 0.4).exp() / sum((z[i] @ k[j] / 0.4).exp() for j in keys))
    term = InfoNCE(0.4, same_patient)
    agree(term(student, teacher, None, Context(None, PATIENTS)), total / 4, student, teacher)


def test_infonce_by_hand():
    x = torch.eye(2, dtype=torch.float64).reshape(2, 1, 1, 2)
    assert InfoNCE(1.0)(x, x).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert InfoNCE(1.0)(x, x.flip(0)).item() == pytest.approx(math.log(1 + math.exp(1)))
    alike = torch.ones(4, 3, 4, 4)  # nothing tells the images apart: the logarithm of the number of keys
    assert InfoNCE(0.4)(alike, alike).item() == pytest.approx(math.log(4))
    found = InfoNCE(0.4, same_patient=True)(alike, alike, None, Context(None, PATIENTS))
    assert found.item() == pytest.approx((2 * math.log(3) + 2 * math.log(4)) / 4)


def test_infonce_of_one_patient_alone_is_zero_and_needs_two_images():
    student, teacher = maps(3, 3, 4, 4)
    loss = InfoNCE(0.4, same_patient=True)(student, teacher, None, Context(None, torch.ones(3).long()))
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()
    with pytest.raises(InputError, match="two images"):
        InfoNCE(0.4)(student[:1], teacher[:1])


# --- supervised contrastive loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_labelled_contrast_of_all_positions_agrees_with_the_public_one(temperature):
    student, teacher = maps(2, 5, 6, 6)
    labels = torch.arange(72).reshape(2, 6, 6) % 3  # as many of each class: the mean over anchors is that over classes
    found = SupervisedContrastiveLoss(temperature, samples=None)(student, teacher, labels)
    flat = labels.flatten()
    expected = SupConLoss(temperature)(pixels(student), flat, ref_emb=pixels(teacher), ref_labels=flat.clone())
    agree(found, expected, student, teacher)


def labelled_oracle(student, teacher, labels, temperature, patients=None, bank=None):
    """Equation 2 of Khosla 2020 anchor by anchor; keys of the bank, without the anchor's patient where given."""
    z, k, flat = pixels(student), pixels(teacher), labels.flatten()
    of = torch.arange(len(labels)) if patients is None else patients
    of = of.repeat_interleave(labels[0].numel())
    keys, key_labels, key_patients = k, flat, of
    if bank is not None and len(bank):
        vectors, bank_labels, bank_patients = bank.entries()
        keys, key_labels = torch.cat([k, vectors.double()]), torch.cat([flat, bank_labels])
        key_patients = torch.cat([of, bank_patients])
    losses = {int(label): [] for label in flat.unique()}
    for i in range(len(z)):
        kept = torch.ones(len(keys), dtype=torch.bool) if patients is None else key_patients != of[i]
        kept[i] = True
        similarity = keys[kept] @ z[i] / temperature
        positives = similarity[key_labels[kept] == flat[i]]
        losses[int(flat[i])].append(torch.log(similarity.exp().sum()) - positives.mean())
    return torch.stack([torch.stack(of_class).mean() for of_class in losses.values()]).mean()


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 3, 2, 1, 3)])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("patients", [None, PATIENTS, torch.zeros_like(PATIENTS), torch.arange(4)])
@pytest.mark.parametrize("memory", [0, 16])
def test_supervised_contrast_is_its_formula(shape, classes, patients, memory):
    term = admit(SupervisedContrastiveLoss(0.3, 10_000, memory=memory, same_patient=patients is not None))
    student, teacher = maps(*shape, seed=3)
    term(student, teacher, labels_like(student, 4, seed=5), Context(None, PATIENTS))
    student, teacher = maps(*shape)
    labels = labels_like(student, classes)
    expected = labelled_oracle(student, teacher, labels, 0.3, patients, term.bank)
    given = Context(None, PATIENTS if patients is None else patients)
    agree(term(student, teacher, labels, given), expected, student, teacher)


def test_supervised_contrast_by_hand():
    x = torch.eye(2, dtype=torch.float64)[None, :, None]  # two pixels, orthogonal
    loss = SupervisedContrastiveLoss(1.0)
    assert loss(x, x, torch.tensor([[[0, 1]]])).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert loss(x, x.flip(3), torch.tensor([[[0, 1]]])).item() == pytest.approx(math.log(1 + math.exp(1)))
    # one class: log(1 + e) - 1/2, the mean over both positives
    assert loss(x, x, torch.tensor([[[0, 0]]])).item() == pytest.approx(math.log(1 + math.e) - 0.5)


def test_one_voxel_of_another_patient_keeps_its_digits():
    # in single precision, a class of which all keys but one are the anchor's patient's own
    student, teacher = (maps(2, 8, 48, 48, seed=seed, dtype=torch.float32)[0] for seed in (0, 9))
    labels = torch.zeros(2, 48, 48).long()
    labels[1] = 1
    labels[1, 0, 0] = 0
    context = Context(None, torch.tensor([0, 1]))
    term = SupervisedContrastiveLoss(0.1, samples=None, same_patient=True)
    exact = term(student.double(), teacher.double(), labels, context)
    assert term(student, teacher, labels, context).item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("same_patient", [False, True])
def test_memory_holds_what_came_before_and_is_not_read_by_the_step_that_fills_it(same_patient):
    term = admit(SupervisedContrastiveLoss(0.3, samples=None, memory=40, same_patient=same_patient))
    for step in range(4):
        student, teacher = maps(4, 3, 2, 2, seed=step)
        labels = labels_like(student, 3, seed=step)
        patients = PATIENTS + step % 2
        expected = labelled_oracle(student, teacher, labels, 0.3, patients if same_patient else None, term.bank)
        agree(term(student, teacher, labels, Context(None, patients)), expected, student, teacher)
    vectors, bank_labels, bank_patients = term.bank.entries()
    assert len(vectors) == 40
    newest = slice(8, 24)  # 16 a step in a ring of 40: the fourth begins at 48
    rows = {tuple(x) for x in pixels(teacher).float().tolist()}
    assert {tuple(x) for x in vectors[newest].tolist()} == rows
    assert bank_labels[newest].bincount().tolist() == labels.flatten().bincount().tolist()
    assert bank_patients[newest].unique().tolist() == [5, 8, 10]


def test_a_small_memory_keeps_the_classes_balanced():
    term = admit(SupervisedContrastiveLoss(0.3, samples=64, memory=8))
    student, teacher = maps(4, 3, 8, 8)
    labels = torch.zeros(4, 8, 8).long()
    labels[:, :4] = 2
    term(student, teacher, labels, Context(seeded(), PATIENTS))
    assert term.bank.entries()[1].bincount().tolist() == [4, 0, 4]


@pytest.mark.parametrize("shape", [(7, 6), (5, 4, 3), (9,)])
@pytest.mark.parametrize("radius", [1, 2])
def test_near_a_boundary_is_another_label_within_the_radius(shape, radius):
    labels = torch.zeros(2, *shape).long()
    labels[(0, *(n // 2 for n in shape))] = 3
    labels[(1, *(0 for _ in shape))] = 1
    found = near_boundary(labels, radius)
    positions = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1).reshape(
        -1, len(shape)
    )
    for image, truth in zip(labels, found, strict=True):
        for a in positions:
            window = [b for b in positions if (a - b).abs().max() <= radius]
            assert truth[tuple(a)] == any(image[tuple(b)] != image[tuple(a)] for b in window)


def drawn(term, labels, seed=0):
    positions = term.draw(labels, seeded(seed))
    assert len(positions.unique()) == len(positions)
    return positions


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31), samples=st.integers(2, 80), shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=4)
)
def test_positions_are_distinct_balanced_and_from_the_generator_alone(seed, samples, shares):
    labels = torch.multinomial(torch.tensor(shares), 2 * 8 * 8, True, generator=seeded(seed)).reshape(2, 8, 8)
    classes, counts = labels.unique(return_counts=True)
    share, state, term = max(1, samples // len(classes)), torch.get_rng_state(), SupervisedContrastiveLoss(0.4, samples)
    positions = drawn(term, labels, seed)
    found = labels.flatten()[positions]
    for label, count in zip(classes, counts, strict=True):
        assert (found == label).sum() == min(share, count)
    assert torch.equal(drawn(term, labels, seed), positions) and torch.equal(state, torch.get_rng_state())


def test_every_position_has_about_the_same_chance_and_every_image_its_share():
    labels, term = torch.zeros(1, 5, 7).long(), SupervisedContrastiveLoss(0.4, 10)
    hits = sum(torch.bincount(drawn(term, labels, seed), minlength=35) for seed in range(600))
    # 10 of 35 each; a run of 3 or 4 positions has one draw, so that chances lie between 1/4 and 1/3
    assert (hits / 600).min() > 0.18 and (hits / 600).max() < 0.41
    positions = drawn(SupervisedContrastiveLoss(0.4, 64), torch.zeros(4, 16, 16).long())
    assert torch.bincount(positions // 256).tolist() == [16, 16, 16, 16]


def test_the_gradient_is_at_the_drawn_positions_alone():
    student, teacher = maps(2, 4, 8, 8)
    labels, term = labels_like(student), SupervisedContrastiveLoss(0.4, 16)
    term(student, teacher, labels, Context(seeded(5))).backward()
    touched = student.grad.abs().sum(1).flatten().nonzero()[:, 0]
    assert touched.tolist() == sorted(drawn(term, labels, 5).tolist())


@pytest.mark.parametrize("hard", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_positions_lies_near_boundaries(hard):
    labels = torch.zeros(2, 32, 32).long()
    labels[:, :, 16:] = 1
    term = SupervisedContrastiveLoss(0.1, samples=64, hard=hard)
    near = near_boundary(labels, 1).flatten()
    counts = [near[drawn(term, labels, seed)].sum().item() for seed in range(20)]
    rest = (64 - 64 * hard) / 16 * (1 - hard)  # of the rest one in 16 is near a boundary, or fewer
    assert min(counts) >= 64 * hard and sum(counts) / 20 <= 64 * hard + rest + 2
    for label in (0, 1):
        assert (labels.flatten()[drawn(term, labels)] == label).sum() == 32


def test_where_few_positions_are_near_a_boundary_the_rest_makes_up():
    labels = torch.zeros(1, 16, 16).long()
    labels[0, 0, 0] = 1
    positions = drawn(SupervisedContrastiveLoss(0.1, samples=40, hard=1.0), labels)
    flat, near = labels.flatten()[positions], near_boundary(labels, 1).flatten()[positions]
    assert flat.bincount().tolist() == [20, 1] and near[flat == 0].sum() >= 3
    alone = drawn(SupervisedContrastiveLoss(0.1, samples=40, hard=1.0), torch.zeros(1, 16, 16).long())
    assert len(alone) == 40


# --- prototypes -------------------------------------------------------------------------------------------------------


def prototype_oracle(student, teacher, labels, temperature, anchors, per_image):
    images = range(len(labels)) if per_image else [slice(None)]
    losses = {int(label): [] for label in labels.unique()}
    for image in images:
        z, k = (F.normalize(x[image].movedim(0 if per_image else 1, -1), dim=-1) for x in (student, teacher))
        present = [int(label) for label in labels[image].unique()]
        keys = {label: F.normalize(k[labels[image] == label].mean(0), dim=0) for label in present}
        for label in present:
            region = z[labels[image] == label]
            for anchor in [F.normalize(region.mean(0), dim=0)] if anchors == "regions" else region:
                similarity = torch.stack([anchor @ keys[other] / temperature for other in present])
                losses[label].append(similarity.exp().sum().log() - anchor @ keys[label] / temperature)
    return torch.stack([torch.stack(found).mean() for found in losses.values()]).mean()


@pytest.mark.parametrize("shape", [(3, 4, 4, 4), (3, 3, 2, 3, 2)])
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("anchors", ["regions", "pixels"])
@pytest.mark.parametrize("per_image", [False, True])
def test_prototype_contrast_is_its_formula(shape, classes, anchors, per_image):
    student, teacher = maps(*shape)
    labels = labels_like(student, classes)
    labels[0] = 0  # an image without some of the classes
    found = PrototypeContrast(0.2, anchors, per_image)(student, teacher, labels)
    agree(found, prototype_oracle(student, teacher, labels, 0.2, anchors, per_image), student, teacher)


@pytest.mark.parametrize("anchors", ["regions", "pixels"])
def test_prototypes_by_hand(anchors):
    x = torch.eye(2, dtype=torch.float64)[None, :, None]  # two pixels, orthogonal
    labels = torch.tensor([[[0, 5]]])
    term = PrototypeContrast(1.0, anchors)
    assert term(x, x, labels).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert term(x, x.flip(3), labels).item() == pytest.approx(math.log(1 + math.exp(1)))
    assert term(torch.ones_like(x), torch.ones_like(x), labels).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("anchors", ["regions", "pixels"])
@pytest.mark.parametrize("per_image", [False, True])
def test_prototypes_of_one_class_alone_are_zero_with_no_gradient(anchors, per_image):
    student, teacher = maps(2, 3, 4, 4)
    loss = PrototypeContrast(0.1, anchors, per_image)(student, teacher, torch.full((2, 4, 4), 2))
    agree(loss, 0 * student.sum() + 0 * teacher.sum(), student, teacher, rtol=0, atol=1e-12)


# --- CRD --------------------------------------------------------------------------------------------------------------


def crd_oracle(student, teacher, temperature, patients, banks, normalisers, same_patient=False):
    """- log h of the pair, - log(1 - h) of every negative, in both directions; banks are (teacher's, student's)."""
    z, k = (F.normalize(x.flatten(2).mean(2), dim=1) for x in (student, teacher))
    total = 0.0
    for anchors, keys, bank, normaliser in zip((z, k), (k, z), banks, normalisers, strict=True):
        for i in range(len(anchors)):
            negatives = [
                keys[j] for j in range(len(keys)) if j != i and not (same_patient and patients[j] == patients[i])
            ]
            if bank is not None:
                negatives += [v.double() for v, p in zip(*bank.entries()[0:3:2], strict=True) if p != patients[i]]
            noise = max(len(negatives), 1) * normaliser

            def h(key, anchor=anchors[i], noise=noise):
                return (anchor @ key / temperature).exp() / ((anchor @ key / temperature).exp() + noise)

            loss = -torch.log(h(keys[i])) - sum(torch.log(1 - h(negative)) for negative in negatives)
            total = total + loss / len(anchors)
    return total


@pytest.mark.parametrize("shape", [(4, 3, 4, 4), (4, 3, 2, 2, 3)])
@pytest.mark.parametrize(("memory", "same_patient"), [(0, False), (6, False), (6, True)])
def test_crd_is_its_formula(shape, memory, same_patient):
    term = admit(CRD(0.3, memory, same_patient))
    for step in range(3):
        student, teacher = maps(*shape, seed=step)
        patients = PATIENTS + 3 * (step % 2)  # 7 comes twice
        normalisers = [x.exp() for x in term.log_normaliser]
        if step == 0:
            z, k = (F.normalize(x.flatten(2).mean(2), dim=1) for x in (student, teacher))
            pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
            pairs = [(i, j) for i, j in pairs if not (same_patient and patients[i] == patients[j])]
            normalisers = [
                torch.stack([(a[i] @ b[j] / 0.3).exp() for i, j in pairs]).mean().detach() for a, b in ((z, k), (k, z))
            ]
        banks = [term.teacher_bank, term.student_bank]
        expected = crd_oracle(student, teacher, 0.3, patients, banks, normalisers, same_patient)
        found = term(student, teacher, None, Context(None, patients))
        # the normaliser is kept in single precision
        agree(found, expected, student, teacher, rtol=1e-5, atol=1e-6)
        if memory:
            assert len(term.teacher_bank) == len(term.student_bank) == min(6, 4 * (step + 1))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_crd_of_images_alike_is_chance(temperature):
    alike = torch.ones(4, 3, 2, 2)
    loss = CRD(temperature, memory=0)(alike, alike)
    assert loss.item() == pytest.approx(2 * math.log(4) + 6 * math.log(4 / 3), rel=1e-5)


def test_the_normaliser_of_crd_is_kept_from_the_first_training_step_that_has_a_negative():
    term = CRD(0.5, memory=0)
    one, batch, later = ([x[: 1 + 3 * (i > 0)] for x in maps(4, 3, 2, 2, seed=i)] for i in range(3))
    term(*one)
    assert term.log_normaliser.isinf().all()
    term.eval()(*batch)
    assert term.log_normaliser.isinf().all()
    term.train()(*batch)
    kept = term.log_normaliser.clone()
    assert kept.isfinite().all()
    term(*later)
    assert torch.equal(term.log_normaliser, kept)


@pytest.mark.parametrize("anchors", ["regions", "pixels"])
def test_a_nearly_solved_prototype_contrast_is_small_but_alive(anchors):
    """Opposite regions at temperature 0.1: log(1 + exp(-20)), which 1 + exp(-20) = 1 in float32 would make a zero."""
    labels = torch.tensor([[[0, 0], [1, 1]]])
    maps = torch.where(labels[:, None] > 0, 1.0, -1.0) * torch.tensor([1.0, 0.5]).reshape(1, 2, 1, 1)
    student = (maps + 1e-3 * torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1)).requires_grad_()
    loss = PrototypeContrast(0.1, anchors)(student, maps, labels)
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-2)
    assert student.grad.any()
