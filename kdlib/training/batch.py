"""What all runs of a cohort see in one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdlib.config import UNLABELLED, derive_seed
from kdlib.data import Bank, VolumeBank, augment
from kdlib.data.augment import per_image
from kdlib.models import CHANNELS_LAST
from kdlib.training.frozen import FrozenTeachers


@dataclass(frozen=True)
class Batch:
    """A batch of slices or patches, and what the teachers give for it.

    Args:
        images: B3HW or B1DHW in 0..1; labels: BH[WD] class indices; patients: [B] numbers of the images' patients.
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
        """The batch in parts of about equal size, each with its share of the labelled images, which come first."""
        return [
            replace(
                self,
                **{name: getattr(self, name)[i::parts] for name in ("images", "labels", "labelled", "patients")},
                teachers={who: {name: m[i::parts] for name, m in maps.items()} for who, maps in self.teachers.items()},
            )
            for i in range(parts)
        ]


def load_batch(bank: Bank, index: Tensor, seed: int, step: int, taught: FrozenTeachers) -> Batch:
    """Slices or patches `index` [B] of the bank, augmented by the step's own draws, and what the teachers give for
    them; where the teachers' batches come again, so do the draws."""
    drawn = step % taught.replay if taught.replay else step
    moves, changes = (torch.Generator().manual_seed(derive_seed(seed, what, drawn)) for what in ("patches", "augment"))
    images, labels = bank.batch(index, moves) if isinstance(bank, VolumeBank) else bank.batch(index)
    images, labels = augment(images, labels, changes)
    images = images.contiguous(memory_format=CHANNELS_LAST[bank.dims])
    labelled = bank.labelled[index]
    # also where the augmentation moved a border in
    labels = labels.masked_fill(~per_image(labelled, labels), UNLABELLED)
    return Batch(images, labels, labelled, bank.patient_of(index), step, taught(images, step))
