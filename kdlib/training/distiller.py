"""FeatureHooks, adapters and terms: from the features of teachers and a student to a dict of losses."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.config import InputError, Recipe, Term, derive_seed, lookup
from kdlib.losses import LOSSES, Context

PROJECTION = 64  # channels that a contrast compares teacher and student in


class FeatureHooks:
    """Reads named layers of any model during its forward pass, without changing the model.

    Args:
        model: the network.
        layers: scale name -> submodule path; kdlib's models carry theirs as `model.scales`.
        names: the scales to read.

    Raises:
        InputError: a scale that `layers` does not name, or a path that the model does not have; and, at a pass, a
            layer that does not give one tensor.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, str], names: Iterable[str]):
        self.model = model
        self.features: dict[str, Tensor] = {}
        self.names = list(names)
        modules = dict(model.named_modules())
        self._handles = []
        for name in self.names:
            if name not in layers:
                raise InputError(f"scale {name!r} does not exist in {type(model).__name__}: it has {', '.join(layers)}")
            if layers[name] not in modules:
                known = ", ".join(path for path in modules if path)
                raise InputError(
                    f"{type(model).__name__} has no layer {layers[name]!r} (scale {name!r}); layers: {known}"
                )
            self._handles.append(modules[layers[name]].register_forward_hook(self._reader(name, layers[name])))

    def _reader(self, name: str, path: str):
        def read(module, inputs, output):
            if not isinstance(output, Tensor):
                raise InputError(
                    f"layer {path!r} (scale {name!r}) gives a {type(output).__name__}: name a layer that gives a tensor"
                )
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


def _split(place: str) -> tuple[str, int]:
    """A scale and the factor that it is pooled by: "encoder2/2" is ("encoder2", 2)."""
    name, _, factor = place.partition("/")
    if factor and not (factor.isdigit() and int(factor) > 1):
        raise InputError(f"scale {place!r}: write the factor of its pooling as a whole number above 1, e.g. encoder2/2")
    return name, int(factor or 1)


def scales_of(recipes: Iterable[Recipe], taught: bool = False) -> list[str]:
    """The scales that `recipes` read from their student (or, where `taught`, from their teacher), each once."""
    places = [
        place for r in recipes for term in r.terms for place in (term.teacher_layers if taught else term.student_layers)
    ]
    return list(dict.fromkeys(name for name, _ in map(_split, places) if name != "logits"))


