"""Trainings of a few steps on bright squares, and boxes that a network reads without fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import nn

from kdlib.config import Preprocessing, Profile, Run
from kdlib.data import Dataset, SliceBank, build_bank
from kdlib.experiments.recipes import thesis_recipe
from kdlib.models import Output
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
        images, labels, index // slices, tuple(f"c{i}" for i in range(cases)),
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


class Reader(nn.Module):
    """Finds class k of C where the image is k / C, in slices rolled by `shift` rows; `gain` sets how sure it is."""

    def __init__(self, classes: int, shift: int = 0, gain: float = 50.0):
        super().__init__()
        self.classes, self.shift = classes, shift
        self.gain = nn.Parameter(torch.tensor(gain))
        self.modes: list[bool] = []

    def forward(self, x, reconstruct=True):
        self.modes.append(self.training)
        assert not reconstruct and not torch.is_grad_enabled()
        level = x[:, :1].roll(self.shift, 2) * self.classes
        if self.classes == 1:
            return Output(self.gain * (level - 0.5), None)
        steps = torch.arange(self.classes + 1, device=x.device).view(1, -1, 1, 1)
        return Output(-self.gain * (level - steps).abs(), None)


def boxes(root: Path, spacing=(1.5, 2.0, 4.0), codes=("RAS", "PSL"), far=(1, 2)) -> Path:
    """Noise with two boxes as organs per volume, in several axis orders; only volumes `far` have the second organ."""
    names = [f"box_{number}" for number in range(1, len(codes) + 1)]
    for number, (name, code) in enumerate(zip(names, codes, strict=True), start=1):
        label = np.zeros((26, 24, 14), np.uint8)
        label[4:12, 5:20, 3:9], label[15:20, 6:13, 5:12] = 1, 2 * (number in far)
        own = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(code))
        noise = np.random.default_rng(number).normal(0, 100, label.shape).astype(np.int16)
        for part, volume in (("imagesTr", noise), ("labelsTr", label)):
            (root / part).mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(volume, np.diag([*spacing, 1]))
            nib.save(image.as_reoriented(own), root / part / f"{name}.nii.gz")
    listed = [{part: f"./{part}sTr/{name}.nii.gz" for part in ("image", "label")} for name in names]
    text = {"name": "Boxes", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "near", "2": "far"}}
    (root / "dataset.json").write_text(json.dumps(text | {"numTraining": len(listed), "training": listed}))
    return root


def painted(dataset: Dataset, target: str, view: Preprocessing | None = None) -> SliceBank:
    """A bank whose images are its labels, for `Reader`."""
    bank = build_bank(dataset, dataset.classes(target), view or Preprocessing(32))
    return dataclasses.replace(bank, images=bank.labels * (255 // len(bank.classes)))
