"""Distillation of the features of single layers, of several scales, and of labelled regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.config import InputError
from kdlib.losses import base
from kdlib.losses.base import EMPTY_CONTEXT, Context, DistillationLoss, as_float, l2_normalize
from kdlib.losses.prediction import ChannelWiseDistillation
from kdlib.strict import AtLeastOne, Range


class FeatureMSE(DistillationLoss):
    """Mean squared difference of student and teacher features (FitNets, Romero 2015, arXiv 1412.6550)."""

    name, label, family = "fitnet", "MSE", "feature"
    reads, adapt = "features", "student"

    def compare(self, student, teacher, labels, kept, context):
        return base.mean_square(student, teacher, kept)


class FeatureCWD(ChannelWiseDistillation):
    """Channel-wise distillation (`ChannelWiseDistillation`) of features, at the temperature 1."""

    name, label, family = "feature_cwd", "CWD (features)", "feature"
    reads, adapt = "features", "student"

    def __init__(self, temperature: float = 1.0):
        super().__init__(temperature)


class AttentionTransfer(DistillationLoss):
    """Attention transfer (AT, Zagoruyko & Komodakis 2017, arXiv 1612.03928): which positions respond, of any channels.

    An image's attention map is the sum of `|F|^power` over channels, divided by its L2 norm; the loss is the squared
    distance of student and teacher maps, mean over the images: from 0 to 2 whatever the grid. The authors' code divides
    it by the number of positions, and makes up for that by a large weight; their paper has the distance, not squared.
    The scale of an image's features is not seen.

    Args:
        power: of the features; a higher one looks at the strongest responses alone.
    """

    name, label, family = "at", "AT", "feature"
    reads, adapt = "features", "none"

    def __init__(self, power: float = 2.0):
        super().__init__()
        self.keep(Annotated[float, Range(1)], power=power)

    def compare(self, student, teacher, labels, kept, context):
        return (self.attention(student) - self.attention(teacher)).pow(2).sum(1).mean()

    def attention(self, features: Tensor) -> Tensor:
        """The maps' attention, [B, positions], of length 1 (less where all features of an image are below 1e-4)."""
        size = features.flatten(2).abs()
        # the map does not depend on the scale, but its powers over- and underflow: a constant, so no gradient is lost
        size = size / size.detach().amax(dim=(1, 2), keepdim=True).clamp(min=1e-4)
        # the strongest feature is now 1, and so the norm at least 1; where all are below 1e-4, gradients stay bounded
        return F.normalize(size.pow(self.power).sum(1), eps=1)


class ImportanceMap(AttentionTransfer):
    """Importance map distillation of EMKD (Qin 2021, arXiv 2108.09987): `AttentionTransfer` with a higher power.

    Args:
        power: of the features; 4 in the authors' code.
    """

    name, label, family = "emkd_importance", "EMKD importance", "feature"

    def __init__(self, power: float = 4.0):
        super().__init__(power)


class RegionAffinity(DistillationLoss):
    """Region affinity distillation of EMKD (Qin 2021, arXiv 2108.09987): how alike the tissues look, of any channels.

    The features of an image are averaged over the region of each label; the affinity of two regions is the cosine of
    their averages. The loss is the squared difference of the student's and the teacher's affinity, mean over all pairs
    of regions that one image holds, over the batch: from 0 to 4. The authors' code has one pair, background and
    organ; here, with several labels, every pair counts the same. An image of one region has no pair and is left out of
    the mean, where that code counts it as 0. Without a pair in the batch the loss is 0, with a gradient of 0. Features
    of one channel have cosines of +1 or -1 and nothing to learn.
    """

    name, label, family = "emkd_affinity", "EMKD affinity", "feature"
    needs_labels = True
    reads, adapt = "features", "none"

    def compare(self, student, teacher, labels, kept, context):
        members = labels.flatten(1)[:, None] == base.classes_of(labels)[:, None]  # [B, regions, positions]
        counts = members.sum(2)
        present = counts > 0
        pairs = (present[:, :, None] & present[:, None]).triu(1)
        difference = _affinity(student, members, counts) - _affinity(teacher, members, counts)
        # with no pair all is masked: a 0 that still belongs to the student's graph
        return (difference.pow(2) * pairs).sum() / pairs.sum().clamp(min=1)


def _affinity(features: Tensor, members: Tensor, counts: Tensor) -> Tensor:
    """Cosines [B, regions, regions] between the mean features of the regions."""
    features = features.flatten(2)
    means = members.to(features.dtype) @ features.transpose(1, 2) / counts.clamp(min=1)[:, :, None]
    means = l2_normalize(means, dim=2)
    return means @ means.transpose(1, 2)


