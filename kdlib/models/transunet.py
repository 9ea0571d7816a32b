"""The bottleneck of the TransUNet: a vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kdlib.models.unet import CONV, conv_stage

HEAD_DIM = 64  # of ViT-B: 768 channels in 12 heads


class TransformerBottleneck(nn.Module):
    """A vision transformer over the positions of a map (patch size 1), and a convolution back to a map.

    Pre-norm blocks as in ViT (Dosovitskiy 2021, arXiv 2010.11929). The position embedding is learned on a grid of
    `grid` positions a side and interpolated linearly to the grid of each input.

    Args:
        in_channels, out_channels: channels of the map before and after.
        hidden: channels of a token, a multiple of 64 (the head size); the feed-forward layers are four times as wide.
        layers: transformer blocks.
        grid: side of the position embedding's own grid.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, hidden: int, layers: int, grid: int):
        super().__init__()
        self.embed = CONV[spatial_dims](in_channels, hidden, 1)
        self.position = nn.Parameter(torch.empty(1, hidden, *[grid] * spatial_dims))
        nn.init.trunc_normal_(self.position, std=0.02)
        # not nn.TransformerEncoder: it copies one layer, so that all would start from the same weights
        # dropout 0: a run is the same whatever else draws random numbers
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        heads = hidden // HEAD_DIM
        blocks = [nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, **options) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(hidden)
        self.project = conv_stage(spatial_dims, hidden, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """BNH[WD] with `in_channels` -> BNH[WD] with `out_channels`, the same size."""
        grid = x.shape[2:]
        mode = "bilinear" if len(grid) == 2 else "trilinear"
        x = self.embed(x) + F.interpolate(self.position, size=grid, mode=mode, align_corners=False)
        tokens = self.norm(self.blocks(x.flatten(2).transpose(1, 2)))  # [B, positions, hidden]
        return self.project(tokens.transpose(1, 2).unflatten(2, grid))
