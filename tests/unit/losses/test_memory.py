"""The memory bank: what it keeps, whom it admits, and what a checkpoint restores."""

from __future__ import annotations

import copy

import pytest
import torch

from kdlib.config import InputError
from kdlib.losses.memory import MemoryBank


def filled(size, counts, patients=(1, 2, 3), width=2):
    """A bank after pushes of `counts` vectors; vector number i is [i, i, ...], of label i % 4 and patient i % 3 + 1."""
    bank, number = MemoryBank(size), 0
    bank.allow_patients(patients)
    for count in counts:
        numbers = torch.arange(number, number + count)
        bank.push(numbers[:, None].expand(-1, width).float(), numbers % 4, numbers % 3 + 1)
        number += count
    return bank


@pytest.mark.parametrize("counts", [[], [3], [2, 3], [5], [3, 3], [2, 2, 2, 2], [7], [4, 13], [0, 2], [1] * 11])
def test_the_latest_are_kept_with_what_belongs_to_them(counts):
    size, total = 5, sum(counts)
    bank = filled(size, counts)
    vectors, labels, patients = bank.entries()
    assert len(bank) == len(vectors) == min(size, total)
    found = sorted(zip(vectors[:, :1].flatten().tolist(), labels.tolist(), patients.tolist(), strict=True))
    assert found == [(i, i % 4, i % 3 + 1) for i in range(max(0, total - size), total)]


def test_an_empty_bank_has_no_entries():
    assert [x.shape[0] for x in MemoryBank(4).entries()] == [0, 0, 0] and len(MemoryBank(4)) == 0


def test_vectors_are_detached_single_and_copied():
    bank = MemoryBank(4)
    bank.allow_patients([0])
    vectors = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    bank.push(vectors, torch.zeros(2).long(), torch.zeros(2).long())
    held = bank.entries()[0]
    assert held.dtype == torch.float32 and not held.requires_grad
    before = held.clone()
    bank.push(torch.rand(4, 3), torch.zeros(4).long(), torch.zeros(4).long())
    assert torch.equal(held, before)


def test_nothing_enters_before_admission():
    with pytest.raises(InputError, match="allow_patients"):
        MemoryBank(4).push(torch.rand(1, 2), torch.zeros(1).long(), torch.zeros(1).long())
    with pytest.raises(InputError, match="no patient"):
        MemoryBank(4).allow_patients([])


def test_a_patient_that_is_not_admitted_is_named_and_leaves_the_bank_as_it_was():
    bank = filled(4, [3])
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises(InputError, match=r"patients \[7, 9\]"):
        bank.push(torch.rand(3, 2), torch.zeros(3).long(), torch.tensor([9, 1, 7]))
    for name, value in bank.state_dict().items():
        assert torch.equal(value, before[name])


def test_admitting_fewer_than_are_held_is_refused():
    bank = filled(4, [3])
    with pytest.raises(InputError, match=r"patients \[3\]"):
        bank.allow_patients([1, 2])
    bank.allow_patients([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("vectors", "labels", "patients", "message"),
    [((3, 5), 3, 3, "width"), ((3, 2), 2, 3, "shapes"), ((3, 2), 3, 1, "shapes"), ((3, 2, 1), 3, 3, "shapes")],
)
def test_shapes_that_do_not_fit(vectors, labels, patients, message):
    with pytest.raises(InputError, match=message):
        filled(4, [2]).push(torch.rand(vectors), torch.ones(labels).long(), torch.ones(patients).long())


def test_a_bank_holds_something():
    with pytest.raises(InputError, match="the size of a memory is 0: give a whole number of 1 or more"):
        MemoryBank(0)


@pytest.mark.parametrize("counts", [[], [2], [4, 3]])
@pytest.mark.parametrize("used", [False, True])
def test_a_checkpoint_restores_the_bank(counts, used):
    bank = filled(5, counts)
    other = filled(5, [3], patients=[1, 2, 3, 8], width=6) if used else MemoryBank(5)
    other.load_state_dict(copy.deepcopy(bank.state_dict()))
    for a, b in zip(bank.entries(), other.entries(), strict=True):
        assert torch.equal(a, b)
    for both in (bank, other):  # it resumes where it was
        both.push(torch.ones(3, 2), torch.arange(3), torch.ones(3).long())
    for a, b in zip(bank.entries(), other.entries(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match=r"\[8\]"):
        other.push(torch.ones(1, 2), torch.zeros(1).long(), torch.tensor([8]))


def test_a_checkpoint_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        MemoryBank(4).load_state_dict(filled(5, [2]).state_dict())


def test_a_bank_inside_a_module_is_restored_too():
    outer, other = (torch.nn.ModuleDict({"bank": bank}) for bank in (filled(5, [4]), MemoryBank(5)))
    other.load_state_dict(outer.state_dict())
    assert torch.equal(other["bank"].entries()[0], outer["bank"].entries()[0])
