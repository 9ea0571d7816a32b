"""Which slices a training step sees."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kdlib.config import InputError, derive_seed


def passes(numbers: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless passes over `numbers` [n], each shuffled: yields single numbers."""
    while True:
        yield from numbers[torch.randperm(len(numbers), generator=generator)]


def batch_indices(
    holds_target: Tensor, batch: int, seed: int, target_share: float | None = None, labelled: Tensor | None = None
) -> Iterator[Tensor]:
    """Batches of slice indices without end, every batch full.

    Without a share and with labels everywhere, a batch is the next part of shuffled passes over all slices. With a
    share, `ceil(share * batch)` slices of each batch come from passes over the slices that hold target, the others from
    passes over the rest. Where only some slices are labelled, the first half of each batch is drawn so from them, the
    second half from plain passes over the others: which of those hold target may not be known.

    Args:
        holds_target: [slices] bool, whether a slice holds target.
        batch: slices per step.
        seed: the order depends on it alone.
        target_share: share of each batch's labelled slices that hold target; None draws slices at random.
        labelled: [slices] bool; None where all slices are labelled.

    Raises: InputError: no labelled slice holds target although a share of them is asked for.
    """
    known = torch.ones_like(holds_target) if labelled is None else labelled
    others = (~known).nonzero()[:, 0]
    count = batch if not len(others) else math.ceil(batch / 2)
    with_target, without = (known & holds_target).nonzero()[:, 0], (known & ~holds_target).nonzero()[:, 0]
    parts = [("order", known.nonzero()[:, 0], count)]
    if target_share is not None:
        if not len(with_target):
            raise InputError("no labelled slice holds target: give more label fraction, or another fold")
        wanted = count if not len(without) else math.ceil(target_share * count)
        parts = [("target", with_target, wanted), ("rest", without, count - wanted)]
    parts.append(("unlabelled", others, batch - count))
    seeds = {name: torch.Generator().manual_seed(derive_seed(seed, name)) for name, _, _ in parts}
    streams = [(passes(numbers, seeds[name]), size) for name, numbers, size in parts if size]
    while True:
        yield torch.stack([next(stream) for stream, size in streams for _ in range(size)])
