"""From logits to labels, and the segmentation loss against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from test_common import labels_like, maps, seeded

from kdlib.config import InputError
from kdlib.losses import SegmentationLoss, one_hot, predict, probabilities

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
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits, fast_mode=True)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cross_entropy", [False, True])
def test_segmentation_loss_knows_right_from_wrong(channels, cross_entropy):
    labels = torch.arange(2 * 8 * 8).reshape(2, 8, 8) % max(channels, 2)
    right = 40 * one_hot(labels, channels) - 20
    loss = SegmentationLoss(cross_entropy)
    assert loss(right, labels) < 1e-4
    assert loss(-right, labels) > 0.9


@pytest.mark.parametrize("channels", [1, 3])
def test_label_smoothing_is_of_the_cross_entropy_alone(channels):
    """As MONAI's DiceCELoss and PyTorch's cross entropy have it; least where the probability is the smoothed target."""
    labels = torch.zeros(2, 16, 16, dtype=torch.long)
    labels[0, 3:5, 3] = 1
    both, dice = SegmentationLoss(True, smoothing=0.1), SegmentationLoss(False)
    logits = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    if channels == 1:
        expected = torch.nn.BCEWithLogitsLoss()(logits, 0.9 * one_hot(labels, 1) + 0.05)
    else:
        expected = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
    assert (both(logits, labels) - dice(logits, labels)).item() == pytest.approx(expected.item(), rel=1e-5)
    target = one_hot(labels, channels) * 0.9 + 0.1 / max(channels, 2)
    itself = (target.logit() if channels == 1 else target.log()).requires_grad_()
    (both(itself, labels) - dice(itself, labels)).backward()
    assert itself.grad.abs().max() < 1e-6


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
