"""The reader: every defect of a folder is named at once, and the real data sets are clean."""

from __future__ import annotations

import gzip
import json
import re
from itertools import product

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from kdlib.config import InputError
from kdlib.data import index, make_phantom
from kdlib.data.decathlon import Dataset, DefectError

AFFINE = np.diag([1.5, 1.5, 3.0, 1.0])
LABELS = {"0": "background", "1": "spleen", "2": "portal vein, splenic vein"}


def write(path, array, affine=AFFINE, slope=None, inter=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)


def describe(root, names, **changes):
    training = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names]
    description = {"name": "Toy", "modality": {"0": "CT"}, "labels": LABELS, "training": training} | changes
    (root / "dataset.json").write_text(json.dumps({key: value for key, value in description.items() if value != "-"}))


def label_array(*values):
    array = np.zeros((6, 5, 4), np.uint8)
    array.flat[: len(values)] = values
    return array


@pytest.fixture
def folder(tmp_path):
    """Four clean cases a0 .. a3."""
    root = tmp_path / "Task99_Toy"
    names = [f"a{i}" for i in range(4)]
    for i, name in enumerate(names):
        image = np.random.default_rng(i).integers(-100, 200, (6, 5, 4)).astype(np.int16)
        write(root / "imagesTr" / f"{name}.nii.gz", image)
        write(root / "labelsTr" / f"{name}.nii.gz", label_array(1, 2))
    describe(root, names)
    return root


def test_index_describes_every_case(folder):
    dataset = index(folder)
    assert [case.name for case in dataset.cases] == ["a0", "a1", "a2", "a3"]
    assert dataset.name == "Toy" and dataset.modality == "CT" and dataset.root == folder
    assert dataset.labels == {"spleen": 1, "portal vein, splenic vein": 2}
    case = dataset.case("a2")
    assert case.image == folder / "imagesTr/a2.nii.gz" and case.label == folder / "labelsTr/a2.nii.gz"
    assert case.shape == (6, 5, 4) and case.spacing == (1.5, 1.5, 3.0) and case.group == "a2"
    assert list(dataset.defects.columns) == ["case", "file", "defect", "remedy"] and dataset.defects.empty
    with pytest.raises(InputError, match="no case 'a22', did you mean 'a2'"):
        dataset.case("a22")


def test_spacing_is_along_the_files_own_axes(folder):
    # the file's first axis runs to the head: 3 mm, whatever the orientation
    turned = np.array([[0, 0, -1.5, 7], [0, 2.0, 0, -3], [3.0, 0, 0, 5], [0, 0, 0, 1]])
    write(folder / "imagesTr/a0.nii.gz", np.arange(120, dtype=np.int16).reshape(6, 5, 4), turned)
    write(folder / "labelsTr/a0.nii.gz", label_array(1), turned)
    assert index(folder).case("a0").spacing == pytest.approx((3.0, 2.0, 1.5))


@pytest.mark.parametrize(("degrees", "sound"), [(0.5, True), (7, True), (9, False), (20, False)])
def test_a_grid_that_a_gantry_tilted_is_a_defect(folder, degrees, sound):
    # its slices are shifted against each other: sides of voxels would tell neither mm nor ml
    tilted = np.diag([1.5, 1.5, 3.0, 1.0])
    tilted[1, 2] = 3 * np.tan(np.radians(degrees))
    write(folder / "imagesTr/a0.nii.gz", np.arange(120, dtype=np.int16).reshape(6, 5, 4), tilted)
    write(folder / "labelsTr/a0.nii.gz", label_array(1), tilted)
    defects = index(folder, on_defect="drop").defects
    assert list(defects["file"]) == ([] if sound else ["imagesTr/a0.nii.gz", "labelsTr/a0.nii.gz"])
    assert defects["defect"].eq("affine without right angles").all()


# ---- defects -------------------------------------------------------------------------------------------------------


