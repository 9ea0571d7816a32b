"""A DICOM series as a volume, and a mask as DICOM SEG, both by highdicom (the extra `deploy`)."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from kdlib.config import InputError
from kdlib.files import entries, write
from kdlib.inference.backends import library
from kdlib.inference.student import Student

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MAY_BE_EMPTY = (  # DICOM's type 2: must be there, and may be empty
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "ReferringPhysicianName",
    "StudyID", "StudyDate", "StudyTime",
)  # fmt: skip


def _volume(series):
    """highdicom's volume of a series, its slices sorted by their position along their normal: in HU, so rescaled, but
    neither inverted for display nor mapped to another quantity.

    Raises: ValueError where a slice lies more than a tenth of a pixel beside where the volume has it (gantry tilt).
    """
    as_stored = dict(apply_presentation_lut=False, apply_real_world_transform=False)
    volume = library("highdicom").get_volume_from_series(series, dtype=np.float32, **as_stored)
    where = np.array([dataset.ImagePositionPatient for dataset in series], float)
    where = where[np.argsort(where @ volume.affine[:3, 0])]  # slices are its first axis
    beside = np.linalg.norm(where - (volume.affine[:3, [3]] + volume.affine[:3, [0]] * np.arange(len(where))).T, axis=1)
    if beside.max() > 0.1 * min(volume.spacing[1:]):
        raise ValueError(f"slices lie up to {beside.max():.1f} mm beside a straight stack (gantry tilt)")
    return volume


def read_series(folder: Path) -> tuple[nib.Nifti1Image, list]:
    """The volume of the DICOM series in a folder, XYZ float32, rescaled, along columns, rows and slices; its datasets.

    Raises:
        InputError: no series or several; slices that are not alike, or not evenly spaced along their normal.
    """
    pydicom = library("pydicom")
    library("highdicom")  # say at once that it is missing
    found = defaultdict(list)
    for path in filter(Path.is_file, entries(folder)):
        try:
            dataset = pydicom.dcmread(path) if pydicom.misc.is_dicom(path) else ()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}; change that") from None
        except Exception as error:  # a damaged file raises whatever its bytes lead to
            raise InputError(f"{path}: a damaged DICOM file ({_line(error)}); export it again") from None
        if "PixelData" in dataset:
            found[dataset.get("SeriesInstanceUID", "")].append(dataset)
    if len(found) != 1:
        several = ", ".join(f"{len(some)} of {some[0].get('SeriesDescription', uid)!r}" for uid, some in found.items())
        what = f"{len(found)} DICOM series ({several}); give each a folder of its own" if found else (
            "neither NIfTI files nor a DICOM series; give a folder that does"
        )  # fmt: skip
        raise InputError(f"{folder} holds {what}")
    (series,) = found.values()
    if len(series) == 1:
        raise InputError(f"{folder} holds a DICOM series of one file; give the whole series, one file per slice")
    try:
        volume = _volume(series)
    except Exception as error:  # highdicom and pydicom have no common kind
        raise InputError(f"{folder}: the DICOM series is no regular volume: {_line(error)}; export it again") from None
    # highdicom's axes are slices, rows, columns; those of the file are turned round, as converters do
    affine = (LPS_TO_RAS @ volume.affine)[:, [2, 1, 0, 3]]
    image = nib.Nifti1Image(volume.array.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    return image, series


def save_seg(path: Path, series: Sequence, mask: np.ndarray, student: Student) -> None:
    """Writes class indices XYZ as a DICOM SEG of a series, one binary segment per class.

    Attributes of patient and study that a de-identified series lacks are left empty in it, too.

    Raises: InputError for a series that no SEG can refer to, or a file that cannot be written.
    """
    highdicom, pydicom = library("highdicom"), library("pydicom")
    for dataset, name in itertools.product(series, MAY_BE_EMPTY):
        if name not in dataset:
            setattr(dataset, name, "")
    try:
        file = _segmentation(highdicom, pydicom, series, mask, student)
    except Exception as error:  # highdicom and pydicom have no common kind
        text = f"{path}: no DICOM SEG can refer to this series: {_line(error)}; give -o mask.nii.gz alone"
        raise InputError(text) from None
    write(path, lambda partial: file.save_as(partial))


def _segmentation(highdicom, pydicom, series: Sequence, mask: np.ndarray, student: Student):
    """The DICOM SEG of `save_seg`, as highdicom makes it."""
    codes = pydicom.sr.codedict.codes
    version = next(iter(student.files.values()), student.facts.get("run", "none"))[:16]  # its weights
    how = highdicom.AlgorithmIdentificationSequence(
        student.name, codes.DCM.ArtificialIntelligence, version, source="kdlib"
    )
    types = codes.cid7192  # of segmented anatomy
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=value,
            segment_label=name,
            segmented_property_category=codes.cid7150.AnatomicalStructure,
            segmented_property_type=getattr(types, name.title().replace(" ", ""), codes.SCT.AnatomicalStructure),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=how,
        )
        for value, name in enumerate(student.classes, 1)
    ]
    return highdicom.seg.Segmentation(
        source_images=list(series),
        pixel_array=_volume(series).with_array(mask.transpose(2, 1, 0)),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=int(series[0].get("SeriesNumber") or 0) + 1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="kdlib",
        manufacturer_model_name=student.name,
        software_versions=version,
        device_serial_number="none",
        series_description=f"segmentation by {student.name}"[:64],
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
