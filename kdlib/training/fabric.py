"""Several processes that train one run together, each on its GPU, by Lightning Fabric.

Each process passes its part of a batch through the networks. What they give is gathered, and every loss is taken of the
whole batch in every process: no loss of this study is a sum over images (Dice of the batch, keys of a contrast, class
means, memories), and so one code serves any number of processes. All random numbers depend on seed and step alone, so
that each process draws the same ones.

Gradients: `gather` passes back the sum over the processes, which is the gradient of the whole times their number, and
`average_gradients` takes the mean. Projectors see the whole batch in every process: the mean is their gradient.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # a training on one device does not wait for its import
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Processes:
    """The processes that train together; without a Fabric this one is alone, and nothing here changes anything."""

    fabric: Fabric | None = None

    @property
    def size(self) -> int:
        return self.fabric.world_size if self.fabric is not None else 1

    @property
    def rank(self) -> int:
        """Number of this one; process 0 writes files and prints."""
        return self.fabric.global_rank if self.fabric is not None else 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of the whole batch [B, ...]: runs of B / size images, in the order of the processes."""
        part = len(batch) // self.size
        return batch[part * self.rank :][:part]

    def gather(self, maps: Tensor | None) -> Tensor | None:
        """The whole batch, BNH[WD], of the parts that the processes have of it; differentiable. None stays None."""
        if self.size == 1 or maps is None:
            return maps
        last = maps.movedim(1, -1).contiguous()  # channels last, which costs nothing where they are
        gathered = self.fabric.all_gather(last, sync_grads=True)
        if gathered.requires_grad:  # gloo sends a gradient as it lies in memory, whatever its strides say
            gathered.register_hook(torch.Tensor.contiguous)
        return gathered.flatten(0, 1).movedim(-1, 1)

    def average(self, values: Tensor) -> Tensor:
        """The mean over the processes, not differentiable."""
        return values if self.size == 1 else self.fabric.all_reduce(values, reduce_op="mean")

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces the gradients by their means over the processes."""
        if self.size > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            means = self.average(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view(gradient.shape))

    def highest(self, number: int) -> int:
        """The highest of the processes' numbers."""
        return number if self.size == 1 else int(self.fabric.all_gather(number).max())

    def broadcast(self, value: object) -> object:
        """Process 0's value of plain data, in every process; the others wait for it."""
        return value if self.size == 1 else self.fabric.broadcast(value)


ALONE = Processes()


def launch(function: Callable, processes: int, device: torch.device, *args: object) -> object:
    """Calls `function(Processes, *args)` in new processes, and returns what it gives in the first of them.

    Each takes a GPU of its own, or all the CPU. Function and arguments must be importable and picklable.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    # the first process may wait long for another training that holds a run's lock, and the others for it
    strategy = DDPStrategy(start_method="spawn", timeout=timedelta(days=7))
    fabric = Fabric(accelerator=device.type, devices=processes, strategy=strategy)
    return fabric.launch(_work, function, *args)


def _work(fabric: Fabric, function: Callable, *args: object) -> object:
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if fabric.global_rank else sys.stdout):
        return function(Processes(fabric), *args)