def truncate(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def break_every_case(root):
    """25 more cases, each with a defect of its own kind; returns what the table must say of each."""
    good = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    bad = good.copy()
    bad[1, 1, 1] = np.nan
    infinite = good.copy()
    infinite[2, 2, 2] = -np.inf
    shifted = AFFINE.copy()
    shifted[0, 3] = 1.0
    rotated = AFFINE.copy()
    rotated[0, 1] = 0.2
    images = {
        "four": good[..., None].repeat(2, -1), "nan": bad, "inf": infinite, "complex": good.astype(np.complex64),
    }  # fmt: skip
    labels = {
        "short": label_array(1)[..., :3], "outside": label_array(1, 7), "empty": label_array(),
        "negative": -label_array(1).astype(np.int16), "fraction": label_array(1) * np.float32(0.5),
        "nanlabel": label_array(1) * np.float32(np.nan),
    }  # fmt: skip
    affines = {"shifted": shifted, "rotated": rotated}
    others = "flat huge noimage nolabel cut tail raw zero text shortdata flipped listed swapped"
    names = [*images, *labels, *affines, *others.split()]
    for name in names:
        write(root / "imagesTr" / f"{name}.nii.gz", images.get(name, good))
        write(root / "labelsTr" / f"{name}.nii.gz", labels.get(name, label_array(1)), affines.get(name, AFFINE))

    def image(name):
        return root / f"imagesTr/{name}.nii.gz"

    blob = bytearray(gzip.decompress(image("flat").read_bytes()))
    blob[296:312] = bytes(16)  # srow_y: nibabel itself would not write it
    image("flat").write_bytes(gzip.compress(bytes(blob)))
    blob = bytearray(gzip.decompress(image("huge").read_bytes()))
    blob[42:48] = np.array([30000] * 3, "<i2").tobytes()  # dim: 98 TiB, not to be set aside
    image("huge").write_bytes(gzip.compress(bytes(blob)))
    image("noimage").unlink()
    (root / "labelsTr/nolabel.nii.gz").unlink()
    truncate(image("cut"))
    image("tail").write_bytes(image("tail").read_bytes()[:-4])  # only the checksum is cut
    image("raw").write_bytes(gzip.decompress(image("raw").read_bytes()))
    image("zero").write_bytes(b"")
    image("text").write_bytes(gzip.compress(b"version https://git-lfs" * 40))
    image("shortdata").write_bytes(gzip.compress(gzip.decompress(image("shortdata").read_bytes())[:-50]))
    blob = bytearray(image("flipped").read_bytes())
    blob[len(blob) // 2] ^= 0xFF
    image("flipped").write_bytes(bytes(blob))
    for path in (image("listed"), root / "labelsTr/listed.nii.gz"):
        path.unlink()
    describe(root, names)
    description = json.loads((root / "dataset.json").read_text())
    pair = next(pair for pair in description["training"] if "swapped" in pair["image"])
    pair["label"] = "./labelsTr/cut.nii.gz"
    (root / "dataset.json").write_text(json.dumps(description))
    return {
        "four": "imagesTr.*not three-dimensional", "nan": "imagesTr.*NaN or infinite",
        "inf": "imagesTr.*NaN or infinite", "complex": "imagesTr.*complex64",
        "short": r"labelsTr.*\(6, 5, 3\), image \(6, 5, 4\)",
        "outside": r"labelsTr.*\[7\] are not in dataset.json", "empty": "labelsTr.*empty label",
        "negative": r"labelsTr.*\[-1\] are not in dataset.json", "fraction": "labelsTr.*non-integer",
        "nanlabel": "labelsTr.*non-integer", "shifted": "labelsTr.*affine differs",
        "rotated": "labelsTr.*affine differs", "flat": "imagesTr.*affine without a volume",
        "huge": "imagesTr.*claims 108,000,000,000,352 bytes", "noimage": "imagesTr.*label without an image",
        "nolabel": "labelsTr.*image without a label",
        "cut": "imagesTr.*truncated", "tail": "imagesTr.*truncated",
        "raw": "imagesTr.*not a gzip", "zero": "imagesTr.*not a gzip", "text": "imagesTr.*not a NIfTI",
        "shortdata": "imagesTr.*truncated", "flipped": "imagesTr.*damaged",
        "listed": "imagesTr.*listed in dataset.json",
        "swapped": "dataset.json.*pairs imagesTr/swapped",
    }  # fmt: skip


def test_every_defect_is_named_at_once(folder):
    expected = break_every_case(folder)
    with pytest.raises(InputError) as error:
        index(folder)
    lines = str(error.value).splitlines()
    assert f"in {len(expected)} of {len(expected) + 4} cases" in lines[0] and "ON_DEFECT=drop" in lines[0]
    for case, pattern in expected.items():
        assert any(re.match(rf"{case} +\| .*{pattern}", line) for line in lines[1:]), case
    assert not any(line.split()[0] in ("a0", "a1", "a2", "a3") for line in lines[1:])

    dataset = index(folder, on_defect="drop")
    assert [case.name for case in dataset.cases] == ["a0", "a1", "a2", "a3"]
    assert set(dataset.defects["case"]) == set(expected)
    assert (dataset.defects["remedy"].str.len() > 5).all()
    assert len(dataset.defects.query("case == 'listed'")) == 2  # image and label, each missing
    assert dataset.defects.query("case != 'listed'")["case"].is_unique


def test_one_case_can_have_several_defects(folder):
    write(folder / "imagesTr/a1.nii.gz", np.full((6, 5, 4), np.nan, np.float32))
    write(folder / "labelsTr/a1.nii.gz", np.where(label_array(1)[..., :3], 9.0, 1.5).astype(np.float32))
    defects = "; ".join(index(folder, on_defect="drop").defects.query("case == 'a1'")["defect"])
    for text in ("NaN", "non-integer", "[9]", "shape (6, 5, 3)"):
        assert text in defects


def test_leftovers_of_macos_are_no_defects(folder):
    for part in ("imagesTr", "labelsTr"):
        (folder / part / "._a0.nii.gz").write_bytes(b"\x00\x05\x16\x07")
        (folder / part / "._b9.nii.gz").write_bytes(b"\x00\x05\x16\x07")
        (folder / part / ".DS_Store").write_bytes(b"x")
        (folder / part / "notes.txt").write_text("x")
    (folder / "._dataset.json").write_bytes(b"x")
    describe(folder, ["a0", "._a0"])
    assert len(index(folder).cases) == 4


def test_pairs_come_from_names_not_from_the_list_or_its_order(folder):
    describe(folder, ["a3", "a1"])  # a file that dataset.json does not list is still a pair
    assert [case.name for case in index(folder).cases] == ["a0", "a1", "a2", "a3"]


def test_a_lacking_class_is_no_defect(folder):
    write(folder / "labelsTr/a0.nii.gz", label_array(2))
    assert index(folder).defects.empty


def test_integers_stored_as_floats_are_labels(folder):
    write(folder / "labelsTr/a0.nii.gz", label_array(1, 2).astype(np.float32))
    assert index(folder).defects.empty


def test_values_are_checked_as_scaled(folder):
    # stored 1 and 2 become 3 and 5; 2 and 4 become 1 and 2
    write(folder / "labelsTr/a0.nii.gz", label_array(1, 2), slope=2.0, inter=1.0)
    write(folder / "labelsTr/a1.nii.gz", label_array(2, 4), slope=0.5, inter=0.0)
    write(folder / "imagesTr/a2.nii.gz", label_array(1, 2), slope=0.5, inter=-125.0)
    defects = index(folder, on_defect="drop").defects
    assert defects[["case", "defect"]].values.tolist() == [["a0", "values [3, 5] are not in dataset.json"]]


def test_rounding_in_a_header_is_no_defect(folder):
    affine = AFFINE.copy()
    affine[:3] += 1e-5
    write(folder / "labelsTr/a0.nii.gz", label_array(1), affine)
    assert index(folder).defects.empty


def test_nothing_left_after_dropping(folder):
    for path in (folder / "labelsTr").glob("*"):
        write(path, label_array())
    with pytest.raises(InputError, match="4 defects in 4 of 4 cases; no case is left"):
        index(folder, on_defect="drop")


# ---- folders and descriptions that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "-"}, "no entry 'modality'"),
        ({"labels": "-"}, "no entry 'labels'"),
        ({"name": "-"}, "no entry 'name'"),
        ({"training": "-"}, "no entry 'training'"),
        ({"modality": {"0": "PET"}}, "neither CT nor MR"),
        ({"modality": {"0": "CT", "1": "PET"}}, "neither CT nor MR"),
        ({"modality": {}}, "neither CT nor MR"),
        ({"modality": "CT"}, "malformed"),
        ({"labels": {"0": "background"}}, "must name each value once"),
        ({"labels": {"1": "spleen", "2": "spleen"}}, "must name each value once"),
        ({"labels": {"1": "spleen", "01": "liver"}}, "must name each value once"),
        ({"labels": {"background": 0, "spleen": 1}}, "malformed"),
        ({"labels": ["spleen"]}, "malformed"),
        ({"training": ["imagesTr/a0.nii.gz"]}, "malformed"),
        ({"training": [{"image": "../../x.nii.gz", "label": "labelsTr/x.nii.gz"}]}, r"\.\./x.nii.gz leaves the folder"),
        ({"training": [{"image": "imagesTr/x.nii.gz", "label": "/etc/passwd"}]}, "/etc/passwd leaves the folder"),
        ({"training": [{"image": "imagesTr/a0.nii.gz"}]}, "no entry 'label'"),
    ],
)  # fmt: skip
def test_unusable_descriptions(folder, changes, message):
    describe(folder, ["a0"], **changes)
    with pytest.raises(InputError, match=message) as error:
        index(folder)
    assert str(folder / "dataset.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"name": "Toy"', "\xff"])
def test_malformed_json(folder, text):
    (folder / "dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"dataset\.json: malformed"):
        index(folder)


def test_unusable_folders(folder, tmp_path):
    with pytest.raises(InputError, match="nowhere/dataset.json: cannot be read"):
        index(tmp_path / "nowhere")
    for part in ("imagesTr", "labelsTr"):
        for path in (folder / part).glob("*"):
            path.unlink()
    describe(folder, [])
    with pytest.raises(InputError, match=r"Task99_Toy: imagesTr/ and labelsTr/ hold no .nii.gz or .nii file"):
        index(folder)
    (folder / "labelsTr").rmdir()
    with pytest.raises(InputError, match="labelsTr: no such folder"):
        index(folder)
    with pytest.raises(InputError, match="on_defect 'Drop': choose 'raise' or 'drop'"):
        index(folder, on_defect="Drop")


@pytest.mark.parametrize(
    ("modality", "expected"),
    [("CT", "CT"), (" ct", "CT"), ("MRI", "MR"), ("mr", "MR"), ("T1w", "MR"), ("FLAIR", "MR"), ("T2", "MR")],
)
def test_modality(folder, modality, expected):
    describe(folder, [], modality={"0": modality})
    assert index(folder).modality == expected


# ---- classes and patients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("spleen", {"spleen": 1}),
        ("left kidney, spleen", {"left kidney": 3, "spleen": 1}),
        ("veins, portal", {"veins, portal": 2}),
        ("all", {"spleen": 1, "veins, portal": 2, "left kidney": 3}),
    ],
)
def test_classes(tmp_path, target, expected):
    labels = {"spleen": 1, "veins, portal": 2, "left kidney": 3}
    assert Dataset("Toy", tmp_path, "CT", labels, (), pd.DataFrame()).classes(target) == expected


