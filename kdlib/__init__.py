"""Knowledge distillation for medical image segmentation: the names a notebook needs.

Each is imported where it is first used: what only starts notebooks does not wait for torch.
"""

from importlib import import_module

HOMES = {
    "config": (
        "PROFILES", "PROTOCOLS", "InputError", "Profile", "Protocol", "Recipe", "Run", "Term", "TrainingError", "Preprocessing",
        "cumulative_correction", "lookup", "override_profile",
    ),
    "data": ("case_table", "download", "largest_slices", "split_table"),
    "evaluation.agreement": ("expected_calibration_error",),
    "experiments.recipes": ("QUICK", "comparison_losses", "controls", "distiller", "thesis_recipe"),
    "experiments.designs": ("EXPERIMENTS", "Setting"),
    "experiments.runs": ("Results", "teacher_agreement", "manifest", "run_bank", "run_source", "study"),
}  # fmt: skip
__all__ = sorted(name for names in HOMES.values() for name in names)


def __getattr__(name: str) -> object:
    for module, names in HOMES.items():
        if name in names:
            return getattr(import_module(f"kdlib.{module}"), name)
    raise AttributeError(f"module 'kdlib' has no attribute {name!r}")
