"""Trainings of a few steps on bright squares, for the tests that train."""

from __future__ import annotations

import torch

from kdlib.config import Preprocessing, Profile, Run
from kdlib.data import SliceBank
from kdlib.experiments.recipes import thesis_recipe
from kdlib.training.loop import train_cohort
from kdlib.training.state import new_model

CPU = torch.device("cpu")
TINY = Profile("tiny", Preprocessing(32), 0.125, 2, 2, 3, 3, folds=4)


def blobs(cases: int = 2, slices: int = 6, seed: int = 0, classes: int = 1) -> SliceBank:
    """Bright squares on noise: something a network can learn within a few steps."""
    generator = torch.Generator().manual_seed(seed)
    n = cases * slices
    images = torch.randint(0, 80, (n, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.zeros(n, 32, 32, dtype=torch.uint8)
    for i in range(n):
        top, left = torch.randint(2, 18, (2,), generator=generator).tolist()
        labels[i, top : top + 12, left : left + 12] = 1 + i % classes
    images[labels > 0] += 120
    index = torch.arange(n)
    return SliceBank(
        images, labels, index // slices, torch.stack([index, index], 1), tuple(f"c{i}" for i in range(cases)),
        tuple(f"class{i}" for i in range(classes)), "repeat", {}, tuple(range(cases)),
    )  # fmt: skip


def run_of(model: str = "S1", **changes) -> Run:
    return Run("phantom", "spleen", model, profile=TINY, **changes)


def distilled(only=("E-E", "B-B", "D-D", "PMD"), loss="supcon", model="S1", seed=0) -> Run:
    return run_of(model, teacher="T1", recipe=thesis_recipe(model, loss, only), fraction=0.5, seed=seed)


def frozen_teacher() -> dict[str, torch.nn.Module]:
    return {"T1": new_model(run_of("T1"), 1).eval().requires_grad_(False)}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_one(run: Run, teachers=None, **kwargs):
    return train_cohort([run], blobs(), blobs(1, seed=9), 3, CPU, teachers, **kwargs)[0]
