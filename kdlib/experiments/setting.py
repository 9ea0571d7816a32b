"""What the experiments of a study share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

from kdlib.config import PROTOCOLS, TEACHERS, Profile, Recipe, Run, lookup, override_profile
from kdlib.experiments.source import run_source
from kdlib.files import check_study, check_study_or_job
from kdlib.strict import Whole, check_each_once, check_fields
from kdlib.training.device import pick_device


@dataclass(frozen=True)
class Setting:
    """What the experiments of a study share: the parameters of every notebook, checked once.

    Args:
        data: a folder in Decathlon or nnU-Net layout, or "phantom".
        target: label names joined by ",", or "all".
        profile: name in `kdlib.PROFILES`; `changes`: fields of it to change.
        protocol: name in `kdlib.PROTOCOLS`.
        folds, seeds: outer folds whose patients are tested, and seeds of the students.
        on_defect: "raise" or "drop", see `kdlib.data.index`; `group`: how cases are grouped into patients.
        device: "auto", "cpu" or "cuda".
        results: folder that keeps runs and studies; `study`: folder in it for this study's tables and figures.
        reuse: studies in `results`: a run that stands in their tables is read from there, see `kdlib.study`.

    Raises:
        InputError: names the parameter, its value and what is allowed.
    """

    data: str = "phantom"
    target: str = "spleen"
    profile: str = "quick"
    changes: dict = field(default_factory=dict)
    protocol: str = "corrected"
    folds: tuple[Whole, ...] = (0,)
    seeds: tuple[Whole, ...] = (0,)
    on_defect: Literal["raise", "drop"] = "raise"
    group: str = "auto"
    device: str = "auto"
    results: Path = Path("results")
    study: str = "phantom-spleen-quick"
    reuse: tuple[str, ...] = ()

    def __post_init__(self):
        for name, kind in (("data", str), ("results", Path)):
            if isinstance(getattr(self, name), str | os.PathLike):
                object.__setattr__(self, name, kind(getattr(self, name)))
        check_fields(self)
        check_each_once(folds=self.folds, seeds=self.seeds)
        check_study_or_job(self.study)
        for name in self.reuse:
            check_study(name)
        pick_device(self.device)
        self.everywhere("S1")  # whatever a run refuses

    @property
    def sized(self) -> Profile:
        """The profile with its changes."""
        return override_profile(self.profile, dict(self.changes))

    @property
    def teachers(self) -> list[str]:
        """Those that the profile's studies train."""
        return [model for model in self.sized.networks if model in TEACHERS]

    @property
    def students(self) -> list[str]:
        """Those that the profile's studies train."""
        return [model for model in self.sized.networks if model not in TEACHERS]

    @property
    def classes(self) -> list[str]:
        """Names of the target classes; reads the data set."""
        return list(run_source(self.run("S1"), self.results).classes)

    @property
    def folder(self) -> Path:
        """Where the study's tables and figures are."""
        return self.results / self.study

    @property
    def reused(self) -> list[Path]:
        """Folders of the studies whose tables are read instead of trained."""
        return [self.results / name for name in self.reuse]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Every fold with every seed."""
        return list(product(self.folds, self.seeds))

    @property
    def fields(self) -> dict[str, object]:
        """The fields of `kdlib.Run` that all runs share."""
        shared = dict(data=self.data, target=self.target, profile=self.sized, on_defect=self.on_defect)
        return shared | dict(protocol=lookup("protocol", self.protocol, PROTOCOLS), group=self.group)

    def run(self, model: str, **fields: object) -> Run:
        """A run of this setting, of its first fold unless `fields`, further fields of `kdlib.Run`, say otherwise."""
        return Run(model=model, **(self.fields | dict(fold=self.folds[0]) | fields))

    def everywhere(self, model: str, *recipes: Recipe | None, **fields: object) -> list[Run]:
        """The run of each of these recipes (none given: the model's own) in every fold and seed."""
        each = product(recipes or [None], self.places)
        return [self.run(model, recipe=recipe, fold=fold, seed=seed, **fields) for recipe, (fold, seed) in each]
