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
    choose,
    tailor,
    thesis_recipe,
)  # fmt: skip
from kdlib.data import case_table, download, largest_slices, split_table
from kdlib.runs import Results, run_bank, run_source, study

__all__ = [
    "PROFILES",
    "PROTOCOLS",
    "InputError",
    "Profile",
    "Protocol",
    "Recipe",
    "Results",
    "Run",
    "Term",
    "TrainingError",
    "View",
    "case_table",
    "choose",
    "download",
    "largest_slices",
    "run_bank",
    "run_source",
    "split_table",
    "study",
    "tailor",
    "thesis_recipe",
]
