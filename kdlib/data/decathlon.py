"""The Medical Segmentation Decathlon layout: name every defect of a folder at once, index it, download a task."""

from __future__ import annotations

import difflib
import functools
import gzip
import json
import math
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import pooch
import requests
from filelock import FileLock
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from tqdm.auto import tqdm

from kdlib.config import InputError

SUFFIX = ".nii.gz"
LARGEST = 2**33  # bytes of one volume: 512 x 512 x 2000 voxels of eight bytes are half of it
DEFLATE = 1032  # deflate packs at most so many bytes into one
FARTHEST = 5000.0  # mm that a volume may reach along an axis; no body is longer
HIGHEST = 65535  # label value: a table of all values is made


@dataclass(frozen=True)
class Case:
    """One labelled volume.

    Args:
        name: file name without `.nii.gz`.
        image, label: the two NIfTI files.
        group: the patient; all cases of one patient stay in one part of a split.
        shape: voxels along the file's own axes.
        spacing: voxel size in mm along the file's own axes.
    """

    name: str
    image: Path
    label: Path
    group: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class Dataset:
    """An indexed folder.

    Args:
        name: as in dataset.json.
        root: the folder.
        modality: "CT" (intensities in HU) or "MR" (arbitrary units).
        labels: label names -> values in the label files, background left out.
        cases: sorted by name.
        defects: columns case, file, defect, remedy: what was dropped and why; empty when the folder is clean.
    """

    name: str
    root: Path
    modality: str
    labels: dict[str, int]
    cases: tuple[Case, ...]
    defects: pd.DataFrame = field(compare=False, repr=False)

    def case(self, name: str) -> Case:
        """The case called `name`. Raises: InputError where there is none."""
        for case in self.cases:
            if case.name == name:
                return case
        raise InputError(f"{self.root}: no case {name!r}{_suggestion(name, (case.name for case in self.cases))}")

    def classes(self, target: str) -> dict[str, int]:
        """Names -> values of the labels in `target`: one name, several joined by ",", or "all".

        Raises: InputError for a name that is not in dataset.json (lists those that are).
        """
        if target == "all":
            return dict(self.labels)
        # a label's own name may hold a comma ("portal vein, splenic vein")
        names = [target] if target in self.labels else [name.strip() for name in target.split(",")]
        for name in names:
            if name not in self.labels:
                raise InputError(
                    f"{self.root / 'dataset.json'}: no label {name!r}{_suggestion(name, self.labels)}; "
                    f"choose from {', '.join(self.labels)}"
                )
        return {name: self.labels[name] for name in names}


