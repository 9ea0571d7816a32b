"""The phantom: the same to the bit, in Decathlon layout, an abdomen in shape, place and HU."""

from __future__ import annotations

import hashlib
import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from kdlib.config import PROFILES, InputError
from kdlib.data import phantom
from kdlib.data.decathlon import index
from kdlib.data.phantom import LABELS, make_phantom
from kdlib.data.slices import build


def _hashes(folder) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_phantom(tmp_path_factory.mktemp("phantom") / "five", 5)


@pytest.fixture(scope="module")
def volumes(made):
    """[(HU, labels)] with axes to the right, anterior and superior."""
    files = sorted((made / "imagesTr").iterdir())
    pairs = [(nib.load(file), nib.load(made / "labelsTr" / file.name)) for file in files]
    return [tuple(np.asarray(nib.as_closest_canonical(each).dataobj) for each in pair) for pair in pairs]


def test_it_is_a_clean_decathlon_folder(made):
    dataset = index(made)
    assert dataset.name == "Phantom" and dataset.modality == "CT" and dataset.labels == LABELS
    assert len(dataset.cases) == 5 and dataset.defects.empty
    assert len({case.group for case in dataset.cases}) == 5
    assert all(case.shape == (80, 80, 24) and case.spacing == (5.0, 5.0, 6.0) for case in dataset.cases)
    image, label = nib.load(dataset.cases[0].image), nib.load(dataset.cases[0].label)
    assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")


def test_two_makings_are_equal_to_the_bit_and_more_patients_change_no_earlier_one(made, tmp_path):
    again = _hashes(make_phantom(tmp_path / "two", 2))
    first = _hashes(made)
    volumes = [name for name in again if name.endswith(".nii.gz")]
    assert len(volumes) == 4 and all(again[name] == first[name] for name in volumes)
    assert len(set(first.values())) == len(first)  # no patient twice


def test_another_seed_gives_other_patients(made, tmp_path):
    other = _hashes(make_phantom(tmp_path / "other", 1, seed=1))
    assert other["imagesTr/phantom_000.nii.gz"] != _hashes(made)["imagesTr/phantom_000.nii.gz"]


def test_a_finished_phantom_is_returned_untouched(made, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    monkeypatch.setattr(phantom, "make_patient", lambda *_, **__: pytest.fail("made again"))
    assert make_phantom(made, 5) == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_a_folder_that_is_something_else_is_refused_and_left_alone(made, tmp_path):
    for patients, seed in ((4, 0), (5, 1)):
        with pytest.raises(InputError, match="give a folder that does not exist yet"):
            make_phantom(made, patients, seed)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="mine"):
        make_phantom(tmp_path / "mine", 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_an_incomplete_phantom_is_refused(tmp_path):
    folder = make_phantom(tmp_path / "one", 1)
    (folder / "labelsTr" / "phantom_000.nii.gz").unlink()
    with pytest.raises(InputError, match="one"):
        make_phantom(folder, 1)


def test_a_making_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "make_patient", stop)
    with pytest.raises(KeyboardInterrupt):
        make_phantom(tmp_path / "stopped", 1)
    assert list(tmp_path.iterdir()) == []


def test_of_two_jobs_at_once_the_second_takes_what_the_first_made(tmp_path, monkeypatch):
    make_patient, started = phantom.make_patient, []

    def overtaken(*args, **kwargs):
        if not started:
            started.append(make_phantom)
            make_phantom(tmp_path / "both", 1)
        return make_patient(*args, **kwargs)

    monkeypatch.setattr(phantom, "make_patient", overtaken)
    assert make_phantom(tmp_path / "both", 1) == tmp_path / "both"
    assert [path.name for path in tmp_path.iterdir()] == ["both"]


@pytest.mark.parametrize("arguments", [{"patients": 0}, {"seed": -1}])
def test_impossible_arguments_are_named(tmp_path, arguments):
    with pytest.raises(InputError, match="at least 1 patient"):
        make_phantom(tmp_path / "none", **arguments)


def test_description_says_how_it_was_made(made):
    about = json.loads((made / "dataset.json").read_text())
    assert "5 patients, seed 0" in about["description"] and f"version {phantom.VERSION}" in about["description"]


def test_every_organ_is_there_in_a_plausible_size(volumes):
    limits = {"spleen": (100, 600), "liver": (500, 2200), "right kidney": (50, 350), "left kidney": (50, 350)}
    for _, label in volumes:
        for name, (least, most) in limits.items():
            assert least < (label == LABELS[name]).sum() * 0.15 < most, name  # ml
        assert (label == LABELS["stomach"]).sum() * 0.15 > 50


def test_organs_lie_where_they_do_in_a_patient(volumes):
    for _, label in volumes:
        centre = {name: ndimage.center_of_mass(label == value) for name, value in LABELS.items()}
        assert centre["liver"][0] > centre["stomach"][0] > centre["spleen"][0]  # from right to left
        assert centre["right kidney"][0] > 40 > centre["left kidney"][0]
        assert centre["stomach"][1] > centre["spleen"][1]  # the stomach in front
        assert centre["liver"][2] > centre["right kidney"][2]


def test_hu_are_those_of_ct(volumes):
    for number, (image, label) in enumerate(volumes):
        core = {name: ndimage.binary_erosion(label == value) for name, value in LABELS.items()}
        liver, spleen = (np.median(image[core[name]]) for name in ("liver", "spleen"))
        low, high = (40, 75) if number % 5 == 4 else (80, 150)  # every fifth has no contrast agent
        assert low < liver < high and abs(spleen - liver) < 25  # HU does not tell them apart
        assert np.median(image[0, :, :]) == pytest.approx(-1000, abs=25)
        assert 4 < image[core["liver"]].std() < 30
        assert image.max() > 250 and (image < -700).any(axis=(0, 1))[-1]  # bone, lung


def test_what_looks_like_spleen_is_mostly_something_else(volumes):
    for image, label in volumes:
        spleen = label == LABELS["spleen"]
        smooth = ndimage.gaussian_filter(image.astype(float), 0.7)
        alike = np.abs(smooth - np.median(image[spleen])) < 20
        assert (alike & ~spleen).sum() > 2 * (alike & spleen).sum()
        assert (alike & (label == 0)).sum() > (alike & spleen).sum()  # muscle, bowel and others without a label


def test_the_quick_profile_sees_the_whole_patient(made):
    view = PROFILES["quick"].preprocessing
    bank = build(index(made), LABELS, view)
    edge = np.concatenate([bank.images[:, :, 0], bank.images[:, :, -1], bank.images[:, 0], bank.images[:, -1]], axis=1)
    assert (edge > 100).mean() < 0.01
    for number, case in enumerate(index(made).cases):
        stored = np.bincount(np.asarray(nib.load(case.label).dataobj).ravel(), minlength=6)[1:]
        seen = np.bincount(bank.select([case.name]).labels.numpy().ravel(), minlength=6)[1:]
        np.testing.assert_allclose(seen * view.spacing**2, stored * 5.0**2, rtol=0.1, err_msg=f"case {number}: mm2")
