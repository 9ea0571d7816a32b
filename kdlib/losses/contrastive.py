"""Contrast of student features with teacher features: between images, labelled pixels, and regions of a class."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.config import InputError
from kdlib.losses import base
from kdlib.losses.base import Context, DistillationLoss, l2_normalize
from kdlib.losses.linear import log_sum_exp
from kdlib.losses.memory import MemoryBank
from kdlib.strict import AtLeastOne, Positive, Range, Whole, checked


class InfoNCE(DistillationLoss):
    """InfoNCE between images (van den Oord 2018, arXiv 1807.03748), as in the thesis: no labels.

    Every map is flattened to one vector an image. The positive of a student's image is the same image of the teacher,
    its negatives are the teacher's other images of the batch. With `same_patient` those of the anchor's own patient are
    left out: neighbouring slices are near copies, and no negatives. An anchor left without a negative counts 0.

    Args:
        temperature: divisor of the cosine similarities.
        same_patient: leave out other images of the anchor's own patient.
    """

    name, label, family = "infonce", "InfoNCE", "contrast"
    reads, adapt = "features", "both"

    def __init__(self, temperature: float = 0.1, same_patient: bool = False):
        super().__init__()
        self.keep(Positive, temperature=temperature)
        self.keep(bool, same_patient=same_patient)

    def compare(self, student, teacher, labels, kept, context):
        if len(student) < 2 and kept is None:  # an image may be alone for the others being ignored, and counts 0
            raise InputError("InfoNCE between images needs at least two images in a batch: use a larger batch")
        similarity = l2_normalize(student.flatten(1)) @ l2_normalize(teacher.flatten(1)).T / self.temperature
        if self.same_patient:
            patients = base.patients_of(context, student, "InfoNCE without the same patient")
            near = (patients[:, None] == patients).fill_diagonal_(False)
            similarity = similarity.masked_fill(near, -torch.inf)
        return F.cross_entropy(similarity, torch.arange(len(student), device=student.device))


class SupervisedContrastiveLoss(DistillationLoss):
    """Supervised contrast of pixels (Khosla 2020, arXiv 2004.11362, L_out): student anchors against teacher keys.

    For an anchor z of class c and keys k, unit vectors at the same positions of the batch,
    `loss(z) = log sum_j exp(z . k_j / t) - mean over keys of class c of z . k_j / t`.
    The key of the anchor's own position is one of its positives: it is the teacher's vector, not the anchor itself. The
    mean over positives is linear, `z . (mean of the class's keys)`; only the log-sum-exp is quadratic, and it is made
    in blocks: memory is linear in the positions, so that all of them can be taken.

    Positions are drawn in equal number from each class present, all of a class that is smaller than its share, and
    spread evenly over the batch. The loss is the mean over the classes of the mean over their anchors, so that a small
    organ counts as much as the background. With one class alone every key is a positive, and the loss is small where
    all similarities are alike: at least the logarithm of the number of keys, finite, with a finite gradient.

    Args:
        temperature: divisor of the cosine similarities.
        samples: most positions to draw from a batch (at least one a class); None takes all.
        hard: share of a class's positions to draw near a boundary, as far as there are such; the rest is drawn from all
            that are left.
        radius: a position is near a boundary if another label lies within so many positions (along each axis).
        memory: keys of earlier steps to keep as further keys, with their labels, in a `MemoryBank` (0: none). Call
            its `allow_patients` first. Keys enter in training mode only, after the loss they were in.
        same_patient: leave out the keys of the anchor's own patient, other than the one at its own position:
            neighbouring slices are near copies.
    """

    name, label, family = "supcon", "supervised contrastive loss", "contrast"
    needs_labels = True
    reads, adapt = "features", "both"

    def __init__(
        self, temperature: float = 0.1, samples: int | None = 1024, hard: float = 0.0, radius: int = 1, memory: int = 0,
        same_patient: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.keep(Positive, temperature=temperature)
        self.keep(AtLeastOne | None, samples=samples)
        self.keep(Annotated[float, Range(0, 1)], hard=hard)
        self.keep(AtLeastOne, radius=radius)
        if hard and samples is None:
            raise InputError("all positions are taken, so none can be drawn near boundaries: give samples, or hard=0")
        self.keep(bool, same_patient=same_patient)
        self.bank = MemoryBank(memory) if checked("memory is", memory, Whole) else None

    def compare(self, student, teacher, labels, kept, context):
        positions = self.draw(labels, context.generator)
        image = positions // labels[0].numel()
        key_labels = own_labels = labels.flatten()[positions]
        key_patients = patients = None
        if self.bank is not None or self.same_patient:
            key_patients = patients = base.patients_of(context, student, "supervised contrastive loss")[image]
        anchors, keys = (l2_normalize(base.vectors_at(maps, positions)) for maps in (student, teacher))
        own_keys = keys
        if self.bank is not None and len(self.bank):
            vectors, bank_labels, bank_patients = self.bank.entries()
            keys = torch.cat([keys, vectors.to(keys)])
            key_labels, key_patients = torch.cat([own_labels, bank_labels]), torch.cat([patients, bank_patients])
        classes = own_labels.unique()
        members, key_members = ((x[:, None] == classes).to(keys) for x in (own_labels, key_labels))
        if self.same_patient:
            positives = _means_without_patient(members, key_members, own_keys, keys, patients, key_patients)
            everything = log_sum_exp(anchors, keys, 1 / self.temperature, patients, key_patients, unit=True)
        else:
            positives = members @ (key_members.T @ keys / key_members.sum(0)[:, None])
            everything = log_sum_exp(anchors, keys, 1 / self.temperature, unit=True)
        loss = everything - (anchors * positives).sum(1) / self.temperature
        loss = ((members.T @ loss) / members.sum(0)).mean()
        if self.bank is not None and self.training:
            # positions come class by class: even steps keep the classes balanced where not all keys fit
            count = min(len(positions), self.bank.size)
            kept = torch.arange(count, device=positions.device) * len(positions) // count
            self.bank.push(own_keys[kept], own_labels[kept], patients[kept])
        return loss

    def draw(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Positions [n] to contrast in the flat labels (BH[WD] on the grid, < 0 where ignored), class by class."""
        flat = labels.flatten()
        if self.samples is None:
            return (flat >= 0).nonzero()[:, 0]
        near = base.near_boundary(labels, self.radius).flatten() if self.hard else None
        classes = base.classes_of(labels)
        share = max(1, self.samples // len(classes))
        drawn = []
        for label in classes:
            found = (flat == label).nonzero()[:, 0]
            count = min(share, len(found))
            if near is not None:
                edge = found[near[found]]
                hard = _spread(edge, min(len(edge), round(self.hard * count)), generator)
                drawn.append(hard)
                found, count = found[~torch.isin(found, hard)], count - len(hard)
            drawn.append(_spread(found, count, generator))
        return torch.cat(drawn)

    def relation(self, anchors: Tensor, keys: Tensor, labels: Tensor, patients: Tensor | None = None) -> Tensor:
        """What the teacher's keys at drawn positions are to the student's anchors: the pairs of `forward`, spelt out.

        Keys of earlier steps, which a memory adds, lie on no image of this one.

        Args:
            anchors, keys: [a] and [n] positions in the flat labels, from `draw`.
            labels: BH[WD], on the maps' grid.
            patients: [B], the patient of each image, needed with `same_patient`.

        Returns: [a, n] int8: 1 a positive, -1 a negative, 0 left out.
        """
        flat, size = labels.flatten(), labels[0].numel()
        relation = torch.where(flat[anchors][:, None] == flat[keys], 1, -1)
        if self.same_patient:
            patients = base.patients_of(Context(patients=patients), labels, "supervised contrastive loss")
            same = patients[anchors // size][:, None] == patients[keys // size]
            relation = relation.masked_fill(same & (anchors[:, None] != keys), 0)
        return relation.to(torch.int8)


def _spread(found: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` distinct elements, one from each of `count` runs of near-equal length: from every image alike."""
    if count == 0:
        return found[:0]
    edges = torch.arange(count + 1) * len(found) // count
    offsets = torch.rand(count, generator=generator, dtype=torch.float64) * edges.diff()
    return found[(edges[:-1] + offsets.long()).to(found.device)]


def _means_without_patient(
    members: Tensor, key_members: Tensor, own_keys: Tensor, keys: Tensor, patients: Tensor, key_patients: Tensor
) -> Tensor:
    """For each anchor the mean key of its class from other patients and its own position, [n, d]."""
    means = torch.zeros_like(own_keys)
    for patient in patients.unique():
        mine = (patients == patient).nonzero()[:, 0]
        # summed over the others: all minus mine would lose the digits of a class that is mostly mine
        others = key_members * (key_patients != patient)[:, None]
        total = members[mine] @ (others.T @ keys) + own_keys[mine]
        means = means.index_put((mine,), total / (members[mine] @ others.sum(0) + 1)[:, None])
    return means


class PrototypeContrast(DistillationLoss):
    """Contrast of the student's regions, or pixels, with the teacher's mean vector of each class's region.

    The prototype k_c of a class is the teacher's unit vectors averaged over the positions of the class, of length 1
    again. An anchor z of class c, a student's prototype made alike or a pixel, has
    `loss(z) = log sum over classes present of exp(z . k_c' / t) - z . k_c / t`:
    InfoNCE over classes, as of pixels with class prototypes in Zhou 2022 (arXiv 2203.15102), here with the teacher's
    prototypes. The loss is the mean over the classes of the mean over their anchors. Classes absent are left out. One
    class alone has nothing to be told from: the loss and its gradient are 0.

    Args:
        temperature: divisor of the cosine similarities.
        anchors: "regions" or "pixels" of the student.
        per_image: prototypes of each image, contrasted within the image, rather than of the batch.
    """

    name, label, family = "prototype", "prototype contrast", "contrast"
    needs_labels = True
    reads, adapt = "features", "both"

    def __init__(self, temperature: float = 0.1, anchors: str = "regions", per_image: bool = False):
        super().__init__()
        self.keep(Positive, temperature=temperature)
        self.keep(Literal["regions", "pixels"], anchors=anchors)
        self.keep(bool, per_image=per_image)

    def compare(self, student, teacher, labels, kept, context):
        classes = base.classes_of(labels)
        # [G, positions, d]: groups are the images, or the batch as one
        student, teacher = (l2_normalize(maps.movedim(1, -1), dim=-1).flatten(1, -2) for maps in (student, teacher))
        labels = labels.flatten(1)
        if not self.per_image:
            student, teacher, labels = (x.flatten(0, 1)[None] for x in (student, teacher, labels))
        members = (labels[:, None] == classes[:, None]).to(student)  # [G, classes, positions]
        counts = members.sum(2)
        present = counts > 0
        keys = l2_normalize(members @ teacher / counts.clamp(min=1)[:, :, None], dim=2)
        if self.anchors == "regions":
            anchors = l2_normalize(members @ student / counts.clamp(min=1)[:, :, None], dim=2)
            members, counts = torch.diag_embed(present.to(student)), present.to(student)
        else:
            anchors = student
        similarity = keys @ anchors.mT / self.temperature  # [G, classes, anchors]
        # of the others alone: 1 + exp(-20) is 1 in float32, and a loss nearly solved would become a dead term
        absent = ~present[:, :, None] | (members > 0)
        others = similarity.masked_fill(absent, torch.finfo(similarity.dtype).min).logsumexp(1)
        loss = members * F.softplus(others[:, None] - similarity)
        return (loss.sum((0, 2)) / counts.sum(0)).mean()


class CRD(DistillationLoss):
    """Contrastive representation distillation between images (Tian 2020, arXiv 1910.10699).

    An image's embedding is the mean of its map over positions, of length 1. Noise-contrastive estimation tells the pair
    of student z and teacher k of one image from N pairs of different images:
    `loss = - log h(z, k) - sum over negatives k_j of log(1 - h(z, k_j))`,
    `h(z, k) = exp(z . k / t) / (exp(z . k / t) + N Z)`,
    mean over the batch, once with students as anchors and once with teachers, both added. The paper writes N / M for
    N Z, M the number of training images; Z here is the mean of exp(z . k / t) over the negatives of the first training
    step with any, kept from then on, which does what the normalising constant of the authors' code does: where nothing
    tells the images apart the loss is 2 ln(1 + N) + 2 N ln(1 + 1 / N), whatever the width and temperature.

    The paper keeps a vector of every training image; here negatives are the other images of the batch and a memory of
    the latest embeddings, one for each side. What it holds of the anchor's own patient is no negative: it may be the
    anchor's own image, an epoch ago. Without any negative (one image, empty memory) the positive alone counts.
    Embeddings enter in training mode only, after the loss; call `allow_patients` of both memories first.

    Args:
        temperature: divisor of the cosine similarities.
        memory: embeddings to keep of each side (0: negatives of the batch alone).
        same_patient: leave out other images of the anchor's own patient in the batch too.
    """

    name, label, family = "crd", "CRD", "contrast"
    reads, adapt = "features", "both"

    def __init__(self, temperature: float = 0.07, memory: int = 1024, same_patient: bool = False):
        super().__init__()
        self.keep(Positive, temperature=temperature)
        self.keep(bool, same_patient=same_patient)
        size = checked("memory is", memory, Whole)
        self.student_bank, self.teacher_bank = (MemoryBank(size) if size else None for _ in range(2))
        # log Z with students, and with teachers as anchors; -inf before the first training step with a negative
        self.register_buffer("log_normaliser", torch.full((2,), -torch.inf))

    def compare(self, student, teacher, labels, kept, context):
        # where none are asked for: as if of one image each
        patients = torch.arange(len(student), device=student.device)
        if self.student_bank is not None or self.same_patient:
            patients = base.patients_of(context, student, "CRD")
        z, k = (l2_normalize(maps.flatten(2).mean(2)) for maps in (student, teacher))
        loss = self._direction(0, z, k, self.teacher_bank, patients)
        loss = loss + self._direction(1, k, z, self.student_bank, patients)
        if self.student_bank is not None and self.training:
            for bank, vectors in ((self.student_bank, z), (self.teacher_bank, k)):
                bank.push(vectors, torch.zeros_like(patients), patients)
        return loss

    def _direction(self, side: int, anchors: Tensor, keys: Tensor, bank: MemoryBank | None, patients: Tensor) -> Tensor:
        negative = ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
        if self.same_patient:
            negative &= patients[:, None] != patients
        if bank is not None and len(bank):
            vectors, _, others = bank.entries()
            keys = torch.cat([keys, vectors.to(keys)])
            negative = torch.cat([negative, patients[:, None] != others], dim=1)
        similarity = anchors @ keys.T / self.temperature
        normaliser = self._normaliser(side, similarity.detach()[negative])
        number = negative.sum(1, keepdim=True).clamp(min=1)
        log_odds = similarity - normaliser - number.log()  # of h
        return (F.softplus(log_odds) * negative).sum(1).mean() + F.softplus(-log_odds.diagonal()).mean()

    def _normaliser(self, side: int, negatives: Tensor) -> Tensor:
        known = self.log_normaliser[side]
        if known.isfinite() or not len(negatives):
            return torch.where(known.isfinite(), known, 0.0).to(negatives)
        found = negatives.logsumexp(0) - math.log(len(negatives))
        if self.training and found.isfinite():
            self.log_normaliser[side] = found
        return found
