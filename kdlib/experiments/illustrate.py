"""What the figures of features and pairs are drawn from: small tables and arrays of runs, made with torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kdlib.config import InputError, Run, derive_seed
from kdlib.data.sampling import batch_indices
from kdlib.evaluation.similarity import sample_features
from kdlib.experiments.source import run_bank, run_source, training_part
from kdlib.experiments.store import trained
from kdlib.losses import LOSSES
from kdlib.losses.base import resize_labels
from kdlib.training.device import pick_device, precision
from kdlib.training.hooks import probe, scales_of, split_scale
from kdlib.training.state import new_model


def features(runs: Sequence[Run], results: Path | str = "results", device: str = "auto") -> dict[str, np.ndarray]:
    """Features of the same test pixels in the best weights of finished runs of one fold; see `sample_features`.

    Raises: InputError: a run without weights.
    """
    results, place = Path(results).resolve(), pick_device(device)
    fold = run_source(runs[0], results).folds[runs[0].fold]
    bank = run_bank(runs[0], results).select(fold.test).to(place)
    models = {run.method: trained(run, len(bank.classes), results, place) for run in runs}
    with precision(runs[0].optimisation.precision):
        return sample_features(models, bank)


# --------------------------------------------------------------------------------------------------------------- pairs


def pairs(run: Run, results: Path | str = "results") -> dict[str, np.ndarray]:
    """Positive and negative pairs of a supervised contrastive loss in the run's first batch with target, not augmented.

    Of the run's labelled terms the one on the finest grid, with the positions that its loss draws. Two anchors lie on
    the batch's slice with most target: one of its largest class and one of the background, of those drawn the nearest
    to the middle of that class. Each is shown with its keys on three slices: its own, the one of another patient with
    most target, and the one with least.

    Args:
        run: a distilled student; nothing of it needs to be trained.

    Returns: arrays with a row a panel (anchor by anchor): anchor (its class), shown (which slice it is), case, image
        and labels [H,W] uint8, role [h,w] int8 on the term's grid (1 a positive, -1 a negative, 0 not drawn or left
        out), row and column of the anchor on that grid (-1 where it lies on another slice), positives and negatives (of
        the anchor in the whole batch), images (of the batch), step (of the batch, from 0) and term.

    Raises: InputError: the run has no supervised contrastive loss, it has images without labels, or its training slices
        show no target.
    """
    labelled = [term for term in run.effective_recipe.terms if term.loss == "supcon"]
    if not labelled:
        raise InputError(f"{run.method} has no supervised contrastive loss, so it has no pairs to show")
    if run.recipe.unlabelled:
        raise InputError(f"{run.method} has images without labels, which show no pairs: give a run without them")
    if run.preprocessing.dimensions == 3:
        raise InputError(f"{run.method} is a run of volumes, and pairs are shown on slices: give a run of a 2D profile")
    results = Path(results).resolve()
    fold = run_source(run, results).folds[run.fold]
    bank = training_part(run, fold, run_bank(run, results))
    model = new_model(run, len(bank.classes))
    names = scales_of([run.effective_recipe])
    shapes = probe(model, names, run.preprocessing.input_shape)
    grids = {}
    for term in labelled:
        name, factor = split_scale(term.student_layers[0])
        grids[term] = [side // factor for side in shapes[name][1:]]
    term = max(grids, key=lambda term: grids[term][0])
    if not bank.labels.any():
        raise InputError(f"{run.method}, fold {run.fold}: no training slice shows {', '.join(bank.classes)}")
    how = run.optimisation
    batches = enumerate(batch_indices(bank.holds_target, how.batch, run.seed, how.target_share))
    step, index = next((step, index) for step, index in batches if bank.labels[index].any())
    images, labels = bank.images[index], bank.labels[index]
    patients = bank.patient_of(index)
    area = (labels > 0).flatten(1).sum(1)
    loss = LOSSES[term.loss](**term.arguments)
    coarse = resize_labels(labels.long(), torch.empty(len(labels), 1, *grids[term]))
    seed = derive_seed(derive_seed(run.seed, "terms", step), term.name)  # as the step and the distiller derive it
    drawn = loss.draw(coarse, torch.Generator().manual_seed(seed))
    first = int(area.argmax())
    shown = _slices(area, patients, first)
    panels = []
    for anchor in _anchors(coarse, drawn, first):
        relation = loss.relation(anchor[None], drawn, coarse, patients)[0]
        role = torch.zeros(coarse.numel(), dtype=torch.int8)
        role[drawn] = relation
        role = role.view(coarse.shape)
        value = int(coarse.flatten()[anchor])
        place = [int(i) for i in np.unravel_index(int(anchor), coarse.shape)]
        for image, title in shown.items():
            row, column = place[1:] if image == first else (-1, -1)
            panels.append(dict(
                anchor=bank.classes[value - 1] if value else "background", shown=title,
                case=bank.cases[bank.case_index[index[image]]], image=images[image].numpy(),
                labels=labels[image].numpy(), role=role[image].numpy(), row=row, column=column,
                positives=int((relation > 0).sum()), negatives=int((relation < 0).sum()), images=len(index),
                step=step, term=term.name,
            ))  # fmt: skip
    return {name: np.stack([panel[name] for panel in panels]) for name in panels[0]}


def _slices(area: torch.Tensor, patients: torch.Tensor, first: int) -> dict[int, str]:
    """Images to show and what they are: the anchor's, another patient's with most target, the one with least."""
    ranked = area.argsort(descending=True, stable=True).tolist()
    others = [image for image in ranked if patients[image] != patients[first]]
    chosen = {ranked[-1]: "the slice with least target"} | {image: "another patient's slice" for image in others[:1]}
    return {first: "the anchor's slice"} | {i: title for i, title in reversed(chosen.items()) if i != first}


def _anchors(labels: torch.Tensor, drawn: torch.Tensor, image: int) -> list[torch.Tensor]:
    """Of the drawn positions on an image, of its largest class and of the background those nearest to its middle."""
    size = labels[0].numel()
    own = labels[image]
    value = int(own[own > 0].mode().values)
    middle = (own == value).nonzero().float().mean(0)
    here = drawn[drawn // size == image]
    points = torch.stack([here % size // own.shape[1], here % own.shape[1]], 1)
    distance = (points - middle).norm(dim=1)
    found = [labels.flatten()[here] == wanted for wanted in (value, 0)]
    return [here[mask][distance[mask].argmin()] for mask in found if mask.any()]
