"""How similar features of a student and a teacher are, and features of the same pixels in several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.config import InputError
from kdlib.data.volumes import Bank
from kdlib.losses import SupervisedContrastiveLoss
from kdlib.models import CHANNELS_LAST
from kdlib.training.hooks import FeatureHooks
from kdlib.training.validation import inference


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same positions (Kornblith 2019, arXiv 1905.00414).

    ||Y'X||^2 / (||X'X|| ||Y'Y||) of centred features in Frobenius norms, in float64: 1 where one is a rotated, scaled
    and shifted copy of the other, 0 where no direction of one varies with any of the other; NaN where one is constant.
    With fewer positions than channels it is large for unrelated features too: independent Gaussian ones of p and q
    channels at n positions have about sqrt(p q / ((n + p) (n + q))), 0.34 for p = q = 1024 and n = 2000.

    Args:
        x, y: [positions, channels], the channels of either its own.

    Raises: InputError: not two matrices of as many positions.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise InputError(f"features {list(x.shape)} and {list(y.shape)}: give [positions, channels] at the same ones")
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    own = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float((y.T @ x).square().sum() / own) if own > 0 else np.nan


def scale_similarity(
    student: nn.Module, teacher: nn.Module, bank: Bank, positions: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """`cka` of every scale of the student and every scale of the teacher, at random points of the bank's slices.

    The points are spread evenly over slices and uniformly within one, padding and air included; every feature map is
    read at the same points by bilinear interpolation between the centres of its pixels, whatever its resolution. Body
    and air differ in any features, so even untrained networks reach 0.9 between early scales: only the difference to a
    student that was trained alone tells of distillation.

    Args:
        student, teacher: networks whose `scales` name their layers, on the same device or not.
        bank: slices, of the test cases.
        positions: number of points.
        seed: of slices and points.

    Returns: a table with columns scale_student, scale_teacher and value.

    Raises: InputError: fewer than two positions, or a scale whose layer the model does not have.
    """
    if positions < 2:
        raise InputError(f"{positions} positions: nothing varies over fewer than two; about 2000 do well")
    generator = torch.Generator().manual_seed(seed)
    each = -(-positions // len(bank))
    index = torch.randperm(len(bank), generator=generator)[: -(-positions // each)]
    points = torch.rand(len(index), each, bank.dims, generator=generator) * 2 - 1
    found = [features_at(model, bank, index, points) for model in (student, teacher)]
    rows = [
        dict(scale_student=a, scale_teacher=b, value=cka(x[:positions], y[:positions]))
        for a, x in found[0].items()
        for b, y in found[1].items()
    ]
    return pd.DataFrame(rows)


def features_at(
    model: nn.Module, bank: Bank, index: Tensor, points: Tensor, batch: int = 32,
    scales: Sequence[str] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Scale -> [points, channels] on the CPU, at `points` ([N,K,2 or 3], x, y (, z) in -1..1) of the slices."""
    parts: dict[str, list[Tensor]] = {name: [] for name in scales or model.scales}
    with closing(FeatureHooks(model, parts)) as taps, inference(model, bank.dims) as device:
        for chosen, places in zip(index.split(batch), points.split(batch), strict=True):
            images, _ = bank.batch(chosen.to(bank.images[0].device))
            images = images.to(device, memory_format=CHANNELS_LAST[bank.dims])
            _, features = taps(images, reconstruct=False)
            grid = places.view(len(places), *[1] * (bank.dims - 1), *places.shape[1:]).to(device)
            for name, maps in features.items():
                read = F.grid_sample(maps.float(), grid, padding_mode="border", align_corners=False)
                parts[name].append(read.flatten(2).transpose(1, 2).flatten(0, 1).cpu())
    return {name: torch.cat(part) for name, part in parts.items()}


def sample_features(
    models: Mapping[str, nn.Module], bank: Bank, scale: str = "decoder1", positions: int = 600, slices: int = 32,
    seed: int = 0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Features of the same pixels in several models, in equal number of every class, to look at in two dimensions.

    The pixels are drawn as `SupervisedContrastiveLoss` draws its own, from `slices` random slices that show a class; a
    map coarser than the slice is read between the centres of its pixels.

    Args:
        models: name -> network whose `scales` name `scale`.
        bank: slices, of the test cases.
        positions: most pixels to draw.
        seed: of slices and pixels.

    Returns:
        case and class of each pixel ([n] text, "background" for none), and under each model's name its [n, channels].

    Raises: InputError: no slice shows a class, or a model without that scale.
    """
    generator = torch.Generator().manual_seed(seed)
    shown = bank.holds_target.nonzero()[:, 0].cpu()
    if not len(shown):
        cases, classes = ", ".join(bank.cases), ", ".join(bank.classes)
        raise InputError(f"no slice or patch of {cases} shows {classes}: give other cases")
    index = shown[torch.randperm(len(shown), generator=generator)[:slices]].sort().values
    labels = bank.batch(index.to(bank.images[0].device))[1].cpu()
    drawn = SupervisedContrastiveLoss(samples=positions).draw(labels, generator).sort().values  # slice by slice
    image, pixel = drawn // labels[0].numel(), drawn % labels[0].numel()
    sides = torch.tensor(labels.shape[:0:-1])
    points = (2 * torch.stack(torch.unravel_index(pixel, labels.shape[1:])[::-1], 1) + 1) / sides - 1
    each = image.bincount(minlength=len(index))
    taken = torch.arange(int(each.max())) < each[:, None]  # slices with fewer points than the fullest are padded
    grid = torch.zeros(*taken.shape, len(sides))
    grid[taken] = points
    names = np.array(["background", *bank.classes])
    found = {
        "case": np.array(bank.cases)[bank.case_index.cpu()[index][image]],
        "class": names[labels.flatten()[drawn]],
    }
    for name, model in models.items():
        features = features_at(model, bank, index, grid, scales=[scale])[scale]
        found[name] = features[taken.flatten()].numpy()
    return found
