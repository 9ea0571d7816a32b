"""One NIfTI file, read whole: every fault has a name, and nothing is corrected without a word."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from kdlib.config import InputError

SUFFIXES = (".nii.gz", ".nii")  # in small or capital letters
LARGEST = 2**33  # bytes of one volume: 512 x 512 x 2000 voxels of eight bytes are half of it
DEFLATE = 1032  # deflate packs at most so many bytes into one
HEADERS = {348: (nib.Nifti1Header, nib.Nifti1Image), 540: (nib.Nifti2Header, nib.Nifti2Image)}  # by their size in bytes
FARTHEST = 5000.0  # mm that a volume may reach along an axis; no body is longer
RIGHT = 0.99  # least volume of a voxel over the product of its sides: 8 degrees of tilt, mm and ml right to 1 %
AGAIN = "download or export it again, or remove the case"


class Defect(InputError):
    """What is wrong with one file, and the remedy."""

    def __init__(self, defect: str, remedy: str):
        super().__init__(f"{defect}; {remedy}")
        self.row = defect, remedy


def stem(name: str) -> str:
    """A file's name without `.nii.gz` or `.nii`, in small or capital letters; "" for files of other kinds."""
    return next((name[: -len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def read(path: Path) -> nib.Nifti1Image:
    """The image in a `.nii.gz` or `.nii` file, whole, so that a truncated one is found; never more memory is set aside
    than the file can hold.

    Raises: Defect for anything but one whole three-dimensional NIfTI-1 or NIfTI-2 image of numbers without faults in
        its header.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise Defect(f"larger than {LARGEST:,} bytes", "remove the case")
        blob = path.read_bytes()
    except OSError as error:
        raise Defect(f"unreadable ({error.strerror})", "make it readable, or remove the case") from None
    suffix = path.name[len(stem(path.name)) :]
    if suffix not in (suffix.lower(), suffix.upper()):  # nibabel does not open it
        raise Defect(f"its suffix {suffix} mixes small and capital letters", f"rename it to {suffix.lower()}")
    zipped = path.name.lower().endswith(".gz")
    if zipped != (blob[:2] == b"\x1f\x8b"):
        raise Defect("not a gzip file" if zipped else "a gzip file that is named .nii", f"rename it, or {AGAIN}")
    try:
        with gzip.open(io.BytesIO(blob)) if zipped else io.BytesIO(blob) as stream:
            return _decode(stream, len(blob), DEFLATE if zipped else 1)
    except Defect:
        raise
    except KeyError as code:
        raise Defect(f"voxels of an unknown type, {code}", AGAIN) from None
    except (EOFError, OSError, zlib.error):
        raise Defect("truncated, damaged or unreadable", AGAIN) from None
    except (ImageFileError, HeaderDataError, WrapStructError, ValueError, OverflowError):
        raise Defect("not a NIfTI image", AGAIN) from None


def read_again(path: Path) -> nib.Nifti1Image:
    """The image in a file that was sound when it was indexed. Raises: InputError where it no longer is."""
    try:
        return read(path)
    except Defect as defect:
        raise InputError(f"{path}: cannot be read any more: {defect}") from None


def _decode(stream: BinaryIO, packed: int, ratio: int) -> nib.Nifti1Image:
    """The image in an unpacked stream whose file has `packed` bytes and can hold at most `ratio` times as many."""
    start = stream.read(max(HEADERS))
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")} & HEADERS.keys()
    if not sizes:
        raise Defect("not a NIfTI image in one file", AGAIN)
    length = sizes.pop()
    header_class, image_class = HEADERS[length]
    header = header_class(start[:length], check=False)
    if header["magic"].item() != header.single_magic or header["sizeof_hdr"] != length:
        raise Defect("not a NIfTI image in one file", AGAIN)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise Defect(f"voxels of type {dtype}", "save one number per voxel, of at most 64 bits")
    if len(shape) != 3 or min(shape) < 1:
        raise Defect(f"shape {shape}, not three-dimensional", "save one three-dimensional volume")
    if faults := _header_faults(header):
        raise Defect(f"header with {', '.join(faults)}", "export it again, with a whole header")
    size = int(header["vox_offset"]) + math.prod(shape) * dtype.itemsize
    if size > LARGEST or size > ratio * packed:
        raise Defect(f"truncated, or a wrong header: it claims {size:,} bytes of voxels", AGAIN)
    if packed > size + size // 50 + 2**16:  # gzip would look for an end behind any number of zeros
        raise Defect("more bytes than its header says", AGAIN)
    stream.seek(0)
    content = stream.read(size + 1)
    if len(content) < size:
        raise EOFError
    if len(content) > size:
        raise Defect("more bytes than its header says", AGAIN)
    return image_class.from_bytes(content)


def _header_faults(header: nib.Nifti1Header) -> list[str]:
    """What nibabel would correct or guess without a word, in words."""
    offset, sizes, codes = header["vox_offset"].item(), header["pixdim"], (header["qform_code"], header["sform_code"])
    slope, inter = header["scl_slope"], header["scl_inter"]  # no scale where the slope is 0 or NaN
    faults = {
        "voxels that begin inside it or nowhere": not (offset >= header.single_vox_offset and offset == int(offset)),
        "bits per voxel that are not its type's": header["bitpix"] != 8 * header.get_data_dtype().itemsize,
        "voxel sizes that are none": not (np.isfinite(sizes[1:4]) & (sizes[1:4] > 0)).all(),
        "a handedness (pixdim[0]) that is none": sizes[0] not in (-1, 0, 1),
        "no orientation, or an unknown one": not any(codes) or any(code not in range(6) for code in codes),
        "units other than mm": int(header["xyzt_units"]) & 7 not in (0, 2),
        "an infinite intensity scale": bool(
            np.isinf(slope) or (np.isfinite(slope) and slope and not np.isfinite(inter))
        ),
    }
    return [fault for fault, found in faults.items() if found]


def check_grid(image: nib.Nifti1Image) -> None:
    """Raises: Defect for an affine that is no grid in a body."""
    if not np.isfinite(image.affine).all() or not np.linalg.det(image.affine):
        raise Defect("affine without a volume", "set the voxel size and orientation")
    spacing = nib.affines.voxel_sizes(image.affine)
    if not abs(np.linalg.det(image.affine[:3, :3] / spacing)) > RIGHT:
        raise Defect("affine without right angles", "resample it onto a grid with right angles")
    if spacing.min() < 0.001 or (spacing * image.shape).max() > FARTHEST:
        raise Defect(f"voxels of {' x '.join(f'{mm:.3g}' for mm in spacing)} mm, not a body's", "set the voxel size")


def check_intensities(low: float, high: float) -> None:
    """Raises: Defect where the two extremes of a volume show NaN, infinity, or more than a network's float32 holds."""
    if not (np.abs([low, high]) <= np.finfo(np.float32).max).all():  # a NaN compares false
        raise Defect("NaN or infinite intensities", "replace them, or remove the case")
