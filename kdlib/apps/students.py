"""`kdlib predict` and `kdlib export`: masks of new scans, one after the other, and students in other formats."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from kdlib.apps.jobs import warnings_said
from kdlib.config import InputError
from kdlib.data import DataWarning
from kdlib.inference.backends import Backend, load_backend
from kdlib.inference.dicom import save_seg
from kdlib.inference.predict import mask_of, segment
from kdlib.inference.scans import find_scans, on_grid, read_scan, save, scan_name, volumes_ml
from kdlib.inference.student import Student, find_student, load_student


def run_predict(options: argparse.Namespace) -> int:
    """Writes the masks; a bad scan costs its own mask alone.

    Raises:
        InputError: the student or the output cannot be used; of several scans, some failed, each named before.
    """
    if options.batch < 1:
        raise InputError(f"batch {options.batch}: give a number of slices, 1 or more")
    scans = [scan for path in options.scans for scan in find_scans(path)]
    jobs = _outputs(scans, options)
    folder = find_student(options.student, options.results)
    student = load_student(folder, options.data)
    backend = load_backend(folder, student, options.device)
    failed = []
    plain = os.environ.get("KDLIB_PROGRESS") == "plain" or len(jobs) == 1
    for scan, files in tqdm(jobs.items(), desc=student.name, unit="scan", disable=plain, leave=False):
        try:
            with warnings_said():
                tqdm.write(_segment(student, backend, scan, files, options))
        except InputError as error:
            if len(jobs) == 1:
                raise
            tqdm.write(f"error: {error}", file=sys.stderr)
            failed.append(scan)
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} scans failed; the others are done")
    return 0


def _outputs(scans: list[Path], options: argparse.Namespace) -> dict[Path, dict[str, Path]]:
    """Scan -> what is written of it ("mask", "probabilities", "seg") -> the file."""
    out, jobs = options.output, {}
    name = "" if os.path.isdir(out) else out.name.lower()  # Path.is_dir raises where a name is too long
    suffix = next((end for end in (".nii.gz", ".nii", ".dcm") if name.endswith(end)), "")
    if suffix and len(scans) > 1:
        raise InputError(f"{out}: the masks of {len(scans)} scans need a folder; give -o FOLDER")
    if name and not suffix and out.suffix:
        raise InputError(f"{out}: an unknown format; give .nii.gz, .nii or .dcm, or a folder")
    for scan in scans:
        base = out.with_name(out.name[: -len(suffix)]) if suffix else out / scan_name(scan)
        named = {"seg": out} if suffix == ".dcm" else {"mask": base.with_name(base.name + (suffix or ".nii.gz"))}
        if options.dicom_seg and suffix != ".dcm":
            named["seg"] = base.with_name(base.name + ".dcm")
        if options.probabilities:
            named["probabilities"] = base.with_name(base.name + "_probabilities.nii.gz")
        if taken := {*named.values()} & {file for each in jobs.values() for file in each.values()}:
            raise InputError(f"{scan}: another scan's mask is called {taken.pop()}, too; segment them one by one")
        jobs[scan] = named
    return jobs


def _segment(
    student: Student, backend: Backend, path: Path, files: dict[str, Path], options: argparse.Namespace
) -> str:
    """Writes the mask of one scan, and what else was asked for; says the volume of each class."""
    for file in files.values():
        if os.path.exists(file) and (not options.overwrite or file.resolve() == path.resolve()):
            what = "it is the scan" if file.resolve() == path.resolve() else "give --overwrite to replace it"
            raise InputError(f"{file} exists: {what}; or choose another output")
    scan = read_scan(path)
    if "seg" in files and not scan.series:
        raise InputError(f"{path}: DICOM SEG refers to a DICOM series, and this is NIfTI; give -o mask.nii.gz alone")
    scores = segment(student, backend, scan, options.batch)
    mask = mask_of(scores, student, scan, options.postprocess)
    if "mask" in files:
        save(files["mask"], mask)
    if "probabilities" in files:
        classes = scores[-len(student.classes) :].movedim(0, -1).contiguous().numpy()
        save(files["probabilities"], on_grid(scan, classes, f"kdlib {student.name}, of {', '.join(student.classes)}"))
    if "seg" in files:
        save_seg(files["seg"], scan.series, np.asarray(mask.dataobj), student)
    volumes = ", ".join(f"{name} {ml:.2f} ml" for name, ml in volumes_ml(mask, student.classes).items())
    return f"{files.get('mask') or files['seg']}: {volumes}"


def run_export(options: argparse.Namespace) -> int:
    """Writes the student. Raises: InputError, see `kdlib.inference.export.export`."""
    from kdlib.inference.export import export, mean_dice  # statistics that masks need not wait for

    folder = find_student(options.student, options.results)
    with warnings_said(DataWarning):
        student = export(folder, options.to, options.output, options.data, options.overwrite)
    size = sum(path.stat().st_size for path in options.output.glob("model.*")) / 2**20
    print(f"wrote {options.output}: {options.to}, {size:.2f} MB")
    if after := student.facts.get("dice_int8"):
        print(
            f"mean Dice of {len(after)} test cases: {mean_dice(student.facts['dice']):.4f}, int8 {mean_dice(after):.4f}"
        )
    return 0
