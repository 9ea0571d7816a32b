"""Vectors of earlier steps, kept as further keys of a contrast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.config import InputError
from kdlib.strict import AtLeastOne, checked


class MemoryBank(nn.Module):
    """A ring buffer of vectors, each with its label and patient (the queue of MoCo, He 2020, arXiv 1911.05722).

    Everything is held in buffers, so that a state_dict restores it, whatever the bank held before. The width of the
    vectors is that of the first push. The vectors are detached and kept in single precision.

    Args:
        size: most vectors to keep; the oldest are overwritten.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = checked("the size of a memory is", size, AtLeastOne)
        self.register_buffer("vectors", torch.zeros(size, 0))
        for name in ("labels", "patients"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64))
        # ever, so that its remainder is the next place
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("admitted", torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.pushed), self.size)

    def allow_patients(self, patients: Sequence[int]) -> None:
        """Says whose vectors may enter: the training patients of this fold. A later call replaces an earlier one.

        Raises: InputError: where no patient is given, or the bank holds vectors of a patient that is not among them.
        """
        admitted = torch.as_tensor(sorted({int(p) for p in patients}), dtype=torch.int64, device=self.admitted.device)
        if not len(admitted):
            raise InputError("no patient is admitted to the memory bank: give the training patients of this fold")
        self._refuse_others(self.entries()[2], admitted)
        self.admitted = admitted

    @torch.no_grad()
    def push(self, vectors: Tensor, labels: Tensor, patients: Tensor) -> None:
        """Keeps the vectors, detached; of more than `size` the last. Vectors that are not finite are left out.

        Args:
            vectors: [n, d], of the width of the first push.
            labels, patients: [n] int64.

        Raises:
            InputError: before `allow_patients`, for a patient that was not admitted, or where the shapes do not fit.
        """
        if not len(self.admitted):
            remedy = "call allow_patients with the training patients first"
            raise InputError(f"nothing may enter the memory bank yet: {remedy}")
        shapes = [list(x.shape) for x in (vectors, labels, patients)]
        if vectors.dim() != 2 or shapes[1:] != [shapes[0][:1]] * 2:
            raise InputError(f"vectors, labels and patients of shapes {shapes}: give [n, d], [n] and [n]")
        width = self.vectors.shape[1]
        if width == 0:
            self.vectors = self.vectors.new_zeros(self.size, vectors.shape[1])
        elif vectors.shape[1] != width:
            raise InputError(f"vectors of width {vectors.shape[1]} for a memory bank of width {width}: keep one width")
        device = self.vectors.device
        patients = patients.to(device)
        self._refuse_others(patients, self.admitted)
        finite = vectors.isfinite().all(1)  # one step of NaN would otherwise spoil every later one
        vectors, labels, patients = vectors[finite], labels.to(device)[finite.to(device)], patients[finite.to(device)]
        n = len(vectors)
        last = slice(max(0, n - self.size), n)
        place = (self.pushed + torch.arange(n, device=device)[last]) % self.size
        self.vectors[place] = vectors[last].to(self.vectors)
        self.labels[place] = labels[last]
        self.patients[place] = patients[last]
        self.pushed += n

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [m, d], labels [m] and patients [m] of what is held, in no order; d is 0 before a push.

        They are copies: a loss computed from them can still go backward after the next push.
        """
        held = slice(0, len(self))
        return tuple(x[held].clone() for x in (self.vectors, self.labels, self.patients))

    @staticmethod
    def _refuse_others(patients: Tensor, admitted: Tensor) -> None:
        others = patients[~torch.isin(patients, admitted)].unique().tolist()
        if others:
            raise InputError(f"patients {others} are not admitted to the memory bank: only training patients may enter")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}steps", None)  # of an older version
        for name in ("vectors", "admitted"):  # the two whose shape a new bank cannot know
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and (name == "admitted" or saved.shape[0] == self.size):
                setattr(self, name, own.new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
