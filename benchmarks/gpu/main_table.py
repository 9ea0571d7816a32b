"""The thesis's main table on one fold: teachers at full width and students alone and taught, 256 x 256.

    python benchmarks/gpu/main_table.py DATA RESULTS FOLD DEVICE [--quick]

As many steps as profile ct128 has (1,200 of a teacher, 2,400 of a student), so that a fold fits into minutes; else the
profile `thesis`. What is finished is kept, and SIGTERM leaves a checkpoint: the same command resumes.
"""

from __future__ import annotations

import sys

from kdlib import Setting, study
from kdlib.experiments import distillation

STEPS = dict(teacher_epochs=10, teacher_steps=120, student_epochs=10, student_steps=240, folds=4)
QUICK = dict(
    width=0.125, teacher_epochs=2, teacher_steps=3, student_epochs=2, student_steps=3, size=64, spacing=5.0, folds=4
)


def main(data: str, results: str, fold: str, device: str, quick: str = "") -> None:
    changes = QUICK if quick else STEPS
    setting = Setting(
        data, profile="thesis", changes=changes, folds=(int(fold),), device=device, results=results, study="main-table"
    )
    study(distillation(setting), results, device).save(setting.folder, f"fold_{fold}")


if __name__ == "__main__":
    main(*sys.argv[1:])
