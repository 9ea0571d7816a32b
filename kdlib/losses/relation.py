"""Distillation of relations: between images, between positions, to the prototype of a class, and to a memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.losses import base
from kdlib.losses.base import DistillationLoss, l2_normalize
from kdlib.losses.memory import MemoryBank
from kdlib.losses.prediction import divergence
from kdlib.strict import AtLeastOne, NotNegative, Positive, Range


class SimilarityPreserving(DistillationLoss):
    """Squared difference of the similarities between the images of a batch (Tung & Mori 2019, arXiv 1907.09682).

    Every map is flattened to one vector an image, `q`; `G = q q^T` over the batch, its rows divided by their lengths;
    `loss = |G_teacher - G_student|^2 / B^2`, a mean over the pairs of images; a batch of
    one image gives 0. A common scale of a side is not seen; an image whose features are under a hundredth of
    the batch's greatest counts less (see `l2_normalize`). Values are small, and the paper weighs them with 3000.
    """

    name, label, family = "sp", "SP", "relation"
    reads, adapt = "features", "none"

    def compare(self, student, teacher, labels, kept, context):
        # the loss does not depend on a scale of all vectors together, but squares of large or small ones over- and
        # underflow: the greatest value is a constant, so no gradient is lost
        vectors = [maps.flatten(1) for maps in (student, teacher)]
        vectors = [q / q.detach().abs().amax().clamp(min=1e-30) for q in vectors]
        of_student, of_teacher = (l2_normalize(q @ q.T) for q in vectors)
        return F.mse_loss(of_student, of_teacher)


class PairwiseAffinity(DistillationLoss):
    """Squared difference of the affinities between positions: the pair-wise term of SKD (Liu 2019, arXiv 1903.04197).

    Maps are averaged to a grid of N positions, in windows as even as the sizes allow (the authors' code takes their
    maximum). The affinity of two positions of an image is the cosine of their vectors; the loss is the mean of the
    squared difference over the N^2 pairs of every image. That code detaches the lengths of the vectors, here they are
    part of the gradient (which then differs by about half of its length).

    Args:
        scale: size of the grid relative to the maps, a half for the paper's nodes of 2 x 2 pixels (in the published
            code the same 0.5 is the size of a window relative to the map, which leaves 2 x 2 nodes in all).
        nodes: most positions of the grid, because cost grows with their square: longer axes are cut to one length,
            16 x 16 or 6 x 6 x 6 for 256.
    """

    name, label, family = "skd", "SKD pair-wise", "relation"
    reads, adapt = "features", "none"

    def __init__(self, scale: float = 0.5, nodes: int = 256):
        super().__init__()
        self.keep(Annotated[float, Range(above=0, high=1)], scale=scale)
        self.keep(Annotated[int, Range(2)], nodes=nodes)

    def compare(self, student, teacher, labels, kept, context):
        grid = _cut([ceil(n * self.scale) for n in student.shape[2:]], self.nodes)
        vectors = [l2_normalize(_pool(maps, grid, kept)).flatten(2) for maps in (student, teacher)]
        of_student, of_teacher = (z.transpose(1, 2) @ z for z in vectors)
        if kept is None:
            return F.mse_loss(of_student, of_teacher)
        nodes = _pooled(kept, grid)
        pairs = nodes[:, :, None] & nodes[:, None]
        return ((of_student - of_teacher).pow(2) * pairs).sum() / pairs.sum()


class IFVD(DistillationLoss):
    """Intra-class feature variation distillation (Wang 2020, ECCV, "Intra-class Feature Variation Distillation for
    Semantic Segmentation").

    The prototype of a class is the mean vector of its pixels in one image. The map of an image is the cosine of every
    pixel to the prototype of its own class; the loss is the mean squared difference of the two maps over all pixels.
    A class that an image lacks has no part in it; a class of one pixel, its own prototype, adds 0. The background is a
    class like the others. The published code weighs the term with 200.
    """

    name, label, family = "ifvd", "IFVD", "relation"
    needs_labels = True
    reads, adapt = "features", "none"

    def compare(self, student, teacher, labels, kept, context):
        members = _members(labels, base.classes_of(labels))
        of_student, of_teacher = (self._to_prototype(maps, members) for maps in (student, teacher))
        return base.mean_square(of_student, of_teacher, None if kept is None else kept.flatten(1))

    @staticmethod
    def _to_prototype(maps: Tensor, members: Tensor) -> Tensor:
        """Cosine [B, P] of every pixel to its class's mean."""
        vectors = maps.flatten(2)
        prototypes = l2_normalize(_class_means(vectors, members))
        # to every prototype, then the own one: cheaper than a map of prototypes, for classes are fewer than channels
        along = ((vectors.transpose(1, 2) @ prototypes) * members).sum(2)
        return along / vectors.norm(dim=1).clamp(min=1e-4)  # the bound of `l2_normalize`, without a map of unit vectors


class CrossImageRelation(DistillationLoss):
    """Cross-image relational distillation, CIRKD (Yang 2022, arXiv 2204.06986), in its three parts.

    With unit vectors, `relation(z; k_1..k_n) = softmax(z . k_j / t over j)` and
    `d = KL(relation of the teacher's z || relation of the student's z)`, a mean over z:

    - mini-batch: z are the positions of the maps, averaged to a small grid, and k those of one image, in the student's
      relation the student's own; mean over all ordered pairs of images, an image with itself among them;
    - pixel: z are pixels of the batch, and k pixels of the teacher that a memory keeps from earlier steps;
    - region: the same z, and k means of the teacher's unit vectors over a class in an image of earlier steps.

    `loss = weights . (mini-batch, pixel, region)`. Keys are drawn from a memory in equal number from each class in it
    (all of a class that has fewer). Pixels z are drawn in equal number from each class and image, where the paper takes
    all of them: so that cost does not grow with the maps, and a small organ counts as much as the background. After
    the loss, and only in training mode, the same pixels of the teacher and the batch's regions enter the memories, so
    that no batch is compared with itself. While the memories are empty only the first part counts.

    The memories are `pixel_bank` and `region_bank`: tell both which patients may enter with `allow_patients`. Where the
    weights of both parts are 0 the memories are not used, and labels and patients not needed.

    Args:
        temperature: t, divisor of the cosines.
        weights: of the mini-batch, the pixel and the region part.
        nodes: most positions of an image in the mini-batch part, because cost grows with the square of batch times
            nodes: longer axes are averaged to one length, 8 x 8 or 4 x 4 x 4 for 64.
        pixels: most pixels to draw from each class of an image.
        pixel_memory, region_memory: vectors that each memory keeps, of all classes together.
        pixel_keys, region_keys: most vectors to draw from each memory (at least one a class).
    """

    name, label, family = "cirkd", "CIRKD", "relation"
    reads, adapt = "features", "student"

    def __init__(
        self, temperature: float = 0.1, weights: Sequence[float] = (1.0, 0.1, 0.1), nodes: int = 64, pixels: int = 16,
        pixel_memory: int = 8192, region_memory: int = 2048, pixel_keys: int = 4096, region_keys: int = 1024,
    ):  # fmt: skip
        super().__init__()
        self.keep(Positive, temperature=temperature)
        self.keep(tuple[NotNegative, NotNegative, NotNegative], weights=weights)
        self.keep(AtLeastOne, nodes=nodes, pixels=pixels, pixel_keys=pixel_keys, region_keys=region_keys)
        self.pixel_bank, self.region_bank = MemoryBank(pixel_memory), MemoryBank(region_memory)

    def compare(self, student, teacher, labels, kept, context):
        loss = self.weights[0] * self._minibatch(student, teacher, kept)
        if not self.needs_labels:
            return loss
        patients = base.patients_of(context, student, "a memory") if self.training else None

        classes = base.classes_of(labels)
        flat = labels.flatten(1)
        own = torch.searchsorted(classes, flat.contiguous())
        groups = own + len(classes) * torch.arange(len(labels), device=labels.device)[:, None]
        groups = groups.flatten() if kept is None else groups[kept.flatten(1)]
        drawn = _draw(groups, self.pixels, context.generator)
        if kept is not None:
            drawn = kept.flatten().nonzero()[:, 0][drawn]
        of_student, of_teacher = (l2_normalize(base.vectors_at(maps, drawn)) for maps in (student, teacher))
        banks = ((self.pixel_bank, self.pixel_keys), (self.region_bank, self.region_keys))
        for weight, (bank, keys) in zip(self.weights[1:], banks, strict=True):
            if len(bank):
                vectors = _keys(bank, keys, context.generator).to(of_student).T / self.temperature
                loss = loss + weight * _divergence(of_student @ vectors, of_teacher @ vectors)

        if patients is not None:
            self.pixel_bank.push(of_teacher, labels.flatten()[drawn], patients[drawn // flat.shape[1]])
            self._push_regions(teacher, labels, classes, patients)
        return loss

    @property
    def needs_labels(self) -> bool:
        return any(self.weights[1:])

    def _minibatch(self, student: Tensor, teacher: Tensor, kept: Tensor | None) -> Tensor:
        grid = _cut(student.shape[2:], self.nodes)
        nodes = None if kept is None else _pooled(kept, grid)
        relations = []
        for maps in (student, teacher):
            pooled = l2_normalize(_pool(maps, grid, kept))
            z = pooled.flatten(2).transpose(1, 2).flatten(0, 1)  # [B * P, channels]
            relations.append((z @ z.T / self.temperature).unflatten(1, (len(maps), -1)))
        if nodes is None:
            return _divergence(*relations)
        # relations of the nodes that are left to those of each image
        relations = [r[nodes.flatten()].masked_fill(~nodes, torch.finfo(r.dtype).min) for r in relations]
        return _divergence(*relations)

    @torch.no_grad()
    def _push_regions(self, teacher: Tensor, labels: Tensor, classes: Tensor, patients: Tensor) -> None:
        members = _members(labels, classes)
        means = l2_normalize(_class_means(l2_normalize(teacher).flatten(2), members))
        means = means.transpose(1, 2)  # [B, classes, channels]
        image, label = members.any(1).nonzero(as_tuple=True)
        self.region_bank.push(means[image, label], classes[label], patients[image])


def _cut(size: Sequence[int], most: int) -> list[int]:
    """A grid of at most `most` positions: the longer axes of `size` cut to one length, the longest that fits."""
    length = max(c for c in range(1, max(size) + 1) if prod(min(n, c) for n in size) <= most)
    return [min(n, length) for n in size]


def _pool(maps: Tensor, grid: Sequence[int], kept: Tensor | None = None) -> Tensor:
    """Maps averaged to the grid: over kept positions alone, 0 where there is none."""
    pooled = getattr(F, f"adaptive_avg_pool{len(grid)}d")(maps, grid)
    if kept is not None:  # at other positions the maps are 0
        pooled = pooled / _pool(kept[:, None].to(pooled.dtype), grid).clamp(min=1e-12)
    return pooled


def _pooled(kept: Tensor, grid: Sequence[int]) -> Tensor:
    """Which positions of the grid hold a kept one, [B, P] bool."""
    return _pool(kept[:, None].float(), grid).flatten(1) > 0


def _members(labels: Tensor, classes: Tensor) -> Tensor:
    """Which of the classes each pixel is of, [B, P, classes] (bool), from labels BH[WD]."""
    return labels.flatten(1)[..., None] == classes


def _class_means(vectors: Tensor, members: Tensor) -> Tensor:
    """Means [B, channels, classes] of the vectors [B, channels, P] of a class in an image, 0 where it has none."""
    return vectors @ members.to(vectors.dtype) / members.sum(1, keepdim=True).clamp(min=1)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax over the last dimension, mean over the others."""
    return divergence(student.log_softmax(-1), teacher.log_softmax(-1), dim=-1).mean()


def _draw(groups: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    """Positions [k] in `groups` [n] (numbers from 0), at most `most` of each group: all of a smaller one."""
    counts = groups.bincount().cpu()
    taken = counts.clamp(max=most)
    # one draw from each of `taken` runs of near-equal length: distinct, and spread over the group
    edges = torch.arange(int(taken.max()) + 1) * counts[:, None] // taken.clamp(min=1)[:, None]
    offsets = torch.rand(len(counts), edges.shape[1] - 1, generator=generator, dtype=torch.float64) * edges.diff()
    places = (counts.cumsum(0) - counts)[:, None] + edges[:, :-1] + offsets.long()
    wanted = torch.arange(places.shape[1]) < taken[:, None]
    # as int32, which sorts four times as fast
    return groups.int().argsort(stable=True)[places[wanted].to(groups.device)]


def _keys(bank: MemoryBank, most: int, generator: torch.Generator | None) -> Tensor:
    """At most `most` vectors of the bank, in equal number from each class in it, at least one a class."""
    vectors, labels, _ = bank.entries()
    classes, groups = labels.unique(return_inverse=True)
    return vectors[_draw(groups, max(1, most // len(classes)), generator)]
