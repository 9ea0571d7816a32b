"""The pass of frozen teachers over a batch: with folded batch norms, and kept where the same batches come again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdlib.config import Recipe
from kdlib.training.device import autocast
from kdlib.training.fabric import ALONE, Processes
from kdlib.training.hooks import FeatureHooks, scales_of


@torch.no_grad()
def teacher_forward(hooks: FeatureHooks, images: Tensor, processes: Processes = ALONE) -> dict[str, Tensor]:
    """A frozen network's features and logits of images."""
    with autocast(images.device, images.dim() - 2):
        output, features = hooks(processes.share(images), reconstruct=False)
    return {name: processes.gather(maps) for name, maps in (features | {"logits": output.segmentation}).items()}


def folded(model: nn.Module) -> nn.Module:
    """A copy of a network in eval mode with each batch norm folded into the convolution before it, where the two follow
    each other in an `nn.Sequential` and no scale is read between them: the same numbers to rounding, and one pass less
    over every map."""
    model = copy.deepcopy(model)
    read = [model.get_submodule(path) for path in model.scales.values()]
    for stage in model.modules():
        if isinstance(stage, nn.Sequential):
            for (first, conv), (second, norm) in pairwise(list(stage.named_children())):
                pair = isinstance(conv, nn.Conv2d | nn.Conv3d) and isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d)
                if pair and all(conv is not layer for layer in read):
                    setattr(stage, first, fuse_conv_bn_eval(conv, norm))
                    setattr(stage, second, nn.Identity())
    return model.requires_grad_(False)


class FrozenTeachers:
    """What teachers give for the batch of a step; with `replay`, kept in half precision for each of so many batches.

    Args:
        teachers: by name, frozen, in eval mode.
        recipes: that say which of their layers are read.
        replay: batches after which the same ones come again; None keeps nothing.
        processes: that share the pass.
    """

    def __init__(
        self, teachers: Mapping[str, nn.Module], recipes: Iterable[Recipe], replay: int | None = None,
        processes: Processes = ALONE,
    ):  # fmt: skip
        layers = scales_of(recipes, "teacher")
        self.hooks = {name: FeatureHooks(teacher, layers) for name, teacher in teachers.items()}
        self.replay, self.processes = replay, processes
        self.kept: dict[int, dict[str, dict[str, Tensor]]] = {}

    def __call__(self, images: Tensor, step: int) -> dict[str, dict[str, Tensor]]:
        place = step % self.replay if self.replay else None
        if place not in self.kept:
            seen = {name: teacher_forward(each, images, self.processes) for name, each in self.hooks.items()}
            if place is None:
                return seen
            self.kept[place] = {who: {name: maps.half() for name, maps in found.items()} for who, found in seen.items()}
        # rounded at the first time, too: a training that resumes sees the same
        return {who: {name: maps.float() for name, maps in found.items()} for who, found in self.kept[place].items()}
