"""`kdlib export`: a student in the format of another library."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from kdlib.inference import FORMATS


def add_export(commands: argparse._SubParsersAction) -> None:
    line = commands.add_parser("export", help="write a student as ONNX, OpenVINO or a MONAI bundle, with its card")
    line.add_argument("student", help="folder of a student, name of a released one, or key of a run")
    line.add_argument("--to", required=True, choices=FORMATS, help="the format")
    line.add_argument("-o", "--output", type=Path, required=True, help="the exported student's folder")
    line.add_argument("--data", help="data set that it was trained on; int8 is calibrated on its training slices")
    line.add_argument("--overwrite", action="store_true", help="replace a student that exists")
    line.add_argument("--results", default="results", help="folder that trained runs are kept in")


def run_export(options: argparse.Namespace) -> int:
    """Writes the student. Raises: InputError, see `kdlib.inference.export.export`."""
    from kdlib.data import DataWarning
    from kdlib.inference.export import export, mean_dice  # needs torch
    from kdlib.inference.student import find_student

    folder = find_student(options.student, options.results)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", DataWarning)
        student = export(folder, options.to, options.output, options.data, options.overwrite)
    for warning in said:
        if issubclass(warning.category, DataWarning):
            print(f"warning: {warning.message}")
    size = sum(path.stat().st_size for path in options.output.glob("model.*")) / 2**20
    print(f"wrote {options.output}: {options.to}, {size:.2f} MB")
    if after := student.facts.get("dice_int8"):
        print(
            f"mean Dice of {len(after)} test cases: {mean_dice(student.facts['dice']):.4f}, int8 {mean_dice(after):.4f}"
        )
    return 0
