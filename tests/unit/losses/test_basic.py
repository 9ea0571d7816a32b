"""Every term against its dense formula in float64, its known values, its gradient, and the batches that are hard."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.config import InputError
from kdlib.losses import (
    Context,
    FeatureMSE,
    InfoNCE,
    PredictionKL,
    SegmentationLoss,
    SupervisedContrastiveLoss,
    one_hot,
    predict,
    probabilities,
)

seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=25)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def seeded_rng(seed=0):
    return Context(seeded(seed))


def maps(*shape, seed=0, dtype=torch.float64):
    generator = seeded(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]


def labels_like(x, classes, seed=0):
    return torch.randint(classes, (len(x), *x.shape[2:]), generator=seeded(seed))


# --- labels and logits ------------------------------------------------------------------------------------------------


def test_one_hot_by_hand():
    labels = torch.tensor([[[0, 1], [2, 1]]])
    expected = [[[1.0, 0], [0, 0]], [[0, 1], [0, 1]], [[0, 0], [1, 0]]]
    assert torch.equal(one_hot(labels, 3), torch.tensor([expected]))
    assert torch.equal(one_hot(labels, 1), torch.tensor([[[[0.0, 1], [1, 1]]]]))


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 4, 6, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_confident_logits_predict_their_labels(shape, channels):
    labels = torch.randint(max(channels, 2), shape, generator=seeded())
    logits = 20 * one_hot(labels, channels) - 10
    assert logits.shape == (2, channels, *shape[1:])
    assert torch.equal(predict(logits), labels) and predict(logits).dtype == torch.int64
    torch.testing.assert_close(probabilities(logits), one_hot(labels, channels), atol=1e-4, rtol=0)


def test_a_probability_above_one_half_is_foreground():
    logits = torch.tensor([-0.1, 0.0, 0.1, 0.4]).reshape(1, 1, 2, 2)  # 0.4 is below 0.5, its probability above
    assert predict(logits).flatten().tolist() == [0, 0, 1, 1]
    assert torch.equal(predict(logits)[:, None], (probabilities(logits) > 0.5).long())


def test_probabilities_of_several_channels_sum_to_one():
    p = probabilities(torch.randn(2, 4, 3, 3, generator=seeded()))
    torch.testing.assert_close(p.sum(1), torch.ones(2, 3, 3))


# --- segmentation -----------------------------------------------------------------------------------------------------


def dice_oracle(logits, labels):
    """1 - 2 |A B| / (|A| + |B|) over the pixels of the batch, mean over the foreground classes."""
    p = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)[:, 1:]
    losses = []
    for i in range(p.shape[1]):
        truth = (labels == i + 1).double()
        losses.append(1 - (2 * (p[:, i] * truth).sum() + 1e-5) / (p[:, i].sum() + truth.sum() + 1e-5))
    return torch.stack(losses).mean()


def cross_entropy_oracle(logits, labels):
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    return -logits.log_softmax(1).gather(1, labels[:, None]).mean()


@pytest.mark.parametrize("spatial", [(6, 4), (4, 6, 2)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cross_entropy", [False, True])
def test_segmentation_loss_is_its_formula(spatial, channels, cross_entropy):
    logits = maps(3, channels, *spatial)[0]
    labels = labels_like(logits, max(channels, 2))
    expected = dice_oracle(logits, labels) + cross_entropy * cross_entropy_oracle(logits, labels)
    loss = SegmentationLoss(cross_entropy)
    torch.testing.assert_close(loss(logits, labels), expected)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cross_entropy", [False, True])
def test_segmentation_loss_knows_right_from_wrong(channels, cross_entropy):
    labels = torch.arange(2 * 8 * 8).reshape(2, 8, 8) % max(channels, 2)
    right = 40 * one_hot(labels, channels) - 20
    loss = SegmentationLoss(cross_entropy)
    assert loss(right, labels) < 1e-4
    assert loss(-right, labels) > 0.9


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cross_entropy", [False, True])
def test_smoothed_labels_are_best_met_by_themselves(channels, cross_entropy):
    """Least where the probability is the smoothed target, also where almost nothing is foreground."""
    labels = torch.zeros(2, 16, 16, dtype=torch.long)
    labels[0, 3:5, 3] = 1
    loss = SegmentationLoss(cross_entropy, smoothing=0.1)
    target = one_hot(labels, channels) * 0.9 + 0.1 / max(channels, 2)
    itself = target.logit() if channels == 1 else target.log()
    hard = 40 * one_hot(labels, channels) - 20
    assert loss(itself, labels) < min(loss(hard, labels), loss(-hard, labels), loss(torch.zeros_like(hard), labels))


def test_dice_is_pooled_over_the_batch():
    labels = torch.zeros(2, 2, 2, dtype=torch.int64)
    labels[0] = 1
    logits = torch.full((2, 1, 2, 2), -40.0)
    logits[0] = 40.0
    logits[1, 0, 0, 0] = 40.0  # one false positive in the slice without foreground
    # pooled 1 - 2 * 4 / (5 + 4); a Dice of each slice would give (0 + 1) / 2
    assert SegmentationLoss(False)(logits, labels).item() == pytest.approx(1 / 9, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cross_entropy", [False, True])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_segmentation_loss_of_one_label_alone_is_finite(channels, cross_entropy, label, scale):
    logits = (scale * maps(2, channels, 4, 4, dtype=torch.float32)[0]).detach().requires_grad_()
    loss = SegmentationLoss(cross_entropy)(logits, torch.full((2, 4, 4), label))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cross_entropy", [False, True])
def test_segmentation_loss_in_bf16(channels, cross_entropy):
    logits = maps(2, channels, 32, 32, dtype=torch.float32)[0]
    labels = labels_like(logits, max(channels, 2))
    loss = SegmentationLoss(cross_entropy)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(logits.bfloat16(), labels)
    half.backward()
    assert half.dtype == torch.float32 and logits.grad.isfinite().all()
    assert half.item() == pytest.approx(loss(logits.bfloat16().double(), labels).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ((2, 1, 4, 4), torch.zeros(2, 4, 5, dtype=torch.int64)),
        ((2, 1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.int64)),
        ((2, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)),
        ((2, 1, 4, 4), torch.zeros(2, 4, 4)),
        ((2, 3, 4, 4), torch.full((2, 4, 4), 3)),
        ((2, 3, 4, 4), torch.full((2, 4, 4), -1)),
    ],
)
@pytest.mark.parametrize("cross_entropy", [False, True])
def test_labels_that_do_not_fit(logits, labels, cross_entropy):
    with pytest.raises(InputError, match="labels"):
        SegmentationLoss(cross_entropy)(torch.zeros(logits), labels)


# --- InfoNCE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (2, 3, 2, 3, 4)])
@pytest.mark.parametrize("temperature", [0.1, 0.4])
def test_infonce_is_its_formula(shape, temperature):
    student, teacher = maps(*shape)
    z, k = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) for x in (student, teacher))
    total = 0.0
    for i in range(len(z)):
        similarity = torch.stack([(z[i] * k[j]).sum() / temperature for j in range(len(k))])
        total = total - torch.log(similarity[i].exp() / similarity.exp().sum())
    torch.testing.assert_close(InfoNCE(temperature)(student, teacher), total / len(z))


def test_infonce_of_orthogonal_images_by_hand():
    x = torch.eye(2, dtype=torch.float64).reshape(2, 1, 1, 2)
    assert InfoNCE(1.0)(x, x).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert InfoNCE(1.0)(x, x.flip(0)).item() == pytest.approx(math.log(1 + math.exp(1)))
    assert InfoNCE(1.0)(x, torch.ones_like(x)).item() == pytest.approx(math.log(2))  # nothing tells the images apart


@few
@given(seed=seeds, batch=st.integers(2, 9), factor=st.floats(0.1, 100))
def test_infonce_ignores_order_and_scale(seed, batch, factor):
    student, teacher = maps(batch, 3, 2, 2, seed=seed)
    order = torch.randperm(batch, generator=seeded(seed))
    loss = InfoNCE(0.4)
    expected = loss(student, teacher)
    torch.testing.assert_close(loss(factor * student[order], teacher[order] / factor), expected)


def test_infonce_needs_a_negative():
    with pytest.raises(InputError, match="two images"):
        InfoNCE(0.4)(torch.rand(1, 3, 2, 2), torch.rand(1, 3, 2, 2))


# --- supervised contrastive loss --------------------------------------------------------------------------------------


def labelled_oracle(student, teacher, labels, temperature):
    """Equation 2 of Khosla 2020 (L_out) over all positions, anchor by anchor; the classes weigh the same."""
    z, k = (x.movedim(1, -1).flatten(0, -2) for x in (student, teacher))
    z, k, labels = z / z.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True), labels.flatten()
    classes = []
    for label in labels.unique():
        anchors = []
        for i in (labels == label).nonzero()[:, 0]:
            exponentials = torch.exp((k * z[i]).sum(1) / temperature)
            positives = exponentials[labels == label]
            anchors.append(-torch.log(positives / exponentials.sum()).sum() / len(positives))
        classes.append(torch.stack(anchors).mean())
    return torch.stack(classes).mean()


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 3, 2, 2, 3)])
@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.1, 0.4])
def test_labelled_contrast_is_its_formula(shape, classes, temperature):
    student, teacher = maps(*shape)
    labels = labels_like(student, classes)
    loss = SupervisedContrastiveLoss(temperature, samples=10_000)(
        student, teacher, labels
    )  # more than there are: all are taken
    expected = labelled_oracle(student, teacher, labels, temperature)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, (student, teacher)) for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_labelled_contrast_by_hand():
    x = torch.eye(2, dtype=torch.float64)[None, :, None]  # two pixels, orthogonal
    loss = SupervisedContrastiveLoss(1.0)
    assert loss(x, x, torch.tensor([[[0, 1]]])).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert loss(x, x.flip(3), torch.tensor([[[0, 1]]])).item() == pytest.approx(math.log(1 + math.exp(1)))
    # one class: log(1 + e) - 1/2, the mean over both positives
    assert loss(x, x, torch.tensor([[[0, 0]]])).item() == pytest.approx(math.log(1 + math.e) - 0.5)


@pytest.mark.parametrize("label", [0, 1, 3])
def test_labelled_contrast_of_one_class_alone(label):
    student, teacher = maps(2, 4, 8, 8, dtype=torch.float32)
    loss = SupervisedContrastiveLoss(0.1, samples=64)(student, teacher, torch.full((2, 8, 8), label), seeded_rng())
    loss.backward()
    assert loss >= math.log(64)
    assert student.grad.isfinite().all() and teacher.grad.isfinite().all() and student.grad.any()


def test_labelled_contrast_with_one_pixel_of_a_class():
    student, teacher = maps(2, 4, 8, 8)
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    labels[1, 3, 5] = 1
    loss = SupervisedContrastiveLoss(0.4, samples=16)
    loss(student, teacher, labels, seeded_rng()).backward()
    assert student.grad[1, :, 3, 5].any()  # it is always drawn
    torch.testing.assert_close(
        SupervisedContrastiveLoss(0.4, 10_000)(student, teacher, labels), labelled_oracle(student, teacher, labels, 0.4)
    )


@few
@given(seed=seeds, factor=st.floats(0.1, 100), classes=st.integers(1, 4))
def test_labelled_contrast_ignores_scale_and_the_names_of_classes(seed, factor, classes):
    student, teacher = maps(2, 3, 4, 4, seed=seed)
    labels = labels_like(student, classes, seed)
    loss = SupervisedContrastiveLoss(0.4)
    expected = loss(student, teacher, labels)
    torch.testing.assert_close(loss(factor * student, teacher / factor, 7 - labels), expected)


def test_labels_come_to_the_grid_of_the_features_by_the_nearest_centre():
    student, teacher = maps(2, 3, 4, 4)
    labels = torch.randint(3, (2, 8, 8), generator=seeded())
    loss = SupervisedContrastiveLoss(0.4)
    got = loss(student, teacher, labels)
    torch.testing.assert_close(got, loss(student, teacher, labels[:, 1::2, 1::2]))
    assert not torch.isclose(got, loss(student, teacher, labels[:, ::2, ::2]))
    volume = torch.randint(3, (2, 4, 4, 8), generator=seeded())
    student, teacher = maps(2, 3, 2, 2, 4)
    torch.testing.assert_close(
        loss(student, teacher, volume), loss(student, teacher, volume[:, 1::2, 1::2, 1::2].contiguous())
    )


def drawn(labels, samples, seed=0):
    """Flat positions that the loss reads, found from where its gradient is."""
    student = torch.randn(len(labels), 4, *labels.shape[1:], generator=seeded(99), requires_grad=True)
    teacher = torch.randn(student.shape, generator=seeded(98))
    SupervisedContrastiveLoss(0.4, samples)(student, teacher, labels, seeded_rng(seed)).backward()
    return student.grad.abs().sum(1).flatten().nonzero()[:, 0]


@few
@given(seed=seeds, samples=st.integers(2, 80), shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=4))
def test_positions_are_distinct_and_balanced(seed, samples, shares):
    labels = torch.multinomial(torch.tensor(shares), 2 * 8 * 8, True, generator=seeded(seed)).reshape(2, 8, 8)
    classes, counts = labels.unique(return_counts=True)
    share = max(1, samples // len(classes))
    found = labels.flatten()[drawn(labels, samples, seed)]
    for label, count in zip(classes, counts, strict=True):
        assert (found == label).sum() == min(share, count)


def test_positions_come_from_the_generator_alone():
    labels = torch.randint(2, (2, 8, 8), generator=seeded())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(drawn(labels, 32, 5), drawn(labels, 32, 5))
    assert not torch.equal(drawn(labels, 32, 5), drawn(labels, 32, 6))
    assert torch.equal(state, torch.get_rng_state())


def test_every_position_has_about_the_same_chance():
    labels = torch.zeros(1, 5, 7, dtype=torch.int64)
    draws = 600
    hits = sum(torch.bincount(drawn(labels, 10, seed), minlength=35) for seed in range(draws))
    # 10 of 35 each; a run of 3 or 4 positions has one draw, so that chances lie between 1/4 and 1/3
    assert (hits / draws).min() > 0.18 and (hits / draws).max() < 0.41


def test_every_image_of_the_batch_is_drawn_from_alike():
    positions = drawn(torch.zeros(4, 16, 16, dtype=torch.int64), 64)
    assert torch.bincount(positions // 256).tolist() == [16, 16, 16, 16]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs labels"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "do not fit"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), "do not fit"),
        (torch.zeros(2, 4, dtype=torch.int64), "do not fit"),
    ],
)
def test_labels_that_a_contrast_cannot_use(labels, message):
    student, teacher = maps(2, 3, 4, 4)
    with pytest.raises(InputError, match=message):
        SupervisedContrastiveLoss(0.4)(student, teacher, labels)


# --- features and predictions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 2, 4, 4)])
def test_feature_mse_is_its_formula_and_zero_for_the_teacher_itself(shape):
    student, teacher = maps(*shape)
    assert FeatureMSE()(student, student).item() == 0
    torch.testing.assert_close(FeatureMSE()(student, teacher), (student - teacher).pow(2).sum() / student.numel())


def kl_oracle(student, teacher, temperature):
    """Pixel by pixel sum of p log(p / q), mean over pixels, times the squared temperature."""
    if student.shape[1] == 1:
        student, teacher = (torch.cat([torch.zeros_like(z), z], 1) for z in (student, teacher))
    q, p = ((z / temperature).exp() / (z / temperature).exp().sum(1, keepdim=True) for z in (student, teacher))
    pixels = p.numel() / p.shape[1]
    return (p * (p / q).log()).sum() / pixels * temperature**2


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 3, 4, 4), (2, 1, 2, 4, 4), (2, 4, 2, 4, 4)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_prediction_kl_is_its_formula(shape, temperature):
    student, teacher = maps(*shape)
    expected = kl_oracle(student, teacher, temperature)
    torch.testing.assert_close(PredictionKL(temperature)(student, teacher), expected)


def test_prediction_kl_by_hand():
    student, teacher = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), math.log(3))  # 1/2 against 3/4
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert PredictionKL(1.0)(student, teacher).item() == pytest.approx(expected)
    assert PredictionKL(4.0)(4 * student, 4 * teacher).item() == pytest.approx(16 * expected)


@few
@given(seed=seeds, temperature=st.floats(0.5, 8))
def test_one_channel_is_the_two_class_softmax(seed, temperature):
    student, teacher = maps(2, 1, 3, 3, seed=seed)
    loss = PredictionKL(temperature)
    two = loss(*(torch.cat([torch.zeros_like(z), z], 1) for z in (student, teacher)))
    one = loss(student, teacher)
    torch.testing.assert_close(one, two)
    gradients = [torch.autograd.grad(value, (student, teacher)) for value in (one, two)]
    torch.testing.assert_close(*gradients)
    assert one > 0 and gradients[0][0].abs().max() > 0  # a softmax over one channel would be 0 in both


@few
@given(seed=seeds, channels=st.integers(1, 4))
def test_prediction_kl_is_least_at_the_teacher(seed, channels):
    student, teacher = maps(2, channels, 3, 3, seed=seed)
    loss = PredictionKL(4.0)
    at_teacher = loss(teacher, teacher)
    assert abs(at_teacher.item()) < 1e-12 < loss(student, teacher).item()
    same = teacher.detach().clone().requires_grad_()
    assert torch.autograd.grad(loss(same, teacher.detach()), same)[0].abs().max() < 1e-12


def test_prediction_kl_does_not_grow_with_the_image():
    student, teacher = maps(2, 1, 4, 4)
    tiled = [x.repeat(3, 1, 2, 2) for x in (student, teacher)]
    torch.testing.assert_close(PredictionKL(4.0)(*tiled), PredictionKL(4.0)(student, teacher))


@pytest.mark.parametrize("channels", [1, 3])
def test_prediction_kl_of_certain_predictions_is_right(channels):
    student = torch.zeros(1, channels, 1, 1)
    student[:, 0] = 200.0
    loss = PredictionKL(1.0)(student.requires_grad_(), -student.detach())
    loss.backward()
    # the teacher is certain of what the student rules out: log(p / q) with p = 1 (for three channels 1/2 twice)
    assert loss.item() == pytest.approx(200.0 if channels == 1 else 200.0 - math.log(2), rel=1e-6)
    assert student.grad.isfinite().all() and student.grad.any()
