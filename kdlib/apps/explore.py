"""Looking by hand at any case of any finished run: what `notebooks/explore.ipynb` does.

Plain functions, without widgets (those are in `kdlib.apps.panels`): what has been trained, a case with its masks, the terms'
gradients in a region, two runs compared by case, a small training. Nothing here writes a result: a training lives in
memory alone and is never tested.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.analysis.figures.pictures import ERRORS
from kdlib.analysis.figures.style import STYLE
from kdlib.analysis.metrics import METRICS
from kdlib.config import TEACHERS, InputError, Recipe, Run, derive_seed, from_json, lookup
from kdlib.data import Fold, SliceBank, build_bank, index, restore
from kdlib.data.sampling import batch_indices
from kdlib.data.slices import Geometry
from kdlib.evaluation.masks import predict_cases
from kdlib.experiments.recipes import thesis_recipe
from kdlib.experiments.source import TrainingData, run_source
from kdlib.experiments.store import load_weights, read_manifest, run_key
from kdlib.models import MODELS
from kdlib.training.device import autocast, pick_device
from kdlib.training.hooks import FeatureHooks, scales_of
from kdlib.training.loop import teacher_forward, train_cohort
from kdlib.training.state import RunState, new_model, new_state

PHANTOM = "Phantom"  # name of the built-in data set, which every results folder can make by itself
# of classes, for the colour-blind (after Paul Tol), other than those of errors
COLOURS = ("#44BB99", "#EEDD88", "#6655CC", "#BBCC33", "#DDDDDD", "#AA7744", "#99DDFF", "#AAAA00", "#FFAABB")
OTHERS = 4  # training cases that accompany a slice where terms compare images with each other
FITTING = 40  # steps that projectors, which a run does not keep, are fitted for
DRAWS = 8  # of a contrast's pixels, that a term's gradient is averaged over


# -------------------------------------------------------------------------------------------------- what has been done


def studies(results: Path | str) -> list[str]:
    """Names of the studies in a results folder that have runs to look at.

    Raises:
        InputError: there is none.
    """
    results = Path(results)
    found = sorted({path.parents[1].name for path in results.glob("*/tables/*_runs.csv")})
    if not found:
        raise InputError(f"{results.resolve()} holds no study yet: run one first, e.g. make study")
    return found


def finished_runs(results: Path | str, study: str) -> pd.DataFrame:
    """One row a run of a study whose weights are still there: run (its key), label and the columns of `*_runs.csv`.

    Raises:
        InputError: no such study, or none of its runs is kept.
    """
    results = Path(results)
    lookup("study", study, dict.fromkeys(studies(results)))
    paths = sorted((results / study / "tables").glob("*_runs.csv"))
    table = pd.concat([pd.read_csv(path) for path in paths]).drop_duplicates("run")
    kept = [(results / "runs" / key / "manifest.json").is_file() for key in table["run"]]
    # a network from elsewhere is known only where its builder was put into MODELS
    table = table[np.array(kept) & table["model"].isin(list(MODELS))].reset_index(drop=True)
    if table.empty:
        raise InputError(f"no run of study {study} is kept in {results.resolve() / 'runs'}: run the study again there")
    # the recipe is said where the name of the arm does not tell it
    recipe = np.where(table["teacher"].notna() | ~table["recipe"].isin(["baseline", "teacher"]), table["recipe"], "")
    parts = zip(table["arm"], recipe, table["fold"], table["seed"], strict=True)
    table["label"] = [
        f"{arm}{f' {recipe}' if recipe else ''}, fold {fold}, seed {seed}" for arm, recipe, fold, seed in parts
    ]
    repeated = table["label"].duplicated(keep=False)  # e.g. other protocols
    table.loc[repeated, "label"] += " (" + table["run"].str[:6] + ")"
    return table


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run and what it was trained on.

    Args:
        key: name of its folder in `results/runs`.
        run: its description, with the folder of its data.
        record: its manifest.
        source: data set, classes and folds.
        results: folder that keeps runs and studies.
        device: where to compute.
    """

    key: str
    run: Run
    record: dict
    source: TrainingData
    results: Path
    device: torch.device

    @property
    def folder(self) -> Path:
        return self.results / "runs" / self.key

    @property
    def fold(self) -> Fold:
        return self.source.folds[self.run.fold]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.source.classes)


@functools.cache
def _data_name(folder: str) -> str:
    return index(folder, "drop").name


