"""Augmentation of a batch of slices or patches on the device they are on, the same draws on every device."""

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
PLANES = {2: ((0, 1),), 3: ((0, 1), (0, 2), (1, 2))}  # that an image is rotated in, one after the other; 0 is columns


def augment(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random affine for image and label, then random gamma, contrast, brightness and noise for each image.

    Never mirrored: the spleen is on the left, the liver on the right. The noise of an image is the same in all its
    channels, so that a slice repeated three times stays that. A patch is rotated about each of its three axes.

    Args:
        images: [B,C,H,W] or [B,C,D,H,W] float in 0..1, all sides alike.
        labels: [B,H,W] or [B,D,H,W] of an integer type.
        generator: on the CPU, whatever the images' device: every random number is drawn from it.

    Returns: (images, labels) of the same shapes and types; what the affine brings in from outside is 0 in both.
    """

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(len(images), generator=generator)).to(images)

    dims = labels.dim() - 1
    angle, scale = torch.stack([uniform(-ROTATION, ROTATION) for _ in PLANES[dims]], 1), uniform(*SCALE)
    shift = torch.stack([uniform(-SHIFT, SHIFT) for _ in range(dims)], 1)
    images, labels = warp(images, labels, angle, scale, shift)
    gamma, contrast, brightness = uniform(*GAMMA), uniform(*CONTRAST), uniform(-BRIGHTNESS, BRIGHTNESS)
    noise = torch.randn(len(images), 1, *images.shape[2:], generator=generator).to(images)
    return adjust(images, gamma, contrast, brightness, per_image(uniform(0, NOISE), images) * noise), labels


def warp(images: Tensor, labels: Tensor, angle: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate, scale and shift about the centre: images (bi/tri)linear, labels nearest.

    Args:
        images, labels: as in `augment`.
        angle: [B] or [B,1] degrees, clockwise as the slice is displayed; of patches [B,3], in each of `PLANES`.
        scale: [B] factor, above 1 makes the content larger.
        shift: [B,2] of the content to the right and down, as part of the size; of patches [B,3], also to higher slices.
    """
    # written out rather than affine_grid, whose matrix product would lose pixels to TF32 or autocast
    size, dims, angle = images.shape[-1], labels.dim() - 1, angle.view(len(images), -1)
    centre = (2 * torch.arange(size, device=images.device) + 1).to(images) / size - 1  # grid_sample's coordinates
    place = [  # where each pixel comes from: columns, rows, slices
        centre.view(-1, *[1] * axis) - 2 * per_image(shift[:, axis], labels) for axis in range(dims)
    ]
    place[2:] = [at / per_image(scale, labels) for at in place[2:]]
    for number, (first, second) in enumerate(PLANES[dims]):
        cos, sin = (per_image(f(angle[:, number] * (math.pi / 180)), labels) for f in (torch.cos, torch.sin))
        if number == 0:
            cos, sin = (side / per_image(scale, labels) for side in (cos, sin))
        a, b = place[first], place[second]
        place[first], place[second] = cos * a + sin * b, cos * b - sin * a
    grid = torch.stack(torch.broadcast_tensors(*place), -1)
    moved = functional.grid_sample(images, grid, "bilinear", "zeros", align_corners=False)
    mask = functional.grid_sample(labels[:, None].to(images), grid, "nearest", "zeros", align_corners=False)
    return moved, mask[:, 0].to(labels.dtype)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Values [B], one for each of the images or labels `like`, to be broadcast over these."""
    return values.view(-1, *[1] * (like.dim() - 1))


def adjust(images: Tensor, gamma: Tensor, contrast: Tensor, brightness: Tensor, noise: Tensor) -> Tensor:
    """Intensities `(x^gamma - 1/2) * contrast + 1/2 + brightness + noise`, kept in 0..1.

    Args:
        images: [B,C,H,W] or [B,C,D,H,W] in 0..1.
        gamma, contrast, brightness: [B].
        noise: broadcast over `images`.
    """
    gamma, contrast, brightness = (per_image(value, images) for value in (gamma, contrast, brightness))
    # rounding of the bilinear weights can leave 0..1 by an ulp, and a negative number to a power is NaN
    return ((images.clamp(0, 1) ** gamma - 0.5) * contrast + 0.5 + brightness + noise).clamp(0, 1)
