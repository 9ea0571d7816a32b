"""Slices of volumes and the way back: orientation, spacing, field of view, intensities, bank."""

from __future__ import annotations

import dataclasses
import itertools
import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import orientations
from scipy import ndimage
from torch.nn import functional

from kdlib.config import InputError, Preprocessing
from kdlib.data.decathlon import Case, Dataset
from kdlib.data.slices import SliceBank, build, place_case, restore

ORIENTATIONS = [
    "".join(code)
    for pairs in itertools.permutations([("R", "L"), ("A", "P"), ("S", "I")])
    for code in itertools.product(*pairs)
]


def _save(folder, name, image, label, spacing=(1.0, 1.0, 1.0), axes="RAS") -> Case:
    """One case whose arrays are given in RAS, stored in the orientation `axes`; spacing is along R, A, S."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-11.0, 7.0, 30.0)
    stored = []
    for part, array in (("image", image), ("label", label)):
        file = nib.Nifti1Image(array, affine)
        turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(axes))
        file = file.as_reoriented(turn)
        stored.append(folder / f"{name}_{axes}_{part}.nii.gz")
        nib.save(file, stored[-1])
    zooms = tuple(float(z) for z in file.header.get_zooms())
    return Case(name, *stored, name, file.shape, zooms)


def _dataset(*cases, modality="CT", root="there") -> Dataset:
    defects = pd.DataFrame(columns=["case", "file", "defect", "remedy"])
    return Dataset("Test", root, modality, {"spleen": 1, "liver": 6}, cases, defects)


def _one_hot(labels: torch.Tensor, channels: int) -> torch.Tensor:
    """[D,H,W] -> [channels,D,H,W]."""
    return functional.one_hot(labels.long(), channels).movedim(-1, 0).float()


def _dice(a, b) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def _blob(shape, spacing, seed=0) -> np.ndarray:
    """A smooth irregular label near the middle of a volume."""
    noise = np.random.default_rng(seed).normal(size=shape)
    noise = ndimage.gaussian_filter(noise, [9 / s for s in spacing])
    grid = np.meshgrid(*[(np.arange(n) - n * 0.45) * s for n, s in zip(shape, spacing)], indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in grid))
    return (radius + 4 * noise / noise.std() < 32).astype(np.uint8)


def _random(shape, seed=0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(-125, 276, shape).astype(np.int16), rng.choice([0, 1, 6], shape).astype(np.uint8)


CLASSES = {"spleen": 1, "liver": 6}


# --- layout and orientation


def test_row_0_is_anterior_column_0_is_right_and_slices_go_up(tmp_path):
    label = np.zeros((16, 16, 4), np.uint8)
    label[14, 13, 3] = 1  # right (R is the last of RAS's first axis), anterior, superior
    label[2, 1, 0] = 6  # left, posterior, inferior
    bank = build(_dataset(_save(tmp_path, "a", label.astype(np.int16), label)), CLASSES, Preprocessing(16))
    assert torch.nonzero(bank.labels == 1).tolist() == [[3, 16 - 1 - 13, 16 - 1 - 14]]
    assert torch.nonzero(bank.labels == 2).tolist() == [[0, 14, 13]]


@pytest.mark.parametrize("axes", ORIENTATIONS)
@pytest.mark.parametrize("spacing", [None, 1.3])
def test_every_orientation_gives_one_bank_and_comes_back_as_it_was(tmp_path, axes, spacing):
    image, label = _random((15, 12, 5))
    view = Preprocessing(16, spacing)
    zooms = (0.8, 1.1, 3.0)
    reference = build(_dataset(_save(tmp_path, "a", image, label, zooms)), CLASSES, view)
    case = _save(tmp_path, "a", image, label, zooms, axes)
    bank = build(_dataset(case), CLASSES, view)
    assert torch.equal(bank.images, reference.images) and torch.equal(bank.labels, reference.labels)
    assert len(bank) == 5 == place_case(case, view).depth and place_case(case, view) == bank.geometry["a"]
    stored = np.asarray(nib.load(case.label).dataobj)
    back = restore(_one_hot(bank.labels, 3), bank.geometry["a"]).argmax(0).numpy()
    assert back.shape == stored.shape == case.shape
    if spacing is None:
        np.testing.assert_array_equal(np.array([0, 1, 6])[back], stored)


# --- in-plane spacing and field of view


@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(st.integers(3, 40), st.integers(3, 40), st.integers(1, 3)), size=st.sampled_from([16, 32, 48]))
def test_own_spacing_is_exact_inside_and_background_outside(tmp_path_factory, shape, size):
    image, label = _random(shape)
    bank = build(_dataset(_save(tmp_path_factory.mktemp("own"), "a", image, label)), CLASSES, Preprocessing(size))
    back = restore(_one_hot(bank.labels, 3), bank.geometry["a"])
    one_channel = restore((bank.labels == 1)[None].float(), bank.geometry["a"])[0]
    kept = np.zeros(shape, bool)
    # slices count from anterior and right, the far ends of A and R
    first = [shape[axis] - size + (size - shape[axis]) // 2 for axis in (0, 1)]
    kept[tuple(slice(max(f, 0), max(f, 0) + size) if n > size else slice(None) for f, n in zip(first, shape))] = True
    truth = np.where(kept, np.searchsorted([0, 1, 6], label), 0)
    np.testing.assert_array_equal(back.argmax(0).numpy(), truth)
    np.testing.assert_array_equal(one_channel.numpy(), truth == 1)
    torch.testing.assert_close(back.sum(0), torch.ones(shape))  # still probabilities


@pytest.mark.parametrize("spacing, zooms", [(3.0, (1.3, 1.3, 3.0)), (3.0, (1.1, 1.7, 5.0)), (1.5, (2.0, 2.5, 4.0))])
def test_round_trip_of_a_smooth_blob(tmp_path, spacing, zooms):
    shape = tuple(round(100 / z) for z in zooms)
    label = _blob(shape, zooms)
    case = _save(tmp_path, "a", label.astype(np.int16), label, zooms, "LAS")
    bank = build(_dataset(case), {"spleen": 1}, Preprocessing(96, spacing))
    stored = np.asarray(nib.load(case.label).dataobj) == 1
    back = restore(bank.labels[None].float(), bank.geometry["a"])[0].numpy()
    assert _dice(back > 0.5, stored) > 0.97
    mirrored = stored[::-1]
    assert _dice(back > 0.5, mirrored) < 0.9  # the blob is off the middle, so a mirrored one would be noticed
    centre = np.array(ndimage.center_of_mass(back > 0.5)) - ndimage.center_of_mass(stored)
    assert np.abs(centre * zooms)[:2].max() < 0.5 * spacing


@pytest.mark.parametrize("zooms, spacing, size", [((1.3, 1.3, 3.0), 3.0, 48), ((0.7, 1.9, 3.0), 2.1, 64)])
def test_a_pixel_lies_where_geometry_says_in_the_world(tmp_path, zooms, spacing, size):
    shape = (93, 61, 20)
    label = _blob(shape, zooms)
    case = _save(tmp_path, "a", label.astype(np.int16), label, zooms)
    bank = build(_dataset(case), {"spleen": 1}, Preprocessing(size, spacing))
    geometry = bank.geometry["a"]
    assert geometry.factor == pytest.approx((zooms[1] / spacing, zooms[0] / spacing), rel=1e-6)
    z, row, column = ndimage.center_of_mass(bank.labels.numpy())
    row, column = ((p - s + 0.5) / f - 0.5 for p, s, f in zip((row, column), geometry.start, geometry.factor))
    voxel = (shape[0] - 1 - column, shape[1] - 1 - row, z, 1)
    truth = np.array(geometry.affine) @ [*ndimage.center_of_mass(label), 1]
    assert np.abs(np.array(geometry.affine) @ voxel - truth)[:2].max() < 0.5 * spacing


def test_the_factor_is_exact_over_the_whole_width(tmp_path):
    # a step every 10 voxels of 1.7 mm is one every 17 / 3 pixels, at the last as at the first
    image = np.repeat(np.array([-125, 275] * 10, np.int16), 10)[::-1, None, None] * np.ones((1, 16, 1), np.int16)
    case = _save(tmp_path, "a", image, np.zeros(image.shape, np.uint8), (1.7, 3.0, 1.0))
    bank = build(_dataset(case), CLASSES, Preprocessing(128, 3.0))
    first = bank.geometry["a"].start[1]
    wide = bank.images[0, 64, first : first + 113].double().numpy() / 255
    crossings = np.flatnonzero(np.diff(wide > 0.5))
    crossings = crossings + (0.5 - wide[crossings]) / (wide[crossings + 1] - wide[crossings])
    np.testing.assert_allclose(crossings, np.arange(1, 20) * 17 / 3 - 0.5, atol=0.15)  # read between two pixels
    np.testing.assert_allclose(crossings[3:] - crossings[:-3], 17, atol=1e-3)  # which errs the same every 17 pixels


def test_images_agree_with_an_independent_antialiased_resampling(tmp_path):
    image = ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 900, (60, 80, 2)), 1).astype(np.int16)
    case = _save(tmp_path, "a", image, np.zeros(image.shape, np.uint8), (1.25, 1.5, 1.0))
    got = build(_dataset(case), CLASSES, Preprocessing(64, 2.5)).images.numpy() / 255
    grey = (image[::-1, ::-1].transpose(2, 1, 0).clip(-125, 275) + 125) / 400

    def triangles(voxels, factor):  # float64 oracle: a triangle as wide as two pixels, in voxels, at each centre
        centre = (np.arange(round(voxels * factor)) + 0.5) / factor - 0.5
        weights = np.clip(1 - np.abs(centre[:, None] - np.arange(voxels)) * factor, 0, None)
        return weights / weights.sum(1, keepdims=True)

    expected = triangles(80, 0.6) @ grey @ triangles(60, 0.5).T
    assert expected.shape == (2, 48, 30)
    # the last row and column see beyond the volume, where edge values are repeated
    np.testing.assert_allclose(got[:, 8:55, 17:46], expected[:, :-1, :-1], atol=0.51 / 255)
    assert (got[:, :8] == 0).all() and (got[:, 56:] == 0).all() and (got[..., :17] == 0).all()


def test_no_voxel_at_the_edge_is_lost(tmp_path):
    # 21 voxels of 1 mm are 10.5 pixels of 2 mm: the 11th pixel holds the last voxel
    label = np.ones((21, 21, 1), np.uint8)
    bank = build(_dataset(_save(tmp_path, "a", label.astype(np.int16), label)), CLASSES, Preprocessing(16, 2.0))
    assert bank.labels.sum() == 11 * 11
    assert (restore(_one_hot(bank.labels, 3), bank.geometry["a"]).argmax(0) == 1).all()


def test_what_is_cropped_is_lost_and_only_that(tmp_path):
    label = np.zeros((40, 16, 1), np.uint8)
    label[2:6, 8] = label[18:22, 8] = 1
    bank = build(_dataset(_save(tmp_path, "a", label.astype(np.int16), label)), {"spleen": 1}, Preprocessing(16))
    assert bank.labels.sum() == 4
    back = restore(torch.ones(1, 1, 16, 16), bank.geometry["a"])[0, :, :, 0]
    assert back.sum() == 16 * 16 and (back[12:28] == 1).all()
    back = restore(torch.ones(2, 1, 16, 16) * torch.tensor([0.2, 0.8]).view(2, 1, 1, 1), bank.geometry["a"])
    assert back.argmax(0).sum() == 16 * 16 and torch.equal(back[:, 0, 0, 0], torch.tensor([1.0, 0.0]))


# --- intensities


def test_ct_is_clipped_to_the_window_and_rounded(tmp_path):
    image = np.array([-1000, -125, -124, 75, 275, 3000], np.int16).reshape(6, 1, 1) * np.ones((1, 16, 1), np.int16)
    bank = build(_dataset(_save(tmp_path, "a", image, np.zeros(image.shape, np.uint8))), CLASSES, Preprocessing(16))
    assert bank.images[0, 4, 5:11].tolist()[::-1] == [0, 0, 1, 128, 255, 255]  # 255 / 400 = 0.64, 127.5 rounds to even
    assert bank.images[0, :, :5].max() == 0 and bank.images[0, :, 11:].max() == 0


def test_mr_is_clipped_to_percentiles_of_the_voxels_that_are_not_zero(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.gamma(3, 500, (16, 16, 8)).astype(np.float32)
    image[:4] = 0
    case = _save(tmp_path, "a", image, np.zeros(image.shape, np.uint8))
    got = build(_dataset(case, modality="MR"), CLASSES, Preprocessing(16, percentiles=(1, 90))).images
    low, high = np.percentile(image[4:], (1, 90))
    expected = np.rint((image[::-1, ::-1].transpose(2, 1, 0) - low).clip(0, high - low) / (high - low) * 255)
    assert np.abs(got.numpy() - expected).max() <= 1 and (got.numpy() == expected).mean() > 0.999
    scaled = _save(tmp_path, "b", image * 1e6, np.zeros(image.shape, np.uint8))
    again = build(_dataset(scaled, modality="MR"), CLASSES, Preprocessing(16, percentiles=(1, 90))).images
    assert (got.int() - again.int()).abs().max() <= 1


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_mr_volume_is_named(tmp_path, value):
    image = np.full((16, 16, 2), value, np.int16)
    with pytest.raises(InputError, match="a_RAS_image.nii.gz.*constant"):
        build(_dataset(_save(tmp_path, "a", image, image.astype(np.uint8)), modality="MR"), CLASSES, Preprocessing(16))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:200])])
def test_a_file_that_went_bad_since_the_index_is_named(tmp_path, damage):
    case = _save(tmp_path, "a", *_random((16, 16, 4)))
    damage(case.label)
    with pytest.raises(InputError, match="a_RAS_label.nii.gz.*cannot be read"):
        build(_dataset(case), CLASSES, Preprocessing(16))


def test_other_labels_are_background_and_positions_follow_classes(tmp_path):
    label = np.array([0, 1, 2, 6, 9] * 4, np.float32).reshape(1, 20, 1) * np.ones((16, 1, 1), np.float32)
    case = _save(tmp_path, "a", np.zeros(label.shape, np.int16), label)
    bank = build(_dataset(case), {"liver": 6, "spleen": 1}, Preprocessing(32))
    assert bank.labels[0, 6:26, 10].tolist() == [0, 1, 0, 2, 0] * 4  # from anterior: 9, 6, 2, 1, 0
    assert bank.classes == ("liver", "spleen") and bank.labels.dtype == torch.uint8


# --- the bank


@pytest.fixture
def bank(tmp_path) -> SliceBank:
    cases = [_save(tmp_path, name, *_random((16, 16, depth), depth)) for name, depth in zip("abc", (3, 1, 4))]
    return build(_dataset(*cases), CLASSES, Preprocessing(16))


def test_case_index_and_neighbours(bank):
    assert bank.cases == ("a", "b", "c") and len(bank) == 8
    assert bank.case_index.tolist() == [0, 0, 0, 1, 2, 2, 2, 2] and bank.case_index.dtype == torch.int64
    below, above = [0, 0, 1, 3, 4, 4, 5, 6], [1, 2, 2, 3, 5, 6, 7, 7]
    assert torch.equal(around(bank), bank.images[torch.tensor([below, above])])


def around(bank) -> torch.Tensor:
    """The slices below and above every slice of a bank, [2,N,H,W] uint8, as a network sees them."""
    images, _ = dataclasses.replace(bank, channels="neighbours").batch(torch.arange(len(bank)))
    return (255 * images[:, ::2]).round().to(torch.uint8).transpose(0, 1)


def test_batch_repeats_the_slice_or_gives_below_itself_above(bank):
    index = torch.tensor([5, 0])
    images, labels = bank.batch(index)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(images, (bank.images[[5, 0]].float() / 255)[:, None].expand(-1, 3, -1, -1))
    assert torch.equal(labels, bank.labels[index].long())
    images, _ = dataclasses.replace(bank, channels="neighbours").batch(index)
    assert torch.equal(images, bank.images[torch.tensor([[4, 5, 6], [0, 0, 1]])].float() / 255)


def test_channels_come_from_the_view(tmp_path):
    case = _save(tmp_path, "a", *_random((16, 16, 2)))
    assert build(_dataset(case), CLASSES, Preprocessing(16, channels="neighbours")).channels == "neighbours"


def test_select_keeps_nothing_of_the_other_cases(bank):
    part = bank.select(["c", "a"])
    assert part.cases == ("c", "a") and list(part.geometry) == ["c", "a"]
    assert torch.equal(part.images, bank.images[[4, 5, 6, 7, 0, 1, 2]])
    assert torch.equal(part.labels, bank.labels[[4, 5, 6, 7, 0, 1, 2]])
    assert part.case_index.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert torch.equal(around(part), part.images[torch.tensor([[0, 0, 1, 2, 4, 4, 5], [1, 2, 3, 3, 5, 6, 6]])])
    for name in ("images", "labels", "case_index"):
        tensor = getattr(part, name)
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.untyped_storage().data_ptr() != getattr(bank, name).untyped_storage().data_ptr()


def test_hidden_labels_are_those_of_the_named_cases_alone(bank):
    hidden = bank.hide_labels(iter(["b", "c"]))
    assert {bank.cases[number] for number in hidden.case_index[~hidden.labelled].tolist()} == {"b", "c"}
    kept = hidden.labelled
    assert kept.any() and torch.equal(hidden.labels[kept], bank.labels[kept])


def test_select_names_what_is_wrong(bank):
    with pytest.raises(InputError, match="nobody"):
        bank.select(["a", "nobody"])
    for cases in ([], ["a", "a"]):
        with pytest.raises(InputError, match="at least one"):
            bank.select(cases)


def test_a_data_set_without_cases_is_an_error():
    with pytest.raises(InputError, match="no case"):
        build(_dataset(root="/somewhere"), CLASSES, Preprocessing(16))


def test_scores_of_another_case_are_refused(bank):
    with pytest.raises(InputError, match=r"\[4, 16, 16\]"):
        restore(torch.zeros(1, 3, 16, 16), bank.geometry["c"])


@pytest.mark.gpu
def test_on_the_gpu_everything_is_there(bank):
    there = bank.to("cuda")
    images, labels = there.select(["c"]).batch(torch.tensor([1], device="cuda"))
    assert images.is_cuda and labels.is_cuda
    # a GPU divides by 255 through its reciprocal
    torch.testing.assert_close(images.cpu(), bank.select(["c"]).batch(torch.tensor([1]))[0], rtol=1e-6, atol=0)
    scores = torch.rand(2, 4, 16, 16)
    there = restore(scores.cuda(), bank.geometry["c"])
    assert there.is_cuda and torch.equal(there.cpu(), restore(scores, bank.geometry["c"]))


# --- real files


def _real_dataset(folder, modality, step) -> Dataset:
    cases = []
    for path in sorted((folder / "labelsTr").glob("*.nii.gz"))[::step]:
        file = nib.load(path)
        zooms = tuple(float(z) for z in file.header.get_zooms())
        name = path.name.removesuffix(".nii.gz")
        cases.append(Case(name, folder / "imagesTr" / path.name, path, name, file.shape, zooms))
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    labels = {name: int(value) for value, name in labels.items() if int(value)}
    return Dataset(folder.name, folder, modality, labels, tuple(cases), pd.DataFrame())


@pytest.mark.parametrize(
    "name, modality, view, step, least",
    [
        ("btcv", "CT", Preprocessing(128, 3.0), 6, 0.95),
        ("btcv", "CT", Preprocessing(256), 12, 1.0),
        ("hippocampus", "MR", Preprocessing(64, 1.0), 12, 1.0),
    ],
)
def test_real_labels_survive_the_round_trip(real_data, name, modality, view, step, least):
    dataset = _real_dataset(real_data(name), modality, step)
    bank = build(dataset, dataset.labels, view)
    assert bank.images.float().std() > 20
    for case in dataset.cases:
        labels = bank.select([case.name]).labels
        stored = np.rint(np.asarray(nib.load(case.label).dataobj)).astype(int)
        # one class against the rest: all of btcv's at once on its own grid take gigabytes
        value = 6 if name == "btcv" else 1
        back = restore((labels == value)[None].float(), bank.geometry[case.name])[0].numpy()
        assert back.shape == stored.shape
        assert _dice(back > 0.5, stored == value) >= least


def test_real_livers_are_on_the_left_of_the_slice(real_data):
    dataset = _real_dataset(real_data("btcv"), "CT", 8)
    bank = build(dataset, {"liver": 6, "spleen": 1}, Preprocessing(128, 3.0))
    for name in bank.cases:
        labels = bank.select([name]).labels.numpy()
        liver, spleen = (ndimage.center_of_mass(labels == value) for value in (1, 2))
        assert liver[2] < 64 < spleen[2] and spleen[1] > 64  # the spleen lies behind the middle


# --- as the published code makes its slices


def test_published_slices_keep_the_files_axes_and_its_whole_field_of_view(tmp_path):
    image, label = _random((32, 16, 3))
    image[0, 0, 0] = 1000
    case = _save(tmp_path, "a", image, label, (0.7, 2.0, 3.0), "LPS")
    bank = build(_dataset(case), CLASSES, Preprocessing(16, 1.5, published=True))
    stored = np.asarray(nib.load(case.image).dataobj).astype(float).clip(0, 255)
    assert bank.images.shape == (3, 16, 16), "slices along the file's third axis, whatever the spacing"
    halved = stored.reshape(16, 2, 16, 3).mean(1)  # rows are the file's first axis, resized by half
    inner = bank.images.permute(1, 2, 0).numpy()[1:-1].astype(float)
    assert np.corrcoef(inner.ravel(), halved[1:-1].ravel())[0, 1] > 0.9
    assert bank.images.max() <= 255 and bank.images.min() == 0, "no window: 0 HU and below are black"
    square = build(_dataset(case), CLASSES, Preprocessing(32, published=True))
    back = restore(_one_hot(square.labels, 3), square.geometry["a"]).argmax(0).numpy()
    truth = np.searchsorted([0, 1, 6], np.asarray(nib.load(case.label).dataobj))
    assert back.shape == truth.shape and (back == truth).mean() > 0.95


def test_published_slices_of_mr_know_no_percentiles(tmp_path):
    image, label = _random((16, 16, 2))
    case = _save(tmp_path, "a", (np.abs(image) * 10).astype(np.int16), label)
    bank = build(_dataset(case, modality="MR"), CLASSES, Preprocessing(16, published=True))
    assert (bank.images == 255).float().mean() > 0.8, "all above 255 is white"
