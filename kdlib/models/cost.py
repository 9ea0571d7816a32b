"""What a network costs: its size, the arithmetic of one image, and how long a CPU takes for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

from kdlib.config import STUDENTS, TEACHERS
from kdlib.models.registry import build_model
from kdlib.models.unet import CHANNELS_LAST, UNet

SECONDS = 0.5  # that a network is timed for; a slower one runs once, after one pass to warm up


def cost(
    width: float, size: int, classes: int = 1, models: Sequence[str] = TEACHERS + STUDENTS, dims: int = 2
) -> pd.DataFrame:
    """What every network costs as this study trains it, and at the thesis's size (full width, 256 x 256, one class).

    Arithmetic and latency are those of inference: of one slice or patch, without the reconstruction decoder, whose
    output nobody reads then. Weights are fresh: they change neither.

    Args:
        width: of this study's teachers (`Profile.width`).
        size: side of its slices in pixels, or of its patches in voxels.
        classes: foreground classes it segments.
        models: names in `kdlib.models.MODELS` whose networks are U-Nets.
        dims: 2, or 3 of a study of volumes.

    Returns: a table with columns model, size ("study" or "thesis"), parameters (of the whole network),
        inference_parameters (without the reconstruction decoder), gflops (10^9 operations, two per multiply-add),
        latency_ms (median of one thread, batch of 1, float32, channels last).
    """
    rows = []
    for name in models:
        for scope, parts in (("study", (width, size, classes, dims)), ("thesis", (1.0, 256, 1, 2))):
            rows.append(dict(model=name, size=scope) | cost_of(name, *parts))
    return pd.DataFrame(rows)


def cost_of(name: str, width: float, size: int, classes: int, dims: int) -> dict[str, float]:
    """What one network costs: parameters, inference_parameters, gflops and latency_ms, as `cost` has them."""
    model, found = untimed(name, width, size, classes, dims)
    model = model.to(memory_format=CHANNELS_LAST[dims])
    shape = model.in_channels, *[size] * dims
    return found | dict(latency_ms=milliseconds(lambda image: model(image, reconstruct=False), shape))


def untimed(name: str, width: float, size: int, classes: int, dims: int = 2) -> tuple[UNet, dict[str, float]]:
    """A network with fresh weights, in eval mode, and what of `cost_of` needs no clock."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(name, dims, 3 if dims == 2 else 1, classes, width).eval()
    whole = count_parameters(model)
    spared = count_parameters(model.reconstruction) if model.reconstructs else 0
    found = dict(parameters=whole, inference_parameters=whole - spared)
    return model, found | dict(gflops=gflops(model, size, reconstruct=False))


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def gflops(model: UNet, size: int, reconstruct: bool = True) -> float:
    """10^9 floating-point operations (two per multiply-add) of the forward of one image; nothing is computed.

    Args:
        size: side of the image, the same in every dimension.
        reconstruct: whether the reconstruction decoder, if there is one, counts.
    """
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    image = torch.empty(1, model.in_channels, *[size] * model.spatial_dims, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, state, (image, reconstruct))
    return counter.get_total_flops() / 1e9


def receptive_field(model: UNet, size: int = 512) -> int:
    """Side, in pixels, of the square of the input that the middle pixel of a 2D network's output depends on.

    The reach of that pixel's gradient, in a copy whose convolutions average and whose pooling takes the mean, so that
    every path passes some of it. `size`, where the field is larger.

    Args:
        size: side of the image that it is measured in.
    """
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.fill_(1 / module.weight[0].numel())
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    model.pool = nn.AvgPool2d(2)
    image = torch.ones(1, model.in_channels, size, size, requires_grad=True)
    model(image, reconstruct=False).segmentation[0, :, size // 2, size // 2].sum().backward()
    reached = image.grad.abs().sum((0, 1)).nonzero()
    return int((reached.max(0).values - reached.min(0).values + 1).max())


def milliseconds(forward: Callable[[torch.Tensor], object], shape: Sequence[int]) -> float:
    """Median of one thread of the CPU that `forward` takes for one image.

    Args:
        forward: takes the image, channels last.
        shape: of the image: channels, then sides.
    """
    image = torch.ones(1, *shape).contiguous(memory_format=CHANNELS_LAST[len(shape) - 1])
    timer = benchmark.Timer("forward(image)", globals=dict(forward=forward, image=image), num_threads=1)
    with torch.inference_mode():
        return 1000 * float(np.median(timer.blocked_autorange(min_run_time=SECONDS).times))
