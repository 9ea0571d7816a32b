"""From features of two networks to maps that a loss can compare: projectors, pooling, resizing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.config import derive_seed
from kdlib.training.device import seeded_rng
from kdlib.training.hooks import split_scale

PROJECTION = 64  # channels that a contrast compares teacher and student in


def resize(features: Tensor, grid: Sequence[int]) -> Tensor:
    """`features` (BNH[WD]) on another grid: (bi/tri)linear to a finer one, means of areas to a coarser one."""
    if features.shape[2:] == tuple(grid):
        return features
    if all(new <= old for new, old in zip(grid, features.shape[2:], strict=True)):
        return F.interpolate(features, size=tuple(grid), mode="area")
    mode = {4: "bilinear", 5: "trilinear"}[features.ndim]
    return F.interpolate(features, size=tuple(grid), mode=mode, align_corners=False)


class Projector(nn.Module):
    """A 1x1 convolution: learned, frozen at its random weights (a control), or redrawn at every step (as published)."""

    def __init__(self, channels: int, out_channels: int, dims: int, kind: str):
        super().__init__()
        self.conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims](channels, out_channels, 1)
        self.conv.requires_grad_(kind == "learned")
        self.redrawn = kind == "redrawn"

    def forward(self, features: Tensor, seed: int) -> Tensor:
        if self.redrawn:
            with seeded_rng(seed), torch.no_grad():
                fresh = nn.Conv2d(self.conv.in_channels, self.conv.out_channels, 1)  # on the CPU: alike on any device
                self.conv.weight.copy_(fresh.weight.view_as(self.conv.weight))
                self.conv.bias.copy_(fresh.bias)
        return self.conv(features)


class Adapter(nn.Module):
    """Brings a student's and a teacher's features to the same channels and to the student's grid.

    The loss says which channels it needs (`adapt`): "both" sides projected to `PROJECTION`, the "student" projected to
    the teacher's (two learned sides of a regression would agree by shrinking to zero; FitNets, Romero 2015), or
    "none". A 1x1 projection commutes with resizing, so the teacher is projected on whichever grid is smaller.

    Args:
        adapt: "both", "student" or "none".
        student, teacher: [N, H, W (, D)] of a probe.
        scales: of student and teacher, e.g. "encoder2/2".
        kind: of the projectors: "learned", "frozen" or "redrawn".
    """

    def __init__(self, adapt: str, student: torch.Size, teacher: torch.Size, scales: tuple[str, str], kind: str):
        super().__init__()
        dims = len(student) - 1
        width = {"both": PROJECTION, "student": teacher[0], "none": None}[adapt]
        self.student = Projector(student[0], width, dims, kind) if width else None
        self.teacher = Projector(teacher[0], width, dims, kind) if adapt == "both" else None
        self.factors = [split_scale(scale)[1] for scale in scales]
        self.pool = {2: F.max_pool2d, 3: F.max_pool3d}[dims]
        self.description = self._describe(student, teacher, scales, kind)

    def forward(self, student: Tensor, teacher: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        student, teacher = (
            self.pool(features, factor) if factor > 1 else features
            for features, factor in zip((student, teacher), self.factors, strict=True)
        )
        grid = student.shape[2:]
        finer = teacher.shape[2:].numel() > grid.numel()
        if finer:
            teacher = resize(teacher, grid)
        if self.student is not None:
            student = self.student(student, derive_seed(seed, "student"))
        if self.teacher is not None:
            teacher = self.teacher(teacher, derive_seed(seed, "teacher"))
        return student, teacher if finer else resize(teacher, grid)

    def _describe(self, student: torch.Size, teacher: torch.Size, scales: tuple[str, str], kind: str) -> str:
        shapes, projectors, grids, texts = (student, teacher), (self.student, self.teacher), [], []
        sides = zip(("student", "teacher"), scales, shapes, self.factors, projectors, strict=True)
        for role, scale, shape, factor, projector in sides:
            grids.append([side // factor for side in shape[1:]])
            made = "" if projector is None else f", to {projector.conv.out_channels} by a {kind} 1x1 projection"
            texts.append(f"{role} {scale} {shape[0]} channels on {' x '.join(map(str, grids[-1]))}{made}")
        if grids[0] != grids[1]:
            finer = grids[1][0] > grids[0][0]
            texts[1] += f", {'averaged' if finer else 'interpolated'} to the student's grid"
            if self.teacher is not None:
                texts[1] += " before its projection" if finer else " after its projection"
        return "; ".join(texts)
