"""The pass of frozen teachers over a batch: with folded batch norms, and kept where the same batches come again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdlib.training.device import autocast
from kdlib.training.fabric import ALONE, Processes
from kdlib.training.hooks import FeatureHooks

CONVOLUTIONS, NORMS = (nn.Conv2d, nn.Conv3d), (nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def teacher_forward(hooks: FeatureHooks, images: Tensor, processes: Processes = ALONE) -> dict[str, Tensor]:
    """A frozen network's features and logits of images."""
    with autocast(images.device, images.dim() - 2):
        output, features = hooks(processes.share(images), reconstruct=False)
    return {name: processes.gather(maps) for name, maps in (features | {"logits": output.segmentation}).items()}


def folded(model: nn.Module) -> nn.Module:
    """A copy of a network in eval mode with each batch norm folded into the convolution before it, where the two follow
    each other in an `nn.Sequential`: the same numbers to rounding, and one pass less over every map."""
    model = copy.deepcopy(model)
    for stage in model.modules():
        if isinstance(stage, nn.Sequential):
            for (first, conv), (second, norm) in pairwise(list(stage.named_children())):
                if isinstance(conv, CONVOLUTIONS) and isinstance(norm, NORMS):
                    setattr(stage, first, fuse_conv_bn_eval(conv, norm))
                    setattr(stage, second, nn.Identity())
    return model.requires_grad_(False)


class FrozenTeachers:
    """What teachers give for the batch of a step; with `replay`, kept in half precision for each of so many batches.

    Args:
        hooks: by teacher, on the layers that are read.
        replay: batches after which the same ones come again; None keeps nothing.
        processes: that share the pass.
    """

    def __init__(self, hooks: Mapping[str, FeatureHooks], replay: int | None = None, processes: Processes = ALONE):
        self.hooks, self.replay, self.processes = hooks, replay, processes
        self.kept: dict[int, dict[str, dict[str, Tensor]]] = {}

    def size(self, batch: int, shape: Sequence[int]) -> int:
        """Bytes of all that will be kept, for batches of so many images of this shape, C and HW or DHW."""
        one = 0
        for each in self.hooks.values():
            image = torch.zeros(1, *shape, device=next(each.model.parameters()).device)
            one += sum(maps.numel() for maps in teacher_forward(each, image).values())
        return 2 * (self.replay or 0) * batch * one  # two bytes each

    def __call__(self, images: Tensor, step: int) -> dict[str, dict[str, Tensor]]:
        if self.replay is None:
            return {name: teacher_forward(each, images, self.processes) for name, each in self.hooks.items()}
        place = step % self.replay
        if place not in self.kept:
            seen = {name: teacher_forward(each, images, self.processes) for name, each in self.hooks.items()}
            self.kept[place] = {who: {name: maps.half() for name, maps in found.items()} for who, found in seen.items()}
        # rounded at the first time, too: a training that resumes sees the same
        return {who: {name: maps.float() for name, maps in found.items()} for who, found in self.kept[place].items()}
