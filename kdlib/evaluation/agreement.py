"""How far a student agrees with its teacher, and how well it is calibrated: gain is one thing, teacher_agreement another.

A student may gain without growing more like its teacher, and grow like it without gaining (Stanton et al. 2021,
arXiv 2106.05945), so tables of distilled students should stand beside the same tables of students trained alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import nibabel as nib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_erosion, distance_transform_edt
from torch import Tensor, nn

from kdlib.config import InputError
from kdlib.data.decathlon import Dataset
from kdlib.data.slices import SliceBank, restore
from kdlib.evaluation.cases import TOLERANCE, _box, _inference, _labels, predict_cases
from kdlib.losses import SupervisedContrastiveLoss
from kdlib.training.distiller import FeatureHooks


def fidelity(
    student: nn.Module,
    teacher: nn.Module,
    bank: SliceBank,
    dataset: Dataset,
    cases: Sequence[str],
    threshold: float = 0.5,
) -> pd.DataFrame:
    """How alike student and teacher segment each of `cases`, class by class, in the grid of the label files.

    `agreement` is the Dice of the student's and the teacher's mask, 1 where both are empty. `band_agreement` is the
    share of the voxels within 2 mm of the true surface (as `evaluate.case_metrics` defines it: voxels of the mask with
    a face neighbour outside) where both decide alike, NaN where the truth is empty. `error_overlap` is the Dice of the
    student's wrong voxels and the teacher's, NaN where neither errs. Two good models agree because both are right:
    read the first two beside the Dice of both models, or look at the last.

    Args:
        student, teacher: networks with the bank's classes.
        bank: slices of at least these cases.
        dataset: where the label files and their spacing are.
        threshold: probability above which a voxel of one-channel models is foreground.

    Returns:
        a table with columns case, class, metric and value.

    Raises:
        InputError: a case that the bank or the data set does not hold.
    """
    rows = []
    for name in cases:  # one at a time: the probabilities of many classes fill the memory
        part, case = bank.select([name]), dataset.case(name)
        said, taught = (
            _labels(restore(predict_cases(model, part)[name], part.geometry[name]), threshold).cpu().numpy()
            for model in (student, teacher)
        )
        file = np.asarray(nib.load(case.label).dataobj).round().astype(int)
        for value, label in enumerate(bank.classes, start=1):
            found = _alike(said == value, taught == value, file == dataset.labels[label], case.spacing)
            rows += [{"case": name, "class": label, "metric": key, "value": number} for key, number in found.items()]
    return pd.DataFrame(rows)


def _alike(student: np.ndarray, teacher: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """The metrics of three boolean XYZ masks; see `fidelity`."""
    band, box = surface_band(truth, spacing)
    return {
        "agreement": _dice(student, teacher, empty=1.0),
        "band_agreement": float((student == teacher)[box][band].mean()) if band.any() else np.nan,
        "error_overlap": _dice(student != truth, teacher != truth, empty=np.nan),
    }


def _dice(a: np.ndarray, b: np.ndarray, empty: float) -> float:
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return float(2 * np.count_nonzero(a & b) / total) if total else empty


def surface_band(
    truth: np.ndarray, spacing: Sequence[float], width: float = TOLERANCE
) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Voxels of a boolean XYZ mask whose centre lies within `width` mm of one on the mask's surface.

    Returns:
        the band inside a box, and the box that holds all of it: a distance to every voxel of a body would take long.
    """
    if not truth.any():
        return np.zeros((0, 0, 0), bool), (slice(0, 0),) * 3
    reach = [int(width / side) for side in spacing]
    box = tuple(slice(max(s.start - r, 0), s.stop + r) for s, r in zip(_box(truth), reach, strict=True))
    mask = truth[box]
    surface = mask & ~binary_erosion(mask)
    return distance_transform_edt(~surface, sampling=spacing) <= width, box