@functools.cache
def load_run(results: Path | str, key: str, data: str = "phantom", device: str = "auto") -> Finished:
    """A finished run, from its manifest.

    Args:
        key: name of its folder in `results/runs`.
        data: folder of the data set that it was trained on (a manifest holds no path); phantoms need none.

    Raises:
        InputError: no such run, one of another version of kdlib, or data that are not the run's.
    """
    results = Path(results).resolve()
    path = results / "runs" / key / "manifest.json"
    if not (record := read_manifest(path.parent)):
        raise InputError(f"run {key}: {path} does not exist; choose a run whose folder is kept")
    method, name = record["identity"]["method"], record["run"]["data"]
    if name == PHANTOM:
        data = "phantom"
    elif data == "phantom" or (found := _data_name(str(data))) != name:
        instead = "no folder is given" if data == "phantom" else f"{data} holds {found}"
        raise InputError(f"{method} ({key}) was trained on {name!r}, {instead}: give that data set's folder as data")
    run = from_json(record["run"] | {"data": str(data)})
    source = run_source(run, results)
    if source.digest != record["data"]["digest"]:
        raise InputError(f"{method} ({key}) was trained on other files or folds than {data} has now: restore them")
    if run_key(run, results) != key:  # a manifest of another version may say what this one does not understand
        raise InputError(f"{path} does not describe the run of its key in this version of kdlib: train that run again")
    return Finished(key, run, record, source, results, pick_device(device))


def teachers_of(student: Finished, table: pd.DataFrame, data: str, device: str = "auto") -> tuple[Finished, ...]:
    """The runs that taught `student`; of a student alone, the study's first teacher of the same fold, to compare with.

    Args:
        table: of the study's runs, from `finished_runs`.

    Returns:
        nothing for a teacher, or where the study has none of that fold.
    """
    keys = [run_key(run, student.results) for run in student.run.teacher_runs().values()]
    if not keys and student.run.model not in TEACHERS:
        keys = table.loc[table["model"].isin(TEACHERS) & (table["fold"] == student.run.fold), "run"].tolist()[:1]
    return tuple(load_run(student.results, key, data, device) for key in keys)


@functools.lru_cache(maxsize=8)
def network(finished: Finished) -> nn.Module:
    """The network of a run with its best weights, frozen, in eval mode."""
    model = new_model(finished.run, len(finished.classes))
    load_weights(model, finished.folder / "best.safetensors")
    return model.to(finished.device, memory_format=torch.channels_last).eval().requires_grad_(False)


@functools.lru_cache(maxsize=4)
def _slices(finished: Finished, cases: tuple[str, ...]) -> SliceBank:
    """Slices of these cases alone: looking at one must not wait for all."""
    dataset = finished.source.dataset
    part = dataclasses.replace(dataset, cases=tuple(dataset.case(name) for name in cases))
    return build_bank(part, finished.source.classes, finished.run.preprocessing).to(finished.device)


# ---------------------------------------------------------------------------------------------------------- one case


def cases(finished: Finished) -> pd.DataFrame:
    """Every case of a run's data: case, patient, part (test, val, train, or unused) and, of the test part, its Dice."""
    fold = finished.fold
    parts = [(case, part) for part in ("test", "val", "train") for case in getattr(fold, part)]
    table = pd.DataFrame(parts, columns=["case", "part"])
    table.insert(1, "patient", table["case"].map(fold.groups))
    used = fold.subset(finished.run.fraction)
    table.loc[(table["part"] == "train") & ~table["case"].isin(used), "part"] = "unused"
    return table.assign(dice=table["case"].map(_metrics(finished).groupby("case")["dice"].mean()))


def _metrics(finished: Finished) -> pd.DataFrame:
    """case, patient, class and one column a metric."""
    table = pd.read_csv(finished.folder / "metrics.csv", dtype={"case": str, "patient": str})
    return table.pivot_table(index=["case", "patient", "class"], columns="metric", values="value").reset_index()


def predict_case(finished: Finished, case: str) -> np.ndarray:
    """What a run says of a case, in the grid of the case's own files: XYZ uint8, 0 background, 1..C the classes."""
    bank = _slices(finished, (case,))
    scores = restore(predict_cases(network(finished), bank)[case], bank.geometry[case])
    labels = scores.argmax(0) if len(scores) > 1 else scores[0] > finished.run.threshold
    return labels.cpu().numpy().astype(np.uint8)


