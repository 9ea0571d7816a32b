"""Time from files to 99 % of the final validation Dice: kdlib against a plain training loop of MONAI.

    python benchmarks/convergence.py --data FOLDER [--target all] [--profile hippocampus] [--model S2] [--seeds 0]
    python benchmarks/convergence.py --data phantom --target spleen --profile quick --quick

Both read the volumes of one fold, keep them in memory, train the same network with the same optimiser, schedule, share
of slices with target, number of steps and validations, and are timed from the first file on. The plain loop is what
MONAI's tutorials do: dictionary transforms, `CacheDataset`, random transforms on every slice, `ThreadDataLoader`, eager
float32. Trainings of one seed run one after the other, who begins alternates; the target Dice is 99 % of the lower of
the two final ones. This takes as long as two trainings (a quarter of an hour on two cores), so `make bench`
leaves it out
unless LONG=1 and DATA are given.

With `--replay N` also kdlib's own ways of distilling: every batch drawn anew, and N batches that come again with the
teacher's kept logits (row 3).
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import Record, Row, faster, options
from monai.data import CacheDataset, ThreadDataLoader, set_track_meta
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandAdjustContrastd,
    RandAffined,
    RandGaussianNoised,
    ResizeWithPadOrCropd,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Spacingd,
)
from torch.utils.data import WeightedRandomSampler

from kdlib.config import Run, TrainingError, override_profile
from kdlib.data.augment import ROTATION, SCALE, SHIFT
from kdlib.experiments.recipes import prediction_recipe
from kdlib.experiments.source import run_bank, run_source
from kdlib.experiments.store import untrained
from kdlib.losses import predict
from kdlib.models import build_model
from kdlib.training.device import pick_device
from kdlib.training.loop import train_cohort
from kdlib.training.schedule import epochs_of, optimiser_of, steps_per_epoch

Course = list[tuple[float, float]]  # of validations: seconds since the start, Dice
BOTH = ["image", "label"]


def kdlib_course(run: Run, results: Path, device: torch.device) -> Course:
    """kdlib's own training."""
    begin, course = time.perf_counter(), []
    fold, bank = run_source(run, results).folds[run.fold], run_bank(run, results)
    train, val = bank.select(fold.subset(run.fraction)).to(device), bank.select(fold.val).to(device)
    slices = len(bank.select(fold.train))
    # untrained: it takes as long
    teachers = {name: untrained(each, len(bank.classes), device) for name, each in run.teacher_runs().items()}

    def validated(states: list) -> None:
        dice = next(row["value"] for row in states[0].history[::-1] if row["name"] == "val_dice")
        course.append((time.perf_counter() - begin, dice))

    (state,) = train_cohort(
        [run], train, val, steps_per_epoch(run, slices), device, teachers, epochs_of(run, slices), on_epoch=validated
    )
    if state.failure is not None:
        raise TrainingError(str(state.failure))
    return course


def transforms(run: Run, modality: str) -> Compose:
    """A volume as the profile's slices show it, by MONAI's transforms."""
    view = run.preprocessing
    if modality == "MR":
        low, high = view.percentiles
        scale = ScaleIntensityRangePercentilesd("image", low, high, 0, 1, clip=True)
    else:
        scale = ScaleIntensityRanged("image", *view.window, 0, 1, clip=True)
    spacing = [Spacingd(BOTH, (view.spacing, view.spacing, -1), mode=("bilinear", "nearest"))] if view.spacing else []
    return Compose([
        LoadImaged(BOTH), EnsureChannelFirstd(BOTH), Orientationd(BOTH, axcodes="LPS", labels=None), *spacing, scale,
        ResizeWithPadOrCropd(BOTH, (view.size, view.size, -1)),
    ])  # fmt: skip


def slice_items(volume: dict) -> list[dict]:
    """Slices of a volume [1,H,W,D], each with its neighbours as channels."""
    image, label = (torch.as_tensor(volume[name])[0].movedim(-1, 0) for name in BOTH)
    padded = torch.cat([image[:1], image, image[-1:]])
    return [
        {"image": padded[i : i + 3].float().contiguous(), "label": label[i][None].float()} for i in range(len(image))
    ]


