"""From slices on disk or in memory to a batch on the device: kdlib's bank against MONAI's cache and a folder of PNGs.

    python benchmarks/slices.py [--quick] [--device cpu]

The same slices (of the phantom, 256 x 256, 8 bit) three ways, each to batches of 16 images [3,H,W] with labels, both
moved by one random affine: `SliceBank.batch` and `augment`, which also draws gamma, contrast, brightness and noise, on
the batch as a whole; MONAI's `CacheDataset` with `RandAffined` on every slice, in one process; and PNG files read by a
`DataLoader` of two workers, turned by Pillow. On a GPU the first works there, the others end with a copy to it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from measure import NO_GPU, Record, faster, in_turns, must_agree, run_alone, unmeasured
from monai.data import CacheDataset, DataLoader, set_track_meta
from monai.transforms import Affine, RandAffined
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kdlib.config import Preprocessing
from kdlib.data import SliceBank, augment, build_bank, index, make_phantom
from kdlib.data.augment import ROTATION, SCALE, SHIFT, warp

BATCH = 16


def affine(size: int) -> RandAffined:
    """MONAI's transform with kdlib's ranges."""
    turn, shift = np.pi * ROTATION / 180, SHIFT * size
    return RandAffined(
        ["image", "label"], prob=1.0, rotate_range=turn, scale_range=(SCALE[0] - 1, SCALE[1] - 1),
        translate_range=shift, mode=("bilinear", "nearest"), padding_mode="zeros",
    )  # fmt: skip


class Files(Dataset):
    """Slices as PNG files, read and turned one by one."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        angle, found = float(np.random.uniform(-ROTATION, ROTATION)), []
        for kind, how in (("image", Image.Resampling.BILINEAR), ("label", Image.Resampling.NEAREST)):
            with Image.open(self.folder / f"{kind}-{i}.png") as file:
                found.append(torch.from_numpy(np.array(file.rotate(angle, how))))
        return found[0][None].expand(3, -1, -1).float() / 255, found[1].long()


def slices_of(folder: Path, size: int, patients: int) -> SliceBank:
    dataset = index(make_phantom(folder / "phantom", patients=patients))
    return build_bank(dataset, dataset.classes("spleen"), Preprocessing(size, 2.0))


def endless(batches: Callable[[], Iterator]) -> Callable[[], object]:
    """A function that gives the next batch, over and over."""
    state = {"now": batches()}

    def following() -> object:
        try:
            return next(state["now"])
        except StopIteration:
            state["now"] = batches()
            return next(state["now"])

    return following


def check_affine(bank: SliceBank) -> float:
    """Mean difference of a slice turned by kdlib's batched warp and by MONAI's `Affine`, in 0..1."""
    images, labels = bank.batch(torch.tensor([len(bank) // 2]))
    turned, _ = warp(images, labels, torch.tensor([10.0]), torch.tensor([1.1]), torch.zeros(1, 2))
    theirs, _ = Affine(
        rotate_params=np.pi * 10 / 180, scale_params=(1 / 1.1, 1 / 1.1), padding_mode="zeros", mode="bilinear"
    )(images[0])  # fmt: skip
    return float((torch.as_tensor(theirs) - turned[0]).abs().mean())


def measure(record: Record) -> None:
    device = record.device
    size, patients = (32, 8) if record.quick else (256, 12)
    set_track_meta(False)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bank = slices_of(folder, size, patients)
        number = min(len(bank), 32 if record.quick else 320)
        for i in range(number):
            Image.fromarray(bank.images[i].numpy()).save(folder / f"image-{i}.png")
            Image.fromarray(bank.labels[i].numpy()).save(folder / f"label-{i}.png")
        items = [
            {"image": bank.images[i][None].expand(3, -1, -1).float() / 255, "label": bank.labels[i][None].float()}
            for i in range(number)
        ]
        must_agree("affine of a slice, against MONAI's", check_affine(bank), 2e-2)
        resident, generator = bank.to(device), torch.Generator().manual_seed(0)
        cache = CacheDataset(items, affine(size), cache_rate=1.0, num_workers=0, progress=False)

        def banked() -> object:
            drawn = torch.randint(number, (BATCH,), generator=generator).to(device)
            return augment(*resident.batch(drawn), generator)

        cached = endless(lambda: iter(DataLoader(cache, batch_size=BATCH, shuffle=True, drop_last=True)))
        files = torch.utils.data.DataLoader(
            Files(folder, number), BATCH, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
        )
        read = endless(lambda: iter(files))

        def moved(following: Callable[[], object]) -> Callable[[], object]:
            def run() -> object:
                batch = following()
                return [part.to(device) for part in (batch.values() if isinstance(batch, dict) else batch)]

            return run

        count = 1 if record.quick else 10  # batches of one measurement: workers read ahead

        def many(function: Callable[[], object]) -> Callable[[], object]:
            return lambda: [function() for _ in range(count)]

        variants = {"kdlib": many(banked), "monai": many(moved(cached)), "files": many(moved(read))}
        taken = {name: value / count for name, value in in_turns(variants, device).items()}
    what = f"6 batch of {BATCH} slices of {size} x {size}"
    set_track_meta(True)
    record.add(faster(f"{what}, against CacheDataset with RandAffined", taken["kdlib"], taken["monai"], 5))
    record.add(faster(f"{what}, against a DataLoader of PNG files", taken["kdlib"], taken["files"], 15))
    if device.type == "cpu":
        record.add(unmeasured("6 waiting of the GPU for slices", "at most 2 %", NO_GPU))


if __name__ == "__main__":
    run_alone("slices", measure, __doc__)
