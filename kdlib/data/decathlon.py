"""A folder of labelled scans: name every defect at once, warn of what is odd, describe each case.

Two layouts are read: the Medical Segmentation Decathlon's and the raw folder of nnU-Net (`case_0000.nii.gz`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd

from kdlib.config import InputError
from kdlib.data.description import Description, is_plain, read_description
from kdlib.data.grouping import EACH_CASE, group_cases, shorten, suggest_pairs
from kdlib.data.nifti import Defect, check_grid, check_intensities, read, stem
from kdlib.files import entries

DEFECT_COLUMNS = ["case", "file", "defect", "remedy"]
WARNING_COLUMNS = ["case", "file", "warning", "remedy"]


class DataWarning(UserWarning):
    """Something about the data that a reader of the results must know, or that is probably a mistake: one line."""


class DefectError(InputError):
    """Defective cases: the message is the table of all of them, with what to do about each.

    Args:
        headline: first line of the message.
        table: columns DEFECT_COLUMNS, one row per defect.
    """

    def __init__(self, headline: str, table: pd.DataFrame):
        rows = [tuple(table.columns), *table.itertuples(index=False, name=None)]
        widths = [min(40, max(len(row[column]) for row in rows)) for column in (0, 1)]
        lines = [f"{row[0]:{widths[0]}} | {row[1]:{widths[1]}} | {row[2]} | {row[3]}" for row in rows]
        super().__init__("\n".join([headline, *lines]))
        self.table = table


@dataclass(frozen=True)
class Case:
    """One labelled volume.

    Args:
        name: file name without `.nii.gz`.
        image, label: the two NIfTI files.
        group: the patient; all cases of one patient stay in one part of a split.
        shape: voxels along the file's own axes.
        spacing: voxel size in mm along the file's own axes.
        voxels: label value -> number of voxels, of the values that occur, background included.
    """

    name: str
    image: Path
    label: Path
    group: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    voxels: dict[int, int] = field(default_factory=dict, compare=False, repr=False)


def credit(root: Path) -> tuple[str, str]:
    """Licence and attribution, as a data set's dataset.json has them; "" where it says nothing."""
    about = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    return str(about.get("licence", about.get("license", ""))), str(about.get("reference", ""))


@dataclass(frozen=True)
class Dataset:
    """An indexed folder.

    Args:
        name: as in dataset.json, or the folder's name.
        root: the folder.
        modality: "CT" (intensities in HU) or "MR" (arbitrary units).
        labels: label names -> values in the label files, background left out.
        cases: sorted by name.
        defects: columns case, file, defect, remedy: what was dropped and why; empty when the folder is clean.
        warnings: columns case, file, warning, remedy: what is odd but used; case and file are "" for the whole folder.
        grouping: how the patients were recognised, in a few words.
        on_defect: "raise" or "drop", as given to `index`.
    """

    name: str
    root: Path
    modality: str
    labels: dict[str, int]
    cases: tuple[Case, ...]
    defects: pd.DataFrame = field(compare=False, repr=False)
    warnings: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=WARNING_COLUMNS), compare=False, repr=False
    )
    grouping: str = EACH_CASE
    on_defect: str = "raise"

    @property
    def credit(self) -> tuple[str, str]:
        """Its licence and attribution, see `credit`."""
        return credit(self.root)

    def case(self, name: str) -> Case:
        """The case called `name`. Raises: InputError where there is none."""
        known = {case.name: case for case in self.cases}
        if name not in known:
            raise InputError(f"{self.root}: no case {name!r}{_suggestion(name, known)}")
        return known[name]

    def classes(self, target: str) -> dict[str, int]:
        """Names -> values of the labels in `target`: one name, several joined by ",", or "all".

        Raises: InputError for a name that is not in dataset.json (lists those that are).
        """
        if target == "all":
            return dict(self.labels)
        # a label's own name may hold a comma ("portal vein, splenic vein")
        names = [target] if target in self.labels else [name.strip() for name in target.split(",")]
        for name in (name for name in names if name not in self.labels):
            known = f"{_suggestion(name, self.labels)}; choose from {', '.join(self.labels)}"
            raise InputError(f"{self.root / 'dataset.json'}: no label {name!r}{known}")
        return {name: self.labels[name] for name in names}


