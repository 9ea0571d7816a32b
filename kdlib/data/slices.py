"""Volumes as one tensor of axial slices, and the way back from slices to a volume's own grid.

The same functions resample a volume along all three axes, where the preprocessing has three dimensions: see
`kdlib.data.volumes`.

A slice is laid out as radiologists see it: row 0 is anterior, column 0 is the patient's right; slices go from
inferior to superior. Slices are resampled in the plane only, by the exact factor, then padded or cropped about their
centre. Nothing is stretched to fit (except where a protocol keeps the published conversion), and z is never resampled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import nibabel as nib
import numpy as np
import torch
from nibabel import orientations
from nibabel.affines import voxel_sizes
from torch import Tensor
from torch.nn import functional

from kdlib.config import UNLABELLED, InputError, Preprocessing
from kdlib.data.decathlon import Case, Dataset
from kdlib.data.nifti import read_again

SLICE_AXES = ("S", "P", "L")  # where the axes of [slices, rows, columns] point: superior, posterior, left


@dataclass(frozen=True)
class Geometry:
    """How one file's volume became slices, or a volume of another spacing: all that `restore` needs to invert it.

    Args:
        shape: of the file's volume, in its own axes.
        affine: of the file, voxel to world in mm (RAS), row by row.
        factor: slice pixels per volume voxel (volume spacing / slice spacing) along rows and columns; of a volume along
            slices, rows and columns.
        start: row and column of the slice where the resampled volume begins, negative where it is cropped; of a volume
            also its first slice, and never negative.
        size: side of the slice in pixels, or of a patch in voxels.
        canonical: whether the slices are turned as radiologists see them, or left in the file's own axes [Z,X,Y].
    """

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    factor: tuple[float, ...]
    start: tuple[int, ...]
    size: int
    canonical: bool = True

    @property
    def depth(self) -> int:
        """Number of slices of the file."""
        return self.oriented_shape[0]

    @property
    def oriented_shape(self) -> tuple[int, ...]:
        """Voxels of the file along slices, rows and columns."""
        return tuple(self.shape[list(self._to_slices()[:, 0]).index(axis)] for axis in range(3))

    @property
    def resampled(self) -> tuple[int, ...]:
        """Pixels that the file's volume covers along the axes of `factor`."""
        return tuple(map(_pixels, self.oriented_shape[-len(self.factor) :], self.factor))

    @property
    def grid(self) -> tuple[int, ...]:
        """Slices, rows and columns of what became of the volume: a volume smaller than a patch is padded to it."""
        if len(self.factor) == 2:
            return self.depth, self.size, self.size
        return tuple(max(self.size, pixels) for pixels in self.resampled)

    def _to_slices(self) -> np.ndarray:
        if not self.canonical:
            return np.array([[1, 1], [2, 1], [0, 1]])
        own = orientations.io_orientation(np.array(self.affine))
        return orientations.ornt_transform(own, orientations.axcodes2ornt(SLICE_AXES)).astype(int)

    def positions(self) -> tuple[np.ndarray, ...]:
        """Where the voxels along each axis of `factor` lie in `grid`, in pixels; 0 is its first pixel's centre."""
        axes = zip(self.oriented_shape[-len(self.factor) :], self.factor, self.start, strict=True)
        return tuple((np.arange(count) + 0.5) * factor - 0.5 + start for count, factor, start in axes)

    def in_view(self) -> tuple[np.ndarray, ...]:
        """Which voxels of the oriented volume are in `grid`, along each axis of `factor`."""
        sides = self.grid[-len(self.factor) :]
        pairs = zip(self.positions(), sides, strict=True)
        return tuple((position >= -0.5) & (position < side - 0.5) for position, side in pairs)

    def orient(self, volume: np.ndarray) -> np.ndarray:
        """The file's array [X,Y,Z] as slices [D,H,W], in its own spacing."""
        return orientations.apply_orientation(volume, self._to_slices())


