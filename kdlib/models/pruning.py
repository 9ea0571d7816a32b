"""Structured pruning of a U-Net: the channels of smallest L1 norm are taken out.

Of each convolution as many output channels stay as the smaller network has (Li et al. 2017, arXiv 1608.08710). What is
left is that smaller network, with the weights of the larger one.
"""

from __future__ import annotations

import copy

import torch
from torch.nn.utils import prune

from kdlib.config import InputError
from kdlib.models.unet import UNet


def layers(network: UNet) -> list[tuple[str, str | None, list[str]]]:
    """The convolutions of the segmentation path in the order in which they run.

    Returns: path of a convolution, path of its batch norm (None without one), and the paths of the convolutions whose
        outputs, joined, are its input (none for the image).
    """
    found, below, skips = [], [], {}

    def stage(path: str, sources: list[str]) -> list[str]:
        for name, _ in network.get_submodule(path).named_children():
            if name.startswith("conv"):
                found.append((f"{path}.{name}", f"{path}.{name.replace('conv', 'norm')}", sources))
                sources = [f"{path}.{name}"]
        return sources

    for level in network.encoder:
        below = skips[level] = stage(f"encoder.{level}", below)
    below = stage("bottleneck", below)
    for level in network.segmentation.decoder:
        up = f"segmentation.up.{level}"
        found.append((up, None, below))
        below = stage(f"segmentation.decoder.{level}", [*skips[level], up])
    return [*found, ("segmentation.head", None, below)]


def check_smaller(network: UNet, smaller: UNet, what: str) -> None:
    """Raises InputError where `smaller` is not `network` with fewer channels; `what` says in the message what is."""
    for path, _, _ in layers(smaller):
        have, wanted = (each.get_submodule(path).out_channels for each in (network, smaller))
        if have < wanted:
            raise InputError(
                f"{what}: it keeps {wanted} channels of {path}, and the network that it is pruned from has {have}; "
                "choose a larger width of the teachers"
            )


@torch.no_grad()
def prune_into(network: UNet, smaller: UNet) -> UNet:
    """Gives `smaller` the weights of `network`'s channels of largest L1 norm, and returns it.

    It computes what `network` computes with the other channels set to 0, their biases and batch norms too. `network` is
    not changed.

    Args:
        network: trained; its reconstruction decoder is left out.
        smaller: the same U-Net with at most as many channels in each convolution.
    """
    masked = copy.deepcopy(network).to(next(smaller.parameters()).device)
    kept: dict[str, torch.Tensor] = {}  # path of a convolution -> whether each of its output channels stays
    for path, norm, sources in layers(masked):
        source, target = masked.get_submodule(path), smaller.get_submodule(path)
        axis = int(source.transposed)  # of the output channels in the weight
        prune.ln_structured(source, "weight", source.out_channels - target.out_channels, n=1, dim=axis)
        kept[path] = source.weight_mask.movedim(axis, 0).flatten(1).amax(1).bool()
        weight = source.weight.index_select(axis, kept[path].nonzero().flatten())
        if sources:
            inputs = torch.cat([kept[name] for name in sources]).nonzero().flatten()
            weight = weight.index_select(1 - axis, inputs)
        target.weight.copy_(weight)
        target.bias.copy_(source.bias[kept[path]])
        for name in ("weight", "bias", "running_mean", "running_var") if norm else ():
            own = getattr(masked.get_submodule(norm), name)
            getattr(smaller.get_submodule(norm), name).copy_(own[kept[path]])
    return smaller
