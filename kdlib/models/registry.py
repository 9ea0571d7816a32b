"""The networks of the study by name. Which of them are teachers and students says `kdlib.config`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from kdlib.config import TEACHERS, InputError, lookup
from kdlib.models.efficient import EfficientUNet
from kdlib.models.transunet import HEAD_DIM, TransformerBottleneck
from kdlib.models.unet import UNet

TEACHER_WIDTHS = (64, 128, 256, 512, 1024)


def scale_channels(channels: int, width: float, multiple: int) -> int:
    """`channels` times `width`, rounded to a multiple of `multiple` that is not 0."""
    return max(multiple, round(channels * width / multiple) * multiple)


def t1(spatial_dims: int, in_channels: int, out_channels: int, width: float) -> UNet:
    """The multi-task U-Net."""
    widths = [scale_channels(channels, width, 8) for channels in TEACHER_WIDTHS]
    return UNet(spatial_dims, in_channels, out_channels, widths, convs=2, reconstruct=True)


def t2(spatial_dims: int, in_channels: int, out_channels: int, width: float) -> UNet:
    """The multi-task TransUNet (Chen 2021, arXiv 2102.04306): T1 with a vision transformer at the bottleneck.

    Its tokens are the positions of the map at 1/16, 256 of them at 256 x 256. A 3 x 3 convolution maps them back to the
    bottleneck's width, as in the paper.
    """
    widths = [scale_channels(channels, width, 8) for channels in TEACHER_WIDTHS]
    hidden = scale_channels(768, width, HEAD_DIM)
    grid = {2: 16, 3: 8}[spatial_dims]  # the 1/16 map of 256 x 256 slices or of 128 x 128 x 128 volumes
    bottleneck = TransformerBottleneck(spatial_dims, *widths[-2:], hidden, layers=12, grid=grid)
    return UNet(spatial_dims, in_channels, out_channels, widths, convs=2, reconstruct=True, bottleneck=bottleneck)


# name -> builder(spatial_dims, in_channels, out_channels), for teachers also with width
MODELS: dict[str, Callable[..., nn.Module]] = {
    "T1": t1,
    "T2": t2,
    "S1": partial(UNet, widths=(16, 32, 64), convs=1, reconstruct=False),
    "S2": partial(UNet, widths=(32, 64, 128), convs=1, reconstruct=False),
    "E1": partial(EfficientUNet, widths=(16, 24, 32, 48, 72), blocks=(0, 1, 1, 2, 3)),
    # a quarter of E1's arithmetic, and four times as much
    "E1-quarter": partial(EfficientUNet, widths=(7, 12, 16, 24, 36), blocks=(0, 1, 1, 2, 3)),
    "E1-fourfold": partial(EfficientUNet, widths=(32, 56, 80, 112, 160), blocks=(0, 1, 1, 2, 3)),
    # E1's arithmetic (314 px) with kernel and depth traded; named after the receptive field, a side in pixels
    "E1-30px": partial(EfficientUNet, widths=(16, 28, 48), blocks=(0, 1, 2), kernel=3),
    "E1-102px": partial(EfficientUNet, widths=(16, 24, 32, 48), blocks=(0, 1, 1, 1), kernel=7),
    "E1-230px": partial(EfficientUNet, widths=(16, 24, 32, 48, 72), blocks=(0, 1, 2, 3, 4), kernel=3),
    # T1 as a student at a quarter of the thesis's channels, and pruned to E1's arithmetic
    "T1-quarter": partial(UNet, widths=(16, 32, 64, 128, 256), convs=2, reconstruct=False),
    "T1-pruned": partial(UNet, widths=(5, 9, 18, 36, 72), convs=2, reconstruct=False),
}


def build_model(
    name: str, spatial_dims: int = 2, in_channels: int = 3, classes: int = 1, width: float = 1.0
) -> nn.Module:
    """A network with fresh weights.

    Parameters in 2D with 3 channels and one class: T1 43,236,036 (31,043,521 without the reconstruction decoder),
    T2 121,801,668 (109,609,153), S1 57,297, S2 227,233.

    Args:
        name: a key of `MODELS`: "T1" (multi-task U-Net), "T2" (multi-task TransUNet), "S1" or "S2" (small U-Nets),
            "E1" (an efficient U-Net of S1's budget), or one of `kdlib.config.VARIANTS`.
        spatial_dims: 2 or 3.
        in_channels: channels of the images.
        classes: foreground classes; one gives one channel of logits, several give one more than that (0 background).
        width: factor on the teachers' channels, rounded to multiples of 8 (T2's tokens: 64); students keep theirs.

    Raises: InputError: for a name that does not exist, other dimensions, no class, no channel, or a width not above 0.
    """
    build = lookup("model", name, MODELS)
    if spatial_dims not in (2, 3):
        raise InputError(f"{spatial_dims} spatial dimensions: the models take 2 (slices) or 3 (volumes)")
    if classes < 1 or in_channels < 1:
        raise InputError(f"{classes} classes, {in_channels} input channels: a model needs at least one of each")
    if not width > 0:
        raise InputError(f"width {width}: it must be positive (1.0 is the thesis's size)")
    options = {"width": width} if name in TEACHERS else {}
    return build(spatial_dims, in_channels, 1 if classes == 1 else classes + 1, **options)
