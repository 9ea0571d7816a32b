from __future__ import annotations

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest

from kdlib.config import Preprocessing
from kdlib.data import case_table
from kdlib.data.decathlon import index


@pytest.mark.parametrize("codes, thickness", [("RAS", 4.0), ("LPS", 4.0), ("SRA", 1.0), ("ASL", 2.0)])
def test_the_thickness_is_that_of_axial_slices_in_any_orientation(tmp_path, codes, thickness):
    spacing = (1.0, 2.0, 4.0)
    matrix = np.zeros((4, 4))
    for axis, code in enumerate(codes):
        pair = next(number for number, letters in enumerate(("LR", "PA", "IS")) if code in letters)
        matrix[pair, axis] = spacing[axis] * (1 if code in "RAS" else -1)
    matrix[3, 3] = 1
    label = np.zeros((6, 5, 4), np.uint8)
    label[1:4, 1:3, 1] = 1
    for folder, data in (("imagesTr", np.random.default_rng(0).normal(size=label.shape)), ("labelsTr", label)):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(data.astype(np.float32), matrix), tmp_path / folder / "a_1.nii.gz")
    description = {
        "name": "a", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"}, "numTraining": 1,
        "training": [{"image": "./imagesTr/a_1.nii.gz", "label": "./labelsTr/a_1.nii.gz"}], "test": [],
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    dataset = index(tmp_path)
    row = case_table(dataset, {"spleen": 1}).iloc[0]
    assert row["thickness (mm)"] == thickness
    assert [row[f"d{axis} (mm)"] for axis in "xyz"] == list(spacing)
    assert row["spleen (ml)"] == pytest.approx(6 * 8 / 1000) and "spleen mean intensity" not in row
    inside = nib.load(tmp_path / "imagesTr" / "a_1.nii.gz").get_fdata()[label == 1]
    view = Preprocessing(16, 2.0)
    row = case_table(dataset, {"spleen": 1, "liver": 2}, view).iloc[0]
    assert row["spleen mean intensity"] == pytest.approx(inside.mean()) and np.isnan(row["liver mean intensity"])
    of_mr = case_table(dataclasses.replace(dataset, modality="MR"), {"spleen": 1}, view)
    assert "spleen best Dice" in of_mr and "spleen mean intensity" not in of_mr, "MR has no unit"