@dataclass(frozen=True)
class SliceBank:
    """The slices of many cases in one tensor each, all on one device.

    Args:
        images: [N,H,W] uint8, the window or percentile range as 0..255.
        labels: [N,H,W] uint8, 0 background, k the k-th of `classes` (from 1).
        case_index: [N] int64, the slice's position in `cases`; slices of a case follow on each other, inferior first.
        cases: names of the cases, in the order of their slices.
        classes: names of the foreground classes.
        channels: "repeat" or "neighbours", see `stack_channels`.
        geometry: case name -> how its volume became slices.
        patients: of each of `cases`, the number of its patient in the data set.
    """

    images: Tensor
    labels: Tensor
    case_index: Tensor
    cases: tuple[str, ...]
    classes: tuple[str, ...]
    channels: str
    geometry: dict[str, Geometry]
    patients: tuple[int, ...]
    dims: ClassVar[int] = 2

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> SliceBank:
        tensors = {name: getattr(self, name).to(device) for name in ("images", "labels", "case_index")}
        return dataclasses.replace(self, **tensors)

    def select(self, cases: Sequence[str]) -> SliceBank:
        """The bank of these cases alone, in this order; a copy, from which no other case can be reached.

        Raises: InputError: no case given, one given twice, or one that the bank does not hold.
        """
        check_selection(self.cases, cases)
        parts = [torch.nonzero(self.case_index == self.cases.index(name)).flatten() for name in cases]
        index = torch.cat(parts)
        return dataclasses.replace(
            self, images=self.images[index], labels=self.labels[index], cases=tuple(cases),
            case_index=torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)]),
            geometry={name: self.geometry[name] for name in cases},
            patients=tuple(self.patients[self.cases.index(name)] for name in cases),
        )  # fmt: skip

    def volume(self, case: str) -> tuple[Tensor, Tensor]:
        """Image and label of one case, [D,H,W] uint8 each."""
        own = self.case_index == self.cases.index(case)
        return self.images[own], self.labels[own]

    def hide_labels(self, cases: Iterable[str]) -> SliceBank:
        """The bank with the labels of these cases replaced by `UNLABELLED`: what was never there cannot be read."""
        named = set(cases)
        hidden = torch.tensor([name in named for name in self.cases], device=self.labels.device)[self.case_index]
        return dataclasses.replace(self, labels=self.labels.masked_fill(hidden[:, None, None], UNLABELLED))

    @property
    def labelled(self) -> Tensor:
        """[N] bool: whether the slice has labels."""
        return self.labels[:, 0, 0] != UNLABELLED

    @property
    def holds_target(self) -> Tensor:
        """[N] bool: whether the slice's labels show a class."""
        return (self.labels > 0).flatten(1).any(1) & self.labelled

    def patient_of(self, index: Tensor) -> Tensor:
        """[B] int64: the patient of each of these slices."""
        return torch.tensor(self.patients, device=index.device)[self.case_index[index]]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What a network takes: images [B,3,H,W] float32 in 0..1 and labels [B,H,W] int64.

        Args:
            index: [B] int64 slice numbers, on the bank's device.
        """
        return stack_channels(self.images, index, self.case_index, self.channels), self.labels[index].long()


def check_selection(known: Sequence[str], cases: Sequence[str]) -> None:
    """Raises: InputError: no case given, one given twice, or one that is not known."""
    unknown = [name for name in cases if name not in known]
    if unknown:
        raise InputError(f"cases {', '.join(unknown)} are not in the bank: it holds {', '.join(known)}")
    if not cases or len(set(cases)) < len(cases):
        raise InputError(f"cases {list(cases)}: select at least one case of the bank, and each only once")


def stack_channels(images: Tensor, index: Tensor, case_index: Tensor, channels: str) -> Tensor:
    """What a network takes of slices [N,H,W] uint8: those of `index` as [B,3,H,W] float32 in 0..1.

    Args:
        case_index: [N] int64, the case of each slice.
        channels: "repeat" (the slice three times) or "neighbours" (the slice below, itself and above; at the ends of a
            case itself again).
    """
    if channels == "repeat":
        return images[index][:, None].expand(-1, 3, -1, -1).float() / 255
    index = index[:, None]
    near = (index + torch.arange(-1, 2, device=index.device)).clamp(0, len(images) - 1)
    return images[torch.where(case_index[near] == case_index[index], near, index)].float() / 255


def build(dataset: Dataset, classes: dict[str, int], preprocessing: Preprocessing) -> SliceBank:
    """Slices of all cases of a data set, on the CPU.

    CT is clipped to `preprocessing.window` (HU), MR to `preprocessing.percentiles` of each volume's non-zero voxels;
    the range becomes 0..255, rounded. Images are resampled with an antialiased bilinear kernel before they are
    rounded. Labels are sampled at the nearest voxel: a vote of the voxels under a pixel would shrink what is thinner
    than a pixel (the adrenal glands of btcv by an eighth at 5 mm), while the nearest voxel keeps its volume on average.

    Args:
        dataset: from `index`.
        classes: class name -> value in the label files, from `dataset.classes(target)`; other values are background.
        preprocessing: size, spacing, channels and intensities; where it is `published`, slices as the
            published code makes them, which stretches what is not square.

    Raises: InputError: the data set has no case; a file cannot be read any more; an MR volume is constant.
    """
    geometry, images, labels = read_cases(dataset, classes, preprocessing)
    case_index = np.repeat(np.arange(len(images)), [len(image) for image in images])
    arrays = np.concatenate(images), np.concatenate(labels), case_index
    return SliceBank(
        *map(torch.from_numpy, arrays), cases=tuple(geometry), classes=tuple(classes), channels=preprocessing.channels,
        geometry=geometry, patients=patient_numbers(dataset),
    )  # fmt: skip


def patient_numbers(dataset: Dataset) -> tuple[int, ...]:
    """Of each case the number of its patient."""
    return tuple(np.unique([case.group for case in dataset.cases], return_inverse=True)[1].tolist())


def read_cases(
    dataset: Dataset, classes: dict[str, int], preprocessing: Preprocessing
) -> tuple[dict[str, Geometry], list[np.ndarray], list[np.ndarray]]:
    """How each case's volume became slices, its images and its labels, [D,H,W] uint8 each; see `build`."""
    if not dataset.cases:
        raise InputError(f"{dataset.root}: no case, so there is nothing to make slices of; check imagesTr and labelsTr")
    geometry, images, labels = {}, [], []
    for case in dataset.cases:
        affine, image = read_case_file(case.image, np.float32)
        placed, image = image_slices(image, affine, dataset.modality, preprocessing, case.image)
        _, label = read_case_file(case.label, np.int64)
        values = np.zeros(max(label.max(), *classes.values()) + 1, np.uint8)
        values[list(classes.values())] = np.arange(1, len(classes) + 1)
        label = _resample_labels(placed.orient(values[label]), placed.factor)
        geometry[case.name] = placed
        images.append(image)
        labels.append(_pad_or_crop(label, placed))
    return geometry, images, labels


