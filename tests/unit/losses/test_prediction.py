"""Distillation of prediction maps: loops in float64, other libraries, and numbers by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_common import agree, labels_like, maps

from kdlib.config import InputError
from kdlib.losses.base import near_boundary
from kdlib.losses.prediction import DIST, DKD, BoundaryKL, ChannelWiseDistillation, OneChannelSoftmaxKL, PredictionKL

SHAPES = [(2, 1, 4, 5), (3, 2, 3, 3), (2, 4, 3, 4), (2, 1, 2, 3, 4), (2, 3, 3, 2, 3)]
seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=15)


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


# --- KL ---------------------------------------------------------------------------------------------------------------


def kl_oracle(student, teacher, temperature):
    """Pixel by pixel sum of p log(p / q), mean over pixels, times the squared temperature."""
    both = [[class_probabilities(x, at, temperature) for at in positions(x.shape)] for x in (teacher, student)]
    return torch.stack([kl(p, q) for p, q in zip(*both, strict=True)]).mean() * temperature**2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_its_formula_and_of_several_channels_the_published_softmax_too(shape, temperature):
    student, teacher = maps(*shape)
    expected = kl_oracle(student, teacher, temperature)
    agree(PredictionKL(temperature)(student, teacher), expected, student, teacher)
    if shape[1] > 1:
        agree(OneChannelSoftmaxKL(temperature)(student, teacher), expected, student, teacher)


def test_kl_by_hand():
    student, teacher = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), math.log(3))  # 1/2 against 3/4
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert PredictionKL(1.0)(student, teacher).item() == pytest.approx(expected)
    assert PredictionKL(4.0)(4 * student, 4 * teacher).item() == pytest.approx(16 * expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_kl_of_certain_predictions_is_right(channels):
    student = torch.zeros(1, channels, 1, 1)
    student[:, 0] = 200.0
    loss = PredictionKL(1.0)(student.requires_grad_(), -student.detach())
    loss.backward()
    # the teacher is certain of what the student rules out: log(p / q) with p = 1 (for three channels 1/2 twice)
    assert loss.item() == pytest.approx(200.0 if channels == 1 else 200.0 - math.log(2), rel=1e-6)
    assert student.grad.isfinite().all() and student.grad.any()


@few
@given(seed=seeds, temperature=st.floats(0.5, 8))
def test_the_published_softmax_of_one_channel_is_dead(seed, temperature):
    student, teacher = maps(2, 1, 3, 4, seed=seed)
    loss = OneChannelSoftmaxKL(temperature)(student, teacher)
    loss.backward()
    assert loss.item() == 0 and loss.requires_grad
    assert not student.grad.any() and not teacher.grad.any()


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
def test_boundary_kl_is_its_formula_and_without_a_boundary_the_kl(shape, radius):
    student, teacher = maps(*shape)
    labels = torch.zeros(len(student), *shape[2:]).long()
    term, plain = BoundaryKL(temperature=3.0, boundary=7.0, radius=radius), PredictionKL(3.0)(student, teacher)
    torch.testing.assert_close(term(student, teacher, labels), plain)
    labels[0, -1, 0], labels[0, -1, 1] = 1, 2  # for one channel both are foreground
    expected = boundary_oracle(student, teacher, labels, 3.0, 7.0, radius)
    torch.testing.assert_close(term(student, teacher, labels), expected)
    assert not torch.isclose(expected, plain)


def test_for_one_channel_the_line_between_two_organs_is_no_boundary():
    labels = torch.ones(2, 6, 6).long()
    labels[:, 3:] = 2
    one, three = maps(2, 1, 6, 6), maps(2, 3, 6, 6)
    torch.testing.assert_close(BoundaryKL()(*one, labels), PredictionKL()(*one))
    assert not torch.isclose(BoundaryKL()(*three, labels), PredictionKL()(*three))


def test_the_band_by_hand():
    labels = torch.tensor([[0, 0, 0, 0, 3, 3, 3, 1]])
    assert near_boundary(labels, 1).int().tolist() == [[0, 0, 0, 1, 1, 0, 1, 1]]
    assert near_boundary(labels, 2).int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]


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
def test_dkd_is_its_formula_and_of_two_classes_the_kl(shape, alpha, beta, temperature):
    student, teacher = maps(*shape)
    labels = labels_like(student, max(3, shape[1]) if shape[1] != 2 else 2)  # for one channel 1 and 2 are foreground
    got = DKD(alpha, beta, temperature)(student, teacher, labels)
    torch.testing.assert_close(got, dkd_oracle(student, teacher, labels, alpha, beta, temperature))
    if shape[1] < 3:
        torch.testing.assert_close(got, alpha * PredictionKL(temperature)(student, teacher))


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
    agree(DIST(beta, gamma, temperature)(student, teacher), expected, student, teacher)


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, 2, 3, 4), (2, 1, 2, 3, 2)])
def test_dist_of_two_classes_is_the_correlation_of_the_foreground(torchdistill, shape):
    student, teacher = maps(*shape)
    loss = DIST(beta=3.0, gamma=2.0, temperature=2.0)(student, teacher)
    foreground = [
        torch.stack([class_probabilities(x, at, 2.0)[1] for at in positions(shape)]) for x in (student, teacher)
    ]
    torch.testing.assert_close(loss, 2.0 * (1 - torch.corrcoef(torch.stack(foreground))[0, 1]) * 4)
    two = [pixel_vectors(torch.cat([torch.zeros_like(x), x], 1) if shape[1] == 1 else x) for x in (student, teacher)]
    intra = torchdistill.losses.mid_level.DISTLoss("s", "io", "t", "io", 0.0, 2.0, 2.0)
    torch.testing.assert_close(loss, intra({"s": {"io": two[0]}}, {"t": {"io": two[1]}}))


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
    expected = cwd_oracle(student, teacher, temperature)
    torch.testing.assert_close(ChannelWiseDistillation(temperature)(student, teacher), expected)


def test_cwd_by_hand():
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, math.log(3)]]]])  # 1/2, 1/2 against 1/4, 3/4
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert ChannelWiseDistillation(1.0)(student, teacher).item() == pytest.approx(expected)
    assert ChannelWiseDistillation(4.0)(4 * student, 4 * teacher).item() == pytest.approx(16 * expected)
