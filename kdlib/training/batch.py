"""What all runs of a cohort see in one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdlib.config import UNLABELLED, derive_seed
from kdlib.data import SliceBank, augment


@dataclass(frozen=True)
class Batch:
    """A batch of slices, and what the teachers give for it.

    Args:
        images: B3HW in 0..1; labels: BHW class indices; patients: [B] numbers of the images' patients.
        labelled: [B] bool; labels of other images are `UNLABELLED` throughout.
        step: number of the step, for the terms that draw pixels.
        teachers: teacher -> its features and logits on the same images; empty without a teacher.
    """

    images: Tensor
    labels: Tensor
    labelled: Tensor
    patients: Tensor
    step: int
    teachers: Mapping[str, Mapping[str, Tensor]]

    def split(self, parts: int) -> list[Batch]:
        """The batch in parts of about equal size."""

        def part(i: int, tensor: Tensor) -> Tensor:
            return tensor.tensor_split(parts)[i]

        return [
            replace(
                self,
                **{name: part(i, getattr(self, name)) for name in ("images", "labels", "labelled", "patients")},
                teachers={who: {name: part(i, m) for name, m in maps.items()} for who, maps in self.teachers.items()},
            )
            for i in range(parts)
        ]


def load_batch(bank: SliceBank, index: Tensor, seed: int, step: int) -> Batch:
    """Slices `index` [B] of the bank, augmented by the step's own draws; without what the teachers give."""
    images, labels = bank.batch(index)
    images, labels = augment(images, labels, torch.Generator().manual_seed(derive_seed(seed, "augment", step)))
    images = images.contiguous(memory_format=torch.channels_last)
    labelled = bank.labelled[index]
    labels = labels.masked_fill(~labelled[:, None, None], UNLABELLED)  # also where the augmentation moved a border in
    return Batch(images, labels, labelled, bank.patient_of(index), step, {})