def restore(scores: Tensor, geometry: Geometry) -> Tensor:
    """Scores of one case's slices, or of its volume, back on its file's own grid and in its own orientation.

    Bilinear in the plane (trilinear of a volume), by the inverse of the factor the slices were made with. Outside the
    slices' field of view no network has looked: scores are 0 there, and 1 for channel 0 (background) if there are
    several channels, so that both a threshold and an argmax give background.

    Args:
        scores: [C,D,H,W] probabilities on `geometry.grid`, slices from inferior to superior.
        geometry: of the case.

    Returns: [C,X,Y,Z], on the device and of the type of `scores`.

    Raises: InputError: the scores are not of this case's number and size of slices.
    """
    grid, to_slices = geometry.grid, geometry._to_slices()
    if tuple(scores.shape[1:]) != grid:
        raise InputError(f"scores of shape {tuple(scores.shape)}: this case's slices have [D, H, W] = {list(grid)}")
    inside = [torch.from_numpy(mask).to(scores.device) for mask in geometry.in_view()]
    for dim, position in enumerate(geometry.positions(), 4 - len(inside)):
        position = torch.from_numpy(position).to(scores.device).clamp(0, grid[dim - 1] - 1)
        low = position.long()
        high = (low + 1).clamp(max=grid[dim - 1] - 1)
        share = (position - low).to(scores).view(-1, *[1] * (3 - dim))
        scores = torch.lerp(scores.index_select(dim, low), scores.index_select(dim, high), share)
    outside = ~functools.reduce(lambda seen, side: seen[..., None] & side, inside)
    scores = scores.masked_fill(outside, 0)
    if len(scores) > 1:
        scores[0].masked_fill_(outside, 1)
    flipped = [1 + int(axis) for axis, flip in to_slices if flip < 0]
    return scores.flip(flipped).permute(0, *[1 + int(axis) for axis in to_slices[:, 0]]).contiguous()


