"""Volumes resident on one device, and the cubic patches of them that a network of three dimensions sees.

A volume is oriented and windowed as its slices would be, resampled to one spacing along all three axes, and padded
about its centre with 0 where it is smaller than a patch. Its patches are the windows of evaluation (MONAI's
`sliding_window_inference` with an overlap of a half): one begins at every half of a patch's side, the last ends with
the volume. In training each draw moves a patch by up to a quarter of its side, within the volume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from kdlib.config import UNLABELLED, Preprocessing
from kdlib.data import slices
from kdlib.data.decathlon import Dataset
from kdlib.data.slices import Geometry, SliceBank


@dataclass(frozen=True)
class VolumeBank:
    """The volumes of many cases on one device, with the interface of `SliceBank`: its items are patches.

    Args:
        images, labels: of each case [D,H,W] uint8, as of `SliceBank`; of no axis shorter than a patch.
        cases, classes, geometry, patients: as of `SliceBank`.
        size: side of a patch in voxels.
    """

    images: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    cases: tuple[str, ...]
    classes: tuple[str, ...]
    size: int
    geometry: dict[str, Geometry]
    patients: tuple[int, ...]
    dims: ClassVar[int] = 3

    def __len__(self) -> int:
        return len(self.places)

    def to(self, device: torch.device | str) -> VolumeBank:
        moved = {name: tuple(v.to(device) for v in getattr(self, name)) for name in ("images", "labels")}
        return dataclasses.replace(self, **moved)

    def select(self, cases: Sequence[str]) -> VolumeBank:
        """The bank of these cases alone, in this order. Raises: InputError as `SliceBank.select`."""
        slices.check_selection(self.cases, cases)
        numbers = [self.cases.index(name) for name in cases]
        chosen = {name: tuple(getattr(self, name)[n] for n in numbers) for name in ("images", "labels", "patients")}
        geometry = {name: self.geometry[name] for name in cases}
        return dataclasses.replace(self, cases=tuple(cases), geometry=geometry, **chosen)

    def volume(self, case: str) -> tuple[Tensor, Tensor]:
        """Image and label of one case, [D,H,W] uint8 each."""
        number = self.cases.index(case)
        return self.images[number], self.labels[number]

    def hide_labels(self, cases: Iterable[str]) -> VolumeBank:
        """The bank with the labels of these cases replaced by `UNLABELLED`: what was never there cannot be read."""
        hidden, pairs = set(cases), zip(self.cases, self.labels, strict=True)
        labels = tuple(torch.full_like(own, UNLABELLED) if name in hidden else own for name, own in pairs)
        return dataclasses.replace(self, labels=labels)

    @cached_property
    def labelled(self) -> Tensor:
        """[P] bool, on the bank's device: whether the patch has labels."""
        return torch.stack([own[0, 0, 0] for own in self.labels])[self.case_index] != UNLABELLED

    @cached_property
    def holds_target(self) -> Tensor:
        """[P] bool, on the bank's device: whether the patch shows a class, wherever a draw moves it."""
        found = []
        for (number, *first), room in zip(self.places.tolist(), self._room.tolist(), strict=True):
            reach = self.size // 4
            ends = [(min(f + reach, r), max(f - reach, 0) + self.size) for f, r in zip(first, room, strict=True)]
            found.append((self.labels[number][tuple(slice(*end) for end in ends)] > 0).any())
        return torch.stack(found) & self.labelled

    @cached_property
    def places(self) -> Tensor:
        """[P,4] int64, on the CPU: the position of each patch's case in `cases`, its first slice, row and column."""
        size, places = self.size, []
        for number, image in enumerate(self.images):
            starts = ([*range(0, side - size, size // 2), side - size] for side in image.shape)
            places += [(number, *place) for place in product(*starts)]
        return torch.tensor(places)

    @property
    def case_index(self) -> Tensor:
        """[P] int64, on the CPU: the position of each patch's case in `cases`."""
        return self.places[:, 0]

    @property
    def _room(self) -> Tensor:
        """[P,3]: the last place that a patch of the same volume can begin at."""
        return (torch.tensor([image.shape for image in self.images]) - self.size)[self.case_index]

    def patient_of(self, index: Tensor) -> Tensor:
        """[B] int64: the patient of each of these patches."""
        return torch.tensor(self.patients)[self.case_index[index.cpu()]].to(index.device)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """What a network takes: images [B,1,S,S,S] float32 in 0..1 and labels [B,S,S,S] int64.

        Args:
            index: [B] int64, numbers of patches.
            generator: on the CPU, moves each patch by up to a quarter of its side; None leaves it in its place.
        """
        index, reach = index.cpu(), self.size // 4
        first, room = self.places[index, 1:], self._room[index]
        if generator is not None:
            first = first + torch.randint(-reach, reach + 1, first.shape, generator=generator)
            first = torch.minimum(first.clamp(min=0), room)
        cuts = [
            (number, tuple(slice(f, f + self.size) for f in place))
            for number, place in zip(self.case_index[index].tolist(), first.tolist(), strict=True)
        ]
        images, labels = (torch.stack([whole[n][cut] for n, cut in cuts]) for whole in (self.images, self.labels))
        return images[:, None].float() / 255, labels.long()


Bank = SliceBank | VolumeBank


def build_bank(dataset: Dataset, classes: dict[str, int], preprocessing: Preprocessing) -> Bank:
    """Slices or volumes of all cases of a data set, on the CPU; see `kdlib.data.slices.build`."""
    if preprocessing.dimensions == 2:
        return slices.build(dataset, classes, preprocessing)
    geometry, images, labels = slices.read_cases(dataset, classes, preprocessing)
    volumes = (tuple(map(torch.from_numpy, arrays)) for arrays in (images, labels))
    patients = slices.patient_numbers(dataset)
    return VolumeBank(*volumes, tuple(geometry), tuple(classes), preprocessing.size, geometry, patients)
