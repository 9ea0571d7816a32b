"""The cumulative correction: how Dice changes from the published protocol to the corrected one, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from kdlib.analysis.comparisons import smallest_p, verdict
from kdlib.analysis.intervals import canonical_order, resample, studentised, taken_together
from kdlib.analysis.labels import method_labels
from kdlib.analysis.patients import per_patient, volumes
from kdlib.analysis.sentences import NOT_CONVERGED
from kdlib.config import InputError
from kdlib.protocol import has_steps, is_single


def overlap_weights(table: pd.DataFrame, pooled: bool = False) -> pd.DataFrame:
    """Dice of every patient with its weight in the mean.

    A patient's weight is 1; `pooled`, it is the volume of both masks, so that the weighted mean is the Dice of the
    voxels of all patients together, as the published study has it: Dice = 2 |A B| / (|A| + |B|) of sums.

    Args:
        table: tidy, of one method, stage and class, with dice, truth_volume and volume_error of every case.

    Returns: columns dice and weight, by patient; seeds are averaged.
    """
    if not pooled:
        found = per_patient(table, "dice", ["protocol"]).set_index("patient")
        return pd.DataFrame({"dice": found["value"], "weight": 1.0})
    if table["class"].nunique() > 1:
        raise InputError("pooled Dice: several classes; filter the table to one")
    wide = table.pivot_table(index=["patient", "seed", "case"], columns="metric", values="value", sort=False)
    weight = (2 * wide["truth_volume"] + wide["volume_error"]).rename("weight")
    found = pd.DataFrame({"weight": weight, "shared": weight * wide["dice"]})
    found = found.groupby(["patient", "seed"], sort=False).sum().groupby("patient", sort=False).mean()
    dice = (found["shared"] / found["weight"]).fillna(1.0)  # two empty masks: right, and without weight
    return pd.DataFrame({"dice": dice, "weight": found["weight"]})


def training_deviations(table: pd.DataFrame, pooled: bool = False) -> pd.DataFrame:
    """How far each training moves a patient's influence on the weighted mean of `overlap_weights` from what it is over
    all trainings: one row per patient, one column per fold and seed; 0 where there is one training per fold."""
    of = overlap_weights(table, pooled)
    (mean,), _ = _weighted(of[["dice"]].to_numpy().T, of[["weight"]].to_numpy().T)
    scale = len(of) / max(of["weight"].sum(), 1e-12)
    parts = {}
    for place, rows in table.groupby(["fold", "seed"]):
        own = overlap_weights(rows, pooled)
        parts[place] = scale * own["weight"] * (own["dice"] - mean)
    wide = pd.DataFrame(parts)
    return wide.sub(wide.mean(axis=1), axis=0)


def _aligned(groups: Sequence[pd.DataFrame]) -> tuple[np.ndarray, pd.Index]:
    """Dice and weight of the same patients in each of some groups, [groups, 2, patients], and the patients' order."""
    first = groups[0].index
    for group in groups:
        if other := set(first) ^ set(group.index):
            raise InputError(f"patients {', '.join(sorted(map(str, other)))} are not in both: run their folds")
    values = np.stack([group.loc[first].to_numpy(float).T for group in groups])
    order = canonical_order(values.reshape(-1, len(first)).T)
    return values[..., order], first[order]