class ReviewKD(DistillationLoss):
    """Knowledge review (Chen 2021, arXiv 2104.09044): the student's deeper scales help to match a shallower one.

    From the deepest scale to the shallowest, a 1x1 convolution brings the student's features to `width` channels; two
    attention maps, the sigmoid of a 1x1 convolution of these and the deeper fused features (resized, nearest), weigh
    the two, and their sum is the scale's fused features (ABF). A 3x3 convolution of them, of the teacher's channels, is
    compared with the teacher's features of that scale (brought to
    the student's grid bilinearly) by `hierarchical_context_loss`; mean over the scales (the
    authors' code has the sum). Convolutions have biases in place of the authors' batch norms, so that an image counts
    the same in any batch. They are trained with the student.

    Args:
        student_channels, teacher_channels: of each scale, from shallow to deep.
        dims: 2 or 3 spatial dimensions.
        width: channels of the fusion.
    """

    name, label, family = "reviewkd", "ReviewKD", "feature"
    reads, adapt = "features", "own"

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], dims: int = 2, width: int = 64
    ):
        super().__init__()
        if not student_channels or len(student_channels) != len(teacher_channels):
            scales = f"{len(student_channels)} scales of the student and {len(teacher_channels)} of the teacher"
            raise InputError(f"ReviewKD between {scales}: give channels of one or more pairs, from shallow to deep")
        if dims not in (2, 3):
            raise InputError(f"ReviewKD in {dims} dimensions: give 2 or 3")
        self.keep(AtLeastOne, width=width)
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.dims = dims
        self.reduce = nn.ModuleList(conv(channels, width, 1) for channels in student_channels)
        self.attend = nn.ModuleList(conv(2 * width, 2, 1) for _ in student_channels[1:])
        self.expand = nn.ModuleList(conv(width, channels, 3, padding=1) for channels in teacher_channels)
        for layer in [*self.reduce, *self.expand]:  # no activation follows: keep the variance as it is
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor | None = None,
        context: Context = EMPTY_CONTEXT,
    ) -> Tensor:  # fmt: skip
        """
        Args:
            student, teacher: feature maps BNHW[D] of each scale, from shallow to deep. Grids may differ in every way:
                the teacher is brought to the student's by (bi/tri)linear interpolation.
            context: ignored positions are set to 0 at every scale, and left out where features are compared.
        """
        self._check(student, teacher)
        kept = [None] * len(student)
        if context.ignore_index is not None:
            labels = base.usable_labels(labels, context.ignore_index, self.label)
            kept, of_teacher = ([base.resize_labels(labels, x) >= 0 for x in y] for y in (student, teacher))
            sides = (zip(student, kept, strict=True), zip(teacher, of_teacher, strict=True))
            student, teacher = ([x.masked_fill(~k[:, None], 0) for x, k in side] for side in sides)
        mode = {2: "bilinear", 3: "trilinear"}[self.dims]
        with torch.autocast(student[0].device.type, enabled=False):
            losses = [
                hierarchical_context_loss(ours, F.interpolate(as_float(theirs), size=ours.shape[2:], mode=mode), k)
                for ours, theirs, k in zip(self.review(student), teacher, kept, strict=True)
            ]
        return torch.stack(losses).mean()

    def review(self, student: Sequence[Tensor]) -> list[Tensor]:
        """The student's features of each scale, fused with the deeper ones, with the teacher's channels."""
        fused, outputs = None, []
        for scale in reversed(range(len(self.reduce))):
            features = self.reduce[scale](as_float(student[scale]))
            if fused is not None:
                deeper = F.interpolate(fused, size=features.shape[2:], mode="nearest-exact")
                attention = self.attend[scale](torch.cat([features, deeper], dim=1)).sigmoid()
                features = features * attention[:, :1] + deeper * attention[:, 1:]
            fused = features
            outputs.append(self.expand[scale](fused))
        return outputs[::-1]

    def _check(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        if not len(student) == len(teacher) == len(self.reduce):
            given = f"{len(student)} maps of the student and {len(teacher)} of the teacher"
            raise InputError(f"ReviewKD of {len(self.reduce)} scales got {given}: give one a scale, shallow to deep")
        for ours, theirs, reduce, expand in zip(student, teacher, self.reduce, self.expand, strict=True):
            batch = len(student[0])
            for maps, channels in ((ours, reduce.in_channels), (theirs, expand.out_channels)):
                if maps.dim() != self.dims + 2 or maps.shape[:2] != (batch, channels) or 0 in maps.shape:
                    wanted = f"[{batch}, {channels}, {self.dims} spatial axes]"
                    raise InputError(f"ReviewKD got maps of shape {list(maps.shape)} where it takes {wanted}")


def hierarchical_context_loss(student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
    """The hierarchical context loss (HCL) of ReviewKD for maps BNHW[D] of one shape.

    The weighted mean of the mean squared differences at the full grid (weight 1) and at averages over 4, 2 and 1
    positions along each axis, each with half the weight of the one before. Sizes that the shortest axis does not exceed
    are left out. Of `kept` (BH[WD] bool) positions alone, where given.
    """
    pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[student.dim() - 2]
    difference = student - teacher
    if kept is not None:
        difference = difference * kept[:, None]
    shares = as_float(kept.to(student.dtype))[:, None] if kept is not None else None
    loss, weight, total = _mean_square(difference, shares), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(student.shape[2:]):
            weight /= 2
            # the mean is linear: one pooling of the difference serves both
            share = pool(shares, size) if shares is not None else None
            loss = loss + weight * _mean_square(pool(difference, size), share)
            total += weight
    return loss / total


def _mean_square(sums: Tensor, shares: Tensor | None) -> Tensor:
    """Mean square of `sums / shares`, over the positions whose share (of kept positions, BHW[D]) is above 0."""
    if shares is None:
        return sums.pow(2).mean()
    count = (shares > 0).sum().clamp(min=1) * sums.shape[1]
    return (sums / shares.clamp(min=1e-12)).pow(2).sum() / count
