"""From logits to labels, and the supervised segmentation loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from kdlib.config import InputError
from kdlib.losses.base import as_float, check_classes, usable_labels


def one_hot(labels: torch.Tensor, channels: int) -> torch.Tensor:
    """Labels BH[WD] (int64) as float masks BNH[WD] with `channels` channels; for one channel, the foreground's mask."""
    if channels == 1:
        return (labels > 0).float().unsqueeze(1)
    return F.one_hot(labels, channels).movedim(-1, 1).float()


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Logits BNH[WD] as probabilities of the same shape: sigmoid for one channel, softmax for several."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def most_probable(scores: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Probabilities BNH[WD] as labels BH[WD] (int64); see `predict`."""
    return (scores[:, 0] > threshold).long() if scores.shape[1] == 1 else scores.argmax(1)


def predict(logits: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Logits BNH[WD] as labels BH[WD] (int64): probability above `threshold` for one channel, likeliest of several."""
    return (logits[:, 0] > math.log(threshold / (1 - threshold))).long() if logits.shape[1] == 1 else logits.argmax(1)


class SegmentationLoss(nn.Module):
    """Soft Dice loss (Milletari 2016, arXiv 1606.04797) of the foreground classes, optionally plus cross entropy.

    Dice is taken over the pixels of the whole batch, for each class: most slices hold no foreground, and a Dice of each
    slice would there be 1 however small the false positives, so that such slices would outweigh those with an organ.
    MONAI's smoothing constants of 1e-5 (pixels) keep a batch without foreground finite: its Dice loss is almost 1,
    with a gradient of almost 0.

    Args:
        cross_entropy: add the mean cross entropy (binary for one channel), as the teachers do; else Dice alone.
        smoothing: share of every pixel's target of the cross entropy that is spread evenly over the classes (Szegedy
            2016, arXiv 1512.00567). Dice keeps its labels: smoothed ones promise foreground everywhere, and networks
            that learn a small organ from them begin by finding none, some for good.
        ignore_index: label of positions that take no part; None where there is none.
    """

    def __init__(self, cross_entropy: bool, smoothing: float = 0.0, ignore_index: int | None = None):
        super().__init__()
        from monai.losses import DiceLoss  # seconds that only a training needs

        self.cross_entropy, self.smoothing, self.ignore_index = cross_entropy, smoothing, ignore_index
        self.binary = DiceLoss(sigmoid=True, batch=True)
        self.multiclass = DiceLoss(softmax=True, include_background=False, batch=True)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: BNH[WD].
            labels: BH[WD], int64, 0 is background; for one channel, every other label is foreground.

        Raises: InputError: where the shapes do not fit, labels are not int64, or a label is below 0 or has no channel.
        """
        channels = logits.shape[1]
        if labels.shape != logits.shape[:1] + logits.shape[2:]:
            found = f"labels {list(labels.shape)} do not fit logits {list(logits.shape)}"
            raise InputError(f"{found}: give labels of the logits' shape without its channels")
        labels = usable_labels(labels, self.ignore_index, "the segmentation loss")
        if channels > 1:
            check_classes(labels, channels)
        logits, share = as_float(logits), 1.0
        target = one_hot(labels.clamp(min=0), channels).to(logits.dtype)
        smoothed = target * (1 - self.smoothing) + self.smoothing / max(channels, 2)
        if self.ignore_index is not None:
            # certain and true background adds nothing to Dice or cross entropy, whose mean is then of the kept alone
            number = torch.arange(channels, device=logits.device).view(1, -1, *[1] * (logits.dim() - 2))
            background = number == (0 if channels > 1 else -1)
            ignored = labels[:, None] < 0
            logits = torch.where(ignored, torch.where(background, 0.0, -1e4).to(logits), logits)
            target, smoothed = (torch.where(ignored, background.to(x), x) for x in (target, smoothed))
            share = (~ignored).sum().clamp(min=1) / ignored.numel()
        dice = (self.binary if channels == 1 else self.multiclass)(logits, target)
        entropy = F.binary_cross_entropy_with_logits if channels == 1 else F.cross_entropy
        return dice + entropy(logits, smoothed) / share if self.cross_entropy else dice
