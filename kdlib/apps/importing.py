"""`kdlib import`: pairs of images and masks, wherever they lie, as a data set in Decathlon layout."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kdlib.apps.jobs import warnings_said
from kdlib.config import PROFILES, InputError
from kdlib.data import DefectError, check_view, index
from kdlib.data.grouping import shorten
from kdlib.data.nifti import Defect, read, stem
from kdlib.data.roundtrip import whole_size
from kdlib.files import entries, write_folder, write_json

PATTERNS = (  # of images and masks, tried in this order; relative to the folder and without .nii.gz
    ("*_image", "*_label"), ("*_image", "*_mask"), ("*_img", "*_seg"), ("images/*", "labels/*"),
    ("images/*", "masks/*"), ("imagesTr/*", "labelsTr/*"), ("*/image", "*/label"), ("*/image", "*/mask"),
)  # fmt: skip


class Pair(NamedTuple):
    """One case; of one that lacks a file, None stands there."""

    image: Path | None
    mask: Path | None
    patient: str | None = None


def run_import(options: argparse.Namespace) -> int:
    """Writes the data set, checks it as a study does, and prints what to type next.

    Raises:
        InputError: no pairs; a defective case; the output exists or cannot be written. Nothing is left then.
    """
    out = options.output
    if os.path.exists(out):  # Path.exists raises where a name is too long
        raise InputError(f"{out} exists: choose another folder")
    if (options.images is None) != (options.masks is None):
        raise InputError("--images and --masks belong together: give both, or none for the usual names")
    labels = _labels(options.labels) if options.labels else {}
    pairs = _from_csv(options.pairs) if os.path.isfile(options.pairs) else _from_folder(options)
    labels = labels or _values(pairs)
    write_folder(out, lambda partial: _write(partial, out.name, pairs, labels, options))
    try:
        command = _check(out, pairs, labels, options)
    except BaseException:
        shutil.rmtree(out)
        raise
    print(f"next: {command}")
    return 0


def _from_csv(path: Path) -> dict[str, Pair]:
    """Case -> pair, of a table whose files are given relative to it."""
    try:
        table = pd.read_csv(path, dtype=str, skipinitialspace=True, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a CSV file ({error})") from None
    if not {"image", "mask"} <= set(table.columns):
        raise InputError(f"{path}: columns {', '.join(map(str, table.columns))}; it needs image and mask")
    pairs = {}
    for number, row in enumerate(table.to_dict("records"), 2):
        files = [path.parent / row[column] for column in ("image", "mask")]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise InputError(f"{path}, line {number}: {missing[0]} does not exist; give paths relative to the table")
        if other := [file for file in files if not stem(file.name)]:
            raise InputError(f"{path}, line {number}: {other[0]} is not NIfTI (.nii or .nii.gz); convert it first")
        image, mask = (stem(file.name) for file in files)
        case = mask if image == f"{mask}_0000" else image  # nnU-Net's names
        _add(pairs, case, Pair(*files, row.get("patient")), path)
    return pairs


def _from_folder(options: argparse.Namespace) -> dict[str, Pair]:
    """Case -> pair, of files whose names match the patterns; what * stands for is the case."""
    folder = options.pairs
    if not os.path.isdir(folder):
        raise InputError(f"{folder} does not exist: give a folder of images and masks, or a CSV of them")
    files = [file for file in sorted(folder.rglob("*")) if stem(file.name) and not file.name.startswith(".")]
    for patterns in [(options.images, options.masks)] if options.images else PATTERNS:
        found = [_matching(folder, files, pattern) for pattern in patterns]
        images = {file: case for file, case in found[0].items() if file not in found[1]}
        if images and found[1]:
            break
    else:
        named = " and ".join(filter(None, (options.images, options.masks))) or "; ".join(map(" and ".join, PATTERNS))
        raise InputError(
            f"{folder}: {len(files)} NIfTI files, no images and masks named {named}; give --images GLOB --masks GLOB"
        )
    if left := [str(file.relative_to(folder)) for file in files if file not in images and file not in found[1]]:
        named = f"{patterns[0]} or {patterns[1]}"
        print(f"not imported: {len(left)} of {len(files)} files, not named {named}: {shorten(left)}", file=sys.stderr)
    masked = {*found[1].values()}
    for file, case in images.items():  # nnU-Net's names
        if case not in masked and (short := case.removesuffix("_0000")) in masked:
            images[file] = short
    sides = ({}, {})
    for side, matched in zip(sides, (images, found[1]), strict=True):
        for file, case in matched.items():
            _add(side, case, file, folder)
    return {case: Pair(sides[0].get(case), sides[1].get(case)) for case in sorted({*sides[0], *sides[1]})}


def _matching(folder: Path, files: list[Path], pattern: str) -> dict[Path, str]:
    """File -> what its pattern's * stand for, of those that match."""
    bare = re.sub(r"(?i)\.nii(\.gz)?$", "", pattern)
    expression = re.compile(re.escape(bare).replace(r"\*\*/", "(.*/)?").replace(r"\*", "([^/]*)"))
    found = {}
    for file in files:
        match = expression.fullmatch(file.relative_to(folder).with_name(stem(file.name)).as_posix())
        if match:
            found[file] = "_".join(filter(None, match.groups())).replace("/", "_").strip("_") or stem(file.name)
    return found


