"""A DICOM series in, DICOM SEG out: read back by pydicom and highdicom."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_predict import mask_at, student_folder

from kdlib.apps.cli import main
from kdlib.inference.dicom import read_series

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

SHAPE = (7, 24, 20)  # slices, rows, columns
POSITION = (-30.0, -20.0, 100.0)  # of the first slice's first pixel, in mm (LPS)
SPACING = (0.9, 1.2)  # of rows and columns


def write_series(folder: Path, modality: str = "CT", heights=None, tilt: float = 0.0) -> np.ndarray:
    """A series whose files are named against their order in the body, each slice `tilt` mm beside the one below it.

    Returns: HU [slices, rows, columns].
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.random.default_rng(0).integers(0, 1400, SHAPE).astype(np.int16)
    heights = 2.5 * np.arange(SHAPE[0]) if heights is None else heights
    series, frame, study = (pydicom.uid.generate_uid() for _ in range(3))
    for number, height in enumerate(heights):
        file = pydicom.Dataset()
        file.file_meta = pydicom.dataset.FileMetaDataset()
        file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        file.SeriesInstanceUID, file.StudyInstanceUID, file.FrameOfReferenceUID = series, study, frame
        file.PatientID, file.PatientName, file.PatientBirthDate, file.PatientSex = "1", "Phantom", "", ""
        file.StudyDate, file.StudyTime, file.AccessionNumber, file.StudyID = "20260101", "120000", "", ""
        file.ReferringPhysicianName, file.Manufacturer, file.SeriesDescription = "", "", "abdomen"
        file.ContentDate, file.ContentTime = datetime.date(2026, 1, 1), datetime.time(12)
        file.Modality, file.SeriesNumber, file.InstanceNumber = modality, 3, number + 1
        file.Rows, file.Columns = SHAPE[1:]
        file.PixelSpacing, file.SliceThickness = list(SPACING), 2.5
        file.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        file.ImagePositionPatient = [POSITION[0], POSITION[1] + tilt * number, POSITION[2] + float(height)]
        file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 1
        file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
        file.RescaleSlope, file.RescaleIntercept, file.RescaleType = 2, -1000, "HU"
        file.PixelData = stored[number].tobytes()
        file.save_as(folder / f"{90 - number}.dcm", enforce_file_format=True)
    return 2.0 * stored - 1000


@pytest.fixture
def there(tmp_path, monkeypatch) -> np.ndarray:
    """A folder, worked in, with a student `ct` and a series `ser`; its HU."""
    monkeypatch.chdir(tmp_path)
    student_folder(tmp_path / "ct", "CT", ("spleen", "left thing"))
    return write_series(tmp_path / "ser")


def as_nifti(hu: np.ndarray) -> nib.Nifti1Image:
    """The series as NIfTI, written by hand: x runs to the left in DICOM and to the right in NIfTI, y to the front."""
    affine = np.diag([-SPACING[1], -SPACING[0], 2.5, 1.0])
    affine[:3, 3] = -POSITION[0], -POSITION[1], POSITION[2]
    return nib.Nifti1Image(hu.transpose(2, 1, 0).astype(np.float32), affine)


def test_a_series_gives_the_mask_of_the_same_volume_as_nifti(there, capsys):
    nib.save(as_nifti(there), "same.nii.gz")
    assert main(["predict", "ct", "ser", "same.nii.gz", "-o", "out", "--probabilities"]) == 0
    assert "warning" not in capsys.readouterr().err  # a bar there is
    series, same = nib.load("out/ser.nii.gz"), nib.load("out/same.nii.gz")
    assert (series.header["qform_code"], series.header["sform_code"]) == (1, 1)
    series, same = map(nib.as_closest_canonical, (series, same))  # highdicom's slices go down
    np.testing.assert_allclose(series.affine, same.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(series.dataobj), np.asarray(same.dataobj))
    assert set(np.unique(mask_at("out/ser.nii.gz"))) == {0, 1, 2}


@pytest.mark.parametrize("words", [["-o", "seg.dcm"], ["-o", "seg.nii.gz", "--dicom-seg"]])
def test_a_dicom_seg_holds_the_mask_and_refers_to_the_series(there, words):
    assert main(["predict", "ct", "ser", "-o", "mask.nii.gz"]) == 0
    assert main(["predict", "ct", "ser", *words]) == 0
    assert Path("seg.nii.gz").exists() == ("--dicom-seg" in words)
    seg = highdicom.seg.segread("seg.dcm")
    names = [seg.get_segment_description(number) for number in (1, 2)]
    assert [name.segment_label for name in names] == ["spleen", "left thing"]
    assert names[0].segmented_property_type.meaning == "Spleen"
    first = pydicom.dcmread("ser/90.dcm")
    assert (seg.FrameOfReferenceUID, seg.StudyInstanceUID) == (first.FrameOfReferenceUID, first.StudyInstanceUID)
    assert (seg.PatientID, seg.SOPClassUID) == ("1", pydicom.uid.SegmentationStorage)
    volume = seg.get_volume(combine_segments=True)
    expected = mask_at("mask.nii.gz").transpose(2, 1, 0)  # slices, rows, columns
    whole = volume.match_geometry(highdicom.get_volume_from_series([pydicom.dcmread(p) for p in Path("ser").iterdir()]))
    np.testing.assert_array_equal(whole.array, expected)


