"""What a network costs: its size, the arithmetic of one image, and how long a CPU takes for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

from kdlib.config import STUDENTS, TEACHERS
from kdlib.models.registry import build_model
from kdlib.models.unet import UNet

SECONDS = 0.5  # that a network is timed for; a slower one runs once, after one pass to warm up


def cost(width: float, size: int, classes: int = 1, models: Sequence[str] = TEACHERS + STUDENTS) -> pd.DataFrame:
    """What every network costs as this study trains it, and at the thesis's size (full width, 256 x 256, one class).

    Arithmetic and latency are those of inference: of one slice, without the reconstruction decoder, whose output nobody
    reads then. Weights are fresh: they change neither.

    Args:
        width: of this study's teachers (`Profile.width`).
        size: side of its slices in pixels.
        classes: foreground classes it segments.
        models: names in `kdlib.models.MODELS` whose networks are U-Nets.

    Returns: a table with columns model, size ("study" or "thesis"), parameters (of the whole network),
        inference_parameters (without the reconstruction decoder), gflops (10^9 operations, two per multiply-add),
        latency_ms (median of one thread, batch of 1, float32, channels last) and threads.
    """
    rows = []
    for name in models:
        for scope, wide, side, number in (("study", width, size, classes), ("thesis", 1.0, 256, 1)):
            with torch.random.fork_rng(devices=[]):
                model = build_model(name, classes=number, width=wide).eval()
            whole = count_parameters(model)
            spared = count_parameters(model.reconstruction) if model.reconstructs else 0
            found = dict(parameters=whole, inference_parameters=whole - spared)
            found |= dict(gflops=gflops(model, side, reconstruct=False), latency_ms=latency(model, side), threads=1)
            rows.append(dict(model=name, size=scope) | found)
    return pd.DataFrame(rows)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def gflops(model: UNet, size: int, spatial_dims: int = 2, reconstruct: bool = True) -> float:
    """10^9 floating-point operations (two per multiply-add) of the forward of one image; nothing is computed.

    Args:
        size: side of the image, the same in every dimension.
        reconstruct: whether the reconstruction decoder, if there is one, counts.
    """
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    image = torch.empty(1, model.in_channels, *[size] * spatial_dims, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, state, (image, reconstruct))
    return counter.get_total_flops() / 1e9


def latency(model: nn.Module, size: int) -> float:
    """Median milliseconds of one thread of the CPU for one image of `size` x `size`, without the reconstruction."""
    model = model.to("cpu", memory_format=torch.channels_last)
    image = torch.ones(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    timer = benchmark.Timer("model(image, reconstruct=False)", globals=dict(model=model, image=image), num_threads=1)
    with torch.inference_mode():
        return 1000 * float(np.median(timer.blocked_autorange(min_run_time=SECONDS).times))