def _add(found: dict, case: str, value: object, source: Path) -> None:
    if case in found:
        raise InputError(f"{source}: two files are of case {case!r}; give each case a name of its own")
    found[case] = value


def _labels(text: str) -> dict[str, int]:
    """Name -> value, of "spleen,liver" or "spleen=1,liver=6"."""
    parts = text.split(",")
    valued = ["=" in part for part in parts]
    pairs = [part.rpartition("=")[::2] if "=" in part else (part, str(number)) for number, part in enumerate(parts, 1)]
    names, values = ([word.strip() for word in words] for words in zip(*pairs, strict=True))
    if any(valued) > all(valued) or not all(names) or len({*names}) < len(names) or not all(map(str.isdecimal, values)):
        raise InputError(f"labels {text!r}: give names, or each with its value: 'spleen,liver' or 'spleen=1,liver=6'")
    if len({*map(int, values)} - {0}) < len(values):
        raise InputError(f"labels {text!r}: give each label a value of its own, and none 0, which is the background")
    return dict(zip(names, map(int, values), strict=True))


def _values(pairs: dict[str, Pair]) -> dict[str, int]:
    """Name -> value, of the values that the masks hold; unreadable ones are named by the check."""
    values = set()
    for pair in pairs.values():
        with contextlib.suppress(Defect):
            values |= {*np.unique(np.asanyarray(read(pair.mask).dataobj)).tolist()} if pair.mask else set()
    return {f"label {value:g}": int(value) for value in sorted(values) if value > 0 and float(value).is_integer()} or {
        "label 1": 1
    }


def _write(
    folder: Path, name: str, pairs: dict[str, Pair], labels: dict[str, int], options: argparse.Namespace
) -> None:
    for part, side in (("imagesTr", "image"), ("labelsTr", "mask")):
        (folder / part).mkdir(parents=True)
        for case, pair in pairs.items():
            source = getattr(pair, side)
            if source is not None:
                _place(source.resolve(), folder / part / f"{case}{source.name[len(stem(source.name)) :]}", options.copy)
    if any(pair.patient for pair in pairs.values()):
        table = pd.DataFrame({"case": list(pairs), "patient": [pair.patient for pair in pairs.values()]})
        table.to_csv(folder / "patients.csv", index=False, quoting=csv.QUOTE_ALL)
    _describe(folder, name, labels, options.modality)


def _place(source: Path, target: Path, copy: bool) -> None:
    if not copy:
        with contextlib.suppress(OSError):  # another disk, or a file system without links
            return os.link(source, target)
    shutil.copyfile(source, target)


def _describe(folder: Path, name: str, labels: dict[str, int], modality: str) -> None:
    """Writes dataset.json, which lists the cases of which both files are there."""
    files = [{stem(file.name): file for file in entries(folder / part)} for part in ("imagesTr", "labelsTr")]
    cases = sorted(files[0].keys() & files[1].keys())
    listed = [
        {
            side: f"./{part[case].parent.name}/{part[case].name}"
            for side, part in zip(("image", "label"), files, strict=True)
        }
        for case in cases
    ]
    named = {"0": "background"} | {str(value): label for label, value in labels.items()}
    record = {"name": name, "modality": {"0": "MRI" if modality == "MR" else "CT"}, "labels": named}
    write_json(folder / "dataset.json", record | {"numTraining": len(cases), "training": listed})


def _check(out: Path, pairs: dict[str, Pair], labels: dict[str, int], options: argparse.Namespace) -> str:
    """Reads the data set as a study does, takes defective cases out where that was asked for, and says what is odd.

    Returns: the command that shows it.
    """
    grouped = (out / "patients.csv").exists()
    try:
        with warnings_said():
            dataset = index(out, options.on_defect, "patients.csv" if grouped else "auto")
    except DefectError as error:
        cases = error.table["case"].nunique()
        advice = "fix them, or leave these cases out by --on-defect drop" if cases < len(pairs) else "fix them"
        headline = f"{options.pairs}: defects in {cases} of {len(pairs)} cases, so nothing is imported; {advice}"
        raise DefectError(headline, error.table) from None
    kept = {case.name for case in dataset.cases}
    for file in [*entries(out / "imagesTr"), *entries(out / "labelsTr")]:
        if stem(file.name) not in kept:
            file.unlink()
    _describe(out, out.name, labels, options.modality)
    for row in dataset.defects.itertuples():
        print(f"left out: {row.case}, {row.defect}", file=sys.stderr)
    print(f"{out}: {len(dataset.cases)} cases, {dataset.grouping}, labels {', '.join(labels)}")
    profile = "ct96" if options.modality == "CT" else "hippocampus"
    words = [
        sys.executable,
        "-m",
        "kdlib",
        "study",
        "--data",
        str(out),
        "--target",
        "all",
        "--profile",
        profile,
        "--only",
        "00_data",
    ]
    words += ["--group", "patients.csv"] if grouped else []
    try:
        check_view(dataclasses.replace(dataset, on_defect="raise"), labels, PROFILES[profile].preprocessing)
    except DefectError:  # the slices of that profile cut the target
        size = max(whole_size(case, PROFILES[profile].preprocessing) for case in dataset.cases)
        words += ["--changes", json.dumps({"size": size})]
    return shlex.join(words)