def test_a_series_without_attributes_of_its_patient_has_a_seg_too(there):
    for path in Path("ser").iterdir():
        file = pydicom.dcmread(path)
        for name in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyTime"):
            delattr(file, name)
        file.save_as(path)
    assert main(["predict", "ct", "ser", "-o", "seg.dcm"]) == 0
    assert highdicom.seg.segread("seg.dcm").PatientBirthDate == ""


def test_a_series_that_no_seg_can_refer_to_keeps_its_mask_and_costs_no_other(there, capsys):
    write_series(Path("odd"))
    for path in Path("odd").iterdir():
        file = pydicom.dcmread(path)
        del file.StudyInstanceUID
        file.save_as(path)
    assert main(["predict", "ct", "odd", "ser", "-o", "out", "--dicom-seg"]) == 2
    err = capsys.readouterr().err
    assert "no DICOM SEG can refer to this series" in err and "1 of 2 scans failed; the others are done" in err
    assert {path.name for path in Path("out").iterdir()} == {"odd.nii.gz", "ser.nii.gz", "ser.dcm"}


def test_what_is_stored_for_display_alone_changes_no_hu(there):
    before, _ = read_series(Path("ser"))
    for path in Path("ser").iterdir():
        file = pydicom.dcmread(path)
        file.PhotometricInterpretation = "MONOCHROME1"
        mapping = pydicom.Dataset()
        mapping.RealWorldValueFirstValueMapped, mapping.RealWorldValueLastValueMapped = 0, 1400
        mapping.RealWorldValueIntercept, mapping.RealWorldValueSlope = 0.0, 0.001
        mapping.LUTLabel = mapping.LUTExplanation = "other"
        unit = pydicom.sr.coding.Code("1", "UCUM", "no units")
        mapping.MeasurementUnitsCodeSequence = [highdicom.sr.CodedConcept.from_code(unit)]
        file.RealWorldValueMappingSequence = [mapping]
        file.save_as(path)
    after, _ = read_series(Path("ser"))
    np.testing.assert_array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))


def test_a_class_is_coded_as_anatomy_or_as_nothing_in_particular(there):
    student_folder(Path("other"), "CT", ("Anterior", "Left Thing"))
    assert main(["predict", "other", "ser", "-o", "seg.dcm"]) == 0
    seg = highdicom.seg.segread("seg.dcm")
    kinds = {seg.get_segment_description(number).segmented_property_type.meaning for number in (1, 2)}
    assert kinds == {"Anatomical Structure"}, "SNOMED's anterior is a direction"


def test_a_mask_without_any_voxel_is_a_dicom_seg_too(there):
    student_folder(Path("none"), "CT", ("spleen",), threshold=1.0)
    assert main(["predict", "none", "ser", "-o", "seg.dcm"]) == 0
    assert not highdicom.seg.segread("seg.dcm").get_volume(combine_segments=True).array.any()


def uneven() -> None:
    write_series(Path("bad"), heights=[0, 2.5, 5, 7.5, 12.5, 15, 17.5])


def two_series() -> None:
    write_series(Path("bad"))
    write_series(Path("other"))
    Path("other/90.dcm").rename("bad/1.dcm")


def truncated() -> None:
    write_series(Path("bad"))
    path = Path("bad/88.dcm")
    path.write_bytes(path.read_bytes()[:-500])


def one_file() -> None:
    write_series(Path("bad"))
    for path in sorted(Path("bad").iterdir())[1:]:
        path.unlink()


def tilted() -> None:
    write_series(Path("bad"), tilt=0.09)  # 2 degrees


BAD = {
    "tilted": (tilted, "no regular volume: slices lie up to 0.5 mm beside a straight stack (gantry tilt)"),
    "uneven": (uneven, "the DICOM series is no regular volume"),
    "two": (two_series, "holds 2 DICOM series (1 of 'abdomen', 7 of 'abdomen'); give each a folder"),
    "truncated": (truncated, "no regular volume"),
    "one slice": (one_file, "holds a DICOM series of one file; give the whole series"),
    "nothing": (lambda: Path("bad").mkdir(), "holds neither NIfTI files nor a DICOM series"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_series_is_one_line(there, capsys, kind):
    make, message = BAD[kind]
    make()
    assert main(["predict", "ct", "bad", "-o", "seg.dcm", "--overwrite"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: bad") and message in err and err.count("\n") == 1
    assert not Path("seg.dcm").exists()


def test_what_does_not_fit_is_said(there, capsys, monkeypatch):
    write_series(Path("mr"), "MR")
    assert main(["predict", "ct", "mr", "-o", "out"]) == 0
    assert capsys.readouterr().err == "warning: mr: its modality is MR, and test-s1 was trained on CT\n"
    nib.save(as_nifti(there), "same.nii.gz")
    assert main(["predict", "ct", "same.nii.gz", "-o", "mask.nii.gz", "--dicom-seg"]) == 2
    assert "DICOM SEG refers to a DICOM series, and this is NIfTI" in capsys.readouterr().err
    assert not Path("mask.nii.gz").exists()
    monkeypatch.setitem(sys.modules, "highdicom", None)
    assert main(["predict", "ct", "ser", "-o", "mask.nii.gz"]) == 2
    assert capsys.readouterr().err == "error: highdicom is not installed: pip install -e .[deploy]\n"