# ---------------------------------------------------------------------------------------------------------- similarity


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same positions (Kornblith 2019, arXiv 1905.00414).

    ||Y'X||^2 / (||X'X|| ||Y'Y||) of centred features in Frobenius norms, in float64: 1 where one is a rotated, scaled
    and shifted copy of the other, 0 where no direction of one varies with any of the other; NaN where one is constant.
    With fewer positions than channels it is large for unrelated features too: independent Gaussian ones of p and q
    channels at n positions have about sqrt(p q / ((n + p) (n + q))), 0.34 for p = q = 1024 and n = 2000.

    Args:
        x, y: [positions, channels], the channels of either its own.

    Raises:
        InputError: not two matrices of as many positions.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise InputError(f"features {list(x.shape)} and {list(y.shape)}: give [positions, channels] at the same ones")
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    own = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float((y.T @ x).square().sum() / own) if own > 0 else np.nan


def scale_similarity(
    student: nn.Module, teacher: nn.Module, bank: SliceBank, positions: int = 2000, seed: int = 0
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

    Returns:
        a table with columns scale_student, scale_teacher and value.

    Raises:
        InputError: fewer than two positions, or a scale whose layer the model does not have.
    """
    if positions < 2:
        raise InputError(f"{positions} positions: nothing varies over fewer than two; about 2000 do well")
    generator = torch.Generator().manual_seed(seed)
    each = -(-positions // len(bank))
    index = torch.randperm(len(bank), generator=generator)[: -(-positions // each)]
    points = torch.rand(len(index), each, 2, generator=generator) * 2 - 1
    found = [_features_at(model, bank, index, points) for model in (student, teacher)]
    rows = [
        dict(scale_student=a, scale_teacher=b, value=cka(x[:positions], y[:positions]))
        for a, x in found[0].items()
        for b, y in found[1].items()
    ]
    return pd.DataFrame(rows)


def _features_at(
    model: nn.Module,
    bank: SliceBank,
    index: Tensor,
    points: Tensor,
    batch: int = 32,
    scales: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Scale -> [points, channels] on the CPU, at `points` ([N,K,2], x and y in -1..1 over a slice) of the slices."""
    taps = FeatureHooks(model, model.scales, scales or model.scales)
    parts: dict[str, list[Tensor]] = {name: [] for name in taps.names}
    try:
        with _inference(model) as device:
            for chosen, places in zip(index.split(batch), points.split(batch), strict=True):
                images, _ = bank.batch(chosen.to(bank.images.device))
                _, features = taps(images.to(device, memory_format=torch.channels_last), reconstruct=False)
                for name, maps in features.items():
                    grid = places[:, None].to(device)
                    read = F.grid_sample(maps.float(), grid, padding_mode="border", align_corners=False)
                    parts[name].append(read[:, :, 0].transpose(1, 2).flatten(0, 1).cpu())
    finally:
        taps.close()
    return {name: torch.cat(part) for name, part in parts.items()}


def sample_features(
    models: Mapping[str, nn.Module],
    bank: SliceBank,
    scale: str = "decoder1",
    positions: int = 600,
    slices: int = 32,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Features of the same pixels in several models, in equal number of every class, to look at in two dimensions.

    The pixels are drawn as a supervised contrastive loss draws its own (see `SupervisedContrastiveLoss`), from `slices` random slices that
    show a class; a map coarser than the slice is read between the centres of its pixels.

    Args:
        models: name -> network whose `scales` name `scale`.
        bank: slices, of the test cases.
        positions: most pixels to draw.
        seed: of slices and pixels.

    Returns:
        case and class of each pixel ([n] text, "background" for none), and under each model's name its [n, channels].

    Raises:
        InputError: no slice shows a class, or a model without that scale.
    """
    generator = torch.Generator().manual_seed(seed)
    shown = (bank.labels > 0).flatten(1).any(1).nonzero()[:, 0].cpu()
    if not len(shown):
        raise InputError(f"no slice of {', '.join(bank.cases)} shows {', '.join(bank.classes)}: give other cases")
    index = shown[torch.randperm(len(shown), generator=generator)[:slices]].sort().values
    labels = bank.labels.cpu()[index].long()
    drawn = SupervisedContrastiveLoss(samples=positions).draw(labels, generator).sort().values  # slice by slice
    image, pixel = drawn // labels[0].numel(), drawn % labels[0].numel()
    sides = torch.tensor([labels.shape[2], labels.shape[1]])
    points = (2 * torch.stack([pixel % sides[0], pixel // sides[0]], 1) + 1) / sides - 1
    each = image.bincount(minlength=len(index))
    taken = torch.arange(int(each.max())) < each[:, None]  # slices with fewer points than the fullest are padded
    grid = torch.zeros(*taken.shape, 2)
    grid[taken] = points
    names = np.array(["background", *bank.classes])
    found = {
        "case": np.array(bank.cases)[bank.case_index.cpu()[index][image]],
        "class": names[labels.flatten()[drawn]],
    }
    for name, model in models.items():
        features = _features_at(model, bank, index, grid, scales=[scale])[scale]
        found[name] = features[taken.flatten()].numpy()
    return found


# --------------------------------------------------------------------------------------------------------- calibration


def calibration(model: nn.Module, bank: SliceBank, bins: int = 15) -> pd.DataFrame:
    """How often a class is there where the model gives it a probability, for every case and class of the bank.

    Each class against the rest, on the pixels of the slices, in `bins` equal bins of probability ([low, high), the last
    closed). Background would fill the first bin and decide all else, so only a box counts: the true mask's bounding
    box (slices, rows, columns) grown on every side by a quarter of its length, at least by one pixel. It depends on the
    truth alone, so all models are measured on the same pixels and none is chosen by its answer; what a model finds far
    from the organ is not in it. A case without the class has no box, and a count of 0 throughout.

    Args:
        model: network with the bank's classes.
        bank: slices, of the test cases.

    Returns:
        a table with columns case, class, bin (from 0), confidence (mean probability in the bin), accuracy (share of its
        pixels that are the class) and count; the first two NaN in a bin without pixels.

    Raises:
        InputError: fewer than one bin.
    """
    if bins < 1:
        raise InputError(f"{bins} bins: give at least one, usually 15")
    tables = []
    for name in bank.cases:
        part = bank.select([name])
        scores = predict_cases(model, part)[name].cpu()
        for value, label in enumerate(bank.classes, start=1):
            truth = (part.labels == value).cpu()
            box = _around(truth.numpy())
            found = _binned(scores[value if len(scores) > 1 else 0][box], truth[box], bins)
            tables.append(found.assign(case=name, **{"class": label}))
    return pd.concat(tables, ignore_index=True)[["case", "class", "bin", "confidence", "accuracy", "count"]]


def _around(mask: np.ndarray) -> tuple[slice, ...]:
    """The box of a mask, grown by a quarter of its length on every side; an empty one for an empty mask."""
    if not mask.any():
        return (slice(0, 0),) * 3
    grown = [(side, max(1, (side.stop - side.start) // 4)) for side in _box(mask)]
    return tuple(slice(max(side.start - margin, 0), side.stop + margin) for side, margin in grown)


def _binned(scores: Tensor, truth: Tensor, bins: int) -> pd.DataFrame:
    """Columns bin, confidence, accuracy and count; in float64, as float32 would round the sums of large volumes."""
    scores, truth = scores.flatten().double(), truth.flatten().double()
    place = (scores * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights=weights, minlength=bins) for weights in (scores, truth)]
    confidence, accuracy = ((total / counts).numpy() for total in sums)  # 0 / 0 is NaN
    return pd.DataFrame(dict(bin=range(bins), confidence=confidence, accuracy=accuracy, count=counts.numpy()))


def expected_calibration_error(table: pd.DataFrame) -> pd.DataFrame:
    """Expected calibration error of every case and class: sum of count |accuracy - confidence| over sum of count.

    Guo et al. 2017, arXiv 1706.04599, with the probability of the class in place of the winner's. NaN without pixels.

    Args:
        table: from `calibration`; further columns (an arm, a fold) are kept, each of their values for itself.

    Returns:
        the table's columns but for those of bins, and metric ("ece") and value.

    Raises:
        InputError: a column of `calibration` is missing.
    """
    measured = ["bin", "confidence", "accuracy", "count"]
    absent = [column for column in ["case", "class", *measured] if column not in table]
    if absent:
        raise InputError(f"calibration table without {', '.join(absent)}: give what `calibration` returns")
    keys = [column for column in table if column not in measured]
    gap = (table["count"] * (table["accuracy"] - table["confidence"]).abs()).fillna(0)  # an empty bin has no gap
    sums = (
        table[keys].assign(gap=gap, count=table["count"]).groupby(keys, sort=False, dropna=False, as_index=False).sum()
    )
    value = (sums["gap"] / sums["count"]).where(sums["count"] > 0)
    return sums[keys].assign(metric="ece", value=value)
