"""Contrast of student features with teacher features: between whole images, and between labelled pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kdlib.config import InputError
from kdlib.losses._common import as_float, check_pair


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    # eps bounds the gradient of a vector of zeros, which a ReLU can give, at 1e4 instead of 1e12
    return F.normalize(as_float(vectors), dim=1, eps=1e-4)


class InfoNCE(nn.Module):
    """InfoNCE between images (van den Oord 2018, arXiv 1807.03748), as in the thesis: no labels.

    Every map is flattened to one vector an image. The positive of a student's image is the same image of the teacher,
    its negatives are the teacher's other images of the batch.

    Args:
        temperature: divisor of the cosine similarities.
    """

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Args:
            student, teacher: feature maps BNH[WD] of one shape; gradients flow to both.
            labels, generator: not used.

        Raises:
            InputError: where the shapes differ, or the batch has one image alone and so no negative.
        """
        check_pair(student, teacher)
        if len(student) < 2:
            raise InputError("InfoNCE between images needs at least two images in a batch: use a larger batch")
        with torch.autocast(student.device.type, enabled=False):
            similarity = _unit(student.flatten(1)) @ _unit(teacher.flatten(1)).T / self.temperature
            return F.cross_entropy(similarity, torch.arange(len(student), device=student.device))


class LabelledContrast(nn.Module):
    """Supervised contrast of pixels (Khosla 2020, arXiv 2004.11362, L_out): student anchors against teacher keys.

    For an anchor z of class c and keys k, unit vectors at the same positions of the batch,
    `loss(z) = log sum_j exp(z . k_j / t) - mean over keys of class c of z . k_j / t`.
    The key of the anchor's own position is one of its positives: it is the teacher's vector, not the anchor itself. The
    mean over positives is linear, `z . (mean of the class's keys)`, so only the log-sum-exp is quadratic.

    Positions are drawn in equal number from each class present, all of a class that is smaller than its share, and
    spread evenly over the batch. The loss is the mean over the classes of the mean over their anchors, so that a small
    organ counts as much as the background. With one class alone every key is a positive, and the loss is small where
    all similarities are alike: at least the logarithm of the number of keys, finite, with a finite gradient.

    Args:
        temperature: divisor of the cosine similarities.
        samples: most positions to draw from a batch (at least one a class).
    """

    def __init__(self, temperature: float, samples: int = 1024):
        super().__init__()
        self.temperature, self.samples = temperature, samples

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Args:
            student, teacher: feature maps BNH[WD] of one shape; gradients flow to both.
            labels: BH[WD], int64; brought to the maps' grid by the label nearest to each position's centre, because
                averages are no labels and a majority would erase thin structures.
            generator: on the CPU, draws the positions; None takes torch's own.

        Raises:
            InputError: where the maps' shapes differ, or labels are missing or not of the same batch and dimensions.
        """
        check_pair(student, teacher)
        if labels is None:
            raise InputError("the labelled contrast needs labels: use 'infonce' where there are none")
        if labels.dim() != student.dim() - 1 or len(labels) != len(student):
            shapes = f"labels {list(labels.shape)} do not fit maps {list(student.shape)}"
            raise InputError(f"{shapes}: give one label map an image, of as many dimensions")
        if labels.shape[1:] != student.shape[2:]:
            # as float: interpolation knows no integers, and labels are small enough to be exact
            labels = F.interpolate(labels[:, None].float(), size=student.shape[2:], mode="nearest-exact")[:, 0].long()

        positions, members = self._draw(labels.flatten(), generator)
        with torch.autocast(student.device.type, enabled=False):
            image, pixel = positions // labels[0].numel(), positions % labels[0].numel()
            anchors, keys = (_unit(maps.flatten(2)[image, :, pixel]) for maps in (student, teacher))
            members = members.to(anchors.dtype)  # [positions, classes], one 1 a row
            counts = members.sum(0)
            class_means = members.T @ keys / counts[:, None]
            positive = (anchors * (members @ class_means)).sum(1)
            loss = (anchors @ keys.T / self.temperature).logsumexp(1) - positive / self.temperature
            return ((members.T @ loss) / counts).mean()

    def _draw(self, labels: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [n] in the flat `labels`, and which class each is of [n, classes present] (bool)."""
        classes = labels.unique()
        share = max(1, self.samples // len(classes))
        drawn = []
        for label in classes:
            found = (labels == label).nonzero()[:, 0]
            # one draw from each of `count` runs of near-equal length: distinct, and from every image of the batch alike
            count = min(share, len(found))
            edges = torch.arange(count + 1) * len(found) // count
            offsets = torch.rand(count, generator=generator, dtype=torch.float64) * edges.diff()
            drawn.append(found[(edges[:-1] + offsets.long()).to(found.device)])
        positions = torch.cat(drawn)
        return positions, labels[positions][:, None] == classes
