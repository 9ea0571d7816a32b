"""Structured pruning of a U-Net: the channels of smallest L1 norm are masked, then taken out.

Of each convolution as many output channels stay as the smaller network has (Li et al. 2017, arXiv 1608.08710). What is
left is that smaller network, with the weights of the larger one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import prune

from kdlib.config import InputError
from kdlib.models.unet import UNet


def layers(network: UNet) -> Iterator[tuple[str, str | None, list[str]]]:
    """The convolutions of the segmentation path in the order in which they run.

    Yields: path of a convolution, path of its batch norm (None without one), and the paths of the convolutions whose
        outputs, joined, are its input (none for the image).
    """
    below: list[str] = []
    skips = {}

    def stage(path: str, sources: list[str]) -> Iterator[tuple[str, str, list[str]]]:
        nonlocal below
        names = [name for name, _ in network.get_submodule(path).named_children() if name.startswith("conv")]
        for name in names:
            below = [f"{path}.{name}"]
            yield below[0], f"{path}.{name.replace('conv', 'norm')}", sources
            sources = below

    for level in network.encoder:
        yield from stage(f"encoder.{level}", below)
        skips[level] = below
    yield from stage("bottleneck", below)
    for level in network.segmentation.decoder:
        up = f"segmentation.up.{level}"
        yield up, None, below
        yield from stage(f"segmentation.decoder.{level}", [*skips[level], up])
    yield "segmentation.head", None, below


def _channels(network: UNet, path: str) -> int:
    return network.get_submodule(path).out_channels


def _output_axis(layer: nn.Module) -> int:
    """Dimension of the output channels in a convolution's weight."""
    return int(isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d))


def check_smaller(network: UNet, smaller: UNet, what: str) -> None:
    """Raises InputError where `smaller` is not `network` with fewer channels; `what` says in the message what is."""
    for path, _, _ in layers(smaller):
        have, wanted = _channels(network, path), _channels(smaller, path)
        if have < wanted:
            raise InputError(
                f"{what}: it keeps {wanted} channels of {path}, and the network that it is pruned from has {have}; "
                "choose a larger width of the teachers"
            )


def mask_channels(network: UNet, smaller: UNet) -> None:
    """Sets, in place, all but the channels of largest L1 norm to 0, with the bias and the batch norm of each; of every
    convolution as many stay as `smaller` has. The masks remain (`torch.nn.utils.prune`)."""
    for path, norm, _ in layers(network):
        layer, drop = network.get_submodule(path), _channels(network, path) - _channels(smaller, path)
        axis = _output_axis(layer)
        prune.ln_structured(layer, "weight", drop, n=1, dim=axis)
        kept = layer.weight_mask.movedim(axis, 0).flatten(1).amax(1)
        prune.custom_from_mask(layer, "bias", kept)
        for name in ("weight", "bias") if norm else ():
            prune.custom_from_mask(network.get_submodule(norm), name, kept)


@torch.no_grad()
def prune_into(network: UNet, smaller: UNet) -> UNet:
    """Gives `smaller` the weights of `network`'s channels of largest L1 norm, and returns it.

    It computes what `network` computes with the other channels masked (`mask_channels`). `network` is not changed.

    Args:
        network: trained; its reconstruction decoder is left out.
        smaller: the same U-Net with at most as many channels in each convolution.
    """
    masked = copy.deepcopy(network).to(next(smaller.parameters()).device)
    mask_channels(masked, smaller)
    kept: dict[str, torch.Tensor] = {}  # path of a convolution -> which of its output channels stay
    for path, norm, sources in layers(masked):
        source, target = masked.get_submodule(path), smaller.get_submodule(path)
        kept[path] = source.bias_mask.nonzero().flatten()
        weight = source.weight.index_select(_output_axis(source), kept[path])
        inputs, offset = [], 0
        for name in sources:
            inputs.append(kept[name] + offset)
            offset += _channels(masked, name)
        if inputs:
            weight = weight.index_select(1 - _output_axis(source), torch.cat(inputs))
        target.weight.copy_(weight)
        target.bias.copy_(source.bias[kept[path]])
        for name in ("weight", "bias", "running_mean", "running_var") if norm else ():
            own = getattr(masked.get_submodule(norm), name)
            getattr(smaller.get_submodule(norm), name).copy_(own[kept[path]])
    return smaller
