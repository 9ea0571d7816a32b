"""E1: a student of S1's budget that sees the whole slice. docs/efficient_student.md says what was tried."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kdlib.models.unet import CONV, NORM, POOL, UNet


class SeparableBlock(nn.Module):
    """Depthwise convolution, batch norm, 1x1 convolution, batch norm, and the input added; BNH[WD] keeps its size.

    The depthwise-separable convolution of MobileNet (Howard 2017, arXiv 1704.04861): a wide kernel costs only its own
    weights per channel.
    """

    def __init__(self, spatial_dims: int, channels: int, kernel: int):
        super().__init__()
        conv, norm = CONV[spatial_dims], NORM[spatial_dims]
        self.depthwise = conv(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.norm1 = norm(channels)
        self.pointwise = conv(channels, channels, 1, bias=False)
        self.norm2 = norm(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(x + self.norm2(self.pointwise(self.relu(self.norm1(self.depthwise(x))))))


def _widen(spatial_dims: int, in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """A convolution to other channels, batch norm and ReLU."""
    conv = CONV[spatial_dims](in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, NORM[spatial_dims](out_channels), nn.ReLU(inplace=True))


class EfficientDecoder(nn.Module):
    """From the bottleneck to full resolution: a 1x1 convolution to the level's channels, nearest upsampling, the
    encoder's features added, and a stage of 3x3 kernels."""

    def __init__(self, spatial_dims: int, widths: Sequence[int], out_channels: int, kernel: int):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.narrow, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        for i in range(len(widths) - 1, 0, -1):  # deepest level first, the order in which they run
            width = widths[i - 1]
            self.narrow[str(i)] = _widen(spatial_dims, widths[i], width, 1)
            # at full resolution a plain 3x3 convolution is as cheap as a separable block, which reads its maps twice
            self.decoder[str(i)] = (
                SeparableBlock(spatial_dims, width, kernel) if i > 1 else _widen(spatial_dims, width, width, kernel)
            )
        self.head = CONV[spatial_dims](widths[0], out_channels, 1)

    def forward(self, x: torch.Tensor, skips: Sequence[torch.Tensor]) -> torch.Tensor:
        for narrow, stage, skip in zip(self.narrow.values(), self.decoder.values(), reversed(skips), strict=True):
            x = stage(self.up(narrow(x)) + skip)
        return self.head(x)


class EfficientUNet(UNet):
    """A deep, thin U-Net of depthwise-separable stages: a wide receptive field at little cost.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the segmentation logits.
        widths: channels of the encoder stages from full resolution down, the bottleneck last.
        blocks: separable blocks of each stage, the bottleneck last.
        kernel: side of the depthwise kernels of the encoder; the decoder's are 3.

    Attributes:
        scales, reconstructs: as of `UNet`.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, widths: Sequence[int], blocks: Sequence[int],
        kernel: int = 5,
    ):  # fmt: skip
        nn.Module.__init__(self)
        self.spatial_dims, self.in_channels, self.reconstructs = spatial_dims, in_channels, False
        self.depth = len(widths) - 1
        stages = []
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            entry = _widen(spatial_dims, widths[i - 1] if i else in_channels, width, 1 if i else 3)
            stages.append(nn.Sequential(entry, *(SeparableBlock(spatial_dims, width, kernel) for _ in range(count))))
        self.encoder = nn.ModuleDict({str(i): stage for i, stage in enumerate(stages[:-1], start=1)})
        self.pool = POOL[spatial_dims](2)
        self.bottleneck = stages[-1]
        self.segmentation = EfficientDecoder(spatial_dims, widths, out_channels, kernel=3)
