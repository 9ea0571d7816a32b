"""Augmentation of a batch of slices on the device they are on, the same draws on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

ROTATION = 15.0  # degrees to either side
SCALE = (0.85, 1.15)
SHIFT = 0.06  # of the size, to either side
GAMMA = (0.8, 1.25)
CONTRAST = (0.8, 1.2)  # about mid-grey
BRIGHTNESS = 0.1  # to either side
NOISE = 0.04  # largest standard deviation


def augment(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random affine for image and label, then random gamma, contrast, brightness and noise for each image.

    Never mirrored: the spleen is on the left, the liver on the right. The noise of an image is the same in all its
    channels, so that a slice repeated three times stays that.

    Args:
        images: [B,C,H,W] float in 0..1, square.
        labels: [B,H,W] of an integer type.
        generator: on the CPU, whatever the images' device: every random number is drawn from it.

    Returns: (images, labels) of the same shapes and types; what the affine brings in from outside is 0 in both.
    """

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(len(images), generator=generator)).to(images)

    angle, scale = uniform(-ROTATION, ROTATION), uniform(*SCALE)
    shift = torch.stack([uniform(-SHIFT, SHIFT), uniform(-SHIFT, SHIFT)], 1)
    images, labels = warp(images, labels, angle, scale, shift)
    gamma, contrast, brightness = uniform(*GAMMA), uniform(*CONTRAST), uniform(-BRIGHTNESS, BRIGHTNESS)
    noise = torch.randn(len(images), 1, *images.shape[2:], generator=generator).to(images)
    return adjust(images, gamma, contrast, brightness, uniform(0, NOISE).view(-1, 1, 1, 1) * noise), labels


def warp(images: Tensor, labels: Tensor, angle: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate, scale and shift about the centre: images bilinear, labels nearest.

    Args:
        images, labels: as in `augment`.
        angle: [B] degrees, clockwise as the slice is displayed.
        scale: [B] factor, above 1 makes the content larger.
        shift: [B,2] of the content to the right and down, as part of the size.
    """
    # written out rather than affine_grid, whose matrix product would lose pixels to TF32 or autocast
    cos, sin = (f(angle * (math.pi / 180))[:, None, None] / scale[:, None, None] for f in (torch.cos, torch.sin))
    size = images.shape[-1]
    centre = (2 * torch.arange(size, device=images.device) + 1).to(images) / size - 1  # grid_sample's coordinates
    column = centre - 2 * shift[:, 0, None, None]
    row = centre[:, None] - 2 * shift[:, 1, None, None]
    grid = torch.stack([cos * column + sin * row, cos * row - sin * column], 3)  # where each pixel comes from
    moved = functional.grid_sample(images, grid, "bilinear", "zeros", align_corners=False)
    mask = functional.grid_sample(labels[:, None].to(images), grid, "nearest", "zeros", align_corners=False)
    return moved, mask[:, 0].to(labels.dtype)


def adjust(images: Tensor, gamma: Tensor, contrast: Tensor, brightness: Tensor, noise: Tensor) -> Tensor:
    """Intensities `(x^gamma - 1/2) * contrast + 1/2 + brightness + noise`, kept in 0..1.

    Args:
        images: [B,C,H,W] in 0..1.
        gamma, contrast, brightness: [B].
        noise: broadcast over `images`.
    """
    gamma, contrast, brightness = (value.view(-1, 1, 1, 1) for value in (gamma, contrast, brightness))
    # rounding of the bilinear weights can leave 0..1 by an ulp, and a negative number to a power is NaN
    return ((images.clamp(0, 1) ** gamma - 0.5) * contrast + 0.5 + brightness + noise).clamp(0, 1)
