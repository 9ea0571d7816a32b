"""`kdlib predict`: masks of new scans, one after the other; a bad scan costs its own mask alone."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from tqdm.auto import tqdm

from kdlib.config import InputError


def add_predict(commands: argparse._SubParsersAction) -> None:
    line = commands.add_parser("predict", help="segment new scans with a trained student")
    line.add_argument("student", help="folder of a student, name of a released one, or key of a run")
    line.add_argument("scans", nargs="+", type=Path, metavar="SCAN", help="NIfTI file, folder of them, DICOM series")
    line.add_argument("-o", "--output", type=Path, required=True, help="the mask (.nii.gz, .nii, .dcm), or a folder")
    line.add_argument("--probabilities", action="store_true", help="also write the probability of each class")
    line.add_argument("--dicom-seg", action="store_true", help="also write the mask of a DICOM series as DICOM SEG")
    line.add_argument("--postprocess", action="store_true", help="keep the largest component of each class")
    line.add_argument("--overwrite", action="store_true", help="replace masks that exist")
    line.add_argument("--results", default="results", help="folder that trained runs are kept in")
    line.add_argument("--data", help="data set of a run of an older version, which did not record CT or MR")
    line.add_argument("--device", default="auto", help="auto, cpu or cuda")
    line.add_argument("--batch", type=int, default=32, help="slices that pass the network at once (eight: a patch)")


def run_predict(options: argparse.Namespace) -> int:
    """Writes the masks.

    Raises:
        InputError: the student or the output cannot be used; of several scans, some have no mask, each named before.
    """
    from kdlib.inference.backends import load_backend  # needs torch
    from kdlib.inference.scans import find_scans
    from kdlib.inference.student import find_student, load_student

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
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                text = _segment(student, backend, scan, files, options)
            except InputError as error:
                text = ""
                failed.append(error)
        lines = [f"warning: {warning.message}" for warning in said if issubclass(warning.category, UserWarning)]
        lines += [f"error: {failed[-1]}"] if not text and len(jobs) > 1 else []
        for each in lines:
            tqdm.write(each, file=sys.stderr)
        if text:
            tqdm.write(text)
    if failed and len(jobs) > 1:
        raise InputError(f"{len(failed)} of {len(jobs)} scans have no mask; the others are written")
    if failed:
        raise failed[0]
    return 0


def _outputs(scans: list[Path], options: argparse.Namespace) -> dict[Path, dict[str, Path]]:
    """Scan -> what is written of it ("mask", "probabilities", "seg") -> the file."""
    from kdlib.inference.scans import scan_name

    out, jobs = options.output, {}
    suffix = next((end for end in (".nii.gz", ".nii", ".dcm") if out.name.lower().endswith(end)), "")
    single = bool(suffix) and not out.is_dir()
    if single and len(scans) > 1:
        raise InputError(f"{out}: the masks of {len(scans)} scans need a folder; give -o FOLDER")
    if not suffix and out.suffix and not out.is_dir():
        raise InputError(f"{out}: an unknown format; give .nii.gz, .nii or .dcm, or a folder")
    for scan in scans:
        base = out.with_name(out.name[: -len(suffix)]) if single else out / scan_name(scan)
        named = {"mask": base.with_name(base.name + (suffix if single and suffix != ".dcm" else ".nii.gz"))}
        if suffix == ".dcm" and single:
            named = {"seg": out}
        elif options.dicom_seg:
            named["seg"] = base.with_name(base.name + ".dcm")
        if options.probabilities:
            named["probabilities"] = base.with_name(base.name + "_probabilities.nii.gz")
        if taken := {*named.values()} & {file for each in jobs.values() for file in each.values()}:
            raise InputError(f"{scan}: another scan's mask is called {taken.pop()}, too; segment them one by one")
        jobs[scan] = named
    return jobs


def _segment(student, backend, path: Path, files: dict[str, Path], options: argparse.Namespace) -> str:
    """Writes the mask of one scan, and what else was asked for; says the volume of each class."""
    import numpy as np

    from kdlib.inference.predict import mask_of, segment
    from kdlib.inference.scans import on_grid, read_scan, save, volumes_ml

    for file in files.values():
        if file.exists() and (not options.overwrite or file.resolve() == path.resolve()):
            what = "it is the scan" if file.resolve() == path.resolve() else "give --overwrite to replace it"
            raise InputError(f"{file} exists: {what}; or choose another output")
    scan = read_scan(path)
    if "seg" in files and not scan.series:
        raise InputError(f"{path}: DICOM SEG refers to a DICOM series, and this is NIfTI; give -o mask.nii.gz alone")
    scores = segment(student, backend, scan, options.batch)
    mask = mask_of(scores, student, scan, options.postprocess)
    if "seg" in files:
        from kdlib.inference.dicom import save_seg

        save_seg(files["seg"], scan.series, np.asarray(mask.dataobj), student)
    if "mask" in files:
        save(files["mask"], mask)
    if "probabilities" in files:
        classes = scores[-len(student.classes) :].movedim(0, -1).contiguous().numpy()
        save(files["probabilities"], on_grid(scan, classes, f"kdlib {student.name}, of {', '.join(student.classes)}"))
    volumes = ", ".join(f"{name} {ml:.2f} ml" for name, ml in volumes_ml(mask, student.classes).items())
    return f"{files.get('mask') or files['seg']}: {volumes}"
