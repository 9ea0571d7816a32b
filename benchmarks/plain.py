"""The plain way of a training step, written from the thesis's description: what `training.py` measures kdlib against.

The networks are kdlib's own, so that both ways can start from the same weights. All else is written out as one would
from the text of the thesis (arXiv 2406.03173): the teacher computes both of its decoders, everything is float32 in
torch's default memory layout, features are brought to the student's grid and then projected, one student has the
teacher to itself, and each term is the formula of its paper over whole tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

READ = {"E-E": "encoder2", "B-B": "bottleneck", "D-D": "decoder1"}
WEIGHTS = {"segmentation": 0.4, "E-E": 0.1, "B-B": 0.2, "D-D": 0.1, "PMD": 0.2}
CHANNELS = 64  # that a contrast compares in


def info_nce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """One vector an image; the same image of the teacher is the positive, the batch's others are negatives."""
    student, teacher = (F.normalize(maps.flatten(1), eps=1e-4) for maps in (student, teacher))
    similarity = student @ teacher.T / temperature
    return F.cross_entropy(similarity, torch.arange(len(student), device=student.device))


def prediction_maps(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL of softened maps of background and foreground, mean over the pixels, times the squared temperature."""
    p, q = (torch.cat([-x, x], 1).div(temperature) for x in (student, teacher))
    p, q = F.logsigmoid(p), F.logsigmoid(q)
    return (q.exp() * (q - p)).sum(1).mean() * temperature**2


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft Dice loss of the foreground over the pixels of the batch."""
    p, truth = logits.sigmoid()[:, 0], (labels > 0).float()
    return 1 - (2 * (p * truth).sum() + 1e-5) / (p.sum() + truth.sum() + 1e-5)


class PlainStep:
    """One student's step on one teacher: `PlainStep(...)(images, labels)`.

    Args:
        teacher: frozen, in eval mode; `student`: in training mode. Both with `scales`, as kdlib's networks have.
        projections: of each feature term, the 1x1 convolutions of student and teacher.
        temperature: of the contrast.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, temperature: float,
        projections: Mapping[str, tuple[nn.Conv2d, nn.Conv2d]],
    ):  # fmt: skip
        self.teacher, self.student, self.temperature = teacher, student, temperature
        self.projections = {name: nn.ModuleList(pair) for name, pair in projections.items()}
        self.seen: dict[tuple[str, str], Tensor] = {}
        for who, model in (("teacher", teacher), ("student", student)):
            for term, scale in READ.items():
                model.get_submodule(model.scales[scale]).register_forward_hook(self._keep(who, term))
        parameters = [*student.parameters(), *(p for pair in self.projections.values() for p in pair.parameters())]
        self.optimiser = torch.optim.RMSprop(parameters, lr=1e-2)

    def _keep(self, who: str, term: str):
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            self.seen[who, term] = output

        return keep

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Every unweighted loss."""
        with torch.no_grad():
            taught = self.teacher(images, reconstruct=True).segmentation
        logits = self.student(images).segmentation
        found = {"segmentation": dice(logits, labels), "PMD": prediction_maps(logits, taught, 4.0)}
        for term in READ:
            student, teacher = self.seen["student", term], self.seen["teacher", term]
            if term == "E-E":  # at a quarter of the resolution: as the next stage pools it
                student, teacher = F.max_pool2d(student, 2), F.max_pool2d(teacher, 2)
            teacher = F.interpolate(teacher, size=student.shape[2:], mode="bilinear", align_corners=False)
            of_student, of_teacher = self.projections[term]
            found[term] = info_nce(of_student(student), of_teacher(teacher), self.temperature)
        return found

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        found = self.losses(images, labels)
        self.optimiser.zero_grad()
        sum(WEIGHTS[name] * value for name, value in found.items()).backward()
        self.optimiser.step()


def supervised_step(model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """A student's step alone."""
    optimiser.zero_grad()
    dice(model(images).segmentation, labels).backward()
    optimiser.step()
