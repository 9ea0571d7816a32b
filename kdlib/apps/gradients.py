"""The gradient of each distillation term of a finished run, on one slice and in a region of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib.apps.explore import Finished, case_slices, distillation_run, teacher_networks
from kdlib.config import InputError, derive_seed, lookup
from kdlib.data import SliceBank
from kdlib.data.sampling import batch_indices
from kdlib.record import verified
from kdlib.training.checkpoint import load_weights
from kdlib.training.device import autocast, precision
from kdlib.training.frozen import FrozenTeachers
from kdlib.training.state import RunState, new_state

OTHERS = 4  # training cases that accompany a slice where terms compare images with each other
DRAWS = 8  # of a contrast's pixels, that a term's gradient is averaged over


@dataclass(frozen=True)
class Gradients:
    """Each term's gradient on a student's features on one slice, and in a region of it.

    Args:
        image: the slice as the network sees it, HW in 0..1; truth: HW class indices.
        region: (first row, row after the last, first column, column after the last).
        maps: term -> HW, the length of its weighted gradient on the features that it reads.
        table: one row per term: term, loss, layers, weight, value (unweighted), grad_norm (of its weighted gradient in
            the region), share_in_region (of its gradient on the slice, 0 to 1), vs_segmentation (its gradient relative
            to the segmentation loss's at the same features) and cosine (with the segmentation loss's; below 0 they
            oppose).
    """

    image: np.ndarray
    truth: np.ndarray
    region: tuple[int, int, int, int]
    maps: dict[str, np.ndarray]
    table: pd.DataFrame


@functools.lru_cache(maxsize=4)
def _prepared(student: Finished, teachers: tuple[Finished, ...]) -> tuple[RunState, SliceBank, FrozenTeachers]:
    """The frozen student with the projectors of its run, some of its training slices, and its teachers."""
    run, device = distillation_run(student, teachers, only=("PMD",)), student.device
    if run.teacher == "self" or not run.effective_recipe.terms:
        raise InputError(f"{run.method} is compared with no teacher as it trains: choose a distilled student")
    bank = case_slices(student, student.fold.subset(run.fraction)[:OTHERS])
    networks = teacher_networks(run, teachers)
    state = new_state(run, len(student.classes), 1, device, networks, bank.patients)
    load_weights(state.model, student.folder / "best.safetensors")
    kept = student.folder / "projectors.safetensors"
    if student.run.teacher and any(parameter.requires_grad for parameter in state.distiller.parameters()):
        if not kept.is_file():
            raise InputError(f"{kept} does not exist: the run keeps no projectors; train it again to see its gradients")
        state.distiller.load_state_dict(safetensors.torch.load_file(verified(kept)))
    state.model.eval().requires_grad_(False)
    state.distiller.eval()  # memories take nothing in
    return state, bank, FrozenTeachers(networks, [run.effective_recipe])


def _terms(
    state: RunState, taught: FrozenTeachers, images: Tensor, labels: Tensor, patients: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Unweighted losses by name, as in training but for the frozen network, and the features they rest on; terms are
    averaged over the random draws (the pixels of a contrast) of the first steps."""
    images = images.contiguous(memory_format=torch.channels_last)
    seen = taught(images, 0)
    with autocast(images.device, images.dim() - 2):
        output, features = state.hooks(images.requires_grad_(), reconstruct=False)  # gradients reach frozen features
        features |= {"logits": output.segmentation}
        totals = dict.fromkeys(state.distiller.terms, 0.0)
        for step in range(DRAWS):
            seed = derive_seed(state.run.seed, "terms", step)
            found = state.distiller(features, seen, labels, seed, patients)
            totals = {name: totals[name] + value / DRAWS for name, value in found.items()}
        return {"segmentation": state.segmentation(output.segmentation, labels)} | totals, features


def _spread(field: Tensor, size: int) -> np.ndarray:
    """A map hw on the slice's own grid, HW, with the same sum."""
    wide = F.interpolate(field[None, None].float(), size=(size, size), mode="nearest-exact")[0, 0]
    return (wide * (field.numel() / wide.numel())).cpu().numpy()


