"""A U-Net for 2 and 3 spatial dimensions, with a segmentation decoder and maybe a reconstruction decoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from kdlib.config import InputError

# layers by the number of spatial dimensions
CONV, UPCONV = {2: nn.Conv2d, 3: nn.Conv3d}, {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM, POOL = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}, {2: nn.MaxPool2d, 3: nn.MaxPool3d}

# how maps lie in memory, what CPUs and GPUs convolve fastest
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Output(NamedTuple):
    """What every model returns.

    Args:
        segmentation: logits, BNH[WD]: one channel is the foreground (sigmoid), several are classes (softmax, 0 is
            background).
        reconstruction: the input image again, BNH[WD]; None where it was not asked for or there is no such decoder.
    """

    segmentation: torch.Tensor
    reconstruction: torch.Tensor | None


def conv_stage(spatial_dims: int, in_channels: int, out_channels: int, convs: int) -> nn.Sequential:
    """`convs` times 3x3 convolution (with bias), batch norm and ReLU; BNH[WD] keeps its size."""
    layers = OrderedDict()
    for i in range(1, convs + 1):
        channels = in_channels if i == 1 else out_channels
        layers[f"conv{i}"] = CONV[spatial_dims](channels, out_channels, 3, padding=1)
        layers[f"norm{i}"] = NORM[spatial_dims](out_channels)
        layers[f"relu{i}"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


class Decoder(nn.Module):
    """From the bottleneck back to full resolution: at each level upsample by 2, concatenate the skip, convolve.

    Args:
        widths: channels of the levels from full resolution down, the bottleneck last.
        out_channels: channels of the 1x1 head.
    """

    def __init__(self, spatial_dims: int, widths: Sequence[int], convs: int, out_channels: int):
        super().__init__()
        self.up, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        for i in range(len(widths) - 1, 0, -1):  # deepest level first, the order in which they run
            width = widths[i - 1]
            self.up[str(i)] = UPCONV[spatial_dims](widths[i], width, 2, stride=2)
            self.decoder[str(i)] = conv_stage(spatial_dims, 2 * width, width, convs)
        self.head = CONV[spatial_dims](widths[0], out_channels, 1)

    def forward(self, x: torch.Tensor, skips: Sequence[torch.Tensor]) -> torch.Tensor:
        for up, stage, skip in zip(self.up.values(), self.decoder.values(), reversed(skips), strict=True):
            x = stage(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


class UNet(nn.Module):
    """U-Net (Ronneberger 2015, arXiv 1505.04597) with batch norm, same-size convolutions and up to two decoders.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input, and of the reconstruction.
        out_channels: channels of the segmentation logits.
        widths: channels of the encoder stages from full resolution down, the bottleneck last.
        convs: convolutions per stage.
        reconstruct: whether there is a second decoder, fed by the same skips, that gives the input back.
        bottleneck: maps the pooled last encoder stage to `widths[-1]` channels of the same size; None is a stage like
            the others.

    Attributes:
        scales: name of a feature map -> path of the submodule whose output it is (for `get_submodule` and a forward
            hook): encoder1..n (1 is full resolution, each next one half of it), bottleneck, decoder1..n (of the
            segmentation decoder, 1 is full resolution) and logits.
        reconstructs: whether there is a reconstruction decoder.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, widths: Sequence[int], convs: int,
        reconstruct: bool, bottleneck: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        self.spatial_dims, self.in_channels, self.reconstructs = spatial_dims, in_channels, reconstruct
        self.depth = len(widths) - 1
        sides = enumerate(zip([in_channels, *widths], widths[:-1], strict=False), start=1)
        self.encoder = nn.ModuleDict({str(i): conv_stage(spatial_dims, *side, convs) for i, side in sides})
        self.pool = POOL[spatial_dims](2)
        if bottleneck is None:
            bottleneck = conv_stage(spatial_dims, widths[-2], widths[-1], convs)
        self.bottleneck = bottleneck
        self.segmentation = Decoder(spatial_dims, widths, convs, out_channels)
        if reconstruct:
            self.reconstruction = Decoder(spatial_dims, widths, convs, in_channels)

    @property
    def scales(self) -> dict[str, str]:
        """Name of a scale -> path of the layer that makes its features."""
        levels = range(1, self.depth + 1)
        return (
            {f"encoder{i}": f"encoder.{i}" for i in levels}
            | {"bottleneck": "bottleneck"}
            | {f"decoder{i}": f"segmentation.decoder.{i}" for i in levels}
            | {"logits": "segmentation.head"}
        )

    def forward(self, x: torch.Tensor, reconstruct: bool = True) -> Output:
        """
        Args:
            x: images, BNH[WD], each side a multiple of 2 to the number of encoder stages.
            reconstruct: False leaves the reconstruction decoder out (39 % of T1's arithmetic).

        Raises: InputError: where the dimensions, the channels or the size of `x` do not fit.
        """
        self._check(x)
        skips = []
        for stage in self.encoder.values():
            skips.append(stage(x))
            x = self.pool(skips[-1])
        x = self.bottleneck(x)
        return Output(
            self.segmentation(x, skips),
            self.reconstruction(x, skips) if reconstruct and self.reconstructs else None,
        )

    def _check(self, x: torch.Tensor) -> None:
        shape, multiple = tuple(x.shape), 2**self.depth
        if len(shape) != self.spatial_dims + 2 or shape[1] != self.in_channels:
            expected = f"[batch, {self.in_channels}, {', '.join(['height', 'width', 'depth'][: self.spatial_dims])}]"
            raise InputError(f"input of shape {list(shape)}: this model takes {expected}")
        if any(side < multiple or side % multiple for side in shape[2:]):
            size = " x ".join(map(str, shape[2:]))
            why = f"the model halves it {self.depth} times, so each side must be a multiple of {multiple}"
            raise InputError(f"input of size {size}: {why}")
        if self.training and shape[0] == 1 and all(side == multiple for side in shape[2:]):
            why = "batch norm in training needs more than one value at the bottleneck"
            raise InputError(f"one image of side {multiple}: {why}; use a larger batch or larger images")