def place_slices(shape: Sequence[int], affine: np.ndarray, preprocessing: Preprocessing) -> Geometry:
    """How a volume of this shape and affine, in its file's own axes, becomes slices, or a volume."""
    axes, size, dims = tuple(map(tuple, affine.tolist())), preprocessing.size, preprocessing.dimensions
    placed = Geometry(tuple(shape), axes, (1.0,) * dims, (0,) * dims, size, not preprocessing.published)
    order = np.argsort(placed._to_slices()[:, 0])
    voxels, spacing = np.array(shape)[order][-dims:], voxel_sizes(affine)[order][-dims:]
    if preprocessing.spacing is not None:
        placed = dataclasses.replace(placed, factor=tuple((spacing / preprocessing.spacing).tolist()))
    if preprocessing.published:
        placed = dataclasses.replace(placed, factor=tuple((size / voxels).tolist()))
    start = tuple((side - pixels) // 2 for side, pixels in zip(placed.grid[-dims:], placed.resampled, strict=True))
    return dataclasses.replace(placed, start=start)


def place_case(case: Case, preprocessing: Preprocessing) -> Geometry:
    """How a case's volume becomes slices, or a volume, by the header of its file alone."""
    return place_slices(case.shape, nib.load(case.label).affine, preprocessing)


def image_slices(
    image: np.ndarray, affine: np.ndarray, modality: str, preprocessing: Preprocessing, path: Path
) -> tuple[Geometry, np.ndarray]:
    """How a volume XYZ of scaled intensities becomes slices (or a volume), and these: [D,H,W] uint8; see `build`.

    Raises: InputError for an MR volume that is constant, named by its path.
    """
    placed = place_slices(image.shape, affine, preprocessing)
    low, high = intensity_range(image, modality, preprocessing)
    if low == high:
        constant = f"MR volume is constant (percentiles {preprocessing.percentiles} are equal)"
        raise InputError(f"{path}: {constant}; leave it out")
    image = placed.orient(((image - low) / (high - low)).clip(0, 1).astype(np.float32))
    image = np.rint(_resample(image, placed.factor) * 255).clip(0, 255).astype(np.uint8)
    return placed, _pad_or_crop(image, placed)


def read_case_file(path: Path, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """(affine, voxels) of a NIfTI file, voxels scaled as the header says."""
    file = read_again(path)
    voxels = np.asanyarray(file.dataobj)
    return file.affine, np.rint(voxels).astype(dtype) if dtype is np.int64 else voxels.astype(dtype)


def intensity_range(image: np.ndarray, modality: str, preprocessing: Preprocessing) -> tuple[float, float]:
    """What becomes 0 and what 1: the ends of the window (HU), or of MR the percentiles of its own non-zero voxels."""
    if preprocessing.published:
        return 0.0, 255.0
    if modality == "CT":
        return preprocessing.window
    body = image[image != 0]
    return tuple(np.percentile(body, preprocessing.percentiles)) if body.size else (0.0, 0.0)


def _pixels(voxels: int, factor: float) -> int:
    """Pixels that cover this many voxels: rounded up, so that no voxel is lost at the far edge."""
    return math.ceil(round(voxels * factor, 4))


def _resample(image: np.ndarray, factor: tuple[float, ...]) -> np.ndarray:
    """Antialiased bilinear resampling of [D,H,W] by exactly `factor`, along the last two axes or all three."""
    if len(factor) == 3:  # the kernel is separable: along rows and columns, then along slices
        image = _resample(image, factor[1:])
        return np.moveaxis(_resample(np.moveaxis(image, 0, 1), (factor[0], 1.0)), 1, 0)
    if factor == (1.0, 1.0):
        return image
    pixels = [_pixels(voxels, f) for voxels, f in zip(image.shape[1:], factor, strict=True)]
    # interpolate rounds the number of pixels down: one pixel more of the edge values makes it cover the whole volume
    rows, columns = (math.ceil(1 / f) for f in factor)
    slices = functional.pad(torch.from_numpy(np.ascontiguousarray(image))[None], (0, columns, 0, rows), "replicate")
    how = dict(mode="bilinear", antialias=True, recompute_scale_factor=False)
    slices = functional.interpolate(slices, scale_factor=factor, **how)
    return slices[0, :, : pixels[0], : pixels[1]].numpy()


def _resample_labels(label: np.ndarray, factor: tuple[float, ...]) -> np.ndarray:
    """The nearest voxel to each pixel's centre, on the grid of `_resample`."""
    axes = zip(label.shape, (1.0,) * (3 - len(factor)) + factor, strict=True)
    return label[np.ix_(*(((np.arange(_pixels(n, f)) + 0.5) / f).astype(int).clip(max=n - 1) for n, f in axes))]


def _pad_or_crop(volume: np.ndarray, placed: Geometry) -> np.ndarray:
    """A resampled volume on a canvas of 0, of `placed.grid`, beginning at `placed.start`."""
    canvas = np.zeros(placed.grid, volume.dtype)
    start = (0,) * (3 - len(placed.start)) + placed.start
    part = volume[tuple(slice(max(-s, 0), side - s) for s, side in zip(start, placed.grid, strict=True))]
    canvas[tuple(slice(max(s, 0), max(s, 0) + n) for s, n in zip(start, part.shape, strict=True))] = part
    return canvas
