"""The processes (ranks) that train one run together. In a process on its own, every function here changes nothing.

Each rank passes its part of a batch through the networks. What they give is gathered, and every loss is taken of the
whole batch on every rank: no loss of this study is a sum over images (Dice of the batch, keys of a contrast,
similarities of images, class means, memories), and so one code serves any number of ranks. All random numbers depend on
seed and step alone, so that each rank draws the same ones (a layer with dropout would draw alike for each part, which
no network of this study has).

Gradients: DDP takes the mean over ranks. A projector sees the whole batch on every rank, so the mean is its gradient. A
network sees its part alone, so `gather` passes gradients back times the number of ranks, and the mean is their sum.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from kdlib.config import InputError
from kdlib.training.device import pick_device

PATIENCE = timedelta(days=7)  # of ranks with one another: rank 0 may wait for another process; a death is seen at once


def size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this one; rank 0 writes files and speaks."""
    return dist.get_rank() if size() > 1 else 0


def asked() -> int:
    """Processes that `KDLIB_PROCESSES` wants for every study; 1 without it, and for a rank, which is one of them.

    Raises:
        InputError: it is no number above 0.
    """
    text = os.environ.get("KDLIB_PROCESSES", "1")
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"KDLIB_PROCESSES is {text!r}: give the number of processes that train together, or leave it")
    return 1 if dist.is_available() and dist.is_torchelastic_launched() else int(text)


@contextmanager
def joined(device: str = "auto") -> Iterator[torch.device]:
    """Device, seed and process group of a rank that torchrun started; yields the device.

    GPUs speak through NCCL, CPUs (and plain data) through gloo. Each rank takes the GPU of its own number.

    Raises:
        InputError: this is no process of torchrun, or there is no GPU for each rank.
    """
    if not dist.is_torchelastic_launched():
        raise InputError("this process belongs to no group: start it by torchrun")
    place = pick_device(device)
    if place.type == "cuda":
        place = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(place)
    # laid out in memory as it likes, a gradient of a 1x1 convolution is as good
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    torch.manual_seed(0)  # nothing should draw from torch's own stream; what does, draws alike
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
        yield place
    dist.destroy_process_group()  # not after an error: it would wait for the others


def check_batch(batch: int, processes: int) -> None:
    """Raises InputError where a batch cannot be dealt to the processes in equal parts."""
    if batch % processes:
        fitting = [str(n) for n in range(2, batch + 1) if batch % n == 0]
        raise InputError(
            f"a batch of {batch} images cannot be divided by {processes} processes: take {', '.join(fitting)} processes"
        )


# ------------------------------------------------------------------------------------------------------- the batch


def share(batch: Tensor) -> Tensor:
    """This rank's part of the whole batch [B, ...]: the ranks' parts are runs of B / ranks, in their order."""
    check_batch(len(batch), size())
    part = len(batch) // size()
    return batch[part * rank() :][:part]


def gather(maps: Tensor | None) -> Tensor | None:
    """The whole batch, BNH[WD], of the parts that the ranks have of it; differentiable. None stays None."""
    return maps if size() == 1 or maps is None else _Gather.apply(maps)


class _Gather(torch.autograd.Function):
    """Every rank takes the same loss of the whole, so none needs another's gradient; for the factor see above."""

    @staticmethod
    def forward(ctx, maps: Tensor) -> Tensor:
        last = maps.movedim(1, -1).contiguous()  # channels last, which costs nothing where they are
        parts = [torch.empty_like(last) for _ in range(size())]
        dist.all_gather(parts, last)
        return torch.cat(parts).movedim(-1, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return share(gradient) * size()


def mean(values: Tensor) -> Tensor:
    """The mean over the ranks, not differentiable: of gradients that DDP has not seen."""
    if size() > 1:
        dist.all_reduce(values)
        values /= size()
    return values


def wrap(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over the ranks."""
    if size() == 1:
        return module
    with warnings.catch_warnings():  # torch 2.13 has another name for an argument, and 2.11 only this one
        warnings.simplefilter("ignore", FutureWarning)
        # buffers are alike on every rank, and a memory's change their shape; a network may have a part without a loss
        return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)


class _Sum(torch.autograd.Function):
    """The sum over the ranks, each of which goes on with it."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return total(values.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return total(gradient.clone())


class WholeBatchNorm(_BatchNorm):
    """Batch norm over the images of all ranks, for CPUs, which torch's SyncBatchNorm does not serve."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, -1)
        axes = tuple(range(values.dim() - 1))
        # the squares of differences, and not of values, which would lose digits
        average = _Sum.apply(values.mean(axes)) / size()
        variance = _Sum.apply((values - average).square().mean(axes)) / size()
        with torch.no_grad():
            count = values[..., 0].numel() * size()
            self.num_batches_tracked += 1
            momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(average, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
        values = (values - average) * (variance + self.eps).rsqrt()
        if self.affine:
            values = values * self.weight + self.bias
        return values.movedim(-1, 1).to(x.dtype)


def norms_of_whole_batches(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with every batch norm over the images of all ranks; names and values stay."""
    if size() == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, norm in [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]:
        other = WholeBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine)
        other.load_state_dict(norm.state_dict())
        model.set_submodule(name, other)
    return model


# ------------------------------------------------------------------------------------------------ cases and decisions


def deal(cases: Sequence) -> Sequence:
    """The cases that this rank evaluates; each falls to one rank."""
    return cases[rank() :: size()]


def total(counts: Tensor) -> Tensor:
    """The sum over the ranks."""
    if size() > 1:
        dist.all_reduce(counts)
    return counts


def highest(number: int) -> int:
    """The highest of the ranks' numbers."""
    if size() == 1:
        return number
    told = torch.tensor(number)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def collect(own: list) -> list:
    """What all ranks found of the cases that were dealt to them, in the order of the cases before they were dealt.

    Args:
        own: plain data, an entry a case.
    """
    if size() == 1:
        return own
    parts = [None] * size()
    dist.all_gather_object(parts, own)
    whole = [None] * sum(map(len, parts))
    for number, part in enumerate(parts):
        whole[number :: size()] = part
    return whole


def agree(value: object) -> object:
    """Rank 0's value of plain data, on every rank; the others wait for it."""
    if size() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told)
    return told[0]


@contextmanager
def one_after_another() -> Iterator[None]:
    """Rank 0 does what is within before the others do, who find its files."""
    if rank():
        agree(None)
    yield
    if not rank():
        agree(None)