def paired_changes(
    values: np.ndarray, pairs: Sequence[tuple[int, int]], noise: Sequence[pd.DataFrame] = ()
) -> pd.DataFrame:
    """Paired differences of weighted means of the same patients.

    Args:
        values: Dice and weight, [groups, 2, patients].
        pairs: groups (a, b) to compare.
        noise: of each pair what trainings add to the spread of patients, [patients, trainings] (`taken_together` of
            `training_deviations`, that of b with the opposite sign); none: every patient was seen by one training.

    Returns: one row per pair: n, dice of a, difference a - b, low, high, interval (of patients and of trainings),
        p_adjusted (`paired_permutation`), smallest_p and verdict.
    """
    n, rows = values.shape[-1], []
    drawn = np.random.default_rng(0).integers(n, size=(9999, n))  # as `resample` does
    for number, pair in enumerate(pairs):
        dice, weight = values[list(pair)].transpose(1, 0, 2)
        means, shares = _weighted(dice, weight)
        difference, share = means[0] - means[1], shares[0] - shares[1]
        low = high = difference if n > 1 else np.nan
        kind = ""
        if np.ptp(share) > 1e-12:
            several, parts = _weighted(dice[:, drawn], weight[:, drawn])
            shift = resample(np.zeros(n), noise[number], len(drawn)) if noise else np.zeros((1, 1))
            resampled = several[0] - several[1] + shift.mean(axis=1)
            spreads = (parts[0] - parts[1] + shift).std(axis=1)
            low, high, kind = studentised(difference, share.std(), resampled, spreads, n)
            low, high = np.clip((low, high), -1, 1)  # a difference of two Dice is no larger
        rows.append(dict(n=n, dice=means[0], difference=difference, low=low, high=high, interval=kind))
    found = pd.DataFrame(rows).assign(p_adjusted=paired_permutation(values, pairs), smallest_p=smallest_p(n))
    return found.assign(verdict=[verdict(row.p_adjusted, row.low, row.high, "dice") for row in found.itertuples()])


