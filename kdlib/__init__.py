"""Knowledge distillation for medical image segmentation: the names a notebook needs."""

from kdlib.config import (
    PROFILES, PROTOCOLS, InputError, Profile, Protocol, Recipe, Run, Term, TrainingError, View, choose, tailor,
    thesis_recipe,
)  # fmt: skip

__all__ = [
    "PROFILES", "PROTOCOLS", "InputError", "Profile", "Protocol", "Recipe", "Run", "Term", "TrainingError", "View", "choose",
    "tailor", "thesis_recipe",
]  # fmt: skip
