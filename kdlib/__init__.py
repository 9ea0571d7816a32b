"""Knowledge distillation for medical image segmentation: the names a notebook needs."""

from kdlib.config import (
    PROFILES,
    PROTOCOLS,
    InputError,
    Profile,
    Protocol,
    Recipe,
    Run,
    Term,
    TrainingError,
    View,
    bridge,
    choose,
    tailor,
)  # fmt: skip
from kdlib.data import case_table, download, largest_slices, split_table
from kdlib.fidelity import expected_calibration_error
from kdlib.recipes import DISTILLERS, QUICK, controls, distiller, thesis_recipe
from kdlib.runs import Results, imitation, manifest, run_bank, run_source, study

__all__ = [
    "DISTILLERS",
    "PROFILES",
    "PROTOCOLS",
    "QUICK",
    "InputError",
    "Profile",
    "Protocol",
    "Recipe",
    "Results",
    "Run",
    "Term",
    "TrainingError",
    "View",
    "bridge",
    "case_table",
    "choose",
    "controls",
    "distiller",
    "download",
    "expected_calibration_error",
    "imitation",
    "largest_slices",
    "manifest",
    "run_bank",
    "run_source",
    "split_table",
    "study",
    "tailor",
    "thesis_recipe",
]