def test_misspelt_class_lists_the_labels(folder):
    with pytest.raises(InputError, match="no label 'spleeen', did you mean 'spleen'.*choose from spleen, portal"):
        index(folder).classes("spleeen")
    with pytest.raises(InputError, match="no label ''"):
        index(folder).classes("spleen,")


def test_grouping(folder):
    assert [case.group for case in index(folder, group="^a").cases] == ["a"] * 4
    describe(folder, [], name="Hippocampus")
    assert [case.group for case in index(folder).cases] == ["a0", "a1", "a2", "a3"], "the cases' names count"
    describe(folder, [], name="mine")
    for part, number in product(("imagesTr", "labelsTr"), range(4)):
        (folder / part / f"a{number}.nii.gz").rename(folder / part / f"hippocampus_00{number}.nii.gz")
    assert [case.group for case in index(folder).cases] == ["0", "1", "1", "2"]


def test_the_table_of_patients_is_the_data_set_s_own_before_one_of_that_name_here(folder, tmp_path, monkeypatch):
    table = pd.DataFrame({"case": ["a0", "a1", "a2", "a3"], "patient": ["p", "p", "q", "q"]})
    table.to_csv(folder / "patients.csv", index=False)
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    table.assign(patient=list("wxyz")).to_csv("patients.csv", index=False)
    assert [case.group for case in index(folder, group="patients.csv").cases] == list("ppqq")
    (folder / "patients.csv").unlink()
    assert [case.group for case in index(folder, group="patients.csv").cases] == list("wxyz")


