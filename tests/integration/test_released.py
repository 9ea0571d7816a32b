"""The released students: small, licensed, and as good on their test cases as their cards say."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from kdlib.apps.cli import main
from kdlib.inference.student import RELEASED, find_student, load_student

NAMES = ("hippocampus-e1", "hippocampus-s1", "hippocampus-s2")


@pytest.mark.parametrize("name", NAMES)
def test_a_released_student_is_small_whole_and_licensed(name, tmp_path):
    folder = find_student(name, tmp_path)
    student = load_student(folder)  # checks the hashes
    assert folder == RELEASED / name and student.model == name[-2:].upper() and student.facts["teacher"] == "T1"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 2**20
    assert (
        "CC-BY-SA 4.0" in (folder / "LICENSE").read_text()
        and "Medical Segmentation Decathlon" in student.facts["attribution"]
    )
    assert "Not for clinical use" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_released_student_has_the_dice_of_its_card(name, real_data, tmp_path):
    root, student = real_data("hippocampus"), load_student(find_student(name))
    for case in sorted(student.facts["dice"])[::14]:
        out = tmp_path / f"{case}.nii.gz"
        assert main(["predict", name, str(root / "imagesTr" / f"{case}.nii.gz"), "-o", str(out)]) == 0
        mask, truth = (np.asarray(nib.load(p).dataobj) for p in (out, root / "labelsTr" / f"{case}.nii.gz"))
        for value, (label, dice) in enumerate(student.facts["dice"][case].items(), start=1):
            both = 2 * np.count_nonzero((mask == value) & (truth == value))
            found = both / (np.count_nonzero(mask == value) + np.count_nonzero(truth == value))
            assert found == pytest.approx(dice, abs=0.01), (case, label)  # bfloat16 moves a few voxels
