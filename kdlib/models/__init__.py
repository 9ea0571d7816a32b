"""The networks of the study, by name: teachers T1 and T2, students S1 and S2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdlib.config import TEACHERS, InputError, lookup
from kdlib.models.transunet import HEAD_DIM, transunet
from kdlib.models.unet import Output, UNet

__all__ = ["MODELS", "Output", "ExternalModel", "UNet", "build_model", "count_parameters", "gflops"]

_TEACHER_WIDTHS = (64, 128, 256, 512, 1024)


def _scaled(channels: int, width: float, multiple: int) -> int:
    return max(multiple, round(channels * width / multiple) * multiple)


def _t1(spatial_dims: int, in_channels: int, out_channels: int, width: float) -> UNet:
    widths = [_scaled(channels, width, 8) for channels in _TEACHER_WIDTHS]
    return UNet(spatial_dims, in_channels, out_channels, widths, convs=2, reconstruct=True)


def _t2(spatial_dims: int, in_channels: int, out_channels: int, width: float) -> UNet:
    widths = [_scaled(channels, width, 8) for channels in _TEACHER_WIDTHS]
    hidden = _scaled(768, width, HEAD_DIM)
    return transunet(spatial_dims, in_channels, out_channels, widths, convs=2, reconstruct=True, hidden=hidden)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "T1": _t1,
    "T2": _t2,
    "S1": partial(UNet, widths=(16, 32, 64), convs=1, reconstruct=False),
    "S2": partial(UNet, widths=(32, 64, 128), convs=1, reconstruct=False),
}


def build_model(
    name: str, spatial_dims: int = 2, in_channels: int = 3, classes: int = 1, width: float = 1.0
) -> nn.Module:
    """A network with fresh weights.

    Parameters in 2D with 3 channels and one class: T1 43,236,036 (31,043,521 without the reconstruction decoder),
    T2 121,801,668 (109,609,153), S1 57,297, S2 227,233.

    Args:
        name: "T1" (multi-task U-Net), "T2" (multi-task TransUNet), "S1" or "S2" (small U-Nets).
        spatial_dims: 2 or 3.
        in_channels: channels of the images.
        classes: foreground classes; one gives one channel of logits, several give one more than that (0 background).
        width: factor on the teachers' channels, rounded to multiples of 8 (T2's tokens: 64); students are never shrunk.

    Raises:
        InputError: for a name that does not exist, other dimensions, no class, no channel, or a width not above 0.
    """
    build = lookup("model", name, MODELS)
    if spatial_dims not in (2, 3):
        raise InputError(f"{spatial_dims} spatial dimensions: the models take 2 (slices) or 3 (volumes)")
    if classes < 1 or in_channels < 1:
        raise InputError(f"{classes} classes, {in_channels} input channels: a model needs at least one of each")
    if not width > 0:
        raise InputError(f"width {width}: it must be positive (1.0 is the thesis's size)")
    shrink = {"width": width} if name in TEACHERS else {}
    return build(spatial_dims, in_channels, 1 if classes == 1 else classes + 1, **shrink)


class ExternalModel(nn.Module):
    """A network from elsewhere, unchanged, as one of the study's: its output as `Output`, its layers named as scales.

    Put a builder into `MODELS` and its name into a `Run`, as student or as teacher:

        MODELS["SegResNet"] = lambda spatial_dims, in_channels, out_channels: ExternalModel(
            SegResNet(spatial_dims, 8, in_channels, out_channels),
            {"encoder2": "down_layers.1", "bottleneck": "down_layers.3", "decoder1": "up_layers.2"},
        )

    Args:
        network: takes images BNH[WD], returns logits of the same grid.
        scales: scale name -> path of the layer in the network (see `torch.nn.Module.named_modules`).
    """

    def __init__(self, network: nn.Module, scales: dict[str, str]):
        super().__init__()
        self.network = network
        self.scales = {name: f"network.{path}" for name, path in scales.items()}

    def forward(self, images: torch.Tensor, reconstruct: bool = False) -> Output:
        return Output(self.network(images), None)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def gflops(model: UNet, size: int, spatial_dims: int = 2, reconstruct: bool = True) -> float:
    """10^9 floating-point operations (two a multiply-add) of the forward of one image; nothing is computed.

    Args:
        size: side of the image, the same in every dimension.
        reconstruct: whether the reconstruction decoder, if there is one, counts.
    """
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    image = torch.empty(1, model.in_channels, *[size] * spatial_dims, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, state, (image, reconstruct))
    return counter.get_total_flops() / 1e9
