"""`kdlib import`: own images and masks become a data set that a study takes, or a table of what is wrong with them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from kdlib.apps.cli import main
from kdlib.apps.cli import parser as command_line
from kdlib.data import index


def save(path: str, seed: int = 0, mask: bool = False, shape=(20, 20, 8), values=(0, 1, 6)) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    voxels = rng.choice(values, shape).astype(np.uint8) if mask else rng.integers(-900, 900, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([3.0, 3.0, 5.0, 1.0])), path)


def save_pairs(image: str, mask: str, cases=("a", "b", "c")) -> None:
    for seed, case in enumerate(cases):
        save(image.replace("*", case), seed)
        save(mask.replace("*", case), seed, mask=True)


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(*words: str) -> int:
    return main(["import", *words, "-o", "out", "--modality", "CT"])


LABELS = ("--labels", "spleen=1,liver=6")


@pytest.mark.parametrize(
    "image, mask, words",
    [
        ("mine/*_image.nii.gz", "mine/*_label.nii.gz", ()),
        ("mine/images/*.nii", "mine/labels/*.nii", ()),
        ("mine/imagesTr/*.nii.gz", "mine/labelsTr/*.nii.gz", ()),
        ("mine/*/image.nii.gz", "mine/*/mask.nii.gz", ()),
        ("mine/ct/*.nii.gz", "mine/x/y/*_seg.nii.gz", ("--images", "ct/*.nii.gz", "--masks", "x/y/*_seg.nii.gz")),
        ("mine/*.nii.gz", "mine/*_seg.nii.gz", ("--images", "*", "--masks", "*_seg")),
        ("mine/images/*_0000.nii.gz", "mine/labels/*.nii.gz", ()),  # nnU-Net
    ],
)
def test_pairs_are_found_by_their_names(image, mask, words, capsys):
    save_pairs(image, mask)
    Path("mine/._a_image.nii.gz").write_bytes(b"")  # left by macOS
    assert imported("mine", *words, *LABELS) == 0
    dataset = index("out")
    assert [case.name for case in dataset.cases] == ["a", "b", "c"]
    assert (dataset.name, dataset.modality, dataset.labels) == ("out", "CT", {"spleen": 1, "liver": 6})
    for case in dataset.cases:
        assert case.image.read_bytes() == Path(image.replace("*", case.name)).read_bytes()
        assert case.label.read_bytes() == Path(mask.replace("*", case.name)).read_bytes()
        assert os.path.samefile(case.image, image.replace("*", case.name))  # a hard link
    assert sorted(path.name for path in Path().iterdir()) == ["mine", "out"]
    assert "out: 3 cases, each case is a patient, labels spleen, liver" in capsys.readouterr().out


def test_the_next_command_is_one_that_a_study_takes(capsys):
    save_pairs("mine/images/*.nii.gz", "mine/labels/*.nii.gz")
    assert imported("mine", *LABELS) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: {sys.executable} -m kdlib study --data out --target all --profile ct96 --only 00_data"
    options = command_line().parse_args(last.split()[4:])
    assert (options.data, options.only) == ("out", ["00_data"])


def test_slices_that_would_cut_the_target_are_made_larger(capsys):
    for kind in ("image", "label"):
        save(f"mine/a_{kind}.nii.gz", mask=kind == "label", shape=(200, 20, 8))  # 600 mm in slices of 384
    assert imported("mine", *LABELS) == 0
    assert capsys.readouterr().out.rstrip().endswith("""--changes '{"size": 160}'""")  # 600 / 4 = 150 pixels


def test_a_table_gives_pairs_and_patients(capsys):
    save_pairs("mine/images/*.nii.gz", "mine/labels/*.nii.gz")
    rows = [f"images/{case}.nii.gz,labels/{case}.nii.gz,{'p1' if case < 'c' else 'p2'}" for case in "abc"]
    Path("mine/pairs.csv").write_text("\n".join(["image,mask,patient", *rows]))
    assert imported("mine/pairs.csv", *LABELS, "--copy") == 0
    assert "--group patients.csv" in capsys.readouterr().out
    dataset = index("out", group="patients.csv")
    assert [case.group for case in dataset.cases] == ["p1", "p1", "p2"]
    assert not os.path.samefile("out/imagesTr/a.nii.gz", "mine/images/a.nii.gz")


def test_a_table_of_images_with_nnunets_names(capsys):
    save_pairs("mine/*_0000.nii.gz", "mine/*.nii.gz")
    Path("mine/pairs.csv").write_text(
        "\n".join(["image,mask,patient", *(f"{c}_0000.nii.gz,{c}.nii.gz,NA" for c in "abc")])
    )
    assert imported("mine/pairs.csv", *LABELS) == 0
    assert [(case.name, case.group) for case in index("out", group="patients.csv").cases] == [(c, "NA") for c in "abc"]


def test_the_table_may_be_called_patients_csv(capsys):
    save_pairs("mine/images/*.nii.gz", "mine/labels/*.nii.gz")
    rows = [f"mine/images/{case}.nii.gz,mine/labels/{case}.nii.gz,p{case < 'c'}" for case in "abc"]
    Path("patients.csv").write_text("\n".join(["image,mask,patient", *rows]))
    assert imported("patients.csv", *LABELS) == 0
    assert "table patients.csv" in capsys.readouterr().out


def test_files_of_another_name_are_told(capsys):
    save_pairs("mine/*_image.nii.gz", "mine/*_label.nii.gz", "ab")
    save_pairs("mine/*_img.nii.gz", "mine/*_seg.nii.gz", "c")
    assert imported("mine", *LABELS) == 0
    said = capsys.readouterr().err
    assert said == "not imported: 2 of 6 files, not named *_image or *_label: c_img.nii.gz, c_seg.nii.gz\n"


def test_what_is_left_out_is_left_out_of_the_next_command_too(capsys):
    save_pairs("mine/images/*.nii", "mine/labels/*.nii", ("c[0]", "c[1]", "c[2]"))
    save("mine/labels/c[1].nii", mask=True, shape=(20, 20, 7))
    for kind in ("images", "labels"):
        save(f"mine/{kind}/c[2].nii", mask=kind == "labels", shape=(200, 20, 8))  # 600 mm in slices of 384
    assert imported("mine", *LABELS, "--on-defect", "drop") == 0
    assert capsys.readouterr().out.rstrip().endswith("""--changes '{"size": 160}'""")
    assert [case.name for case in index("out").cases] == ["c[0]", "c[2]"]
    listed = json.loads(Path("out/dataset.json").read_text())["training"]
    assert [pair["image"] for pair in listed] == ["./imagesTr/c[0].nii", "./imagesTr/c[2].nii"]


def test_labels_are_named_in_order_or_found(capsys):
    save_pairs("mine/images/*.nii.gz", "mine/labels/*.nii.gz")
    assert imported("mine") == 0
    assert index("out").labels == {"label 1": 1, "label 6": 6}
    assert main(["import", "mine", "-o", "two", "--modality", "MR", "--labels", "spleen,liver"]) == 2
    assert "values [6] are not in dataset.json" in capsys.readouterr().err
    for case in "abc":
        save(f"mine/labels/{case}.nii.gz", mask=True, values=(0, 1, 2))
    assert main(["import", "mine", "-o", "two", "--modality", "CT", "--labels", "spleen, liver"]) == 0
    assert json.loads(Path("two/dataset.json").read_text())["labels"] == {
        "0": "background",
        "1": "spleen",
        "2": "liver",
    }


def test_defects_are_a_table_and_nothing_is_left_or_they_are_left_out(capsys):
    save_pairs("mine/images/*.nii.gz", "mine/labels/*.nii.gz", "abcde")
    save("mine/labels/b.nii.gz", mask=True, shape=(20, 20, 7))
    Path("mine/labels/c.nii.gz").unlink()
    Path("mine/images/d.nii.gz").write_bytes(b"no scan")
    assert imported("mine", *LABELS) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "error: mine: defects in 3 of 5 cases, so nothing is imported; "
        "fix them, or leave these cases out by --on-defect drop"
    )
    assert [line.split(" | ")[0].strip() for line in said[1:]] == ["case", "b", "c", "d"]
    assert "image without a label" in said[3] and sorted(path.name for path in Path().iterdir()) == ["mine"]
    assert imported("mine", *LABELS, "--on-defect", "drop") == 0
    assert "left out: c, image without a label\n" in capsys.readouterr().err
    assert [case.name for case in index("out").cases] == ["a", "e"]  # no defect any more
    assert len(list(Path("out").rglob("*.nii.gz"))) == 4


@pytest.mark.parametrize(
    "words, message",
    [
        (["none"], "none does not exist: give a folder of images and masks, or a CSV"),
        (["mine", "--images", "*"], "--images and --masks belong together"),
        (["mine"], "mine: 1 NIfTI files, no images and masks named *_image and *_label;"),
        (["mine", "--images", "ct/*", "--masks", "seg/*"], "named ct/* and seg/*; give --images GLOB --masks GLOB"),
        (["mine/columns.csv"], "columns scan, mask; it needs image and mask"),
        (["mine/missing.csv"], "missing.csv, line 2: mine/a.nii.gz does not exist; give paths relative to the table"),
        (["mine/other.csv"], "other.csv, line 2: mine/scan.mha is not NIfTI (.nii or .nii.gz); convert it first"),
        (["mine/twice.csv"], "two files are of case 'scan'; give each case a name of its own"),
        (["mine", "--labels", "spleen=one"], "labels 'spleen=one': give names, or each with its value"),
        (["mine", "--labels", "spleen=6,liver"], "labels 'spleen=6,liver': give names, or each with its value"),
        (["mine", "--labels", "spleen=1,liver=1"], "give each label a value of its own, and none 0"),
        (["mine", "--labels", "spleen=0,liver=1"], "give each label a value of its own, and none 0"),
    ],
)
def test_what_cannot_be_imported_is_one_line(capsys, words, message):
    save("mine/scan.nii.gz")
    Path("mine/columns.csv").write_text("scan,mask\n")
    Path("mine/missing.csv").write_text("image,mask\na.nii.gz,b.nii.gz\n")
    Path("mine/other.csv").write_text("image,mask\nscan.mha,scan.mha\n")
    Path("mine/scan.mha").touch()
    Path("mine/twice.csv").write_text("image,mask\n" + 2 * "scan.nii.gz,scan.nii.gz\n")
    if "--labels" in words:
        save_pairs("mine/*_image.nii.gz", "mine/*_label.nii.gz")
    assert imported(*words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("error: ")
    assert not Path("out").exists()


def test_an_output_that_exists_is_kept(capsys):
    save_pairs("mine/images/*.nii.gz", "mine/labels/*.nii.gz")
    Path("out").mkdir()
    Path("out/precious").touch()
    assert imported("mine") == 2
    assert capsys.readouterr().err == "error: out exists: choose another folder\n"
    assert [path.name for path in Path("out").iterdir()] == ["precious"]
