"""Distillation of the prediction maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.losses import base
from kdlib.losses.base import DistillationLoss, l2_normalize
from kdlib.losses.segmentation import probabilities
from kdlib.strict import AtLeastOne, NotNegative, Positive


def log_probabilities(logits: Tensor) -> Tensor:
    """Logits BNH[WD] as logarithms of the classes' probabilities; one channel becomes two, background first."""
    if logits.shape[1] == 1:
        # both outcomes as logarithms from the logit itself: 1 - sigmoid would round to 0
        return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=1)
    return logits.log_softmax(1)


def divergence(log_p_student: Tensor, log_p_teacher: Tensor, dim: int = 1) -> Tensor:
    """KL(teacher || student) of distributions along `dim`, which is summed over."""
    return F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(dim)


class PredictionKL(DistillationLoss):
    """KL(teacher || student) of the softened prediction of every pixel, times the squared temperature.

    One channel is a Bernoulli distribution, `p = sigmoid(logit / temperature)`; several are a softmax over channels.
    The mean is over all pixels of the batch (Hinton 2015, arXiv 1503.02531, for maps).

    Args:
        temperature: divisor of the logits; its square keeps the gradient's size independent of it.
    """

    name, label, family = "kl", "KL (Hinton)", "prediction"
    reads, adapt = "logits", "none"

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.keep(Positive, temperature=temperature)

    def compare(self, student, teacher, labels, kept, context):
        return base.mean_over(self.of_pixels(student, teacher), kept) * self.temperature**2

    def of_pixels(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The divergence BH[WD] of every pixel, without the squared temperature."""
        return divergence(*(self.log_probabilities(x / self.temperature) for x in (student, teacher)))

    def log_probabilities(self, logits: Tensor) -> Tensor:
        return log_probabilities(logits)


class OneChannelSoftmaxKL(PredictionKL):
    """As published; dead for one channel, kept for the `thesis` protocol.

    A softmax over the channel axis whatever the number of channels: the softmax of one channel is 1 everywhere, so
    value and gradient are exactly 0. With several channels it equals `PredictionKL`.

    Args:
        temperature: divisor of the logits.
    """

    name, label, family = "softmax_kl", "KL over one channel (published)", "prediction"

    def log_probabilities(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(1)


class BoundaryKL(PredictionKL):
    """`PredictionKL` that weighs the pixels near a boundary of the labels more.

    `sum(w * KL) / sum(w) * temperature^2` over the pixels of the batch, with `w = boundary` where labels differ within
    `radius` pixels along the axes or diagonals (a window of 2 radius + 1; the image's border is no boundary), and 1
    elsewhere. Without a boundary in the batch it equals `PredictionKL`. A band in place of the distances of U-Net's
    boundary weights (Ronneberger 2015, arXiv 1505.04597), which are weights of the supervised loss.

    Args:
        temperature: divisor of the logits.
        boundary: weight of a pixel in the band, relative to one outside.
        radius: of the band, in pixels of the logits.
    """

    name, label, family = "boundary_kl", "boundary KL", "prediction"
    needs_labels = True

    def __init__(self, temperature: float = 4.0, boundary: float = 5.0, radius: int = 2):
        super().__init__(temperature)
        self.keep(Positive, boundary=boundary)
        self.keep(AtLeastOne, radius=radius)

    def compare(self, student, teacher, labels, kept, context):
        divergences = self.of_pixels(student, teacher)
        band = base.near_boundary(labels.clamp(max=1) if student.shape[1] == 1 else labels, self.radius)
        weights = 1 + (self.boundary - 1) * band.to(divergences.dtype)
        if kept is not None:
            weights = weights * kept
        return (weights * divergences).sum() / weights.sum() * self.temperature**2


class DKD(DistillationLoss):
    """Decoupled distillation of every pixel (Zhao 2022, arXiv 2203.08679), mean over the pixels of the batch.

    `temperature^2 * (alpha * TCKD + beta * NCKD)`. TCKD is KL(teacher || student) of "the pixel's own class or not",
    `(p_t, 1 - p_t)`; NCKD is that of the distribution among the other classes, `p_c / (1 - p_t)`. With a `beta` of each
    pixel's teacher `1 - p_t` and alpha 1 the sum would be `PredictionKL`.
    With two classes (one channel, or two) only one other class is left: NCKD is exactly 0, and DKD is alpha times
    `PredictionKL`: with one class to segment and the default alpha, a comparison needs one row for both.

    Args:
        alpha, beta: weights of TCKD and NCKD.
        temperature: divisor of the logits.
    """

    name, label, family = "dkd", "DKD", "prediction"
    needs_labels = True
    reads, adapt = "logits", "none"

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0):
        super().__init__()
        self.keep(Positive, temperature=temperature)
        self.keep(NotNegative, alpha=alpha, beta=beta)

    def compare(self, student, teacher, labels, kept, context):
        labels = labels.clamp(0, 1 if student.shape[1] == 1 else None)
        own, others = zip(*(self._decoupled(logits, labels[:, None]) for logits in (student, teacher)), strict=True)
        tckd, nckd = divergence(*own), divergence(*others)
        return base.mean_over(self.alpha * tckd + self.beta * nckd, kept) * self.temperature**2

    def _decoupled(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of (p_t, 1 - p_t), and of the distribution among the other classes (0 at the own class)."""
        log_p = log_probabilities(logits / self.temperature)
        is_own = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, labels, True)
        # summed from the other classes' logarithms: 1 - p_t would round to 0
        log_other = log_p.masked_fill(is_own, -torch.inf).logsumexp(1, keepdim=True)
        own = torch.cat([log_p.gather(1, labels), log_other], dim=1)
        return own, (log_p - log_other).masked_fill(is_own, 0.0)  # 0 on both sides adds nothing to a divergence


class DIST(DistillationLoss):
    """Distillation from a stronger teacher (Huang 2022, arXiv 2205.10536): correlations, not values, for maps.

    `temperature^2 * (beta * inter + gamma * intra)`, both 1 minus Pearson's correlation of student and teacher
    probabilities: `inter` over the classes of a pixel, mean over the pixels of the batch; `intra` over all the pixels
    of the batch for a class, mean over the classes. So the student may be an affine function of the teacher. Defaults
    are those of the authors' segmentation code.

    Over two classes a pixel's correlation is +1 or -1, a sign without gradient: for one or two channels only the intra
    term is used. One channel is correlated through its foreground probability, which gives the same as both classes.
    A map without variation has correlation 0, hence loss 1; one of nearly none (a class that is absent, of a norm under
    1e-4, see `l2_normalize`) has nearly 0, also with a student that equals its teacher.

    Args:
        beta, gamma: weights of the inter-class and the intra-class relation.
        temperature: divisor of the logits.
    """

    name, label, family = "dist", "DIST", "prediction"
    reads, adapt = "logits", "none"

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0):
        super().__init__()
        self.keep(Positive, temperature=temperature)
        self.keep(NotNegative, beta=beta, gamma=gamma)

    def compare(self, student, teacher, labels, kept, context):
        # [classes, pixels of the batch]
        scaled = [logits / self.temperature for logits in (student, teacher)]
        student, teacher = (probabilities(logits).transpose(0, 1).flatten(1) for logits in scaled)
        if kept is not None:
            student, teacher = (x[:, kept.flatten()] for x in (student, teacher))
        loss = self.gamma * (1 - correlation(student, teacher, dim=1).mean())
        if len(student) > 2:
            loss = loss + self.beta * (1 - correlation(student, teacher, dim=0).mean())
        return loss * self.temperature**2


def correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along `dim`; 0 where either does not vary."""
    a, b = (l2_normalize(x - x.mean(dim, keepdim=True), dim) for x in (a, b))
    return (a * b).sum(dim)


class ChannelWiseDistillation(DistillationLoss):
    """Channel-wise distillation (CWD, Shu 2021, arXiv 2011.13256): where, not how much, each channel responds.

    A softmax over the positions of a channel makes it a distribution; the loss is KL(teacher || student) of it, times
    the squared temperature, mean over the channels and images of the batch. A constant added to a channel is not seen.

    Args:
        temperature: divisor of the maps; a higher one spreads the distribution over more positions.
    """

    name, label, family = "cwd", "CWD (logits)", "prediction"
    reads, adapt = "logits", "none"

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.keep(Positive, temperature=temperature)

    def compare(self, student, teacher, labels, kept, context):
        scaled = [maps.flatten(2) / self.temperature for maps in (student, teacher)]
        if kept is None:
            log_p = [x.log_softmax(2) for x in scaled]
        else:
            ignored = ~kept.flatten(1)[:, None]
            log_p = [x.masked_fill(ignored, -torch.inf).log_softmax(2).masked_fill(ignored, 0) for x in scaled]
        return divergence(*log_p, dim=2).mean() * self.temperature**2
