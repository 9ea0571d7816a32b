"""Taps, projectors and terms: from the features of a teacher and a student to a dict of losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.config import InputError, Recipe, derive_seed
from kdlib.losses import LOSSES

PROJECTION = 64  # channels that contrastive terms compare teacher and student in


@dataclass(frozen=True)
class Scale:
    """Where a feature term reads student and teacher; `pool` max-pools both, as the next encoder stage would."""

    name: str
    pool: int = 1


# E-E at 1/4 resolution is the second encoder stage after its pooling (teacher 128 channels, S1 32, S2 64)
SCALES = {"E-E": Scale("encoder2", pool=2), "B-B": Scale("bottleneck"), "D-D": Scale("decoder1")}


class Taps:
    """Reads named layers of any model during its forward pass, without changing the model.

    Args:
        model: the network.
        layers: scale name -> submodule path; kdlib's models carry theirs as `model.scales`.
        names: the scales to read.

    Raises:
        InputError: a scale that `layers` does not name, or a path that the model does not have.
    """

    def __init__(self, model: nn.Module, layers: dict[str, str], names: Iterable[str]):
        self.model = model
        self.features: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        self._handles = []
        for name in names:
            if name not in layers:
                raise InputError(f"scale {name!r} does not exist in {type(model).__name__}: it has {', '.join(layers)}")
            if layers[name] not in modules:
                known = ", ".join(path for path in modules if path)
                raise InputError(
                    f"{type(model).__name__} has no layer {layers[name]!r} (scale {name!r}); layers: {known}"
                )
            self._handles.append(modules[layers[name]].register_forward_hook(self._reader(name)))

    def _reader(self, name: str):
        def read(module, inputs, output):
            self.features[name] = output

        return read

    def __call__(self, *args, **kwargs) -> tuple[object, dict[str, Tensor]]:
        """The model's output, and the features of this pass."""
        output = self.model(*args, **kwargs)
        features, self.features = self.features, {}
        return output, features

    def close(self) -> None:
        """Takes the hooks off the model again."""
        for handle in self._handles:
            handle.remove()


def scales_of(recipes: Iterable[Recipe]) -> list[str]:
    """The scales that the feature terms of `recipes` read, each once, in a fixed order."""
    used = {term.name for recipe in recipes for term in recipe.terms}
    return [scale.name for name, scale in SCALES.items() if name in used]


@torch.no_grad()
def channels_of(
    model: nn.Module, layers: dict[str, str], names: Iterable[str], in_channels: int, dims: int = 2
) -> dict:
    """Channels of each named scale, found by one small forward pass in eval mode."""
    parameter = next(model.parameters())
    taps, training = Taps(model, layers, names), model.training
    model.eval()  # batch statistics must not see the probe
    _, features = taps(torch.zeros(1, in_channels, *[32] * dims, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    taps.close()
    return {name: feature.shape[1] for name, feature in features.items()}


def resize(features: Tensor, grid: torch.Size) -> Tensor:
    """`features` (BCH[WD]) on another grid, by (bi/tri)linear interpolation."""
    if features.shape[2:] == grid:
        return features
    return F.interpolate(features, size=grid, mode={4: "bilinear", 5: "trilinear"}[features.ndim], align_corners=False)


class FeatureTerm(nn.Module):
    """One feature term: pool, project to a common width, bring to the student's grid, compare.

    Both sides of a contrast are projected to `PROJECTION` channels by learned 1x1 convolutions. For MSE only the
    student is projected, to the teacher's width: two learned sides would agree by shrinking to zero (FitNets,
    Romero et al. 2015). The teacher is projected before it is resized, which commutes and is cheaper.
    """

    def __init__(self, term, student_channels: int, teacher_channels: int, dims: int):
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.pool = {2: F.max_pool2d, 3: F.max_pool3d}[dims]
        self.factor = SCALES[term.name].pool
        if term.loss == "mse":
            self.student = conv(student_channels, teacher_channels, 1)
            self.teacher = nn.Identity()
            self.loss = LOSSES["mse"]()
        else:
            self.student = conv(student_channels, PROJECTION, 1)
            self.teacher = conv(teacher_channels, PROJECTION, 1)
            self.loss = LOSSES[term.loss](term.temperature)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        if self.factor > 1:
            student, teacher = self.pool(student, self.factor), self.pool(teacher, self.factor)
        student, teacher = self.student(student), self.teacher(teacher)
        return self.loss(student, resize(teacher, student.shape[2:]), labels, generator)


class Distiller(nn.Module):
    """All distillation terms of a recipe for one pair of student and teacher.

    Its parameters are the projectors; they belong into the student's optimiser. Initial weights depend on `seed` and
    on the term's name alone, so a term starts alike in every subset of an ablation.

    Args:
        recipe: its terms say what is compared, how, and with which temperature.
        student_channels, teacher_channels: scale name -> channels (see `channels_of`).
        seed: of the projectors.
        dims: 2 or 3 spatial dimensions.
    """

    def __init__(self, recipe: Recipe, student_channels: dict, teacher_channels: dict, seed: int, dims: int = 2):
        super().__init__()
        self.recipe = recipe
        self.terms = nn.ModuleDict()
        for term in recipe.terms:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(seed, "projector", term.name))
                if term.name == "PMD":
                    self.terms[term.name] = LOSSES["kl"](term.temperature)
                else:
                    scale = SCALES[term.name].name
                    self.terms[term.name] = FeatureTerm(term, student_channels[scale], teacher_channels[scale], dims)

    def forward(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], labels: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """Unweighted terms by name.

        Args:
            student, teacher: scale name -> features (BCH[WD]), with "logits" the segmentation logits.
            labels: BH[WD] class indices of the student's input.
            seed: of whatever a term draws in this step (the pixels of a contrast); each term has its own stream.
        """
        losses = {}
        for name, module in self.terms.items():
            scale = SCALES[name].name if name in SCALES else "logits"
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            losses[name] = module(student[scale], teacher[scale], labels, generator)
        return losses