def test_a_volume_of_one_intensity_is_a_defect(folder):
    path = folder / "imagesTr" / "a1.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.full(image.shape, 7, np.int16), image.affine), path)
    with pytest.raises(DefectError, match=r"a1 .* the same intensity everywhere \(7\) . export it again"):
        index(folder)


# ---- whole data sets -----------------------------------------------------------------------------------------------


def test_phantom_is_clean(tmp_path):
    assert index(make_phantom(tmp_path / "phantom", patients=2)).defects.empty


def test_btcv(real_data):
    dataset = index(real_data("btcv"))
    assert len(dataset.cases) == 24 and dataset.defects.empty and dataset.modality == "CT"
    assert len(dataset.classes("all")) == 13 and dataset.classes("spleen,liver") == {"spleen": 1, "liver": 6}
    assert all(case.shape[:2] == (256, 256) and case.group == case.name for case in dataset.cases)
    header = nib.load(dataset.case("btcv_12").image).header
    assert dataset.case("btcv_12").spacing == pytest.approx(header.get_zooms())


def test_hippocampus(real_data):
    dataset = index(real_data("hippocampus"))
    assert len(dataset.cases) == 144 and dataset.defects.empty and dataset.modality == "MR"
    assert dataset.classes("Anterior,Posterior") == {"Anterior": 1, "Posterior": 2}
    groups = [case.group for case in dataset.cases]
    assert len(set(groups)) == 72 and set(map(groups.count, groups)) == {2}
    assert dataset.case("hippocampus_003").group == dataset.case("hippocampus_004").group == "2"
