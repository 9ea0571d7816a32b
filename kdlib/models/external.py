"""A network from elsewhere as student or teacher."""

from __future__ import annotations

import torch
from torch import nn

from kdlib.models.unet import Output
from kdlib.strict import InputError


class ExternalModel(nn.Module):
    """A network from elsewhere, unchanged: its output becomes `Output`, its layers get the names of scales.

    Put a builder into `MODELS` and its name into a `Run`, as student or as teacher:

        MODELS["SegResNet"] = lambda spatial_dims, in_channels, out_channels: ExternalModel(
            SegResNet(spatial_dims, 8, in_channels, out_channels),
            {"encoder2": "down_layers.1", "bottleneck": "down_layers.3", "decoder1": "up_layers.2"},
        )

    Args:
        network: takes images BNH[WD], returns logits of the same grid.
        scales: scale name -> path of the layer in the network (see `torch.nn.Module.named_modules`).

    Raises: InputError: at a pass, a network that returns anything but a tensor.
    """

    def __init__(self, network: nn.Module, scales: dict[str, str]):
        super().__init__()
        self.network = network
        self.scales = {name: f"network.{path}" for name, path in scales.items()}

    def forward(self, images: torch.Tensor, reconstruct: bool = False) -> Output:
        logits = self.network(images)
        if not isinstance(logits, torch.Tensor):
            given = f"{type(self.network).__name__} returns a {type(logits).__name__}"
            raise InputError(f"{given}: let it return its logits alone (no deep supervision)")
        return Output(logits, None)
