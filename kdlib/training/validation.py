"""What a training knows of itself on slices that it does not learn from: Dice of volumes, in the slice grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdlib.data import Bank, VolumeBank
from kdlib.losses import predict
from kdlib.models import CHANNELS_LAST
from kdlib.training.device import autocast


@contextmanager
def inference(model: nn.Module, dimensions: int) -> Iterator[torch.device]:
    """Eval mode without gradients, in the precision that slices (2 dimensions) or volumes (3) train in; the mode
    before comes back. Yields the device."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dimensions):
            yield device
    finally:
        model.train(training)


def slice_logits(
    model: nn.Module, bank: Bank, device: torch.device, batch: int = 32
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits [B,C,H,W] float32, labels [B,H,W] and case numbers [B] of all slices in their order, on `device`; volumes
    come one after the other, each by `volume_logits`."""

    def run(images: Tensor) -> Tensor:
        images = images.to(device, memory_format=CHANNELS_LAST[images.dim() - 2])
        return model(images, reconstruct=False).segmentation.float()

    if isinstance(bank, VolumeBank):
        for number, (image, labels) in enumerate(zip(bank.images, bank.labels, strict=True)):
            logits = volume_logits(run, image.to(device), bank.size, batch)
            yield logits, labels.to(device), torch.full((len(image),), number, device=device)
        return
    slices = torch.arange(len(bank), device=bank.images.device)
    for index in slices.split(batch) if len(slices) else ():
        images, labels = bank.batch(index)
        yield run(images), labels.to(device), bank.case_index[index].to(device)


def volume_logits(network: Callable[[Tensor], Tensor], image: Tensor, size: int, batch: int = 32) -> Tensor:
    """Logits of a volume, slice by slice, [D,C,H,W] float32: MONAI's sliding window, half of it overlapping.

    Where windows overlap, their logits are averaged with a Gaussian weight that falls off from each window's centre.

    Args:
        network: images [B,1,S,S,S] in 0..1 -> logits [B,C,S,S,S] float32.
        image: [D,H,W] uint8, no axis shorter than a window.
        size: side of the window.
        batch: slices that pass a network at once; of windows an eighth of it.
    """
    from monai.inferers import sliding_window_inference  # seconds that only volumes need

    volume, windows = image[None, None].float() / 255, max(1, batch // 8)
    return sliding_window_inference(volume, (size,) * 3, windows, network, 0.5, "gaussian")[0].transpose(0, 1)


def volume_dice(model: nn.Module, bank: Bank, batch: int = 32, threshold: float = 0.5, pooled: bool = False) -> float:
    """Dice of every volume and class in the slice grid, then their mean; 1 where prediction and truth are empty.

    Args:
        threshold: probability above which a pixel of a one-channel model is foreground.
        pooled: take the pixels of all volumes together, as the published study did, so that large organs decide.
    """
    with inference(model, bank.dims) as device:
        # of every class and volume: both masks, prediction, truth
        volumes = torch.zeros(len(bank.classes), 3, len(bank.cases), dtype=torch.int64, device=device)
        for logits, labels, cases in slice_logits(model, bank, device, batch):
            guess = predict(logits, threshold)
            masks = [(guess == value, labels == value) for value in range(1, len(bank.classes) + 1)]
            sums = [torch.stack([(p & t).sum((1, 2)), p.sum((1, 2)), t.sum((1, 2))]) for p, t in masks]
            volumes.index_add_(2, cases, torch.stack(sums))
    if pooled:
        volumes = volumes.sum(2, keepdim=True)
    both, predicted, true = volumes.double().unbind(1)
    return float(torch.where(predicted + true > 0, 2 * both / (predicted + true), 1.0).mean())