def _suggestion(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def index(folder: str | Path, on_defect: str = "raise", group: str = "auto") -> Dataset:
    """Read every file of a folder once and describe it.

    Images and labels are paired by file name (an image may end in nnU-Net's `_0000`); name, modality and labels come
    from dataset.json. Hidden files (`._*`, `.DS_Store`) are ignored. A class that a case lacks is no defect, a label
    without any class is one. What is odd is said by `DataWarning`, one line per kind, and listed in `Dataset.warnings`.

    Args:
        folder: holds dataset.json, imagesTr/ and labelsTr/.
        on_defect: "raise" stops and shows the table of all defects; "drop" leaves the defective cases out and
            reports them in `Dataset.defects`.
        group: how cases are grouped into patients, see `kdlib.data.grouping.group_cases`.

    Raises:
        DefectError: for defects under "raise", or when no case is left.
        InputError: for a folder that cannot be used.
    """
    if on_defect not in ("raise", "drop"):
        raise InputError(f"on_defect {on_defect!r}: choose 'raise' or 'drop'")
    root = Path(folder)
    about = read_description(root)
    files = _find_files(root)
    names = sorted({*files["imagesTr"], *files["labelsTr"], *about.training})
    if not names:
        raise InputError(f"{root}: imagesTr/ and labelsTr/ hold no .nii.gz or .nii file; give the data set's folder")
    defects, scans = [], {}
    for name in names:
        if not is_plain(name):
            text = ascii(name)
            defects.append((text, text, "file name too long, or with unprintable characters", "rename the file"))
            continue
        pair = [files[part].get(name, []) for part in ("imagesTr", "labelsTr")]
        found, scan = _inspect(name, *pair, about.training.get(name), {0, *about.labels.values()})
        defects += [(name, *defect) for defect in found]
        if not found:
            scans[name] = scan
    table = pd.DataFrame(defects, columns=DEFECT_COLUMNS)
    if defects and (on_defect == "raise" or not scans):
        raise_defects(root, table, len(names), len(scans))
    patients, grouping = group_cases(list(scans), group, root)
    cases = tuple(replace(scan.case, group=patients[name]) for name, scan in scans.items())
    odd = _warnings(scans, about, grouping if group == "auto" else "")
    for _, rows in odd.groupby(["warning", "remedy"], sort=False):
        first = rows.iloc[0]
        affected = [name for name in rows["case"] if name]
        where = f" [{shorten(affected)}]" if affected else ""
        warnings.warn(f"{root}: {first['warning']}{where}; {first['remedy']}", DataWarning, stacklevel=2)
    return Dataset(about.name, root, about.modality, about.labels, cases, table, odd, grouping, on_defect)


def raise_defects(root: Path, table: pd.DataFrame, total: int, left: int) -> None:
    """Raises the `DefectError` of a table of defects; of `total` cases, `left` have none."""
    found = f"{root}: {len(table)} defects in {table['case'].nunique()} of {total} cases"
    advice = "fix them, or leave these cases out: make study ON_DEFECT=drop (in Python: on_defect='drop')"
    raise DefectError(f"{found}; {advice if left else 'no case is left'}", table)


def _find_files(root: Path) -> dict[str, dict[str, list[Path]]]:
    """Part -> case -> its files; an image's `_0000` is taken off where no label has the whole name."""
    found: dict[str, dict[str, list[Path]]] = {}
    for part in ("labelsTr", "imagesTr"):
        folder = root / part
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; a data set has dataset.json, imagesTr/ and labelsTr/")
        found[part] = defaultdict(list)
        for path in entries(folder):
            name = "" if path.name.startswith(".") else stem(path.name)
            short = name.removesuffix("_0000")
            if part == "imagesTr" and name not in found["labelsTr"] and short in found["labelsTr"]:
                name = short
            if name:
                found[part][name].append(path)
    return found


class _Volume(NamedTuple):
    raw: np.ndarray
    slope: float
    inter: float
    affine: np.ndarray

    def scaled(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values, dtype=np.float64) * self.slope + self.inter

    def extremes(self) -> np.ndarray:
        """Lowest and highest value, in which NaN and infinity show without a mask as large as the volume."""
        return np.sort(self.scaled([self.raw.min(), self.raw.max()]))

    def counts(self) -> dict[float, int]:
        """Scaled value -> number of voxels."""
        raw = self.raw.astype(self.raw.dtype.newbyteorder("="), copy=False)  # pandas counts in the machine's order only
        found = pd.Series(raw.ravel(order="K")).value_counts(sort=False, dropna=False)
        return dict(zip(self.scaled(found.index.to_numpy()).tolist(), found.tolist(), strict=True))

    def pixel_hash(self) -> str:
        """The same for the same intensities, however they are stored."""
        digest = hashlib.sha256(repr(self.raw.shape).encode())
        for part in range(self.raw.shape[2]):
            digest.update(self.scaled(self.raw[..., part]).astype(np.float32).tobytes())
        return digest.hexdigest()


class _Scan(NamedTuple):
    """A case whose patient is not known yet, and what its intensities tell."""

    case: Case
    extremes: tuple[float, float]
    inter: float
    pixels: str  # hash of the scaled intensities


def _read(path: Path) -> _Volume:
    """Voxels as stored, since scaled ones take eight times more."""
    image = read(path)
    check_grid(image)
    return _Volume(image.dataobj.get_unscaled(), image.dataobj.slope, image.dataobj.inter, image.affine)


def _label_defects(voxels: dict[float, int], values: set[int]) -> Iterator[tuple[str, str]]:
    found = np.array(list(voxels))
    whole = np.isfinite(found) & (found == np.rint(found))
    if not whole.all():
        yield "non-integer label values", "save the label as integers"
    if not found.any():
        yield "empty label", "annotate it, or remove the case"
    if unknown := sorted(set(found[whole].tolist()) - values):
        shown = shorten([f"{value:.15g}" for value in unknown], 10)
        yield f"values [{shown}] are not in dataset.json", "name them there, or clear them"


def _inspect(
    name: str, images: list[Path], labels: list[Path], listed: tuple[str, str] | None, values: set[int]
) -> tuple[list[tuple[str, str, str]], _Scan | None]:
    """Every (file, defect, remedy) of one case; and what it holds, None where a defect hides that."""
    rows, volumes, voxels = [], [], {}
    if listed and [stem(PurePosixPath(file).name) or file for file in listed] != [name, name]:
        rows.append(("dataset.json", f"pairs {listed[0]} with {listed[1]}", "list image and label of one name"))
    for part, paths, others in (("imagesTr", images, labels), ("labelsTr", labels, images)):
        file = f"{part}/{paths[0].name if paths else name + '.nii.gz'}"
        if len(paths) > 1:
            also = ", ".join(path.name for path in paths[1:])
            rows.append((file, f"there is also {also}", "keep one of them"))
        elif not paths:
            missing = "label without an image" if part == "imagesTr" else "image without a label"
            defect = missing if others else "listed in dataset.json, not on disk"
            rows.append((file, defect, "add the file, or remove the case"))
        elif not os.path.isfile(paths[0]):  # Path.is_file raises where a name is too long
            rows.append((file, "a folder, pipe, device or broken link", "put the file itself there"))
        else:
            try:
                volumes.append(_read(paths[0]))
                if part == "imagesTr":
                    low, high = volumes[-1].extremes()
                    check_intensities(low, high)
                    if low == high:
                        raise Defect(f"the same intensity everywhere ({low:g})", "export it again, or remove the case")
                else:
                    voxels = volumes[-1].counts()
                    rows += [(file, *defect) for defect in _label_defects(voxels, values)]
            except Defect as defect:
                rows.append((file, *defect.row))
    if len(volumes) < 2:
        return rows, None
    image, label = volumes
    file, shape, spacing = f"labelsTr/{labels[0].name}", image.raw.shape, nib.affines.voxel_sizes(image.affine)
    if label.raw.shape != shape:
        rows.append((file, f"shape {label.raw.shape}, image {shape}", "resample it onto the image"))
    # how far apart (mm) the two affines may place one voxel; rounding in headers stays far below a tenth of a voxel
    elif (np.abs(label.affine - image.affine) @ [*shape, 1]).max() > 0.1 * spacing.min():
        rows.append((file, "affine differs from the image's", "resample it onto the image, or copy its affine"))
    if rows:
        return rows, None
    counts = {int(value): number for value, number in voxels.items()}
    case = Case(name, images[0], labels[0], "", shape, tuple(spacing.tolist()), counts)
    return rows, _Scan(case, tuple(image.extremes().tolist()), image.inter, image.pixel_hash())


def _warnings(scans: dict[str, _Scan], about: Description, grouping: str) -> pd.DataFrame:
    """What is odd about cases that are used; `grouping` is "" where the user said how to group."""
    rows, same = [], defaultdict(list)
    for name, scan in scans.items():
        if oddity := _odd_values(about.modality, scan):
            rows.append((name, f"imagesTr/{scan.case.image.name}", *oddity))
        if about.training and name not in about.training:
            unlisted = "on disk, but not in the list of dataset.json; it is used", "list it, or remove the files"
            rows.append((name, f"imagesTr/{scan.case.image.name}", *unlisted))
        same[scan.pixels].append(name)
    for names in same.values():
        if len(names) > 1:
            remedy = "remove all but one: in two parts of a split they would leak"
            rows.append(("", "", f"cases {shorten(names)} have the same pixels", remedy))
    for label, value in about.labels.items():
        if not any(scan.case.voxels.get(value) for scan in scans.values()):
            rows.append(("", "dataset.json", f"label {label!r} ({value}) occurs in no case", "check the label values"))
    if grouping == EACH_CASE and (pairs := suggest_pairs(list(scans), list(about.labels))):
        rows.append(("", "", *pairs))
    return pd.DataFrame(rows, columns=WARNING_COLUMNS)


def _odd_values(modality: str, scan: _Scan) -> tuple[str, str] | None:
    low, high = scan.extremes
    if modality == "CT" and low >= 0 and not scan.inter:
        if high > 1100:
            offset = "CT values start at 0 without an intercept: probably HU with an offset of 1024"
            return offset, "store HU, e.g. with scl_inter = -1024"
        return "CT values start at 0 and end below 1100: not HU, rather a picture or a scaled image", "store HU"
    if modality == "CT" and (high - low < 50 or low < -10_000 or high > 100_000):
        return "CT values are not in the range of HU", "store HU, or correct the modality in dataset.json"
    if modality == "MR" and -1100 <= low <= -900 and 200 <= high <= 4100:
        return "MR values from about -1000 on look like HU", "correct the modality in dataset.json"
    return None