def _weighted(dice: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean over the last axis, 1 without any weight (empty masks are right), and each patient's influence."""
    total = weight.sum(axis=-1, keepdims=True)
    mean = np.divide((dice * weight).sum(axis=-1, keepdims=True), total, out=np.ones(total.shape), where=total > 0)
    share = np.divide(weight * dice.shape[-1], total, out=np.zeros(weight.shape), where=total > 0)
    return mean[..., 0], share * (dice - mean)


def paired_permutation(values: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Two-sided p of each pair's difference by a paired permutation test, max-T adjusted for all pairs.

    How often the largest of all differences, each in its own standard deviations, is as large when patients' two values
    are swapped at random, in all pairs at once (Westfall & Young 1993). All swaps up to 13 patients, else 9999. Weights
    are swapped too, made alike first, so that a stage with weights can be compared with one without.
    """
    n = values.shape[-1]
    if n <= 13:
        swaps = np.array(list(itertools.product([False, True], repeat=n)))
    else:  # the first are the values as they are
        swaps = np.vstack([np.zeros((1, n), bool), np.random.default_rng(0).random((9999, n)) < 0.5])
    dice, weight = values.transpose(1, 0, 2)
    weight = weight / np.maximum(weight.mean(axis=-1, keepdims=True), 1e-12)
    sizes = []
    for a, b in pairs:
        swapped = [[np.where(swaps, of[j], of[i]) for of in (dice, weight)] for i, j in ((a, b), (b, a))]
        one, other = (_weighted(*of)[0] for of in swapped)
        difference = np.abs(one - other).round(12)
        sizes.append(difference / max(np.sqrt(np.mean(difference**2)), 1e-12))
    largest = np.max(sizes, axis=0)
    return np.array([np.mean(largest >= size[0] - 1e-9) for size in sizes])


def _changes_between(
    parts: Sequence[tuple[pd.DataFrame, str]], pairs: Sequence[tuple[int, int]], pooled: Sequence[str]
) -> pd.DataFrame:
    """`paired_changes` of tidy tables, each with the stage whose rows of it count."""
    means, trainings = [], []
    for table, stage in parts:
        rows = table[table["protocol"] == stage]
        if rows.empty:
            raise InputError(f"no stage {stage!r} in the table: it has {', '.join(table['protocol'].unique())}")
        means.append(overlap_weights(rows, stage in pooled))
        trainings.append(training_deviations(rows, stage in pooled))
    values, patients = _aligned(means)
    noise = [taken_together([trainings[a], -trainings[b]]).loc[patients] for a, b in pairs]
    return paired_changes(values, pairs, noise)


def step_changes(table: pd.DataFrame, stages: Sequence[str], pooled: Sequence[str]) -> pd.DataFrame:
    """How the Dice of one method changes from stage to stage of the protocol, or with single faults put back into it.

    Args:
        table: tidy, of one method and one class, with the stage as `protocol`.
        stages: in order. The first is the published protocol, and each stage is compared with the one before; or it
            is "corrected", and each other stage, with one fault put back, is compared with it.
        pooled: the stages whose Dice is that of pooled voxels.

    Returns: one row per stage and, of a way from the published protocol by several steps, "corrected" for the whole:
        step, before (the stage that it is compared with, "" of the first), dice, difference, its 95 % interval (low,
        high and its name), p_adjusted (`paired_permutation`, of all rows together), smallest_p, verdict (as `paired`
        has it), n and volumes.

    Raises: InputError: a stage is missing, or has other patients than the one before.
    """
    steps, numbers = [*stages], range(1, len(stages))
    pairs = [(0, 0), *((number, 0 if is_single(stages) else number - 1) for number in numbers)]
    if has_steps(stages):
        steps, pairs = [*steps, "corrected"], [*pairs, (len(stages) - 1, 0)]
    found = _changes_between([(table, stage) for stage in stages], pairs, pooled)
    # the first stage is no change
    found.loc[0, ["difference", "low", "high", "interval", "p_adjusted", "verdict"]] = *[np.nan] * 3, "", *[np.nan] * 2
    found.insert(0, "step", steps)
    found.insert(1, "before", ["", *(stages[before] for _, before in pairs[1:])])
    n = found.pop("n")
    return found.assign(n=n, volumes=volumes(table[table["metric"] == "dice"]))


def gains(
    table: pd.DataFrame, method: str, references: Sequence[str], stages: Sequence[str], pooled: Sequence[str]
) -> pd.DataFrame:
    """What a method is worth at every stage of the correction, against each reference on the same patients.

    Args:
        table: tidy, of one class, with the stage as `protocol`.
        method, references: values of the column `method`.
        stages, pooled: as for `step_changes`.

    Returns: one row per (stage, reference): stage, reference, its label (label_b), dice of the method, difference to
        the reference, its 95 % interval, p_adjusted, smallest_p and verdict (as for `step_changes`) and n.

    Raises: InputError: as `step_changes`.
    """
    parts, pairs, names = [], [], []
    labels = method_labels(table[table["protocol"] == stages[0]])
    for stage in stages:
        own = len(parts)
        parts += [(table[table["method"] == name], stage) for name in (method, *references)]
        pairs += [(own, own + number) for number in range(1, len(references) + 1)]
        names += [dict(stage=stage, reference=name, label_b=labels.get(name, name)) for name in references]
    return pd.DataFrame(names).join(_changes_between(parts, pairs, pooled))


def withhold_stages(
    gains: pd.DataFrame, changes: pd.DataFrame, convergence: pd.DataFrame, method: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`gains` and `step_changes` with "not converged" wherever one of the two trainings that are compared has not.

    Args:
        convergence: from `kdlib.analysis.convergence.convergence`, by protocol and method.
        method: the distilled student.
    """
    unfinished = convergence.loc[~convergence["converged"], ["protocol", "method"]]
    rising = set(unfinished.itertuples(index=False, name=None))
    held = [not rising.isdisjoint({(row.stage, method), (row.stage, row.reference)}) for row in gains.itertuples()]
    gains = gains.assign(verdict=gains["verdict"].mask(np.array(held), NOT_CONVERGED))
    steps = list(changes["step"])
    after = [*steps[:-1], steps[-2]] if has_steps(steps) else steps  # the last row is of the whole way
    pairs = zip(changes["before"], after, strict=True)
    held = [bool(first) and not rising.isdisjoint({(first, method), (second, method)}) for first, second in pairs]
    return gains, changes.assign(verdict=changes["verdict"].mask(np.array(held), NOT_CONVERGED))
