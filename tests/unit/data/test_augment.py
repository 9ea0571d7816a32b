"""Augmentation: reproducible, image and label together, never mirrored."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from scipy import ndimage

from kdlib.data.augment import adjust, augment, warp

module = importlib.import_module("kdlib.data.augment")  # the package has a function of this name


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _disc(size: int, row: float, column: float, radius: float) -> torch.Tensor:
    """[size,size] int64 mask of a disc, its centre in pixels."""
    axis = torch.arange(size)
    return ((axis[:, None] - row) ** 2 + (axis - column) ** 2 < radius**2).long()


def _centre(mask: torch.Tensor) -> tuple[float, float]:
    return ndimage.center_of_mass(mask.double().numpy())


def _still(batch: int):
    return torch.zeros(batch), torch.ones(batch), torch.zeros(batch, 2)


def test_the_same_generator_state_gives_the_same_bits_and_another_does_not():
    images, labels = torch.rand(4, 3, 32, 32, generator=_generator(1)), torch.ones(4, 32, 32, dtype=torch.int64)
    first, second = augment(images, labels, _generator()), augment(images, labels, _generator())
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], augment(images, labels, _generator(2))[0])


def test_no_random_number_but_the_generators_is_drawn():
    images, labels = torch.rand(2, 3, 32, 32), torch.ones(2, 32, 32, dtype=torch.int64)
    state = torch.get_rng_state()
    augment(images, labels, _generator())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_shapes_types_and_range_are_kept_and_the_input_is_not_touched(dtype):
    images = torch.rand(16, 3, 32, 32, generator=_generator(1)).round()  # extremes only
    labels = torch.randint(0, 4, (16, 32, 32), generator=_generator(2)).to(dtype)
    before = images.clone(), labels.clone()
    moved, mask = augment(images, labels, _generator())
    assert moved.shape == images.shape and moved.dtype == torch.float32
    assert mask.shape == labels.shape and mask.dtype == dtype
    assert 0 <= moved.min() and moved.max() <= 1 and moved.isfinite().all()
    assert set(mask.unique().tolist()) <= {0, 1, 2, 3}
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])


def test_the_images_of_a_batch_are_augmented_each_in_its_own_way():
    images = torch.rand(1, 3, 32, 32, generator=_generator()).expand(6, -1, -1, -1)
    moved, _ = augment(images, torch.zeros(6, 32, 32, dtype=torch.int64), _generator())
    assert all(not torch.equal(moved[0], other) for other in moved[1:])


def test_a_repeated_slice_stays_repeated():
    images = torch.rand(4, 1, 32, 32, generator=_generator()).expand(-1, 3, -1, -1)
    moved, _ = augment(images, torch.zeros(4, 32, 32, dtype=torch.int64), _generator())
    assert torch.equal(moved[:, 0], moved[:, 1]) and torch.equal(moved[:, 0], moved[:, 2])


def test_no_movement_is_the_identity():
    images = torch.rand(2, 3, 48, 48, generator=_generator())
    labels = torch.randint(0, 5, (2, 48, 48), generator=_generator())
    moved, mask = warp(images, labels, *_still(2))
    torch.testing.assert_close(moved, images, atol=1e-5, rtol=0)
    assert torch.equal(mask, labels)


def test_neutral_intensities_are_the_identity():
    images = torch.rand(2, 3, 16, 16, generator=_generator())
    one = torch.ones(2)
    torch.testing.assert_close(adjust(images, one, one, 0 * one, torch.zeros(1)), images, atol=1e-6, rtol=0)


def test_intensities_by_hand():
    images = torch.tensor([0.0, 0.25, 0.81, 1.0]).view(1, 1, 2, 2)
    adjusted = adjust(images, *(torch.tensor([value]) for value in (0.5, 0.8, 0.05)), torch.full((1, 1, 2, 2), 0.01))
    # (0, 0.5, 0.9, 1 after the root; - 0.5) * 0.8 + 0.5 + 0.06
    torch.testing.assert_close(adjusted.flatten(), torch.tensor([0.16, 0.56, 0.88, 0.96]))
    assert adjust(images, *(torch.tensor([value]) for value in (1.0, 1.2, 0.5)), torch.zeros(1)).max() == 1


def test_all_ranges_at_zero_change_nothing(monkeypatch):
    for name, value in {"ROTATION": 0.0, "SHIFT": 0.0, "BRIGHTNESS": 0.0, "NOISE": 0.0}.items():
        monkeypatch.setattr(module, name, value)
    for name in ("SCALE", "GAMMA", "CONTRAST"):
        monkeypatch.setattr(module, name, (1.0, 1.0))
    images = torch.rand(3, 3, 32, 32, generator=_generator())
    labels = torch.randint(0, 3, (3, 32, 32), generator=_generator())
    moved, mask = augment(images, labels, _generator())
    torch.testing.assert_close(moved, images, atol=1e-5, rtol=0)
    assert torch.equal(mask, labels)


def test_image_and_label_move_together(monkeypatch):
    for name, value in {"BRIGHTNESS": 0.0, "NOISE": 0.0}.items():
        monkeypatch.setattr(module, name, value)
    for name in ("GAMMA", "CONTRAST"):
        monkeypatch.setattr(module, name, (1.0, 1.0))
    labels = _disc(64, 40, 22, 11).expand(24, -1, -1)
    moved, mask = augment(labels[:, None].float().expand(-1, 3, -1, -1), labels, _generator())
    seen = (moved[:, 0] > 0.5).long()
    dice = 2 * (seen * mask).sum((1, 2)) / (seen.sum((1, 2)) + mask.sum((1, 2)))
    assert dice.min() > 0.97
    centres = [_centre(each) for each in mask]
    assert max(row for row, _ in centres) - min(row for row, _ in centres) > 4  # they did move


@pytest.mark.parametrize(
    "angle, scale, shift, expected",
    [
        (0.0, 1.0, (0.125, 0.0), (31.5, 51.5)),  # 8 pixels to the right
        (0.0, 1.0, (0.0, -0.25), (15.5, 43.5)),  # 16 pixels up
        (0.0, 1.5, (0.0, 0.0), (31.5, 49.5)),  # 12 right of the centre becomes 18
        (90.0, 1.0, (0.0, 0.0), (43.5, 31.5)),  # clockwise: from the right to the bottom
        (30.0, 1.0, (0.0, 0.0), (31.5 + 6, 31.5 + 12 * math.cos(math.pi / 6))),
        (90.0, 1.5, (0.125, 0.0), (49.5, 39.5)),  # shifted after it was turned and scaled
    ],
)
def test_movements_by_hand(angle, scale, shift, expected):
    labels = _disc(64, 31.5, 43.5, 6)[None]  # 12 pixels to the right of the centre
    _, mask = warp(labels[:, None].float(), labels, torch.tensor([angle]), torch.tensor([scale]), torch.tensor([shift]))
    assert _centre(mask[0]) == pytest.approx(expected, abs=0.35)
    assert mask.sum().item() == pytest.approx(labels.sum().item() * scale**2, rel=0.08)


def test_movements_stay_within_their_limits():
    labels = _disc(128, 63.5, 63.5, 30).expand(200, -1, -1)
    _, mask = augment(labels[:, None].float(), labels, _generator())
    shifts = torch.tensor([_centre(each) for each in mask]) - 63.5
    areas = mask.sum((1, 2)) / labels[0].sum()
    assert shifts.abs().max() < 0.06 * 128 + 0.3 and shifts.abs().max() > 0.05 * 128
    assert 0.85**2 - 0.02 < areas.min() < 0.8 and 1.25 < areas.max() < 1.15**2 + 0.02


def test_left_and_right_are_never_swapped():
    # a small disc to the right of a large one, both near the middle row
    labels = _disc(64, 31.5, 18, 11) + 2 * _disc(64, 31.5, 46, 5)
    _, mask = augment(labels[None, None].expand(100, -1, -1, -1) / 2, labels.expand(100, -1, -1), _generator())
    assert all(_centre(each == 2)[1] > _centre(each == 1)[1] + 15 for each in mask)


def test_what_comes_in_from_outside_is_background():
    labels = torch.ones(1, 32, 32, dtype=torch.int64)
    images, mask = warp(torch.ones(1, 1, 32, 32), labels, *_still(1)[:2], torch.tensor([[0.25, 0.0]]))
    assert (mask[..., :8] == 0).all() and (mask[..., 8:] == 1).all()
    assert (images[..., :7] == 0).all() and images[..., 8:].min() > 1 - 1e-5


@pytest.mark.gpu
def test_the_gpu_sees_the_same_draws():
    images, labels = torch.rand(4, 3, 32, 32), torch.ones(4, 32, 32, dtype=torch.int64)
    on_cpu = augment(images, labels, _generator())
    on_gpu = augment(images.cuda(), labels.cuda(), _generator())
    torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0], atol=1e-4, rtol=0)
    assert (on_gpu[1].cpu() != on_cpu[1]).float().mean() < 1e-3  # a nearest pixel at a tie