def _gradients(loss: Tensor, features: list[Tensor]) -> list[Tensor]:
    """Gradient of a loss on the first image's features, CHW each; 0 where it does not reach."""
    if not loss.requires_grad:
        return [torch.zeros_like(feature[0]) for feature in features]
    found = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True, materialize_grads=True)
    return [gradient[0].float() for gradient in found]


def term_gradients(
    student: Finished, teachers: tuple[Finished, ...], case: str, number: int,
    region: tuple[int, int, int, int] | None = None,
) -> Gradients:  # fmt: skip
    """Size and direction of each distillation term's gradient on the trained student's features in a region of a slice.

    The slice stands in a batch of training slices, as in training, because contrasts and relations compare images.
    Each gradient is taken on the features that its term reads, which a term changes directly, and averaged over a few
    draws where a term draws pixels. Projectors are those of the run.

    Args:
        student: a distilled student, or a baseline (then the prediction term from `teachers`, which needs no
            projectors).
        case: of any part of its data.
        number: of the slice, from inferior to superior.
        region: first row, row after the last, first column, column after the last, in the network's slice; None for
            all of it.

    Raises: InputError: a run without a teacher, or a slice or region that is not there.
    """
    size = student.run.preprocessing.size
    lookup("case", case, dict.fromkeys(student.fold.groups))
    own = case_slices(student, (case,))
    if not 0 <= number < len(own):
        raise InputError(f"slice {number}: case {case} has 0 to {len(own) - 1}")
    top, bottom, left, right = region = tuple(region or (0, size, 0, size))
    if not (0 <= top < bottom <= size and 0 <= left < right <= size):
        raise InputError(f"region {region}: give (row, row, column, column), each pair ascending, from 0 to {size}")
    state, bank, taught = _prepared(student, teachers)
    batches = batch_indices(bank.holds_target.cpu(), state.run.optimisation.batch, state.run.seed)
    others = next(batches)[1:].to(student.device)
    patient = bank.patients[bank.cases.index(case)] if case in bank.cases else max(bank.patients) + 1
    here = torch.tensor([number], device=student.device)
    parts = zip(own.batch(here), bank.batch(others), strict=True)
    images, labels = (torch.cat(part) for part in parts)
    patients = torch.cat([torch.full_like(here, patient), bank.patient_of(others)])
    with precision(state.run.optimisation.precision):
        losses, features = _terms(state, taught, images, labels, patients)

    weights, maps, rows = _weights(student, state), {}, []
    for name, module in state.distiller.terms.items():
        term = module.term
        read = [features[scale.partition("/")[0]] for scale in term.student_layers]
        pulls, ruled = (_gradients(losses[loss], read) for loss in (name, "segmentation"))
        squares = {
            kind: sum(_spread((a * b).sum(0), size) for a, b in zip(one, other, strict=True))
            for kind, one, other in (("own", pulls, pulls), ("both", pulls, ruled), ("ruled", ruled, ruled))
        }
        inside = {kind: float(square[top:bottom, left:right].sum()) for kind, square in squares.items()}
        pull, rule = (max(inside[kind], 0.0) ** 0.5 for kind in ("own", "ruled"))
        whole = float(squares["own"].sum())
        maps[name] = weights[name] * np.sqrt(squares["own"].clip(min=0))
        rows.append({
            "term": name, "loss": term.loss, "layers": ", ".join(term.student_layers), "weight": weights[name],
            "value": float(losses[name].detach()), "grad_norm": weights[name] * pull,
            "share_in_region": inside["own"] / whole if whole else np.nan,
            "vs_segmentation": weights[name] * pull / (weights["segmentation"] * rule) if rule else np.nan,
            "cosine": inside["both"] / (pull * rule) if pull and rule else np.nan,
        })  # fmt: skip
    image, truth = images[0, images.shape[1] // 2].detach().cpu().numpy(), labels[0].cpu().numpy()
    return Gradients(image, truth, region, maps, pd.DataFrame(rows))


def _weights(student: Finished, state: RunState) -> dict[str, float]:
    """Weights in the total loss; where the recipe balances them, those of the last epoch."""
    history = pd.read_csv(student.folder / "history.csv")
    last = history[history["name"].str.startswith("weight/")].groupby("name")["value"].last()
    return state.weights | {name.removeprefix("weight/"): float(value) for name, value in last.items()}
