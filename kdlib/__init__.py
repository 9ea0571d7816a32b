"""Knowledge distillation for medical image segmentation: the names a notebook needs.

Each is imported where it is first used: what only starts notebooks does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

HOMES = {
    "config": (
        "PROFILES", "PROTOCOLS", "InputError", "Preprocessing", "Profile", "Protocol", "Recipe", "Run", "Term",
        "TrainingError", "correction_stages", "lookup", "override_profile",
    ),
    "data": ("case_table", "download", "largest_slices", "split_table", "warning_table"),
    "analysis.tables": ("expected_calibration_error",),
    "inference.predict": ("predict",),
    "experiments.recipes": ("QUICK", "comparison_losses", "controls", "distiller", "thesis_recipe"),
    "experiments.designs": ("EXPERIMENTS",),
    "experiments.setting": ("Setting",),
    "experiments.runner": ("study",),
    "experiments.source": ("run_bank", "run_source"),
    "experiments.store": ("manifest",),
    "experiments.tables": ("Results", "teacher_agreement", "volume_costs"),
}  # fmt: skip
__all__ = sorted(name for names in HOMES.values() for name in names)


try:
    __version__ = version("kdlib")
except PackageNotFoundError:  # the folder alone, not installed
    __version__ = "0"


def __getattr__(name: str) -> object:
    for module, names in HOMES.items():
        if name in names:
            return getattr(import_module(f"kdlib.{module}"), name)
    raise AttributeError(f"module 'kdlib' has no attribute {name!r}")