def monai_course(run: Run, results: Path, device: torch.device) -> Course:
    """The plain loop."""
    begin, course, how = time.perf_counter(), [], run.optimisation
    found = run_source(run, results)
    fold, number = found.folds[run.fold], len(found.classes)
    values = list(found.classes.values())
    set_track_meta(True)
    read = transforms(run, found.dataset.modality)

    def volumes(names: tuple[str, ...]) -> list[dict]:
        made = []
        for case in found.dataset.cases:
            if case.name in names:
                volume = read({"image": str(case.image), "label": str(case.label)})
                label = torch.zeros_like(volume["label"])
                for index, value in enumerate(values, start=1):
                    label[volume["label"] == value] = index
                made.append({"image": volume["image"].as_tensor(), "label": label.as_tensor()})
        return made

    train = [item for volume in volumes(fold.subset(run.fraction)) for item in slice_items(volume)]
    val = [slice_items(volume) for volume in volumes(fold.val)]
    set_track_meta(False)
    size = run.preprocessing.size
    shift, turn = SHIFT * size, np.pi * ROTATION / 180
    random = Compose([
        RandAffined(
            BOTH, prob=1.0, rotate_range=turn, scale_range=(SCALE[0] - 1, SCALE[1] - 1), translate_range=shift,
            mode=("bilinear", "nearest"), padding_mode="zeros",
        ),
        RandAdjustContrastd("image", prob=1.0, gamma=(0.8, 1.25)), RandGaussianNoised("image", prob=1.0, std=0.04),
    ])  # fmt: skip
    holds = torch.tensor([float(item["label"].max()) > 0 for item in train])
    share = how.target_share or float(holds.float().mean())
    weights = torch.where(holds, share / holds.sum(), (1 - share) / (~holds).sum().clamp(min=1))
    steps, epochs = steps_per_epoch(run, len(train)), epochs_of(run, len(train))
    cached = CacheDataset(train, random, num_workers=0, progress=False)
    generator = torch.Generator().manual_seed(run.seed)
    sampler = WeightedRandomSampler(weights.double(), steps * how.batch, generator=generator)
    loader = ThreadDataLoader(cached, batch_size=how.batch, num_workers=0, sampler=sampler)
    torch.manual_seed(run.seed)
    model = build_model(run.model, classes=number).to(device)
    optimiser, schedule = optimiser_of(run, model.parameters(), steps * epochs)
    several = number > 1
    loss = DiceCELoss(
        include_background=not several, to_onehot_y=several, softmax=several, sigmoid=not several, batch=True
    )
    for _ in range(epochs):
        model.train()
        for batch in loader:
            images, labels = batch["image"].to(device), batch["label"].to(device)
            optimiser.zero_grad()
            loss(model(images).segmentation, labels).backward()
            optimiser.step()
            schedule.step()
        model.eval()
        metric = DiceMetric(include_background=False, ignore_empty=False, num_classes=number + 1)
        with torch.no_grad():
            for volume in val:
                images = torch.stack([item["image"] for item in volume]).to(device)
                guess = torch.cat([predict(model(part).segmentation) for part in images.split(32)])
                truth = torch.cat([item["label"] for item in volume]).to(device)
                metric(guess[None, None].float(), truth[None, None])
        course.append((time.perf_counter() - begin, float(metric.aggregate())))
    return course


def until(course: Course, dice: float) -> float:
    return next(taken for taken, reached in course if reached >= dice)


def measure(record: Record, data: str, target: str, profile: str, model: str, seeds: list[int], replay: int) -> None:
    changes = {"student_epochs": 3, "student_steps": 4, "size": 32, "spacing": 10.0} if record.quick else {}
    device = record.device
    record.seconds, record.dice = [], []
    with tempfile.TemporaryDirectory() as place:
        results = Path(place)
        for number, seed in enumerate(seeds):
            run = Run(data, target, model, profile=override_profile(profile, changes), seed=seed)
            run_source(run, results)  # folds are found once, for both
            ways = {"kdlib": kdlib_course, "monai": monai_course}
            found = {}
            for name in (list(ways), list(ways)[::-1])[number % 2]:
                run_bank.__globals__["_bank"].cache_clear()  # kdlib reads the files again
                found[name] = ways[name](run, results, device)
                last = found[name][-1]
                record.say(f"seed {seed}, {name}: {last[0]:.0f} s, final Dice {last[1]:.3f}")
            aim = 0.99 * min(course[-1][1] for course in found.values())
            record.seconds.append([until(found["kdlib"], aim), until(found["monai"], aim)])
            record.dice.append([found["kdlib"][-1][1], found["monai"][-1][1]])
            for name, course in found.items():
                record.note(f"seed {seed} {name}", course)
        ours, other = (statistics.median(column) for column in zip(*record.seconds, strict=True))
        what = f"10 time to 99 % of the final Dice, {model}, {Path(data).name}, {len(seeds)} seeds"
        record.add(faster(what, ours, other, 2))
        dice = [statistics.mean(column) for column in zip(*record.dice, strict=True)]
        record.add(Row("10 final validation Dice, kdlib and MONAI's loop", dice[0], "Dice", dice[1], dice[1] / dice[0]))
        if replay:
            replayed(record, data, target, profile, model, seeds, replay, changes, results)


def replayed(record: Record, data, target, profile, model, seeds, replay, changes, results) -> None:
    """Distilled on predictions of an untrained teacher, which takes as long; alone, Dice of both ways."""
    dice: dict[str, list[float]] = {"anew": [], "replayed": []}
    taken: dict[str, list[float]] = {"anew": [], "replayed": []}
    for seed in seeds:
        sized = override_profile(profile, changes)
        for name, batches in (("anew", None), ("replayed", replay)):
            student = dataclasses.replace(sized.student, replay=batches)
            own = dataclasses.replace(sized, student=student)
            for teacher in (None, "T1"):
                recipe = prediction_recipe() if teacher else None
                run = Run(data, target, model, profile=own, seed=seed, teacher=teacher, recipe=recipe)
                course = kdlib_course(run, results, record.device)
                if teacher:
                    taken[name].append(course[-1][0])
                else:
                    dice[name].append(course[-1][1])
        record.say(f"seed {seed}: Dice {dice['anew'][-1]:.3f} anew, {dice['replayed'][-1]:.3f} replayed")
    what = f"3 training of a distilled {model}, {replay} batches that come again with their logits kept"
    record.add(faster(what, *(statistics.median(taken[name]) for name in ("replayed", "anew"))))
    means = [statistics.mean(dice[name]) for name in ("replayed", "anew")]
    record.add(
        Row(
            f"3 validation Dice of {model} alone on {replay} batches, and anew",
            means[0],
            "Dice",
            means[1],
            means[1] / means[0],
        )
    )


def main() -> None:
    own = dict(target=dict(default="all"), profile=dict(default="hippocampus"), model=dict(default="S2"))
    own |= dict(seeds=dict(type=int, nargs="+", default=[0]), replay=dict(type=int, default=0))
    given = options(__doc__, data=dict(required=True), **own)
    record = Record(given.output, pick_device(given.device), given.quick)
    record.start("convergence")
    measure(record, given.data, given.target, given.profile, given.model, given.seeds, given.replay)
    record.write()


if __name__ == "__main__":
    main()
