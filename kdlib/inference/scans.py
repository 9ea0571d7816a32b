"""A new scan and its mask: files in, of NIfTI or a DICOM series, and files out on the same grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from kdlib.config import InputError
from kdlib.data.nifti import Defect, check_grid, check_intensities, read, stem
from kdlib.files import entries, write
from kdlib.inference.dicom import read_series

FEWEST = 16  # different intensities; an image with fewer is a mask


@dataclass(frozen=True)
class Scan:
    """One volume.

    Args:
        path: of the file, or of the series' folder.
        voxels: XYZ float32, scaled as the header says.
        image: the grid that its mask takes over, with its header.
        modality: "CT", "MR" or another as DICOM says it; "" of NIfTI, which does not say it.
        series: datasets of a DICOM series; empty of NIfTI.
    """

    path: Path
    voxels: np.ndarray
    image: nib.Nifti1Image
    modality: str = ""
    series: tuple = ()

    @property
    def affine(self) -> np.ndarray:
        """Voxel to world in mm (RAS)."""
        return self.image.affine


def find_scans(path: Path) -> list[Path]:
    """The scans that a path names: the NIfTI files of a folder, else the path itself (a file, or a DICOM series)."""
    if not os.path.isdir(path):
        return [path]
    return [file for file in entries(path) if stem(file.name) and not file.name.startswith(".")] or [path]


def scan_name(path: Path) -> str:
    """What a scan's mask is called, without suffix."""
    return stem(path.name) or path.resolve().name


def read_scan(path: Path) -> Scan:
    """Reads a NIfTI file, or the folder of a DICOM series.

    Raises:
        InputError: nothing is there; a file that `kdlib.data.nifti.read` or `read_series` refuses; intensities that
            are not finite; one slice; a mask.
    """
    series, modality = [], ""
    try:
        if os.path.isdir(path):
            image, series = read_series(path)
            modality = str(series[0].get("Modality", ""))
        elif not os.path.isfile(path):
            raise InputError(f"{path} does not exist: give a NIfTI file, a folder of them, or that of a DICOM series")
        elif not stem(path.name):
            raise InputError(f"{path} is neither .nii.gz nor .nii: give a NIfTI file, or the folder of a DICOM series")
        else:
            image = read(path)
            check_grid(image)
        voxels = np.asanyarray(image.dataobj).astype(np.float32, copy=False)
        check_intensities(voxels.min(), voxels.max())
        if min(voxels.shape) < 2:
            raise Defect(f"one slice, of shape {voxels.shape}", "give the whole volume")
        values = np.unique(voxels.ravel()[:: max(1, voxels.size // 2**20)])
        if len(values) < FEWEST and (values == np.rint(values)).all():
            shown = ", ".join(f"{value:g}" for value in values)
            raise Defect(f"holds the values {shown} alone, so it is a mask or empty", "give the scan itself")
    except Defect as defect:
        fault, remedy = defect.row
        raise InputError(f"{path}: {fault}; {remedy.removesuffix(', or remove the case')}") from None
    return Scan(path, voxels, image, modality, tuple(series))


def on_grid(scan: Scan, voxels: np.ndarray, description: str) -> nib.Nifti1Image:
    """An array XYZ[C] on the scan's grid: same affine, form codes and units, its own type, no scale."""
    header = scan.image.header.copy()
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    header.extensions.clear()  # of the scan: they may name the patient
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"], header["aux_file"] = description.encode("ascii", "replace")[:79], b""
    return type(scan.image)(voxels, scan.affine, header)  # its own affine: form codes stay


def save(path: Path, image: nib.Nifti1Image) -> None:
    """Writes a NIfTI file whole or not at all. Raises: InputError as `kdlib.files.write`."""
    write(path, lambda partial: nib.save(image, partial))


def volumes_ml(mask: nib.Nifti1Image, classes: Sequence[str]) -> dict[str, float]:
    """Class -> ml of a mask of class indices."""
    counts = np.bincount(np.asarray(mask.dataobj).ravel(), minlength=len(classes) + 1)
    ml = abs(np.linalg.det(mask.affine[:3, :3])) / 1000
    return {name: float(counts[value] * ml) for value, name in enumerate(classes, 1)}
