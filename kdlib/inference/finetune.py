"""Quantisation-aware distillation: a trained student learns on, from the same teacher, with int8's rounding in its way.

For students whose post-training quantisation costs too much (docs/deploy.md has what was measured). It is the study's
own training step: the same losses, batches and teacher, on a network whose convolutions round their weights and inputs
as int8 does. Gradients pass the rounding straight through (Jacob et al. 2018, arXiv 1712.05877). What comes out are
float32 weights, for `kdlib export --to openvino-int8`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import parametrize

from kdlib.config import Run, derive_seed
from kdlib.data import Bank
from kdlib.data.sampling import batch_indices
from kdlib.training.batch import load_batch
from kdlib.training.device import seeded_rng
from kdlib.training.frozen import FrozenTeachers
from kdlib.training.loop import training_step
from kdlib.training.schedule import optimiser_of
from kdlib.training.state import new_state

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class RoundedWeight(nn.Module):
    """A convolution's weight as int8 holds it: symmetric, with a scale per output channel."""

    def __init__(self, axis: int):
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        others = [dim for dim in range(weight.dim()) if dim != self.axis]
        scale = weight.detach().abs().amax(others).clamp(min=1e-12) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, self.axis, -127, 127)


@contextmanager
def rounded(network: nn.Module) -> Iterator[None]:
    """The network with int8's rounding of the weights and inputs of its convolutions; then as it was."""
    layers = [module for module in network.modules() if isinstance(module, CONVOLUTIONS)]
    handles = []
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", RoundedWeight(int(layer.transposed)))
        handles.append(layer.register_forward_pre_hook(_rounded_input(layer.weight.device)))
    try:
        yield
    finally:
        for layer, handle in zip(layers, handles, strict=True):
            handle.remove()
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def _rounded_input(device: torch.device) -> Callable:
    fake = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8).to(device)
    return lambda module, inputs: (fake(inputs[0].float()), *inputs[1:])


def finetune(
    run: Run,
    network: nn.Module,
    train: Bank,
    steps: int,
    teachers: Mapping[str, nn.Module] | None = None,
    projectors: Mapping[str, Tensor] | None = None,
    slowdown: float = 100.0,
) -> nn.Module:
    """A trained student after `steps` more steps of its own training, with int8's rounding.

    Args:
        run: that trained it; its recipe, batch, seed and optimiser are kept.
        network: the trained student; it is not changed.
        train: slices of the run's training subset, on the network's device.
        teachers: by name, frozen, in eval mode; of a distilled student those that it learned from.
        projectors: what its run keeps beside the weights (`projectors.safetensors`); None where it has no learned ones.
        slowdown: what the learning rate is divided by.

    Returns:
        the network, in eval mode, with float32 weights.
    """
    teachers, device = teachers or {}, next(network.parameters()).device
    state = new_state(run, len(train.classes), steps, device, teachers, train.patients)
    slow = dataclasses.replace(run.optimisation, lr=run.optimisation.lr / slowdown)
    learned = [parameter for group in state.optimiser.param_groups for parameter in group["params"]]
    state.optimiser, state.schedule = optimiser_of(slow, learned, steps)
    state.model.load_state_dict(network.state_dict())
    if projectors is not None:
        state.distiller.load_state_dict(projectors)
    taught, how = FrozenTeachers(teachers, [run.effective_recipe]), run.optimisation
    batches = batch_indices(train.holds_target.cpu(), how.batch, derive_seed(run.seed, "int8"), how.target_share)
    with rounded(state.model):
        for step in range(steps):
            batch = load_batch(train, next(batches).to(device), run.seed, step, taught)
            with seeded_rng(derive_seed(run.seed, "layers", step), device):
                training_step(state, batch)
    for each in [*taught.hooks.values(), state.hooks]:
        each.close()
    return state.model.eval()
