"""Distillation of prediction maps: loops in float64, other libraries, invariances, and the batches that are hard."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.config import InputError
from kdlib.losses.base import near_boundary
from kdlib.losses.prediction import (
    DIST,
    DKD,
    BoundaryKL,
    ChannelWiseDistillation,
    OneChannelSoftmaxKL,
    PredictionKL,
)

TERMS = {
    "kl": PredictionKL(),
    "softmax_kl": OneChannelSoftmaxKL(),
    "dkd": DKD(),
    "dist": DIST(beta=2.0),
    "cwd": ChannelWiseDistillation(),
    "boundary_kl": BoundaryKL(radius=1),
}
SHAPES = [(2, 1, 4, 5), (3, 2, 3, 3), (2, 4, 3, 4), (2, 1, 2, 3, 4), (2, 3, 3, 2, 3)]
seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=15)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(*shape, seed=0, dtype=torch.float64):
    generator = seeded(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]


def labels_like(x, classes=None, seed=0):
    classes = classes or max(2, x.shape[1])
    return torch.randint(classes, (len(x), *x.shape[2:]), generator=seeded(seed))


def positions(shape):
    """Indices (image, position ...) of every pixel."""
    return itertools.product(range(shape[0]), *map(range, shape[2:]))


def class_probabilities(logits, at, temperature):
    """Probabilities [classes] of one pixel; one channel is two classes."""
    z = logits[(at[0], slice(None), *at[1:])] / temperature
    if len(z) == 1:
        z = torch.stack([torch.zeros_like(z[0]), z[0]])
    return z.exp() / z.exp().sum()


def kl(p, q):
    return sum(p[c] * torch.log(p[c] / q[c]) for c in range(len(p)))


# --- what holds for all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
def test_terms_say_what_they_read(name):
    assert (TERMS[name].reads, TERMS[name].adapt) == ("logits", "none")


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_least_at_the_teacher(name, shape):
    student, teacher = maps(*shape)
    labels = labels_like(student)
    same = teacher.detach().clone().requires_grad_()
    loss = TERMS[name](same, teacher.detach(), labels)
    assert abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss, same)[0].abs().max() < 1e-12
    if (name, shape[1]) != ("softmax_kl", 1):
        assert TERMS[name](student, teacher, labels) > 1e-3


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("shape", [(2, 1, 2, 3), (2, 3, 2, 2), (1, 1, 2, 1, 2)])
def test_gradients_are_right_and_a_frozen_teacher_gets_none(name, shape):
    student, teacher = maps(*shape)
    labels = labels_like(student)
    assert torch.autograd.gradcheck(lambda s, t: TERMS[name](s, t, labels), (student, teacher))
    frozen = teacher.detach()
    TERMS[name](student, frozen, labels).backward()
    assert frozen.grad is None and student.grad.isfinite().all()
    assert student.grad.any() or (name, shape[1]) == ("softmax_kl", 1)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("channels", [1, 3])
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
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize(("student", "teacher"), [(0.0, 0.0), (0.0, 1.0), (6e4, -6e4), (1e-30, 1e-30)])
def test_constant_maps_are_finite(name, channels, student, teacher):
    student, teacher = (torch.full((2, channels, 4, 4), value, requires_grad=True) for value in (student, teacher))
    loss = TERMS[name](student, teacher, labels_like(student))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and teacher.grad.isfinite().all()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_certain_and_contrary_predictions_are_finite(name, channels):
    student = torch.zeros(1, channels, 2, 2)
    student[:, 0, 0] = 6e4  # what half precision can hold at most
    student.requires_grad_()
    loss = TERMS[name](student, -student.detach(), torch.tensor([[[0, 1], [1, 0]]]))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("label", [0, 1])
def test_one_pixel_of_one_class_is_enough(name, channels, label):
    student, teacher = maps(1, channels, 1, 1)
    loss = TERMS[name](student, teacher, torch.full((1, 1, 1), label))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_images_does_not_matter(name, shape):
    student, teacher = maps(*shape)
    labels = labels_like(student)
    torch.testing.assert_close(
        TERMS[name](student.flip(0), teacher.flip(0), labels.flip(0)), TERMS[name](student, teacher, labels)
    )


@pytest.mark.parametrize("name", ["dkd", "boundary_kl"])
@pytest.mark.parametrize(
    ("labels", "message"), [(None, "needs labels"), (torch.zeros(3, 4, 4, dtype=torch.int64), "do not fit")]
)
def test_labels_that_a_term_cannot_use(name, labels, message):
    with pytest.raises(InputError, match=message):
        TERMS[name](*maps(2, 3, 4, 4), labels)


@pytest.mark.parametrize("term", [PredictionKL, OneChannelSoftmaxKL, DKD, DIST, ChannelWiseDistillation, BoundaryKL])
@pytest.mark.parametrize("temperature", [0.0, -4.0, math.nan])
def test_temperatures_that_teach_nothing_or_the_opposite(term, temperature):
    with pytest.raises(InputError, match="temperature"):
        term(temperature=temperature)


# --- softmax over one channel -----------------------------------------------------------------------------------------


@few
@given(seed=seeds, temperature=st.floats(0.5, 8))
def test_the_published_softmax_of_one_channel_is_dead(seed, temperature):
    student, teacher = maps(2, 1, 3, 4, seed=seed)
    loss = OneChannelSoftmaxKL(temperature)(student, teacher)
    loss.backward()
    assert loss.item() == 0 and loss.requires_grad
    assert not student.grad.any() and not teacher.grad.any()


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (2, 5, 2, 3, 4)])
def test_the_published_softmax_of_several_channels_is_the_kl(shape):
    student, teacher = maps(*shape)
    assert torch.equal(OneChannelSoftmaxKL(2.0)(student, teacher), PredictionKL(2.0)(student, teacher))


# --- boundary ---------------------------------------------------------------------------------------------------------


def boundary_oracle(student, teacher, labels, temperature, boundary, radius):
    numerator = denominator = 0.0
    if student.shape[1] == 1:
        labels = labels.clamp(max=1)
    for at in positions(student.shape):
        window = tuple(slice(max(0, x - radius), x + radius + 1) for x in at[1:])
        weight = boundary if len(labels[at[0]][window].unique()) > 1 else 1.0
        p, q = (class_probabilities(x, at, temperature) for x in (teacher, student))
        numerator, denominator = numerator + weight * kl(p, q), denominator + weight
    return numerator / denominator * temperature**2


@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (2, 3, 6, 6), (2, 1, 4, 3, 4), (1, 3, 4, 6, 3)])
@pytest.mark.parametrize("radius", [1, 2])
def test_boundary_kl_is_its_formula(shape, radius):
    student, teacher = maps(*shape)
    labels = torch.zeros(len(student), *shape[2:], dtype=torch.int64)
    labels[0, -1, 0], labels[0, -1, 1] = 1, 2  # for one channel both are foreground
    term = BoundaryKL(temperature=3.0, boundary=7.0, radius=radius)
    expected = boundary_oracle(student, teacher, labels, 3.0, 7.0, radius)
    torch.testing.assert_close(term(student, teacher, labels), expected)
    assert not torch.isclose(expected, PredictionKL(3.0)(student, teacher))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("label", [0, 1])
def test_without_a_boundary_it_is_the_kl(shape, label):
    student, teacher = maps(*shape)
    labels = torch.full((len(student), *shape[2:]), label)
    torch.testing.assert_close(BoundaryKL()(student, teacher, labels), PredictionKL()(student, teacher))


def test_for_one_channel_the_line_between_two_organs_is_no_boundary():
    labels = torch.ones(2, 6, 6, dtype=torch.int64)
    labels[:, 3:] = 2
    one, three = maps(2, 1, 6, 6), maps(2, 3, 6, 6)
    torch.testing.assert_close(BoundaryKL()(*one, labels), PredictionKL()(*one))
    assert not torch.isclose(BoundaryKL()(*three, labels), PredictionKL()(*three))


def test_the_band_by_hand():
    labels = torch.tensor([[0, 0, 0, 0, 3, 3, 3, 1]])
    assert near_boundary(labels, 1).int().tolist() == [[0, 0, 0, 1, 1, 0, 1, 1]]
    assert near_boundary(labels, 2).int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]


def test_a_difference_at_the_boundary_weighs_more_than_one_elsewhere():
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, :, 4:] = 1
    teacher = torch.zeros(1, 1, 8, 8)
    near, far = teacher.clone(), teacher.clone()
    near[..., 4], far[..., 0] = 1.0, 1.0
    term = BoundaryKL(boundary=5.0, radius=1)
    assert term(near, teacher, labels).item() == pytest.approx(5 * term(far, teacher, labels).item())


def test_the_labels_come_to_the_grid_of_the_logits():
    student, teacher = maps(1, 1, 4, 4)
    labels = labels_like(student)
    fine = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for term in (BoundaryKL(radius=1), DKD()):
        torch.testing.assert_close(term(student, teacher, fine), term(student, teacher, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boundary": 0.0}, "boundary"),
        ({"boundary": -1.0}, "boundary"),
        ({"radius": 0}, "radius"),
        ({"radius": 1.5}, "radius"),
    ],
)
def test_boundaries_that_make_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        BoundaryKL(**options)


# --- DKD --------------------------------------------------------------------------------------------------------------


def dkd_oracle(student, teacher, labels, alpha, beta, temperature):
    """Equation 7 of Zhao 2022, pixel by pixel, with the probabilities themselves."""
    losses = []
    for at in positions(student.shape):
        p, q = (class_probabilities(x, at, temperature) for x in (teacher, student))
        own = int(labels[at]) if student.shape[1] > 1 else int(labels[at] > 0)
        tckd = kl([p[own], 1 - p[own]], [q[own], 1 - q[own]])
        others = [c for c in range(len(p)) if c != own]
        nckd = kl([p[c] / (1 - p[own]) for c in others], [q[c] / (1 - q[own]) for c in others])
        losses.append(alpha * tckd + beta * nckd)
    return torch.stack(losses).mean() * temperature**2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.5, 2.0, 1.0)])
def test_dkd_is_its_formula(shape, alpha, beta, temperature):
    student, teacher = maps(*shape)
    labels = labels_like(student, max(3, shape[1]) if shape[1] != 2 else 2)  # for one channel 1 and 2 are foreground
    got = DKD(alpha, beta, temperature)(student, teacher, labels)
    torch.testing.assert_close(got, dkd_oracle(student, teacher, labels, alpha, beta, temperature))


@pytest.mark.parametrize("channels", [1, 2])
def test_dkd_of_two_classes_is_the_kl_of_the_own_class_alone(channels):
    student, teacher = maps(2, channels, 4, 4)
    labels = labels_like(student)
    torch.testing.assert_close(DKD(alpha=1.5)(student, teacher, labels), 1.5 * PredictionKL()(student, teacher))
    nckd = DKD(alpha=0.0)(student, teacher, labels)
    nckd.backward()
    assert nckd.item() == 0 and not student.grad.any()


@few
@given(seed=seeds, channels=st.integers(3, 6), temperature=st.floats(0.5, 8))
def test_kl_is_dkd_with_the_weight_that_hinton_gives_the_other_classes(seed, channels, temperature):
    student, teacher = maps(1, channels, 1, 1, seed=seed)
    own = seed % channels
    p = class_probabilities(teacher.detach(), (0, 0, 0), temperature)
    term = DKD(1.0, 1 - p[own].item(), temperature)
    torch.testing.assert_close(
        term(student, teacher, torch.full((1, 1, 1), own)), PredictionKL(temperature)(student, teacher)
    )


@few
@given(seed=seeds)
def test_dkd_ignores_the_names_of_classes(seed):
    student, teacher = maps(2, 4, 3, 3, seed=seed)
    labels = labels_like(student, 4, seed)
    torch.testing.assert_close(DKD()(student.flip(1), teacher.flip(1), 3 - labels), DKD()(student, teacher, labels))


@pytest.mark.parametrize(("label", "message"), [(-1, "down to -1"), (3, "channels take 0 to 2")])
def test_dkd_names_labels_without_a_channel(label, message):
    with pytest.raises(InputError, match=message):
        DKD()(*maps(2, 3, 4, 4), torch.full((2, 4, 4), label))


# --- DIST -------------------------------------------------------------------------------------------------------------


def pixel_vectors(logits):
    return logits.movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("shape", [(7, 5, 1), (2, 4, 3, 4), (2, 3, 3, 2, 3)])
@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0)])
def test_dist_agrees_with_torchdistill(torchdistill, shape, beta, gamma, temperature):
    student, teacher = maps(*shape)
    oracle = torchdistill.losses.mid_level.DISTLoss("s", "io", "t", "io", beta, gamma, temperature)
    expected = oracle({"s": {"io": pixel_vectors(student)}}, {"t": {"io": pixel_vectors(teacher)}})
    loss = DIST(beta, gamma, temperature)(student, teacher)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, (student, teacher)) for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, 2, 3, 4), (2, 1, 2, 3, 2)])
def test_dist_of_two_classes_is_the_correlation_of_the_foreground(torchdistill, shape):
    student, teacher = maps(*shape)
    loss = DIST(beta=3.0, gamma=2.0, temperature=2.0)(student, teacher)
    foreground = [
        torch.stack([class_probabilities(x, at, 2.0)[1] for at in positions(shape)]) for x in (student, teacher)
    ]
    expected = 2.0 * (1 - torch.corrcoef(torch.stack(foreground))[0, 1]) * 4
    torch.testing.assert_close(loss, expected)
    two = [pixel_vectors(torch.cat([torch.zeros_like(x), x], 1) if shape[1] == 1 else x) for x in (student, teacher)]
    intra = torchdistill.losses.mid_level.DISTLoss("s", "io", "t", "io", 0.0, 2.0, 2.0)
    torch.testing.assert_close(loss, intra({"s": {"io": two[0]}}, {"t": {"io": two[1]}}))


def test_over_two_classes_the_inter_relation_is_a_sign_without_gradient(torchdistill):
    student, teacher = (pixel_vectors(x) for x in maps(2, 2, 3, 4))
    inter = torchdistill.losses.mid_level.DISTLoss("s", "io", "t", "io", 1.0, 0.0, 1.0)
    loss = inter({"s": {"io": student}}, {"t": {"io": teacher}})
    disagree = ((student[:, 0] > student[:, 1]) != (teacher[:, 0] > teacher[:, 1])).double().mean()
    torch.testing.assert_close(loss, 2 * disagree)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-6


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_dist_lets_the_student_be_less_certain_than_its_teacher(channels):
    _, teacher = maps(2, channels, 3, 3)
    if channels == 1:
        student = torch.logit(0.3 + 0.4 * teacher.sigmoid())
    else:
        student = torch.log(0.4 * teacher.softmax(1) + 0.6 / channels)
    assert abs(DIST()(student, teacher).item()) < 1e-12 < PredictionKL(1.0)(student, teacher).item()


def test_dist_of_a_map_without_variation_is_one_a_relation():
    flat, teacher = torch.zeros(2, 3, 4, 4), maps(2, 3, 4, 4)[1].detach().float()
    assert DIST(beta=0.0)(flat, teacher).item() == pytest.approx(1)
    assert DIST(beta=2.0, gamma=3.0)(flat, teacher).item() == pytest.approx(5)
    assert DIST(gamma=3.0)(flat[:, :1], teacher[:, :1]).item() == pytest.approx(3)


# --- channel-wise distillation ----------------------------------------------------------------------------------------


def cwd_oracle(student, teacher, temperature):
    losses = []
    for i, c in itertools.product(range(student.shape[0]), range(student.shape[1])):
        p, q = ((x[i, c].flatten() / temperature).exp() for x in (teacher, student))
        losses.append(kl(p / p.sum(), q / q.sum()))
    return torch.stack(losses).mean() * temperature**2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_is_its_formula(shape, temperature):
    student, teacher = maps(*shape)
    torch.testing.assert_close(
        ChannelWiseDistillation(temperature)(student, teacher), cwd_oracle(student, teacher, temperature)
    )


@few
@given(seed=seeds, shift=st.floats(-50, 50))
def test_cwd_ignores_what_is_added_to_a_channel_and_the_order_of_channels(seed, shift):
    student, teacher = maps(2, 3, 3, 3, seed=seed)
    shifts = torch.tensor([shift, 0.0, -shift])[:, None, None]
    term = ChannelWiseDistillation()
    torch.testing.assert_close(term((student + shifts).flip(1), (teacher - shifts).flip(1)), term(student, teacher))


def test_cwd_by_hand():
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, math.log(3)]]]])  # 1/2, 1/2 against 1/4, 3/4
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert ChannelWiseDistillation(1.0)(student, teacher).item() == pytest.approx(expected)
    assert ChannelWiseDistillation(4.0)(4 * student, 4 * teacher).item() == pytest.approx(16 * expected)