@torch.no_grad()
def probe(
    model: nn.Module, layers: Mapping[str, str], names: Iterable[str], channels: int = 3, dims: int = 2, size: int = 64
) -> dict[str, torch.Size]:
    """[N, H, W (, D)] of each named scale for an image of this size, found by one forward pass in eval mode."""
    parameter = next(model.parameters())
    taps, training = FeatureHooks(model, layers, names), model.training
    model.eval()  # batch statistics must not see the probe
    _, features = taps(torch.zeros(1, channels, *[size] * dims, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    taps.close()
    kind = type(model).__name__
    for name in taps.names:
        if name not in features:
            raise InputError(f"layer {layers[name]!r} (scale {name!r}) of {kind} is never run: name another")
        if features[name].dim() != dims + 2:
            raise InputError(
                f"layer {layers[name]!r} (scale {name!r}) of {kind} gives {list(features[name].shape)}, not [batch, "
                f"channels, {dims} spatial dimensions]: name a layer that gives maps"
            )
    return {name: features[name].shape[1:] for name in taps.names}


def resize(features: Tensor, grid: Sequence[int]) -> Tensor:
    """`features` (BNH[WD]) on another grid: (bi/tri)linear to a finer one, means of areas to a coarser one."""
    if features.shape[2:] == tuple(grid):
        return features
    if all(new <= old for new, old in zip(grid, features.shape[2:], strict=True)):
        return F.interpolate(features, size=tuple(grid), mode="area")
    mode = {4: "bilinear", 5: "trilinear"}[features.ndim]
    return F.interpolate(features, size=tuple(grid), mode=mode, align_corners=False)


class Projector(nn.Module):
    """A 1x1 convolution: learned, frozen at its random weights, or redrawn at every step (both as controls)."""

    def __init__(self, channels: int, out_channels: int, dims: int, kind: str):
        super().__init__()
        self.conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims](channels, out_channels, 1)
        self.conv.requires_grad_(kind == "learned")
        self.redrawn = kind == "redrawn"

    def forward(self, features: Tensor, seed: int) -> Tensor:
        if self.redrawn:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                fresh = nn.Conv2d(self.conv.in_channels, self.conv.out_channels, 1)  # on the CPU: alike on any device
                self.conv.weight.copy_(fresh.weight.view_as(self.conv.weight))
                self.conv.bias.copy_(fresh.bias)
        return self.conv(features)


class Adapter(nn.Module):
    """Brings a student's and a teacher's features to the same channels and to the student's grid.

    The loss says which channels it needs (`adapt`): "both" sides projected to `PROJECTION`, the "student" projected to
    the teacher's (two learned sides of a regression would agree by shrinking to zero; FitNets, Romero 2015), or
    "none". A 1x1 projection commutes with resizing, so the teacher is projected on whichever grid is smaller.

    Args:
        adapt: "both", "student" or "none".
        student, teacher: [N, H, W (, D)] of a probe.
        places: of student and teacher, e.g. "encoder2/2".
        kind: of the projectors: "learned", "frozen" or "redrawn".
    """

    def __init__(self, adapt: str, student: torch.Size, teacher: torch.Size, places: tuple[str, str], kind: str):
        super().__init__()
        dims = len(student) - 1
        width = {"both": PROJECTION, "student": teacher[0], "none": None}[adapt]
        self.student = Projector(student[0], width, dims, kind) if width else None
        self.teacher = Projector(teacher[0], width, dims, kind) if adapt == "both" else None
        self.factors = [_split(place)[1] for place in places]
        self.pool = {2: F.max_pool2d, 3: F.max_pool3d}[dims]
        self.description = self._describe(student, teacher, places, kind)

    def forward(self, student: Tensor, teacher: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        student, teacher = (
            self.pool(features, factor) if factor > 1 else features
            for features, factor in zip((student, teacher), self.factors, strict=True)
        )
        grid = student.shape[2:]
        finer = teacher.shape[2:].numel() > grid.numel()
        if finer:
            teacher = resize(teacher, grid)
        if self.student is not None:
            student = self.student(student, derive_seed(seed, "student"))
        if self.teacher is not None:
            teacher = self.teacher(teacher, derive_seed(seed, "teacher"))
        return student, teacher if finer else resize(teacher, grid)

    def _describe(self, student: torch.Size, teacher: torch.Size, places: tuple[str, str], kind: str) -> str:
        grids = [[side // factor for side in s[1:]] for s, factor in zip((student, teacher), self.factors, strict=True)]
        texts = []
        for role, place, shape, grid, projector in zip(
            ("student", "teacher"), places, (student, teacher), grids, (self.student, self.teacher), strict=True
        ):
            text = f"{role} {place} {shape[0]} channels on {' x '.join(map(str, grid))}"
            if projector is not None:
                text += f", to {projector.conv.out_channels} by a {kind} 1x1 projection"
            texts.append(text)
        if grids[0] != grids[1]:
            finer = grids[1][0] > grids[0][0]
            texts[1] += f", {'averaged' if finer else 'interpolated'} to the student's grid"
            if self.teacher is not None:
                texts[1] += " before its projection" if finer else " after its projection"
        return "; ".join(texts)


def _arguments(term: Term) -> tuple[type[nn.Module], dict[str, object]]:
    """The loss of a term and what it is made with. Raises: InputError for what does not exist or fit."""
    loss = lookup("distillation loss", term.loss, LOSSES)
    parameters = inspect.signature(loss).parameters.values()
    own = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    options = [name for name in own if loss.adapt != "own" or name not in _SHAPES]
    unknown = [name for name in term.arguments if name not in options]
    if unknown:
        raise InputError(
            f"term {term.name}: loss {term.loss!r} has no option {', '.join(unknown)}; "
            f"it has {', '.join(options) or 'none'}"
        )
    places = {place == "logits" for place in term.student_layers + term.teacher_layers}
    if places != {loss.reads == "logits"}:
        kind = "logits: let it read at 'logits'" if loss.reads == "logits" else "features: let it read at scales"
        raise InputError(f"term {term.name}: loss {term.loss!r} compares {kind}")
    if len(term.student_layers) > 1 and loss.adapt != "own":
        raise InputError(f"term {term.name}: loss {term.loss!r} takes one scale; write a term for each")
    if term.projector != "learned" and loss.adapt in ("none", "own"):
        raise InputError(f"term {term.name}: loss {term.loss!r} has no projector that could be {term.projector}")
    return loss, term.arguments


_SHAPES = ("student_channels", "teacher_channels", "dims")


def check_recipe(recipe: Recipe) -> None:
    """Raises InputError where a term names a loss, an option or a scale that cannot be."""
    for term in recipe.terms:
        loss, arguments = _arguments(term)
        shapes = ([8] * len(term.student_layers), [8] * len(term.student_layers), 2) if loss.adapt == "own" else ()
        loss(*shapes, **arguments)
    scales_of([recipe]), scales_of([recipe], taught=True)


class DistillationTerm(nn.Module):
    """One term between one student and one teacher: adapters where the loss needs them, and the loss.

    Args:
        term: what is compared, where and how.
        student, teacher: scale name -> [N, H, W (, D)] (see `probe`).
        dims: 2 or 3 spatial dimensions.
        redrawn: draw its projectors anew at every step, as the published code does.
    """

    def __init__(
        self,
        term: Term,
        student: Mapping[str, Sequence[int]],
        teacher: Mapping,
        dims: int = 2,
        redrawn: bool = False,
    ):
        super().__init__()
        self.term = term
        loss, arguments = _arguments(term)
        self.adapters = nn.ModuleList()
        if loss.adapt == "own":
            sides = self._sides(student, teacher)
            channels = [[shapes[_split(place)[0]][0] for place in places] for shapes, places in sides]
            self.loss = loss(*channels, dims, **arguments)
            return
        self.loss = loss(**arguments)
        if loss.reads == "features":
            (place,), (taught,) = term.student_layers, term.teacher_layers
            shapes = student[_split(place)[0]], teacher[_split(taught)[0]]
            self.adapters.append(
                Adapter(loss.adapt, *shapes, (place, taught), "redrawn" if redrawn else term.projector)
            )

    def _sides(self, student, teacher):
        return (student, self.term.student_layers), (teacher, self.term.teacher_layers)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, context: Context, seed: int
    ) -> Tensor:
        seen = [[features[_split(place)[0]] for place in places] for features, places in self._sides(student, teacher)]
        if self.loss.adapt == "own":
            return self.loss(*seen, labels, context)
        (mine,), (taught,) = seen
        if self.adapters:
            mine, taught = self.adapters[0](mine, taught, derive_seed(seed, "projector"))
        else:
            taught = resize(taught, mine.shape[2:])
        return self.loss(mine, taught, labels, context)

    def describe(self) -> str:
        """What is compared with what, in words."""
        if self.adapters:
            return self.adapters[0].description
        return f"student {', '.join(self.term.student_layers)}; teacher {', '.join(self.term.teacher_layers)}" + (
            "; the loss's own projections" if self.loss.adapt == "own" else ""
        )


class Distiller(nn.Module):
    """All distillation terms of a recipe for one student and its teachers.

    Its parameters are the projectors; they belong into the student's optimiser. Initial weights depend on `seed` and
    on the term's name alone, so a term starts alike in every subset of an ablation. With several teachers every term
    is there once a teacher, under the name "<teacher> <term>", and its weight is divided among them.

    Args:
        recipe: its terms say what is compared, how, and with which temperature.
        student: scale name -> [N, H, W (, D)] of the student (see `probe`).
        teachers: teacher -> the same of it.
        seed: of the projectors.
        dims: 2 or 3 spatial dimensions.
        patients: numbers of the training patients, whose features alone may enter a memory.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: Mapping[str, Sequence[int]],
        teachers: Mapping[str, Mapping[str, Sequence[int]]],
        seed: int,
        dims: int = 2,
        patients: Iterable[int] = (),
    ):
        super().__init__()
        self.terms, self.weights, self.parts = nn.ModuleDict(), {}, {}
        for teacher, shapes in teachers.items():
            for term in recipe.terms:
                name = term.name if len(teachers) == 1 else f"{teacher} {term.name}"
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(derive_seed(seed, "projector", name))
                    self.terms[name] = DistillationTerm(term, student, shapes, dims, recipe.redrawn_projectors)
                self.weights[name] = term.weight / len(teachers)
                self.parts[name] = teacher
        known = sorted(set(patients))
        for module in self.modules():
            if hasattr(module, "allow_patients"):
                module.allow_patients(known)

    def forward(
        self,
        student: Mapping[str, Tensor],
        taught: Mapping[str, Mapping[str, Tensor]],
        labels: Tensor,
        seed: int,
        patients: Tensor | None = None,
        step: int = 0,
    ) -> dict[str, Tensor]:
        """Unweighted terms by name.

        Args:
            student: scale name -> features (BNH[WD]), with "logits" the segmentation logits; taught: the same of
                every teacher.
            labels: BH[WD] class indices of the student's input.
            seed: of whatever a term draws in this step (the pixels of a contrast); each term has its own stream.
            patients: [B], the patient of each image; step: number of the step; both for terms with a memory.
        """
        losses = {}
        for name, module in self.terms.items():
            own = derive_seed(seed, name)
            context = Context(torch.Generator().manual_seed(own), patients, step)
            losses[name] = module(student, taught[self.parts[name]], labels, context, own)
        return losses

    def learned(self, name: str) -> list[nn.Parameter]:
        """The parameters of a term that are trained with the student."""
        return [parameter for parameter in self.terms[name].parameters() if parameter.requires_grad]

    def describe(self) -> dict[str, str]:
        """Term -> what is compared with what, and how the two were brought to the same channels and grid."""
        return {name: module.describe() for name, module in self.terms.items()}