@dataclass(frozen=True)
class CaseView:
    """One case in the grid of its own files.

    Args:
        case: its name.
        image: XYZ, as stored (HU for CT); affine: voxel to world in mm (RAS).
        shown: (low, high) intensities to show, as the network sees them.
        masks: "truth", "teacher <model>" and "student <arm>" -> XYZ uint8, 0 background, 1..C the classes.
        classes: names of the classes.
        geometry: how its volume became the network's slices.
    """

    case: str
    image: np.ndarray
    affine: np.ndarray
    shown: tuple[float, float]
    masks: dict[str, np.ndarray]
    classes: tuple[str, ...]
    geometry: Geometry

    def differences(self) -> dict[str, np.ndarray]:
        """For each mask a and each b before it, "a against b" -> their `difference`."""
        names = list(self.masks)
        pairs = [(a, b) for number, a in enumerate(names) for b in names[:number]]
        return {f"{a} against {b}": difference(self.masks[a], self.masks[b]) for a, b in pairs}


def difference(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Where two masks differ: 0 alike, 1 missed, 2 too much, 3 the wrong class (uint8)."""
    missed, added = (reference > 0) & (prediction == 0), (reference == 0) & (prediction > 0)
    kind = np.select([prediction == reference, missed, added], [0, 1, 2], 3)
    return kind.astype(np.uint8)


def look(finished: Finished, teachers: tuple[Finished, ...], case: str) -> CaseView:
    """A case with its truth, what the teachers say of it and what the run says.

    Raises:
        InputError: the data have no such case.
    """
    lookup("case", case, dict.fromkeys(finished.fold.groups))
    files = finished.source.dataset.case(case)
    bank = _slices(finished, (case,))
    image, label = (nib.load(path) for path in (files.image, files.label))
    stored = np.asarray(label.dataobj).round().astype(int)
    truth = np.zeros(stored.shape, np.uint8)
    for value, name in enumerate(finished.classes, start=1):
        truth[stored == finished.source.classes[name]] = value
    masks = {"truth": truth}
    masks |= {f"teacher {teacher.run.name}": predict_case(teacher, case) for teacher in teachers}
    role = "teacher" if finished.run.model in TEACHERS else "student"
    masks[f"{role} {finished.run.name}"] = predict_case(finished, case)
    voxels, view = np.asarray(image.dataobj, np.float32), finished.run.preprocessing
    low, high = (0.0, 255.0) if view.published else view.window
    if finished.source.dataset.modality == "MR" and not view.published:
        low, high = np.percentile(voxels[voxels != 0], view.percentiles)
    return CaseView(case, voxels, image.affine, (float(low), float(high)), masks, finished.classes, bank.geometry[case])


def place(geometry: Geometry, voxel: tuple[int, int, int]) -> tuple[int, int, int]:
    """Slice, row and column, in the network's slices, of a voxel of the case's own grid; clipped to the slice."""
    mark = np.zeros(geometry.shape, bool)
    mark[voxel] = True
    number, *where = (int(i) for i in np.argwhere(geometry.orient(mark))[0])
    pixels = [(i + 0.5) * f - 0.5 + s for i, f, s in zip(where, geometry.factor, geometry.start, strict=True)]
    return (number, *(min(max(round(p), 0), geometry.size - 1) for p in pixels))


def largest_slice(seen: CaseView) -> int:
    """The slice with the largest true area; the middle one where the case has none."""
    area = (seen.geometry.orient(seen.masks["truth"]) > 0).sum((1, 2))
    return int(area.argmax()) if area.any() else len(area) // 2


# ---------------------------------------------------------------------------------------------------- terms' gradients


@dataclass(frozen=True)
class Gradients:
    """How each term pulls at a student's features on one slice, and in a region of it.

    Args:
        image: the slice as the network sees it, HW in 0..1; truth: HW class indices.
        region: (first row, row after the last, first column, column after the last).
        maps: term -> HW, the length of its weighted gradient on the features that it reads.
        table: one row a term: term, loss, at, weight, value (unweighted), pull (length of its weighted gradient in the
            region), part (of its pull on the slice that lies in the region, 0 to 1), against (its pull relative to the
            segmentation loss's at the same features) and cosine (with the segmentation loss's; below 0 they oppose).
    """

    image: np.ndarray
    truth: np.ndarray
    region: tuple[int, int, int, int]
    maps: dict[str, np.ndarray]
    table: pd.DataFrame


def effective_recipe(student: Finished, teachers: tuple[Finished, ...]) -> Run:
    """The student's run; of a student alone, the run that would distil it by the thesis's recipe from `teachers`.

    Raises:
        InputError: it is a teacher, or has none.
    """
    run = student.run
    if run.model in TEACHERS or not teachers:
        raise InputError(f"{run.name} has no teacher in this study: choose a student of a fold that a teacher is of")
    if run.teacher:
        return run
    taught = "+".join(teacher.run.model for teacher in teachers)
    return dataclasses.replace(run, teacher=taught, recipe=thesis_recipe(run.model))


def _networks(run: Run, teachers: tuple[Finished, ...]) -> dict[str, nn.Module]:
    """Teachers by model; untrained ones for the control that learns from random weights."""
    if run.recipe.teacher == "random":
        return {
            t.run.model: new_model(t.run, len(t.classes)).to(t.device).eval().requires_grad_(False) for t in teachers
        }
    return {teacher.run.model: network(teacher) for teacher in teachers}


@functools.lru_cache(maxsize=4)
def _fitted(student: Finished, teachers: tuple[Finished, ...]) -> tuple[RunState, SliceBank, dict[str, FeatureHooks]]:
    """The frozen student with projectors fitted to it, the training slices they were fitted on, and its teachers' taps.

    A run keeps its network, not its projectors; without them a feature term's gradient would be noise.
    """
    run, device = effective_recipe(student, teachers), student.device
    bank = _slices(student, student.fold.subset(run.fraction)[:OTHERS])
    networks = _networks(run, teachers)
    arm = new_state(run, len(student.classes), FITTING, device, networks, bank.patients)
    load_weights(arm.model, student.folder / "best.safetensors")
    arm.model.eval().requires_grad_(False)
    taps = {
        name: FeatureHooks(model, model.scales, scales_of([run.effective_recipe], "teacher"))
        for name, model in networks.items()
    }
    learned = [parameter for parameter in arm.distiller.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, 1e-2) if learned else None
    how = run.optimisation
    batches = batch_indices(bank.holds_target.cpu(), how.batch, run.seed, how.target_share)
    for step in range(FITTING):
        drawn = next(batches).to(device)
        losses, _ = _terms(arm, taps, *bank.batch(drawn), bank.patient_of(drawn), range(step, step + 1))
        losses.pop("segmentation")
        total = sum(losses.values())
        if optimiser is not None and total.requires_grad:
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
    return arm, bank, taps


def _terms(
    arm: RunState, taps: Mapping[str, FeatureHooks], images: Tensor, labels: Tensor, patients: Tensor, draws: range
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Unweighted losses by name, as in training but for the frozen network, and the features they rest on.

    Args:
        draws: numbers of the steps whose random draws (the pixels of a contrast) the terms are averaged over.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    seen = {name: teacher_forward(tap, images) for name, tap in taps.items()}
    with autocast(images.device):
        output, features = arm.hooks(images.requires_grad_(), reconstruct=False)  # gradients reach frozen features
        features |= {"logits": output.segmentation}
        totals = dict.fromkeys(arm.distiller.terms, 0.0)
        for step in draws:
            seed = derive_seed(arm.run.seed, "terms", step)
            found = arm.distiller(features, seen, labels, seed, patients, step)
            totals = {name: totals[name] + value / len(draws) for name, value in found.items()}
        return {"segmentation": arm.segmentation(output.segmentation, labels)} | totals, features


def _spread(field: Tensor, size: int) -> np.ndarray:
    """A map hw on the slice's own grid, HW, with the same sum."""
    wide = F.interpolate(field[None, None].float(), size=(size, size), mode="nearest-exact")[0, 0]
    return (wide * (field.numel() / wide.numel())).cpu().numpy()


def _gradients(loss: Tensor, features: list[Tensor]) -> list[Tensor]:
    """Gradient of a loss on the first image's features, CHW each; 0 where it does not reach."""
    if not loss.requires_grad:
        return [torch.zeros_like(feature[0]) for feature in features]
    found = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
    pairs = zip(features, found, strict=True)
    return [torch.zeros_like(feature[0]) if g is None else g[0].float() for feature, g in pairs]


def term_gradients(
    student: Finished,
    teachers: tuple[Finished, ...],
    case: str,
    number: int,
    region: tuple[int, int, int, int] | None = None,
) -> Gradients:
    """How hard, and which way, each distillation term pulls at the trained student's features in a region of a slice.

    The slice stands in a batch of training slices, as in training, because contrasts and relations compare images.
    Each gradient is taken on the features that its term reads, which a term pulls at directly, and averaged over a few
    draws where a term draws pixels. A run keeps its network and not its projectors: they are fitted anew to the frozen
    student first.

    Args:
        student: a distilled student, or one alone (then the thesis's terms from `teachers` are asked).
        case: of any part of its data.
        number: of the slice, from inferior to superior.
        region: first row, row after the last, first column, column after the last, in the network's slice; None for
            all of it.

    Raises:
        InputError: a run without a teacher, or a slice or region that is not there.
    """
    run, size = effective_recipe(student, teachers), student.run.preprocessing.size
    lookup("case", case, dict.fromkeys(student.fold.groups))
    own = _slices(student, (case,))
    if not 0 <= number < len(own):
        raise InputError(f"slice {number}: case {case} has 0 to {len(own) - 1}")
    top, bottom, left, right = region = tuple(region or (0, size, 0, size))
    if not (0 <= top < bottom <= size and 0 <= left < right <= size):
        raise InputError(f"region {region}: give (row, row, column, column), each pair ascending, from 0 to {size}")
    arm, bank, taps = _fitted(student, teachers)
    how = run.optimisation
    others = next(batch_indices(bank.holds_target.cpu(), how.batch, run.seed, how.target_share))[1:].to(student.device)
    patient = bank.patients[bank.cases.index(case)] if case in bank.cases else max(bank.patients) + 1
    here = torch.tensor([number], device=student.device)
    parts = zip(own.batch(here), bank.batch(others), strict=True)
    images, labels = (torch.cat(part) for part in parts)
    patients = torch.cat([torch.full_like(here, patient), bank.patient_of(others)])
    losses, features = _terms(arm, taps, images, labels, patients, range(FITTING, FITTING + DRAWS))

    weights, maps, rows = _weights(student, arm), {}, []
    for name, module in arm.distiller.terms.items():
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
            "term": name, "loss": term.loss, "at": ", ".join(term.student_layers), "weight": weights[name],
            "value": float(losses[name].detach()), "pull": weights[name] * pull,
            "part": inside["own"] / whole if whole else np.nan,
            "against": weights[name] * pull / (weights["segmentation"] * rule) if rule else np.nan,
            "cosine": inside["both"] / (pull * rule) if pull and rule else np.nan,
        })  # fmt: skip
    image, truth = images[0, images.shape[1] // 2].detach().cpu().numpy(), labels[0].cpu().numpy()
    return Gradients(image, truth, region, maps, pd.DataFrame(rows))


def _weights(student: Finished, arm: RunState) -> dict[str, float]:
    """Weights in the total loss; where the recipe balances them, those of the last epoch."""
    history = pd.read_csv(student.folder / "history.csv")
    last = history[history["name"].str.startswith("weight/")].groupby("name")["value"].last()
    return arm.weights | {name.removeprefix("weight/"): float(value) for name, value in last.items()}


# ------------------------------------------------------------------------------------------------- two runs compared


def compare(a: Finished, b: Finished, metric: str = "dice") -> pd.DataFrame:
    """Two runs by test case: case, patient, class, a, b and difference (a minus b), from the least favourable to `a`.

    Raises:
        InputError: no such metric, or the runs were tested on no case in common.
    """
    keys, tables = ["case", "patient", "class"], [_metrics(run) for run in (a, b)]
    lookup("metric", metric, dict.fromkeys(tables[0].columns.drop(keys)))
    a_table, b_table = (table[[*keys, metric]] for table in tables)
    both = a_table.rename(columns={metric: "a"}).merge(b_table.rename(columns={metric: "b"}), on=keys)
    if both.empty:
        raise InputError(
            f"{a.run.name} ({a.key}) and {b.run.name} ({b.key}) were tested on no case in common: choose one fold"
        )
    upwards = METRICS[metric].higher is not False
    return both.assign(difference=both["a"] - both["b"]).sort_values("difference", ascending=upwards, ignore_index=True)


# ------------------------------------------------------------------------------------------------ a training in place


def change_recipe(
    recipe: Recipe, weights: Mapping[str, float] | None = None, temperatures: Mapping[str, float] | None = None
) -> Recipe:
    """A recipe with other weights and temperatures of some of its terms.

    Raises:
        InputError: no such term, or a value that cannot be.
    """
    terms = {term.name: term for term in recipe.terms}
    for field, given in (("weight", weights), ("temperature", temperatures)):
        for name, value in (given or {}).items():
            terms[name] = dataclasses.replace(lookup("term", name, terms), **{field: value})
    return dataclasses.replace(recipe, terms=tuple(terms.values()))


def train_small(
    student: Finished,
    teachers: tuple[Finished, ...] = (),
    weights: Mapping[str, float] | None = None,
    temperatures: Mapping[str, float] | None = None,
    epochs: int = 5,
    steps: int = 20,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """Trains a student for a few steps with other weights or temperatures, in memory: nothing is saved or tested.

    It starts from the run's initial weights, on the run's training cases in the run's order, and is validated on its
    validation cases: test cases are never seen, so that trying out cannot choose by them.

    Args:
        student: a distilled student, or one alone, which is then distilled from `teachers` by the thesis's recipe; one
            alone without teachers stays alone.
        weights, temperatures: of terms, by name; the others keep theirs.
        epochs, steps: length; steps are of one epoch.
        on_epoch: is called after each epoch with the history so far.

    Returns:
        history: tidy, columns epoch, name, value, as of a run.

    Raises:
        InputError: a teacher is to be trained, no such term, or a length below 1.
        TrainingError: the training failed, e.g. by a term that went dead.
    """
    if epochs < 1 or steps < 1:
        raise InputError(f"{epochs} epochs of {steps} steps: give at least 1 of each")
    run = effective_recipe(student, teachers) if teachers or student.run.teacher else student.run
    if run.model in TEACHERS:
        raise InputError(f"{run.name} is a teacher: choose a student to train in place")
    profile = dataclasses.replace(run.profile, student_epochs=epochs, student_steps=steps)
    run = dataclasses.replace(run, recipe=change_recipe(run.recipe, weights, temperatures), profile=profile)
    train, val = (_slices(student, cases) for cases in (student.fold.subset(run.fraction), student.fold.val))
    heard = None if on_epoch is None else lambda arms: on_epoch(pd.DataFrame(arms[0].history))
    networks = _networks(run, teachers) if run.teacher else {}
    (arm,) = train_cohort([run], train, val, steps, student.device, networks, epochs, on_epoch=heard)
    if arm.failure is not None:
        raise arm.failure
    return pd.DataFrame(arm.history)


# ------------------------------------------------------------------------------------------------------------ drawing


def _figure(width: float, height: float) -> Figure:
    """A figure of its own (inches), which pyplot does not keep."""
    return Figure(figsize=(width, height), layout="constrained")


def _paint(ax: Axes, mask: np.ndarray, colours: tuple[str, ...], alpha: float, **how) -> None:
    """Lays a mask over what is drawn: k in the k-th colour, 0 not at all."""
    shades = ListedColormap([colours[number % len(colours)] for number in range(max(int(mask.max()), 1))])
    shown = np.ma.masked_equal(mask, 0)
    ax.imshow(shown, cmap=shades, vmin=1, vmax=shades.N, alpha=alpha, interpolation="nearest", **how)


@rc_context(STYLE)
def draw_slice(seen: CaseView, number: int) -> Figure:
    """One slice of a case: a panel for each mask, and below one for each difference between two of them."""
    geometry, differences = seen.geometry, seen.differences()
    rows = [seen.masks, differences]
    columns = max(len(seen.masks), len(differences))
    # differences of three masks: teacher - truth, student - truth, student - teacher
    figure = _figure(2.6 * columns, 5.6)
    axes = figure.subplots(2, columns, squeeze=False)
    image = geometry.orient(seen.image)[number]
    aspect = geometry.factor[0] / geometry.factor[1]
    for row, (panels, colours) in enumerate(zip(rows, (COLOURS, tuple(c for c, _, _ in ERRORS)), strict=True)):
        for ax, (name, mask) in zip(axes[row], panels.items(), strict=False):
            ax.imshow(image, cmap="gray", vmin=seen.shown[0], vmax=seen.shown[1], aspect=aspect)
            _paint(ax, geometry.orient(mask)[number], colours, 0.5, aspect=aspect)
            ax.set_title(name, fontsize=8)
    for ax in axes.flat:
        ax.set_axis_off()
    classes = [Patch(color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(seen.classes)]
    errors = [Patch(color=colour, label=kind) for colour, _, kind in ERRORS[: 3 if len(seen.classes) > 1 else 2]]
    figure.legend(handles=[*classes, *errors], loc="outside lower center", ncols=6)
    figure.suptitle(f"{seen.case}, slice {number} of 0 to {len(geometry.orient(seen.image)) - 1}", fontsize=9)
    return figure


@rc_context(STYLE)
def draw_gradients(found: Gradients) -> Figure:
    """The slice with truth and region, and for each term where it pulls, brighter is harder, each on its own scale."""
    columns = 1 + len(found.maps)
    figure = _figure(2.2 * min(columns, 5), 2.5 * -(-columns // 5))
    axes = figure.subplots(-(-columns // 5), min(columns, 5), squeeze=False).flatten()
    top, bottom, left, right = found.region
    axes[0].imshow(found.image, cmap="gray", vmin=0, vmax=1)
    _paint(axes[0], found.truth, COLOURS, 0.5)
    axes[0].set_title("slice, truth and region", fontsize=8)
    for ax, (name, pulls) in zip(axes[1:], found.maps.items(), strict=False):
        picture = ax.imshow(pulls, cmap="magma", vmin=0, vmax=float(pulls.max()) or 1.0)
        figure.colorbar(picture, ax=ax, shrink=0.8, format="%.1e").ax.tick_params(labelsize=6)
        ax.set_title(f"pull of {name}", fontsize=8)
    for ax in axes[:columns]:
        box = Rectangle(
            (left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor="#56B4E9", linewidth=1.2
        )
        ax.add_patch(box)
    for ax in axes:
        ax.set_axis_off()
    return figure


@rc_context(STYLE)
def draw_comparison(table: pd.DataFrame, a: str, b: str, metric: str = "dice") -> Figure:
    """Two runs by case, from `compare`: a row a case (classes averaged), the least favourable to `a` on top."""
    rows = table.groupby("case")[["a", "b", "difference"]].mean()
    rows = rows.sort_values("difference", ascending=METRICS[metric].higher is not False)
    figure = _figure(6.0, 1.3 + 0.16 * len(rows))
    ax = figure.subplots()
    at = np.arange(len(rows))
    ax.hlines(at, rows["b"], rows["a"], color="#999999", linewidth=1)
    ax.plot(rows["b"], at, "o", color="#56B4E9", label=b, markersize=5)
    ax.plot(rows["a"], at, "D", color="#D55E00", label=a, markersize=4)
    name, unit, _ = METRICS[metric]
    ax.set(xlabel=f"{name} ({unit})" if unit else name, ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(at, rows.index)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.5)
    figure.legend(loc="outside upper center")
    return figure


@rc_context(STYLE)
def draw_history(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Validation Dice, the losses and the terms' shares of the gradient by epoch, a line style a training.

    Args:
        histories: name -> history of `train_small` (or of a run).
    """
    figure = _figure(8.5, 3.2)
    axes = figure.subplots(1, 3)
    lines = dict(zip(histories, ("-", "--", ":", "-."), strict=False))
    for title, history in histories.items():
        shares = [name for name in history["name"].unique() if name.startswith("share/")]
        for ax, names in zip(axes, (["val_dice"], ["loss", "segmentation"], shares), strict=True):
            for number, name in enumerate(names):
                curve = history[history["name"] == name]
                how = dict(color=f"C{number}", label=name.removeprefix("share/"))
                ax.plot(curve["epoch"], curve["value"], lines[title], marker=".", **how)
    last = max(history["epoch"].max() for history in histories.values())
    for ax, title in zip(axes, ("validation Dice", "losses", "shares of the gradient"), strict=True):
        ax.set(title=title, xlabel="epoch", xlim=(0.7, last + 0.3))
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.ticklabel_format(axis="y", useOffset=False)
        handles, labels = ax.get_legend_handles_labels()
        colours = {label: Patch(color=line.get_color()) for label, line in zip(labels, handles, strict=True)}
        if len(colours) > 1:
            ax.legend(colours.values(), colours, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    trained = [Line2D([], [], color="black", linestyle=line, label=title) for title, line in lines.items()]
    figure.legend(handles=trained, loc="outside upper left", ncols=4)
    return figure