def _suggestion(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _hippocampus_pair(name: str) -> str:
    """Volumes 2k - 1 and 2k of Task04 are very probably the two hippocampi of one person."""
    number = re.search(r"\d+$", name)
    if number is None:
        raise InputError(f"case {name!r}: Hippocampus cases are paired by number; pass group= with a rule of your own")
    return str((int(number.group()) + 1) // 2)


# data set name in dataset.json -> rule from case name to patient; elsewhere each file is its own patient
GROUPING: dict[str, Callable[[str], str]] = {"Hippocampus": _hippocampus_pair}


def index(folder: str | Path, on_defect: str = "raise", group: str | Callable[[str], str] = "auto") -> Dataset:
    """Read every file of a folder in Decathlon layout once and describe it.

    Images and labels are paired by file name; name, modality and labels come from dataset.json. Hidden files
    (`._*`, `.DS_Store`) are ignored. A class that a case lacks is no defect, a label with no class at all is one.

    Args:
        folder: holds dataset.json, imagesTr/ and labelsTr/.
        on_defect: "raise" stops and shows the table of all defects; "drop" leaves the defective cases out and
            reports them in `Dataset.defects`.
        group: "auto" looks the data set's name up in GROUPING, else each file is its own patient; or a function
            from case name to patient.

    Raises: InputError for a folder that cannot be used, for a defect under "raise", or when no case is left.
    """
    if on_defect not in ("raise", "drop"):
        raise InputError(f"on_defect {on_defect!r}: choose 'raise' or 'drop'")
    if group != "auto" and not callable(group):
        raise InputError(f"group {group!r}: give 'auto' or a function from case name to patient")
    root = Path(folder)
    name, modality, labels, listed = _read_description(root)
    patient = group if callable(group) else GROUPING.get(name, str)

    files = set(listed)
    for part in (root / "imagesTr", root / "labelsTr"):
        if not part.is_dir():
            raise InputError(f"{part}: no such folder; a Decathlon task has dataset.json, imagesTr/ and labelsTr/")
        files |= {path.name for path in part.glob(f"*{SUFFIX}") if not path.name.startswith(".")}
    if not files:
        raise InputError(f"{root}: imagesTr/ and labelsTr/ hold no {SUFFIX} file; give the folder of a Decathlon task")
    rows, cases = [], []
    for file in sorted(file for file in files if not _plain(file)):
        files.remove(file)
        rows.append((ascii(file), ascii(file), "file name too long, or with unprintable characters", "rename the file"))
    for case, file in sorted((file.removesuffix(SUFFIX), file) for file in files):
        image, label = root / "imagesTr" / file, root / "labelsTr" / file
        defects, geometry = _inspect(image, label, listed.get(file), {0, *labels.values()})
        rows += [(case, *defect) for defect in defects]
        if not defects:
            cases.append(Case(case, image, label, patient(case), *geometry))
    table = pd.DataFrame(rows, columns=["case", "file", "defect", "remedy"])
    if rows and (on_defect == "raise" or not cases):
        advice = "mend them, or pass on_defect='drop' to go on without these cases" if cases else "no case is left"
        total = len({*table["case"], *(file.removesuffix(SUFFIX) for file in files)})
        lines = [f"{root}: {len(table)} defects in {table['case'].nunique()} of {total} cases; {advice}"]
        raise InputError("\n".join(lines + [" | ".join(row) for row in (table.columns, *rows)]))
    return Dataset(name, root, modality, labels, tuple(cases), table)


def _read_description(root: Path) -> tuple[str, str, dict[str, int], dict[str, tuple[str, str]]]:
    """dataset.json: name, modality, labels without background, and file name -> (image, label) as it lists them."""
    path = root / "dataset.json"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError
        if path.stat().st_size > 2**26:
            raise ValueError("larger than 64 MiB")
        description = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
        name, modalities, named = (description[key] for key in ("name", "modality", "labels"))
        modality_names = [text.strip().upper() for text in modalities.values()]
        labels = {text.strip(): int(value) for value, text in named.items() if int(value) != 0}
        listed = [(PurePosixPath(pair["image"]), PurePosixPath(pair["label"])) for pair in description["training"]]
        for text in (name, *labels, *(str(file) for pair in listed for file in pair)):
            if not _plain(text):
                raise ValueError(f"{ascii(text)[:100]} is no name: give up to 200 printable characters")
    except OSError:
        raise InputError(f"{path}: cannot be read; give the folder of a Decathlon task, which holds it") from None
    except KeyError as error:
        raise InputError(f"{path}: no entry {error}; it must give name, modality, labels and training") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: malformed ({str(error)[:200]}); restore the task's own file") from None
    if set(modality_names) == {"CT"}:
        modality = "CT"
    elif any(token in text for text in modality_names for token in ("MR", "T1", "T2", "FLAIR")):
        modality = "MR"
    else:
        raise InputError(f"{path}: modality {modalities} is neither CT nor MR; these two are supported")
    if not labels or len(set(labels.values())) != sum(int(value) != 0 for value in named):
        raise InputError(f'{path}: labels {named} must name each value once, like {{"0": "background", "1": "spleen"}}')
    digits = all(value.isascii() and value.isdigit() for value in named)  # int() also takes "-1", " 1" and "1_0"
    if not digits or len(labels) > 255 or max(labels.values()) > HIGHEST:
        raise InputError(f"{path}: labels must be at most 255, with values from 1 to {HIGHEST}; renumber them")
    for file in (file for pair in listed for file in pair):
        if file.is_absolute() or ".." in file.parts:
            raise InputError(f"{path}: {file} leaves the folder; list files like ./imagesTr/case_01{SUFFIX}")
    pairs = {image.name: (str(image), str(label)) for image, label in listed if not image.name.startswith(".")}
    if not all(pairs):
        raise InputError(f"{path}: an entry of training names a folder; list files like ./imagesTr/case_01{SUFFIX}")
    if len({*listed}) > len({image.name for image, _ in listed}):
        raise InputError(f"{path}: an image stands twice in training, with two labels; list it once")
    return name, modality, labels, pairs


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose names are all different: of two entries with one name, json would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an entry stands twice among {ascii([name for name, _ in pairs][:20])}")
    return found


def _plain(name: str) -> bool:
    """Whether a name can stand in tables, messages and file names: no control, direction or undecodable character."""
    return name.isprintable() and 0 < len(name.encode()) <= 200


class Defect(InputError):
    """What is wrong with one file, and the remedy."""

    def __init__(self, defect: str, remedy: str):
        super().__init__(f"{defect}; {remedy}")
        self.row = defect, remedy


class _Volume(NamedTuple):
    raw: np.ndarray
    slope: float
    inter: float
    affine: np.ndarray

    def scaled(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values, dtype=np.float64) * self.slope + self.inter


def decode(stream: BinaryIO) -> nib.Nifti1Image:
    """The image in the bytes of a `.nii.gz` file, to their end; never more is set aside than the file can hold.

    Raises: Defect for anything but one whole three-dimensional NIfTI-1 image of numbers, its header free of faults.
    """
    again = "download it again, or remove the case"
    try:
        packed = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        if stream.read(2) != b"\x1f\x8b":
            raise Defect("not a gzip file", again)
        stream.seek(0)
        with gzip.open(stream) as file:
            header = nib.Nifti1Header(file.read(348), check=False)
            if header["magic"].item() != header.single_magic or header["sizeof_hdr"] != 348:
                raise Defect("not a NIfTI image in one file (NIfTI-1)", again)
            shape, dtype = header.get_data_shape(), header.get_data_dtype()
            if dtype.kind not in "iuf" or dtype.itemsize > 8:
                raise Defect(f"voxels of type {dtype}", "save one number a voxel, of at most 64 bits")
            if len(shape) != 3 or min(shape) < 1:
                raise Defect(f"shape {shape}, not three-dimensional", "save one three-dimensional volume")
            if faults := _header_faults(header):
                raise Defect(f"header with {', '.join(faults)}", "export it again, with a whole header")
            size = int(header["vox_offset"]) + math.prod(shape) * dtype.itemsize
            if size > LARGEST or size > DEFLATE * packed:
                raise Defect(f"truncated, or a wrong header: it claims {size:,} bytes of voxels", again)
            if packed > size + size // 50 + 2**16:  # gzip would look for an end behind any number of zeros
                raise Defect("more bytes than its header says", again)
            file.seek(0)
            content = file.read(size + 1)
        if len(content) < size:
            raise EOFError
        if len(content) > size:
            raise Defect("more bytes than its header says", again)
        image = nib.Nifti1Image.from_bytes(content)
    except Defect:
        raise
    except KeyError as code:
        raise Defect(f"voxels of an unknown type, {code}", again) from None
    except (EOFError, OSError, zlib.error):
        raise Defect("truncated, damaged or unreadable", again) from None
    except (ImageFileError, HeaderDataError, WrapStructError, ValueError, OverflowError):
        raise Defect("not a NIfTI image", again) from None
    return image


def _header_faults(header: nib.Nifti1Header) -> list[str]:
    """What nibabel would mend or guess without a word, in words."""
    offset, sizes, codes = header["vox_offset"].item(), header["pixdim"], (header["qform_code"], header["sform_code"])
    faults = {
        "voxels that begin inside it or nowhere": not (offset >= 352 and offset.is_integer()),
        "bits a voxel that are not its type's": header["bitpix"] != 8 * header.get_data_dtype().itemsize,
        "voxel sizes that are none": not (np.isfinite(sizes[1:4]) & (sizes[1:4] > 0)).all(),
        "a handedness (pixdim[0]) that is none": sizes[0] not in (-1, 0, 1),
        "no orientation, or an unknown one": not any(codes) or any(code not in range(6) for code in codes),
        "units other than mm": header["xyzt_units"] & 7 not in (0, 2),
        "an infinite intensity scale": bool(np.isinf(header["scl_slope"])),
    }
    return [fault for fault, found in faults.items() if found]


def read(path: Path) -> nib.Nifti1Image:
    """The image in a `.nii.gz` file, whole, so that a truncated one is found.

    Raises: Defect, see `decode`.
    """
    try:
        with open(path, "rb") as stream:
            return decode(stream)
    except OSError as error:
        raise Defect(f"unreadable ({error.strerror})", "make it readable, or remove the case") from None


def _read(path: Path) -> _Volume:
    """Voxels as stored, since scaled ones take eight times more."""
    image = read(path)
    if not np.isfinite(image.affine).all() or not np.linalg.det(image.affine):
        raise Defect("affine without a volume", "set the voxel size and orientation")
    spacing = nib.affines.voxel_sizes(image.affine)
    if not abs(np.linalg.det(image.affine[:3, :3] / spacing)) > 0.5:
        raise Defect("affine far from right angles", "resample it onto a grid with right angles")
    if spacing.min() < 0.001 or (spacing * image.shape).max() > FARTHEST:
        raise Defect(f"voxels of {' x '.join(f'{mm:.3g}' for mm in spacing)} mm, not a body's", "set the voxel size")
    raw = image.dataobj.get_unscaled()
    # pandas counts values in the machine's own byte order only
    raw = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    return _Volume(raw, image.dataobj.slope, image.dataobj.inter, image.affine)


def _image_defects(image: _Volume) -> Iterator[tuple[str, str]]:
    # NaN and infinity both show in the two extremes, without a mask as large as the volume
    extremes = image.scaled([image.raw.min(), image.raw.max()])
    if not (np.abs(extremes) <= np.finfo(np.float32).max).all():  # a NaN compares false; networks take float32
        yield "NaN or infinite intensities", "replace them, or remove the case"


def _label_defects(label: _Volume, values: set[int]) -> Iterator[tuple[str, str]]:
    found = label.scaled(pd.unique(label.raw.ravel(order="K")))
    whole = np.isfinite(found) & (found == np.rint(found))
    if not whole.all():
        yield "non-integer label values", "save the label as integers"
    if not found.any():
        yield "empty label", "annotate it, or remove the case"
    if unknown := sorted(set(found[whole].tolist()) - values):
        shown = ", ".join(f"{value:.15g}" for value in unknown[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        yield f"values [{shown}]{more} are not in dataset.json", "name them there, or clear them"


def _inspect(image: Path, label: Path, listed: tuple[str, str] | None, values: set[int]) -> tuple[list, tuple | None]:
    """Every (file, defect, remedy) of one case; and its (shape, spacing in mm), None where a defect hides them."""
    names = [f"{path.parent.name}/{path.name}" for path in (image, label)]
    rows, volumes = [], []
    if listed not in (None, tuple(names)):
        rows.append(("dataset.json", f"pairs {listed[0]} with {listed[1]}", f"list {names[0]} with {names[1]}"))
    for path, other, name, missing in (
        (image, label, names[0], "label without an image"),
        (label, image, names[1], "image without a label"),
    ):
        if os.path.isfile(path):  # Path.is_file raises where a name is too long
            try:
                volumes.append(_read(path))
                found = _image_defects(volumes[-1]) if path is image else _label_defects(volumes[-1], values)
                rows += [(name, *defect) for defect in found]
            except Defect as defect:
                rows.append((name, *defect.row))
        elif os.path.lexists(path):
            rows.append((name, "a folder, pipe, device or broken link", "put the file itself there"))
        elif os.path.isfile(path.with_suffix("")):
            rows.append((name, "stored uncompressed, as .nii", "compress it with gzip"))
        else:
            defect = missing if os.path.isfile(other) else "listed in dataset.json, not on disk"
            rows.append((name, defect, "add the file, or remove the case"))
    if len(volumes) < 2:
        return rows, None
    shape, affine = volumes[0].raw.shape, volumes[0].affine
    spacing = nib.affines.voxel_sizes(affine)
    if volumes[1].raw.shape != shape:
        rows.append((names[1], f"shape {volumes[1].raw.shape}, image {shape}", "resample it onto the image"))
    # how far apart (mm) the two affines may place one voxel; rounding in headers stays far below a tenth of a voxel
    elif (np.abs(volumes[1].affine - affine) @ [*shape, 1]).max() > 0.1 * spacing.min():
        rows.append((names[1], "affine differs from the image's", "resample it onto the image, or copy its affine"))
    return rows, (shape, tuple(spacing.tolist()))


def download(task: str, folder: str | Path, url: str | None = None, md5: str | None = None) -> Path:
    """Fetch and unpack a task of the Decathlon; a broken transfer is resumed, a task already there returned at once.

    Args:
        task: "Task09_Spleen" and its like.
        folder: receives the task's folder and, beside it, the archive.
        url, md5: of the archive; by default those that MONAI publishes for the task.

    Returns: the task's folder, for `index`.
    Raises: InputError for an unknown task, a failed transfer, a wrong checksum or an archive that cannot be trusted.
    """
    from monai.apps import DecathlonDataset  # slow to import, and only needed here

    tables = DecathlonDataset.resource, DecathlonDataset.md5
    if task not in tables[0] and (url is None or md5 is None):
        raise InputError(f"task {task!r}: choose from {', '.join(tables[0])}, or give its archive's url and md5")
    url, md5 = url or tables[0][task], md5 or tables[1][task]
    folder = Path(folder)
    target = folder / task
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{task}.lock"):  # parallel jobs must not write to one archive
            if (target / "dataset.json").is_file():
                return target
            if target.exists():
                raise InputError(f"{target}: exists but holds no dataset.json; move it away and run again")
            try:
                fetch = functools.partial(_resume, folder / f"{task}.tar.part")
                archive = pooch.retrieve(url, f"md5:{md5}", f"{task}.tar", folder, downloader=fetch)
            except ValueError as error:  # pooch names both hashes, and has removed the file
                raise InputError(f"{url}: {error} Run again to download it anew.") from None
            _extract(Path(archive), target)
    except OSError as error:
        raise InputError(f"{url}: {error}; what has arrived is kept, run again to resume") from None
    return target


def _resume(part: Path, url: str, file: str, _: None) -> None:
    """Downloader for pooch: appends to `part` what is missing of `url` (HTTP Range), then moves it to `file`."""
    start = part.stat().st_size if part.exists() else 0
    # identity: a compressed transfer could not be resumed by byte position
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
        if response.status_code != 416:  # nothing is left to send: the checksum decides
            response.raise_for_status()
            start = start if response.status_code == 206 else 0  # a server without Range sends all of it
            total = start + int(response.headers.get("Content-Length", 0))
            plain = os.environ.get("KDLIB_PROGRESS") == "plain"
            with (
                open(part, "ab" if start else "wb") as stream,
                tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=plain) as bar,
            ):
                for chunk in response.iter_content(1 << 20):
                    bar.update(stream.write(chunk))
            if part.stat().st_size < total:
                raise OSError(f"the connection closed after {part.stat().st_size} of {total} bytes")
    os.replace(part, file)


def _extract(archive: Path, target: Path) -> None:
    """Unpack beside `target` and rename when complete, so that a stopped extraction leaves no half data set."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            names, unpacked, most = set(), 0, 100 * archive.stat().st_size
            for member in tar:  # the "data" filter below would only strip the root of an absolute path
                path = PurePosixPath(member.name)
                unpacked += member.size + tarfile.BLOCKSIZE
                faults = {
                    "leaves the folder or is no plain file": path.is_absolute() or ".." in path.parts
                    or not (member.isfile() or member.isdir()) or "\0" in member.name,
                    "stands in it twice": member.isfile() and path in names,
                    "makes it unpack to more than a hundred times its size": unpacked > most,
                }  # fmt: skip
                for fault in (fault for fault, found in faults.items() if found):
                    raise InputError(
                        f"{archive}: {member.name!r} {fault}, so nothing was unpacked; "
                        "delete the archive and get it from a source you trust"
                    )
                names.add(path)
            tar.extractall(partial, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"{archive}: not a whole tar archive ({error}); delete it and run again") from None
    found = [path.parent for path in (*partial.glob("dataset.json"), *partial.glob("*/dataset.json"))]
    if len(found) != 1:
        raise InputError(f"{archive}: holds {len(found)} dataset.json, not one; give the archive of one Decathlon task")
    os.replace(found[0], target)
    shutil.rmtree(partial, ignore_errors=True)
