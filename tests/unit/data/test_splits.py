"""Splits: by patient, nested, stratified, and tied to the bytes of the data."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.config import InputError
from kdlib.data import Dataset, Fold, index, splits
from kdlib.data.splits import _stratify

PARTS = ("train", "val", "test")
SPLEEN = {"spleen": 1}


def write(path, array, slope=None, inter=None, spacing=(2.0, 2.0, 5.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.diag([*spacing, 1.0]))
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)


def toy(root: Path, patients: int = 12, modality: str = "CT") -> Path:
    """One case a patient; the spleen of case i holds i + 1 voxels of 10 i HU (stored as 5 i, scaled by 2)."""
    for i in range(patients):
        label = np.zeros((5, 5, 2), np.uint8)
        label.flat[: i + 1] = 1
        label.flat[-1] = 2
        write(root / f"imagesTr/c{i:02d}.nii.gz", np.where(label == 1, 5 * i, 100).astype(np.int16), 2.0, 0.0)
        write(root / f"labelsTr/c{i:02d}.nii.gz", label)
    description = {
        "name": "Toy", "modality": {"0": modality}, "training": [],
        "labels": {"0": "background", "1": "spleen", "2": "rare"},
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.fixture
def dataset(tmp_path):
    return index(toy(tmp_path / "toy"))


# ---- properties ------------------------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    """Cases as they are recorded: 1 to 3 cases a patient, some without the target."""
    patients = draw(st.integers(4, 40))
    table = {}
    for patient in range(patients):
        for number in range(draw(st.integers(1, 3))):
            covariate = draw(st.none() | st.floats(-100, 300) | st.sampled_from([0.0, 50.0]))
            table[f"case{patient}_{number}"] = {"patient": str(patient), "covariate": covariate}
    folds = draw(st.integers(2, min(6, patients - 1)))
    return table, folds, draw(st.integers(0, 2**32 - 1)), draw(st.randoms(use_true_random=False))


@given(tables())
@settings(max_examples=150, deadline=None)
def test_partition(drawn):
    table, folds, seed, random = drawn
    patient_of = {case: entry["patient"] for case, entry in table.items()}
    patients = set(patient_of.values())
    parts = _stratify(table, folds, seed)

    assert len(parts) == folds
    tested = Counter(patient for fold in parts for patient in {patient_of[case] for case in fold["test"]})
    assert tested == dict.fromkeys(patients, 1)  # every patient is in exactly one test part
    sizes = [len({patient_of[case] for case in fold["test"]}) for fold in parts]
    assert max(sizes) - min(sizes) <= 1
    for fold in parts:
        assert sorted(fold["train"] + fold["val"] + fold["test"]) == sorted(table)
        train, val, test = ({patient_of[case] for case in fold[part]} for part in PARTS)
        assert not train & val and not train & test and not val & test and train and val
        assert len(val) == max(1, round((len(patients) - len(test)) / 5))

    shuffled = list(table.items())
    random.shuffle(shuffled)
    assert _stratify(dict(shuffled), folds, seed) == parts  # neither file order nor chance


@given(tables(), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_label_fractions_are_nested(drawn, one, other):
    table, folds, seed, _ = drawn
    patient_of = {case: entry["patient"] for case, entry in table.items()}
    for fold in (Fold(*(tuple(part[name]) for name in PARTS), patient_of) for part in _stratify(table, folds, seed)):
        patients = list(dict.fromkeys(patient_of[case] for case in fold.train))
        kept = []
        for fraction in sorted((one, other)):
            count = round(fraction * len(patients))
            if count == 0:
                with pytest.raises(InputError, match="training patients is no patient"):
                    fold.subset(fraction)
                continue
            subset = fold.subset(fraction)
            assert subset == fold.train[: len(subset)]  # a prefix
            assert {patient_of[case] for case in subset} == set(patients[:count])  # of whole patients
            assert len(subset) == sum(patient_of[case] in patients[:count] for case in table if case in fold.train)
            kept.append(set(subset))
        assert len(kept) < 2 or kept[0] <= kept[1]
        assert fold.subset(1) == fold.train


@given(st.integers(2, 6), st.integers(3, 6), st.integers(0, 5), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_unusual_patients_are_parted(folds, blocks, more, seed):
    """Of the `folds` highest and the `folds` lowest patients each fold tests one, whether or not folds divides them."""
    count = folds * blocks + more % folds
    names = [f"p{number:02d}" for number in range(count)]
    rng = np.random.default_rng(seed)
    table = {name: {"patient": name, "covariate": value} for name, value in zip(names, rng.permutation(count) * 1.0)}
    ranked = sorted(names, key=lambda name: table[name]["covariate"])
    parts = _stratify(table, folds, seed)
    for extreme in (ranked[:folds], ranked[-folds:]):
        assert [len(set(fold["test"]) & set(extreme)) for fold in parts] == [1] * folds
    for fold in parts:  # the half has one of every two neighbours, the quarter one of every two of the half
        whole = fold["train"]
        for length in (len(whole), len(whole) // 2):
            part, half = sorted(whole[:length], key=ranked.index), whole[: length // 2]
            assert [len({low, high} & set(half)) for low, high in zip(part[::2], part[1::2])] == [1] * len(half)
        val = sorted(fold["val"], key=ranked.index)
        rest = sorted(fold["train"] + fold["val"], key=ranked.index)
        assert all(name in block for name, block in zip(val, np.array_split(rest, len(val)), strict=True))


def test_another_seed_is_another_split(dataset, tmp_path):
    one, other = (splits(dataset, SPLEEN, 4, tmp_path / f"{seed}.json", seed) for seed in (0, 1))
    assert [fold.test for fold in one] != [fold.test for fold in other]


def test_which_neighbour_comes_first_is_chance():
    table = {f"p{i:02d}": {"patient": f"p{i:02d}", "covariate": 1.0 * i} for i in range(20)}
    folds = [fold["train"] for seed in range(20) for fold in _stratify(table, 2, seed)]
    lowest = [min(train) in train[: len(train) // 2] for train in folds]
    assert 0.2 < np.mean(lowest) < 0.8


def test_cases_need_no_order(dataset, tmp_path):
    backwards = Dataset("Toy", dataset.root, "CT", dataset.labels, tuple(reversed(dataset.cases)), pd.DataFrame())
    one = splits(dataset, SPLEEN, 4, tmp_path / "one.json")
    assert splits(backwards, SPLEEN, 4, tmp_path / "other.json") == one


def test_a_patient_without_the_target_counts_last():
    table = {f"p{i}": {"patient": f"p{i}", "covariate": None if i < 2 else 1.0 * i} for i in range(8)}
    parts = _stratify(table, 2, 0)
    assert sorted(len({"p0", "p1"} & set(fold["test"])) for fold in parts) == [1, 1]


@pytest.mark.parametrize(("patients", "folds"), [(12, 1), (12, 0), (12, 13), (3, 2), (2, 2), (1, 2)])
def test_too_few_patients(patients, folds):
    table = {f"p{i}": {"patient": f"p{i}", "covariate": 1.0 * i} for i in range(patients)}
    with pytest.raises(InputError, match=f"{patients} patients cannot be split into {folds} folds"):
        _stratify(table, folds, 0)


@pytest.mark.parametrize(("patients", "folds"), [(4, 2), (3, 3), (5, 4), (12, 12)])
def test_just_enough_patients(patients, folds):
    table = {f"p{i}": {"patient": f"p{i}", "covariate": 1.0 * i} for i in range(patients)}
    assert all(fold[part] for fold in _stratify(table, folds, 0) for part in PARTS)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, 0.1])
def test_subset_needs_a_patient(fraction):
    fold = Fold(("a", "b", "c", "d"), (), (), {name: name for name in "abcd"})
    with pytest.raises(InputError, match=rf"label fraction {fraction} of 4 training patients"):
        fold.subset(fraction)


def test_subset_keeps_whole_patients():
    fold = Fold(tuple("abcdef"), (), (), dict(a="1", b="1", c="2", d="3", e="3", f="4"))
    assert fold.subset(0.5) == ("a", "b", "c") and fold.subset(0.75) == ("a", "b", "c", "d", "e")


# ---- the file --------------------------------------------------------------------------------------------------------


def test_record_holds_covariates_and_hashes(dataset, tmp_path):
    path = tmp_path / "results" / "splits.json"
    folds = splits(dataset, SPLEEN, 4, path)
    record = json.loads(path.read_text())
    assert [path.name for path in path.parent.iterdir()] == ["splits.json"]
    assert {key: record[key] for key in ("format", "dataset", "classes", "folds", "seed")} == {
        "format": 1, "dataset": "Toy", "classes": SPLEEN, "folds": 4, "seed": 0,
    }  # fmt: skip
    covariates = [record["cases"][f"c{i:02d}"]["covariate"] for i in range(12)]
    assert covariates == pytest.approx([10.0 * i for i in range(12)])
    for part in ("image", "label"):
        blob = getattr(dataset.case("c03"), part).read_bytes()
        assert record["cases"]["c03"][part] == hashlib.sha256(blob).hexdigest()
    assert folds[0].groups == {case.name: case.group for case in dataset.cases}
    assert len(path.read_text().splitlines()) > 100  # laid out for a reader


def test_covariate_of_mr_is_the_volume(tmp_path):
    dataset = index(toy(tmp_path / "toy", modality="MR"))
    splits(dataset, {"spleen": 1, "rare": 2}, 4, tmp_path / "splits.json")
    cases = json.loads((tmp_path / "splits.json").read_text())["cases"]
    # i + 1 voxels of spleen and one of the rest, each 2 x 2 x 5 mm = 0.02 ml
    assert [cases[f"c{i:02d}"]["covariate"] for i in range(12)] == pytest.approx([0.02 * (i + 2) for i in range(12)])


def test_a_split_of_another_modality_is_refused(tmp_path):
    splits(index(toy(tmp_path / "toy", modality="MR")), SPLEEN, 4, tmp_path / "splits.json")
    corrected = json.loads((tmp_path / "toy" / "dataset.json").read_text()) | {"modality": {"0": "CT"}}
    (tmp_path / "toy" / "dataset.json").write_text(json.dumps(corrected))
    with pytest.raises(InputError, match="the split was made from something else: another modality than CT; restore"):
        splits(index(tmp_path / "toy"), SPLEEN, 4, tmp_path / "splits.json")


def test_a_case_without_the_target(dataset, tmp_path):
    write(dataset.case("c03").label, np.full((5, 5, 2), 2, np.uint8))
    splits(dataset, SPLEEN, 4, tmp_path / "splits.json")
    assert json.loads((tmp_path / "splits.json").read_text())["cases"]["c03"]["covariate"] is None


def test_written_once_then_read(dataset, tmp_path):
    path = tmp_path / "splits.json"
    folds = splits(dataset, SPLEEN, 4, path)
    text = path.read_text()
    assert splits(dataset, SPLEEN, 4, path) == folds and path.read_text() == text

    record = json.loads(text)
    record["parts"][0]["train"].reverse()  # what the file says counts
    path.write_text(json.dumps(record))
    assert splits(dataset, SPLEEN, 4, path)[0].train == folds[0].train[::-1]

    moved = shutil.copytree(dataset.root, tmp_path / "moved")  # the same bytes elsewhere are the same data
    assert splits(index(moved), SPLEEN, 4, path)[1] == folds[1]


def test_changed_data_is_refused(dataset, tmp_path):
    path = tmp_path / "splits.json"
    splits(dataset, SPLEEN, 4, path)
    before = path.read_bytes()
    write(dataset.root / "imagesTr/c20.nii.gz", np.arange(50, dtype=np.int16).reshape(5, 5, 2))
    write(dataset.root / "labelsTr/c20.nii.gz", np.ones((5, 5, 2), np.uint8))
    for part in ("imagesTr", "labelsTr"):
        (dataset.root / part / "c05.nii.gz").unlink()
    write(dataset.case("c02").label, np.ones((5, 5, 2), np.uint8))
    write(dataset.case("c08").image, np.arange(50, dtype=np.int16).reshape(5, 5, 2))
    names = sorted(path.name[:3] for path in (dataset.root / "imagesTr").iterdir())
    patients = pd.DataFrame({"case": names, "patient": ["c00" if name == "c01" else name for name in names]})
    patients.to_csv(dataset.root / "patients.csv", index=False)
    changed = index(dataset.root, group="patients.csv")
    with pytest.raises(InputError) as error:
        splits(changed, SPLEEN, 4, path)
    for text in (
        str(path), "cases added: c20", "cases removed: c05", "cases of another patient: c01",
        "cases with another image: c08", "cases with another label: c02", "restore that", "another results folder",
    ):  # fmt: skip
        assert text in str(error.value)
    assert "c03" not in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 3}, "folds 4 -> 3"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"classes": {"rare": 2}}, "classes {'spleen': 1} -> {'rare': 2}"),
    ],
)
def test_another_request_is_refused(dataset, tmp_path, change, message):
    asked = {"classes": SPLEEN, "folds": 4, "seed": 0}
    splits(dataset, **asked, path=tmp_path / "splits.json")
    with pytest.raises(InputError) as error:
        splits(dataset, **(asked | change), path=tmp_path / "splits.json")
    assert message in str(error.value) and "cases" not in str(error.value)


def test_another_data_set_is_refused(dataset, tmp_path):
    splits(dataset, SPLEEN, 4, tmp_path / "splits.json")
    other = Dataset("Other", dataset.root, "CT", dataset.labels, dataset.cases, pd.DataFrame())
    with pytest.raises(InputError, match="dataset Toy -> Other"):
        splits(other, SPLEEN, 4, tmp_path / "splits.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": "1"}', '{"format": 1, "cases": 3}'])
def test_corrupt_record_is_refused(dataset, tmp_path, text):
    path = tmp_path / "splits.json"
    path.write_text(text)
    with pytest.raises(InputError, match="splits.json: not a whole record of a split; restore the file, or delete it"):
        splits(dataset, SPLEEN, 4, path)
    assert path.read_text() == text


def test_record_of_a_newer_version_is_refused(dataset, tmp_path):
    path = tmp_path / "splits.json"
    path.write_text('{"format": 2, "unheard": "of"}')
    with pytest.raises(InputError, match="written by a newer version"):
        splits(dataset, SPLEEN, 4, path)


@pytest.mark.parametrize("fault", ["leak", "lack", "patient"])
def test_record_that_leaks_is_refused(dataset, tmp_path, fault):
    path = tmp_path / "splits.json"
    splits(dataset, SPLEEN, 4, path)
    record = json.loads(path.read_text())
    fold = record["parts"][1]
    if fault == "leak":
        fold["train"].append(fold["test"][0])
    elif fault == "lack":
        fold["train"].pop()
    else:
        record["cases"][fold["train"][0]]["patient"] = fold["test"][0]
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="a fold lacks a case, or has a patient in two parts"):
        splits(dataset, SPLEEN, 4, path)


# ---- real data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def btcv(real_data):
    return index(real_data("btcv"))


@pytest.mark.parametrize("folds", [2, 4, 5])
def test_btcv_contrast_phases_are_parted(btcv, tmp_path, folds):
    result = splits(btcv, btcv.classes("spleen"), folds, tmp_path / "splits.json", seed=3)
    tested = {case: number for number, fold in enumerate(result) for case in fold.test}
    assert tested["btcv_05"] != tested["btcv_07"]
    cases = json.loads((tmp_path / "splits.json").read_text())["cases"]
    hu = {name: entry["covariate"] for name, entry in cases.items()}
    assert min(hu, key=hu.get) == "btcv_12" and 33 < hu["btcv_12"] < 43
    assert sorted(hu, key=hu.get)[-2:] == ["btcv_07", "btcv_05"]
    assert 170 < hu["btcv_07"] < hu["btcv_05"] < 180
    case = btcv.case("btcv_12")  # oracle: the whole volume in HU
    voxels = nib.load(case.image).get_fdata()[nib.load(case.label).get_fdata() == 1]
    assert hu["btcv_12"] == pytest.approx(voxels.mean(), abs=1e-6)


def test_btcv_target_that_a_case_lacks(btcv, tmp_path):
    splits(btcv, btcv.classes("gallbladder"), 4, tmp_path / "splits.json")
    cases = json.loads((tmp_path / "splits.json").read_text())["cases"]
    assert [name for name, entry in cases.items() if entry["covariate"] is None] == ["btcv_12", "btcv_24"]


def test_hippocampus_pairs_stay_together(real_data, tmp_path):
    dataset = index(real_data("hippocampus"))
    folds = splits(dataset, dataset.classes("all"), 5, tmp_path / "splits.json")
    for fold in folds:
        for part in (fold.train, fold.val, fold.test, fold.subset(0.5), fold.subset(0.25)):
            numbers = {int(name[-3:]) for name in part}
            assert {number + 1 if number % 2 else number - 1 for number in numbers} == numbers
    assert len({fold.groups[case] for fold in folds for case in fold.test}) == 72
